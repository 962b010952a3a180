//! Tensors of the caller.

use std::marker::PhantomData;

use super::memory::{Region, overlap};
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::view::{DType, Mask, MaskType, Rows, RowsMut, RowsShape};

/// Names of a tensor and its fields, for messages.
#[derive(Clone, Copy)]
pub struct Name {
    pub data: &'static str,
    pub of: &'static str,
}

macro_rules! name {
    ($of:literal) => {
        crate::capi::convert::rows::Name { data: concat!($of, ".data"), of: $of }
    };
}
pub(super) use name;

/// `[n_tokens][n_heads][head_dim]`
#[derive(Clone, Copy)]
pub struct Dims {
    pub n_tokens: usize,
    pub n_heads: usize,
    pub head_dim: usize,
}

/// # Safety
/// `tensor.data`, when it is not null, is valid for reads of what `dims` and the strides span during `'a`.
pub unsafe fn input_rows<'a>(name: Name, tensor: &dq_tensor, dims: Dims) -> Result<(Rows<'a>, Region)> {
    let (shape, region) = check(name, tensor, dims)?;
    // SAFETY: `check` found it not null and within the address space; the caller vouches for the memory.
    let bytes = unsafe { std::slice::from_raw_parts(tensor.data.cast::<u8>().cast_const(), region.len) };
    Ok((Rows::new(bytes, shape)?, region))
}

/// Rows to write and where they lie.
pub struct Output<'a> {
    pub rows: RowsMut<'a>,
    pub region: Region,
    shape: RowsShape,
    memory: PhantomData<&'a mut [u8]>,
}

/// # Safety
/// `tensor.data`, when it is not null, is valid for writes of what `dims` and the strides span during `'a`.
pub unsafe fn output_rows<'a>(name: Name, tensor: &dq_tensor, dims: Dims) -> Result<Output<'a>> {
    let (shape, region) = check(name, tensor, dims)?;
    check_rows_apart(name, &shape)?;
    // SAFETY: `check` found it not null and within the address space; the caller vouches for the memory.
    let rows = unsafe { RowsMut::from_raw(tensor.data.cast(), shape) };
    Ok(Output { rows, region, shape, memory: PhantomData })
}

impl Output<'_> {
    /// Two outputs may be woven into one buffer, as `[token][k heads | v heads]` or `[token][head][k | v]`: no row of
    /// one may meet a row of the other.
    pub fn check_apart(&self, other: &Self) -> Result<()> {
        let (a, b) = (self.region, other.region);
        let apart = a.len == 0 || b.len == 0 || a.start + a.len <= b.start || b.start + b.len <= a.start;
        if apart || self.woven(other) {
            return Ok(());
        }
        Err(overlap(&a, &b))
    }

    /// With the same strides, rows meet by the distance of their tokens and heads alone.
    fn woven(&self, other: &Self) -> bool {
        let (a, b) = (&self.shape, &other.shape);
        if (a.n_tokens, a.n_heads, a.token_stride, a.head_stride)
            != (b.n_tokens, b.n_heads, b.token_stride, b.head_stride)
        {
            return false;
        }
        let start = other.region.start as i128 - self.region.start as i128;
        let (row_a, row_b) = (row_bytes(a) as i128, row_bytes(b) as i128);
        let (heads, head_stride) = (a.n_heads as i128 - 1, a.head_stride.max(1) as i128);
        let tokens = a.n_tokens as i128 - 1;
        (-tokens..=tokens).all(|token| {
            let distance = start + token * a.token_stride as i128;
            // Heads whose rows would meet at this distance: -row_b < distance + head * head_stride < row_a.
            let first = (-row_b - distance).div_euclid(head_stride) + 1;
            let end = (row_a - 1 - distance).div_euclid(head_stride);
            first.max(-heads) > end.min(heads)
        })
    }
}

fn token_bytes(shape: &RowsShape) -> usize {
    (shape.n_heads - 1) * shape.head_stride + row_bytes(shape)
}

fn row_bytes(shape: &RowsShape) -> usize {
    shape.head_dim * shape.dtype.size()
}

