//! The caller's records and the slots that a call names.

use super::memory::{Region, elements};
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::shape::{LayerShape, SLOT_ALIGN};
use crate::view::Store;

/// Stride and place of a store, wherever its memory is.
pub fn check_store(name: &'static str, store: &dq_store, shape: &LayerShape) -> Result<(u64, Region)> {
    let stride = if store.slot_stride == 0 { shape.slot_bytes as u64 } else { store.slot_stride };
    if stride < shape.slot_bytes as u64 || stride % SLOT_ALIGN as u64 != 0 {
        return Err(Error::invalid(format!(
            "{name}.slot_stride is {stride}; it must be a multiple of {SLOT_ALIGN} and at least slot_bytes, {}",
            shape.slot_bytes
        )));
    }
    if store.n_slots == 0 {
        return Err(Error::invalid(format!("{name}.n_slots is 0; it must be at least 1")));
    }
    // The last record ends with its bytes, not with its stride: stores of several layers may be woven.
    let extent = (store.n_slots - 1).checked_mul(stride).and_then(|b| b.checked_add(shape.slot_bytes as u64));
    let extent = extent.and_then(|b| usize::try_from(b).ok()).unwrap_or(usize::MAX);
    Ok((stride, Region::new(name, store.data, extent, SLOT_ALIGN)?))
}

/// # Safety
/// `store.data`, when it is not null, is valid for reads and writes of `n_slots * slot_stride` bytes during `'a`.
pub unsafe fn store<'a>(name: &'static str, store: &dq_store, shape: &LayerShape) -> Result<(Store<'a>, Region)> {
    let (stride, region) = check_store(name, store, shape)?;
    // SAFETY: not null, aligned, within the address space; the caller vouches for the memory.
    let view = unsafe { Store::from_raw(store.data.cast(), store.n_slots as usize, stride as usize, shape.slot_bytes) };
    Ok((view, region))
}

/// Slot numbers to write, each -1 or below `n_slots`, none twice.
///
/// # Safety
/// `pointer`, when it is not null, is valid for reads of `count` numbers during `'a`.
pub unsafe fn slots<'a>(
    name: &'static str,
    pointer: *const i64,
    count: usize,
    n_slots: usize,
) -> Result<(&'a [i64], Region)> {
    // SAFETY: the caller's word.
    let (slots, region) = unsafe { slots_in_range(name, pointer, count, n_slots) }?;
    match twice(slots) {
        None => Ok((slots, region)),
        Some((i, j)) => Err(Error::invalid(format!(
            "{name}[{i}] and {name}[{j}] are both {}; a call names a slot once",
            slots[i]
        ))),
    }
}

/// Slot numbers to read, each -1 or below `n_slots`.
///
/// # Safety
/// As for [`slots`].
pub unsafe fn slots_in_range<'a>(
    name: &'static str,
    pointer: *const i64,
    count: usize,
    n_slots: usize,
) -> Result<(&'a [i64], Region)> {
    let region = Region::elements(name, pointer, count)?;
    // SAFETY: the caller's word.
    let slots = unsafe { elements(name, pointer, count) }?;
    if let Some(i) = slots.iter().position(|&s| s < -1 || s >= n_slots as i64) {
        return Err(Error::invalid(format!(
            "{name}[{i}] is {}; it must be -1 or below the store's n_slots, {n_slots}",
            slots[i]
        )));
    }
    Ok((slots, region))
}

/// Two places that name the same slot. No allocation: append is among the callers.
fn twice(slots: &[i64]) -> Option<(usize, usize)> {
    if slots.is_sorted_by(|a, b| a < b) {
        return None;
    }
    // One bit per slot modulo the size: runs of slots never collide, others are settled by looking.
    const BITS: usize = 1 << 15;
    let mut seen = [0u64; BITS / 64];
    for (j, &slot) in slots.iter().enumerate().filter(|(_, s)| **s >= 0) {
        let bit = slot as usize % BITS;
        if seen[bit / 64] >> (bit % 64) & 1 == 1
            && let Some(i) = slots[..j].iter().position(|&s| s == slot)
        {
            return Some((i, j));
        }
        seen[bit / 64] |= 1 << (bit % 64);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(list: &[i64], n_slots: usize) -> Result<()> {
        // SAFETY: a slice.
        unsafe { slots("slots", list.as_ptr(), list.len(), n_slots) }.map(|_| ())
    }

    #[test]
    fn range_is_minus_one_to_the_last() {
        assert!(check(&[-1, 0, 9, -1], 10).is_ok());
        assert!(check(&[0, 10], 10).is_err_and(|e| e.message.contains("slots[1] is 10") && e.message.contains("n_slots, 10")));
        assert!(check(&[-2], 10).is_err_and(|e| e.message.contains("slots[0] is -2")));
        assert!(check(&[i64::MIN, i64::MAX], 10).is_err());
    }

    #[test]
    fn a_slot_named_twice_is_found() {
        let e = check(&[3, 70_000, 5, 3], 100_000).unwrap_err();
        assert_eq!(e.message, "slots[0] and slots[3] are both 3; a call names a slot once");
        // The same bit, not the same slot.
        assert!(check(&[40_000, 40_000 - 32_768, 1], 100_000).is_ok());
    }
}
