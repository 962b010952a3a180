// Bad arguments of sequences and tails.
#include "support.hpp"

using namespace test;

namespace {

struct Scene {
    static constexpr uint32_t kSlots = 64, kTokens = 6;
    std::vector<dq_layer_desc> layers{layer_desc()};
    Codec codec = make_codec(layers);
    Store store{codec.get(), 0, kSlots};
    Rows q{kTokens, 4, 64}, out{kTokens, 4, 64}, tail{8, 2, 64};
    // Three sequences: 1, 4 and 1 queries; blocks of 8.
    int32_t starts[4] = {0, 1, 5, 6}, lengths[3] = {20, 30, 0}, table[12] = {7, 6, 5, -1, 4, 3, 2, 1, -1, -1, -1, -1};
    int32_t tail_starts[3] = {0, 2, 6}, tail_lengths[3] = {2, 4, 2};
    Fenced workspace{1 << 20};
    Watch watch;
    dq_attend_args args = attend_args(store, q, out, 30);

    Scene() {
        const Batch batch(layers[0], kSlots);
        const auto tokens = batch.tokens(store);
        ok(dq_compress(codec.get(), 0, &tokens, nullptr, 0, nullptr));
        q.fill(4);
        tail.fill(9);
        args.n_streams = 3;
        args.n_q = 4;
        auto &s = args.sequences;
        s.q_starts = starts;
        s.kv_lengths = lengths;
        s.block_table = table;
        s.table_stride = 16;
        s.block_slots = 8;
        s.n_tokens = kTokens;
        args.tail.k = args.tail.v = tail.tensor();
        args.tail.starts = tail_starts;
        args.tail.lengths = tail_lengths;
        args.tail.n_rows = 4;
        watch.codec(codec.get()).memory(store.memory()).memory(q.memory()).memory(out.memory()).memory(workspace);
        watch.memory(tail.memory());
    }

    dq_status run(void *ws, uint64_t bytes) const { return dq_attend(codec.get(), 0, &args, ws, bytes, nullptr); }

    void refuses(std::initializer_list<std::string> words, dq_status status = DQ_ERROR_INVALID_ARGUMENT) const {
        watch.refuses(status, words, [&] { return run(workspace.data(), workspace.size()); });
        watch.refuses(status, words, [&] {
            return dq_attend_shard(codec.get(), 0, &args, workspace.data(), workspace.size(), 0, 2);
        });
        watch.refuses(status, words, [&] {
            return dq_attend_merge_shard(codec.get(), 0, &args, workspace.data(), workspace.size(), 0, 2);
        });
    }
};

// Sets a number for as long as it lives.
template <class T>
struct With {
    T &place, before;
    With(T &to, T value) : place(to), before(to) { place = value; }
    ~With() { place = before; }
    With(const With &) = delete;
    With &operator=(const With &) = delete;
};

}  // namespace

TEST_CASE("the scene itself is fine, and a byte less workspace is not") {
    Scene scene;
    auto limits = sized<dq_limits>();
    limits.max_streams = 3;
    limits.max_queries = 4;
    limits.max_kv = 30;
    limits.max_total_queries = 6;
    limits.max_tail = 4;
    uint64_t bytes = 0, more = 0;
    ok(dq_workspace_size(scene.codec.get(), 0, &limits, &bytes));
    scene.watch.refuses(DQ_ERROR_WORKSPACE, {"workspace_bytes is " + std::to_string(bytes - 1)},
                        [&] { return scene.run(scene.workspace.data(), bytes - 1); });
    limits.max_total_queries = 0;
    ok(dq_workspace_size(scene.codec.get(), 0, &limits, &more));
    CHECK(more > bytes);
    ok(scene.run(scene.workspace.data(), bytes));
    CHECK((scene.workspace.intact() && scene.out.memory().intact()));
}

