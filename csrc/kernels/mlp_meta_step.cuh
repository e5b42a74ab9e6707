// A whole meta-step of small networks in one launch: for each task K inner steps on the support set, then the query
// loss and its gradient.
//   forward a[l+1] = act(a[l] W[l]^T + b[l]);  backward dW = d^T a, db = sum d, d' = d W * act'(a);  W -= lr * sign(dW)
// A team (a warp, or a block of kMlpBlock threads) owns every teams-th task; its weights and activations are in shared
// memory or, if too large, in its part of the workspace. A thread owns whole elements, so the order of every sum is
// fixed. Launched by launch_mlp_meta_step. Readable twin: meta_gradients in signmaml_ext/reference.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/platform.cuh"
#include "params/mlp_meta_step.h"

namespace signmaml {

__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

// The threads that work on one task.
template <typename Scalar, bool kWarp>
struct Team {
    Shared<Scalar> scratch;

    __device__ int rank() const { return static_cast<int>(threadIdx.x); }
    __device__ int size() const { return static_cast<int>(blockDim.x); }

    __device__ void barrier() const {
        if (kWarp) {
            warp_barrier();
        } else {
            block_barrier();
        }
    }

    // The same bits in every thread.
    __device__ Scalar sum(Scalar value) const { return kWarp ? warp_sum(value) : block_sum(value, scratch); }
};

// One task's memory and its layout.
template <typename Scalar, bool kWarp>
struct MlpTask {
    const MlpMetaStepParams<Scalar>& p;
    const MlpLayout& layout;
    Team<Scalar, kWarp> team;
    Scalar* memory;
    std::int64_t task;
    bool nonfinite;  // whether this thread has seen NaN or infinity

    __device__ Scalar* weight(int layer) const { return memory + layout.weight[layer]; }
    __device__ Scalar* bias(int layer) const { return memory + layout.bias[layer]; }
    __device__ Scalar* delta(int layer) const { return memory + layout.delta[layer % 2]; }
    __device__ int width(int layer) const { return p.shape.widths[layer]; }

    // The input of a layer: the examples, or the activations of the layer before.
    __device__ const Scalar* input(int layer, const MlpSet<Scalar>& set) const {
        return layer == 0 ? set.x + task * set.count * width(0) : memory + layout.activation[layer];
    }

    // Copies theta into padded rows.
    __device__ void take_parameters() {
        const Scalar* from = p.theta;
        for (int layer = 0; layer < p.shape.layers; ++layer) {
            const int inputs = width(layer), outputs = width(layer + 1);
            for (int i = team.rank(); i < inputs * outputs; i += team.size()) {
                store(weight(layer) + i / inputs * layout.row[layer] + i % inputs, load(from + i));
            }
            from += inputs * outputs;
            for (int o = team.rank(); o < outputs; o += team.size()) store(bias(layer) + o, load(from + o));
            from += outputs;
        }
    }

    // Copies padded rows to row `task` of a [T, P] array.
    __device__ void give_parameters(Scalar* rows) const {
        Scalar* to = rows + task * p.parameters;
        for (int layer = 0; layer < p.shape.layers; ++layer) {
            const int inputs = width(layer), outputs = width(layer + 1);
            for (int i = team.rank(); i < inputs * outputs; i += team.size()) {
                store(to + i, load(weight(layer) + i / inputs * layout.row[layer] + i % inputs));
            }
            to += inputs * outputs;
            for (int o = team.rank(); o < outputs; o += team.size()) store(to + o, load(bias(layer) + o));
            to += outputs;
        }
    }

    // NaN stays NaN, as in torch.
    __device__ Scalar activated(Scalar z) const {
        if (p.shape.activation == Activation::kTanh) return tanh_of(z);
        return z < Scalar(0) ? Scalar(0) : z;
    }

    // The gradient with respect to the activation's input, from the gradient of its output and the output's value.
    __device__ Scalar through_activation(Scalar gradient, Scalar value) const {
        if (p.shape.activation == Activation::kTanh) return gradient * (Scalar(1) - value * value);
        return value <= Scalar(0) ? Scalar(0) : gradient;
    }

