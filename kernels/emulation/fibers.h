// Stacks that take turns on one operating-system thread.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

#pragma GCC visibility push(hidden)

namespace simt {

// One stack and where it stopped. ucontext starts it; later switches use _setjmp and _longjmp, which, unlike
// swapcontext, make no system call.
struct Fiber {
    jmp_buf stopped;
    void *words[5];  // the same, when built for the address sanitizer
    ucontext_t context;
    char *stack = nullptr;
    bool started = false;
};

// Make `fiber` run `entry` from its beginning at the next switch to it. `entry` never returns.
void prepare(Fiber &fiber, void (*entry)());

// Stop `from` here and go on with `to`; returns when somebody switches back to `from`.
void switch_fiber(Fiber &from, Fiber &to);

}  // namespace simt

#pragma GCC visibility pop
