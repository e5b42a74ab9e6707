// params[t, j] -= lr[j] * sign(grads[t, j]) on the CPU: pieces of rows over threads, spans within a piece.

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/flags.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "plan/sign_step.h"

namespace signmaml::cpu {
namespace {

template <typename Table>
const Table* entry(const Table* table, Spread spread, std::int64_t column, std::int64_t segment) {
    switch (spread) {
        case Spread::kNone: return nullptr;
        case Spread::kAll: return table;
        case Spread::kPerElement: return table + column;
        case Spread::kPerSegment: return table + segment;
    }
    return nullptr;
}

// Columns [first, last) of one task's row, all of one segment where something is per segment.
template <typename Scalar>
bool step_span(const SignStepParams<Scalar>& p, std::int64_t task, std::int64_t first, std::int64_t last,
               std::int64_t segment) {
    const std::uint8_t* mask = entry(p.mask, p.mask_spread, first, segment);
    if (p.mask_spread == Spread::kPerSegment) {
        if (*mask == 0) return false;
        mask = nullptr;
    }
    const std::int64_t start = task * p.parameters + first;
    return span_kernels<Scalar>(kernels()).sign_step(p.params + start, p.grads + start,
                                                     entry(p.lr, p.lr_spread, first, segment),
                                                     p.lr_spread == Spread::kPerElement, mask, last - first);
}

// Columns [first, last) of one task's row, segment by segment.
template <typename Scalar>
bool step_segments(const SignStepParams<Scalar>& p, std::int64_t task, std::int64_t first, std::int64_t last) {
    const std::int64_t* offsets = p.segment_offsets;
    std::int64_t segment = std::upper_bound(offsets, offsets + p.segments + 1, first) - offsets - 1;
    bool nonfinite = false;
    for (; first < last; ++segment) {
        const std::int64_t end = std::min(last, offsets[segment + 1]);
        nonfinite |= step_span(p, task, first, end, segment);
        first = end;
    }
    return nonfinite;
}

}  // namespace

template <typename Scalar>
void sign_step(const SignStepParams<Scalar>& p, int threads) {
    const CpuPlan plan = plan_sign_step_cpu(p.tasks, p.parameters, threads);
    const bool by_segment = p.lr_spread == Spread::kPerSegment || p.mask_spread == Spread::kPerSegment;
    parallel_for(plan.items, plan.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t task = item / plan.chunks_per_row;
            const std::int64_t first = item % plan.chunks_per_row * plan.chunk;
            const std::int64_t last = std::min(p.parameters, first + plan.chunk);
            const bool nonfinite =
                by_segment ? step_segments(p, task, first, last) : step_span(p, task, first, last, 0);
            if (nonfinite) raise_flag(p.nonfinite + task);
        }
    });
}

template void sign_step<float>(const SignStepParams<float>&, int);
template void sign_step<double>(const SignStepParams<double>&, int);

}  // namespace signmaml::cpu
