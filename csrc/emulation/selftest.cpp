#include "emulation/selftest.h"

#include "emulation/selftest.cuh"
#include "kernels/conv_common.cuh"

namespace signmaml {

void launch_selftest_block_sum(const BlockSumParams& params, int rows, int block) {
    const auto threads = static_cast<unsigned>(block);
    emulation::launch("block_sum_kernel", static_cast<unsigned>(rows), threads, block / 32 * 4,
                      [&] { block_sum_kernel(params); });
}

void launch_selftest_fault(const FaultParams& params) {
    emulation::launch("faulty_kernel", 2, 64, 64 * 4, [&] { faulty_kernel(params); });
}

void launch_selftest_matmul_tf32(const MatmulTf32Params& params, int m) {
    const emulation::Extent3 grid(static_cast<unsigned>(params.n / kTf32Columns), static_cast<unsigned>(m / kTf32Rows));
    emulation::launch("matmul_tf32_kernel", grid, 64, kTf32SharedBytes, [&] { matmul_tf32_kernel(params); });
}

void launch_selftest_matmul_bf16(const MatmulBf16Params& params, int m) {
    const emulation::Extent3 grid(static_cast<unsigned>(params.n / 8), static_cast<unsigned>(m / 16));
    emulation::launch("matmul_bf16_kernel", grid, 32, kBf16SharedBytes, [&] { matmul_bf16_kernel(params); });
}

void launch_selftest_counted(const CountedParams& params, int blocks) {
    emulation::launch("counted_kernel", static_cast<unsigned>(blocks), 64, kCountedFloats * 4,
                      [&] { counted_kernel(params); });
}

int selftest_quotient(int n, const Divisor& divisor) { return quotient_of_any(n, divisor); }

}  // namespace signmaml
