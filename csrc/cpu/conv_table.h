// The stages of a convolutional network's passes on the CPU, and the memory of one task that they work on. There is one
// table of stages for each instruction set: csrc/cpu/isa/conv/.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "params/conv_meta_step.h"
#include "plan/conv_meta_step_cpu.h"

// The accessors below are inlined at every level of optimisation. An out-of-line copy would be shared by the
// instruction sets, and the linker might keep the one for a processor that is not there.

namespace signmaml::cpu {

// What one item leaves for a later stage to add up. Stages use the same memory one after the other, so only what one
// stage left last is there.
template <typename Scalar>
struct ConvPartial {
    Scalar* begin;
    std::int64_t channels;

    // patch_sum: [9 inputs]
    [[gnu::always_inline]] Scalar* patch_sums() const { return begin; }
    // patch_covariance: [patch, patch] with patch = 9 inputs
    [[gnu::always_inline]] Scalar* patch_products() const { return begin; }
    // forward: of the raw values, [channels] each; deviations are from the item's own mean
    [[gnu::always_inline]] Scalar* means() const { return begin; }
    [[gnu::always_inline]] Scalar* squared_deviations() const { return begin + channels; }
    // grad_sums: of the gradient that ReLU passes, [channels], and after block 0 of it times the normalised value
    [[gnu::always_inline]] Scalar* grad_sums() const { return begin; }
    [[gnu::always_inline]] Scalar* grad_products() const { return begin + channels; }
    // tangent_sums: of the raw tangents, and of them times the centred raw values, [channels] each
    [[gnu::always_inline]] Scalar* tangent_sums() const { return begin; }
    [[gnu::always_inline]] Scalar* tangent_products() const { return begin + channels; }
    // first_weight_grad: [groups, 9 inputs, group]; grad_sums stay
    [[gnu::always_inline]] Scalar* patch_grads() const { return begin + 2 * channels; }
};

// One task's memory while it works on one of its sets.
template <typename Scalar>
struct ConvTask {
    const ConvShape* shape;
    const ConvCpuLayout* layout;
    Scalar* memory;                       // as the layout says
    std::int64_t examples;                // n of the set at hand
    std::int64_t held[kConvBlocks] = {};  // the example with which a block's output starts, where not all is kept

    [[gnu::always_inline]] const ConvBlockPlan& block(int i) const { return layout->blocks[i]; }
    [[gnu::always_inline]] Scalar* at(std::int64_t place) const { return memory + place; }
    [[gnu::always_inline]] Scalar* vector(int i, ConvVector which) const {
        return memory + block(i).vector + which * layout->channels;
    }
    [[gnu::always_inline]] ConvPartial<Scalar> partial(std::int64_t item) const {
        return {memory + layout->partial + item * layout->partial_size, layout->channels};
    }
    // Of block 0's patches: [kConvLargestPatch] and [kConvLargestPatch, kConvLargestPatch], double for every Scalar.
    [[gnu::always_inline]] double* patch_mean() const { return reinterpret_cast<double*>(at(layout->patch_mean)); }
    [[gnu::always_inline]] double* covariance() const { return reinterpret_cast<double*>(at(layout->covariance)); }
};

// An `item` is a number among the items of all examples. `scratch` is the thread's own. kernels.md 2 and 4 describe the
// GPU's stages of the same names.
template <typename Scalar>
struct ConvStages {
    ConvUnit unit;

    // ---- block 0's patches, once a set
    // images[example] <- x [channels, height, width]
    void (*pack_image)(const ConvTask<Scalar>&, const Scalar* x, std::int64_t example);
    // patch_sums <- the sum of the item's patches
    void (*patch_sum)(const ConvTask<Scalar>&, std::int64_t item);
    // patch_products <- sums of outer products of the example's patches, centred by the channel means (the middle tap
    // of patch_mean). Only entries from the diagonal block of the row's window row on are written.
    void (*patch_covariance)(const ConvTask<Scalar>&, std::int64_t example, Scalar* scratch);

    // ---- weights
    // weight <- the block's tensor in theta, [filters, inputs, 3, 3]
    void (*pack_weights)(const ConvTask<Scalar>&, int block, const Scalar* theta);
    // a tensor like theta's <- `packed`, laid out like weight
    void (*unpack_weights)(const ConvTask<Scalar>&, int block, const Scalar* packed, Scalar* theta);
    // weight_back <- weight, of a block after the first
    void (*pack_back)(const ConvTask<Scalar>&, int block);
    // transformed <- weight, or weight_back for the data gradient, where the block multiplies so. Of block 0:
    // first_weight <- weight, after its statistics
    void (*transform_weights)(const ConvTask<Scalar>&, int block, bool back);

