// Joins the parts of a row (splits of the keys, linear parts of V) in one softmax and unfolds the output:
//   out = (sum_t decode_t acc_t + sum_e l_e mean_e + acc of the tail) / l
// A row without visible keys yields zeros.
//
// Two kernels. Of few rows: a block to a row (stream, KV head, query, query head of the group), as many at a time as there is room
// for: of many streams all should find some at once. Up to 16 warps; each takes every so many parts, lanes over runs of channels.
// Memory is far away and there is little else to do: a warp loads several parts whole before it knows the first maximum, and weighs
// them from the largest that it has seen. The first warp joins the warps and goes on alone.
//
// Of many rows, with few parts to each and values that the rotation unfolds: a row to a warp, which does the same by itself, one row
// after the other. All rows of a block are of one stream and KV head, and means come once for all of them.
// Grid: (blocks that share the rows, KV head, stream).
#pragma once
#include "attend.cuh"

namespace dq {

// Bytes of dynamic shared memory of a block.
template <class V> constexpr uint32_t merge_shared_bytes(uint32_t threads) { return threads / 32 * V::D * 4; }

// Parts that a warp loads at a time; src/cuda/launch.rs has as many for each warp where it can. And warps to a block of the kernel
// for many rows.
template <class V, bool MANY = false> constexpr int MERGE_AT_ONCE = MANY ? 2 : V::D <= 128 ? 8 : 4;
constexpr int MERGE_MANY_WARPS = 8;

template <class V, bool MANY>
__device__ __forceinline__ void attend_merge(const DqAttend& p) {
    constexpr int D = V::D, WARPS = MANY ? MERGE_MANY_WARPS : 16, RUN = D == 64 ? 2 : 4, PER = (D + 32 * RUN - 1) / (32 * RUN), CHANNELS = PER * RUN;
    constexpr int AT_ONCE = MERGE_AT_ONCE<V, MANY>;
    constexpr bool BUTTERFLIES = (D & (D - 1)) == 0, UNFOLDS = !(MANY && BUTTERFLIES);  // from latents in shared memory
    DQ_DYNAMIC_SHARED(shared);
    __shared__ __align__(16) float block_latents[MANY && UNFOLDS ? WARPS : 1][D];
    __shared__ __align__(16) uint16_t means[DQ_MAX_SETS][D];
    __shared__ float sums[WARPS][DQ_MAX_SETS];
    __shared__ float most[WARPS];
    // Those who join a row, the block or a warp of it: which of these they are, threads and warps counted within.
    const uint32_t team = MANY ? threadIdx.x >> 5 : 0, t = MANY ? threadIdx.x & 31 : threadIdx.x, threads = MANY ? 32 : blockDim.x;
    const uint32_t warp = t >> 5, lane = t & 31, warps = threads >> 5;
    auto sync_team = [] {
        if constexpr (MANY) __syncwarp();
        else __syncthreads();
    };
    float (*gathered)[D] = reinterpret_cast<float (*)[D]>(shared) + team;  // of each warp
    float* latents = block_latents[UNFOLDS ? team : 0];
    const uint32_t n_rows = p.n_q * p.group;
    const uint32_t head = MANY ? blockIdx.y : blockIdx.x / n_rows % p.n_kv_heads, stream = MANY ? blockIdx.z : blockIdx.x / n_rows / p.n_kv_heads;
    uint32_t row = MANY ? blockIdx.x * WARPS + team : blockIdx.x % n_rows, query = row / p.group;
    const Queries queries = queries_of(p, stream);
    start_next_kernel();
    if ((MANY ? (row - team) / p.group : query) >= queries.count) return wait_for_previous_kernel();
    const SetList sets(p.v.heads[head]);
    for (uint32_t i = threadIdx.x; i < DQ_MAX_SETS * D / 8; i += blockDim.x) {
        const uint32_t e = i / (D / 8), c = i % (D / 8) * 8;
        if (sets.present >> e & 1) cp_async_16(&means[e][c], p.v.means + (uint64_t(head) * DQ_MAX_SETS + e) * D + c);
    }
    cp_async_commit();
    // The lane's channels: RUN of them from each of these on.
    auto channel = [&](int k) { return RUN * int(lane + 32 * k); };
    uint32_t negative = 0;  // those whose sign the rotation turns
    if constexpr (BUTTERFLIES) {
        DQ_UNROLL
        for (int c = 0; c < CHANNELS; c++) negative |= rotation_sign<D>(p.v.rotation, 0, channel(c / RUN) + c % RUN) << c;
    }
    wait_for_previous_kernel();

    auto load_runs = [&](float* to, const float* from) {
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            if (D % (32 * RUN) != 0 && channel(k) >= D) continue;
            if constexpr (RUN == 4) {
                const float4 v = *reinterpret_cast<const float4*>(from + channel(k));
                to[4 * k] = v.x, to[4 * k + 1] = v.y, to[4 * k + 2] = v.z, to[4 * k + 3] = v.w;
            } else {
                const float2 v = *reinterpret_cast<const float2*>(from + channel(k));
                to[2 * k] = v.x, to[2 * k + 1] = v.y;
            }
        }
    };

