// A meta-step of the tasks that lie side by side in the lanes of vectors.
#pragma once

#include <cstdint>

#include "cpu/isa/integers.h"
#include "cpu/isa/mlp/elementary.h"
#include "cpu/isa/mlp/product.h"
#include "cpu/isa/mlp/results.h"
#include "cpu/mlp_table.h"
#include "params/compact_sign_step.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

template <typename S>
class Group {
    using Scalar = typename S::Scalar;
    using Int = typename S::Int;
    using V = typename S::Vector;
    using M = typename S::Mask;
    static constexpr int kL = S::kLanes;

  public:
    explicit Group(const MlpGroup<Scalar>& group)
        : p_(*group.params),
          layout_(*group.layout),
          sharing_(group.sharing),
          memory_(reinterpret_cast<V*>(group.memory)),
          first_(group.first),
          live_(group.live),
          grads_(group.grads),
          how_(group.params->how),
          differentiates_(layout_.differentiated > 0 && grads_ != nullptr && moves_any()) {}

    void run() {
        for (std::int64_t i = 0; i < p_.parameters; ++i) at(layout_.parameters)[i] = S::all(p_.theta[i]);
        for (std::int64_t i = 0; how_.counted && i < p_.parameters; ++i) at(layout_.counts)[i] = V{};
        if (p_.steps > 0) take(p_.support);
        for (int step = 0; step < p_.steps; ++step) {
            if (differentiates_) keep_parameters(step);
            const V loss = pass(p_.support, at(layout_.parameters), nullptr, nullptr);
            give(p_.support_loss + step * p_.tasks + first_, loss);
            if (layout_.stores_gradients) {
                step_by_stored_gradient(step);
            } else if (p_.method == Method::kSignMaml) {
                descend<Purpose::kSignStep>(step);
            } else {
                descend<Purpose::kPlainStep>(step);
            }
        }
        if (p_.adapted != nullptr) {
            give_rows(p_.adapted + first_ * p_.parameters, layout_.parameters, p_.parameters, p_.parameters);
        }
        if (p_.counts != nullptr) give_counts(p_.counts + first_ * p_.parameters);
        if (p_.query.count > 0) query();
        for (int lane = 0; lane < live_; ++lane) {
            if (bad_[lane] != 0) __atomic_store_n(p_.nonfinite + first_ + lane, std::uint8_t{1}, __ATOMIC_RELAXED);
        }
    }

  private:
    V* at(std::int64_t place) const { return memory_ + place; }
    std::int64_t width(int layer) const { return p_.shape.widths[layer]; }
    int last() const { return p_.shape.layers; }
    bool is_relu() const { return p_.shape.activation == Activation::kRelu; }
    bool moves_weight(int layer) const { return p_.adapt[2 * layer] != 0; }
    bool moves_bias(int layer) const { return p_.adapt[2 * layer + 1] != 0; }

    bool moves_any() const {
        bool any = false;
        for (int layer = 0; layer < last(); ++layer) any = any || moves_weight(layer) || moves_bias(layer);
        return any;
    }

    // ---- loops that threads may share ----

    // Fewer multiply-adds than this are done before another thread has woken.
    static constexpr std::int64_t kWorthSharing = 100000;

    template <typename Body>
    void each(std::int64_t items, std::int64_t work, const Body& body) const {
        if (sharing_.run == nullptr || work < kWorthSharing) {
            body(0, items);
            return;
        }
        sharing_.run(
            items, sharing_.threads,
            [](const void* self, std::int64_t begin, std::int64_t end) {
                (*static_cast<const Body*>(self))(begin, end);
            },
            &body);
    }

    template <typename Finish>
    void multiply(const Product<V>& product, const Finish& finish) const {
        each(product.items(), product.work(), [&](std::int64_t begin, std::int64_t end) {
            Finish own = finish;
            product.compute(begin, end, own);
        });
    }

    // ---- between the caller's rows and the lanes ----

