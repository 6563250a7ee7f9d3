// No exception leaves a plugin: the host was not compiled to catch it.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace mbq {

// One line on stderr, where the process that loaded the library keeps it: MBQPLG <level> <op> <text>.
inline void say(const char *level, const char *op, const char *text) noexcept {
    std::fprintf(stderr, "MBQPLG %s %s %s\n", level, op, text);
}

// Only with MBQ_PLUGIN_LOG=1.
inline void say_if_asked(const char *op, const char *text) noexcept {
    const char *wanted = std::getenv("MBQ_PLUGIN_LOG");
    if (wanted != nullptr && std::strcmp(wanted, "1") == 0) say("info", op, text);
}

// What `body` returns, or `failure` if it throws.
template <class Value, class Body>
Value guarded(const char *op, Value failure, Body &&body) noexcept {
    try {
        return body();
    } catch (...) {
        say("error", op, "an exception was stopped at the plugin's edge");
        return failure;
    }
}

}  // namespace mbq
