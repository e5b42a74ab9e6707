// Steps whose gradient is taken at the sharpest place near the parameters (Sharp-MAML): the way there and back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/conv_passes.h"

namespace signmaml::cpu {

template <typename Scalar>
class ConvSharpness {
  public:
    // `place`: in the task's memory, of all parameters in the order of conv_spans.
    ConvSharpness(const SharpnessOptions& how, ConvPasses<Scalar>& passes, std::int64_t place)
        : how_(how), passes_(passes), kept_(passes.task().at(place)) {}

    // Moves what adapts by its gradients. Returns whether one of them is NaN or infinite: with signs the place is
    // finite all the same.
    bool climb(Wanted wanted) {
        bool nonfinite = false;
        double squares = 0;
        each(wanted, [&](const ConvSpan& span, Scalar* params, const Scalar* grads) {
            nonfinite |= span_kernels<Scalar>(kernels()).holds_nonfinite(grads, span.count);
            std::copy_n(params, span.count, kept_ + span.row);
            if (how_.norm == SharpnessNorm::kLinf) return;
            for (std::int64_t i = 0; i < span.count; ++i) {
                const double scaled = static_cast<double>(grads[i]) * static_cast<double>(size(params[i]));
                squares += scaled * scaled;
            }
        });
        const double by =
            how_.norm == SharpnessNorm::kLinf ? how_.rho : how_.rho / (std::sqrt(squares) + kSharpnessTiny);
        const Scalar factor = static_cast<Scalar>(by);
        each(wanted, [&](const ConvSpan& span, Scalar* params, const Scalar* grads) {
            for (std::int64_t i = 0; i < span.count; ++i) params[i] += factor * direction(params[i], grads[i]);
        });
        return nonfinite;
    }

    // The parameters are where they were before `climb`.
    void come_back(Wanted wanted) {
        each(wanted, [&](const ConvSpan& span, Scalar* params, const Scalar*) {
            std::copy_n(kept_ + span.row, span.count, params);
        });
    }

  private:
    template <typename Visit>
    void each(Wanted wanted, const Visit& visit) {
        const ConvTask<Scalar>& task = passes_.task();
        for (int i = 0; i < passes_.spans().count; ++i) {
            const ConvSpan& span = passes_.spans().span[i];
            if (wanted(span.tensor)) visit(span, task.at(span.parameter), task.at(span.gradient));
        }
    }

    // What a parameter's gradient is multiplied by before its norm is taken.
    Scalar size(Scalar parameter) const { return how_.adaptive ? std::abs(parameter) : Scalar(1); }

    Scalar direction(Scalar parameter, Scalar gradient) const {
        const Scalar scale = size(parameter);
        return scale * (how_.norm == SharpnessNorm::kL2 ? scale * gradient : sign_of(gradient));
    }

    const SharpnessOptions how_;
    ConvPasses<Scalar>& passes_;
    Scalar* const kept_;
};

}  // namespace signmaml::cpu
