// The second-order pass of a program of blocks, for one task and some of its examples: how the gradient changes along a
// direction, forward over reverse. What `value` computes has its tangent at the same place of the memory of `along`.
#pragma once

#include <cstdint>

#include "cpu/isa/layers/passes.h"
#include "cpu/isa/layers/tail_tangents.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

template <typename Scalar>
bool weight_moves(const LayersTangent<Scalar>& d, int i) {
    const std::int32_t weight = d.value.network->block[i].weight;
    return weight >= 0 && d.along.values[weight] != nullptr;
}

template <typename Scalar>
void start_tangents(const LayersTangent<Scalar>& d) {
    start_with(d.value, Scalar(1));
    start_with(d.along, Scalar(0));
}

// made <- 0, inside its border
template <typename Scalar>
void clear_made(const LayersTask<Scalar>& t, int i) {
    const LayersSize& size = t.network->block[i].made;
    const LayersImages& made = t.layout->block[i].made;
    for (std::int64_t e = 0; e < t.count; ++e) {
        for (std::int64_t y = 0; y < size.height; ++y) {
            fill_zero(image_of(t, made, e) + y * made.row, size.width * made.lanes);
        }
    }
}

// Nothing moves in this block: its tangents are 0.
template <typename Scalar>
void stand_still(const LayersTangent<Scalar>& d, int i) {
    const LayersTask<Scalar>& along = d.along;
    const LayersBlock& block = along.network->block[i];
    const LayersImages& made = along.layout->block[i].made;
    clear_made(along, i);
    for (std::int64_t e = 0; e < along.count; ++e) fill_zero(moment(along, i, e, 0), 2 * made.lanes);
    const std::int64_t rows = block.norm == LayersNorm::kGroup ? along.count : 1;
    fill_zero(along.memory + along.layout->block[i].cells, rows * kLayersVectors * made.lanes);
    if (i + 1 < along.network->blocks) return;
    const LayersImages& out = output_of(along, i);  // nothing reads that of other blocks
    fill_zero(along.memory + out.place, along.count * out.image);
}

// Whether what another block gives moves; -1 is the examples.
template <typename Scalar>
bool output_moves(const LayersTangent<Scalar>& d, int other) {
    return other >= d.first_moved;
}

template <typename Scalar>
bool input_moves(const LayersTangent<Scalar>& d, int i) {
    return output_moves(d, d.value.network->block[i].source);
}

// made of `along` <- the tangent of what the block's product makes
template <typename Scalar>
void make_product_tangent(const LayersTangent<Scalar>& d, int i) {
    const LayersTask<Scalar>&value = d.value, &along = d.along;
    const LayersBlock& block = value.network->block[i];
    const bool moves = input_moves(d, i), turns = weight_moves(d, i);
    if (block.product == LayersProduct::kConv && (moves || turns)) {
        if (moves) {
            convolve_examples(value, i, {along.memory, value.memory, along.memory}, 0, value.count, /*add=*/false);
        }
        if (turns) {
            convolve_examples(value, i, {value.memory, along.memory, along.memory}, 0, value.count, moves);
        }
        return;
    }
    clear_made(along, i);
    if (block.product == LayersProduct::kLinear) {
        if (moves) {
            flatten_examples(along, i);
            add_linear(along, i, features_of(along, i), value.values[block.weight]);
        }
        if (turns) add_linear(along, i, features_of(value, i), along.values[block.weight]);
        return;
    }
    const bool second_moves = block.product == LayersProduct::kSum && output_moves(d, block.added);
    for (std::int64_t e = 0; e < value.count; ++e) {
        if (moves) copy_input(along, i, e);
        if (second_moves) add_second(along, i, e);
    }
}

