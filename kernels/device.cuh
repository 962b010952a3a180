// What the kernels use of the machine: every line of inline PTX and every intrinsic that the CPU emulator replaces.
//
// Fragments, lane = 4 g + q:
//   mma m16n8k32 (8-bit): A0 row g, k 4q..; A1 row g+8, k 4q..; A2 row g, k 16+4q..; A3 row g+8, k 16+4q..
//                         B0 column g, k 4q..; B1 column g, k 16+4q..    C0 C1 row g, columns 2q 2q+1; C2 C3 row g+8
//   mma m16n8k16 (16-bit): the same with k 2q.. and 8+2q..
#pragma once

#ifdef DQ_EMU
#include "emu/emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#endif

namespace dq {

constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;

#ifdef DQ_EMU

#define DQ_DYNAMIC_SHARED(name) uint8_t* name = emu::dynamic_shared()
inline uint32_t dynamic_shared_bytes() { return uint32_t(emu::block()->shared_bytes); }
#define DQ_UNROLL
#define DQ_UNROLL_BY_8
#define DQ_UNROLL_BY_4
#define DQ_UNROLL_BY_1
#define DQ_COLD

inline float exp2_fast(float x) { return std::exp2(x); }
inline float tanh_fast(float x) { return std::tanh(x); }
inline float rcp_fast(float x) { return 1.0f / x; }
inline float log2_fast(float x) { return std::log2(x); }

// Byte i of the result is byte (sel nibble i & 7) of b:a, or eight copies of its sign when bit 3 of the nibble is set.
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t sel) {
    uint64_t both = a | uint64_t(b) << 32;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t s = sel >> (4 * i) & 15;
        uint32_t byte = uint32_t(both >> (8 * (s & 7))) & 0xFF;
        if (s & 8) byte = byte & 0x80 ? 0xFF : 0;
        r |= byte << (8 * i);
    }
    return r;
}

// d = a b + c; d and c may be the same.
inline void mma_s8_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4], EMU_CALLER) {
    for (int i = 0; i < 4; i++) d[i] = c[i];
    emu::MmaPayload<int32_t> p{a, b, d};
    emu::meet([](emu::Lanes l, uint32_t m) { emu::need_full_warp(m); emu::run_mma<int32_t, 4>(l, emu::read_s8, emu::read_s8); },
              ALL_LANES, &p, file, line);
}
inline void mma_s8_u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4], EMU_CALLER) {
    for (int i = 0; i < 4; i++) d[i] = c[i];
    emu::MmaPayload<int32_t> p{a, b, d};
    emu::meet([](emu::Lanes l, uint32_t m) { emu::need_full_warp(m); emu::run_mma<int32_t, 4>(l, emu::read_s8, emu::read_u8); },
              ALL_LANES, &p, file, line);
}
inline uint32_t upper_half(uint32_t v) { return v >> 16; }
inline uint32_t pick_bits(uint32_t a, uint32_t b, uint32_t mask) { return (a & mask) | (b & ~mask); }
inline uint32_t in_register(uint32_t v) { return v; }
template <class T> inline void work_out_here(T&) {}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_CALLER) {
    emu::MmaPayload<float> p{a, b, c};
    emu::meet([](emu::Lanes l, uint32_t m) { emu::need_full_warp(m); emu::run_mma<float, 2>(l, emu::read_half, emu::read_half); },
              ALL_LANES, &p, file, line);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_CALLER) {
    emu::MmaPayload<float> p{a, b, c};
    emu::meet([](emu::Lanes l, uint32_t m) { emu::need_full_warp(m); emu::run_mma<float, 2>(l, emu::read_bf16, emu::read_bf16); },
              ALL_LANES, &p, file, line);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed, const char* file, int line) {
    if (reinterpret_cast<uintptr_t>(row) & 15) emu::die("a misaligned ldmatrix");
    emu::MatrixPayload p{row, r, 4, transposed};
    emu::meet(emu::run_ldmatrix, ALL_LANES, &p, file, line);
}
inline void ldmatrix(uint32_t (&r)[4], const void* row, EMU_CALLER) { ldmatrix_x4(r, row, false, file, line); }
inline void ldmatrix_trans(uint32_t (&r)[4], const void* row, EMU_CALLER) { ldmatrix_x4(r, row, true, file, line); }
inline uint32_t movmatrix_trans(uint32_t v, EMU_CALLER) {
    emu::MovePayload p{v, 0};
    emu::meet(emu::run_movmatrix, ALL_LANES, &p, file, line);
    return p.out;
}
inline void cp_async_16(void* shared, const void* global) { emu::start_copy(shared, global, 16, 16); }
inline void cp_async_commit() { emu::commit_copies(); }
template <int LEFT> inline void cp_async_wait() { emu::wait_copies(LEFT); }

