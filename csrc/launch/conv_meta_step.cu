#include "kernels/conv_first.cuh"
#include "kernels/conv_head.cuh"
#include "kernels/conv_rates.cuh"
#include "kernels/conv_second_order.cuh"
#include "kernels/conv_sharpness.cuh"
#include "kernels/conv_tangents.cuh"
#include "kernels/conv_update.cuh"
#include "launch/conv_products.cuh"
#include "launch/device.cuh"
#include "launch/launch.h"
#include "plan/conv_meta_step.h"

namespace signmaml {
namespace {

// Runs the launches of a plan on one chunk of tasks, with the arrays that each needs.
template <ConvPrecision kPrecision>
class ConvRun {
    using Stored = typename ConvStored<kPrecision>::Type;

  public:
    ConvRun(const ConvMetaStepParams<float>& params, const ConvPlan& plan, std::int64_t first_task, std::int64_t tasks,
            cudaStream_t stream)
        : p_(params), plan_(plan), first_(first_task), tasks_(tasks), stream_(stream) {}

    void launch_all() const {
        for (const ConvLaunch& one : plan_.launches) launch_one(one);
    }

  private:
    const ConvMetaStepParams<float>& p_;
    const ConvPlan& plan_;
    std::int64_t first_, tasks_;
    cudaStream_t stream_;

    template <typename T>
    PerTask<T> array(const ConvArray& place) const {
        return {reinterpret_cast<T*>(static_cast<char*>(p_.workspace) + place.offset), place.stride};
    }

    const ConvSet<float>& set_of(const ConvLaunch& one) const { return one.query ? p_.query : p_.support; }

    PerTask<const float> images(const ConvLaunch& one) const {
        const ConvSet<float>& set = set_of(one);
        const std::int64_t of_task = std::int64_t{set.count} * p_.shape.channels * p_.shape.height * p_.shape.width;
        return {set.x + first_ * of_task, of_task * std::int64_t{sizeof(float)}};
    }

    // The parameters of one block of the network for the launch's set.
    ConvLayer<Stored> layer(const ConvLaunch& one, int number) const {
        const ConvWorkspace& space = plan_.workspace;
        const ConvOffsets& places = plan_.network.blocks[number];
        const int count = set_of(one).count;
        ConvLayer<Stored> layer{};
        layer.block = plan_.blocks[number];
        layer.count = count;
        layer.weight = places.weight;
        layer.gamma = places.gamma;
        layer.beta = places.beta;
        layer.activation = array<Stored>(space.activation[number]);
        layer.choices = array<std::uint8_t>(space.choices[number]);
        layer.activation_grad = array<Stored>(space.activation_grad[number]);
        if (number == 0 && plan_.network.by_covariance) return layer;
        layer.raw = array<Stored>(space.raw[number]);
        layer.raw_grad = array<Stored>(space.raw_grad);
        layer.statistics = array<float>(space.statistics[number]);
        layer.grad_sums = array<float>(space.grad_sums[number]);
        layer.statistics_slices = forward_tiles(layer.block, count).slices;
        layer.grad_sums_slices = grad_sums_slices(number, count);
        return layer;
    }

    // The head computes the sums of the last block; for the others, data_grad of the next block does.
    int grad_sums_slices(int number, int count) const {
        return number + 1 == plan_.network.count ? 1 : data_grad_tiles(plan_.blocks[number + 1], count).slices;
    }

    PerTask<const float> weights() const { return array<const float>(plan_.workspace.weights); }

    // The weights that a launch's passes see; on the way back through the steps, those before its step.
    PerTask<float> weights(const ConvLaunch& one) const {
        if (one.part == ConvPart::kPass) return array<float>(plan_.workspace.weights);
        if (one.part == ConvPart::kRaised) return array<float>(plan_.workspace.raised);
        PerTask<float> kept = array<float>(plan_.workspace.history);
        kept.base += one.step * conv_packed(plan_.network);
        return kept;
    }

