#include "launch/conv_products_of.cuh"

namespace signmaml {

template void launch_conv_forward<ConvPrecision::kBf16>(const ConvForwardParams<std::uint16_t>&, const ConvLaunch&,
                                                        std::int64_t, cudaStream_t);
template void launch_conv_data_gradient<ConvPrecision::kBf16>(const ConvDataGradientParams<std::uint16_t>&,
                                                              const ConvLaunch&, std::int64_t, cudaStream_t);
template void launch_conv_weight_gradient<ConvPrecision::kBf16>(const ConvWeightGradientParams<std::uint16_t>&,
                                                                const ConvLaunch&, std::int64_t, cudaStream_t);

}  // namespace signmaml
