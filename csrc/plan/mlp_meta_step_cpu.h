// How a meta-step of a multilayer perceptron is laid out on the CPU: tasks side by side in the lanes of vectors, a
// group of tasks for each thread. Pure functions of the shape.
#pragma once

#include <cstdint>

#include "params/mlp_meta_step.h"
#include "params/step_options.h"
#include "plan/math.h"
#include "plan/mlp_meta_step.h"

namespace signmaml {

// Offsets in a group's memory, in vectors; each vector holds one element for all tasks of the group.
struct MlpCpuLayout {
    std::int64_t parameters;                  // as in theta
    std::int64_t weight[kMlpLayers];          // [out, in] of each layer, among them
    std::int64_t bias[kMlpLayers];            // [out]
    std::int64_t activation[kMlpLayers + 1];  // [count, width]; [0] holds the examples
    std::int64_t target;                      // [count, out], or labels [count]
    std::int64_t delta[2];                    // [count, width], gradients of two neighbouring layers
    std::int64_t differentiated;              // how many steps are; the next four are theirs
    std::int64_t path;                        // [steps, parameters], the parameters before each step
    std::int64_t direction;                   // as the parameters: in which the support gradient is differentiated
    std::int64_t tangent[kMlpLayers + 1];     // [support, width], the activations' derivatives; the examples have none
    std::int64_t delta_tangent[2];            // [support, width], the deltas' derivatives
    bool stores_gradients;                    // a step first stores its gradient, instead of moving by it as it is made
    std::int64_t start;                       // [parameters] before the step, where it stores its gradient
    std::int64_t counts;                      // [parameters], of sign steps
    std::int64_t direction_rows;              // 1: of the step at hand, or of all together
    std::int64_t directions;                  // [rows, parameters]
    std::int64_t rate_grads;                  // as the rates
    std::int64_t rates_of_step;               // from a step's rates to the next one's; 0: all steps have the same
    std::int64_t columns;                     // of a row of meta-gradients
    std::int64_t size;
};

// Numbers in a row of meta-gradients.
constexpr std::int64_t mlp_columns(const MlpShape& shape, std::int64_t steps, RateOptions rates) {
    return gradient_columns(mlp_parameters(shape), 2 * shape.layers, steps, rates);
}

constexpr MlpCpuLayout mlp_cpu_layout(const MlpShape& shape, std::int64_t support, std::int64_t query,
                                      std::int64_t steps, Method method, const StepOptions& how) {
    MlpCpuLayout layout{};
    const std::int64_t count = larger(support, query);
    std::int64_t at = 0;
    std::int64_t widest = 0;
    for (int layer = 0; layer < shape.layers; ++layer) {
        const std::int64_t outputs = shape.widths[layer + 1];
        layout.weight[layer] = at;
        at += outputs * shape.widths[layer];
        layout.bias[layer] = at;
        at += outputs;
        widest = larger(widest, outputs);
    }
    for (int layer = 0; layer <= shape.layers; ++layer) {
        layout.activation[layer] = at;
        at += count * shape.widths[layer];
    }
    layout.target = at;
    at += count * shape.widths[shape.layers];
    for (std::int64_t& delta : layout.delta) {
        delta = at;
        at += count * widest;
    }
    layout.differentiated = mlp_differentiated(method, query, steps);
    if (layout.differentiated > 0) {
        const std::int64_t parameters = mlp_parameters(shape);
        layout.path = at;
        at += layout.differentiated * parameters;
        layout.direction = at;
        at += parameters;
        for (int layer = 1; layer <= shape.layers; ++layer) {
            layout.tangent[layer] = at;
            at += support * shape.widths[layer];
        }
        for (std::int64_t& delta : layout.delta_tangent) {
            delta = at;
            at += support * widest;
        }
    }
    layout.columns = mlp_columns(shape, steps, how.rates);
    layout.start = at;
    layout.stores_gradients = how.sharpness.rho > 0 || how.counted;
    if (layout.stores_gradients && steps > 0) at += mlp_parameters(shape);
    layout.counts = at;
    if (how.counted) at += mlp_parameters(shape);
    layout.directions = at;
    const bool keeps = how.rates.learnable && query > 0;
    const bool apart = how.rates.by_step || method != Method::kSignMaml;  // sums of signs alone are exact
    if (keeps || how.rates.by_element) layout.direction_rows = keeps && apart ? steps : smaller(1, steps);
    at += layout.direction_rows * mlp_parameters(shape);
    layout.rate_grads = at;
    layout.rates_of_step = how.rates.by_step ? how.rates.of_row(mlp_parameters(shape), 2 * shape.layers) : 0;
    if (query > 0) at += layout.columns - mlp_parameters(shape);
    layout.size = at;
    return layout;
}

struct MlpCpuPlan {
    int lanes;                       // tasks per group
    std::int64_t groups;             // the last one may be partly empty
    std::int64_t slots;              // groups that run at the same time, each with its own memory
    bool within;                     // threads share the work of a group because there are too few groups
    std::int64_t workspace_scalars;  // of all slots, plus slack to align the start to a whole vector
    std::int64_t mean_rows;          // rows of gradients in memory while their mean is computed
};

// Bytes of the longest vector.
inline constexpr std::int64_t kMlpAlignment = 64;

// `wide` and `narrow`: the lanes that the instruction set offers. With few tasks narrow vectors waste fewer lanes and
// give more threads a group.
constexpr MlpCpuPlan plan_mlp_meta_step_cpu(const MlpShape& shape, std::int64_t tasks, std::int64_t support,
                                            std::int64_t query, std::int64_t steps, Method method,
                                            const StepOptions& how, int scalar_bytes, int wide, int narrow,
                                            int threads) {
    const std::int64_t most = larger(1, threads);
    const int lanes = tasks > wide * (most - 1) ? wide : narrow;
    const std::int64_t groups = ceil_div(tasks, lanes);
    const bool within = groups < most;
    const std::int64_t slots = within ? 1 : most;
    const MlpCpuLayout layout = mlp_cpu_layout(shape, support, query, steps, method, how);
    const std::int64_t mean_rows = smaller(tasks, mean_slots(groups, within ? 1 : threads) * lanes);
    return {lanes, groups, slots, within, slots * layout.size * lanes + kMlpAlignment / scalar_bytes, mean_rows};
}

}  // namespace signmaml
