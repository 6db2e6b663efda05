// Dot products of rows in bfloat16: what the operators of this folder share.
//
// Weights are read as the checkpoint stores them, so nothing is packed. A tile is some tokens by four outputs held in
// registers; each product is summed in float32 in one fixed order, which the rows' width alone decides: 32 products a step
// into 16 lanes, then the lanes as a tree. So a result has the same bits whatever rows, threads or steps it is computed with.
//
// AVX512-BF16 multiplies bfloat16 as it is. Elsewhere a bfloat16 number is the upper half of a float32 one: of two that share
// 32 bits, one is a shift away and the other a mask, and each takes a fused product and sum. Tokens meet many weights, so
// they are widened once. AVX-512 and AVX2 give the same bits; those of AVX512-BF16 are others, since its pairs are summed first.

#pragma once

#include <omp.h>

#include <cstdlib>
#include <memory>

#include "vectors.h"

namespace waybill {

constexpr int LANES = 32;    // products of one step
constexpr int BLOCK = 16;    // outputs whose weights stay in the first cache levels while all tokens pass
constexpr int OUTPUTS = 4;   // of a tile

#if defined(__AVX512BF16__)
constexpr int TOKENS = 4;  // of a tile, at most
using Input = bf16;        // tokens as they are
#elif defined(__AVX512F__)
constexpr int TOKENS = 6;
using Input = float;  // of 32 numbers first those of even place, then those of odd
#else
constexpr int TOKENS = 3;
using Input = float;
#endif
// Room for a tile's results in whole `Floats`: element 4t + o is token t, output o.
constexpr int TILE_SIZE = (TOKENS * OUTPUTS + WIDTH - 1) / WIDTH * WIDTH;

// Memory that begins with a cache line and is not cleared.
template <class T>
class Buffer {
    struct Free {
        void operator()(T* memory) const { std::free(memory); }
    };
    std::unique_ptr<T, Free> memory_;

