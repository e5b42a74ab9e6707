// A whole meta-step of small networks in one launch: for each task K inner steps on the support set, then the query
// loss and its gradient.
//   forward a[l+1] = act(a[l] W[l]^T + b[l]);  backward dW = d^T a, db = sum d, d' = d W * act'(a);  W -= lr * sign(dW)
// A team (a warp, or a block of kMlpBlock threads) owns every teams-th task; its weights and activations are in shared
// memory or, if too large, in its part of the workspace. A thread owns whole sums, so the order of every sum is fixed.
// Launched by launch_mlp_meta_step. Readable twin: meta_gradients in signmaml_ext/reference.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/platform.cuh"
#include "kernels/tables.cuh"
#include "params/mlp_meta_step.h"

namespace signmaml {

__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }
__device__ inline float root_of(float x) { return sqrtf(x); }
__device__ inline double root_of(double x) { return sqrt(x); }

// The threads that work on one task: a block, whose barrier is cheap if it is one warp.
template <bool kWarp>
struct Team {
    __device__ int rank() const { return static_cast<int>(threadIdx.x); }
    __device__ int size() const { return static_cast<int>(blockDim.x); }

    __device__ void barrier() const {
        if (kWarp) {
            warp_barrier();
        } else {
            block_barrier();
        }
    }
};

// Scalars that a single access moves: 16 bytes.
template <typename Scalar>
inline constexpr int kMlpVector = 16 / static_cast<int>(sizeof(Scalar));

// What steps do beside moving by a rate for each tensor.
enum class MlpSteps {
    kPlain,
    kAny,   // an element may have a rate of its own, and directions may be kept
    kKept,  // likewise, and the gradients of a step are kept before anything moves
};

// One task's memory and its layout. Rows are padded to whole vectors; the padding of weights and activations is zero.
template <typename Scalar, bool kWarp, bool kInShared, MlpSteps kSteps = MlpSteps::kPlain>
struct MlpTask {
    static constexpr int kVector = kMlpVector<Scalar>;
    static constexpr bool kAnyStep = kSteps != MlpSteps::kPlain;
    using Values = Vector<Scalar, kVector>;
    // Vectors of the depth that are loaded at once. Doubles, and addresses beyond shared memory, take two registers
    // each: more of them, or the largest tile, would spill.
    static constexpr int kUnrolled = kInShared && sizeof(Scalar) == 4 ? 2 : 1;

    const MlpMetaStepParams<Scalar>& p;
    const MlpLayout& layout;
    Team<kWarp> team;
    Scalar* memory;
    std::int64_t task;
    Scalar poison;  // 0, or NaN once this thread has seen NaN or infinity
    // Unless kPlain: where a step's directions go, or its gradients, in the order and rows of the weights; or null.
    Scalar* kept;

    __device__ Scalar* weight(int layer) const { return memory + layout.weight[layer]; }
    __device__ Scalar* bias(int layer) const { return memory + layout.bias[layer]; }
    __device__ Scalar* activation(int layer) const { return memory + layout.activation[layer]; }
    __device__ Scalar* delta(int layer) const { return memory + layout.delta[layer % 2]; }
    __device__ int width(int layer) const { return p.shape.widths[layer]; }
    // Scalars from one row to the next of the weights that read this layer, and of its activations and deltas.
    __device__ int row(int layer) const { return static_cast<int>(layout.row[layer]); }

    // Where a layer's weight, [out, in], is in theta; its bias follows.
    __device__ std::int64_t theta_weight(int layer) const {
        std::int64_t place = 0;
        for (int below = 0; below < layer; ++below) place += (std::int64_t{width(below)} + 1) * width(below + 1);
        return place;
    }

    // Of a step's rates, those of a layer's weight, and of its bias.
    __device__ const Scalar* rates_of_weight(int layer, const Scalar* lr) const {
        return lr + (kAnyStep && p.how.rates.by_element ? theta_weight(layer) : 2 * layer);
    }
    __device__ const Scalar* rates_of_bias(int layer, const Scalar* lr) const {
        const std::int64_t weights = std::int64_t{width(layer)} * width(layer + 1);
        return kAnyStep && p.how.rates.by_element ? rates_of_weight(layer, lr) + weights : lr + 2 * layer + 1;
    }

