// Flags that several threads may raise.
#pragma once

#include <cstdint>

namespace signmaml::cpu {

// Every writer stores the same value, so the order of the stores does not matter.
inline void raise_flag(std::uint8_t* flag) { __atomic_store_n(flag, std::uint8_t{1}, __ATOMIC_RELAXED); }

}  // namespace signmaml::cpu
