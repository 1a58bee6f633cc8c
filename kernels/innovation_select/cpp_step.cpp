// A decoding step of the eidetic memory: the token's score, and at the start of a chunk the slots' next tokens.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpp/parallel.h"
#include "cpp/tensor.h"
#include "innovation_select/cpp_score.h"

namespace bmojo {
namespace {

// A token that may be kept: a row of the rings, or of the slots.
template <typename T>
struct Kept {
    T log_e;
    int64_t position;
    const T *k, *v;  // of its first head
    int64_t k_stride, v_stride;
    double rank;
};

}  // namespace

// See StepInputs. given_b may be null; tau 0: none. Of each tensor the last dimension is contiguous.
template <typename T>
void innovation_step(const Tensor<T>& y_bd, const Tensor<int64_t>& position_b, const Tensor<T>& weight_kd,
                     const Tensor<T>& past_bkd, const Tensor<T>& log_e_br, const Tensor<T>& k_brhp,
                     const Tensor<T>& v_brhp, const Tensor<T>& slot_k_bmhp, const Tensor<T>& slot_v_bmhp,
                     const Tensor<T>& slot_log_e_bm, const Tensor<int64_t>& slot_position_bm,
                     const Tensor<T>& given_b, const Tensor<T>& score_b, int64_t chunk_size, double tau, double eps,
                     double lowest, int64_t threads) {
    const int64_t width = y_bd.size[1], num_taps = weight_kd.size[0], size = log_e_br.size[1];
    const int64_t slots = slot_k_bmhp.size[1], heads = slot_k_bmhp.size[2], p = slot_k_bmhp.size[3];
    parallel_for(y_bd.size[0], threads, [&](int64_t b) {
        if (given_b) {
            score_b(b) = given_b(b);
        } else {
            const Scratch<Tap<T>> taps(num_taps);
            for (int64_t lag = 1; lag <= num_taps; ++lag) taps[lag - 1] = {past_bkd.at(b, num_taps - lag), weight_kd.at(lag - 1)};
            score_b(b) = std::log(std::max(score<T>(y_bd.at(b), taps, num_taps, width, eps), T(lowest)));
        }
        for (int64_t k = 0; k + 1 < num_taps; ++k) std::copy_n(past_bkd.at(b, k + 1), width, past_bkd.at(b, k));
        std::copy_n(y_bd.at(b), width, past_bkd.at(b, num_taps - 1));
        const int64_t position = position_b(b);
        log_e_br(b, position % size) = score_b(b);
        if (position % chunk_size) return;

        std::vector<Kept<T>> found;
        const auto consider = [&](T log_e, int64_t at, const Tensor<T>& k, const Tensor<T>& v, int64_t row) {
            if (at < 0 || !(log_e > -std::numeric_limits<T>::infinity())) return;  // empty, or never kept
            const double rank = tau ? double(log_e) * tau + double(at) : double(log_e);
            found.push_back({log_e, at, k.at(b, row), v.at(b, row), k.stride[2], v.stride[2], rank});
        };
        for (int64_t m = 0; m < slots; ++m) consider(slot_log_e_bm(b, m), slot_position_bm(b, m), slot_k_bmhp, slot_v_bmhp, m);
        for (int64_t left = std::max<int64_t>(0, position - size + 1); left <= position - size + chunk_size; ++left)
            consider(log_e_br(b, left % size), left, k_brhp, v_brhp, left % size);
        // what was kept comes first and the rest is in order of position: ties go to the earlier one
        std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.rank > b.rank; });
        found.resize(std::min<size_t>(found.size(), slots));
        const Scratch<T> rows(2 * slots * heads * p);  // slots are read as they are written
        T* row = rows;
        for (const Kept<T>& one : found)
            for (int64_t h = 0; h < heads; ++h, row += 2 * p) {
                std::copy_n(one.k + h * one.k_stride, p, row);
                std::copy_n(one.v + h * one.v_stride, p, row + p);
            }
        row = rows;
        for (int64_t m = 0; m < slots; ++m) {
            const bool full = m < int64_t(found.size());
            slot_position_bm(b, m) = full ? found[m].position : -1;
            if (!full) continue;
            slot_log_e_bm(b, m) = found[m].log_e;
            for (int64_t h = 0; h < heads; ++h, row += 2 * p) {
                std::copy_n(row, p, slot_k_bmhp.at(b, m, h));
                std::copy_n(row + p, p, slot_v_bmhp.at(b, m, h));
            }
        }
    });
}
BMOJO_EXPORT(innovation_step)

}  // namespace bmojo
