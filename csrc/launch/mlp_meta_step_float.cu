#include "launch/mlp_meta_step.cuh"

namespace signmaml {

template void launch_mlp_meta_step<float>(const MlpMetaStepParams<float>&, int, void*);

}  // namespace signmaml
