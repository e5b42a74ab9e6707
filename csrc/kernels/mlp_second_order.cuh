// A whole meta-step of small networks in one launch, by exact MAML, with rates that learn or belong to elements, with
// sharpness-aware steps or with steps that are counted: the steps and the query gradient v as in mlp_meta_step.cuh,
// then for exact MAML, from the last step to the first, v <- v - H u with u = rate * v of what the step moved.
//   H u is the derivative of the support gradient in the direction u: forward and backward of the step once more, each
//   beside its derivative (tangent):  z' = W a' + U a + ub;  d' below = act'(a) (d' W + d U) + act''(a) a' (d W)
// The gradient of a rate is -<v, direction of its step> over what shares it, with v of after that step.
// A sharpness-aware step takes its gradient at w + eps, with eps by the gradient at w (see conv_sharpness.cuh).
// A team owns a task as there; what the second order needs is in its part of the workspace. A thread owns whole sums.
// Launched by launch_mlp_second_order. Readable twin: meta_gradients in signmaml_ext/reference.py.
#pragma once

#include "kernels/mlp_meta_step.cuh"
#include "params/compact_sign_step.h"

namespace signmaml {

// A team of one warp takes a block's barriers too: kernels of its own would cost more to compile than they would gain.
// kKeeps: the gradients of a step are kept before anything moves; no such step is differentiated. Apart, because all in
// one would have more in registers than there are.
template <typename Scalar, bool kInShared, bool kKeeps>
struct MlpSecondOrderTask : MlpTask<Scalar, false, kInShared, kKeeps ? MlpSteps::kKept : MlpSteps::kAny> {
    using Base = MlpTask<Scalar, false, kInShared, kKeeps ? MlpSteps::kKept : MlpSteps::kAny>;
    using Values = typename Base::Values;
    using Base::activation;
    using Base::bias;
    using Base::delta;
    using Base::kVector;
    using Base::layout;
    using Base::memory;
    using Base::p;
    using Base::parts;
    using Base::row;
    using Base::share;
    using Base::task;
    using Base::team;
    using Base::through_activation;
    using Base::weight;
    using Base::width;

    // Rows and columns of a thread's tile.
    static constexpr int kTile = 2;

    const MlpSecondOrderLayout& places;
    Scalar* second;  // the team's part of the workspace
    bool of_maml;    // there is a query gradient, which goes back through the steps

    // The weights and biases, as they lie in the task's memory; places in `path`, u and v count from here.
    __device__ Scalar* parameters() const { return weight(0); }
    __device__ std::int64_t of_weight(int layer) const { return layout.weight[layer] - layout.weight[0]; }
    __device__ std::int64_t of_bias(int layer) const { return layout.bias[layer] - layout.weight[0]; }
    // A step's rates.
    __device__ const Scalar* rates(int step) const { return p.lr + step * rates_of_step(); }
    __device__ std::int64_t rates_of_step() const { return p.how.rates.by_element ? p.parameters : 2 * p.shape.layers; }
    __device__ bool differentiates() const { return !kKeeps && of_maml; }
    __device__ bool climbs() const { return p.rho > Scalar(0); }
    __device__ Scalar* directions(int step) const { return second + places.kept + step * places.parameters; }
    __device__ Scalar* ascent() const { return second + places.ascent; }
    __device__ Scalar* start() const { return second + places.start; }
    __device__ Scalar* counts() const { return second + places.counts; }
    __device__ Scalar* squares() const { return second + places.squares; }
    __device__ Scalar* path(int step) const { return second + places.path + step * places.parameters; }
    __device__ Scalar* direction() const { return second + places.direction; }
    __device__ Scalar* gradient() const { return second + places.gradient; }
    __device__ Scalar* tangent(int layer) const {
        return second + places.tangents + layout.activation[layer] - layout.activation[1];
    }
    __device__ Scalar* delta_tangent(int layer) const {
        return second + places.deltas + layout.delta[layer % 2] - layout.delta[0];
    }

    // Copies all weights and biases, with their padding.
    __device__ void copy(Scalar* to, const Scalar* from) const {
        for (std::int64_t i = team.rank() * kVector; i < places.parameters; i += team.size() * kVector) {
            store<Scalar, kVector>(to + i, load<Scalar, kVector>(from + i));
        }
    }

