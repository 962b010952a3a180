// The smallest program on decoquant.hpp.
#include <decoquant.hpp>

#include <cstdio>

int main() {
    if (dq_abi_version() != DQ_ABI_VERSION) return 2;
    auto layer = dq::sized<dq_layer_desc>();
    layer.n_q_heads = 8;
    layer.n_kv_heads = 2;
    layer.head_dim_k = layer.head_dim_v = 128;
    layer.k_plan = 104;
    layer.v_plan = 4;
    auto model = dq::sized<dq_codec_desc>();
    model.n_layers = 1;
    model.layers = &layer;
    try {
        const auto codec = dq::Codec::create(dq::Context::create(), model);
        std::printf("libdecoquant %s: %.2f bits per value\n", dq_version(), codec.layout(0).bits_per_value);
    } catch (const dq::Error &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
