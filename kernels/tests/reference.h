// The truth in double precision, written from the format's description and sharing no code with the kernels: codebooks,
// record layout, rotation, factor sets, attention on decoded rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "../params.h"

namespace ref {

using Vec = std::vector<double>;

inline double half_value(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double v = exponent == 0 ? std::ldexp(fraction, -24) : exponent == 31 ? (fraction ? NAN : INFINITY) : std::ldexp(1024 + fraction, exponent - 25);
    return h & 0x8000 ? -v : v;
}
// Nearest f16, ties to even.
inline uint16_t to_half(double v) {
    uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    v = std::fabs(v);
    if (std::isnan(v)) return 0x7E00;
    if (v >= 65520) return sign | 0x7C00;
    if (v == 0) return sign;
    int exponent = 0;
    std::frexp(v, &exponent);
    int shift = std::max(exponent - 11, -24);
    double steps = std::nearbyint(std::ldexp(v, -shift));
    if (shift == -24) return sign | uint16_t(steps);
    return sign | uint16_t((shift + 24) * 1024 + int(steps));
}

// ---- Codebooks ----

struct Book {
    std::vector<int> table, codes;  // levels by code; codes by ascending level
    double exact_unit, unit, distortion;
};
inline Book book(int bits) {
    if (bits == 8) {
        Book b{{}, {}, 4.0 / 127.0, double(float(4.0 / 127.0)), 4.0 / 127 * (4.0 / 127) / 12};
        for (int c = 0; c < 256; c++) b.table.push_back(c - 128);
        return b;
    }
    Vec half = bits == 2 ? Vec{0.4528, 1.5104}
        : bits == 3      ? Vec{0.2451, 0.7560, 1.3439, 2.1519}
        : bits == 4      ? Vec{0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326}
        : bits == 5      ? Vec{0.0659, 0.1981, 0.3314, 0.4667, 0.6049, 0.7471, 0.8946, 1.0488,
                               1.2118, 1.3863, 1.5762, 1.7872, 2.0287, 2.3177, 2.6911, 3.2607}
                         : Vec{};
    const double distortions[] = {0, 0, 0.1175, 0.03454, 0.009497, 0.00253, 0.000693};
    double unit = bits == 6 ? 0.0352 : half.back() / 127.0;
    Book b{{}, {}, unit, double(float(unit)), distortions[bits]};
    const int n = int(half.size());
    auto step = [&](int i) { return int(std::nearbyint(half[i] / unit)); };
    if (bits < 4) {
        for (int c = 0; c < n; c++) b.table.push_back(-step(n - 1 - c));
        for (int c = 0; c < n; c++) b.table.push_back(step(c));
    } else if (bits < 6) {
        // Cells of one or two magnitudes, from outside; of each the negative levels, then the positive ones.
        for (int size = 1 << (bits - 4), first = n - size; first >= 0; first -= size) {
            for (int i = size; i-- > 0;) b.table.push_back(-step(first + i));
            for (int i = 0; i < size; i++) b.table.push_back(step(first + i));
        }
    } else {
        const int base[] = {-105, 37, -83, 15, -77, 30, -44, -3, -57, -25, -21, -61, -52, 1, -40, -11};
        const int fine[4][4] = {{0, 12, 56, 68}, {0, 12, 35, 47}, {0, 38, 44, 82}, {0, 6, 45, 51}};
        for (int c = 0; c < 64; c++) b.table.push_back(base[c / 4] + fine[c / 16][c % 4]);
    }
    b.codes.resize(b.table.size());
    for (size_t c = 0; c < b.codes.size(); c++) b.codes[c] = int(c);
    std::sort(b.codes.begin(), b.codes.end(), [&](int c, int d) { return b.table[c] < b.table[d]; });
    return b;
}
// Where the level at place i ends, in units of a row of unit variance.
inline float edge(const Book& b, int i) { return float((b.table[b.codes[i]] + b.table[b.codes[i + 1]]) / 2.0 * b.exact_unit); }

// ---- Layout ----

struct Tier { int first, channels, bits; };
struct Plane { uint32_t offset, head_bytes; int bits, shift, first; };
struct SideLayout {
    int d, plan;
    std::vector<Tier> tiers;
    std::vector<Plane> planes;
    uint32_t headers;

