// A meta-step of a convolutional network on the CPU: as many tasks side by side as there are threads, the rest one
// after the other with all threads on each. The stages are those of conv_table.h; the readable twin is
// meta_gradients in signmaml_ext/reference.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/conv_head.h"
#include "cpu/conv_table.h"
#include "cpu/conv_tensors.h"
#include "cpu/dispatch.h"
#include "cpu/flags.h"
#include "cpu/ops.h"
#include "cpu/ordered_mean.h"
#include "cpu/scratch_slots.h"
#include "cpu/thread_pool.h"
#include "plan/conv_meta_step_cpu.h"

namespace signmaml::cpu {
namespace {

// Some threads that work on one task.
template <typename Scalar>
class ConvTeam {
  public:
    ConvTeam(const ConvMetaStepParams<Scalar>& p, const ConvCpuLayout& layout, const ConvStages<Scalar>& stages,
             const Tensors& tensors, OrderedMean<Scalar>& mean, Scalar* memory, int threads)
        : p_(p),
          layout_(layout),
          stages_(stages),
          tensors_(tensors),
          mean_(mean),
          threads_(threads),
          scratch_(threads),
          task_{&p.shape, &layout, memory, 0} {
        clear_borders();
    }

    void run(std::int64_t task) {
        nonfinite_ = false;
        take_parameters();
        if (p_.steps > 0) take_images(p_.support, task);
        bool features_stale = true;
        for (std::int64_t step = 0; step < p_.steps; ++step) {
            const Wanted wanted{p_.adapt};
            const Scalar* lr = p_.lr + step * conv_tensors(p_.shape);
            const Scalar loss = forward(p_.support, task, features_stale);
            nonfinite_ |= !std::isfinite(loss);
            p_.support_loss[step * p_.tasks + task] = loss;
            head(p_.support, task).to_gradient();
            backward(wanted);
            move(wanted, lr);
            features_stale = false;
            for (int tensor = 0; tensor < classifier_tensor(); ++tensor) features_stale |= wanted(tensor);
        }
        if (p_.adapted != nullptr) give(p_.adapted + task * p_.parameters, /*grads=*/false);
        if (p_.query.count > 0) {
            take_images(p_.query, task);
            const Scalar loss = forward(p_.query, task, true);
            nonfinite_ |= !std::isfinite(loss);
            p_.query_loss[task] = loss;
            if (p_.query_accuracy != nullptr) p_.query_accuracy[task] = head(p_.query, task).accuracy();
            give_logits(task);
            if (p_.grads != nullptr || mean_.wanted()) {
                head(p_.query, task).to_gradient();
                backward(Wanted{nullptr});
                give(mean_.wanted() ? mean_.rows(task) : p_.grads + task * p_.parameters, /*grads=*/true);
            }
        }
        if (nonfinite_) raise_flag(p_.nonfinite + task);
        if (mean_.wanted()) mean_.hand_in(task);
    }

  private:
    template <typename Body>
    void each(std::int64_t items, const Body& body) {
        parallel_for(items, threads_, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t item = begin; item < end; ++item) body(item);
        });
    }

    template <typename Body>
    void each_with_scratch(std::int64_t items, const Body& body) {
        ranges_with_scratch(items, [&](std::int64_t begin, std::int64_t end, Scalar* scratch) {
            for (std::int64_t item = begin; item < end; ++item) body(item, scratch);
        });
    }

    template <typename Body>
    void ranges_with_scratch(std::int64_t items, const Body& body) {
        parallel_for(items, threads_, [&](std::int64_t begin, std::int64_t end) {
            const std::int64_t slot = scratch_.take();
            body(begin, end, task_.memory + layout_.size + slot * layout_.scratch);
            scratch_.give_back(slot);
        });
    }

    // Calls visit(place in theta's tensor, place in the packed weights) for every weight of the classifier: torch
    // flattens [filters, h, w], the packed weights are [h, w, channels].
    template <typename Visit>
    void each_classifier_weight(const Visit& visit) const {
        const std::int64_t filters = p_.shape.filters, channels = layout_.channels;
        const std::int64_t positions = layout_.features / channels;
        for (std::int64_t way = 0; way < p_.shape.ways; ++way) {
            for (std::int64_t filter = 0; filter < filters; ++filter) {
                for (std::int64_t i = 0; i < positions; ++i) {
                    visit((way * filters + filter) * positions + i, way * layout_.features + i * channels + filter);
                }
            }
        }
    }

