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
// A unit is one n tile of one stream. Grid: (kv head * DQ_MAX_TRANSFORMS, run of units), FOLD_THREADS threads. A block has
// `fold_units` units, a power of two, and that many times fewer warps work on each. The matrix goes to shared memory once and
// from there into tensor cores, f16 as it is: a query is the sum of two f16 (22 bits), which are columns of the mma next to
// each other, as the two bytes are later.
//
// Shared memory: queries, then q', float4 [unit][channel] | matrix f16 [FOLD_CHUNK channels][latent, 8 of nothing] |
// fragments [unit]
#pragma once
#include "rows.cuh"

namespace dq {

constexpr float LOG2_E = 1.4426950408889634f;
// Largest magnitude of a folded query channel: 127 * 256 + 127 would do, this leaves the low byte its full range.
constexpr float FOLD_RANGE = 32512.0f;

// The lower half of a query counts in units of this less.
constexpr float LOWER_HALF = 2048.0f;

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

// Channels of the matrix that are in shared memory at once.
template <class K> constexpr int FOLD_CHUNK = K::D <= 128 ? K::D : 64;
template <class K>
constexpr uint32_t fold_shared_bytes() {
    return FOLD_WARPS * K::D * 16 + FOLD_CHUNK<K> * (K::D + 8) * 2 + FOLD_WARPS * K::groups * 256;
}

template <class K>
__device__ __forceinline__ void fold_queries(const DqAttend& p) {
    constexpr int D = K::D, ROWS = 4, CHUNK = FOLD_CHUNK<K>, STRIDE = D + 8, M_TILES = D / 16;
    constexpr bool BUTTERFLIES = (D & (D - 1)) == 0;
    constexpr uint64_t NO_ROW = ~0ull;
    DQ_DYNAMIC_SHARED(shared);
    __shared__ uint64_t row_at[FOLD_WARPS * ROWS];
    float4 (*scratch)[D] = reinterpret_cast<float4 (*)[D]>(shared);
    uint16_t (*matrix)[STRIDE] = reinterpret_cast<uint16_t (*)[STRIDE]>(scratch + FOLD_WARPS);
    uint8_t (*fragments)[K::groups * 256] = reinterpret_cast<uint8_t (*)[K::groups * 256]>(matrix + CHUNK);
    const uint32_t head = blockIdx.x / DQ_MAX_TRANSFORMS, transform = blockIdx.x % DQ_MAX_TRANSFORMS;
    const uint32_t n_tiles = p.fold_tiles, units = p.fold_units;
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31;
    const int sharers = FOLD_WARPS / units, share = warp % sharers;
    const uint32_t unit = warp / sharers, first_unit = (blockIdx.z * gridDim.y + blockIdx.y) * units;
    const uint32_t stream = (first_unit + unit) / n_tiles, tile = (first_unit + unit) % n_tiles;
    const DqHeadSets& sets = p.k.heads[head];
    start_next_kernel();

    // Phase 1: the matrix starts on its way before anything else is known, since memory is far away; queries come to shared
    // memory, where rows that do not exist are zero.
    const bool turns = BUTTERFLIES && transform == 0;
    auto copy_chunk = [&](int first) {
        if (turns || transform > p.k.max_dense) return;
        if (transform != 0) {
            const uint16_t* from = p.k.decode + ((uint64_t(head) * p.k.max_dense + transform - 1) * D + first) * D;
            for (int i = t; i < CHUNK * D / 8; i += FOLD_THREADS) cp_async_16(&matrix[i / (D / 8)][i % (D / 8) * 8], from + 8 * i);
            cp_async_commit();
        } else {
            // Ones of f16 with the signs of the rotation.
            for (int i = t; i < CHUNK * D; i += FOLD_THREADS) matrix[i / D][i % D] = uint16_t(0x3C00u | rotation_sign<D>(p.k.rotation, i % D, first + i / D) << 15);
        }
    };
    copy_chunk(0);
    // Nothing to do for a linear part that no set names.
    if (!names_transform(sets, transform)) {
        cp_async_wait<0>();
        return;
    }
    if (t < int(units) * ROWS) {
        const uint32_t u = first_unit + t / ROWS, of = u / n_tiles, row = u % n_tiles * ROWS + t % ROWS;
        row_at[t] = NO_ROW;
        if (of < p.n_streams) {
            const Queries queries = queries_of(p, of);
            if (row < queries.count * p.group) {
                row_at[t] = (queries.first + row / p.group) * p.q.token_stride + (head * p.group + row % p.group) * p.q.head_stride;
            }
        }
    }
    __syncthreads();
    {
        constexpr int AT_ONCE = FOLD_THREADS / D;
        const int c = t % D, rows = t < AT_ONCE * D ? units * ROWS : 0;
        const float factor = fold_factor(p);
        DQ_UNROLL_BY_8
        for (int i = t / D; i < rows; i += AT_ONCE) {
            const uint32_t bits = row_at[i] != NO_ROW ? element_bits(p.q, row_at[i], c) : 0;
            reinterpret_cast<float*>(scratch[i / ROWS])[c * ROWS + i % ROWS] = element_value(p.q, bits) * factor;
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    const float4* query = scratch[unit];

    // Phase 2: the constants q . mean of the sets that share this linear part; absent sets count to the rotation.
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

    // Phase 3: q' of this warp's share of the latents, 16 at a time: row g and g + 8 of an mma are latents, columns 2 r and
    // 2 r + 1 the upper and the lower half of row r.
    float acc[M_TILES][4] = {};
    float worth_of_row = 1.0f;
    if (!turns) {
        float most[ROWS] = {};
        for (int c = lane; c < D; c += 32) {
            const float4 q = query[c];
            most[0] = fmaxf(most[0], fabsf(q.x)), most[1] = fmaxf(most[1], fabsf(q.y));
            most[2] = fmaxf(most[2], fabsf(q.z)), most[3] = fmaxf(most[3], fabsf(q.w));
        }
        // Powers of two that bring a row below 2.
        float shrink = 1.0f;
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            uint32_t exponent = __float_as_uint(warp_max(most[r])) >> 23;
            exponent = exponent < 1 ? 1 : exponent < 253 ? exponent : 253;
            if (lane >> 3 == r) shrink = __uint_as_float((254 - exponent) << 23);
            if ((lane & 3) == r) worth_of_row = __uint_as_float(exponent << 23);
        }
        const float* mine = reinterpret_cast<const float*>(query) + (lane >> 3);
        const bool lower = lane >> 2 & 1;
        auto half_of = [&](int c) -> uint32_t {
            const float x = mine[c * ROWS] * shrink;
            const uint16_t upper = float_to_half(x);
            return lower ? float_to_half((x - half_to_float(upper)) * LOWER_HALF) : upper;
        };
        const uint16_t* source = &matrix[(lane >> 4) * 8 + (lane & 7)][(lane >> 3 & 1) * 8];
        for (int first = 0; first < D; first += CHUNK) {
            if (first > 0) {
                __syncthreads();
                copy_chunk(first);
                cp_async_wait<0>();
                __syncthreads();
            }
            DQ_UNROLL_BY_1
            for (int k = 0; k < CHUNK; k += 16) {
                const int c = first + k + 2 * (lane & 3);
                const uint32_t b[2] = {half_of(c) | half_of(c + 1) << 16, half_of(c + 8) | half_of(c + 9) << 16};
                DQ_UNROLL
                for (int m = 0; m < M_TILES; m++) {
                    if ((m & (sharers - 1)) != share) continue;
                    uint32_t a[4];
                    ldmatrix_trans(a, source + k * STRIDE + 16 * m);
                    mma_f16(acc[m], a, b);
                }
            }
        }
    }
    // Nobody needs the queries any more.
    __syncthreads();
    float4* mine = scratch[unit];
    if (!turns) {
        DQ_UNROLL
        for (int m = 0; m < M_TILES; m++) {
            if ((m & (sharers - 1)) != share) continue;
            float* out = reinterpret_cast<float*>(mine + 16 * m + (lane >> 2)) + (lane & 3);
            out[0] = (acc[m][0] + acc[m][1] * (1.0f / LOWER_HALF)) * worth_of_row;
            out[8 * ROWS] = (acc[m][2] + acc[m][3] * (1.0f / LOWER_HALF)) * worth_of_row;
        }
    }
    __syncthreads();
    if (share != 0 || stream >= p.n_streams) return;

    // Phase 4: the unit's first warp turns the queries by itself where a rotation is all there is,
    if constexpr (BUTTERFLIES) {
        DQ_UNROLL_BY_1
        for (int r = 0; r < (turns ? ROWS : 0); r++) {
            float* row = reinterpret_cast<float*>(mine) + r;
            float v[D / 32];
            DQ_UNROLL
            for (int k = 0; k < D / 32; k++) v[k] = with_sign(row[(lane + 32 * k) * ROWS], rotation_sign<D>(p.k.rotation, 0, lane + 32 * k));
            butterflies<D>(v, lane);
            DQ_UNROLL
            for (int k = 0; k < D / 32; k++) row[(lane + 32 * k) * ROWS] = v[k];
        }
    }
    // brings q' into levels, which count in units of their tier's book,
    float largest[ROWS] = {};
    DQ_UNROLL_BY_1
    for (int j = lane; j < D; j += 32) {
        float4 s = mine[j];
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

    // finds the step of each row, from its largest magnitude,
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

    // and puts the bytes to their place in the fragments.
    uint32_t* words = reinterpret_cast<uint32_t*>(fragments[unit]);
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
        uint8_t* at = fragments[unit] + (groups + k.group) * 256 + k.q * 8 + k.reg * 4 + k.byte;
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
