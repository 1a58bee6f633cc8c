// Which keys a tile of queries reads, and where they lie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpp/gemm.h"
#include "cpp/parallel.h"
#include "cpp/tensor.h"

namespace bmojo {

constexpr int64_t kQueries = 32;  // of a tile: the columns of its scores
constexpr int64_t kKeys = 128;    // of a block: the rows of its scores

// Queries [start, start + count) of a chunk.
struct Tile {
    int64_t chunk, start, count;
};

// Consecutive keys of one set, as a tile reads them. Columns are queries, counted from the tile's first.
template <typename T>
struct Keys {
    enum Set { kWindow, kFading, kSlots } set;
    const T *k, *v;  // of the first key
    int64_t k_row, v_row;
    int64_t count;
    int64_t first;               // position of the first key; for slots 0
    int64_t column, step, span;  // key i is read by `span` columns from column + i * step on
    const int64_t* docs;         // document of the first key; null if there is one document only
    int64_t docs_step;

    Matrix<T> keys_from(int64_t i) const { return {k + i * k_row, k_row, 1}; }
    Matrix<T> values_from(int64_t i) const { return {v + i * v_row, v_row, 1}; }
};

// The arguments of a call: see kernels.memory_attention. Positions count from the first query's.
template <typename T>
struct Problem {
    Tensor<T> q_bthp, k_bshp, v_bshp, fading_k_bshp, fading_v_bshp, far_q_bthp, slot_k_bshp, slot_v_bshp;
    Tensor<int64_t> index_bjm, docs_bt;
    int64_t window_size, chunk_size, num_past;

    int64_t batch() const { return q_bthp.size[0]; }
    int64_t queries() const { return q_bthp.size[1]; }
    int64_t heads() const { return q_bthp.size[2]; }
    int64_t channels() const { return q_bthp.size[3]; }
    int64_t group() const { return heads() / k_bshp.size[2]; }
    int64_t slots() const { return index_bjm ? index_bjm.size[2] : 0; }
    T scale() const { return T(1) / std::sqrt(T(channels())); }
    T score_scale() const { return scale() * T(1.4426950408889634); }  // 1 / ln 2

    // Tiles from query `begin` on, up to `end`. None crosses a chunk boundary.
    std::vector<Tile> tiles(int64_t begin, int64_t end) const {
        std::vector<Tile> found;
        const int64_t chunk_size = index_bjm ? this->chunk_size : queries();
        for (int64_t start = begin; start < end;) {
            const int64_t chunk = start / chunk_size;
            const int64_t stop = std::min({start + kQueries, (chunk + 1) * chunk_size, end});
            found.push_back({chunk, start, stop - start});
            start = stop;
        }
        return found;
    }

    // The positions from `oldest` to `newest` that there are rows of x for, as keys that `window_size` queries read
    // from `age` positions later on.
    Keys<T> near(typename Keys<T>::Set set, const Tensor<T>& k, const Tensor<T>& v, int64_t b, int64_t head,
                 const Tile& tile, int64_t age) const {
        const int64_t begin = queries() - age - k.size[1];  // position of row 0
        const int64_t first = std::max({tile.start - age - window_size + 1, begin, -num_past});
        const int64_t last = tile.start + tile.count - 1 - age;
        const T *k_first = k.at(b, first - begin, head), *v_first = v.at(b, first - begin, head);
        const int64_t* docs = docs_bt ? docs_bt.at(b, first) : nullptr;
        return {set, k_first, v_first, k.stride[1], v.stride[1], std::max<int64_t>(0, last - first + 1), first,
                first + age - tile.start, 1, window_size, docs, docs_bt.stride[1]};
    }
};

// The slots of a tile's chunk that hold something, gathered.
template <typename T>
class Slots {
  public:
    Slots(const Problem<T>& problem, int64_t b, int64_t kv_head, const Tile& tile)
        : k_(problem.slots() * problem.channels()), v_(problem.slots() * problem.channels()),
          filled_(problem.slots()) {
        const int64_t p = problem.channels();
        for (int64_t m = 0; m < problem.slots(); ++m) {
            const int64_t row = problem.index_bjm(b, tile.chunk, m);
            if (row < 0) continue;
            std::copy_n(problem.slot_k_bshp.at(b, row, kv_head), p, k_ + count_ * p);
            std::copy_n(problem.slot_v_bshp.at(b, row, kv_head), p, v_ + count_ * p);
            filled_[count_++] = m;
        }
    }

    Keys<T> keys(const Problem<T>& problem, int64_t b, const Tile& tile) const {
        const int64_t p = problem.channels();
        const Tensor<int64_t>& docs = problem.docs_bt;
        const int64_t* of_chunk = docs ? docs.at(b, tile.chunk * problem.chunk_size) : nullptr;
        return {Keys<T>::kSlots, k_, v_, p, p, count_, 0, 0, 0, tile.count, of_chunk, 0};
    }

    // Which slot the i-th gathered one is.
    int64_t slot(int64_t i) const { return filled_[i]; }

  private:
    Scratch<T> k_, v_;
    Scratch<int64_t> filled_;
    int64_t count_ = 0;
};

// Scores [key, column] of keys first, first + 1, ... become -inf where the column's query must not read them.
template <typename T>
inline void mask(const Keys<T>& keys, int64_t first, int64_t count, const Tile& tile, const int64_t* query_docs,
                 int64_t query_docs_step, int64_t columns, T* scores) {
    for (int64_t i = 0; i < count; ++i, scores += kQueries) {
        const int64_t from = keys.column + (first + i) * keys.step;
        const int64_t begin = std::clamp<int64_t>(from, 0, tile.count);
        const int64_t end = std::clamp<int64_t>(from + keys.span, begin, tile.count);
        std::fill(scores, scores + begin, kMinusInfinity<T>);
        std::fill(scores + end, scores + columns, kMinusInfinity<T>);
        if (keys.docs == nullptr) continue;
        const int64_t doc = keys.docs[(first + i) * keys.docs_step];
        for (int64_t c = begin; c < end; ++c) {
            if (query_docs[c * query_docs_step] != doc) scores[c] = kMinusInfinity<T>;
        }
    }
}

}  // namespace bmojo
