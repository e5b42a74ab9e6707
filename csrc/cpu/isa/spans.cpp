// The flat-buffer operations over spans of consecutive elements, written for the compiler to vectorise. CMakeLists.txt
// compiles this file once for each instruction set; SIGNMAML_ISA names the namespace.

#include <cstdint>

#include "cpu/conv_table.h"
#include "cpu/isa/simd.h"
#include "cpu/kernels.h"
#include "cpu/layers_table.h"
#include "cpu/mlp_table.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// x - x is NaN for NaN and infinities, and 0 for every other number.
template <typename Scalar>
inline bool is_nonfinite(Scalar x) {
    return !(x - x == Scalar(0));
}

// Three-valued; sign(+-0) is +0 and sign(nan) is nan. Compare sign_step_kernel and reference.py.
template <typename Scalar>
inline Scalar sign(Scalar x) {
    const Scalar zero_or_nan = x == Scalar(0) ? Scalar(0) : x;
    const Scalar negative_or_rest = x < Scalar(0) ? Scalar(-1) : zero_or_nan;
    return x > Scalar(0) ? Scalar(1) : negative_or_rest;
}

template <typename Scalar, bool kLrPerElement, bool kMasked>
bool sign_step_span(Scalar* __restrict params, const Scalar* __restrict grads, const Scalar* __restrict lr,
                    const std::uint8_t* __restrict mask, std::int64_t n) {
    using Int = typename Bits<Scalar>::Int;
    Int nonfinite = 0;
    const Scalar first_lr = lr[0];
    for (std::int64_t j = 0; j < n; ++j) {
        const Scalar grad = grads[j];
        const Scalar rate = kLrPerElement ? lr[j] : first_lr;
        const Scalar stepped = params[j] - rate * sign(grad);
        const bool looked_at = !kMasked || mask[j] != 0;
        params[j] = looked_at ? stepped : params[j];
        nonfinite |= static_cast<Int>(looked_at & is_nonfinite(grad));
    }
    return nonfinite != 0;
}

template <typename Scalar>
bool sign_step(Scalar* params, const Scalar* grads, const Scalar* lr, bool lr_per_element, const std::uint8_t* mask,
               std::int64_t n) {
    if (n <= 0) return false;
    if (mask != nullptr) {
        return lr_per_element ? sign_step_span<Scalar, true, true>(params, grads, lr, mask, n)
                              : sign_step_span<Scalar, false, true>(params, grads, lr, mask, n);
    }
    return lr_per_element ? sign_step_span<Scalar, true, false>(params, grads, lr, mask, n)
                          : sign_step_span<Scalar, false, false>(params, grads, lr, mask, n);
}

// Compare next_count and from_count in kernels/compact_sign_step.cuh. The counts are widened to the scalars' width, so
// that one vector holds both.
template <typename Scalar, bool kLrPerElement>
bool compact_sign_step_span(std::int8_t* __restrict counts, Scalar* __restrict params, const Scalar* __restrict theta,
                            const Scalar* __restrict grads, const Scalar* __restrict lr, std::int64_t n) {
    using Int = typename Bits<Scalar>::Int;
    constexpr Int kNanCount = -128;
    constexpr Scalar kNan = __builtin_nanf("");
    Int nonfinite = 0;
    const Scalar first_lr = lr[0];
    for (std::int64_t j = 0; j < n; ++j) {
        const Scalar grad = grads[j];
        const Int count = counts[j];
        const Int next = count + (grad > Scalar(0) ? Int(1) : Int(0)) - (grad < Scalar(0) ? Int(1) : Int(0));
        const bool is_number = (count != kNanCount) & (grad == grad) & (next <= 127) & (next != kNanCount);
        const Int stored = is_number ? next : kNanCount;
        counts[j] = static_cast<std::int8_t>(stored);
        const Scalar rate = kLrPerElement ? lr[j] : first_lr;
        const Scalar stepped = theta[j] - rate * static_cast<Scalar>(stored);
        params[j] = is_number ? stepped : kNan;
        nonfinite |= static_cast<Int>(is_nonfinite(grad) | !is_number);
    }
    return nonfinite != 0;
}

