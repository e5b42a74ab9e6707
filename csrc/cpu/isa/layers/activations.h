// Activations of vectors, and what they pass of a gradient.
#pragma once

#include <cstdint>

#include "cpu/isa/mlp/elementary.h"
#include "cpu/isa/simd.h"
#include "params/layers.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// exp(x) - 1, without cancellation near 0.
template <typename Scalar>
Vector<Scalar> expm1_of(Vector<Scalar> x) {
    using S = Simd<Scalar>;
    if constexpr (sizeof(Scalar) == sizeof(float)) {
        Vector<Scalar> near = x * (1.0f / 5040) + 1.0f / 720;
        near = near * x + 1.0f / 120;
        near = near * x + 1.0f / 24;
        near = near * x + 1.0f / 6;
        near = near * x + 0.5f;
        near = near * (x * x) + x;
        const Vector<Scalar> far = exp_float<S>(x) - 1.0f;
        return (x < 0.25f) & (x > -0.25f) ? near : far;
    } else {
        return lane_by_lane<S>(x, [](double value) { return __builtin_expm1(value); });
    }
}

// The error function to 3e-8: x times a polynomial in x^2 up to 1, beyond it 1 - exp(-x^2) times a polynomial in
// 1 / (1 + x / 2). Both are Chebyshev fits.
template <typename Scalar>
Vector<Scalar> erf_of(Vector<Scalar> x) {
    if constexpr (sizeof(Scalar) == sizeof(float)) {
        constexpr float kNear[] = {7.8824971096e-05f, -8.0188549925e-04f, 5.1893119426e-03f, -2.6854328796e-02f,
                                   1.1283597463e-01f, -3.7612626904e-01f, 1.1283791659e+00f};
        constexpr float kFar[] = {6.7482056400e-02f, -1.4173610166e-01f, -3.4414562302e-02f,
                                  1.5061112674e-01f, 1.3720353649e-01f,  2.5889487776e-01f,
                                  2.7997509884e-01f, 2.8229512551e-01f,  -7.8995051165e-06f};
        const Vector<Scalar> square = x * x, magnitude = x < 0 ? -x : x;
        const Vector<Scalar> t = 1.0f / (1.0f + 0.5f * magnitude);
        Vector<Scalar> near = all(kNear[0]), far = all(kFar[0]);
#pragma GCC unroll 8
        for (int i = 1; i < 7; ++i) near = near * square + kNear[i];
#pragma GCC unroll 8
        for (int i = 1; i < 9; ++i) far = far * t + kFar[i];
        const Vector<Scalar> beyond = 1.0f - far * exp_float<Simd<Scalar>>(-square);
        return magnitude <= 1.0f ? x * near : (x < 0 ? -beyond : beyond);
    } else {
        return lane_by_lane<Simd<Scalar>>(x, [](double value) { return __builtin_erf(value); });
    }
}

template <typename Scalar>
Vector<Scalar> sigmoid_of(Vector<Scalar> x) {
    return Scalar(1) / (Scalar(1) + exp_of<Simd<Scalar>>(-x));
}

inline constexpr double kRootHalf = 0.70710678118654752440;
inline constexpr double kRootTwoOverPi = 0.79788456080286535588;
inline constexpr double kGeluCubic = 0.044715;

// The share of x that GELU passes: Phi(x), or its approximation by tanh.
template <LayersActivation kKind, typename Scalar>
Vector<Scalar> gelu_share(Vector<Scalar> x) {
    if constexpr (kKind == LayersActivation::kGelu) {
        return Scalar(0.5) + Scalar(0.5) * erf_of<Scalar>(x * Scalar(kRootHalf));
    } else {
        const Vector<Scalar> inner = Scalar(kRootTwoOverPi) * (x + Scalar(kGeluCubic) * x * x * x);
        return Scalar(0.5) + Scalar(0.5) * tanh_of<Simd<Scalar>>(inner);
    }
}

// The derivative of what that tanh is taken of.
template <typename Scalar>
Vector<Scalar> gelu_inner_rise(Vector<Scalar> x) {
    return Scalar(kRootTwoOverPi) * (Scalar(1) + Scalar(3 * kGeluCubic) * x * x);
}

template <LayersActivation kKind, typename Scalar>
[[gnu::always_inline]] inline Vector<Scalar> activated(Vector<Scalar> x, [[maybe_unused]] Scalar slope) {
    if constexpr (kKind == LayersActivation::kNone) {
        return x;
    } else if constexpr (kKind == LayersActivation::kRelu) {
        return relu<Scalar>(x);
    } else if constexpr (kKind == LayersActivation::kLeakyRelu) {
        return x > 0 ? x : slope * x;
    } else if constexpr (kKind == LayersActivation::kElu) {
        return x > 0 ? x : slope * expm1_of<Scalar>(x);
    } else if constexpr (kKind == LayersActivation::kSilu) {
        return x * sigmoid_of<Scalar>(x);
    } else if constexpr (kKind == LayersActivation::kTanh) {
        return tanh_of<Simd<Scalar>>(x);
    } else if constexpr (kKind == LayersActivation::kSigmoid) {
        return sigmoid_of<Scalar>(x);
    } else {
        return x * gelu_share<kKind, Scalar>(x);
    }
}

