// Matrix products on operands that lie in a core's cache, for kernels that cut their work into tiles.
#pragma once

#include <cstdint>

#include "simd.h"

namespace bmojo {

// A matrix whose element (i, j) lies at data[i * row + j * column]; transposed() is free.
template <typename T>
struct Matrix {
    const T* data;
    int64_t row, column;

    Matrix transposed() const { return {data, column, row}; }
    Matrix rows_from(int64_t i) const { return {data + i * row, row, column}; }
};

// One block of `Rows` rows and `Vectors` vectors of C, whose sums stay in registers.
template <typename T, int Rows, int Vectors>
inline void multiply_block(int64_t depth, Matrix<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, bool add) {
    Vector<T> sum[Rows][Vectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vector<T> b_k[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) b_k[v] = load(b + k * b_row + v * kLanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const T a_rk = a.data[r * a.row + k * a.column];
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[r][v] += a_rk * b_k[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            T* at = c + r * c_row + v * kLanes<T>;
            store(at, add ? load(at) + sum[r][v] : sum[r][v]);
        }
    }
}

template <typename T, int Vectors, int kRows>
inline void multiply_columns(int64_t rows, int64_t depth, Matrix<T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
                             bool add) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
        multiply_block<T, kRows, Vectors>(depth, a.rows_from(i), b, b_row, c + i * c_row, c_row, add);
    for (; i + 2 <= rows; i += 2)
        multiply_block<T, 2, Vectors>(depth, a.rows_from(i), b, b_row, c + i * c_row, c_row, add);
    if (i < rows) multiply_block<T, 1, Vectors>(depth, a.rows_from(i), b, b_row, c + i * c_row, c_row, add);
}

// C = A B, or C += A B if `add`. A [rows, depth] may have any strides. Rows of B [depth, columns] and C are
// contiguous, and `columns` is a multiple of kLanes<T>.
template <typename T>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, const T* b, int64_t b_row, T* c,
                     int64_t c_row, bool add) {
    // 24 sums fill the registers of AVX-512 and hide the latency of multiply-adds.
    int64_t j = 0;
    for (; j + 4 * kLanes<T> <= columns; j += 4 * kLanes<T>)
        multiply_columns<T, 4, 6>(rows, depth, a, b + j, b_row, c + j, c_row, add);
    for (; j + 2 * kLanes<T> <= columns; j += 2 * kLanes<T>)
        multiply_columns<T, 2, 12>(rows, depth, a, b + j, b_row, c + j, c_row, add);
    if (j < columns) multiply_columns<T, 1, 12>(rows, depth, a, b + j, b_row, c + j, c_row, add);
}

}  // namespace bmojo
