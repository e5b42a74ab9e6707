// The tangents of what follows a block's product: how normalisation, activation and pooling, and their gradients,
// change along the direction. What `value` computes has its tangent at the same place of the memory of `along`.
//
// With z what was made, m its mean and r the inverse deviation: y = scale (z - m) + shift and scale = gamma r, so
// y. = scale (z. - m.) + scale. (z - m) + shift.. The mean's own terms leave the sums, as they do in z - m.
#pragma once

#include <cstdint>

#include "cpu/isa/layers/activations.h"
#include "cpu/isa/layers/places.h"
#include "cpu/isa/layers/tail.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// ---- forward --------------------------------------------------------------------------------------------------------

// moments of `along` <- the means of an example's channels, and half the tangents of their squared deviations
template <typename Scalar>
void measure_tangent(const LayersTangent<Scalar>& d, int i, std::int64_t example) {
    const LayersBlock& block = d.value.network->block[i];
    const LayersImages& made = d.value.layout->block[i].made;
    const Scalar count = static_cast<Scalar>(block.made.height * block.made.width);
    for (std::int64_t c = 0; c < made.lanes; c += kLanes<Scalar>) {
        const Vector<Scalar> mean = load(moment(d.value, i, example, 0) + c);
        Vector<Scalar> sum = {}, product = {};
        for (std::int64_t y = 0; y < block.made.height; ++y) {
            Vector<Scalar> of_row = {}, product_of_row = {};
            const Scalar* z = image_of(d.value, made, example) + y * made.row + c;
            const Scalar* tangent = image_of(d.along, made, example) + y * made.row + c;
            for (std::int64_t x = 0; x < block.made.width; ++x, z += made.lanes, tangent += made.lanes) {
                of_row += load(tangent);
                product_of_row += (load(z) - mean) * load(tangent);
            }
            sum += of_row;
            product += product_of_row;
        }
        store(moment(d.along, i, example, 0) + c, sum / count);
        store(moment(d.along, i, example, 1) + c, product);
    }
}

// The tangents of one channel's cells, from those of the mean, bias included, and of the inverse deviation.
template <typename Scalar>
void set_cell_tangent(const LayersTangent<Scalar>& d, int i, std::int64_t example, std::int64_t c, double mean,
                      double inverse) {
    const LayersBlockPlan& plan = d.value.layout->block[i];
    const double gamma = d.value.memory[plan.affine + c], of_gamma = d.along.memory[plan.affine + c];
    cell(d.along, i, example, kLayersMean)[c] = static_cast<Scalar>(mean - d.along.memory[plan.bias + c]);
    cell(d.along, i, example, kLayersInverse)[c] = static_cast<Scalar>(inverse);
    cell(d.along, i, example, kLayersScale)[c] =
        static_cast<Scalar>(of_gamma * cell(d.value, i, example, kLayersInverse)[c] + gamma * inverse);
    cell(d.along, i, example, kLayersShift)[c] = d.along.memory[plan.affine + plan.made.lanes + c];
    cell(d.along, i, example, kLayersSlope)[c] = 0;
    cell(d.along, i, example, kLayersOffset)[c] = 0;
}

// Of several sets put together: the mean and its tangent, and half the tangent of the squared deviations.
struct JoinedTangent {
    double count, mean, tangent, products;

    // deviation: of the set's mean from that of all.
    void take(double n, double deviation, double of_mean, double of_products) {
        products += of_products + n * deviation * of_mean;
        tangent += n * of_mean / count;
    }

    double of_inverse(double inverse) const { return -inverse * inverse * inverse * products / count; }
};

