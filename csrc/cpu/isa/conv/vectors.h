// Whole vectors of numbers: the classifier's products and the plain gradient step. They are here and not in spans.cpp
// because this translation unit contracts into fused multiply-adds.
#pragma once

#include <cstdint>

#include "cpu/isa/simd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

template <typename Scalar>
Scalar dot(const Scalar* a, const Scalar* b, std::int64_t n) {
    constexpr int kL = kLanes<Scalar>;
    Vector<Scalar> sums[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * kL <= n; i += 4 * kL) {
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) sums[s] += load_loose(a + i + s * kL) * load_loose(b + i + s * kL);
    }
    for (; i + kL <= n; i += kL) sums[0] += load_loose(a + i) * load_loose(b + i);
    Scalar sum = sum_of_lanes<Scalar>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

template <typename Scalar>
void add_scaled(Scalar* __restrict y, Scalar factor, const Scalar* __restrict x, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

template <typename Scalar>
bool gradient_step(Scalar* __restrict params, const Scalar* __restrict grads, Scalar lr, std::int64_t n) {
    bool nonfinite = false;
    for (std::int64_t i = 0; i < n; ++i) {
        params[i] -= lr * grads[i];
        nonfinite |= !(grads[i] - grads[i] == 0);
    }
    return nonfinite;
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
