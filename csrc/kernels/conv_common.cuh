// Shared by the convolution kernels: stored numbers, tiles of positions, BatchNorm's constants, tensor-core products.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/platform.cuh"
#include "kernels/tables.cuh"
#include "params/conv_kernels.h"

namespace signmaml {

template <typename T>
__device__ inline T* row_of(const PerTask<T>& array, std::int64_t task) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(array.base) + task * array.stride);
}

// Whether a rule asks for the place in theta of what it moves.
__device__ inline bool reads_theta_place(const ConvStepRule& rule) {
    return rule.by_element || rule.counts.base != nullptr;
}

// Moves the parameter at `place` of a task's weights, which is that of theta's element `theta` of tensor `tensor`.
__device__ inline void move_by(const ConvStepRule& rule, std::int64_t task, std::int64_t place, std::int64_t theta,
                               int tensor, float gradient) {
    const float direction = rule.by_sign ? sign(gradient) : gradient;
    if (rule.kept.base != nullptr) store(row_of(rule.kept, task) + place, direction);
    if (rule.weights.base == nullptr) return;
    float* weight = row_of(rule.weights, task) + place;
    const float rate = load(rule.lr + (rule.by_element ? theta : tensor));
    if (rule.counts.base == nullptr) {
        store(weight, stepped(load(weight), rate, direction));
        return;
    }
    float* count = row_of(rule.counts, task) + place;  // a NaN stays one until the counts are given
    const float counted = load(count) + direction;
    store(count, counted);
    store(weight, stepped(load(rule.theta + theta), rate, counted));
}

// ---- numbers as stored in memory: float, or bf16 as its 16 bits

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(std::uint16_t value) { return float_of(static_cast<std::uint32_t>(value) << 16); }

template <typename Stored>
struct Storing;
template <>
struct Storing<float> {
    static __device__ float of(float value) { return value; }
};
template <>
struct Storing<std::uint16_t> {
    static __device__ std::uint16_t of(float value) {
        return static_cast<std::uint16_t>(pack_bf16(value, 0.0f) & 0xffffu);
    }
};

// A value rounded as storing it would round it.
template <typename Stored>
__device__ inline float rounded_to(float value) {
    return as_float(Storing<Stored>::of(value));
}

// Neighbouring values; the address is a multiple of kCount elements.
template <int kCount, typename Stored>
__device__ inline Vector<float, kCount> load_floats(const Stored* source) {
    const auto stored = load<Stored, kCount>(source);
    Vector<float, kCount> values;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values.at[i] = as_float(stored.at[i]);
    return values;
}

template <int kCount, typename Stored>
__device__ inline void store_floats(Stored* target, const Vector<float, kCount>& values) {
    Vector<Stored, kCount> stored;
#pragma unroll
    for (int i = 0; i < kCount; ++i) stored.at[i] = Storing<Stored>::of(values.at[i]);
    store<Stored, kCount>(target, stored);
}

// Starts to copy four floats to shared memory, both addresses multiples of 16 bytes; zeros if there is no source.
__device__ inline void copy_or_clear(float* target, const float* source, bool has_source) {
    if (has_source) {
        cp_async_16(target, source);
    } else {
        store<float, 4>(target, {});
    }
}

// ---- tiles

// Where a tile is in the grid of positions.
struct TilePlace {
    int image, y, x;            // its first position
    int images, height, width;  // of the part that is inside the grid

    __device__ int positions() const { return images * height * width; }
};

__device__ inline TilePlace place_of(const ConvTiles& tiles, int tile) {
    const int of_image = tiles.tiles_y * tiles.tiles_x;
    const int image = tile / of_image * tiles.tile_images;
    const int y = tile % of_image / tiles.tiles_x * tiles.tile_height;
    const int x = tile % tiles.tiles_x * tiles.tile_width;
    return {image,
            y,
            x,
            smaller_of(tiles.tile_images, tiles.count - image),
            smaller_of(tiles.tile_height, tiles.height - y),
            smaller_of(tiles.tile_width, tiles.width - x)};
}

// n / divisor.value without a division, which would take some twenty instructions.
__device__ inline int quotient(int n, const Divisor& divisor) {
    return static_cast<int>(multiply_high(2 * static_cast<std::uint32_t>(n), divisor.magic));
}

// The same where n may be too large for that.
__device__ inline int quotient_of_any(int n, const Divisor& divisor) {
    return divisor.magic != 0 ? quotient(n, divisor) : n / divisor.value;
}

// One position of a tile. Positions are numbered row by row, image by image.
struct TilePosition {
    int image, y, x;  // within the tile
    bool inside;      // the grid
};

