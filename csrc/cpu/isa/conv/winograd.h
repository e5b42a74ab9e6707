// Winograd's F(2x2, 3x3): two by two outputs from 16 products a channel instead of 36 (Lavin and Gray 2015). A tile is
// a pooling window. Where the image is constant along an axis under a tile, the products that distinguish its outputs
// are exactly 0. Equal outputs then stay bitwise equal, and max-pooling takes the first of them, as after a direct
// convolution. The gradient of the 3 x 3 weights comes from the same tiles of inputs and from 2 x 2 gradients, with 16
// products too.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/direct.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// to [16, groups, inputs, group] <- `weight` [groups, 9, inputs, group], transformed. The last row of four is negated,
// so that outputs are sums.
template <typename Scalar>
void transform_kernels(Scalar* to, const Scalar* weight, std::int64_t inputs, std::int64_t channels,
                       std::int64_t group) {
    const std::int64_t plane = inputs * channels, tap = inputs * group;
    const Vector<Scalar> half = all(Scalar(0.5));
    for (std::int64_t first = 0; first < channels; first += group) {
        for (std::int64_t i = 0; i < tap; i += kLanes<Scalar>) {
            const Scalar* from = weight + first * 9 * inputs + i;
            Vector<Scalar> rows[4][3];
#pragma GCC unroll 3
            for (int x = 0; x < 3; ++x) {
                const Vector<Scalar> g0 = load(from + x * tap), g1 = load(from + (3 + x) * tap);
                const Vector<Scalar> g2 = load(from + (6 + x) * tap);
                rows[0][x] = g0;
                rows[1][x] = half * (g0 + g2 + g1);
                rows[2][x] = half * (g0 + g2 - g1);
                rows[3][x] = -g2;
            }
            Scalar* out = to + first * inputs + i;
#pragma GCC unroll 4
            for (int y = 0; y < 4; ++y) {
                const Vector<Scalar> outer = rows[y][0] + rows[y][2];
                store(out + (4 * y) * plane, rows[y][0]);
                store(out + (4 * y + 1) * plane, half * (outer + rows[y][1]));
                store(out + (4 * y + 2) * plane, half * (outer - rows[y][1]));
                store(out + (4 * y + 3) * plane, rows[y][2]);
            }
        }
    }
}

// Some rows of tiles, or a part of one, are transformed, multiplied and transformed back together. Their values lie at
// offsets the compiler knows: inputs [channels / kBlock, tiles, 16, kBlock], products [groups, tiles, kValues, group].
template <typename Scalar>
constexpr std::int64_t kBlock = kLanes<Scalar> > 8 ? kLanes<Scalar> : 8;

// Whether the registers hold the sums of two product rows at once. If so, the four product rows are joined into two
// output rows where they are summed, and half as many values are written.
constexpr bool kJoinsRows = kRegisters == 32;
constexpr std::int64_t kValues = kJoinsRows ? 8 : 16;

// Where transformed values go: from one tile to the next, and from one of its 16 values to the next. Rows first_row to
// last_row - 1 of four values are wanted.
struct TileSteps {
    std::int64_t tile, value;
    int first_row = 0, last_row = 4;
};

// Transforms one vector of channels of a row of tiles. A tile reads 4 x 4 positions of x, two from the next. For an odd
// width the last tile reads one position past the border. Where that matters, the plan has zeros there; in a
// convolution it only touches outputs that are not stored.
template <typename Scalar>
[[gnu::always_inline]] inline void transform_inputs(Scalar* to, TileSteps steps, const Scalar* x, std::int64_t row,
                                                    std::int64_t channels, std::int64_t tiles) {
    Vector<Scalar> t[4][4];
    const auto column = [&t, row](int j, const Scalar* from) {
        const Vector<Scalar> d0 = load(from), d1 = load(from + row);
        const Vector<Scalar> d2 = load(from + 2 * row), d3 = load(from + 3 * row);
        t[0][j] = d0 - d2;
        t[1][j] = d1 + d2;
        t[2][j] = d2 - d1;
        t[3][j] = d1 - d3;
    };
    column(0, x);
    column(1, x + channels);
    for (std::int64_t tile = 0; tile < tiles; ++tile, to += steps.tile) {
        x += 2 * channels;
        column(2, x);
        column(3, x + channels);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            if (i >= steps.first_row && i < steps.last_row) {
                store(to + (4 * i) * steps.value, t[i][0] - t[i][2]);
                store(to + (4 * i + 1) * steps.value, t[i][1] + t[i][2]);
                store(to + (4 * i + 2) * steps.value, t[i][2] - t[i][1]);
                store(to + (4 * i + 3) * steps.value, t[i][1] - t[i][3]);
            }
            t[i][0] = t[i][2];
            t[i][1] = t[i][3];
        }
    }
}

