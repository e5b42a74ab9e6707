// Which part of a row can be accessed sixteen bytes at a time, for any length and alignment.
#pragma once

#include <cstdint>

#include "kernels/platform.cuh"

namespace signmaml {

// The aligned vectors of a row: `head` single elements come before them, the rest of the row after.
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

}  // namespace signmaml
