// Checks that say where they failed and let the rest run.
#pragma once

#include <cstdio>

inline int failures = 0;

#define EXPECT(condition)                                                           \
    do {                                                                            \
        if (!(condition)) {                                                         \
            ++failures;                                                             \
            std::printf("FAILED %s:%d  %s\n", __FILE__, __LINE__, #condition);      \
        }                                                                           \
    } while (0)

// The exit status of a program of checks.
inline int verdict() {
    std::printf(failures == 0 ? "all checks hold\n" : "%d checks failed\n", failures);
    return failures == 0 ? 0 : 1;
}
