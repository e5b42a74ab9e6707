// How a Conv-N meta-step runs on a GPU: the launches in order, their grids and shared memory, and the workspace. Pure
// functions of the shape and the counts; what a task computes never depends on T.
//
// Design. Activations are stored as [task][image][height][width][channel], weights as [task][9 * channels in][filters],
// packed from theta once per meta-step. A convolution is an implicit GEMM through mma.sync over tiles of at most 128
// positions. A tile's input, including its halo, is in shared memory 32 channels at a time (16 in fp32), as operands of
// tensor cores; the weights follow tap by tap, loaded while the tap before is multiplied. A pass stores the raw output
// z_l of block l. The next kernel applies BatchNorm, ReLU and the halving as it reads z_l, and stores the result if a
// backward pass follows: a_l, and one byte per value that names the winner of the pooling. Likewise data_grad computes
// dz_l as it reads its inputs, and stores it for weight_grad.
// BatchNorm's sums are epilogues: a thread block owns a slice of the tiles and writes one partial sum per channel.
// Every reader adds the slices (at most 64) again in a fixed order, which costs less than a launch of its own.
// A forward pass of N blocks launches first (or forward) for block 1, forward for blocks 2..N, and head. The backward
// pass launches data_grad and weight_grad for blocks N..2, first_grad for block 1, and sign_update or meta_accumulate
// for all weights at once: 3 N + 1 launches in all, 13 for Conv4. Block 1 needs no raw output: see
// kernels/conv_first.cuh.
// Exact MAML keeps the weights before each step, and goes back through the steps after the query pass. For each step it
// runs the passes again, without weight gradients, and beside them their derivatives in the direction in which the step
// moved: the convolutions' are sums of two products in the same kernels, the rest is in kernels/conv_tangents.cuh.
// Eight convolutions a layer and step, and 9 N - 1 launches, 35 for Conv4. No tape: beside the weights only one step's
// arrays.
// A sharpness-aware step makes its passes twice: the first one's gradients are kept, conv_climb raises the weights by
// them, and the second one's gradients, at the raised weights, move the weights themselves.
// Rates that are learnable keep the directions of all steps. One launch behind the query pass, or for exact MAML one a
// step, makes their gradients: see kernels/conv_rates.cuh.
#pragma once

#include <cstdint>
#include <vector>

#include "params/conv_kernels.h"
#include "params/conv_meta_step.h"
#include "params/step_options.h"
#include "plan/math.h"