TEST_CASE("starts and lengths") {
    Scene scene;
    {
        With w(scene.starts[0], 1);
        scene.refuses({"sequences.q_starts[0] is 1", "must be 0"});
    }
    {
        With w(scene.starts[2], 0);
        scene.refuses({"q_starts[2] is 0 after 1"});
    }
    {
        With w(scene.starts[1], -5);
        scene.refuses({"q_starts[1] is -5 after 0"});
    }
    {
        With w(scene.args.n_q, 3u);
        scene.refuses({"q_starts[2] is 5 after 1", "n_q, 3"});
    }
    {
        With w(scene.args.sequences.n_tokens, 5u);
        scene.refuses({"q_starts[3] is 6", "n_tokens, 5"});
    }
    for (int32_t bad : {-1, 31, INT32_MIN, INT32_MAX}) {
        With w(scene.lengths[1], bad);
        scene.refuses({"kv_lengths[1] is " + std::to_string(bad), "n_kv, 30"});
    }
    {
        With<const int32_t *> w(scene.args.sequences.kv_lengths, nullptr);
        scene.refuses({"sequences.q_starts is given", "sequences.kv_lengths"});
    }
    {
        With w(scene.args.sequences.q_starts, reinterpret_cast<const int32_t *>(reinterpret_cast<char *>(scene.starts) + 2));
        scene.refuses({"sequences.q_starts is 0x", "aligned to 4"});
    }
}

TEST_CASE("block tables") {
    Scene scene;
    for (int32_t bad : {-1, 8, INT32_MAX, INT32_MIN}) {
        With w(scene.table[2], bad);
        scene.refuses({"block_table[0][2] is " + std::to_string(bad), "0 to 7", "64 slots are 8 blocks of 8"});
    }
    {
        With w(scene.args.sequences.block_slots, 65u);
        With stride(scene.args.sequences.table_stride, uint64_t{16});
        scene.refuses({"block_table[0][0] is 7", "0 blocks of 65"});
    }
    {
        With w(scene.args.sequences.block_slots, 0u);
        scene.refuses({"block_slots is 0"});
    }
    {
        With w(scene.args.sequences.table_stride, uint64_t{6});
        scene.refuses({"table_stride is 6", "multiple of 4"});
    }
    {
        With w(scene.args.sequences.table_stride, uint64_t{12});
        scene.refuses({"table_stride is 3 entries", "sequence 1 has 4 blocks"});
    }
    {
        With w(scene.args.sequences.table_stride, UINT64_MAX / 4 * 4);
        scene.refuses({"sequences.block_table", "address space"});
    }
    {
        With w(scene.args.sequences.block_table,
               reinterpret_cast<const int32_t *>(reinterpret_cast<char *>(scene.table) + 1));
        scene.refuses({"sequences.block_table is 0x", "aligned to 4"});
    }
}

TEST_CASE("who sees what") {
    Scene scene;
    {
        With w(scene.args.sequences.visible, 3u);
        scene.refuses({"sequences.visible is 3", "DQ_VISIBLE_ALL (2)"});
    }
    {
        With w(scene.args.sequences.visible, uint32_t{DQ_VISIBLE_ALL});
        With v(scene.args.sequences.window, 5u);
        scene.refuses({"sequences.window is 5", "DQ_VISIBLE_ALL"});
    }
}

