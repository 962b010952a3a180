// New rows into records. The same bytes as src/cpu/encode.rs: every product is rounded before it is added, every sum has
// that file's order. Sixteen lanes code a row, as that file's sums have sixteen lanes: lane l holds the channels
// l, l + 16, l + 32, ...
//
// Grid: (runs of 16 * ROWS tokens, KV head, side), 256 threads: sixteen half warps with ROWS rows each, which share one
// pass over the encode matrix. Shared memory: the block's rows and their latents, f32 [16 ROWS][D] each; codes
// [16][FEEDBACK_SCALES][D]; stages of the matrix, f32 [ENCODE_STAGES][ENCODE_CHUNK][D], then the triangles of the feedback.
#pragma once
#include "rows.cuh"

namespace dq {

constexpr int ENCODE_HALVES = 16, ENCODE_THREADS = 16 * ENCODE_HALVES, ENCODE_CHUNK = 16, ENCODE_STAGES = 3;
constexpr float SWITCH = 0.5f;
constexpr float HUGE_ROW = 1e15f;
constexpr int MAX_SINKS = 4;
constexpr int N_MULTIPLES = 8, FEEDBACK_SCALES = 4;
__host__ __device__ constexpr float scale_multiple(int i) {
    return i < 4 ? (i == 0 ? 0.76f : i == 1 ? 0.83f : i == 2 ? 0.9f : 0.97f) : (i == 4 ? 1.04f : i == 5 ? 1.11f : i == 6 ? 1.18f : 1.26f);
}
__host__ __device__ constexpr float feedback_multiple(int i) { return i == 0 ? 0.94f : i == 1 ? 1.0f : i == 2 ? 1.06f : 1.12f; }
// Bytes to a channel for stages of the matrix or triangles: the most that the latter take, but for some of plan 102.
constexpr int ENCODE_SPARE = 200;
static_assert(ENCODE_STAGES * ENCODE_CHUNK * 4 <= ENCODE_SPARE, "");

// The mask of the sixteen lanes that work on one row: the two halves of a warp go their own ways.
__device__ __forceinline__ uint32_t half_mask(int lane) { return lane < 16 ? 0x0000FFFFu : 0xFFFF0000u; }

// Adds the lanes of a row; all get the sum. Halves fold in the order 8, 4, 2, 1.
__device__ __forceinline__ float fold_lanes(float v, uint32_t mask) {
    DQ_UNROLL
    for (int d = 8; d > 0; d /= 2) v = __fadd_rn(v, __shfl_xor_sync(mask, v, d));
    return v;
}
__device__ __forceinline__ float max_lanes(float v, uint32_t mask) {
    DQ_UNROLL
    for (int d = 8; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(mask, v, d));
    return v;
}
// sum over channels first .. first + n of term(k), k the index into the lane's channels.
template <int FIRST, int N, class Term>
__device__ __forceinline__ float sum_channels(uint32_t mask, Term&& term) {
    float sum = 0.0f;
    DQ_UNROLL
    for (int k = FIRST / 16; k < (FIRST + N) / 16; k++) sum = __fadd_rn(sum, term(k));
    return fold_lanes(sum, mask);
}

// ---- The rotation, y = H (signs x) / sqrt(D), in place ----

// Signs and the Paley factor come from the sign table: its first latent holds the signs, latents and channels at
// multiples of the run length hold Paley times signs.
template <int D> struct Rotation {
    static constexpr int M = D % 3 == 0 ? 12 : D % 5 == 0 ? 20 : 1, RUN = D / M, PER = D / 16, WORDS = (D + 31) / 32;

    __device__ static bool negative(const uint32_t* table, int latent, int channel) {
        return load_global(table + latent * WORDS + channel / 32) >> (channel % 32) & 1;
    }

    // `scratch` holds D floats of this row's own.
    __device__ __forceinline__ static void rotate(float (&x)[PER], const uint32_t* table, float* scratch, int l, uint32_t mask) {
        constexpr float INVERSE_ROOT = D == 64 ? 0.125f : D == 256 ? 0.0625f : D == 128 ? 0.088388347648318447f
            : D == 80 ? 0.1118033988749894848f : D == 96 ? 0.1020620726159657510f : 0.0721687836487032206f;
        DQ_UNROLL
        for (int k = 0; k < PER; k++) x[k] = __fmul_rn(x[k], negative(table, 0, l + 16 * k) ? -INVERSE_ROOT : INVERSE_ROOT);
        // Butterflies at strides 1, 2, 4, 8 across lanes, from 16 on within a lane; only within runs.
        DQ_UNROLL
        for (int d = 1; d < 16 && d < RUN; d *= 2) {
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                const float other = __shfl_xor_sync(mask, x[k], d);
                x[k] = l & d ? __fsub_rn(other, x[k]) : __fadd_rn(x[k], other);
            }
        }
        DQ_UNROLL
        for (int d = 16; d < RUN; d *= 2) {
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                if (k & (d / 16)) continue;
                const float a = x[k], b = x[k + d / 16];
                x[k] = __fadd_rn(a, b);
                x[k + d / 16] = __fsub_rn(a, b);
            }
        }
        if constexpr (M > 1) {
            // Paley's matrix across runs.
            DQ_UNROLL
            for (int k = 0; k < PER; k++) scratch[l + 16 * k] = x[k];
            __syncwarp(mask);
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                const int c = l + 16 * k, row = c / RUN, at = c % RUN;
                float sum = 0.0f;
                for (int col = 0; col < M; col++) {
                    const bool minus = negative(table, row * RUN, col * RUN) != negative(table, 0, col * RUN);
                    const float v = scratch[col * RUN + at];
                    sum = __fadd_rn(sum, minus ? -v : v);
                }
                x[k] = sum;
            }
            __syncwarp(mask);
        }
    }
};

