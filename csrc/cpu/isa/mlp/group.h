// A meta-step of the tasks that lie side by side in the lanes of vectors.
#pragma once

#include <cstdint>

#include "cpu/isa/integers.h"
#include "cpu/isa/mlp/elementary.h"
#include "cpu/isa/mlp/product.h"
#include "cpu/isa/mlp/results.h"
#include "cpu/mlp_table.h"

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
          grads_(group.grads) {}

    void run() {
        for (std::int64_t i = 0; i < p_.parameters; ++i) at(layout_.parameters)[i] = S::all(p_.theta[i]);
        if (p_.steps > 0) take(p_.support);
        for (int step = 0; step < p_.steps; ++step) {
            const V loss = pass(p_.support, nullptr);
            give(p_.support_loss + step * p_.tasks + first_, loss);
            const Scalar* lr = p_.lr + std::int64_t{step} * 2 * p_.shape.layers;
            if (p_.method == Method::kSignMaml) {
                backward<Purpose::kSignStep>(p_.support.count, lr);
            } else {
                backward<Purpose::kPlainStep>(p_.support.count, lr);
            }
        }
        if (p_.adapted != nullptr) {
            give_rows(p_.adapted + first_ * p_.parameters, layout_.parameters, p_.parameters);
        }
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

    void give_rows(Scalar* rows, std::int64_t place, std::int64_t count) const {
        const V* from = at(place);
        std::int64_t i = 0;
        for (; i + kL <= count; i += kL) {
            V square[kL];
            for (int j = 0; j < kL; ++j) square[j] = from[i + j];
            transpose<S>(square);
            for (int lane = 0; lane < live_; ++lane) {
                *reinterpret_cast<typename S::Loose*>(rows + lane * count + i) = square[lane];
            }
        }
        for (; i < count; ++i) {
            for (int lane = 0; lane < live_; ++lane) rows[lane * count + i] = from[i][lane];
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

    // All activations, the delta of the output layer and the mean loss.
    V pass(const MlpSet<Scalar>& set, V* accuracy) {
        for (int layer = 0; layer < last(); ++layer) forward(set.count, layer);
        const Scalar count = static_cast<Scalar>(set.count);
        const V loss =
            (p_.shape.loss == MlpLoss::kMse ? squared_error(set.count) : cross_entropy(set.count, accuracy)) / count;
        flag(reinterpret_cast<M>(loss) & Bits<Scalar>::kMagnitude);
        return loss;
    }

    void forward(std::int64_t count, int layer) const {
        const std::int64_t inputs = width(layer), outputs = width(layer + 1);
        V* out = at(layout_.activation[layer + 1]);
        const bool rectifies = is_relu() && layer + 1 < last();
        const Product<V> product{{at(layout_.activation[layer]), inputs, 1},
                                 {at(layout_.weight[layer]), 1, inputs},
                                 at(layout_.bias[layer]),
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
    V cross_entropy(std::int64_t count, V* accuracy) const {
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

    // From the output's delta down. Steps move the parameters; for kGradient each is replaced by its gradient, which is
    // safe because a layer's weights are read for the last time just before.
    template <Purpose kPurpose>
    void backward(std::int64_t count, const Scalar* lr) {
        for (int layer = last() - 1; layer >= 0; --layer) {
            if (layer > 0) data_grad(count, layer);
            if (kPurpose == Purpose::kGradient || p_.adapt[2 * layer] != 0) {
                weight_grad<kPurpose>(count, layer, kPurpose == Purpose::kGradient ? Scalar(0) : lr[2 * layer]);
            }
            if (kPurpose == Purpose::kGradient || p_.adapt[2 * layer + 1] != 0) {
                bias_gradient<kPurpose>(count, layer, kPurpose == Purpose::kGradient ? Scalar(0) : lr[2 * layer + 1]);
            }
        }
    }

    void data_grad(std::int64_t count, int layer) const {
        const std::int64_t inputs = width(layer), outputs = width(layer + 1);
        const V* in = at(layout_.activation[layer]);
        V* below = at(layout_.delta[layer % 2]);
        const Product<V> product{{at(layout_.delta[(layer + 1) % 2]), outputs, 1},
                                 {at(layout_.weight[layer]), inputs, 1},
                                 nullptr,
                                 count,
                                 inputs,
                                 outputs};
        if (is_relu()) {
            multiply(product, Deactivate<V, Activation::kRelu>{in, below, inputs});
        } else {
            multiply(product, Deactivate<V, Activation::kTanh>{in, below, inputs});
        }
    }

    template <Purpose kPurpose>
    void weight_grad(std::int64_t count, int layer, Scalar lr) {
        const std::int64_t inputs = width(layer), outputs = width(layer + 1);
        move<kPurpose>({{at(layout_.delta[(layer + 1) % 2]), 1, outputs},
                        {at(layout_.activation[layer]), inputs, 1},
                        nullptr,
                        outputs,
                        inputs,
                        count},
                       layout_.weight[layer], lr);
    }

    template <Purpose kPurpose>
    void bias_gradient(std::int64_t count, int layer, Scalar lr) {
        const std::int64_t outputs = width(layer + 1);
        const V one = S::all(1);
        move<kPurpose>({{at(layout_.delta[(layer + 1) % 2]), 1, outputs}, {&one, 0, 0}, nullptr, outputs, 1, count},
                       layout_.bias[layer], lr);
    }

    // Parameters at `place` by their gradients, the results of `product`.
    template <Purpose kPurpose>
    void move(const Product<V>& product, std::int64_t place, Scalar lr) {
        each(product.items(), product.work(), [&](std::int64_t begin, std::int64_t end) {
            Move<S, kPurpose> own{at(place), product.columns, S::all(lr), M{}};
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
        give(p_.query_loss + first_, pass(p_.query, &accuracy));
        if (p_.query_accuracy != nullptr) give(p_.query_accuracy + first_, accuracy);
        if (p_.predictions != nullptr) {
            const std::int64_t count = p_.query.count * width(last());
            give_rows(p_.predictions + first_ * count, layout_.activation[last()], count);
        }
        if (grads_ == nullptr) return;
        backward<Purpose::kGradient>(p_.query.count, nullptr);
        give_rows(grads_, layout_.parameters, p_.parameters);
    }

    const MlpMetaStepParams<Scalar>& p_;
    const MlpCpuLayout& layout_;
    const Sharing sharing_;
    V* const memory_;
    const std::int64_t first_;
    const int live_;
    Scalar* const grads_;
    int bad_[kL] = {};  // lanes that met a NaN or an infinity
};

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
