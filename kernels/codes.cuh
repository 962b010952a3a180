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

// Levels of four codes, as the sum of registers of four bytes: the tensor core adds them.
template <int BITS> struct Levels {
    uint32_t part[parts_of(BITS)];
};

// Byte by byte: nothing carries from one to the next.
__device__ __forceinline__ uint32_t add_bytes(uint32_t a, uint32_t b) {
    constexpr uint32_t SIGNS = 0x80808080u;
    return ((a & ~SIGNS) + (b & ~SIGNS)) ^ ((a ^ b) & SIGNS);
}

// The first four entries of tables (`prmt` takes the others as immediates); those that no plan of the kernel needs cost
// nothing. Kept in registers where look-ups are what counts.
struct Tables {
    uint32_t two, three, base[7][2], fine[7][2];
    __device__ __forceinline__ explicit Tables(bool keep = true) : base{}, fine{} {
        auto of = [&](uint32_t word) { return keep ? in_register(word) : word; };
        two = of(Book<2>::table_0), three = of(Book<3>::table_0);
        DQ_UNROLL
        for (int half = 0; half < 2; half++) {
            base[4][half] = of(BaseHalves<4>::word(half, 0));
            base[5][half] = of(BaseHalves<5>::word(half, 0));
            base[6][half] = of(BaseHalves<6>::word(half, 0));
            fine[5][half] = of(FineHalves<5>::word(half, 0));
            fine[6][half] = of(FineHalves<6>::word(half, 0));
        }
    }
};

// Turns numbers of a table, one to a nibble, into selectors of its other half.
constexpr uint32_t OTHER_HALF = 0x88888888u;

// Four codes of up to four bits, one to a nibble of the selectors' low halves.
template <int BITS>
__device__ __forceinline__ Levels<BITS> look_up(const Tables& t, uint32_t selector, uint32_t flipped) {
    if constexpr (BITS == 4) {
        using Base = BaseHalves<4>;
        return {{prmt(t.base[4][0], Base::word(0, 1), selector), prmt(t.base[4][1], Base::word(1, 1), flipped)}};
    } else {
        return {{prmt(BITS == 3 ? t.three : t.two, Book<BITS>::table_1, selector)}};
    }
}

// Eight codes, one to a nibble: those of the low half, then those of the high half.
template <int BITS>
__device__ __forceinline__ void look_up_word(const Tables& t, uint32_t nibbles, Levels<BITS>& first, Levels<BITS>& second) {
    const uint32_t flipped = nibbles ^ OTHER_HALF;
    first = look_up<BITS>(t, nibbles, flipped);
    second = look_up<BITS>(t, upper_half(nibbles), BITS == 4 ? upper_half(flipped) : 0);
}

template <int BITS>
__device__ __forceinline__ Levels<BITS> look_up_wide(const Tables& t, uint32_t upper, uint32_t flipped, uint32_t index, uint32_t flipped_index) {
    using Base = BaseHalves<BITS>;
    using Fine = FineHalves<BITS>;
    return {{prmt(t.base[BITS][0], Base::word(0, 1), upper), prmt(t.base[BITS][1], Base::word(1, 1), flipped),
             prmt(t.fine[BITS][0], Fine::word(0, 1), index), prmt(t.fine[BITS][1], Fine::word(1, 1), flipped_index)}};
}

// Eight codes of five or six bits: the four upper bits, and the lower ones at bit 0 of each nibble (with anything above). First their
// numbers in the table of fine parts.
template <int BITS>
__device__ __forceinline__ uint32_t wide_index(uint32_t upper, uint32_t low) { return pick_bits(low, upper, BITS == 5 ? 0x11111111u : 0x33333333u); }
// And their levels.
template <int BITS>
__device__ __forceinline__ void look_up_wide_word(const Tables& t, uint32_t upper, uint32_t low, Levels<BITS>& first, Levels<BITS>& second) {
    const uint32_t index = wide_index<BITS>(upper, low);
    const uint32_t flipped = upper ^ OTHER_HALF, flipped_index = index ^ OTHER_HALF;
    first = look_up_wide<BITS>(t, upper, flipped, index, flipped_index);
    second = look_up_wide<BITS>(t, upper_half(upper), upper_half(flipped), upper_half(index), upper_half(flipped_index));
}

