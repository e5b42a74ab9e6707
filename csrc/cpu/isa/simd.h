// Vectors of numbers in the notation that GCC and Clang share. All code that is compiled once for each instruction set
// builds on this header.
//
// Everything in this folder but the tables has internal linkage. The linker keeps one of several equal inline
// functions, and it must not give the AVX-512 copy to a machine without AVX-512. tests/host/test_linkage.py looks at
// the objects.
#pragma once

#include <cstdint>

// CMakeLists.txt names the instruction set; this name lets an editor read a header on its own.
#ifndef SIGNMAML_ISA
#define SIGNMAML_ISA portable
#endif

namespace signmaml::cpu::SIGNMAML_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

// The integer as wide as a number (a loop over both vectorises without conversions), and what its bits mean.
template <typename Scalar>
struct Bits;
template <>
struct Bits<float> {
    using Int = std::int32_t;
    using Half = std::int16_t;
    static constexpr Int kMagnitude = 0x7fffffff;
    static constexpr Int kInfinity = 0x7f800000;
};
template <>
struct Bits<double> {
    using Int = std::int64_t;
    using Half = std::int32_t;
    static constexpr Int kMagnitude = 0x7fffffffffffffff;
    static constexpr Int kInfinity = 0x7ff0000000000000;
};

// A vector of kBytes. `Loose` is one in memory that is aligned as its numbers are.
template <typename Number, int kBytes = kVectorBytes>
struct Simd {
    using Scalar = Number;
    using Int = typename Bits<Scalar>::Int;
    static constexpr int kLanes = kBytes / static_cast<int>(sizeof(Scalar));
    typedef Scalar Vector __attribute__((vector_size(kBytes)));
    typedef Scalar Loose __attribute__((vector_size(kBytes), aligned(sizeof(Scalar))));
    typedef Int Mask __attribute__((vector_size(kBytes)));
    typedef typename Bits<Scalar>::Half Words __attribute__((vector_size(kBytes / 2)));
    typedef std::uint8_t Bytes __attribute__((vector_size(kBytes / sizeof(Scalar))));

    static Vector all(Scalar value) { return value - Vector{}; }
};

// The widest vectors of the instruction set.
template <typename Scalar>
using Vector = typename Simd<Scalar>::Vector;
template <typename Scalar>
using Mask = typename Simd<Scalar>::Mask;
template <typename Scalar>
constexpr int kLanes = Simd<Scalar>::kLanes;

template <typename Scalar>
inline Vector<Scalar> load(const Scalar* from) {
    return *reinterpret_cast<const Vector<Scalar>*>(from);
}
template <typename Scalar>
inline Vector<Scalar> load_loose(const Scalar* from) {
    return *reinterpret_cast<const typename Simd<Scalar>::Loose*>(from);
}
template <typename Scalar>
inline void store(Scalar* to, Vector<Scalar> value) {
    *reinterpret_cast<Vector<Scalar>*>(to) = value;
}
template <typename Scalar>
inline void store_loose(Scalar* to, Vector<Scalar> value) {
    *reinterpret_cast<typename Simd<Scalar>::Loose*>(to) = value;
}
template <typename Scalar>
inline Vector<Scalar> all(Scalar value) {
    return value - Vector<Scalar>{};
}

// A choice out of four, one byte a lane. Widens by way of half the width: GCC 12 splits a direct conversion from 8 to
// 32 bits into scalars.
template <typename Scalar>
inline Mask<Scalar> load_choice(const std::uint8_t* from) {
    const auto bytes = *reinterpret_cast<const typename Simd<Scalar>::Bytes*>(from);
    return __builtin_convertvector(__builtin_convertvector(bytes, typename Simd<Scalar>::Words), Mask<Scalar>);
}
template <typename Scalar>
inline void store_choice(std::uint8_t* to, Mask<Scalar> value) {
    *reinterpret_cast<typename Simd<Scalar>::Bytes*>(to) = __builtin_convertvector(value, typename Simd<Scalar>::Bytes);
}

