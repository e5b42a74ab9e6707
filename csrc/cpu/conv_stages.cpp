// The stages of a convolutional network on the CPU: NHWC, direct convolution in register tiles. CMakeLists.txt compiles
// this file once for each instruction set, with SIGNMAML_ISA naming the namespace and fused multiply-adds where there
// are any.
// Everything but the table has internal linkage and calls no inline function of a header: see kernels.cpp.
// Readable twin: signmaml_ext/reference.py. Every sum has an order of its own, whoever computes it.

#include "cpu/conv_stages.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <typename Scalar>
struct Simd;

template <>
struct Simd<float> {
    static constexpr int kLanes = kVectorBytes / 4;
    typedef float Vector __attribute__((vector_size(kVectorBytes)));
    typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(4)));
    typedef std::int32_t Mask __attribute__((vector_size(kVectorBytes)));
    typedef std::int16_t Words __attribute__((vector_size(kVectorBytes / 2)));
    typedef std::uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
};

template <>
struct Simd<double> {
    static constexpr int kLanes = kVectorBytes / 8;
    typedef double Vector __attribute__((vector_size(kVectorBytes)));
    typedef double Loose __attribute__((vector_size(kVectorBytes), aligned(8)));
    typedef std::int64_t Mask __attribute__((vector_size(kVectorBytes)));
    typedef std::int32_t Words __attribute__((vector_size(kVectorBytes / 2)));
    typedef std::uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
};

template <typename Scalar>
using Vector = typename Simd<Scalar>::Vector;
template <typename Scalar>
using Mask = typename Simd<Scalar>::Mask;
template <typename Scalar>
constexpr int kLanes = Simd<Scalar>::kLanes;

template <typename Scalar>
inline Vector<Scalar> load(const Scalar* from) {
    return *reinterpret_cast<const Vector<Scalar>*>(from);
}
template <typename Scalar>
inline Vector<Scalar> load_loose(const Scalar* from) {
    return *reinterpret_cast<const typename Simd<Scalar>::Loose*>(from);
}
template <typename Scalar>
inline void store(Scalar* to, Vector<Scalar> value) {
    *reinterpret_cast<Vector<Scalar>*>(to) = value;
}
template <typename Scalar>
inline void store_loose(Scalar* to, Vector<Scalar> value) {
    *reinterpret_cast<typename Simd<Scalar>::Loose*>(to) = value;
}
template <typename Scalar>
inline Vector<Scalar> all(Scalar value) {
    return value - Vector<Scalar>{};
}
// A choice out of four, as a byte. By words in between: gcc 12 would widen byte by byte.
template <typename Scalar>
inline Mask<Scalar> load_choice(const std::uint8_t* from) {
    const auto bytes = *reinterpret_cast<const typename Simd<Scalar>::Bytes*>(from);
    return __builtin_convertvector(__builtin_convertvector(bytes, typename Simd<Scalar>::Words), Mask<Scalar>);
}
template <typename Scalar>
inline void store_choice(std::uint8_t* to, Mask<Scalar> value) {
    *reinterpret_cast<typename Simd<Scalar>::Bytes*>(to) = __builtin_convertvector(value, typename Simd<Scalar>::Bytes);
}

// Lanes `kLow`, `kLow` + 1, ... of a and b in turn.
template <typename Scalar, int kLow>
inline Vector<Scalar> interleaved(Vector<Scalar> a, Vector<Scalar> b) {
#if defined(__clang__)
    Vector<Scalar> result{};
    for (int i = 0; i < kLanes<Scalar>; ++i) result[i] = i % 2 == 0 ? a[kLow + i / 2] : b[kLow + i / 2];
    return result;
#else
    Mask<Scalar> which{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<Scalar>; ++i) which[i] = kLow + i / 2 + i % 2 * kLanes<Scalar>;
    return __builtin_shuffle(a, b, which);
#endif
}

// Lanes 0, 2, 4, ... of a and then of b.
template <typename Scalar>
inline Vector<Scalar> every_other(Vector<Scalar> a, Vector<Scalar> b) {
    constexpr int kL = kLanes<Scalar>;
#if defined(__clang__)
    Vector<Scalar> result{};
    for (int i = 0; i < kL; ++i) result[i] = 2 * i < kL ? a[2 * i] : b[2 * i - kL];
    return result;
#else
    Mask<Scalar> which{};
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) which[i] = 2 * i;
    return __builtin_shuffle(a, b, which);
#endif
}

// By halves: each round adds what lies that far away.
template <typename Scalar>
inline Scalar sum_of_lanes(Vector<Scalar> v) {
    constexpr int kL = kLanes<Scalar>;
#pragma GCC unroll 4
    for (int half = kL / 2; half > 0; half /= 2) {
#if defined(__clang__)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
#else
        Mask<Scalar> which{};
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) which[i] = (i + half) % kL;
        v += __builtin_shuffle(v, which);
#endif
    }
    return v[0];
}