    int classifier_tensor() const { return p_.shape.blocks * conv_tensors_of_block(p_.shape); }

    Scalar* clear(std::int64_t place, std::int64_t count) {
        return static_cast<Scalar*>(std::memset(task_.at(place), 0, static_cast<std::size_t>(count) * sizeof(Scalar)));
    }

    // Zeros around the images that convolutions read, in either direction: nothing else writes there.
    void clear_borders() {
        const ConvShape& shape = p_.shape;
        const std::int64_t examples = std::max(p_.support.count, p_.query.count);
        clear_border(layout_.images, examples, shape.height, shape.width, shape.channels);
        for (int i = 0; i < shape.blocks; ++i) {
            const ConvBlockPlan& b = layout_.blocks[i];
            if (i > 0) clear_border(b.raw, examples, b.out_h, b.out_w, layout_.channels);
            if (b.pad > 0) clear_border(b.activation, b.kept, b.act_h, b.act_w, layout_.channels);
            clear(b.activation + b.activation_size, b.activation_beyond);
        }
    }

    // Of images [n, height + 2, width + 2, channels].
    void clear_border(std::int64_t place, std::int64_t n, std::int64_t height, std::int64_t width,
                      std::int64_t channels) {
        const std::int64_t row = (width + 2) * channels, image = (height + 2) * row;
        for (std::int64_t example = 0; example < n; ++example) {
            const std::int64_t first = place + example * image;
            // The end of a row and the start of the next lie together.
            clear(first, row + channels);
            for (std::int64_t y = 2; y <= height; ++y) clear(first + y * row - channels, 2 * channels);
            clear(first + (height + 1) * row - channels, row + channels);
        }
    }

    // theta into packed form. Writes the padding too: an earlier task may have left NaN there.
    void take_parameters() {
        const ConvShape& shape = p_.shape;
        for (int i = 0; i < shape.blocks; ++i) {
            const BlockTensors own = tensors_of(shape, i);
            stages_.pack_weights(task_, i, p_.theta + tensors_.all[own.weight].first);
            clear(layout_.blocks[i].vector, kConvVectors * layout_.channels);
            for (const auto& [tensor, which] : {std::pair{own.gamma, kGamma}, std::pair{own.beta, kBeta}}) {
                std::copy_n(p_.theta + tensors_.all[tensor].first, shape.filters, task_.vector(i, which));
            }
        }
        const Tensor weight = tensors_.all[classifier_tensor()], bias = tensors_.all[classifier_tensor() + 1];
        const Scalar* from = p_.theta + weight.first;
        Scalar* to = clear(layout_.classifier, shape.ways * layout_.features);
        each_classifier_weight([from, to](std::int64_t a, std::int64_t b) { to[b] = from[a]; });
        std::copy_n(p_.theta + bias.first, bias.size, task_.at(layout_.classifier_bias));
    }

    // Parameters, or their gradients, to a row in theta's order.
    void give(Scalar* row, bool grads) {
        const ConvShape& shape = p_.shape;
        for (int i = 0; i < shape.blocks; ++i) {
            const BlockTensors own = tensors_of(shape, i);
            stages_.unpack_weights(task_, i, task_.at(grads ? layout_.blocks[i].weight_grad : layout_.blocks[i].weight),
                                   row + tensors_.all[own.weight].first);
            if (own.bias >= 0) {
                const Tensor bias = tensors_.all[own.bias];
                if (grads) {
                    std::fill_n(row + bias.first, bias.size, Scalar(0));
                } else {
                    std::copy_n(p_.theta + bias.first, bias.size, row + bias.first);
                }
            }
            std::copy_n(task_.vector(i, grads ? kGammaGrad : kGamma), shape.filters,
                        row + tensors_.all[own.gamma].first);
            std::copy_n(task_.vector(i, grads ? kBetaGrad : kBeta), shape.filters, row + tensors_.all[own.beta].first);
        }
        const Tensor weight = tensors_.all[classifier_tensor()], bias = tensors_.all[classifier_tensor() + 1];
        const Scalar* from = task_.at(grads ? layout_.classifier_grad : layout_.classifier);
        Scalar* to = row + weight.first;
        each_classifier_weight([from, to](std::int64_t a, std::int64_t b) { to[a] = from[b]; });
        std::copy_n(task_.at(grads ? layout_.classifier_bias_grad : layout_.classifier_bias), bias.size,
                    row + bias.first);
    }

