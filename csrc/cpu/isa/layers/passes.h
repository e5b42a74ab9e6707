// The passes of a program of blocks, for one task and some of its examples.
#pragma once

#include <cstdint>

#include "cpu/isa/layers/convolution.h"
#include "cpu/isa/layers/linear.h"
#include "cpu/isa/layers/tail.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

template <typename Scalar>
void clear_border(const LayersTask<Scalar>& t, const LayersImages& images, const LayersSize& size, std::int64_t n) {
    const LayersBorder& border = images.border;
    const std::int64_t width = size.width * images.lanes;
    Scalar* at = t.memory + images.place;
    for (std::int64_t example = 0; example < n; ++example, at += images.image) {
        fill_zero(at, border.top * images.row);
        for (std::int64_t y = 0; y < size.height; ++y) {
            Scalar* row = at + (border.top + y) * images.row;
            fill_zero(row, border.left * images.lanes);
            fill_zero(row + border.left * images.lanes + width, border.right * images.lanes);
        }
        fill_zero(at + (border.top + size.height) * images.row, border.bottom * images.row);
    }
    fill_zero(at, images.row + 2 * images.lanes);  // what F(2x2, 3x3) reads past the last image
}

template <typename Scalar>
void clear_borders(const LayersTask<Scalar>& t) {
    for (int i = 0; i < t.network->blocks; ++i) {
        const LayersBlock& block = t.network->block[i];
        const bool holds_input = i > 0 || block.product == LayersProduct::kConv;
        clear_border(t, t.layout->block[i].in, block.in, holds_input ? t.layout->count : 0);
        clear_border(t, t.layout->block[i].made, block.made, t.layout->count);
    }
}

template <typename Scalar>
void start(const LayersTask<Scalar>& t) {
    for (int i = 0; i < t.network->blocks; ++i) {
        const LayersBlock& block = t.network->block[i];
        const LayersBlockPlan& plan = t.layout->block[i];
        const std::int64_t lanes = plan.made.lanes, channels = block.made.channels;
        // Padding is written too: an earlier task may have left NaN there.
        const auto take = [&](Scalar* to, std::int32_t tensor, Scalar otherwise) {
            for (std::int64_t c = 0; c < lanes; ++c) {
                to[c] = c >= channels ? Scalar(0) : tensor >= 0 ? t.values[tensor][c] : otherwise;
            }
        };
        take(t.memory + plan.affine, block.scale, Scalar(1));
        take(t.memory + plan.affine + lanes, block.shift, Scalar(0));
        take(t.memory + plan.bias, block.bias, Scalar(0));
        fill_zero(affine_grad(t, i, 0), 3 * lanes);
        if (block.product == LayersProduct::kConv) start_convolution(t, i);
        if (block.product == LayersProduct::kLinear && wants(t, block.weight)) {
            fill_zero(t.grads[block.weight], channels * layers_features_of(block.in));
        }
    }
}

// An example in torch's order, [channels, height, width], to positions of channels.
template <typename Scalar>
void take_image(Scalar* to, std::int64_t to_row, std::int64_t lanes, const Scalar* x, const LayersSize& size) {
    for (std::int64_t c = 0; c < size.channels; ++c) {
        for (std::int64_t y = 0; y < size.height; ++y) {
            const Scalar* from = x + (c * size.height + y) * size.width;
            Scalar* at = to + y * to_row + c;
            for (std::int64_t i = 0; i < size.width; ++i) at[i * lanes] = from[i];
        }
    }
}

// The other way.
template <typename Scalar>
void give_image(Scalar* x, const Scalar* from, std::int64_t from_row, std::int64_t lanes, const LayersSize& size) {
    for (std::int64_t c = 0; c < size.channels; ++c) {
        for (std::int64_t y = 0; y < size.height; ++y) {
            const Scalar* at = from + y * from_row + c;
            Scalar* to = x + (c * size.height + y) * size.width;
            for (std::int64_t i = 0; i < size.width; ++i) to[i] = at[i * lanes];
        }
    }
}

template <typename Scalar>
void copy_rows(Scalar* to, std::int64_t to_row, const Scalar* from, std::int64_t from_row, std::int64_t rows,
               std::int64_t length) {
    for (std::int64_t y = 0; y < rows; ++y) {
        for (std::int64_t i = 0; i < length; ++i) to[y * to_row + i] = from[y * from_row + i];
    }
}

// What a linear layer reads, [count, features], and how many scalars lie between two examples.
template <typename Scalar>
struct Features {
    const Scalar* first;
    std::int64_t row;
};

template <typename Scalar>
Features<Scalar> features_of(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const std::int64_t features = layers_features_of(block.in);
    if (i == 0) return {t.x, features};
    if (plan.features < 0) return {t.memory + plan.in.place, plan.in.image};
    return {t.memory + plan.features, features};
}

