// The concurrent contracts: any number of shards on any threads gives the same bytes; attend overlaps compress.
#include "support.hpp"

#include <atomic>
#include <thread>

using namespace test;

namespace {

template <class Work>
void on_threads(uint32_t n, Work work) {
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < n; i++) threads.emplace_back([=] { work(i); });
    for (auto &thread : threads) thread.join();
}

// Catch's assertions belong to the main thread.
struct Failures {
    std::atomic<int> count{0};
    void expect(dq_status status) {
        if (status != DQ_OK) count++;
    }
    ~Failures() { CHECK(count == 0); }
};

const std::vector<dq_layer_desc> &layers() {
    static const std::vector<dq_layer_desc> all = [] {
        auto layer = layer_desc(80, 64, 4, 3);
        layer.n_q_heads = 6;
        layer.n_kv_heads = 3;
        return std::vector<dq_layer_desc>{layer, layer};
    }();
    return all;
}

constexpr uint32_t kTokens = 100, kQueries = 9;

struct Outcome {
    Bytes records, factors, out;
};

Outcome sharded(uint32_t n) {
    Failures failures;
    const auto codec = make_codec(layers());
    const Store store(codec.get(), 0, kTokens);
    for (uint64_t round = 0; round < 2; round++) {
        const Batch batch(layers()[0], kTokens, round);
        const auto tokens = batch.tokens(store);
        on_threads(n, [&](uint32_t i) { failures.expect(dq_observe_shard(codec.get(), 0, &tokens, i, n)); });
        on_threads(n, [&](uint32_t i) { failures.expect(dq_refit_shard(codec.get(), 0, i, n)); });
        on_threads(n, [&](uint32_t i) { failures.expect(dq_encode_shard(codec.get(), 0, &tokens, i, n)); });
    }
    Rows q(kQueries, 6, 80), out(kQueries, 6, 64);
    q.fill(3);
    const auto args = attend_args(store, q, out, kTokens);
    const Fenced ws(workspace_size(codec.get(), 0, kQueries, kTokens));
    on_threads(n, [&](uint32_t i) { failures.expect(dq_attend_shard(codec.get(), 0, &args, ws.data(), ws.size(), i, n)); });
    // The merge may be split otherwise.
    const uint32_t m = n + 1;
    on_threads(m, [&](uint32_t i) {
        failures.expect(dq_attend_merge_shard(codec.get(), 0, &args, ws.data(), ws.size(), i, m));
    });
    CHECK((ws.intact() && store.memory().intact() && out.memory().intact()));
    return {store.bytes(), save(codec.get()), Bytes(out.memory().data(), out.memory().data() + out.memory().size())};
}

Outcome whole() {
    const auto codec = make_codec(layers());
    const Store store(codec.get(), 0, kTokens);
    for (uint64_t round = 0; round < 2; round++) {
        const Batch batch(layers()[0], kTokens, round);
        const auto tokens = batch.tokens(store);
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    }
    Rows q(kQueries, 6, 80), out(kQueries, 6, 64);
    q.fill(3);
    const auto args = attend_args(store, q, out, kTokens);
    const Fenced ws(workspace_size(codec.get(), 0, kQueries, kTokens));
    ok(dq_attend(codec.get(), 0, &args, ws.data(), ws.size(), nullptr));
    return {store.bytes(), save(codec.get()), Bytes(out.memory().data(), out.memory().data() + out.memory().size())};
}

}  // namespace

TEST_CASE("any number of shards on threads gives the bytes of one call") {
    const Outcome want = whole();
    for (uint32_t n : {1u, 2u, 3u, 5u, 16u, 150u}) {
        INFO(n << " shards");
        const Outcome got = sharded(n);
        CHECK(got.records == want.records);
        CHECK(got.factors == want.factors);
        CHECK(got.out == want.out);
    }
}

