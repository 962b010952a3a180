// Code plans and where a row's planes lie, as compile-time numbers. The same layout as src/shape.rs:
//
//   K planes | V planes | K headers u16 [n_kv_heads] | V headers u16 [n_kv_heads] | zeros to a multiple of 16 bytes
//
// Each plane is [n_kv_heads][channels * bits / 8]. Byte j of a head's plane holds at bit k * bits the channel
// first + j + k * head_bytes. So in every plane one byte holds, four bits apart, the channels c and c + channels / 2:
// whatever the width, a byte of two code nibbles stands for such a pair, and a word for four neighbouring pairs.
#pragma once
#include "device.cuh"
#include "params.h"

namespace dq {

// Tiers of a plan; plan p of one tier is the uniform width of p bits.
template <int PLAN> struct PlanTiers {
    static constexpr int count = 1;
    __host__ __device__ static constexpr int sixteenths(int) { return 16; }
    __host__ __device__ static constexpr int bits(int) { return PLAN; }
};

// Keys have a steep spectrum: the widest latent channels get more bits.
#define DQ_TIERED_PLAN(plan, n, ...)                                                                                  \
    template <> struct PlanTiers<plan> {                                                                              \
        static constexpr int count = n;                                                                               \
        __host__ __device__ static constexpr int pick(int i) {                                                        \
            constexpr int pairs[] = {__VA_ARGS__};                                                                    \
            return pairs[i];                                                                                          \
        }                                                                                                             \
        __host__ __device__ static constexpr int sixteenths(int t) { return pick(2 * t); }                            \
        __host__ __device__ static constexpr int bits(int t) { return pick(2 * t + 1); }                              \
    }
DQ_TIERED_PLAN(102, 2, 4, 4, 12, 2);
DQ_TIERED_PLAN(103, 3, 4, 5, 8, 3, 4, 2);
DQ_TIERED_PLAN(104, 3, 4, 6, 8, 4, 4, 3);
#undef DQ_TIERED_PLAN

__host__ __device__ constexpr int planes_of(int bits) { return bits == 3 || bits == 5 || bits == 6 ? 2 : 1; }
// Width of plane `i` of a code, most significant first.
__host__ __device__ constexpr int plane_bits(int bits, int i) {
    return bits == 3 ? (i == 0 ? 2 : 1) : bits == 5 ? (i == 0 ? 4 : 1) : bits == 6 ? (i == 0 ? 4 : 2) : bits;
}

// One side (keys or values) of a layer. ALIGNED promises that all planes start on 4 bytes, and on 16 those whose rows
// are multiples of 16 bytes; an odd number of heads can break that.
template <int DIM, int PLAN, bool ALIGNED> struct Side {
    using Tiers = PlanTiers<PLAN>;
    static constexpr bool aligned = ALIGNED;
    static constexpr int D = DIM;
    static constexpr int plan = PLAN;
    static constexpr int tiers = Tiers::count;

    // Tiers end on multiples of 16 channels: the first rounded down, the others to the nearest.
    __host__ __device__ static constexpr int tier_end(int t) {
        int share = 0;
        for (int i = 0; i <= t; i++) share += Tiers::sixteenths(i);
        int exact = DIM * share / 16;
        return (t == 0 && share < 16 ? exact : exact + 8) / 16 * 16;
    }
    __host__ __device__ static constexpr int first(int t) { return t == 0 ? 0 : tier_end(t - 1); }
    __host__ __device__ static constexpr int channels(int t) { return tier_end(t) - first(t); }
    __host__ __device__ static constexpr int bits(int t) { return Tiers::bits(t); }
    __host__ __device__ static constexpr int head_bytes(int t, int plane) { return channels(t) * plane_bits(bits(t), plane) / 8; }
    // Bytes of one head in all planes before this one.
    __host__ __device__ static constexpr int bytes_before(int t, int plane) {
        int bytes = 0;
        for (int i = 0; i < t; i++) bytes += channels(i) * bits(i) / 8;
        for (int i = 0; i < plane; i++) bytes += head_bytes(t, i);
        return bytes;
    }
    static constexpr int row_bytes = bytes_before(Tiers::count, 0);
    // Floats of the feedback behind a head's encode matrix, those of the tiers before this one: of each eight latents and
    // each latent up to the last of them, eight weights.
    __host__ __device__ static constexpr int feedback_before(int t) {
        int n = 0;
        for (int i = 0; i < t; i++) n += channels(i) * (channels(i) + 8) / 2;
        return n;
    }
    static constexpr int encode_floats = DIM * DIM + (tiers > 1 ? feedback_before(Tiers::count) : 0);
    __host__ __device__ static constexpr int planes() {
        int n = 0;
        for (int t = 0; t < tiers; t++) n += planes_of(bits(t));
        return n;
    }
    // Number of plane `i` of tier t among all planes of the side.
    __host__ __device__ static constexpr int plane_index(int t, int i) {
        int n = i;
        for (int u = 0; u < t; u++) n += planes_of(bits(u));
        return n;
    }
    __host__ __device__ static constexpr int tier_of_plane(int p) {
        int t = 0;
        while (p >= planes_of(bits(t))) p -= planes_of(bits(t++));
        return t;
    }

    // Whether some number of heads can put a plane off its alignment.
    __host__ __device__ static constexpr bool can_be_unaligned() {
        for (int t = 0; t < tiers; t++) {
            for (int i = 0; i < planes_of(bits(t)); i++) if (head_bytes(t, i) % 16 != 0) return true;
        }
        return false;
    }

    // A group is 32 channels of one tier: one k step of the score mma, two m blocks of the value mma. Tiers that are
    // not a multiple of 32 end in a group with channels that do not exist.
    __host__ __device__ static constexpr int groups_before(int t) {
        int n = 0;
        for (int i = 0; i < t; i++) n += (channels(i) + 31) / 32;
        return n;
    }
    static constexpr int groups = groups_before(Tiers::count);
};

template <class K, class V>
struct Record {
    __host__ __device__ static uint32_t k_headers(uint32_t n_kv) { return n_kv * (K::row_bytes + V::row_bytes); }
    __host__ __device__ static uint32_t v_headers(uint32_t n_kv) { return k_headers(n_kv) + 2 * n_kv; }
    __host__ __device__ static uint32_t bytes(uint32_t n_kv) { return (k_headers(n_kv) + 4 * n_kv + 15) / 16 * 16; }
};

// The header: f16 scale shifted left by one, its low four bits replaced by the set.
__device__ __forceinline__ float header_scale(uint32_t header) { return half_to_float(uint16_t((header & 0xFFF0) >> 1)); }
__device__ __forceinline__ uint32_t header_set(uint32_t header) { return header & 15; }

// Levels of the codes as bytes for `prmt`, and what one step is worth; the same numbers as src/code/codebook.rs.
// Four bits: sixteen levels are two tables of eight. `prmt` turns a selector nibble with bit 3 set into copies of the
// chosen byte's sign, which is zero in both tables. So the code itself picks from `low` (magnitudes of the codes below
// 8, zero for the others), the code with bit 3 flipped picks from `high`; a level is high - low.
template <int BITS> struct Book;
template <> struct Book<2> {
    static constexpr bool two_tables = false;
    static constexpr uint32_t table_0 = 0x7F26DA81u, table_1 = 0;
    static constexpr double exact_unit = 1.5104 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = 0.1175f;
    // Magnitude m of the positive half, in steps.
    __host__ __device__ static constexpr int magnitude(int m) { return table_0 >> (16 + 8 * m) & 0xFF; }
};
template <> struct Book<3> {
    static constexpr bool two_tables = false;
    static constexpr uint32_t table_0 = 0xF2D3B181u, table_1 = 0x7F4F2D0Eu;
    static constexpr double exact_unit = 2.1519 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = 0.03454f;
    // Magnitude m of the positive half, in steps.
    __host__ __device__ static constexpr int magnitude(int m) { return table_1 >> (8 * m) & 0xFF; }
};
template <> struct Book<4> {
    static constexpr bool two_tables = true;
    static constexpr uint32_t low_0 = 0x3A4B607Fu, low_1 = 0x06121F2Cu;
    static constexpr uint32_t high_0 = 0x2C1F1206u, high_1 = 0x7F604B3Au;
    static constexpr double exact_unit = 2.7326 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = 0.009497f;
    // Magnitude m of the positive half, in steps.
    __host__ __device__ static constexpr int magnitude(int m) { return (m < 4 ? high_0 : high_1) >> (8 * (m & 3)) & 0xFF; }
};
// Five and six bits are sign and magnitude: magnitudes in words of four, ascending.
template <> struct Book<5> {
    static constexpr bool two_tables = true;
    static constexpr double exact_unit = 3.2607 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = 0.00253f;
    __host__ __device__ static constexpr uint32_t word(int i) {
        return i < 2 ? (i == 0 ? 0x120D0803u : 0x29231D18u) : (i == 2 ? 0x463D362Fu : 0x7F695A4Fu);
    }
    __host__ __device__ static constexpr int magnitude(int m) { return word(m >> 2) >> (8 * (m & 3)) & 0xFF; }
};
template <> struct Book<6> {
    static constexpr bool two_tables = true;
    static constexpr double exact_unit = 3.7441 / 108.0;
    static constexpr float unit = float(exact_unit), distortion = 0.00066f;
    __host__ __device__ static constexpr uint32_t word(int i) {
        return i < 4 ? (i < 2 ? (i == 0 ? 0x07050301u : 0x0F0D0B09u) : (i == 2 ? 0x17151311u : 0x201E1B19u))
                     : (i < 6 ? (i == 4 ? 0x2A272522u : 0x3633302Du) : (i == 6 ? 0x47423E3Au : 0x6C5D544Du));
    }
    __host__ __device__ static constexpr int magnitude(int m) { return word(m >> 2) >> (8 * (m & 3)) & 0xFF; }
};
template <> struct Book<8> {
    static constexpr bool two_tables = false;
    static constexpr double exact_unit = 4.0 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = float(exact_unit * exact_unit / 12.0);
};

}  // namespace dq
