// One warp, 32 keys of one head, 4 NT rows of queries (a row is a query and one of the head's query heads): scores, online
// softmax and weighted sums, all in the coded space.
//
// Registers of lane 4 g + q:
//   scores    keys g, g+8, g+16, g+24 of row q of each n tile
//   output    acc[b][i][n]: channel row g + 8 i of m block b, row q of n tile n
// Result of a part (what one block saw of a head), relative to exp2(m), m a reference of its own:
//   partial       [row][part][channel of V] unnormalised, in steps of the book
//   partial_sums  [row][part][17]: the sum of weights per value set, then m
#pragma once
#include "attend_rows.cuh"

namespace dq {

constexpr int SUMS = DQ_MAX_SETS + 1;
// Weights are cut to 16 bits relative to the largest of the 32 keys.
constexpr float WEIGHT_RANGE = 65535.0f;
// As float, 1.5 * 2^23: an int32 accumulator that starts from these bits reads as a float when it has counted.
constexpr int32_t MAGIC_BITS = 0x4B400000;
constexpr float MAGIC = 12582912.0f;
// The running maximum may lag behind by as many powers of two.
constexpr float HEADROOM = 8.0f;

// A header's scale without the set, as the bits of an f32 that is too small by 2^112: no conversion, and never NaN.
constexpr float SCALE_UP = 5192296858534827628530496329220096.0f;
__device__ __forceinline__ float small_scale(uint32_t bits) { return __uint_as_float(bits << 12); }

// Parts of a row: those of coded keys, then those of the tail.
__host__ __device__ __forceinline__ uint32_t coded_parts(const DqAttend& p) { return p.v_transforms * p.n_splits; }
__host__ __device__ __forceinline__ uint32_t attend_parts(const DqAttend& p) { return coded_parts(p) + p.tail.parts; }

// Where the results of four NT rows go.
struct Results {
    float *values, *sums;
    uint64_t values_stride, sums_stride;
};
// A part of the rows from `first_row` on.
template <class V>
__device__ __forceinline__ Results results_of(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t first_row, uint32_t part) {
    const uint64_t parts = attend_parts(p), at = ((uint64_t(stream) * p.n_kv_heads + head) * (p.n_q * p.group) + first_row) * parts + part;
    return {p.partial + at * V::D, p.partial_sums + at * SUMS, parts * V::D, parts * SUMS};
}

// ---- Where levels come from ----

// Looked up by the warp that uses them, straight from a stage of rows.
template <class K, class V>
struct FromCodes {
    const uint8_t* stage;
    const KeyRows& rows;
    const RowImage<K, V>& image;
    const Tables& tables;
    int lane;

    // A fragments of one group of channels, as the sum of parts: those of the keys 0 ... 15, then 16 ... 31.
    template <int T, int G>
    __device__ __forceinline__ void keys(uint32_t (&a)[parts_of(K::bits(T))][2][4]) const {
        Levels<K::bits(T)> first[4], second[4];
        key_levels<K, T, G>(tables, first, second, stage, rows, image.k_planes, lane);
        DQ_UNROLL
        for (int p = 0; p < parts_of(K::bits(T)); p++) {
            DQ_UNROLL
            for (int key = 0; key < 4; key++) {
                a[p][key / 2][key % 2] = first[key].part[p];
                a[p][key / 2][2 + key % 2] = second[key].part[p];
            }
        }
    }
    template <int T, int G>
    __device__ __forceinline__ void values(ValueFragments<parts_of(V::bits(T))>& f) const {
        value_levels<V, T, G>(tables, f, stage, rows, image.v_planes, lane);
    }
};

// ---- Folded queries in registers ----

template <class K, int NT>
struct Query {
    uint32_t b[NT][K::groups][2];
    // `step` counts for scales that are too small by SCALE_UP.
    float step[NT], constant[NT];

