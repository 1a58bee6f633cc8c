// The SSD scan in chunks and its decoding step. README.md has the formulas.
//
// b batch, t and s positions, h heads, p channels a head, g groups, n SSM state, c chunks, q positions of a segment.
// Scratch rows are padded to whole vectors: P and N are p and n so rounded up.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpp/gemm.h"
#include "cpp/parallel.h"
#include "cpp/simd.h"
#include "cpp/tensor.h"
#include "cpp/transpose.h"

namespace bmojo {
namespace {

constexpr int64_t kChunk = BMOJO_SSD_CHUNK;      // positions; what a [q, q] matrix in scratch has as its row
constexpr int64_t kRowBlock = 12;   // of a triangle, which is cut off to the right of each block of rows
constexpr int64_t kStateBlock = 8;  // rows p of a state that one task carries from chunk to chunk
constexpr int64_t kStepElements = 1 << 16;  // of states that one task updates in a decoding step, at least

// Positions of one document in one chunk. `reads`: the document began earlier, so the chunk's incoming state is its.
// `writes`: it is the chunk's last, so the state after the chunk is its.
struct Segment {
    int64_t begin, count;
    bool reads, writes;
};

template <typename T>
struct Scan {
    Tensor<T> x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, initial_bhpn;
    Tensor<int64_t> docs_bt;
    int64_t batch = x_bthp.size[0], positions = x_bthp.size[1], heads = x_bthp.size[2], p = x_bthp.size[3];
    int64_t groups = B_btgn.size[2], n = B_btgn.size[3];
    int64_t heads_per_group = heads / groups, chunks = (positions + kChunk - 1) / kChunk;
    int64_t P = round_up<T>(p), N = round_up<T>(n);

    bool continues(int64_t b, int64_t t) const {
        if (t == 0) return bool(initial_bhpn);
        return !docs_bt || docs_bt(b, t) == docs_bt(b, t - 1);
    }

    // body(segment) for each document's part of chunk c. Everything else works on one document at a time: no sum ever
    // has a term of another.
    template <typename Body>
    void for_each_segment(int64_t b, int64_t c, const Body& body) const {
        const int64_t start = c * kChunk, stop = std::min(positions, start + kChunk);
        for (int64_t begin = start; begin < stop;) {
            int64_t end = begin + 1;
            while (end < stop && continues(b, end)) ++end;
            body(Segment{begin, end - begin, begin == start && continues(b, begin), end == stop});
            begin = end;
        }
    }

    // body(b, c, g) on all threads.
    template <typename Body>
    void for_each_chunk(int64_t threads, const Body& body) const {
        parallel_for(batch * chunks * groups, threads, [&](int64_t task) {
            body(task / groups / chunks, task / groups % chunks, task % groups);
        });
    }

    // Where [b, c, h] begins among arrays of `size`.
    int64_t at(int64_t b, int64_t c, int64_t h, int64_t size) const { return ((b * chunks + c) * heads + h) * size; }

