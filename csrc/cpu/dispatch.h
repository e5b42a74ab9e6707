// Which instruction set the CPU backend uses.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace signmaml::cpu {

// Those that were compiled in and that this CPU and its operating system support; the fastest last.
std::vector<std::string> usable_isas();

// The one in use: the fastest usable, until select_isa.
const Kernels& kernels();

// Throws std::invalid_argument if the name is none of usable_isas(). For tests and for comparisons.
void select_isa(const std::string& name);

}  // namespace signmaml::cpu
