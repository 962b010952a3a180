// Dense tails on a CUDA device, against the same call on the CPU. Exits with 77 where there is no device.
//   On the stand-in driver (stand_in/libcuda.cpp) the kernels run on the CPU.
#include <decoquant.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "cuda_checks.hpp"
#include "cuda_memory.hpp"

namespace {

void good(dq_status status, const std::string& what) { expect(status == DQ_OK, what + ": " + dq_status_name(status)); }

constexpr uint32_t SLOTS = 320;

struct Codec {
    dq_context* context;
    dq_codec* codec;
    uint64_t slot_bytes = 0;
    Codec(uint32_t backend, const Shape& s) : context(open(backend)), codec(make(context, s)) {
        auto layout = sized<dq_layout>();
        good(dq_codec_layout(codec, 0, 0, &layout), "layout");
        slot_bytes = layout.slot_bytes;
    }
    Codec(const Codec&) = delete;
    ~Codec() { dq_codec_destroy(codec), dq_context_destroy(context); }
};

std::vector<float> noise(size_t n, std::mt19937_64& rng, float spread = 1) {
    std::normal_distribution<float> normal;
    std::vector<float> v(n);
    for (auto& x : v) x = normal(rng) * spread;
    return v;
}

// Rows of `dtype`, two elements of nothing behind each.
struct Typed {
    uint32_t heads, d, dtype;
    std::vector<uint8_t> bytes;
    uint64_t size() const { return dtype == DQ_F32 ? 4 : 2; }
    uint64_t stride() const { return (heads * d + 2) * size(); }
    Typed(uint32_t rows, uint32_t n_heads, uint32_t dim, uint32_t type, std::mt19937_64& rng) : heads(n_heads), d(dim), dtype(type) {
        bytes.resize(rows * stride());
        const auto values = noise(size_t(rows) * heads * d, rng);
        for (size_t i = 0; i < values.size(); i++) put(i / (heads * d), uint32_t(i % (heads * d)), values[i]);
    }
    // To f16 by cutting: values are normal numbers in its range, or NaN.
    void put(size_t row, uint32_t at, float value) {
        uint32_t u;
        std::memcpy(&u, &value, 4);
        if (dtype == DQ_BF16) u >>= 16;
        if (dtype == DQ_F16) {
            const int exponent = int(u >> 23 & 0xFF) - 112;
            u = std::isnan(value) ? 0x7E00 : (u >> 16 & 0x8000) | (exponent < 1 ? 0 : uint32_t(exponent) << 10 | (u >> 13 & 0x3FF));
        }
        std::memcpy(&bytes[row * stride() + at * size()], &u, size());
    }
    void put_row(size_t row, float value) {
        for (uint32_t i = 0; i < heads * d; i++) put(row, i, value);
    }
    dq_tensor at(const void* data) const { return {const_cast<void*>(data), dtype, 0, stride(), d * size()}; }
};
dq_tensor tensor(const void* data, uint32_t heads, uint32_t d) { return {const_cast<void*>(data), DQ_F32, 0, heads * d * 4, d * 4}; }

struct Case {
    const char* name;
    uint32_t streams, n_q, n_kv, n_tail, dtype;
    int form;  // 0 stretches of slots, 1 with a mask, 2 sequences of one length, 3 uneven queries, coded keys and tails
    uint32_t window;
    bool all;  // every query sees every key
    bool sink;
    float softcap;
    bool nan;  // in a row of the tail that some see, and in one that nobody sees
};

class Scene {
  public:
    Scene(const Shape& shape, std::mt19937_64& random) : s(shape), rng(random), cpu(DQ_BACKEND_CPU, shape), gpu(DQ_BACKEND_CUDA, shape), store(SLOTS * cpu.slot_bytes) {
        cuda::need(cuda::driver().stream_create(&stream, 1), "stream");
        // The same rows into both codecs give the same sets; the records are the CPU's.
        std::vector<int64_t> slots(SLOTS);
        std::vector<int32_t> positions(SLOTS);
        for (uint32_t i = 0; i < SLOTS; i++) slots[i] = i, positions[i] = int32_t(i);
        const auto q = noise(SLOTS * s.n_q * s.d, rng), v = noise(SLOTS * s.n_kv * s.d, rng);
        auto k = noise(SLOTS * s.n_kv * s.d, rng);
        for (size_t i = 0; i < k.size(); i++) k[i] += 2 * std::sin(float(i % (s.n_kv * s.d)));
        cuda::Buffer<float> d_q(q), d_k(k), d_v(v);
        cuda::Buffer<int64_t> d_slots(slots);
        cuda::Buffer<int32_t> d_positions(positions);
        device_store = std::make_unique<cuda::Buffer<uint8_t>>(store);
        auto t = sized<dq_tokens>();
        t.n_tokens = SLOTS;
        t.q = tensor(q.data(), s.n_q, s.d), t.k = tensor(k.data(), s.n_kv, s.d), t.v = tensor(v.data(), s.n_kv, s.d);
        t.positions = positions.data(), t.slots = slots.data(), t.store = {store.data(), SLOTS, cpu.slot_bytes};
        good(dq_compress(cpu.codec, 0, &t, nullptr, 0, nullptr), "rows on the CPU");
        t.q = tensor(d_q.get(), s.n_q, s.d), t.k = tensor(d_k.get(), s.n_kv, s.d), t.v = tensor(d_v.get(), s.n_kv, s.d);
        t.positions = d_positions.get(), t.slots = d_slots.get(), t.store.data = device_store->get();
        good(dq_compress(gpu.codec, 0, &t, nullptr, 0, stream), "rows on the device");
        wait();
        device_store->put(store);
    }
    ~Scene() { cuda::driver().stream_destroy(stream); }

