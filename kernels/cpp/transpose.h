// Transposition by shuffles of whole vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace bmojo {

// kLanes<T> vectors as rows of a square matrix become its columns: log2(kLanes<T>) rounds that interleave halves.
template <typename T>
inline void transpose_square(Vector<T>* m) {
    constexpr int64_t kHalf = kLanes<T> / 2;
    decltype(m[0] < m[0]) low, high;
    for (int64_t i = 0; i < kHalf; ++i) {
        low[2 * i] = i, low[2 * i + 1] = kLanes<T> + i;
        high[2 * i] = kHalf + i, high[2 * i + 1] = kLanes<T> + kHalf + i;
    }
    for (int64_t width = 1; width < kLanes<T>; width *= 2) {
        Vector<T> mixed[kLanes<T>];
#pragma GCC unroll 8
        for (int64_t i = 0; i < kHalf; ++i) {
            mixed[2 * i] = __builtin_shuffle(m[i], m[i + kHalf], low);
            mixed[2 * i + 1] = __builtin_shuffle(m[i], m[i + kHalf], high);
        }
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes<T>; ++i) m[i] = mixed[i];
    }
}

// out[j, i] = in[i, j]; `columns` in whole vectors, and so the rows of out, with zeros after the last of `rows`.
template <typename T>
inline void transpose(int64_t rows, int64_t columns, const T* in, int64_t in_row, T* out, int64_t out_row) {
    for (int64_t i = 0; i < rows; i += kLanes<T>) {
        const int64_t count = std::min(kLanes<T>, rows - i);
        for (int64_t j = 0; j < columns; j += kLanes<T>) {
            Vector<T> m[kLanes<T>] = {};
            for (int64_t k = 0; k < count; ++k) m[k] = load(in + (i + k) * in_row + j);
            transpose_square<T>(m);
            for (int64_t k = 0; k < kLanes<T>; ++k) store(out + (j + k) * out_row + i, m[k]);
        }
    }
}

// out[j, i] = scale * in[i, j], for any sizes: whole squares by vectors, what is left at the edges one by one.
template <typename T>
inline void transpose_scaled(int64_t rows, int64_t columns, const T* in, int64_t in_row, T scale, T* out,
                             int64_t out_row) {
    const int64_t whole_rows = rows / kLanes<T> * kLanes<T>, whole_columns = columns / kLanes<T> * kLanes<T>;
    for (int64_t i = 0; i < whole_rows; i += kLanes<T>) {
        for (int64_t j = 0; j < whole_columns; j += kLanes<T>) {
            Vector<T> m[kLanes<T>];
            for (int64_t k = 0; k < kLanes<T>; ++k) m[k] = load(in + (i + k) * in_row + j) * scale;
            transpose_square<T>(m);
            for (int64_t k = 0; k < kLanes<T>; ++k) store(out + (j + k) * out_row + i, m[k]);
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) out[j * out_row + i] = scale * in[i * in_row + j];
    }
}

}  // namespace bmojo
