// Sharpness-aware steps: the sharpest place near the weights, by the gradient g there, at which the step's own gradient
// is taken then.
//   conv_climb_squares  sums of squares for the norm of g over all that adapts, a slice a thread block
//   conv_climb          weights + eps, and block 1's constants there
// eps is rho g / (|g| + tiny) or rho sign(g), of what adapts; see signmaml_ext/sharpness.py for the adaptive forms.
// Launched by launch_conv_meta_step. Readable twin: ascent in signmaml_ext/sharpness.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/conv_common.cuh"
#include "kernels/conv_update.cuh"

namespace signmaml {

// What a parameter's gradient is multiplied by before its norm is taken.
__device__ inline float ascent_scale(const SharpnessOptions& how, float weight) {
    return how.adaptive ? fabsf(weight) : 1.0f;
}

// The sums are of doubles: a square of a float may be too large for a float, or too small.
__global__ void __launch_bounds__(kConvUpdateThreads) conv_climb_squares_kernel(const ConvClimbParams p) {
    const std::int64_t task = blockIdx.y, end = p.network.head_bias + p.network.ways;
    const float* weights = row_of(p.weights, task);
    const float* gradient = row_of(p.gradient, task);
    double sum = 0.0;
    for (std::int64_t place = std::int64_t{blockIdx.x} * kConvUpdateThreads + threadIdx.x; place < end;
         place += std::int64_t{gridDim.x} * kConvUpdateThreads) {
        if (load(p.adapt + theta_tensor(p.network, place)) == 0) continue;
        const double scale = ascent_scale(p.sharpness, load(weights + place));
        const double scaled = scale * static_cast<double>(load(gradient + place));
        sum += scaled * scaled;
    }
    sum = block_sum(sum, Shared<double>(0, kConvUpdateThreads / 32));
    if (threadIdx.x == 0) store(row_of(p.squares, task) + blockIdx.x, sum);
}

// Thread block 0 owns the convolution weights of the network's block 1 and computes what depends on them.
__global__ void __launch_bounds__(kConvUpdateThreads) conv_climb_kernel(const ConvClimbParams p) {
    const std::int64_t task = blockIdx.y;
    const ConvNetwork& net = p.network;
    const ConvOffsets& first = net.blocks[0];
    const float* weights = row_of(p.weights, task);
    const float* gradient = row_of(p.gradient, task);
    float* raised = row_of(p.raised, task);
    double by = p.sharpness.rho;
    if (p.sharpness.norm == SharpnessNorm::kL2) {
        double squares = 0.0;
        for (int slice = 0; slice < p.slices; ++slice) squares += load(row_of(p.squares, task) + slice);
        by /= sqrt(squares) + kSharpnessTiny;
    }
    const auto factor = static_cast<float>(by);
    const auto climb = [&](std::int64_t place) {
        const float weight = load(weights + place);
        float eps = 0.0f;
        if (load(p.adapt + theta_tensor(net, place)) != 0) {
            const float of_gradient = load(gradient + place), scale = ascent_scale(p.sharpness, weight);
            const bool by_sign = p.sharpness.norm == SharpnessNorm::kLinf;
            eps = factor * (scale * (by_sign ? sign(of_gradient) : scale * of_gradient));
        }
        store(raised + place, weight + eps);
    };
    if (blockIdx.x == 0) {
        for (std::int64_t place = threadIdx.x; place < first.gamma; place += kConvUpdateThreads) climb(place);
        if (!net.by_covariance) return;
        block_barrier();  // the raised weights of block 1 are there
        first_norm(row_of(p.moments, task), raised + first.weight, net.channels, net.filters, p.eps,
                   row_of(p.norm, task));
        return;
    }
    const std::int64_t threads = std::int64_t{gridDim.x - 1} * kConvUpdateThreads;
    for (std::int64_t place = first.gamma + std::int64_t{blockIdx.x - 1} * kConvUpdateThreads + threadIdx.x;
         place < net.head_bias + net.ways; place += threads) {
        climb(place);
    }
}

}  // namespace signmaml
