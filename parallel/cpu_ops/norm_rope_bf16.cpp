// Of the heads that a layer's product gives, queries and keys are normed (where there are weights) and rotated, and keys and
// values written to their slots, in bfloat16. Twin of `TorchLayerOps.norm_rope_store`, with a rounding to bfloat16 wherever
// torch has one. It knows nothing of torch or Python.
//
// Legend: T tokens, H query heads, G kv heads, d head width, r of it that is turned, S slots of the pool.

#include <cmath>
#include <vector>

#include "vectors.h"

using namespace waybill;

namespace {

struct Problem {
    const bf16* heads;         // [T, H + 2 G, d], tokens `stride` apart
    const bf16* query_weight;  // [d] or null
    const bf16* key_weight;    // [d] or null
    const bf16* cos;           // [T, r]
    const bf16* sin;           // [T, r]
    const int64_t* slots;      // [T]
    bf16* query;               // [T, H, d]
    bf16* keys;                // [S, G, d]
    bf16* values;              // [S, G, d]
    int64_t T, H, G, d, r, stride;
    float eps;
};

// A head's numbers in `wide`, which has room for WIDTH more, as they are or normed.
void read(const Problem& m, const bf16* head, const bf16* weight, float* wide) {
    Floats squares = all(0.0f);
    for (int64_t i = 0; i < m.d; i += WIDTH) {
        const Floats value = load(head + i, m.d - i);
        squares = multiply_add(value, value, squares);
        store(wide + i, value);
    }
    if (weight == nullptr) return;
    const Floats scale = all(1.0f / std::sqrt(sum_of(squares) / float(m.d) + m.eps));
    for (int64_t i = 0; i < m.d; i += WIDTH)
        store(wide + i, rounded(load(weight + i, m.d - i) * rounded(load(wide + i) * scale)));
}

// The first r numbers turned, pairs being (i, i + r / 2), and the others as they are.
void turn(const Problem& m, int64_t token, const float* wide, bf16* out) {
    const int64_t half = m.r / 2;
    const bf16 *cos = m.cos + token * m.r, *sin = m.sin + token * m.r;
    for (int64_t i = 0; i < half; i += WIDTH) {
        const int64_t n = half - i, j = half + i;
        const Floats first = load(wide + i), second = load(wide + j);
        store(out + i, rounded(first * load(cos + i, n)) - rounded(second * load(sin + i, n)), n);
        store(out + j, rounded(second * load(cos + j, n)) + rounded(first * load(sin + j, n)), n);
    }
    for (int64_t i = m.r; i < m.d; i += WIDTH) store(out + i, load(wide + i), m.d - i);
}

void run(const Problem& m, int64_t token, float* wide) {
    const bf16* head = m.heads + token * m.stride;
    for (int64_t h = 0; h < m.H; ++h, head += m.d) {
        read(m, head, m.query_weight, wide);
        turn(m, token, wide, m.query + (token * m.H + h) * m.d);
    }
    const int64_t at = m.slots[token] * m.G * m.d;
    for (int64_t g = 0; g < m.G; ++g, head += m.d) {
        read(m, head, m.key_weight, wide);
        turn(m, token, wide, m.keys + at + g * m.d);
    }
    std::memcpy(m.values + at, head, m.G * m.d * sizeof(bf16));
}

}  // namespace

// Tensors as in `Problem`.
extern "C" void waybill_norm_rope_store_bf16(const bf16* heads, const bf16* query_weight, const bf16* key_weight,
                                             const bf16* cos, const bf16* sin, const int64_t* slots, bf16* query, bf16* keys,
                                             bf16* values, int64_t T, int64_t H, int64_t G, int64_t d, int64_t r,
                                             int64_t stride, float eps, int num_threads) {
    const Problem m{heads, query_weight, key_weight, cos, sin, slots, query, keys, values, T, H, G, d, r, stride, eps};
    // Below this, waking the threads takes longer than the work.
#pragma omp parallel num_threads(num_threads) if (T * H * d > 65536)
    {
        std::vector<float> wide(d + 2 * WIDTH);
#pragma omp for
        for (int64_t token = 0; token < T; ++token) run(m, token, wide.data());
    }
}
