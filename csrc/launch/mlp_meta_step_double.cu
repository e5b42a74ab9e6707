#include "launch/mlp_meta_step.cuh"

namespace signmaml {

template void launch_mlp_meta_step<double>(const MlpMetaStepParams<double>&, int, void*);

}  // namespace signmaml
