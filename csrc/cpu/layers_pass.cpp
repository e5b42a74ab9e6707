// Passes of a program of blocks on the CPU: the loss of every task's examples and its gradient, or how the gradient
// changes along a direction. Tasks run side by side, one thread each. The stages are those of layers_table.h.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/layers_table.h"
#include "cpu/ops.h"
#include "cpu/scratch_slots.h"
#include "cpu/thread_pool.h"

namespace signmaml::cpu {
namespace {

// Losses of examples, and the gradients of their mean.
template <typename Scalar>
class Losses {
  public:
    // Of the examples of a task; Params: of a pass.
    template <typename Params>
    Losses(const Params& p, std::int64_t task, std::int64_t outputs)
        : labels_(p.labels == nullptr ? nullptr : p.labels + task * p.count),
          target_(p.target == nullptr ? nullptr : p.target + task * p.count * outputs),
          count_(p.count),
          outputs_(outputs),
          share_(Scalar(1) / static_cast<Scalar>(p.count)) {
        for (std::int64_t i = 0; labels_ != nullptr && i < count_; ++i) {
            // reference.cross_entropy has the rule.
            if (!has_label(i)) share_ = std::numeric_limits<Scalar>::quiet_NaN();
        }
    }

    // Of an example; grads [outputs] <- the gradient of the mean over all.
    Scalar take(std::int64_t example, const Scalar* outputs, Scalar* grads) const {
        return labels_ != nullptr ? cross_entropy(example, outputs, grads) : squares(example, outputs, grads);
    }

    // tangents [outputs] <- those of `take`'s gradients, from the outputs' own.
    void take_tangents(const Scalar* outputs, Scalar* tangents) const {
        if (labels_ == nullptr) {
            for (std::int64_t o = 0; o < outputs_; ++o) {
                tangents[o] = Scalar(2) * tangents[o] / static_cast<Scalar>(count_ * outputs_);
            }
            return;
        }
        const Scalar largest = *std::max_element(outputs, outputs + outputs_);
        Scalar sum = 0, mean = 0;
        for (std::int64_t o = 0; o < outputs_; ++o) {
            const Scalar weight = std::exp(outputs[o] - largest);
            sum += weight;
            mean += weight * tangents[o];
        }
        mean /= sum;
        for (std::int64_t o = 0; o < outputs_; ++o) {
            tangents[o] = share_ * (std::exp(outputs[o] - largest) / sum) * (tangents[o] - mean);
        }
    }

    Scalar mean(Scalar sum) const { return sum / static_cast<Scalar>(labels_ != nullptr ? count_ : count_ * outputs_); }

  private:
    bool has_label(std::int64_t i) const { return labels_[i] >= 0 && labels_[i] < outputs_; }

    Scalar cross_entropy(std::int64_t example, const Scalar* outputs, Scalar* grads) const {
        const Scalar largest = *std::max_element(outputs, outputs + outputs_);
        Scalar sum = 0;
        for (std::int64_t o = 0; o < outputs_; ++o) sum += grads[o] = std::exp(outputs[o] - largest);
        for (std::int64_t o = 0; o < outputs_; ++o) grads[o] = share_ * (grads[o] / sum);
        if (!has_label(example)) return std::numeric_limits<Scalar>::quiet_NaN();
        const std::int64_t label = labels_[example];
        grads[label] = share_ * (std::exp(outputs[label] - largest) / sum - Scalar(1));
        return std::log(sum) - (outputs[label] - largest);
    }

    Scalar squares(std::int64_t example, const Scalar* outputs, Scalar* grads) const {
        const Scalar* target = target_ + example * outputs_;
        Scalar sum = 0;
        for (std::int64_t o = 0; o < outputs_; ++o) {
            const Scalar difference = outputs[o] - target[o];
            sum += difference * difference;
            grads[o] = Scalar(2) * difference / static_cast<Scalar>(count_ * outputs_);
        }
        return sum;
    }

