/*
 * libdecoquant: a key-value cache for large language models in a quarter of the bytes.
 *
 * The engine keeps its memory, streams and threads; the library codes rows of K and V into it and computes attention
 * on the codes. In order of use:
 *
 *     dq_context_create      a backend and its device
 *     dq_codec_create        the shapes, code widths and factor sets of one model
 *     dq_codec_layout        bytes per token and layer: allocate slots
 *     dq_workspace_size      scratch memory for the calls below
 *     dq_compress, dq_append new tokens into slots
 *     dq_attend              softmax(scale q k^T + mask) v over slots
 *
 * Errors. Calls return a dq_status; dq_last_error gives this thread's sentence: the parameter, its value, the limit. A
 * call that returns an error has changed nothing, neither the caller's memory nor a handle, unless its comment says
 * otherwise. No call aborts, throws or prints.
 *
 * Structs. Those that begin with struct_size go by pointer: zero the struct, set struct_size to its sizeof, fill in.
 * Fields are only ever appended. A smaller size than this library's means that the missing fields are zero; a larger
 * one is accepted when everything beyond this library's struct is zero. In structs that a call fills, that part is set
 * to zero. Zero in a field means its default. Enumerations travel as uint32_t.
 *
 * Memory. On the CPU all pointers are host pointers and stream is null. Memory that a call writes must not overlap
 * memory that it reads or other memory that it writes. Pointers need to be valid during the call only. Strides and
 * sizes are in bytes. On the CPU nothing is allocated in dq_attend and its phases, dq_encode_shard, dq_dequantize and
 * dq_remap_rows when they succeed, nor in dq_append, but for the mean of a new attention sink (four per head at most).
 *
 * CUDA. Rows, positions, slots, records, masks, outputs and workspaces are memory of the context's device; stream is a
 * CUstream or cudaStream_t of its primary context, null the legacy default stream. Calls return before their work is
 * done, and leave the caller's current context as it was. What lies on the device is not checked: a slot beyond the store
 * is skipped. dq_append, dq_attend and dq_dequantize allocate nothing, wait for nothing and may be captured into graphs,
 * whose replays see the fits made since. Fits are made on the host: where one is due, dq_compress and dq_refit keep their
 * thread for it, not the stream, and DQ_CODEC_DEFER_FITS leaves all of them to dq_refit. dq_sets_export, dq_sets_import and dq_codec_save wait for the device. dq_remap_rows works on host memory, for
 * records on their way to the device.
 *
 * Threads. A handle may be used from any thread. Calls that take a const handle may run at the same time as any other
 * call on it, dq_codec_destroy and dq_context_destroy excepted. Calls that take a non-const dq_codec and name the same
 * layer must not overlap each other, the shards of one phase excepted, and dq_refit beside dq_compress or dq_append.
 * On CUDA nor must their work: one stream orders it, or events between streams do.
 */


#ifndef DECOQUANT_H
#define DECOQUANT_H

/* Generated from src/capi by cbindgen. Edit there; DECOQUANT_WRITE_HEADER=1 cargo build rewrites this file. */

#include <stdint.h>

// Version of this header, `major.minor.patch`; `dq_version` is that of the library.
#define DQ_VERSION_MAJOR 0

// Raised when something is added.
#define DQ_VERSION_MINOR 1

// Raised when something is mended.
#define DQ_VERSION_PATCH 0

// Number of the binary interface that this header describes: `dq_abi_version` of the library must be the same.
#define DQ_ABI_VERSION 0

// Backend: the CPU. Pointers are host pointers and `stream` is null.
#define DQ_BACKEND_CPU 1

// Backend: one CUDA device. Pointers are device pointers and work is ordered by `stream`.
#define DQ_BACKEND_CUDA 2

// Element types of rows, masks and outputs.
#define DQ_F32 1

// IEEE 754 binary16.
#define DQ_F16 2

// bfloat16.
#define DQ_BF16 3

// Gauge: set 0 only, a Hadamard rotation behind fixed signs. Nothing is learned.
#define DQ_GAUGE_ROTATION 1

// Gauge: the rotation about the mean of the rows. Learns means, holds no matrices. The default for values.
#define DQ_GAUGE_CENTRED 2

// Gauge: the fit that minimises the error of the attention scores (for values: of the rows). The default for keys.
#define DQ_GAUGE_ATTENTION 3

// Who sees what in a batch of sequences: the query at position `p` sees the keys up to `p`, or the last `window` of
// them. The default.
#define DQ_VISIBLE_CAUSAL 1

// Every query sees every key of its sequence.
#define DQ_VISIBLE_ALL 2

