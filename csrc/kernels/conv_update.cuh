// The weights of all tasks, packed as [9 * channels, filters] for each block of the network.
//   conv_pack             copies theta to every task's weights; computes the patches' mean and covariance from slices
//   conv_sign_update      adds the slices' partial gradients in order, takes the sign, updates the weight
//   conv_meta_accumulate  the same sums for the query pass, written as a task's row of meta-gradients in theta's order
//   conv_unpack           copies every task's weights, or the counts of its steps, back to theta's order
// Within a task, thread block 0 owns the parameters of the network's block 1 (by covariance), thread block 1 all other
// BatchNorm parameters, and the others the remaining convolution weights, one element per thread. Launched by
// launch_conv_meta_step.
// Readable twins: sign_step and meta_accumulate in signmaml_ext/reference.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/conv_common.cuh"
#include "params/compact_sign_step.h"

namespace signmaml {

inline constexpr int kConvUpdateThreads = 256;

// Shared memory of pack and update: doubles for the statistics of block 1, then floats for its gradients.
//   [kConvPatch, filters] double, [1 + kConvPatch, filters] float, [filters] float
template <typename T>
__device__ inline Shared<T> first_memory(int filters, int which) {
    const std::int64_t doubles = std::int64_t{kConvPatch} * filters * 8;
    const std::int64_t floats = std::int64_t{1 + kConvPatch} * filters * 4;
    if (which == 0) return Shared<T>(0, std::int64_t{kConvPatch} * filters);
    return which == 1 ? Shared<T>(doubles, std::int64_t{1 + kConvPatch} * filters)
                      : Shared<T>(doubles + floats, filters);
}

// Mean and covariance of the patches from the slices' sums, each around its own shift. Called by all threads of a
// block.
__device__ inline void join_moments(const ConvMomentSums* slices, int count_of_slices, int channels, ConvMoments* out) {
    const int values = kConvTaps * channels;
    double count = 0.0;
    for (int slice = 0; slice < count_of_slices; ++slice) count += load(&slices[slice].count);
    // Each thread computes the mean of one patch value.
    for (int i = threadIdx.x; i < values; i += kConvUpdateThreads) {
        double mean = 0.0, center = 0.0;
        const int at_center = kConvTaps / 2 * channels + i % channels;
        for (int slice = 0; slice < count_of_slices; ++slice) {
            const double share = load(&slices[slice].count), shift = load(&slices[slice].shift[i % channels]);
            mean += share * shift + load(&slices[slice].sum[i]);
            center += share * shift + load(&slices[slice].sum[at_center]);
        }
        const auto shift = static_cast<float>(center / count);
        store(&out->mean[i], mean / count - static_cast<double>(shift));
        if (i < channels) store(&out->shift[i], shift);
    }
    block_barrier();  // the means are there
    for (int pair = threadIdx.x; pair < values * values; pair += kConvUpdateThreads) {
        const int i = pair / values, j = pair % values;
        const int low = i < j ? i : j, high = i < j ? j : i;
        const double mean_low = load(&out->mean[low]) + static_cast<double>(load(&out->shift[low % channels]));
        const double mean_high = load(&out->mean[high]) + static_cast<double>(load(&out->shift[high % channels]));
        double sum = 0.0;
        for (int slice = 0; slice < count_of_slices; ++slice) {
            const ConvMomentSums* of = slices + slice;
            const double to_low = load(&of->shift[low % channels]) - mean_low;
            const double to_high = load(&of->shift[high % channels]) - mean_high;
            sum += load(&of->product[low][high]) + to_low * load(&of->sum[high]) + to_high * load(&of->sum[low]) +
                   to_low * to_high * load(&of->count);
        }
        store(&out->covariance[i][j], sum / count);
    }
    block_barrier();  // the covariance is there
}

// (G w)_i, of one filter.
__device__ inline double covariance_times(const ConvMoments* moments, const float* weights, int i, int filter,
                                          int values, int filters) {
    double sum = 0.0;
    for (int j = 0; j < values; ++j) {
        sum += load(&moments->covariance[i][j]) * static_cast<double>(load(weights + j * filters + filter));
    }
    return sum;
}

// other_i (G w)_i of all filters. Called by all threads of a block.
__device__ inline void covariance_products(const ConvMoments* moments, const float* weights, const float* other,
                                           int values, int filters, const Shared<double>& products) {
    for (int item = threadIdx.x; item < values * filters; item += kConvUpdateThreads) {
        const double dense = covariance_times(moments, weights, item / filters, item % filters, values, filters);
        products.set(item, dense * static_cast<double>(load(other + item)));
    }
}

// BatchNorm's constants of block 1: mean(z) = W m and var(z) = W G W^T, in double because W may point along a direction
// of small variance. Called by all threads of a block; the weights are in global memory.
__device__ inline void first_norm(const ConvMoments* moments, const float* weights, int channels, int filters,
                                  float eps, ConvFirstNorm* norm) {
    const int values = kConvTaps * channels;
    const Shared<double> products = first_memory<double>(filters, 0);
    covariance_products(moments, weights, weights, values, filters, products);
    block_barrier();  // w_i (G w)_i are there
    for (int filter = threadIdx.x; filter < filters; filter += kConvUpdateThreads) {
        double variance = 0.0, mean = 0.0;
        for (int i = 0; i < values; ++i) {
            variance += products.get(i * filters + filter);
            mean += load(&moments->mean[i]) * static_cast<double>(load(weights + i * filters + filter));
        }
        store(&norm->mean[filter], static_cast<float>(mean));
        const double positive = variance < 0.0 ? 0.0 : variance;  // rounding can make it negative; NaN stays
        store(&norm->inverse[filter], static_cast<float>(1.0 / sqrt(positive + static_cast<double>(eps))));
    }
}

// The index in theta of an element of a task's packed weights.
__device__ inline std::int64_t theta_place(const ConvNetwork& net, std::int64_t place) {
    if (place >= net.head_bias) return net.theta_head_bias + place - net.head_bias;
    if (place >= net.head_weight) {
        // torch flattens filter by filter; features are stored pixel by pixel here.
        const std::int64_t width = std::int64_t{net.pixels} * net.filters, i = place - net.head_weight;
        return net.theta_head_weight + i / width * width + i % net.filters * net.pixels + i % width / net.filters;
    }
    int number = net.count - 1;
    while (place < net.blocks[number].weight) --number;
    const ConvOffsets& block = net.blocks[number];
    if (place >= block.beta) return block.theta_beta + place - block.beta;
    if (place >= block.gamma) return block.theta_gamma + place - block.gamma;
    const std::int64_t i = place - block.weight;
    const std::int64_t filter = i % net.filters, channel = i / net.filters % block.in_channels;
    return block.theta_weight + (filter * block.in_channels + channel) * kConvTaps +
           i / net.filters / block.in_channels;
}

// One thread block per task and piece.
__global__ void __launch_bounds__(kConvUpdateThreads) conv_pack_kernel(const ConvPackParams p) {
    const std::int64_t task = blockIdx.y;
    const ConvNetwork& net = p.network;
    float* weights = row_of(p.weights, task);
    const auto put = [&](std::int64_t i) {
        store(weights + i, load(p.theta + theta_place(net, i)));
        if (p.counts.base != nullptr) store(row_of(p.counts, task) + i, 0.0f);
    };
    // Thread block 0 packs the convolution weights of the network's block 1 and computes what depends on them; the
    // others pack the rest.
    const ConvOffsets& first = net.blocks[0];
    if (blockIdx.x == 0) {
        for (std::int64_t i = threadIdx.x; i < first.gamma; i += kConvUpdateThreads) put(i);
        if (!net.by_covariance) return;
        if (p.support_slices > 0) {
            join_moments(row_of(p.support_sums, task), p.support_slices, net.channels, row_of(p.support, task));
        }
        if (p.query_slices > 0) {
            join_moments(row_of(p.query_sums, task), p.query_slices, net.channels, row_of(p.query, task));
        }
        first_norm(p.starts_with_query ? row_of(p.query, task) : row_of(p.support, task), weights + first.weight,
                   net.channels, net.filters, p.eps, row_of(p.norm, task));
        return;
    }
    const std::int64_t end = net.head_bias + net.ways;
    const std::int64_t threads = std::int64_t{gridDim.x - 1} * kConvUpdateThreads;
    for (std::int64_t i = first.gamma + std::int64_t{blockIdx.x - 1} * kConvUpdateThreads + threadIdx.x; i < end;
         i += threads) {
        put(i);
    }
}

__global__ void __launch_bounds__(kConvUpdateThreads) conv_unpack_kernel(const ConvUnpackParams p) {
    const std::int64_t task = blockIdx.y;
    const ConvNetwork& net = p.network;
    const float* weights = row_of(p.weights, task);
    const std::int64_t row = task * net.parameters;
    const std::int64_t first = std::int64_t{blockIdx.x} * kConvUpdateThreads + threadIdx.x;
    const std::int64_t threads = std::int64_t{gridDim.x} * kConvUpdateThreads;
    const auto give = [&](std::int64_t place, float value) {
        if (p.counts == nullptr) {
            store(p.adapted + row + place, value);
        } else {
            store(p.counts + row + place, static_cast<std::int8_t>(value == value ? value : kNanCount));
        }
    };
    for (std::int64_t i = first; i < net.head_bias + net.ways; i += threads) {
        give(theta_place(net, i), load(weights + i));
    }
    if (!net.conv_bias) return;
    for (std::int64_t i = first; i < net.count * net.filters; i += threads) {  // biases never change
        const std::int64_t place = net.blocks[i / net.filters].theta_bias + i % net.filters;
        give(place, p.counts == nullptr ? load(p.theta + place) : 0.0f);
    }
}

// What becomes of a gradient: it moves its parameter, is the result, or is subtracted from the result.
enum class ConvTake { kMove, kWrite, kSubtract };

// Handles one element. `tensor` is the index of its tensor in theta. Returns whether what it read or left is nonfinite.
template <ConvTake kTake>
__device__ inline bool take(const ConvUpdateParams& p, std::int64_t task, std::int64_t place, std::int64_t theta,
                            int tensor, float gradient) {
    if (kTake != ConvTake::kMove) {
        float* result = p.grads + task * p.network.parameters + theta;
        const float value = kTake == ConvTake::kWrite ? gradient : load(result) - gradient;
        store(result, value);
        return is_nonfinite(value);
    }
    if (load(p.rule.adapt + tensor) == 0) return false;
    move_by(p.rule, task, place, theta, tensor, gradient);
    return is_nonfinite(gradient);
}

// BatchNorm's tensors come after the convolution's weight and bias.
__device__ inline int gamma_tensor(const ConvNetwork& net, int block) {
    return net.blocks[block].tensor + (net.conv_bias ? 2 : 1);
}

// Gradients of the network's block 1 from its sums at the winners, with patches centred on their mean:
//   B = sum dy (patch - m),  dgamma = r W B,  dW = gamma r (B - dgamma r G W),  dbeta = sum dy.
template <ConvTake kTake>
__device__ inline bool take_first(const ConvUpdateParams& p, std::int64_t task) {
    const ConvNetwork& net = p.network;
    const ConvOffsets& places = net.blocks[0];
    const int filters = net.filters, values = kConvTaps * net.channels;
    const Shared<float> sums = first_memory<float>(filters, 1), dgammas = first_memory<float>(filters, 2);
    const ConvMoments* moments = row_of(p.moments, task);
    const ConvFirstNorm* norm = row_of(p.norm, task);
    const float* partials = row_of(p.first_partials, task);
    const float* weights = row_of(p.weights, task);
    bool nonfinite = false;

    const std::int64_t of_slice = std::int64_t{1 + values} * filters;
    for (int item = threadIdx.x; item < (1 + values) * filters; item += kConvUpdateThreads) {
        sums.set(item, sum_of_slices(partials + item, p.first_slices, of_slice));
    }
    block_barrier();  // sum dy and sum dy (patch - shift) are there
    for (int filter = threadIdx.x; filter < filters; filter += kConvUpdateThreads) {
        const float dbeta = sums.get(filter);
        float dgamma = 0.0f;
        for (int i = 0; i < values; ++i) {
            const float centred =
                sums.get((1 + i) * filters + filter) - dbeta * static_cast<float>(load(&moments->mean[i]));
            dgamma += load(weights + places.weight + i * filters + filter) * centred;
        }
        dgammas.set(filter, dgamma * load(&norm->inverse[filter]));
    }
    block_barrier();  // dgamma is there
    for (int item = threadIdx.x; item < values * filters; item += kConvUpdateThreads) {
        const int i = item / filters, filter = item % filters;
        const float inverse = load(&norm->inverse[filter]);
        const double dense = covariance_times(moments, weights + places.weight, i, filter, values, filters);
        const float centred =
            sums.get((1 + i) * filters + filter) - sums.get(filter) * static_cast<float>(load(&moments->mean[i]));
        const float inner = centred - dgammas.get(filter) * inverse * static_cast<float>(dense);
        sums.set((1 + i) * filters + filter, load(weights + places.gamma + filter) * inverse * inner);
    }
    block_barrier();  // all gradients are there; all have read the weights that now move
    for (int item = threadIdx.x; item < values * filters; item += kConvUpdateThreads) {
        const int i = item / filters, filter = item % filters;
        const std::int64_t theta = places.theta_weight +
                                   (std::int64_t{filter} * net.channels + i % net.channels) * kConvTaps +
                                   i / net.channels;
        nonfinite |= take<kTake>(p, task, places.weight + item, theta, places.tensor, sums.get(filters + item));
    }
    for (int filter = threadIdx.x; filter < filters; filter += kConvUpdateThreads) {
        const int tensor = gamma_tensor(net, 0);
        nonfinite |=
            take<kTake>(p, task, places.gamma + filter, places.theta_gamma + filter, tensor, dgammas.get(filter));
        nonfinite |=
            take<kTake>(p, task, places.beta + filter, places.theta_beta + filter, tensor + 1, sums.get(filter));
    }
    if (kTake == ConvTake::kMove && p.next_moments.base != nullptr) {
        block_barrier();  // the weights have moved
        first_norm(row_of(p.next_moments, task), row_of(p.rule.weights, task) + places.weight, net.channels, filters,
                   p.eps, row_of(p.norm, task));
    }
    return nonfinite;
}

// BatchNorm's parameters, and the gradient of the convolutions' biases, which is exactly 0.
template <ConvTake kTake>
__device__ inline bool take_norms(const ConvUpdateParams& p, std::int64_t task) {
    const ConvNetwork& net = p.network;
    bool nonfinite = false;
    for (int item = threadIdx.x; item < net.count * net.filters; item += kConvUpdateThreads) {
        const int block = item / net.filters, filter = item % net.filters;
        const ConvOffsets& places = net.blocks[block];
        if (kTake == ConvTake::kWrite && net.conv_bias)
            store(p.grads + task * net.parameters + places.theta_bias + filter, 0.0f);
        if (block == 0 && net.by_covariance) continue;
        const float* sums = row_of(p.grad_sums[block], task) + filter;
        const int slices = p.grad_sums_slices[block], tensor = gamma_tensor(net, block);
        const float dbeta = sum_of_slices(sums, slices, 2 * net.filters);
        const float dgamma = sum_of_slices(sums + net.filters, slices, 2 * net.filters);
        nonfinite |= take<kTake>(p, task, places.gamma + filter, places.theta_gamma + filter, tensor, dgamma);
        nonfinite |= take<kTake>(p, task, places.beta + filter, places.theta_beta + filter, tensor + 1, dbeta);
    }
    return nonfinite;
}

// Every blocks-th piece of the convolution weights, starting with `piece`.
template <ConvTake kTake>
__device__ inline bool take_weights(const ConvUpdateParams& p, std::int64_t task, int piece, int blocks) {
    const ConvNetwork& net = p.network;
    bool nonfinite = false;
    for (int block = net.by_covariance ? 1 : 0; block < net.count; ++block) {
        const ConvOffsets& places = net.blocks[block];
        const int elements = kConvTaps * places.in_channels * net.filters;
        const float* partials = row_of(p.weight_partials[block], task);
        for (int item = piece * kConvUpdateThreads + static_cast<int>(threadIdx.x); item < elements;
             item += blocks * kConvUpdateThreads) {
            const float gradient = sum_of_slices(partials + item, p.weight_slices[block], elements);
            const int filter = item % net.filters, channel = item / net.filters % places.in_channels;
            const std::int64_t theta = places.theta_weight +
                                       (std::int64_t{filter} * places.in_channels + channel) * kConvTaps +
                                       item / net.filters / places.in_channels;
            nonfinite |= take<kTake>(p, task, places.weight + item, theta, places.tensor, gradient);
        }
    }
    return nonfinite;
}

template <ConvTake kTake>
__device__ inline void update(const ConvUpdateParams& p) {
    const std::int64_t task = blockIdx.y;
    bool nonfinite = false;
    if (blockIdx.x == 0) {
        if (p.network.by_covariance) nonfinite = take_first<kTake>(p, task);
    } else if (blockIdx.x == 1) {
        nonfinite = take_norms<kTake>(p, task);
    } else {
        nonfinite = take_weights<kTake>(p, task, static_cast<int>(blockIdx.x) - 2, static_cast<int>(gridDim.x) - 2);
    }
    if (nonfinite) raise_flag(p.nonfinite + task);
}

// The index of a packed element's tensor in theta.
__device__ inline int theta_tensor(const ConvNetwork& net, std::int64_t place) {
    if (place >= net.head_bias) return net.tensors - 1;
    if (place >= net.head_weight) return net.tensors - 2;
    int number = net.count - 1;
    while (place < net.blocks[number].weight) --number;
    const ConvOffsets& block = net.blocks[number];
    if (place >= block.gamma) return gamma_tensor(net, number) + (place >= block.beta ? 1 : 0);
    return block.tensor;
}

__global__ void __launch_bounds__(kConvUpdateThreads) conv_sign_update_kernel(const ConvUpdateParams p) {
    update<ConvTake::kMove>(p);
}

__global__ void __launch_bounds__(kConvUpdateThreads) conv_meta_accumulate_kernel(const ConvUpdateParams p) {
    update<ConvTake::kWrite>(p);
}

}  // namespace signmaml
