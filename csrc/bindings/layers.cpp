#include "bindings/layers.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "cpu/dispatch.h"
#include "cpu/layers_table.h"
#include "cpu/ops.h"
#include "plan/layers_cpu.h"

namespace py = pybind11;

namespace signmaml::bindings {
namespace {

using Address = std::uintptr_t;
using Pair = std::array<std::int32_t, 2>;
// An address, and how many scalars lie between two tasks' tensors.
using Place = std::pair<Address, std::int64_t>;

// One block's entries, by name; `at` says which block in messages.
class Entries {
  public:
    Entries(py::dict entries, std::size_t number)
        : entries_(std::move(entries)), at_("blocks[" + std::to_string(number) + "]") {}

    template <typename Value>
    Value get(const char* name, Value otherwise) const {
        if (!entries_.contains(name)) return otherwise;
        try {
            return entries_[name].cast<Value>();
        } catch (const py::cast_error&) {
            throw py::type_error(at_ + ": expected another type for '" + name + "', found " +
                                 std::string(py::str(py::type::of(entries_[name]).attr("__name__"))));
        }
    }

    // The number of a word in a list, 0 if there is none.
    template <typename Kind>
    Kind kind(const char* name, const std::vector<std::string>& words) const {
        const std::string word = get<std::string>(name, words.front());
        for (std::size_t i = 0; i < words.size(); ++i) {
            if (words[i] == word) return static_cast<Kind>(i);
        }
        refuse(at_, "another " + std::string(name), "'" + word + "'");
    }

    LayersWindow window(const char* size, const char* stride, const char* pad) const {
        const Pair s = get<Pair>(size, {1, 1}), by = get<Pair>(stride, {1, 1}), around = get<Pair>(pad, {0, 0});
        if (s[0] < 1 || s[1] < 1 || by[0] < 1 || by[1] < 1 || around[0] < 0 || around[1] < 0) {
            refuse(at_, "a " + std::string(size) + " and stride of 1 or more and a padding of 0 or more", "others");
        }
        return {s[0], s[1], by[0], by[1], around[0], around[1]};
    }

    const std::string& at() const { return at_; }