// `dq_compress` makes no fits. The caller makes them with `dq_refit`, between steps or on a thread of its own while the
// layers go on working, so that no prompt waits for one.
#define DQ_CODEC_DEFER_FITS 1

// The key half of a layer.
#define DQ_SIDE_K 0

// The value half of a layer.
#define DQ_SIDE_V 1

// Most factor sets that a head and side can hold: a row's header has four bits for the set.
#define DQ_MAX_SETS 16

// Shapes, widths, gauges and factor sets of all layers of one model.
//
// Threads: calls that take a `const dq_codec *` may run at the same time. For one layer, observe, refit, encode,
// compress and append must be ordered by the caller; attend, dequantize and layout queries may overlap them.
typedef struct dq_codec dq_codec;

// A backend and its device. Create one per device; it may be shared by any number of codecs and threads.
typedef struct dq_context dq_context;

// What a call returns. The numbers never change meaning.
typedef int32_t dq_status;

// What `dq_context_create` is to open.
typedef struct dq_context_desc {
    // `sizeof(dq_context_desc)`.
    uint32_t struct_size;
    // `DQ_BACKEND_CPU` (also the default) or `DQ_BACKEND_CUDA`.
    uint32_t backend;
    // Ordinal of the CUDA device. Must be 0 on the CPU.
    uint32_t device;
    // Must be 0.
    uint32_t reserved;
} dq_context_desc;

// One layer of a model.
typedef struct dq_layer_desc {
    // `sizeof(dq_layer_desc)`; also the stride of an array of layers.
    uint32_t struct_size;
    // Query heads; a multiple of `n_kv_heads`.
    uint32_t n_q_heads;
    // Key and value heads: equal to `n_q_heads`, fewer (GQA) or 1 (MQA). At most 1024.
    uint32_t n_kv_heads;
    // Channels of a query and key head: 64, 80, 96, 128, 192 or 256.
    uint32_t head_dim_k;
    // Channels of a value head: the same choices.
    uint32_t head_dim_v;
    // How keys are coded: a plan number, see `dq_plan_name`. 2, 3, 4 and 8 are the uniform widths in bits. Tiered plans
    // give the strongest latent channels more bits and the weakest fewer: 104 has 6, 4 and 3 bits and 103 has 5, 3 and
    // 2 on a quarter, a half and a quarter of the channels (4.25 and 3.25 bits), 102 has 4 and 2 on a quarter and the
    // rest (2.5; to multiples of 16 channels): made for keys under `DQ_GAUGE_ATTENTION`.
    uint32_t k_plan;
    // How values are coded.
    uint32_t v_plan;
    // `DQ_GAUGE_*` of the keys; 0 is `DQ_GAUGE_ATTENTION`.
    uint32_t k_gauge;
    // `DQ_GAUGE_*` of the values; 0 is `DQ_GAUGE_CENTRED`.
    uint32_t v_gauge;
} dq_layer_desc;

// A whole model.
typedef struct dq_codec_desc {
    // `sizeof(dq_codec_desc)`.
    uint32_t struct_size;
    // Number of layers, 1 to 4096.
    uint32_t n_layers;
    // `n_layers` layers, `layers[0].struct_size` bytes apart. Read during the call only.
    const struct dq_layer_desc *layers;
    // Most fits that a head and side may hold, 1 to 7; 0 is 4. Fits come due at 16, 64, 512 and 4,096 rows, then at
    // every eightfold; at the bound refitting stops and the statistics are dropped.
    uint32_t max_fits;
    // 0, or `DQ_CODEC_DEFER_FITS`.
    uint32_t flags;
    // Identity of the model whose rows are coded (weights, RoPE and adapter settings). Stored in factor files, which
    // are refused when theirs differs. All zero is an identity like any other.
    uint8_t fingerprint[32];
} dq_codec_desc;

// Writes `size` bytes; returns 0, or anything else to stop with `DQ_ERROR_IO`. Must not unwind.
typedef int32_t (*dq_write_fn)(void *user, const void *data, uint64_t size);

// Reads exactly `size` bytes; returns 0, or anything else to stop with `DQ_ERROR_IO`. Must not unwind.
typedef int32_t (*dq_read_fn)(void *user, void *data, uint64_t size);

