// The gradient of the weights of a block after the first.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/shared_products.h"
#include "cpu/isa/conv/task_rows.h"
#include "cpu/isa/conv/winograd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

struct Range {
    std::int64_t first, last;
};

// out [groups, inputs, group] (+)= the sum of the outer products of positions, for the wanted inputs
template <typename Scalar>
void multiply_outer(Scalar* out, OuterProducts<Scalar> products, std::int64_t inputs, Range wanted,
                    std::int64_t channels, int vectors, bool add) {
    const std::int64_t group = vectors * kLanes<Scalar>, count = wanted.last - wanted.first;
    const std::int64_t tiles = pieces(count, most_rows(vectors));
    const Scalar* first_x = products.x;
    const Scalar* first_grad = products.grad;
    for (std::int64_t first = 0; first < channels; first += group) {
        products.grad = first_grad + first;
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            const std::int64_t from = wanted.first + start_of(tile, count, tiles);
            const std::int64_t to = wanted.first + start_of(tile + 1, count, tiles);
            products.x = first_x + from;
            outer_tile_of<Scalar>(vectors, to - from)(out + first * inputs + from * group, products, add);
        }
    }
}

// Collects positions side by side, and multiplies when the next ones would exceed kConvOuterPositions.
template <typename Scalar>
struct OuterPositions {
    Images<Scalar> x, grad;
    Scalar* memory;  // [kConvOuterPositions, step] of x, then of grad
    std::int64_t step, inputs;
    int vectors;
    Scalar* out;  // [groups, inputs, group]
    bool add;     // to what is in out; else it is replaced
    std::int64_t filled = 0;

    Scalar* grads() const { return memory + kConvOuterPositions * step; }

    // Multiplies the copied positions.
    void multiply() {
        OuterProducts<Scalar> products;
        products.x = memory;
        products.grad = grads();
        products.x_step = products.grad_step = step;
        products.positions = filled;
        multiply(products);
        filled = 0;
    }

    void multiply(OuterProducts<Scalar> products) {
        multiply_outer(out, products, inputs, {0, inputs}, grad.channels, vectors, add);
        add = true;
    }

    // Takes height x width positions of `images` images, from position (y, x0) of the stretches on.
    void take(const OuterAxis::Stretch& rows, const OuterAxis::Stretch& columns, std::int64_t image,
              std::int64_t images, std::int64_t y, std::int64_t height, std::int64_t x0, std::int64_t width) {
        const std::int64_t count = images * height * width;
        const auto later = [](Blend blend, std::int64_t by) {
            return Blend{blend.at + by, blend.other + by, blend.sign};
        };
        const Blend x_rows = later(rows.x, y * rows.x_step), x_columns = later(columns.x, x0 * columns.x_step);
        const Blend grad_rows = later(rows.grad, y * rows.grad_step);
        const Blend grad_columns = later(columns.grad, x0 * columns.grad_step);
        Images<Scalar> from = x, from_grad = grad;
        from.first += image * x.image;
        from_grad.first += image * grad.image;
        const bool blended = x_rows.sign != 0 || x_columns.sign != 0 || grad_rows.sign != 0 || grad_columns.sign != 0;
        if (!blended && count >= kConvOuterPositions / 2) {  // many enough alone, and nothing to combine
            OuterProducts<Scalar> products;
            products.x = from.first + x_rows.at * x.row + x_columns.at * x.channels;
            products.x_step = columns.x_step * x.channels;
            products.x_row = rows.x_step * x.row;
            products.x_image = x.image;
            products.grad = from_grad.first + grad_rows.at * grad.row + grad_columns.at * grad.channels;
            products.grad_step = columns.grad_step * grad.channels;
            products.grad_row = rows.grad_step * grad.row;
            products.grad_image = grad.image;
            products.images = images;
            products.rows = height;
            products.positions = width;
            multiply(products);
            return;
        }
        if (filled + count > kConvOuterPositions) multiply();
        copy_blended(memory + filled * step, step, from, x_rows, x_columns,
                     {images, height, width, rows.x_step, columns.x_step});
        copy_blended(grads() + filled * step, step, from_grad, grad_rows, grad_columns,
                     {images, height, width, rows.grad_step, columns.grad_step});
        filled += count;
    }

