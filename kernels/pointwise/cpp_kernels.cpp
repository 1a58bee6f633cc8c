// Row by row: RMSNorm, gates, rotary embedding and cross-entropy. Each reads and writes memory once; what a row needs twice
// is then in the first cache. README.md has the formulas of the gradients.
#include <algorithm>
#include <cmath>

#include "cpp/parallel.h"
#include "cpp/simd.h"
#include "cpp/tensor.h"

namespace bmojo {
namespace {

constexpr int64_t kBlockElements = 1 << 14;  // of one task: enough to be worth handing out
constexpr int64_t kSummedRows = 64;          // of one partial sum of a weight's gradient
constexpr int64_t kSummedColumns = 256;

// body(row) for every row, blocks of rows in parallel. A body's loops use pointers of its own: through one that is
// captured by reference GCC gathers element by element.
template <typename Body>
void for_each_row(int64_t rows, int64_t width, int64_t threads, const Body& body) {
    parallel_blocks(rows, kBlockElements / (width + 1) + 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body(row);
    });
}

// sum[width] of what body(row, sum) adds for every row: first over blocks of rows, then over the blocks, in order.
template <typename T, typename Body>
void sum_over_rows(int64_t rows, int64_t width, T* sum, int64_t threads, const Body& body) {
    const int64_t blocks = (rows + kSummedRows - 1) / kSummedRows;
    const Scratch<T> partial(blocks * width);
    parallel_for(blocks, threads, [&](int64_t block) {
        T* own = partial + block * width;
        std::fill(own, own + width, T(0));
        const int64_t end = std::min(rows, (block + 1) * kSummedRows);
        for (int64_t row = block * kSummedRows; row < end; ++row) body(row, own);
    });
    parallel_blocks(width, kSummedColumns, threads, [&](int64_t begin, int64_t end) {
        std::fill(sum + begin, sum + end, T(0));
        for (int64_t block = 0; block < blocks; ++block) {
            const T* own = partial + block * width;
#pragma omp simd
            for (int64_t i = begin; i < end; ++i) sum[i] += own[i];
        }
    });
}

template <typename T>
T inverse_rms(T sum_of_squares, int64_t width, double eps) {
    return T(1) / std::sqrt(sum_of_squares / T(width) + T(eps));
}

template <typename T>
struct Silu {
    T value, slope;
};

template <typename T>
inline Silu<T> silu(T x) {
    const T s = sigmoid(x);
    return {x * s, s * (T(1) + x * (T(1) - s))};
}

template <typename T>
void gated_row(const T* x, const T* gate, T* out, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] * (gate[i] * sigmoid(gate[i]));
}

template <typename T>
void gated_row_backward(const T* x, const T* gate, const T* grad, T* grad_x, T* grad_gate, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        const Silu<T> s = silu(gate[i]);
        grad_x[i] = grad[i] * s.value;
        grad_gate[i] = grad[i] * x[i] * s.slope;
    }
}

}  // namespace

// Of x [rows, width], or of total = x + delta if delta is not null. Rows of x and delta are contiguous, total and out
// altogether. inverse [rows] is kept if it is not null.
template <typename T>
void rms_norm(const Tensor<T>& x, const Tensor<T>& delta, const Tensor<T>& weight, const Tensor<T>& total,
              const Tensor<T>& out, const Tensor<T>& inverse, double eps, int64_t threads) {
    const int64_t rows = x.size[0], width = x.size[1];
    for_each_row(rows, width, threads, [&](int64_t row) {
        const T *x_row = x.at(row), *w = weight.data;
        T* out_row = out.data + row * width;
        if (delta) {
            const T* delta_row = delta.at(row);
            T* total_row = total.data + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) total_row[i] = x_row[i] + delta_row[i];
            x_row = total_row;
        }
        T squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += x_row[i] * x_row[i];
        const T inverse_row = inverse_rms(squares, width, eps);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) out_row[i] = x_row[i] * inverse_row * w[i];
        if (inverse) inverse(row) = inverse_row;
    });
}
BMOJO_EXPORT(rms_norm)