namespace signmaml {

// ---- sizes

inline ConvBlock conv_block(const ConvShape& shape, int number) {
    ConvBlock block{};
    int height = shape.height, width = shape.width;
    for (int i = 0; i <= number; ++i) {
        const bool pools = shape.halving == Halving::kMaxPool;
        block.in_height = height;
        block.in_width = width;
        block.in_channels = i == 0 ? shape.channels : shape.filters;
        block.stride = pools ? 1 : 2;
        block.window = pools ? 2 : 1;
        block.height = pools ? height : (height + 1) / 2;
        block.width = pools ? width : (width + 1) / 2;
        block.act_height = block.height / block.window;
        block.act_width = block.width / block.window;
        block.filters = shape.filters;
        block.eps = static_cast<float>(shape.eps[i]);
        block.by_channels = divisor_of(block.in_channels, kConvTile * kConvChannels);
        height = block.act_height;
        width = block.act_width;
    }
    return block;
}

// Offsets of all parameters, packed and in theta. The packed tensors begin at multiples of four floats.
inline ConvNetwork conv_network(const ConvShape& shape, bool by_covariance) {
    ConvNetwork net{};
    std::int64_t packed = 0, theta = 0;
    const std::int64_t filters = shape.filters;
    for (int i = 0; i < shape.blocks; ++i) {
        ConvOffsets& places = net.blocks[i];
        places.in_channels = i == 0 ? shape.channels : shape.filters;
        places.tensor = i * conv_tensors_of_block(shape);
        const std::int64_t weights = kConvTaps * places.in_channels * filters;
        places.weight = packed;
        places.gamma = places.weight + weights;
        places.beta = places.gamma + filters;
        packed = places.beta + filters;
        places.theta_weight = theta;
        theta += weights;
        places.theta_bias = shape.conv_bias ? theta : -1;
        theta += shape.conv_bias ? filters : 0;
        places.theta_gamma = theta;
        places.theta_beta = theta + filters;
        theta += 2 * filters;
    }
    const ConvBlock last = conv_block(shape, shape.blocks - 1);
    net.pixels = shape.readout == Readout::kFlatten ? last.act_height * last.act_width : 1;
    net.head_weight = packed;
    net.head_bias = packed + std::int64_t{shape.ways} * net.pixels * filters;
    net.theta_head_weight = theta;
    net.theta_head_bias = theta + std::int64_t{shape.ways} * net.pixels * filters;
    net.parameters = net.theta_head_bias + shape.ways;
    net.count = shape.blocks;
    net.filters = shape.filters;
    net.ways = shape.ways;
    net.channels = shape.channels;
    net.tensors = conv_tensors(shape);
    net.conv_bias = shape.conv_bias;
    net.by_covariance = by_covariance;
    return net;
}

// ---- tiles

// Which inputs a tile of positions reads, along one axis.
enum class ConvHalo : std::int32_t {
    kForward1 = 0,     // a 3-wide convolution, stride 1
    kForward2 = 1,     // the same, stride 2
    kTransposed2 = 2,  // the outputs that inputs of a stride-2 convolution contribute to; tiles begin at even positions
    kPooled = 3,       // the pixels under a 2-wide window of a stride-1 convolution
};

constexpr int halo_of(ConvHalo halo, int extent) {
    if (halo == ConvHalo::kForward1) return extent + 2;
    if (halo == ConvHalo::kForward2) return 2 * extent + 1;
    return halo == ConvHalo::kTransposed2 ? (extent + 1) / 2 + 1 : 2 * extent + 2;
}

struct ConvTileLimits {
    int positions;    // per tile, at most
    int halo;         // positions that a tile reads, over all its images, at most
    int slices;       // per task, at most
    int tiles;        // per slice, at least
    bool whole_rows;  // only the width has a halo: the weight gradient reads one row of taps
};

// Chooses the tile with the least total cost: every tile costs the products of a full one plus the positions it reads.
inline ConvTiles conv_tiles(ConvHalo halo, int count, int height, int width, const ConvTileLimits& limits) {
    ConvTiles best{};
    std::int64_t least = -1;
    const bool even = halo == ConvHalo::kTransposed2;
    const auto halo_height = [&](int extent) { return limits.whole_rows ? extent : halo_of(halo, extent); };
    int previous = 0;
    for (int columns = 1; columns <= width; ++columns) {
        int tile_width = static_cast<int>(ceil_div(width, columns));
        if (even && columns > 1) tile_width += tile_width % 2;
        if (tile_width == previous) continue;
        previous = tile_width;
        const int halo_width = halo_of(halo, tile_width);
        // Where positions are taken by parity, every parity has as many places as the first.
        const auto places = [&](int rows_of_tile) {
            return even ? (rows_of_tile + rows_of_tile % 2) * (tile_width + tile_width % 2) : rows_of_tile * tile_width;
        };
        int tile_height = static_cast<int>(smaller(height, limits.positions / tile_width));
        while (tile_height > 0 && places(tile_height) > limits.positions) --tile_height;
        while (tile_height > 0 && halo_height(tile_height) * halo_width > limits.halo) --tile_height;
        if (even && tile_height < height) tile_height -= tile_height % 2;
        if (tile_height <= 0) continue;
        const int rows = static_cast<int>(ceil_div(height, tile_height));
        tile_height = static_cast<int>(ceil_div(height, rows));
        if (even && rows > 1) tile_height += tile_height % 2;
        int images = 1;
        if (rows == 1 && tile_width >= width) {
            const int of_image = halo_height(tile_height) * halo_width;
            images = static_cast<int>(
                smaller(count, smaller(limits.positions / places(tile_height), limits.halo / of_image)));
        }
        const std::int64_t groups = ceil_div(count, images);
        const std::int64_t tiles = groups * rows * ceil_div(width, tile_width);
        const std::int64_t cost =
            tiles * (limits.positions + std::int64_t{images} * halo_height(tile_height) * halo_width);
        if (least >= 0 && cost >= least) continue;
        least = cost;
        best.count = count;
        best.height = height;
        best.width = width;
        best.tile_images = images;
        best.tile_height = tile_height;
        best.tile_width = tile_width;
        best.tiles_y = rows;
        best.tiles_x = static_cast<int>(ceil_div(width, tile_width));
        best.tiles = static_cast<int>(tiles);
        best.halo_height = halo_of(halo, tile_height);
        best.halo_width = halo_width;
    }
    const std::int64_t per_slice = larger(limits.tiles, ceil_div(best.tiles, limits.slices));
    best.tiles_per_slice = static_cast<int>(per_slice);
    best.slices = static_cast<int>(ceil_div(best.tiles, per_slice));
    // Tiles are small: these are never too large. Pixels of a tile are counted once a channel.
    constexpr std::int64_t kMost = 1 << 14;
    best.by_area = divisor_of(best.tile_height * best.tile_width, kMost);
    best.by_width = divisor_of(best.tile_width, kMost);
    best.by_height = divisor_of(best.tile_height, kMost);
    best.by_halo = divisor_of(best.halo_height * best.halo_width, kMost);
    best.by_halo_width = divisor_of(best.halo_width, kMost);
    best.by_parity_width = divisor_of((best.tile_width + 1) / 2, kMost);
    best.by_parity_area = divisor_of((best.tile_height + 1) / 2 * std::int64_t{best.by_parity_width.value}, kMost);
    return best;
}

// At most this many slices per task: enough blocks to fill a GPU when tasks are few, yet few enough for every reader to
// add them up.
inline constexpr int kConvSlices = 64;
// Fewer for products, so that 8 tasks fill an H100 once, with two blocks a multiprocessor, and not once and a little.
inline constexpr int kConvProductSlices = 32;
// And for weight gradients: each slice writes and reads back 9 * channels * filters floats.
inline constexpr int kConvWeightSlices = 8;
inline constexpr int kConvMomentSlices = 16;
// At most this many positions in shared memory: two blocks fit on a multiprocessor of an H100, and one on any (a test
// holds the largest: strided, in fp32, 128 filters).
inline constexpr int kConvHalo = 224;
inline constexpr int kConvStridedHalo = 416;
inline constexpr int kConvRowHalo = 168;
inline constexpr int kConvFirstTile = 64;
inline constexpr int kConvFirstHalo = 400;

inline ConvTiles forward_tiles(const ConvBlock& block, int count) {
    const bool strided = block.stride == 2;
    return conv_tiles(strided ? ConvHalo::kForward2 : ConvHalo::kForward1, count, block.height, block.width,
                      {kConvTile, strided ? kConvStridedHalo : kConvHalo, kConvProductSlices, 1, false});
}

inline ConvTiles data_grad_tiles(const ConvBlock& block, int count) {
    return conv_tiles(block.stride == 2 ? ConvHalo::kTransposed2 : ConvHalo::kForward1, count, block.in_height,
                      block.in_width, {kConvTile, kConvHalo, kConvProductSlices, 1, false});
}

inline ConvTiles weight_grad_tiles(const ConvBlock& block, int count) {
    // With more filters the partial sums are more expensive, and there are more blocks anyway.
    const int tiles = static_cast<int>(larger(1, block.filters / 32));
    return conv_tiles(block.stride == 2 ? ConvHalo::kForward2 : ConvHalo::kForward1, count, block.height, block.width,
                      {kConvTile, kConvRowHalo, kConvWeightSlices, tiles, true});
}

inline ConvTiles moment_tiles(const ConvBlock& block, int count) {
    ConvTiles tiles = conv_tiles(block.stride == 2 ? ConvHalo::kForward2 : ConvHalo::kForward1, count, block.height,
                                 block.width, {kConvTile, kConvStridedHalo, kConvMomentSlices, 1, false});
    return tiles;
}

inline ConvTiles first_tiles(const ConvBlock& block, int count) {
    return conv_tiles(block.window == 2 ? ConvHalo::kPooled : ConvHalo::kForward2, count, block.act_height,
                      block.act_width, {kConvFirstTile, kConvFirstHalo, kConvSlices, 1, false});
}

// ---- kernels

// Columns of the product that a thread block computes: 8 for the narrowest network, else 32, or 64 where that reads the
// input once instead of twice.
constexpr int conv_columns(int filters) { return filters <= 8 ? 8 : filters <= 32 ? 32 : 64; }
constexpr int conv_weight_columns(int filters) { return filters <= 8 ? 8 : 32; }

// Floats from one row of a tile to the next: at least `width`, and such that in banks of shared memory the last
// position of a row is as far from the first of the next as positions are from their neighbours, which is `step`.
// `last` is how far the last is from the start of its row, and the next row is `rows` rows of the tile on.
inline int conv_pitch(int width, int rows, int last, int step) {
    for (int pitch = width; pitch < width + 32; pitch += 4) {
        if ((rows * pitch - last - step) % 32 == 0) return pitch;
    }
    return width;
}

// The tile, two slabs of weights, `constants` of BatchNorm, and the sums of all warps.
inline ConvMemory product_memory(ConvPrecision precision, const ConvTiles& tiles, int pitch, int columns,
                                 int constants) {
    ConvMemory memory{};
    memory.row = conv_row(precision);
    memory.pitch = pitch;
    memory.plane = tiles.tile_images * tiles.halo_height * pitch;
    memory.slabs = conv_planes(precision) * memory.plane;
    memory.norm = memory.slabs + 2 * conv_planes(precision) * columns * memory.row;
    memory.scratch = memory.norm + constants;
    memory.end = memory.scratch + 2 * (kConvProductThreads / 32) * columns;
    return memory;
}

inline ConvMemory forward_memory(ConvPrecision precision, const ConvTiles& tiles, int stride, int channels,
                                 int columns) {
    const int row = conv_row(precision), step = stride * row;
    const int pitch = conv_pitch(tiles.halo_width * row, stride, (tiles.tile_width - 1) * step, step);
    return product_memory(precision, tiles, pitch, columns, 3 * channels);
}

inline ConvMemory data_grad_memory(ConvPrecision precision, const ConvTiles& tiles, int stride, int channels,
                                   int filters, int columns) {
    // Neighbours of one parity read neighbouring outputs.
    const int neighbours = stride == 1 ? tiles.tile_width : tiles.by_parity_width.value;
    const int row = conv_row(precision);
    const int pitch = conv_pitch(tiles.halo_width * row, 1, (neighbours - 1) * row, row);
    return product_memory(precision, tiles, pitch, columns, 5 * filters + 2 * channels);
}

inline ConvMemory weight_grad_memory(const ConvTiles& tiles, int stride, int columns) {
    ConvMemory memory{};
    memory.row = stride == 1 ? kConvDeepRow : kConvDeepRowStrided;
    const int step = stride * memory.row;
    memory.pitch = conv_pitch(tiles.halo_width * memory.row, 1, (tiles.tile_width - 1) * step, step);
    memory.slabs = tiles.tile_images * tiles.tile_height * memory.pitch;
    // In the end it carries the sums of all shares of the depth but one, of three taps.
    const std::int64_t sums = std::int64_t{kConvDepthShares - 1} * 3 * kConvChunk * columns;
    memory.norm = memory.scratch = static_cast<int>(larger(memory.slabs + kConvTile * (columns + 8), sums));
    memory.end = memory.scratch + kConvTile;
    return memory;
}

enum class ConvKernel : std::int32_t {
    kPatchMoments,
    kPack,
    kFirst,
    kForward,
    kHead,
    kDataGrad,
    kWeightGrad,
    kFirstGrad,
    kRawGrad,
    kSignUpdate,
    kMetaAccumulate,
    kUnpack,
    kRemember,
    kDirection,
    kFirstTangent,
    kTangentSums,
    kTangentActivate,
    kTangentHead,
    kTangentGradSums,
    kTangentRawGrad,
    kSubtract,
    kRateGrads,
    kClimbSquares,
    kClimb,
};

constexpr const char* name_of(ConvKernel kernel) {
    switch (kernel) {
        case ConvKernel::kPatchMoments: return "patch_moments";
        case ConvKernel::kPack: return "conv_pack";
        case ConvKernel::kFirst: return "conv_first";
        case ConvKernel::kForward: return "conv_forward";
        case ConvKernel::kHead: return "conv_head";
        case ConvKernel::kDataGrad: return "conv_data_grad";
        case ConvKernel::kWeightGrad: return "conv_weight_grad";
        case ConvKernel::kFirstGrad: return "conv_first_grad";
        case ConvKernel::kRawGrad: return "conv_raw_grad";
        case ConvKernel::kSignUpdate: return "conv_sign_update";
        case ConvKernel::kMetaAccumulate: return "conv_meta_accumulate";
        case ConvKernel::kUnpack: return "conv_unpack";
        case ConvKernel::kRemember: return "conv_remember";
        case ConvKernel::kDirection: return "conv_direction";
        case ConvKernel::kFirstTangent: return "conv_first_tangent";
        case ConvKernel::kTangentSums: return "conv_tangent_sums";
        case ConvKernel::kTangentActivate: return "conv_tangent_activate";
        case ConvKernel::kTangentHead: return "conv_tangent_head";
        case ConvKernel::kTangentGradSums: return "conv_tangent_grad_sums";
        case ConvKernel::kTangentRawGrad: return "conv_tangent_raw_grad";
        case ConvKernel::kSubtract: return "conv_subtract";
        case ConvKernel::kRateGrads: return "conv_rate_grads";
        case ConvKernel::kClimbSquares: return "conv_climb_squares";
        default: return "conv_climb";
    }
}

// What a launch is a part of.
enum class ConvPart : std::int32_t {
    kPass = 0,     // a step, the query pass, or what lies before and after
    kAgain = 1,    // a step's own passes once more, on the way back through the steps
    kTangent = 2,  // their derivatives
    kRaised = 3,   // a step's passes at the sharpest place nearby
};

constexpr const char* name_of(ConvPart part) {
    switch (part) {
        case ConvPart::kPass: return "pass";
        case ConvPart::kAgain: return "again";
        case ConvPart::kTangent: return "tangent";
        default: return "raised";
    }
}

struct ConvLaunch {
    ConvKernel kernel;
    ConvPart part;
    int block;   // of the network; -1: all, or none
    int step;    // 0 to K - 1: inner steps; K: the query pass; -1: before or after
    bool query;  // works on the query set
    std::int64_t grid_x, grid_y, grid_z;
    int threads;
    std::int64_t shared_bytes;
    double flops;  // multiplications and additions of the algorithm, before a precision splits them into several
    double bytes;  // of memory traffic, each array that the kernel touches counted once
};

// ---- workspace

// One array of the workspace: `stride` bytes per task, starting at `offset`.
struct ConvArray {
    std::int64_t offset, stride;
    int element_bytes;
};

// What the derivatives of a step have as the step itself does; for exact MAML only.
struct ConvTangentArrays {
    ConvArray direction, norm, first_partials, features, logits, scores, raw_grad;
    ConvArray raw[kConvBlocks], activation[kConvBlocks], activation_grad[kConvBlocks], statistics[kConvBlocks],
        grad_sums[kConvBlocks];
};

struct ConvWorkspace {
    ConvArray weights, norm, support_sums, query_sums, support_moments, query_moments, first_partials, features, scores,
        raw_grad;
    ConvArray raw[kConvBlocks], activation[kConvBlocks], choices[kConvBlocks], activation_grad[kConvBlocks],
        statistics[kConvBlocks], grad_sums[kConvBlocks], weight_partials[kConvBlocks];
    ConvArray history;                  // [K, conv_packed] float: the weights before each step
    ConvArray directions;               // [K, conv_packed] float: of each step, for the rates' gradients
    ConvArray ascent, raised, squares;  // of sharpness-aware steps: gradient, weights there, sums for its norm
    ConvArray counts;                   // of steps, packed like weights, float
    ConvArray shares;
    ConvTangentArrays tangents;
    std::int64_t bytes;
};

struct ConvRequest {
    std::int64_t tasks;
    int support, query, steps;
    bool wants_grads;    // of the query loss
    bool wants_adapted;  // the parameters after the inner loop, or the counts of its steps
    Method method;
    StepOptions how;

