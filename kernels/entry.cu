// The kernels by name, as the driver layer looks them up. Names: what, head_dim, key plan, value plan; attention also
// the number of row tiles of four (n1: up to four rows of queries to a KV head in one pass, n2: up to eight) and, where
// an odd number of heads can put planes off their alignment, a variant `u` that reads byte pairs.
#include "attend_prefill.cuh"
#include "dequantize.cuh"
#include "encode.cuh"
#include "fold_rows.cuh"
#include "instances.h"
#include "merge.cuh"
#include "observe.cuh"
#include "tail.cuh"

#define DQ_ATTEND(suffix, d, kp, vp, aligned)                                                                         \
    extern "C" __global__ void __launch_bounds__(256, (d) <= 128 ? 2 : 1) dq_attend_##d##_##kp##_##vp##_n1##suffix(const DqAttend p) { \
        dq::attend_decode<dq::Side<d, kp, aligned>, dq::Side<d, vp, aligned>, 1, dq::DECODE_STAGES>(p);                               \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 1) dq_attend_##d##_##kp##_##vp##_n2##suffix(const DqAttend p) {    \
        dq::attend_decode<dq::Side<d, kp, aligned>, dq::Side<d, vp, aligned>, 2, dq::DECODE_STAGES>(p);                               \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(dq::PrefillTile<dq::Side<d, kp, aligned>, dq::Side<d, vp, aligned>>::THREADS, 1) dq_prefill_##d##_##kp##_##vp##suffix(const DqAttend p) {        \
        dq::attend_prefill<dq::Side<d, kp, aligned>, dq::Side<d, vp, aligned>>(p);                                    \
    }
#define DQ_KERNELS(d, kp, vp)                                                                                         \
    DQ_ATTEND(, d, kp, vp, true)                                                                                      \
    extern "C" __global__ void __launch_bounds__(dq::FOLD_THREADS, (d) <= 128 ? 0 : 1) dq_fold_##d##_##kp##_##vp(const DqAttend p) {                   \
        dq::fold_queries<dq::Side<d, kp, true>>(p);                                                                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(dq::FOLD_ROWS_THREADS, dq::fold_rows_blocks(d)) dq_fold_many_##d##_##kp##_##vp(const DqAttend p) { \
        dq::fold_rows<dq::Side<d, kp, true>>(p);                                                                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512) dq_merge_##d##_##kp##_##vp(const DqAttend p) {                  \
        dq::attend_merge<dq::Side<d, vp, true>, false>(p);                                                            \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * dq::MERGE_MANY_WARPS, (d) <= 128 ? 4 : 2) dq_merge_many_##d##_##kp##_##vp(const DqAttend p) { \
        dq::attend_merge<dq::Side<d, vp, true>, true>(p);                                                             \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, (d) <= 128 ? 2 : 1) dq_encode_##d##_##kp##_##vp(const DqEncode p) { \
        dq::encode<dq::Side<d, kp, true>, dq::Side<d, vp, true>>(p);                                                  \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 2) dq_encode_few_##d##_##kp##_##vp(const DqEncode p) {          \
        dq::encode_few<dq::Side<d, kp, true>, dq::Side<d, vp, true>>(p);                                              \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) dq_dequantize_##d##_##kp##_##vp(const DqDequantize p) {         \
        dq::dequantize<dq::Side<d, kp, true>, dq::Side<d, vp, true>>(p);                                              \
    }
#define DQ_UNALIGNED(d, kp, vp) DQ_ATTEND(u, d, kp, vp, false)
DQ_INSTANCES(DQ_KERNELS)
DQ_UNALIGNED_INSTANCES(DQ_UNALIGNED)

extern "C" __global__ void __launch_bounds__(32 * dq::TAIL_WARPS) dq_tail(const DqAttend p) { dq::attend_tail(p); }
extern "C" __global__ void __launch_bounds__(dq::OBSERVE_THREADS) dq_observe(const DqObserve p) { dq::observe(p); }
extern "C" __global__ void __launch_bounds__(dq::OBSERVE_THREADS) dq_products(const DqObserve p) { dq::products(p); }
extern "C" __global__ void __launch_bounds__(dq::OBSERVE_THREADS) dq_publish(const DqPublish p) { dq::publish(p); }
// Tells the host whether the kernels for this architecture multiply matrices in warp groups, by the threads that it may be launched with.
extern "C" __global__ void __launch_bounds__(dq::HAS_GROUP_MMA ? 128 : 32) dq_group_mma() {}
