// The product of rows with a matrix in bfloat16. Twin of `torch.nn.functional.linear`; sums and bias are in float32, rounded
// once. It knows nothing of torch or Python.
//
// Threads own ranges of outputs: every weight is read by one thread, one row after the other; with tiles, which pack tokens,
// once for each `CHUNK` of these.
//
// The sum of a row-parallel layer goes in parts of the columns, each complete before it is added to others, as a tree
// (`sum_of_terms`): ranks that share the columns hold branches of it, whose results stay in float32. So one rank, two and
// four give the same bits.
//
// Legend: T tokens, R rows (outputs) and C columns (inputs) of the matrix, P parts of the columns.

#include "amx_tiles.h"
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

void multiply(const Problem& m) {
    const Range own = own_part(m.R, TILE);
    for (int64_t begin = own.begin; begin < own.end; begin += BLOCK)
        for (int64_t t = 0; t < m.T; t += TILE)
            for (int64_t o = begin; o < std::min(begin + BLOCK, own.end); o += TILE)
                multiply(m, t, std::min<int64_t>(TILE, m.T - t), o);
}

#if defined(__AMX_BF16__)

constexpr int OUTPUTS = 2 * SIDE;  // of two tiles
constexpr int64_t CHUNK = 512;     // tokens whose panels stay in a cache while all weights pass

// What all ranks know: they share rows of the matrix, or have as many parts together.
bool fits_tiles(const Problem& m) { return m.C / m.P % LANES == 0; }

// The last outputs from `first` on, fewer than 32, and rows of zeros.
WeightTiles with_zeros(const Problem& m, int64_t first, uint32_t* memory) {
    bf16* rows = (bf16*)memory;
    std::fill(rows, rows + OUTPUTS * m.C, 0);
    for (int64_t r = first; r < m.R; ++r)
        std::memcpy(rows + (r - first) * m.C, m.weight + r * m.weight_stride, m.C * sizeof(bf16));
    return {{rows, rows + SIDE * m.C}, m.C, 0};
}

// sums[p][i] of tiles of outputs i, from `first` on, and panels p: the parts of all added up, and the bias, which is the first
// part's. They have room for all parts.
void multiply(const Problem& m, const WeightTiles& weights, int64_t first, const uint32_t* x, int num_panels, Sums (*sums)[2]) {
    const int64_t width = m.C / m.P;
    for (int64_t part = 0; part < m.P; ++part)
        multiply_tiles(weights, part * width, width, x + part * width / 2 * SIDE, m.C / 2 * SIDE, num_panels,
                       sums + part * MAX_PANELS);
    if (m.P == 1 && m.bias == nullptr) return;
    for (int p = 0; p < num_panels; ++p)
        for (int i = 0; i < 2; ++i)
            for (int row = 0; row < SIDE; ++row) {
                const int64_t output = first + i * SIDE + row;
                store(sums[p][i][row], sum_of_terms(0, m.P, [&](int64_t part) {
                    const Floats sum = load(sums[part * MAX_PANELS + p][i][row]);
                    return m.bias == nullptr || part > 0 || output >= m.R ? sum : sum + all(as_float(m.bias[output]));
                }));
            }
}

// Of two tiles: outputs from `first` on, tokens from `token` on up to `end`.
void put(const Problem& m, const Sums (&sums)[2], int64_t first, int64_t token, int64_t end) {
    Floats values[2][SIDE];
    for (int i = 0; i < 2; ++i)
        for (int o = 0; o < SIDE; ++o) values[i][o] = load(sums[i][o]);
    const int64_t num_outputs = std::min<int64_t>(OUTPUTS, m.R - first), num_tokens = std::min<int64_t>(SIDE, end - token);
    if (m.partial == nullptr) {
        __m512i rows[SIDE];
        rounded_rows(values, rows);
        const __mmask32 is_there = num_outputs == OUTPUTS ? ~__mmask32(0) : (__mmask32(1) << num_outputs) - 1;
        for (int64_t t = 0; t < num_tokens; ++t) _mm512_mask_storeu_epi16(m.out + (token + t) * m.R + first, is_there, rows[t]);
        return;
    }
    for (int i = 0; i < 2; ++i) {
        transpose(values[i]);
        for (int64_t t = 0; t < num_tokens; ++t)
            store(m.partial + (token + t) * m.R + first + i * SIDE, values[i][t], std::max<int64_t>(num_outputs - i * SIDE, 0));
    }
}

// By all threads together.
void multiply_by_tiles(const Problem& m, uint32_t* panels) {
    const Tiles tiles;
    const Range own = own_part(m.R, OUTPUTS);
    const int64_t panel_pairs = m.C / 2 * SIDE;
    static thread_local ThreadMemory scratch, scratch_of_sums;
    Sums(*sums)[2] = (Sums(*)[2])scratch_of_sums.of(m.P * MAX_PANELS * 2 * SIDE * SIDE);
    for (int64_t begin = 0; begin < m.T; begin += CHUNK) {
        const int64_t end = std::min(begin + CHUNK, m.T), num_panels = (end - begin + SIDE - 1) / SIDE;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < num_panels; ++p) {
            const bf16* rows[SIDE];
            const int64_t token = begin + p * SIDE, num_rows = std::min<int64_t>(SIDE, end - token);
            for (int64_t i = 0; i < num_rows; ++i) rows[i] = m.x + (token + i) * m.x_stride;
            pack_rows(rows, num_rows, m.C, panels + p * panel_pairs);
        }
        for (int64_t first = own.begin; first < own.end; first += OUTPUTS) {
            const bf16* rows = m.weight + first * m.weight_stride;
            WeightTiles weights{{rows, rows + SIDE * m.weight_stride}, m.weight_stride, OUTPUTS * m.weight_stride};
            if (first + OUTPUTS > m.R) weights = with_zeros(m, first, scratch.of(OUTPUTS * m.C / 2));
            for (int64_t p = 0; p < num_panels; p += MAX_PANELS) {
                const int num = std::min<int64_t>(MAX_PANELS, num_panels - p);
                multiply(m, weights, first, panels + p * panel_pairs, num, sums);
                for (int j = 0; j < num; ++j) put(m, sums[j], first, begin + (p + j) * SIDE, end);
            }
        }
#pragma omp barrier
    }
}

#endif

}  // namespace

// Tensors as in `Problem`. P is a power of two and divides C.
extern "C" void waybill_linear_bf16(const bf16* x, const bf16* weight, const bf16* bias, bf16* out, float* partial, int64_t T,
                                    int64_t R, int64_t C, int64_t P, int64_t x_stride, int64_t weight_stride,
                                    int num_threads) {
    const Problem m{x, weight, bias, out, partial, T, R, C, P, x_stride, weight_stride};
#if defined(__AMX_BF16__)
    if (fits_tiles(m)) {
        static thread_local ThreadMemory scratch;
        uint32_t* panels = scratch.of((std::min(T, CHUNK) + SIDE - 1) / SIDE * SIDE * C / 2);
#pragma omp parallel num_threads(num_threads)
        multiply_by_tiles(m, panels);
        return;
    }
#endif
#pragma omp parallel num_threads(num_threads)
    multiply(m);
}
