"""platform.cuh on the device: fragments, ldmatrix, asynchronous copies and sums behave as in the emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from helpers.cases.emulated_cases import TENSOR_CORE_SUMS

CSRC = Path(__file__).resolve().parents[2] / "csrc"

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "emulation/selftest.cuh"

using namespace signmaml;

template <typename T>
T* on_device(const std::vector<T>& values) {
    T* memory = nullptr;
    if (cudaMalloc(&memory, values.size() * sizeof(T)) != cudaSuccess) std::exit(2);
    cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
    return memory;
}

// Small integers: exact in TF32, in bf16 and in every order of summation.
std::vector<float> integers(int count, unsigned seed) {
    std::vector<float> values(count);
    for (float& value : values) {
        seed = seed * 1664525u + 1013904223u;
        value = static_cast<float>(static_cast<int>(seed >> 24) % 17 - 8);
    }
    return values;
}

std::uint16_t bf16(float value) {
    union { float value; std::uint32_t bits; } both{value};
    return static_cast<std::uint16_t>(both.bits >> 16);
}

void check(const char* name, const float* device, const std::vector<float>& expected) {
    std::vector<float> found(expected.size());
    const cudaError_t status = cudaDeviceSynchronize();
    cudaMemcpy(found.data(), device, found.size() * sizeof(float), cudaMemcpyDeviceToHost);
    for (std::size_t i = 0; i < found.size(); ++i) {
        if (status == cudaSuccess && found[i] == expected[i]) continue;
        std::printf("%s: element %zu is %g and should be %g (%s)\\n", name, i, found[i], expected[i],
                    cudaGetErrorString(status));
        std::exit(1);
    }
    std::printf("%s ok\\n", name);
}

// Reads sums, one a line: precision, start, number of factors, the factors. Prints what one mma makes of each, after
// one that makes the start.
int print_sums() {
    char precision[8];
    double start = 0.0;
    int count = 0;
    while (std::scanf("%7s %lf %d", precision, &start, &count) == 3) {
        const bool tf32 = precision[0] == 't';
        const int depth = tf32 ? 8 : 16, k = 2 * depth;
        std::vector<float> a(16 * k, 0.0f), b(k * 16, 0.0f), found(16 * 16, -12345.0f);
        a[0] = static_cast<float>(start);
        b[0] = 1.0f;
        for (int i = 0; i < count; ++i) {
            double x = 0.0, y = 0.0;
            if (std::scanf("%lf %lf", &x, &y) != 2) return 3;
            a[depth + i] = static_cast<float>(x);
            b[(depth + i) * 16] = static_cast<float>(y);
        }
        float* c = on_device(found);
        if (tf32) {
            matmul_tf32_kernel<<<dim3(16 / kTf32Columns, 16 / kTf32Rows), 64, kTf32SharedBytes>>>(
                MatmulTf32Params{on_device(a), on_device(b), c, 16, k});
        } else {
            std::vector<std::uint16_t> rows(16 * k), columns(16 * k);
            for (int i = 0; i < 16 * k; ++i) rows[i] = bf16(a[i]);
            for (int j = 0; j < 16; ++j)
                for (int l = 0; l < k; ++l) columns[j * k + l] = bf16(b[l * 16 + j]);
            matmul_bf16_kernel<<<dim3(16 / 8, 16 / 16), 32, kBf16SharedBytes>>>(
                MatmulBf16Params{on_device(rows), on_device(columns), c, 16, k});
        }
        const cudaError_t status = cudaDeviceSynchronize();
        if (status != cudaSuccess) {
            std::printf("%s\\n", cudaGetErrorString(status));
            return 1;
        }
        cudaMemcpy(found.data(), c, found.size() * sizeof(float), cudaMemcpyDeviceToHost);
        std::printf("%.17g\\n", found[0]);
    }
    return 0;
}

int main(int argc, char**) {
    if (argc > 1) return print_sums();
    const int m = 48, n = 32, k = 64;
    const std::vector<float> a = integers(m * k, 1), b = integers(k * n, 2);
    std::vector<float> product(m * n, 0.0f), sums(3, 0.0f), nan(m * n, -12345.0f);
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < n; ++j)
            for (int l = 0; l < k; ++l) product[i * n + j] += a[i * k + l] * b[l * n + j];
    float* c = on_device(nan);
    matmul_tf32_kernel<<<dim3(n / kTf32Columns, m / kTf32Rows), 64, kTf32SharedBytes>>>(
        MatmulTf32Params{on_device(a), on_device(b), c, n, k});
    check("matmul_tf32", c, product);

    std::vector<std::uint16_t> half_a(m * k), half_b(n * k);
    for (int i = 0; i < m * k; ++i) half_a[i] = bf16(a[i]);
    for (int j = 0; j < n; ++j)
        for (int l = 0; l < k; ++l) half_b[j * k + l] = bf16(b[l * n + j]);
    c = on_device(nan);
    matmul_bf16_kernel<<<dim3(n / 8, m / 16), 32, kBf16SharedBytes>>>(
        MatmulBf16Params{on_device(half_a), on_device(half_b), c, n, k});
    check("matmul_bf16", c, product);

    const int columns = 1027;
    const std::vector<float> rows = integers(3 * columns, 3);
    for (int r = 0; r < 3; ++r)
        for (int i = 0; i < columns; ++i) sums[r] += rows[r * columns + i];
    float* out = on_device(std::vector<float>(3, -12345.0f));
    block_sum_kernel<<<3, 128, 128 / 32 * 4>>>(BlockSumParams{on_device(rows), out, columns});
    check("block_sum", out, sums);
    return 0;
}
"""


def compile_program(folder: Path, *options: str) -> Path:
    """Compiles the program, or skips the test if there is no nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    source, program = folder / "selftest.cu", folder / "selftest"
    source.write_text(PROGRAM)
    command = [nvcc, "-std=c++17", f"-I{CSRC}", *options, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.slow
def test_program_compiles(tmp_path):
    """Needs no device, so the program is compiled even where it cannot run."""
    compile_program(tmp_path, "-arch=sm_80")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The program for this device."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    return compile_program(tmp_path_factory.mktemp("selftest"), f"-arch=sm_{major}{minor}")


@pytest.mark.gpu
@pytest.mark.slow
def test_device_agrees_with_the_emulator(program):
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == ["matmul_tf32 ok", "matmul_bf16 ok", "block_sum ok"]


@pytest.mark.gpu
@pytest.mark.slow
def test_tensor_cores_sum_as_the_published_models_say(program):
    """The emulated GPU follows these models (csrc/emulation/tensor_cores.h), and float32 accuracy depends on them."""
    lines = [
        " ".join(map(str, (precision, start, len(factors), *(number for pair in factors for number in pair))))
        for precision, start, factors, *_ in TENSOR_CORE_SUMS.values()
    ]
    command = [str(program), "sums"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    found = dict(zip(TENSOR_CORE_SUMS, map(float, done.stdout.split()), strict=True))
    expected = {name: row[3 + (torch.cuda.get_device_capability() >= (9, 0))] for name, row in TENSOR_CORE_SUMS.items()}
    assert found == expected
