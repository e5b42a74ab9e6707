// The stages of the convolutional family on the CPU, one by one, for benchmarks and profilers: a task of random numbers
// on which any stage may run again and again.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/conv.h"
#include "cpu/conv_table.h"
#include "cpu/dispatch.h"
#include "plan/conv_meta_step_cpu.h"

namespace py = pybind11;

namespace signmaml::bindings {
namespace {

class ConvStageRunner {
  public:
    ConvStageRunner(const py::dict& entries, std::int64_t examples)
        : shape_(conv_shape_of(entries)), stages_(cpu::conv_stages<float>(cpu::kernels())) {
        if (examples < 1 || examples > 1 << 20) {
            throw std::invalid_argument("examples: expected 1 to 1048576, found " + std::to_string(examples));
        }
        layout_ = conv_cpu_layout(shape_, examples, sizeof(float), stages_.unit, /*alone=*/false);
        memory_.resize(static_cast<std::size_t>(layout_.size + layout_.scratch) + 16);
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
        task_ = {&shape_, &layout_, memory_.data() + ((address + 63) / 64 * 64 - address) / sizeof(float), examples};
        fill(layout_.halved_grad, layout_.halved_grad_size, 1e-3f);
        for (int i = 0; i < shape_.blocks; ++i) {
            const ConvBlockPlan& b = layout_.blocks[i];
            fill(b.weight, 9 * b.inputs * std::int64_t{layout_.channels}, 0.1f);
            std::fill_n(task_.vector(i, kGamma), layout_.channels, 1.0f);
        }
        std::vector<float> image(static_cast<std::size_t>(shape_.channels) * shape_.height * shape_.width);
        for (float& pixel : image) pixel = random();
        for (std::int64_t example = 0; example < examples; ++example) stages_.pack_image(task_, image.data(), example);
        // Each stage finds what the ones before it leave.
        for (int i = 0; i < shape_.blocks; ++i) {
            run("statistics", i, 1);
            run("transform_weights", i, 1);
            run("forward", i, 1);
            if (i == 0) continue;
            run("statistics", i, 1);
            run("normalise", i, 1);
            run("pack_back", i, 1);
        }
    }

    // Runs a stage over all items of all examples on this thread.
    void run(const std::string& stage, int block, int times) {
        if (block < 0 || block >= shape_.blocks) {
            throw std::invalid_argument("block: expected 0 to " + std::to_string(shape_.blocks - 1) + ", found " +
                                        std::to_string(block));
        }
        const std::function<void()> body = body_of(stage, block);
        const py::gil_scoped_release unlocked;
        for (int i = 0; i < times; ++i) body();
    }

  private:
    std::function<void()> body_of(const std::string& stage, int block) {
        const ConvBlockPlan& b = layout_.blocks[block];
        const std::int64_t items = task_.examples * b.items, half_items = task_.examples * b.half_items;
        float* scratch = task_.memory + layout_.size;
        const auto each = [](std::int64_t count, auto run) {
            return [count, run] {
                for (std::int64_t item = 0; item < count; ++item) run(item);
            };
        };
        const bool first = block == 0;
        if (stage == "patch_sum" && first) return each(items, [this](auto item) { stages_.patch_sum(task_, item); });
        if (stage == "patch_covariance" && first) {
            return each(task_.examples,
                        [this, scratch](auto example) { stages_.patch_covariance(task_, example, scratch); });
        }
        if (stage == "forward") {
            return [this, block, items, scratch] { stages_.forward(task_, block, 0, items, scratch); };
        }
        if (stage == "statistics") return [this, block] { stages_.statistics(task_, block); };
        if (stage == "normalise" && !first) {
            return each(task_.examples, [this, block](auto example) { stages_.normalise(task_, block, example); });
        }
        if (stage == "halved_sums") {
            return each(half_items,
                        [this, block, scratch](auto item) { stages_.halved_sums(task_, block, item, scratch); });
        }
        if (stage == "norm_grads") return [this, block] { stages_.norm_grads(task_, block); };
        if (stage == "raw_grad" && !first) {
            return each(items, [this, block](auto item) { stages_.raw_grad(task_, block, item); });
        }
        if (stage == "weight_grad" && !first) {
            return [this, block, scratch] {
                stages_.weight_products(task_, block, 0, task_.examples, 0, kConvProducts, scratch);
                stages_.weight_grad(task_, block);
            };
        }
        if (stage == "weight_grad") {
            return each(items, [this, scratch](auto item) { stages_.first_weight_grad(task_, item, scratch); });
        }
        if (stage == "pack_back" && !first) return [this, block] { stages_.pack_back(task_, block); };
        if (stage == "transform_weights") return [this, block] { stages_.transform_weights(task_, block, false); };
        if (stage == "data_grad" && !first) {
            const ConvBlockPlan& before = layout_.blocks[block - 1];
            const std::int64_t all = task_.examples * before.half_items, at_once = b.data_grad_items;
            return [this, block, all, at_once, scratch] {
                for (std::int64_t item = 0; item < all; item += at_once) {
                    stages_.data_grad(task_, block, item, std::min(item + at_once, all), scratch);
                }
            };
        }
        throw std::invalid_argument("stage: expected one of block " + std::to_string(block) + ", found '" + stage +
                                    "'");
    }

    void fill(std::int64_t place, std::int64_t count, float scale) {
        for (std::int64_t i = 0; i < count; ++i) task_.at(place)[i] = scale * random();
    }

    // -1 to 1; the times depend on the sizes alone, not on how random this is.
    float random() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<float>(static_cast<std::int32_t>(state_ >> 32)) / 2147483648.0f;
    }

    const ConvShape shape_;
    const cpu::ConvStages<float>& stages_;
    ConvCpuLayout layout_;
    std::vector<float> memory_;
    cpu::ConvTask<float> task_{};
    std::uint64_t state_ = 1;
};

}  // namespace

void define_conv_stages(py::module_& m) {
    py::class_<ConvStageRunner>(m, "ConvStageRunner")
        .def(py::init<const py::dict&, std::int64_t>(), py::arg("shape"), py::arg("examples"))
        .def("run", &ConvStageRunner::run, py::arg("stage"), py::arg("block"), py::arg("times") = 1);
}

}  // namespace signmaml::bindings
