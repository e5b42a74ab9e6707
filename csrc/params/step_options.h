// What kernels must know of inner steps beside their number and method.
#pragma once

#include "params/rates.h"
#include "params/sharpness.h"

namespace signmaml {

struct StepOptions {
    RateOptions rates;  // on CUDA always by step
    SharpnessOptions sharpness;
    bool counted;  // parameters are theta - rate * counts of sign steps, whose rates are the same in every step

    constexpr bool climbs() const { return sharpness.rho > 0; }
};

}  // namespace signmaml
