// The CUDA operations, for callers that know no CUDA header. They enqueue on `stream` (a cudaStream_t) of `device` and
// return: no allocation, no synchronisation, nothing that a stream capture forbids. Errors throw std::runtime_error.
#pragma once

#include "params/meta_accumulate.h"
#include "params/sign_step.h"

namespace signmaml {

template <typename Scalar>
void launch_sign_step(const SignStepParams<Scalar>& params, int device, void* stream);

template <typename Scalar>
void launch_meta_accumulate(const MetaAccumulateParams<Scalar>& params, int device, void* stream);

// The newest CUDA version that the installed driver serves, 13000 for 13.0; 0 without a driver.
int cuda_driver_version();

}  // namespace signmaml
