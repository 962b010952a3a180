//! Every type that crosses the C boundary. The comments here are the comments of `include/decoquant.h`; the rules that
//! hold for all of them stand at its head, in `cbindgen.toml`.
#![allow(non_camel_case_types)]

use std::ffi::c_void;

/// Version of this header, `major.minor.patch`; `dq_version` is that of the library.
pub const DQ_VERSION_MAJOR: u32 = 0;
/// Raised when something is added.
pub const DQ_VERSION_MINOR: u32 = 1;
/// Raised when something is mended.
pub const DQ_VERSION_PATCH: u32 = 0;
/// Number of the binary interface that this header describes: `dq_abi_version` of the library must be the same.
pub const DQ_ABI_VERSION: u32 = 0;

/// What a call returns. The numbers never change meaning.
pub type dq_status = i32;

/// The call did all of its work.
pub const DQ_OK: dq_status = 0;
/// An argument is wrong: `dq_last_error` names the parameter, the value and the limit. Nothing was changed.
pub const DQ_ERROR_INVALID_ARGUMENT: dq_status = 1;
/// The arguments are valid but this library has no kernel or code for them. Nothing was changed.
pub const DQ_ERROR_UNSUPPORTED: dq_status = 2;
/// The backend asked for is not in this build, or its driver or device is missing. Nothing was changed.
pub const DQ_ERROR_NO_BACKEND: dq_status = 3;
/// Memory could not be allocated. Nothing was changed.
pub const DQ_ERROR_OUT_OF_MEMORY: dq_status = 4;
/// The workspace is smaller than `dq_workspace_size` says. Nothing was changed.
pub const DQ_ERROR_WORKSPACE: dq_status = 5;
/// A factor file or a set export is damaged, of another version, or of another model. Nothing was changed.
pub const DQ_ERROR_BAD_FILE: dq_status = 6;
/// The caller's read or write callback failed.
pub const DQ_ERROR_IO: dq_status = 7;
/// No free set id is left for an import. Nothing was changed.
pub const DQ_ERROR_SETS_FULL: dq_status = 8;
/// The CUDA driver reported an error.
pub const DQ_ERROR_CUDA: dq_status = 9;
/// The call cannot be recorded into a CUDA graph at this moment (a fit is due). Nothing was changed.
pub const DQ_ERROR_CAPTURE: dq_status = 10;
/// A defect of this library. The handle must not be used further.
pub const DQ_ERROR_INTERNAL: dq_status = 11;
/// Not an error of the call: all rows were written, but rows with NaN, infinity or a scale beyond f16 were found. Such
/// a row with NaN or infinity was written as the zero row of set 0; one beyond f16 was written with the largest scale.
pub const DQ_ROWS_REPLACED: dq_status = 100;

/// Backend: the CPU. Pointers are host pointers and `stream` is null.
pub const DQ_BACKEND_CPU: u32 = 1;
/// Backend: one CUDA device. Pointers are device pointers and work is ordered by `stream`.
pub const DQ_BACKEND_CUDA: u32 = 2;

/// Element types of rows, masks and outputs.
pub const DQ_F32: u32 = 1;
/// IEEE 754 binary16.
pub const DQ_F16: u32 = 2;
/// bfloat16.
pub const DQ_BF16: u32 = 3;

/// Gauge: set 0 only, a Hadamard rotation behind fixed signs. Nothing is learned.
pub const DQ_GAUGE_ROTATION: u32 = 1;
/// Gauge: the rotation about the mean of the rows. Learns means, holds no matrices. The default for values.
pub const DQ_GAUGE_CENTRED: u32 = 2;
/// Gauge: the fit that minimises the error of the attention scores (for values: of the rows). The default for keys.
pub const DQ_GAUGE_ATTENTION: u32 = 3;

/// Who sees what in a batch of sequences: the query at position `p` sees the keys up to `p`, or the last `window` of
/// them. The default.
pub const DQ_VISIBLE_CAUSAL: u32 = 1;
/// Every query sees every key of its sequence.
pub const DQ_VISIBLE_ALL: u32 = 2;

/// `dq_compress` makes no fits. The caller makes them with `dq_refit`, between steps or on a thread of its own while the
/// layers go on working, so that no prompt waits for one.
pub const DQ_CODEC_DEFER_FITS: u32 = 1;

/// The key half of a layer.
pub const DQ_SIDE_K: u32 = 0;
/// The value half of a layer.
pub const DQ_SIDE_V: u32 = 1;

/// Most factor sets that a head and side can hold: a row's header has four bits for the set.
pub const DQ_MAX_SETS: u32 = 16;

/// A backend and its device. Create one per device; it may be shared by any number of codecs and threads.
pub struct dq_context {
    _private: [u8; 0],
}

