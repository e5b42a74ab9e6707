// A block's convolution of any window and stride, its weight gradient and the gradient of its input: each in register
// tiles over rows of positions, those of 3x3 windows with stride 1 by F(2x2, 3x3) where that pays.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/direct.h"
#include "cpu/isa/conv/weight_grad.h"
#include "cpu/isa/conv/winograd.h"
#include "cpu/isa/layers/places.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// The memories that a convolution's input, weight and output are in, and so the gradients of the last two: a task's
// own, or that of its tangents.
template <typename Scalar>
struct ConvMemories {
    Scalar* in;
    Scalar* weight;
    Scalar* made;
};

template <typename Scalar>
ConvMemories<Scalar> memories_of(const LayersTask<Scalar>& t) {
    return {t.memory, t.memory, t.memory};
}

static_assert(kLayersWindow <= kMostRuns && kLayersWinogradLanes <= 8 * kMostRuns);

// Where, in packed weights [groups, window, inputs, group], value q of an output's [in channels, window] lies.
struct PackedPlaces {
    std::int64_t window, inputs, group;

    std::int64_t of(std::int64_t out, std::int64_t q) const {
        return ((out / group * window + q % window) * inputs + q / window) * group + out % group;
    }
};

template <typename Scalar>
PackedPlaces packed_places(const LayersBlock& block, const LayersBlockPlan& plan) {
    return {std::int64_t{block.window.height} * block.window.width, plan.in.lanes, plan.vectors * kLanes<Scalar>};
}

// to <- weight [outputs, in channels, window]; inputs beyond the channels, and outputs beyond `outputs`, are 0.
template <typename Scalar>
void pack_weight(Scalar* to, const Scalar* weight, const LayersBlock& block, const LayersBlockPlan& plan) {
    constexpr int kL = kLanes<Scalar>;
    const PackedPlaces places = packed_places<Scalar>(block, plan);
    const std::int64_t length = block.in.channels * places.window, outputs = block.made.channels;
    if (block.in.channels < places.inputs) fill_zero(to, places.window * places.inputs * plan.made.lanes);
    for (std::int64_t out = 0; out < plan.made.lanes; out += kL) {
        const Scalar* from = weight + out * length;
        std::int64_t q = 0;
        for (; q + kL <= length; q += kL) {
            Vector<Scalar> rows[kL];
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) {
                rows[i] = out + i < outputs ? load_loose(from + i * length + q) : Vector<Scalar>{};
            }
            transpose<Simd<Scalar>>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) store(to + places.of(out, q + i), rows[i]);
        }
        for (; q < length; ++q) {
            Scalar* row = to + places.of(out, q);
            for (int i = 0; i < kL; ++i) row[i] = out + i < outputs ? from[i * length + q] : Scalar(0);
        }
    }
}

// weight [outputs, in channels, window] <- packed sums
template <typename Scalar>
void unpack_weight(Scalar* weight, const Scalar* packed, const LayersBlock& block, const LayersBlockPlan& plan) {
    constexpr int kL = kLanes<Scalar>;
    const PackedPlaces places = packed_places<Scalar>(block, plan);
    const std::int64_t length = block.in.channels * places.window, outputs = block.made.channels;
    for (std::int64_t out = 0; out < outputs; out += kL) {
        Scalar* to = weight + out * length;
        std::int64_t q = 0;
        for (; q + kL <= length; q += kL) {
            Vector<Scalar> rows[kL];
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) rows[i] = load(packed + places.of(out, q + i));
            transpose<Simd<Scalar>>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) {
                if (out + i < outputs) store_loose(to + i * length + q, rows[i]);
            }
        }
        for (; q < length; ++q) {
            const Scalar* row = packed + places.of(out, q);
            for (int i = 0; i < kL && out + i < outputs; ++i) to[i * length + q] = row[i];
        }
    }
}

// to [groups of inputs, window back to front, outputs, group] <- packed weights
template <typename Scalar>
void pack_weight_back(Scalar* to, const Scalar* packed, const LayersBlock& block, const LayersBlockPlan& plan) {
    constexpr int kL = kLanes<Scalar>;
    const PackedPlaces places = packed_places<Scalar>(block, plan);
    const std::int64_t window = places.window, lanes = plan.made.lanes, group = plan.vectors_back * kL;
    for (std::int64_t tap = 0; tap < window; ++tap) {
        for (std::int64_t out = 0; out < lanes; out += kL) {
            for (std::int64_t in = 0; in < places.inputs; in += kL) {
                Vector<Scalar> rows[kL];
#pragma GCC unroll 16
                for (int i = 0; i < kL; ++i) rows[i] = load(packed + places.of(out, (in + i) * window + tap));
                transpose<Simd<Scalar>>(rows);
                Scalar* at = to + ((in / group * window + window - 1 - tap) * lanes + out) * group + in % group;
#pragma GCC unroll 16
                for (int i = 0; i < kL; ++i) store(at + i * group, rows[i]);
            }
        }
    }
}

