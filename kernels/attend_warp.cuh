// One warp, 32 keys of one head, 4 NT rows of queries (a row is a query and one of the head's query heads): scores, online
// softmax and weighted sums, all in the coded space. Kernels differ in where levels come from (`Source`) and in how keys
// and rows are dealt to warps.
//
// Registers of lane 4 g + q:
//   scores    keys g, g+8, g+16, g+24 of row q of each n tile
//   output    acc[b][i][n]: channel row g + 8 i of m block b, row q of n tile n
// Result of a part (what one warp saw), relative to its maximum m:
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

__host__ __device__ __forceinline__ uint32_t attend_parts(const DqAttend& p) { return p.v_transforms * p.n_splits * p.key_warps; }

// ---- Where levels come from ----

// Looked up by the warp that uses them, straight from a stage of rows.
template <class K, class V>
struct FromCodes {
    template <int BITS> static constexpr bool two_tables = Book<BITS>::two_tables;
    const uint8_t* rows;
    uint32_t stride;
    const RowImage<K, V>& image;
    int lane;

    // A fragments of one group of channels, keys 16 half ... 16 half + 15.
    template <int T, int G>
    __device__ __forceinline__ void keys(int half, uint32_t (&high)[4], uint32_t (&low)[4]) const {
        const uint8_t* upper = rows + (16 * half + (lane >> 2)) * stride;
        Levels a0, a1, a2, a3;
        key_levels<K, T, G>(upper, image.k_planes, lane & 3, a0, a2);
        key_levels<K, T, G>(upper + 8 * stride, image.k_planes, lane & 3, a1, a3);
        high[0] = a0.high, high[1] = a1.high, high[2] = a2.high, high[3] = a3.high;
        low[0] = a0.low, low[1] = a1.low, low[2] = a2.low, low[3] = a3.low;
    }
    template <int T, int G>
    __device__ __forceinline__ void values(ValueFragments& f) const {
        value_levels<V, T, G>(f, rows, stride, image.v_planes, lane);
    }
};

// ---- Folded queries in registers ----

template <class K, int NT>
struct Query {
    uint32_t b[NT][K::groups][2];
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
            step[n] = p.folded_scales[at * 4 + (lane & 3)];
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
    Query<K, NT> query;
    float m[NT], sum[NT], acc[BLOCKS][2][NT];
    bool sums_used;