/// Shape and place of a tensor, wherever its memory is.
pub fn check(name: Name, tensor: &dq_tensor, dims: Dims) -> Result<(RowsShape, Region)> {
    let of = name.of;
    let dtype = dtype(of, tensor.dtype)?;
    if tensor.reserved != 0 {
        return Err(Error::invalid(format!("{of}.reserved is {}; it must be 0", tensor.reserved)));
    }
    let row = dims.head_dim * dtype.size();
    let stride = |field: &str, bytes: u64, count: usize| -> Result<usize> {
        // A stride over a single step is never taken.
        if count <= 1 {
            return Ok(0);
        }
        if bytes % dtype.size() as u64 != 0 || bytes < row as u64 {
            return Err(Error::invalid(format!(
                "{of}.{field} is {bytes}; it must be a multiple of {} and at least the {row} bytes of a row",
                dtype.size()
            )));
        }
        Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
    };
    let shape = RowsShape {
        dtype,
        n_tokens: dims.n_tokens,
        n_heads: dims.n_heads,
        head_dim: dims.head_dim,
        token_stride: stride("token_stride", tensor.token_stride, dims.n_tokens)?,
        head_stride: stride("head_stride", tensor.head_stride, dims.n_heads)?,
    };
    let extent = shape.extent().unwrap_or(usize::MAX);
    let region = Region::new(name.data, tensor.data, extent, dtype.size())?;
    Ok((shape, region))
}

/// A tensor is `[token][head]` or `[head][token]` in memory; its rows do not meet.
pub fn check_rows_apart(name: Name, shape: &RowsShape) -> Result<()> {
    let row = row_bytes(shape);
    let tokens = (shape.n_tokens - 1) * shape.token_stride + row;
    let token_major = shape.n_tokens <= 1 || shape.token_stride >= token_bytes(shape);
    let head_major = shape.n_heads <= 1 || shape.head_stride >= tokens;
    if token_major || head_major {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{}.token_stride is {} and head_stride {}: rows of {} heads and {} tokens would overlap",
        name.of, shape.token_stride, shape.head_stride, shape.n_heads, shape.n_tokens
    )))
}

fn dtype(of: &str, value: u32) -> Result<DType> {
    match value {
        DQ_F32 => Ok(DType::F32),
        DQ_F16 => Ok(DType::F16),
        DQ_BF16 => Ok(DType::Bf16),
        _ => Err(Error::invalid(format!(
            "{of}.dtype is {value}; it must be DQ_F32 ({DQ_F32}), DQ_F16 ({DQ_F16}) or DQ_BF16 ({DQ_BF16})"
        ))),
    }
}

/// Type, strides and place of a mask, wherever its memory is; `None` when there is none.
pub struct MaskShape {
    pub dtype: MaskType,
    pub query_stride: usize,
    pub stream_stride: usize,
    pub region: Region,
}

pub fn check_mask(mask: &dq_mask, n_streams: usize, n_q: usize, n_kv: usize) -> Result<Option<MaskShape>> {
    if mask.data.is_null() {
        return Ok(None);
    }
    let (dtype, size) = match mask.dtype {
        DQ_F32 => (MaskType::F32, 4),
        DQ_F16 => (MaskType::F16, 2),
        other => {
            return Err(Error::invalid(format!(
                "args->mask.dtype is {other}; it must be DQ_F32 ({DQ_F32}) or DQ_F16 ({DQ_F16})"
            )));
        }
    };
    if mask.reserved != 0 {
        return Err(Error::invalid(format!("args->mask.reserved is {}; it must be 0", mask.reserved)));
    }
    let row = n_kv * size;
    let query_stride = mask_stride("query_stride", mask.query_stride, n_q, size, row)?;
    let stream_stride = mask_stride("stream_stride", mask.stream_stride, n_streams, size, row)?;
    let extent = span(&[(n_streams, stream_stride), (n_q, query_stride), (n_kv, size)]);
    let region = Region::new("args->mask.data", mask.data, extent, size)?;
    Ok(Some(MaskShape { dtype, query_stride, stream_stride, region }))
}