    // to[i] <- element i of the rows [count] of the group's tasks. Lanes without a task repeat the last one.
    void take_rows(V* to, const Scalar* rows, std::int64_t count) const {
        const Scalar* row[kL];
        for (int lane = 0; lane < kL; ++lane) row[lane] = rows + (first_ + least(lane, live_ - 1)) * count;
        std::int64_t i = 0;
        for (; i + kL <= count; i += kL) {
            V square[kL];
            for (int lane = 0; lane < kL; ++lane) {
                square[lane] = *reinterpret_cast<const typename S::Loose*>(row[lane] + i);
            }
            transpose<S>(square);
            for (int j = 0; j < kL; ++j) to[i + j] = square[j];
        }
        for (; i < count; ++i) {
            for (int lane = 0; lane < kL; ++lane) to[i][lane] = row[lane][i];
        }
    }

    // The first `count` elements of rows [row].
    void give_rows(Scalar* rows, std::int64_t place, std::int64_t count, std::int64_t row) const {
        const V* from = at(place);
        std::int64_t i = 0;
        for (; i + kL <= count; i += kL) {
            V square[kL];
            for (int j = 0; j < kL; ++j) square[j] = from[i + j];
            transpose<S>(square);
            for (int lane = 0; lane < live_; ++lane) {
                *reinterpret_cast<typename S::Loose*>(rows + lane * row + i) = square[lane];
            }
        }
        for (; i < count; ++i) {
            for (int lane = 0; lane < live_; ++lane) rows[lane * row + i] = from[i][lane];
        }
    }

    void give(Scalar* to, V value) const {
        for (int lane = 0; lane < live_; ++lane) to[lane] = value[lane];
    }

    void take(const MlpSet<Scalar>& set) const {
        take_rows(at(layout_.activation[0]), set.x, set.count * width(0));
        if (p_.shape.loss == MlpLoss::kMse) {
            take_rows(at(layout_.target), set.target, set.count * width(last()));
            return;
        }
        M* labels = reinterpret_cast<M*>(at(layout_.target));
        for (std::int64_t i = 0; i < set.count; ++i) {
            for (int lane = 0; lane < kL; ++lane) {
                const std::int64_t label = set.labels[(first_ + least(lane, live_ - 1)) * set.count + i];
                labels[i][lane] = static_cast<Int>(label >= 0 && label < width(last()) ? label : -1);
            }
        }
    }

    // ---- forward ----

    // All activations, the delta of the output layer and the mean loss; for kCrossEntropy the softmax, if asked for.
    V pass(const MlpSet<Scalar>& set, const V* parameters, V* accuracy, V* softmax) {
        for (int layer = 0; layer < last(); ++layer) forward(set.count, layer, parameters);
        const Scalar count = static_cast<Scalar>(set.count);
        const V loss =
            (p_.shape.loss == MlpLoss::kMse ? squared_error(set.count) : cross_entropy(set.count, accuracy, softmax)) /
            count;
        flag(reinterpret_cast<M>(loss) & Bits<Scalar>::kMagnitude);
        return loss;
    }

