#include "emulation/machine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>

#include "emulation/fiber.h"

namespace signmaml::emulation {
namespace {

enum class State { kReady, kAtBlockBarrier, kAtWarpOperation, kDone };

struct Block;

struct Copy {
    void* target;
    const void* source;
    std::int64_t bytes;
};

struct Thread {
    Block* block = nullptr;
    Index3 index;
    Visitor who;
    State state = State::kReady;
    // The warp operation that it waits at.
    const char* operation = "";
    unsigned lanes = 0;
    void* operand = nullptr;
    Combine combine = nullptr;
    std::unique_ptr<Fiber> fiber;
    std::vector<Copy> started;                 // not committed yet
    std::vector<std::vector<Copy>> committed;  // groups, oldest first
    std::vector<Event> trace;                  // since it last met the other lanes of its warp

    int lane() const { return who.thread % kWarpThreads; }
};

struct Block {
    Index3 index;
    std::vector<char> shared;
    std::unique_ptr<TrackedMemory> tracked_shared;
    std::vector<Thread> threads;
    std::int64_t finished = 0;
    std::int64_t at_barrier = 0;
};

struct Launch {
    Extent3 grid, block_size;
    std::vector<TrackedMemory> global;
    std::string failure;
    std::unique_ptr<Counter> counter;  // if the launch is counted
    bool in_full;                      // all of its blocks run
};

thread_local Thread* current = nullptr;
thread_local Launch* running = nullptr;

// Launches that are counted now, by any host thread. Asked first, because kernels ask at every basic block and access.
std::atomic<int> counted_launches{0};

bool is_counted() {
    if (counted_launches.load(std::memory_order_relaxed) == 0) return false;
    return running != nullptr && running->counter != nullptr && current != nullptr;
}

std::string place(const Thread& thread) { return describe(thread.who); }

std::string waits_for(const Thread& thread) {
    switch (thread.state) {
        case State::kDone: return "has ended";
        case State::kAtBlockBarrier: return "waits at a block barrier";
        case State::kAtWarpOperation: return std::string("waits at ") + thread.operation;
        default: return "runs";
    }
}

[[noreturn]] void diverged(const Thread& a, const Thread& b) {
    throw std::runtime_error("divergence: " + place(a) + " " + waits_for(a) + ", but " + place(b) + " " + waits_for(b));
}

Array array_of(std::uintptr_t address) {
    for (const Buffer& buffer : settings().buffers) {
        if (address >= buffer.address && address < buffer.address + static_cast<std::uintptr_t>(buffer.bytes)) {
            return {buffer.name, buffer.address};
        }
    }
    throw std::runtime_error("out of bounds: an address that belongs to no argument");
}

// The lanes of a warp meet.
void join_traces(Block& block, int warp, unsigned lanes) {
    std::array<std::vector<Event>*, kWarpThreads> traces{};
    for (int lane = 0; lane < kWarpThreads; ++lane) {
        const auto thread = static_cast<std::size_t>(warp * kWarpThreads + lane);
        if ((lanes >> lane & 1u) != 0 && thread < block.threads.size()) traces[lane] = &block.threads[thread].trace;
    }
    running->counter->join(warp, traces, array_of);
}

void join_all_traces(Block& block) {
    for (int warp = 0; warp * kWarpThreads < static_cast<int>(block.threads.size()); ++warp) {
        join_traces(block, warp, 0xffffffffu);
    }
}

void release_block_if_complete(Block& block) {
    if (block.at_barrier == 0 || block.at_barrier != static_cast<std::int64_t>(block.threads.size())) return;
    if (running->counter) {
        join_all_traces(block);
        running->counter->end_interval();
    }
    block.at_barrier = 0;
    for (Thread& thread : block.threads) {
        thread.state = State::kReady;
        ++thread.who.block_epoch;
    }
}

// Called when a lane arrives: completes the operation if the lane is the last to arrive.
void complete_warp_operation(Thread& arrived) {
    Block& block = *arrived.block;
    const int first = arrived.who.warp * kWarpThreads;
    const auto size = static_cast<int>(block.threads.size());
    void* operands[kWarpThreads] = {};
    for (int lane = 0; lane < kWarpThreads; ++lane) {
        if ((arrived.lanes >> lane & 1u) == 0) continue;
        if (first + lane >= size) {
            throw std::runtime_error("divergence: " + place(arrived) + " names lane " + std::to_string(lane) + " in " +
                                     arrived.operation + ", which its warp does not have");
        }
        Thread& other = block.threads[first + lane];
        if (other.state == State::kDone || other.state == State::kAtBlockBarrier) diverged(arrived, other);
        if (other.state != State::kAtWarpOperation) return;  // still on its way
        if (other.lanes != arrived.lanes || std::strcmp(other.operation, arrived.operation) != 0)
            diverged(arrived, other);
        operands[lane] = other.operand;
    }
    if (running->counter) join_traces(block, arrived.who.warp, arrived.lanes);
    arrived.combine(operands);
    const bool barrier = std::strcmp(arrived.operation, "warp_barrier") == 0;
    const unsigned lanes = arrived.lanes;
    for (int lane = 0; lane < kWarpThreads; ++lane) {
        if ((lanes >> lane & 1u) == 0) continue;
        Thread& other = block.threads[first + lane];
        other.state = State::kReady;
        if (barrier) ++other.who.warp_epoch;
    }
}

std::unique_ptr<Block> make_block(const Launch& launch, std::int64_t number, std::int64_t shared_bytes,
                                  const std::function<void()>& kernel) {
    auto block = std::make_unique<Block>();
    const auto n = static_cast<std::uint64_t>(number);
    block->index = {static_cast<unsigned>(n % launch.grid.x), static_cast<unsigned>(n / launch.grid.x % launch.grid.y),
                    static_cast<unsigned>(n / launch.grid.x / launch.grid.y)};
    block->shared.assign(static_cast<std::size_t>(shared_bytes), '\xff');
    block->tracked_shared =
        std::make_unique<TrackedMemory>("shared memory", block->shared.data(), block->shared.size(), 2, true, false);
    const Extent3 size = launch.block_size;
    block->threads.resize(static_cast<std::size_t>(size.count()));
    for (std::size_t i = 0; i < block->threads.size(); ++i) {
        Thread& thread = block->threads[i];
        thread.block = block.get();
        const auto t = static_cast<unsigned>(i);
        thread.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
        thread.who.block = number;
        thread.who.thread = static_cast<int>(i);
        thread.who.warp = static_cast<int>(i) / kWarpThreads;
        thread.fiber = std::make_unique<Fiber>([&kernel] {
            try {
                kernel();
            } catch (const std::exception& error) {
                running->failure = error.what();
            }
        });
    }
    return block;
}

// Lets one thread run until it waits or ends.
void run(Thread& thread) {
    current = &thread;
    thread.fiber->resume();
    current = nullptr;
    if (!running->failure.empty()) throw std::runtime_error(running->failure);
    Block& block = *thread.block;
    if (thread.fiber->finished()) {
        thread.state = State::kDone;
        ++block.finished;
    } else if (thread.state == State::kAtBlockBarrier) {
        ++block.at_barrier;
        release_block_if_complete(block);
    } else if (thread.state == State::kAtWarpOperation) {
        complete_warp_operation(thread);
    }
}

// Some thread waits forever: report which threads it waits for.
[[noreturn]] void report_stuck(const std::vector<std::unique_ptr<Block>>& alive) {
    for (const auto& block : alive) {
        for (const Thread& thread : block->threads) {
            if (thread.state != State::kAtBlockBarrier && thread.state != State::kAtWarpOperation) continue;
            for (const Thread& other : block->threads) {
                if (other.state != thread.state) diverged(thread, other);
            }
            throw std::runtime_error("divergence: " + place(thread) + " " + waits_for(thread) + " for ever");
        }
    }
    throw std::runtime_error("no thread can run");
}

// All blocks; of a launch that is counted, some that lie evenly over the grid.
std::vector<std::int64_t> blocks_to_run(const Launch& launch) {
    const std::int64_t all = launch.grid.count();
    const std::int64_t some = launch.in_full ? all : std::min<std::int64_t>(all, settings().counted_blocks);
    std::vector<std::int64_t> blocks(static_cast<std::size_t>(some));
    for (std::int64_t i = 0; i < some; ++i) blocks[static_cast<std::size_t>(i)] = (2 * i + 1) * all / (2 * some);
    return blocks;
}

void run_all(Launch& launch, std::int64_t shared_bytes, const std::function<void()>& kernel) {
    std::mt19937_64 random(settings().seed);
    const auto below = [&random](std::size_t n) { return static_cast<std::size_t>(random() % n); };
    std::vector<std::int64_t> waiting = blocks_to_run(launch);
    // A counter counts one block at a time.
    const auto most_alive = static_cast<std::size_t>(launch.counter ? 1 : settings().blocks_alive);
    std::vector<std::unique_ptr<Block>> alive;
    std::vector<Thread*> ready;
    while (!waiting.empty() || !alive.empty()) {
        while (!waiting.empty() && alive.size() < most_alive) {
            std::swap(waiting[below(waiting.size())], waiting.back());
            alive.push_back(make_block(launch, waiting.back(), shared_bytes, kernel));
            waiting.pop_back();
        }
        ready.clear();
        for (const auto& block : alive) {
            for (Thread& thread : block->threads) {
                if (thread.state == State::kReady) ready.push_back(&thread);
            }
        }
        if (ready.empty()) report_stuck(alive);
        // Run every ready thread once, in random order, before collecting the ready threads again.
        while (!ready.empty()) {
            std::swap(ready[below(ready.size())], ready.back());
            run(*ready.back());
            ready.pop_back();
        }
        for (std::size_t i = alive.size(); i-- > 0;) {
            if (alive[i]->finished == static_cast<std::int64_t>(alive[i]->threads.size())) {
                if (launch.counter) {
                    join_all_traces(*alive[i]);
                    launch.counter->end_block();
                }
                alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(i));
            }
        }
    }
}

}  // namespace

