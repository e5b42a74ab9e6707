// A pass of a program of blocks on the CPU: the loss of every task's examples and its gradient. Tasks run side by side,
// one thread each. The stages are those of layers_table.h.

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
    Losses(const LayersPassParams<Scalar>& p, std::int64_t task, std::int64_t outputs)
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

// One thread, which takes one task after the other.
template <typename Scalar>
class LayersThread {
  public:
    LayersThread(const LayersNetwork& network, const LayersPassParams<Scalar>& p, const LayersStages<Scalar>& stages,
                 const LayersCpuLayout& layout, Scalar* memory)
        : p_(p), stages_(stages), layout_(layout), values_(network.tensors), grads_(network.tensors) {
        t_.network = &network;
        t_.layout = &layout;
        t_.values = values_.data();
        t_.grads = grads_.data();
        t_.memory = memory;
        t_.lowest = p.differentiates ? lowest(network) : network.blocks;
        stages_.clear_borders(t_);
    }

    void run(std::int64_t task) {
        const LayersNetwork& network = *t_.network;
        const LayersSize& last = network.block[network.blocks - 1].out;
        const std::int64_t outputs = layers_features(last), lanes = layout_.out.lanes;
        const std::int64_t features = layers_features(network.block[0].in);
        for (std::int32_t i = 0; i < network.tensors; ++i) {
            const LayersTensor<Scalar>& tensor = p_.tensors[i];
            values_[i] = tensor.values + task * tensor.values_apart;
            grads_[i] =
                p_.differentiates && tensor.grads != nullptr ? tensor.grads + task * tensor.grads_apart : nullptr;
        }
        const Losses<Scalar> losses(p_, task, outputs);
        Scalar sum = 0;
        stages_.start(t_);
        for (std::int64_t first = 0; first < p_.count; first += layout_.count) {
            t_.count = std::min(layout_.count, p_.count - first);
            t_.x = p_.x + (task * p_.count + first) * features;
            stages_.forward(t_);
            for (std::int64_t e = 0; e < t_.count; ++e) {
                const Scalar* out = t_.memory + layout_.out.place + e * lanes;
                Scalar* grad = t_.memory + layout_.out_grad[0] + e * lanes;
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
    int lowest(const LayersNetwork& network) const {
        const auto wanted = [this](std::int32_t tensor) { return tensor >= 0 && p_.tensors[tensor].grads != nullptr; };
        for (int i = 0; i < network.blocks; ++i) {
            const LayersBlock& block = network.block[i];
            if (wanted(block.weight) || wanted(block.bias) || wanted(block.scale) || wanted(block.shift)) return i;
        }
        return network.blocks;
    }

    const LayersPassParams<Scalar>& p_;
    const LayersStages<Scalar>& stages_;
    const LayersCpuLayout& layout_;
    std::vector<const Scalar*> values_;
    std::vector<Scalar*> grads_;
    LayersTask<Scalar> t_{};
};

}  // namespace

template <typename Scalar>
void layers_pass(const LayersNetwork& network, const LayersPassParams<Scalar>& p, int threads) {
    if (p.tasks == 0) return;
    const LayersStages<Scalar>& stages = layers_stages<Scalar>(kernels());
    const LayersCpuPlan plan = plan_layers_cpu(network, p.tasks, p.count, sizeof(Scalar), stages.unit, threads);
    const LayersCpuLayout layout = layers_layout_of(network, plan.chunk, p.count, sizeof(Scalar), stages.unit);
    Scalar* memory = aligned<Scalar>(p.workspace);
    std::atomic<std::int64_t> next{0};
    // An item is a thread's memory, which nobody else uses; it takes tasks until none is left.
    parallel_for(std::min<std::int64_t>(p.tasks, threads), threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
            if (task >= p.tasks) continue;
            LayersThread<Scalar> thread(network, p, stages, layout, memory + item * plan.thread_scalars);
            for (; task < p.tasks; task = next.fetch_add(1, std::memory_order_relaxed)) thread.run(task);
        }
    });
}

template void layers_pass<float>(const LayersNetwork&, const LayersPassParams<float>&, int);
template void layers_pass<double>(const LayersNetwork&, const LayersPassParams<double>&, int);

}  // namespace signmaml::cpu
