// Arguments of one sign step, the same struct for CPU and CUDA code.
#pragma once

#include <cstdint>

namespace signmaml {

// How a table of learning rates or a mask maps to parameters.
enum class Spread : std::int32_t {
    kNone = 0,        // there is no table
    kAll = 1,         // one entry for all parameters
    kPerElement = 2,  // one entry per parameter
    kPerSegment = 3,  // one entry per segment of consecutive parameters
};

template <typename Scalar>
struct SignStepParams {
    Scalar* params;                       // [T, P] Scalar, updated in place
    const Scalar* grads;                  // [T, P] Scalar
    const Scalar* lr;                     // [1] | [P] | [G] Scalar, as lr_spread says
    const std::int64_t* segment_offsets;  // [G + 1] int64, first 0, last P, non-decreasing; null without segments
    const std::uint8_t* mask;             // [P] | [G] bool as bytes, as mask_spread says; null without a mask
    std::uint8_t* nonfinite;              // [T] bool as bytes, or-ed
    std::int64_t tasks;                   // T
    std::int64_t parameters;              // P
    std::int64_t segments;                // G, 0 without segments
    Spread lr_spread;                     // kAll, kPerElement or kPerSegment
    Spread mask_spread;                   // kNone, kPerElement or kPerSegment
};

}  // namespace signmaml
