// Exact MAML: the derivatives of a step's passes in the direction in which the step moved the parameters. A dot marks
// them: z. is the derivative of z. The convolutions' are sums of two products and run in conv_forward, conv_data_grad
// and conv_weight_grad; these kernels do what lies between, from what the step's own passes have left.
//   conv_first_tangent      a. of block 1 by covariance; a lane owns one filter
//   conv_tangent_sums       sum z. and sum xhat z. of a block
//   conv_tangent_activate   a. = y. at the winners where ReLU passes, y. = gamma. xhat + gamma xhat. + beta.
//   conv_tangent_grad_sums  sum dy. and sum (dy. xhat + dy xhat.)
//   conv_tangent_raw_grad   dz. = (gamma. r + gamma r.) e + gamma r e.,
//                           e = dy - dbeta / M - xhat dgamma / M,  and e. by the product rule
// with xhat. = r (z. - s - xhat t), r. = -r (r t), s = mean(z.), t = mean(xhat z.). Winners and ReLU's mask are
// constants. Launched by launch_conv_meta_step. Readable twin: the double backward pass under reference.py.
#pragma once

#include <cstdint>

#include "kernels/conv_common.cuh"
#include "kernels/conv_first.cuh"

namespace signmaml {

// Shared memory: the tile of pixels.
template <int kChannels, typename Stored>
__global__ void __launch_bounds__(kConvThreads) conv_first_tangent_kernel(const ConvFirstTangentParams<Stored> p) {
    constexpr int kValues = kConvTaps * kChannels, kWarps = kConvThreads / 32;
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    const std::int64_t task = blockIdx.y;
    const int filters = block.filters;
    const int filter = static_cast<int>(blockIdx.z) * 32 + lane();
    const bool owns = filter < filters;
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int halo = tiles.halo_height * tiles.halo_width;
    const Shared<float> tile(0, tiles.tile_images * halo * kChannels);
    const ConvMoments* moments = row_of(p.moments, task);

    // y. = gamma r (z. - mean.) + r (gamma. - gamma stretch) (z - mean) + beta.
    float weights[kValues] = {}, direction[kValues] = {};
    float mean = 0.0f, mean_tangent = 0.0f, of_tangent = 0.0f, of_raw = 0.0f, beta_tangent = 0.0f;
    if (owns) {
        const float* own = row_of(p.weights, task);
        const float* moved = row_of(p.direction, task);
        const ConvFirstNorm* norm = row_of(p.norm, task);
        const ConvFirstTangent* tangent = row_of(p.tangent, task);
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            weights[i] = load(own + p.layer.weight + i * filters + filter);
            direction[i] = load(moved + p.layer.weight + i * filters + filter);
        }
        const float inverse = load(&norm->inverse[filter]), gamma = load(own + p.layer.gamma + filter);
        mean = load(&norm->mean[filter]);
        mean_tangent = load(&tangent->mean[filter]);
        of_tangent = gamma * inverse;
        of_raw = inverse * (load(moved + p.layer.gamma + filter) - gamma * load(&tangent->stretch[filter]));
        beta_tangent = load(moved + p.layer.beta + filter);
    }
    for (int number = first_tile(tiles, blockIdx.x); number < end_of_tiles(tiles, blockIdx.x); ++number) {
        const TilePlace place = place_of(tiles, number);
        block_barrier();  // all have read the tile before
        stage_pixels(
            row_of(p.images, task), block, tiles, place, 2, [&](int channel) { return load(&moments->shift[channel]); },
            tile);
        block_barrier();  // the tile is there
        if (!owns) continue;
        const int all = tiles.tile_images * tiles.tile_height * tiles.tile_width;
        for (int item = warp; item < all; item += kWarps) {
            const TilePosition at = position_of(tiles, place, item);
            if (!at.inside) continue;
            const std::int64_t image = place.image + at.image;
            const std::int64_t to =
                ((image * block.act_height + place.y + at.y) * block.act_width + place.x + at.x) * filters + filter;
            const int choice = load(row_of(p.layer.choices, task) + to);
            const int y = at.y * 2 + choice / 2 % 2, x = at.x * 2 + choice % 2;
            const int origin = (at.image * halo + y * tiles.halo_width + x) * kChannels;
            float raw = 0.0f, raw_tangent = 0.0f;
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                const int tap = i / kChannels;
                const float pixel =
                    tile.get(origin + (tap / 3 * tiles.halo_width + tap % 3) * kChannels + i % kChannels);
                raw += pixel * weights[i];
                raw_tangent += pixel * direction[i];
            }
            const float value = of_tangent * (raw_tangent - mean_tangent) + of_raw * (raw - mean) + beta_tangent;
            store(row_of(p.activation, task) + to, Storing<Stored>::of(choice >= kConvActive ? value : 0.0f));
        }
    }
}

