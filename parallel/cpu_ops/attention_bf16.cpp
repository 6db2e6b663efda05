// Causal attention of a step's tokens, over keys and values where they lie in the pages, in bfloat16. Twin of
// `SdpaAttention`'s torch functions, with windows and sinks. It knows nothing of torch or Python.
//
// Keys go by in blocks of KEYS positions from the request's first on, with a running maximum and sum (Milakov & Gimelshein
// 2018; Dao et al. 2022) in float32. So what a token gets depends on its own keys alone: not on the chunk that brings it, on
// what runs beside it, or on what of it the prefix cache had. A key beyond a token's own is never multiplied, since 0 * NaN is
// NaN.
//
// With AMX scores are products of tiles, and so is what a row adds up of a block of which it sees all keys; there its weights are
// rounded to bfloat16. That a row sees all is a matter of its position alone.
//
// Threads own pieces: some rows of one request, with the heads that share a kv head, or with some of them where there would be
// too few pieces. A block's keys and values are prepared once for all of these. Values may be the beginnings of keys: latents.
//
// Legend: T tokens, B requests, H query heads, G kv heads, P = H / G heads that share one, d head width, v width of values, S slots
// of the pool.

#include <cmath>
#include <limits>
#include <vector>

#include "amx_tiles.h"
#include "attention_scores.h"
#include "exponential.h"

using namespace waybill;

namespace {

constexpr int64_t MAX_QUERIES = 256;  // of a piece, or one row's

struct Problem {
    const bf16* query;      // [T, H, d]
    const bf16* keys;       // [S, G, d]
    const bf16* values;     // [S, G, v], heads v_step apart
    const int32_t* pages;   // [B, num_pages]
    const int64_t* firsts;  // [B]: rows of T
    const int64_t* q_lens;  // [B]: rows that a request brings, the last of
    const int64_t* kv_lens; // [B] positions
    const float* sinks;     // [H] or null
    bf16* out;              // [T, H, v]
    int64_t B, H, G, d, v, v_step, num_pages, page_size;
    int64_t window;         // 0: none
    float scale;
};

struct Piece {
    int64_t request, group, begin, end;  // rows [begin, end) of the request's
    int64_t head, num_heads;             // of those that share the kv head
};

// Keys [first, last) that a row sees.
struct Visible {
    int64_t first, last;
};

// Memory of one thread.
struct Scratch {
    const int64_t width, v_width, num_pairs;  // numbers of a row, whole vectors; pairs of a key
    std::vector<bf16> queries, nothing;
    std::vector<float> sums, values, weights, most, total;  // weights of tiles are 16 queries' alone
    std::vector<uint32_t> turned, value_pairs;  // the latter of values at keys 2i and 2i + 1, for tiles

    // Of up to n queries, which a multiple of 16 is.
    Scratch(const Problem& m, int64_t n)
        : width((m.d + WIDTH - 1) / WIDTH * WIDTH), v_width((m.v + WIDTH - 1) / WIDTH * WIDTH), num_pairs((m.d + 1) / 2),
          queries(n * width), nothing(m.d), sums(n * v_width), values(KEYS * v_width), weights(n * KEYS), most(n), total(n),
          turned((num_pairs + 7) / 8 * 8 * KEYS), value_pairs(KEYS / 2 * v_width) {}
};

// Whether scores, and the values of blocks of which a row sees every key, are products of tiles: by the model alone.
bool fits_tiles(const Problem& m) {
#if defined(__AMX_BF16__)
    return m.d % LANES == 0;
#else
    return false;
#endif
}

// function(size, first) for all of n, TILE at a time.
template <class Function>
void in_tiles(int64_t n, Function function) {
    int64_t first = 0;
    for (; first + TILE <= n; first += TILE) function(std::integral_constant<int, TILE>(), first);
    switch (n - first) {
        case 1: return function(std::integral_constant<int, 1>(), first);
        case 2: return function(std::integral_constant<int, 2>(), first);
        case 3: return function(std::integral_constant<int, 3>(), first);
    }
}

class Attention {
    const Problem& m_;
    const Piece& piece_;
    Scratch& own_;
    const int64_t shared_, num_before_, n_;

   public:
    Attention(const Problem& m, const Piece& piece, Scratch& own)
        : m_(m), piece_(piece), own_(own), shared_(piece.num_heads),
          num_before_(m.kv_lens[piece.request] - m.q_lens[piece.request]), n_((piece.end - piece.begin) * shared_) {}