    // Calls `visit(row, column)` for this thread's share of a table.
    template <typename Visit>
    __device__ void share(int rows, int columns, const Visit& visit) const {
        walk(team.rank(), team.size(), rows, columns, visit);
    }

    // x - x is NaN for NaN and infinities, and 0 for every other number.
    __device__ void notice(Scalar x) { poison += x - x; }

    __device__ static constexpr int parts(int length, int part) { return (length + part - 1) / part; }

    // A thread makes a tile of sums at once: it loads a vector of each factor for several products. How a product of
    // two matrices is cut into tiles changes no sum's order. This is about how many instructions the busiest thread
    // takes for each vector of the depth: its products and loads, and what a tile takes beside its loop.
    template <int kRows, int kColumns>
    __device__ int path(int rows, int columns) const {
        const int tiles = parts(rows, kRows) * parts(columns, kColumns);
        const int rounds = ((tiles - 1) >> (5 + layout.warps_log2)) + 1;  // a division would take some twenty
        return rounds * (kRows * kColumns * kVector + kRows + kColumns + 6);
    }

    // Copies theta into padded rows.
    __device__ void take_parameters() {
        const Scalar* from = p.theta;
        for (int layer = 0; layer < p.shape.layers; ++layer) {
            const int inputs = width(layer), outputs = width(layer + 1);
            const Scalar* mine = from + team.rank();
            share(outputs, inputs, [&](int o, int i) {
                store(weight(layer) + std::int64_t{o} * row(layer) + i, load(mine));
                mine += team.size();
            });
            from += std::int64_t{outputs} * inputs;
            for (int o = team.rank(); o < outputs; o += team.size()) store(bias(layer) + o, load(from + o));
            from += outputs;
        }
    }

    // Copies padded rows to row `task` of a [T, P] array.
    __device__ void give_parameters(Scalar* rows) const {
        Scalar* to = rows + task * p.parameters;
        for (int layer = 0; layer < p.shape.layers; ++layer) {
            const int inputs = width(layer), outputs = width(layer + 1);
            Scalar* mine = to + team.rank();
            share(outputs, inputs, [&](int o, int i) {
                store(mine, load(weight(layer) + std::int64_t{o} * row(layer) + i));
                mine += team.size();
            });
            to += std::int64_t{outputs} * inputs;
            for (int o = team.rank(); o < outputs; o += team.size()) store(to + o, load(bias(layer) + o));
            to += outputs;
        }
    }

    // Copies the examples of a set into padded rows.
    __device__ void take_examples(const MlpSet<Scalar>& set) const {
        const int inputs = width(0);
        const Scalar* from = set.x + task * set.count * inputs;
        share(set.count, inputs, [&](int example, int i) {
            store(activation(0) + example * row(0) + i, load(from + std::int64_t{example} * inputs + i));
        });
    }

    // ReLU or tanh of all sums; NaN stays NaN, as in torch. One branch for all of them.
    template <int kRows, int kColumns>
    __device__ void activate(Scalar (&sums)[kRows][kColumns]) const {
        if (p.shape.activation == Activation::kTanh) {
#pragma unroll
            for (int i = 0; i < kRows * kColumns; ++i) {
                Scalar& z = sums[i / kColumns][i % kColumns];
                z = tanh_of(z);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kRows * kColumns; ++i) {
                Scalar& z = sums[i / kColumns][i % kColumns];
                z = z < Scalar(0) ? Scalar(0) : z;
            }
        }
    }

    // The gradient with respect to the activation's input, from the gradient of its output and the output's value.
    __device__ Scalar through_activation(Scalar gradient, Scalar value) const {
        if (p.shape.activation == Activation::kTanh) return gradient * (Scalar(1) - value * value);
        return value <= Scalar(0) ? Scalar(0) : gradient;
    }

