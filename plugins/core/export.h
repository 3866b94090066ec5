// What a shared library of lrq-export exports; everything else in it is hidden.
#pragma once

#if defined(_WIN32)
#define LRQ_EXPORT __declspec(dllexport)
#else
#define LRQ_EXPORT __attribute__((visibility("default")))
#endif
