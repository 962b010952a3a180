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

// ---- Levels ----

// Four bytes as a table for `prmt`, the first lowest.
__host__ __device__ constexpr uint32_t four_bytes(int a, int b, int c, int d) {
    return uint32_t(a & 0xFF) | uint32_t(b & 0xFF) << 8 | uint32_t(c & 0xFF) << 16 | uint32_t(d & 0xFF) << 24;
}

// Levels of the codes, and what one step is worth; the same numbers as src/code/codebook.rs.
template <int BITS> struct Book;
// Up to three bits a level is an entry of one table of eight.
template <> struct Book<2> {
    static constexpr uint32_t table_0 = 0x7F26DA81u, table_1 = 0;
    static constexpr double exact_unit = 1.5104 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = 0.1175f;
    __host__ __device__ static constexpr int level(int code) { return int8_t(table_0 >> (8 * code)); }
};
template <> struct Book<3> {
    static constexpr uint32_t table_0 = 0xF2D3B181u, table_1 = 0x7F4F2D0Eu;
    static constexpr double exact_unit = 2.1519 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = 0.03454f;
    __host__ __device__ static constexpr int level(int code) { return int8_t((code < 4 ? table_0 : table_1) >> (8 * (code & 3))); }
};
// From four bits on a level is base[upper four bits] + fine[upper bits, in place of those that do not fit: lower bits].
template <> struct Book<4> {
    static constexpr double exact_unit = 2.7326 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = 0.009497f;
    __host__ __device__ static constexpr int base(int n) {
        constexpr int levels[16] = {-127, 127, -96, 96, -75, 75, -58, 58, -44, 44, -31, 31, -18, 18, -6, 6};
        return levels[n];
    }
    __host__ __device__ static constexpr int fine(int) { return 0; }
    __host__ __device__ static constexpr int level(int code) { return base(code); }
};
template <> struct Book<5> {
    static constexpr double exact_unit = 3.2607 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = 0.00253f;
    __host__ __device__ static constexpr int base(int n) {
        constexpr int levels[16] = {-127, 105, -90, 79, -70, 61, -54, 47, -41, 35, -29, 24, -18, 13, -8, 3};
        return levels[n];
    }
    __host__ __device__ static constexpr int fine(int i) {
        constexpr int levels[16] = {0, 22, 0, 11, 0, 9, 0, 7, 0, 6, 0, 5, 0, 5, 0, 5};
        return levels[i];
    }
    __host__ __device__ static constexpr int level(int code) { return base(code >> 1) + fine((code >> 1 & 14) | (code & 1)); }
};
template <> struct Book<6> {
    static constexpr double exact_unit = 0.0352;
    static constexpr float unit = float(exact_unit), distortion = 0.000693f;
    __host__ __device__ static constexpr int base(int n) {
        constexpr int levels[16] = {-105, 37, -83, 15, -77, 30, -44, -3, -57, -25, -21, -61, -52, 1, -40, -11};
        return levels[n];
    }
    __host__ __device__ static constexpr int fine(int i) {
        constexpr int levels[16] = {0, 12, 56, 68, 0, 12, 35, 47, 0, 38, 44, 82, 0, 6, 45, 51};
        return levels[i];
    }
    __host__ __device__ static constexpr int level(int code) { return base(code >> 2) + fine((code >> 2 & 12) | (code & 3)); }
};
template <> struct Book<8> {
    static constexpr double exact_unit = 4.0 / 127.0;
    static constexpr float unit = float(exact_unit), distortion = float(exact_unit * exact_unit / 12.0);
    __host__ __device__ static constexpr int level(int code) { return code - 128; }
};

// How many registers' sum is a level.
__host__ __device__ constexpr int parts_of(int bits) { return bits == 4 ? 2 : bits == 5 || bits == 6 ? 4 : 1; }

// A table of sixteen entries as two of eight. `prmt` turns a selector nibble with bit 3 set into copies of the chosen byte's
// sign: 0, or -1. So the number itself looks at the first half, the number with bit 3 flipped at the second, and the sum of
// both is the entry, if each half makes up for the -1 that the other gives in its place.
template <class Entries> struct Halves {
    // Entry k of a half, k = 0 ... 7; the other half's at k is negative by itself if it is less than -1, and -1 or more is not.
    __host__ __device__ static constexpr int byte(int half, int k) {
        return Entries::at(8 * half + k) + (Entries::at(8 * (1 - half) + k) < -1 ? 1 : 0);
    }
    __host__ __device__ static constexpr uint32_t word(int half, int i) {
        return four_bytes(byte(half, 4 * i), byte(half, 4 * i + 1), byte(half, 4 * i + 2), byte(half, 4 * i + 3));
    }
    __host__ __device__ static constexpr bool hold() {
        for (int k = 0; k < 8; k++) {
            for (int half = 0; half < 2; half++) {
                if (byte(half, k) < -128 || byte(half, k) > 127) return false;
                if (byte(half, k) + (byte(1 - half, k) < 0 ? -1 : 0) != Entries::at(8 * half + k)) return false;
            }
        }
        return true;
    }
};
template <int BITS> struct BaseEntries { __host__ __device__ static constexpr int at(int n) { return Book<BITS>::base(n); } };
template <int BITS> struct FineEntries { __host__ __device__ static constexpr int at(int i) { return Book<BITS>::fine(i); } };
template <int BITS> using BaseHalves = Halves<BaseEntries<BITS>>;
template <int BITS> using FineHalves = Halves<FineEntries<BITS>>;
static_assert(BaseHalves<4>::hold() && BaseHalves<5>::hold() && BaseHalves<6>::hold() && FineHalves<5>::hold() && FineHalves<6>::hold(), "");

}  // namespace dq
