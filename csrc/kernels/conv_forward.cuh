// z = conv3x3(x, W) of one block of the network, and the statistics of z that its BatchNorm needs.
// An implicit GEMM on tensor cores: rows are positions of z, columns are filters, depth is taps x channels. A thread
// block owns a slice of tiles of one task and 8 * kTilesN filters; a warp owns 32 positions of a tile and half of the
// filters (16 positions if there are only 8 filters). The input is split into operands where it is staged. It is read
// from the images, from a stored activation, or from the raw output of the block below, which is normalised, halved and
// (if a backward pass follows) stored on the way. A second product may be added: see ConvForwardParams. Launched by
// launch_conv_forward. Readable twin: nn.Conv2d under reference.py.
#pragma once

#include <cstdint>

#include "kernels/conv_common.cuh"
#include "kernels/conv_fragments.cuh"

namespace signmaml {

template <ConvPrecision kPrecision, typename Stored>
__device__ inline void stage_image(const ConvForwardParams<Stored>& p, std::int64_t task, const TilePlace& place,
                                   const Shared<std::uint32_t>& tile, int padded) {
    const ConvBlock& block = p.layer.block;
    const float* images = row_of(p.images, task);
    for_each_quad<kPrecision>(p.tiles.tile_images * p.tiles.by_halo.value, padded, [&](int number, int channel) {
        const auto [image, row, column] = input_of(p.tiles, number);
        const int y = place.y * block.stride - 1 + row, x = place.x * block.stride - 1 + column;
        const bool in_image = image < place.images && y >= 0 && y < block.in_height && x >= 0 && x < block.in_width;
        Vector<float, 4> values{};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (!in_image || channel + i >= block.in_channels) continue;
            const std::int64_t plane = std::int64_t{place.image + image} * block.in_channels + channel + i;
            values.at[i] = load(images + (plane * block.in_height + y) * block.in_width + x);
        }
        const int at = offset_in_tile(p.memory, p.tiles, image, row, column);
        store_operands<kPrecision>(tile, at + channel / Operands<kPrecision>::kOfWord, p.memory.plane, values);
    });
}

// Loads channels [first, first + depth) of the tile's input, with zeros up to `padded`. `input` is that of kActivation.
template <ConvPrecision kPrecision, typename Stored>
__device__ inline void stage_activation(const ConvForwardParams<Stored>& p, std::int64_t task, const TilePlace& place,
                                        const Shared<std::uint32_t>& tile, const Shared<float>& norm,
                                        const Stored* input, int first, int depth, int padded) {
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    for_each_quad<kPrecision>(tiles.tile_images * tiles.by_halo.value, padded, [&](int number, int channel) {
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
        const int at = offset_in_tile(p.memory, tiles, image, row, column);
        store_operands<kPrecision>(tile, at + channel / Operands<kPrecision>::kOfWord, p.memory.plane, values);
    });
}

// A thread's part of one tap's weights, on the way to shared memory: they are loaded while products hide the latency,
// and stored one row for each of the thread block's filters.
template <ConvPrecision kPrecision, int kColumns>
class ForwardSlab {
  public:
    static constexpr int kRow = Operands<kPrecision>::kRow, kPlane = kColumns * kRow;
    static constexpr int kSize = Operands<kPrecision>::kPlanes * kPlane;

