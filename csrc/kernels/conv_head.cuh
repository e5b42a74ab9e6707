// The classifier of one task: features from the last block, logits, softmax cross-entropy, and its backward pass.
//   logits = f W^T + b;  dlogits = (softmax - onehot) / n;  df = dlogits W;  dW = dlogits^T f;  db = sum dlogits
// A thread block owns a task. In an inner step it updates W and b itself; in the query pass of a meta-step it writes
// their gradients; in a step that is differentiated it leaves softmax and df for conv_tangent_head. df goes back
// through the readout and is stored as the gradient of the last block's activation, with that block's gradients of beta
// and gamma. Launched by launch_conv_head. Readable twin: cross_entropy in signmaml_ext/reference.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/conv_common.cuh"

namespace signmaml {

inline constexpr int kHeadRun = 8;  // of sums that are added to each other before they are added to the total

// Shared memory, in floats: BatchNorm's constants for `activate` [3, filters] and its r [filters], with room for
// [5, filters]; one float per warp for sums over the block; two floats per thread.
template <typename Stored>
struct ConvHead {
    const ConvHeadParams<Stored>& p;
    std::int64_t task;
    Shared<float> norm, scratch, sums;

    __device__ int pixels() const { return p.layer.block.act_height * p.layer.block.act_width; }
    __device__ int width() const {
        return p.readout == Readout::kFlatten ? pixels() * p.layer.block.filters : p.layer.block.filters;
    }
    __device__ float* weights() const { return row_of(p.weights, task); }
    __device__ float* features() const { return row_of(p.features, task); }
    __device__ float* scores() const { return row_of(p.scores, task); }

    // Calls `visit(image, pixel, filter)` for everything that the block of the network below has: a thread has one
    // filter, and every so many pixels of all images.
    template <typename Visit>
    __device__ void for_each(int images, int pixels_of_image, const Visit& visit) const {
        const int filters = p.layer.block.filters, groups = kConvHeadThreads / filters;
        const int group = static_cast<int>(threadIdx.x) / filters, filter = static_cast<int>(threadIdx.x) % filters;
        if (group >= groups) return;
        walk(group, groups, images, pixels_of_image, [&](int image, int pixel) { visit(image, pixel, filter); });
    }

    // The activation of one image, pixel and filter; stores the halving's choice if a backward pass follows.
    __device__ float activation(int image, int pixel, int filter) const {
        const ConvBlock& block = p.layer.block;
        const std::int64_t at = (std::int64_t{image} * pixels() + pixel) * block.filters + filter;
        if (!p.source_is_raw) return as_float(load(row_of(p.layer.activation, task) + at));
        const int y = quotient_of_any(pixel, p.by_width), x = pixel - y * block.act_width;
        const auto result = activate<1>(p.layer, row_of(p.layer.raw, task), image, y, x, filter, norm);
        if (p.pass != ConvPass::kForward) store(row_of(p.layer.choices, task) + at, result.choices.at[0]);
        return result.values.at[0];
    }

    __device__ void make_features() const {
        const int filters = p.layer.block.filters;
        if (p.readout == Readout::kFlatten) {
            for_each(p.layer.count, pixels(), [&](int image, int pixel, int filter) {
                const std::int64_t item = (std::int64_t{image} * pixels() + pixel) * filters + filter;
                store(features() + item, activation(image, pixel, filter));
            });
            return;
        }
        for_each(p.layer.count, 1, [&](int image, int, int filter) {
            float value = 0.0f;
            for (int pixel = 0; pixel < pixels(); ++pixel) value += activation(image, pixel, filter);
            store(features() + std::int64_t{image} * filters + filter, value / static_cast<float>(pixels()));
        });
    }

    // One warp per image and way.
    __device__ void make_logits() const {
        const int warp = static_cast<int>(threadIdx.x / 32);
        for (int item = warp; item < p.layer.count * p.ways; item += kConvHeadThreads / 32) {
            const float* row = features() + static_cast<std::int64_t>(item / p.ways) * width();
            const float* weight = weights() + p.weight + static_cast<std::int64_t>(item % p.ways) * width();
            float sum = 0.0f;
            for (int i = lane(); i < width(); i += 32) sum += load(row + i) * load(weight + i);
            sum = warp_sum(sum);
            if (lane() == 0) {
                const float logit = sum + load(weights() + p.bias + item % p.ways);
                store(scores() + item, logit);
                if (p.logits != nullptr) {
                    store(p.logits + task * p.layer.count * p.ways + item, logit);
                }
            }
        }
    }