// Where the parts of a record lie. One record per slot; the slot's record starts at `store + slot * stride`.
typedef struct dq_layout {
    // `sizeof(dq_layout)`, set by the caller.
    uint32_t struct_size;
    // Alignment of the store and of the slot stride, in bytes: 16.
    uint32_t alignment;
    // Bytes of one record, padding included.
    uint64_t slot_bytes;
    // Offset of the key codes.
    uint64_t k_codes_offset;
    // Offset of the value codes.
    uint64_t v_codes_offset;
    // Offset of the key headers, u16 per KV head.
    uint64_t k_headers_offset;
    // Offset of the value headers, u16 per KV head.
    uint64_t v_headers_offset;
    // Most bytes of this layer's factor sets (imported ones come on top). Statistics are held besides until the last
    // fit is made, at 4,096 rows by default: see `dq_layer_info`.
    uint64_t max_factor_bytes;
    // Bits per value of a record: `8 * slot_bytes / (n_kv_heads * (head_dim_k + head_dim_v))`.
    double bits_per_value;
    // The same with `max_factor_bytes` spread over the `n_slots` named in the call.
    double bits_per_value_with_factors;
} dq_layout;

// State of a layer's factors.
typedef struct dq_layer_info {
    // `sizeof(dq_layer_info)`, set by the caller.
    uint32_t struct_size;
    // Key sets in use, the rotation included: the most over the layer's heads.
    uint32_t k_sets;
    // Value sets in use, likewise.
    uint32_t v_sets;
    // 1 when no further fit will come: the bound was reached or the factors were loaded.
    uint32_t frozen;
    // Rows that entered the statistics: the most over the layer's heads.
    uint64_t rows_seen;
    // Bytes held now for factor sets: means, decode matrices and the encode matrices of the newest fits.
    uint64_t factor_bytes;
    // Bytes held now for running moments.
    uint64_t moment_bytes;
    // Rows until the next fit: a `dq_compress` of so many tokens or more makes it, and cannot be captured into a CUDA
    // graph. 0: a fit is due; `UINT64_MAX`: none will come. On CUDA, rows that stay out of the statistics count, too,
    // until the next fit, and rows of replayed graphs once the device has told of them.
    uint64_t rows_to_fit;
} dq_layer_info;

// Rows in the caller's memory: `[n_tokens][n_heads][head_dim]`, channels next to each other.
typedef struct dq_tensor {
    // First element; null where the call says that the tensor may be absent. Aligned to its element.
    void *data;
    // `DQ_F32`, `DQ_F16` or `DQ_BF16`.
    uint32_t dtype;
    // Must be 0.
    uint32_t reserved;
    // Bytes from one token to the next; a multiple of the element size.
    uint64_t token_stride;
    // Bytes from one head to the next; a multiple of the element size.
    uint64_t head_stride;
} dq_tensor;

// The caller's memory for records.
typedef struct dq_store {
    // First record; 16-byte aligned.
    void *data;
    // Records that fit in it.
    uint64_t n_slots;
    // Bytes from one slot to the next: at least `slot_bytes`, a multiple of 16; 0 is `slot_bytes`.
    uint64_t slot_stride;
} dq_store;

// New tokens of one layer, for `dq_compress`, `dq_append` and the phases of compress.
typedef struct dq_tokens {
    // `sizeof(dq_tokens)`.
    uint32_t struct_size;
    // Number of tokens; 0 does nothing.
    uint32_t n_tokens;
    // Queries after RoPE, `[n_tokens][n_q_heads][head_dim_k]`; only for the statistics; `data` may be null.
    struct dq_tensor q;
    // Keys after RoPE, `[n_tokens][n_kv_heads][head_dim_k]`.
    struct dq_tensor k;
    // Values, `[n_tokens][n_kv_heads][head_dim_v]`.
    struct dq_tensor v;
    // Position of each token in its sequence, `[n_tokens]`. Rows at position 0 are attention sinks: they get a set of
    // their own and stay out of the statistics. Null: no token is at position 0.
    const int32_t *positions;
    // Slot of each token, `[n_tokens]`; -1 skips the token's record, not its part in the statistics. Two tokens of a call
    // must not name the same slot.
    const int64_t *slots;
    // Where the records go.
    struct dq_store store;
    // On CUDA: a device word to which the number of replaced rows is added (see `DQ_ROWS_REPLACED`); null: not told.
    // Must be null on the CPU, where the status tells.
    uint32_t *replaced_rows;
} dq_tokens;

// Upper limits of the calls that one workspace is to serve.
typedef struct dq_limits {
    // `sizeof(dq_limits)`.
    uint32_t struct_size;
    // Most tokens in a compress or append.
    uint32_t max_tokens;
    // Most streams in an attend; 0 is 1.
    uint32_t max_streams;
    // Most queries per stream in an attend.
    uint32_t max_queries;
    // Most keys per stream in an attend.
    uint32_t max_kv;
    // Most queries of all streams of an attend together; 0 is `max_streams * max_queries`. A batch of one long prompt
    // and many single tokens needs far less than that. On CUDA a workspace is for `max_streams * max_queries`, whatever
    // this says.
    uint32_t max_total_queries;
    // Most rows of a dense tail in an attend.
    uint32_t max_tail;
} dq_limits;

