// The record, byte by byte: fixed rows under the plain rotation and under committed factor files give the committed
// bytes, on every machine. DQ_GOLDEN_WRITE=1 rewrites the files; doing so changes the record format.
#include "support.hpp"

#include <fstream>
#include <iterator>

using namespace test;

namespace {

constexpr uint32_t kTokens = 4;
constexpr uint32_t kDims[] = {64, 80, 96, 128, 192, 256};

std::vector<uint32_t> plans() {
    std::vector<uint32_t> all;
    for (uint32_t plan = 0; plan < 4096; plan++) {
        if (dq_plan_name(plan)) all.push_back(plan);
    }
    return all;
}

std::string path(const std::string &name) { return std::string(DQ_TEST_GOLDEN) + "/" + name; }

Bytes read(const std::string &name) {
    std::ifstream file(path(name), std::ios::binary);
    INFO(path(name));
    REQUIRE(file.good());
    return Bytes(std::istreambuf_iterator<char>(file), {});
}

bool rewriting() { return std::getenv("DQ_GOLDEN_WRITE") != nullptr; }

void write(const std::string &name, const Bytes &bytes) {
    std::ofstream file(path(name), std::ios::binary);
    file.write(reinterpret_cast<const char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    REQUIRE(file.good());
}

void check(const std::string &name, const Bytes &got) {
    if (rewriting()) write(name, got);
    const Bytes want = read(name);
    REQUIRE(got.size() == want.size());
    for (size_t i = 0; i < got.size(); i++) {
        INFO(name << ", byte " << i);
        REQUIRE(int{got[i]} == int{want[i]});
    }
}

dq_layer_desc layer_of(uint32_t dim, uint32_t plan, uint32_t gauge, uint32_t heads = 2) {
    auto layer = layer_desc(dim, dim, plan, plan);
    layer.n_kv_heads = layer.n_q_heads = heads;
    layer.k_gauge = gauge;
    layer.v_gauge = gauge == DQ_GAUGE_ROTATION ? DQ_GAUGE_ROTATION : DQ_GAUGE_CENTRED;
    return layer;
}

// Ordinary rows and, last, one of extremes: a spike, large values, zeros.
Bytes records(const dq_codec *codec, uint32_t i, const dq_layer_desc &layer) {
    const Store store(codec, i, kTokens);
    Batch batch(layer, kTokens, 1000 + i, 5);
    for (uint32_t t = 0; t < kTokens; t++) batch.slots[t] = t;
    batch.k.fill_row(kTokens - 1, 0, 0.0f);
    batch.k.set(kTokens - 1, 0, 3, 60000.0f);
    batch.v.fill_row(kTokens - 1, 0, 0.0f);
    const auto tokens = batch.tokens(store);
    ok(dq_encode_shard(const_cast<dq_codec *>(codec), i, &tokens, 0, 1));
    return store.bytes();
}

struct Fitted {
    std::string name;
    std::vector<dq_layer_desc> layers;
};

// Matrices are large: all plans at 64 channels, one plan at the dims with Hadamard factors of 20 and 12, means alone at
// the rest (where the matrix is the same loop).
std::vector<Fitted> fitted() {
    std::vector<Fitted> all;
    for (uint32_t plan : plans()) {
        all.push_back({"fit-" + std::string(dq_plan_name(plan)) + "-64", {layer_of(64, plan, DQ_GAUGE_ATTENTION, 1)}});
    }
    all.push_back({"fit-3-80", {layer_of(80, 3, DQ_GAUGE_ATTENTION, 1)}});
    all.push_back({"fit-4-96", {layer_of(96, 4, DQ_GAUGE_ATTENTION, 1)}});
    for (uint32_t plan : plans()) {
        Fitted means{"means-" + std::string(dq_plan_name(plan)), {}};
        for (uint32_t dim : kDims) means.layers.push_back(layer_of(dim, plan, DQ_GAUGE_CENTRED));
        all.push_back(means);
    }
    return all;
}

// A history that leaves one fit and one sink.
Bytes make_factors(const std::vector<dq_layer_desc> &layers) {
    auto desc = codec_desc(layers);
    desc.max_fits = 1;
    dq_codec *codec = nullptr;
    ok(dq_codec_create(make_context().get(), &desc, &codec));
    const Codec holder(codec);
    for (uint32_t i = 0; i < layers.size(); i++) {
        const Store store(codec, i, 600);
        Batch batch(layers[i], 600, i);
        for (uint32_t h = 0; h < layers[i].n_kv_heads; h++) batch.k.set(0, h, 9, 40.0f);
        const auto tokens = batch.tokens(store);
        ok(dq_compress(codec, i, &tokens, nullptr, 0, nullptr));
    }
    return save(codec);
}

}  // namespace

TEST_CASE("records under the rotation") {
    for (uint32_t plan : plans()) {
        Bytes all;
        for (uint32_t dim : kDims) {
            const auto layer = layer_of(dim, plan, DQ_GAUGE_ROTATION);
            const Bytes some = records(make_codec({layer}).get(), 0, layer);
            all.insert(all.end(), some.begin(), some.end());
        }
        check("rotation-" + std::string(dq_plan_name(plan)) + ".records", all);
    }
}

TEST_CASE("records under factor files") {
    for (const auto &f : fitted()) {
        if (rewriting()) write(f.name + ".factors", make_factors(f.layers));
        Codec codec;
        ok(load(read(f.name + ".factors"), f.layers, codec));
        Bytes all;
        for (uint32_t i = 0; i < f.layers.size(); i++) {
            const Bytes some = records(codec.get(), i, f.layers[i]);
            all.insert(all.end(), some.begin(), some.end());
        }
        check(f.name + ".records", all);
    }
}

TEST_CASE("committed factor files are written back byte for byte") {
    for (const auto &f : fitted()) {
        const Bytes file = read(f.name + ".factors");
        Codec codec;
        ok(load(file, f.layers, codec));
        CHECK(save(codec.get()) == file);
        const auto state = info(codec.get());
        CHECK((state.k_sets >= 2 && state.v_sets >= 2));
    }
}