    void check(const Case& c);
    void check_refusals();

  private:
    void wait() { cuda::need(cuda::driver().stream_wait(stream), "wait"); }

    const Shape s;
    std::mt19937_64& rng;
    Codec cpu, gpu;
    std::vector<uint8_t> store;
    std::unique_ptr<cuda::Buffer<uint8_t>> device_store;
    cuda::Handle stream = nullptr;
};

void Scene::check(const Case& c) {
    const std::string name = std::string(c.name) + ", d " + std::to_string(s.d);
    const bool batch = c.form >= 2, uneven = c.form == 3;
    std::vector<int32_t> starts{0}, lengths, tail_starts, tail_lengths;
    uint32_t rows = 0;
    for (uint32_t i = 0; i < c.streams; i++) {
        // The second has no queries, the third no coded keys.
        const uint32_t queries = uneven && i > 0 ? i == 1 ? 0 : 1 + uint32_t(rng() % c.n_q) : c.n_q;
        const uint32_t n_tail = uneven && i > 0 ? uint32_t(rng() % (c.n_tail + 1)) : c.n_tail;
        starts.push_back(starts.back() + int32_t(queries));
        lengths.push_back(int32_t(!uneven || i == 0 ? c.n_kv : i == 2 ? 0 : rng() % (c.n_kv + 1)));
        tail_starts.push_back(int32_t(rows)), tail_lengths.push_back(int32_t(n_tail));
        rows += uneven ? n_tail + 1 : c.n_tail;
    }
    const uint32_t tokens = uint32_t(starts.back()), columns = c.n_kv + c.n_tail;
    const auto q = noise(size_t(tokens) * s.n_q * s.d, rng, 0.5f);
    auto sinks = noise(s.n_q, rng);
    if (c.nan) sinks[0] = 200; // beside which all else has no weight, but NaN
    auto mask = noise(size_t(tokens) * columns, rng);
    for (size_t i = 0; i < mask.size(); i++) {
        if (i % columns > columns - c.n_q + i / columns % c.n_q || rng() % 5 == 0) mask[i] = -INFINITY;
    }
    Typed k(rows, s.n_kv, s.d, c.dtype, rng), v(rows, s.n_kv, s.d, c.dtype, rng);
    for (uint32_t i = 0; uneven && i < c.streams; i++) k.put_row(size_t(tail_starts[i] + tail_lengths[i]), NAN), v.put_row(size_t(tail_starts[i] + tail_lengths[i]), NAN);
    if (c.nan) {
        // The last row of a causal tail is the last query's alone; under a mask row 2 is nobody's.
        k.put_row(c.n_tail - 1, NAN);
        k.put_row(2, NAN), v.put_row(2, NAN);
        for (uint32_t t = 0; t < tokens; t++) mask[size_t(t) * columns + c.n_kv + 2] = -INFINITY;
    }

    auto args = sized<dq_attend_args>();
    args.n_streams = c.streams, args.n_q = c.n_q, args.n_kv = c.n_kv, args.softcap = c.softcap;
    args.stream_slots = 7;
    args.tail.n_rows = c.n_tail;
    if (batch) args.sequences.window = c.window, args.sequences.visible = c.all ? DQ_VISIBLE_ALL : DQ_VISIBLE_CAUSAL;
    if (uneven) args.sequences.n_tokens = tokens;
    auto limits = sized<dq_limits>();
    limits.max_streams = c.streams, limits.max_queries = c.n_q, limits.max_kv = c.n_kv, limits.max_tail = c.n_tail;
    // Pointers of one of the two memories.
    auto fill = [&](void* records, uint64_t stride, const void* of_q, void* of_out, const float* of_mask, const float* of_sinks, const void* of_k, const void* of_v,
                    const int32_t* of_starts, const int32_t* of_lengths, const int32_t* of_tail_starts, const int32_t* of_tail_lengths) {
        args.store = {records, SLOTS, stride};
        args.q = tensor(of_q, s.n_q, s.d), args.out = tensor(of_out, s.n_q, s.d);
        args.tail.k = k.at(of_k), args.tail.v = v.at(of_v);
        if (c.form == 1) args.mask = {of_mask, DQ_F32, 0, columns * 4, uint64_t(columns) * c.n_q * 4};
        if (c.sink) args.sink_logits = of_sinks;
        if (batch) args.sequences.kv_lengths = of_lengths;
        if (uneven) args.sequences.q_starts = of_starts, args.tail.starts = of_tail_starts, args.tail.lengths = of_tail_lengths;
    };
    std::vector<float> want(q.size());
    uint64_t bytes = 0;
    good(dq_workspace_size(cpu.codec, 0, &limits, &bytes), name + ": size on the CPU");
    std::vector<uint8_t> room(bytes + 64);
    fill(store.data(), cpu.slot_bytes, q.data(), want.data(), mask.data(), sinks.data(), k.bytes.data(), v.bytes.data(), starts.data(), lengths.data(), tail_starts.data(), tail_lengths.data());
    good(dq_attend(cpu.codec, 0, &args, room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64), bytes, nullptr), name + ": on the CPU");