    // Replaces the logits by their gradient; returns the mean loss, the same bits in every thread. One label out of
    // range makes the loss and gradient of the whole task NaN, as in reference.cross_entropy.
    __device__ float make_loss() const {
        const std::int64_t* labels = p.labels + task * p.layer.count;
        const float count = static_cast<float>(p.layer.count);
        float wrong = 0.0f;
        for (int image = threadIdx.x; image < p.layer.count; image += kConvHeadThreads) {
            const std::int64_t label = load(labels + image);
            if (label < 0 || label >= p.ways) wrong += 1.0f;
        }
        const float invalid = block_sum(wrong, scratch) > 0.0f ? static_cast<float>(NAN) : 0.0f;
        float loss = 0.0f, correct = 0.0f;
        for (int image = threadIdx.x; image < p.layer.count; image += kConvHeadThreads) {
            float* row = scores() + static_cast<std::int64_t>(image) * p.ways;
            const std::int64_t label = load(labels + image);
            float largest = load(row), of_label = 0.0f;
            int best = 0;
            for (int way = 0; way < p.ways; ++way) {
                const float score = load(row + way);
                // A NaN is the largest, as in torch's argmax.
                if (score > largest || (score != score && largest == largest)) {
                    largest = score;
                    best = way;
                }
                if (way == label) of_label = score;
            }
            float sum = 0.0f;
            for (int way = 0; way < p.ways; ++way) sum += expf(load(row + way) - largest);
            for (int way = 0; way < p.ways; ++way) {
                const float share = expf(load(row + way) - largest) / sum;
                store(row + way, (way == label ? share - 1.0f : share) / count + invalid);
                if (p.pass == ConvPass::kAgain) {
                    store(row_of(p.shares, task) + static_cast<std::int64_t>(image) * p.ways + way, share);
                }
            }
            loss += logf(sum) + largest - of_label;
            if (best == label) correct += 1.0f;
        }
        // The barriers in these sums also separate the gradients' writers from their readers.
        correct = block_sum(correct, scratch);
        if (p.accuracy != nullptr && threadIdx.x == 0) store(p.accuracy + task, correct / count);
        return block_sum(loss, scratch) / count + invalid;
    }

    // The gradient of the last block's activation, and its sums for BatchNorm.
    __device__ void send_back() const {
        const ConvBlock& block = p.layer.block;
        const int filters = block.filters, groups = kConvHeadThreads / filters;
        const bool flat = p.readout == Readout::kFlatten;
        float sum_dy = 0.0f, sum_dy_xhat = 0.0f;
        for_each(p.layer.count, pixels(), [&](int image, int pixel, int filter) {
            const float* scores_of_image = scores() + static_cast<std::int64_t>(image) * p.ways;
            const float* column = weights() + p.weight + (flat ? pixel * filters : 0) + filter;
            float gradient = 0.0f;
            for (int way = 0; way < p.ways; ++way) {
                gradient += load(scores_of_image + way) * load(column + static_cast<std::int64_t>(way) * width());
            }
            if (!flat) gradient /= static_cast<float>(pixels());
            gradient = rounded_to<Stored>(gradient);
            const std::int64_t at = (std::int64_t{image} * pixels() + pixel) * filters + filter;
            store(row_of(p.layer.activation_grad, task) + at, Storing<Stored>::of(gradient));
            if (!p.source_is_raw) return;
            const int choice = load(row_of(p.layer.choices, task) + at);
            if (choice < kConvActive) return;
            const int row = quotient_of_any(pixel, p.by_width), column_of_pixel = pixel - row * block.act_width;
            const int y = row * block.window + (choice - kConvActive) / 2;
            const int x = column_of_pixel * block.window + choice % 2;
            const std::int64_t from = ((std::int64_t{image} * block.height + y) * block.width + x) * filters + filter;
            const float z = as_float(load(row_of(p.layer.raw, task) + from));
            sum_dy += gradient;
            sum_dy_xhat += gradient * (z - norm.get(filter)) * norm.get(3 * filters + filter);
        });
        sums.set(threadIdx.x, sum_dy);
        sums.set(kConvHeadThreads + threadIdx.x, sum_dy_xhat);
        block_barrier();  // all groups' sums are there; all have read the weights that now move
        if (p.source_is_raw && static_cast<int>(threadIdx.x) < filters) {
            float totals[2] = {};
            for (int which = 0; which < 2; ++which) {
                // By runs: one long sum would lose more to rounding.
                for (int first = 0; first < groups; first += kHeadRun) {
                    float run = 0.0f;
                    for (int g = first; g < smaller_of(groups, first + kHeadRun); ++g) {
                        run += sums.get(which * kConvHeadThreads + g * filters + threadIdx.x);
                    }
                    totals[which] += run;
                }
                store(row_of(p.layer.grad_sums, task) + which * filters + threadIdx.x, totals[which]);
            }
        }
    }