/// Shapes, widths, gauges and factor sets of all layers of one model.
///
/// Threads: calls that take a `const dq_codec *` may run at the same time. For one layer, observe, refit, encode,
/// compress and append must be ordered by the caller; attend, dequantize and layout queries may overlap them.
pub struct dq_codec {
    _private: [u8; 0],
}

/// What `dq_context_create` is to open.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_context_desc {
    /// `sizeof(dq_context_desc)`.
    pub struct_size: u32,
    /// `DQ_BACKEND_CPU` (also the default) or `DQ_BACKEND_CUDA`.
    pub backend: u32,
    /// Ordinal of the CUDA device. Must be 0 on the CPU.
    pub device: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// One layer of a model.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_layer_desc {
    /// `sizeof(dq_layer_desc)`; also the stride of an array of layers.
    pub struct_size: u32,
    /// Query heads; a multiple of `n_kv_heads`.
    pub n_q_heads: u32,
    /// Key and value heads: equal to `n_q_heads`, fewer (GQA) or 1 (MQA). At most 1024.
    pub n_kv_heads: u32,
    /// Channels of a query and key head: 64, 80, 96, 128, 192 or 256.
    pub head_dim_k: u32,
    /// Channels of a value head: the same choices.
    pub head_dim_v: u32,
    /// How keys are coded: a plan number, see `dq_plan_name`. 2, 3, 4 and 8 are the uniform widths in bits. Tiered plans
    /// give the strongest latent channels more bits and the weakest fewer: 104 has 6, 4 and 3 bits and 103 has 5, 3 and
    /// 2 on a quarter, a half and a quarter of the channels (4.25 and 3.25 bits), 102 has 4 and 2 on a quarter and the
    /// rest (2.5; to multiples of 16 channels): made for keys under `DQ_GAUGE_ATTENTION`.
    pub k_plan: u32,
    /// How values are coded.
    pub v_plan: u32,
    /// `DQ_GAUGE_*` of the keys; 0 is `DQ_GAUGE_ATTENTION`.
    pub k_gauge: u32,
    /// `DQ_GAUGE_*` of the values; 0 is `DQ_GAUGE_CENTRED`.
    pub v_gauge: u32,
}

/// A whole model.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_codec_desc {
    /// `sizeof(dq_codec_desc)`.
    pub struct_size: u32,
    /// Number of layers, 1 to 4096.
    pub n_layers: u32,
    /// `n_layers` layers, `layers[0].struct_size` bytes apart. Read during the call only.
    pub layers: *const dq_layer_desc,
    /// Most fits that a head and side may hold, 1 to 7; 0 is 4. Fits come due at 16, 64, 512 and 4,096 rows, then at
    /// every eightfold; at the bound refitting stops and the statistics are dropped.
    pub max_fits: u32,
    /// 0, or `DQ_CODEC_DEFER_FITS`.
    pub flags: u32,
    /// Identity of the model whose rows are coded (weights, RoPE and adapter settings). Stored in factor files, which
    /// are refused when theirs differs. All zero is an identity like any other.
    pub fingerprint: [u8; 32],
}

/// Where the parts of a record lie. One record per slot; the slot's record starts at `store + slot * stride`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_layout {
    /// `sizeof(dq_layout)`, set by the caller.
    pub struct_size: u32,
    /// Alignment of the store and of the slot stride, in bytes: 16.
    pub alignment: u32,
    /// Bytes of one record, padding included.
    pub slot_bytes: u64,
    /// Offset of the key codes.
    pub k_codes_offset: u64,
    /// Offset of the value codes.
    pub v_codes_offset: u64,
    /// Offset of the key headers, u16 per KV head.
    pub k_headers_offset: u64,
    /// Offset of the value headers, u16 per KV head.
    pub v_headers_offset: u64,
    /// Most bytes of this layer's factor sets (imported ones come on top). Statistics are held besides until the last
    /// fit is made, at 4,096 rows by default: see `dq_layer_info`.
    pub max_factor_bytes: u64,
    /// Bits per value of a record: `8 * slot_bytes / (n_kv_heads * (head_dim_k + head_dim_v))`.
    pub bits_per_value: f64,
    /// The same with `max_factor_bytes` spread over the `n_slots` named in the call.
    pub bits_per_value_with_factors: f64,
}

/// State of a layer's factors.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_layer_info {
    /// `sizeof(dq_layer_info)`, set by the caller.
    pub struct_size: u32,
    /// Key sets in use, the rotation included: the most over the layer's heads.
    pub k_sets: u32,
    /// Value sets in use, likewise.
    pub v_sets: u32,
    /// 1 when no further fit will come: the bound was reached or the factors were loaded.
    pub frozen: u32,
    /// Rows that entered the statistics: the most over the layer's heads.
    pub rows_seen: u64,
    /// Bytes held now for factor sets: means, decode matrices and the encode matrices of the newest fits.
    pub factor_bytes: u64,
    /// Bytes held now for running moments.
    pub moment_bytes: u64,
    /// Rows until the next fit: a `dq_compress` of so many tokens or more makes it, and cannot be captured into a CUDA
    /// graph. 0: a fit is due; `UINT64_MAX`: none will come. On CUDA, rows that stay out of the statistics count, too,
    /// until the next fit, and rows of replayed graphs once the device has told of them.
    pub rows_to_fit: u64,
}

