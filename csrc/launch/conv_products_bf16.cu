#include "launch/conv_products_of.cuh"

namespace signmaml {

template void launch_conv_forward<ConvPrecision::kBf16>(const ConvForwardParams<std::uint16_t>&, const ConvLaunch&,
                                                        std::int64_t, cudaStream_t);
template void launch_conv_data_grad<ConvPrecision::kBf16>(const ConvDataGradParams<std::uint16_t>&, const ConvLaunch&,
                                                          std::int64_t, cudaStream_t);
template void launch_conv_weight_grad<ConvPrecision::kBf16>(const ConvWeightGradParams<std::uint16_t>&,
                                                            const ConvLaunch&, std::int64_t, cudaStream_t);

}  // namespace signmaml
