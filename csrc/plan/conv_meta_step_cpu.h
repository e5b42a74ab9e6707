// How the CPU backend lays out a meta-step of a convolutional network: sizes of every block, places in a task's
// memory, and the pieces ("items") that threads may share. Pure functions of the shape.
// No choice here but the last function's depends on the number of threads or tasks, and none changes a result.
#pragma once

#include <cstdint>

#include "params/conv_meta_step.h"
#include "plan/math.h"

namespace signmaml {

// How one instruction set's kernels want channels: `lanes` scalars a vector, and so many vectors of channels at most
// in a register tile, of many positions or of few.
struct ConvUnit {
    std::int32_t lanes;
    std::int32_t vectors_wide;
    std::int32_t vectors_narrow;
};

// A row of fewer positions than this fills the registers with channels instead.
inline constexpr std::int64_t kConvNarrow = 6;

constexpr std::int32_t conv_channels(int filters, ConvUnit unit) {
    return static_cast<std::int32_t>(ceil_div(filters, unit.lanes) * unit.lanes);
}

// Vectors of a group of channels: the most that divide all of them evenly, so that one tile size serves a whole row.
constexpr std::int32_t conv_group_vectors(int filters, bool wide, ConvUnit unit) {
    const std::int32_t all = conv_channels(filters, unit) / unit.lanes;
    std::int32_t vectors = wide ? unit.vectors_wide : unit.vectors_narrow;
    while (all % vectors != 0) --vectors;
    return vectors;
}

// Values of an image under one 3x3 window.
inline constexpr int kConvLargestPatch = 9 * kConvChannels;
// An image of which the patches' covariance is made, in whole vectors and with one beyond; and sums for it.
constexpr std::int64_t conv_centred(std::int64_t image) { return ceil_div(image, 64) * 64 + 64; }
inline constexpr std::int64_t kConvCovarianceSums = 8 * 3 * 3 * kConvChannels * 16;
// Positions that the rows of one item should have together at least: fewer would spend more on the item than on its
// convolution, more would leave the first-level cache before their statistics are taken.
inline constexpr std::int64_t kConvItemPositions = 128;

// Rows, in pairs, of an item of an image with so many rows. Strided networks rather have an image in one item: their
// register tiles then pass over several images.
constexpr std::int32_t conv_item_rows(std::int64_t rows, std::int64_t width, Halving halving) {
    const std::int64_t positions = halving == Halving::kMaxPool ? kConvItemPositions : 2 * kConvItemPositions;
    return static_cast<std::int32_t>(smaller(rows, 2 * ceil_div(positions, 2 * width)));
}

// F(2x2, 3x3) handles so many tiles of 2 x 2 outputs at once: enough for whole register tiles, and their 16 values a
// channel, transformed and multiplied, stay close in the cache.
inline constexpr std::int64_t kConvWinogradTiles = 12;

constexpr std::int64_t conv_winograd_scratch(std::int64_t channels) { return 2 * 16 * kConvWinogradTiles * channels; }

// Whether F(2x2, 3x3) saves multiplications, with a fifth on top for its transforms: not where most of a tile is cut
// off.
constexpr bool conv_winograd_pays(std::int64_t height, std::int64_t width) {
    return 16 * ceil_div(height, 2) * ceil_div(width, 2) * 6 < 9 * height * width * 5;
}

// The weight gradient handles more of them: all its matrices are read and written for each.
inline constexpr std::int64_t kConvOuterTiles = 48;
// From one tile or copied position to the next in the weight gradients, beyond its channels: a power of two would crowd
// into a few sets of the first-level cache.
inline constexpr std::int64_t kConvOuterGap = 16;

constexpr std::int64_t conv_outer_scratch(std::int64_t channels) {
    return 2 * 16 * kConvOuterTiles * (channels + kConvOuterGap);
}

// Shared products (cpu/isa/conv/shared_products.h) of a convolution with stride 2 are computed for at most so many
// positions at once, times the products in one sum: the blended inputs of all lie side by side.
inline constexpr std::int64_t kConvSharedPositions = 384;
inline constexpr std::int64_t kConvSharedRuns = 9;        // products in one sum: three of a row times three of a column
inline constexpr std::int64_t kConvProducts = 16;         // matrices that a weight gradient is made of
inline constexpr std::int64_t kConvOuterPositions = 128;  // that are copied side by side for one of them
// Two by two outputs that fill register tiles well: so many images are taken together.
inline constexpr std::int64_t kConvSharedPairs = 54;
// Images whose gradient of block 0's output a thread keeps at once.
inline constexpr std::int64_t kConvFirstGrads = 6;
// Bytes of inputs and gradients of which all matrices of a weight gradient's products are made before the next: they
// stay in the second-level cache.
inline constexpr std::int64_t kConvWeightBytes = 448 * 1024;
// Bytes of a block's output, but for the last block's, that a thread with a task to itself keeps in a network with
// stride 2, or those of the images that the next block takes at once. Outputs of further images are recomputed in L2, a
// few at a time, which beats reading them back.
inline constexpr std::int64_t kConvKeptBytes = 512 * 1024;

constexpr std::int64_t conv_shared_images(std::int64_t out_h, std::int64_t out_w) {
    return larger(1, kConvSharedPairs / (larger(1, out_h / 2) * larger(1, out_w / 2)));
}

// Of inputs or gradients, or of both.
constexpr std::int64_t conv_shared_scratch(std::int64_t channels) {
    return larger(kConvSharedPositions * channels, 2 * kConvOuterPositions * (channels + kConvOuterGap));
}

// One block: [n, in_h, in_w, inputs] -> convolution [n, out_h, out_w, filters] -> activation [n, act_h, act_w,
// filters].
struct ConvBlockPlan {
    std::int32_t inputs;       // channels that carry data
    std::int32_t input_lanes;  // scalars from one position to the next
    std::int32_t in_h, in_w, out_h, out_w, act_h, act_w;
    std::int32_t stride;
    bool winograd;                 // forward and gradients by F(2x2, 3x3)
    bool shared;                   // with stride 2: forward and data gradient by shared products
    std::int32_t vectors;          // of a group of output channels
    std::int32_t vectors_back;     // of a group of input channels, in the data gradient
    std::int32_t rows;             // convolution rows of an item: an even number, or all
    std::int32_t items;            // of an image
    std::int32_t act_rows;         // activation rows of an item of the backward pass
    std::int32_t half_items;       // of an image
    std::int32_t forward_items;    // that are convolved together: 1, or of several images that are one item each
    std::int32_t data_grad_items;  // likewise in the data gradient: items of the block before
    std::int64_t weight_rows;      // convolution rows that the weight gradient takes at once: an even number
    std::int64_t weight_images;    // images that it takes at once
    std::int32_t pad;              // zeros around the activation: 1 where a convolution follows, else 0
    // Places in a task's memory, in scalars.
    std::int64_t weight;       // [groups, 9, inputs, group]
    std::int64_t weight_grad;  // like weight
    std::int64_t vector;       // [kConvVectors, channels]
    std::int64_t raw;          // [n, out_h + 2, out_w + 2, channels]; block 0 has none
    std::int64_t winner;       // [n, act_h, act_w, channels], the raw value that max-pooling takes; else, and of
                               // block 0, none
    std::int64_t choice;       // [n, act_h, act_w, channels] bytes, which of the four it is; else none
    std::int64_t kept;         // images whose activation is kept at once: all, or some
    std::int64_t activation;   // [kept, act_h + 2 pad, act_w + 2 pad, channels], after BatchNorm and ReLU, and zeros
    std::int64_t activation_size, activation_beyond;
};

// Vectors of [channels] that a block keeps.
enum ConvVector : std::int32_t {
    kGamma = 0,
    kBeta,
    kGammaGrad,
    kBetaGrad,
    kMean,     // of the raw values
    kInverse,  // 1 / standard deviation
    kScale,    // gamma * inverse
    kShift,    // beta - mean * scale
    kSlope,    // of the raw value's gradient in the raw value
    kOffset,   // the constant in that gradient
    kConvVectors
};

struct ConvCpuLayout {
    std::int32_t channels;  // of every block, in whole vectors
    ConvBlockPlan blocks[kConvBlocks];
    std::int64_t features;  // what the classifier reads: [act_h, act_w, channels] of the last block, or [channels]
    // Places in a task's memory, in scalars.
    std::int64_t images;           // [n, height + 2, width + 2, channels of the images]
    std::int64_t readout;          // [n, features] with Readout::kMean; else none
    std::int64_t activation_grad;  // [n, act_h, act_w, channels] of one block at a time; but see
                                   // first_grad_in_scratch
    std::int64_t activation_grad_size;
    std::int64_t classifier;       // [ways, features]
    std::int64_t classifier_grad;  // [ways, features]
    std::int64_t classifier_bias;  // [ways]
    std::int64_t classifier_bias_grad;
    // Of one block at a time, of those after the first.
    std::int64_t first_weight;  // block 0's with BatchNorm's scale: [groups, 9 inputs, group], or where it pools
                                // [groups, 4, 3 inputs, group] for F(2, 3)
    std::int64_t weight_back;   // [groups, 9, filters, group], window and channels exchanged
    std::int64_t transformed;   // weights: [16, filters, channels] for F(2x2, 3x3), or mixed ones
                                // [groups, 16, filters, group] for shared products
    std::int64_t products;      // [16, groups, filters, group], of which the weight gradient is made
    std::int64_t logits;        // [n, ways]
    std::int64_t logits_grad;   // [n, ways]
    std::int64_t partial;       // what items leave to be added up: [items of all images, partial_size]
    std::int64_t partial_size;
    std::int64_t patch_mean;       // [kConvLargestPatch] double
    std::int64_t covariance;       // [kConvLargestPatch, kConvLargestPatch] double, of layer 1's patches
    std::int64_t size;             // of a task
    std::int64_t scratch;          // of a thread, beside it
    std::int64_t covariance_sums;  // where in scratch the sums of a covariance are, behind the centred example
    std::int64_t shared_scratch;   // where in scratch the copies for shared products are
    // Whether block 0's activation_grad stays in scratch, the items of one data_grad: with stride 2 no later stage
    // needs it.
    bool first_grad_in_scratch;
    std::int64_t first_grad;  // then from one item to the next
};

constexpr std::int64_t conv_half(std::int64_t size, Halving halving) {
    return halving == Halving::kMaxPool ? size / 2 : (size + 1) / 2;
}

constexpr std::int64_t conv_parameters(const ConvShape& shape) {
    std::int64_t count = 0;
    std::int64_t h = shape.height, w = shape.width;
    for (int i = 0; i < shape.blocks; ++i) {
        const std::int64_t inputs = i == 0 ? shape.channels : shape.filters;
        count += shape.filters * (9 * inputs + (shape.conv_bias ? 3 : 2));
        h = conv_half(h, shape.halving);
        w = conv_half(w, shape.halving);
    }
    const std::int64_t features = shape.readout == Readout::kMean ? shape.filters : shape.filters * h * w;
    return count + shape.ways * (features + 1);
}

// Hands out places at multiples of 64 bytes.
struct ConvPlaces {
    std::int64_t step;  // scalars in 64 bytes
    std::int64_t at;

