// Default floating-point behaviour for the length of a scope.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace signmaml::cpu {

// torch.set_flush_denormal(True) makes the calling thread read subnormals as zero. A subnormal gradient has a sign, so
// the control register is set to its default, and put back.
class DefaultFloatingPoint {
  public:
    DefaultFloatingPoint() : saved_(read()) { write(kDefault); }
    ~DefaultFloatingPoint() { write(saved_); }
    DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
    DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

  private:
#if defined(__x86_64__)
    using Register = unsigned int;
    static constexpr Register kDefault = 0x1F80;  // MXCSR: exceptions masked, to nearest, no flush, no DAZ
    static Register read() { return _mm_getcsr(); }
    static void write(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
    using Register = std::uint64_t;
    static constexpr Register kDefault = 0;  // FPCR
    static Register read() {
        Register value;
        asm volatile("mrs %0, fpcr" : "=r"(value));
        return value;
    }
    static void write(Register value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
    using Register = int;  // nothing known to save
    static constexpr Register kDefault = 0;
    static Register read() { return 0; }
    static void write(Register) {}
#endif
    Register saved_;
};

}  // namespace signmaml::cpu
