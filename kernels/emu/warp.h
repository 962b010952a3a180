// Warp collectives: shuffles, votes, mma, ldmatrix, movmatrix. Each is a rendezvous of the lanes in its mask; the last
// lane to arrive carries it out for all.
#pragma once
#include "block.h"
#include "types.h"

namespace emu {

using Lanes = void* (&)[32];
using Collective = void (*)(Lanes payloads, uint32_t mask);

// Waits for the lanes of `mask` and lets `run` work on their payloads, which live on their stacks.
inline void meet(Collective run, uint32_t mask, void* payload, const char* file, int line) {
    Thread& t = me();
    Block& b = *block();
    unsigned lane = t.id & 31, first = t.id & ~31u;
    t.collective = reinterpret_cast<const void*>(run);
    t.mask = mask;
    t.payload = payload;
    t.file = file;
    t.line = line;
    t.state = State::InWarp;
    if (!(mask >> lane & 1)) die("the calling lane is not in the mask");
    uint32_t here = 0;
    void* payloads[32] = {};
    for (unsigned l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        if (first + l >= b.threads.size()) die("the mask names a lane beyond the block");
        Thread& other = b.threads[first + l];
        if (other.state == State::InWarp) {
            // Lanes that meet without this one may still come here.
            if (!(other.mask >> lane & 1)) continue;
            if (other.collective != t.collective || other.mask != mask || other.line != line) {
                die("lanes of one mask are in different collectives");
            }
            payloads[l] = other.payload;
            here |= 1u << l;
        } else if (other.state == State::Done) {
            die("a lane of the mask has exited");
        } else if (other.state == State::InBlock) {
            die("a lane of the mask waits at __syncthreads");
        }
    }
    if (here != mask) return yield();
    run(payloads, mask);
    for (unsigned l = 0; l < 32; l++) {
        if (mask >> l & 1) b.threads[first + l].state = State::Runs;
    }
}

inline void need_full_warp(uint32_t mask) {
    if (mask != ~0u) die("mma, ldmatrix and movmatrix need the full warp");
}

template <class T>
struct ShufflePayload {
    T value, result;
    unsigned width;
    int operand;
};

// `source` maps (lane, operand, first lane of the segment, width) to a lane.
template <class T, unsigned (*source)(unsigned, int, unsigned, unsigned)>
T shuffle(uint32_t mask, T value, int operand, unsigned width, const char* file, int line) {
    ShufflePayload<T> p{value, value, width, operand};
    meet(
        [](Lanes lanes, uint32_t mask) {
            for (unsigned l = 0; l < 32; l++) {
                if (!(mask >> l & 1)) continue;
                auto* mine = static_cast<ShufflePayload<T>*>(lanes[l]);
                unsigned from = source(l, mine->operand, l & ~(mine->width - 1), mine->width) & 31;
                if (!(mask >> from & 1)) die("a shuffle reads a lane outside the mask");
                mine->result = static_cast<ShufflePayload<T>*>(lanes[from])->value;
            }
        },
        mask, &p, file, line);
    return p.result;
}

inline unsigned from_index(unsigned, int s, unsigned base, unsigned width) { return base + (s & (width - 1)); }
inline unsigned from_xor(unsigned lane, int s, unsigned base, unsigned width) {
    unsigned from = lane ^ s;
    return from >= base + width ? lane : from;
}
inline unsigned from_down(unsigned lane, int s, unsigned base, unsigned width) {
    unsigned from = lane + s;
    return from >= base + width ? lane : from;
}
inline unsigned from_up(unsigned lane, int s, unsigned base, unsigned) {
    return int(lane) - s < int(base) ? lane : lane - s;
}

struct VotePayload {
    bool value;
    uint32_t result;
};

inline uint32_t ballot(uint32_t mask, bool value, const char* file, int line) {
    VotePayload p{value, 0};
    meet(
        [](Lanes lanes, uint32_t mask) {
            uint32_t votes = 0;
            for (unsigned l = 0; l < 32; l++) {
                if (mask >> l & 1) votes |= uint32_t(static_cast<VotePayload*>(lanes[l])->value) << l;
            }
            for (unsigned l = 0; l < 32; l++) {
                if (mask >> l & 1) static_cast<VotePayload*>(lanes[l])->result = votes;
            }
        },
        mask, &p, file, line);
    return p.result;
}

// D[16][8] = A[16][K] B[K][8] + C, fragments as the PTX ISA lays them out (lane = 4 g + q):
//   A register i: row g + 8 (i & 1), elements E q ... E q + E - 1 of half i >> 1 of K   (E elements to a register)
//   B register i: column g, elements E q ... of half i of K
//   C register i: row g + 8 (i >> 1), column 2 q + (i & 1)
template <class C>
struct MmaPayload {
    const uint32_t* a;
    const uint32_t* b;
    C* c;
};

template <class C, int E, class ReadA, class ReadB>
void run_mma(Lanes lanes, ReadA read_a, ReadB read_b) {
    constexpr int K = 8 * E;
    using Sum = std::conditional_t<std::is_integral_v<C>, int64_t, double>;
    static Sum a[16][K], b[K][8];
    for (int l = 0; l < 32; l++) {
        auto* p = static_cast<MmaPayload<C>*>(lanes[l]);
        int g = l >> 2, q = l & 3;
        for (int e = 0; e < E; e++) {
            for (int i = 0; i < 4; i++) a[g + 8 * (i & 1)][E * q + e + 4 * E * (i >> 1)] = read_a(p->a[i], e);
            for (int i = 0; i < 2; i++) b[E * q + e + 4 * E * i][g] = read_b(p->b[i], e);
        }
    }
    for (int l = 0; l < 32; l++) {
        auto* p = static_cast<MmaPayload<C>*>(lanes[l]);
        int g = l >> 2, q = l & 3;
        for (int i = 0; i < 4; i++) {
            Sum sum = p->c[i];
            for (int k = 0; k < K; k++) sum += a[g + 8 * (i >> 1)][k] * b[k][2 * q + (i & 1)];
            if constexpr (std::is_integral_v<C>) {
                if (sum != C(sum)) die("an integer mma overflows");
            }
            p->c[i] = C(sum);
        }
    }
}

inline double read_half(uint32_t reg, int e) { return half_bits_to_float(uint16_t(reg >> (16 * e))); }
inline double read_bf16(uint32_t reg, int e) { return bf16_bits_to_float(uint16_t(reg >> (16 * e))); }
inline int64_t read_s8(uint32_t reg, int e) { return int8_t(reg >> (8 * e)); }
inline int64_t read_u8(uint32_t reg, int e) { return uint8_t(reg >> (8 * e)); }

struct MatrixPayload {
    const void* row;
    uint32_t* out;
    int n;
    bool transposed;
};

// n 8x8 matrices of b16; lanes 8 i ... 8 i + 7 name the rows of matrix i. Lane (g, q) gets row g, columns 2 q and
// 2 q + 1; transposed: column g, rows 2 q and 2 q + 1.
inline void run_ldmatrix(Lanes lanes, uint32_t mask) {
    need_full_warp(mask);
    int n = static_cast<MatrixPayload*>(lanes[0])->n;
    for (int l = 0; l < 32; l++) {
        auto* p = static_cast<MatrixPayload*>(lanes[l]);
        int g = l >> 2, q = l & 3;
        for (int i = 0; i < n; i++) {
            uint16_t pair[2];
            for (int h = 0; h < 2; h++) {
                int row = p->transposed ? 2 * q + h : g, col = p->transposed ? g : 2 * q + h;
                auto* source = static_cast<const char*>(static_cast<MatrixPayload*>(lanes[8 * i + row])->row);
                std::memcpy(&pair[h], source + 2 * col, 2);
            }
            p->out[i] = pair[0] | uint32_t(pair[1]) << 16;
        }
    }
}

struct MovePayload {
    uint32_t in, out;
};

inline void run_movmatrix(Lanes lanes, uint32_t mask) {
    need_full_warp(mask);
    for (int l = 0; l < 32; l++) {
        int g = l >> 2, q = l & 3;
        uint32_t pair[2];
        // Element [row][col] of the source sits in lane 4 row + col / 2, half col & 1.
        for (int h = 0; h < 2; h++) {
            pair[h] = static_cast<MovePayload*>(lanes[4 * (2 * q + h) + g / 2])->in >> (16 * (g & 1)) & 0xFFFF;
        }
        static_cast<MovePayload*>(lanes[l])->out = pair[0] | pair[1] << 16;
    }
}

struct ReducePayload {
    uint32_t value;
};

template <class Join>
uint32_t reduce(Join, uint32_t mask, uint32_t value, const char* file, int line) {
    ReducePayload p{value};
    meet(
        [](Lanes lanes, uint32_t mask) {
            uint32_t all = 0;
            for (unsigned l = 0; l < 32; l++) {
                if (mask >> l & 1) all = Join()(all, static_cast<ReducePayload*>(lanes[l])->value);
            }
            for (unsigned l = 0; l < 32; l++) {
                if (mask >> l & 1) static_cast<ReducePayload*>(lanes[l])->value = all;
            }
        },
        mask, &p, file, line);
    return p.value;
}
struct Or { uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; } };
struct Max { uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; } };

}  // namespace emu

