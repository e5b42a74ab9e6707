#include "bindings/conv.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/addresses.h"
#include "bindings/arguments.h"
#include "bindings/mean_gradient.h"
#include "bindings/method.h"
#include "bindings/sharpness.h"
#include "cpu/conv_table.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "launch/launch.h"
#include "plan/conv_meta_step.h"
#include "plan/conv_meta_step_cpu.h"

namespace py = pybind11;

namespace signmaml::bindings {
namespace {

void check_range(const char* argument, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most) {
        refuse(argument, std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
    }
}

template <typename Value>
Value entry(const py::dict& shape, const char* name) {
    if (!shape.contains(name)) refuse("shape", std::string("an entry '") + name + "'", "none");
    try {
        return shape[name].cast<Value>();
    } catch (const py::cast_error&) {
        throw py::type_error(std::string("shape: expected another type for '") + name + "', found " +
                             std::string(py::str(py::type::of(shape[name]).attr("__name__"))));
    }
}

// For options with two words ("max" or "stride", "flatten" or "mean"): whether the second is given.
bool second_of(const py::dict& shape, const char* name, const char* first, const char* second) {
    const auto word = entry<std::string>(shape, name);
    if (word != first && word != second) {
        refuse(name, std::string("'") + first + "' or '" + second + "'", "'" + word + "'");
    }
    return word == second;
}

}  // namespace

ConvShape conv_shape_of(const py::dict& entries) {
    ConvShape shape{};
    shape.blocks = entry<std::int32_t>(entries, "blocks");
    shape.channels = entry<std::int32_t>(entries, "channels");
    shape.filters = entry<std::int32_t>(entries, "filters");
    shape.height = entry<std::int32_t>(entries, "height");
    shape.width = entry<std::int32_t>(entries, "width");
    shape.ways = entry<std::int32_t>(entries, "ways");
    check_range("blocks", shape.blocks, 1, kConvBlocks);
    check_range("channels", shape.channels, 1, kConvChannels);
    check_range("filters", shape.filters, 1, kConvFilters);
    if (shape.filters % kConvFilterUnit != 0) {
        refuse("filters", "a multiple of " + std::to_string(kConvFilterUnit), std::to_string(shape.filters));
    }
    check_range("height", shape.height, 1, 1 << 14);
    check_range("width", shape.width, 1, 1 << 14);
    check_range("ways", shape.ways, 1, 1 << 20);
    shape.halving = second_of(entries, "halving", "max", "stride") ? Halving::kStride : Halving::kMaxPool;
    shape.readout = second_of(entries, "readout", "flatten", "mean") ? Readout::kMean : Readout::kFlatten;
    shape.conv_bias = entry<bool>(entries, "conv_bias");
    std::int64_t h = shape.height, w = shape.width;
    for (int i = 0; i < shape.blocks; ++i) {
        h = conv_half(h, shape.halving);
        w = conv_half(w, shape.halving);
    }
    if (h < 1 || w < 1) {
        refuse("height, width", "an image that " + std::to_string(shape.blocks) + " halvings leave something of",
               std::to_string(shape.height) + " x " + std::to_string(shape.width));
    }
    const auto eps = entry<std::vector<double>>(entries, "eps");
    if (static_cast<std::int64_t>(eps.size()) != shape.blocks) {
        refuse("eps", std::to_string(shape.blocks) + " of them, one a block", std::to_string(eps.size()));
    }
    for (int i = 0; i < shape.blocks; ++i) shape.eps[i] = eps[static_cast<std::size_t>(i)];
    return shape;
}

namespace {

struct ConvSizes {
    std::int64_t tasks;
    int support, query, steps;
    Method method;
    StepOptions how;

    void check() const {
        constexpr int kMost = std::numeric_limits<int>::max();
        check_range("tasks", tasks, 0, std::numeric_limits<std::int64_t>::max());
        check_range("support", support, 0, kMost);
        check_range("query", query, 0, kMost);
        check_range("steps", steps, 0, kMost);
        if (steps > 0) check_range("support", support, 1, kMost);
    }

