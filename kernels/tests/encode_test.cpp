// Encode against a plain transcription of its definition (src/cpu/encode.rs: f32, every rounding and order stated there;
// records must be equal), and dequantize against the f64 decoder.
#include "../dequantize.cuh"
#include "../encode.cuh"
#include "../host.h"
#include "reference.h"
#include "runtime.h"
#include <tuple>

namespace {

// ---- The definition, one row at a time, with the sixteen partial sums spelled out ----

struct PlainEncoder {
    const ref::Factors& f;
    const ref::SideLayout& layout;

    template <class Term> static float sum(int n, Term term) {
        float lane[16] = {};
        for (int c = 0; c < n; c++) lane[c % 16] += term(c);
        for (int w = 8; w > 0; w /= 2) for (int i = 0; i < w; i++) lane[i] += lane[i + w];
        return lane[0];
    }
    static float half(uint16_t h) { return float(ref::half_value(h)); }

    std::vector<float> rotate(std::vector<float> x) const {
        const int d = f.d, m = d % 3 == 0 ? 12 : d % 5 == 0 ? 20 : 1, run = d / m;
        auto signs = ref::rotation_signs(d);
        float unit = float(1.0 / std::sqrt(double(d)));
        for (int i = 0; i < d; i++) x[i] *= signs[i] * unit;
        for (int s = 1; s < run; s *= 2) {
            for (int i = 0; i < d; i++) {
                if (i % run & s) continue;
                float a = x[i], b = x[i + s];
                x[i] = a + b, x[i + s] = a - b;
            }
        }
        if (m == 1) return x;
        std::vector<float> out(d, 0.0f);
        for (int row = 0; row < m; row++) {
            for (int col = 0; col < m; col++) {
                for (int i = 0; i < run; i++) out[row * run + i] += ref::hadamard_sign(d, row * run, col * run) * x[col * run + i];
            }
        }
        return out;
    }

    struct Coded { std::vector<uint8_t> codes; uint16_t header; bool saturated; };

    static std::pair<uint16_t, bool> pack(float scale, int set) {
        uint32_t rounded = (uint32_t(ref::to_half(scale)) << 1) + 8;
        return {uint16_t((std::min(rounded, 0xF7F0u) & 0xFFF0) | set), rounded >= 0xF800u};
    }

    using Weights = std::vector<float>;

    // sum over tiers of weight * sum over the tier of term(channel)
    template <class Term> float over_tiers(const Weights& weights, Term term) const {
        float total = 0;
        for (size_t t = 0; t < layout.tiers.size(); t++) {
            int first = layout.tiers[t].first;
            total += weights[t] * sum(layout.tiers[t].channels, [&](int c) { return term(first + c); });
        }
        return total;
    }