// ---- blocks whose raw output is stored. A thread owns four channels of one position at a time.

template <typename Visit>
__device__ inline void for_each_position(std::int64_t positions, int filters, const Visit& visit) {
    const int quads = filters / 4, groups = kConvThreads / quads;
    const int group = static_cast<int>(threadIdx.x) / quads, channel = static_cast<int>(threadIdx.x) % quads * 4;
    if (group >= groups) return;
    const std::int64_t step = std::int64_t{gridDim.x} * groups;
    for (std::int64_t at = std::int64_t{blockIdx.x} * groups + group; at < positions; at += step) visit(at, channel);
}

// The offset of the raw value under the first place of the window of an activation, of channel 0.
__device__ inline std::int64_t window_of(const ConvBlock& block, std::int64_t position) {
    const std::int64_t row = position / block.act_width, x = position - row * block.act_width;
    const std::int64_t image = row / block.act_height, y = row - image * block.act_height;
    return ((image * block.height + y * block.window) * block.width + x * block.window) * block.filters;
}

// From there to the winner, in values.
__device__ inline std::int64_t to_winner(const ConvBlock& block, int choice) {
    const int place = choice % kConvActive;
    return (std::int64_t{place / 2} * block.width + place % 2) * block.filters;
}

// What all derivatives of a block need of each channel, one array after the other.
struct TangentNorm {
    Shared<float> memory;
    int filters;

    __device__ float mean(int channel) const { return memory.get(channel); }
    __device__ float inverse(int channel) const { return memory.get(filters + channel); }
    __device__ float mean_tangent(int channel) const { return memory.get(2 * filters + channel); }
    __device__ float stretch(int channel) const { return memory.get(3 * filters + channel); }  // r t
    __device__ float own(int number, int channel) const { return memory.get((4 + number) * filters + channel); }

    __device__ float normalised(float z, int channel) const { return (z - mean(channel)) * inverse(channel); }
    __device__ float normalised_tangent(float z_tangent, float xhat, int channel) const {
        return inverse(channel) * (z_tangent - mean_tangent(channel)) - xhat * stretch(channel);
    }
};

// Fills what every kernel has, and calls `own(channel, gamma, gamma., inverse, stretch)` for the rest; a barrier
// follows.
template <typename Stored, typename Own>
__device__ inline void prepare_tangents(const ConvTangentParams<Stored>& p, std::int64_t task, const TangentNorm& norm,
                                        const Own& own) {
    const ConvBlock& block = p.layer.block;
    const int filters = block.filters;
    const float count = static_cast<float>(p.layer.count * block.height) * static_cast<float>(block.width);
    const float* weights = row_of(p.weights, task);
    const float* direction = row_of(p.direction, task);
    for (int channel = threadIdx.x; channel < filters; channel += blockDim.x) {
        const NormOfChannel constants = norm_of(p.layer, task, channel);
        const float* sums = row_of(p.tangent.statistics, task) + channel;
        const int slices = p.tangent.statistics_slices;
        const float mean_tangent = sum_of_slices(sums, slices, 2 * filters) / count;
        const float stretch = constants.inverse * sum_of_slices(sums + filters, slices, 2 * filters) / count;
        norm.memory.set(channel, constants.mean);
        norm.memory.set(filters + channel, constants.inverse);
        norm.memory.set(2 * filters + channel, mean_tangent);
        norm.memory.set(3 * filters + channel, stretch);
        own(channel, load(weights + p.layer.gamma + channel), load(direction + p.layer.gamma + channel),
            constants.inverse, stretch);
    }
    block_barrier();  // the constants are there
}

// The sums of a slice <- those of its threads, `which` by `which`. `scratch`: [2, groups, filters].
__device__ inline void store_sums(const Vector<float, 4> (&sums)[2], int filters, const Shared<float>& scratch,
                                  float* slice) {
    const int quads = filters / 4, groups = kConvThreads / quads;
    const int group = static_cast<int>(threadIdx.x) / quads, channel = static_cast<int>(threadIdx.x) % quads * 4;
    if (group < groups) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            store<float, 4>(scratch.address((which * groups + group) * filters + channel), sums[which]);
        }
    }
    block_barrier();  // all threads' sums are there
    for (int item = threadIdx.x; item < 2 * filters; item += kConvThreads) {
        const int which = item / filters;
        float sum = 0.0f;
        for (int g = 0; g < groups; ++g) sum += scratch.get((which * groups + g) * filters + item % filters);
        store(slice + item, sum);
    }
}

