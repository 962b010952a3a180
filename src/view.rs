//! Checked windows on the caller's memory. `capi::convert` is the only place that makes them from raw pointers; from
//! here on every access is bounded by a length.
//!
//! Shards of one call share output memory, each writing rows or slots of its own. Two `&mut` to one buffer would be
//! undefined even when the bytes differ, so the writers hold a pointer and lend out only the piece that is written.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::marker::PhantomData;
use std::ops::Range;

use crate::batch::Sequences;
use crate::error::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    F32,
    F16,
    Bf16,
}

impl DType {
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }
}

/// Shape and strides of `[n_tokens][n_heads][head_dim]` rows, channels next to each other. Strides in bytes.
#[derive(Debug, Clone, Copy)]
pub struct RowsShape {
    pub dtype: DType,
    pub n_tokens: usize,
    pub n_heads: usize,
    pub head_dim: usize,
    pub token_stride: usize,
    pub head_stride: usize,
}

impl RowsShape {
    /// Bytes from the first element to the end of the last row; `None` when that overflows.
    pub fn extent(&self) -> Option<usize> {
        if self.n_tokens == 0 || self.n_heads == 0 {
            return Some(0);
        }
        let tokens = (self.n_tokens - 1).checked_mul(self.token_stride)?;
        let heads = (self.n_heads - 1).checked_mul(self.head_stride)?;
        tokens.checked_add(heads)?.checked_add(self.head_dim * self.dtype.size())
    }

    fn offset(&self, token: usize, head: usize) -> usize {
        assert!(token < self.n_tokens && head < self.n_heads);
        token * self.token_stride + head * self.head_stride
    }
}

/// Rows to read.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    bytes: &'a [u8],
    shape: RowsShape,
}

impl<'a> Rows<'a> {
    pub fn new(bytes: &'a [u8], shape: RowsShape) -> Result<Self> {
        match shape.extent() {
            Some(extent) if extent <= bytes.len() => Ok(Self { bytes, shape }),
            _ => Err(Error::invalid(format!("rows reach beyond their {} bytes", bytes.len()))),
        }
    }

    /// Contiguous f32 rows, for tests and for callers inside the crate.
    pub fn from_f32(data: &'a [f32], n_heads: usize, head_dim: usize) -> Self {
        let row = n_heads * head_dim;
        assert_eq!(data.len() % row, 0);
        // SAFETY: any f32 is four readable bytes; the length is that of `data`.
        let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) };
        let shape = RowsShape {
            dtype: DType::F32,
            n_tokens: data.len() / row,
            n_heads,
            head_dim,
            token_stride: 4 * row,
            head_stride: 4 * head_dim,
        };
        Self { bytes, shape }
    }

    pub fn shape(&self) -> &RowsShape {
        &self.shape
    }

    pub fn n_tokens(&self) -> usize {
        self.shape.n_tokens
    }

    /// One row as f32; `out` has head_dim elements.
    pub fn load(&self, token: usize, head: usize, out: &mut [f32]) {
        let at = self.shape.offset(token, head);
        let bytes = &self.bytes[at..at + self.shape.head_dim * self.shape.dtype.size()];
        assert_eq!(out.len(), self.shape.head_dim);
        match self.shape.dtype {
            DType::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            DType::F16 => load_f16(bytes, out),
            DType::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = bf16::from_le_bytes(*b).to_f32();
                }
            }
        }
    }
}

/// Widens f16 elements, in bulk where they are aligned (which `capi` demands of C callers).
fn load_f16(bytes: &[u8], out: &mut [f32]) {
    // SAFETY: every bit pattern is an f16; align_to yields only aligned ones.
    let (head, halves, tail) = unsafe { bytes.align_to::<f16>() };
    if head.is_empty() && tail.is_empty() {
        halves.convert_to_f32_slice(out);
    } else {
        for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *o = f16::from_le_bytes(*b).to_f32();
        }
    }
}