    // For channels [first, first + depth): zeros beyond them, and beyond the last filter.
    __device__ ForwardSlab(const float* weights, int channels, int filters, int first, int depth)
        : of_tap_(channels * filters), filters_(filters) {
        const int first_column = static_cast<int>(blockIdx.z) * kColumns;
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
            // Sixteen neighbouring lanes have sixteen words of the depth, and the next sixteen the next four filters:
            // so they load whole sectors, and store to different banks.
            const int item = item_of(own), column = item / 16 % kQuads * 4;
            const int word = item % 16 + item / (16 * kQuads) * 16;
            place_[own] = column * kRow + word;
            from_[own] = weights + std::int64_t{first + word * kOfWord} * filters + first_column + column;
#pragma unroll
            for (int i = 0; i < kOfWord; ++i) {
                is_there_[own][i] = item < kItems && word * kOfWord + i < depth && first_column + column < filters;
                values_[own][i] = {};
            }
        }
    }

    __device__ void load(int tap) {
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
#pragma unroll
            for (int i = 0; i < kOfWord; ++i) {
                if (!is_there_[own][i]) continue;
                values_[own][i] = signmaml::load<float, 4>(from_[own] + tap * of_tap_ + i * filters_);
            }
        }
    }

    // Stores them to a slab that begins at word `slab`.
    __device__ void store(const Shared<std::uint32_t>& slabs, int slab) const {
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
            if (item_of(own) >= kItems) continue;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int at = slab + place_[own] + e * kRow;
                if constexpr (kPrecision == ConvPrecision::kBf16) {
                    slabs.set(at, pack_bf16(values_[own][0].at[e], values_[own][1].at[e]));
                } else {
                    const Halves halves = operands_of<kPrecision>(values_[own][0].at[e]);
                    slabs.set(at, halves.high);
                    if constexpr (Operands<kPrecision>::kPlanes == 2) slabs.set(at + kPlane, halves.low);
                }
            }
        }
    }

  private:
    static constexpr int kOfWord = Operands<kPrecision>::kOfWord, kQuads = kColumns / 4;
    static constexpr int kItems = Operands<kPrecision>::kWords * kQuads;
    static constexpr int kOwn = (kItems + kConvProductThreads - 1) / kConvProductThreads;
    Vector<float, 4> values_[kOwn][kOfWord];
    const float* from_[kOwn];
    int place_[kOwn];
    bool is_there_[kOwn][kOfWord];
    int of_tap_, filters_;

    static __device__ int item_of(int own) { return own * kConvProductThreads + static_cast<int>(threadIdx.x); }
};

