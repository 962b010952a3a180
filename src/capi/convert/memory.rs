//! Pointers, extents and the rule that what a call writes lies apart from everything else it touches.

use crate::error::{Error, ErrorKind, Result};
use crate::workspace::{ALIGN, Workspace};

/// A stretch of the caller's memory, for messages and for the test of overlap.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    pub name: &'static str,
    pub start: usize,
    pub len: usize,
}

impl Region {
    /// `len` bytes at `pointer`, which must not be null and must be a multiple of `align`.
    pub fn new<T>(name: &'static str, pointer: *const T, len: usize, align: usize) -> Result<Self> {
        let start = pointer.addr();
        if start == 0 {
            return Err(Error::invalid(format!("{name} is null")));
        }
        if start % align != 0 {
            return Err(Error::invalid(format!("{name} is {start:#x}; it must be aligned to {align} bytes")));
        }
        // Slices cannot be longer than isize::MAX, and no object in memory is.
        if len > isize::MAX as usize || start.checked_add(len).is_none() {
            return Err(Error::invalid(format!("{name} would reach over {len} bytes, beyond the address space")));
        }
        Ok(Self { name, start, len })
    }

    /// `count` elements of `T`.
    pub fn elements<T>(name: &'static str, pointer: *const T, count: usize) -> Result<Self> {
        let len = count.checked_mul(size_of::<T>());
        Self::new(name, pointer, len.unwrap_or(usize::MAX), align_of::<T>())
    }

    fn overlaps(&self, other: &Self) -> bool {
        // Empty stretches touch nothing.
        self.len != 0
            && other.len != 0
            && self.start < other.start + other.len
            && other.start < self.start + self.len
    }
}

/// Every stretch in `writes` lies apart from all others; those in `reads` may share memory with each other.
pub fn check_apart(writes: &[Region], reads: &[Region]) -> Result<()> {
    for (i, w) in writes.iter().enumerate() {
        if let Some(other) = writes[i + 1..].iter().chain(reads).find(|r| w.overlaps(r)) {
            return Err(overlap(w, other));
        }
    }
    Ok(())
}

pub(super) fn overlap(a: &Region, b: &Region) -> Error {
    Error::invalid(format!(
        "{} ({} bytes at {:#x}) overlaps {} ({} bytes at {:#x})",
        a.name, a.len, a.start, b.name, b.len, b.start
    ))
}

/// # Safety
/// `pointer`, when it is not null, is valid for reads of `count` elements during `'a`.
pub unsafe fn elements<'a, T>(name: &'static str, pointer: *const T, count: usize) -> Result<&'a [T]> {
    Region::elements(name, pointer, count)?;
    // SAFETY: not null, aligned and within the address space; the caller vouches for the memory.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// # Safety
/// `pointer`, when it is not null, is valid for reads of `len` bytes during `'a`.
pub unsafe fn bytes<'a>(name: &'static str, pointer: *const u8, len: u64, at_least: usize) -> Result<&'a [u8]> {
    check_len(name, len, at_least)?;
    // SAFETY: the caller's word; no more than the `len` bytes that it vouches for are read.
    unsafe { elements(name, pointer, at_least) }
}

/// # Safety
/// `pointer`, when it is not null, is valid for reads and writes of `len` bytes during `'a`, and nobody else uses them.
pub unsafe fn bytes_mut<'a>(name: &'static str, pointer: *mut u8, len: u64, at_least: usize) -> Result<&'a mut [u8]> {
    check_len(name, len, at_least)?;
    Region::elements(name, pointer, at_least)?;
    // SAFETY: not null and within the `len` bytes that the caller vouches for.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, at_least) })
}

fn check_len(name: &'static str, len: u64, at_least: usize) -> Result<()> {
    if len < at_least as u64 {
        return Err(Error::invalid(format!("{name}_bytes is {len}; it must be at least {at_least}")));
    }
    Ok(())
}

/// A pointer that a call stores its result through.
pub fn check_out<T>(name: &'static str, pointer: *mut T) -> Result<()> {
    Region::elements(name, pointer, 1).map(|_| ())
}

/// Scratch memory: at least `required` bytes. A pointer is not looked at when no byte is required.
///
/// # Safety
/// `pointer`, when it is not null, is valid for reads and writes of `len` bytes during `'a`, and nobody touches them
/// but the shards of this call.
pub unsafe fn workspace<'a>(pointer: *mut u8, len: u64, required: usize) -> Result<(Workspace<'a>, Region)> {
    const NAME: &str = "workspace";
    if len < required as u64 {
        return Err(Error::new(
            ErrorKind::Workspace,
            format!("workspace_bytes is {len}; this call needs {required}, see dq_workspace_size"),
        ));
    }
    let region = match required {
        0 => Region { name: NAME, start: 0, len: 0 },
        _ => Region::new(NAME, pointer, required, ALIGN)?,
    };
    // SAFETY: not null, aligned, and within what the caller vouches for.
    Ok((unsafe { Workspace::from_raw(pointer, required) }, region))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: usize, len: usize) -> Region {
        Region { name: "r", start, len }
    }

    #[test]
    fn neighbours_are_apart_and_a_shared_byte_is_not() {
        assert!(check_apart(&[region(16, 16)], &[region(0, 16), region(32, 8), region(20, 0)]).is_ok());
        assert!(check_apart(&[region(16, 16)], &[region(31, 1)]).is_err());
        assert!(check_apart(&[region(16, 16), region(8, 9)], &[]).is_err());
        assert!(check_apart(&[], &[region(16, 16), region(8, 9)]).is_ok());
    }

    #[test]
    fn null_misaligned_and_endless_are_refused() {
        let error = |p: usize, len, align| Region::new("x", p as *const u8, len, align).unwrap_err().message;
        assert_eq!(error(0, 1, 1), "x is null");
        assert!(error(18, 1, 4).contains("0x12"));
        assert!(error(16, usize::MAX, 1).contains("address space"));
        assert!(Region::elements("x", 8 as *const u64, usize::MAX / 4).is_err());
    }
}