    const std::int64_t* const labels_;
    const Scalar* const target_;
    const std::int64_t count_, outputs_;
    Scalar share_;
};

template <typename Scalar>
bool has_gradient(const LayersTensor<Scalar>& tensor) {
    return tensor.grads != nullptr;
}

template <typename Scalar>
bool has_direction(const LayersTensor<Scalar>& tensor) {
    return tensor.direction != nullptr;
}

// The first block with a tensor of some kind; network.blocks if there is none.
template <typename Scalar, typename Kind>
int first_block(const LayersNetwork& network, const LayersTensor<Scalar>* tensors, const Kind& kind) {
    const auto found = [&](std::int32_t tensor) { return tensor >= 0 && kind(tensors[tensor]); };
    for (int i = 0; i < network.blocks; ++i) {
        const LayersBlock& block = network.block[i];
        if (found(block.weight) || found(block.bias) || found(block.scale) || found(block.shift)) return i;
    }
    return network.blocks;
}

// Where a tensor of some task is; null if it is nowhere.
template <typename Scalar>
Scalar* of_task(Scalar* first, std::int64_t apart, std::int64_t task) {
    return first == nullptr ? nullptr : first + task * apart;
}

// The factors of dropouts from an example on, counted over all tasks.
template <typename Scalar>
void take_noise(std::vector<const Scalar*>& to, const LayersNetwork& network, const Scalar* const* noise,
                std::int64_t example) {
    for (int i = 0; i < network.blocks; ++i) {
        const std::int64_t each = layers_noise(network.block[i]);
        to[i] = each > 0 ? noise[i] + example * each : nullptr;
    }
}

// One thread, which takes one task after the other.
template <typename Scalar>
class GradientThread {
  public:
    using Number = Scalar;
    using Params = LayersPassParams<Scalar>;
    static constexpr LayersPass kPass = LayersPass::kGradient;

    GradientThread(const LayersNetwork& network, const Params& p, const LayersStages<Scalar>& stages,
                   const LayersCpuLayout& layout, Scalar* memory)
        : p_(p),
          stages_(stages),
          layout_(layout),
          values_(network.tensors),
          grads_(network.tensors),
          noise_(network.blocks) {
        const int lowest = p.differentiates ? first_block(network, p.tensors, has_gradient<Scalar>) : network.blocks;
        t_ = {&network, &layout, values_.data(), grads_.data(), memory, lowest, nullptr, noise_.data(), 0, false};
        stages_.clear_borders(t_);
    }

    void run(std::int64_t task) {
        const LayersNetwork& network = *t_.network;
        const std::int64_t outputs = layers_features(network.block[network.blocks - 1].out);
        const LayersBlockPlan& last = layout_.block[network.blocks - 1];
        const std::int64_t lanes = last.out.lanes, features = layers_features(network.block[0].in);
        for (std::int32_t i = 0; i < network.tensors; ++i) {
            const LayersTensor<Scalar>& tensor = p_.tensors[i];
            values_[i] = of_task(tensor.values, tensor.values_apart, task);
            grads_[i] = p_.differentiates ? of_task(tensor.grads, tensor.grads_apart, task) : nullptr;
        }
        const Losses<Scalar> losses(p_, task, outputs);
        Scalar sum = 0;
        stages_.start(t_);
        for (std::int64_t first = 0; first < p_.count; first += layout_.count) {
            t_.count = std::min(layout_.count, p_.count - first);
            t_.adds = first > 0;
            t_.x = p_.x + (task * p_.count + first) * features;
            take_noise(noise_, network, p_.noise, task * p_.count + first);
            stages_.forward(t_);
            for (std::int64_t e = 0; e < t_.count; ++e) {
                const Scalar* out = t_.memory + last.out.place + e * lanes;
                Scalar* grad = t_.memory + last.out_grad + e * lanes;
                sum += losses.take(first + e, out, grad);
                std::fill(grad + outputs, grad + lanes, Scalar(0));
                if (p_.predictions == nullptr) continue;
                std::copy_n(out, outputs, p_.predictions + (task * p_.count + first + e) * outputs);
            }
            if (t_.lowest < network.blocks) stages_.backward(t_);
        }
        p_.loss[task] = losses.mean(sum);
        stages_.finish(t_);
    }

  private:
    const Params& p_;
    const LayersStages<Scalar>& stages_;
    const LayersCpuLayout& layout_;
    std::vector<const Scalar*> values_;
    std::vector<Scalar*> grads_;
    std::vector<const Scalar*> noise_;
    LayersTask<Scalar> t_{};
};

template <typename Scalar>
class HessianThread {
  public:
    using Number = Scalar;
    using Params = LayersHessianParams<Scalar>;
    static constexpr LayersPass kPass = LayersPass::kHessian;

    HessianThread(const LayersNetwork& network, const Params& p, const LayersStages<Scalar>& stages,
                  const LayersCpuLayout& layout, Scalar* memory)
        : p_(p),
          stages_(stages),
          layout_(layout),
          values_(network.tensors),
          directions_(network.tensors),
          products_(network.tensors),
          noise_(network.blocks),
          unwanted_(network.tensors) {
        const int lowest = first_block(network, p.tensors, has_gradient<Scalar>);
        d_.value = {&network,      &layout, values_.data(), unwanted_.data(), memory, lowest, nullptr,
                    noise_.data(), 0,       false};
        d_.along = {&network,
                    &layout,
                    directions_.data(),
                    products_.data(),
                    memory + layout.size,
                    lowest,
                    nullptr,
                    noise_.data(),
                    0,
                    false};
        d_.first_moved = first_block(network, p.tensors, has_direction<Scalar>);
        stages_.clear_borders(d_.value);
        stages_.clear_borders(d_.along);
    }