// After forward(value): the tangents of all that it computed.
template <typename Scalar>
void forward_tangents(const LayersTangent<Scalar>& d) {
    for (int i = 0; i < d.value.network->blocks; ++i) {
        if (i < d.first_moved) {
            stand_still(d, i);
            continue;
        }
        make_product_tangent(d, i);
        if (d.value.network->block[i].norm != LayersNorm::kNone) {
            for (std::int64_t e = 0; e < d.value.count; ++e) measure_tangent(d, i, e);
        }
        set_cell_tangents(d, i);
        for (std::int64_t e = 0; e < d.value.count; ++e) finish_tangent(d, i, e);
        drop_outputs(d.along, i);
        hand_on(d.along, i);
    }
}

// The sums of weight gradients' tangents, and the gradients of a convolution's input with their tangents, of examples
// [first, last).
template <typename Scalar>
void convolution_tangents_back(const LayersTangent<Scalar>& d, int i, std::int64_t first, std::int64_t last) {
    const LayersTask<Scalar>&value = d.value, &along = d.along;
    const LayersBlock& block = value.network->block[i];
    if (wants(along, block.weight)) {
        if (input_moves(d, i)) add_weight_grad(value, i, {along.memory, along.memory, value.memory}, first, last);
        add_weight_grad(value, i, {value.memory, along.memory, along.memory}, first, last);
    }
    if (!wants_input_grad(value, i)) return;
    const std::int64_t at = first * block.in.height * block.in.width * value.layout->block[i].in.lanes;
    const bool adds = adds_to_input_grad(value, i);
    Scalar* to = input_grad(along, i) + at;
    convolve_back(value, i, memories_of(value), first, last, input_grad(value, i) + at, adds);
    convolve_back(value, i, {nullptr, value.memory, along.memory}, first, last, to, adds);
    if (weight_moves(d, i)) {
        convolve_back(value, i, {nullptr, along.memory, value.memory}, first, last, to, /*add=*/true);
    }
}

template <typename Scalar>
void linear_tangents_back(const LayersTangent<Scalar>& d, int i) {
    const LayersTask<Scalar>&value = d.value, &along = d.along;
    const LayersBlock& block = value.network->block[i];
    const Scalar* grads = value.memory + value.layout->block[i].made.place;
    const Scalar* tangents = along.memory + along.layout->block[i].made.place;
    if (wants(along, block.weight)) {
        linear_weight_grad(along, i, tangents, features_of(value, i), along.adds);
        if (input_moves(d, i)) linear_weight_grad(along, i, grads, features_of(along, i), /*add=*/true);
    }
    if (!wants_input_grad(value, i)) return;
    const bool adds = adds_to_input_grad(value, i);
    linear_input_grad(value, i, grads, value.values[block.weight], adds);
    linear_input_grad(along, i, tangents, value.values[block.weight], adds);
    if (weight_moves(d, i)) linear_input_grad(along, i, grads, along.values[block.weight], /*add=*/true);
    give_linear_input_grad(value, i);
    give_linear_input_grad(along, i);
}

// Adds the examples' tangents of gradients, from those of the outputs.
template <typename Scalar>
void backward_tangents(const LayersTangent<Scalar>& d) {
    const LayersTask<Scalar>&value = d.value, &along = d.along;
    for (int i = value.network->blocks - 1; i >= value.lowest; --i) {
        const LayersBlock& block = value.network->block[i];
        drop_output_grads(value, i);
        drop_output_grads(along, i);
        if (block.norm != LayersNorm::kNone || wants(along, block.bias)) {
            for (std::int64_t e = 0; e < value.count; ++e) sum_grad_tangents(d, i, e);
            set_slope_tangents(d, i);
        }
        if (!goes_on(along, i)) continue;
        const std::int64_t at_once = examples_at_once(block);
        for (std::int64_t first = 0; first < value.count; first += at_once) {
            const std::int64_t last = least(first + at_once, value.count);
            for (std::int64_t e = first; e < last; ++e) make_grad_tangents(d, i, e);
            if (block.product == LayersProduct::kConv) convolution_tangents_back(d, i, first, last);
        }
        if (block.product == LayersProduct::kLinear) linear_tangents_back(d, i);
        if (block.product == LayersProduct::kNone || block.product == LayersProduct::kSum) {
            copy_back(value, i);
            copy_back(along, i);
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
