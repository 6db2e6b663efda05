// Dot products of rows in bfloat16, for CPUs with AVX512-BF16: what the operators of this folder share.
//
// Rows are read as the checkpoint stores them, so nothing is packed. A tile is 4 x 4 dot products held in registers; each
// is summed in float32 in one fixed order, which the rows' width alone decides: 32 products a step into 16 lanes, then the
// lanes as a tree. So a result has the same bits whatever rows, threads or steps it is computed with.

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace waybill {

using bf16 = uint16_t;

constexpr int TILE = 4;    // tokens, and outputs, of a tile
constexpr int LANES = 32;  // products of one instruction
constexpr int BLOCK = 16;  // outputs whose weights stay in the first cache levels while all tokens pass

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Sums over the lanes of 16 vectors: element 4t + o of the result belongs to part[t][o].
inline __m512 sum_lanes(const __m512 (&part)[TILE][TILE]) {
    __m512 row[TILE];
    for (int t = 0; t < TILE; ++t) {
        const auto& p = part[t];
        const __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(p[0], p[1]), _mm512_unpackhi_ps(p[0], p[1]));
        const __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(p[2], p[3]), _mm512_unpackhi_ps(p[2], p[3]));
        row[t] = _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
    }
    const auto add_halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return add_halves(add_halves(row[0], row[1]), add_halves(row[2], row[3]));
}

// Element 4t + o: x[t] . w[o], for N tokens; where `width` is no multiple of LANES the last step has zeros for what is beyond.
// IS_FIRST: the weights come from memory, and asking early for those of the next tile, `ahead` of these, keeps it busy across
// page borders.
template <int N, bool IS_FIRST>
__m512 tile_of(const bf16* const* x, const bf16* const* w, int64_t width, int64_t ahead) {
    __m512 part[TILE][TILE];
    for (auto& row : part)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    const auto step = [&](const auto& load, int64_t k) {
        __m512bh rows[TILE];
        for (int o = 0; o < TILE; ++o) {
            if (IS_FIRST) _mm_prefetch(w[o] + ahead + k, _MM_HINT_T0);
            rows[o] = (__m512bh)load(w[o] + k);
        }
        for (int t = 0; t < N; ++t) {
            const __m512bh token = (__m512bh)load(x[t] + k);
            for (int o = 0; o < TILE; ++o) part[t][o] = _mm512_dpbf16_ps(part[t][o], token, rows[o]);
        }
    };
    const int64_t whole = width / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) step([](const bf16* p) { return _mm512_loadu_si512(p); }, k);
    if (whole < width) {
        const __mmask32 inside = (1u << (width - whole)) - 1;
        step([&](const bf16* p) { return _mm512_maskz_loadu_epi16(inside, p); }, whole);
    }
    return sum_lanes(part);
}

inline __m512 tile(int num_tokens, bool is_first, const bf16* const* x, const bf16* const* w, int64_t width, int64_t ahead) {
    switch (num_tokens) {
        case 1: return tile_of<1, true>(x, w, width, ahead);
        case 2: return tile_of<2, true>(x, w, width, ahead);
        case 3: return tile_of<3, true>(x, w, width, ahead);
        default:
            return is_first ? tile_of<TILE, true>(x, w, width, ahead) : tile_of<TILE, false>(x, w, width, ahead);
    }
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
