// How the place of an inner step's gradient is perturbed; signmaml_ext/sharpness.py has the formulas.
#pragma once

#include <cstdint>

namespace signmaml {

enum class SharpnessNorm : std::int32_t {
    kL2 = 0,    // along the gradient, divided by its norm over all that adapts
    kLinf = 1,  // along its sign
};

struct SharpnessOptions {
    double rho;  // radius; 0: gradients are taken where the parameters are
    SharpnessNorm norm;
    bool adaptive;  // in proportion to each parameter's size
};

// Keeps the quotient of a gradient of 0 at 0.
inline constexpr double kSharpnessTiny = 1e-12;

}  // namespace signmaml