// The same for a gradient's tiles of 2 x 2 positions, which the weight gradient needs: sums and differences.
template <typename Scalar>
void transform_grads(Scalar* to, TileSteps steps, const Scalar* grad, std::int64_t row, std::int64_t channels,
                     std::int64_t tiles) {
    for (std::int64_t tile = 0; tile < tiles; ++tile, to += steps.tile, grad += 2 * channels) {
        const Vector<Scalar> g0 = load(grad), g1 = load(grad + channels);
        const Vector<Scalar> h0 = load(grad + row), h1 = load(grad + row + channels);
        const Vector<Scalar> left[4] = {g0, g0 + h0, g0 - h0, h0}, right[4] = {g1, g1 + h1, g1 - h1, h1};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            if (i < steps.first_row || i >= steps.last_row) continue;
            store(to + (4 * i) * steps.value, left[i]);
            store(to + (4 * i + 1) * steps.value, left[i] + right[i]);
            store(to + (4 * i + 2) * steps.value, left[i] - right[i]);
            store(to + (4 * i + 3) * steps.value, right[i]);
        }
    }
}

// What a 3x3 convolution with stride 1 reads and writes: rows of positions, `input_lanes` scalars each in x, of which
// `inputs` carry data, and `channels` in out.
template <typename Scalar>
struct Convolution {
    Scalar* out;
    std::int64_t out_row;
    const Scalar* x;  // the window of output 0
    std::int64_t x_row;
    std::int64_t rows, positions;
    std::int64_t inputs, input_lanes, channels;
    bool add;                                             // to what is in `out`
    std::int64_t images = 1, x_image = 0, out_image = 0;  // and from one image to the next
};

// The products of one of four columns, for kTiles tiles, joined into both output rows: the sum and the difference of
// the middle product rows, plus the outer ones. out [tiles, kValues, group] and inputs [inputs / kBlock, tiles, 16,
// kBlock] start at the column. weight is [4, inputs, group], `plane` scalars from one row to the next.
template <typename Scalar, int kVectors, int kTiles>
void winograd_tiles(Scalar* out, const Scalar* inputs, const Runs& runs, const Scalar* weight, std::int64_t plane) {
    constexpr int kL = kLanes<Scalar>;
    constexpr std::int64_t kGroup = kVectors * kL, kB = kBlock<Scalar>;
    Vector<Scalar> upper[kTiles][kVectors] = {}, lower[kTiles][kVectors] = {};
    const bool apart = 2 * runs.count * runs.length > kLongSum;
    for (int outer = 0; outer < 2; ++outer) {
        const int one = outer == 0 ? 1 : 0, other = outer == 0 ? 2 : 3;
        for (int r = 0; r < runs.count; ++r) {
            const Scalar* x = inputs + runs.run[r].input + one * 4 * kB;
            const Scalar* other_x = inputs + runs.run[r].input + other * 4 * kB;
            const Scalar* w = weight + runs.run[r].weight + one * plane;
            const Scalar* other_w = weight + runs.run[r].weight + other * plane;
            for (std::int64_t k = 0; k < runs.length; ++k, w += kGroup, other_w += kGroup) {
                add_value<Scalar, kVectors, kTiles>(upper, x + k, 16 * kB, w);
                add_value<Scalar, kVectors, kTiles>(lower, other_x + k, 16 * kB, other_w);
            }
        }
        if (outer == 0) {
            join_middle<Scalar, kVectors, kTiles>(upper, lower);
            if (!apart) continue;
        }
        const bool add = apart && outer == 1;
#pragma GCC unroll 16
        for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                Scalar* to = out + (i * kValues * kVectors + v) * kL;
                Scalar* to_lower = to + 4 * kGroup;
                store(to, add ? load(to) + upper[i][v] : upper[i][v]);
                store(to_lower, add ? load(to_lower) + lower[i][v] : lower[i][v]);
                upper[i][v] = lower[i][v] = Vector<Scalar>{};
            }
        }
    }
}

