// The two products of attention over one block of keys: queries by keys, and weights by values.
//
// Keys of a block are turned so that lanes are keys: a score is then summed from the first pair of numbers to the last, and no
// lanes are added up. A result depends on its own query, keys and values alone, in any tile.

#pragma once

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

}  // namespace waybill
