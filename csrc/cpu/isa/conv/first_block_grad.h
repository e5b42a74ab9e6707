// Block 0 backward: the gradients of its weights, gamma and beta.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/patches.h"
#include "cpu/isa/conv/register_tiles.h"
#include "cpu/isa/conv/task_rows.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// The stage grad_sums of block 0. ReLU's output is enough for it: gamma's gradient comes from that of the weights,
// see finish_first.
template <typename Scalar>
void grad_sums_first(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    if (first_is_gray(t)) return;  // first_weight_grad has it on its way
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = rows_of(item, b.half_items, b.act_rows, b.act_h);
    const std::int64_t channels = t.layout->channels;
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        Vector<Scalar> sum = {};
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            const Scalar* activation = activation_row(t, 0, rows.example, y) + c;
            Scalar* grad = activation_grad_row(t, 0, rows.example, y, scratch) + c;
            for (std::int64_t x = 0; x < b.act_w; ++x, activation += channels, grad += channels) {
                const Vector<Scalar> passed = passed_by_relu<Scalar>(load(activation), load(grad));
                store(grad, passed);
                sum += passed;
            }
        }
        store(t.partial(item).grad_sums() + c, sum);
    }
}

// to [rows, out_w, channels] <- block 0's activation gradient at the winners, 0 elsewhere. Rows come in pairs.
template <typename Scalar>
void scatter_to_winners(const ConvTask<Scalar>& t, const Rows& rows, const Scalar* activation_grad, Scalar* to) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t channels = t.layout->channels, row = b.out_w * channels;
    const std::uint8_t* choices = choices_of(t, 0, rows.example);
    for (std::int64_t y = 0; y < rows.count; ++y) {  // pooling drops an odd last row and column
        const bool counts = (rows.first + y) / 2 < b.act_h;
        Scalar* dropped = to + y * row + (counts ? 2 * b.act_w * channels : 0);
        for (; dropped < to + (y + 1) * row; dropped += kLanes<Scalar>) store(dropped, Vector<Scalar>{});
    }
    for (std::int64_t y = 0; y < rows.count && (rows.first + y) / 2 < b.act_h; y += 2) {
        const std::int64_t half = (rows.first + y) / 2 * b.act_w * channels;
        for (std::int64_t x = 0; x < b.act_w; ++x) {
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                const Vector<Scalar> grad = load(activation_grad + half + x * channels + c);
                const Mask<Scalar> choice = load_choice<Scalar>(choices + half + x * channels + c);
                Scalar* corner = to + y * row + 2 * x * channels + c;
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    store(corner + i / 2 * row + i % 2 * channels, choice == i ? grad : Vector<Scalar>{});
                }
            }
        }
    }
}

// Whether one vector holds the 4 x 4 inputs under a pooling window's four patches. Then every channel can pick its
// winner's patch with a permutation.
template <typename Scalar>
constexpr bool kPicksPatches = kLanes<Scalar> == 16;

// to [positions, inputs, 4 x 4] <- the inputs under rows [first, last) of pooling windows
template <typename Scalar>
void copy_windows(const ConvTask<Scalar>& t, std::int64_t example, std::int64_t first, std::int64_t last, Scalar* to) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t c = b.inputs, row = (b.in_w + 2) * c;
    Mask<Scalar> lane{};
    for (int k = 0; k < kLanes<Scalar>; ++k) lane[k] = k;
    for (std::int64_t y = first; y < last; ++y) {
        const Scalar* x = input_row(t, 0, example, 2 * y);
        for (std::int64_t i = 0; i < b.act_w; ++i, x += 2 * c) {
            // Four positions of a row count, 4 c values; the lanes beyond are never picked.
            const Vector<Scalar> x0 = load_loose(x), x1 = load_loose(x + row);
            const Vector<Scalar> x2 = load_loose(x + 2 * row), x3 = load_loose(x + 3 * row);
            for (std::int64_t input = 0; input < c; ++input, to += kLanes<Scalar>) {
                const Mask<Scalar> from = lane % 4 * static_cast<int>(c) + static_cast<int>(input);
                const Vector<Scalar> upper = lane < 4 ? picked<Scalar>(x0, from) : picked<Scalar>(x1, from);
                const Vector<Scalar> lower = lane < 12 ? picked<Scalar>(x2, from) : picked<Scalar>(x3, from);
                store(to, lane < 8 ? upper : lower);
            }
        }
    }
}