TEST_CASE("attend and dequantize while the same layer is compressed into other slots") {
    Failures failures;
    const auto codec = make_codec(layers());
    const Store store(codec.get(), 0, 2 * kTokens);
    const Batch first(layers()[0], kTokens, 1);
    auto tokens = first.tokens(store);
    ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    Rows q(kQueries, 6, 80), want(kQueries, 6, 64);
    q.fill(3);
    const Fenced ws(workspace_size(codec.get(), 0, kQueries, kTokens));
    const auto args = attend_args(store, q, want, kTokens);
    ok(dq_attend(codec.get(), 0, &args, ws.data(), ws.size(), nullptr));

    std::atomic<bool> done{false};
    std::atomic<int> wrong{0};
    std::vector<std::thread> readers;
    for (int r = 0; r < 3; r++) {
        readers.emplace_back([&] {
            const Rows out(kQueries, 6, 64);
            const Rows back(kTokens, 3, 80);
            const Fenced own(ws.size());
            const auto mine = attend_args(store, q, out, kTokens);
            const auto to = back.tensor();
            const auto view = store.view();
            do {
                failures.expect(dq_attend(codec.get(), 0, &mine, own.data(), own.size(), nullptr));
                failures.expect(
                    dq_dequantize(codec.get(), 0, &view, first.slots.data(), kTokens, &to, nullptr, nullptr));
                auto state = sized<dq_layer_info>();
                failures.expect(dq_codec_info(codec.get(), 0, &state));
                if (!(out == want)) wrong++;
            } while (!done);
        });
    }
    for (uint64_t round = 2; round < 12; round++) {
        const Batch more(layers()[0], kTokens, round, kTokens);
        tokens = more.tokens(store);
        failures.expect(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    }
    done = true;
    for (auto &reader : readers) reader.join();
    CHECK(wrong == 0);
    CHECK(info(codec.get()).k_sets > 2);
}

TEST_CASE("fits on a thread of their own, while rows are coded and attended") {
    Failures failures;
    dq_codec *made = nullptr;
    const auto all = layers();
    auto desc = codec_desc(all);
    desc.flags = DQ_CODEC_DEFER_FITS;
    ok(dq_codec_create(make_context().get(), &desc, &made));
    const Codec codec(made);
    const Store store(codec.get(), 0, 2 * kTokens);
    const Batch batch(layers()[0], kTokens, 1);
    auto tokens = batch.tokens(store);
    ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    CHECK(info(codec.get()).rows_seen >= 64);
    // A sink at most: the fits that are due were left alone.
    CHECK(info(codec.get()).k_sets <= 2);

    std::atomic<bool> done{false};
    std::thread fits([&] {
        do {
            failures.expect(dq_refit(codec.get(), 0, 2, nullptr));
        } while (!done);
    });
    Rows q(kQueries, 6, 80), out(kQueries, 6, 64);
    q.fill(3);
    const auto args = attend_args(store, q, out, kTokens);
    const Fenced ws(workspace_size(codec.get(), 0, kQueries, kTokens));
    for (uint64_t round = 2; round < 12; round++) {
        const Batch more(layers()[0], kTokens, round, kTokens);
        tokens = more.tokens(store);
        failures.expect((round % 2 ? dq_compress : dq_append)(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        failures.expect(dq_attend(codec.get(), 0, &args, ws.data(), ws.size(), nullptr));
    }
    done = true;
    fits.join();
    ok(dq_refit(codec.get(), 0, 2, nullptr));
    CHECK(info(codec.get()).k_sets > 2);
    CHECK((store.memory().intact() && out.memory().intact()));
}

TEST_CASE("layers of one codec on threads of their own") {
    Failures failures;
    const auto codec = make_codec(layers()), alone = make_codec(layers());
    const Store a(codec.get(), 0, kTokens), b(codec.get(), 1, kTokens), c(codec.get(), 0, kTokens);
    const Batch batch(layers()[0], kTokens, 1);
    const dq_tokens both[2] = {batch.tokens(a), batch.tokens(b)};
    on_threads(2, [&](uint32_t i) { failures.expect(dq_compress(codec.get(), i, &both[i], nullptr, 0, nullptr)); });
    const auto tokens = batch.tokens(c);
    ok(dq_compress(alone.get(), 0, &tokens, nullptr, 0, nullptr));
    CHECK((a.bytes() == c.bytes() && b.bytes() == c.bytes()));
}

TEST_CASE("messages belong to their thread") {
    REQUIRE(dq_context_create(nullptr, nullptr) == DQ_ERROR_INVALID_ARGUMENT);
    std::string other = "?", after;
    std::thread([&] {
        other = last_error();
        dq_refit(nullptr, 0, 0, nullptr);
        after = last_error();
    }).join();
    CHECK(other.empty());
    CHECK(after == "codec is null");
    CHECK(last_error() == "out is null");
}

TEST_CASE("contexts and codecs come and go on many threads") {
    Failures failures;
    on_threads(8, [&](uint32_t i) {
        for (int round = 0; round < 20; round++) {
            dq_context *context = nullptr;
            failures.expect(dq_context_create(nullptr, &context));
            const std::vector<dq_layer_desc> one{layers()[i % 2]};
            const auto desc = codec_desc(one);
            dq_codec *codec = nullptr;
            failures.expect(dq_codec_create(context, &desc, &codec));
            dq_context_destroy(context);
            dq_codec_destroy(codec);
        }
    });
}