/// Rows to write, from any number of shards at once.
#[derive(Debug, Clone, Copy)]
pub struct RowsMut<'a> {
    data: *mut u8,
    shape: RowsShape,
    _memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: `store` is the only access, and its contract keeps writers of one row apart.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    pub fn new(bytes: &'a mut [u8], shape: RowsShape) -> Result<Self> {
        match shape.extent() {
            // SAFETY: the slice is exclusive for 'a and holds the extent.
            Some(extent) if extent <= bytes.len() => Ok(unsafe { Self::from_raw(bytes.as_mut_ptr(), shape) }),
            _ => Err(Error::invalid(format!("rows reach beyond their {} bytes", bytes.len()))),
        }
    }

    /// # Safety
    /// `data` is valid for writes of `shape.extent()` bytes during `'a`, and nobody else reads or writes these bytes
    /// but other shards of the same call.
    pub unsafe fn from_raw(data: *mut u8, shape: RowsShape) -> Self {
        Self { data, shape, _memory: PhantomData }
    }

    pub fn shape(&self) -> &RowsShape {
        &self.shape
    }

    /// Writes one row, rounded to the element type.
    ///
    /// # Safety
    /// No other thread writes this row during the call.
    pub unsafe fn store(&self, token: usize, head: usize, row: &[f32]) {
        let at = self.shape.offset(token, head);
        assert_eq!(row.len(), self.shape.head_dim);
        // SAFETY: `offset` checked token and head, so the row lies within the extent that `from_raw` promised; the
        // caller keeps other writers away.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(self.data.add(at), row.len() * self.shape.dtype.size())
        };
        match self.shape.dtype {
            DType::F32 => {
                for (b, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(row) {
                    *b = x.to_le_bytes();
                }
            }
            DType::F16 => {
                for (b, x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(row) {
                    *b = f16::from_f32(*x).to_le_bytes();
                }
            }
            DType::Bf16 => {
                for (b, x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(row) {
                    *b = bf16::from_f32(*x).to_le_bytes();
                }
            }
        }
    }
}

/// The caller's records.
#[derive(Debug, Clone, Copy)]
pub struct Store<'a> {
    data: *mut u8,
    n_slots: usize,
    stride: usize,
    slot_bytes: usize,
    _memory: PhantomData<&'a [u8]>,
}

// SAFETY: `slot`, `slot_mut` and `part_mut` are the only accesses, and their contracts keep writers of a byte apart.
unsafe impl Send for Store<'_> {}
// SAFETY: as above.
unsafe impl Sync for Store<'_> {}

impl<'a> Store<'a> {
    /// # Safety
    /// `data` is valid for reads and writes of `n_slots * stride` bytes during `'a`; `stride >= slot_bytes`.
    pub unsafe fn from_raw(data: *mut u8, n_slots: usize, stride: usize, slot_bytes: usize) -> Self {
        debug_assert!(stride >= slot_bytes);
        Self { data, n_slots, stride, slot_bytes, _memory: PhantomData }
    }

    /// Records next to each other, for tests and for callers inside the crate.
    pub fn new(bytes: &'a mut [u8], slot_bytes: usize) -> Self {
        let n_slots = bytes.len() / slot_bytes;
        // SAFETY: the slice is exclusive for 'a and holds n_slots records.
        unsafe { Self::from_raw(bytes.as_mut_ptr(), n_slots, slot_bytes, slot_bytes) }
    }

    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Start of the first record and bytes between records, for kernels that address slots themselves.
    pub fn raw(&self) -> (*const u8, usize) {
        (self.data, self.stride)
    }

