// The product of rows with a matrix in bfloat16. Twin of `torch.nn.functional.linear`; sums and bias are in float32, rounded
// once. It knows nothing of torch or Python.
//
// Threads own ranges of outputs: every weight is read once, by one thread, one row after the other.
//
// The sum of a row-parallel layer goes in parts of the columns, each complete before it is added to others, as a tree
// (`sum_of_terms`): ranks that share the columns hold branches of it, whose results stay in float32. So any number of ranks
// gives the same bits.
//
// Legend: T tokens, R rows (outputs) and C columns (inputs) of the matrix, P parts of the columns.

#include "dot_products.h"

using namespace waybill;

namespace {

struct Problem {
    const bf16* x;       // [T, C], rows x_stride apart
    const bf16* weight;  // [R, C], rows weight_stride apart
    const bf16* bias;    // [R] or null
    bf16* out;           // [T, R]
    float* partial;      // [T, R], in place of `out`, or null
    int64_t T, R, C, P, x_stride, weight_stride;
};

// Outputs first .. first + 4 of `num_tokens` tokens from `token` on.
void multiply(const Problem& m, int64_t token, int num_tokens, int64_t first) {
    const int num_outputs = std::min<int64_t>(TILE, m.R - first);
    const int64_t width = m.C / m.P;
    const auto sum_of_part = [&](int64_t part) {
        const bf16 *x[TILE], *w[TILE];
        for (int t = 0; t < num_tokens; ++t) x[t] = m.x + (token + t) * m.x_stride + part * width;
        // A tile at the end repeats the last row; what it gives is dropped.
        for (int o = 0; o < TILE; ++o)
            w[o] = m.weight + (first + std::min(o, num_outputs - 1)) * m.weight_stride + part * width;
        return tile(num_tokens, token == 0, x, w, width, TILE * m.weight_stride);
    };
    const Floats sums = sum_of_terms(0, m.P, [&](int64_t part) {
        const Floats sum = sum_of_part(part);
        // The first rank alone has a bias, and its first part.
        if (m.bias == nullptr || part > 0) return sum;
        bf16 bias[WIDTH] = {};
        for (int t = 0; t < TILE; ++t) std::memcpy(bias + t * TILE, m.bias + first, num_outputs * sizeof(bf16));
        return sum + load(bias);
    });
    float wide[WIDTH];
    bf16 values[WIDTH];
    store(wide, sums);
    store(values, sums);
    for (int t = 0; t < num_tokens; ++t) {
        const int64_t at = (token + t) * m.R + first;
        if (m.partial != nullptr) std::memcpy(m.partial + at, wide + t * TILE, num_outputs * sizeof(float));
        else std::memcpy(m.out + at, values + t * TILE, num_outputs * sizeof(bf16));
    }
}

}  // namespace

// Tensors as in `Problem`. P is a power of two and divides C.
extern "C" void waybill_linear_bf16(const bf16* x, const bf16* weight, const bf16* bias, bf16* out, float* partial, int64_t T,
                                    int64_t R, int64_t C, int64_t P, int64_t x_stride, int64_t weight_stride,
                                    int num_threads) {
    const Problem m{x, weight, bias, out, partial, T, R, C, P, x_stride, weight_stride};
#pragma omp parallel num_threads(num_threads)
    {
        const Range own = own_part(R, TILE);
        for (int64_t begin = own.begin; begin < own.end; begin += BLOCK)
            for (int64_t t = 0; t < T; t += TILE)
                for (int64_t o = begin; o < std::min(begin + BLOCK, own.end); o += TILE)
                    multiply(m, t, std::min<int64_t>(TILE, T - t), o);
    }
}
