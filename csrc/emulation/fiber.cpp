#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN(...) __VA_ARGS__
#else
#define EMULATION_ASAN(...)
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer at *save, continues from the stack `to`.
extern "C" __attribute__((visibility("hidden"))) void emulation_switch(void** save, void* to);
__asm__(
    ".text\n.p2align 4\n.globl emulation_switch\n.hidden emulation_switch\n.type emulation_switch,@function\n"
    "emulation_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emulation_switch,.-emulation_switch\n");
#endif

namespace emulation {
namespace {

constexpr size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

Fiber* entering = nullptr;

}  // namespace

Fiber::Fiber() {
    void* p = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kPage, PROT_NONE);
    stack_ = static_cast<char*>(p) + kPage;
}

Fiber::~Fiber() { munmap(stack_ - kPage, kStack + kPage); }

void Fiber::trampoline() {
    Fiber* self = entering;
    EMULATION_ASAN(__sanitizer_finish_switch_fiber(nullptr, &self->outside_stack_, &self->outside_size_);)
    self->main_();
    std::abort();  // main leaves for good
}

void Fiber::start(void (*main)()) {
    main_ = main;
    EMULATION_ASAN(fake_inside_ = nullptr;)
#if defined(__x86_64__)
    // A first frame that emulation_switch returns into: six registers and the address of trampoline(), on a stack
    // aligned as at a function's entry.
    const uintptr_t top = reinterpret_cast<uintptr_t>(stack_ + kStack) & ~uintptr_t(15);
    void** frame = reinterpret_cast<void**>(top - 16);
    *frame = reinterpret_cast<void*>(&Fiber::trampoline);
    frame -= 6;
    std::memset(frame, 0, 6 * sizeof(void*));
    inside_ = frame;
#else
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_;
    inside_.uc_stack.ss_size = kStack;
    inside_.uc_link = nullptr;
    makecontext(&inside_, &Fiber::trampoline, 0);
#endif
}

void Fiber::enter() {
    entering = this;
    EMULATION_ASAN(__sanitizer_start_switch_fiber(&fake_outside_, stack_, kStack);)
#if defined(__x86_64__)
    emulation_switch(&outside_, inside_);
#else
    swapcontext(&outside_, &inside_);
#endif
    EMULATION_ASAN(__sanitizer_finish_switch_fiber(fake_outside_, nullptr, nullptr);)
}

void Fiber::switch_out([[maybe_unused]] bool for_good) {
    EMULATION_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &fake_inside_, outside_stack_, outside_size_);)
#if defined(__x86_64__)
    emulation_switch(&inside_, outside_);
#else
    swapcontext(&inside_, &outside_);
#endif
    EMULATION_ASAN(__sanitizer_finish_switch_fiber(fake_inside_, &outside_stack_, &outside_size_);)
}

void Fiber::leave() { switch_out(false); }
void Fiber::leave_for_good() {
    switch_out(true);
    std::abort();
}

}  // namespace emulation
