// How a meta-step of a multilayer perceptron is laid out: who owns a task, and where its weights and activations lie.
// Pure functions of the shape.
#pragma once

#include <cstdint>

#include "params/mlp_meta_step.h"
#include "plan/math.h"

namespace signmaml {

// A row of weights ends at an odd number of scalars, so that threads that walk down a column hit different banks.
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

// What every GPU gives a block without asking; more would cost resident blocks, and so the latency they hide.
inline constexpr std::int64_t kMlpSharedBytes = 48 * 1024;
// A warp serves a task as long as no activation has more elements than this many for each of its threads.
inline constexpr std::int64_t kMlpWarpWork = 32 * 64;
// Warps of all teams on a multiprocessor: what may be resident; more would only make the workspace larger.
inline constexpr std::int64_t kMlpWarpsPerMultiprocessor = 32;

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
