// The Python class of a program of blocks.
#pragma once

#include <pybind11/pybind11.h>

namespace signmaml::bindings {

void define_layers(pybind11::module_& m);

}  // namespace signmaml::bindings
