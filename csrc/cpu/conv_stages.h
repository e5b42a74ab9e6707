// The stages of a convolutional network's passes on the CPU, over one item of one task, once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "params/conv_meta_step.h"
#include "plan/conv_meta_step_cpu.h"

namespace signmaml::cpu {

// One task's memory while it works on one of its sets.
template <typename Scalar>
struct ConvTask {
    const ConvShape* shape;
    const ConvCpuLayout* layout;
    Scalar* memory;                       // as the layout says
    std::int64_t examples;                // n of the set at hand
    std::int64_t held[kConvBlocks] = {};  // the example with which a block's output starts, where not all is kept

    const ConvBlockPlan& block(int i) const { return layout->blocks[i]; }
    Scalar* at(std::int64_t place) const { return memory + place; }
    Scalar* vector(int i, ConvVector which) const { return memory + block(i).vector + which * layout->channels; }
    Scalar* partial(std::int64_t item) const { return memory + layout->partial + item * layout->partial_size; }
};

// "item" counts the items of all examples; `scratch` is the thread's own. Stages of the same name in kernels.md 2
// and 4.
template <typename Scalar>
struct ConvStages {
    ConvUnit unit;

    // images[example] <- x [channels, height, width]
    void (*pack_image)(const ConvTask<Scalar>&, const Scalar* x, std::int64_t example);
    // partial[item] <- sum of the patches of layer 1 over the item
    void (*patch_sum)(const ConvTask<Scalar>&, std::int64_t item);
    // partial[example] <- [patch, patch] sums of outer products of the example's patches less what its pixels have on
    // average, which patch_mean says of the middle tap; each row from that of its window's row on
    void (*patch_covariance)(const ConvTask<Scalar>&, std::int64_t example, Scalar* scratch);

    // weight <- the block's tensor in theta, [filters, inputs, 3, 3]
    void (*pack_weights)(const ConvTask<Scalar>&, int block, const Scalar* theta);
    // A tensor like theta's <- `packed`, which is like weight
    void (*unpack_weights)(const ConvTask<Scalar>&, int block, const Scalar* packed, Scalar* theta);
    // weight_back <- weight, of a block after the first
    void (*pack_back)(const ConvTask<Scalar>&, int block);
    // transformed <- weight or, for the data gradient, weight_back, where the block multiplies so. Of block 0:
    // first_weight <- weight, after its statistics
    void (*transform_weights)(const ConvTask<Scalar>&, int block, bool back);
    // raw <- convolution; winner, choice <- its largest or smallest of four, by gamma's sign; partial[item] <- mean and
    // squared deviations. Block 0, whose statistics are known before, leaves `halved` and choice alone.
    // Items [first, last), of which a strided block takes forward_items together.
    void (*forward)(const ConvTask<Scalar>&, int block, std::int64_t first, std::int64_t last, Scalar* scratch);
    // The vectors from kMean to kShift: from partial, or for block 0 from the patches' covariance.
    void (*statistics)(const ConvTask<Scalar>&, int block);
    // halved <- relu(scale * winner + shift), of one example
    void (*normalise)(const ConvTask<Scalar>&, int block, std::int64_t example);

    // halved_grad <- 0 where ReLU was; partial[item] <- its sum and, after block 0, its sum times the normalised value.
    // Of block 0 with stride 2 and gray images nothing: first_weight_grad leaves the sum.
    void (*halved_sums)(const ConvTask<Scalar>&, int block, std::int64_t item, Scalar* scratch);
    // kBetaGrad and kGammaGrad from partial; kSlope and kOffset from them. Of a block after the first
    void (*norm_grads)(const ConvTask<Scalar>&, int block);
    // raw <- its own gradient
    void (*raw_grad)(const ConvTask<Scalar>&, int block, std::int64_t item);
    // The weight gradient of a block after the first: some of the kConvProducts matrices of products that it consists
    // of, and their sums. Examples [first, last) go from the last to the first: those up to the set's end start the
    // sums, to which the others add. `first`, and `last` but for the end, are multiples of weight_images.
    void (*weight_products)(const ConvTask<Scalar>&, int block, std::int64_t first, std::int64_t last,
                            std::int64_t first_product, std::int64_t last_product, Scalar* scratch);
    void (*weight_grad)(const ConvTask<Scalar>&, int block);
    // halved_grad of the block before `block` <- data gradient of `block`; goes on to halved_sums. Items [first, last),
    // at most data_grad_items, are of the block before.
    void (*data_grad)(const ConvTask<Scalar>&, int block, std::int64_t first, std::int64_t last, Scalar* scratch);
    // partial[item], behind what halved_sums leaves <- sum of patches times halved_grad at the winners
    void (*first_weight_grad)(const ConvTask<Scalar>&, std::int64_t item, Scalar* scratch);
    // weight_grad, kBetaGrad and kGammaGrad of block 0, from partial, patch_mean and covariance
    void (*finish_first)(const ConvTask<Scalar>&);

    Scalar (*dot)(const Scalar* a, const Scalar* b, std::int64_t n);
    // y += factor * x
    void (*add_scaled)(Scalar* y, Scalar factor, const Scalar* x, std::int64_t n);
    // params -= lr * grads. Returns whether a gradient is NaN or infinite.
    bool (*gradient_step)(Scalar* params, const Scalar* grads, Scalar lr, std::int64_t n);
};

struct ConvStageTables {
    ConvStages<float> float32;
    ConvStages<double> float64;
};

namespace portable {
extern const ConvStageTables kConvStages;
}
namespace avx2 {
extern const ConvStageTables kConvStages;
}
namespace avx512 {
extern const ConvStageTables kConvStages;
}

template <typename Scalar>
const ConvStages<Scalar>& conv_stages(const Kernels& kernels);

template <>
inline const ConvStages<float>& conv_stages<float>(const Kernels& kernels) {
    return kernels.conv_stages->float32;
}

template <>
inline const ConvStages<double>& conv_stages<double>(const Kernels& kernels) {
    return kernels.conv_stages->float64;
}

}  // namespace signmaml::cpu