template <typename Scalar>
bool compact_sign_step(std::int8_t* counts, Scalar* params, const Scalar* theta, const Scalar* grads, const Scalar* lr,
                       bool lr_per_element, std::int64_t n) {
    if (n <= 0) return false;
    return lr_per_element ? compact_sign_step_span<Scalar, true>(counts, params, theta, grads, lr, n)
                          : compact_sign_step_span<Scalar, false>(counts, params, theta, grads, lr, n);
}

template <typename Scalar>
unsigned accumulate_one(Scalar* __restrict sums, const Scalar* __restrict grads, std::int64_t n) {
    using Int = typename Bits<Scalar>::Int;
    Int nonfinite = 0;
    for (std::int64_t j = 0; j < n; ++j) {
        sums[j] += grads[j];
        nonfinite |= static_cast<Int>(is_nonfinite(grads[j]));
    }
    return nonfinite != 0 ? 1 : 0;
}

template <typename Scalar>
unsigned accumulate_four(Scalar* __restrict sums, const Scalar* __restrict a, const Scalar* __restrict b,
                         const Scalar* __restrict c, const Scalar* __restrict d, std::int64_t n) {
    using Int = typename Bits<Scalar>::Int;
    Int nonfinite = 0;
    for (std::int64_t j = 0; j < n; ++j) {
        sums[j] = (((sums[j] + a[j]) + b[j]) + c[j]) + d[j];
        nonfinite |= (is_nonfinite(a[j]) ? Int(1) : Int(0)) | (is_nonfinite(b[j]) ? Int(2) : Int(0)) |
                     (is_nonfinite(c[j]) ? Int(4) : Int(0)) | (is_nonfinite(d[j]) ? Int(8) : Int(0));
    }
    return static_cast<unsigned>(nonfinite);
}

template <typename Scalar>
unsigned accumulate(Scalar* sums, const Scalar* const* rows, int count, std::int64_t n) {
    static_assert(kRowsAtOnce == 4, "accumulate_four adds four rows");
    if (count == kRowsAtOnce) return accumulate_four(sums, rows[0], rows[1], rows[2], rows[3], n);
    unsigned nonfinite = 0;
    for (int r = 0; r < count; ++r) nonfinite |= accumulate_one(sums, rows[r], n) << r;
    return nonfinite;
}

template <typename Scalar>
void add_mean(Scalar* __restrict out, const Scalar* __restrict sums, Scalar count, std::int64_t n) {
    for (std::int64_t j = 0; j < n; ++j) out[j] += sums[j] / count;
}

template <typename Scalar>
bool holds_nonfinite(const Scalar* __restrict grads, std::int64_t n) {
    using Int = typename Bits<Scalar>::Int;
    Int nonfinite = 0;
    for (std::int64_t j = 0; j < n; ++j) nonfinite |= static_cast<Int>(is_nonfinite(grads[j]));
    return nonfinite != 0;
}

template <typename Scalar>
constexpr SpanKernels<Scalar> table() {
    return {sign_step<Scalar>, compact_sign_step<Scalar>, accumulate<Scalar>, add_mean<Scalar>,
            holds_nonfinite<Scalar>};
}

}  // namespace

#define SIGNMAML_TEXT_OF(x) #x
#define SIGNMAML_TEXT(x) SIGNMAML_TEXT_OF(x)

extern const Kernels kKernels;
const Kernels kKernels = {
    SIGNMAML_TEXT(SIGNMAML_ISA), table<float>(), table<double>(), &kConvStages, &kMlpStages, &kLayersStages};

}  // namespace signmaml::cpu::SIGNMAML_ISA