    /// # Safety
    /// No thread writes this slot while the slice lives.
    pub unsafe fn slot(&self, slot: usize) -> &'a [u8] {
        assert!(slot < self.n_slots);
        // SAFETY: the slot lies within what `from_raw` promised; the caller keeps writers away.
        unsafe { std::slice::from_raw_parts(self.data.add(slot * self.stride), self.slot_bytes) }
    }

    /// Bytes of one slot's record.
    ///
    /// # Safety
    /// No other thread reads or writes these bytes while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part_mut(&self, slot: usize, part: Range<usize>) -> &'a mut [u8] {
        assert!(slot < self.n_slots && part.start <= part.end && part.end <= self.slot_bytes);
        // SAFETY: the slot lies within what `from_raw` promised, the part within the slot; the caller keeps others away.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(slot * self.stride + part.start), part.len()) }
    }

    /// # Safety
    /// No other thread reads or writes this slot while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slot_mut(&self, slot: usize) -> &'a mut [u8] {
        // SAFETY: the caller's promise, for the whole record.
        unsafe { self.part_mut(slot, 0..self.slot_bytes) }
    }
}

/// Element type of a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskType {
    F32,
    F16,
}

/// An additive mask `[n_streams][n_q][n_kv + rows of the tail]`.
#[derive(Debug, Clone, Copy)]
pub struct Mask<'a> {
    pub bytes: &'a [u8],
    pub dtype: MaskType,
    pub query_stride: usize,
    pub stream_stride: usize,
}

impl Mask<'_> {
    /// Mask values of keys `[first, first + out.len())` for one query.
    pub fn load(&self, stream: usize, query: usize, first: usize, out: &mut [f32]) {
        let at = stream * self.stream_stride + query * self.query_stride;
        match self.dtype {
            MaskType::F32 => {
                let bytes = &self.bytes[at + 4 * first..at + 4 * (first + out.len())];
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            MaskType::F16 => {
                load_f16(&self.bytes[at + 2 * first..at + 2 * (first + out.len())], out);
            }
        }
    }

    /// Whether all values of some queries and keys are 0, positive zero.
    #[inline(always)]
    pub fn is_zero(&self, stream: usize, queries: Range<usize>, keys: Range<usize>) -> bool {
        let size = if self.dtype == MaskType::F32 { 4 } else { 2 };
        queries.into_iter().all(|query| {
            let at = stream * self.stream_stride + query * self.query_stride;
            self.bytes[at + size * keys.start..at + size * keys.end].iter().fold(0, |any, byte| any | byte) == 0
        })
    }
}

/// New tokens of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    pub n_tokens: usize,
    pub q: Option<Rows<'a>>,
    /// Keys and values; `None` for a layer that shares another's cache and brings only queries.
    pub kv: Option<(Rows<'a>, Rows<'a>)>,
    /// Position of each token; `None`: none is at position 0.
    pub positions: Option<&'a [i32]>,
}

/// Attention over coded slots; see `dq_attend_args`.
#[derive(Debug, Clone, Copy)]
pub struct AttendArgs<'a> {
    pub n_streams: usize,
    pub n_q: usize,
    pub n_kv: usize,
    pub first_slot: usize,
    pub stream_slots: usize,
    pub store: Store<'a>,
    pub q: Rows<'a>,
    pub out: RowsMut<'a>,
    pub mask: Option<Mask<'a>>,
    pub sink_logits: Option<&'a [f32]>,
    pub scale: f32,
    /// 0: none.
    pub softcap: f32,
    /// Uneven sequences; without a mask. `n_streams`, `n_q` and `n_kv` are then their number and upper bounds.
    pub sequences: Option<Sequences<'a>>,
    pub tail: Option<Tail<'a>>,
}

/// Rows that are not coded, behind the coded keys of each sequence.
#[derive(Debug, Clone, Copy)]
pub struct Tail<'a> {
    pub k: Rows<'a>,
    pub v: Rows<'a>,
    /// Rows of each sequence; with `lengths`: the most of any.
    pub n_rows: usize,
    /// First row of each sequence; `None`: `n_rows` apart.
    pub starts: Option<&'a [i32]>,
    pub lengths: Option<&'a [i32]>,
}