__device__ inline Shared<float> scratch_of_sums(int arrays, int filters) {
    return Shared<float>(std::int64_t{arrays} * filters * 4, kConvTangentScratch);
}

// Shared memory: mean and r [kConvRawMoments, filters], then the threads' sums.
template <typename Stored>
__global__ void __launch_bounds__(kConvThreads) conv_tangent_sums_kernel(const ConvTangentParams<Stored> p) {
    const ConvBlock& block = p.layer.block;
    const std::int64_t task = blockIdx.y;
    const int filters = block.filters;
    const Shared<float> norm(0, kConvRawMoments * filters);
    for (int channel = threadIdx.x; channel < filters; channel += kConvThreads) {
        const NormOfChannel constants = norm_of(p.layer, task, channel);
        norm.set(channel, constants.mean);
        norm.set(filters + channel, constants.inverse);
    }
    block_barrier();  // the constants are there
    const Stored* raw = row_of(p.layer.raw, task);
    const Stored* raw_tangent = row_of(p.tangent.raw, task);
    Vector<float, 4> sums[2] = {};
    const std::int64_t positions = std::int64_t{p.layer.count} * block.height * block.width;
    for_each_position(positions, filters, [&](std::int64_t position, int channel) {
        const auto z = load_floats<4>(raw + position * filters + channel);
        const auto tangent = load_floats<4>(raw_tangent + position * filters + channel);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float xhat = (z.at[i] - norm.get(channel + i)) * norm.get(filters + channel + i);
            sums[0].at[i] += tangent.at[i];
            sums[1].at[i] += xhat * tangent.at[i];
        }
    });
    store_sums(sums, filters, scratch_of_sums(kConvRawMoments, filters),
               row_of(p.tangent.statistics, task) + std::int64_t{blockIdx.x} * 2 * filters);
}

// Shared memory: kConvActivateTangents arrays [filters], the last three gamma r, gamma. - gamma stretch and beta..
template <typename Stored>
__global__ void __launch_bounds__(kConvThreads) conv_tangent_activate_kernel(const ConvTangentParams<Stored> p) {
    const ConvBlock& block = p.layer.block;
    const std::int64_t task = blockIdx.y;
    const int filters = block.filters;
    const TangentNorm norm{Shared<float>(0, kConvActivateTangents * filters), filters};
    const float* direction = row_of(p.direction, task);
    prepare_tangents(p, task, norm, [&](int channel, float gamma, float gamma_tangent, float inverse, float stretch) {
        norm.memory.set(4 * filters + channel, gamma * inverse);
        norm.memory.set(5 * filters + channel, gamma_tangent - gamma * stretch);
        norm.memory.set(6 * filters + channel, load(direction + p.layer.beta + channel));
    });
    const Stored* raw = row_of(p.layer.raw, task);
    const Stored* raw_tangent = row_of(p.tangent.raw, task);
    const std::int64_t positions = std::int64_t{p.layer.count} * block.act_height * block.act_width;
    for_each_position(positions, filters, [&](std::int64_t position, int channel) {
        const auto choices = load<std::uint8_t, 4>(row_of(p.layer.choices, task) + position * filters + channel);
        const std::int64_t window = window_of(block, position) + channel;
        Vector<float, 4> values{};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (choices.at[i] < kConvActive) continue;
            const std::int64_t at = window + to_winner(block, choices.at[i]) + i;
            const int c = channel + i;
            const float xhat = norm.normalised(as_float(load(raw + at)), c);
            const float moved = as_float(load(raw_tangent + at)) - norm.mean_tangent(c);
            values.at[i] = xhat * norm.own(1, c) + norm.own(0, c) * moved + norm.own(2, c);
        }
        store_floats<4>(row_of(p.tangent.activation, task) + position * filters + channel, values);
    });
}

// Shared memory: kConvTangents arrays [filters], then the threads' sums.
template <typename Stored>
__global__ void __launch_bounds__(kConvThreads) conv_tangent_grad_sums_kernel(const ConvTangentParams<Stored> p) {
    const ConvBlock& block = p.layer.block;
    const std::int64_t task = blockIdx.y;
    const int filters = block.filters;
    const TangentNorm norm{Shared<float>(0, kConvTangents * filters), filters};
    prepare_tangents(p, task, norm, [](int, float, float, float, float) {});
    const Stored* raw = row_of(p.layer.raw, task);
    const Stored* raw_tangent = row_of(p.tangent.raw, task);
    Vector<float, 4> sums[2] = {};
    const std::int64_t positions = std::int64_t{p.layer.count} * block.act_height * block.act_width;
    for_each_position(positions, filters, [&](std::int64_t position, int channel) {
        const std::int64_t own = position * filters + channel, window = window_of(block, position) + channel;
        const auto choices = load<std::uint8_t, 4>(row_of(p.layer.choices, task) + own);
        const auto dy = load_floats<4>(row_of(p.layer.activation_grad, task) + own);
        const auto dy_tangent = load_floats<4>(row_of(p.tangent.activation_grad, task) + own);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (choices.at[i] < kConvActive) continue;
            const std::int64_t at = window + to_winner(block, choices.at[i]) + i;
            const float xhat = norm.normalised(as_float(load(raw + at)), channel + i);
            const float moved = norm.normalised_tangent(as_float(load(raw_tangent + at)), xhat, channel + i);
            sums[0].at[i] += dy_tangent.at[i];
            sums[1].at[i] += dy_tangent.at[i] * xhat + dy.at[i] * moved;
        }
    });
    store_sums(sums, filters, scratch_of_sums(kConvTangents, filters),
               row_of(p.tangent.grad_sums, task) + std::int64_t{blockIdx.x} * 2 * filters);
}

