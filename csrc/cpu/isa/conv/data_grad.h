// The gradient of a block's input.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/first_block_grad.h"
#include "cpu/isa/conv/norm_and_pool.h"
#include "cpu/isa/conv/shared_products.h"
#include "cpu/isa/conv/winograd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// out (+)= some rows of the data gradient of one image, by direct convolution
template <typename Scalar>
void data_grad_directly(const ConvTask<Scalar>& t, int block, const Rows& rows, Scalar* out, bool add) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, filters = t.shape->filters;
    const std::int64_t group = b.vectors_back * kLanes<Scalar>, row = (b.out_w + 2) * channels;
    const Scalar* grads = t.at(b.raw) + (rows.example * (b.out_h + 2) + rows.first) * row;
    for (std::int64_t first = 0; first < channels; first += group) {
        convolve_grid(out + first, {channels, b.in_w * channels}, grads, {channels, row}, rows.count, b.in_w,
                      window_runs(row, channels, filters, group), t.at(t.layout->weight_back) + first * 9 * filters,
                      b.vectors_back, add);
    }
}

// out (+)= some rows of the data gradient of several images, with shared products. out_image leads from the first row
// of one image to that of the next.
template <typename Scalar>
void data_grad_strided(const ConvTask<Scalar>& t, int block, const Rows& rows, std::int64_t images, Scalar* out,
                       std::int64_t out_image, bool add, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels, out_row = b.in_w * channels;
    const Scalar* grads = t.at(b.raw) + rows.example * (b.out_h + 2) * row;
    for (std::int64_t left = 0; left < b.in_w; left += 2 * kSharedColumns) {
        const std::int64_t right = least(left + 2 * kSharedColumns, b.in_w), end = rows.first + rows.count;
        for (std::int64_t top = rows.first, bottom; top < end; top = bottom) {
            bottom = least(top + 2 * shared_rows((right - left + 1) / 2), end);
            convolve_shared<Scalar>({out + (top - rows.first) * out_row + left * channels,
                                     out_image,
                                     out_row,
                                     {grads, (b.out_h + 2) * row, row, channels},
                                     images,
                                     t.shape->filters,
                                     t.at(t.layout->weight_back),
                                     t.at(t.layout->transformed),
                                     b.vectors_back,
                                     add},
                                    gathering_axis(top, bottom, b.out_h), gathering_axis(left, right, b.out_w),
                                    scratch + t.layout->shared_scratch);
        }
    }
}

template <typename Scalar>
void grad_sums(const ConvTask<Scalar>& t, int block, std::int64_t item, Scalar* scratch) {
    if (block == 0) {
        grad_sums_first(t, item, scratch);
    } else {
        grad_sums_later(t, block, item, scratch);
    }
}

// activation_grad of block - 1 (+)= the data gradient of `item` of [first, last). Where items share products, this does
// all of them with the first.
template <typename Scalar>
void convolve_back_item(const ConvTask<Scalar>& t, int block, std::int64_t item, std::int64_t first, std::int64_t last,
                        bool add, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const ConvBlockPlan& before = t.block(block - 1);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    const Rows rows = rows_of(item, before.half_items, before.act_rows, before.act_h);
    Scalar* out = activation_grad_row(t, block - 1, rows.example, rows.first, grad_in_scratch(t, item, first, scratch));
    if (b.winograd) {
        const Scalar* grads = t.at(b.raw) + (rows.example * (b.out_h + 2) + rows.first) * row;
        winograd<Scalar>(
            {out, b.in_w * channels, grads, row, rows.count, b.in_w, t.shape->filters, channels, channels, add},
            t.at(t.layout->transformed), b.vectors_back, scratch);
    } else if (!b.shared) {
        data_grad_directly(t, block, rows, out, add);
    } else if (item == first) {
        const std::int64_t image =
            t.layout->first_grad_in_scratch && block == 1 ? t.layout->first_grad : b.in_h * b.in_w * channels;
        data_grad_strided(t, block, rows, last - first, out, image, add, scratch);
    }
}

template <typename Scalar>
void convolve_back(const ConvTask<Scalar>& t, int block, std::int64_t first, std::int64_t last, bool add,
                   Scalar* scratch) {
    for (std::int64_t item = first; item < last; ++item) convolve_back_item(t, block, item, first, last, add, scratch);
}

// activation_grad of block - 1, then grad_sums of it.
template <typename Scalar>
void data_grad(const ConvTask<Scalar>& t, int block, std::int64_t first, std::int64_t last, Scalar* scratch) {
    for (std::int64_t item = first; item < last; ++item) {
        convolve_back_item(t, block, item, first, last, /*add=*/false, scratch);
        grad_sums(t, block - 1, item, grad_in_scratch(t, item, first, scratch));
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