    // Calls `visit(tensor, place, place in theta)` for this thread's share of all parameters, or of what the steps
    // move.
    template <bool kAll = false, typename Visit>
    __device__ void each_parameter(const Visit& visit) const {
        for (int layer = 0; layer < p.shape.layers; ++layer) {
            const int inputs = width(layer), outputs = width(layer + 1);
            const std::int64_t theta = this->theta_weight(layer), theta_bias = theta + std::int64_t{outputs} * inputs;
            if (kAll || load(p.adapt + 2 * layer) != 0) {
                share(outputs, inputs, [&](int o, int i) {
                    visit(2 * layer, of_weight(layer) + std::int64_t{o} * row(layer) + i,
                          theta + std::int64_t{o} * inputs + i);
                });
            }
            if (kAll || load(p.adapt + 2 * layer + 1) != 0) {
                share(1, outputs, [&](int, int o) { visit(2 * layer + 1, of_bias(layer) + o, theta_bias + o); });
            }
        }
    }

    // A step by the gradients in `ascent`.
    __device__ void move_by_kept_gradient(int step) const {
        each_parameter([&](int tensor, std::int64_t place, std::int64_t theta) {
            const Scalar along = Base::direction(load(ascent() + place));
            const Scalar rate = load(rates(step) + (p.how.rates.by_element ? theta : tensor));
            if (p.how.rates.learnable) store(directions(step) + place, along);
            if (!p.how.counted) {
                store(parameters() + place, stepped(load(start() + place), rate, along));
                return;
            }
            const Scalar counted = load(counts() + place) + along;  // a NaN stays one until the counts are given
            store(counts() + place, counted);
            store(parameters() + place, stepped(load(p.theta + theta), rate, counted));
        });
        team.barrier();  // the parameters have moved
    }

    // What a parameter's gradient is multiplied by before its norm is taken.
    __device__ Scalar ascent_scale(Scalar value) const {
        if (!p.how.sharpness.adaptive) return Scalar(1);
        return value < Scalar(0) ? -value : value;
    }

    // To the sharpest place near the parameters. What does not move has no gradient in `ascent`, but 0.
    __device__ void climb() {
        const bool by_sign = p.how.sharpness.norm == SharpnessNorm::kLinf;
        Scalar factor = p.rho;
        if (!by_sign) {
            // As many sums as the largest team has threads, so that their order is that of every team.
            for (int sum = team.rank(); sum < kMlpBlock; sum += team.size()) {
                Scalar total = Scalar(0);
                for (std::int64_t place = sum; place < places.parameters; place += kMlpBlock) {
                    const Scalar scaled = ascent_scale(load(parameters() + place)) * load(ascent() + place);
                    total += scaled * scaled;
                }
                store(squares() + sum, total);
            }
            team.barrier();  // the sums are there; all have read the parameters that now move
            factor /= root_of(this->sum(squares(), kMlpBlock)) + static_cast<Scalar>(kSharpnessTiny);
        }
        each_parameter([&](int, std::int64_t place, std::int64_t) {
            const Scalar value = load(parameters() + place), gradient = load(ascent() + place);
            const Scalar scale = ascent_scale(value);
            store(start() + place, value);
            store(parameters() + place, value + factor * (scale * (by_sign ? sign(gradient) : scale * gradient)));
        });
        team.barrier();  // the parameters have moved before they are read
    }

    // As give_parameters.
    __device__ void give_counts() const {
        each_parameter<true>([&](int, std::int64_t place, std::int64_t theta) {
            const Scalar count = load(counts() + place);
            store(p.counts + task * p.parameters + theta, static_cast<std::int8_t>(count == count ? count : kNanCount));
        });
    }

    // Part of u, [rows, columns] with its padding; 0 for what does not move.
    __device__ void aim(std::int64_t place, int rows, int columns, int padded, const Scalar* rate,
                        const std::uint8_t* adapt) const {
        const bool moves = load(adapt) != 0;
        share(rows, padded, [&](int r, int c) {
            const std::int64_t at = place + std::int64_t{r} * padded + c;
            Scalar value = Scalar(0);
            if (moves && c < columns) {
                value =
                    load(rate + (p.how.rates.by_element ? std::int64_t{r} * columns + c : 0)) * load(gradient() + at);
            }
            store(direction() + at, value);
        });
    }