    bool has_way_back() const { return wants_grads && query > 0 && steps > 0; }
    bool learns_rates() const { return how.rates.learnable && has_way_back(); }
    bool differentiates_steps() const { return method == Method::kMaml && has_way_back(); }
};

inline ConvRequest conv_request(const ConvMetaStepParams<float>& params) {
    return {params.tasks,
            params.support.count,
            params.query.count,
            params.steps,
            params.grads != nullptr,
            params.adapted != nullptr || params.counts != nullptr,
            params.method,
            params.how};
}

// Floats of a task's weights, so many that the next row of them begins at a multiple of 16 bytes.
inline std::int64_t conv_packed(const ConvNetwork& net) { return ceil_div(net.head_bias + net.ways, 4) * 4; }

// Thread blocks that go through all weights of a task.
inline std::int64_t conv_weight_blocks(const ConvNetwork& net) { return smaller(16, ceil_div(net.head_bias, 256)); }

// Thread blocks per task of the kernels between the products, and slices of their sums. Fewer than kConvSlices: each
// block adds up all slices of a channel before it starts.
inline constexpr int kConvTangentSlices = 32;

inline std::int64_t tangent_slices(std::int64_t positions, int filters) {
    return smaller(kConvTangentSlices, ceil_div(positions, kConvThreads / (filters / 4)));
}

inline std::int64_t raw_positions(const ConvBlock& block, int count) {
    return std::int64_t{count} * block.height * block.width;
}

inline std::int64_t act_positions(const ConvBlock& block, int count) {
    return std::int64_t{count} * block.act_height * block.act_width;
}

struct ConvPlan {
    ConvShape shape;
    ConvRequest request;
    ConvPrecision precision;
    ConvNetwork network;
    ConvBlock blocks[kConvBlocks];
    std::int64_t chunk;  // tasks at once; the launches are repeated for every chunk
    ConvWorkspace workspace;
    std::vector<ConvLaunch> launches;  // of one chunk
};

// If the tasks need more workspace than this, they run in chunks, one after another.
inline constexpr std::int64_t kConvWorkspaceLimit = std::int64_t{4} << 30;
inline constexpr std::int64_t kLargestConvChunk = 65535;  // the largest y extent of a grid

inline ConvWorkspace conv_workspace(const ConvPlan& plan, std::int64_t tasks) {
    ConvWorkspace space{};
    std::int64_t at = 0;
    const auto take = [&](ConvArray& array, std::int64_t elements, int element_bytes) {
        array = {at, ceil_div(elements * element_bytes, 256) * 256, element_bytes};
        at += tasks * array.stride;
    };
    const int stored = plan.precision == ConvPrecision::kBf16 ? 2 : 4;
    const int support = plan.request.support, query = plan.request.query;
    const std::int64_t count = larger(support, query), filters = plan.shape.filters;
    const ConvNetwork& net = plan.network;
    take(space.weights, net.head_bias + net.ways, 4);
    const auto slices = [&](ConvTiles (*tiles)(const ConvBlock&, int), const ConvBlock& block) {
        std::int64_t most = 1;
        if (support > 0) most = larger(most, tiles(block, support).slices);
        if (query > 0) most = larger(most, tiles(block, query).slices);
        return most;
    };
    if (net.by_covariance) {
        const ConvBlock& first = plan.blocks[0];
        take(space.norm, sizeof(ConvFirstNorm) / 4, 4);
        const std::int64_t of_sums = sizeof(ConvMomentSums) / 4;
        if (support > 0) take(space.support_sums, moment_tiles(first, support).slices * of_sums, 4);
        if (query > 0) take(space.query_sums, moment_tiles(first, query).slices * of_sums, 4);
        if (support > 0) take(space.support_moments, sizeof(ConvMoments) / 4, 4);
        if (query > 0) take(space.query_moments, sizeof(ConvMoments) / 4, 4);
        take(space.first_partials, slices(first_tiles, first) * (1 + kConvTaps * first.in_channels) * filters, 4);
    }
    std::int64_t largest_raw = 0;
    for (int i = 0; i < net.count; ++i) {
        const ConvBlock& block = plan.blocks[i];
        const std::int64_t raw = count * block.height * block.width * filters;
        const std::int64_t activation = count * block.act_height * block.act_width * filters;
        const bool direct = i > 0 || !net.by_covariance;
        take(space.activation[i], activation, stored);
        take(space.choices[i], activation, 1);
        take(space.activation_grad[i], activation, stored);
        if (!direct) continue;
        take(space.raw[i], raw, stored);
        take(space.statistics[i], slices(forward_tiles, block) * 3 * filters, 4);
        take(space.grad_sums[i], (i + 1 < net.count ? slices(data_grad_tiles, plan.blocks[i + 1]) : 1) * 2 * filters,
             4);
        take(space.weight_partials[i], slices(weight_grad_tiles, block) * kConvTaps * block.in_channels * filters, 4);
        largest_raw = larger(largest_raw, raw);
    }
    if (largest_raw > 0) take(space.raw_grad, largest_raw, stored);
    take(space.features, count * net.pixels * filters, 4);
    take(space.scores, count * net.ways, 4);
    if (plan.request.learns_rates()) take(space.directions, plan.request.steps * conv_packed(net), 4);
    if (plan.request.how.climbs()) {
        take(space.ascent, net.head_bias + net.ways, 4);
        take(space.raised, net.head_bias + net.ways, 4);
        take(space.squares, conv_weight_blocks(net), 8);
    }
    if (plan.request.how.counted) take(space.counts, net.head_bias + net.ways, 4);
    if (plan.request.differentiates_steps()) {
        ConvTangentArrays& tangents = space.tangents;
        take(space.history, plan.request.steps * conv_packed(net), 4);
        take(space.shares, std::int64_t{support} * net.ways, 4);
        take(tangents.direction, net.head_bias + net.ways, 4);
        take(tangents.features, std::int64_t{support} * net.pixels * filters, 4);
        take(tangents.logits, std::int64_t{support} * net.ways, 4);
        take(tangents.scores, std::int64_t{support} * net.ways, 4);
        if (net.by_covariance) {
            const ConvBlock& first = plan.blocks[0];
            take(tangents.norm, sizeof(ConvFirstTangent) / 4, 4);
            take(tangents.first_partials,
                 first_tiles(first, support).slices * (1 + kConvTaps * first.in_channels) * filters, 4);
        }
        std::int64_t most = 0;
        for (int i = 0; i < net.count; ++i) {
            const ConvBlock& block = plan.blocks[i];
            const std::int64_t raw = raw_positions(block, support), act = act_positions(block, support);
            take(tangents.activation[i], act * filters, stored);
            take(tangents.activation_grad[i], act * filters, stored);
            if (i == 0 && net.by_covariance) continue;
            take(tangents.raw[i], raw * filters, stored);
            take(tangents.statistics[i], tangent_slices(raw, block.filters) * 2 * filters, 4);
            take(tangents.grad_sums[i], tangent_slices(act, block.filters) * 2 * filters, 4);
            most = larger(most, raw * filters);
        }
        if (most > 0) take(tangents.raw_grad, most, stored);
    }
    space.bytes = at;
    return space;
}

// Calls `visit` with the name of every array that exists, for checks and printing.
template <typename Visit>
void for_each_array(const ConvWorkspace& space, const Visit& visit) {
    const auto one = [&](const char* name, const ConvArray& array) {
        if (array.stride > 0) visit(name, array);
    };
    one("weights", space.weights);
    one("norm", space.norm);
    one("support_sums", space.support_sums);
    one("query_sums", space.query_sums);
    one("support_moments", space.support_moments);
    one("query_moments", space.query_moments);
    one("first_partials", space.first_partials);
    one("features", space.features);
    one("scores", space.scores);
    one("raw_grad", space.raw_grad);
    for (int i = 0; i < kConvBlocks; ++i) {
        one("raw", space.raw[i]);
        one("activation", space.activation[i]);
        one("choices", space.choices[i]);
        one("activation_grad", space.activation_grad[i]);
        one("statistics", space.statistics[i]);
        one("grad_sums", space.grad_sums[i]);
        one("weight_partials", space.weight_partials[i]);
    }
    const ConvTangentArrays& tangents = space.tangents;
    one("history", space.history);
    one("directions", space.directions);
    one("ascent", space.ascent);
    one("raised", space.raised);
    one("squares", space.squares);
    one("counts", space.counts);
    one("shares", space.shares);
    one("direction", tangents.direction);
    one("norm_tangent", tangents.norm);
    one("first_partials_tangent", tangents.first_partials);
    one("features_tangent", tangents.features);
    one("logits_tangent", tangents.logits);
    one("scores_tangent", tangents.scores);
    one("raw_grad_tangent", tangents.raw_grad);
    for (int i = 0; i < kConvBlocks; ++i) {
        one("raw_tangent", tangents.raw[i]);
        one("activation_tangent", tangents.activation[i]);
        one("activation_grad_tangent", tangents.activation_grad[i]);
        one("statistics_tangent", tangents.statistics[i]);
        one("grad_sums_tangent", tangents.grad_sums[i]);
    }
}

// ---- the launches

class ConvPlanner {
  public:
    explicit ConvPlanner(ConvPlan& plan) : plan_(plan), tasks_(plan.chunk) {}

