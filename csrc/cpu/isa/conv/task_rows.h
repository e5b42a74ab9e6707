// Where the rows of a task's tensors lie in its memory. plan/conv_meta_step_cpu.h has the layout.
#pragma once

#include <cstdint>

#include "cpu/conv_table.h"
#include "cpu/isa/integers.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

// The rows of a block that one item covers.
struct Rows {
    std::int64_t example, first, count;
};

inline Rows rows_of(std::int64_t item, std::int64_t items, std::int64_t rows, std::int64_t height) {
    const std::int64_t first = item % items * rows;
    return {item / items, first, least(rows, height - first)};
}

template <typename Scalar>
inline Rows raw_rows(const ConvTask<Scalar>& t, int block, std::int64_t item) {
    const ConvBlockPlan& b = t.block(block);
    return rows_of(item, b.items, b.rows, b.out_h);
}

// Where, in a block's input, the window of position 0 of output row `y` starts.
template <typename Scalar>
const Scalar* input_row(const ConvTask<Scalar>& t, int block, std::int64_t example, std::int64_t y) {
    const ConvBlockPlan& b = t.block(block);
    const Scalar* base = t.at(block == 0 ? t.layout->images : t.block(block - 1).activation);
    const std::int64_t row = (b.in_w + 2) * std::int64_t{b.input_lanes};
    if (block > 0) example -= t.held[block - 1];
    return base + (example * (b.in_h + 2) + y * b.stride) * row;
}

// Row `y` of an example of a block's raw values, inside its border.
template <typename Scalar>
Scalar* raw_row(const ConvTask<Scalar>& t, int block, std::int64_t example, std::int64_t y) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, row = (b.out_w + 2) * channels;
    return t.at(b.raw) + (example * (b.out_h + 2) + y + 1) * row + channels;
}

// Row `y` of an example of a block's activation, inside its border.
template <typename Scalar>
Scalar* activation_row(const ConvTask<Scalar>& t, int block, std::int64_t example, std::int64_t y) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels, row = (b.act_w + 2 * b.pad) * channels;
    return t.at(b.activation) + ((example - t.held[block]) * (b.act_h + 2 * b.pad) + y + b.pad) * row +
           b.pad * channels;
}

// Row `y` of an example of the gradient of a block's activation.
template <typename Scalar>
Scalar* activation_grad_row(const ConvTask<Scalar>& t, int block, std::int64_t example, std::int64_t y,
                            Scalar* scratch) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t row = b.act_w * std::int64_t{t.layout->channels};
    if (block == 0 && t.layout->first_grad_in_scratch) return scratch + y % b.act_rows * row;
    return t.at(t.layout->activation_grad) + (example * b.act_h + y) * row;
}

// Where block 0's gradient of `item` lies in scratch, if it stays there, while the items from `first` on are at hand.
template <typename Scalar>
Scalar* grad_in_scratch(const ConvTask<Scalar>& t, std::int64_t item, std::int64_t first, Scalar* scratch) {
    return scratch + (item - first) * t.layout->first_grad;
}

// Of an example, [act_h, act_w, channels]: which of its window's four values each winner is.
template <typename Scalar>
std::uint8_t* choices_of(const ConvTask<Scalar>& t, int block, std::int64_t example) {
    const ConvBlockPlan& b = t.block(block);
    return reinterpret_cast<std::uint8_t*>(t.at(b.choice)) + example * b.act_h * b.act_w * t.layout->channels;
}

// What BatchNorm reads: the winners of max-pooling, or without pooling the raw values.
template <typename Scalar>
struct Winners {
    const Scalar* base;
    std::int64_t example, row;  // from one to the next
};

template <typename Scalar>
Winners<Scalar> winners_of(const ConvTask<Scalar>& t, int block) {
    const ConvBlockPlan& b = t.block(block);
    const std::int64_t channels = t.layout->channels;
    if (b.stride == 1) return {t.at(b.winner), b.act_h * b.act_w * channels, b.act_w * channels};
    const std::int64_t row = (b.out_w + 2) * channels;
    return {t.at(b.raw) + row + channels, (b.out_h + 2) * row, row};
}

// Whether block 0 has stride 2 and reads images of one channel. Then a window's nine weights, or their gradients, fit
// the registers.
template <typename Scalar>
bool first_is_gray(const ConvTask<Scalar>& t) {
    return t.block(0).stride == 2 && t.block(0).inputs == 1;
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