    Coded code(const std::vector<float>& y, int set, const Weights& kappa) const {
        const int d = f.d;
        Coded out{std::vector<uint8_t>(d), uint16_t(set), false};
        if (layout.plan == 8) {
            const float unit = float(ref::book(8).unit);
            float largest = 0;
            for (float v : y) largest = std::max(largest, std::fabs(v));
            float scale = largest / (127.0f * unit);
            auto [packed, saturated] = pack(std::min(scale, 3.4e38f), set);
            if (float(ref::header_scale(packed)) < scale && (packed & 0xFFF0) < 0xF7F0) packed += 16;
            float step = float(ref::header_scale(packed)) * unit, inverse = step > 0 ? 1 / step : 0;
            for (int c = 0; c < d; c++) out.codes[c] = uint8_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(y[c] * inverse))) + 128);
            out.header = packed, out.saturated = saturated;
            return out;
        }
        std::vector<ref::Book> books(9);
        for (auto& t : layout.tiers) books[t.bits] = ref::book(t.bits);
        auto magnitude_index = [&](int c, float reach) {
            const int bits = layout.bits_of(c), half = 1 << (bits - 1);
            int m = 0;
            for (int i = half; i < 2 * half - 1; i++) m += std::fabs(y[c] * reach) > ref::edge(books[bits], i);
            return m;
        };
        float rms = std::sqrt(sum(d, [&](int c) { return y[c] * y[c]; }) / float(d)), reach = 0, best = 0;
        if (rms > 0) {
            bool first = true;
            const float energy = over_tiers(kappa, [&](int c) { return y[c] * y[c]; });
            for (float multiple : {0.76f, 0.83f, 0.9f, 0.97f, 1.04f, 1.11f, 1.18f, 1.26f}) {
                float r = 1.0f / (rms * multiple);
                std::vector<float> level(d);
                for (int c = 0; c < d; c++) {
                    const ref::Book& book = books[layout.bits_of(c)];
                    level[c] = std::copysign(float(book.table[book.codes[book.codes.size() / 2 + magnitude_index(c, r)]]), y[c]) * float(book.unit);
                }
                float projection = over_tiers(kappa, [&](int c) { return y[c] * level[c]; });
                auto [packed, saturated] = pack(std::min(std::max(energy / projection, 0.0f), 3.4028234e38f), set);
                float scale = float(ref::header_scale(packed));
                float error = over_tiers(kappa, [&](int c) { float e = y[c] - scale * level[c]; return e * e; });
                if (first || error < best) best = error, reach = r, out.header = packed, out.saturated = saturated;
                first = false;
            }
        }
        for (int c = 0; c < d; c++) {
            const int m = magnitude_index(c, reach), half = 1 << (layout.bits_of(c) - 1);
            out.codes[c] = uint8_t(books[layout.bits_of(c)].codes[std::signbit(y[c]) ? half - 1 - m : half + m]);
        }
        return out;
    }

    // Each latent rounded against what the errors before it in its tier leave; a few scales, the first of least loss, at the
    // length of what was rounded.
    Coded feed_back(const std::vector<float>& y, const Coded& without, int set, uint32_t head, const Weights& kappa) const {
        Coded best = without;
        float least = 0;
        bool any = false;
        for (float multiple : {0.94f, 1.0f, 1.06f, 1.12f}) {
            Coded c{std::vector<uint8_t>(f.d), 0, false};
            std::tie(c.header, c.saturated) = pack(float(ref::header_scale(without.header)) * multiple, set);
            const float scale = float(ref::header_scale(c.header)), narrow = scale > 0 ? 1 / scale : 0;
            const float* row = &f.encode[head * f.encode_len] + f.d * f.d;
            float cost = 0, size = 0, along = 0;
            for (size_t t = 0; t < layout.tiers.size(); t++) {
                const auto [first, channels, bits] = layout.tiers[t];
                const ref::Book book = ref::book(bits);
                const int half = 1 << (bits - 1);
                const float inverse = narrow * (1.0f + float(book.distortion));
                std::vector<float> errors;
                float lost = 0, tier_size = 0, tier_along = 0;
                for (int j = 0; j < channels; row += ++j) {
                    float target = y[first + j];
                    for (int k = 0; k < j; k++) target -= row[k] * errors[k];
                    int m = 0;
                    while (m < half - 1 && std::fabs(target * inverse) > ref::edge(book, half + m)) m++;
                    const float value = scale * (std::copysign(float(book.table[book.codes[half + m]]), target) * float(book.unit)), left = value - target;
                    errors.push_back(value - y[first + j]);
                    lost += row[j] * (left * left);
                    tier_size += row[j] * (target * target), tier_along += row[j] * (target * value);
                    c.codes[first + j] = uint8_t(book.codes[std::signbit(target) ? half - 1 - m : half + m]);
                }
                cost += kappa[t] * lost, size += kappa[t] * tier_size, along += kappa[t] * tier_along;
            }
            if (c.saturated || (any && !(cost < least))) continue;
            const auto [longer, too_long] = pack(std::min(size / along > 0 && std::isfinite(size / along) ? scale * (size / along) : scale, 3.4028234e38f), set);
            if (!too_long) c.header = longer;
            best = c, least = cost, any = true;
        }
        return best;
    }

    // Writes a row; true when it was replaced or cut.
    bool row(std::vector<float> x, uint32_t head, uint8_t* record) const {
        const int d = f.d;
        const DqHeadSets& sets = f.heads[head];
        auto mean = [&](int set, int c) { return half(f.means[(size_t(head) * DQ_MAX_SETS + set) * d + c]); };
        auto put = [&](const Coded& c) {
            ref::pack(layout, head, c.codes, record);
            std::memcpy(record + layout.headers + 2 * head, &c.header, 2);
            return c.saturated;
        };
        const Weights ones(4, 1.0f), kappa(sets.kappa, sets.kappa + 4);
        float largest = 0;
        bool bad = false;
        for (float v : x) largest = std::max(largest, std::fabs(v)), bad |= !std::isfinite(v);
        if (bad) {
            put(code(std::vector<float>(d, 0.0f), 0, ones));
            return true;
        }
        if (largest > 1e15f) for (float& v : x) v *= 1e15f / largest;
        std::vector<float> y(d, 0.0f);
        if (sets.encode_dense) {
            for (int i = 0; i < d; i++) for (int j = 0; j < d; j++) y[j] += (x[i] - mean(sets.newest, i)) * f.encode[head * f.encode_len + i * d + j];
        } else {
            for (int i = 0; i < d; i++) y[i] = x[i] - mean(sets.newest, i);
            y = rotate(y);
        }
        Weights expected;
        float distortion = 0;
        for (size_t t = 0; t < layout.tiers.size(); t++) {
            const float of_tier = float(ref::book(layout.tiers[t].bits).distortion);
            expected.push_back(kappa[t] * of_tier), distortion += float(layout.tiers[t].channels) * of_tier;
        }
        float cost = over_tiers(expected, [&](int c) { return y[c] * y[c]; });
        int other = 0;
        float distance = sum(d, [&](int c) { return x[c] * x[c]; });
        for (int e = 0; e < 16; e++) {
            if (!(sets.sinks >> e & 1)) continue;
            float v = sum(d, [&](int c) { float q = x[c] - mean(e, c); return q * q; });
            if (v < distance) distance = v, other = e;
        }
        if (!(distance * (distortion / float(d)) < 0.5f * cost)) {
            auto coded = code(y, sets.newest, kappa);
            if (sets.encode_dense && layout.tiers.size() > 1 && !coded.saturated) coded = feed_back(y, coded, sets.newest, head, kappa);
            if (!put(coded)) return false;
        }
        for (int c = 0; c < d; c++) y[c] = other ? x[c] - mean(other, c) : x[c];
        return put(code(rotate(y), other, ones));
    }
};

