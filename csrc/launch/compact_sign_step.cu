#include "kernels/compact_sign_step.cuh"

#include "launch/device.cuh"
#include "launch/launch.h"
#include "plan/compact_sign_step.h"

namespace signmaml {
namespace {

template <typename Scalar, int kVector>
auto kernel_for(bool plain) {
    return plain ? compact_sign_step_kernel<Scalar, kVector, kSignStepBlock, kSignStepUnroll, true>
                 : compact_sign_step_kernel<Scalar, kVector, kSignStepBlock, kSignStepUnroll, false>;
}

}  // namespace

template <typename Scalar>
void launch_compact_sign_step(const CompactSignStepParams<Scalar>& params, int device, void* stream) {
    if (params.tasks == 0 || params.parameters == 0) return;
    const DeviceScope scope(device);
    const SignStepGrid plan = plan_compact_sign_step(
        params.tasks, params.parameters, sizeof(Scalar), reinterpret_cast<std::uintptr_t>(params.params),
        reinterpret_cast<std::uintptr_t>(params.grads), reinterpret_cast<std::uintptr_t>(params.counts),
        multiprocessors(device));
    const bool plain = params.lr_spread == Spread::kAll;
    constexpr int kWide = 16 / sizeof(Scalar);
    const auto kernel = plan.vector == kWide ? kernel_for<Scalar, kWide>(plain) : kernel_for<Scalar, 1>(plain);
    const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
    launch("compact_sign_step_kernel", kernel, grid, plan.block, 0, static_cast<cudaStream_t>(stream), params);
}

template void launch_compact_sign_step<float>(const CompactSignStepParams<float>&, int, void*);
template void launch_compact_sign_step<double>(const CompactSignStepParams<double>&, int, void*);

}  // namespace signmaml