// Puts a 2-bit plane's part and a 1-bit plane's part of a 3-bit code together; each already stands four bits apart.
__device__ __forceinline__ uint32_t join_3(uint32_t two, uint32_t one) {
    return (two << 1 & 0x66666666u) | (one & 0x11111111u);
}

// Where the rows of a warp's 32 keys lie. A matrix of ldmatrix is eight keys that follow each other, and banks repeat after
// 128 bytes. Rows of an odd number of chunks meet in no bank. Others lie without padding, as one copy of many leaves them: two
// to a bank at best, but four or eight if their chunks are a multiple of four. Those lie spread: in runs of RUN with a gap of a
// chunk behind each, and a matrix takes rows out of all runs.
struct KeyRows {
    static constexpr uint32_t RUN = 16, OF_RUN = RUN / 4;
    uint32_t stride;
    bool spread;
    uint32_t of_lane;  // offset of key `lane`

    __device__ __forceinline__ KeyRows(uint32_t stride, bool spread, int lane) : stride(stride), spread(spread), of_lane(offset(lane)) {}

    __device__ __forceinline__ uint32_t row(uint32_t key) const {
        return spread ? key % 8 / OF_RUN * RUN + key / 8 * OF_RUN + key % OF_RUN : key;
    }
    __device__ __forceinline__ uint32_t gaps(uint32_t row) const { return spread ? row / RUN * 16 : 0; }
    __device__ __forceinline__ uint32_t offset(uint32_t key) const { return row(key) * stride + gaps(row(key)); }
    // From key g < 8 to key 8 matrix + g; from an even key to the next it is a stride.
    __device__ __forceinline__ uint32_t to_matrix(uint32_t matrix) const { return matrix * (spread ? OF_RUN : 8) * stride; }
    // Bytes of 32 rows.
    __device__ __forceinline__ uint32_t bytes() const { return 32 * stride + gaps(32); }
};

__device__ __forceinline__ uint32_t shared_half(const uint8_t* at) { return *reinterpret_cast<const uint16_t*>(at); }
template <bool ALIGNED>
__device__ __forceinline__ uint32_t shared_word(const uint8_t* at) {
    if constexpr (ALIGNED) return *reinterpret_cast<const uint32_t*>(at);
    return shared_half(at) | shared_half(at + 2) << 16;
}

// ---- Keys ----

// Word w of a plane of BITS bits and N channels, of a row whose plane starts at `plane`: the bits of the channels 4 w ... 4 w + 3
// and of those N / 2 further on, from bit 0 of each nibble; higher bits of the nibbles are left as they come. Of eight bits, the
// former alone.
template <bool ALIGNED, int N, int BITS>
__device__ __forceinline__ uint32_t plane_word(const uint8_t* plane, int w) {
    constexpr int BYTES = N * BITS / 8;
    const int first = 4 * w;
    if constexpr (BITS == 4 || BITS == 8) {
        return shared_word<ALIGNED>(plane + first);
    } else if constexpr (BYTES % 4 == 0) {
        return shared_word<ALIGNED>(plane + first % BYTES) >> (BITS * (first / BYTES));
    } else {
        uint32_t r = 0;
        DQ_UNROLL
        for (int b = 0; b < 4; b++) {
            r |= (uint32_t(plane[(first + b) % BYTES]) >> (BITS * ((first + b) / BYTES)) & 0xFF) << (8 * b);
        }
        return r;
    }
}

