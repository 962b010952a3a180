// The calls on a CUDA device, beside the same calls on the CPU. Exits with 77 where there is no device.
//   On the stand-in driver (stand_in/libcuda.cpp) the kernels run on the CPU; the error paths are tested there.
#include <decoquant.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "cuda_checks.hpp"
#include "cuda_memory.hpp"

namespace {

// Share of record bytes that may differ from the CPU's: none on the stand-in driver, whose arithmetic is the CPU's.
double record_limit = 1e-4;
void expect_at_most(double value, double limit, const std::string& what) {
    expect(value <= limit, what + ": " + std::to_string(value) + ", limit " + std::to_string(limit));
}

// Rows with a mean, a steep spectrum, and a wild row at position 0.
struct Rows {
    std::vector<float> q, k, v;
    std::vector<int32_t> positions;
};
Rows rows(const Shape& s, uint32_t n, uint32_t first_position, std::mt19937_64& rng) {
    std::normal_distribution<float> normal;
    Rows r;
    for (uint32_t t = 0; t < n; t++) {
        const bool sink = first_position + t == 0;
        r.positions.push_back(int32_t(first_position + t));
        for (uint32_t i = 0; i < s.n_q * s.d; i++) r.q.push_back(normal(rng) * (i % s.d < 8 ? 3.0f : 1.0f));
        for (uint32_t i = 0; i < s.n_kv * s.d; i++) {
            const uint32_t c = i % s.d;
            r.k.push_back((sink ? 30.0f * float(c % 3) : 4.0f * std::sin(float(i))) + normal(rng) * (c % 16 == 3 ? 8.0f : 0.7f));
            r.v.push_back((sink ? 0.01f : 0.5f * std::cos(float(i))) + normal(rng));
        }
    }
    return r;
}

dq_tensor tensor(const void* data, uint32_t heads, uint32_t d, uint32_t dtype = DQ_F32) {
    const uint64_t size = dtype == DQ_F32 ? 4 : 2;
    return {const_cast<void*>(data), dtype, 0, heads * d * size, d * size};
}

// One codec on a backend with a store, and copies of arguments where the backend wants them.
class Side {
  public:
    dq_context* context;
    dq_codec* codec;
    Shape shape;
    uint64_t slot_bytes = 0, n_slots;
    std::vector<uint8_t> host_store;
    std::unique_ptr<cuda::Buffer<uint8_t>> device_store;
    cuda::Handle stream = nullptr;
    bool on_device;

    Side(uint32_t backend, const Shape& s, uint64_t slots, uint32_t flags = 0, uint32_t max_fits = 0) : shape(s), n_slots(slots), on_device(backend == DQ_BACKEND_CUDA) {
        context = open(backend);
        codec = make(context, s, 1, flags, max_fits);
        auto layout = sized<dq_layout>();
        expect_status(dq_codec_layout(codec, 0, 0, &layout), DQ_OK, "layout");
        slot_bytes = layout.slot_bytes;
        host_store.assign(slots * slot_bytes, 0xEE);
        if (on_device) device_store = std::make_unique<cuda::Buffer<uint8_t>>(host_store);
    }
    ~Side() {
        dq_codec_destroy(codec);
        dq_context_destroy(context);
    }
    dq_store store() { return {on_device ? device_store->get() : host_store.data(), n_slots, slot_bytes}; }
    std::vector<uint8_t> records() { return on_device ? device_store->take() : host_store; }