   public:
    explicit Buffer(int64_t size) : memory_((T*)std::aligned_alloc(64, (size * sizeof(T) / 64 + 1) * 64)) {}
    T* data() const { return memory_.get(); }
};

// Where number `column` of a row of `Input` is.
inline int64_t place_of(int64_t column) {
    return std::is_same<Input, bf16>::value ? column : column / LANES * LANES + column % LANES / 2 + column % 2 * WIDTH;
}

inline Input input_of(bf16 x) {
    if (std::is_same<Input, bf16>::value) return x;
    const uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// A row of tokens for `tile`; numbers up to a multiple of LANES are zeros.
inline void widen_row(const bf16* from, int64_t width, Input* to) {
    const int64_t end = (width + LANES - 1) / LANES * LANES;
    for (int64_t k = 0; k < end; k += LANES) {
        if (std::is_same<Input, bf16>::value || k + LANES > width) {
            for (int64_t i = k; i < k + LANES; ++i) to[place_of(i)] = i < width ? input_of(from[i]) : Input(0);
            continue;
        }
        const auto* words = (const uint32_t*)(from + k);
        auto *even = (uint32_t*)(to + k), *odd = even + WIDTH;
        for (int i = 0; i < WIDTH; ++i) {
            uint32_t word;
            std::memcpy(&word, words + i, sizeof word);
            even[i] = word << 16, odd[i] = word & 0xffff0000u;
        }
    }
}

// Rows [T, width] of tokens, `stride` apart, as `tile` takes them: in place, or widened.
class Inputs {
    const Input* first_;
    int64_t stride_;
    Buffer<Input> wide_;

   public:
    Inputs(const bf16* x, int64_t T, int64_t width, int64_t stride, int num_threads)
        : first_((const Input*)x), stride_(stride), wide_(std::is_same<Input, bf16>::value ? 0 : T * (width + LANES - 1)) {
        if (std::is_same<Input, bf16>::value) return;
        stride_ = (width + LANES - 1) / LANES * LANES;
        first_ = wide_.data();
#pragma omp parallel for num_threads(num_threads) if (T * width > 65536)
        for (int64_t t = 0; t < T; ++t) widen_row(x + t * stride, width, wide_.data() + t * stride_);
    }
    const Input* row(int64_t token) const { return first_ + token * stride_; }
};

// Of four registers: their sums over the lanes of each 128 bits, side by side.
inline __m256 sum_within(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 first = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const __m256 second = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    return _mm256_shuffle_ps(first, second, 0x44) + _mm256_shuffle_ps(first, second, 0xee);
}
inline __m128 sum_halves(__m256 x) { return _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1); }

// Sums over the lanes of the outputs of one token; zeros where there are less than four outputs.
template <int M>
__m128 sum_lanes(const Register (&part)[M][NUM_REGISTERS]) {
    static_assert(M == 2 || M == OUTPUTS, "");
#ifdef __AVX512F__
    const __m512 a = part[0][0], b = part[1][0], c = part[2][0], d = part[3][0];
    const __m512 first = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const __m512 second = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512 four = _mm512_shuffle_ps(first, second, 0x44) + _mm512_shuffle_ps(first, second, 0xee);
    return sum_halves(low_half(four)) + sum_halves(high_half(four));
#else
    const auto within = [&](int h) {
        return sum_within(part[0][h], part[1][h], M > 2 ? part[M - 2][h] : _mm256_setzero_ps(),
                          M > 2 ? part[M - 1][h] : _mm256_setzero_ps());
    };
    return sum_halves(within(0)) + sum_halves(within(1));
#endif
}

// Adds 32 products to each of N tokens by M outputs.
template <int N, int M>
inline void multiply_step(const Input* const (&x)[N], const bf16* const (&w)[M], Register (&part)[N][M][NUM_REGISTERS]) {
#if defined(__AVX512BF16__)
    __m512bh rows[M];
    for (int o = 0; o < M; ++o) rows[o] = (__m512bh)_mm512_loadu_si512(w[o]);
    for (int t = 0; t < N; ++t) {
        const __m512bh token = (__m512bh)_mm512_loadu_si512(x[t]);
        for (int o = 0; o < M; ++o) part[t][o][0] = _mm512_dpbf16_ps(part[t][o][0], token, rows[o]);
    }
#elif defined(__AVX512F__)
    __m512i words[M];
    for (int o = 0; o < M; ++o) words[o] = _mm512_loadu_si512(w[o]);
    const auto add = [&](const auto& number, int half) {
        __m512 rows[M];
        for (int o = 0; o < M; ++o) rows[o] = _mm512_castsi512_ps(number(words[o]));
        for (int t = 0; t < N; ++t) {
            const __m512 token = _mm512_loadu_ps(x[t] + half);
            for (int o = 0; o < M; ++o) part[t][o][0] = _mm512_fmadd_ps(token, rows[o], part[t][o][0]);
        }
    };
    add([](__m512i word) { return _mm512_slli_epi32(word, 16); }, 0);
    add([](__m512i word) { return _mm512_and_si512(word, _mm512_set1_epi32(0xffff0000)); }, WIDTH);
#else
    for (int h = 0; h < 2; ++h) {
        __m256i words[M];
        for (int o = 0; o < M; ++o) words[o] = _mm256_loadu_si256((const __m256i*)w[o] + h);
        const auto add = [&](const auto& number, int half) {
            __m256 rows[M];
            for (int o = 0; o < M; ++o) rows[o] = _mm256_castsi256_ps(number(words[o]));
            for (int t = 0; t < N; ++t) {
                const __m256 token = _mm256_loadu_ps(x[t] + half + h * 8);
                for (int o = 0; o < M; ++o) part[t][o][h] = _mm256_fmadd_ps(token, rows[o], part[t][o][h]);
            }
        };
        add([](__m256i word) { return _mm256_slli_epi32(word, 16); }, 0);
        add([](__m256i word) { return _mm256_and_si256(word, _mm256_set1_epi32(0xffff0000)); }, WIDTH);
    }
#endif
}

// out[4t + o] = x[t] . w[o] for N tokens and M outputs. IS_FIRST: the weights come from memory, and asking early for those of
// the next tile, `ahead` of these, keeps it busy across page borders.
template <int N, int M, bool IS_FIRST>
void dots(const Input* const* x, const bf16* const* w, int64_t width, int64_t ahead, float* out) {
    Register part[N][M][NUM_REGISTERS];
    for (auto& token : part)
        for (auto& output : token)
            for (auto& lanes : output) lanes = Register{};
    const Input* tokens[N];
    const bf16* rows[M];
    const int64_t whole = width / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        for (int t = 0; t < N; ++t) tokens[t] = x[t] + k;
        for (int o = 0; o < M; ++o) {
            rows[o] = w[o] + k;
            if (IS_FIRST) _mm_prefetch(rows[o] + ahead, _MM_HINT_T0);
        }
        multiply_step<N, M>(tokens, rows, part);
    }
    if (whole < width) {
        alignas(64) bf16 last[M][LANES] = {};
        alignas(64) Input last_tokens[N][LANES];
        for (int o = 0; o < M; ++o) {
            std::memcpy(last[o], w[o] + whole, (width - whole) * sizeof(bf16));
            rows[o] = last[o];
        }
        for (int t = 0; t < N; ++t) {
            tokens[t] = x[t] + whole;
            if (!std::is_same<Input, bf16>::value) continue;
            // Those that were not widened end where they end.
            widen_row((const bf16*)(x[t] + whole), width - whole, last_tokens[t]);
            tokens[t] = last_tokens[t];
        }
        multiply_step<N, M>(tokens, rows, part);
    }
    for (int t = 0; t < N; ++t) {
        const __m128 sums = sum_lanes<M>(part[t]);
        if (M == OUTPUTS) _mm_storeu_ps(out + OUTPUTS * t, sums);
        else _mm_storel_pi((__m64*)(out + OUTPUTS * t), sums);
    }
}

template <int N, bool IS_FIRST>
void dots_of(const Input* const* x, const bf16* const* w, int64_t width, int64_t ahead, float* out) {
    // As many sums at once as there are registers.
    if constexpr (N == 1 || NUM_REGISTERS == 1) return dots<N, OUTPUTS, IS_FIRST>(x, w, width, ahead, out);
    else
        for (int o = 0; o < OUTPUTS; o += 2) dots<N, 2, IS_FIRST>(x, w + o, width, ahead, out + o);
}

// out[4t + o]: x[t] . w[o], for up to TOKENS tokens.
inline void tile(int num_tokens, bool is_first, const Input* const* x, const bf16* const* w, int64_t width, int64_t ahead,
                 float* out) {
    const auto few = [&](auto n) {
        if constexpr (n() <= TOKENS)
            return is_first ? dots_of<n(), true>(x, w, width, ahead, out) : dots_of<n(), false>(x, w, width, ahead, out);
    };
    switch (num_tokens) {
        case 1: return few(std::integral_constant<int, 1>());
        case 2: return few(std::integral_constant<int, 2>());
        case 3: return few(std::integral_constant<int, 3>());
        case 4: return few(std::integral_constant<int, 4>());
        case 5: return few(std::integral_constant<int, 5>());
        default: return few(std::integral_constant<int, 6>());
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
