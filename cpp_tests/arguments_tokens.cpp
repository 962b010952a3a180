// Bad arguments of compress, append and the phases.
#include "support.hpp"

using namespace test;

namespace {

using Call = std::function<dq_status(dq_codec *, const dq_tokens *)>;

struct Named {
    const char *name;
    bool observes, encodes;
    Call call;
};

const std::vector<Named> &calls() {
    static const std::vector<Named> all{
        {"compress", true, true,
         [](dq_codec *c, const dq_tokens *t) { return dq_compress(c, 0, t, nullptr, 0, nullptr); }},
        {"append", true, true, [](dq_codec *c, const dq_tokens *t) { return dq_append(c, 0, t, nullptr, 0, nullptr); }},
        {"observe", true, false, [](dq_codec *c, const dq_tokens *t) { return dq_observe_shard(c, 0, t, 0, 1); }},
        {"encode", false, true, [](dq_codec *c, const dq_tokens *t) { return dq_encode_shard(c, 0, t, 0, 1); }},
    };
    return all;
}

struct Scene {
    static constexpr uint32_t kTokens = 6;
    std::vector<dq_layer_desc> layers{layer_desc()};
    Codec codec = make_codec(layers);
    Store store{codec.get(), 0, 64};
    Batch batch{layers[0], kTokens, 7, 0, DQ_F16, 8};
    Watch watch;
    dq_tokens tokens = batch.tokens(store);

    Scene() {
        const Batch before(layers[0], 40, 1, 10);
        const auto t = before.tokens(store);
        ok(dq_compress(codec.get(), 0, &t, nullptr, 0, nullptr));
        watch.codec(codec.get()).memory(store.memory());
        for (auto *rows : {&batch.q, &batch.k, &batch.v}) watch.memory(rows->memory());
    }

    void refuses(const Named &call, std::initializer_list<std::string> words) const {
        INFO(call.name);
        watch.refuses(DQ_ERROR_INVALID_ARGUMENT, words, [&] { return call.call(codec.get(), &tokens); });
    }
};

void *shifted(void *pointer, ptrdiff_t bytes) { return static_cast<uint8_t *>(pointer) + bytes; }

}  // namespace

TEST_CASE("rows: null, misaligned, mistyped, misstrided") {
    for (const auto &call : calls()) {
        Scene scene;
        for (dq_tensor dq_tokens::*side : {&dq_tokens::q, &dq_tokens::k, &dq_tokens::v}) {
            const bool is_q = side == &dq_tokens::q;
            if (is_q && !call.observes) continue;
            const std::string name = is_q ? "tokens->q" : side == &dq_tokens::k ? "tokens->k" : "tokens->v";
            dq_tensor &tensor = scene.tokens.*side;
            const dq_tensor good = tensor;
            if (!is_q) {
                tensor.data = nullptr;
                scene.refuses(call, {name + ".data", "null"});
            }
            tensor = good;
            tensor.data = shifted(good.data, 1);
            scene.refuses(call, {name + ".data is 0x", "aligned to 2"});
            for (uint32_t dtype : {0u, 4u, UINT32_MAX}) {
                tensor = good;
                tensor.dtype = dtype;
                scene.refuses(call, {name + ".dtype is " + std::to_string(dtype), "DQ_BF16 (3)"});
            }
            tensor = good;
            tensor.reserved = 5;
            scene.refuses(call, {name + ".reserved is 5"});
            for (uint64_t stride : {uint64_t{0}, uint64_t{126}, uint64_t{129}}) {
                tensor = good;
                tensor.token_stride = stride;
                scene.refuses(call, {name + ".token_stride is " + std::to_string(stride), "128"});
                tensor = good;
                tensor.head_stride = stride;
                scene.refuses(call, {name + ".head_stride is " + std::to_string(stride), "128"});
            }
            tensor = good;
            tensor.token_stride = UINT64_MAX - 1;
            scene.refuses(call, {name + ".data", "address space"});
            // The row of another head_dim does not fit into the strides.
            tensor = good;
            tensor.dtype = DQ_F32;
            scene.refuses(call, {name + ".head_stride is 144", "256"});
            tensor = good;
        }
    }
}

