// Bad arguments of dequantize, remap and the set calls.
#include "support.hpp"

using namespace test;

namespace {

constexpr dq_status kInvalid = DQ_ERROR_INVALID_ARGUMENT;

struct Scene {
    std::vector<dq_layer_desc> layers{layer_desc(64, 80)};
    Codec codec = make_codec(layers);
    Store records{codec.get(), 0, 16};
    Rows k{3, 2, 64}, v{3, 2, 80, DQ_F16};
    std::vector<int64_t> slots{4, -1, 0};
    Fenced map{2 * 2 * DQ_MAX_SETS};
    Watch watch;
    dq_store store = records.view();
    dq_tensor k_out = k.tensor(), v_out = v.tensor();

    Scene() {
        const Batch batch(layers[0], 16);
        const auto tokens = batch.tokens(records);
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        for (size_t i = 0; i < map.size(); i++) map.data()[i] = i % DQ_MAX_SETS;
        watch.codec(codec.get()).memory(records.memory()).memory(k.memory()).memory(v.memory()).memory(map);
    }

    dq_status dequantize() const {
        return dq_dequantize(codec.get(), 0, &store, slots.data(), static_cast<uint32_t>(slots.size()), &k_out, &v_out,
                             nullptr);
    }
    dq_status remap() const {
        return dq_remap_rows(codec.get(), 0, &store, slots.data(), slots.size(), map.data(), map.size());
    }
    void refuses(std::initializer_list<std::string> words, const std::function<dq_status()> &call) const {
        watch.refuses(kInvalid, words, call);
    }
};

void *shifted(void *pointer, ptrdiff_t bytes) { return static_cast<uint8_t *>(pointer) + bytes; }

}  // namespace

TEST_CASE("dequantize: store and slots") {
    Scene scene;
    const auto call = [&] { return scene.dequantize(); };
    const auto good = scene.store;
    scene.refuses({"store is null"}, [&] {
        return dq_dequantize(scene.codec.get(), 0, nullptr, scene.slots.data(), 3, &scene.k_out, &scene.v_out, nullptr);
    });
    scene.refuses({"slots is null"}, [&] {
        return dq_dequantize(scene.codec.get(), 0, &scene.store, nullptr, 3, &scene.k_out, &scene.v_out, nullptr);
    });
    scene.refuses({"stream is 0x"}, [&] {
        return dq_dequantize(scene.codec.get(), 0, &scene.store, scene.slots.data(), 3, &scene.k_out, &scene.v_out,
                             &scene);
    });
    scene.store.data = nullptr;
    scene.refuses({"store is null"}, call);
    scene.store.data = shifted(good.data, 1);
    scene.refuses({"store is 0x", "aligned to 16"}, call);
    scene.store = good;
    scene.store.slot_stride = 16;
    scene.refuses({"store.slot_stride is 16", "160"}, call);
    scene.store = good;
    scene.store.n_slots = 4;
    scene.refuses({"slots[0] is 4", "n_slots, 4"}, call);
    scene.store = good;
    scene.slots[2] = -2;
    scene.refuses({"slots[2] is -2", "n_slots, 16"}, call);
    scene.slots[2] = 16;
    scene.refuses({"slots[2] is 16", "n_slots, 16"}, call);
}

TEST_CASE("dequantize: outputs") {
    Scene scene;
    const auto call = [&] { return scene.dequantize(); };
    const auto k = scene.k_out, v = scene.v_out;
    scene.k_out.dtype = 9;
    scene.refuses({"k_out.dtype is 9"}, call);
    scene.k_out = k;
    scene.v_out.reserved = 9;
    scene.refuses({"v_out.reserved is 9"}, call);
    scene.v_out = v;
    scene.v_out.head_stride = 158;
    scene.refuses({"v_out.head_stride is 158", "160"}, call);
    scene.v_out = v;
    scene.k_out.token_stride = 256;
    scene.refuses({"k_out.token_stride is 256", "overlap"}, call);
    scene.k_out = k;
    scene.k_out.data = shifted(k.data, 2);
    scene.refuses({"k_out.data is 0x", "aligned to 4"}, call);
    scene.k_out.data = scene.records.record(3);
    scene.refuses({"k_out.data", "overlaps store"}, call);
    scene.k_out = k;
    scene.v_out.data = shifted(k.data, 16);
    scene.refuses({"k_out.data", "overlaps v_out.data"}, call);
}

