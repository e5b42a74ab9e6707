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

// Relaxes this thread's capture mode for a scope, which must begin before any other call of the CUDA runtime: its first
// calls initialise it and load code, and while torch captures a graph its usual mode forbids that in every thread.
class RelaxedCapture {
  public:
    RelaxedCapture();
    ~RelaxedCapture();
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

  private:
    cudaStreamCaptureMode other_ = cudaStreamCaptureModeRelaxed;  // the thread's own, while this lives
};

// Makes a device current for a scope. Torch's guard is not enough because our CUDA runtime is not torch's.
class DeviceScope {
  public:
    explicit DeviceScope(int device);
    ~DeviceScope();
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

  private:
    RelaxedCapture relaxed_;
    int previous_ = 0;
    int device_;
};

// The dynamic shared memory that a block gets without opt-in.
inline constexpr std::int64_t kPlainSharedBytes = 48 * 1024;

// Loads a kernel's code now if the stream is being captured: lazy loading at the first launch may do things that a
// capture forbids.
void load_if_capturing(const void* kernel, cudaStream_t stream);

// Lets a kernel's blocks have this much dynamic shared memory on the current device. The limit never falls: another
// thread, or a graph that was captured, may be about to launch with more.
void allow_shared_memory(const char* name, const void* kernel, std::int64_t bytes);

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int block, std::int64_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
    load_if_capturing(reinterpret_cast<const void*>(kernel), stream);
    if (shared_bytes > kPlainSharedBytes) {
        allow_shared_memory(name, reinterpret_cast<const void*>(kernel), shared_bytes);
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