template <typename Scalar>
using WinogradTiles = void (*)(Scalar*, const Scalar*, const Runs&, const Scalar*, std::int64_t);

template <typename Scalar, int kVectors, int kTiles = most_rows(kVectors) / 2>
WinogradTiles<Scalar> winograd_tiles_of(std::int64_t tiles) {
    if constexpr (kTiles == 1) {
        return winograd_tiles<Scalar, kVectors, 1>;
    } else {
        return tiles == kTiles ? winograd_tiles<Scalar, kVectors, kTiles>
                               : winograd_tiles_of<Scalar, kVectors, kTiles - 1>(tiles);
    }
}

// winograd_tiles for all tiles.
template <typename Scalar, int kVectors>
void winograd_columns(Scalar* out, const Scalar* inputs, std::int64_t tiles, const Runs& runs, const Scalar* weight,
                      std::int64_t plane) {
    const std::int64_t parts = pieces(tiles, most_rows(kVectors) / 2);
    for (std::int64_t part = 0; part < parts; ++part) {
        const std::int64_t first = start_of(part, tiles, parts), last = start_of(part + 1, tiles, parts);
        winograd_tiles_of<Scalar, kVectors>(last - first)(out + first * kValues * kVectors * kLanes<Scalar>,
                                                          inputs + first * 16 * kBlock<Scalar>, runs, weight, plane);
    }
}

// Writes the 2 x 2 outputs of a row of tiles. An odd convolution has only a part of the last ones.
template <typename Scalar, int kVectors>
void transform_outputs(Scalar* out, const Scalar* m, const Convolution<Scalar>& conv, std::int64_t rows,
                       std::int64_t positions) {
    constexpr std::int64_t kGroup = kVectors * kLanes<Scalar>;
    const auto put = [&conv](Scalar* to, Vector<Scalar> sum) { store(to, conv.add ? load(to) + sum : sum); };
    for (std::int64_t x = 0; x < positions; x += 2, m += kValues * kGroup, out += 2 * conv.channels) {
#pragma GCC unroll 4
        for (std::int64_t c = 0; c < kGroup; c += kLanes<Scalar>) {
            Vector<Scalar> top[4], bottom[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                top[j] = load(m + j * kGroup + c);
                bottom[j] = load(m + (4 + j) * kGroup + c);
                if constexpr (!kJoinsRows) {
                    const Vector<Scalar> m2 = load(m + (8 + j) * kGroup + c);
                    top[j] += bottom[j] + m2;
                    bottom[j] += load(m + (12 + j) * kGroup + c) - m2;
                }
            }
            Scalar* to = out + c;
            put(to, top[0] + top[1] + top[2]);
            if (x + 1 < positions) put(to + conv.channels, top[1] - top[2] - top[3]);
            if (rows < 2) continue;
            put(to + conv.out_row, bottom[0] + bottom[1] + bottom[2]);
            if (x + 1 < positions) put(to + conv.out_row + conv.channels, bottom[1] - bottom[2] - bottom[3]);
        }
    }
}

