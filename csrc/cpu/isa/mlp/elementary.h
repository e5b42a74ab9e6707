// Elementary functions of vectors.
#pragma once

#include <cstdint>

#include "cpu/isa/simd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

template <typename S, typename Function>
typename S::Vector lane_by_lane(typename S::Vector x, Function function) {
    for (int lane = 0; lane < S::kLanes; ++lane) x[lane] = function(x[lane]);
    return x;
}

// exp(x) for x up to 88, to 1 ulp: x = n ln 2 + r, a polynomial in r, 2^n in two factors for subnormal results.
template <typename S>
typename S::Vector exp_float(typename S::Vector x) {
    using V = typename S::Vector;
    using M = typename S::Mask;
    const V lowest = S::all(-104.0f), highest = S::all(88.0f);
    x = x < lowest ? lowest : x;  // a NaN stays
    x = x > highest ? highest : x;
    const V magic = S::all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (x * 1.44269504088896341f + magic) - magic;
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const M whole = __builtin_convertvector(n == n ? n : V{}, M);
    const M half = whole >> 1;
    const M first = (half + 127) << 23, second = (whole - half + 127) << 23;
    return y * reinterpret_cast<V>(first) * reinterpret_cast<V>(second);
}

template <typename S>
typename S::Vector exp_of(typename S::Vector x) {
    if constexpr (sizeof(typename S::Scalar) == sizeof(float)) {
        return exp_float<S>(x);
    } else {
        return lane_by_lane<S>(x, [](double value) { return __builtin_exp(value); });
    }
}

template <typename S>
typename S::Vector log_of(typename S::Vector x) {
    if constexpr (sizeof(typename S::Scalar) == sizeof(float)) {
        return lane_by_lane<S>(x, [](float value) { return __builtin_logf(value); });
    } else {
        return lane_by_lane<S>(x, [](double value) { return __builtin_log(value); });
    }
}

// To 2 ulp: a polynomial near 0, 1 - 2 / (exp(2 |x|) + 1) elsewhere.
template <typename S>
typename S::Vector tanh_float(typename S::Vector x) {
    using V = typename S::Vector;
    using M = typename S::Mask;
    const M bits = reinterpret_cast<M>(x);
    const M magnitude_bits = bits & 0x7fffffff;
    const V magnitude = reinterpret_cast<V>(magnitude_bits);
    const V big = 1.0f - 2.0f / (exp_float<S>(magnitude + magnitude) + 1.0f);
    const M signed_bits = reinterpret_cast<M>(big) | (bits & ~0x7fffffff);
    const V z = x * x;
    V small = z * -5.70498872745e-3f + 2.06390887954e-2f;
    small = small * z - 5.37397155531e-2f;
    small = small * z + 1.33314422036e-1f;
    small = small * z - 3.33332819422e-1f;
    small = small * z * x + x;
    return magnitude < 0.625f ? small : reinterpret_cast<V>(signed_bits);
}

template <typename S>
typename S::Vector tanh_of(typename S::Vector x) {
    if constexpr (sizeof(typename S::Scalar) == sizeof(float)) {
        return tanh_float<S>(x);
    } else {
        return lane_by_lane<S>(x, [](double value) { return __builtin_tanh(value); });
    }
}

// Three-valued; sign(+-0) is 0 and sign(nan) is nan.
template <typename S>
inline typename S::Vector sign_of(typename S::Vector x) {
    using V = typename S::Vector;
    using M = typename S::Mask;
    using Scalar = typename S::Scalar;
    using Width = Bits<Scalar>;
#if defined(__AVX512F__)
    // One instruction has an answer for each kind of number. Four bits a kind, from NaN (as it is) over signalling NaN,
    // 0 (8: +0), 1 (a: +1), -inf (9: -1) and +inf to negative and positive numbers. Comparisons would take the ports of
    // the multiply-adds.
    if constexpr (sizeof(V) == 64) {
        typedef long long Table __attribute__((vector_size(64)));
        constexpr int kAsIs = 4;  // rounding
        if constexpr (sizeof(Scalar) == sizeof(float)) {
            const M answers = static_cast<typename S::Int>(0xa9a9a811u) - M{};
            return __builtin_ia32_fixupimmps512_mask(x, x, answers, 0, 0xffff, kAsIs);
        } else {
            return __builtin_ia32_fixupimmpd512_mask(x, x, 0xa9a9a811 - Table{}, 0, 0xff, kAsIs);
        }
    }
#endif
    const V one = S::all(1);
    const M signed_one = (reinterpret_cast<M>(x) & ~Width::kMagnitude) | reinterpret_cast<M>(one);
    const V of_number = x == Scalar(0) ? V{} : reinterpret_cast<V>(signed_one);
    return x == x ? of_number : x;
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
