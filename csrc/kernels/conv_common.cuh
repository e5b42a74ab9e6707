// Shared by the convolution kernels: stored numbers, tiles of positions, BatchNorm's constants.
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

// The floats of a block's shared memory from one place to another.
__device__ inline Shared<float> in_floats(int first, int end) { return Shared<float>(first * 4, end - first); }

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

// Of some values of a channel.
struct Statistics {
    float count, mean, squares;  // `squares` around the mean
};

// Of several sets together, in their order; get(i) gives those of set i.
template <typename Get>
__device__ inline Statistics joined(int sets, const Get& get) {
    Statistics all{};
#pragma unroll 4
    for (int i = 0; i < sets; ++i) {
        const Statistics one = get(i);
        all.count += one.count;
        all.mean += one.count * one.mean;
    }
    if (all.count > 0.0f) all.mean /= all.count;
#pragma unroll 4
    for (int i = 0; i < sets; ++i) {
        const Statistics one = get(i);
        const float distance = one.mean - all.mean;
        all.squares += one.squares;
        all.squares += one.count * distance * distance;
    }
    return all;
}

__device__ inline NormOfChannel norm_from(const Statistics& all, float eps) {
    return {all.mean, 1.0f / sqrtf(all.squares / all.count + eps)};
}

// Of slices first, first + step, ... of a channel.
template <typename Stored>
__device__ inline Statistics statistics_of(const ConvLayer<Stored>& layer, std::int64_t task, int channel, int first,
                                           int step) {
    const int filters = layer.block.filters;
    const float* partials = row_of(layer.statistics, task) + first * 3 * filters + channel;
    return joined((layer.statistics_slices - first + step - 1) / step, [&](int i) -> Statistics {
        const float* of_slice = partials + i * step * 3 * filters;
        return {load(of_slice), load(of_slice + filters), load(of_slice + 2 * filters)};
    });
}

// Mean and 1 / sqrt(variance + eps) of a channel, from all slices.
template <typename Stored>
__device__ inline NormOfChannel norm_of(const ConvLayer<Stored>& layer, std::int64_t task, int channel) {
    return norm_from(statistics_of(layer, task, channel, 0, 1), layer.block.eps);
}

// The sum of one value per slice, in slice order.
__device__ inline float sum_of_slices(const float* partials, int slices, std::int64_t stride) {
    float sum = 0.0f;
#pragma unroll 4
    for (int slice = 0; slice < slices; ++slice) sum += load(partials + slice * stride);
    return sum;
}

// The gradient of beta of a channel or, with `which` 1, of gamma, from slices first, first + step, ...
template <typename Stored>
__device__ inline float grad_sum_of(const ConvLayer<Stored>& layer, std::int64_t task, int channel, int which,
                                    int first, int step) {
    const int of_slice = 2 * layer.block.filters;
    const float* sums = row_of(layer.grad_sums, task) + first * of_slice + which * layer.block.filters + channel;
    return sum_of_slices(sums, (layer.grad_sums_slices - first + step - 1) / step, step * of_slice);
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

// A thread's part of the slices of all channels, where a whole block adds them up: a long loop of loads in one thread
// per channel would take longer than many a tile.
struct PartOfSlices {
    static constexpr int kMost = 8;
    int parts, part, channel;

    __device__ explicit PartOfSlices(int filters)
        : parts(smaller_of(kMost, static_cast<int>(blockDim.x) / filters)),
          part(static_cast<int>(threadIdx.x) / filters),
          channel(static_cast<int>(threadIdx.x) - part * filters) {}
    __device__ bool works() const { return part < parts; }
};

// The threads' parts of a layer's statistics, in shared memory.
template <typename Stored>
class SharedStatistics {
  public:
    // Each thread stores its part; a barrier must follow. `memory` has three floats a part and filter.
    __device__ SharedStatistics(const ConvLayer<Stored>& layer, std::int64_t task, const Shared<float>& memory)
        : memory_(memory), filters_(layer.block.filters), eps_(layer.block.eps) {
        const PartOfSlices own(filters_);
        parts_ = own.parts;
        if (!own.works()) return;
        const Statistics of_part = statistics_of(layer, task, own.channel, own.part, own.parts);
        const int at = own.part * 3 * filters_ + own.channel;
        memory_.set(at, of_part.count);
        memory_.set(at + filters_, of_part.mean);
        memory_.set(at + 2 * filters_, of_part.squares);
    }

    __device__ NormOfChannel norm(int channel) const {
        const auto of_part = [&](int part) -> Statistics {
            const int at = part * 3 * filters_ + channel;
            return {memory_.get(at), memory_.get(at + filters_), memory_.get(at + 2 * filters_)};
        };
        return norm_from(joined(parts_, of_part), eps_);
    }

  private:
    Shared<float> memory_;
    int filters_, parts_;
    float eps_;
};

// Fills `norm` for `activate`; a barrier must follow. norm_of_channel(channel) gives the layer's constants.
template <typename Stored, typename Norm>
__device__ inline void prepare_activation(const ConvLayer<Stored>& layer, const float* weights,
                                          const Shared<float>& norm, const Norm& norm_of_channel) {
    const int filters = layer.block.filters;
    for (int channel = threadIdx.x; channel < filters; channel += blockDim.x) {
        const NormOfChannel constants = norm_of_channel(channel);
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

// Fills `norm` for `raw_grad`; a barrier must follow. norm_of_channel(channel) gives the layer's constants, and
// grad_sum(channel, which) its gradient of beta or, with 1, of gamma.
template <typename Stored, typename Norm, typename Sum>
__device__ inline void prepare_raw_grad(const ConvLayer<Stored>& layer, const float* weights, const Shared<float>& norm,
                                        const Norm& norm_of_channel, const Sum& grad_sum) {
    const int filters = layer.block.filters;
    const float count = static_cast<float>(layer.count * layer.block.height) * static_cast<float>(layer.block.width);
    for (int channel = threadIdx.x; channel < filters; channel += blockDim.x) {
        const NormOfChannel constants = norm_of_channel(channel);
        norm.set(channel, constants.mean);
        norm.set(filters + channel, constants.inverse);
        norm.set(2 * filters + channel, load(weights + layer.gamma + channel) * constants.inverse);
        norm.set(3 * filters + channel, grad_sum(channel, 0) / count);
        norm.set(4 * filters + channel, grad_sum(channel, 1) / count);
    }
}

template <ConvPrecision kPrecision>
struct ConvStored {
    using Type = float;
};
template <>
struct ConvStored<ConvPrecision::kBf16> {
    using Type = std::uint16_t;
};

}  // namespace signmaml
