// Times of the calls on a CUDA device, beside a device copy in the same run: 32 query heads over 8, head_dim 128.
// Every figure is the median over replays of a graph of calls whose records rotate, so that the L2 has none of them.
//   bench_cuda [brief|rows|step]    fewer sizes; statistics, fits and encode alone; decode steps of whole models alone
#include <decoquant.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>

#include "cuda_checks.hpp"
#include "cuda_memory.hpp"

namespace {

constexpr uint32_t N_Q = 32, N_KV = 8, D = 128;

struct Events {
    int (*create)(cuda::Handle*, unsigned);
    int (*record)(cuda::Handle, cuda::Handle);
    int (*wait)(cuda::Handle);
    int (*elapsed)(float*, cuda::Handle, cuda::Handle);
    int (*copy)(uint64_t, uint64_t, size_t, cuda::Handle);
    cuda::Handle begin, end, stream;
    Events() {
        auto& d = cuda::driver();
        d.get(create, "cuEventCreate"), d.get(record, "cuEventRecord"), d.get(wait, "cuEventSynchronize");
        d.get(elapsed, "cuEventElapsedTime"), d.get(copy, "cuMemcpyDtoDAsync_v2");
        create(&begin, 0), create(&end, 0);
        cuda::need(d.stream_create(&stream, 1), "stream");
    }
    // Microseconds of one of `calls` calls.
    double median(int calls, const std::function<void(int)>& call) {
        auto& d = cuda::driver();
        cuda::Handle graph, exec;
        call(0);
        cuda::need(d.stream_wait(stream), "first call");
        cuda::need(d.begin_capture(stream, 0), "capture");
        for (int i = 0; i < calls; i++) call(i);
        cuda::need(d.end_capture(stream, &graph), "end of capture");
        cuda::need(d.instantiate(&exec, graph, 0), "graph");
        std::vector<float> times;
        for (int r = 0; r < 12; r++) {
            record(begin, stream);
            cuda::need(d.graph_launch(exec, stream), "replay");
            record(end, stream);
            cuda::need(wait(end), "replayed");
            float ms = 0;
            elapsed(&ms, begin, end);
            if (r >= 2) times.push_back(ms);
        }
        std::sort(times.begin(), times.end());
        return times[times.size() / 2] * 1e3 / calls;
    }
};

void fine(dq_status status, const char* what) {
    if (status == DQ_OK) return;
    char text[512];
    dq_last_error(text, sizeof text);
    std::printf("%s: %s, %s\n", what, dq_status_name(status), text);
    std::exit(1);
}
dq_tensor tensor(void* data, uint32_t heads, uint32_t dtype) {
    const uint64_t size = dtype == DQ_F32 ? 4 : 2;
    return {data, dtype, 0, heads * D * size, D * size};
}

double copy_bandwidth(Events& e) {
    const size_t bytes = 4ull << 30;
    cuda::Buffer<uint8_t> a(bytes), b(bytes);
    const double us = e.median(2, [&](int) { e.copy(reinterpret_cast<uint64_t>(b.get()), reinterpret_cast<uint64_t>(a.get()), bytes, e.stream); });
    return 2.0 * bytes / us / 1e3;
}

// Prompts while fits are made apart: what the calls of the prompt take, and those that make the fits.
void bench_deferred(Events& e, const dq_context* context, const Shape& shape, const dq_tokens& t, cuda::Buffer<int64_t>& slots) {
    dq_codec* codec = make(context, shape, 1, DQ_CODEC_DEFER_FITS);
    auto wall = [](auto&& call) {
        const auto start = std::chrono::steady_clock::now();
        call();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() * 1e3;
    };
    std::printf("with fits deferred, compress / refit, ms:");
    for (uint32_t i = 0; i < 10; i++) {
        std::vector<int64_t> numbers(t.n_tokens);
        for (uint32_t j = 0; j < t.n_tokens; j++) numbers[j] = int64_t(i * t.n_tokens + j) % 4096;
        slots.put(numbers);
        const double compress = wall([&] {
            fine(dq_compress(codec, 0, &t, nullptr, 0, e.stream), "compress");
            cuda::driver().stream_wait(e.stream);
        });
        std::printf(" %.2f / %.2f", compress, wall([&] { fine(dq_refit(codec, 0, 1, e.stream), "refit"); }));
    }
    std::printf("\n");
    dq_codec_destroy(codec);
}

// A decode step as llama.cpp makes it: one token's rows in, then attention under a mask, all layers in a graph. First while
// there are still fits to come, which takes statistics of each token, then when all are made.
struct Model {
    const char* name;
    uint32_t layers, heads, kv_heads, dim;
    std::vector<uint32_t> keys;
};
void bench_step(Events& e, const Model& m, uint32_t k_plan, uint32_t v_plan) {
    constexpr uint32_t CHUNK = 512, LEARNING_KEYS = 1024;
    const uint32_t most_keys = m.keys.back();
    dq_context* context = open(DQ_BACKEND_CUDA);
    dq_codec* codec = make(context, {m.heads, m.kv_heads, m.dim, k_plan, v_plan}, m.layers);
    auto layout = sized<dq_layout>();
    fine(dq_codec_layout(codec, 0, 0, &layout), "layout");
    const size_t of_layer = size_t(most_keys) * layout.slot_bytes;
    cuda::Buffer<uint8_t> store(m.layers * of_layer);

    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    auto rows = [&](uint32_t heads) {
        std::vector<float> v(size_t(CHUNK) * heads * m.dim);
        for (size_t i = 0; i < v.size(); i++) {
            const float c = float(i % m.dim);
            v[i] = std::sin(c) + normal(rng) * (4.0f * std::exp(-6.4f * c / float(m.dim)) + 0.2f);
        }
        return v;
    };
    cuda::Buffer<float> q(rows(m.heads)), k(rows(m.kv_heads)), v(rows(m.kv_heads)), out(m.heads * m.dim);
    cuda::Buffer<int64_t> slots(CHUNK);
    cuda::Buffer<int32_t> positions(CHUNK);
    cuda::Buffer<uint16_t> mask(std::vector<uint16_t>(most_keys, 0));
    auto t = sized<dq_tokens>();
    auto of = [&](void* data, uint32_t heads) { return dq_tensor{data, DQ_F32, 0, heads * m.dim * 4, m.dim * 4}; };
    t.slots = slots.get(), t.positions = positions.get();
    auto put = [&](uint32_t n, uint32_t first) {
        // Not the first row of all for the token of a step: it is a sink, where there is no feedback.
        const size_t row = CHUNK - n;
        t.q = of(q.get() + row * m.heads * m.dim, m.heads);
        t.k = of(k.get() + row * m.kv_heads * m.dim, m.kv_heads), t.v = of(v.get() + row * m.kv_heads * m.dim, m.kv_heads);
        std::vector<int64_t> numbers(CHUNK);
        std::vector<int32_t> at(CHUNK);
        for (uint32_t i = 0; i < CHUNK; i++) numbers[i] = at[i] = int32_t(first + i);
        t.n_tokens = n;
        slots.put(numbers), positions.put(at);
    };
    auto compress = [&](uint32_t i) {
        t.store = {store.get() + i * of_layer, most_keys, layout.slot_bytes};
        fine(dq_compress(codec, i, &t, nullptr, 0, e.stream), "compress");
    };
    auto limits = sized<dq_limits>();
    limits.max_streams = limits.max_queries = 1, limits.max_kv = most_keys;
    uint64_t bytes = 0;
    fine(dq_workspace_size(codec, 0, &limits, &bytes), "workspace size");
    cuda::Buffer<uint8_t> workspace(bytes);
    std::printf("\ndecode step of %s (plans %u, %u), %u query heads over %u, head_dim %u, us a layer of %u\n%18s | %9s %9s %9s\n", m.name, k_plan, v_plan, m.heads,
                m.kv_heads, m.dim, m.layers, "keys", "rows in", "attend", "both");
    auto measure = [&](uint32_t keys, const char* state) {
        put(1, keys - 1);
        auto attend = [&](uint32_t i) {
            auto args = sized<dq_attend_args>();
            args.n_q = 1, args.n_kv = keys, args.store = {store.get() + i * of_layer, most_keys, layout.slot_bytes};
            args.q = of(q.get(), m.heads), args.out = of(out.get(), m.heads);
            args.mask = {mask.get(), DQ_F16, 0, keys * 2, keys * 2};
            fine(dq_attend(codec, i, &args, workspace.get(), bytes, e.stream), "attend");
        };
        const double in = e.median(int(m.layers), [&](int i) { compress(uint32_t(i)); });
        const double over = e.median(int(m.layers), [&](int i) { attend(uint32_t(i)); });
        const double both = e.median(int(m.layers), [&](int i) { compress(uint32_t(i)), attend(uint32_t(i)); });
        std::printf("%8u%10s | %9.1f %9.1f %9.1f\n", keys, state, in, over, both);
        std::fflush(stdout);
    };
    for (uint32_t first = 0; first < most_keys; first += CHUNK) {
        put(CHUNK, first);
        for (uint32_t i = 0; i < m.layers; i++) compress(i);
        cuda::need(cuda::driver().stream_wait(e.stream), "prompt");
        if (first + CHUNK == LEARNING_KEYS) measure(LEARNING_KEYS, ", learning");
    }
    for (uint32_t keys : m.keys) measure(keys, "");
    dq_codec_destroy(codec);
    dq_context_destroy(context);
}

enum class Part { All, Brief, Rows };

void bench(Events& e, const char* name, uint32_t k_plan, uint32_t v_plan, double copy, Part part) {
    const bool brief = part != Part::All;
    const Shape shape{N_Q, N_KV, D, k_plan, v_plan};
    dq_context* context = open(DQ_BACKEND_CUDA);
    dq_codec* codec = make(context, shape);
    auto layout = sized<dq_layout>();
    fine(dq_codec_layout(codec, 0, 0, &layout), "layout");

    // Records of 4,096 tokens after the last fit, over and over.
    const uint32_t chunk = 512;
    const size_t slots = part == Part::Rows ? 4096 : brief ? 64ull * 16384 : 64ull * 131072;
    cuda::Buffer<uint8_t> store(slots * layout.slot_bytes);
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    auto bf16 = [&](uint32_t heads, auto&& value) {
        std::vector<uint16_t> rows(size_t(chunk) * heads * D);
        for (size_t i = 0; i < rows.size(); i++) {
            const float v = value(i % D);
            uint32_t u;
            std::memcpy(&u, &v, 4);
            rows[i] = uint16_t(u >> 16);
        }
        return rows;
    };
    // Keys about a mean, their energy in few channels, as a model's are; so that rows are in the newest set.
    auto spectrum = [](size_t c) { return 8.0f * std::exp(-0.05f * float(c)) + 0.2f; };
    cuda::Buffer<uint16_t> queries(bf16(N_Q, [&](size_t c) { return normal(rng) / spectrum(c); }));
    cuda::Buffer<uint16_t> keys_in(bf16(N_KV, [&](size_t c) { return 5.0f * std::sin(float(c)) + normal(rng) * spectrum(c); }));
    cuda::Buffer<uint16_t> values(bf16(N_KV, [&](size_t c) { return 0.5f * std::cos(float(c)) + normal(rng); }));
    cuda::Buffer<int64_t> d_slots(chunk);
    auto t = sized<dq_tokens>();
    t.n_tokens = chunk, t.store = {store.get(), slots, layout.slot_bytes}, t.slots = d_slots.get();
    t.q = tensor(queries.get(), N_Q, DQ_BF16), t.k = tensor(keys_in.get(), N_KV, DQ_BF16), t.v = tensor(values.get(), N_KV, DQ_BF16);
    std::printf("\n%s: %llu bytes a slot and layer\ncompress of 512 tokens, wall time with fits, ms:", name, static_cast<unsigned long long>(layout.slot_bytes));
    double observe = 0;
    for (uint32_t i = 0; i < 17; i++) {
        std::vector<int64_t> numbers(chunk);
        for (uint32_t j = 0; j < chunk; j++) numbers[j] = int64_t(i * chunk + j) % 4096;
        d_slots.put(numbers);
        const auto start = std::chrono::steady_clock::now();
        fine(dq_compress(codec, 0, &t, nullptr, 0, e.stream), "compress");
        cuda::driver().stream_wait(e.stream);
        const double ms = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() * 1e3;
        if (i == 4) observe = ms;
        if (i < 10) std::printf(" %.2f", ms);
    }
    std::printf("\n  of these %.2f without a fit and with statistics\n", observe);
    // Runs of 32 records, as a warp takes them, that are all in one set per head and side.
    {
        std::vector<uint8_t> records(4096 * layout.slot_bytes);
        cuda::need(cuda::driver().to_host(records.data(), reinterpret_cast<uint64_t>(store.get()), records.size()), "records");
        size_t whole = 0;
        for (size_t run = 0; run < 128; run++) {
            for (uint32_t h = 0; h < 2 * N_KV; h++) {
                bool same = true;
                for (size_t i = 0; i < 32; i++) {
                    const uint8_t* at = &records[(run * 32 + i) * layout.slot_bytes + layout.k_headers_offset + 2 * h];
                    same &= (at[0] & 15) == (records[run * 32 * layout.slot_bytes + layout.k_headers_offset + 2 * h] & 15);
                }
                whole += same;
            }
        }
        std::printf("  runs of 32 records in one set: %.1f%%\n", 100.0 * double(whole) / (128 * 2 * N_KV));
    }
    bench_deferred(e, context, shape, t, d_slots);
    for (size_t have = 4096; have < slots; have *= 2) {
        const size_t n = std::min(have, slots - have) * layout.slot_bytes;
        e.copy(reinterpret_cast<uint64_t>(store.get()) + have * layout.slot_bytes, reinterpret_cast<uint64_t>(store.get()), n, e.stream);
    }
    for (uint32_t n : {1u, 64u, 512u}) {
        t.n_tokens = n;
        const double us = e.median(20, [&](int) { fine(dq_append(codec, 0, &t, nullptr, 0, e.stream), "append"); });
        std::printf("append of %u tokens, statistics done: %.1f us a layer\n", n, us);
    }
    if (part == Part::Rows) {
        dq_codec_destroy(codec);
        dq_context_destroy(context);
        return;
    }

    auto limits = sized<dq_limits>();
    limits.max_streams = 64, limits.max_queries = 1, limits.max_kv = 131072;
    uint64_t bytes = 0;
    fine(dq_workspace_size(codec, 0, &limits, &bytes), "workspace size");
    cuda::Buffer<uint8_t> workspace(bytes);
    std::printf("workspace %.1f MB\n%6s %7s | %9s %9s %7s\n", bytes / 1e6, "batch", "keys", "us", "GB/s", "share");
    for (uint32_t streams : {1u, 8u, 64u}) {
        for (uint32_t keys : {4096u, 8192u, 16384u, 65536u, 131072u}) {
            if (size_t(streams) * keys > slots || (brief && keys != 4096 && keys != 16384)) continue;
            cuda::Buffer<uint16_t> q(std::vector<uint16_t>(streams * N_Q * D, 0x2C00)), out(streams * N_Q * D);
            auto args = sized<dq_attend_args>();
            args.n_streams = streams, args.n_q = 1, args.n_kv = keys, args.stream_slots = keys;
            args.q = tensor(q.get(), N_Q, DQ_F16), args.out = tensor(out.get(), N_Q, DQ_F16);
            const size_t per_call = size_t(streams) * keys, copies = std::max<size_t>(1, std::min<size_t>(slots / per_call, 64));
            const double us = e.median(per_call * layout.slot_bytes > (1ull << 30) ? 4 : 20, [&](int i) {
                args.first_slot = 0;
                args.store = {store.get() + size_t(i) % copies * per_call * layout.slot_bytes, per_call, layout.slot_bytes};
                fine(dq_attend(codec, 0, &args, workspace.get(), bytes, e.stream), "attend");
            });
            const double rate = double(per_call) * double(layout.slot_bytes) / us / 1e3;
            std::printf("%6u %7u | %9.1f %9.0f %6.0f%%\n", streams, keys, us, rate, 100 * rate / copy);
            std::fflush(stdout);
        }
    }
    // Drafts that are verified, and prompts.
    const std::pair<uint32_t, uint32_t> many[] = {{4, 16384}, {4, 131072}, {16, 16384}, {512, 4096}, {2048, 16384}};
    for (const auto& [n, keys] : many) {
        limits.max_streams = 1, limits.max_queries = n, limits.max_kv = keys;
        fine(dq_workspace_size(codec, 0, &limits, &bytes), "workspace size");
        cuda::Buffer<uint8_t> scratch(bytes);
        cuda::Buffer<uint16_t> q(std::vector<uint16_t>(n * N_Q * D, 0x2C00)), out(n * N_Q * D);
        cuda::Buffer<int32_t> lengths(std::vector<int32_t>{int32_t(keys)});
        auto args = sized<dq_attend_args>();
        args.n_q = n, args.n_kv = keys, args.sequences.kv_lengths = lengths.get(), args.store = t.store;
        args.q = tensor(q.get(), N_Q, DQ_F16), args.out = tensor(out.get(), N_Q, DQ_F16);
        const double us = e.median(5, [&](int) { fine(dq_attend(codec, 0, &args, scratch.get(), bytes, e.stream), "attend"); });
        const double flops = 4.0 * D * N_Q * (double(n) * keys - double(n) * (n - 1) / 2);
        std::printf("%u queries over %u keys: %.0f us, %.0f TFLOP/s, workspace %.0f MB\n", n, keys, us, flops / us / 1e6, bytes / 1e6);
    }
    dq_codec_destroy(codec);
    dq_context_destroy(context);
}

}  // namespace