    PerTask<const float> read_only(const PerTask<float>& weights) const { return {weights.base, weights.stride}; }
    PerTask<const float> direction() const { return array<const float>(plan_.workspace.tangents.direction); }

    // The derivatives of `layer(one, number)`, which shares the choices.
    ConvLayer<Stored> tangent_of(const ConvLaunch& one, int number) const {
        const ConvTangentArrays& space = plan_.workspace.tangents;
        const int count = set_of(one).count;
        ConvLayer<Stored> layer = this->layer(one, number);
        layer.activation = array<Stored>(space.activation[number]);
        layer.activation_grad = array<Stored>(space.activation_grad[number]);
        if (!has_raw(number)) return layer;
        layer.raw = array<Stored>(space.raw[number]);
        layer.raw_grad = array<Stored>(space.raw_grad);
        layer.statistics = array<float>(space.statistics[number]);
        layer.grad_sums = array<float>(space.grad_sums[number]);
        layer.statistics_slices =
            static_cast<int>(tangent_slices(raw_positions(layer.block, count), layer.block.filters));
        layer.grad_sums_slices =
            static_cast<int>(tangent_slices(act_positions(layer.block, count), layer.block.filters));
        return layer;
    }

    PerTask<const ConvMoments> moments(bool query) const {
        return array<const ConvMoments>(query ? plan_.workspace.query_moments : plan_.workspace.support_moments);
    }

    void launch_one(const ConvLaunch& one) const {
        switch (one.kernel) {
            case ConvKernel::kPatchMoments: return patch_moments(one);
            case ConvKernel::kPack: return pack(one);
            case ConvKernel::kFirst: return first(one);
            case ConvKernel::kForward: return forward(one);
            case ConvKernel::kHead: return head(one);
            case ConvKernel::kDataGrad: return data_grad(one);
            case ConvKernel::kWeightGrad: return weight_grad(one);
            case ConvKernel::kFirstGrad: return first_gradient(one);
            case ConvKernel::kRawGrad: return raw_grad_of_first(one);
            case ConvKernel::kSignUpdate: return update(one, "conv_sign_update_kernel", conv_sign_update_kernel);
            case ConvKernel::kMetaAccumulate:
                return update(one, "conv_meta_accumulate_kernel", conv_meta_accumulate_kernel);
            case ConvKernel::kUnpack: return unpack(one);
            case ConvKernel::kRemember: return remember(one);
            case ConvKernel::kDirection: return find_direction(one);
            case ConvKernel::kFirstTangent: return first_tangent_of(one);
            case ConvKernel::kTangentSums:
                return between(one, "conv_tangent_sums_kernel", conv_tangent_sums_kernel<Stored>);
            case ConvKernel::kTangentActivate:
                return between(one, "conv_tangent_activate_kernel", conv_tangent_activate_kernel<Stored>);
            case ConvKernel::kTangentHead: return tangent_head(one);
            case ConvKernel::kTangentGradSums:
                return between(one, "conv_tangent_grad_sums_kernel", conv_tangent_grad_sums_kernel<Stored>);
            case ConvKernel::kTangentRawGrad:
                return between(one, "conv_tangent_raw_grad_kernel", conv_tangent_raw_grad_kernel<Stored>);
            case ConvKernel::kSubtract: return subtract(one);
            case ConvKernel::kRateGrads: return rate_gradients(one);
            case ConvKernel::kClimbSquares:
                return go("conv_climb_squares_kernel", conv_climb_squares_kernel, one, climb_params());
            case ConvKernel::kClimb: return go("conv_climb_kernel", conv_climb_kernel, one, climb_params());
        }
    }

    template <typename Params>
    void go(const char* name, void (*kernel)(Params), const ConvLaunch& one, const Params& params) const {
        launch(name, kernel, grid_of(one, tasks_), one.threads, one.shared_bytes, stream_, params);
    }

