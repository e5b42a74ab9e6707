// Block 1 of the network without its raw output: its input is the same in all inner steps and a patch has only
// 9 * channels values, so mean(z) = W m and var(z) = W G W^T follow from the patches' mean m and covariance G.
//   patch_moments     sums for m and G, once per meta-step and set; a block owns a slice of tiles, a thread two taps
//   conv_first        a = halve(relu(bn(conv(x, W)))); a thread owns one position of a and 8 filters
//   conv_first_grad   sum dy and sum dy * patch at the winners of the halving; a lane owns one filter
//   conv_raw_grad     dz of the direct form, which stores z; only for tests of the covariance form
// x is read as x - shift (its mean, one value per channel), so that the mean of z is small and nothing cancels.
// Launched by launch_conv_meta_step; pack and update compute m, G and BatchNorm's constants (conv_update.cuh).
#pragma once

#include <cstdint>

#include "kernels/conv_common.cuh"

namespace signmaml {

// Loads the part of the images that a tile of outputs reads, minus shift, as [position, channels]; outside the image x
// is 0. Neighbouring outputs are `spacing` inputs apart.
template <typename Shift>
__device__ inline void stage_pixels(const float* images, const ConvBlock& block, const ConvTiles& tiles,
                                    const TilePlace& place, int spacing, const Shift& shift,
                                    const Shared<float>& tile) {
    const int channels = block.in_channels;
    const int halo = tiles.by_halo.value;
    for (int item = threadIdx.x; item < tiles.tile_images * halo * channels; item += blockDim.x) {
        const auto [plane_of_tile, row, column] = input_of(tiles, item);
        const int image = quotient(plane_of_tile, block.by_channels), channel = plane_of_tile - image * channels;
        const int y = place.y * spacing - 1 + row, x = place.x * spacing - 1 + column;
        float value = 0.0f;
        if (image < place.images && y >= 0 && y < block.in_height && x >= 0 && x < block.in_width) {
            const std::int64_t plane = std::int64_t{place.image + image} * channels + channel;
            value = load(images + (plane * block.in_height + y) * block.in_width + x);
        }
        tile.set((image * halo + row * tiles.halo_width + column) * channels + channel, value - shift(channel));
    }
}

// Products of this many neighbouring positions are added in float32 before they are added to a sum in double.
inline constexpr int kMomentRun = 8;
// What a thread sums: products of the values of two taps, or the values of one tap. The threads of a pair of warps do
// all of it for every kMomentSplits-th row of positions.
inline constexpr int kTapPairs = kConvTaps * (kConvTaps + 1) / 2;

// Shared memory: the sums of all splits but the first in double, [splits - 1, channels^2, kMomentWork]; the shift; the
// tile.
template <int kChannels>
__global__ void __launch_bounds__(kMomentThreads) patch_moments_kernel(const ConvPatchMomentsParams p) {
    constexpr int kProducts = kChannels * kChannels;
    const ConvBlock& block = p.block;
    const ConvTiles& tiles = p.tiles;
    const std::int64_t task = blockIdx.y;
    constexpr int kDoubles = kProducts * kMomentDoubles;
    const Shared<double> of_splits(0, kDoubles);
    const Shared<float> shift(kDoubles * 8, kConvChannels + 1);
    const Shared<float> tile(kDoubles * 8 + (kConvChannels + 1) * 4,
                             tiles.tile_images * tiles.halo_height * tiles.halo_width * kChannels);
    const float* images = row_of(p.images, task);

    // The slice is centred on the mean of its first tile, including the halo. Any value near the images' mean would do.
    const TilePlace first = place_of(tiles, first_tile(tiles, blockIdx.x));
    const auto nothing = [](int) { return 0.0f; };
    stage_pixels(images, block, tiles, first, block.stride, nothing, tile);
    block_barrier();  // the tile is there
    const int warp = static_cast<int>(threadIdx.x / 32);
    if (warp < kChannels) {
        const int pixels = tiles.tile_images * tiles.halo_height * tiles.halo_width;
        float sum = 0.0f;
        for (int pixel = lane(); pixel < pixels; pixel += 32) sum += tile.get(pixel * kChannels + warp);
        sum = warp_sum(sum);
        if (lane() == 0) shift.set(warp, sum / static_cast<float>(pixels));
    }

    // Work n is the taps (left, right) with left <= right, row by row; the numbers after the pairs are single taps.
    const int split = static_cast<int>(threadIdx.x) / kMomentWork, work = static_cast<int>(threadIdx.x) % kMomentWork;
    const bool single = work >= kTapPairs, idle = work >= kTapPairs + kConvTaps;
    int left = 0, right = single ? 0 : work;
    if (single) {
        left = work - kTapPairs;
    } else {
        while (right >= kConvTaps - left) right -= kConvTaps - left++;
        right += left;
    }
    const auto offset_of = [&](int tap) { return (tap / 3 * tiles.halo_width + tap % 3) * kChannels; };
    const int of_left = offset_of(idle ? 0 : left), of_right = offset_of(right);
    double sums[kChannels][kChannels] = {};
    double count = 0.0;
    for (int number = first_tile(tiles, blockIdx.x); number < end_of_tiles(tiles, blockIdx.x); ++number) {
        const TilePlace place = place_of(tiles, number);
        block_barrier();  // the shift is there; all have read the tile before
        stage_pixels(images, block, tiles, place, block.stride, [&](int channel) { return shift.get(channel); }, tile);
        block_barrier();  // the tile is there
        count += static_cast<double>(place.positions());
        if (idle) continue;
        int image = 0, y = split;
        const auto carry = [&] {  // rows beyond an image's last one are of the next
            for (; y >= place.height && image < place.images; ++image) y -= place.height;
        };
        for (carry(); image < place.images; y += kMomentSplits, carry()) {
            const int row = (image * tiles.halo_height + y * block.stride) * tiles.halo_width * kChannels;
            for (int x0 = 0; x0 < place.width; x0 += kMomentRun) {
                float run[kChannels][kChannels] = {};
                const int end = smaller_of(place.width, x0 + kMomentRun);
                for (int x = x0; x < end; ++x) {
                    const int at = row + x * block.stride * kChannels;
#pragma unroll
                    for (int b = 0; b < kChannels; ++b) {
                        const float other = single ? (b == 0 ? 1.0f : 0.0f) : tile.get(at + of_right + b);
#pragma unroll
                        for (int a = 0; a < kChannels; ++a) run[a][b] += tile.get(at + of_left + a) * other;
                    }
                }
#pragma unroll
                for (int a = 0; a < kChannels; ++a) {
#pragma unroll
                    for (int b = 0; b < kChannels; ++b) sums[a][b] += static_cast<double>(run[a][b]);
                }
            }
        }
    }
    if (split > 0) {
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
            of_splits.set(((split - 1) * kProducts + i) * kMomentWork + work, sums[i / kChannels][i % kChannels]);
        }
    }
    block_barrier();  // the sums of all splits are there
    ConvMomentSums* out = row_of(p.sums, task) + blockIdx.x;
    if (threadIdx.x == 0) store(&out->count, count);
    if (static_cast<int>(threadIdx.x) < kChannels) {
        store(&out->shift[threadIdx.x], static_cast<double>(shift.get(threadIdx.x)));
    }
    if (split > 0 || idle) return;
#pragma unroll
    for (int a = 0; a < kChannels; ++a) {
#pragma unroll
        for (int b = 0; b < kChannels; ++b) {
            double sum = sums[a][b];
            for (int other = 0; other + 1 < kMomentSplits; ++other) {
                sum += of_splits.get((other * kProducts + a * kChannels + b) * kMomentWork + work);
            }
            const int i = left * kChannels + a, j = right * kChannels + b;
            if (single && b == 0) store(&out->sum[i], sum);
            if (!single && i <= j) store(&out->product[i][j], sum);
        }
    }
}

