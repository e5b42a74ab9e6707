// What a team of threads does with one task: parameters and images in and out, and the passes of a set, forward and
// backward. conv_table.h has the stages.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/conv_head.h"
#include "cpu/conv_table.h"
#include "cpu/conv_tensors.h"
#include "cpu/dispatch.h"
#include "cpu/scratch_slots.h"
#include "cpu/thread_pool.h"
#include "plan/conv_meta_step_cpu.h"

namespace signmaml::cpu {

// Three-valued; a zero and a NaN stay what they are.
template <typename Scalar>
Scalar sign_of(Scalar gradient) {
    return gradient > 0 ? Scalar(1) : gradient < 0 ? Scalar(-1) : gradient;
}

template <typename Scalar>
class ConvPasses {
  public:
    // `scratch`: where, in memory, that of the threads starts.
    ConvPasses(const ConvMetaStepParams<Scalar>& p, const ConvCpuLayout& layout, const ConvStages<Scalar>& stages,
               const Tensors& tensors, Scalar* memory, std::int64_t scratch, int threads)
        : p_(p),
          layout_(layout),
          stages_(stages),
          tensors_(tensors),
          spans_(conv_spans(p.shape, layout)),
          threads_(threads),
          scratch_place_(scratch),
          scratch_(threads),
          task_{&p.shape, &layout, memory, 0} {
        clear_borders(layout);
    }

    const ConvTask<Scalar>& task() const { return task_; }
    const ConvSpans& spans() const { return spans_; }
    int threads() const { return threads_; }

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
            body(begin, end, task_.memory + scratch_place_ + slot * layout_.scratch);
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

    // Whether a step may change what the classifier reads.
    bool moves_a_block(Wanted wanted) const {
        bool moves = false;
        for (int tensor = 0; tensor < classifier_tensor(); ++tensor) moves |= wanted(tensor);
        return moves;
    }

    int classifier_tensor() const { return p_.shape.blocks * conv_tensors_of_block(p_.shape); }

    Scalar* clear(std::int64_t place, std::int64_t count) {
        return static_cast<Scalar*>(std::memset(task_.at(place), 0, static_cast<std::size_t>(count) * sizeof(Scalar)));
    }

