// Attention of few queries over coded slots (decode). Codes are never decoded to values: scores are int8 products of
// levels with folded queries, the output gathers weighted levels in the coded space and is unfolded by merge.cuh.
//
// Block: `heads_per_block` KV heads times `key_warps` warps; a warp has one head, 4 NT rows of queries (a row is a query
// and one of the head's query heads) and 32 keys at a time. All warps of the block share stages of 32 * key_warps keys,
// copied with whole slots or runs of heads so that all sectors are used.
// Grid: (split of the keys, head group * row tiles, stream * v_transforms).
//
// Registers of lane 4 g + q:
//   scores    keys g, g+8, g+16, g+24 of row q (of each n tile)
//   output    acc[b][i]: channel row g + 8 i of m block b, row q
// Shared memory:
//   stages    [STAGES][32 * key_warps] rows of `row_stride` bytes, an odd multiple of 16 (no bank conflicts)
//   barriers  one per stage, for bulk copies
//   runs      where in a record the row's parts lie
//   sums      f32 [warp][set][4 NT]: weights of earlier runs of keys, for the means of the value sets
// Result per part (v_transform, split, key warp), relative to the part's maximum m:
//   partial       [row][part][channel of V] unnormalised, in steps of the book
//   partial_sums  [row][part][17]: the sum of weights per value set, then m
#pragma once
#include "codes.cuh"
#include "fold.cuh"

namespace dq {

constexpr int KEYS_PER_WARP = 32;
constexpr int SUMS = DQ_MAX_SETS + 1;
// Weights are cut to 16 bits relative to the largest of a warp's 32 keys.
constexpr float WEIGHT_RANGE = 65535.0f;
// As float, 1.5 * 2^23: an int32 accumulator that starts from these bits reads as a float when it has counted.
constexpr int32_t MAGIC_BITS = 0x4B400000;
constexpr float MAGIC = 12582912.0f;
constexpr float NEVER = -__builtin_huge_valf();

__host__ __device__ __forceinline__ uint32_t attend_parts(const DqAttend& p) { return p.v_transforms * p.n_splits * p.key_warps; }

// ---- The row of a stage: what of a record a head group needs ----

// A run of a record in the row; all in units of 16 bytes.
struct Run {
    uint16_t source, to, chunks, unused;
};
constexpr int MOST_RUNS = 16;

// Runs of bytes of a record, each widened to 16-byte chunks. Bases of one head's planes are offsets into the row.
template <class K, class V>
struct RowImage {
    static_assert(K::planes() + V::planes() + 2 <= MOST_RUNS, "");
    uint32_t k_planes[K::planes()], v_planes[V::planes()];
    uint32_t k_headers, v_headers;
    uint32_t runs, chunks;

    // Lays out the row of the heads first .. first + heads for one of them; `table` (may be null) gets the runs.
    __host__ __device__ void lay_out(uint32_t n_kv, uint32_t first, uint32_t heads, uint32_t head, Run* table) {
        runs = chunks = 0;
        if (heads == n_kv) {
            // The whole record, as it is.
            add_run(0, Record<K, V>::bytes(n_kv), 0, 1, 0, table);
            for (int i = 0; i < K::planes(); i++) k_planes[i] = plane_at<K>(n_kv, i) + head * plane_bytes<K>(i);
            for (int i = 0; i < V::planes(); i++) v_planes[i] = n_kv * K::row_bytes + plane_at<V>(n_kv, i) + head * plane_bytes<V>(i);
            k_headers = Record<K, V>::k_headers(n_kv) + 2 * head;
            v_headers = Record<K, V>::v_headers(n_kv) + 2 * head;
            return;
        }
        for (int i = 0; i < K::planes(); i++) {
            k_planes[i] = add_run(plane_at<K>(n_kv, i), plane_bytes<K>(i), first, heads, head, table);
        }
        for (int i = 0; i < V::planes(); i++) {
            v_planes[i] = add_run(n_kv * K::row_bytes + plane_at<V>(n_kv, i), plane_bytes<V>(i), first, heads, head, table);
        }
        k_headers = add_run(Record<K, V>::k_headers(n_kv), 2, first, heads, head, table);
        v_headers = add_run(Record<K, V>::v_headers(n_kv), 2, first, heads, head, table);
    }

    template <class S> __host__ __device__ static uint32_t plane_at(uint32_t n_kv, int plane) {
        int t = S::tier_of_plane(plane);
        return n_kv * S::bytes_before(t, plane - S::plane_index(t, 0));
    }
    template <class S> __host__ __device__ static uint32_t plane_bytes(int plane) {
        int t = S::tier_of_plane(plane);
        return S::head_bytes(t, plane - S::plane_index(t, 0));
    }