    Matrix<T> rows(const Tensor<T>& tensor, int64_t b, int64_t t, int64_t i) const {
        return {tensor.at(b, t, i), tensor.stride[1], tensor.stride[3]};
    }
};

// Where a row of a triangle ends: beyond the diagonal up to its block's last column, in whole vectors.
template <typename T>
int64_t row_width(int64_t count, int64_t t) {
    return round_up<T>(std::min(count, (t / kRowBlock + 1) * kRowBlock));
}

// out[t, s] = rows t of a times columns s of b, in the lower triangle's blocks.
template <typename T>
void triangle_of_product(int64_t count, int64_t depth, Matrix<T> a, const T* b, T* out) {
    for (int64_t t = 0; t < count; t += kRowBlock)
        multiply(std::min(kRowBlock, count - t), row_width<T>(count, t), depth, a.rows_from(t), b, kChunk,
                 out + t * kChunk, kChunk, false);
}

// out[t] = (+) sum over s <= t of triangle[t, s] rows[s].
template <typename T>
void add_earlier(int64_t count, int64_t columns, const T* triangle, const T* rows, T* out, bool add) {
    for (int64_t t = 0; t < count; t += kRowBlock)
        multiply(std::min(kRowBlock, count - t), columns, std::min(count, t + kRowBlock),
                 {triangle + t * kChunk, kChunk, 1}, rows, columns, out + t * columns, columns, add);
}

// out[s] = (+) sum over t >= s of triangle[t, s] rows[t].
template <typename T>
void add_later(int64_t count, int64_t columns, const T* triangle, const T* rows, T* out, bool add) {
    for (int64_t s = 0; s < count; s += kRowBlock)
        multiply(std::min(kRowBlock, count - s), columns, count - s, {triangle + s * kChunk + s, 1, kChunk},
                 rows + s * columns, columns, out + s * columns, columns, add);
}

// Rows padded with zeros to `padded`: out[i] = in[i] and scaled[i] = scale[i] in[i], if these are wanted.
template <typename T>
void load_rows(int64_t rows, int64_t columns, int64_t padded, Matrix<T> in, T* out, const T* scale = nullptr,
               T* scaled = nullptr) {
    const int64_t whole = columns / kLanes<T> * kLanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        const T* from = in.data + i * in.row;
        for (int64_t j = 0; j < padded; j += kLanes<T>) {
            Vector<T> x = {};
            if (j < whole)
                x = load(from + j);
            else
                std::memcpy(&x, from + j, (columns - j) * sizeof(T));
            if (out) store(out + i * padded + j, x);
            if (scaled) store(scaled + i * padded + j, scale[i] * x);
        }
    }
}

template <typename T>
Vector<T> products(int64_t width, const T* a, const T* b) {
    Vector<T> sum = {};
    for (int64_t j = 0; j < width; j += kLanes<T>) sum += load(a + j) * load(b + j);
    return sum;
}

template <typename T>
Vector<T> lanes() {
    Vector<T> index;
    for (int64_t i = 0; i < kLanes<T>; ++i) index[i] = T(i);
    return index;
}

template <typename T>
T sum_of_lanes(Vector<T> x) {
    T sum = T(0);
    for (int64_t i = 0; i < kLanes<T>; ++i) sum += x[i];
    return sum;
}

// out[i] = the sum of the i-th of `rows` vectors in `parts`, many at a time.
template <typename T>
void sums_of_lanes(int64_t rows, const T* parts, T* out) {
    alignas(kVectorBytes) T by_lane[kLanes<T> * kChunk];
    transpose<T>(rows, kLanes<T>, parts, kLanes<T>, by_lane, kChunk);
    for (int64_t i = 0; i < rows; i += kLanes<T>) {
        Vector<T> sum = {};
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += load(by_lane + lane * kChunk + i);
        store(out + i, sum);
    }
}

// What a head's step sizes say about a segment.
template <typename T>
struct Steps {
    alignas(kVectorBytes) T dt[kChunk], a[kChunk];  // a = dt A
    int64_t count;

    Steps(const Scan<T>& scan, const Segment& segment, int64_t b, int64_t h) : count(segment.count) {
        for (int64_t t = 0; t < count; ++t) {
            dt[t] = scan.dt_bth(b, segment.begin + t, h);
            a[t] = dt[t] * scan.A_h(h);
        }
    }

    // exp(sum of a up to t): what is left at t of the state before the segment.
    void reach(T* out) const {
        T sum = T(0);
        for (int64_t t = 0; t < count; ++t) out[t] = sum += a[t];
        for (int64_t t = 0; t < count; ++t) out[t] = exponential(out[t]);
    }

    T carry() const {
        T sum = T(0);
        for (int64_t t = 0; t < count; ++t) sum += a[t];
        return exponential(sum);
    }