    // The images of a set, and the mean and covariance of layer 1's patches in it.
    void take_images(const ConvSet<Scalar>& set, std::int64_t task) {
        const ConvShape& shape = p_.shape;
        const ConvBlockPlan& b = layout_.blocks[0];
        task_.examples = set.count;
        const std::int64_t pixels = std::int64_t{shape.channels} * shape.height * shape.width;
        const Scalar* x = set.x + task * set.count * pixels;
        each(set.count, [&](std::int64_t i) { stages_.pack_image(task_, x + i * pixels, i); });

        const std::int64_t items = set.count * b.items, patch = 9 * b.inputs;
        const double positions = static_cast<double>(set.count * b.out_h * b.out_w);
        each(items, [&](std::int64_t item) { stages_.patch_sum(task_, item); });
        double* mean = task_.patch_mean();
        std::fill_n(mean, kConvLargestPatch, 0.0);
        for (std::int64_t item = 0; item < items; ++item) {
            for (std::int64_t j = 0; j < patch; ++j) mean[j] += task_.partial(item).patch_sums()[j];
        }
        for (std::int64_t j = 0; j < patch; ++j) mean[j] /= positions;

        each_with_scratch(set.count, [&](std::int64_t example, Scalar* scratch) {
            stages_.patch_covariance(task_, example, scratch);
        });
        double* covariance = task_.covariance();
        const auto from_middle = [&](std::int64_t i) {
            return mean[i] - static_cast<double>(static_cast<Scalar>(mean[4 * b.inputs + i % b.inputs]));
        };
        for (std::int64_t i = 0; i < patch; ++i) {
            for (std::int64_t j = i; j < patch; ++j) {
                double sum = 0;
                for (std::int64_t example = 0; example < set.count; ++example) {
                    sum += task_.partial(example).patch_products()[i * patch + j];
                }
                covariance[i * kConvLargestPatch + j] = covariance[j * kConvLargestPatch + i] =
                    sum / positions - from_middle(i) * from_middle(j);
            }
        }
    }

    // The mean loss of the set. The classifier's input is still there if no convolution has moved.
    Scalar forward(const ConvSet<Scalar>& set, std::int64_t task, bool features_stale) {
        if (features_stale) {
            stages_.statistics(task_, 0);
            stages_.transform_weights(task_, 0, /*back=*/false);
            const bool alone = threads_ == 1;
            const int last = p_.shape.blocks - 1;
            for (int i = alone && last > 0 ? 1 : 0; i <= last; ++i) {
                if (i > 0) stages_.transform_weights(task_, i, /*back=*/false);
                if (alone) {
                    forward_with_input(i, set.count);
                } else {
                    ranges_with_scratch(set.count * layout_.blocks[i].items,
                                        [&](std::int64_t begin, std::int64_t end, Scalar* scratch) {
                                            stages_.forward(task_, i, begin, end, scratch);
                                        });
                }
                if (i == 0) continue;
                stages_.statistics(task_, i);
                if (alone && i < last) continue;
                each(set.count, [&](std::int64_t example) { stages_.normalise(task_, i, example); });
            }
            if (p_.shape.readout == Readout::kMean) average();
        }
        const Scalar* weight = task_.at(layout_.classifier);
        const Scalar* bias = task_.at(layout_.classifier_bias);
        const std::int64_t ways = p_.shape.ways;
        each(set.count, [&](std::int64_t i) {
            Scalar* logits = task_.at(layout_.logits) + i * ways;
            for (std::int64_t way = 0; way < ways; ++way) {
                logits[way] = bias[way] + stages_.dot(features() + i * layout_.features,
                                                      weight + way * layout_.features, layout_.features);
            }
        });
        return head(set, task).loss();
    }