    // All activations, from those of layer 0, the examples.
    __device__ void forward(int count) {
        for (int layer = 0; layer < p.shape.layers; ++layer) {
            const int large = path<3, 5>(count, width(layer + 1)), medium = path<3, 3>(count, width(layer + 1)),
                      small = path<1, 1>(count, width(layer + 1));
            if (kInShared && large <= smaller_of(medium, small)) {
                forward_layer<3, 5>(layer, count);
            } else if (medium <= small) {
                forward_layer<3, 3>(layer, count);
            } else {
                forward_layer<1, 1>(layer, count);
            }
            team.barrier();  // the layer is complete before the next reads it
        }
    }

    // Neighbouring threads take neighbouring outputs. Tiles beyond the end repeat the last row and store nothing.
    template <int kRows, int kColumns>
    __device__ void forward_layer(int layer, int count) {
        const int inputs = width(layer), outputs = width(layer + 1);
        const bool last = layer + 1 == p.shape.layers;
        const int down = parts(count, kRows), across = parts(outputs, kColumns);
        share(down, across, [&](int first_example, int first_output) {
            const Scalar* in[kRows];
            const Scalar* weights[kColumns];
            Scalar sums[kRows][kColumns];
#pragma unroll
            for (int e = 0; e < kRows; ++e) {
                in[e] = activation(layer) + smaller_of(first_example + e * down, count - 1) * row(layer);
            }
#pragma unroll
            for (int o = 0; o < kColumns; ++o) {
                const int output = smaller_of(first_output + o * across, outputs - 1);
                weights[o] = weight(layer) + std::int64_t{output} * row(layer);
                const Scalar start = load(bias(layer) + output);
#pragma unroll
                for (int e = 0; e < kRows; ++e) sums[e][o] = start;
            }
#pragma unroll kUnrolled
            for (int k = 0; k < inputs; k += kVector) {
                Values left[kRows], right[kColumns];
#pragma unroll
                for (int e = 0; e < kRows; ++e) left[e] = load<Scalar, kVector>(in[e] + k);
#pragma unroll
                for (int o = 0; o < kColumns; ++o) right[o] = load<Scalar, kVector>(weights[o] + k);
#pragma unroll
                for (int v = 0; v < kVector; ++v) {
#pragma unroll
                    for (int e = 0; e < kRows; ++e) {
#pragma unroll
                        for (int o = 0; o < kColumns; ++o) sums[e][o] += left[e].at[v] * right[o].at[v];
                    }
                }
            }
            if (!last) activate(sums);
#pragma unroll
            for (int e = 0; e < kRows; ++e) {
                const int example = first_example + e * down;
                if (example >= count) break;
                Scalar* out = activation(layer + 1) + example * row(layer + 1) + first_output;
#pragma unroll
                for (int o = 0; o < kColumns; ++o) {
                    if (first_output + o * across < outputs) store(out + o * across, sums[e][o]);
                }
            }
        });
    }

    // Fills the delta of the output layer; returns the mean loss, the same bits in every thread and for every team.
    __device__ Scalar loss_and_delta(const MlpSet<Scalar>& set, Scalar* accuracy) {
        const int outputs = width(p.shape.layers);
        Scalar* losses = memory + layout.losses;
        Scalar* correct = losses + set.count;
        for (int example = team.rank(); example < set.count; example += team.size()) {
            const std::int64_t begin = example * row(p.shape.layers);
            const Scalar* scores = activation(p.shape.layers) + begin;
            Scalar* delta_row = delta(p.shape.layers) + begin;
            const std::int64_t index = task * set.count + example;
            Scalar loss = Scalar(0), is_correct = Scalar(0);
            if (p.shape.loss == MlpLoss::kMse) {
                loss = squared_error(scores, set.target + index * outputs, delta_row, outputs, set.count);
            } else {
                loss = cross_entropy(scores, load(set.labels + index), delta_row, outputs, set.count, is_correct);
            }
            store(losses + example, loss);
            store(correct + example, is_correct);
        }
        team.barrier();  // all deltas and losses are there before anyone reads them
        const Scalar count = static_cast<Scalar>(set.count);
        if (accuracy != nullptr) {
            const Scalar share = sum(correct, set.count) / count;
            if (team.rank() == 0) store(accuracy + task, share);
        }
        const Scalar mean = sum(losses, set.count) / count;
        notice(mean);
        return mean;
    }

