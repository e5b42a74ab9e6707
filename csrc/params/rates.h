// How the rates of the inner steps are given, and whether they have gradients.
#pragma once

#include <cstdint>

namespace signmaml {

struct RateOptions {
    bool by_element;  // a row of lr is [P], one rate an element of theta; else [tensors]
    bool by_step;     // lr has a row for each step; else one, which serves all steps
    bool learnable;   // a row of meta-gradients goes on with the gradients of all rates, laid out like lr

    constexpr std::int64_t of_row(std::int64_t parameters, std::int64_t tensors) const {
        return by_element ? parameters : tensors;
    }
    constexpr std::int64_t row(std::int64_t step) const { return by_step ? step : 0; }
    constexpr std::int64_t rows(std::int64_t steps) const { return by_step || steps == 0 ? steps : 1; }
};

// Numbers in a row of meta-gradients: of P parameters in `tensors` tensors, and of their rates.
constexpr std::int64_t gradient_columns(std::int64_t parameters, std::int64_t tensors, std::int64_t steps,
                                        RateOptions rates) {
    return parameters + (rates.learnable ? rates.rows(steps) * rates.of_row(parameters, tensors) : 0);
}

}  // namespace signmaml