// Additive mask `[n_streams][n_q][n_kv + tail.n_rows]`, keys next to each other; minus infinity hides a key.
typedef struct dq_mask {
    // First element, or null: every key is visible to every query.
    const void *data;
    // `DQ_F32` or `DQ_F16`.
    uint32_t dtype;
    // Must be 0.
    uint32_t reserved;
    // Bytes from one query to the next.
    uint64_t query_stride;
    // Bytes from one stream to the next.
    uint64_t stream_stride;
} dq_mask;

// A batch of sequences of uneven length, for paged engines: prompts, chunks of prompts and single tokens in one call.
//
// Every stream of the call is a sequence with queries, keys and who sees what of its own. A sequence's keys are its
// coded ones and behind them its tail; its last query is at the position of its last key.
//
// Arrays lie where the records are and are only read: in host memory on the CPU, in device memory on CUDA, where the
// kernels read them, so that a graph may be replayed with other numbers in them. What goes by value holds for all
// replays. On the CPU arrays are checked before anything is done; on CUDA they must be right.
typedef struct dq_sequences {
    // `[n_streams + 1]`, from 0, never falling: sequence `s` has the queries `[q_starts[s], q_starts[s + 1])` of q and
    // out, at most `n_q`. Null: `n_q` queries each.
    const int32_t *q_starts;
    // `[n_streams]`: coded keys of each sequence, 0 to `n_kv`. Null: this form is not used, and all fields here must be 0.
    const int32_t *kv_lengths;
    // `[n_streams][blocks]`: key `j` of sequence `s` is in slot `b * block_slots + j % block_slots`, where `b` is
    // `block_table[s][j / block_slots]`. Sequences may share blocks. Blocks that no query sees are not looked at and may
    // have any number. Null: keys lie in the stretches of `first_slot` and `stream_slots`.
    const int32_t *block_table;
    // Bytes from one sequence's blocks to the next's: a multiple of 4 that holds the blocks of every sequence; 0: all
    // sequences share one row.
    uint64_t table_stride;
    // Slots of a block, at least 1; any number, on CUDA a power of two. 0 without a table.
    uint32_t block_slots;
    // With `q_starts`: tokens in q and out, `q_starts[n_streams]` or more. Those beyond are not read, nor written.
    uint32_t n_tokens;
    // `DQ_VISIBLE_CAUSAL` (also 0) or `DQ_VISIBLE_ALL`.
    uint32_t visible;
    // Keys that a query sees at most, its own included (a sliding window); 0: no limit. Only with `DQ_VISIBLE_CAUSAL`.
    uint32_t window;
} dq_sequences;

// Rows that are not coded: the last keys of each stream or sequence, behind its coded ones, in the same softmax.
typedef struct dq_tail {
    // Keys after RoPE, `[rows][n_kv_heads][head_dim_k]`.
    struct dq_tensor k;
    // Values, `[rows][n_kv_heads][head_dim_v]`.
    struct dq_tensor v;
    // `[n_streams]`: the row of k and v at which each tail begins. Null: tail `s` begins at row `s * n_rows`. Only with
    // `sequences`.
    const int32_t *starts;
    // `[n_streams]`: rows of each tail, 0 to `n_rows`. Null: `n_rows` each. Only with `sequences`.
    const int32_t *lengths;
    // Rows of a tail, at most; 0: there are no tails, and all fields here must be 0.
    uint32_t n_rows;
    // Must be 0.
    uint32_t reserved;
} dq_tail;

// Attention over coded slots: `out = softmax(softcap(scale * q k^T) + mask) v` for every query head.
//
// Keys are named in one of two ways, the same on every backend: as stretches of slots with an additive mask, or, with
// `sequences`, as blocks of slots with lengths and a causal or sliding window.
typedef struct dq_attend_args {
    // `sizeof(dq_attend_args)`.
    uint32_t struct_size;
    // Independent groups of queries, each over its own stretch of slots; 0 is 1.
    uint32_t n_streams;
    // Queries of each stream; with `sequences`: the most of any.
    uint32_t n_q;
    // Keys of each stream: slots `[first_slot + s * stream_slots, + n_kv)` for stream `s`; with `sequences`: the most
    // coded keys of any.
    uint32_t n_kv;
    // First slot of stream 0. Must be 0 with a block table.
    uint64_t first_slot;
    // Slots from one stream's first slot to the next's. Must be 0 with a block table.
    uint64_t stream_slots;
    // The records. Slots that are hidden from every query are never read.
    struct dq_store store;
    // Queries after RoPE, `[n_streams * n_q][n_q_heads][head_dim_k]`; with `q_starts`: `[sequences.n_tokens]` of them.
    struct dq_tensor q;
    // Result, `[tokens of q][n_q_heads][head_dim_v]`. A query that sees no key yields zeros.
    struct dq_tensor out;
    // Additive mask. Not with `sequences`.
    struct dq_mask mask;
    // One logit per query head that joins the softmax without a value, `[n_q_heads]` f32; null: none.
    const float *sink_logits;
    // Factor of the scores; 0 is `1 / sqrt(head_dim_k)`.
    float scale;
    // Scores become `softcap * tanh(score / softcap)` before the mask; 0: none.
    float softcap;
    // Uneven sequences over blocks of slots; all zero: none.
    struct dq_sequences sequences;
    // Rows that are not coded; all zero: none.
    struct dq_tail tail;
} dq_attend_args;

