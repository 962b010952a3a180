// From packed codes in shared memory to the int8 A fragments of the tensor cores.
//
// Keys: the score mma has keys as rows and channels as k. Word w of a group (w = 0..3, one for each q of a row's lanes)
// stands for the channels c .. c+3 in its low nibbles and c + n/2 .. in its high ones, c = 4 (4 group + w), n the
// tier's channels. A quad is four nibbles next to each other: (c, c + n/2, c + 1, c + 1 + n/2), then the same from
// c + 2. The order of k is free as long as folded queries have the same (`k_position`).
//
// Values: the value mma has channels as rows and keys as k. Of a group, unit u = 8 group + g (two bytes) gives lane row
// g four channels: nibbles 2u, 2u + n/2, 2u + 1, 2u + 1 + n/2. Keys within 16 come in the order 2q, 2q+8, 2q+1, 2q+9.
#pragma once
#include "plan.cuh"

namespace dq {

// Levels that an A register holds; `low` is to be subtracted and only there for codes with two tables.
struct Levels {
    uint32_t high, low;
};

// Four codes, one to a nibble of the selector's low half.
template <int BITS>
__device__ __forceinline__ Levels look_up(uint32_t selector, uint32_t flipped) {
    using B = Book<BITS>;
    if constexpr (B::two_tables) {
        return {prmt(B::high_0, B::high_1, flipped), prmt(B::low_0, B::low_1, selector)};
    } else {
        return {prmt(B::table_0, B::table_1, selector), 0};
    }
}

// Eight codes, one to a nibble: those of the low half, then those of the high half.
template <int BITS>
__device__ __forceinline__ void look_up_word(uint32_t nibbles, Levels& first, Levels& second) {
    uint32_t flipped = nibbles ^ 0x88888888u;
    first = look_up<BITS>(nibbles, flipped);
    second = look_up<BITS>(nibbles >> 16, flipped >> 16);
}

// Four codes of five or six bits: `nibbles` the magnitude's low four bits, `upper` its fifth, `negative` the sign, each
// at bit 0 of its nibble.
template <int BITS>
__device__ __forceinline__ Levels look_up_wide(uint32_t nibbles, uint32_t upper, uint32_t negative) {
    using B = Book<BITS>;
    constexpr uint32_t ZERO_OR_ONES = 0x0000FF00u;
    uint32_t size = prmt(B::word(0), B::word(1), nibbles) | prmt(B::word(2), B::word(3), nibbles ^ 0x8888u);
    if constexpr (BITS == 6) {
        const uint32_t larger = prmt(B::word(4), B::word(5), nibbles) | prmt(B::word(6), B::word(7), nibbles ^ 0x8888u);
        const uint32_t mask = prmt(ZERO_OR_ONES, 0, upper);
        size = (size & ~mask) | (larger & mask);
    }
    const uint32_t mask = prmt(ZERO_OR_ONES, 0, negative);
    return {size & ~mask, size & mask};
}

// Eight codes of five or six bits: the four upper bits, and the lower ones at bit 0 of each nibble (with anything above).
// The book is symmetric: the codes of its negative half are those of the positive one with every bit flipped.
template <int BITS>
__device__ __forceinline__ void look_up_wide_word(uint32_t high, uint32_t low, Levels& first, Levels& second) {
    constexpr int SHIFT = BITS - 4;
    constexpr uint32_t LOW = SHIFT == 1 ? 0x11111111u : 0x33333333u;
    const uint32_t negative = (~high & 0x88888888u) >> 3, flip = negative * 15;
    const uint32_t nibbles = ((high << SHIFT & ~LOW) | (low & LOW)) ^ flip;
    const uint32_t upper = (high ^ flip) >> 2 & 0x11111111u;
    first = look_up_wide<BITS>(nibbles, upper, negative);
    second = look_up_wide<BITS>(nibbles >> 16, upper >> 16, negative >> 16);
}

// Puts a 2-bit plane's part and a 1-bit plane's part of a 3-bit code together; each already stands four bits apart.
__device__ __forceinline__ uint32_t join_3(uint32_t two, uint32_t one) {
    return (two << 1 & 0x66666666u) | (one & 0x11111111u);
}

__device__ __forceinline__ uint32_t shared_half(const uint8_t* at) { return *reinterpret_cast<const uint16_t*>(at); }
template <bool ALIGNED>
__device__ __forceinline__ uint32_t shared_word(const uint8_t* at) {
    if constexpr (ALIGNED) return *reinterpret_cast<const uint32_t*>(at);
    return shared_half(at) | shared_half(at + 2) << 16;
}

// ---- Keys ----

// Item t = 4 group + w of a plane of BITS bits and N channels: the bits of its eight channels, shifted down so that
// they start at bit 0 of each nibble; higher bits of the nibbles are left as they come.
template <bool ALIGNED, int N, int BITS, int GROUP>
__device__ __forceinline__ uint32_t key_bits(const uint8_t* plane, int w) {
    constexpr int BYTES = N * BITS / 8;
    if constexpr (BITS == 4) {
        return shared_word<ALIGNED>(plane + 16 * GROUP + 4 * w);
    } else if constexpr (BYTES % 16 == 0) {
        // The same word of the plane serves several groups, at another shift.
        return shared_word<ALIGNED>(plane + 16 * GROUP % BYTES + 4 * w) >> (BITS * (16 * GROUP / BYTES));
    } else if constexpr (BYTES % 4 == 0) {
        int at = 16 * GROUP + 4 * w;
        return shared_word<ALIGNED>(plane + at % BYTES) >> (BITS * (at / BYTES));
    } else {
        uint32_t word = 0;
        DQ_UNROLL
        for (int i = 0; i < 4; i++) {
            int at = 16 * GROUP + 4 * w + i;
            word |= (uint32_t(plane[at % BYTES]) >> (BITS * (at / BYTES)) & 0xFF) << (8 * i);
        }
        return word;
    }
}

// Levels of word w of a group of one key: the two quads.
template <class S, int TIER, int GROUP>
__device__ __forceinline__ void key_levels(const uint8_t* row, const uint32_t* planes, int w, Levels& first, Levels& second) {
    constexpr int N = S::channels(TIER), BITS = S::bits(TIER), P = S::plane_index(TIER, 0);
    // Beyond the tier: any codes do, the folded query is zero there.
    if constexpr (N % 32 != 0 && GROUP == N / 32) {
        if (4 * GROUP + w >= N / 8) w = 0;
    }
    if constexpr (BITS == 8) {
        const uint8_t* at = row + planes[P] + 16 * GROUP + 4 * w;
        uint32_t here = shared_word<S::aligned>(at) ^ 0x80808080u, there = shared_word<S::aligned>(at + N / 2) ^ 0x80808080u;
        first = {prmt(here, there, 0x5140), 0};
        second = {prmt(here, there, 0x7362), 0};
    } else if constexpr (BITS == 3) {
        uint32_t two = key_bits<S::aligned, N, 2, GROUP>(row + planes[P], w);
        uint32_t one = key_bits<S::aligned, N, 1, GROUP>(row + planes[P + 1], w);
        look_up_word<3>(join_3(two, one), first, second);
    } else if constexpr (BITS == 5 || BITS == 6) {
        uint32_t high = key_bits<S::aligned, N, 4, GROUP>(row + planes[P], w);
        uint32_t low = key_bits<S::aligned, N, BITS - 4, GROUP>(row + planes[P + 1], w);
        look_up_wide_word<BITS>(high, low, first, second);
    } else if constexpr (BITS == 2) {
        look_up_word<2>(key_bits<S::aligned, N, 2, GROUP>(row + planes[P], w) & 0x33333333u, first, second);
    } else {
        look_up_word<4>(key_bits<S::aligned, N, 4, GROUP>(row + planes[P], w), first, second);
    }
}

// Where channel c of a tier of n channels goes in the k dimension: group, lane's q, register and byte of the B fragment.
struct KPosition {
    int group, q, reg, byte;
};
__host__ __device__ constexpr KPosition k_position(int n, int c) {
    int upper = c >= n / 2 ? 1 : 0;
    int low = c - upper * (n / 2);
    return {low / 16, low / 4 % 4, low % 4 / 2, low % 2 * 2 + upper};
}

// ---- Values ----

// One b16 unit of a plane for 32 keys, transposed: r[i] holds keys 8 i + 2 q and 8 i + 2 q + 1 (low and high half) of
// unit 8 GROUP + g, shifted down as in `key_bits`. `rows` is the first key's row.
template <bool ALIGNED, int N, int BITS, int GROUP>
__device__ __forceinline__ void value_bits(uint32_t (&r)[4], const uint8_t* rows, uint32_t stride, uint32_t plane, int lane) {
    constexpr int BYTES = N * BITS / 8;
    int g = lane >> 2, q = lane & 3;
    if constexpr (ALIGNED && BYTES % 16 == 0) {
        ldmatrix_trans(r, rows + lane * stride + plane + 16 * GROUP % BYTES);
        constexpr int SHIFT = BITS < 4 ? BITS * (16 * GROUP / BYTES) : 0;
        if constexpr (SHIFT > 0) {
            DQ_UNROLL
            for (int i = 0; i < 4; i++) r[i] >>= SHIFT;
        }
    } else {
        // Units beyond the tier repeat others; nobody reads their rows of the result.
        int at = 16 * GROUP + 2 * g, shift = 0;
        if constexpr (BITS < 4) shift = BITS * (at / BYTES);
        at %= BYTES;
        DQ_UNROLL
        for (int i = 0; i < 4; i++) {
            const uint8_t* key = rows + (8 * i + 2 * q) * stride + plane + at;
            r[i] = (shared_half(key) | shared_half(key + stride) << 16) >> shift;
        }
    }
}

// A fragments of a group's two m blocks: rows g and g + 8 of block e are the channels 2u + e and 2u + e + n/2.
struct ValueFragments {
    uint32_t high[2][4], low[2][4];
};

// Eight keys' worth of four nibble channels: r0 has keys 2q, 2q+1, r1 has 2q+8, 2q+9. Gathers each channel's four keys.
//   even: low half channel nibble 0, high half nibble 2;   odd: nibbles 1 and 3
__device__ __forceinline__ void transpose_nibbles(uint32_t r0, uint32_t r1, uint32_t& even, uint32_t& odd) {
    uint32_t e = (r0 & 0x0F0F0F0Fu) | (r1 << 4 & 0xF0F0F0F0u);
    uint32_t o = (r0 >> 4 & 0x0F0F0F0Fu) | (r1 & 0xF0F0F0F0u);
    even = prmt(e, e, 0x3120);
    odd = prmt(o, o, 0x3120);
}

template <class S, int TIER, int GROUP>
__device__ __forceinline__ void value_levels(ValueFragments& f, const uint8_t* rows, uint32_t stride, const uint32_t* planes, int lane) {
    constexpr int N = S::channels(TIER), BITS = S::bits(TIER), P = S::plane_index(TIER, 0);
    static_assert(BITS != 5 && BITS != 6, "tiers are for keys");
    if constexpr (BITS == 8) {
        // Unit u holds the channels 2u and 2u + 1 themselves; unit u + n/4 those n/2 further on.
        DQ_UNROLL
        for (int upper = 0; upper < 2; upper++) {
            uint32_t r[4];
            value_bits<S::aligned, N / 2, 8, GROUP>(r, rows, stride, planes[P] + upper * (N / 2), lane);
            DQ_UNROLL
            for (int i = 0; i < 2; i++) {
                uint32_t a = r[2 * i] ^ 0x80808080u, b = r[2 * i + 1] ^ 0x80808080u;
                f.high[0][2 * i + upper] = prmt(a, b, 0x6240);
                f.high[1][2 * i + upper] = prmt(a, b, 0x7351);
            }
        }
    } else {
        uint32_t r[4];
        if constexpr (BITS == 3) {
            uint32_t one[4];
            value_bits<S::aligned, N, 2, GROUP>(r, rows, stride, planes[P], lane);
            value_bits<S::aligned, N, 1, GROUP>(one, rows, stride, planes[P + 1], lane);
            DQ_UNROLL
            for (int i = 0; i < 4; i++) r[i] = join_3(r[i], one[i]);
        } else {
            value_bits<S::aligned, N, BITS, GROUP>(r, rows, stride, planes[P], lane);
        }
        if constexpr (BITS == 2) {
            DQ_UNROLL
            for (int i = 0; i < 4; i++) r[i] &= 0x33333333u;
        }
        DQ_UNROLL
        for (int i = 0; i < 2; i++) {
            uint32_t even, odd;
            transpose_nibbles(r[2 * i], r[2 * i + 1], even, odd);
            Levels a0, a1, b0, b1;
            look_up_word<BITS>(even, a0, b0);
            look_up_word<BITS>(odd, a1, b1);
            f.high[0][2 * i] = a0.high, f.high[0][2 * i + 1] = a1.high;
            f.high[1][2 * i] = b0.high, f.high[1][2 * i + 1] = b1.high;
            f.low[0][2 * i] = a0.low, f.low[0][2 * i + 1] = a1.low;
            f.low[1][2 * i] = b0.low, f.low[1][2 * i + 1] = b1.low;
        }
    }
}

}  // namespace dq