TEST_CASE("slots: out of range, twice, null, misaligned") {
    for (const auto &call : calls()) {
        if (!call.encodes) continue;
        Scene scene;
        auto &slots = scene.batch.slots;
        for (int64_t bad : {int64_t{64}, int64_t{-2}, INT64_MAX, INT64_MIN}) {
            slots[4] = bad;
            scene.refuses(call, {"tokens->slots[4] is " + std::to_string(bad), "n_slots, 64"});
        }
        slots[4] = 2;
        scene.refuses(call, {"tokens->slots[2] and tokens->slots[4] are both 2"});
        slots[4] = 4;
        scene.tokens.slots = nullptr;
        scene.refuses(call, {"tokens->slots is null"});
        scene.tokens.slots = reinterpret_cast<const int64_t *>(reinterpret_cast<uintptr_t>(slots.data()) + 4);
        scene.refuses(call, {"tokens->slots is 0x", "aligned to 8"});
    }
}

TEST_CASE("stores: null, misaligned, misstrided, empty") {
    for (const auto &call : calls()) {
        if (!call.encodes) continue;
        Scene scene;
        const auto good = scene.tokens.store;
        auto &store = scene.tokens.store;
        store.data = nullptr;
        scene.refuses(call, {"tokens->store is null"});
        store.data = shifted(good.data, 8);
        scene.refuses(call, {"tokens->store is 0x", "aligned to 16"});
        store = good;
        store.n_slots = 0;
        scene.refuses(call, {"n_slots is 0"});
        store.n_slots = 5;
        scene.refuses(call, {"tokens->slots[5] is 5", "n_slots, 5"});
        for (uint64_t stride : {uint64_t{128}, uint64_t{152}, uint64_t{1}}) {
            store = good;
            store.slot_stride = stride;
            scene.refuses(call, {"slot_stride is " + std::to_string(stride), "144"});
        }
        store = good;
        store.n_slots = UINT64_MAX / 2;
        scene.refuses(call, {"tokens->store", "address space"});
    }
}

TEST_CASE("overlap of the store with what is read") {
    for (const auto &call : calls()) {
        if (!call.encodes) continue;
        Scene scene;
        const auto good = scene.tokens;
        scene.tokens.k.data = scene.store.record(63);
        scene.refuses(call, {"tokens->store", "overlaps tokens->k.data"});
        scene.tokens = good;
        scene.tokens.v.data = shifted(scene.store.record(63), 142);
        scene.refuses(call, {"overlaps tokens->v.data"});
        scene.tokens = good;
        if (call.observes) {
            scene.tokens.q.data = scene.store.record(0);
            scene.refuses(call, {"overlaps tokens->q.data"});
            scene.tokens = good;
        }
        scene.tokens.positions = reinterpret_cast<const int32_t *>(scene.store.record(62));
        // Whatever these bytes say as positions, the call is refused.
        scene.refuses(call, {"tokens->positions"});
        scene.tokens = good;
        // The records themselves, as slots; zero bytes would be slot 0 several times.
        const Fenced zeros(64 * 144);
        scene.tokens.store.data = zeros.data();
        scene.tokens.slots = reinterpret_cast<const int64_t *>(zeros.data());
        scene.refuses(call, {"tokens->slots"});
    }
}

TEST_CASE("positions") {
    for (const auto &call : calls()) {
        Scene scene;
        scene.batch.positions[3] = -1;
        scene.refuses(call, {"tokens->positions[3] is -1"});
        scene.tokens.positions =
            reinterpret_cast<const int32_t *>(reinterpret_cast<uintptr_t>(scene.batch.positions.data()) + 2);
        scene.refuses(call, {"tokens->positions is 0x", "aligned to 4"});
    }
}

TEST_CASE("a stream on the CPU") {
    Scene scene;
    int stream = 0;
    const auto refuses = [&](const std::function<dq_status(dq_codec *)> &call) {
        scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"stream is 0x", "null on the CPU"},
                            [&] { return call(scene.codec.get()); });
    };
    refuses([&](dq_codec *c) { return dq_compress(c, 0, &scene.tokens, nullptr, 0, &stream); });
    refuses([&](dq_codec *c) { return dq_append(c, 0, &scene.tokens, nullptr, 0, &stream); });
    refuses([&](dq_codec *c) { return dq_refit(c, 0, 1, &stream); });
}