  private:
    const py::dict entries_;
    const std::string at_;
};

// Packed weights of two such numbers still have a size that fits 64 bits.
constexpr std::int32_t kMostChannels = 1 << 16, kMostColumns = 1024;

std::int32_t windows(std::int32_t size, std::int32_t window, std::int32_t stride, std::int32_t pad) {
    const std::int64_t room = std::int64_t{size} + 2 * std::int64_t{pad} - window;
    return room < 0 ? 0 : static_cast<std::int32_t>(room / stride + 1);
}

LayersSize after(const LayersSize& size, const LayersWindow& w) {
    return {size.channels, windows(size.height, w.height, w.stride_h, w.pad_h),
            windows(size.width, w.width, w.stride_w, w.pad_w)};
}

std::string text_of(const LayersSize& size) {
    return std::to_string(size.channels) + " x " + std::to_string(size.height) + " x " + std::to_string(size.width);
}

// Which block lies some number of blocks back from block i, one of [lowest, i - 1].
std::int32_t back_from(const Entries& entries, const char* name, std::int32_t i, std::int32_t otherwise,
                       std::int32_t lowest) {
    const std::int32_t back = entries.get<std::int32_t>(name, otherwise);
    if (back < 1 || back > i - lowest) {
        refuse(entries.at(), std::string("'") + name + "' of 1 to " + std::to_string(i - lowest), std::to_string(back));
    }
    return i - back;
}

// Block i of a network whose earlier blocks are there; example: its size.
LayersBlock block_of(const Entries& entries, std::int32_t i, const LayersSize& example, LayersNetwork& network) {
    LayersBlock block{};
    const auto tensor = [&network](bool there) { return there ? network.tensors++ : -1; };
    block.product = entries.kind<LayersProduct>("product", {"none", "conv", "linear", "sum"});
    block.source = back_from(entries, "reads", i, 1, -1);
    const LayersSize in = block.source < 0 ? example : network.block[block.source].out;
    block.in = block.made = in;
    if (block.product == LayersProduct::kSum) {
        block.added = back_from(entries, "adds", i, 0, 0);
        const LayersSize& other = network.block[block.added].out;
        if (text_of(other) != text_of(in)) refuse(entries.at(), "a summand of " + text_of(in), text_of(other));
    }
    const bool has_weight = block.product == LayersProduct::kConv || block.product == LayersProduct::kLinear;
    if (has_weight) {
        block.made.channels = entries.get<std::int32_t>("channels", 0);
        if (block.made.channels < 1) refuse(entries.at(), "channels of 1 or more", std::to_string(block.made.channels));
    }
    if (block.product == LayersProduct::kConv) {
        block.window = entries.window("kernel", "stride", "padding");
        for (const std::int32_t channels : {in.channels, block.made.channels}) {
            if (channels > kMostChannels) {
                refuse(entries.at(), "at most " + std::to_string(kMostChannels) + " channels",
                       std::to_string(channels));
            }
        }
        const std::int32_t channels = block.made.channels;
        block.made = after(in, block.window);
        block.made.channels = channels;
        const auto runs = [](std::int64_t window, std::int64_t stride) { return ceil_div(window, stride); };
        const LayersWindow& w = block.window;
        const std::int64_t most =
            w.stride_w == 1 ? runs(w.height, w.stride_h) : runs(w.height, w.stride_h) * runs(w.width, w.stride_w);
        if (w.height > kLayersWindow || w.width > kMostColumns || most > kLayersWindow) {
            refuse(entries.at(), "a smaller kernel", std::to_string(w.height) + " x " + std::to_string(w.width));
        }
        if (w.stride_h > kMostColumns || w.stride_w > kMostColumns) {
            refuse(entries.at(), "a stride of at most " + std::to_string(kMostColumns), "more");
        }
        if (w.pad_h >= w.height || w.pad_w >= w.width) {
            refuse(entries.at(), "a padding below the kernel's size", "another");
        }
    } else if (block.product == LayersProduct::kLinear) {
        block.made.height = block.made.width = 1;
    }
    block.weight = tensor(has_weight);
    block.bias = tensor(has_weight && entries.get<bool>("bias", false));
    block.norm = entries.kind<LayersNorm>("norm", {"none", "batch", "group"});
    block.groups = entries.get<std::int32_t>("groups", 1);
    block.eps = entries.get<double>("eps", 0.0);
    if (block.norm == LayersNorm::kGroup && (block.groups < 1 || block.made.channels % block.groups != 0)) {
        refuse(entries.at(), "groups that divide " + std::to_string(block.made.channels) + " channels",
               std::to_string(block.groups));
    }
    if (block.norm != LayersNorm::kNone && !(block.eps > 0)) refuse(entries.at(), "an eps above 0", "another");
    const bool affine = block.norm != LayersNorm::kNone && entries.get<bool>("affine", true);
    block.scale = tensor(affine);
    block.shift = tensor(affine);
    block.activation = entries.kind<LayersActivation>(
        "activation", {"none", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"});
    block.slope = entries.get<double>("slope", 0.0);
    block.pool = entries.kind<LayersPool>("pool", {"none", "max", "average", "mean"});
    block.dropout = entries.kind<LayersDropout>("drops", {"none", "values", "channels"});
    block.out = block.made;
    if (block.pool == LayersPool::kMax || block.pool == LayersPool::kAverage) {
        block.pool_window = entries.window("pool_kernel", "pool_stride", "pool_padding");
        const LayersWindow& w = block.pool_window;
        if (std::int64_t{2} * w.pad_h > w.height || std::int64_t{2} * w.pad_w > w.width) {
            refuse(entries.at(), "a pooling's padding of half its kernel at most", "more");
        }
        block.out = after(block.made, w);
        block.counts_padding = entries.get<bool>("counts_padding", true);
    } else if (block.pool == LayersPool::kMean) {
        block.out.height = block.out.width = 1;
    }
    for (const LayersSize& size : {block.made, block.out}) {
        if (size.height < 1 || size.width < 1) refuse(entries.at(), "larger images", text_of(in));
        if (layers_features(size) > std::numeric_limits<std::int32_t>::max())
            refuse(entries.at(), "smaller images", text_of(in));
    }
    return block;
}

class LayersProgram {
  public:
    LayersProgram(const std::vector<py::dict>& blocks, const std::array<std::int32_t, 3>& size) {
        if (blocks.empty() || blocks.size() > static_cast<std::size_t>(kLayersBlocks)) {
            refuse("blocks", "1 to " + std::to_string(kLayersBlocks), std::to_string(blocks.size()));
        }
        const LayersSize example{size[0], size[1], size[2]};
        if (example.channels < 1 || example.height < 1 || example.width < 1) {
            refuse("size", "1 or more each", text_of(example));
        }
        network_.blocks = static_cast<std::int32_t>(blocks.size());
        for (std::int32_t i = 0; i < network_.blocks; ++i) {
            network_.block[i] = block_of(Entries(blocks[i], i), i, example, network_);
        }
        for (std::int32_t i = 0; i + 1 < network_.blocks; ++i) check_readers(i);
        const LayersSize& out = network_.block[network_.blocks - 1].out;
        if (out.height != 1 || out.width != 1) refuse("blocks", "a last one that makes features", text_of(out));
    }

    std::int32_t tensors() const { return network_.tensors; }
    std::int32_t outputs() const { return network_.block[network_.blocks - 1].out.channels; }
    std::int32_t dropouts() const {
        std::int32_t found = 0;
        for (int i = 0; i < network_.blocks; ++i) found += network_.block[i].dropout != LayersDropout::kNone ? 1 : 0;
        return found;
    }
    bool couples() const { return layers_couple_examples(network_); }

    // By block: the sizes that it reads, makes and gives.
    std::vector<py::tuple> sizes() const {
        const auto of = [](const LayersSize& s) { return py::make_tuple(s.channels, s.height, s.width); };
        std::vector<py::tuple> found;
        for (int i = 0; i < network_.blocks; ++i) {
            const LayersBlock& block = network_.block[i];
            found.push_back(py::make_tuple(of(block.in), of(block.made), of(block.out)));
        }
        return found;
    }

    py::dict plan(std::int64_t tasks, std::int64_t count, bool is_double, int threads, bool hessian) const {
        check_counts(tasks, count, threads);
        const LayersCpuPlan found =
            plan_of(hessian ? LayersPass::kHessian : LayersPass::kGradient, tasks, count, is_double, threads);
        py::dict plan;
        plan["chunk"] = found.chunk;
        plan["workspace_bytes"] = found.workspace_bytes;
        return plan;
    }

    void run(const std::vector<Place>& parameters, const std::vector<Place>& gradients, Address x, Address labels,
             Address target, const std::vector<Address>& noise, Address loss, Address predictions, Address workspace,
             std::int64_t tasks, std::int64_t count, bool is_double, int threads) const {
        check_counts(tasks, count, threads);
        check_parameters(parameters, tasks);
        if (!gradients.empty()) check_number("gradients", gradients.size(), "none or ");
        check_labels(labels, target, tasks);
        check_noise(noise, tasks);
        if ((x == 0 || loss == 0 || workspace == 0) && tasks > 0) refuse("x, loss, workspace", "addresses", "none");
        py::gil_scoped_release release;
        const auto as = [&](auto scalar) {
            using Scalar = decltype(scalar);
            const auto tensors = tensors_of<Scalar>(parameters, gradients, {});
            const auto factors = factors_of<Scalar>(noise);
            const LayersPassParams<Scalar> params{tensors.data(),
                                                  reinterpret_cast<const Scalar*>(x),
                                                  reinterpret_cast<const std::int64_t*>(labels),
                                                  reinterpret_cast<const Scalar*>(target),
                                                  factors.data(),
                                                  reinterpret_cast<Scalar*>(loss),
                                                  reinterpret_cast<Scalar*>(predictions),
                                                  reinterpret_cast<void*>(workspace),
                                                  tasks,
                                                  count,
                                                  !gradients.empty()};
            cpu::layers_pass(network_, params, threads);
        };
        is_double ? as(double{}) : as(float{});
    }

    void hessian(const std::vector<Place>& parameters, const std::vector<Place>& directions,
                 const std::vector<Place>& products, Address x, Address labels, Address target,
                 const std::vector<Address>& noise, Address workspace, std::int64_t tasks, std::int64_t count,
                 bool is_double, int threads) const {
        check_counts(tasks, count, threads);
        check_parameters(parameters, tasks);
        check_number("directions", directions.size());
        check_number("products", products.size());
        check_labels(labels, target, tasks);
        check_noise(noise, tasks);
        if ((x == 0 || workspace == 0) && tasks > 0) refuse("x, workspace", "addresses", "none");
        py::gil_scoped_release release;
        const auto as = [&](auto scalar) {
            using Scalar = decltype(scalar);
            const auto tensors = tensors_of<Scalar>(parameters, products, directions);
            const auto factors = factors_of<Scalar>(noise);
            const LayersHessianParams<Scalar> params{tensors.data(),
                                                     reinterpret_cast<const Scalar*>(x),
                                                     reinterpret_cast<const std::int64_t*>(labels),
                                                     reinterpret_cast<const Scalar*>(target),
                                                     factors.data(),
                                                     reinterpret_cast<void*>(workspace),
                                                     tasks,
                                                     count};
            cpu::layers_hessian(network_, params, threads);
        };
        is_double ? as(double{}) : as(float{});
    }

  private:
    void check_readers(std::int32_t other) const {
        int readers = 0;
        bool flattens = false;
        for (std::int32_t i = other + 1; i < network_.blocks; ++i) {
            const LayersBlock& block = network_.block[i];
            readers += layers_reads(block, other) ? 1 : 0;
            flattens |= block.source == other && block.product == LayersProduct::kLinear &&
                        std::int64_t{block.in.height} * block.in.width > 1;
        }
        const std::string at = "blocks[" + std::to_string(other) + "]";
        if (readers == 0) refuse(at, "a block that another one reads", "none");
        if (flattens && readers > 1) refuse(at, "one reader of images that a linear layer reads", "several");
    }

    static void check_counts(std::int64_t tasks, std::int64_t count, int threads) {
        if (tasks < 0) refuse("tasks", "0 or more", std::to_string(tasks));
        if (count < 1) refuse("count", "1 or more", std::to_string(count));
        if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
    }

    void check_number(const char* what, std::size_t found, const std::string& or_else = "") const {
        const auto expected = static_cast<std::size_t>(network_.tensors);
        if (found != expected) refuse(what, or_else + std::to_string(expected), std::to_string(found));
    }

    void check_parameters(const std::vector<Place>& parameters, std::int64_t tasks) const {
        check_number("parameters", parameters.size());
        for (const auto& [address, apart] : parameters) {
            if (address == 0 && tasks > 0) refuse("parameters", "addresses", "none");
        }
    }

    static void check_labels(Address labels, Address target, std::int64_t tasks) {
        if ((labels == 0) == (target == 0) && tasks > 0) refuse("labels", "labels or a target", "both or none");
    }

    void check_noise(const std::vector<Address>& noise, std::int64_t tasks) const {
        const auto expected = static_cast<std::size_t>(dropouts());
        if (noise.size() != expected) refuse("noise", std::to_string(expected), std::to_string(noise.size()));
        for (const Address address : noise) {
            if (address == 0 && tasks > 0) refuse("noise", "addresses", "none");
        }
    }

    // By block: the factors of its dropout, if it has one.
    template <typename Scalar>
    std::vector<const Scalar*> factors_of(const std::vector<Address>& noise) const {
        std::vector<const Scalar*> found(network_.blocks, nullptr);
        std::size_t next = 0;
        for (int i = 0; i < network_.blocks; ++i) {
            if (network_.block[i].dropout == LayersDropout::kNone) continue;
            found[i] = reinterpret_cast<const Scalar*>(noise[next++]);
        }
        return found;
    }

    LayersCpuPlan plan_of(LayersPass pass, std::int64_t tasks, std::int64_t count, bool is_double, int threads) const {
        const cpu::Kernels& kernels = cpu::kernels();
        const ConvUnit unit = cpu::layers_stages<float>(kernels).unit;
        const auto one = static_cast<double>(layers_layout_of(network_, 1, std::int64_t{1} << 20, 4, unit).size);
        const auto examples = static_cast<double>(layers_couple_examples(network_) ? count : 1);
        // A generous bound: doubles may double it, and a chunk has up to kLayersChunkBytes more.
        if (one * examples * static_cast<double>(smaller(tasks, threads)) > 0x1p55) {
            throw std::overflow_error("count: expected fewer or smaller examples, found " + std::to_string(count));
        }
        const auto as = [&](int scalar_bytes, ConvUnit of_scalar) {
            return plan_layers_cpu(network_, pass, tasks, count, scalar_bytes, of_scalar, threads);
        };
        return is_double ? as(8, cpu::layers_stages<double>(kernels).unit)
                         : as(4, cpu::layers_stages<float>(kernels).unit);
    }

    template <typename Scalar>
    static std::vector<LayersTensor<Scalar>> tensors_of(const std::vector<Place>& parameters,
                                                        const std::vector<Place>& gradients,
                                                        const std::vector<Place>& directions) {
        std::vector<LayersTensor<Scalar>> tensors(parameters.size());
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            tensors[i].values = reinterpret_cast<const Scalar*>(parameters[i].first);
            tensors[i].values_apart = parameters[i].second;
            if (!gradients.empty()) {
                tensors[i].grads = reinterpret_cast<Scalar*>(gradients[i].first);
                tensors[i].grads_apart = gradients[i].second;
            }
            if (!directions.empty()) {
                tensors[i].direction = reinterpret_cast<const Scalar*>(directions[i].first);
                tensors[i].direction_apart = directions[i].second;
            }
        }
        return tensors;
    }

    LayersNetwork network_{};
};

}  // namespace

void define_layers(py::module_& m) {
    using namespace py::literals;
    py::class_<LayersProgram>(m, "LayersProgram", py::module_local())
        .def(py::init<const std::vector<py::dict>&, const std::array<std::int32_t, 3>&>(), "blocks"_a, "size"_a)
        .def_property_readonly("tensors", &LayersProgram::tensors)
        .def_property_readonly("dropouts", &LayersProgram::dropouts)
        .def_property_readonly("outputs", &LayersProgram::outputs)
        .def_property_readonly("couples_examples", &LayersProgram::couples)
        .def_property_readonly("sizes", &LayersProgram::sizes)
        .def("plan", &LayersProgram::plan, "tasks"_a, "count"_a, "is_double"_a, "threads"_a, "hessian"_a = false)
        .def("hessian", &LayersProgram::hessian, "parameters"_a, "directions"_a, "products"_a, "x"_a, "labels"_a,
             "target"_a, "noise"_a, "workspace"_a, "tasks"_a, "count"_a, "is_double"_a, "threads"_a)
        .def("run", &LayersProgram::run, "parameters"_a, "gradients"_a, "x"_a, "labels"_a, "target"_a, "noise"_a,
             "loss"_a, "predictions"_a, "workspace"_a, "tasks"_a, "count"_a, "is_double"_a, "threads"_a);
}

}  // namespace signmaml::bindings
