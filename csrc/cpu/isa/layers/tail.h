// What follows a block's product: normalisation, activation and pooling, forward and backward. What was made is
// normalised as scale * made + shift, also where there is no normalisation: then the shift is the bias.
#pragma once

#include <cstdint>

#include "cpu/isa/layers/activations.h"
#include "cpu/isa/layers/places.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// moments <- mean and squared deviations of an example's channels
template <typename Scalar>
void measure_example(const LayersTask<Scalar>& t, int i, std::int64_t example) {
    const LayersBlock& block = t.network->block[i];
    const LayersImages& made = t.layout->block[i].made;
    const Scalar* image = image_of(t, made, example);
    const Scalar count = static_cast<Scalar>(block.made.height * block.made.width);
    for (std::int64_t c = 0; c < made.lanes; c += kLanes<Scalar>) {
        Vector<Scalar> sum = {}, squares = {};
        for (std::int64_t y = 0; y < block.made.height; ++y) {
            Vector<Scalar> of_row = {};
            const Scalar* z = image + y * made.row + c;
            for (std::int64_t x = 0; x < block.made.width; ++x, z += made.lanes) of_row += load(z);
            sum += of_row;
        }
        const Vector<Scalar> mean = sum / count;
        for (std::int64_t y = 0; y < block.made.height; ++y) {
            Vector<Scalar> of_row = {};
            const Scalar* z = image + y * made.row + c;
            for (std::int64_t x = 0; x < block.made.width; ++x, z += made.lanes) {
                const Vector<Scalar> deviation = load(z) - mean;
                of_row += deviation * deviation;
            }
            squares += of_row;
        }
        store(moment(t, i, example, 0) + c, mean);
        store(moment(t, i, example, 1) + c, squares);
    }
}

// Mean and squared deviations of several sets, put together.
struct Joined {
    double count, mean, squares;

    void take(double n, double of_mean, double of_squares) {
        const double difference = of_mean - mean, share = n / (count + n);
        squares += of_squares + difference * difference * (count * share);
        mean += difference * share;
        count += n;
    }
};

// The cells of one channel, from the statistics of what is normalised, bias included.
template <typename Scalar>
void set_cell(const LayersTask<Scalar>& t, int i, std::int64_t example, std::int64_t c, double mean, double inverse) {
    const LayersBlockPlan& plan = t.layout->block[i];
    const Scalar* affine = t.memory + plan.affine;
    const double without_bias = mean - t.memory[plan.bias + c], scale = affine[c] * inverse;
    cell(t, i, example, kLayersMean)[c] = static_cast<Scalar>(without_bias);
    cell(t, i, example, kLayersInverse)[c] = static_cast<Scalar>(inverse);
    cell(t, i, example, kLayersScale)[c] = static_cast<Scalar>(scale);
    cell(t, i, example, kLayersShift)[c] = static_cast<Scalar>(affine[plan.made.lanes + c] - without_bias * scale);
    cell(t, i, example, kLayersSlope)[c] = 0;
    cell(t, i, example, kLayersOffset)[c] = 0;
}

inline double inverse_of(const Joined& all, double eps) { return 1 / __builtin_sqrt(all.squares / all.count + eps); }

// Mean to shift of every cell, from the moments.
template <typename Scalar>
void set_cells(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    const Scalar* bias = t.memory + t.layout->block[i].bias;
    const std::int64_t channels = block.made.channels, lanes = t.layout->block[i].made.lanes;
    const double positions = static_cast<double>(block.made.height * block.made.width);
    if (block.norm == LayersNorm::kNone) {
        for (std::int64_t c = 0; c < lanes; ++c) set_cell(t, i, 0, c, 0, 1);
    } else if (block.norm == LayersNorm::kBatch) {
        for (std::int64_t c = 0; c < lanes; ++c) {
            Joined all{};
            for (std::int64_t e = 0; e < t.count; ++e) {
                all.take(positions, moment(t, i, e, 0)[c], moment(t, i, e, 1)[c]);
            }
            set_cell(t, i, 0, c, all.mean + bias[c], inverse_of(all, block.eps));
        }
    } else {
        const std::int64_t group = channels / block.groups;
        for (std::int64_t e = 0; e < t.count; ++e) {
            for (std::int64_t first = 0; first < channels; first += group) {
                Joined all{};
                for (std::int64_t c = first; c < first + group; ++c) {
                    all.take(positions, double{moment(t, i, e, 0)[c]} + bias[c], moment(t, i, e, 1)[c]);
                }
                const double inverse = inverse_of(all, block.eps);
                for (std::int64_t c = first; c < first + group; ++c) set_cell(t, i, e, c, all.mean, inverse);
            }
            for (std::int64_t c = channels; c < lanes; ++c) set_cell(t, i, e, c, 0, 0);
        }
    }
}

