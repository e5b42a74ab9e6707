// Assertions of a small test program: a failure prints its location and values, and the program exits with status 1.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
            if (++failures == 20) return;                               \
        }                                                               \
    } while (false)
