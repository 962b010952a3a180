// What the attention kernels share with each other: where keys live, what hides them, and how the part of a record that a
// block needs becomes a row in shared memory.
#pragma once
#include "codes.cuh"
#include "fold.cuh"

namespace dq {

constexpr int KEYS_PER_WARP = 32;
constexpr float NEVER = -__builtin_huge_valf();

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
            for_each<K::planes()>([&](auto i) {
                constexpr int I = decltype(i)::value, BYTES = plane_bytes<K>(I), BEFORE = plane_at<K>(I);
                k_planes[I] = n_kv * BEFORE + head * BYTES;
            });
            for_each<V::planes()>([&](auto i) {
                constexpr int I = decltype(i)::value, BYTES = plane_bytes<V>(I), BEFORE = K::row_bytes + plane_at<V>(I);
                v_planes[I] = n_kv * BEFORE + head * BYTES;
            });
            k_headers = Record<K, V>::k_headers(n_kv) + 2 * head;
            v_headers = Record<K, V>::v_headers(n_kv) + 2 * head;
            return;
        }
        for_each<K::planes()>([&](auto i) {
            constexpr int I = decltype(i)::value, BYTES = plane_bytes<K>(I), BEFORE = plane_at<K>(I);
            k_planes[I] = add_run(n_kv * BEFORE, BYTES, first, heads, head, table);
        });
        for_each<V::planes()>([&](auto i) {
            constexpr int I = decltype(i)::value, BYTES = plane_bytes<V>(I), BEFORE = K::row_bytes + plane_at<V>(I);
            v_planes[I] = add_run(n_kv * BEFORE, BYTES, first, heads, head, table);
        });
        k_headers = add_run(Record<K, V>::k_headers(n_kv), 2, first, heads, head, table);
        v_headers = add_run(Record<K, V>::v_headers(n_kv), 2, first, heads, head, table);
    }

    // Bytes of one head in all planes of the side before this one, and in this one.
    template <class S> __host__ __device__ static constexpr int plane_at(int plane) {
        return S::bytes_before(S::tier_of_plane(plane), plane - S::plane_index(S::tier_of_plane(plane), 0));
    }
    template <class S> __host__ __device__ static constexpr int plane_bytes(int plane) {
        return S::head_bytes(S::tier_of_plane(plane), plane - S::plane_index(S::tier_of_plane(plane), 0));
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

// Rows of a stream's tail.
struct TailRows {
    uint64_t first;
    uint32_t count;
};
__device__ __forceinline__ TailRows tail_of(const DqAttend& p, uint32_t stream) {
    return {p.tail.starts == nullptr ? uint64_t(stream) * p.tail.n_rows : uint64_t(p.tail.starts[stream]),
            p.tail.lengths == nullptr ? p.tail.n_rows : uint32_t(p.tail.lengths[stream])};
}

// Coded keys of a stream.
__device__ __forceinline__ uint32_t coded_keys(const DqAttend& p, uint32_t stream) {
    return p.lengths != nullptr ? uint32_t(p.lengths[stream]) : p.n_kv;
}

// Coded keys of a stream that queries [first, end) of its n_q see, as far as lengths and window say; n_all counts its tail,
// too. Blocks that lie outside may be anybody's.
struct Keys {
    uint32_t first, end;
};
__device__ __forceinline__ Keys keys_of(const DqAttend& p, uint32_t n_keys, uint32_t n_all, uint32_t n_q, uint32_t first, uint32_t end) {
    Keys keys{0, n_keys};
    if (p.lengths == nullptr || !p.causal) return keys;
    // The last query sits at the last key.
    const int64_t behind = int64_t(n_all) - n_q, last = behind + end, start = behind + first + 1 - p.window;
    if (last < int64_t(n_keys)) keys.end = last > 0 ? uint32_t(last) : 0;
    if (p.window > 0 && start > 0) keys.first = uint32_t(start);
    // The window may begin in the tail.
    return p.window > 0 && start >= int64_t(keys.end) ? Keys{0, 0} : keys;
}

// The mask at a key of a row that begins so many bytes from its start.
__device__ __forceinline__ float mask_at(const DqAttend& p, uint64_t row, uint32_t key) {
    return p.mask_type == DQ_TYPE_F32 ? at_bytes<float>(p.mask, row + 4ull * key) : half_to_float(at_bytes<uint16_t>(p.mask, row + 2ull * key));
}

// What is added to the score of (query of n_q, key): the mask in units of log2, or minus infinity. Keys from n_keys on are
// not there; the tail's count from the last coded one.
__device__ __forceinline__ float mask_of(const DqAttend& p, uint32_t stream, uint32_t query, uint32_t n_q, uint32_t key, uint32_t n_keys) {
    if (key >= n_keys) return NEVER;
    if (p.lengths != nullptr) {
        int64_t position = int64_t(coded_keys(p, stream)) + tail_of(p, stream).count - n_q + query;
        if (p.causal && key > position) return NEVER;
        if (p.window > 0 && key + int64_t(p.window) <= position) return NEVER;
    }
    if (p.mask == nullptr) return 0.0f;
    return mask_at(p, stream * p.mask_stream_stride + query * p.mask_query_stride, key) * LOG2_E;
}

// The linear part of a set. Records under a mask may name any set: whatever comes, the answer is within the tables.
__device__ __forceinline__ uint32_t transform_of(const DqHeadSets& sets, uint32_t set) {
    return sets.transform[set] & (DQ_MAX_TRANSFORMS - 1);
}

}  // namespace dq
