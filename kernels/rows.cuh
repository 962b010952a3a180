// The caller's rows, sums over a warp, and the way out of the coded space.
#pragma once
#include "plan.cuh"

namespace dq {

// Which sets of a head there are, and over which linear parts. Past the L1, which may be older than the tables when a kernel
// has started early.
struct SetList {
    uint32_t present;
    uint2 lower, upper;  // linear parts, a byte to a set
    __device__ __forceinline__ explicit SetList(const DqHeadSets& sets) : present(load_fresh(&sets.present)) {
        static_assert(DQ_MAX_SETS == 16 && offsetof(DqHeadSets, transform) % 8 == 0 && sizeof(DqHeadSets) % 8 == 0, "");
        const uint2* words = reinterpret_cast<const uint2*>(sets.transform);
        lower = load_fresh(words), upper = load_fresh(words + 1);
    }
    // The linear part of set e; absent ones count to the rotation.
    __device__ __forceinline__ uint32_t transform(uint32_t e) const {
        const uint32_t word = e & 8 ? (e & 4 ? upper.y : upper.x) : (e & 4 ? lower.y : lower.x);
        return present >> e & 1 ? word >> (8 * (e % 4)) & 0xFF : 0;
    }
    __device__ __forceinline__ bool is_over(uint32_t e, uint32_t t) const { return transform(e) == t; }
};
// Whether a head has a set over this linear part. The rotation always has one.
__device__ __forceinline__ bool names_transform(const SetList& sets, uint32_t transform) {
    bool named = transform == 0;
    DQ_UNROLL
    for (uint32_t e = 0; e < DQ_MAX_SETS; e++) named |= sets.is_over(e, transform);
    return named;
}
// All of them, a bit to each.
__device__ __forceinline__ uint32_t named_transforms(const SetList& sets) {
    uint32_t named = 1;
    DQ_UNROLL
    for (uint32_t e = 0; e < DQ_MAX_SETS; e++) named |= 1u << (sets.transform(e) & (DQ_MAX_TRANSFORMS - 1));
    return named;
}

// Slots come from device memory, where nobody has checked them: one beyond the store is as good as -1.
__device__ __forceinline__ bool in_store(const DqStore& store, int64_t slot) {
    return slot >= 0 && uint64_t(slot) < store.n_slots;
}

// An element as it is in memory, and what it is worth: so that many loads can be under way before the first is looked at.
__device__ __forceinline__ uint32_t element_bits(const DqRows& rows, uint64_t at, uint32_t channel) {
    if (rows.type == DQ_TYPE_F32) return at_bytes<uint32_t>(rows.data, at + 4ull * channel);
    return at_bytes<uint16_t>(rows.data, at + 2ull * channel);
}
__device__ __forceinline__ float element_value(const DqRows& rows, uint32_t bits) {
    if (rows.type == DQ_TYPE_F32) return __uint_as_float(bits);
    return rows.type == DQ_TYPE_F16 ? half_to_float(uint16_t(bits)) : bf16_to_float(uint16_t(bits));
}
// Of several, with one look at the type.
template <int N>
__device__ __forceinline__ void element_values(float (&x)[N], const DqRows& rows, const uint32_t (&bits)[N]) {
    if (rows.type == DQ_TYPE_F32) {
        DQ_UNROLL
        for (int k = 0; k < N; k++) x[k] = __uint_as_float(bits[k]);
    } else if (rows.type == DQ_TYPE_F16) {
        DQ_UNROLL
        for (int k = 0; k < N; k++) x[k] = half_to_float(uint16_t(bits[k]));
    } else {
        DQ_UNROLL
        for (int k = 0; k < N; k++) x[k] = bf16_to_float(uint16_t(bits[k]));
    }
}
__device__ __forceinline__ float load_row(const DqRows& rows, uint64_t token, uint32_t head, uint32_t channel) {
    return element_value(rows, element_bits(rows, token * rows.token_stride + head * rows.head_stride, channel));
}

__device__ __forceinline__ void store_row(const DqRows& rows, uint64_t token, uint32_t head, uint32_t channel, float v) {
    uint8_t* at = static_cast<uint8_t*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
    if (rows.type == DQ_TYPE_F32) reinterpret_cast<float*>(at)[channel] = v;
    else reinterpret_cast<uint16_t*>(at)[channel] = rows.type == DQ_TYPE_F16 ? float_to_half(v) : float_to_bf16(v);
}

__device__ __forceinline__ float warp_max(float v) {
    DQ_UNROLL
    for (int d = 16; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, d));
    return v;
}
__device__ __forceinline__ float warp_sum(float v) {
    DQ_UNROLL
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(ALL_LANES, v, d);
    return v;
}

// Whether entry (latent, channel) of the rotation is negative. For powers of two the matrix is Sylvester's behind the signs
// of the table's first row: no look into the table but for these.
template <int D>
__device__ __forceinline__ uint32_t rotation_sign(const uint32_t* table, int latent, int c) {
    if constexpr ((D & (D - 1)) == 0) {
        return (load_global(table + c / 32) >> (c % 32) ^ __popc(uint32_t(latent & c))) & 1;
    } else {
        return load_global(table + latent * ((D + 31) / 32) + c / 32) >> (c % 32) & 1;
    }
}
__device__ __forceinline__ float with_sign(float v, uint32_t negative) {
    return __uint_as_float(__float_as_uint(v) ^ negative << 31);
}

// Hadamard's matrix times v, D a power of two: a warp's lanes hold v[k] of channel lane + 32 k; 64 at least.
template <int D>
__device__ __forceinline__ void butterflies(float (&v)[D / 32], int lane) {
    DQ_UNROLL
    for (int d = 1; d < 32; d *= 2) {
        DQ_UNROLL
        for (int k = 0; k < D / 32; k++) {
            const float other = __shfl_xor_sync(ALL_LANES, v[k], d);
            v[k] = lane & d ? other - v[k] : v[k] + other;
        }
    }
    DQ_UNROLL
    for (int d = 1; d < D / 32; d *= 2) {
        DQ_UNROLL
        for (int k = 0; k < D / 32; k++) {
            if (k & d) continue;
            const float a = v[k], b = v[k + d];
            v[k] = a + b, v[k + d] = a - b;
        }
    }
}

// The share of the latents first ... first + n in channel c of decode y, without the mean. Both multiples of eight.
template <int D>
__device__ __forceinline__ float unfold_channel(const DqFactors& f, uint32_t head, uint32_t transform, const float* y, int c, int first, int n) {
    float x = 0.0f;
    if (transform == 0) {
        DQ_UNROLL_BY_8
        for (int j = first; j < first + n; j++) x += with_sign(y[j], rotation_sign<D>(f.rotation, j, c));
        return x * rsqrtf(float(D));
    }
    const uint16_t* row = f.decode + ((uint64_t(head) * f.max_dense + transform - 1) * D + c) * D;
    DQ_UNROLL_BY_4
    for (int j = first; j < first + n; j += 8) {
        const uint4 eight = load_global(reinterpret_cast<const uint4*>(row + j));
        const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
        DQ_UNROLL
        for (int k = 0; k < 4; k++) {
            x += half_to_float(uint16_t(words[k])) * y[j + 2 * k] + half_to_float(uint16_t(words[k] >> 16)) * y[j + 2 * k + 1];
        }
    }
    return x;
}

}  // namespace dq