// Item t = 4 group + q of a plane of BITS bits and N channels, for 32 keys: r[i] holds the bits of its eight channels of key
// 8 i + g, shifted down so that they start at bit 0 of each nibble; higher bits of the nibbles are left as they come.
// `stage` is the first row.
template <bool ALIGNED, int N, int BITS, int GROUP>
__device__ __forceinline__ void key_bits(uint32_t (&r)[4], const uint8_t* stage, const KeyRows& rows, uint32_t plane, int lane) {
    constexpr int BYTES = N * BITS / 8;
    int w = lane & 3;
    // Beyond the tier: any codes do, the folded query is zero there.
    if constexpr (N % 32 != 0 && GROUP == N / 32) {
        if (4 * GROUP + w >= N / 8) w = 0;
    }
    if constexpr (ALIGNED && BYTES % 16 == 0 && N % 32 == 0) {
        // The same words of the plane serve several groups, at another shift.
        ldmatrix(r, stage + rows.of_lane + plane + 16 * GROUP % BYTES);
        constexpr int SHIFT = BITS < 4 ? BITS * (16 * GROUP / BYTES) : 0;
        if constexpr (SHIFT > 0) {
            DQ_UNROLL
            for (int i = 0; i < 4; i++) r[i] >>= SHIFT;
        }
        return;
    }
    const uint8_t* key = stage + rows.offset(lane >> 2) + plane;
    DQ_UNROLL
    for (int i = 0; i < 4; i++) r[i] = plane_word<ALIGNED, N, BITS>(key + rows.to_matrix(i), 4 * GROUP + w);
}

// The two quads of a word, of whose planes `upper` is the first and `low` the second: the one of the lower bits, or of the
// channels N / 2 further on where a code is a byte.
template <int BITS>
__device__ __forceinline__ void word_levels(const Tables& t, uint32_t upper, uint32_t low, Levels<BITS>& first, Levels<BITS>& second) {
    if constexpr (BITS == 8) {
        const uint32_t a = upper ^ 0x80808080u, b = low ^ 0x80808080u;
        first = {{prmt(a, b, 0x5140)}};
        second = {{prmt(a, b, 0x7362)}};
    } else if constexpr (BITS == 3) {
        look_up_word<3>(t, join_3(upper, low), first, second);
    } else if constexpr (planes_of(BITS) == 2) {
        look_up_wide_word<BITS>(t, upper, low, first, second);
    } else {
        look_up_word<BITS>(t, BITS == 2 ? upper & 0x33333333u : upper, first, second);
    }
}

// Levels of word q of a group: the two quads of key 8 i + g.
template <class S, int TIER, int GROUP>
__device__ __forceinline__ void key_levels(const Tables& t, Levels<S::bits(TIER)> (&first)[4], Levels<S::bits(TIER)> (&second)[4], const uint8_t* stage, const KeyRows& rows, const uint32_t* planes, int lane) {
    constexpr int N = S::channels(TIER), BITS = S::bits(TIER), P = S::plane_index(TIER, 0);
    uint32_t upper[4], low[4] = {};
    key_bits<S::aligned, N, plane_bits(BITS, 0), GROUP>(upper, stage, rows, planes[P], lane);
    if constexpr (BITS == 8) key_bits<S::aligned, N, 8, GROUP>(low, stage, rows, planes[P] + N / 2, lane);
    if constexpr (planes_of(BITS) == 2) key_bits<S::aligned, N, plane_bits(BITS, 1), GROUP>(low, stage, rows, planes[P + 1], lane);
    DQ_UNROLL
    for (int i = 0; i < 4; i++) word_levels<BITS>(t, upper[i], low[i], first[i], second[i]);
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
// unit 8 GROUP + g, shifted down as in `key_bits`. `stage` is the first row.
template <bool ALIGNED, int N, int BITS, int GROUP>
__device__ __forceinline__ void value_bits(uint32_t (&r)[4], const uint8_t* stage, const KeyRows& rows, uint32_t plane, int lane) {
    constexpr int BYTES = N * BITS / 8;
    int g = lane >> 2, q = lane & 3;
    if constexpr (ALIGNED && BYTES % 16 == 0) {
        ldmatrix_trans(r, stage + rows.of_lane + plane + 16 * GROUP % BYTES);
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
            const uint8_t* key = stage + rows.offset(2 * q) + rows.to_matrix(i) + plane + at;
            r[i] = (shared_half(key) | shared_half(key + rows.stride) << 16) >> shift;
        }
    }
}