// A square of vectors, transposed: each round halves the distance of what belongs together. As in mlp_stages.cpp: files
// of an instruction set share no inline code.
template <typename Scalar>
inline void transpose(Vector<Scalar>* square) {
    constexpr int kL = kLanes<Scalar>;
    Vector<Scalar> other[kL];
#pragma GCC unroll 4
    for (int distance = 1; distance < kL; distance *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kL / 2; ++i) {
            other[2 * i] = interleaved<Scalar, 0>(square[i], square[i + kL / 2]);
            other[2 * i + 1] = interleaved<Scalar, kL / 2>(square[i], square[i + kL / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) square[i] = other[i];
    }
}

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
constexpr std::int64_t pieces(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }
// Piece `i` of `count` things in `n` pieces as even as can be: where it starts.
constexpr std::int64_t start_of(std::int64_t i, std::int64_t count, std::int64_t n) { return i * count / n; }

// ---- register tiles -------------------------------------------------------------------------------------------------
// kVectors vectors of channels times kRows positions (or weights) stay in registers through the whole sum. Every loop
// over them is unrolled: an accumulator that is indexed at run time would live in memory.

constexpr int kMostVectors = kRegisters == 32 ? 4 : 2;
constexpr int kMostRows = 12;
// 24 of 32 or 12 of 16 registers accumulate; the rest hold what is multiplied.
constexpr int most_rows(int vectors) { return (kRegisters == 32 ? 24 : 12) / (vectors < 2 ? 2 : vectors); }

// A stretch of the sum: `length` consecutive inputs of a position, and as many rows of weights.
struct Run {
    std::int64_t input;
    std::int64_t weight;
};

struct Runs {
    Run run[kConvFilters / 8];  // rows or taps of a window, or blocks of at least 8 channels
    int count;
    std::int64_t length;
};

// Longer sums are sums of some runs each: in float32 one long sum would be less exact than torch's.
constexpr std::int64_t kLongSum = 128;

// Where positions lie: `step` from one to the next, and `row` from one row of them to the next;
struct Steps {
    std::int64_t step, row;

    // Row `i` of a tile, from its first on.
    std::int64_t place(int, std::int64_t, int i) const { return i * row; }
};

// or each of a run's at a place of its own.
struct Places {
    static constexpr std::int64_t step = 0;
    const std::int64_t* of_run[kConvSharedRuns];

    std::int64_t place(int run, std::int64_t first, int i) const { return of_run[run][first + i]; }
};

// A row of positions is handled in rows of three, so that few pointers and constant multiples of a step reach them all.
constexpr int kTileWidth = 3;

// NaN stays NaN, as in torch.
template <typename Scalar>
inline Vector<Scalar> relu(Vector<Scalar> y) {
    return y < 0 ? Vector<Scalar>{} : y;
}

// The gradient of what relu was given, or of what it gave. "not <=" lets the gradient of a NaN through, as torch does.
template <typename Scalar>
inline Vector<Scalar> passed_by_relu(Vector<Scalar> y, Vector<Scalar> grad) {
    return y <= 0 ? Vector<Scalar>{} : grad;
}

// Where sums go: to rows of positions,
struct InRows {
    using From = Steps;
    static constexpr int row_width = kTileWidth;
    Steps steps;

    static constexpr int targets = 1;
    static constexpr bool add = false;
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

// there with a shift and ReLU, of sums that are no longer than kLongSum,
template <typename Scalar>
struct Rectified : InRows {
    const Scalar* shift;

    Rectified(InRows rows, const Scalar* by) : InRows(rows), shift(by) {}
    Vector<Scalar> finished(Vector<Scalar> sum, std::int64_t channel) const {
        return relu<Scalar>(sum + load(shift + channel));
    }
};

// or every position's to a place of its own, from each target on, or added there with the target's sign.
struct Scattered {
    using From = Places;
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

// out[target + place of position first + i + channels] (+)= sum over runs and k of x[of position i + run.input + k] *
// weight[run.weight + k rows], for rows of kWidth positions.
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

// Where the outer products of a weight gradient come from: images of rows of positions.
template <typename Scalar>
struct Products {
    const Scalar* x = nullptr;
    std::int64_t x_step = 0, x_row = 0, x_image = 0;
    const Scalar* grad = nullptr;
    std::int64_t grad_step = 0, grad_row = 0, grad_image = 0;
    std::int64_t images = 1, rows = 1, positions = 0;
};

// out[j rows + channels] (+)= sum over positions of x[position + j] * grad[position + channels]
template <typename Scalar, int kVectors, int kRows>
void outer_tile(Scalar* out, const Products<Scalar>& p, bool add) {
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
using OuterTile = void (*)(Scalar*, const Products<Scalar>&, bool);

// The tile of so many vectors and positions, out of those that fit the registers.
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

// Two by two positions.
template <typename Scalar>
ConvolveTile<Scalar, InRows> pair_tile_of(int vectors) {
    if constexpr (kMostVectors == 4) {
        if (vectors == 4) return convolve_tile<Scalar, InRows, 4, 4, 2>;
        if (vectors == 3) return convolve_tile<Scalar, InRows, 3, 4, 2>;
    }
    return vectors == 2 ? convolve_tile<Scalar, InRows, 2, 4, 2> : convolve_tile<Scalar, InRows, 1, 4, 2>;
}

template <typename Scalar>
OuterTile<Scalar> outer_tile_of(int vectors, std::int64_t rows) {
    if constexpr (kMostVectors == 4) {
        if (vectors == 4) return outer_tile_of<Scalar, 4>(rows);
        if (vectors == 3) return outer_tile_of<Scalar, 3>(rows);
    }
    return vectors == 2 ? outer_tile_of<Scalar, 2>(rows) : outer_tile_of<Scalar, 1>(rows);
}

// Positions in tiles as even as can be.
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
constexpr InRows one_row(std::int64_t step) { return {in_threes(step)}; }

template <typename Scalar, typename To>
void convolve_row(Scalar* out, const To& to, const Scalar* x, std::int64_t x_step, std::int64_t positions,
                  const Runs& runs, const Scalar* weight, int vectors) {
    convolve_positions(out, to, x, in_threes(x_step), positions, runs, weight, vectors);
}

// Rows of positions. Rows of two or three go in pairs: alone they would leave half of the registers idle, and the
// weights, which come from the second-level cache, would be read twice as often.
template <typename Scalar>
void convolve_grid(Scalar* out, Steps to_out, const Scalar* x, Steps to_x, std::int64_t rows, std::int64_t positions,
                   const Runs& runs, const Scalar* weight, int vectors) {
    if (positions == 1) {
        convolve_row(out, one_row(to_out.row), x, to_x.row, rows, runs, weight, vectors);
        return;
    }
    const bool pairs = positions <= 3 && 2 * positions <= most_rows(vectors);
    for (std::int64_t y = 0; y < rows; y += pairs ? 2 : 1) {
        Scalar* to = out + y * to_out.row;
        const Scalar* from = x + y * to_x.row;
        if (pairs && y + 1 < rows) {
            const auto tile =
                positions == 3 ? convolve_tile_of<Scalar, InRows>(vectors, 6) : pair_tile_of<Scalar>(vectors);
            tile(to, {to_out}, 0, from, to_x, runs, weight);
        } else {
            convolve_row(to, one_row(to_out.step), from, to_x.step, positions, runs, weight, vectors);
        }
    }
}

// ---- Winograd's F(2x2, 3x3) -----------------------------------------------------------------------------------------
// Two by two outputs out of 16 products a channel instead of 36 (Lavin and Gray 2015). Tiles are pooling windows. Where
// the image is constant along an axis under a tile, the products that tell its outputs apart are exactly 0: what is
// equal stays equal, and max-pooling takes the first of them as it does after a direct convolution.
// The 3 x 3 weights' gradient comes from the same tiles of inputs and 2 x 2 gradients, out of 16 products too.

// sum += a value of every position, `step` apart, times its weights
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

// upper, lower <- their sum and their difference: of the middle two of four rows of products, what both rows of outputs
// have of them
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

// to [16, groups, inputs, group] <- `weight` [groups, 9, inputs, group], transformed; the last row of four turned
// around
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

// Tiles that are transformed, multiplied and transformed back together, some rows of them or a part of one. Their
// values lie next to each other, at offsets the compiler knows:
// inputs [channels / kBlock, tiles, 16, kBlock], products [groups, tiles, kValues, group].
template <typename Scalar>
constexpr std::int64_t kBlock = kLanes<Scalar> > 8 ? kLanes<Scalar> : 8;

// Whether the registers hold the sums of two rows of products at once: then the four rows are joined to those of the
// outputs where they are summed, and half as many values are written.
constexpr bool kJoinsRows = kRegisters == 32;
constexpr std::int64_t kValues = kJoinsRows ? 8 : 16;

// Where transformed values go: the steps from one tile to the next and from one of its 16 values to the next; and which
// rows of four values are wanted.
struct TileSteps {
    std::int64_t tile, value;
    int first_row = 0, last_row = 4;
};

// Some channels of a row of tiles, each 4 x 4 positions of x and two from the next. The last of an odd row reaches one
// position beyond its border: where that matters, the plan has zeros there; in a convolution it only touches outputs
// that nobody stores.
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

// The same of a gradient's tiles of 2 x 2 positions, in the weight gradient: sums and differences.
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

// Where a 3x3 convolution with stride 1 reads and writes: rows of positions, `channels` from one to the next.
template <typename Scalar>
struct Convolution {
    Scalar* out;
    std::int64_t out_row;
    const Scalar* x;  // the window of output 0
    std::int64_t x_row;
    std::int64_t rows, positions;
    std::int64_t inputs, channels;
};

// Of some tiles the products of one of four columns, joined to both rows of outputs: the middle rows' sum and
// difference, to which the outer rows' products are added. out [tiles, kValues, group] and inputs
// [inputs / kBlock, tiles, 16, kBlock], from the column on; weight [4, inputs, group], `plane` from one to the next.
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

// One of four columns of all tiles.
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

// The 2 x 2 outputs of a row of tiles, as far as the convolution has them.
template <typename Scalar, int kVectors>
void transform_outputs(Scalar* out, const Scalar* m, const Convolution<Scalar>& conv, std::int64_t rows,
                       std::int64_t positions) {
    constexpr std::int64_t kGroup = kVectors * kLanes<Scalar>;
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
            store(to, top[0] + top[1] + top[2]);
            if (x + 1 < positions) store(to + conv.channels, top[1] - top[2] - top[3]);
            if (rows < 2) continue;
            store(to + conv.out_row, bottom[0] + bottom[1] + bottom[2]);
            if (x + 1 < positions) store(to + conv.out_row + conv.channels, bottom[1] - bottom[2] - bottom[3]);
        }
    }
}

// weight: as transform_kernels leaves it. scratch: conv_winograd_scratch scalars.
template <typename Scalar, int kVectors>
void winograd(const Convolution<Scalar>& conv, const Scalar* weight, Scalar* scratch) {
    constexpr std::int64_t kGroup = kVectors * kLanes<Scalar>, kB = kBlock<Scalar>;
    const std::int64_t channels = conv.channels;
    const std::int64_t all_x = (conv.positions + 1) / 2, all_y = (conv.rows + 1) / 2;
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
        Scalar* products = scratch + 16 * tiles * channels;
        for (std::int64_t y = 0; y < tiles_y; ++y) {
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                transform_inputs(inputs + (c / kB * tiles + y * tiles_x) * 16 * kB + c % kB, {16 * kB, kB},
                                 conv.x + 2 * (top + y) * conv.x_row + 2 * left * channels + c, conv.x_row, channels,
                                 tiles_x);
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
                transform_outputs<Scalar, kVectors>(
                    conv.out + 2 * (top + y) * conv.out_row + 2 * left * channels + first,
                    products + (first * tiles + y * tiles_x * kGroup) * kValues, conv, conv.rows - 2 * (top + y),
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

// ---- shared products ------------------------------------------------------------------------------------------------
// Three neighbouring outputs of a filter with two taps a and b, over x0 to x3, take four products instead of six, and
// two take three instead of four (Winograd's F(3, 2) and F(2, 2)):
//     y0 = a (x0 - x2) + s + d,  y1 = s - d,  y2 = b (x3 - x1) + s + d
//         with s = (a + b) / 2 (x1 + x2),  d = (a - b) / 2 (x2 - x1);
//     y0 = a (x0 - x1) + s,  y1 = b (x2 - x1) + s  with s = (a + b) / 2 (x1 + x1)
// With stride 2 the taps 0 and 2 of an axis are such a filter over every other position, and tap 1 is on its own: 49
// products instead of 81 for 3 x 3 outputs of a 3x3 window. The gradient of the inputs has the same form. The gradients
// of the two taps share the products of two outputs,
//     da = g0 x0 + g1 x1 = g0 (x0 - x1) + s,  db = g0 x1 + g1 x2 = g1 (x2 - x1) + s  with s = (g0 + g1) x1,
// where a tap that meets only zeros still gets exactly 0, on which the sign depends; with stride 1 too, for taps 0 and
// 1 of images too small for F(2x2, 3x3). At the image's edge an output is on its own where that leaves the border's
// zeros out, but for a last one beside one that is left alone; of two outputs each is, and nothing is shared.

// Along one axis: x[at] + sign * x[other], or without a sign x[at].
struct Blend {
    std::int64_t at, other;
    int sign;
};

constexpr Blend alone(std::int64_t at) { return {at, at, 0}; }

// Some outputs of an axis, or two or three at a time. Weights are numbered by tap; 3 and 4 are half of taps 0 and 2's
// sum and of their difference.
struct AxisTerm {
    struct Product {
        Blend x;
        int weight;
    };
    struct Target {
        std::int64_t out;
        int sign;
    };
    std::int64_t count, x_step;  // how often, and inputs from one time to the next
    std::int64_t out_step;
    bool adds;  // to what other terms leave; else it is the first that its outputs get, with sign 1
    int targets;
    Target target[3];
    int products;
    Product product[3];
};

struct Axis {
    AxisTerm term[10];
    int terms = 0;

    void add(const AxisTerm& next) {
        if (next.count > 0) term[terms++] = next;
    }
};

// Whether an axis with so many outputs shares products.
constexpr bool shares_products(std::int64_t out) { return out > 2; }

// Outputs of an axis, in turn: one on its own at the image's edge, pairs, and what is left.
struct Pairing {
    std::int64_t lead, pairs, tail;
};

// Of outputs [first, last) of `out`. `meets_end`: a tap of the last is over the border.
constexpr Pairing pairing_of(std::int64_t first, std::int64_t last, std::int64_t out, bool meets_end) {
    const std::int64_t count = last - first;
    const bool leads = first == 0 && (count % 2 == 1 || meets_end || !shares_products(out));
    const std::int64_t rest = count - (leads ? 1 : 0);
    return {count - rest, rest / 2, rest % 2};
}

// Outputs of an axis in groups that share products, and how many of the last are left.
struct Grouping {
    std::int64_t triples, pairs, rest;
};

// With as few products as can be. Those of tap 1 apart, three outputs take four, two take three and one takes two.
constexpr Grouping grouping_of(std::int64_t count) {
    const std::int64_t triples = count > 1 && count % 3 == 1 ? count / 3 - 1 : count / 3;
    return {triples, (count - 3 * triples) / 2, (count - 3 * triples) % 2};
}

// Outputs [first, last) of an axis with stride 2. Positions count from the border's zero.
inline Axis strided_axis(std::int64_t first, std::int64_t last, std::int64_t in, std::int64_t out) {
    const std::int64_t count = last - first, lead = first == 0 ? 1 : 0;
    const bool meets_end = last == out && in % 2 == 1;  // tap 2 of the last output is over the border
    // Then it is on its own, unless one other is left besides: the two share.
    const std::int64_t ends = meets_end && count - lead != 2 && count > lead ? 1 : 0;
    const auto [triples, pairs, rest] = grouping_of(count - lead - ends);
    const std::int64_t tail = rest + ends, end = 2 * (last - 1);
    const std::int64_t t = lead, p = t + 3 * triples, x = 2 * (first + t), z = 2 * (first + p);
    Axis axis;  // of terms: count, x_step; out_step, adds, targets; products
    axis.add({triples, 6, 3, false, 1, {{t, 1}}, 2, {{{x, x + 4, -1}, 0}, {alone(x + 1), 1}}});
    axis.add({triples, 6, 3, false, 1, {{t + 1, 1}}, 1, {{alone(x + 3), 1}}});
    axis.add({triples, 6, 3, false, 1, {{t + 2, 1}}, 2, {{{x + 6, x + 2, -1}, 2}, {alone(x + 5), 1}}});
    axis.add({pairs, 4, 2, false, 1, {{p, 1}}, 2, {{{z, z + 2, -1}, 0}, {alone(z + 1), 1}}});
    axis.add({pairs, 4, 2, false, 1, {{p + 1, 1}}, 2, {{{z + 4, z + 2, -1}, 2}, {alone(z + 3), 1}}});
    axis.add({lead, 0, 0, false, 1, {{0, 1}}, in > 1 ? 2 : 1, {{alone(1), 1}, {alone(2), 2}}});
    axis.add({tail,
              0,
              0,
              false,
              1,
              {{count - 1, 1}},
              meets_end ? 2 : 3,
              {{alone(end), 0}, {alone(end + 1), 1}, {alone(end + 2), 2}}});
    axis.add({triples, 6, 3, true, 3, {{t, 1}, {t + 1, 1}, {t + 2, 1}}, 1, {{{x + 2, x + 4, 1}, 3}}});
    axis.add({triples, 6, 3, true, 3, {{t, 1}, {t + 1, -1}, {t + 2, 1}}, 1, {{{x + 4, x + 2, -1}, 4}}});
    axis.add({pairs, 4, 2, true, 2, {{p, 1}, {p + 1, 1}}, 1, {{{z + 2, z + 2, 1}, 3}}});
    return axis;
}

// Inputs [first, last) of such an axis, whose gradient comes from that of the outputs; `first` is even. An even input
// is under tap 1 of one output, an odd one under taps 2 and 0 of two: taps 0 and 2 of the exchanged window.
inline Axis gathering_axis(std::int64_t first, std::int64_t last, std::int64_t out) {
    const std::int64_t odd = (last - first) / 2, g = first / 2 + 1;
    const std::int64_t ends = g + odd > out ? 1 : 0;  // the last is under one output alone
    const auto [triples, pairs, rest] = grouping_of(odd - ends);
    const std::int64_t p = 6 * triples + 1, h = g + 3 * triples;
    Axis axis;  // of terms: count, x_step; out_step, adds, targets; products
    axis.add({(last - first + 1) / 2, 1, 2, false, 1, {{0, 1}}, 1, {{alone(g), 1}}});
    axis.add({triples, 3, 6, false, 3, {{1, 1}, {3, 1}, {5, 1}}, 1, {{{g + 1, g + 2, 1}, 3}}});
    axis.add({triples, 3, 6, true, 3, {{1, 1}, {3, -1}, {5, 1}}, 1, {{{g + 2, g + 1, -1}, 4}}});
    axis.add({triples, 3, 6, true, 1, {{1, 1}}, 1, {{{g, g + 2, -1}, 0}}});
    axis.add({triples, 3, 6, true, 1, {{5, 1}}, 1, {{{g + 3, g + 1, -1}, 2}}});
    axis.add({pairs, 2, 4, false, 2, {{p, 1}, {p + 2, 1}}, 1, {{{h + 1, h + 1, 1}, 3}}});
    axis.add({pairs, 2, 4, true, 1, {{p, 1}}, 1, {{{h, h + 1, -1}, 0}}});
    axis.add({pairs, 2, 4, true, 1, {{p + 2, 1}}, 1, {{{h + 2, h + 1, -1}, 2}}});
    for (std::int64_t i = odd - rest - ends; i < odd; ++i) {
        const int products = g + i + 1 > out ? 1 : 2;
        axis.add({1, 0, 0, false, 1, {{2 * i + 1, 1}}, products, {{alone(g + i), 0}, {alone(g + i + 1), 2}}});
    }
    return axis;
}

// Images of positions of channels.
template <typename Scalar>
struct Images {
    const Scalar* first;
    std::int64_t image, row, channels;
};

// Positions of every one of them, in rows and columns so many steps apart.
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

// to [positions, to_step] <- the blends at a box's positions
template <typename Scalar>
void copy_blended(Scalar* to, std::int64_t to_step, const Images<Scalar>& from, const Blend& rows, const Blend& columns,
                  const Box& box) {
    const auto copy = rows.sign == 0
                          ? (columns.sign == 0 ? copy_blended<Scalar, false, false> : copy_blended<Scalar, false, true>)
                          : (columns.sign == 0 ? copy_blended<Scalar, true, false> : copy_blended<Scalar, true, true>);
    copy(to, to_step, from, rows, columns, box);
}

// Where the weights of a row's number and a column's are among mixed weights: one of the two is 3 or 4.
inline std::int64_t mixed_place(int row, int column) { return row < 3 ? 2 * row + column - 3 : 5 * row + column - 9; }

// Scalars of a matrix that are mixed before the next matrix's: a processor follows only some streams of memory.
constexpr std::int64_t kMixedStretch = 512;

// half sum, half difference <- of a and b
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

// Images that are convolved together.
template <typename Scalar>
struct SharedConvolution {
    Scalar* out;
    std::int64_t out_image, out_row;
    Images<Scalar> x;  // in the same memory as scratch
    std::int64_t images, inputs;
    const Scalar* weight;  // [groups, 9, inputs, group]
    const Scalar* mixed;   // [groups, 16, inputs, group], in the same memory
    int vectors;
};

// Where the outputs of a term belong, but for their places: each gets what is new, or what is added.
template <typename Scalar>
Scattered targets_of(const SharedConvolution<Scalar>& conv, const AxisTerm& rows, const AxisTerm& columns) {
    Scattered to;
    to.add = rows.adds || columns.adds;
    for (int y = 0; y < rows.targets; ++y) {
        for (int x = 0; x < columns.targets; ++x) {
            const AxisTerm::Target row = rows.target[y], column = columns.target[x];
            to.signs[to.targets] = row.sign * column.sign;
            to.all_targets[to.targets++] = row.out * conv.out_row + column.out * conv.x.channels;
        }
    }
    return to;
}

// Of positions of images, from one to the next.
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

// The weights of a term's products with another's, `to_mixed` from the weights of the same group to the mixed ones.
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

// What is not blended is read where it is. scratch: conv_shared_scratch scalars.
template <typename Scalar>
void convolve_shared(const SharedConvolution<Scalar>& conv, const AxisTerm& rows, const AxisTerm& columns,
                     Scalar* scratch) {
    const std::int64_t channels = conv.x.channels, group = conv.vectors * kLanes<Scalar>, tap = conv.inputs * group;
    Scattered to = targets_of(conv, rows, columns);
    std::int64_t places[kConvSharedPositions], of_x[kConvSharedPositions], of_copies[kConvSharedPositions];
    to.places = places;
    Places from;
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

// The matrices of products along one axis, [inputs, outputs] each a sum over positions: of x0 - x1, x1 and x2 - x1, and
// of the tap on its own. Each comes from up to three stretches of positions.
struct OuterAxis {
    struct Stretch {
        Blend x, grad;
        std::int64_t count, x_step, grad_step;
    };
    Stretch stretch[4][3];
    int stretches[4] = {};

    void add(int matrix, const Stretch& next) {
        if (next.count > 0) stretch[matrix][stretches[matrix]++] = next;
    }
};

// Of outputs [first, last). Positions of inputs count from the border's zero, those of gradients from the first output.
inline OuterAxis outer_axis(std::int64_t first, std::int64_t last, std::int64_t in, std::int64_t out,
                            std::int64_t stride) {
    const std::int64_t count = last - first;
    const bool meets_end = last == out && out * stride > in;  // tap `stride` of the last output is over the border
    const auto [lead, pairs, tail] = pairing_of(first, last, out, meets_end);
    const std::int64_t g = first + lead, x = stride * g, end = stride * (last - 1), single = 3 - stride;
    const bool single_meets_end = last == out && (out - 1) * stride + single > in;
    OuterAxis axis;  // of stretches: x, grad; count; x_step, grad_step
    axis.add(0, {{x, x + stride, -1}, alone(g), pairs, 2 * stride, 2});
    axis.add(0, {alone(end), alone(last - 1), tail, 0, 0});
    axis.add(1, {alone(x + stride), {g, g + 1, 1}, pairs, 2 * stride, 2});
    axis.add(2, {{x + 2 * stride, x + stride, -1}, alone(g + 1), pairs, 2 * stride, 2});
    axis.add(2, {alone(stride), alone(0), stride > in ? 0 : lead, 0, 0});
    axis.add(2, {alone(end + stride), alone(last - 1), meets_end ? 0 : tail, 0, 0});
    axis.add(3, {alone(stride * first + single), alone(first), count - (single_meets_end ? 1 : 0), stride, 1});
    return axis;
}

// ---- the images and layer 1's patches -------------------------------------------------------------------------------

template <typename Scalar>
void pack_image(const ConvTask<Scalar>& t, const Scalar* x, std::int64_t example) {
    const std::int64_t h = t.shape->height, w = t.shape->width, c = t.shape->channels;
    Scalar* image = t.at(t.layout->images) + example * (h + 2) * (w + 2) * c;
    for (std::int64_t channel = 0; channel < c; ++channel) {
        for (std::int64_t y = 0; y < h; ++y) {
            const Scalar* from = x + (channel * h + y) * w;
            Scalar* to = image + ((y + 1) * (w + 2) + 1) * c + channel;
            for (std::int64_t i = 0; i < w; ++i) to[i * c] = from[i];
        }
    }
}

// One item's convolution rows, of a block.
struct Rows {
    std::int64_t example, first, count;
};

inline Rows rows_of(std::int64_t item, std::int64_t items, std::int64_t rows, std::int64_t height) {
    const std::int64_t first = item % items * rows;
    return {item / items, first, least(rows, height - first)};
}

template <typename Scalar>
inline Rows raw_rows(const ConvTask<Scalar>& t, int block, std::int64_t item) {
    const ConvBlockPlan& b = t.block(block);
    return rows_of(item, b.items, b.rows, b.out_h);
}

// Where the window of position 0 of an output row starts in the block's input.
template <typename Scalar>
const Scalar* input_row(const ConvTask<Scalar>& t, int block, std::int64_t example, std::int64_t y) {
    const ConvBlockPlan& b = t.block(block);
    const Scalar* base = t.at(block == 0 ? t.layout->images : t.block(block - 1).halved);
    const std::int64_t row = (b.in_w + 2) * std::int64_t{b.input_lanes};
    if (block > 0) example -= t.held[block - 1];
    return base + (example * (b.in_h + 2) + y * b.stride) * row;
}

template <typename Scalar>
void patch_sum(const ConvTask<Scalar>& t, std::int64_t item) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t c = b.inputs, step = b.stride * c;
    Scalar* sums = t.partial(item);
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

// The rows of padded images by the rows of the window that meet them: bit k of a number from 1 to 7 is for row k. Those
// of one number are `stride` apart.
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

// Of images of one channel: positions side by side fill vectors. Scratch: the values of a stretch of rows under the
// three columns of a window, centred, [rows, 3, lanes].
template <typename Scalar>
void patch_covariance_gray(const ConvTask<Scalar>& t, std::int64_t example, Scalar* scratch) {
    constexpr std::int64_t kL = kLanes<Scalar>, kRowsAtOnce = 32;
    static_assert((2 * kRowsAtOnce + 1) * 3 * kL <= kConvCovarianceSums, "a stretch of rows fits");
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t stride = b.stride, row = b.in_w + 2;
    const Vector<Scalar> center =
        all(static_cast<Scalar>(reinterpret_cast<const double*>(t.at(t.layout->patch_mean))[4]));
    Scalar* to = t.partial(example);
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

// A patch's rows are those of images, and what two of them have in common depends on how far they are apart: products
// of rows are added up once for all windows that have both. Scratch: the example, centred, and sums [8, 3 apart,
// columns / kColumns, 3 inputs, kColumns] by MetRows.
template <typename Scalar>
void patch_covariance(const ConvTask<Scalar>& t, std::int64_t example, Scalar* scratch) {
    if (t.block(0).inputs == 1) return patch_covariance_gray(t, example, scratch);
    constexpr std::int64_t kL = kLanes<Scalar>;
    constexpr int kVectors = kL < 16 ? 2 : 1;
    constexpr std::int64_t kColumns = kVectors * kL;
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t c = b.inputs, row = (b.in_w + 2) * c, size = (b.in_h + 2) * row, of_patch = 3 * c;
    const auto* middle = reinterpret_cast<const double*>(t.at(t.layout->patch_mean)) + 4 * c;
    Scalar centers[kConvChannels * kL];  // whole pixels and whole vectors
    for (std::int64_t i = 0; i < c * kL; ++i) centers[i] = static_cast<Scalar>(middle[i % c]);
    const Scalar* image = t.at(t.layout->images) + example * size;
    for (std::int64_t i = 0; i < size; i += c * kL) {
        for (std::int64_t j = 0; j < c * kL; j += kL) {
            store(scratch + i + j, load_loose(image + i + j) - load_loose(centers + j));
        }
    }
    Scalar* all_sums = scratch + conv_centred(size);
    const std::int64_t sums_size = pieces(of_patch, kColumns) * of_patch * kColumns;
    const auto sums_of = [&](int by, int apart) { return all_sums + (by * 3 + apart) * sums_size; };
    const MetRows met = met_rows(b.in_h, b.out_h, b.stride);
    const std::int64_t at_once = most(1, kLongSum / b.out_w);
    Products<Scalar> products;
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
                t.partial(example) + row_of_window * of_patch * 3 * of_patch + (row_of_window + apart) * of_patch;
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

// ---- forward --------------------------------------------------------------------------------------------------------

// The runs of a 3x3 window in rows of `row` scalars, with `inputs` of every `lanes` channels.
inline Runs window_runs(std::int64_t row, std::int64_t lanes, std::int64_t inputs, std::int64_t group) {
    Runs runs{};
    const bool whole = lanes == inputs;  // the three positions of a window's row follow each other without a gap
    runs.count = whole ? 3 : 9;
    runs.length = whole ? 3 * inputs : inputs;
    for (int r = 0; r < runs.count; ++r) {
        runs.run[r].input = whole ? r * row : r / 3 * row + r % 3 * lanes;
        runs.run[r].weight = r * runs.length * group;
    }
    return runs;
}

// Where the weights of `kLanes` outputs lie in packed weights, of value q of theta's [filters, inputs * 9].
inline std::int64_t packed_place(const ConvBlockPlan& b, std::int64_t group, std::int64_t out, std::int64_t q) {
    return (out / group * 9 + q % 9) * b.inputs * group + q / 9 * group + out % group;
}

// Padding is written too: a task with a NaN leaves it everywhere.
template <typename Scalar>
void pack_weights(const ConvTask<Scalar>& t, int block, const Scalar* theta) {
    constexpr int kL = kLanes<Scalar>;
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t filters = t.shape->filters, group = b.vectors * kL, length = 9 * std::int64_t{b.inputs};
    Scalar* to = t.at(b.weight);
    for (std::int64_t out = 0; out < t.layout->channels; out += kL) {
        const Scalar* from = theta + out * length;
        std::int64_t q = 0;
        for (; q + kL <= length; q += kL) {
            Vector<Scalar> rows[kL];
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) {
                rows[i] = out + i < filters ? load_loose(from + i * length + q) : Vector<Scalar>{};
            }
            transpose<Scalar>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) store(to + packed_place(b, group, out, q + i), rows[i]);
        }
        for (; q < length; ++q) {
            Scalar* row = to + packed_place(b, group, out, q);
            for (int i = 0; i < kL; ++i) row[i] = out + i < filters ? from[i * length + q] : Scalar(0);
        }
    }
}

template <typename Scalar>
void unpack_weights(const ConvTask<Scalar>& t, int block, const Scalar* packed, Scalar* theta) {
    constexpr int kL = kLanes<Scalar>;
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t filters = t.shape->filters, group = b.vectors * kL, length = 9 * std::int64_t{b.inputs};
    for (std::int64_t out = 0; out < t.layout->channels; out += kL) {
        Scalar* to = theta + out * length;
        std::int64_t q = 0;
        for (; q + kL <= length; q += kL) {
            Vector<Scalar> rows[kL];
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) rows[i] = load(packed + packed_place(b, group, out, q + i));
            transpose<Scalar>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) {
                if (out + i < filters) store_loose(to + i * length + q, rows[i]);
            }
        }
        for (; q < length; ++q) {
            const Scalar* row = packed + packed_place(b, group, out, q);
            for (int i = 0; i < kL && out + i < filters; ++i) to[i * length + q] = row[i];
        }
    }
}

template <typename Scalar>
void pack_back(const ConvTask<Scalar>& t, int block) {
    constexpr int kL = kLanes<Scalar>;
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t filters = t.shape->filters, channels = t.layout->channels;
    const std::int64_t group = b.vectors * kL, group_back = b.vectors_back * kL;
    for (std::int64_t tap = 0; tap < 9; ++tap) {
        for (std::int64_t out = 0; out < channels; out += kL) {
            const Scalar* from = t.at(b.weight) + (out / group * 9 + 8 - tap) * filters * group + out % group;
            for (std::int64_t in = 0; in < channels; in += kL) {  // now outputs, of which those beyond filters are 0
                Vector<Scalar> rows[kL];
#pragma GCC unroll 16
                for (int i = 0; i < kL; ++i) {
                    rows[i] = in + i < filters ? load(from + (in + i) * group) : Vector<Scalar>{};
                }
                transpose<Scalar>(rows);
                Scalar* to = t.at(t.layout->weight_back) + ((in / group_back * 9 + tap) * filters + out) * group_back +
                             in % group_back;
#pragma GCC unroll 16
                for (int i = 0; i < kL; ++i) {
                    if (out + i < filters) store(to + i * group_back, rows[i]);
                }
            }
        }
    }
}

// Of block 0, whose statistics are known: with BatchNorm's scale and, where it pools, for F(2, 3) over pairs of rows.
template <typename Scalar>
void transform_first(const ConvTask<Scalar>& t) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t group = b.vectors * kLanes<Scalar>, row = 3 * std::int64_t{b.inputs} * group;
    const Vector<Scalar> half = all(Scalar(0.5));
    Scalar* to = t.at(t.layout->first_weight);
    for (std::int64_t first = 0; first < t.layout->channels; first += group) {
        const Scalar* weight = t.at(b.weight) + first * 9 * b.inputs;
        for (std::int64_t i = 0; i < row; i += kLanes<Scalar>) {
            const Vector<Scalar> scale = load(t.vector(0, kScale) + first + i % group);
            const Vector<Scalar> g0 = scale * load(weight + i), g1 = scale * load(weight + row + i);
            const Vector<Scalar> g2 = scale * load(weight + 2 * row + i);
            if (b.stride == 1) {
                store(to + i, g0);
                store(to + row + i, half * (g0 + g2 + g1));
                store(to + 2 * row + i, half * (g0 + g2 - g1));
                store(to + 3 * row + i, -g2);
            } else {
                store(to + i, g0);
                store(to + row + i, g1);
                store(to + 2 * row + i, g2);
            }
        }
        to += (b.stride == 1 ? 4 : 3) * row;
    }
}

template <typename Scalar>
void transform_weights(const ConvTask<Scalar>& t, int block, bool back) {
    if (block == 0) return transform_first(t);
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t group = (back ? b.vectors_back : b.vectors) * kLanes<Scalar>;
    const Scalar* weight = t.at(back ? t.layout->weight_back : b.weight);
    if (b.winograd) {
        transform_kernels(t.at(t.layout->transformed), weight, t.shape->filters, t.layout->channels, group);
    } else if (b.shared && (shares_products(b.out_h) || shares_products(b.out_w))) {
        mix_weights(t.at(t.layout->transformed), weight, t.shape->filters, t.layout->channels, group);
    }
}

// The mean of one item and its squared deviations from it, vector by vector of channels.
template <typename Scalar>
void item_statistics(Scalar* partial, const Scalar* raw, std::int64_t row, std::int64_t rows, std::int64_t positions,
                     std::int64_t channels) {
    const Scalar count = static_cast<Scalar>(rows * positions);
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        // Four sums at once: one would wait for itself at every addition.
        Vector<Scalar> sums[4] = {}, squares[4] = {};
        for (std::int64_t y = 0; y < rows; ++y) {
            const Scalar* z = raw + y * row + c;
            std::int64_t i = 0;
            for (; i + 4 <= positions; i += 4, z += 4 * channels) {
#pragma GCC unroll 4
                for (int s = 0; s < 4; ++s) sums[s] += load(z + s * channels);
            }
            for (; i < positions; ++i, z += channels) sums[0] += load(z);
        }
        const Vector<Scalar> mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / count;
        for (std::int64_t y = 0; y < rows; ++y) {
            const Scalar* z = raw + y * row + c;
            std::int64_t i = 0;
            for (; i + 4 <= positions; i += 4, z += 4 * channels) {
#pragma GCC unroll 4
                for (int s = 0; s < 4; ++s) {
                    const Vector<Scalar> deviation = load(z + s * channels) - mean;
                    squares[s] += deviation * deviation;
                }
            }
            for (; i < positions; ++i, z += channels) squares[0] += (load(z) - mean) * (load(z) - mean);
        }
        store(partial + c, mean);
        store(partial + channels + c, (squares[0] + squares[1]) + (squares[2] + squares[3]));
    }
}

// Which of the four each winner of an example is.
template <typename Scalar>
std::uint8_t* choices_of(const ConvTask<Scalar>& t, int block, std::int64_t example) {
    const ConvBlockPlan& b = t.block(block);
    return reinterpret_cast<std::uint8_t*>(t.at(b.choice)) + example * b.half_h * b.half_w * t.layout->channels;
}

// Of every 2 x 2 raw values the one that is largest after BatchNorm, the first of equals: gamma's sign decides, before
// the statistics are known. Calls keep(y, x, c, winner) for rows y of the halved image.
template <typename Scalar, typename Keep>
void choose_winners(const ConvTask<Scalar>& t, int block, const Rows& rows, const Scalar* raw, std::int64_t row,
                    const Keep& keep) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    const Scalar* gamma = t.vector(block, kGamma);
    std::uint8_t* choices = choices_of(t, block, rows.example);
    for (std::int64_t y = 0; y < rows.count / 2; ++y) {
        const std::int64_t half_y = rows.first / 2 + y;
        const std::int64_t place = half_y * b.half_w * channels;
        for (std::int64_t x = 0; x < b.half_w; ++x) {
            const Scalar* z = raw + 2 * y * row + 2 * x * channels;
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                const Vector<Scalar> g = load(gamma + c), one = all(Scalar(1));
                const Vector<Scalar> flip = g > 0 ? one : (g < 0 ? -one : Vector<Scalar>{});
                Vector<Scalar> best = load(z + c);
                Mask<Scalar> choice = {};
#pragma GCC unroll 4
                for (int i = 1; i < 4; ++i) {
                    const Vector<Scalar> next = load(z + i / 2 * row + i % 2 * channels + c);
                    const Mask<Scalar> better = next * flip > best * flip;
                    best = better ? next : best;
                    choice = better ? Mask<Scalar>{} + i : choice;
                }
                store_choice<Scalar>(choices + place + x * channels + c, choice);
                keep(half_y, x, c, best);
            }
        }
    }
}