    constexpr std::int64_t take(std::int64_t count) {
        const std::int64_t place = at;
        at += ceil_div(count, step) * step;
        return place;
    }
};

constexpr ConvBlockPlan conv_block_plan(const ConvShape& shape, int i, std::int64_t h, std::int64_t w, int scalar_bytes,
                                        ConvUnit unit) {
    const bool pools = shape.halving == Halving::kMaxPool;
    const std::int32_t channels = conv_channels(shape.filters, unit);
    ConvBlockPlan block{};
    block.inputs = i == 0 ? shape.channels : shape.filters;
    block.input_lanes = i == 0 ? shape.channels : channels;
    block.stride = pools ? 1 : 2;
    block.in_h = static_cast<std::int32_t>(h);
    block.in_w = static_cast<std::int32_t>(w);
    block.out_h = static_cast<std::int32_t>(pools ? h : (h + 1) / 2);
    block.out_w = static_cast<std::int32_t>(pools ? w : (w + 1) / 2);
    block.act_h = static_cast<std::int32_t>(conv_half(h, shape.halving));
    block.act_w = static_cast<std::int32_t>(conv_half(w, shape.halving));
    block.winograd = i > 0 && pools && conv_winograd_pays(block.out_h, block.out_w);
    block.shared = i > 0 && !pools;
    // Tiles of shared products reach each position by a pointer of its own: they rather have few.
    block.vectors = conv_group_vectors(shape.filters, !block.shared && block.out_w >= kConvNarrow, unit);
    block.vectors_back =
        conv_group_vectors(shape.filters, !block.shared && ceil_div(w, block.stride) >= kConvNarrow, unit);
    block.rows = conv_item_rows(block.out_h, block.out_w, shape.halving);
    block.items = static_cast<std::int32_t>(ceil_div(block.out_h, block.rows));
    block.act_rows = conv_item_rows(larger(1, block.act_h), larger(1, block.act_w), shape.halving);
    block.half_items = static_cast<std::int32_t>(ceil_div(block.act_h, block.act_rows));
    const auto together = static_cast<std::int32_t>(conv_shared_images(block.out_h, block.out_w));
    block.forward_items = block.shared && block.items == 1 ? together : 1;
    block.pad = i + 1 < shape.blocks ? 1 : 0;
    const std::int64_t row = (block.out_w + 2 + block.stride * (w + 2)) * channels * scalar_bytes;
    block.weight_rows = larger(2, kConvWeightBytes / row / 2 * 2);
    block.weight_images = larger(1, block.weight_rows / block.out_h);
    return block;
}

// alone: one thread works on the task.
constexpr ConvCpuLayout conv_cpu_layout(const ConvShape& shape, std::int64_t examples, int scalar_bytes, ConvUnit unit,
                                        bool alone) {
    const bool pools = shape.halving == Halving::kMaxPool;
    const std::int64_t n = examples, channels = conv_channels(shape.filters, unit);
    ConvCpuLayout layout{};
    layout.channels = static_cast<std::int32_t>(channels);
    std::int64_t h = shape.height, w = shape.width, items = 1, largest_half = 0;
    std::int64_t winograd_scratch = 0;
    for (int i = 0; i < shape.blocks; ++i) {
        ConvBlockPlan& block = layout.blocks[i] = conv_block_plan(shape, i, h, w, scalar_bytes, unit);
        block.data_grad_items = 1;
        if (block.shared && layout.blocks[i - 1].half_items == 1) {
            block.data_grad_items = static_cast<std::int32_t>(conv_shared_images(block.out_h, block.out_w));
            if (i == 1) block.data_grad_items = smaller(block.data_grad_items, kConvFirstGrads);
        }
        items = larger(items, larger(block.items, block.half_items));
        h = block.act_h;
        w = block.act_w;
        if (pools || i > 0 || shape.blocks == 1) largest_half = larger(largest_half, h * w);
        if (block.winograd) winograd_scratch = larger(conv_winograd_scratch(channels), conv_outer_scratch(channels));
    }
    layout.features = shape.readout == Readout::kMean ? channels : h * w * channels;
    for (int i = 0; i < shape.blocks; ++i) {
        ConvBlockPlan& block = layout.blocks[i];
        block.kept = n;
        if (!alone || pools || i + 1 == shape.blocks) continue;
        const std::int64_t bytes = std::int64_t{block.act_h + 2} * (block.act_w + 2) * channels * scalar_bytes;
        const ConvBlockPlan& reader = layout.blocks[i + 1];
        const std::int64_t at_once = larger(reader.weight_images, reader.forward_items);
        block.kept = smaller(n, larger(at_once, kConvKeptBytes / bytes));
    }

    ConvPlaces places{64 / scalar_bytes, 0};
    // Convolutions read the borders of these, where zeros are before the first task and stay.
    layout.images = places.take(n * (shape.height + 2) * (shape.width + 2) * shape.channels);
    for (int i = 0; i < shape.blocks; ++i) {
        ConvBlockPlan& block = layout.blocks[i];
        const std::int64_t out = std::int64_t{block.out_h + 2} * (block.out_w + 2);
        const std::int64_t half = std::int64_t{block.act_h + 2 * block.pad} * (block.act_w + 2 * block.pad);
        block.raw = i > 0 ? places.take(n * out * channels) : -1;
        // Tiles of F(2x2, 3x3) over an odd image reach one row and one position beyond the last border.
        block.activation_size = block.kept * half * channels;
        block.activation_beyond = block.pad > 0 && pools ? (block.act_w + 3) * channels : 0;
        block.activation = places.take(block.activation_size + block.activation_beyond);
    }
    for (int i = 0; i < shape.blocks; ++i) {
        ConvBlockPlan& block = layout.blocks[i];
        const std::int64_t half = n * block.act_h * block.act_w * channels;
        block.weight = places.take(9 * block.inputs * channels);
        block.weight_grad = places.take(9 * block.inputs * channels);
        block.vector = places.take(kConvVectors * channels);
        block.winner = pools && i > 0 ? places.take(half) : -1;
        block.choice = pools ? places.take(ceil_div(half, scalar_bytes)) : -1;
    }
    layout.readout = shape.readout == Readout::kMean ? places.take(n * channels) : -1;
    layout.activation_grad_size = n * largest_half * channels;
    layout.activation_grad = places.take(layout.activation_grad_size);
    layout.classifier = places.take(shape.ways * layout.features);
    layout.classifier_grad = places.take(shape.ways * layout.features);
    layout.classifier_bias = places.take(shape.ways);
    layout.classifier_bias_grad = places.take(shape.ways);
    layout.first_weight = places.take((pools ? 12 : 9) * shape.channels * channels);
    const std::int64_t matrix = shape.blocks > 1 ? shape.filters * channels : 0;  // of one tap
    layout.weight_back = places.take(9 * matrix);
    layout.transformed = places.take(winograd_scratch > 0 || !pools ? 16 * matrix : 0);
    layout.products = places.take(16 * matrix);
    layout.logits = places.take(n * shape.ways);
    layout.logits_grad = places.take(n * shape.ways);
    // An item leaves two vectors of channels and its part of layer 1's weight gradient; or an example that of the
    // patches' covariance.
    const std::int64_t patch = 9 * shape.channels;
    layout.partial_size = 2 * channels + larger(patch * channels, ceil_div(patch * patch, unit.lanes) * unit.lanes);
    layout.partial = places.take(n * items * layout.partial_size);
    const std::int64_t doubles = std::int64_t{sizeof(double)} / scalar_bytes;
    layout.patch_mean = places.take(kConvLargestPatch * doubles);
    layout.covariance = places.take(kConvLargestPatch * kConvLargestPatch * doubles);
    layout.size = places.at;
    // A thread keeps to itself of block 0: an item's gradient, with the inputs under its windows; what F(2, 3) makes of
    // two rows' inputs; or the example of which the covariance is made. Or the tiles of F(2x2, 3x3); and what is copied
    // for shared products.
    const ConvBlockPlan& first = layout.blocks[0];
    layout.first_grad_in_scratch = !pools && shape.blocks > 1;
    layout.first_grad = layout.first_grad_in_scratch ? first.act_rows * first.act_w * channels : 0;
    const std::int64_t first_row = (shape.width + 2) * shape.channels;
    layout.covariance_sums = conv_centred((shape.height + 2) * first_row);
    const std::int64_t of_first =
        larger(larger(first.rows * first.out_w * channels, 4 * ceil_div(first_row, unit.lanes) * unit.lanes),
               layout.covariance_sums + kConvCovarianceSums);
    places.take(larger(larger(of_first, winograd_scratch),
                       layout.first_grad_in_scratch ? layout.blocks[1].data_grad_items * layout.first_grad : 0));
    layout.shared_scratch = pools ? 0 : places.at - layout.size;
    const std::int64_t shared_end = layout.shared_scratch + (shape.blocks > 1 ? conv_shared_scratch(channels) : 0);
    places.take(larger(0, shared_end - (places.at - layout.size)));
    layout.scratch = places.at - layout.size;
    return layout;
}

// Which tasks run side by side, one thread each; the rest run one after the other, all threads on each.
struct ConvCpuPlan {
    std::int64_t side_by_side;     // the first so many tasks
    std::int64_t teams;            // tasks in memory at once
    std::int64_t team_scalars;     // of one task and its thread
    std::int64_t workspace_bytes;  // of all
    std::int64_t mean_rows;        // of gradients, while their mean is made
};

constexpr ConvCpuPlan plan_conv_meta_step_cpu(const ConvShape& shape, std::int64_t tasks, std::int64_t support,
                                              std::int64_t query, int scalar_bytes, ConvUnit unit, int threads) {
    const std::int64_t examples = larger(support, query), side_by_side = tasks / threads * threads;
    const ConvCpuLayout alone = conv_cpu_layout(shape, examples, scalar_bytes, unit, /*alone=*/true);
    const ConvCpuLayout together = conv_cpu_layout(shape, examples, scalar_bytes, unit, /*alone=*/false);
    const std::int64_t teams = side_by_side > 0 ? threads : 1;
    const std::int64_t one = side_by_side > 0 ? alone.size + alone.scratch : 0;
    const std::int64_t large_team = side_by_side < tasks ? together.size + threads * together.scratch : 0;
    // The first place is moved up to a multiple of 64 bytes.
    return {side_by_side, teams, one, larger(teams * one, large_team) * scalar_bytes + 64, mean_slots(tasks, threads)};
}

}  // namespace signmaml
