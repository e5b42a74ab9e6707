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
    // A fiber that did not finish is dropped where it stands: kernels hold nothing that needs a destructor.
    ~Fiber();

    // Runs the body until it ends or calls `pause`. Called from outside of any fiber.
    void resume();
    // Hands control back to whoever resumed. Called from inside the body.
    void pause();
    bool finished() const { return finished_; }

  private:
    static void enter(unsigned high, unsigned low);
    // Changes of the stack: into the body, out of its middle, and out of its end.
    void take_up();
    void interrupt();
    void give_back();

    std::function<void()> body_;
    std::unique_ptr<char[]> stack_;
    ucontext_t own_{};
    ucontext_t caller_{};  // where jumps are not used
    jmp_buf to_body_{};
    jmp_buf to_caller_{};
    bool begun_ = false;
    bool finished_ = false;
    // What AddressSanitizer wants to know when the stack changes.
    void* fake_stack_ = nullptr;
    const void* caller_stack_ = nullptr;
    std::size_t caller_stack_bytes_ = 0;
};

}  // namespace signmaml::emulation