    __device__ void forward(const MlpSet<Scalar>& set) {
        for (int layer = 0; layer < p.shape.layers; ++layer) {
            const int inputs = width(layer), outputs = width(layer + 1);
            const Scalar* in = input(layer, set);
            Scalar* out = memory + layout.activation[layer + 1];
            const bool last = layer + 1 == p.shape.layers;
            for (int i = team.rank(); i < set.count * outputs; i += team.size()) {
                const Scalar* row = in + static_cast<std::int64_t>(i / outputs) * inputs;
                const Scalar* weights = weight(layer) + i % outputs * layout.row[layer];
                Scalar z = load(bias(layer) + i % outputs);
                for (int k = 0; k < inputs; ++k) z += load(row + k) * load(weights + k);
                store(out + i, last ? z : activated(z));
            }
            team.barrier();  // the layer is complete before the next reads it
        }
    }

    // Fills the delta of the output layer; returns the mean loss, the same bits in every thread.
    __device__ Scalar loss_and_delta(const MlpSet<Scalar>& set, Scalar* accuracy) {
        const Scalar* out = memory + layout.activation[p.shape.layers];
        const int outputs = width(p.shape.layers);
        Scalar loss = Scalar(0), correct = Scalar(0);
        for (int example = team.rank(); example < set.count; example += team.size()) {
            const Scalar* row = out + static_cast<std::int64_t>(example) * outputs;
            Scalar* delta_row = delta(p.shape.layers) + static_cast<std::int64_t>(example) * outputs;
            const std::int64_t index = task * set.count + example;
            if (p.shape.loss == MlpLoss::kMse) {
                loss += squared_error(row, set.target + index * outputs, delta_row, outputs, set.count);
            } else {
                loss += cross_entropy(row, load(set.labels + index), delta_row, outputs, set.count, correct);
            }
        }
        team.barrier();  // all deltas are there before the backward pass reads them
        const Scalar count = static_cast<Scalar>(set.count);
        if (accuracy != nullptr) {
            correct = team.sum(correct);
            if (team.rank() == 0) store(accuracy + task, correct / count);
        }
        const Scalar mean = team.sum(loss) / count;
        nonfinite |= is_nonfinite(mean);
        return mean;
    }

    __device__ Scalar squared_error(const Scalar* row, const Scalar* target, Scalar* delta_row, int outputs,
                                    int count) {
        Scalar loss = Scalar(0);
        for (int o = 0; o < outputs; ++o) {
            const Scalar difference = load(row + o) - load(target + o);
            loss += difference * difference;
            store(delta_row + o, Scalar(2) * difference / static_cast<Scalar>(std::int64_t{count} * outputs));
        }
        return loss / static_cast<Scalar>(outputs);
    }

    // A label out of range makes loss and gradient NaN, as in reference.cross_entropy.
    __device__ Scalar cross_entropy(const Scalar* row, std::int64_t label, Scalar* delta_row, int outputs, int count,
                                    Scalar& correct) {
        Scalar largest = load(row);
        int best = 0;
        for (int o = 1; o < outputs; ++o) {
            const Scalar score = load(row + o);
            // A NaN is the largest, as in torch's argmax.
            if (score > largest || (score != score && largest == largest)) {
                largest = score;
                best = o;
            }
        }
        Scalar sum = Scalar(0);
        for (int o = 0; o < outputs; ++o) sum += exp_of(load(row + o) - largest);
        const bool in_range = label >= 0 && label < outputs;
        const Scalar invalid = in_range ? Scalar(0) : static_cast<Scalar>(NAN);
        for (int o = 0; o < outputs; ++o) {
            const Scalar share = exp_of(load(row + o) - largest) / sum;
            const Scalar gradient = (o == label ? share - Scalar(1) : share) / static_cast<Scalar>(count);
            store(delta_row + o, gradient + invalid);
        }
        if (best == label) correct += Scalar(1);
        return in_range ? log_of(sum) + largest - load(row + label) : invalid;
    }

