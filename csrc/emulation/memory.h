// Memory that tracks its bounds and its last accesses, so that wrong indices and races are reported.
//
// Two accesses to an element race if different threads make them, at least one writes, and no barrier separates them: a
// block barrier, or a warp barrier if both threads are in one warp. Threads of different blocks are never ordered
// within a launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace signmaml::emulation {

// The thread that accesses memory, and how many barriers it has passed.
struct Visitor {
    std::int64_t block = -1;
    int thread = -1;
    int warp = -1;
    std::int64_t block_epoch = 0;  // block barriers that its block has passed
    std::int64_t warp_epoch = 0;   // warp barriers that its warp has passed

    bool exists() const { return block >= 0; }
};

enum class Access { kRead, kWrite, kFlag };  // kFlag: a write of the same value by all threads that write

class TrackedMemory {
  public:
    // `bytes` of memory at `base` in elements of `element_bytes`. Unless `starts_written` (shared memory and outputs
    // start unwritten), reading an element before it has been written is an error.
    TrackedMemory(std::string name, void* base, std::size_t bytes, std::size_t element_bytes, bool writable,
                  bool starts_written);

    bool holds(const void* address) const;
    // Throws std::runtime_error naming the memory, the element and the threads, unless the access is valid.
    void visit(const void* address, std::size_t bytes, Access access, const Visitor& who);

    const std::string& name() const { return name_; }

  private:
    // The threads that have read an element since it was written. Only the last reader is stored; the flags say whether
    // other readers exist that no barrier separates from it.
    struct Readers {
        Visitor last;
        bool several_threads = false;  // of one warp, since its last barrier
        bool several_warps = false;    // of one block, since its last barrier
        bool several_blocks = false;

        void add(const Visitor& who);
        bool race_with_writer(const Visitor& who) const;
    };

    struct Element {
        Visitor writer;
        Readers readers;
        bool by_flag = false;  // the last write was one of many equal ones
        bool written = false;
    };

    std::string name_;
    char* base_;
    std::size_t bytes_;
    std::size_t element_bytes_;
    bool writable_;
    std::vector<Element> elements_;
};

// "block 3, thread 17"
std::string describe(const Visitor& who);

}  // namespace signmaml::emulation