// out [3, inputs, group] <- for the three taps of one window row: sums over windows of the winner's input times the
// gradient
template <typename Scalar, int kInputs>
void pick_row(Scalar* out, std::int64_t group, const Scalar* windows, const Mask<Scalar>* corners, int first_tap,
              const Scalar* grads, std::int64_t channels, std::int64_t positions) {
    Vector<Scalar> sum[3][kInputs] = {};
    for (std::int64_t i = 0; i < positions; ++i, windows += kInputs * kLanes<Scalar>, grads += channels) {
        const Vector<Scalar> grad = load(grads);
        const Mask<Scalar> corner = corners[i] + first_tap;
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap) {
#pragma GCC unroll 3
            for (int input = 0; input < kInputs; ++input) {
                sum[tap][input] += picked<Scalar>(load(windows + input * kLanes<Scalar>), corner + tap) * grad;
            }
        }
    }
#pragma GCC unroll 3
    for (int tap = 0; tap < 3; ++tap) {
#pragma GCC unroll 3
        for (int input = 0; input < kInputs; ++input) store(out + (tap * kInputs + input) * group, sum[tap][input]);
    }
}

// patch_grads <- sums over pooling windows of their winners' patches times the gradient
template <typename Scalar>
void first_weight_grad_by_picking(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, inputs = b.inputs;
    const std::int64_t top = rows.first / 2, bottom = most(top, least(top + (rows.count + 1) / 2, b.act_h));
    copy_windows(t, rows.example, top, bottom, scratch);
    const std::int64_t positions = (bottom - top) * b.act_w, first_position = top * b.act_w * channels;
    const std::uint8_t* choices = choices_of(t, 0, rows.example) + first_position;
    const Scalar* grads = activation_grad_row(t, 0, rows.example, top, scratch);
    auto* corners = reinterpret_cast<Mask<Scalar>*>(scratch + positions * inputs * kLanes<Scalar>);
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        for (std::int64_t i = 0; i < positions; ++i) {  // where in its window a winner's patch starts
            const Mask<Scalar> choice = load_choice<Scalar>(choices + i * channels + c);
            corners[i] = choice + (choice & 2);
        }
        Scalar* out = t.partial(item).patch_grads() + c / group * group * 9 * inputs + c % group;
        const auto pick = inputs == 3 ? pick_row<Scalar, 3> : inputs == 2 ? pick_row<Scalar, 2> : pick_row<Scalar, 1>;
        for (int dy = 0; dy < 3; ++dy) {
            pick(out + dy * 3 * inputs * group, group, scratch, corners, 4 * dy, grads + c, channels, positions);
        }
    }
}

// first_weight_grad for gray images with stride 2. It also writes grad_sums, which the stage grad_sums does
// for other images.
template <typename Scalar>
void first_weight_grad_gray(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, row = b.in_w + 2;
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        Vector<Scalar> sum = {}, products[9] = {};
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            const Scalar* x = input_row(t, 0, rows.example, y);
            const Scalar* activation = activation_row(t, 0, rows.example, y) + c;
            const Scalar* grad = activation_grad_row(t, 0, rows.example, y, scratch) + c;
            for (std::int64_t i = 0; i < b.out_w; ++i, x += 2, activation += channels, grad += channels) {
                const Vector<Scalar> passed = passed_by_relu<Scalar>(load(activation), load(grad));
                sum += passed;
#pragma GCC unroll 9
                for (int tap = 0; tap < 9; ++tap) products[tap] += all(x[tap / 3 * row + tap % 3]) * passed;
            }
        }
        store(t.partial(item).grad_sums() + c, sum);
        Scalar* to = t.partial(item).patch_grads() + c / group * group * 9 + c % group;
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) store(to + tap * group, products[tap]);
    }
}