    void patch_moments(const ConvLaunch& one) const {
        const ConvBlock& block = plan_.blocks[0];
        const ConvWorkspace& space = plan_.workspace;
        const ConvPatchMomentsParams params{images(one),
                                            array<ConvMomentSums>(one.query ? space.query_sums : space.support_sums),
                                            block, moment_tiles(block, set_of(one).count)};
        const auto kernel = p_.shape.channels == 1   ? patch_moments_kernel<1>
                            : p_.shape.channels == 2 ? patch_moments_kernel<2>
                                                     : patch_moments_kernel<3>;
        go("patch_moments_kernel", kernel, one, params);
    }

    void pack(const ConvLaunch& one) const {
        const ConvWorkspace& space = plan_.workspace;
        ConvPackParams params{};
        params.theta = p_.theta;
        params.weights = array<float>(space.weights);
        params.network = plan_.network;
        if (plan_.network.by_covariance) {
            const ConvBlock& block = plan_.blocks[0];
            params.norm = array<ConvFirstNorm>(space.norm);
            if (p_.support.count > 0) {
                params.support_sums = array<const ConvMomentSums>(space.support_sums);
                params.support = array<ConvMoments>(space.support_moments);
                params.support_slices = moment_tiles(block, p_.support.count).slices;
            }
            if (p_.query.count > 0) {
                params.query_sums = array<const ConvMomentSums>(space.query_sums);
                params.query = array<ConvMoments>(space.query_moments);
                params.query_slices = moment_tiles(block, p_.query.count).slices;
            }
        }
        params.starts_with_query = p_.steps == 0;
        params.eps = plan_.blocks[0].eps;
        if (p_.how.counted) params.counts = array<float>(space.counts);
        go("conv_pack_kernel", conv_pack_kernel, one, params);
    }

    void unpack(const ConvLaunch& one) const {
        const std::int64_t first = first_ * p_.parameters;
        ConvUnpackParams params{p_.theta, weights(), nullptr, nullptr, plan_.network};
        if (p_.counts != nullptr) {
            params.weights = array<const float>(plan_.workspace.counts);
            params.counts = p_.counts + first;
        } else {
            params.adapted = p_.adapted + first;
        }
        go("conv_unpack_kernel", conv_unpack_kernel, one, params);
    }

    void first(const ConvLaunch& one) const {
        ConvFirstParams<Stored> params{};
        params.images = images(one);
        params.weights = read_only(weights(one));
        params.moments = moments(one.query);
        params.norm = array<const ConvFirstNorm>(plan_.workspace.norm);
        params.layer = layer(one, 0);
        params.tiles = first_tiles(params.layer.block, params.layer.count);
        params.by_groups = divisor_of(params.layer.block.filters / kFirstFilters, kConvTile * kConvFilters);
        const bool pools = p_.shape.halving == Halving::kMaxPool;
        go("conv_first_kernel", pools ? conv_first_kernel<true, Stored> : conv_first_kernel<false, Stored>, one,
           params);
    }

    void first_gradient(const ConvLaunch& one) const {
        ConvFirstGradParams<Stored> params{};
        params.images = images(one);
        params.moments = moments(one.query);
        params.layer = layer(one, 0);
        params.partials = array<float>(plan_.workspace.first_partials);
        if (one.part == ConvPart::kTangent) {  // the same sums of the gradient's derivative
            params.layer = tangent_of(one, 0);
            params.partials = array<float>(plan_.workspace.tangents.first_partials);
        }
        params.tiles = first_tiles(params.layer.block, params.layer.count);
        const auto kernel = p_.shape.channels == 1   ? conv_first_grad_kernel<1, Stored>
                            : p_.shape.channels == 2 ? conv_first_grad_kernel<2, Stored>
                                                     : conv_first_grad_kernel<3, Stored>;
        go("conv_first_grad_kernel", kernel, one, params);
    }

    void raw_grad_of_first(const ConvLaunch& one) const {
        const ConvRawGradParams<Stored> params{read_only(weights(one)), layer(one, 0)};
        go("conv_raw_grad_kernel", conv_raw_grad_kernel<Stored>, one, params);
    }

