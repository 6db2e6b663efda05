// The two products of attention over one block of keys: queries by keys, and weights by values.
//
// Keys of a block are turned so that lanes are keys: a score is then summed from the first pair of numbers to the last, and no
// lanes are added up. A result depends on its own query, keys and values alone, in any tile.

#pragma once

#include "dot_products.h"

namespace waybill {

constexpr int64_t KEYS = 64;  // of a block

#if defined(__AVX512F__)
constexpr int NUM_AT_ONCE = 4;  // registers of a tile's row
#else
constexpr int NUM_AT_ONCE = 2;
#endif
constexpr int REGISTER_WIDTH = sizeof(Register) / sizeof(float);

inline Register broadcast(const float* x) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(*x);
#else
    return _mm256_broadcast_ss(x);
#endif
}
inline Register load_register(const float* x) {
#if defined(__AVX512F__)
    return _mm512_loadu_ps(x);
#else
    return _mm256_loadu_ps(x);
#endif
}
inline void store_register(float* to, Register x) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(to, x);
#else
    _mm256_storeu_ps(to, x);
#endif
}
inline Register fma_register(Register a, Register b, Register c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#else
    return _mm256_fmadd_ps(a, b, c);
#endif
}

// turned[i][k]: pair i of numbers of key k, for eight keys and the pairs [first, first + 8).
inline void turn_eight(const bf16* const* keys, int64_t first, int64_t width, uint32_t* turned) {
    __m256 rows[8], pairs[8], quads[8];
    for (int k = 0; k < 8; ++k) {
        bf16 some[16] = {};
        const bf16* from = keys[k] + 2 * first;
        if (2 * first + 16 > width) from = (const bf16*)std::memcpy(some, from, (width - 2 * first) * sizeof(bf16));
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

// scores[t][k] = queries[t] . keys[k], rows KEYS apart, for N queries: pairs of bfloat16 numbers where the processor multiplies
// those, else float32 numbers. `turned` [num_pairs, KEYS].
template <int N>
void score(const Input* const* queries, const uint32_t* turned, int64_t num_pairs, float* scores) {
    constexpr int STEP = NUM_AT_ONCE * REGISTER_WIDTH;
    for (int64_t first = 0; first < KEYS; first += STEP) {
        Register part[N][NUM_AT_ONCE];
        for (auto& row : part)
            for (auto& lanes : row) lanes = Register{};
        for (int64_t i = 0; i < num_pairs; ++i) {
            const uint32_t* words = turned + i * KEYS + first;
#if defined(__AVX512BF16__)
            __m512bh keys[NUM_AT_ONCE];
            for (int c = 0; c < NUM_AT_ONCE; ++c) keys[c] = (__m512bh)_mm512_loadu_si512(words + c * WIDTH);
            for (int t = 0; t < N; ++t) {
                int pair;
                std::memcpy(&pair, queries[t] + 2 * i, sizeof pair);
                const __m512bh query = (__m512bh)_mm512_set1_epi32(pair);
                for (int c = 0; c < NUM_AT_ONCE; ++c) part[t][c] = _mm512_dpbf16_ps(part[t][c], query, keys[c]);
            }
#else
            const auto add = [&](const auto& number, int64_t place) {
                Register keys[NUM_AT_ONCE];
                for (int c = 0; c < NUM_AT_ONCE; ++c) keys[c] = number(words + c * REGISTER_WIDTH);
                for (int t = 0; t < N; ++t) {
                    const Register query = broadcast(queries[t] + place);
                    for (int c = 0; c < NUM_AT_ONCE; ++c) part[t][c] = fma_register(query, keys[c], part[t][c]);
                }
            };
#if defined(__AVX512F__)
            add([](const uint32_t* w) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(w), 16)); },
                place_of(2 * i));
            add([](const uint32_t* w) {
                return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(w), _mm512_set1_epi32(0xffff0000)));
            }, place_of(2 * i + 1));
#else
            const auto load = [](const uint32_t* w) { return _mm256_loadu_si256((const __m256i*)w); };
            add([&](const uint32_t* w) { return _mm256_castsi256_ps(_mm256_slli_epi32(load(w), 16)); }, place_of(2 * i));
            add([&](const uint32_t* w) {
                return _mm256_castsi256_ps(_mm256_and_si256(load(w), _mm256_set1_epi32(0xffff0000)));
            }, place_of(2 * i + 1));
#endif
#endif
        }
        for (int t = 0; t < N; ++t)
            for (int c = 0; c < NUM_AT_ONCE; ++c)
                store_register(scores + t * KEYS + first + c * REGISTER_WIDTH, part[t][c]);
    }
}

// sums[t] += weights[t][k] * values[k] for the keys [begin, end), one after the other, of N queries: weights in rows of KEYS,
// sums and values in rows of `width` numbers, a multiple of WIDTH.
template <int N>
void add_values(const float* weights, const float* values, int64_t begin, int64_t end, int64_t width, float* sums) {
    const auto add = [&](auto count, int64_t first) {
        constexpr int C = count();
        Register part[N][C];
        for (int t = 0; t < N; ++t)
            for (int c = 0; c < C; ++c) part[t][c] = load_register(sums + t * width + first + c * REGISTER_WIDTH);
        for (int64_t k = begin; k < end; ++k) {
            Register value[C];
            for (int c = 0; c < C; ++c) value[c] = load_register(values + k * width + first + c * REGISTER_WIDTH);
            for (int t = 0; t < N; ++t) {
                const Register weight = broadcast(weights + t * KEYS + k);
                for (int c = 0; c < C; ++c) part[t][c] = fma_register(weight, value[c], part[t][c]);
            }
        }
        for (int t = 0; t < N; ++t)
            for (int c = 0; c < C; ++c) store_register(sums + t * width + first + c * REGISTER_WIDTH, part[t][c]);
    };
    int64_t first = 0;
    for (; first + NUM_AT_ONCE * REGISTER_WIDTH <= width; first += NUM_AT_ONCE * REGISTER_WIDTH)
        add(std::integral_constant<int, NUM_AT_ONCE>(), first);
    for (; first < width; first += REGISTER_WIDTH) add(std::integral_constant<int, 1>(), first);
}

}  // namespace waybill
