#include "kernels/meta_accumulate.cuh"

#include "launch/device.cuh"
#include "launch/launch.h"
#include "plan/meta_accumulate.h"

namespace signmaml {
namespace {

template <typename Scalar, int kVector>
auto kernel_for(bool skip) {
    return skip ? meta_accumulate_kernel<Scalar, kVector, kMetaAccumulateUnroll, true>
                : meta_accumulate_kernel<Scalar, kVector, kMetaAccumulateUnroll, false>;
}

// Uses the grid of a sign step, which also visits every row once. Each row is aligned separately, so vectors always
// fit.
template <typename Scalar>
void launch_flag_nonfinite(const MetaAccumulateParams<Scalar>& params, int device, cudaStream_t stream) {
    const auto address = reinterpret_cast<std::uintptr_t>(params.grads);
    const SignStepGrid plan =
        plan_sign_step(params.tasks, params.parameters, sizeof(Scalar), address, address, multiprocessors(device));
    const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
    launch("flag_nonfinite_kernel", flag_nonfinite_kernel<Scalar, 16 / sizeof(Scalar)>, grid, plan.block, 0, stream,
           params);
}

}  // namespace

template <typename Scalar>
void launch_meta_accumulate(const MetaAccumulateParams<Scalar>& params, int device, void* raw_stream) {
    if (params.tasks == 0 || params.parameters == 0) return;
    const DeviceScope scope(device);
    const auto stream = static_cast<cudaStream_t>(raw_stream);
    if (params.skip_nonfinite) launch_flag_nonfinite(params, device, stream);
    const MetaAccumulateGrid plan = plan_meta_accumulate(
        params.tasks, params.parameters, sizeof(Scalar), reinterpret_cast<std::uintptr_t>(params.out),
        reinterpret_cast<std::uintptr_t>(params.grads), multiprocessors(device));
    constexpr int kWide = 16 / sizeof(Scalar);
    const auto kernel = plan.vector == kWide ? kernel_for<Scalar, kWide>(params.skip_nonfinite)
                                             : kernel_for<Scalar, 1>(params.skip_nonfinite);
    launch("meta_accumulate_kernel", kernel, dim3(static_cast<unsigned>(plan.blocks)), plan.block, 0, stream, params,
           plan.head, plan.bodies);
}

template void launch_meta_accumulate<float>(const MetaAccumulateParams<float>&, int, void*);
template void launch_meta_accumulate<double>(const MetaAccumulateParams<double>&, int, void*);

}  // namespace signmaml