// ---- Codes of one row ----

struct Header {
    uint32_t bits;
    bool saturated;
};
// See src/code/header.rs. `scale` is not negative.
__device__ __forceinline__ Header pack_header(float scale, uint32_t set) {
    const uint32_t rounded = (uint32_t(float_to_half(scale)) << 1) + 8, largest = 0xF7F0;
    const uint32_t kept = rounded < largest ? rounded : largest;
    return {(kept & 0xFFF0) | set, rounded >= largest + 16};
}

// Number of edges of the book below a magnitude, and the level there in units of a unit row.
template <int BITS>
__device__ __forceinline__ int nearest(float magnitude) {
    using B = Book<BITS>;
    int m = 0;
    for_each<(1 << (BITS - 1)) - 1>([&](auto i) {
        constexpr int I = decltype(i)::value;
        constexpr float edge = float((double(B::magnitude(I)) + double(B::magnitude(I + 1))) / 2.0 * B::exact_unit);
        m += magnitude > edge ? 1 : 0;
    });
    return m;
}
template <int BITS>
__device__ __forceinline__ float nearest_level(float y, float reach) {
    using B = Book<BITS>;
    const float magnitude = fabsf(__fmul_rn(y, reach));
    float steps = float(B::magnitude(0));
    for_each<(1 << (BITS - 1)) - 1>([&](auto i) {
        constexpr int I = decltype(i)::value;
        constexpr float edge = float((double(B::magnitude(I)) + double(B::magnitude(I + 1))) / 2.0 * B::exact_unit);
        if (magnitude > edge) steps = float(B::magnitude(I + 1));
    });
    return __fmul_rn(copysignf(steps, y), B::unit);
}

// ---- What the feedback reads ----

