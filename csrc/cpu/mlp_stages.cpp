// A meta-step of a group of tasks of a multilayer perceptron: the tasks lie side by side in the lanes of vectors, so a
// matrix product is one fused multiply-add of vectors an element. CMakeLists.txt compiles this file once for each
// instruction set, with SIGNMAML_ISA naming the namespace and fused multiply-adds where there are any.
// Everything but the table has internal linkage and calls no inline function of a header: see kernels.cpp.
// Readable twin: signmaml_ext/reference.py; the same on a GPU: kernels/mlp_meta_step.cuh. Every sum has one order.

#include "cpu/mlp_stages.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWideBytes = 64;
constexpr bool kManyRegisters = true;
#elif defined(__AVX2__)
constexpr int kWideBytes = 32;
constexpr bool kManyRegisters = false;
#elif defined(__aarch64__)
constexpr int kWideBytes = 16;
constexpr bool kManyRegisters = true;
#else
constexpr int kWideBytes = 16;
constexpr bool kManyRegisters = false;
#endif
constexpr int kNarrowBytes = 16;

template <typename Scalar>
struct SameWidth;
template <>
struct SameWidth<float> {
    using Int = std::int32_t;
    static constexpr Int kMagnitude = 0x7fffffff;
    static constexpr Int kInfinity = 0x7f800000;
};
template <>
struct SameWidth<double> {
    using Int = std::int64_t;
    static constexpr Int kMagnitude = 0x7fffffffffffffff;
    static constexpr Int kInfinity = 0x7ff0000000000000;
};

// An element of as many tasks as have room in kBytes.
template <typename S, int kBytes>
struct Simd {
    using Scalar = S;
    using Int = typename SameWidth<S>::Int;
    static constexpr int kLanes = kBytes / static_cast<int>(sizeof(S));
    typedef Scalar Vector __attribute__((vector_size(kBytes)));
    typedef Scalar Loose __attribute__((vector_size(kBytes), aligned(sizeof(S)), may_alias));
    typedef Int Mask __attribute__((vector_size(kBytes)));

    static Vector all(Scalar value) { return value - Vector{}; }
};

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t pieces(std::int64_t count, std::int64_t most) { return (count + most - 1) / most; }

// ---- elementary functions -------------------------------------------------------------------------------------------

template <typename Simd, typename Function>
typename Simd::Vector lane_by_lane(typename Simd::Vector x, Function function) {
    for (int lane = 0; lane < Simd::kLanes; ++lane) x[lane] = function(x[lane]);
    return x;
}

// exp(x) for x up to 88, to 1 ulp: x = n ln 2 + r, a polynomial in r, 2^n in two factors for subnormal results.
template <typename Simd>
typename Simd::Vector exp_float(typename Simd::Vector x) {
    using V = typename Simd::Vector;
    using M = typename Simd::Mask;
    const V lowest = Simd::all(-104.0f), highest = Simd::all(88.0f);
    x = x < lowest ? lowest : x;  // a NaN stays
    x = x > highest ? highest : x;
    const V magic = Simd::all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (x * 1.44269504088896341f + magic) - magic;
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const M whole = __builtin_convertvector(n == n ? n : V{}, M);
    const M half = whole >> 1;
    const M first = (half + 127) << 23, second = (whole - half + 127) << 23;
    return y * reinterpret_cast<V>(first) * reinterpret_cast<V>(second);
}

template <typename Simd>
typename Simd::Vector exp_of(typename Simd::Vector x) {
    if constexpr (sizeof(typename Simd::Scalar) == sizeof(float)) {
        return exp_float<Simd>(x);
    } else {
        return lane_by_lane<Simd>(x, [](double value) { return __builtin_exp(value); });
    }
}

template <typename Simd>
typename Simd::Vector log_of(typename Simd::Vector x) {
    if constexpr (sizeof(typename Simd::Scalar) == sizeof(float)) {
        return lane_by_lane<Simd>(x, [](float value) { return __builtin_logf(value); });
    } else {
        return lane_by_lane<Simd>(x, [](double value) { return __builtin_log(value); });
    }
}