// Receives log lines, UTF-8, zero-terminated, without a newline. `level`: 1 error, 2 warning, 3 information. May be
// called from any thread that is inside a call. Must not unwind.
typedef void (*dq_log_fn)(uint32_t level, const char *message, void *user);

// The call did all of its work.
#define DQ_OK 0

// An argument is wrong: `dq_last_error` names the parameter, the value and the limit. Nothing was changed.
#define DQ_ERROR_INVALID_ARGUMENT 1

// The arguments are valid but this library has no kernel or code for them. Nothing was changed.
#define DQ_ERROR_UNSUPPORTED 2

// The backend asked for is not in this build, or its driver or device is missing. Nothing was changed.
#define DQ_ERROR_NO_BACKEND 3

// Memory could not be allocated. Nothing was changed.
#define DQ_ERROR_OUT_OF_MEMORY 4

// The workspace is smaller than `dq_workspace_size` says. Nothing was changed.
#define DQ_ERROR_WORKSPACE 5

// A factor file or a set export is damaged, of another version, or of another model. Nothing was changed.
#define DQ_ERROR_BAD_FILE 6

// The caller's read or write callback failed.
#define DQ_ERROR_IO 7

// No free set id is left for an import. Nothing was changed.
#define DQ_ERROR_SETS_FULL 8

// The CUDA driver reported an error.
#define DQ_ERROR_CUDA 9

// The call cannot be recorded into a CUDA graph at this moment (a fit is due). Nothing was changed.
#define DQ_ERROR_CAPTURE 10

// A defect of this library. The handle must not be used further.
#define DQ_ERROR_INTERNAL 11

// Not an error of the call: all rows were written, but rows with NaN, infinity or a scale beyond f16 were found. Such
// a row with NaN or infinity was written as the zero row of set 0; one beyond f16 was written with the largest scale.
#define DQ_ROWS_REPLACED 100

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Opens a backend. On the CPU nothing but the handle is allocated. On Linux, where the CPU has AMX, the first one asks the
// kernel to let this process use it (`arch_prctl(ARCH_REQ_XCOMP_PERM)`): for good, for all its threads. Signal frames of
// threads that are inside `dq_attend` may then be 8 KiB larger, and `sigaltstack` refuses stacks below
// `getauxval(AT_MINSIGSTKSZ)`. If the kernel says no, as it does where a thread has a smaller one already, AVX-512 is used.
// `DECOQUANT_SIMD=avx512` in the environment never asks.
//
// `desc`: what to open; null: the CPU. `out`: receives the handle; untouched on failure. Destroy it with
// `dq_context_destroy`.
//
// Errors: `DQ_ERROR_INVALID_ARGUMENT` for a number that is no backend or a device other than 0 on the CPU;
// `DQ_ERROR_NO_BACKEND` for a backend that is not in this build (`dq_backends`), or whose driver is missing or too old, or
// whose device is not there; `DQ_ERROR_UNSUPPORTED` for a device of an architecture without kernels;
// `DQ_ERROR_OUT_OF_MEMORY`, `DQ_ERROR_CUDA`. On CUDA the device's primary context is retained and all kernels are loaded.
// Threads: may be called from several at once.
dq_status dq_context_create(const struct dq_context_desc *desc,
                            struct dq_context **out);

// Ends a context. Null is fine. Codecs that were made with it keep what they need.
void dq_context_destroy(struct dq_context *context);

// Makes a codec with set 0 (the plain rotation) in every head. All memory that it will ever hold for statistics is
// allocated here; `max_factor_bytes` of `dq_codec_layout` bounds what fits add.
//
// `context`: its backend and device. `desc`: read during the call only. `out`: receives the handle; untouched on
// failure. Destroy it with `dq_codec_destroy`.
//
// Errors: `DQ_ERROR_INVALID_ARGUMENT`; `DQ_ERROR_UNSUPPORTED` for a head_dim or plan without code, on CUDA also for a
// combination without kernels; `DQ_ERROR_OUT_OF_MEMORY`, `DQ_ERROR_CUDA`.
dq_status dq_codec_create(const struct dq_context *context, const struct dq_codec_desc *desc, struct dq_codec **out);