// The packed weight, and the sums of its gradient <- 0.
template <typename Scalar>
void start_convolution(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    if (wants(t, block.weight) && plan.winograd_back) {
        fill_zero(t.memory + plan.products, 16 * plan.in.lanes * plan.made.lanes);
        fill_zero(t.memory + plan.met, 9 * plan.in.lanes);
    } else if (wants(t, block.weight)) {
        fill_zero(t.memory + plan.weight_grad,
                  std::int64_t{block.window.height} * block.window.width * plan.in.lanes * plan.made.lanes);
    }
    const Scalar* weight = t.values[block.weight];
    if (weight == nullptr) return;
    Scalar* packed = t.memory + plan.weight;
    pack_weight(packed, weight, block, plan);
    if (plan.winograd) {
        transform_kernels(t.memory + plan.transformed, packed, plan.in.lanes, plan.made.lanes,
                          plan.vectors * kLanes<Scalar>);
    }
    if (!wants_input_grad(t, i)) return;
    Scalar* back = t.memory + plan.weight_back;
    pack_weight_back<Scalar>(back, packed, block, plan);
    if (plan.winograd_back) {
        transform_kernels(t.memory + plan.transformed_back, back, plan.made.lanes, plan.in.lanes,
                          plan.vectors_back * kLanes<Scalar>);
    }
}

// made (+)= the convolution of examples [first, last), without the bias
template <typename Scalar>
void convolve_examples(const LayersTask<Scalar>& t, int i, const ConvMemories<Scalar>& m, std::int64_t first,
                       std::int64_t last, bool add) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const LayersWindow& window = block.window;
    const LayersImages& in = plan.in;
    const LayersImages& made = plan.made;
    const Scalar* x = m.in + in.place + first * in.image;  // the window of position (0, 0), with its padding
    Scalar* out = image_in(m.made, made, first);
    if (plan.winograd) {
        winograd<Scalar>({out, made.row, x, in.row, block.made.height, block.made.width, in.lanes, in.lanes, made.lanes,
                          add, last - first, in.image, made.image},
                         m.weight + plan.transformed, plan.vectors, t.memory + t.layout->scratch);
        return;
    }
    const std::int64_t group = plan.vectors * kLanes<Scalar>;
    Runs runs{};
    runs.count = window.height;
    runs.length = window.width * in.lanes;
    for (int r = 0; r < runs.count; ++r) runs.run[r] = {r * in.row, r * runs.length * group};
    const std::int64_t all = runs.count * runs.length;
    for (std::int64_t example = first; example < last; ++example, x += in.image, out += made.image) {
        for (std::int64_t c = 0; c < made.lanes; c += group) {
            convolve_grid(out + c, {made.lanes, made.row}, x, {window.stride_w * in.lanes, window.stride_h * in.row},
                          block.made.height, block.made.width, runs, m.weight + plan.weight + c * all, plan.vectors,
                          add);
        }
    }
}

// Notes in which parts of an example a block's input is other than 0: its first, middle and last rows by its first,
// middle and last columns.
template <typename Scalar>
void note_met(const LayersTask<Scalar>& t, int i, const ConvMemories<Scalar>& m, std::int64_t example) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const LayersImages& in = plan.in;
    const std::int64_t ys[] = {0, 1, block.in.height - 1, block.in.height};
    const std::int64_t xs[] = {0, 1, block.in.width - 1, block.in.width};
    Scalar* met = m.weight + plan.met;
    for (std::int64_t c = 0; c < in.lanes; c += kLanes<Scalar>) {
        const std::int64_t count = least(kLanes<Scalar>, block.in.channels - c);
        if (all_set<Scalar>(load(met + 4 * in.lanes + c) != Vector<Scalar>{}, count)) continue;  // all taps meet it
        const Images<Scalar> x{image_in(m.in, in, example) + c, in.image, in.row, in.lanes};
        for (int part = 0; part < 9; ++part) {
            const Mask<Scalar> live =
                live_channels(x, 1, ys[part / 3], ys[part / 3 + 1], xs[part % 3], xs[part % 3 + 1], count);
            Scalar* of_part = met + part * in.lanes + c;
            store(of_part, live ? all(Scalar(1)) : load(of_part));
        }
    }
}

