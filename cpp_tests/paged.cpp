// Batches of uneven sequences over blocks of slots: lengths, windows, tails, shards, against the naive formula.
#include "oracle.hpp"

#include <atomic>
#include <thread>

using namespace test;

namespace {

struct Sequence {
    uint32_t n_q, n_kv, n_tail;
};

struct Case {
    dq_layer_desc layer = layer_desc(64, 80, 104, 4);
    std::vector<Sequence> sequences;
    uint32_t block_slots = 16, window = 0, visible = 0, tail_type = DQ_F32;
    bool paged = true;
};

struct Run {
    Case c;
    uint32_t n = static_cast<uint32_t>(c.sequences.size());
    uint32_t n_q = 0, n_kv = 0, n_tail = 0, tokens = 0, tails = 0, blocks = 0;
    Codec codec = make_codec({c.layer});
    std::vector<int32_t> starts{0}, lengths, table, tail_starts, tail_lengths;
    std::unique_ptr<Store> store;
    std::unique_ptr<Rows> q, out, tail_k, tail_v;
    dq_attend_args args = sized<dq_attend_args>();
    std::unique_ptr<Fenced> workspace;

    explicit Run(const Case &given, uint64_t seed = 1) : c(given) {
        for (const auto &s : c.sequences) {
            n_q = std::max(n_q, s.n_q);
            n_kv = std::max(n_kv, s.n_kv);
            n_tail = std::max(n_tail, s.n_tail);
            tokens += s.n_q;
            starts.push_back(static_cast<int32_t>(tokens));
            lengths.push_back(static_cast<int32_t>(s.n_kv));
            // A row that nobody sees lies behind every tail.
            tail_starts.push_back(static_cast<int32_t>(tails));
            tail_lengths.push_back(static_cast<int32_t>(s.n_tail));
            tails += s.n_tail + 1;
        }
        Random random(seed);
        blocks = n_kv / c.block_slots + 1;
        std::vector<int32_t> free;
        for (uint32_t i = 0; i < n * blocks + 1; i++) free.push_back(static_cast<int32_t>(i));
        for (size_t i = free.size() - 1; i > 0; i--) std::swap(free[i], free[random.below(static_cast<uint32_t>(i) + 1)]);
        table.assign(free.begin(), free.begin() + n * blocks);
        store = std::make_unique<Store>(codec.get(), 0, std::max(uint64_t{free.size()} * c.block_slots, uint64_t{n} * n_kv));
        fill_store();
        q = std::make_unique<Rows>(tokens, c.layer.n_q_heads, c.layer.head_dim_k);
        out = std::make_unique<Rows>(tokens, c.layer.n_q_heads, c.layer.head_dim_v);
        q->fill(5, 0.5f);
        args.n_streams = n;
        args.n_q = n_q;
        args.n_kv = n_kv;
        args.store = store->view();
        args.q = q->tensor();
        args.out = out->tensor();
        auto &s = args.sequences;
        s.kv_lengths = lengths.data();
        // As many queries in each need no starts.
        if (tokens != n * n_q) {
            s.q_starts = starts.data();
            s.n_tokens = tokens;
        }
        s.visible = c.visible;
        s.window = c.window;
        if (c.paged) {
            s.block_table = table.data();
            s.table_stride = 4 * blocks;
            s.block_slots = c.block_slots;
        } else {
            args.stream_slots = n_kv;
        }
        if (n_tail) add_tail();
        auto limits = sized<dq_limits>();
        limits.max_streams = n;
        limits.max_queries = n_q;
        limits.max_kv = n_kv;
        limits.max_total_queries = tokens;
        limits.max_tail = n_tail;
        uint64_t bytes = 0;
        ok(dq_workspace_size(codec.get(), 0, &limits, &bytes));
        workspace = std::make_unique<Fenced>(bytes);
    }

    // Two compressions: rows of several factor sets.
    void fill_store() {
        const auto slots = static_cast<uint32_t>(store->n_slots());
        for (uint32_t part : {0u, 1u}) {
            Batch batch(c.layer, slots, 11 + part);
            for (uint32_t i = 0; i < slots; i++) batch.slots[i] = i % 3 % 2 == part ? int64_t{i} : -1;
            const auto t = batch.tokens(*store);
            ok(dq_compress(codec.get(), 0, &t, nullptr, 0, nullptr));
        }
    }

