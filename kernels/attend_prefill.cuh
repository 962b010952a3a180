// Attention of many queries over coded slots: a whole prefill chunk, or decode with more rows to a KV head than one warp
// takes. Here arithmetic is what counts, not bytes. So the levels of a tile of keys are looked up once for all rows of a block
// (prefill_tiles.cuh). From there on it is flash attention, rows of queries as rows of the mma (prefill_warp.cuh).
//
// Block: one KV head, PrefillTile::WARPS warps of sixteen rows. With warp groups, one more group looks levels up, a few tiles ahead of the
// others, and gives them its registers. Without, all warps look levels up, one tile ahead, and there may be fewer of them.
// Grid: (split of the keys, KV head * blocks of rows, stream * v_transforms).
//
// Shared memory:
//   levels   [BUFFERS]: of keys s8, of values f16, as `LevelRows` has them; word w of a tier (`plane_word`) is the eight places from
//            8 w on, its first quad before its second one. Then scales f32 [K, V][KEYS], sets u8 [KEYS]: of K in the lower half of
//            a byte, of V in the upper one
//   queries  of each warp group, where there are mma of these: one `query_slot` or two
//   stages   [2][KEYS] rows of `stride` bytes: of a record what the head needs
//   rows     [warp][16] what a row sees
//   slots    u32 [2][KEYS] of the keys
//   sums     f32 [warp][set][16]
//   barriers [BUFFERS] `LevelBarriers`, for warp groups
//   chunks   u16 [chunks of a row]: where in a record they come from
#pragma once
#include "prefill_tiles.cuh"

namespace dq {

// A group looks levels up for the others: of tiles `first` ... source.end_tile - 1.
template <class Source, class Tile>
__device__ __forceinline__ void work_ahead(const Source& source, uint32_t first, uint8_t* levels, const LevelBarriers& barriers) {
    source.copy(first);
    BufferTurn<Tile> turn(true);
    for (uint32_t tile = first; tile < source.end_tile; tile++, turn.next()) {
        // The tile is in its stage, and nobody reads the other stage any more.
        cp_async_wait<0>();
        group_sync(Tile::WARPS / 4);
        source.copy(tile + 1);
        source.locate(tile + 2);
        const LevelBarriers of_tile = barriers.of(turn.buffer);
        uint8_t* to = levels + turn.buffer * Tile::bytes;
        of_tile.wait(LevelBarriers::KEYS_DONE, turn.parity);
        const uint32_t next = source.look_up_keys(tile, to);
        of_tile.arrive(LevelBarriers::KEYS_THERE);
        of_tile.wait(LevelBarriers::VALUES_DONE, turn.parity);
        source.look_up_values(tile, to, next);
        of_tile.arrive(LevelBarriers::VALUES_THERE);
    }
    cp_async_wait<0>();
}

template <class K, class V>
__device__ __forceinline__ void attend_prefill(const DqAttend& p) {
    DQ_DYNAMIC_SHARED(shared);
    using Warp = PrefillWarp<K, V>;
    using Tile = PrefillTile<K, V>;
    constexpr int ROWS = Warp::ROWS, KEYS = Tile::KEYS;

    // Phase 1: what this block and warp work on.
    const uint32_t t = threadIdx.x, warps = Tile::row_warps();
    const uint32_t warp = __shfl_sync(ALL_LANES, t >> 5, 0);  // in a uniform register
    const int lane = t & 31;
    const uint32_t row_blocks = (p.row_tiles + warps - 1) / warps, head = blockIdx.y / row_blocks, row_block = blockIdx.y % row_blocks;
    const uint32_t row_tile = row_block * warps + warp;
    const uint32_t stream = blockIdx.z / p.v_transforms, v_transform = blockIdx.z % p.v_transforms;
    const uint32_t n_keys = coded_keys(p, stream), n_all = n_keys + tail_of(p, stream).count;
    // Rows of the block, of which the stream may have none; keys that they see.
    const uint32_t n_q = queries_of(p, stream).count, n_rows = n_q * p.group, first_row = row_block * warps * ROWS;
    if (first_row >= n_rows) return wait_for_previous_kernel();
    const uint32_t end_row = first_row + warps * ROWS < n_rows ? first_row + warps * ROWS : n_rows;
    const Keys keys = keys_of(p, n_keys, n_all, n_q, first_row / p.group, (end_row + p.group - 1) / p.group);
    const uint32_t before = keys.first / KEYS, tiles = (keys.end + KEYS - 1) / KEYS - before;
    const uint32_t share = (tiles + p.n_splits - 1) / p.n_splits, end_share = blockIdx.x * share + share;
    const uint32_t first_tile = before + blockIdx.x * share, end_tile = before + (end_share < tiles ? end_share : tiles);
    const uint32_t first_together = row_tile * ROWS / Warp::TOGETHER * Warp::TOGETHER;
    const bool names = names_transform(SetList(p.v.heads[head]), v_transform), idle = first_together >= n_rows || !names;

    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, head, 1, head, nullptr);
    PrefillShared<Tile> at(image.chunks, warps, MOST_QUERY_SLOTS);
    if (at.bytes > dynamic_shared_bytes()) at = PrefillShared<Tile>(image.chunks, warps, 1);
    uint8_t* levels = shared;
    const TileSource<K, V, Tile> source(p, stream, keys, end_tile, image, shared, at);
    if (t == 0) source.list_chunks(head);
    auto state_of_warp = [&] {
        Sees* sees = reinterpret_cast<Sees*>(shared + at.rows) + warp * ROWS;
        float* sums = reinterpret_cast<float*>(shared + at.sums) + warp * DQ_MAX_SETS * ROWS;
        return Warp(p, stream, head, row_tile < p.row_tiles ? row_tile : 0, first_together, v_transform, n_keys, warp, lane, shared + at.queries, at.query_slots, sums, sees);
    };
    auto finish = [&](Warp& state) {
        if (row_tile < p.row_tiles) state.finish(results_of<V>(p, stream, head, row_tile * ROWS, v_transform * p.n_splits + blockIdx.x), n_rows);
    };

