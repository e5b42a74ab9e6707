// The definition of launch_mlp_second_order. One file per scalar type instantiates it, because both in one compile
// slowly.
#pragma once

#include "kernels/mlp_second_order.cuh"
#include "launch/device.cuh"
#include "launch/launch.h"
#include "plan/mlp_meta_step.h"

namespace signmaml {

template <typename Scalar, bool kKeeps>
auto mlp_second_order_for(bool in_shared) {
    return in_shared ? mlp_second_order_kernel<Scalar, true, kKeeps> : mlp_second_order_kernel<Scalar, false, kKeeps>;
}

template <typename Scalar>
void launch_mlp_second_order(const MlpMetaStepParams<Scalar>& params, int device, void* stream) {
    const DeviceScope scope(device);
    const std::int64_t support = params.support.count, query = params.query.count;
    const MlpPlan plan = plan_mlp_meta_step(params.shape, params.tasks, support, query, params.steps, params.method,
                                            params.how, sizeof(Scalar), multiprocessors(device));
    const MlpLayout layout = mlp_layout(params.shape, larger(support, query), plan.threads);
    const MlpSecondOrderLayout places = mlp_second_order_layout(layout, params.method, query, params.steps, params.how);
    const auto kernel = params.how.climbs() || params.how.counted ? mlp_second_order_for<Scalar, true>(plan.in_shared)
                                                                  : mlp_second_order_for<Scalar, false>(plan.in_shared);
    launch("mlp_second_order_kernel", kernel, dim3(static_cast<unsigned>(plan.teams)), plan.threads, plan.shared_bytes,
           static_cast<cudaStream_t>(stream), params, layout, places);
}

}  // namespace signmaml
