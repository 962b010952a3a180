// New rows into records. The same bytes as src/cpu/encode.rs: every product is rounded before it is added, every sum has
// that file's order. Sixteen lanes code a row, as that file's sums have sixteen lanes: lane l holds the channels
// l, l + 16, l + 32, ...
//
// Grid: (runs of 16 * ROWS tokens, KV head, side), 256 threads: sixteen half warps with ROWS rows each, which share one
// pass over the encode matrix. Shared memory: per half warp the rows, then their latents, f32 [ROWS][D]; codes [D].
#pragma once
#include "rows.cuh"

namespace dq {

constexpr int ENCODE_HALVES = 16;
constexpr float SWITCH = 0.5f;
constexpr float HUGE_ROW = 1e15f;
constexpr int MAX_SINKS = 4;
constexpr int N_MULTIPLES = 8;
__host__ __device__ constexpr float scale_multiple(int i) {
    return i == 0 ? 0.76f : i == 1 ? 0.83f : i == 2 ? 0.9f : i == 3 ? 0.97f : i == 4 ? 1.04f : i == 5 ? 1.11f : i == 6 ? 1.18f : 1.26f;
}
constexpr int N_FEEDBACK_MULTIPLES = 4;
__host__ __device__ constexpr float feedback_multiple(int i) { return i == 0 ? 0.94f : i == 1 ? 1.0f : i == 2 ? 1.06f : 1.12f; }

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
    __device__ static void rotate(float (&x)[PER], const uint32_t* table, float* scratch, int l, uint32_t mask) {
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

template <class S> struct RowCoder {
    static constexpr int D = S::D, PER = D / 16;

    // sum over tiers of weight[t] * (sum over the tier's channels of term<tier>(k))
    template <class Term>
    __device__ static float over_tiers(const float (&weights)[S::tiers], uint32_t mask, Term&& term) {
        float sum = 0.0f;
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            const float part = sum_channels<S::first(T), S::channels(T)>(mask, [&](int k) { return term(tier, k); });
            sum = __fadd_rn(sum, __fmul_rn(weights[T], part));
        });
        return sum;
    }

    // Codes latents; `codes` gets a byte to a channel.
    __device__ static Header code(const float (&y)[PER], uint32_t set, const float (&kappa)[S::tiers], uint8_t* codes, int l, uint32_t mask) {
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
            // A few scales around the rms, each refined by least squares; the least error after rounding wins.
            const float rms = __fsqrt_rn(__fdiv_rn(sum_channels<0, D>(mask, [&](int k) { return __fmul_rn(y[k], y[k]); }), float(D)));
            Header best{set, false};
            float best_reach = 0.0f, best_error = 0.0f;
            if (rms > 0.0f) {
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
                    const float energy = over_tiers(kappa, mask, [&](auto, int k) { return __fmul_rn(level[k], level[k]); });
                    float scale = __fdiv_rn(projection, energy);
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

    // Codes latents anew, one after the other, each against what the errors before it leave to be said. `triangles`: the
    // feedback behind the encode matrix. All lanes follow each rounding; a lane keeps the targets of its channels.
    __device__ static Header feed_back(const float (&y)[PER], Header open, uint32_t set, const float (&kappa)[S::tiers], const float* triangles, uint8_t* codes, int l, int lane, uint32_t mask) {
        Header best = open;
        float best_cost = 0.0f;
        bool found = false;
        DQ_UNROLL_BY_1
        for (int i = 0; i < N_FEEDBACK_MULTIPLES; i++) {
            const Header h = pack_header(__fmul_rn(header_scale(open.bits), feedback_multiple(i)), set);
            if (h.saturated) continue;
            const float scale = header_scale(h.bits), inverse = scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
            float target[PER], cost = 0.0f;
            uint8_t mine[PER];
            DQ_UNROLL
            for (int k = 0; k < PER; k++) target[k] = y[k];
            for_each<S::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value, FIRST = S::first(T) / 16, END = FIRST + S::channels(T) / 16, HALF = 1 << (S::bits(T) - 1);
                const float* triangle = triangles + S::feedback_before(T);
                float lost = 0.0f;
                DQ_UNROLL
                for (int k = FIRST; k < END; k++) {
                    DQ_UNROLL_BY_1
                    for (int owner = 0; owner < 16; owner++) {
                        const int j = 16 * (k - FIRST) + owner, from = (lane & 16) | owner;
                        const float wanted = __shfl_sync(mask, target[k], from), latent = __shfl_sync(mask, y[k], from);
                        const float value = __fmul_rn(scale, nearest_level<S::bits(T)>(wanted, inverse));
                        const float left = __fsub_rn(value, wanted), error = __fsub_rn(value, latent);
                        lost = __fadd_rn(lost, __fmul_rn(load_global(triangle + j * (j + 1) / 2 + j), __fmul_rn(left, left)));
                        if (l == owner) {
                            const int m = nearest<S::bits(T)>(fabsf(__fmul_rn(wanted, inverse)));
                            mine[k] = uint8_t(__float_as_uint(wanted) >> 31 ? HALF - 1 - m : HALF + m);
                        }
                        DQ_UNROLL
                        for (int later = k; later < END; later++) {
                            const int row = 16 * (later - FIRST) + l;
                            if (row > j) target[later] = __fsub_rn(target[later], __fmul_rn(load_global(triangle + row * (row + 1) / 2 + j), error));
                        }
                    }
                }
                cost = __fadd_rn(cost, __fmul_rn(kappa[T], lost));
            });
            if (!found || cost < best_cost) {
                found = true, best = h, best_cost = cost;
                DQ_UNROLL
                for (int k = 0; k < PER; k++) codes[l + 16 * k] = mine[k];
            }
        }
        return best;
    }

