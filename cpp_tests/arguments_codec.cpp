// Bad arguments of contexts, codecs and the queries on them.
#include "support.hpp"

using namespace test;

namespace {

struct Scene {
    std::vector<dq_layer_desc> layers{layer_desc(), layer_desc(128, 80, 3, 8)};
    Context context = make_context();
    Codec codec = make_codec(layers);
    Watch watch;
    dq_codec *made = nullptr;

    Scene() { watch.codec(codec.get()); }
    ~Scene() { CHECK(made == nullptr); }

    void refuses_model(const dq_codec_desc &desc, dq_status status, std::initializer_list<std::string> words) {
        watch.refuses(status, words, [&] { return dq_codec_create(context.get(), &desc, &made); });
    }

    void refuses_layer(const dq_layer_desc &layer, dq_status status, std::initializer_list<std::string> words) {
        const std::vector<dq_layer_desc> list{layer_desc(), layer};
        refuses_model(codec_desc(list), status, words);
    }
};

}  // namespace

TEST_CASE("contexts") {
    Scene scene;
    dq_context *made = nullptr;
    const auto refuses = [&](dq_context_desc desc, dq_status status, std::initializer_list<std::string> words) {
        scene.watch.refuses(status, words, [&] { return dq_context_create(&desc, &made); });
        CHECK(made == nullptr);
    };
    auto desc = sized<dq_context_desc>();
    desc.backend = 3;
    refuses(desc, DQ_ERROR_INVALID_ARGUMENT, {"backend is 3", "1", "2"});
    desc.backend = DQ_BACKEND_CPU;
    desc.device = 1;
    refuses(desc, DQ_ERROR_INVALID_ARGUMENT, {"device is 1", "0"});
    desc.device = 0;
    desc.reserved = 9;
    refuses(desc, DQ_ERROR_INVALID_ARGUMENT, {"reserved is 9"});
    if (!(dq_backends() & 1u << DQ_BACKEND_CUDA)) {
        desc = sized<dq_context_desc>();
        desc.backend = DQ_BACKEND_CUDA;
        refuses(desc, DQ_ERROR_NO_BACKEND, {"DQ_BACKEND_CUDA", "built without CUDA kernels"});
    }
    desc = sized<dq_context_desc>();
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"out is null"}, [&] {
        auto status = dq_codec_create(scene.context.get(), nullptr, nullptr);
        return status;
    });
    desc.backend = DQ_BACKEND_CPU;
    ok(dq_context_create(&desc, &made));
    dq_context_destroy(made);
    dq_context_destroy(nullptr);
    dq_codec_destroy(nullptr);
}

TEST_CASE("a codec outlives its context") {
    dq_context *context = nullptr;
    ok(dq_context_create(nullptr, &context));
    const auto layers = std::vector<dq_layer_desc>{layer_desc()};
    const auto desc = codec_desc(layers);
    dq_codec *codec = nullptr;
    ok(dq_codec_create(context, &desc, &codec));
    const Codec holder(codec);
    dq_context_destroy(context);
    const Store store(codec, 0, 4);
    const Batch batch(layers[0], 4);
    const auto tokens = batch.tokens(store);
    ok(dq_compress(codec, 0, &tokens, nullptr, 0, nullptr));
}