Settings& settings() {
    thread_local Settings of_this_thread;
    return of_this_thread;
}

void launch(const std::string& name, Extent3 grid, Extent3 block, std::int64_t shared_bytes,
            const std::function<void()>& kernel) {
    if (grid.count() == 0 || block.count() == 0 || block.count() > 1024) {
        throw std::runtime_error("launch of " + name + ": a grid of " + std::to_string(grid.count()) + " blocks of " +
                                 std::to_string(block.count()) + " threads");
    }
    const bool counted = settings().counted_blocks > 0;
    Launch launch{grid, block, {}, {}, nullptr, !counted || settings().counted_in_full.count(name) > 0};
    if (counted) {
        LaunchCounts counts;
        counts.kernel = name;
        counts.grid = {grid.x, grid.y, grid.z};
        counts.threads = block.count();
        counts.shared_bytes = shared_bytes;
        counts.blocks = grid.count();
        settings().counts.push_back(std::move(counts));
        launch.counter = std::make_unique<Counter>(settings().counts.back());
    }
    for (Buffer& buffer : settings().buffers) {
        if (counted) break;
        auto* memory = reinterpret_cast<void*>(buffer.address);
        const auto bytes = static_cast<std::size_t>(buffer.bytes);
        if (buffer.unwritten) std::memset(memory, 0xff, bytes);
        launch.global.emplace_back(buffer.name, memory, bytes, static_cast<std::size_t>(buffer.element_bytes),
                                   buffer.writable, !buffer.unwritten);
        buffer.unwritten = false;  // later launches may read what this one wrote
    }
    running = &launch;
    counted_launches += counted ? 1 : 0;
    const auto end = [counted] {
        running = nullptr;
        counted_launches -= counted ? 1 : 0;
    };
    try {
        run_all(launch, shared_bytes, kernel);
    } catch (const std::exception& error) {
        end();
        throw std::runtime_error(name + ": " + error.what());
    }
    end();
}

