#include "emulation/machine.h"

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
};

thread_local Thread* current = nullptr;
thread_local Launch* running = nullptr;

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

void release_block_if_complete(Block& block) {
    if (block.at_barrier == 0 || block.at_barrier != static_cast<std::int64_t>(block.threads.size())) return;
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

void run_all(Launch& launch, std::int64_t shared_bytes, const std::function<void()>& kernel) {
    std::mt19937_64 random(settings().seed);
    const auto below = [&random](std::size_t n) { return static_cast<std::size_t>(random() % n); };
    std::vector<std::int64_t> waiting(static_cast<std::size_t>(launch.grid.count()));
    for (std::size_t i = 0; i < waiting.size(); ++i) waiting[i] = static_cast<std::int64_t>(i);
    std::vector<std::unique_ptr<Block>> alive;
    std::vector<Thread*> ready;
    while (!waiting.empty() || !alive.empty()) {
        while (!waiting.empty() && alive.size() < static_cast<std::size_t>(settings().blocks_alive)) {
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
    Launch launch{grid, block, {}, {}};
    for (Buffer& buffer : settings().buffers) {
        auto* memory = reinterpret_cast<void*>(buffer.address);
        const auto bytes = static_cast<std::size_t>(buffer.bytes);
        if (buffer.unwritten) std::memset(memory, 0xff, bytes);
        launch.global.emplace_back(buffer.name, memory, bytes, static_cast<std::size_t>(buffer.element_bytes),
                                   buffer.writable, !buffer.unwritten);
        buffer.unwritten = false;  // later launches may read what this one wrote
    }
    running = &launch;
    try {
        run_all(launch, shared_bytes, kernel);
    } catch (const std::exception& error) {
        running = nullptr;
        throw std::runtime_error(name + ": " + error.what());
    }
    running = nullptr;
}

Index3 thread_index() { return current->index; }
Index3 block_index() { return current->block->index; }
Extent3 block_extent() { return running->block_size; }
Extent3 grid_extent() { return running->grid; }
char* shared_memory() { return current->block->shared.data(); }
int lane() { return current->lane(); }

void fault(const std::string& what) { throw std::runtime_error(what + " by " + place(*current)); }

void visit(const void* address, std::int64_t bytes, Access access) {
    if (reinterpret_cast<std::uintptr_t>(address) % static_cast<std::uintptr_t>(bytes) != 0) {
        fault("misaligned access of " + std::to_string(bytes) + " bytes");
    }
    const auto size = static_cast<std::size_t>(bytes);
    TrackedMemory& shared = *current->block->tracked_shared;
    if (shared.holds(address)) return shared.visit(address, size, access, current->who);
    for (TrackedMemory& memory : running->global) {
        if (memory.holds(address)) return memory.visit(address, size, access, current->who);
    }
    fault("out of bounds: an address that belongs to no argument, touched");
}

void block_barrier() {
    current->state = State::kAtBlockBarrier;
    current->fiber->pause();
}

void warp_operation(const char* name, unsigned lanes, void* operand, Combine combine) {
    if ((lanes >> current->lane() & 1u) == 0) fault(std::string(name) + " without the calling lane in its mask");
    current->state = State::kAtWarpOperation;
    current->operation = name;
    current->lanes = lanes;
    current->operand = operand;
    current->combine = combine;
    current->fiber->pause();
}

void warp_barrier(unsigned lanes) {
    warp_operation("warp_barrier", lanes, &lanes, [](void* const*) {});
}

void start_copy(void* target, const void* source, std::int64_t bytes) {
    visit(source, bytes, Access::kRead);
    visit(target, bytes, Access::kWrite);
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
            visit(copy.target, copy.bytes, Access::kWrite);
            std::memcpy(copy.target, copy.source, static_cast<std::size_t>(copy.bytes));
        }
        groups.erase(groups.begin());
    }
}

}  // namespace signmaml::emulation

namespace signmaml {

// The twin of launch/device.cu.
int multiprocessors(int) { return emulation::settings().multiprocessors; }

}  // namespace signmaml