TEST_CASE("handles") {
    Scene scene;
    const auto desc = codec_desc(scene.layers);
    auto wrong_context = reinterpret_cast<dq_context *>(scene.codec.get());
    auto wrong_codec = reinterpret_cast<dq_codec *>(scene.context.get());
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"context is null"},
                        [&] { return dq_codec_create(nullptr, &desc, &scene.made); });
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"context is not a dq_context"},
                        [&] { return dq_codec_create(wrong_context, &desc, &scene.made); });
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"aligned"}, [&] {
        return dq_refit(reinterpret_cast<dq_codec *>(reinterpret_cast<uintptr_t>(scene.codec.get()) + 4), 0, 1, nullptr);
    });
    // Every call on a codec, with none and with something else.
    for (dq_codec *bad : {static_cast<dq_codec *>(nullptr), wrong_codec}) {
        const std::string word = bad ? "codec is not a dq_codec" : "codec is null";
        const auto refuses = [&](const std::function<dq_status()> &call) {
            scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {word}, call);
        };
        auto tokens = sized<dq_tokens>();
        auto args = sized<dq_attend_args>();
        auto limits = sized<dq_limits>();
        auto lay = sized<dq_layout>();
        auto state = sized<dq_layer_info>();
        dq_store store{};
        uint64_t bytes = 3;
        uint8_t map[64] = {};
        Bytes file;
        Reader reader{&file};
        refuses([&] { return dq_codec_save(bad, append_bytes, &file); });
        refuses([&] { return dq_codec_layout(bad, 0, 0, &lay); });
        refuses([&] { return dq_codec_info(bad, 0, &state); });
        refuses([&] { return dq_workspace_size(bad, 0, &limits, &bytes); });
        refuses([&] { return dq_compress(bad, 0, &tokens, nullptr, 0, nullptr); });
        refuses([&] { return dq_append(bad, 0, &tokens, nullptr, 0, nullptr); });
        refuses([&] { return dq_refit(bad, 0, 1, nullptr); });
        refuses([&] { return dq_observe_shard(bad, 0, &tokens, 0, 1); });
        refuses([&] { return dq_refit_shard(bad, 0, 0, 1); });
        refuses([&] { return dq_encode_shard(bad, 0, &tokens, 0, 1); });
        refuses([&] { return dq_attend(bad, 0, &args, nullptr, 0, nullptr); });
        refuses([&] { return dq_attend_shard(bad, 0, &args, nullptr, 0, 0, 1); });
        refuses([&] { return dq_attend_merge_shard(bad, 0, &args, nullptr, 0, 0, 1); });
        refuses([&] { return dq_dequantize(bad, 0, &store, nullptr, 0, nullptr, nullptr, nullptr); });
        refuses([&] { return dq_sets_export(bad, 0, append_bytes, &file); });
        refuses([&] { return dq_sets_import(bad, 0, take_bytes, &reader, map, sizeof map); });
        refuses([&] { return dq_remap_rows(bad, 0, &store, nullptr, 0, map, sizeof map); });
        CHECK((file.empty() && bytes == 3));
    }
}

TEST_CASE("layers that the codec does not have") {
    Scene scene;
    const auto refuses = [&](const std::function<dq_status(uint32_t)> &call) {
        for (uint32_t layer : {2u, UINT32_MAX}) {
            scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"layer is " + std::to_string(layer), "2 layers"},
                                [&] { return call(layer); });
        }
    };
    dq_codec *codec = scene.codec.get();
    auto tokens = sized<dq_tokens>();
    auto args = sized<dq_attend_args>();
    auto limits = sized<dq_limits>();
    auto lay = sized<dq_layout>();
    auto state = sized<dq_layer_info>();
    dq_store store{};
    uint64_t bytes = 3;
    uint8_t map[64] = {};
    Bytes file;
    Reader reader{&file};
    refuses([&](uint32_t i) { return dq_codec_layout(codec, i, 0, &lay); });
    refuses([&](uint32_t i) { return dq_codec_info(codec, i, &state); });
    refuses([&](uint32_t i) { return dq_workspace_size(codec, i, &limits, &bytes); });
    refuses([&](uint32_t i) { return dq_compress(codec, i, &tokens, nullptr, 0, nullptr); });
    refuses([&](uint32_t i) { return dq_append(codec, i, &tokens, nullptr, 0, nullptr); });
    refuses([&](uint32_t i) { return dq_observe_shard(codec, i, &tokens, 0, 1); });
    refuses([&](uint32_t i) { return dq_refit_shard(codec, i, 0, 1); });
    refuses([&](uint32_t i) { return dq_encode_shard(codec, i, &tokens, 0, 1); });
    refuses([&](uint32_t i) { return dq_attend(codec, i, &args, nullptr, 0, nullptr); });
    refuses([&](uint32_t i) { return dq_attend_shard(codec, i, &args, nullptr, 0, 0, 1); });
    refuses([&](uint32_t i) { return dq_attend_merge_shard(codec, i, &args, nullptr, 0, 0, 1); });
    refuses([&](uint32_t i) { return dq_dequantize(codec, i, &store, nullptr, 0, nullptr, nullptr, nullptr); });
    refuses([&](uint32_t i) { return dq_sets_export(codec, i, append_bytes, &file); });
    refuses([&](uint32_t i) { return dq_sets_import(codec, i, take_bytes, &reader, map, sizeof map); });
    refuses([&](uint32_t i) { return dq_remap_rows(codec, i, &store, nullptr, 0, map, sizeof map); });
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"first_layer is 1", "n_layers 2"},
                        [&] { return dq_refit(codec, 1, 2, nullptr); });
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"first_layer is 4294967295"},
                        [&] { return dq_refit(codec, UINT32_MAX, UINT32_MAX, nullptr); });
    ok(dq_refit(codec, 2, 0, nullptr));
    CHECK((bytes == 3 && file.empty()));
}

