// A strided convolution, or the gradient of its inputs, with the products that shared_axis.h shares.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/direct.h"
#include "cpu/isa/conv/shared_axis.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// Images of positions of channels.
template <typename Scalar>
struct Images {
    const Scalar* first;
    std::int64_t image, row, channels;
};

// Positions of several images: rows and columns at regular steps.
struct Box {
    std::int64_t images, rows, columns;
    std::int64_t row_step, column_step;

    std::int64_t count() const { return images * rows * columns; }
};

template <typename Scalar, bool kRows, bool kColumns>
void copy_blended(Scalar* to, std::int64_t to_step, const Images<Scalar>& from, const Blend& rows, const Blend& columns,
                  const Box& box) {
    const Vector<Scalar> row_sign = all(static_cast<Scalar>(rows.sign));
    const Vector<Scalar> column_sign = all(static_cast<Scalar>(columns.sign));
    const std::int64_t channels = from.channels, step = box.column_step * channels;
    const std::int64_t row_apart = (rows.other - rows.at) * from.row, apart = (columns.other - columns.at) * channels;
    const auto blended = [apart, column_sign](const Scalar* x) {
        return kColumns ? load(x) + column_sign * load(x + apart) : load(x);
    };
    for (std::int64_t image = 0; image < box.images; ++image) {
        for (std::int64_t y = 0; y < box.rows; ++y) {
            const Scalar* x =
                from.first + image * from.image + (rows.at + y * box.row_step) * from.row + columns.at * channels;
            for (std::int64_t i = 0; i < box.columns; ++i, to += to_step, x += step) {
                for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                    store(to + c, kRows ? blended(x + c) + row_sign * blended(x + row_apart + c) : blended(x + c));
                }
            }
        }
    }
}

// to [positions, to_step] <- the combination of rows and columns at each position of the box
template <typename Scalar>
void copy_blended(Scalar* to, std::int64_t to_step, const Images<Scalar>& from, const Blend& rows, const Blend& columns,
                  const Box& box) {
    const auto copy = rows.sign == 0
                          ? (columns.sign == 0 ? copy_blended<Scalar, false, false> : copy_blended<Scalar, false, true>)
                          : (columns.sign == 0 ? copy_blended<Scalar, true, false> : copy_blended<Scalar, true, true>);
    copy(to, to_step, from, rows, columns, box);
}

// Where the weights for a row number and a column number lie among the mixed ones. One of the numbers is 3 or 4.
inline std::int64_t mixed_place(int row, int column) { return row < 3 ? 2 * row + column - 3 : 5 * row + column - 9; }

// How many scalars of a matrix are mixed before the next matrix: the prefetcher tracks only a few streams.
constexpr std::int64_t kMixedStretch = 512;

// sum, difference <- (a + b) / 2, (a - b) / 2
template <typename Scalar>
void mix(Scalar* sum, Scalar* difference, const Scalar* a, const Scalar* b, std::int64_t count) {
    const Vector<Scalar> half = all(Scalar(0.5));
    for (std::int64_t i = 0; i < count; i += kLanes<Scalar>) {
        const Vector<Scalar> one = load(a + i), other = load(b + i);
        store(sum + i, half * (one + other));
        store(difference + i, half * (one - other));
    }
}

// to [groups, 16, inputs, group] <- half sums and half differences of `weight` [groups, 9, inputs, group]
template <typename Scalar>
void mix_weights(Scalar* to, const Scalar* weight, std::int64_t inputs, std::int64_t channels, std::int64_t group) {
    const std::int64_t tap = inputs * group;
    for (std::int64_t first = 0; first < channels; first += group, weight += 9 * tap, to += 16 * tap) {
        for (std::int64_t i = 0; i < tap; i += kMixedStretch) {
            const std::int64_t count = least(kMixedStretch, tap - i);
            const auto of = [&](int row, int column) { return weight + (3 * row + column) * tap + i; };
            const auto mixed = [&](int row, int column) { return to + mixed_place(row, column) * tap + i; };
            for (int x = 0; x < 3; ++x) mix(mixed(3, x), mixed(4, x), of(0, x), of(2, x), count);
            for (int y = 0; y < 3; ++y) mix(mixed(y, 3), mixed(y, 4), of(y, 0), of(y, 2), count);
            for (int y = 3; y < 5; ++y) mix<Scalar>(mixed(y, 3), mixed(y, 4), mixed(y, 0), mixed(y, 2), count);
        }
    }
}

// A convolution of several images at once.
template <typename Scalar>
struct SharedConvolution {
    Scalar* out;
    std::int64_t out_image, out_row;
    Images<Scalar> x;  // in the same memory as scratch
    std::int64_t images, inputs;
    const Scalar* weight;  // [groups, 9, inputs, group]
    const Scalar* mixed;   // [groups, 16, inputs, group], in the same memory
    int vectors;
    bool add;  // to what is in `out`
};