Index3 thread_index() { return current->index; }
Index3 block_index() { return current->block->index; }
Extent3 block_extent() { return running->block_size; }
Extent3 grid_extent() { return running->grid; }
char* shared_memory() { return current->block->shared.data(); }
int lane() { return current->lane(); }

void fault(const std::string& what) { throw std::runtime_error(what + " by " + place(*current)); }

void out_of_shared_array(std::int64_t element, std::int64_t count) {
    fault("out of bounds: element " + std::to_string(element) + " of a shared array of " + std::to_string(count) +
          ", touched");
}

namespace {

// Where a function that is called by device code goes back to.
#define SIGNMAML_CALLER reinterpret_cast<std::uintptr_t>(__builtin_return_address(0))

void write_down(std::uintptr_t code, Place what, std::int64_t bytes = 0, const void* address = nullptr,
                const void* to_shared = nullptr) {
    const auto in_shared = [](const void* at) {
        return static_cast<std::uintptr_t>(static_cast<const char*>(at) - current->block->shared.data());
    };
    const bool shared = what == Place::kSharedLoad || what == Place::kSharedStore;
    current->trace.push_back({code, what, static_cast<int>(bytes),
                              shared ? in_shared(address) : reinterpret_cast<std::uintptr_t>(address),
                              to_shared == nullptr ? 0 : in_shared(to_shared)});
}

Place place_of_operation(const char* name) {
    const auto starts = [name](const char* with) { return std::strncmp(name, with, std::strlen(with)) == 0; };
    if (starts("mma")) return Place::kMma;
    return starts("shuffle") ? Place::kShuffle : Place::kWarpBarrier;
}

}  // namespace

