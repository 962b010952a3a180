// Records that leave their codec: with its sets and a remap another codec reads them as the first one would.
#include "support.hpp"

using namespace test;

namespace {

constexpr uint32_t kTokens = 96, kQueries = 5;

struct Engine {
    std::vector<dq_layer_desc> layers{layer_desc(80, 96, 4, 3)};
    Codec codec = make_codec(layers);
    Store store{codec.get(), 0, kTokens};

    Engine() = default;
    // `seed` makes the codecs' histories, and so their sets, differ.
    explicit Engine(uint64_t seed) { run(seed); }

    void run(uint64_t seed) {
        const Batch batch(layers[0], kTokens, seed);
        auto tokens = batch.tokens(store);
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    }

    void attend(Rows &out) const {
        Rows q(kQueries, 4, 80);
        q.fill(77);
        const auto args = attend_args(store, q, out, kTokens);
        const Fenced ws(workspace_size(codec.get(), 0, kQueries, kTokens));
        ok(dq_attend(codec.get(), 0, &args, ws.data(), ws.size(), nullptr));
    }

    void dequantize(Rows &k, Rows &v) const {
        std::vector<int64_t> slots;
        for (uint32_t i = 0; i < kTokens; i++) slots.push_back(i);
        const auto view = store.view();
        const auto to_k = k.tensor(), to_v = v.tensor();
        ok(dq_dequantize(codec.get(), 0, &view, slots.data(), kTokens, &to_k, &to_v, nullptr));
    }

    dq_status import(const Bytes &file, std::vector<uint8_t> &map) const {
        Reader reader{&file};
        map.assign(2 * 2 * DQ_MAX_SETS, 0xEE);
        return dq_sets_import(codec.get(), 0, take_bytes, &reader, map.data(), map.size());
    }

    void remap(const std::vector<uint8_t> &map) const {
        std::vector<int64_t> slots;
        for (uint32_t i = 0; i < kTokens; i++) slots.push_back(i);
        const auto view = store.view();
        ok(dq_remap_rows(codec.get(), 0, &view, slots.data(), slots.size(), map.data(), map.size()));
    }
};

}  // namespace

TEST_CASE("records move to another codec with their sets") {
    const Engine from(3);
    for (uint64_t history : {0, 4}) {
        Engine to;
        if (history) to.run(history);
        std::vector<uint8_t> map;
        ok(to.import(export_sets(from.codec.get()), map));
        std::memcpy(to.store.memory().data(), from.store.memory().data(), from.store.memory().size());
        to.remap(map);
        Rows k[2] = {{kTokens, 2, 80}, {kTokens, 2, 80}}, v[2] = {{kTokens, 2, 96}, {kTokens, 2, 96}};
        from.dequantize(k[0], v[0]);
        to.dequantize(k[1], v[1]);
        CHECK((k[0] == k[1] && v[0] == v[1]));
        // Sums over sets go by their ids, so that attention may differ in the last bits.
        Rows out[2] = {{kQueries, 4, 96}, {kQueries, 4, 96}};
        from.attend(out[0]);
        to.attend(out[1]);
        for (uint32_t t = 0; t < kQueries; t++) {
            for (uint32_t h = 0; h < 4; h++) {
                for (uint32_t c = 0; c < 96; c++) {
                    CHECK(out[1].get(t, h, c) == Approx(out[0].get(t, h, c)).epsilon(0).margin(1e-5));
                }
            }
        }
    }
}

TEST_CASE("sets that are there keep their id") {
    const Engine from(3);
    const Bytes file = export_sets(from.codec.get());
    std::vector<uint8_t> map;
    const auto before = info(from.codec.get());
    ok(from.import(file, map));
    const auto after = info(from.codec.get());
    CHECK((before.k_sets == after.k_sets && before.v_sets == after.v_sets));
    CHECK(before.factor_bytes == after.factor_bytes);
    for (size_t i = 0; i < map.size(); i++) CHECK((map[i] == i % DQ_MAX_SETS || map[i] == 255));

    const Engine to(4);
    std::vector<uint8_t> first, second;
    ok(to.import(file, first));
    ok(to.import(file, second));
    CHECK(first == second);
    for (size_t i = 0; i < 4; i++) CHECK(first[i * DQ_MAX_SETS] == 0);
}

