/* What the host hands to the kernels. Read by the host as C and mirrored in src/cuda; every struct is passed by value.
 *
 * Factor tables live in device memory and are read there, so that a replayed graph sees fits that were published after
 * its capture. Publishing is ordered by the stream: first means and matrices of a new set, then the DqHeadSets. */
#ifndef DQ_PARAMS_H
#define DQ_PARAMS_H
#include <stdint.h>

#define DQ_MAX_SETS 16
#define DQ_MAX_TIERS 4
/* The rotation and up to seven fits: linear parts that a head's sets can name. */
#define DQ_MAX_TRANSFORMS 8

enum { DQ_TYPE_NONE = 0, DQ_TYPE_F32 = 1, DQ_TYPE_F16 = 2, DQ_TYPE_BF16 = 3 };

/* The sets of one KV head and side. */
typedef struct DqHeadSets {
    uint16_t present;                /* bit e: set e exists; bit 0 always */
    uint16_t sinks;                  /* bit e: set e is the rotation about a sink row */
    uint8_t newest;                  /* the set that rows take unless another serves them far better */
    uint8_t encode_dense;            /* the newest set is coded by the dense encode matrix, else by the rotation */
    uint8_t reserved[2];
    uint8_t transform[DQ_MAX_SETS];  /* per set: 0 the rotation, t > 0 dense matrix t - 1; 0 where absent */
    float kappa[DQ_MAX_TIERS];       /* of the newest set, per tier */
} DqHeadSets;

/* All of one layer and side. Every head has room for all sets; what is absent is zero. */
typedef struct DqFactors {
    const DqHeadSets* heads;   /* [n_kv_heads] */
    const uint16_t* means;     /* f16 [n_kv_heads][DQ_MAX_SETS][d] */
    const uint16_t* decode;    /* f16 [n_kv_heads][max_dense][channel d][latent d] */
    const float* encode;       /* f32 [n_kv_heads], each [channel d][latent d] and the feedback, the newest fit's */
    const uint32_t* rotation;  /* sign bits [latent d][(d + 31) / 32]: bit c set, entry (latent, c) is -1 / sqrt(d) */
    uint32_t max_dense;
    uint32_t reserved;
} DqFactors;

/* Rows [n][n_heads][d] in the caller's memory; strides in bytes. */
typedef struct DqRows {
    void* data;
    uint64_t token_stride, head_stride;
    uint32_t type, reserved;
} DqRows;

/* Records in the caller's memory. */
typedef struct DqStore {
    uint8_t* data;
    uint64_t stride, n_slots;
} DqStore;

/* Rows that are not coded: the last keys of each stream, behind its coded ones. */
typedef struct DqTail {
    DqRows k, v;
    const int32_t* starts;        /* [n_streams]: the row at which each tail begins; null: stream * n_rows */
    const int32_t* lengths;       /* [n_streams]: rows of each; null: n_rows */
    uint32_t n_rows;              /* of a stream, at most; 0: there are no tails, and all of this is 0 */
    uint32_t head_dim;
    uint32_t parts, reserved;     /* blocks that share four rows of queries, each a part of their result */
} DqTail;

typedef struct DqAttend {
    DqStore store;
    DqFactors k, v;
    DqRows q, out;                /* token index: q_starts[stream] + query, or stream * n_q + query */
    const void* mask;             /* additive [n_streams][n_q][n_kv + tail.n_rows], or null */
    uint64_t mask_query_stride, mask_stream_stride;
    const float* sink_logits;     /* [n_q_heads] or null */
    const int32_t* block_table;   /* null: slots are first_slot + stream * stream_slots + key */
    const int32_t* q_starts;      /* [n_streams + 1]: the first token of each stream, at most n_q apart; null: n_q each */
    const int32_t* lengths;       /* coded keys of each stream, or null: n_kv */
    uint64_t first_slot, stream_slots, table_stride;
    uint32_t mask_type;
    uint32_t block_shift;         /* a block of the table holds 1 << block_shift slots */
    uint32_t n_kv_heads, group;   /* query heads = n_kv_heads * group */
    uint32_t n_streams, n_q, n_kv;
    int32_t window;               /* with lengths: the last query sits at the last key, the tail's included; 0: no window */
    uint32_t causal;
    float scale, softcap;
    /* How the work is cut. */
    uint32_t heads_per_block;     /* KV heads of a block, one warp each; divides n_kv_heads */
    uint32_t key_warps;           /* warps of a block that share a head and take turns of 32 keys */
    uint32_t n_splits;            /* blocks over the keys of a stream */
    uint32_t row_tiles;           /* tiles of 4 NT rows (query, query head) over n_q * group */
    uint32_t v_transforms;        /* 1 where all sets of V are rotations, else DQ_MAX_TRANSFORMS */
    uint32_t fold_tiles;          /* tiles of 4 rows of a stream, as many as row_tiles has */
    uint32_t fold_units;          /* of them, over all streams, that a block of the fold of few rows takes: 1, 2, 4 or 8 */
    /* Workspace, see attend.cuh. */
    uint8_t* folded;
    float* folded_scales;
    float* constants;
    float* partial;
    float* partial_sums;
    DqTail tail;
} DqAttend;

