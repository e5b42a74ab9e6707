// A thread of execution that runs until it hands control back: one for each emulated CUDA thread.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>

namespace signmaml::emulation {

class Fiber {
  public:
    explicit Fiber(std::function<void()> body);
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    // An unfinished fiber is simply dropped, because kernels hold nothing that needs a destructor.
    ~Fiber();

    // Runs the body until it ends or calls `pause`. Called from outside of any fiber.
    void resume();
    // Hands control back to the caller of resume. Called from inside the body.
    void pause();
    bool finished() const { return finished_; }

  private:
    static void enter(unsigned high, unsigned low);
    // Switch stacks: into the body, out of it when it pauses, and out of it when it ends.
    void take_up();
    void interrupt();
    void give_back();

    std::function<void()> body_;
    std::unique_ptr<char[]> stack_;
    ucontext_t own_{};
    ucontext_t caller_{};  // used only where longjmp is not
    jmp_buf to_body_{};
    jmp_buf to_caller_{};
    bool begun_ = false;
    bool finished_ = false;
    // What AddressSanitizer must be told when the stack changes.
    void* fake_stack_ = nullptr;
    const void* caller_stack_ = nullptr;
    std::size_t caller_stack_bytes_ = 0;
};

}  // namespace signmaml::emulation