    // Every warp makes the whole sum.
    __device__ Scalar sum(const Scalar* values, int count) const {
        Scalar of_lane = Scalar(0);
        for (int i = lane(); i < count; i += 32) of_lane += load(values + i);
        return warp_sum(of_lane);
    }

    __device__ Scalar squared_error(const Scalar* scores, const Scalar* target, Scalar* delta_row, int outputs,
                                    int count) {
        Scalar loss = Scalar(0);
        for (int o = 0; o < outputs; ++o) {
            const Scalar difference = load(scores + o) - load(target + o);
            loss += difference * difference;
            store(delta_row + o, Scalar(2) * difference / static_cast<Scalar>(std::int64_t{count} * outputs));
        }
        return loss / static_cast<Scalar>(outputs);
    }

    // A label out of range makes loss and gradient NaN, as in reference.cross_entropy.
    __device__ Scalar cross_entropy(const Scalar* scores, std::int64_t label, Scalar* delta_row, int outputs, int count,
                                    Scalar& is_correct) {
        Scalar largest = load(scores);
        int best = 0;
        for (int o = 1; o < outputs; ++o) {
            const Scalar score = load(scores + o);
            // A NaN is the largest, as in torch's argmax.
            if (score > largest || (score != score && largest == largest)) {
                largest = score;
                best = o;
            }
        }
        Scalar sum = Scalar(0);
        for (int o = 0; o < outputs; ++o) sum += exp_of(load(scores + o) - largest);
        const bool in_range = label >= 0 && label < outputs;
        const Scalar invalid = in_range ? Scalar(0) : static_cast<Scalar>(NAN);
        for (int o = 0; o < outputs; ++o) {
            const Scalar share = exp_of(load(scores + o) - largest) / sum;
            const Scalar gradient = (o == label ? share - Scalar(1) : share) / static_cast<Scalar>(count);
            store(delta_row + o, gradient + invalid);
        }
        is_correct = best == label ? Scalar(1) : Scalar(0);
        return in_range ? log_of(sum) + largest - load(scores + label) : invalid;
    }

    // Starts from the output's delta. kStep: updates the weights; else each weight is replaced by its gradient, which
    // is safe because the layer's weights are not read again.
    template <bool kStep>
    __device__ void backward(int count, const Scalar* lr) {
        for (int layer = p.shape.layers - 1; layer >= 0; --layer) {
            const int outputs = width(layer + 1);
            if (layer > 0) {
                if (path<4, kVector>(count, width(layer)) <= path<1, kVector>(count, width(layer))) {
                    delta_below<4>(layer, count);
                } else {
                    delta_below<1>(layer, count);
                }
                team.barrier();  // all have read the weights before they change; the delta below is complete
            }
            if (!kStep || load(p.adapt + 2 * layer) != 0) {
                if (path<4, kVector>(outputs, width(layer)) <= path<1, kVector>(outputs, width(layer))) {
                    weight_gradient<kStep, 4>(layer, count, rates_of_weight(layer, lr));
                } else {
                    weight_gradient<kStep, 1>(layer, count, rates_of_weight(layer, lr));
                }
            }
            if (!kStep || load(p.adapt + 2 * layer + 1) != 0) {
                for (int o = team.rank(); o < outputs; o += team.size()) {
                    Scalar gradient = Scalar(0);
                    for (int example = 0; example < count; ++example) {
                        gradient += load(delta(layer + 1) + example * row(layer + 1) + o);
                    }
                    const bool by_element = kAnyStep && p.how.rates.by_element;
                    const Scalar rate = kStep ? load(rates_of_bias(layer, lr) + (by_element ? o : 0)) : Scalar(0);
                    notice(gradient);
                    if (kAnyStep && kept != nullptr) store(kept + (bias(layer) - weight(0)) + o, to_keep(gradient));
                    store(bias(layer) + o, taken<kStep>(load(bias(layer) + o), gradient, rate));
                }
            }
            team.barrier();  // the delta above is free for the next layer but one; the weights have moved
        }
    }

