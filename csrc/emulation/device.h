// The C++ twin of kernels/platform.cuh and of the CUDA keywords and built-ins that kernels use. A kernel that includes
// platform.cuh and is compiled with SIGNMAML_EMULATION runs on the emulated GPU of machine.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation/machine.h"
#include "emulation/tensor_cores.h"

// Counting needs all of a kernel in one function of its own (counting.h).
#define __global__ __attribute__((flatten, noinline, noclone))
#define __device__
#define __host__
#define __launch_bounds__(...)

// As in CUDA, these are names, not calls.
#define threadIdx (::signmaml::emulation::thread_index())
#define blockIdx (::signmaml::emulation::block_index())
#define blockDim (::signmaml::emulation::block_extent())
#define gridDim (::signmaml::emulation::grid_extent())

namespace signmaml {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// ---- global memory

template <typename Scalar, int kVector>
struct alignas(sizeof(Scalar) * kVector) Vector {
    Scalar at[kVector];
};

template <typename Scalar, int kVector>
inline Vector<Scalar, kVector> load(const Scalar* source) {
    Vector<Scalar, kVector> value;
    emulation::visit(source, sizeof(value), emulation::Access::kRead);
    std::memcpy(&value, source, sizeof(value));
    return value;
}

template <typename Scalar>
inline Scalar load(const Scalar* source) {
    return load<Scalar, 1>(source).at[0];
}

template <typename Scalar, int kVector>
inline void store(Scalar* target, const Vector<Scalar, kVector>& value) {
    emulation::visit(target, sizeof(value), emulation::Access::kWrite);
    std::memcpy(target, &value, sizeof(value));
}

template <typename Scalar>
inline void store(Scalar* target, Scalar value) {
    store<Scalar, 1>(target, {{value}});
}

inline void raise_flag(std::uint8_t* flag) {
    emulation::visit(flag, 1, emulation::Access::kFlag);
    *flag = 1;
}

// ---- shared memory

template <typename Scalar>
class Shared {
  public:
    Shared(std::int64_t offset_bytes, std::int64_t count) : offset_(offset_bytes), count_(count) {}
    Scalar get(std::int64_t i) const { return load<Scalar>(address(i)); }
    void set(std::int64_t i, Scalar value) const { store<Scalar>(address(i), value); }
    Scalar* address(std::int64_t i) const {
        if (i < 0 || i >= count_) emulation::out_of_shared_array(i, count_);
        return reinterpret_cast<Scalar*>(emulation::shared_memory() + offset_) + i;
    }