__device__ inline TilePosition position_of(const ConvTiles& tiles, const TilePlace& place, int number) {
    const int image = quotient(number, tiles.by_area), in_image = number - image * tiles.by_area.value;
    const int y = quotient(in_image, tiles.by_width), x = in_image - y * tiles.tile_width;
    return {image, y, x, image < place.images && y < place.height && x < place.width};
}

// One input that a tile reads, with its halo; numbered likewise.
struct TileInput {
    int image, row, column;  // within the tile
};

__device__ inline TileInput input_of(const ConvTiles& tiles, int number) {
    const int image = quotient(number, tiles.by_halo), in_image = number - image * tiles.by_halo.value;
    const int row = quotient(in_image, tiles.by_halo_width);
    return {image, row, in_image - row * tiles.halo_width};
}

// Calls `visit(row, channel)` for every row and every fourth channel below `padded`, at most kConvChunk: once a block.
// A row has as many items as the next power of two, so that a shift divides by them.
template <typename Visit>
__device__ inline void for_each_quad(int rows, int padded, const Visit& visit) {
    const int shift = padded <= 4 ? 0 : padded <= 8 ? 1 : padded <= 16 ? 2 : 3;
    for (int item = threadIdx.x; item < rows << shift; item += kConvThreads) {
        const int channel = (item & ((1 << shift) - 1)) * 4;
        if (channel < padded) visit(item >> shift, channel);
    }
}

// Where an input of the tile, with its halo, is in shared memory.
__device__ inline int offset_in_tile(const ConvMemory& memory, const ConvTiles& tiles, int image, int y, int x) {
    return (image * tiles.halo_height + y) * memory.pitch + x * memory.row;
}

__device__ inline int first_tile(const ConvTiles& tiles, int slice) { return slice * tiles.tiles_per_slice; }
__device__ inline int end_of_tiles(const ConvTiles& tiles, int slice) {
    return smaller_of(tiles.tiles, (slice + 1) * tiles.tiles_per_slice);
}

// ---- BatchNorm

struct NormOfChannel {
    float mean, inverse;
};

// Mean and 1 / sqrt(variance + eps) of a channel, from the slices' counts, means and squares, combined in slice order.
template <typename Stored>
__device__ inline NormOfChannel norm_of(const ConvLayer<Stored>& layer, std::int64_t task, int channel) {
    const float* partials = row_of(layer.statistics, task) + channel;
    const int filters = layer.block.filters;
    float count = 0.0f, sum = 0.0f;
#pragma unroll 4
    for (int slice = 0; slice < layer.statistics_slices; ++slice) {
        const float of_slice = load(partials + slice * 3 * filters);
        count += of_slice;
        sum += of_slice * load(partials + (slice * 3 + 1) * filters);
    }
    const float mean = sum / count;
    float squares = 0.0f;
#pragma unroll 4
    for (int slice = 0; slice < layer.statistics_slices; ++slice) {
        const float distance = load(partials + (slice * 3 + 1) * filters) - mean;
        squares += load(partials + (slice * 3 + 2) * filters);
        squares += load(partials + slice * 3 * filters) * distance * distance;
    }
    return {mean, 1.0f / sqrtf(squares / count + layer.block.eps)};
}

// The sum of one value per slice, in slice order.
__device__ inline float sum_of_slices(const float* partials, int slices, std::int64_t stride) {
    float sum = 0.0f;
#pragma unroll 4
    for (int slice = 0; slice < slices; ++slice) sum += load(partials + slice * stride);
    return sum;
}

// Max-pooling after BatchNorm: the first of equal values wins, and NaN beats every number, as in torch.
__device__ inline bool beats(float value, float best) { return value > best || value != value; }

// Whether ReLU passes y. It passes NaN, as in torch.
__device__ inline bool is_active(float y) { return !(y <= 0.0f); }

// kCount neighbouring channels of one position of a layer's activation, from its raw output.
template <int kCount, typename Stored>
struct Activated {
    Vector<float, kCount> values;
    Vector<std::uint8_t, kCount> choices;
};

