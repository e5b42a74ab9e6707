// A linear layer's three products, on weights [outputs, features] as torch has them: vectors lie along the features.
#pragma once

#include <cstdint>

#include "cpu/isa/integers.h"
#include "cpu/isa/simd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// Examples, or outputs, of a tile.
constexpr int kLinearRows = 4;
constexpr int kLinearVectors = kRegisters == 32 ? 4 : 2;
// A longer sum is a sum of sums.
constexpr std::int64_t kLinearRun = 2048;

// The matrices: x [count, features], out [count, outputs], weight [outputs, features].
struct LinearSizes {
    std::int64_t count, features, outputs;
    std::int64_t x_row, out_row;
};

// out[i, o] += sum over f of x[i, f] weight[o, f], for kRows rows i and kOuts outputs o
template <typename Scalar, int kRows, int kOuts>
void linear_tile(Scalar* out, const Scalar* x, const Scalar* weight, const LinearSizes& s) {
    constexpr int kL = kLanes<Scalar>;
    Scalar total[kRows][kOuts] = {};
    for (std::int64_t first = 0; first < s.features; first += kLinearRun) {
        const std::int64_t last = least(first + kLinearRun, s.features);
        Vector<Scalar> sum[kRows][kOuts] = {};
        std::int64_t f = first;
        for (; f + kL <= last; f += kL) {
            Vector<Scalar> row[kOuts];
#pragma GCC unroll 4
            for (int o = 0; o < kOuts; ++o) row[o] = load_loose(weight + o * s.features + f);
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
                const Vector<Scalar> value = load_loose(x + i * s.x_row + f);
#pragma GCC unroll 4
                for (int o = 0; o < kOuts; ++o) sum[i][o] += value * row[o];
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
            for (int o = 0; o < kOuts; ++o) total[i][o] += sum_of_lanes<Scalar>(sum[i][o]);
        }
        for (; f < last; ++f) {
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
                for (int o = 0; o < kOuts; ++o) total[i][o] += x[i * s.x_row + f] * weight[o * s.features + f];
            }
        }
    }
    for (int i = 0; i < kRows; ++i) {
        for (int o = 0; o < kOuts; ++o) out[i * s.out_row + o] += total[i][o];
    }
}

// Rows of a weight of `length` scalars each that stay in L2 while all examples meet them.
template <typename Scalar>
std::int64_t rows_in_cache(std::int64_t length) {
    constexpr std::int64_t kBytes = 128 * 1024;
    const std::int64_t rows = kBytes / (length * static_cast<std::int64_t>(sizeof(Scalar)));
    return most(kLinearRows, rows / kLinearRows * kLinearRows);
}

template <typename Scalar>
void linear_forward(Scalar* out, const Scalar* x, const Scalar* weight, const LinearSizes& s) {
    const std::int64_t block = rows_in_cache<Scalar>(s.features);
    for (std::int64_t first = 0; first < s.outputs; first += block) {
        const std::int64_t last = least(first + block, s.outputs);
        std::int64_t i = 0;
        const auto rows = [&](auto tile, auto single, std::int64_t step) {
            for (; i + step <= s.count; i += step) {
                std::int64_t o = first;
                for (; o + kLinearRows <= last; o += kLinearRows) {
                    tile(out + i * s.out_row + o, x + i * s.x_row, weight + o * s.features, s);
                }
                for (; o < last; ++o) single(out + i * s.out_row + o, x + i * s.x_row, weight + o * s.features, s);
            }
        };
        rows(linear_tile<Scalar, kLinearRows, kLinearRows>, linear_tile<Scalar, kLinearRows, 1>, kLinearRows);
        rows(linear_tile<Scalar, 1, kLinearRows>, linear_tile<Scalar, 1, 1>, 1);
    }
}

// to[a, f] (+)= sum over b of factor[a, b] row[b, f], f in vectors: a product whose left matrix is read by scalars.
// factor(a, b) lies at a * a_step + b * b_step.
template <typename Scalar>
struct Outer {
    Scalar* to;
    std::int64_t to_row;
    const Scalar* factor;
    std::int64_t a_step, b_step;
    const Scalar* row;
    std::int64_t row_step;
    std::int64_t as, bs, features;
    bool add;
};

template <typename Scalar, int kRows, int kVectors>
void outer_rows(const Outer<Scalar>& p, std::int64_t a, std::int64_t f) {
    constexpr int kL = kLanes<Scalar>;
    Vector<Scalar> sum[kRows][kVectors] = {};
    const Scalar* factor = p.factor + a * p.a_step;
    const Scalar* row = p.row + f;
    for (std::int64_t b = 0; b < p.bs; ++b, factor += p.b_step, row += p.row_step) {
        Vector<Scalar> values[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) values[v] = load_loose(row + v * kL);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            const Vector<Scalar> by = all(factor[i * p.a_step]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[i][v] += by * values[v];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            Scalar* at = p.to + (a + i) * p.to_row + f + v * kL;
            store_loose(at, p.add ? load_loose(at) + sum[i][v] : sum[i][v]);
        }
    }
}

template <typename Scalar, int kRows>
void outer_rows(const Outer<Scalar>& p, std::int64_t a) {
    constexpr int kL = kLanes<Scalar>;
    std::int64_t f = 0;
    for (; f + kLinearVectors * kL <= p.features; f += kLinearVectors * kL) {
        outer_rows<Scalar, kRows, kLinearVectors>(p, a, f);
    }
    for (; f + kL <= p.features; f += kL) outer_rows<Scalar, kRows, 1>(p, a, f);
    for (; f < p.features; ++f) {
        for (int i = 0; i < kRows; ++i) {
            Scalar sum = 0;
            for (std::int64_t b = 0; b < p.bs; ++b) {
                sum += p.factor[(a + i) * p.a_step + b * p.b_step] * p.row[b * p.row_step + f];
            }
            Scalar* at = p.to + (a + i) * p.to_row + f;
            *at = p.add ? *at + sum : sum;
        }
    }
}

template <typename Scalar>
void outer(const Outer<Scalar>& p) {
    const std::int64_t block = rows_in_cache<Scalar>(p.features);
    Outer<Scalar> part = p;
    for (std::int64_t first = 0; first < p.bs; first += block) {
        part.factor = p.factor + first * p.b_step;
        part.row = p.row + first * p.row_step;
        part.bs = least(block, p.bs - first);
        part.add = p.add || first > 0;
        std::int64_t a = 0;
        for (; a + kLinearRows <= p.as; a += kLinearRows) outer_rows<Scalar, kLinearRows>(part, a);
        for (; a < p.as; ++a) outer_rows<Scalar, 1>(part, a);
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
