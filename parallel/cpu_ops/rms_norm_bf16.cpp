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
    const bf16* weight;    // [C], or null
    const float* wide;     // [C]: a weight in float32, or null
    bf16* out;             // [T, H, C]
    int64_t T, H, C, x_token, x_head;
    float eps;
};

void norm_row(const Problem& m, int64_t row) {
    const bf16* x = m.x + row / m.H * m.x_token + row % m.H * m.x_head;
    Floats squares = all(0.0f);
    for (int64_t c = 0; c < m.C; c += WIDTH) {
        const int64_t left = m.C - c;
        Floats value = load(x + c, left);
        if (m.residual != nullptr) {
            value = rounded(value + load(m.residual + row * m.C + c, left));
            store(m.total + row * m.C + c, value, left);
        }
        squares = multiply_add(value, value, squares);
    }
    const float mean = sum_of(squares) / float(m.C);
    const Floats scale = all(1.0f / std::sqrt(mean + m.eps));
    if (m.residual != nullptr) x = m.total + row * m.C;
    for (int64_t c = 0; c < m.C; c += WIDTH) {
        const int64_t left = m.C - c;
        const Floats normed = load(x + c, left) * scale;
        if (m.wide != nullptr) {
            float weight[WIDTH] = {};
            std::memcpy(weight, m.wide + c, std::min<int64_t>(left, WIDTH) * sizeof(float));
            store(m.out + row * m.C + c, load(weight) * normed, left);
        } else store(m.out + row * m.C + c, load(m.weight + c, left) * rounded(normed), left);
    }
}

}  // namespace

// Tensors as in `Problem`.
extern "C" void waybill_rms_norm_bf16(const bf16* x, const bf16* residual, bf16* total, const bf16* weight, const float* wide,
                                      bf16* out, int64_t T, int64_t H, int64_t C, int64_t x_token, int64_t x_head, float eps,
                                      int num_threads) {
    const Problem m{x, residual, total, weight, wide, out, T, H, C, x_token, x_head, eps};
    // Below this, waking the threads takes longer than the work.
#pragma omp parallel for num_threads(num_threads) if (T * H * C > 65536)
    for (int64_t row = 0; row < m.T * m.H; ++row) norm_row(m, row);
}

// Of rows [T, P * C] that are `x_token` apart, part by part: [T, P].
extern "C" void waybill_sums_of_squares_bf16(const bf16* x, float* out, int64_t T, int64_t P, int64_t C, int64_t x_token) {
    for (int64_t t = 0; t < T; ++t)
        for (int64_t part = 0; part < P; ++part) {
            Floats squares = all(0.0f);
            for (int64_t c = 0; c < C; c += WIDTH) {
                const Floats value = load(x + t * x_token + part * C + c, C - c);
                squares = multiply_add(value, value, squares);
            }
            out[t * P + part] = sum_of(squares);
        }
}
