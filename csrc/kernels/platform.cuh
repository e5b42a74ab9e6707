// Everything that kernels need from the hardware, as small functions: memory, barriers, lanes, tensor cores. Every
// kernel goes through them, and each has a C++ twin in emulation/device.h, so that the same .cuh runs on the emulated
// GPU.
#pragma once

#ifdef SIGNMAML_EMULATION
#include "emulation/device.h"
#else

#include <cmath>
#include <cstdint>

namespace signmaml {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// ---- global memory

// kVector scalars that a single load or store moves.
template <typename Scalar, int kVector>
struct alignas(sizeof(Scalar) * kVector) Vector {
    Scalar at[kVector];
};

template <typename Scalar, int kVector>
__device__ inline Vector<Scalar, kVector> load(const Scalar* source) {
    return *reinterpret_cast<const Vector<Scalar, kVector>*>(source);
}

template <typename Scalar>
__device__ inline Scalar load(const Scalar* source) {
    return *source;
}

template <typename Scalar, int kVector>
__device__ inline void store(Scalar* target, const Vector<Scalar, kVector>& value) {
    *reinterpret_cast<Vector<Scalar, kVector>*>(target) = value;
}

template <typename Scalar>
__device__ inline void store(Scalar* target, Scalar value) {
    *target = value;
}

// Sets a flag that other threads may set too. All write the same value, so the order does not matter.
__device__ inline void raise_flag(std::uint8_t* flag) { *flag = 1; }

// ---- shared memory

extern __shared__ __align__(16) char dynamic_shared_memory[];

// `count` scalars of the block's dynamic shared memory, from a byte offset that is a multiple of their size.
template <typename Scalar>
class Shared {
  public:
    __device__ Shared(std::int64_t offset_bytes, std::int64_t)
        : base_(reinterpret_cast<Scalar*>(dynamic_shared_memory + offset_bytes)) {}
    __device__ Scalar get(std::int64_t i) const { return base_[i]; }
    __device__ void set(std::int64_t i, Scalar value) const { base_[i] = value; }
    __device__ Scalar* address(std::int64_t i) const { return base_ + i; }

  private:
    Scalar* base_;
};

// ---- barriers, lanes

__device__ inline void block_barrier() { __syncthreads(); }
__device__ inline void warp_barrier() { __syncwarp(); }
__device__ inline int lane() { return static_cast<int>(threadIdx.x % 32); }

// The value of the lane whose number differs from this one's in the bits of `distance`.
template <typename Scalar>
__device__ inline Scalar shuffle_xor(Scalar value, int distance) {
    return __shfl_xor_sync(kAllLanes, value, distance);
}

// ---- arithmetic

// The high half of a product.
__device__ inline std::uint32_t multiply_high(std::uint32_t a, std::uint32_t b) { return __umulhi(a, b); }

// a * b, rounded: never part of a fused multiply-add, into which nvcc turns a product and a sum.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// ---- tensor cores (sm_80 and later)

// A value rounded to TF32 (10 bits of mantissa), ties away from zero, as an operand of mma. Its low 13 bits may be
// anything: PTX promises nothing about them, and mma does not read them.
__device__ inline std::uint32_t tf32_operand(float value) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

__device__ inline std::uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(std::uint32_t bits) { return __uint_as_float(bits); }

// Two floats rounded to bf16 (ties to even) in one register, the lower one first.
__device__ inline std::uint32_t pack_bf16(float low, float high) {
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// d (16 x 8, float) += a (16 x 8, TF32) * b (8 x 8, TF32).
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (16 x 8, float) += a (16 x 16, bf16) * b (16 x 8, bf16); a register holds two entries, the lower one first.
__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit entries from shared memory: lane l gives the address of row l % 8 of matrix l / 8 and
// receives, from every matrix, entries 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4.
__device__ inline void ldmatrix_x4(std::uint32_t (&result)[4], const void* row) {
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
}

// ---- asynchronous copies to shared memory (sm_80 and later)

// Starts a copy of 16 bytes, both addresses multiples of 16; it belongs to the next group that is committed.
__device__ inline void cp_async_16(void* target, const void* source) {
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's groups are still in flight.
template <int kPending>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace signmaml

#endif  // SIGNMAML_EMULATION

namespace signmaml {

// ---- built from the above, the same on both machines

// x - x is NaN for NaN and infinities, and 0 for every other number.
template <typename Scalar>
__device__ inline bool is_nonfinite(Scalar x) {
    return !(x - x == Scalar(0));
}

// Three-valued; sign(+-0) is +0 and sign(nan) is nan.
template <typename Scalar>
__device__ inline Scalar sign(Scalar x) {
    // -0 + 0 is +0, and nan + 0 is nan. No branch: kernels take signs of many numbers at once.
    return std::abs(x) > Scalar(0) ? std::copysign(Scalar(1), x) : x + Scalar(0);
}

// One step of a weight, with the bits of the CPU's: the product is rounded before it is taken off.
template <typename Scalar>
__device__ inline Scalar stepped(Scalar weight, Scalar rate, Scalar direction) {
    return weight - rounded_product(rate, direction);
}

// The sum over the 32 lanes, the same bits in every lane: each level adds pairs, and a + b is b + a.
template <typename Scalar>
__device__ inline Scalar warp_sum(Scalar value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
    return value;
}

// The sum over a block of full warps, in warp order, the same bits in every thread. `scratch` has one element per warp.
template <typename Scalar>
__device__ inline Scalar block_sum(Scalar value, const Shared<Scalar>& scratch) {
    const Scalar of_warp = warp_sum(value);
    if (lane() == 0) scratch.set(threadIdx.x / 32, of_warp);
    block_barrier();  // every warp's sum is there before anyone adds them up
    Scalar sum = Scalar(0);
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch.get(warp);
    block_barrier();  // everyone has read before the scratch is used again
    return sum;
}

}  // namespace signmaml
