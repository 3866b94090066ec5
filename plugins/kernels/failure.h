// What the last failed call of a thread has to say.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace lrq {

constexpr int32_t kFailureBytes = 512;

inline char* failureText() {
    static thread_local char text[kFailureBytes] = "";
    return text;
}

// Keeps the text for lrqKernelsError and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
inline int32_t fail(int32_t status, char const* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(failureText(), kFailureBytes, format, arguments);
    va_end(arguments);
    return status;
}

}  // namespace lrq
