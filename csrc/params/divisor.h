// A divisor that is known before a launch, so that a kernel can multiply instead of divide.
#pragma once

#include <cstdint>

namespace signmaml {

// n / value is the high half of 2 n * magic, exactly, for 0 <= n and n * value < 2^31.
struct Divisor {
    std::int32_t value;
    std::uint32_t magic;  // 0: some n are too large
};

}  // namespace signmaml
