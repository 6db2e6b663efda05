// Vectors of 16 floats, and products of numbers in bfloat16, on each instruction set: what the operators of this folder are
// written in. The compiler's flags choose: AVX512-BF16, AVX-512 (F, BW, DQ, VL), or AVX2 with FMA.
//
// AVX512-BF16 multiplies pairs of bfloat16 and takes subnormal numbers for zero. The others widen both to float32, by a shift
// and a mask, and multiply there. AVX-512 and AVX2 give the same bits; AVX512-BF16, which adds up pairs first, others.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace waybill {

using bf16 = uint16_t;

constexpr int WIDTH = 16;         // numbers of a vector
constexpr int LANES = 2 * WIDTH;  // products of one step of a dot product

#if defined(__AVX512F__)

struct Floats {
    __m512 v;
};

inline __mmask16 first_of(int64_t n) { return n >= WIDTH ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x.v); }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
// b where one of the two is NaN.
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
// Numbers [begin, end) of x, and the others of `other`.
inline Floats only(int64_t begin, int64_t end, Floats x, Floats other) {
    const auto below = [](int64_t n) { return first_of(std::max<int64_t>(n, 0)); };
    return {_mm512_mask_mov_ps(other.v, below(end) & ~below(begin), x.v)};
}
// a * b + c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum_of(Floats x) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x.v); }
inline Floats nearest_whole(Floats x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x * 2^n for whole n.
inline Floats scaled_by_power(Floats x, Floats n) { return {_mm512_scalef_ps(x.v, n.v)}; }

inline Floats widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }

#if defined(__AVX512BF16__)
inline __m256i narrow(Floats x) { return (__m256i)_mm512_cvtneps_pbh(x.v); }
#else
// To the nearest, ties to even; NaN stays NaN.
inline __m256i narrow(Floats x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
}
#endif

// The first n numbers, zeros behind them; n may be more than there is room for.
inline Floats load(const bf16* from, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_of(n), from)); }
inline void store(bf16* to, Floats x, int64_t n) { _mm256_mask_storeu_epi16(to, first_of(n), narrow(x)); }
inline void store(float* to, Floats x, int64_t n) { _mm512_mask_storeu_ps(to, first_of(n), x.v); }
inline Floats load(const bf16* from) { return widen(_mm256_loadu_si256((const __m256i*)from)); }
inline void store(bf16* to, Floats x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }

#else

struct Floats {
    __m256 low, high;
};

inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Floats x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
// b where one of the two is NaN.
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
// Numbers [begin, end) of x, and the others of `other`.
inline __m256 only(int64_t begin, int64_t end, __m256 x, __m256 other) {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto below = [&](int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(std::clamp<int64_t>(n, -1, 17)), places); };
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_andnot_si256(below(begin), below(end))));
}
inline Floats only(int64_t begin, int64_t end, Floats x, Floats other) {
    return {only(begin, end, x.low, other.low), only(begin - 8, end - 8, x.high, other.high)};
}
// a * b + c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline float sum_of(Floats x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline float largest_of(Floats x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline Floats nearest_whole(Floats x) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, how), _mm256_round_ps(x.high, how)};
}

// x * 2^n for whole n, in two factors: beyond these bounds the result is infinite or zero all the same.
inline __m256 scaled_by_power(__m256 x, __m256 n) {
    const __m256 kept = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-252.0f)), _mm256_set1_ps(252.0f));
    const __m256i whole = _mm256_cvtps_epi32(kept), half = _mm256_srai_epi32(whole, 1);
    const auto power = [](__m256i of) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(of, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
}
inline Floats scaled_by_power(Floats x, Floats n) {
    return {scaled_by_power(x.low, n.low), scaled_by_power(x.high, n.high)};
}

inline __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

// To the nearest, ties to even; NaN stays NaN.
inline __m128i narrow(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

inline Floats load(const bf16* from) {
    return {widen(_mm_loadu_si128((const __m128i*)from)), widen(_mm_loadu_si128((const __m128i*)(from + 8)))};
}
inline void store(bf16* to, Floats x) {
    _mm_storeu_si128((__m128i*)to, narrow(x.low));
    _mm_storeu_si128((__m128i*)(to + 8), narrow(x.high));
}
// The first n numbers, zeros behind them; n may be more than there is room for.
inline Floats load(const bf16* from, int64_t n) {
    if (n >= WIDTH) return load(from);
    bf16 numbers[WIDTH] = {};
    std::memcpy(numbers, from, n * sizeof(bf16));
    return load(numbers);
}
inline void store(bf16* to, Floats x, int64_t n) {
    bf16 numbers[WIDTH];
    store(numbers, x);
    std::memcpy(to, numbers, std::min<int64_t>(n, WIDTH) * sizeof(bf16));
}

#endif

#if defined(__AVX512F__)
inline Floats rounded(Floats x) { return widen(narrow(x)); }
#else
inline Floats rounded(Floats x) { return {widen(narrow(x.low)), widen(narrow(x.high))}; }
#endif

inline float as_float(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// LANES numbers of a row, ready to be multiplied with as many of another.
#if defined(__AVX512BF16__)

struct Step {
    __m512bh v;
};

inline Step step_at(const bf16* from) { return {(__m512bh)_mm512_loadu_si512(from)}; }
inline Step step_at(const bf16* from, int64_t n) { return {(__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, from)}; }
inline Floats add_products(Floats sum, Step a, Step b) { return {_mm512_dpbf16_ps(sum.v, a.v, b.v)}; }
// One pair of numbers, over and over.
inline Step step_of_pair(const bf16* from) {
    int pair;
    std::memcpy(&pair, from, sizeof pair);
    return {(__m512bh)_mm512_set1_epi32(pair)};
}

#else

struct Step {
    Floats even, odd;
};

#if defined(__AVX512F__)
inline Step step_of(__m512i x) {
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))))}};
}
inline Step step_at(const bf16* from) { return step_of(_mm512_loadu_si512(from)); }
inline Step step_at(const bf16* from, int64_t n) { return step_of(_mm512_maskz_loadu_epi16((1u << n) - 1, from)); }
#else
inline Step step_at(const bf16* from) {
    const __m256i low = _mm256_loadu_si256((const __m256i*)from), high = _mm256_loadu_si256((const __m256i*)(from + WIDTH));
    const __m256i mask = _mm256_set1_epi32(int(0xffff0000));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(low, mask)), _mm256_castsi256_ps(_mm256_and_si256(high, mask))}};
}
inline Step step_at(const bf16* from, int64_t n) {
    bf16 numbers[LANES] = {};
    std::memcpy(numbers, from, n * sizeof(bf16));
    return step_at(numbers);
}
#endif

// One pair of numbers, over and over.
inline Step step_of_pair(const bf16* from) {
    return {all(as_float(from[0])), all(as_float(from[1]))};
}

inline Floats add_products(Floats sum, Step a, Step b) {
    return multiply_add(a.odd, b.odd, multiply_add(a.even, b.even, sum));
}

#endif

}  // namespace waybill
