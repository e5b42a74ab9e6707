// How a meta-step of a multilayer perceptron is laid out: which threads own a task, and where its weights and
// activations are stored. Pure functions of the shape.
#pragma once

#include <cstdint>

#include "params/mlp_meta_step.h"
#include "plan/math.h"

namespace signmaml {

// Rows of weights have an odd stride, so that threads reading down a column hit different banks.
constexpr std::int64_t mlp_row(std::int64_t inputs) { return inputs | 1; }

constexpr MlpLayout mlp_layout(const MlpShape& shape, std::int64_t count) {
    MlpLayout layout{};
    std::int64_t at = 0;
    std::int64_t widest = 0;
    for (int layer = 0; layer < shape.layers; ++layer) {
        const std::int64_t outputs = shape.widths[layer + 1];
        layout.weight[layer] = at;
        layout.row[layer] = mlp_row(shape.widths[layer]);
        at += outputs * layout.row[layer];
        layout.bias[layer] = at;
        at += outputs;
        widest = larger(widest, outputs);
    }
    for (int layer = 1; layer <= shape.layers; ++layer) {
        layout.activation[layer] = at;
        at += count * shape.widths[layer];
    }
    for (std::int64_t& delta : layout.delta) {
        delta = at;
        at += count * widest;
    }
    layout.size = at;
    return layout;
}

constexpr std::int64_t mlp_parameters(const MlpShape& shape) {
    std::int64_t count = 0;
    for (int layer = 0; layer < shape.layers; ++layer) {
        count += (std::int64_t{shape.widths[layer]} + 1) * shape.widths[layer + 1];
    }
    return count;
}

// Every GPU gives a block this much without opt-in. More would reduce the number of resident blocks, which hide
// latency.
inline constexpr std::int64_t kMlpSharedBytes = 48 * 1024;
// One warp works on a task if no activation has more than 64 elements per thread of the warp; else a block does.
inline constexpr std::int64_t kMlpWarpWork = 32 * 64;
// Warps of all teams on one multiprocessor: as many as can be resident. More would only enlarge the workspace.
inline constexpr std::int64_t kMlpWarpsPerMultiprocessor = 32;

// Whether a block's task can be in shared memory at all: it has an activation beyond kMlpWarpWork and two deltas at
// least as large.
constexpr bool mlp_block_fits_shared(int scalar_bytes) {
    return (3 * (kMlpWarpWork + 1) + kMlpScratch) * scalar_bytes <= kMlpSharedBytes;
}

struct MlpPlan {
    int threads;                     // of a team: one warp, or a block
    bool in_shared;                  // the task's memory is shared memory, else workspace
    std::int64_t teams;              // blocks; a team takes every teams-th task
    std::int64_t shared_bytes;       // of a block
    std::int64_t workspace_scalars;  // of all teams
};

constexpr MlpPlan plan_mlp_meta_step(const MlpShape& shape, std::int64_t tasks, std::int64_t support,
                                     std::int64_t query, int scalar_bytes, int multiprocessors) {
    const MlpLayout layout = mlp_layout(shape, larger(support, query));
    std::int64_t work = 0;  // elements of the largest activation
    for (int layer = 0; layer < shape.layers; ++layer) {
        work = larger(work, larger(support, query) * shape.widths[layer + 1]);
    }
    const int threads = work <= kMlpWarpWork ? 32 : kMlpBlock;
    const std::int64_t scratch_bytes = kMlpScratch * scalar_bytes;
    const bool in_shared = layout.size * scalar_bytes + scratch_bytes <= kMlpSharedBytes;
    const std::int64_t resident = multiprocessors * kMlpWarpsPerMultiprocessor / (threads / 32);
    const std::int64_t teams = larger(1, smaller(tasks, resident));
    return {threads, in_shared, teams, scratch_bytes + (in_shared ? layout.size * scalar_bytes : 0),
            in_shared ? 0 : teams * layout.size};
}

}  // namespace signmaml
