// Joins the parts of a row (splits of the keys, linear parts of V) in one softmax and unfolds the output:
//   out = (sum_t decode_t acc_t + sum_e l_e mean_e + acc of the tail) / l
// A row without visible keys yields zeros.
//
// Grid: one block per row (stream, KV head, query, query head of the group). Up to 16 warps; each takes every so many
// parts, lanes over runs of four channels.
#pragma once
#include "attend.cuh"

namespace dq {

// Weights of parts that wait in shared memory.
constexpr uint32_t MERGE_PARTS = 512;

template <class V>
__device__ __forceinline__ void attend_merge(const DqAttend& p) {
    constexpr int D = V::D, WARPS = 16, PER = (D + 127) / 128, AT_ONCE = 4;
    __shared__ __align__(16) float gathered[WARPS][D];
    __shared__ __align__(16) float latents[D];
    __shared__ float weights[MERGE_PARTS], set_sums[DQ_MAX_SETS + 1];
    __shared__ float sums[WARPS][DQ_MAX_SETS + 1];  // the last: the tail's
    __shared__ float reduced[WARPS];
    const uint32_t t = threadIdx.x, warp = t >> 5, lane = t & 31, warps = blockDim.x >> 5;
    const uint32_t n_rows = p.n_q * p.group, row = blockIdx.x % n_rows;
    const uint32_t head = blockIdx.x / n_rows % p.n_kv_heads, stream = blockIdx.x / n_rows / p.n_kv_heads;
    const uint32_t parts_per_transform = p.n_splits * p.key_warps;
    const uint64_t first = uint64_t(blockIdx.x) * attend_parts(p);
    const uint32_t query = row / p.group, q_head = head * p.group + row % p.group;
    const Queries queries = queries_of(p, stream);
    if (query >= queries.count) return;
    // Threads that share a channel of the output, each with a run of latents.
    constexpr uint32_t MOST_RUNS_OF_LATENTS = 4;
    const uint32_t runs = blockDim.x >= MOST_RUNS_OF_LATENTS * D && D % (8 * MOST_RUNS_OF_LATENTS) == 0 ? MOST_RUNS_OF_LATENTS : 1;

    const uint32_t present = p.v.heads[head].present;
    wait_for_previous_kernel();

    // Phase 1: the maximum over all parts, and the sink's logit.
    float m = p.sink_logits != nullptr ? p.sink_logits[q_head] * LOG2_E : NEVER;
    const float sink = m;
    for (uint32_t i = t; i < attend_parts(p); i += blockDim.x) m = fmaxf(m, p.partial_sums[(first + i) * SUMS + DQ_MAX_SETS]);
    m = warp_max(m);
    if (lane == 0) reduced[warp] = m;
    __syncthreads();
    for (uint32_t w = 0; w < warps; w++) m = fmaxf(m, reduced[w]);
    const bool any = m > NEVER;
    // The weighted sum of `n` parts from `begin` on, in `latents`, unless all are without weight; to `sum` what the lane's
    // entry of their sums adds up to. Several parts at a time, so that their loads overlap; nothing is read of a part without
    // weight. The tail's parts have one entry and no unit.
    auto gather = [&](auto tail, uint32_t begin, uint32_t n, float& sum) -> bool {
        constexpr bool TAIL = decltype(tail)::value;
        float4 acc[PER] = {};
        bool seen = false;
        for (uint32_t from = 0; from < n; from += MERGE_PARTS) {
            const uint32_t some = n - from < MERGE_PARTS ? n - from : MERGE_PARTS;
            const uint64_t at = first + begin + from;
            __syncthreads();
            for (uint32_t i = t; i < some; i += blockDim.x) {
                // A part that saw no key left nothing behind but its maximum.
                const float part_m = p.partial_sums[(at + i) * SUMS + DQ_MAX_SETS];
                const bool counts = any && part_m > NEVER;
                weights[i] = counts ? exp2_fast(part_m - m) : 0.0f;
                seen |= counts;
            }
            __syncthreads();
            for (uint32_t i = warp; i < some; i += AT_ONCE * warps) {
                float weight[AT_ONCE], entry[AT_ONCE];
                float4 v[AT_ONCE][PER];
                DQ_UNROLL
                for (int a = 0; a < AT_ONCE; a++) {
                    const uint32_t part = i + a * warps;
                    weight[a] = part < some ? weights[part] : 0.0f;
                    entry[a] = weight[a] != 0.0f && lane < (TAIL ? 1 : DQ_MAX_SETS) ? p.partial_sums[(at + part) * SUMS + lane] : 0.0f;
                    DQ_UNROLL
                    for (int k = 0; k < PER; k++) {
                        const int c = 4 * (lane + 32 * k);
                        v[a][k] = {};
                        if (weight[a] != 0.0f && c < D) v[a][k] = *reinterpret_cast<const float4*>(p.partial + (at + part) * D + c);
                    }
                }
                DQ_UNROLL
                for (int a = 0; a < AT_ONCE; a++) {
                    sum += weight[a] * entry[a];
                    DQ_UNROLL
                    for (int k = 0; k < PER; k++) {
                        acc[k].x += weight[a] * v[a][k].x, acc[k].y += weight[a] * v[a][k].y;
                        acc[k].z += weight[a] * v[a][k].z, acc[k].w += weight[a] * v[a][k].w;
                    }
                }
            }
        }
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            const int c = 4 * (lane + 32 * k);
            if (c < D) *reinterpret_cast<float4*>(&gathered[warp][c]) = acc[k];
        }
        if (!__syncthreads_or(seen)) return false;
        for (int c = t; c < D; c += blockDim.x) {
            float y = 0.0f;
            for (uint32_t w = 0; w < warps; w++) y += gathered[w][c];
            for_each<V::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value;
                if (!TAIL && c >= V::first(T) && c < V::first(T) + V::channels(T)) y *= Book<V::bits(T)>::unit;
            });
            latents[c] = y;
        }
        __syncthreads();
        return true;
    };

    // Phase 2: each linear part gathered, unfolded and added; sums per set. A thread's channels are t, t + blockDim ...;
    // with runs, thread t has channel t % D.
    float x[4 * PER] = {}, set_sum = 0.0f, tail_sum = 0.0f;
    auto add_latents = [&] {
        for (uint32_t i = 0, c = t; c < D; c += blockDim.x, i++) {
            DQ_UNROLL
            for (int k = 0; k < 4 * PER; k++) if (k == int(i)) x[k] += latents[c];
        }
    };
    for (uint32_t transform = 0; transform < p.v_transforms; transform++) {
        if (!gather(Int<0>{}, transform * parts_per_transform, parts_per_transform, set_sum)) continue;
        constexpr bool BUTTERFLIES = (D & (D - 1)) == 0;
        if (BUTTERFLIES && transform == 0) {
            if constexpr (BUTTERFLIES) {
                if (warp == 0) {
                    float v[D / 32];
                    DQ_UNROLL
                    for (int k = 0; k < D / 32; k++) v[k] = latents[lane + 32 * k];
                    butterflies<D>(v, lane);
                    DQ_UNROLL
                    for (int k = 0; k < D / 32; k++) {
                        const int c = lane + 32 * k;
                        latents[c] = with_sign(v[k], rotation_sign<D>(p.v.rotation, 0, c)) * rsqrtf(float(D));
                    }
                }
            }
            __syncthreads();
            add_latents();
        } else if (runs > 1) {
            if (t < runs * D) x[0] += unfold_channel<D>(p.v, head, transform, latents, t % D, t / D * (D / runs), D / runs);
        } else {
            for (uint32_t i = 0, c = t; c < D; c += blockDim.x, i++) {
                float part = unfold_channel<D>(p.v, head, transform, latents, c, 0, D);
                DQ_UNROLL
                for (int k = 0; k < 4 * PER; k++) if (k == int(i)) x[k] += part;
            }
        }
    }

    // The tail was never folded.
    if (p.tail.parts > 0 && gather(Int<1>{}, coded_parts(p), p.tail.parts, tail_sum)) add_latents();

    // Phase 3: the runs of a channel, the means, and the sum of all weights.
    __syncthreads();
    if (runs > 1) {
        if (t < runs * D) gathered[t / D][t % D] = x[0];
        __syncthreads();
        if (t < D) x[0] = (gathered[0][t] + gathered[1][t]) + (gathered[2][t] + gathered[3][t]);
    }
    if (lane < DQ_MAX_SETS) sums[warp][lane] = set_sum;
    if (lane == 0) sums[warp][DQ_MAX_SETS] = tail_sum;
    __syncthreads();
    if (t <= DQ_MAX_SETS) {
        float l = 0.0f;
        for (uint32_t w = 0; w < warps; w++) l += sums[w][t];
        set_sums[t] = l;
    }
    __syncthreads();
    float total = set_sums[DQ_MAX_SETS] + (any && p.sink_logits != nullptr ? exp2_fast(sink - m) : 0.0f);
    for (uint32_t left = present; left != 0; left &= left - 1) {
        const uint32_t e = __ffs(left) - 1;
        const float l = set_sums[e];
        if (l == 0.0f) continue;
        total += l;
        const uint16_t* mean = p.v.means + (uint64_t(head) * DQ_MAX_SETS + e) * D;
        for (uint32_t i = 0, c = t; c < D; c += blockDim.x, i++) {
            float part = l * half_to_float(load_global(mean + c));
            DQ_UNROLL
            for (int k = 0; k < 4 * PER; k++) if (k == int(i)) x[k] += part;
        }
    }
    const float scale = total > 0.0f ? 1.0f / total : 0.0f;
    for (uint32_t i = 0, c = t; c < D; c += blockDim.x, i++) {
        float v = 0.0f;
        DQ_UNROLL
        for (int k = 0; k < 4 * PER; k++) if (k == int(i)) v = x[k];
        store_row(p.out, queries.first + query, q_head, c, v * scale);
    }
}

}  // namespace dq
