#include "launch/mlp_second_order.cuh"

namespace signmaml {

template void launch_mlp_second_order<float>(const MlpMetaStepParams<float>&, int, void*);

}  // namespace signmaml
