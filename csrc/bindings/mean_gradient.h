// What a native meta-step on the CPU adds up, out of the addresses that Python gives.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "cpu/ops.h"

namespace signmaml::bindings {

template <typename Scalar>
cpu::MeanGradient<Scalar> mean_of(const std::map<std::string, std::uintptr_t>& addresses, int query,
                                  const Scalar* grads, bool skip_nonfinite) {
    const auto at = [&addresses](const char* name) {
        const auto found = addresses.find(name);
        return found == addresses.end() ? nullptr : reinterpret_cast<Scalar*>(found->second);
    };
    const cpu::MeanGradient<Scalar> mean{at("mean"), at("mean_rows"), skip_nonfinite};
    if (mean.mean == nullptr) return mean;
    if (mean.rows == nullptr) throw std::invalid_argument("addresses: expected one for 'mean_rows', found none");
    if (grads != nullptr) throw std::invalid_argument("addresses: expected 'mean' or 'grads', found both");
    if (query == 0) throw std::invalid_argument("query: expected at least 1 for 'mean', found 0");
    return mean;
}

}  // namespace signmaml::bindings
