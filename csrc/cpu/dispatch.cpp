#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

namespace signmaml::cpu {
namespace {

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#ifdef SIGNMAML_HAS_PORTABLE
    found.push_back(&portable::kKernels);
#endif
    // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
#ifdef SIGNMAML_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kKernels);
#endif
#ifdef SIGNMAML_HAS_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
        found.push_back(&avx512::kKernels);
    }
#endif
    return found;
}

const Kernels* fastest() {
    const std::vector<const Kernels*> found = usable();
    if (found.empty()) throw std::runtime_error("this CPU has none of the instruction sets that were compiled in");
    return found.back();
}

std::atomic<const Kernels*>& selected() {
    static std::atomic<const Kernels*> choice{fastest()};
    return choice;
}

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Kernels* each : usable()) names.emplace_back(each->name);
    return names;
}

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

void select_isa(const std::string& name) {
    std::string names;
    for (const Kernels* each : usable()) {
        if (name == each->name) {
            selected().store(each, std::memory_order_relaxed);
            return;
        }
        names += (names.empty() ? "" : ", ") + std::string(each->name);
    }
    throw std::invalid_argument("CPU instruction set: expected one of those usable here (" + names + "), found '" +
                                name + "'");
}

}  // namespace signmaml::cpu
