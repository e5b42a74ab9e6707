// The Python module signmaml_ext._C and, on the emulated GPU, the tests' _emulated: functions take addresses, sizes and
// a stream, and write their results to memory. signmaml_ext/ops.py has checked shapes, types and devices; the checks
// here need addresses or the contents of host memory.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#ifdef SIGNMAML_EMULATION
#include "bindings/emulation.h"
#endif
#include "bindings/conv.h"
#include "bindings/layers.h"
#include "bindings/mlp.h"
#include "build_info.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "launch/launch.h"
#include "plan/compact_sign_step.h"
#include "plan/meta_accumulate.h"
#include "plan/sign_step.h"

namespace py = pybind11;

namespace signmaml::bindings {
namespace {

using Address = std::uintptr_t;

// The arguments of both backends of sign_step_. `..._entries` count elements; an absent tensor has address and count 0.
struct SignStepArguments {
    Address params, grads, lr, segment_offsets, mask, nonfinite;
    std::int64_t tasks, parameters, lr_entries, mask_entries, segments;

    template <typename Scalar>
    SignStepParams<Scalar> as_params() const {
        return {reinterpret_cast<Scalar*>(params),
                reinterpret_cast<const Scalar*>(grads),
                reinterpret_cast<const Scalar*>(lr),
                reinterpret_cast<const std::int64_t*>(segment_offsets),
                reinterpret_cast<const std::uint8_t*>(mask),
                reinterpret_cast<std::uint8_t*>(nonfinite),
                tasks,
                parameters,
                segments,
                spread_of(lr_entries, parameters, segments),
                mask == 0 ? Spread::kNone : spread_of(mask_entries, parameters, segments)};
    }

    void check(std::int64_t scalar_bytes) const {
        check_product("tasks, parameters", {tasks, parameters, scalar_bytes});
        check_product("lr", {lr_entries, scalar_bytes});
        check_product("mask", {mask_entries});
        check_product("segments", {segments, std::int64_t{sizeof(std::int64_t)}});
        const std::int64_t bytes = tasks * parameters * scalar_bytes;
        const std::int64_t offset_bytes = segments > 0 ? (segments + 1) * std::int64_t{sizeof(std::int64_t)} : 0;
        check_apart({{"params", params, bytes, scalar_bytes}, {"nonfinite", nonfinite, tasks, 1}},
                    {{"grads", grads, bytes, scalar_bytes},
                     {"lr", lr, lr_entries * scalar_bytes, scalar_bytes},
                     {"segment_offsets", segment_offsets, offset_bytes, sizeof(std::int64_t)},
                     {"mask", mask, mask_entries, 1}});
    }
};

// Like SignStepArguments, with counts and theta and without a mask.
struct CompactSignStepArguments {
    Address counts, params, theta, grads, lr, segment_offsets, nonfinite;
    std::int64_t tasks, parameters, lr_entries, segments;

    template <typename Scalar>
    CompactSignStepParams<Scalar> as_params() const {
        return {reinterpret_cast<std::int8_t*>(counts),
                reinterpret_cast<Scalar*>(params),
                reinterpret_cast<const Scalar*>(theta),
                reinterpret_cast<const Scalar*>(grads),
                reinterpret_cast<const Scalar*>(lr),
                reinterpret_cast<const std::int64_t*>(segment_offsets),
                reinterpret_cast<std::uint8_t*>(nonfinite),
                tasks,
                parameters,
                segments,
                spread_of(lr_entries, parameters, segments)};
    }

    void check(std::int64_t scalar_bytes) const {
        const std::int64_t bytes = tasks * parameters * scalar_bytes;
        const std::int64_t offset_bytes = segments > 0 ? (segments + 1) * std::int64_t{sizeof(std::int64_t)} : 0;
        check_apart({{"counts", counts, tasks * parameters, 1},
                     {"params", params, bytes, scalar_bytes, true},
                     {"nonfinite", nonfinite, tasks, 1}},
                    {{"theta", theta, parameters * scalar_bytes, scalar_bytes},
                     {"grads", grads, bytes, scalar_bytes},
                     {"lr", lr, lr_entries * scalar_bytes, scalar_bytes},
                     {"segment_offsets", segment_offsets, offset_bytes, sizeof(std::int64_t)}});
    }
};

struct MetaAccumulateArguments {
    Address out, grads, nonfinite;
    std::int64_t tasks, parameters;
    bool skip_nonfinite;

    template <typename Scalar>
    MetaAccumulateParams<Scalar> as_params() const {
        return {reinterpret_cast<Scalar*>(out),
                reinterpret_cast<const Scalar*>(grads),
                reinterpret_cast<std::uint8_t*>(nonfinite),
                tasks,
                parameters,
                skip_nonfinite};
    }