    if constexpr (Tile::GROUPS) {
        // Phase 2: barriers; from here on the groups go their own ways.
        const LevelBarriers barriers{reinterpret_cast<uint64_t*>(shared + at.barriers)};
        const bool works_ahead = warp >= Tile::WARPS;
        if (t == 0) {
            const uint32_t busy = (end_row - first_row + Warp::TOGETHER - 1) / Warp::TOGETHER;
            for (int b = 0; b < Tile::BUFFERS; b++) barriers.of(b).init(busy);
        }
        if (works_ahead) source.locate(first_tile), source.locate(first_tile + 1);
        __syncthreads();
        start_next_kernel();
        if (works_ahead) {
            group_give_registers<Tile::FEW_REGISTERS>();
            if (names) work_ahead<TileSource<K, V, Tile>, Tile>(source, first_tile, levels, barriers);
            return wait_for_previous_kernel();
        }

        // Phase 3: scores, softmax and weighted sums of the tiles, as they come; the part's result.
        group_take_registers<Tile::MANY_REGISTERS>();
        Warp state = state_of_warp();
        wait_for_previous_kernel();
        if (!idle) {
            state.start();
            BufferTurn<Tile> turn(false);
            for (uint32_t tile = first_tile; tile < end_tile; tile++, turn.next()) {
                state.take_from_others(levels + turn.buffer * Tile::bytes, tile * KEYS, barriers.of(turn.buffer), turn.parity);
            }
            state.settle();
        }
        finish(state);
    } else {
        // Phase 2: slots and copies of the first tiles, levels of the first one.
        source.locate(first_tile);
        source.locate(first_tile + 1);
        __syncthreads();
        source.copy(first_tile);
        start_next_kernel();
        Warp state = state_of_warp();
        cp_async_wait<0>();
        __syncthreads();
        source.copy(first_tile + 1);
        source.locate(first_tile + 2);
        auto levels_of = [&](uint32_t tile) { return levels + (tile & 1) * Tile::bytes; };
        source.look_up(first_tile, levels_of(first_tile));
        wait_for_previous_kernel();
        state.start();
        const bool looks_first = warp >> 2 & 1;
        for (uint32_t tile = first_tile; tile < end_tile; tile++) {
            // Phase 3: the next tile is in its stage and this one has its levels; nobody reads the other stage or the other levels any
            // more.
            cp_async_wait<0>();
            __syncthreads();
            source.copy(tile + 2);
            source.locate(tile + 3);

            // Phase 4: scores, softmax, weighted sums, and levels of the next tile. Some warps begin with the one, some with the other, so
            // that tensor cores and look-ups share the time.
            if (looks_first) source.look_up(tile + 1, levels_of(tile + 1));
            if (!idle) state.take(levels_of(tile), tile * KEYS);
            if (!looks_first) source.look_up(tile + 1, levels_of(tile + 1));
        }
        cp_async_wait<0>();

        // Phase 5: the part's result.
        finish(state);
    }
}

// Bytes of dynamic shared memory of a block, whichever its head: src/cuda/launch.rs says the same.
template <class K, class V>
uint32_t prefill_shared_bytes(const DqAttend& p, uint32_t warps, uint32_t query_slots) {
    uint32_t most = 0;
    for (uint32_t head = 0; head < p.n_kv_heads; head++) {
        RowImage<K, V> image;
        image.lay_out(p.n_kv_heads, head, 1, head, nullptr);
        most = image.chunks > most ? image.chunks : most;
    }
    return PrefillShared<PrefillTile<K, V>>(most, warps, query_slots).bytes;
}

}  // namespace dq
