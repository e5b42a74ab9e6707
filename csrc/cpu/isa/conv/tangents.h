// The derivative of a block's passes, forward and backward, in one direction of its parameters. `t` is the task, in
// which the pass itself has run or runs at the same time; `d` holds the derivatives (tangents) of all that t holds, in
// a layout of the same sizes, of the weights and BatchNorm's vectors too. ReLU's and pooling's choices are constants.
// In the comments, a name with a point after it is d's. Readable twin: torch's double backward, in inner_loop of
// signmaml_ext/reference.py.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/data_grad.h"
#include "cpu/isa/conv/norm_and_pool.h"
#include "cpu/isa/conv/task_rows.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// d's winners <- raw. at t's winners, of an item that pools
template <typename Scalar>
void tangents_at_winners(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, const Rows& rows,
                         const Scalar* raw) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    const std::uint8_t* choices = choices_of(t, block, rows.example);
    Scalar* winners = d.at(d.block(block).winner) + rows.example * b.act_h * b.act_w * channels;
    for (std::int64_t y = 0; y < rows.count / 2; ++y) {
        const std::int64_t place = (rows.first / 2 + y) * b.act_w * channels;
        for (std::int64_t x = 0; x < b.act_w; ++x) {
            const Scalar* z = raw + 2 * y * row + 2 * x * channels;
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                const Mask<Scalar> choice = load_choice<Scalar>(choices + place + x * channels + c);
                Vector<Scalar> chosen = load(z + c);
#pragma GCC unroll 3
                for (int i = 1; i < 4; ++i) {
                    chosen = choice == i ? load(z + i / 2 * row + i % 2 * channels + c) : chosen;
                }
                store(winners + place + x * channels + c, chosen);
            }
        }
    }
}

template <typename Scalar>
void tangent_sums(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, std::int64_t item) {
    const ConvBlockPlan& b = t.block(block);
    const Rows rows = raw_rows(t, block, item);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    const Scalar* raw = raw_row(t, block, rows.example, rows.first);
    const Scalar* raw_tangent = raw_row(d, block, rows.example, rows.first);
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        const Vector<Scalar> mean = load(t.vector(block, kMean) + c);
        Vector<Scalar> sums[2] = {}, products[2] = {};  // an addition need not wait for the one before
        for (std::int64_t y = 0; y < rows.count; ++y) {
            const Scalar* z = raw + y * row + c;
            const Scalar* z_tangent = raw_tangent + y * row + c;
            for (std::int64_t x = 0; x < b.out_w; ++x, z += channels, z_tangent += channels) {
                const Vector<Scalar> tangent = load(z_tangent);
                sums[x % 2] += tangent;
                products[x % 2] += (load(z) - mean) * tangent;
            }
        }
        store(d.partial(item).tangent_sums() + c, sums[0] + sums[1]);
        store(d.partial(item).tangent_products() + c, products[0] + products[1]);
    }
    if (b.stride == 1) tangents_at_winners(t, d, block, rows, raw_tangent);
}

// mean. and the mean of (raw - mean) raw., [channels] of a block after the first
template <typename Scalar>
void tangent_moments_of_items(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, double* mean,
                              double* covariance) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    for (std::int64_t item = 0; item < t.examples * b.items; ++item) {
        const Scalar* sums = d.partial(item).tangent_sums();
        const Scalar* products = d.partial(item).tangent_products();
        for (std::int64_t c = 0; c < channels; ++c) {
            mean[c] += sums[c];
            covariance[c] += products[c];
        }
    }
    const double count = static_cast<double>(t.examples * b.out_h * b.out_w);
    for (std::int64_t c = 0; c < channels; ++c) {
        mean[c] /= count;
        covariance[c] /= count;
    }
}

