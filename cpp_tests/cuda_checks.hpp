// What the programs on a CUDA device share: counted checks, descriptions, the shapes that codecs are made of.
#pragma once
#include <decoquant.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

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

// The call's status, and what its message must contain.
inline void expect_status(dq_status got, dq_status want, const std::string& what, const char* says = "") {
    char text[512];
    dq_last_error(text, sizeof text);
    expect(got == want && std::strstr(text, says) != nullptr, what + ": " + dq_status_name(got) + ", wanted " + dq_status_name(want) + " and \"" + says + "\"");
}

inline dq_context* open(uint32_t backend) {
    auto desc = sized<dq_context_desc>();
    desc.backend = backend;
    dq_context* context = nullptr;
    expect_status(dq_context_create(&desc, &context), DQ_OK, "context");
    return context;
}
inline dq_codec* make(const dq_context* context, const Shape& s, uint32_t n_layers = 1, uint32_t flags = 0, uint32_t max_fits = 0) {
    std::vector<dq_layer_desc> layers(n_layers, sized<dq_layer_desc>());
    for (auto& l : layers) {
        l.n_q_heads = s.n_q, l.n_kv_heads = s.n_kv, l.head_dim_k = l.head_dim_v = s.d;
        l.k_plan = s.k_plan, l.v_plan = s.v_plan;
    }
    auto desc = sized<dq_codec_desc>();
    desc.n_layers = n_layers, desc.layers = layers.data(), desc.flags = flags, desc.max_fits = max_fits;
    dq_codec* codec = nullptr;
    expect_status(dq_codec_create(context, &desc, &codec), DQ_OK, "codec");
    return codec;
}