// Where BatchNorm reads and the halved gradient belongs: the winners, or without pooling the raw values.
template <typename Scalar>
struct Winners {
    const Scalar* base;
    std::int64_t example, row;
};

template <typename Scalar>
Winners<Scalar> winners_of(const ConvTask<Scalar>& t, int block) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    if (b.stride == 1) return {t.at(b.winner), b.half_h * b.half_w * channels, b.half_w * channels};
    const std::int64_t row = (b.out_w + 2) * channels;
    return {t.at(b.raw) + row + channels, (b.out_h + 2) * row, row};
}

// Row `y` of an example of a block's halved output, inside its border.
template <typename Scalar>
Scalar* halved_row(const ConvTask<Scalar>& t, int block, std::int64_t example, std::int64_t y) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, row = (b.half_w + 2 * b.pad) * channels;
    return t.at(b.halved) + ((example - t.held[block]) * (b.half_h + 2 * b.pad) + y + b.pad) * row + b.pad * channels;
}

// One row of a block's halved output from the row's winners.
template <typename Scalar>
void normalise_row(const ConvTask<Scalar>& t, int block, const Scalar* from, Scalar* to) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    const Scalar* scale = t.vector(block, kScale);
    const Scalar* shift = t.vector(block, kShift);
    for (std::int64_t x = 0; x < b.half_w; ++x, from += channels, to += channels) {
        for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
            store(to + c, relu<Scalar>(load(scale + c) * load(from + c) + load(shift + c)));
        }
    }
}

