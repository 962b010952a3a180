// Attention of many queries over coded slots: a whole prefill chunk, or decode with more rows to a KV head than one warp
// takes. Here arithmetic is what counts, not bytes. So the block's warps look the levels of a tile of keys up once, together
// (prefill_levels.cuh). From there on it is flash attention, rows of queries as rows of the mma, 32 keys at a time.
//
// Block: one KV head, PrefillTile::WARPS warps of sixteen rows, or fewer without warp groups.
// Grid: (split of the keys, KV head * blocks of rows, stream * v_transforms).
//
// Shared memory:
//   levels   [2]: of keys s8, of values f16, as `LevelRows` has them; word w of a tier (`plane_word`) is the eight places from
//            8 w on, its first quad before its second one. Then scales f32 [K, V][KEYS], sets u8 [KEYS]: of K in the lower half of
//            a byte, of V in the upper one
//   queries  of each warp group, where there are mma of these: one `query_slot` or two
//   stages   [2][KEYS] rows of `stride` bytes: of a record what the head needs
//   rows     [warp][16] what a row sees
//   slots    u32 [2][KEYS] of the keys
//   sums     f32 [warp][set][16]
//   chunks   u16 [chunks of a row]: where in a record they come from
#pragma once
#include "prefill_warp.cuh"

namespace dq {

// Where things are in shared memory. A warp group has its folded queries in so many slots.
constexpr uint32_t MOST_QUERY_SLOTS = 2;
template <class Tile> struct PrefillShared {
    uint32_t query_slots, queries, stages, rows, slots_of_keys, sums, chunks, bytes;
    __host__ __device__ PrefillShared(uint32_t row_chunks, uint32_t warps, uint32_t slots) : query_slots(slots) {
        queries = 2 * Tile::bytes;
        stages = queries + warps / 4 * slots * Tile::query_slot;
        rows = stages + 2 * Tile::KEYS * padded_row(row_chunks);
        slots_of_keys = rows + warps * Tile::ROWS * uint32_t(sizeof(Sees));
        sums = slots_of_keys + 2 * Tile::KEYS * 4;
        chunks = sums + warps * Tile::ROWS * DQ_MAX_SETS * 4;
        bytes = chunks + 2 * Tile::MOST_CHUNKS;
    }
};

template <class K, class V>
__device__ __forceinline__ void attend_prefill(const DqAttend& p) {
    DQ_DYNAMIC_SHARED(shared);
    using Warp = PrefillWarp<K, V>;
    using Tile = PrefillTile<K, V>;
    constexpr int ROWS = Warp::ROWS, KEYS = Tile::KEYS;

    // Phase 1: what this block and warp work on.
    const uint32_t t = threadIdx.x, warps = Tile::threads() >> 5;
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
    const bool idle = first_together >= n_rows || !names_transform(SetList(p.v.heads[head]), v_transform);

    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, head, 1, head, nullptr);
    const uint32_t stride = padded_row(image.chunks), stage_bytes = KEYS * stride;
    PrefillShared<Tile> at(image.chunks, warps, MOST_QUERY_SLOTS);
    if (at.bytes > dynamic_shared_bytes()) at = PrefillShared<Tile>(image.chunks, warps, 1);
    uint8_t *levels = shared, *stages = shared + at.stages;
    Sees* rows = reinterpret_cast<Sees*>(shared + at.rows);
    uint32_t* slots = reinterpret_cast<uint32_t*>(shared + at.slots_of_keys);  // no device has room for 2^32
    float* sums = reinterpret_cast<float*>(shared + at.sums);
    uint16_t* chunks = reinterpret_cast<uint16_t*>(shared + at.chunks);
    if (t == 0) {
        Run runs[MOST_RUNS];
        RowImage<K, V> again;
        again.lay_out(p.n_kv_heads, head, 1, head, runs);
        for (uint32_t r = 0; r < again.runs; r++) {
            for (uint32_t c = 0; c < runs[r].chunks; c++) chunks[runs[r].to + c] = uint16_t(runs[r].source + c);
        }
    }

