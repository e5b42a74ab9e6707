// A meta-step of a group of tasks of a multilayer perceptron on the CPU, once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "params/mlp_meta_step.h"
#include "plan/mlp_meta_step_cpu.h"

namespace signmaml::cpu {

// A loop over independent items that several threads may share.
struct Sharing {
    using Body = void (*)(const void* self, std::int64_t begin, std::int64_t end);

    // Calls body(self, begin, end) on ranges that together cover [0, items). Null: there is one thread.
    void (*run)(std::int64_t items, int threads, Body body, const void* self);
    int threads;
};

// Tasks [first, first + live) in the lanes of vectors, in `memory` as the layout says, aligned to kMlpAlignment.
template <typename Scalar>
struct MlpGroup {
    const MlpMetaStepParams<Scalar>* params;
    const MlpCpuLayout* layout;
    Scalar* memory;
    std::int64_t first;
    int live;
    Scalar* grads;  // [live, P] of these tasks; null: not wanted
    Sharing sharing;
};

template <typename Scalar>
struct MlpStages {
    struct Width {
        int lanes;
        void (*meta_step)(const MlpGroup<Scalar>&);
    };
    Width wide;
    Width narrow;
};

struct MlpStageTables {
    MlpStages<float> float32;
    MlpStages<double> float64;
};

namespace portable {
extern const MlpStageTables kMlpStages;
}
namespace avx2 {
extern const MlpStageTables kMlpStages;
}
namespace avx512 {
extern const MlpStageTables kMlpStages;
}

template <typename Scalar>
const MlpStages<Scalar>& mlp_stages(const Kernels& kernels);

template <>
inline const MlpStages<float>& mlp_stages<float>(const Kernels& kernels) {
    return kernels.mlp_stages->float32;
}

template <>
inline const MlpStages<double>& mlp_stages<double>(const Kernels& kernels) {
    return kernels.mlp_stages->float64;
}

}  // namespace signmaml::cpu
