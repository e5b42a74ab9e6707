// Arguments of the kernels of a Conv-N meta-step. conv_meta_step.h has those of the whole step, which the plan divides
// into these.
#pragma once

#include <cstdint>

#include "params/conv_meta_step.h"
#include "params/divisor.h"

namespace signmaml {

// How the products of convolutions are computed; everything else is float32.
enum class ConvPrecision : std::int32_t {
    kFp32 = 0,  // three products of high and low TF32 halves: errors like float32
    kTf32 = 1,  // one product of TF32 operands
    kBf16 = 2,  // bf16 operands, and activations stored in bf16
};

// Where a convolution gets its input.
enum class ConvSource : std::int32_t {
    kImage = 0,       // the images [count, channels, height, width]
    kActivation = 1,  // what conv_first stored: [count, height, width, channels]
    kRaw = 2,         // the raw output of the block below, normalised and halved on the way
};

// What a pass does with its gradients.
enum class ConvPass : std::int32_t {
    kStep = 0,      // an inner step: they update the weights
    kGradient = 1,  // the query set of a meta-step: they are the result
    kForward = 2,   // the query set of an evaluation: there are none
    kAgain = 3,     // a step that is differentiated: they go back through the network, and no weight moves
};

// One array per task, `stride` bytes apart.
template <typename T>
struct PerTask {
    T* base;
    std::int64_t stride;
};

// A grid of positions (count x height x width) divided into tiles of several whole images or of a rectangle of one
// image. Tile i belongs to slice i / tiles_per_slice. Depends on the shape and the count, never on T.
struct ConvTiles {
    std::int32_t count, height, width;                  // the grid
    std::int32_t tile_images, tile_height, tile_width;  // at most as many positions as the kernel's tile has
    std::int32_t tiles_y, tiles_x, tiles;               // of an image, and in all
    std::int32_t tiles_per_slice, slices;
    std::int32_t halo_height, halo_width;  // of the input that a tile reads from one image
    // Of positions into images, rows and columns: by those of a tile in an image, by its width and height, and by the
    // positions and the width of what it reads.
    Divisor by_area, by_width, by_height, by_halo, by_halo_width;
    // Where a tile's positions are taken by the parities of their rows and columns: by those of one parity in an image,
    // and by its width.
    Divisor by_parity_area, by_parity_width;
};

// Sizes of one block of the network.
struct ConvBlock {
    std::int32_t in_height, in_width, in_channels;
    std::int32_t height, width;          // of the raw output
    std::int32_t act_height, act_width;  // after the halving
    std::int32_t filters;
    std::int32_t stride;  // of the convolution
    std::int32_t window;  // 2: 2x2 max-pooling; 1: no pooling
    float eps;
    Divisor by_channels;  // in_channels
};

// One block of the network in one pass. `choices` holds what the backward pass must know about the halving: the
// winner's place in its window (row * 2 + column), plus kConvActive where ReLU passes the value.
template <typename Stored>
struct ConvLayer {
    ConvBlock block;
    std::int32_t count;                // images
    std::int64_t weight, gamma, beta;  // places in a task's weights
    PerTask<Stored> raw;               // [count, height, width, filters]
    PerTask<Stored> activation;        // [count, act_height, act_width, filters]
    PerTask<std::uint8_t> choices;     // likewise
    PerTask<Stored> activation_grad;   // of the activation
    PerTask<Stored> raw_grad;          // of the raw output
    PerTask<float> statistics;         // [slices, 3, filters]: count, mean and sum of squares around it
    PerTask<float> grad_sums;          // [slices, 2, filters]: gradients of beta and gamma
    std::int32_t statistics_slices;
    std::int32_t grad_sums_slices;
};

inline constexpr std::uint8_t kConvActive = 4;

inline constexpr int kConvThreads = 128;         // of a block of the kernels around the products
inline constexpr int kConvProductThreads = 256;  // of a block of a product: two warps a scheduler hide latencies
inline constexpr int kMomentThreads = 256;       // of a block of patch_moments
inline constexpr int kMomentWork = 64;           // threads, two warps, for all pairs of taps of a row of positions
inline constexpr int kMomentSplits = kMomentThreads / kMomentWork;
// Doubles in shared memory for each product of two channels: the sums of all splits but the first, which adds them up.
inline constexpr int kMomentDoubles = (kMomentSplits - 1) * kMomentWork;
inline constexpr int kConvHeadThreads = 1024;  // of a block of the head
inline constexpr int kConvTile = 128;          // positions
inline constexpr int kConvChunk = 32;          // channels of a block of a weight gradient
// Floats from one position to the next where positions are the depth of the product, so that fragment reads hit 32
// banks: of neighbouring inputs, and of every other one (stride 2).
inline constexpr int kConvDeepRow = 40;
inline constexpr int kConvDeepRowStrided = 36;
inline constexpr int kConvTaps = 9;

// The operands of forward and data gradient lie in shared memory as 32-bit words, as tensor cores take them: a TF32
// number or two of bf16. In fp32 they lie in two planes, of high and low halves, with half as many channels at once.
constexpr int conv_numbers_of_word(ConvPrecision precision) { return precision == ConvPrecision::kBf16 ? 2 : 1; }
constexpr int conv_planes(ConvPrecision precision) { return precision == ConvPrecision::kFp32 ? 2 : 1; }
// Channels in shared memory at once.
constexpr int conv_chunk(ConvPrecision precision) { return precision == ConvPrecision::kFp32 ? 16 : 32; }
// Words from one position, or column, to the next: the 16 bytes that ldmatrix reads of eight of them hit 32 banks.
constexpr int conv_row(ConvPrecision precision) { return conv_chunk(precision) / conv_numbers_of_word(precision) + 4; }

// Pairs of warps in a block of a weight gradient, each of which has a share of the depth.
inline constexpr int kConvDepthShares = kConvProductThreads / 64;

// Thread blocks of a product that a multiprocessor shall hold at once, by their registers.
inline constexpr int kConvBlocksResident = 2;

// Offsets of the parts of a block's shared memory, in floats. The tile of positions is at 0.
struct ConvMemory {
    std::int32_t row;      // from one position to the next
    std::int32_t pitch;    // from one row of positions to the next
    std::int32_t plane;    // from one plane of the tile to the next
    std::int32_t slabs;    // two slabs of weights, or the other operand
    std::int32_t norm;     // constants of BatchNorm
    std::int32_t scratch;  // sums of warps
    std::int32_t end;
};

// A product may be the sum of two: the derivative of x * W is x. * W + x * W.. The second one's operands follow those
// of the first; where the base of its first operand is null, there is none.
template <typename Stored>
struct ConvForwardParams {
    PerTask<const float> images;  // for kImage
    PerTask<const float> weights;
    PerTask<const Stored> second_input;  // for kActivation: an activation of the block below
    PerTask<const float> second_weights;
    ConvLayer<Stored> below;  // unless kImage
    ConvLayer<Stored> layer;  // without statistics if their base is null
    ConvTiles tiles;          // of the raw output
    ConvSource source;
    bool keep;  // store activation and choices of the block below for a backward pass
    ConvMemory memory;
};

template <typename Stored>
struct ConvDataGradParams {
    PerTask<const float> weights;
    PerTask<const Stored> raw_grad;  // like the layer's; a null base: computed on the way, and stored as the layer's
    PerTask<const Stored> second_raw_grad;
    PerTask<const float> second_weights;
    ConvLayer<Stored> below;
    ConvLayer<Stored> layer;
    ConvTiles tiles;    // of the block's input
    bool below_is_raw;  // the block below has a raw output, so compute its gradient sums
    ConvMemory memory;
};

template <typename Stored>
struct ConvWeightGradParams {
    PerTask<const float> images;  // for kImage
    PerTask<const Stored> input;  // else: activation of the block below
    PerTask<const Stored> second_input;
    PerTask<const Stored> second_raw_grad;
    ConvLayer<Stored> layer;
    PerTask<float> partials;  // [slices, 9 * in_channels, filters]
    ConvTiles tiles;          // of the raw output
    ConvSource source;        // kImage or kActivation
    ConvMemory memory;
};

// ---- block 1 by the covariance of its patches

inline constexpr int kConvPatch = kConvTaps * kConvChannels;  // the most values in a patch

// Centred on one value per channel (`shift`), so that sums of squares do not cancel. A patch is [taps, channels].
struct ConvMoments {
    double mean[kConvPatch];  // of the patch minus shift
    double covariance[kConvPatch][kConvPatch];
    float shift[kConvChannels];
};

// One slice's contribution to them.
struct ConvMomentSums {
    double count;
    double shift[kConvChannels];
    double sum[kConvPatch];                  // of patch - shift
    double product[kConvPatch][kConvPatch];  // i <= j
};

// BatchNorm's constants of block 1 for the current weights and set.
struct ConvFirstNorm {
    float mean[kConvFilters];     // of the raw output of images minus shift
    float inverse[kConvFilters];  // 1 / sqrt(variance + eps)
};

struct ConvPatchMomentsParams {
    PerTask<const float> images;
    PerTask<ConvMomentSums> sums;  // [slices]
    ConvBlock block;
    ConvTiles tiles;
};

template <typename Stored>
struct ConvFirstParams {
    PerTask<const float> images;
    PerTask<const float> weights;
    PerTask<const ConvMoments> moments;
    PerTask<const ConvFirstNorm> norm;
    ConvLayer<Stored> layer;
    ConvTiles tiles;    // of the activation
    Divisor by_groups;  // of eight filters, which a thread owns
};

template <typename Stored>
struct ConvFirstGradParams {
    PerTask<const float> images;
    PerTask<const ConvMoments> moments;
    ConvLayer<Stored> layer;
    PerTask<float> partials;  // [slices, 1 + 9 * channels, filters]: sums of dy, and of dy * (patch - shift)
    ConvTiles tiles;          // of the activation
};

// For the gradient of block 1's raw output, which only the direct form stores.
template <typename Stored>
struct ConvRawGradParams {
    PerTask<const float> weights;
    ConvLayer<Stored> layer;
};

// ---- head, weights

// How steps move parameters. Everything of a task is packed like its weights.
struct ConvStepRule {
    const float* lr;            // of this step: [tensors], or [P] in theta's order if `by_element`
    const std::uint8_t* adapt;  // [tensors]
    PerTask<float> weights;     // what moves; null: nothing, the directions alone are wanted
    PerTask<float> kept;        // directions of the step; or null
    PerTask<float> counts;      // of sign steps, whose weights are theta - lr * counts; or null
    const float* theta;         // if there are counts
    bool by_element;
    bool by_sign;  // directions are signs of the gradients
};

template <typename Stored>
struct ConvHeadParams {
    ConvLayer<Stored> layer;  // the last block
    PerTask<float> weights;
    PerTask<float> features;  // [count, features]
    PerTask<float> scores;    // [count, ways]: logits, then their gradient
    PerTask<float> shares;    // [count, ways]: softmax of the logits, for kAgain
    const std::int64_t* labels;
    float* loss;                // [T]; null for kAgain, as it is known
    float* accuracy;            // [T]; may be null
    float* logits;              // [T, count, ways]; may be null
    float* grads;               // [T, P] for kGradient
    std::uint8_t* nonfinite;    // [T]
    ConvStepRule rule;          // for kStep
    std::int64_t weight, bias;  // places in a task's weights
    std::int64_t theta_weight;  // place in a row of grads; the bias follows
    std::int32_t tensor;        // index of the weight among theta's tensors; the bias follows
    std::int64_t parameters;    // P
    std::int32_t ways;
    Divisor by_width;  // of a pixel's number by the width of the activation
    Readout readout;
    bool source_is_raw;  // else the last block is block 1, and its activation is stored
    ConvPass pass;
};

// Offsets of one block's parameters, packed and in theta.
struct ConvOffsets {
    std::int64_t weight, gamma, beta;
    std::int64_t theta_weight, theta_bias, theta_gamma, theta_beta;  // theta_bias: -1 without one
    std::int32_t in_channels;
    std::int32_t tensor;  // index of the weight among theta's tensors
};

struct ConvNetwork {
    ConvOffsets blocks[kConvBlocks];
    std::int64_t head_weight, head_bias, theta_head_weight, theta_head_bias;
    std::int64_t parameters;  // P
    std::int32_t count;       // of blocks
    std::int32_t filters, ways, channels;
    std::int32_t pixels;  // positions that the classifier reads per filter
    std::int32_t tensors;
    bool conv_bias;
    bool by_covariance;  // block 1 uses the covariance of its patches
};

// Copies theta to every task's packed weights and computes block 1's constants. ConvUnpackParams is the way back.
struct ConvPackParams {
    const float* theta;
    PerTask<float> weights;
    ConvNetwork network;
    PerTask<const ConvMomentSums> support_sums, query_sums;
    PerTask<ConvMoments> support, query;
    PerTask<ConvFirstNorm> norm;
    std::int32_t support_slices, query_slices;  // 0: no such set
    bool starts_with_query;                     // without inner steps the constants are those of the query set
    float eps;                                  // of block 1
    PerTask<float> counts;                      // of steps, which start at 0; or null
};

struct ConvUnpackParams {
    const float* theta;
    PerTask<const float> weights;
    float* adapted;       // [T, P]; or null
    std::int8_t* counts;  // [T, P], from steps counted in place of the weights, -128 for NaN; or null
    ConvNetwork network;
};

struct ConvUpdateParams {
    PerTask<float> weights;
    ConvNetwork network;
    PerTask<const float> weight_partials[kConvBlocks];  // [slices, 9 * in_channels, filters]
    PerTask<const float> grad_sums[kConvBlocks];        // [slices, 2, filters]
    std::int32_t weight_slices[kConvBlocks];
    std::int32_t grad_sums_slices[kConvBlocks];
    // Block 1 by the covariance of its patches.
    PerTask<const float> first_partials;
    std::int32_t first_slices;
    PerTask<const ConvMoments> moments, next_moments;  // of this pass and the next; null after the last
    PerTask<ConvFirstNorm> norm;
    float eps;
    ConvStepRule rule;        // for steps
    float* grads;             // [T, P] for kGradient
    std::uint8_t* nonfinite;  // [T]
};

// Gradients of rates, from the directions of their steps and the gradients with respect to the parameters after them.
struct ConvRateGradsParams {
    PerTask<const float> kept;  // [steps, packed], from the first of these steps on
    std::int64_t packed;        // floats of a step's directions
    ConvNetwork network;
    const float* grads;         // [T, P]
    const std::uint8_t* adapt;  // [tensors]
    float* rate_grads;          // [T, K, tensors], or [T, K, P] if `by_element`, from the first of these steps on
    std::int64_t row;           // floats of a task's rates
    bool by_element;
};

// ---- sharpness-aware steps: the place at which a step's gradient is taken

struct ConvClimbParams {
    PerTask<const float> weights;   // where the step starts
    PerTask<const float> gradient;  // there, packed likewise, of what adapts
    PerTask<float> raised;          // the weights at the sharpest place nearby
    PerTask<double> squares;        // [slices]: of the gradient's norm
    ConvNetwork network;
    const std::uint8_t* adapt;           // [tensors]
    PerTask<const ConvMoments> moments;  // of the support set; this and the next two only by covariance
    PerTask<ConvFirstNorm> norm;         // at the raised weights
    float eps;                           // of block 1
    SharpnessOptions sharpness;
    std::int32_t slices;
};

// ---- exact MAML: the steps' derivatives in one direction (a dot in comments)

// Copies every task's weights before a step.
struct ConvRememberParams {
    PerTask<const float> weights;
    PerTask<float> kept;
    std::int64_t count;
};

// Derivatives of block 1's constants in the direction: of the mean, and of `inverse` divided by -inverse.
struct ConvFirstTangent {
    float mean[kConvFilters];
    float stretch[kConvFilters];
};

// The direction in which a step moved the parameters that adapt, from the gradient with respect to those behind it; and
// block 1's constants before the step, with their derivatives.
struct ConvDirectionParams {
    PerTask<const float> weights;  // before the step
    PerTask<float> direction;      // packed likewise
    ConvNetwork network;
    PerTask<const ConvMoments> moments;  // of the support set; this and the next two only by covariance
    PerTask<ConvFirstNorm> norm;
    PerTask<ConvFirstTangent> tangent;
    const float* grads;  // [T, P]
    ConvStepRule rule;
    float eps;  // of block 1
};

template <typename Stored>
struct ConvFirstTangentParams {
    PerTask<const float> images;
    PerTask<const float> weights, direction;
    PerTask<const ConvMoments> moments;
    PerTask<const ConvFirstNorm> norm;
    PerTask<const ConvFirstTangent> tangent;
    ConvLayer<Stored> layer;
    PerTask<Stored> activation;  // derivative of the layer's
    ConvTiles tiles;             // of the activation
};

// Arrays of BatchNorm's constants that the kernels between the products keep, [filters] each, and the sums of threads.
inline constexpr int kConvRawMoments = 2;        // conv_tangent_sums
inline constexpr int kConvTangents = 4;          // conv_tangent_grad_sums
inline constexpr int kConvActivateTangents = 7;  // conv_tangent_activate
inline constexpr int kConvRawGradTangents = 10;  // conv_tangent_raw_grad
inline constexpr int kConvTangentScratch = 8 * kConvThreads;

// One block of the network whose raw output is stored.
template <typename Stored>
struct ConvTangentParams {
    PerTask<const float> weights, direction;
    ConvLayer<Stored> layer;
    // The same layer's derivatives. `statistics`: [slices, 2, filters], sums of z. and of z. * xhat.
    ConvLayer<Stored> tangent;
};

template <typename Stored>
struct ConvTangentHeadParams {
    PerTask<const float> weights, direction;
    PerTask<const float> features, shares, scores;  // as the head left them
    PerTask<const Stored> activation;               // the derivative of the last block's
    PerTask<Stored> activation_grad;                // the derivative of its gradient
    PerTask<float> features_tangent;                // [count, features]
    PerTask<float> logits_tangent;                  // [count, ways]
    PerTask<float> scores_tangent;                  // [count, ways]: derivatives of the logits' gradients
    float* grads;                                   // [T, P]: minus the classifier's part
    std::uint8_t* nonfinite;                        // [T]
    std::int64_t weight, bias;                      // places in a task's weights
    std::int64_t theta_weight;                      // place in a row of grads; the bias follows
    std::int64_t parameters;                        // P
    std::int32_t count;                             // images
    std::int32_t pixels, filters;                   // of the last block's activation
    std::int32_t ways;
    Readout readout;
};

// Subtracts the derivatives of a step's gradients from `grads`. Partial sums and sums for BatchNorm are derivatives.
struct ConvSubtractParams {
    ConvUpdateParams update;
    PerTask<const float> direction;
    // Block 1 by the covariance of its patches: `first_partials` of the step itself are in `update`.
    PerTask<const float> first_partials_tangent;
    PerTask<const ConvFirstTangent> first_tangent;
};

}  // namespace signmaml