// To 2 ulp: a polynomial near 0, 1 - 2 / (exp(2 |x|) + 1) elsewhere.
template <typename Simd>
typename Simd::Vector tanh_float(typename Simd::Vector x) {
    using V = typename Simd::Vector;
    using M = typename Simd::Mask;
    const M bits = reinterpret_cast<M>(x);
    const M magnitude_bits = bits & 0x7fffffff;
    const V magnitude = reinterpret_cast<V>(magnitude_bits);
    const V big = 1.0f - 2.0f / (exp_float<Simd>(magnitude + magnitude) + 1.0f);
    const M signed_bits = reinterpret_cast<M>(big) | (bits & ~0x7fffffff);
    const V z = x * x;
    V small = z * -5.70498872745e-3f + 2.06390887954e-2f;
    small = small * z - 5.37397155531e-2f;
    small = small * z + 1.33314422036e-1f;
    small = small * z - 3.33332819422e-1f;
    small = small * z * x + x;
    return magnitude < 0.625f ? small : reinterpret_cast<V>(signed_bits);
}

template <typename Simd>
typename Simd::Vector tanh_of(typename Simd::Vector x) {
    if constexpr (sizeof(typename Simd::Scalar) == sizeof(float)) {
        return tanh_float<Simd>(x);
    } else {
        return lane_by_lane<Simd>(x, [](double value) { return __builtin_tanh(value); });
    }
}

// Three-valued; sign(+-0) is 0 and sign(nan) is nan.
template <typename Simd>
inline typename Simd::Vector sign_of(typename Simd::Vector x) {
    using V = typename Simd::Vector;
    using M = typename Simd::Mask;
    using Scalar = typename Simd::Scalar;
    using Width = SameWidth<Scalar>;
#if defined(__AVX512F__)
    // One instruction has an answer for each kind of number. Four bits a kind, from NaN (as it is) over signalling NaN,
    // 0 (8: +0), 1 (a: +1), -inf (9: -1) and +inf to negative and positive numbers. Comparisons would take the ports of
    // the multiply-adds.
    if constexpr (sizeof(V) == 64) {
        typedef long long Table __attribute__((vector_size(64)));
        constexpr int kAsIs = 4;  // rounding
        if constexpr (sizeof(Scalar) == sizeof(float)) {
            const M answers = static_cast<typename Simd::Int>(0xa9a9a811u) - M{};
            return __builtin_ia32_fixupimmps512_mask(x, x, answers, 0, 0xffff, kAsIs);
        } else {
            return __builtin_ia32_fixupimmpd512_mask(x, x, 0xa9a9a811 - Table{}, 0, 0xff, kAsIs);
        }
    }
#endif
    const V one = Simd::all(1);
    const M signed_one = (reinterpret_cast<M>(x) & ~Width::kMagnitude) | reinterpret_cast<M>(one);
    const V of_number = x == Scalar(0) ? V{} : reinterpret_cast<V>(signed_one);
    return x == x ? of_number : x;
}

// Keeps a value in a register: GCC would read it from memory again for each of its uses, and there are two reads a cycle.
template <typename Vector>
inline void keep(Vector& value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__x86_64__)
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#endif
}

// Keeps the order of what is done with several values: GCC would do the first operation of all, then the second, and
// run out of registers.
template <typename Vector>
inline void pin(Vector& value) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(value));
#elif defined(__x86_64__)
    asm volatile("" : "+x"(value));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(value));
#endif
}

// ---- matrix products in register tiles ------------------------------------------------------------------------------
// kRows times kColumns vectors of results stay in registers through the whole sum and through what is done with them.
// Every loop over them is unrolled: an accumulator that is indexed at run time would live in memory. What a tile needs to
// know it reads through references, to what was written long before: arguments on the stack would be read back wider
// than they were written, which waits until every store of the tile before has left for the cache.

// 24 of 32 or 12 of 16 registers accumulate; the rest hold what is multiplied.
constexpr int kTileRows = 6;
constexpr int kTileColumns = kManyRegisters ? 4 : 2;