    // exp(sum of a after s): what is left after the segment of what s wrote.
    void to_end(T* out) const {
        T sum = T(0);
        for (int64_t s = count - 1; s >= 0; --s) {
            out[s] = sum;
            sum += a[s];
        }
        for (int64_t s = 0; s < count; ++s) out[s] = exponential(out[s]);
    }

    // [t, s] = exp(sum of a over (s, t]), times scores[t, s] if they are given, and 0 for s > t as far as row_width.
    // Each interval is summed by itself: a difference of two running sums would be inexact, and could exceed 0.
    void decay(const T* scores, T* out) const {
        const Vector<T> lane = lanes<T>();
        for (int64_t s = 0; s < count; s += kLanes<T>) {
            Vector<T> log = {};
            for (int64_t t = s / kRowBlock * kRowBlock; t < count; ++t) {
                log += lane < T(t - s) ? splat(a[t]) : Vector<T>{};
                Vector<T> kept = exponential(log);
                if (scores) kept *= load(scores + t * kChunk + s);
                store(out + t * kChunk + s, lane <= T(t - s) ? kept : Vector<T>{});
            }
        }
    }
};

// The recurrence over chunks, where states_bchpn[c] holds what chunk c adds, and receives the state before it:
//     S <- states[c] + carry[c] S
// `backwards` from the last chunk on, which carries gradients.
template <typename T>
void carry_states(const Scan<T>& scan, const Tensor<T>& first_bhpn, T* states_bchpn, const T* carry_bch,
                  const Tensor<T>& last_bhpn, bool backwards, int64_t threads) {
    const int64_t blocks = (scan.p + kStateBlock - 1) / kStateBlock, N = scan.N;
    parallel_for(scan.batch * scan.heads * blocks, threads, [&](int64_t task) {
        const int64_t b = task / blocks / scan.heads, h = task / blocks % scan.heads;
        const int64_t i = task % blocks * kStateBlock, rows = std::min(kStateBlock, scan.p - i);
        Scratch<T> state(rows * N);
        std::fill_n(static_cast<T*>(state), rows * N, T(0));
        if (first_bhpn)
            for (int64_t k = 0; k < rows; ++k)
                for (int64_t j = 0; j < scan.n; ++j) state[k * N + j] = first_bhpn(b, h, i + k, j);
        for (int64_t step = 0; step < scan.chunks; ++step) {
            const int64_t c = backwards ? scan.chunks - 1 - step : step;
            const T carry = carry_bch[scan.at(b, c, h, 1)];
            T* at = states_bchpn + scan.at(b, c, h, scan.p * N) + i * N;
            for (int64_t j = 0; j < rows * N; j += kLanes<T>) {
                const Vector<T> before = load(state + j), added = load(at + j);
                store(at + j, before);
                store(state + j, carry == T(0) ? added : added + carry * before);
            }
        }
        if (last_bhpn)
            for (int64_t k = 0; k < rows; ++k)
                for (int64_t j = 0; j < scan.n; ++j) last_bhpn(b, h, i + k, j) = state[k * N + j];
    });
}

// What each chunk writes into the state, and how much of the state it leaves.
template <typename T>
void write_states(const Scan<T>& scan, T* states_bchpn, T* carry_bch, int64_t threads) {
    const int64_t p = scan.p, N = scan.N, P = scan.P;
    scan.for_each_chunk(threads, [&](int64_t b, int64_t c, int64_t g) {
        Scratch<T> B(kChunk * N), left(kChunk * P);
        alignas(kVectorBytes) T scale[kChunk];
        scan.for_each_segment(b, c, [&](const Segment& segment) {
            if (!segment.writes) return;
            load_rows<T>(segment.count, scan.n, N, scan.rows(scan.B_btgn, b, segment.begin, g), B);
            for (int64_t h = g * scan.heads_per_group; h < (g + 1) * scan.heads_per_group; ++h) {
                const Steps<T> steps(scan, segment, b, h);
                steps.to_end(scale);
                for (int64_t s = 0; s < segment.count; ++s) scale[s] *= steps.dt[s];
                load_rows<T>(segment.count, p, P, scan.rows(scan.x_bthp, b, segment.begin, h), nullptr, scale, left);
                multiply<T>(p, N, segment.count, Matrix<T>{left, P, 1}.transposed(), B, N,
                            states_bchpn + scan.at(b, c, h, p * N), N, false);
                carry_bch[scan.at(b, c, h, 1)] = segment.reads ? steps.carry() : T(0);
            }
        });
    });
}

template <typename T>
void write_outputs(const Scan<T>& scan, const T* states_bchpn, const Tensor<T>& y_bthp, int64_t threads) {
    const int64_t p = scan.p, n = scan.n, N = scan.N, P = scan.P;
    scan.for_each_chunk(threads, [&](int64_t b, int64_t c, int64_t g) {
        Scratch<T> B(kChunk * N), B_columns(N * kChunk), scores(kChunk * kChunk), mixing(kChunk * kChunk);
        Scratch<T> xdt(kChunk * P), state_columns(N * P), y(kChunk * P), across(kChunk * P);
        alignas(kVectorBytes) T reach[kChunk];
        scan.for_each_segment(b, c, [&](const Segment& segment) {
            const int64_t count = segment.count;
            const Matrix<T> C = scan.rows(scan.C_btgn, b, segment.begin, g);
            load_rows<T>(count, n, N, scan.rows(scan.B_btgn, b, segment.begin, g), B);
            transpose<T>(count, N, B, N, B_columns, kChunk);
            triangle_of_product<T>(count, n, C, B_columns, scores);
            for (int64_t h = g * scan.heads_per_group; h < (g + 1) * scan.heads_per_group; ++h) {
                const Steps<T> steps(scan, segment, b, h);
                const Matrix<T> x = scan.rows(scan.x_bthp, b, segment.begin, h);
                load_rows<T>(count, p, P, x, nullptr, steps.dt, xdt);
                steps.decay(scores, mixing);
                add_earlier<T>(count, P, mixing, xdt, y, false);
                if (segment.reads) {
                    transpose<T>(p, N, states_bchpn + scan.at(b, c, h, p * N), N, state_columns, P);
                    multiply<T>(count, P, n, C, state_columns, P, across, P, false);
                    steps.reach(reach);
                }
                const T D = scan.D_h(h);
                for (int64_t t = 0; t < count; ++t) {
                    T *y_t = y + t * P, *out = y_bthp.at(b, segment.begin + t, h);
                    const T *across_t = across + t * P, *skip = x.data + t * x.row;
                    if (segment.reads)
                        for (int64_t j = 0; j < P; ++j) y_t[j] += reach[t] * across_t[j];
                    for (int64_t j = 0; j < p; ++j) out[j] = y_t[j] + D * skip[j];
                }
            }
        });
    });
}

// The gradient of each chunk's incoming state by the chunk's own outputs, and how much of the state it leaves.
template <typename T>
void read_state_gradients(const Scan<T>& scan, const Tensor<T>& dy_bthp, T* dstates_bchpn, T* carry_bch,
                          int64_t threads) {
    const int64_t p = scan.p, N = scan.N, P = scan.P;
    scan.for_each_chunk(threads, [&](int64_t b, int64_t c, int64_t g) {
        Scratch<T> C(kChunk * N), dy(kChunk * P);
        alignas(kVectorBytes) T reach[kChunk];
        scan.for_each_segment(b, c, [&](const Segment& segment) {
            if (segment.begin != c * kChunk) return;
            if (segment.reads)
                load_rows<T>(segment.count, scan.n, N, scan.rows(scan.C_btgn, b, segment.begin, g), C);
            for (int64_t h = g * scan.heads_per_group; h < (g + 1) * scan.heads_per_group; ++h) {
                T *dstate = dstates_bchpn + scan.at(b, c, h, p * N), *carry = carry_bch + scan.at(b, c, h, 1);
                *carry = T(0);
                if (!segment.reads) {
                    std::fill_n(dstate, p * N, T(0));
                    continue;
                }
                const Steps<T> steps(scan, segment, b, h);
                steps.reach(reach);
                load_rows<T>(segment.count, p, P, scan.rows(dy_bthp, b, segment.begin, h), nullptr, reach, dy);
                multiply<T>(p, N, segment.count, Matrix<T>{dy, P, 1}.transposed(), C, N, dstate, N, false);
                if (segment.writes) *carry = reach[segment.count - 1];
            }
        });
    });
}

// The gradients of a group's segments: scratch, and what is done for each head.
template <typename T>
class SegmentGradients {
  public:
    SegmentGradients(const Scan<T>& scan, const Tensor<T>& dy_bthp) : scan_(scan), dy_bthp_(dy_bthp) {}