    // Codes into the planes of a record.
    __device__ static void write(const uint8_t* codes, uint8_t* record, uint32_t side, uint32_t n_kv, uint32_t head, int l) {
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

// ---- The kernel's body for one side ----

template <class S, int ROWS>
__device__ __forceinline__ void encode_side(const DqEncode& p, const DqFactors& f, const DqRows& rows, uint32_t side, uint32_t headers, uint32_t slot_bytes, bool pad, uint8_t* shared) {
    constexpr int D = S::D, PER = D / 16;
    using Coder = RowCoder<S>;
    const int t = threadIdx.x, half = t >> 4, l = t & 15, lane = t & 31;
    const uint32_t mask = half_mask(lane), head = blockIdx.y, first = (blockIdx.x * ENCODE_HALVES + half) * ROWS;
    float* x = reinterpret_cast<float*>(shared) + half * 2 * ROWS * D;
    float* latents = x + ROWS * D;
    uint8_t* codes = shared + ENCODE_HALVES * 2 * ROWS * D * 4 + half * D;
    if (first >= p.n) return;

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
        for (int k = 0; k < PER; k++) x[r * D + l + 16 * k] = v[k];
    }
    __syncwarp(mask);

    // Phase 2: latents under the newest set.
    if (sets.encode_dense) {
        float acc[ROWS][PER] = {};
        const float* matrix = f.encode + uint64_t(head) * S::encode_floats;
        for (int i = 0; i < D; i++) {
            const float m = half_to_float(load_global(means + newest * D + i));
            float centred[ROWS];
            DQ_UNROLL
            for (int r = 0; r < ROWS; r++) centred[r] = __fsub_rn(x[r * D + i], m);
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                const float weight = load_global(matrix + i * D + l + 16 * k);
                DQ_UNROLL
                for (int r = 0; r < ROWS; r++) acc[r][k] = __fadd_rn(acc[r][k], __fmul_rn(centred[r], weight));
            }
        }
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            DQ_UNROLL
            for (int k = 0; k < PER; k++) latents[r * D + l + 16 * k] = acc[r][k];
        }
    }

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
                if constexpr (S::tiers > 1) {
                    if (!use_other && sets.encode_dense) {
                        const float* triangles = f.encode + uint64_t(head) * S::encode_floats + D * D;
                        header = Coder::feed_back(y, header, newest, kappa, triangles, codes, l, lane, mask);
                    }
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
        Coder::write(codes, record, side, p.n_kv_heads, head, l);
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
    return ENCODE_HALVES * (2 * ROWS * D * 4 + D);
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
