// The gradient of a weight: sums over all rows of a batch, for comparatively few columns of either side.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpp/gemm.h"
#include "cpp/parallel.h"
#include "cpp/tensor.h"

namespace bmojo {
namespace {

constexpr int64_t kPanel = 12;      // columns of the wider side: with two vectors of the other, 24 vectors of sums (gemm.h)
constexpr int64_t kDepth = 512;     // rows summed up at a time
constexpr int64_t kColumns = 256;   // of the narrower side at a time: kDepth rows of them stay in the second cache
constexpr int64_t kTile = 4 * kPanel;  // copied together: of each row, whole cache lines
constexpr int64_t kCopiedRows = 64, kShares = 2;
constexpr int64_t kAhead = 8;  // rows

template <typename T>
constexpr int64_t kStrip = 2 * kLanes<T>;

// to[block][row][i] = from[row, block * Width + i] for rows `begin` to `end` of `depth`; zeros after the last column.
template <int64_t Width, typename T>
void copy_blocks(int64_t begin, int64_t end, int64_t columns, const T* from, int64_t from_row, T* to, int64_t depth) {
    const int64_t whole = columns / Width, left = columns % Width;
    for (int64_t row = begin; row < end; ++row) {
        const T* source = from + row * from_row;
        T* target = to + row * Width;
        for (int64_t i = 0; i < columns; i += 64 / sizeof(T)) __builtin_prefetch(source + kAhead * from_row + i);
        for (int64_t block = 0; block < whole; ++block, source += Width, target += depth * Width)
            std::memcpy(target, source, Width * sizeof(T));
        if (left > 0) std::fill(std::copy_n(source, left, target), target + Width, T(0));
    }
}

// c(i, j) = or += sum over `depth` rows of column i of the panel times column j of the strip.
template <typename T>
void multiply_panel(int64_t depth, const T* panel, const T* strip, int64_t rows, int64_t columns, T* c, int64_t c_row,
                    int64_t c_column, bool add) {
    const Matrix<T> a{panel, 1, kPanel};
    if (rows == kPanel && columns == kStrip<T> && c_column == 1) {
        for (int64_t i = 0; i < kPanel; ++i) {
            __builtin_prefetch(c + i * c_row, 1);
            __builtin_prefetch(c + i * c_row + kLanes<T>, 1);
        }
        multiply_block<T, kPanel, 2>(depth, a, strip, kStrip<T>, c, c_row, add);
        return;
    }
    alignas(64) T sums[kPanel * kStrip<T>];
    multiply_block<T, kPanel, 2>(depth, a, strip, kStrip<T>, sums, kStrip<T>, false);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            T& at = c[i * c_row + j * c_column];
            at = add ? at + sums[i * kStrip<T> + j] : sums[i * kStrip<T> + j];
        }
    }
}

}  // namespace

// grad_weight[o, i] = or += sum over rows r of grad_y[r, o] x[r, i]. Rows of all three are contiguous.
template <typename T>
void weight_gradient(const Tensor<T>& grad_y, const Tensor<T>& x, const Tensor<T>& grad_weight, int64_t add,
                     int64_t threads) {
    // The wider side is cut among the threads; the narrower one is what they all read.
    const bool wide_x = x.size[1] > grad_y.size[1];
    const Tensor<T>&wide = wide_x ? x : grad_y, &narrow = wide_x ? grad_y : x;
    const int64_t c_row = wide_x ? 1 : grad_weight.stride[0], c_column = wide_x ? grad_weight.stride[0] : 1;
    const Scratch<T> strips((kColumns + kStrip<T>)*kDepth);
    for (int64_t j = 0; j < narrow.size[1]; j += kColumns) {
        const int64_t columns = std::min(kColumns, narrow.size[1] - j);
        for (int64_t row = 0; row < x.size[0]; row += kDepth) {
            const int64_t depth = std::min(kDepth, x.size[0] - row);
            parallel_blocks(depth, kCopiedRows, threads, [&](int64_t begin, int64_t end) {
                copy_blocks<kStrip<T>, T>(begin, end, columns, narrow.at(row, j), narrow.stride[0], strips, depth);
            });
            const int64_t share = (wide.size[1] / kPanel / (kShares * threads) + 1) * kPanel;
            parallel_blocks(wide.size[1], share, threads, [&](int64_t begin, int64_t end) {
                const Scratch<T> panel(kPanel * kDepth);
                for (int64_t i = begin; i < end; i += kPanel) {
                    const int64_t height = std::min(kPanel, end - i);
                    copy_blocks<kPanel, T>(0, depth, height, wide.at(row, i), wide.stride[0], panel, depth);
                    const int64_t step = (depth * kStrip<T> + columns - 1) / columns;
                    for (int64_t s = 0, next = 0; s < columns; s += kStrip<T>) {
                        if (i + kPanel < end) {
                            for (const int64_t until = std::min(depth, next + step); next < until; ++next) {
                                const T* p = wide.at(row + next, i + kPanel);
                                __builtin_prefetch(p);
                                __builtin_prefetch(p + kPanel - 1);
                            }
                        }
                        multiply_panel<T>(depth, panel, strips + s * depth, height, std::min(kStrip<T>, columns - s),
                                          grad_weight.data + i * c_row + (j + s) * c_column, c_row, c_column,
                                          add || row > 0);
                    }
                }
            });
        }
    }
}

BMOJO_EXPORT(weight_gradient)

}  // namespace bmojo