// The targets of a term's outputs. Their places are set later.
template <typename Scalar>
ToTargets targets_of(const SharedConvolution<Scalar>& conv, const AxisTerm& rows, const AxisTerm& columns) {
    ToTargets to;
    to.add = conv.add || rows.adds || columns.adds;
    for (int y = 0; y < rows.targets; ++y) {
        for (int x = 0; x < columns.targets; ++x) {
            const AxisTerm::Target row = rows.target[y], column = columns.target[x];
            to.signs[to.targets] = row.sign * column.sign;
            to.all_targets[to.targets++] = row.out * conv.out_row + column.out * conv.x.channels;
        }
    }
    return to;
}

// Steps from one image, row and position to the next.
struct PlaceSteps {
    std::int64_t image, row, position;
};

inline void set_places(std::int64_t* places, const PlaceSteps& steps, const Box& box) {
    for (std::int64_t image = 0; image < box.images; ++image) {
        for (std::int64_t y = 0; y < box.rows; ++y) {
            std::int64_t place = image * steps.image + y * steps.row;
            for (std::int64_t x = 0; x < box.columns; ++x, place += steps.position) *places++ = place;
        }
    }
}

// Sets the weights of the runs: one run for each product of a row with a product of a column. `to_mixed` leads from the
// group's weights to its mixed ones.
inline void choose_weights(Runs& runs, const AxisTerm& rows, const AxisTerm& columns, std::int64_t tap,
                           std::int64_t to_mixed) {
    Run* run = runs.run;
    for (int i = 0; i < rows.products; ++i) {
        for (int j = 0; j < columns.products; ++j, ++run) {
            const int y = rows.product[i].weight, x = columns.product[j].weight;
            run->weight = y < 3 && x < 3 ? (y * 3 + x) * tap : to_mixed + mixed_place(y, x) * tap;
        }
    }
}

// One term of the rows times one of the columns. An input that is a single value is read where it lies; a combination
// is copied to scratch first. scratch: conv_shared_scratch scalars.
template <typename Scalar>
void convolve_shared(const SharedConvolution<Scalar>& conv, const AxisTerm& rows, const AxisTerm& columns,
                     Scalar* scratch) {
    const std::int64_t channels = conv.x.channels, group = conv.vectors * kLanes<Scalar>, tap = conv.inputs * group;
    ToTargets to = targets_of(conv, rows, columns);
    std::int64_t places[kConvSharedPositions], of_x[kConvSharedPositions], of_copies[kConvSharedPositions];
    to.places = places;
    PositionTable from;
    Runs runs{};
    runs.count = rows.products * columns.products;
    runs.length = conv.inputs;
    const std::int64_t at_once = most(1, kConvSharedPositions / (rows.count * columns.count * runs.count));
    Box box{least(at_once, conv.images), rows.count, columns.count, rows.x_step, columns.x_step};
    set_places(places, {conv.out_image, rows.out_step * conv.out_row, columns.out_step * channels}, box);
    set_places(of_x, {conv.x.image, rows.x_step * conv.x.row, columns.x_step * channels}, box);
    for (std::int64_t i = 0; i < box.count(); ++i) of_copies[i] = i * channels;
    for (std::int64_t first = 0; first < conv.images; first += at_once) {
        box.images = least(at_once, conv.images - first);
        Images<Scalar> x = conv.x;
        x.first += first * x.image;
        std::int64_t copied = 0;
        for (int i = 0; i < rows.products; ++i) {
            for (int j = 0; j < columns.products; ++j) {
                const Blend row = rows.product[i].x, column = columns.product[j].x;
                const int run = i * columns.products + j;
                if (row.sign == 0 && column.sign == 0) {
                    runs.run[run].input = x.first - scratch + row.at * x.row + column.at * channels;
                    from.of_run[run] = of_x;
                } else {
                    runs.run[run].input = copied;
                    from.of_run[run] = of_copies;
                    copy_blended(scratch + copied, channels, x, row, column, box);
                    copied += box.count() * channels;
                }
            }
        }
        for (std::int64_t c = 0; c < channels; c += group) {
            const Scalar* weight = conv.weight + c * 9 * conv.inputs;
            choose_weights(runs, rows, columns, tap, conv.mixed + c * 16 * conv.inputs - weight);
            convolve_positions(conv.out + first * conv.out_image + c, to, scratch, from, box.count(), runs, weight,
                               conv.vectors);
        }
    }
}

template <typename Scalar>
void convolve_shared(const SharedConvolution<Scalar>& conv, const Axis& rows, const Axis& columns, Scalar* scratch) {
    for (int r = 0; r < rows.terms; ++r) {
        for (int c = 0; c < columns.terms; ++c) convolve_shared(conv, rows.term[r], columns.term[c], scratch);
    }
}

// How many outputs of an axis are convolved at once, in both directions. With these no pair of terms has more products
// times positions than half of kConvSharedPositions.
constexpr std::int64_t kSharedColumns = 30;
constexpr std::int64_t shared_rows(std::int64_t columns) {
    return 2 * most(1, kConvSharedPositions / 8 / ((columns + 1) / 2));
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
