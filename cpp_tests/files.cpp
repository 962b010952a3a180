// Factor files: what is written comes back, anything else is refused in one sentence.
#include "support.hpp"

using namespace test;

namespace {

struct Scene {
    std::vector<dq_layer_desc> layers{layer_desc(), layer_desc(80, 64, 3, 2)};
    Codec codec = make_codec(layers);
    std::vector<std::unique_ptr<Store>> stores;
    Bytes file;

    explicit Scene(uint32_t n = 600) {
        for (uint32_t i = 0; i < 2; i++) {
            stores.push_back(std::make_unique<Store>(codec.get(), i, n));
            compress(codec.get(), i, n, 5);
        }
        file = save(codec.get());
    }

    void compress(dq_codec *to, uint32_t i, uint32_t n, uint64_t seed) const {
        const Batch batch(layers[i], n, seed);
        const auto tokens = batch.tokens(*stores[i]);
        ok(dq_compress(to, i, &tokens, nullptr, 0, nullptr));
    }

    void refuses(const Bytes &bad, dq_status status, std::initializer_list<std::string> words) const {
        refuses_as(bad, layers, 0, status, words);
    }

    void refuses_as(const Bytes &bad, const std::vector<dq_layer_desc> &model, uint8_t fingerprint, dq_status status,
                    std::initializer_list<std::string> words) const {
        Watch watch;
        Reader reader{&bad};
        const auto context = make_context();
        const auto desc = codec_desc(model, fingerprint);
        auto *const untouched = reinterpret_cast<dq_codec *>(0x50);
        dq_codec *out = untouched;
        watch.refuses(status, words, [&] { return dq_codec_load(context.get(), &desc, take_bytes, &reader, &out); });
        CHECK(out == untouched);
    }
};

}  // namespace

TEST_CASE("a loaded codec writes what the saved one would") {
    Scene scene;
    Codec loaded;
    ok(load(scene.file, scene.layers, loaded));
    for (uint32_t i = 0; i < 2; i++) {
        const auto state = info(loaded.get(), i);
        CHECK(state.frozen == 1);
        CHECK(state.k_sets == info(scene.codec.get(), i).k_sets);
        CHECK(state.v_sets == info(scene.codec.get(), i).v_sets);
        CHECK((state.moment_bytes == 0 && state.rows_to_fit == UINT64_MAX));
        // Append: the saved codec codes with the same sets.
        const Batch batch(scene.layers[i], 40, 9, 3);
        auto tokens = batch.tokens(*scene.stores[i]);
        tokens.q.data = nullptr;
        ok(dq_append(scene.codec.get(), i, &tokens, nullptr, 0, nullptr));
        const Bytes want = scene.stores[i]->bytes();
        std::memset(scene.stores[i]->record(3), 0x3C, 40 * scene.stores[i]->slot_bytes());
        ok(dq_append(loaded.get(), i, &tokens, nullptr, 0, nullptr));
        CHECK(scene.stores[i]->bytes() == want);
    }
}

TEST_CASE("a loaded codec stays as it is, whatever comes") {
    Scene scene;
    Codec loaded;
    ok(load(scene.file, scene.layers, loaded));
    const Bytes before = save(loaded.get());
    scene.compress(loaded.get(), 0, 600, 8);
    scene.compress(loaded.get(), 0, 600, 9);
    ok(dq_refit(loaded.get(), 0, 2, nullptr));
    CHECK(save(loaded.get()) == before);
    Codec again;
    ok(load(before, scene.layers, again));
    CHECK(save(again.get()) == before);
}

TEST_CASE("a codec that has seen nothing can be saved and loaded") {
    const std::vector<dq_layer_desc> layers{layer_desc()};
    const Bytes file = save(make_codec(layers).get());
    Codec loaded;
    ok(load(file, layers, loaded));
    CHECK(info(loaded.get()).frozen == 1);
    CHECK(info(loaded.get()).k_sets == 1);
}