/// # Safety
/// `mask.data`, when it is not null, is valid for reads of what the counts and the strides span during `'a`.
pub unsafe fn mask<'a>(
    mask: &dq_mask,
    n_streams: usize,
    n_q: usize,
    n_kv: usize,
) -> Result<Option<(Mask<'a>, Region)>> {
    let Some(MaskShape { dtype, query_stride, stream_stride, region }) = check_mask(mask, n_streams, n_q, n_kv)? else {
        return Ok(None);
    };
    // SAFETY: not null and within the address space; the caller vouches for the memory.
    let bytes = unsafe { std::slice::from_raw_parts(mask.data.cast::<u8>(), region.len) };
    Ok(Some((Mask { bytes, dtype, query_stride, stream_stride }, region)))
}

/// A stride of 0 gives all queries or all streams one row: masks are only read.
fn mask_stride(field: &str, bytes: u64, count: usize, size: usize, row: usize) -> Result<usize> {
    if count <= 1 || bytes == 0 {
        return Ok(0);
    }
    if bytes % size as u64 != 0 || bytes < row as u64 {
        return Err(Error::invalid(format!(
            "args->mask.{field} is {bytes}; it must be 0, or a multiple of {size} and at least the {row} bytes of a row"
        )));
    }
    Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
}

/// Bytes from the first element to the end of the last: the innermost step is an element.
fn span(steps: &[(usize, usize)]) -> usize {
    let (&(last_count, last_step), outer) = steps.split_last().expect("at least one step");
    if steps.iter().any(|&(count, _)| count == 0) {
        return 0;
    }
    outer
        .iter()
        .try_fold(last_count.checked_mul(last_step), |sum, &(count, step)| {
            Some(sum.and_then(|s| (count - 1).checked_mul(step)?.checked_add(s)))
        })
        .flatten()
        .unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIMS: Dims = Dims { n_tokens: 3, n_heads: 2, head_dim: 64 };

    fn tensor(data: usize, token_stride: u64, head_stride: u64) -> dq_tensor {
        dq_tensor { data: data as *mut _, dtype: DQ_F16, reserved: 0, token_stride, head_stride }
    }

    fn output<'a>(t: dq_tensor) -> Result<Output<'a>> {
        // SAFETY: never dereferenced here.
        unsafe { output_rows(name!("t"), &t, DIMS) }
    }

    #[test]
    fn extent_ends_with_the_last_row() {
        let (_, region) = check(name!("t"), &tensor(16, 1000, 200), DIMS).unwrap();
        assert_eq!(region.len, 2 * 1000 + 200 + 128);
        assert!(check(name!("t"), &tensor(16, u64::MAX - 1, 200), DIMS).is_err());
    }

    #[test]
    fn output_rows_lie_token_by_token_or_head_by_head() {
        assert!(output(tensor(16, 256, 128)).is_ok());
        assert!(output(tensor(16, 128, 384)).is_ok());
        assert!(output(tensor(16, 200, 128)).is_err_and(|e| e.message.contains("token_stride is 200")));
    }

    #[test]
    fn outputs_may_be_woven() {
        let k = output(tensor(1024, 512, 128)).unwrap();
        for (start, fine) in [(1280, true), (1278, false), (768, true), (770, false), (1024, false), (8192, true)] {
            let v = output(tensor(start, 512, 128)).unwrap();
            assert_eq!(k.check_apart(&v).is_ok(), fine, "{start}");
            assert_eq!(v.check_apart(&k).is_ok(), fine, "{start}");
        }
        let k = output(tensor(1024, 1024, 256)).unwrap();
        for (start, fine) in [(1152, true), (1150, false), (896, true), (898, false), (1408, true), (1280, false)] {
            let v = output(tensor(start, 1024, 256)).unwrap();
            assert_eq!(k.check_apart(&v).is_ok(), fine, "{start}");
            assert_eq!(v.check_apart(&k).is_ok(), fine, "{start}");
        }
        assert!(k.check_apart(&output(tensor(1152, 1024, 258)).unwrap()).is_err());
    }

    #[test]
    fn span_counts_steps_between_and_elements_within() {
        assert_eq!(span(&[(2, 100), (3, 10), (4, 2)]), 100 + 20 + 8);
        assert_eq!(span(&[(2, 100), (0, 10), (4, 2)]), 0);
        assert_eq!(span(&[(2, usize::MAX), (3, 10), (4, 2)]), usize::MAX);
    }
}
