// The stages of a pass of a program of blocks on the CPU. There is one table of stages for each instruction set:
// csrc/cpu/isa/layers/.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "params/layers.h"
#include "plan/layers_cpu.h"

namespace signmaml::cpu {

// What one thread knows of the task and the examples at hand. Plain data: an inline function would be shared by the
// instruction sets.
template <typename Scalar>
struct LayersTask {
    const LayersNetwork* network;
    const LayersCpuLayout* layout;
    const Scalar* const* values;  // [tensors], of the task
    Scalar* const* grads;         // [tensors], null where not wanted
    Scalar* memory;               // as the layout says
    int lowest;                   // block that has a gradient; network->blocks if none has
    const Scalar* x;              // of the examples at hand
    const Scalar* const* noise;   // [blocks], of the dropouts, of the examples at hand
    std::int64_t count;           // of them
    bool adds;                    // to what earlier examples of the task left in `grads`
};

// A task and how all that it computes changes when its parameters move along a direction.
template <typename Scalar>
struct LayersTangent {
    LayersTask<Scalar> value;  // wants no gradients
    // The same network, layout and examples. values: the direction, null where a tensor does not move; grads: how the
    // gradients change; memory: of the same layout, with the tangent of what the other one has at the same place.
    LayersTask<Scalar> along;
    int first_moved;  // block with a direction; network->blocks if nothing moves
};

template <typename Scalar>
struct LayersStages {
    ConvUnit unit;
    // Zeros around all images, where nothing else writes: once a thread.
    void (*clear_borders)(const LayersTask<Scalar>&);
    // The task's parameters into packed form; the sums of its gradients <- 0.
    void (*start)(const LayersTask<Scalar>&);
    // The examples at hand to outputs [count, lanes of the last block].
    void (*forward)(const LayersTask<Scalar>&);
    // Adds the examples' gradients, from those of the outputs, [count, lanes of the last block], in out_grad[0].
    void (*backward)(const LayersTask<Scalar>&);
    // Sums that are packed to `grads`.
    void (*finish)(const LayersTask<Scalar>&);
    // `start` of both.
    void (*start_tangents)(const LayersTangent<Scalar>&);
    // After `forward` of `value`: the tangents of the same.
    void (*forward_tangents)(const LayersTangent<Scalar>&);
    // Adds the examples' tangents of gradients, from the gradients of the outputs and their tangents.
    void (*backward_tangents)(const LayersTangent<Scalar>&);
};

struct LayersStageTables {
    LayersStages<float> float32;
    LayersStages<double> float64;
};

namespace portable {
extern const LayersStageTables kLayersStages;
}
namespace avx2 {
extern const LayersStageTables kLayersStages;
}
namespace avx512 {
extern const LayersStageTables kLayersStages;
}

template <typename Scalar>
const LayersStages<Scalar>& layers_stages(const Kernels& kernels);

template <>
inline const LayersStages<float>& layers_stages<float>(const Kernels& kernels) {
    return kernels.layers_stages->float32;
}

template <>
inline const LayersStages<double>& layers_stages<double>(const Kernels& kernels) {
    return kernels.layers_stages->float64;
}

}  // namespace signmaml::cpu
