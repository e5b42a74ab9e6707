// Products on tensor cores: operands as words of shared memory, fragments of them, and sums of their products.
#pragma once

#include <cstdint>

#include "kernels/platform.cuh"
#include "params/conv_kernels.h"

namespace signmaml {

// How operands lie in shared memory: see params/conv_kernels.h, whose functions kernels cannot call.
template <ConvPrecision kPrecision>
struct Operands {
    static constexpr int kOfWord = conv_numbers_of_word(kPrecision), kPlanes = conv_planes(kPrecision);
    static constexpr int kChunk = conv_chunk(kPrecision), kRow = conv_row(kPrecision);
    static constexpr int kWords = kChunk / kOfWord;  // of a row
    static constexpr int kDepth = 8 * kOfWord;       // numbers that one product takes: eight words
};

// ---- operands

// A float as two TF32 numbers whose sum keeps 21 of its bits: one rounded, and the rest, which is exact until mma cuts
// it off. Three instructions instead of the seven that two conversions take, because they do not ask for NaN. A NaN
// that the first number loses to the carry is in the second.
struct Halves {
    std::uint32_t high, low;
};

__device__ inline Halves halves_of(float value) {
    constexpr std::uint32_t kKept = 0xffffe000u, kHalf = 0x1000u;  // the bits of a TF32 number; half of its last one
    const std::uint32_t high = (bits_of(value) + kHalf) & kKept;
    return {high, bits_of(value - float_of(high))};
}

// The same, or for kTf32 the number rounded, alone.
template <ConvPrecision kPrecision>
__device__ inline Halves operands_of(float value) {
    if constexpr (kPrecision == ConvPrecision::kFp32) {
        return halves_of(value);
    } else {
        return {tf32_operand(value), 0};
    }
}

// Stores four neighbouring numbers as operands. `at` is the place of the first one's word, `plane` the number of words
// from one plane to the next.
template <ConvPrecision kPrecision>
__device__ inline void store_operands(const Shared<std::uint32_t>& words, int at, int plane,
                                      const Vector<float, 4>& values) {
    if constexpr (kPrecision == ConvPrecision::kBf16) {
        store<std::uint32_t, 2>(words.address(at),
                                {{pack_bf16(values.at[0], values.at[1]), pack_bf16(values.at[2], values.at[3])}});
    } else {
        Vector<std::uint32_t, 4> high, low;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Halves halves = operands_of<kPrecision>(values.at[i]);
            high.at[i] = halves.high;
            low.at[i] = halves.low;
        }
        store<std::uint32_t, 4>(words.address(at), high);
        if constexpr (Operands<kPrecision>::kPlanes == 2) store<std::uint32_t, 4>(words.address(at + plane), low);
    }
}

// Calls `visit(row, number)` for `rows` rows of an operand and every fourth number below `padded`: once a block. Eight
// neighbouring lanes have eight rows, which store_operands puts into different banks if they are of one row of a tile.
template <ConvPrecision kPrecision, typename Visit>
__device__ inline void for_each_quad(int rows, int padded, const Visit& visit) {
    constexpr int kQuads = Operands<kPrecision>::kChunk / 4;
    for (int item = threadIdx.x; item < (rows + 7) / 8 * 8 * kQuads; item += kConvProductThreads) {
        const int row = item / (8 * kQuads) * 8 + item % 8, number = item / 8 % kQuads * 4;
        if (row < rows && number < padded) visit(row, number);
    }
}

// ---- fragments: what a lane holds of 16 rows, or of 8 columns, by Operands::kDepth numbers of the depth

struct RowFragment {
    std::uint32_t high[4], low[4];  // `low` in fp32 only
};

struct ColumnFragment {
    std::uint32_t high[2], low[2];
};

// From single numbers. get(half, k): row lane() / 4 + 8 * half at depth k.
template <ConvPrecision kPrecision, typename Get>
__device__ inline RowFragment row_fragment(const Get& get) {
    const int member = lane() % 4;
    RowFragment rows{};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if constexpr (kPrecision == ConvPrecision::kBf16) {
            const int k = 2 * member + e / 2 * 8;
            rows.high[e] = pack_bf16(get(e % 2, k), get(e % 2, k + 1));
        } else {
            const Halves halves = operands_of<kPrecision>(get(e % 2, member + e / 2 * 4));
            rows.high[e] = halves.high;
            rows.low[e] = halves.low;
        }
    }
    return rows;
}

