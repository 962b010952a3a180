// decoquant.hpp: the same bytes as the C calls, errors both ways, handles that end themselves.
#include <decoquant.hpp>

#include "support.hpp"

#include <stdexcept>

namespace {

dq_codec_desc describe(const dq_layer_desc &layer) {
    auto desc = dq::sized<dq_codec_desc>();
    desc.n_layers = 1;
    desc.layers = &layer;
    return desc;
}

struct Scene {
    dq_layer_desc layer = test::layer_desc();
    dq::Context context = dq::Context::create();
    dq::Codec codec = dq::Codec::create(context, describe(layer));
    std::vector<float> q = std::vector<float>(8 * 4 * 64, 0.25f), k = std::vector<float>(8 * 2 * 64), v = k, out = q;
    std::vector<int64_t> slots{0, 1, 2, 3, 4, 5, 6, 7};
    dq::Memory records{static_cast<size_t>(codec.layout(0).slot_bytes) * 8};
    dq_store store{records.data(), 8, 0};

    Scene() {
        test::Random random(3);
        for (auto *rows : {&q, &k, &v}) {
            for (float &x : *rows) x = random.normal();
        }
    }

    dq_tokens tokens() {
        auto t = dq::sized<dq_tokens>();
        t.n_tokens = 8;
        t.q = dq::Rows(q.data(), 8, 4, 64);
        t.k = dq::Rows<const float>(k.data(), 8, 2, 64);
        t.v = dq::Rows(v.data(), 8, 2, 64);
        t.slots = slots.data();
        t.store = store;
        return t;
    }

    dq_attend_args args() {
        auto a = dq::sized<dq_attend_args>();
        a.n_q = a.n_kv = 8;
        a.store = store;
        a.q = dq::Rows(q.data(), 8, 4, 64);
        a.out = dq::Rows(out.data(), 8, 4, 64);
        return a;
    }
};

}  // namespace

TEST_CASE("the same bytes as the C calls") {
    Scene scene;
    CHECK_FALSE(scene.codec.compress(0, scene.tokens()).replaced);
    auto limits = dq::sized<dq_limits>();
    limits.max_queries = limits.max_kv = 8;
    const dq::Memory workspace(scene.codec.workspace_size(0, limits));
    scene.codec.attend(0, scene.args(), workspace.data(), workspace.size());

    const auto plain = test::make_codec({scene.layer});
    const test::Store store(plain.get(), 0, 8);
    auto tokens = scene.tokens();
    tokens.store = store.view();
    test::ok(dq_compress(plain.get(), 0, &tokens, nullptr, 0, nullptr));
    CHECK(std::memcmp(store.memory().data(), scene.records.data(), scene.records.size()) == 0);
    std::vector<float> want(scene.out.size());
    auto args = scene.args();
    args.store = store.view();
    args.out.data = want.data();
    test::ok(dq_attend(plain.get(), 0, &args, workspace.data(), workspace.size(), nullptr));
    CHECK(want == scene.out);

    scene.codec.attend_shard(0, scene.args(), workspace.data(), workspace.size(), 0, 1);
    scene.codec.attend_merge_shard(0, scene.args(), workspace.data(), workspace.size(), 0, 1);
    CHECK(want == scene.out);
    scene.codec.refit(0, 1);
    CHECK(scene.codec.info(0).rows_seen == 8);
    std::vector<float> back(scene.k.size());
    scene.codec.dequantize(0, scene.store, scene.slots.data(), 8, dq::Rows(back.data(), 8, 2, 64), dq_tensor{});
    CHECK(std::fabs(back[5] - scene.k[5]) < 0.5f);
}