    // Phase 2: slots, a thread to each; then copies, a warp or half a warp to a row.
    auto locate_tile = [&](uint32_t tile) {
        const uint32_t t = thread_here();
        if (t >= KEYS || tile >= end_tile) return;
        uint32_t key = tile * KEYS + t;
        key = key < keys.first ? keys.first : key < keys.end ? key : keys.end - 1;
        slots[(tile & 1) * KEYS + t] = uint32_t(slot_of(p, stream, key));
    };
    auto copy_tile = [&](uint32_t tile) {
        const uint32_t* from = slots + (tile & 1) * KEYS;
        uint8_t* stage = stages + (tile & 1) * stage_bytes;
        auto copy = [&](auto sharers) {
            constexpr uint32_t SHARERS = decltype(sharers)::value;
            const uint32_t t = thread_here();
            for (uint32_t c = t % SHARERS; c < image.chunks; c += SHARERS) {
                const uint8_t* source = p.store.data + 16 * chunks[c];
                DQ_UNROLL
                for (uint32_t row = t / SHARERS; row < KEYS; row += Tile::threads() / SHARERS) cp_async_16(stage + row * stride + 16 * c, source + from[row] * p.store.stride);
            }
        };
        if (tile < end_tile) {
            if (image.chunks > 16) copy(Int<32>{});
            else copy(Int<16>{});
        }
        cp_async_commit();
    };
    locate_tile(first_tile);
    locate_tile(first_tile + 1);
    __syncthreads();
    copy_tile(first_tile);
    start_next_kernel();
    const Tables tables(false);
    Warp state(p, stream, head, row_tile < p.row_tiles ? row_tile : 0, first_together, v_transform, n_keys, warp, lane, shared + at.queries, at.query_slots, sums + warp * DQ_MAX_SETS * ROWS, rows + warp * ROWS);

    // Phase 3: levels, scales and sets of a tile, by the block.
    auto look_up_tile = [&](uint32_t tile) {
        if (tile >= end_tile) return;
        const uint8_t* stage = stages + (tile & 1) * stage_bytes;
        uint8_t* to = levels + (tile & 1) * Tile::bytes;
        const uint32_t next = look_up_rows<K, Tile>(stage, stride, image.k_planes, tables, 0, [&](uint32_t key, uint32_t place, uint32_t a, uint32_t b) {
            *reinterpret_cast<uint2*>(to + Tile::KeyLevels::at(key, place)) = make_uint2(a, b);
        });
        const uint32_t last = look_up_rows<V, Tile>(stage, stride, image.v_planes, tables, next, [&](uint32_t key, uint32_t place, uint32_t a, uint32_t b) {
            const uint2 first = halves_of(a), second = halves_of(b);
            *reinterpret_cast<uint4*>(to + Tile::values + Tile::ValueLevels::at(key, place)) = make_uint4(first.x, first.y, second.x, second.y);
        });
        for (uint32_t key = counted_from(thread_here(), last, Tile::threads()); key < KEYS; key += Tile::threads()) {
            const uint8_t* row = stage + key * stride;
            const uint32_t k_header = shared_half(row + image.k_headers), v_header = shared_half(row + image.v_headers);
            float* scales = reinterpret_cast<float*>(to + Tile::scales);
            scales[key] = small_scale(k_header & 0xFFF0) * SCALE_UP, scales[KEYS + key] = small_scale(v_header & 0xFFF0) * SCALE_UP;
            to[Tile::sets + key] = uint8_t(header_set(k_header) | header_set(v_header) << 4);
        }
        if constexpr (Warp::GROUPS) shared_for_groups();
    };
    cp_async_wait<0>();
    __syncthreads();
    copy_tile(first_tile + 1);
    locate_tile(first_tile + 2);
    look_up_tile(first_tile);
    wait_for_previous_kernel();
    state.start();
    const bool looks_first = warp >> 2 & 1;
    for (uint32_t tile = first_tile; tile < end_tile; tile++) {
        // Phase 4: the next tile is in its stage and this one has its levels; nobody reads the other stage or the other levels any
        // more.
        cp_async_wait<0>();
        __syncthreads();
        copy_tile(tile + 2);
        locate_tile(tile + 3);

        // Phase 5: scores, softmax, weighted sums, and levels of the next tile. Some warps begin with the one, some with the other, so
        // that tensor cores and look-ups share the time.
        if (looks_first) look_up_tile(tile + 1);
        if (!idle) state.take(levels + (tile & 1) * Tile::bytes, tile * KEYS);
        if (!looks_first) look_up_tile(tile + 1);
    }
    cp_async_wait<0>();

    // Phase 6: the part's result.
    if (row_tile < p.row_tiles) state.finish(results_of<V>(p, stream, head, row_tile * ROWS, v_transform * p.n_splits + blockIdx.x), n_rows);
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
