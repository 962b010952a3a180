// Rows that hold no numbers, numbers that are too large, or nothing: reported, and no harm to any other row.
#include "support.hpp"

#include <limits>

using namespace test;

namespace {

constexpr uint32_t kTokens = 48;

struct Result {
    dq_status status;
    Bytes records, factors;
    std::string message;
};

// Compresses or appends a batch, after `spoil` has put its rows into token 20, and reads everything back.
template <class Spoil>
Result run(bool append, Spoil spoil, const Store **keep = nullptr) {
    static std::unique_ptr<Store> store;
    const std::vector<dq_layer_desc> layers{layer_desc()};
    const auto codec = make_codec(layers);
    store = std::make_unique<Store>(codec.get(), 0, 128);
    const Batch first(layers[0], 64, 3, 64);
    auto tokens = first.tokens(*store);
    ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    Batch batch(layers[0], kTokens, 4, 1);
    spoil(batch);
    tokens = batch.tokens(*store);
    Result result;
    result.status = append ? dq_append(codec.get(), 0, &tokens, nullptr, 0, nullptr)
                           : dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr);
    result.message = last_error();
    result.records = store->bytes();
    result.factors = save(codec.get());
    CHECK(store->memory().intact());
    if (keep) *keep = store.get();
    return result;
}

// What the same rows give without the spoilt token: its rows then count nowhere.
Result without_token_20(bool append) {
    return run(append, [](Batch &batch) {
        for (uint32_t h = 0; h < 2; h++) {
            batch.k.fill_row(20, h, NAN);
            batch.v.fill_row(20, h, NAN);
        }
        for (uint32_t h = 0; h < 4; h++) batch.q.fill_row(20, h, NAN);
    });
}

void same_but_slot_21(const Bytes &a, const Bytes &b) {
    const size_t slot = a.size() / 128;
    REQUIRE(a.size() == b.size());
    for (size_t i = 0; i < a.size(); i++) {
        if (i / slot != 21) REQUIRE(a[i] == b[i]);
    }
}

}  // namespace

TEST_CASE("NaN and infinity: the row is the zero row of set 0, all others are as if it were not there") {
    for (bool append : {false, true}) {
        for (float bad : {NAN, INFINITY, -INFINITY}) {
            const Store *store = nullptr;
            const auto spoilt = run(append, [&](Batch &batch) {
                for (uint32_t h = 0; h < 2; h++) {
                    batch.k.set(20, h, 63 - h, bad);
                    batch.v.set(20, h, h, bad);
                }
                for (uint32_t h = 0; h < 4; h++) batch.q.set(20, h, 5, bad);
            }, &store);
            CHECK(spoilt.status == DQ_ROWS_REPLACED);
            INFO(spoilt.message);
            CHECK(spoilt.message.find("layer 0: 4 rows") == 0);
            const Bytes record = store->bytes(21);
            for (size_t at = 128; at < 136; at++) CHECK(record[at] == 0);
            const auto clean = without_token_20(append);
            CHECK(spoilt.records == clean.records);
            CHECK(spoilt.factors == clean.factors);
        }
    }
}

TEST_CASE("one bad half leaves the other half of the token alone") {
    const Store *store = nullptr;
    const auto good = run(true, [](Batch &) {}, &store);
    const Bytes want = store->bytes(21);
    const auto spoilt = run(true, [](Batch &batch) { batch.k.set(20, 1, 7, NAN); }, &store);
    CHECK((good.status == DQ_OK && spoilt.status == DQ_ROWS_REPLACED));
    const Bytes got = store->bytes(21);
    // K codes of head 0, V codes, headers but K's of head 1.
    CHECK(std::equal(got.begin(), got.begin() + 32, want.begin()));
    CHECK(std::equal(got.begin() + 64, got.begin() + 130, want.begin() + 64));
    CHECK(std::equal(got.begin() + 132, got.end(), want.begin() + 132));
    CHECK((got[130] == 0 && got[131] == 0));
    same_but_slot_21(spoilt.records, good.records);
}

TEST_CASE("rows of 6e4 are coded and do not spoil the others") {
    const auto good = run(true, [](Batch &) {});
    const Store *store = nullptr;
    const auto large = run(true, [](Batch &batch) {
        for (uint32_t h = 0; h < 2; h++) {
            for (uint32_t c = 0; c < 64; c++) batch.k.set(20, h, c, c % 3 ? 6e4f : -6e4f);
        }
    }, &store);
    CHECK(large.status == DQ_OK);
    same_but_slot_21(large.records, good.records);
}

TEST_CASE("rows beyond f16 take the largest scale and are reported") {
    for (float value : {3e9f, 1e30f, std::numeric_limits<float>::max()}) {
        const auto good = run(true, [](Batch &) {});
        const auto huge = run(true, [&](Batch &batch) { batch.v.fill_row(20, 1, value); });
        CHECK(huge.status == DQ_ROWS_REPLACED);
        CHECK(huge.message.find("1 rows") != std::string::npos);
        same_but_slot_21(huge.records, good.records);
    }
}

