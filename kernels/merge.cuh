// Joins the parts of a row (splits of the keys, linear parts of V) in one softmax and unfolds the output:
//   out = (sum_t decode_t acc_t + sum_e l_e mean_e) / l
// A row without visible keys yields zeros.
//
// Grid: one block per row (stream, KV head, query, query head of the group). Up to 16 warps; each takes every so many
// parts, lanes over runs of four channels.
#pragma once
#include "attend.cuh"

namespace dq {

template <class V>
__device__ __forceinline__ void attend_merge(const DqAttend& p) {
    constexpr int D = V::D, WARPS = 16;
    __shared__ __align__(16) float gathered[WARPS][D];
    __shared__ float sums[WARPS][DQ_MAX_SETS];
    __shared__ float reduced[WARPS];
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31, warps = blockDim.x >> 5;
    const uint32_t n_rows = p.n_q * p.group, row = blockIdx.x % n_rows;
    const uint32_t head = blockIdx.x / n_rows % p.n_kv_heads, stream = blockIdx.x / n_rows / p.n_kv_heads;
    const uint32_t parts = attend_parts(p), parts_per_transform = p.n_splits * p.key_warps;
    const uint64_t first = uint64_t(blockIdx.x) * parts;
    const uint32_t token = row / p.group, q_head = head * p.group + row % p.group;

    // Phase 1: the maximum over all parts, and the sink's logit.
    float m = p.sink_logits != nullptr ? p.sink_logits[q_head] * LOG2_E : NEVER;
    const float sink = m;
    for (uint32_t i = t; i < parts; i += blockDim.x) m = fmaxf(m, p.partial_sums[(first + i) * SUMS + DQ_MAX_SETS]);
    m = warp_max(m);
    if (lane == 0) reduced[warp] = m;
    __syncthreads();
    for (int w = 0; w < warps; w++) m = fmaxf(m, reduced[w]);

    // Phase 2: each linear part gathered, unfolded and added; sums per set.
    constexpr int PER = (D + 127) / 128;
    const bool any = m > NEVER;
    float x[2 * PER] = {}, set_sum = 0.0f;
    for (uint32_t transform = 0; transform < p.v_transforms; transform++) {
        float4 acc[PER] = {};
        bool seen = false;
        for (uint32_t i = warp; i < parts_per_transform; i += warps) {
            const uint64_t at = first + transform * parts_per_transform + i;
            const float part_m = p.partial_sums[at * SUMS + DQ_MAX_SETS];
            if (!any || part_m == NEVER) continue;
            seen = true;
            const float scale = exp2_fast(part_m - m);
            if (lane < DQ_MAX_SETS) set_sum += scale * p.partial_sums[at * SUMS + lane];
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                const int c = 4 * (lane + 32 * k);
                if (c >= D) continue;
                const float4 v = *reinterpret_cast<const float4*>(p.partial + at * D + c);
                acc[k].x += scale * v.x, acc[k].y += scale * v.y, acc[k].z += scale * v.z, acc[k].w += scale * v.w;
            }
        }
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            const int c = 4 * (lane + 32 * k);
            if (c < D) *reinterpret_cast<float4*>(&gathered[warp][c]) = acc[k];
        }
        if (!__syncthreads_or(seen)) continue;
        for (int c = t; c < D; c += blockDim.x) {
            float y = 0.0f;
            for (int w = 0; w < warps; w++) y += gathered[w][c];
            for_each<V::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value;
                if (c >= V::first(T) && c < V::first(T) + V::channels(T)) y *= Book<V::bits(T)>::unit;
            });
            gathered[0][c] = y;
        }
        __syncthreads();
        for (int i = 0, c = t; c < D; c += blockDim.x, i++) {
            float part = unfold_channel<D>(p.v, head, transform, gathered[0], c);
            DQ_UNROLL
            for (int k = 0; k < 2 * PER; k++) if (k == i) x[k] += part;
        }
        __syncthreads();
    }

    // Phase 3: means, and the sum of all weights.
    if (lane < DQ_MAX_SETS) sums[warp][lane] = set_sum;
    __syncthreads();
    float total = any && p.sink_logits != nullptr ? exp2_fast(sink - m) : 0.0f;
    for (int e = 0; e < DQ_MAX_SETS; e++) {
        float l = 0.0f;
        for (int w = 0; w < warps; w++) l += sums[w][e];
        if (l == 0.0f) continue;
        total += l;
        const uint16_t* mean = p.v.means + (uint64_t(head) * DQ_MAX_SETS + e) * D;
        for (int i = 0, c = t; c < D; c += blockDim.x, i++) {
            float part = l * half_to_float(load_global(mean + c));
            DQ_UNROLL
            for (int k = 0; k < 2 * PER; k++) if (k == i) x[k] += part;
        }
    }
    const float scale = total > 0.0f ? 1.0f / total : 0.0f;
    for (int i = 0, c = t; c < D; c += blockDim.x, i++) {
        float v = 0.0f;
        DQ_UNROLL
        for (int k = 0; k < 2 * PER; k++) if (k == i) v = x[k];
        store_row(p.out, uint64_t(stream) * p.n_q + token, q_head, c, v * scale);
    }
}

}  // namespace dq
