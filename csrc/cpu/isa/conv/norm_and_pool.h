// BatchNorm, max-pooling and ReLU of a block, forward and backward.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/task_rows.h"
#include "cpu/isa/simd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// The mean of one item and its squared deviations from that mean, one vector of channels after the other.
template <typename Scalar>
void item_statistics(const ConvPartial<Scalar>& partial, const Scalar* raw, std::int64_t row, std::int64_t rows,
                     std::int64_t positions) {
    const std::int64_t channels = partial.channels;
    const Scalar count = static_cast<Scalar>(rows * positions);
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        // Four sums, so that an addition need not wait for the one before.
        Vector<Scalar> sums[4] = {}, squares[4] = {};
        for (std::int64_t y = 0; y < rows; ++y) {
            const Scalar* z = raw + y * row + c;
            std::int64_t i = 0;
            for (; i + 4 <= positions; i += 4, z += 4 * channels) {
#pragma GCC unroll 4
                for (int s = 0; s < 4; ++s) sums[s] += load(z + s * channels);
            }
            for (; i < positions; ++i, z += channels) sums[0] += load(z);
        }
        const Vector<Scalar> mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / count;
        for (std::int64_t y = 0; y < rows; ++y) {
            const Scalar* z = raw + y * row + c;
            std::int64_t i = 0;
            for (; i + 4 <= positions; i += 4, z += 4 * channels) {
#pragma GCC unroll 4
                for (int s = 0; s < 4; ++s) {
                    const Vector<Scalar> deviation = load(z + s * channels) - mean;
                    squares[s] += deviation * deviation;
                }
            }
            for (; i < positions; ++i, z += channels) squares[0] += (load(z) - mean) * (load(z) - mean);
        }
        store(partial.means() + c, mean);
        store(partial.squared_deviations() + c, (squares[0] + squares[1]) + (squares[2] + squares[3]));
    }
}

// Takes the first of the largest of every 2 x 2 values after BatchNorm. Gamma's sign tells it before the statistics are
// known. Calls keep(y, x, c, winner) for rows y of the activation, and writes which of the four it is.
template <typename Scalar, typename Keep>
void choose_winners(const ConvTask<Scalar>& t, int block, const Rows& rows, const Scalar* raw, std::int64_t row,
                    const Keep& keep) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    const Scalar* gamma = t.vector(block, kGamma);
    std::uint8_t* choices = choices_of(t, block, rows.example);
    for (std::int64_t y = 0; y < rows.count / 2; ++y) {
        const std::int64_t half_y = rows.first / 2 + y;
        const std::int64_t place = half_y * b.act_w * channels;
        for (std::int64_t x = 0; x < b.act_w; ++x) {
            const Scalar* z = raw + 2 * y * row + 2 * x * channels;
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                const Vector<Scalar> g = load(gamma + c), one = all(Scalar(1));
                const Vector<Scalar> flip = g > 0 ? one : (g < 0 ? -one : Vector<Scalar>{});
                Vector<Scalar> best = load(z + c);
                Mask<Scalar> choice = {};
#pragma GCC unroll 4
                for (int i = 1; i < 4; ++i) {
                    const Vector<Scalar> next = load(z + i / 2 * row + i % 2 * channels + c);
                    const Mask<Scalar> better = next * flip > best * flip;
                    best = better ? next : best;
                    choice = better ? Mask<Scalar>{} + i : choice;
                }
                store_choice<Scalar>(choices + place + x * channels + c, choice);
                keep(half_y, x, c, best);
            }
        }
    }
}

// One row of a block's activation, from the row's winners.
template <typename Scalar>
void normalise_row(const ConvTask<Scalar>& t, int block, const Scalar* from, Scalar* to) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    const Scalar* scale = t.vector(block, kScale);
    const Scalar* shift = t.vector(block, kShift);
    for (std::int64_t x = 0; x < b.act_w; ++x, from += channels, to += channels) {
        for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
            store(to + c, relu<Scalar>(load(scale + c) * load(from + c) + load(shift + c)));
        }
    }
}

template <typename Scalar>
void normalise(const ConvTask<Scalar>& t, int block, std::int64_t example) {
    const Winners<Scalar> winners = winners_of(t, block);
    for (std::int64_t y = 0; y < t.block(block).act_h; ++y) {
        normalise_row(t, block, winners.base + example * winners.example + y * winners.row,
                      activation_row(t, block, example, y));
    }
}

// mean, variance [channels] of a later block, from the items' means and squared deviations.
template <typename Scalar>
void moments_of_items(const ConvTask<Scalar>& t, int block, double* mean, double* variance) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t filters = t.shape->filters;
    double seen = 0;
    for (std::int64_t item = 0; item < t.examples * b.items; ++item) {
        const double count = static_cast<double>(raw_rows(t, block, item).count * b.out_w);
        const Scalar* means = t.partial(item).means();
        const Scalar* deviations = t.partial(item).squared_deviations();
        const double share = count / (seen + count);
        for (std::int64_t c = 0; c < filters; ++c) {
            const double difference = means[c] - mean[c];
            mean[c] += difference * share;
            variance[c] += deviations[c] + difference * difference * (seen * share);
        }
        seen += count;
    }
    for (std::int64_t c = 0; c < filters; ++c) variance[c] /= seen;
}