    void add_all() {
        const ConvRequest& request = plan_.request;
        if (plan_.network.by_covariance) {
            if (request.support > 0) add_moments(false);
            if (request.query > 0) add_moments(true);
        }
        const double packed = static_cast<double>(plan_.network.head_bias + plan_.network.ways);
        add(ConvKernel::kPack, -1, -1, false, 1 + weight_blocks(), 1, 256, update_bytes(), 0.0, all(8.0 * packed));
        for (int step = 0; step < request.steps; ++step) {
            if (request.differentiates_steps()) {
                add(ConvKernel::kRemember, -1, step, false, weight_blocks(), 1, 256, 0, 0.0, all(8.0 * packed));
            }
            add_pass(step, false, true);
            if (request.how.climbs()) {
                add_climb(step);
                part_ = ConvPart::kRaised;
                add_pass(step, false, true);
                part_ = ConvPart::kPass;
            }
        }
        if (request.query > 0) add_pass(request.steps, true, request.wants_grads);
        if (request.differentiates_steps()) {
            for (int step = request.steps - 1; step >= 0; --step) {
                if (request.learns_rates()) add_rate_grads(step, 1);
                add_differentiated(step);
            }
            part_ = ConvPart::kPass;
        } else if (request.learns_rates()) {
            add_rate_grads(0, request.steps);
        }
        if (request.wants_adapted) {
            add(ConvKernel::kUnpack, -1, -1, false, weight_blocks(), 1, 256, 0, 0.0, all(8.0 * packed));
        }
    }

