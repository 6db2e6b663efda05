// The experts of one rank in bfloat16. Twin of `experts_torch_reference`, which says what is
// computed; every rounding to bfloat16 happens where torch has one. It knows nothing of ranks, torch or Python.
//
// No token is copied. A token's result has the same bits whatever tokens, threads or steps it is computed with: so have its
// dot products, and the sum over its experts goes in the order of their numbers. It goes in parts of the experts, each complete
// before it is added to those before: the parts of all experts are those that ranks hold where they are spread, whose partial
// results stay in float32. So both give the same bits.
//
// Threads own ranges of outputs, never experts: none waits for a busy expert, and no two write the same column.
//
// Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank, P parts of the experts,
// p pair of a token and one of its experts, sorted by expert.

#include "dot_products.h"
#include "exponential.h"

#include <vector>

using namespace waybill;

namespace {

struct Problem {
    const bf16* hidden;    // [T, D]
    const int64_t* ids;    // [T, K]; outside [0, F): an expert of another rank
    const float* weights;  // [T, K]
    const bf16* gate_up;   // [F, 2I, D]
    const bf16* down;      // [F, D, I]
    bf16* activated;       // [pairs, I], scratch
    float* sums;           // [P, T, D], zero
    bf16* out;             // [T, D], or null: the sums of one part are the result
    int64_t T, D, F, K, I, P;
};

Floats silu(Floats x) { return x / (all(1.0f) + exponential(all(0.0f) - x)); }

// The same for four consecutive rows of w.
Floats tile_of_rows(int num_tokens, bool is_first, const bf16* const* x, const bf16* w, int64_t width) {
    const bf16* rows[TILE];
    for (int o = 0; o < TILE; ++o) rows[o] = w + o * width;
    return tile(num_tokens, is_first, x, rows, width, TILE * width);
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
void activate(const Problem& m, const Groups& groups, int64_t e, Range columns) {
    const bf16* gate = m.gate_up + e * 2 * m.I * m.D;
    const bf16* up = gate + m.I * m.D;
    const int64_t end = groups.first[e + 1];
    for (int64_t p = groups.first[e]; p < end; p += TILE) {
        const int n = std::min<int64_t>(TILE, end - p);
        const bool is_first = p == groups.first[e];
        const bf16* x[TILE];
        for (int t = 0; t < n; ++t) x[t] = m.hidden + groups.choice[p + t] / m.K * m.D;
        for (int64_t i = columns.begin; i < columns.end; i += TILE) {
            const Floats g = rounded(tile_of_rows(n, is_first, x, gate + i * m.D, m.D));
            const Floats u = rounded(tile_of_rows(n, is_first, x, up + i * m.D, m.D));
            bf16 values[WIDTH];
            store(values, rounded(silu(g)) * u);
            for (int t = 0; t < n; ++t) std::memcpy(m.activated + (p + t) * m.I + i, values + t * TILE, TILE * sizeof(bf16));
        }
    }
}

// sums[token of p, columns] += weight of p * (activated[p] . down)
void project(const Problem& m, const Groups& groups, int64_t e, Range columns) {
    const int64_t end = groups.first[e + 1];
    for (int64_t p = groups.first[e]; p < end; p += TILE) {
        const int n = std::min<int64_t>(TILE, end - p);
        const bool is_first = p == groups.first[e];
        const bf16* x[TILE];
        float weights[TILE] = {};
        for (int t = 0; t < n; ++t) {
            x[t] = m.activated + (p + t) * m.I;
            weights[t] = m.weights[groups.choice[p + t]];
        }
        const Floats weight = of_each_row(weights);
        for (int64_t d = columns.begin; d < columns.end; d += TILE) {
            float values[WIDTH];
            store(values, rounded(rounded(tile_of_rows(n, is_first, x, m.down + (e * m.D + d) * m.I, m.I)) * weight));
            for (int t = 0; t < n; ++t) {
                float* sum = m.sums + (e / (m.F / m.P) * m.T + groups.choice[p + t] / m.K) * m.D + d;
                for (int o = 0; o < TILE; ++o) sum[o] += values[t * TILE + o];
            }
        }
    }
}

template <class Work>
void for_each_block(const Problem& m, Range columns, Work work) {
    for (int64_t e = 0; e < m.F; ++e)
        for (int64_t begin = columns.begin; begin < columns.end; begin += BLOCK)
            work(e, Range{begin, std::min(begin + BLOCK, columns.end)});
}

}  // namespace

// Tensors as in `Problem`, all contiguous. D and I are multiples of 32, F one of P.
extern "C" void waybill_experts_bf16(const bf16* hidden, const int64_t* ids, const float* weights, const bf16* gate_up,
                                     const bf16* down, bf16* activated, float* sums, bf16* out, int64_t T, int64_t D,
                                     int64_t F, int64_t K, int64_t I, int64_t P, int num_threads) {
    const Problem m{hidden, ids, weights, gate_up, down, activated, sums, out, T, D, F, K, I, P};
    const Groups groups(m);
#pragma omp parallel num_threads(num_threads)
    {
        for_each_block(m, own_part(I, LANES), [&](int64_t e, Range columns) { activate(m, groups, e, columns); });
#pragma omp barrier
        const Range own = own_part(D, LANES);
        for_each_block(m, own, [&](int64_t e, Range columns) { project(m, groups, e, columns); });
        for (int64_t t = 0; t < T && out != nullptr; ++t)
            for (int64_t d = own.begin; d < own.end; d += WIDTH) {
                Floats total = load(sums + t * D + d);
                for (int64_t part = 1; part < P; ++part) total = total + load(sums + (part * T + t) * D + d);
                store(out + t * D + d, total);
            }
    }
}
