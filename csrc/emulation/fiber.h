// A stack of its own and a switch between it and whoever entered it.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

class Fiber {
  public:
    Fiber();  // the stack ends at an inaccessible page
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    void start(void (*main)());          // main() runs at the next enter(); a fiber that was left may be started anew
    void enter();                        // from the scheduler; back when the fiber leaves
    void leave();                        // from inside; back at the next enter()
    [[noreturn]] void leave_for_good();  // from inside

  private:
    void switch_out(bool for_good);
    static void trampoline();

    char* stack_;
#if defined(__x86_64__)
    void *inside_ = nullptr, *outside_ = nullptr;  // saved stack pointers
#else
    ucontext_t inside_, outside_;
#endif
    void (*main_)() = nullptr;
    // AddressSanitizer's own bookkeeping.
    void *fake_inside_ = nullptr, *fake_outside_ = nullptr;
    const void* outside_stack_ = nullptr;
    size_t outside_size_ = 0;
};

}  // namespace emulation
