// counts[t, j] += sign(grads[t, j]); params[t, j] = theta[j] - lr[j] * counts[t, j]: the sign step of tasks whose state
// is one byte per parameter. A NaN gradient or a count beyond +-127 makes a count NaN for good. Tasks with such a count
// or an infinite gradient are flagged. Blocks and threads own the same elements as in sign_step_kernel. Launched by
// launch_compact_sign_step. Readable twin: compact_sign_step in signmaml_ext/reference.py.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/sign_step.cuh"
#include "params/compact_sign_step.h"

namespace signmaml {

// The count after one more step.
template <typename Scalar>
__device__ inline std::int8_t next_count(std::int8_t count, Scalar grad) {
    const int next = count + (grad > Scalar(0) ? 1 : 0) - (grad < Scalar(0) ? 1 : 0);
    const bool is_number = count != kNanCount && grad == grad && next <= 127;
    return static_cast<std::int8_t>(is_number ? next : kNanCount);
}

// At namespace scope because device code may use the value but not call quiet_NaN.
template <typename Scalar>
inline constexpr Scalar kNan = std::numeric_limits<Scalar>::quiet_NaN();

template <typename Scalar>
__device__ inline Scalar from_count(Scalar theta, Scalar lr, std::int8_t count) {
    return count == kNanCount ? kNan<Scalar> : stepped(theta, lr, static_cast<Scalar>(count));
}

// The columns [column, column + kVector) of one row. Returns whether to flag the task.
template <typename Scalar, int kVector, bool kPlain>
__device__ inline bool compact_step_vector(const CompactSignStepParams<Scalar>& p, std::int64_t row,
                                           Vector<std::int8_t, kVector> counts, const Vector<Scalar, kVector>& grads,
                                           SegmentCursor segments, Scalar plain_lr, std::int64_t column) {
    Vector<Scalar, kVector> params;
    bool nonfinite = false;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        Scalar rate = plain_lr;
        if (!kPlain) {
            segments.seek(p.segment_offsets, column + i);
            rate = load(p.lr + (p.lr_spread == Spread::kPerElement ? column + i : segments.low));
        }
        counts.at[i] = next_count(counts.at[i], grads.at[i]);
        params.at[i] = from_count(load(p.theta + column + i), rate, counts.at[i]);
        nonfinite |= is_nonfinite(grads.at[i]) || counts.at[i] == kNanCount;
    }
    store<std::int8_t, kVector>(p.counts + row + column, counts);
    store<Scalar, kVector>(p.params + row + column, params);
    return nonfinite;
}

// One element, for the ends of a row.
template <typename Scalar, bool kPlain>
__device__ inline bool compact_step_element(const CompactSignStepParams<Scalar>& p, std::int64_t row, Scalar plain_lr,
                                            std::int64_t column) {
    SegmentCursor segments{0, 0};
    if (!kPlain && p.lr_spread == Spread::kPerSegment) {
        segments.restrict_to(p.segment_offsets, p.segments, column, column);
    }
    return compact_step_vector<Scalar, 1, kPlain>(p, row, load<std::int8_t, 1>(p.counts + row + column),
                                                  load<Scalar, 1>(p.grads + row + column), segments, plain_lr, column);
}

template <typename Scalar, int kVector, int kBlock, int kUnroll, bool kPlain>
__global__ void __launch_bounds__(kBlock) compact_sign_step_kernel(const CompactSignStepParams<Scalar> p) {
    constexpr std::int64_t kTile = std::int64_t{kBlock} * kUnroll;  // vectors
    const Scalar plain_lr = kPlain ? load(p.lr) : Scalar(0);
    for (std::int64_t task = blockIdx.y; task < p.tasks; task += gridDim.y) {
        const std::int64_t row = task * p.parameters;
        const RowSpan span = row_span<Scalar, kVector>(p.params + row, p.parameters);
        bool nonfinite = false;
        if (blockIdx.x == 0) {
            const std::int64_t tail = span.head + span.bodies * kVector + threadIdx.x;
            if (threadIdx.x < span.head) {
                nonfinite |= compact_step_element<Scalar, kPlain>(p, row, plain_lr, threadIdx.x);
            }
            if (tail < p.parameters) nonfinite |= compact_step_element<Scalar, kPlain>(p, row, plain_lr, tail);
        }
        for (std::int64_t first = blockIdx.x * kTile; first < span.bodies; first += gridDim.x * kTile) {
            Vector<std::int8_t, kVector> counts[kUnroll];
            Vector<Scalar, kVector> grads[kUnroll];
            // Issue all loads before the first use of a loaded value.
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const std::int64_t body = first + u * kBlock + threadIdx.x;
                if (body < span.bodies) {
                    const std::int64_t at = row + span.head + body * kVector;
                    grads[u] = load<Scalar, kVector>(p.grads + at);
                    counts[u] = load<std::int8_t, kVector>(p.counts + at);
                }
            }
            SegmentCursor segments{0, 0};
            if (!kPlain && p.lr_spread == Spread::kPerSegment) {
                const std::int64_t end = first + kTile < span.bodies ? first + kTile : span.bodies;
                segments.restrict_to(p.segment_offsets, p.segments, span.head + first * kVector,
                                     span.head + end * kVector - 1);
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const std::int64_t body = first + u * kBlock + threadIdx.x;
                if (body < span.bodies) {
                    nonfinite |= compact_step_vector<Scalar, kVector, kPlain>(p, row, counts[u], grads[u], segments,
                                                                              plain_lr, span.head + body * kVector);
                }
            }
        }
        if (nonfinite) raise_flag(p.nonfinite + task);
    }
}

}  // namespace signmaml
