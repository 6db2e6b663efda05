// Sixteen numbers in float32 and what the operators do with them, on every instruction set: one register of AVX-512, two of
// AVX2. An operation has the same bits on both, so operators written with these have, too.
//
// The compiler must not contract products and sums on its own (-ffp-contract=off): where it did would depend on the code around.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace waybill {

using bf16 = uint16_t;

constexpr int WIDTH = 16;  // numbers of `Floats`

#ifdef __AVX512F__

using Register = __m512;
using Floats = __m512;  // +, -, * and / are the compiler's

inline __mmask16 first_mask(int64_t n) { return n >= WIDTH ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats all_of(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Of two numbers one of which is NaN, the second.
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats nearest_integer(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n, rounded once; n is an integer within +-250.
inline Floats scale_by_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
// Numbers [begin, end) of x, the others of `other`.
inline Floats only(int64_t begin, int64_t end, Floats x, Floats other) {
    return _mm512_mask_mov_ps(other, first_mask(end) & ~first_mask(begin), x);
}
inline __m256 low_half(Floats x) { return _mm512_castps512_ps256(x); }
inline __m256 high_half(Floats x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)); }

inline __m256i narrow(Floats x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}
inline Floats widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

#else  // AVX2

using Register = __m256;
struct Floats {
    __m256 low, high;
};

inline Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
inline Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
inline Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
inline Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all_of(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Floats x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline __m256 nearest_integer(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats nearest_integer(Floats x) { return {nearest_integer(x.low), nearest_integer(x.high)}; }
// In two steps, neither of which leaves the range of exponents; the first is exact.
inline __m256 scale_by_power(__m256 x, __m256 n) {
    const auto power = [](__m256i e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return x * power(half) * power(_mm256_sub_epi32(whole, half));
}
inline Floats scale_by_power(Floats x, Floats n) { return {scale_by_power(x.low, n.low), scale_by_power(x.high, n.high)}; }
inline __m256 only(int64_t begin, int64_t end, __m256 x, __m256 other) {
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto below = [&](int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(std::clamp<int64_t>(n, -1, 17)), numbers); };
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_andnot_si256(below(begin), below(end))));
}
inline Floats only(int64_t begin, int64_t end, Floats x, Floats other) {
    return {only(begin, end, x.low, other.low), only(begin - 8, end - 8, x.high, other.high)};
}
inline __m256 low_half(Floats x) { return x.low; }
inline __m256 high_half(Floats x) { return x.high; }

inline __m256i rounded_bits(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
}
inline __m256i narrow(Floats x) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_bits(x.low), rounded_bits(x.high)), 0xd8);
}
inline __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Floats widen(__m256i x) { return {widen(_mm256_castsi256_si128(x)), widen(_mm256_extracti128_si256(x, 1))}; }

#endif

constexpr int NUM_REGISTERS = sizeof(Floats) / sizeof(Register);

inline Floats load_bf16(const bf16* from) { return widen(_mm256_loadu_si256((const __m256i*)from)); }
inline void store_bf16(bf16* to, Floats x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }

// The first n numbers, zeros behind them; and the same to memory, nothing behind them.
inline Floats load_bf16(const bf16* from, int64_t n) {
    if (n >= WIDTH) return load_bf16(from);
    bf16 some[WIDTH] = {};
    std::memcpy(some, from, n * sizeof(bf16));
    return load_bf16(some);
}
inline void store_bf16(bf16* to, Floats x, int64_t n) {
    if (n >= WIDTH) return store_bf16(to, x);
    bf16 all[WIDTH];
    store_bf16(all, x);
    std::memcpy(to, all, n * sizeof(bf16));
}

inline Floats round_to_bf16(Floats x) { return widen(narrow(x)); }

inline float sum(Floats x) {
    const __m256 eight = low_half(x) + high_half(x);
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(two) + _mm_cvtss_f32(_mm_shuffle_ps(two, two, 1));
}

// Of numbers without NaN.
inline float largest(Floats x) {
    const __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return std::max(_mm_cvtss_f32(two), _mm_cvtss_f32(_mm_shuffle_ps(two, two, 1)));
}

// exp(x) = 2^n * 2^f with |f| <= 1/2, the latter by its Taylor polynomial: relative error below 2e-6. Beyond the range of
// float32 it is 0 or infinity; NaN stays.
inline Floats exponential(Floats x) {
    const Floats within = smaller(all_of(89.0f), larger(all_of(-104.0f), x)), to_base_2 = all_of(1.44269504f);
    const Floats n = nearest_integer(within * to_base_2), f = fma(within, to_base_2, zero() - n);
    Floats power = all_of(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        power = fma(power, f, all_of(c));
    return scale_by_power(power, n);
}

}  // namespace waybill