// Ends a codec. Null is fine. Records stay readable by another codec only with their sets: see `dq_sets_export`.
void dq_codec_destroy(struct dq_codec *codec);

// Writes a factor file: little endian, with magic, version, shapes, fingerprint, all sets, and a checksum. The same
// factors give the same bytes on every machine.
//
// `write`: called with pieces in order. Errors: `DQ_ERROR_IO` when it returned non-zero; the codec is unchanged, what
// was written is no factor file. Threads: as for a const handle; not while a layer is observed or refitted.
dq_status dq_codec_save(const struct dq_codec *codec, dq_write_fn write, void *user);

// Makes a codec from a factor file. It is frozen: it has fitted factors from the first token, takes no statistics and
// never refits, so that the same rows always give the same records.
//
// `desc` must describe the layers and the fingerprint that the file was saved with. `read`: called for pieces in
// order, never for more bytes than the file has. `out`: receives the handle; untouched on failure.
//
// Errors: `DQ_ERROR_BAD_FILE` for a file that is damaged, cut short, of another version or of another model;
// `DQ_ERROR_IO` when `read` returned non-zero, which is also how a file ends too early; and those of
// `dq_codec_create`.
dq_status dq_codec_load(const struct dq_context *context,
                        const struct dq_codec_desc *desc,
                        dq_read_fn read,
                        void *user,
                        struct dq_codec **out);

// Where a layer's records lie and what they cost.
//
// `n_slots`: slots that the engine will hold, over which `bits_per_value_with_factors` spreads the factors; 0 leaves
// that field 0. `out`: its `struct_size` is set by the caller.
dq_status dq_codec_layout(const struct dq_codec *codec, uint32_t layer, uint64_t n_slots, struct dq_layout *out);

// What a layer has learned so far. May be called at any time, also while the layer is fitted. `out`: its `struct_size`
// is set by the caller.
dq_status dq_codec_info(const struct dq_codec *codec, uint32_t layer, struct dq_layer_info *out);

// Prefill: takes statistics of the tokens, refits where a fit is due, then codes every row with the sets that serve
// it best. The same as `dq_observe_shard`, `dq_refit_shard` and `dq_encode_shard` with one shard each.
//
// `tokens`: q may be absent (the fit then knows nothing of queries); k, v, slots and store must be there. Records are
// written whole, padding included; slots that are not named stay untouched. `workspace`: none is needed on the CPU.
// `stream`: null on the CPU.
//
// Returns `DQ_ROWS_REPLACED` when a row held NaN, infinity or values beyond f16. Such rows stay out of the statistics;
// all other rows are coded as if they were not there.
// On CUDA the number of such rows is added to `tokens->replaced_rows` instead. Where a fit is due, the calling thread
// waits until it is made, and the call cannot be captured; with `DQ_CODEC_DEFER_FITS` neither.
// Errors: `DQ_ERROR_INVALID_ARGUMENT`, `DQ_ERROR_WORKSPACE`, `DQ_ERROR_OUT_OF_MEMORY`, `DQ_ERROR_CAPTURE`, `DQ_ERROR_CUDA`.
dq_status dq_compress(struct dq_codec *codec,
                      uint32_t layer,
                      const struct dq_tokens *tokens,
                      void *workspace,
                      uint64_t workspace_bytes,
                      void *stream);

// Decode: codes the rows with the sets in force, then adds them to the statistics when q is given. Never fits (see
// `dq_refit`). Arguments, results and errors are those of `dq_compress`.
dq_status dq_append(struct dq_codec *codec,
                    uint32_t layer,
                    const struct dq_tokens *tokens,
                    void *workspace,
                    uint64_t workspace_bytes,
                    void *stream);

// Between steps, or on a thread of its own: fits the layers `[first_layer, first_layer + n_layers)` where a fit is due,
// so that a chat which only ever appends is fitted, too. Cheap when none is due. New sets serve the rows that are coded
// from then on; records stay as they are.
//
// `stream`: null on the CPU. On CUDA the one that the layers' other calls go to. The fit sees the rows of the work that
// is on it, and comes into force in its order, between one call and the next: the stream copies, and does not wait for
// the fit; the calling thread does. A fit counts as due by the rows of work that has been done.
//
// Errors: `DQ_ERROR_CAPTURE` when a fit is due in a capture, `DQ_ERROR_CUDA`. Threads: may overlap `dq_compress`,
// `dq_append` and the const calls on the same layers, but no other call; which rows the new sets serve first then
// depends on who was faster. On CUDA no stream may be under capture in global mode meanwhile.
dq_status dq_refit(struct dq_codec *codec, uint32_t first_layer, uint32_t n_layers, void *stream);

