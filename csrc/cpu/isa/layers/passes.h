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
        const bool holds_input = block.source >= 0 || block.product == LayersProduct::kConv;
        clear_border(t, t.layout->block[i].in, block.in, holds_input ? t.layout->count : 0);
        clear_border(t, t.layout->block[i].made, block.made, t.layout->count);
    }
}

// scale: of a normalisation without one.
template <typename Scalar>
void start_with(const LayersTask<Scalar>& t, Scalar scale) {
    for (int i = 0; i < t.network->blocks; ++i) {
        const LayersBlock& block = t.network->block[i];
        const LayersBlockPlan& plan = t.layout->block[i];
        const std::int64_t lanes = plan.made.lanes, channels = block.made.channels;
        // Padding is written too: an earlier task may have left NaN there.
        const auto take = [&](Scalar* to, std::int32_t tensor, Scalar otherwise) {
            for (std::int64_t c = 0; c < lanes; ++c) {
                const Scalar* from = tensor >= 0 ? t.values[tensor] : nullptr;
                to[c] = c >= channels ? Scalar(0) : from != nullptr ? from[c] : otherwise;
            }
        };
        take(t.memory + plan.affine, block.scale, block.scale < 0 ? scale : Scalar(0));
        take(t.memory + plan.affine + lanes, block.shift, Scalar(0));
        take(t.memory + plan.bias, block.bias, Scalar(0));
        fill_zero(affine_grad(t, i, 0), 3 * lanes);
        if (block.product == LayersProduct::kConv) start_convolution(t, i);
    }
}

