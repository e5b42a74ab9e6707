// The operations of the CPU backend. Bitwise the same result for every number of threads and every instruction set.
#pragma once

#include "params/compact_sign_step.h"
#include "params/conv_meta_step.h"
#include "params/layers.h"
#include "params/meta_accumulate.h"
#include "params/mlp_meta_step.h"
#include "params/sign_step.h"
#include "plan/mlp_meta_step_cpu.h"

namespace signmaml::cpu {

template <typename Scalar>
void sign_step(const SignStepParams<Scalar>& params, int threads);

template <typename Scalar>
void compact_sign_step(const CompactSignStepParams<Scalar>& params, int threads);

template <typename Scalar>
void meta_accumulate(const MetaAccumulateParams<Scalar>& params, int threads);

// What a meta-step of all tasks adds up while they run.
template <typename Scalar>
struct MeanGradient {
    Scalar* mean;         // [P] Scalar, over the tasks that count, of the gradients of their query losses; null: none
    Scalar* rows;         // [as many as the plan says, P] Scalar, memory for it
    bool skip_nonfinite;  // flagged tasks do not count; without any other the mean is 0
};

// `params.workspace` has what plan_conv_meta_step_cpu says for conv_unit and these threads. The same bits for any
// number of threads and whatever other tasks there are; an instruction set has its own.
template <typename Scalar>
void conv_meta_step(const ConvMetaStepParams<Scalar>& params, const MeanGradient<Scalar>& mean, int threads);

// `params.workspace` has what plan_mlp_meta_step_cpu says for the lanes of mlp_stages and these threads. The same bits
// as above. Steps that are differentiated cannot be sharpness-aware.
template <typename Scalar>
void mlp_meta_step(const MlpMetaStepParams<Scalar>& params, const MeanGradient<Scalar>& mean, int threads);

// A pass of a program of blocks. `params.workspace` has what plan_layers_cpu says for the unit of layers_stages and
// these threads. The same bits as above.
template <typename Scalar>
void layers_pass(const LayersNetwork& network, const LayersPassParams<Scalar>& params, int threads);

// Likewise.
template <typename Scalar>
void layers_hessian(const LayersNetwork& network, const LayersHessianParams<Scalar>& params, int threads);

}  // namespace signmaml::cpu