template <typename Scalar>
void first_weight_grad(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    if (first_is_gray(t)) return first_weight_grad_gray(t, item, scratch);
    const ConvBlockPlan& b = t.block(0);
    if constexpr (kPicksPatches<Scalar>) {
        if (b.stride == 1) return first_weight_grad_by_picking(t, item, scratch);
    }
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>;
    const Scalar* grads = scratch;
    if (b.stride == 1) {
        scatter_to_winners(t, rows, activation_grad_row(t, 0, rows.example, 0, scratch), scratch);
    } else {
        grads = activation_grad_row(t, 0, rows.example, rows.first, scratch);
    }
    const std::int64_t in_row = (b.in_w + 2) * std::int64_t{b.input_lanes};
    OuterProducts<Scalar> products;
    products.x_step = b.stride * std::int64_t{b.input_lanes};
    products.x_row = b.stride * in_row;
    products.grad_step = channels;
    products.grad_row = b.out_w * channels;
    products.rows = rows.count;
    products.positions = b.out_w;
    for (std::int64_t first = 0; first < channels; first += group) {
        products.grad = grads + first;
        for (std::int64_t dy = 0; dy < 3; ++dy) {
            for (std::int64_t j = 0; j < 3 * b.inputs;) {
                const std::int64_t count = least(most_rows(b.vectors), 3 * b.inputs - j);
                products.x = input_row(t, 0, rows.example, rows.first) + dy * in_row + j;
                outer_tile_of<Scalar>(b.vectors, count)(
                    t.partial(item).patch_grads() + first * 9 * b.inputs + (dy * 3 * b.inputs + j) * group, products,
                    false);
                j += count;
            }
        }
    }
}

// Let P be the sum of patches at the winners, less d beta times the patches' mean. Then
//     d gamma = inverse * (sum over a patch of W P),  dW = scale * (P - inverse * d gamma * covariance W).
template <typename Scalar>
void finish_first(const ConvTask<Scalar>& t) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, patch = 9 * b.inputs;
    const double* patch_mean = t.patch_mean();
    double beta[kConvFilters] = {};
    for (std::int64_t item = 0; item < t.examples * b.half_items; ++item) {
        for (std::int64_t c = 0; c < channels; ++c) beta[c] += t.partial(item).grad_sums()[c];
    }
    for (std::int64_t first = 0; first < channels; first += group) {
        const Scalar* weight = t.at(b.weight) + first * patch;
        double centred[kConvLargestPatch][kConvFilters] = {}, gamma[kConvFilters] = {};
        for (std::int64_t i = 0; i < patch; ++i) {
            for (std::int64_t item = 0; item < t.examples * b.items; ++item) {
                const Scalar* grads = t.partial(item).patch_grads() + first * patch + i * group;
                for (std::int64_t c = 0; c < group; ++c) centred[i][c] += grads[c];
            }
            for (std::int64_t c = 0; c < group; ++c) {
                centred[i][c] -= beta[first + c] * patch_mean[i];
                gamma[c] += centred[i][c] * weight[i * group + c];
            }
        }
        for (std::int64_t c = 0; c < group; ++c) {
            gamma[c] *= t.vector(0, kInverse)[first + c];
            t.vector(0, kBetaGrad)[first + c] = static_cast<Scalar>(beta[first + c]);
            t.vector(0, kGammaGrad)[first + c] = static_cast<Scalar>(gamma[c]);
        }
        for (std::int64_t i = 0; i < patch; ++i) {
            double dense[kConvFilters];
            times_covariance(t, i, weight, group, dense);
            for (std::int64_t c = 0; c < group; ++c) {
                const double scale = t.vector(0, kScale)[first + c], inverse = t.vector(0, kInverse)[first + c];
                t.at(b.weight_grad)[first * patch + i * group + c] =
                    static_cast<Scalar>(scale * (centred[i][c] - inverse * gamma[c] * dense[c]));
            }
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