    // The gradients of a step's rates, with v of after it.
    __device__ void rate_gradients(int step, const Scalar* v) const {
        Scalar* to = p.rate_grads + (task * p.steps + step) * rates_of_step();
        for (int layer = 0; layer < p.shape.layers; ++layer) {
            const int inputs = width(layer), outputs = width(layer + 1);
            rate_gradient(to, 2 * layer, of_weight(layer), outputs, inputs, row(layer), v, directions(step));
            if (p.how.rates.by_element) to += std::int64_t{outputs} * inputs;
            rate_gradient(to, 2 * layer + 1, of_bias(layer), 1, outputs, outputs, v, directions(step));
            if (p.how.rates.by_element) to += outputs;
        }
    }

    // Those of a tensor, [rows, columns] with its padding, which is zero. A warp sums a tensor's products.
    __device__ void rate_gradient(Scalar* to, int tensor, std::int64_t place, int rows, int columns, int padded,
                                  const Scalar* v, const Scalar* along) const {
        const bool moves = load(p.adapt + tensor) != 0;
        if (p.how.rates.by_element) {
            share(rows, columns, [&](int r, int c) {
                const std::int64_t at = place + std::int64_t{r} * padded + c;
                store(to + std::int64_t{r} * columns + c, moves ? -(load(v + at) * load(along + at)) : Scalar(0));
            });
            return;
        }
        const int warp = team.rank() / 32, warps = team.size() / 32;
        if (tensor % warps != warp) return;
        Scalar sum = Scalar(0);
        const std::int64_t count = moves ? std::int64_t{rows} * padded : 0;
        for (std::int64_t i = lane(); i < count; i += 32) sum += load(v + place + i) * load(along + place + i);
        sum = warp_sum(sum);
        if (lane() == 0) store(to + tensor, -sum);
    }

    // The derivative of a layer's output, from that of its inputs. Neighbouring threads take neighbouring outputs.
    __device__ void forward_tangent(int layer, int count) const {
        const int inputs = width(layer), outputs = width(layer + 1);
        const bool last = layer + 1 == p.shape.layers;
        const int down = parts(count, kTile), across = parts(outputs, kTile);
        share(down, across, [&](int first_example, int first_output) {
            std::int64_t in[kTile], weights[kTile];
            Scalar sums[kTile][kTile];
#pragma unroll
            for (int e = 0; e < kTile; ++e) in[e] = smaller_of(first_example + e * down, count - 1) * row(layer);
#pragma unroll
            for (int o = 0; o < kTile; ++o) {
                const int output = smaller_of(first_output + o * across, outputs - 1);
                weights[o] = std::int64_t{output} * row(layer);
                const Scalar start = load(direction() + of_bias(layer) + output);
#pragma unroll
                for (int e = 0; e < kTile; ++e) sums[e][o] = start;
            }
            add_products(sums, activation(layer), in, direction() + of_weight(layer), weights, inputs);
            if (layer > 0) add_products(sums, tangent(layer), in, weight(layer), weights, inputs);
#pragma unroll
            for (int i = 0; i < kTile * kTile; ++i) {
                const int example = first_example + i / kTile * down, output = first_output + i % kTile * across;
                if (example >= count || output >= outputs) continue;
                const std::int64_t at = std::int64_t{example} * row(layer + 1) + output;
                const Scalar sum = sums[i / kTile][i % kTile];
                store(tangent(layer + 1) + at, last ? sum : through_activation(sum, load(activation(layer + 1) + at)));
            }
        });
    }

    // sums[e][o] += row e of `left` times row o of `right`.
    __device__ static void add_products(Scalar (&sums)[kTile][kTile], const Scalar* left,
                                        const std::int64_t (&left_rows)[kTile], const Scalar* right,
                                        const std::int64_t (&right_rows)[kTile], int depth) {
#pragma unroll 1
        for (int k = 0; k < depth; k += kVector) {
            Values a[kTile], b[kTile];
#pragma unroll
            for (int i = 0; i < kTile; ++i) {
                a[i] = load<Scalar, kVector>(left + left_rows[i] + k);
                b[i] = load<Scalar, kVector>(right + right_rows[i] + k);
            }
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
#pragma unroll
                for (int i = 0; i < kTile * kTile; ++i) {
                    sums[i / kTile][i % kTile] += a[i / kTile].at[v] * b[i % kTile].at[v];
                }
            }
        }
    }

