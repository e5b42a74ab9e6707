// Sums of products as tensor cores make them. NVIDIA documents neither their order nor their rounding. The models here
// were validated on cards by others: M. Fasi, N. J. Higham, M. Mikaitis and S. Pranesh, "Numerical behavior of NVIDIA
// tensor cores", PeerJ CS 7:e330 (2021); F. A. Khattak and M. Mikaitis, "Accurate models of NVIDIA tensor cores",
// arXiv:2512.07004.
//
// A few products and the running sum are added at once. Each is aligned to the largest exponent among them (a product's
// is the sum of its factors' exponents) and cut off below float32's last bit of that exponent and a few extra bits. The
// aligned terms are added exactly, and the sum is cut off to float32: nothing is rounded to nearest.
#pragma once

#include <stdexcept>
#include <string>

namespace signmaml::emulation {

struct TensorCores {
    int tf32_products, bf16_products;  // added to the running sum at once
    int extra_bits;                    // of an aligned term, beyond float32's 24
};

// The models of sm_80 to sm_89 (A100, A2, A30; Ada) and of sm_90 to sm_120 (H100, H200, B200, RTX PRO 6000), by number.
inline TensorCores tensor_cores_of(int architecture) {
    if (architecture >= 80 && architecture < 90) return {4, 8, 1};
    if (architecture >= 90 && architecture <= 120) return {8, 16, 2};
    throw std::invalid_argument("architecture: expected a number from 80 to 120, such as 90 for sm_90, found " +
                                std::to_string(architecture));
}

// sum + a[0] b[0] + ... + a[depth - 1] b[depth - 1], `products` of them at a time; the factors have at most 24 bits.
float add_products(float sum, const float* a, const float* b, int depth, int products, int extra_bits);

}  // namespace signmaml::emulation