  private:
    ConvPlan& plan_;
    std::int64_t tasks_;
    ConvPart part_ = ConvPart::kPass;

    std::int64_t weight_blocks() const { return conv_weight_blocks(plan_.network); }

    std::int64_t update_bytes() const {
        return plan_.network.by_covariance
                   ? std::int64_t{plan_.shape.filters} * (kConvPatch * 8 + (1 + kConvPatch) * 4 + 4)
                   : 0;
    }

    void add(ConvKernel kernel, int block, int step, bool query, std::int64_t x, std::int64_t z, int threads,
             std::int64_t shared_bytes, double flops, double bytes) {
        plan_.launches.push_back(
            {kernel, part_, block, step, query, x, tasks_, z, threads, shared_bytes, flops, bytes});
    }

    double stored() const { return plan_.precision == ConvPrecision::kBf16 ? 2.0 : 4.0; }

    double all(double of_task) const { return of_task * static_cast<double>(tasks_); }

    static double area(double count, int height, int width, int channels) {
        return count * height * static_cast<double>(width) * channels;
    }

    void add_moments(bool query) {
        const int count = query ? plan_.request.query : plan_.request.support;
        const ConvBlock& block = plan_.blocks[0];
        const ConvTiles tiles = moment_tiles(block, count);
        const double values = kConvTaps * block.in_channels;
        const std::int64_t floats =
            kConvChannels + 1 + tiles.tile_images * tiles.halo_height * tiles.halo_width * block.in_channels;
        add(ConvKernel::kPatchMoments, 0, -1, query, tiles.slices, 1, kMomentThreads,
            std::int64_t{kMomentDoubles} * block.in_channels * block.in_channels * 8 + floats * 4,
            all(area(count, block.height, block.width, 1) * values * (values + 3.0)),
            all(area(count, block.in_height, block.in_width, block.in_channels) * 4.0));
    }

