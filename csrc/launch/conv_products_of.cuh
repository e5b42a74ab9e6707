// The definitions for conv_products.cuh, which the file of each precision instantiates.
#pragma once

#include "kernels/conv_data_grad.cuh"
#include "kernels/conv_forward.cuh"
#include "kernels/conv_weight_grad.cuh"
#include "launch/conv_products.cuh"

namespace signmaml {

template <ConvPrecision kPrecision, typename Stored>
void launch_conv_forward(const ConvForwardParams<Stored>& params, const ConvLaunch& plan, std::int64_t tasks,
                         cudaStream_t stream) {
    const int columns = conv_columns(params.layer.block.filters);
    const auto kernel = columns == 8    ? conv_forward_kernel<kPrecision, 1>
                        : columns == 32 ? conv_forward_kernel<kPrecision, 4>
                                        : conv_forward_kernel<kPrecision, 8>;
    launch("conv_forward_kernel", kernel, grid_of(plan, tasks), plan.threads, plan.shared_bytes, stream, params);
}

template <ConvPrecision kPrecision, int kStride, typename Stored>
auto data_grad_kernel_for(int columns) {
    return columns == 8    ? conv_data_grad_kernel<kPrecision, 1, kStride>
           : columns == 32 ? conv_data_grad_kernel<kPrecision, 4, kStride>
                           : conv_data_grad_kernel<kPrecision, 8, kStride>;
}

template <ConvPrecision kPrecision, typename Stored>
void launch_conv_data_grad(const ConvDataGradParams<Stored>& params, const ConvLaunch& plan, std::int64_t tasks,
                           cudaStream_t stream) {
    const int columns = conv_columns(params.layer.block.in_channels);
    const auto kernel = params.layer.block.stride == 1 ? data_grad_kernel_for<kPrecision, 1, Stored>(columns)
                                                       : data_grad_kernel_for<kPrecision, 2, Stored>(columns);
    launch("conv_data_grad_kernel", kernel, grid_of(plan, tasks), plan.threads, plan.shared_bytes, stream, params);
}

template <ConvPrecision kPrecision, typename Stored>
void launch_conv_weight_grad(const ConvWeightGradParams<Stored>& params, const ConvLaunch& plan, std::int64_t tasks,
                             cudaStream_t stream) {
    const auto kernel = conv_weight_columns(params.layer.block.filters) == 8 ? conv_weight_grad_kernel<kPrecision, 1>
                                                                             : conv_weight_grad_kernel<kPrecision, 4>;
    launch("conv_weight_grad_kernel", kernel, grid_of(plan, tasks), plan.threads, plan.shared_bytes, stream, params);
}

}  // namespace signmaml
