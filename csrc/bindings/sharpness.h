// Inner steps as Python passes them: sharpness, and all their options.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "bindings/method.h"
#include "params/method.h"
#include "params/step_options.h"

namespace signmaml::bindings {

// `rho` 0: plain steps. Throws for what is no such step, and for steps that are differentiated.
inline SharpnessOptions sharpness_of(double rho, const std::string& norm, bool adaptive, Method method) {
    if (!(std::isfinite(rho) && rho >= 0)) {
        throw std::invalid_argument("sharpness_rho: expected a finite number >= 0, found " + std::to_string(rho));
    }
    if (norm != "l2" && norm != "linf") {
        throw std::invalid_argument("sharpness_norm: expected 'l2' or 'linf', found '" + norm + "'");
    }
    if (rho > 0 && method == Method::kMaml) {
        throw std::invalid_argument("sharpness_rho: expected 0 with method 'maml', found " + std::to_string(rho));
    }
    return {rho, norm == "linf" ? SharpnessNorm::kLinf : SharpnessNorm::kL2, adaptive};
}

// Throws also where steps that are counted are not all sign steps of one size, or too many.
inline StepOptions step_options_of(RateOptions rates, double rho, const std::string& norm, bool adaptive,
                                   bool counts_steps, Method method, std::int64_t steps) {
    const SharpnessOptions sharpness = sharpness_of(rho, norm, adaptive, method);
    if (counts_steps) check_counted(method, steps);
    return {rates, sharpness, counts_steps};
}

}  // namespace signmaml::bindings