    // Zeros around the images that convolutions read, in either direction: nothing else writes there.
    void clear_borders(const ConvCpuLayout& layout) {
        const ConvShape& shape = p_.shape;
        const std::int64_t examples = std::max(p_.support.count, p_.query.count);
        clear_border(layout.images, examples, shape.height, shape.width, shape.channels);
        for (int i = 0; i < shape.blocks; ++i) {
            const ConvBlockPlan& b = layout.blocks[i];
            if (i > 0) clear_border(b.raw, examples, b.out_h, b.out_w, layout.channels);
            if (b.pad > 0) clear_border(b.activation, b.kept, b.act_h, b.act_w, layout.channels);
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
        for (int i = 0; i < p_.shape.blocks; ++i) clear(layout_.blocks[i].vector, kConvVectors * layout_.channels);
        clear(layout_.classifier, p_.shape.ways * layout_.features);
        pack(task_, p_.theta);
    }

    // A row in theta's order to the parameters of a task, or of the tangents.
    void pack(const ConvTask<Scalar>& t, const Scalar* row) {
        const ConvShape& shape = p_.shape;
        for (int i = 0; i < shape.blocks; ++i) {
            const BlockTensors own = tensors_of(shape, i);
            stages_.pack_weights(t, i, row + tensors_.all[own.weight].first);
            for (const auto& [tensor, which] : {std::pair{own.gamma, kGamma}, std::pair{own.beta, kBeta}}) {
                std::copy_n(row + tensors_.all[tensor].first, shape.filters, t.vector(i, which));
            }
        }
        const Tensor weight = tensors_.all[classifier_tensor()], bias = tensors_.all[classifier_tensor() + 1];
        const Scalar* from = row + weight.first;
        Scalar* to = t.at(t.layout->classifier);
        each_classifier_weight([from, to](std::int64_t a, std::int64_t b) { to[b] = from[a]; });
        std::copy_n(row + bias.first, bias.size, t.at(t.layout->classifier_bias));
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
            if (p_.shape.readout == Readout::kMean) average(task_);
        }
        const Scalar* weight = task_.at(layout_.classifier);
        const Scalar* bias = task_.at(layout_.classifier_bias);
        const std::int64_t ways = p_.shape.ways;
        each(set.count, [&](std::int64_t i) {
            Scalar* logits = task_.at(layout_.logits) + i * ways;
            for (std::int64_t way = 0; way < ways; ++way) {
                logits[way] = bias[way] + stages_.dot(features(task_) + i * layout_.features,
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

    // What the classifier reads.
    Scalar* features(const ConvTask<Scalar>& t) const {
        return t.at(p_.shape.readout == Readout::kMean ? t.layout->readout : t.block(p_.shape.blocks - 1).activation);
    }

    // readout <- the mean of the last block's output over its positions
    void average(const ConvTask<Scalar>& t) {
        const ConvBlockPlan& b = t.block(p_.shape.blocks - 1);
        const std::int64_t positions = std::int64_t{b.act_h} * b.act_w, channels = layout_.channels;
        for (std::int64_t example = 0; example < t.examples; ++example) {
            Scalar* mean = clear(t.layout->readout + example * channels, channels);
            const Scalar* from = t.at(b.activation) + example * positions * channels;
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
        blocks_backward(wanted, lowest);
    }

    // Gradients of the blocks from the last one down to `lowest`, from that of the last one's output.
    void blocks_backward(Wanted wanted, int lowest) {
        const ConvShape& shape = p_.shape;
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
                                        end * kConvProducts / shares, /*add=*/false, scratch);
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
        clear_classifier_grads(task_);
        add_bias_grad(task_);
        add_classifier_grads(task_, task_, task_);
        if (!blocks_too) return;
        clear_feature_grads(task_);
        add_feature_grads(task_, task_, task_);
    }

    void clear_classifier_grads(const ConvTask<Scalar>& to) {
        clear(to.layout->classifier_bias_grad, p_.shape.ways);
        clear(to.layout->classifier_grad, p_.shape.ways * layout_.features);
    }

    void add_bias_grad(const ConvTask<Scalar>& to) {
        const std::int64_t ways = p_.shape.ways;
        const Scalar* grads = to.at(to.layout->logits_grad);
        Scalar* bias_grad = to.at(to.layout->classifier_bias_grad);
        for (std::int64_t i = 0; i < task_.examples; ++i) {
            for (std::int64_t way = 0; way < ways; ++way) bias_grad[way] += grads[i * ways + way];
        }
    }

    // The classifier's gradient in `to` += that of the logits in `from` times the features of `inputs`.
    void add_classifier_grads(const ConvTask<Scalar>& to, const ConvTask<Scalar>& from,
                              const ConvTask<Scalar>& inputs) {
        const std::int64_t ways = p_.shape.ways, width = layout_.features;
        const Scalar* grads = from.at(from.layout->logits_grad);
        each(ways, [&](std::int64_t way) {
            for (std::int64_t i = 0; i < task_.examples; ++i) {
                stages_.add_scaled(to.at(to.layout->classifier_grad) + way * width, grads[i * ways + way],
                                   features(inputs) + i * width, width);
            }
        });
    }

    // Copies of the features' gradient: with Readout::kMean each position has one.
    std::int64_t feature_copies() const {
        return p_.shape.readout == Readout::kMean ? std::int64_t{last_block().act_h} * last_block().act_w : 1;
    }

    void clear_feature_grads(const ConvTask<Scalar>& to) {
        const std::int64_t size = feature_copies() * layout_.features;
        each(task_.examples, [&](std::int64_t i) { clear(to.layout->activation_grad + i * size, size); });
    }

    // The gradient of the last block's output in `to` += that of the logits in `from` times the classifier of
    // `weights`.
    void add_feature_grads(const ConvTask<Scalar>& to, const ConvTask<Scalar>& from, const ConvTask<Scalar>& weights) {
        const std::int64_t ways = p_.shape.ways, width = layout_.features, copies = feature_copies();
        const Scalar share = Scalar(1) / static_cast<Scalar>(copies);
        const Scalar* grads = from.at(from.layout->logits_grad);
        each(task_.examples, [&](std::int64_t i) {
            for (std::int64_t copy = 0; copy < copies; ++copy) {
                Scalar* at = to.at(to.layout->activation_grad) + (i * copies + copy) * width;
                for (std::int64_t way = 0; way < ways; ++way) {
                    stages_.add_scaled(at, share * grads[i * ways + way],
                                       weights.at(weights.layout->classifier) + way * width, width);
                }
            }
        });
    }

    // One inner step of all tensors that adapt. Returns whether a gradient is NaN or infinite.
    bool move(Wanted wanted, const Scalar* lr) {
        bool nonfinite = false;
        for (int i = 0; i < spans_.count; ++i) {
            const ConvSpan& span = spans_.span[i];
            if (!wanted(span.tensor)) continue;
            Scalar* params = task_.at(span.parameter);
            const Scalar* grads = task_.at(span.gradient);
            nonfinite |= p_.method == Method::kSignMaml
                             ? span_kernels<Scalar>(kernels()).sign_step(params, grads, lr + span.tensor, false,
                                                                         nullptr, span.count)
                             : stages_.gradient_step(params, grads, lr[span.tensor], span.count);
        }
        return nonfinite;
    }

  private:
    const ConvMetaStepParams<Scalar>& p_;
    const ConvCpuLayout& layout_;
    const ConvStages<Scalar>& stages_;
    const Tensors& tensors_;
    const ConvSpans spans_;
    const int threads_;
    const std::int64_t scratch_place_;
    ScratchSlots scratch_;
    ConvTask<Scalar> task_;
};

}  // namespace signmaml::cpu
