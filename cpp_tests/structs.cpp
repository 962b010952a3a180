// Structs of older and newer headers.
#include "support.hpp"

using namespace test;

namespace {

struct Scene {
    std::vector<dq_layer_desc> layers{layer_desc()};
    Context context = make_context();
    Codec codec = make_codec(layers);
    Store store{codec.get(), 0, 8};
    Batch batch{layers[0], 4};
    Rows out{4, 4, 64};
    Fenced workspace{workspace_size(codec.get(), 0, 4, 8)};
    Watch watch;

    Scene() {
        auto tokens = batch.tokens(store);
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        watch.codec(codec.get()).memory(store.memory()).memory(out.memory()).memory(workspace);
    }
};

// Accepted with a zero tail, refused with anything else in it, refused with sizes that no struct has.
template <class T>
void check_sizes(const Scene &scene, const T &value, const std::function<dq_status(T *)> &call) {
    const std::string name = "struct_size";
    Newer<T> newer(value);
    for (size_t at : {size_t{0}, sizeof newer.tail - 1}) {
        newer.tail[at] = 9;
        scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {name, std::to_string(sizeof newer), "is 9"},
                            [&] { return call(newer.get()); });
        newer.tail[at] = 0;
    }
    for (uint32_t size : {0u, 2u, 5u, 100000u, UINT32_MAX}) {
        T wrong = value;
        wrong.struct_size = size;
        scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {name + " is " + std::to_string(size)},
                            [&] { return call(&wrong); });
    }
    alignas(8) unsigned char bytes[sizeof(T) + 8];
    std::memcpy(bytes + 1, &value, sizeof(T));
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"aligned"},
                        [&] { return call(reinterpret_cast<T *>(bytes + 1)); });
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"null"}, [&] { return call(nullptr); });
    Newer<T> fine(value);
    ok(call(fine.get()));
}

}  // namespace

TEST_CASE("context description") {
    Scene scene;
    auto value = sized<dq_context_desc>();
    dq_context *made = nullptr;
    Newer<dq_context_desc> newer(value);
    newer.tail[3] = 1;
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"struct_size is 32", "byte 19 is 1"},
                        [&] { return dq_context_create(newer.get(), &made); });
    CHECK(made == nullptr);
    newer.tail[3] = 0;
    ok(dq_context_create(newer.get(), &made));
    dq_context_destroy(made);
    // Older: only the size and the backend.
    value.struct_size = 8;
    value.device = 77;
    ok(dq_context_create(&value, &made));
    dq_context_destroy(made);
}

TEST_CASE("codec description") {
    Scene scene;
    check_sizes<dq_codec_desc>(scene, codec_desc(scene.layers), [&](dq_codec_desc *desc) {
        dq_codec *codec = nullptr;
        const auto status = dq_codec_create(scene.context.get(), desc, &codec);
        CHECK((codec != nullptr) == (status == DQ_OK));
        dq_codec_destroy(codec);
        return status;
    });
    // Older: without the fingerprint.
    auto older = codec_desc(scene.layers, 55);
    older.struct_size = offsetof(dq_codec_desc, fingerprint);
    dq_codec *codec = nullptr;
    ok(dq_codec_create(scene.context.get(), &older, &codec));
    const Codec holder(codec);
    CHECK(save(codec) == save(make_codec(scene.layers).get()));
}

TEST_CASE("layer descriptions lie struct_size apart") {
    Scene scene;
    const Newer<dq_layer_desc> first(layer_desc());
    Newer<dq_layer_desc> second(layer_desc(128, 80));
    struct {
        Newer<dq_layer_desc> all[2];
    } layers{{first, second}};
    auto desc = codec_desc(scene.layers);
    desc.n_layers = 2;
    desc.layers = &layers.all[0].known;
    dq_codec *codec = nullptr;
    ok(dq_codec_create(scene.context.get(), &desc, &codec));
    Codec holder(codec);
    CHECK(layout(codec, 1).slot_bytes == 2 * (64 + 40) + 8 + 8);

    codec = nullptr;
    layers.all[1].tail[5] = 4;
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"layer 1", "struct_size is 52", "byte 41 is 4"},
                        [&] { return dq_codec_create(scene.context.get(), &desc, &codec); });
    layers.all[1].tail[5] = 0;
    layers.all[1].known.struct_size = 36;
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"layers[1].struct_size is 36", "52"},
                        [&] { return dq_codec_create(scene.context.get(), &desc, &codec); });
    CHECK(codec == nullptr);
    // Older: without the gauges.
    auto older = layer_desc();
    older.struct_size = offsetof(dq_layer_desc, k_gauge);
    older.k_gauge = older.v_gauge = 99;
    desc.n_layers = 1;
    desc.layers = &older;
    ok(dq_codec_create(scene.context.get(), &desc, &codec));
    dq_codec_destroy(codec);
}