// `norm` holds mean, gamma / sqrt(variance + eps) and beta of every channel, one array after the other.
template <int kCount, typename Stored>
__device__ inline Activated<kCount, Stored> activate(const ConvLayer<Stored>& layer, const Stored* raw, int image,
                                                     int y, int x, int channel, const Shared<float>& norm) {
    const ConvBlock& block = layer.block;
    const int filters = block.filters;
    Activated<kCount, Stored> result;
    float best[kCount];
    int winner[kCount];
    const std::int64_t first =
        ((std::int64_t{image} * block.height + y * block.window) * block.width + x * block.window) * filters + channel;
#pragma unroll
    for (int place = 0; place < 4; ++place) {
        if (place > 0 && block.window == 1) break;
        const std::int64_t at = first + (place / 2 * block.width + place % 2) * filters;
        const auto z = load_floats<kCount>(raw + at);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float scaled = (z.at[i] - norm.get(channel + i)) * norm.get(filters + channel + i);
            const float value = scaled + norm.get(2 * filters + channel + i);
            if (place == 0 || beats(value, best[i])) {
                best[i] = value;
                winner[i] = place;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const bool active = is_active(best[i]);
        result.values.at[i] = active ? best[i] : 0.0f;
        result.choices.at[i] = static_cast<std::uint8_t>(winner[i] + (active ? kConvActive : 0));
    }
    return result;
}

// Fills `norm` for `activate`; a barrier must follow.
template <typename Stored>
__device__ inline void prepare_activation(const ConvLayer<Stored>& layer, std::int64_t task, const float* weights,
                                          const Shared<float>& norm) {
    const int filters = layer.block.filters;
    for (int channel = threadIdx.x; channel < filters; channel += blockDim.x) {
        const NormOfChannel constants = norm_of(layer, task, channel);
        norm.set(channel, constants.mean);
        norm.set(filters + channel, load(weights + layer.gamma + channel) * constants.inverse);
        norm.set(2 * filters + channel, load(weights + layer.beta + channel));
    }
}

// kCount neighbouring channels of one position of a layer's raw gradient,
//   dz = gamma * r * (dy - dbeta / M - xhat * dgamma / M).
// `norm` holds mean, r, gamma * r, dbeta / M and dgamma / M of every channel, one array after the other.
template <int kCount, typename Stored>
__device__ inline Vector<float, kCount> raw_grad(const ConvLayer<Stored>& layer, std::int64_t task, int image, int y,
                                                 int x, int channel, const Shared<float>& norm) {
    const ConvBlock& block = layer.block;
    const int filters = block.filters;
    const std::int64_t at = ((std::int64_t{image} * block.height + y) * block.width + x) * filters + channel;
    const auto z = load_floats<kCount>(row_of(layer.raw, task) + at);
    Vector<float, kCount> dy{};
    const int window_y = y >> (block.window - 1), window_x = x >> (block.window - 1);
    if (window_y < block.act_height && window_x < block.act_width) {  // else pooling drops this position
        const std::int64_t window =
            ((std::int64_t{image} * block.act_height + window_y) * block.act_width + window_x) * filters + channel;
        const auto choices = load<std::uint8_t, kCount>(row_of(layer.choices, task) + window);
        const auto gradient = load_floats<kCount>(row_of(layer.activation_grad, task) + window);
        const int place = (y - window_y * block.window) * 2 + x - window_x * block.window;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            dy.at[i] = choices.at[i] == place + kConvActive ? gradient.at[i] : 0.0f;
        }
    }
    Vector<float, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const int c = channel + i;
        const float xhat = (z.at[i] - norm.get(c)) * norm.get(filters + c);
        const float inner = dy.at[i] - norm.get(3 * filters + c) - xhat * norm.get(4 * filters + c);
        result.at[i] = norm.get(2 * filters + c) * inner;
    }
    return result;
}

// Fills `norm` for `raw_grad`; a barrier must follow.
template <typename Stored>
__device__ inline void prepare_raw_grad(const ConvLayer<Stored>& layer, std::int64_t task, const float* weights,
                                        const Shared<float>& norm) {
    const int filters = layer.block.filters;
    const float count = static_cast<float>(layer.count * layer.block.height) * static_cast<float>(layer.block.width);
    for (int channel = threadIdx.x; channel < filters; channel += blockDim.x) {
        const NormOfChannel constants = norm_of(layer, task, channel);
        norm.set(channel, constants.mean);
        norm.set(filters + channel, constants.inverse);
        norm.set(2 * filters + channel, load(weights + layer.gamma + channel) * constants.inverse);
        const float* sums = row_of(layer.grad_sums, task) + channel;
        norm.set(3 * filters + channel, sum_of_slices(sums, layer.grad_sums_slices, 2 * filters) / count);
        norm.set(4 * filters + channel, sum_of_slices(sums + filters, layer.grad_sums_slices, 2 * filters) / count);
    }
}

// ---- products on tensor cores

