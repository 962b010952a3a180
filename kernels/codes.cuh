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

// Levels that an A register holds. Codes of two tables: a level is high + low + 1, where one of the two is 0 or -1; the
// tensor core adds them, and who asks for the products knows what all the ones are worth.
struct Levels {
    uint32_t high, low;
};

// Levels as they are, for codes of two tables.
template <int BITS>
__device__ __forceinline__ uint32_t join_levels(uint32_t high, uint32_t low) {
    if constexpr (BITS == 4) return high | ((low + 0x80808081u) ^ 0x80808080u);
    // Five and six bits: high is less than 128, and low -1, or -128 for negative levels.
    return (high ^ (~low << 1 & 0x80808080u)) + (~low & 0x01010101u);
}

// The first four entries of tables (`prmt` takes the others as immediates); those that no plan of the kernel needs cost
// nothing.
struct Tables {
    uint32_t two, three, four_high, four_low, five_0, five_2, six_0, six_2, six_4, six_6, low;
    __device__ __forceinline__ Tables()
        : two(in_register(Book<2>::table_0)), three(in_register(Book<3>::table_0)), four_high(in_register(Book<4>::high_0)),
          four_low(in_register(~Book<4>::low_0)), five_0(in_register(Book<5>::word(0))), five_2(in_register(Book<5>::word(2))),
          six_0(in_register(Book<6>::word(0))), six_2(in_register(Book<6>::word(2))), six_4(in_register(Book<6>::word(4))),
          six_6(in_register(Book<6>::word(6))), low(in_register(0x80808080u)) {}
};

// Four codes, one to a nibble of the selector's low half.
template <int BITS>
__device__ __forceinline__ Levels look_up(const Tables& t, uint32_t selector, uint32_t flipped) {
    using B = Book<BITS>;
    if constexpr (BITS == 4) return {prmt(t.four_high, B::high_1, flipped), prmt(t.four_low, ~B::low_1, selector)};
    else return {prmt(BITS == 3 ? t.three : t.two, B::table_1, selector), 0};
}

// Eight codes, one to a nibble: those of the low half, then those of the high half.
template <int BITS>
__device__ __forceinline__ void look_up_word(const Tables& t, uint32_t nibbles, Levels& first, Levels& second) {
    const uint32_t flipped = nibbles ^ 0x88888888u;
    first = look_up<BITS>(t, nibbles, flipped);
    second = look_up<BITS>(t, upper_half(nibbles), BITS == 4 ? upper_half(flipped) : 0);
}

// Four codes of five or six bits, a nibble each: `sign` has bit 3 set for positive levels, `index` is the magnitude's
// number without its fifth bit, which is bit 2 of `fifth`; bit 3 of `fifth` is set.
template <int BITS>
__device__ __forceinline__ Levels look_up_wide(const Tables& t, uint32_t sign, uint32_t index, uint32_t flipped, uint32_t fifth) {
    using B = Book<BITS>;
    // -1 for positive levels, -128 for negative ones.
    const uint32_t low = prmt(t.low, 0x80808080u, sign);
    uint32_t size;
    if constexpr (BITS == 5) {
        size = prmt(t.five_0, B::word(1), index) | prmt(t.five_2, B::word(3), flipped);
    } else {
        const uint32_t mask = prmt(0, 0xFFFFFFFFu, fifth);
        size = ((prmt(t.six_0, B::word(1), index) | prmt(t.six_2, B::word(3), flipped)) & ~mask)
            | ((prmt(t.six_4, B::word(5), index) | prmt(t.six_6, B::word(7), flipped)) & mask);
    }
    // The magnitude, or 127 less the magnitude.
    return {size ^ ~low, low};
}

