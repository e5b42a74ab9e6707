// z = conv3x3(x, W) of one block of the network, and the statistics of z that its BatchNorm needs.
// An implicit GEMM on tensor cores: rows are positions of z, columns are filters, depth is taps x channels. A thread
// block owns a slice of tiles of one task and 8 * kTilesN filters; a warp owns 32 positions of a tile. The input is
// read from the images, from a stored activation, or from the raw output of the block below, which is normalised,
// halved and (if a backward pass follows) stored on the way. A second product may be added: see ConvForwardParams.
// Launched by launch_conv_forward.
// Readable twin: nn.Conv2d under reference.py.
#pragma once

#include <cstdint>

#include "kernels/conv_common.cuh"

namespace signmaml {

template <typename Stored>
__device__ inline void stage_image(const ConvForwardParams<Stored>& p, std::int64_t task, const TilePlace& place,
                                   const Shared<float>& tile, int padded) {
    const ConvBlock& block = p.layer.block;
    const float* images = row_of(p.images, task);
    const int inputs = p.tiles.tile_images * p.tiles.by_halo.value;
    for (int number = threadIdx.x; number < inputs; number += kConvThreads) {
        const TileInput at = input_of(p.tiles, number);
        const int y = place.y * block.stride - 1 + at.row, x = place.x * block.stride - 1 + at.column;
        const bool in_image = at.image < place.images && y >= 0 && y < block.in_height && x >= 0 && x < block.in_width;
        for (int channel = 0; channel < padded; ++channel) {
            float value = 0.0f;
            if (in_image && channel < block.in_channels) {
                const std::int64_t plane = std::int64_t{place.image + at.image} * block.in_channels + channel;
                value = load(images + (plane * block.in_height + y) * block.in_width + x);
            }
            tile.set(offset_in_tile(p.memory, p.tiles, at.image, at.row, at.column) + channel, value);
        }
    }
}

// Loads channels [first, first + depth) of the tile's input, with zeros up to `padded`. `input` is that of kActivation.
template <typename Stored>
__device__ inline void stage_activation(const ConvForwardParams<Stored>& p, std::int64_t task, const TilePlace& place,
                                        const Shared<float>& tile, const Shared<float>& norm, const Stored* input,
                                        int first, int depth, int padded) {
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    for_each_quad(tiles.tile_images * tiles.by_halo.value, padded, [&](int number, int channel) {
        const auto [image, row, column] = input_of(tiles, number);
        const int y = place.y * block.stride - 1 + row, x = place.x * block.stride - 1 + column;
        Vector<float, 4> values{};
        if (image < place.images && y >= 0 && y < block.in_height && x >= 0 && x < block.in_width && channel < depth) {
            const std::int64_t at =
                ((std::int64_t{place.image + image} * block.in_height + y) * block.in_width + x) * block.in_channels +
                first + channel;
            if (p.source == ConvSource::kActivation) {
                values = load_floats<4>(input + at);
            } else {
                const auto activated =
                    activate<4>(p.below, row_of(p.below.raw, task), place.image + image, y, x, first + channel, norm);
                values = activated.values;
                // Several tiles may hold this position; only the one that owns it stores it.
                const bool owned = row >= 1 && row <= tiles.tile_height * block.stride && column >= 1 &&
                                   column <= tiles.tile_width * block.stride;
                if (p.keep && owned && blockIdx.z == 0) {
                    store_floats<4>(row_of(p.below.activation, task) + at, values);
                    store<std::uint8_t, 4>(row_of(p.below.choices, task) + at, activated.choices);
                }
            }
        }
        store<float, 4>(tile.address(offset_in_tile(p.memory, tiles, image, row, column) + channel), values);
    });
}

// Starts to copy one tap's weights for channels [first, first + depth) and this thread block's filters, with zeros up
// to `padded` rows and beyond the last filter.
template <int kColumns>
__device__ inline void stage_forward_slab(const float* weights, int tap, int channels, int filters, int first,
                                          int depth, int padded, const Shared<float>& slabs) {
    const int first_column = static_cast<int>(blockIdx.z) * kColumns;
    const int slab = tap % 2 * kConvChunk * (kColumns + 8);
    for (int item = threadIdx.x; item < padded * (kColumns / 4); item += kConvThreads) {
        const int row = item / (kColumns / 4), column = item % (kColumns / 4) * 4;
        const std::int64_t from = (std::int64_t{tap} * channels + first + row) * filters + first_column + column;
        copy_or_clear(slabs.address(slab + row * (kColumns + 8) + column), weights + from,
                      row < depth && first_column + column < filters);
    }
    cp_async_commit();
}

template <ConvPrecision kPrecision, int kTilesN>
__global__ void __launch_bounds__(kConvThreads, kConvBlocksResident<kPrecision, kTilesN>)
    conv_forward_kernel(const ConvForwardParams<typename ConvStored<kPrecision>::Type> p) {
    using Stored = typename ConvStored<kPrecision>::Type;
    constexpr int kColumns = 8 * kTilesN, kDepth = kConvDepth<kPrecision>, kWarps = kConvThreads / 32;
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    const std::int64_t task = blockIdx.y;
    const int channels = block.in_channels;
    const Shared<float> tile(0, p.memory.slabs);
    const Shared<float> slabs(p.memory.slabs * 4, p.memory.norm - p.memory.slabs);
    const Shared<float> norm(p.memory.norm * 4, p.memory.scratch - p.memory.norm);
    const Shared<float> scratch(p.memory.scratch * 4, p.memory.end - p.memory.scratch);
    const int first_column = static_cast<int>(blockIdx.z) * kColumns;
    const int warp = static_cast<int>(threadIdx.x / 32), group = lane() / 4, member = lane() % 4;
    const int chunks = (channels + kConvChunk - 1) / kConvChunk, products = p.second_input.base == nullptr ? 1 : 2;
    const bool wants_statistics = p.layer.statistics.base != nullptr;

    if (p.source == ConvSource::kRaw) prepare_activation(p.below, task, row_of(p.weights, task), norm);
    // Statistics of column threadIdx.x over the slice's tiles so far.
    float count = 0.0f, mean = 0.0f, squares = 0.0f;
    for (int number = first_tile(tiles, blockIdx.x); number < end_of_tiles(tiles, blockIdx.x); ++number) {
        const TilePlace place = place_of(tiles, number);
        TilePosition positions[4];
        int rows[4];  // offsets of the positions' inputs in the tile
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            positions[h] = position_of(tiles, place, warp * 32 + h * 8 + group);
            const int y = positions[h].y * block.stride, x = positions[h].x * block.stride;
            // A position outside the grid reads any value: its results are not used.
            const bool in_tile = positions[h].image < tiles.tile_images;
            rows[h] = in_tile ? offset_in_tile(p.memory, tiles, positions[h].image, y, x) : 0;
        }
        float sums[2][kTilesN][4] = {};
        for (int chunk = 0; chunk < products * chunks; ++chunk) {
            const bool second = chunk >= chunks;
            const int first = (second ? chunk - chunks : chunk) * kConvChunk;
            // By value: a choice between two parameters in place would copy them to local memory.
            const Stored* input = second ? row_of(p.second_input, task) : row_of(p.below.activation, task);
            const float* of_input =
                (second ? row_of(p.second_weights, task) : row_of(p.weights, task)) + p.layer.weight;
            const int depth = smaller_of(kConvChunk, channels - first);
            const int padded = (depth + kDepth - 1) / kDepth * kDepth;
            block_barrier();  // BatchNorm's constants are there; all have read the tile and the slabs before
            if (p.source == ConvSource::kImage) {
                stage_image(p, task, place, tile, padded);
            } else {
                stage_activation(p, task, place, tile, norm, input, first, depth, padded);
            }
            stage_forward_slab<kColumns>(of_input, 0, channels, block.filters, first, depth, padded, slabs);
            for (int tap = 0; tap < kConvTaps; ++tap) {
                cp_async_wait<0>();
                block_barrier();  // the tile and this tap's slab are there; all have read the other slab
                if (tap + 1 < kConvTaps) {
                    stage_forward_slab<kColumns>(of_input, tap + 1, channels, block.filters, first, depth, padded,
                                                 slabs);
                }
                const int shift = offset_in_tile(p.memory, tiles, 0, tap / 3, tap % 3);
                const int slab = tap % 2 * kConvChunk * (kColumns + 8);
                for (int k0 = 0; k0 < padded; k0 += kDepth) {
                    multiply<kPrecision>(
                        sums, [&](int i, int half, int k) { return tile.get(rows[2 * i + half] + shift + k0 + k); },
                        [&](int j, int k) { return slabs.get(slab + (k0 + k) * (kColumns + 8) + j * 8 + group); });
                }
            }
        }

        // Store z, and sum it as stored: later kernels read the rounded values.
        Stored* raw = row_of(p.layer.raw, task);
        const float of_tile = static_cast<float>(place.positions());
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
            const int column = first_column + j * 8 + member * 2;
            float total[2] = {};
#pragma unroll
            for (int h = 0; h < 4; ++h) {
                Vector<float, 2> z{};
                if (positions[h].inside) {
                    z = {{rounded_to<Stored>(sums[h / 2][j][h % 2 * 2]),
                          rounded_to<Stored>(sums[h / 2][j][h % 2 * 2 + 1])}};
                    const int y = place.y + positions[h].y, x = place.x + positions[h].x;
                    const std::int64_t image = place.image + positions[h].image;
                    if (column < block.filters) {
                        store_floats<2>(raw + ((image * block.height + y) * block.width + x) * block.filters + column,
                                        z);
                    }
                }
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    sums[h / 2][j][h % 2 * 2 + e] = z.at[e];
                    total[e] += z.at[e];
                }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float of_warp = sum_over_rows(total[e]);
                if (group == 0) scratch.set(warp * kColumns + j * 8 + member * 2 + e, of_warp);
            }
        }
        if (!wants_statistics) continue;
        block_barrier();  // all warps' sums are there
        const auto total_of = [&](int which, int column) {
            float total = 0.0f;
            for (int w = 0; w < kWarps; ++w) total += scratch.get((which * kWarps + w) * kColumns + column);
            return total;
        };
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float center = total_of(0, j * 8 + member * 2 + e) / of_tile;
                float total = 0.0f;
#pragma unroll
                for (int h = 0; h < 4; ++h) {
                    const float distance = sums[h / 2][j][h % 2 * 2 + e] - center;
                    if (positions[h].inside) total += distance * distance;
                }
                const float of_warp = sum_over_rows(total);
                if (group == 0) scratch.set((kWarps + warp) * kColumns + j * 8 + member * 2 + e, of_warp);
            }
        }
        block_barrier();  // all warps' squares are there
        if (threadIdx.x < kColumns) {
            // Merge the tile into the slice: combine the counts, means and squares of the two sets.
            const float distance = total_of(0, threadIdx.x) / of_tile - mean, both = count + of_tile;
            squares += total_of(1, threadIdx.x) + distance * distance * count * of_tile / both;
            mean += distance * of_tile / both;
            count = both;
        }
    }
    const int column = first_column + static_cast<int>(threadIdx.x);
    if (wants_statistics && threadIdx.x < kColumns && column < block.filters) {
        float* statistics = row_of(p.layer.statistics, task) + blockIdx.x * 3 * block.filters + column;
        store(statistics, count);
        store(statistics + block.filters, mean);
        store(statistics + 2 * block.filters, squares);
    }
}

}  // namespace signmaml
