//! Checked descriptions of device memory. `capi::convert` makes them; addresses are never followed on the host.

use crate::view::{DType, MaskType, RowsShape};

/// Device memory; 0 is null.
pub type Address = u64;

/// Rows `[n_tokens][n_heads][head_dim]`.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    pub data: Address,
    pub shape: RowsShape,
}

/// Records.
#[derive(Debug, Clone, Copy)]
pub struct Store {
    pub data: Address,
    pub stride: u64,
    pub n_slots: u64,
}

/// New tokens of one layer; see `dq_tokens`.
#[derive(Debug, Clone, Copy)]
pub struct Tokens {
    pub n_tokens: u32,
    pub q: Option<Rows>,
    pub k: Rows,
    pub v: Rows,
    pub positions: Address,
    pub slots: Address,
    pub store: Store,
    pub replaced_rows: Address,
}

/// An additive mask `[n_streams][n_q][n_kv + rows of the tail]`.
#[derive(Debug, Clone, Copy)]
pub struct Mask {
    pub data: Address,
    pub dtype: MaskType,
    pub query_stride: u64,
    pub stream_stride: u64,
}

/// Rows that are not coded, behind the coded keys; see `dq_tail`.
#[derive(Debug, Clone, Copy)]
pub struct Tail {
    pub k: Rows,
    pub v: Rows,
    pub starts: Address,
    pub lengths: Address,
    /// Of a stream, at most; at least 1.
    pub n_rows: u32,
}

/// Attention over coded slots; see `dq_attend_args`.
#[derive(Debug, Clone, Copy)]
pub struct Attend {
    pub n_streams: u32,
    pub n_q: u32,
    pub n_kv: u32,
    pub first_slot: u64,
    pub stream_slots: u64,
    pub store: Store,
    pub q: Rows,
    pub out: Rows,
    pub mask: Option<Mask>,
    pub sink_logits: Address,
    pub q_starts: Address,
    pub kv_lengths: Address,
    pub block_table: Address,
    /// In entries.
    pub table_stride: u64,
    pub block_shift: u32,
    pub window: i32,
    pub causal: bool,
    pub scale: f32,
    pub softcap: f32,
    pub tail: Option<Tail>,
}

/// Rows to decode; see `dq_dequantize`.
#[derive(Debug, Clone, Copy)]
pub struct Dequantize {
    pub store: Store,
    pub slots: Address,
    pub n_slots: u32,
    pub k: Option<Rows>,
    pub v: Option<Rows>,
}

/// The caller's scratch bytes.
#[derive(Debug, Clone, Copy)]
pub struct Workspace {
    pub data: Address,
    pub bytes: u64,
}

/// A CUDA stream, null for the legacy default stream.
#[derive(Debug, Clone, Copy)]
pub struct Stream(pub *mut std::ffi::c_void);

/// Number of an element type in `kernels/params.h`; the same as in the header.
pub fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 1,
        DType::F16 => 2,
        DType::Bf16 => 3,
    }
}