// Phase 1 of compress: adds the tokens to the statistics. For engines that run an operation on threads of their own
// without barriers inside: each of `n_shards` calls does its share of the heads. Shards of a phase may run at the same
// time on any threads; every shard of a phase must have returned before the next phase starts, but a shard of phase 2 may
// follow the same shard of phase 1 at once where `n_shards` is the same in both: then they deal the heads alike. The result
// does not depend on `n_shards`. On the CPU only.
//
// `tokens`: slots and store are not looked at. k and v may be absent together: a layer that shares this layer's cache
// brings only its queries. A frozen codec ignores the rows.
dq_status dq_observe_shard(struct dq_codec *codec,
                           uint32_t layer,
                           const struct dq_tokens *tokens,
                           uint32_t shard,
                           uint32_t n_shards);

// Phase 2 of compress: fits this shard's share of the heads where a fit is due.
dq_status dq_refit_shard(struct dq_codec *codec, uint32_t layer, uint32_t shard, uint32_t n_shards);

// Phase 3 of compress: codes this shard's share of the tokens. q is not looked at. Returns `DQ_ROWS_REPLACED` when a
// row of this share was replaced. Allocates nothing.
dq_status dq_encode_shard(struct dq_codec *codec,
                          uint32_t layer,
                          const struct dq_tokens *tokens,
                          uint32_t shard,
                          uint32_t n_shards);

// Bytes of workspace that any call on this layer within `limits` needs. Depends on shapes only, never on the number of
// shards; grows with every limit. 0 is possible: the workspace may then be null.
//
// `bytes`: receives the size; untouched on failure. A workspace is aligned to 64 bytes, belongs to one call (or one
// set of shards) at a time, and holds nothing between calls.
dq_status dq_workspace_size(const struct dq_codec *codec,
                            uint32_t layer,
                            const struct dq_limits *limits,
                            uint64_t *bytes);

// Attention of every query head over coded slots, in the calling thread.
//
// `args`: see `dq_attend_args`. Queries are folded into the coded space once per factor set and rows are never
// decoded: with `x = mean + T_S y`, the score is `(T_S^T q) . y + q . mean`, and the values' sum is unfolded once at
// the end. Against exact arithmetic on the decoded rows the error of a channel is at most 1e-2 of its sum of `p |v|`,
// or, where that is small beside the row's other channels (a query that sees few keys), 1e-3 of the row's mean of these
// sums.
// `workspace`: at least what `dq_workspace_size` says for these counts, aligned to 64 bytes. `stream`: null on the CPU.
//
// All of `out` is written. A slot that is hidden from every query is not looked at; a visible slot must hold a record
// of this codec. A query that sees no key yields zeros. NaN in q or in the mask reaches that query's output and no
// other; NaN in a row of the tail reaches the queries that see it.
// Errors: `DQ_ERROR_INVALID_ARGUMENT`, `DQ_ERROR_WORKSPACE`, and on CUDA `DQ_ERROR_UNSUPPORTED` for blocks of slots that
// are no power of two; out and workspace are untouched then. Threads: may overlap everything but a call that writes these
// slots.
dq_status dq_attend(const struct dq_codec *codec,
                    uint32_t layer,
                    const struct dq_attend_args *args,
                    void *workspace,
                    uint64_t workspace_bytes,
                    void *stream);

// Phase 1 of attend on the caller's own threads: each of `n_shards` calls does its share of the work into the
// workspace that they have in common. Shards may run at the same time on any threads; all must have returned before
// `dq_attend_merge_shard` starts; the result does not depend on `n_shards`. Every shard of both phases gets the same
// `args` and workspace. `out` may or may not be written in this phase. Arguments and errors are those of `dq_attend`.
// On the CPU only.
dq_status dq_attend_shard(const struct dq_codec *codec,
                          uint32_t layer,
                          const struct dq_attend_args *args,
                          void *workspace,
                          uint64_t workspace_bytes,
                          uint32_t shard,
                          uint32_t n_shards);

// Phase 2 of attend: joins the parts of phase 1 into this shard's share of `out`. The number of shards may differ from
// phase 1's.
dq_status dq_attend_merge_shard(const struct dq_codec *codec,
                                uint32_t layer,
                                const struct dq_attend_args *args,
                                void *workspace,
                                uint64_t workspace_bytes,
                                uint32_t shard,
                                uint32_t n_shards);