    // append or compress; the number of replaced rows.
    uint32_t take(const Rows& r, uint32_t first_slot, bool append, bool with_q = true) {
        const uint32_t n = uint32_t(r.positions.size());
        std::vector<int64_t> slots(n);
        for (uint32_t i = 0; i < n; i++) slots[i] = int64_t(first_slot + i);
        auto t = sized<dq_tokens>();
        t.n_tokens = n, t.store = store();
        if (!on_device) {
            if (with_q) t.q = tensor(r.q.data(), shape.n_q, shape.d);
            t.k = tensor(r.k.data(), shape.n_kv, shape.d), t.v = tensor(r.v.data(), shape.n_kv, shape.d);
            t.positions = r.positions.data(), t.slots = slots.data();
            dq_status status = (append ? dq_append : dq_compress)(codec, 0, &t, nullptr, 0, nullptr);
            expect(status == DQ_OK || status == DQ_ROWS_REPLACED, "tokens on the CPU");
            return status == DQ_ROWS_REPLACED;
        }
        cuda::Buffer<float> q(r.q), k(r.k), v(r.v);
        cuda::Buffer<int32_t> positions(r.positions);
        cuda::Buffer<int64_t> d_slots(slots);
        cuda::Buffer<uint32_t> replaced(std::vector<uint32_t>{0});
        if (with_q) t.q = tensor(q.get(), shape.n_q, shape.d);
        t.k = tensor(k.get(), shape.n_kv, shape.d), t.v = tensor(v.get(), shape.n_kv, shape.d);
        t.positions = positions.get(), t.slots = d_slots.get(), t.replaced_rows = replaced.get();
        expect_status((append ? dq_append : dq_compress)(codec, 0, &t, nullptr, 0, stream), DQ_OK, "tokens on the device");
        cuda::need(cuda::driver().stream_wait(stream), "wait");
        return replaced.take()[0];
    }
};

double differing(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
    double n = 0;
    for (size_t i = 0; i < a.size(); i++) n += a[i] != b[i];
    return n / double(a.size());
}

// Attention in f64 over rows decoded by the CPU codec.
struct Decoded { std::vector<float> k, v; };
Decoded decode(Side& cpu, const std::vector<uint8_t>& records) {
    const Shape& s = cpu.shape;
    std::vector<int64_t> slots(cpu.n_slots);
    for (size_t i = 0; i < slots.size(); i++) slots[i] = int64_t(i);
    Decoded d{std::vector<float>(slots.size() * s.n_kv * s.d), std::vector<float>(slots.size() * s.n_kv * s.d)};
    dq_store store{const_cast<uint8_t*>(records.data()), cpu.n_slots, cpu.slot_bytes};
    auto k = tensor(d.k.data(), s.n_kv, s.d), v = tensor(d.v.data(), s.n_kv, s.d);
    expect_status(dq_dequantize(cpu.codec, 0, &store, slots.data(), uint32_t(slots.size()), &k, &v, nullptr), DQ_OK, "decode");
    return d;
}
struct Query {
    const float* q;
    uint32_t head;
    std::vector<int64_t> slots;     // of the keys it sees
    std::vector<float> mask;        // of these
    double scale, softcap, sink;    // sink: -infinity for none
};
// Largest error in units of the largest sum p |v| of the row.
double error_of(const Decoded& d, const Shape& s, const Query& query, const float* out) {
    const uint32_t kv = query.head / (s.n_q / s.n_kv);
    std::vector<double> score;
    double m = query.sink;
    for (size_t i = 0; i < query.slots.size(); i++) {
        double dot = 0;
        for (uint32_t c = 0; c < s.d; c++) dot += double(query.q[c]) * d.k[(size_t(query.slots[i]) * s.n_kv + kv) * s.d + c];
        dot *= query.scale;
        if (query.softcap > 0) dot = query.softcap * std::tanh(dot / query.softcap);
        score.push_back(dot + query.mask[i]);
        m = std::max(m, score.back());
    }
    std::vector<double> want(s.d, 0.0), size(s.d, 0.0);
    double total = m == -INFINITY ? 1 : std::exp(query.sink - m);
    for (size_t i = 0; i < score.size() && m > -INFINITY; i++) {
        const double p = std::exp(score[i] - m);
        total += p;
        for (uint32_t c = 0; c < s.d; c++) {
            const double x = d.v[(size_t(query.slots[i]) * s.n_kv + kv) * s.d + c];
            want[c] += p * x, size[c] += p * std::fabs(x);
        }
    }
    double worst = 0, largest = 1e-30;
    for (uint32_t c = 0; c < s.d; c++) largest = std::max(largest, size[c] / total);
    for (uint32_t c = 0; c < s.d; c++) {
        const double e = std::fabs(out[c] - want[c] / total) / largest;
        if (!std::isnan(worst) && !(e <= worst)) worst = e;
    }
    return worst;
}

constexpr uint32_t WINDOW = 50;

struct Attention {
    const char* name;
    uint32_t n_q, n_kv, streams;
    int mask;  // 0 none, 1 f32 causal with holes, 2 f16
    bool sink;
    float softcap;
    int sequences;  // 0 none, 1 n_q queries in each, 2 uneven
};

void attend_case(Side& gpu, const Decoded& d, const Attention& a, std::mt19937_64& rng) {
    const Shape& s = gpu.shape;
    std::normal_distribution<float> normal;
    const uint32_t table_stride = (a.n_kv + 7) / 8;
    // Uneven: the first sequence has n_q queries, the second none.
    std::vector<int32_t> starts{0}, lengths;
    for (uint32_t i = 0; i < a.streams; i++) {
        starts.push_back(starts.back() + int32_t(a.sequences < 2 || i == 0 ? a.n_q : i == 1 ? 0 : 1 + rng() % a.n_q));
        lengths.push_back(int32_t(i == 0 ? a.n_kv : a.n_q + rng() % (a.n_kv - a.n_q + 1)));
    }
    const uint32_t tokens = uint32_t(starts.back());
    std::vector<float> q(size_t(tokens) * s.n_q * s.d), sinks(s.n_q), mask(size_t(tokens) * a.n_kv);
    for (auto& x : q) x = normal(rng) * 0.3f;
    for (auto& x : sinks) x = normal(rng);
    for (size_t i = 0; i < mask.size(); i++) {
        const uint32_t t = uint32_t(i / a.n_kv) % a.n_q, key = uint32_t(i % a.n_kv);
        mask[i] = key + a.n_q > a.n_kv + t || rng() % 5 == 0 ? -INFINITY : -0.25f * float(rng() % 8);
    }
    std::vector<uint16_t> half(mask.size());
    for (size_t i = 0; i < mask.size(); i++) {
        // Multiples of a quarter down to -1.75, or minus infinity, are exact in f16.
        uint32_t u;
        std::memcpy(&u, &mask[i], 4);
        half[i] = mask[i] == 0 ? uint16_t(u >> 16 & 0x8000) : std::isinf(mask[i]) ? 0xFC00 : uint16_t((u >> 16 & 0x8000) | ((u >> 23 & 0xFF) - 112) << 10 | (u >> 13 & 0x3FF));
    }
    // Blocks that hold records; those that the window has left behind, or that no length reaches, are given back.
    std::vector<int32_t> table(a.streams * table_stride);
    for (uint32_t i = 0; i < table.size(); i++) {
        const uint32_t stream = i / table_stride, key = i % table_stride * 8;
        const int first_seen = lengths[stream] - (starts[stream + 1] - starts[stream]) + 1 - int(WINDOW);
        table[i] = int(key) + 8 <= first_seen || int(key) >= lengths[stream] ? -1 : int32_t(rng() % 75);
    }

    cuda::Buffer<float> d_q(q), d_sinks(sinks), d_mask(mask), out(size_t(tokens) * s.n_q * s.d);
    cuda::Buffer<uint16_t> d_half(half);
    cuda::Buffer<int32_t> d_table(table), d_lengths(lengths), d_starts(starts);
    auto args = sized<dq_attend_args>();
    args.n_streams = a.streams, args.n_q = a.n_q, args.n_kv = a.n_kv;
    args.store = gpu.store();
    args.q = tensor(d_q.get(), s.n_q, s.d), args.out = tensor(out.get(), s.n_q, s.d);
    if (a.mask == 1) args.mask = {d_mask.get(), DQ_F32, 0, a.n_kv * 4, uint64_t(a.n_kv) * a.n_q * 4};
    if (a.mask == 2) args.mask = {d_half.get(), DQ_F16, 0, a.n_kv * 2, uint64_t(a.n_kv) * a.n_q * 2};
    if (a.sink) args.sink_logits = d_sinks.get();
    args.softcap = a.softcap;
    if (!a.sequences) {
        args.stream_slots = 3, args.first_slot = 1;
    } else {
        auto& q_s = args.sequences;
        q_s.kv_lengths = d_lengths.get(), q_s.block_table = d_table.get(), q_s.table_stride = 4 * table_stride, q_s.block_slots = 8;
        q_s.window = WINDOW;
        if (a.sequences == 2) q_s.q_starts = d_starts.get(), q_s.n_tokens = tokens;
    }
    auto limits = sized<dq_limits>();
    limits.max_streams = a.streams, limits.max_queries = a.n_q, limits.max_kv = a.n_kv;
    uint64_t bytes = 0;
    expect_status(dq_workspace_size(gpu.codec, 0, &limits, &bytes), DQ_OK, "workspace size");
    cuda::Buffer<uint8_t> workspace(bytes);
    expect_status(dq_attend(gpu.codec, 0, &args, workspace.get(), bytes, gpu.stream), DQ_OK, std::string("attend, ") + a.name);
    cuda::need(cuda::driver().stream_wait(gpu.stream), "attend");
    const auto got = out.take();

    double worst = 0;
    for (uint32_t t = 0; t < tokens; t++) {
        const uint32_t stream = uint32_t(std::upper_bound(starts.begin(), starts.end(), int32_t(t)) - starts.begin()) - 1;
        const uint32_t n = a.sequences ? uint32_t(lengths[stream]) : a.n_kv;
        for (uint32_t h = 0; h < s.n_q; h++) {
            Query query{&q[(size_t(t) * s.n_q + h) * s.d], h, {}, {}, 1 / std::sqrt(double(s.d)), a.softcap, a.sink ? sinks[h] : -INFINITY};
            for (uint32_t key = 0; key < n; key++) {
                const int position = int(n) - starts[stream + 1] + int(t);
                if (a.sequences && (int(key) > position || int(key) + int(WINDOW) <= position)) continue;
                const float m = a.mask ? mask[size_t(t) * a.n_kv + key] : 0;
                if (m == -INFINITY) continue;
                query.slots.push_back(a.sequences ? table[stream * table_stride + key / 8] * 8 + key % 8 : 1 + 3 * stream + key);
                query.mask.push_back(m);
            }
            const double e = error_of(d, s, query, &got[(size_t(t) * s.n_q + h) * s.d]);
            if (!std::isnan(worst) && !(e <= worst)) worst = e;
        }
    }
    expect_at_most(worst, 2e-3, std::string("attend, ") + a.name + ", d " + std::to_string(s.d) + " plans " + std::to_string(s.k_plan) + "/" + std::to_string(s.v_plan));

    args.n_kv = a.n_kv;
    expect_status(dq_attend(gpu.codec, 0, &args, workspace.get(), 64, gpu.stream), DQ_ERROR_WORKSPACE, "a small workspace", "this call needs");
}

// Prefill in chunks, refits, decode, attention, and back; everything beside the CPU.
void model_case(const Shape& s, std::mt19937_64& rng) {
    const std::string name = "d " + std::to_string(s.d) + " plans " + std::to_string(s.k_plan) + "/" + std::to_string(s.v_plan) + " heads " + std::to_string(s.n_kv);
    Side cpu(DQ_BACKEND_CPU, s, 800), gpu(DQ_BACKEND_CUDA, s, 800);
    cuda::need(cuda::driver().stream_create(&gpu.stream, 1), "stream");
    uint32_t position = 0;
    for (uint32_t n : {5u, 20u, 100u, 450u}) {
        const Rows r = rows(s, n, position, rng);
        cpu.take(r, position, false), gpu.take(r, position, false);
        position += n;
    }
    // A second sequence starts: its sink is another row.
    const Rows second = rows(s, 30, 0, rng);
    cpu.take(second, position, false), gpu.take(second, position, false);
    position += 30;
    for (int i = 0; i < 3; i++) {
        Rows r = rows(s, 4, position, rng);
        if (i == 1) r.k[7] = NAN, r.v[s.d * s.n_kv * 2 + 3] = INFINITY;
        const uint32_t on_cpu = cpu.take(r, position, true), on_gpu = gpu.take(r, position, true);
        expect(on_cpu == (i == 1) && on_gpu == (i == 1 ? 2 : 0), name + ": replaced rows");
        expect_status(dq_refit(cpu.codec, 0, 1, nullptr), DQ_OK, "refit");
        expect_status(dq_refit(gpu.codec, 0, 1, gpu.stream), DQ_OK, "refit");
        position += 4;
    }
    const auto records = gpu.records();
    expect_at_most(differing(records, cpu.records()), record_limit, name + ": share of record bytes that differ from the CPU's");
    auto on_cpu = sized<dq_layer_info>(), on_gpu = sized<dq_layer_info>();
    dq_codec_info(cpu.codec, 0, &on_cpu), dq_codec_info(gpu.codec, 0, &on_gpu);
    expect(on_cpu.rows_seen == on_gpu.rows_seen, name + ": rows seen " + std::to_string(on_gpu.rows_seen) + ", on the CPU " + std::to_string(on_cpu.rows_seen));

    // Export, import into a fresh CPU codec: what the device learned can be read there.
    std::vector<uint8_t> file;
    expect_status(dq_sets_export(gpu.codec, 0, [](void* user, const void* data, uint64_t n) {
        auto* f = static_cast<std::vector<uint8_t>*>(user);
        f->insert(f->end(), static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(data) + n);
        return 0;
    }, &file), DQ_OK, name + ": export");
    dq_codec_info(gpu.codec, 0, &on_gpu);
    expect(on_cpu.k_sets == on_gpu.k_sets && on_cpu.v_sets == on_gpu.v_sets && on_cpu.k_sets > 4, name + ": sets " + std::to_string(on_gpu.k_sets) + " and " + std::to_string(on_gpu.v_sets));
    auto import = [&](Side& into) {
        std::vector<uint8_t> map(2 * s.n_kv * DQ_MAX_SETS);
        auto user = std::make_pair(&file, size_t(0));
        expect_status(dq_sets_import(into.codec, 0, [](void* u, void* data, uint64_t n) {
            auto* p = static_cast<std::pair<std::vector<uint8_t>*, size_t>*>(u);
            if (p->second + n > p->first->size()) return 1;
            std::memcpy(data, p->first->data() + p->second, n);
            p->second += n;
            return 0;
        }, &user, map.data(), map.size()), DQ_OK, name + ": import");
        std::vector<uint8_t> moved = records;
        std::vector<int64_t> slots;
        for (uint32_t i = 0; i < position; i++) slots.push_back(i);
        dq_store store{moved.data(), into.n_slots, into.slot_bytes};
        expect_status(dq_remap_rows(into.codec, 0, &store, slots.data(), slots.size(), map.data(), map.size()), DQ_OK, name + ": remap");
        return moved;
    };
    const Decoded decoded = decode(cpu, records);
    {
        Side fresh(DQ_BACKEND_CUDA, s, 800);
        const auto moved = import(fresh);
        fresh.device_store->put(moved);
        std::vector<int64_t> slots;
        for (int64_t i = 0; i < int64_t(position); i++) slots.push_back(i % 7 == 3 ? -1 : position - 1 - i);
        cuda::Buffer<int64_t> d_slots(slots);
        cuda::Buffer<float> k(slots.size() * s.n_kv * s.d), v(slots.size() * s.n_kv * s.d);
        auto k_out = tensor(k.get(), s.n_kv, s.d), v_out = tensor(v.get(), s.n_kv, s.d);
        auto store = fresh.store();
        expect_status(dq_dequantize(fresh.codec, 0, &store, d_slots.get(), uint32_t(slots.size()), &k_out, &v_out, nullptr), DQ_OK, name + ": dequantize");
        cuda::need(cuda::driver().stream_wait(nullptr), "dequantize");
        auto worst = [&](const std::vector<float>& got, const std::vector<float>& want) {
            double e = 0, size = 0;
            const size_t row = s.n_kv * s.d;
            for (size_t i = 0; i < slots.size(); i++) {
                for (size_t c = 0; c < row; c++) {
                    const double w = slots[i] < 0 ? 0 : want[size_t(slots[i]) * row + c];
                    size = std::max(size, std::fabs(w)), e = std::max(e, std::fabs(got[i * row + c] - w));
                }
            }
            return e / size;
        };
        expect_at_most(worst(k.take(), decoded.k), 1e-5, name + ": keys back");
        expect_at_most(worst(v.take(), decoded.v), 1e-5, name + ": values back");
    }

    const Attention cases[] = {
        {"one query", 1, 500, 1, 0, false, 0, 0},
        {"masked", 1, 333, 2, 1, true, 0, 0},
        {"softcap", 1, 70, 1, 2, true, 20, 0},
        {"two queries", 2, 401, 1, 1, false, 0, 0},
        {"paged", 1, 300, 3, 0, false, 0, 1},
        {"drafts", 4, 200, 4, 0, false, 0, 2},
        {"chunk", 37, 250, 1, 1, true, 0, 0},
        {"chunk paged", 33, 200, 2, 0, false, 0, 1},
        {"chunk beside single tokens", 33, 200, 4, 0, true, 0, 2},
        {"no keys", 1, 0, 1, 0, false, 0, 0},
    };
    for (auto& a : cases) attend_case(gpu, decoded, a, rng);
    cuda::driver().stream_destroy(gpu.stream);
}

// Tokens one at a time behind the last fit, as a chat decodes them: those at position 0 are sinks, which encode makes itself.
void alone_case(const Shape& s, std::mt19937_64& rng) {
    const std::string name = "tokens alone, d " + std::to_string(s.d) + " plans " + std::to_string(s.k_plan) + "/" + std::to_string(s.v_plan);
    Side cpu(DQ_BACKEND_CPU, s, 60, 0, 1), gpu(DQ_BACKEND_CUDA, s, 60, 0, 1);
    const Rows chunk = rows(s, 40, 1, rng);
    cpu.take(chunk, 0, false), gpu.take(chunk, 0, false);
    uint32_t slot = 40;
    Rows again = rows(s, 1, 0, rng);
    for (uint32_t position : {41u, 0u, 42u, 0u, 43u, 44u}) {
        const Rows r = rows(s, 1, position, rng);
        cpu.take(r, slot, false), gpu.take(r, slot, false);
        slot++;
    }
    // Twice the same, and far from all others: the second makes no set.
    for (float& x : again.k) x = 200.0f - x;
    for (int i = 0; i < 2; i++, slot++) cpu.take(again, slot, false), gpu.take(again, slot, false);
    expect_at_most(differing(gpu.records(), cpu.records()), record_limit, name + ": share of record bytes that differ from the CPU's");
    std::vector<uint8_t> none;
    auto count = [](void*, const void*, uint64_t) { return 0; };
    expect_status(dq_sets_export(gpu.codec, 0, count, &none), DQ_OK, name + ": export");
    auto on_cpu = sized<dq_layer_info>(), on_gpu = sized<dq_layer_info>();
    dq_codec_info(cpu.codec, 0, &on_cpu), dq_codec_info(gpu.codec, 0, &on_gpu);
    expect(on_cpu.rows_to_fit == UINT64_MAX && on_cpu.k_sets == on_gpu.k_sets && on_cpu.v_sets == on_gpu.v_sets && on_cpu.k_sets > 3,
           name + ": sets " + std::to_string(on_gpu.k_sets) + " and " + std::to_string(on_gpu.v_sets) + ", on the CPU " + std::to_string(on_cpu.k_sets) + " and " + std::to_string(on_cpu.v_sets));
}

// A decode step in a graph, replayed over growing lengths; what cannot be captured says so.
void graph_case(const Shape& s, std::mt19937_64& rng) {
    Side cpu(DQ_BACKEND_CPU, s, 256), gpu(DQ_BACKEND_CUDA, s, 256);
    cuda::need(cuda::driver().stream_create(&gpu.stream, 1), "stream");
    const Rows prompt = rows(s, 40, 0, rng);
    cpu.take(prompt, 0, false), gpu.take(prompt, 0, false);
    const auto rows_to_fit = [](const Side& side) {
        auto info = sized<dq_layer_info>();
        dq_codec_info(side.codec, 0, &info);
        return info.rows_to_fit;
    };
    expect(rows_to_fit(cpu) == 64 - 39 && rows_to_fit(gpu) == rows_to_fit(cpu), "rows to the next fit: " + std::to_string(rows_to_fit(gpu)) + ", on the CPU " + std::to_string(rows_to_fit(cpu)));

    const Rows zero = rows(s, 1, 40, rng);
    cuda::Buffer<float> q(zero.q), k(zero.k), v(zero.v), out(s.n_q * s.d);
    cuda::Buffer<int32_t> positions(zero.positions), lengths(std::vector<int32_t>{0});
    cuda::Buffer<int64_t> slots(std::vector<int64_t>{-1});
    auto t = sized<dq_tokens>();
    t.n_tokens = 1, t.store = gpu.store();
    t.q = tensor(q.get(), s.n_q, s.d), t.k = tensor(k.get(), s.n_kv, s.d), t.v = tensor(v.get(), s.n_kv, s.d);
    t.positions = positions.get(), t.slots = slots.get();
    auto args = sized<dq_attend_args>();
    args.n_q = 1, args.n_kv = 256, args.store = gpu.store(), args.sequences.kv_lengths = lengths.get();
    args.q = tensor(q.get(), s.n_q, s.d), args.out = tensor(out.get(), s.n_q, s.d);
    auto limits = sized<dq_limits>();
    limits.max_queries = 1, limits.max_kv = 256;
    uint64_t bytes = 0;
    dq_workspace_size(gpu.codec, 0, &limits, &bytes);
    cuda::Buffer<uint8_t> workspace(bytes);

    auto& driver = cuda::driver();
    cuda::Handle graph = nullptr, exec = nullptr;
    cuda::need(driver.begin_capture(gpu.stream, 0), "capture in global mode");
    expect_status(dq_append(gpu.codec, 0, &t, nullptr, 0, gpu.stream), DQ_OK, "append in a capture");
    expect_status(dq_attend(gpu.codec, 0, &args, workspace.get(), bytes, gpu.stream), DQ_OK, "attend in a capture");
    cuda::need(driver.end_capture(gpu.stream, &graph), "end of capture");
    cuda::need(driver.instantiate(&exec, graph, 0), "graph");

    double worst = 0;
    for (uint32_t step = 0; step < 60; step++) {
        const uint32_t slot = 40 + step;
        const Rows r = rows(s, 1, slot, rng);
        q.put(r.q), k.put(r.k), v.put(r.v), positions.put(r.positions), slots.put({int64_t(slot)}), lengths.put({int32_t(slot + 1)});
        cuda::need(driver.graph_launch(exec, gpu.stream), "replay");
        cuda::need(driver.stream_wait(gpu.stream), "replayed");
        cpu.take(r, slot, true);
        // A fit comes due in the midst of it; replays see it.
        expect_status(dq_refit(gpu.codec, 0, 1, gpu.stream), DQ_OK, "refit between replays");
        expect_status(dq_refit(cpu.codec, 0, 1, nullptr), DQ_OK, "refit");
        if (step % 10 != 9) continue;
        const Decoded d = decode(cpu, cpu.records());
        const auto got = out.take();
        for (uint32_t h = 0; h < s.n_q; h++) {
            Query query{&r.q[h * s.d], h, {}, std::vector<float>(slot + 1, 0.0f), 1 / std::sqrt(double(s.d)), 0, -INFINITY};
            for (uint32_t i = 0; i <= slot; i++) query.slots.push_back(i);
            worst = std::max(worst, error_of(d, s, query, &got[h * s.d]));
        }
    }
    expect_at_most(worst, 2e-3, "attend in a replayed graph");
    expect_at_most(differing(gpu.records(), cpu.records()), record_limit, "records of a replayed graph");

    // 512 rows are due to be fitted: a capture must not swallow it.
    const Rows many = rows(s, 100, 101, rng);
    for (int i = 0; i < 5; i++) gpu.take(many, 101, true);
    const auto before = gpu.records();
    expect(rows_to_fit(gpu) == 0, "a fit is due: " + std::to_string(rows_to_fit(gpu)));
    cuda::need(driver.begin_capture(gpu.stream, 0), "capture");
    expect_status(dq_compress(gpu.codec, 0, &t, nullptr, 0, gpu.stream), DQ_ERROR_CAPTURE, "compress in a capture with a fit due", "a fit is due");
    expect_status(dq_refit(gpu.codec, 0, 1, gpu.stream), DQ_ERROR_CAPTURE, "refit in a capture", "a fit is due");
    cuda::need(driver.end_capture(gpu.stream, &graph), "end of capture");
    expect(gpu.records() == before, "a refused compress changes nothing");
    driver.stream_destroy(gpu.stream);
}

// Fits by dq_refit alone, on the stream of the other calls: first in turn with them, which gives the CPU's bytes, then on
// a thread of its own while rows are coded, records that the fits of any moment may have coded.
void deferred_case(const Shape& s, std::mt19937_64& rng) {
    Side cpu(DQ_BACKEND_CPU, s, 800, DQ_CODEC_DEFER_FITS), gpu(DQ_BACKEND_CUDA, s, 800, DQ_CODEC_DEFER_FITS);
    cuda::need(cuda::driver().stream_create(&gpu.stream, 1), "stream");
    const Rows first = rows(s, 70, 0, rng), second = rows(s, 43, 0, rng), third = rows(s, 60, 5, rng);
    for (Side* side : {&cpu, &gpu}) {
        side->take(first, 0, false);
        auto info = sized<dq_layer_info>();
        dq_codec_info(side->codec, 0, &info);
        expect(info.k_sets <= 2 && info.rows_seen == 69, "a deferred fit is left alone");
        side->take(second, 70, true);
        expect_status(dq_refit(side->codec, 0, 1, side->stream), DQ_OK, "a deferred fit");
        side->take(third, 120, false);
    }
    expect_status(dq_refit(cpu.codec, 0, 1, nullptr), DQ_OK, "nothing is due");
    auto stretch = [&](Side& side) {
        auto all = side.records();
        return std::vector<uint8_t>(all.begin() + 120 * ptrdiff_t(side.slot_bytes), all.begin() + 180 * ptrdiff_t(side.slot_bytes));
    };
    expect_at_most(differing(stretch(gpu), stretch(cpu)), record_limit, "records of a deferred fit");

    std::atomic<bool> done{false};
    std::atomic<int> wrong{0};
    std::thread fits([&] {
        do {
            if (dq_refit(gpu.codec, 0, 1, gpu.stream) != DQ_OK) wrong++;
        } while (!done);
    });
    for (uint32_t i = 0; i < 10; i++) gpu.take(rows(s, 60, 200 + 60 * i, rng), 200 + 60 * i, i % 2);
    done = true;
    fits.join();
    expect_status(dq_refit(gpu.codec, 0, 1, gpu.stream), DQ_OK, "the last of them");
    expect(wrong == 0, "refit beside other calls");
    std::vector<uint8_t> file;
    expect_status(dq_sets_export(gpu.codec, 0, [](void* user, const void* data, uint64_t n) {
        auto* f = static_cast<std::vector<uint8_t>*>(user);
        f->insert(f->end(), static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(data) + n);
        return 0;
    }, &file), DQ_OK, "export");
    auto info = sized<dq_layer_info>();
    dq_codec_info(gpu.codec, 0, &info);
    expect(info.k_sets >= 4 && info.rows_seen == 69 + 42 + 60 + 600, "sets " + std::to_string(info.k_sets) + " and rows " + std::to_string(info.rows_seen) + " of fits on a thread");
    // Every record names a set that the host knows by now, and gives the row back.
    const auto records = gpu.records();
    Side fresh(DQ_BACKEND_CPU, s, 800);
    std::vector<uint8_t> map(2 * s.n_kv * DQ_MAX_SETS);
    auto user = std::make_pair(&file, size_t(0));
    expect_status(dq_sets_import(fresh.codec, 0, [](void* u, void* data, uint64_t n) {
        auto* p = static_cast<std::pair<std::vector<uint8_t>*, size_t>*>(u);
        if (p->second + n > p->first->size()) return 1;
        std::memcpy(data, p->first->data() + p->second, n);
        p->second += n;
        return 0;
    }, &user, map.data(), map.size()), DQ_OK, "import");
    std::vector<uint8_t> moved = records;
    std::vector<int64_t> slots;
    for (int64_t i = 200; i < 800; i++) slots.push_back(i);
    dq_store store{moved.data(), fresh.n_slots, fresh.slot_bytes};
    expect_status(dq_remap_rows(fresh.codec, 0, &store, slots.data(), slots.size(), map.data(), map.size()), DQ_OK, "every set is known");
    cuda::driver().stream_destroy(gpu.stream);
}

void refused_case(const Shape& s) {
    dq_context* context = open(DQ_BACKEND_CUDA);
    dq_codec* codec = make(context, s);
    auto t = sized<dq_tokens>();
    expect_status(dq_observe_shard(codec, 0, &t, 0, 1), DQ_ERROR_UNSUPPORTED, "a phase on the device", "CPU only");
    auto args = sized<dq_attend_args>();
    expect_status(dq_attend_shard(codec, 0, &args, nullptr, 0, 0, 1), DQ_ERROR_UNSUPPORTED, "a phase on the device", "CPU only");
    // The rules of sequences are those of the CPU (arguments_paged.cpp); what only a device refuses:
    int32_t number = 0;
    args.n_q = 1, args.n_kv = 30, args.n_streams = 2, args.store.n_slots = 60;
    auto& q_s = args.sequences;
    q_s.window = 3;
    expect_status(dq_attend(codec, 0, &args, nullptr, 0, nullptr), DQ_ERROR_INVALID_ARGUMENT, "a window without lengths", "it must be 0 without sequences.kv_lengths");
    q_s.kv_lengths = q_s.block_table = &number, q_s.table_stride = 16, q_s.block_slots = 12;
    expect_status(dq_attend(codec, 0, &args, nullptr, 0, nullptr), DQ_ERROR_UNSUPPORTED, "blocks of 12", "block_slots is 12; on CUDA it must be a power of two");
    q_s.table_stride = 4, q_s.block_slots = 16;
    expect_status(dq_attend(codec, 0, &args, nullptr, 0, nullptr), DQ_ERROR_INVALID_ARGUMENT, "a short table", "table_stride is 1 entries; on CUDA it must be 0 or hold the 2 blocks");
    t.n_tokens = 1;
    expect_status(dq_append(codec, 0, &t, nullptr, 0, nullptr), DQ_ERROR_INVALID_ARGUMENT, "tokens without rows", "tokens->k");
    auto layer = sized<dq_layer_desc>();
    layer.n_q_heads = layer.n_kv_heads = 1, layer.head_dim_k = 64, layer.head_dim_v = 128, layer.k_plan = layer.v_plan = 4;
    auto desc = sized<dq_codec_desc>();
    desc.n_layers = 1, desc.layers = &layer;
    dq_codec* none = nullptr;
    expect_status(dq_codec_create(context, &desc, &none), DQ_ERROR_UNSUPPORTED, "a shape without kernels", "layer 0: this library has no CUDA kernel for head_dim_k 64, head_dim_v 128");
    expect(none == nullptr, "no handle after an error");
    cuda::Handle current = nullptr;
    cuda::driver().get_current(&current);
    expect(current != nullptr, "the caller's context is current after errors");
    dq_codec_destroy(codec);
    dq_context_destroy(context);
}

// What a device does not do on demand.
void stand_in_cases(const Shape& s) {
    auto& driver = cuda::driver();
    auto desc = sized<dq_context_desc>();
    desc.backend = DQ_BACKEND_CUDA;
    dq_context* context = nullptr;
    const int left = driver.left(), depth = driver.depth();
    auto create = [&](dq_status want, const char* what, const char* says) {
        expect_status(dq_context_create(&desc, &context), want, what, says);
        expect(context == nullptr && driver.left() == left && driver.depth() == depth, std::string(what) + ": nothing is left behind");
    };
    driver.device(0, 13000, 1);
    create(DQ_ERROR_NO_BACKEND, "no device", "this machine has 0 CUDA devices");
    driver.device(1, 12040, 1);
    create(DQ_ERROR_NO_BACKEND, "an old driver", "is of version 12.4; the kernels need 13.0 or newer");
    driver.device(1, 13000, 0);
    create(DQ_ERROR_UNSUPPORTED, "an unknown architecture", "compute capability 9.0; the kernels were built for");
    driver.device(1, 13000, 1);
    driver.fail("cuInit", 0, 100);
    create(DQ_ERROR_NO_BACKEND, "a driver that does not start", "does not start");
    driver.fail("cuDevicePrimaryCtxRetain", 0, 2);
    create(DQ_ERROR_OUT_OF_MEMORY, "no memory for a context", "CUDA_ERROR_OUT_OF_MEMORY");
    driver.fail("cuModuleLoadData", 0, 2);
    create(DQ_ERROR_OUT_OF_MEMORY, "no memory for kernels", "CUDA_ERROR_OUT_OF_MEMORY");
    desc.device = 1;
    create(DQ_ERROR_NO_BACKEND, "a device that is not there", "desc->device is 1");
    desc.device = 0;

    expect_status(dq_context_create(&desc, &context), DQ_OK, "context");
    auto layer = sized<dq_layer_desc>();
    layer.n_q_heads = s.n_q, layer.n_kv_heads = s.n_kv, layer.head_dim_k = layer.head_dim_v = s.d, layer.k_plan = s.k_plan, layer.v_plan = s.v_plan;
    auto codec_desc = sized<dq_codec_desc>();
    codec_desc.n_layers = 1, codec_desc.layers = &layer;
    const int with_context = driver.left();
    for (const char* call : {"cuMemAlloc", "cuMemHostAlloc", "cuMemcpyHtoDAsync"}) {
        dq_codec* codec = nullptr;
        driver.fail(call, 0, 2);
        expect_status(dq_codec_create(context, &codec_desc, &codec), DQ_ERROR_OUT_OF_MEMORY, std::string(call) + " fails", "CUDA_ERROR_OUT_OF_MEMORY");
        expect(codec == nullptr && driver.left() == with_context && driver.depth() == depth, std::string(call) + " fails: nothing is left behind");
    }
    dq_context_destroy(context);

    Side gpu(DQ_BACKEND_CUDA, s, 64);
    std::mt19937_64 rng(3);
    gpu.take(rows(s, 20, 0, rng), 0, false);
    cuda::need(driver.stream_create(&gpu.stream, 0), "stream");
    driver.stream_destroy(gpu.stream);
    expect_status(dq_refit(gpu.codec, 0, 1, gpu.stream), DQ_ERROR_CUDA, "a destroyed stream", "stream is no live stream: CUDA_ERROR_INVALID_HANDLE");
    gpu.stream = nullptr;
    auto args = sized<dq_attend_args>();
    cuda::Buffer<float> q(s.n_q * s.d), out(s.n_q * s.d);
    cuda::Buffer<uint8_t> workspace(1 << 22);
    args.n_q = 1, args.n_kv = 20, args.store = gpu.store(), args.q = tensor(q.get(), s.n_q, s.d), args.out = tensor(out.get(), s.n_q, s.d);
    driver.fail("cuLaunchKernel", 1, 719);
    expect_status(dq_attend(gpu.codec, 0, &args, workspace.get(), 1 << 22, nullptr), DQ_ERROR_CUDA, "a failed launch", "kernel launch: CUDA_ERROR_LAUNCH_FAILED");
    expect(driver.depth() == depth, "contexts are popped after errors");
}

}  // namespace