// ---- pooling of a band of rows --------------------------------------------------------------------------------------

// The positions under a window, as far as they lie inside the image.
struct Under {
    std::int64_t top, bottom, left, right;
    std::int64_t divisor;  // of an average
};

inline Under under_window(const LayersBlock& block, std::int64_t y, std::int64_t x) {
    const LayersWindow& w = block.pool_window;
    const std::int64_t height = block.made.height, width = block.made.width;
    const std::int64_t top = y * w.stride_h - w.pad_h, left = x * w.stride_w - w.pad_w;
    const std::int64_t bottom = least(top + w.height, height + w.pad_h);
    const std::int64_t right = least(left + w.width, width + w.pad_w);
    const Under inside{most(top, 0), least(bottom, height), most(left, 0), least(right, width), 0};
    const std::int64_t divisor = block.counts_padding ? (bottom - top) * (right - left)
                                                      : (inside.bottom - inside.top) * (inside.right - inside.left);
    return {inside.top, inside.bottom, inside.left, inside.right, divisor};
}

// Calls body(y, the window's positions under (y, x), x) for every window whose rows lie in [first, last).
template <typename Body>
void each_window(const LayersBlock& block, std::int64_t first, std::int64_t last, std::int64_t band, const Body& body) {
    const bool whole = band >= block.made.height;
    const std::int64_t from = whole ? 0 : first / band;
    const std::int64_t to = whole ? block.out.height : (last - first == band ? from + 1 : from);
    for (std::int64_t y = from; y < least(to, block.out.height); ++y) {
        for (std::int64_t x = 0; x < block.out.width; ++x) body(y, x, under_window(block, y, x));
    }
}

// The largest of a window, as torch takes it: the first, but a NaN before all others.
template <typename Scalar>
struct Largest {
    Vector<Scalar> value;
    Mask<Scalar> number;  // among the window's positions

    void take(Vector<Scalar> other, typename Simd<Scalar>::Int i) {
        const Mask<Scalar> better = (other > value) | (other != other);
        value = better ? other : value;
        number = better ? i + Mask<Scalar>{} : number;
    }
};

