// The CUDA operations, for callers that include no CUDA header. They enqueue on `stream` (a cudaStream_t) of `device`
// and return: no allocation, no synchronisation, nothing that a stream capture forbids. Errors throw
// std::runtime_error.
#pragma once

#include "params/compact_sign_step.h"
#include "params/conv_kernels.h"
#include "params/meta_accumulate.h"
#include "params/mlp_meta_step.h"
#include "params/sign_step.h"

namespace signmaml {

template <typename Scalar>
void launch_sign_step(const SignStepParams<Scalar>& params, int device, void* stream);

template <typename Scalar>
void launch_compact_sign_step(const CompactSignStepParams<Scalar>& params, int device, void* stream);

template <typename Scalar>
void launch_meta_accumulate(const MetaAccumulateParams<Scalar>& params, int device, void* stream);

// `params.workspace` has the size that plan_mlp_meta_step gives for multiprocessors(device).
template <typename Scalar>
void launch_mlp_meta_step(const MlpMetaStepParams<Scalar>& params, int device, void* stream);

// The same for steps that are differentiated, to which launch_mlp_meta_step gives them.
template <typename Scalar>
void launch_mlp_second_order(const MlpMetaStepParams<Scalar>& params, int device, void* stream);

// `params.workspace` has the size that plan_conv_meta_step gives for the same arguments.
void launch_conv_meta_step(const ConvMetaStepParams<float>& params, ConvPrecision precision, bool by_covariance,
                           std::int64_t workspace_limit, int device, void* stream);

int multiprocessors(int device);

// The newest CUDA version that the installed driver supports, e.g. 13000 for 13.0; 0 without a driver.
int cuda_driver_version();

}  // namespace signmaml