/* Running statistics of one unit: the rows of a KV head (K or V) or the queries of its group. The same sums, in the same
 * order, as src/factor/moments.rs. Behind each other in memory, all of one layer's units of a kind equally large:
 *   DqMoments | sum f64 [d] | reference f32 [d] | staged f32 [16][d] | second f32 [d (d + 1) / 2] where it is wanted */
typedef struct DqMoments {
    uint64_t rows;                   /* in the sums */
    double energy, slack;
    double spread;                   /* of the rows when the sums were dropped */
    uint64_t due;                    /* rows at which the next fit comes due */
    uint32_t n_staged;
    uint32_t has_reference;
    uint32_t learns;                 /* sums are kept */
    uint32_t takes_sinks;            /* rows at position 0 become sinks */
} DqMoments;

/* A kind of units: K rows, V rows or queries. */
typedef struct DqUnits {
    uint8_t* data;                   /* DqMoments of head 0; null: this kind is not observed */
    uint64_t stride;                 /* bytes from head to head */
    uint32_t dim, with_second;
} DqUnits;

/* Where a token's row at position 0 is made a sink of. */
typedef struct DqSinks {
    const int32_t* positions;     /* [n]; null: sinks are somebody else's work */
    DqUnits k, v;
} DqSinks;

typedef struct DqDequantize {
    DqStore store;
    DqFactors k, v;
    DqRows k_out, v_out;          /* data may be null */
    const int64_t* slots;         /* [n], -1 skips */
    uint32_t n, n_kv_heads;
} DqDequantize;

/* Rows of a unit that one launch takes at most. A unit's rows are [head of the group][token]. */
#define DQ_OBSERVE_ROWS 2048
/* What the statistics kernels pass each other for a unit, observe.cuh's Entered; behind it f32 [16][d]. */
#define DQ_ENTERED_BYTES (16 + (DQ_OBSERVE_ROWS / 16 + 1) * 32)

typedef struct DqObserve {
    DqUnits k, v, q;
    DqRows k_rows, v_rows, q_rows;   /* data may be null */
    DqHeadSets* k_heads;             /* where sinks are entered */
    DqHeadSets* v_heads;
    uint16_t* k_means;
    uint16_t* v_means;
    const int32_t* positions;        /* [n] or null */
    uint32_t* rows_seen;             /* host memory, [2][n_kv_heads]: rows taken in so far */
    uint8_t* entered;                /* [K, V, queries][n_kv_heads], entered_stride bytes apart */
    uint64_t entered_stride;
    uint32_t n, n_kv_heads, group;
    uint32_t flush;                  /* no new rows, those that wait go in where a fit is due: 1 K and V, then 2 queries */
    uint32_t first, reserved;        /* rows of a unit before those of this launch, which are DQ_OBSERVE_ROWS at most */
} DqObserve;

/* A fit of one KV head and side, on its way into force. */
#define DQ_NO_PLACE 255
typedef struct DqFit {
    uint8_t wanted;                  /* 0: nothing was fitted here */
    uint8_t id;                      /* the set that has this content already; 0: a free one; DQ_NO_PLACE: none */
    uint8_t transform, encode_dense; /* as in DqHeadSets */
    uint8_t last;                    /* no further fit will come: sums are dropped */
    uint8_t reserved[3];
    float kappa[DQ_MAX_TIERS];
    double spread;                   /* for DqMoments, when it is the last */
    uint64_t due;
} DqFit;

typedef struct DqPublish {
    DqUnits k, v, q;
    DqHeadSets* k_heads;
    DqHeadSets* v_heads;
    uint16_t* k_means;
    uint16_t* v_means;
    const DqFit* fits;               /* [2][n_kv_heads] */
    const uint16_t* means;           /* f16 [2][n_kv_heads][256] */
    uint32_t* ids;                   /* [2][n_kv_heads]: the set's id, 0 when none was free */
    uint32_t n_kv_heads, reserved;
} DqPublish;

#define DQ_JOINED_ROWS 32
#define DQ_JOINED_DIM 256
typedef struct DqEncode {
    DqStore store;
    DqFactors k, v;
    DqRows k_rows, v_rows;
    const int64_t* slots;         /* [n], -1 skips */
    uint32_t* status;             /* counts replaced rows, or null */
    DqSinks sinks;                /* of one token alone; null: of none */
    /* Where blocks that share a row's matrix meet, of at most DQ_JOINED_ROWS rows of a side (token, KV head). */
    float* joined;                /* [token][side][head][DQ_JOINED_DIM] */
    uint32_t* arrived;            /* [token][side][head], 0 between launches */
    uint32_t n, n_kv_heads;
} DqEncode;

/* src/cuda/params.rs asserts the same numbers. */
#ifdef __cplusplus
static_assert(sizeof(DqHeadSets) == 40 && sizeof(DqFactors) == 48 && sizeof(DqRows) == 32 && sizeof(DqStore) == 24, "");
static_assert(sizeof(DqTail) == 96 && sizeof(DqAttend) == 472 && sizeof(DqDequantize) == 200 && sizeof(DqEncode) == 280, "");
static_assert(sizeof(DqFit) == 40 && sizeof(DqPublish) == 136, "");
static_assert(sizeof(DqMoments) == 56 && sizeof(DqObserve) == 256, "");
#endif

#endif
