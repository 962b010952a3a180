// Attention of many queries over coded slots: a whole prefill chunk, or decode with more rows to a KV head than one warp
// takes. The block's warps look the levels of a tile up once, together, and put them into shared memory as fragments;
// then every warp uses all of them for its own rows.
//
// Block: one KV head, up to 8 warps, 4 NT rows each.
// Grid: (split of the keys, KV head * blocks of rows, stream * v_transforms).
//
// Shared memory:
//   stages     [2][TILE_KEYS] rows of `stride` bytes, as in attend.cuh
//   fragments  uint4 [TILE_KEYS / 32][keys: half, group; values: group, block][lane]: the A registers of a lane
//   runs       where in a record the row's parts lie
//   sums       f32 [warp][set][4 NT]
#pragma once
#include "attend_warp.cuh"

namespace dq {

constexpr int TILE_KEYS = 64;

// Levels that the block has looked up: 32 keys.
template <class K, class V>
struct FromFragments {
    template <int BITS> static constexpr int parts = 1;
    static constexpr int KEYS = 2 * K::groups, COUNT = KEYS + 2 * V::groups;
    const uint4* fragments;
    int lane;

    template <int T, int G>
    __device__ __forceinline__ void keys(uint32_t (&levels)[1][2][4]) const {
        DQ_UNROLL
        for (int half = 0; half < 2; half++) {
            const uint4 a = fragments[(half * K::groups + K::groups_before(T) + G) * 32 + lane];
            levels[0][half][0] = a.x, levels[0][half][1] = a.y, levels[0][half][2] = a.z, levels[0][half][3] = a.w;
        }
    }
    template <int T, int G>
    __device__ __forceinline__ void values(ValueFragments<1>& f) const {
        DQ_UNROLL
        for (int e = 0; e < 2; e++) {
            const uint4 a = fragments[(KEYS + 2 * (V::groups_before(T) + G) + e) * 32 + lane];
            f.part[0][e][0] = a.x, f.part[0][e][1] = a.y, f.part[0][e][2] = a.z, f.part[0][e][3] = a.w;
        }
    }
};

// This warp's share of the look-ups for 32 keys; pieces are dealt by number.
template <class K, class V>
__device__ __forceinline__ void look_up_tile(uint4* fragments, const FromCodes<K, V>& codes, uint32_t warp, uint32_t warps, int lane) {
    using Fragments = FromFragments<K, V>;
    auto store = [&](auto n_parts, int at, const auto& levels, int of) {
        constexpr int PARTS = decltype(n_parts)::value;
        uint32_t whole[4];
        DQ_UNROLL
        for (int i = 0; i < 4; i++) {
            whole[i] = levels[0][of][i];
            DQ_UNROLL
            for (int part = 1; part < PARTS; part++) whole[i] = add_bytes(whole[i], levels[part][of][i]);
        }
        fragments[at * 32 + lane] = make_uint4(whole[0], whole[1], whole[2], whole[3]);
    };
    for_each<K::tiers>([&](auto tier) {
        constexpr int T = decltype(tier)::value;
        for_each<(K::channels(T) + 31) / 32>([&](auto group) {
            constexpr int G = decltype(group)::value, AT = K::groups_before(T) + G;
            if (AT % warps != warp) return;
            constexpr int PARTS = parts_of(K::bits(T));
            uint32_t levels[PARTS][2][4];
            codes.template keys<T, G>(levels);
            DQ_UNROLL
            for (int half = 0; half < 2; half++) store(Int<PARTS>{}, half * K::groups + AT, levels, half);
        });
    });
    for_each<V::tiers>([&](auto tier) {
        constexpr int T = decltype(tier)::value;
        for_each<(V::channels(T) + 31) / 32>([&](auto group) {
            constexpr int G = decltype(group)::value, AT = V::groups_before(T) + G;
            if ((K::groups + AT) % warps != warp) return;
            constexpr int PARTS = parts_of(V::bits(T));
            ValueFragments<PARTS> f;
            codes.template values<T, G>(f);
            DQ_UNROLL
            for (int e = 0; e < 2; e++) store(Int<PARTS>{}, Fragments::KEYS + 2 * AT + e, f.part, e);
        });
    });
}

template <class K, class V, int NT>
__device__ __forceinline__ void attend_prefill(const DqAttend& p) {
    DQ_DYNAMIC_SHARED(shared);
    using Fragments = FromFragments<K, V>;
    constexpr int HALVES = TILE_KEYS / KEYS_PER_WARP;

    // Phase 1: what this block and warp work on.
    const uint32_t t = threadIdx.x, warp = t >> 5, warps = blockDim.x >> 5;
    const int lane = t & 31;
    const uint32_t row_blocks = (p.row_tiles + warps - 1) / warps, head = blockIdx.y / row_blocks, row_block = blockIdx.y % row_blocks;
    const uint32_t row_tile = row_block * warps + warp;
    const uint32_t stream = blockIdx.z / p.v_transforms, v_transform = blockIdx.z % p.v_transforms;
    const uint32_t n_keys = coded_keys(p, stream), n_all = n_keys + tail_of(p, stream).count;
    // Rows of the block, of which the stream may have none; keys that they see.
    const uint32_t n_q = queries_of(p, stream).count, n_rows = n_q * p.group, first_row = row_block * warps * 4 * NT;
    if (first_row >= n_rows) return wait_for_previous_kernel();
    const uint32_t end_row = first_row + warps * 4 * NT < n_rows ? first_row + warps * 4 * NT : n_rows;
    const Keys keys = keys_of(p, n_keys, n_all, n_q, first_row / p.group, (end_row + p.group - 1) / p.group);
    const uint32_t before = keys.first / TILE_KEYS, tiles = (keys.end + TILE_KEYS - 1) / TILE_KEYS - before;
    const uint32_t share = (tiles + p.n_splits - 1) / p.n_splits, end_share = blockIdx.x * share + share;
    const uint32_t first_tile = before + blockIdx.x * share, end_tile = before + (end_share < tiles ? end_share : tiles);
    const bool idle = row_tile * 4 * NT >= n_rows || !names_transform(SetList(p.v.heads[head]), v_transform);

    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, head, 1, head, nullptr);
    const uint32_t stride = padded_row(image.chunks), stage_bytes = TILE_KEYS * stride;
    const KeyRows key_rows(stride, false, lane);
    uint4* fragments = reinterpret_cast<uint4*>(shared + 2 * stage_bytes);
    Run* runs = reinterpret_cast<Run*>(fragments + HALVES * Fragments::COUNT * 32);
    float* sums = reinterpret_cast<float*>(runs + MOST_RUNS) + warp * DQ_MAX_SETS * 4 * NT;
    if (t == 0) {
        RowImage<K, V> again;
        again.lay_out(p.n_kv_heads, head, 1, head, runs);
    }
    __syncthreads();