template <typename Scalar>
void tangent_normalise(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, std::int64_t example) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    const Winners<Scalar> winners = winners_of(t, block), tangents = winners_of(d, block);
    for (std::int64_t y = 0; y < b.act_h; ++y) {
        const Scalar* from = winners.base + example * winners.example + y * winners.row;
        const Scalar* tangent = tangents.base + example * tangents.example + y * tangents.row;
        Scalar* to = activation_row(d, block, example, y);
        for (std::int64_t x = 0; x < b.act_w; ++x, from += channels, tangent += channels, to += channels) {
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                const Vector<Scalar> scale = load(t.vector(block, kScale) + c), value = load(from + c);
                const Vector<Scalar> moved =
                    load(d.vector(block, kScale) + c) * (value - load(t.vector(block, kMean) + c)) +
                    scale * (load(tangent + c) - load(d.vector(block, kMean) + c)) + load(d.vector(block, kBeta) + c);
                store(to + c, passed_by_relu<Scalar>(scale * value + load(t.vector(block, kShift) + c), moved));
            }
        }
    }
}

template <typename Scalar>
void tangent_grad_sums(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, std::int64_t item) {
    const ConvBlockPlan& b = t.block(block);
    const Rows rows = rows_of(item, b.half_items, b.act_rows, b.act_h);
    const std::int64_t channels = t.layout->channels;
    const Winners<Scalar> winners = winners_of(t, block), tangents = winners_of(d, block);
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        const Vector<Scalar> scale = load(t.vector(block, kScale) + c), shift = load(t.vector(block, kShift) + c);
        const Vector<Scalar> mean = load(t.vector(block, kMean) + c), moved_mean = load(d.vector(block, kMean) + c);
        Vector<Scalar> sum = {}, product = {};
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            const Scalar* z = winners.base + rows.example * winners.example + y * winners.row + c;
            const Scalar* z_tangent = tangents.base + rows.example * tangents.example + y * tangents.row + c;
            const Scalar* grad = activation_grad_row<Scalar>(t, block, rows.example, y, nullptr) + c;
            Scalar* grad_tangent = activation_grad_row<Scalar>(d, block, rows.example, y, nullptr) + c;
            for (std::int64_t x = 0; x < b.act_w; ++x) {
                const Vector<Scalar> value = load(z);
                const Vector<Scalar> passed = passed_by_relu<Scalar>(scale * value + shift, load(grad_tangent));
                store(grad_tangent, passed);
                sum += passed;
                product += passed * (value - mean) + load(grad) * (load(z_tangent) - moved_mean);
                z += channels;
                z_tangent += channels;
                grad += channels;
                grad_tangent += channels;
            }
        }
        store(d.partial(item).grad_sums() + c, sum);
        store(d.partial(item).grad_products() + c, product);
    }
}

// With g = sum of d activation (raw - mean) inverse, the gradient in gamma:
//     slope = -scale inverse g / count,  offset = -scale (sum of d activation) / count;  here, their derivatives.
template <typename Scalar>
void tangent_norm_grads(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    double beta[kConvFilters] = {}, product[kConvFilters] = {};
    for (std::int64_t item = 0; item < t.examples * b.half_items; ++item) {
        for (std::int64_t c = 0; c < channels; ++c) {
            beta[c] += d.partial(item).grad_sums()[c];
            product[c] += d.partial(item).grad_products()[c];
        }
    }
    const double count = static_cast<double>(t.examples * b.out_h * b.out_w);
    for (std::int64_t c = 0; c < channels; ++c) {
        const double scale = t.vector(block, kScale)[c], scale_tangent = d.vector(block, kScale)[c];
        const double inverse = t.vector(block, kInverse)[c], inverse_tangent = d.vector(block, kInverse)[c];
        const double of_gamma = t.vector(block, kGammaGrad)[c], of_beta = t.vector(block, kBetaGrad)[c];
        const double gamma = inverse * product[c] + inverse_tangent / inverse * of_gamma;
        d.vector(block, kBetaGrad)[c] = static_cast<Scalar>(beta[c]);
        d.vector(block, kGammaGrad)[c] = static_cast<Scalar>(gamma);
        d.vector(block, kSlope)[c] = static_cast<Scalar>(
            -(scale_tangent * inverse * of_gamma + scale * inverse_tangent * of_gamma + scale * inverse * gamma) /
            count);
        d.vector(block, kOffset)[c] = static_cast<Scalar>(-(scale_tangent * of_beta + scale * beta[c]) / count);
    }
}

