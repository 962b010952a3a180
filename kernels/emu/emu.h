// Device code as plain C++17 on the CPU. Include this in place of the CUDA headers.
//   types.h  f16, bf16, integer intrinsics        fiber.h  stacks and switches
//   block.h  scheduler, launch, __syncthreads     warp.h   shuffles, votes, mma, ldmatrix
//   async.h  cp.async, mbarrier, bulk copies      group.h  mma of warp groups
#pragma once
#include "async.h"
#include "block.h"
#include "group.h"
#include "types.h"
#include "warp.h"

// Blocks run one after the other: an atomic is an ordinary operation, and every order of blocks is a legal one.
template <class T> T atomicAdd(T* at, T v) { T old = *at; *at = old + v; return old; }
inline uint32_t atomicInc(uint32_t* at, uint32_t most) { uint32_t old = *at; *at = old >= most ? 0 : old + 1; return old; }
template <class T> T atomicMax(T* at, T v) { T old = *at; *at = old < v ? v : old; return old; }
template <class T> T atomicOr(T* at, T v) { T old = *at; *at = old | v; return old; }
template <class T> T atomicExch(T* at, T v) { T old = *at; *at = v; return old; }
template <class T> T atomicCAS(T* at, T expected, T v) { T old = *at; if (old == expected) *at = v; return old; }
inline void __threadfence() {}
inline void __threadfence_block() {}
