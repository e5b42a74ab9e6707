// Where a task's images lie in a thread's memory.
#pragma once

#include <cstdint>

#include "cpu/isa/integers.h"
#include "cpu/isa/simd.h"
#include "cpu/layers_table.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// Position (0, 0) of an example's image, inside its border.
template <typename Scalar>
Scalar* image_in(Scalar* memory, const LayersImages& images, std::int64_t example) {
    return memory + images.place + example * images.image + images.border.top * images.row +
           images.border.left * images.lanes;
}

template <typename Scalar>
Scalar* image_of(const LayersTask<Scalar>& t, const LayersImages& images, std::int64_t example) {
    return image_in(t.memory, images, example);
}

// What a block writes its output to.
template <typename Scalar>
const LayersImages& output_of(const LayersTask<Scalar>& t, int block) {
    return t.layout->block[block].out;
}

// The gradient of a block's output, [count, height, width, lanes].
template <typename Scalar>
Scalar* output_grad(const LayersTask<Scalar>& t, int block) {
    return t.memory + t.layout->block[block].out_grad;
}

// The gradient of a block's input, which is the output of its source.
template <typename Scalar>
Scalar* input_grad(const LayersTask<Scalar>& t, int block) {
    return output_grad(t, t.network->block[block].source);
}

// Whether the gradient of another block's output is wanted; -1 is the examples.
template <typename Scalar>
bool wants_output_grad(const LayersTask<Scalar>& t, int other) {
    return other >= t.lowest;
}

template <typename Scalar>
bool wants_input_grad(const LayersTask<Scalar>& t, int block) {
    return wants_output_grad(t, t.network->block[block].source);
}

// Whether the backward pass has met a reader of another block's output before it comes to `block`, which then adds to
// the gradient of that output. layers_reads is shared by the instruction sets.
template <typename Scalar>
bool adds_to_grad(const LayersTask<Scalar>& t, int block, int other) {
    for (int i = block + 1; i < t.network->blocks; ++i) {
        const LayersBlock& later = t.network->block[i];
        if (later.source == other || (later.product == LayersProduct::kSum && later.added == other)) return true;
    }
    return false;
}

template <typename Scalar>
bool adds_to_input_grad(const LayersTask<Scalar>& t, int block) {
    return adds_to_grad(t, block, t.network->block[block].source);
}

template <typename Scalar>
Scalar* cell(const LayersTask<Scalar>& t, int block, std::int64_t example, LayersVector which) {
    const std::int64_t lanes = t.layout->block[block].made.lanes;
    const std::int64_t row = t.network->block[block].norm == LayersNorm::kGroup ? example : 0;
    return t.memory + t.layout->block[block].cells + (row * kLayersVectors + which) * lanes;
}

template <typename Scalar>
Scalar* moment(const LayersTask<Scalar>& t, int block, std::int64_t example, int which) {
    const LayersBlockPlan& plan = t.layout->block[block];
    return t.memory + plan.moments + (example * 2 + which) * plan.made.lanes;
}

// Sums over an example of the gradient of what is normalised, and of its products with what is normalised.
template <typename Scalar>
Scalar* grad_sum(const LayersTask<Scalar>& t, int block, std::int64_t example, int which) {
    return t.memory + t.layout->sums + (example * 2 + which) * t.layout->block[block].made.lanes;
}

template <typename Scalar>
double* affine_grad(const LayersTask<Scalar>& t, int block, int which) {
    const LayersBlockPlan& plan = t.layout->block[block];
    return reinterpret_cast<double*>(t.memory + plan.affine_grad) + which * plan.made.lanes;
}

// As layers_features; that one is shared by the instruction sets.
inline std::int64_t layers_features_of(const LayersSize& size) {
    return std::int64_t{size.channels} * size.height * size.width;
}

template <typename Scalar>
void fill_zero(Scalar* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = Scalar(0);
}

template <typename Scalar>
bool wants(const LayersTask<Scalar>& t, std::int32_t tensor) {
    return tensor >= 0 && t.grads[tensor] != nullptr;
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
