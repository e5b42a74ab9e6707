// Checks that Python cannot do cheaply: of memory addresses and contents.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#ifdef SIGNMAML_EMULATION
#include "emulation/machine.h"
#endif

namespace signmaml::bindings {

[[noreturn]] inline void refuse(const std::string& argument, const std::string& expected, const std::string& found) {
    throw std::invalid_argument(argument + ": expected " + expected + ", found " + found);
}

// Throws for a negative size, and for sizes whose product exceeds 2^60, because values computed from them could
// overflow.
inline void check_product(const char* names, std::initializer_list<std::int64_t> factors) {
    double product = 1;
    for (const std::int64_t factor : factors) {
        if (factor < 0) {
            throw std::invalid_argument(std::string(names) + ": expected none below 0, found " +
                                        std::to_string(factor));
        }
        product *= static_cast<double>(factor);
    }
    if (product > 0x1p60) {
        throw std::invalid_argument(std::string(names) + ": expected a product of at most 2^60, found about " +
                                    std::to_string(product));
    }
}

inline void check_at_least_one(const char* name, std::int64_t value) {
    if (value < 1) {
        throw std::invalid_argument(std::string(name) + ": expected 1 or more, found " + std::to_string(value));
    }
}

inline void check_scalar_bytes(std::int64_t bytes) {
    if (bytes != 4 && bytes != 8) {
        throw std::invalid_argument("scalar_bytes: expected 4 or 8, found " + std::to_string(bytes));
    }
}

struct Region {
    const char* name;
    std::uintptr_t address;
    std::int64_t bytes;
    std::int64_t element_bytes;
    bool output = false;  // written completely before anything reads it

    bool overlaps(const Region& other) const {
        return bytes > 0 && other.bytes > 0 && address < other.address + static_cast<std::uintptr_t>(other.bytes) &&
               other.address < address + static_cast<std::uintptr_t>(bytes);
    }
};

#ifdef SIGNMAML_EMULATION
// Tells the emulated GPU which memory the next launches may touch.
inline void declare_memory(std::initializer_list<Region> written, std::initializer_list<Region> read) {
    auto& buffers = emulation::settings().buffers;
    buffers.clear();
    for (const Region& r : written) buffers.push_back({r.name, r.address, r.bytes, r.element_bytes, true, r.output});
    for (const Region& r : read) buffers.push_back({r.name, r.address, r.bytes, r.element_bytes, false});
}
#endif

// Throws unless each written region is disjoint from all others, and for a non-empty region without an address.
inline void check_apart(std::initializer_list<Region> written, std::initializer_list<Region> read) {
    for (const auto& regions : {written, read}) {
        for (const Region& region : regions) {
            if (region.bytes > 0 && region.address == 0) {
                throw std::invalid_argument(std::string(region.name) + ": expected an address, found none");
            }
        }
    }
    const auto check = [](const Region& a, const Region& b) {
        if (!a.overlaps(b)) return;
        throw std::invalid_argument(std::string(a.name) + ": expected memory of its own, found that it overlaps " +
                                    b.name);
    };
    for (const Region* a = written.begin(); a != written.end(); ++a) {
        for (const Region* b = written.begin(); b != a; ++b) check(*a, *b);
        for (const Region& b : read) check(*a, b);
    }
#ifdef SIGNMAML_EMULATION
    declare_memory(written, read);
#endif
}

// offsets: [segments + 1] int64 in host memory.
inline void check_segment_offsets(const std::int64_t* offsets, std::int64_t segments, std::int64_t parameters) {
    const auto fail = [](const std::string& found) {
        throw std::invalid_argument(
            "segment_offsets: expected 0 first, P last and none smaller than the one before, found " + found);
    };
    if (offsets[0] != 0) fail(std::to_string(offsets[0]) + " first");
    for (std::int64_t g = 0; g < segments; ++g) {
        if (offsets[g] > offsets[g + 1]) {
            fail(std::to_string(offsets[g + 1]) + " after " + std::to_string(offsets[g]) + " at index " +
                 std::to_string(g + 1));
        }
    }
    if (offsets[segments] != parameters) {
        fail(std::to_string(offsets[segments]) + " last with P = " + std::to_string(parameters));
    }
}

}  // namespace signmaml::bindings
