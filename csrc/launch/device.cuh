// What every launch needs: the device made current, and an error that names the kernel.
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

// Throws std::runtime_error that says what was being done, unless the status is success.
void check_cuda(cudaError_t status, const std::string& what);

// Makes a device current for a scope. Our CUDA runtime is not torch's, so torch's guard is not relied on.
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

// What a block gets without asking.
inline constexpr std::int64_t kPlainSharedBytes = 48 * 1024;

// Loads a kernel's code now if the stream is being captured: the lazy loading of a first launch may do what a capture
// forbids.
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