    void add_tail() {
        tail_k = std::make_unique<Rows>(tails, c.layer.n_kv_heads, c.layer.head_dim_k, c.tail_type, 2);
        tail_v = std::make_unique<Rows>(tails, c.layer.n_kv_heads, c.layer.head_dim_v, c.tail_type);
        tail_k->fill(21);
        tail_v->fill(22, 0.5f);
        for (uint32_t s = 0; s < n; s++) {
            const auto behind = static_cast<uint32_t>(tail_starts[s] + tail_lengths[s]);
            for (uint32_t h = 0; h < c.layer.n_kv_heads; h++) {
                tail_k->fill_row(behind, h, NAN);
                tail_v->fill_row(behind, h, NAN);
            }
        }
        args.tail.k = tail_k->tensor();
        args.tail.v = tail_v->tensor();
        args.tail.starts = tail_starts.data();
        args.tail.lengths = tail_lengths.data();
        args.tail.n_rows = n_tail;
    }

    void attend() const {
        ok(dq_attend(codec.get(), 0, &args, workspace->data(), workspace->size(), nullptr));
        CHECK((out->memory().intact() && workspace->intact() && store->memory().intact()));
    }

    double error() const {
        const Decoded rows(codec.get(), 0, args.store, c.layer);
        const uint32_t group = c.layer.n_q_heads / c.layer.n_kv_heads;
        double worst = 0;
        for (uint32_t s = 0; s < n; s++) {
            const auto [queries, n_coded, in_tail] = c.sequences[s];
            for (uint32_t i = 0; i < queries; i++) {
                std::vector<Seen> seen;
                const int64_t position = int64_t{n_coded} + in_tail - queries + i;
                for (int64_t j = 0; j < int64_t{n_coded} + in_tail; j++) {
                    if (c.visible != DQ_VISIBLE_ALL && (j > position || (c.window && j <= position - c.window))) continue;
                    seen.push_back(key(rows, s, static_cast<uint32_t>(j)));
                }
                for (uint32_t h = 0; h < c.layer.n_q_heads; h++) {
                    worst = std::max(worst, attend_error(*q, *out, static_cast<uint32_t>(starts[s]) + i, h, group, seen));
                }
            }
        }
        return worst;
    }

    Seen key(const Decoded &rows, uint32_t s, uint32_t j) const {
        const uint32_t coded = c.sequences[s].n_kv;
        if (j >= coded) return {tail_k.get(), tail_v.get(), static_cast<uint32_t>(tail_starts[s]) + j - coded};
        if (!c.paged) return {&rows.k, &rows.v, s * n_kv + j};
        const auto block = static_cast<uint32_t>(table[s * blocks + j / c.block_slots]);
        return {&rows.k, &rows.v, block * c.block_slots + j % c.block_slots};
    }
};

void check(const Case &c) {
    INFO(c.sequences.size() << " sequences, blocks of " << c.block_slots << ", window " << c.window);
    const Run run(c);
    run.attend();
    CHECK(run.error() <= 1e-3);
}

const std::vector<Sequence> kMixed{{1, 200, 0}, {40, 130, 0}, {0, 9, 0}, {3, 2, 0}, {1, 0, 0}, {1, 17, 0}};
const std::vector<Sequence> kTails{{1, 200, 5}, {40, 100, 40}, {1, 0, 1}, {70, 0, 70}, {2, 30, 0}};

}  // namespace

TEST_CASE("blocks of any size, windows, every key") {
    for (uint32_t block_slots : {1u, 7u, 16u, 64u, 500u}) {
        for (uint32_t window : {0u, 1u, 30u, 10000u}) {
            Case c;
            c.sequences = kMixed;
            c.block_slots = block_slots;
            c.window = window;
            check(c);
        }
    }
    Case c;
    c.sequences = kMixed;
    c.visible = DQ_VISIBLE_ALL;
    check(c);
    c.visible = DQ_VISIBLE_CAUSAL;
    c.paged = false;
    check(c);
}

TEST_CASE("tails of every type") {
    for (uint32_t type : {uint32_t{DQ_F32}, uint32_t{DQ_F16}, uint32_t{DQ_BF16}}) {
        for (uint32_t window : {0u, 20u}) {
            Case c;
            c.sequences = kTails;
            c.tail_type = type;
            c.window = window;
            check(c);
        }
    }
}