    // The delta of a layer's inputs. What it writes into padding is never read.
    template <int kExamples>
    __device__ void delta_below(int layer, int count) {
        const int outputs = width(layer + 1);
        const int down = parts(count, kExamples), across = parts(width(layer), kVector);
        share(down, across, [&](int first_example, int vector) {
            const Scalar* above[kExamples];
            Values sums[kExamples] = {};
#pragma unroll
            for (int e = 0; e < kExamples; ++e) {
                above[e] = delta(layer + 1) + smaller_of(first_example + e * down, count - 1) * row(layer + 1);
            }
            const Scalar* weights = weight(layer) + vector * kVector;
            int o = 0;
            for (; o + kVector <= outputs; o += kVector) {
                Values left[kExamples];
#pragma unroll
                for (int e = 0; e < kExamples; ++e) left[e] = load<Scalar, kVector>(above[e] + o);
#pragma unroll
                for (int v = 0; v < kVector; ++v) {
                    const Values right = load<Scalar, kVector>(weights + (o + v) * row(layer));
#pragma unroll
                    for (int e = 0; e < kExamples; ++e) add_product(sums[e], left[e].at[v], right);
                }
            }
            for (; o < outputs; ++o) {
                const Values right = load<Scalar, kVector>(weights + o * row(layer));
#pragma unroll
                for (int e = 0; e < kExamples; ++e) add_product(sums[e], load(above[e] + o), right);
            }
#pragma unroll
            for (int e = 0; e < kExamples; ++e) {
                const int example = first_example + e * down;
                if (example >= count) continue;
                const std::int64_t at = example * row(layer) + vector * kVector;
                const Values values = load<Scalar, kVector>(activation(layer) + at);
#pragma unroll
                for (int v = 0; v < kVector; ++v) sums[e].at[v] = through_activation(sums[e].at[v], values.at[v]);
                store<Scalar, kVector>(delta(layer) + at, sums[e]);
            }
        });
    }