    // Recomputes the previous block's output and runs this block on it, a few images at a time: they stay in L2. One
    // thread works on the task, so the images come in order and `held` is right.
    void forward_with_input(int block, std::int64_t examples) {
        const ConvBlockPlan& b = layout_.blocks[block];
        ranges_with_scratch(examples, [&](std::int64_t begin, std::int64_t end, Scalar* scratch) {
            for (std::int64_t first = begin; first < end; first += b.forward_items) {
                const std::int64_t last = std::min(first + b.forward_items, end);
                if (block > 0) make_output(block - 1, first, last, scratch);
                stages_.forward(task_, block, first * b.items, last * b.items, scratch);
            }
        });
    }

    bool keeps_all(int block) const { return layout_.blocks[block].kept >= task_.examples; }

    // A block's output, which takes the place of other examples' where that of all is not kept.
    void make_output(int block, std::int64_t first, std::int64_t last, Scalar* scratch) {
        task_.held[block] = keeps_all(block) ? 0 : first;
        if (block == 0) {
            const std::int64_t items = layout_.blocks[0].items;
            stages_.forward(task_, 0, first * items, last * items, scratch);
            return;
        }
        for (std::int64_t i = first; i < last; ++i) stages_.normalise(task_, block, i);
    }

    const ConvBlockPlan& last_block() const { return layout_.blocks[p_.shape.blocks - 1]; }

    const Scalar* features() const {
        return task_.at(p_.shape.readout == Readout::kMean ? layout_.readout : last_block().activation);
    }

