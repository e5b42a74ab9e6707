// How the CPU backend lays out a pass of a program of blocks (params/layers.h): offsets into a thread's memory, and how
// many examples it takes at once. Pure functions of the network.
#pragma once

#include <cstdint>

#include "params/layers.h"
#include "plan/conv_meta_step_cpu.h"
#include "plan/math.h"

namespace signmaml {

// Where no normalisation couples them, a thread takes as many examples from the first block to the last and back as fit
// this many bytes: they stay in L2.
inline constexpr std::int64_t kLayersChunkBytes = 1024 * 1024;

// Vectors of [lanes] that a block keeps for every example, or once if all examples share its statistics.
enum LayersVector : std::int32_t {
    kLayersMean = 0,  // of what is normalised, less the bias
    kLayersInverse,   // 1 / standard deviation; 1 without normalisation
    kLayersScale,
    kLayersShift,  // normalised = scale * made + shift
    kLayersSlope,  // the gradient of `made` = scale * grad + slope * (made - mean) + offset
    kLayersOffset,
    kLayersVectors
};

// Borders of zeros around an image.
struct LayersBorder {
    std::int64_t top, left, bottom, right;
};

// Images in memory: [n, top + height + bottom, left + width + right, lanes].
struct LayersImages {
    std::int64_t place;  // of the first scalar
    std::int64_t lanes, row, image;
    LayersBorder border;
};

struct LayersBlockPlan {
    LayersImages in;                     // what the block reads: the output of another block, or the examples
    LayersImages made;                   // what its product makes, later the gradient of that
    LayersImages out;                    // its output: what the first block reads that has it as its source
    std::int64_t out_grad;               // the gradient of its output: [n, height, width, lanes]
    bool winograd;                       // the convolution by F(2x2, 3x3)
    bool winograd_back;                  // its gradients, too
    std::int32_t vectors, vectors_back;  // in a group of channels
    std::int64_t features;               // [n, in features] in torch's order, if a linear layer reads images; else -1
    std::int64_t feature_grads;          // likewise
    std::int64_t weight;                 // of a convolution: [groups, window, in lanes, group]
    std::int64_t weight_back;            // [groups of in lanes, window back to front, lanes, group]
    std::int64_t transformed, transformed_back;  // the same for F(2x2, 3x3)
    std::int64_t weight_grad;                    // like weight
    std::int64_t products;                       // [16, groups, in lanes, group]: its sums by F(2x2, 3x3)
    std::int64_t met;          // [9, in lanes]: 1 where the input is not 0 in that part of the images, else 0
    std::int64_t affine;       // [2, lanes]: scale and shift of the normalisation, padded; the bias is `bias`
    std::int64_t bias;         // [lanes]
    std::int64_t affine_grad;  // [3, lanes] doubles: of scale, shift and bias
    std::int64_t cells;        // [n or 1, kLayersVectors, lanes]
    std::int64_t moments;      // [n, 2, lanes]: mean and squared deviations of every example's channels
    std::int64_t band;         // rows of `made` that are pooled together
};

struct LayersCpuLayout {
    LayersBlockPlan block[kLayersBlocks];
    std::int64_t sums;     // [n, 2, lanes]
    std::int64_t size;     // memory of a thread
    std::int64_t scratch;  // offset of the rest of it, for one stage at a time
    std::int64_t count;    // examples at once
};

// The first block that has another one as its source; -1: none has.
constexpr int layers_first_reader(const LayersNetwork& network, int other) {
    for (int i = other + 1; i < network.blocks; ++i) {
        if (network.block[i].source == other) return i;
    }
    return -1;
}

constexpr std::int64_t layers_unit(ConvUnit unit) { return larger(unit.lanes, 8); }

constexpr std::int64_t layers_lanes(std::int64_t channels, ConvUnit unit) {
    return ceil_div(channels, layers_unit(unit)) * layers_unit(unit);
}

constexpr std::int32_t layers_group(std::int64_t lanes, std::int64_t positions, ConvUnit unit) {
    const std::int64_t all = lanes / unit.lanes;
    std::int32_t vectors = positions >= kConvNarrow ? unit.vectors_wide : unit.vectors_narrow;
    while (all % vectors != 0) --vectors;
    return vectors;
}

constexpr LayersImages layers_images(ConvPlaces& places, std::int64_t n, const LayersSize& size, std::int64_t lanes,
                                     const LayersBorder& border) {
    LayersImages images{};
    images.lanes = lanes;
    images.border = border;
    images.row = (border.left + size.width + border.right) * lanes;
    images.image = (border.top + size.height + border.bottom) * images.row;
    // F(2x2, 3x3) reads up to a row and a position past the last image.
    images.place = places.take(n * images.image + images.row + 2 * lanes);
    return images;
}

// The border that a convolution needs around its input.
constexpr LayersBorder layers_border_of_input(const LayersBlock& block) {
    if (block.product != LayersProduct::kConv) return {};
    const LayersWindow& w = block.window;
    // Of the last window's last row and column, as far as they are outside.
    const auto beyond = [](std::int64_t made, std::int64_t stride, std::int64_t window, std::int64_t pad,
                           std::int64_t size) { return larger(0, (made - 1) * stride + window - pad - size); };
    return {w.pad_h, w.pad_w, beyond(block.made.height, w.stride_h, w.height, w.pad_h, block.in.height),
            beyond(block.made.width, w.stride_w, w.width, w.pad_w, block.in.width)};
}

// The border around the gradient of what a convolution makes, so that the gradient of its input is a convolution too.
constexpr LayersBorder layers_border_of_gradient(const LayersBlock& block) {
    if (block.product != LayersProduct::kConv) return {};
    const LayersWindow& w = block.window;
    const auto before = [](std::int64_t window, std::int64_t stride, std::int64_t pad) {
        return larger(0, ceil_div(window - 1 - pad, stride));
    };
    const auto behind = [](std::int64_t made, std::int64_t size, std::int64_t stride, std::int64_t pad) {
        return larger(0, (size - 1 + pad) / stride - (made - 1));
    };
    return {before(w.height, w.stride_h, w.pad_h), before(w.width, w.stride_w, w.pad_w),
            behind(block.made.height, block.in.height, w.stride_h, w.pad_h),
            behind(block.made.width, block.in.width, w.stride_w, w.pad_w)};
}

// F(2x2, 3x3) serves up to this many lanes, and pays from this many positions of all examples on: with fewer, reading
// and writing transformed weights takes longer than the products that it saves.
inline constexpr std::int64_t kLayersWinogradLanes = 256;
inline constexpr std::int64_t kLayersWinogradPositions = 32;

// count: examples of a pass.
constexpr bool layers_winograd(const LayersBlock& block, std::int64_t count, std::int64_t most_lanes) {
    const LayersWindow& w = block.window;
    const std::int64_t positions = count * block.made.height * block.made.width;
    return most_lanes <= kLayersWinogradLanes && positions >= kLayersWinogradPositions &&
           block.product == LayersProduct::kConv && w.height == 3 && w.width == 3 && w.stride_h == 1 &&
           w.stride_w == 1 && w.pad_h == 1 && w.pad_w == 1 && conv_winograd_pays(block.made.height, block.made.width);
}

// Rows of `made` that are pooled together: those under a row of windows, or all where windows overlap.
constexpr std::int64_t layers_band(const LayersBlock& block) {
    if (block.pool != LayersPool::kMax && block.pool != LayersPool::kAverage) return 1;
    const LayersWindow& w = block.pool_window;
    return w.stride_h == w.height && w.pad_h == 0 ? w.height : block.made.height;
}

// Scalars from one tile of the weight gradient to the next.
constexpr std::int64_t layers_outer_step(std::int64_t in_lanes, std::int64_t lanes) {
    return larger(in_lanes, lanes) + kConvOuterGap;
}

constexpr std::int64_t layers_outer_scratch(std::int64_t in_lanes, std::int64_t lanes) {
    return 2 * 16 * kConvOuterTiles * layers_outer_step(in_lanes, lanes);
}

// n: examples at once, of `count` in a pass.
constexpr LayersCpuLayout layers_layout_of(const LayersNetwork& network, std::int64_t n, std::int64_t count,
                                           int scalar_bytes, ConvUnit unit) {
    LayersCpuLayout layout{};
    layout.count = n;
    ConvPlaces places{64 / scalar_bytes, 0};
    std::int64_t largest_out = 0, largest_lanes = 0, scratch = 0;
    for (int i = 0; i < network.blocks; ++i) {
        const LayersBlock& block = network.block[i];
        LayersBlockPlan& plan = layout.block[i];
        const std::int64_t lanes = layers_lanes(block.made.channels, unit);
        const bool convolves = block.product == LayersProduct::kConv;
        if (block.source < 0) {
            // Only their scalars are read, so the channels need not be whole vectors.
            plan.in =
                layers_images(places, convolves ? n : 0, block.in, block.in.channels, layers_border_of_input(block));
        } else {
            plan.in = layers_images(places, n, block.in, layers_lanes(block.in.channels, unit),
                                    layers_border_of_input(block));
            if (layers_first_reader(network, block.source) == i) layout.block[block.source].out = plan.in;
        }
        plan.made = layers_images(places, n, block.made, lanes,
                                  block.source < 0 ? LayersBorder{} : layers_border_of_gradient(block));
        plan.winograd = block.source >= 0 && layers_winograd(block, count, larger(plan.in.lanes, lanes));
        // Without a normalisation most gradients of what is made are exactly 0, as ReLU and pooling leave them. Where a
        // tile has a few others, F(2x2, 3x3) would leave rounding instead of 0, and the sign step would act on it.
        plan.winograd_back = plan.winograd && block.norm != LayersNorm::kNone;
        plan.vectors = layers_group(lanes, block.made.width, unit);
        plan.vectors_back =
            layers_group(plan.in.lanes, ceil_div(block.in.width, larger(1, block.window.stride_w)), unit);
        const bool flattens = block.product == LayersProduct::kLinear &&
                              std::int64_t{block.in.height} * block.in.width > 1 && block.source >= 0;
        plan.features = flattens ? places.take(n * layers_features(block.in)) : -1;
        plan.feature_grads = flattens ? places.take(n * layers_features(block.in)) : -1;
        const std::int64_t weights =
            convolves ? std::int64_t{block.window.height} * block.window.width * plan.in.lanes * lanes : 0;
        const std::int64_t transformed = plan.winograd ? 16 * plan.in.lanes * lanes : 0;
        const std::int64_t of_back = plan.winograd_back ? transformed : 0;
        plan.weight = places.take(weights);
        plan.weight_back = places.take(block.source >= 0 ? weights : 0);
        plan.transformed = places.take(transformed);
        plan.transformed_back = places.take(of_back);
        plan.weight_grad = places.take(weights);
        plan.products = places.take(of_back);
        plan.met = places.take(plan.winograd_back ? 9 * plan.in.lanes : 0);
        plan.affine = places.take(2 * lanes);
        plan.bias = places.take(lanes);
        plan.affine_grad = places.take(3 * lanes * (8 / scalar_bytes));
        plan.cells = places.take((block.norm == LayersNorm::kGroup ? n : 1) * kLayersVectors * lanes);
        plan.moments = places.take(n * 2 * lanes);
        plan.band = layers_band(block);
        largest_out = larger(largest_out, std::int64_t{block.out.height} * block.out.width * lanes);
        largest_lanes = larger(largest_lanes, lanes);
        if (plan.winograd) scratch = larger(scratch, 16 * kConvWinogradTiles * (plan.in.lanes + lanes));
        if (plan.winograd_back) scratch = larger(scratch, layers_outer_scratch(plan.in.lanes, lanes));
        scratch = larger(scratch, 2 * plan.band * block.made.width * lanes);
    }
    for (int i = 0; i < network.blocks; ++i) {
        if (layers_first_reader(network, i) >= 0) continue;
        const LayersSize& out = network.block[i].out;
        layout.block[i].out = layers_images(places, n, out, layers_lanes(out.channels, unit), {});
    }
    // In a chain two of them take turns, because only the neighbour reads each.
    const bool is_chain = layers_is_chain(network);
    std::int64_t in_turn[2] = {};
    for (std::int64_t& place : in_turn) place = places.take(is_chain ? n * largest_out : 0);
    for (int i = 0; i < network.blocks; ++i) {
        const LayersSize& out = network.block[i].out;
        const std::int64_t own = n * out.height * out.width * layout.block[i].made.lanes;
        layout.block[i].out_grad = is_chain ? in_turn[(network.blocks - 1 - i) % 2] : places.take(own);
    }
    layout.sums = places.take(n * 2 * largest_lanes);
    layout.scratch = places.take(scratch);
    layout.size = places.at;
    return layout;
}

// What a pass computes: gradients, or how they change along a direction, which takes two memories of the layout.
enum class LayersPass : std::int32_t { kGradient = 1, kHessian = 2 };

// Examples that a thread takes at once.
constexpr std::int64_t layers_chunk(const LayersNetwork& network, LayersPass pass, std::int64_t count, int scalar_bytes,
                                    ConvUnit unit) {
    if (layers_couple_examples(network)) return count;
    const std::int64_t one = layers_layout_of(network, 1, count, scalar_bytes, unit).size;
    const std::int64_t each = layers_layout_of(network, 2, count, scalar_bytes, unit).size - one;
    return smaller(count, larger(1, kLayersChunkBytes / (static_cast<int>(pass) * each * scalar_bytes)));
}

struct LayersCpuPlan {
    std::int64_t chunk;            // examples at once
    std::int64_t thread_scalars;   // memory of a thread
    std::int64_t workspace_bytes;  // for all of them
};

constexpr LayersCpuPlan plan_layers_cpu(const LayersNetwork& network, LayersPass pass, std::int64_t tasks,
                                        std::int64_t count, int scalar_bytes, ConvUnit unit, int threads) {
    const std::int64_t chunk = layers_chunk(network, pass, count, scalar_bytes, unit);
    const std::int64_t scalars =
        static_cast<int>(pass) * layers_layout_of(network, chunk, count, scalar_bytes, unit).size;
    // 64 extra bytes: the start of the workspace is rounded up to a multiple of 64.
    return {chunk, scalars, smaller(tasks, threads) * scalars * scalar_bytes + 64};
}

}  // namespace signmaml
