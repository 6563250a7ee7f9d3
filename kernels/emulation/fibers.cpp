// The checked longjmp of fortified builds takes a switch to another stack for a corrupted one.
#undef _FORTIFY_SOURCE

#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace {

// Pages of a stack are taken only when touched. The sanitizer's frames are several times as large.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 1024 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

// The page below the stack stays unreadable: an overflow stops the process instead of writing into a neighbour.
char *new_stack() {
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void *memory = mmap(nullptr, kStackBytes + guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *stack = static_cast<char *>(memory) + guard;
    if (memory == MAP_FAILED || mprotect(stack, kStackBytes, PROT_READ | PROT_WRITE) != 0) {
        std::fputs("emulation: no memory for a thread's stack\n", stderr);
        std::abort();
    }
    return stack;
}

}  // namespace

void prepare(Fiber &fiber, void (*entry)()) {
    if (fiber.stack == nullptr) fiber.stack = new_stack();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    fiber.started = false;
}

#if defined(__SANITIZE_ADDRESS__)

namespace {

// The sanitizer replaces longjmp by one that believes in a single stack; the compiler's own pair it leaves alone.
__attribute__((noinline, noreturn, no_sanitize("address", "undefined"))) void resume(Fiber &to) {
    if (to.started) __builtin_longjmp(to.words, 1);
    setcontext(&to.context);
    __builtin_unreachable();
}

}  // namespace

__attribute__((noinline, no_sanitize("address", "undefined"))) void switch_fiber(Fiber &from, Fiber &to) {
    from.started = true;
    if (__builtin_setjmp(from.words) == 0) resume(to);
}

#else

__attribute__((noinline)) void switch_fiber(Fiber &from, Fiber &to) {
    from.started = true;
    if (_setjmp(from.stopped) != 0) return;
    if (to.started) _longjmp(to.stopped, 1);
    setcontext(&to.context);
}

#endif

}  // namespace simt