    // The derivative of the output layer's delta.
    __device__ void output_tangent(int count) const {
        const int outputs = width(p.shape.layers);
        for (int example = team.rank(); example < count; example += team.size()) {
            const std::int64_t begin = std::int64_t{example} * row(p.shape.layers);
            const Scalar* of_scores = tangent(p.shape.layers) + begin;
            Scalar* to = delta_tangent(p.shape.layers) + begin;
            if (p.shape.loss == MlpLoss::kMse) {
                const Scalar elements = static_cast<Scalar>(std::int64_t{count} * outputs);
                for (int o = 0; o < outputs; ++o) store(to + o, Scalar(2) * load(of_scores + o) / elements);
            } else {
                softmax_tangent(activation(p.shape.layers) + begin, of_scores, to, outputs, count);
            }
        }
    }

    // s (t - <s, t>) / count with the softmax s of the scores and their tangents t. A label out of range needs
    // no care here: its delta was NaN in the step too, and so the query gradient is.
    __device__ void softmax_tangent(const Scalar* scores, const Scalar* of_scores, Scalar* to, int outputs,
                                    int count) const {
        Scalar largest = load(scores);
        for (int o = 1; o < outputs; ++o) largest = load(scores + o) > largest ? load(scores + o) : largest;
        Scalar sum = Scalar(0), mean = Scalar(0);
        for (int o = 0; o < outputs; ++o) {
            const Scalar part = exp_of(load(scores + o) - largest);
            sum += part;
            mean += part * load(of_scores + o);
        }
        mean /= sum;
        for (int o = 0; o < outputs; ++o) {
            const Scalar part = exp_of(load(scores + o) - largest) / sum;
            store(to + o, part * (load(of_scores + o) - mean) / static_cast<Scalar>(count));
        }
    }

    // The delta of a layer's inputs and its derivative. What it writes into padding is never read.
    __device__ void delta_tangent_below(int layer, int count) const {
        const int outputs = width(layer + 1);
        const int down = parts(count, kTile), across = parts(width(layer), kVector);
        share(down, across, [&](int first_example, int vector) {
            std::int64_t above[kTile];
            Values sums[kTile] = {}, tangents[kTile] = {};
#pragma unroll
            for (int e = 0; e < kTile; ++e) {
                above[e] = smaller_of(first_example + e * down, count - 1) * row(layer + 1);
            }
            const Scalar* weights = weight(layer) + vector * kVector;
            const Scalar* directions = direction() + of_weight(layer) + vector * kVector;
#pragma unroll 1
            for (int o = 0; o < outputs; ++o) {
                const Values of_weights = load<Scalar, kVector>(weights + std::int64_t{o} * row(layer));
                const Values of_directions = load<Scalar, kVector>(directions + std::int64_t{o} * row(layer));
#pragma unroll
                for (int e = 0; e < kTile; ++e) {
                    const Scalar of_delta = load(delta(layer + 1) + above[e] + o);
                    Base::add_product(sums[e], of_delta, of_weights);
                    Base::add_product(tangents[e], of_delta, of_directions);
                    Base::add_product(tangents[e], load(delta_tangent(layer + 1) + above[e] + o), of_weights);
                }
            }
#pragma unroll
            for (int e = 0; e < kTile; ++e) {
                const int example = first_example + e * down;
                if (example >= count) continue;
                const std::int64_t at = std::int64_t{example} * row(layer) + vector * kVector;
                const Values values = load<Scalar, kVector>(activation(layer) + at);
                const Values of_values = load<Scalar, kVector>(tangent(layer) + at);
#pragma unroll
                for (int v = 0; v < kVector; ++v) {
                    const Scalar value = values.at[v], sum = sums[e].at[v];
                    tangents[e].at[v] = through_activation(tangents[e].at[v], value);
                    if (p.shape.activation == Activation::kTanh) {
                        tangents[e].at[v] -= Scalar(2) * value * of_values.at[v] * sum;
                    }
                    sums[e].at[v] = through_activation(sum, value);
                }
                store<Scalar, kVector>(delta(layer) + at, sums[e]);
                store<Scalar, kVector>(delta_tangent(layer) + at, tangents[e]);
            }
        });
    }