template <class K, class V> __global__ void __launch_bounds__(256) encode_kernel(const DqEncode p) { dq::encode<K, V>(p); }
template <class K, class V> __global__ void __launch_bounds__(256) encode_few_kernel(const DqEncode p) { dq::encode_few<K, V>(p); }
template <class K, class V> __global__ void __launch_bounds__(128) dequantize_kernel(const DqDequantize p) { dq::dequantize<K, V>(p); }

template <int DK, int KP, int DV, int VP>
void encode_case(uint32_t n_kv, uint32_t n, ref::SetKinds k_sets, ref::SetKinds v_sets, uint32_t type, std::mt19937_64& rng) {
    using K = dq::Side<DK, KP, true>;
    using V = dq::Side<DV, VP, true>;
    std::normal_distribution<double> normal;
    auto l = ref::layout(n_kv, DK, KP, DV, VP);
    auto kf = ref::random_factors(DK, n_kv, k_sets, rng, l.k.tiers), vf = ref::random_factors(DV, n_kv, v_sets, rng, l.v.tiers);
    for (auto& s : kf.heads) s.kappa[0] = 0.7f, s.kappa[1] = 1.1f, s.kappa[2] = 1.6f;
    const uint64_t stride = l.slot_bytes + 32;
    const uint32_t n_slots = n + 7, size = type == DQ_TYPE_F32 ? 4 : 2;

    // Rows about the newest mean; some near the sink or about zero, some that no one would send.
    auto make = [&](const ref::Factors& f, std::vector<float>& rows) {
        rows.resize(size_t(n) * n_kv * f.d);
        for (uint32_t t = 0; t < n; t++) {
            for (uint32_t h = 0; h < n_kv; h++) {
                float* x = &rows[(size_t(t) * n_kv + h) * f.d];
                int set = t % 7 == 0 ? std::min<int>(1, f.heads[h].newest) : t % 7 == 1 ? 0 : f.heads[h].newest;
                double scale = set == f.heads[h].newest ? 1 : 0.05;
                for (int c = 0; c < f.d; c++) x[c] = float(f.mean(h, set, c) + scale * normal(rng));
                if (t == 11) for (int c = 0; c < f.d; c++) x[c] = 0;
                if (t == 12) x[5] = NAN;
                if (t == 13) x[f.d - 1] = -INFINITY;
                if (t == 14) for (int c = 0; c < f.d; c++) x[c] *= type == DQ_TYPE_F16 ? 6e3f : 1e30f;
                if (t == 15) for (int c = 0; c < f.d; c++) x[c] *= type == DQ_TYPE_F16 ? 1e-4f : 1e-12f;
                if (t == 16) x[3] = 6e4f;
                // What the kernel gets to see.
                for (int c = 0; c < f.d; c++) {
                    if (type == DQ_TYPE_F16) x[c] = float(ref::half_value(ref::to_half(x[c])));
                    if (type == DQ_TYPE_BF16) { uint32_t u; std::memcpy(&u, &x[c], 4); u &= 0xFFFF0000u; std::memcpy(&x[c], &u, 4); }
                }
            }
        }
    };
    auto bytes_of = [&](const std::vector<float>& rows) {
        std::vector<uint8_t> b(rows.size() * size);
        for (size_t i = 0; i < rows.size(); i++) {
            uint32_t u;
            std::memcpy(&u, &rows[i], 4);
            uint16_t v = type == DQ_TYPE_F16 ? ref::to_half(rows[i]) : uint16_t(u >> 16);
            if (type == DQ_TYPE_F32) std::memcpy(&b[i * 4], &u, 4);
            else std::memcpy(&b[i * 2], &v, 2);
        }
        return b;
    };
    std::vector<float> k, v;
    make(kf, k), make(vf, v);
    std::vector<int64_t> slots(n);
    for (uint32_t i = 0; i < n; i++) slots[i] = i % 9 == 5 ? -1 : int64_t(i + 3);
    std::shuffle(slots.begin(), slots.end(), rng);

    rt::Buffer<DqHeadSets> kh(kf.heads), vh(vf.heads);
    rt::Buffer<uint16_t> km(kf.means), vm(vf.means), kd(kf.decode), vd(vf.decode);
    rt::Buffer<float> ke(kf.encode_table()), ve(vf.encode_table());
    rt::Buffer<uint32_t> kr(kf.rotation_bits), vr(vf.rotation_bits);
    rt::Buffer<uint8_t> d_k(bytes_of(k)), d_v(bytes_of(v)), d_store(std::vector<uint8_t>(n_slots * stride, 0xEE));
    rt::Buffer<int64_t> d_slots(slots);
    rt::Buffer<uint32_t> status(std::vector<uint32_t>{0});
    DqEncode p{};
    p.store = {d_store.get(), stride, n_slots};
    p.k = {kh.get(), km.get(), kd.get(), ke.get(), kr.get(), kf.max_dense, 0};
    p.v = {vh.get(), vm.get(), vd.get(), ve.get(), vr.get(), vf.max_dense, 0};
    p.k_rows = {d_k.get(), uint64_t(n_kv) * DK * size, uint64_t(DK) * size, type, 0};
    p.v_rows = {d_v.get(), uint64_t(n_kv) * DV * size, uint64_t(DV) * size, type, 0};
    p.slots = d_slots.get(), p.status = status.get(), p.n = n, p.n_kv_heads = n_kv;
    rt::Buffer<float> joined(size_t(n) * 2 * n_kv * DQ_JOINED_DIM);
    rt::Buffer<uint32_t> arrived(std::vector<uint32_t>(n * 2 * n_kv, 0));
    p.joined = joined.get(), p.arrived = arrived.get();
    rt::launch(encode_kernel<K, V>, dim3((n + dq::ENCODE_ROWS - 1) / dq::ENCODE_ROWS, n_kv, 2), 256, dq::encode_shared_bytes<K, V>(), p);
    rt::sync();
    auto got = d_store.take();
    const double replaced_rows = status.take()[0];
    // A row to a block gives the same.
    d_store.put(std::vector<uint8_t>(n_slots * stride, 0xEE)), status.put({0});
    rt::launch(encode_few_kernel<K, V>, dim3(n * dq::encode_few_blocks<K, V>(), n_kv, 2), 256, dq::encode_alone_shared_bytes<K, V>(), p);
    rt::sync();
    const auto got_few = d_store.take();

    // Records equal, padding between records untouched, replaced rows counted.
    std::vector<uint8_t> want(n_slots * stride, 0xEE);
    uint32_t replaced = 0;
    for (uint32_t t = 0; t < n; t++) {
        if (slots[t] < 0) continue;
        uint8_t* record = &want[slots[t] * stride];
        std::memset(record + l.v.headers + 2 * n_kv, 0, l.slot_bytes - l.v.headers - 2 * n_kv);
        for (uint32_t h = 0; h < n_kv; h++) {
            auto row = [&](const std::vector<float>& x, int d) { auto* b = &x[(size_t(t) * n_kv + h) * d]; return std::vector<float>(b, b + d); };
            replaced += PlainEncoder{kf, l.k}.row(row(k, DK), h, record);
            replaced += PlainEncoder{vf, l.v}.row(row(v, DV), h, record);
        }
    }
    double differing = 0, differing_few = 0;
    for (size_t i = 0; i < got.size(); i++) differing += got[i] != want[i], differing_few += got_few[i] != want[i];
    std::string name = "k" + std::to_string(DK) + "@" + std::to_string(KP) + " v" + std::to_string(DV) + "@" + std::to_string(VP) + " tokens " + std::to_string(n) + " type " + std::to_string(type);
    rt::expect("encode " + name + ": differing bytes", differing, 0);
    rt::expect("encode " + name + ": replaced rows", std::fabs(replaced_rows - replaced), 0);
    rt::expect("encode " + name + ": differing bytes, a row to a block", differing_few, 0);
    double not_zero = 0;
    for (uint32_t count : arrived.take()) not_zero += count != 0;
    rt::expect("encode " + name + ": counters for the next launch", not_zero, 0);
    rt::expect("encode " + name + ": replaced rows, a row to a block", std::fabs(double(status.take()[0]) - replaced), 0);

    // And back.
    rt::Buffer<float> k_out(size_t(n) * n_kv * DK), v_out(size_t(n) * n_kv * DV);
    DqDequantize q{};
    q.store = p.store, q.k = p.k, q.v = p.v;
    q.k_out = {k_out.get(), uint64_t(n_kv) * DK * 4, DK * 4, DQ_TYPE_F32, 0};
    q.v_out = {v_out.get(), uint64_t(n_kv) * DV * 4, DV * 4, DQ_TYPE_F32, 0};
    q.slots = d_slots.get(), q.n = n, q.n_kv_heads = n_kv;
    rt::launch(dequantize_kernel<K, V>, dim3((n + dq::DEQUANTIZE_ROWS - 1) / dq::DEQUANTIZE_ROWS, n_kv, 2), 128, 0, q);
    rt::sync();
    double worst = 0;
    auto compare = [&](const ref::Factors& f, const ref::SideLayout& side, const std::vector<float>& out) {
        for (uint32_t t = 0; t < n; t++) {
            if (slots[t] < 0) continue;
            const uint8_t* record = &got[slots[t] * stride];
            for (uint32_t h = 0; h < n_kv; h++) {
                auto x = f.decode_row(h, ref::header_of(side, h, record), ref::unpack(side, h, record), side);
                double norm = 1e-30, e = 0;
                for (int c = 0; c < f.d; c++) norm = std::max(norm, std::fabs(x[c]));
                for (int c = 0; c < f.d; c++) {
                    e = std::fabs(x[c] - out[(size_t(t) * n_kv + h) * f.d + c]) / norm;
                    if (!std::isnan(worst) && !(e <= worst)) worst = e;
                }
            }
        }
    };
    compare(kf, l.k, k_out.take()), compare(vf, l.v, v_out.take());
    rt::expect("dequantize " + name, worst, 1e-5);
}