  private:
    __host__ __device__ uint32_t add_run(uint32_t at, uint32_t bytes, uint32_t first, uint32_t heads, uint32_t head, Run* table) {
        const uint32_t begin = at + first * bytes, aligned = begin / 16, length = (begin + heads * bytes + 15) / 16 - aligned;
        const uint32_t base = chunks * 16 + begin % 16 + (head - first) * bytes;
        if (table) table[runs] = {uint16_t(aligned), uint16_t(chunks), uint16_t(length), 0};
        runs++;
        chunks += length;
        return base;
    }
};

__host__ __device__ __forceinline__ uint32_t padded_row(uint32_t chunks) { return (chunks | 1) * 16; }

// ---- Which slot a key lives in ----

__device__ __forceinline__ uint64_t slot_of(const DqAttend& p, uint32_t stream, uint32_t key) {
    if (p.block_table == nullptr) return p.first_slot + stream * p.stream_slots + key;
    uint64_t block = p.block_table[stream * p.table_stride + (key >> p.block_shift)];
    return (block << p.block_shift) + (key & ((1u << p.block_shift) - 1));
}

// What is added to the score of (query, key): the mask in units of log2, or minus infinity.
__device__ __forceinline__ float mask_of(const DqAttend& p, uint32_t stream, uint32_t query, uint32_t key, uint32_t n_keys) {
    if (key >= n_keys) return NEVER;
    if (p.lengths != nullptr) {
        int64_t position = int64_t(n_keys) - p.n_q + query;
        if (p.causal && key > position) return NEVER;
        if (p.window > 0 && key + int64_t(p.window) <= position) return NEVER;
    }
    if (p.mask == nullptr) return 0.0f;
    uint64_t at = stream * p.mask_stream_stride + query * p.mask_query_stride;
    float v = p.mask_type == DQ_TYPE_F32 ? at_bytes<float>(p.mask, at + 4ull * key) : half_to_float(at_bytes<uint16_t>(p.mask, at + 2ull * key));
    return v * LOG2_E;
}

// The linear part of a set. Records under a mask may name any set: whatever comes, the answer is within the tables.
__device__ __forceinline__ uint32_t transform_of(const DqHeadSets& sets, uint32_t set) {
    return sets.transform[set] & (DQ_MAX_TRANSFORMS - 1);
}

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

// Products of the levels of 32 keys with the folded rows: dots[n][i] for key g + 8 i, row q of n tile n.
template <class K, int NT>
__device__ __forceinline__ void score_dots(float (&dots)[NT][4], const Query<K, NT>& query, const uint8_t* rows, uint32_t stride, const uint32_t* planes, int lane) {
    const int g = lane >> 2, q = lane & 3;
    // Not unrolled: with both halves' loads in flight the registers would not suffice for two blocks to an SM.
    DQ_UNROLL_BY_1
    for (int half = 0; half < 2; half++) {
        const uint8_t* upper = rows + (16 * half + g) * stride;
        const uint8_t* lower = upper + 8 * stride;
        int32_t high[NT][4] = {}, low[NT][4] = {};
        for_each<K::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            for_each<(K::channels(T) + 31) / 32>([&](auto group) {
                constexpr int G = decltype(group)::value, KG = K::groups_before(T) + G;
                Levels a0, a1, a2, a3;
                key_levels<K, T, G>(upper, planes, q, a0, a2);
                key_levels<K, T, G>(lower, planes, q, a1, a3);
                const uint32_t a[4] = {a0.high, a1.high, a2.high, a3.high};
                DQ_UNROLL
                for (int n = 0; n < NT; n++) mma_s8_s8(high[n], a, query.b[n][KG]);
                if constexpr (K::bits(T) == 4) {
                    const uint32_t s[4] = {a0.low, a1.low, a2.low, a3.low};
                    DQ_UNROLL
                    for (int n = 0; n < NT; n++) mma_s8_s8(low[n], s, query.b[n][KG]);
                }
            });
        });
        // Columns 2q and 2q + 1 are the high and the low byte of row q.
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            const float upper_dot = float((high[n][0] - low[n][0]) * 256 + (high[n][1] - low[n][1])) * query.step[n];
            const float lower_dot = float((high[n][2] - low[n][2]) * 256 + (high[n][3] - low[n][3])) * query.step[n];
            if (half == 0) dots[n][0] = upper_dot, dots[n][1] = lower_dot;
            else dots[n][2] = upper_dot, dots[n][3] = lower_dot;
        }
    }
}

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

// ---- The kernel ----

