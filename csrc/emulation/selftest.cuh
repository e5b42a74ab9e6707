// Small kernels that use what the flat-buffer kernels do not: shared memory, barriers, shuffles, tensor cores,
// asynchronous copies. They test the emulator (and, on a GPU, that platform.cuh and its twin agree).
//   faulty_kernel        a copy with one of the faults that the emulator reports
//   counted_kernel       requests of known cost, for tests of counting.h
//   block_sum_kernel     out[b] = sum of row b; a block owns a row, a thread every blockDim-th element
//   matmul_tf32_kernel   c = a b, TF32; a block of two warps owns 16 x 16 of c, a warp 16 x 8; two stages of cp.async
//   matmul_bf16_kernel   c = a b^T, bf16; a warp owns 16 x 8 of c; ldmatrix
// Launched by launch_selftest_*.
#pragma once

#include <cstdint>

#include "emulation/selftest.h"
#include "kernels/platform.cuh"

namespace signmaml {

__global__ void block_sum_kernel(const BlockSumParams p) {
    const Shared<float> scratch(0, blockDim.x / 32);
    float sum = 0.0f;
    for (std::int64_t i = threadIdx.x; i < p.columns; i += blockDim.x) sum += load(p.in + blockIdx.x * p.columns + i);
    sum = block_sum(sum, scratch);
    // Use the same scratch again: a missing barrier between the two uses is a race.
    sum = block_sum(threadIdx.x == 0 ? sum : 0.0f, scratch);
    if (threadIdx.x == 0) store(p.out + blockIdx.x, sum);
}

// out[t] = in[t] through shared memory, with one fault. The fault occurs in block 1, in thread 37 if a single thread
// commits it.
__global__ void faulty_kernel(const FaultParams p) {
    const Shared<float> shared(0, 64);
    const int t = static_cast<int>(threadIdx.x);
    const int at = static_cast<int>(blockIdx.x) * 64 + t;
    const auto is = [&p](Fault fault) { return p.fault == fault && blockIdx.x == 1; };
    const bool one = t == 37;
    if (is(Fault::kUninitialised) && one) shared.get(37);
    if (is(Fault::kUnwrittenOutput) && one) load(p.out + at);
    shared.set(t, load(p.in + (is(Fault::kGlobalOutOfBounds) && one ? at + 64 : at)));
    if (is(Fault::kSharedOutOfBounds) && one) shared.set(64, 0.0f);
    if (is(Fault::kDivergedLanes) && !one) shuffle_xor(1.0f, 1);
    if (is(Fault::kReadOnly) && one) store(const_cast<float*>(p.in), 0.0f);
    if (is(Fault::kMisaligned) && one) load<float, 4>(p.in + 37);
    if (is(Fault::kDivergedBarrier) && one) return;
    if (!is(Fault::kMissingBarrier)) block_barrier();
    const float value = shared.get(t) + 0.0f * shared.get(63 - t);
    if (is(Fault::kWriteRaceInBlock) && t < 38) {
        store(p.out + 64, value);
    } else {
        store(p.out + (p.fault == Fault::kWriteRaceOfBlocks ? t : at), value);
    }
}

inline constexpr int kCountedFloats = 64 * 36;

// One request of each kind, whose sectors and wavefronts are known. Two warps; a line is one place in the code.
__global__ void counted_kernel(const CountedParams p) {
    const Shared<float> shared(0, kCountedFloats);
    const int t = static_cast<int>(threadIdx.x);
    float sum = load(p.in + t);                                       // 128 bytes in a row
    sum += load(p.in + 2 * t);                                        // every other float
    sum += load(p.in + t + 1);                                        // in a row, across a boundary
    sum += load(p.in);                                                // the same for all
    shared.set(t * 36, sum);                                          // every fourth bank
    shared.set(t * 32, sum);                                          // one bank
    store<float, 4>(shared.address(t * 36), {{sum, sum, sum, sum}});  // a row of 36 floats each
    block_barrier();
    const auto quad = load<float, 4>(shared.address(t / 2 * 36));  // by pairs of lanes
    sum += quad.at[0] + load<float, 4>(shared.address(0)).at[0];   // the same for all
    for (int i = 0; i < 4; ++i) {
        if ((t + i) % 2 == 0) continue;
        sum += load(p.in + t);  // half of the lanes at a time
        if (i == 3) sum += shared.get(t * 36);
    }
    cp_async_16(shared.address(t * 4), p.in + t / 2 * 4);  // 256 bytes for a warp
    cp_async_commit();
    cp_async_wait<0>();
    block_barrier();
    sum += warp_sum(shared.get(t));  // all lanes together again
    store(p.out + t, sum);
}

inline constexpr int kTf32Rows = 16, kTf32Columns = 16, kTf32Depth = 8;
inline constexpr int kTf32StageOfA = kTf32Rows * kTf32Depth, kTf32StageOfB = kTf32Depth * kTf32Columns;
inline constexpr int kTf32SharedBytes = 2 * (kTf32StageOfA + kTf32StageOfB) * 4;

// Starts to copy one slab of a and b; warp 0 copies a, warp 1 copies b, each thread 4 floats.
__device__ inline void stage_tf32(const MatmulTf32Params& p, const Shared<float>& a, const Shared<float>& b, int slab) {
    const int stage = slab % 2;
    const int k0 = slab * kTf32Depth;
    const int t = lane();
    if (threadIdx.x < 32) {
        const int row = t / 2, column = t % 2 * 4;
        cp_async_16(a.address(stage * kTf32StageOfA + row * kTf32Depth + column),
                    p.a + (std::int64_t{blockIdx.y} * kTf32Rows + row) * p.k + k0 + column);
    } else {
        const int row = t / 4, column = t % 4 * 4;
        cp_async_16(b.address(stage * kTf32StageOfB + row * kTf32Columns + column),
                    p.b + std::int64_t{k0 + row} * p.n + blockIdx.x * kTf32Columns + column);
    }
    cp_async_commit();
}

__global__ void matmul_tf32_kernel(const MatmulTf32Params p) {
    const Shared<float> a(0, 2 * kTf32StageOfA);
    const Shared<float> b(2 * kTf32StageOfA * 4, 2 * kTf32StageOfB);
    const int group = lane() / 4, member = lane() % 4;
    const int first_column = static_cast<int>(threadIdx.x / 32) * 8;
    float d[4] = {};
    stage_tf32(p, a, b, 0);
    for (int slab = 0; slab * kTf32Depth < p.k; ++slab) {
        if ((slab + 1) * kTf32Depth < p.k) {
            stage_tf32(p, a, b, slab + 1);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        block_barrier();  // the slab of both warps has arrived
        const int of_a = slab % 2 * kTf32StageOfA, of_b = slab % 2 * kTf32StageOfB;
        const std::uint32_t fragment_a[4] = {
            tf32_operand(a.get(of_a + group * kTf32Depth + member)),
            tf32_operand(a.get(of_a + (group + 8) * kTf32Depth + member)),
            tf32_operand(a.get(of_a + group * kTf32Depth + member + 4)),
            tf32_operand(a.get(of_a + (group + 8) * kTf32Depth + member + 4)),
        };
        const std::uint32_t fragment_b[2] = {
            tf32_operand(b.get(of_b + member * kTf32Columns + first_column + group)),
            tf32_operand(b.get(of_b + (member + 4) * kTf32Columns + first_column + group)),
        };
        mma_m16n8k8_tf32(d, fragment_a, fragment_b);
        block_barrier();  // both warps have read the stage before it is filled again
    }
    float* c = p.c + (std::int64_t{blockIdx.y} * kTf32Rows + group) * p.n + blockIdx.x * kTf32Columns + first_column;
    store(c + member * 2, d[0]);
    store(c + member * 2 + 1, d[1]);
    store(c + 8 * p.n + member * 2, d[2]);
    store(c + 8 * p.n + member * 2 + 1, d[3]);
}

inline constexpr int kBf16SharedBytes = (16 * 16 + 8 * 16) * 2;

__global__ void matmul_bf16_kernel(const MatmulBf16Params p) {
    const Shared<std::uint16_t> a(0, 16 * 16);
    const Shared<std::uint16_t> b(16 * 16 * 2, 8 * 16);
    const int group = lane() / 4, member = lane() % 4;
    float d[4] = {};
    for (int k0 = 0; k0 < p.k; k0 += 16) {
        // A lane copies 8 entries of a; the first 16 lanes also 8 entries of b.
        const int row = lane() / 2, half = lane() % 2 * 8;
        cp_async_16(a.address(row * 16 + half), p.a + (std::int64_t{blockIdx.y} * 16 + row) * p.k + k0 + half);
        if (lane() < 16) {
            cp_async_16(b.address(row * 16 + half), p.b + (std::int64_t{blockIdx.x} * 8 + row) * p.k + k0 + half);
        }
        cp_async_commit();
        cp_async_wait<0>();
        warp_barrier();  // the copies of all lanes have arrived
        std::uint32_t fragment_a[4];
        // Matrices in the order of the fragment: upper left, lower left, upper right, lower right.
        ldmatrix_x4(fragment_a, a.address((lane() % 16) * 16 + lane() / 16 * 8));
        const auto pair = [&](int k) {
            return static_cast<std::uint32_t>(b.get(group * 16 + k)) |
                   static_cast<std::uint32_t>(b.get(group * 16 + k + 1)) << 16;
        };
        const std::uint32_t fragment_b[2] = {pair(member * 2), pair(member * 2 + 8)};
        mma_m16n8k16_bf16(d, fragment_a, fragment_b);
        warp_barrier();  // all lanes have read before the next copies land
    }
    float* c = p.c + (std::int64_t{blockIdx.y} * 16 + group) * p.n + blockIdx.x * 8 + member * 2;
    store(c, d[0]);
    store(c + 1, d[1]);
    store(c + 8 * p.n, d[2]);
    store(c + 8 * p.n + 1, d[3]);
}

}  // namespace signmaml