#ifdef DQ_EMU_SM90
constexpr bool HAS_BULK_COPY = true;
#else
constexpr bool HAS_BULK_COPY = false;
#endif
inline void barrier_init(uint64_t* b, uint32_t count) { emu::mbarrier_init(b, count); }
inline void barrier_init_done() {}
inline void barrier_expect(uint64_t* b, uint32_t bytes) { emu::mbarrier_arrive(b, bytes); }
inline void barrier_wait(uint64_t* b, uint32_t parity) { emu::mbarrier_wait(b, parity); }
inline uint32_t barrier_arrive(uint64_t* b) { return emu::mbarrier_arrive(b); }
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* b) { emu::start_bulk_copy(shared, global, bytes, b); }

// As an sm_90a has it: see below.
#ifdef DQ_EMU_SM90
constexpr bool HAS_GROUP_MMA = true;
#else
constexpr bool HAS_GROUP_MMA = false;
#endif
template <int LINE> struct GroupMatrix {
    const uint8_t* at;
    explicit GroupMatrix(const void* at) : at(static_cast<const uint8_t*>(at)) {}
    GroupMatrix moved(uint32_t bytes) const { return GroupMatrix(at + bytes); }
    emu::SharedLines lines() const { return {at, LINE, LINE == 128 ? 7u : 3u}; }
};
inline void group_fence() {}
inline void group_commit() { emu::commit_group_mma(); }
template <int LEFT> inline void group_wait(EMU_CALLER) { emu::wait_group_mma(LEFT, file, line); }
template <class T> inline void group_arrive(T (&)[4]) {}
inline void shared_for_groups() {}
inline void group_sync(uint32_t group, EMU_CALLER) { emu::meet_group(group, file, line); }
template <bool ADD, int N, int LINE> inline void group_mma_s8(int32_t (&d)[N][4], const GroupMatrix<LINE>& a, const GroupMatrix<LINE>& b, EMU_CALLER) {
    emu::start_group_mma({nullptr, d[0], N, a.lines(), {}, b.lines(), ADD}, file, line);
}
template <int REGISTERS> inline void group_give_registers() {}
template <int REGISTERS> inline void group_take_registers() {}
template <int FROM, int N> inline void group_mma_f16(float (&d)[N][4], const uint32_t (&a)[4], const GroupMatrix<128>& b, EMU_CALLER) {
    emu::start_group_mma({d[FROM], nullptr, 8, {}, {a[0], a[1], a[2], a[3]}, b.lines(), true}, file, line);
}

inline float half_to_float(uint16_t h) { return dq_half_bits_to_float(h); }
inline uint16_t float_to_half(float f) { return dq_float_to_half_bits(f); }
inline uint32_t pack_halves(float low, float high) { return float_to_half(low) | uint32_t(float_to_half(high)) << 16; }
inline uint32_t max_halves(uint32_t a, uint32_t b) {
    return pack_halves(std::fmax(half_to_float(uint16_t(a)), half_to_float(uint16_t(b))), std::fmax(half_to_float(uint16_t(a >> 16)), half_to_float(uint16_t(b >> 16))));
}
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
    return pack_halves(half_to_float(uint16_t(a)) - half_to_float(uint16_t(b)), half_to_float(uint16_t(a >> 16)) - half_to_float(uint16_t(b >> 16)));
}
inline float bf16_to_float(uint16_t h) { return dq_bf16_bits_to_float(h); }
inline uint16_t float_to_bf16(float f) { return dq_float_to_bf16_bits(f); }