template <typename Scalar>
void normalise(const ConvTask<Scalar>& t, int block, std::int64_t example) {
    const Winners<Scalar> winners = winners_of(t, block);
    for (std::int64_t y = 0; y < t.block(block).half_h; ++y) {
        normalise_row(t, block, winners.base + example * winners.example + y * winners.row,
                      halved_row(t, block, example, y));
    }
}

// raw <- rows of a later block's convolution
template <typename Scalar>
void convolve_rows(const ConvTask<Scalar>& t, int block, const Rows& rows, Scalar* raw, std::int64_t row,
                   Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>;
    const std::int64_t row_in = (b.in_w + 2) * channels;
    if (b.winograd) {
        const Scalar* x = input_row(t, block, rows.example, rows.first);
        winograd<Scalar>({raw, row, x, row_in, rows.count, b.out_w, b.inputs, channels}, t.at(t.layout->transformed),
                         b.vectors, scratch);
        return;
    }
    const Runs runs = window_runs(row_in, channels, b.inputs, group);
    for (std::int64_t first = 0; first < channels; first += group) {
        convolve_grid(raw + first, {channels, row}, input_row(t, block, rows.example, rows.first),
                      {b.stride * channels, b.stride * row_in}, rows.count, b.out_w, runs,
                      t.at(b.weight) + first * 9 * b.inputs, b.vectors);
    }
}