// Shared memory: kConvRawGradTangents arrays [filters], the last six gamma r and its derivative, dbeta / M, dgamma / M
// and their derivatives.
template <typename Stored>
__global__ void __launch_bounds__(kConvThreads) conv_tangent_raw_grad_kernel(const ConvTangentParams<Stored> p) {
    const ConvBlock& block = p.layer.block;
    const std::int64_t task = blockIdx.y;
    const int filters = block.filters;
    const TangentNorm norm{Shared<float>(0, kConvRawGradTangents * filters), filters};
    const float count = static_cast<float>(p.layer.count * block.height) * static_cast<float>(block.width);
    prepare_tangents(p, task, norm, [&](int channel, float gamma, float gamma_tangent, float inverse, float stretch) {
        norm.memory.set(4 * filters + channel, gamma * inverse);
        norm.memory.set(5 * filters + channel, inverse * (gamma_tangent - gamma * stretch));
        const float* sums = row_of(p.layer.grad_sums, task) + channel;
        const float* tangents = row_of(p.tangent.grad_sums, task) + channel;
        for (int which = 0; which < 2; ++which) {
            const float sum = sum_of_slices(sums + which * filters, p.layer.grad_sums_slices, 2 * filters);
            const float tangent = sum_of_slices(tangents + which * filters, p.tangent.grad_sums_slices, 2 * filters);
            norm.memory.set((6 + which) * filters + channel, sum / count);
            norm.memory.set((8 + which) * filters + channel, tangent / count);
        }
    });
    const Stored* raw = row_of(p.layer.raw, task);
    const Stored* raw_tangent = row_of(p.tangent.raw, task);
    const std::int64_t positions = std::int64_t{p.layer.count} * block.height * block.width;
    for_each_position(positions, filters, [&](std::int64_t position, int channel) {
        const std::int64_t row = position / block.width;
        const int x = static_cast<int>(position - row * block.width);
        const std::int64_t image = row / block.height;
        const int y = static_cast<int>(row - image * block.height);
        const int window_y = y >> (block.window - 1), window_x = x >> (block.window - 1);
        Vector<float, 4> dy{}, dy_tangent{};
        if (window_y < block.act_height && window_x < block.act_width) {  // else pooling drops this position
            const std::int64_t window =
                ((image * block.act_height + window_y) * block.act_width + window_x) * filters + channel;
            const auto choices = load<std::uint8_t, 4>(row_of(p.layer.choices, task) + window);
            const auto gradient = load_floats<4>(row_of(p.layer.activation_grad, task) + window);
            const auto tangent = load_floats<4>(row_of(p.tangent.activation_grad, task) + window);
            const int place = (y - window_y * block.window) * 2 + x - window_x * block.window;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (choices.at[i] != place + kConvActive) continue;
                dy.at[i] = gradient.at[i];
                dy_tangent.at[i] = tangent.at[i];
            }
        }
        const auto z = load_floats<4>(raw + position * filters + channel);
        const auto z_tangent = load_floats<4>(raw_tangent + position * filters + channel);
        Vector<float, 4> values;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = channel + i;
            const float xhat = norm.normalised(z.at[i], c);
            const float xhat_tangent = norm.normalised_tangent(z_tangent.at[i], xhat, c);
            const float inner = dy.at[i] - norm.own(2, c) - xhat * norm.own(3, c);
            const float inner_tangent =
                dy_tangent.at[i] - norm.own(4, c) - (xhat_tangent * norm.own(3, c) + xhat * norm.own(5, c));
            values.at[i] = norm.own(1, c) * inner + norm.own(0, c) * inner_tangent;
        }
        store_floats<4>(row_of(p.tangent.raw_grad, task) + position * filters + channel, values);
    });
}

}  // namespace signmaml