    // Fragments and step of a linear part.
    __device__ __forceinline__ void load(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t transform, uint32_t tile, int lane) {
        const uint32_t n_tiles = p.row_tiles * NT;
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            const uint8_t* from = p.folded + folded_tile<K>(p, stream, head, transform, tile + n, n_tiles);
            DQ_UNROLL
            for (int g = 0; g < K::groups; g++) {
                uint2 both = *reinterpret_cast<const uint2*>(from + (g * 32 + lane) * 8);
                b[n][g][0] = both.x, b[n][g][1] = both.y;
            }
            uint64_t at = ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_TRANSFORMS + transform) * n_tiles + tile + n;
            step[n] = p.folded_scales[at * 4 + (lane & 3)] * SCALE_UP;
        }
    }

    __device__ __forceinline__ void load_constants(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t set, uint32_t tile, int lane) {
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            uint64_t at = ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_SETS + set) * (p.row_tiles * NT) + tile + n;
            constant[n] = p.constants[at * 4 + (lane & 3)];
        }
    }
};

// ---- The state of a warp ----

// exp2(v - base), where nothing seen so far weighs nothing.
__device__ __forceinline__ float weight_from(float v, float base) { return exp2_fast(v - (base == NEVER ? 0.0f : base)); }

// Maximum over the lanes that hold other keys of the same row.
__device__ __forceinline__ float max_over_keys(float v) {
    v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 4));
    v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 8));
    return fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 16));
}
__device__ __forceinline__ float sum_over_keys(float v) {
    v += __shfl_xor_sync(ALL_LANES, v, 4);
    v += __shfl_xor_sync(ALL_LANES, v, 8);
    return v + __shfl_xor_sync(ALL_LANES, v, 16);
}

template <class K, class V, int NT>
struct AttendWarp {
    static constexpr int BLOCKS = 2 * V::groups;

    const DqAttend& p;
    const uint32_t stream, head, row_tile, v_transform, n_q;
    const int lane, g, q;
    float* sums;  // shared, [set][4 NT], this warp's own: weights of earlier runs of keys, for the means of value sets
    const DqHeadSets& k_sets;
    const DqHeadSets& v_sets;
    uint32_t k_set, v_set;
    uint32_t seen_from, seen_to;  // keys that all queries see, but for a mask
    Query<K, NT> query;
    // Weights count from exp2(m); no score is above m + HEADROOM. `magic` is what every acc is too large by.
    float m[NT], sum[NT], acc[BLOCKS][2][NT], magic[NT];
    bool sums_used;