// x is what was normed. The gradient is added to `base` if that is not null.
template <typename T>
void rms_norm_backward(const Tensor<T>& x, const Tensor<T>& weight, const Tensor<T>& inverse, const Tensor<T>& grad,
                       const Tensor<T>& base, const Tensor<T>& grad_x, const Tensor<T>& grad_weight, int64_t threads) {
    const int64_t rows = x.size[0], width = x.size[1];
    sum_over_rows(rows, width, grad_weight.data, threads, [&](int64_t row, T* grad_w) {
        const T *x_row = x.at(row), *grad_row = grad.at(row), *w = weight.data;
        const T* base_row = base ? base.at(row) : nullptr;
        T* grad_x_row = grad_x.data + row * width;
        const T inverse_row = inverse(row);
        T share = 0;
#pragma omp simd reduction(+ : share)
        for (int64_t i = 0; i < width; ++i) {
            const T product = grad_row[i] * (x_row[i] * inverse_row);
            grad_w[i] += product;
            share += product * w[i];
        }
        share /= T(width);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const T grad_normed = grad_row[i] * w[i] - x_row[i] * inverse_row * share;
            grad_x_row[i] = (base_row ? base_row[i] : T(0)) + grad_normed * inverse_row;
        }
    });
}
BMOJO_EXPORT(rms_norm_backward)

// out = x * SiLU(gate). x and gate are [rows, width] with contiguous rows, which may lie apart; out is contiguous.
template <typename T>
void gated(const Tensor<T>& x, const Tensor<T>& gate, const Tensor<T>& out, int64_t threads) {
    const int64_t rows = x.size[0], width = x.size[1];
    for_each_row(rows, width, threads,
                 [&](int64_t row) { gated_row(x.at(row), gate.at(row), out.data + row * width, width); });
}
BMOJO_EXPORT(gated)

template <typename T>
void gated_backward(const Tensor<T>& x, const Tensor<T>& gate, const Tensor<T>& grad, const Tensor<T>& grad_x,
                    const Tensor<T>& grad_gate, int64_t threads) {
    const int64_t rows = x.size[0], width = x.size[1];
    for_each_row(rows, width, threads, [&](int64_t row) {
        gated_row_backward(x.at(row), gate.at(row), grad.at(row), grad_x.data + row * width,
                           grad_gate.data + row * width, width);
    });
}
BMOJO_EXPORT(gated_backward)

// The same for gate and x side by side, [rows, 2 * width].
template <typename T>
void gated_product(const Tensor<T>& gate_x, const Tensor<T>& out, int64_t threads) {
    const int64_t rows = gate_x.size[0], width = gate_x.size[1] / 2;
    for_each_row(rows, width, threads, [&](int64_t row) {
        const T* gate = gate_x.at(row);
        gated_row(gate + width, gate, out.data + row * width, width);
    });
}
BMOJO_EXPORT(gated_product)

template <typename T>
void gated_product_backward(const Tensor<T>& gate_x, const Tensor<T>& grad, const Tensor<T>& grad_gate_x,
                            int64_t threads) {
    const int64_t rows = gate_x.size[0], width = gate_x.size[1] / 2;
    for_each_row(rows, width, threads, [&](int64_t row) {
        const T* gate = gate_x.at(row);
        T* grad_gate = grad_gate_x.data + row * 2 * width;
        gated_row_backward(gate + width, gate, grad.at(row), grad_gate + width, grad_gate, width);
    });
}
BMOJO_EXPORT(gated_product_backward)