    // v <- v - H u, the part of a layer.
    __device__ void correct(int layer, int count) {
        const int inputs = width(layer), outputs = width(layer + 1);
        share(parts(outputs, kTile), parts(inputs, kVector), [&](int tile, int vector) {
            const int first = tile * kTile;
            const Scalar* in = activation(layer) + vector * kVector;
            const Scalar* in_tangents = tangent(layer) + vector * kVector;
            Values sums[kTile] = {};
#pragma unroll 1
            for (int example = 0; example < count; ++example) {
                const std::int64_t above = std::int64_t{example} * row(layer + 1) + first;
                const Values right = load<Scalar, kVector>(in + std::int64_t{example} * row(layer));
                const auto of_delta = load<Scalar, kTile>(delta(layer + 1) + above);
                const auto of_tangent = load<Scalar, kTile>(delta_tangent(layer + 1) + above);
#pragma unroll
                for (int o = 0; o < kTile; ++o) Base::add_product(sums[o], of_tangent.at[o], right);
                if (layer == 0) continue;  // the examples have no tangents
                const Values right_tangents = load<Scalar, kVector>(in_tangents + std::int64_t{example} * row(layer));
#pragma unroll
                for (int o = 0; o < kTile; ++o) Base::add_product(sums[o], of_delta.at[o], right_tangents);
            }
            Scalar* gradients = gradient() + of_weight(layer) + std::int64_t{first} * row(layer) + vector * kVector;
#pragma unroll
            for (int o = 0; o < kTile; ++o) {
                if (first + o >= outputs) break;
                Values values = load<Scalar, kVector>(gradients);
#pragma unroll
                for (int v = 0; v < kVector; ++v) {
                    // As in weight_gradient: padding stays zero even where a delta is not finite.
                    if (vector * kVector + v < inputs) values.at[v] -= sums[o].at[v];
                    this->notice(values.at[v]);
                }
                store<Scalar, kVector>(gradients, values);
                gradients += row(layer);
            }
        });
        for (int o = team.rank(); o < outputs; o += team.size()) {
            Scalar* to = gradient() + of_bias(layer) + o;
            Scalar sum = Scalar(0);
            for (int example = 0; example < count; ++example) {
                sum += load(delta_tangent(layer + 1) + std::int64_t{example} * row(layer + 1) + o);
            }
            const Scalar corrected = load(to) - sum;
            this->notice(corrected);
            store(to, corrected);
        }
    }

    __device__ void differentiate_step(int step) {
        const int count = p.support.count, layers = p.shape.layers;
        copy(parameters(), path(step));
        for (int layer = 0; layer < layers; ++layer) {
            const std::int64_t which = 2 * layer;
            const int outputs = width(layer + 1);
            aim(of_weight(layer), outputs, width(layer), row(layer), this->rates_of_weight(layer, rates(step)),
                p.adapt + which);
            aim(of_bias(layer), 1, outputs, outputs, this->rates_of_bias(layer, rates(step)), p.adapt + which + 1);
        }
        team.barrier();  // weights, examples and u are there before the first layer reads them
        this->forward(count);
        for (int layer = 0; layer < layers; ++layer) {
            forward_tangent(layer, count);
            team.barrier();  // the layer's tangents are complete before the next reads them
        }
        this->loss_and_delta(p.support, nullptr);
        output_tangent(count);
        team.barrier();  // the output's tangents are there before anyone reads them
        for (int layer = layers - 1; layer >= 0; --layer) {
            if (layer > 0) delta_tangent_below(layer, count);
            correct(layer, count);
            team.barrier();  // the deltas below are complete, those above are free; the gradient is corrected
        }
    }