    void forward(std::int64_t count, int layer, const V* parameters) const {
        const std::int64_t inputs = width(layer), outputs = width(layer + 1);
        V* out = at(layout_.activation[layer + 1]);
        const bool rectifies = is_relu() && layer + 1 < last();
        const Product<V> product{{at(layout_.activation[layer]), inputs, 1},
                                 {parameters + layout_.weight[layer], 1, inputs},
                                 parameters + layout_.bias[layer],
                                 count,
                                 outputs,
                                 inputs};
        const Scalar floor = rectifies ? Scalar(0) : -static_cast<Scalar>(__builtin_inf());
        multiply(product, Activate<V>{out, outputs, S::all(floor)});
        if (is_relu() || layer + 1 == last()) return;
        // A tanh counts as some thirty multiply-adds.
        each(count * outputs, 30 * count * outputs, [=](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) out[i] = tanh_of<S>(out[i]);
        });
    }

    V squared_error(std::int64_t count) const {
        const std::int64_t outputs = width(last());
        const V* out = at(layout_.activation[last()]);
        const V* target = at(layout_.target);
        V* delta = at(layout_.delta[last() % 2]);
        const Scalar elements = static_cast<Scalar>(count * outputs);
        V loss{};
        for (std::int64_t example = 0; example < count; ++example) {
            V sum{};
            for (std::int64_t i = example * outputs; i < (example + 1) * outputs; ++i) {
                const V difference = out[i] - target[i];
                sum += difference * difference;
                delta[i] = Scalar(2) * difference / elements;
            }
            loss += sum / static_cast<Scalar>(outputs);
        }
        return loss;
    }

    // A label out of range makes loss and gradient NaN: reference.cross_entropy has the rule.
    V cross_entropy(std::int64_t count, V* accuracy, V* softmax) const {
        const std::int64_t outputs = width(last());
        const M* labels = reinterpret_cast<const M*>(at(layout_.target));
        V loss{}, correct{};
        for (std::int64_t example = 0; example < count; ++example) {
            const V* row = at(layout_.activation[last()]) + example * outputs;
            V* delta = at(layout_.delta[last() % 2]) + example * outputs;
            const M label = labels[example];
            V largest = row[0], at_label = row[0];
            M best{};
            for (std::int64_t o = 1; o < outputs; ++o) {
                const M index = static_cast<Int>(o) - M{};
                // A NaN is the largest, as in torch's argmax.
                const M greater = (row[o] > largest) | ((row[o] != row[o]) & (largest == largest));
                largest = greater ? row[o] : largest;
                best = greater ? index : best;
                at_label = label == index ? row[o] : at_label;
            }
            V sum{};
            for (std::int64_t o = 0; o < outputs; ++o) {
                delta[o] = exp_of<S>(row[o] - largest);
                sum += delta[o];
            }
            const V invalid = label < Int(0) ? S::all(static_cast<Scalar>(__builtin_nan(""))) : V{};
            for (std::int64_t o = 0; o < outputs; ++o) {
                const V share = delta[o] / sum;
                if (softmax != nullptr) softmax[example * outputs + o] = share + invalid;
                const V gradient = label == (static_cast<Int>(o) - M{}) ? share - Scalar(1) : share;
                delta[o] = gradient / static_cast<Scalar>(count) + invalid;
            }
            correct += best == label ? S::all(1) : V{};
            loss += log_of<S>(sum) + largest - at_label + invalid;
        }
        if (accuracy != nullptr) *accuracy = correct / static_cast<Scalar>(count);
        return loss;
    }

    // ---- backward ----

    // Moves the parameters by their gradients as these are made.
    template <Purpose kPurpose>
    void descend(int step) {
        const StepRates<S> how{rates(step), directions(step), adds_directions(step)};
        if (how_.rates.by_element) {
            backward<kPurpose, Rates::kElementKept>(p_.support.count, how, /*all=*/false);
        } else if (layout_.direction_rows > 0) {
            backward<kPurpose, Rates::kTensorKept>(p_.support.count, how, /*all=*/false);
        } else {
            backward<kPurpose>(p_.support.count, how, /*all=*/false);
        }
    }

    // From the output's delta down. Steps move the parameters; for kGradient each is replaced by its gradient, which is
    // safe because a layer's weights are read for the last time just before. `step` has the rates of all tensors and
    // the place of all directions. `all`: also what no step moves.
    template <Purpose kPurpose, Rates kRates = Rates::kTensor>
    void backward(std::int64_t count, const StepRates<S>& step, bool all) {
        const auto of_tensor = [&](int tensor, std::int64_t place) -> StepRates<S> {
            if constexpr (kRates == Rates::kElementKept) return {step.of + place, step.kept + place, step.adds};
            if constexpr (kRates == Rates::kTensorKept) return {step.of + tensor, step.kept + place, step.adds};
            return {step.of == nullptr ? nullptr : step.of + tensor, nullptr, false};
        };
        for (int layer = last() - 1; layer >= 0; --layer) {
            const V* deltas = at(layout_.delta[(layer + 1) % 2]);
            if (layer > 0) data_grad(count, layer, at(layout_.parameters));
            if (all || moves_weight(layer)) {
                move_weight<kPurpose, kRates>(deltas, at(layout_.activation[layer]), count, layer,
                                              of_tensor(2 * layer, layout_.weight[layer]));
            }
            if (all || moves_bias(layer)) {
                move_bias<kPurpose, kRates>(deltas, count, layer, of_tensor(2 * layer + 1, layout_.bias[layer]));
            }
        }
    }

    // ---- steps by a gradient that is stored first ----

    // The first gradient, the sharpest place nearby if there is one, and the gradient there follow each other in the
    // parameters' place.
    void step_by_stored_gradient(int step) {
        V* here = at(layout_.parameters);
        V* start = at(layout_.start);
        for (std::int64_t i = 0; i < p_.parameters; ++i) start[i] = here[i];
        backward<Purpose::kGradient>(p_.support.count, {}, /*all=*/false);
        if (how_.sharpness.rho > 0) {
            climb();
            pass(p_.support, here, nullptr, nullptr);
            backward<Purpose::kGradient>(p_.support.count, {}, /*all=*/false);
        }
        const bool by_sign = p_.method == Method::kSignMaml;
        const bool keeps = how_.rates.learnable && p_.query.count > 0;
        V* counts = at(layout_.counts);
        V* kept = directions(step);
        const bool adds = adds_directions(step);
        const Scalar* lr = rates(step);
        each_moving([&](int tensor, std::int64_t first, std::int64_t behind) {
            for (std::int64_t i = first; i < behind; ++i) {
                const V direction = by_sign ? sign_of<S>(here[i]) : here[i];
                if (keeps) kept[i] = adds ? kept[i] + direction : direction;
                if (how_.counted) {
                    counts[i] += direction;
                    here[i] = S::all(p_.theta[i]) - rate(lr, tensor, i) * counts[i];
                } else {
                    here[i] = start[i] - rate(lr, tensor, i) * direction;
                }
            }
        });
    }

    void give_counts(std::int8_t* rows) const {
        const V* counts = at(layout_.counts);
        for (int lane = 0; lane < live_; ++lane) {
            for (std::int64_t i = 0; i < p_.parameters; ++i) {
                const Scalar count = counts[i][lane];  // a NaN stays one until here
                rows[lane * p_.parameters + i] =
                    static_cast<std::int8_t>(count == count ? static_cast<int>(count) : kNanCount);
            }
        }
    }

    const Scalar* rates(int step) const { return p_.lr + step * layout_.rates_of_step; }

    // Where a step's directions go.
    V* directions(int step) const {
        return at(layout_.directions + (layout_.direction_rows > 1 ? step * p_.parameters : 0));
    }

    // Signs of steps that share their rates are summed, as each has its product with the same derivative.
    bool adds_directions(int step) const { return step > 0 && layout_.direction_rows == 1 && how_.rates.learnable; }

    // Of a step's rates, that of a parameter.
    Scalar rate(const Scalar* lr, int tensor, std::int64_t parameter) const {
        return lr[how_.rates.by_element ? parameter : tensor];
    }

    // Adds those of the steps [begin, end). With v, which is in the parameters' place, the derivative of the query loss
    // in the parameters after each of these steps, the gradient of a rate is -<v, direction> over what shares it.
    void rate_gradients(int begin, int end) const {
        const V* adjoint = at(layout_.parameters);
        // A run of v stays in the first cache for all steps, and sums of sums round less than one long sum.
        constexpr std::int64_t kTogether = 128;
        each_moving([&](int tensor, std::int64_t first, std::int64_t behind) {
            for (std::int64_t from = first; from < behind; from += kTogether) {
                const std::int64_t to = least(from + kTogether, behind);
                for (int step = begin; step < end; ++step) {
                    const V* along = directions(step);
                    V* gradients = at(layout_.rate_grads + step * layout_.rates_of_step);
                    if (how_.rates.by_element) {
                        for (std::int64_t i = from; i < to; ++i) gradients[i] -= adjoint[i] * along[i];
                    } else {
                        gradients[tensor] -= product_of(adjoint + from, along + from, to - from);
                    }
                }
            }
        });
    }

    // In eight sums, which round less than one long one.
    static V product_of(const V* a, const V* b, std::int64_t count) {
        constexpr int kSums = 8;
        V sums[kSums]{};
        std::int64_t i = 0;
        for (; i + kSums <= count; i += kSums) {
#pragma GCC unroll 8
            for (int s = 0; s < kSums; ++s) sums[s] += a[i + s] * b[i + s];
        }
        for (int s = 0; i < count; ++i, ++s) sums[s] += a[i] * b[i];
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }

    // What moves <- its start plus the perturbation along its gradient.
    void climb() {
        V* here = at(layout_.parameters);
        const V* start = at(layout_.start);
        const bool by_sign = how_.sharpness.norm == SharpnessNorm::kLinf;
        V factor = S::all(static_cast<Scalar>(how_.sharpness.rho));
        if (!by_sign) {
            V squares{};
            each_moving([&](int, std::int64_t first, std::int64_t behind) {
                for (std::int64_t i = first; i < behind; ++i) {
                    const V scaled = size_of(start[i]) * here[i];
                    squares += scaled * scaled;
                }
            });
            for (int lane = 0; lane < kL; ++lane) {
                const double norm = __builtin_sqrt(static_cast<double>(squares[lane]));
                factor[lane] = static_cast<Scalar>(how_.sharpness.rho / (norm + kSharpnessTiny));
            }
        }
        each_moving([&](int, std::int64_t first, std::int64_t behind) {
            for (std::int64_t i = first; i < behind; ++i) {
                const V scale = size_of(start[i]);
                here[i] = start[i] + factor * (scale * (by_sign ? sign_of<S>(here[i]) : scale * here[i]));
            }
        });
    }

    // What a parameter's gradient is multiplied by before its norm is taken.
    V size_of(V parameter) const {
        if (!how_.sharpness.adaptive) return S::all(1);
        return parameter < V{} ? -parameter : parameter;
    }

    // Calls visit(number in theta's order, first place, place behind) for every tensor that steps move.
    template <typename Visit>
    void each_moving(const Visit& visit) const {
        for (int layer = 0; layer < last(); ++layer) {
            const std::int64_t weight = layout_.weight[layer], bias = layout_.bias[layer];
            if (moves_weight(layer)) visit(2 * layer, weight, bias);
            if (moves_bias(layer)) visit(2 * layer + 1, bias, bias + width(layer + 1));
        }
    }

    // A product of deltas, [count, outputs], and a layer's weights, [outputs, inputs].
    Product<V> through(const V* deltas, const V* weights, std::int64_t count, int layer) const {
        const std::int64_t inputs = width(layer), outputs = width(layer + 1);
        return {{deltas, outputs, 1}, {weights, inputs, 1}, nullptr, count, inputs, outputs};
    }

    void data_grad(std::int64_t count, int layer, const V* parameters) const {
        const std::int64_t inputs = width(layer);
        const V* in = at(layout_.activation[layer]);
        V* below = at(layout_.delta[layer % 2]);
        const Product<V> product =
            through(at(layout_.delta[(layer + 1) % 2]), parameters + layout_.weight[layer], count, layer);
        if (is_relu()) {
            multiply(product, Deactivate<V, Activation::kRelu>{in, below, inputs});
        } else {
            multiply(product, Deactivate<V, Activation::kTanh>{in, below, inputs});
        }
    }

    template <Purpose kPurpose, Rates kRates = Rates::kTensor>
    void move_weight(const V* deltas, const V* inputs_of, std::int64_t count, int layer, const StepRates<S>& rates) {
        const std::int64_t inputs = width(layer), outputs = width(layer + 1);
        move<kPurpose, kRates>({{deltas, 1, outputs}, {inputs_of, inputs, 1}, nullptr, outputs, inputs, count},
                               layout_.weight[layer], rates);
    }

    template <Purpose kPurpose, Rates kRates = Rates::kTensor>
    void move_bias(const V* deltas, std::int64_t count, int layer, const StepRates<S>& rates) {
        const std::int64_t outputs = width(layer + 1);
        const V one = S::all(1);
        move<kPurpose, kRates>({{deltas, 1, outputs}, {&one, 0, 0}, nullptr, outputs, 1, count}, layout_.bias[layer],
                               rates);
    }

    // Parameters at `place` by their gradients, the results of `product`.
    template <Purpose kPurpose, Rates kRates>
    void move(const Product<V>& product, std::int64_t place, const StepRates<S>& rates) {
        using Mover = Move<S, kPurpose, kRates>;
        const V lr = Mover::kSteps && !Mover::kByElement ? S::all(*rates.of) : V{};
        each(product.items(), product.work(), [&](std::int64_t begin, std::int64_t end) {
            Mover own{at(place), product.columns, rates, lr, M{}};
            product.compute(begin, end, own);
            flag(own.top);
        });
    }

    void flag(M top) {
        for (int lane = 0; lane < kL; ++lane) {
            if (top[lane] >= Bits<Scalar>::kInfinity) __atomic_store_n(bad_ + lane, 1, __ATOMIC_RELAXED);
        }
    }

    void query() {
        take(p_.query);
        V accuracy{};
        give(p_.query_loss + first_, pass(p_.query, at(layout_.parameters), &accuracy, nullptr));
        if (p_.query_accuracy != nullptr) give(p_.query_accuracy + first_, accuracy);
        if (p_.predictions != nullptr) {
            const std::int64_t count = p_.query.count * width(last());
            give_rows(p_.predictions + first_ * count, layout_.activation[last()], count, count);
        }
        if (grads_ == nullptr) return;
        backward<Purpose::kGradient>(p_.query.count, {}, /*all=*/true);
        for (std::int64_t i = p_.parameters; i < layout_.columns; ++i) at(layout_.rate_grads)[i - p_.parameters] = V{};
        if (differentiates_) {
            differentiate_steps();
        } else if (how_.rates.learnable) {
            rate_gradients(0, static_cast<int>(layout_.direction_rows));
        }
        const std::int64_t columns = layout_.columns;
        give_rows(grads_, layout_.parameters, p_.parameters, columns);
        give_rows(grads_ + p_.parameters, layout_.rate_grads, columns - p_.parameters, columns);
    }

    // ---- second order ----

    // The query gradient v, in the parameters' place, becomes the meta-gradient. From the last step to the first,
    // v <- v - H u, where u is rate * v of what the step moved, and H u is the derivative, in the direction u, of the
    // support gradient before that step. Forward and backward are computed again, each together with its derivative.
    void differentiate_steps() {
        take(p_.support);
        const std::int64_t count = p_.support.count;
        for (int step = p_.steps - 1; step >= 0; --step) {
            const V* before = at(layout_.path + step * p_.parameters);
            if (how_.rates.learnable) rate_gradients(step, step + 1);
            aim(step);
            V* of_output = at(layout_.delta_tangent[last() % 2]);
            pass(p_.support, before, nullptr, of_output);
            for (int layer = 0; layer < last(); ++layer) forward_tangent(count, layer, before);
            output_tangent(count);
            for (int layer = last() - 1; layer >= 0; --layer) {
                if (layer > 0) data_grad_tangent(count, layer, before);
                correct(count, layer);
            }
        }
    }

    void keep_parameters(int step) const {
        const V* from = at(layout_.parameters);
        V* to = at(layout_.path + step * p_.parameters);
        each(p_.parameters, p_.parameters, [=](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) to[i] = from[i];
        });
    }

    // u of a step. What does not move has none: nothing reads its place.
    void aim(int step) const {
        const Scalar* lr = rates(step);
        const V* from = at(layout_.parameters);
        V* to = at(layout_.direction);
        each_moving([&](int tensor, std::int64_t first, std::int64_t behind) {
            each(behind - first, behind - first, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = first + begin; i < first + end; ++i) to[i] = rate(lr, tensor, i) * from[i];
            });
        });
    }

    // Whether the activations of a layer depend on what moves.
    bool has_tangent(int layer) const {
        bool has = false;
        for (int below = 0; below < layer; ++below) has = has || moves_weight(below) || moves_bias(below);
        return has;
    }

    // The derivative of a layer's output: of its inputs through its weights, and of its own parameters.
    void forward_tangent(std::int64_t count, int layer, const V* parameters) const {
        if (!has_tangent(layer + 1)) return;
        const V* start = moves_bias(layer) ? at(layout_.direction + layout_.bias[layer]) : nullptr;
        bool adds = false;
        const auto add = [&](const V* in, const V* weights, std::int64_t depth) {
            const std::int64_t inputs = width(layer), outputs = width(layer + 1);
            derive({{in, inputs, 1}, {weights, 1, inputs}, adds ? nullptr : start, count, outputs, depth}, layer + 1,
                   at(layout_.tangent[layer + 1]), adds);
            adds = true;
        };
        const V* in = at(layout_.activation[layer]);
        const V* own = at(layout_.direction + layout_.weight[layer]);
        if (has_tangent(layer)) add(at(layout_.tangent[layer]), parameters + layout_.weight[layer], width(layer));
        if (moves_weight(layer)) add(in, own, width(layer));
        if (!adds) add(in, own, 0);
    }

    // Stores the results of a product, or adds them, each times the slope of the activation whose output `layer` is.
    void derive(const Product<V>& product, int layer, V* tangents, bool adds) const {
        if (layer == last()) {
            derive_through<Slope::kOne>(product, layer, tangents, adds);
        } else if (is_relu()) {
            derive_through<Slope::kRelu>(product, layer, tangents, adds);
        } else {
            derive_through<Slope::kTanh>(product, layer, tangents, adds);
        }
    }

    template <Slope kSlope>
    void derive_through(const Product<V>& product, int layer, V* tangents, bool adds) const {
        const V* values = at(layout_.activation[layer]);
        if (adds) {
            multiply(product, Derive<V, kSlope, true>{values, tangents, width(layer)});
        } else {
            multiply(product, Derive<V, kSlope, false>{values, tangents, width(layer)});
        }
    }

    // The derivative of the output layer's delta. For kCrossEntropy the softmax is in its place.
    void output_tangent(std::int64_t count) const {
        const std::int64_t outputs = width(last());
        const V* tangent = at(layout_.tangent[last()]);
        V* derived = at(layout_.delta_tangent[last() % 2]);
        if (p_.shape.loss == MlpLoss::kMse) {
            const Scalar elements = static_cast<Scalar>(count * outputs);
            for (std::int64_t i = 0; i < count * outputs; ++i) derived[i] = Scalar(2) * tangent[i] / elements;
            return;
        }
        for (std::int64_t example = 0; example < count; ++example) {
            V mean{};
            for (std::int64_t i = example * outputs; i < (example + 1) * outputs; ++i) mean += derived[i] * tangent[i];
            for (std::int64_t i = example * outputs; i < (example + 1) * outputs; ++i) {
                derived[i] = derived[i] * (tangent[i] - mean) / static_cast<Scalar>(count);
            }
        }
    }

    // The delta of a layer's inputs and its derivative.
    void data_grad_tangent(std::int64_t count, int layer, const V* parameters) const {
        const std::int64_t inputs = width(layer);
        const V* weights = parameters + layout_.weight[layer];
        const V* above = at(layout_.delta[(layer + 1) % 2]);
        V* derived = at(layout_.delta_tangent[layer % 2]);
        const bool curved = !is_relu() && has_tangent(layer);
        if (curved) {
            multiply(through(above, weights, count, layer),
                     DeactivateCurved<V>{at(layout_.activation[layer]), at(layout_.tangent[layer]),
                                         at(layout_.delta[layer % 2]), derived, inputs});
        } else {
            data_grad(count, layer, parameters);
        }
        derive(through(at(layout_.delta_tangent[(layer + 1) % 2]), weights, count, layer), layer, derived, curved);
        if (!moves_weight(layer)) return;
        derive(through(above, at(layout_.direction + layout_.weight[layer]), count, layer), layer, derived, true);
    }

    // Subtracts a layer's part of H u from the gradient.
    void correct(std::int64_t count, int layer) {
        const V* derived = at(layout_.delta_tangent[(layer + 1) % 2]);
        move_weight<Purpose::kCorrection>(derived, at(layout_.activation[layer]), count, layer, {});
        if (has_tangent(layer)) {
            move_weight<Purpose::kCorrection>(at(layout_.delta[(layer + 1) % 2]), at(layout_.tangent[layer]), count,
                                              layer, {});
        }
        move_bias<Purpose::kCorrection>(derived, count, layer, {});
    }

    const MlpMetaStepParams<Scalar>& p_;
    const MlpCpuLayout& layout_;
    const Sharing sharing_;
    V* const memory_;
    const std::int64_t first_;
    const int live_;
    Scalar* const grads_;
    const StepOptions how_;
    const bool differentiates_;  // the steps: the meta-gradient is of second order
    int bad_[kL] = {};           // lanes that met a NaN or an infinity
};

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
