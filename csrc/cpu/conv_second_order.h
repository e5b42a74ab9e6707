// Exact MAML: the meta-gradient through the inner steps of one task. With v the derivative of the query loss in the
// parameters after a step, rates a and a mask m of what adapts,
//     v <- v - H(phi_k) (a m v),    k = K-1 .. 0,
// where H is the support loss's Hessian. Its product with a direction is the derivative of the gradient in that
// direction: the passes run again on the support set, with their own derivatives beside them. No tape; the memory does
// not grow with K but for the parameters before each step.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/conv_passes.h"
#include "cpu/conv_rates.h"

namespace signmaml::cpu {

template <typename Scalar>
class ConvSecondOrder {
  public:
    ConvSecondOrder(const ConvMetaStepParams<Scalar>& p, const ConvSecondOrderLayout& layout,
                    const ConvStages<Scalar>& stages, ConvPasses<Scalar>& passes, const ConvRates<Scalar>* rates)
        : p_(p),
          layout_(layout),
          stages_(stages),
          passes_(passes),
          rates_(rates),
          tangents_(with(layout.tangents)),
          with_weights_(with(layout.with_weights)),
          with_activations_(with(layout.with_activations)),
          with_raw_(with(layout.with_raw)) {
        passes.clear_borders(layout.tangents);
        for (int i = 0; i < p.shape.blocks; ++i) {
            passes.clear(layout.tangents.blocks[i].vector, kConvVectors * layout.tangents.channels);
        }
        passes.clear(layout.tangents.classifier, p.shape.ways * layout.tangents.features);
    }

    // Keeps the parameters before a step.
    void remember(std::int64_t step) {
        each_adapted([&](const ConvSpan& span) {
            std::copy_n(own().at(span.parameter), span.count, remembered(step) + span.row);
        });
    }

    // The gradients of all parameters <- those through the steps. They are the query loss's own, at the parameters
    // after the last step.
    // rate_grads: [as lr], to which the gradients of the rates are added; null: not wanted
    void through_the_steps(std::int64_t task, Scalar* rate_grads) {
        rate_grads_ = rate_grads;
        bool adapts = false, blocks_adapt = false;
        each_adapted([&](const ConvSpan& span) {
            adapts = true;
            blocks_adapt |= is_of_a_block(span);
        });
        if (!adapts) return;  // or nothing that moves: a convolution's bias
        each_span(
            [&](const ConvSpan& span) { std::copy_n(own().at(span.gradient), span.count, adjoint() + span.row); });
        passes_.take_images(p_.support, task);
        const std::int64_t examples = p_.support.count;
        for (ConvTask<Scalar>* view : {&tangents_, &with_weights_, &with_activations_, &with_raw_}) {
            view->examples = examples;
        }
        if (blocks_adapt) {
            through_all(task);
        } else {
            through_the_classifier(task);
        }
        each_span(
            [&](const ConvSpan& span) { std::copy_n(adjoint() + span.row, span.count, own().at(span.gradient)); });
    }

  private:
    ConvTask<Scalar> with(const ConvCpuLayout& layout) const { return {&p_.shape, &layout, passes_.task().memory, 0}; }
    const ConvTask<Scalar>& own() const { return passes_.task(); }
    Scalar* adjoint() const { return own().at(layout_.adjoint); }
    Scalar* remembered(std::int64_t step) const { return own().at(layout_.history + step * layout_.packed); }
    // A place in the task's own memory -> the same among the tangents.
    std::int64_t moved(std::int64_t place) const { return place + own().layout->size; }

    template <typename Visit>
    void each_span(const Visit& visit) const {
        for (int i = 0; i < passes_.spans().count; ++i) visit(passes_.spans().span[i]);
    }

    template <typename Visit>
    void each_adapted(const Visit& visit) const {
        each_span([&](const ConvSpan& span) {
            if (p_.adapt[span.tensor] != 0) visit(span);
        });
    }

    bool is_of_a_block(const ConvSpan& span) const { return span.tensor < passes_.classifier_tensor(); }

    void through_all(std::int64_t task) {
        for (std::int64_t step = p_.steps - 1; step >= 0; --step) {
            take_direction(step);
            passes_.forward(p_.support, task, /*features_stale=*/true);
            forward();
            scores_to_gradients(task);
            backward();
            each_span([&](const ConvSpan& span) { subtract(span, tangents_.at(moved(span.gradient))); });
        }
    }

    // Where nothing but the classifier adapts, its input is the same at all steps. So the blocks' passes run once:
    // backward with the sum, over the steps, of what each step contributes to the gradient of the features.
    void through_the_classifier(std::int64_t task) {
        const std::int64_t width = own().layout->features;
        std::fill_n(passes_.features(tangents_), own().examples * width, Scalar(0));
        passes_.clear_feature_grads(own());
        for (std::int64_t step = p_.steps - 1; step >= 0; --step) {
            take_direction(step);
            passes_.forward(p_.support, task, /*features_stale=*/step + 1 == p_.steps);
            logits();
            scores_to_gradients(task);
            passes_.clear_classifier_grads(tangents_);
            passes_.add_bias_grad(tangents_);
            passes_.add_classifier_grads(tangents_, tangents_, own());
            passes_.add_feature_grads(own(), tangents_, own());
            passes_.add_feature_grads(own(), own(), tangents_);
            each_span([&](const ConvSpan& span) {
                if (!is_of_a_block(span)) subtract(span, tangents_.at(moved(span.gradient)));
            });
        }
        passes_.blocks_backward(Wanted{nullptr}, 0);
        each_span([&](const ConvSpan& span) {
            if (is_of_a_block(span)) subtract(span, own().at(span.gradient));
        });
    }