    void run() {
        for (int64_t q = 0; q < n_; ++q) {
            // Behind an odd width is a zero.
            std::copy_n(m_.query + place(q) * m_.d, m_.d, own_.queries.data() + q * own_.width);
            // A sink is a score without a value.
            own_.most[q] = m_.sinks == nullptr ? -std::numeric_limits<float>::infinity() : m_.sinks[head(q)];
            own_.total[q] = m_.sinks == nullptr ? 0.0f : 1.0f;
        }
        std::fill_n(own_.sums.data(), n_ * own_.v_width, 0.0f);
        const int64_t last = visible(n_ - 1).last;
        for (int64_t block = visible(0).first / KEYS * KEYS; block < last; block += KEYS) {
            prepare(block, std::max(block, visible(0).first), std::min(block + KEYS, last));
#if defined(__AMX_BF16__)
            if (fits_tiles(m_)) {
                for (int64_t q = 0; q < n_; q += SIDE) attend_by_tiles(block, q);
                continue;
            }
#endif
            in_tiles(n_, [&](auto size, int64_t q) { attend<size()>(block, q); });
        }
        for (int64_t q = 0; q < n_; ++q)
            for (int64_t i = 0; i < m_.v; i += WIDTH)
                store(m_.out + place(q) * m_.v + i, load(own_.sums.data() + q * own_.v_width + i) / all(own_.total[q]), m_.v - i);
    }

   private:
    int64_t head(int64_t q) const { return piece_.group * (m_.H / m_.G) + piece_.head + q % shared_; }
    // Row of [T * H].
    int64_t place(int64_t q) const { return (m_.firsts[piece_.request] + piece_.begin + q / shared_) * m_.H + head(q); }
    Visible visible(int64_t q) const {
        const int64_t last = num_before_ + piece_.begin + q / shared_ + 1;
        return {m_.window == 0 ? 0 : std::max<int64_t>(0, last - m_.window), last};
    }
    int64_t slot(int64_t position) const {
        const int32_t page = m_.pages[piece_.request * m_.num_pages + position / m_.page_size];
        return page * m_.page_size + position % m_.page_size;
    }

    // Keys [begin, end) of a block, turned, and their values, widened. Of other keys zeros, and nothing.
    void prepare(int64_t block, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
        if (fits_tiles(m_) && end - begin == KEYS) pair_values(block);
#endif
        const bool is_whole = visible(0).last >= block + KEYS && visible(n_ - 1).first <= block;
        const bf16* keys[KEYS];
        std::fill_n(keys, KEYS, own_.nothing.data());
        for (int64_t k = begin; k < end; ++k) {
            const int64_t at = slot(k) * m_.G + piece_.group;
            keys[k - block] = m_.keys + at * m_.d;
            // Tiles have all that they need.
            for (int64_t i = 0; i < m_.v && !(fits_tiles(m_) && is_whole); i += WIDTH)
                store(own_.values.data() + (k - block) * own_.v_width + i, load(m_.values + at * m_.v_step + i, m_.v - i));
        }
        for (int64_t k = 0; k < KEYS; k += 8)
            for (int64_t i = 0; i < own_.num_pairs; i += 8) turn_eight(keys + k, i, m_.d, own_.turned.data() + i * KEYS + k);
    }

#if defined(__AMX_BF16__)
    // Pairs of values at neighbouring keys of a block, [KEYS / 2, v].
    void pair_values(int64_t block) {
        for (int64_t k = 0; k < KEYS; k += 2) {
            const bf16 *even = m_.values + (slot(block + k) * m_.G + piece_.group) * m_.v_step,
                       *odd = m_.values + (slot(block + k + 1) * m_.G + piece_.group) * m_.v_step;
            for (int64_t i = 0; i < m_.v; i += WIDTH)
                _mm512_storeu_si512(own_.value_pairs.data() + k / 2 * own_.v_width + i,
                                    pairs_of(load(even + i, m_.v - i), load(odd + i, m_.v - i)));
        }
    }