    // ---- forward
    // raw <- convolution; winner, choice <- the largest or smallest of four, by gamma's sign; means and
    // squared_deviations. Block 0, whose statistics are known before, writes `activation` and choice instead. A strided
    // block takes forward_items of the items [first, last) together.
    void (*forward)(const ConvTask<Scalar>&, int block, std::int64_t first, std::int64_t last, Scalar* scratch);
    // The vectors from kMean to kShift, from what forward left or, for block 0, from the patches' covariance.
    void (*statistics)(const ConvTask<Scalar>&, int block);
    // activation <- relu(scale * winner + shift), of one example
    void (*normalise)(const ConvTask<Scalar>&, int block, std::int64_t example);

    // ---- backward
    // activation_grad <- 0 where ReLU was; grad_sums and grad_products. Nothing for block 0 with stride 2 and gray
    // images: there first_weight_grad writes grad_sums.
    void (*grad_sums)(const ConvTask<Scalar>&, int block, std::int64_t item, Scalar* scratch);
    // kBetaGrad and kGammaGrad, and from them kSlope and kOffset, of a block after the first
    void (*norm_grads)(const ConvTask<Scalar>&, int block);
    // raw <- its own gradient
    void (*raw_grad)(const ConvTask<Scalar>&, int block, std::int64_t item);
    // The weight gradient of a block after the first consists of kConvProducts matrices of products: these are the ones
    // from first_product on. Examples [first, last) go from the last to the first. Those up to the set's end start the
    // sums, unless they are to be added too, and the others add to them. `first` is a multiple of weight_images, and
    // `last` too unless it is the end.
    void (*weight_products)(const ConvTask<Scalar>&, int block, std::int64_t first, std::int64_t last,
                            std::int64_t first_product, std::int64_t last_product, bool add, Scalar* scratch);
    // weight_grad <- the sums of those matrices
    void (*weight_grad)(const ConvTask<Scalar>&, int block);
    // activation_grad of the block before `block` <- data gradient of `block`; then grad_sums. The items [first, last)
    // are of the block before; there are at most data_grad_items.
    void (*data_grad)(const ConvTask<Scalar>&, int block, std::int64_t first, std::int64_t last, Scalar* scratch);
    // patch_grads <- the sum of patches times activation_grad at the winners
    void (*first_weight_grad)(const ConvTask<Scalar>&, std::int64_t item, Scalar* scratch);
    // weight_grad, kBetaGrad and kGammaGrad of block 0
    void (*finish_first)(const ConvTask<Scalar>&);

    // ---- the derivative of the passes in one direction of the parameters (cpu/conv_second_order.h)
    // `t` is the task and `d` has the derivatives of what t has; mixtures of the two are layouts too. All of t's
    // activations are kept.
    // raw (+)= convolution of the items [first, last), of a block after the first
    void (*convolve)(const ConvTask<Scalar>&, int block, std::int64_t first, std::int64_t last, bool add,
                     Scalar* scratch);
    // activation_grad of the block before `block` (+)= data gradient of `block`; the items are those of data_grad
    void (*convolve_back)(const ConvTask<Scalar>&, int block, std::int64_t first, std::int64_t last, bool add,
                          Scalar* scratch);
    // d's first_weight and, from it, activation of block 0
    void (*tangent_transform_first)(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d);
    void (*tangent_first)(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, std::int64_t item, Scalar* scratch);
    // tangent_sums and tangent_products from both raw values, and d's winner; of a block after the first
    void (*tangent_sums)(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, std::int64_t item);
    // d's vectors from kMean to kShift; then its activation, of a block after the first
    void (*tangent_statistics)(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block);
    void (*tangent_normalise)(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, std::int64_t example);
    // Of a block after the first: d's activation_grad <- 0 where ReLU was; grad_sums and grad_products. Then d's
    // vectors from kGammaGrad to kOffset. Then both raw values <- their own gradients.
    void (*tangent_grad_sums)(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, std::int64_t item);
    void (*tangent_norm_grads)(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block);
    void (*tangent_raw_grad)(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, std::int64_t item);
    // d's weight_grad, kBetaGrad and kGammaGrad of block 0
    void (*tangent_finish_first)(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d);

    // ---- the classifier and the step
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