TEST_CASE("fields of the other form") {
    Scene scene;
    const dq_attend_args good = scene.args;
    float mask = 0;
    scene.args.mask.data = &mask;
    scene.refuses({"args->mask is given", "sequences.kv_lengths"});
    scene.args = good;
    scene.args.first_slot = 1;
    scene.refuses({"args->first_slot is given", "block_table"});
    scene.args = good;
    scene.args.stream_slots = 1;
    scene.refuses({"args->stream_slots is given", "block_table"});
    scene.args = good;
    scene.args.sequences.block_table = nullptr;
    scene.refuses({"sequences.table_stride is given", "block_table"});
    scene.args.sequences.table_stride = 0;
    scene.refuses({"sequences.block_slots is given", "block_table"});
    scene.args = good;
    scene.args.sequences.q_starts = nullptr;
    scene.refuses({"sequences.n_tokens is given", "q_starts"});
    scene.args.sequences = dq_sequences{};
    scene.refuses({"tail.starts is given", "kv_lengths"});
    for (uint32_t dq_sequences::*field : {&dq_sequences::visible, &dq_sequences::window}) {
        scene.args.sequences = dq_sequences{};
        scene.args.sequences.*field = 1;
        scene.refuses({"is given", "kv_lengths"});
    }
    scene.args.sequences = dq_sequences{};
    scene.args.sequences.block_table = scene.table;
    scene.refuses({"sequences.block_table is given", "kv_lengths"});
}

TEST_CASE("tails") {
    Scene scene;
    const dq_attend_args good = scene.args;
    for (int32_t bad : {-1, 5}) {
        With w(scene.tail_lengths[1], bad);
        scene.refuses({"tail.lengths[1] is " + std::to_string(bad), "tail.n_rows, 4"});
    }
    {
        With w(scene.tail_starts[2], -1);
        scene.refuses({"tail.starts[2] is -1"});
    }
    scene.args.tail.reserved = 1;
    scene.refuses({"tail.reserved is 1"});
    scene.args = good;
    scene.args.tail.n_rows = 0;
    scene.refuses({"tail.k.data is given", "n_rows is 0"});
    scene.args = good;
    scene.args.tail.k.data = nullptr;
    scene.refuses({"args->tail.k.data is null"});
    scene.args = good;
    scene.args.tail.v.dtype = 0;
    scene.refuses({"args->tail.v.dtype is 0"});
    scene.args = good;
    scene.args.tail.v.token_stride = 2;
    scene.refuses({"args->tail.v.token_stride is 2"});
}

TEST_CASE("what is written lies apart from the arrays and the tail") {
    Scene scene;
    const dq_attend_args good = scene.args;
    auto *out = static_cast<uint8_t *>(good.out.data);
    auto *numbers = reinterpret_cast<int32_t *>(out);
    // The numbers must be fine for the overlap to be what is refused: out is not written by refused calls.
    std::memset(out, 0, 64);
    Watch watch;
    watch.memory(scene.out.memory());
    const auto refuses = [&](std::initializer_list<std::string> words) {
        watch.refuses(DQ_ERROR_INVALID_ARGUMENT, words,
                      [&] { return scene.run(scene.workspace.data(), scene.workspace.size()); });
    };
    scene.args.sequences.kv_lengths = numbers;
    refuses({"args->out.data", "overlaps args->sequences.kv_lengths"});
    scene.args = good;
    scene.args.tail.lengths = numbers;
    refuses({"args->out.data", "overlaps args->tail.lengths"});
    scene.args = good;
    scene.args.tail.starts = numbers;
    refuses({"args->out.data", "overlaps args->tail.starts"});
    scene.args = good;
    scene.args.sequences.block_table = numbers;
    refuses({"args->out.data", "overlaps args->sequences.block_table"});
    scene.args = good;
    scene.args.tail.k = good.out;
    scene.args.tail.k.head_stride = 256;
    refuses({"args->out.data", "overlaps args->tail.k.data"});
    scene.args = good;
    scene.args.tail.v.data = scene.workspace.data();
    refuses({"workspace", "overlaps args->tail.v.data"});
}

TEST_CASE("no queries are fine") {
    Scene scene;
    for (auto &start : scene.starts) start = 0;
    scene.args.sequences.n_tokens = 0;
    ok(scene.run(nullptr, 0));
    scene.args.sequences.n_tokens = 6;
    ok(scene.run(scene.workspace.data(), scene.workspace.size()));
    scene.args.n_q = 0;
    ok(scene.run(nullptr, 0));
}