void visit(const void* address, std::int64_t bytes, Access access) {
    if (reinterpret_cast<std::uintptr_t>(address) % static_cast<std::uintptr_t>(bytes) != 0) {
        fault("misaligned access of " + std::to_string(bytes) + " bytes");
    }
    const auto size = static_cast<std::size_t>(bytes);
    TrackedMemory& shared = *current->block->tracked_shared;
    if (is_counted()) {
        const bool reads = access == Access::kRead;
        const Place of_shared = reads ? Place::kSharedLoad : Place::kSharedStore;
        const Place of_global = reads ? Place::kGlobalLoad : Place::kGlobalStore;
        return write_down(SIGNMAML_CALLER, shared.holds(address) ? of_shared : of_global, bytes, address);
    }
    if (shared.holds(address)) return shared.visit(address, size, access, current->who);
    for (TrackedMemory& memory : running->global) {
        if (memory.holds(address)) return memory.visit(address, size, access, current->who);
    }
    fault("out of bounds: an address that belongs to no argument, touched");
}

void block_barrier() {
    if (is_counted()) write_down(SIGNMAML_CALLER, Place::kBlockBarrier);
    current->state = State::kAtBlockBarrier;
    current->fiber->pause();
}

void warp_operation(const char* name, unsigned lanes, void* operand, Combine combine) {
    if ((lanes >> current->lane() & 1u) == 0) fault(std::string(name) + " without the calling lane in its mask");
    // The reads of ldmatrix have been written down.
    if (is_counted() && std::strcmp(name, "ldmatrix_x4") != 0) write_down(SIGNMAML_CALLER, place_of_operation(name));
    current->state = State::kAtWarpOperation;
    current->operation = name;
    current->lanes = lanes;
    current->operand = operand;
    current->combine = combine;
    current->fiber->pause();
}

void start_copy(void* target, const void* source, std::int64_t bytes) {
    if (is_counted()) {
        write_down(SIGNMAML_CALLER, Place::kCopy, bytes, source, target);
    } else {
        visit(source, bytes, Access::kRead);
        visit(target, bytes, Access::kWrite);
    }
    std::memset(target, 0xff, static_cast<std::size_t>(bytes));
    current->started.push_back({target, source, bytes});
}

void commit_copies() {
    current->committed.push_back(std::move(current->started));
    current->started.clear();
}

void wait_for_copies(int pending_groups) {
    auto& groups = current->committed;
    while (groups.size() > static_cast<std::size_t>(pending_groups)) {
        for (const Copy& copy : groups.front()) {
            if (!is_counted()) visit(copy.target, copy.bytes, Access::kWrite);
            std::memcpy(copy.target, copy.source, static_cast<std::size_t>(copy.bytes));
        }
        groups.erase(groups.begin());
    }
}

}  // namespace signmaml::emulation

// Called at every basic block of a kernel.
extern "C" void __sanitizer_cov_trace_pc() {
    using namespace signmaml::emulation;
    if (is_counted()) write_down(SIGNMAML_CALLER, Place::kBasicBlock);
}

namespace signmaml {

// The twin of launch/device.cu.
int multiprocessors(int) { return emulation::settings().multiprocessors; }

}  // namespace signmaml
