// The three kernels on tensor cores, in one .cu file per precision: in a single file they would compile for minutes.
#pragma once

#include "launch/device.cuh"
#include "params/conv_kernels.h"
#include "plan/conv_meta_step.h"

namespace signmaml {

inline dim3 grid_of(const ConvLaunch& plan, std::int64_t tasks) {
    return dim3(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(tasks), static_cast<unsigned>(plan.grid_z));
}

template <ConvPrecision kPrecision, typename Stored>
void launch_conv_forward(const ConvForwardParams<Stored>& params, const ConvLaunch& plan, std::int64_t tasks,
                         cudaStream_t stream);

template <ConvPrecision kPrecision, typename Stored>
void launch_conv_data_grad(const ConvDataGradParams<Stored>& params, const ConvLaunch& plan, std::int64_t tasks,
                           cudaStream_t stream);

template <ConvPrecision kPrecision, typename Stored>
void launch_conv_weight_grad(const ConvWeightGradParams<Stored>& params, const ConvLaunch& plan, std::int64_t tasks,
                             cudaStream_t stream);

}  // namespace signmaml
