// A meta-step of a convolutional network on the CPU: as many tasks side by side as there are threads, the rest one
// after the other with all threads on each. The stages are those of conv_table.h; the readable twin is
// meta_gradients in signmaml_ext/reference.py.

#include <atomic>
#include <cmath>
#include <optional>

#include "cpu/conv_passes.h"
#include "cpu/conv_second_order.h"
#include "cpu/conv_sharpness.h"
#include "cpu/conv_table.h"
#include "cpu/conv_tensors.h"
#include "cpu/dispatch.h"
#include "cpu/flags.h"
#include "cpu/ops.h"
#include "cpu/ordered_mean.h"
#include "cpu/thread_pool.h"
#include "plan/conv_meta_step_cpu.h"

namespace signmaml::cpu {
namespace {

// The meta-step of one task after the other, by some threads.
template <typename Scalar>
class ConvTeam {
  public:
    ConvTeam(const ConvMetaStepParams<Scalar>& p, const ConvCpuLayout& layout, const ConvKept& kept,
             const ConvStages<Scalar>& stages, const Tensors& tensors, OrderedMean<Scalar>& mean, Scalar* memory,
             int threads)
        : p_(p),
          mean_(mean),
          kept_(conv_kept_layout(p.shape, layout, kept, sizeof(Scalar))),
          passes_(p, layout, stages, tensors, memory, kept_.end, threads) {
        if (kept.directions > 0) rates_.emplace(p, kept_, stages, tensors, passes_);
        if (kept.parameters > 0 && wants_gradient()) {
            second_order_.emplace(p, kept_.second, stages, passes_, rates_ ? &*rates_ : nullptr);
        }
        if (kept.start) sharpness_.emplace(p.how.sharpness, passes_, kept_.start);
    }

    void run(std::int64_t task) {
        bool nonfinite = false;
        const Wanted wanted{p_.adapt};
        const bool by_row = p_.how.rates.by_element || p_.how.counted;
        passes_.take_parameters();
        if (rates_) rates_->start();
        if (p_.steps > 0) passes_.take_images(p_.support, task);
        bool features_stale = true;
        for (std::int64_t step = 0; step < p_.steps; ++step) {
            const Scalar loss = passes_.forward(p_.support, task, features_stale);
            nonfinite |= !std::isfinite(loss);
            p_.support_loss[step * p_.tasks + task] = loss;
            passes_.head(p_.support, task).to_gradient();
            passes_.backward(wanted);
            if (sharpness_) nonfinite |= gradient_at_the_sharpest(wanted, task);
            if (second_order_) second_order_->remember(step);
            if (rates_) rates_->keep_direction(step);
            nonfinite |= by_row ? rates_->move(step) : passes_.move(wanted, rates(step));
            features_stale = passes_.moves_a_block(wanted);
        }
        if (p_.adapted != nullptr) passes_.give(p_.adapted + task * p_.parameters, /*grads=*/false);
        if (p_.counts != nullptr) {
            std::int8_t* counts = p_.counts + task * p_.parameters;
            if (rates_) {
                rates_->give_counts(counts);
            } else {
                std::fill_n(counts, p_.parameters, std::int8_t{0});
            }
        }
        if (p_.query.count > 0) {
            passes_.take_images(p_.query, task);
            const Scalar loss = passes_.forward(p_.query, task, true);
            nonfinite |= !std::isfinite(loss);
            p_.query_loss[task] = loss;
            if (p_.query_accuracy != nullptr) p_.query_accuracy[task] = passes_.head(p_.query, task).accuracy();
            passes_.give_logits(task);
            if (wants_gradient()) {
                passes_.head(p_.query, task).to_gradient();
                passes_.backward(Wanted{nullptr});
                // A row may have to wait for tasks before, so it is taken late, unless rates' gradients go there.
                Scalar* row = p_.how.rates.learnable ? row_of(task) : nullptr;
                Scalar* rate_grads = row == nullptr ? nullptr : row + p_.parameters;
                if (rate_grads != nullptr) std::fill_n(rate_grads, columns() - p_.parameters, Scalar(0));
                if (second_order_) second_order_->through_the_steps(task, rate_grads);
                if (row == nullptr) row = row_of(task);
                passes_.give(row, /*grads=*/true);
                for (std::int64_t step = 0; rate_grads != nullptr && !second_order_ && step < p_.steps; ++step) {
                    rates_->gradients(step, row, rate_grads);
                }
            }
        }
        if (nonfinite) raise_flag(p_.nonfinite + task);
        if (mean_.wanted()) mean_.hand_in(task);
    }

