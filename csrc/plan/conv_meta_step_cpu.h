// How the CPU backend lays out a meta-step of a convolutional network: the sizes of every block, offsets into a task's
// memory, and the pieces ("items") that threads may share. Pure functions of the shape.
// Only plan_conv_meta_step_cpu depends on the number of threads or tasks, and no choice here changes a result.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "params/conv_meta_step.h"
#include "plan/math.h"

namespace signmaml {

// How one instruction set's kernels group channels: `lanes` scalars per vector, and at most `vectors_wide` vectors of
// channels in a register tile of many positions, `vectors_narrow` in one of few.
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

// Vectors in a group of channels: the largest number that divides all of them evenly, so that one tile size serves a
// whole row.
constexpr std::int32_t conv_group_vectors(int filters, bool wide, ConvUnit unit) {
    const std::int32_t all = conv_channels(filters, unit) / unit.lanes;
    std::int32_t vectors = wide ? unit.vectors_wide : unit.vectors_narrow;
    while (all % vectors != 0) --vectors;
    return vectors;
}

// The largest number of values under one 3x3 window.
inline constexpr int kConvLargestPatch = 9 * kConvChannels;
// Scratch for the covariance of the patches: a centred image in whole vectors plus one more, and the sums.
constexpr std::int64_t conv_centred(std::int64_t image) { return ceil_div(image, 64) * 64 + 64; }
inline constexpr std::int64_t kConvCovarianceSums = 8 * 3 * 3 * kConvChannels * 16;
// An item takes just enough rows to have this many positions. With fewer, its overhead exceeds its convolution; with
// more, the results leave L1 before their statistics are computed.
inline constexpr std::int64_t kConvItemPositions = 128;

// Rows of an item, in pairs, for an image of `rows` rows. Strided networks prefer a whole image in one item because
// their register tiles can then span several images.
constexpr std::int32_t conv_item_rows(std::int64_t rows, std::int64_t width, Halving halving) {
    const std::int64_t positions = halving == Halving::kMaxPool ? kConvItemPositions : 2 * kConvItemPositions;
    return static_cast<std::int32_t>(smaller(rows, 2 * ceil_div(positions, 2 * width)));
}

// F(2x2, 3x3) handles this many tiles of 2 x 2 outputs at once: enough to fill register tiles, and few enough that
// their 16 transformed and 16 multiplied values per channel stay in cache.
inline constexpr std::int64_t kConvWinogradTiles = 12;

constexpr std::int64_t conv_winograd_scratch(std::int64_t channels) { return 2 * 16 * kConvWinogradTiles * channels; }

// Whether F(2x2, 3x3) saves multiplications, counting its transforms as a fifth more. It does not where most of a tile
// lies outside the image.
constexpr bool conv_winograd_pays(std::int64_t height, std::int64_t width) {
    return 16 * ceil_div(height, 2) * ceil_div(width, 2) * 6 < 9 * height * width * 5;
}

// The weight gradient handles more tiles at once because each batch reads and writes all its matrices.
inline constexpr std::int64_t kConvOuterTiles = 48;
// Padding between tiles or copied positions in the weight gradients: a power-of-two stride would map them to a few sets
// of L1.
inline constexpr std::int64_t kConvOuterGap = 16;

constexpr std::int64_t conv_outer_scratch(std::int64_t channels) {
    return 2 * 16 * kConvOuterTiles * (channels + kConvOuterGap);
}

// Shared products (cpu/isa/conv/shared_products.h) of a stride-2 convolution are computed for a batch of positions
// whose number times the products in one sum is at most this: their blended inputs are stored side by side.
inline constexpr std::int64_t kConvSharedPositions = 384;
inline constexpr std::int64_t kConvSharedRuns = 9;        // products in one sum: three per row times three per column
inline constexpr std::int64_t kConvProducts = 16;         // matrices of products in a weight gradient
inline constexpr std::int64_t kConvOuterPositions = 128;  // copied side by side for one of these matrices
// Images are taken together until they have about this many squares of 2 x 2 outputs, which fill register tiles well.
inline constexpr std::int64_t kConvSharedPairs = 54;
// A thread keeps the gradient of block 0's output for at most this many images at once.
inline constexpr std::int64_t kConvFirstGrads = 6;
// The weight gradient takes about this many bytes of inputs and gradients at a time, and computes all its matrices from
// them before it goes on: they stay in L2.
inline constexpr std::int64_t kConvWeightBytes = 448 * 1024;
// In a network with stride 2, a thread that has a task to itself keeps about this many bytes of each block's output
// except the last one's, and at least the images that the next block takes at once. The other images' outputs are
// recomputed in L2, a few at a time, which beats reading them back.
inline constexpr std::int64_t kConvKeptBytes = 512 * 1024;

constexpr std::int64_t conv_shared_images(std::int64_t out_h, std::int64_t out_w) {
    return larger(1, kConvSharedPairs / (larger(1, out_h / 2) * larger(1, out_w / 2)));
}

// Scalars for copies of inputs or gradients (convolution and data gradient) or of both (weight gradient).
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
    std::int32_t vectors;          // per group of output channels
    std::int32_t vectors_back;     // per group of input channels, in the data gradient
    std::int32_t rows;             // convolution rows per item: an even number, or all
    std::int32_t items;            // per image
    std::int32_t act_rows;         // activation rows per item of the backward pass
    std::int32_t half_items;       // per image
    std::int32_t forward_items;    // items convolved together: 1, or several images where each is one item
    std::int32_t data_grad_items;  // the same in the data gradient, counting items of the block before
    std::int64_t weight_rows;      // convolution rows that the weight gradient takes at once: an even number
    std::int64_t weight_images;    // images that it takes at once
    std::int32_t pad;              // zeros around the activation: 1 where a convolution follows, else 0
    // Places in a task's memory, in scalars.
    std::int64_t weight;       // [groups, 9, inputs, group]
    std::int64_t weight_grad;  // like weight
    std::int64_t vector;       // [kConvVectors, channels]
    std::int64_t raw;          // [n, out_h + 2, out_w + 2, channels]; -1 for block 0
    std::int64_t winner;  // [n, act_h, act_w, channels], the raw value that max-pooling takes; -1 without pooling and
                          // for block 0
    std::int64_t choice;  // [n, act_h, act_w, channels] bytes, which of the four it is; -1 without pooling
    std::int64_t kept;    // images whose activation is kept at once: all, or some of them
    std::int64_t
        activation;  // [kept, act_h + 2 pad, act_w + 2 pad, channels], after BatchNorm and ReLU, with a border of zeros
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
    kSlope,    // coefficient of (raw - mean) in the raw gradient
    kOffset,   // constant term of the raw gradient
    kConvVectors
};

