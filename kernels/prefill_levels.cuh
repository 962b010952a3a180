// Levels of a tile of keys, looked up once for all rows of a block of the kernel for many queries and put into shared memory: those of
// keys as bytes, for scores that are as exact as elsewhere, from folded queries of two bytes; those of values as f16, which
// holds them exactly, so that the weighted sums stay in the f32 of the tensor cores.
#pragma once
#include "codes.cuh"

namespace dq {

// Bytes in shared memory, rows of D elements of SIZE bytes, and where a row's place lies. For mma of warps there is an odd number of
// chunks from row to row, so that the rows of a matrix meet in no bank. For those of warp groups they are in panels of 128
// bytes a row (64 where there is no more), as `GroupMatrix` has it.
template <int D, int SIZE, int ROWS, bool GROUPS>
struct LevelRows {
    static constexpr int STRIDE = (D * SIZE / 16 | 1) * 16, bytes = ROWS * (GROUPS ? D * SIZE : STRIDE);
    static constexpr int LINE = D * SIZE < 128 ? D * SIZE : 128;
    static constexpr bool can_be_panels = D * SIZE % LINE == 0 && (LINE == 128 || LINE == 64);
    __device__ static __forceinline__ uint32_t at(uint32_t row, uint32_t place) {
        const uint32_t byte = place * SIZE;
        if constexpr (!GROUPS) return row * STRIDE + byte;
        else return line(row, byte) + (byte % LINE ^ chunk_swizzle<LINE>(row));
    }
    // Where the matrix of the rows from this one, a multiple of eight, and the places from this one on begins.
    __device__ static __forceinline__ uint32_t matrix(uint32_t row, uint32_t place) {
        return line(row, place * SIZE) + place * SIZE % LINE;
    }

