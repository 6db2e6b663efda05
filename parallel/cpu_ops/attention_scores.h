// The two products of attention over one block of keys: queries by keys, and weights by values.
//
// Keys of a block are turned so that lanes are keys: a score is then summed from the first pair of numbers to the last, and no
// lanes are added up. A result depends on its own query, keys and values alone, in any tile.

#pragma once

#include "amx_tiles.h"
#include "dot_products.h"

namespace waybill {

constexpr int64_t KEYS = 64;  // of a block

// Vectors of a tile's row: as many as there are registers for.
#if defined(__AVX512F__)
constexpr int AT_ONCE = 4;
#else
constexpr int AT_ONCE = 1;
#endif

// turned[i * KEYS + k]: pair first + i of numbers of key k, for eight keys and eight pairs.
inline void turn_eight(const bf16* const* keys, int64_t first, int64_t width, uint32_t* turned) {
    __m256 rows[8], pairs[8], quads[8];
    for (int k = 0; k < 8; ++k) {
        bf16 some[WIDTH] = {};
        const bf16* from = keys[k] + 2 * first;
        if (2 * first + WIDTH > width) from = (const bf16*)std::memcpy(some, from, (width - 2 * first) * sizeof(bf16));
        rows[k] = _mm256_loadu_ps((const float*)from);
    }
    for (int k = 0; k < 8; k += 2) {
        pairs[k] = _mm256_unpacklo_ps(rows[k], rows[k + 1]);
        pairs[k + 1] = _mm256_unpackhi_ps(rows[k], rows[k + 1]);
    }
    for (int k = 0; k < 8; k += 4)
        for (int h = 0; h < 2; ++h) {
            quads[k + 2 * h] = _mm256_shuffle_ps(pairs[k + h], pairs[k + 2 + h], 0x44);
            quads[k + 2 * h + 1] = _mm256_shuffle_ps(pairs[k + h], pairs[k + 2 + h], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps((float*)(turned + i * KEYS), _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20));
        _mm256_storeu_ps((float*)(turned + (4 + i) * KEYS), _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31));
    }
}

// scores[t * KEYS + k] = queries[t] . keys[k] for N queries and a block of turned keys, [num_pairs, KEYS].
template <int N>
void score(const bf16* const* queries, const uint32_t* turned, int64_t num_pairs, float* scores) {
    for (int64_t first = 0; first < KEYS; first += AT_ONCE * WIDTH) {
        Floats part[N][AT_ONCE];
        for (auto& row : part)
            for (auto& sum : row) sum = all(0.0f);
        for (int64_t i = 0; i < num_pairs; ++i) {
            Step keys[AT_ONCE];
            for (int c = 0; c < AT_ONCE; ++c) keys[c] = step_at((const bf16*)(turned + i * KEYS + first + c * WIDTH));
            for (int t = 0; t < N; ++t) {
                const Step query = step_of_pair(queries[t] + 2 * i);
                for (int c = 0; c < AT_ONCE; ++c) part[t][c] = add_products(part[t][c], query, keys[c]);
            }
        }
        for (int t = 0; t < N; ++t)
            for (int c = 0; c < AT_ONCE; ++c) store(scores + t * KEYS + first + c * WIDTH, part[t][c]);
    }
}

// sums[t] += weights[t][k] * values[k] for the keys [begin, end), one after the other, of N queries: weights in rows of KEYS,
// sums and values in rows of `width` numbers, a multiple of WIDTH.
template <int N>
void add_values(const float* weights, const float* values, int64_t begin, int64_t end, int64_t width, float* sums) {
    const auto add = [&](auto count, int64_t first) {
        constexpr int C = count();
        Floats part[N][C];
        for (int t = 0; t < N; ++t)
            for (int c = 0; c < C; ++c) part[t][c] = load(sums + t * width + first + c * WIDTH);
        for (int64_t k = begin; k < end; ++k) {
            Floats value[C];
            for (int c = 0; c < C; ++c) value[c] = load(values + k * width + first + c * WIDTH);
            for (int t = 0; t < N; ++t) {
                const Floats weight = all(weights[t * KEYS + k]);
                for (int c = 0; c < C; ++c) part[t][c] = multiply_add(weight, value[c], part[t][c]);
            }
        }
        for (int t = 0; t < N; ++t)
            for (int c = 0; c < C; ++c) store(sums + t * width + first + c * WIDTH, part[t][c]);
    };
    int64_t first = 0;
    for (; first + AT_ONCE * WIDTH <= width; first += AT_ONCE * WIDTH) add(std::integral_constant<int, AT_ONCE>(), first);
    for (; first < width; first += WIDTH) add(std::integral_constant<int, 1>(), first);
}

#if defined(__AMX_BF16__)

// As `score`, of 16 queries, rows of `row_length` numbers of which `width` count, a multiple of LANES.
inline void score_by_tiles(const bf16* queries, int64_t row_length, const uint32_t* turned, int64_t width, float* scores) {
    constexpr int64_t row_bytes = KEYS * sizeof(float);
    finish_writes(queries);
    for (int64_t first = 0; first < KEYS; first += 2 * SIDE) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t i = 0; i < width; i += LANES) {
            const uint32_t* keys = turned + i / 2 * KEYS + first;
            _tile_loadd(2, queries + i, row_length * sizeof(bf16));
            _tile_loadd(3, keys, row_bytes);
            _tile_loadd(4, keys + SIDE, row_bytes);
            _tile_dpbf16ps(0, 2, 3);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, scores + first, row_bytes);
        _tile_stored(1, scores + first + SIDE, row_bytes);
    }
}

// totals = sums + weights . values, of 16 queries and 16 numbers of the values of a block: pairs of these, and sums, are in rows of
// `width`, totals in rows of `totals_width`.
inline void add_values_by_tiles(const bf16 (&weights)[SIDE][KEYS], const uint32_t* value_pairs, int64_t width, const float* sums,
                                float* totals, int64_t totals_width) {
    const int64_t row_bytes = width * sizeof(float);
    finish_writes(weights);
    _tile_loadd(0, sums, row_bytes);
    for (int64_t k = 0; k < KEYS; k += LANES) {
        _tile_loadd(1, weights[0] + k, KEYS * sizeof(bf16));
        _tile_loadd(2, value_pairs + k / 2 * width, row_bytes);
        _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, totals, totals_width * sizeof(float));
}

#endif

}  // namespace waybill