    // Handles one element of the classifier: its gradient updates it, or is the result.
    __device__ bool take(std::int64_t place, std::int64_t theta_place, float gradient, int tensor) const {
        if (p.pass == ConvPass::kGradient) {
            store(p.grads + task * p.parameters + theta_place, gradient);
        } else {
            move_by(p.rule, task, place, theta_place, tensor, gradient);
        }
        return is_nonfinite(gradient);
    }

    __device__ bool take_all() const {
        const int filters = p.layer.block.filters;
        bool nonfinite = false;
        if (p.pass == ConvPass::kGradient || load(p.rule.adapt + p.tensor) != 0) {
            walk(static_cast<int>(threadIdx.x), kConvHeadThreads, p.ways, width(), [&](int way, int i) {
                float gradient = 0.0f;
                for (int image = 0; image < p.layer.count; ++image) {
                    gradient += load(scores() + static_cast<std::int64_t>(image) * p.ways + way) *
                                load(features() + static_cast<std::int64_t>(image) * width() + i);
                }
                // torch flattens filter by filter; features are stored pixel by pixel here.
                const bool permuted =
                    p.readout == Readout::kFlatten && (p.pass == ConvPass::kGradient || reads_theta_place(p.rule));
                const int flattened = permuted ? i % filters * pixels() + i / filters : i;
                nonfinite |=
                    take(p.weight + way * width() + i, p.theta_weight + way * width() + flattened, gradient, p.tensor);
            });
        }
        if (p.pass == ConvPass::kGradient || load(p.rule.adapt + p.tensor + 1) != 0) {
            for (int way = threadIdx.x; way < p.ways; way += kConvHeadThreads) {
                float gradient = 0.0f;
                for (int image = 0; image < p.layer.count; ++image) {
                    gradient += load(scores() + static_cast<std::int64_t>(image) * p.ways + way);
                }
                nonfinite |= take(p.bias + way, p.theta_weight + p.ways * width() + way, gradient, p.tensor + 1);
            }
        }
        return nonfinite;
    }
};

template <typename Stored>
__global__ void __launch_bounds__(kConvHeadThreads) conv_head_kernel(const ConvHeadParams<Stored> p) {
    const int filters = p.layer.block.filters;
    const int scratch = 5 * filters, sums = scratch + kConvHeadThreads / 32;
    const ConvHead<Stored> head{p, std::int64_t{blockIdx.x}, Shared<float>(0, scratch),
                                Shared<float>(scratch * 4, kConvHeadThreads / 32),
                                Shared<float>(sums * 4, 2 * kConvHeadThreads)};
    if (p.source_is_raw) {
        prepare_activation(p.layer, head.weights(), head.norm,
                           [&](int filter) { return norm_of(p.layer, head.task, filter); });
        for (int filter = threadIdx.x; filter < filters; filter += kConvHeadThreads) {
            head.norm.set(3 * filters + filter, norm_of(p.layer, head.task, filter).inverse);
        }
    }
    block_barrier();  // BatchNorm's constants are there
    head.make_features();
    block_barrier();  // all features are there
    head.make_logits();
    const float loss = head.make_loss();  // starts with a sum over the block, whose barrier makes all logits visible
    bool nonfinite = is_nonfinite(loss);
    if (threadIdx.x == 0 && p.loss != nullptr) store(p.loss + head.task, loss);
    if (p.pass != ConvPass::kForward) head.send_back();
    if (p.pass == ConvPass::kStep || p.pass == ConvPass::kGradient) nonfinite |= head.take_all();
    if (nonfinite) raise_flag(p.nonfinite + head.task);
}

}  // namespace signmaml
