// The inner loops of the CPU backend, over spans of consecutive elements, once for each instruction set.
#pragma once

#include <cstdint>

namespace signmaml::cpu {

struct ConvStageTables;
struct LayersStageTables;
struct MlpStageTables;

// Rows that one pass over the sums adds: enough streams to keep the memory busy.
inline constexpr int kRowsAtOnce = 4;

template <typename Scalar>
struct SpanKernels {
    // params -= lr * sign(grads) where mask allows. lr: one value, or [n] if lr_per_element; mask: [n] or null.
    // Returns whether a gradient that was looked at is NaN or infinite.
    bool (*sign_step)(Scalar* params, const Scalar* grads, const Scalar* lr, bool lr_per_element,
                      const std::uint8_t* mask, std::int64_t n);
    // counts += sign(grads) with the rules of next_count, params = theta - lr * counts. lr as above. Returns whether a
    // gradient is NaN or infinite or a count is NaN.
    bool (*compact_sign_step)(std::int8_t* counts, Scalar* params, const Scalar* theta, const Scalar* grads,
                              const Scalar* lr, bool lr_per_element, std::int64_t n);
    // sums += rows[0], then rows[1] and so on, count of them, at most kRowsAtOnce. Returns which rows hold a NaN or an
    // infinity: bit r for rows[r].
    unsigned (*accumulate)(Scalar* sums, const Scalar* const* rows, int count, std::int64_t n);
    // out += sums / count
    void (*add_mean)(Scalar* out, const Scalar* sums, Scalar count, std::int64_t n);
    bool (*holds_nonfinite)(const Scalar* grads, std::int64_t n);
};

struct Kernels {
    const char* name;
    SpanKernels<float> float32;
    SpanKernels<double> float64;
    const ConvStageTables* conv_stages;
    const MlpStageTables* mlp_stages;
    const LayersStageTables* layers_stages;
};

template <typename Scalar>
const SpanKernels<Scalar>& span_kernels(const Kernels& kernels);

template <>
inline const SpanKernels<float>& span_kernels<float>(const Kernels& kernels) {
    return kernels.float32;
}

template <>
inline const SpanKernels<double>& span_kernels<double>(const Kernels& kernels) {
    return kernels.float64;
}

namespace portable {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace signmaml::cpu
