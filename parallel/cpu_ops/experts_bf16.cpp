// The experts of one rank in bfloat16. Twin of `experts_torch_reference`, which says what is computed; every rounding to
// bfloat16 happens where torch has one. It knows nothing of ranks, torch or Python.
//
// Tokens are copied once at most, where they are widened. A token's result has the same bits whatever tokens, threads or steps
// it is computed with: so have its dot products, and the sum over its experts goes in the order of their numbers. It goes in
// parts of the experts, each complete before it is added to the next: the parts of all experts are those that ranks hold
// where they are spread, whose partial results stay in float32. So both give the same bits.
//
// Threads own ranges of outputs, never experts: none waits for a busy expert, and no two write the same column.
//
// Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank,
// P parts of the experts, p pair of a token and one of its experts, sorted by expert.

#include <vector>

#include "dot_products.h"

using namespace waybill;

namespace {

struct Problem {
    const int64_t* ids;    // [T, K]; outside [0, F): an expert of another rank
    const float* weights;  // [T, K]
    const bf16* gate_up;   // [F, 2I, D]
    const bf16* down;      // [F, D, I]
    float* sums;           // [P, T, D], zero
    bf16* out;             // [T, D], or null: the sums of one part are the result
    int64_t T, D, F, K, I, P;
};

Floats silu(Floats x) { return x / (all_of(1.0f) + exponential(zero() - x)); }

// The same for four consecutive rows of w.
void tile_of_rows(int num_tokens, bool is_first, const Input* const* x, const bf16* w, int64_t width, float* out) {
    const bf16* rows[OUTPUTS];
    for (int o = 0; o < OUTPUTS; ++o) rows[o] = w + o * width;
    tile(num_tokens, is_first, x, rows, width, OUTPUTS * width, out);
}

// The pairs of expert e are first[e] .. first[e + 1] - 1, in token order; pair p is choice[p] of [T * K].
struct Groups {
    std::vector<int64_t> first, choice;

    explicit Groups(const Problem& m) : first(m.F + 2), choice(m.T * m.K) {
        const auto is_local = [&](int64_t id) { return id >= 0 && id < m.F; };
        for (int64_t i = 0; i < m.T * m.K; ++i)
            if (is_local(m.ids[i])) ++first[m.ids[i] + 2];
        for (int64_t e = 2; e < m.F + 2; ++e) first[e] += first[e - 1];
        for (int64_t i = 0; i < m.T * m.K; ++i)
            if (is_local(m.ids[i])) choice[first[m.ids[i] + 1]++] = i;
    }
};

// activated[p, columns] = silu(gate) * up
void activate(const Problem& m, const Groups& groups, const Inputs& hidden, Input* activated, int64_t e, Range columns) {
    const bf16* gate = m.gate_up + e * 2 * m.I * m.D;
    const bf16* up = gate + m.I * m.D;
    const int64_t end = groups.first[e + 1];
    for (int64_t p = groups.first[e]; p < end; p += TOKENS) {
        const int n = std::min<int64_t>(TOKENS, end - p);
        const bool is_first = p == groups.first[e];
        const Input* x[TOKENS];
        for (int t = 0; t < n; ++t) x[t] = hidden.row(groups.choice[p + t] / m.K);
        for (int64_t i = columns.begin; i < columns.end; i += OUTPUTS) {
            alignas(64) float gates[TILE_SIZE] = {}, ups[TILE_SIZE] = {};
            tile_of_rows(n, is_first, x, gate + i * m.D, m.D, gates);
            tile_of_rows(n, is_first, x, up + i * m.D, m.D, ups);
            bf16 values[TILE_SIZE];
            for (int j = 0; j < n * OUTPUTS; j += WIDTH)
                store_bf16(values + j, round_to_bf16(silu(round_to_bf16(load(gates + j)))) * round_to_bf16(load(ups + j)));
            for (int t = 0; t < n; ++t)
                for (int o = 0; o < OUTPUTS; ++o)
                    activated[(p + t) * m.I + place_of(i + o)] = input_of(values[t * OUTPUTS + o]);
        }
    }
}

// sums[token of p, columns] += weight of p * (activated[p] . down)
void project(const Problem& m, const Groups& groups, const Input* activated, int64_t e, Range columns) {
    const int64_t end = groups.first[e + 1];
    for (int64_t p = groups.first[e]; p < end; p += TOKENS) {
        const int n = std::min<int64_t>(TOKENS, end - p);
        const bool is_first = p == groups.first[e];
        const Input* x[TOKENS];
        alignas(64) float weights[TILE_SIZE] = {};
        for (int t = 0; t < n; ++t) {
            x[t] = activated + (p + t) * m.I;
            for (int o = 0; o < OUTPUTS; ++o) weights[t * OUTPUTS + o] = m.weights[groups.choice[p + t]];
        }
        for (int64_t d = columns.begin; d < columns.end; d += OUTPUTS) {
            alignas(64) float values[TILE_SIZE] = {};
            tile_of_rows(n, is_first, x, m.down + (e * m.D + d) * m.I, m.I, values);
            for (int j = 0; j < n * OUTPUTS; j += WIDTH)
                store(values + j, round_to_bf16(round_to_bf16(load(values + j)) * load(weights + j)));
            for (int t = 0; t < n; ++t) {
                float* sum = m.sums + (e / (m.F / m.P) * m.T + groups.choice[p + t] / m.K) * m.D + d;
                _mm_storeu_ps(sum, _mm_loadu_ps(sum) + _mm_load_ps(values + t * OUTPUTS));
            }
        }
    }
}

template <class Step>
void for_each_block(const Problem& m, Range columns, Step step) {
    for (int64_t e = 0; e < m.F; ++e)
        for (int64_t begin = columns.begin; begin < columns.end; begin += BLOCK)
            step(e, Range{begin, std::min(begin + BLOCK, columns.end)});
}

}  // namespace

// Tensors as in `Problem`, and hidden [T, D], all contiguous. D and I are multiples of 32, F one of P.
extern "C" void waybill_experts_bf16(const bf16* hidden, const int64_t* ids, const float* weights, const bf16* gate_up,
                                     const bf16* down, float* sums, bf16* out, int64_t T, int64_t D, int64_t F, int64_t K,
                                     int64_t I, int64_t P, int num_threads) {
    const Problem m{ids, weights, gate_up, down, sums, out, T, D, F, K, I, P};
    const Groups groups(m);
    const Inputs inputs(hidden, T, D, D, num_threads);
    const Buffer<Input> activated(T * K * I);
#pragma omp parallel num_threads(num_threads)
    {
        for_each_block(m, own_part(I, LANES),
                       [&](int64_t e, Range columns) { activate(m, groups, inputs, activated.data(), e, columns); });
#pragma omp barrier
        const Range own = own_part(D, LANES);
        for_each_block(m, own, [&](int64_t e, Range columns) { project(m, groups, activated.data(), e, columns); });
        for (int64_t t = 0; t < T && out != nullptr; ++t)
            for (int64_t d = own.begin; d < own.end; d += WIDTH) {
                Floats total = load(sums + t * D + d);
                for (int64_t part = 1; part < P; ++part) total = total + load(sums + (part * T + t) * D + d);
                store_bf16(out + t * D + d, total);
            }
    }
}
