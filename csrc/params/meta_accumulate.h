// Arguments of one accumulation of meta-gradients, the same struct for CPU and CUDA code.
#pragma once

#include <cstdint>

namespace signmaml {

template <typename Scalar>
struct MetaAccumulateParams {
    Scalar* out;              // [P] Scalar, added to in place
    const Scalar* grads;      // [T, P] Scalar
    std::uint8_t* nonfinite;  // [T] bool as bytes, or-ed
    std::int64_t tasks;       // T
    std::int64_t parameters;  // P
    bool skip_nonfinite;      // leave flagged tasks out of the sum and of the count
};

}  // namespace signmaml