struct ConvCpuLayout {
    std::int32_t channels;  // of every block, padded to whole vectors
    ConvBlockPlan blocks[kConvBlocks];
    std::int64_t features;  // what the classifier reads: [act_h, act_w, channels] of the last block, or [channels]
    // Places in a task's memory, in scalars.
    std::int64_t images;           // [n, height + 2, width + 2, channels of the images]
    std::int64_t readout;          // [n, features] with Readout::kMean; else -1
    std::int64_t activation_grad;  // [n, act_h, act_w, channels] of one block at a time; see first_grad_in_scratch
    std::int64_t activation_grad_size;
    std::int64_t classifier;       // [ways, features]
    std::int64_t classifier_grad;  // [ways, features]
    std::int64_t classifier_bias;  // [ways]
    std::int64_t classifier_bias_grad;
    // The following hold one block at a time, of those after the first.
    std::int64_t first_weight;  // block 0's with BatchNorm's scale: [groups, 9 inputs, group], or where it pools
                                // [groups, 4, 3 inputs, group] for F(2, 3)
    std::int64_t weight_back;   // [groups, 9, filters, group], window and channels exchanged
    std::int64_t transformed;   // weights: [16, filters, channels] for F(2x2, 3x3), or [groups, 16, filters, group]
                                // mixed for shared products
    std::int64_t products;      // [16, groups, filters, group], combined into the weight gradient
    std::int64_t logits;        // [n, ways]
    std::int64_t logits_grad;   // [n, ways]
    std::int64_t partial;       // partial sums of items: [items of all images, partial_size]
    std::int64_t partial_size;
    std::int64_t patch_mean;       // [kConvLargestPatch] double
    std::int64_t covariance;       // [kConvLargestPatch, kConvLargestPatch] double, of layer 1's patches
    std::int64_t size;             // memory of a task
    std::int64_t scratch;          // further memory of each thread
    std::int64_t covariance_sums;  // offset in scratch of the covariance's sums, after the centred example
    std::int64_t shared_scratch;   // offset in scratch of the copies for shared products
    // Whether block 0's activation_grad stays in scratch, for the items of one data_grad: with stride 2 no later stage
    // reads it.
    bool first_grad_in_scratch;
    std::int64_t first_grad;  // if so, scalars from one item to the next
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

// Hands out offsets that are multiples of 64 bytes.
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
    // Tiles of shared products need one pointer per position, so they have few positions.
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
    // Convolutions read the borders of these arrays. They are zeroed before the first task and never written again.
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
    // An item leaves two vectors of channels and its part of layer 1's weight gradient; an example leaves its part of
    // the patches' covariance in the same place.
    const std::int64_t patch = 9 * shape.channels;
    layout.partial_size = 2 * channels + larger(patch * channels, ceil_div(patch * patch, unit.lanes) * unit.lanes);
    layout.partial = places.take(n * items * layout.partial_size);
    const std::int64_t doubles = std::int64_t{sizeof(double)} / scalar_bytes;
    layout.patch_mean = places.take(kConvLargestPatch * doubles);
    layout.covariance = places.take(kConvLargestPatch * kConvLargestPatch * doubles);
    layout.size = places.at;
    // A thread's scratch holds one of these at a time: an item's gradient in block 0, with the inputs under its
    // windows; two rows of inputs as F(2, 3) transforms them; the example whose covariance is computed; the tiles of
    // F(2x2, 3x3); block 0's gradient for one data_grad. The copies for shared products come after it.
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

// What exact MAML needs of a task beside its own memory, which keeps all activations.
struct ConvSecondOrderLayout {
    // The derivatives, in one direction, of all that the passes compute: laid out like the task, after it. Images, what
    // is known of their patches, and pooling's choices are the task's own.
    ConvCpuLayout tangents;
    // The same, but these arrays are the task's own: weights; activations; raw values.
    ConvCpuLayout with_weights, with_activations, with_raw;
    std::int64_t packed;   // scalars of all parameters in the order of conv_spans
    std::int64_t adjoint;  // [packed], the derivative of the query loss in the parameters of a step
    std::int64_t history;  // [steps kept, packed], the parameters before each step
    std::int64_t end;
};

// Where a parameter tensor that has a gradient lies in a task's memory, and in a packed row.
struct ConvSpan {
    int tensor;  // its number in theta's order
    std::int64_t parameter, gradient, row, count;
};

// All of them: weight, gamma and beta of each block, then the classifier's weight and bias.
struct ConvSpans {
    ConvSpan span[3 * kConvBlocks + 2];
    int count;
    std::int64_t packed;
};

constexpr ConvSpans conv_spans(const ConvShape& shape, const ConvCpuLayout& layout) {
    ConvSpans spans{};
    const auto add = [&spans](int tensor, std::int64_t parameter, std::int64_t gradient, std::int64_t count) {
        spans.span[spans.count++] = {tensor, parameter, gradient, spans.packed, count};
        spans.packed += count;
    };
    const int in_block = conv_tensors_of_block(shape), classifier = shape.blocks * in_block;
    for (int i = 0; i < shape.blocks; ++i) {
        const ConvBlockPlan& b = layout.blocks[i];
        const int beta = (i + 1) * in_block - 1;
        const auto vector = [&b, &layout](ConvVector which) { return b.vector + which * layout.channels; };
        add(i * in_block, b.weight, b.weight_grad, 9 * std::int64_t{b.inputs} * layout.channels);
        add(beta - 1, vector(kGamma), vector(kGammaGrad), shape.filters);
        add(beta, vector(kBeta), vector(kBetaGrad), shape.filters);
    }
    add(classifier, layout.classifier, layout.classifier_grad, shape.ways * layout.features);
    add(classifier + 1, layout.classifier_bias, layout.classifier_bias_grad, shape.ways);
    return spans;
}

// What a task keeps of its inner steps.
struct ConvKept {
    std::int64_t parameters;  // of how many steps: of all for exact MAML, which goes back through them
    std::int64_t directions;  // likewise: of all if rates have gradients, of one if they vary within a tensor
    bool row;                 // of the step at hand, in theta's order: rates vary within a tensor, or steps are counted
    bool start;               // the parameters while a gradient is taken at the sharpest place near them
};

constexpr ConvKept conv_kept(Method method, RateOptions rates, bool sharp, bool counted, std::int64_t steps,
                             std::int64_t query) {
    const bool learns = rates.learnable && query > 0, row = rates.by_element || counted;
    return {method == Method::kMaml && query > 0 ? steps : 0,
            learns ? steps
            : row  ? smaller(1, steps)
                   : 0,
            row, sharp && steps > 0};
}

constexpr ConvSecondOrderLayout conv_second_order_layout(const ConvShape& shape, const ConvCpuLayout& layout,
                                                         std::int64_t history, int scalar_bytes) {
    ConvSecondOrderLayout all{};
    ConvCpuLayout& moved = all.tangents;
    moved = layout;
    const auto move = [&layout](std::int64_t& place) {
        if (place >= 0) place += layout.size;
    };
    for (int i = 0; i < shape.blocks; ++i) {
        ConvBlockPlan& b = moved.blocks[i];
        for (std::int64_t* place : {&b.weight, &b.weight_grad, &b.vector, &b.raw, &b.winner, &b.activation}) {
            move(*place);
        }
    }
    for (std::int64_t* place :
         {&moved.readout, &moved.activation_grad, &moved.classifier, &moved.classifier_grad, &moved.classifier_bias,
          &moved.classifier_bias_grad, &moved.first_weight, &moved.weight_back, &moved.transformed, &moved.products,
          &moved.logits, &moved.logits_grad, &moved.partial}) {
        move(*place);
    }
    all.with_weights = all.with_activations = all.with_raw = moved;
    for (int i = 0; i < shape.blocks; ++i) {
        all.with_weights.blocks[i].weight = layout.blocks[i].weight;
        all.with_activations.blocks[i].activation = layout.blocks[i].activation;
        all.with_raw.blocks[i].raw = layout.blocks[i].raw;
    }
    all.with_weights.weight_back = layout.weight_back;
    all.with_weights.transformed = layout.transformed;
    all.packed = conv_spans(shape, layout).packed;
    ConvPlaces places{64 / scalar_bytes, 2 * layout.size};
    all.adjoint = places.take(all.packed);
    all.history = places.take(history * all.packed);
    all.end = places.at;
    return all;
}

// Where it keeps that: after the task's own memory, and after the derivatives if there are any. Rows are in theta's
// order.
struct ConvKeptLayout {
    ConvSecondOrderLayout second;  // if parameters are kept
    std::int64_t parameters;       // [P] of the step at hand, or counts of steps
    std::int64_t directions;       // [steps kept, P]
    std::int64_t adjoint;          // [P]
    std::int64_t start;            // all parameters in the order of conv_spans
    std::int64_t end;
};

constexpr ConvKeptLayout conv_kept_layout(const ConvShape& shape, const ConvCpuLayout& layout, const ConvKept& kept,
                                          int scalar_bytes) {
    ConvKeptLayout all{};
    ConvPlaces places{64 / scalar_bytes, layout.size};
    if (kept.parameters > 0) {
        all.second = conv_second_order_layout(shape, layout, kept.parameters, scalar_bytes);
        places.at = all.second.end;
    }
    const std::int64_t row = kept.directions > 0 ? conv_parameters(shape) : 0;
    all.parameters = places.take(kept.row ? row : 0);
    all.directions = places.take(kept.directions * row);
    all.adjoint = places.take(row);
    all.start = places.take(kept.start ? conv_spans(shape, layout).packed : 0);
    all.end = places.at;
    return all;
}

// Which tasks run side by side, one thread each. The rest run one after another with all threads on each.
struct ConvCpuPlan {
    std::int64_t side_by_side;     // how many tasks, counted from the first, run side by side
    std::int64_t teams;            // tasks in memory at once
    std::int64_t team_scalars;     // memory of one task and its thread
    std::int64_t workspace_bytes;  // for all teams
    std::int64_t mean_rows;        // rows of gradients in memory while their mean is computed
};

constexpr ConvCpuPlan plan_conv_meta_step_cpu(const ConvShape& shape, std::int64_t tasks, std::int64_t support,
                                              std::int64_t query, const ConvKept& kept, int scalar_bytes, ConvUnit unit,
                                              int threads) {
    const std::int64_t examples = larger(support, query), side_by_side = tasks / threads * threads;
    const auto layout_for = [&](bool alone) {
        return conv_cpu_layout(shape, examples, scalar_bytes, unit, alone && kept.parameters == 0);
    };
    const auto size_of = [&](const ConvCpuLayout& layout) {
        return conv_kept_layout(shape, layout, kept, scalar_bytes).end;
    };
    const ConvCpuLayout alone = layout_for(true), together = layout_for(false);
    const std::int64_t teams = side_by_side > 0 ? threads : 1;
    const std::int64_t one = side_by_side > 0 ? size_of(alone) + alone.scratch : 0;
    const std::int64_t large_team = side_by_side < tasks ? size_of(together) + threads * together.scratch : 0;
    // 64 extra bytes: the start of the workspace is rounded up to a multiple of 64.
    return {side_by_side, teams, one, larger(teams * one, large_team) * scalar_bytes + 64, mean_slots(tasks, threads)};
}

}  // namespace signmaml