TEST_CASE("models") {
    Scene scene;
    auto desc = codec_desc(scene.layers);
    desc.n_layers = 0;
    scene.refuses_model(desc, DQ_ERROR_INVALID_ARGUMENT, {"n_layers is 0", "4096"});
    desc.n_layers = 4097;
    scene.refuses_model(desc, DQ_ERROR_INVALID_ARGUMENT, {"n_layers is 4097", "4096"});
    desc = codec_desc(scene.layers);
    desc.layers = nullptr;
    scene.refuses_model(desc, DQ_ERROR_INVALID_ARGUMENT, {"layers is null"});
    desc = codec_desc(scene.layers);
    desc.max_fits = 8;
    scene.refuses_model(desc, DQ_ERROR_INVALID_ARGUMENT, {"max_fits is 8", "7"});
    desc = codec_desc(scene.layers);
    desc.flags = 3;
    scene.refuses_model(desc, DQ_ERROR_INVALID_ARGUMENT, {"flags is 0x3", "DQ_CODEC_DEFER_FITS (1)"});
}

TEST_CASE("layer shapes") {
    Scene scene;
    auto layer = layer_desc();
    layer.n_q_heads = 3;
    scene.refuses_layer(layer, DQ_ERROR_INVALID_ARGUMENT, {"layers[1]", "n_q_heads is 3", "n_kv_heads, 2"});
    layer.n_q_heads = 0;
    scene.refuses_layer(layer, DQ_ERROR_INVALID_ARGUMENT, {"n_q_heads is 0"});
    layer = layer_desc();
    layer.n_kv_heads = 0;
    scene.refuses_layer(layer, DQ_ERROR_INVALID_ARGUMENT, {"n_kv_heads is 0", "1024"});
    layer.n_kv_heads = layer.n_q_heads = 1025;
    scene.refuses_layer(layer, DQ_ERROR_INVALID_ARGUMENT, {"n_kv_heads is 1025", "1024"});
    for (uint32_t d : {0u, 63u, 72u, 512u, UINT32_MAX}) {
        const auto value = std::to_string(d);
        scene.refuses_layer(layer_desc(d, 64), DQ_ERROR_UNSUPPORTED, {"layers[1]", "head_dim_k is " + value, "256"});
        scene.refuses_layer(layer_desc(64, d), DQ_ERROR_UNSUPPORTED, {"head_dim_v is " + value, "256"});
    }
    for (uint32_t plan : {0u, 1u, 5u, UINT32_MAX}) {
        const auto value = std::to_string(plan);
        scene.refuses_layer(layer_desc(64, 64, plan, 4), DQ_ERROR_UNSUPPORTED, {"k_plan is " + value});
        scene.refuses_layer(layer_desc(64, 64, 4, plan), DQ_ERROR_UNSUPPORTED, {"v_plan is " + value});
    }
    for (uint32_t gauge : {4u, UINT32_MAX}) {
        const auto value = std::to_string(gauge);
        layer = layer_desc();
        layer.k_gauge = gauge;
        scene.refuses_layer(layer, DQ_ERROR_INVALID_ARGUMENT, {"k_gauge is " + value, "DQ_GAUGE_ATTENTION (3)"});
        layer = layer_desc();
        layer.v_gauge = gauge;
        scene.refuses_layer(layer, DQ_ERROR_INVALID_ARGUMENT, {"v_gauge is " + value});
    }
}

