// Attention of few queries over coded slots (decode). Codes are never decoded to values: scores are int8 products of
// levels with folded queries, the output gathers weighted levels in the coded space and is unfolded by merge.cuh.
//
// Block: `heads_per_block` KV heads times `key_warps` warps; a warp has one head, 4 NT rows of queries and 32 keys at a
// time (attend_warp.cuh). All warps of the block share stages of 32 * key_warps keys, copied with whole slots or runs of
// heads so that all sectors are used.
// Grid: (split of the keys, head group * row tiles, stream * v_transforms).
//
// Shared memory:
//   stages    [STAGES][32 * key_warps] rows of `stride` bytes, an odd multiple of 16 (no bank conflicts)
//   barriers  one per stage, for bulk copies
//   runs      where in a record the row's parts lie
//   sums      f32 [warp][set][4 NT]
#pragma once
#include "attend_warp.cuh"

namespace dq {

template <class K, class V, int NT, int STAGES>
__device__ __forceinline__ void attend_decode(const DqAttend& p) {
    DQ_DYNAMIC_SHARED(shared);

    // Phase 1: what this block and warp work on.
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31;
    const uint32_t row_tile = blockIdx.y % p.row_tiles;
    const uint32_t first_head = blockIdx.y / p.row_tiles * p.heads_per_block;
    const uint32_t head = first_head + warp % p.heads_per_block, key_warp = warp / p.heads_per_block;
    const uint32_t warps = p.heads_per_block * p.key_warps;
    const uint32_t stream = blockIdx.z / p.v_transforms, v_transform = blockIdx.z % p.v_transforms;
    const uint32_t tile_keys = KEYS_PER_WARP * p.key_warps;
    const uint32_t n_keys = p.lengths != nullptr ? uint32_t(p.lengths[stream]) : p.n_kv;
    // A tile of rows that this stream does not have.
    const uint32_t n_q = queries_of(p, stream).count, n_rows = n_q * p.group, first_row = row_tile * 4 * NT;
    if (first_row >= n_rows) return;
    const uint32_t end_row = first_row + 4 * NT < n_rows ? first_row + 4 * NT : n_rows;
    const Keys keys = keys_of(p, n_keys, n_q, first_row / p.group, (end_row + p.group - 1) / p.group);
    // Tiles before the first key that is seen are left out; they are counted from key 0, so that runs start on whole ones.
    const uint32_t before = keys.first / tile_keys, tiles = (keys.end + tile_keys - 1) / tile_keys - before;
    const uint32_t share = (tiles + p.n_splits - 1) / p.n_splits, end_share = blockIdx.x * share + share;
    const uint32_t first_tile = before + blockIdx.x * share, end_tile = before + (end_share < tiles ? end_share : tiles);
    // Another head of the block may have work where this one has none, so nobody leaves before the last barrier.
    const bool idle = !names_transform(p.v.heads[head], v_transform);

    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, first_head, p.heads_per_block, head, nullptr);
    const uint32_t stride = padded_row(image.chunks), stage_bytes = tile_keys * stride;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + STAGES * stage_bytes);
    Run* runs = reinterpret_cast<Run*>(barriers + 8);
    float* sums = reinterpret_cast<float*>(runs + MOST_RUNS) + warp * DQ_MAX_SETS * 4 * NT;
    if (t == 0) {
        RowImage<K, V> again;
        again.lay_out(p.n_kv_heads, first_head, p.heads_per_block, first_head, runs);
        for (int s = 0; s < STAGES; s++) barrier_init(barriers + s, 1);
        barrier_init_done();
    }
    __syncthreads();

    // Phase 2: copies of the first stages. In place of keys that nobody sees comes the nearest one once more; its score is
    // masked.
    auto copy_tile = [&](uint32_t tile) {
        const uint32_t index = (tile - first_tile) % STAGES;
        uint8_t* stage = shared + index * stage_bytes;
        auto record_of = [&](uint32_t row) {
            uint32_t key = tile * tile_keys + row;
            key = key < keys.first ? keys.first : key < keys.end ? key : keys.end - 1;
            return p.store.data + slot_of(p, stream, key) * p.store.stride;
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

    // Phase 3: the warp's state.
    AttendWarp<K, V, NT> state(p, stream, head, row_tile, v_transform, lane, sums);

    for (uint32_t tile = first_tile; tile < end_tile; tile++) {
        // Phase 4: the tile is there for all warps, and all are done with the one whose place the next copy takes.
        const uint32_t turn = tile - first_tile;
        if constexpr (HAS_BULK_COPY) barrier_wait(barriers + turn % STAGES, turn / STAGES & 1);
        else cp_async_wait<STAGES - 2>();
        __syncthreads();
        copy_tile(tile + STAGES - 1);
        if (idle) continue;
        const uint8_t* rows = shared + turn % STAGES * stage_bytes + key_warp * KEYS_PER_WARP * stride;

        // Phase 5: scores, softmax, weighted sums.
        const FromCodes<K, V> source{rows, stride, image, lane};
        state.take(source, rows, stride, image.k_headers, image.v_headers, tile * tile_keys + key_warp * KEYS_PER_WARP, n_keys);
    }
    if constexpr (!HAS_BULK_COPY) cp_async_wait<0>();

    // Phase 6: the part's result.
    state.finish((v_transform * p.n_splits + blockIdx.x) * p.key_warps + key_warp);
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