    void add_pass(int step, bool query, bool backward) {
        const int count = query ? plan_.request.query : plan_.request.support;
        const ConvNetwork& net = plan_.network;
        add_forward_pass(step, query, count, backward);
        if (!backward) return;
        for (int i = net.count - 1; i > 0; --i) {
            add_data_grad(i, step, query, count);
            add_weight_grad(i, step, query, count);
        }
        if (net.by_covariance) {
            add_first_gradient(step, query, count);
        } else {
            add_raw_grad(step, query, count);
            add_weight_grad(0, step, query, count);
        }
        add_update(step, query, count);
    }

    void add_forward_pass(int step, bool query, int count, bool backward) {
        const ConvNetwork& net = plan_.network;
        const double filters = plan_.shape.filters;
        for (int i = 0; i < net.count; ++i) {
            if (i == 0 && net.by_covariance) {
                add_first(step, query, count);
            } else {
                add_forward(i, step, query, count, backward);
            }
        }
        const double features = static_cast<double>(count) * net.pixels * filters;
        const ConvBlock& last = plan_.blocks[net.count - 1];
        const bool raw = net.count > 1 || !net.by_covariance;
        add(ConvKernel::kHead, net.count - 1, step, query, tasks_, 1, kConvHeadThreads,
            (5 * net.filters + kConvHeadThreads / 32 + 2 * kConvHeadThreads) * 4,
            all(features * net.ways * (backward ? 6.0 : 2.0)),
            all((raw ? area(count, last.height, last.width, last.filters) : features) * stored() + features * 4.0 +
                (backward ? 2.0 : 1.0) * net.ways * net.pixels * filters * 4.0));
        plan_.launches.back().grid_y = 1;
    }

    void add_climb(int step) {
        const double packed = static_cast<double>(plan_.network.head_bias + plan_.network.ways);
        if (plan_.request.how.sharpness.norm == SharpnessNorm::kL2) {
            add(ConvKernel::kClimbSquares, -1, step, false, weight_blocks(), 1, 256, 256 / 32 * 8, all(2.0 * packed),
                all(8.0 * packed));
        }
        add(ConvKernel::kClimb, -1, step, false, 1 + weight_blocks(), 1, 256, update_bytes(), all(2.0 * packed),
            all(12.0 * packed));
    }

    void add_rate_grads(int first_step, int steps) {
        const ConvNetwork& net = plan_.network;
        const bool by_element = plan_.request.how.rates.by_element;
        const double packed = static_cast<double>(net.head_bias + net.ways) * steps;
        part_ = ConvPart::kPass;
        add(ConvKernel::kRateGrads, -1, first_step, true, by_element ? weight_blocks() : net.tensors, steps, 256,
            by_element ? 0 : 256 / 32 * 4, all(2.0 * packed), all((by_element ? 12.0 : 8.0) * packed));
    }

