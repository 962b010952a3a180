// Bad arguments of attend and its phases.
#include "support.hpp"

using namespace test;

namespace {

using Call = std::function<dq_status(const dq_codec *, const dq_attend_args *, void *, uint64_t)>;

const std::vector<Call> &calls() {
    static const std::vector<Call> all{
        [](const dq_codec *c, const dq_attend_args *a, void *w, uint64_t n) { return dq_attend(c, 0, a, w, n, nullptr); },
        [](const dq_codec *c, const dq_attend_args *a, void *w, uint64_t n) { return dq_attend_shard(c, 0, a, w, n, 0, 1); },
        [](const dq_codec *c, const dq_attend_args *a, void *w, uint64_t n) {
            return dq_attend_merge_shard(c, 0, a, w, n, 0, 1);
        },
    };
    return all;
}

struct Scene {
    static constexpr uint32_t kQueries = 3, kKeys = 24, kSlots = 32, kMaskBytes = kQueries * kKeys * 4;
    std::vector<dq_layer_desc> layers{layer_desc()};
    Codec codec = make_codec(layers);
    Store store{codec.get(), 0, kSlots};
    Rows q{kQueries, 4, 64}, out{kQueries, 4, 64};
    Fenced mask{kMaskBytes}, sinks{4 * 4};
    Fenced workspace{workspace_size(codec.get(), 0, kQueries, kKeys)};
    Watch watch;
    dq_attend_args args = attend_args(store, q, out, kKeys);

    Scene() {
        const Batch batch(layers[0], kSlots);
        const auto tokens = batch.tokens(store);
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        q.fill(4);
        args.mask.data = mask.data();
        args.mask.dtype = DQ_F32;
        args.mask.query_stride = 4 * kKeys;
        args.sink_logits = reinterpret_cast<const float *>(sinks.data());
        watch.codec(codec.get()).memory(store.memory()).memory(q.memory()).memory(out.memory());
        watch.memory(mask).memory(sinks).memory(workspace);
    }

    void refuses(dq_status status, std::initializer_list<std::string> words) const {
        refuses_with(status, words, workspace.data(), workspace.size());
    }

    void refuses_with(dq_status status, std::initializer_list<std::string> words, void *ws, uint64_t bytes) const {
        for (const auto &call : calls()) {
            watch.refuses(status, words, [&] { return call(codec.get(), &args, ws, bytes); });
        }
    }
};

constexpr dq_status kInvalid = DQ_ERROR_INVALID_ARGUMENT;

void *shifted(void *pointer, ptrdiff_t bytes) { return static_cast<uint8_t *>(pointer) + bytes; }

}  // namespace

TEST_CASE("the scene itself is fine") {
    Scene scene;
    for (const auto &call : calls()) {
        ok(call(scene.codec.get(), &scene.args, scene.workspace.data(), scene.workspace.size()));
    }
    CHECK((scene.workspace.intact() && scene.out.memory().intact()));
}

TEST_CASE("workspace: a byte short, null, misaligned") {
    Scene scene;
    const auto size = scene.workspace.size();
    REQUIRE(size > 0);
    scene.refuses_with(DQ_ERROR_WORKSPACE,
                       {"workspace_bytes is " + std::to_string(size - 1), std::to_string(size), "dq_workspace_size"},
                       scene.workspace.data(), size - 1);
    scene.refuses_with(DQ_ERROR_WORKSPACE, {"workspace_bytes is 0"}, nullptr, 0);
    scene.refuses_with(kInvalid, {"workspace is null"}, nullptr, size);
    scene.refuses_with(kInvalid, {"workspace is 0x", "aligned to 64"}, shifted(scene.workspace.data(), 32), size);
}

