// da = conv_transposed(dz, W): the gradient of a block's input, from the gradient of its raw output.
// An implicit GEMM like conv_forward: rows are positions of the input, columns are its channels, depth is taps x
// filters. dz is computed on the way from z, the halving's choices and the gradient of the activation, and stored for
// the weight gradient. If the block below has a raw output, its gradients of beta and gamma are summed here: sum dy,
// sum dy * xhat. A thread block owns a slice of tiles of one task and 8 * kTilesN channels. A second product may be
// added: see ConvDataGradParams. Launched by launch_conv_data_grad.
#pragma once

#include <cstdint>

#include "kernels/conv_common.cuh"

namespace signmaml {

// Computes filters [first, first + depth) of the tile of dz, or loads them if they are stored, with zeros around the
// image and up to `padded`.
template <typename Stored>
__device__ inline void stage_raw_grad(const ConvDataGradParams<Stored>& p, std::int64_t task, const TilePlace& place,
                                      const Shared<float>& tile, const Shared<float>& norm, const Stored* stored,
                                      int first, int depth, int padded) {
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    // With stride 2 the tile starts at an even row and column, and its dz at half those indices.
    const int border = block.stride == 1 ? 1 : 0;
    const int halving = block.stride - 1;  // the shift that divides by the stride
    const int own_height = (tiles.tile_height + halving) >> halving;
    const int own_width = (tiles.tile_width + halving) >> halving;
    for_each_quad(tiles.tile_images * tiles.by_halo.value, padded, [&](int number, int filter) {
        const TileInput input = input_of(tiles, number);
        const int image = input.image, row = input.row - border, column = input.column - border;
        const int y = (place.y >> halving) + row, x = (place.x >> halving) + column;
        Vector<float, 4> values{};
        if (image < place.images && y >= 0 && y < block.height && x >= 0 && x < block.width && filter < depth) {
            const std::int64_t at =
                ((std::int64_t{place.image + image} * block.height + y) * block.width + x) * block.filters;
            if (p.raw_grad.base != nullptr) {
                values = load_floats<4>(stored + at + first + filter);
            } else {
                values = raw_grad<4>(p.layer, task, place.image + image, y, x, first + filter, norm);
                // Several tiles may hold this position; only the one that owns it stores it.
                const bool owned = row >= 0 && row < own_height && column >= 0 && column < own_width;
                if (owned && blockIdx.z == 0) {
                    store_floats<4>(row_of(p.layer.raw_grad, task) + at + first + filter, values);
                }
            }
        }
        store<float, 4>(tile.address(offset_in_tile(p.memory, tiles, image, input.row, input.column) + filter), values);
    });
}

// Starts to copy one tap's weights: one row per channel of the block's columns, with filters [first, first + depth).
template <int kColumns>
__device__ inline void stage_transposed_slab(const float* weights, int tap, int number, int channels, int filters,
                                             int first, int depth, int padded, const Shared<float>& slabs) {
    const int first_column = static_cast<int>(blockIdx.z) * kColumns;
    const int slab = number % 2 * kColumns * kConvRow;
    for_each_quad(kColumns, padded, [&](int column, int filter) {
        const std::int64_t from = (std::int64_t{tap} * channels + first_column + column) * filters + first + filter;
        copy_or_clear(slabs.address(slab + column * kConvRow + filter), weights + from,
                      filter < depth && first_column + column < channels);
    });
    cp_async_commit();
}

// With stride 2 an input contributes to outputs by the taps of its parity alone: by the middle one where its row and
// column are even, by two where one is odd, by four where both are. So inputs are taken by their parities, and taps in
// the order of those.
template <int kStride>
struct GradTaps;
template <>
struct GradTaps<1> {
    static __device__ int tap(int number) { return number; }
    static __device__ constexpr int end(int) { return kConvTaps; }
};
template <>
struct GradTaps<2> {
    // 4; 3, 5; 1, 7; 0, 2, 6, 8.
    static __device__ int tap(int number) { return static_cast<int>(0x862071534ll >> (4 * number) & 15); }
    static __device__ constexpr int end(int parity) { return parity == 0 ? 1 : parity == 1 ? 3 : parity == 2 ? 5 : 9; }
};

// With stride 1 a warp owns 32 positions of a tile and all columns. With stride 2 it owns 16 positions of each parity,
// and half of the columns: so all warps have work at every tap.
template <ConvPrecision kPrecision, int kTilesN, int kStride>
__global__ void __launch_bounds__(kConvThreads, kConvBlocksResident<kPrecision, kTilesN>)
    conv_data_grad_kernel(const ConvDataGradParams<typename ConvStored<kPrecision>::Type> p) {
    using Stored = typename ConvStored<kPrecision>::Type;
    using Taps = GradTaps<kStride>;
    constexpr int kColumns = 8 * kTilesN, kDepth = kConvDepth<kPrecision>, kWarps = kConvThreads / 32;
    constexpr int kParities = kStride * kStride;
    constexpr int kM = kStride == 1 ? 2 : 1;                       // fragments of 16 positions of a parity
    constexpr int kShares = kStride == 1 || kTilesN == 1 ? 1 : 2;  // of the columns
    constexpr int kN = kTilesN / kShares;
    constexpr int kTeam = kStride == 1 ? kWarps : 2;  // warps with the same columns
    const ConvBlock& block = p.layer.block;
    const ConvBlock& below = p.below.block;
    const ConvTiles& tiles = p.tiles;
    const std::int64_t task = blockIdx.y;
    const int channels = block.in_channels;
    const Shared<float> tile(0, p.memory.slabs);
    const Shared<float> slabs(p.memory.slabs * 4, p.memory.norm - p.memory.slabs);
    const Shared<float> norm(p.memory.norm * 4, 5 * block.filters);
    const Shared<float> norm_below((p.memory.norm + 5 * block.filters) * 4, 2 * channels);
    const Shared<float> scratch(p.memory.scratch * 4, p.memory.end - p.memory.scratch);
    const int first_column = static_cast<int>(blockIdx.z) * kColumns;
    const int warp = static_cast<int>(threadIdx.x / 32), group = lane() / 4, member = lane() % 4;
    const int share = warp / kTeam;
    const bool works = share < kShares;  // too few columns to divide leave two warps idle

    const int chunks = (block.filters + kConvChunk - 1) / kConvChunk;
    const int products = p.second_raw_grad.base == nullptr ? 1 : 2;
    if (p.raw_grad.base == nullptr) prepare_raw_grad(p.layer, task, row_of(p.weights, task), norm);
    if (p.below_is_raw) {
        for (int channel = threadIdx.x; channel < channels; channel += kConvThreads) {
            const NormOfChannel constants = norm_of(p.below, task, channel);
            norm_below.set(channel, constants.mean);
            norm_below.set(channels + channel, constants.inverse);
        }
    }
    float sum_dy = 0.0f, sum_dy_xhat = 0.0f;  // of column threadIdx.x, over the slice's tiles so far
    for (int number = first_tile(tiles, blockIdx.x); number < end_of_tiles(tiles, blockIdx.x); ++number) {
        const TilePlace place = place_of(tiles, number);
        TilePosition positions[kParities][2 * kM];
        int rows[2 * kM];  // offsets of the first output that the positions read, in the tile
#pragma unroll
        for (int h = 0; h < 2 * kM; ++h) {
            if constexpr (kStride == 1) {
                positions[0][h] = position_of(tiles, place, warp * 32 + h * 8 + group);
                const TilePosition& at = positions[0][h];
                // A position outside the grid reads any value: its results are not used.
                rows[h] = at.image < tiles.tile_images ? offset_in_tile(p.memory, tiles, at.image, at.y, at.x) : 0;
            } else {
                const int in_parity = warp % kTeam * 16 + h * 8 + group;
                const int image = quotient(in_parity, tiles.by_parity_area);
                const int in_image = in_parity - image * tiles.by_parity_area.value;
                const int y = quotient(in_image, tiles.by_parity_width), x = in_image - y * tiles.by_parity_width.value;
                rows[h] = image < tiles.tile_images ? offset_in_tile(p.memory, tiles, image, y, x) : 0;
#pragma unroll
                for (int parity = 0; parity < kParities; ++parity) {
                    const int own_y = 2 * y + parity / 2, own_x = 2 * x + parity % 2;
                    positions[parity][h] = {image, own_y, own_x,
                                            image < place.images && own_y < place.height && own_x < place.width};
                }
            }
        }
        float sums[kParities][kM][kN][4] = {};
        // Down from the last, which compares with 0: these kernels have no register to spare.
        for (int left = products * chunks; left > 0; --left) {
            const bool second = left <= chunks && products == 2;
            const int first = (left > chunks ? left - chunks - 1 : left - 1) * kConvChunk;
            // By value: a choice between two parameters in place would copy them to local memory.
            const Stored* stored = second ? row_of(p.second_raw_grad, task) : row_of(p.raw_grad, task);
            const float* of_grad = (second ? row_of(p.second_weights, task) : row_of(p.weights, task)) + p.layer.weight;
            const int depth = smaller_of(kConvChunk, block.filters - first);
            const int padded = (depth + kDepth - 1) / kDepth * kDepth;
            block_barrier();  // BatchNorm's constants are there; all have read the tile and the slabs before
            stage_raw_grad(p, task, place, tile, norm, stored, first, depth, padded);
            stage_transposed_slab<kColumns>(of_grad, Taps::tap(0), 0, channels, block.filters, first, depth, padded,
                                            slabs);
#pragma unroll
            for (int parity = 0; parity < kParities; ++parity) {
                for (int at = parity == 0 ? 0 : Taps::end(parity - 1); at < Taps::end(parity); ++at) {
                    const int tap = Taps::tap(at);
                    cp_async_wait<0>();
                    block_barrier();  // the tile and this tap's slab are there; all have read the other slab
                    if (at + 1 < kConvTaps) {
                        stage_transposed_slab<kColumns>(of_grad, Taps::tap(at + 1), at + 1, channels, block.filters,
                                                        first, depth, padded, slabs);
                    }
                    if (!works) continue;
                    // Output (y + 1 - ky) / stride used input y with this tap. With stride 1 the tile begins one row
                    // and one column before its first position.
                    const int shift =
                        kStride == 1 ? offset_in_tile(p.memory, tiles, 0, 2 - tap / 3, 2 - tap % 3)
                                     : offset_in_tile(p.memory, tiles, 0, tap / 3 == 0 ? 1 : 0, tap % 3 == 0 ? 1 : 0);
                    const int slab = at % 2 * kColumns * kConvRow, first_row = share * kN * 8 + group;
                    for (int k0 = 0; k0 < padded; k0 += kDepth) {
                        multiply<kPrecision>(
                            sums[parity],
                            [&](int i, int half, int k) { return tile.get(rows[2 * i + half] + shift + k0 + k); },
                            [&](int j, int k) { return slabs.get(slab + (j * 8 + first_row) * kConvRow + k0 + k); });
                    }
                }
            }
        }

        Stored* gradient = row_of(p.below.activation_grad, task);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
            const int of_block = (share * kN + j) * 8 + member * 2, column = first_column + of_block;
            float totals[2][2] = {};  // of dy and of dy * xhat
#pragma unroll
            for (int h = 0; h < kParities * 2 * kM; ++h) {
                const int parity = h / (2 * kM), half = h % (2 * kM);
                const TilePosition& position = positions[parity][half];
                if (!works || !position.inside || column >= channels) continue;
                const float (&of_fragment)[4] = sums[parity][half / 2][j];
                const Vector<float, 2> da{
                    {rounded_to<Stored>(of_fragment[half % 2 * 2]), rounded_to<Stored>(of_fragment[half % 2 * 2 + 1])}};
                const int y = place.y + position.y, x = place.x + position.x;
                const std::int64_t image = place.image + position.image;
                const std::int64_t at = ((image * block.in_height + y) * block.in_width + x) * channels + column;
                store_floats<2>(gradient + at, da);
                if (!p.below_is_raw) continue;
                const auto choices = load<std::uint8_t, 2>(row_of(p.below.choices, task) + at);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (choices.at[e] < kConvActive) continue;
                    const int winner = choices.at[e] - kConvActive;
                    const std::int64_t row = image * below.height + y * below.window + winner / 2;
                    const std::int64_t from =
                        (row * below.width + x * below.window + winner % 2) * channels + column + e;
                    const float z = as_float(load(row_of(p.below.raw, task) + from));
                    const float xhat = (z - norm_below.get(column + e)) * norm_below.get(channels + column + e);
                    totals[0][e] += da.at[e];
                    totals[1][e] += da.at[e] * xhat;
                }
            }
            if (!p.below_is_raw || !works) continue;
#pragma unroll
            for (int which = 0; which < 2; ++which) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float of_warp = sum_over_rows(totals[which][e]);
                    if (group == 0) scratch.set((which * kWarps + warp) * kColumns + of_block + e, of_warp);
                }
            }
        }
        if (p.below_is_raw) {
            block_barrier();  // all warps' sums are there
            if (threadIdx.x < kColumns) {
                const int first = static_cast<int>(threadIdx.x) / (kN * 8) * kTeam;  // of the warps with this column
                for (int w = first; w < first + kTeam; ++w) {
                    sum_dy += scratch.get(w * kColumns + threadIdx.x);
                    sum_dy_xhat += scratch.get((kWarps + w) * kColumns + threadIdx.x);
                }
            }
        }
    }
    const int column = first_column + static_cast<int>(threadIdx.x);
    if (p.below_is_raw && threadIdx.x < kColumns && column < channels) {
        float* sums = row_of(p.below.grad_sums, task) + blockIdx.x * 2 * channels + column;
        store(sums, sum_dy);
        store(sums + channels, sum_dy_xhat);
    }
}

}  // namespace signmaml
