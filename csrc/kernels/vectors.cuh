// Access to rows of memory sixteen bytes at a time, whatever their length and alignment. Used by the kernels beside it.
#pragma once

#include <cstdint>

namespace signmaml {

// So many scalars that one load or store moves them.
template <typename Scalar, int kVector>
struct alignas(sizeof(Scalar) * kVector) Vector {
    Scalar at[kVector];
};

template <typename Scalar, int kVector>
__device__ inline Vector<Scalar, kVector> load(const Scalar* source) {
    return *reinterpret_cast<const Vector<Scalar, kVector>*>(source);
}

template <typename Scalar, int kVector>
__device__ inline void store(Scalar* target, const Vector<Scalar, kVector>& value) {
    *reinterpret_cast<Vector<Scalar, kVector>*>(target) = value;
}

template <typename Scalar, int kVector>
__device__ inline bool is_aligned(const Scalar* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(Vector<Scalar, kVector>) == 0;
}

// Where the aligned vectors of a row lie: `head` single elements come before them, the rest of the row after.
struct RowSpan {
    std::int64_t head;
    std::int64_t bodies;  // number of vectors
};

template <typename Scalar, int kVector>
__device__ inline RowSpan row_span(const Scalar* row, std::int64_t length) {
    const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(row) / sizeof(Scalar) % kVector);
    const std::int64_t to_boundary = (kVector - past) % kVector;
    const std::int64_t head = to_boundary < length ? to_boundary : length;
    return {head, (length - head) / kVector};
}

// x - x is NaN for NaN and infinities, and 0 for every other number.
template <typename Scalar>
__device__ inline bool is_nonfinite(Scalar x) {
    return !(x - x == Scalar(0));
}

}  // namespace signmaml