    bool has_raw(int block) const { return block > 0 || !plan_.network.by_covariance; }

    bool goes_back(const ConvLaunch& one) const { return !one.query || plan_.request.wants_grads; }

    void forward(const ConvLaunch& one) const {
        const bool tangent = one.part == ConvPart::kTangent;
        ConvForwardParams<Stored> params{};
        params.weights = tangent ? direction() : read_only(weights(one));
        params.layer = layer(one, one.block);
        if (one.block == 0) {
            params.source = ConvSource::kImage;
            params.images = images(one);
        } else {
            params.source = has_raw(one.block - 1) && !tangent ? ConvSource::kRaw : ConvSource::kActivation;
            params.below = layer(one, one.block - 1);
        }
        if (tangent) {
            params.layer.raw = array<Stored>(plan_.workspace.tangents.raw[one.block]);
            params.layer.statistics = {};
            if (one.block > 0) {
                params.second_input = array<const Stored>(plan_.workspace.tangents.activation[one.block - 1]);
                params.second_weights = read_only(weights(one));
            }
        }
        params.tiles = forward_tiles(params.layer.block, params.layer.count);
        params.keep = goes_back(one);
        params.memory = forward_memory(kPrecision, params.tiles, params.layer.block.stride,
                                       params.layer.block.in_channels, conv_columns(p_.shape.filters));
        launch_conv_forward<kPrecision>(params, one, tasks_, stream_);
    }

    void data_grad(const ConvLaunch& one) const {
        ConvDataGradParams<Stored> params{};
        params.weights = read_only(weights(one));
        params.layer = layer(one, one.block);
        params.below = layer(one, one.block - 1);
        params.below_is_raw = has_raw(one.block - 1);
        if (one.part == ConvPart::kTangent) {
            params.weights = direction();
            params.raw_grad = array<const Stored>(plan_.workspace.raw_grad);
            params.second_raw_grad = array<const Stored>(plan_.workspace.tangents.raw_grad);
            params.second_weights = read_only(weights(one));
            params.below = tangent_of(one, one.block - 1);
            params.below_is_raw = false;
        }
        const ConvBlock& block = params.layer.block;
        params.tiles = data_grad_tiles(block, params.layer.count);
        params.memory = data_grad_memory(kPrecision, params.tiles, block.stride, block.in_channels, block.filters,
                                         conv_columns(block.in_channels));
        launch_conv_data_grad<kPrecision>(params, one, tasks_, stream_);
    }

    void weight_grad(const ConvLaunch& one) const {
        ConvWeightGradParams<Stored> params{};
        params.layer = layer(one, one.block);
        if (one.block == 0) {
            params.source = ConvSource::kImage;
            params.images = images(one);
        } else {
            params.source = ConvSource::kActivation;
            params.input = array<const Stored>(plan_.workspace.activation[one.block - 1]);
        }
        if (one.part == ConvPart::kTangent) {
            params.layer.raw_grad = array<Stored>(plan_.workspace.tangents.raw_grad);
            if (one.block > 0) {
                params.second_input = array<const Stored>(plan_.workspace.tangents.activation[one.block - 1]);
                params.second_raw_grad = array<const Stored>(plan_.workspace.raw_grad);
            }
        }
        params.partials = array<float>(plan_.workspace.weight_partials[one.block]);
        params.tiles = weight_grad_tiles(params.layer.block, params.layer.count);
        params.memory =
            weight_grad_memory(params.tiles, params.layer.block.stride, conv_weight_columns(p_.shape.filters));
        launch_conv_weight_grad<kPrecision>(params, one, tasks_, stream_);
    }

