#include "launch/device.cuh"

#include <map>
#include <mutex>
#include <utility>

#include "launch/launch.h"

namespace signmaml {

void check_cuda(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clear the error, or the next launch would report it
    std::string message = what + " failed: " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status);
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion ||
        status == cudaErrorInsufficientDriver) {
        message +=
            "; `python -m signmaml_ext.info` says what this build covers, and a reinstall with "
            "TORCH_CUDA_ARCH_LIST set to the GPU's compute capability covers that GPU";
    }
    throw std::runtime_error(message);
}

RelaxedCapture::RelaxedCapture() {
    check_cuda(cudaThreadExchangeStreamCaptureMode(&other_), "relaxing the capture mode");
}

RelaxedCapture::~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&other_); }

DeviceScope::DeviceScope(int device) : device_(device) {
    check_cuda(cudaGetDevice(&previous_), "asking for the current device");
    if (previous_ != device_) check_cuda(cudaSetDevice(device_), "choice of device " + std::to_string(device_));
}

DeviceScope::~DeviceScope() {
    if (previous_ != device_) cudaSetDevice(previous_);
}

int multiprocessors(int device) {
    const RelaxedCapture relaxed;
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "asking for the multiprocessors of device " + std::to_string(device));
    return count;
}

void load_if_capturing(const void* kernel, cudaStream_t stream) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream, &capture), "asking whether the stream is being captured");
    if (capture != cudaStreamCaptureStatusActive) return;
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "loading of a kernel");
}

void allow_shared_memory(const char* name, const void* kernel, std::int64_t bytes) {
    static std::mutex guard;
    static std::map<std::pair<int, const void*>, std::int64_t> allowed;  // by device
    int device = 0;
    check_cuda(cudaGetDevice(&device), "asking for the current device");
    const std::lock_guard<std::mutex> alone(guard);
    std::int64_t& limit = allowed[{device, kernel}];
    if (bytes <= limit) return;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               std::string("asking for ") + std::to_string(bytes) + " bytes of shared memory for " + name);
    limit = bytes;
}

int cuda_driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace signmaml
