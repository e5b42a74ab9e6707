#include "launch/device.cuh"
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

DeviceScope::DeviceScope(int device) : device_(device) {
    check_cuda(cudaGetDevice(&previous_), "asking for the current device");
    if (previous_ != device_) check_cuda(cudaSetDevice(device_), "choice of device " + std::to_string(device_));
}

DeviceScope::~DeviceScope() {
    if (previous_ != device_) cudaSetDevice(previous_);
}

int multiprocessors(int device) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "asking for the multiprocessors of device " + std::to_string(device));
    return count;
}

void load_if_capturing(const void* kernel, cudaStream_t stream) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream, &capture), "asking whether the stream is being captured");
    if (capture != cudaStreamCaptureStatusActive) return;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "relaxing the capture mode");
    cudaFuncAttributes attributes;
    const cudaError_t loaded = cudaFuncGetAttributes(&attributes, kernel);
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "restoring the capture mode");
    check_cuda(loaded, "loading of a kernel");
}

int cuda_driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace signmaml
