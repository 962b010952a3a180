// Records back to rows: x = mean + decode y, y_j = scale * unit * level_j.
//
// Grid: (runs of ROWS rows, KV head, side), 128 threads. The rows' latents go to shared memory, then a thread makes
// whole channels. Slot -1, and a row that names a set which does not exist, give zeros. Not for attention, which never
// decodes; for state files, tests and engines without a kernel.
#pragma once
#include "rows.cuh"

namespace dq {

constexpr int DEQUANTIZE_ROWS = 8;

// Code of one channel, read from its planes.
template <class S>
__device__ __forceinline__ uint32_t read_code(const uint8_t* record, uint32_t side, uint32_t n_kv, uint32_t head, int channel) {
    uint32_t code = 0;
    for_each<S::tiers>([&](auto tier) {
        constexpr int T = decltype(tier)::value;
        const int c = channel - S::first(T);
        if (c < 0 || c >= S::channels(T)) return;
        for_each<planes_of(S::bits(T))>([&](auto plane) {
            constexpr int P = decltype(plane)::value, BITS = plane_bits(S::bits(T), P), BYTES = S::head_bytes(T, P);
            const uint8_t byte = record[side + n_kv * S::bytes_before(T, P) + head * BYTES + c % BYTES];
            code = code << BITS | (byte >> (c / BYTES * BITS) & ((1u << BITS) - 1));
        });
    });
    return code;
}

template <class S>
__device__ __forceinline__ void dequantize_side(const DqDequantize& p, const DqFactors& f, const DqRows& out, uint32_t side, uint32_t headers) {
    constexpr int D = S::D, ROWS = DEQUANTIZE_ROWS;
    __shared__ float y[ROWS][D];
    __shared__ uint32_t sets[ROWS];
    const int t = threadIdx.x;
    const uint32_t head = blockIdx.y, first = blockIdx.x * ROWS;
    if (out.data == nullptr) return;
    for (int i = t; i < ROWS * D; i += blockDim.x) {
        const int row = i / D, c = i % D;
        if (first + row >= p.n) continue;
        if (!in_store(p.store, p.slots[first + row])) {
            if (c == 0) sets[row] = DQ_MAX_SETS;
            continue;
        }
        const uint8_t* record = p.store.data + uint64_t(p.slots[first + row]) * p.store.stride;
        const uint32_t header = *reinterpret_cast<const uint16_t*>(record + headers + 2 * head);
        const uint32_t code = read_code<S>(record, side, p.n_kv_heads, head, c);
        float level = 0.0f;
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value, BITS = S::bits(T);
            if (c >= S::first(T) && c < S::first(T) + S::channels(T)) level = float(Book<BITS>::level(int(code))) * Book<BITS>::unit;
        });
        y[row][c] = level * header_scale(header);
        if (c == 0) sets[row] = header_set(header);
    }
    __syncthreads();
    for (int row = 0; row < ROWS && first + row < p.n; row++) {
        const uint32_t set = sets[row];
        if (set == DQ_MAX_SETS || !(f.heads[head].present >> set & 1)) {
            for (int c = t; c < D; c += blockDim.x) store_row(out, first + row, head, c, 0.0f);
            continue;
        }
        const uint32_t transform = f.heads[head].transform[set] & (DQ_MAX_TRANSFORMS - 1);
        const uint16_t* mean = f.means + (uint64_t(head) * DQ_MAX_SETS + set) * D;
        for (int c = t; c < D; c += blockDim.x) {
            store_row(out, first + row, head, c, half_to_float(load_global(mean + c)) + unfold_channel<D>(f, head, transform, y[row], c, 0, D));
        }
    }
}

template <class K, class V>
__device__ __forceinline__ void dequantize(const DqDequantize& p) {
    using R = Record<K, V>;
    if (blockIdx.z == 0) dequantize_side<K>(p, p.k, p.k_out, 0, R::k_headers(p.n_kv_heads));
    else dequantize_side<V>(p, p.v, p.v_out, p.n_kv_heads * K::row_bytes, R::v_headers(p.n_kv_heads));
}

}  // namespace dq
