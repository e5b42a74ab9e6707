"""csrc/launch/device.cu against a CUDA runtime that only writes down what it is asked for: no GPU and no nvcc."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "csrc" / "launch"

RUNTIME = """
#pragma once
#include <cstddef>
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorUnsupportedPtxVersion,
                   cudaErrorInsufficientDriver };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
                             cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaFuncAttributes {};
struct dim3 { unsigned x = 1, y = 1, z = 1; };
using cudaStream_t = void*;
inline const char* cudaGetErrorName(cudaError_t) { return "name"; }
inline const char* cudaGetErrorString(cudaError_t) { return "text"; }
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*);
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t cudaDriverGetVersion(int*);
"""

PROGRAM = """
#include <cstdio>
#include "launch/device.cuh"

namespace {
int device = 0;
bool capturing = false, failing = false;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
cudaError_t said(const char* what, long value = -1) {
    std::printf(value < 0 ? "%s;" : "%s %ld;", what, value);
    return failing ? cudaErrorInsufficientDriver : cudaSuccess;
}
}  // namespace

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* found) { *found = device; return said("get device"); }
cudaError_t cudaSetDevice(int wanted) { device = wanted; return said("set device", wanted); }
cudaError_t cudaDeviceGetAttribute(int* found, cudaDeviceAttr, int) { *found = 7; return said("attribute"); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return said("capturing?");
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
    const cudaStreamCaptureMode before = mode;
    mode = *other;
    *other = before;
    std::printf("mode %d;", mode);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return said("load"); }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) { return said("shared", bytes); }
cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return cudaSuccess; }

void kernel() {}
void other() {}

void go(int on, void (*which)(), std::int64_t bytes) {
    {
        const signmaml::DeviceScope scope(on);
        signmaml::launch("some_kernel", which, dim3{}, 32, bytes, nullptr);
    }
    std::printf("\\n");
}

int main() {
    for (const std::int64_t bytes : {1000, 60000, 50000, 60000, 70000, 65000}) go(0, kernel, bytes);
    go(0, other, 50000);
    go(1, kernel, 60000);
    capturing = true;
    go(0, kernel, 1000);
    std::printf("%d\\n", signmaml::multiprocessors(0));
    failing = true;
    try {
        go(0, kernel, 1000);
    } catch (const std::runtime_error& error) {
        std::printf("%s\\n", error.what());
    }
}
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[str]:
    """What the program prints: the calls of the runtime, a launch in a line."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "launch").mkdir()
    # A plain C++ compiler does not know the launch itself.
    header = (LAUNCH / "device.cuh").read_text()
    launch = "kernel<<<grid, block, static_cast<std::size_t>(shared_bytes), stream>>>(arguments...);"
    assert header.count(launch) == 1
    (folder / "launch" / "device.cuh").write_text(header.replace(launch, "kernel(arguments...);"))
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    (folder / "device.cpp").write_text((LAUNCH / "device.cu").read_text())
    (folder / "main.cpp").write_text(PROGRAM)
    options = ["-std=c++17", f"-I{folder}", f"-I{LAUNCH.parent}"]
    program = folder / "program"
    subprocess.run(["c++", *options, folder / "device.cpp", folder / "main.cpp", "-o", program], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
def test_the_limit_of_shared_memory_never_falls(lines):
    asked = [[int(call.split()[1]) for call in line.split(";") if call.startswith("shared")] for line in lines]
    assert asked[:6] == [[], [60000], [], [], [70000], []]
    assert asked[6:8] == [[50000], [60000]], "each kernel and each device has a limit of its own"


@pytest.mark.slow
def test_the_capture_mode_is_relaxed_before_any_other_call_and_put_back(lines):
    for line in lines[:10]:
        calls = line.split(";")[:-1]
        assert calls[0] == "mode 2" and calls[-1] == "mode 0", calls
        assert [call for call in calls if call.startswith("mode")] == ["mode 2", "mode 0"]
    assert "load" not in lines[0] and "load" in lines[8], "a kernel is loaded first where the stream is being captured"
    assert lines[9].endswith(";7")


def test_an_error_names_what_was_done_and_puts_the_mode_back(lines):
    assert lines[10].startswith("mode 2;get device;mode 0;asking for the current device failed: name: text")