template <class T> inline T load_global(const T* at) { return *at; }
template <class T> inline T load_fresh(const T* at) { return *at; }
inline void start_next_kernel() { emu::start_next_launch(); }
inline void wait_for_previous_kernel() { emu::wait_for_previous_launch(); }
inline void leave_waiting_to_others() { emu::leave_waiting_to_others(); }

#else

#define DQ_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]
__device__ __forceinline__ uint32_t dynamic_shared_bytes() {
    uint32_t bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}
#define DQ_UNROLL _Pragma("unroll")
#define DQ_UNROLL_BY_8 _Pragma("unroll 8")
#define DQ_UNROLL_BY_4 _Pragma("unroll 4")
#define DQ_UNROLL_BY_1 _Pragma("unroll 1")
// Of functions that few launches ever call: out of the way of those that do not.
#define DQ_COLD __noinline__

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float tanh_fast(float x) { return tanhf(x); }
// To one unit in the last place, for normal results.
__device__ __forceinline__ float rcp_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t sel) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sel));
    return r;
}

// d = a b + c; d and c may be the same.
#define DQ_MMA_INT(name, types)                                                                                       \
    __device__ __forceinline__ void name(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4]) { \
        asm("mma.sync.aligned.m16n8k32.row.col.s32." types ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "             \
            "{%10,%11,%12,%13};"                                                                                      \
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                          \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])); \
    }
DQ_MMA_INT(mma_s8_s8, "s8.s8")
DQ_MMA_INT(mma_s8_u8, "s8.u8")
#undef DQ_MMA_INT

// v >> 16 on the pipe of the multipliers: shifts, logic and `prmt` share another one, which look-ups keep busy.
__device__ __forceinline__ uint32_t upper_half(uint32_t v) {
    uint32_t r;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(v), "r"(0x0100), "r"(0));
    return r;
}

// Bits of a where the mask has ones, of b elsewhere: one instruction, which the compiler does not find by itself.
__device__ __forceinline__ uint32_t pick_bits(uint32_t a, uint32_t b, uint32_t mask) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(r) : "r"(a), "r"(b), "r"(mask));
    return r;
}
// A constant that stays in a register. `prmt` takes only its second table as an immediate, and the compiler would rather
// move the first one in before each use; also from a uniform register, so the value must look as if lanes differed.
__device__ __forceinline__ uint32_t in_register(uint32_t v) {
    uint32_t below, lane, r;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    asm volatile("shfl.sync.bfly.b32 %0, %1, 0, 0x1f, 0xffffffff;" : "=r"(r) : "r"(v + __popc(below) - lane));
    return r;
}

