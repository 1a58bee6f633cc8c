// Rotations and ring writes of a decoding step: one token per row, a task per row and head.
#include <algorithm>

#include "cpp/parallel.h"
#include "cpp/tensor.h"

namespace bmojo {
namespace {

template <typename T>
void rotate_row(const T* from, const T* cos, const T* sin, T* to, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        to[i] = from[i] * cos[i] - from[half + i] * sin[i];
        to[half + i] = from[half + i] * cos[i] + from[i] * sin[i];
    }
}

}  // namespace

// See kernels.memory_write. Of each tensor the last dimension is contiguous; what is null is left out.
template <typename T>
void memory_write(const Tensor<T>& q_bhp, const Tensor<T>& k_bhp, const Tensor<T>& v_bhp,
                  const Tensor<int64_t>& position_b, const Tensor<T>& near_cos, const Tensor<T>& near_sin,
                  const Tensor<T>& far_cos, const Tensor<T>& far_sin, const Tensor<T>& window_k,
                  const Tensor<T>& window_v, const Tensor<T>& plain_k, const Tensor<T>& fading_ring_k,
                  const Tensor<T>& fading_ring_v, const Tensor<T>& fading_k, const Tensor<T>& fading_v,
                  const Tensor<T>& rotated_q, int64_t threads) {
    const int64_t batch = q_bhp.size[0], heads = q_bhp.size[1], kv_heads = k_bhp.size[1], p = q_bhp.size[2];
    parallel_for(batch, threads, [&](int64_t b) {
        const T *cos = near_cos.at(b), *sin = near_sin.at(b);
        for (int64_t h = 0; h < heads; ++h) {
            rotate_row(q_bhp.at(b, h), cos, sin, rotated_q.at(0, b, h), p / 2);
            if (far_cos) rotate_row(q_bhp.at(b, h), far_cos.data, far_sin.data, rotated_q.at(1, b, h), p / 2);
        }
        const int64_t slot = position_b(b) % window_k.size[1];
        for (int64_t h = 0; h < kv_heads; ++h) {
            rotate_row(k_bhp.at(b, h), cos, sin, window_k.at(b, slot, h), p / 2);
            std::copy_n(v_bhp.at(b, h), p, window_v.at(b, slot, h));
            if (plain_k) std::copy_n(k_bhp.at(b, h), p, plain_k.at(b, slot, h));
        }
        if (!fading_ring_k) return;
        const int64_t fading_slot = position_b(b) % fading_ring_k.size[1];
        for (int64_t h = 0; h < kv_heads; ++h) {
            rotate_row(fading_k.at(b, h), cos, sin, fading_ring_k.at(b, fading_slot, h), p / 2);
            std::copy_n(fading_v.at(b, h), p, fading_ring_v.at(b, fading_slot, h));
        }
    });
}
BMOJO_EXPORT(memory_write)

}  // namespace bmojo
