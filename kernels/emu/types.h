// f16, bf16 and the integer intrinsics that the kernels use.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emu {

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
inline float half_bits_to_float(uint16_t bits) { return float(bits_as<_Float16>(bits)); }
inline float bf16_bits_to_float(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

}  // namespace emu

struct uint2 { uint32_t x, y; } __attribute__((aligned(8)));
struct uint4 { uint32_t x, y, z, w; } __attribute__((aligned(16)));
struct float2 { float x, y; } __attribute__((aligned(8)));
struct float4 { float x, y, z, w; } __attribute__((aligned(16)));
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t v) { return emu::bits_as<float>(v); }
inline float __int_as_float(int32_t v) { return emu::bits_as<float>(v); }
inline uint32_t __float_as_uint(float v) { return emu::bits_as<uint32_t>(v); }
inline int32_t __float_as_int(float v) { return emu::bits_as<int32_t>(v); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(uint32_t v) { return __builtin_ffs(int(v)); }
inline int __clz(uint32_t v) { return v ? __builtin_clz(v) : 32; }
// One rounding each, as on the device; compile with -ffp-contract=off.
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float v) { return int(std::nearbyint(v)); }
inline uint32_t __float2uint_rn(float v) { return uint32_t(std::nearbyint(v)); }

// The bits of an f16 or bf16; conversions round to nearest even.
inline uint16_t dq_float_to_half_bits(float f) { return emu::bits_as<uint16_t>(_Float16(f)); }
inline float dq_half_bits_to_float(uint16_t h) { return emu::half_bits_to_float(h); }
inline uint16_t dq_float_to_bf16_bits(float f) {
    uint32_t u = emu::bits_as<uint32_t>(f);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float dq_bf16_bits_to_float(uint16_t h) { return emu::bf16_bits_to_float(h); }
