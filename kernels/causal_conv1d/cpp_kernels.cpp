// The causal convolution with SiLU, forward and backward in one pass over memory each, and its decoding step.
#include <algorithm>
#include <cstdint>

#include "cpp/parallel.h"
#include "cpp/simd.h"
#include "cpp/tensor.h"

namespace bmojo {
namespace {

static_assert(BMOJO_CONV_MAX_WIDTH == 4);  // the cases below
constexpr int64_t kPositions = BMOJO_CONV_PART_POSITIONS;  // of a task: the backward reads Width - 1 more
constexpr int64_t kChannels = 512;  // of a task: the rows that it comes back to stay in the first cache

// Positions [begin, end) and channels [channel, channel + channels) of one batch element.
struct Task {
    int64_t b, part, begin, end, channel, channels;
};

template <typename T>
struct Convolution {
    Tensor<T> x_btd, weight_dk, initial_bkd;
    Tensor<int64_t> docs_bt;
    int64_t batch = x_btd.size[0], positions = x_btd.size[1], channels = x_btd.size[2], width = weight_dk.size[1];
    int64_t parts = (positions + kPositions - 1) / kPositions;  // of each batch element

    // The row that position t meets `lag` positions earlier, or `zeros` if that is another document or nothing.
    const T* tap(int64_t b, int64_t t, int64_t lag, int64_t channel, const T* zeros) const {
        if (!same_document(b, t, lag)) return zeros;
        return t >= lag ? x_btd.at(b, t - lag, channel) : initial_bkd.at(b, initial_bkd.size[1] + t - lag, channel);
    }

    bool same_document(int64_t b, int64_t t, int64_t lag) const {
        if (t < lag) return bool(initial_bkd);
        return lag == 0 || !docs_bt || docs_bt(b, t) == docs_bt(b, t - lag);
    }

    template <typename Body>
    void for_each_task(int64_t threads, const Body& body) const {
        const int64_t slices = (channels + kChannels - 1) / kChannels;
        parallel_for(batch * parts * slices, threads, [&](int64_t i) {
            const int64_t part = i / slices, begin = part % parts * kPositions, channel = i % slices * kChannels;
            body(Task{part / parts, part, begin, std::min(positions, begin + kPositions), channel,
                      std::min(kChannels, channels - channel)});
        });
    }

