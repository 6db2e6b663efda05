// The root-mean-square norm of rows in bfloat16, of a sum with the residual where there is one. Twin of
// `TorchLayerOps.rms_norm` and `add_rms_norm`, with a rounding to bfloat16 wherever torch has one. It knows nothing of torch
// or Python.
//
// Legend: T tokens, H heads of each (1 where there are none), C columns of a row.

#include <cmath>

#include "vectors.h"

using namespace waybill;

namespace {

struct Problem {
    const bf16* x;         // [T, H, C], tokens x_token and heads x_head apart
    const bf16* residual;  // [T, H, C], contiguous, or null
    bf16* total;           // [T, H, C]: x + residual, or null
    const bf16* weight;    // [C]
    bf16* out;             // [T, H, C]
    int64_t T, H, C, x_token, x_head;
    float eps;
};

void norm_row(const Problem& m, int64_t row) {
    const bf16* x = m.x + row / m.H * m.x_token + row % m.H * m.x_head;
    Floats squares = zero();
    for (int64_t c = 0; c < m.C; c += WIDTH) {
        Floats value = load_bf16(x + c, m.C - c);
        if (m.residual != nullptr) {
            value = round_to_bf16(value + load_bf16(m.residual + row * m.C + c, m.C - c));
            store_bf16(m.total + row * m.C + c, value, m.C - c);
        }
        squares = fma(value, value, squares);
    }
    const Floats scale = all_of(1.0f / std::sqrt(sum(squares) / float(m.C) + m.eps));
    if (m.residual != nullptr) x = m.total + row * m.C;
    for (int64_t c = 0; c < m.C; c += WIDTH) {
        const Floats normed = round_to_bf16(load_bf16(x + c, m.C - c) * scale);
        store_bf16(m.out + row * m.C + c, load_bf16(m.weight + c, m.C - c) * normed, m.C - c);
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
