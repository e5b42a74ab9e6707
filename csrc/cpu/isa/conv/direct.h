// A direct convolution of rows of positions, cut into register tiles.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/register_tiles.h"
#include "cpu/isa/integers.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// Cuts the positions into tiles whose sizes differ by at most one.
template <typename Scalar, typename To>
void convolve_positions(Scalar* out, const To& to, const Scalar* x, const typename To::From& from,
                        std::int64_t positions, const Runs& runs, const Scalar* weight, int vectors) {
    const std::int64_t tiles = pieces(positions, most_rows(vectors)), least_rows = positions / tiles;
    const std::int64_t longer = positions % tiles;
    for (std::int64_t tile = 0, first = 0; tile < tiles; ++tile) {
        const std::int64_t rows = least_rows + (tile < longer ? 1 : 0);
        convolve_tile_of<Scalar, To>(vectors, rows)(out, to, first, x + first * from.step, from, runs, weight);
        first += rows;
    }
}

constexpr Steps in_threes(std::int64_t step) { return {step, kTileWidth * step}; }
constexpr ToRows one_row(std::int64_t step, bool add = false) { return {in_threes(step), add}; }

template <typename Scalar, typename To>
void convolve_row(Scalar* out, const To& to, const Scalar* x, std::int64_t x_step, std::int64_t positions,
                  const Runs& runs, const Scalar* weight, int vectors) {
    convolve_positions(out, to, x, in_threes(x_step), positions, runs, weight, vectors);
}

// Convolves rows of positions. Rows of two or three go in pairs. Alone they would leave half of the registers idle, and
// the weights would be read from L2 twice as often.
// add: to what is in `out`.
template <typename Scalar>
void convolve_grid(Scalar* out, Steps to_out, const Scalar* x, Steps to_x, std::int64_t rows, std::int64_t positions,
                   const Runs& runs, const Scalar* weight, int vectors, bool add) {
    if (positions == 1) {
        convolve_row(out, one_row(to_out.row, add), x, to_x.row, rows, runs, weight, vectors);
        return;
    }
    const bool pairs = positions <= 3 && 2 * positions <= most_rows(vectors);
    for (std::int64_t y = 0; y < rows; y += pairs ? 2 : 1) {
        Scalar* to = out + y * to_out.row;
        const Scalar* from = x + y * to_x.row;
        if (pairs && y + 1 < rows) {
            const auto tile =
                positions == 3 ? convolve_tile_of<Scalar, ToRows>(vectors, 6) : pair_tile_of<Scalar>(vectors);
            tile(to, {to_out, add}, 0, from, to_x, runs, weight);
        } else {
            convolve_row(to, one_row(to_out.step, add), from, to_x.step, positions, runs, weight, vectors);
        }
    }
}

// The runs of a 3x3 window. A row of the image has `row` scalars; `inputs` of every `lanes` channels carry data.
inline Runs window_runs(std::int64_t row, std::int64_t lanes, std::int64_t inputs, std::int64_t group) {
    Runs runs{};
    const bool whole = lanes == inputs;  // the three positions of a window's row are adjacent
    runs.count = whole ? 3 : 9;
    runs.length = whole ? 3 * inputs : inputs;
    for (int r = 0; r < runs.count; ++r) {
        runs.run[r].input = whole ? r * row : r / 3 * row + r % 3 * lanes;
        runs.run[r].weight = r * runs.length * group;
    }
    return runs;
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