  private:
    // Instead of the one at hand. Returns whether anything is NaN or infinite.
    bool gradient_at_the_sharpest(Wanted wanted, std::int64_t task) {
        bool nonfinite = sharpness_->climb(wanted);
        nonfinite |= !std::isfinite(passes_.forward(p_.support, task, passes_.moves_a_block(wanted)));
        passes_.head(p_.support, task).to_gradient();
        passes_.backward(wanted);
        sharpness_->come_back(wanted);
        return nonfinite;
    }

    Scalar* row_of(std::int64_t task) { return mean_.wanted() ? mean_.rows(task) : p_.grads + task * columns(); }
    bool wants_gradient() const { return p_.grads != nullptr || mean_.wanted(); }
    std::int64_t columns() const {
        return gradient_columns(p_.parameters, conv_tensors(p_.shape), p_.steps, p_.how.rates);
    }
    const Scalar* rates(std::int64_t step) const { return p_.lr + p_.how.rates.row(step) * conv_tensors(p_.shape); }

    const ConvMetaStepParams<Scalar>& p_;
    OrderedMean<Scalar>& mean_;
    const ConvKeptLayout kept_;
    ConvPasses<Scalar> passes_;
    std::optional<ConvRates<Scalar>> rates_;  // unless they are constant and the same for all of a tensor
    std::optional<ConvSecondOrder<Scalar>> second_order_;
    std::optional<ConvSharpness<Scalar>> sharpness_;
};

}  // namespace

template <typename Scalar>
void conv_meta_step(const ConvMetaStepParams<Scalar>& p, const MeanGradient<Scalar>& wanted, int threads) {
    if (p.tasks == 0) return;
    const ConvStages<Scalar>& stages = conv_stages<Scalar>(kernels());
    const std::int64_t examples = larger(p.support.count, p.query.count);
    const ConvKept kept =
        conv_kept(p.method, p.how.rates, p.how.sharpness.rho > 0, p.how.counted, p.steps, p.query.count);
    const ConvCpuPlan plan = plan_conv_meta_step_cpu(p.shape, p.tasks, p.support.count, p.query.count, kept,
                                                     sizeof(Scalar), stages.unit, threads);
    const auto layout_for = [&](bool alone) {
        return conv_cpu_layout(p.shape, examples, sizeof(Scalar), stages.unit, alone && kept.parameters == 0);
    };
    const Tensors tensors(p.shape);
    Scalar* memory = aligned<Scalar>(p.workspace);
    const std::int64_t columns = gradient_columns(p.parameters, conv_tensors(p.shape), p.steps, p.how.rates);
    OrderedMean<Scalar> mean(wanted, p.nonfinite, p.tasks, columns, 1, plan.mean_rows);
    if (plan.side_by_side > 0) {
        const ConvCpuLayout layout = layout_for(/*alone=*/true);
        std::atomic<std::int64_t> next{0};
        // An item is a team, whose memory nobody else uses; it takes tasks until none is left.
        parallel_for(plan.teams, threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t item = begin; item < end; ++item) {
                std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
                if (task >= plan.side_by_side) continue;
                ConvTeam<Scalar> team(p, layout, kept, stages, tensors, mean, memory + item * plan.team_scalars, 1);
                for (; task < plan.side_by_side; task = next.fetch_add(1, std::memory_order_relaxed)) team.run(task);
            }
        });
    }
    if (plan.side_by_side < p.tasks) {
        const ConvCpuLayout layout = layout_for(/*alone=*/false);
        ConvTeam<Scalar> team(p, layout, kept, stages, tensors, mean, memory, threads);
        for (std::int64_t task = plan.side_by_side; task < p.tasks; ++task) team.run(task);
    }
    if (mean.wanted()) mean.finish();
}

template void conv_meta_step<float>(const ConvMetaStepParams<float>&, const MeanGradient<float>&, int);
template void conv_meta_step<double>(const ConvMetaStepParams<double>&, const MeanGradient<double>&, int);

}  // namespace signmaml::cpu