    // adjoint -= a Hessian's product with the direction, or a part of it
    void subtract(const ConvSpan& span, const Scalar* product) {
        stages_.add_scaled(adjoint() + span.row, Scalar(-1), product, span.count);
    }

    // The gradients of the logits, and the derivative of those.
    void scores_to_gradients(std::int64_t task) {
        const ConvHead<Scalar> head = passes_.head(p_.support, task);
        head.gradient_tangent(tangents_.at(layout_.tangents.logits), tangents_.at(layout_.tangents.logits_grad));
        head.to_gradient();
    }

    // The parameters before the step, and as their tangents the direction: rate times adjoint of what adapts.
    void take_direction(std::int64_t step) {
        each_adapted([&](const ConvSpan& span) {
            std::copy_n(remembered(step) + span.row, span.count, own().at(span.parameter));
        });
        if (rates_ != nullptr) {
            each_span(
                [&](const ConvSpan& span) { std::copy_n(adjoint() + span.row, span.count, own().at(span.gradient)); });
            passes_.give(rates_->adjoint(), /*grads=*/true);
            if (rate_grads_ != nullptr) rates_->gradients(step, rates_->adjoint(), rate_grads_);
        }
        if (p_.how.rates.by_element) {
            rates_->scale(step, rates_->adjoint());
            passes_.pack(tangents_, rates_->adjoint());
            return;
        }
        const Scalar* lr = p_.lr + p_.how.rates.row(step) * conv_tensors(p_.shape);
        each_span([&](const ConvSpan& span) {
            Scalar* direction = passes_.clear(moved(span.parameter), span.count);
            if (p_.adapt[span.tensor] != 0) {
                stages_.add_scaled(direction, lr[span.tensor], adjoint() + span.row, span.count);
            }
        });
    }

    // ---- forward

    void forward() {
        for (int i = 0; i < p_.shape.blocks; ++i) {
            const ConvBlockPlan& b = own().block(i);
            const std::int64_t items = own().examples * b.items;
            if (i == 0) {
                stages_.tangent_statistics(own(), tangents_, 0);
                stages_.tangent_transform_first(own(), tangents_);
                passes_.each_with_scratch(items, [&](std::int64_t item, Scalar* scratch) {
                    stages_.tangent_first(own(), tangents_, item, scratch);
                });
                continue;
            }
            stages_.transform_weights(own(), i, /*back=*/false);
            stages_.transform_weights(tangents_, i, /*back=*/false);
            passes_.ranges_with_scratch(items, [&](std::int64_t begin, std::int64_t end, Scalar* scratch) {
                for (std::int64_t first = begin; first < end; first += b.forward_items) {
                    const std::int64_t last = std::min<std::int64_t>(first + b.forward_items, end);
                    stages_.convolve(with_weights_, i, first, last, /*add=*/false, scratch);
                    stages_.convolve(with_activations_, i, first, last, /*add=*/true, scratch);
                    for (std::int64_t item = first; item < last; ++item) {
                        stages_.tangent_sums(own(), tangents_, i, item);
                    }
                }
            });
            stages_.tangent_statistics(own(), tangents_, i);
            passes_.each(own().examples,
                         [&](std::int64_t example) { stages_.tangent_normalise(own(), tangents_, i, example); });
        }
        if (p_.shape.readout == Readout::kMean) passes_.average(tangents_);
        logits();
    }

    // V. features + V features. + c.
    void logits() {
        const ConvCpuLayout& l = *own().layout;
        const std::int64_t ways = p_.shape.ways, width = l.features;
        const Scalar* features = passes_.features(own());
        const Scalar* features_tangent = passes_.features(tangents_);
        passes_.each(own().examples, [&](std::int64_t i) {
            for (std::int64_t way = 0; way < ways; ++way) {
                tangents_.at(l.logits + l.size)[i * ways + way] =
                    stages_.dot(features + i * width, tangents_.at(moved(l.classifier)) + way * width, width) +
                    stages_.dot(features_tangent + i * width, own().at(l.classifier) + way * width, width) +
                    tangents_.at(moved(l.classifier_bias))[way];
            }
        });
    }

    // ---- backward

