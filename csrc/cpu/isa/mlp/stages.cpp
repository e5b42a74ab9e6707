// A meta-step of a group of tasks of a multilayer perceptron. The tasks lie side by side in the lanes of vectors, so a
// matrix product is one fused multiply-add of vectors an element. CMakeLists.txt compiles this file once for each
// instruction set. SIGNMAML_ISA names the namespace, and products are fused multiply-adds where there are any. The
// order of every sum is fixed. Readable twin: signmaml_ext/reference.py. The same on a GPU: kernels/mlp_meta_step.cuh.

#include "cpu/isa/mlp/group.h"
#include "cpu/mlp_table.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

constexpr int kNarrowBytes = 16;

template <typename Scalar, int kBytes>
void meta_step(const MlpGroup<Scalar>& group) {
    Group<Simd<Scalar, kBytes>>(group).run();
}

template <typename Scalar, int kBytes>
constexpr typename MlpStages<Scalar>::Width width() {
    return {Simd<Scalar, kBytes>::kLanes, meta_step<Scalar, kBytes>};
}

template <typename Scalar>
constexpr MlpStages<Scalar> table() {
    return {width<Scalar, kVectorBytes>(), width<Scalar, kNarrowBytes>()};
}

}  // namespace

extern const MlpStageTables kMlpStages;
const MlpStageTables kMlpStages = {table<float>(), table<double>()};

}  // namespace signmaml::cpu::SIGNMAML_ISA
