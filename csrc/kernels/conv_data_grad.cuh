// da = conv_transposed(dz, W): the gradient of a block's input, from the gradient of its raw output.
// An implicit GEMM like conv_forward: rows are positions of the input, columns are its channels, depth is taps x
// filters. dz is computed on the way from z, the halving's choices and the gradient of the activation, and stored for
// the weight gradient. If the block below has a raw output, its gradients of beta and gamma are summed here: sum dy,
// sum dy * xhat. A thread block owns a slice of tiles of one task and 8 * kTilesN channels. A second product may be
// added: see ConvDataGradParams. Launched by launch_conv_data_grad.
#pragma once

#include <cstdint>

#include "kernels/conv_common.cuh"
#include "kernels/conv_fragments.cuh"

namespace signmaml {

// Computes filters [first, first + depth) of the tile of dz, or loads them if they are stored, with zeros around the
// image and up to `padded`.
template <ConvPrecision kPrecision, typename Stored>
__device__ inline void stage_raw_grad(const ConvDataGradParams<Stored>& p, std::int64_t task, const TilePlace& place,
                                      const Shared<std::uint32_t>& tile, const Shared<float>& norm,
                                      const Stored* stored, int first, int depth, int padded) {
    const ConvBlock& block = p.layer.block;
    const ConvTiles& tiles = p.tiles;
    // With stride 2 the tile starts at an even row and column, and its dz at half those indices.
    const int border = block.stride == 1 ? 1 : 0;
    const int halving = block.stride - 1;  // the shift that divides by the stride
    const int own_height = (tiles.tile_height + halving) >> halving;
    const int own_width = (tiles.tile_width + halving) >> halving;
    for_each_quad<kPrecision>(tiles.tile_images * tiles.by_halo.value, padded, [&](int number, int filter) {
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
        const int at = offset_in_tile(p.memory, tiles, image, input.row, input.column);
        store_operands<kPrecision>(tile, at + filter / Operands<kPrecision>::kOfWord, p.memory.plane, values);
    });
}

// A thread's part of one tap's weights, on the way to shared memory, as in conv_forward: one row for each of the thread
// block's channels.
template <ConvPrecision kPrecision, int kColumns>
class TransposedSlab {
  public:
    static constexpr int kRow = Operands<kPrecision>::kRow, kPlane = kColumns * kRow;
    static constexpr int kSize = Operands<kPrecision>::kPlanes * kPlane;

    // For filters [first, first + depth): zeros beyond them, and beyond the last channel.
    __device__ TransposedSlab(const float* weights, int channels, int filters, int first, int depth)
        : of_tap_(channels * filters) {
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
            const int item = item_of(own);  // as in for_each_quad
            const int column = item / (8 * kQuads) * 8 + item % 8, filter = item / 8 % kQuads * 4;
            const int channel = static_cast<int>(blockIdx.z) * kColumns + column;
            place_[own] = column * kRow + filter / Operands<kPrecision>::kOfWord;
            from_[own] = weights + std::int64_t{channel} * filters + first + filter;
            is_there_[own] = item < kItems && filter < depth && channel < channels;
            values_[own] = {};
        }
    }

    __device__ void load(int tap) {
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
            if (is_there_[own]) values_[own] = signmaml::load<float, 4>(from_[own] + tap * of_tap_);
        }
    }

    // Stores them to a slab that begins at word `slab`.
    __device__ void store(const Shared<std::uint32_t>& slabs, int slab) const {
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
            if (item_of(own) < kItems) store_operands<kPrecision>(slabs, slab + place_[own], kPlane, values_[own]);
        }
    }

  private:
    static constexpr int kQuads = Operands<kPrecision>::kChunk / 4, kItems = kColumns * kQuads;
    static constexpr int kOwn = (kItems + kConvProductThreads - 1) / kConvProductThreads;
    Vector<float, 4> values_[kOwn];
    const float* from_[kOwn];
    int place_[kOwn];
    bool is_there_[kOwn];
    int of_tap_;

    static __device__ int item_of(int own) { return own * kConvProductThreads + static_cast<int>(threadIdx.x); }
};

// With stride 2 an input contributes to outputs by the taps of its parity alone: by the middle one where its row and
// column are even, by two where one is odd, by four where both are. So inputs are taken by their parities, and taps in
// the order of those.
template <int kStride>
struct GradTaps;
template <>
struct GradTaps<1> {
    static constexpr int kRows = 3, kOfRow = 3;  // a row of taps has one tap after the other
    static __device__ int tap(int number) { return number; }
    static __device__ constexpr int parity(int) { return 0; }
};
template <>
struct GradTaps<2> {
    static constexpr int kRows = 1, kOfRow = kConvTaps;
    // 4; 3, 5; 1, 7; 0, 2, 6, 8.
    static __device__ int tap(int number) { return static_cast<int>(0x862071534ll >> (4 * number) & 15); }
    static __device__ constexpr int parity(int number) { return number < 1 ? 0 : number < 3 ? 1 : number < 5 ? 2 : 3; }
};