    // Phase 2: copies. A row has few chunks, so that a warp takes several rows at once, four lanes to a row.
    auto copy_tile = [&](uint32_t tile) {
        uint8_t* stage = shared + (tile & 1) * stage_bytes;
        for (uint32_t row = t / 4; row < TILE_KEYS && tile < end_tile; row += blockDim.x / 4) {
            uint32_t key = tile * TILE_KEYS + row;
            key = key < keys.first ? keys.first : key < keys.end ? key : keys.end - 1;
            const uint8_t* from = p.store.data + slot_of(p, stream, key) * p.store.stride;
            for (uint32_t r = 0; r < image.runs; r++) {
                const Run run = runs[r];
                for (uint32_t c = t % 4; c < run.chunks; c += 4) {
                    cp_async_16(stage + row * stride + 16 * (run.to + c), from + 16 * (run.source + c));
                }
            }
        }
        cp_async_commit();
    };
    copy_tile(first_tile);
    start_next_kernel();
    const Tables tables;
    AttendWarp<K, V, NT, Fragments> state(p, stream, head, row_tile < p.row_tiles ? row_tile : 0, v_transform, n_keys, lane, sums);
    const uint32_t transform = transform_of(state.k_sets, state.k_set);
    wait_for_previous_kernel();
    state.load_query(transform);
    for (uint32_t tile = first_tile; tile < end_tile; tile++) {
        // Phase 3: the tile is there; nobody reads fragments or the other stage any more.
        cp_async_wait<0>();
        __syncthreads();
        copy_tile(tile + 1);
        const uint8_t* rows = shared + (tile & 1) * stage_bytes;

        // Phase 4: levels, once for all rows.
        DQ_UNROLL_BY_1
        for (int part = 0; part < HALVES; part++) {
            const FromCodes<K, V> codes{rows + part * key_rows.bytes(), key_rows, image, tables, lane};
            look_up_tile(fragments + part * Fragments::COUNT * 32, codes, warp, warps, lane);
        }
        __syncthreads();

        // Phase 5: scores, softmax, weighted sums.
        if (idle) continue;
        DQ_UNROLL_BY_1
        for (int part = 0; part < HALVES; part++) {
            const Fragments source{fragments + part * Fragments::COUNT * 32, lane};
            state.take(source, rows + part * key_rows.bytes(), key_rows, image.k_headers, image.v_headers, tile * TILE_KEYS + part * KEYS_PER_WARP, n_keys);
        }
    }
    cp_async_wait<0>();

    // Phase 6: the part's result.
    if (row_tile < p.row_tiles) state.finish(results_of<V>(p, stream, head, row_tile * 4 * NT, v_transform * p.n_splits + blockIdx.x));
}

// Bytes of dynamic shared memory of a block.
template <class K, class V, int NT>
uint32_t prefill_shared_bytes(const DqAttend& p, uint32_t warps) {
    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, 0, 1, 0, nullptr);
    const uint32_t chunks = image.chunks + (p.n_kv_heads == 1 ? 0 : K::planes() + V::planes() + 2);
    return 2 * TILE_KEYS * padded_row(chunks) + TILE_KEYS / KEYS_PER_WARP * FromFragments<K, V>::COUNT * 512 + MOST_RUNS * sizeof(Run)
        + warps * DQ_MAX_SETS * 4 * NT * 4;
}

}  // namespace dq
