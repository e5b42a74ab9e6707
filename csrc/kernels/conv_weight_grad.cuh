// dW = sum over positions of patch(x) (x) dz: partial sums of the weight gradient of one block of the network.
// A GEMM on tensor cores: rows are channels of the input, once for each of a row's three taps; columns are filters;
// depth is positions. A thread block owns a slice of tiles of one task, one of the three rows of taps, kConvChunk
// channels and 8 * kTilesN filters. Even warps take the first 16 channels, odd ones the others; each pair of them has a
// quarter of the depth. A second product may be added: see ConvWeightGradParams. Launched by launch_conv_weight_grad.
// conv_sign_update adds the slices and updates the weights.
#pragma once

#include <cstdint>

#include "kernels/conv_common.cuh"
#include "kernels/conv_fragments.cuh"

namespace signmaml {

// Loads channels [first, first + depth) of the input rows that a row of taps reads, with zeros up to kConvChunk.
// `source` is that of kActivation.
template <typename Stored>
__device__ inline void stage_input_rows(const ConvWeightGradParams<Stored>& p, std::int64_t task,
                                        const TilePlace& place, const Shared<float>& tile, const Stored* source,
                                        int tap_row, int first, int depth) {
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    const int inputs = tiles.tile_images * tiles.tile_height * tiles.halo_width;
#pragma unroll 1
    for (int item = threadIdx.x; item < inputs * (kConvChunk / 4); item += kConvProductThreads) {
        const int number = item / (kConvChunk / 4), channel = item % (kConvChunk / 4) * 4;
        const int row = quotient(number, tiles.by_halo_width), column = number - row * tiles.halo_width;
        const int image = quotient(row, tiles.by_height);  // rows are counted over all images
        const int y = (place.y + row - image * tiles.tile_height) * block.stride + tap_row - 1;
        const int x = place.x * block.stride + column - 1;
        Vector<float, 4> values{};
        if (image < place.images && y >= 0 && y < block.in_height && x >= 0 && x < block.in_width) {
            const std::int64_t of_image = place.image + image;
            if (p.source == ConvSource::kImage) {
                const float* images = row_of(p.images, task);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (channel + i >= depth) continue;
                    const std::int64_t plane = of_image * block.in_channels + channel + i;
                    values.at[i] = load(images + (plane * block.in_height + y) * block.in_width + x);
                }
            } else if (channel < depth) {
                const std::int64_t at =
                    ((of_image * block.in_height + y) * block.in_width + x) * block.in_channels + first + channel;
                values = load_floats<4>(source + at);
            }
        }
        store<float, 4>(tile.address(row * p.memory.pitch + column * p.memory.row + channel), values);
    }
}

// Loads the tile of dz, one row of the block's filters per position. Positions outside the grid are 0 and add nothing.
template <int kColumns, typename Stored>
__device__ inline void stage_output_gradient(const ConvWeightGradParams<Stored>& p, const TilePlace& place,
                                             const Shared<float>& target, const Stored* source, int first_column) {
    const ConvBlock& block = p.layer.block;
#pragma unroll 1
    for (int item = threadIdx.x; item < kConvTile * (kColumns / 4); item += kConvProductThreads) {
        const int number = item / (kColumns / 4), column = item % (kColumns / 4) * 4;
        const TilePosition position = position_of(p.tiles, place, number);
        Vector<float, 4> values{};
        if (position.inside && first_column + column < block.filters) {
            const int y = place.y + position.y, x = place.x + position.x;
            const std::int64_t image = place.image + position.image;
            values = load_floats<4>(source + ((image * block.height + y) * block.width + x) * block.filters +
                                    first_column + column);
        }
        store<float, 4>(target.address(number * (kColumns + 8) + column), values);
    }
}