    void load_group(const Segment& segment, int64_t b, int64_t g) {
        const int64_t count = segment.count;
        load_rows<T>(count, scan_.n, N, scan_.rows(scan_.B_btgn, b, segment.begin, g), B_);
        load_rows<T>(count, scan_.n, N, scan_.rows(scan_.C_btgn, b, segment.begin, g), C_);
        transpose<T>(count, N, B_, N, columns_, kChunk);
        triangle_of_product<T>(count, scan_.n, {C_, N, 1}, columns_, scores_);
        std::fill_n(static_cast<T*>(dscores_), count * kChunk, T(0));
        std::fill_n(static_cast<T*>(dB_), count * N, T(0));
        std::fill_n(static_cast<T*>(dC_), count * N, T(0));
    }

    // state: before the chunk; dstate: the gradient of the state after it. Adds to dA_dD.
    void add_head(const Segment& segment, int64_t b, int64_t h, const T* state, const T* dstate,
                  const Tensor<T>& dx_bthp, const Tensor<T>& ddt_bth, T* dA_dD) {
        const int64_t count = segment.count, p = scan_.p;
        const Steps<T> steps(scan_, segment, b, h);
        load_rows<T>(count, p, P, scan_.rows(scan_.x_bthp, b, segment.begin, h), x_, steps.dt, xdt_);
        load_rows<T>(count, p, P, scan_.rows(dy_bthp_, b, segment.begin, h), dy_);
        steps.decay(nullptr, decay_);
        transpose<T>(count, P, xdt_, P, columns_, kChunk);
        triangle_of_product<T>(count, p, {dy_, P, 1}, columns_, dmixing_);

        alignas(kVectorBytes) T dlog_end[kChunk] = {}, dlog_reach[kChunk] = {}, to_end[kChunk], da[kChunk], ddt[kChunk];
        std::copy_n(decay_ + (count - 1) * kChunk, count, to_end);
        if (segment.writes) through_write(count, dstate, to_end, dlog_end);
        if (segment.reads) {
            T* reach = da;
            steps.reach(reach);
            through_read(count, state, reach, dlog_reach);
            if (segment.writes)
                dlog_reach[count - 1] += reach[count - 1] * sum_of_lanes<T>(products(p * N, state, dstate));
        }
        through_mixing(count, dlog_end, da);
        add_later<T>(count, P, decay_, dy_, dxdt_, false);

        T later = T(0), dA = T(0);
        for (int64_t t = count - 1; t >= 0; --t) {
            later += dlog_reach[t];
            da[t] += later;
            dA += da[t] * steps.dt[t];
        }
        const T A = scan_.A_h(h), D = scan_.D_h(h);
        Vector<T> dD = {};
        for (int64_t t = 0; t < count; ++t) {
            const T *x = x_ + t * P, *dy = dy_ + t * P;
            T* dxdt = dxdt_ + t * P;
            if (segment.writes)
                for (int64_t j = 0; j < P; ++j) dxdt[j] += to_end[t] * dends_[t * P + j];
            store(parts_ + t * kLanes<T>, products(P, dxdt, x));
            dD += products(P, dy, x);
            T* dx = dx_bthp.at(b, segment.begin + t, h);
            for (int64_t j = 0; j < p; ++j) dx[j] = dxdt[j] * steps.dt[t] + dy[j] * D;
        }
        sums_of_lanes<T>(count, parts_, ddt);
        for (int64_t t = 0; t < count; ++t) ddt_bth(b, segment.begin + t, h) = ddt[t] + da[t] * A;
        dA_dD[0] += dA;
        dA_dD[1] += sum_of_lanes<T>(dD);
    }

