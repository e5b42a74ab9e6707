// The operations on convolutional networks, for module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace signmaml::bindings {

void define_conv(pybind11::module_& m);

}  // namespace signmaml::bindings