    cuda::Buffer<float> d_q(q), d_sinks(sinks), d_mask(mask), out(q.size());
    cuda::Buffer<int32_t> d_starts(starts), d_lengths(lengths), d_tail_starts(tail_starts), d_tail_lengths(tail_lengths);
    cuda::Buffer<uint8_t> d_k(k.bytes), d_v(v.bytes);
    good(dq_workspace_size(gpu.codec, 0, &limits, &bytes), name + ": size on the device");
    cuda::Buffer<uint8_t> workspace(bytes);
    fill(device_store->get(), gpu.slot_bytes, d_q.get(), out.get(), d_mask.get(), d_sinks.get(), d_k.get(), d_v.get(), d_starts.get(), d_lengths.get(), d_tail_starts.get(), d_tail_lengths.get());
    // In a graph: the numbers that the tail is cut by lie on the device.
    auto& driver = cuda::driver();
    cuda::Handle graph = nullptr, exec = nullptr;
    cuda::need(driver.begin_capture(stream, 0), "capture");
    good(dq_attend(gpu.codec, 0, &args, workspace.get(), bytes, stream), name + ": on the device");
    cuda::need(driver.end_capture(stream, &graph), "end of capture");
    cuda::need(driver.instantiate(&exec, graph, 0), "graph");
    auto replay = [&] {
        out.put(std::vector<float>(q.size(), -77.0f));
        cuda::need(driver.graph_launch(exec, stream), "replay");
        wait();
        return out.take();
    };
    auto error = [&](const std::vector<float>& got) {
        double worst = 0;
        for (size_t row = 0; row < want.size() / s.d; row++) {
            double largest = 1e-30;
            for (uint32_t i = 0; i < s.d; i++) largest = std::max(largest, std::fabs(double{want[row * s.d + i]}));
            for (uint32_t i = 0; i < s.d; i++) {
                const float w = want[row * s.d + i], g = got[row * s.d + i];
                if (std::isnan(w) && std::isnan(g)) continue;
                const double e = std::fabs(double{w} - double{g}) / largest;
                if (!std::isnan(worst) && !(e <= worst)) worst = e;
            }
        }
        return worst;
    };
    const std::vector<float> first = replay();
    double e = error(first);
    expect(e <= 5e-3, name + ": error " + std::to_string(e));
    if (c.nan) {
        size_t n = 0;
        for (float x : first) n += std::isnan(x);
        expect(n > 0 && n < first.size(), name + ": NaN reaches some outputs and not all");
    }
    if (uneven) {
        // Shorter tails in the same graph, none for the first sequence.
        for (auto& n : tail_lengths) n = int32_t(uint32_t(n) / 2);
        tail_lengths[0] = 0;
        d_tail_lengths.put(tail_lengths);
        uint64_t on_cpu = 0;
        good(dq_workspace_size(cpu.codec, 0, &limits, &on_cpu), name + ": size on the CPU");
        fill(store.data(), cpu.slot_bytes, q.data(), want.data(), mask.data(), sinks.data(), k.bytes.data(), v.bytes.data(), starts.data(), lengths.data(), tail_starts.data(), tail_lengths.data());
        good(dq_attend(cpu.codec, 0, &args, room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64), on_cpu, nullptr), name + ": on the CPU");
        e = error(replay());
        expect(e <= 5e-3, name + ", other lengths in the same graph: error " + std::to_string(e));
    }
}

