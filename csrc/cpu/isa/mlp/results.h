// What is done with the results of a product while they are in registers: each is a `Finish` of product.h.
#pragma once

#include <cstdint>

#include "cpu/isa/mlp/elementary.h"
#include "params/mlp_meta_step.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// Stores activations. Values below `floor` become `floor`; a NaN stays, as in torch.
template <typename Vector>
struct Activate {
    Vector* out;  // [rows, columns]
    std::int64_t columns;
    Vector floor;

    struct Own {
        Vector* to;
        std::int64_t columns;
        Vector floor;

        void operator()(int c, Vector sum) { to[c] = sum < floor ? floor : sum; }
        void next_row() { to += columns; }
    };

    Own begin(std::int64_t row, std::int64_t column) const { return {out + row * columns + column, columns, floor}; }
    void end(const Own&) {}
};

// Stores the gradients of an activation's input. The results are those of its output.
template <typename Vector, Activation kActivation>
struct Deactivate {
    const Vector* values;  // [rows, columns]
    Vector* deltas;        // [rows, columns]
    std::int64_t columns;

    struct Own {
        const Vector* at;
        Vector* to;
        std::int64_t columns;

        void operator()(int c, Vector sum) {
            const Vector value = at[c], zero{};
            if constexpr (kActivation == Activation::kRelu) {
                to[c] = value <= zero ? zero : sum;
            } else {
                to[c] = sum * (1 - value * value);
            }
        }
        void next_row() {
            at += columns;
            to += columns;
        }
    };

    Own begin(std::int64_t row, std::int64_t column) const {
        const std::int64_t first = row * columns + column;
        return {values + first, deltas + first, columns};
    }
    void end(const Own&) {}
};

// As Deactivate for a tanh, and begins the deltas' derivatives with what its curvature gives: (1 - a^2)' = -2 a a'.
template <typename Vector>
struct DeactivateCurved {
    const Vector* values;    // [rows, columns]
    const Vector* tangents;  // [rows, columns] derivatives of the values
    Vector* deltas;          // [rows, columns]
    Vector* delta_tangents;  // [rows, columns]
    std::int64_t columns;

    struct Own {
        const Vector* at;
        const Vector* tangent;
        Vector* to;
        Vector* derived;
        std::int64_t columns;

        void operator()(int c, Vector sum) {
            const Vector value = at[c];
            to[c] = sum * (1 - value * value);
            derived[c] = -2 * value * tangent[c] * sum;
        }
        void next_row() {
            at += columns;
            tangent += columns;
            to += columns;
            derived += columns;
        }
    };

    Own begin(std::int64_t row, std::int64_t column) const {
        const std::int64_t first = row * columns + column;
        return {values + first, tangents + first, deltas + first, delta_tangents + first, columns};
    }
    void end(const Own&) {}
};

enum class Slope { kOne, kRelu, kTanh };

// Stores results times the slope of an activation, or adds them to what is there.
template <typename Vector, Slope kSlope, bool kAdds>
struct Derive {
    const Vector* values;  // [rows, columns] of the activation's output
    Vector* tangents;      // [rows, columns]
    std::int64_t columns;

    struct Own {
        const Vector* at;
        Vector* to;
        std::int64_t columns;

        void operator()(int c, Vector sum) {
            if constexpr (kSlope == Slope::kRelu) {
                const Vector zero{};
                sum = at[c] <= zero ? zero : sum;
            } else if constexpr (kSlope == Slope::kTanh) {
                sum = sum * (1 - at[c] * at[c]);
            }
            to[c] = kAdds ? to[c] + sum : sum;
        }
        void next_row() {
            at += columns;
            to += columns;
        }
    };

    Own begin(std::int64_t row, std::int64_t column) const {
        const std::int64_t first = row * columns + column;
        return {values + first, tangents + first, columns};
    }
    void end(const Own&) {}
};

enum class Purpose { kSignStep, kPlainStep, kGradient, kCorrection };

// What a step by a gradient needs beside the gradient: the rate of the tensor alone; that and a place for the
// direction; or, beside such a place, a rate for each element.
enum class Rates { kTensor, kTensorKept, kElementKept };

// The rates of a step and where its directions go.
template <typename S>
struct StepRates {
    const typename S::Scalar* of;  // one for the tensor, or [rows, columns]
    typename S::Vector* kept;      // [rows, columns]; null for kTensor
    bool adds;                     // to what is kept
};

// Moves parameters by their gradients, or stores the gradients in their place, or, for kCorrection, subtracts the
// results from gradients that are there.
template <typename S, Purpose kPurpose, Rates kRates = Rates::kTensor>
struct Move {
    using V = typename S::Vector;
    using M = typename S::Mask;
    using Scalar = typename S::Scalar;
    static constexpr bool kSteps = kPurpose == Purpose::kSignStep || kPurpose == Purpose::kPlainStep;
    static constexpr bool kByElement = kSteps && kRates == Rates::kElementKept;
    static constexpr bool kKeeps = kSteps && kRates != Rates::kTensor;

    V* parameters;  // [rows, columns]
    std::int64_t columns;
    StepRates<S> rates;
    V lr;   // of the tensor
    M top;  // the largest magnitude seen, as bits: infinities and NaNs are the largest

    struct Own {
        V* to;
        std::int64_t columns;
        const Scalar* of_element;
        V* kept;
        bool adds;
        V lr;
        M top;

        void operator()(int c, V gradient) {
            if constexpr (kPurpose == Purpose::kCorrection) gradient = to[c] - gradient;
            const M magnitude = reinterpret_cast<M>(gradient) & Bits<Scalar>::kMagnitude;
            top = magnitude > top ? magnitude : top;
            if constexpr (kSteps) {
                const V direction = kPurpose == Purpose::kSignStep ? sign_of<S>(gradient) : gradient;
                if constexpr (kKeeps) kept[c] = adds ? kept[c] + direction : direction;
                to[c] -= (kByElement ? S::all(of_element[c]) : lr) * direction;
            } else {
                to[c] = gradient;
            }
        }
        void next_row() {
            to += columns;
            if constexpr (kByElement) of_element += columns;
            if constexpr (kKeeps) kept += columns;
        }
    };

    Own begin(std::int64_t row, std::int64_t column) const {
        const std::int64_t first = row * columns + column;
        return {parameters + first,
                columns,
                kByElement ? rates.of + first : nullptr,
                kKeeps ? rates.kept + first : nullptr,
                rates.adds,
                lr,
                top};
    }
    void end(const Own& own) { top = own.top; }
};

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