// BatchNorm's vectors of a channel, of the task and of the tangents, as raw_grad uses them.
template <typename Scalar>
struct RawGradVectors {
    Vector<Scalar> scale, mean, slope, offset;

    RawGradVectors(const ConvTask<Scalar>& t, int block, std::int64_t c)
        : scale(load(t.vector(block, kScale) + c)),
          mean(load(t.vector(block, kMean) + c)),
          slope(load(t.vector(block, kSlope) + c)),
          offset(load(t.vector(block, kOffset) + c)) {}
};

// raw <- its gradient, and raw. <- the derivative of that, at one position. grad, grad.: of the activation there, 0
// where it is no winner.
template <typename Scalar>
[[gnu::always_inline]] inline void raw_grads_at(Scalar* z, Scalar* z_tangent, const RawGradVectors<Scalar>& own,
                                                const RawGradVectors<Scalar>& tangent, Vector<Scalar> grad,
                                                Vector<Scalar> grad_tangent) {
    const Vector<Scalar> centred = load(z) - own.mean, moved = load(z_tangent) - tangent.mean;
    store(z, own.slope * centred + own.offset + own.scale * grad);
    store(z_tangent, tangent.slope * centred + own.slope * moved + tangent.offset +
                         (tangent.scale * grad + own.scale * grad_tangent));
}

template <typename Scalar>
void tangent_raw_grad(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block, std::int64_t item) {
    const ConvBlockPlan& b = t.block(block);
    const Rows rows = raw_rows(t, block, item);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    const std::int64_t image = rows.example * b.act_h * b.act_w * channels;
    Scalar* raw = raw_row(t, block, rows.example, rows.first);
    Scalar* raw_tangent = raw_row(d, block, rows.example, rows.first);
    const Scalar* grads = t.at(t.layout->activation_grad) + image;
    const Scalar* grads_tangent = d.at(d.layout->activation_grad) + image;
    const std::uint8_t* choices = b.stride == 1 ? choices_of(t, block, rows.example) : nullptr;
    const std::int64_t size = b.stride == 1 ? 2 : 1;  // of a window
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        const RawGradVectors<Scalar> own(t, block, c), tangent(d, block, c);
        for (std::int64_t y = 0; y < rows.count; y += size) {
            const std::int64_t half_y = (rows.first + y) / size;
            for (std::int64_t x = 0; x < b.out_w; x += size) {
                const std::int64_t half = (half_y * b.act_w + x / size) * channels + c;
                const bool counts = half_y < b.act_h && x / size < b.act_w;  // pooling drops an odd last row and column
                const Vector<Scalar> grad = counts ? load(grads + half) : Vector<Scalar>{};
                const Vector<Scalar> grad_tangent = counts ? load(grads_tangent + half) : Vector<Scalar>{};
                Mask<Scalar> choice = {};
                if (counts && choices != nullptr) choice = load_choice<Scalar>(choices + half);
                for (std::int64_t i = 0; i < size * size; ++i) {
                    if (y + i / 2 >= rows.count || x + i % 2 >= b.out_w) continue;
                    const std::int64_t place = (y + i / 2) * row + (x + i % 2) * channels + c;
                    const Mask<Scalar> wins = choice == static_cast<int>(i);
                    raw_grads_at(raw + place, raw_tangent + place, own, tangent, wins ? grad : Vector<Scalar>{},
                                 wins ? grad_tangent : Vector<Scalar>{});
                }
            }
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
