// Innovation scores in one pass over y: of each row the prediction by its taps, and both norms. And the selection.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpp/parallel.h"
#include "cpp/tensor.h"
#include "innovation_select/cpp_score.h"

namespace bmojo {
namespace {

constexpr int64_t kScoredRows = 16;  // of one task

}  // namespace

// y [b, t, d], past [b, K, d] (may be null) and weight [K, d] have contiguous rows, doc_ids [b, t] may be null;
// error [b, t] is written.
template <typename T>
void innovation_scores(const Tensor<T>& y, const Tensor<T>& weight, const Tensor<T>& past,
                       const Tensor<int64_t>& doc_ids, const Tensor<T>& error, double eps, int64_t threads) {
    const int64_t batch = y.size[0], t = y.size[1], width = y.size[2], num_taps = weight.size[0];
    parallel_blocks(batch * t, kScoredRows, threads, [&](int64_t begin, int64_t end) {
        const Scratch<Tap<T>> taps(num_taps);
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / t, i = row % t;
            int64_t present = 0;
            for (int64_t lag = 1; lag <= num_taps; ++lag) {
                const bool inside = lag <= i;
                if (inside ? doc_ids && doc_ids(b, i - lag) != doc_ids(b, i) : !past) continue;
                taps[present++] = {inside ? y.at(b, i - lag) : past.at(b, num_taps + i - lag), weight.at(lag - 1)};
            }
            error(b, i) = score<T>(y.at(b, i), taps, present, width, eps);
        }
    });
}
BMOJO_EXPORT(innovation_scores)

// The rows kept at each chunk boundary, best first, then -1: index [b, chunks, M] is written. rank, position and,
// if not null, docs are [b, rows]: `slots` kept before, the positions just before `start`, and the queries.
template <typename T>
void innovation_select(const Tensor<T>& rank, const Tensor<int64_t>& position, const Tensor<int64_t>& docs,
                       const Tensor<int64_t>& index, int64_t queries, int64_t chunk_size, int64_t window_size,
                       int64_t start, int64_t slots, int64_t threads) {
    struct Candidate {
        T rank;
        int64_t row;
    };
    const int64_t row_of_0 = rank.size[1] - queries - start;  // of position 0, if there is such a row
    const int64_t first = slots - row_of_0;                            // position of the first row that is no slot
    parallel_for(rank.size[0], threads, [&](int64_t b) {
        std::vector<Candidate> candidates;
        std::vector<int64_t> kept(index.size[2], -1);
        for (int64_t m = 0; m < slots; ++m) kept[m] = position(b, m) < 0 ? -1 : m;
        int64_t merged = start % chunk_size ? first : std::max(first, start - chunk_size - window_size + 1);
        for (int64_t j = 0; j < index.size[1]; ++j) {
            const int64_t boundary = start + j * chunk_size;
            const int64_t left = boundary % chunk_size ? merged : std::max(merged, boundary - window_size + 1);
            if (left > merged || (docs && boundary % chunk_size == 0)) {
                candidates.clear();
                const auto consider = [&](int64_t row) {
                    if (row < 0 || position(b, row) < 0) return;
                    if (!(rank(b, row) > -std::numeric_limits<T>::infinity())) return;  // never kept
                    if (docs && docs(b, row) != docs(b, row_of_0 + boundary)) return;
                    candidates.push_back({rank(b, row), row});
                };
                for (const int64_t row : kept) consider(row);
                for (; merged < left; ++merged) consider(row_of_0 + merged);
                // what was kept comes first and the rest is in order of position: ties go to the earlier one
                std::stable_sort(candidates.begin(), candidates.end(),
                                 [](const Candidate& a, const Candidate& b) { return a.rank > b.rank; });
                const int64_t found = std::min<int64_t>(candidates.size(), kept.size());
                for (int64_t m = 0; m < found; ++m) kept[m] = candidates[m].row;
                std::fill(kept.begin() + found, kept.end(), -1);
            }
            for (int64_t m = 0; m < index.size[2]; ++m) index(b, j, m) = kept[m];
        }
    });
}
BMOJO_EXPORT(innovation_select)

}  // namespace bmojo