// Pooling windows of block 0 side by side. F(2, 3) takes the outputs of two rows from four rows of values that it makes
// of the inputs under them: four products for two outputs instead of six. Here they stay in registers until the largest
// of four is known; the scale in the weights has turned it around where gamma is negative.
template <typename Scalar>
struct FirstWindows {
    const Scalar* inputs;  // [4, plane]
    std::int64_t plane;
    std::int64_t channels_in;
    const Scalar* weight;  // [4, 3 channels_in, group]
    const Scalar* shift;   // [group]
    Scalar* halved;
    std::uint8_t* choices;
    std::int64_t channels;  // from one window's output to the next
};

// sums of two planes' products: of every position with kVectors vectors of channels
template <typename Scalar, int kVectors, int kPositions>
[[gnu::always_inline]] inline void add_products(Vector<Scalar> (&one)[kPositions][kVectors],
                                                Vector<Scalar> (&other)[kPositions][kVectors],
                                                const FirstWindows<Scalar>& w, int one_plane, int other_plane) {
    constexpr std::int64_t kGroup = kVectors * kLanes<Scalar>;
    const std::int64_t length = 3 * w.channels_in;
    const Scalar* x = w.inputs + one_plane * w.plane;
    const Scalar* other_x = w.inputs + other_plane * w.plane;
    const Scalar* weight = w.weight + one_plane * length * kGroup;
    const Scalar* other_weight = w.weight + other_plane * length * kGroup;
    for (std::int64_t k = 0; k < length; ++k) {
        add_value<Scalar, kVectors, kPositions>(one, x + k, w.channels_in, weight + k * kGroup);
        add_value<Scalar, kVectors, kPositions>(other, other_x + k, w.channels_in, other_weight + k * kGroup);
    }
}

template <typename Scalar, int kVectors, int kWindows>
void first_windows(const FirstWindows<Scalar>& w) {
    constexpr int kPositions = 2 * kWindows, kL = kLanes<Scalar>;
    // Of the upper and the lower row: of two planes first, whose sum and difference the other two are added to.
    Vector<Scalar> upper[kPositions][kVectors] = {}, lower[kPositions][kVectors] = {};
    add_products<Scalar, kVectors, kPositions>(upper, lower, w, 1, 2);
    join_middle<Scalar, kVectors, kPositions>(upper, lower);
    add_products<Scalar, kVectors, kPositions>(upper, lower, w, 0, 3);
#pragma GCC unroll 2
    for (int window = 0; window < kWindows; ++window) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const Vector<Scalar> next[] = {upper[2 * window + 1][v], lower[2 * window][v], lower[2 * window + 1][v]};
            Vector<Scalar> best = upper[2 * window][v];
            Mask<Scalar> choice = {};
#pragma GCC unroll 3
            for (int i = 0; i < 3; ++i) {
                const Mask<Scalar> better = next[i] > best;
                best = better ? next[i] : best;
                choice = better ? Mask<Scalar>{} + (i + 1) : choice;
            }
            const std::int64_t to = window * w.channels + v * kL;
            store_choice<Scalar>(w.choices + to, choice);
            store(w.halved + to, relu<Scalar>(best + load(w.shift + v * kL)));
        }
    }
}

// A row of windows.
template <typename Scalar, int kVectors>
void first_windows(FirstWindows<Scalar> w, std::int64_t windows) {
    constexpr int kWindows = kRegisters == 32 && kVectors <= 2 ? 2 : 1;
    for (std::int64_t x = 0; x < windows; x += kWindows) {
        const bool whole = windows - x >= kWindows;
        (whole ? first_windows<Scalar, kVectors, kWindows> : first_windows<Scalar, kVectors, 1>)(w);
        w.inputs += kWindows * 2 * w.channels_in;
        w.halved += kWindows * w.channels;
        w.choices += kWindows * w.channels;
    }
}

template <typename Scalar>
void first_windows(const FirstWindows<Scalar>& w, std::int64_t windows, int vectors) {
    if constexpr (kMostVectors == 4) {
        if (vectors == 4) return first_windows<Scalar, 4>(w, windows);
        if (vectors == 3) return first_windows<Scalar, 3>(w, windows);
    }
    return vectors == 2 ? first_windows<Scalar, 2>(w, windows) : first_windows<Scalar, 1>(w, windows);
}

// Of block 0, whose statistics are known before: neither its raw values nor the winners are kept.
template <typename Scalar>
void forward_first_pooled(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, c = b.inputs;
    const std::int64_t row = (b.in_w + 2) * c, plane = pieces(row, kLanes<Scalar>) * kLanes<Scalar>;
    for (std::int64_t y = rows.first / 2; y < least((rows.first + rows.count) / 2, b.half_h); ++y) {
        const Scalar* x = input_row(t, 0, rows.example, 2 * y);
        for (std::int64_t i = 0; i < row; i += kLanes<Scalar>) {  // lanes beyond the row: nobody reads them
            const Vector<Scalar> d0 = load_loose(x + i), d1 = load_loose(x + row + i);
            const Vector<Scalar> d2 = load_loose(x + 2 * row + i), d3 = load_loose(x + 3 * row + i);
            store(scratch + i, d0 - d2);
            store(scratch + plane + i, d1 + d2);
            store(scratch + 2 * plane + i, d2 - d1);
            store(scratch + 3 * plane + i, d1 - d3);
        }
        for (std::int64_t first = 0; first < channels; first += group) {
            first_windows<Scalar>({scratch, plane, c, t.at(t.layout->first_weight) + first * 12 * c,
                                   t.vector(0, kShift) + first, halved_row(t, 0, rows.example, y) + first,
                                   choices_of(t, 0, rows.example) + y * b.half_w * channels + first, channels},
                                  b.half_w, b.vectors);
        }
    }
}

// Whether block 0 with stride 2 reads images of one channel: a window's nine weights, or their gradients, then fit the
// registers.
template <typename Scalar>
bool first_is_gray(const ConvTask<Scalar>& t) {
    return t.block(0).stride == 2 && t.block(0).inputs == 1;
}

