// How an accumulation of meta-gradients is divided into pieces. Pure functions of sizes and addresses.
// A column's sum always runs over tasks 0, 1, ..., T - 1, so no choice here changes a result.
#pragma once

#include <cstdint>

#include "plan/math.h"
#include "plan/sign_step.h"

namespace signmaml {

inline constexpr int kMetaAccumulateBlock = 128;
// Tasks whose loads a thread has in flight at once; the sums stay in order.
inline constexpr int kMetaAccumulateUnroll = 8;
inline constexpr int kMetaAccumulateBlocksPerMultiprocessor = 32;

struct MetaAccumulateGrid {
    int vector;           // columns of one access: 16 bytes' worth, or 1
    int block;            // threads of a block
    int unroll;           // tasks in flight in a thread
    std::int64_t head;    // columns before the first 16-byte boundary of out
    std::int64_t bodies;  // vectors after them
    std::int64_t tail;    // columns left over
    std::int64_t blocks;  // over vectors, then over single columns
};

// Whether all rows of grads and out reach 16-byte boundaries in the same columns: their bases and the row length agree.
constexpr bool rows_congruent(std::int64_t parameters, int scalar_bytes, std::uint64_t out_address,
                              std::uint64_t grads_address, std::int64_t tasks) {
    return congruent(out_address, grads_address) && (tasks <= 1 || parameters % (16 / scalar_bytes) == 0);
}

constexpr MetaAccumulateGrid plan_meta_accumulate(std::int64_t tasks, std::int64_t parameters, int scalar_bytes,
                                                  std::uint64_t out_address, std::uint64_t grads_address,
                                                  int multiprocessors) {
    const std::int64_t width = 16 / scalar_bytes;
    // With few columns, a thread takes one: more threads put more bytes in flight.
    const std::int64_t wide_threads = std::int64_t{multiprocessors} * 4 * kMetaAccumulateBlock;
    const bool wide = rows_congruent(parameters, scalar_bytes, out_address, grads_address, tasks) &&
                      parameters / width >= wide_threads;
    const int vector = wide ? static_cast<int>(width) : 1;
    const auto misaligned = static_cast<std::int64_t>(out_address % 16) / scalar_bytes;
    const std::int64_t head = wide ? smaller(parameters, (width - misaligned) % width) : 0;
    const std::int64_t bodies = (parameters - head) / vector;
    const std::int64_t tail = parameters - head - bodies * vector;
    const std::int64_t budget = std::int64_t{multiprocessors} * kMetaAccumulateBlocksPerMultiprocessor;
    const std::int64_t blocks = ceil_div(bodies + head + tail, kMetaAccumulateBlock);
    return {
        vector, kMetaAccumulateBlock, kMetaAccumulateUnroll, head, bodies, tail, larger(1, smaller(blocks, budget))};
}

// The sums of one piece and the rows being added to them fit in L1 together.
inline constexpr std::int64_t kLargestColumnChunk = 1024;
inline constexpr std::int64_t kSmallestColumnChunk = 256;

constexpr CpuPlan plan_meta_accumulate_cpu(std::int64_t tasks, std::int64_t parameters, int threads) {
    const std::int64_t share = ceil_div(ceil_div(parameters, larger(1, threads)), 64) * 64;
    const std::int64_t chunk = larger(kSmallestColumnChunk, smaller(kLargestColumnChunk, share));
    const std::int64_t items = ceil_div(parameters, chunk);
    return {chunk, items, items, threads_worth_waking(tasks * parameters, items, threads)};
}

}  // namespace signmaml
