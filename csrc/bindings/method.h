// The method by its name in Python.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "params/compact_sign_step.h"
#include "params/method.h"

namespace signmaml::bindings {

inline Method method_of(const std::string& name) {
    if (name == "sign-maml") return Method::kSignMaml;
    if (name == "fo-maml") return Method::kFoMaml;
    if (name == "maml") return Method::kMaml;
    throw std::invalid_argument("method: expected 'sign-maml', 'fo-maml' or 'maml', found '" + name + "'");
}

// Throws unless steps can be counted in int8.
inline void check_counted(Method method, std::int64_t steps) {
    if (method != Method::kSignMaml) throw std::invalid_argument("counts_steps: expected false without sign steps");
    if (steps > kMostCountedSteps) {
        throw std::invalid_argument("steps: expected at most " + std::to_string(kMostCountedSteps) +
                                    " that are counted, found " + std::to_string(steps));
    }
}

}  // namespace signmaml::bindings
