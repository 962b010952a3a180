// Attention on records against the naive formula, in double, on the rows that dq_dequantize gives back.
#include "support.hpp"

#include <algorithm>

using namespace test;

namespace {

struct Case {
    dq_layer_desc layer = layer_desc();
    uint32_t n_q = 3, n_kv = 70, n_streams = 1, first_slot = 2;
    uint32_t q_type = DQ_F32, out_type = DQ_F32;
    // 0: none; else DQ_F32 or DQ_F16.
    uint32_t mask_type = 0;
    bool sinks = false;
    float scale = 0, softcap = 0;
    uint32_t gap = 0;
};

struct Run {
    Case c;
    Codec codec = make_codec({c.layer});
    uint32_t per_stream = c.n_kv + 3;
    Store store{codec.get(), 0, c.first_slot + c.n_streams * per_stream, 16 * c.gap};
    Rows q{c.n_streams * c.n_q, c.layer.n_q_heads, c.layer.head_dim_k, c.q_type, c.gap};
    Rows out{c.n_streams * c.n_q, c.layer.n_q_heads, c.layer.head_dim_v, c.out_type, c.gap};
    uint32_t mask_row = c.n_kv + 5;
    Fenced mask{size_t{4} * c.n_streams * c.n_q * mask_row};
    std::vector<float> sinks;
    dq_attend_args args{};
    Fenced workspace{workspace_size(codec.get(), 0, c.n_q, c.n_kv, c.n_streams)};

    explicit Run(const Case &given) : c(given) {
        const auto n = static_cast<uint32_t>(store.n_slots());
        // Two compressions: rows of several factor sets.
        for (uint32_t part : {0u, 1u}) {
            Batch batch(c.layer, n, 11 + part);
            for (uint32_t i = 0; i < n; i++) batch.slots[i] = (i + part) % 2 ? int64_t{i} : -1;
            const auto tokens = batch.tokens(store);
            ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        }
        q.fill(5, 0.5f);
        args = attend_args(store, q, out, c.n_kv);
        args.n_q = c.n_q;
        args.n_streams = c.n_streams;
        args.first_slot = c.first_slot;
        args.stream_slots = per_stream;
        args.scale = c.scale;
        args.softcap = c.softcap;
        if (c.mask_type) fill_mask();
        if (c.sinks) {
            for (uint32_t h = 0; h < c.layer.n_q_heads; h++) sinks.push_back(1.5f - static_cast<float>(h));
            args.sink_logits = sinks.data();
        }
    }

    // Causal-like with holes and biases; the first query sees no key.
    void fill_mask() {
        Random random(8);
        const uint32_t size = c.mask_type == DQ_F32 ? 4 : 2;
        args.mask.data = mask.data();
        args.mask.dtype = c.mask_type;
        args.mask.query_stride = uint64_t{mask_row} * size;
        args.mask.stream_stride = c.n_q * args.mask.query_stride;
        for (uint32_t t = 0; t < c.n_streams * c.n_q; t++) {
            for (uint32_t j = 0; j < c.n_kv; j++) {
                const bool hidden = t == 0 || random.below(4) == 0 || j > c.n_kv / 2 + t;
                const float value = hidden ? -INFINITY : static_cast<float>(random.below(5)) * -0.25f;
                uint8_t *to = mask.data() + t * args.mask.query_stride + size_t{j} * size;
                const uint16_t half = half_from(value);
                std::memcpy(to, size == 4 ? static_cast<const void *>(&value) : &half, size);
            }
        }
    }

    double mask_at(uint32_t token, uint32_t key) const {
        if (!c.mask_type) return 0;
        const uint32_t size = c.mask_type == DQ_F32 ? 4 : 2;
        const uint8_t *from = mask.data() + token * args.mask.query_stride + size_t{key} * size;
        float value;
        uint16_t half;
        std::memcpy(size == 4 ? static_cast<void *>(&value) : &half, from, size);
        return size == 4 ? value : half_to(half);
    }

    void attend() const {
        ok(dq_attend(codec.get(), 0, &args, workspace.data(), workspace.size(), nullptr));
        CHECK((out.memory().intact() && workspace.intact() && store.memory().intact()));
    }

    // Largest error of an output's row, as a share of the mean over its channels of the sum of p |v|.
    double error() const {
        const auto n = static_cast<uint32_t>(store.n_slots());
        Rows k(n, c.layer.n_kv_heads, c.layer.head_dim_k), v(n, c.layer.n_kv_heads, c.layer.head_dim_v);
        std::vector<int64_t> slots;
        for (uint32_t i = 0; i < n; i++) slots.push_back(i);
        const auto to_k = k.tensor(), to_v = v.tensor();
        const auto view = store.view();
        ok(dq_dequantize(codec.get(), 0, &view, slots.data(), n, &to_k, &to_v, nullptr));
        double worst = 0;
        for (uint32_t t = 0; t < c.n_streams * c.n_q; t++) {
            for (uint32_t h = 0; h < c.layer.n_q_heads; h++) worst = std::max(worst, error_of(t, h, k, v));
        }
        return worst;
    }