template <typename Scalar>
void forward_first_gray(const ConvTask<Scalar>& t, std::int64_t item) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, row = b.in_w + 2;
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        const Scalar* from = t.at(t.layout->first_weight) + c / group * group * 9 + c % group;
        const Vector<Scalar> shift = load(t.vector(0, kShift) + c);
        Vector<Scalar> weight[9];
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) weight[tap] = load(from + tap * group);
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            const Scalar* x = input_row(t, 0, rows.example, y);
            Scalar* to = halved_row(t, 0, rows.example, y) + c;
            for (std::int64_t i = 0; i < b.out_w; ++i, x += 2, to += channels) {
                Vector<Scalar> sum = {};
#pragma GCC unroll 9
                for (int tap = 0; tap < 9; ++tap) sum += all(x[tap / 3 * row + tap % 3]) * weight[tap];
                store(to, relu<Scalar>(sum + shift));
            }
        }
    }
}

template <typename Scalar>
void forward_first(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(0);
    if (b.stride == 1) return forward_first_pooled(t, item, scratch);
    if (first_is_gray(t)) return forward_first_gray(t, item);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t group = b.vectors * kLanes<Scalar>;
    const std::int64_t row_in = (b.in_w + 2) * std::int64_t{b.inputs};
    const Runs runs = window_runs(row_in, b.inputs, b.inputs, group);
    for (std::int64_t first = 0; first < t.layout->channels; first += group) {
        const Rectified<Scalar> to(one_row(t.layout->channels), t.vector(0, kShift) + first);
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            convolve_row(halved_row(t, 0, rows.example, y) + first, to, input_row(t, 0, rows.example, y),
                         b.stride * std::int64_t{b.inputs}, b.out_w, runs,
                         t.at(t.layout->first_weight) + first * 9 * b.inputs, b.vectors);
        }
    }
}

// Row `y` of an example of a block's raw values, inside its border.
template <typename Scalar>
Scalar* raw_row(const ConvTask<Scalar>& t, int block, std::int64_t example, std::int64_t y) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    return t.at(b.raw) + (example * (b.out_h + 2) + y + 1) * row + channels;
}

// Outputs of an axis that are convolved at once, in both directions: no two terms have more products, times positions,
// than half of kConvSharedPositions.
constexpr std::int64_t kSharedColumns = 30;
constexpr std::int64_t shared_rows(std::int64_t columns) {
    return 2 * most(1, kConvSharedPositions / 8 / ((columns + 1) / 2));
}

// raw <- convolution of some images' rows
template <typename Scalar>
void convolve_strided(const ConvTask<Scalar>& t, int block, const Rows& rows, std::int64_t images, Scalar* scratch) {
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
                                     b.vectors},
                                    strided_axis(top, bottom, b.in_h, b.out_h),
                                    strided_axis(left, right, b.in_w, b.out_w), scratch + t.layout->shared_scratch);
        }
    }
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
        if (!b.shared) {
            convolve_rows(t, block, rows, raw, row, scratch);
        } else if ((item - first) % b.forward_items == 0) {
            convolve_strided(t, block, rows, least(b.forward_items, last - item), scratch);
        }
        item_statistics(t.partial(item), raw, row, rows.count, b.out_w, channels);
        if (b.stride == 2) continue;
        Scalar* winners = t.at(b.winner) + rows.example * b.half_h * b.half_w * channels;
        choose_winners(t, block, rows, raw, row,
                       [&](std::int64_t y, std::int64_t x, std::int64_t c, Vector<Scalar> winner) {
                           store(winners + (y * b.half_w + x) * channels + c, winner);
                       });
    }
}

template <typename Scalar>
Scalar root(double x) {
    return static_cast<Scalar>(__builtin_sqrt(x));
}

// Mean and variance by channel, in double: from the items', or of layer 1 as W mean and W covariance W^T.
template <typename Scalar>
void moments(const ConvTask<Scalar>& t, int block, double* mean, double* variance) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, filters = t.shape->filters;
    for (std::int64_t c = 0; c < channels; ++c) mean[c] = variance[c] = 0;
    if (block > 0) {
        double seen = 0;
        for (std::int64_t item = 0; item < t.examples * b.items; ++item) {
            const double count = static_cast<double>(raw_rows(t, block, item).count * b.out_w);
            const Scalar* partial = t.partial(item);
            const double share = count / (seen + count);
            for (std::int64_t c = 0; c < filters; ++c) {
                const double difference = partial[c] - mean[c];
                mean[c] += difference * share;
                variance[c] += partial[channels + c] + difference * difference * (seen * share);
            }
            seen += count;
        }
        for (std::int64_t c = 0; c < filters; ++c) variance[c] /= seen;
        return;
    }
    const auto* patch_mean = reinterpret_cast<const double*>(t.at(t.layout->patch_mean));
    const auto* covariance = reinterpret_cast<const double*>(t.at(t.layout->covariance));
    const std::int64_t patch = 9 * b.inputs, group = b.vectors * kLanes<Scalar>;
    for (std::int64_t first = 0; first < channels; first += group) {
        const Scalar* weight = t.at(b.weight) + first * patch;
        for (std::int64_t i = 0; i < patch; ++i) {
            double product[kConvFilters] = {};  // of row i of the covariance with the weights
            for (std::int64_t j = 0; j < patch; ++j) {
                const double entry = covariance[i * kConvLargestPatch + j];
                for (std::int64_t c = 0; c < group; ++c) product[c] += entry * weight[j * group + c];
            }
            for (std::int64_t c = 0; c < group; ++c) {
                mean[first + c] += patch_mean[i] * weight[i * group + c];
                variance[first + c] += product[c] * weight[i * group + c];
            }
        }
    }
    // Rounding may leave a constant channel a hair below 0.
    for (std::int64_t c = 0; c < channels; ++c) variance[c] = variance[c] < 0 ? 0 : variance[c];
}

template <typename Scalar>
void statistics(const ConvTask<Scalar>& t, int block) {
    double mean[kConvFilters], variance[kConvFilters];
    moments(t, block, mean, variance);
    for (std::int64_t c = 0; c < t.layout->channels; ++c) {
        const Scalar inverse = root<Scalar>(1 / (variance[c] + t.shape->eps[block]));
        const Scalar scale = t.vector(block, kGamma)[c] * inverse;
        t.vector(block, kMean)[c] = static_cast<Scalar>(mean[c]);
        t.vector(block, kInverse)[c] = inverse;
        t.vector(block, kScale)[c] = scale;
        t.vector(block, kShift)[c] = static_cast<Scalar>(t.vector(block, kBeta)[c] - mean[c] * scale);
    }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Row `y` of an example of the gradient of a block's halved output.
template <typename Scalar>
Scalar* halved_grad_row(const ConvTask<Scalar>& t, int block, std::int64_t example, std::int64_t y, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t row = b.half_w * std::int64_t{t.layout->channels};
    if (block == 0 && t.layout->first_grad_in_scratch) return scratch + y % b.half_rows * row;
    return t.at(t.layout->halved_grad) + (example * b.half_h + y) * row;
}

// Of block 0, where ReLU's output tells all: its gradient in gamma comes from that in the weights, see finish_first.
template <typename Scalar>
void halved_sums_first(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    if (first_is_gray(t)) return;  // first_weight_grad has it on its way
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = rows_of(item, b.half_items, b.half_rows, b.half_h);
    const std::int64_t channels = t.layout->channels;
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        Vector<Scalar> sum = {};
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            const Scalar* halved = halved_row(t, 0, rows.example, y) + c;
            Scalar* grad = halved_grad_row(t, 0, rows.example, y, scratch) + c;
            for (std::int64_t x = 0; x < b.half_w; ++x, halved += channels, grad += channels) {
                const Vector<Scalar> passed = passed_by_relu<Scalar>(load(halved), load(grad));
                store(grad, passed);
                sum += passed;
            }
        }
        store(t.partial(item) + c, sum);
    }
}

template <typename Scalar>
void halved_sums(const ConvTask<Scalar>& t, int block, std::int64_t item, Scalar* scratch) {
    if (block == 0) return halved_sums_first(t, item, scratch);
    const ConvBlockPlan& b = t.block(block);
    const Rows rows = rows_of(item, b.half_items, b.half_rows, b.half_h);
    const std::int64_t channels = t.layout->channels;
    const Winners<Scalar> winners = winners_of(t, block);
    Scalar* partial = t.partial(item);
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        const Vector<Scalar> scale = load(t.vector(block, kScale) + c), shift = load(t.vector(block, kShift) + c);
        const Vector<Scalar> mean = load(t.vector(block, kMean) + c), inverse = load(t.vector(block, kInverse) + c);
        Vector<Scalar> sum = {}, product = {};
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            const Scalar* z = winners.base + rows.example * winners.example + y * winners.row + c;
            Scalar* grad = halved_grad_row(t, block, rows.example, y, scratch) + c;
            for (std::int64_t x = 0; x < b.half_w; ++x, z += channels, grad += channels) {
                const Vector<Scalar> value = load(z);
                const Vector<Scalar> passed = passed_by_relu<Scalar>(scale * value + shift, load(grad));
                store(grad, passed);
                sum += passed;
                product += passed * (value - mean);
            }
        }
        store(partial + c, sum);
        store(partial + channels + c, product * inverse);
    }
}

template <typename Scalar>
void norm_grads(const ConvTask<Scalar>& t, int block) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    double beta[kConvFilters] = {}, gamma[kConvFilters] = {};
    for (std::int64_t item = 0; item < t.examples * b.half_items; ++item) {
        const Scalar* partial = t.partial(item);
        for (std::int64_t c = 0; c < channels; ++c) {
            beta[c] += partial[c];
            gamma[c] += partial[channels + c];
        }
    }
    const double count = static_cast<double>(t.examples * b.out_h * b.out_w);
    for (std::int64_t c = 0; c < channels; ++c) {
        const double scale = t.vector(block, kScale)[c];
        t.vector(block, kBetaGrad)[c] = static_cast<Scalar>(beta[c]);
        t.vector(block, kGammaGrad)[c] = static_cast<Scalar>(gamma[c]);
        t.vector(block, kSlope)[c] = static_cast<Scalar>(-scale * t.vector(block, kInverse)[c] * gamma[c] / count);
        t.vector(block, kOffset)[c] = static_cast<Scalar>(-scale * beta[c] / count);
    }
}

// d raw = scale * d halved at the winners + slope * (raw - mean) + offset everywhere; without pooling all are winners.
template <typename Scalar>
void raw_grad_strided(const ConvTask<Scalar>& t, int block, std::int64_t item) {
    const ConvBlockPlan& b = t.block(block);
    const Rows rows = raw_rows(t, block, item);
    const std::int64_t channels = t.layout->channels;
    const std::int64_t half = (rows.example * b.half_h + rows.first) * b.half_w * channels;
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        const Vector<Scalar> scale = load(t.vector(block, kScale) + c), slope = load(t.vector(block, kSlope) + c);
        const Vector<Scalar> mean = load(t.vector(block, kMean) + c), offset = load(t.vector(block, kOffset) + c);
        const Scalar* halved_grad = t.at(t.layout->halved_grad) + half + c;
        for (std::int64_t y = 0; y < rows.count; ++y) {
            Scalar* z = raw_row(t, block, rows.example, rows.first + y) + c;
            for (std::int64_t x = 0; x < b.out_w; ++x, z += channels, halved_grad += channels) {
                store(z, slope * (load(z) - mean) + offset + scale * load(halved_grad));
            }
        }
    }
}

