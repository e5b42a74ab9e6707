// The derivative of block 0's passes in one direction of its parameters; tangents.h says what `t` and `d` are. Its
// input has no derivative, so that of its convolution is one convolution with other weights.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/first_block.h"
#include "cpu/isa/conv/first_block_grad.h"
#include "cpu/isa/conv/tangents.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// mean. and the mean of (raw - mean) raw., [channels] of block 0: W. times the patches' mean, and W covariance W.^T.
template <typename Scalar>
void tangent_moments_of_patches(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, double* mean,
                                double* covariance) {
    const ConvBlockPlan& b = t.block(0);
    const double* patch_mean = t.patch_mean();
    const std::int64_t channels = t.layout->channels, patch = 9 * b.inputs, group = b.vectors * kLanes<Scalar>;
    for (std::int64_t first = 0; first < channels; first += group) {
        const Scalar* weight = t.at(b.weight) + first * patch;
        const Scalar* tangent = d.at(d.block(0).weight) + first * patch;
        for (std::int64_t i = 0; i < patch; ++i) {
            double product[kConvFilters];
            times_covariance(t, i, weight, group, product);
            for (std::int64_t c = 0; c < group; ++c) {
                mean[first + c] += patch_mean[i] * tangent[i * group + c];
                covariance[first + c] += product[c] * tangent[i * group + c];
            }
        }
    }
}

// The vectors from kMean to kShift, of any block. The variance moves by twice the mean of (raw - mean) raw.
template <typename Scalar>
void tangent_statistics(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, int block) {
    double mean[kConvFilters] = {}, covariance[kConvFilters] = {};
    if (block == 0) {
        tangent_moments_of_patches(t, d, mean, covariance);
    } else {
        tangent_moments_of_items(t, d, block, mean, covariance);
    }
    for (std::int64_t c = 0; c < t.layout->channels; ++c) {
        const double inverse = t.vector(block, kInverse)[c];
        const double inverse_tangent = -inverse * inverse * inverse * covariance[c];
        const double scale_tangent =
            d.vector(block, kGamma)[c] * inverse + t.vector(block, kGamma)[c] * inverse_tangent;
        d.vector(block, kMean)[c] = static_cast<Scalar>(mean[c]);
        d.vector(block, kInverse)[c] = static_cast<Scalar>(inverse_tangent);
        d.vector(block, kScale)[c] = static_cast<Scalar>(scale_tangent);
        d.vector(block, kShift)[c] =
            static_cast<Scalar>(d.vector(block, kBeta)[c] - t.vector(block, kMean)[c] * scale_tangent -
                                mean[c] * t.vector(block, kScale)[c]);
    }
}

// d's first_weight <- scale. weight + scale weight., transformed where the block pools
template <typename Scalar>
void tangent_transform_first(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t group = b.vectors * kLanes<Scalar>, row = 3 * std::int64_t{b.inputs} * group;
    for (std::int64_t first = 0; first < t.layout->channels; first += group) {
        const Scalar* weight = t.at(b.weight) + first * 9 * b.inputs;
        const Scalar* tangent = d.at(d.block(0).weight) + first * 9 * b.inputs;
        Scalar* to = d.at(d.layout->first_weight) + first * (b.stride == 1 ? 12 : 9) * b.inputs;
        transform_first_group(to, row, b.stride, [&](std::int64_t i) {
            const std::int64_t c = first + i % group;
            return load(d.vector(0, kScale) + c) * load(weight + i) + load(t.vector(0, kScale) + c) * load(tangent + i);
        });
    }
}

// d's activation of some items
template <typename Scalar>
void tangent_first(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d, std::int64_t item, Scalar* scratch) {
    const ConvBlockPlan& b = t.block(0);
    if (b.stride == 1) return forward_first_pooled<Scalar, TakeChosen<Scalar>>(d, t, item, scratch);
    const std::int64_t to_own = t.block(0).activation - d.block(0).activation;
    if (first_is_gray(t)) {
        return forward_first_gray(d, item, [to_own](Vector<Scalar> sum, const Scalar* place) {
            return passed_by_relu<Scalar>(load(place + to_own), sum);
        });
    }
    const Rows rows = raw_rows(t, 0, item);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>;
    const Runs runs = window_runs((b.in_w + 2) * std::int64_t{b.inputs}, b.inputs, b.inputs, group);
    for (std::int64_t y = rows.first; y < rows.first + rows.count; ++y) {
        Scalar* to = activation_row(d, 0, rows.example, y);
        for (std::int64_t first = 0; first < channels; first += group) {
            convolve_row(to + first, one_row(channels), input_row(t, 0, rows.example, y),
                         b.stride * std::int64_t{b.inputs}, b.out_w, runs,
                         d.at(d.layout->first_weight) + first * 9 * b.inputs, b.vectors);
        }
        for (std::int64_t x = 0; x < b.act_w; ++x, to += channels) {
            for (std::int64_t c = 0; c < channels; c += kLanes<Scalar>) {
                const Vector<Scalar> moved = load(to + c) + load(d.vector(0, kShift) + c);
                store(to + c, passed_by_relu<Scalar>(load(to + to_own + c), moved));
            }
        }
    }
}