template <typename Scalar>
void make_product(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const std::int64_t size = layers_features_of(block.in);
    if (block.product == LayersProduct::kConv) {
        for (std::int64_t e = 0; i == 0 && e < t.count; ++e) {
            take_image(image_of(t, plan.in, e), plan.in.row, plan.in.lanes, t.x + e * size, block.in);
        }
        convolve_examples(t, i, 0, t.count);
        return;
    }
    if (block.product == LayersProduct::kLinear) {
        if (plan.features >= 0) {
            for (std::int64_t e = 0; e < t.count; ++e) {
                give_image(t.memory + plan.features + e * size, image_of(t, plan.in, e), plan.in.row, plan.in.lanes,
                           block.in);
            }
        }
        const Features<Scalar> x = features_of(t, i);
        Scalar* made = t.memory + plan.made.place;
        fill_zero(made, t.count * plan.made.image);  // lanes beyond the outputs
        linear_forward(made, x.first, t.values[block.weight],
                       {t.count, size, block.made.channels, x.row, plan.made.image});
        return;
    }
    for (std::int64_t e = 0; e < t.count; ++e) {
        Scalar* made = image_of(t, plan.made, e);
        if (i == 0) {
            fill_zero(made, plan.made.image);
            take_image(made, plan.made.row, plan.made.lanes, t.x + e * size, block.in);
        } else {
            copy_rows(made, plan.made.row, image_of(t, plan.in, e), plan.in.row, block.in.height,
                      block.in.width * plan.in.lanes);
        }
    }
}

template <typename Scalar>
void forward(const LayersTask<Scalar>& t) {
    for (int i = 0; i < t.network->blocks; ++i) {
        make_product(t, i);
        if (t.network->block[i].norm != LayersNorm::kNone) {
            for (std::int64_t e = 0; e < t.count; ++e) measure_example(t, i, e);
        }
        set_cells(t, i);
        for (std::int64_t e = 0; e < t.count; ++e) finish_example(t, i, e);
    }
}

// From the gradient of `made` to that of the weight and of the block's input.
template <typename Scalar>
void linear_backward(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const std::int64_t size = layers_features_of(block.in), outputs = block.made.channels;
    const Scalar* grads = t.memory + plan.made.place;
    if (wants(t, block.weight)) {
        const Features<Scalar> x = features_of(t, i);
        outer<Scalar>({t.grads[block.weight], size, grads, 1, plan.made.image, x.first, x.row, outputs, t.count, size,
                       /*add=*/true});
    }
    if (i <= t.lowest) return;
    Scalar* to = output_grad(t, i - 1);
    const std::int64_t lanes = plan.in.lanes, positions = std::int64_t{block.in.height} * block.in.width;
    Scalar* of_features = plan.feature_grads < 0 ? to : t.memory + plan.feature_grads;
    fill_zero(to, t.count * positions * lanes);  // lanes beyond the channels
    outer<Scalar>({of_features, plan.feature_grads < 0 ? lanes : size, grads, plan.made.image, 1,
                   t.values[block.weight], size, t.count, outputs, size, /*add=*/false});
    if (plan.feature_grads < 0) return;
    for (std::int64_t e = 0; e < t.count; ++e) {
        take_image(to + e * positions * lanes, block.in.width * lanes, lanes, of_features + e * size, block.in);
    }
}

template <typename Scalar>
void backward(const LayersTask<Scalar>& t) {
    for (int i = t.network->blocks - 1; i >= t.lowest; --i) {
        const LayersBlock& block = t.network->block[i];
        const LayersBlockPlan& plan = t.layout->block[i];
        if (block.norm != LayersNorm::kNone || wants(t, block.bias)) {
            for (std::int64_t e = 0; e < t.count; ++e) sum_grads(t, i, e);
            set_slopes(t, i);
        }
        const bool goes_on = wants(t, block.weight) || i > t.lowest;
        if (!goes_on) continue;
        // A few small images share the weights that are read; of a large one the gradient is in L2 while it is used.
        const std::int64_t tiles = pieces(block.made.height, 2) * pieces(block.made.width, 2);
        const std::int64_t at_once = most(1, kConvOuterTiles / tiles);
        for (std::int64_t first = 0; first < t.count; first += at_once) {
            const std::int64_t last = least(first + at_once, t.count);
            for (std::int64_t e = first; e < last; ++e) make_grad(t, i, e);
            if (block.product != LayersProduct::kConv) continue;
            if (wants(t, block.weight)) add_weight_grad(t, i, first, last);
            if (i <= t.lowest) continue;
            const std::int64_t image = std::int64_t{block.in.height} * block.in.width * plan.in.lanes;
            convolve_back(t, i, first, last, output_grad(t, i - 1) + first * image);
        }
        if (block.product == LayersProduct::kLinear) linear_backward(t, i);
        if (block.product == LayersProduct::kNone && i > t.lowest) {
            const std::int64_t row = block.in.width * plan.in.lanes;
            for (std::int64_t e = 0; e < t.count; ++e) {
                copy_rows(output_grad(t, i - 1) + e * block.in.height * row, row, image_of(t, plan.made, e),
                          plan.made.row, block.in.height, row);
            }
        }
    }
}

template <typename Scalar>
void finish(const LayersTask<Scalar>& t) {
    for (int i = t.lowest; i < t.network->blocks; ++i) {
        const LayersBlock& block = t.network->block[i];
        const LayersBlockPlan& plan = t.layout->block[i];
        if (block.product == LayersProduct::kConv && wants(t, block.weight)) {
            if (plan.winograd_back) join_weight_grad(t, i);
            unpack_weight(t.grads[block.weight], t.memory + plan.weight_grad, block, plan);
        }
        const std::int32_t tensors[] = {block.scale, block.shift, block.bias};
        for (int which = 0; which < 3; ++which) {
            if (!wants(t, tensors[which])) continue;
            for (std::int64_t c = 0; c < block.made.channels; ++c) {
                t.grads[tensors[which]][c] = static_cast<Scalar>(affine_grad(t, i, which)[c]);
            }
        }
    }
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