    void backward() {
        passes_.classifier_grads(/*blocks_too=*/true);
        classifier_tangents();
        const int last = p_.shape.blocks - 1;
        passes_.each_with_scratch(own().examples * own().block(last).half_items,
                                  [&](std::int64_t item, Scalar* scratch) { grad_sums(last, item, scratch); });
        for (int i = last; i > 0; --i) {
            const ConvBlockPlan& b = own().block(i);
            stages_.norm_grads(own(), i);
            stages_.tangent_norm_grads(own(), tangents_, i);
            const auto turn = [&](const ConvTask<Scalar>& weights) {
                stages_.pack_back(weights, i);
                stages_.transform_weights(weights, i, /*back=*/true);
            };
            turn(own());
            turn(tangents_);
            // As in ConvPasses::backward.
            const std::int64_t n = own().examples, at_once = passes_.threads() > 1 ? n : b.weight_images;
            for (std::int64_t first = (n - 1) / at_once * at_once; first >= 0; first -= at_once) {
                convolution_grads(i, first, std::min(first + at_once, n));
            }
            stages_.weight_grad(with_activations_, i);
        }
        if (!own().layout->first_grad_in_scratch) {
            passes_.each_with_scratch(own().examples * own().block(0).items,
                                      [&](std::int64_t item, Scalar* scratch) { first_weight_grad(item, scratch); });
        }
        stages_.tangent_finish_first(own(), tangents_);
    }

    void classifier_tangents() {
        passes_.clear_classifier_grads(tangents_);
        passes_.add_bias_grad(tangents_);
        passes_.add_classifier_grads(tangents_, tangents_, own());
        passes_.add_classifier_grads(tangents_, own(), tangents_);
        passes_.clear_feature_grads(tangents_);
        passes_.add_feature_grads(tangents_, tangents_, own());
        passes_.add_feature_grads(tangents_, own(), tangents_);
    }

    void grad_sums(int block, std::int64_t item, Scalar* scratch) {
        stages_.grad_sums(own(), block, item, scratch);
        grad_sums_of_tangents(block, item, scratch);
    }

    void grad_sums_of_tangents(int block, std::int64_t item, Scalar* scratch) {
        if (block == 0) {
            stages_.grad_sums(with_activations_, 0, item, scratch);
        } else {
            stages_.tangent_grad_sums(own(), tangents_, block, item);
        }
    }

    void first_weight_grad(std::int64_t item, Scalar* scratch) {
        stages_.first_weight_grad(own(), item, scratch);
        stages_.first_weight_grad(with_activations_, item, scratch);
    }

    // Of a block after the first, over some examples.
    void convolution_grads(int block, std::int64_t first, std::int64_t last) {
        const ConvBlockPlan& b = own().block(block);
        passes_.each((last - first) * b.items, [&](std::int64_t item) {
            stages_.tangent_raw_grad(own(), tangents_, block, first * b.items + item);
        });
        const std::int64_t shares =
            b.winograd ? std::min<std::int64_t>(passes_.threads(), kConvProducts) : kConvProducts;
        passes_.ranges_with_scratch(shares, [&](std::int64_t begin, std::int64_t end, Scalar* scratch) {
            const std::int64_t from = begin * kConvProducts / shares, to = end * kConvProducts / shares;
            // In parts of the same size for any number of threads: they are the order of the sums.
            for (std::int64_t i = (last - 1) / b.weight_images * b.weight_images; i >= first; i -= b.weight_images) {
                const std::int64_t end_of_part = std::min(i + b.weight_images, last);
                stages_.weight_products(with_raw_, block, i, end_of_part, from, to, /*add=*/false, scratch);
                stages_.weight_products(with_activations_, block, i, end_of_part, from, to, /*add=*/true, scratch);
            }
        });
        const std::int64_t items = own().block(block - 1).half_items, at_once = b.data_grad_items;
        const bool in_scratch = block == 1 && own().layout->first_grad_in_scratch;
        const std::int64_t step = own().layout->first_grad;
        passes_.ranges_with_scratch((last - first) * items, [&](std::int64_t begin, std::int64_t end, Scalar* scratch) {
            for (std::int64_t item = first * items + begin; item < first * items + end; item += at_once) {
                const std::int64_t behind = std::min(item + at_once, first * items + end);
                // Where block 0's gradient stays in scratch, its derivative takes its place.
                stages_.data_grad(own(), block, item, behind, scratch);
                for (std::int64_t i = item; in_scratch && i < behind; ++i) {
                    stages_.first_weight_grad(own(), i, scratch + (i - item) * step);
                }
                stages_.convolve_back(with_weights_, block, item, behind, /*add=*/false, scratch);
                stages_.convolve_back(with_raw_, block, item, behind, /*add=*/true, scratch);
                for (std::int64_t i = item; i < behind; ++i) {
                    grad_sums_of_tangents(block - 1, i, scratch + (i - item) * step);
                    if (in_scratch) stages_.first_weight_grad(with_activations_, i, scratch + (i - item) * step);
                }
            }
        });
    }

    const ConvMetaStepParams<Scalar>& p_;
    const ConvSecondOrderLayout& layout_;
    const ConvStages<Scalar>& stages_;
    ConvPasses<Scalar>& passes_;
    Scalar* rate_grads_ = nullptr;
    const ConvRates<Scalar>* rates_;  // null: constant, and the same for all of a tensor
    ConvTask<Scalar> tangents_, with_weights_, with_activations_, with_raw_;
};

}  // namespace signmaml::cpu