TEST_CASE("a tail behind stretches of slots, with and without a mask") {
    Case c;
    c.sequences = {{4, 60, 6}, {4, 60, 6}};
    Run run(c);
    // The same call, even and with the causal mask written out.
    auto even = run.args;
    even.sequences = dq_sequences{};
    even.tail.starts = even.tail.lengths = nullptr;
    even.stream_slots = 60;
    const uint32_t columns = 66;
    std::vector<float> mask(2 * 4 * columns);
    for (uint32_t t = 0; t < 8; t++) {
        for (uint32_t j = 0; j < columns; j++) mask[t * columns + j] = j > columns - 4 + t % 4 ? -INFINITY : 0.0f;
    }
    even.mask.data = mask.data();
    even.mask.dtype = DQ_F32;
    even.mask.query_stride = 4 * columns;
    even.mask.stream_stride = 4 * 4 * columns;
    ok(dq_attend(run.codec.get(), 0, &even, run.workspace->data(), run.workspace->size(), nullptr));
    // Tails of the even form lie n_rows apart; those of the run are one row further.
    run.tail_starts = {0, 6};
    run.c.paged = false;
    CHECK(run.error() <= 1e-3);
}

TEST_CASE("hidden blocks may have any number, hidden rows any bytes") {
    Case c;
    c.sequences = {{2, 300, 0}, {1, 90, 0}};
    c.window = 40;
    Run run(c);
    run.attend();
    const Bytes want(run.out->memory().data(), run.out->memory().data() + run.out->memory().size());
    for (uint32_t s : {0u, 1u}) {
        const uint32_t first_seen = c.sequences[s].n_kv - c.sequences[s].n_q + 1 - c.window;
        for (uint32_t j = 0; j < first_seen; j++) {
            std::memset(run.store->record(static_cast<uint64_t>(run.table[s * run.blocks + j / 16]) * 16 + j % 16), 0xFF,
                        run.store->slot_bytes());
        }
        for (uint32_t b = 0; b < first_seen / 16; b++) run.table[s * run.blocks + b] = b % 2 ? INT32_MAX : -1;
    }
    run.attend();
    CHECK(std::memcmp(want.data(), run.out->memory().data(), want.size()) == 0);
}

TEST_CASE("sequences share blocks; a row of the table for all") {
    Case c;
    c.sequences = {{1, 100, 0}, {1, 64, 0}, {5, 100, 0}};
    Run run(c);
    for (uint32_t s : {1u, 2u}) std::copy_n(run.table.begin(), 4, run.table.begin() + s * run.blocks);
    run.attend();
    CHECK(run.error() <= 1e-3);
    for (uint32_t s : {1u, 2u}) std::copy_n(run.table.begin(), run.blocks, run.table.begin() + s * run.blocks);
    run.args.sequences.table_stride = 0;
    run.attend();
    CHECK(run.error() <= 1e-3);
}

TEST_CASE("tokens beyond the last query are not written") {
    Case c;
    c.sequences = {{2, 40, 0}, {1, 9, 0}};
    Run run(c);
    run.starts = {0, 1, 2};
    run.out->fill(3);
    const float before = run.out->get(2, 1, 5);
    run.attend();
    CHECK(run.out->get(2, 1, 5) == before);
}

TEST_CASE("any number of shards on threads gives the bytes of one call") {
    Case c;
    c.sequences = kTails;
    c.sequences.push_back({1, 3000, 2});
    const Run run(c);
    run.attend();
    const Bytes want(run.out->memory().data(), run.out->memory().data() + run.out->memory().size());
    for (uint32_t n : {2u, 3u, 8u, 100u}) {
        std::memset(run.out->memory().data(), 0x77, run.out->memory().size());
        std::atomic<int> failures{0};
        for (auto phase : {dq_attend_shard, dq_attend_merge_shard}) {
            std::vector<std::thread> threads;
            for (uint32_t i = 0; i < n; i++) {
                threads.emplace_back([&, i] {
                    if (phase(run.codec.get(), 0, &run.args, run.workspace->data(), run.workspace->size(), i, n)) failures++;
                });
            }
            for (auto &thread : threads) thread.join();
        }
        CHECK(failures == 0);
        CHECK(std::memcmp(want.data(), run.out->memory().data(), want.size()) == 0);
    }
}