TEST_CASE("result pointers") {
    Scene scene;
    auto limits = sized<dq_limits>();
    limits.max_queries = 1;
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"bytes is null"},
                        [&] { return dq_workspace_size(scene.codec.get(), 0, &limits, nullptr); });
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"out is null"},
                        [&] { return dq_codec_layout(scene.codec.get(), 0, 0, nullptr); });
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"out is null"},
                        [&] { return dq_codec_info(scene.codec.get(), 0, nullptr); });
    alignas(8) unsigned char place[16];
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"bytes is 0x", "aligned to 8"}, [&] {
        return dq_workspace_size(scene.codec.get(), 0, &limits, reinterpret_cast<uint64_t *>(place + 1));
    });
}

TEST_CASE("layouts are those of the record format") {
    for (uint32_t plan : {2u, 3u, 4u, 8u}) {
        for (uint32_t d : {64u, 80u, 96u, 128u, 192u, 256u}) {
            const auto codec = make_codec({layer_desc(d, 128, plan, 4)});
            auto lay = sized<dq_layout>();
            ok(dq_codec_layout(codec.get(), 0, 1000, &lay));
            const uint64_t k = 2 * d * plan / 8, v = 2 * 128 * 4 / 8;
            CHECK(lay.alignment == 16);
            CHECK((lay.k_codes_offset == 0 && lay.v_codes_offset == k && lay.k_headers_offset == k + v));
            CHECK((lay.v_headers_offset == k + v + 4 && lay.slot_bytes == (k + v + 8 + 15) / 16 * 16));
            CHECK(lay.bits_per_value == Approx(8.0 * static_cast<double>(lay.slot_bytes) / (2 * (d + 128))));
            const double share = static_cast<double>(lay.max_factor_bytes) / 1000;
            CHECK(lay.bits_per_value_with_factors == Approx(lay.bits_per_value + 8 * share / (2 * (d + 128))));
            CHECK(lay.max_factor_bytes > 0);
        }
    }
    auto lay = sized<dq_layout>();
    ok(dq_codec_layout(make_codec({layer_desc()}).get(), 0, 0, &lay));
    CHECK(lay.bits_per_value_with_factors == 0);
}

TEST_CASE("the logger hears of fits") {
    static std::vector<std::string> lines;
    lines.clear();
    dq_set_logger([](uint32_t level, const char *text, void *user) {
        CHECK((level == 3 && user == &lines));
        static_cast<std::vector<std::string> *>(user)->push_back(text);
    }, &lines);
    const std::vector<dq_layer_desc> layers{layer_desc()};
    const auto codec = make_codec(layers);
    const Store store(codec.get(), 0, 64);
    const Batch batch(layers[0], 64);
    const auto tokens = batch.tokens(store);
    ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    REQUIRE(lines.size() == 1);
    CHECK(lines[0].find("layer 0: a fit is due after") == 0);
    dq_set_logger(nullptr, nullptr);
    ok(dq_compress(make_codec(layers).get(), 0, &tokens, nullptr, 0, nullptr));
    CHECK(lines.size() == 1);
}