TEST_CASE("errors are thrown or returned") {
    Scene scene;
    auto tokens = scene.tokens();
    tokens.n_tokens = 3;
    tokens.k.dtype = 9;
    const auto result = scene.codec.try_compress(0, tokens);
    REQUIRE_FALSE(result);
    CHECK(result.error().status == DQ_ERROR_INVALID_ARGUMENT);
    CHECK(result.error().message.find("tokens->k.dtype is 9") != std::string::npos);
    try {
        scene.codec.compress(0, tokens);
        FAIL("nothing thrown");
    } catch (const dq::Error &error) {
        CHECK(error.status() == DQ_ERROR_INVALID_ARGUMENT);
        CHECK(std::string(error.what()).find("DQ_ERROR_INVALID_ARGUMENT: tokens->k.dtype is 9") == 0);
    }
    scene.k[7] = NAN;
    const auto written = scene.codec.try_compress(0, scene.tokens());
    CHECK((written && written->replaced));
    auto bad = scene.layer;
    bad.head_dim_k = 65;
    CHECK_THROWS_AS(dq::Codec::create(scene.context, describe(bad)), dq::Error);
    auto desc = dq::sized<dq_context_desc>();
    desc.backend = 77;
    CHECK_FALSE(dq::Context::try_create(&desc).has_value());
    CHECK_THROWS_AS(scene.codec.layout(1), dq::Error);
    CHECK_FALSE(scene.codec.try_info(1));
    CHECK_FALSE(scene.codec.try_refit(0, 2));
    CHECK_FALSE(scene.codec.try_attend(0, scene.args(), nullptr, 0));
}

TEST_CASE("files go through callables, and what these throw comes out") {
    Scene scene;
    scene.codec.compress(0, scene.tokens());
    test::Bytes file;
    const auto write = [&](const void *data, size_t n) {
        const auto *bytes = static_cast<const uint8_t *>(data);
        file.insert(file.end(), bytes, bytes + n);
        return true;
    };
    scene.codec.save(write);
    CHECK(file == test::save(scene.codec.get()));
    size_t at = 0;
    const auto read = [&](void *data, size_t n) {
        if (n > file.size() - at) return false;
        std::memcpy(data, file.data() + at, n);
        at += n;
        return true;
    };
    const auto loaded = dq::Codec::load(scene.context, describe(scene.layer), read);
    CHECK(loaded.info(0).frozen == 1);
    CHECK(scene.codec.try_save([](const void *, size_t) { return false; }).error().status == DQ_ERROR_IO);
    CHECK_THROWS_AS(scene.codec.save([](const void *, size_t) -> bool { throw std::out_of_range("full"); }),
                    std::out_of_range);
    CHECK_THROWS_AS(dq::Codec::load(scene.context, describe(scene.layer),
                                    [](void *, size_t) -> bool { throw std::out_of_range("gone"); }),
                    std::out_of_range);

    file.clear();
    scene.codec.export_sets(0, write);
    at = 0;
    std::vector<uint8_t> map(2 * 2 * DQ_MAX_SETS);
    dq::Codec other = dq::Codec::create(scene.context, describe(scene.layer));
    other.import_sets(0, read, map.data(), map.size());
    CHECK(map[0] == 0);
    other.remap_rows(0, scene.store, scene.slots.data(), 8, map.data(), map.size());
}

TEST_CASE("handles move, and are as small as their pointers") {
    Scene scene;
    dq_codec *raw = scene.codec.get();
    dq::Codec moved = std::move(scene.codec);
    CHECK((moved.get() == raw && scene.codec.get() == nullptr));
    dq::Codec again(moved.release());
    CHECK(again.get() == raw);
    static_assert(!std::is_copy_constructible_v<dq::Codec>, "one owner");
    static_assert(std::is_nothrow_move_constructible_v<dq::Codec>, "");
}

TEST_CASE("views carry type and strides") {
    uint16_t bits[4 * 128]{};
    const dq::Rows<dq::bf16> rows(reinterpret_cast<dq::bf16 *>(bits), 2, 2, 64, 200, 80);
    const dq_tensor t = rows, second = rows.slice(1, 1);
    CHECK((t.data == bits && t.dtype == DQ_BF16 && t.token_stride == 400 && t.head_stride == 160));
    CHECK(second.data == bits + 200);
    CHECK(dq_tensor(dq::Rows<const dq::f16>(nullptr, 1, 1, 64)).dtype == DQ_F16);
}