    // The gradient of a layer's weights, and their step.
    template <bool kStep, int kOutputs>
    __device__ void weight_gradient(int layer, int count, const Scalar* lr) {
        constexpr int kTogether = kOutputs < kVector ? kOutputs : kVector;
        const Scalar rate = kStep ? load(lr) : Scalar(0);
        const int inputs = width(layer), outputs = width(layer + 1);
        share(parts(outputs, kOutputs), parts(inputs, kVector), [&](int tile, int vector) {
            const int first = tile * kOutputs;
            const Scalar* in = activation(layer) + vector * kVector;
            const Scalar* above = delta(layer + 1) + first;
            Scalar* weights = weight(layer) + std::int64_t{first} * row(layer) + vector * kVector;
            Values sums[kOutputs] = {};
            for (int example = 0; example < count; ++example) {
                const Values right = load<Scalar, kVector>(in + example * row(layer));
#pragma unroll
                for (int o = 0; o < kOutputs; o += kTogether) {
                    const auto left = load<Scalar, kTogether>(above + example * row(layer + 1) + o);
#pragma unroll
                    for (int v = 0; v < kTogether; ++v) add_product(sums[o + v], left.at[v], right);
                }
            }
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) {
                if (first + o >= outputs) break;
                Values values = load<Scalar, kVector>(weights);
                [[maybe_unused]] Values directions;
#pragma unroll
                for (int v = 0; v < kVector; ++v) {
                    // The gradient of padding is zero but where a delta is not finite; padding stays zero.
                    const int input = vector * kVector + v;
                    const Scalar gradient = input < inputs ? sums[o].at[v] : Scalar(0);
                    notice(gradient);
                    Scalar own = rate;
                    if (kAnyStep && kStep && p.how.rates.by_element && input < inputs) {
                        own = load(lr + std::int64_t{first + o} * inputs + input);
                    }
                    if (kAnyStep) directions.at[v] = to_keep(gradient);
                    values.at[v] = taken<kStep>(values.at[v], gradient, own);
                }
                if (kAnyStep && kept != nullptr) store<Scalar, kVector>(kept + (weights - weight(0)), directions);
                store<Scalar, kVector>(weights, values);
                weights += row(layer);
            }
        });
    }

    __device__ static void add_product(Values& sums, Scalar factor, const Values& values) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums.at[v] += factor * values.at[v];
    }

    // What replaces a parameter.
    template <bool kStep>
    __device__ Scalar taken(Scalar value, Scalar gradient, Scalar rate) const {
        if (!kStep) return gradient;
        if (kSteps == MlpSteps::kKept) return value;
        return stepped(value, rate, direction(gradient));
    }

    __device__ Scalar to_keep(Scalar gradient) const {
        return kSteps == MlpSteps::kKept ? gradient : direction(gradient);
    }

    // In which a step moves a parameter.
    __device__ Scalar direction(Scalar gradient) const {
        return p.method == Method::kSignMaml ? sign(gradient) : gradient;
    }

    __device__ void run() {
        take_parameters();
        take_examples(p.support);
        team.barrier();  // weights and examples are there before the first layer reads them
        for (int step = 0; step < p.steps; ++step) {
            forward(p.support.count);
            const Scalar loss = loss_and_delta(p.support, nullptr);
            if (team.rank() == 0) store(p.support_loss + step * p.tasks + task, loss);
            backward<true>(p.support.count, p.lr + step * 2 * p.shape.layers);
        }
        if (p.adapted != nullptr) give_parameters(p.adapted);
        if (p.query.count > 0) query();
        if (is_nonfinite(poison)) raise_flag(p.nonfinite + task);
    }

    __device__ void query() {
        evaluate();
        if (p.grads == nullptr) return;
        backward<false>(p.query.count, nullptr);
        give_parameters(p.grads);
    }

    // The query pass, forward; and the output's delta.
    __device__ void evaluate() {
        take_examples(p.query);
        team.barrier();  // the examples are there before the first layer reads them
        forward(p.query.count);
        const Scalar loss = loss_and_delta(p.query, p.query_accuracy);
        if (team.rank() == 0) store(p.query_loss + task, loss);
        const int outputs = width(p.shape.layers);
        if (p.predictions != nullptr) {
            Scalar* to = p.predictions + task * p.query.count * outputs;
            share(p.query.count, outputs, [&](int example, int o) {
                store(to + std::int64_t{example} * outputs + o,
                      load(activation(p.shape.layers) + example * row(p.shape.layers) + o));
            });
        }
    }
};

template <typename Scalar, bool kWarp, bool kInShared>
__global__ void __launch_bounds__(kWarp ? 32 : kMlpBlock, kWarp ? 16 : 2)
    mlp_meta_step_kernel(const MlpMetaStepParams<Scalar> p, const MlpLayout layout) {
    const Shared<Scalar> own(0, kInShared ? layout.size : 1);
    Scalar* memory = kInShared ? own.address(0) : p.workspace + std::int64_t{blockIdx.x} * layout.size;
    const Team<kWarp> team{};
    for (std::int64_t i = team.rank() * kMlpVector<Scalar>; i < layout.size; i += team.size() * kMlpVector<Scalar>) {
        store<Scalar, kMlpVector<Scalar>>(memory + i, {});
    }
    team.barrier();  // the padding is zero before anyone writes beside it
    for (std::int64_t task = blockIdx.x; task < p.tasks; task += gridDim.x) {
        MlpTask<Scalar, kWarp, kInShared> work{p, layout, team, memory, task, Scalar(0), nullptr};
        work.run();
    }
}

}  // namespace signmaml
