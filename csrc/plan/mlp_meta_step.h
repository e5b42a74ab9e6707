// How a meta-step of a multilayer perceptron is laid out: which threads own a task, and where its weights and
// activations are stored. Pure functions of the shape.
#pragma once

#include <cstdint>

#include "params/mlp_meta_step.h"
#include "plan/math.h"

namespace signmaml {

// Rows are an odd number of vectors of 16 bytes (of floats), so that threads that read one vector each of neighbouring
// rows hit different banks.
inline constexpr std::int64_t kMlpRowUnit = 4;
constexpr std::int64_t mlp_row(std::int64_t width) { return (ceil_div(width, kMlpRowUnit) | 1) * kMlpRowUnit; }

constexpr MlpLayout mlp_layout(const MlpShape& shape, std::int64_t count, int threads) {
    MlpLayout layout{};
    while ((32 << layout.warps_log2) < threads) ++layout.warps_log2;
    std::int64_t at = 0;
    const auto next = [&at](std::int64_t scalars) {
        const std::int64_t here = at;
        at += ceil_div(scalars, kMlpRowUnit) * kMlpRowUnit;
        return here;
    };
    std::int64_t widest = 0;
    for (int layer = 0; layer <= shape.layers; ++layer) {
        layout.row[layer] = mlp_row(shape.widths[layer]);
        layout.activation[layer] = next(count * layout.row[layer]);
        if (layer > 0) widest = larger(widest, layout.row[layer]);
    }
    for (int layer = 0; layer < shape.layers; ++layer) {
        layout.weight[layer] = next(shape.widths[layer + 1] * layout.row[layer]);
        layout.bias[layer] = next(shape.widths[layer + 1]);
    }
    for (std::int64_t& delta : layout.delta) delta = next(count * widest);
    layout.losses = next(2 * count);
    layout.size = at;
    return layout;
}

// How many steps are differentiated.
constexpr std::int64_t mlp_differentiated(Method method, std::int64_t query, std::int64_t steps) {
    return method == Method::kMaml && query > 0 ? steps : 0;
}

// Whether mlp_second_order_kernel makes the meta-step.
constexpr bool mlp_is_second_order(Method method, std::int64_t query, std::int64_t steps, const StepOptions& how) {
    return mlp_differentiated(method, query, steps) > 0 || how.rates.learnable || how.rates.by_element ||
           how.climbs() || how.counted;
}

// `layout`: of the task's memory.
constexpr MlpSecondOrderLayout mlp_second_order_layout(const MlpLayout& layout, Method method, std::int64_t query,
                                                       std::int64_t steps, const StepOptions& how) {
    MlpSecondOrderLayout places{};
    places.parameters = layout.delta[0] - layout.weight[0];
    const std::int64_t differentiated = mlp_differentiated(method, query, steps);
    if (differentiated > 0) {
        places.deltas = places.tangents + layout.weight[0] - layout.activation[1];
        places.direction = places.deltas + layout.losses - layout.delta[0];
        places.gradient = places.direction + places.parameters;
        places.path = places.gradient + places.parameters;
        places.kept = places.path + differentiated * places.parameters;
    }
    places.ascent = places.kept + (how.rates.learnable ? steps * places.parameters : 0);
    places.start = places.ascent + (how.climbs() || how.counted ? places.parameters : 0);
    places.counts = places.start + (how.climbs() ? places.parameters : 0);
    places.squares = places.counts + (how.counted ? places.parameters : 0);
    places.size = places.squares + (how.climbs() ? kMlpBlock : 0);
    return places;
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
// A block works on a task with an activation of more than 64 elements for each thread of a warp.
inline constexpr std::int64_t kMlpWarpWork = 32 * 64;
// Warps that keep a multiprocessor busy: three for each of its four schedulers, as a warp issues an instruction every
// third cycle or so. Smaller tasks get more warps while there are fewer than that.
inline constexpr std::int64_t kMlpBusyWarps = 12;
// Warps of all teams on one multiprocessor: as many as can be resident. More would only enlarge the workspace.
inline constexpr std::int64_t kMlpWarpsPerMultiprocessor = 32;
// Where steps are differentiated, a team's workspace is several times as large: as many as the registers surely allow.
inline constexpr std::int64_t kMlpSecondOrderWarps = 16;

struct MlpPlan {
    int threads;                     // of a team: a block of 1, 2, 4 or 8 warps
    bool in_shared;                  // the task's memory is shared memory, else workspace
    std::int64_t teams;              // blocks; a team takes every teams-th task
    std::int64_t shared_bytes;       // of a block
    std::int64_t workspace_scalars;  // of all teams
};

// A team's part of the workspace is the task's memory, unless that is shared, and then what differentiated steps,
// learnable rates and steps that keep their gradients need.
constexpr MlpPlan plan_mlp_meta_step(const MlpShape& shape, std::int64_t tasks, std::int64_t support,
                                     std::int64_t query, std::int64_t steps, Method method, const StepOptions& how,
                                     int scalar_bytes, int multiprocessors) {
    std::int64_t work = 0;  // elements of the largest activation
    for (int layer = 0; layer < shape.layers; ++layer) {
        work = larger(work, larger(support, query) * shape.widths[layer + 1]);
    }
    int threads = work <= kMlpWarpWork ? 32 : kMlpBlock;
    while (threads < kMlpBlock && tasks * (threads / 32) < multiprocessors * kMlpBusyWarps && work > threads)
        threads *= 2;
    const MlpLayout layout = mlp_layout(shape, larger(support, query), threads);
    const bool in_shared = layout.size * scalar_bytes <= kMlpSharedBytes;
    const bool second_order = mlp_is_second_order(method, query, steps, how);
    const std::int64_t warps = second_order ? kMlpSecondOrderWarps : kMlpWarpsPerMultiprocessor;
    const std::int64_t teams = larger(1, smaller(tasks, multiprocessors * warps / (threads / 32)));
    const std::int64_t of_team =
        (in_shared ? 0 : layout.size) + mlp_second_order_layout(layout, method, query, steps, how).size;
    return {threads, in_shared, teams, in_shared ? layout.size * scalar_bytes : 0, teams * of_team};
}

}  // namespace signmaml
