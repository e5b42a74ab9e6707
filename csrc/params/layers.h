// A network as a program of blocks, and the arguments of a pass of it: the loss of every task's examples and its
// gradient. A block is a product (a convolution or a linear layer, or a sum), a normalisation, an activation, a pooling
// and a dropout, in this order; each may be missing. signmaml_ext/layers/spec.py makes such programs.
#pragma once

#include <cstdint>

namespace signmaml {

inline constexpr int kLayersBlocks = 64;  // blocks at most
inline constexpr int kLayersWindow = 16;  // rows of a convolution's window at most

// kSum: of two blocks' outputs.
enum class LayersProduct : std::int32_t { kNone = 0, kConv, kLinear, kSum };

// kBatch: over the examples and positions of a channel. kGroup: over the positions and channels of a group of an
// example.
enum class LayersNorm : std::int32_t { kNone = 0, kBatch, kGroup };

enum class LayersActivation : std::int32_t {
    kNone = 0,
    kRelu,
    kLeakyRelu,  // `slope` below 0
    kElu,        // `slope` (exp(x) - 1) below 0
    kGelu,       // with the error function
    kGeluTanh,   // its approximation
    kSilu,
    kTanh,
    kSigmoid,
};

// kMean: over all positions.
enum class LayersPool : std::int32_t { kNone = 0, kMax, kAverage, kMean };

// Of single values or of whole channels of an example.
enum class LayersDropout : std::int32_t { kNone = 0, kValues, kChannels };

struct LayersSize {
    std::int32_t channels, height, width;
};

struct LayersWindow {
    std::int32_t height, width, stride_h, stride_w, pad_h, pad_w;
};

struct LayersBlock {
    std::int32_t source;  // the block whose output it reads; -1: it reads the examples
    std::int32_t added;   // of a sum: the block whose output is added
    LayersSize in;  // of the block's input; a linear layer reads all of it, as torch flattens [channels, height, width]
    LayersSize made;  // after the product
    LayersSize out;   // after pooling
    LayersProduct product;
    LayersWindow window;        // of the convolution
    std::int32_t weight;        // numbers of the parameter tensors; -1: there is none
    std::int32_t bias;          // [channels]
    std::int32_t scale, shift;  // [channels], of the normalisation
    LayersNorm norm;
    std::int32_t groups;
    double eps;
    LayersActivation activation;
    double slope;
    LayersPool pool;
    LayersWindow pool_window;
    bool counts_padding;  // average pooling divides by positions over the border too
    LayersDropout dropout;
};

struct LayersNetwork {
    std::int32_t blocks;
    std::int32_t tensors;
    LayersBlock block[kLayersBlocks];
};

constexpr std::int64_t layers_features(const LayersSize& size) {
    return std::int64_t{size.channels} * size.height * size.width;
}

// Factors of a block's dropout for an example.
constexpr std::int64_t layers_noise(const LayersBlock& block) {
    if (block.dropout == LayersDropout::kNone) return 0;
    return block.dropout == LayersDropout::kChannels ? block.out.channels : layers_features(block.out);
}

// Whether every block reads the one before it, and nothing else.
constexpr bool layers_is_chain(const LayersNetwork& network) {
    for (int i = 0; i < network.blocks; ++i) {
        if (network.block[i].source != i - 1 || network.block[i].product == LayersProduct::kSum) return false;
    }
    return true;
}

constexpr bool layers_reads(const LayersBlock& block, int other) {
    return block.source == other || (block.product == LayersProduct::kSum && block.added == other);
}

constexpr bool layers_couple_examples(const LayersNetwork& network) {
    for (int i = 0; i < network.blocks; ++i) {
        if (network.block[i].norm == LayersNorm::kBatch) return true;
    }
    return false;
}

// One parameter tensor of all tasks, each task's own or shared, and where its gradient goes.
template <typename Scalar>
struct LayersTensor {
    const Scalar* values;
    std::int64_t values_apart;  // from one task's to the next one's; 0: all tasks share them
    Scalar* grads;              // null: not wanted
    std::int64_t grads_apart;
    const Scalar* direction;  // of a Hessian's product; null: 0
    std::int64_t direction_apart;
};

template <typename Scalar>
struct LayersPassParams {
    const LayersTensor<Scalar>* tensors;  // [network.tensors]
    const Scalar* x;                      // [T, count, channels, height, width]
    const std::int64_t* labels;           // [T, count] for cross-entropy; one out of range makes its task's loss NaN
    const Scalar* target;                 // [T, count, outputs] for the mean squared error
    // [network.blocks]; of a dropout the factors of what the block gives, [T, count, channels, height, width] or
    // [T, count, channels]
    const Scalar* const* noise;
    Scalar* loss;         // [T]
    Scalar* predictions;  // [T, count, outputs] or null
    void* workspace;      // as plan_layers_cpu says
    std::int64_t tasks, count;
    bool differentiates;  // whether any gradient is wanted
};

// The product of every task's Hessian with a direction, into `grads`: how the gradient of its loss changes along it.
template <typename Scalar>
struct LayersHessianParams {
    const LayersTensor<Scalar>* tensors;  // [network.tensors]
    const Scalar* x;                      // as in LayersPassParams
    const std::int64_t* labels;
    const Scalar* target;
    const Scalar* const* noise;
    void* workspace;
    std::int64_t tasks, count;
};

}  // namespace signmaml
