// The product of rows with a matrix in bfloat16. Twin of `torch.nn.functional.linear`; sums and bias are in float32, rounded
// once. It knows nothing of torch or Python.
//
// Threads own ranges of outputs: every weight is read once, by one thread, one row after the other.
//
// The sum of a row-parallel layer goes in parts of the columns, each complete before it is added to others, as a tree
// (`sum_of_terms`): ranks that share the columns hold branches of it, whose results stay in float32. So any number of ranks
// gives the same bits.
//
// Legend: T tokens, R rows (outputs) and C columns (inputs) of the matrix, P parts of the columns.

#include "amx_tiles.h"
#include "dot_products.h"

#include <vector>

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

// Outputs first .. first + 32 of the matrix, zeros for those beyond its end.
struct Weights {
    const bf16* rows;
    int64_t row_length;
    std::vector<bf16> copy;

    Weights(const Problem& m, int64_t first) : rows(m.weight + first * m.weight_stride), row_length(m.weight_stride) {
        if (first + OUTPUTS <= m.R) return;
        copy.resize(OUTPUTS * m.C);
        for (int64_t r = first; r < m.R; ++r)
            std::memcpy(copy.data() + (r - first) * m.C, rows + (r - first) * row_length, m.C * sizeof(bf16));
        rows = copy.data();
        row_length = m.C;
    }
};

// sums[i][j]: tiles of the outputs of `weights`, and of the tokens of panels x.
void multiply(const Problem& m, const Weights& weights, const uint32_t* const (&x)[2], int num_panels, bool is_first,
              Sums (&sums)[2][2]) {
    const int64_t width = m.C / m.P, ahead = is_first && weights.copy.empty() ? OUTPUTS * weights.row_length : 0;
    std::vector<Sums[2][2]> parts(m.P);
    for (int64_t part = 0; part < m.P; ++part) {
        const bf16* first = weights.rows + part * width;
        const int64_t pair = part * width / 2 * SIDE;
        multiply_tiles(num_panels, {first, first + SIDE * weights.row_length}, weights.row_length,
                       {x[0] + pair, x[1] + pair}, width, ahead, parts[part]);
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < num_panels; ++j)
            for (int row = 0; row < SIDE; ++row)
                store(sums[i][j][row], sum_of_terms(0, m.P, [&](int64_t part) { return load(parts[part][i][j][row]); }));
}

// Of a tile: outputs from `first` on, tokens from `token` on up to `end`.
void put(const Problem& m, const Sums& sums, int64_t first, int64_t token, int64_t end) {
    const int64_t num_outputs = std::min<int64_t>(SIDE, m.R - first);
    Floats rows[SIDE];
    for (int o = 0; o < SIDE; ++o) {
        rows[o] = load(sums[o]);
        if (m.bias != nullptr && o < num_outputs) rows[o] = rows[o] + all(as_float(m.bias[first + o]));
    }
    transpose(rows);
    for (int64_t t = token; t < std::min(token + SIDE, end); ++t) {
        if (m.partial != nullptr) store(m.partial + t * m.R + first, rows[t - token], num_outputs);
        else store(m.out + t * m.R + first, rows[t - token], num_outputs);
    }
}

// By all threads together.
void multiply_by_tiles(const Problem& m, uint32_t* panels) {
    const Tiles tiles;
    const Range own = own_part(m.R, OUTPUTS);
    const int64_t panel_pairs = m.C / 2 * SIDE;
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
            const Weights weights(m, first);
            for (int64_t p = 0; p < num_panels; p += 2) {
                const int num = std::min<int64_t>(2, num_panels - p);
                Sums sums[2][2];
                const uint32_t* x = panels + p * panel_pairs;
                multiply(m, weights, {x, x + panel_pairs}, num, begin == 0 && p == 0, sums);
                for (int i = 0; i < 2; ++i)
                    for (int j = 0; j < num; ++j)
                        if (first + i * SIDE < m.R) put(m, sums[i][j], first + i * SIDE, begin + (p + j) * SIDE, end);
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
        static thread_local Scratch scratch;
        uint32_t* panels = scratch.of((std::min(T, CHUNK) + SIDE - 1) / SIDE * SIDE * C / 2);
#pragma omp parallel num_threads(num_threads)
        multiply_by_tiles(m, panels);
        return;
    }
#endif
#pragma omp parallel num_threads(num_threads)
    multiply(m);
}