    void store_group(const Segment& segment, int64_t b, int64_t g, const Tensor<T>& dB_btgn,
                     const Tensor<T>& dC_btgn) {
        add_earlier<T>(segment.count, N, dscores_, B_, dC_, true);
        add_later<T>(segment.count, N, dscores_, C_, dB_, true);
        for (int64_t t = 0; t < segment.count; ++t) {
            std::copy_n(dB_ + t * N, scan_.n, dB_btgn.at(b, segment.begin + t, g));
            std::copy_n(dC_ + t * N, scan_.n, dC_btgn.at(b, segment.begin + t, g));
        }
    }

  private:
    // state' = ... + (to_end dt x)^T B: sets dends_, the gradient of to_end dt x, adds to dB_, finds the gradient of
    // to_end's exponent.
    void through_write(int64_t count, const T* dstate, const T* to_end, T* dlog_end) {
        multiply<T>(count, N, scan_.p, {xdt_, P, 1}, dstate, N, wide_, N, false);
        scale_and_add(count, to_end, B_, dB_, dlog_end);
        transpose<T>(scan_.p, N, dstate, N, state_columns_, P);
        multiply<T>(count, P, scan_.n, {B_, N, 1}, state_columns_, P, dends_, P, false);
    }

    // y = ... + reach C state^T: adds to dC_, finds the gradient of reach's exponent.
    void through_read(int64_t count, const T* state, const T* reach, T* dlog_reach) {
        multiply<T>(count, N, scan_.p, {dy_, P, 1}, state, N, wide_, N, false);
        scale_and_add(count, reach, C_, dC_, dlog_reach);
    }