    double error_of(uint32_t t, uint32_t h, const Rows &k, const Rows &v) const {
        const uint32_t first = c.first_slot + t / c.n_q * per_stream;
        const uint32_t kv_head = h / (c.layer.n_q_heads / c.layer.n_kv_heads);
        const double scale = c.scale != 0 ? double{c.scale} : 1 / std::sqrt(double{1} * c.layer.head_dim_k);
        std::vector<double> logits(c.n_kv);
        double largest = sinks.empty() ? -INFINITY : double{sinks[h]};
        for (uint32_t j = 0; j < c.n_kv; j++) {
            double sum = 0;
            for (uint32_t i = 0; i < c.layer.head_dim_k; i++) {
                sum += double{q.get(t, h, i)} * double{k.get(first + j, kv_head, i)};
            }
            sum *= scale;
            if (c.softcap > 0) sum = double{c.softcap} * std::tanh(sum / double{c.softcap});
            logits[j] = sum + mask_at(t, j);
            largest = std::max(largest, logits[j]);
        }
        double total = sinks.empty() ? 0 : std::exp(double{sinks[h]} - largest);
        for (double logit : logits) {
            if (logit > -INFINITY) total += std::exp(logit - largest);
        }
        double worst = 0, sizes = 0;
        for (uint32_t i = 0; i < c.layer.head_dim_v; i++) {
            double want = 0, size = 0;
            for (uint32_t j = 0; j < c.n_kv; j++) {
                if (!(logits[j] > -INFINITY)) continue;
                const double p = std::exp(logits[j] - largest) / total;
                const double x = double{v.get(first + j, kv_head, i)};
                want += p * x;
                size += p * std::fabs(x);
            }
            const double got = double{out.get(t, h, i)};
            worst = std::max(worst, std::isfinite(got) ? std::fabs(got - want) : INFINITY);
            sizes += size;
        }
        // The values' rows are rotated before they are coded, so that an error is spread over all channels.
        return worst == 0 ? 0 : worst / (sizes / c.layer.head_dim_v);
    }
};

void check(const Case &c, double tolerance = 1e-3) {
    INFO("d " << c.layer.head_dim_k << "/" << c.layer.head_dim_v << ", plans " << c.layer.k_plan << "/"
              << c.layer.v_plan << ", heads " << c.layer.n_q_heads << "/" << c.layer.n_kv_heads << ", " << c.n_q
              << " queries, " << c.n_kv << " keys, " << c.n_streams << " streams");
    const Run run(c);
    run.attend();
    CHECK(run.error() <= tolerance);
}

}  // namespace

TEST_CASE("every head_dim and plan, for keys and values apart") {
    for (uint32_t d : {64u, 80u, 96u, 128u, 192u, 256u}) {
        for (uint32_t plan : {2u, 3u, 4u, 8u, 102u, 103u, 104u}) {
            Case c;
            c.layer = layer_desc(d, 64, plan, 4);
            check(c);
            c.layer = layer_desc(64, d, 4, plan);
            check(c);
        }
    }
}

TEST_CASE("every gauge") {
    for (uint32_t gauge : {DQ_GAUGE_ROTATION, DQ_GAUGE_CENTRED, DQ_GAUGE_ATTENTION}) {
        Case c;
        c.layer.k_gauge = c.layer.v_gauge = gauge;
        c.n_kv = 700;
        check(c);
    }
}

TEST_CASE("heads: MHA, GQA, MQA") {
    for (auto heads : {std::pair<uint32_t, uint32_t>{3, 3}, {9, 3}, {8, 1}, {14, 2}, {64, 8}, {1, 1}}) {
        Case c;
        c.layer.n_q_heads = heads.first;
        c.layer.n_kv_heads = heads.second;
        c.n_q = 2;
        check(c);
    }
}

TEST_CASE("one to many queries, one to many keys") {
    for (uint32_t n_q : {1u, 2u, 5u, 33u, 130u}) {
        for (uint32_t n_kv : {1u, 2u, 31u, 64u, 65u, 600u}) {
            Case c;
            c.n_q = n_q;
            c.n_kv = n_kv;
            check(c);
        }
    }
    Case deep;
    deep.n_q = 1;
    deep.n_kv = 5000;
    check(deep);
}