// Before a wait: what is worked out there is not work behind it; the compiler would rather do it where it is used. And the other way
// round: what follows from such a value is not worked out before, and kept, where it is seldom wanted or registers are few.
__device__ __forceinline__ void work_out_here(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void work_out_here(int& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void work_out_here(float& v) { asm volatile("" : "+f"(v)); }
__device__ __forceinline__ void work_out_here(uint64_t& v) { asm volatile("" : "+l"(v)); }

#define DQ_MMA_FLOAT(name, types)                                                                                     \
    __device__ __forceinline__ void name(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {             \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "    \
                     "{%0,%1,%2,%3};"                                                                                 \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
    }
DQ_MMA_FLOAT(mma_f16, "f16.f16")
DQ_MMA_FLOAT(mma_bf16, "bf16.bf16")
#undef DQ_MMA_FLOAT

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Eight rows of 16 bytes to a matrix; lanes 8 i ... 8 i + 7 name the rows of matrix i.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t v) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Bulk copies (compute capability 9.0): one thread moves a run of bytes, a multiple of 16, and a barrier in shared
// memory counts them. A barrier's phase ends when `count` threads have arrived and the announced bytes are there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool HAS_BULK_COPY = true;
__device__ __forceinline__ void barrier_init(uint64_t* b, uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
// To be called by the thread that initialised barriers, before the block's next barrier.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Arrives and announces bytes.
__device__ __forceinline__ void barrier_expect(uint64_t* b, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* b, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "AGAIN_%=:\n"
                 "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@!done bra AGAIN_%=;\n"
                 "}" ::"r"(shared_address(b)), "r"(parity) : "memory");
}
// Arrives; returns how many arrivals the phase was waiting for, this one included.
__device__ __forceinline__ uint32_t barrier_arrive(uint64_t* b) {
    uint32_t pending;
    asm volatile("{\n"
                 ".reg .b64 before;\n"
                 "mbarrier.arrive.shared.b64 before, [%1];\n"
                 "mbarrier.pending_count.b64 %0, before;\n"
                 "}" : "=r"(pending) : "r"(shared_address(b)) : "memory");
    return pending;
}
// What comes so is read once and is the first to leave the L2: code, factors and what kernels tell each other stay there.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* b) {
    asm volatile("{\n"
                 ".reg .b64 policy;\n"
                 "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n"
                 "}" ::"r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(b)) : "memory");
}
#else
constexpr bool HAS_BULK_COPY = false;
__device__ __forceinline__ void barrier_init(uint64_t*, uint32_t) {}
__device__ __forceinline__ void barrier_init_done() {}
__device__ __forceinline__ void barrier_expect(uint64_t*, uint32_t) {}
__device__ __forceinline__ void barrier_wait(uint64_t*, uint32_t) {}
__device__ __forceinline__ uint32_t barrier_arrive(uint64_t*) { return 0; }
__device__ __forceinline__ void bulk_copy(void*, const void*, uint32_t, uint64_t*) {}
#endif

// Matrix products of warp groups (compute capability 9.0, code for exactly that: sm_90a): four warps that follow each other, the first one's
// number a multiple of four, multiply 64 rows by a matrix in shared memory, beside whatever else they do until `group_wait`. A warp has
// the fragments of its sixteen rows, as those of the warps' own mma above: of the result n tiles of eight columns, of A, where it
// is not in shared memory as well, four registers. Registers that the threads have written need a `group_fence` before the next
// product; shared memory `shared_for_groups` by the threads that wrote it, ahead of the barrier that tells the others. All
// four warps must come.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool HAS_GROUP_MMA = true;
#elif !defined(__CUDA_ARCH__) && defined(DQ_HOST_OF_SM90A)
constexpr bool HAS_GROUP_MMA = true;  // a host that launches such code
#else
constexpr bool HAS_GROUP_MMA = false;
#endif
// A matrix of lines of LINE bytes, 16-byte chunks of which are swizzled; it begins where a line's number is a multiple of eight, and eight
// lines lie at a multiple of their size. A and B of s8: a line is a row or a column, 32 channels of it; B of f16: a line is one of
// sixteen rows, 64 columns of it.
template <int LINE> struct GroupMatrix {
    static_assert(LINE == 128 || LINE == 64 || !HAS_GROUP_MMA, "");
    uint64_t bits;
    // Start, and from eight lines to the next, in units of 16 bytes; the kind of swizzle.
    __device__ __forceinline__ explicit GroupMatrix(const void* at)
        : bits(uint64_t(shared_address(at) >> 4) | 1ull << 16 | uint64_t(8 * LINE / 16) << 32 | uint64_t(LINE == 128 ? 1 : 2) << 62) {}
    // One that begins so many bytes further on.
    __device__ __forceinline__ GroupMatrix moved(uint32_t bytes) const {
        GroupMatrix other = *this;
        other.bits += bytes / 16;
        return other;
    }
};
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void group_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// What the compiler must take for written here: results, behind their wait and ahead of the fence.
__device__ __forceinline__ void group_arrive(int32_t (&d)[4]) { asm volatile("" : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) :: "memory"); }
__device__ __forceinline__ void group_arrive(float (&d)[4]) { asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) :: "memory"); }
__device__ __forceinline__ void shared_for_groups() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Waits for the group's warps; groups are numbered from 0.
__device__ __forceinline__ void group_sync(uint32_t group) { asm volatile("barrier.cta.sync.aligned %0, 128;" ::"r"(group + 1) : "memory"); }
// Keeps so many registers of a thread and leaves the others to groups that take more, up to so many.
template <int REGISTERS>
__device__ __forceinline__ void group_give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
__device__ __forceinline__ void group_take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
// d (+)= a b; b of 32 or 64 columns.
template <bool ADD, int LINE>
__device__ __forceinline__ void group_mma_s8(int32_t (&d)[8][4], const GroupMatrix<LINE>& a, const GroupMatrix<LINE>& b) {
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, add;\n"
                 "}"
                 : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]), "+r"(d[1][1]), "+r"(d[1][2]), "+r"(d[1][3]),
                   "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]), "+r"(d[3][0]), "+r"(d[3][1]), "+r"(d[3][2]), "+r"(d[3][3]),
                   "+r"(d[4][0]), "+r"(d[4][1]), "+r"(d[4][2]), "+r"(d[4][3]), "+r"(d[5][0]), "+r"(d[5][1]), "+r"(d[5][2]), "+r"(d[5][3]),
                   "+r"(d[6][0]), "+r"(d[6][1]), "+r"(d[6][2]), "+r"(d[6][3]), "+r"(d[7][0]), "+r"(d[7][1]), "+r"(d[7][2]), "+r"(d[7][3])
                 : "l"(a.bits), "l"(b.bits), "n"(ADD));
}
template <bool ADD, int LINE>
__device__ __forceinline__ void group_mma_s8(int32_t (&d)[4][4], const GroupMatrix<LINE>& a, const GroupMatrix<LINE>& b) {
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, add;\n"
                 "}"
                 : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]), "+r"(d[1][1]), "+r"(d[1][2]), "+r"(d[1][3]),
                   "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]), "+r"(d[3][0]), "+r"(d[3][1]), "+r"(d[3][2]), "+r"(d[3][3])
                 : "l"(a.bits), "l"(b.bits), "n"(ADD));
}
// n tiles FROM to FROM + 7 of d += a b.
template <int FROM, int N>
__device__ __forceinline__ void group_mma_f16(float (&d)[N][4], const uint32_t (&a)[4], const GroupMatrix<128>& b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : "+f"(d[FROM + 0][0]), "+f"(d[FROM + 0][1]), "+f"(d[FROM + 0][2]), "+f"(d[FROM + 0][3]), "+f"(d[FROM + 1][0]),
                   "+f"(d[FROM + 1][1]), "+f"(d[FROM + 1][2]), "+f"(d[FROM + 1][3]), "+f"(d[FROM + 2][0]), "+f"(d[FROM + 2][1]),
                   "+f"(d[FROM + 2][2]), "+f"(d[FROM + 2][3]), "+f"(d[FROM + 3][0]), "+f"(d[FROM + 3][1]), "+f"(d[FROM + 3][2]),
                   "+f"(d[FROM + 3][3]), "+f"(d[FROM + 4][0]), "+f"(d[FROM + 4][1]), "+f"(d[FROM + 4][2]), "+f"(d[FROM + 4][3]),
                   "+f"(d[FROM + 5][0]), "+f"(d[FROM + 5][1]), "+f"(d[FROM + 5][2]), "+f"(d[FROM + 5][3]), "+f"(d[FROM + 6][0]),
                   "+f"(d[FROM + 6][1]), "+f"(d[FROM + 6][2]), "+f"(d[FROM + 6][3]), "+f"(d[FROM + 7][0]), "+f"(d[FROM + 7][1]),
                   "+f"(d[FROM + 7][2]), "+f"(d[FROM + 7][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits));
}
#else
__device__ __forceinline__ void group_fence() {}
__device__ __forceinline__ void group_commit() {}
template <int LEFT> __device__ __forceinline__ void group_wait() {}
template <class T> __device__ __forceinline__ void group_arrive(T (&)[4]) {}
__device__ __forceinline__ void shared_for_groups() {}
__device__ __forceinline__ void group_sync(uint32_t) {}
template <bool ADD, int N, int LINE> __device__ __forceinline__ void group_mma_s8(int32_t (&)[N][4], const GroupMatrix<LINE>&, const GroupMatrix<LINE>&) {}
template <int REGISTERS> __device__ __forceinline__ void group_give_registers() {}
template <int REGISTERS> __device__ __forceinline__ void group_take_registers() {}
template <int FROM, int N> __device__ __forceinline__ void group_mma_f16(float (&)[N][4], const uint32_t (&)[4], const GroupMatrix<128>&) {}
#endif

