//! What the kernels take: the mirror of `kernels/params.h`, which asserts the same sizes.

use super::view::{Address, Rows, Store, type_number};

pub const MAX_SETS: usize = 16;
pub const MAX_TIERS: usize = 4;
/// The rotation and up to seven fits.
pub const MAX_TRANSFORMS: usize = 8;

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct HeadSets {
    pub present: u16,
    pub sinks: u16,
    pub newest: u8,
    pub encode_dense: u8,
    pub reserved: [u8; 2],
    pub transform: [u8; MAX_SETS],
    pub kappa: [f32; MAX_TIERS],
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Factors {
    pub heads: Address,
    pub means: Address,
    pub decode: Address,
    pub encode: Address,
    pub rotation: Address,
    pub max_dense: u32,
    pub reserved: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceRows {
    pub data: Address,
    pub token_stride: u64,
    pub head_stride: u64,
    pub dtype: u32,
    pub reserved: u32,
}

impl From<&Rows> for DeviceRows {
    fn from(rows: &Rows) -> Self {
        Self {
            data: rows.data,
            token_stride: rows.shape.token_stride as u64,
            head_stride: rows.shape.head_stride as u64,
            dtype: type_number(rows.shape.dtype),
            reserved: 0,
        }
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceStore {
    pub data: Address,
    pub stride: u64,
    pub n_slots: u64,
}

impl From<&Store> for DeviceStore {
    fn from(store: &Store) -> Self {
        Self { data: store.data, stride: store.stride, n_slots: store.n_slots }
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Tail {
    pub k: DeviceRows,
    pub v: DeviceRows,
    pub starts: Address,
    pub lengths: Address,
    pub n_rows: u32,
    pub head_dim: u32,
    pub parts: u32,
    pub reserved: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Attend {
    pub store: DeviceStore,
    pub k: Factors,
    pub v: Factors,
    pub q: DeviceRows,
    pub out: DeviceRows,
    pub mask: Address,
    pub mask_query_stride: u64,
    pub mask_stream_stride: u64,
    pub sink_logits: Address,
    pub block_table: Address,
    pub q_starts: Address,
    pub lengths: Address,
    pub first_slot: u64,
    pub stream_slots: u64,
    pub table_stride: u64,
    pub mask_type: u32,
    pub block_shift: u32,
    pub n_kv_heads: u32,
    pub group: u32,
    pub n_streams: u32,
    pub n_q: u32,
    pub n_kv: u32,
    pub window: i32,
    pub causal: u32,
    pub scale: f32,
    pub softcap: f32,
    pub heads_per_block: u32,
    pub key_warps: u32,
    pub n_splits: u32,
    pub row_tiles: u32,
    pub v_transforms: u32,
    pub fold_tiles: u32,
    pub fold_units: u32,
    pub folded: Address,
    pub folded_scales: Address,
    pub constants: Address,
    pub partial: Address,
    pub partial_sums: Address,
    pub tail: Tail,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Dequantize {
    pub store: DeviceStore,
    pub k: Factors,
    pub v: Factors,
    pub k_out: DeviceRows,
    pub v_out: DeviceRows,
    pub slots: Address,
    pub n: u32,
    pub n_kv_heads: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Encode {
    pub store: DeviceStore,
    pub k: Factors,
    pub v: Factors,
    pub k_rows: DeviceRows,
    pub v_rows: DeviceRows,
    pub slots: Address,
    pub status: Address,
    pub sinks: Sinks,
    pub joined: Address,
    pub arrived: Address,
    pub n: u32,
    pub n_kv_heads: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Sinks {
    pub positions: Address,
    pub k: Units,
    pub v: Units,
}

/// Head of a unit's running statistics; `kernels/params.h` says what follows it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Moments {
    pub rows: u64,
    pub energy: f64,
    pub slack: f64,
    pub spread: f64,
    pub due: u64,
    pub n_staged: u32,
    pub has_reference: u32,
    pub learns: u32,
    pub takes_sinks: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Units {
    pub data: Address,
    pub stride: u64,
    pub dim: u32,
    pub with_second: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Observe {
    pub k: Units,
    pub v: Units,
    pub q: Units,
    pub k_rows: DeviceRows,
    pub v_rows: DeviceRows,
    pub q_rows: DeviceRows,
    pub k_heads: Address,
    pub v_heads: Address,
    pub k_means: Address,
    pub v_means: Address,
    pub positions: Address,
    pub rows_seen: Address,
    pub entered: Address,
    pub entered_stride: u64,
    pub n: u32,
    pub n_kv_heads: u32,
    pub group: u32,
    pub flush: u32,
    pub first: u32,
    pub reserved: u32,
}

/// Rows of a side whose matrix several blocks of the encode kernel share, at most; floats of each.
pub const JOINED_ROWS: usize = 32;
pub const JOINED_DIM: usize = 256;

/// Rows of a unit that one launch of the statistics takes at most.
pub const OBSERVE_ROWS: usize = 2048;
/// What its kernels pass each other for a unit, without the rows that waited.
pub const ENTERED_BYTES: usize = 16 + (OBSERVE_ROWS / 16 + 1) * 32;

/// As [`Fit::id`]: there is no place for the fit's matrix.
pub const NO_PLACE: u8 = 255;

/// A fit on its way into force.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Fit {
    pub wanted: u8,
    pub id: u8,
    pub transform: u8,
    pub encode_dense: u8,
    pub last: u8,
    pub reserved: [u8; 3],
    pub kappa: [f32; MAX_TIERS],
    pub spread: f64,
    pub due: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Publish {
    pub k: Units,
    pub v: Units,
    pub q: Units,
    pub k_heads: Address,
    pub v_heads: Address,
    pub k_means: Address,
    pub v_means: Address,
    pub fits: Address,
    pub means: Address,
    pub ids: Address,
    pub n_kv_heads: u32,
    pub reserved: u32,
}

const _: () = {
    assert!(size_of::<HeadSets>() == 40 && size_of::<Factors>() == 48);
    assert!(size_of::<DeviceRows>() == 32 && size_of::<DeviceStore>() == 24);
    assert!(size_of::<Tail>() == 96 && size_of::<Attend>() == 472);
    assert!(size_of::<Dequantize>() == 200 && size_of::<Encode>() == 280 && size_of::<Sinks>() == 56);
    assert!(size_of::<Fit>() == 40 && size_of::<Publish>() == 136);
    assert!(size_of::<Moments>() == 56 && size_of::<Observe>() == 256);
};