template <ConvPrecision kPrecision, int kTilesN>
__global__ void __launch_bounds__(kConvProductThreads, kConvBlocksResident)
    conv_weight_grad_kernel(const ConvWeightGradParams<typename ConvStored<kPrecision>::Type> p) {
    using Stored = typename ConvStored<kPrecision>::Type;
    constexpr int kColumns = 8 * kTilesN, kDepth = Operands<kPrecision>::kDepth;
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    const std::int64_t task = blockIdx.y;
    const int channels = block.in_channels;
    const int chunks = (channels + kConvChunk - 1) / kConvChunk;
    const int tap_row = static_cast<int>(blockIdx.z) % 3;
    const int first = static_cast<int>(blockIdx.z) / 3 % chunks * kConvChunk;
    const int first_column = static_cast<int>(blockIdx.z) / 3 / chunks * kColumns;
    const int depth = smaller_of(kConvChunk, channels - first);
    const Shared<float> tile = in_floats(0, p.memory.slabs);
    const Shared<float> outputs = in_floats(p.memory.slabs, p.memory.scratch);
    const Shared<std::int32_t> places(p.memory.scratch * 4, kConvTile);
    const int warp = static_cast<int>(threadIdx.x / 32), group = lane() / 4, member = lane() % 4;
    const int row0 = warp % 2 * 16;  // the warp's first channel in the chunk

    // Offset of each position's input within a tile; the same for all tiles.
    for (int number = threadIdx.x; number < kConvTile; number += kConvProductThreads) {
        const int row = quotient(number, tiles.by_width), column = number - row * tiles.tile_width;
        const int at = row * p.memory.pitch + column * block.stride * p.memory.row;
        places.set(number, number < tiles.tile_images * tiles.by_area.value ? at : 0);
    }
    float sums[3][kTilesN][4] = {};
    // Tile by tile, and where there is a second product, twice: in one loop, whose state takes few registers.
    const int twice = p.second_input.base == nullptr ? 0 : 1;
    for (int round = first_tile(tiles, blockIdx.x) << twice; round >> twice < end_of_tiles(tiles, blockIdx.x);
         ++round) {
        const TilePlace place = place_of(tiles, round >> twice);
        const bool second = (round & twice) != 0;
        block_barrier();  // all have read the tile before
        // By value: a choice between two parameters in place would copy them to local memory.
        const Stored* input = second ? row_of(p.second_input, task) : row_of(p.input, task);
        const Stored* gradient = second ? row_of(p.second_raw_grad, task) : row_of(p.layer.raw_grad, task);
        stage_input_rows(p, task, place, tile, input, tap_row, first, depth);
        stage_output_gradient<kColumns>(p, place, outputs, gradient, first_column);
        block_barrier();  // the tile is there
        if (row0 >= depth) continue;
        const int used = tiles.tile_images * tiles.by_area.value;
        for (int k0 = warp / 2 * kDepth; k0 < used; k0 += kConvDepthShares * kDepth) {
            ColumnFragment b[kTilesN];
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) {
                b[j] = column_fragment<kPrecision>(
                    [&](int k) { return outputs.get((k0 + k) * (kColumns + 8) + j * 8 + group); });
            }
#pragma unroll
            for (int tap = 0; tap < 3; ++tap) {
                const RowFragment a = row_fragment<kPrecision>([&](int half, int k) {
                    return tile.get(places.get(k0 + k) + tap * p.memory.row + row0 + half * 8 + group);
                });
#pragma unroll
                for (int j = 0; j < kTilesN; ++j) add_product<kPrecision>(sums[tap][j], a, b[j]);
            }
        }
    }
    block_barrier();  // all have read the last tile: its memory now carries the sums of all shares but the first
    const Shared<float> others = in_floats(0, p.memory.scratch);
    constexpr int kOfShare = 3 * kConvChunk * kColumns, kThreads = kConvProductThreads / kConvDepthShares;
    const int mine = static_cast<int>(threadIdx.x) % kThreads;
    if (warp >= 2) {
        const int own = (warp / 2 - 1) * kOfShare + mine;
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) {
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) others.set(own + ((tap * kTilesN + j) * 4 + e) * kThreads, sums[tap][j][e]);
            }
        }
    }
    block_barrier();  // the other shares of the depth are there
    if (warp >= 2) return;
    float* partials = row_of(p.partials, task) + blockIdx.x * std::int64_t{kConvTaps} * channels * block.filters;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int channel = row0 + half * 8 + group;
                const int column = first_column + j * 8 + member * 2;
                if (channel >= depth || column >= block.filters) continue;
                Vector<float, 2> values;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    values.at[e] = sums[tap][j][half * 2 + e];
#pragma unroll
                    for (int share = 0; share + 1 < kConvDepthShares; ++share) {
                        const int of_sum = ((tap * kTilesN + j) * 4 + half * 2 + e) * kThreads;
                        values.at[e] += others.get(share * kOfShare + of_sum + mine);
                    }
                }
                const std::int64_t row = std::int64_t{tap_row * 3 + tap} * channels + first + channel;
                store<float, 2>(partials + row * block.filters + column, values);
            }
        }
    }
}

}  // namespace signmaml
