// What every launch needs: make the device current, and throw errors that name the kernel.
#pragma once

#ifdef SIGNMAML_EMULATION
#include "emulation/launch.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch/launch.h"

namespace signmaml {

// Throws std::runtime_error saying what was being done, unless the status is success.
void check_cuda(cudaError_t status, const std::string& what);

// Makes a device current for a scope. Torch's guard is not enough because our CUDA runtime is not torch's.
class DeviceScope {
  public:
    explicit DeviceScope(int device);
    ~DeviceScope();
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

  private:
    int previous_ = 0;
    int device_;
};

// The dynamic shared memory that a block gets without opt-in.
inline constexpr std::int64_t kPlainSharedBytes = 48 * 1024;

// Loads a kernel's code now if the stream is being captured: lazy loading at the first launch may do things that a
// capture forbids.
void load_if_capturing(const void* kernel, cudaStream_t stream);

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int block, std::int64_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
    load_if_capturing(reinterpret_cast<const void*>(kernel), stream);
    if (shared_bytes > kPlainSharedBytes) {
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
                   std::string("asking for ") + std::to_string(shared_bytes) + " bytes of shared memory for " + name);
    }
    kernel<<<grid, block, static_cast<std::size_t>(shared_bytes), stream>>>(arguments...);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) {
        check_cuda(status, std::string("launch of ") + name + " (grid " + std::to_string(grid.x) + " x " +
                               std::to_string(grid.y) + ", block " + std::to_string(block) + ")");
    }
}

}  // namespace signmaml

#endif  // SIGNMAML_EMULATION