inline void __syncwarp(uint32_t mask = ~0u, EMU_CALLER) {
    emu::meet([](emu::Lanes, uint32_t) {}, mask, nullptr, file, line);
}
template <class T>
T __shfl_sync(uint32_t mask, T v, int s, int width = 32, EMU_CALLER) {
    return emu::shuffle<T, emu::from_index>(mask, v, s, width, file, line);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int s, int width = 32, EMU_CALLER) {
    return emu::shuffle<T, emu::from_xor>(mask, v, s, width, file, line);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned s, int width = 32, EMU_CALLER) {
    return emu::shuffle<T, emu::from_down>(mask, v, int(s), width, file, line);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned s, int width = 32, EMU_CALLER) {
    return emu::shuffle<T, emu::from_up>(mask, v, int(s), width, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int v, EMU_CALLER) { return emu::ballot(mask, v != 0, file, line); }
inline int __any_sync(uint32_t mask, int v, EMU_CALLER) { return emu::ballot(mask, v != 0, file, line) != 0; }
inline int __all_sync(uint32_t mask, int v, EMU_CALLER) { return emu::ballot(mask, v != 0, file, line) == mask; }
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t v, EMU_CALLER) { return emu::reduce(emu::Or(), mask, v, file, line); }
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t v, EMU_CALLER) { return emu::reduce(emu::Max(), mask, v, file, line); }
