// Queries into the coded space. With x = mean_e + decode_e y and y_j = scale * unit_j * level_j, the score q . x is
//   scale * sum_j (decode_e^T q)_j unit_j level_j  +  q . mean_e.
// For every linear part (the rotation, dense matrices) and row of queries: q' = unit * decode^T q, rounded to 16 bits
// and cut into two signed bytes, q' = step (256 high + low), laid out as B fragments of the score mma; for every set the
// constant. All of it times the score's factor.
//
// A row is (query, query head of the group). An n tile holds four rows: column 2 r of the fragment is the high byte of
// row r, column 2 r + 1 the low one, so that both parts of a score land in one thread.
//
//   folded         [stream][kv head][transform][n tile][group of 32 channels][lane][2] u32
//   folded_scales  [stream][kv head][transform][4 * n tiles]
//   constants      [stream][kv head][set][4 * n tiles]
//
// Grid: (kv head * DQ_MAX_TRANSFORMS, n tile, stream), FOLD_THREADS threads. A thread makes two latent channels from a run
// of the row's channels, so that a matrix is read with all its loads in flight; runs are added in shared memory.
#pragma once
#include "rows.cuh"

namespace dq {

constexpr float LOG2_E = 1.4426950408889634f;
// Largest magnitude of a folded query channel: 127 * 256 + 127 would do, this leaves the low byte its full range.
constexpr float FOLD_RANGE = 32512.0f;

constexpr int FOLD_THREADS = 512;

// Queries of a stream: the token of its first one, and how many. Workspace has room for n_q in every stream.
struct Queries {
    uint64_t first;
    uint32_t count;
};
__device__ __forceinline__ Queries queries_of(const DqAttend& p, uint32_t stream) {
    if (p.q_starts == nullptr) return {uint64_t(stream) * p.n_q, p.n_q};
    const int32_t first = p.q_starts[stream];
    return {uint64_t(first), uint32_t(p.q_starts[stream + 1] - first)};
}

template <class K>
__device__ __forceinline__ uint64_t folded_tile(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t transform, uint32_t tile, uint32_t n_tiles) {
    return (((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_TRANSFORMS + transform) * n_tiles + tile) * (K::groups * 256);
}

// The factor that turns q . x into the exponent's argument; with a softcap, into the argument of tanh.
__device__ __forceinline__ float fold_factor(const DqAttend& p) {
    return p.softcap > 0.0f ? p.scale / p.softcap : p.scale * LOG2_E;
}

template <class K>
__device__ __forceinline__ void fold_queries(const DqAttend& p) {
    constexpr int D = K::D, ROWS = 4, THREADS = FOLD_THREADS, PAIRS = D / 2, RUNS = THREADS / PAIRS, RUN = (D + RUNS - 1) / RUNS;
    __shared__ float query[ROWS][D];
    __shared__ float2 parts[RUNS][ROWS][PAIRS];
    __shared__ float folded[ROWS][D];
    __shared__ float row_largest[ROWS];
    __shared__ __align__(16) uint8_t fragments[K::groups * 256];
    const uint32_t head = blockIdx.x / DQ_MAX_TRANSFORMS, transform = blockIdx.x % DQ_MAX_TRANSFORMS;
    const uint32_t tile = blockIdx.y, n_tiles = gridDim.y, stream = blockIdx.z;
    const Queries queries = queries_of(p, stream);
    const uint32_t n_rows = queries.count * p.group;
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31;
    const DqHeadSets& sets = p.k.heads[head];

    // Nothing to do for a linear part that no set names.
    if (!names_transform(sets, transform)) return;

    // Queries to shared memory; rows that do not exist are zero.
    for (int i = t; i < ROWS * D; i += THREADS) {
        uint32_t row = tile * ROWS + i / D;
        query[i / D][i % D] = row < n_rows
            ? load_row(p.q, queries.first + row / p.group, head * p.group + row % p.group, i % D) * fold_factor(p)
            : 0.0f;
    }
    for (int i = t; i < K::groups * 64; i += THREADS) reinterpret_cast<uint32_t*>(fragments)[i] = 0;
    __syncthreads();

    // This thread's run of channels.
    if (t < RUNS * PAIRS) {
        const int pair = t % PAIRS, run = t / PAIRS, first = run * RUN;
        float2 sum[ROWS] = {};
        const uint16_t* column = p.k.decode + (uint64_t(head) * p.k.max_dense + transform - 1) * D * D + 2 * pair;
        DQ_UNROLL_BY_16
        for (int i = 0; i < RUN; i++) {
            const int c = first + i;
            if (D % RUN != 0 && c >= D) break;
            float2 weight;
            if (transform == 0) {
                weight.x = with_sign(1.0f, rotation_sign<D>(p.k.rotation, 2 * pair, c));
                weight.y = with_sign(1.0f, rotation_sign<D>(p.k.rotation, 2 * pair + 1, c));
            } else {
                const uint32_t both = load_global(reinterpret_cast<const uint32_t*>(column + c * D));
                weight.x = half_to_float(uint16_t(both)), weight.y = half_to_float(uint16_t(both >> 16));
            }
            DQ_UNROLL
            for (int r = 0; r < ROWS; r++) sum[r].x += query[r][c] * weight.x, sum[r].y += query[r][c] * weight.y;
        }
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) parts[run][r][pair] = sum[r];
    }
    __syncthreads();

    // q' in levels: these count in units of their tier's book.
    for (int i = t; i < ROWS * D; i += THREADS) {
        const int r = i / D, j = i % D;
        float sum = 0.0f;
        DQ_UNROLL
        for (int run = 0; run < RUNS; run++) sum += reinterpret_cast<const float*>(parts[run][r])[j];
        if (transform == 0) sum *= rsqrtf(float(D));
        for_each<K::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            if (j >= K::first(T) && j < K::first(T) + K::channels(T)) sum *= Book<K::bits(T)>::unit;
        });
        folded[r][j] = sum;
    }
    __syncthreads();

    // The step of each row, from its largest magnitude.
    if (warp < ROWS) {
        float largest = 0.0f;
        for (int j = lane; j < D; j += 32) largest = fmaxf(largest, fabsf(folded[warp][j]));
        largest = warp_max(largest);
        if (lane == 0) {
            row_largest[warp] = largest;
            uint64_t at = ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_TRANSFORMS + transform) * n_tiles + tile;
            p.folded_scales[at * ROWS + warp] = largest / FOLD_RANGE;
        }
    }
    __syncthreads();

    // Bytes to their place in the fragments.
    for (int i = t; i < ROWS * D; i += THREADS) {
        const int r = i / D, j = i % D;
        const float largest = row_largest[r], inverse = largest > 0.0f ? FOLD_RANGE / largest : 0.0f;
        const int whole = __float2int_rn(folded[r][j] * inverse), high = (whole + 128) >> 8, low = whole - 256 * high;
        for_each<K::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            if (j >= K::first(T) && j < K::first(T) + K::channels(T)) {
                const KPosition k = k_position(K::channels(T), j - K::first(T));
                uint8_t* at = fragments + (K::groups_before(T) + k.group) * 256 + k.q * 8 + k.reg * 4 + k.byte;
                at[(2 * r) * 32] = uint8_t(high);
                at[(2 * r + 1) * 32] = uint8_t(low);
            }
        });
    }
    __syncthreads();
    uint8_t* out = p.folded + folded_tile<K>(p, stream, head, transform, tile, n_tiles);
    for (int i = t; i < K::groups * 64; i += THREADS) {
        reinterpret_cast<uint32_t*>(out)[i] = reinterpret_cast<const uint32_t*>(fragments)[i];
    }

    // The constants q . mean of the sets that share this linear part, a warp each.
    for (int e = warp; e < DQ_MAX_SETS; e += THREADS / 32) {
        const bool here = (sets.present >> e & 1) ? sets.transform[e] == transform : transform == 0;
        if (!here) continue;
        const uint16_t* mean = p.k.means + (uint64_t(head) * DQ_MAX_SETS + e) * D;
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            float sum = 0.0f;
            for (int c = lane; c < D; c += 32) sum += query[r][c] * half_to_float(load_global(mean + c));
            sum = warp_sum(sum);
            if (lane == 0) {
                p.constants[(((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_SETS + e) * n_tiles + tile) * ROWS + r] = sum;
            }
        }
    }
}

}  // namespace dq
