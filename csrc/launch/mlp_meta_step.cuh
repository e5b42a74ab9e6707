// The definition of launch_mlp_meta_step. One file per scalar type instantiates it, because both in one compile slowly.
#pragma once

#include "kernels/mlp_meta_step.cuh"
#include "launch/device.cuh"
#include "launch/launch.h"
#include "plan/mlp_meta_step.h"

namespace signmaml {

template <typename Scalar, bool kWarp>
auto mlp_kernel_for(bool in_shared) {
    return in_shared ? mlp_meta_step_kernel<Scalar, kWarp, true> : mlp_meta_step_kernel<Scalar, kWarp, false>;
}

template <typename Scalar>
void launch_mlp_meta_step(const MlpMetaStepParams<Scalar>& params, int device, void* stream) {
    if (params.tasks == 0) return;
    // Without a gradient no step is differentiated.
    const std::int64_t asked = params.grads != nullptr ? params.query.count : 0;
    if (mlp_is_second_order(params.method, asked, params.steps, params.how)) {
        return launch_mlp_second_order(params, device, stream);
    }
    const DeviceScope scope(device);
    const MlpPlan plan =
        plan_mlp_meta_step(params.shape, params.tasks, params.support.count, params.query.count, params.steps,
                           params.method, params.how, sizeof(Scalar), multiprocessors(device));
    const MlpLayout layout = mlp_layout(params.shape, larger(params.support.count, params.query.count), plan.threads);
    const auto kernel = plan.threads == 32 ? mlp_kernel_for<Scalar, true>(plan.in_shared)
                                           : mlp_kernel_for<Scalar, false>(plan.in_shared);
    launch("mlp_meta_step_kernel", kernel, dim3(static_cast<unsigned>(plan.teams)), plan.threads, plan.shared_bytes,
           static_cast<cudaStream_t>(stream), params, layout);
}

}  // namespace signmaml
