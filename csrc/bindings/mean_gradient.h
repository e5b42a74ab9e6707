// The mean of gradients that a native meta-step on the CPU computes, read from the addresses that Python gives.
#pragma once

#include <stdexcept>

#include "bindings/addresses.h"
#include "cpu/ops.h"

namespace signmaml::bindings {

template <typename Scalar>
cpu::MeanGradient<Scalar> mean_of(const Addresses& addresses, int query, const Scalar* grads, bool skip_nonfinite) {
    const cpu::MeanGradient<Scalar> mean{address_in<Scalar>(addresses, "mean"),
                                         address_in<Scalar>(addresses, "mean_rows"), skip_nonfinite};
    if (mean.mean == nullptr) return mean;
    if (mean.rows == nullptr) throw std::invalid_argument("addresses: expected one for 'mean_rows', found none");
    if (grads != nullptr) throw std::invalid_argument("addresses: expected 'mean' or 'grads', found both");
    if (query == 0) throw std::invalid_argument("query: expected at least 1 for 'mean', found 0");
    return mean;
}

}  // namespace signmaml::bindings
