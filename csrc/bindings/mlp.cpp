#include "bindings/mlp.h"

#include <pybind11/stl.h>

#include <algorithm>
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
#include "cpu/dispatch.h"
#include "cpu/mlp_table.h"
#include "cpu/ops.h"
#include "launch/launch.h"
#include "plan/mlp_meta_step.h"
#include "plan/mlp_meta_step_cpu.h"

namespace py = pybind11;

namespace signmaml::bindings {
namespace {

// The widest layer allowed. Wider ones fit no machine and would overflow what is computed from them.
constexpr int kMlpWidest = 1 << 20;

MlpShape shape_of(const std::vector<int>& widths, const std::string& activation, const std::string& loss) {
    const int layers = static_cast<int>(widths.size()) - 1;
    if (layers < 2 || layers > kMlpLayers) {
        throw std::invalid_argument("widths: expected 3 to " + std::to_string(kMlpLayers + 1) + " of them, found " +
                                    std::to_string(widths.size()));
    }
    if (activation != "relu" && activation != "tanh") {
        throw std::invalid_argument("activation: expected 'relu' or 'tanh', found '" + activation + "'");
    }
    if (loss != "mse" && loss != "cross_entropy") {
        throw std::invalid_argument("loss: expected 'mse' or 'cross_entropy', found '" + loss + "'");
    }
    MlpShape shape{};
    shape.layers = layers;
    for (int i = 0; i <= layers; ++i) {
        if (widths[i] < 1 || widths[i] > kMlpWidest) {
            throw std::invalid_argument("widths: expected 1 to " + std::to_string(kMlpWidest) + ", found " +
                                        std::to_string(widths[i]));
        }
        shape.widths[i] = widths[i];
    }
    shape.activation = activation == "relu" ? Activation::kRelu : Activation::kTanh;
    shape.loss = loss == "mse" ? MlpLoss::kMse : MlpLoss::kCrossEntropy;
    return shape;
}

// Checks the sizes from which a plan or the parameters are made.
void check_sizes(const MlpShape& shape, std::int64_t tasks, std::int64_t support, std::int64_t query,
                 std::int64_t steps) {
    check_product("tasks, support, widths", {tasks, larger(support, 1), kMlpLayers * std::int64_t{kMlpWidest}});
    check_product("tasks, query, widths", {tasks, larger(query, 1), kMlpLayers * std::int64_t{kMlpWidest}});
    check_product("tasks, parameters", {tasks, mlp_parameters(shape), std::int64_t{sizeof(double)}});
    check_product("tasks, steps, parameters",
                  {larger(tasks, 1), steps, mlp_parameters(shape), 8 * std::int64_t{sizeof(double)}});
    check_product("support, query", {support});
    check_product("support, query", {query});
}

py::dict plan(const std::vector<int>& widths, std::int64_t tasks, std::int64_t support, std::int64_t query,
              int scalar_bytes, int multiprocessors, std::int64_t steps, const std::string& method,
              bool rates_by_element, bool learns_rates, double sharpness_rho, const std::string& sharpness_norm,
              bool sharpness_adaptive, bool counts_steps) {
    using py::literals::operator""_a;
    const MlpShape shape = shape_of(widths, "relu", "mse");
    check_scalar_bytes(scalar_bytes);
    check_at_least_one("multiprocessors", multiprocessors);
    check_sizes(shape, tasks, support, query, steps);
    const Method of_steps = method_of(method);
    const StepOptions how = step_options_of({rates_by_element, /*by_step=*/true, learns_rates}, sharpness_rho,
                                            sharpness_norm, sharpness_adaptive, counts_steps, of_steps, steps);
    const MlpPlan plan =
        plan_mlp_meta_step(shape, tasks, support, query, steps, of_steps, how, scalar_bytes, multiprocessors);
    return py::dict("threads"_a = plan.threads, "in_shared"_a = plan.in_shared, "teams"_a = plan.teams,
                    "shared_bytes"_a = plan.shared_bytes, "workspace_scalars"_a = plan.workspace_scalars,
                    "parameters"_a = mlp_parameters(shape));
}

struct MlpSizes {
    std::int64_t tasks;
    int support, query, steps;
    Method method;
    StepOptions how;
};

template <typename Scalar>
MlpMetaStepParams<Scalar> as_params(const Addresses& addresses, const MlpShape& shape, const MlpSizes& sizes) {
    const auto scalars = [&addresses](const char* name) { return address_in<Scalar>(addresses, name); };
    const auto labels = [&addresses](const char* name) { return address_in<const std::int64_t>(addresses, name); };
    MlpMetaStepParams<Scalar> p{};
    p.theta = scalars("theta");
    p.support = {scalars("support_x"), scalars("support_target"), labels("support_labels"), sizes.support};
    p.query = {scalars("query_x"), scalars("query_target"), labels("query_labels"), sizes.query};
    p.lr = scalars("lr");
    p.adapt = address_in<const std::uint8_t>(addresses, "adapt");
    p.support_loss = scalars("support_loss");
    p.query_loss = scalars("query_loss");
    p.query_accuracy = scalars("query_accuracy");
    p.predictions = scalars("predictions");
    p.adapted = scalars("adapted");
    p.grads = scalars("grads");
    p.rate_grads = scalars("rate_grads");
    p.counts = address_in<std::int8_t>(addresses, "counts");
    p.nonfinite = address_in<std::uint8_t>(addresses, "nonfinite");
    p.workspace = scalars("workspace");
    p.tasks = sizes.tasks;
    p.parameters = mlp_parameters(shape);
    p.steps = sizes.steps;
    p.method = sizes.method;
    p.how = sizes.how;
    p.shape = shape;
    return p;
}

MlpCpuPlan plan_on_cpu(const MlpShape& shape, std::int64_t tasks, std::int64_t support, std::int64_t query,
                       std::int64_t steps, Method method, const StepOptions& how, int scalar_bytes, int threads) {
    const auto plan_for = [&](const auto& stages) {
        return plan_mlp_meta_step_cpu(shape, tasks, support, query, steps, method, how, scalar_bytes, stages.wide.lanes,
                                      stages.narrow.lanes, threads);
    };
    if (scalar_bytes == sizeof(double)) return plan_for(cpu::mlp_stages<double>(cpu::kernels()));
    if (scalar_bytes == sizeof(float)) return plan_for(cpu::mlp_stages<float>(cpu::kernels()));
    throw std::invalid_argument("scalar_bytes: expected 4 or 8, found " + std::to_string(scalar_bytes));
}

py::dict plan_cpu(const std::vector<int>& widths, std::int64_t tasks, std::int64_t support, std::int64_t query,
                  int scalar_bytes, int threads, std::int64_t steps, const std::string& method, bool rates_by_element,
                  bool rates_by_step, bool learns_rates, double sharpness_rho, bool counts_steps) {
    using py::literals::operator""_a;
    const MlpShape shape = shape_of(widths, "relu", "mse");
    const Method of_steps = method_of(method);
    const StepOptions how = step_options_of({rates_by_element, rates_by_step, learns_rates}, sharpness_rho, "l2", false,
                                            counts_steps, of_steps, steps);
    check_sizes(shape, tasks, support, query, steps);
    check_at_least_one("threads", threads);
    const MlpCpuPlan plan = plan_on_cpu(shape, tasks, support, query, steps, of_steps, how, scalar_bytes, threads);
    return py::dict("lanes"_a = plan.lanes, "groups"_a = plan.groups, "slots"_a = plan.slots, "within"_a = plan.within,
                    "workspace_scalars"_a = plan.workspace_scalars, "mean_rows"_a = plan.mean_rows);
}

template <typename Scalar>
void run_cpu(const Addresses& addresses, const MlpShape& shape, const MlpSizes& sizes, bool skip_nonfinite,
             int threads) {
    const MlpMetaStepParams<Scalar> params = as_params<Scalar>(addresses, shape, sizes);
    const auto mean = mean_of<Scalar>(addresses, sizes.query, params.grads, skip_nonfinite);
    const py::gil_scoped_release unlocked;
    cpu::mlp_meta_step(params, mean, threads);
}

void mlp_meta_step_cpu(const Addresses& addresses, const std::vector<int>& widths, const std::string& activation,
                       const std::string& loss, std::int64_t tasks, int support, int query, int steps,
                       const std::string& method, bool is_double, int threads, bool skip_nonfinite,
                       bool rates_by_element, bool rates_by_step, bool learns_rates, double sharpness_rho,
                       const std::string& sharpness_norm, bool sharpness_adaptive, bool counts_steps) {
    const MlpShape shape = shape_of(widths, activation, loss);
    const Method of_steps = method_of(method);
    const StepOptions how = step_options_of({rates_by_element, rates_by_step, learns_rates}, sharpness_rho,
                                            sharpness_norm, sharpness_adaptive, counts_steps, of_steps, steps);
    const MlpSizes sizes{tasks, support, query, steps, of_steps, how};
    if (threads < 1) throw std::invalid_argument("threads: expected at least 1, found " + std::to_string(threads));
    if (is_double) {
        run_cpu<double>(addresses, shape, sizes, skip_nonfinite, threads);
    } else {
        run_cpu<float>(addresses, shape, sizes, skip_nonfinite, threads);
    }
}

#ifdef SIGNMAML_WITH_CUDA
#ifdef SIGNMAML_EMULATION
template <typename Scalar>
void declare(const MlpMetaStepParams<Scalar>& p, std::int64_t workspace_scalars) {
    auto& buffers = emulation::settings().buffers;
    buffers.clear();
    const auto add = [&buffers](const char* name, const void* address, std::int64_t count, std::int64_t bytes,
                                bool writable, bool output = false) {
        if (address != nullptr) {
            const auto at = reinterpret_cast<std::uintptr_t>(address);
            buffers.push_back({name, at, count * bytes, bytes, writable, output});
        }
    };
    const auto scalar = static_cast<std::int64_t>(sizeof(Scalar));
    const std::int64_t in = p.shape.widths[0], out = p.shape.widths[p.shape.layers];
    const std::int64_t support = p.tasks * p.support.count, query = p.tasks * p.query.count;
    add("theta", p.theta, p.parameters, scalar, false);
    add("support_x", p.support.x, support * in, scalar, false);
    add("support_target", p.support.target, support * out, scalar, false);
    add("support_labels", p.support.labels, support, 8, false);
    add("query_x", p.query.x, query * in, scalar, false);
    add("query_target", p.query.target, query * out, scalar, false);
    add("query_labels", p.query.labels, query, 8, false);
    const std::int64_t rates = p.steps * p.how.rates.of_row(p.parameters, 2 * p.shape.layers);
    add("lr", p.lr, rates, scalar, false);
    add("adapt", p.adapt, 2 * p.shape.layers, 1, false);
    add("support_loss", p.support_loss, p.steps * p.tasks, scalar, true, true);
    add("query_loss", p.query_loss, p.tasks, scalar, true, true);
    add("query_accuracy", p.query_accuracy, p.tasks, scalar, true, true);
    add("predictions", p.predictions, query * out, scalar, true, true);
    add("adapted", p.adapted, p.tasks * p.parameters, scalar, true, true);
    add("counts", p.counts, p.tasks * p.parameters, 1, true, true);
    add("grads", p.grads, p.tasks * p.parameters, scalar, true, true);
    add("rate_grads", p.rate_grads, p.tasks * rates, scalar, true, true);
    add("nonfinite", p.nonfinite, p.tasks, 1, true);
    add("workspace", p.workspace, workspace_scalars, scalar, true, true);
}
#endif

template <typename Scalar>
void launch(const Addresses& addresses, const MlpShape& shape, const MlpSizes& sizes, int device,
            std::uintptr_t stream) {
    MlpMetaStepParams<Scalar> params = as_params<Scalar>(addresses, shape, sizes);
    // What is 0 in float was a radius to the plan, so it must be one to the kernel.
    constexpr Scalar kSmallest = std::numeric_limits<Scalar>::min();
    if (params.how.climbs()) params.rho = std::max(static_cast<Scalar>(params.how.sharpness.rho), kSmallest);
#ifdef SIGNMAML_EMULATION
    declare(params, plan_mlp_meta_step(shape, sizes.tasks, sizes.support, sizes.query, sizes.steps, sizes.method,
                                       sizes.how, sizeof(Scalar), multiprocessors(device))
                        .workspace_scalars);
#endif
    const py::gil_scoped_release unlocked;
    launch_mlp_meta_step(params, device, reinterpret_cast<void*>(stream));
}

void mlp_meta_step_cuda(const Addresses& addresses, const std::vector<int>& widths, const std::string& activation,
                        const std::string& loss, std::int64_t tasks, int support, int query, int steps,
                        const std::string& method, bool is_double, int device, std::uintptr_t stream,
                        bool rates_by_element, bool learns_rates, double sharpness_rho,
                        const std::string& sharpness_norm, bool sharpness_adaptive, bool counts_steps) {
    const MlpShape shape = shape_of(widths, activation, loss);
    const Method of_steps = method_of(method);
    const StepOptions how = step_options_of({rates_by_element, /*by_step=*/true, learns_rates}, sharpness_rho,
                                            sharpness_norm, sharpness_adaptive, counts_steps, of_steps, steps);
    const MlpSizes sizes{tasks, support, query, steps, of_steps, how};
    if (is_double) {
        launch<double>(addresses, shape, sizes, device, stream);
    } else {
        launch<float>(addresses, shape, sizes, device, stream);
    }
}
#endif  // SIGNMAML_WITH_CUDA

}  // namespace

void define_mlp(py::module_& m) {
    using py::literals::operator""_a;
    m.def("plan_mlp_meta_step", &plan, "widths"_a, "tasks"_a, "support"_a, "query"_a, "scalar_bytes"_a,
          "multiprocessors"_a, "steps"_a = 0, "method"_a = "sign-maml", "rates_by_element"_a = false,
          "learns_rates"_a = false, "sharpness_rho"_a = 0.0, "sharpness_norm"_a = "l2", "sharpness_adaptive"_a = false,
          "counts_steps"_a = false);
    m.def("plan_mlp_meta_step_cpu", &plan_cpu, "widths"_a, "tasks"_a, "support"_a, "query"_a, "scalar_bytes"_a,
          "threads"_a, "steps"_a = 0, "method"_a = "sign-maml", "rates_by_element"_a = false, "rates_by_step"_a = true,
          "learns_rates"_a = false, "sharpness_rho"_a = 0.0, "counts_steps"_a = false);
    m.def("mlp_meta_step_cpu", &mlp_meta_step_cpu, "addresses"_a, "widths"_a, "activation"_a, "loss"_a, "tasks"_a,
          "support"_a, "query"_a, "steps"_a, "method"_a, "is_double"_a, "threads"_a, "skip_nonfinite"_a = false,
          "rates_by_element"_a = false, "rates_by_step"_a = true, "learns_rates"_a = false, "sharpness_rho"_a = 0.0,
          "sharpness_norm"_a = "l2", "sharpness_adaptive"_a = false, "counts_steps"_a = false);
#ifdef SIGNMAML_WITH_CUDA
    m.def("multiprocessors", &multiprocessors, "device"_a);
    m.def("mlp_meta_step_cuda", &mlp_meta_step_cuda, "addresses"_a, "widths"_a, "activation"_a, "loss"_a, "tasks"_a,
          "support"_a, "query"_a, "steps"_a, "method"_a, "is_double"_a, "device"_a, "stream"_a,
          "rates_by_element"_a = false, "learns_rates"_a = false, "sharpness_rho"_a = 0.0, "sharpness_norm"_a = "l2",
          "sharpness_adaptive"_a = false, "counts_steps"_a = false);
#endif
}

}  // namespace signmaml::bindings
