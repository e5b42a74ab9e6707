#include "kernels/sign_step.cuh"

#include "launch/device.cuh"
#include "launch/launch.h"
#include "plan/sign_step.h"

namespace signmaml {
namespace {

template <typename Scalar, int kVector>
auto kernel_for(bool plain) {
    return plain ? sign_step_kernel<Scalar, kVector, kSignStepBlock, kSignStepUnroll, true>
                 : sign_step_kernel<Scalar, kVector, kSignStepBlock, kSignStepUnroll, false>;
}

}  // namespace

template <typename Scalar>
void launch_sign_step(const SignStepParams<Scalar>& params, int device, void* stream) {
    if (params.tasks == 0 || params.parameters == 0) return;
    const DeviceScope scope(device);
    const SignStepGrid plan =
        plan_sign_step(params.tasks, params.parameters, sizeof(Scalar), reinterpret_cast<std::uintptr_t>(params.params),
                       reinterpret_cast<std::uintptr_t>(params.grads), multiprocessors(device));
    const bool plain = params.lr_spread == Spread::kAll && params.mask_spread == Spread::kNone;
    constexpr int kWide = 16 / sizeof(Scalar);
    const auto kernel = plan.vector == kWide ? kernel_for<Scalar, kWide>(plain) : kernel_for<Scalar, 1>(plain);
    const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
    launch("sign_step_kernel", kernel, grid, plan.block, 0, static_cast<cudaStream_t>(stream), params);
}

template void launch_sign_step<float>(const SignStepParams<float>&, int, void*);
template void launch_sign_step<double>(const SignStepParams<double>&, int, void*);

}  // namespace signmaml
