// The operations of the CPU backend. Bitwise the same result for every number of threads and every instruction set.
#pragma once

#include "params/meta_accumulate.h"
#include "params/sign_step.h"

namespace signmaml::cpu {

template <typename Scalar>
void sign_step(const SignStepParams<Scalar>& params, int threads);

template <typename Scalar>
void meta_accumulate(const MetaAccumulateParams<Scalar>& params, int threads);

}  // namespace signmaml::cpu
