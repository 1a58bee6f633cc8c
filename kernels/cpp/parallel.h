// Work shared among torch's threads. What a task does must not depend on which thread does it, nor on how many there
// are: results are then the same bits on any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace bmojo {

// body(task) for each of `tasks`, whoever is free next.
template <typename Body>
inline void parallel_for(int64_t tasks, int64_t threads, const Body& body) {
    const int team = static_cast<int>(std::min(tasks, threads));
#pragma omp parallel for schedule(dynamic, 1) num_threads(team) if (team > 1)
    for (int64_t task = 0; task < tasks; ++task) body(task);
}

// body(begin, end) for blocks of `block` of `count` items.
template <typename Body>
inline void parallel_blocks(int64_t count, int64_t block, int64_t threads, const Body& body) {
    parallel_for((count + block - 1) / block, threads,
                 [&](int64_t i) { body(i * block, std::min(count, (i + 1) * block)); });
}

// Memory of a task's own, aligned to vectors and not initialised. Threads keep what they have had for their next tasks,
// because memory new from the system costs a page fault for every 4 KiB. For tiles and partial sums, not for whole sequences.
template <typename T>
class Scratch {
  public:
    explicit Scratch(int64_t count) : block_(take(std::max<int64_t>(count, 1) * sizeof(T))) {}
    ~Scratch() { kept().push_back(block_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    operator T*() const { return static_cast<T*>(block_.memory); }

  private:
    struct Block {
        void* memory;
        size_t bytes;
    };

    struct Kept : std::vector<Block> {
        ~Kept() {
            for (const Block& block : *this) ::operator delete(block.memory, kAlignment);
        }
    };

    static constexpr std::align_val_t kAlignment{64};

    static Kept& kept() {
        thread_local Kept blocks;
        return blocks;
    }

    static Block take(size_t bytes) {
        Kept& blocks = kept();
        for (Block& block : blocks) {
            if (block.bytes >= bytes && block.bytes <= 4 * bytes) {
                const Block found = block;
                block = blocks.back();
                blocks.pop_back();
                return found;
            }
        }
        return {::operator new(bytes, kAlignment), bytes};
    }

    const Block block_;
};

}  // namespace bmojo