template <typename Scalar>
void raw_grad(const ConvTask<Scalar>& t, int block, std::int64_t item) {
    const ConvBlockPlan& b = t.block(block);
    if (b.stride == 2) return raw_grad_strided(t, block, item);
    const Rows rows = raw_rows(t, block, item);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    Scalar* raw = raw_row(t, block, rows.example, rows.first);
    const Scalar* halved_grad = t.at(t.layout->halved_grad) + rows.example * b.half_h * b.half_w * channels;
    const std::uint8_t* choices = choices_of(t, block, rows.example);
    for (std::int64_t y = 0; y < rows.count; y += 2) {
        const std::int64_t half_y = (rows.first + y) / 2;
        for (std::int64_t x = 0; x < b.out_w; x += 2) {
            const std::int64_t half = (half_y * b.half_w + x / 2) * channels;
            const bool counts = half_y < b.half_h && x / 2 < b.half_w;  // pooling drops an odd last row and column
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                const Vector<Scalar> slope = load(t.vector(block, kSlope) + c);
                const Vector<Scalar> mean = load(t.vector(block, kMean) + c);
                const Vector<Scalar> offset = load(t.vector(block, kOffset) + c);
                Vector<Scalar> routed = {};
                Mask<Scalar> choice = {};
                if (counts) {
                    routed = load(t.vector(block, kScale) + c) * load(halved_grad + half + c);
                    choice = load_choice<Scalar>(choices + half + c);
                }
                for (int i = 0; i < 4; ++i) {
                    if (y + i / 2 >= rows.count || x + i % 2 >= b.out_w) continue;
                    Scalar* z = raw + (y + i / 2) * row + (x + i % 2) * channels + c;
                    const Vector<Scalar> of_winner = choice == i ? routed : Vector<Scalar>{};
                    store(z, slope * (load(z) - mean) + offset + of_winner);
                }
            }
        }
    }
}

struct Range {
    std::int64_t first, last;
};

// out[groups, inputs, group] (+)= sum of the outer products of positions, for some of the inputs.
template <typename Scalar>
void multiply_outer(Scalar* out, Products<Scalar> products, std::int64_t inputs, Range wanted, std::int64_t channels,
                    int vectors, bool add) {
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

// Positions side by side, from which a matrix of products is made when kConvOuterPositions are nearly reached.
template <typename Scalar>
struct OuterPositions {
    Images<Scalar> x, grad;
    Scalar* memory;  // [kConvOuterPositions, step] of x, then of grad
    std::int64_t step, inputs;
    int vectors;
    Scalar* out;  // [groups, inputs, group]
    bool add;     // to what out is
    std::int64_t filled = 0;

    Scalar* grads() const { return memory + kConvOuterPositions * step; }

    // Of the positions that were copied.
    void multiply() {
        Products<Scalar> products;
        products.x = memory;
        products.grad = grads();
        products.x_step = products.grad_step = step;
        products.positions = filled;
        multiply(products);
        filled = 0;
    }

    void multiply(Products<Scalar> products) {
        multiply_outer(out, products, inputs, {0, inputs}, grad.channels, vectors, add);
        add = true;
    }

    // From position (y, x0) of the stretches on.
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
        if (!blended && count >= kConvOuterPositions / 2) {  // enough without others, and nothing to compute
            Products<Scalar> products;
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

    // Images as a whole where they are small enough, else rows or what fits of a row.
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

// Tiles of F(2x2, 3x3) side by side, from which all wanted matrices of products are made when kConvOuterTiles are
// nearly reached.
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
            Products<Scalar> products;
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

    // Of one row, from output (y, x0) on.
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

// Of `images` examples from `example` on, rows [top, bottom): `start` the matrices, or add to them.
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
        // A share of the products is handed out as the same share of all vectors of inputs with all products, so that
        // threads need not transform the same inputs. Vectors with all their products go together.
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
                     std::int64_t first_product, std::int64_t last_product, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t height = b.out_h, rows = b.weight_rows, images = b.weight_images;
    for (std::int64_t i = (last - 1) / images * images; i >= first; i -= images) {
        const std::int64_t count = least(images, t.examples - i);
        for (std::int64_t top = 0; top < height; top += rows) {
            weight_products_at_once(t, block, i, count, top, least(top + rows, height),
                                    i + count == t.examples && top == 0, first_product, last_product, scratch);
        }
    }
}

// Whether the first `count` lanes are all set.
template <typename Scalar>
bool all_set(Mask<Scalar> mask, std::int64_t count) {
    bool set = true;
    for (std::int64_t lane = 0; lane < count; ++lane) set = set && mask[lane] != 0;
    return set;
}

// Which of a vector's first `count` channels are other than 0 somewhere in rows [top, bottom) and columns [left, right)
// of any image. It looks no further than it must.
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

// weight_grad <- exactly 0 for the taps that meet only zeros of an input, on which the sign depends: F(2x2, 3x3) leaves
// rounding. Such an input is 0 everywhere, or but for an edge of the images, which are at least 2 x 2.
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
            Mask<Scalar> met{};  // tap 0 looks before, and never sees the last; tap 2 never the first
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

// Three taps from four products: the shared ones, `second` being the tap beside tap 0 that they serve; or of
// F(2x2, 3x3).
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

template <typename Scalar>
void data_grad_directly(const ConvTask<Scalar>& t, int block, const Rows& rows, Scalar* out) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, filters = t.shape->filters;
    const std::int64_t group = b.vectors_back * kLanes<Scalar>, row = (b.out_w + 2) * channels;
    const Scalar* grads = t.at(b.raw) + (rows.example * (b.out_h + 2) + rows.first) * row;
    for (std::int64_t first = 0; first < channels; first += group) {
        convolve_grid(out + first, {channels, b.in_w * channels}, grads, {channels, row}, rows.count, b.in_w,
                      window_runs(row, channels, filters, group), t.at(t.layout->weight_back) + first * 9 * filters,
                      b.vectors_back);
    }
}

// Of some images' rows; out_image: from the first row of one image to that of the next.
template <typename Scalar>
void data_grad_strided(const ConvTask<Scalar>& t, int block, const Rows& rows, std::int64_t images, Scalar* out,
                       std::int64_t out_image, Scalar* scratch) {
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
                                     b.vectors_back},
                                    gathering_axis(top, bottom, b.out_h), gathering_axis(left, right, b.out_w),
                                    scratch + t.layout->shared_scratch);
        }
    }
}

// Rows of the halved gradient before a block.
template <typename Scalar>
void data_grad(const ConvTask<Scalar>& t, int block, std::int64_t first, std::int64_t last, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const ConvBlockPlan& before = t.block(block - 1);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    for (std::int64_t item = first; item < last; ++item) {
        const Rows rows = rows_of(item, before.half_items, before.half_rows, before.half_h);
        Scalar* own = scratch + (item - first) * t.layout->first_grad;
        Scalar* out = halved_grad_row(t, block - 1, rows.example, rows.first, own);
        if (b.winograd) {
            const Scalar* grads = t.at(b.raw) + (rows.example * (b.out_h + 2) + rows.first) * row;
            winograd<Scalar>({out, b.in_w * channels, grads, row, rows.count, b.in_w, t.shape->filters, channels},
                             t.at(t.layout->transformed), b.vectors_back, scratch);
        } else if (!b.shared) {
            data_grad_directly(t, block, rows, out);
        } else if (item == first) {
            const std::int64_t image =
                t.layout->first_grad_in_scratch && block == 1 ? t.layout->first_grad : b.in_h * b.in_w * channels;
            data_grad_strided(t, block, rows, last - first, out, image, scratch);
        }
        halved_sums(t, block - 1, item, own);
    }
}

// to[rows, out_w, channels] <- block 0's halved gradient at the winners, 0 elsewhere; rows in pairs.
template <typename Scalar>
void scatter_to_winners(const ConvTask<Scalar>& t, const Rows& rows, const Scalar* halved_grad, Scalar* to) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t channels = t.layout->channels, row = b.out_w * channels;
    const std::uint8_t* choices = choices_of(t, 0, rows.example);
    for (std::int64_t y = 0; y < rows.count; ++y) {  // pooling drops an odd last row and column
        const bool counts = (rows.first + y) / 2 < b.half_h;
        Scalar* dropped = to + y * row + (counts ? 2 * b.half_w * channels : 0);
        for (; dropped < to + (y + 1) * row; dropped += kLanes<Scalar>) store(dropped, Vector<Scalar>{});
    }
    for (std::int64_t y = 0; y < rows.count && (rows.first + y) / 2 < b.half_h; y += 2) {
        const std::int64_t half = (rows.first + y) / 2 * b.half_w * channels;
        for (std::int64_t x = 0; x < b.half_w; ++x) {
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                const Vector<Scalar> grad = load(halved_grad + half + x * channels + c);
                const Mask<Scalar> choice = load_choice<Scalar>(choices + half + x * channels + c);
                Scalar* corner = to + y * row + 2 * x * channels + c;
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    store(corner + i / 2 * row + i % 2 * channels, choice == i ? grad : Vector<Scalar>{});
                }
            }
        }
    }
}

// Whether one vector holds the 4 x 4 inputs under a pooling window's four patches: then every channel can pick its
// winner's patch from it.
template <typename Scalar>
constexpr bool kPicksPatches = kLanes<Scalar> == 16;

// lane i <- from[index[i]]
template <typename Scalar>
inline Vector<Scalar> picked(Vector<Scalar> from, Mask<Scalar> index) {
#if defined(__clang__)
    Vector<Scalar> result{};
    for (int i = 0; i < kLanes<Scalar>; ++i) result[i] = from[index[i]];
    return result;
#else
    return __builtin_shuffle(from, index);
#endif
}

