// Integer helpers of the plans.
#pragma once

#include <cstdint>

#include "params/divisor.h"

namespace signmaml {

// For any numerator >= 0: cannot overflow.
constexpr std::int64_t ceil_div(std::int64_t numerator, std::int64_t denominator) {
    return numerator / denominator + (numerator % denominator != 0 ? 1 : 0);
}

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t larger(std::int64_t a, std::int64_t b) { return a < b ? b : a; }

// Groups of tasks whose gradients are in memory at once while they are added in order: one per thread, and one more so
// that a thread can start the next group before the oldest has been added.
constexpr std::int64_t mean_slots(std::int64_t groups, int threads) {
    return larger(1, smaller(groups, std::int64_t{threads} + 1));
}

// For numbers up to `most`.
constexpr Divisor divisor_of(std::int64_t value, std::int64_t most) {
    if (most * value >= std::int64_t{1} << 31) return {static_cast<std::int32_t>(value), 0};
    return {static_cast<std::int32_t>(value),
            static_cast<std::uint32_t>(((std::int64_t{1} << 31) + value - 1) / value)};
}

}  // namespace signmaml
