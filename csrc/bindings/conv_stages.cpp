// Runs single stages of the CPU's convolutional networks for tests and benchmarks. Python reads and writes the memory
// of one task.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
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
    virtual ~ConvStageRunner() = default;
    virtual void run(const std::string& stage, int block, int times) = 0;
    virtual py::memoryview array(const std::string& name, int block) = 0;
    virtual py::dict plan(int block) const = 0;
    virtual double dot(std::uintptr_t a, std::uintptr_t b, std::int64_t n) const = 0;
    virtual void add_scaled(std::uintptr_t y, double factor, std::uintptr_t x, std::int64_t n) const = 0;
    virtual bool gradient_step(std::uintptr_t params, std::uintptr_t grads, double lr, std::int64_t n) const = 0;
};

// A view of an array in a task's memory.
template <typename Scalar>
py::memoryview view(Scalar* at, const std::vector<std::int64_t>& shape, std::int64_t first_step = 0) {
    std::vector<py::ssize_t> sizes(shape.begin(), shape.end()), strides(shape.size(), sizeof(Scalar));
    for (std::size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
    if (first_step > 0) strides[0] = first_step * static_cast<py::ssize_t>(sizeof(Scalar));
    return py::memoryview::from_buffer(at, sizes, strides);
}

// Zeroed memory, aligned for the vectors of every instruction set.
template <typename Scalar>
class Memory {
  public:
    explicit Memory(std::int64_t size) : all_(static_cast<std::size_t>(size) + 64 / sizeof(Scalar)) {}

    Scalar* begin() {
        const auto address = reinterpret_cast<std::uintptr_t>(all_.data());
        return all_.data() + ((address + 63) / 64 * 64 - address) / sizeof(Scalar);
    }

  private:
    std::vector<Scalar> all_;
};

template <typename Scalar>
class RunnerOf final : public ConvStageRunner {
  public:
    RunnerOf(const ConvShape& shape, std::int64_t examples)
        : shape_(shape),
          stages_(cpu::conv_stages<Scalar>(cpu::kernels())),
          layout_(conv_cpu_layout(shape, examples, sizeof(Scalar), stages_.unit, /*alone=*/false)),
          memory_(layout_.size + layout_.scratch),
          images_(examples * shape.channels * shape.height * shape.width),
          theta_(std::int64_t{9} * std::max(shape.channels, shape.filters) * shape.filters),
          first_grads_(examples * layout_.blocks[0].half_items * layout_.first_grad),
          task_{&shape_, &layout_, memory_.begin(), examples} {}

    void run(const std::string& stage, int block, int times) override {
        check(block);
        const std::function<void()> body = body_of(stage, block);
        const py::gil_scoped_release unlocked;
        for (int i = 0; i < times; ++i) body();
    }

    py::memoryview array(const std::string& name, int block) override {
        check(block);
        const std::int64_t n = task_.examples, channels = layout_.channels, filters = shape_.filters;
        const ConvBlockPlan& b = layout_.blocks[block];
        const std::int64_t lanes = stages_.unit.lanes, group = b.vectors * lanes, group_back = b.vectors_back * lanes;
        const std::int64_t partials = layout_.partial_size, patch = 9 * layout_.blocks[0].inputs;
        const cpu::ConvPartial<Scalar> partial = task_.partial(0);
        const auto of = [this](std::int64_t place, const std::vector<std::int64_t>& shape) {
            if (place < 0) throw std::invalid_argument("name: this block has no such array");
            return view(task_.at(place), shape);
        };
        static const std::map<std::string, ConvVector> vectors = {
            {"gamma", kGamma}, {"beta", kBeta},    {"gamma_grad", kGammaGrad}, {"beta_grad", kBetaGrad},
            {"mean", kMean},   {"scale", kScale},  {"inverse", kInverse},      {"shift", kShift},
            {"slope", kSlope}, {"offset", kOffset}};
        if (const auto found = vectors.find(name); found != vectors.end()) {
            return view(task_.vector(block, found->second), {channels});
        }
        if (name == "x") return view(images_.begin(), {n, shape_.channels, shape_.height, shape_.width});
        if (name == "theta") return view(theta_.begin(), {filters, b.inputs, 3, 3});
        if (name == "images") {
            return of(layout_.images, {n, shape_.height + 2, shape_.width + 2, shape_.channels});
        }
        if (name == "patch_mean") return view(task_.patch_mean(), {kConvLargestPatch});
        if (name == "covariance") return view(task_.covariance(), {kConvLargestPatch, kConvLargestPatch});
        if (name == "weight") return of(b.weight, {channels / group, 9, b.inputs, group});
        if (name == "weight_grad") return of(b.weight_grad, {channels / group, 9, b.inputs, group});
        if (name == "weight_back") return of(layout_.weight_back, {channels / group_back, 9, filters, group_back});
        if (name == "transformed") return of(layout_.transformed, {16 * filters * channels});
        if (name == "first_weight") {
            const std::int64_t rows = (b.stride == 1 ? 12 : 9) * b.inputs;
            return of(layout_.first_weight, {channels / group, rows, group});
        }
        if (name == "raw") return of(b.raw, {n, b.out_h + 2, b.out_w + 2, channels});
        if (name == "winner") return of(b.winner, {n, b.act_h, b.act_w, channels});
        if (name == "choice" && b.choice >= 0) {
            return view(reinterpret_cast<std::uint8_t*>(task_.at(b.choice)), {n, b.act_h, b.act_w, channels});
        }
        if (name == "activation") {
            return of(b.activation, {n, b.act_h + 2 * b.pad, b.act_w + 2 * b.pad, channels});
        }
        if (name == "activation_grad" && block == 0 && layout_.first_grad_in_scratch) {
            return view(first_grads_.begin(), {n, b.half_items * b.act_rows, b.act_w, channels});
        }
        if (name == "activation_grad") return of(layout_.activation_grad, {n, b.act_h, b.act_w, channels});
        if (name == "patch_sums") return view(partial.patch_sums(), {n * b.items, patch}, partials);
        if (name == "patch_products") return view(partial.patch_products(), {n, patch, patch}, partials);
        if (name == "means") return view(partial.means(), {n * b.items, channels}, partials);
        if (name == "squared_deviations") return view(partial.squared_deviations(), {n * b.items, channels}, partials);
        if (name == "grad_sums") return view(partial.grad_sums(), {n * b.half_items, channels}, partials);
        if (name == "grad_products") return view(partial.grad_products(), {n * b.half_items, channels}, partials);
        if (name == "patch_grads") {
            return view(partial.patch_grads(), {n * b.items, channels / group, patch, group}, partials);
        }
        throw std::invalid_argument("name: block " + std::to_string(block) + " has no array '" + name + "'");
    }

    py::dict plan(int block) const override {
        using py::literals::operator""_a;
        check(block);
        const ConvBlockPlan& b = layout_.blocks[block];
        return py::dict("channels"_a = layout_.channels, "lanes"_a = stages_.unit.lanes, "inputs"_a = b.inputs,
                        "in_h"_a = b.in_h, "in_w"_a = b.in_w, "out_h"_a = b.out_h, "out_w"_a = b.out_w,
                        "act_h"_a = b.act_h, "act_w"_a = b.act_w, "stride"_a = b.stride, "pad"_a = b.pad,
                        "winograd"_a = b.winograd, "shared"_a = b.shared, "rows"_a = b.rows, "items"_a = b.items,
                        "act_rows"_a = b.act_rows, "half_items"_a = b.half_items, "weight_images"_a = b.weight_images);
    }

    double dot(std::uintptr_t a, std::uintptr_t b, std::int64_t n) const override {
        return static_cast<double>(
            stages_.dot(reinterpret_cast<const Scalar*>(a), reinterpret_cast<const Scalar*>(b), n));
    }
    void add_scaled(std::uintptr_t y, double factor, std::uintptr_t x, std::int64_t n) const override {
        stages_.add_scaled(reinterpret_cast<Scalar*>(y), static_cast<Scalar>(factor),
                           reinterpret_cast<const Scalar*>(x), n);
    }
    bool gradient_step(std::uintptr_t params, std::uintptr_t grads, double lr, std::int64_t n) const override {
        return stages_.gradient_step(reinterpret_cast<Scalar*>(params), reinterpret_cast<const Scalar*>(grads),
                                     static_cast<Scalar>(lr), n);
    }

  private:
    void check(int block) const {
        if (block < 0 || block >= shape_.blocks) {
            throw std::invalid_argument("block: expected 0 to " + std::to_string(shape_.blocks - 1) + ", found " +
                                        std::to_string(block));
        }
    }

    // A function that runs a stage over all items of all examples, on this thread.
    std::function<void()> body_of(const std::string& stage, int block) {
        const ConvBlockPlan& b = layout_.blocks[block];
        const std::int64_t items = task_.examples * b.items, half_items = task_.examples * b.half_items;
        Scalar* scratch = task_.memory + layout_.size;
        const auto each = [](std::int64_t count, auto run) {
            return [count, run] {
                for (std::int64_t item = 0; item < count; ++item) run(item);
            };
        };
        const bool first = block == 0, in_scratch = first && layout_.first_grad_in_scratch;
        if (stage == "pack_image" && first) {
            const std::int64_t pixels = std::int64_t{shape_.channels} * shape_.height * shape_.width;
            return each(task_.examples, [this, pixels](auto example) {
                stages_.pack_image(task_, images_.begin() + example * pixels, example);
            });
        }
        if (stage == "patch_sum" && first) return each(items, [this](auto item) { stages_.patch_sum(task_, item); });
        if (stage == "patch_covariance" && first) {
            return each(task_.examples,
                        [this, scratch](auto example) { stages_.patch_covariance(task_, example, scratch); });
        }
        if (stage == "pack_weights") {
            return [this, block] { stages_.pack_weights(task_, block, theta_.begin()); };
        }
        if (stage == "unpack_weights") {
            return [this, block, &b] { stages_.unpack_weights(task_, block, task_.at(b.weight), theta_.begin()); };
        }
        if (stage == "pack_back" && !first) return [this, block] { stages_.pack_back(task_, block); };
        if (stage == "transform_weights") return [this, block] { stages_.transform_weights(task_, block, false); };
        if (stage == "transform_back" && !first) {
            return [this, block] { stages_.transform_weights(task_, block, true); };
        }
        if (stage == "forward") {
            return [this, block, items, scratch] { stages_.forward(task_, block, 0, items, scratch); };
        }
        if (stage == "statistics") return [this, block] { stages_.statistics(task_, block); };
        if (stage == "normalise" && !first) {
            return each(task_.examples, [this, block](auto example) { stages_.normalise(task_, block, example); });
        }
        if (stage == "grad_sums") {
            return each(half_items, [this, block, scratch, in_scratch](auto item) {
                stages_.grad_sums(task_, block, item, in_scratch ? first_grad(item) : scratch);
            });
        }
        if (stage == "norm_grads" && !first) return [this, block] { stages_.norm_grads(task_, block); };
        if (stage == "raw_grad" && !first) {
            return each(items, [this, block](auto item) { stages_.raw_grad(task_, block, item); });
        }
        if (stage == "weight_products" && !first) {
            return [this, block, scratch] {
                stages_.weight_products(task_, block, 0, task_.examples, 0, kConvProducts, false, scratch);
            };
        }
        // The same in parts, as it is divided among threads and ranges of examples.
        if (stage == "weight_products_in_shares" && !first) {
            return [this, block, scratch, &b] {
                const std::int64_t n = task_.examples, at_once = b.weight_images;
                for (std::int64_t i = (n - 1) / at_once * at_once; i >= 0; i -= at_once) {
                    for (const auto& [from, to] : {std::pair{0, 5}, std::pair{5, 11}, std::pair{11, 16}}) {
                        stages_.weight_products(task_, block, i, std::min(i + at_once, n), from, to, false, scratch);
                    }
                }
            };
        }
        if (stage == "weight_grad" && !first) return [this, block] { stages_.weight_grad(task_, block); };
        // "data_grad_kept": also copies the gradients that stay in scratch to first_grads_.
        if ((stage == "data_grad" || stage == "data_grad_kept") && !first) {
            const std::int64_t all = task_.examples * layout_.blocks[block - 1].half_items;
            const std::int64_t at_once = b.data_grad_items;
            const bool keeps = stage == "data_grad_kept" && block == 1 && layout_.first_grad_in_scratch;
            return [this, block, all, at_once, keeps, scratch] {
                for (std::int64_t item = 0; item < all; item += at_once) {
                    const std::int64_t end = std::min(item + at_once, all);
                    stages_.data_grad(task_, block, item, end, scratch);
                    if (keeps) std::copy_n(scratch, (end - item) * layout_.first_grad, first_grad(item));
                }
            };
        }
        if (stage == "first_weight_grad" && first) {
            return each(items, [this, scratch, in_scratch](auto item) {
                stages_.first_weight_grad(task_, item, in_scratch ? first_grad(item) : scratch);
            });
        }
        if (stage == "finish_first" && first) return [this] { stages_.finish_first(task_); };
        throw std::invalid_argument("stage: block " + std::to_string(block) + " has no stage '" + stage + "'");
    }

    Scalar* first_grad(std::int64_t item) { return first_grads_.begin() + item * layout_.first_grad; }

    const ConvShape shape_;
    const cpu::ConvStages<Scalar>& stages_;
    const ConvCpuLayout layout_;
    Memory<Scalar> memory_;
    Memory<Scalar> images_;       // what pack_image reads
    Memory<Scalar> theta_;        // what pack_weights reads and unpack_weights writes
    Memory<Scalar> first_grads_;  // activation_grad of block 0 where the stages keep it in scratch, item by item
    cpu::ConvTask<Scalar> task_;
};

std::unique_ptr<ConvStageRunner> runner_of(const py::dict& entries, std::int64_t examples, bool is_double) {
    const ConvShape shape = conv_shape_of(entries);
    if (examples < 1 || examples > 1 << 20) {
        throw std::invalid_argument("examples: expected 1 to 1048576, found " + std::to_string(examples));
    }
    if (is_double) return std::make_unique<RunnerOf<double>>(shape, examples);
    return std::make_unique<RunnerOf<float>>(shape, examples);
}

}  // namespace

void define_conv_stages(py::module_& m) {
    using py::literals::operator""_a;
    py::class_<ConvStageRunner>(m, "ConvStageRunner")
        .def(py::init(&runner_of), "shape"_a, "examples"_a, "is_double"_a = false)
        .def("run", &ConvStageRunner::run, "stage"_a, "block"_a, "times"_a = 1)
        .def("array", &ConvStageRunner::array, "name"_a, "block"_a = 0, py::keep_alive<0, 1>())
        .def("plan", &ConvStageRunner::plan, "block"_a)
        .def("dot", &ConvStageRunner::dot, "a"_a, "b"_a, "n"_a)
        .def("add_scaled", &ConvStageRunner::add_scaled, "y"_a, "factor"_a, "x"_a, "n"_a)
        .def("gradient_step", &ConvStageRunner::gradient_step, "params"_a, "grads"_a, "lr"_a, "n"_a);
}

}  // namespace signmaml::bindings