// to[positions, inputs, 4 x 4] <- the inputs under rows [first, last) of pooling windows
template <typename Scalar>
void copy_windows(const ConvTask<Scalar>& t, std::int64_t example, std::int64_t first, std::int64_t last, Scalar* to) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t c = b.inputs, row = (b.in_w + 2) * c;
    Mask<Scalar> lane{};
    for (int k = 0; k < kLanes<Scalar>; ++k) lane[k] = k;
    for (std::int64_t y = first; y < last; ++y) {
        const Scalar* x = input_row(t, 0, example, 2 * y);
        for (std::int64_t i = 0; i < b.half_w; ++i, x += 2 * c) {
            // Of a row 4 c values count; lanes beyond them hold what nobody picks.
            const Vector<Scalar> x0 = load_loose(x), x1 = load_loose(x + row);
            const Vector<Scalar> x2 = load_loose(x + 2 * row), x3 = load_loose(x + 3 * row);
            for (std::int64_t input = 0; input < c; ++input, to += kLanes<Scalar>) {
                const Mask<Scalar> from = lane % 4 * static_cast<int>(c) + static_cast<int>(input);
                const Vector<Scalar> upper = lane < 4 ? picked<Scalar>(x0, from) : picked<Scalar>(x1, from);
                const Vector<Scalar> lower = lane < 12 ? picked<Scalar>(x2, from) : picked<Scalar>(x3, from);
                store(to, lane < 8 ? upper : lower);
            }
        }
    }
}

// Three taps of a channel's row, from every input: sums over windows of the winners' inputs times the gradient.
template <typename Scalar, int kInputs>
void pick_row(Scalar* out, std::int64_t group, const Scalar* windows, const Mask<Scalar>* corners, int first_tap,
              const Scalar* grads, std::int64_t channels, std::int64_t positions) {
    Vector<Scalar> sum[3][kInputs] = {};
    for (std::int64_t i = 0; i < positions; ++i, windows += kInputs * kLanes<Scalar>, grads += channels) {
        const Vector<Scalar> grad = load(grads);
        const Mask<Scalar> corner = corners[i] + first_tap;
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap) {
#pragma GCC unroll 3
            for (int input = 0; input < kInputs; ++input) {
                sum[tap][input] += picked<Scalar>(load(windows + input * kLanes<Scalar>), corner + tap) * grad;
            }
        }
    }
#pragma GCC unroll 3
    for (int tap = 0; tap < 3; ++tap) {
#pragma GCC unroll 3
        for (int input = 0; input < kInputs; ++input) store(out + (tap * kInputs + input) * group, sum[tap][input]);
    }
}

// partial <- sums over pooling windows of their winners' patches times the gradient
template <typename Scalar>
void first_weight_grad_by_picking(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, inputs = b.inputs;
    const std::int64_t top = rows.first / 2, bottom = most(top, least(top + (rows.count + 1) / 2, b.half_h));
    copy_windows(t, rows.example, top, bottom, scratch);
    const std::int64_t positions = (bottom - top) * b.half_w, first_position = top * b.half_w * channels;
    const std::uint8_t* choices = choices_of(t, 0, rows.example) + first_position;
    const Scalar* grads = halved_grad_row(t, 0, rows.example, top, scratch);
    auto* corners = reinterpret_cast<Mask<Scalar>*>(scratch + positions * inputs * kLanes<Scalar>);
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        for (std::int64_t i = 0; i < positions; ++i) {  // where in its window a winner's patch starts
            const Mask<Scalar> choice = load_choice<Scalar>(choices + i * channels + c);
            corners[i] = choice + (choice & 2);
        }
        Scalar* out = t.partial(item) + 2 * channels + c / group * group * 9 * inputs + c % group;
        const auto pick = inputs == 3 ? pick_row<Scalar, 3> : inputs == 2 ? pick_row<Scalar, 2> : pick_row<Scalar, 1>;
        for (int dy = 0; dy < 3; ++dy) {
            pick(out + dy * 3 * inputs * group, group, scratch, corners, 4 * dy, grads + c, channels, positions);
        }
    }
}

// And the sum of what ReLU passes, for which the others have halved_sums.
template <typename Scalar>
void first_weight_grad_gray(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(0);
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, row = b.in_w + 2;
    for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        Vector<Scalar> sum = {}, products[9] = {};
        for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
            const Scalar* x = input_row(t, 0, rows.example, y);
            const Scalar* halved = halved_row(t, 0, rows.example, y) + c;
            const Scalar* grad = halved_grad_row(t, 0, rows.example, y, scratch) + c;
            for (std::int64_t i = 0; i < b.out_w; ++i, x += 2, halved += channels, grad += channels) {
                const Vector<Scalar> passed = passed_by_relu<Scalar>(load(halved), load(grad));
                sum += passed;
#pragma GCC unroll 9
                for (int tap = 0; tap < 9; ++tap) products[tap] += all(x[tap / 3 * row + tap % 3]) * passed;
            }
        }
        store(t.partial(item) + c, sum);
        Scalar* to = t.partial(item) + 2 * channels + c / group * group * 9 + c % group;
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) store(to + tap * group, products[tap]);
    }
}

template <typename Scalar>
void first_weight_grad(const ConvTask<Scalar>& t, std::int64_t item, Scalar* scratch) {
    if (first_is_gray(t)) return first_weight_grad_gray(t, item, scratch);
    const ConvBlockPlan& b = t.block(0);
    if constexpr (kPicksPatches<Scalar>) {
        if (b.stride == 1) return first_weight_grad_by_picking(t, item, scratch);
    }
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>;
    const Scalar* grads = scratch;
    if (b.stride == 1) {
        scatter_to_winners(t, rows, halved_grad_row(t, 0, rows.example, 0, scratch), scratch);
    } else {
        grads = halved_grad_row(t, 0, rows.example, rows.first, scratch);
    }
    const std::int64_t in_row = (b.in_w + 2) * std::int64_t{b.input_lanes};
    Products<Scalar> products;
    products.x_step = b.stride * std::int64_t{b.input_lanes};
    products.x_row = b.stride * in_row;
    products.grad_step = channels;
    products.grad_row = b.out_w * channels;
    products.rows = rows.count;
    products.positions = b.out_w;
    for (std::int64_t first = 0; first < channels; first += group) {
        products.grad = grads + first;
        for (std::int64_t dy = 0; dy < 3; ++dy) {
            for (std::int64_t j = 0; j < 3 * b.inputs;) {
                const std::int64_t count = least(most_rows(b.vectors), 3 * b.inputs - j);
                products.x = input_row(t, 0, rows.example, rows.first) + dy * in_row + j;
                outer_tile_of<Scalar>(b.vectors, count)(
                    t.partial(item) + 2 * channels + first * 9 * b.inputs + (dy * 3 * b.inputs + j) * group, products,
                    false);
                j += count;
            }
        }
    }
}

// With P the sum of patches at the winners, less d beta times their mean: d gamma = inverse * sum over a patch of W P,
// and dW = scale * (P - inverse * d gamma * covariance W).
template <typename Scalar>
void finish_first(const ConvTask<Scalar>& t) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, patch = 9 * b.inputs;
    const auto* patch_mean = reinterpret_cast<const double*>(t.at(t.layout->patch_mean));
    const auto* covariance = reinterpret_cast<const double*>(t.at(t.layout->covariance));
    double beta[kConvFilters] = {};
    for (std::int64_t item = 0; item < t.examples * b.half_items; ++item) {
        for (std::int64_t c = 0; c < channels; ++c) beta[c] += t.partial(item)[c];
    }
    for (std::int64_t first = 0; first < channels; first += group) {
        const Scalar* weight = t.at(b.weight) + first * patch;
        double centred[kConvLargestPatch][kConvFilters] = {}, gamma[kConvFilters] = {};
        for (std::int64_t i = 0; i < patch; ++i) {
            for (std::int64_t item = 0; item < t.examples * b.items; ++item) {
                const Scalar* partial = t.partial(item) + 2 * channels + first * patch + i * group;
                for (std::int64_t c = 0; c < group; ++c) centred[i][c] += partial[c];
            }
            for (std::int64_t c = 0; c < group; ++c) {
                centred[i][c] -= beta[first + c] * patch_mean[i];
                gamma[c] += centred[i][c] * weight[i * group + c];
            }
        }
        for (std::int64_t c = 0; c < group; ++c) {
            gamma[c] *= t.vector(0, kInverse)[first + c];
            t.vector(0, kBetaGrad)[first + c] = static_cast<Scalar>(beta[first + c]);
            t.vector(0, kGammaGrad)[first + c] = static_cast<Scalar>(gamma[c]);
        }
        for (std::int64_t i = 0; i < patch; ++i) {
            double dense[kConvFilters] = {};
            for (std::int64_t j = 0; j < patch; ++j) {
                const double entry = covariance[i * kConvLargestPatch + j];
                for (std::int64_t c = 0; c < group; ++c) dense[c] += entry * weight[j * group + c];
            }
            for (std::int64_t c = 0; c < group; ++c) {
                const double scale = t.vector(0, kScale)[first + c], inverse = t.vector(0, kInverse)[first + c];
                t.at(b.weight_grad)[first * patch + i * group + c] =
                    static_cast<Scalar>(scale * (centred[i][c] - inverse * gamma[c] * dense[c]));
            }
        }
    }
}

// ---- the classifier and the step ------------------------------------------------------------------------------------

template <typename Scalar>
Scalar dot(const Scalar* a, const Scalar* b, std::int64_t n) {
    constexpr int kL = kLanes<Scalar>;
    Vector<Scalar> sums[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * kL <= n; i += 4 * kL) {
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) sums[s] += load_loose(a + i + s * kL) * load_loose(b + i + s * kL);
    }
    for (; i + kL <= n; i += kL) sums[0] += load_loose(a + i) * load_loose(b + i);
    Scalar sum = sum_of_lanes<Scalar>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

template <typename Scalar>
void add_scaled(Scalar* __restrict y, Scalar factor, const Scalar* __restrict x, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

template <typename Scalar>
bool gradient_step(Scalar* __restrict params, const Scalar* __restrict grads, Scalar lr, std::int64_t n) {
    bool nonfinite = false;
    for (std::int64_t i = 0; i < n; ++i) {
        params[i] -= lr * grads[i];
        nonfinite |= !(grads[i] - grads[i] == 0);
    }
    return nonfinite;
}

template <typename Scalar>
constexpr ConvStages<Scalar> table() {
    return {{kLanes<Scalar>, 2, kMostVectors},
            pack_image<Scalar>,
            patch_sum<Scalar>,
            patch_covariance<Scalar>,
            pack_weights<Scalar>,
            unpack_weights<Scalar>,
            pack_back<Scalar>,
            transform_weights<Scalar>,
            forward<Scalar>,
            statistics<Scalar>,
            normalise<Scalar>,
            halved_sums<Scalar>,
            norm_grads<Scalar>,
            raw_grad<Scalar>,
            weight_products<Scalar>,
            weight_grad<Scalar>,
            data_grad<Scalar>,
            first_weight_grad<Scalar>,
            finish_first<Scalar>,
            dot<Scalar>,
            add_scaled<Scalar>,
            gradient_step<Scalar>};
}

}  // namespace

extern const ConvStageTables kConvStages;
const ConvStageTables kConvStages = {table<float>(), table<double>()};

}  // namespace signmaml::cpu::SIGNMAML_ISA