    void check(std::int64_t scalar_bytes) const {
        check_product("tasks, parameters", {tasks, parameters, scalar_bytes});
        check_apart({{"out", out, parameters * scalar_bytes, scalar_bytes}, {"nonfinite", nonfinite, tasks, 1}},
                    {{"grads", grads, tasks * parameters * scalar_bytes, scalar_bytes}});
    }
};

// Checks the arguments, releases the GIL, and calls `work` with the struct of the right precision.
template <typename Arguments, typename Work>
void with_params(const Arguments& arguments, bool is_double, const Work& work) {
    arguments.check(is_double ? sizeof(double) : sizeof(float));
    const py::gil_scoped_release unlocked;
    if (is_double) {
        work(arguments.template as_params<double>());
    } else {
        work(arguments.template as_params<float>());
    }
}

void sign_step_cpu(Address params, Address grads, Address lr, Address segment_offsets, Address mask, Address nonfinite,
                   std::int64_t tasks, std::int64_t parameters, std::int64_t lr_entries, std::int64_t mask_entries,
                   std::int64_t segments, bool is_double, int threads) {
    const SignStepArguments arguments{params, grads,      lr,         segment_offsets, mask,    nonfinite,
                                      tasks,  parameters, lr_entries, mask_entries,    segments};
    with_params(arguments, is_double, [threads](const auto& p) {
        if (p.segments > 0) check_segment_offsets(p.segment_offsets, p.segments, p.parameters);
        cpu::sign_step(p, threads);
    });
}

void compact_sign_step_cpu(Address counts, Address params, Address theta, Address grads, Address lr,
                           Address segment_offsets, Address nonfinite, std::int64_t tasks, std::int64_t parameters,
                           std::int64_t lr_entries, std::int64_t segments, bool is_double, int threads) {
    const CompactSignStepArguments arguments{counts,    params, theta,      grads,      lr,      segment_offsets,
                                             nonfinite, tasks,  parameters, lr_entries, segments};
    with_params(arguments, is_double, [threads](const auto& p) {
        if (p.segments > 0) check_segment_offsets(p.segment_offsets, p.segments, p.parameters);
        cpu::compact_sign_step(p, threads);
    });
}

void meta_accumulate_cpu(Address out, Address grads, Address nonfinite, std::int64_t tasks, std::int64_t parameters,
                         bool skip_nonfinite, bool is_double, int threads) {
    const MetaAccumulateArguments arguments{out, grads, nonfinite, tasks, parameters, skip_nonfinite};
    with_params(arguments, is_double, [threads](const auto& p) { cpu::meta_accumulate(p, threads); });
}

#ifdef SIGNMAML_WITH_CUDA
void sign_step_cuda(Address params, Address grads, Address lr, Address segment_offsets, Address mask, Address nonfinite,
                    std::int64_t tasks, std::int64_t parameters, std::int64_t lr_entries, std::int64_t mask_entries,
                    std::int64_t segments, bool is_double, int device, Address stream) {
    const SignStepArguments arguments{params, grads,      lr,         segment_offsets, mask,    nonfinite,
                                      tasks,  parameters, lr_entries, mask_entries,    segments};
    with_params(arguments, is_double,
                [device, stream](const auto& p) { launch_sign_step(p, device, reinterpret_cast<void*>(stream)); });
}

void compact_sign_step_cuda(Address counts, Address params, Address theta, Address grads, Address lr,
                            Address segment_offsets, Address nonfinite, std::int64_t tasks, std::int64_t parameters,
                            std::int64_t lr_entries, std::int64_t segments, bool is_double, int device,
                            Address stream) {
    const CompactSignStepArguments arguments{counts,    params, theta,      grads,      lr,      segment_offsets,
                                             nonfinite, tasks,  parameters, lr_entries, segments};
    with_params(arguments, is_double, [device, stream](const auto& p) {
        launch_compact_sign_step(p, device, reinterpret_cast<void*>(stream));
    });
}

void meta_accumulate_cuda(Address out, Address grads, Address nonfinite, std::int64_t tasks, std::int64_t parameters,
                          bool skip_nonfinite, bool is_double, int device, Address stream) {
    const MetaAccumulateArguments arguments{out, grads, nonfinite, tasks, parameters, skip_nonfinite};
    with_params(arguments, is_double, [device, stream](const auto& p) {
        launch_meta_accumulate(p, device, reinterpret_cast<void*>(stream));
    });
}
#endif

py::dict as_dict(const CpuPlan& plan) {
    using py::literals::operator""_a;
    return py::dict("chunk"_a = plan.chunk, "chunks_per_row"_a = plan.chunks_per_row, "items"_a = plan.items,
                    "threads"_a = plan.threads);
}

py::dict as_dict(const SignStepGrid& plan) {
    using py::literals::operator""_a;
    return py::dict("vector"_a = plan.vector, "block"_a = plan.block, "unroll"_a = plan.unroll,
                    "tiles_per_row"_a = plan.tiles_per_row, "blocks_x"_a = plan.blocks_x, "blocks_y"_a = plan.blocks_y);
}

py::dict as_dict(const MetaAccumulateGrid& plan) {
    using py::literals::operator""_a;
    return py::dict("vector"_a = plan.vector, "block"_a = plan.block, "unroll"_a = plan.unroll, "head"_a = plan.head,
                    "bodies"_a = plan.bodies, "tail"_a = plan.tail, "blocks"_a = plan.blocks);
}

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> words;
    std::stringstream stream(text);
    for (std::string word; std::getline(stream, word, ';');) words.push_back(word);
    return words;
}

void define_build_info(py::module_& m) {
    m.attr("version") = build_info::kVersion;
    m.attr("build_type") = build_info::kBuildType;
    m.attr("compiler") = build_info::kCompiler;
    m.attr("cuda_architectures") = py::tuple(py::cast(split(build_info::kCudaArchitectures)));
#ifdef SIGNMAML_WITH_CUDA
    m.attr("built_with_cuda") = true;
    m.attr("cuda_version") = build_info::kCudaVersion;
#else
    m.attr("built_with_cuda") = false;
    m.attr("cuda_version") = py::none();
#endif
}

void define_plans(py::module_& m) {
    m.def("plan_sign_step_cpu", [](std::int64_t tasks, std::int64_t parameters, int threads) {
        check_product("tasks, parameters", {tasks, parameters});
        check_at_least_one("threads", threads);
        return as_dict(plan_sign_step_cpu(tasks, parameters, threads));
    });
    m.def("plan_meta_accumulate_cpu", [](std::int64_t tasks, std::int64_t parameters, int threads) {
        check_product("tasks, parameters", {tasks, parameters});
        check_at_least_one("threads", threads);
        return as_dict(plan_meta_accumulate_cpu(tasks, parameters, threads));
    });
    m.def("plan_sign_step", [](std::int64_t tasks, std::int64_t parameters, int bytes, Address params, Address grads,
                               int multiprocessors) {
        check_scalar_bytes(bytes);
        check_product("tasks, parameters", {tasks, parameters});
        check_at_least_one("multiprocessors", multiprocessors);
        return as_dict(plan_sign_step(tasks, parameters, bytes, params, grads, multiprocessors));
    });
    m.def("plan_compact_sign_step", [](std::int64_t tasks, std::int64_t parameters, int bytes, Address params,
                                       Address grads, Address counts, int multiprocessors) {
        return as_dict(plan_compact_sign_step(tasks, parameters, bytes, params, grads, counts, multiprocessors));
    });
    m.def("plan_meta_accumulate",
          [](std::int64_t tasks, std::int64_t parameters, int bytes, Address out, Address grads, int multiprocessors) {
              check_scalar_bytes(bytes);
              check_product("tasks, parameters", {tasks, parameters});
              check_at_least_one("multiprocessors", multiprocessors);
              return as_dict(plan_meta_accumulate(tasks, parameters, bytes, out, grads, multiprocessors));
          });
}

}  // namespace