__device__ __forceinline__ float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
__device__ __forceinline__ uint16_t float_to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }
// Two f16 in a register.
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ uint32_t subtract_halves(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ float bf16_to_float(uint16_t h) { return __uint_as_float(uint32_t(h) << 16); }
__device__ __forceinline__ uint16_t float_to_bf16(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }

template <class T> __device__ __forceinline__ T load_global(const T* at) { return __ldg(at); }
// What another kernel may just have written, past the L1.
template <class T> __device__ __forceinline__ T load_fresh(const T* at) { return __ldcg(at); }

// Kernels overlap where the host launched them so: the next one may start once every block of this one has said so or is
// done, and sees what this one writes only after its wait, which lasts until all of this one is done. Rules:
//   - Every thread waits before it ends (the emulator checks it), so that whoever waits for this kernel has waited for those
//     before it; or it leaves that to others, where some block of the grid surely waits: a kernel has not ended before all of
//     its blocks have.
//   - Fold and encode say so only after their wait. So attend, which starts behind fold, may look at everything from before
//     the call (records, lengths, tables) without waiting, and merge likewise; and tail may write its parts, which the merge
//     before has read.
//   - A block that changes tables of factors says so only after that, behind a __threadfence, or never. So whoever starts
//     later, however early, may look at the tables without waiting.
__device__ __forceinline__ void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void leave_waiting_to_others() {}

#endif

// a / b, without the division where b is one, as it mostly is where this stands: short kernels begin with several of them.
__device__ __forceinline__ uint32_t quotient(uint32_t a, uint32_t b) { return b == 1 ? a : a / b; }

// Of a `GroupMatrix`: chunk c of a line lies where, without swizzle, chunk c ^ (this / 16) would.
template <int LINE> __device__ __forceinline__ uint32_t chunk_swizzle(uint32_t line) { return LINE == 128 ? line % 8 * 16 : line / 2 % 4 * 16; }

// A compile-time number and a loop over such numbers: `for_each<4>([&](auto i) { ... decltype(i)::value ... })`.
template <int N> struct Int { static constexpr int value = N; };

template <int N, int I = 0, class Body>
__host__ __device__ __forceinline__ void for_each(Body&& body) {
    if constexpr (I < N) {
        body(Int<I>{});
        for_each<N, I + 1>(body);
    }
}

template <class T> __device__ __forceinline__ T at_bytes(const void* base, uint64_t bytes) {
    return *reinterpret_cast<const T*>(static_cast<const uint8_t*>(base) + bytes);
}

}  // namespace dq