TEST_CASE("6e4 in a prefill does not make the others' error grow") {
    const auto error = [](bool spoil) {
        const std::vector<dq_layer_desc> layers{layer_desc()};
        const auto codec = make_codec(layers);
        const Store store(codec.get(), 0, 256);
        Batch batch(layers[0], 256, 4, 0);
        if (spoil) {
            for (uint32_t c = 0; c < 64; c++) batch.k.set(77, 0, c, c % 2 ? 6e4f : -5e4f);
        }
        const auto tokens = batch.tokens(store);
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        Rows back(256, 2, 64);
        const auto to = back.tensor();
        const auto view = store.view();
        ok(dq_dequantize(codec.get(), 0, &view, batch.slots.data(), 256, &to, nullptr, nullptr));
        double sum = 0;
        for (uint32_t t = 0; t < 256; t++) {
            for (uint32_t c = 0; c < 64; c++) {
                const double e = batch.k.get(t, 0, c) - back.get(t, 0, c);
                if (t != 77) sum += e * e;
            }
        }
        return sum;
    };
    CHECK(error(true) < 1.5 * error(false));
}

TEST_CASE("zero rows come back as zeros, before and after a fit") {
    const std::vector<dq_layer_desc> layers{layer_desc()};
    for (uint32_t gauge : {DQ_GAUGE_ROTATION, DQ_GAUGE_CENTRED, DQ_GAUGE_ATTENTION}) {
        auto layer = layers;
        layer[0].k_gauge = layer[0].v_gauge = gauge;
        const auto codec = make_codec(layer);
        const Store store(codec.get(), 0, 64);
        Batch zeros(layers[0], 64);
        for (auto *rows : {&zeros.q, &zeros.k, &zeros.v}) {
            for (uint32_t t = 0; t < 64; t++) {
                for (uint32_t h = 0; h < rows->heads(); h++) rows->fill_row(t, h, 0);
            }
        }
        for (int round = 0; round < 2; round++) {
            auto tokens = zeros.tokens(store);
            ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
            Rows k(64, 2, 64), v(64, 2, 64);
            const auto to_k = k.tensor(), to_v = v.tensor();
            const auto view = store.view();
            ok(dq_dequantize(codec.get(), 0, &view, zeros.slots.data(), 64, &to_k, &to_v, nullptr));
            for (uint32_t t = 0; t < 64; t++) {
                for (uint32_t c = 0; c < 64; c++) {
                    REQUIRE(std::fabs(k.get(t, 1, c)) < 0.02f);
                    REQUIRE(std::fabs(v.get(t, 0, c)) < 0.02f);
                }
            }
        }
    }
}

TEST_CASE("a prompt of one token, of none, and constant rows") {
    const std::vector<dq_layer_desc> layers{layer_desc(96, 80, 3, 2)};
    const auto codec = make_codec(layers);
    const Store store(codec.get(), 0, 64);
    for (uint32_t n : {1u, 2u, 3u}) {
        const Batch batch(layers[0], n);
        const auto tokens = batch.tokens(store);
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    }
    Batch constant(layers[0], 64);
    for (auto *rows : {&constant.q, &constant.k, &constant.v}) {
        for (uint32_t t = 0; t < 64; t++) {
            for (uint32_t h = 0; h < rows->heads(); h++) rows->fill_row(t, h, 3.5f);
        }
    }
    const auto tokens = constant.tokens(store);
    ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
    Rows v(64, 2, 80);
    const auto to = v.tensor();
    const auto view = store.view();
    ok(dq_dequantize(codec.get(), 0, &view, constant.slots.data(), 64, nullptr, &to, nullptr));
    for (uint32_t t = 1; t < 64; t++) REQUIRE(v.get(t, 0, 7) == Approx(3.5f).margin(0.2));
}

TEST_CASE("statistics ignore q rows with NaN") {
    const std::vector<dq_layer_desc> layers{layer_desc()};
    const auto factors = [&](bool spoil) {
        const auto codec = make_codec(layers);
        const Store store(codec.get(), 0, 64);
        Batch batch(layers[0], 64);
        for (uint32_t h = 0; h < 4; h++) {
            if (spoil) batch.q.fill_row(9, h, NAN);
        }
        const auto tokens = batch.tokens(store);
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        Rows k(64, 2, 64);
        const auto to = k.tensor();
        const auto view = store.view();
        ok(dq_dequantize(codec.get(), 0, &view, batch.slots.data(), 64, &to, nullptr, nullptr));
        double sum = 0;
        for (uint32_t t = 0; t < 64; t++) {
            for (uint32_t c = 0; c < 64; c++) sum += std::pow(k.get(t, 0, c) - batch.k.get(t, 0, c), 2);
        }
        return sum;
    };
    CHECK(factors(true) < 1.2 * factors(false));
}
