// The innovation of one token: how badly its taps predict it.
#pragma once

#include "cpp/simd.h"

namespace bmojo {

template <typename T>
struct Tap {
    const T *earlier, *weight;
};

// |y - sum_k weight_k * earlier_k|^2 / (|y|^2 + eps), over `width` channels.
template <typename T>
inline T score(const T* y, const Tap<T>* taps, int64_t num_taps, int64_t width, double eps) {
    Vector<T> error_lanes{}, energy_lanes{};
    int64_t i = 0;
    for (; i + kLanes<T> <= width; i += kLanes<T>) {
        const Vector<T> y_i = load(y + i);
        Vector<T> residual = y_i;
        for (int64_t k = 0; k < num_taps; ++k) residual -= load(taps[k].weight + i) * load(taps[k].earlier + i);
        error_lanes += residual * residual;
        energy_lanes += y_i * y_i;
    }
    T error = 0, energy = 0;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        error += error_lanes[lane];
        energy += energy_lanes[lane];
    }
    for (; i < width; ++i) {
        T residual = y[i];
        for (int64_t k = 0; k < num_taps; ++k) residual -= taps[k].weight[i] * taps[k].earlier[i];
        error += residual * residual;
        energy += y[i] * y[i];
    }
    return error / (energy + T(eps));
}

}  // namespace bmojo
