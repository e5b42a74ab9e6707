// Integer helpers of the plans.
#pragma once

#include <cstdint>

namespace signmaml {

constexpr std::int64_t ceil_div(std::int64_t numerator, std::int64_t denominator) {
    return (numerator + denominator - 1) / denominator;
}

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t larger(std::int64_t a, std::int64_t b) { return a < b ? b : a; }

}  // namespace signmaml