    // v <- v - H (rate v), with v the gradient with respect to the parameters behind the step.
    void add_differentiated(int step) {
        const ConvNetwork& net = plan_.network;
        const int count = plan_.request.support, last = net.count - 1;
        part_ = ConvPart::kTangent;
        const double packed = static_cast<double>(net.head_bias + net.ways);
        add(ConvKernel::kDirection, -1, step, false, 1 + weight_blocks(), 1, 256, update_bytes(), all(packed),
            all(8.0 * packed));
        part_ = ConvPart::kAgain;
        add_forward_pass(step, false, count, true);
        part_ = ConvPart::kTangent;
        for (int i = 0; i < net.count; ++i) {
            if (!has_raw(i)) {
                add_first_tangent(step, count);
                continue;
            }
            add_forward(i, step, false, count, true);
            add_tangent(ConvKernel::kTangentSums, i, step, count);
            add_tangent(ConvKernel::kTangentActivate, i, step, count);
        }
        const double features = static_cast<double>(count) * net.pixels * net.filters;
        add(ConvKernel::kTangentHead, last, step, false, tasks_, 1, kConvHeadThreads, 0,
            all(features * net.ways * 12.0), all(features * (8.0 + 2.0 * stored())));
        plan_.launches.back().grid_y = 1;
        if (has_raw(last)) add_tangent(ConvKernel::kTangentGradSums, last, step, count);
        for (int i = last; i > 0; --i) {
            part_ = ConvPart::kAgain;
            add_data_grad(i, step, false, count);
            part_ = ConvPart::kTangent;
            add_tangent(ConvKernel::kTangentRawGrad, i, step, count);
            add_data_grad(i, step, false, count);
            add_weight_grad(i, step, false, count);
            if (has_raw(i - 1)) add_tangent(ConvKernel::kTangentGradSums, i - 1, step, count);
        }
        if (net.by_covariance) {
            part_ = ConvPart::kAgain;
            add_first_gradient(step, false, count);
            part_ = ConvPart::kTangent;
            add_first_gradient(step, false, count);
        } else {
            add_tangent(ConvKernel::kTangentRawGrad, 0, step, count);
            add_weight_grad(0, step, false, count);
        }
        add_update(step, false, count);
    }

    void add_first_tangent(int step, int count) {
        const ConvBlock& block = plan_.blocks[0];
        const ConvTiles tiles = first_tiles(block, count);
        const std::int64_t floats = tiles.tile_images * tiles.halo_height * tiles.halo_width * block.in_channels;
        const double used = activation_values(0, count);
        add(ConvKernel::kFirstTangent, 0, step, false, tiles.slices, ceil_div(block.filters, 32), kConvThreads,
            floats * 4, all(used * 4.0 * kConvTaps * block.in_channels),
            all(area(count, block.in_height, block.in_width, block.in_channels) * 4.0 + used * (stored() + 1.0)));
    }

    // A kernel between the products. Its shared memory: the constants of each filter, and the sums of its threads.
    void add_tangent(ConvKernel kernel, int i, int step, int count) {
        const ConvBlock& block = plan_.blocks[i];
        const bool sums = kernel == ConvKernel::kTangentSums, activates = kernel == ConvKernel::kTangentActivate;
        const bool grad_sums = kernel == ConvKernel::kTangentGradSums;
        const bool of_raw = sums || kernel == ConvKernel::kTangentRawGrad;
        const std::int64_t positions = of_raw ? raw_positions(block, count) : act_positions(block, count);
        const int constants = sums        ? kConvRawMoments
                              : activates ? kConvActivateTangents
                              : grad_sums ? kConvTangents
                                          : kConvRawGradTangents;
        const double raw = raw_bytes(i, count), act = activation_values(i, count);
        double bytes = 2.0 * raw;
        if (activates) bytes += act * (stored() + 1.0);
        if (grad_sums) bytes += act * (2.0 * stored() + 1.0);
        if (of_raw && !sums) bytes += raw + act * (2.0 * stored() + 1.0);
        add(kernel, i, step, false, tangent_slices(positions, block.filters), 1, kConvThreads,
            std::int64_t{constants} * block.filters * 4 + (sums || grad_sums ? kConvTangentScratch * 4 : 0),
            all(static_cast<double>(positions) * block.filters * 10.0), all(bytes));
    }

    // The derivative of a product is the sum of two, but for the images, which do not depend on the parameters.
    int products_at(int i) const { return part_ == ConvPart::kTangent && i > 0 ? 2 : 1; }

    void add_first(int step, bool query, int count) {
        const ConvBlock& block = plan_.blocks[0];
        const ConvTiles tiles = first_tiles(block, count);
        const std::int64_t floats = std::int64_t{kConvTaps * block.in_channels + 3} * block.filters +
                                    tiles.tile_images * tiles.halo_height * tiles.halo_width * block.in_channels;
        const double used = area(count, block.act_height, block.act_width, block.filters);
        add(ConvKernel::kFirst, 0, step, query, tiles.slices, 1, kConvThreads, floats * 4,
            all(used * block.window * block.window * 2.0 * kConvTaps * block.in_channels),
            all(area(count, block.in_height, block.in_width, block.in_channels) * 4.0 + used * (stored() + 1.0)));
    }

    double products(int i, int count) const {
        const ConvBlock& block = plan_.blocks[i];
        return products_at(i) * area(count, block.height, block.width, block.filters) * 2.0 * kConvTaps *
               block.in_channels;
    }

    double weight_bytes(int i) const { return 4.0 * kConvTaps * plan_.blocks[i].in_channels * plan_.blocks[i].filters; }

    double raw_bytes(int i, int count) const {
        const ConvBlock& block = plan_.blocks[i];
        return area(count, block.height, block.width, block.filters) * stored();
    }

    double activation_values(int i, int count) const {
        const ConvBlock& block = plan_.blocks[i];
        return area(count, block.act_height, block.act_width, block.filters);
    }

    bool has_raw(int i) const { return i > 0 || !plan_.network.by_covariance; }

    void add_forward(int i, int step, bool query, int count, bool keep) {
        const ConvBlock& block = plan_.blocks[i];
        const ConvTiles tiles = forward_tiles(block, count);
        const int columns = conv_columns(block.filters);
        double bytes = products_at(i) * weight_bytes(i) + raw_bytes(i, count);
        if (i == 0) {
            bytes += area(count, block.in_height, block.in_width, block.in_channels) * 4.0;
        } else if (part_ == ConvPart::kTangent) {
            bytes += 2.0 * activation_values(i - 1, count) * stored();
        } else if (has_raw(i - 1)) {
            bytes += raw_bytes(i - 1, count);
            if (keep) bytes += activation_values(i - 1, count) * (stored() + 1.0);
        } else {
            bytes += activation_values(i - 1, count) * stored();
        }
        add(ConvKernel::kForward, i, step, query, tiles.slices, ceil_div(block.filters, columns), kConvProductThreads,
            std::int64_t{forward_memory(plan_.precision, tiles, block.stride, block.in_channels, columns).end} * 4,
            all(products(i, count)), all(bytes));
    }

