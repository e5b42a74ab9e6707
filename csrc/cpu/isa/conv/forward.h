// A block forward, up to its statistics and winners.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/first_block.h"
#include "cpu/isa/conv/norm_and_pool.h"
#include "cpu/isa/conv/shared_products.h"
#include "cpu/isa/conv/winograd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// raw (+)= some rows of the convolution of a block after the first, without shared products
template <typename Scalar>
void convolve_rows(const ConvTask<Scalar>& t, int block, const Rows& rows, bool add, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>;
    const std::int64_t row = (b.out_w + 2) * channels, row_in = (b.in_w + 2) * channels;
    Scalar* raw = raw_row(t, block, rows.example, rows.first);
    if (b.winograd) {
        const Scalar* x = input_row(t, block, rows.example, rows.first);
        winograd<Scalar>({raw, row, x, row_in, rows.count, b.out_w, b.inputs, channels, channels, add},
                         t.at(t.layout->transformed), b.vectors, scratch);
        return;
    }
    const Runs runs = window_runs(row_in, channels, b.inputs, group);
    for (std::int64_t first = 0; first < channels; first += group) {
        convolve_grid(raw + first, {channels, row}, input_row(t, block, rows.example, rows.first),
                      {b.stride * channels, b.stride * row_in}, rows.count, b.out_w, runs,
                      t.at(b.weight) + first * 9 * b.inputs, b.vectors, add);
    }
}

// raw (+)= some rows of the convolution of several images, with shared products
template <typename Scalar>
void convolve_strided(const ConvTask<Scalar>& t, int block, const Rows& rows, std::int64_t images, bool add,
                      Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels, in_row = (b.in_w + 2) * channels;
    for (std::int64_t left = 0; left < b.out_w; left += kSharedColumns) {
        const std::int64_t right = least(left + kSharedColumns, b.out_w), end = rows.first + rows.count;
        for (std::int64_t top = rows.first, bottom; top < end; top = bottom) {
            bottom = least(top + shared_rows(right - left), end);
            convolve_shared<Scalar>({raw_row(t, block, rows.example, top) + left * channels,
                                     (b.out_h + 2) * row,
                                     row,
                                     {input_row(t, block, rows.example, 0), (b.in_h + 2) * in_row, in_row, channels},
                                     images,
                                     b.inputs,
                                     t.at(b.weight),
                                     t.at(t.layout->transformed),
                                     b.vectors,
                                     add},
                                    strided_axis(top, bottom, b.in_h, b.out_h),
                                    strided_axis(left, right, b.in_w, b.out_w), scratch + t.layout->shared_scratch);
        }
    }
}

// raw (+)= the convolution of `item` of [first, last), of a block after the first. Where items are convolved together,
// this does so with the first of them.
template <typename Scalar>
void convolve_item(const ConvTask<Scalar>& t, int block, std::int64_t item, std::int64_t first, std::int64_t last,
                   bool add, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const Rows rows = raw_rows(t, block, item);
    if (!b.shared) {
        convolve_rows(t, block, rows, add, scratch);
    } else if ((item - first) % b.forward_items == 0) {
        convolve_strided(t, block, rows, least(b.forward_items, last - item), add, scratch);
    }
}

template <typename Scalar>
void convolve(const ConvTask<Scalar>& t, int block, std::int64_t first, std::int64_t last, bool add, Scalar* scratch) {
    for (std::int64_t item = first; item < last; ++item) convolve_item(t, block, item, first, last, add, scratch);
}

template <typename Scalar>
void forward(const ConvTask<Scalar>& t, int block, std::int64_t first, std::int64_t last, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    for (std::int64_t item = first; item < last; ++item) {
        if (block == 0) {
            forward_first(t, item, scratch);
            continue;
        }
        const Rows rows = raw_rows(t, block, item);
        Scalar* raw = raw_row(t, block, rows.example, rows.first);
        convolve_item(t, block, item, first, last, /*add=*/false, scratch);
        item_statistics(t.partial(item), raw, row, rows.count, b.out_w);
        if (b.stride == 2) continue;
        Scalar* winners = t.at(b.winner) + rows.example * b.act_h * b.act_w * channels;
        choose_winners(t, block, rows, raw, row,
                       [&](std::int64_t y, std::int64_t x, std::int64_t c, Vector<Scalar> winner) {
                           store(winners + (y * b.act_w + x) * channels + c, winner);
                       });
    }
}

template <typename Scalar>
Scalar root(double x) {
    return static_cast<Scalar>(__builtin_sqrt(x));
}

template <typename Scalar>
void statistics(const ConvTask<Scalar>& t, int block) {
    double mean[kConvFilters] = {}, variance[kConvFilters] = {};
    if (block == 0) {
        moments_of_patches(t, mean, variance);
    } else {
        moments_of_items(t, block, mean, variance);
    }
    for (std::int64_t c = 0; c < t.layout->channels; ++c) {
        const Scalar inverse = root<Scalar>(1 / (variance[c] + t.shape->eps[block]));
        const Scalar scale = t.vector(block, kGamma)[c] * inverse;
        t.vector(block, kMean)[c] = static_cast<Scalar>(mean[c]);
        t.vector(block, kInverse)[c] = inverse;
        t.vector(block, kScale)[c] = scale;
        t.vector(block, kShift)[c] = static_cast<Scalar>(t.vector(block, kBeta)[c] - mean[c] * scale);
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