// Element (i, j) of a matrix is at[i * row + j * column].
template <typename Vector>
struct Matrix {
    const Vector* at;
    std::int64_t row, column;
};

// Terms that are summed one after the other. A sum of such sums has a smaller rounding error than one long sum.
constexpr std::int64_t kRun = 128;

// Columns of an item of a product that threads share: a few tiles, and whole cache lines for each thread.
constexpr std::int64_t kItemColumns = 8;

// How many bytes a tile's operands move from term to term; hidden, since GCC would compile every tile twice, once for
// neighbours.
struct Strides {
    std::int64_t left, right;

    template <typename Vector>
    Strides(const Matrix<Vector>& a, const Matrix<Vector>& b)
        : left(a.column * std::int64_t{sizeof(Vector)}), right(b.row * std::int64_t{sizeof(Vector)}) {
        asm("" : "+r"(left), "+r"(right));
    }
};

template <typename Vector>
inline const Vector* moved(const Vector* at, std::int64_t bytes) {
    return reinterpret_cast<const Vector*>(reinterpret_cast<const char*>(at) + bytes);
}

// What a tile is about: its first result, its first term, and the sums of the terms before, if there are any.
template <typename Vector>
struct Place {
    std::int64_t row, column, first;
    const Vector* earlier;  // [rows of the tile, columns of the tile]
};

// What is done with results is said by a `Finish`. Its begin(row, column) gives an object that a tile holds in registers:
// it takes the results row by row, own(c, sum) and own.next_row(), and is handed back to end().

// Keeps the results of a tile.
template <typename Vector, int kColumns>
struct Store {
    Vector* sums;

    struct Own {
        Vector* to;

        void operator()(int c, Vector sum) { to[c] = sum; }
        void next_row() { to += kColumns; }
    };

    Own begin(std::int64_t, std::int64_t) const { return {sums}; }
    void end(const Own&) {}
};

// result[r, c] = start[c] + sum over k of a[r, k] b[k, c], k upwards.
template <typename Vector>
struct Product {
    Matrix<Vector> a, b;
    const Vector* start;  // [columns] or null
    std::int64_t rows, columns, depth;

    std::int64_t row_pieces() const { return pieces(rows, kTileRows); }
    std::int64_t items() const { return row_pieces() * pieces(columns, kItemColumns); }
    std::int64_t work() const { return rows * columns * depth; }

    // Hands every result of the items [begin, end) to `finish`.
    template <typename Finish>
    void compute(std::int64_t begin, std::int64_t end, Finish& finish) const {
        const std::int64_t count = row_pieces(), height = rows / count, taller = rows % count;
        std::int64_t piece = begin % count, first = begin / count * kItemColumns;
        Place<Vector> place{};
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t tall = height + (piece < taller ? 1 : 0);
            const std::int64_t last = least(columns, first + kItemColumns);
            place.row = piece * height + least(piece, taller);
            place.column = first;
            for (; place.column + kTileColumns <= last; place.column += kTileColumns) {
                tile_of<kTileColumns, kTileRows>(tall, place, finish);
            }
            for (; place.column < last; ++place.column) tile_of<1, kTileRows>(tall, place, finish);
            if (++piece == count) {
                piece = 0;
                first += kItemColumns;
            }
        }
    }

  private:
    template <int kColumns, int kRows, typename Finish>
    void tile_of(std::int64_t count, Place<Vector>& place, Finish& finish) const {
        if constexpr (kRows > 1) {
            if (count < kRows) return tile_of<kColumns, kRows - 1>(count, place, finish);
        }
        place.first = 0;
        place.earlier = nullptr;
        if (depth <= kRun) return tile<kRows, kColumns>(place, finish);
        Vector sums[kRows * kColumns];
        Store<Vector, kColumns> store{sums};
        for (; place.first + kRun < depth; place.first += kRun) {
            tile<kRows, kColumns>(place, store);
            place.earlier = sums;
        }
        tile<kRows, kColumns>(place, finish);
    }

    // One run, added to the earlier ones if there are any.
    template <int kRows, int kColumns, typename Finish>
    __attribute__((noinline)) void tile(const Place<Vector>& place, Finish& finish) const {
        const Strides step{a, b};
        const Vector* left[(kRows + 2) / 3];  // every third row: x86 adds once and twice a stride for nothing
#pragma GCC unroll 8
        for (int i = 0; i < (kRows + 2) / 3; ++i) {
            left[i] = a.at + (place.row + 3 * i) * a.row + place.first * a.column;
        }
        const Vector* right = b.at + place.first * b.row + place.column * b.column;
        Vector sum[kRows][kColumns];
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) {
            const Vector begin = start != nullptr && place.first == 0 ? start[place.column + c] : Vector{};
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) sum[r][c] = begin;
        }
        for (std::int64_t k = least(kRun, depth - place.first); k > 0; --k) {
            Vector factor[kColumns];
#pragma GCC unroll 8
            for (int c = 0; c < kColumns; ++c) factor[c] = right[c * b.column];
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                Vector value = left[r / 3][r % 3 * a.row];
                keep(value);
#pragma GCC unroll 8
                for (int c = 0; c < kColumns; ++c) sum[r][c] += value * factor[c];
            }
