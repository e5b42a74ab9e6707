// How the inner loop moves, and what the meta-gradient differentiates through.
#pragma once

#include <cstdint>

namespace signmaml {

enum class Method : std::int32_t {
    kSignMaml = 0,  // by the gradient's sign: the query gradient at the adapted parameters is the exact meta-gradient
    kFoMaml = 1,    // by the gradient, taken for a constant
    kMaml = 2,      // by the gradient, differentiated through
};

}  // namespace signmaml