    void head(const ConvLaunch& one) const {
        const ConvSet<float>& set = set_of(one);
        const ConvNetwork& net = plan_.network;
        ConvHeadParams<Stored> params{};
        params.layer = layer(one, net.count - 1);
        params.weights = weights(one);
        params.features = array<float>(plan_.workspace.features);
        params.scores = array<float>(plan_.workspace.scores);
        params.labels = set.labels + first_ * set.count;
        params.loss = one.query ? p_.query_loss + first_ : p_.support_loss + one.step * p_.tasks + first_;
        if (one.query) {
            params.accuracy = p_.query_accuracy == nullptr ? nullptr : p_.query_accuracy + first_;
            params.logits = p_.logits == nullptr ? nullptr : p_.logits + first_ * set.count * net.ways;
            params.grads = p_.grads == nullptr ? nullptr : p_.grads + first_ * p_.parameters;
            params.pass = p_.grads == nullptr ? ConvPass::kForward : ConvPass::kGradient;
        } else if (one.part == ConvPart::kAgain) {
            params.loss = nullptr;
            params.shares = array<float>(plan_.workspace.shares);
            params.pass = ConvPass::kAgain;
        } else {
            if (one.part == ConvPart::kRaised) params.loss = nullptr;  // the loss of the step is known
            params.rule = rule(one);
            params.pass = ConvPass::kStep;
        }
        params.nonfinite = p_.nonfinite + first_;
        params.weight = net.head_weight;
        params.bias = net.head_bias;
        params.theta_weight = net.theta_head_weight;
        params.parameters = p_.parameters;
        params.ways = net.ways;
        const ConvBlock& last = params.layer.block;
        params.by_width = divisor_of(last.act_width, std::int64_t{last.act_height} * last.act_width);
        params.readout = p_.shape.readout;
        params.source_is_raw = has_raw(net.count - 1);
        params.tensor = net.tensors - 2;
        launch("conv_head_kernel", conv_head_kernel<Stored>, dim3(static_cast<unsigned>(tasks_)), one.threads,
               one.shared_bytes, stream_, params);
    }

    void update(const ConvLaunch& one, const char* name, void (*kernel)(ConvUpdateParams)) const {
        go(name, kernel, one, update_params(one));
    }

    ConvUpdateParams update_params(const ConvLaunch& one) const {
        const ConvWorkspace& space = plan_.workspace;
        const ConvNetwork& net = plan_.network;
        const int count = set_of(one).count;
        ConvUpdateParams params{};
        params.weights = weights(one);
        params.network = net;
        for (int i = 0; i < net.count; ++i) {
            if (!has_raw(i)) continue;
            params.weight_partials[i] = array<const float>(space.weight_partials[i]);
            params.grad_sums[i] = array<const float>(space.grad_sums[i]);
            params.weight_slices[i] = weight_grad_tiles(plan_.blocks[i], count).slices;
            params.grad_sums_slices[i] = grad_sums_slices(i, count);
        }
        if (net.by_covariance) {
            params.first_partials = array<const float>(space.first_partials);
            params.first_slices = first_tiles(plan_.blocks[0], count).slices;
            params.moments = moments(one.query);
            params.norm = array<ConvFirstNorm>(space.norm);
            const bool last = one.step + 1 == p_.steps;
            if (!one.query && !only_looks(one) && !(last && p_.query.count == 0)) {
                params.next_moments = moments(last);
            }
            params.eps = plan_.blocks[0].eps;
        }
        if (!one.query) params.rule = rule(one);
        params.grads = p_.grads == nullptr ? nullptr : p_.grads + first_ * p_.parameters;
        params.nonfinite = p_.nonfinite + first_;
        return params;
    }

    // Whether a launch is of the passes that find where to climb: their gradients are kept, and nothing moves.
    bool only_looks(const ConvLaunch& one) const {
        return plan_.request.how.climbs() && one.part == ConvPart::kPass && !one.query;
    }

    ConvStepRule rule(const ConvLaunch& one) const {
        const ConvWorkspace& space = plan_.workspace;
        const std::int64_t of_step = p_.how.rates.of_row(p_.parameters, plan_.network.tensors);
        ConvStepRule rule{};
        rule.lr = p_.lr + one.step * of_step;
        rule.adapt = p_.adapt;
        rule.by_element = p_.how.rates.by_element;
        if (only_looks(one)) {
            rule.kept = array<float>(space.ascent);
            return rule;
        }
        rule.weights = array<float>(space.weights);
        rule.by_sign = p_.method == Method::kSignMaml;
        if (plan_.request.learns_rates()) rule.kept = directions(one.step);
        if (p_.how.counted) {
            rule.counts = array<float>(space.counts);
            rule.theta = p_.theta;
        }
        return rule;
    }

