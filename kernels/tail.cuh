// Attention over the dense tail: rows of f32, f16 or bf16 behind the coded keys of a stream. All in f32 and in the space of
// the rows: no set, nothing folded or unfolded. The result is in parts like those of coded keys (attend_warp.cuh), which
// merge.cuh adds without turning them; of their sums only the first counts.
//
// Tails are short: a chunk of a prompt at most. Block: four rows of queries of a KV head and every `parts`-th 32 keys; its
// warps share the channels, 32 at a time. Little is unrolled: fetching the code of a kernel this short is part of its time.
// Grid: (row tile * parts, KV head, stream).
//
// Shared memory: queries float4 [channel] | two turns' scores float4 [warp][key] | weights float4 [warp][key] | 32 channels
// of 32 rows f32 [warp][32][33].
#pragma once
#include "attend_warp.cuh"

namespace dq {

constexpr int TAIL_WARPS = 4;

// Elements of a type as it is in memory; one choice for many loads, not one to each.
struct F32Element { using Bits = uint32_t; static __device__ __forceinline__ float value(Bits b) { return __uint_as_float(b); } };
struct F16Element { using Bits = uint16_t; static __device__ __forceinline__ float value(Bits b) { return half_to_float(b); } };
struct Bf16Element { using Bits = uint16_t; static __device__ __forceinline__ float value(Bits b) { return bf16_to_float(b); } };
template <class Body>
__device__ __forceinline__ void by_type(uint32_t type, Body&& body) {
    if (type == DQ_TYPE_F32) body(F32Element{});
    else if (type == DQ_TYPE_F16) body(F16Element{});
    else body(Bf16Element{});
}

__device__ __forceinline__ void tail_part(const DqAttend& p) {
    constexpr int MOST_DIM = 256, ROWS = 4, TURNS = MOST_DIM / (32 * TAIL_WARPS), AT_ONCE = 16;
    __shared__ float4 queries[MOST_DIM], scores[2][TAIL_WARPS][KEYS_PER_WARP], shared_weights[TAIL_WARPS][KEYS_PER_WARP];
    __shared__ float shared_rows[TAIL_WARPS][KEYS_PER_WARP][33];
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31, dim = p.tail.head_dim;
    float4* weights = shared_weights[warp];
    float (*rows)[33] = shared_rows[warp];

    // Phase 1: which rows of queries and which keys.
    const uint32_t row_tile = blockIdx.x / p.tail.parts, part = blockIdx.x % p.tail.parts, head = blockIdx.y, stream = blockIdx.z;
    const Queries of = queries_of(p, stream);
    const uint32_t n_rows = of.count * p.group, first_row = row_tile * ROWS;
    if (first_row >= n_rows) return;
    const TailRows tail = tail_of(p, stream);
    const uint32_t n_coded = coded_keys(p, stream);
    for (int i = t; i < dim * ROWS; i += 32 * TAIL_WARPS) {
        const uint32_t row = first_row + i / dim, c = i % dim;
        float q = 0.0f;
        if (row < n_rows) q = load_row(p.q, of.first + row / p.group, head * p.group + row % p.group, c) * fold_factor(p);
        reinterpret_cast<float*>(queries)[c * ROWS + i / dim] = q;
    }
    __syncthreads();

    // Weights count from exp2(m), the same in all warps. A lane has its own keys' share of the sum, and of its warp's turns
    // one channel each.
    float m[ROWS], sum[ROWS] = {}, acc[TURNS][ROWS] = {};
    DQ_UNROLL
    for (int r = 0; r < ROWS; r++) m[r] = NEVER;
    uint32_t turn_of_keys = 0;
    for (uint32_t first = part * KEYS_PER_WARP; first < tail.count; first += p.tail.parts * KEYS_PER_WARP) {
        // Phase 2: what hides key `first + lane`. A row that a query does not see may hold anything, NaN included.
        float added[ROWS];
        bool visible = false;
        DQ_UNROLL_BY_1
        for (int r = 0; r < ROWS; r++) {
            const float more = first_row + r < n_rows ? mask_of(p, stream, (first_row + r) / p.group, of.count, n_coded + first + lane, n_coded + tail.count) : NEVER;
            DQ_UNROLL
            for (int i = 0; i < ROWS; i++) if (i == r) added[i] = more;
            visible |= more != NEVER;
        }
        if (!__any_sync(ALL_LANES, visible)) continue;
        // 32 channels of the tile's rows to shared memory; in place of rows behind the end comes the last one.
        const uint32_t last = tail.count - first - 1;
        auto stage = [&](const DqRows& from, int at) {
            const uint8_t* row = static_cast<const uint8_t*>(from.data) + (tail.first + first) * from.token_stride + head * from.head_stride;
            const int c = at + lane < dim ? at + lane : dim - 1;
            __syncwarp();
            by_type(from.type, [&](auto element) {
                using E = decltype(element);
                DQ_UNROLL_BY_1
                for (uint32_t k = 0; k < KEYS_PER_WARP; k += AT_ONCE) {
                    typename E::Bits bits[AT_ONCE];
                    DQ_UNROLL
                    for (uint32_t i = 0; i < AT_ONCE; i++) {
                        bits[i] = at_bytes<typename E::Bits>(row, c * sizeof(bits[0]));
                        if (k + i < last) row += from.token_stride;
                    }
                    DQ_UNROLL
                    for (uint32_t i = 0; i < AT_ONCE; i++) rows[k + i][lane] = E::value(bits[i]);
                }
            });
            __syncwarp();  // rows are there
        };

        // Phase 3: scores, in units of log2: a key to a lane, the warps' channels added in one order for all.
        float s[ROWS] = {};
        DQ_UNROLL_BY_1
        for (int at = 32 * warp; at < dim; at += 32 * TAIL_WARPS) {
            stage(p.tail.k, at);
            const int n = dim - at < 32 ? dim - at : 32;
            DQ_UNROLL_BY_4
            for (int i = 0; i < n; i++) {
                const float4 q = queries[at + i];
                const float k = rows[lane][i];
                s[0] += q.x * k, s[1] += q.y * k, s[2] += q.z * k, s[3] += q.w * k;
            }
        }
        // Two turns' room: no warp is more than a barrier ahead of another.
        float4 (&shares)[TAIL_WARPS][KEYS_PER_WARP] = scores[turn_of_keys];
        turn_of_keys ^= 1;
        shares[warp][lane] = make_float4(s[0], s[1], s[2], s[3]);
        __syncthreads();
        s[0] = s[1] = s[2] = s[3] = 0.0f;
        DQ_UNROLL
        for (int w = 0; w < TAIL_WARPS; w++) {
            const float4 share = shares[w][lane];
            s[0] += share.x, s[1] += share.y, s[2] += share.z, s[3] += share.w;
        }

        // Phase 4: softmax.
        float weight[ROWS];
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            if (p.softcap > 0.0f) s[r] = tanh_fast(s[r]) * (p.softcap * LOG2_E);
            s[r] = added[r] == NEVER ? NEVER : s[r] + added[r];
            const float highest = fmaxf(m[r], warp_max(s[r])), base = highest == NEVER ? 0.0f : highest;
            const float shrink = exp2_fast(m[r] - base);
            weight[r] = exp2_fast(s[r] - base);
            m[r] = highest;
            sum[r] = sum[r] * shrink + weight[r];
            DQ_UNROLL
            for (int j = 0; j < TURNS; j++) acc[j][r] *= shrink;
        }
        weights[lane] = make_float4(weight[0], weight[1], weight[2], weight[3]);

        // Phase 5: weighted sums. What has no weight is left out: it may be NaN.
        DQ_UNROLL_BY_1
        for (int j = 0; j < TURNS; j++) {
            const int at = 32 * (warp + TAIL_WARPS * j);
            if (at >= dim) break;
            stage(p.tail.v, at);
            float of_turn[ROWS] = {};
            DQ_UNROLL_BY_4
            for (int i = 0; i < KEYS_PER_WARP; i++) {
                const float4 of_key = weights[i];
                const float v = rows[i][lane], w[ROWS] = {of_key.x, of_key.y, of_key.z, of_key.w};
                DQ_UNROLL
                for (int r = 0; r < ROWS; r++) of_turn[r] = w[r] == 0.0f ? of_turn[r] : of_turn[r] + w[r] * v;
            }
            DQ_UNROLL
            for (int i = 0; i < TURNS; i++) {
                DQ_UNROLL
                for (int r = 0; r < ROWS; r++) if (i == j) acc[i][r] += of_turn[r];
            }
        }
    }

    // Phase 6: the part's result. NaN of a visible row must outweigh all other parts.
    DQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        if (first_row + r >= n_rows) break;
        const float whole = warp_sum(sum[r]);
        const uint64_t row = (uint64_t(stream) * p.n_kv_heads + head) * (p.n_q * p.group) + first_row + r;
        const uint64_t at = row * attend_parts(p) + coded_parts(p) + part;
        if (t == 0) p.partial_sums[at * SUMS] = whole, p.partial_sums[at * SUMS + DQ_MAX_SETS] = whole == whole ? m[r] : __builtin_huge_valf();
        DQ_UNROLL
        for (int j = 0; j < TURNS; j++) {
            const int c = t + 32 * TAIL_WARPS * j;
            if (c < dim) p.partial[at * dim + c] = acc[j][r];
        }
    }
}

__device__ __forceinline__ void attend_tail(const DqAttend& p) {
    start_next_kernel();
    tail_part(p);
    // Nothing of fold is read here; but attend waits for this kernel alone and needs fold to be done.
    wait_for_previous_kernel();
}

}  // namespace dq