// From finish_first: P is the sum of patches at the winners, less d beta times the patches' mean, and
//     d gamma = inverse * (sum over a patch of W P),  dW = scale * (P - inverse * d gamma * covariance W).
// Here, the derivatives of d gamma and dW.
template <typename Scalar>
void tangent_finish_first(const ConvTask<Scalar>& t, const ConvTask<Scalar>& d) {
    const ConvBlockPlan& b = t.block(0);
    const std::int64_t channels = t.layout->channels, group = b.vectors * kLanes<Scalar>, patch = 9 * b.inputs;
    const double* patch_mean = t.patch_mean();
    double beta[kConvFilters] = {}, beta_tangent[kConvFilters] = {};
    for (std::int64_t item = 0; item < t.examples * b.half_items; ++item) {
        for (std::int64_t c = 0; c < channels; ++c) {
            beta[c] += t.partial(item).grad_sums()[c];
            beta_tangent[c] += d.partial(item).grad_sums()[c];
        }
    }
    for (std::int64_t first = 0; first < channels; first += group) {
        const Scalar* weight = t.at(b.weight) + first * patch;
        const Scalar* weight_tangent = d.at(d.block(0).weight) + first * patch;
        double sums[kConvLargestPatch][kConvFilters] = {}, tangents[kConvLargestPatch][kConvFilters] = {};  // P and P.
        double own[kConvFilters] = {}, moved[kConvFilters] = {};  // the sum of W P, and its derivative
        for (std::int64_t i = 0; i < patch; ++i) {
            for (std::int64_t item = 0; item < t.examples * b.items; ++item) {
                const std::int64_t place = first * patch + i * group;
                for (std::int64_t c = 0; c < group; ++c) {
                    sums[i][c] += t.partial(item).patch_grads()[place + c];
                    tangents[i][c] += d.partial(item).patch_grads()[place + c];
                }
            }
            for (std::int64_t c = 0; c < group; ++c) {
                sums[i][c] -= beta[first + c] * patch_mean[i];
                tangents[i][c] -= beta_tangent[first + c] * patch_mean[i];
                own[c] += weight[i * group + c] * sums[i][c];
                moved[c] += weight[i * group + c] * tangents[i][c] + weight_tangent[i * group + c] * sums[i][c];
            }
        }
        double slope[kConvFilters], slope_tangent[kConvFilters];  // inverse * d gamma, and its derivative
        for (std::int64_t c = 0; c < group; ++c) {
            const double inverse = t.vector(0, kInverse)[first + c];
            const double inverse_tangent = d.vector(0, kInverse)[first + c];
            const double gamma = inverse * own[c], gamma_tangent = inverse_tangent * own[c] + inverse * moved[c];
            slope[c] = inverse * gamma;
            slope_tangent[c] = inverse_tangent * gamma + inverse * gamma_tangent;
            d.vector(0, kBetaGrad)[first + c] = static_cast<Scalar>(beta_tangent[first + c]);
            d.vector(0, kGammaGrad)[first + c] = static_cast<Scalar>(gamma_tangent);
        }
        for (std::int64_t i = 0; i < patch; ++i) {
            double dense[kConvFilters], dense_tangent[kConvFilters];
            times_covariance(t, i, weight, group, dense);
            times_covariance(t, i, weight_tangent, group, dense_tangent);
            for (std::int64_t c = 0; c < group; ++c) {
                const double scale = t.vector(0, kScale)[first + c], scale_tangent = d.vector(0, kScale)[first + c];
                d.at(d.block(0).weight_grad)[first * patch + i * group + c] = static_cast<Scalar>(
                    scale_tangent * (sums[i][c] - slope[c] * dense[c]) +
                    scale * (tangents[i][c] - slope_tangent[c] * dense[c] - slope[c] * dense_tangent[c]));
            }
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