TEST_CASE("a workspace for more serves less, and sizes never shrink") {
    Scene scene;
    uint64_t last = 0;
    for (uint32_t n_q : {0u, 1u, 2u, 17u, 512u}) {
        for (uint32_t n_kv : {0u, 1u, 300u, 100000u}) {
            const auto size = workspace_size(scene.codec.get(), 0, n_q, n_kv);
            CHECK(size <= workspace_size(scene.codec.get(), 0, n_q + 1, n_kv));
            CHECK(size <= workspace_size(scene.codec.get(), 0, n_q, n_kv + 1000));
            CHECK(size <= workspace_size(scene.codec.get(), 0, n_q, n_kv, 2));
            last = size;
        }
    }
    CHECK(last < uint64_t{1} << 32);
}

TEST_CASE("queries and outputs: null, misaligned, mistyped, misstrided") {
    Scene scene;
    for (dq_tensor dq_attend_args::*side : {&dq_attend_args::q, &dq_attend_args::out}) {
        const std::string name = side == &dq_attend_args::q ? "args->q" : "args->out";
        dq_tensor &tensor = scene.args.*side;
        const dq_tensor good = tensor;
        tensor.data = nullptr;
        scene.refuses(kInvalid, {name + ".data is null"});
        tensor.data = shifted(good.data, 2);
        scene.refuses(kInvalid, {name + ".data is 0x", "aligned to 4"});
        tensor = good;
        tensor.dtype = 7;
        scene.refuses(kInvalid, {name + ".dtype is 7"});
        tensor = good;
        tensor.reserved = 1;
        scene.refuses(kInvalid, {name + ".reserved is 1"});
        tensor = good;
        tensor.head_stride = 255;
        scene.refuses(kInvalid, {name + ".head_stride is 255", "256"});
        tensor = good;
        tensor.token_stride = 64;
        scene.refuses(kInvalid, {name + ".token_stride is 64", "256"});
        tensor = good;
        tensor.token_stride = UINT64_MAX / 4 * 4;
        scene.refuses(kInvalid, {name, "address space"});
        tensor = good;
    }
    scene.args.out.token_stride = 2 * 256;
    scene.refuses(kInvalid, {"args->out.token_stride is 512", "overlap"});
}

TEST_CASE("stores and slots") {
    Scene scene;
    const auto good = scene.args;
    auto &args = scene.args;
    args.store.data = nullptr;
    scene.refuses(kInvalid, {"args->store is null"});
    args.store.data = shifted(good.store.data, 4);
    scene.refuses(kInvalid, {"args->store is 0x", "aligned to 16"});
    args = good;
    args.store.slot_stride = 143;
    scene.refuses(kInvalid, {"slot_stride is 143", "144"});
    args = good;
    args.store.n_slots = 0;
    scene.refuses(kInvalid, {"n_slots is 0"});
    args = good;
    args.first_slot = Scene::kSlots - Scene::kKeys + 1;
    scene.refuses(kInvalid, {"first_slot is 9", "n_kv 24", "33", "n_slots is 32"});
    args.first_slot = UINT64_MAX;
    scene.refuses(kInvalid, {"first_slot is 18446744073709551615"});
    args = good;
    args.n_kv = 33;
    scene.refuses(kInvalid, {"n_kv 33", "n_slots is 32"});
    args = good;
    args.n_streams = 3;
    args.n_q = 1;
    args.stream_slots = 5;
    scene.refuses(kInvalid, {"stream_slots 5", "n_streams 3", "34", "n_slots is 32"});
    args.stream_slots = UINT64_MAX / 2 + 1;
    scene.refuses(kInvalid, {"more than 2^64"});
}