    ConvClimbParams climb_params() const {
        const ConvWorkspace& space = plan_.workspace;
        ConvClimbParams params{};
        params.weights = weights();
        params.gradient = array<const float>(space.ascent);
        params.raised = array<float>(space.raised);
        params.squares = array<double>(space.squares);
        params.network = plan_.network;
        params.adapt = p_.adapt;
        if (plan_.network.by_covariance) {
            params.moments = moments(/*query=*/false);
            params.norm = array<ConvFirstNorm>(space.norm);
        }
        params.eps = plan_.blocks[0].eps;
        params.sharpness = p_.how.sharpness;
        params.slices = static_cast<int>(conv_weight_blocks(plan_.network));
        return params;
    }

    PerTask<float> directions(int step) const {
        PerTask<float> kept = array<float>(plan_.workspace.directions);
        kept.base += step * conv_packed(plan_.network);
        return kept;
    }

    void rate_gradients(const ConvLaunch& one) const {
        const ConvNetwork& net = plan_.network;
        const std::int64_t of_step = p_.how.rates.of_row(p_.parameters, net.tensors);
        ConvRateGradsParams params{};
        params.kept = read_only(directions(one.step));
        params.packed = conv_packed(net);
        params.network = net;
        params.grads = p_.grads + first_ * p_.parameters;
        params.adapt = p_.adapt;
        params.row = p_.steps * of_step;
        params.rate_grads = p_.rate_grads + first_ * params.row + one.step * of_step;
        params.by_element = p_.how.rates.by_element;
        go("conv_rate_grads_kernel", conv_rate_grads_kernel, one, params);
    }

    // ---- exact MAML

    void remember(const ConvLaunch& one) const {
        const ConvNetwork& net = plan_.network;
        ConvRememberParams params{weights(), array<float>(plan_.workspace.history), net.head_bias + net.ways};
        params.kept.base += one.step * conv_packed(net);
        go("conv_remember_kernel", conv_remember_kernel, one, params);
    }

    void find_direction(const ConvLaunch& one) const {
        const ConvWorkspace& space = plan_.workspace;
        ConvDirectionParams params{};
        params.weights = read_only(weights(one));
        params.direction = array<float>(space.tangents.direction);
        params.network = plan_.network;
        if (plan_.network.by_covariance) {
            params.moments = moments(/*query=*/false);
            params.norm = array<ConvFirstNorm>(space.norm);
            params.tangent = array<ConvFirstTangent>(space.tangents.norm);
        }
        params.grads = p_.grads + first_ * p_.parameters;
        params.rule = rule(one);
        params.eps = plan_.blocks[0].eps;
        go("conv_direction_kernel", conv_direction_kernel, one, params);
    }

    void first_tangent_of(const ConvLaunch& one) const {
        const ConvWorkspace& space = plan_.workspace;
        ConvFirstTangentParams<Stored> params{};
        params.images = images(one);
        params.weights = read_only(weights(one));
        params.direction = direction();
        params.moments = moments(/*query=*/false);
        params.norm = array<const ConvFirstNorm>(space.norm);
        params.tangent = array<const ConvFirstTangent>(space.tangents.norm);
        params.layer = layer(one, 0);
        params.activation = array<Stored>(space.tangents.activation[0]);
        params.tiles = first_tiles(params.layer.block, params.layer.count);
        const auto kernel = p_.shape.channels == 1   ? conv_first_tangent_kernel<1, Stored>
                            : p_.shape.channels == 2 ? conv_first_tangent_kernel<2, Stored>
                                                     : conv_first_tangent_kernel<3, Stored>;
        go("conv_first_tangent_kernel", kernel, one, params);
    }