inline constexpr int kFirstFilters = 8;  // of one thread

// Shared memory: all weights [9 * channels, filters], then mean, scale and beta [3, filters], then the tile of pixels.
template <bool kMaxPool, typename Stored>
__global__ void __launch_bounds__(kConvThreads) conv_first_kernel(const ConvFirstParams<Stored> p) {
    constexpr int kSide = kMaxPool ? 2 : 1;  // of the window
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    const std::int64_t task = blockIdx.y;
    const int channels = block.in_channels, filters = block.filters, groups = p.by_groups.value;
    const int positions = tiles.tile_height * tiles.tile_width;  // of one image
    const int halo = tiles.halo_height * tiles.halo_width;
    const Shared<float> kernel(0, kConvTaps * channels * filters);
    const Shared<float> norm(kConvTaps * channels * filters * 4, 3 * filters);
    const Shared<float> tile((kConvTaps * channels + 3) * filters * 4, tiles.tile_images * halo * channels);
    const float* weights = row_of(p.weights, task);
    const ConvMoments* moments = row_of(p.moments, task);
    const ConvFirstNorm* constants = row_of(p.norm, task);

    for (int i = threadIdx.x; i < kConvTaps * channels * filters; i += kConvThreads) {
        kernel.set(i, load(weights + p.layer.weight + i));
    }
    for (int filter = threadIdx.x; filter < filters; filter += kConvThreads) {
        norm.set(filter, load(&constants->mean[filter]));
        norm.set(filters + filter, load(weights + p.layer.gamma + filter) * load(&constants->inverse[filter]));
        norm.set(2 * filters + filter, load(weights + p.layer.beta + filter));
    }
    for (int number = first_tile(tiles, blockIdx.x); number < end_of_tiles(tiles, blockIdx.x); ++number) {
        const TilePlace place = place_of(tiles, number);
        block_barrier();  // weights and constants are there; all have read the tile before
        stage_pixels(
            row_of(p.images, task), block, tiles, place, 2, [&](int channel) { return load(&moments->shift[channel]); },
            tile);
        block_barrier();  // the tile is there
        // Neighbouring threads: two positions, then the groups of filters, then the other positions. So pairs of lanes
        // read the same weights, and a warp writes whole rows of filters.
        const int pairs = (tiles.tile_images * positions + 1) / 2;
        for (int item = threadIdx.x; item < 2 * pairs * groups; item += kConvThreads) {
            const int pair = quotient(item / 2, p.by_groups), group = item / 2 - pair * groups;
            const TilePosition at = position_of(tiles, place, pair * 2 + item % 2);
            const int first = group * 4, second = (groups + group) * 4;
            if (!at.inside) continue;
            const int origin = (at.image * halo + at.y * 2 * tiles.halo_width + at.x * 2) * channels;
            float z[kSide * kSide][kFirstFilters] = {};
            for (int channel = 0; channel < channels; ++channel) {
                float pixels[kSide + 2][kSide + 2];
#pragma unroll
                for (int y = 0; y < kSide + 2; ++y) {
#pragma unroll
                    for (int x = 0; x < kSide + 2; ++x) {
                        pixels[y][x] = tile.get(origin + (y * tiles.halo_width + x) * channels + channel);
                    }
                }
#pragma unroll
                for (int tap = 0; tap < kConvTaps; ++tap) {
                    const auto w = load<float, 4>(kernel.address((tap * channels + channel) * filters + first));
                    const auto v = load<float, 4>(kernel.address((tap * channels + channel) * filters + second));
#pragma unroll
                    for (int place_in_window = 0; place_in_window < kSide * kSide; ++place_in_window) {
                        const float pixel =
                            pixels[place_in_window / kSide + tap / 3][place_in_window % kSide + tap % 3];
#pragma unroll
                        for (int f = 0; f < 4; ++f) {
                            z[place_in_window][f] += pixel * w.at[f];
                            z[place_in_window][4 + f] += pixel * v.at[f];
                        }
                    }
                }
            }
            const std::int64_t image = place.image + at.image;
            const std::int64_t to =
                ((image * block.act_height + place.y + at.y) * block.act_width + place.x + at.x) * filters;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int filter = half == 0 ? first : second;
                Vector<float, 4> values;
                Vector<std::uint8_t, 4> choices;
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    float best = 0.0f;
                    int winner = 0;
#pragma unroll
                    for (int place_in_window = 0; place_in_window < kSide * kSide; ++place_in_window) {
                        const float scaled =
                            (z[place_in_window][half * 4 + f] - norm.get(filter + f)) * norm.get(filters + filter + f);
                        const float y = scaled + norm.get(2 * filters + filter + f);
                        if (place_in_window == 0 || beats(y, best)) {
                            best = y;
                            winner = place_in_window;
                        }
                    }
                    const bool active = is_active(best);
                    values.at[f] = active ? best : 0.0f;
                    choices.at[f] = static_cast<std::uint8_t>(winner + (active ? kConvActive : 0));
                }
                store_floats<4>(row_of(p.layer.activation, task) + to + filter, values);
                store<std::uint8_t, 4>(row_of(p.layer.choices, task) + to + filter, choices);
            }
        }
    }
}