// Lower triangles, one to a tier, packed by rows behind a head's encode matrix. In shared memory, where they find room,
// rows are widened to whole runs of four.
template <class S> struct Triangles {
    __host__ __device__ static constexpr int row_at(int j) { return 4 * (j / 4 + 1) * (2 * (j / 4) + j % 4); }
    __host__ __device__ static constexpr int widened_before(int t) {
        int n = 0;
        for (int i = 0; i < t && S::tiers > 1; i++) n += row_at(S::channels(i));
        return n;
    }
    static constexpr bool fit_in = widened_before(S::tiers) * 4 <= ENCODE_SPARE * S::D;

    const float* packed;
    float* widened;

    // By the whole block, a row to a warp.
    __device__ __forceinline__ void fetch(int t) const {
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            for (int j = t / 32; j < S::channels(T); j += ENCODE_THREADS / 32) {
                const float* from = packed + S::feedback_before(T) + j * (j + 1) / 2;
                for (int k = t % 32; k <= j; k += 32) widened[widened_before(T) + row_at(j) + k] = load_global(from + k);
            }
        });
    }
    // Entries k ... k + 3 of row j, k a multiple of four; those beyond the diagonal may be anything.
    template <int T> __device__ __forceinline__ float4 four(int j, int k) const {
        if constexpr (fit_in) {
            return *reinterpret_cast<const float4*>(widened + widened_before(T) + row_at(j) + k);
        } else {
            const float* at = packed + S::feedback_before(T) + j * (j + 1) / 2 + k;
            return {load_global(at), load_global(at + 1), load_global(at + 2), load_global(at + 3)};
        }
    }
};

// Of each tier: levels of the positive half of its book in units of a unit row, and the edges between them.
template <class S> struct FeedbackBooks {
    float level[S::tiers][32], edge[S::tiers][32];

    __device__ __forceinline__ void fill(int t) {
        for_each<S::tiers>([&](auto tier) {
            using B = Book<S::bits(decltype(tier)::value)>;
            constexpr int T = decltype(tier)::value, HALF = 1 << (S::bits(T) - 1);
            if (t < 32) edge[T][t] = __builtin_huge_valf();
            for_each<HALF>([&](auto i) {
                constexpr int I = decltype(i)::value;
                if (t != I) return;
                level[T][I] = __fmul_rn(float(B::magnitude(I)), B::unit);
                if constexpr (I + 1 < HALF) edge[T][I] = float((double(B::magnitude(I)) + double(B::magnitude(I + 1))) / 2.0 * B::exact_unit);
            });
        });
    }
};

