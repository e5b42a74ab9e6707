// The stages of a convolutional network on the CPU: NHWC, convolution in register tiles. CMakeLists.txt compiles this
// file once for each instruction set. SIGNMAML_ISA names the namespace, and products are fused multiply-adds where
// there are any. The order of every sum is fixed, whichever thread computes it. Readable twin:
// signmaml_ext/reference.py.

#include "cpu/conv_table.h"
#include "cpu/isa/conv/data_grad.h"
#include "cpu/isa/conv/first_tangents.h"
#include "cpu/isa/conv/forward.h"
#include "cpu/isa/conv/packing.h"
#include "cpu/isa/conv/patches.h"
#include "cpu/isa/conv/tangents.h"
#include "cpu/isa/conv/vectors.h"
#include "cpu/isa/conv/weight_grad.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

template <typename Scalar>
constexpr ConvStages<Scalar> table() {
    ConvStages<Scalar> stages{};
    stages.unit = {kLanes<Scalar>, 2, kMostVectors};
    stages.pack_image = pack_image<Scalar>;
    stages.patch_sum = patch_sum<Scalar>;
    stages.patch_covariance = patch_covariance<Scalar>;
    stages.pack_weights = pack_weights<Scalar>;
    stages.unpack_weights = unpack_weights<Scalar>;
    stages.pack_back = pack_back<Scalar>;
    stages.transform_weights = transform_weights<Scalar>;
    stages.forward = forward<Scalar>;
    stages.statistics = statistics<Scalar>;
    stages.normalise = normalise<Scalar>;
    stages.grad_sums = grad_sums<Scalar>;
    stages.norm_grads = norm_grads<Scalar>;
    stages.raw_grad = raw_grad<Scalar>;
    stages.weight_products = weight_products<Scalar>;
    stages.weight_grad = weight_grad<Scalar>;
    stages.data_grad = data_grad<Scalar>;
    stages.first_weight_grad = first_weight_grad<Scalar>;
    stages.finish_first = finish_first<Scalar>;
    stages.convolve = convolve<Scalar>;
    stages.convolve_back = convolve_back<Scalar>;
    stages.tangent_transform_first = tangent_transform_first<Scalar>;
    stages.tangent_first = tangent_first<Scalar>;
    stages.tangent_sums = tangent_sums<Scalar>;
    stages.tangent_statistics = tangent_statistics<Scalar>;
    stages.tangent_normalise = tangent_normalise<Scalar>;
    stages.tangent_grad_sums = tangent_grad_sums<Scalar>;
    stages.tangent_norm_grads = tangent_norm_grads<Scalar>;
    stages.tangent_raw_grad = tangent_raw_grad<Scalar>;
    stages.tangent_finish_first = tangent_finish_first<Scalar>;
    stages.dot = dot<Scalar>;
    stages.add_scaled = add_scaled<Scalar>;
    stages.gradient_step = gradient_step<Scalar>;
    return stages;
}

}  // namespace

extern const ConvStageTables kConvStages;
const ConvStageTables kConvStages = {table<float>(), table<double>()};

}  // namespace signmaml::cpu::SIGNMAML_ISA
