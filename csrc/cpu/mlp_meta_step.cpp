// A meta-step of multilayer perceptrons on the CPU: groups of tasks over threads, or threads within a group where there
// are fewer groups. What a group does is in cpu/isa/mlp/group.h; the readable twin is meta_gradients in
// signmaml_ext/reference.py.

#include <algorithm>
#include <atomic>

#include "cpu/dispatch.h"
#include "cpu/mlp_table.h"
#include "cpu/ops.h"
#include "cpu/ordered_mean.h"
#include "cpu/scratch_slots.h"
#include "cpu/thread_pool.h"
#include "plan/mlp_meta_step_cpu.h"

namespace signmaml::cpu {
namespace {

void share(std::int64_t items, int threads, Sharing::Body body, const void* self) {
    parallel_for(items, threads, [&](std::int64_t begin, std::int64_t end) { body(self, begin, end); });
}

}  // namespace

template <typename Scalar>
void mlp_meta_step(const MlpMetaStepParams<Scalar>& p, const MeanGradient<Scalar>& wanted, int threads) {
    if (p.tasks == 0) return;
    const MlpStages<Scalar>& stages = mlp_stages<Scalar>(kernels());
    const MlpCpuPlan plan =
        plan_mlp_meta_step_cpu(p.shape, p.tasks, p.support.count, p.query.count, p.steps, p.method, p.how,
                               sizeof(Scalar), stages.wide.lanes, stages.narrow.lanes, threads);
    const MlpCpuLayout layout = mlp_cpu_layout(p.shape, p.support.count, p.query.count, p.steps, p.method, p.how);
    const auto meta_step = plan.lanes == stages.wide.lanes ? stages.wide.meta_step : stages.narrow.meta_step;
    Scalar* memory = aligned<Scalar>(p.workspace, kMlpAlignment);
    const Sharing sharing{plan.within && threads > 1 ? &share : nullptr, threads};
    const std::int64_t columns = mlp_columns(p.shape, p.steps, p.how.rates);
    OrderedMean<Scalar> mean(wanted, p.nonfinite, p.tasks, columns, plan.lanes, ceil_div(plan.mean_rows, plan.lanes));
    std::atomic<std::int64_t> next{0};
    // An item is a slot, whose memory nobody else uses; it takes groups until none is left.
    parallel_for(plan.slots, static_cast<int>(plan.slots), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t slot = begin; slot < end; ++slot) {
            Scalar* own = memory + slot * layout.size * plan.lanes;
            for (std::int64_t group; (group = next.fetch_add(1, std::memory_order_relaxed)) < plan.groups;) {
                const std::int64_t first = group * plan.lanes;
                const int live = static_cast<int>(std::min<std::int64_t>(plan.lanes, p.tasks - first));
                Scalar* grads = p.grads == nullptr ? nullptr : p.grads + first * columns;
                if (mean.wanted()) grads = mean.rows(group);
                meta_step({&p, &layout, own, first, live, grads, sharing});
                if (mean.wanted()) mean.hand_in(group);
            }
        }
    });
    if (mean.wanted()) mean.finish();
}

template void mlp_meta_step<float>(const MlpMetaStepParams<float>&, const MeanGradient<float>&, int);
template void mlp_meta_step<double>(const MlpMetaStepParams<double>&, const MeanGradient<double>&, int);

}  // namespace signmaml::cpu