TEST_CASE("masks") {
    Scene scene;
    const auto good = scene.args;
    auto &mask = scene.args.mask;
    for (uint32_t dtype : {0u, 3u, 9u}) {
        mask.dtype = dtype;
        scene.refuses(kInvalid, {"mask.dtype is " + std::to_string(dtype), "DQ_F16 (2)"});
    }
    mask = good.mask;
    mask.reserved = 2;
    scene.refuses(kInvalid, {"mask.reserved is 2"});
    mask = good.mask;
    mask.data = shifted(scene.mask.data(), 2);
    scene.refuses(kInvalid, {"mask.data is 0x", "aligned to 4"});
    mask = good.mask;
    for (uint64_t stride : {92, 98}) {
        mask.query_stride = stride;
        scene.refuses(kInvalid, {"mask.query_stride is " + std::to_string(stride), "96"});
    }
    mask.query_stride = UINT64_MAX / 4 * 4;
    scene.refuses(kInvalid, {"mask.data", "address space"});
    mask = good.mask;
    scene.args.n_streams = 3;
    scene.args.n_q = 1;
    mask.stream_stride = 4;
    scene.refuses(kInvalid, {"mask.stream_stride is 4", "96"});
}

TEST_CASE("numbers and sinks") {
    Scene scene;
    auto &args = scene.args;
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        args.scale = bad;
        scene.refuses(kInvalid, {"args->scale is", "finite"});
    }
    args.scale = 0;
    for (float bad : {NAN, INFINITY, -1.0f}) {
        args.softcap = bad;
        scene.refuses(kInvalid, {"args->softcap is", "not negative"});
    }
    args.softcap = 0;
    args.sink_logits = reinterpret_cast<const float *>(scene.sinks.data() + 1);
    scene.refuses(kInvalid, {"args->sink_logits is 0x", "aligned to 4"});
}

TEST_CASE("overlap of what is written with anything else") {
    Scene scene;
    const auto good = scene.args;
    auto &args = scene.args;
    args.out.data = shifted(args.q.data, 256);
    scene.refuses(kInvalid, {"args->out.data", "overlaps args->q.data"});
    args.out.data = scene.store.record(31);
    scene.refuses(kInvalid, {"args->out.data", "overlaps args->store"});
    args = good;
    args.mask.data = shifted(args.out.data, 16);
    scene.refuses(kInvalid, {"args->out.data", "overlaps args->mask.data"});
    args = good;
    args.sink_logits = static_cast<const float *>(args.out.data);
    scene.refuses(kInvalid, {"args->out.data", "overlaps args->sink_logits"});
    args = good;
    const auto size = scene.workspace.size();
    args.out.data = shifted(scene.workspace.data(), static_cast<ptrdiff_t>(size) - 4);
    scene.refuses(kInvalid, {"args->out.data", "overlaps workspace"});
    args = good;
    args.q.data = scene.workspace.data();
    scene.refuses(kInvalid, {"workspace", "overlaps args->q.data"});
    args = good;
    args.mask.data = scene.workspace.data();
    scene.refuses(kInvalid, {"workspace", "overlaps args->mask.data"});
    args = good;
    args.store.data = scene.workspace.data();
    scene.refuses(kInvalid, {"workspace", "overlaps args->store"});
}

TEST_CASE("shards of attend, and its stream") {
    Scene scene;
    void *ws = scene.workspace.data();
    const auto bytes = scene.workspace.size();
    for (auto call : {dq_attend_shard, dq_attend_merge_shard}) {
        const auto refuses = [&](uint32_t i, uint32_t n, std::initializer_list<std::string> words) {
            scene.watch.refuses(kInvalid, words,
                                [&] { return call(scene.codec.get(), 0, &scene.args, ws, bytes, i, n); });
        };
        refuses(0, 0, {"n_shards is 0"});
        refuses(7, 7, {"shard is 7", "n_shards, 7"});
    }
    int stream = 0;
    scene.watch.refuses(kInvalid, {"stream is 0x"},
                        [&] { return dq_attend(scene.codec.get(), 0, &scene.args, ws, bytes, &stream); });
}

TEST_CASE("no queries are fine, whatever the pointers say") {
    Scene scene;
    auto args = sized<dq_attend_args>();
    for (const auto &call : calls()) ok(call(scene.codec.get(), &args, nullptr, 0));
    scene.watch.unchanged();
}
