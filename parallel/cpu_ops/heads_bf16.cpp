// Products of each head's rows with a matrix of its own, in bfloat16: queries into the space of latents, and weighted sums of
// latents into that of values. Twin of `torch.bmm`; sums are in float32, rounded once. It knows nothing of torch or Python.
//
// A row has the same bits whatever rows and threads it is computed with: each sum goes in one order, of the matrix's rows from the
// first on, or that of `dot_products.h`.
//
// Legend: T tokens, H heads, R rows and C columns of a head's matrix.

#include "dot_products.h"

using namespace waybill;

namespace {

struct Problem {
    const bf16* x;       // [T, H, R] (absorb) or [T, H, C] (extract): tokens x_token and heads x_head apart
    const bf16* matrix;  // [H, R, C]: heads m_head and rows m_row apart
    bf16* out;           // [T, H, C] or [T, H, R]
    int64_t T, H, R, C, x_token, x_head, m_head, m_row;
};

// Vectors of a tile's row: as many as there are registers for.
#if defined(__AVX512F__)
constexpr int AT_ONCE = 4;
#else
constexpr int AT_ONCE = 1;
#endif

// Columns first .. first + C * WIDTH of N tokens from `token` on, of head h.
template <int N, int C>
void absorb(const Problem& m, int64_t h, int64_t token, int64_t first) {
    Floats sums[N][C];
    for (auto& row : sums)
        for (auto& sum : row) sum = all(0.0f);
    const bf16 *x = m.x + token * m.x_token + h * m.x_head, *matrix = m.matrix + h * m.m_head + first;
    for (int64_t r = 0; r < m.R; ++r) {
        Floats row[C];
        for (int c = 0; c < C; ++c) row[c] = load(matrix + r * m.m_row + c * WIDTH, m.C - first - c * WIDTH);
        for (int t = 0; t < N; ++t) {
            const uint32_t bits = uint32_t(x[t * m.x_token + r]) << 16;
            float number;
            std::memcpy(&number, &bits, sizeof number);
            for (int c = 0; c < C; ++c) sums[t][c] = multiply_add(all(number), row[c], sums[t][c]);
        }
    }
    for (int t = 0; t < N; ++t)
        for (int c = 0; c < C; ++c)
            store(m.out + ((token + t) * m.H + h) * m.C + first + c * WIDTH, sums[t][c], m.C - first - c * WIDTH);
}

template <int C>
void absorb(const Problem& m, int64_t h, int64_t first) {
    int64_t token = 0;
    for (; token + TILE <= m.T; token += TILE) absorb<TILE, C>(m, h, token, first);
    switch (m.T - token) {
        case 1: return absorb<1, C>(m, h, token, first);
        case 2: return absorb<2, C>(m, h, token, first);
        case 3: return absorb<3, C>(m, h, token, first);
    }
}

// Outputs first .. first + 4 of head h, of all tokens.
void extract(const Problem& m, int64_t h, int64_t first) {
    const int num_outputs = std::min<int64_t>(TILE, m.R - first);
    const bf16 *x[TILE], *w[TILE];
    // A tile at the end repeats the last row; what it gives is dropped.
    for (int o = 0; o < TILE; ++o) w[o] = m.matrix + h * m.m_head + (first + std::min(o, num_outputs - 1)) * m.m_row;
    for (int64_t token = 0; token < m.T; token += TILE) {
        const int num_tokens = std::min<int64_t>(TILE, m.T - token);
        for (int t = 0; t < num_tokens; ++t) x[t] = m.x + (token + t) * m.x_token + h * m.x_head;
        bf16 values[WIDTH];
        store(values, tile(num_tokens, token == 0, x, w, m.C, TILE * m.m_row));
        for (int t = 0; t < num_tokens; ++t)
            std::memcpy(m.out + ((token + t) * m.H + h) * m.R + first, values + t * TILE, num_outputs * sizeof(bf16));
    }
}

}  // namespace

// out[t, h] = x[t, h] matrix[h]
extern "C" void waybill_absorb_bf16(const bf16* x, const bf16* matrix, bf16* out, int64_t T, int64_t H, int64_t R, int64_t C,
                                    int64_t x_token, int64_t x_head, int64_t m_head, int64_t m_row, int num_threads) {
    const Problem m{x, matrix, out, T, H, R, C, x_token, x_head, m_head, m_row};
#pragma omp parallel for collapse(2) num_threads(num_threads)
    for (int64_t h = 0; h < H; ++h)
        for (int64_t first = 0; first < C; first += AT_ONCE * WIDTH)
            if (first + AT_ONCE * WIDTH <= C) absorb<AT_ONCE>(m, h, first);
            else
                for (int64_t c = first; c < C; c += WIDTH) absorb<1>(m, h, c);
}

// out[t, h] = matrix[h] x[t, h]
extern "C" void waybill_extract_bf16(const bf16* x, const bf16* matrix, bf16* out, int64_t T, int64_t H, int64_t R, int64_t C,
                                     int64_t x_token, int64_t x_head, int64_t m_head, int64_t m_row, int num_threads) {
    const Problem m{x, matrix, out, T, H, R, C, x_token, x_head, m_head, m_row};
#pragma omp parallel for collapse(2) num_threads(num_threads)
    for (int64_t h = 0; h < H; ++h)
        for (int64_t first = 0; first < R; first += TILE) extract(m, h, first);
}
