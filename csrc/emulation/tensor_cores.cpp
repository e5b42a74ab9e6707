#include "emulation/tensor_cores.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace signmaml::emulation {
namespace {

constexpr int kMostProducts = 16;
constexpr int kMantissa = 23;    // bits of a float after the point
constexpr int kSmallest = -126;  // exponent of the smallest normal float, and of all subnormal ones
constexpr int kNoExponent = -1000;

// A finite float: digits * 2^(exponent - 23), with the sign apart.
struct Parts {
    std::uint64_t digits;
    int exponent;
    bool negative;
};

Parts parts_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint32_t fraction = bits & 0x7fffffu;
    const int field = static_cast<int>(bits >> kMantissa & 0xffu);
    if (field == 0) return {fraction, kSmallest, (bits >> 31) != 0};
    return {fraction | 0x800000u, field - 127, (bits >> 31) != 0};
}

// A term's magnitude: digits * 2^(exponent - point).
struct Term {
    std::uint64_t digits;
    int exponent, point;
    bool negative;
};

Term product_of(float a, float b) {
    const Parts x = parts_of(a), y = parts_of(b);
    return {x.digits * y.digits, x.exponent + y.exponent, 2 * kMantissa, x.negative != y.negative};
}

// digits * 2^shift, cut off.
std::uint64_t shifted(std::uint64_t digits, int shift) {
    if (shift >= 0) return digits << shift;
    return shift > -64 ? digits >> -shift : 0;
}

// magnitude * 2^unit, cut off to a float.
float cut_to_float(std::uint64_t magnitude, int unit) {
    int extra = 0;  // bits that a float does not have
    while (magnitude >> extra >= 1u << (kMantissa + 1)) ++extra;
    const int least = kSmallest - kMantissa - unit;  // subnormal floats have fewer
    if (extra < least) extra = least;
    if (extra >= 64) return 0.0f;
    const double cut = std::ldexp(static_cast<double>(magnitude >> extra), unit + extra);
    constexpr float kMost = std::numeric_limits<float>::max();
    return cut > double{kMost} ? std::numeric_limits<float>::infinity() : static_cast<float>(cut);
}

float add_at_once(float sum, const float* a, const float* b, int count, int extra_bits) {
    Term terms[kMostProducts + 1];
    for (int k = 0; k < count; ++k) terms[k] = product_of(a[k], b[k]);
    const Parts before = parts_of(sum);
    terms[count] = {before.digits, before.exponent, kMantissa, before.negative};
    int largest = kNoExponent;
    for (int k = 0; k <= count; ++k) {
        if (terms[k].digits != 0 && terms[k].exponent > largest) largest = terms[k].exponent;
    }
    if (largest == kNoExponent) return 0.0f;
    const int unit = largest - kMantissa - extra_bits;
    std::int64_t total = 0;
    for (int k = 0; k <= count; ++k) {
        const Term& term = terms[k];
        const auto aligned = static_cast<std::int64_t>(shifted(term.digits, term.exponent - term.point - unit));
        total += term.negative ? -aligned : aligned;
    }
    const float magnitude = cut_to_float(static_cast<std::uint64_t>(total < 0 ? -total : total), unit);
    return total < 0 ? -magnitude : magnitude;
}

}  // namespace

float add_products(float sum, const float* a, const float* b, int depth, int products, int extra_bits) {
    float plain = sum;
    bool finite = std::isfinite(sum);
    for (int k = 0; k < depth; ++k) {
        plain += a[k] * b[k];
        finite = finite && std::isfinite(a[k]) && std::isfinite(b[k]);
    }
    if (!finite) return plain;  // Inf or NaN
    for (int k = 0; k < depth; k += products) sum = add_at_once(sum, a + k, b + k, products, extra_bits);
    return sum;
}

}  // namespace signmaml::emulation