// get(k): column lane() / 4 at depth k.
template <ConvPrecision kPrecision, typename Get>
__device__ inline ColumnFragment column_fragment(const Get& get) {
    const int member = lane() % 4;
    ColumnFragment columns{};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if constexpr (kPrecision == ConvPrecision::kBf16) {
            columns.high[e] = pack_bf16(get(2 * member + e * 8), get(2 * member + e * 8 + 1));
        } else {
            const Halves halves = operands_of<kPrecision>(get(member + e * 4));
            columns.high[e] = halves.high;
            columns.low[e] = halves.low;
        }
    }
    return columns;
}

// From operands in shared memory. `at` is the place of row lane() % 16, four words further for lanes from 16 on.
template <ConvPrecision kPrecision>
__device__ inline RowFragment load_rows(const Shared<std::uint32_t>& words, int at, int plane) {
    RowFragment rows{};
    ldmatrix_x4(rows.high, words.address(at));
    if constexpr (Operands<kPrecision>::kPlanes == 2) ldmatrix_x4(rows.low, words.address(at + plane));
    return rows;
}

// Where a lane reads for load_columns, from the first column on: by eights, lanes have both halves of the words of
// eight columns, and then those of the next eight, or of the other plane where kN, the fragments in all, is 1.
template <ConvPrecision kPrecision, int kN>
__device__ inline int place_in_columns(int plane) {
    constexpr int kRow = Operands<kPrecision>::kRow;
    const int next = kN > 1 ? 8 * kRow : Operands<kPrecision>::kPlanes == 2 ? plane : 0;
    return lane() % 8 * kRow + lane() / 8 % 2 * 4 + lane() / 16 * next;
}

// One fragment of 8 columns, or two.
template <ConvPrecision kPrecision, int kCount>
__device__ inline void load_columns(ColumnFragment (&columns)[kCount], const Shared<std::uint32_t>& words, int at,
                                    int plane) {
    std::uint32_t four[4];
    ldmatrix_x4(four, words.address(at));
    if constexpr (kCount == 1) {
        columns[0] = {{four[0], four[1]}, {four[2], four[3]}};
    } else {
        columns[0] = {{four[0], four[1]}, {}};
        columns[1] = {{four[2], four[3]}, {}};
        if constexpr (Operands<kPrecision>::kPlanes == 1) return;
        ldmatrix_x4(four, words.address(at + plane));
#pragma unroll
        for (int e = 0; e < 4; ++e) columns[e / 2].low[e % 2] = four[e];
    }
}

// ---- products

template <ConvPrecision kPrecision>
__device__ inline void add_product(float (&sums)[4], const RowFragment& rows, const ColumnFragment& columns) {
    if constexpr (kPrecision == ConvPrecision::kFp32) {
        // Tensor cores cut off what they add to a large sum, so the large sums are added up outside them. The small
        // products come first: they would be lost in the large ones.
        float of_step[4] = {};
        mma_m16n8k8_tf32(of_step, rows.low, columns.high);
        mma_m16n8k8_tf32(of_step, rows.high, columns.low);
        mma_m16n8k8_tf32(of_step, rows.high, columns.high);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[e] += of_step[e];
    } else if constexpr (kPrecision == ConvPrecision::kTf32) {
        mma_m16n8k8_tf32(sums, rows.high, columns.high);
    } else {
        mma_m16n8k16_bf16(sums, rows.high, columns.high);
    }
}

// sums[i][j] += rows i times columns j, which lie in shared memory; `at` as place_in_columns says.
template <ConvPrecision kPrecision, int kM, int kN>
__device__ inline void multiply(float (&sums)[kM][kN][4], const RowFragment (&rows)[kM],
                                const Shared<std::uint32_t>& words, int at, int plane) {
    constexpr int kCount = kN == 1 ? 1 : 2;
#pragma unroll
    for (int first = 0; first < kN; first += kCount) {
        ColumnFragment columns[kCount];
        load_columns<kPrecision>(columns, words, at + first * 8 * Operands<kPrecision>::kRow, plane);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
#pragma unroll
            for (int i = 0; i < kM; ++i) add_product<kPrecision>(sums[i][first + j], rows[i], columns[j]);
        }
    }
}

// The sum of a fragment's column over its rows, i.e. over the eight lanes that share the column, in a fixed order.
__device__ inline float sum_over_rows(float value) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) value += shuffle_xor(value, distance);
    return value;
}

}  // namespace signmaml
