// Arguments of the native meta-steps: addresses by name.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace signmaml::bindings {

using Addresses = std::map<std::string, std::uintptr_t>;

// Null if no address has this name.
template <typename T>
T* address_in(const Addresses& addresses, const char* name) {
    const auto found = addresses.find(name);
    return found == addresses.end() ? nullptr : reinterpret_cast<T*>(found->second);
}

}  // namespace signmaml::bindings