TEST_CASE("shards") {
    Scene scene;
    const auto refuses = [&](const std::function<dq_status(uint32_t, uint32_t)> &call) {
        scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"n_shards is 0"}, [&] { return call(0, 0); });
        scene.watch.refuses(DQ_ERROR_INVALID_ARGUMENT, {"shard is 3", "n_shards, 3"}, [&] { return call(3, 3); });
    };
    dq_codec *c = scene.codec.get();
    refuses([&](uint32_t i, uint32_t n) { return dq_observe_shard(c, 0, &scene.tokens, i, n); });
    refuses([&](uint32_t i, uint32_t n) { return dq_refit_shard(c, 0, i, n); });
    refuses([&](uint32_t i, uint32_t n) { return dq_encode_shard(c, 0, &scene.tokens, i, n); });
}

TEST_CASE("no tokens are fine, whatever the pointers say") {
    for (const auto &call : calls()) {
        Scene scene;
        auto tokens = sized<dq_tokens>();
        ok(call.call(scene.codec.get(), &tokens));
        scene.watch.unchanged();
    }
}

TEST_CASE("only one half of a row, or neither rows nor queries") {
    Scene scene;
    const auto &observe = calls()[2];
    scene.tokens.k.data = nullptr;
    scene.refuses(observe, {"tokens->k.data is null", "tokens->v.data"});
    scene.tokens.v.data = nullptr;
    scene.tokens.q.data = nullptr;
    scene.refuses(observe, {"tokens->q.data", "both null"});
    scene.tokens = scene.batch.tokens(scene.store);
    scene.tokens.k.data = scene.tokens.v.data = nullptr;
    ok(observe.call(scene.codec.get(), &scene.tokens));
}

TEST_CASE("slots that are not named, and gaps, stay untouched") {
    const std::vector<dq_layer_desc> layers{layer_desc(96, 64, 3, 2)};
    const auto codec = make_codec(layers);
    const Store store(codec.get(), 0, 12, 48);
    const Bytes before = store.bytes();
    Batch batch(layers[0], 5);
    batch.slots = {7, -1, 3, -1, 11};
    const auto tokens = batch.tokens(store);
    ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    CHECK(store.memory().intact());
    const Bytes after = store.bytes();
    const uint64_t stride = store.slot_bytes() + 48;
    for (uint64_t at = 0; at < after.size(); at++) {
        const uint64_t slot = at / stride;
        const bool named = slot == 7 || slot == 3 || slot == 11;
        if (!named || at % stride >= store.slot_bytes()) {
            REQUIRE(after[at] == before[at]);
        }
    }
}

TEST_CASE("all element types and strides of the same rows give the same records") {
    const std::vector<dq_layer_desc> layers{layer_desc()};
    // Values that all three types hold exactly.
    const auto coded = [&](uint32_t dtype, uint32_t gap, bool zero_stride) {
        const auto codec = make_codec(layers);
        const Store store(codec.get(), 0, 32);
        Batch batch(layers[0], 32, 5, 0, dtype, gap);
        for (auto *rows : {&batch.q, &batch.k, &batch.v}) {
            Random random(17);
            for (uint32_t t = 0; t < 32; t++) {
                for (uint32_t h = 0; h < rows->heads(); h++) {
                    for (uint32_t c = 0; c < 64; c++) rows->set(t, h, c, static_cast<float>(random.below(255)) - 127);
                }
            }
        }
        auto tokens = batch.tokens(store);
        if (zero_stride) tokens.store.slot_stride = 0;
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        return store.bytes();
    };
    const Bytes want = coded(DQ_F32, 0, false);
    for (uint32_t dtype : {DQ_F32, DQ_F16, DQ_BF16}) {
        CHECK(coded(dtype, 0, true) == want);
        CHECK(coded(dtype, 24, false) == want);
    }
}