// Bad tails are refused by name, and nothing is launched: the output stays as it was.
void Scene::check_refusals() {
    constexpr uint32_t N_Q = 2, N_KV = 40, N_TAIL = 8;
    const std::vector<float> untouched(N_Q * s.n_q * s.d, -77.0f);
    cuda::Buffer<float> q(noise(untouched.size(), rng)), out(untouched), k(noise(N_TAIL * s.n_kv * s.d, rng)), v(noise(N_TAIL * s.n_kv * s.d, rng));
    cuda::Buffer<int32_t> numbers({0, 0});
    auto limits = sized<dq_limits>();
    limits.max_streams = 1, limits.max_queries = N_Q, limits.max_kv = N_KV;
    uint64_t without = 0, bytes = 0;
    good(dq_workspace_size(gpu.codec, 0, &limits, &without), "size without a tail");
    limits.max_tail = N_TAIL;
    good(dq_workspace_size(gpu.codec, 0, &limits, &bytes), "size with a tail");
    expect(bytes > without, "a tail takes workspace");
    cuda::Buffer<uint8_t> workspace(bytes);

    auto args = sized<dq_attend_args>();
    args.n_streams = 1, args.n_q = N_Q, args.n_kv = N_KV;
    args.store = {device_store->get(), SLOTS, gpu.slot_bytes};
    args.q = tensor(q.get(), s.n_q, s.d), args.out = tensor(out.get(), s.n_q, s.d);
    args.tail.n_rows = N_TAIL;
    args.tail.k = tensor(k.get(), s.n_kv, s.d), args.tail.v = tensor(v.get(), s.n_kv, s.d);
    auto refuse = [&](const char* what, dq_status status, const char* says, uint64_t room, auto&& spoil) {
        dq_attend_args bad = args;
        spoil(bad);
        expect_status(dq_attend(gpu.codec, 0, &bad, workspace.get(), room, stream), status, what, says);
        wait();
        expect(out.take() == untouched, std::string(what) + ": the output is as it was");
    };
    const auto invalid = DQ_ERROR_INVALID_ARGUMENT;
    refuse("no keys in the tail", invalid, "args->tail.k.data is null", bytes, [](auto& a) { a.tail.k.data = nullptr; });
    refuse("no values in the tail", invalid, "args->tail.v.data is null", bytes, [](auto& a) { a.tail.v.data = nullptr; });
    refuse("type of the tail", invalid, "args->tail.k.dtype is 77", bytes, [](auto& a) { a.tail.k.dtype = 77; });
    refuse("stride of the tail", invalid, "args->tail.v.token_stride is 2", bytes, [](auto& a) { a.tail.v.token_stride = 2; });
    refuse("a tail without rows", invalid, "n_rows is 0", bytes, [](auto& a) { a.tail.n_rows = 0; });
    refuse("uneven tails of queries alike", invalid, "tail.starts is given", bytes, [&](auto& a) { a.tail.starts = numbers.get(); });
    refuse("output over the tail", invalid, "overlaps args->tail.v.data", bytes, [&](auto& a) { a.tail.v = a.out; });
    refuse("workspace over the tail", invalid, "overlaps args->tail.k.data", bytes, [&](auto& a) { a.tail.k.data = workspace.get(); });
    refuse("workspace without room for the tail", DQ_ERROR_WORKSPACE, "workspace has", without, [](auto&) {});
    expect_status(dq_attend(gpu.codec, 0, &args, workspace.get(), bytes, stream), DQ_OK, "the same call without a fault");
    wait();
    expect(out.take() != untouched, "it writes the output");
}

}  // namespace