template <typename Scalar>
void start(const LayersTask<Scalar>& t) {
    start_with(t, Scalar(1));
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

template <typename Scalar>
void add_rows(Scalar* to, std::int64_t to_row, const Scalar* from, std::int64_t from_row, std::int64_t rows,
              std::int64_t length) {
    for (std::int64_t y = 0; y < rows; ++y) {
        for (std::int64_t i = 0; i < length; ++i) to[y * to_row + i] += from[y * from_row + i];
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
    if (block.source < 0) return {t.x, features};
    if (plan.features < 0) return {t.memory + plan.in.place, plan.in.image};
    return {t.memory + plan.features, features};
}

template <typename Scalar>
void flatten_examples(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    if (plan.features < 0) return;
    const std::int64_t size = layers_features_of(block.in);
    for (std::int64_t e = 0; e < t.count; ++e) {
        give_image(t.memory + plan.features + e * size, image_of(t, plan.in, e), plan.in.row, plan.in.lanes, block.in);
    }
}

// made += what a linear layer makes of x
template <typename Scalar>
void add_linear(const LayersTask<Scalar>& t, int i, const Features<Scalar>& x, const Scalar* weight) {
    const LayersBlock& block = t.network->block[i];
    const LayersImages& made = t.layout->block[i].made;
    linear_forward(t.memory + made.place, x.first, weight,
                   {t.count, layers_features_of(block.in), block.made.channels, x.row, made.image});
}

// made <- the input of an example, where a block has no product
template <typename Scalar>
void copy_input(const LayersTask<Scalar>& t, int i, std::int64_t example) {
    const LayersSize& size = t.network->block[i].in;
    const LayersImages &in = t.layout->block[i].in, &made = t.layout->block[i].made;
    copy_rows(image_of(t, made, example), made.row, image_of(t, in, example), in.row, size.height,
              size.width * in.lanes);
}

// made += the second summand of an example
template <typename Scalar>
void add_second(const LayersTask<Scalar>& t, int i, std::int64_t example) {
    const LayersBlock& block = t.network->block[i];
    const LayersImages &made = t.layout->block[i].made, &from = output_of(t, block.added);
    add_rows(image_of(t, made, example), made.row, image_of(t, from, example), from.row, block.made.height,
             block.made.width * made.lanes);
}

template <typename Scalar>
void make_product(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const std::int64_t size = layers_features_of(block.in);
    if (block.product == LayersProduct::kConv) {
        for (std::int64_t e = 0; block.source < 0 && e < t.count; ++e) {
            take_image(image_of(t, plan.in, e), plan.in.row, plan.in.lanes, t.x + e * size, block.in);
        }
        convolve_examples(t, i, memories_of(t), 0, t.count, /*add=*/false);
        return;
    }
    if (block.product == LayersProduct::kLinear) {
        flatten_examples(t, i);
        fill_zero(t.memory + plan.made.place, t.count * plan.made.image);
        add_linear(t, i, features_of(t, i), t.values[block.weight]);
        return;
    }
    for (std::int64_t e = 0; e < t.count; ++e) {
        if (block.source < 0) {
            Scalar* made = image_of(t, plan.made, e);
            fill_zero(made, plan.made.image);
            take_image(made, plan.made.row, plan.made.lanes, t.x + e * size, block.in);
        } else {
            copy_input(t, i, e);
        }
        if (block.product == LayersProduct::kSum) add_second(t, i, e);
    }
}

// Copies a block's output to those of its readers that have a place of their own for it.
template <typename Scalar>
void hand_on(const LayersTask<Scalar>& t, int i) {
    const LayersSize& size = t.network->block[i].out;
    const LayersImages& from = output_of(t, i);
    for (int reader = i + 1; reader < t.network->blocks; ++reader) {
        const LayersImages& to = t.layout->block[reader].in;
        if (t.network->block[reader].source != i || to.place == from.place) continue;
        for (std::int64_t e = 0; e < t.count; ++e) {
            copy_rows(image_of(t, to, e), to.row, image_of(t, from, e), from.row, size.height, size.width * to.lanes);
        }
    }
}

// Multiplies the image of an example, or its gradient, by the factors of a block's dropout, which are in torch's order.
template <typename Scalar>
void drop(const LayersTask<Scalar>& t, int i, Scalar* image, std::int64_t row, std::int64_t lanes,
          std::int64_t example) {
    const LayersBlock& block = t.network->block[i];
    const LayersSize& size = block.out;
    const bool of_channels = block.dropout == LayersDropout::kChannels;
    const std::int64_t positions = std::int64_t{size.height} * size.width;
    const Scalar* noise = t.noise[i] + example * size.channels * (of_channels ? 1 : positions);
    for (std::int64_t y = 0; y < size.height; ++y) {
        for (std::int64_t x = 0; x < size.width; ++x) {
            Scalar* at = image + y * row + x * lanes;
            const Scalar* from = of_channels ? noise : noise + y * size.width + x;
            const std::int64_t step = of_channels ? 1 : positions;
            for (std::int64_t c = 0; c < size.channels; ++c) at[c] *= from[c * step];
        }
    }
}

template <typename Scalar>
void drop_outputs(const LayersTask<Scalar>& t, int i) {
    if (t.network->block[i].dropout == LayersDropout::kNone) return;
    const LayersImages& to = output_of(t, i);
    for (std::int64_t e = 0; e < t.count; ++e) drop(t, i, image_of(t, to, e), to.row, to.lanes, e);
}

template <typename Scalar>
void drop_output_grads(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    if (block.dropout == LayersDropout::kNone) return;
    const std::int64_t lanes = t.layout->block[i].made.lanes, row = block.out.width * lanes;
    for (std::int64_t e = 0; e < t.count; ++e) {
        drop(t, i, output_grad(t, i) + e * block.out.height * row, row, lanes, e);
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
        drop_outputs(t, i);
        hand_on(t, i);
    }
}

// (+)= the gradient of a linear layer's weight, from those of what it makes, laid out as `made`.
template <typename Scalar>
void linear_weight_grad(const LayersTask<Scalar>& t, int i, const Scalar* grads, const Features<Scalar>& x, bool add) {
    const LayersBlock& block = t.network->block[i];
    const std::int64_t size = layers_features_of(block.in);
    outer<Scalar>({t.grads[block.weight], size, grads, 1, t.layout->block[i].made.image, x.first, x.row,
                   block.made.channels, t.count, size, add});
}

// (+)= the gradient of a linear layer's input, as features. Where those are images, no other block reads them: the
// bindings see to that, so nothing was there before.
template <typename Scalar>
void linear_input_grad(const LayersTask<Scalar>& t, int i, const Scalar* grads, const Scalar* weight, bool add) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    const std::int64_t size = layers_features_of(block.in);
    const bool apart = plan.feature_grads >= 0;
    Scalar* to = apart ? t.memory + plan.feature_grads : input_grad(t, i);
    if (!apart && !add) fill_zero(to, t.count * plan.in.lanes);  // lanes beyond the channels
    outer<Scalar>({to, apart ? size : plan.in.lanes, grads, plan.made.image, 1, weight, size, t.count,
                   block.made.channels, size, add});
}

// Features to images, where a linear layer reads images.
template <typename Scalar>
void give_linear_input_grad(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    const LayersBlockPlan& plan = t.layout->block[i];
    if (plan.feature_grads < 0) return;
    const std::int64_t lanes = plan.in.lanes, image = std::int64_t{block.in.height} * block.in.width * lanes;
    const std::int64_t size = layers_features_of(block.in);
    Scalar* to = input_grad(t, i);
    fill_zero(to, t.count * image);  // lanes beyond the channels
    for (std::int64_t e = 0; e < t.count; ++e) {
        take_image(to + e * image, block.in.width * lanes, lanes, t.memory + plan.feature_grads + e * size, block.in);
    }
}

template <typename Scalar>
void linear_backward(const LayersTask<Scalar>& t, int i) {
    const std::int32_t weight = t.network->block[i].weight;
    const Scalar* grads = t.memory + t.layout->block[i].made.place;
    if (wants(t, weight)) linear_weight_grad(t, i, grads, features_of(t, i), t.adds);
    if (!wants_input_grad(t, i)) return;
    linear_input_grad(t, i, grads, t.values[weight], adds_to_input_grad(t, i));
    give_linear_input_grad(t, i);
}

// The gradient of another block's output (+)= that of what is made, which is a copy of it or a sum with it.
template <typename Scalar>
void copy_grads(const LayersTask<Scalar>& t, int i, int other, bool add) {
    if (!wants_output_grad(t, other)) return;
    const LayersSize& size = t.network->block[i].in;
    const LayersImages& made = t.layout->block[i].made;
    const std::int64_t row = size.width * made.lanes;
    const auto put = add ? add_rows<Scalar> : copy_rows<Scalar>;
    for (std::int64_t e = 0; e < t.count; ++e) {
        put(output_grad(t, other) + e * size.height * row, row, image_of(t, made, e), made.row, size.height, row);
    }
}

// The gradients of what a block reads that has no weight.
template <typename Scalar>
void copy_back(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    copy_grads(t, i, block.source, adds_to_input_grad(t, i));
    if (block.product != LayersProduct::kSum) return;
    copy_grads(t, i, block.added, block.added == block.source || adds_to_grad(t, i, block.added));
}

// Whether the gradient of what a block makes is wanted.
template <typename Scalar>
bool goes_on(const LayersTask<Scalar>& t, int i) {
    const LayersBlock& block = t.network->block[i];
    return wants(t, block.weight) || wants_input_grad(t, i) ||
           (block.product == LayersProduct::kSum && wants_output_grad(t, block.added));
}

// A few small images share the weights that are read; of a large one the gradient is in L2 while it is used.
inline std::int64_t examples_at_once(const LayersBlock& block) {
    return most(1, kConvOuterTiles / (pieces(block.made.height, 2) * pieces(block.made.width, 2)));
}

template <typename Scalar>
void backward(const LayersTask<Scalar>& t) {
    for (int i = t.network->blocks - 1; i >= t.lowest; --i) {
        const LayersBlock& block = t.network->block[i];
        const LayersBlockPlan& plan = t.layout->block[i];
        drop_output_grads(t, i);
        if (block.norm != LayersNorm::kNone || wants(t, block.bias)) {
            for (std::int64_t e = 0; e < t.count; ++e) sum_grads(t, i, e);
            set_slopes(t, i);
        }
        if (!goes_on(t, i)) continue;
        const std::int64_t at_once = examples_at_once(block);
        for (std::int64_t first = 0; first < t.count; first += at_once) {
            const std::int64_t last = least(first + at_once, t.count);
            for (std::int64_t e = first; e < last; ++e) make_grad(t, i, e);
            if (block.product != LayersProduct::kConv) continue;
            if (wants(t, block.weight)) add_weight_grad(t, i, memories_of(t), first, last);
            if (!wants_input_grad(t, i)) continue;
            const std::int64_t image = std::int64_t{block.in.height} * block.in.width * plan.in.lanes;
            convolve_back(t, i, memories_of(t), first, last, input_grad(t, i) + first * image,
                          adds_to_input_grad(t, i));
        }
        if (block.product == LayersProduct::kLinear) linear_backward(t, i);
        if (block.product == LayersProduct::kNone || block.product == LayersProduct::kSum) copy_back(t, i);
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
