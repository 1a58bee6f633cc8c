// Memory attention on CPU: one softmax over window, fading and eidetic keys, a tile of queries at a time.
//
// Scores lie transposed, [key, query]: queries are the columns of every product and the lanes of every vector, so that
// keys and values are read where they lie and the softmax needs no sums across lanes. They are in units of ln 2, because
// 2^x costs less than e^x. README.md has the derivation.

#include <cmath>

#include "cpp/transpose.h"
#include "memory_attention/cpp_tiles.h"

namespace bmojo {
namespace {

// rows [count, p] -> [p, kQueries], scaled; columns beyond `count` are 0.
template <typename T>
void transpose_rows(const T* rows, int64_t row_stride, int64_t count, int64_t p, T scale, T* columns) {
    transpose_scaled(count, p, rows, row_stride, scale, columns, kQueries);
    for (int64_t i = 0; i < p && count < kQueries; ++i) std::fill_n(columns + i * kQueries + count, kQueries - count, T(0));
}

// columns [p, kQueries] -> rows [count, p] from query `start` on, scaled.
template <typename T>
void store_transposed(const T* columns_pc, int64_t count, int64_t p, T scale, const Tensor<T>& rows, int64_t b,
                      int64_t start, int64_t h) {
    transpose_scaled(p, count, columns_pc, kQueries, scale, rows.at(b, start, h), rows.stride[1]);
}

// rows [count, p] -> [kQueries, width], scaled; the rest is 0.
template <typename T>
void pad_rows(const T* rows, int64_t row_stride, int64_t count, int64_t p, T scale, T* padded, int64_t width) {
    for (int64_t c = 0; c < kQueries; ++c) {
        T* to = padded + c * width;
        const int64_t filled = c < count ? p : 0;
        for (int64_t i = 0; i < filled; ++i) to[i] = scale * rows[c * row_stride + i];
        std::fill(to + filled, to + width, T(0));
    }
}

template <typename T>
void scores_of(const Keys<T>& keys, int64_t first, int64_t count, const Problem<T>& problem, const Tile& tile,
               int64_t b, int64_t columns, const T* q_pc, T* scores) {
    multiply(count, columns, problem.channels(), keys.keys_from(first), q_pc, kQueries, scores, kQueries, false);
    const Tensor<int64_t>& docs = problem.docs_bt;
    mask(keys, first, count, tile, docs ? docs.at(b, tile.start) : nullptr, docs.stride[1], columns, scores);
}

// The softmax over blocks of keys, one after another: what each column has seen so far.
template <typename T>
struct RunningSoftmax {
    alignas(64) T highest[kQueries];
    alignas(64) T sum[kQueries];

    RunningSoftmax() {
        std::fill_n(highest, kQueries, kMinusInfinity<T>);
        std::fill_n(sum, kQueries, T(0));
    }