    void run(std::int64_t task) {
        const LayersNetwork& network = *d_.value.network;
        const std::int64_t outputs = layers_features(network.block[network.blocks - 1].out);
        const LayersBlockPlan& last = layout_.block[network.blocks - 1];
        const std::int64_t lanes = last.out.lanes, features = layers_features(network.block[0].in);
        for (std::int32_t i = 0; i < network.tensors; ++i) {
            const LayersTensor<Scalar>& tensor = p_.tensors[i];
            values_[i] = of_task(tensor.values, tensor.values_apart, task);
            directions_[i] = of_task(tensor.direction, tensor.direction_apart, task);
            products_[i] = of_task(tensor.grads, tensor.grads_apart, task);
        }
        const Losses<Scalar> losses(p_, task, outputs);
        stages_.start_tangents(d_);
        for (std::int64_t first = 0; first < p_.count; first += layout_.count) {
            d_.value.count = d_.along.count = std::min(layout_.count, p_.count - first);
            d_.along.adds = first > 0;
            d_.value.x = p_.x + (task * p_.count + first) * features;
            take_noise(noise_, network, p_.noise, task * p_.count + first);
            stages_.forward(d_.value);
            stages_.forward_tangents(d_);
            for (std::int64_t e = 0; e < d_.value.count; ++e) {
                const std::int64_t at = last.out.place + e * lanes, to = last.out_grad + e * lanes;
                Scalar *grad = d_.value.memory + to, *tangent = d_.along.memory + to;
                losses.take(first + e, d_.value.memory + at, grad);
                std::copy_n(d_.along.memory + at, outputs, tangent);
                losses.take_tangents(d_.value.memory + at, tangent);
                std::fill(grad + outputs, grad + lanes, Scalar(0));
                std::fill(tangent + outputs, tangent + lanes, Scalar(0));
            }
            stages_.backward_tangents(d_);
        }
        stages_.finish(d_.along);
    }

  private:
    const Params& p_;
    const LayersStages<Scalar>& stages_;
    const LayersCpuLayout& layout_;
    std::vector<const Scalar*> values_, directions_;
    std::vector<Scalar*> products_;
    std::vector<const Scalar*> noise_;
    const std::vector<Scalar*> unwanted_;
    LayersTangent<Scalar> d_{};
};

template <typename Thread>
void run_tasks(const LayersNetwork& network, const typename Thread::Params& p, int threads) {
    using Scalar = typename Thread::Number;
    if (p.tasks == 0) return;
    const LayersStages<Scalar>& stages = layers_stages<Scalar>(kernels());
    const LayersCpuPlan plan =
        plan_layers_cpu(network, Thread::kPass, p.tasks, p.count, sizeof(Scalar), stages.unit, threads);
    const LayersCpuLayout layout = layers_layout_of(network, plan.chunk, p.count, sizeof(Scalar), stages.unit);
    Scalar* memory = aligned<Scalar>(p.workspace);
    std::atomic<std::int64_t> next{0};
    // An item is a thread's memory, which nobody else uses; it takes tasks until none is left.
    parallel_for(std::min<std::int64_t>(p.tasks, threads), threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
            if (task >= p.tasks) continue;
            Thread thread(network, p, stages, layout, memory + item * plan.thread_scalars);
            for (; task < p.tasks; task = next.fetch_add(1, std::memory_order_relaxed)) thread.run(task);
        }
    });
}

}  // namespace

template <typename Scalar>
void layers_pass(const LayersNetwork& network, const LayersPassParams<Scalar>& p, int threads) {
    run_tasks<GradientThread<Scalar>>(network, p, threads);
}

template <typename Scalar>
void layers_hessian(const LayersNetwork& network, const LayersHessianParams<Scalar>& p, int threads) {
    run_tasks<HessianThread<Scalar>>(network, p, threads);
}

template void layers_pass<float>(const LayersNetwork&, const LayersPassParams<float>&, int);
template void layers_pass<double>(const LayersNetwork&, const LayersPassParams<double>&, int);
template void layers_hessian<float>(const LayersNetwork&, const LayersHessianParams<float>&, int);
template void layers_hessian<double>(const LayersNetwork&, const LayersHessianParams<double>&, int);

}  // namespace signmaml::cpu
