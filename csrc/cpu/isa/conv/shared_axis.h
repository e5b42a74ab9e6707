// Which products a convolution shares along one axis: integers only, no numbers of the network.
//
// Three neighbouring outputs of a filter with two taps a and b, over x0 to x3, take four products instead of six. Two
// outputs take three instead of four (Winograd's F(3, 2) and F(2, 2)):
//     y0 = a (x0 - x2) + s + d,  y1 = s - d,  y2 = b (x3 - x1) + s + d
//         with s = (a + b) / 2 (x1 + x2),  d = (a - b) / 2 (x2 - x1);
//     y0 = a (x0 - x1) + s,  y1 = b (x2 - x1) + s  with s = (a + b) / 2 (x1 + x1)
// With stride 2, taps 0 and 2 of an axis are such a filter over every other position, and tap 1 stands alone: 49
// products instead of 81 for 3 x 3 outputs of a 3x3 window. The gradient of the inputs has the same form.
//
// The gradients of the two taps share the products of two outputs:
//     da = g0 x0 + g1 x1 = g0 (x0 - x1) + s,  db = g0 x1 + g1 x2 = g1 (x2 - x1) + s  with s = (g0 + g1) x1
// A tap that meets only zeros still gets exactly 0. The sign step depends on that. With stride 1, taps 0 and 1 share
// products this way in images too small for F(2x2, 3x3).
//
// An output at the image's edge is computed alone if that skips the zero border, unless it would strand a neighbour. An
// axis of two outputs shares nothing.
#pragma once

#include <cstdint>

#include "cpu/isa/integers.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// A combination along one axis: x[at] + sign * x[other], or x[at] alone if sign is 0.
struct Blend {
    std::int64_t at, other;
    int sign;
};

constexpr Blend alone(std::int64_t at) { return {at, at, 0}; }

// One sum of products along an axis, and the outputs it belongs to; repeated `count` times at regular steps. Weights
// are numbered by tap. Weight 3 is half the sum of taps 0 and 2, weight 4 half their difference.
struct AxisTerm {
    struct Product {
        Blend x;
        int weight;
    };
    struct Target {
        std::int64_t out;
        int sign;
    };
    std::int64_t count, x_step;  // how often, and how far the inputs move from one time to the next
    std::int64_t out_step;
    bool adds;  // whether it adds to what earlier terms wrote; else it is its outputs' first, with sign 1
    int targets;
    Target target[3];
    int products;
    Product product[3];
};

struct Axis {
    AxisTerm term[10];
    int terms = 0;

    void add(const AxisTerm& next) {
        if (next.count > 0) term[terms++] = next;
    }
};

// Whether an axis with `out` outputs shares products.
constexpr bool shares_products(std::int64_t out) { return out > 2; }

// Outputs of an axis, in order: one computed alone at the image's edge, pairs, and a last one alone.
struct Pairing {
    std::int64_t lead, pairs, tail;
};

// For outputs [first, last) of `out`. meets_end: a tap of the last output is over the border.
constexpr Pairing pairing_of(std::int64_t first, std::int64_t last, std::int64_t out, bool meets_end) {
    const std::int64_t count = last - first;
    const bool leads = first == 0 && (count % 2 == 1 || meets_end || !shares_products(out));
    const std::int64_t rest = count - (leads ? 1 : 0);
    return {count - rest, rest / 2, rest % 2};
}

// Outputs of an axis in groups that share products, and how many are left.
struct Grouping {
    std::int64_t triples, pairs, rest;
};

// Chosen to minimise products. Not counting tap 1, three outputs take four, two take three and one takes two.
constexpr Grouping grouping_of(std::int64_t count) {
    const std::int64_t triples = count > 1 && count % 3 == 1 ? count / 3 - 1 : count / 3;
    return {triples, (count - 3 * triples) / 2, (count - 3 * triples) % 2};
}

// Outputs [first, last) of an axis with stride 2. Input positions count from the zero border.
inline Axis strided_axis(std::int64_t first, std::int64_t last, std::int64_t in, std::int64_t out) {
    const std::int64_t count = last - first, lead = first == 0 ? 1 : 0;
    const bool meets_end = last == out && in % 2 == 1;  // tap 2 of the last output is over the border
    // Then that output is computed alone, unless this leaves one other alone too: the two share.
    const std::int64_t ends = meets_end && count - lead != 2 && count > lead ? 1 : 0;
    const auto [triples, pairs, rest] = grouping_of(count - lead - ends);
    const std::int64_t tail = rest + ends, end = 2 * (last - 1);
    const std::int64_t t = lead, p = t + 3 * triples, x = 2 * (first + t), z = 2 * (first + p);
    Axis axis;  // of terms: count, x_step; out_step, adds, targets; products
    axis.add({triples, 6, 3, false, 1, {{t, 1}}, 2, {{{x, x + 4, -1}, 0}, {alone(x + 1), 1}}});
    axis.add({triples, 6, 3, false, 1, {{t + 1, 1}}, 1, {{alone(x + 3), 1}}});
    axis.add({triples, 6, 3, false, 1, {{t + 2, 1}}, 2, {{{x + 6, x + 2, -1}, 2}, {alone(x + 5), 1}}});
    axis.add({pairs, 4, 2, false, 1, {{p, 1}}, 2, {{{z, z + 2, -1}, 0}, {alone(z + 1), 1}}});
    axis.add({pairs, 4, 2, false, 1, {{p + 1, 1}}, 2, {{{z + 4, z + 2, -1}, 2}, {alone(z + 3), 1}}});
    axis.add({lead, 0, 0, false, 1, {{0, 1}}, in > 1 ? 2 : 1, {{alone(1), 1}, {alone(2), 2}}});
    axis.add({tail,
              0,
              0,
              false,
              1,
              {{count - 1, 1}},
              meets_end ? 2 : 3,
              {{alone(end), 0}, {alone(end + 1), 1}, {alone(end + 2), 2}}});
    axis.add({triples, 6, 3, true, 3, {{t, 1}, {t + 1, 1}, {t + 2, 1}}, 1, {{{x + 2, x + 4, 1}, 3}}});
    axis.add({triples, 6, 3, true, 3, {{t, 1}, {t + 1, -1}, {t + 2, 1}}, 1, {{{x + 4, x + 2, -1}, 4}}});
    axis.add({pairs, 4, 2, true, 2, {{p, 1}, {p + 1, 1}}, 1, {{{z + 2, z + 2, 1}, 3}}});
    return axis;
}

