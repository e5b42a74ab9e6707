// How a sign step is divided into pieces. Pure functions of sizes and addresses.
#pragma once

#include <cstdint>

#include "params/sign_step.h"
#include "plan/math.h"

namespace signmaml {

// How a table with `entries` entries maps to parameters. Callers may pass one entry per parameter, one per segment, or
// (learning rates) one in all. If two of these counts are equal, either both mean the same or the segments win.
constexpr Spread spread_of(std::int64_t entries, std::int64_t parameters, std::int64_t segments) {
    if (segments > 0 && entries == segments) return Spread::kPerSegment;
    return entries == parameters ? Spread::kPerElement : Spread::kAll;
}

// Threads of a block: small enough to fill a multiprocessor evenly, large enough to need few blocks.
inline constexpr int kSignStepBlock = 256;
// Vectors that a thread has in flight at once. Four 16-byte loads of two streams cover the latency of device memory.
inline constexpr int kSignStepUnroll = 4;
// Blocks per multiprocessor before blocks loop: several waves, so that the last one is short.
inline constexpr int kSignStepBlocksPerMultiprocessor = 32;
// The y extent of a grid is 16 bits wide.
inline constexpr std::int64_t kLargestGridY = 65535;

struct SignStepGrid {
    int vector;                  // elements of one access: 16 bytes' worth, or 1 where rows are not congruent
    int block;                   // threads of a block
    int unroll;                  // vectors that a thread has in flight
    std::int64_t tiles_per_row;  // pieces of block * unroll * vector parameters; the last may be short
    std::int64_t blocks_x;       // over the tiles of a row
    std::int64_t blocks_y;       // over tasks
};

// Rows start at base + t * P, so params and grads reach 16-byte boundaries together exactly if their bases do.
constexpr bool congruent(std::uint64_t a, std::uint64_t b) { return (a - b) % 16 == 0; }

constexpr SignStepGrid sign_step_grid(std::int64_t tasks, std::int64_t parameters, int vector, int multiprocessors) {
    const std::int64_t tile = std::int64_t{kSignStepBlock} * kSignStepUnroll * vector;
    const std::int64_t tiles_per_row = ceil_div(parameters, tile);
    const std::int64_t budget = std::int64_t{multiprocessors} * kSignStepBlocksPerMultiprocessor;
    const std::int64_t blocks_x = larger(1, smaller(tiles_per_row, budget));
    const std::int64_t blocks_y = larger(1, smaller(smaller(tasks, kLargestGridY), ceil_div(budget, blocks_x)));
    return {vector, kSignStepBlock, kSignStepUnroll, tiles_per_row, blocks_x, blocks_y};
}

constexpr SignStepGrid plan_sign_step(std::int64_t tasks, std::int64_t parameters, int scalar_bytes,
                                      std::uint64_t params_address, std::uint64_t grads_address, int multiprocessors) {
    const int vector = congruent(params_address, grads_address) ? 16 / scalar_bytes : 1;
    return sign_step_grid(tasks, parameters, vector, multiprocessors);
}

struct CpuPlan {
    std::int64_t chunk;           // elements per piece of a row
    std::int64_t chunks_per_row;  // the last may be short
    std::int64_t items;           // pieces in all
    int threads;                  // how many are worth waking
};

// Waking a thread takes longer than processing fewer elements than this.
inline constexpr std::int64_t kElementsWorthAThread = 65536;
// Pieces of a row: long enough to make the loop's start and end cheap, short enough to balance.
inline constexpr std::int64_t kSignStepChunk = 16384;

constexpr int threads_worth_waking(std::int64_t elements, std::int64_t items, int threads) {
    const std::int64_t worth = larger(1, elements / kElementsWorthAThread);
    return static_cast<int>(larger(1, smaller(smaller(worth, items), threads)));
}

constexpr CpuPlan plan_sign_step_cpu(std::int64_t tasks, std::int64_t parameters, int threads) {
    const std::int64_t chunks_per_row = ceil_div(parameters, kSignStepChunk);
    const std::int64_t items = tasks * chunks_per_row;
    return {kSignStepChunk, chunks_per_row, items, threads_worth_waking(tasks * parameters, items, threads)};
}

}  // namespace signmaml
