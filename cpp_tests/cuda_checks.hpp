// What the programs on a CUDA device share: counted checks, descriptions, the shapes that codecs are made of.
#pragma once
#include <decoquant.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

inline int passed = 0, failed = 0;
inline void expect(bool fine, const std::string& what) {
    if (fine) { passed++; return; }
    failed++;
    char text[512];
    dq_last_error(text, sizeof text);
    std::printf("FAIL %s (last error: %s)\n", what.c_str(), text);
}
template <class T> T sized() {
    T t;
    std::memset(&t, 0, sizeof t);
    t.struct_size = sizeof t;
    return t;
}

struct Shape { uint32_t n_q, n_kv, d, k_plan, v_plan; };
