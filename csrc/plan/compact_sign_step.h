// How a sign step on int8 counts is divided into pieces: like one on scalars, but with vectors only if the counts are
// aligned to match.
#pragma once

#include <cstdint>

#include "plan/sign_step.h"

namespace signmaml {

// Whether element i of the scalars is on a vector boundary exactly where count i is.
constexpr bool counts_congruent(std::uint64_t params_address, std::uint64_t counts_address, int scalar_bytes) {
    const auto width = static_cast<std::uint64_t>(16 / scalar_bytes);
    return (params_address / static_cast<std::uint64_t>(scalar_bytes) - counts_address) % width == 0;
}

constexpr SignStepGrid plan_compact_sign_step(std::int64_t tasks, std::int64_t parameters, int scalar_bytes,
                                              std::uint64_t params_address, std::uint64_t grads_address,
                                              std::uint64_t counts_address, int multiprocessors) {
    const bool wide =
        congruent(params_address, grads_address) && counts_congruent(params_address, counts_address, scalar_bytes);
    return sign_step_grid(tasks, parameters, wide ? 16 / scalar_bytes : 1, multiprocessors);
}

}  // namespace signmaml
