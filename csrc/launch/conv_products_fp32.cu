#include "launch/conv_products_of.cuh"

namespace signmaml {

template void launch_conv_forward<ConvPrecision::kFp32>(const ConvForwardParams<float>&, const ConvLaunch&,
                                                        std::int64_t, cudaStream_t);
template void launch_conv_data_grad<ConvPrecision::kFp32>(const ConvDataGradParams<float>&, const ConvLaunch&,
                                                          std::int64_t, cudaStream_t);
template void launch_conv_weight_grad<ConvPrecision::kFp32>(const ConvWeightGradParams<float>&, const ConvLaunch&,
                                                            std::int64_t, cudaStream_t);

}  // namespace signmaml
