// Products of rows in bfloat16 by AMX, in tiles of 16 outputs x 16 tokens.
//
// Weights are the first factor of a tile product, read as the checkpoint stores them; so nothing of them is packed. Tokens are
// the second, whose pairs of numbers lie beside each other: they are packed into a panel [width / 2, 16] of pairs, zeros for
// tokens that there are not. A sum is made in the order of the steps, and in the processor's order within one: the row's width
// alone decides. So a result has the same bits whatever rows, threads or steps it is computed with.

#pragma once

#if defined(__AMX_BF16__)

#include "dot_products.h"

#include <cstdlib>
#include <memory>

namespace waybill {

constexpr int SIDE = WIDTH;                       // outputs, and tokens, of a tile
constexpr int64_t STEP_PAIRS = LANES / 2 * SIDE;  // of a panel, for LANES numbers of its rows

// Compilers do not know all that loads of tiles, and of their configuration, read: what was written to `memory`, and to whatever
// else somebody has an address of, is there from here on.
inline void finish_writes(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

// Eight tiles of 16 rows of 64 bytes, for as long as this lives. Then what the thread had before: libraries that use tiles, too,
// may remember how they left them.
class Tiles {
   public:
    Tiles() {
        _tile_storeconfig(before_);
        finish_writes(before_);
        alignas(64) uint8_t config[64] = {1};
        for (int i = 0; i < 8; ++i) {
            config[16 + 2 * i] = 64;
            config[48 + i] = SIDE;
        }
        finish_writes(config);
        _tile_loadconfig(config);
    }
    ~Tiles() {
        finish_writes(before_);
        _tile_loadconfig(before_);
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

   private:
    alignas(64) uint8_t before_[64];
};

// Memory of a thread that stays for its next call, at the border of a cache line.
class ThreadMemory {
   public:
    uint32_t* of(int64_t size) {
        if (size > size_) {
            memory_.reset(static_cast<uint32_t*>(std::aligned_alloc(64, (size * sizeof(uint32_t) + 63) / 64 * 64)));
            size_ = size;
        }
        return memory_.get();
    }

   private:
    struct Free {
        void operator()(uint32_t* memory) const { std::free(memory); }
    };
    std::unique_ptr<uint32_t, Free> memory_;
    int64_t size_ = 0;
};

// Rows and columns of 16 x 16 numbers of 32 bits.
__attribute__((always_inline)) inline void transpose(__m512i (&rows)[SIDE]) {
    __m512i other[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Row i + j has column 4 q + j of rows i .. i + 3 in its quarter q.
    for (int i = 0; i < SIDE; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        other[j] = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88);
        other[4 + j] = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xdd);
        other[8 + j] = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88);
        other[12 + j] = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; ++j) {
        rows[j] = _mm512_shuffle_i32x4(other[j], other[8 + j], 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(other[4 + j], other[12 + j], 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(other[j], other[8 + j], 0xdd);
        rows[12 + j] = _mm512_shuffle_i32x4(other[4 + j], other[12 + j], 0xdd);
    }
}

__attribute__((always_inline)) inline void transpose(Floats (&rows)[SIDE]) {
    __m512i bits[SIDE];
    for (int i = 0; i < SIDE; ++i) bits[i] = _mm512_castps_si512(rows[i].v);
    transpose(bits);
    for (int i = 0; i < SIDE; ++i) rows[i].v = _mm512_castsi512_ps(bits[i]);
}

// Up to 16 rows into a panel; `width` is a multiple of LANES.
inline void pack_rows(const bf16* const* rows, int64_t num_rows, int64_t width, uint32_t* panel) {
    for (int64_t k = 0; k < width; k += LANES) {
        __m512i pairs[SIDE];
        for (int i = 0; i < SIDE; ++i) pairs[i] = i < num_rows ? _mm512_loadu_si512(rows[i] + k) : _mm512_setzero_si512();
        transpose(pairs);
        for (int i = 0; i < SIDE; ++i) _mm512_store_si512(panel + k / 2 * SIDE + i * SIDE, pairs[i]);
    }
}

// Two rows of numbers, rounded, as the row of a panel that has their pairs.
inline __m512i pairs_of(Floats even, Floats odd) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(even)), high = _mm512_cvtepu16_epi32(narrow(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Two tiles of sums of outputs and tokens, rounded: of every token its 32 outputs.
inline void rounded_rows(const Floats (&sums)[2][SIDE], __m512i (&rows)[SIDE]) {
    for (int i = 0; i < 2; ++i)
        for (int o = 0; o < SIDE; o += 2) rows[(i * SIDE + o) / 2] = pairs_of(sums[i][o], sums[i][o + 1]);
    transpose(rows);
}

using Sums = float[SIDE][SIDE];  // of outputs and tokens

constexpr int MAX_PANELS = 16;   // whose sums stay in a cache
constexpr int64_t BLOCK_WIDTH = 256;  // of weights that stay in the first cache level while several panels pass
// Longer rows are read by the processor ahead of their use; while shorter ones are multiplied the next tiles' are asked for.
constexpr int64_t SHORT_ROW = 1024;

// 2 x 16 rows of weights, `first` of each 16, that are `row_length` apart; the next to be read are `ahead` of them.
struct WeightTiles {
    const bf16* first[2];
    int64_t row_length, ahead;
};

// The next tiles' memory in its own order, `lines` of 64 bytes of either at a time.
struct Prefetch {
    const bf16* at[2];
    int lines;

    void next() {
        for (int i = 0; i < lines; ++i, at[0] += LANES, at[1] += LANES) {
            _mm_prefetch((const char*)at[0], _MM_HINT_T1);
            _mm_prefetch((const char*)at[1], _MM_HINT_T1);
        }
    }
};

// Steps of one or two panels x with tiles of weights.
template <int NUM_X>
void multiply_steps(const bf16* const (&w)[2], int64_t row_length, const uint32_t* const (&x)[2], int64_t num_steps,
                    bool is_begin, Prefetch& prefetch, Sums (*sums)[2]) {
    const int64_t row_bytes = row_length * sizeof(bf16);
    finish_writes(w[0]);
    if (is_begin) {
        _tile_zero(0);
        _tile_zero(2);
        if constexpr (NUM_X == 2) {
            _tile_zero(1);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums[0][0], 64);
        _tile_loadd(2, sums[0][1], 64);
        if constexpr (NUM_X == 2) {
            _tile_loadd(1, sums[1][0], 64);
            _tile_loadd(3, sums[1][1], 64);
        }
    }
    for (int64_t i = 0; i < num_steps; ++i) {
        prefetch.next();
        _tile_loadd(4, w[0] + i * LANES, row_bytes);
        _tile_loadd(6, x[0] + i * STEP_PAIRS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, w[1] + i * LANES, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (NUM_X == 2) {
            _tile_loadd(7, x[1] + i * STEP_PAIRS, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(2, sums[0][1], 64);
    if constexpr (NUM_X == 2) {
        _tile_stored(1, sums[1][0], 64);
        _tile_stored(3, sums[1][1], 64);
    }
}

// The same of one panel, one tile of weights after the other: memory is read in fewer places at a time.
inline void multiply_panel(const bf16* const (&w)[2], int64_t row_length, const uint32_t* x, int64_t num_steps,
                           Sums (&sums)[2]) {
    finish_writes(w[0]);
    for (int tile = 0; tile < 2; ++tile) {
        _tile_zero(0);
        for (int64_t i = 0; i < num_steps; ++i) {
            _tile_loadd(4, w[tile] + i * LANES, row_length * sizeof(bf16));
            _tile_loadd(6, x + i * STEP_PAIRS, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, sums[tile], 64);
    }
}

// sums[p][i] = columns [begin, begin + width) of tile i of the weights, times those of panel p of up to `MAX_PANELS`, which are
// `panel_pairs` apart from `x` on.
inline void multiply_tiles(const WeightTiles& w, int64_t begin, int64_t width, const uint32_t* x, int64_t panel_pairs,
                           int num_panels, Sums (*sums)[2]) {
    const bf16* const first[2] = {w.first[0] + begin, w.first[1] + begin};
    if (num_panels == 1) return multiply_panel(first, w.row_length, x, width / LANES, sums[0]);
    // Lines of a tile: as many as its rows have steps, 16 times.
    const int64_t num_turns = (num_panels + 1) / 2, ahead = w.ahead + begin * SIDE;
    const int lines = w.row_length <= SHORT_ROW ? (SIDE + num_turns - 1) / num_turns : 0;
    Prefetch prefetch{{w.first[0] + ahead, w.first[1] + ahead}, lines};
    const int64_t block = num_panels > 2 ? BLOCK_WIDTH : width;
    for (int64_t k = 0; k < width; k += block) {
        const int64_t num_steps = std::min(block, width - k) / LANES;
        const bf16* const tiles[2] = {first[0] + k, first[1] + k};
        for (int p = 0; p < num_panels; p += 2) {
            const uint32_t* panels[2] = {x + p * panel_pairs + k / 2 * SIDE, x + (p + 1) * panel_pairs + k / 2 * SIDE};
            if (p + 1 < num_panels)
                multiply_steps<2>(tiles, w.row_length, panels, num_steps, k == 0, prefetch, sums + p);
            else multiply_steps<1>(tiles, w.row_length, panels, num_steps, k == 0, prefetch, sums + p);
        }
    }
}

}  // namespace waybill

#endif
