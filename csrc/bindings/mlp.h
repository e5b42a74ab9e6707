// The Python functions of mlp_meta_step.
#pragma once

#include <pybind11/pybind11.h>

namespace signmaml::bindings {

void define_mlp(pybind11::module_& m);

}  // namespace signmaml::bindings
