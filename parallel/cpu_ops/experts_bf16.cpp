// The experts of one rank in bfloat16. Twin of `experts_torch_reference`, which says what is
// computed; every rounding to bfloat16 happens where torch has one. It knows nothing of ranks, torch or Python.
//
// A token's result has the same bits whatever tokens, threads or steps it is computed with: so have its dot products, and the
// sum over its experts goes in the order of their numbers. It goes in parts, each complete before it is added to others, as a
// tree (`sum_of_terms`): ranks hold branches of it, whose results stay in float32. So one rank, two and four give the same
// bits. Parts are of the experts, where ranks hold whole ones: what each adds is rounded, and kept until all are there. Or they
// are of the columns of every expert, where ranks hold slices: then nothing is rounded behind the second product, which no rank
// has whole, and products are added where they are made.
//
// Threads own ranges of outputs, never experts: none waits for a busy expert, and no two write the same column.
//
// Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank, P parts, p pair of a
// token and one of its experts, sorted by expert.

#include "amx_tiles.h"
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
    bf16* activated;           // scratch: [pairs, I], or with tiles a panel [I / 2, 16, 2] for each 16 pairs of an expert
    bf16* results;             // scratch of whole experts: [pairs, D]
    float* sums;               // scratch of slices: [P, T, D], zero
    bf16* out;                 // [T, D]
    float* partial;            // [T, D], in place of `out`, or null
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

// The pairs of expert e are first[e] .. first[e + 1] - 1, in token order; pair p is choice[p] of [T * K]. Those of token t are
// the first of `of_token`, from t * K on, in the order of their experts; its part q ends at part_end[t * P + q] of these.
struct Groups {
    std::vector<int64_t> first, choice, of_token, part_end;