  private:
    std::int64_t offset_;
    std::int64_t count_;
};

// ---- barriers, lanes

inline void block_barrier() { emulation::block_barrier(); }
inline void warp_barrier() {
    unsigned lanes = kAllLanes;
    emulation::warp_operation("warp_barrier", lanes, &lanes, [](void* const*) {});
}
inline int lane() { return emulation::lane(); }

namespace emulation {

template <typename Scalar>
struct Exchange {
    Scalar value;
    int distance;
    Scalar result;
};

}  // namespace emulation

// The value of the lane whose number differs from this one's in the bits of `distance`.
template <typename Scalar>
inline Scalar shuffle_xor(Scalar value, int distance) {
    using Operand = emulation::Exchange<Scalar>;
    Operand operand{value, distance, Scalar{}};
    emulation::warp_operation("shuffle_xor", kAllLanes, &operand, [](void* const* operands) {
        for (int lane = 0; lane < emulation::kWarpThreads; ++lane) {
            auto* own = static_cast<Operand*>(operands[lane]);
            own->result = static_cast<Operand*>(operands[lane ^ own->distance])->value;
        }
    });
    return operand.result;
}

// ---- arithmetic; C++ is compiled without fused multiply-adds

inline std::uint32_t multiply_high(std::uint32_t a, std::uint32_t b) {
    return static_cast<std::uint32_t>(static_cast<std::uint64_t>(a) * b >> 32);
}

inline float rounded_product(float a, float b) { return a * b; }
inline double rounded_product(double a, double b) { return a * b; }

// ---- tensor cores

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// A value rounded to TF32 (10 bits of mantissa), ties away from zero, as cvt.rna.tf32.f32 does. The low 13 bits, which
// PTX leaves open, are what the value had there and more.
inline std::uint32_t tf32_operand(float value) {
    if (value != value) return 0x7fffffffu;
    const std::uint32_t bits = bits_of(value);
    return std::isinf(value) ? bits : bits + 0x1000u;
}

// Two floats rounded to bf16 (ties to even) in one register, the lower one first.
inline std::uint32_t pack_bf16(float low, float high) {
    const auto rounded = [](float value) {
        const std::uint32_t bits = bits_of(value);
        if (value != value) return 0x7fffu;
        return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
}

namespace emulation {

inline float bf16_to_float(std::uint32_t bits) {
    const std::uint32_t wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

struct MmaOperand {
    float* d;
    const std::uint32_t* a;
    const std::uint32_t* b;
};

// d += a * b for fragments of a 16 x kK and a kK x 8 matrix, `products` of them at once; `element` reads entry e of a
// lane's fragment.
template <int kK, int kEntriesOfA, int kEntriesOfB, typename RowOfA, typename ColumnOfA, typename RowOfB,
          typename Element>
inline void mma(void* const* operands, RowOfA row_of_a, ColumnOfA column_of_a, RowOfB row_of_b, Element element,
                int products, int extra_bits) {
    float rows[16][kK], columns[8][kK];
    for (int lane = 0; lane < kWarpThreads; ++lane) {
        const auto* own = static_cast<const MmaOperand*>(operands[lane]);
        for (int e = 0; e < kEntriesOfA; ++e) rows[row_of_a(lane, e)][column_of_a(lane, e)] = element(own->a, e);
        for (int e = 0; e < kEntriesOfB; ++e) columns[lane / 4][row_of_b(lane, e)] = element(own->b, e);
    }
    for (int lane = 0; lane < kWarpThreads; ++lane) {
        auto* own = static_cast<MmaOperand*>(operands[lane]);
        for (int e = 0; e < 4; ++e) {
            const float* row = rows[lane / 4 + (e >= 2 ? 8 : 0)];
            const float* column = columns[lane % 4 * 2 + e % 2];
            own->d[e] = add_products(own->d[e], row, column, kK, products, extra_bits);
        }
    }
}

}  // namespace emulation

// d (16 x 8, float) += a (16 x 8, TF32) * b (8 x 8, TF32); bits below TF32's mantissa are ignored, as in hardware.
inline void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    emulation::MmaOperand operand{d, a, b};
    emulation::warp_operation("mma_m16n8k8_tf32", kAllLanes, &operand, [](void* const* operands) {
        const emulation::TensorCores& cores = emulation::settings().tensor_cores;
        emulation::mma<8, 4, 2>(
            operands, [](int lane, int e) { return lane / 4 + e % 2 * 8; },
            [](int lane, int e) { return lane % 4 + e / 2 * 4; }, [](int lane, int e) { return lane % 4 + e * 4; },
            [](const std::uint32_t* fragment, int e) {
                const std::uint32_t bits = fragment[e] & ~0x1fffu;
                float value;
                std::memcpy(&value, &bits, 4);
                return value;
            },
            cores.tf32_products, cores.extra_bits);
    });
}

// d (16 x 8, float) += a (16 x 16, bf16) * b (16 x 8, bf16); a register holds two entries, the lower one first.
inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    emulation::MmaOperand operand{d, a, b};
    emulation::warp_operation("mma_m16n8k16_bf16", kAllLanes, &operand, [](void* const* operands) {
        const emulation::TensorCores& cores = emulation::settings().tensor_cores;
        emulation::mma<16, 8, 4>(
            operands, [](int lane, int e) { return lane / 4 + e / 2 % 2 * 8; },
            [](int lane, int e) { return lane % 4 * 2 + e % 2 + e / 4 * 8; },
            [](int lane, int e) { return lane % 4 * 2 + e % 2 + e / 2 * 8; },
            [](const std::uint32_t* fragment, int e) {
                return emulation::bf16_to_float(fragment[e / 2] >> (e % 2 * 16) & 0xffffu);
            },
            cores.bf16_products, cores.extra_bits);
    });
}

namespace emulation {

struct LdmatrixOperand {
    const void* row;
    std::uint32_t* result;
};

}  // namespace emulation

// Four 8 x 8 matrices of 16-bit entries from shared memory: lane l gives the address of row l % 8 of matrix l / 8 and
// receives, from every matrix, entries 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4.
inline void ldmatrix_x4(std::uint32_t (&result)[4], const void* row) {
    emulation::visit(row, 16, emulation::Access::kRead);
    emulation::LdmatrixOperand operand{row, result};
    emulation::warp_operation("ldmatrix_x4", kAllLanes, &operand, [](void* const* operands) {
        for (int lane = 0; lane < emulation::kWarpThreads; ++lane) {
            auto* own = static_cast<emulation::LdmatrixOperand*>(operands[lane]);
            for (int matrix = 0; matrix < 4; ++matrix) {
                const auto* from = static_cast<emulation::LdmatrixOperand*>(operands[matrix * 8 + lane / 4]);
                std::memcpy(&own->result[matrix], static_cast<const char*>(from->row) + lane % 4 * 4, 4);
            }
        }
    });
}

// ---- asynchronous copies to shared memory

// Starts a copy of 16 bytes. The target holds NaN until a wait covers the copy.
inline void cp_async_16(void* target, const void* source) { emulation::start_copy(target, source, 16); }
inline void cp_async_commit() { emulation::commit_copies(); }
template <int kPending>
inline void cp_async_wait() {
    emulation::wait_for_copies(kPending);
}

}  // namespace signmaml