    int bits_of(int channel) const {
        for (auto& t : tiers) if (channel < t.first + t.channels) return t.bits;
        return 0;
    }
};
struct Layout {
    uint32_t n_kv;
    SideLayout k, v;
    uint32_t slot_bytes;
};
inline std::vector<Tier> tiers_of(int d, int plan) {
    using Pairs = std::vector<std::pair<int, int>>;  // sixteenths, bits
    const Pairs pairs = plan == 102 ? Pairs{{4, 4}, {12, 2}} : plan == 103 ? Pairs{{4, 5}, {8, 3}, {4, 2}} : plan == 104 ? Pairs{{4, 6}, {8, 4}, {4, 3}} : Pairs{{16, plan}};
    std::vector<Tier> tiers;
    int first = 0, share = 0;
    for (auto [sixteenths, bits] : pairs) {
        share += sixteenths;
        int exact = d * share / 16, end = (first == 0 && share < 16 ? exact : exact + 8) / 16 * 16;
        tiers.push_back({first, end - first, bits});
        first = end;
    }
    return tiers;
}
inline Layout layout(uint32_t n_kv, int dk, int k_plan, int dv, int v_plan) {
    Layout l;
    l.n_kv = n_kv;
    uint32_t at = 0;
    auto side = [&](int d, int plan) {
        SideLayout s{d, plan, tiers_of(d, plan), {}, 0};
        for (auto& t : s.tiers) {
            int shift = t.bits;
            for (int bits : t.bits == 3 ? std::vector<int>{2, 1} : t.bits == 5 ? std::vector<int>{4, 1} : t.bits == 6 ? std::vector<int>{4, 2} : std::vector<int>{t.bits}) {
                shift -= bits;
                s.planes.push_back({at, uint32_t(t.channels * bits / 8), bits, shift, t.first});
                at += n_kv * t.channels * bits / 8;
            }
        }
        return s;
    };
    l.k = side(dk, k_plan);
    l.v = side(dv, v_plan);
    l.k.headers = at;
    l.v.headers = at + 2 * n_kv;
    l.slot_bytes = (at + 4 * n_kv + 15) / 16 * 16;
    return l;
}
inline std::vector<uint8_t> unpack(const SideLayout& s, uint32_t head, const uint8_t* record) {
    std::vector<uint8_t> codes(s.d, 0);
    for (auto& p : s.planes) {
        for (uint32_t j = 0; j < p.head_bytes; j++) {
            uint8_t byte = record[p.offset + head * p.head_bytes + j];
            for (int k = 0; k < 8 / p.bits; k++) codes[p.first + j + k * p.head_bytes] |= (byte >> (k * p.bits) & ((1 << p.bits) - 1)) << p.shift;
        }
    }
    return codes;
}
inline void pack(const SideLayout& s, uint32_t head, const std::vector<uint8_t>& codes, uint8_t* record) {
    for (auto& p : s.planes) {
        for (uint32_t j = 0; j < p.head_bytes; j++) {
            uint8_t byte = 0;
            for (int k = 0; k < 8 / p.bits; k++) byte |= (codes[p.first + j + k * p.head_bytes] >> p.shift & ((1 << p.bits) - 1)) << (k * p.bits);
            record[p.offset + head * p.head_bytes + j] = byte;
        }
    }
}
inline uint16_t header_of(const SideLayout& s, uint32_t head, const uint8_t* record) {
    uint16_t h;
    std::memcpy(&h, record + s.headers + 2 * head, 2);
    return h;
}
inline double header_scale(uint16_t h) { return half_value((h & 0xFFF0) >> 1); }

// ---- The rotation ----

inline std::vector<int> rotation_signs(int d) {
    std::vector<int> s;
    uint64_t state = d;
    for (int i = 0; i < d; i++) {
        state += 0x9E3779B97F4A7C15ull;
        uint64_t z = state;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        s.push_back((z ^ (z >> 31)) >> 63 ? -1 : 1);
    }
    return s;
}
// Entry (row, col) of the plus-minus-one Hadamard matrix of order d.
inline int hadamard_sign(int d, int row, int col) {
    int m = 1, run = d;
    if (d % 3 == 0) m = 12, run = d / 12;
    if (d % 5 == 0) m = 20, run = d / 20;
    int across = 1;
    if (m > 1) {
        int p = m - 1, r = row / run, c = col / run;
        auto chi = [&](int x) { for (int i = 1; i < p; i++) if (i * i % p == x) return 1; return -1; };
        across = r == c ? 1 : r == 0 ? 1 : c == 0 ? -1 : chi(((c - r) % p + p) % p);
    }
    return across * (__builtin_popcount((row % run) & (col % run)) % 2 ? -1 : 1);
}
// Sign of entry (latent, channel).
inline std::vector<std::vector<int>> rotation(int d) {
    auto signs = rotation_signs(d);
    std::vector<std::vector<int>> r(d, std::vector<int>(d));
    for (int i = 0; i < d; i++) for (int c = 0; c < d; c++) r[i][c] = hadamard_sign(d, i, c) * signs[c];
    return r;
}

// ---- Factor sets ----

// One side of a layer as the device tables have it.
struct Factors {
    int d;
    uint32_t n_kv, max_dense;
    std::vector<DqHeadSets> heads;
    std::vector<uint16_t> means, decode;
    std::vector<float> encode;    // [head]: [d][d], then the feedback: of each tier the rows of a lower triangle
    std::vector<uint32_t> rotation_bits;
    size_t encode_len;            // of a head
    std::vector<Tier> tiers;      // with feedback

