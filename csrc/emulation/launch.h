// The C++ twin of launch/device.cuh, with which the .cu files of launch/, compiled as C++, start kernels on the
// emulated GPU.
#pragma once

#include <string>

#include "emulation/machine.h"

namespace signmaml {

using dim3 = emulation::Extent3;
using cudaStream_t = void*;

// There is one emulated device.
struct DeviceScope {
    explicit DeviceScope(int) {}
    ~DeviceScope() {}
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int block, std::int64_t shared_bytes,
            cudaStream_t, const Arguments&... arguments) {
    emulation::launch(name, grid, dim3(static_cast<unsigned>(block)), shared_bytes,
                      [&] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace signmaml
