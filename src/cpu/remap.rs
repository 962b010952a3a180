//! Set ids in the headers of records that came from another codec.

use crate::code::header;
use crate::error::{Error, Result};
use crate::shape::{LayerShape, MAX_SETS, Side};
use crate::view::Store;

/// What a map says of an id that was not in the export.
pub const UNMAPPED: u8 = 255;

/// Bytes of a layer's map, `[side][head][old id]`.
pub fn map_bytes(shape: &LayerShape) -> usize {
    2 * shape.n_kv_heads * MAX_SETS
}

/// Rewrites the set ids of `slots` (-1: none) through `map`. All rows are checked before the first is written.
///
/// # Safety
/// No other thread reads or writes these slots during the call.
pub unsafe fn remap_rows(shape: &LayerShape, store: &Store, slots: &[i64], map: &[u8]) -> Result<()> {
    assert_eq!(map.len(), map_bytes(shape));
    for_each_header(shape, slots, |slot, side, head, at| {
        // SAFETY: the caller keeps others away.
        let record = unsafe { store.slot(slot) };
        let old = header::set(read(record, at));
        match map[index(shape, side, head, old)] {
            new if usize::from(new) < MAX_SETS => Ok(()),
            UNMAPPED => Err(Error::invalid(format!(
                "slot {slot}, {side:?} head {head} was coded with set {old}, which map does not hold"
            ))),
            new => Err(Error::invalid(format!(
                "map gives {new} for set {old} of {side:?} head {head}; it must be below {MAX_SETS}, or {UNMAPPED}"
            ))),
        }
    })?;
    for_each_header(shape, slots, |slot, side, head, at| {
        // SAFETY: the caller keeps others away, and `record` of the first pass is gone.
        let record = unsafe { store.slot_mut(slot) };
        let old = read(record, at);
        let new = map[index(shape, side, head, header::set(old))];
        record[at..at + 2].copy_from_slice(&header::with_set(old, new).to_le_bytes());
        Ok(())
    })
}

fn index(shape: &LayerShape, side: Side, head: usize, set: u8) -> usize {
    (side as usize * shape.n_kv_heads + head) * MAX_SETS + usize::from(set)
}

fn read(record: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([record[at], record[at + 1]])
}

fn for_each_header(
    shape: &LayerShape,
    slots: &[i64],
    mut each: impl FnMut(usize, Side, usize, usize) -> Result<()>,
) -> Result<()> {
    for slot in slots.iter().filter_map(|&s| usize::try_from(s).ok()) {
        for side in [Side::K, Side::V] {
            for head in 0..shape.n_kv_heads {
                each(slot, side, head, shape.side(side).headers_offset + 2 * head)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{Gauge, SideDesc};

    fn shape() -> LayerShape {
        let side = SideDesc { head_dim: 64, plan: 4, gauge: Gauge::Rotation };
        LayerShape::new(2, 2, side, side).unwrap()
    }

    /// Two records whose set ids are 0, 1, 2, ... in the order of headers.
    fn records(shape: &LayerShape) -> Vec<u8> {
        let mut bytes = vec![0x5A; 2 * shape.slot_bytes];
        for (i, at) in headers(shape).into_iter().enumerate() {
            let (header, _) = header::pack(1.0, i as u8);
            bytes[at..at + 2].copy_from_slice(&header.to_le_bytes());
        }
        bytes
    }

    fn headers(shape: &LayerShape) -> Vec<usize> {
        let mut all = Vec::new();
        for_each_header(shape, &[0, 1], |slot, _, _, at| {
            all.push(slot * shape.slot_bytes + at);
            Ok(())
        })
        .unwrap();
        all
    }

    fn remap(shape: &LayerShape, bytes: &mut [u8], slots: &[i64], map: &[u8]) -> Result<()> {
        let store = Store::new(bytes, shape.slot_bytes);
        // SAFETY: one thread.
        unsafe { remap_rows(shape, &store, slots, map) }
    }

    #[test]
    fn only_set_ids_of_the_named_slots_change() {
        let shape = shape();
        let mut bytes = records(&shape);
        let before = bytes.clone();
        let map: Vec<u8> = (0..map_bytes(&shape)).map(|i| 15 - (i % MAX_SETS) as u8).collect();
        remap(&shape, &mut bytes, &[-1, 1], &map).unwrap();
        for (i, at) in headers(&shape).into_iter().enumerate() {
            let set = header::set(read(&bytes, at));
            assert_eq!(set, if i < 4 { i as u8 } else { 15 - i as u8 });
            assert_eq!(header::scale(read(&bytes, at)), 1.0);
        }
        remap(&shape, &mut bytes, &[1], &map).unwrap();
        assert_eq!(bytes, before);
    }

    #[test]
    fn a_row_without_a_mapping_changes_nothing() {
        let shape = shape();
        let mut bytes = records(&shape);
        let before = bytes.clone();
        let mut map: Vec<u8> = (0..map_bytes(&shape)).map(|i| (i % MAX_SETS) as u8 ^ 1).collect();
        map[index(&shape, Side::V, 1, 7)] = UNMAPPED;
        let error = remap(&shape, &mut bytes, &[0, 1], &map).unwrap_err();
        assert!(error.message.contains("slot 1, V head 1 was coded with set 7"), "{error}");
        map[index(&shape, Side::V, 1, 7)] = 16;
        assert!(remap(&shape, &mut bytes, &[0, 1], &map).unwrap_err().message.contains("gives 16"));
        assert_eq!(bytes, before);
    }
}