// With stride 1 a warp owns 32 positions of a tile and half of the columns (16 and all, if there are only 8). With
// stride 2 it owns 16 positions of each parity and a quarter of the columns: so all warps have work at every tap, but
// for networks of 8 filters, which leave six of eight idle.
template <ConvPrecision kPrecision, int kTilesN, int kStride>
__global__ void __launch_bounds__(kConvProductThreads, kConvBlocksResident)
    conv_data_grad_kernel(const ConvDataGradParams<typename ConvStored<kPrecision>::Type> p) {
    using Stored = typename ConvStored<kPrecision>::Type;
    using Taps = GradTaps<kStride>;
    using Slab = TransposedSlab<kPrecision, 8 * kTilesN>;
    constexpr int kColumns = 8 * kTilesN, kDepth = Operands<kPrecision>::kDepth, kWarps = kConvProductThreads / 32;
    constexpr int kChunk = Operands<kPrecision>::kChunk, kWords = Operands<kPrecision>::kWords;
    [[maybe_unused]] constexpr int kUnroll = kStride == 1 && kTilesN == 8 ? 1 : Taps::kOfRow;
    constexpr int kParities = kStride * kStride;
    constexpr int kShares = kTilesN == 1 ? 1 : 2 * kStride;                         // of the columns
    constexpr int kTeam = kStride == 1 ? kWarps / kShares : 2;                      // warps with the same columns
    constexpr int kM = kConvTile / kParities / 16 / kTeam, kN = kTilesN / kShares;  // fragments of a warp, by parity
    const ConvBlock& block = p.layer.block;
    const ConvBlock& below = p.below.block;
    const ConvTiles& tiles = p.tiles;
    const std::int64_t task = blockIdx.y;
    const int channels = block.in_channels;
    const Shared<std::uint32_t> tile(0, p.memory.slabs);
    const Shared<std::uint32_t> slabs(p.memory.slabs * 4, p.memory.norm - p.memory.slabs);
    const int below_at = p.memory.norm + 5 * block.filters;
    const Shared<float> norm = in_floats(p.memory.norm, below_at);
    const Shared<float> norm_below = in_floats(below_at, p.memory.scratch);
    const Shared<float> scratch = in_floats(p.memory.scratch, p.memory.end);
    const int first_column = static_cast<int>(blockIdx.z) * kColumns;
    const int warp = static_cast<int>(threadIdx.x / 32), group = lane() / 4, member = lane() % 4;
    const int share = warp / kTeam;
    const bool works = share < kShares;
    const int first_own = share * kN * 8 * Slab::kRow;
    const int own_columns = first_own + place_in_columns<kPrecision, kN>(Slab::kPlane);

    const int chunks = (block.filters + kChunk - 1) / kChunk;
    const int products = p.second_raw_grad.base == nullptr ? 1 : 2;
    // The slabs' memory carries the threads' parts of sums over slices meanwhile.
    if (p.raw_grad.base == nullptr) {
        const SharedStatistics<Stored> statistics(p.layer, task, in_floats(p.memory.slabs, p.memory.norm));
        const PartOfSlices own(block.filters);
        const Shared<float> sums = in_floats(p.memory.slabs + own.parts * 3 * block.filters, p.memory.norm);
        if (own.works()) {
            for (int which = 0; which < 2; ++which) {
                sums.set((own.part * 2 + which) * block.filters + own.channel,
                         grad_sum_of(p.layer, task, own.channel, which, own.part, own.parts));
            }
        }
        block_barrier();  // all parts of the layer's sums are there
        prepare_raw_grad(
            p.layer, row_of(p.weights, task), norm, [&](int channel) { return statistics.norm(channel); },
            [&](int channel, int which) {
                float sum = 0.0f;
                for (int part = 0; part < own.parts; ++part) {
                    sum += sums.get((part * 2 + which) * block.filters + channel);
                }
                return sum;
            });
    }
    if (p.below_is_raw) {
        block_barrier();  // all have read the parts of the layer's sums
        const SharedStatistics<Stored> statistics(p.below, task, in_floats(p.memory.slabs, p.memory.norm));
        block_barrier();  // all parts of the statistics below are there
        for (int channel = threadIdx.x; channel < channels; channel += kConvProductThreads) {
            const NormOfChannel constants = statistics.norm(channel);
            norm_below.set(channel, constants.mean);
            norm_below.set(channels + channel, constants.inverse);
        }
    }
    float sum_dy = 0.0f, sum_dy_xhat = 0.0f;  // of column threadIdx.x, over the slice's tiles so far
    for (int number = first_tile(tiles, blockIdx.x); number < end_of_tiles(tiles, blockIdx.x); ++number) {
        const TilePlace place = place_of(tiles, number);
        // Position `own` of a parity, among those of this warp. With stride 1 all are of one parity.
        const auto position = [&](int parity, int own) -> TilePosition {
            const int of_team = warp % kTeam * 16 * kM + own;
            if constexpr (kStride == 1) return position_of(tiles, place, of_team);
            const int image = quotient(of_team, tiles.by_parity_area);
            const int in_image = of_team - image * tiles.by_parity_area.value;
            const int row = quotient(in_image, tiles.by_parity_width);
            const int y = 2 * row + parity / 2, x = 2 * (in_image - row * tiles.by_parity_width.value) + parity % 2;
            return {image, y, x, image < place.images && y < place.height && x < place.width};
        };
        int rows[kM];  // where this lane reads the first outputs that its positions contribute to
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            const TilePosition at = position(0, i * 16 + lane() % 16);
            rows[i] = lane() / 16 * 4;
            // A position outside the grid reads any value: its results are not used.
            if (at.image < tiles.tile_images) {
                rows[i] += offset_in_tile(p.memory, tiles, at.image, at.y / kStride, at.x / kStride);
            }
        }
        float sums[kParities][kM][kN][4] = {};
        // Down from the last, which compares with 0: these kernels have no register to spare.
        for (int left = products * chunks; left > 0; --left) {
            const bool second = left <= chunks && products == 2;
            const int first = (left > chunks ? left - chunks - 1 : left - 1) * kChunk;
            // By value: a choice between two parameters in place would copy them to local memory.
            const Stored* stored = second ? row_of(p.second_raw_grad, task) : row_of(p.raw_grad, task);
            const float* of_grad = (second ? row_of(p.second_weights, task) : row_of(p.weights, task)) + p.layer.weight;
            const int depth = smaller_of(kChunk, block.filters - first);
            const int padded = (depth + kDepth - 1) / kDepth * kDepth;
            Slab slab(of_grad, channels, block.filters, first, depth);
            slab.load(Taps::tap(0));
            block_barrier();  // BatchNorm's constants are there; all have read the tile and the slabs before
            stage_raw_grad<kPrecision>(p, task, place, tile, norm, stored, first, depth, padded);
            slab.store(slabs, 0);
            for (int tap_row = 0; tap_row < Taps::kRows; ++tap_row) {
#pragma unroll kUnroll
                for (int of_row = 0; of_row < Taps::kOfRow; ++of_row) {
                    const int at = tap_row * Taps::kOfRow + of_row, tap = Taps::tap(at);
                    const bool goes_on = at + 1 < kConvTaps;
                    if (goes_on) slab.load(Taps::tap(at + 1));
                    block_barrier();  // the tile and this tap's slab are there; all have read the other slab
                    // Output (y + 1 - ky) / stride used input y with this tap. With stride 1 the tile begins one row
                    // and one column before its first position.
                    const int down = kStride == 1 ? 2 - tap_row : tap / 3 == 0 ? 1 : 0;
                    const int right = kStride == 1 ? 2 - of_row : tap % 3 == 0 ? 1 : 0;
                    const int columns_at = at % 2 * Slab::kSize + own_columns;
#pragma unroll
                    for (int word = 0; word < kWords; word += 8) {
                        if (!works || word * Operands<kPrecision>::kOfWord >= padded) break;
                        RowFragment a[kM];
#pragma unroll
                        for (int i = 0; i < kM; ++i) {
                            const int from = rows[i] + down * p.memory.pitch + right * Slab::kRow + word;
                            a[i] = load_rows<kPrecision>(tile, from, p.memory.plane);
                        }
                        multiply<kPrecision>(sums[Taps::parity(of_row)], a, slabs, columns_at + word, Slab::kPlane);
                    }
                    if (goes_on) slab.store(slabs, (at + 1) % 2 * Slab::kSize);
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
                const TilePosition at_tile = position(parity, half * 8 + group);
                if (!works || !at_tile.inside || column >= channels) continue;
                const float (&of_fragment)[4] = sums[parity][half / 2][j];
                const Vector<float, 2> da{
                    {rounded_to<Stored>(of_fragment[half % 2 * 2]), rounded_to<Stored>(of_fragment[half % 2 * 2 + 1])}};
                const int y = place.y + at_tile.y, x = place.x + at_tile.x;
                const std::int64_t image = place.image + at_tile.image;
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
