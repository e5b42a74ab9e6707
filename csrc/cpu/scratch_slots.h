// Pieces of memory that threads borrow.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace signmaml::cpu {

// The first multiple of `bytes` in it.
template <typename Scalar>
Scalar* aligned(void* workspace, std::uintptr_t bytes = 64) {
    const auto address = reinterpret_cast<std::uintptr_t>(workspace);
    return reinterpret_cast<Scalar*>((address + bytes - 1) / bytes * bytes);
}

// Numbers 0 to count - 1, each lent to one thread at a time. At most `count` threads hold one at once.
class ScratchSlots {
  public:
    explicit ScratchSlots(std::int64_t count) : taken_(static_cast<std::size_t>(count)) {}

    std::int64_t take() {
        for (std::size_t i = 0;; i = (i + 1) % taken_.size()) {
            if (!taken_[i].exchange(true, std::memory_order_acquire)) return static_cast<std::int64_t>(i);
        }
    }
    void give_back(std::int64_t slot) {
        taken_[static_cast<std::size_t>(slot)].store(false, std::memory_order_release);
    }

  private:
    std::vector<std::atomic<bool>> taken_;
};

}  // namespace signmaml::cpu
