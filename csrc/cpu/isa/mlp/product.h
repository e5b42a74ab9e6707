// Matrix products in register tiles: kRows times kColumns vectors of results stay in registers through the whole sum
// and through what is done with them. Every loop over them is unrolled, because an accumulator that is indexed at run
// time would live in memory. A tile reads what it needs to know through references to memory that was written long
// before. Arguments on the stack would be read back wider than they were written, and such a read waits until every
// store of the tile before has reached the cache.
#pragma once

#include <cstdint>

#include "cpu/isa/integers.h"
#include "cpu/isa/simd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// Keeps a value in a register. GCC would read it from memory for each of its uses, and there are two reads a cycle.
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

// Keeps the order in which several values are finished. GCC would do the first operation of all of them, then the
// second, and run out of registers.
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

// kRows times kColumns vectors of results stay in registers through the whole sum and through what is done with them.
// Every loop over them is unrolled: an accumulator that is indexed at run time would live in memory. What a tile needs
// to know it reads through references, to what was written long before: arguments on the stack would be read back wider
// than they were written, which waits until every store of the tile before has left for the cache.

// 24 of 32 or 12 of 16 registers accumulate; the rest hold what is multiplied.
constexpr int kTileRows = 6;
constexpr int kTileColumns = kRegisters == 32 ? 4 : 2;

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

// How many bytes a tile's operands move from term to term. The values are hidden from GCC, which would compile every
// tile twice: in general, and for adjacent terms.
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

// Where a tile starts: its first result and its first term; and the sums of the terms before, if there are any.
template <typename Vector>
struct Place {
    std::int64_t row, column, first;
    const Vector* earlier;  // [rows of the tile, columns of the tile]
};

// A `Finish` says what is done with results. Its begin(row, column) gives an object that a tile holds in registers. The
// tile calls own(c, sum) for the results of a row, own.next_row() after each row, and end(own).

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
        // Makes GCC read anew what the next lines need. Kept during the loop it would sit in vector registers, and
        // moves from there wait in the queue of the multiply-adds.
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

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