// RMSNorm(x * SiLU(gate)) * weight. x and gate as in `gated`; the others as in `rms_norm`.
template <typename T>
void gated_rms_norm(const Tensor<T>& x, const Tensor<T>& gate, const Tensor<T>& weight, const Tensor<T>& out,
                    const Tensor<T>& inverse, double eps, int64_t threads) {
    const int64_t rows = x.size[0], width = x.size[1];
    for_each_row(rows, width, threads, [&](int64_t row) {
        const T *x_row = x.at(row), *gate_row = gate.at(row), *w = weight.data;
        T* out_row = out.data + row * width;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) {
            const T product = x_row[i] * (gate_row[i] * sigmoid(gate_row[i]));
            out_row[i] = product;
            sum += product * product;
        }
        const T inverse_row = inverse_rms(sum, width, eps);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) out_row[i] = out_row[i] * inverse_row * w[i];
        if (inverse) inverse(row) = inverse_row;
    });
}
BMOJO_EXPORT(gated_rms_norm)

template <typename T>
void gated_rms_norm_backward(const Tensor<T>& x, const Tensor<T>& gate, const Tensor<T>& weight,
                             const Tensor<T>& inverse, const Tensor<T>& grad, const Tensor<T>& grad_x,
                             const Tensor<T>& grad_gate, const Tensor<T>& grad_weight, int64_t threads) {
    const int64_t rows = x.size[0], width = x.size[1];
    sum_over_rows(rows, width, grad_weight.data, threads, [&](int64_t row, T* grad_w) {
        const T *x_row = x.at(row), *gate_row = gate.at(row), *grad_row = grad.at(row), *w = weight.data;
        T *grad_x_row = grad_x.data + row * width, *grad_gate_row = grad_gate.data + row * width;
        const T inverse_row = inverse(row);
        T share = 0;
        // First the slopes of the product in x and in the gate, then times the gradient of the product.
#pragma omp simd reduction(+ : share)
        for (int64_t i = 0; i < width; ++i) {
            const Silu<T> s = silu(gate_row[i]);
            const T product = grad_row[i] * (x_row[i] * s.value * inverse_row);
            grad_w[i] += product;
            share += product * w[i];
            grad_x_row[i] = s.value;
            grad_gate_row[i] = x_row[i] * s.slope;
        }
        share /= T(width);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const T normed = x_row[i] * grad_x_row[i] * inverse_row;
            const T grad_product = (grad_row[i] * w[i] - normed * share) * inverse_row;
            grad_x_row[i] *= grad_product;
            grad_gate_row[i] *= grad_product;
        }
    });
}
BMOJO_EXPORT(gated_rms_norm_backward)

// Rotates the pairs (i, i + p/2) of x and out [..., h, p], of `dims` dimensions, by the angles of cos and sin
// [..., p/2], of `table_dims` dimensions; the leading ones broadcast. The last dimension of each is contiguous. What
// comes out is added to `base`, which may be out itself, if that is not null.
template <typename T>
void rotate(const Tensor<T>& x, const Tensor<T>& cos, const Tensor<T>& sin, const Tensor<T>& base, const Tensor<T>& out,
            int64_t dims, int64_t table_dims, int64_t inverse, int64_t threads) {
    const int64_t leading = dims - 2, heads = x.size[leading], half = x.size[leading + 1] / 2;
    const T sign = inverse ? T(-1) : T(1);
    int64_t places = 1;
    for (int64_t d = 0; d < leading; ++d) places *= x.size[d];
    for_each_row(places, 2 * half * heads, threads, [&](int64_t place) {
        const T *x_place = x.data, *cos_row = cos.data, *sin_row = sin.data, *base_place = base.data;
        T* out_place = out.data;
        for (int64_t d = leading - 1, rest = place; d >= 0; rest /= x.size[d--]) {
            const int64_t i = rest % x.size[d], table_d = d - leading + table_dims - 1;
            x_place += i * x.stride[d];
            out_place += i * out.stride[d];
            if (base) base_place += i * base.stride[d];
            if (table_d < 0 || cos.size[table_d] == 1) continue;
            cos_row += i * cos.stride[table_d];
            sin_row += i * sin.stride[table_d];
        }
        for (int64_t h = 0; h < heads; ++h) {
            const T *low = x_place + h * x.stride[leading], *high = low + half;
            T *out_low = out_place + h * out.stride[leading], *out_high = out_low + half;
            const T* base_low = base ? base_place + h * base.stride[leading] : nullptr;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const T c = cos_row[i], s = sign * sin_row[i];
                out_low[i] = (base_low ? base_low[i] : T(0)) + (low[i] * c - high[i] * s);
                out_high[i] = (base_low ? base_low[half + i] : T(0)) + (high[i] * c + low[i] * s);
            }
        }
    });
}
BMOJO_EXPORT(rotate)

