// counts += sign(grads), params = theta - lr * counts on the CPU: pieces of rows over threads, spans within a piece.

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/flags.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "plan/compact_sign_step.h"

namespace signmaml::cpu {
namespace {

// Columns [first, last) of one task's row, with learning rates from `lr` on.
template <typename Scalar>
bool step_span(const CompactSignStepParams<Scalar>& p, std::int64_t task, std::int64_t first, std::int64_t last,
               const Scalar* lr) {
    const std::int64_t start = task * p.parameters + first;
    return span_kernels<Scalar>(kernels()).compact_sign_step(p.counts + start, p.params + start, p.theta + first,
                                                             p.grads + start, lr, p.lr_spread == Spread::kPerElement,
                                                             last - first);
}

// Columns [first, last) of one task's row, segment by segment.
template <typename Scalar>
bool step_segments(const CompactSignStepParams<Scalar>& p, std::int64_t task, std::int64_t first, std::int64_t last) {
    const std::int64_t* offsets = p.segment_offsets;
    std::int64_t segment = std::upper_bound(offsets, offsets + p.segments + 1, first) - offsets - 1;
    bool nonfinite = false;
    for (; first < last; ++segment) {
        const std::int64_t end = std::min(last, offsets[segment + 1]);
        nonfinite |= step_span(p, task, first, end, p.lr + segment);
        first = end;
    }
    return nonfinite;
}

}  // namespace

template <typename Scalar>
void compact_sign_step(const CompactSignStepParams<Scalar>& p, int threads) {
    const CpuPlan plan = plan_sign_step_cpu(p.tasks, p.parameters, threads);
    parallel_for(plan.items, plan.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t task = item / plan.chunks_per_row;
            const std::int64_t first = item % plan.chunks_per_row * plan.chunk;
            const std::int64_t last = std::min(p.parameters, first + plan.chunk);
            const Scalar* lr = p.lr_spread == Spread::kPerElement ? p.lr + first : p.lr;
            const bool nonfinite = p.lr_spread == Spread::kPerSegment ? step_segments(p, task, first, last)
                                                                      : step_span(p, task, first, last, lr);
            if (nonfinite) raise_flag(p.nonfinite + task);
        }
    });
}

template void compact_sign_step<float>(const CompactSignStepParams<float>&, int);
template void compact_sign_step<double>(const CompactSignStepParams<double>&, int);

}  // namespace signmaml::cpu