TEST_CASE("imports do not change how rows are coded where there is a fit") {
    const Engine from(3);
    Engine to(4), same(4);
    std::vector<uint8_t> map;
    ok(to.import(export_sets(from.codec.get()), map));
    const Batch batch(to.layers[0], 50, 8);
    auto tokens = batch.tokens(to.store);
    ok(dq_append(to.codec.get(), 0, &tokens, nullptr, 0, nullptr));
    tokens = batch.tokens(same.store);
    ok(dq_append(same.codec.get(), 0, &tokens, nullptr, 0, nullptr));
    CHECK(to.store.bytes() == same.store.bytes());
}

TEST_CASE("a codec without a fit goes on with the newest set of an import") {
    const Engine from(3);
    Engine to, plain;
    std::vector<uint8_t> map;
    ok(to.import(export_sets(from.codec.get()), map));
    const Batch batch(to.layers[0], kTokens, 8);
    // The codec that the sets came from, the fresh one that took them, and one that knows the rotation only.
    const Engine *engines[] = {&from, &to, &plain};
    Rows k[3] = {{kTokens, 2, 80}, {kTokens, 2, 80}, {kTokens, 2, 80}};
    Rows v[3] = {{kTokens, 2, 96}, {kTokens, 2, 96}, {kTokens, 2, 96}};
    for (size_t i = 0; i < 3; i++) {
        const auto tokens = batch.tokens(engines[i]->store);
        ok(dq_append(engines[i]->codec.get(), 0, &tokens, nullptr, 0, nullptr));
        engines[i]->dequantize(k[i], v[i]);
    }
    CHECK((k[1] == k[0] && v[1] == v[0]));
    CHECK_FALSE((k[2] == k[0] || v[2] == v[0]));
}

TEST_CASE("no free id: a clean failure") {
    const Engine to(4);
    std::vector<uint8_t> map;
    bool full = false;
    for (uint64_t seed = 10; seed < 40 && !full; seed++) {
        const Engine from(seed);
        const Bytes file = export_sets(from.codec.get());
        const Bytes before = export_sets(to.codec.get());
        const auto status = to.import(file, map);
        if (status == DQ_OK) continue;
        full = true;
        CHECK(status == DQ_ERROR_SETS_FULL);
        INFO(last_error());
        CHECK(last_error().find("set") != std::string::npos);
        CHECK(export_sets(to.codec.get()) == before);
        for (uint8_t id : map) CHECK(id == 0xEE);
    }
    CHECK(full);
}

TEST_CASE("exports that are damaged, cut short or of another shape") {
    const Engine from(3), to(4);
    const Bytes file = export_sets(from.codec.get());
    const Bytes before = export_sets(to.codec.get());
    std::vector<uint8_t> map;
    Random random(5);
    for (size_t i = 0; i < 200; i++) {
        Bytes bad = file;
        const size_t at = i < 100 ? i : random.bits() % file.size();
        bad[at] = static_cast<uint8_t>(bad[at] ^ 1u << random.below(8));
        INFO("byte " << at);
        const auto status = to.import(bad, map);
        CHECK((status == DQ_ERROR_BAD_FILE || (status == DQ_ERROR_IO && at >= 48 && at < 56)));
        for (uint8_t id : map) REQUIRE(id == 0xEE);
    }
    for (size_t n : {size_t{0}, size_t{30}, file.size() - 1}) {
        CHECK(to.import(Bytes(file.begin(), file.begin() + static_cast<ptrdiff_t>(n)), map) == DQ_ERROR_IO);
    }
    CHECK(to.import(save(from.codec.get()), map) == DQ_ERROR_BAD_FILE);
    const auto other = make_codec({layer_desc(80, 96, 4, 4)});
    CHECK(to.import(export_sets(other.get()), map) == DQ_ERROR_BAD_FILE);
    CHECK(last_error().find("layer 0") != std::string::npos);
    CHECK(export_sets(to.codec.get()) == before);
}

TEST_CASE("a frozen codec imports, too") {
    const Engine from(3), history(4);
    Codec frozen;
    ok(load(save(history.codec.get()), history.layers, frozen));
    const Bytes file = export_sets(from.codec.get());
    Reader reader{&file};
    std::vector<uint8_t> map(64);
    ok(dq_sets_import(frozen.get(), 0, take_bytes, &reader, map.data(), map.size()));
    CHECK(info(frozen.get()).k_sets > info(history.codec.get()).k_sets);
}
