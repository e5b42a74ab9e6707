// The operations on convolutional networks, for module.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include "params/conv_meta_step.h"

namespace signmaml::bindings {

// Reads a shape from Python's dict of entries; throws if one is missing or out of range.
ConvShape conv_shape_of(const pybind11::dict& entries);

void define_conv(pybind11::module_& m);
void define_conv_stages(pybind11::module_& m);

}  // namespace signmaml::bindings
