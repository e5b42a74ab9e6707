// Sums that stay in registers: kVectors vectors of channels times kRows positions (or weights). Every loop over them is
// unrolled, because an accumulator that is indexed at run time would live in memory.
#pragma once

#include <cstdint>

#include "cpu/isa/simd.h"
#include "plan/conv_meta_step_cpu.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

constexpr int kMostVectors = kRegisters == 32 ? 4 : 2;
// 24 of 32 or 12 of 16 registers accumulate; the rest hold what is multiplied.
constexpr int most_rows(int vectors) { return (kRegisters == 32 ? 24 : 12) / (vectors < 2 ? 2 : vectors); }

// A run is a stretch of a sum: consecutive inputs of a position, and as many rows of weights. Here is where they start.
struct Run {
    std::int64_t input;
    std::int64_t weight;
};

constexpr int kMostRuns = 32;

struct Runs {
    Run run[kMostRuns];  // rows or taps of a window, or blocks of at least 8 channels
    int count;
    std::int64_t length;  // inputs of each
};

// A longer sum is a sum of sums of a few runs each. In float32 one long sum would be less exact than torch's.
constexpr std::int64_t kLongSum = 128;

// Where a tile's inputs come from: positions on a regular grid.
struct Steps {
    std::int64_t step;  // from one position to the next
    std::int64_t row;   // from one row of positions to the next

    // Of the tile's row `i`, relative to its first.
    std::int64_t place(int, std::int64_t, int i) const { return i * row; }
};

// Where a tile's inputs come from: positions from a table, one table a run.
struct PositionTable {
    static constexpr std::int64_t step = 0;
    const std::int64_t* of_run[kConvSharedRuns];

    std::int64_t place(int run, std::int64_t first, int i) const { return of_run[run][first + i]; }
};

// A tile takes a row of positions as rows of three: few pointers and constant multiples of a step reach them all.
constexpr int kTileWidth = 3;

// Where a tile's sums go: to rows of positions.
struct ToRows {
    using From = Steps;
    static constexpr int row_width = kTileWidth;
    Steps steps;
    bool add = false;  // to what is there

    static constexpr int targets = 1;
    std::int64_t target(int) const { return 0; }
    static constexpr int sign(int) { return 1; }
    std::int64_t place(std::int64_t first, int i, int width) const {
        return first * steps.step + i / width * steps.row + i % width * steps.step;
    }
    template <typename Value>
    Value finished(Value sum, std::int64_t) const {
        return sum;
    }
};

// Where a tile's sums go: to rows of positions, after a shift and ReLU. The sums are no longer than kLongSum.
template <typename Scalar>
struct Rectified : ToRows {
    const Scalar* shift;

    Rectified(ToRows rows, const Scalar* by) : ToRows(rows), shift(by) {}
    Vector<Scalar> finished(Vector<Scalar> sum, std::int64_t channel) const {
        return relu<Scalar>(sum + load(shift + channel));
    }
};

// Where a tile's sums go: to a table of positions, once for each target, stored or added with the target's sign.
struct ToTargets {
    using From = PositionTable;
    static constexpr int row_width = 1;
    const std::int64_t* places = nullptr;
    std::int64_t all_targets[9] = {};
    int signs[9] = {};
    int targets = 0;
    bool add = false;

    std::int64_t target(int i) const { return all_targets[i]; }
    int sign(int i) const { return signs[i]; }
    std::int64_t place(std::int64_t first, int i, int) const { return places[first + i]; }
    template <typename Value>
    Value finished(Value sum, std::int64_t) const {
        return sum;
    }
};

// For each target, position i of the tile and channel c:
//     out[target + place(first + i) + c] (+)=
//         sum over runs and k of x[place of i + run.input + k] weight[run.weight + k, c]
// The tile's positions lie in rows of kWidth.
template <typename Scalar, typename To, int kVectors, int kRows, int kWidth>
void convolve_tile(Scalar* out, const To& to, std::int64_t first, const Scalar* x, const typename To::From& from,
                   const Runs& runs, const Scalar* weight) {
    constexpr int kL = kLanes<Scalar>;
    Vector<Scalar> sum[kRows][kVectors] = {};
    bool add = to.add;
    std::int64_t terms = 0;
    for (int r = 0; r < runs.count; ++r) {
        const Scalar* w = weight + runs.run[r].weight;
        const Scalar* in[(kRows + kWidth - 1) / kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < (kRows + kWidth - 1) / kWidth; ++i) in[i] = x + runs.run[r].input + from.place(r, first, i);
        for (std::int64_t k = 0; k < runs.length; ++k, w += kVectors * kL) {
            Vector<Scalar> row[kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) row[v] = load(w + v * kL);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                const Vector<Scalar> value = all(in[i / kWidth][i % kWidth * from.step + k]);
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) sum[i][v] += value * row[v];
            }
        }
        terms += runs.length;
        if (r + 1 < runs.count && terms + runs.length <= kLongSum) continue;
        for (int target = 0; target < to.targets; ++target) {
            const Vector<Scalar> sign = all(static_cast<Scalar>(to.sign(target)));
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                Scalar* at = out + to.target(target) + to.place(first, i, kWidth);
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) {
                    store(at + v * kL, to.finished(add ? load(at + v * kL) + sign * sum[i][v] : sum[i][v], v * kL));
                }
            }
        }
        if (r + 1 == runs.count) return;
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<Scalar>{};
        }
        add = true;
        terms = 0;
    }
}