    // scores -> 2^(scores - highest); what was weighted before shrinks with the new highest.
    void take(T* scores, int64_t count, int64_t columns, T* weighted_pc, int64_t p) {
        for (int64_t c = 0; c < columns; c += kLanes<T>) {
            const Vector<T> before = load(highest + c);
            Vector<T> now = before;
            for (int64_t i = 0; i < count; ++i) now = larger<T>(now, load(scores + i * kQueries + c));
            const Vector<T> shift = now > splat(kMinusInfinity<T>) ? now : splat(T(0));
            Vector<T> total{};
            for (int64_t i = 0; i < count; ++i) {
                T* at = scores + i * kQueries + c;
                const Vector<T> weight = power_of_two(load(at) - shift);
                store(at, weight);
                total += weight;
            }
            const Vector<T> kept = power_of_two(before - shift);
            store(highest + c, now);
            store(sum + c, load(sum + c) * kept + total);
            for (int64_t i = 0; i < p; ++i) {
                T* at = weighted_pc + i * kQueries + c;
                store(at, load(at) * kept);
            }
        }
    }
};

template <typename T>
std::vector<Keys<T>> keys_of(const Problem<T>& problem, const Slots<T>* slots, int64_t b, int64_t h, const Tile& tile) {
    const int64_t kv_head = h / problem.group();
    std::vector<Keys<T>> sets{problem.near(Keys<T>::kWindow, problem.k_bshp, problem.v_bshp, b, kv_head, tile, 0)};
    if (problem.fading_k_bshp)
        sets.push_back(problem.near(Keys<T>::kFading, problem.fading_k_bshp, problem.fading_v_bshp, b, kv_head, tile,
                                    problem.window_size));
    if (slots) sets.push_back(slots->keys(problem, b, tile));
    return sets;
}

template <typename T>
void attend(const Problem<T>& problem, const Tensor<T>& out_bthp, const Tensor<T>& log_sum_bht, int64_t b, int64_t h,
            const Tile& tile) {
    const int64_t p = problem.channels(), columns = round_up<T>(tile.count);
    Scratch<T> near_q_pc(p * kQueries), far_q_pc(p * kQueries), scores(kKeys * kQueries), out_pc(p * kQueries);
    const Tensor<T>& q = problem.q_bthp;
    transpose_rows(q.at(b, tile.start, h), q.stride[1], tile.count, p, problem.score_scale(), +near_q_pc);
    std::fill_n(+out_pc, p * kQueries, T(0));
    RunningSoftmax<T> softmax;
    const Slots<T> slots(problem, b, h / problem.group(), tile);
    for (const Keys<T>& keys : keys_of(problem, &slots, b, h, tile)) {
        T* q_pc = near_q_pc;
        if (keys.set == Keys<T>::kSlots && keys.count) {
            const Tensor<T>& far_q = problem.far_q_bthp;
            transpose_rows(far_q.at(b, tile.start, h), far_q.stride[1], tile.count, p, problem.score_scale(), +far_q_pc);
            q_pc = far_q_pc;
        }
        for (int64_t first = 0; first < keys.count; first += kKeys) {
            const int64_t count = std::min(kKeys, keys.count - first);
            scores_of(keys, first, count, problem, tile, b, columns, q_pc, +scores);
            softmax.take(scores, count, columns, out_pc, p);
            multiply(p, columns, count, keys.values_from(first).transposed(), +scores, kQueries, +out_pc, kQueries,
                     true);
        }
    }
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
        const Vector<T> share = splat(T(1)) / load(softmax.sum + c);
        for (int64_t i = 0; i < p; ++i) store(out_pc + i * kQueries + c, load(out_pc + i * kQueries + c) * share);
    }
    store_transposed(+out_pc, tile.count, p, T(1), out_bthp, b, tile.start, h);
    for (int64_t c = 0; c < tile.count; ++c)
        log_sum_bht(b, h, tile.start + c) = softmax.highest[c] + std::log2(softmax.sum[c]);
}

// Where a span of queries adds up the gradients of the keys it reads. Spans have buffers of their own, so that they can
// run at the same time and their sums be added in one order. If nobody else adds to a gradient, it is the buffer.
template <typename T>
struct SpanGradients {
    using Set = typename Keys<T>::Set;

    Tensor<T> near_bhlxrp;   // l: spans, x: (window, fading) x (k, v) flattened with r: rows of the span
    Tensor<T> slots_bhjxmp;  // x: k, v
    Tensor<T> grads_bshp[4];  // of window keys and values, fading keys and values
    int64_t window_size, span, reach, width;  // reach: window_size, or fewer if there are fewer rows
    int64_t queries, group;

