// Decode attention (fold, attend, merge) against the f64 oracle on decoded rows.
// Build with g++ -DDQ_EMU for the emulator, or include from device_main.cu.
#include <functional>

#include "../attend_prefill.cuh"
#include "../fold_rows.cuh"
#include "../host.h"
#include "../merge.cuh"
#include "../tail.cuh"
#include "reference.h"
#include "runtime.h"

namespace {

struct Case {
    const char* name;
    uint32_t n_kv, group, n_streams, n_q, n_keys, n_splits;
    ref::SetKinds k_sets, v_sets;
    int mask;         // 0 none, 1 f32 causal with holes, 2 f16, 3 hides everything from query 0, 4 f16 and 5 f32 whose first keys are
                      // far below others in place of hidden; 6 all keys at -150, 8 all at -65504
    bool sink;
    float softcap;
    bool hostile;     // row scales over many magnitudes, stale records under the mask
    int paged;        // 1 blocks of slots, 2 the same with uneven queries: the last stream has one, the one before none
    uint32_t most_warps;
    uint32_t tail = 0;      // rows of each stream at most; when paged, the second stream has fewer
    uint32_t tail_type = 0;
    uint32_t tail_parts = 0;
    bool empty_values = false;  // some keys that weigh far more than others have values of scale zero
    uint32_t q_type = DQ_TYPE_F32;
    uint32_t q_apart = 0;       // elements between heads of queries
};

template <class K> __global__ void __launch_bounds__(dq::FOLD_THREADS) fold_kernel(const DqAttend p) { dq::fold_queries<K>(p); }
template <class K> __global__ void __launch_bounds__(dq::FOLD_ROWS_THREADS, dq::fold_rows_blocks(K::D)) fold_rows_kernel(const DqAttend p) { dq::fold_rows<K>(p); }
template <class K, class V, int NT> __global__ void __launch_bounds__(256, NT == 1 ? 2 : 1) attend_kernel(const DqAttend p) { dq::attend_decode<K, V, NT, dq::DECODE_STAGES>(p); }
template <class K, class V> __global__ void __launch_bounds__(dq::PrefillTile<K, V>::THREADS, 1) prefill_kernel(const DqAttend p) { dq::attend_prefill<K, V>(p); }
__global__ void __launch_bounds__(32 * dq::TAIL_WARPS) tail_kernel(const DqAttend p) { dq::attend_tail(p); }
template <class V, bool MANY> __global__ void __launch_bounds__(MANY ? 32 * dq::MERGE_MANY_WARPS : 512) merge_kernel(const DqAttend p) { dq::attend_merge<V, MANY>(p); }

// Factors on the device.
struct DeviceFactors {
    rt::Buffer<DqHeadSets> heads;
    rt::Buffer<uint16_t> means, decode;
    rt::Buffer<float> encode;
    rt::Buffer<uint32_t> rotation;
    uint32_t max_dense;
    explicit DeviceFactors(const ref::Factors& f)
        : heads(f.heads), means(f.means), decode(f.decode), encode(f.encode_table()), rotation(f.rotation_bits), max_dense(f.max_dense) {}
    DqFactors params() const { return {heads.get(), means.get(), decode.get(), encode.get(), rotation.get(), max_dense, 0}; }
};

// Writes an element; returns what it is worth.
double in_type(uint8_t* to, uint32_t type, double value) {
    float v = float(value);
    uint32_t u;
    std::memcpy(&u, &v, 4);
    if (type == DQ_TYPE_F16) u = ref::to_half(v);
    if (type == DQ_TYPE_BF16) u >>= 16;
    std::memcpy(to, &u, type == DQ_TYPE_F32 ? 4 : 2);
    if (type == DQ_TYPE_F16) return ref::half_value(uint16_t(u));
    if (type == DQ_TYPE_BF16) {
        u <<= 16;
        std::memcpy(&v, &u, 4);
    }
    return v;
}

// MOST_WARPS: by the kernel for many queries, that many warps to a block, or as many as there must be.
template <int DK, int KP, int DV, int VP, int NT, bool ALIGNED, int MOST_WARPS = 0>
void run(const Case& c, std::mt19937_64& rng) {
    using K = dq::Side<DK, KP, ALIGNED>;
    using V = dq::Side<DV, VP, ALIGNED>;
    constexpr int PREFILL = MOST_WARPS > 0 && dq::PrefillTile<K, V>::GROUPS ? dq::PrefillTile<K, V>::WARPS : MOST_WARPS;
    std::normal_distribution<double> normal;
    auto below = [&](uint64_t n) { return rng() % n; };
    auto l = ref::layout(c.n_kv, DK, KP, DV, VP);
    const uint32_t n_heads = c.n_kv * c.group, stream_slots = c.n_keys + 5;
    auto kf = ref::random_factors(DK, c.n_kv, c.k_sets, rng), vf = ref::random_factors(DV, c.n_kv, c.v_sets, rng);

    // Records: long runs of the newest set, some tiles mixed.
    const uint32_t n_slots = c.paged ? 64 * (c.n_streams * ((c.n_keys + 15) / 16) + 3) / 4 : stream_slots * c.n_streams;
    const uint64_t stride = l.slot_bytes + 16;
    std::vector<uint8_t> store(n_slots * stride);
    for (auto& b : store) b = uint8_t(rng());
    auto set_of = [&](uint32_t slot, const ref::Factors& f) {
        int n = __builtin_popcount(f.heads[0].present);
        return slot % 97 < 60 ? n - 1 : slot % 97 < 80 ? (slot / 97) % n : int(below(n));
    };
    for (uint32_t s = 0; s < n_slots; s++) {
        uint8_t* record = &store[s * stride];
        for (uint32_t h = 0; h < c.n_kv; h++) {
            const bool empty = c.empty_values && s % 53 == 7;
            auto header = [&](const ref::SideLayout& side, const ref::Factors& f, double spread, double factor) {
                double scale = std::exp(normal(rng) * spread) * factor;
                uint16_t v = uint16_t(ref::to_half(std::min(scale, 60000.0)) << 1 & 0xFFF0) | set_of(s, f);
                std::memcpy(record + side.headers + 2 * h, &v, 2);
            };
            header(l.k, kf, c.hostile ? 0.6 : 0.3, empty ? 24 : 1);
            header(l.v, vf, c.hostile ? 3.0 : 0.3, empty ? 0 : 1);
        }
    }
    // Queries small enough that many keys count.
    std::vector<int32_t> starts{0};
    for (uint32_t s = 0; s < c.n_streams; s++) starts.push_back(starts.back() + (c.paged < 2 || s == 0 ? c.n_q : s + 1 == c.n_streams));
    const uint32_t n_tokens = starts.back();
    ref::Vec q(size_t(n_tokens) * n_heads * DK);
    for (auto& x : q) x = float(normal(rng)) * 0.6f;
    if (c.hostile) for (int i = 0; i < DK; i += 7) q[i] *= 30;
    const size_t q_size = c.q_type == DQ_TYPE_F32 ? 4 : 2, q_row = (DK + c.q_apart) * q_size;
    std::vector<uint8_t> q_bytes(n_tokens * n_heads * q_row);
    for (size_t i = 0; i < q.size(); i++) q[i] = in_type(&q_bytes[i / DK * q_row + i % DK * q_size], c.q_type, q[i]);
    // Masks; in the f16 case, padded strides.
    const uint32_t mask_row = c.n_keys + c.tail + 3, all_keys = c.n_keys + c.tail;
    std::vector<float> mask(size_t(n_tokens) * mask_row, 0.0f);
    for (uint32_t t = 0; t < n_tokens; t++) {
        for (uint32_t k = 0; k < all_keys; k++) {
            bool hidden = c.mask == 3 ? t % c.n_q == 0 : k + c.n_q > all_keys + t % c.n_q || below(5) == 0;
            if (c.mask) mask[size_t(t) * mask_row + k] = hidden ? -INFINITY : float(below(8)) * -0.25f;
            if (c.mask >= 6) mask[size_t(t) * mask_row + k] = c.mask == 6 ? -150.0f : -65504.0f;
            else if (c.mask >= 4) mask[size_t(t) * mask_row + k] = k >= 40 + 7 * t % 50 ? 0.0f : c.mask == 4 ? -65504.0f : -1e9f;
        }
    }
    std::vector<uint16_t> mask_half;
    for (float v : mask) mask_half.push_back(ref::to_half(v));
    std::vector<float> sinks(n_heads);
    for (auto& x : sinks) x = float(normal(rng));
    // Block table of 16-slot pages in random order; streams of uneven length.
    const uint32_t table_stride = (c.n_keys + 15) / 16;
    std::vector<int32_t> table(c.n_streams * table_stride), lengths(c.n_streams);
    for (size_t i = 0; i < table.size(); i++) table[i] = int32_t(i);
    std::shuffle(table.begin(), table.end(), rng);
    const int window = c.hostile ? 40 : 0;
    // Tails: a row of NaN behind each, and where the mask hides one from all.
    std::vector<int32_t> tail_starts, tail_lengths;
    uint32_t tail_rows = 0;
    for (uint32_t s = 0; s < c.n_streams; s++) {
        tail_starts.push_back(int32_t(tail_rows)), tail_lengths.push_back(int32_t(c.paged && s == 1 ? c.tail / 3 : c.tail));
        tail_rows += c.tail == 0 ? 0 : c.paged ? tail_lengths[s] + 1 : c.tail;
    }
    auto tail_side = [&](int d, double spread) {
        ref::Vec rows(size_t(tail_rows) * c.n_kv * d);
        for (auto& x : rows) x = float(normal(rng) * spread);
        for (uint32_t s = 0; s < c.n_streams && c.paged && c.tail; s++) {
            const size_t behind = size_t(tail_starts[s] + tail_lengths[s]) * c.n_kv * d;
            std::fill(rows.begin() + behind, rows.begin() + behind + c.n_kv * d, NAN);
        }
        for (uint32_t i = 0; c.hostile && c.mask == 1 && i < tail_rows; i++) {
            if ((c.n_keys + i % c.tail) % 11 == 0) std::fill_n(rows.begin() + size_t(i) * c.n_kv * d, c.n_kv * d, NAN);
        }
        // In the type of the tail; rows 2 elements apart in excess.
        const size_t size = c.tail_type == DQ_TYPE_F32 ? 4 : 2, row = size_t(c.n_kv) * d;
        std::vector<uint8_t> bytes(tail_rows * (row + 2) * size + 16);
        for (size_t i = 0; i < rows.size(); i++) rows[i] = in_type(&bytes[(i / row * (row + 2) + i % row) * size], c.tail_type, rows[i]);
        return std::make_pair(rows, bytes);
    };
    const auto tail_k = tail_side(DK, 1), tail_v = tail_side(DV, 1);
    for (uint32_t s = 0; s < c.n_streams; s++) {
        lengths[s] = s == 0 ? c.n_keys : int32_t(c.n_q + below(c.n_keys - c.n_q + 1));
        // Blocks that the window has left behind belong to others by now.
        for (uint32_t b = 0; window && int(16 * b + 16) <= lengths[s] + tail_lengths[s] - (starts[s + 1] - starts[s]) + 1 - window && b < table_stride; b++) {
            table[s * table_stride + b] = -1;
        }
    }
    if (c.hostile && c.mask == 1) {
        // What the mask hides from all may be anything, NaN and infinity as a scale too.
        for (uint32_t k = 0; k < all_keys; k += 11) {
            for (uint32_t t = 0; t < n_tokens; t++) mask[size_t(t) * mask_row + k] = -INFINITY;
            for (uint32_t s = 0; s < c.n_streams && k < c.n_keys; s++) {
                for (uint32_t h = 0; h < c.n_kv; h++) {
                    uint16_t bad = k % 2 ? 0xFFF3 : 0xF80F;
                    std::memcpy(&store[(s * stream_slots + k) * stride + l.k.headers + 2 * h], &bad, 2);
                    std::memcpy(&store[(s * stream_slots + k) * stride + l.v.headers + 2 * h], &bad, 2);
                }
            }
        }
    }

    // Device side.
    DeviceFactors dk(kf), dv(vf);
    rt::Buffer<uint8_t> d_store(store);
    rt::Buffer<uint8_t> d_q(q_bytes);
    rt::Buffer<float> d_mask(mask), d_sinks(sinks), d_out(size_t(n_tokens) * n_heads * DV);
    rt::Buffer<uint16_t> d_mask_half(mask_half);
    rt::Buffer<int32_t> d_table(table), d_lengths(lengths), d_starts(starts);
    DqAttend p{};
    p.store = {d_store.get(), stride, n_slots};
    p.k = dk.params(), p.v = dv.params();
    p.q = {d_q.get(), n_heads * q_row, q_row, c.q_type, 0};
    p.out = {d_out.get(), uint64_t(n_heads) * DV * 4, DV * 4, DQ_TYPE_F32, 0};
    if (c.mask) {
        uint32_t size = c.mask % 2 == 0 ? 2 : 4;
        p.mask = c.mask % 2 == 0 ? static_cast<void*>(d_mask_half.get()) : d_mask.get();
        p.mask_type = c.mask % 2 == 0 ? DQ_TYPE_F16 : DQ_TYPE_F32;
        p.mask_query_stride = uint64_t(mask_row) * size, p.mask_stream_stride = p.mask_query_stride * c.n_q;
    }
    if (c.sink) p.sink_logits = d_sinks.get();
    if (c.paged) {
        p.block_table = d_table.get(), p.lengths = d_lengths.get();
        p.table_stride = table_stride, p.block_shift = 4, p.causal = 1, p.window = window;
        if (c.paged == 2) p.q_starts = d_starts.get();
    }
    p.stream_slots = stream_slots;
    p.n_kv_heads = c.n_kv, p.group = c.group, p.n_streams = c.n_streams, p.n_q = c.n_q, p.n_kv = c.n_keys;
    p.scale = float(1 / std::sqrt(double(DK))), p.softcap = c.softcap;
    auto cut = dq::cut_attend(c.n_kv, c.n_q * c.group, NT, c.n_keys, c.n_streams, 1, c.most_warps);
    p.heads_per_block = cut.heads_per_block, p.key_warps = cut.key_warps, p.row_tiles = cut.row_tiles;
    p.n_splits = c.n_splits;
    if (PREFILL) p.heads_per_block = p.key_warps = 1;
    p.v_transforms = c.v_sets.dense ? DQ_MAX_TRANSFORMS : 1;
    rt::Buffer<uint8_t> d_tail_k(tail_k.second), d_tail_v(tail_v.second);
    rt::Buffer<int32_t> d_tail_starts(tail_starts), d_tail_lengths(tail_lengths);
    if (c.tail) {
        const uint64_t size = c.tail_type == DQ_TYPE_F32 ? 4 : 2;
        p.tail.k = {d_tail_k.get(), (uint64_t(c.n_kv) * DK + 2) * size, DK * size, c.tail_type, 0};
        p.tail.v = {d_tail_v.get(), (uint64_t(c.n_kv) * DV + 2) * size, DV * size, c.tail_type, 0};
        if (c.paged) p.tail.starts = d_tail_starts.get(), p.tail.lengths = d_tail_lengths.get();
        p.tail.n_rows = c.tail, p.tail.head_dim = DK, p.tail.parts = c.tail_parts;
    }
    const uint32_t n_tiles = cut.row_tiles * NT, parts = dq::attend_parts(p), rows = c.n_streams * c.n_kv * c.n_q * c.group;
    rt::Buffer<uint8_t> folded(size_t(c.n_streams) * c.n_kv * DQ_MAX_TRANSFORMS * n_tiles * K::groups * 256);
    rt::Buffer<float> scales(size_t(c.n_streams) * c.n_kv * DQ_MAX_TRANSFORMS * n_tiles * 4);
    rt::Buffer<float> constants(size_t(c.n_streams) * c.n_kv * DQ_MAX_SETS * n_tiles * 4);
    rt::Buffer<float> partial(size_t(rows) * parts * DV), partial_sums(size_t(rows) * parts * dq::SUMS);
    p.folded = folded.get(), p.folded_scales = scales.get(), p.constants = constants.get();
    p.partial = partial.get(), p.partial_sums = partial_sums.get();

    p.fold_tiles = n_tiles;
    if (PREFILL) {
        // Several rounds to a block, the last one not full; a number of blocks that not every number of linear parts divides.
        rt::launch(fold_rows_kernel<K>, dim3(c.n_kv, 5), dq::FOLD_ROWS_THREADS, dq::fold_rows_shared_bytes<K>(), p);
    } else {
        p.fold_units = c.n_streams * n_tiles > 8 ? 8 : c.n_streams == 3 ? 4 : c.n_streams;
        rt::launch(fold_kernel<K>, dim3(c.n_kv * DQ_MAX_TRANSFORMS, (c.n_streams * n_tiles + p.fold_units - 1) / p.fold_units), dq::FOLD_THREADS,
                   dq::fold_shared_bytes<K>(p.fold_units), p);
    }
    if (c.tail) {
        rt::launch(tail_kernel, dim3((c.n_q * c.group + 3) / 4 * c.tail_parts, c.n_kv, c.n_streams), 32 * dq::TAIL_WARPS, 0, p);
    }
    if constexpr (PREFILL > 0) {
        rt::launch(prefill_kernel<K, V>, dim3(p.n_splits, c.n_kv * ((p.row_tiles + PREFILL - 1) / PREFILL), c.n_streams * p.v_transforms),
                   dq::PrefillTile<K, V>::GROUPS ? dq::PrefillTile<K, V>::THREADS : 32 * PREFILL,
                   dq::prefill_shared_bytes<K, V>(p, PREFILL, c.n_splits > 1 || c.v_sets.dense ? 1 : 2), p);
    } else rt::launch(attend_kernel<K, V, NT>, dim3(p.n_splits, c.n_kv / p.heads_per_block * p.row_tiles, c.n_streams * p.v_transforms),
               32 * p.heads_per_block * p.key_warps, dq::attend_shared_bytes<K, V, NT, dq::DECODE_STAGES>(p), p);
    if (PREFILL && p.v_transforms == 1) {
        // Several rows to a warp, and more warps than rows are left for in the end.
        const unsigned threads = 32 * dq::MERGE_MANY_WARPS;
        rt::launch(merge_kernel<V, true>, dim3(2, c.n_kv, c.n_streams), threads, dq::merge_shared_bytes<V>(threads), p);
    } else {
        // One warp where there are more splits than it loads at a time, so that it comes back for the others.
        const unsigned merge_threads = c.n_splits > uint32_t(dq::MERGE_AT_ONCE<V>) ? 32 : parts > 4 ? 512 : parts > 2 ? 64 : 32;
        rt::launch(merge_kernel<V, false>, dim3(rows), merge_threads, dq::merge_shared_bytes<V>(merge_threads), p);
    }
    rt::sync();
    auto out = d_out.take();

    // The oracle, and the error in units of sum p |v|.
    double worst = 0;
    for (uint32_t s = 0; s < c.n_streams; s++) {
        const int coded = c.paged ? lengths[s] : int(c.n_keys), n = coded + tail_lengths[s];
        for (uint32_t h = 0; h < c.n_kv; h++) {
            ref::Vec k(size_t(n) * DK), v(size_t(n) * DV);
            for (int t = 0; t < coded; t++) {
                if (c.paged && table[s * table_stride + t / 16] < 0) continue;  // nobody sees it
                uint32_t slot = c.paged ? table[s * table_stride + t / 16] * 16 + t % 16 : s * stream_slots + t;
                const uint8_t* record = &store[slot * stride];
                auto kr = kf.decode_row(h, ref::header_of(l.k, h, record), ref::unpack(l.k, h, record), l.k);
                auto vr = vf.decode_row(h, ref::header_of(l.v, h, record), ref::unpack(l.v, h, record), l.v);
                std::copy(kr.begin(), kr.end(), k.begin() + size_t(t) * DK);
                std::copy(vr.begin(), vr.end(), v.begin() + size_t(t) * DV);
            }
            for (int t = coded; t < n; t++) {
                const size_t row = size_t(tail_starts[s] + t - coded) * c.n_kv + h;
                std::copy_n(tail_k.first.begin() + row * DK, DK, k.begin() + size_t(t) * DK);
                std::copy_n(tail_v.first.begin() + row * DV, DV, v.begin() + size_t(t) * DV);
            }
            const int n_q = starts[s + 1] - starts[s];
            for (uint32_t i = 0; i < n_q * c.group; i++) {
                uint32_t token = starts[s] + i / c.group, head = h * c.group + i % c.group;
                ref::Vec q64(DK), want, magnitude;
                for (int x = 0; x < DK; x++) q64[x] = q[(size_t(token) * n_heads + head) * DK + x];
                std::vector<double> m(n, 0.0);
                for (int t = 0; t < n; t++) {
                    if (c.mask) m[t] = c.mask % 2 == 0 ? ref::half_value(mask_half[size_t(token) * mask_row + t]) : mask[size_t(token) * mask_row + t];
                    int position = n - n_q + int(i / c.group);
                    if (c.paged && (t > position || (p.window && t + p.window <= position))) m[t] = -INFINITY;
                }
                double sink = sinks[head];
                ref::attend(q64.data(), k.data(), v.data(), n, DK, DV, p.scale, c.softcap, m, c.sink ? &sink : nullptr, want, magnitude);
                double largest = *std::max_element(magnitude.begin(), magnitude.end());
                for (int x = 0; x < DV; x++) {
                    double e = std::fabs(out[(size_t(token) * n_heads + head) * DV + x] - want[x]);
                    if (largest > 0) e /= largest;
                    if (!std::isnan(worst) && !(e <= worst)) worst = e;
                }
            }
        }
    }
    std::string name = std::string(c.name) + " k" + std::to_string(DK) + "@" + std::to_string(KP) + " v" + std::to_string(DV) + "@" + std::to_string(VP) + " nt" + std::to_string(NT) + (ALIGNED ? "" : " unaligned") + (PREFILL ? " prefill" : "");
    if (std::getenv("DQ_VERBOSE")) std::printf("%-60s %.2e\n", name.c_str(), worst);
    // Of scores of hundreds the sixteen bits of a query leave less, and of scores of ten thousands so does f32.
    rt::expect(name, worst, c.empty_values || c.mask == 8 ? 4e-3 : 1e-3);
}

const Case CASES[] = {
    //  name         kv grp st nq keys spl  k sets  v sets  mask sink  cap  host   paged warps
    {"plain",        2, 4, 1, 1, 100, 2, {1, 0}, {1, 0}, 0, false, 0, false, 0, 4},
    {"long",         2, 3, 1, 1, 460, 1, {2, 1}, {2, 0}, 0, false, 0, false, 0, 4},
    {"sets",         2, 4, 2, 1, 150, 3, {2, 2}, {3, 0}, 1, true, 0, false, 0, 4},
    {"hostile",      1, 3, 2, 2, 130, 2, {3, 1}, {4, 0}, 1, false, 0, true, 0, 4},
    {"softcap",      4, 2, 1, 2, 70, 1, {1, 1}, {2, 0}, 2, true, 5, false, 0, 4},
    {"hidden",       1, 4, 1, 2, 40, 2, {1, 0}, {1, 0}, 3, false, 0, false, 0, 2},
    {"head groups",  6, 1, 1, 1, 33, 1, {2, 1}, {2, 0}, 1, false, 0, false, 0, 2},
    {"dense values", 2, 2, 1, 1, 90, 2, {1, 1}, {2, 2}, 1, true, 0, false, 0, 2},
    {"paged",        2, 4, 3, 2, 90, 3, {1, 1}, {2, 0}, 0, false, 0, true, 1, 4},
    {"uneven",       2, 4, 3, 3, 90, 2, {1, 1}, {2, 0}, 0, false, 0, true, 2, 4},
};

const Case TAIL_CASES[] = {
    {"tail",         2, 4, 2, 1, 70, 2, {2, 1}, {2, 0}, 1, true, 0, false, 0, 4, 45, DQ_TYPE_F16, 2},
    {"tail alone",   2, 3, 2, 2, 40, 1, {2, 1}, {2, 0}, 0, false, 5, true, 1, 4, 70, DQ_TYPE_F32, 1},
    {"tail hostile", 1, 3, 2, 2, 50, 2, {3, 1}, {4, 0}, 1, false, 0, true, 0, 4, 60, DQ_TYPE_BF16, 2},
    {"tail uneven",  2, 3, 3, 3, 90, 2, {1, 1}, {2, 1}, 0, true, 0, true, 2, 4, 33, DQ_TYPE_BF16, 3},
    {"tail chunk",   2, 4, 3, 13, 60, 1, {1, 1}, {2, 0}, 0, true, 0, true, 2, 1, 40, DQ_TYPE_F16, 1},
};

const Case PREFILL_CASES[] = {
    {"chunk",         2, 4, 1, 20, 150, 1, {2, 1}, {3, 0}, 1, true, 0, false, 0, 1},
    {"chunk hostile", 1, 3, 2, 9, 130, 2, {3, 1}, {4, 0}, 1, false, 0, true, 0, 1},
    {"chunk softcap", 3, 2, 1, 11, 70, 1, {1, 1}, {2, 2}, 2, true, 5, false, 0, 1},
    {"chunk paged",   2, 4, 3, 13, 140, 2, {1, 1}, {2, 0}, 0, false, 0, true, 1, 1},
    {"chunk uneven",  2, 4, 3, 13, 140, 1, {1, 1}, {2, 0}, 0, true, 0, true, 2, 1},
    // Two keys to a word of the mask.
    {"chunk pairs",   2, 4, 1, 12, 133, 1, {2, 1}, {2, 0}, 2, false, 0, false, 0, 1},
    {"chunk far",     2, 4, 1, 12, 169, 1, {2, 1}, {2, 0}, 5, false, 0, false, 0, 1},
    {"chunk far, softcap", 2, 4, 1, 12, 169, 2, {2, 1}, {2, 0}, 4, true, 5, false, 0, 1},
    {"chunk low",     2, 4, 1, 12, 90, 1, {2, 1}, {2, 0}, 6, false, 0, false, 0, 1},
    {"chunk lowest",  2, 4, 1, 12, 90, 2, {2, 1}, {2, 0}, 8, false, 0, false, 0, 1},
    // More rows than a block has.
    {"chunk wide",    1, 4, 2, 70, 90, 1, {2, 1}, {2, 0}, 0, false, 0, false, 2, 1},
    {"chunk empty",   2, 4, 1, 12, 170, 1, {2, 1}, {2, 0}, 0, false, 0, false, 0, 1, 0, 0, 0, true},
    // Queries of other types, and not where a load of four elements may be.
    {"chunk half",    2, 4, 2, 19, 90, 1, {2, 1}, {2, 0}, 1, false, 0, true, 0, 1, 0, 0, 0, false, DQ_TYPE_F16},
    {"chunk bf16",    2, 4, 1, 12, 90, 1, {2, 2}, {2, 0}, 0, false, 0, true, 2, 1, 0, 0, 0, false, DQ_TYPE_BF16},
    {"chunk half, apart", 1, 3, 2, 13, 90, 1, {2, 1}, {2, 0}, 0, false, 0, false, 0, 1, 0, 0, 0, false, DQ_TYPE_F16, 1},
    {"chunk apart",   1, 3, 2, 13, 90, 1, {2, 1}, {2, 0}, 0, false, 0, true, 0, 1, 0, 0, 0, false, DQ_TYPE_F32, 1},
    // More tiles than have a place at once, and of each some rows see nothing.
    {"chunk long",    1, 1, 1, 190, 460, 1, {2, 1}, {2, 0}, 0, false, 0, true, 1, 1},
    // The first rows see nothing of as many tiles at the end as have a place.
    {"chunk ends",    1, 1, 1, 128, 320, 1, {2, 1}, {2, 0}, 0, false, 0, false, 1, 1},
};

template <int DK, int KP, int DV, int VP, int WARPS>
void prefill_cases(std::mt19937_64& rng, int from, int to, const Case* cases = PREFILL_CASES) {
    for (int i = from; i < to; i++) {
        const Case& c = cases[i];
        using K = dq::Side<DK, KP, true>;
        using V = dq::Side<DV, VP, true>;
        if (dq::planes_aligned<K, V>(c.n_kv)) run<DK, KP, DV, VP, 4, true, WARPS>(c, rng);
        else if constexpr (K::can_be_unaligned() || V::can_be_unaligned()) run<DK, KP, DV, VP, 4, false, WARPS>(c, rng);
    }
}

template <int DK, int KP, int DV, int VP>
void all_cases(std::mt19937_64& rng, int from, int to, const Case* cases = CASES) {
    for (int i = from; i < to; i++) {
        const Case& c = cases[i];
        using K = dq::Side<DK, KP, true>;
        using V = dq::Side<DV, VP, true>;
        if (dq::planes_aligned<K, V>(c.n_kv)) run<DK, KP, DV, VP, 1, true>(c, rng);
        else if constexpr (K::can_be_unaligned() || V::can_be_unaligned()) run<DK, KP, DV, VP, 1, false>(c, rng);
    }
}

}  // namespace