// weight: as transform_kernels leaves it. scratch: 16 kConvWinogradTiles (input_lanes + channels) scalars.
template <typename Scalar, int kVectors>
void winograd(const Convolution<Scalar>& conv, const Scalar* weight, Scalar* scratch) {
    constexpr std::int64_t kGroup = kVectors * kLanes<Scalar>, kB = kBlock<Scalar>;
    const std::int64_t channels = conv.channels, lanes = conv.input_lanes;
    // Rows of tiles are counted through all images, so that small ones share the weights that are read.
    const std::int64_t all_x = (conv.positions + 1) / 2, of_image = (conv.rows + 1) / 2;
    const std::int64_t all_y = conv.images * of_image;
    const std::int64_t chunks_x = pieces(all_x, kConvWinogradTiles);
    const std::int64_t chunks_y = pieces(all_y, all_x < kConvWinogradTiles ? kConvWinogradTiles / all_x : 1);
    const std::int64_t length = conv.inputs % kB == 0 ? kB : 8;
    for (std::int64_t chunk = 0; chunk < chunks_x * chunks_y; ++chunk) {
        const std::int64_t left = start_of(chunk % chunks_x, all_x, chunks_x);
        const std::int64_t tiles_x = start_of(chunk % chunks_x + 1, all_x, chunks_x) - left;
        const std::int64_t top = start_of(chunk / chunks_x, all_y, chunks_y);
        const std::int64_t tiles_y = start_of(chunk / chunks_x + 1, all_y, chunks_y) - top;
        const std::int64_t tiles = tiles_x * tiles_y;
        Scalar* inputs = scratch;
        Scalar* products = scratch + 16 * tiles * lanes;
        for (std::int64_t y = 0; y < tiles_y; ++y) {
            const std::int64_t image = (top + y) / of_image, row = 2 * ((top + y) % of_image);
            for (std::int64_t c = 0; c < lanes; c += kLanes<Scalar>) {
                transform_inputs(inputs + (c / kB * tiles + y * tiles_x) * 16 * kB + c % kB, {16 * kB, kB},
                                 conv.x + image * conv.x_image + row * conv.x_row + 2 * left * lanes + c, conv.x_row,
                                 lanes, tiles_x);
            }
        }
        Runs runs{};
        runs.length = length;
        for (std::int64_t k = 0; k < conv.inputs; k += length) {
            runs.run[runs.count++] = {k / kB * 16 * tiles * kB + k % kB, k * kGroup};
        }
        for (int i = 0; i < (kJoinsRows ? 4 : 16); ++i) {
            for (std::int64_t first = 0; first < channels; first += kGroup) {
                Scalar* to = products + first * kValues * tiles + i * kGroup;
                const Scalar* of_value = weight + (i * channels + first) * conv.inputs;
                if constexpr (kJoinsRows) {
                    winograd_columns<Scalar, kVectors>(to, inputs + i * kB, tiles, runs, of_value,
                                                       4 * channels * conv.inputs);
                } else {
                    convolve_row(to, one_row(kValues * kGroup), inputs + i * kB, 16 * kB, tiles, runs, of_value,
                                 kVectors);
                }
            }
        }
        for (std::int64_t first = 0; first < channels; first += kGroup) {
            for (std::int64_t y = 0; y < tiles_y; ++y) {
                const std::int64_t image = (top + y) / of_image, row = 2 * ((top + y) % of_image);
                transform_outputs<Scalar, kVectors>(
                    conv.out + image * conv.out_image + row * conv.out_row + 2 * left * channels + first,
                    products + (first * tiles + y * tiles_x * kGroup) * kValues, conv, conv.rows - row,
                    least(2 * tiles_x, conv.positions - 2 * left));
            }
        }
    }
}

template <typename Scalar>
void winograd(const Convolution<Scalar>& conv, const Scalar* weight, int vectors, Scalar* scratch) {
    if constexpr (kMostVectors == 4) {
        if (vectors == 4) return winograd<Scalar, 4>(conv, weight, scratch);
        if (vectors == 3) return winograd<Scalar, 3>(conv, weight, scratch);
    }
    return vectors == 2 ? winograd<Scalar, 2>(conv, weight, scratch) : winograd<Scalar, 1>(conv, weight, scratch);
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