    explicit Groups(const Problem& m) : first(m.F + 2), choice(m.T * m.K) {
        const auto is_local = [&](int64_t id) { return id >= 0 && id < m.F; };
        for (int64_t i = 0; i < m.T * m.K; ++i)
            if (is_local(m.ids[i])) ++first[m.ids[i] + 2];
        for (int64_t e = 2; e < m.F + 2; ++e) first[e] += first[e - 1];
        for (int64_t i = 0; i < m.T * m.K; ++i)
            if (is_local(m.ids[i])) choice[first[m.ids[i] + 1]++] = i;
        if (m.are_slices) return;
        of_token.resize(m.T * m.K);
        part_end.resize(m.T * m.P);
        for (int64_t part = 0; part < m.P; ++part) {
            for (int64_t t = 0; t < m.T; ++t) part_end[t * m.P + part] = part == 0 ? t * m.K : part_end[t * m.P + part - 1];
            for (int64_t p = first[m.F / m.P * part]; p < first[m.F / m.P * (part + 1)]; ++p)
                of_token[part_end[choice[p] / m.K * m.P + part]++] = p;
        }
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

// results[p, columns] = weight of p * (activated[p] . down); of slices, sums[slice, token of p, columns] += ...
template <bool ARE_SLICES>
void project(const Problem& m, const Groups& groups, int64_t e, Range columns) {
    const int64_t end = groups.first[e + 1], num_slices = ARE_SLICES ? m.P : 1, width = m.I / num_slices;
    const bf16* bias = m.down_bias == nullptr ? nullptr : m.down_bias + e * m.D;
    const auto round = [](Floats value) { return ARE_SLICES ? value : rounded(value); };
    for (int64_t p = groups.first[e]; p < end; p += TILE) {
        const int n = std::min<int64_t>(TILE, end - p);
        const bool is_first = p == groups.first[e];
        float weights[TILE] = {};
        for (int t = 0; t < n; ++t) weights[t] = m.weights[groups.choice[p + t]];
        const Floats weight = of_each_row(weights);
        for (int64_t d = columns.begin; d < columns.end; d += TILE)
            for (int64_t slice = 0; slice < num_slices; ++slice) {
                const bf16* inputs[TILE];
                for (int t = 0; t < n; ++t) inputs[t] = m.activated + (p + t) * m.I + slice * width;
                Floats value =
                    round(tile_of_rows(n, is_first, inputs, m.down + (e * m.D + d) * m.I + slice * width, m.I, 1, width));
                if (bias != nullptr && slice == 0) value = round(value + of_each_output(bias + d, 1));
                value = value * weight;
                if constexpr (ARE_SLICES) {
                    float values[WIDTH];
                    store(values, value);
                    for (int t = 0; t < n; ++t) {
                        float* sum = m.sums + (slice * m.T + groups.choice[p + t] / m.K) * m.D + d;
                        for (int o = 0; o < TILE; ++o) sum[o] += values[t * TILE + o];
                    }
                } else {
                    bf16 values[WIDTH];
                    store(values, value);
                    for (int t = 0; t < n; ++t)
                        std::memcpy(m.results + (p + t) * m.D + d, values + t * TILE, TILE * sizeof(bf16));
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

// What a part adds to token t in the columns from d on.
Floats sum_of_part(const Problem& m, const Groups& groups, int64_t part, int64_t t, int64_t d) {
    if (m.are_slices) return load(m.sums + (part * m.T + t) * m.D + d);
    const int64_t* end = groups.part_end.data() + t * m.P + part;
    Floats sum = all(0.0f);
    for (int64_t i = part == 0 ? t * m.K : end[-1]; i < *end; ++i) sum = sum + load(m.results + groups.of_token[i] * m.D + d);
    return sum;
}

// The parts of a thread's columns, added up.
void finish(const Problem& m, const Groups& groups, Range columns) {
    for (int64_t t = 0; t < m.T; ++t)
        for (int64_t d = columns.begin; d < columns.end; d += WIDTH) {
            const Floats total = sum_of_terms(0, m.P, [&](int64_t part) { return sum_of_part(m, groups, part, t, d); });
            if (m.partial != nullptr) store(m.partial + t * m.D + d, total);
            else store(m.out + t * m.D + d, total);
        }
}

#if defined(__AMX_BF16__)

// What all ranks know: the widths of the sums.
bool fits_tiles(const Problem& m) { return m.D % LANES == 0 && m.I / (m.are_slices ? m.P : 1) % LANES == 0; }

// The pairs of an expert in panels of 16: of what is activated, these begin at first_panel[e].
struct Panels {
    std::vector<int64_t> first;

    Panels(const Problem& m, const Groups& groups) : first(m.F + 1) {
        for (int64_t e = 0; e < m.F; ++e) first[e + 1] = first[e] + (groups.first[e + 1] - groups.first[e] + SIDE - 1) / SIDE;
    }
};

Floats activated(const Problem& m, Floats gate, Floats up, const bf16* bias) {
    gate = rounded(gate);
    up = rounded(up);
    if (bias == nullptr) return rounded(silu(gate)) * up;
    return clamped(m, rounded(gate + all(as_float(bias[0]))), rounded(up + all(as_float(bias[1]))));
}

constexpr int64_t CHUNK = 32;          // panels of an expert whose tokens a thread has packed at once
constexpr int64_t STREAMED = 1 << 21;  // results that are more than the second cache level has room for

// As `activate`, with tiles; x is memory of this thread for `CHUNK` panels.
void activate_by_tiles(const Problem& m, const Groups& groups, const Panels& panels, int64_t e, Range columns, uint32_t* x,
                       Sums (*sums)[2]) {
    const bf16 *gate = m.gate_up + e * 2 * m.I * m.D, *bias = m.gate_up_bias == nullptr ? nullptr : m.gate_up_bias + e * 2 * m.I;
    const int64_t step = bias == nullptr ? 1 : 2, to_up = bias == nullptr ? m.I : 1;
    const int64_t num_panels = panels.first[e + 1] - panels.first[e], panel_pairs = m.D / 2 * SIDE;
    uint32_t* to = (uint32_t*)m.activated + panels.first[e] * m.I / 2 * SIDE;
    for (int64_t chunk = 0; chunk < num_panels; chunk += CHUNK) {
        const int64_t end = std::min(chunk + CHUNK, num_panels);
        for (int64_t p = chunk; p < end; ++p) {
            const bf16* rows[SIDE];
            const int64_t begin = groups.first[e] + p * SIDE, num_rows = std::min<int64_t>(SIDE, groups.first[e + 1] - begin);
            for (int64_t i = 0; i < num_rows; ++i) rows[i] = m.hidden + groups.choice[begin + i] / m.K * m.D;
            pack_rows(rows, num_rows, m.D, x + (p - chunk) * panel_pairs);
        }
        for (int64_t i = columns.begin; i < columns.end; i += SIDE) {
            const bf16* rows = gate + step * i * m.D;
            const WeightTiles weights{{rows, rows + to_up * m.D}, step * m.D, step * SIDE * m.D};
            for (int64_t p = chunk; p < end; p += MAX_PANELS) {
                const int num = std::min<int64_t>(MAX_PANELS, end - p);
                multiply_tiles(weights, 0, m.D, x + (p - chunk) * panel_pairs, panel_pairs, num, sums);
                for (int j = 0; j < num; ++j)
                    for (int row = 0; row < SIDE; row += 2) {
                        Floats values[2];
                        for (int odd = 0; odd < 2; ++odd)
                            values[odd] = activated(m, load(sums[j][0][row + odd]), load(sums[j][1][row + odd]),
                                                    bias == nullptr ? nullptr : bias + 2 * (i + row + odd));
                        _mm512_store_si512(to + ((p + j) * m.I + i + row) / 2 * SIDE, pairs_of(values[0], values[1]));
                    }
            }
        }
    }
}

// Of a tile of outputs from d on and of pairs: what `project` makes of them.
template <bool ARE_SLICES>
void weigh(const Sums& sums, Floats weights, const bf16* bias, Floats (&rows)[SIDE]) {
    const auto round = [](Floats value) { return ARE_SLICES ? value : rounded(value); };
    for (int o = 0; o < SIDE; ++o) {
        Floats value = round(load(sums[o]));
        if (bias != nullptr) value = round(value + all(as_float(bias[o])));
        rows[o] = value * weights;
    }
}

// As `project`, with tiles.
template <bool ARE_SLICES>
void project_by_tiles(const Problem& m, const Groups& groups, const Panels& panels, int64_t e, Range columns,
                      Sums (*sums)[2]) {
    const int64_t num_slices = ARE_SLICES ? m.P : 1, width = m.I / num_slices;
    const int64_t num_panels = panels.first[e + 1] - panels.first[e], panel_pairs = m.I / 2 * SIDE;
    // What a cache has no room for is written to memory, a line at a time, which then need not be read first.
    const bool passes_caches = m.T * m.K * m.D >= STREAMED && (uintptr_t)m.results % 64 == 0;
    // Of two tiles: outputs from d on, the pairs of panel p.
    const auto put = [&](const Sums(&products)[2], int64_t d, int64_t p, int64_t slice) {
        const int64_t begin = groups.first[e] + p * SIDE, num_pairs = std::min<int64_t>(SIDE, groups.first[e + 1] - begin);
        float weights[SIDE] = {};
        for (int64_t i = 0; i < num_pairs; ++i) weights[i] = m.weights[groups.choice[begin + i]];
        Floats values[2][SIDE];
        for (int i = 0; i < 2; ++i) {
            const bf16* bias = m.down_bias == nullptr || slice > 0 ? nullptr : m.down_bias + e * m.D + d + i * SIDE;
            weigh<ARE_SLICES>(products[i], load(weights), bias, values[i]);
        }
        if constexpr (ARE_SLICES) {
            for (int i = 0; i < 2; ++i) {
                transpose(values[i]);
                for (int64_t t = 0; t < num_pairs; ++t) {
                    float* sum = m.sums + (slice * m.T + groups.choice[begin + t] / m.K) * m.D + d + i * SIDE;
                    store(sum, load(sum) + values[i][t]);
                }
            }
        } else {
            __m512i rows[SIDE];
            rounded_rows(values, rows);
            for (int64_t t = 0; t < num_pairs; ++t) {
                void* to = m.results + (begin + t) * m.D + d;
                if (passes_caches) _mm512_stream_si512((__m512i*)to, rows[t]);
                else _mm512_storeu_si512(to, rows[t]);
            }
        }
    };
    const uint32_t* x = (const uint32_t*)m.activated + panels.first[e] * panel_pairs;
    for (int64_t d = columns.begin; d < columns.end && num_panels > 0; d += 2 * SIDE) {
        const bf16* rows = m.down + (e * m.D + d) * m.I;
        const WeightTiles tiles{{rows, rows + SIDE * m.I}, m.I, 2 * SIDE * m.I};
        for (int64_t p = 0; p < num_panels; p += MAX_PANELS)
            for (int64_t slice = 0; slice < num_slices; ++slice) {
                const int num = std::min<int64_t>(MAX_PANELS, num_panels - p);
                multiply_tiles(tiles, slice * width, width, x + p * panel_pairs + slice * width / 2 * SIDE, panel_pairs, num, sums);
                for (int j = 0; j < num; ++j) put(sums[j], d, p + j, slice);
            }
    }
}

// By all threads together.
void compute_by_tiles(const Problem& m, const Groups& groups, const Panels& panels) {
    const Tiles tiles;
    int64_t most = 0;
    for (int64_t e = 0; e < m.F; ++e) most = std::max(most, panels.first[e + 1] - panels.first[e]);
    static thread_local ThreadMemory scratch;
    uint32_t* x = scratch.of(std::min(most, CHUNK) * m.D / 2 * SIDE);
    alignas(64) Sums sums[MAX_PANELS][2];
    for (int64_t e = 0; e < m.F; ++e) activate_by_tiles(m, groups, panels, e, own_part(m.I, LANES), x, sums);
#pragma omp barrier
    const Range own = own_part(m.D, LANES);
    for (int64_t e = 0; e < m.F; ++e) {
        if (m.are_slices) project_by_tiles<true>(m, groups, panels, e, own, sums);
        else project_by_tiles<false>(m, groups, panels, e, own, sums);
    }
    finish(m, groups, own);
}

#endif

}  // namespace

// Tensors as in `Problem`, all contiguous. D is a multiple of 32, I of 4; P is a power of two and divides F, or I.
extern "C" void waybill_experts_bf16(const bf16* hidden, const int64_t* ids, const float* weights, const bf16* gate_up,
                                     const bf16* down, const bf16* gate_up_bias, const bf16* down_bias, bf16* activated,
                                     bf16* results, float* sums, bf16* out, float* partial, int64_t T, int64_t D, int64_t F,
                                     int64_t K, int64_t I, int64_t P, int are_slices, float alpha, float limit,
                                     int num_threads) {
    const Problem m{hidden, ids, weights, gate_up, down, gate_up_bias, down_bias, activated, results, sums, out, partial,
                    T, D, F, K, I, P, are_slices != 0, alpha, limit};
    const Groups groups(m);
#if defined(__AMX_BF16__)
    if (fits_tiles(m)) {
        const Panels panels(m, groups);
#pragma omp parallel num_threads(num_threads)
        compute_by_tiles(m, groups, panels);
        return;
    }
#endif
#pragma omp parallel num_threads(num_threads)
    {
        for_each_block(m, own_part(I, LANES), [&](int64_t e, Range columns) { activate(m, groups, e, columns); });
#pragma omp barrier
        const Range own = own_part(D, LANES);
        for_each_block(m, own, [&](int64_t e, Range columns) {
            m.are_slices ? project<true>(m, groups, e, columns) : project<false>(m, groups, e, columns);
        });
        finish(m, groups, own);
    }
}
