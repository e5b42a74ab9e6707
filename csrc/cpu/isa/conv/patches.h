// Sums over the patches that block 0 convolves: they give its statistics before it runs.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/register_tiles.h"
#include "cpu/isa/conv/task_rows.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

template <typename Scalar>
void patch_sum(const ConvTask<Scalar>& t, std::int64_t item) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t c = b.inputs, step = b.stride * c;
    Scalar* sums = t.partial(item).patch_sums();
    constexpr int kL = kLanes<Scalar>;
    for (std::int64_t dy = 0; dy < 3; ++dy) {
        for (std::int64_t j = 0; j < 3 * c; j += kL) {  // of a window's row; lanes beyond it add up what nobody reads
            Vector<Scalar> sum = {};
            for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
                const Scalar* x = input_row(t, 0, rows.example, y) + dy * (b.in_w + 2) * c + j;
                Vector<Scalar> of_row[4] = {};
                std::int64_t i = 0;
                for (; i + 4 <= b.out_w; i += 4, x += 4 * step) {
#pragma GCC unroll 4
                    for (int k = 0; k < 4; ++k) of_row[k] += load_loose(x + k * step);
                }
                for (; i < b.out_w; ++i, x += step) of_row[0] += load_loose(x);
                sum += (of_row[0] + of_row[1]) + (of_row[2] + of_row[3]);
            }
            for (std::int64_t k = 0; k < least(kL, 3 * c - j); ++k) sums[dy * 3 * c + j + k] = sum[k];
        }
    }
}

// Rows of the padded image, grouped by which window rows cover them: bit k of the group's number, 1 to 7, stands for
// window row k. The rows of a group are `stride` apart.
struct MetRows {
    std::int64_t first[8] = {}, count[8] = {};
};

inline MetRows met_rows(std::int64_t in, std::int64_t out, std::int64_t stride) {
    MetRows met;
    for (std::int64_t y = in + 1; y >= 0; --y) {
        int by = 0;
        for (int row = 0; row < 3; ++row) {
            const std::int64_t from = y - row;
            if (from >= 0 && from % stride == 0 && from / stride < out) by |= 1 << row;
        }
        met.first[by] = y;
        ++met.count[by];
    }
    return met;
}

// patch_covariance for images of one channel: positions side by side fill vectors. scratch: a stretch of rows as the
// three columns of a window see it, centred, [rows, 3, lanes].
template <typename Scalar>
void patch_covariance_gray(const ConvTask<Scalar>& t, std::int64_t example, Scalar* scratch) {
    constexpr std::int64_t kL = kLanes<Scalar>, kRowsAtOnce = 32;
    static_assert((2 * kRowsAtOnce + 1) * 3 * kL <= kConvCovarianceSums, "a stretch of rows fits");
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t stride = b.stride, row = b.in_w + 2;
    const Vector<Scalar> center = all(static_cast<Scalar>(t.patch_mean()[4]));
    Scalar* to = t.partial(example).patch_products();
    for (int i = 0; i < 81; ++i) to[i] = 0;
    for (std::int64_t left = 0; left < b.out_w; left += kL) {
        Mask<Scalar> met{};
        for (std::int64_t lane = 0; lane < least(kL, b.out_w - left); ++lane) met[lane] = -1;
        for (std::int64_t top = 0; top < b.out_h; top += kRowsAtOnce) {
            const std::int64_t rows = least(kRowsAtOnce, b.out_h - top);
            for (std::int64_t y = 0; y < (rows - 1) * stride + 3; ++y) {
                const Scalar* x = input_row(t, 0, example, top) + y * row + left * stride;
                for (int column = 0; column < 3; ++column, ++x) {  // lanes beyond the row are made 0
                    const Vector<Scalar> value =
                        stride == 1 ? load_loose(x) : every_other<Scalar>(load_loose(x), load_loose(x + kL));
                    store(scratch + (y * 3 + column) * kL, met ? value - center : Vector<Scalar>{});
                }
            }
            for (int one = 0; one < 3; ++one) {
                for (int other = one; other < 3; ++other) {
                    Vector<Scalar> sum[3][3] = {};
                    for (std::int64_t y = 0; y < rows; ++y) {
                        const Scalar* a = scratch + (y * stride + one) * 3 * kL;
                        const Scalar* of_other = scratch + (y * stride + other) * 3 * kL;
#pragma GCC unroll 3
                        for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 3
                            for (int j = 0; j < 3; ++j) sum[i][j] += load(a + i * kL) * load(of_other + j * kL);
                        }
                    }
#pragma GCC unroll 3
                    for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 3
                        for (int j = 0; j < 3; ++j) {
                            to[(one * 3 + i) * 9 + other * 3 + j] += sum_of_lanes<Scalar>(sum[i][j]);
                        }
                    }
                }
            }
        }
    }
}

