// Block 0 forward. Its statistics are known before, so nothing but its output is stored.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/direct.h"
#include "cpu/isa/conv/patches.h"
#include "cpu/isa/conv/task_rows.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// mean, variance [channels] of block 0: W times the patches' mean, and W covariance W^T.
template <typename Scalar>
void moments_of_patches(const ConvTask<Scalar>& t, double* mean, double* variance) {
    const ConvBlockPlan& b = t.block(0);
    const double* patch_mean = t.patch_mean();
    const std::int64_t channels = t.layout->channels, patch = 9 * b.inputs, group = b.vectors * kLanes<Scalar>;
    for (std::int64_t first = 0; first < channels; first += group) {
        const Scalar* weight = t.at(b.weight) + first * patch;
        for (std::int64_t i = 0; i < patch; ++i) {
            double product[kConvFilters];
            times_covariance(t, i, weight, group, product);
            for (std::int64_t c = 0; c < group; ++c) {
                mean[first + c] += patch_mean[i] * weight[i * group + c];
                variance[first + c] += product[c] * weight[i * group + c];
            }
        }
    }
    // Rounding may leave a constant channel a hair below 0.
    for (std::int64_t c = 0; c < channels; ++c) variance[c] = variance[c] < 0 ? 0 : variance[c];
}

// to <- a group's weights of block 0, three rows of a window; where the block pools, four rows for F(2, 3) over pairs
// of rows. of(i): the vector of weights from scalar i on.
template <typename Scalar, typename Of>
void transform_first_group(Scalar* to, std::int64_t row, int stride, const Of& of) {
    const Vector<Scalar> half = all(Scalar(0.5));
    for (std::int64_t i = 0; i < row; i += kLanes<Scalar>) {
        const Vector<Scalar> g0 = of(i), g1 = of(row + i), g2 = of(2 * row + i);
        if (stride == 1) {
            store(to + i, g0);
            store(to + row + i, half * (g0 + g2 + g1));
            store(to + 2 * row + i, half * (g0 + g2 - g1));
            store(to + 3 * row + i, -g2);
        } else {
            store(to + i, g0);
            store(to + row + i, g1);
            store(to + 2 * row + i, g2);
        }
    }
}

// first_weight <- weight times BatchNorm's scale, transformed where the block pools
template <typename Scalar>
void transform_first(const ConvTask<Scalar>& t) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t group = b.vectors * kLanes<Scalar>, row = 3 * std::int64_t{b.inputs} * group;
    for (std::int64_t first = 0; first < t.layout->channels; first += group) {
        const Scalar* weight = t.at(b.weight) + first * 9 * b.inputs;
        Scalar* to = t.at(t.layout->first_weight) + first * (b.stride == 1 ? 12 : 9) * b.inputs;
        transform_first_group(to, row, b.stride, [&](std::int64_t i) {
            return load(t.vector(0, kScale) + first + i % group) * load(weight + i);
        });
    }
}

// Pooling windows side by side. F(2, 3) makes two output rows from four combinations of the input rows under them: four
// products for two outputs instead of six. The outputs stay in registers until the largest of four is known. Where
// gamma is negative the scale in the weights is too, so the largest is always the one to take.
template <typename Scalar>
struct FirstWindows {
    const Scalar* inputs;  // [4, plane]
    std::int64_t plane;
    std::int64_t channels_in;
    const Scalar* weight;  // [4, 3 channels_in, group]
    const Scalar* shift;   // [group]
    Scalar* activation;
    std::uint8_t* choices;
    std::int64_t channels;  // from one window's output to the next
    // Of a tangent: the task's own activation. Its windows and its choices say what passes.
    const Scalar* passes;
};

// What a window gives, in the forward pass: the first of its four largest, after the shift and ReLU.
template <typename Scalar>
struct TakeLargest {
    static Vector<Scalar> of(const Vector<Scalar> (&window)[4], const FirstWindows<Scalar>& w, std::int64_t to,
                             Vector<Scalar> shift) {
        Vector<Scalar> best = window[0];
        Mask<Scalar> choice = {};
#pragma GCC unroll 3
        for (int i = 1; i < 4; ++i) {
            const Mask<Scalar> better = window[i] > best;
            best = better ? window[i] : best;
            choice = better ? Mask<Scalar>{} + i : choice;
        }
        store_choice<Scalar>(w.choices + to, choice);
        return relu<Scalar>(best + shift);
    }
};

