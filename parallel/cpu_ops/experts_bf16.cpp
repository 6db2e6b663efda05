// The experts of one rank in bfloat16, for CPUs with AVX512-BF16. Twin of `experts_torch_reference`, which says what is
// computed; every rounding to bfloat16 happens where torch has one. It knows nothing of ranks, torch or Python.
//
// No token is copied. A token's result has the same bits whatever tokens, threads or steps it is computed with: so have its
// dot products, and the sum over its experts goes in the order of their numbers.
//
// Threads own ranges of outputs, never experts: none waits for a busy expert, and no two write the same column.
//
// Legend: T tokens, D hidden, F experts on this rank, K experts per token, I intermediate width on this rank,
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
    float* sums;           // [T, D], zero
    bf16* out;             // [T, D]
    int64_t T, D, F, K, I;
};

__m512 round_to_bf16(__m512 x) { return widen(narrow(x)); }
__m128 round_to_bf16(__m128 x) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32((__m128i)_mm_cvtneps_pbh(x)), 16));
}

__m512 silu(__m512 x) {
    const __m512 negated = _mm512_sub_ps(_mm512_setzero_ps(), x);
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(negated)));
}

// The same for four consecutive rows of w.
__m512 tile_of_rows(int num_tokens, bool is_first, const bf16* const* x, const bf16* w, int64_t width) {
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
            const __m512 g = round_to_bf16(tile_of_rows(n, is_first, x, gate + i * m.D, m.D));
            const __m512 u = round_to_bf16(tile_of_rows(n, is_first, x, up + i * m.D, m.D));
            alignas(32) bf16 values[TILE * TILE];
            _mm256_store_si256((__m256i*)values, narrow(_mm512_mul_ps(round_to_bf16(silu(g)), u)));
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
        for (int t = 0; t < n; ++t) x[t] = m.activated + (p + t) * m.I;
        for (int64_t d = columns.begin; d < columns.end; d += TILE) {
            alignas(64) float values[TILE * TILE];
            _mm512_store_ps(values, round_to_bf16(tile_of_rows(n, is_first, x, m.down + (e * m.D + d) * m.I, m.I)));
            for (int t = 0; t < n; ++t) {
                const int64_t choice = groups.choice[p + t];
                const __m128 weight = _mm_set1_ps(m.weights[choice]);
                float* sum = m.sums + choice / m.K * m.D + d;
                const __m128 value = round_to_bf16(_mm_mul_ps(_mm_load_ps(values + t * TILE), weight));
                _mm_storeu_ps(sum, _mm_add_ps(_mm_loadu_ps(sum), value));
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

// Tensors as in `Problem`, all contiguous. D and I are multiples of 32.
extern "C" void waybill_experts_bf16(const bf16* hidden, const int64_t* ids, const float* weights, const bf16* gate_up,
                                     const bf16* down, bf16* activated, float* sums, bf16* out, int64_t T, int64_t D,
                                     int64_t F, int64_t K, int64_t I, int num_threads) {
    const Problem m{hidden, ids, weights, gate_up, down, activated, sums, out, T, D, F, K, I};
    const Groups groups(m);
#pragma omp parallel num_threads(num_threads)
    {
        for_each_block(m, own_part(I, LANES), [&](int64_t e, Range columns) { activate(m, groups, e, columns); });
#pragma omp barrier
        const Range own = own_part(D, LANES);
        for_each_block(m, own, [&](int64_t e, Range columns) { project(m, groups, e, columns); });
        for (int64_t t = 0; t < T; ++t)
            for (int64_t d = own.begin; d < own.end; d += 16)
                _mm256_storeu_si256((__m256i*)(out + t * D + d), narrow(_mm512_loadu_ps(sums + t * D + d)));
    }
}