  private:
    __device__ static __forceinline__ uint32_t line(uint32_t row, uint32_t byte) { return (byte / LINE * ROWS + row) * LINE; }
};

// Rows of queries of a warp.
constexpr int PREFILL_ROWS = 16;

// Where a warp group looks levels up for others: barriers of a buffer's keys (and scales and sets), and of its values. They are there, and
// all are done with them. Each lane arrives for what it has itself written or read.
struct LevelBarriers {
    enum { KEYS_THERE, KEYS_DONE, VALUES_THERE, VALUES_DONE, COUNT };
    uint64_t* at;
    __device__ __forceinline__ LevelBarriers of(uint32_t buffer) const { return {at + COUNT * buffer}; }
    __device__ __forceinline__ void init(uint32_t groups) const {
        barrier_init(at + KEYS_THERE, 128), barrier_init(at + KEYS_DONE, 128 * groups);
        barrier_init(at + VALUES_THERE, 128), barrier_init(at + VALUES_DONE, 128 * groups);
    }
    __device__ __forceinline__ void arrive(int which) const { barrier_arrive(at + which); }
    __device__ __forceinline__ void wait(int which, uint32_t parity) const { barrier_wait(at + which, parity); }
};
// Whose turn it is of the buffers, and which phase of its barriers the next one is: of being there, or of being done with, which for the first
// tiles is over before it began.
template <class Tile> struct BufferTurn {
    uint32_t buffer = 0, parity;
    __device__ __forceinline__ explicit BufferTurn(bool ahead) : parity(ahead) {}
    __device__ __forceinline__ void next() {
        if (++buffer == Tile::BUFFERS) buffer = 0, parity ^= 1;
    }
};

// Folded queries of a warp group, of one linear part, in shared memory: high bytes, and behind these low ones.
template <class K> struct QueryRows : LevelRows<K::D, 1, 4 * PREFILL_ROWS, true> {
    static constexpr int slot = 2 * QueryRows::bytes;
};

// What a block has, whose size is that of the larger side. IN_GROUPS: whether mma are those of warp groups, four warps that do all things
// together.
template <int DK, int DV> constexpr bool prefill_groups() {
    return HAS_GROUP_MMA && LevelRows<DK, 1, 8, true>::can_be_panels && LevelRows<DV, 2, 8, true>::can_be_panels;
}
template <class K, class V, bool IN_GROUPS = prefill_groups<K::D, V::D>()>
struct PrefillTile {
    static constexpr bool GROUPS = IN_GROUPS;
    static constexpr int D = K::D > V::D ? K::D : V::D;
    // What the registers of a multiprocessor have room for: a row's output, and for mma of warps its query. Rows of a warp.
    static constexpr int WARPS = D <= 64 && !GROUPS ? 16 : D <= 128 ? 12 : 8, ROWS = PREFILL_ROWS;
    // Threads of a block, at most: where there are warp groups one more looks levels up, for which otherwise all do.
    static constexpr int THREADS = 32 * (WARPS + (GROUPS ? 4 : 0));
    // Registers of a thread that looks levels up, and of the others.
    static constexpr int FEW_REGISTERS = D <= 128 ? 56 : 72, MANY_REGISTERS = D <= 128 ? 152 : 216;
    static_assert(!GROUPS || 4 * FEW_REGISTERS + WARPS * MANY_REGISTERS <= THREADS / 32 * (65536 / THREADS / 8 * 8), "or some wait for ever");
    // Warps that have rows, of this block, and threads that look levels up.
    __device__ static __forceinline__ uint32_t row_warps() { return GROUPS ? WARPS : blockDim.x >> 5; }
    __device__ static __forceinline__ uint32_t workers() { return GROUPS ? 128 : blockDim.x; }
    // Keys whose levels are looked up at once, tiles of them that have a place in shared memory, and keys that a warp takes in at a time.
    static constexpr int KEYS = D <= 128 ? 64 : 32, BUFFERS = GROUPS && D <= 128 ? 3 : 2, STEP = GROUPS ? KEYS : 32;
    using KeyLevels = LevelRows<K::D, 1, KEYS, GROUPS>;
    using ValueLevels = LevelRows<V::D, 2, KEYS, GROUPS>;
    // Bytes of a tile's levels, scales and sets, and where they begin.
    static constexpr int values = KeyLevels::bytes, scales = values + ValueLevels::bytes, sets = scales + 2 * KEYS * 4;
    static constexpr int alignment = GROUPS ? 1024 : 16, bytes = (sets + KEYS + alignment - 1) / alignment * alignment;
    // Bytes of a warp group's folded queries, of one linear part.
    static constexpr int query_slot = GROUPS ? QueryRows<K>::slot : 0;
    // Chunks of a row in a stage, at most: each part of it may begin and end within one.
    static constexpr int MOST_CHUNKS = 64;
    static constexpr int chunks = (K::row_bytes + V::row_bytes) / 16 + 2 * (K::planes() + V::planes() + 2);
    static_assert(chunks <= MOST_CHUNKS, "");
};

// A table of sixteen entries as two of eight, as `Halves`, but whose look-ups are joined by XOR in place of a sum: where entries k and
// 8 + k have one sign, the second one is kept flipped if they are negative, since the first half gives -1 then.
template <class Entries> struct Twins {
    __host__ __device__ static constexpr int byte(int half, int k) { return half == 0 ? Entries::at(k) : Entries::at(8 + k) ^ (Entries::at(k) < 0 ? -1 : 0); }
    __host__ __device__ static constexpr uint32_t word(int half, int i) {
        return four_bytes(byte(half, 4 * i), byte(half, 4 * i + 1), byte(half, 4 * i + 2), byte(half, 4 * i + 3));
    }
    __host__ __device__ static constexpr bool hold() {
        for (int k = 0; k < 8; k++) {
            if ((Entries::at(k) < 0) != (Entries::at(8 + k) < 0)) return false;
        }
        return true;
    }
    // Of four numbers, and of the same with bit 3 flipped.
    __device__ static __forceinline__ uint32_t look_up(uint32_t numbers, uint32_t flipped) {
        static_assert(hold(), "");
        return prmt(word(0, 0), word(0, 1), numbers) ^ prmt(word(1, 0), word(1, 1), flipped);
    }
};

// Four levels, a byte each; `flipped` and the rest as `look_up_word` has them.
template <int BITS>
__device__ __forceinline__ uint32_t base_bytes(uint32_t numbers, uint32_t flipped) {
    if constexpr (Twins<BaseEntries<BITS>>::hold()) {
        return Twins<BaseEntries<BITS>>::look_up(numbers, flipped);
    } else {
        using Base = BaseHalves<BITS>;
        return add_bytes(prmt(Base::word(0, 0), Base::word(0, 1), numbers), prmt(Base::word(1, 0), Base::word(1, 1), flipped));
    }
}
// The two quads of a word.
template <int BITS>
__device__ __forceinline__ void word_bytes(const Tables& tables, uint32_t upper, uint32_t low, uint32_t& first, uint32_t& second) {
    if constexpr (BITS == 4 || BITS == 5 || BITS == 6) {
        const uint32_t flipped = upper ^ OTHER_HALF;
        first = base_bytes<BITS>(upper, flipped), second = base_bytes<BITS>(upper_half(upper), upper_half(flipped));
        if constexpr (BITS > 4) {
            using Fine = Twins<FineEntries<BITS>>;
            const uint32_t index = wide_index<BITS>(upper, low), flipped_index = index ^ OTHER_HALF;
            first = add_bytes(first, Fine::look_up(index, flipped_index));
            second = add_bytes(second, Fine::look_up(upper_half(index), upper_half(flipped_index)));
        }
    } else {
        Levels<BITS> quads[2];
        word_levels<BITS>(tables, upper, low, quads[0], quads[1]);
        first = quads[0].part[0], second = quads[1].part[0];
    }
}
// The same as f16.
__device__ __forceinline__ uint2 halves_of(uint32_t bytes) {
    // A byte below the exponent of 1024 counts ones; all are 128 too large then.
    const uint32_t biased = bytes ^ 0x80808080u, both = 0x64646464u, excess = 0x64806480u;
    return make_uint2(subtract_halves(prmt(biased, both, 0x4140), excess), subtract_halves(prmt(biased, both, 0x4342), excess));
}

// This thread's number of those that look levels up. Where they do nothing else it has a register. Elsewhere what follows from it is
// worked out anew behind each `here`: registers are too few to keep it, and where it would be kept instead is further away.
template <class Tile> struct Worker {
    uint32_t number;
    __device__ __forceinline__ Worker() : number(threadIdx.x % 128) { work_out_here(number); }
    __device__ __forceinline__ uint32_t here() const {
        if constexpr (Tile::GROUPS) return number;
        uint32_t thread = threadIdx.x;
        work_out_here(thread);
        return thread;
    }
};
// A thread's number of so many, counted from thread `first` on.
__device__ __forceinline__ uint32_t counted_from(uint32_t thread, uint32_t first, uint32_t threads) {
    return thread < first ? thread + threads - first : thread - first;
}

// Levels of a side's rows in a stage, by all that look them up: a thread has one word of each so many rows. `put(key, place, first quad, second
// quad)`. `first` is the thread that begins; returns the one that is next, so that tiers of few words do not all go to the same
// threads.
template <class S, class Tile, class Put>
__device__ __forceinline__ uint32_t look_up_rows(const Worker<Tile>& worker, const uint8_t* stage, uint32_t stride, const uint32_t* planes, const Tables& tables, uint32_t first, Put&& put) {
    const uint32_t threads = Tile::workers(), here = worker.here();
    for_each<S::tiers>([&](auto tier) {
        constexpr int T = decltype(tier)::value, N = S::channels(T), BITS = S::bits(T), P = S::plane_index(T, 0), WORDS = N / 8;
        const uint32_t thread = counted_from(here, first, threads), w = thread % WORDS, at_a_time = threads / WORDS;
        const uint8_t* row = stage + thread / WORDS * stride;
        auto load = [&](uint32_t& upper, uint32_t& low) {
            upper = plane_word<S::aligned, N, plane_bits(BITS, 0)>(row + planes[P], w);
            if constexpr (BITS == 8) low = plane_word<S::aligned, N, 8>(row + planes[P] + N / 2, w);
            if constexpr (planes_of(BITS) == 2) low = plane_word<S::aligned, N, plane_bits(BITS, 1)>(row + planes[P + 1], w);
            row += at_a_time * stride;
        };
        auto look_up = [&](uint32_t key, uint32_t upper, uint32_t low) {
            uint32_t quads[2];
            word_bytes<BITS>(tables, upper, low, quads[0], quads[1]);
            put(key, S::first(T) + 8 * w, quads[0], quads[1]);
        };
        if constexpr (Tile::GROUPS && 128 % WORDS == 0 && Tile::KEYS * WORDS % 128 == 0) {
            // All is known but the thread: no loop; and words are on their way together, since the compiler leaves loads behind what
            // is stored.
            constexpr int TURNS = Tile::KEYS * WORDS / 128;
            uint32_t upper[TURNS], low[TURNS] = {};
            DQ_UNROLL
            for (int i = 0; i < TURNS; i++) load(upper[i], low[i]);
            DQ_UNROLL
            for (int i = 0; i < TURNS; i++) look_up(thread / WORDS + i * (128 / WORDS), upper[i], low[i]);
        } else {
            DQ_UNROLL_BY_1
            for (uint32_t key = thread / WORDS; key < Tile::KEYS && thread < at_a_time * WORDS; key += at_a_time) {
                uint32_t upper, low = 0;
                load(upper, low);
                look_up(key, upper, low);
            }
        }
        first = (first + Tile::KEYS * WORDS) % threads;
    });
    return first;
}

}  // namespace dq