int main(int argc, char** argv) {
    // "quick": as much as the stand-in driver gets, for the sanitizers of a device.
    const std::string what = argc > 1 ? argv[1] : "";
    const bool stand_in = what == "stand-in", few = stand_in || what == "quick";
    if (!(dq_backends() >> DQ_BACKEND_CUDA & 1)) {
        auto desc = sized<dq_context_desc>();
        desc.backend = DQ_BACKEND_CUDA;
        dq_context* context = nullptr;
        expect_status(dq_context_create(&desc, &context), DQ_ERROR_NO_BACKEND, "a build without kernels", "built without CUDA kernels");
        std::printf("no CUDA kernels in this build\n");
        return failed ? 1 : 77;
    }
    if (!cuda::driver().load()) {
        auto desc = sized<dq_context_desc>();
        desc.backend = DQ_BACKEND_CUDA;
        dq_context* context = nullptr;
        expect_status(dq_context_create(&desc, &context), DQ_ERROR_NO_BACKEND, "a machine without CUDA", "");
        std::printf("no CUDA device\n");
        return failed || stand_in ? 1 : 77;
    }
    cuda::Handle primary = nullptr;
    cuda::need(cuda::driver().retain(&primary, 0), "context");
    cuda::need(cuda::driver().set_current(primary), "context");
    std::mt19937_64 rng(7);
    if (stand_in && cuda::driver().fail == nullptr) {
        std::printf("this is not the stand-in driver\n");
        return 1;
    }
    if (stand_in) record_limit = 0;
    if (cuda::driver().fail != nullptr) stand_in_cases({4, 2, 64, 104, 4});
    refused_case({4, 2, 64, 104, 4});
    model_case({4, 2, 64, 104, 4}, rng);
    model_case({9, 3, 64, 103, 3}, rng);
    if (!few) {
        model_case({32, 8, 128, 104, 4}, rng);
        model_case({32, 8, 128, 103, 3}, rng);
        model_case({8, 8, 128, 102, 2}, rng);
        model_case({4, 1, 256, 104, 4}, rng);
        alone_case({4, 1, 256, 104, 4}, rng);
        alone_case({8, 2, 256, 103, 3}, rng);
        model_case({16, 2, 256, 104, 3}, rng);
        model_case({28, 4, 128, 4, 4}, rng);
        model_case({6, 1, 64, 3, 3}, rng);
    } else {
        model_case({4, 1, 128, 104, 4}, rng);
        // More queries than one launch of the statistics takes.
        model_case({16, 2, 64, 104, 4}, rng);
    }
    alone_case({4, 2, 64, 104, 4}, rng);
    graph_case({4, 2, 64, 104, 4}, rng);
    deferred_case({4, 2, 64, 104, 4}, rng);
    std::printf("cuda%s: %d passed, %d failed\n", stand_in ? " on the stand-in driver" : "", passed, failed);
    return failed != 0;
}