// The pairs of vectors whose outer products a weight gradient sums: positions in rows of images.
template <typename Scalar>
struct OuterProducts {
    const Scalar* x = nullptr;
    std::int64_t x_step = 0, x_row = 0, x_image = 0;
    const Scalar* grad = nullptr;
    std::int64_t grad_step = 0, grad_row = 0, grad_image = 0;
    std::int64_t images = 1, rows = 1, positions = 0;
};

// out[j rows + channels] (+)= sum over positions of x[position + j] * grad[position + channels]
template <typename Scalar, int kVectors, int kRows>
void outer_tile(Scalar* out, const OuterProducts<Scalar>& p, bool add) {
    constexpr int kL = kLanes<Scalar>;
    Vector<Scalar> sum[kRows][kVectors] = {};
    for (std::int64_t image = 0; image < p.images; ++image) {
        for (std::int64_t r = 0; r < p.rows; ++r) {
            const Scalar* x = p.x + image * p.x_image + r * p.x_row;
            const Scalar* grad = p.grad + image * p.grad_image + r * p.grad_row;
            for (std::int64_t i = 0; i < p.positions; ++i, x += p.x_step, grad += p.grad_step) {
                Vector<Scalar> row[kVectors];
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) row[v] = load_loose(grad + v * kL);
#pragma GCC unroll 16
                for (int j = 0; j < kRows; ++j) {
                    const Vector<Scalar> value = all(x[j]);
#pragma GCC unroll 8
                    for (int v = 0; v < kVectors; ++v) sum[j][v] += value * row[v];
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            Scalar* to = out + (j * kVectors + v) * kL;
            store(to, add ? load(to) + sum[j][v] : sum[j][v]);
        }
    }
}

template <typename Scalar, typename To>
using ConvolveTile = void (*)(Scalar*, const To&, std::int64_t, const Scalar*, const typename To::From&, const Runs&,
                              const Scalar*);
template <typename Scalar>
using OuterTile = void (*)(Scalar*, const OuterProducts<Scalar>&, bool);

// The tile for a number of vectors and positions. There is one for each that fits the registers.
template <typename Scalar, typename To, int kVectors, int kRows = most_rows(kVectors)>
ConvolveTile<Scalar, To> convolve_tile_of(std::int64_t rows) {
    if constexpr (kRows == 1) {
        return convolve_tile<Scalar, To, kVectors, 1, To::row_width>;
    } else {
        return rows == kRows ? convolve_tile<Scalar, To, kVectors, kRows, To::row_width>
                             : convolve_tile_of<Scalar, To, kVectors, kRows - 1>(rows);
    }
}

template <typename Scalar, int kVectors, int kRows = most_rows(kVectors)>
OuterTile<Scalar> outer_tile_of(std::int64_t rows) {
    if constexpr (kRows == 1) {
        return outer_tile<Scalar, kVectors, 1>;
    } else {
        return rows == kRows ? outer_tile<Scalar, kVectors, kRows> : outer_tile_of<Scalar, kVectors, kRows - 1>(rows);
    }
}

template <typename Scalar, typename To>
ConvolveTile<Scalar, To> convolve_tile_of(int vectors, std::int64_t rows) {
    if constexpr (kMostVectors == 4) {
        if (vectors == 4) return convolve_tile_of<Scalar, To, 4>(rows);
        if (vectors == 3) return convolve_tile_of<Scalar, To, 3>(rows);
    }
    return vectors == 2 ? convolve_tile_of<Scalar, To, 2>(rows) : convolve_tile_of<Scalar, To, 1>(rows);
}

// The tile for two by two positions.
template <typename Scalar>
ConvolveTile<Scalar, ToRows> pair_tile_of(int vectors) {
    if constexpr (kMostVectors == 4) {
        if (vectors == 4) return convolve_tile<Scalar, ToRows, 4, 4, 2>;
        if (vectors == 3) return convolve_tile<Scalar, ToRows, 3, 4, 2>;
    }
    return vectors == 2 ? convolve_tile<Scalar, ToRows, 2, 4, 2> : convolve_tile<Scalar, ToRows, 1, 4, 2>;
}

template <typename Scalar>
OuterTile<Scalar> outer_tile_of(int vectors, std::int64_t rows) {
    if constexpr (kMostVectors == 4) {
        if (vectors == 4) return outer_tile_of<Scalar, 4>(rows);
        if (vectors == 3) return outer_tile_of<Scalar, 3>(rows);
    }
    return vectors == 2 ? outer_tile_of<Scalar, 2>(rows) : outer_tile_of<Scalar, 1>(rows);
}

// sum[position, channels] += x[position * step] weight[channels]
template <typename Scalar, int kVectors, int kPositions>
[[gnu::always_inline]] inline void add_value(Vector<Scalar> (&sum)[kPositions][kVectors], const Scalar* x,
                                             std::int64_t step, const Scalar* weight) {
    Vector<Scalar> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(weight + v * kLanes<Scalar>);
#pragma GCC unroll 16
    for (int i = 0; i < kPositions; ++i) {
        const Vector<Scalar> value = all(x[i * step]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] += value * row[v];
    }
}

// upper, lower <- upper + lower, upper - lower: the contribution of the middle two product rows to both output rows
template <typename Scalar, int kVectors, int kPositions>
[[gnu::always_inline]] inline void join_middle(Vector<Scalar> (&upper)[kPositions][kVectors],
                                               Vector<Scalar> (&lower)[kPositions][kVectors]) {
#pragma GCC unroll 16
    for (int i = 0; i < kPositions; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const Vector<Scalar> sum = upper[i][v] + lower[i][v];
            lower[i][v] = upper[i][v] - lower[i][v];
            upper[i][v] = sum;
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
