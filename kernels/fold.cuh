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
// Grid: (kv head * DQ_MAX_TRANSFORMS, n tile, run of streams), FOLD_THREADS threads. A block has up to eight streams, one to
// a warp, or fewer whose channels are dealt to several warps; a lane makes four latent channels next to each other (eight
// at head_dim 256). Loops stay rolled where they can: with a kernel this short, fetching the code is part of its time.
#pragma once
#include "rows.cuh"

namespace dq {

constexpr float LOG2_E = 1.4426950408889634f;
// Largest magnitude of a folded query channel: 127 * 256 + 127 would do, this leaves the low byte its full range.
constexpr float FOLD_RANGE = 32512.0f;

constexpr int FOLD_THREADS = 256, FOLD_WARPS = FOLD_THREADS / 32;

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
    constexpr int D = K::D, ROWS = 4, PIECES = (D + 127) / 128, BATCH = 16;
    constexpr bool BUTTERFLIES = (D & (D - 1)) == 0;
    // First the queries of each stream, then each warp's share of q': [channel][row].
    __shared__ float4 scratch[FOLD_WARPS][D];
    __shared__ __align__(16) uint8_t fragments[FOLD_WARPS][K::groups * 256];
    const uint32_t head = blockIdx.x / DQ_MAX_TRANSFORMS, transform = blockIdx.x % DQ_MAX_TRANSFORMS;
    const uint32_t tile = blockIdx.y, n_tiles = gridDim.y;
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31;
    const DqHeadSets& sets = p.k.heads[head];
    start_next_kernel();

    // Streams of the block, a power of two; warps of a stream.
    uint32_t streams = 1;
    while (streams * gridDim.z < p.n_streams) streams *= 2;
    const int sharers = FOLD_WARPS / streams, unit = warp / sharers, share = warp % sharers;
    const uint32_t first_stream = blockIdx.z * streams, stream = first_stream + unit;

    // The first loads of the matrix start before anything else is known: memory is far away. f16 of channel c, four latents.
    const int run = D / sharers, first = share * run;
    const uint16_t* matrix = p.k.decode + (uint64_t(head) * p.k.max_dense + transform - 1) * D * D;
    auto load_weights = [&](uint2 (&weights)[BATCH], int from, int j) {
        DQ_UNROLL
        for (int i = 0; i < BATCH; i++) {
            weights[i] = {};
            if (transform > p.k.max_dense || j >= D || from + i >= first + run) continue;
            if (transform != 0) weights[i] = load_global(reinterpret_cast<const uint2*>(matrix + (from + i) * D + j));
            else if constexpr (!BUTTERFLIES) {
                // Ones of f16 with the signs of the rotation.
                auto one = [&](int k) { return 0x3C00u | rotation_sign<D>(p.k.rotation, j + k, from + i) << 15; };
                weights[i] = {one(0) | one(1) << 16, one(2) | one(3) << 16};
            }
        }
    };
    uint2 weights[BATCH];
    load_weights(weights, first, 4 * lane);

    // Nothing to do for a linear part that no set names.
    if (!names_transform(sets, transform)) return;

    // Queries to shared memory; rows that do not exist are zero.
    uint64_t* row_at = reinterpret_cast<uint64_t*>(fragments[0]);
    if (t < ROWS) {
        const uint32_t row = tile * ROWS + t;
        row_at[t] = row / p.group * p.q.token_stride + (head * p.group + row % p.group) * p.q.head_stride;
    }
    __syncthreads();
    {
        constexpr int AT_ONCE = FOLD_THREADS / D;
        const int c = t % D, rows = t < AT_ONCE * D ? streams * ROWS : 0;
        const float factor = fold_factor(p);
        DQ_UNROLL_BY_8
        for (int i = t / D; i < rows; i += AT_ONCE) {
            const uint32_t of = first_stream + i / ROWS;
            const Queries queries = of < p.n_streams ? queries_of(p, of) : Queries{0, 0};
            uint32_t bits = 0;
            if (tile * ROWS + i % ROWS < queries.count * p.group) bits = element_bits(p.q, queries.first * p.q.token_stride + row_at[i % ROWS], c);
            reinterpret_cast<float*>(scratch[i / ROWS])[c * ROWS + i % ROWS] = element_value(p.q, bits) * factor;
        }
    }
    __syncthreads();
    const float4* query = scratch[unit];

    // The constants q . mean of the sets that share this linear part; absent sets count to the rotation.
    DQ_UNROLL_BY_1
    for (int e = share; e < DQ_MAX_SETS && stream < p.n_streams; e += sharers) {
        const bool present = sets.present >> e & 1;
        if (present ? sets.transform[e] != transform : transform != 0) continue;
        float sum[ROWS] = {};
        const uint16_t* mean = p.k.means + (uint64_t(head) * DQ_MAX_SETS + e) * D;
        for (int c = lane; c < D && present; c += 32) {
            const float m = half_to_float(load_global(mean + c));
            const float4 q = query[c];
            sum[0] += q.x * m, sum[1] += q.y * m, sum[2] += q.z * m, sum[3] += q.w * m;
        }
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) sum[r] = warp_sum(sum[r]);
        float* out = p.constants + (((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_SETS + e) * n_tiles + tile) * ROWS;
        if (lane == 0) out[0] = sum[0], out[1] = sum[1], out[2] = sum[2], out[3] = sum[3];
    }

