// Attention over the dense tail: rows of f32, f16 or bf16 behind the coded keys of a stream. All in f32 and in the space of
// the rows: no set, nothing folded or unfolded. The result is in parts like those of coded keys (attend_warp.cuh), which
// merge.cuh adds without turning them; of their sums only the first counts.
//
// Tails are short: a chunk of a prompt at most. Warp: four rows of queries of a KV head and every `parts`-th 32 keys; no
// warp waits for another.
// Grid: (row tile * parts, TAIL_WARPS to a block; KV head; stream).
//
// Shared memory, to each warp its own: queries float4 [channel]; weights float4 [key]; 32 channels of the keys f32 [32][33].
#pragma once
#include "attend_warp.cuh"

namespace dq {

constexpr int TAIL_WARPS = 4;

__device__ __forceinline__ void tail_part(const DqAttend& p) {
    constexpr int MOST_DIM = 256, PER = MOST_DIM / 32, ROWS = 4, AT_ONCE = 8;
    __shared__ float4 shared_queries[TAIL_WARPS][MOST_DIM];
    __shared__ float4 shared_weights[TAIL_WARPS][KEYS_PER_WARP];
    __shared__ float shared_keys[TAIL_WARPS][KEYS_PER_WARP][33];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, dim = p.tail.head_dim;
    float4 *queries = shared_queries[warp], *weights = shared_weights[warp];
    float (*keys)[33] = shared_keys[warp];

    // Phase 1: which rows of queries and which keys.
    const uint32_t index = blockIdx.x * TAIL_WARPS + warp, row_tile = index / p.tail.parts, part = index % p.tail.parts;
    const uint32_t head = blockIdx.y, stream = blockIdx.z;
    const Queries of = queries_of(p, stream);
    const uint32_t n_rows = of.count * p.group, first_row = row_tile * ROWS;
    if (first_row >= n_rows) return;
    const TailRows tail = tail_of(p, stream);
    const uint32_t n_coded = coded_keys(p, stream);
    const float factor = fold_factor(p);
    uint32_t query[ROWS];
    DQ_UNROLL
    for (int r = 0; r < ROWS; r++) query[r] = (first_row + r) / p.group;
    for (int c = lane; c < dim; c += 32) {
        float q[ROWS] = {};
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            if (first_row + r < n_rows) q[r] = load_row(p.q, of.first + query[r], head * p.group + (first_row + r) % p.group, c) * factor;
        }
        queries[c] = make_float4(q[0], q[1], q[2], q[3]);
    }

    // Weights count from exp2(m). A lane has the channels lane + 32 k and its own keys' share of the sum.
    float m[ROWS], sum[ROWS] = {}, acc[ROWS][PER] = {};
    DQ_UNROLL
    for (int r = 0; r < ROWS; r++) m[r] = NEVER;
    for (uint32_t first = part * KEYS_PER_WARP; first < tail.count; first += p.tail.parts * KEYS_PER_WARP) {
        // Phase 2: what hides key `first + lane`. A row that a query does not see may hold anything, NaN included.
        float added[ROWS];
        bool visible = false;
        DQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            added[r] = first_row + r < n_rows ? mask_of(p, stream, query[r], of.count, n_coded + first + lane, n_coded + tail.count) : NEVER;
            visible |= added[r] != NEVER;
        }
        if (!__any_sync(ALL_LANES, visible)) continue;
        auto row_at = [&](const DqRows& rows, uint32_t key) {
            const uint32_t row = first + key < tail.count ? first + key : tail.count - 1;
            return (tail.first + row) * rows.token_stride + head * rows.head_stride;
        };

        // Phase 3: scores, in units of log2. Loads have channels next to each other, products a key to a lane.
        float s[ROWS] = {};
        for (int at = 0; at < dim; at += 32) {
            const int c = at + lane < dim ? at + lane : dim - 1;
            uint32_t bits[KEYS_PER_WARP];
            by_width(p.tail.k, [&](auto zero) {
                DQ_UNROLL
                for (int k = 0; k < KEYS_PER_WARP; k++) bits[k] = element_bits<decltype(zero)>(p.tail.k, row_at(p.tail.k, k), c);
            });
            __syncwarp();
            DQ_UNROLL
            for (int k = 0; k < KEYS_PER_WARP; k++) keys[k][lane] = element_value(p.tail.k, bits[k]);
            __syncwarp();
            const int n = dim - at < 32 ? dim - at : 32;
            DQ_UNROLL_BY_8
            for (int i = 0; i < n; i++) {
                const float4 q = queries[at + i];
                const float k = keys[lane][i];
                s[0] += q.x * k, s[1] += q.y * k, s[2] += q.z * k, s[3] += q.w * k;
            }
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
            for (int k = 0; k < PER; k++) acc[r][k] *= shrink;
        }
        __syncwarp();
        weights[lane] = make_float4(weight[0], weight[1], weight[2], weight[3]);
        __syncwarp();

        // Phase 5: weighted sums. What has no weight is left out: it may be NaN.
        DQ_UNROLL_BY_1
        for (int from = 0; from < KEYS_PER_WARP && first + from < tail.count; from += AT_ONCE) {
            uint32_t bits[AT_ONCE][PER];
            by_width(p.tail.v, [&](auto zero) {
                DQ_UNROLL
                for (int i = 0; i < AT_ONCE; i++) {
                    const uint64_t at = row_at(p.tail.v, from + i);
                    DQ_UNROLL
                    for (int k = 0; k < PER; k++) bits[i][k] = lane + 32 * k < dim ? element_bits<decltype(zero)>(p.tail.v, at, lane + 32 * k) : 0;
                }
            });
            DQ_UNROLL
            for (int i = 0; i < AT_ONCE; i++) {
                const float4 of_key = weights[from + i];
                const float w[ROWS] = {of_key.x, of_key.y, of_key.z, of_key.w};
                DQ_UNROLL
                for (int r = 0; r < ROWS; r++) {
                    if (w[r] == 0.0f) continue;
                    DQ_UNROLL
                    for (int k = 0; k < PER; k++) acc[r][k] += w[r] * element_value(p.tail.v, bits[i][k]);
                }
            }
        }
    }

    // Phase 6: the part's result. Where scores were NaN alone, the part must count nevertheless.
    DQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        if (first_row + r >= n_rows) break;
        const float whole = warp_sum(sum[r]);
        const uint64_t row = (uint64_t(stream) * p.n_kv_heads + head) * (p.n_q * p.group) + first_row + r;
        const uint64_t at = row * attend_parts(p) + coded_parts(p) + part;
        if (lane == 0) p.partial_sums[at * SUMS] = whole, p.partial_sums[at * SUMS + DQ_MAX_SETS] = whole == whole ? m[r] : 0.0f;
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            if (lane + 32 * k < dim) p.partial[at * dim + lane + 32 * k] = acc[r][k];
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