    // Up to 16 queries from q on. What a row sees all keys of a block of is a product of tiles, with weights in bfloat16; of other
    // blocks it adds up what it sees by itself, as 0 * NaN is NaN.
    void attend_by_tiles(int64_t block, int64_t q) {
        float *weights = own_.weights.data(), *sums = own_.sums.data() + q * own_.v_width;
        const int n = std::min<int64_t>(SIDE, n_ - q);
        score_by_tiles(own_.queries.data() + q * own_.width, own_.width, own_.turned.data(), m_.d, weights);
        int64_t begin[SIDE] = {}, end[SIDE] = {};
        for (int t = 0; t < n; ++t) {
            const Visible keys = visible(q + t);
            end[t] = std::clamp<int64_t>(keys.last - block, 0, KEYS);
            begin[t] = std::clamp<int64_t>(keys.first - block, 0, end[t]);
        }
        alignas(64) bf16 rounded_weights[SIDE][KEYS] = {};
        weigh_by_tiles(q, n, begin, end, rounded_weights);
        int num_whole = 0;
        for (int t = 0; t < n; ++t) {
            if (end[t] - begin[t] == KEYS) ++num_whole;
            else if (begin[t] < end[t])
                add_values<1>(weights + t * KEYS, own_.values.data(), begin[t], end[t], own_.v_width, sums + t * own_.v_width);
        }
        for (int64_t i = 0; i < own_.v_width && num_whole > 0; i += SIDE) {
            const uint32_t* values = own_.value_pairs.data() + i;
            if (num_whole == SIDE) {
                add_values_by_tiles(rounded_weights, values, own_.v_width, sums + i, sums + i, own_.v_width);
                continue;
            }
            float products[SIDE][SIDE];
            add_values_by_tiles(rounded_weights, values, own_.v_width, sums + i, products[0], SIDE);
            for (int t = 0; t < n; ++t)
                if (end[t] - begin[t] == KEYS) store(sums + t * own_.v_width + i, load(products[t]));
        }
    }

    // As `weigh`, of n queries from q on, each with its keys [begin, end) of the block; where these are all, the weights are
    // rounded ones.
    void weigh_by_tiles(int64_t q, int n, const int64_t* begin, const int64_t* end, bf16 (&rounded_weights)[SIDE][KEYS]) {
        const Floats scale = all(m_.scale), none = all(-std::numeric_limits<float>::infinity());
        Floats most[SIDE], sums[SIDE];
        for (int t = 0; t < SIDE; ++t) {
            float* row = own_.weights.data() + t * KEYS;
            most[t] = none;
            for (int c = 0; c < KEYS; c += WIDTH) {
                Floats scores = load(row + c) * scale;
                if (end[t] - begin[t] < KEYS) scores = only(begin[t] - c, end[t] - c, scores, none);
                store(row + c, scores);
                most[t] = larger(most[t], scores);
            }
        }
        // Lanes are queries from here on.
        const Floats before = load(own_.most.data() + q), now = larger(tree_of(most, larger), before);
        const Floats kept = exponential(before - now);
        alignas(64) float now_of[SIDE], kept_of[SIDE];
        store(now_of, now);
        store(kept_of, kept);
        for (int t = 0; t < SIDE; ++t) {
            float* row = own_.weights.data() + t * KEYS;
            sums[t] = all(0.0f);
            for (int c = 0; c < KEYS && begin[t] < end[t]; c += WIDTH) {
                Floats weights = exponential(load(row + c) - all(now_of[t]));
                if (end[t] - begin[t] == KEYS) store(rounded_weights[t] + c, weights);
                else {
                    weights = only(begin[t] - c, end[t] - c, weights, all(0.0f));
                    store(row + c, weights);
                }
                sums[t] = sums[t] + weights;
            }
            if (begin[t] == end[t] || now_of[t] == own_.most[q + t]) continue;
            float* products = own_.sums.data() + (q + t) * own_.v_width;
            for (int64_t i = 0; i < own_.v_width; i += WIDTH) store(products + i, load(products + i) * all(kept_of[t]));
        }
        alignas(64) float total_of[SIDE];
        store(total_of, load(own_.total.data() + q) * kept + tree_of(sums, [](Floats a, Floats b) { return a + b; }));
        for (int t = 0; t < n; ++t)
            if (begin[t] < end[t]) {
                own_.most[q + t] = now_of[t];
                own_.total[q + t] = total_of[t];
            }
    }

    // Lane t: the lanes of row t, as a tree.
    template <class Join>
    static Floats tree_of(Floats (&rows)[SIDE], Join join) {
        transpose(rows);
        for (int step = SIDE / 2; step > 0; step /= 2)
            for (int i = 0; i < step; ++i) rows[i] = join(rows[i], rows[i + step]);
        return rows[0];
    }
#endif