// Lane l of every warp owns filter 32 * blockIdx.z + l; a warp takes every kWarps-th position of the tiles.
template <int kChannels, typename Stored>
__global__ void __launch_bounds__(kConvThreads) conv_first_grad_kernel(const ConvFirstGradParams<Stored> p) {
    constexpr int kSums = 1 + kConvTaps * kChannels, kWarps = kConvThreads / 32;
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    const std::int64_t task = blockIdx.y;
    const int filters = block.filters;
    const int filter = static_cast<int>(blockIdx.z) * 32 + lane();
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int halo = tiles.halo_height * tiles.halo_width;
    const Shared<float> halves(0, (kWarps - 1) * kSums * 32);  // of warps 1 to 3
    const Shared<float> tile((kWarps - 1) * kSums * 32 * 4, tiles.tile_images * halo * kChannels);
    const ConvMoments* moments = row_of(p.moments, task);

    float sums[kSums] = {};
    for (int number = first_tile(tiles, blockIdx.x); number < end_of_tiles(tiles, blockIdx.x); ++number) {
        const TilePlace place = place_of(tiles, number);
        block_barrier();  // all have read the tile before
        stage_pixels(
            row_of(p.images, task), block, tiles, place, 2, [&](int channel) { return load(&moments->shift[channel]); },
            tile);
        block_barrier();  // the tile is there
        if (filter >= filters) continue;
        const int all = tiles.tile_images * tiles.tile_height * tiles.tile_width;
        for (int item = warp; item < all; item += kWarps) {
            const TilePosition at = position_of(tiles, place, item);
            if (!at.inside) continue;
            const std::int64_t image = place.image + at.image;
            const std::int64_t from =
                ((image * block.act_height + place.y + at.y) * block.act_width + place.x + at.x) * filters + filter;
            const int choice = load(row_of(p.layer.choices, task) + from);
            const float gradient = as_float(load(row_of(p.layer.activation_grad, task) + from));
            const float dy = choice >= kConvActive ? gradient : 0.0f;
            const int y = at.y * 2 + choice / 2 % 2, x = at.x * 2 + choice % 2;
            const int origin = (at.image * halo + y * tiles.halo_width + x) * kChannels;
            sums[0] += dy;
#pragma unroll
            for (int tap = 0; tap < kConvTaps; ++tap) {
#pragma unroll
                for (int channel = 0; channel < kChannels; ++channel) {
                    const float pixel = tile.get(origin + (tap / 3 * tiles.halo_width + tap % 3) * kChannels + channel);
                    sums[1 + tap * kChannels + channel] += dy * pixel;
                }
            }
        }
    }
    if (warp > 0) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) halves.set(((warp - 1) * kSums + i) * 32 + lane(), sums[i]);
    }
    block_barrier();  // the other warps' sums are there
    if (warp > 0 || filter >= filters) return;
    float* partials = row_of(p.partials, task) + blockIdx.x * std::int64_t{kSums} * filters + filter;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        float sum = sums[i];
        for (int w = 0; w + 1 < kWarps; ++w) sum += halves.get((w * kSums + i) * 32 + lane());
        store(partials + i * filters, sum);
    }
}