void encode_cases_short(std::mt19937_64& rng) {
    encode_case<128, 4, 128, 4>(2, 40, {3, 2}, {3, 0}, DQ_TYPE_F32, rng);
    encode_case<128, 4, 128, 4>(2, 70, {3, 2}, {3, 0}, DQ_TYPE_F16, rng);
    encode_case<80, 3, 96, 4>(2, 40, {3, 0}, {2, 0}, DQ_TYPE_F32, rng);
    encode_case<128, 104, 128, 4>(2, 34, {2, 1}, {3, 0}, DQ_TYPE_F32, rng);
}

void encode_cases(std::mt19937_64& rng) {
    encode_cases_short(rng);
    encode_case<128, 3, 128, 3>(1, 40, {2, 1}, {3, 0}, DQ_TYPE_BF16, rng);
    encode_case<64, 2, 64, 8>(3, 40, {2, 1}, {2, 0}, DQ_TYPE_F32, rng);
    encode_case<64, 3, 256, 4>(2, 40, {1, 0}, {2, 1}, DQ_TYPE_F32, rng);
    encode_case<64, 103, 64, 3>(3, 34, {2, 1}, {2, 0}, DQ_TYPE_F16, rng);
    encode_case<64, 104, 80, 103>(1, 33, {2, 1}, {2, 1}, DQ_TYPE_F32, rng);
    // The last block has two rows: their feedback is shared by eight lanes. The first takes two passes.
    encode_case<256, 104, 64, 2>(1, 18, {2, 1}, {1, 0}, DQ_TYPE_F32, rng);
    // Triangles that shared memory does not hold.
    encode_case<192, 102, 64, 2>(1, 20, {2, 1}, {1, 0}, DQ_TYPE_F32, rng);
    encode_case<96, 102, 256, 2>(1, 40, {3, 0}, {2, 0}, DQ_TYPE_BF16, rng);
    encode_case<192, 4, 80, 8>(1, 40, {2, 0}, {2, 1}, DQ_TYPE_F32, rng);
}

}  // namespace