    void average() {
        const ConvBlockPlan& b = last_block();
        const std::int64_t positions = std::int64_t{b.act_h} * b.act_w, channels = layout_.channels;
        for (std::int64_t example = 0; example < task_.examples; ++example) {
            Scalar* mean = clear(layout_.readout + example * channels, channels);
            const Scalar* from = task_.at(b.activation) + example * positions * channels;
            for (std::int64_t i = 0; i < positions; ++i) {
                stages_.add_scaled(mean, Scalar(1), from + i * channels, channels);
            }
            for (std::int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<Scalar>(positions);
        }
    }

    ConvHead<Scalar> head(const ConvSet<Scalar>& set, std::int64_t task) const {
        return {task_.at(layout_.logits), task_.at(layout_.logits_grad), set.labels + task * set.count, set.count,
                p_.shape.ways};
    }

    void give_logits(std::int64_t task) const {
        if (p_.logits == nullptr) return;
        const std::int64_t count = std::int64_t{p_.query.count} * p_.shape.ways;
        std::copy_n(task_.at(layout_.logits), count, p_.logits + task * count);
    }

    // Gradients of what is wanted, from logits_grad down to the lowest block that needs any.
    void backward(Wanted wanted) {
        const ConvShape& shape = p_.shape;
        int lowest = shape.blocks;
        for (int i = shape.blocks - 1; i >= 0; --i) {
            const BlockTensors own = tensors_of(shape, i);
            if (wanted(own.weight) || wanted(own.gamma) || wanted(own.beta)) lowest = i;
        }
        classifier_grads(lowest < shape.blocks);
        for (int i = shape.blocks - 1; i >= lowest; --i) {
            const BlockTensors own = tensors_of(shape, i);
            const ConvBlockPlan& b = layout_.blocks[i];
            if (i + 1 == shape.blocks) {
                each_with_scratch(task_.examples * b.half_items, [&](std::int64_t item, Scalar* scratch) {
                    stages_.grad_sums(task_, i, item, scratch);
                });
            }
            if (i == 0) {
                if (!layout_.first_grad_in_scratch) {
                    each_with_scratch(task_.examples * b.items, [&](std::int64_t item, Scalar* scratch) {
                        stages_.first_weight_grad(task_, item, scratch);
                    });
                }
                stages_.finish_first(task_);
                continue;
            }
            stages_.norm_grads(task_, i);
            if (i == lowest && !wanted(own.weight)) continue;
            if (i > lowest) {
                stages_.pack_back(task_, i);
                stages_.transform_weights(task_, i, /*back=*/true);
            }
            // One thread goes from stage to stage with a few examples, while the second-level cache has them. The last
            // come first: activation_grad of the block before takes the place of this one's, and is larger.
            const std::int64_t at_once = threads_ > 1 ? task_.examples : b.weight_images;
            for (std::int64_t first = (task_.examples - 1) / at_once * at_once; first >= 0; first -= at_once) {
                convolution_grads(i, first, std::min(first + at_once, task_.examples), wanted(own.weight), i > lowest);
            }
            if (wanted(own.weight)) stages_.weight_grad(task_, i);
        }
    }

    // Of a block after the first, over some examples: of its raw values, its weights and the block before.
    void convolution_grads(int block, std::int64_t first, std::int64_t last, bool of_weights, bool of_data) {
        const ConvBlockPlan& b = layout_.blocks[block];
        const bool reads_input = of_weights || (block == 1 && of_data);  // block 0's ReLU is known by its output
        if (reads_input && !keeps_all(block - 1) && task_.held[block - 1] != first) {
            ranges_with_scratch(last - first, [&](std::int64_t begin, std::int64_t end, Scalar* scratch) {
                make_output(block - 1, first + begin, first + end, scratch);
            });
        }
        each((last - first) * b.items,
             [&](std::int64_t item) { stages_.raw_grad(task_, block, first * b.items + item); });
        if (of_weights) {
            // A share of F(2x2, 3x3)'s products costs a transformation of its own.
            const std::int64_t shares = b.winograd ? std::min<std::int64_t>(threads_, kConvProducts) : kConvProducts;
            ranges_with_scratch(shares, [&](std::int64_t begin, std::int64_t end, Scalar* scratch) {
                stages_.weight_products(task_, block, first, last, begin * kConvProducts / shares,
                                        end * kConvProducts / shares, scratch);
            });
        }
        if (!of_data) return;
        const std::int64_t items = layout_.blocks[block - 1].half_items;
        const std::int64_t at_once = layout_.blocks[block].data_grad_items;
        ranges_with_scratch((last - first) * items, [&](std::int64_t begin, std::int64_t end, Scalar* scratch) {
            for (std::int64_t item = first * items + begin; item < first * items + end; item += at_once) {
                const std::int64_t behind = std::min(item + at_once, first * items + end);
                stages_.data_grad(task_, block, item, behind, scratch);
                if (block > 1 || !layout_.first_grad_in_scratch) continue;
                // While scratch has the items' gradients.
                for (std::int64_t i = item; i < behind; ++i) {
                    stages_.first_weight_grad(task_, i, scratch + (i - item) * layout_.first_grad);
                }
            }
        });
    }

    // Of the classifier and, for the blocks, of the last block's output.
    void classifier_grads(bool blocks_too) {
        const std::int64_t ways = p_.shape.ways, width = layout_.features;
        const Scalar* grads = task_.at(layout_.logits_grad);
        Scalar* bias_grad = clear(layout_.classifier_bias_grad, ways);
        clear(layout_.classifier_grad, ways * width);
        for (std::int64_t i = 0; i < task_.examples; ++i) {
            for (std::int64_t way = 0; way < ways; ++way) bias_grad[way] += grads[i * ways + way];
        }
        each(ways, [&](std::int64_t way) {
            Scalar* to = task_.at(layout_.classifier_grad) + way * width;
            for (std::int64_t i = 0; i < task_.examples; ++i) {
                stages_.add_scaled(to, grads[i * ways + way], features() + i * width, width);
            }
        });
        if (!blocks_too) return;
        const std::int64_t positions = std::int64_t{last_block().act_h} * last_block().act_w;
        const bool averages = p_.shape.readout == Readout::kMean;
        const Scalar share = averages ? Scalar(1) / static_cast<Scalar>(positions) : Scalar(1);
        const std::int64_t copies = averages ? positions : 1;
        each(task_.examples, [&](std::int64_t i) {
            Scalar* to = clear(layout_.activation_grad + i * copies * width, copies * width);
            for (std::int64_t copy = 0; copy < copies; ++copy) {
                for (std::int64_t way = 0; way < ways; ++way) {
                    stages_.add_scaled(to + copy * width, share * grads[i * ways + way],
                                       task_.at(layout_.classifier) + way * width, width);
                }
            }
        });
    }

    // One inner step of all tensors that adapt.
    void move(Wanted wanted, const Scalar* lr) {
        const ConvShape& shape = p_.shape;
        for (int i = 0; i < shape.blocks; ++i) {
            const BlockTensors own = tensors_of(shape, i);
            const ConvBlockPlan& b = layout_.blocks[i];
            if (wanted(own.weight)) {
                step(task_.at(b.weight), task_.at(b.weight_grad), lr[own.weight], 9 * b.inputs * layout_.channels);
            }
            if (wanted(own.gamma)) {
                step(task_.vector(i, kGamma), task_.vector(i, kGammaGrad), lr[own.gamma], shape.filters);
            }
            if (wanted(own.beta)) {
                step(task_.vector(i, kBeta), task_.vector(i, kBetaGrad), lr[own.beta], shape.filters);
            }
        }
        const int weight = classifier_tensor();
        if (wanted(weight)) {
            step(task_.at(layout_.classifier), task_.at(layout_.classifier_grad), lr[weight],
                 shape.ways * layout_.features);
        }
        if (wanted(weight + 1)) {
            step(task_.at(layout_.classifier_bias), task_.at(layout_.classifier_bias_grad), lr[weight + 1], shape.ways);
        }
    }

    void step(Scalar* params, const Scalar* grads, Scalar lr, std::int64_t n) {
        nonfinite_ |= p_.method == Method::kSignMaml
                          ? span_kernels<Scalar>(kernels()).sign_step(params, grads, &lr, false, nullptr, n)
                          : stages_.gradient_step(params, grads, lr, n);
    }

    const ConvMetaStepParams<Scalar>& p_;
    const ConvCpuLayout& layout_;
    const ConvStages<Scalar>& stages_;
    const Tensors& tensors_;
    OrderedMean<Scalar>& mean_;
    const int threads_;
    ScratchSlots scratch_;
    ConvTask<Scalar> task_;
    bool nonfinite_ = false;
};

template <typename Scalar>
Scalar* aligned(void* workspace) {
    const auto address = reinterpret_cast<std::uintptr_t>(workspace);
    return reinterpret_cast<Scalar*>((address + 63) / 64 * 64);
}

}  // namespace