// What a window of tangents gives: the one at the winner, where ReLU passes it.
template <typename Scalar>
struct TakeChosen {
    static Vector<Scalar> of(const Vector<Scalar> (&window)[4], const FirstWindows<Scalar>& w, std::int64_t to,
                             Vector<Scalar> shift) {
        const Mask<Scalar> choice = load_choice<Scalar>(w.choices + to);
        Vector<Scalar> chosen = window[0];
#pragma GCC unroll 3
        for (int i = 1; i < 4; ++i) chosen = choice == i ? window[i] : chosen;
        return passed_by_relu<Scalar>(load(w.passes + to), chosen + shift);
    }
};

// one, other += the products of planes one_plane and other_plane, for every position and kVectors vectors of channels
template <typename Scalar, int kVectors, int kPositions>
[[gnu::always_inline]] inline void add_products(Vector<Scalar> (&one)[kPositions][kVectors],
                                                Vector<Scalar> (&other)[kPositions][kVectors],
                                                const FirstWindows<Scalar>& w, int one_plane, int other_plane) {
    constexpr std::int64_t kGroup = kVectors * kLanes<Scalar>;
    const std::int64_t length = 3 * w.channels_in;
    const Scalar* x = w.inputs + one_plane * w.plane;
    const Scalar* other_x = w.inputs + other_plane * w.plane;
    const Scalar* weight = w.weight + one_plane * length * kGroup;
    const Scalar* other_weight = w.weight + other_plane * length * kGroup;
    for (std::int64_t k = 0; k < length; ++k) {
        add_value<Scalar, kVectors, kPositions>(one, x + k, w.channels_in, weight + k * kGroup);
        add_value<Scalar, kVectors, kPositions>(other, other_x + k, w.channels_in, other_weight + k * kGroup);
    }
}

template <typename Scalar, typename Take, int kVectors, int kWindows>
void first_windows(const FirstWindows<Scalar>& w) {
    constexpr int kPositions = 2 * kWindows, kL = kLanes<Scalar>;
    // Two planes give both rows their sum and their difference; the other two are added to one row each.
    Vector<Scalar> upper[kPositions][kVectors] = {}, lower[kPositions][kVectors] = {};
    add_products<Scalar, kVectors, kPositions>(upper, lower, w, 1, 2);
    join_middle<Scalar, kVectors, kPositions>(upper, lower);
    add_products<Scalar, kVectors, kPositions>(upper, lower, w, 0, 3);
#pragma GCC unroll 2
    for (int window = 0; window < kWindows; ++window) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const Vector<Scalar> values[] = {upper[2 * window][v], upper[2 * window + 1][v], lower[2 * window][v],
                                             lower[2 * window + 1][v]};
            const std::int64_t to = window * w.channels + v * kL;
            store(w.activation + to, Take::of(values, w, to, load(w.shift + v * kL)));
        }
    }
}

// first_windows for a row of windows.
template <typename Scalar, typename Take, int kVectors>
void first_windows(FirstWindows<Scalar> w, std::int64_t windows) {
    constexpr int kWindows = kRegisters == 32 && kVectors <= 2 ? 2 : 1;
    for (std::int64_t x = 0; x < windows; x += kWindows) {
        const bool whole = windows - x >= kWindows;
        (whole ? first_windows<Scalar, Take, kVectors, kWindows> : first_windows<Scalar, Take, kVectors, 1>)(w);
        w.inputs += kWindows * 2 * w.channels_in;
        w.activation += kWindows * w.channels;
        w.choices += kWindows * w.channels;
        w.passes += kWindows * w.channels;
    }
}