// A fragments, as the sum of parts, of a group's two m blocks: rows g and g + 8 of block e are the channels 2u + e and
// 2u + e + n/2.
template <int PARTS> struct ValueFragments {
    uint32_t part[PARTS][2][4];
};

// Eight keys' worth of four nibble channels: r0 has keys 2q, 2q+1, r1 has 2q+8, 2q+9. Gathers each channel's four keys.
//   even: low half channel nibble 0, high half nibble 2;   odd: nibbles 1 and 3
__device__ __forceinline__ void transpose_nibbles(uint32_t r0, uint32_t r1, uint32_t& even, uint32_t& odd) {
    const uint32_t e = pick_bits(r0, r1 << 4, 0x0F0F0F0Fu), o = pick_bits(r0 >> 4, r1, 0x0F0F0F0Fu);
    even = prmt(e, e, 0x3120);
    odd = prmt(o, o, 0x3120);
}

template <class S, int TIER, int GROUP>
__device__ __forceinline__ void value_levels(const Tables& t, ValueFragments<parts_of(S::bits(TIER))>& f, const uint8_t* stage, const KeyRows& rows, const uint32_t* planes, int lane) {
    constexpr int N = S::channels(TIER), BITS = S::bits(TIER), P = S::plane_index(TIER, 0);
    static_assert(BITS != 5 && BITS != 6, "tiers are for keys");
    if constexpr (BITS == 8) {
        // Unit u holds the channels 2u and 2u + 1 themselves; unit u + n/4 those n/2 further on.
        DQ_UNROLL
        for (int upper = 0; upper < 2; upper++) {
            uint32_t r[4];
            value_bits<S::aligned, N / 2, 8, GROUP>(r, stage, rows, planes[P] + upper * (N / 2), lane);
            DQ_UNROLL
            for (int i = 0; i < 2; i++) {
                uint32_t a = r[2 * i] ^ 0x80808080u, b = r[2 * i + 1] ^ 0x80808080u;
                f.part[0][0][2 * i + upper] = prmt(a, b, 0x6240);
                f.part[0][1][2 * i + upper] = prmt(a, b, 0x7351);
            }
        }
    } else {
        uint32_t r[4];
        if constexpr (BITS == 3) {
            uint32_t one[4];
            value_bits<S::aligned, N, 2, GROUP>(r, stage, rows, planes[P], lane);
            value_bits<S::aligned, N, 1, GROUP>(one, stage, rows, planes[P + 1], lane);
            DQ_UNROLL
            for (int i = 0; i < 4; i++) r[i] = join_3(r[i], one[i]);
        } else {
            value_bits<S::aligned, N, BITS, GROUP>(r, stage, rows, planes[P], lane);
        }
        if constexpr (BITS == 2) {
            DQ_UNROLL
            for (int i = 0; i < 4; i++) r[i] &= 0x33333333u;
        }
        DQ_UNROLL
        for (int i = 0; i < 2; i++) {
            uint32_t even, odd;
            transpose_nibbles(r[2 * i], r[2 * i + 1], even, odd);
            Levels<BITS> first[2], second[2];
            look_up_word<BITS>(t, even, first[0], second[0]);
            look_up_word<BITS>(t, odd, first[1], second[1]);
            DQ_UNROLL
            for (int p = 0; p < parts_of(BITS); p++) {
                DQ_UNROLL
                for (int row = 0; row < 2; row++) {
                    f.part[p][0][2 * i + row] = first[row].part[p];
                    f.part[p][1][2 * i + row] = second[row].part[p];
                }
            }
        }
    }
}

}  // namespace dq