// Thread blocks of kTilesN * 8 columns that a multiprocessor holds at once: as many as registers allow without
// spilling. In fp32 a thread also holds the sums of one step of the depth.
template <ConvPrecision kPrecision, int kTilesN>
inline constexpr int kConvBlocksResident = kTilesN == 8                                         ? 2
                                           : kTilesN == 4 && kPrecision == ConvPrecision::kFp32 ? 3
                                                                                                : 4;

template <ConvPrecision kPrecision>
inline constexpr int kConvDepth = kPrecision == ConvPrecision::kBf16 ? 16 : 8;

template <ConvPrecision kPrecision>
struct ConvStored {
    using Type = float;
};
template <>
struct ConvStored<ConvPrecision::kBf16> {
    using Type = std::uint16_t;
};

// A float as two TF32 numbers whose sum keeps 21 of its bits: one rounded, and the rest, which is exact until mma cuts
// it off. Three instructions instead of the seven that two conversions take, because they do not ask for NaN. A NaN
// that the first number loses to the carry is in the second.
struct Halves {
    std::uint32_t high, low;
};

__device__ inline Halves halves_of(float value) {
    constexpr std::uint32_t kKept = 0xffffe000u, kHalf = 0x1000u;  // the bits of a TF32 number; half of its last one
    const std::uint32_t high = (bits_of(value) + kHalf) & kKept;
    return {high, bits_of(value - float_of(high))};
}

// The same, or for kTf32 the number rounded, alone.
template <ConvPrecision kPrecision>
__device__ inline Halves operands_of(float value) {
    if constexpr (kPrecision == ConvPrecision::kFp32) {
        return halves_of(value);
    } else {
        return {tf32_operand(value), 0};
    }
}

// sums[i][j] += a_i b_j over kConvDepth of depth, for kM fragments of 16 rows and kN of 8 columns.
//   a(i, half, k): row lane / 4 + 8 * half of fragment i at depth k;   b(j, k): column lane / 4 of fragment j.
template <ConvPrecision kPrecision, int kM, int kN, typename A, typename B>
__device__ inline void multiply(float (&sums)[kM][kN][4], const A& a, const B& b) {
    const int member = lane() % 4;
    if constexpr (kPrecision == ConvPrecision::kBf16) {
        std::uint32_t rows[kM][4];
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            rows[i][0] = pack_bf16(a(i, 0, 2 * member), a(i, 0, 2 * member + 1));
            rows[i][1] = pack_bf16(a(i, 1, 2 * member), a(i, 1, 2 * member + 1));
            rows[i][2] = pack_bf16(a(i, 0, 2 * member + 8), a(i, 0, 2 * member + 9));
            rows[i][3] = pack_bf16(a(i, 1, 2 * member + 8), a(i, 1, 2 * member + 9));
        }
#pragma unroll
        for (int j = 0; j < kN; ++j) {
            const std::uint32_t columns[2] = {pack_bf16(b(j, 2 * member), b(j, 2 * member + 1)),
                                              pack_bf16(b(j, 2 * member + 8), b(j, 2 * member + 9))};
#pragma unroll
            for (int i = 0; i < kM; ++i) mma_m16n8k16_bf16(sums[i][j], rows[i], columns);
        }
    } else {
        std::uint32_t high[kM][4], low[kM][4];
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Halves halves = operands_of<kPrecision>(a(i, e % 2, member + e / 2 * 4));
                high[i][e] = halves.high;
                low[i][e] = halves.low;
            }
        }
#pragma unroll
        for (int j = 0; j < kN; ++j) {
            const Halves first = operands_of<kPrecision>(b(j, member)),
                         second = operands_of<kPrecision>(b(j, member + 4));
            const std::uint32_t columns[2] = {first.high, second.high}, rest[2] = {first.low, second.low};
#pragma unroll
            for (int i = 0; i < kM; ++i) {
                if constexpr (kPrecision == ConvPrecision::kFp32) {
                    // Tensor cores cut off what they add to a large sum, so the large sums are added up outside them.
                    // The small products come first: they would be lost in the large ones.
                    float of_step[4] = {};
                    mma_m16n8k8_tf32(of_step, low[i], columns);
                    mma_m16n8k8_tf32(of_step, high[i], rest);
                    mma_m16n8k8_tf32(of_step, high[i], columns);
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[i][j][e] += of_step[e];
                } else {
                    mma_m16n8k8_tf32(sums[i][j], high[i], columns);
                }
            }
        }
    }
}

// The sum of a fragment's column over its rows, i.e. over the eight lanes that share the column, in a fixed order.
__device__ inline float sum_over_rows(float value) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) value += shuffle_xor(value, distance);
    return value;
}

}  // namespace signmaml
