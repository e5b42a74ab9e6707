// Where the parameter tensors of a convolutional network lie in theta.
#pragma once

#include <cstdint>
#include <vector>

#include "params/conv_meta_step.h"
#include "plan/conv_meta_step_cpu.h"

namespace signmaml::cpu {

struct Tensor {
    std::int64_t first;
    std::int64_t size;
};

// All of them, in theta's order: of every block weight, bias if there is one, gamma and beta; of the classifier weight
// and bias.
struct Tensors {
    std::vector<Tensor> all;

    explicit Tensors(const ConvShape& shape) {
        std::int64_t at = 0;
        const auto add = [this, &at](std::int64_t size) {
            all.push_back({at, size});
            at += size;
        };
        for (int i = 0; i < shape.blocks; ++i) {
            add(std::int64_t{9} * shape.filters * (i == 0 ? shape.channels : shape.filters));
            for (int v = 1; v < conv_tensors_of_block(shape); ++v) add(shape.filters);
        }
        const std::int64_t rest = conv_parameters(shape) - at;
        add(rest - shape.ways);
        add(shape.ways);
    }
};

// Numbers of a block's tensors in the list.
struct BlockTensors {
    int weight, bias, gamma, beta;  // bias: -1 without one
};

inline BlockTensors tensors_of(const ConvShape& shape, int block) {
    const int first = block * conv_tensors_of_block(shape);
    return shape.conv_bias ? BlockTensors{first, first + 1, first + 2, first + 3}
                           : BlockTensors{first, -1, first + 1, first + 2};
}

// Which tensors get a gradient in a pass.
struct Wanted {
    const std::uint8_t* tensors;  // one byte a tensor; null: all

    bool operator()(int tensor) const { return tensors == nullptr || tensors[tensor] != 0; }
};

}  // namespace signmaml::cpu