// The tangents of every cell's mean to shift, from the moments.
template <typename Scalar>
void set_cell_tangents(const LayersTangent<Scalar>& d, int i) {
    const LayersTask<Scalar>&value = d.value, &along = d.along;
    const LayersBlock& block = value.network->block[i];
    const LayersBlockPlan& plan = value.layout->block[i];
    const Scalar *bias = value.memory + plan.bias, *of_bias = along.memory + plan.bias;
    const std::int64_t channels = block.made.channels, lanes = plan.made.lanes;
    const double positions = static_cast<double>(block.made.height * block.made.width);
    if (block.norm == LayersNorm::kNone) {
        for (std::int64_t c = 0; c < lanes; ++c) set_cell_tangent(d, i, 0, c, 0, 0);
    } else if (block.norm == LayersNorm::kBatch) {
        const double examples = static_cast<double>(value.count);
        for (std::int64_t c = 0; c < lanes; ++c) {
            JoinedTangent all{positions * examples, 0, 0, 0};
            for (std::int64_t e = 0; e < value.count; ++e) all.mean += moment(value, i, e, 0)[c] / examples;
            for (std::int64_t e = 0; e < value.count; ++e) {
                all.take(positions, moment(value, i, e, 0)[c] - all.mean, moment(along, i, e, 0)[c],
                         moment(along, i, e, 1)[c]);
            }
            const double inverse = cell(value, i, 0, kLayersInverse)[c];
            set_cell_tangent(d, i, 0, c, all.tangent + of_bias[c], all.of_inverse(inverse));
        }
    } else {
        const std::int64_t group = channels / block.groups;
        for (std::int64_t e = 0; e < value.count; ++e) {
            for (std::int64_t first = 0; first < channels; first += group) {
                const double size = static_cast<double>(group);
                JoinedTangent all{positions * size, 0, 0, 0};
                const auto mean_of = [&](std::int64_t c) { return double{moment(value, i, e, 0)[c]} + bias[c]; };
                for (std::int64_t c = first; c < first + group; ++c) all.mean += mean_of(c) / size;
                for (std::int64_t c = first; c < first + group; ++c) {
                    all.take(positions, mean_of(c) - all.mean, double{moment(along, i, e, 0)[c]} + of_bias[c],
                             moment(along, i, e, 1)[c]);
                }
                const double inverse = all.of_inverse(cell(value, i, e, kLayersInverse)[first]);
                for (std::int64_t c = first; c < first + group; ++c) {
                    set_cell_tangent(d, i, e, c, all.tangent, inverse);
                }
            }
            for (std::int64_t c = channels; c < lanes; ++c) set_cell_tangent(d, i, e, c, 0, 0);
        }
    }
}

// What a vector of channels needs to compute y and its tangent.
template <typename Scalar>
struct TangentCells {
    Vector<Scalar> scale, shift, mean;
    Vector<Scalar> of_scale, of_shift, of_mean;

    TangentCells(const LayersTangent<Scalar>& d, int i, std::int64_t example, std::int64_t c)
        : scale(load(cell(d.value, i, example, kLayersScale) + c)),
          shift(load(cell(d.value, i, example, kLayersShift) + c)),
          mean(load(cell(d.value, i, example, kLayersMean) + c)),
          of_scale(load(cell(d.along, i, example, kLayersScale) + c)),
          of_shift(load(cell(d.along, i, example, kLayersShift) + c)),
          of_mean(load(cell(d.along, i, example, kLayersMean) + c)) {}

    Vector<Scalar> normalised(Vector<Scalar> z) const { return scale * z + shift; }
    Vector<Scalar> tangent(Vector<Scalar> z, Vector<Scalar> of_z) const {
        return scale * (of_z - of_mean) + of_scale * (z - mean) + of_shift;
    }
};

// to [rows, width, lanes] <- the tangent of the activation of rows [first, first + rows) of an example
template <LayersActivation kKind, typename Scalar>
void activate_tangents(const LayersTangent<Scalar>& d, int i, std::int64_t example, std::int64_t first,
                       std::int64_t rows, Scalar* to, std::int64_t to_row) {
    const LayersBlock& block = d.value.network->block[i];
    const LayersImages& made = d.value.layout->block[i].made;
    const Scalar slope = static_cast<Scalar>(block.slope);
    for (std::int64_t c = 0; c < made.lanes; c += kLanes<Scalar>) {
        const TangentCells<Scalar> cells(d, i, example, c);
        for (std::int64_t y = 0; y < rows; ++y) {
            const Scalar* z = image_of(d.value, made, example) + (first + y) * made.row + c;
            const Scalar* tangent = image_of(d.along, made, example) + (first + y) * made.row + c;
            Scalar* at = to + y * to_row + c;
            for (std::int64_t x = 0; x < block.made.width; ++x) {
                const Vector<Scalar> value = load(z + x * made.lanes);
                const Vector<Scalar> moves = cells.tangent(value, load(tangent + x * made.lanes));
                store(at + x * made.lanes, passed<kKind, Scalar>(cells.normalised(value), moves, slope));
            }
        }
    }
}