// The gradient of the activation's input x, from that of its output.
template <LayersActivation kKind, typename Scalar>
[[gnu::always_inline]] inline Vector<Scalar> passed(Vector<Scalar> x, Vector<Scalar> grad,
                                                    [[maybe_unused]] Scalar slope) {
    if constexpr (kKind == LayersActivation::kNone) {
        return grad;
    } else if constexpr (kKind == LayersActivation::kRelu) {
        return passed_by_relu<Scalar>(x, grad);
    } else if constexpr (kKind == LayersActivation::kLeakyRelu) {
        return x > 0 ? grad : slope * grad;
    } else if constexpr (kKind == LayersActivation::kElu) {
        return x > 0 ? grad : grad * slope * exp_of<Simd<Scalar>>(x);
    } else if constexpr (kKind == LayersActivation::kSilu) {
        const Vector<Scalar> share = sigmoid_of<Scalar>(x);
        return grad * share * (Scalar(1) + x * (Scalar(1) - share));
    } else if constexpr (kKind == LayersActivation::kTanh) {
        const Vector<Scalar> y = tanh_of<Simd<Scalar>>(x);
        return grad * (Scalar(1) - y * y);
    } else if constexpr (kKind == LayersActivation::kSigmoid) {
        const Vector<Scalar> y = sigmoid_of<Scalar>(x);
        return grad * y * (Scalar(1) - y);
    } else if constexpr (kKind == LayersActivation::kGelu) {
        const Vector<Scalar> density = Scalar(0.5 * kRootTwoOverPi) * exp_of<Simd<Scalar>>(Scalar(-0.5) * x * x);
        return grad * (gelu_share<kKind, Scalar>(x) + x * density);
    } else {
        const Vector<Scalar> share = gelu_share<kKind, Scalar>(x);
        const Vector<Scalar> inner = gelu_inner_rise<Scalar>(x);
        return grad * (share + Scalar(2) * x * share * (Scalar(1) - share) * inner);
    }
}

// Whether the second derivative is other than 0 anywhere.
template <LayersActivation kKind>
constexpr bool kBends =
    kKind != LayersActivation::kNone && kKind != LayersActivation::kRelu && kKind != LayersActivation::kLeakyRelu;

// The second derivative at x, of an activation that bends.
template <LayersActivation kKind, typename Scalar>
[[gnu::always_inline]] inline Vector<Scalar> bend_at(Vector<Scalar> x, [[maybe_unused]] Scalar slope) {
    if constexpr (kKind == LayersActivation::kElu) {
        return x > 0 ? Vector<Scalar>{} : slope * exp_of<Simd<Scalar>>(x);
    } else if constexpr (kKind == LayersActivation::kSilu) {
        const Vector<Scalar> share = sigmoid_of<Scalar>(x);
        return share * (Scalar(1) - share) * (Scalar(2) + x * (Scalar(1) - Scalar(2) * share));
    } else if constexpr (kKind == LayersActivation::kTanh) {
        const Vector<Scalar> y = tanh_of<Simd<Scalar>>(x);
        return Scalar(-2) * y * (Scalar(1) - y * y);
    } else if constexpr (kKind == LayersActivation::kSigmoid) {
        const Vector<Scalar> y = sigmoid_of<Scalar>(x);
        return y * (Scalar(1) - y) * (Scalar(1) - Scalar(2) * y);
    } else if constexpr (kKind == LayersActivation::kGelu) {
        const Vector<Scalar> density = Scalar(0.5 * kRootTwoOverPi) * exp_of<Simd<Scalar>>(Scalar(-0.5) * x * x);
        return density * (Scalar(2) - x * x);
    } else {
        const Vector<Scalar> share = gelu_share<kKind, Scalar>(x), rest = Scalar(1) - share;
        const Vector<Scalar> inner = gelu_inner_rise<Scalar>(x);
        const Vector<Scalar> rises = Scalar(2) * share * rest * inner;
        const Vector<Scalar> bends =
            Scalar(2) * rises * (rest - share) * inner + Scalar(12 * kRootTwoOverPi * kGeluCubic) * share * rest * x;
        return Scalar(2) * rises + x * bends;
    }
}

// Calls `body` with the kind as a type, so that its loops are compiled for each.
template <LayersActivation kKind>
struct OfKind {
    static constexpr LayersActivation kind = kKind;
};

template <typename Body>
void with_activation(LayersActivation kind, const Body& body) {
    switch (kind) {
        case LayersActivation::kNone: return body(OfKind<LayersActivation::kNone>{});
        case LayersActivation::kRelu: return body(OfKind<LayersActivation::kRelu>{});
        case LayersActivation::kLeakyRelu: return body(OfKind<LayersActivation::kLeakyRelu>{});
        case LayersActivation::kElu: return body(OfKind<LayersActivation::kElu>{});
        case LayersActivation::kGelu: return body(OfKind<LayersActivation::kGelu>{});
        case LayersActivation::kGeluTanh: return body(OfKind<LayersActivation::kGeluTanh>{});
        case LayersActivation::kSilu: return body(OfKind<LayersActivation::kSilu>{});
        case LayersActivation::kTanh: return body(OfKind<LayersActivation::kTanh>{});
        case LayersActivation::kSigmoid: return body(OfKind<LayersActivation::kSigmoid>{});
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