int main() {
    if (!(dq_backends() >> DQ_BACKEND_CUDA & 1) || !cuda::driver().load()) {
        std::printf("no CUDA device, or a library without kernels\n");
        return 77;
    }
    cuda::Handle primary = nullptr;
    cuda::need(cuda::driver().retain(&primary, 0), "context");
    cuda::need(cuda::driver().set_current(primary), "context");
    std::mt19937_64 rng(5);
    const Case cases[] = {
        // name                st nq  kv tail  type     form win all    sink   cap  nan
        {"one query",           1, 1, 200, 20, DQ_F16,  0, 0, false, false, 0, false},
        {"masked",              2, 2, 130, 45, DQ_BF16, 1, 0, false, true, 0, true},
        {"soft-cap",            1, 1, 64, 33, DQ_F32,   1, 0, false, true, 10, false},
        {"causal",              3, 4, 90, 40, DQ_F16,   2, 0, false, false, 0, false},
        {"NaN",                 1, 3, 50, 20, DQ_F32,   2, 10, false, false, 0, true},
        {"window in the tail",  2, 3, 90, 70, DQ_BF16,  2, 25, false, true, 0, false},
        {"every key",           2, 5, 60, 9, DQ_F16,    2, 0, true, false, 0, false},
        {"drafts",              5, 4, 150, 66, DQ_F16,  3, 100, false, true, 0, false},
        {"chunk",               1, 37, 100, 37, DQ_F16, 2, 0, false, false, 0, false},
        {"chunks",              4, 21, 90, 40, DQ_F32,  3, 50, false, true, 0, false},
        {"no coded keys",       2, 2, 0, 40, DQ_BF16,   2, 0, false, false, 0, false},
        {"many parts",          1, 1, 40, 1500, DQ_F16, 0, 0, false, false, 0, false},
    };
    for (const Shape& s : {Shape{4, 2, 64, 104, 4}, Shape{9, 3, 64, 103, 3}, Shape{8, 2, 128, 104, 4}}) {
        Scene scene(s, rng);
        for (const Case& c : cases) scene.check(c);
        scene.check_refusals();
    }
    std::printf("cuda_tail: %d passed, %d failed\n", passed, failed);
    return failed != 0;
}