#pragma GCC unroll 8
            for (int i = 0; i < (kRows + 2) / 3; ++i) left[i] = moved(left[i], step.left);
            right = moved(right, step.right);
        }
        // What follows is read from memory anew: kept meanwhile, it would sit in vector registers, and moves from there
        // wait in the queue of the multiply-adds.
        asm volatile("" ::: "memory");
        if (place.earlier != nullptr) {
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
                for (int c = 0; c < kColumns; ++c) sum[r][c] = place.earlier[r * kColumns + c] + sum[r][c];
            }
        }
        auto own = finish.begin(place.row, place.column);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
            for (int c = 0; c < kColumns; ++c) {
                pin(sum[r][c]);
                own(c, sum[r][c]);
            }
            own.next_row();
        }
        finish.end(own);
    }
};

// ---- between rows of tasks and lanes --------------------------------------------------------------------------------

// Lanes `low`, `low` + 1, ... of a and b in turn.
template <typename Simd, int kLow>
inline typename Simd::Vector interleaved(typename Simd::Vector a, typename Simd::Vector b) {
    typename Simd::Mask which{};
#pragma GCC unroll 16
    for (int i = 0; i < Simd::kLanes; ++i) which[i] = kLow + i / 2 + i % 2 * Simd::kLanes;
#if defined(__clang__)
    typename Simd::Vector result{};
    for (int i = 0; i < Simd::kLanes; ++i) result[i] = i % 2 == 0 ? a[kLow + i / 2] : b[kLow + i / 2];
    return result;
#else
    return __builtin_shuffle(a, b, which);
#endif
}