/// Rows in the caller's memory: `[n_tokens][n_heads][head_dim]`, channels next to each other.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_tensor {
    /// First element; null where the call says that the tensor may be absent. Aligned to its element.
    pub data: *mut c_void,
    /// `DQ_F32`, `DQ_F16` or `DQ_BF16`.
    pub dtype: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Bytes from one token to the next; a multiple of the element size.
    pub token_stride: u64,
    /// Bytes from one head to the next; a multiple of the element size.
    pub head_stride: u64,
}

/// The caller's memory for records.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_store {
    /// First record; 16-byte aligned.
    pub data: *mut c_void,
    /// Records that fit in it.
    pub n_slots: u64,
    /// Bytes from one slot to the next: at least `slot_bytes`, a multiple of 16; 0 is `slot_bytes`.
    pub slot_stride: u64,
}

/// New tokens of one layer, for `dq_compress`, `dq_append` and the phases of compress.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_tokens {
    /// `sizeof(dq_tokens)`.
    pub struct_size: u32,
    /// Number of tokens; 0 does nothing.
    pub n_tokens: u32,
    /// Queries after RoPE, `[n_tokens][n_q_heads][head_dim_k]`; only for the statistics; `data` may be null.
    pub q: dq_tensor,
    /// Keys after RoPE, `[n_tokens][n_kv_heads][head_dim_k]`.
    pub k: dq_tensor,
    /// Values, `[n_tokens][n_kv_heads][head_dim_v]`.
    pub v: dq_tensor,
    /// Position of each token in its sequence, `[n_tokens]`. Rows at position 0 are attention sinks: they get a set of
    /// their own and stay out of the statistics. Null: no token is at position 0.
    pub positions: *const i32,
    /// Slot of each token, `[n_tokens]`; -1 skips the token's record, not its part in the statistics. Two tokens of a call
    /// must not name the same slot.
    pub slots: *const i64,
    /// Where the records go.
    pub store: dq_store,
    /// On CUDA: a device word to which the number of replaced rows is added (see `DQ_ROWS_REPLACED`); null: not told.
    /// Must be null on the CPU, where the status tells.
    pub replaced_rows: *mut u32,
}

/// Additive mask `[n_streams][n_q][n_kv + tail.n_rows]`, keys next to each other; minus infinity hides a key.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_mask {
    /// First element, or null: every key is visible to every query.
    pub data: *const c_void,
    /// `DQ_F32` or `DQ_F16`.
    pub dtype: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Bytes from one query to the next.
    pub query_stride: u64,
    /// Bytes from one stream to the next.
    pub stream_stride: u64,
}

/// A batch of sequences of uneven length, for paged engines: prompts, chunks of prompts and single tokens in one call.
///
/// Every stream of the call is a sequence with queries, keys and who sees what of its own. A sequence's keys are its
/// coded ones and behind them its tail; its last query is at the position of its last key.
///
/// Arrays lie where the records are and are only read: in host memory on the CPU, in device memory on CUDA, where the
/// kernels read them, so that a graph may be replayed with other numbers in them. What goes by value holds for all
/// replays. On the CPU arrays are checked before anything is done; on CUDA they must be right.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_sequences {
    /// `[n_streams + 1]`, from 0, never falling: sequence `s` has the queries `[q_starts[s], q_starts[s + 1])` of q and
    /// out, at most `n_q`. Null: `n_q` queries each.
    pub q_starts: *const i32,
    /// `[n_streams]`: coded keys of each sequence, 0 to `n_kv`. Null: this form is not used, and all fields here must be 0.
    pub kv_lengths: *const i32,
    /// `[n_streams][blocks]`: key `j` of sequence `s` is in slot `b * block_slots + j % block_slots`, where `b` is
    /// `block_table[s][j / block_slots]`. Sequences may share blocks. Blocks that no query sees are not looked at and may
    /// have any number. Null: keys lie in the stretches of `first_slot` and `stream_slots`.
    pub block_table: *const i32,
    /// Bytes from one sequence's blocks to the next's: a multiple of 4 that holds the blocks of every sequence; 0: all
    /// sequences share one row.
    pub table_stride: u64,
    /// Slots of a block, at least 1; any number, on CUDA a power of two. 0 without a table.
    pub block_slots: u32,
    /// With `q_starts`: tokens in q and out, `q_starts[n_streams]` or more. Those beyond are not read, nor written.
    pub n_tokens: u32,
    /// `DQ_VISIBLE_CAUSAL` (also 0) or `DQ_VISIBLE_ALL`.
    pub visible: u32,
    /// Keys that a query sees at most, its own included (a sliding window); 0: no limit. Only with `DQ_VISIBLE_CAUSAL`.
    pub window: u32,
}