template <typename Scalar>
void conv_meta_step(const ConvMetaStepParams<Scalar>& p, const MeanGradient<Scalar>& wanted, int threads) {
    if (p.tasks == 0) return;
    const ConvStages<Scalar>& stages = conv_stages<Scalar>(kernels());
    const std::int64_t examples = larger(p.support.count, p.query.count);
    const ConvCpuPlan plan =
        plan_conv_meta_step_cpu(p.shape, p.tasks, p.support.count, p.query.count, sizeof(Scalar), stages.unit, threads);
    const Tensors tensors(p.shape);
    Scalar* memory = aligned<Scalar>(p.workspace);
    OrderedMean<Scalar> mean(wanted, p.nonfinite, p.tasks, p.parameters, 1, plan.mean_rows);
    if (plan.side_by_side > 0) {
        const ConvCpuLayout layout = conv_cpu_layout(p.shape, examples, sizeof(Scalar), stages.unit, /*alone=*/true);
        std::atomic<std::int64_t> next{0};
        // An item is a team, whose memory nobody else uses; it takes tasks until none is left.
        parallel_for(plan.teams, threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t item = begin; item < end; ++item) {
                std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
                if (task >= plan.side_by_side) continue;
                ConvTeam<Scalar> team(p, layout, stages, tensors, mean, memory + item * plan.team_scalars, 1);
                for (; task < plan.side_by_side; task = next.fetch_add(1, std::memory_order_relaxed)) team.run(task);
            }
        });
    }
    if (plan.side_by_side < p.tasks) {
        const ConvCpuLayout layout = conv_cpu_layout(p.shape, examples, sizeof(Scalar), stages.unit, /*alone=*/false);
        ConvTeam<Scalar> team(p, layout, stages, tensors, mean, memory, threads);
        for (std::int64_t task = plan.side_by_side; task < p.tasks; ++task) team.run(task);
    }
    if (mean.wanted()) mean.finish();
}

template void conv_meta_step<float>(const ConvMetaStepParams<float>&, const MeanGradient<float>&, int);
template void conv_meta_step<double>(const ConvMetaStepParams<double>&, const MeanGradient<double>&, int);

}  // namespace signmaml::cpu
