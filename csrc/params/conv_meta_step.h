// Arguments of one meta-step of a convolutional network: blocks of a 3x3 convolution (padding 1), BatchNorm on the
// statistics of the current set, ReLU and a halving of the image, then one linear classifier and cross-entropy.
#pragma once

#include <cstdint>

#include "params/method.h"
#include "params/step_options.h"

namespace signmaml {

inline constexpr int kConvBlocks = 6;     // blocks at most
inline constexpr int kConvFilters = 128;  // of a block at most; a multiple of kConvFilterUnit
inline constexpr int kConvFilterUnit = 8;
inline constexpr int kConvChannels = 3;  // of the images at most

enum class Halving : std::int32_t {
    kMaxPool = 0,  // stride-1 convolution, 2x2 max-pooling that drops an odd last row and column
    kStride = 1,   // stride-2 convolution, no pooling
};

// What the classifier reads from the last block's [filters, h, w].
enum class Readout : std::int32_t {
    kFlatten = 0,  // all of it, filter by filter as torch flattens NCHW
    kMean = 1,     // the mean over h and w
};

struct ConvShape {
    std::int32_t blocks;    // 1 to kConvBlocks
    std::int32_t channels;  // of the images, 1 to kConvChannels
    std::int32_t filters;   // of every block
    std::int32_t height;    // of the images
    std::int32_t width;
    std::int32_t ways;  // width of the classifier's output
    Halving halving;
    Readout readout;
    bool conv_bias;           // the convolutions have a bias; BatchNorm's mean removes it, so it is never read
    double eps[kConvBlocks];  // of each BatchNorm
};

// Parameter tensors in theta's order. Block by block: convolution weight [filters, channels in, 3, 3], its bias
// [filters] if conv_bias, BatchNorm's weight and bias [filters]; then the classifier's weight [ways, features] and bias
// [ways].
constexpr int conv_tensors_of_block(const ConvShape& shape) { return shape.conv_bias ? 4 : 3; }
constexpr int conv_tensors(const ConvShape& shape) { return shape.blocks * conv_tensors_of_block(shape) + 2; }

// One set of examples of all tasks.
template <typename Scalar>
struct ConvSet {
    const Scalar* x;             // [T, count, channels, height, width] Scalar
    const std::int64_t* labels;  // [T, count] int64; one out of range makes its task's loss NaN
    std::int32_t count;          // S or Q; 0: there is no such set
};

template <typename Scalar>
struct ConvMetaStepParams {
    const Scalar* theta;  // [P] Scalar, in the order above
    ConvSet<Scalar> support;
    ConvSet<Scalar> query;
    const Scalar* lr;           // [K, tensors] Scalar, of each parameter tensor at each step; else as `how` says
    const std::uint8_t* adapt;  // [tensors] bool as bytes: which of them the inner loop moves
    Scalar* support_loss;       // [K, T] Scalar
    Scalar* query_loss;         // [T] Scalar; null without a query set
    Scalar* query_accuracy;     // [T] Scalar; null without a query set
    Scalar* logits;             // [T, Q, ways] Scalar; may be null
    Scalar* adapted;            // [T, P] Scalar, the parameters after the inner loop; may be null
    Scalar* grads;              // [T, P] Scalar, meta-gradients, longer as its rates say; may be null
    Scalar* rate_grads;         // [T, K, tensors or P] Scalar, on CUDA, where rows of grads are not longer
    std::uint8_t* nonfinite;    // [T] bool as bytes, or-ed
    void* workspace;            // of the size that the plan gives
    std::int64_t tasks;         // T
    std::int64_t parameters;    // P
    std::int32_t steps;         // K
    Method method;
    StepOptions how;
    std::int8_t* counts;  // [T, P] int8, of steps that are counted, -128 for NaN; may be null
    ConvShape shape;
};

}  // namespace signmaml
