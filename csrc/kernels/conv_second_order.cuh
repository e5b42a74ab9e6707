// Exact MAML: what goes back through a step, v <- v - H (rate v), beside the passes and their derivatives.
//   conv_remember      keeps the weights before a step
//   conv_direction     the direction rate * v of what adapts, packed like weights; block 1's constants and derivatives
//   conv_tangent_head  l. = V. f + V f. + c.;  s. = s (l. - <s, l.>);  q. = s. / n;  df. = V^T q. + V.^T q;
//                      v -= q. f^T + q f.^T for the classifier's weight, sum q. for its bias
//   conv_subtract      v -= the derivatives of all other gradients
// v lies in theta's order in a task's row of meta-gradients. conv_tangent_head: a thread block owns a task; the others
// share a task's parameters as conv_update.cuh says. Launched by launch_conv_meta_step.
// Readable twin: the double backward pass under reference.py.
#pragma once

#include <cstdint>

#include "kernels/conv_common.cuh"
#include "kernels/conv_update.cuh"

namespace signmaml {

__global__ void __launch_bounds__(kConvUpdateThreads) conv_remember_kernel(const ConvRememberParams p) {
    const std::int64_t task = blockIdx.y;
    const float* weights = row_of(p.weights, task);
    float* kept = row_of(p.kept, task);
    const std::int64_t step = std::int64_t{gridDim.x} * kConvUpdateThreads;
    for (std::int64_t i = std::int64_t{blockIdx.x} * kConvUpdateThreads + threadIdx.x; i < p.count; i += step) {
        store(kept + i, load(weights + i));
    }
}

// Derivatives of what first_norm computes: mean. = W. m, and r. = -r stretch with stretch = r^2 (W. G W^T). Called by
// all threads of a block.
__device__ inline void first_tangent(const ConvMoments* moments, const float* weights, const float* direction,
                                     int channels, int filters, const ConvFirstNorm* norm, ConvFirstTangent* tangent) {
    const int values = kConvTaps * channels;
    const Shared<double> products = first_memory<double>(filters, 0);
    covariance_products(moments, weights, direction, values, filters, products);
    block_barrier();  // w._i (G w)_i are there
    for (int filter = threadIdx.x; filter < filters; filter += kConvUpdateThreads) {
        double covariance = 0.0, mean = 0.0;
        for (int i = 0; i < values; ++i) {
            covariance += products.get(i * filters + filter);
            mean += load(&moments->mean[i]) * static_cast<double>(load(direction + i * filters + filter));
        }
        const auto inverse = static_cast<double>(load(&norm->inverse[filter]));
        store(&tangent->mean[filter], static_cast<float>(mean));
        store(&tangent->stretch[filter], static_cast<float>(inverse * inverse * covariance));
    }
}

__device__ inline void set_direction(const ConvDirectionParams& p, std::int64_t task, std::int64_t place) {
    const int tensor = theta_tensor(p.network, place);
    float value = 0.0f;
    if (load(p.rule.adapt + tensor) != 0) {
        const std::int64_t theta = theta_place(p.network, place);
        const float rate = load(p.rule.lr + (p.rule.by_element ? theta : tensor));
        value = rate * load(p.grads + task * p.network.parameters + theta);
    }
    store(row_of(p.direction, task) + place, value);
}

__global__ void __launch_bounds__(kConvUpdateThreads) conv_direction_kernel(const ConvDirectionParams p) {
    const std::int64_t task = blockIdx.y;
    const ConvNetwork& net = p.network;
    const ConvOffsets& first = net.blocks[0];
    if (blockIdx.x == 0) {
        for (std::int64_t i = threadIdx.x; i < first.gamma; i += kConvUpdateThreads) set_direction(p, task, i);
        if (!net.by_covariance) return;
        const float* weights = row_of(p.weights, task) + first.weight;
        const ConvMoments* moments = row_of(p.moments, task);
        first_norm(moments, weights, net.channels, net.filters, p.eps, row_of(p.norm, task));
        block_barrier();  // the direction and the constants are there; the products have been read
        first_tangent(moments, weights, row_of(p.direction, task) + first.weight, net.channels, net.filters,
                      row_of(p.norm, task), row_of(p.tangent, task));
        return;
    }
    const std::int64_t threads = std::int64_t{gridDim.x - 1} * kConvUpdateThreads;
    for (std::int64_t i = first.gamma + std::int64_t{blockIdx.x - 1} * kConvUpdateThreads + threadIdx.x;
         i < net.head_bias + net.ways; i += threads) {
        set_direction(p, task, i);
    }
}

// Block 1 by covariance. With B = sum dy (patch - m), dgamma = r W B and inner = B - dgamma r G W as in take_first:
//   dgamma. = r. W B + r (W. B + W B.),  dW. = (gamma. r + gamma r.) inner + gamma r inner.,  dbeta. = sum dy.
__device__ inline bool subtract_first(const ConvSubtractParams& params, std::int64_t task) {
    const ConvUpdateParams& p = params.update;
    const ConvNetwork& net = p.network;
    const ConvOffsets& places = net.blocks[0];
    const int filters = net.filters, values = kConvTaps * net.channels;
    // The second sums lie where update keeps doubles, which are twice as large and one row fewer.
    const Shared<float> sums = first_memory<float>(filters, 1), dgammas = first_memory<float>(filters, 2);
    const Shared<float> tangents(0, std::int64_t{1 + values} * filters);
    const ConvMoments* moments = row_of(p.moments, task);
    const ConvFirstNorm* norm = row_of(p.norm, task);
    const ConvFirstTangent* of_norm = row_of(params.first_tangent, task);
    const float* weights = row_of(p.weights, task);
    const float* direction = row_of(params.direction, task);
    const float* partials = row_of(p.first_partials, task);
    const float* partials_tangent = row_of(params.first_partials_tangent, task);

    const std::int64_t of_slice = std::int64_t{1 + values} * filters;
    for (int item = threadIdx.x; item < (1 + values) * filters; item += kConvUpdateThreads) {
        sums.set(item, sum_of_slices(partials + item, p.first_slices, of_slice));
        tangents.set(item, sum_of_slices(partials_tangent + item, p.first_slices, of_slice));
    }
    block_barrier();  // sum dy, sum dy (patch - shift) and their derivatives are there
    for (int item = threadIdx.x; item < values * filters; item += kConvUpdateThreads) {  // B and B.
        const int filter = item % filters;
        const auto mean = static_cast<float>(load(&moments->mean[item / filters]));
        sums.set(filters + item, sums.get(filters + item) - sums.get(filter) * mean);
        tangents.set(filters + item, tangents.get(filters + item) - tangents.get(filter) * mean);
    }
    block_barrier();  // they are centred
    for (int filter = threadIdx.x; filter < filters; filter += kConvUpdateThreads) {
        float own = 0.0f, moved = 0.0f;
        for (int i = 0; i < values; ++i) {
            const int at = (1 + i) * filters + filter;
            const float weight = load(weights + places.weight + i * filters + filter);
            own += weight * sums.get(at);
            moved += load(direction + places.weight + i * filters + filter) * sums.get(at) + weight * tangents.get(at);
        }
        const float inverse = load(&norm->inverse[filter]);
        dgammas.set(filter, own * inverse);
        sums.set(filter, inverse * (moved - own * load(&of_norm->stretch[filter])));  // sum dy is not needed again
    }
    block_barrier();  // dgamma and dgamma. are there
    bool nonfinite = false;
    for (int item = threadIdx.x; item < values * filters; item += kConvUpdateThreads) {
        const int i = item / filters, filter = item % filters;
        const float inverse = load(&norm->inverse[filter]), stretch = load(&of_norm->stretch[filter]);
        const float gamma = load(weights + places.gamma + filter);
        const float gamma_tangent = load(direction + places.gamma + filter);
        const auto dense =
            static_cast<float>(covariance_times(moments, weights + places.weight, i, filter, values, filters));
        const auto dense_tangent =
            static_cast<float>(covariance_times(moments, direction + places.weight, i, filter, values, filters));
        const float dgamma = dgammas.get(filter), dgamma_tangent = sums.get(filter);
        const float inner = sums.get(filters + item) - dgamma * inverse * dense;
        const float inner_tangent = tangents.get(filters + item) -
                                    inverse * ((dgamma_tangent - dgamma * stretch) * dense + dgamma * dense_tangent);
        const float gradient = inverse * ((gamma_tangent - gamma * stretch) * inner + gamma * inner_tangent);
        const std::int64_t theta = theta_place(net, places.weight + item);
        nonfinite |= take<ConvTake::kSubtract>(p, task, places.weight + item, theta, places.tensor, gradient);
    }
    for (int filter = threadIdx.x; filter < filters; filter += kConvUpdateThreads) {
        const int tensor = gamma_tensor(net, 0);
        nonfinite |= take<ConvTake::kSubtract>(p, task, places.gamma + filter, places.theta_gamma + filter, tensor,
                                               sums.get(filter));
        nonfinite |= take<ConvTake::kSubtract>(p, task, places.beta + filter, places.theta_beta + filter, tensor + 1,
                                               tangents.get(filter));
    }
    return nonfinite;
}

// Shared memory as in conv_update.cuh.
__global__ void __launch_bounds__(kConvUpdateThreads) conv_subtract_kernel(const ConvSubtractParams p) {
    const std::int64_t task = blockIdx.y;
    bool nonfinite = false;
    if (blockIdx.x == 0) {
        if (p.update.network.by_covariance) nonfinite = subtract_first(p, task);
    } else if (blockIdx.x == 1) {
        nonfinite = take_norms<ConvTake::kSubtract>(p.update, task);
    } else {
        nonfinite = take_weights<ConvTake::kSubtract>(p.update, task, static_cast<int>(blockIdx.x) - 2,
                                                      static_cast<int>(gridDim.x) - 2);
    }
    if (nonfinite) raise_flag(p.update.nonfinite + task);
}

template <typename Stored>
__global__ void __launch_bounds__(kConvHeadThreads) conv_tangent_head_kernel(const ConvTangentHeadParams<Stored> p) {
    const std::int64_t task = blockIdx.x;
    const bool flat = p.readout == Readout::kFlatten;
    const int width = flat ? p.pixels * p.filters : p.filters;
    const float* weights = row_of(p.weights, task) + p.weight;
    const float* direction = row_of(p.direction, task) + p.weight;
    const float* features = row_of(p.features, task);
    const float* scores = row_of(p.scores, task);
    const float* shares = row_of(p.shares, task);
    float* features_tangent = row_of(p.features_tangent, task);
    float* logits_tangent = row_of(p.logits_tangent, task);
    float* scores_tangent = row_of(p.scores_tangent, task);
    const auto count = static_cast<float>(p.count), pixels = static_cast<float>(p.pixels);

    walk(static_cast<int>(threadIdx.x), kConvHeadThreads, p.count, width, [&](int image, int i) {
        const Stored* activation = row_of(p.activation, task) + std::int64_t{image} * p.pixels * p.filters + i;
        float value = 0.0f;
        for (int pixel = 0; pixel < (flat ? 1 : p.pixels); ++pixel) {
            value += as_float(load(activation + std::int64_t{pixel} * p.filters));
        }
        store(features_tangent + std::int64_t{image} * width + i, flat ? value : value / pixels);
    });
    block_barrier();  // f. is there
    for (int item = static_cast<int>(threadIdx.x / 32); item < p.count * p.ways; item += kConvHeadThreads / 32) {
        const std::int64_t row = std::int64_t{item / p.ways} * width, way = std::int64_t{item % p.ways} * width;
        float sum = 0.0f;
        for (int i = lane(); i < width; i += 32) {
            sum += load(features + row + i) * load(direction + way + i);
            sum += load(features_tangent + row + i) * load(weights + way + i);
        }
        sum = warp_sum(sum);
        if (lane() == 0) store(logits_tangent + item, sum + load(row_of(p.direction, task) + p.bias + item % p.ways));
    }
    block_barrier();  // l. is there
    for (int item = threadIdx.x; item < p.count * p.ways; item += kConvHeadThreads) {
        const int first = item - item % p.ways;
        // l. - <s, l.> as a sum of differences: where one share is nearly 1, the difference of the two would cancel.
        float sum = 0.0f;
        for (int way = 0; way < p.ways; ++way) {
            sum += load(shares + first + way) * (load(logits_tangent + item) - load(logits_tangent + first + way));
        }
        store(scores_tangent + item, load(shares + item) * sum / count);
    }
    block_barrier();  // q. is there
    walk(static_cast<int>(threadIdx.x), kConvHeadThreads, p.count, p.pixels * p.filters, [&](int image, int i) {
        const int column = flat ? i : i % p.filters;
        float gradient = 0.0f;
        for (int way = 0; way < p.ways; ++way) {
            const int score = image * p.ways + way;
            const std::int64_t at = std::int64_t{way} * width + column;
            gradient += load(scores_tangent + score) * load(weights + at) + load(scores + score) * load(direction + at);
        }
        if (!flat) gradient /= pixels;
        store(row_of(p.activation_grad, task) + std::int64_t{image} * p.pixels * p.filters + i,
              Storing<Stored>::of(gradient));
    });

    bool nonfinite = false;
    const auto subtract = [&](std::int64_t theta, float product) {
        float* result = p.grads + task * p.parameters + p.theta_weight + theta;
        const float value = load(result) - product;
        store(result, value);
        nonfinite |= is_nonfinite(value);
    };
    walk(static_cast<int>(threadIdx.x), kConvHeadThreads, p.ways, width, [&](int way, int i) {
        float product = 0.0f;
        for (int image = 0; image < p.count; ++image) {
            const int score = image * p.ways + way;
            const std::int64_t feature = std::int64_t{image} * width + i;
            product += load(scores_tangent + score) * load(features + feature);
            product += load(scores + score) * load(features_tangent + feature);
        }
        // torch flattens filter by filter; features are stored pixel by pixel here.
        const int flattened = flat ? i % p.filters * p.pixels + i / p.filters : i;
        subtract(std::int64_t{way} * width + flattened, product);
    });
    for (int way = threadIdx.x; way < p.ways; way += kConvHeadThreads) {
        float product = 0.0f;
        for (int image = 0; image < p.count; ++image) product += load(scores_tangent + image * p.ways + way);
        subtract(std::int64_t{p.ways} * width + way, product);
    }
    if (nonfinite) raise_flag(p.nonfinite + task);
}

}  // namespace signmaml
