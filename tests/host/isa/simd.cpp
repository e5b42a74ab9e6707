// Every function of simd.h against a loop over lanes.

#include "cpu/isa/simd.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"

using namespace signmaml::cpu::SIGNMAML_ISA;

namespace {

// Distinct numbers, so that lanes can be told apart; `loose` is aligned only to Scalar.
template <typename Scalar>
struct Numbers {
    alignas(64) Scalar all[64];
    Scalar* loose = all + 1;

    explicit Numbers(Scalar first) {
        for (int i = 0; i < 64; ++i) all[i] = first + static_cast<Scalar>(i);
    }
};

template <typename Scalar>
void memory() {
    constexpr int kL = kLanes<Scalar>;
    Numbers<Scalar> from(3), to(100);
    store(to.all, load(from.all));
    for (int i = 0; i < kL; ++i) CHECK(to.all[i] == from.all[i], "lane %d", i);
    CHECK(to.all[kL] == Scalar(100 + kL), "beyond the vector");
    store_loose(to.loose, load_loose(from.loose));
    for (int i = 0; i < kL; ++i) CHECK(to.loose[i] == from.loose[i], "lane %d", i);
    CHECK(to.loose[kL] == Scalar(101 + kL), "beyond the vector");
    const Vector<Scalar> value = all(Scalar(-7)), other = Simd<Scalar>::all(Scalar(-7));
    for (int i = 0; i < kL; ++i) CHECK(value[i] == Scalar(-7) && other[i] == Scalar(-7), "lane %d", i);
    CHECK(sizeof(Vector<Scalar>) == kVectorBytes && sizeof(Mask<Scalar>) == kVectorBytes, "sizes");
}

template <typename Scalar>
void choices() {
    constexpr int kL = kLanes<Scalar>;
    std::uint8_t bytes[65], back[65];
    for (int i = 0; i < 65; ++i) bytes[i] = static_cast<std::uint8_t>(i * 37 % 251), back[i] = 255;
    const Mask<Scalar> wide = load_choice<Scalar>(bytes + 1);
    for (int i = 0; i < kL; ++i) CHECK(wide[i] == bytes[1 + i], "lane %d", i);
    store_choice<Scalar>(back + 1, wide);
    for (int i = 0; i < kL; ++i) CHECK(back[1 + i] == bytes[1 + i], "lane %d", i);
    CHECK(back[0] == 255 && back[1 + kL] == 255, "beyond the vector");
}

template <typename S>
void lanes_of_any_width() {
    using Scalar = typename S::Scalar;
    using V = typename S::Vector;
    constexpr int kL = S::kLanes;
    V a{}, b{};
    for (int i = 0; i < kL; ++i) a[i] = static_cast<Scalar>(i), b[i] = static_cast<Scalar>(100 + i);
    const V low = interleaved<S, 0>(a, b), high = interleaved<S, kL / 2>(a, b);
    for (int i = 0; i < kL; ++i) {
        CHECK(low[i] == (i % 2 == 0 ? a : b)[i / 2], "lane %d of %d", i, kL);
        CHECK(high[i] == (i % 2 == 0 ? a : b)[kL / 2 + i / 2], "lane %d of %d", i, kL);
    }
    V square[kL];
    for (int i = 0; i < kL; ++i) {
        for (int j = 0; j < kL; ++j) square[i][j] = static_cast<Scalar>(kL * i + j);
    }
    transpose<S>(square);
    for (int i = 0; i < kL; ++i) {
        for (int j = 0; j < kL; ++j) CHECK(square[i][j] == static_cast<Scalar>(kL * j + i), "(%d, %d) of %d", i, j, kL);
    }
}

template <typename Scalar>
void lanes() {
    constexpr int kL = kLanes<Scalar>;
    Vector<Scalar> a{}, b{};
    for (int i = 0; i < kL; ++i) a[i] = static_cast<Scalar>(i), b[i] = static_cast<Scalar>(100 + i);
    const Vector<Scalar> even = every_other<Scalar>(a, b);
    for (int i = 0; i < kL; ++i) CHECK(even[i] == (2 * i < kL ? a[2 * i] : b[2 * i - kL]), "lane %d", i);

    Mask<Scalar> index{};
    for (int i = 0; i < kL; ++i) index[i] = (5 * i + 2) % kL;
    const Vector<Scalar> chosen = picked<Scalar>(b, index);
    for (int i = 0; i < kL; ++i) CHECK(chosen[i] == b[(5 * i + 2) % kL], "lane %d", i);

    CHECK(sum_of_lanes<Scalar>(a) == static_cast<Scalar>(kL * (kL - 1) / 2), "%g", double(sum_of_lanes<Scalar>(a)));
    for (int i = 0; i < kL; ++i) {
        Vector<Scalar> one{};
        one[i] = 1;
        CHECK(sum_of_lanes<Scalar>(one) == 1, "lane %d", i);
    }

    for (int count = 0; count <= kL; ++count) {
        for (int gap = 0; gap < kL; ++gap) {
            Mask<Scalar> mask = Mask<Scalar>{} - 1;
            mask[gap] = 0;
            CHECK(all_set<Scalar>(mask, count) == (gap >= count), "%d lanes, lane %d unset", count, gap);
        }
    }
}

template <typename Scalar>
void rectifiers() {
    const Scalar inf = std::numeric_limits<Scalar>::infinity(), nan = std::numeric_limits<Scalar>::quiet_NaN();
    const Scalar inputs[] = {Scalar(-2), -inf, Scalar(-0.0), Scalar(0), Scalar(3), inf, nan};
    for (const Scalar x : inputs) {
        const Scalar y = relu<Scalar>(Vector<Scalar>{} + x)[0];
        CHECK(std::isnan(x) ? std::isnan(y) : y == (x > 0 ? x : 0), "relu(%g) = %g", double(x), double(y));
        const Scalar grad = passed_by_relu<Scalar>(Vector<Scalar>{} + x, all(Scalar(5)))[0];
        CHECK(grad == (x > 0 || std::isnan(x) ? 5 : 0), "gradient at %g: %g", double(x), double(grad));
    }
}

template <typename Scalar>
void functions() {
    memory<Scalar>();
    choices<Scalar>();
    lanes<Scalar>();
    lanes_of_any_width<Simd<Scalar>>();
    lanes_of_any_width<Simd<Scalar, 16>>();
    rectifiers<Scalar>();
}

}  // namespace

int main() {
    functions<float>();
    functions<double>();
    return failures == 0 ? 0 : 1;
}