template <typename Scalar>
void grad_sums_later(const ConvTask<Scalar>& t, int block, std::int64_t item, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const Rows rows = rows_of(item, b.half_items, b.act_rows, b.act_h);
    const std::int64_t channels = t.layout->channels;
    const Winners<Scalar> winners = winners_of(t, block);
    const ConvPartial<Scalar> partial = t.partial(item);
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        const Vector<Scalar> scale = load(t.vector(block, kScale) + c), shift = load(t.vector(block, kShift) + c);
        const Vector<Scalar> mean = load(t.vector(block, kMean) + c), inverse = load(t.vector(block, kInverse) + c);
        Vector<Scalar> sum = {}, product = {};
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            const Scalar* z = winners.base + rows.example * winners.example + y * winners.row + c;
            Scalar* grad = activation_grad_row(t, block, rows.example, y, scratch) + c;
            for (std::int64_t x = 0; x < b.act_w; ++x, z += channels, grad += channels) {
                const Vector<Scalar> value = load(z);
                const Vector<Scalar> passed = passed_by_relu<Scalar>(scale * value + shift, load(grad));
                store(grad, passed);
                sum += passed;
                product += passed * (value - mean);
            }
        }
        store(partial.grad_sums() + c, sum);
        store(partial.grad_products() + c, product * inverse);
    }
}

template <typename Scalar>
void norm_grads(const ConvTask<Scalar>& t, int block) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    double beta[kConvFilters] = {}, gamma[kConvFilters] = {};
    for (std::int64_t item = 0; item < t.examples * b.half_items; ++item) {
        const Scalar* sums = t.partial(item).grad_sums();
        const Scalar* products = t.partial(item).grad_products();
        for (std::int64_t c = 0; c < channels; ++c) {
            beta[c] += sums[c];
            gamma[c] += products[c];
        }
    }
    const double count = static_cast<double>(t.examples * b.out_h * b.out_w);
    for (std::int64_t c = 0; c < channels; ++c) {
        const double scale = t.vector(block, kScale)[c];
        t.vector(block, kBetaGrad)[c] = static_cast<Scalar>(beta[c]);
        t.vector(block, kGammaGrad)[c] = static_cast<Scalar>(gamma[c]);
        t.vector(block, kSlope)[c] = static_cast<Scalar>(-scale * t.vector(block, kInverse)[c] * gamma[c] / count);
        t.vector(block, kOffset)[c] = static_cast<Scalar>(-scale * beta[c] / count);
    }
}

// d raw = scale * d activation at the winners + slope * (raw - mean) + offset everywhere; without pooling all are
// winners.
template <typename Scalar>
void raw_grad_strided(const ConvTask<Scalar>& t, int block, std::int64_t item) {
    const ConvBlockPlan& b = t.block(block);
    const Rows rows = raw_rows(t, block, item);
    const std::int64_t channels = t.layout->channels;
    const std::int64_t half = (rows.example * b.act_h + rows.first) * b.act_w * channels;
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        const Vector<Scalar> scale = load(t.vector(block, kScale) + c), slope = load(t.vector(block, kSlope) + c);
        const Vector<Scalar> mean = load(t.vector(block, kMean) + c), offset = load(t.vector(block, kOffset) + c);
        const Scalar* activation_grad = t.at(t.layout->activation_grad) + half + c;
        for (std::int64_t y = 0; y < rows.count; ++y) {
            Scalar* z = raw_row(t, block, rows.example, rows.first + y) + c;
            for (std::int64_t x = 0; x < b.out_w; ++x, z += channels, activation_grad += channels) {
                store(z, slope * (load(z) - mean) + offset + scale * load(activation_grad));
            }
        }
    }
}

template <typename Scalar>
void raw_grad(const ConvTask<Scalar>& t, int block, std::int64_t item) {
    const ConvBlockPlan& b = t.block(block);
    if (b.stride == 2) return raw_grad_strided(t, block, item);
    const Rows rows = raw_rows(t, block, item);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    Scalar* raw = raw_row(t, block, rows.example, rows.first);
    const Scalar* activation_grad = t.at(t.layout->activation_grad) + rows.example * b.act_h * b.act_w * channels;
    const std::uint8_t* choices = choices_of(t, block, rows.example);
    for (std::int64_t y = 0; y < rows.count; y += 2) {
        const std::int64_t half_y = (rows.first + y) / 2;
        for (std::int64_t x = 0; x < b.out_w; x += 2) {
            const std::int64_t half = (half_y * b.act_w + x / 2) * channels;
            const bool counts = half_y < b.act_h && x / 2 < b.act_w;  // pooling drops an odd last row and column
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                const Vector<Scalar> slope = load(t.vector(block, kSlope) + c);
                const Vector<Scalar> mean = load(t.vector(block, kMean) + c);
                const Vector<Scalar> offset = load(t.vector(block, kOffset) + c);
                Vector<Scalar> routed = {};
                Mask<Scalar> choice = {};
                if (counts) {
                    routed = load(t.vector(block, kScale) + c) * load(activation_grad + half + c);
                    choice = load_choice<Scalar>(choices + half + c);
                }
                for (int i = 0; i < 4; ++i) {
                    if (y + i / 2 >= rows.count || x + i % 2 >= b.out_w) continue;
                    Scalar* z = raw + (y + i / 2) * row + (x + i % 2) * channels + c;
                    const Vector<Scalar> of_winner = choice == i ? routed : Vector<Scalar>{};
                    store(z, slope * (load(z) - mean) + offset + of_winner);
                }
            }
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