    ConvKept kept() const { return conv_kept(method, how.rates, how.climbs(), how.counted, steps, query); }
};

// Throws for sizes so large that a plan's int64 byte counts could overflow. No machine has that much memory.
void check_memory(const ConvShape& shape, const ConvSizes& sizes) {
    const std::int64_t examples = larger(sizes.support, sizes.query), tasks = sizes.tasks;
    const double pixels = static_cast<double>(shape.height + 2) * static_cast<double>(shape.width + 2);
    const double activations = static_cast<double>(examples) * (pixels * kConvFilters * 16 + shape.ways) * 64;
    const double results = static_cast<double>(tasks) * static_cast<double>(conv_parameters(shape) + examples) * 64;
    const ConvKept kept = sizes.kept();
    const double rows = static_cast<double>(kept.parameters) + static_cast<double>(kept.directions);
    const double of_steps = rows * static_cast<double>(conv_parameters(shape)) * 256;
    if (activations > 1e18 || results > 1e18 || of_steps > 1e18) {
        refuse("shape, tasks, support, query, steps", "sizes whose memory can be counted",
               std::to_string(examples) + " images of " + std::to_string(shape.height) + " x " +
                   std::to_string(shape.width) + " in " + std::to_string(tasks) + " tasks");
    }
}

void check_cpu_call(const ConvShape& shape, const ConvSizes& sizes, int threads) {
    sizes.check();
    check_memory(shape, sizes);
    check_range("threads", threads, 1, std::numeric_limits<int>::max());
}

template <typename Scalar>
ConvMetaStepParams<Scalar> conv_params_of(const Addresses& addresses, const ConvShape& shape, const ConvSizes& sizes) {
    const auto scalars = [&addresses](const char* name) { return address_in<Scalar>(addresses, name); };
    const auto labels = [&addresses](const char* name) { return address_in<const std::int64_t>(addresses, name); };
    ConvMetaStepParams<Scalar> p{};
    p.theta = scalars("theta");
    p.support = {scalars("support_x"), labels("support_labels"), sizes.support};
    p.query = {scalars("query_x"), labels("query_labels"), sizes.query};
    p.lr = scalars("lr");
    p.adapt = address_in<const std::uint8_t>(addresses, "adapt");
    p.support_loss = scalars("support_loss");
    p.query_loss = scalars("query_loss");
    p.query_accuracy = scalars("query_accuracy");
    p.logits = scalars("logits");
    p.adapted = scalars("adapted");
    p.grads = scalars("grads");
    p.rate_grads = scalars("rate_grads");
    p.nonfinite = address_in<std::uint8_t>(addresses, "nonfinite");
    p.workspace = address_in<void>(addresses, "workspace");
    p.tasks = sizes.tasks;
    p.parameters = conv_parameters(shape);
    p.steps = sizes.steps;
    p.method = sizes.method;
    p.how = sizes.how;
    p.counts = address_in<std::int8_t>(addresses, "counts");
    p.shape = shape;
    return p;
}

// Throws if an address that the call needs is missing.
template <typename Scalar>
void check_present(const ConvMetaStepParams<Scalar>& p) {
    const auto check = [](const char* name, const void* address, bool needed) {
        if (needed && address == nullptr) refuse("addresses", std::string("one for '") + name + "'", "none");
    };
    const bool adapts = p.steps > 0, asks = p.query.count > 0;
    check("theta", p.theta, true);
    check("nonfinite", p.nonfinite, true);
    check("workspace", p.workspace, true);
    check("support_x", p.support.x, adapts);
    check("support_labels", p.support.labels, adapts);
    check("lr", p.lr, adapts);
    check("adapt", p.adapt, adapts);
    check("support_loss", p.support_loss, adapts);
    check("query_x", p.query.x, asks);
    check("query_labels", p.query.labels, asks);
    check("query_loss", p.query_loss, asks);
}

ConvUnit conv_unit(int scalar_bytes) {
    if (scalar_bytes == sizeof(double)) return cpu::conv_stages<double>(cpu::kernels()).unit;
    if (scalar_bytes == sizeof(float)) return cpu::conv_stages<float>(cpu::kernels()).unit;
    refuse("scalar_bytes", "4 or 8", std::to_string(scalar_bytes));
}

py::dict plan_cpu(const py::dict& entries, std::int64_t tasks, int support, int query, int scalar_bytes, int threads,
                  int steps, const std::string& method, bool rates_by_element, bool rates_by_step, bool learns_rates,
                  double sharpness_rho, bool counts_steps, bool with_blocks) {
    using py::literals::operator""_a;
    const ConvShape shape = conv_shape_of(entries);
    const Method of_steps = method_of(method);
    const StepOptions how = step_options_of({rates_by_element, rates_by_step, learns_rates}, sharpness_rho, "l2", false,
                                            counts_steps, of_steps, steps);
    const ConvSizes sizes{tasks, support, query, steps, of_steps, how};
    check_cpu_call(shape, sizes, threads);
    const ConvUnit unit = conv_unit(scalar_bytes);
    const ConvCpuPlan plan =
        plan_conv_meta_step_cpu(shape, tasks, support, query, sizes.kept(), scalar_bytes, unit, threads);
    const ConvCpuLayout layout = conv_cpu_layout(shape, larger(support, query), scalar_bytes, unit,
                                                 /*alone=*/plan.side_by_side > 0 && sizes.kept().parameters == 0);
    py::dict found("side_by_side"_a = plan.side_by_side, "teams"_a = plan.teams, "task_scalars"_a = layout.size,
                   "workspace_bytes"_a = plan.workspace_bytes, "mean_rows"_a = plan.mean_rows,
                   "parameters"_a = conv_parameters(shape), "channels"_a = layout.channels, "lanes"_a = unit.lanes);
    if (!with_blocks) return found;  // a plan is made for every step, so keep this cheap
    py::list blocks;
    for (int i = 0; i < shape.blocks; ++i) {
        const ConvBlockPlan& b = layout.blocks[i];
        blocks.append(py::dict("inputs"_a = b.inputs, "out_h"_a = b.out_h, "out_w"_a = b.out_w, "act_h"_a = b.act_h,
                               "act_w"_a = b.act_w, "vectors"_a = b.vectors, "vectors_back"_a = b.vectors_back,
                               "rows"_a = b.rows, "items"_a = b.items));
    }
    found["blocks"] = blocks;
    return found;
}

template <typename Scalar>
void run_cpu(const Addresses& addresses, const ConvShape& shape, const ConvSizes& sizes, bool skip_nonfinite,
             int threads) {
    const ConvMetaStepParams<Scalar> params = conv_params_of<Scalar>(addresses, shape, sizes);
    check_present(params);
    const auto mean = mean_of<Scalar>(addresses, sizes.query, params.grads, skip_nonfinite);
    const py::gil_scoped_release unlocked;
    cpu::conv_meta_step(params, mean, threads);
}

void conv_meta_step_cpu(const Addresses& addresses, const py::dict& entries, std::int64_t tasks, int support, int query,
                        int steps, const std::string& method, bool is_double, int threads, bool skip_nonfinite,
                        bool rates_by_element, bool rates_by_step, bool learns_rates, double sharpness_rho,
                        const std::string& sharpness_norm, bool sharpness_adaptive, bool counts_steps) {
    const ConvShape shape = conv_shape_of(entries);
    const Method of_steps = method_of(method);
    const StepOptions how = step_options_of({rates_by_element, rates_by_step, learns_rates}, sharpness_rho,
                                            sharpness_norm, sharpness_adaptive, counts_steps, of_steps, steps);
    const ConvSizes sizes{tasks, support, query, steps, of_steps, how};
    check_cpu_call(shape, sizes, threads);
    if (is_double) {
        run_cpu<double>(addresses, shape, sizes, skip_nonfinite, threads);
    } else {
        run_cpu<float>(addresses, shape, sizes, skip_nonfinite, threads);
    }
}

// ---- CUDA

ConvPrecision conv_precision_of(const std::string& precision) {
    if (precision == "fp32") return ConvPrecision::kFp32;
    if (precision == "tf32") return ConvPrecision::kTf32;
    if (precision == "bf16") return ConvPrecision::kBf16;
    refuse("precision", "'fp32', 'tf32' or 'bf16'", "'" + precision + "'");
}

// The number of multiprocessors is not used: what a task computes must not depend on it.
py::dict plan_cuda(const py::dict& entries, std::int64_t tasks, int support, int query, int steps,
                   const std::string& precision, int multiprocessors, bool wants_grads, bool wants_adapted,
                   bool by_covariance, std::int64_t workspace_limit, const std::string& method, bool rates_by_element,
                   bool learns_rates, double sharpness_rho, const std::string& sharpness_norm, bool sharpness_adaptive,
                   bool counts_steps) {
    using py::literals::operator""_a;
    const ConvShape shape = conv_shape_of(entries);
    const Method of_steps = method_of(method);
    const StepOptions how = step_options_of({rates_by_element, /*by_step=*/true, learns_rates}, sharpness_rho,
                                            sharpness_norm, sharpness_adaptive, counts_steps, of_steps, steps);
    const ConvSizes sizes{tasks, support, query, steps, of_steps, how};
    sizes.check();
    check_memory(shape, sizes);
    check_range("multiprocessors", multiprocessors, 1, std::numeric_limits<int>::max());
    const ConvRequest request{tasks, support, query, steps, wants_grads, wants_adapted, of_steps, how};
    const ConvPlan plan =
        plan_conv_meta_step(shape, request, conv_precision_of(precision), by_covariance, workspace_limit);
    py::list launches;
    for (const ConvLaunch& one : plan.launches) {
        launches.append(
            py::dict("kernel"_a = name_of(one.kernel), "part"_a = name_of(one.part), "block_of_network"_a = one.block,
                     "step"_a = one.step, "set"_a = one.query ? "query" : "support",
                     "grid"_a = py::make_tuple(one.grid_x, one.grid_y, one.grid_z), "threads"_a = one.threads,
                     "shared_bytes"_a = one.shared_bytes, "flops"_a = one.flops, "bytes"_a = one.bytes));
    }
    py::list arrays;
    for_each_array(plan.workspace, [&arrays](const char* name, const ConvArray& array) {
        arrays.append(py::dict("name"_a = name, "offset"_a = array.offset, "stride"_a = array.stride,
                               "element_bytes"_a = array.element_bytes));
    });
    return py::dict("workspace_bytes"_a = plan.workspace.bytes, "chunk"_a = plan.chunk,
                    "parameters"_a = conv_parameters(shape), "launches"_a = launches, "workspace"_a = arrays);
}

#ifdef SIGNMAML_WITH_CUDA
#ifdef SIGNMAML_EMULATION
// Tells the emulated GPU which memory it may access. Every array of the workspace is a buffer of its own, so that an
// access beyond its end is reported.
void declare(const ConvMetaStepParams<float>& p, const ConvPlan& plan) {
    auto& buffers = emulation::settings().buffers;
    buffers.clear();
    const auto add = [&buffers](const char* name, const void* address, std::int64_t count, std::int64_t bytes,
                                bool writable) {
        if (address != nullptr && count > 0) {
            buffers.push_back({name, reinterpret_cast<std::uintptr_t>(address), count * bytes, bytes, writable});
        }
    };
    for_each_array(plan.workspace, [&](const char* name, const ConvArray& array) {
        add(name, static_cast<char*>(p.workspace) + array.offset, plan.chunk * array.stride / array.element_bytes,
            array.element_bytes, true);
    });
    const std::int64_t image = std::int64_t{p.shape.channels} * p.shape.height * p.shape.width;
    const std::int64_t support = p.tasks * p.support.count, query = p.tasks * p.query.count;
    const std::int64_t tensors = conv_tensors(p.shape);
    add("theta", p.theta, p.parameters, 4, false);
    add("support_x", p.support.x, support * image, 4, false);
    add("support_labels", p.support.labels, support, 8, false);
    add("query_x", p.query.x, query * image, 4, false);
    add("query_labels", p.query.labels, query, 8, false);
    const std::int64_t rates = p.steps * p.how.rates.of_row(p.parameters, tensors);
    add("lr", p.lr, rates, 4, false);
    add("adapt", p.adapt, tensors, 1, false);
    add("support_loss", p.support_loss, p.steps * p.tasks, 4, true);
    add("query_loss", p.query_loss, p.tasks, 4, true);
    add("query_accuracy", p.query_accuracy, p.tasks, 4, true);
    add("logits", p.logits, query * p.shape.ways, 4, true);
    add("adapted", p.adapted, p.tasks * p.parameters, 4, true);
    add("counts", p.counts, p.tasks * p.parameters, 1, true);
    add("grads", p.grads, p.tasks * p.parameters, 4, true);
    add("rate_grads", p.rate_grads, p.tasks * rates, 4, true);
    add("nonfinite", p.nonfinite, p.tasks, 1, true);
}
#endif

void conv_meta_step_cuda(const Addresses& addresses, const py::dict& entries, std::int64_t tasks, int support,
                         int query, int steps, const std::string& method, const std::string& precision, int device,
                         std::uintptr_t stream, bool by_covariance, std::int64_t workspace_limit, bool rates_by_element,
                         bool learns_rates, double sharpness_rho, const std::string& sharpness_norm,
                         bool sharpness_adaptive, bool counts_steps) {
    const ConvShape shape = conv_shape_of(entries);
    const Method of_steps = method_of(method);
    const StepOptions how = step_options_of({rates_by_element, /*by_step=*/true, learns_rates}, sharpness_rho,
                                            sharpness_norm, sharpness_adaptive, counts_steps, of_steps, steps);
    const ConvSizes sizes{tasks, support, query, steps, of_steps, how};
    sizes.check();
    const ConvPrecision of_products = conv_precision_of(precision);
    const ConvMetaStepParams<float> params = conv_params_of<float>(addresses, shape, sizes);
    check_present(params);
#ifdef SIGNMAML_EMULATION
    declare(params, plan_conv_meta_step(shape, conv_request(params), of_products, by_covariance, workspace_limit));
#endif
    const py::gil_scoped_release unlocked;
    launch_conv_meta_step(params, of_products, by_covariance, workspace_limit, device, reinterpret_cast<void*>(stream));
}
#endif  // SIGNMAML_WITH_CUDA

}  // namespace

void define_conv(py::module_& m) {
    using py::literals::operator""_a;
    m.def("plan_conv_meta_step_cpu", &plan_cpu, "shape"_a, "tasks"_a, "support"_a, "query"_a, "scalar_bytes"_a,
          "threads"_a, "steps"_a = 0, "method"_a = "sign-maml", "rates_by_element"_a = false, "rates_by_step"_a = true,
          "learns_rates"_a = false, "sharpness_rho"_a = 0.0, "counts_steps"_a = false, "with_blocks"_a = false);
    m.def("conv_meta_step_cpu", &conv_meta_step_cpu, "addresses"_a, "shape"_a, py::kw_only(), "tasks"_a, "support"_a,
          "query"_a, "steps"_a, "method"_a, "is_double"_a, "threads"_a, "skip_nonfinite"_a = false,
          "rates_by_element"_a = false, "rates_by_step"_a = true, "learns_rates"_a = false, "sharpness_rho"_a = 0.0,
          "sharpness_norm"_a = "l2", "sharpness_adaptive"_a = false, "counts_steps"_a = false);
    m.def("plan_conv_meta_step", &plan_cuda, "shape"_a, "tasks"_a, "support"_a, "query"_a, "steps"_a, "precision"_a,
          "multiprocessors"_a, "wants_grads"_a = true, "wants_adapted"_a = false, "by_covariance"_a = true,
          "workspace_limit"_a = 0, "method"_a = "sign-maml", "rates_by_element"_a = false, "learns_rates"_a = false,
          "sharpness_rho"_a = 0.0, "sharpness_norm"_a = "l2", "sharpness_adaptive"_a = false, "counts_steps"_a = false);
#ifdef SIGNMAML_WITH_CUDA
    m.def("conv_meta_step_cuda", &conv_meta_step_cuda, "addresses"_a, "shape"_a, py::kw_only(), "tasks"_a, "support"_a,
          "query"_a, "steps"_a, "method"_a, "precision"_a, "device"_a, "stream"_a, "by_covariance"_a = true,
          "workspace_limit"_a = 0, "rates_by_element"_a = false, "learns_rates"_a = false, "sharpness_rho"_a = 0.0,
          "sharpness_norm"_a = "l2", "sharpness_adaptive"_a = false, "counts_steps"_a = false);
#endif
}

}  // namespace signmaml::bindings
