// The product of rows with a matrix in bfloat16. Twin of `torch.nn.functional.linear`; sums and bias are in float32, rounded
// once. It knows nothing of torch or Python.
//
// Threads own ranges of outputs: every weight is read once, by one thread, one row after the other.
//
// Legend: T tokens, R rows (outputs) and C columns (inputs) of the matrix.

#include "dot_products.h"

using namespace waybill;

namespace {

struct Problem {
    const bf16* weight;  // [R, C], rows weight_stride apart
    const bf16* bias;    // [R] or null
    bf16* out;           // [T, R]
    int64_t T, R, C, weight_stride;
};

// Outputs first .. first + 4 of `num_tokens` tokens from `token` on.
void multiply(const Problem& m, const Inputs& inputs, int64_t token, int num_tokens, int64_t first) {
    const int num_outputs = std::min<int64_t>(OUTPUTS, m.R - first);
    const Input* x[TOKENS];
    const bf16* w[OUTPUTS];
    for (int t = 0; t < num_tokens; ++t) x[t] = inputs.row(token + t);
    // A tile at the end repeats the last row; what it gives is dropped.
    for (int o = 0; o < OUTPUTS; ++o) w[o] = m.weight + (first + std::min(o, num_outputs - 1)) * m.weight_stride;
    alignas(64) float sums[TILE_SIZE] = {};
    tile(num_tokens, token == 0, x, w, m.C, OUTPUTS * m.weight_stride, sums);
    Floats bias = zero();
    if (m.bias != nullptr) {
        bf16 repeated[WIDTH] = {};
        for (int i = 0; i < WIDTH; ++i)
            if (i % OUTPUTS < num_outputs) repeated[i] = m.bias[first + i % OUTPUTS];
        bias = load_bf16(repeated);
    }
    bf16 values[TILE_SIZE];
    for (int i = 0; i < num_tokens * OUTPUTS; i += WIDTH) {
        const Floats sum = load(sums + i);
        store_bf16(values + i, m.bias == nullptr ? sum : sum + bias);
    }
    for (int t = 0; t < num_tokens; ++t)
        std::memcpy(m.out + (token + t) * m.R + first, values + t * OUTPUTS, num_outputs * sizeof(bf16));
}

}  // namespace

// Tensors as in `Problem`, and x [T, C], rows x_stride apart.
extern "C" void waybill_linear_bf16(const bf16* x, const bf16* weight, const bf16* bias, bf16* out, int64_t T, int64_t R,
                                    int64_t C, int64_t x_stride, int64_t weight_stride, int num_threads) {
    const Problem m{weight, bias, out, T, R, C, weight_stride};
    const Inputs inputs(x, T, C, x_stride, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        const Range own = own_part(R, OUTPUTS);
        for (int64_t begin = own.begin; begin < own.end; begin += BLOCK)
            for (int64_t t = 0; t < T; t += TOKENS)
                for (int64_t o = begin; o < std::min(begin + BLOCK, own.end); o += OUTPUTS)
                    multiply(m, inputs, t, std::min<int64_t>(TOKENS, T - t), o);
    }
}
