// Launches of the kernels in selftest.cuh, for callers that do not include device code.
#pragma once

#include <cstdint>

namespace signmaml {

struct Divisor;

struct BlockSumParams {
    const float* in;  // [rows, columns] float
    float* out;       // [rows] float
    std::int64_t columns;
};

struct MatmulTf32Params {
    const float* a;  // [m, k] float, m a multiple of 16
    const float* b;  // [k, n] float, n a multiple of 16
    float* c;        // [m, n] float
    int n, k;        // k a multiple of 8
};

struct MatmulBf16Params {
    const std::uint16_t* a;  // [m, k] bf16, m a multiple of 16
    const std::uint16_t* b;  // [n, k] bf16, n a multiple of 8
    float* c;                // [m, n] float
    int n, k;                // k a multiple of 16
};

// What faulty_kernel does wrong, named as in the reports.
enum class Fault : int {
    kNone,
    kMissingBarrier,
    kGlobalOutOfBounds,
    kSharedOutOfBounds,
    kWriteRaceInBlock,
    kWriteRaceOfBlocks,
    kDivergedLanes,
    kDivergedBarrier,
    kUninitialised,
    kReadOnly,
    kMisaligned,
    kUnwrittenOutput,
};

struct FaultParams {
    Fault fault;
    const float* in;  // [2 * 64] float
    float* out;       // [2 * 64] float
};

struct CountedParams {
    const float* in;  // [2 * 64 + 1] float, at a multiple of 128 bytes
    float* out;       // [64] float
};

// Two blocks of 64 threads.
void launch_selftest_fault(const FaultParams& params);

void launch_selftest_block_sum(const BlockSumParams& params, int rows, int block);
void launch_selftest_matmul_tf32(const MatmulTf32Params& params, int m);
void launch_selftest_matmul_bf16(const MatmulBf16Params& params, int m);
// n / divisor.value, as kernels compute it.
int selftest_quotient(int n, const Divisor& divisor);
// `blocks` blocks of 64 threads, which all do the same.
void launch_selftest_counted(const CountedParams& params, int blocks);

}  // namespace signmaml