// Eight codes of five or six bits: the four upper bits, and the lower ones at bit 0 of each nibble (with anything above).
// The book is symmetric: the codes of its negative half are those of the positive one with every bit flipped.
template <int BITS>
__device__ __forceinline__ void look_up_wide_word(const Tables& t, uint32_t high, uint32_t low, Levels& first, Levels& second) {
    constexpr int SHIFT = BITS - 4;
    constexpr uint32_t LOW = SHIFT == 1 ? 0x11111111u : 0x33333333u;
    const uint32_t flip = ((~high & 0x88888888u) >> 3) * 15, upper = high ^ flip;
    const uint32_t index = pick_bits(low ^ flip, upper << SHIFT, LOW), flipped = index ^ 0x88888888u;
    first = look_up_wide<BITS>(t, high, index, flipped, upper);
    second = look_up_wide<BITS>(t, upper_half(high), upper_half(index), upper_half(flipped), BITS == 6 ? upper_half(upper) : 0);
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

// Item t = 4 group + q of a plane of BITS bits and N channels, for 32 keys: r[i] holds the bits of its eight channels of key
// 8 i + g, shifted down so that they start at bit 0 of each nibble; higher bits of the nibbles are left as they come.
// `rows` is the first key's row.
template <bool ALIGNED, int N, int BITS, int GROUP>
__device__ __forceinline__ void key_bits(uint32_t (&r)[4], const uint8_t* rows, uint32_t stride, uint32_t plane, int lane) {
    constexpr int BYTES = N * BITS / 8;
    int w = lane & 3;
    // Beyond the tier: any codes do, the folded query is zero there.
    if constexpr (N % 32 != 0 && GROUP == N / 32) {
        if (4 * GROUP + w >= N / 8) w = 0;
    }
    if constexpr (ALIGNED && BYTES % 16 == 0 && N % 32 == 0) {
        // The same words of the plane serve several groups, at another shift.
        ldmatrix(r, rows + lane * stride + plane + 16 * GROUP % BYTES);
        constexpr int SHIFT = BITS < 4 ? BITS * (16 * GROUP / BYTES) : 0;
        if constexpr (SHIFT > 0) {
            DQ_UNROLL
            for (int i = 0; i < 4; i++) r[i] >>= SHIFT;
        }
        return;
    }
    const uint8_t* key = rows + (lane >> 2) * stride + plane;
    DQ_UNROLL
    for (int i = 0; i < 4; i++) {
        const uint8_t* at = key + 8 * i * stride;
        const int first = 16 * GROUP + 4 * w;
        if constexpr (BITS == 4 || BITS == 8) {
            r[i] = shared_word<ALIGNED>(at + first);
        } else if constexpr (BYTES % 4 == 0) {
            r[i] = shared_word<ALIGNED>(at + first % BYTES) >> (BITS * (first / BYTES));
        } else {
            r[i] = 0;
            DQ_UNROLL
            for (int b = 0; b < 4; b++) {
                r[i] |= (uint32_t(at[(first + b) % BYTES]) >> (BITS * ((first + b) / BYTES)) & 0xFF) << (8 * b);
            }
        }
    }
}

// Levels of word q of a group: the two quads of key 8 i + g.
template <class S, int TIER, int GROUP>
__device__ __forceinline__ void key_levels(const Tables& t, Levels (&first)[4], Levels (&second)[4], const uint8_t* rows, uint32_t stride, const uint32_t* planes, int lane) {
    constexpr int N = S::channels(TIER), BITS = S::bits(TIER), P = S::plane_index(TIER, 0);
    uint32_t r[4];
    if constexpr (BITS == 8) {
        uint32_t there[4];
        key_bits<S::aligned, N, 8, GROUP>(r, rows, stride, planes[P], lane);
        key_bits<S::aligned, N, 8, GROUP>(there, rows, stride, planes[P] + N / 2, lane);
        DQ_UNROLL
        for (int i = 0; i < 4; i++) {
            const uint32_t a = r[i] ^ 0x80808080u, b = there[i] ^ 0x80808080u;
            first[i] = {prmt(a, b, 0x5140), 0};
            second[i] = {prmt(a, b, 0x7362), 0};
        }
    } else if constexpr (planes_of(BITS) == 2) {
        uint32_t low[4];
        key_bits<S::aligned, N, plane_bits(BITS, 0), GROUP>(r, rows, stride, planes[P], lane);
        key_bits<S::aligned, N, plane_bits(BITS, 1), GROUP>(low, rows, stride, planes[P + 1], lane);
        DQ_UNROLL
        for (int i = 0; i < 4; i++) {
            if constexpr (BITS == 3) look_up_word<3>(t, join_3(r[i], low[i]), first[i], second[i]);
            else look_up_wide_word<BITS>(t, r[i], low[i], first[i], second[i]);
        }
    } else {
        key_bits<S::aligned, N, BITS, GROUP>(r, rows, stride, planes[P], lane);
        DQ_UNROLL
        for (int i = 0; i < 4; i++) {
            if constexpr (BITS == 2) r[i] &= 0x33333333u;
            look_up_word<BITS>(t, r[i], first[i], second[i]);
        }
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
    const uint32_t e = pick_bits(r0, r1 << 4, 0x0F0F0F0Fu), o = pick_bits(r0 >> 4, r1, 0x0F0F0F0Fu);
    even = prmt(e, e, 0x3120);
    odd = prmt(o, o, 0x3120);
}

template <class S, int TIER, int GROUP>
__device__ __forceinline__ void value_levels(const Tables& t, ValueFragments& f, const uint8_t* rows, uint32_t stride, const uint32_t* planes, int lane) {
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
            look_up_word<BITS>(t, even, a0, b0);
            look_up_word<BITS>(t, odd, a1, b1);
            f.high[0][2 * i] = a0.high, f.high[0][2 * i + 1] = a1.high;
            f.high[1][2 * i] = b0.high, f.high[1][2 * i + 1] = b1.high;
            f.low[0][2 * i] = a0.low, f.low[0][2 * i + 1] = a1.low;
            f.low[1][2 * i] = b0.low, f.low[1][2 * i + 1] = b1.low;
        }
    }
}

}  // namespace dq
