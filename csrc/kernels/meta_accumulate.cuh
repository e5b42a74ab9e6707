// out[j] += (sum over live tasks t = 0, 1, ... of grads[t, j]) / live; flags tasks whose gradients are not finite.
// A thread owns kVector columns, or one at the ends of the rows, and adds the tasks in order: no sum is ever split. If
// flagged tasks are left out, flag_nonfinite_kernel runs first; there a block owns pieces of one task's row. Launched
// by launch_meta_accumulate. Readable twin: meta_accumulate in signmaml_ext/reference.py.
#pragma once

#include <cstdint>

#include "kernels/vectors.cuh"
#include "params/meta_accumulate.h"

namespace signmaml {

template <typename Scalar, int kVector>
__device__ inline bool holds_nonfinite(const Vector<Scalar, kVector>& values) {
    bool nonfinite = false;
#pragma unroll
    for (int i = 0; i < kVector; ++i) nonfinite |= is_nonfinite(values.at[i]);
    return nonfinite;
}

template <typename Scalar, int kVector>
__global__ void flag_nonfinite_kernel(const MetaAccumulateParams<Scalar> p) {
    const std::int64_t thread = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
    for (std::int64_t task = blockIdx.y; task < p.tasks; task += gridDim.y) {
        const Scalar* row = p.grads + task * p.parameters;
        const RowSpan span = row_span<Scalar, kVector>(row, p.parameters);
        const std::int64_t tail = span.head + span.bodies * kVector + thread;
        bool nonfinite = false;
        if (thread < span.head) nonfinite |= is_nonfinite(load(row + thread));
        if (tail < p.parameters) nonfinite |= is_nonfinite(load(row + tail));
#pragma unroll 4
        for (std::int64_t body = thread; body < span.bodies; body += threads) {
            nonfinite |= holds_nonfinite(load<Scalar, kVector>(row + span.head + body * kVector));
        }
        if (nonfinite) raise_flag(p.nonfinite + task);
    }
}

// Columns [column, column + kVector) of all tasks.
template <typename Scalar, int kVector, int kUnroll, bool kSkip>
__device__ inline void accumulate_columns(const MetaAccumulateParams<Scalar>& p, std::int64_t column) {
    Vector<Scalar, kVector> sums{};
    std::int64_t live = 0;
    for (std::int64_t first = 0; first < p.tasks; first += kUnroll) {
        Vector<Scalar, kVector> grads[kUnroll];
        bool counts[kUnroll];
        // Issue all loads before the first use of a loaded value; the sums below stay in order.
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const std::int64_t task = first + u;
            counts[u] = task < p.tasks && !(kSkip && load(p.nonfinite + task) != 0);
            if (counts[u]) grads[u] = load<Scalar, kVector>(p.grads + task * p.parameters + column);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (!counts[u]) continue;
            ++live;
#pragma unroll
            for (int i = 0; i < kVector; ++i) sums.at[i] += grads[u].at[i];
            if (!kSkip && holds_nonfinite(grads[u])) raise_flag(p.nonfinite + first + u);
        }
    }
    if (live == 0) return;
    auto out = load<Scalar, kVector>(p.out + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) out.at[i] += sums.at[i] / static_cast<Scalar>(live);
    store<Scalar, kVector>(p.out + column, out);
}

// `head` single columns, then `bodies` vectors of columns, then the rest, as plan_meta_accumulate divides them.
template <typename Scalar, int kVector, int kUnroll, bool kSkip>
__global__ void meta_accumulate_kernel(const MetaAccumulateParams<Scalar> p, std::int64_t head, std::int64_t bodies) {
    const std::int64_t singles = p.parameters - bodies * kVector;
    const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
    for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < bodies + singles; i += threads) {
        if (i < bodies) {
            accumulate_columns<Scalar, kVector, kUnroll, kSkip>(p, head + i * kVector);
        } else {
            const std::int64_t single = i - bodies;
            const std::int64_t column = single < head ? single : single + bodies * kVector;
            accumulate_columns<Scalar, 1, kUnroll, kSkip>(p, column);
        }
    }
}

}  // namespace signmaml