    __device__ __forceinline__ AttendWarp(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t row_tile, uint32_t v_transform, int lane, float* sums)
        : p(p), stream(stream), head(head), row_tile(row_tile), v_transform(v_transform), n_q(queries_of(p, stream).count), lane(lane), g(lane >> 2), q(lane & 3),
          sums(sums), k_sets(p.k.heads[head]), v_sets(p.v.heads[head]), sums_used(false) {
        for (int i = lane; i < DQ_MAX_SETS * 4 * NT; i += 32) sums[i] = 0.0f;
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            m[n] = NEVER, sum[n] = 0.0f;
            DQ_UNROLL
            for (int b = 0; b < BLOCKS; b++) acc[b][0][n] = acc[b][1][n] = 0.0f;
        }
        __syncwarp();
        // Most rows are in the newest sets.
        k_set = header_set(k_sets.newest), v_set = header_set(v_sets.newest);
        query.load(p, stream, head, transform_of(k_sets, k_set), row_tile * NT, lane);
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
    template <class Source>
    __device__ __forceinline__ void dot_keys(float (&dots)[NT][4], const Source& source) const {
        // Not unrolled: with both halves' loads in flight the registers would not suffice for two blocks to an SM.
        DQ_UNROLL_BY_1
        for (int half = 0; half < 2; half++) {
            int32_t high[NT][4] = {}, low[NT][4] = {};
            for_each<K::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value;
                for_each<(K::channels(T) + 31) / 32>([&](auto group) {
                    constexpr int G = decltype(group)::value, KG = K::groups_before(T) + G;
                    uint32_t a[4], a_low[4];
                    source.template keys<T, G>(half, a, a_low);
                    DQ_UNROLL
                    for (int n = 0; n < NT; n++) mma_s8_s8(high[n], a, query.b[n][KG]);
                    if constexpr (Source::template two_tables<K::bits(T)>) {
                        DQ_UNROLL
                        for (int n = 0; n < NT; n++) mma_s8_s8(low[n], a_low, query.b[n][KG]);
                    }
                });
            });
            // Columns 2q and 2q + 1 are the high and the low byte of row q.
            DQ_UNROLL
            for (int n = 0; n < NT; n++) {
                const float upper = float((high[n][0] - low[n][0]) * 256 + (high[n][1] - low[n][1])) * query.step[n];
                const float lower = float((high[n][2] - low[n][2]) * 256 + (high[n][3] - low[n][3])) * query.step[n];
                if (half == 0) dots[n][0] = upper, dots[n][1] = lower;
                else dots[n][2] = upper, dots[n][3] = lower;
            }
        }
    }

    // Takes in 32 keys from `first_key`; their headers start at `rows`, a row every `stride` bytes.
    template <class Source>
    __device__ __forceinline__ void take(const Source& source, const uint8_t* rows, uint32_t stride, uint32_t k_headers, uint32_t v_headers, uint32_t first_key, uint32_t n_keys) {
        // What the mask adds. Where it hides everything, nothing is looked at.
        float added[NT][4] = {};
        if (p.mask != nullptr || p.lengths != nullptr || first_key + KEYS_PER_WARP > n_keys) {
            bool visible = false;
            DQ_UNROLL
            for (int n = 0; n < NT; n++) {
                const uint32_t token = (row_tile * 4 * NT + 4 * n + q) / p.group;
                DQ_UNROLL
                for (int i = 0; i < 4; i++) {
                    added[n][i] = mask_of(p, stream, token < n_q ? token : n_q - 1, n_q, first_key + g + 8 * i, n_keys);
                    visible |= added[n][i] > NEVER;
                }
            }
            if (!__any_sync(ALL_LANES, visible)) return;
        }

        // Headers. Usually the whole tile is in the sets at hand.
        uint32_t k_header[4], v_header[4], strange = 0;
        DQ_UNROLL
        for (int i = 0; i < 4; i++) {
            const uint8_t* row = rows + (g + 8 * i) * stride;
            k_header[i] = shared_half(row + k_headers);
            v_header[i] = shared_half(row + v_headers);
            strange |= (k_header[i] ^ k_set) | (v_header[i] ^ v_set) << 16;
        }
        const bool usual = __all_sync(ALL_LANES, (strange & 0x000F000F) == 0);

        // Scores, in units of log2.
        float s[NT][4];
        {
            uint32_t left = 1u << k_set;
            if (!usual) {
                uint32_t mine = 0;
                DQ_UNROLL
                for (int i = 0; i < 4; i++) mine |= 1u << header_set(k_header[i]);
                left = __reduce_or_sync(ALL_LANES, mine);
            }
            float dots[NT][4];
            bool fresh = false;
            while (left != 0) {
                const uint32_t set = __ffs(left) - 1;
                left &= left - 1;
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
                    if (header_set(k_header[i]) != set) continue;
                    DQ_UNROLL
                    for (int n = 0; n < NT; n++) s[n][i] = dots[n][i] * header_scale(k_header[i]) + query.constant[n];
                }
            }
        }
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            DQ_UNROLL
            for (int i = 0; i < 4; i++) {
                if (p.softcap > 0.0f) s[n][i] = tanh_fast(s[n][i]) * (p.softcap * LOG2_E);
                // A hidden key's record may hold anything; its score must not come through as NaN.
                s[n][i] = added[n][i] == NEVER ? NEVER : s[n][i] + added[n][i];
            }
        }

        // Weights relative to the running maximum.
        bool higher = false;
        float m_old[NT];
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            m_old[n] = m[n];
            m[n] = fmaxf(m[n], max_over_keys(fmaxf(fmaxf(s[n][0], s[n][1]), fmaxf(s[n][2], s[n][3]))));
            higher |= m[n] > m_old[n];
        }
        if (__any_sync(ALL_LANES, higher)) {
            DQ_UNROLL
            for (int n = 0; n < NT; n++) {
                const float shrink = m[n] > m_old[n] ? exp2_fast(m_old[n] - m[n]) : 1.0f;
                sum[n] *= shrink;
                DQ_UNROLL
                for (int b = 0; b < BLOCKS; b++) acc[b][0][n] *= shrink, acc[b][1][n] *= shrink;
                if (sums_used) {
                    for (int e = g; e < DQ_MAX_SETS; e += 8) sums[(e * NT + n) * 4 + q] *= shrink;
                }
            }
            __syncwarp();
        }
        float weight[NT][4];
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            const float base = m[n] == NEVER ? 0.0f : m[n];
            DQ_UNROLL
            for (int i = 0; i < 4; i++) weight[n][i] = exp2_fast(s[n][i] - base);
        }

        // Sums of weights per value set.
        if (usual) {
            DQ_UNROLL
            for (int n = 0; n < NT; n++) sum[n] += (weight[n][0] + weight[n][1]) + (weight[n][2] + weight[n][3]);
        } else {
            uint32_t mine = 0;
            DQ_UNROLL
            for (int i = 0; i < 4; i++) mine |= 1u << header_set(v_header[i]);
            for (uint32_t left = __reduce_or_sync(ALL_LANES, mine); left != 0; left &= left - 1) {
                const uint32_t set = __ffs(left) - 1;
                if (set != v_set) flush_sums();
                v_set = set;
                DQ_UNROLL
                for (int i = 0; i < 4; i++) {
                    if (header_set(v_header[i]) != set) continue;
                    DQ_UNROLL
                    for (int n = 0; n < NT; n++) sum[n] += weight[n][i];
                }
            }
        }

        // Weights times row scales, 16 bits, as B fragments: column 2q of the value mma is the high byte of
        // row q, column 2q + 1 the low one.
        uint32_t b[NT][2];
        float step[NT];
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            float largest = 0.0f;
            DQ_UNROLL
            for (int i = 0; i < 4; i++) {
                // A hidden key's record may hold anything: its scale must not meet a zero weight.
                bool counts = weight[n][i] > 0.0f;
                if (p.v_transforms > 1) counts = counts && transform_of(v_sets, header_set(v_header[i])) == v_transform;
                weight[n][i] = counts ? weight[n][i] * header_scale(v_header[i]) : 0.0f;
                largest = fmaxf(largest, weight[n][i]);
            }
            largest = max_over_keys(largest);
            const float inverse = largest > 1e-30f ? WEIGHT_RANGE * rcp_fast(largest) : 0.0f;
            step[n] = largest * (1.0f / WEIGHT_RANGE);
            uint32_t whole[4];
            DQ_UNROLL
            for (int i = 0; i < 4; i++) whole[i] = __float_as_uint(__fmaf_rn(weight[n][i], inverse, 8388608.0f));
            b[n][0] = movmatrix_trans(prmt(whole[0], whole[1], 0x4051));
            b[n][1] = movmatrix_trans(prmt(whole[2], whole[3], 0x4051));
        }

        // Weighted levels.
        for_each<V::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            for_each<(V::channels(T) + 31) / 32>([&](auto group) {
                constexpr int G = decltype(group)::value, BASE = 2 * (V::groups_before(T) + G);
                ValueFragments f;
                source.template values<T, G>(f);
                DQ_UNROLL
                for (int e = 0; e < 2; e++) {
                    DQ_UNROLL
                    for (int n = 0; n < NT; n++) {
                        int32_t high[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
                        mma_s8_u8(high, f.high[e], b[n]);
                        float from[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
                        if constexpr (Source::template two_tables<V::bits(T)>) {
                            int32_t low[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
                            mma_s8_u8(low, f.low[e], b[n]);
                            DQ_UNROLL
                            for (int i = 0; i < 4; i++) from[i] = __int_as_float(low[i]);
                        }
                        DQ_UNROLL
                        for (int i = 0; i < 2; i++) {
                            float& out = acc[BASE + e][i][n];
                            out = __fmaf_rn(__int_as_float(high[2 * i]) - from[2 * i], step[n] * 256.0f, out);
                            out = __fmaf_rn(__int_as_float(high[2 * i + 1]) - from[2 * i + 1], step[n], out);
                        }
                    }
                }
            });
        });
    }

    // Writes the part's result. Nothing but the maximum is read of a part that saw no key.
    __device__ __forceinline__ void finish(uint32_t part) {
        const uint32_t n_rows = p.n_q * p.group;
        flush_sums();
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            const uint32_t row = row_tile * 4 * NT + 4 * n + q;
            if (row >= n_q * p.group) continue;
            const uint64_t at = ((uint64_t(stream) * p.n_kv_heads + head) * n_rows + row) * attend_parts(p) + part;
            for (int e = g; e < DQ_MAX_SETS; e += 8) {
                const bool mine = p.v_transforms == 1 || transform_of(v_sets, e) == v_transform;
                p.partial_sums[at * SUMS + e] = mine ? sums[(e * NT + n) * 4 + q] : 0.0f;
            }
            if (g == 0) p.partial_sums[at * SUMS + DQ_MAX_SETS] = m[n];
            float* out = p.partial + at * V::D;
            for_each<V::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value, N = V::channels(T);
                for_each<(N + 31) / 32>([&](auto group) {
                    constexpr int G = decltype(group)::value, BASE = 2 * (V::groups_before(T) + G);
                    const int unit = 8 * G + g;
                    if (N % 32 != 0 && unit >= N / 4) return;
                    DQ_UNROLL
                    for (int i = 0; i < 2; i++) {
                        float* pair = out + V::first(T) + 2 * unit + i * (N / 2);
                        *reinterpret_cast<float2*>(pair) = {acc[BASE][i][n], acc[BASE + 1][i][n]};
                    }
                });
            });
        }
    }
};

}  // namespace dq