template <typename Scalar, typename Take>
void first_windows(const FirstWindows<Scalar>& w, std::int64_t windows, int vectors) {
    if constexpr (kMostVectors == 4) {
        if (vectors == 4) return first_windows<Scalar, Take, 4>(w, windows);
        if (vectors == 3) return first_windows<Scalar, Take, 3>(w, windows);
    }
    return vectors == 2 ? first_windows<Scalar, Take, 2>(w, windows) : first_windows<Scalar, Take, 1>(w, windows);
}

// Block 0 with max-pooling. `passes`: the task whose activation says what passes, for TakeChosen.
template <typename Scalar, typename Take>
void forward_first_pooled(const ConvTask<Scalar>& t, const ConvTask<Scalar>& passes, std::int64_t item,
                          Scalar* scratch) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, c = b.inputs;
    const std::int64_t row = (b.in_w + 2) * c, plane = pieces(row, kLanes<Scalar>) * kLanes<Scalar>;
    for (std::int64_t y = rows.first / 2; y < least((rows.first + rows.count) / 2, b.act_h); ++y) {
        const Scalar* x = input_row(t, 0, rows.example, 2 * y);
        for (std::int64_t i = 0; i < row; i += kLanes<Scalar>) {  // lanes beyond the row: nobody reads them
            const Vector<Scalar> d0 = load_loose(x + i), d1 = load_loose(x + row + i);
            const Vector<Scalar> d2 = load_loose(x + 2 * row + i), d3 = load_loose(x + 3 * row + i);
            store(scratch + i, d0 - d2);
            store(scratch + plane + i, d1 + d2);
            store(scratch + 2 * plane + i, d2 - d1);
            store(scratch + 3 * plane + i, d1 - d3);
        }
        for (std::int64_t first = 0; first < channels; first += group) {
            first_windows<Scalar, Take>({scratch, plane, c, t.at(t.layout->first_weight) + first * 12 * c,
                                         t.vector(0, kShift) + first, activation_row(t, 0, rows.example, y) + first,
                                         choices_of(t, 0, rows.example) + y * b.act_w * channels + first, channels,
                                         activation_row(passes, 0, rows.example, y) + first},
                                        b.act_w, b.vectors);
        }
    }
}

// finish(sum, place): the activation at `place` from the window's sum.
template <typename Scalar, typename Finish>
void forward_first_gray(const ConvTask<Scalar>& t, std::int64_t item, const Finish& finish) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, row = b.in_w + 2;
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        const Scalar* from = t.at(t.layout->first_weight) + c / group * group * 9 + c % group;
        const Vector<Scalar> shift = load(t.vector(0, kShift) + c);
        Vector<Scalar> weight[9];
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) weight[tap] = load(from + tap * group);
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            const Scalar* x = input_row(t, 0, rows.example, y);
            Scalar* to = activation_row(t, 0, rows.example, y) + c;
            for (std::int64_t i = 0; i < b.out_w; ++i, x += 2, to += channels) {
                Vector<Scalar> sum = {};
#pragma GCC unroll 9
                for (int tap = 0; tap < 9; ++tap) sum += all(x[tap / 3 * row + tap % 3]) * weight[tap];
                store(to, finish(sum + shift, to));
            }
        }
    }
}

template <typename Scalar>
void forward_first(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(0);
    if (b.stride == 1) return forward_first_pooled<Scalar, TakeLargest<Scalar>>(t, t, item, scratch);
    if (first_is_gray(t)) {
        return forward_first_gray(t, item, [](Vector<Scalar> sum, const Scalar*) { return relu<Scalar>(sum); });
    }
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t group = b.vectors * kLanes<Scalar>;
    const std::int64_t row_in = (b.in_w + 2) * std::int64_t{b.inputs};
    const Runs runs = window_runs(row_in, b.inputs, b.inputs, group);
    for (std::int64_t first = 0; first < t.layout->channels; first += group) {
        const Rectified<Scalar> to(one_row(t.layout->channels), t.vector(0, kShift) + first);
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            convolve_row(activation_row(t, 0, rows.example, y) + first, to, input_row(t, 0, rows.example, y),
                         b.stride * std::int64_t{b.inputs}, b.out_w, runs,
                         t.at(t.layout->first_weight) + first * 9 * b.inputs, b.vectors);
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
