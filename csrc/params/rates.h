// How the rates of the inner steps are given, and whether they have gradients.
#pragma once

#include <cstdint>

namespace signmaml {

struct RateOptions {
    bool by_element;  // lr is [K, P], one rate an element of theta; else [K, tensors]
    bool learnable;   // a row of meta-gradients goes on with the gradients of all rates, laid out like lr
};

// Numbers in a row of meta-gradients: of P parameters in `tensors` tensors, and of their rates at all steps.
constexpr std::int64_t gradient_columns(std::int64_t parameters, std::int64_t tensors, std::int64_t steps,
                                        RateOptions rates) {
    const std::int64_t of_step = rates.by_element ? parameters : tensors;
    return parameters + (rates.learnable ? steps * of_step : 0);
}

}  // namespace signmaml