TEST_CASE("masks, sinks, soft-cap, scale, streams, element types, strides") {
    for (uint32_t mask : {0u, uint32_t{DQ_F32}, uint32_t{DQ_F16}}) {
        for (bool sinks : {false, true}) {
            for (float softcap : {0.0f, 20.0f}) {
                Case c;
                c.mask_type = mask;
                c.sinks = sinks;
                c.softcap = softcap;
                c.n_streams = 3;
                c.gap = 4;
                check(c);
                c.scale = 0.05f;
                c.n_streams = 1;
                c.n_q = 20;
                check(c);
            }
        }
    }
    for (uint32_t type : {uint32_t{DQ_F16}, uint32_t{DQ_BF16}}) {
        Case c;
        c.q_type = c.out_type = type;
        c.gap = 3;
        // The output is rounded to 11 or 8 bits.
        check(c, type == DQ_F16 ? 2e-3 : 2e-2);
    }
}

TEST_CASE("no key, and no visible key, give zeros") {
    for (bool sinks : {false, true}) {
        Case c;
        c.sinks = sinks;
        Run run(c);
        run.args.n_kv = 0;
        run.attend();
        for (uint32_t t = 0; t < c.n_q; t++) {
            for (uint32_t i = 0; i < 64; i++) REQUIRE(run.out.get(t, 1, i) == 0);
        }
    }
    Case c;
    c.mask_type = DQ_F32;
    const Run run(c);
    run.attend();
    for (uint32_t h = 0; h < 4; h++) {
        for (uint32_t i = 0; i < 64; i++) REQUIRE(run.out.get(0, h, i) == 0);
    }
}

TEST_CASE("a mask row for all queries: stride 0") {
    Case c;
    c.mask_type = DQ_F32;
    Run run(c);
    for (uint32_t t = 1; t < c.n_q; t++) {
        std::memcpy(run.mask.data(), run.mask.data() + run.args.mask.query_stride, run.mask_row * 4);
    }
    for (uint32_t t = 1; t < c.n_q; t++) {
        std::memcpy(run.mask.data() + t * run.args.mask.query_stride, run.mask.data(), run.mask_row * 4);
    }
    run.attend();
    const Bytes want(run.out.memory().data(), run.out.memory().data() + run.out.memory().size());
    run.args.mask.query_stride = 0;
    run.attend();
    CHECK(std::memcmp(want.data(), run.out.memory().data(), want.size()) == 0);
}

TEST_CASE("hidden slots are never looked at") {
    Case c;
    c.mask_type = DQ_F32;
    const Run run(c);
    run.attend();
    const Bytes want(run.out.memory().data(), run.out.memory().data() + run.out.memory().size());
    // Garbage in all slots that no query sees: the second half of the keys, beyond the causal edge.
    for (uint32_t j = c.n_kv / 2 + c.n_q; j < c.n_kv; j++) {
        std::memset(run.store.record(c.first_slot + j), 0xFF, run.store.slot_bytes());
    }
    run.attend();
    CHECK(std::memcmp(want.data(), run.out.memory().data(), want.size()) == 0);
}

TEST_CASE("a store of garbage gives some answer and harms nothing") {
    for (uint32_t plan : {2u, 3u, 4u, 8u, 102u, 103u, 104u}) {
        Case c;
        c.layer = layer_desc(96, 80, plan, plan);
        const Run run(c);
        Random random(6);
        for (size_t i = 0; i < run.store.memory().size(); i++) {
            run.store.memory().data()[i] = static_cast<uint8_t>(random.bits());
        }
        run.attend();
        Rows back(2, 2, 96);
        const int64_t slots[2] = {1, 0};
        const auto to = back.tensor();
        const auto view = run.store.view();
        ok(dq_dequantize(run.codec.get(), 0, &view, slots, 2, &to, nullptr, nullptr));
        CHECK(back.memory().intact());
    }
}

TEST_CASE("NaN in one query reaches no other") {
    Case c;
    c.n_q = 6;
    Run run(c);
    run.attend();
    const Rows &out = run.out;
    std::vector<float> want;
    for (uint32_t i = 0; i < 64; i++) want.push_back(out.get(4, 2, i));
    run.q.set(3, 2, 7, NAN);
    run.attend();
    for (uint32_t i = 0; i < 64; i++) REQUIRE(out.get(4, 2, i) == want[i]);
}

TEST_CASE("queries and rows of large values") {
    Case c;
    Run run(c);
    for (uint32_t i = 0; i < 64; i++) run.q.set(1, 0, i, i % 2 ? 500.0f : -500.0f);
    run.q.fill_row(2, 1, 0.0f);
    run.attend();
    CHECK(run.error() <= 1e-2);
}