    // Queries [q, q + N) over the block.
    template <int N>
    void attend(int64_t block, int64_t q) {
        const bf16* queries[N];
        float* weights = own_.weights.data() + q * KEYS;
        for (int t = 0; t < N; ++t) queries[t] = own_.queries.data() + (q + t) * own_.width;
        score<N>(queries, own_.turned.data(), own_.num_pairs, weights);
        int64_t begin[N], end[N];
        for (int t = 0; t < N; ++t) {
            const Visible keys = visible(q + t);
            end[t] = std::clamp<int64_t>(keys.last - block, 0, KEYS);
            begin[t] = std::clamp<int64_t>(keys.first - block, 0, end[t]);
            if (begin[t] < end[t]) weigh(q + t, begin[t], end[t]);
        }
        // What all see, and before and behind it each its own.
        const int64_t first = *std::max_element(begin, begin + N), last = *std::min_element(end, end + N);
        float* sums = own_.sums.data() + q * own_.v_width;
        const auto alone = [&](int t, int64_t from, int64_t to) {
            if (from < to) add_values<1>(weights + t * KEYS, own_.values.data(), from, to, own_.v_width, sums + t * own_.v_width);
        };
        if (first >= last) {
            for (int t = 0; t < N; ++t) alone(t, begin[t], end[t]);
            return;
        }
        for (int t = 0; t < N; ++t) alone(t, begin[t], first);
        add_values<N>(weights, own_.values.data(), first, last, own_.v_width, sums);
        for (int t = 0; t < N; ++t) alone(t, last, end[t]);
    }

    // Scores of the keys [begin, end) become weights, relative to the largest score so far.
    void weigh(int64_t q, int64_t begin, int64_t end) {
        float* row = own_.weights.data() + q * KEYS;
        const Floats scale = all(m_.scale), none = all(-std::numeric_limits<float>::infinity());
        Floats scores[KEYS / WIDTH], most = none;
        for (int c = 0; c < KEYS / WIDTH; ++c) {
            scores[c] = only(begin - c * WIDTH, end - c * WIDTH, load(row + c * WIDTH) * scale, none);
            most = larger(most, scores[c]);
        }
        const float before = own_.most[q], now = std::max(before, largest_of(most));
        Floats weight_sum = all(0.0f);
        for (int c = 0; c < KEYS / WIDTH; ++c) {
            const Floats weights = only(begin - c * WIDTH, end - c * WIDTH, exponential(scores[c] - all(now)), all(0.0f));
            store(row + c * WIDTH, weights);
            weight_sum = weight_sum + weights;
        }
        if (now != before) {
            const Floats kept = exponential(all(before - now));
            own_.total[q] *= sum_of(only(0, 1, kept, all(0.0f)));
            float* sums = own_.sums.data() + q * own_.v_width;
            for (int64_t i = 0; i < own_.v_width; i += WIDTH) store(sums + i, load(sums + i) * kept);
        }
        own_.most[q] = now;
        own_.total[q] += sum_of(weight_sum);
    }
};

}  // namespace

// Tensors as in `Problem`, all but the values contiguous.
extern "C" void waybill_attention_bf16(const bf16* query, const bf16* keys, const bf16* values, const int32_t* pages,
                                       const int64_t* firsts, const int64_t* q_lens, const int64_t* kv_lens,
                                       const float* sinks, bf16* out, int64_t B, int64_t H, int64_t G, int64_t d, int64_t v,
                                       int64_t v_step, int64_t num_pages, int64_t page_size, int64_t window, float scale,
                                       int num_threads) {
    const Problem m{query, keys, values, pages,  firsts,    q_lens,    kv_lens, sinks, out,
                    B,     H,    G,      d,      v,         v_step,    num_pages, page_size, window, scale};
    const int64_t P = H / G, rows = std::max<int64_t>(1, MAX_QUERIES / P);
    int64_t num_pieces = 0;
    for (int64_t b = 0; b < B; ++b) num_pieces += (q_lens[b] + rows - 1) / rows * G;
    // Tiles of heads, so many at a time.
    const int64_t tiles = (P + TILE - 1) / TILE, wanted = std::min(tiles, num_threads / std::max<int64_t>(1, num_pieces));
    const int64_t heads = wanted <= 1 ? P : (tiles + wanted - 1) / wanted * TILE;
    std::vector<Piece> pieces;
    for (int64_t b = 0; b < B; ++b)
        // The last rows see the most, so they come first.
        for (int64_t end = q_lens[b]; end > 0; end -= std::min(rows, end))
            for (int64_t g = 0; g < G; ++g)
                for (int64_t h = 0; h < P; h += heads)
                    pieces.push_back({b, g, std::max<int64_t>(0, end - rows), end, h, std::min(heads, P - h)});
#pragma omp parallel num_threads(num_threads)
    {
        Scratch own(m, (rows * (H / G) + WIDTH - 1) / WIDTH * WIDTH);
#if defined(__AMX_BF16__)
        const Tiles tiles;
#endif
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < pieces.size(); ++i) Attention(m, pieces[i], own).run();
    }
}