    // weight_kd[k] for the channels of a task, rows of kChannels.
    void load_weight(const Task& task, T* weight_kd) const {
        for (int64_t k = 0; k < width; ++k)
            for (int64_t j = 0; j < task.channels; ++j)
                weight_kd[k * kChannels + j] = weight_dk(task.channel + j, k);
    }
};

template <typename T, int Width>
void convolve(const Convolution<T>& conv, const Tensor<T>& y_btd, int64_t threads) {
    conv.for_each_task(threads, [&](const Task& task) {
        alignas(kVectorBytes) T weight_kd[Width * kChannels], zeros[kChannels] = {};
        conv.load_weight(task, weight_kd);
        for (int64_t t = task.begin; t < task.end; ++t) {
            const T* taps[Width];
            for (int k = 0; k < Width; ++k) taps[k] = conv.tap(task.b, t, Width - 1 - k, task.channel, zeros);
            T* y = y_btd.at(task.b, t, task.channel);
#pragma omp simd
            for (int64_t j = 0; j < task.channels; ++j) {
                T pre = T(0);
                for (int k = 0; k < Width; ++k) pre += weight_kd[k * kChannels + j] * taps[k][j];
                y[j] = pre * sigmoid(pre);
            }
        }
    });
}

// dweight_skd: receives each part's share of the weight's gradient.
template <typename T, int Width>
void differentiate(const Convolution<T>& conv, const Tensor<T>& dy_btd, const Tensor<T>& dx_btd,
                   const Tensor<T>& dweight_skd, int64_t threads) {
    conv.for_each_task(threads, [&](const Task& task) {
        alignas(kVectorBytes) T weight_kd[Width * kChannels], zeros[kChannels] = {};
        alignas(kVectorBytes) T dweight_kd[Width * kChannels] = {};
        alignas(kVectorBytes) T dpre[Width * kChannels];  // of the last Width positions, in turns
        conv.load_weight(task, weight_kd);
        for (int64_t t = task.begin; t < task.end + Width - 1; ++t) {
            if (t < conv.positions) {
                const T* taps[Width];
                for (int k = 0; k < Width; ++k) taps[k] = conv.tap(task.b, t, Width - 1 - k, task.channel, zeros);
                const T* dy = dy_btd.at(task.b, t, task.channel);
                T* dpre_t = dpre + t % Width * kChannels;
                const T own = t < task.end ? T(1) : T(0);  // else the next part adds it to the weight's gradient
#pragma omp simd
                for (int64_t j = 0; j < task.channels; ++j) {
                    T pre = T(0);
                    for (int k = 0; k < Width; ++k) pre += weight_kd[k * kChannels + j] * taps[k][j];
                    const T gate = sigmoid(pre), dpre_j = dy[j] * (gate * (T(1) + pre * (T(1) - gate)));
                    dpre_t[j] = dpre_j;
                    for (int k = 0; k < Width; ++k) dweight_kd[k * kChannels + j] += own * dpre_j * taps[k][j];
                }
            }
            const int64_t s = t - (Width - 1);  // all that position s went into is known now
            if (s < task.begin) continue;
            const T* later[Width];
            for (int k = 0; k < Width; ++k) {
                const int64_t u = s + Width - 1 - k;
                const bool met = u < conv.positions && conv.same_document(task.b, u, u - s);
                later[k] = met ? dpre + u % Width * kChannels : zeros;
            }
            T* dx = dx_btd.at(task.b, s, task.channel);
#pragma omp simd
            for (int64_t j = 0; j < task.channels; ++j) {
                T sum = T(0);
                for (int k = 0; k < Width; ++k) sum += weight_kd[k * kChannels + j] * later[k][j];
                dx[j] = sum;
            }
        }
        for (int k = 0; k < Width; ++k)
            std::copy_n(dweight_kd + k * kChannels, task.channels, dweight_skd.at(task.part, k, task.channel));
    });
}

}  // namespace

// Widths up to 4: MAX_WIDTH in cpp_op.py, as PART_POSITIONS is kPositions.
template <typename T>
void causal_conv1d_forward(const Tensor<T>& x_btd, const Tensor<T>& weight_dk, const Tensor<T>& initial_bkd,
                           const Tensor<int64_t>& docs_bt, const Tensor<T>& y_btd, int64_t threads) {
    const Convolution<T> conv{x_btd, weight_dk, initial_bkd, docs_bt};
    switch (conv.width) {
        case 1: return convolve<T, 1>(conv, y_btd, threads);
        case 2: return convolve<T, 2>(conv, y_btd, threads);
        case 3: return convolve<T, 3>(conv, y_btd, threads);
        case 4: return convolve<T, 4>(conv, y_btd, threads);
    }
}

template <typename T>
void causal_conv1d_backward(const Tensor<T>& x_btd, const Tensor<T>& weight_dk, const Tensor<T>& initial_bkd,
                            const Tensor<int64_t>& docs_bt, const Tensor<T>& dy_btd, const Tensor<T>& dx_btd,
                            const Tensor<T>& dweight_skd, const Tensor<T>& dweight_dk, int64_t threads) {
    const Convolution<T> conv{x_btd, weight_dk, initial_bkd, docs_bt};
    switch (conv.width) {
        case 1: differentiate<T, 1>(conv, dy_btd, dx_btd, dweight_skd, threads); break;
        case 2: differentiate<T, 2>(conv, dy_btd, dx_btd, dweight_skd, threads); break;
        case 3: differentiate<T, 3>(conv, dy_btd, dx_btd, dweight_skd, threads); break;
        case 4: differentiate<T, 4>(conv, dy_btd, dx_btd, dweight_skd, threads); break;
    }
    parallel_blocks(conv.channels, kChannels, threads, [&](int64_t begin, int64_t end) {
        for (int64_t k = 0; k < conv.width; ++k) {
            T sum[kChannels] = {};
            for (int64_t part = 0; part < dweight_skd.size[0]; ++part) {
                const T* share = dweight_skd.at(part, k);
                for (int64_t j = begin; j < end; ++j) sum[j - begin] += share[j];
            }
            for (int64_t j = begin; j < end; ++j) dweight_dk(j, k) = sum[j - begin];
        }
    });
}

// state_bkd, the last inputs, loses its oldest row and receives x_bd. Rows of both are contiguous.
template <typename T>
void causal_conv1d_step(const Tensor<T>& x_bd, const Tensor<T>& weight_dk, const Tensor<T>& state_bkd,
                        const Tensor<T>& y_bd, int64_t threads) {
    const int64_t past = state_bkd.size[1];
    parallel_blocks(x_bd.size[1], kChannels, threads, [&](int64_t begin, int64_t end) {
        alignas(kVectorBytes) T weight[kChannels], pre[kChannels];
        for (int64_t b = 0; b < x_bd.size[0]; ++b) {
            const int64_t count = end - begin;
            std::fill_n(pre, count, T(0));
            for (int64_t k = 0; k <= past; ++k) {
                const T* tap = k < past ? state_bkd.at(b, k, begin) : x_bd.at(b, begin);
                for (int64_t j = 0; j < count; ++j) weight[j] = weight_dk(begin + j, k);
                for (int64_t j = 0; j < count; ++j) pre[j] += tap[j] * weight[j];
                if (k > 0) std::copy_n(tap, count, state_bkd.at(b, k - 1, begin));
            }
            T* y = y_bd.at(b, begin);
            for (int64_t j = 0; j < count; ++j) y[j] = pre[j] * sigmoid(pre[j]);
        }
    });
}

}  // namespace bmojo

BMOJO_EXPORT(causal_conv1d_forward)
BMOJO_EXPORT(causal_conv1d_backward)
BMOJO_EXPORT(causal_conv1d_step)