// out[b, t] = the sum of a[b, t], b[b, t] and c[b, t], of those that are not null and have a row t. Rows are contiguous.
template <typename T>
void add_rows(const Tensor<T>& a, const Tensor<T>& b, const Tensor<T>& c, const Tensor<T>& out, int64_t threads) {
    const int64_t t = out.size[1], width = out.size[2];
    for_each_row(out.size[0] * t, width, threads, [&](int64_t row) {
        T* out_row = out.at(row / t, row % t);
        bool first = true;
        for (const Tensor<T>* x : {&a, &b, &c}) {
            if (!*x || row % t >= x->size[1]) continue;
            const T* x_row = x->at(row / t, row % t);
            if (first) {
                std::copy_n(x_row, width, out_row);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) out_row[i] += x_row[i];
            }
            first = false;
        }
        if (first) std::fill_n(out_row, width, T(0));
    });
}
BMOJO_EXPORT(add_rows)

// Rows of out are those of a, b and c one behind another, zeros if one is null; b and c begin at the given columns.
template <typename T>
void join_columns(const Tensor<T>& a, const Tensor<T>& b, const Tensor<T>& c, const Tensor<T>& out, int64_t begin_b,
                  int64_t begin_c, int64_t threads) {
    const int64_t rows = out.size[0], width = out.size[1];
    for_each_row(rows, width, threads, [&](int64_t row) {
        const auto copy = [&](const Tensor<T>& part, int64_t begin, int64_t end) {
            if (part) {
                std::copy_n(part.at(row), end - begin, out.at(row, begin));
            } else {
                std::fill_n(out.at(row, begin), end - begin, T(0));
            }
        };
        copy(a, 0, begin_b);
        copy(b, begin_b, begin_c);
        copy(c, begin_c, width);
    });
}
BMOJO_EXPORT(join_columns)

// Each row of logits [rows, classes] gives nll = -log softmax[target] and log_z = logsumexp, and becomes
// softmax - onehot(target) / (1 + 2 z_loss_weight log_z), or rubbish unless with_gradient.
template <typename T>
void cross_entropy(const Tensor<T>& logits, const Tensor<int64_t>& target, const Tensor<T>& nll, const Tensor<T>& log_z,
                   double z_loss_weight, int64_t with_gradient, int64_t threads) {
    const int64_t rows = logits.size[0], classes = logits.size[1];
    for_each_row(rows, classes, threads, [&](int64_t row) {
        T* x = logits.at(row);
        T highest = kMinusInfinity<T>;
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < classes; ++i) highest = x[i] > highest ? x[i] : highest;
        const T picked = x[target(row)] - highest;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < classes; ++i) {
            x[i] = exponential(x[i] - highest);
            sum += x[i];
        }
        const T log_sum = std::log(sum);
        nll(row) = log_sum - picked;
        log_z(row) = highest + log_sum;
        if (!with_gradient) return;
        const T scale = T(1) / sum;
#pragma omp simd
        for (int64_t i = 0; i < classes; ++i) x[i] *= scale;
        x[target(row)] -= T(1) / (T(1) + T(2 * z_loss_weight) * log_z(row));
    });
}
BMOJO_EXPORT(cross_entropy)

}  // namespace bmojo