template <class S> struct RowCoder {
    static constexpr int D = S::D, PER = D / 16;

    // sum over tiers of weight[t] * (sum over the tier's channels of term<tier>(k))
    template <class Term>
    __device__ __forceinline__ static float over_tiers(const float (&weights)[S::tiers], uint32_t mask, Term&& term) {
        float sum = 0.0f;
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            const float part = sum_channels<S::first(T), S::channels(T)>(mask, [&](int k) { return term(tier, k); });
            sum = __fadd_rn(sum, __fmul_rn(weights[T], part));
        });
        return sum;
    }

    // Codes latents; `codes` gets a byte to a channel.
    __device__ __forceinline__ static Header code(const float (&y)[PER], uint32_t set, const float (&kappa)[S::tiers], uint8_t* codes, int l, uint32_t mask) {
        if constexpr (S::bits(0) == 8) {
            // The first scale of the header's that reaches the largest latent; codes against that very scale.
            using B = Book<8>;
            float largest = 0.0f;
            bool nan = false;
            DQ_UNROLL
            for (int k = 0; k < PER; k++) largest = fmaxf(largest, fabsf(y[k])), nan |= y[k] != y[k];
            largest = max_lanes(largest, mask);
            if (__any_sync(mask, nan)) largest = __int_as_float(0x7FC00000);
            const float scale = __fdiv_rn(largest, __fmul_rn(127.0f, B::unit));
            Header h = pack_header(scale > 3.402823466e38f ? 3.402823466e38f : scale, set);
            if (header_scale(h.bits) < scale && (h.bits & 0xFFF0) < 0xF7F0) h.bits += 16;
            const float step = __fmul_rn(header_scale(h.bits), B::unit), inverse = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                float level = rintf(__fmul_rn(y[k], inverse));
                level = level < -127.0f ? -127.0f : level > 127.0f ? 127.0f : level;
                codes[l + 16 * k] = level == level ? uint8_t(int(level) + 128) : 0;
            }
            return h;
        } else {
            // A few scales around the rms, each then such that the coded row is as long along the row; the least error after
            // rounding wins.
            const float rms = __fsqrt_rn(__fdiv_rn(sum_channels<0, D>(mask, [&](int k) { return __fmul_rn(y[k], y[k]); }), float(D)));
            Header best{set, false};
            float best_reach = 0.0f, best_error = 0.0f;
            if (rms > 0.0f) {
                const float energy = over_tiers(kappa, mask, [&](auto, int k) { return __fmul_rn(y[k], y[k]); });
                DQ_UNROLL_BY_1
                for (int i = 0; i < N_MULTIPLES; i++) {
                    const float reach = __fdiv_rn(1.0f, __fmul_rn(rms, scale_multiple(i)));
                    float level[PER];
                    for_each<S::tiers>([&](auto tier) {
                        constexpr int T = decltype(tier)::value;
                        DQ_UNROLL
                        for (int k = S::first(T) / 16; k < (S::first(T) + S::channels(T)) / 16; k++) level[k] = nearest_level<S::bits(T)>(y[k], reach);
                    });
                    const float projection = over_tiers(kappa, mask, [&](auto, int k) { return __fmul_rn(y[k], level[k]); });
                    float scale = __fdiv_rn(energy, projection);
                    scale = scale < 0.0f ? 0.0f : scale > 3.402823466e38f ? 3.402823466e38f : scale;
                    const Header h = pack_header(scale, set);
                    const float kept = header_scale(h.bits);
                    const float error = over_tiers(kappa, mask, [&](auto, int k) {
                        const float e = __fsub_rn(y[k], __fmul_rn(kept, level[k]));
                        return __fmul_rn(e, e);
                    });
                    if (i == 0 || error < best_error) best = h, best_reach = reach, best_error = error;
                }
            }
            for_each<S::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value, HALF = 1 << (S::bits(T) - 1);
                DQ_UNROLL
                for (int k = S::first(T) / 16; k < (S::first(T) + S::channels(T)) / 16; k++) {
                    const int m = nearest<S::bits(T)>(fabsf(__fmul_rn(y[k], best_reach)));
                    codes[l + 16 * k] = uint8_t(__float_as_uint(y[k]) >> 31 ? HALF - 1 - m : HALF + m);
                }
            });
            return best;
        }
    }

    // Codes a row anew, latent after latent, each against what the errors before it leave to be said (src/factor/fit.rs).
    // A few scales around the one found without; the least loss wins, at the scale that makes the targets' codes as long as
    // the targets. Four lanes to a scale: lane c of them holds the
    // latents c, c + 4, ... of a tier and tries every fourth edge of its book. `codes` [FEEDBACK_SCALES][D]; `slot` gets
    // the scale that won.
    __device__ __forceinline__ static Header feed_back(const float* latents, Header without, uint32_t set, const float (&kappa)[S::tiers], const Triangles<S>& triangles,
                                       const FeedbackBooks<S>& books, uint8_t* codes, int& slot, int l, uint32_t mask) {
        const int s = l >> 2, c = l & 3;
        const uint32_t mine = 0xFu << (threadIdx.x & 28);
        const Header header = pack_header(__fmul_rn(header_scale(without.bits), feedback_multiple(s)), set);
        const float scale = header_scale(header.bits), narrow = scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
        float cost = 0.0f, size = 0.0f, along = 0.0f;
        __syncwarp(mask);
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value, FIRST = S::first(T), BLOCKS = S::channels(T) / 4, HALF = 1 << (S::bits(T) - 1);
            constexpr int EDGES = HALF < 4 ? 1 : HALF / 4;
            // Codebook::widening
            const float inverse = __fmul_rn(narrow, __fadd_rn(1.0f, Book<S::bits(T)>::distortion));
            float edge[EDGES], target[BLOCKS], lost = 0.0f, tier_size = 0.0f, tier_along = 0.0f;
            DQ_UNROLL
            for (int e = 0; e < EDGES; e++) edge[e] = books.edge[T][4 * e + c];
            DQ_UNROLL
            for (int b = 0; b < BLOCKS; b++) target[b] = latents[FIRST + 4 * b + c];
            DQ_UNROLL_BY_1
            for (int block = 0; block < BLOCKS; block++) {
                // Four latents, one after the other, by all lanes of the scale.
                float four[4], error[4], weight[4][4], latent[4];
                auto load = [](float (&to)[4], const float4& v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; };
                load(latent, *reinterpret_cast<const float4*>(latents + FIRST + 4 * block));
                DQ_UNROLL
                for (int i = 0; i < 4; i++) {
                    four[i] = __shfl_sync(mask, target[0], i, 4);
                    load(weight[i], triangles.template four<T>(4 * block + i, 4 * block));
                }
                uint32_t word = 0;
                DQ_UNROLL
                for (int i = 0; i < 4; i++) {
                    const float magnitude = fabsf(__fmul_rn(four[i], inverse));
                    int above = 0;
                    DQ_UNROLL
                    for (int e = 0; e < EDGES; e++) above += __popc(__ballot_sync(mask, magnitude > edge[e]) & mine);
                    const float value = __fmul_rn(scale, copysignf(books.level[T][above], four[i])), left = __fsub_rn(value, four[i]);
                    error[i] = __fsub_rn(value, latent[i]);
                    lost = __fadd_rn(lost, __fmul_rn(weight[i][i], __fmul_rn(left, left)));
                    tier_size = __fadd_rn(tier_size, __fmul_rn(weight[i][i], __fmul_rn(four[i], four[i])));
                    tier_along = __fadd_rn(tier_along, __fmul_rn(weight[i][i], __fmul_rn(four[i], value)));
                    DQ_UNROLL
                    for (int k = i + 1; k < 4; k++) four[k] = __fsub_rn(four[k], __fmul_rn(weight[k][i], error[i]));
                    word |= uint32_t(__float_as_uint(four[i]) >> 31 ? HALF - 1 - above : HALF + above) << (8 * i);
                }
                if (c == 0) *reinterpret_cast<uint32_t*>(codes + s * D + FIRST + 4 * block) = word;
                // What these four take from the later ones; the next block's moves up.
                DQ_UNROLL
                for (int b = 1; b < BLOCKS; b++) {
                    if (block + b >= BLOCKS) continue;  // a break here puts arrays on the stack
                    load(weight[0], triangles.template four<T>(4 * (block + b) + c, 4 * block));
                    float v = target[b];
                    DQ_UNROLL
                    for (int i = 0; i < 4; i++) v = __fsub_rn(v, __fmul_rn(weight[0][i], error[i]));
                    target[b - 1] = v;
                }
            }
            cost = __fadd_rn(cost, __fmul_rn(kappa[T], lost));
            size = __fadd_rn(size, __fmul_rn(kappa[T], tier_size)), along = __fadd_rn(along, __fmul_rn(kappa[T], tier_along));
        });
        const float ratio = __fdiv_rn(size, along), unbiased = fabsf(ratio) <= 3.402823466e38f ? __fmul_rn(scale, ratio) : scale;
        const Header longer = pack_header(unbiased > 3.402823466e38f ? 3.402823466e38f : unbiased, set);
        const uint32_t final_bits = longer.saturated ? header.bits : longer.bits;
        // The first one never saturates where the scale without feedback does not.
        slot = 0;
        Header best{__shfl_sync(mask, final_bits, 0, 16), false};
        float best_cost = __shfl_sync(mask, cost, 0, 16);
        DQ_UNROLL
        for (int i = 1; i < FEEDBACK_SCALES; i++) {
            const float other = __shfl_sync(mask, header.saturated ? __builtin_huge_valf() : cost, 4 * i, 16);
            const uint32_t bits = __shfl_sync(mask, final_bits, 4 * i, 16);
            if (other < best_cost) best_cost = other, best.bits = bits, slot = i;
        }
        return best;
    }

    // Codes into the planes of a record.
    __device__ __forceinline__ static void write(const uint8_t* codes, uint8_t* record, uint32_t side, uint32_t n_kv, uint32_t head, int l) {
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            for_each<planes_of(S::bits(T))>([&](auto plane) {
                constexpr int P = decltype(plane)::value, BITS = plane_bits(S::bits(T), P), BYTES = S::head_bytes(T, P);
                // Bits of the code below this plane.
                constexpr int SHIFT = planes_of(S::bits(T)) == 2 && P == 0 ? plane_bits(S::bits(T), 1) : 0;
                uint8_t* out = record + side + n_kv * S::bytes_before(T, P) + head * BYTES;
                auto byte_at = [&](int j) {
                    uint32_t byte = 0;
                    DQ_UNROLL
                    for (int k = 0; k < 8 / BITS; k++) byte |= (codes[S::first(T) + j + k * BYTES] >> SHIFT & ((1u << BITS) - 1)) << (k * BITS);
                    return byte;
                };
                for (int j = 2 * l; j < BYTES; j += 32) {
                    *reinterpret_cast<uint16_t*>(out + j) = uint16_t(byte_at(j) | byte_at(j + 1) << 8);
                }
            });
        });
    }
};