    // sum[t] += scale[t] wide_[t];  dlog_scale[t] = scale[t] wide_[t] . m[t]
    void scale_and_add(int64_t count, const T* scale, const T* m, T* sum, T* dlog_scale) {
        for (int64_t t = 0; t < count; ++t) {
            const T *wide = wide_ + t * N, *m_t = m + t * N, scale_t = scale[t];
            T* sum_t = sum + t * N;
            Vector<T> dot = {};
            for (int64_t j = 0; j < N; j += kLanes<T>) {
                const Vector<T> scaled = scale_t * load(wide + j);
                store(sum_t + j, load(sum_t + j) + scaled);
                dot += scaled * load(m_t + j);
            }
            store(parts_ + t * kLanes<T>, dot);
        }
        sums_of_lanes<T>(count, parts_, dlog_scale);
    }

    // mixing = scores * decay: adds to dscores_, leaves mixing in decay_, finds the gradient of a. a_t is in the
    // intervals (s, t'] with s < t <= t': `over` holds, for each s, the sum over t' >= t while t goes down.
    void through_mixing(int64_t count, const T* dlog_end, T* da) {
        alignas(kVectorBytes) T over[kChunk];
        std::copy_n(dlog_end, kChunk, over);
        const Vector<T> lane = lanes<T>();
        for (int64_t t = count - 1; t >= 0; --t) {
            T *decay = decay_ + t * kChunk, *dscores = dscores_ + t * kChunk;
            const T *dmixing = dmixing_ + t * kChunk, *scores = scores_ + t * kChunk;
            Vector<T> earlier = {};
            for (int64_t s = 0; s < row_width<T>(count, t); s += kLanes<T>) {
                const Vector<T> decay_s = load(decay + s), scores_s = load(scores + s);
                const Vector<T> dscores_s = load(dmixing + s) * decay_s;
                store(dscores + s, load(dscores + s) + dscores_s);
                store(decay + s, scores_s * decay_s);
                const Vector<T> over_s = load(over + s) + dscores_s * scores_s;
                store(over + s, over_s);
                earlier += lane < T(t - s) ? over_s : Vector<T>{};
            }
            store(parts_ + t * kLanes<T>, earlier);
        }
        sums_of_lanes<T>(count, parts_, da);
    }