// The module keeps no state that needs the GIL.
PYBIND11_MODULE(SIGNMAML_MODULE, m, py::mod_gil_not_used()) {
    m.doc() = "Native core of signmaml_ext. Not a public interface: use signmaml_ext.ops.";
    define_build_info(m);
    define_plans(m);
    define_conv(m);
    define_conv_stages(m);
    define_layers(m);
    define_mlp(m);
    m.def("cpu_isas", &cpu::usable_isas);
    m.def("cpu_isa", [] { return std::string(cpu::kernels().name); });
    m.def("select_cpu_isa", &cpu::select_isa);
    m.def("sign_step_cpu", &sign_step_cpu);
    m.def("compact_sign_step_cpu", &compact_sign_step_cpu);
    m.def("meta_accumulate_cpu", &meta_accumulate_cpu);
#ifdef SIGNMAML_WITH_CUDA
#ifdef SIGNMAML_EMULATION
    define_emulation(m);
#else
    m.def("cuda_driver_version", &cuda_driver_version);
#endif
    m.def("sign_step_cuda", &sign_step_cuda);
    m.def("compact_sign_step_cuda", &compact_sign_step_cuda);
    m.def("meta_accumulate_cuda", &meta_accumulate_cuda);
#endif
}

}  // namespace signmaml::bindings
