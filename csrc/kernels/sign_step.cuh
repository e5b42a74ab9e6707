// params[t, j] -= lr[j] * sign(grads[t, j]) for all tasks at once; flags tasks with a non-finite gradient among those
// that the mask selects. A block owns tiles of kSignStepBlock * kSignStepUnroll vectors in one task's row; a thread
// owns kSignStepUnroll vectors of each tile, one block width apart. Blocks with x = 0 also take the few elements before
// and after a row's aligned vectors. Launched by launch_sign_step. Readable twin: sign_step in
// signmaml_ext/reference.py.
#pragma once

#include <cstdint>

#include "kernels/vectors.cuh"
#include "params/sign_step.h"

namespace signmaml {

// The last segment in [low, high] that does not start after the column. Stays in bounds even if the offsets are
// invalid.
__device__ inline std::int64_t segment_of(const std::int64_t* offsets, std::int64_t low, std::int64_t high,
                                          std::int64_t column) {
    while (low < high) {
        const std::int64_t middle = low + (high - low + 1) / 2;
        if (load(offsets + middle) <= column) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// The segment of consecutive columns.
struct SegmentCursor {
    std::int64_t low, high;  // the range that the next column's segment is in

    // Narrows the segments to those of columns [first, last], so that later searches are short.
    __device__ void restrict_to(const std::int64_t* offsets, std::int64_t segments, std::int64_t first,
                                std::int64_t last) {
        low = segment_of(offsets, 0, segments - 1, first);
        high = segment_of(offsets, low, segments - 1, last);
    }

    // Moves on to a column, which must be in the range given to restrict_to and not before the last one.
    __device__ void seek(const std::int64_t* offsets, std::int64_t column) {
        if (low < high) low = segment_of(offsets, low, high, column);
    }
};

// Learning rate and mask of consecutive columns, for any spread of the two.
template <typename Scalar>
struct TableCursor {
    const SignStepParams<Scalar>& p;
    SegmentCursor segments;

    __device__ bool by_segment() const {
        return p.lr_spread == Spread::kPerSegment || p.mask_spread == Spread::kPerSegment;
    }

    __device__ void restrict_to(std::int64_t first, std::int64_t last) {
        if (by_segment()) segments.restrict_to(p.segment_offsets, p.segments, first, last);
    }

    __device__ void seek(std::int64_t column) { segments.seek(p.segment_offsets, column); }

    __device__ Scalar lr(std::int64_t column) const {
        if (p.lr_spread == Spread::kPerElement) return load(p.lr + column);
        return load(p.lr + (p.lr_spread == Spread::kPerSegment ? segments.low : 0));
    }

    __device__ bool looks_at(std::int64_t column) const {
        if (p.mask_spread == Spread::kNone) return true;
        return load(p.mask + (p.mask_spread == Spread::kPerSegment ? segments.low : column)) != 0;
    }
};

// The columns [column, column + kVector) of one row, already loaded. Returns whether a gradient is not finite.
// kPlain: one learning rate and no mask, the case that must run at memory bandwidth.
template <typename Scalar, int kVector, bool kPlain>
__device__ inline bool step_vector(Vector<Scalar, kVector>& params, const Vector<Scalar, kVector>& grads,
                                   TableCursor<Scalar> tables, Scalar plain_lr, std::int64_t column) {
    bool nonfinite = false;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        Scalar rate = plain_lr;
        if (!kPlain) {
            tables.seek(column + i);
            if (!tables.looks_at(column + i)) continue;
            rate = tables.lr(column + i);
        }
        params.at[i] = stepped(params.at[i], rate, sign(grads.at[i]));
        nonfinite |= is_nonfinite(grads.at[i]);
    }
    return nonfinite;
}

// One element, for the ends of a row.
template <typename Scalar, bool kPlain>
__device__ inline bool step_element(const SignStepParams<Scalar>& p, std::int64_t row, Scalar plain_lr,
                                    std::int64_t column) {
    TableCursor<Scalar> tables{p, {0, 0}};
    if (!kPlain) {
        tables.restrict_to(column, column);
        if (!tables.looks_at(column)) return false;
    }
    auto params = load<Scalar, 1>(p.params + row + column);
    const auto grads = load<Scalar, 1>(p.grads + row + column);
    const bool nonfinite = step_vector<Scalar, 1, kPlain>(params, grads, tables, plain_lr, column);
    store<Scalar, 1>(p.params + row + column, params);
    return nonfinite;
}

template <typename Scalar, int kVector, int kBlock, int kUnroll, bool kPlain>
__global__ void __launch_bounds__(kBlock) sign_step_kernel(const SignStepParams<Scalar> p) {
    constexpr std::int64_t kTile = std::int64_t{kBlock} * kUnroll;  // vectors
    const Scalar plain_lr = kPlain ? load(p.lr) : Scalar(0);
    for (std::int64_t task = blockIdx.y; task < p.tasks; task += gridDim.y) {
        const std::int64_t row = task * p.parameters;
        const RowSpan span = row_span<Scalar, kVector>(p.params + row, p.parameters);
        bool nonfinite = false;
        if (blockIdx.x == 0) {
            const std::int64_t tail = span.head + span.bodies * kVector + threadIdx.x;
            if (threadIdx.x < span.head) nonfinite |= step_element<Scalar, kPlain>(p, row, plain_lr, threadIdx.x);
            if (tail < p.parameters) nonfinite |= step_element<Scalar, kPlain>(p, row, plain_lr, tail);
        }
        for (std::int64_t first = blockIdx.x * kTile; first < span.bodies; first += gridDim.x * kTile) {
            Vector<Scalar, kVector> params[kUnroll];
            Vector<Scalar, kVector> grads[kUnroll];
            // Issue all loads before the first use of a loaded value.
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const std::int64_t body = first + u * kBlock + threadIdx.x;
                if (body < span.bodies) {
                    const std::int64_t at = row + span.head + body * kVector;
                    grads[u] = load<Scalar, kVector>(p.grads + at);
                    params[u] = load<Scalar, kVector>(p.params + at);
                }
            }
            TableCursor<Scalar> tables{p, {0, 0}};
            if (!kPlain) {
                const std::int64_t end = first + kTile < span.bodies ? first + kTile : span.bodies;
                tables.restrict_to(span.head + first * kVector, span.head + end * kVector - 1);
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const std::int64_t body = first + u * kBlock + threadIdx.x;
                if (body < span.bodies) {
                    const std::int64_t column = span.head + body * kVector;
                    nonfinite |= step_vector<Scalar, kVector, kPlain>(params[u], grads[u], tables, plain_lr, column);
                    store<Scalar, kVector>(p.params + row + column, params[u]);
                }
            }
        }
        if (nonfinite) raise_flag(p.nonfinite + task);
    }
}

}  // namespace signmaml
