// Between tensors in torch's order and the packed, padded and transformed ones that the stages read.
#pragma once

#include <cstdint>

#include "cpu/isa/conv/first_block.h"
#include "cpu/isa/conv/shared_products.h"
#include "cpu/isa/conv/winograd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

template <typename Scalar>
void pack_image(const ConvTask<Scalar>& t, const Scalar* x, std::int64_t example) {
    const std::int64_t h = t.shape->height, w = t.shape->width, c = t.shape->channels;
    Scalar* image = t.at(t.layout->images) + example * (h + 2) * (w + 2) * c;
    for (std::int64_t channel = 0; channel < c; ++channel) {
        for (std::int64_t y = 0; y < h; ++y) {
            const Scalar* from = x + (channel * h + y) * w;
            Scalar* to = image + ((y + 1) * (w + 2) + 1) * c + channel;
            for (std::int64_t i = 0; i < w; ++i) to[i * c] = from[i];
        }
    }
}

// Where, in packed weights, the vector from output `out` on lies for value q of theta's [filters, inputs * 9].
inline std::int64_t packed_place(const ConvBlockPlan& b, std::int64_t group, std::int64_t out, std::int64_t q) {
    return (out / group * 9 + q % 9) * b.inputs * group + q / 9 * group + out % group;
}

// Writes the padding too: an earlier task may have left NaN there.
template <typename Scalar>
void pack_weights(const ConvTask<Scalar>& t, int block, const Scalar* theta) {
    constexpr int kL = kLanes<Scalar>;
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t filters = t.shape->filters, group = b.vectors * kL, length = 9 * std::int64_t{b.inputs};
    Scalar* to = t.at(b.weight);
    for (std::int64_t out = 0; out < t.layout->channels; out += kL) {
        const Scalar* from = theta + out * length;
        std::int64_t q = 0;
        for (; q + kL <= length; q += kL) {
            Vector<Scalar> rows[kL];
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) {
                rows[i] = out + i < filters ? load_loose(from + i * length + q) : Vector<Scalar>{};
            }
            transpose<Simd<Scalar>>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) store(to + packed_place(b, group, out, q + i), rows[i]);
        }
        for (; q < length; ++q) {
            Scalar* row = to + packed_place(b, group, out, q);
            for (int i = 0; i < kL; ++i) row[i] = out + i < filters ? from[i * length + q] : Scalar(0);
        }
    }
}

template <typename Scalar>
void unpack_weights(const ConvTask<Scalar>& t, int block, const Scalar* packed, Scalar* theta) {
    constexpr int kL = kLanes<Scalar>;
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t filters = t.shape->filters, group = b.vectors * kL, length = 9 * std::int64_t{b.inputs};
    for (std::int64_t out = 0; out < t.layout->channels; out += kL) {
        Scalar* to = theta + out * length;
        std::int64_t q = 0;
        for (; q + kL <= length; q += kL) {
            Vector<Scalar> rows[kL];
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) rows[i] = load(packed + packed_place(b, group, out, q + i));
            transpose<Simd<Scalar>>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < kL; ++i) {
                if (out + i < filters) store_loose(to + i * length + q, rows[i]);
            }
        }
        for (; q < length; ++q) {
            const Scalar* row = packed + packed_place(b, group, out, q);
            for (int i = 0; i < kL && out + i < filters; ++i) to[i * length + q] = row[i];
        }
    }
}

template <typename Scalar>
void pack_back(const ConvTask<Scalar>& t, int block) {
    constexpr int kL = kLanes<Scalar>;
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t filters = t.shape->filters, channels = t.layout->channels;
    const std::int64_t group = b.vectors * kL, group_back = b.vectors_back * kL;
    for (std::int64_t tap = 0; tap < 9; ++tap) {
        for (std::int64_t out = 0; out < channels; out += kL) {
            const Scalar* from = t.at(b.weight) + (out / group * 9 + 8 - tap) * filters * group + out % group;
            for (std::int64_t in = 0; in < channels; in += kL) {  // these become outputs; those beyond filters are 0
                Vector<Scalar> rows[kL];
#pragma GCC unroll 16
                for (int i = 0; i < kL; ++i) {
                    rows[i] = in + i < filters ? load(from + (in + i) * group) : Vector<Scalar>{};
                }
                transpose<Simd<Scalar>>(rows);
                Scalar* to = t.at(t.layout->weight_back) + ((in / group_back * 9 + tap) * filters + out) * group_back +
                             in % group_back;
#pragma GCC unroll 16
                for (int i = 0; i < kL; ++i) {
                    if (out + i < filters) store(to + i * group_back, rows[i]);
                }
            }
        }
    }
}

template <typename Scalar>
void transform_weights(const ConvTask<Scalar>& t, int block, bool back) {
    if (block == 0) return transform_first(t);
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t group = (back ? b.vectors_back : b.vectors) * kLanes<Scalar>;
    const Scalar* weight = t.at(back ? t.layout->weight_back : b.weight);
    if (b.winograd) {
        transform_kernels(t.at(t.layout->transformed), weight, t.shape->filters, t.layout->channels, group);
    } else if (b.shared && (shares_products(b.out_h) || shares_products(b.out_w))) {
        mix_weights(t.at(t.layout->transformed), weight, t.shape->filters, t.layout->channels, group);
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