// weight_grad <- the sums of its products. Exactly 0 for the taps that meet only zeros of an input: F(2x2, 3x3) leaves
// rounding there, and the sign step would act on it.
template <typename Scalar>
void join_weight_grad(const LayersTask<Scalar>& t, int i) {
    const LayersBlockPlan& plan = t.layout->block[i];
    const std::int64_t inputs = plan.in.lanes, lanes = plan.made.lanes, group = plan.vectors * kLanes<Scalar>;
    const std::int64_t tap = inputs * group;
    const Scalar* met = t.memory + plan.met;
    for (std::int64_t first = 0; first < lanes; first += group) {
        for (std::int64_t at = 0; at < tap; at += kLanes<Scalar>) {
            const Scalar* from = t.memory + plan.products + first * inputs + at;
            Scalar* to = t.memory + plan.weight_grad + first * 9 * inputs + at;
            Vector<Scalar> rows[4][3];
            for (int y = 0; y < 4; ++y) {
                Vector<Scalar> product[4];
                for (int x = 0; x < 4; ++x) product[x] = load(from + (y * 4 + x) * inputs * lanes);
                join_products<Scalar>(rows[y], product, 1, /*winograd=*/true);
            }
            for (int x = 0; x < 3; ++x) {
                const Vector<Scalar> column[] = {rows[0][x], rows[1][x], rows[2][x], rows[3][x]};
                Vector<Scalar> taps[3];
                join_products<Scalar>(taps, column, 1, /*winograd=*/true);
                for (int y = 0; y < 3; ++y) {
                    // Tap 0 never sees the last row or column, tap 2 never the first.
                    Scalar meets = 0;
                    for (int part_y = y == 2 ? 1 : 0; part_y < (y == 0 ? 2 : 3); ++part_y) {
                        for (int part_x = x == 2 ? 1 : 0; part_x < (x == 0 ? 2 : 3); ++part_x) {
                            meets += met[(part_y * 3 + part_x) * inputs + at / group];
                        }
                    }
                    store(to + (y * 3 + x) * tap, meets > 0 ? taps[y] : Vector<Scalar>{});
                }
            }
        }
    }
}

template <typename Scalar>
void add_weight_products(const LayersTask<Scalar>& t, int i, const ConvMemories<Scalar>& m, std::int64_t first,
                         std::int64_t last) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const LayersImages& in = plan.in;
    const LayersImages& made = plan.made;
    for (std::int64_t example = first; example < last; ++example) note_met(t, i, m, example);
    OuterTiles<Scalar> tiles{{m.in + in.place + first * in.image, in.image, in.row, in.lanes},
                             {image_in(m.made, made, first), made.image, made.row, made.lanes},
                             t.memory + t.layout->scratch,
                             most(in.lanes, made.lanes) + kConvOuterGap,
                             in.lanes,
                             plan.vectors,
                             m.weight + plan.products,
                             /*add=*/true,
                             {0, in.lanes},
                             {0, 16}};
    const std::int64_t width = 2 * kConvOuterTiles;
    for (std::int64_t image = 0; image < last - first; ++image) {
        for (std::int64_t y = 0; y < block.made.height; y += 2) {
            for (std::int64_t x = 0; x < block.made.width; x += width) {
                tiles.take(image, y, x, pieces(least(width, block.made.width - x), 2));
            }
        }
    }
    tiles.multiply();
}

// weight_grad += the products of an example's input and the gradient of `made`, directly
template <typename Scalar>
void add_weight_grad_directly(const LayersTask<Scalar>& t, int i, const ConvMemories<Scalar>& m, std::int64_t example) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const LayersWindow& window = block.window;
    const LayersImages& in = plan.in;
    const LayersImages& made = plan.made;
    const std::int64_t group = plan.vectors * kLanes<Scalar>, length = window.width * in.lanes;
    const std::int64_t tiles = pieces(length, most_rows(plan.vectors));
    // Few enough rows that they stay in L1 while all tiles read them.
    const std::int64_t rows = most(1, 128 / block.made.width);
    const Scalar* x = m.in + in.place + example * in.image;
    const Scalar* grad = image_in(m.made, made, example);
    OuterProducts<Scalar> products;
    products.x_step = window.stride_w * in.lanes;
    products.x_row = window.stride_h * in.row;
    products.grad_step = made.lanes;
    products.grad_row = made.row;
    products.positions = block.made.width;
    for (std::int64_t top = 0; top < block.made.height; top += rows) {
        products.rows = least(rows, block.made.height - top);
        for (std::int64_t first = 0; first < made.lanes; first += group) {
            products.grad = grad + top * made.row + first;
            for (std::int64_t r = 0; r < window.height; ++r) {
                Scalar* to = m.weight + plan.weight_grad + (first * window.height + r * group) * length;
                for (std::int64_t tile = 0; tile < tiles; ++tile) {
                    const std::int64_t from = start_of(tile, length, tiles), end = start_of(tile + 1, length, tiles);
                    products.x = x + top * products.x_row + r * in.row + from;
                    outer_tile_of<Scalar>(plan.vectors, end - from)(to + from * group, products, /*add=*/true);
                }
            }
        }
    }
}