/// Rows that are not coded: the last keys of each stream or sequence, behind its coded ones, in the same softmax.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_tail {
    /// Keys after RoPE, `[rows][n_kv_heads][head_dim_k]`.
    pub k: dq_tensor,
    /// Values, `[rows][n_kv_heads][head_dim_v]`.
    pub v: dq_tensor,
    /// `[n_streams]`: the row of k and v at which each tail begins. Null: tail `s` begins at row `s * n_rows`. Only with
    /// `sequences`.
    pub starts: *const i32,
    /// `[n_streams]`: rows of each tail, 0 to `n_rows`. Null: `n_rows` each. Only with `sequences`.
    pub lengths: *const i32,
    /// Rows of a tail, at most; 0: there are no tails, and all fields here must be 0.
    pub n_rows: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// Attention over coded slots: `out = softmax(softcap(scale * q k^T) + mask) v` for every query head.
///
/// Keys are named in one of two ways, the same on every backend: as stretches of slots with an additive mask, or, with
/// `sequences`, as blocks of slots with lengths and a causal or sliding window.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_attend_args {
    /// `sizeof(dq_attend_args)`.
    pub struct_size: u32,
    /// Independent groups of queries, each over its own stretch of slots; 0 is 1.
    pub n_streams: u32,
    /// Queries of each stream; with `sequences`: the most of any.
    pub n_q: u32,
    /// Keys of each stream: slots `[first_slot + s * stream_slots, + n_kv)` for stream `s`; with `sequences`: the most
    /// coded keys of any.
    pub n_kv: u32,
    /// First slot of stream 0. Must be 0 with a block table.
    pub first_slot: u64,
    /// Slots from one stream's first slot to the next's. Must be 0 with a block table.
    pub stream_slots: u64,
    /// The records. Slots that are hidden from every query are never read.
    pub store: dq_store,
    /// Queries after RoPE, `[n_streams * n_q][n_q_heads][head_dim_k]`; with `q_starts`: `[sequences.n_tokens]` of them.
    pub q: dq_tensor,
    /// Result, `[tokens of q][n_q_heads][head_dim_v]`. A query that sees no key yields zeros.
    pub out: dq_tensor,
    /// Additive mask. Not with `sequences`.
    pub mask: dq_mask,
    /// One logit per query head that joins the softmax without a value, `[n_q_heads]` f32; null: none.
    pub sink_logits: *const f32,
    /// Factor of the scores; 0 is `1 / sqrt(head_dim_k)`.
    pub scale: f32,
    /// Scores become `softcap * tanh(score / softcap)` before the mask; 0: none.
    pub softcap: f32,
    /// Uneven sequences over blocks of slots; all zero: none.
    pub sequences: dq_sequences,
    /// Rows that are not coded; all zero: none.
    pub tail: dq_tail,
}

/// Upper limits of the calls that one workspace is to serve.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dq_limits {
    /// `sizeof(dq_limits)`.
    pub struct_size: u32,
    /// Most tokens in a compress or append.
    pub max_tokens: u32,
    /// Most streams in an attend; 0 is 1.
    pub max_streams: u32,
    /// Most queries per stream in an attend.
    pub max_queries: u32,
    /// Most keys per stream in an attend.
    pub max_kv: u32,
    /// Most queries of all streams of an attend together; 0 is `max_streams * max_queries`. A batch of one long prompt
    /// and many single tokens needs far less than that. On CUDA a workspace is for `max_streams * max_queries`, whatever
    /// this says.
    pub max_total_queries: u32,
    /// Most rows of a dense tail in an attend.
    pub max_tail: u32,
}

/// Writes `size` bytes; returns 0, or anything else to stop with `DQ_ERROR_IO`. Must not unwind.
pub type dq_write_fn = Option<unsafe extern "C" fn(user: *mut c_void, data: *const c_void, size: u64) -> i32>;

/// Reads exactly `size` bytes; returns 0, or anything else to stop with `DQ_ERROR_IO`. Must not unwind.
pub type dq_read_fn = Option<unsafe extern "C" fn(user: *mut c_void, data: *mut c_void, size: u64) -> i32>;

/// Receives log lines, UTF-8, zero-terminated, without a newline. `level`: 1 error, 2 warning, 3 information. May be
/// called from any thread that is inside a call. Must not unwind.
pub type dq_log_fn = Option<unsafe extern "C" fn(level: u32, message: *const std::ffi::c_char, user: *mut c_void)>;