int main(int argc, char** argv) {
    if (!cuda::driver().load() || !(dq_backends() >> DQ_BACKEND_CUDA & 1)) {
        std::printf("no CUDA device, or a library without kernels\n");
        return 77;
    }
    cuda::Handle primary = nullptr;
    cuda::need(cuda::driver().retain(&primary, 0), "context");
    cuda::need(cuda::driver().set_current(primary), "context");
    Events events;
    const double copy = copy_bandwidth(events);
    std::printf("device copy, bytes read and written: %.0f GB/s\n", copy);
    const std::string wish = argc > 1 ? argv[1] : "";
    if (wish == "step" || wish.empty()) {
        const Model smollm2{"SmolLM2-135M", 30, 9, 3, 64, {4096, 16384}}, gemma3{"Gemma 3 270M", 18, 4, 1, 256, {1024, 4096, 16384}};
        for (const Model& m : {smollm2, gemma3}) {
            bench_step(events, m, 104, 4);
            bench_step(events, m, 103, 3);
        }
        bench_step(events, {"a model with 16 query heads to a KV head", 4, 64, 4, 128, {16384, 65536}}, 104, 4);
    }
    if (wish == "step") return 0;
    const Part part = wish == "rows" ? Part::Rows : wish == "brief" ? Part::Brief : Part::All;
    bench(events, "dq4 (plans 104, 4)", 104, 4, copy, part);
    bench(events, "dq3 (plans 103, 3)", 103, 3, copy, part);
    if (part == Part::All) bench(events, "uniform 4", 4, 4, copy, Part::Brief);
    return 0;
}
