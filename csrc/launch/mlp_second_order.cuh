// The definition of launch_mlp_second_order. One file per scalar type instantiates it, because both in one compile
// slowly.
#pragma once

#include "kernels/mlp_second_order.cuh"
#include "launch/device.cuh"
#include "launch/launch.h"
#include "plan/mlp_meta_step.h"

namespace signmaml {

template <typename Scalar>
void launch_mlp_second_order(const MlpMetaStepParams<Scalar>& params, int device, void* stream) {
    const DeviceScope scope(device);
    const std::int64_t support = params.support.count, query = params.query.count;
    const MlpPlan plan = plan_mlp_meta_step(params.shape, params.tasks, support, query, params.steps, params.method,
                                            sizeof(Scalar), multiprocessors(device));
    const MlpLayout layout = mlp_layout(params.shape, larger(support, query), plan.threads);
    const MlpSecondOrderLayout places = mlp_second_order_layout(layout, params.steps);
    const auto kernel = plan.in_shared ? mlp_second_order_kernel<Scalar, true> : mlp_second_order_kernel<Scalar, false>;
    launch("mlp_second_order_kernel", kernel, dim3(static_cast<unsigned>(plan.teams)), plan.threads, plan.shared_bytes,
           static_cast<cudaStream_t>(stream), params, layout, places);
}

}  // namespace signmaml
