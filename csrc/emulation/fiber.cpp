// Some distributions enable _FORTIFY_SOURCE by default, and its longjmp aborts on a jump to another stack.
#undef _FORTIFY_SOURCE
#include "emulation/fiber.h"

#include <cstdint>
#include <utility>

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#include <sanitizer/common_interface_defs.h>
#define SIGNMAML_ASAN 1
#endif

namespace signmaml::emulation {
namespace {

// Device code has no deep calls, but sanitizers make frames larger.
constexpr std::size_t kStackBytes = 128 * 1024;

}  // namespace

Fiber::Fiber(std::function<void()> body) : body_(std::move(body)), stack_(new char[kStackBytes]) {
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.get();
    own_.uc_stack.ss_size = kStackBytes;
    own_.uc_link = nullptr;
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    // makecontext passes ints only.
    makecontext(&own_, reinterpret_cast<void (*)()>(&Fiber::enter), 2, static_cast<unsigned>(std::uint64_t{self} >> 32),
                static_cast<unsigned>(self));
}

Fiber::~Fiber() = default;

void Fiber::enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>((std::uint64_t{high} << 32) | low));
#ifdef SIGNMAML_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_stack_bytes_);
#endif
    self->body_();
    self->finished_ = true;
#ifdef SIGNMAML_ASAN
    __sanitizer_start_switch_fiber(nullptr, self->caller_stack_, self->caller_stack_bytes_);
#endif
    self->give_back();
}

// swapcontext makes a system call for the signal mask, which takes longer than the rest of a switch. So a context only
// starts a fiber, and later switches use longjmp. Under AddressSanitizer contexts are used throughout, because it takes
// a longjmp for the end of all calls in between.
#ifdef SIGNMAML_ASAN

void Fiber::take_up() { swapcontext(&caller_, &own_); }
void Fiber::interrupt() { swapcontext(&own_, &caller_); }
void Fiber::give_back() { setcontext(&caller_); }

#else

void Fiber::take_up() {
    if (_setjmp(to_caller_) != 0) return;
    if (begun_) _longjmp(to_body_, 1);
    begun_ = true;
    setcontext(&own_);
}

void Fiber::interrupt() {
    if (_setjmp(to_body_) == 0) give_back();
}

void Fiber::give_back() { _longjmp(to_caller_, 1); }

#endif

void Fiber::resume() {
#ifdef SIGNMAML_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_.get(), kStackBytes);
#endif
    take_up();
#ifdef SIGNMAML_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::pause() {
#ifdef SIGNMAML_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, caller_stack_, caller_stack_bytes_);
#endif
    interrupt();
#ifdef SIGNMAML_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_stack_bytes_);
#endif
}

}  // namespace signmaml::emulation