    const Scan<T>& scan_;
    const Tensor<T>& dy_bthp_;
    const int64_t P = scan_.P, N = scan_.N;
    Scratch<T> B_{kChunk * N}, C_{kChunk * N}, dB_{kChunk * N}, dC_{kChunk * N}, wide_{kChunk * N};
    Scratch<T> scores_{kChunk * kChunk}, dscores_{kChunk * kChunk}, decay_{kChunk * kChunk}, dmixing_{kChunk * kChunk};
    Scratch<T> x_{kChunk * P}, xdt_{kChunk * P}, dxdt_{kChunk * P}, dends_{kChunk * P}, dy_{kChunk * P};
    Scratch<T> columns_{std::max(N, P) * kChunk}, state_columns_{N * P}, parts_{kChunk * kLanes<T>};
};

}  // namespace

// states_bchpn: receives the state before each chunk, rows padded to whole vectors.
template <typename T>
void ssd_scan_forward(const Tensor<T>& x_bthp, const Tensor<T>& dt_bth, const Tensor<T>& A_h, const Tensor<T>& B_btgn,
                      const Tensor<T>& C_btgn, const Tensor<T>& D_h, const Tensor<T>& initial_bhpn,
                      const Tensor<int64_t>& docs_bt, const Tensor<T>& y_bthp, const Tensor<T>& states_bchpn,
                      const Tensor<T>& final_bhpn, int64_t threads) {
    const Scan<T> scan{x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, initial_bhpn, docs_bt};
    Scratch<T> carry_bch(scan.batch * scan.chunks * scan.heads);
    write_states<T>(scan, states_bchpn.data, carry_bch, threads);
    carry_states<T>(scan, initial_bhpn, states_bchpn.data, carry_bch, final_bhpn, false, threads);
    write_outputs<T>(scan, states_bchpn.data, y_bthp, threads);
}