TEST_CASE("dequantize: halves may be left out, woven, repeated, skipped") {
    Scene scene;
    ok(scene.dequantize());
    Rows woven(3, 2, 64 + 80);
    Rows k(3, 2, 64), v(3, 2, 80);
    auto k_out = woven.tensor(), v_out = woven.tensor();
    v_out.data = shifted(v_out.data, 64 * 4);
    scene.slots = {4, -1, 4};
    const auto run = [&](const dq_tensor *to_k, const dq_tensor *to_v) {
        ok(dq_dequantize(scene.codec.get(), 0, &scene.store, scene.slots.data(), 3, to_k, to_v, nullptr));
    };
    k_out.head_stride = v_out.head_stride = (64 + 80) * 4;
    run(&k_out, &v_out);
    const auto k_alone = k.tensor(), v_alone = v.tensor();
    run(&k_alone, nullptr);
    dq_tensor none{};
    run(&none, &v_alone);
    run(nullptr, nullptr);
    for (uint32_t t = 0; t < 3; t++) {
        for (uint32_t h = 0; h < 2; h++) {
            for (uint32_t c = 0; c < 64; c++) {
                CHECK(woven.get(t, h, c) == k.get(t, h, c));
                CHECK(k.get(2, h, c) == k.get(0, h, c));
                CHECK(k.get(1, h, c) == 0);
            }
            for (uint32_t c = 0; c < 80; c++) CHECK(woven.get(t, h, 64 + c) == v.get(t, h, c));
        }
    }
    CHECK((woven.memory().intact() && k.memory().intact() && v.memory().intact()));
}

TEST_CASE("remap: store, slots, map") {
    Scene scene;
    const auto call = [&] { return scene.remap(); };
    const auto good = scene.store;
    scene.slots = {4, -1, 4};
    scene.refuses({"slots[0] and slots[2] are both 4"}, call);
    scene.slots[2] = 16;
    scene.refuses({"slots[2] is 16"}, call);
    scene.slots[2] = 5;
    scene.store.data = shifted(good.data, 8);
    scene.refuses({"store is 0x"}, call);
    scene.store = good;
    scene.refuses({"map is null"}, [&] {
        return dq_remap_rows(scene.codec.get(), 0, &scene.store, scene.slots.data(), 3, nullptr, 64);
    });
    scene.refuses({"map_bytes is 63", "64"}, [&] {
        return dq_remap_rows(scene.codec.get(), 0, &scene.store, scene.slots.data(), 3, scene.map.data(), 63);
    });
    scene.refuses({"slots is null"}, [&] {
        return dq_remap_rows(scene.codec.get(), 0, &scene.store, nullptr, 3, scene.map.data(), 64);
    });
    scene.refuses({"store is null"}, [&] {
        return dq_remap_rows(scene.codec.get(), 0, nullptr, scene.slots.data(), 3, scene.map.data(), 64);
    });
    scene.refuses({"n_slots is 99", "16"}, [&] {
        return dq_remap_rows(scene.codec.get(), 0, &scene.store, scene.slots.data(), 99, scene.map.data(), 64);
    });
    scene.refuses({"store", "overlaps map"}, [&] {
        return dq_remap_rows(scene.codec.get(), 0, &scene.store, scene.slots.data(), 3, scene.records.record(9), 64);
    });
    ok(dq_remap_rows(scene.codec.get(), 0, &scene.store, nullptr, 0, nullptr, 0));
    ok(scene.remap());
    scene.watch.unchanged();
}

TEST_CASE("remap: an id that the map does not hold") {
    Scene scene;
    // The rows of the last slot in the list are the only ones that are not mapped.
    uint8_t *header = scene.records.record(5) + layout(scene.codec.get()).v_headers_offset + 2;
    *header = static_cast<uint8_t>((*header & 0xF0) | 13);
    Watch watch;
    watch.memory(scene.records.memory());
    scene.slots = {4, 0, 5};
    scene.map.data()[(2 + 1) * DQ_MAX_SETS + 13] = 255;
    watch.refuses(kInvalid, {"slot 5", "V head 1", "set 13"}, [&] { return scene.remap(); });
    scene.map.data()[(2 + 1) * DQ_MAX_SETS + 13] = 16;
    watch.refuses(kInvalid, {"16", "set 13"}, [&] { return scene.remap(); });
}

TEST_CASE("sets: callbacks and maps") {
    Scene scene;
    dq_codec *codec = scene.codec.get();
    const Bytes file = export_sets(codec);
    Reader reader{&file};
    scene.refuses({"write is null"}, [&] { return dq_sets_export(codec, 0, nullptr, nullptr); });
    scene.refuses({"read is null"},
                  [&] { return dq_sets_import(codec, 0, nullptr, nullptr, scene.map.data(), scene.map.size()); });
    scene.refuses({"map is null"}, [&] { return dq_sets_import(codec, 0, take_bytes, &reader, nullptr, 64); });
    scene.refuses({"map_bytes is 63", "64"},
                  [&] { return dq_sets_import(codec, 0, take_bytes, &reader, scene.map.data(), 63); });
    scene.watch.refuses(DQ_ERROR_IO, {"write returned 5"}, [&] {
        return dq_sets_export(codec, 0, [](void *, const void *, uint64_t) { return 5; }, nullptr);
    });
    scene.watch.refuses(DQ_ERROR_IO, {"read returned 6"}, [&] {
        return dq_sets_import(codec, 0, [](void *, void *, uint64_t) { return 6; }, nullptr, scene.map.data(), 64);
    });
}