TEST_CASE("files cut short") {
    const Scene scene;
    for (size_t n : {size_t{0}, size_t{1}, size_t{7}, size_t{40}, size_t{56}, size_t{100}, scene.file.size() / 2,
                     scene.file.size() - 1}) {
        INFO(n << " bytes");
        scene.refuses(Bytes(scene.file.begin(), scene.file.begin() + static_cast<ptrdiff_t>(n)), DQ_ERROR_IO,
                      {"read returned -7"});
    }
}

TEST_CASE("flipped bits, anywhere") {
    const Scene scene(40);
    Random random(3);
    for (size_t i = 0; i < 300; i++) {
        // The first 200 bytes one by one, then at random.
        const size_t at = i < 200 ? i : random.bits() % scene.file.size();
        Bytes bad = scene.file;
        bad[at] = static_cast<uint8_t>(bad[at] ^ 1u << random.below(8));
        INFO("byte " << at);
        Codec loaded;
        const auto status = load(bad, scene.layers, loaded);
        // A flipped length may ask for more than there is.
        CHECK((status == DQ_ERROR_BAD_FILE || (status == DQ_ERROR_IO && at >= 48 && at < 56)));
        CHECK((!loaded && !last_error().empty()));
    }
}

TEST_CASE("other files, versions and models") {
    const Scene scene(40);
    Bytes bad = scene.file;
    bad[0] = 'X';
    scene.refuses(bad, DQ_ERROR_BAD_FILE, {"begin with DQFACTOR"});
    scene.refuses(export_sets(scene.codec.get()), DQ_ERROR_BAD_FILE, {"begin with DQFACTOR"});
    bad = scene.file;
    bad[8] = 9;
    scene.refuses(bad, DQ_ERROR_BAD_FILE, {"version", "9"});
    scene.refuses_as(scene.file, scene.layers, 1, DQ_ERROR_BAD_FILE, {"fingerprint"});
    auto model = scene.layers;
    model.push_back(layer_desc());
    scene.refuses_as(scene.file, model, 0, DQ_ERROR_BAD_FILE, {"2", "3"});
    model = scene.layers;
    model[1].k_plan = 4;
    scene.refuses_as(scene.file, model, 0, DQ_ERROR_BAD_FILE, {"layer 1"});
    model = scene.layers;
    model[0].head_dim_v = 128;
    scene.refuses_as(scene.file, model, 0, DQ_ERROR_BAD_FILE, {"layer 0"});
    model = scene.layers;
    model[0].k_gauge = DQ_GAUGE_CENTRED;
    scene.refuses_as(scene.file, model, 0, DQ_ERROR_BAD_FILE, {"layer 0"});
    model = scene.layers;
    model[0].n_q_heads = 8;
    scene.refuses_as(scene.file, model, 0, DQ_ERROR_BAD_FILE, {"layer 0"});
}

TEST_CASE("bytes after the end are not read") {
    const Scene scene(40);
    Bytes longer = scene.file;
    longer.push_back(1);
    Codec loaded;
    ok(load(longer, scene.layers, loaded));
}

TEST_CASE("callbacks that fail") {
    const Scene scene(40);
    Watch watch;
    watch.codec(scene.codec.get());
    watch.refuses(DQ_ERROR_IO, {"write returned 3"}, [&] {
        return dq_codec_save(scene.codec.get(), [](void *, const void *, uint64_t) { return 3; }, nullptr);
    });
    watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"write is null"},
                  [&] { return dq_codec_save(scene.codec.get(), nullptr, nullptr); });
    const auto context = make_context();
    const auto desc = codec_desc(scene.layers);
    dq_codec *out = nullptr;
    watch.refuses(DQ_ERROR_IO, {"read returned 4"}, [&] {
        return dq_codec_load(context.get(), &desc, [](void *, void *, uint64_t) { return 4; }, nullptr, &out);
    });
    watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"read is null"},
                  [&] { return dq_codec_load(context.get(), &desc, nullptr, nullptr, &out); });
    Reader reader{&scene.file};
    watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"out is null"},
                  [&] { return dq_codec_load(context.get(), &desc, take_bytes, &reader, nullptr); });
    CHECK(out == nullptr);
}

TEST_CASE("the same history gives the same file") {
    const Scene a, b;
    CHECK(a.file == b.file);
}