    bool in_place() const { return near_bhlxrp.size[2] == 1 && group == 1 && width == grads_bshp[0].size[3]; }
    int64_t age(Set set) const { return set == Keys<T>::kFading ? window_size : 0; }
    int64_t row_size() const { return in_place() ? grads_bshp[0].stride[1] : width; }
    // Position of the first row, and that after the last.
    int64_t begin(int64_t l, Set set) const {
        return in_place() ? end(l, set) - grads_bshp[2 * set].size[1] : l * span - reach + 1 - age(set);
    }
    int64_t end(int64_t l, Set set) const { return (in_place() ? queries : (l + 1) * span) - age(set); }
    // Keys (kind 0) or values (kind 1) of a position.
    T* near(int64_t b, int64_t h, int64_t l, Set set, int kind, int64_t position) const {
        const int64_t row = position - begin(l, set);
        if (in_place()) return grads_bshp[2 * set + kind].at(b, row, h);
        return near_bhlxrp.at(b, h, l, 0) + ((2 * set + kind) * (span + reach - 1) + row) * width;
    }
    // Nothing found yet for positions first .. last - 1 of a set, or for the slots of chunk j.
    void clear_near(int64_t b, int64_t h, int64_t l, Set set, int64_t first, int64_t last) const {
        for (int kind = 0; kind < 2; ++kind) {
            for (int64_t position = first; position < last; ++position)
                std::fill_n(near(b, h, l, set, kind, position), width, T(0));
        }
    }
    void clear_slots(int64_t b, int64_t h, int64_t j) const {
        std::fill_n(slots_bhjxmp.at(b, h, j, 0), slots_bhjxmp.stride[2], T(0));
    }
    T* slots(int64_t b, int64_t h, int64_t j, int kind, int64_t m) const {
        return slots_bhjxmp.at(b, h, j, kind) + m * width;
    }
};

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
    Vector<T> lanes{};
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) lanes += load(a + i) * load(b + i);
    T sum = 0;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += lanes[lane];
    for (; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

// What the backward reads and writes beside the problem.
template <typename T>
struct Cotangents {
    Tensor<T> out_bthp, log_sum_bht, grad_out_bthp, grad_q_bthp, grad_far_q_bthp;
};

// cleared: the positions, of window and fading memory, up to which the span's memory is no longer uninitialised.
template <typename T>
void add_gradients(const Problem<T>& problem, const Cotangents<T>& given, const SpanGradients<T>& into, int64_t b,
                   int64_t h, int64_t l, const Tile& tile, int64_t* cleared) {
    const int64_t p = problem.channels(), width = into.width, columns = round_up<T>(tile.count);
    const int64_t tall = p * kQueries, wide = kQueries * width, block = kKeys * kQueries;
    Scratch<T> q_pc(tall), grad_out_pc(tall), grad_q_pc(tall), q_cp(wide), grad_out_cp(wide);
    Scratch<T> probs(block), grads(block), gathered(kKeys * width);
    alignas(64) T log_sum[kQueries], delta[kQueries];  // delta: sum over p of out * grad_out
    std::fill_n(log_sum, kQueries, T(0));
    std::fill_n(delta, kQueries, T(0));
    const Tensor<T>& grad_out = given.grad_out_bthp;
    for (int64_t c = 0; c < tile.count; ++c) {
        const T *o = given.out_bthp.at(b, tile.start + c, h), *g = grad_out.at(b, tile.start + c, h);
        delta[c] = dot(o, g, p);
        log_sum[c] = given.log_sum_bht(b, h, tile.start + c);
    }
    transpose_rows(grad_out.at(b, tile.start, h), grad_out.stride[1], tile.count, p, T(1), +grad_out_pc);
    pad_rows(grad_out.at(b, tile.start, h), grad_out.stride[1], tile.count, p, T(1), +grad_out_cp, width);

    const auto take_queries = [&](const Tensor<T>& q) {
        transpose_rows(q.at(b, tile.start, h), q.stride[1], tile.count, p, problem.score_scale(), +q_pc);
        pad_rows(q.at(b, tile.start, h), q.stride[1], tile.count, p, problem.scale(), +q_cp, width);
        std::fill_n(+grad_q_pc, tall, T(0));
    };
    const auto read = [&](const Keys<T>& keys, T* grad_k, T* grad_v, int64_t grad_row) {
        for (int64_t first = 0; first < keys.count; first += kKeys) {
            const int64_t count = std::min(kKeys, keys.count - first);
            scores_of(keys, first, count, problem, tile, b, columns, +q_pc, +probs);
            multiply(count, columns, p, keys.values_from(first), +grad_out_pc, kQueries, +grads, kQueries, false);
            for (int64_t i = 0; i < count; ++i) {
                for (int64_t c = 0; c < columns; c += kLanes<T>) {
                    T *prob = probs + i * kQueries + c, *grad = grads + i * kQueries + c;
                    const Vector<T> weight = power_of_two(load(prob) - load(log_sum + c));
                    store(prob, weight);
                    store(grad, weight * (load(grad) - load(delta + c)));
                }
            }
            const Matrix<T> probs_kc{probs, kQueries, 1}, grads_kc{grads, kQueries, 1};
            multiply(count, width, columns, probs_kc, +grad_out_cp, width, grad_v + first * grad_row, grad_row, true);
            multiply(count, width, columns, grads_kc, +q_cp, width, grad_k + first * grad_row, grad_row, true);
            multiply(p, columns, count, keys.keys_from(first).transposed(), +grads, kQueries, +grad_q_pc, kQueries,
                     true);
        }
    };

    take_queries(problem.q_bthp);
    for (const Keys<T>& keys : keys_of<T>(problem, nullptr, b, h, tile)) {
        if (keys.count == 0) continue;
        const int64_t last = keys.first + keys.count;
        into.clear_near(b, h, l, keys.set, cleared[keys.set], last);
        cleared[keys.set] = last;
        read(keys, into.near(b, h, l, keys.set, 0, keys.first), into.near(b, h, l, keys.set, 1, keys.first),
             into.row_size());
    }
    store_transposed(+grad_q_pc, tile.count, p, problem.scale(), given.grad_q_bthp, b, tile.start, h);
    if (!problem.index_bjm) return;

    take_queries(problem.far_q_bthp);
    const Slots<T> slots(problem, b, h / problem.group(), tile);
    const Keys<T> keys = slots.keys(problem, b, tile);
    if (tile.start % problem.chunk_size == 0) into.clear_slots(b, h, tile.chunk);
    Scratch<T> grad_k(keys.count * width), grad_v(keys.count * width);
    std::fill_n(+grad_k, keys.count * width, T(0));
    std::fill_n(+grad_v, keys.count * width, T(0));
    read(keys, grad_k, grad_v, width);
    for (int64_t i = 0; i < keys.count; ++i) {
        T *to_k = into.slots(b, h, tile.chunk, 0, slots.slot(i)), *to_v = into.slots(b, h, tile.chunk, 1, slots.slot(i));
        for (int64_t x = 0; x < width; ++x) to_k[x] += grad_k[i * width + x];
        for (int64_t x = 0; x < width; ++x) to_v[x] += grad_v[i * width + x];
    }
    store_transposed(+grad_q_pc, tile.count, p, problem.scale(), given.grad_far_q_bthp, b, tile.start, h);
}

// Adds up, for the rows of one set, what the spans and the group's query heads found, and writes it.
template <typename T>
void gather_near(const SpanGradients<T>& from, typename Keys<T>::Set set, int kind, int64_t spans, int64_t threads) {
    const Tensor<T>& grad_bshp = from.grads_bshp[2 * set + kind];
    const int64_t kv_heads = grad_bshp.size[2], p = grad_bshp.size[3], rows = grad_bshp.size[1];
    parallel_for(grad_bshp.size[0] * kv_heads, threads, [&](int64_t task) {
        const int64_t b = task / kv_heads, kv_head = task % kv_heads;
        for (int64_t row = 0; row < rows; ++row) {
            T* to = grad_bshp.at(b, row, kv_head);
            std::fill_n(to, p, T(0));
            const int64_t position = from.queries - from.age(set) - rows + row;
            for (int64_t l = 0; l < spans && from.begin(l, set) <= position; ++l) {
                if (position >= from.end(l, set)) continue;
                for (int64_t h = kv_head * from.group; h < (kv_head + 1) * from.group; ++h) {
                    const T* found = from.near(b, h, l, set, kind, position);
                    for (int64_t i = 0; i < p; ++i) to[i] += found[i];
                }
            }
        }
    });
}

// Adds what the slots found to the rows they were gathered from, chunk by chunk; to nothing, if those rows are `fresh`.
template <typename T>
void scatter_slots(const SpanGradients<T>& from, const Tensor<int64_t>& index_bjm, int kind, const Tensor<T>& grad_bshp,
                   bool fresh, int64_t group, int64_t threads) {
    const int64_t kv_heads = grad_bshp.size[2], p = grad_bshp.size[3];
    parallel_for(grad_bshp.size[0] * kv_heads, threads, [&](int64_t task) {
        const int64_t b = task / kv_heads, kv_head = task % kv_heads;
        for (int64_t row = 0; fresh && row < grad_bshp.size[1]; ++row) std::fill_n(grad_bshp.at(b, row, kv_head), p, T(0));
        for (int64_t j = 0; j < index_bjm.size[1]; ++j) {
            for (int64_t m = 0; m < index_bjm.size[2]; ++m) {
                const int64_t row = index_bjm(b, j, m);
                if (row < 0) continue;
                T* to = grad_bshp.at(b, row, kv_head);
                for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
                    const T* found = from.slots(b, h, j, kind, m);
                    for (int64_t i = 0; i < p; ++i) to[i] += found[i];
                }
            }
        }
    });
}

}  // namespace