// ---- Latents of the block's rows under a dense matrix ----

// In place: `rows` [ROWS][D] are centred rows, then latents. The whole block takes part; a thread has four channels of
// latents and a few rows. Products are rounded, and added in the order of the channels. Rows from `n` on are nobody's.
template <int D, int ROWS>
__device__ __forceinline__ void dense_latents(float* rows, const float* matrix, float* stages, uint32_t n) {
    constexpr int GROUPS = D / 4, SHARERS = ENCODE_THREADS / GROUPS, MINE = (ROWS + SHARERS - 1) / SHARERS, CHUNKS = D / ENCODE_CHUNK;
    const int t = threadIdx.x, channel = t % GROUPS * 4, first = t / GROUPS * MINE;
    const bool works = first < ROWS && uint32_t(first) < n;
    auto fetch = [&](int chunk) {
        float* stage = stages + chunk % ENCODE_STAGES * (ENCODE_CHUNK * D);
        for (int i = 4 * t; i < ENCODE_CHUNK * D && chunk < CHUNKS; i += 4 * ENCODE_THREADS) cp_async_16(stage + i, matrix + chunk * (ENCODE_CHUNK * D) + i);
        cp_async_commit();
    };
    DQ_UNROLL
    for (int s = 0; s < ENCODE_STAGES - 1; s++) fetch(s);
    float4 acc[MINE] = {};
    DQ_UNROLL_BY_1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        cp_async_wait<ENCODE_STAGES - 2>();
        // Also: the rows are there, and nobody reads the stage that is filled next.
        __syncthreads();
        fetch(chunk + ENCODE_STAGES - 1);
        if (!works) continue;
        const float* stage = stages + chunk % ENCODE_STAGES * (ENCODE_CHUNK * D) + channel;
        DQ_UNROLL_BY_4
        for (int i = 0; i < ENCODE_CHUNK; i += 4) {
            float4 weight[4];
            DQ_UNROLL
            for (int k = 0; k < 4; k++) weight[k] = *reinterpret_cast<const float4*>(stage + (i + k) * D);
            DQ_UNROLL
            for (int r = 0; r < MINE; r++) {
                if (ROWS % MINE != 0 && first + r >= ROWS) continue;
                const float4 x = *reinterpret_cast<const float4*>(rows + (first + r) * D + chunk * ENCODE_CHUNK + i);
                auto add = [&](float v, const float4& w) {
                    acc[r].x = __fadd_rn(acc[r].x, __fmul_rn(v, w.x)), acc[r].y = __fadd_rn(acc[r].y, __fmul_rn(v, w.y));
                    acc[r].z = __fadd_rn(acc[r].z, __fmul_rn(v, w.z)), acc[r].w = __fadd_rn(acc[r].w, __fmul_rn(v, w.w));
                };
                add(x.x, weight[0]), add(x.y, weight[1]), add(x.z, weight[2]), add(x.w, weight[3]);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    DQ_UNROLL
    for (int r = 0; r < MINE; r++) {
        if (works && (ROWS % MINE == 0 || first + r < ROWS)) *reinterpret_cast<float4*>(rows + (first + r) * D + channel) = acc[r];
    }
    __syncthreads();
}

// ---- The kernel's body for one side ----

template <class S, int ROWS>
__device__ __forceinline__ void encode_side(const DqEncode& p, const DqFactors& f, const DqRows& rows, uint32_t side, uint32_t headers, uint32_t slot_bytes, bool pad, uint8_t* shared) {
    constexpr int D = S::D, PER = D / 16;
    using Coder = RowCoder<S>;
    const int t = threadIdx.x, half = t >> 4, l = t & 15, lane = t & 31;
    const uint32_t mask = half_mask(lane), head = blockIdx.y, first = (blockIdx.x * ENCODE_HALVES + half) * ROWS;
    float* all_latents = reinterpret_cast<float*>(shared) + ENCODE_HALVES * ROWS * D;
    float* x = reinterpret_cast<float*>(shared) + half * ROWS * D;
    float* latents = all_latents + half * ROWS * D;
    uint8_t* codes = shared + ENCODE_HALVES * 2 * ROWS * D * 4 + half * FEEDBACK_SCALES * D;
    float* stages = reinterpret_cast<float*>(shared + ENCODE_HALVES * (2 * ROWS * D * 4 + FEEDBACK_SCALES * D));
    constexpr bool FEEDBACK = S::tiers > 1;
    __shared__ FeedbackBooks<S> books;

    const DqHeadSets& sets = f.heads[head];
    const uint32_t newest = header_set(sets.newest);
    const uint16_t* means = f.means + uint64_t(head) * DQ_MAX_SETS * D;
    float mean[PER];
    DQ_UNROLL
    for (int k = 0; k < PER; k++) mean[k] = half_to_float(load_global(means + newest * D + l + 16 * k));

    // Phase 1: the rows, made safe to compute with; NaN or infinity anywhere makes the row zero.
    uint32_t replaced = 0;
    for (int r = 0; r < ROWS; r++) {
        float v[PER], largest = 0.0f;
        bool bad = false;
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            v[k] = first + r < p.n ? load_row(rows, first + r, head, l + 16 * k) : 0.0f;
            bad |= !(fabsf(v[k]) <= 3.402823466e38f);
            largest = fmaxf(largest, fabsf(v[k]));
        }
        if (__any_sync(mask, bad)) {
            replaced |= 1u << r;
            DQ_UNROLL
            for (int k = 0; k < PER; k++) v[k] = 0.0f;
        } else {
            largest = max_lanes(largest, mask);
            if (largest > HUGE_ROW) {
                const float shrink = __fdiv_rn(HUGE_ROW, largest);
                DQ_UNROLL
                for (int k = 0; k < PER; k++) v[k] = __fmul_rn(v[k], shrink);
            }
        }
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            x[r * D + l + 16 * k] = v[k];
            if (sets.encode_dense) latents[r * D + l + 16 * k] = __fsub_rn(v[k], mean[k]);
        }
    }
    __syncwarp(mask);

    // Phase 2: latents under the newest set, and what the feedback reads.
    const uint32_t block_first = blockIdx.x * ENCODE_HALVES * ROWS;
    const float* matrix = f.encode + uint64_t(head) * S::encode_floats;
    const Triangles<S> triangles{matrix + D * D, stages};
    if (sets.encode_dense) {
        dense_latents<D, ENCODE_HALVES * ROWS>(all_latents, matrix, stages, p.n - block_first);
        if constexpr (FEEDBACK) {
            books.fill(t);
            if constexpr (Triangles<S>::fit_in) triangles.fetch(t);
            __syncthreads();
        }
    }
    if (first >= p.n) return;

    float kappa[S::tiers], expected[S::tiers], ones[S::tiers], distortion = 0.0f;
    for_each<S::tiers>([&](auto tier) {
        constexpr int T = decltype(tier)::value;
        kappa[T] = sets.kappa[T], ones[T] = 1.0f;
        expected[T] = __fmul_rn(kappa[T], Book<S::bits(T)>::distortion);
        distortion = __fadd_rn(distortion, __fmul_rn(float(S::channels(T)), Book<S::bits(T)>::distortion));
    });
    distortion = __fdiv_rn(distortion, float(D));

    DQ_UNROLL_BY_1
    for (int r = 0; r < ROWS; r++) {
        if (first + r >= p.n || !in_store(p.store, p.slots[first + r])) continue;
        uint8_t* record = p.store.data + uint64_t(p.slots[first + r]) * p.store.stride;
        float raw[PER], y[PER];
        DQ_UNROLL
        for (int k = 0; k < PER; k++) raw[k] = x[r * D + l + 16 * k];

        // Phase 3: which set. The newest, unless another promises less than half its error.
        bool use_other = true, bad_row = (replaced >> r & 1) != 0;
        uint32_t other = 0;
        int slot = 0;
        Header header{};
        if (!bad_row) {
            DQ_UNROLL
            for (int k = 0; k < PER; k++) y[k] = sets.encode_dense ? latents[r * D + l + 16 * k] : __fsub_rn(raw[k], mean[k]);
            if (!sets.encode_dense) Rotation<D>::rotate(y, f.rotation, latents + r * D, l, mask);
            const float cost = Coder::over_tiers(expected, mask, [&](auto, int k) { return __fmul_rn(y[k], y[k]); });
            float distance = sum_channels<0, D>(mask, [&](int k) { return __fmul_rn(raw[k], raw[k]); });
            uint32_t left = sets.sinks & sets.present;
            for (int n = 0; n < MAX_SINKS && left != 0; n++, left &= left - 1) {
                const uint32_t sink = __ffs(left) - 1;
                const float d = sum_channels<0, D>(mask, [&](int k) {
                    const float e = __fsub_rn(raw[k], half_to_float(load_global(means + sink * D + l + 16 * k)));
                    return __fmul_rn(e, e);
                });
                if (d < distance) distance = d, other = sink;
            }
            use_other = __fmul_rn(distance, distortion) < __fmul_rn(SWITCH, cost);
            if (!use_other) {
                header = Coder::code(y, newest, kappa, codes, l, mask);
                use_other = header.saturated;
                if constexpr (FEEDBACK) {
                    if (sets.encode_dense && !use_other) header = Coder::feed_back(latents + r * D, header, newest, kappa, triangles, books, codes, slot, l, mask);
                }
            }
        }

        // Phase 4: the rotation about zero or a sink, also the way out for a row that does not fit the newest set.
        if (use_other) {
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                y[k] = raw[k];
                if (other != 0) y[k] = __fsub_rn(y[k], half_to_float(load_global(means + other * D + l + 16 * k)));
            }
            if (bad_row) {
                DQ_UNROLL
                for (int k = 0; k < PER; k++) y[k] = 0.0f;
            } else {
                Rotation<D>::rotate(y, f.rotation, latents + r * D, l, mask);
            }
            header = Coder::code(y, other, ones, codes, l, mask);
            bad_row |= header.saturated;
        }
        __syncwarp(mask);

        // Phase 5: codes, header, and the pad behind the headers.
        Coder::write(codes + slot * D, record, side, p.n_kv_heads, head, l);
        if (l == 0) *reinterpret_cast<uint16_t*>(record + headers + 2 * head) = uint16_t(header.bits);
        if (pad && head == 0) {
            for (uint32_t b = headers + 2 * p.n_kv_heads + l; b < slot_bytes; b += 16) record[b] = 0;
        }
        if (bad_row && l == 0 && p.status != nullptr) atomicAdd(p.status, 1u);
        __syncwarp(mask);
    }
}

// Bytes of dynamic shared memory of a block.
template <class K, class V, int ROWS>
constexpr uint32_t encode_shared_bytes() {
    constexpr int D = K::D > V::D ? K::D : V::D;
    return ENCODE_HALVES * (2 * ROWS * 4 + FEEDBACK_SCALES) * D + ENCODE_SPARE * D;
}

template <class K, class V, int ROWS>
__device__ __forceinline__ void encode(const DqEncode& p) {
    DQ_DYNAMIC_SHARED(shared);
    using R = Record<K, V>;
    const uint32_t n = p.n_kv_heads;
    if (blockIdx.z == 0) encode_side<K, ROWS>(p, p.k, p.k_rows, 0, R::k_headers(n), 0, false, shared);
    else encode_side<V, ROWS>(p, p.v, p.v_rows, n * K::row_bytes, R::v_headers(n), R::bytes(n), true, shared);
}

}  // namespace dq