// ---- lanes ----------------------------------------------------------------------------------------------------------

// Lanes kLow, kLow + 1, ... of a and b in turn.
template <typename S, int kLow>
inline typename S::Vector interleaved(typename S::Vector a, typename S::Vector b) {
#if defined(__clang__)
    typename S::Vector result{};
    for (int i = 0; i < S::kLanes; ++i) result[i] = i % 2 == 0 ? a[kLow + i / 2] : b[kLow + i / 2];
    return result;
#else
    typename S::Mask which{};
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) which[i] = kLow + i / 2 + i % 2 * S::kLanes;
    return __builtin_shuffle(a, b, which);
#endif
}

// Lanes 0, 2, 4, ... of a, then those of b.
template <typename Scalar>
inline Vector<Scalar> every_other(Vector<Scalar> a, Vector<Scalar> b) {
    constexpr int kL = kLanes<Scalar>;
#if defined(__clang__)
    Vector<Scalar> result{};
    for (int i = 0; i < kL; ++i) result[i] = 2 * i < kL ? a[2 * i] : b[2 * i - kL];
    return result;
#else
    Mask<Scalar> which{};
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) which[i] = 2 * i;
    return __builtin_shuffle(a, b, which);
#endif
}

// Lane i is from[index[i]].
template <typename Scalar>
inline Vector<Scalar> picked(Vector<Scalar> from, Mask<Scalar> index) {
#if defined(__clang__)
    Vector<Scalar> result{};
    for (int i = 0; i < kLanes<Scalar>; ++i) result[i] = from[index[i]];
    return result;
#else
    return __builtin_shuffle(from, index);
#endif
}

// The horizontal sum, by halving: each round adds the lanes `half` apart.
template <typename Scalar>
inline Scalar sum_of_lanes(Vector<Scalar> v) {
    constexpr int kL = kLanes<Scalar>;
#pragma GCC unroll 4
    for (int half = kL / 2; half > 0; half /= 2) {
#if defined(__clang__)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
#else
        Mask<Scalar> which{};
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) which[i] = (i + half) % kL;
        v += __builtin_shuffle(v, which);
#endif
    }
    return v[0];
}

// Transposes a square of vectors. Each round interleaves vectors from the two halves of the square, which moves the
// elements of a column closer together by a factor of two.
template <typename S>
inline void transpose(typename S::Vector* square) {
    constexpr int kL = S::kLanes;
    typename S::Vector other[kL];
#pragma GCC unroll 4
    for (int distance = 1; distance < kL; distance *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kL / 2; ++i) {
            other[2 * i] = interleaved<S, 0>(square[i], square[i + kL / 2]);
            other[2 * i + 1] = interleaved<S, kL / 2>(square[i], square[i + kL / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) square[i] = other[i];
    }
}

// Whether the first `count` lanes are all set.
template <typename Scalar>
bool all_set(Mask<Scalar> mask, std::int64_t count) {
    bool set = true;
    for (std::int64_t lane = 0; lane < count; ++lane) set = set && mask[lane] != 0;
    return set;
}

// ---- ReLU -----------------------------------------------------------------------------------------------------------

// A NaN stays NaN, as in torch.
template <typename Scalar>
inline Vector<Scalar> relu(Vector<Scalar> y) {
    return y < 0 ? Vector<Scalar>{} : y;
}

// The gradient of ReLU's input. `y` is its input or its output. The test is "y <= 0", not "y > 0": where y is NaN the
// gradient passes, as in torch.
template <typename Scalar>
inline Vector<Scalar> passed_by_relu(Vector<Scalar> y, Vector<Scalar> grad) {
    return y <= 0 ? Vector<Scalar>{} : grad;
}

}  // namespace
}  // namespace signmaml::cpu::SIGNMAML_ISA
