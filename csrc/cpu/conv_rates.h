// Inner steps whose rates vary within a tensor or that are counted, and the gradients of rates. With v the derivative
// of the query loss in the parameters after a step, and the step phi - rate * direction, the gradient of a rate is -<v,
// direction> over what shares it. Rows are in theta's order here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/conv_passes.h"
#include "params/compact_sign_step.h"

namespace signmaml::cpu {

template <typename Scalar>
class ConvRates {
  public:
    ConvRates(const ConvMetaStepParams<Scalar>& p, const ConvKeptLayout& layout, const ConvStages<Scalar>& stages,
              const Tensors& tensors, ConvPasses<Scalar>& passes)
        : p_(p), layout_(layout), stages_(stages), tensors_(tensors), passes_(passes) {}

    // Before the first step of a task.
    void start() {
        if (p_.how.counted) {
            std::fill_n(row(layout_.parameters), p_.parameters, Scalar(0));
            std::copy_n(p_.theta, p_.parameters, adjoint());
        } else if (p_.how.rates.by_element) {
            std::copy_n(p_.theta, p_.parameters, row(layout_.parameters));
        }
    }

    // Keeps the direction of a step, from the gradients of its parameters.
    void keep_direction(std::int64_t step) {
        Scalar* to = direction(step);
        passes_.give(to, /*grads=*/true);
        if (p_.method != Method::kSignMaml) return;
        each_adapted([&](int, const Tensor& tensor) {
            for (Scalar* g = to + tensor.first; g < to + tensor.first + tensor.size; ++g) *g = sign_of(*g);
        });
    }

    // The step of all parameters that adapt, with rates of their own. Returns whether a gradient is NaN or infinite.
    bool move(std::int64_t step) {
        bool nonfinite = false;
        for (int i = 0; i < passes_.spans().count; ++i) {
            const ConvSpan& span = passes_.spans().span[i];
            if (p_.adapt[span.tensor] == 0) continue;
            nonfinite |= span_kernels<Scalar>(kernels()).holds_nonfinite(passes_.task().at(span.gradient), span.count);
        }
        if (p_.how.counted) {
            count(step);
            return nonfinite;
        }
        const Scalar* lr = rates(step);
        const Scalar* from = direction(step);
        Scalar* phi = row(layout_.parameters);
        each_adapted([&](int, const Tensor& tensor) {
            for (std::int64_t i = tensor.first; i < tensor.first + tensor.size; ++i) phi[i] -= lr[i] * from[i];
        });
        passes_.pack(passes_.task(), phi);
        return nonfinite;
    }

    // Counts of sign steps; a NaN stays one until here.
    void give_counts(std::int8_t* to) const {
        const Scalar* counts = row(layout_.parameters);
        for (std::int64_t i = 0; i < p_.parameters; ++i) {
            to[i] = static_cast<std::int8_t>(counts[i] == counts[i] ? static_cast<int>(counts[i]) : kNanCount);
        }
    }

    // Adds the gradients of a step's rates, from the derivative of the query loss in the parameters after it.
    void gradients(std::int64_t step, const Scalar* adjoint, Scalar* all) const {
        const Scalar* along = direction(step);
        Scalar* to = all + p_.how.rates.row(step) * of_row();
        each_adapted([&](int number, const Tensor& tensor) {
            if (p_.how.rates.by_element) {
                for (std::int64_t i = tensor.first; i < tensor.first + tensor.size; ++i) to[i] -= adjoint[i] * along[i];
            } else {
                to[number] -= stages_.dot(adjoint + tensor.first, along + tensor.first, tensor.size);
            }
        });
    }

    // Room for a row: the derivative of the query loss on its way back through the steps.
    Scalar* adjoint() const { return row(layout_.adjoint); }

    // A row <- the step's rates times it, 0 where nothing adapts.
    void scale(std::int64_t step, Scalar* to) const {
        const Scalar* lr = rates(step);
        for (int number = 0; number < conv_tensors(p_.shape); ++number) {
            const Tensor& tensor = tensors_.all[number];
            const bool adapts = p_.adapt[number] != 0;
            for (std::int64_t i = tensor.first; i < tensor.first + tensor.size; ++i) {
                to[i] = adapts ? lr[i] * to[i] : Scalar(0);
            }
        }
    }

  private:
    // Until the query set the adjoint's place has the parameters.
    void count(std::int64_t step) {
        const Scalar* from = direction(step);
        Scalar* counts = row(layout_.parameters);
        Scalar* phi = adjoint();
        const bool by_element = p_.how.rates.by_element;
        const Scalar* lr = rates(step);
        each_adapted([&](int number, const Tensor& tensor) {
            for (std::int64_t i = tensor.first; i < tensor.first + tensor.size; ++i) {
                counts[i] += from[i];
                phi[i] = p_.theta[i] - lr[by_element ? i : number] * counts[i];
            }
        });
        passes_.pack(passes_.task(), phi);
    }

    std::int64_t of_row() const { return p_.how.rates.of_row(p_.parameters, conv_tensors(p_.shape)); }
    const Scalar* rates(std::int64_t step) const { return p_.lr + p_.how.rates.row(step) * of_row(); }

    Scalar* row(std::int64_t place) const { return passes_.task().at(place); }
    // Kept for every step if the rates have gradients.
    Scalar* direction(std::int64_t step) const {
        return row(layout_.directions + (p_.how.rates.learnable ? step * p_.parameters : 0));
    }

    template <typename Visit>
    void each_adapted(const Visit& visit) const {
        for (int number = 0; number < conv_tensors(p_.shape); ++number) {
            if (p_.adapt[number] != 0) visit(number, tensors_.all[number]);
        }
    }

    const ConvMetaStepParams<Scalar>& p_;
    const ConvKeptLayout& layout_;
    const ConvStages<Scalar>& stages_;
    const Tensors& tensors_;
    ConvPasses<Scalar>& passes_;
};

}  // namespace signmaml::cpu