    __device__ __forceinline__ AttendWarp(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t row_tile, uint32_t v_transform, uint32_t n_keys, int lane, float* sums)
        : p(p), stream(stream), head(head), row_tile(row_tile), v_transform(v_transform), n_q(queries_of(p, stream).count),
          lane(lane), g(lane >> 2), q(lane & 3), sums(sums), k_sets(p.k.heads[head]), v_sets(p.v.heads[head]), seen_from(0), seen_to(n_keys), sums_used(false) {
        for (int i = lane; i < DQ_MAX_SETS * 4 * NT; i += 32) sums[i] = 0.0f;
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            m[n] = NEVER, sum[n] = magic[n] = 0.0f;
            DQ_UNROLL
            for (int b = 0; b < BLOCKS; b++) acc[b][0][n] = acc[b][1][n] = 0.0f;
        }
        if (p.lengths != nullptr) {
            const uint32_t n_all = n_keys + tail_of(p, stream).count, first_sees = n_all >= n_q ? n_all - n_q + 1 : 0;
            if (p.causal && first_sees < n_keys) seen_to = first_sees;
            if (p.window > 0 && n_all > uint32_t(p.window)) seen_from = n_all - p.window;
        }
        __syncwarp();
        // Most rows are in the newest sets.
        k_set = header_set(k_sets.newest), v_set = header_set(v_sets.newest);
    }

    // The query, folded for the newest set, whose linear part this is.
    __device__ __forceinline__ void load_query(uint32_t transform) {
        query.load(p, stream, head, transform, row_tile * NT, lane);
        query.load_constants(p, stream, head, k_set, row_tile * NT, lane);
    }

    // Moves the running sums of weights to the set they belong to.
    __device__ __forceinline__ void flush_sums() {
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            const float whole = sum_over_keys(sum[n]);
            if (g == 0) sums[(v_set * NT + n) * 4 + q] += whole;
            sum[n] = 0.0f;
        }
        sums_used = true;
        __syncwarp();
    }

    // Products of the levels of 32 keys with the folded rows: dots[n][i] for key g + 8 i, row q of n tile n.
    __device__ __forceinline__ void dot_keys(float (&dots)[NT][4], const FromCodes<K, V>& source) const {
        int32_t d[2][NT][4];
        DQ_UNROLL
        for (int half = 0; half < 2; half++) {
            DQ_UNROLL
            for (int n = 0; n < NT; n++) {
                DQ_UNROLL
                for (int i = 0; i < 4; i++) d[half][n][i] = 0;
            }
        }
        for_each<K::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            for_each<(K::channels(T) + 31) / 32>([&](auto group) {
                constexpr int G = decltype(group)::value, KG = K::groups_before(T) + G;
                constexpr int PARTS = parts_of(K::bits(T));
                uint32_t a[PARTS][2][4];
                source.template keys<T, G>(a);
                DQ_UNROLL
                for (int part = 0; part < PARTS; part++) {
                    DQ_UNROLL
                    for (int half = 0; half < 2; half++) {
                        DQ_UNROLL
                        for (int n = 0; n < NT; n++) mma_s8_s8(d[half][n], a[part][half], query.b[n][KG], d[half][n]);
                    }
                }
            });
        });
        // Columns 2q and 2q + 1 are the high and the low byte of row q.
        DQ_UNROLL
        for (int half = 0; half < 2; half++) {
            DQ_UNROLL
            for (int n = 0; n < NT; n++) {
                dots[n][2 * half] = float(d[half][n][0] * 256 + d[half][n][1]);
                dots[n][2 * half + 1] = float(d[half][n][2] * 256 + d[half][n][3]);
            }
        }
    }

    // Scores of keys in several sets, one set after the other; `header` is that of key `lane`.
    __device__ __forceinline__ void score_sets(float (&s)[NT][4], float (&dots)[NT][4], const FromCodes<K, V>& source, uint32_t header) {
        bool fresh = false;
        for (uint32_t left = __reduce_or_sync(ALL_LANES, 1u << header_set(header)); left != 0; left &= left - 1) {
            const uint32_t set = __ffs(left) - 1;
            if (set != k_set) {
                const uint32_t transform = transform_of(k_sets, set);
                if (transform != transform_of(k_sets, k_set)) {
                    query.load(p, stream, head, transform, row_tile * NT, lane);
                    fresh = false;
                }
                query.load_constants(p, stream, head, set, row_tile * NT, lane);
                k_set = set;
            }
            if (!fresh) dot_keys(dots, source);
            fresh = true;
            DQ_UNROLL
            for (int i = 0; i < 4; i++) {
                // Zero but for the scale where the key is in this set.
                const uint32_t bits = __shfl_sync(ALL_LANES, header, g + 8 * i) ^ set;
                if (header_set(bits) != 0) continue;
                DQ_UNROLL
                for (int n = 0; n < NT; n++) s[n][i] = __fmaf_rn(dots[n][i], small_scale(bits) * query.step[n], query.constant[n]);
            }
        }
    }

    // Sums of the weights of keys in several sets; `mine` is the set of key `lane`.
    __device__ __forceinline__ void sum_sets(const float (&weight)[NT][4], uint32_t mine) {
        for (uint32_t left = __reduce_or_sync(ALL_LANES, 1u << mine); left != 0; left &= left - 1) {
            const uint32_t set = __ffs(left) - 1;
            if (set != v_set) flush_sums();
            v_set = set;
            DQ_UNROLL
            for (int i = 0; i < 4; i++) {
                if (__shfl_sync(ALL_LANES, mine, g + 8 * i) != set) continue;
                DQ_UNROLL
                for (int n = 0; n < NT; n++) sum[n] += weight[n][i];
            }
        }
    }

    // Takes in 32 keys, whose rows are those from `first_key` on in the order of `rows`.
    __device__ __forceinline__ void take(const FromCodes<K, V>& source, const uint8_t* stage, const KeyRows& rows, uint32_t k_headers, uint32_t v_headers, uint32_t first_key, uint32_t n_keys) {
        // Headers of key `lane`, but for the set expected: usually that leaves the scale alone.
        uint32_t k_header = shared_half(stage + rows.of_lane + k_headers) ^ k_set;
        uint32_t v_header = shared_half(stage + rows.of_lane + v_headers) ^ v_set;

        // What the mask adds. Where it hides everything, nothing is looked at.
        const bool all_seen = p.mask == nullptr && first_key >= seen_from && first_key + KEYS_PER_WARP <= seen_to;
        float added[NT][4];
        if (!all_seen) {
            bool visible = false;
            DQ_UNROLL
            for (int n = 0; n < NT; n++) {
                const uint32_t token = (row_tile * 4 * NT + 4 * n + q) / p.group;
                DQ_UNROLL
                for (int i = 0; i < 4; i++) {
                    added[n][i] = mask_of(p, stream, token < n_q ? token : n_q - 1, n_q, first_key + rows.row(g + 8 * i), n_keys);
                    visible |= added[n][i] > NEVER;
                }
            }
            if (!__any_sync(ALL_LANES, visible)) return;
            // Behind the last key there may be anything.
            if (first_key + rows.row(lane) >= n_keys) k_header = v_header = 0;
        }
        const bool usual = __all_sync(ALL_LANES, ((k_header | v_header) & 15) == 0);

        // Scores, in units of log2.
        float s[NT][4], dots[NT][4];
        if (usual) {
            dot_keys(dots, source);
            const float mine = small_scale(k_header);
            DQ_UNROLL
            for (int i = 0; i < 4; i++) {
                const float scale = __shfl_sync(ALL_LANES, mine, g + 8 * i);
                DQ_UNROLL
                for (int n = 0; n < NT; n++) s[n][i] = __fmaf_rn(dots[n][i], scale * query.step[n], query.constant[n]);
            }
        } else {
            k_header ^= k_set, v_header ^= v_set;
            score_sets(s, dots, source, k_header);
        }
        if (p.softcap > 0.0f) {
            DQ_UNROLL
            for (int n = 0; n < NT; n++) {
                DQ_UNROLL
                for (int i = 0; i < 4; i++) s[n][i] = tanh_fast(s[n][i]) * (p.softcap * LOG2_E);
            }
        }
        if (!all_seen) {
            // A hidden key's record may hold anything; its score must not come through as NaN.
            DQ_UNROLL
            for (int n = 0; n < NT; n++) {
                DQ_UNROLL
                for (int i = 0; i < 4; i++) s[n][i] = added[n][i] == NEVER ? NEVER : s[n][i] + added[n][i];
            }
        }

        // Weights relative to a maximum that moves only when it must.
        float highest[NT];
        bool higher = false;
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            highest[n] = fmaxf(fmaxf(s[n][0], s[n][1]), fmaxf(s[n][2], s[n][3]));
            higher |= highest[n] > m[n] + HEADROOM;
        }
        if (__any_sync(ALL_LANES, higher)) raise(highest);
        float weight[NT][4];
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            const float base = m[n] == NEVER ? 0.0f : m[n];
            DQ_UNROLL
            for (int i = 0; i < 4; i++) weight[n][i] = exp2_fast(s[n][i] - base);
        }

        // Sums of weights per value set.
        float mine;
        if (usual) {
            DQ_UNROLL
            for (int n = 0; n < NT; n++) sum[n] += (weight[n][0] + weight[n][1]) + (weight[n][2] + weight[n][3]);
            mine = small_scale(v_header) * SCALE_UP;
            if (p.v_transforms > 1 && transform_of(v_sets, v_set) != v_transform) mine = 0.0f;
        } else {
            sum_sets(weight, header_set(v_header));
            mine = small_scale(v_header & 0xFFF0) * SCALE_UP;
            // Keys of another linear part are another block's.
            if (p.v_transforms > 1 && transform_of(v_sets, header_set(v_header)) != v_transform) mine = 0.0f;
        }
        float scale[4];
        DQ_UNROLL
        for (int i = 0; i < 4; i++) scale[i] = __shfl_sync(ALL_LANES, mine, g + 8 * i);

        // Weights times row scales, 16 bits, as B fragments: column 2q of the value mma is the high byte of
        // row q, column 2q + 1 the low one.
        uint32_t b[NT][2];
        float step[NT];
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            DQ_UNROLL
            for (int i = 0; i < 4; i++) weight[n][i] *= scale[i];
            const float largest = max_over_keys(fmaxf(fmaxf(weight[n][0], weight[n][1]), fmaxf(weight[n][2], weight[n][3])));
            const float inverse = largest > 1e-30f ? WEIGHT_RANGE * rcp_fast(largest) : 0.0f;
            step[n] = largest * (1.0f / WEIGHT_RANGE);
            magic[n] = __fmaf_rn(step[n], MAGIC, magic[n]);
            uint32_t whole[4];
            DQ_UNROLL
            for (int i = 0; i < 4; i++) whole[i] = __float_as_uint(__fmaf_rn(weight[n][i], inverse, 8388608.0f));
            b[n][0] = movmatrix_trans(prmt(whole[0], whole[1], 0x4051));
            b[n][1] = movmatrix_trans(prmt(whole[2], whole[3], 0x4051));
        }
        add_values(source, b, step);
    }

    // The maximum moves up to that of `highest` over the lanes.
    __device__ __forceinline__ void raise(const float (&highest)[NT]) {
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            const float before = m[n];
            m[n] = fmaxf(before, max_over_keys(highest[n]));
            const float shrink = m[n] > before ? exp2_fast(before - m[n]) : 1.0f;
            sum[n] *= shrink, magic[n] *= shrink;
            DQ_UNROLL
            for (int b = 0; b < BLOCKS; b++) acc[b][0][n] *= shrink, acc[b][1][n] *= shrink;
            if (sums_used) {
                for (int e = g; e < DQ_MAX_SETS; e += 8) sums[(e * NT + n) * 4 + q] *= shrink;
            }
        }
        __syncwarp();
    }

    // Adds step * (b times levels); b are the weights of 32 keys.
    __device__ __forceinline__ void add_values(const FromCodes<K, V>& source, const uint32_t (&b)[NT][2], const float (&step)[NT]) {
        const int32_t none[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
        for_each<V::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            constexpr int PARTS = parts_of(V::bits(T));
            for_each<(V::channels(T) + 31) / 32>([&](auto group) {
                constexpr int G = decltype(group)::value, BASE = 2 * (V::groups_before(T) + G);
                ValueFragments<PARTS> f;
                source.template values<T, G>(f);
                DQ_UNROLL
                for (int e = 0; e < 2; e++) {
                    DQ_UNROLL
                    for (int n = 0; n < NT; n++) {
                        int32_t d[4];
                        mma_s8_u8(d, f.part[0][e], b[n], none);
                        DQ_UNROLL
                        for (int part = 1; part < PARTS; part++) mma_s8_u8(d, f.part[part][e], b[n], d);
                        DQ_UNROLL
                        for (int i = 0; i < 2; i++) {
                            const float whole = __fmaf_rn(__int_as_float(d[2 * i]) - MAGIC, 256.0f, __int_as_float(d[2 * i + 1]));
                            acc[BASE + e][i][n] = __fmaf_rn(whole, step[n], acc[BASE + e][i][n]);
                        }
                    }
                }
            });
        });
    }

    // Writes the result, to rows of values and sums that lie so many floats apart; where no key was seen, zeros and the
    // maximum. Rows that do not exist are left out.
    __device__ __forceinline__ void finish(const Results& to) {
        flush_sums();
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            const uint32_t row = 4 * n + q;
            if (row_tile * 4 * NT + row >= n_q * p.group) continue;
            float* of_sets = to.sums + row * to.sums_stride;
            for (int e = g; e < DQ_MAX_SETS; e += 8) {
                const bool mine = p.v_transforms == 1 || transform_of(v_sets, e) == v_transform;
                of_sets[e] = mine ? sums[(e * NT + n) * 4 + q] : 0.0f;
            }
            if (g == 0) of_sets[DQ_MAX_SETS] = m[n];
            float* out = to.values + row * to.values_stride;
            for_each<V::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value, N = V::channels(T);
                for_each<(N + 31) / 32>([&](auto group) {
                    constexpr int G = decltype(group)::value, BASE = 2 * (V::groups_before(T) + G);
                    const int unit = 8 * G + g;
                    if (N % 32 != 0 && unit >= N / 4) return;
                    DQ_UNROLL
                    for (int i = 0; i < 2; i++) {
                        float* pair = out + V::first(T) + 2 * unit + i * (N / 2);
                        *reinterpret_cast<float2*>(pair) = {acc[BASE][i][n] - magic[n], acc[BASE + 1][i][n] - magic[n]};
                    }
                });
            });
        }
    }
};

}  // namespace dq