template <ConvPrecision kPrecision, int kTilesN>
__global__ void __launch_bounds__(kConvProductThreads, kConvBlocksResident)
    conv_forward_kernel(const ConvForwardParams<typename ConvStored<kPrecision>::Type> p) {
    using Stored = typename ConvStored<kPrecision>::Type;
    using Slab = ForwardSlab<kPrecision, 8 * kTilesN>;
    constexpr int kColumns = 8 * kTilesN, kDepth = Operands<kPrecision>::kDepth, kWarps = kConvProductThreads / 32;
    constexpr int kChunk = Operands<kPrecision>::kChunk, kWords = Operands<kPrecision>::kWords;
    [[maybe_unused]] constexpr int kUnroll = kTilesN == 8 ? 1 : 3;
    constexpr int kShares = kTilesN == 1 ? 1 : 2;                       // of the columns
    constexpr int kTeam = kWarps / kShares;                             // warps with the same columns
    constexpr int kM = kConvTile / 16 / kTeam, kN = kTilesN / kShares;  // fragments of a warp
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    const std::int64_t task = blockIdx.y;
    const int channels = block.in_channels;
    const Shared<std::uint32_t> tile(0, p.memory.slabs);
    const Shared<std::uint32_t> slabs(p.memory.slabs * 4, p.memory.norm - p.memory.slabs);
    const Shared<float> norm = in_floats(p.memory.norm, p.memory.scratch);
    const Shared<float> scratch = in_floats(p.memory.scratch, p.memory.end);
    const int first_column = static_cast<int>(blockIdx.z) * kColumns;
    const int warp = static_cast<int>(threadIdx.x / 32), group = lane() / 4, member = lane() % 4;
    const int first_position = warp % kTeam * 16 * kM, share = warp / kTeam;
    const int own_columns = share * kN * 8 * Slab::kRow + place_in_columns<kPrecision, kN>(Slab::kPlane);
    const int chunks = (channels + kChunk - 1) / kChunk, products = p.second_input.base == nullptr ? 1 : 2;
    const bool wants_statistics = p.layer.statistics.base != nullptr;

    if (p.source == ConvSource::kRaw) {
        // The slabs' memory carries the parts of the statistics meanwhile.
        const SharedStatistics<Stored> statistics(p.below, task, in_floats(p.memory.slabs, p.memory.norm));
        block_barrier();  // all parts of the statistics are there
        prepare_activation(p.below, row_of(p.weights, task), norm,
                           [&](int channel) { return statistics.norm(channel); });
    }
    // Statistics of column threadIdx.x over the slice's tiles so far.
    float count = 0.0f, mean = 0.0f, squares = 0.0f;
    for (int number = first_tile(tiles, blockIdx.x); number < end_of_tiles(tiles, blockIdx.x); ++number) {
        const TilePlace place = place_of(tiles, number);
        int rows[kM];  // where this lane reads the positions' inputs
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            const TilePosition at = position_of(tiles, place, first_position + i * 16 + lane() % 16);
            // A position outside the grid reads any value: its results are not used.
            const bool in_tile = at.image < tiles.tile_images;
            rows[i] = lane() / 16 * 4;
            if (in_tile) {
                rows[i] += offset_in_tile(p.memory, tiles, at.image, at.y * block.stride, at.x * block.stride);
            }
        }
        float sums[kM][kN][4] = {};
        for (int chunk = 0; chunk < products * chunks; ++chunk) {
            const bool second = chunk >= chunks;
            const int first = (second ? chunk - chunks : chunk) * kChunk;
            // By value: a choice between two parameters in place would copy them to local memory.
            const Stored* input = second ? row_of(p.second_input, task) : row_of(p.below.activation, task);
            const float* of_input =
                (second ? row_of(p.second_weights, task) : row_of(p.weights, task)) + p.layer.weight;
            const int depth = smaller_of(kChunk, channels - first);
            const int padded = (depth + kDepth - 1) / kDepth * kDepth;
            Slab slab(of_input, channels, block.filters, first, depth);
            slab.load(0);
            block_barrier();  // BatchNorm's constants are there; all have read the tile and the slabs before
            if (p.source == ConvSource::kImage) {
                stage_image<kPrecision>(p, task, place, tile, padded);
            } else {
                stage_activation<kPrecision>(p, task, place, tile, norm, input, first, depth, padded);
            }
            slab.store(slabs, 0);
            for (int tap_row = 0; tap_row < 3; ++tap_row) {
#pragma unroll kUnroll
                for (int column = 0; column < 3; ++column) {
                    const int tap = tap_row * 3 + column;
                    const bool goes_on = tap + 1 < kConvTaps;
                    if (goes_on) slab.load(tap + 1);
                    block_barrier();  // the tile and this tap's slab are there; all have read the other slab
                    const int columns_at = tap % 2 * Slab::kSize + own_columns;
#pragma unroll
                    for (int word = 0; word < kWords; word += 8) {
                        if (word * Operands<kPrecision>::kOfWord >= padded) break;
                        RowFragment a[kM];
#pragma unroll
                        for (int i = 0; i < kM; ++i) {
                            const int from = rows[i] + tap_row * p.memory.pitch + column * Slab::kRow + word;
                            a[i] = load_rows<kPrecision>(tile, from, p.memory.plane);
                        }
                        multiply<kPrecision>(sums, a, slabs, columns_at + word, Slab::kPlane);
                    }
                    if (goes_on) slab.store(slabs, (tap + 1) % 2 * Slab::kSize);
                }
            }
        }

        // Store z, and sum it as stored: later kernels read the rounded values.
        Stored* raw = row_of(p.layer.raw, task);
        const float of_tile = static_cast<float>(place.positions());
        TilePosition positions[2 * kM];
#pragma unroll
        for (int h = 0; h < 2 * kM; ++h) positions[h] = position_of(tiles, place, first_position + h * 8 + group);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
            const int of_block = (share * kN + j) * 8 + member * 2, column = first_column + of_block;
            float total[2] = {};
#pragma unroll
            for (int h = 0; h < 2 * kM; ++h) {
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
                if (group == 0) scratch.set(warp * kColumns + of_block + e, of_warp);
            }
        }
        if (!wants_statistics) continue;
        block_barrier();  // all warps' sums are there
        const auto total_of = [&](int which, int column) {
            const int first = column / (kN * 8) * kTeam;  // of the warps with this column
            float total = 0.0f;
            for (int w = first; w < first + kTeam; ++w) total += scratch.get((which * kWarps + w) * kColumns + column);
            return total;
        };
#pragma unroll
        for (int j = 0; j < kN; ++j) {
            const int of_block = (share * kN + j) * 8 + member * 2;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float center = total_of(0, of_block + e) / of_tile;
                float total = 0.0f;
#pragma unroll
                for (int h = 0; h < 2 * kM; ++h) {
                    const float distance = sums[h / 2][j][h % 2 * 2 + e] - center;
                    if (positions[h].inside) total += distance * distance;
                }
                const float of_warp = sum_over_rows(total);
                if (group == 0) scratch.set((kWarps + warp) * kColumns + of_block + e, of_warp);
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
