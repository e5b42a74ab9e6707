// The emulated GPU: runs the threads of a launch as fibers in random order, and reports errors that a real GPU would
// ignore or hang on. Each host thread can run one launch at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "emulation/counting.h"
#include "emulation/memory.h"
#include "emulation/tensor_cores.h"

namespace signmaml::emulation {

struct Index3 {
    unsigned x = 0, y = 0, z = 0;
};

struct Extent3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr Extent3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    std::int64_t count() const { return std::int64_t{x} * y * z; }
};

// Global memory that the next launches may touch; anything else is out of bounds.
struct Buffer {
    std::string name;
    std::uintptr_t address;
    std::int64_t bytes;
    std::int64_t element_bytes;
    bool writable;
    bool unwritten = false;  // an output: holds NaN, and reading it is an error, until a launch has written it
};

struct Settings {
    std::uint64_t seed = 0;                          // of the order of threads and blocks
    int blocks_alive = 1;                            // blocks that run at the same time
    int multiprocessors = 2;                         // the number that plans are given
    TensorCores tensor_cores = tensor_cores_of(80);  // those whose sums lose most
    std::vector<Buffer> buffers;
    // If positive, launches are counted instead of checked, and only this many of their blocks run: all of the kernels
    // that are named.
    int counted_blocks = 0;
    std::set<std::string> counted_in_full;
    std::vector<LaunchCounts> counts;
};

// The settings of the calling host thread.
Settings& settings();

inline constexpr int kWarpThreads = kLanes;

// Runs `kernel` once for each thread. Throws std::runtime_error naming the kernel, block and thread for an access out
// of bounds, a read of unwritten memory, a race, a barrier that not all threads reach, or threads of a warp that wait
// at different operations.
void launch(const std::string& name, Extent3 grid, Extent3 block, std::int64_t shared_bytes,
            const std::function<void()>& kernel);

// ---- what device code calls; only inside a launch

Index3 thread_index();
Index3 block_index();
Extent3 block_extent();
Extent3 grid_extent();

// The block's dynamic shared memory, filled with a pattern that is NaN in every floating-point type.
char* shared_memory();

// Checks an access to global or shared memory, or counts it.
void visit(const void* address, std::int64_t bytes, Access access);

void block_barrier();

// An operation of several lanes of a warp. `combine` is called once all of them have arrived, with the operands in lane
// order; lanes that do not take part have a null operand.
using Combine = void (*)(void* const operands[kWarpThreads]);
void warp_operation(const char* name, unsigned lanes, void* operand, Combine combine);

int lane();

// Asynchronous copies of the calling thread: their data arrives when a wait covers their group.
void start_copy(void* target, const void* source, std::int64_t bytes);
void commit_copies();
void wait_for_copies(int pending_groups);

[[noreturn]] void fault(const std::string& what);
[[noreturn]] void out_of_shared_array(std::int64_t element, std::int64_t count);

}  // namespace signmaml::emulation
