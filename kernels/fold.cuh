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
// at head_dim 256).
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
    // Of a warp: first its stream's queries [channel][row], where a stream has several warps then its share of q', and in
    // the end, of the stream's first warp, the fragments.
    __shared__ __align__(16) float scratch[FOLD_WARPS][D * ROWS];
    static_assert(K::groups * 256 <= D * ROWS * 4, "");
    const uint32_t head = blockIdx.x / DQ_MAX_TRANSFORMS, transform = blockIdx.x % DQ_MAX_TRANSFORMS;
    const uint32_t tile = blockIdx.y, n_tiles = gridDim.y;
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31;
    const DqHeadSets& sets = p.k.heads[head];
    const float factor = fold_factor(p);
    start_next_kernel();

    // Streams of the block, a power of two; warps of a stream.
    uint32_t streams = 1;
    while (streams * gridDim.z < p.n_streams) streams *= 2;
    const int sharers = FOLD_WARPS / streams, unit = warp / sharers, share = warp % sharers;
    const uint32_t first_stream = blockIdx.z * streams, stream = first_stream + unit;

    // The first loads of the matrix start before anything else is known: memory is far away. f16 of channel c, four latents.
    const int run = D / sharers, first = share * run;
    const uint16_t* matrix = p.k.decode + (uint64_t(head) * p.k.max_dense + transform - 1) * D * D;
    const bool exists = transform <= p.k.max_dense;
    auto load_weights = [&](uint2 (&weights)[BATCH], int from, int j) {
        DQ_UNROLL
        for (int i = 0; i < BATCH; i++) {
            weights[i] = {};
            if (!exists || j >= D || from + i >= first + run) continue;
            if (transform != 0) weights[i] = load_global(reinterpret_cast<const uint2*>(matrix + (from + i) * D + j));
            else if (!BUTTERFLIES) {
                // Ones of f16 with the signs of the rotation.
                auto one = [&](int k) { return 0x3C00u | rotation_sign<D>(p.k.rotation, j + k, from + i) << 15; };
                weights[i] = {one(0) | one(1) << 16, one(2) | one(3) << 16};
            }
        }
    };
    uint2 weights[BATCH];
    load_weights(weights, first, 4 * lane);

    // Queries to shared memory; rows that do not exist are zero.
    auto load_queries = [&](auto load) {
        DQ_UNROLL_BY_16
        for (int i = t; i < int(streams) * ROWS * D; i += FOLD_THREADS) {
            const uint32_t of = first_stream + i / (ROWS * D), row = tile * ROWS + i / D % ROWS;
            const Queries queries = of < p.n_streams ? queries_of(p, of) : Queries{};
            const bool there = row < queries.count * p.group;
            const uint64_t token = queries.first + (p.n_q == 1 ? 0 : row / p.group), q_head = head * p.group + (p.n_q == 1 ? row : row % p.group);
            const float q = there ? load(token * p.q.token_stride + q_head * p.q.head_stride, i % D) : 0.0f;
            scratch[i / (ROWS * D)][i % D * ROWS + i / D % ROWS] = q * factor;
        }
    };
    if (p.q.type == DQ_TYPE_F32) load_queries([&](uint64_t at, int c) { return at_bytes<float>(p.q.data, at + 4 * c); });
    else if (p.q.type == DQ_TYPE_F16) load_queries([&](uint64_t at, int c) { return half_to_float(at_bytes<uint16_t>(p.q.data, at + 2 * c)); });
    else load_queries([&](uint64_t at, int c) { return bf16_to_float(at_bytes<uint16_t>(p.q.data, at + 2 * c)); });

    // Nothing to do for a linear part that no set names.
    if (!names_transform(sets, transform)) return;
    __syncthreads();
    const float4* query = reinterpret_cast<const float4*>(scratch[unit]);

    // The constants q . mean of the sets that share this linear part; absent sets count to the rotation.
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

    // q' of this warp's share of the channels: [piece][row], channels 4 lane ... of each 128.
    float4 sum[PIECES][ROWS] = {};
    if (BUTTERFLIES && transform == 0) {
        if constexpr (BUTTERFLIES) {
            float v[ROWS][D / 32];
            DQ_UNROLL
            for (int k = 0; k < D / 32; k++) {
                const float4 q = query[lane + 32 * k];
                const uint32_t minus = rotation_sign<D>(p.k.rotation, 0, lane + 32 * k);
                v[0][k] = with_sign(q.x, minus), v[1][k] = with_sign(q.y, minus), v[2][k] = with_sign(q.z, minus), v[3][k] = with_sign(q.w, minus);
            }
            __syncthreads();
            DQ_UNROLL
            for (int r = 0; r < ROWS; r++) {
                butterflies<D>(v[r], lane);
                DQ_UNROLL
                for (int k = 0; k < D / 32; k++) scratch[warp][r * D + lane + 32 * k] = v[r][k];
            }
            __syncwarp();
        }
    } else {
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
                    const float w[4] = {half_to_float(uint16_t(weights[i].x)), half_to_float(uint16_t(weights[i].x >> 16)),
                                        half_to_float(uint16_t(weights[i].y)), half_to_float(uint16_t(weights[i].y >> 16))};
                    auto add = [&](float4& s, float v) { s.x += v * w[0], s.y += v * w[1], s.z += v * w[2], s.w += v * w[3]; };
                    add(sum[piece][0], q.x), add(sum[piece][1], q.y), add(sum[piece][2], q.z), add(sum[piece][3], q.w);
                    weights[i] = next[i];
                }
            }
        }
        // Nobody needs the queries any more.
        __syncthreads();
        DQ_UNROLL
        for (int piece = 0; piece < PIECES; piece++) {
            const int j = 128 * piece + 4 * lane;
            if (j >= D) continue;
            DQ_UNROLL
            for (int r = 0; r < ROWS; r++) *reinterpret_cast<float4*>(&scratch[warp][r * D + j]) = sum[piece][r];
        }
        __syncwarp();
    }
    __syncthreads();
    if (share != 0 || stream >= p.n_streams) return;

    // The stream's first warp adds the shares. q' in levels: these count in units of their tier's book.
    const int parts = BUTTERFLIES && transform == 0 ? 1 : sharers;
    float largest[ROWS] = {};
    DQ_UNROLL
    for (int piece = 0; piece < PIECES; piece++) {
        const int j = 128 * piece + 4 * lane;
        if (j >= D) continue;
        float unit_of = 1.0f;
        for_each<K::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            if (j >= K::first(T) && j < K::first(T) + K::channels(T)) unit_of = Book<K::bits(T)>::unit;
        });
        if (transform == 0) unit_of *= rsqrtf(float(D));
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            float4 s = {};
            for (int w = 0; w < parts; w++) {
                const float4 v = *reinterpret_cast<const float4*>(&scratch[warp + w][r * D + j]);
                s.x += v.x, s.y += v.y, s.z += v.z, s.w += v.w;
            }
            s.x *= unit_of, s.y *= unit_of, s.z *= unit_of, s.w *= unit_of;
            largest[r] = fmaxf(largest[r], fmaxf(fmaxf(fabsf(s.x), fabsf(s.y)), fmaxf(fabsf(s.z), fabsf(s.w))));
            sum[piece][r] = s;
        }
    }
    __syncwarp();
    uint8_t* fragments = reinterpret_cast<uint8_t*>(scratch[warp]);
    for (int i = lane; i < K::groups * 64; i += 32) reinterpret_cast<uint32_t*>(fragments)[i] = 0;
    __syncwarp();

    // The step of each row, from its largest magnitude; bytes to their place in the fragments.
    DQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        largest[r] = warp_max(largest[r]);
        if (lane == 0) {
            uint64_t at = ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_TRANSFORMS + transform) * n_tiles + tile;
            p.folded_scales[at * ROWS + r] = largest[r] / FOLD_RANGE;
        }
        const float inverse = largest[r] > 0.0f ? FOLD_RANGE / largest[r] : 0.0f;
        DQ_UNROLL
        for (int piece = 0; piece < PIECES; piece++) {
            const float four[4] = {sum[piece][r].x, sum[piece][r].y, sum[piece][r].z, sum[piece][r].w};
            for_each<K::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value;
                const int j = 128 * piece + 4 * lane;
                if (j < K::first(T) || j >= K::first(T) + K::channels(T)) return;
                DQ_UNROLL
                for (int i = 0; i < 4; i++) {
                    const int whole = __float2int_rn(four[i] * inverse), high = (whole + 128) >> 8, low = whole - 256 * high;
                    const KPosition k = k_position(K::channels(T), j + i - K::first(T));
                    uint8_t* at = fragments + (K::groups_before(T) + k.group) * 256 + k.q * 8 + k.reg * 4 + k.byte;
                    at[(2 * r) * 32] = uint8_t(high);
                    at[(2 * r + 1) * 32] = uint8_t(low);
                }
            });
        }
    }
    __syncwarp();
    uint8_t* out = p.folded + folded_tile<K>(p, stream, head, transform, tile, n_tiles);
    for (int i = lane; i < K::groups * 64; i += 32) reinterpret_cast<uint32_t*>(out)[i] = reinterpret_cast<const uint32_t*>(fragments)[i];
}

}  // namespace dq
