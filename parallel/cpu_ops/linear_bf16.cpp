// The product of rows with a matrix in bfloat16. Twin of `torch.nn.functional.linear`; sums and bias are in float32, rounded
// once. It knows nothing of torch or Python.
//
// Threads own ranges of outputs: every weight is read once, by one thread, one row after the other.
//
// The sum of a row-parallel layer goes in parts of the columns, each complete before it is added to the next: the parts of a
// whole matrix are those that ranks hold where it is sharded, whose partial results stay in float32. So both give the same
// bits.
//
// Legend: T tokens, R rows (outputs) and C columns (inputs) of the matrix, P parts of the columns.

#include <vector>

#include "dot_products.h"

using namespace waybill;

namespace {

struct Problem {
    const bf16* weight;  // [R, C], rows weight_stride apart
    const bf16* bias;    // [R] or null
    bf16* out;           // [T, R]
    float* partial;      // [T, R], in place of `out`, or null
    int64_t T, R, C, weight_stride;
};

// Outputs first .. first + 4 of `num_tokens` tokens from `token` on.
void multiply(const Problem& m, const std::vector<Inputs>& parts, int64_t token, int num_tokens, int64_t first) {
    const int num_outputs = std::min<int64_t>(OUTPUTS, m.R - first);
    const Input* x[TOKENS];
    const bf16* w[OUTPUTS];
    alignas(64) float sums[TILE_SIZE] = {};
    for (size_t part = 0; part < parts.size(); ++part) {
        const int64_t width = m.C / parts.size();
        for (int t = 0; t < num_tokens; ++t) x[t] = parts[part].row(token + t);
        // A tile at the end repeats the last row; what it gives is dropped.
        for (int o = 0; o < OUTPUTS; ++o)
            w[o] = m.weight + (first + std::min(o, num_outputs - 1)) * m.weight_stride + part * width;
        alignas(64) float own[TILE_SIZE] = {};
        tile(num_tokens, token == 0, x, w, width, OUTPUTS * m.weight_stride, part == 0 ? sums : own);
        if (part > 0)
            for (int i = 0; i < num_tokens * OUTPUTS; i += WIDTH) store(sums + i, load(sums + i) + load(own + i));
        if (part > 0 || m.bias == nullptr) continue;
        // The first rank alone has it.
        bf16 repeated[WIDTH] = {};
        for (int i = 0; i < WIDTH; ++i)
            if (i % OUTPUTS < num_outputs) repeated[i] = m.bias[first + i % OUTPUTS];
        for (int i = 0; i < num_tokens * OUTPUTS; i += WIDTH) store(sums + i, load(sums + i) + load_bf16(repeated));
    }
    bf16 values[TILE_SIZE];
    for (int i = 0; i < num_tokens * OUTPUTS; i += WIDTH) store_bf16(values + i, load(sums + i));
    for (int t = 0; t < num_tokens; ++t) {
        const int64_t at = (token + t) * m.R + first;
        if (m.partial != nullptr) std::memcpy(m.partial + at, sums + t * OUTPUTS, num_outputs * sizeof(float));
        else std::memcpy(m.out + at, values + t * OUTPUTS, num_outputs * sizeof(bf16));
    }
}

}  // namespace

// Tensors as in `Problem`, and x [T, C], rows x_stride apart. P divides C.
extern "C" void waybill_linear_bf16(const bf16* x, const bf16* weight, const bf16* bias, bf16* out, float* partial, int64_t T,
                                    int64_t R, int64_t C, int64_t P, int64_t x_stride, int64_t weight_stride,
                                    int num_threads) {
    const Problem m{weight, bias, out, partial, T, R, C, weight_stride};
    std::vector<Inputs> parts;
    for (int64_t part = 0; part < P; ++part) parts.emplace_back(x + part * (C / P), T, C / P, x_stride, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        const Range own = own_part(R, OUTPUTS);
        for (int64_t begin = own.begin; begin < own.end; begin += BLOCK)
            for (int64_t t = 0; t < T; t += TOKENS)
                for (int64_t o = begin; o < std::min(begin + BLOCK, own.end); o += OUTPUTS)
                    multiply(m, parts, t, std::min<int64_t>(TOKENS, T - t), o);
    }
}
