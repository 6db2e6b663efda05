// Attention of requests that bring one token each, over keys and values where they lie in the pool, in bfloat16. Twin of
// `decode` in `engine/attention/sdpa.py`. It knows nothing of torch or Python.
//
// Scores, softmax and sums are in float32 and go from a request's first key to its last, so what a request gets depends on
// nothing but itself. Threads own requests and groups of heads; those of one group follow each other, since tokens of a prompt
// read the same keys.
//
// Legend: B requests, H query heads, G kv heads, P = H / G heads that share one, d head width, S slots of the pool.

#include <vector>

#include "dot_products.h"
#include "exponential.h"

using namespace waybill;

namespace {

constexpr int WIDTH = 16;  // numbers of one vector
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

// weights[t][k]: not yet divided by their sums, which are returned in `sums`. A last tile writes beyond the keys.
void weigh(const Problem& m, const bf16* const* x, int n, const int64_t* slots, int64_t length, int64_t group,
           std::vector<float>* weights, float* sums) {
    for (int64_t k = 0; k < length; k += TILE) {
        const bf16* w[TILE];
        for (int o = 0; o < TILE; ++o) w[o] = m.at(m.keys, slots[std::min(k + o, length - 1)], group);
        alignas(64) float scores[TILE * TILE];
        _mm512_store_ps(scores, _mm512_mul_ps(tile(n, false, x, w, m.d, 0), _mm512_set1_ps(m.scale)));
        for (int t = 0; t < n; ++t) std::memcpy(weights[t].data() + k, scores + t * TILE, TILE * sizeof(float));
    }
    for (int t = 0; t < n; ++t) {
        float* all = weights[t].data();
        const auto kept_from = [&](int64_t k) -> __mmask16 { return length - k >= WIDTH ? 0xffff : (1u << (length - k)) - 1; };
        __m512 largest = _mm512_set1_ps(all[0]);
        for (int64_t k = 0; k < length; k += WIDTH)
            largest = _mm512_max_ps(largest, _mm512_mask_loadu_ps(largest, kept_from(k), all + k));
        const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < length; k += WIDTH) {
            const __mmask16 kept = kept_from(k);
            const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(kept, all + k), most);
            // What is below is 0 all the same, minus infinity too; NaN stays.
            const __m512 power = exponential(_mm512_max_ps(_mm512_set1_ps(-200.0f), below));
            _mm512_mask_storeu_ps(all + k, kept, power);
            sum = _mm512_mask_add_ps(sum, kept, sum, power);
        }
        sums[t] = _mm512_reduce_add_ps(sum);
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
            __mmask16 kept[CHUNKS];
            for (int c = 0; c < CHUNKS; ++c) {
                const int64_t left = std::clamp<int64_t>(m.d - first - c * WIDTH, 0, WIDTH);
                kept[c] = (1u << left) - 1;
            }
            __m512 part[TILE][CHUNKS];
            for (auto& row : part)
                for (auto& sum : row) sum = _mm512_setzero_ps();
            for (int64_t k = 0; k < length; ++k) {
                const bf16* value = m.at(m.values, slots[k], group) + first;
                __m512 numbers[CHUNKS];
                for (int c = 0; c < CHUNKS; ++c) numbers[c] = widen(_mm256_maskz_loadu_epi16(kept[c], value + c * WIDTH));
                for (int t = 0; t < n; ++t) {
                    const __m512 weight = _mm512_set1_ps(weights[t][k]);
                    for (int c = 0; c < CHUNKS; ++c) part[t][c] = _mm512_fmadd_ps(weight, numbers[c], part[t][c]);
                }
            }
            for (int t = 0; t < n; ++t)
                for (int c = 0; c < CHUNKS; ++c)
                    _mm256_mask_storeu_epi16(m.out + (request * m.H + head + t) * m.d + first + c * WIDTH, kept[c],
                                             narrow(_mm512_div_ps(part[t][c], _mm512_set1_ps(sums[t]))));
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
        for (auto& row : weights) row.resize(num_keys + TILE);
#pragma omp for schedule(dynamic, 2)
        for (int64_t unit = 0; unit < B * G; ++unit) attend(m, unit % B, unit / B, weights);
    }
}