template <typename Scalar>
Largest<Scalar> largest_of(const Scalar* values, std::int64_t row, std::int64_t lanes, std::int64_t height,
                           std::int64_t width) {
    Largest<Scalar> best{load(values), Mask<Scalar>{}};
    if (height == 2 && width == 2) {  // without a loop
        best.take(load(values + lanes), 1);
        best.take(load(values + row), 2);
        best.take(load(values + row + lanes), 3);
        return best;
    }
    typename Simd<Scalar>::Int i = 0;
    for (std::int64_t y = 0; y < height; ++y) {
        for (std::int64_t x = 0; x < width; ++x, ++i) {
            if (i > 0) best.take(load(values + y * row + x * lanes), i);
        }
    }
    return best;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// to [rows, width, lanes] <- the activation of rows [first, first + rows) of an example
template <LayersActivation kKind, typename Scalar>
void activate_rows(const LayersTask<Scalar>& t, int i, std::int64_t example, std::int64_t first, std::int64_t rows,
                   Scalar* to, std::int64_t to_row) {
    const LayersBlock& block = t.network->block[i];
    const LayersImages& made = t.layout->block[i].made;
    const Scalar slope = static_cast<Scalar>(block.slope);
    for (std::int64_t c = 0; c < made.lanes; c += kLanes<Scalar>) {
        const Vector<Scalar> scale = load(cell(t, i, example, kLayersScale) + c);
        const Vector<Scalar> shift = load(cell(t, i, example, kLayersShift) + c);
        for (std::int64_t y = 0; y < rows; ++y) {
            const Scalar* z = image_of(t, made, example) + (first + y) * made.row + c;
            Scalar* at = to + y * to_row + c;
            for (std::int64_t x = 0; x < block.made.width; ++x, z += made.lanes, at += made.lanes) {
                store(at, activated<kKind, Scalar>(scale * load(z) + shift, slope));
            }
        }
    }
}

// out, an image of rows out_row apart, <- the averages over the windows of a band `values` [last - first, width,
// lanes]; or, of all positions, out [lanes] += their share.
template <typename Scalar>
void average_band(const LayersBlock& block, std::int64_t band, std::int64_t lanes, std::int64_t first,
                  std::int64_t last, const Scalar* values, Scalar* out, std::int64_t out_row) {
    const std::int64_t width = block.made.width;
    if (block.pool == LayersPool::kMean) {
        const Scalar share = Scalar(1) / static_cast<Scalar>(block.made.height * width);
        for (std::int64_t c = 0; c < lanes; c += kLanes<Scalar>) {
            Vector<Scalar> sum = {};
            for (std::int64_t x = 0; x < (last - first) * width; ++x) sum += load(values + x * lanes + c);
            store(out + c, load(out + c) + share * sum);
        }
        return;
    }
    each_window(block, first, last, band, [&](std::int64_t y, std::int64_t x, const Under& under) {
        const Scalar* from = values + ((under.top - first) * width + under.left) * lanes;
        const std::int64_t rows = under.bottom - under.top, columns = under.right - under.left;
        for (std::int64_t c = 0; c < lanes; c += kLanes<Scalar>) {
            Vector<Scalar> sum = {};
            for (std::int64_t p = 0; p < rows * columns; ++p) {
                sum += load(from + (p / columns * width + p % columns) * lanes + c);
            }
            store(out + y * out_row + x * lanes + c, sum / static_cast<Scalar>(under.divisor));
        }
    });
}

// The block's output of an example, from what was made and the cells.
template <typename Scalar>
void finish_example(const LayersTask<Scalar>& t, int i, std::int64_t example) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const LayersImages& to = output_of(t, i);
    const std::int64_t lanes = plan.made.lanes, width = block.made.width, height = block.made.height;
    Scalar* out = image_of(t, to, example);
    Scalar* values = t.memory + t.layout->scratch;
    with_activation(block.activation, [&](auto kind) {
        constexpr LayersActivation kKind = decltype(kind)::kind;
        if (block.pool == LayersPool::kNone) {
            activate_rows<kKind>(t, i, example, 0, height, out, to.row);
            return;
        }
        if (block.pool == LayersPool::kMean) fill_zero(out, lanes);
        for (std::int64_t first = 0; first < height; first += plan.band) {
            const std::int64_t last = least(first + plan.band, height);
            activate_rows<kKind>(t, i, example, first, last - first, values, width * lanes);
            if (block.pool == LayersPool::kMax) {
                each_window(block, first, last, plan.band, [&](std::int64_t y, std::int64_t x, const Under& under) {
                    const Scalar* from = values + ((under.top - first) * width + under.left) * lanes;
                    Scalar* at = out + y * to.row + x * lanes;
                    const std::int64_t rows = under.bottom - under.top, columns = under.right - under.left;
                    for (std::int64_t c = 0; c < lanes; c += kLanes<Scalar>) {
                        store(at + c, largest_of(from + c, width * lanes, lanes, rows, columns).value);
                    }
                });
                continue;
            }
            average_band(block, plan.band, lanes, first, last, static_cast<const Scalar*>(values), out, to.row);
        }
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// grads [rows, width, lanes] <- the gradient of the activation's output in rows [first, last) of an example, from that
// of the block's output. values: the activation's output there, for a maximum.
template <typename Scalar>
void spread_grads(const LayersTask<Scalar>& t, int i, std::int64_t example, std::int64_t first, std::int64_t last,
                  Scalar* grads, const Scalar* values) {
    const LayersBlock& block = t.network->block[i];
    const std::int64_t lanes = t.layout->block[i].made.lanes, width = block.made.width;
    const std::int64_t out_row = block.out.width * lanes;
    const Scalar* from = output_grad(t, i) + example * block.out.height * out_row;
    if (block.pool == LayersPool::kMean) {
        const Scalar share = Scalar(1) / static_cast<Scalar>(block.made.height * width);
        for (std::int64_t c = 0; c < lanes; c += kLanes<Scalar>) {
            const Vector<Scalar> each = share * load(from + c);
            for (std::int64_t x = 0; x < (last - first) * width; ++x) store(grads + x * lanes + c, each);
        }
        return;
    }
    fill_zero(grads, (last - first) * width * lanes);
    const bool takes_largest = block.pool == LayersPool::kMax;
    // Then each position has at most one gradient.
    const bool apart =
        block.pool_window.stride_h >= block.pool_window.height && block.pool_window.stride_w >= block.pool_window.width;
    each_window(block, first, last, t.layout->block[i].band, [&](std::int64_t y, std::int64_t x, const Under& under) {
        const std::int64_t place = ((under.top - first) * width + under.left) * lanes;
        const std::int64_t rows = under.bottom - under.top, columns = under.right - under.left;
        for (std::int64_t c = 0; c < lanes; c += kLanes<Scalar>) {
            Vector<Scalar> grad = load(from + y * out_row + x * lanes + c);
            Mask<Scalar> number = {};
            if (takes_largest) {
                number = largest_of(values + place + c, width * lanes, lanes, rows, columns).number;
            } else {
                grad /= static_cast<Scalar>(under.divisor);
            }
            typename Simd<Scalar>::Int own = 0;
            for (std::int64_t of_row = 0; of_row < rows; ++of_row) {
                Scalar* at = grads + place + of_row * width * lanes + c;
                for (std::int64_t column = 0; column < columns; ++column, ++own, at += lanes) {
                    const Vector<Scalar> taken = takes_largest ? (number == own ? grad : Vector<Scalar>{}) : grad;
                    store(at, apart ? taken : load(at) + taken);
                }
            }
        }
    });
}

// Calls body(kind, first, last, grads, row) for the bands of an example: grads [last - first, width, lanes] is the
// gradient of the activation's output, `row` scalars from one row to the next.
template <typename Scalar, typename Body>
void each_band_of_grads(const LayersTask<Scalar>& t, int i, std::int64_t example, const Body& body) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const std::int64_t row = block.made.width * plan.made.lanes, height = block.made.height;
    with_activation(block.activation, [&](auto kind) {
        if (block.pool == LayersPool::kNone) {
            body(kind, 0, height, output_grad(t, i) + example * height * row, row);
            return;
        }
        Scalar* grads = t.memory + t.layout->scratch;
        for (std::int64_t first = 0; first < height; first += plan.band) {
            const std::int64_t last = least(first + plan.band, height);
            Scalar* values = grads + plan.band * row;
            if (block.pool == LayersPool::kMax) {
                activate_rows<decltype(kind)::kind>(t, i, example, first, last - first, values, row);
            }
            spread_grads(t, i, example, first, last, grads, static_cast<const Scalar*>(values));
            body(kind, first, last, static_cast<const Scalar*>(grads), row);
        }
    });
}

// sums <- of an example: the gradient of what is normalised, and it times (made - mean)
template <typename Scalar>
void sum_grads(const LayersTask<Scalar>& t, int i, std::int64_t example) {
    const LayersBlock& block = t.network->block[i];
    const LayersImages& made = t.layout->block[i].made;
    const Scalar slope = static_cast<Scalar>(block.slope);
    fill_zero(grad_sum(t, i, example, 0), 2 * made.lanes);
    each_band_of_grads(
        t, i, example, [&](auto kind, std::int64_t first, std::int64_t last, const Scalar* grads, std::int64_t row) {
            for (std::int64_t c = 0; c < made.lanes; c += kLanes<Scalar>) {
                const Vector<Scalar> scale = load(cell(t, i, example, kLayersScale) + c);
                const Vector<Scalar> shift = load(cell(t, i, example, kLayersShift) + c);
                const Vector<Scalar> mean = load(cell(t, i, example, kLayersMean) + c);
                Vector<Scalar> sum = {}, product = {};
                for (std::int64_t y = first; y < last; ++y) {
                    const Scalar* z = image_of(t, made, example) + y * made.row + c;
                    const Scalar* grad = grads + (y - first) * row + c;
                    Vector<Scalar> of_row = {}, product_of_row = {};
                    for (std::int64_t x = 0; x < block.made.width; ++x, z += made.lanes, grad += made.lanes) {
                        const Vector<Scalar> value = load(z);
                        const Vector<Scalar> own =
                            passed<decltype(kind)::kind, Scalar>(scale * value + shift, load(grad), slope);
                        of_row += own;
                        product_of_row += own * (value - mean);
                    }
                    sum += of_row;
                    product += product_of_row;
                }
                store(grad_sum(t, i, example, 0) + c, load(grad_sum(t, i, example, 0) + c) + sum);
                store(grad_sum(t, i, example, 1) + c, load(grad_sum(t, i, example, 1) + c) + product);
            }
        });
}

// made <- its gradient
template <typename Scalar>
void make_grad(const LayersTask<Scalar>& t, int i, std::int64_t example) {
    const LayersBlock& block = t.network->block[i];
    const LayersImages& made = t.layout->block[i].made;
    const Scalar alpha = static_cast<Scalar>(block.slope);
    each_band_of_grads(
        t, i, example, [&](auto kind, std::int64_t first, std::int64_t last, const Scalar* grads, std::int64_t row) {
            for (std::int64_t c = 0; c < made.lanes; c += kLanes<Scalar>) {
                const auto of = [&](LayersVector which) { return load(cell(t, i, example, which) + c); };
                const Vector<Scalar> scale = of(kLayersScale), shift = of(kLayersShift), mean = of(kLayersMean);
                const Vector<Scalar> slope = of(kLayersSlope), offset = of(kLayersOffset);
                for (std::int64_t y = first; y < last; ++y) {
                    Scalar* z = image_of(t, made, example) + y * made.row + c;
                    const Scalar* grad = grads + (y - first) * row + c;
                    for (std::int64_t x = 0; x < block.made.width; ++x, z += made.lanes, grad += made.lanes) {
                        const Vector<Scalar> value = load(z);
                        const Vector<Scalar> own =
                            passed<decltype(kind)::kind, Scalar>(scale * value + shift, load(grad), alpha);
                        store(z, scale * own + slope * (value - mean) + offset);
                    }
                }
            }
        });
}

// Slope and offset of every cell, and the gradients of scale, shift and bias, from the sums.
template <typename Scalar>
void set_slopes(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const std::int64_t channels = block.made.channels,
                       group = block.norm == LayersNorm::kGroup ? channels / block.groups : 1;
    const Scalar* gamma = t.memory + plan.affine;
    const double positions = static_cast<double>(block.made.height * block.made.width);
    const auto scales = affine_grad(t, i, 0), shifts = affine_grad(t, i, 1), biases = affine_grad(t, i, 2);
    if (block.norm == LayersNorm::kBatch) {
        for (std::int64_t c = 0; c < channels; ++c) {
            double sum = 0, product = 0;
            for (std::int64_t e = 0; e < t.count; ++e) {
                sum += grad_sum(t, i, e, 0)[c];
                product += grad_sum(t, i, e, 1)[c];
            }
            const double inverse = cell(t, i, 0, kLayersInverse)[c], count = positions * static_cast<double>(t.count);
            scales[c] += inverse * product;
            shifts[c] += sum;
            cell(t, i, 0, kLayersSlope)[c] =
                static_cast<Scalar>(-inverse * inverse * inverse * gamma[c] * product / count);
            cell(t, i, 0, kLayersOffset)[c] = static_cast<Scalar>(-inverse * gamma[c] * sum / count);
        }
        return;  // the mean takes the bias away, so its gradient is 0
    }
    for (std::int64_t e = 0; e < t.count; ++e) {
        for (std::int64_t first = 0; first < channels; first += group) {
            double slope = 0, offset = 0;
            const double inverse = cell(t, i, e, kLayersInverse)[first];
            if (block.norm == LayersNorm::kGroup) {
                double sum = 0, product = 0;
                for (std::int64_t c = first; c < first + group; ++c) {
                    sum += double{gamma[c]} * grad_sum(t, i, e, 0)[c];
                    product += double{gamma[c]} * grad_sum(t, i, e, 1)[c];
                }
                const double count = positions * static_cast<double>(group);
                slope = -inverse * inverse * inverse * product / count;
                offset = -inverse * sum / count;
            }
            for (std::int64_t c = first; c < first + group; ++c) {
                const double sum = grad_sum(t, i, e, 0)[c];
                scales[c] += inverse * grad_sum(t, i, e, 1)[c];
                shifts[c] += sum;
                const bool alone = block.norm == LayersNorm::kGroup && group == 1;  // the mean takes the bias away
                if (!alone) biases[c] += inverse * gamma[c] * sum;
                if (block.norm != LayersNorm::kGroup) continue;
                cell(t, i, e, kLayersSlope)[c] = static_cast<Scalar>(slope);
                cell(t, i, e, kLayersOffset)[c] = static_cast<Scalar>(offset);
                const double from_mean = double{moment(t, i, e, 0)[c]} - cell(t, i, e, kLayersMean)[c];
                if (!alone) biases[c] += positions * (slope * from_mean + offset);
            }
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