    // q' of this warp's share of the channels.
    int parts = sharers;
    if constexpr (BUTTERFLIES) if (transform == 0) parts = 0;
    if (parts != 0) {
        float sum[PIECES][4][ROWS] = {};
        DQ_UNROLL
        for (int piece = 0; piece < PIECES; piece++) {
            const int j = 128 * piece + 4 * lane;
            if (piece > 0) load_weights(weights, first, j);
            DQ_UNROLL_BY_1
            for (int from = first; from < first + run; from += BATCH) {
                uint2 next[BATCH];
                load_weights(next, from + BATCH, j);
                DQ_UNROLL
                for (int i = 0; i < BATCH; i++) {
                    const float4 q = query[from + i < D ? from + i : 0];
                    const uint32_t halves[2] = {weights[i].x, weights[i].y};
                    DQ_UNROLL
                    for (int k = 0; k < 4; k++) {
                        const float w = half_to_float(uint16_t(halves[k / 2] >> (k % 2 * 16)));
                        float (&s)[ROWS] = sum[piece][k];
                        s[0] += q.x * w, s[1] += q.y * w, s[2] += q.z * w, s[3] += q.w * w;
                    }
                    weights[i] = next[i];
                }
            }
        }
        // Nobody needs the queries any more.
        __syncthreads();
        DQ_UNROLL
        for (int piece = 0; piece < PIECES; piece++) {
            DQ_UNROLL
            for (int k = 0; k < 4; k++) {
                const int j = 128 * piece + 4 * lane + k;
                const float (&s)[ROWS] = sum[piece][k];
                if (j < D) scratch[warp][j] = {s[0], s[1], s[2], s[3]};
            }
        }
    }
    __syncthreads();
    if (share != 0 || stream >= p.n_streams) return;

    // The stream's first warp adds the shares, or turns the queries by itself.
    float4* mine = parts == 0 ? scratch[unit] : scratch[warp];
    if constexpr (BUTTERFLIES) {
        DQ_UNROLL_BY_1
        for (int r = 0; r < (parts == 0 ? ROWS : 0); r++) {
            float* row = reinterpret_cast<float*>(mine) + r;
            float v[D / 32];
            DQ_UNROLL
            for (int k = 0; k < D / 32; k++) v[k] = with_sign(row[(lane + 32 * k) * ROWS], rotation_sign<D>(p.k.rotation, 0, lane + 32 * k));
            butterflies<D>(v, lane);
            DQ_UNROLL
            for (int k = 0; k < D / 32; k++) row[(lane + 32 * k) * ROWS] = v[k];
        }
    }
    // q' in levels: these count in units of their tier's book.
    float largest[ROWS] = {};
    DQ_UNROLL_BY_1
    for (int j = lane; j < D; j += 32) {
        float4 s = mine[j];
        for (int w = 1; w < parts; w++) {
            const float4 v = scratch[warp + w][j];
            s.x += v.x, s.y += v.y, s.z += v.z, s.w += v.w;
        }
        float worth = transform == 0 ? rsqrtf(float(D)) : 1.0f;
        for_each<K::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            if (j >= K::first(T) && j < K::first(T) + K::channels(T)) worth *= Book<K::bits(T)>::unit;
        });
        s.x *= worth, s.y *= worth, s.z *= worth, s.w *= worth;
        mine[j] = s;
        largest[0] = fmaxf(largest[0], fabsf(s.x)), largest[1] = fmaxf(largest[1], fabsf(s.y));
        largest[2] = fmaxf(largest[2], fabsf(s.z)), largest[3] = fmaxf(largest[3], fabsf(s.w));
    }

    // The step of each row, from its largest magnitude.
    float inverse[ROWS];
    DQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        const float most = warp_max(largest[r]);
        if (lane == 0) {
            uint64_t at = ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_TRANSFORMS + transform) * n_tiles + tile;
            p.folded_scales[at * ROWS + r] = most / FOLD_RANGE;
        }
        inverse[r] = most > 0.0f ? FOLD_RANGE / most : 0.0f;
    }

    // Bytes to their place in the fragments.
    uint32_t* words = reinterpret_cast<uint32_t*>(fragments[warp]);
    DQ_UNROLL_BY_1
    for (int i = lane; i < K::groups * 64; i += 32) words[i] = 0;
    __syncwarp();
    DQ_UNROLL_BY_1
    for (int j = lane; j < D; j += 32) {
        int first_channel = 0, channels = 0, groups = 0;
        for_each<K::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            if (j >= K::first(T)) first_channel = K::first(T), channels = K::channels(T), groups = K::groups_before(T);
        });
        const KPosition k = k_position(channels, j - first_channel);
        uint8_t* at = fragments[warp] + (groups + k.group) * 256 + k.q * 8 + k.reg * 4 + k.byte;
        const float4 v = mine[j];
        const float row[ROWS] = {v.x, v.y, v.z, v.w};
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const int whole = __float2int_rn(row[r] * inverse[r]), high = (whole + 128) >> 8, low = whole - 256 * high;
            at[(2 * r) * 32] = uint8_t(high);
            at[(2 * r + 1) * 32] = uint8_t(low);
        }
    }
    __syncwarp();
    uint32_t* out = reinterpret_cast<uint32_t*>(p.folded + folded_tile<K>(p, stream, head, transform, tile, n_tiles));
    DQ_UNROLL_BY_1
    for (int i = lane; i < K::groups * 64; i += 32) out[i] = words[i];
}

}  // namespace dq
