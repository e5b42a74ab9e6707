// out[j] += mean over live tasks of grads[t, j] on the CPU: columns over threads, tasks in order within a column.

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/flags.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "plan/meta_accumulate.h"

namespace signmaml::cpu {
namespace {

template <typename Scalar>
void flag_nonfinite(const MetaAccumulateParams<Scalar>& p, int threads) {
    const CpuPlan plan = plan_sign_step_cpu(p.tasks, p.parameters, threads);
    const auto holds_nonfinite = span_kernels<Scalar>(kernels()).holds_nonfinite;
    parallel_for(plan.items, plan.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t task = item / plan.chunks_per_row;
            const std::int64_t first = item % plan.chunks_per_row * plan.chunk;
            const std::int64_t length = std::min(plan.chunk, p.parameters - first);
            if (holds_nonfinite(p.grads + task * p.parameters + first, length)) raise_flag(p.nonfinite + task);
        }
    });
}

// Columns [first, first + length): the sums of the piece stay in the first-level cache while tasks go by.
template <typename Scalar>
void accumulate_columns(const MetaAccumulateParams<Scalar>& p, Scalar count, std::int64_t first, std::int64_t length) {
    const SpanKernels<Scalar>& span = span_kernels<Scalar>(kernels());
    alignas(64) Scalar sums[kLargestColumnChunk];
    std::fill_n(sums, length, Scalar(0));
    for (std::int64_t task = 0; task < p.tasks;) {
        const Scalar* rows[kRowsAtOnce];
        std::int64_t tasks[kRowsAtOnce];
        int live = 0;
        for (; task < p.tasks && live < kRowsAtOnce; ++task) {
            if (p.skip_nonfinite && p.nonfinite[task] != 0) continue;
            rows[live] = p.grads + task * p.parameters + first;
            tasks[live++] = task;
        }
        const unsigned nonfinite = span.accumulate(sums, rows, live, length);
        for (int r = 0; r < live; ++r) {
            if ((nonfinite >> r & 1) != 0) raise_flag(p.nonfinite + tasks[r]);
        }
    }
    span.add_mean(p.out + first, sums, count, length);
}

}  // namespace

template <typename Scalar>
void meta_accumulate(const MetaAccumulateParams<Scalar>& p, int threads) {
    if (p.skip_nonfinite) flag_nonfinite(p, threads);
    const std::int64_t skipped = p.skip_nonfinite ? p.tasks - std::count(p.nonfinite, p.nonfinite + p.tasks, 0) : 0;
    const std::int64_t live = p.tasks - skipped;
    if (live == 0) return;
    const CpuPlan plan = plan_meta_accumulate_cpu(p.tasks, p.parameters, threads);
    parallel_for(plan.items, plan.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t first = item * plan.chunk;
            accumulate_columns(p, static_cast<Scalar>(live), first, std::min(plan.chunk, p.parameters - first));
        }
    });
}

template void meta_accumulate<float>(const MetaAccumulateParams<float>&, int);
template void meta_accumulate<double>(const MetaAccumulateParams<double>&, int);

}  // namespace signmaml::cpu
