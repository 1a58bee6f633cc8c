// Memory attention of one query per row on CPU, for decoding: the keys lie in ring buffers and slots.

#include <algorithm>
#include <cmath>

#include "cpp/parallel.h"
#include "cpp/simd.h"
#include "cpp/tensor.h"

namespace bmojo {
namespace {

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
    Vector<T> sums{};
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) sums += load(a + i) * load(b + i);
    T sum = 0;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += sums[lane];
    for (; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

// Scores of the keys a query reads, and where their values lie.
template <typename T>
struct Read {
    Scratch<T> scores;
    Scratch<const T*> values;
    int64_t count = 0;

    explicit Read(int64_t most) : scores(most), values(most) {}

    void add(const T* q, const T* k, const T* v, int64_t p) {
        scores[count] = dot(q, k, p) / std::sqrt(T(p));
        values[count++] = v;
    }

    void weighted_sum(T* out, int64_t p) {
        const T highest = *std::max_element(+scores, scores + count);
        T total = 0;
        std::fill_n(out, p, T(0));
        for (int64_t i = 0; i < count; ++i) {
            const T weight = exponential(scores[i] - highest);
            total += weight;
            for (int64_t x = 0; x < p; ++x) out[x] += weight * values[i][x];
        }
        for (int64_t x = 0; x < p; ++x) out[x] /= total;
    }
};

}  // namespace

// See kernels.memory_attention.memory_attention_step.
template <typename T>
void memory_attention_step(const Tensor<T>& q_bhp, const Tensor<T>& k_brhp, const Tensor<T>& v_brhp,
                           const Tensor<T>& fading_k_brhp, const Tensor<T>& fading_v_brhp, const Tensor<T>& far_q_bhp,
                           const Tensor<T>& slot_k_bmhp, const Tensor<T>& slot_v_bmhp,
                           const Tensor<int64_t>& slot_position_bm, const Tensor<int64_t>& position_b,
                           const Tensor<T>& out_bhp, int64_t window_size, int64_t threads) {
    const int64_t heads = q_bhp.size[1], p = q_bhp.size[2], group = heads / k_brhp.size[2];
    const int64_t slots = slot_position_bm ? slot_position_bm.size[1] : 0;
    parallel_for(q_bhp.size[0] * heads, threads, [&](int64_t task) {
        const int64_t b = task / heads, h = task % heads, kv_head = h / group;
        const int64_t fading_rows = fading_k_brhp ? fading_k_brhp.size[1] : 0;
        Read<T> read(std::min(window_size, k_brhp.size[1]) + std::min(window_size, fading_rows) + slots);
        const auto add_ring = [&](const Tensor<T>& k, const Tensor<T>& v, int64_t age) {
            const int64_t ring = k.size[1], newest = position_b(b) - age;
            const int64_t count = std::min({window_size, newest + 1, ring - age});
            for (int64_t i = 0; i < count; ++i) {
                const int64_t row = (newest - i) % ring;
                read.add(q_bhp.at(b, h), k.at(b, row, kv_head), v.at(b, row, kv_head), p);
            }
        };
        add_ring(k_brhp, v_brhp, 0);
        if (fading_k_brhp) add_ring(fading_k_brhp, fading_v_brhp, window_size);
        for (int64_t m = 0; m < slots; ++m) {
            if (slot_position_bm(b, m) < 0) continue;
            read.add(far_q_bhp.at(b, h), slot_k_bmhp.at(b, m, kv_head), slot_v_bmhp.at(b, m, kv_head), p);
        }
        read.weighted_sum(out_bhp.at(b, h), p);
    });
}

}  // namespace bmojo

BMOJO_EXPORT(memory_attention_step)
