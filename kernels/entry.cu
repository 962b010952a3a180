// The kernels by name, as the driver layer looks them up. Names: what, head_dim, key plan, value plan; attention also
// the number of row tiles of four (n1: up to four rows of queries to a KV head in one pass, n2: up to eight) and, where
// an odd number of heads can put planes off their alignment, a variant `u` that reads byte pairs.
#include "attend_prefill.cuh"
#include "dequantize.cuh"
#include "encode.cuh"
#include "instances.h"
#include "merge.cuh"

#define DQ_ATTEND(name, d, kp, vp, nt, aligned)                                                                       \
    extern "C" __global__ void __launch_bounds__(256, (nt) == 1 && (d) <= 128 ? 2 : 1) name(const DqAttend p) {       \
        dq::attend_decode<dq::Side<d, kp, aligned>, dq::Side<d, vp, aligned>, nt, 3>(p);                              \
    }
#define DQ_KERNELS(d, kp, vp)                                                                                         \
    DQ_ATTEND(dq_attend_##d##_##kp##_##vp##_n1, d, kp, vp, 1, true)                                                   \
    DQ_ATTEND(dq_attend_##d##_##kp##_##vp##_n2, d, kp, vp, 2, true)                                                   \
    extern "C" __global__ void __launch_bounds__(256) dq_prefill_##d##_##kp##_##vp(const DqAttend p) {                \
        dq::attend_prefill<dq::Side<d, kp, true>, dq::Side<d, vp, true>, (d) <= 128 ? 4 : 2>(p);                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) dq_fold_##d##_##kp##_##vp(const DqAttend p) {                   \
        dq::fold_queries<dq::Side<d, kp, true>>(p);                                                                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512) dq_merge_##d##_##kp##_##vp(const DqAttend p) {                  \
        dq::attend_merge<dq::Side<d, vp, true>>(p);                                                                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) dq_encode_##d##_##kp##_##vp(const DqEncode p) {                 \
        dq::encode<dq::Side<d, kp, true>, dq::Side<d, vp, true>, 2>(p);                                               \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) dq_dequantize_##d##_##kp##_##vp(const DqDequantize p) {         \
        dq::dequantize<dq::Side<d, kp, true>, dq::Side<d, vp, true>>(p);                                              \
    }
DQ_INSTANCES(DQ_KERNELS)

// Three bits at head_dim 64 leave an 8-byte plane: every odd number of heads is unaligned.
DQ_ATTEND(dq_attend_64_3_3_n1u, 64, 3, 3, 1, false)
DQ_ATTEND(dq_attend_64_3_3_n2u, 64, 3, 3, 2, false)