// Writes out_bthp and, for the backward, log_sum_bht: the binary logarithm of each query's softmax denominator.
template <typename T>
void memory_attention_forward(const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, const Tensor<T>& fading_k,
                              const Tensor<T>& fading_v, const Tensor<T>& far_q, const Tensor<T>& slot_k,
                              const Tensor<T>& slot_v, const Tensor<int64_t>& index_bjm, const Tensor<int64_t>& docs_bt,
                              const Tensor<T>& out_bthp, const Tensor<T>& log_sum_bht, int64_t window_size,
                              int64_t chunk_size, int64_t num_past, int64_t threads) {
    const Problem<T> problem{q,      k,         v,       fading_k,    fading_v,   far_q,   slot_k,
                             slot_v, index_bjm, docs_bt, window_size, chunk_size, num_past};
    const std::vector<Tile> tiles = problem.tiles(0, problem.queries());
    const int64_t num_tiles = tiles.size();
    parallel_for(problem.batch() * problem.heads() * num_tiles, threads, [&](int64_t task) {
        const int64_t row = task / num_tiles;
        attend(problem, out_bthp, log_sum_bht, row / problem.heads(), row % problem.heads(), tiles[task % num_tiles]);
    });
}

// near_bhlxrp and slots_bhjxmp are room for what the spans find, touched if it is needed. grad_slot_v may be grad_v itself.
template <typename T>
void memory_attention_backward(const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, const Tensor<T>& fading_k,
                               const Tensor<T>& fading_v, const Tensor<T>& far_q, const Tensor<T>& slot_k,
                               const Tensor<T>& slot_v, const Tensor<int64_t>& index_bjm,
                               const Tensor<int64_t>& docs_bt, const Tensor<T>& out, const Tensor<T>& log_sum,
                               const Tensor<T>& grad_out, const Tensor<T>& grad_q, const Tensor<T>& grad_k,
                               const Tensor<T>& grad_v, const Tensor<T>& grad_fading_k, const Tensor<T>& grad_fading_v,
                               const Tensor<T>& grad_far_q, const Tensor<T>& grad_slot_k, const Tensor<T>& grad_slot_v,
                               const Tensor<T>& near_bhlxrp, const Tensor<T>& slots_bhjxmp, int64_t window_size,
                               int64_t chunk_size, int64_t num_past, int64_t span, int64_t reach, int64_t threads) {
    const Problem<T> problem{q,      k,         v,       fading_k,    fading_v,   far_q,   slot_k,
                             slot_v, index_bjm, docs_bt, window_size, chunk_size, num_past};
    const Cotangents<T> given{out, log_sum, grad_out, grad_q, grad_far_q};
    const int64_t width = near_bhlxrp.size[4], heads = problem.heads(), spans = near_bhlxrp.size[2];
    const int64_t group = problem.group();
    const SpanGradients<T> found{near_bhlxrp, slots_bhjxmp, {grad_k, grad_v, grad_fading_k, grad_fading_v},
                                 window_size, span,         reach,
                                 width,       problem.queries(), group};
    const int64_t rows = problem.batch() * heads;
    using Set = typename Keys<T>::Set;
    const std::vector<Set> sets = fading_k ? std::vector{Set::kWindow, Set::kFading} : std::vector{Set::kWindow};
    parallel_for(rows * spans, threads, [&](int64_t task) {
        const int64_t l = spans - 1 - task / rows, row = task % rows;  // first spans read fewer keys: they even out the end
        const int64_t b = row / heads, h = row % heads;
        int64_t cleared[] = {found.begin(l, Set::kWindow), found.begin(l, Set::kFading)};
        for (const Tile& tile : problem.tiles(l * span, std::min((l + 1) * span, problem.queries())))
            add_gradients(problem, given, found, b, h, l, tile, cleared);
        for (const Set set : sets) found.clear_near(b, h, l, set, cleared[set], found.end(l, set));
    });

    for (const Set set : sets) {
        for (int kind = 0; kind < 2 && !found.in_place(); ++kind) gather_near<T>(found, set, kind, spans, threads);
    }
    if (index_bjm) {
        scatter_slots<T>(found, index_bjm, 0, grad_slot_k, true, group, threads);
        scatter_slots<T>(found, index_bjm, 1, grad_slot_v, grad_slot_v.data != grad_v.data, group, threads);
    }
}

}  // namespace bmojo

BMOJO_EXPORT(memory_attention_forward)
BMOJO_EXPORT(memory_attention_backward)