// The tangent of the block's output of an example.
template <typename Scalar>
void finish_tangent(const LayersTangent<Scalar>& d, int i, std::int64_t example) {
    const LayersBlock& block = d.value.network->block[i];
    const LayersBlockPlan& plan = d.value.layout->block[i];
    const LayersImages& to = output_of(d.along, i);
    const std::int64_t lanes = plan.made.lanes, width = block.made.width, height = block.made.height;
    const std::int64_t row = width * lanes;
    Scalar* out = image_of(d.along, to, example);
    Scalar* values = d.value.memory + d.value.layout->scratch;
    Scalar* tangents = values + plan.band * row;
    with_activation(block.activation, [&](auto kind) {
        constexpr LayersActivation kKind = decltype(kind)::kind;
        if (block.pool == LayersPool::kNone) {
            activate_tangents<kKind>(d, i, example, 0, height, out, to.row);
            return;
        }
        if (block.pool == LayersPool::kMean) fill_zero(out, lanes);
        for (std::int64_t first = 0; first < height; first += plan.band) {
            const std::int64_t last = least(first + plan.band, height);
            activate_tangents<kKind>(d, i, example, first, last - first, tangents, row);
            if (block.pool != LayersPool::kMax) {
                average_band(block, plan.band, lanes, first, last, static_cast<const Scalar*>(tangents), out, to.row);
                continue;
            }
            activate_rows<kKind>(d.value, i, example, first, last - first, values, row);
            each_window(block, first, last, plan.band, [&](std::int64_t y, std::int64_t x, const Under& under) {
                const std::int64_t place = ((under.top - first) * width + under.left) * lanes;
                const std::int64_t rows = under.bottom - under.top, columns = under.right - under.left;
                for (std::int64_t c = 0; c < lanes; c += kLanes<Scalar>) {
                    const Mask<Scalar> number = largest_of(values + place + c, row, lanes, rows, columns).number;
                    Vector<Scalar> taken = {};
                    typename Simd<Scalar>::Int own = 0;
                    for (std::int64_t of_row = 0; of_row < rows; ++of_row) {
                        const Scalar* from = tangents + place + of_row * row + c;
                        for (std::int64_t column = 0; column < columns; ++column, ++own, from += lanes) {
                            taken = number == own ? load(from) : taken;
                        }
                    }
                    store(out + y * to.row + x * lanes + c, taken);
                }
            });
        }
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Calls body(kind, first, last, grads, tangents, row) for the bands of an example, as each_band_of_grads does.
template <typename Scalar, typename Body>
void each_band_of_tangents(const LayersTangent<Scalar>& d, int i, std::int64_t example, const Body& body) {
    const LayersBlock& block = d.value.network->block[i];
    const LayersBlockPlan& plan = d.value.layout->block[i];
    Scalar* tangents = d.along.memory + d.along.layout->scratch;
    each_band_of_grads(d.value, i, example,
                       [&](auto kind, std::int64_t first, std::int64_t last, const Scalar* grads, std::int64_t row) {
                           if (block.pool == LayersPool::kNone) {
                               const Scalar* all = output_grad(d.along, i) + example * block.made.height * row;
                               body(kind, first, last, grads, all, row);
                               return;
                           }
                           // The activation's output lies behind its gradient.
                           spread_grads(d.along, i, example, first, last, tangents, grads + plan.band * row);
                           body(kind, first, last, grads, static_cast<const Scalar*>(tangents), row);
                       });
}

// A vector of the gradient of what is normalised, and its tangent.
template <typename Scalar>
struct PassedBack {
    Vector<Scalar> grad, tangent;
};

template <LayersActivation kKind, typename Scalar>
[[gnu::always_inline]] inline PassedBack<Scalar> passed_back(const TangentCells<Scalar>& cells, Vector<Scalar> z,
                                                             Vector<Scalar> of_z, Vector<Scalar> grad,
                                                             Vector<Scalar> of_grad, Scalar slope) {
    const Vector<Scalar> y = cells.normalised(z);
    const Vector<Scalar> own = passed<kKind, Scalar>(y, grad, slope);
    const Vector<Scalar> straight = passed<kKind, Scalar>(y, of_grad, slope);
    if constexpr (kBends<kKind>) {
        const Vector<Scalar> bend = bend_at<kKind, Scalar>(y, slope);
        return {own, straight + bend * grad * cells.tangent(z, of_z)};
    }
    return {own, straight};
}

// sums, as sum_grads, and their tangents
template <typename Scalar>
void sum_grad_tangents(const LayersTangent<Scalar>& d, int i, std::int64_t example) {
    const LayersBlock& block = d.value.network->block[i];
    const LayersImages& made = d.value.layout->block[i].made;
    const Scalar slope = static_cast<Scalar>(block.slope);
    fill_zero(grad_sum(d.value, i, example, 0), 2 * made.lanes);
    fill_zero(grad_sum(d.along, i, example, 0), 2 * made.lanes);
    each_band_of_tangents(
        d, i, example,
        [&](auto kind, std::int64_t first, std::int64_t last, const Scalar* grads, const Scalar* tangents,
            std::int64_t row) {
            for (std::int64_t c = 0; c < made.lanes; c += kLanes<Scalar>) {
                const TangentCells<Scalar> cells(d, i, example, c);
                Vector<Scalar> sum = {}, product = {}, of_sum = {}, of_product = {};
                for (std::int64_t y = first; y < last; ++y) {
                    const Scalar* z = image_of(d.value, made, example) + y * made.row + c;
                    const Scalar* of_z = image_of(d.along, made, example) + y * made.row + c;
                    const std::int64_t at = (y - first) * row + c;
                    Vector<Scalar> row_sum = {}, row_product = {}, row_of_sum = {}, row_of_product = {};
                    for (std::int64_t x = 0; x < block.made.width * made.lanes; x += made.lanes) {
                        const Vector<Scalar> value = load(z + x), moves = load(of_z + x);
                        const auto own = passed_back<decltype(kind)::kind, Scalar>(
                            cells, value, moves, load(grads + at + x), load(tangents + at + x), slope);
                        row_sum += own.grad;
                        row_product += own.grad * (value - cells.mean);
                        row_of_sum += own.tangent;
                        row_of_product += own.tangent * (value - cells.mean) + own.grad * (moves - cells.of_mean);
                    }
                    sum += row_sum;
                    product += row_product;
                    of_sum += row_of_sum;
                    of_product += row_of_product;
                }
                const auto add = [&](const LayersTask<Scalar>& t, int which, Vector<Scalar> more) {
                    Scalar* to = grad_sum(t, i, example, which) + c;
                    store(to, load(to) + more);
                };
                add(d.value, 0, sum);
                add(d.value, 1, product);
                add(d.along, 0, of_sum);
                add(d.along, 1, of_product);
            }
        });
}

// made <- its gradient, and so its tangent
template <typename Scalar>
void make_grad_tangents(const LayersTangent<Scalar>& d, int i, std::int64_t example) {
    const LayersBlock& block = d.value.network->block[i];
    const LayersImages& made = d.value.layout->block[i].made;
    const Scalar alpha = static_cast<Scalar>(block.slope);
    each_band_of_tangents(
        d, i, example,
        [&](auto kind, std::int64_t first, std::int64_t last, const Scalar* grads, const Scalar* tangents,
            std::int64_t row) {
            for (std::int64_t c = 0; c < made.lanes; c += kLanes<Scalar>) {
                const TangentCells<Scalar> cells(d, i, example, c);
                const auto of = [&](const LayersTask<Scalar>& t, LayersVector which) {
                    return load(cell(t, i, example, which) + c);
                };
                const Vector<Scalar> slope = of(d.value, kLayersSlope), offset = of(d.value, kLayersOffset);
                const Vector<Scalar> of_slope = of(d.along, kLayersSlope), of_offset = of(d.along, kLayersOffset);
                for (std::int64_t y = first; y < last; ++y) {
                    Scalar* z = image_of(d.value, made, example) + y * made.row + c;
                    Scalar* of_z = image_of(d.along, made, example) + y * made.row + c;
                    const std::int64_t at = (y - first) * row + c;
                    for (std::int64_t x = 0; x < block.made.width * made.lanes; x += made.lanes) {
                        const Vector<Scalar> value = load(z + x), moves = load(of_z + x);
                        const auto own = passed_back<decltype(kind)::kind, Scalar>(
                            cells, value, moves, load(grads + at + x), load(tangents + at + x), alpha);
                        const Vector<Scalar> deviation = value - cells.mean;
                        store(z + x, cells.scale * own.grad + slope * deviation + offset);
                        store(of_z + x, cells.scale * own.tangent + cells.of_scale * own.grad +
                                            slope * (moves - cells.of_mean) + of_slope * deviation + of_offset);
                    }
                }
            }
        });
}

// A number and its tangent.
struct Dual {
    double value, tangent;
};

inline Dual operator*(Dual a, Dual b) { return {a.value * b.value, a.tangent * b.value + a.value * b.tangent}; }
inline Dual operator*(double a, Dual b) { return {a * b.value, a * b.tangent}; }
inline Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.tangent + b.tangent}; }

// set_slopes and its tangent: of slope and offset of every cell, and of the gradients of scale, shift and bias.
template <typename Scalar>
void set_slope_tangents(const LayersTangent<Scalar>& d, int i) {
    const LayersTask<Scalar>&value = d.value, &along = d.along;
    const LayersBlock& block = value.network->block[i];
    const LayersBlockPlan& plan = value.layout->block[i];
    const std::int64_t channels = block.made.channels,
                       group = block.norm == LayersNorm::kGroup ? channels / block.groups : 1;
    const double positions = static_cast<double>(block.made.height * block.made.width);
    const auto scales = affine_grad(along, i, 0), shifts = affine_grad(along, i, 1), biases = affine_grad(along, i, 2);
    const auto dual = [&](const Scalar* of_value, std::int64_t c) {
        return Dual{of_value[c], of_value[along.memory - value.memory + c]};
    };
    const auto put = [&](std::int64_t e, LayersVector which, std::int64_t c, Dual found) {
        cell(value, i, e, which)[c] = static_cast<Scalar>(found.value);
        cell(along, i, e, which)[c] = static_cast<Scalar>(found.tangent);
    };
    const Scalar* gammas = value.memory + plan.affine;
    if (block.norm == LayersNorm::kBatch) {
        for (std::int64_t c = 0; c < channels; ++c) {
            Dual sum{}, product{};
            for (std::int64_t e = 0; e < value.count; ++e) {
                sum = sum + dual(grad_sum(value, i, e, 0), c);
                product = product + dual(grad_sum(value, i, e, 1), c);
            }
            const Dual inverse = dual(cell(value, i, 0, kLayersInverse), c), gamma = dual(gammas, c);
            const double share = -1 / (positions * static_cast<double>(value.count));
            scales[c] += (inverse * product).tangent;
            shifts[c] += sum.tangent;
            put(0, kLayersSlope, c, share * (inverse * inverse * inverse * gamma * product));
            put(0, kLayersOffset, c, share * (inverse * gamma * sum));
        }
        return;  // the mean takes the bias away, so its gradient is 0
    }
    for (std::int64_t e = 0; e < value.count; ++e) {
        for (std::int64_t first = 0; first < channels; first += group) {
            const Dual inverse = dual(cell(value, i, e, kLayersInverse), first);
            Dual slope{}, offset{};
            if (block.norm == LayersNorm::kGroup) {
                Dual sum{}, product{};
                for (std::int64_t c = first; c < first + group; ++c) {
                    sum = sum + dual(gammas, c) * dual(grad_sum(value, i, e, 0), c);
                    product = product + dual(gammas, c) * dual(grad_sum(value, i, e, 1), c);
                }
                const double share = -1 / (positions * static_cast<double>(group));
                slope = share * (inverse * inverse * inverse * product);
                offset = share * (inverse * sum);
            }
            for (std::int64_t c = first; c < first + group; ++c) {
                const Dual sum = dual(grad_sum(value, i, e, 0), c);
                scales[c] += (inverse * dual(grad_sum(value, i, e, 1), c)).tangent;
                shifts[c] += sum.tangent;
                const bool alone = block.norm == LayersNorm::kGroup && group == 1;  // the mean takes the bias away
                if (!alone) biases[c] += (inverse * dual(gammas, c) * sum).tangent;
                if (block.norm != LayersNorm::kGroup) continue;
                put(e, kLayersSlope, c, slope);
                put(e, kLayersOffset, c, offset);
                const Dual from_mean = dual(moment(value, i, e, 0), c) + -1.0 * dual(cell(value, i, e, kLayersMean), c);
                if (!alone) biases[c] += positions * (slope * from_mean + offset).tangent;
            }
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