    // With kKept a step has its passes twice if the first ones only look where to climb.
    __device__ void take_steps() {
        bool looks = kKeeps && climbs();
#pragma unroll 1
        for (int step = 0; step < p.steps;) {
            if (differentiates()) copy(path(step), parameters());
            this->forward(p.support.count);
            const Scalar loss = this->loss_and_delta(p.support, nullptr);
            const bool first = !kKeeps || looks == climbs();
            if (team.rank() == 0 && first) store(p.support_loss + step * p.tasks + task, loss);
            this->kept = kKeeps ? ascent() : p.how.rates.learnable ? directions(step) : nullptr;
            this->template backward<true>(p.support.count, rates(step));
            if (kKeeps && looks) {
                climb();
                looks = false;
                continue;
            }
            if (kKeeps) move_by_kept_gradient(step);
            looks = kKeeps && climbs();
            ++step;
        }
    }

    __device__ void run() {
        this->take_parameters();
        this->take_examples(p.support);
        if (kKeeps && p.how.counted) {
            each_parameter<true>([&](int, std::int64_t place, std::int64_t) { store(counts() + place, Scalar(0)); });
        }
        team.barrier();  // weights and examples are there before they are copied and read
        take_steps();
        this->kept = nullptr;
        if (p.adapted != nullptr) this->give_parameters(p.adapted);
        if (kKeeps && p.counts != nullptr) give_counts();
        if (p.query.count > 0) {
            this->evaluate();
            if (p.grads != nullptr) go_back();
        }
        if (is_nonfinite(this->poison)) raise_flag(p.nonfinite + task);
    }

    // From the query loss to the gradients.
    __device__ void go_back() {
        this->template backward<false>(p.query.count, nullptr);
        if (!differentiates()) {
            this->give_parameters(p.grads);
            if (!p.how.rates.learnable) return;
            for (int step = 0; step < p.steps; ++step) rate_gradients(step, parameters());
            team.barrier();  // all have read the gradient before the next task's weights take its place
            return;
        }
        copy(gradient(), parameters());
        this->take_examples(p.support);
        team.barrier();  // the gradient is copied before the weights take its place and before u reads it
        for (int step = p.steps - 1; step >= 0; --step) {
            if (p.how.rates.learnable) rate_gradients(step, gradient());
            differentiate_step(step);
        }
        copy(parameters(), gradient());
        team.barrier();  // the meta-gradient is there before it is given
        this->give_parameters(p.grads);
    }
};

// Blocks of a multiprocessor that registers must be enough for. Doubles and addresses beyond shared memory take two
// each: on sm_80 a step that is differentiated would spill three of them.
template <typename Scalar, bool kInShared, bool kKeeps>
inline constexpr int kMlpResident = kInShared || kKeeps || sizeof(Scalar) == 4 ? 2 : 1;

template <typename Scalar, bool kInShared, bool kKeeps>
__global__ void __launch_bounds__(kMlpBlock, kMlpResident<Scalar, kInShared, kKeeps>)
    mlp_second_order_kernel(const MlpMetaStepParams<Scalar> p, const MlpLayout layout,
                            const MlpSecondOrderLayout places) {
    const Shared<Scalar> own(0, kInShared ? layout.size : 1);
    const std::int64_t of_task = kInShared ? 0 : layout.size;
    Scalar* of_team = p.workspace + std::int64_t{blockIdx.x} * (of_task + places.size);
    Scalar* memory = kInShared ? own.address(0) : of_team;
    const Team<false> team{};
    const bool of_maml = p.method == Method::kMaml && p.grads != nullptr && p.query.count > 0 && p.steps > 0;
    const auto clear = [&](Scalar* from, std::int64_t count) {
        for (std::int64_t i = team.rank() * kMlpVector<Scalar>; i < count; i += team.size() * kMlpVector<Scalar>) {
            store<Scalar, kMlpVector<Scalar>>(from + i, {});
        }
    };
    clear(memory, layout.size);
    clear(of_team + of_task, places.direction);
    clear(of_team + of_task + places.kept, places.start - places.kept);
    team.barrier();  // the padding of all rows is zero before anyone writes beside it
    for (std::int64_t task = blockIdx.x; task < p.tasks; task += gridDim.x) {
        MlpSecondOrderTask<Scalar, kInShared, kKeeps> work{
            {p, layout, team, memory, task, Scalar(0), nullptr}, places, of_team + of_task, of_maml};
        work.run();
    }
}

}  // namespace signmaml