    // As the device has it (src/cuda/tables.rs): of each eight latents of a tier and each latent up to the last of them,
    // eight weights.
    std::vector<float> encode_table() const {
        std::vector<float> out;
        for (uint32_t h = 0; h < n_kv; h++) {
            const float* row = &encode[h * encode_len];
            out.insert(out.end(), row, row + d * d);
            row += d * d;
            for (auto& t : tiers) {
                for (int block = 0; block < t.channels; block += 8) {
                    const size_t at = out.size();
                    out.resize(at + 8 * (block + 8), 0.0f);
                    for (int i = 0; i < 8; row += block + ++i) for (int k = 0; k <= block + i; k++) out[at + 8 * k + i] = row[k];
                }
            }
        }
        return out;
    }

    // x - mean = matrix(e) y
    double decode_entry(uint32_t head, int set, int channel, int latent) const {
        int t = heads[head].transform[set];
        if (t == 0) {
            int words = (d + 31) / 32;
            bool negative = rotation_bits[latent * words + channel / 32] >> (channel % 32) & 1;
            return (negative ? -1.0 : 1.0) / std::sqrt(double(d));
        }
        return half_value(decode[((size_t(head) * max_dense + t - 1) * d + channel) * d + latent]);
    }
    double mean(uint32_t head, int set, int channel) const { return half_value(means[(size_t(head) * DQ_MAX_SETS + set) * d + channel]); }
    // mean + decode y, y from codes
    Vec decode_row(uint32_t head, uint16_t header, const std::vector<uint8_t>& codes, const SideLayout& side) const {
        double scale = header_scale(header);
        int set = header & 15;
        Vec x(d), y(d);
        for (auto& t : side.tiers) {
            Book b = book(t.bits);
            for (int j = t.first; j < t.first + t.channels; j++) y[j] = b.table[codes[j]] * b.unit * scale;
        }
        for (int c = 0; c < d; c++) {
            double sum = 0;
            for (int j = 0; j < d; j++) sum += decode_entry(head, set, c, j) * y[j];
            x[c] = mean(head, set, c) + sum;
        }
        return x;
    }
};

struct SetKinds { int rotations, dense; };

// Set 0, `rotations - 1` sets over the rotation with a mean (the first of them a sink), then `dense` fits. Several tiers
// have feedback.
inline Factors random_factors(int d, uint32_t n_kv, SetKinds kinds, std::mt19937_64& rng, const std::vector<Tier>& tiers = {}) {
    Factors f{d, n_kv, std::max<uint32_t>(kinds.dense, 1), {}, {}, {}, {}, {}, size_t(d) * d, {}};
    if (tiers.size() > 1) f.tiers = tiers;
    for (auto& t : f.tiers) f.encode_len += t.channels * (t.channels + 1) / 2;
    std::normal_distribution<double> normal;
    f.heads.resize(n_kv);
    f.means.assign(size_t(n_kv) * DQ_MAX_SETS * d, 0);
    f.decode.assign(size_t(n_kv) * f.max_dense * d * d, 0);
    f.encode.assign(n_kv * f.encode_len, 0);
    int words = (d + 31) / 32;
    f.rotation_bits.assign(d * words, 0);
    auto r = rotation(d);
    for (int i = 0; i < d; i++) for (int c = 0; c < d; c++) if (r[i][c] < 0) f.rotation_bits[i * words + c / 32] |= 1u << (c % 32);
    for (uint32_t h = 0; h < n_kv; h++) {
        DqHeadSets& s = f.heads[h];
        std::memset(&s, 0, sizeof s);
        int n = kinds.rotations + kinds.dense;
        s.present = uint16_t((1u << n) - 1);
        if (kinds.rotations > 1) s.sinks = 2;
        s.newest = uint8_t(n - 1);
        s.encode_dense = kinds.dense > 0;
        for (float& k : s.kappa) k = 1.0f;
        for (int e = 1; e < n; e++) {
            for (int c = 0; c < d; c++) f.means[(size_t(h) * DQ_MAX_SETS + e) * d + c] = to_half(normal(rng) * (e == 1 ? 4 : 1));
            int dense = e - kinds.rotations;
            if (dense < 0) continue;
            s.transform[e] = uint8_t(1 + dense);
            // A rotation with scaled channels (channel c by g[c]), so that the inverse is known.
            Vec g(d);
            for (double& v : g) v = std::exp(0.7 * normal(rng));
            for (int c = 0; c < d; c++) {
                for (int j = 0; j < d; j++) {
                    double v = g[c] * r[j][c] / std::sqrt(double(d));
                    f.decode[((size_t(h) * f.max_dense + dense) * d + c) * d + j] = to_half(v);
                    if (e == n - 1) f.encode[h * f.encode_len + c * d + j] = float(r[j][c] / std::sqrt(double(d)) / g[c]);
                }
            }
        }
        float* entry = &f.encode[h * f.encode_len] + d * d;
        for (auto& t : f.tiers) {
            for (int j = 0; j < t.channels; j++) {
                for (int k = 0; k < j; k++) *entry++ = float(1.5 / std::sqrt(t.channels) * normal(rng));
                *entry++ = float(std::exp(0.5 * normal(rng)));
            }
        }
    }
    return f;
}

// ---- Attention ----

struct Rows64 { Vec k, v; };   // decoded, [head][key][d]

// One row: weights over visible keys (`mask` minus infinity hides), then the values. `magnitude` is sum p |v|.
inline void attend(const double* q, const double* k, const double* v, int n, int dk, int dv, double scale, double softcap,
                   const std::vector<double>& mask, const double* sink, Vec& out, Vec& magnitude) {
    out.assign(dv, 0), magnitude.assign(dv, 0);
    Vec s(n, -INFINITY);
    double m = sink ? *sink : -INFINITY;
    for (int t = 0; t < n; t++) {
        if (mask[t] == -INFINITY) continue;
        double dot = 0;
        for (int c = 0; c < dk; c++) dot += q[c] * k[size_t(t) * dk + c];
        dot *= scale;
        if (softcap > 0) dot = softcap * std::tanh(dot / softcap);
        s[t] = dot + mask[t];
        m = std::max(m, s[t]);
    }
    if (m == -INFINITY) return;
    double total = sink ? std::exp(*sink - m) : 0;
    for (int t = 0; t < n; t++) {
        if (s[t] == -INFINITY) continue;
        double p = std::exp(s[t] - m);
        total += p;
        for (int c = 0; c < dv; c++) out[c] += p * v[size_t(t) * dv + c], magnitude[c] += p * std::fabs(v[size_t(t) * dv + c]);
    }
    for (int c = 0; c < dv; c++) out[c] /= total, magnitude[c] /= total;
}

}  // namespace ref
