// Attention of requests that bring one token each, over keys and values where they lie in the pool, in bfloat16. Twin of
// `decode` in `engine/attention/sdpa.py`. It knows nothing of torch or Python.
//
// Scores, softmax and sums are in float32 and go from a request's first key to its last, so what a request gets depends on
// nothing but itself. Threads own requests and groups of heads; those of one group follow each other, since tokens of a prompt
// read the same keys.
//
// Legend: B requests, H query heads, G kv heads, P = H / G heads that share one, d head width, S slots of the pool.

#include <cmath>
#include <vector>

#include "dot_products.h"
#include "exponential.h"

using namespace waybill;

namespace {

constexpr int CHUNKS = 4;  // vectors of an output that are summed at once

struct Problem {
    const bf16* query;       // [T, H, d]
    const bf16* keys;        // [S, G, d]
    const bf16* values;      // [S, G, d]
    const int64_t* rows;     // [B]: of the query
    const int64_t* slots;    // [B, num_keys], rows slots_stride apart
    const int64_t* lengths;  // [B]: keys that a request has
    bf16* out;               // [B, H, d]
    int64_t B, H, G, d, num_keys, slots_stride;
    float scale;

    const bf16* at(const bf16* pool, int64_t slot, int64_t group) const { return pool + (slot * G + group) * d; }
};

// weights[t][k]: not yet divided by their sums, which are returned in `sums`. They have room for whole vectors and a tile.
void weigh(const Problem& m, const bf16* const* x, int n, const int64_t* slots, int64_t length, int64_t group,
           std::vector<float>* weights, float* sums) {
    for (int64_t k = 0; k < length; k += TILE) {
        const bf16* w[TILE];
        for (int o = 0; o < TILE; ++o) w[o] = m.at(m.keys, slots[std::min(k + o, length - 1)], group);
        float scores[WIDTH];
        store(scores, tile(n, false, x, w, m.d, 0) * all(m.scale));
        for (int t = 0; t < n; ++t) std::memcpy(weights[t].data() + k, scores + t * TILE, TILE * sizeof(float));
    }
    for (int t = 0; t < n; ++t) {
        float* row = weights[t].data();
        // Whole vectors: what is behind the keys weighs nothing.
        std::fill(row + length, row + (length + WIDTH - 1) / WIDTH * WIDTH, -INFINITY);
        Floats largest = all(row[0]);
        for (int64_t k = 0; k < length; k += WIDTH) largest = larger(largest, load(row + k));
        const Floats most = all(largest_of(largest));
        Floats sum = all(0.0f);
        for (int64_t k = 0; k < length; k += WIDTH) {
            // What is below is 0 all the same, minus infinity too; NaN stays.
            const Floats power = exponential(larger(all(-200.0f), load(row + k) - most));
            store(row + k, power);
            sum = sum + power;
        }
        sums[t] = sum_of(sum);
    }
}

void attend(const Problem& m, int64_t request, int64_t group, std::vector<float>* weights) {
    const int64_t shared = m.H / m.G, length = m.lengths[request];
    const int64_t* slots = m.slots + request * m.slots_stride;
    for (int64_t head = group * shared; head < (group + 1) * shared; head += TILE) {
        const int n = std::min<int64_t>(TILE, (group + 1) * shared - head);
        const bf16* x[TILE];
        for (int t = 0; t < n; ++t) x[t] = m.query + (m.rows[request] * m.H + head + t) * m.d;
        float sums[TILE];
        weigh(m, x, n, slots, length, group, weights, sums);
        for (int64_t first = 0; first < m.d; first += CHUNKS * WIDTH) {
            Floats part[TILE][CHUNKS];
            for (auto& row : part)
                for (auto& sum : row) sum = all(0.0f);
            const int64_t left = m.d - first;
            for (int64_t k = 0; k < length; ++k) {
                const bf16* value = m.at(m.values, slots[k], group) + first;
                Floats numbers[CHUNKS];
                for (int c = 0; c < CHUNKS; ++c) numbers[c] = load(value + c * WIDTH, std::max<int64_t>(left - c * WIDTH, 0));
                for (int t = 0; t < n; ++t) {
                    const Floats weight = all(weights[t][k]);
                    for (int c = 0; c < CHUNKS; ++c) part[t][c] = multiply_add(weight, numbers[c], part[t][c]);
                }
            }
            for (int t = 0; t < n; ++t)
                for (int c = 0; c < CHUNKS; ++c)
                    store(m.out + (request * m.H + head + t) * m.d + first + c * WIDTH, part[t][c] / all(sums[t]),
                          std::max<int64_t>(left - c * WIDTH, 0));
        }
    }
}

}  // namespace

// Tensors as in `Problem`, contiguous but for the slots.
extern "C" void waybill_decode_attention_bf16(const bf16* query, const bf16* keys, const bf16* values, const int64_t* rows,
                                              const int64_t* slots, const int64_t* lengths, bf16* out, int64_t B, int64_t H,
                                              int64_t G, int64_t d, int64_t num_keys, int64_t slots_stride,
                                              float scale, int num_threads) {
    const Problem m{query, keys, values, rows, slots, lengths, out, B, H, G, d, num_keys, slots_stride, scale};
#pragma omp parallel num_threads(num_threads)
    {
        std::vector<float> weights[TILE];
        for (auto& row : weights) row.resize(num_keys + WIDTH);
#pragma omp for schedule(dynamic, 2)
        for (int64_t unit = 0; unit < B * G; ++unit) attend(m, unit % B, unit / B, weights);
    }
}