    // Takes all positions: whole images where they are small enough, else rows or parts of a row.
    void take(const OuterAxis::Stretch& rows, const OuterAxis::Stretch& columns, std::int64_t images) {
        const std::int64_t width = least(columns.count, kConvOuterPositions);
        const std::int64_t height = least(rows.count, kConvOuterPositions / width);
        const bool whole = width == columns.count && height == rows.count;
        const std::int64_t at_once = whole ? kConvOuterPositions / (width * height) : 1;
        for (std::int64_t image = 0; image < images; image += at_once) {
            for (std::int64_t y = 0; y < rows.count; y += height) {
                for (std::int64_t x0 = 0; x0 < columns.count; x0 += width) {
                    take(rows, columns, image, least(at_once, images - image), y, least(height, rows.count - y), x0,
                         least(width, columns.count - x0));
                }
            }
        }
    }
};

// Collects tiles of F(2x2, 3x3) side by side, and multiplies when the next ones would exceed kConvOuterTiles.
template <typename Scalar>
struct OuterTiles {
    Images<Scalar> x, grad;
    Scalar* memory;  // [16, kConvOuterTiles, step] of x, then of grad
    std::int64_t step, inputs;
    int vectors;
    Scalar* out;  // [16, groups, inputs, group]
    bool add;     // to what out is
    Range wanted_inputs, wanted_products;
    std::int64_t filled = 0;

    Scalar* grads() const { return memory + 16 * kConvOuterTiles * step; }

    void multiply() {
        for (std::int64_t product = wanted_products.first; product < wanted_products.last; ++product) {
            OuterProducts<Scalar> products;
            products.x = memory + product * kConvOuterTiles * step;
            products.grad = grads() + product * kConvOuterTiles * step;
            products.x_step = products.grad_step = step;
            products.positions = filled;
            multiply_outer(out + product * inputs * grad.channels, products, inputs, wanted_inputs, grad.channels,
                           vectors, add);
        }
        add = true;
        filled = 0;
    }

    // Takes `count` tiles of one row, from output (y, x0) on.
    void take(std::int64_t image, std::int64_t y, std::int64_t x0, std::int64_t count) {
        if (filled + count > kConvOuterTiles) multiply();
        const TileSteps steps{step, kConvOuterTiles * step, static_cast<int>(wanted_products.first / 4),
                              static_cast<int>(pieces(wanted_products.last, 4))};
        for (std::int64_t c = wanted_inputs.first; c < wanted_inputs.last; c += kLanes<Scalar>) {
            transform_inputs(memory + filled * step + c, steps,
                             x.first + image * x.image + y * x.row + x0 * x.channels + c, x.row, x.channels, count);
        }
        for (std::int64_t c = 0; c < grad.channels; c += kLanes<Scalar>) {
            transform_grads(grads() + filled * step + c, steps,
                            grad.first + image * grad.image + y * grad.row + x0 * grad.channels + c, grad.row,
                            grad.channels, count);
        }
        filled += count;
    }
};

