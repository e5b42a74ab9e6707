// Gradients of rates that are learnable. With v the derivative of the query loss in the parameters after a step, the
// gradient of a rate is -<v, direction of the step> over what shares it: a tensor, or nothing.
//   conv_rate_grads  a thread block sums a tensor's products; or each thread takes elements, if these have rates
// Grid: x tensors, or pieces of a task's weights; y tasks; z steps. Launched by launch_conv_meta_step.
// Readable twin: StepRates.sum_to_rate in signmaml_ext/problem.py.
#pragma once

#include <cstdint>

#include "kernels/conv_common.cuh"
#include "kernels/conv_update.cuh"

namespace signmaml {

// Where a tensor of theta is in packed weights. A convolution's bias, which never moves, is nowhere.
struct ConvSpanOfTensor {
    std::int64_t begin, end;
};

__device__ inline ConvSpanOfTensor packed_span(const ConvNetwork& net, int tensor) {
    if (tensor == net.tensors - 1) return {net.head_bias, net.head_bias + net.ways};
    if (tensor == net.tensors - 2) return {net.head_weight, net.head_bias};
    int number = net.count - 1;
    while (tensor < net.blocks[number].tensor) --number;
    const ConvOffsets& block = net.blocks[number];
    if (tensor == block.tensor) return {block.weight, block.gamma};
    if (tensor == gamma_tensor(net, number)) return {block.gamma, block.beta};
    if (tensor == gamma_tensor(net, number) + 1) return {block.beta, block.beta + net.filters};
    return {0, 0};
}

__global__ void __launch_bounds__(kConvUpdateThreads) conv_rate_grads_kernel(const ConvRateGradsParams p) {
    const std::int64_t task = blockIdx.y, step = blockIdx.z;
    const ConvNetwork& net = p.network;
    const float* kept = row_of(p.kept, task) + step * p.packed;
    const float* grads = p.grads + task * net.parameters;
    if (p.by_element) {
        float* result = p.rate_grads + task * p.row + step * net.parameters;
        const std::int64_t threads = std::int64_t{gridDim.x} * kConvUpdateThreads;
        const std::int64_t first = std::int64_t{blockIdx.x} * kConvUpdateThreads + threadIdx.x;
        for (std::int64_t place = first; place < net.head_bias + net.ways; place += threads) {
            const std::int64_t theta = theta_place(net, place);
            const bool moves = load(p.adapt + theta_tensor(net, place)) != 0;
            store(result + theta, moves ? -(load(grads + theta) * load(kept + place)) : 0.0f);
        }
        if (!net.conv_bias) return;
        for (std::int64_t i = first; i < net.count * net.filters; i += threads) {  // biases never change
            store(result + net.blocks[i / net.filters].theta_bias + i % net.filters, 0.0f);
        }
        return;
    }
    const int tensor = static_cast<int>(blockIdx.x);
    const ConvSpanOfTensor span = packed_span(net, tensor);
    const bool moves = load(p.adapt + tensor) != 0;
    float sum = 0.0f;
    for (std::int64_t place = span.begin + threadIdx.x; moves && place < span.end; place += kConvUpdateThreads) {
        sum += load(grads + theta_place(net, place)) * load(kept + place);
    }
    sum = block_sum(sum, Shared<float>(0, kConvUpdateThreads / 32));
    if (threadIdx.x == 0) store(p.rate_grads + task * p.row + step * net.tensors + tensor, -sum);
}

}  // namespace signmaml