TEST_CASE("tokens") {
    Scene scene;
    auto value = scene.batch.tokens(scene.store);
    value.n_tokens = 0;
    check_sizes<dq_tokens>(scene, value, [&](dq_tokens *tokens) {
        return dq_compress(scene.codec.get(), 0, tokens, nullptr, 0, nullptr);
    });
    // Older, without a store: refused, because a store is needed.
    value.n_tokens = 4;
    value.struct_size = offsetof(dq_tokens, store);
    scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"tokens->store", "n_slots is 0"},
                        [&] { return dq_compress(scene.codec.get(), 0, &value, nullptr, 0, nullptr); });
}

TEST_CASE("attend arguments") {
    Scene scene;
    auto value = attend_args(scene.store, scene.batch.q, scene.out, 4);
    value.n_q = 0;
    check_sizes<dq_attend_args>(scene, value, [&](dq_attend_args *args) {
        return dq_attend(scene.codec.get(), 0, args, scene.workspace.data(), scene.workspace.size(), nullptr);
    });
    // Older: without mask, sinks, scale and soft-cap.
    value.n_q = 4;
    ok(dq_attend(scene.codec.get(), 0, &value, scene.workspace.data(), scene.workspace.size(), nullptr));
    const Bytes want(scene.out.memory().data(), scene.out.memory().data() + scene.out.memory().size());
    scene.out.fill(7);
    value.struct_size = offsetof(dq_attend_args, mask);
    value.scale = NAN;
    ok(dq_attend(scene.codec.get(), 0, &value, scene.workspace.data(), scene.workspace.size(), nullptr));
    CHECK(std::memcmp(want.data(), scene.out.memory().data(), want.size()) == 0);
}

TEST_CASE("limits") {
    Scene scene;
    auto value = sized<dq_limits>();
    uint64_t bytes = 5;
    check_sizes<dq_limits>(scene, value, [&](dq_limits *limits) {
        const auto status = dq_workspace_size(scene.codec.get(), 0, limits, &bytes);
        CHECK((status == DQ_OK || bytes == 5));
        return status;
    });
}

TEST_CASE("results fill as much as the caller has") {
    Scene scene;
    Newer<dq_layout> newer(sized<dq_layout>());
    std::memset(newer.tail, 7, sizeof newer.tail);
    ok(dq_codec_layout(scene.codec.get(), 0, 1000, newer.get()));
    CHECK(newer.known.slot_bytes == 144);
    CHECK(newer.known.struct_size == sizeof newer);
    for (uint8_t b : newer.tail) CHECK(b == 0);

    auto older = sized<dq_layout>();
    older.struct_size = offsetof(dq_layout, v_codes_offset);
    older.v_codes_offset = 1234;
    ok(dq_codec_layout(scene.codec.get(), 0, 1000, &older));
    CHECK((older.slot_bytes == 144 && older.alignment == 16 && older.v_codes_offset == 1234));

    Newer<dq_layer_info> info(sized<dq_layer_info>());
    std::memset(info.tail, 7, sizeof info.tail);
    ok(dq_codec_info(scene.codec.get(), 0, info.get()));
    CHECK((info.known.k_sets >= 1 && info.tail[0] == 0 && info.tail[15] == 0));
    for (uint32_t size : {0u, 3u, 5000u}) {
        auto wrong = sized<dq_layer_info>();
        wrong.struct_size = size;
        wrong.k_sets = 77;
        scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"struct_size is " + std::to_string(size)},
                            [&] { return dq_codec_info(scene.codec.get(), 0, &wrong); });
        CHECK(wrong.k_sets == 77);
    }
}