    void add_data_grad(int i, int step, bool query, int count) {
        const ConvBlock& block = plan_.blocks[i];
        const ConvTiles tiles = data_grad_tiles(block, count);
        const int columns = conv_columns(block.in_channels);
        // z read, dz stored; or dz and its derivative read.
        double bytes = products_at(i) * weight_bytes(i) + 2.0 * raw_bytes(i, count);
        bytes += activation_values(i - 1, count) * stored();
        if (part_ != ConvPart::kTangent) {
            bytes += activation_values(i, count) * (stored() + 1.0);
            if (has_raw(i - 1)) bytes += raw_bytes(i - 1, count) + activation_values(i - 1, count);
        }
        add(ConvKernel::kDataGrad, i, step, query, tiles.slices, ceil_div(block.in_channels, columns),
            kConvProductThreads,
            4 * std::int64_t{data_grad_memory(plan_.precision, tiles, block.stride, block.in_channels, block.filters,
                                              columns)
                                 .end},
            all(products(i, count)), all(bytes));
    }

    void add_weight_grad(int i, int step, bool query, int count) {
        const ConvBlock& block = plan_.blocks[i];
        const ConvTiles tiles = weight_grad_tiles(block, count);
        const int columns = conv_weight_columns(block.filters);
        const double input =
            area(count, block.in_height, block.in_width, block.in_channels) * (i == 0 ? 4.0 : stored());
        add(ConvKernel::kWeightGrad, i, step, query, tiles.slices,
            3 * ceil_div(block.in_channels, kConvChunk) * ceil_div(block.filters, columns), kConvProductThreads,
            std::int64_t{weight_grad_memory(tiles, block.stride, columns).end} * 4, all(products(i, count)),
            all(products_at(i) * (input + raw_bytes(i, count)) + tiles.slices * weight_bytes(i)));
    }

    void add_first_gradient(int step, bool query, int count) {
        const ConvBlock& block = plan_.blocks[0];
        const ConvTiles tiles = first_tiles(block, count);
        const std::int64_t sums = 1 + kConvTaps * block.in_channels;
        const std::int64_t floats = (kConvThreads / 32 - 1) * sums * 32 +
                                    tiles.tile_images * tiles.halo_height * tiles.halo_width * block.in_channels;
        const double used = activation_values(0, count);
        add(ConvKernel::kFirstGrad, 0, step, query, tiles.slices, ceil_div(block.filters, 32), kConvThreads, floats * 4,
            all(used * 2.0 * static_cast<double>(sums)),
            all(area(count, block.in_height, block.in_width, block.in_channels) * 4.0 + used * (stored() + 1.0) +
                4.0 * static_cast<double>(tiles.slices * sums * block.filters)));
    }

    void add_raw_grad(int step, bool query, int count) {
        const ConvBlock& block = plan_.blocks[0];
        const std::int64_t items = std::int64_t{count} * block.height * block.width * block.filters / 4;
        add(ConvKernel::kRawGrad, 0, step, query, smaller(kConvSlices, ceil_div(items, kConvThreads)), 1, kConvThreads,
            std::int64_t{5} * block.filters * 4, all(10.0 * raw_bytes(0, count) / stored()),
            all(2.0 * raw_bytes(0, count) + activation_values(0, count) * (stored() + 1.0)));
    }

    void add_update(int step, bool query, int count) {
        const ConvNetwork& net = plan_.network;
        double bytes = 8.0 * static_cast<double>(net.head_weight);
        if (!query && part_ != ConvPart::kTangent) {  // directions; counts, and theta
            const ConvRequest& request = plan_.request;
            bytes += static_cast<double>(net.head_weight) *
                     ((request.learns_rates() ? 4.0 : 0.0) + (request.how.counted ? 12.0 : 0.0));
        }
        std::int64_t elements = 0;
        for (int i = net.by_covariance ? 1 : 0; i < net.count; ++i) {
            const ConvBlock& block = plan_.blocks[i];
            bytes += weight_grad_tiles(block, count).slices * weight_bytes(i);
            elements += std::int64_t{kConvTaps} * block.in_channels * block.filters;
        }
        if (net.by_covariance) {
            bytes += 4.0 * first_tiles(plan_.blocks[0], count).slices * (1.0 + kConvTaps * net.channels) * net.filters;
        }
        const ConvKernel kernel = part_ == ConvPart::kTangent ? ConvKernel::kSubtract
                                  : query                     ? ConvKernel::kMetaAccumulate
                                                              : ConvKernel::kSignUpdate;
        add(kernel, -1, step, query, 2 + smaller(64, larger(1, ceil_div(elements, 256))), 1, 256, update_bytes(),
            all(bytes / 4.0), all(bytes));
    }
};

// `workspace_limit`: bytes that the workspace may take, exceeded only if a single task needs more; 0:
// kConvWorkspaceLimit.
inline ConvPlan plan_conv_meta_step(const ConvShape& shape, const ConvRequest& request, ConvPrecision precision,
                                    bool by_covariance = true, std::int64_t workspace_limit = 0) {
    ConvPlan plan{};
    plan.shape = shape;
    plan.request = request;
    plan.precision = precision;
    plan.network = conv_network(shape, by_covariance);
    for (int i = 0; i < shape.blocks; ++i) plan.blocks[i] = conv_block(shape, i);
    const std::int64_t of_task = conv_workspace(plan, 1).bytes;
    const std::int64_t limit = workspace_limit > 0 ? workspace_limit : kConvWorkspaceLimit;
    plan.chunk = larger(1, smaller(smaller(request.tasks, kLargestConvChunk), limit / of_task));
    plan.workspace = conv_workspace(plan, plan.chunk);
    ConvPlanner(plan).add_all();
    return plan;
}

}  // namespace signmaml