template <class K, class V, int NT, int STAGES>
__device__ __forceinline__ void attend_decode(const DqAttend& p) {
    DQ_DYNAMIC_SHARED(shared);
    constexpr int BLOCKS = 2 * V::groups;

    // Phase 1: what this block and warp work on.
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31, g = lane >> 2, q = lane & 3;
    const uint32_t row_tile = blockIdx.y % p.row_tiles;
    const uint32_t first_head = blockIdx.y / p.row_tiles * p.heads_per_block;
    const uint32_t head = first_head + warp % p.heads_per_block, key_warp = warp / p.heads_per_block;
    const uint32_t warps = p.heads_per_block * p.key_warps;
    const uint32_t stream = blockIdx.z / p.v_transforms, v_transform = blockIdx.z % p.v_transforms;
    const uint32_t n_rows = p.n_q * p.group, tile_keys = KEYS_PER_WARP * p.key_warps;
    const uint32_t n_keys = p.lengths != nullptr ? uint32_t(p.lengths[stream]) : p.n_kv;
    const uint32_t tiles = (n_keys + tile_keys - 1) / tile_keys, share = (tiles + p.n_splits - 1) / p.n_splits;
    const uint32_t first_tile = blockIdx.x * share, end_tile = first_tile + share < tiles ? first_tile + share : tiles;
    const uint32_t part = (v_transform * p.n_splits + blockIdx.x) * p.key_warps + key_warp;
    const uint64_t first_row = (uint64_t(stream) * p.n_kv_heads + head) * n_rows + row_tile * 4 * NT;
    const uint32_t parts = attend_parts(p);
    const DqHeadSets& v_sets = p.v.heads[head];
    const bool v_named = v_transform == 0 || [&] {
        bool named = false;
        for (int e = 0; e < DQ_MAX_SETS; e++) named |= (v_sets.present >> e & 1) && v_sets.transform[e] == v_transform;
        return named;
    }();
    // Another head of the block may have work where this one has none, so nobody leaves before the last barrier.
    const bool idle = !v_named;

    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, first_head, p.heads_per_block, head, nullptr);
    const uint32_t stride = padded_row(image.chunks), stage_bytes = tile_keys * stride;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + STAGES * stage_bytes);
    Run* runs = reinterpret_cast<Run*>(barriers + 8);
    float* sums = reinterpret_cast<float*>(runs + MOST_RUNS) + warp * DQ_MAX_SETS * 4 * NT;
    for (int i = lane; i < DQ_MAX_SETS * 4 * NT; i += 32) sums[i] = 0.0f;
    if (t == 0) {
        RowImage<K, V> again;
        again.lay_out(p.n_kv_heads, first_head, p.heads_per_block, first_head, runs);
        for (int s = 0; s < STAGES; s++) barrier_init(barriers + s, 1);
        barrier_init_done();
    }
    __syncthreads();

    // Phase 2: copies of the first stages. Beyond the last key comes the last key once more; its score is masked.
    auto copy_tile = [&](uint32_t tile) {
        const uint32_t index = (tile - first_tile) % STAGES;
        uint8_t* stage = shared + index * stage_bytes;
        auto record_of = [&](uint32_t row) {
            uint32_t key = tile * tile_keys + row;
            return p.store.data + slot_of(p, stream, key < n_keys ? key : n_keys - 1) * p.store.stride;
        };
        if constexpr (HAS_BULK_COPY) {
            // A run of a row to a lane, dealt over the warps.
            if (tile >= end_tile) return;
            if (t == 0) barrier_expect(barriers + index, tile_keys * image.chunks * 16);
            for (uint32_t i = lane * warps + warp; i < tile_keys * image.runs; i += 32 * warps) {
                const uint32_t row = image.runs == 1 ? i : i / image.runs;
                const Run run = runs[i - row * image.runs];
                bulk_copy(stage + row * stride + 16 * run.to, record_of(row) + 16 * run.source, 16 * run.chunks, barriers + index);
            }
        } else {
            // A row to a warp, lanes next to each other.
            for (uint32_t row = warp; row < tile_keys && tile < end_tile; row += warps) {
                const uint8_t* from = record_of(row);
                for (uint32_t r = 0; r < image.runs; r++) {
                    const Run run = runs[r];
                    for (uint32_t c = lane; c < run.chunks; c += 32) {
                        cp_async_16(stage + row * stride + 16 * (run.to + c), from + 16 * (run.source + c));
                    }
                }
            }
            cp_async_commit();
        }
    };
    DQ_UNROLL
    for (int s = 0; s < STAGES - 1; s++) copy_tile(first_tile + s);

    // Phase 3: queries for the set that most rows are in.
    const DqHeadSets& k_sets = p.k.heads[head];
    uint32_t k_set = header_set(k_sets.newest), v_set = header_set(v_sets.newest);
    Query<K, NT> query;
    query.load(p, stream, head, transform_of(k_sets, k_set), row_tile * NT, lane);
    query.load_constants(p, stream, head, k_set, row_tile * NT, lane);

    float m[NT], sum[NT], acc[BLOCKS][2][NT];
    DQ_UNROLL
    for (int n = 0; n < NT; n++) {
        m[n] = NEVER, sum[n] = 0.0f;
        DQ_UNROLL
        for (int b = 0; b < BLOCKS; b++) acc[b][0][n] = acc[b][1][n] = 0.0f;
    }
    bool sums_used = false;
    // Moves the running sum of weights to the set it belongs to.
    auto flush_sums = [&] {
        DQ_UNROLL
        for (int n = 0; n < NT; n++) {
            float whole = sum_over_keys(sum[n]);
            if (g == 0) sums[(v_set * NT + n) * 4 + q] += whole;
            sum[n] = 0.0f;
        }
        sums_used = true;
        __syncwarp();
    };

    for (uint32_t tile = first_tile; tile < end_tile; tile++) {
        // Phase 4: the tile is there for all warps, and all are done with the one whose place the next copy takes.
        const uint32_t turn = tile - first_tile;
        if constexpr (HAS_BULK_COPY) barrier_wait(barriers + turn % STAGES, turn / STAGES & 1);
        else cp_async_wait<STAGES - 2>();
        __syncthreads();
        copy_tile(tile + STAGES - 1);
        if (idle) continue;
        const uint8_t* rows = shared + turn % STAGES * stage_bytes + key_warp * KEYS_PER_WARP * stride;
        const uint32_t first_key = tile * tile_keys + key_warp * KEYS_PER_WARP;

        // Phase 5: headers. Usually the whole tile is in the sets at hand.
        uint32_t k_header[4], v_header[4], strange = 0;
        DQ_UNROLL
        for (int i = 0; i < 4; i++) {
            const uint8_t* row = rows + (g + 8 * i) * stride;
            k_header[i] = shared_half(row + image.k_headers);
            v_header[i] = shared_half(row + image.v_headers);
            strange |= (k_header[i] ^ k_set) | (v_header[i] ^ v_set) << 16;
        }
        const bool usual = __all_sync(ALL_LANES, (strange & 0x000F000F) == 0);

        // Phase 6: scores, in units of log2.
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
                if (!fresh) score_dots<K, NT>(dots, query, rows, stride, image.k_planes, lane);
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
            const uint32_t row = row_tile * 4 * NT + 4 * n + q, token = row / p.group;
            DQ_UNROLL
            for (int i = 0; i < 4; i++) {
                if (p.softcap > 0.0f) s[n][i] = tanh_fast(s[n][i]) * (p.softcap * LOG2_E);
                if (p.mask != nullptr || p.lengths != nullptr || first_key + KEYS_PER_WARP > n_keys) {
                    // A hidden key's record may hold anything; its score must not come through as NaN.
                    const float added = mask_of(p, stream, token < p.n_q ? token : 0, first_key + g + 8 * i, n_keys);
                    s[n][i] = added == NEVER ? NEVER : s[n][i] + added;
                }
            }
        }

        // Phase 7: weights relative to the running maximum.
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

        // Phase 8: sums of weights per value set.
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

        // Phase 9: weights times row scales, 16 bits, as B fragments: column 2q of the value mma is the high byte of
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

        // Phase 10: weighted levels.
        for_each<V::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            for_each<(V::channels(T) + 31) / 32>([&](auto group) {
                constexpr int G = decltype(group)::value, BASE = 2 * (V::groups_before(T) + G);
                ValueFragments f;
                value_levels<V, T, G>(f, rows, stride, image.v_planes, lane);
                DQ_UNROLL
                for (int e = 0; e < 2; e++) {
                    DQ_UNROLL
                    for (int n = 0; n < NT; n++) {
                        int32_t high[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
                        mma_s8_u8(high, f.high[e], b[n]);
                        float from[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
                        if constexpr (V::bits(T) == 4) {
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
    if constexpr (!HAS_BULK_COPY) cp_async_wait<0>();

    // Phase 11: the part's result. Nothing but the maximum is read of a part that saw no key.
    flush_sums();
    DQ_UNROLL
    for (int n = 0; n < NT; n++) {
        const uint32_t row = row_tile * 4 * NT + 4 * n + q;
        if (row >= n_rows) continue;
        const uint64_t at = (first_row + 4 * n + q) * parts + part;
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

// Bytes of dynamic shared memory of a block.
template <class K, class V, int NT, int STAGES>
uint32_t attend_shared_bytes(const DqAttend& p) {
    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, 0, p.heads_per_block, 0, nullptr);
    // Groups of heads that start within a chunk can need one chunk more; room for it in every run.
    uint32_t chunks = image.chunks + (p.heads_per_block == p.n_kv_heads ? 0 : K::planes() + V::planes() + 2);
    return STAGES * KEYS_PER_WARP * p.key_warps * padded_row(chunks) + 64 + MOST_RUNS * sizeof(Run)
        + p.heads_per_block * p.key_warps * DQ_MAX_SETS * 4 * NT * 4;
}

}  // namespace dq
