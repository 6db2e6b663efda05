// Dot products of rows in bfloat16: what the operators of this folder share.
//
// Rows are read as the checkpoint stores them, so nothing is packed. A tile is 4 x 4 dot products held in registers; each
// is summed in float32 in one fixed order, which the rows' width alone decides: 32 products a step into 16 lanes, then the
// lanes as a tree. So a result has the same bits whatever rows, threads or steps it is computed with.

#pragma once

#include <omp.h>

#include "vectors.h"

namespace waybill {

constexpr int TILE = 4;    // tokens, and outputs, of a tile
constexpr int BLOCK = 16;  // outputs whose weights stay in the first cache levels while all tokens pass
static_assert(TILE * TILE == WIDTH);

// Sums over the lanes of the first N rows: element 4t + o of the result belongs to part[t][o].
template <int N>
Floats sum_lanes(const Floats (&part)[TILE][TILE]) {
#if defined(__AVX512F__)
    __m512 row[TILE];
    for (int t = 0; t < TILE; ++t) {
        const auto& p = part[t];
        const __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(p[0].v, p[1].v), _mm512_unpackhi_ps(p[0].v, p[1].v));
        const __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(p[2].v, p[3].v), _mm512_unpackhi_ps(p[2].v, p[3].v));
        row[t] = _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
    }
    const auto add_halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return {add_halves(add_halves(row[0], row[1]), add_halves(row[2], row[3]))};
#else
    const auto sum_within = [](__m256 a, __m256 b, __m256 c, __m256 d) {
        const __m256 first = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        const __m256 second = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        return _mm256_add_ps(_mm256_shuffle_ps(first, second, 0x44), _mm256_shuffle_ps(first, second, 0xee));
    };
    const auto add_halves = [](__m256 x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); };
    float sums[WIDTH] = {};
    for (int t = 0; t < N; ++t) {
        const auto& p = part[t];
        const __m128 low = add_halves(sum_within(p[0].low, p[1].low, p[2].low, p[3].low));
        const __m128 high = add_halves(sum_within(p[0].high, p[1].high, p[2].high, p[3].high));
        _mm_storeu_ps(sums + t * TILE, _mm_add_ps(low, high));
    }
    return load(sums);
#endif
}

// Element 4t + o: x[t] . w[o], for N tokens; where `width` is no multiple of LANES the last step has zeros for what is beyond.
// IS_FIRST: the weights come from memory, and asking early for those of the next tile, `ahead` of these, keeps it busy across
// page borders.
template <int N, bool IS_FIRST>
Floats tile_of(const bf16* const* x, const bf16* const* w, int64_t width, int64_t ahead) {
    Floats part[TILE][TILE];
    for (auto& row : part)
        for (auto& sum : row) sum = all(0.0f);
    const auto add_step = [&](const auto& at, int64_t k) {
        Step rows[TILE];
        for (int o = 0; o < TILE; ++o) {
            if (IS_FIRST) _mm_prefetch((const char*)(w[o] + ahead + k), _MM_HINT_T0);
            rows[o] = at(w[o] + k);
        }
        for (int t = 0; t < N; ++t) {
            const Step token = at(x[t] + k);
            for (int o = 0; o < TILE; ++o) part[t][o] = add_products(part[t][o], token, rows[o]);
        }
    };
    const int64_t whole = width / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) add_step([](const bf16* p) { return step_at(p); }, k);
    if (whole < width) add_step([&](const bf16* p) { return step_at(p, width - whole); }, whole);
    return sum_lanes<N>(part);
}

inline Floats tile(int num_tokens, bool is_first, const bf16* const* x, const bf16* const* w, int64_t width, int64_t ahead) {
    switch (num_tokens) {
        case 1: return tile_of<1, true>(x, w, width, ahead);
        case 2: return tile_of<2, true>(x, w, width, ahead);
        case 3: return tile_of<3, true>(x, w, width, ahead);
        default:
            return is_first ? tile_of<TILE, true>(x, w, width, ahead) : tile_of<TILE, false>(x, w, width, ahead);
    }
}

// A vector with the numbers of row t, TILE of them, in the places of tile row t.
inline Floats of_each_row(const float (&numbers)[TILE]) {
    float all_of_them[WIDTH];
    for (int i = 0; i < WIDTH; ++i) all_of_them[i] = numbers[i / TILE];
    return load(all_of_them);
}

// term(first) + ... + term(first + count - 1) as a balanced tree, for a power of two: half of the terms make a branch of it.
template <class Term>
Floats sum_of_terms(int64_t first, int64_t count, const Term& term) {
    if (count == 1) return term(first);
    return sum_of_terms(first, count / 2, term) + sum_of_terms(first + count / 2, count / 2, term);
}

struct Range {
    int64_t begin, end;
};

// This thread's part of `size` outputs, in whole steps of `step` but for the last.
inline Range own_part(int64_t size, int64_t step) {
    const int64_t steps = (size + step - 1) / step, n = omp_get_num_threads(), i = omp_get_thread_num();
    return {std::min(size, steps * i / n * step), std::min(size, steps * (i + 1) / n * step)};
}

}  // namespace waybill
