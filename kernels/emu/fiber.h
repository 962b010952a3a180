// One fiber per CUDA thread: a stack of its own and a switch that saves the callee-saved registers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif
#if !defined(__x86_64__)
#define EMU_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emu {

constexpr size_t STACK_BYTES = EMU_ASAN ? 256 * 1024 : 128 * 1024;

// A point of execution that can be switched away from and back to.
struct Context {
#ifdef EMU_UCONTEXT
    ucontext_t state;
#else
    void* stack_pointer = nullptr;
#endif
    // What AddressSanitizer wants to know of the stack.
    void* fake_stack = nullptr;
    const void* bottom = nullptr;
    size_t bytes = 0;
};

#ifndef EMU_UCONTEXT
extern "C" void emu_switch_stacks(void** save, void* to);
asm(R"(
.text
.p2align 4
.weak emu_switch_stacks
.type emu_switch_stacks,@function
emu_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stacks,.-emu_switch_stacks
)");
#endif

// Leaves `from` and continues `to`. `last`: `from` will never run again.
inline void switch_context(Context& from, Context& to, bool last) {
#if EMU_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#endif
    (void)last;
#ifdef EMU_UCONTEXT
    swapcontext(&from.state, &to.state);
#else
    emu_switch_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// To be called first on a new stack; learns the stack of the context that started it.
inline void arrived_on_new_stack(Context& starter) {
    (void)starter;
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &starter.bottom, &starter.bytes);
#endif
}

// Prepares `context` to start `entry` on `stack`.
inline void prepare_context(Context& context, char* stack, void (*entry)()) {
    context.bottom = stack;
    context.bytes = STACK_BYTES;
    context.fake_stack = nullptr;
#ifdef EMU_UCONTEXT
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = STACK_BYTES;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
#else
    // From the top: a null return address for `entry`, `entry` itself for `ret`, six registers.
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + STACK_BYTES) & ~uintptr_t(15);
    void** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--slot = nullptr;
    context.stack_pointer = slot;
#endif
}

}  // namespace emu