// dstates_bchpn: room like that of the states. dinitial_bhpn may be None.
template <typename T>
void ssd_scan_backward(const Tensor<T>& x_bthp, const Tensor<T>& dt_bth, const Tensor<T>& A_h, const Tensor<T>& B_btgn,
                       const Tensor<T>& C_btgn, const Tensor<T>& D_h, const Tensor<T>& initial_bhpn,
                       const Tensor<int64_t>& docs_bt, const Tensor<T>& states_bchpn, const Tensor<T>& dy_bthp,
                       const Tensor<T>& dfinal_bhpn, const Tensor<T>& dstates_bchpn, const Tensor<T>& dx_bthp,
                       const Tensor<T>& ddt_bth, const Tensor<T>& dA_h, const Tensor<T>& dB_btgn,
                       const Tensor<T>& dC_btgn, const Tensor<T>& dD_h, const Tensor<T>& dinitial_bhpn,
                       int64_t threads) {
    const Scan<T> scan{x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, initial_bhpn, docs_bt};
    const int64_t size = scan.p * scan.N, parts = scan.batch * scan.chunks;
    T* const dstates = dstates_bchpn.data;
    Scratch<T> carry(parts * scan.heads), dA_dD(parts * scan.heads * 2);
    read_state_gradients<T>(scan, dy_bthp, dstates, carry, threads);
    carry_states<T>(scan, dfinal_bhpn, dstates, carry, dinitial_bhpn, true, threads);
    std::fill_n(static_cast<T*>(dA_dD), parts * scan.heads * 2, T(0));
    scan.for_each_chunk(threads, [&](int64_t b, int64_t c, int64_t g) {
        SegmentGradients<T> gradients(scan, dy_bthp);
        scan.for_each_segment(b, c, [&](const Segment& segment) {
            gradients.load_group(segment, b, g);
            for (int64_t h = g * scan.heads_per_group; h < (g + 1) * scan.heads_per_group; ++h)
                gradients.add_head(segment, b, h, states_bchpn.data + scan.at(b, c, h, size),
                                   dstates + scan.at(b, c, h, size), dx_bthp, ddt_bth, dA_dD + scan.at(b, c, h, 2));
            gradients.store_group(segment, b, g, dB_btgn, dC_btgn);
        });
    });
    for (int64_t h = 0; h < scan.heads; ++h) {
        T dA = T(0), dD = T(0);
        for (int64_t part = 0; part < parts; ++part) {
            dA += dA_dD[(part * scan.heads + h) * 2];
            dD += dA_dD[(part * scan.heads + h) * 2 + 1];
        }
        dA_h(h) = dA;
        dD_h(h) = dD;
    }
}

// One position of the recurrence for each batch element; state_bhpn, whose rows are contiguous, is updated in place.
template <typename T>
void ssd_step(const Tensor<T>& x_bhp, const Tensor<T>& dt_bh, const Tensor<T>& A_h, const Tensor<T>& B_bgn,
              const Tensor<T>& C_bgn, const Tensor<T>& D_h, const Tensor<T>& state_bhpn, const Tensor<T>& y_bhp,
              int64_t threads) {
    const int64_t heads = x_bhp.size[1], p = x_bhp.size[2], n = B_bgn.size[2], N = round_up<T>(n);
    const int64_t heads_per_group = heads / B_bgn.size[1];
    const int64_t heads_per_task = std::max<int64_t>(1, kStepElements / (p * N));
    parallel_blocks(x_bhp.size[0] * heads, heads_per_task, threads, [&](int64_t begin, int64_t end) {
        Scratch<T> B(N), C(N), row(N);
        alignas(kVectorBytes) T parts[kChunk * kLanes<T>], sums[kChunk];
        std::fill_n(static_cast<T*>(row), N, T(0));
        for (int64_t bh = begin; bh < end; ++bh) {
            const int64_t b = bh / heads, h = bh % heads, g = h / heads_per_group;
            const T dt = dt_bh(b, h), decay = exponential(dt * A_h(h)), D = D_h(h);
            load_rows<T>(1, n, N, {B_bgn.at(b, g), 0, 1}, B);
            load_rows<T>(1, n, N, {C_bgn.at(b, g), 0, 1}, C);
            for (int64_t first = 0; first < p; first += kChunk) {
                const int64_t rows = std::min(kChunk, p - first);
                for (int64_t i = 0; i < rows; ++i) {
                    const T xdt = dt * x_bhp(b, h, first + i);
                    T* state = state_bhpn.at(b, h, first + i);
                    for (int64_t j = 0; j < n; ++j) row[j] = state[j] = decay * state[j] + xdt * B[j];
                    store(parts + i * kLanes<T>, products<T>(N, row, C));
                }
                sums_of_lanes<T>(rows, parts, sums);
                for (int64_t i = 0; i < rows; ++i) y_bhp(b, h, first + i) = sums[i] + D * x_bhp(b, h, first + i);
            }
        }
    });
}

}  // namespace bmojo

BMOJO_EXPORT(ssd_scan_forward)
BMOJO_EXPORT(ssd_scan_backward)
BMOJO_EXPORT(ssd_step)
