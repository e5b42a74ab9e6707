// Arguments of one sign step on int8 step counts, the same struct for CPU and CUDA code.
#pragma once

#include <cstdint>

#include "params/sign_step.h"

namespace signmaml {

// The count of a parameter that is not a number. All others are -127 to 127.
inline constexpr int kNanCount = -128;
inline constexpr int kMostCountedSteps = 127;

template <typename Scalar>
struct CompactSignStepParams {
    std::int8_t* counts;                  // [T, P] int8, updated in place
    Scalar* params;                       // [T, P] Scalar, written: theta - lr * counts
    const Scalar* theta;                  // [P] Scalar
    const Scalar* grads;                  // [T, P] Scalar
    const Scalar* lr;                     // [1] | [P] | [G] Scalar, as lr_spread says
    const std::int64_t* segment_offsets;  // [G + 1] int64, first 0, last P, non-decreasing; null without segments
    std::uint8_t* nonfinite;              // [T] bool as bytes, or-ed
    std::int64_t tasks;                   // T
    std::int64_t parameters;              // P
    std::int64_t segments;                // G, 0 without segments
    Spread lr_spread;                     // kAll, kPerElement or kPerSegment
};

}  // namespace signmaml
