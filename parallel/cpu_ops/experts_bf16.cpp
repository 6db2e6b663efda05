// The experts of one rank in bfloat16. Twin of `experts_torch_reference`, which says what is
// computed; every rounding to bfloat16 happens where torch has one. It knows nothing of ranks, torch or Python.
//
// No token is copied. A token's result has the same bits whatever tokens, threads or steps it is computed with: so have its
// dot products, and the sum over its experts goes in the order of their numbers. It goes in parts, each complete before it is
// added to others, as a tree (`sum_of_terms`): ranks hold branches of it, whose results stay in float32. So any number of ranks
// gives the same bits. Parts are of the experts, where ranks hold whole ones; or of the columns of every expert, where ranks
// hold slices: then nothing is rounded behind the second product, which no rank has whole.
//
// Threads own ranges of outputs, never experts: none waits for a busy expert, and no two write the same column.
//
// Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank, P parts, p pair of a
// token and one of its experts, sorted by expert.

#include "dot_products.h"
#include "exponential.h"

#include <vector>

using namespace waybill;

namespace {

struct Problem {
    const bf16* hidden;        // [T, D]
    const int64_t* ids;        // [T, K]; outside [0, F): an expert of another rank
    const float* weights;      // [T, K]
    const bf16* gate_up;       // [F, 2I, D]
    const bf16* down;          // [F, D, I]
    const bf16* gate_up_bias;  // [F, 2I], of clamped experts, whose gate_up rows are gate and up in turn; or null
    const bf16* down_bias;     // [F, D], or null
    bf16* activated;           // [pairs, I], scratch
    float* sums;               // [P, T, D], zero; where `out` is null the result is in the first of them
    bf16* out;                 // [T, D], or null
    int64_t T, D, F, K, I, P;
    bool are_slices;           // parts are of the columns I, not of the experts
    float alpha, limit;        // of the clamp
};

// The same for four rows of w, `step` rows apart.
Floats tile_of_rows(int num_tokens, bool is_first, const bf16* const* x, const bf16* w, int64_t length, int64_t step,
                    int64_t width) {
    const bf16* rows[TILE];
    for (int o = 0; o < TILE; ++o) rows[o] = w + o * step * length;
    return tile(num_tokens, is_first, x, rows, width, TILE * step * length);
}

// A vector with the numbers bias[o * step] in column o of every tile row.
Floats of_each_output(const bf16* bias, int64_t step) {
    bf16 numbers[WIDTH];
    for (int i = 0; i < WIDTH; ++i) numbers[i] = bias[i % TILE * step];
    return load(numbers);
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

// (up + 1) * gate * sigmoid(alpha * gate), of what is within bounds.
Floats clamped(const Problem& m, Floats gate, Floats up) {
    // NaN stays: of the two it is the second.
    gate = smaller(all(m.limit), gate);
    up = larger(all(-m.limit), smaller(all(m.limit), up));
    const Floats weight = rounded(sigmoid(rounded(gate * all(m.alpha))));
    return rounded(up + all(1.0f)) * rounded(gate * weight);
}

// activated[p, columns] = silu(gate) * up
void activate(const Problem& m, const Groups& groups, int64_t e, Range columns) {
    const bf16 *gate = m.gate_up + e * 2 * m.I * m.D, *bias = m.gate_up_bias == nullptr ? nullptr : m.gate_up_bias + e * 2 * m.I;
    // Rows from a gate to the next one, and to its up.
    const int64_t step = bias == nullptr ? 1 : 2, to_up = bias == nullptr ? m.I : 1;
    const int64_t end = groups.first[e + 1];
    for (int64_t p = groups.first[e]; p < end; p += TILE) {
        const int n = std::min<int64_t>(TILE, end - p);
        const bool is_first = p == groups.first[e];
        const bf16* x[TILE];
        for (int t = 0; t < n; ++t) x[t] = m.hidden + groups.choice[p + t] / m.K * m.D;
        for (int64_t i = columns.begin; i < columns.end; i += TILE) {
            const auto product = [&](int64_t row) {
                const Floats sum = rounded(tile_of_rows(n, is_first, x, gate + row * m.D, m.D, step, m.D));
                return bias == nullptr ? sum : rounded(sum + of_each_output(bias + row, step));
            };
            const Floats g = product(step * i), u = product(step * i + to_up);
            bf16 values[WIDTH];
            store(values, bias == nullptr ? rounded(silu(g)) * u : clamped(m, g, u));
            for (int t = 0; t < n; ++t) std::memcpy(m.activated + (p + t) * m.I + i, values + t * TILE, TILE * sizeof(bf16));
        }
    }
}

// sums[token of p, columns] += weight of p * (activated[p] . down)
void project(const Problem& m, const Groups& groups, int64_t e, Range columns) {
    const int64_t end = groups.first[e + 1], num_slices = m.are_slices ? m.P : 1, width = m.I / num_slices;
    for (int64_t p = groups.first[e]; p < end; p += TILE) {
        const int n = std::min<int64_t>(TILE, end - p);
        const bool is_first = p == groups.first[e];
        const bf16* x[TILE];
        float weights[TILE] = {};
        for (int t = 0; t < n; ++t) weights[t] = m.weights[groups.choice[p + t]];
        const Floats weight = of_each_row(weights);
        for (int64_t d = columns.begin; d < columns.end; d += TILE)
            for (int64_t slice = 0; slice < num_slices; ++slice) {
                for (int t = 0; t < n; ++t) x[t] = m.activated + (p + t) * m.I + slice * width;
                const bf16* down = m.down + (e * m.D + d) * m.I + slice * width;
                const auto round = [&](Floats value) { return m.are_slices ? value : rounded(value); };
                Floats value = round(tile_of_rows(n, is_first, x, down, m.I, 1, width));
                if (m.down_bias != nullptr && slice == 0) value = round(value + of_each_output(m.down_bias + e * m.D + d, 1));
                float values[WIDTH];
                store(values, round(value * weight));
                const int64_t part = m.are_slices ? slice : e / (m.F / m.P);
                for (int t = 0; t < n; ++t) {
                    float* sum = m.sums + (part * m.T + groups.choice[p + t] / m.K) * m.D + d;
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

// The parts of a thread's columns, added up.
void finish(const Problem& m, Range columns) {
    if (m.out == nullptr && m.P == 1) return;
    for (int64_t t = 0; t < m.T; ++t)
        for (int64_t d = columns.begin; d < columns.end; d += WIDTH) {
            const Floats total =
                sum_of_terms(0, m.P, [&](int64_t part) { return load(m.sums + (part * m.T + t) * m.D + d); });
            if (m.out == nullptr) store(m.sums + t * m.D + d, total);
            else store(m.out + t * m.D + d, total);
        }
}

}  // namespace

// Tensors as in `Problem`, all contiguous. D is a multiple of 32, I of 4; P is a power of two and divides F, or I.
extern "C" void waybill_experts_bf16(const bf16* hidden, const int64_t* ids, const float* weights, const bf16* gate_up,
                                     const bf16* down, const bf16* gate_up_bias, const bf16* down_bias, bf16* activated,
                                     float* sums, bf16* out, int64_t T, int64_t D, int64_t F, int64_t K, int64_t I, int64_t P,
                                     int are_slices, float alpha, float limit, int num_threads) {
    const Problem m{hidden, ids, weights, gate_up, down, gate_up_bias, down_bias, activated, sums, out,
                    T, D, F, K, I, P, are_slices != 0, alpha, limit};
    const Groups groups(m);
#pragma omp parallel num_threads(num_threads)
    {
        for_each_block(m, own_part(I, LANES), [&](int64_t e, Range columns) { activate(m, groups, e, columns); });
#pragma omp barrier
        const Range own = own_part(D, LANES);
        for_each_block(m, own, [&](int64_t e, Range columns) { project(m, groups, e, columns); });
        finish(m, own);
    }
}
