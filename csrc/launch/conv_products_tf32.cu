#include "launch/conv_products_of.cuh"

namespace signmaml {

template void launch_conv_forward<ConvPrecision::kTf32>(const ConvForwardParams<float>&, const ConvLaunch&,
                                                        std::int64_t, cudaStream_t);
template void launch_conv_data_gradient<ConvPrecision::kTf32>(const ConvDataGradientParams<float>&, const ConvLaunch&,
                                                              std::int64_t, cudaStream_t);
template void launch_conv_weight_gradient<ConvPrecision::kTf32>(const ConvWeightGradientParams<float>&,
                                                                const ConvLaunch&, std::int64_t, cudaStream_t);

}  // namespace signmaml