    // One of the kernels between the products.
    void between(const ConvLaunch& one, const char* name, void (*kernel)(ConvTangentParams<Stored>)) const {
        const ConvTangentParams<Stored> params{read_only(weights(one)), direction(), layer(one, one.block),
                                               tangent_of(one, one.block)};
        go(name, kernel, one, params);
    }

    void tangent_head(const ConvLaunch& one) const {
        const ConvWorkspace& space = plan_.workspace;
        const ConvNetwork& net = plan_.network;
        const ConvBlock& last = plan_.blocks[net.count - 1];
        ConvTangentHeadParams<Stored> params{};
        params.weights = read_only(weights(one));
        params.direction = direction();
        params.features = array<const float>(space.features);
        params.shares = array<const float>(space.shares);
        params.scores = array<const float>(space.scores);
        params.activation = array<const Stored>(space.tangents.activation[net.count - 1]);
        params.activation_grad = array<Stored>(space.tangents.activation_grad[net.count - 1]);
        params.features_tangent = array<float>(space.tangents.features);
        params.logits_tangent = array<float>(space.tangents.logits);
        params.scores_tangent = array<float>(space.tangents.scores);
        params.grads = p_.grads + first_ * p_.parameters;
        params.nonfinite = p_.nonfinite + first_;
        params.weight = net.head_weight;
        params.bias = net.head_bias;
        params.theta_weight = net.theta_head_weight;
        params.parameters = p_.parameters;
        params.count = set_of(one).count;
        params.pixels = last.act_height * last.act_width;
        params.filters = net.filters;
        params.ways = net.ways;
        params.readout = p_.shape.readout;
        launch("conv_tangent_head_kernel", conv_tangent_head_kernel<Stored>, dim3(static_cast<unsigned>(tasks_)),
               one.threads, one.shared_bytes, stream_, params);
    }

    void subtract(const ConvLaunch& one) const {
        const ConvWorkspace& space = plan_.workspace;
        ConvSubtractParams params{};
        params.update = update_params(one);
        params.direction = direction();
        for (int i = 0; i < plan_.network.count; ++i) {
            if (!has_raw(i)) continue;
            const ConvLayer<Stored> tangent = tangent_of(one, i);
            params.update.grad_sums[i] = {tangent.grad_sums.base, tangent.grad_sums.stride};
            params.update.grad_sums_slices[i] = tangent.grad_sums_slices;
        }
        if (plan_.network.by_covariance) {
            params.first_partials_tangent = array<const float>(space.tangents.first_partials);
            params.first_tangent = array<const ConvFirstTangent>(space.tangents.norm);
        }
        go("conv_subtract_kernel", conv_subtract_kernel, one, params);
    }
};

template <ConvPrecision kPrecision>
void run_chunks(const ConvMetaStepParams<float>& params, const ConvPlan& plan, cudaStream_t stream) {
    for (std::int64_t first = 0; first < params.tasks; first += plan.chunk) {
        ConvRun<kPrecision>(params, plan, first, smaller(plan.chunk, params.tasks - first), stream).launch_all();
    }
}

}  // namespace

void launch_conv_meta_step(const ConvMetaStepParams<float>& params, ConvPrecision precision, bool by_covariance,
                           std::int64_t workspace_limit, int device, void* raw_stream) {
    if (params.tasks == 0) return;
    const DeviceScope scope(device);
    const auto stream = static_cast<cudaStream_t>(raw_stream);
    const ConvPlan plan =
        plan_conv_meta_step(params.shape, conv_request(params), precision, by_covariance, workspace_limit);
    switch (precision) {
        case ConvPrecision::kFp32: return run_chunks<ConvPrecision::kFp32>(params, plan, stream);
        case ConvPrecision::kTf32: return run_chunks<ConvPrecision::kTf32>(params, plan, stream);
        case ConvPrecision::kBf16: return run_chunks<ConvPrecision::kBf16>(params, plan, stream);
    }
}

}  // namespace signmaml
