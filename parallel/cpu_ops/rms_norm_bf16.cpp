// The root-mean-square norm of rows in bfloat16, of a sum with the residual where there is one. Twin of
// `TorchLayerOps.rms_norm` and `add_rms_norm`, with a rounding to bfloat16 wherever torch has one. It knows nothing of torch
// or Python.
//
// Legend: T tokens, H heads of each (1 where there are none), C columns of a row.

#include <cmath>

#include "dot_products.h"

using namespace waybill;

namespace {

constexpr int WIDTH = 16;  // numbers of one vector

struct Problem {
    const bf16* x;         // [T, H, C], tokens x_token and heads x_head apart
    const bf16* residual;  // [T, H, C], contiguous, or null
    bf16* total;           // [T, H, C]: x + residual, or null
    const bf16* weight;    // [C]
    bf16* out;             // [T, H, C]
    int64_t T, H, C, x_token, x_head;
    float eps;
};

__mmask16 inside(const Problem& m, int64_t c) {
    return m.C - c >= WIDTH ? __mmask16(0xffff) : __mmask16((1u << (m.C - c)) - 1);
}

__m512 load(const bf16* from, __mmask16 kept) { return widen(_mm256_maskz_loadu_epi16(kept, from)); }

void norm_row(const Problem& m, int64_t row) {
    const bf16* x = m.x + row / m.H * m.x_token + row % m.H * m.x_head;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t c = 0; c < m.C; c += WIDTH) {
        const __mmask16 kept = inside(m, c);
        __m512 value = load(x + c, kept);
        if (m.residual != nullptr) {
            const __m256i sum = narrow(_mm512_add_ps(value, load(m.residual + row * m.C + c, kept)));
            _mm256_mask_storeu_epi16(m.total + row * m.C + c, kept, sum);
            value = widen(sum);
        }
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / float(m.C);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + m.eps));
    if (m.residual != nullptr) x = m.total + row * m.C;
    for (int64_t c = 0; c < m.C; c += WIDTH) {
        const __mmask16 kept = inside(m, c);
        const __m512 normed = widen(narrow(_mm512_mul_ps(load(x + c, kept), scale)));
        _mm256_mask_storeu_epi16(m.out + row * m.C + c, kept, narrow(_mm512_mul_ps(load(m.weight + c, kept), normed)));
    }
}

}  // namespace

// Tensors as in `Problem`.
extern "C" void waybill_rms_norm_bf16(const bf16* x, const bf16* residual, bf16* total, const bf16* weight, bf16* out,
                                      int64_t T, int64_t H, int64_t C, int64_t x_token, int64_t x_head, float eps,
                                      int num_threads) {
    const Problem m{x, residual, total, weight, out, T, H, C, x_token, x_head, eps};
    // Below this, waking the threads takes longer than the work.
#pragma omp parallel for num_threads(num_threads) if (T * H * C > 65536)
    for (int64_t row = 0; row < m.T * m.H; ++row) norm_row(m, row);
}
