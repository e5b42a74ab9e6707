// Arithmetic of counts and places, for code that is compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa/simd.h"

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// `count` things in pieces of at most `size`: how many pieces.
constexpr std::int64_t pieces(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// `count` things in `n` pieces whose sizes differ by at most one: where piece `i` starts.
constexpr std::int64_t start_of(std::int64_t i, std::int64_t count, std::int64_t n) { return i * count / n; }

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