    // Starts from the output's delta. kStep: updates the weights; else each weight is replaced by its gradient, which
    // is safe because the layer's weights are not read again.
    template <bool kStep>
    __device__ void backward(const MlpSet<Scalar>& set, const Scalar* lr) {
        for (int layer = p.shape.layers - 1; layer >= 0; --layer) {
            const int inputs = width(layer), outputs = width(layer + 1);
            const Scalar* in = input(layer, set);
            const Scalar* above = delta(layer + 1);
            if (layer > 0) {
                Scalar* below = delta(layer);
                for (int i = team.rank(); i < set.count * inputs; i += team.size()) {
                    const Scalar* row = above + static_cast<std::int64_t>(i / inputs) * outputs;
                    Scalar sum = Scalar(0);
                    for (int o = 0; o < outputs; ++o) {
                        sum += load(row + o) * load(weight(layer) + o * layout.row[layer] + i % inputs);
                    }
                    store(below + i, through_activation(sum, load(in + i)));
                }
                team.barrier();  // all have read the weights before they change; the delta below is complete
            }
            if (!kStep || load(p.adapt + 2 * layer) != 0) {
                for (int i = team.rank(); i < inputs * outputs; i += team.size()) {
                    Scalar gradient = Scalar(0);
                    for (int example = 0; example < set.count; ++example) {
                        gradient += load(above + static_cast<std::int64_t>(example) * outputs + i / inputs) *
                                    load(in + static_cast<std::int64_t>(example) * inputs + i % inputs);
                    }
                    take<kStep>(weight(layer) + i / inputs * layout.row[layer] + i % inputs, gradient, lr + 2 * layer);
                }
            }
            if (!kStep || load(p.adapt + 2 * layer + 1) != 0) {
                for (int o = team.rank(); o < outputs; o += team.size()) {
                    Scalar gradient = Scalar(0);
                    for (int example = 0; example < set.count; ++example) {
                        gradient += load(above + static_cast<std::int64_t>(example) * outputs + o);
                    }
                    take<kStep>(bias(layer) + o, gradient, lr + 2 * layer + 1);
                }
            }
            team.barrier();  // the delta above is free for the next layer but one; the weights have moved
        }
    }

    template <bool kStep>
    __device__ void take(Scalar* place, Scalar gradient, const Scalar* lr) {
        nonfinite |= is_nonfinite(gradient);
        if (kStep) {
            store(place, stepped(load(place), load(lr), p.by_sign ? sign(gradient) : gradient));
        } else {
            store(place, gradient);
        }
    }

    __device__ void run() {
        take_parameters();
        team.barrier();  // the weights are there before the first layer reads them
        for (int step = 0; step < p.steps; ++step) {
            forward(p.support);
            const Scalar loss = loss_and_delta(p.support, nullptr);
            if (team.rank() == 0) store(p.support_loss + step * p.tasks + task, loss);
            backward<true>(p.support, p.lr + step * 2 * p.shape.layers);
        }
        if (p.adapted != nullptr) give_parameters(p.adapted);
        if (p.query.count > 0) query();
        if (nonfinite) raise_flag(p.nonfinite + task);
    }

    __device__ void query() {
        forward(p.query);
        const Scalar loss = loss_and_delta(p.query, p.query_accuracy);
        if (team.rank() == 0) store(p.query_loss + task, loss);
        const int outputs = p.query.count * width(p.shape.layers);
        if (p.predictions != nullptr) {
            for (int i = team.rank(); i < outputs; i += team.size()) {
                store(p.predictions + task * outputs + i, load(memory + layout.activation[p.shape.layers] + i));
            }
        }
        if (p.grads == nullptr) return;
        backward<false>(p.query, nullptr);
        give_parameters(p.grads);
    }
};

template <typename Scalar, bool kWarp, bool kInShared>
__global__ void __launch_bounds__(kWarp ? 32 : kMlpBlock, kWarp ? 16 : 2)
    mlp_meta_step_kernel(const MlpMetaStepParams<Scalar> p, const MlpLayout layout) {
    const Shared<Scalar> scratch(0, kMlpScratch);
    const Shared<Scalar> own(kMlpScratch * static_cast<std::int64_t>(sizeof(Scalar)), kInShared ? layout.size : 1);
    for (std::int64_t task = blockIdx.x; task < p.tasks; task += gridDim.x) {
        Scalar* memory = kInShared ? own.address(0) : p.workspace + std::int64_t{blockIdx.x} * layout.size;
        MlpTask<Scalar, kWarp> work{p, layout, {scratch}, memory, task, false};
        work.run();
    }
}

}  // namespace signmaml