// The rows of a patch are rows of the image, and the product of two rows depends only on their distance. So products of
// rows are summed once for all windows that cover both. scratch: the example, centred, and sums by the group of MetRows
// and the distance, [8, 3, columns / kColumns, 3 inputs, kColumns].
template <typename Scalar>
void patch_covariance(const ConvTask<Scalar>& t, std::int64_t example, Scalar* scratch) {
    if (t.block(0).inputs == 1) return patch_covariance_gray(t, example, scratch);
    constexpr std::int64_t kL = kLanes<Scalar>;
    constexpr int kVectors = kL < 16 ? 2 : 1;
    constexpr std::int64_t kColumns = kVectors * kL;
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t c = b.inputs, row = (b.in_w + 2) * c, size = (b.in_h + 2) * row, of_patch = 3 * c;
    const double* middle = t.patch_mean() + 4 * c;
    Scalar centers[kConvChannels * kL];  // whole pixels and whole vectors
    for (std::int64_t i = 0; i < c * kL; ++i) centers[i] = static_cast<Scalar>(middle[i % c]);
    const Scalar* image = t.at(t.layout->images) + example * size;
    for (std::int64_t i = 0; i < size; i += c * kL) {
        for (std::int64_t j = 0; j < c * kL; j += kL) {
            store(scratch + i + j, load_loose(image + i + j) - load_loose(centers + j));
        }
    }
    Scalar* all_sums = scratch + t.layout->covariance_sums;
    const std::int64_t sums_size = pieces(of_patch, kColumns) * of_patch * kColumns;
    const auto sums_of = [&](int by, int apart) { return all_sums + (by * 3 + apart) * sums_size; };
    const MetRows met = met_rows(b.in_h, b.out_h, b.stride);
    const std::int64_t at_once = most(1, kLongSum / b.out_w);
    OuterProducts<Scalar> products;
    products.x_step = products.grad_step = b.stride * c;
    products.x_row = products.grad_row = b.stride * row;
    products.positions = b.out_w;
    for (int by = 1; by < 8; ++by) {
        for (int apart = 0; apart < 3; ++apart) {
            if ((by & ((1 << (3 - apart)) - 1)) == 0) continue;  // no window has both
            for (std::int64_t y = 0; y < met.count[by]; y += at_once) {
                products.rows = least(at_once, met.count[by] - y);
                const Scalar* first = scratch + (met.first[by] + y * b.stride) * row;
                for (std::int64_t column = 0; column < of_patch; column += kColumns) {
                    const std::int64_t tiles = pieces(of_patch, most_rows(kVectors));
                    for (std::int64_t tile = 0; tile < tiles; ++tile) {
                        const std::int64_t j = start_of(tile, of_patch, tiles);
                        products.x = first + j;
                        products.grad = first + apart * row + column;
                        outer_tile_of<Scalar>(kVectors, start_of(tile + 1, of_patch, tiles) - j)(
                            sums_of(by, apart) + column * of_patch + j * kColumns, products, y > 0);
                    }
                }
            }
        }
    }
    for (int row_of_window = 0; row_of_window < 3; ++row_of_window) {
        for (int apart = 0; row_of_window + apart < 3; ++apart) {
            Scalar* to =
                t.partial(example).patch_products() + (row_of_window * 3 * of_patch + row_of_window + apart) * of_patch;
            for (std::int64_t i = 0; i < of_patch; ++i, to += 3 * of_patch) {
                for (std::int64_t j = 0; j < of_patch; ++j) {
                    const std::int64_t place = j / kColumns * kColumns * of_patch + i * kColumns + j % kColumns;
                    Scalar sum = 0;
                    for (int by = 1; by < 8; ++by) {
                        if ((by >> row_of_window & 1) != 0 && met.count[by] > 0) sum += sums_of(by, apart)[place];
                    }
                    to[j] = sum;
                }
            }
        }
    }
}

// product [group] <- row `i` of the patches' covariance times the weights of a group
template <typename Scalar>
void times_covariance(const ConvTask<Scalar>& t, std::int64_t i, const Scalar* weight, std::int64_t group,
                      double* product) {
    const double* row = t.covariance() + i * kConvLargestPatch;
    for (std::int64_t c = 0; c < group; ++c) product[c] = 0;
    for (std::int64_t j = 0; j < 9 * t.block(0).inputs; ++j) {
        for (std::int64_t c = 0; c < group; ++c) product[c] += row[j] * weight[j * group + c];
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