// The products of rows [top, bottom) of `images` examples from `example` on. They start the sums or add to them.
template <typename Scalar>
void weight_products_at_once(const ConvTask<Scalar>& t, int block, std::int64_t example, std::int64_t images,
                             std::int64_t top, std::int64_t bottom, bool start, std::int64_t first_product,
                             std::int64_t last_product, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    const std::int64_t row = (b.out_w + 2) * channels, in_row = (b.in_w + 2) * channels;
    const Images<Scalar> x{input_row(t, block, example, 0), (b.in_h + 2) * in_row, in_row, channels};
    const Images<Scalar> grad{raw_row(t, block, example, 0), (b.out_h + 2) * row, row, channels};
    Scalar* memory = scratch + t.layout->shared_scratch;
    Scalar* out = t.at(t.layout->products);
    const std::int64_t step = channels + kConvOuterGap;
    const auto winograd_products = [&](Range inputs, Range products) {
        OuterTiles<Scalar> tiles{x, grad, memory, step, b.inputs, b.vectors, out, !start, inputs, products};
        const std::int64_t width = 2 * kConvOuterTiles;
        for (std::int64_t image = 0; image < images; ++image) {
            for (std::int64_t y = top; y < bottom; y += 2) {
                for (std::int64_t x0 = 0; x0 < b.out_w; x0 += width) {
                    tiles.take(image, y, x0, pieces(least(width, b.out_w - x0), 2));
                }
            }
        }
        tiles.multiply();
    };
    if (b.winograd) {
        // A thread's share is a share of the pairs (vector of inputs, product), ordered by vector: so threads rarely
        // transform the same inputs. Vectors with all their products go together.
        constexpr std::int64_t kAll = kConvProducts;
        const std::int64_t vectors = pieces(b.inputs, kLanes<Scalar>), end = last_product * vectors;
        for (std::int64_t at = first_product * vectors, next; at < end; at = next) {
            const std::int64_t vector = at / kAll, product = at % kAll;
            const std::int64_t whole = product == 0 ? (end - at) / kAll : 0;  // vectors
            next = whole > 0 ? at + whole * kAll : least(end, (vector + 1) * kAll);
            winograd_products({vector * kLanes<Scalar>, least((vector + most(1, whole)) * kLanes<Scalar>, b.inputs)},
                              {product, whole > 0 ? kAll : product + next - at});
        }
        return;
    }
    const OuterAxis rows = outer_axis(top, bottom, b.in_h, b.out_h, b.stride);
    const OuterAxis columns = outer_axis(0, b.out_w, b.in_w, b.out_w, b.stride);
    OuterPositions<Scalar> positions{x, grad, memory, step, b.inputs, b.vectors, nullptr, false};
    for (std::int64_t product = first_product; product < last_product; ++product) {
        positions.out = out + product * b.inputs * channels;
        positions.add = !start;
        for (int r = 0; r < rows.stretches[product / 4]; ++r) {
            for (int c = 0; c < columns.stretches[product % 4]; ++c) {
                positions.take(rows.stretch[product / 4][r], columns.stretch[product % 4][c], images);
            }
        }
        if (positions.filled > 0 || !positions.add) positions.multiply();
    }
}

template <typename Scalar>
void weight_products(const ConvTask<Scalar>& t, int block, std::int64_t first, std::int64_t last,
                     std::int64_t first_product, std::int64_t last_product, bool add, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t height = b.out_h, rows = b.weight_rows, images = b.weight_images;
    for (std::int64_t i = (last - 1) / images * images; i >= first; i -= images) {
        const std::int64_t count = least(images, t.examples - i);
        for (std::int64_t top = 0; top < height; top += rows) {
            weight_products_at_once(t, block, i, count, top, least(top + rows, height),
                                    !add && i + count == t.examples && top == 0, first_product, last_product, scratch);
        }
    }
}

// Which of a vector's first `count` channels are other than 0 somewhere in rows [top, bottom) and columns [left, right)
// of any image. It stops as soon as all are.
template <typename Scalar>
Mask<Scalar> live_channels(const Images<Scalar>& x, std::int64_t images, std::int64_t top, std::int64_t bottom,
                           std::int64_t left, std::int64_t right, std::int64_t count) {
    Mask<Scalar> live{};
    for (std::int64_t image = 0; image < images; ++image) {
        for (std::int64_t y = top; y < bottom; ++y) {
            const Scalar* row = x.first + image * x.image + y * x.row;
            for (std::int64_t i = left; i < right; ++i) live |= load(row + i * x.channels) != Vector<Scalar>{};
            if (all_set<Scalar>(live, count)) return live;
        }
    }
    return live;
}