// A thread owns 4 filters of one position at a time. Shared memory: BatchNorm's constants [5, filters].
template <typename Stored>
__global__ void __launch_bounds__(kConvThreads, 8) conv_raw_grad_kernel(const ConvRawGradParams<Stored> p) {
    const ConvBlock& block = p.layer.block;
    const std::int64_t task = blockIdx.y;
    const Shared<float> norm(0, 5 * block.filters);
    prepare_raw_grad(
        p.layer, row_of(p.weights, task), norm, [&](int channel) { return norm_of(p.layer, task, channel); },
        [&](int channel, int which) { return grad_sum_of(p.layer, task, channel, which, 0, 1); });
    block_barrier();  // the constants are there
    const int quads = block.filters / 4;
    const std::int64_t items = std::int64_t{p.layer.count} * block.height * block.width * quads;
    const std::int64_t threads = std::int64_t{gridDim.x} * kConvThreads;
    for (std::int64_t item = std::int64_t{blockIdx.x} * kConvThreads + threadIdx.x; item < items; item += threads) {
        const int filter = static_cast<int>(item % quads) * 4;
        const std::int64_t position = item / quads;
        const int x = static_cast<int>(position % block.width);
        const int y = static_cast<int>(position / block.width % block.height);
        const int image = static_cast<int>(position / block.width / block.height);
        store_floats<4>(row_of(p.layer.raw_grad, task) + position * block.filters + filter,
                        raw_grad<4>(p.layer, task, image, y, x, filter, norm));
    }
}

}  // namespace signmaml