// weight_grad += the products of examples [first, last)
template <typename Scalar>
void add_weight_grad(const LayersTask<Scalar>& t, int i, const ConvMemories<Scalar>& m, std::int64_t first,
                     std::int64_t last) {
    if (t.layout->block[i].winograd_back) return add_weight_products(t, i, m, first, last);
    for (std::int64_t example = first; example < last; ++example) add_weight_grad_directly(t, i, m, example);
}

// The taps of a window that meet every stride-th position of an axis, and those positions: position
// first + stride * j meets, with tap `tap + stride * m`, what is made at from - m + j.
struct Phase {
    std::int64_t tap, taps;
    std::int64_t first, positions;
    std::int64_t from;
};

inline Phase phase_of(std::int64_t tap, std::int64_t window, std::int64_t stride, std::int64_t pad, std::int64_t size) {
    Phase phase{};
    phase.tap = tap;
    phase.taps = tap < window ? pieces(window - tap, stride) : 0;
    phase.first = ((tap - pad) % stride + stride) % stride;
    phase.positions = phase.first < size ? pieces(size - phase.first, stride) : 0;
    phase.from = (phase.first + pad - tap) / stride;
    return phase;
}

// to [height, width, lanes of the input] (+)= the gradient of an example's input, from that of `made`, directly
template <typename Scalar>
void convolve_back_directly(const LayersTask<Scalar>& t, int i, const ConvMemories<Scalar>& m, std::int64_t example,
                            Scalar* to, bool add) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const LayersWindow& window = block.window;
    const LayersImages& made = plan.made;
    const std::int64_t lanes = plan.in.lanes, row = block.in.width * lanes;
    const Scalar* grads = image_in(m.made, made, example);
    const bool meets_all = window.height >= window.stride_h && window.width >= window.stride_w;
    if (!meets_all && !add) fill_zero(to, block.in.height * row);
    const std::int64_t group = plan.vectors_back * kLanes<Scalar>;
    const std::int64_t taps = std::int64_t{window.height} * window.width;
    for (std::int64_t y = 0; y < window.stride_h; ++y) {
        const Phase rows = phase_of(y, window.height, window.stride_h, window.pad_h, block.in.height);
        for (std::int64_t x = 0; x < window.stride_w; ++x) {
            const Phase columns = phase_of(x, window.width, window.stride_w, window.pad_w, block.in.width);
            if (rows.taps * columns.taps * rows.positions * columns.positions == 0) continue;
            // From the last tap to the first, so that positions rise. With stride 1 a row's taps are adjacent.
            const bool adjacent = window.stride_w == 1;
            Runs runs{};
            runs.length = (adjacent ? columns.taps : 1) * made.lanes;
            for (std::int64_t j = rows.taps - 1; j >= 0; --j) {
                for (std::int64_t n = columns.taps - 1; n >= 0; n -= adjacent ? columns.taps : 1) {
                    const std::int64_t tap =
                        (rows.tap + j * window.stride_h) * window.width + columns.tap + n * window.stride_w;
                    runs.run[runs.count++] = {-j * made.row - n * made.lanes, (taps - 1 - tap) * made.lanes * group};
                }
            }
            const Scalar* from = grads + rows.from * made.row + columns.from * made.lanes;
            for (std::int64_t first = 0; first < lanes; first += group) {
                convolve_grid(to + rows.first * row + columns.first * lanes + first,
                              {window.stride_w * lanes, window.stride_h * row}, from, {made.lanes, made.row},
                              rows.positions, columns.positions, runs,
                              m.weight + plan.weight_back + first * taps * made.lanes, plan.vectors_back, add);
            }
        }
    }
}

// to [last - first, height, width, lanes of the input] (+)= the gradient of the input of examples [first, last)
template <typename Scalar>
void convolve_back(const LayersTask<Scalar>& t, int i, const ConvMemories<Scalar>& m, std::int64_t first,
                   std::int64_t last, Scalar* to, bool add) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const LayersImages& made = plan.made;
    const std::int64_t lanes = plan.in.lanes, row = block.in.width * lanes, image = block.in.height * row;
    if (plan.winograd_back) {
        const Scalar* grads = image_in(m.made, made, first) - made.row - made.lanes;
        winograd<Scalar>({to, row, grads, made.row, block.in.height, block.in.width, made.lanes, made.lanes, lanes, add,
                          last - first, made.image, image},
                         m.weight + plan.transformed_back, plan.vectors_back, t.memory + t.layout->scratch);
        return;
    }
    for (std::int64_t example = first; example < last; ++example, to += image) {
        convolve_back_directly(t, i, m, example, to, add);
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