// weight_grad <- exactly 0 for the taps that meet only zeros of an input. F(2x2, 3x3) leaves rounding there, and the
// sign step would act on it. Such an input is 0 everywhere, or everywhere but at an edge of the images. Images are at
// least 2 x 2.
template <typename Scalar>
void clear_unmet_taps(const ConvTask<Scalar>& t, int block) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, row = (b.in_w + 2) * channels;
    const std::int64_t ys[] = {0, 1, b.in_h - 1, b.in_h}, xs[] = {0, 1, b.in_w - 1, b.in_w};
    for (std::int64_t c = 0; c < b.inputs; c += kLanes<Scalar>) {
        const std::int64_t count = least(kLanes<Scalar>, b.inputs - c);
        const Images<Scalar> x{input_row(t, block, 0, 1) + channels + c, (b.in_h + 2) * row, row, channels};
        const auto live_part = [&](int i, int j) {
            return live_channels(x, t.examples, ys[i], ys[i + 1], xs[j], xs[j + 1], count);
        };
        Mask<Scalar> live[3][3];
        live[1][1] = live_part(1, 1);
        if (all_set<Scalar>(live[1][1], count)) continue;
        for (int i = 0; i < 9; ++i) {
            if (i != 4) live[i / 3][i % 3] = live_part(i / 3, i % 3);
        }
        for (int tap = 0; tap < 9; ++tap) {
            const int ky = tap / 3, kx = tap % 3;
            Mask<Scalar> met{};  // tap 0 never sees the last row or column, tap 2 never the first
            for (int i = ky == 2 ? 1 : 0; i < (ky == 0 ? 2 : 3); ++i) {
                for (int j = kx == 2 ? 1 : 0; j < (kx == 0 ? 2 : 3); ++j) met |= live[i][j];
            }
            for (std::int64_t lane = 0; lane < count; ++lane) {
                if (met[lane] != 0) continue;
                for (std::int64_t first = 0; first < channels; first += group) {
                    Scalar* to = t.at(b.weight_grad) + (first * 9 + tap * group) * b.inputs + (c + lane) * group;
                    for (std::int64_t i = 0; i < group; ++i) to[i] = 0;
                }
            }
        }
    }
}

// Three taps from four products: those of F(2x2, 3x3), or shared ones, which serve tap 0 and tap `second`.
template <typename Scalar>
void join_products(Vector<Scalar>* taps, const Vector<Scalar>* product, std::int64_t second, bool winograd) {
    if (winograd) {
        const Vector<Scalar> half = all(Scalar(0.5));
        const Vector<Scalar> middle = half * (product[1] + product[2]);
        taps[0] = product[0] + middle;
        taps[1] = half * (product[1] - product[2]);
        taps[2] = middle - product[3];
    } else {
        const Vector<Scalar> shared = product[2] + product[1];
        taps[0] = product[0] + product[1];
        taps[1] = second == 1 ? shared : product[3];
        taps[2] = second == 1 ? product[3] : shared;
    }
}

// weight_grad <- the sums of its products
template <typename Scalar>
void weight_grad(const ConvTask<Scalar>& t, int block) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, tap = b.inputs * group;
    for (std::int64_t first = 0; first < channels; first += group) {
        for (std::int64_t i = 0; i < tap; i += kLanes<Scalar>) {
            const Scalar* from = t.at(t.layout->products) + first * b.inputs + i;
            Scalar* to = t.at(b.weight_grad) + first * 9 * b.inputs + i;
            Vector<Scalar> rows[4][3];
#pragma GCC unroll 4
            for (int y = 0; y < 4; ++y) {
                Vector<Scalar> product[4];
#pragma GCC unroll 4
                for (int x = 0; x < 4; ++x) product[x] = load(from + (y * 4 + x) * b.inputs * channels);
                join_products<Scalar>(rows[y], product, b.stride, b.winograd);
            }
#pragma GCC unroll 3
            for (int x = 0; x < 3; ++x) {
                const Vector<Scalar> column[] = {rows[0][x], rows[1][x], rows[2][x], rows[3][x]};
                Vector<Scalar> taps[3];
                join_products<Scalar>(taps, column, b.stride, b.winograd);
#pragma GCC unroll 3
                for (int y = 0; y < 3; ++y) store(to + (y * 3 + x) * tap, taps[y]);
            }
        }
    }
    if (b.winograd) clear_unmet_taps(t, block);
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