// Inputs [first, last) of such an axis, whose gradients come from those of the outputs; `first` is even. An even input
// is under tap 1 of one output. An odd one is under taps 2 and 0 of two, which are taps 0 and 2 of the exchanged
// window.
inline Axis gathering_axis(std::int64_t first, std::int64_t last, std::int64_t out) {
    const std::int64_t odd = (last - first) / 2, g = first / 2 + 1;
    const std::int64_t ends = g + odd > out ? 1 : 0;  // the last is under one output alone
    const auto [triples, pairs, rest] = grouping_of(odd - ends);
    const std::int64_t p = 6 * triples + 1, h = g + 3 * triples;
    Axis axis;  // of terms: count, x_step; out_step, adds, targets; products
    axis.add({(last - first + 1) / 2, 1, 2, false, 1, {{0, 1}}, 1, {{alone(g), 1}}});
    axis.add({triples, 3, 6, false, 3, {{1, 1}, {3, 1}, {5, 1}}, 1, {{{g + 1, g + 2, 1}, 3}}});
    axis.add({triples, 3, 6, true, 3, {{1, 1}, {3, -1}, {5, 1}}, 1, {{{g + 2, g + 1, -1}, 4}}});
    axis.add({triples, 3, 6, true, 1, {{1, 1}}, 1, {{{g, g + 2, -1}, 0}}});
    axis.add({triples, 3, 6, true, 1, {{5, 1}}, 1, {{{g + 3, g + 1, -1}, 2}}});
    axis.add({pairs, 2, 4, false, 2, {{p, 1}, {p + 2, 1}}, 1, {{{h + 1, h + 1, 1}, 3}}});
    axis.add({pairs, 2, 4, true, 1, {{p, 1}}, 1, {{{h, h + 1, -1}, 0}}});
    axis.add({pairs, 2, 4, true, 1, {{p + 2, 1}}, 1, {{{h + 2, h + 1, -1}, 2}}});
    for (std::int64_t i = odd - rest - ends; i < odd; ++i) {
        const int products = g + i + 1 > out ? 1 : 2;
        axis.add({1, 0, 0, false, 1, {{2 * i + 1, 1}}, products, {{alone(g + i), 0}, {alone(g + i + 1), 2}}});
    }
    return axis;
}

// The matrices of products along one axis of a weight gradient. Each is [inputs, outputs], a sum over positions: of
// x0 - x1, of x1, of x2 - x1, and of the tap that stands alone. It comes from up to three stretches of positions.
struct OuterAxis {
    struct Stretch {
        Blend x, grad;
        std::int64_t count, x_step, grad_step;
    };
    Stretch stretch[4][3];
    int stretches[4] = {};

    void add(int matrix, const Stretch& next) {
        if (next.count > 0) stretch[matrix][stretches[matrix]++] = next;
    }
};

// For outputs [first, last). Input positions count from the zero border, gradient positions from the first output.
inline OuterAxis outer_axis(std::int64_t first, std::int64_t last, std::int64_t in, std::int64_t out,
                            std::int64_t stride) {
    const std::int64_t count = last - first;
    const bool meets_end = last == out && out * stride > in;  // tap `stride` of the last output is over the border
    const auto [lead, pairs, tail] = pairing_of(first, last, out, meets_end);
    const std::int64_t g = first + lead, x = stride * g, end = stride * (last - 1), single = 3 - stride;
    const bool single_meets_end = last == out && (out - 1) * stride + single > in;
    OuterAxis axis;  // of stretches: x, grad; count; x_step, grad_step
    axis.add(0, {{x, x + stride, -1}, alone(g), pairs, 2 * stride, 2});
    axis.add(0, {alone(end), alone(last - 1), tail, 0, 0});
    axis.add(1, {alone(x + stride), {g, g + 1, 1}, pairs, 2 * stride, 2});
    axis.add(2, {{x + 2 * stride, x + stride, -1}, alone(g + 1), pairs, 2 * stride, 2});
    axis.add(2, {alone(stride), alone(0), stride > in ? 0 : lead, 0, 0});
    axis.add(2, {alone(end + stride), alone(last - 1), meets_end ? 0 : tail, 0, 0});
    axis.add(3, {alone(stride * first + single), alone(first), count - (single_meets_end ? 1 : 0), stride, 1});
    return axis;
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
