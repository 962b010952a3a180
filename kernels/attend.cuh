// Attention of few queries over coded slots (decode). Codes are never decoded to values: scores are int8 products of
// levels with folded queries, the output gathers weighted levels in the coded space and is unfolded by merge.cuh.
//
// Block: `heads_per_block` KV heads times `key_warps` warps; a warp has one head, 4 NT rows of queries and 32 keys at a
// time (attend_warp.cuh). All warps of the block share stages of 32 * key_warps keys, copied with whole slots or runs of
// heads so that all sectors are used.
// Grid: (split of the keys, head group * row tiles, stream * v_transforms).
//
// Shared memory:
//   stages    [STAGES][32 * key_warps] rows of `stride` bytes: whole records as they are where copies take several at once,
//             else an odd multiple of 16 (no bank conflicts)
//   barriers  of bulk copies: a stage is there; the block's warps are done with it
//   runs      where in a record the row's parts lie
//   sums      f32 [warp][set][4 NT]
// At the end the results of warps that share a head lie where the stages were, as KeyWarps says; room is for the larger.
#pragma once
#include "attend_warp.cuh"

namespace dq {

constexpr int MOST_STAGES = 4, DECODE_STAGES = 2;

// Results of the warps of a block, where several share a head: they are joined in shared memory, where the stages were.
template <class V, int NT>
struct KeyWarps {
    static constexpr int ROWS = 4 * NT, RUNS = (V::D + 63) / 64;
    float *values, *sums;  // [warp][row][channel of V], [warp][row][SUMS]
    __host__ __device__ __forceinline__ static uint32_t bytes(const DqAttend& p) {
        return p.key_warps > 1 ? p.heads_per_block * p.key_warps * ROWS * (V::D + SUMS) * 4 : 0;
    }
    __device__ __forceinline__ KeyWarps(const DqAttend& p, uint8_t* shared)
        : values(reinterpret_cast<float*>(shared)), sums(values + p.heads_per_block * p.key_warps * ROWS * V::D) {}

    // Those of this warp.
    __device__ __forceinline__ Results results() const {
        const uint32_t first = threadIdx.x / 32 * ROWS;
        return {values + first * V::D, sums + first * SUMS, V::D, SUMS};
    }