// Decodes records into rows.
//
// `slots`: `[n_slots]` slot numbers; -1 gives zero rows; repeats are fine. `k_out`: `[n_slots][n_kv_heads][head_dim_k]`
// and `v_out`: `[n_slots][n_kv_heads][head_dim_v]`, f32, f16 or bf16; either may be null, or have null data, and is
// then left out. The two may be woven into one buffer. A row that names a set which the codec does not hold is
// decoded as zeros.
//
// Formula: `x = mean + T_S y`, `y[j] = scale * level(code[j])`. Allocates nothing on the CPU.
// Errors: `DQ_ERROR_INVALID_ARGUMENT`; nothing is written then. Threads: may overlap everything but a call that
// writes these slots.
dq_status dq_dequantize(const struct dq_codec *codec,
                        uint32_t layer,
                        const struct dq_store *store,
                        const int64_t *slots,
                        uint32_t n_slots,
                        const struct dq_tensor *k_out,
                        const struct dq_tensor *v_out,
                        void *stream);

// Writes all factor sets of a layer, and what codes new rows with the newest: shapes, sets with their ids, its encode
// matrix, checksum; little endian.
//
// `write`: called with pieces in order. Errors: `DQ_ERROR_IO` when it returned non-zero.
dq_status dq_sets_export(const struct dq_codec *codec, uint32_t layer, dq_write_fn write, void *user);

// Takes up the sets of an export, so that its records can be read after `dq_remap_rows`. A set that the codec already
// holds (same content) keeps its id; others take free ids. New rows never use them, with one exception: a head that
// learns and has not been fitted yet codes with the newest set of the export, and its sinks, until it has seen more rows
// than that set was made from. Frozen codecs import, too.
//
// `read`: called for pieces in order. `map`: receives `[side][head][old id] = new id`, side 0 being the keys, or 255
// where the export has no such set; at least `2 * n_kv_heads * DQ_MAX_SETS` bytes, untouched on failure.
//
// Errors: `DQ_ERROR_BAD_FILE` for an export that is damaged, cut short, of another version or of another shape;
// `DQ_ERROR_SETS_FULL` when a head has too few free ids, or on CUDA no room for so many fits (max_fits and three); `DQ_ERROR_IO`. No set was added then.
dq_status dq_sets_import(struct dq_codec *codec,
                         uint32_t layer,
                         dq_read_fn read,
                         void *user,
                         uint8_t *map,
                         uint64_t map_bytes);

// Rewrites the set ids in records that came from another codec. In host memory, whatever the backend.
//
// `store`: the records. `slots`: `[n_slots]`, -1 skips, none named twice. `map`: of `dq_sets_import`, `map_bytes` at
// least `2 * n_kv_heads * DQ_MAX_SETS`. Codes and scales stay as they are.
//
// Errors: `DQ_ERROR_INVALID_ARGUMENT`, also for a row that names an id which the map does not hold. All rows are
// checked before the first is written. Threads: must not overlap a call that reads or writes these slots.
dq_status dq_remap_rows(const struct dq_codec *codec,
                        uint32_t layer,
                        const struct dq_store *store,
                        const int64_t *slots,
                        uint64_t n_slots,
                        const uint8_t *map,
                        uint64_t map_bytes);

// Version of the library, as "0.1.0". Never fails; the text lives as long as the library.
const char *dq_version(void);

// Number of the binary interface, the one in the SONAME. A program built against another number must not go on.
uint32_t dq_abi_version(void);

// Name of a status, as "DQ_OK"; "DQ_ERROR_UNKNOWN" for a number that is none. Never fails.
const char *dq_status_name(dq_status status);

// Short name of a code plan, as "4"; null for a number that is no plan of this library. Never fails; the text lives
// as long as the library.
const char *dq_plan_name(uint32_t plan);

// Backends in this build, as a set of bits `1 << DQ_BACKEND_*`. Says nothing about devices. Never fails.
uint32_t dq_backends(void);

// This thread's message: one sentence about its last call that did not return `DQ_OK`; empty before the first.
//
// `buf`: receives the text, UTF-8, zero-terminated and cut to `capacity` bytes; null with capacity 0 to ask for the
// length. Returns the length of the whole text without the zero, below 1024. Never fails.
uint64_t dq_last_error(char *buf, uint64_t capacity);

// Sets the receiver of the library's log lines, for the whole process; null: none, as at the start. The library tells
// of fits, loads, imports and its own defects; it never prints.
//
// `log` is called from threads that are inside other calls, from several at once, and may call the functions that
// never fail. Calls under way may still use the previous receiver when this one returns: keep its `user` alive.
void dq_set_logger(dq_log_fn log, void *user);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DECOQUANT_H */
