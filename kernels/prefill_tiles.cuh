// Tiles of keys on their way into the shared memory of the kernel for many queries: slots, then the rows of their records in stages,
// then levels, scales and sets.
#pragma once
#include "prefill_warp.cuh"

namespace dq {

// Where things are in shared memory. A warp group has its folded queries in so many slots.
constexpr uint32_t MOST_QUERY_SLOTS = 2;
template <class Tile> struct PrefillShared {
    uint32_t query_slots, queries, stages, rows, slots_of_keys, sums, barriers, chunks, bytes;
    __host__ __device__ PrefillShared(uint32_t row_chunks, uint32_t warps, uint32_t slots) : query_slots(slots) {
        queries = Tile::BUFFERS * Tile::bytes;
        stages = queries + warps / 4 * slots * Tile::query_slot;
        rows = stages + 2 * Tile::KEYS * padded_row(row_chunks);
        slots_of_keys = rows + warps * Tile::ROWS * uint32_t(sizeof(Sees));
        sums = slots_of_keys + 2 * Tile::KEYS * 4;
        barriers = sums + warps * Tile::ROWS * DQ_MAX_SETS * 4;
        chunks = barriers + LevelBarriers::COUNT * Tile::BUFFERS * 8;
        bytes = chunks + 2 * Tile::MOST_CHUNKS;
    }
};

// By a block's workers, all together. Of a tile's number the lowest bit says which stage it has.
template <class K, class V, class Tile>
struct TileSource {
    static constexpr int KEYS = Tile::KEYS;
    const DqAttend& p;
    const uint32_t stream, end_tile;
    const Keys keys;
    const RowImage<K, V>& image;
    const uint32_t stride, stage_bytes;
    uint8_t* stages;
    uint32_t* slots;
    uint16_t* chunks;
    Worker<Tile> worker;
    Tables tables;

    __device__ __forceinline__ TileSource(const DqAttend& p, uint32_t stream, const Keys& keys, uint32_t end_tile, const RowImage<K, V>& image, uint8_t* shared, const PrefillShared<Tile>& at)
        : p(p), stream(stream), end_tile(end_tile), keys(keys), image(image), stride(padded_row(image.chunks)), stage_bytes(KEYS * stride), stages(shared + at.stages),
          slots(reinterpret_cast<uint32_t*>(shared + at.slots_of_keys)), chunks(reinterpret_cast<uint16_t*>(shared + at.chunks)), tables(false) {}

    __device__ __forceinline__ uint8_t* stage(uint32_t tile) const { return stages + (tile & 1) * stage_bytes; }

    // Where in a record the chunks of a row come from. By one thread.
    __device__ __forceinline__ void list_chunks(uint32_t head) const {
        Run runs[MOST_RUNS];
        RowImage<K, V> again;
        again.lay_out(p.n_kv_heads, head, 1, head, runs);
        for (uint32_t r = 0; r < again.runs; r++) {
            for (uint32_t c = 0; c < runs[r].chunks; c++) chunks[runs[r].to + c] = uint16_t(runs[r].source + c);
        }
    }

    // Slots of a tile, a thread to each. No device has room for 2^32 of them.
    __device__ __forceinline__ void locate(uint32_t tile) const {
        const uint32_t t = worker.here();
        if (t >= KEYS || tile >= end_tile) return;
        uint32_t key = tile * KEYS + t;
        key = key < keys.first ? keys.first : key < keys.end ? key : keys.end - 1;
        slots[(tile & 1) * KEYS + t] = uint32_t(slot_of(p, stream, key));
    }

    // Copies, a warp or half a warp to a row.
    __device__ __forceinline__ void copy(uint32_t tile) const {
        if (tile < end_tile) {
            if (image.chunks > 16) copy_by<32>(tile);
            else copy_by<16>(tile);
        }
        cp_async_commit();
    }
    template <uint32_t SHARERS>
    __device__ __forceinline__ void copy_by(uint32_t tile) const {
        const uint32_t* from = slots + (tile & 1) * KEYS;
        const uint32_t t = worker.here(), step = Tile::workers() / SHARERS;
        // Slots of several rows are on their way together.
        constexpr uint32_t AT_ONCE = Tile::GROUPS ? KEYS * SHARERS / 128 : 4;
        auto exists = [](uint32_t row) { return Tile::GROUPS || row < KEYS; };
        for (uint32_t c = t % SHARERS; c < image.chunks; c += SHARERS) {
            const uint8_t* source = p.store.data + 16 * chunks[c];
            uint8_t* to = stage(tile) + 16 * c;
            DQ_UNROLL_BY_1
            for (uint32_t row = t / SHARERS; row < KEYS; row += AT_ONCE * step) {
                uint32_t slot[AT_ONCE];
                DQ_UNROLL
                for (uint32_t i = 0; i < AT_ONCE; i++) slot[i] = from[exists(row + i * step) ? row + i * step : row];
                DQ_UNROLL
                for (uint32_t i = 0; i < AT_ONCE && exists(row + i * step); i++) cp_async_16(to + (row + i * step) * stride, source + slot[i] * p.store.stride);
            }
        }
    }

    // Levels of keys, and scales and sets of both sides. Returns the worker whose turn it is next.
    __device__ __forceinline__ uint32_t look_up_keys(uint32_t tile, uint8_t* to) const {
        if (tile >= end_tile) return 0;
        const uint8_t* rows = stage(tile);
        const uint32_t next = look_up_rows<K, Tile>(worker, rows, stride, image.k_planes, tables, 0, [&](uint32_t key, uint32_t place, uint32_t a, uint32_t b) {
            *reinterpret_cast<uint2*>(to + Tile::KeyLevels::at(key, place)) = make_uint2(a, b);
        });
        for (uint32_t key = counted_from(worker.here(), next, Tile::workers()); key < KEYS; key += Tile::workers()) {
            const uint8_t* row = rows + key * stride;
            const uint32_t k_header = shared_half(row + image.k_headers), v_header = shared_half(row + image.v_headers);
            float* scales = reinterpret_cast<float*>(to + Tile::scales);
            scales[key] = small_scale(k_header & 0xFFF0) * SCALE_UP, scales[KEYS + key] = small_scale(v_header & 0xFFF0) * SCALE_UP;
            to[Tile::sets + key] = uint8_t(header_set(k_header) | header_set(v_header) << 4);
        }
        if constexpr (Tile::GROUPS) shared_for_groups();
        return (next + KEYS) % Tile::workers();
    }
    // Levels of values; `next` as keys left it.
    __device__ __forceinline__ void look_up_values(uint32_t tile, uint8_t* to, uint32_t next) const {
        if (tile >= end_tile) return;
        look_up_rows<V, Tile>(worker, stage(tile), stride, image.v_planes, tables, next, [&](uint32_t key, uint32_t place, uint32_t a, uint32_t b) {
            const uint2 first = halves_of(a), second = halves_of(b);
            *reinterpret_cast<uint4*>(to + Tile::values + Tile::ValueLevels::at(key, place)) = make_uint4(first.x, first.y, second.x, second.y);
        });
        if constexpr (Tile::GROUPS) shared_for_groups();
    }
    __device__ __forceinline__ void look_up(uint32_t tile, uint8_t* to) const { look_up_values(tile, to, look_up_keys(tile, to)); }
};

}  // namespace dq
