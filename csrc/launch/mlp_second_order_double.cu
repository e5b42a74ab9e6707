#include "launch/mlp_second_order.cuh"

namespace signmaml {

template void launch_mlp_second_order<double>(const MlpMetaStepParams<double>&, int, void*);

}  // namespace signmaml
