// What the emulated module has in addition to signmaml_ext._C: settings of the emulated GPU and the kernels that test
// it.
#pragma once

#include <pybind11/pybind11.h>

namespace signmaml::bindings {

void define_emulation(pybind11::module_& m);

}  // namespace signmaml::bindings