    auto store_runs = [&](float* to, const float (&from)[CHANNELS]) {
        DQ_UNROLL
        for (int c = 0; c < CHANNELS; c++) if (channel(c / RUN) < D) to[channel(c / RUN) + c % RUN] = from[c];
    };

    if constexpr (MANY) {
        cp_async_wait<0>();
        __syncthreads();
    }
    const uint32_t transforms = MANY ? 1 : p.v_transforms;
    bool again = false;
    while (query < queries.count) {
        const uint64_t first = (MANY ? (uint64_t(stream) * p.n_kv_heads + head) * n_rows + row : blockIdx.x) * attend_parts(p);
        const uint32_t q_head = head * p.group + row - query * p.group;
        // Of the first warp: the output so far, the sum of weights of set `lane`, that of all without a set (the sink's, the
        // tail's), all counted from exp2(m).
        float x[CHANNELS] = {}, set_sum = 0.0f, other_sum = p.sink_logits != nullptr ? 1.0f : 0.0f;
        float m = p.sink_logits != nullptr ? p.sink_logits[q_head] * LOG2_E : NEVER;
        for (uint32_t source = 0; source <= transforms; source++) {
            const bool tail = source == transforms;
            if (tail ? p.tail.parts == 0 : !names_transform(sets, source)) continue;
            if (again) sync_team();
            again = true;

            // Phase 1: each warp its parts, counted from the largest of their references. A part that saw no key is zeros.
            const uint64_t begin = first + (tail ? coded_parts(p) : source * p.n_splits);
            const uint32_t n = tail ? p.tail.parts : p.n_splits;
            float acc[CHANNELS] = {}, sum = 0.0f, of_warp = NEVER;
            const float *values = p.partial + begin * D, *part_sums = p.partial_sums + begin * SUMS;
            // The tail's parts have one entry beside their maximum.
            const uint32_t entries = tail ? 1 : DQ_MAX_SETS;
            for (uint32_t i = warp; i < n; i += AT_ONCE * warps) {
                float v[AT_ONCE][CHANNELS], entry[AT_ONCE], highest[AT_ONCE];
                DQ_UNROLL
                for (int a = 0; a < AT_ONCE; a++) {
                    // In place of those beyond the end the first one once more: no branch to a load.
                    const uint32_t part = i + a * warps < n ? i + a * warps : i;
                    entry[a] = 0.0f;
                    if (lane < entries || lane == DQ_MAX_SETS) entry[a] = part_sums[part * SUMS + lane];
                    DQ_UNROLL
                    for (int c = 0; c < CHANNELS; c++) v[a][c] = 0.0f;
                    load_runs(v[a], values + part * D);
                }
                DQ_UNROLL
                for (int a = 0; a < AT_ONCE; a++) {
                    const float maximum = __shfl_sync(ALL_LANES, entry[a], DQ_MAX_SETS);
                    highest[a] = i + a * warps < n ? maximum : NEVER;
                }
                const float before = of_warp;
                DQ_UNROLL
                for (int a = 0; a < AT_ONCE; a++) of_warp = fmaxf(of_warp, highest[a]);
                const float shrink = weight_from(before, of_warp);
                sum *= shrink;
                DQ_UNROLL
                for (int c = 0; c < CHANNELS; c++) acc[c] *= shrink;
                DQ_UNROLL
                for (int a = 0; a < AT_ONCE; a++) {
                    const float weight = weight_from(highest[a], of_warp);
                    sum += weight * entry[a];
                    DQ_UNROLL
                    for (int c = 0; c < CHANNELS; c++) acc[c] += weight * v[a][c];
                }
            }
            if constexpr (!MANY) {
                store_runs(gathered[warp], acc);
                if (lane < DQ_MAX_SETS) sums[warp][lane] = sum;
                if (lane == 0) most[warp] = of_warp;
                cp_async_wait<0>();
                __syncthreads();
            }

            // Phase 2: the warps joined, where there are several, and out of the coded space.
            float y[CHANNELS] = {};
            if (warp == 0) {
                const float of_this = sum, before = m;
                if constexpr (!MANY) of_warp = lane < warps ? most[lane] : NEVER;
                m = fmaxf(m, MANY ? of_warp : warp_max(of_warp));
                const float weights = weight_from(of_warp, m), shrink = weight_from(before, m);
                set_sum *= shrink, other_sum *= shrink, sum = 0.0f;
                DQ_UNROLL
                for (int c = 0; c < CHANNELS; c++) x[c] *= shrink;
                DQ_UNROLL_BY_4
                for (uint32_t w = 0; w < warps; w++) {
                    const float weight = MANY ? weights : __shfl_sync(ALL_LANES, weights, w);
                    float v[CHANNELS] = {};
                    if constexpr (!MANY) load_runs(v, gathered[w]);
                    sum += weight * (MANY ? of_this : sums[w][lane % DQ_MAX_SETS]);
                    DQ_UNROLL
                    for (int c = 0; c < CHANNELS; c++) y[c] += weight * (MANY ? acc[c] : v[c]);
                }
                if (tail) other_sum += __shfl_sync(ALL_LANES, sum, 0);
                else set_sum += sum;
                DQ_UNROLL
                for (int c = 0; c < CHANNELS; c++) {
                    const int at = channel(c / RUN) + c % RUN;
                    for_each<V::tiers>([&](auto tier) {
                        constexpr int T = decltype(tier)::value;
                        if (!tail && at >= V::first(T) && at < V::first(T) + V::channels(T)) y[c] *= Book<V::bits(T)>::unit;
                    });
                }
            }
            if (BUTTERFLIES && source == 0) {
                if constexpr (BUTTERFLIES) {
                    if (warp == 0) {
                        // Channels' bits are in another order here than there: to Hadamard's matrix one is as good as the other.
                        butterflies<D>(y, lane);
                        DQ_UNROLL
                        for (int c = 0; c < CHANNELS; c++) y[c] = with_sign(y[c], negative >> c & 1) * rsqrtf(float(D));
                    }
                }
            } else if (UNFOLDS && !tail) {
                if (warp == 0) {
                    DQ_UNROLL
                    for (int c = 0; c < CHANNELS; c++) if (channel(c / RUN) < D) latents[channel(c / RUN) + c % RUN] = y[c], y[c] = 0.0f;
                }
                sync_team();
                // Threads that share a channel of the output, each with a run of latents.
                constexpr uint32_t MOST_SHARERS = 4;
                const uint32_t sharers = threads >= MOST_SHARERS * D && D % (8 * MOST_SHARERS) == 0 ? MOST_SHARERS : 1;
                for (uint32_t i = t; i < sharers * D; i += threads) {
                    gathered[i / D][i % D] = unfold_channel<D>(p.v, head, source, latents, i % D, i / D * (D / sharers), D / sharers);
                }
                sync_team();
                for (uint32_t s = 0; s < sharers && warp == 0; s++) {
                    float v[CHANNELS] = {};
                    load_runs(v, gathered[s]);
                    DQ_UNROLL
                    for (int c = 0; c < CHANNELS; c++) y[c] += v[c];
                }
            }
            DQ_UNROLL
            for (int c = 0; c < CHANNELS; c++) x[c] += y[c];
        }
        if (warp != 0) return;

        // Phase 3: the means, and the sum of all weights.
        const float total = warp_sum(lane < DQ_MAX_SETS ? set_sum : 0.0f) + other_sum;
        for (uint32_t left = sets.present; left != 0; left &= left - 1) {
            const uint32_t e = __ffs(left) - 1;
            const float l = __shfl_sync(ALL_LANES, set_sum, e);
            DQ_UNROLL
            for (int c = 0; c < CHANNELS; c++) if (l != 0.0f && channel(c / RUN) < D) x[c] += l * half_to_float(means[e][channel(c / RUN) + c % RUN]);
        }
        const float scale = total > 0.0f ? 1.0f / total : 0.0f;
        DQ_UNROLL
        for (int c = 0; c < CHANNELS; c++) x[c] *= scale;
        if constexpr (MANY) {
            // Of many rows it counts that lanes next to each other store what lies next to each other.
            store_runs(gathered[warp], x);
            sync_team();
            DQ_UNROLL
            for (int c = lane; c < D; c += 32) store_row(p.out, queries.first + query, q_head, c, gathered[warp][c]);
        } else {
            DQ_UNROLL
            for (int c = 0; c < CHANNELS; c++) {
                if (channel(c / RUN) < D) store_row(p.out, queries.first + query, q_head, channel(c / RUN) + c % RUN, x[c]);
            }
        }
        if (!MANY) return;
        row += gridDim.x * WARPS, query = row / p.group;
    }
}

}  // namespace dq