    // By the block: the part of all its heads, rows from `first_row` on. A warp has a row at a time.
    __device__ __forceinline__ void join(const DqAttend& p, uint32_t stream, uint32_t first_row, uint32_t n_rows, uint32_t part) const {
        const uint32_t lane = threadIdx.x % 32, step = p.heads_per_block * ROWS;  // of the warps' rows
        DQ_UNROLL_BY_1
        for (uint32_t i = threadIdx.x / 32; i < step; i += p.heads_per_block * p.key_warps) {
            const uint32_t head = i % p.heads_per_block, row = i / p.heads_per_block, first = head * ROWS + row;
            if (first_row + row >= n_rows) return;
            const float* maxima = sums + first * SUMS + DQ_MAX_SETS;
            float highest = NEVER, sum = 0.0f;
            DQ_UNROLL_BY_1
            for (uint32_t w = 0; w < p.key_warps; w++) highest = fmaxf(highest, maxima[w * step * SUMS]);
            float2 y[RUNS] = {};
            DQ_UNROLL_BY_1
            for (uint32_t w = 0; w < p.key_warps; w++) {
                const float weight = weight_from(maxima[w * step * SUMS], highest);
                sum += weight * sums[(first + w * step) * SUMS + lane % DQ_MAX_SETS];
                DQ_UNROLL
                for (int k = 0; k < RUNS; k++) {
                    const int c = 2 * lane + 64 * k;
                    if (V::D % 64 != 0 && c >= V::D) continue;
                    const float2 v = *reinterpret_cast<const float2*>(values + (first + w * step) * V::D + c);
                    y[k].x += weight * v.x, y[k].y += weight * v.y;
                }
            }
            const Results to = results_of<V>(p, stream, blockIdx.y / p.row_tiles * p.heads_per_block + head, first_row + row, part);
            if (lane <= DQ_MAX_SETS) to.sums[lane] = lane < DQ_MAX_SETS ? sum : highest;
            DQ_UNROLL
            for (int k = 0; k < RUNS; k++) if (2 * lane + 64 * k < V::D) *reinterpret_cast<float2*>(to.values + 2 * lane + 64 * k) = y[k];
        }
    }
};

template <class K, class V, int NT, int STAGES>
__device__ __forceinline__ void attend_decode(const DqAttend& p) {
    static_assert(STAGES <= MOST_STAGES, "");
    DQ_DYNAMIC_SHARED(shared);

    // Phase 1: what this block and warp work on.
    const int t = threadIdx.x, lane = t & 31;
    const uint32_t warp = __shfl_sync(ALL_LANES, uint32_t(t) >> 5, 0);  // in a uniform register
    const uint32_t head_group = quotient(blockIdx.y, p.row_tiles), row_tile = blockIdx.y - head_group * p.row_tiles;
    const uint32_t first_head = head_group * p.heads_per_block;
    const uint32_t key_warp = p.key_warps > 1 ? warp / p.heads_per_block : 0, head = first_head + warp - key_warp * p.heads_per_block;
    const uint32_t warps = p.heads_per_block * p.key_warps;
    const uint32_t stream = quotient(blockIdx.z, p.v_transforms), v_transform = blockIdx.z - stream * p.v_transforms;
    const uint32_t tile_keys = KEYS_PER_WARP * p.key_warps;
    const uint32_t n_keys = coded_keys(p, stream), n_all = n_keys + tail_of(p, stream).count;
    // A tile of rows that this stream does not have.
    const uint32_t n_q = queries_of(p, stream).count, n_rows = n_q * p.group, first_row = row_tile * 4 * NT;
    if (first_row >= n_rows) return wait_for_previous_kernel();
    const uint32_t end_row = first_row + 4 * NT < n_rows ? first_row + 4 * NT : n_rows;
    const Keys keys = keys_of(p, n_keys, n_all, n_q, first_row / p.group, (end_row + p.group - 1) / p.group);
    // Tiles before the first key that is seen are left out; they are counted from key 0, so that runs start on whole ones.
    const uint32_t before = quotient(keys.first / KEYS_PER_WARP, p.key_warps);
    const uint32_t tiles = quotient((keys.end + KEYS_PER_WARP - 1) / KEYS_PER_WARP + p.key_warps - 1, p.key_warps) - before;
    const uint32_t share = quotient(tiles + p.n_splits - 1, p.n_splits), end_share = blockIdx.x * share + share;
    const uint32_t first_tile = before + blockIdx.x * share, end_tile = before + (end_share < tiles ? end_share : tiles);

    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, first_head, p.heads_per_block, head, nullptr);
    // Slots that one bulk copy takes: as many as lie behind each other, without a gap between their rows.
    uint32_t together = 1;
    bool spread = false;
    if (HAS_BULK_COPY && image.runs == 1 && p.store.stride == image.chunks * 16) {
        const uint32_t in_order = p.block_table == nullptr ? tile_keys : 1u << p.block_shift;
        spread = image.chunks % 4 == 0 && in_order > 1;
        const uint32_t most = spread ? KeyRows::RUN : tile_keys & (0 - tile_keys);
        together = p.block_table == nullptr && !spread ? tile_keys : in_order < most ? in_order : most;
    }
    const KeyRows key_rows(together > 1 ? image.chunks * 16 : padded_row(image.chunks), spread, lane);
    const uint32_t stride = key_rows.stride, stage_bytes = p.key_warps * key_rows.bytes();
    const uint32_t joined = KeyWarps<V, NT>::bytes(p), below = joined > STAGES * stage_bytes ? joined : STAGES * stage_bytes;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + below);
    uint64_t* done = barriers + MOST_STAGES;
    Run* runs = reinterpret_cast<Run*>(done + MOST_STAGES);
    float* sums = reinterpret_cast<float*>(runs + MOST_RUNS) + warp * DQ_MAX_SETS * 4 * NT;
    if (t == 0) {
        if (!HAS_BULK_COPY || image.runs > 1) {
            RowImage<K, V> again;
            again.lay_out(p.n_kv_heads, first_head, p.heads_per_block, first_head, runs);
        }
        for (int s = 0; s < STAGES; s++) barrier_init(barriers + s, 1), barrier_init(done + s, 32 * warps);
        barrier_init_done();
    }

    // Phase 2: the first tile starts on its way before all else. Those behind it follow once fold has ended: asked for at once, they
    // would come together, late, and hold up what fold still has to read and write.
    auto record_of = [&](uint32_t key) { return p.store.data + slot_of(p, stream, key) * p.store.stride; };
    // By one warp, lanes share the copies. In place of keys that nobody sees a stage keeps what it had.
    auto bulk_tile = [&](uint32_t tile, uint32_t index) {
        const uint32_t first_key = tile * tile_keys;
        const uint32_t from = keys.first > first_key ? keys.first - first_key : 0;
        const uint32_t to = keys.end - first_key < tile_keys ? keys.end - first_key : tile_keys;
        uint8_t* stage = shared + index * stage_bytes;
        if (lane == 0) barrier_expect(barriers + index, (to - from) * image.chunks * 16);
        if (image.runs == 1) {
            for (uint32_t row = lane * together; row < to; row += 32 * together) {
                const uint32_t first = row > from ? row : from, end = row + together < to ? row + together : to;
                if (first < end) bulk_copy(stage + first * stride + key_rows.gaps(first), record_of(first_key + first), (end - first) * image.chunks * 16, barriers + index);
            }
        } else {
            for (uint32_t i = from * image.runs + lane; i < to * image.runs; i += 32) {
                const uint32_t row = i / image.runs;
                const Run run = runs[i - row * image.runs];
                bulk_copy(stage + row * stride + 16 * run.to, record_of(first_key + row) + 16 * run.source, 16 * run.chunks, barriers + index);
            }
        }
    };
    // By all warps, a row to a warp, lanes next to each other. In place of keys that nobody sees comes the nearest one once
    // more.
    auto async_tile = [&](uint32_t tile) {
        uint8_t* stage = shared + (tile - first_tile) % STAGES * stage_bytes;
        for (uint32_t row = warp; row < tile_keys && tile < end_tile; row += warps) {
            uint32_t key = tile * tile_keys + row;
            key = key < keys.first ? keys.first : key < keys.end ? key : keys.end - 1;
            const uint8_t* from = record_of(key);
            for (uint32_t r = 0; r < image.runs; r++) {
                const Run run = runs[r];
                for (uint32_t c = lane; c < run.chunks; c += 32) {
                    cp_async_16(stage + row * stride + 16 * (run.to + c), from + 16 * (run.source + c));
                }
            }
        }
        cp_async_commit();
    };
    if constexpr (HAS_BULK_COPY) {
        if (warp == 0) {
            __syncwarp();  // barriers and runs are lane 0's
            if (first_tile < end_tile) bulk_tile(first_tile, 0);
        }
    } else {
        __syncthreads();
        DQ_UNROLL
        for (int s = 0; s < STAGES - 1; s++) async_tile(first_tile + s);
    }

    start_next_kernel();

    // The warp's state: what it looks at is near as long as no copy is under way. Another head of the block may have work where
    // this one has none.
    AttendWarp<K, V, NT> state(p, stream, head, row_tile, v_transform, n_keys, lane, sums);
    const uint32_t transform = transform_of(state.k_sets, state.k_set);
    const bool idle = v_transform > 0 && !names_transform(SetList(p.v.heads[head]), v_transform);

    // Phase 3: the query, which fold has been at meanwhile.
    const Tables tables;
    if constexpr (HAS_BULK_COPY) __syncthreads();
    wait_for_previous_kernel();
    if (HAS_BULK_COPY && warp == 0) {
        for (uint32_t s = 1; s < STAGES && first_tile + s < end_tile; s++) bulk_tile(first_tile + s, s);
    }
    state.load_query(transform);

    uint32_t index = 0, phase = 0;
    for (uint32_t tile = first_tile; tile < end_tile; tile++) {
        // Phase 4: the tile is there.
        if constexpr (HAS_BULK_COPY) {
            barrier_wait(barriers + index, phase);
        } else {
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            async_tile(tile + STAGES - 1);
        }

        // Phase 5: scores, softmax, weighted sums.
        const uint8_t* rows = shared + index * stage_bytes + key_warp * key_rows.bytes();
        if (!idle) {
            const FromCodes<K, V> source{rows, key_rows, image, tables, lane};
            state.take(source, rows, key_rows, image.k_headers, image.v_headers, tile * tile_keys + key_warp * KEYS_PER_WARP, n_keys);
        }

        // Phase 6: the warp that is the last to be done with a stage fills it anew.
        if constexpr (HAS_BULK_COPY) {
            if (tile + STAGES < end_tile) {
                // Each lane for its own reads; lane 0 behind the others, so that the very last arrival is some warp's lane 0.
                if (lane != 0) barrier_arrive(done + index);
                __syncwarp();
                const uint32_t missing = lane == 0 ? barrier_arrive(done + index) : 0;
                if (__shfl_sync(ALL_LANES, missing, 0) == 1) {
                    barrier_wait(done + index, phase);  // over already: it orders the others' reads before the copies
                    bulk_tile(tile + STAGES, index);
                }
            }
        }
        if (++index == STAGES) index = 0, phase ^= 1;
    }
    if constexpr (!HAS_BULK_COPY) cp_async_wait<0>();

    // Phase 7: the part's result.
    const uint32_t part = v_transform * p.n_splits + blockIdx.x;
    Results results = results_of<V>(p, stream, head, row_tile * 4 * NT, part);
    KeyWarps<V, NT> shares(p, shared);
    if (p.key_warps > 1) {
        __syncthreads();
        results = shares.results();
    }
    state.finish(results);
    if (p.key_warps > 1) {
        __syncthreads();
        shares.join(p, stream, row_tile * 4 * NT, n_q * p.group, part);
    }
}

// Bytes of dynamic shared memory of a block.
template <class K, class V, int NT, int STAGES>
uint32_t attend_shared_bytes(const DqAttend& p) {
    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, 0, p.heads_per_block, 0, nullptr);
    // Groups of heads that start within a chunk can need one chunk more; room for it in every run.
    uint32_t chunks = image.chunks + (p.heads_per_block == p.n_kv_heads ? 0 : K::planes() + V::planes() + 2);
    const uint32_t stages = STAGES * KEYS_PER_WARP * p.key_warps * padded_row(chunks), joined = KeyWarps<V, NT>::bytes(p);
    return (joined > stages ? joined : stages) + MOST_STAGES * 16 + MOST_RUNS * sizeof(Run)
        + p.heads_per_block * p.key_warps * DQ_MAX_SETS * 4 * NT * 4;
}

}  // namespace dq