// A square of vectors, transposed: each round halves the distance of what belongs together.
template <typename Simd>
inline void transpose(typename Simd::Vector* square) {
    constexpr int kL = Simd::kLanes;
    typename Simd::Vector other[kL];
#pragma GCC unroll 4
    for (int distance = 1; distance < kL; distance *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kL / 2; ++i) {
            other[2 * i] = interleaved<Simd, 0>(square[i], square[i + kL / 2]);
            other[2 * i + 1] = interleaved<Simd, kL / 2>(square[i], square[i + kL / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) square[i] = other[i];
    }
}

// ---- what is done with results --------------------------------------------------------------------------------------

// Stores activations; what is below `floor` becomes it, and a NaN stays, as in torch.
template <typename Vector>
struct Activate {
    Vector* out;  // [rows, columns]
    std::int64_t columns;
    Vector floor;

    struct Own {
        Vector* to;
        std::int64_t columns;
        Vector floor;

        void operator()(int c, Vector sum) { to[c] = sum < floor ? floor : sum; }
        void next_row() { to += columns; }
    };

    Own begin(std::int64_t row, std::int64_t column) const { return {out + row * columns + column, columns, floor}; }
    void end(const Own&) {}
};

// Stores gradients of what went into an activation, given those of its values.
template <typename Vector, Activation kActivation>
struct Deactivate {
    const Vector* values;  // [rows, columns]
    Vector* deltas;        // [rows, columns]
    std::int64_t columns;

    struct Own {
        const Vector* at;
        Vector* to;
        std::int64_t columns;

        void operator()(int c, Vector sum) {
            const Vector value = at[c], zero{};
            if constexpr (kActivation == Activation::kRelu) {
                to[c] = value <= zero ? zero : sum;
            } else {
                to[c] = sum * (1 - value * value);
            }
        }
        void next_row() {
            at += columns;
            to += columns;
        }
    };

    Own begin(std::int64_t row, std::int64_t column) const {
        const std::int64_t first = row * columns + column;
        return {values + first, deltas + first, columns};
    }
    void end(const Own&) {}
};

enum class Purpose { kSignStep, kPlainStep, kGradient };

// Moves parameters by their gradients, or stores those in their place.
template <typename Simd, Purpose kPurpose>
struct Move {
    using V = typename Simd::Vector;
    using M = typename Simd::Mask;

    V* parameters;  // [rows, columns]
    std::int64_t columns;
    V lr;
    M top;  // the largest magnitude seen, as bits: infinities and NaNs are the largest

    struct Own {
        V* to;
        std::int64_t columns;
        V lr;
        M top;

        void operator()(int c, V gradient) {
            const M magnitude = reinterpret_cast<M>(gradient) & SameWidth<typename Simd::Scalar>::kMagnitude;
            top = magnitude > top ? magnitude : top;
            if constexpr (kPurpose == Purpose::kSignStep) {
                to[c] -= lr * sign_of<Simd>(gradient);
            } else if constexpr (kPurpose == Purpose::kPlainStep) {
                to[c] -= lr * gradient;
            } else {
                to[c] = gradient;
            }
        }
        void next_row() { to += columns; }
    };

    Own begin(std::int64_t row, std::int64_t column) const {
        return {parameters + row * columns + column, columns, lr, top};
    }
    void end(const Own& own) { top = own.top; }
};

template <typename Simd>
class Group {
    using Scalar = typename Simd::Scalar;
    using Int = typename Simd::Int;
    using V = typename Simd::Vector;
    using M = typename Simd::Mask;
    static constexpr int kL = Simd::kLanes;

  public:
    explicit Group(const MlpGroup<Scalar>& group)
        : p_(*group.params),
          layout_(*group.layout),
          sharing_(group.sharing),
          memory_(reinterpret_cast<V*>(group.memory)),
          first_(group.first),
          live_(group.live),
          grads_(group.grads) {}

    void run() {
        for (std::int64_t i = 0; i < p_.parameters; ++i) at(layout_.parameters)[i] = Simd::all(p_.theta[i]);
        if (p_.steps > 0) take(p_.support);
        for (int step = 0; step < p_.steps; ++step) {
            const V loss = pass(p_.support, nullptr);
            give(p_.support_loss + step * p_.tasks + first_, loss);
            const Scalar* lr = p_.lr + std::int64_t{step} * 2 * p_.shape.layers;
            if (p_.by_sign) {
                backward<Purpose::kSignStep>(p_.support.count, lr);
            } else {
                backward<Purpose::kPlainStep>(p_.support.count, lr);
            }
        }
        if (p_.adapted != nullptr) {
            give_rows(p_.adapted + first_ * p_.parameters, layout_.parameters, p_.parameters);
        }
        if (p_.query.count > 0) query();
        for (int lane = 0; lane < live_; ++lane) {
            if (bad_[lane] != 0) __atomic_store_n(p_.nonfinite + first_ + lane, std::uint8_t{1}, __ATOMIC_RELAXED);
        }
    }

  private:
    V* at(std::int64_t place) const { return memory_ + place; }
    std::int64_t width(int layer) const { return p_.shape.widths[layer]; }
    int last() const { return p_.shape.layers; }
    bool is_relu() const { return p_.shape.activation == Activation::kRelu; }

    // ---- loops that threads may share ----

    // Fewer multiply-adds than this are done before another thread has woken.
    static constexpr std::int64_t kWorthSharing = 100000;

    template <typename Body>
    void each(std::int64_t items, std::int64_t work, const Body& body) const {
        if (sharing_.run == nullptr || work < kWorthSharing) {
            body(0, items);
            return;
        }
        sharing_.run(
            items, sharing_.threads,
            [](const void* self, std::int64_t begin, std::int64_t end) {
                (*static_cast<const Body*>(self))(begin, end);
            },
            &body);
    }

    template <typename Finish>
    void multiply(const Product<V>& product, const Finish& finish) const {
        each(product.items(), product.work(), [&](std::int64_t begin, std::int64_t end) {
            Finish own = finish;
            product.compute(begin, end, own);
        });
    }

    // ---- between the caller's rows and the lanes ----

    // to[i] <- element i of the rows [count] of the group's tasks. Lanes without a task repeat the last one.
    void take_rows(V* to, const Scalar* rows, std::int64_t count) const {
        const Scalar* row[kL];
        for (int lane = 0; lane < kL; ++lane) row[lane] = rows + (first_ + least(lane, live_ - 1)) * count;
        std::int64_t i = 0;
        for (; i + kL <= count; i += kL) {
            V square[kL];
            for (int lane = 0; lane < kL; ++lane) {
                square[lane] = *reinterpret_cast<const typename Simd::Loose*>(row[lane] + i);
            }
            transpose<Simd>(square);
            for (int j = 0; j < kL; ++j) to[i + j] = square[j];
        }
        for (; i < count; ++i) {
            for (int lane = 0; lane < kL; ++lane) to[i][lane] = row[lane][i];
        }
    }

    void give_rows(Scalar* rows, std::int64_t place, std::int64_t count) const {
        const V* from = at(place);
        std::int64_t i = 0;
        for (; i + kL <= count; i += kL) {
            V square[kL];
            for (int j = 0; j < kL; ++j) square[j] = from[i + j];
            transpose<Simd>(square);
            for (int lane = 0; lane < live_; ++lane) {
                *reinterpret_cast<typename Simd::Loose*>(rows + lane * count + i) = square[lane];
            }
        }
        for (; i < count; ++i) {
            for (int lane = 0; lane < live_; ++lane) rows[lane * count + i] = from[i][lane];
        }
    }

    void give(Scalar* to, V value) const {
        for (int lane = 0; lane < live_; ++lane) to[lane] = value[lane];
    }

    void take(const MlpSet<Scalar>& set) const {
        take_rows(at(layout_.activation[0]), set.x, set.count * width(0));
        if (p_.shape.loss == MlpLoss::kMse) {
            take_rows(at(layout_.target), set.target, set.count * width(last()));
            return;
        }
        M* labels = reinterpret_cast<M*>(at(layout_.target));
        for (std::int64_t i = 0; i < set.count; ++i) {
            for (int lane = 0; lane < kL; ++lane) {
                const std::int64_t label = set.labels[(first_ + least(lane, live_ - 1)) * set.count + i];
                labels[i][lane] = static_cast<Int>(label >= 0 && label < width(last()) ? label : -1);
            }
        }
    }

    // ---- forward ----

    // All activations, the delta of the output layer and the mean loss.
    V pass(const MlpSet<Scalar>& set, V* accuracy) {
        for (int layer = 0; layer < last(); ++layer) forward(set.count, layer);
        const Scalar count = static_cast<Scalar>(set.count);
        const V loss = (p_.shape.loss == MlpLoss::kMse ? squared_error(set.count) : cross_entropy(set.count, accuracy)) /
                       count;
        flag(reinterpret_cast<M>(loss) & SameWidth<Scalar>::kMagnitude);
        return loss;
    }

    void forward(std::int64_t count, int layer) const {
        const std::int64_t inputs = width(layer), outputs = width(layer + 1);
        V* out = at(layout_.activation[layer + 1]);
        const bool rectifies = is_relu() && layer + 1 < last();
        const Product<V> product{{at(layout_.activation[layer]), inputs, 1},
                                 {at(layout_.weight[layer]), 1, inputs},
                                 at(layout_.bias[layer]),
                                 count, outputs, inputs};
        const Scalar floor = rectifies ? Scalar(0) : -static_cast<Scalar>(__builtin_inf());
        multiply(product, Activate<V>{out, outputs, Simd::all(floor)});
        if (is_relu() || layer + 1 == last()) return;
        // A tanh counts as some thirty multiply-adds.
        each(count * outputs, 30 * count * outputs, [=](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) out[i] = tanh_of<Simd>(out[i]);
        });
    }

    V squared_error(std::int64_t count) const {
        const std::int64_t outputs = width(last());
        const V* out = at(layout_.activation[last()]);
        const V* target = at(layout_.target);
        V* delta = at(layout_.delta[last() % 2]);
        const Scalar elements = static_cast<Scalar>(count * outputs);
        V loss{};
        for (std::int64_t example = 0; example < count; ++example) {
            V sum{};
            for (std::int64_t i = example * outputs; i < (example + 1) * outputs; ++i) {
                const V difference = out[i] - target[i];
                sum += difference * difference;
                delta[i] = Scalar(2) * difference / elements;
            }
            loss += sum / static_cast<Scalar>(outputs);
        }
        return loss;
    }

    // A label out of range makes loss and gradient NaN: reference.cross_entropy has the rule.
    V cross_entropy(std::int64_t count, V* accuracy) const {
        const std::int64_t outputs = width(last());
        const M* labels = reinterpret_cast<const M*>(at(layout_.target));
        V loss{}, correct{};
        for (std::int64_t example = 0; example < count; ++example) {
            const V* row = at(layout_.activation[last()]) + example * outputs;
            V* delta = at(layout_.delta[last() % 2]) + example * outputs;
            const M label = labels[example];
            V largest = row[0], at_label = row[0];
            M best{};
            for (std::int64_t o = 1; o < outputs; ++o) {
                const M index = static_cast<Int>(o) - M{};
                // A NaN is the largest, as in torch's argmax.
                const M greater = (row[o] > largest) | ((row[o] != row[o]) & (largest == largest));
                largest = greater ? row[o] : largest;
                best = greater ? index : best;
                at_label = label == index ? row[o] : at_label;
            }
            V sum{};
            for (std::int64_t o = 0; o < outputs; ++o) {
                delta[o] = exp_of<Simd>(row[o] - largest);
                sum += delta[o];
            }
            const V invalid = label < Int(0) ? Simd::all(static_cast<Scalar>(__builtin_nan(""))) : V{};
            for (std::int64_t o = 0; o < outputs; ++o) {
                const V share = delta[o] / sum;
                const V gradient = label == (static_cast<Int>(o) - M{}) ? share - Scalar(1) : share;
                delta[o] = gradient / static_cast<Scalar>(count) + invalid;
            }
            correct += best == label ? Simd::all(1) : V{};
            loss += log_of<Simd>(sum) + largest - at_label + invalid;
        }
        if (accuracy != nullptr) *accuracy = correct / static_cast<Scalar>(count);
        return loss;
    }

    // ---- backward ----

    // From the output's delta down. Steps move the parameters; for kGradient each is replaced by its gradient, which is
    // safe because a layer's weights are read for the last time just before.
    template <Purpose kPurpose>
    void backward(std::int64_t count, const Scalar* lr) {
        for (int layer = last() - 1; layer >= 0; --layer) {
            if (layer > 0) data_gradient(count, layer);
            if (kPurpose == Purpose::kGradient || p_.adapt[2 * layer] != 0) {
                weight_gradient<kPurpose>(count, layer, kPurpose == Purpose::kGradient ? Scalar(0) : lr[2 * layer]);
            }
            if (kPurpose == Purpose::kGradient || p_.adapt[2 * layer + 1] != 0) {
                bias_gradient<kPurpose>(count, layer, kPurpose == Purpose::kGradient ? Scalar(0) : lr[2 * layer + 1]);
            }
        }
    }

    void data_gradient(std::int64_t count, int layer) const {
        const std::int64_t inputs = width(layer), outputs = width(layer + 1);
        const V* in = at(layout_.activation[layer]);
        V* below = at(layout_.delta[layer % 2]);
        const Product<V> product{{at(layout_.delta[(layer + 1) % 2]), outputs, 1},
                                 {at(layout_.weight[layer]), inputs, 1},
                                 nullptr,
                                 count, inputs, outputs};
        if (is_relu()) {
            multiply(product, Deactivate<V, Activation::kRelu>{in, below, inputs});
        } else {
            multiply(product, Deactivate<V, Activation::kTanh>{in, below, inputs});
        }
    }

    template <Purpose kPurpose>
    void weight_gradient(std::int64_t count, int layer, Scalar lr) {
        const std::int64_t inputs = width(layer), outputs = width(layer + 1);
        move<kPurpose>({{at(layout_.delta[(layer + 1) % 2]), 1, outputs},
                        {at(layout_.activation[layer]), inputs, 1},
                        nullptr,
                        outputs, inputs, count},
                       layout_.weight[layer], lr);
    }

    template <Purpose kPurpose>
    void bias_gradient(std::int64_t count, int layer, Scalar lr) {
        const std::int64_t outputs = width(layer + 1);
        const V one = Simd::all(1);
        move<kPurpose>({{at(layout_.delta[(layer + 1) % 2]), 1, outputs}, {&one, 0, 0}, nullptr, outputs, 1, count},
                       layout_.bias[layer], lr);
    }

    // Parameters at `place` by their gradients, the results of `product`.
    template <Purpose kPurpose>
    void move(const Product<V>& product, std::int64_t place, Scalar lr) {
        each(product.items(), product.work(), [&](std::int64_t begin, std::int64_t end) {
            Move<Simd, kPurpose> own{at(place), product.columns, Simd::all(lr), M{}};
            product.compute(begin, end, own);
            flag(own.top);
        });
    }

    void flag(M top) {
        for (int lane = 0; lane < kL; ++lane) {
            if (top[lane] >= SameWidth<Scalar>::kInfinity) __atomic_store_n(bad_ + lane, 1, __ATOMIC_RELAXED);
        }
    }

    void query() {
        take(p_.query);
        V accuracy{};
        give(p_.query_loss + first_, pass(p_.query, &accuracy));
        if (p_.query_accuracy != nullptr) give(p_.query_accuracy + first_, accuracy);
        if (p_.predictions != nullptr) {
            const std::int64_t count = p_.query.count * width(last());
            give_rows(p_.predictions + first_ * count, layout_.activation[last()], count);
        }
        if (grads_ == nullptr) return;
        backward<Purpose::kGradient>(p_.query.count, nullptr);
        give_rows(grads_, layout_.parameters, p_.parameters);
    }

    const MlpMetaStepParams<Scalar>& p_;
    const MlpCpuLayout& layout_;
    const Sharing sharing_;
    V* const memory_;
    const std::int64_t first_;
    const int live_;
    Scalar* const grads_;
    int bad_[kL] = {};  // lanes that met a NaN or an infinity
};

template <typename Scalar, int kBytes>
void meta_step(const MlpGroup<Scalar>& group) {
    Group<Simd<Scalar, kBytes>>(group).run();
}

template <typename Scalar>
constexpr MlpStages<Scalar> table() {
    return {{kWideBytes / static_cast<int>(sizeof(Scalar)), meta_step<Scalar, kWideBytes>},
            {kNarrowBytes / static_cast<int>(sizeof(Scalar)), meta_step<Scalar, kNarrowBytes>}};
}

}  // namespace

extern const MlpStageTables kMlpStages;
const MlpStageTables kMlpStages = {table<float>(), table<double>()};

}  // namespace signmaml::cpu::SIGNMAML_ISA
