// The stages of a pass of a program of blocks on the CPU. CMakeLists.txt compiles this file once for each instruction
// set. SIGNMAML_ISA names the namespace, and products are fused multiply-adds where there are any. The order of every
// sum is fixed. Readable twin: LayersSpec.forward in signmaml_ext/layers/spec.py.

#include "cpu/isa/layers/hessian.h"
#include "cpu/isa/layers/passes.h"
#include "cpu/layers_table.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

template <typename Scalar>
constexpr LayersStages<Scalar> table() {
    LayersStages<Scalar> stages{};
    stages.unit = {kLanes<Scalar>, 2, kMostVectors};
    stages.clear_borders = clear_borders<Scalar>;
    stages.start = start<Scalar>;
    stages.forward = forward<Scalar>;
    stages.backward = backward<Scalar>;
    stages.finish = finish<Scalar>;
    stages.start_tangents = start_tangents<Scalar>;
    stages.forward_tangents = forward_tangents<Scalar>;
    stages.backward_tangents = backward_tangents<Scalar>;
    return stages;
}

}  // namespace

extern const LayersStageTables kLayersStages;
const LayersStageTables kLayersStages = {table<float>(), table<double>()};

}  // namespace signmaml::cpu::SIGNMAML_ISA
