//! Where the keys of a tile lie, and who sees them.

use super::MAX_TILE;
use crate::batch::{BlockTable, Visible};

/// Records of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Keys<'a> {
    /// Record of key 0 without a table, of slot 0 with one; bytes from one slot to the next.
    pub records: *const u8,
    pub stride: usize,
    /// The sequence's blocks, and slots of each.
    pub blocks: Option<(&'a [i32], usize)>,
}

impl<'a> Keys<'a> {
    pub fn paged(records: *const u8, stride: usize, table: &BlockTable<'a>, sequence: usize) -> Self {
        let row = table.blocks.get(sequence * table.stride..).unwrap_or_default();
        Self { records, stride, blocks: Some((row, table.block_slots)) }
    }

    /// Records of keys `first..first + n`. A block that nobody sees may have any number: its records are then not read.
    #[inline(always)]
    pub fn rows(&self, first: usize, n: usize, rows: &mut [*const u8; MAX_TILE]) {
        let mut key = 0;
        while key < n {
            let (slot, run) = match self.blocks {
                None => (first + key, n - key),
                Some((blocks, size)) => {
                    let at = first + key;
                    let block = blocks.get(at / size).map_or(0, |b| *b as usize);
                    (block.wrapping_mul(size).wrapping_add(at % size), (size - at % size).min(n - key))
                }
            };
            let mut row = self.records.wrapping_add(slot.wrapping_mul(self.stride));
            for out in &mut rows[key..key + run] {
                *out = row;
                row = row.wrapping_add(self.stride);
            }
            key += run;
        }
    }
}

/// What a block of queries sees of its sequence, where that follows from positions.
#[derive(Debug, Clone, Copy)]
pub struct Sight {
    pub visible: Visible,
    pub n_q: usize,
    /// Coded keys and rows of the tail.
    pub n_keys: usize,
}

impl Sight {
    /// Keys that a query sees.
    #[inline(always)]
    pub fn keys(&self, query: usize) -> std::ops::Range<usize> {
        self.visible.keys(query, self.n_q, self.n_keys)
    }

    /// Mask values `[query][tile]` of `queries` queries from `first_query` on for the `n` keys from `first` on, padded
    /// with hidden keys. Returns the keys that some query sees as bits; `None`, and nothing written, when there is no
    /// padding and every query sees all.
    ///
    /// # Safety
    /// `out` holds `queries` rows of `tile` floats, `n <= padded <= tile <= MAX_TILE`.
    #[inline(always)]
    pub unsafe fn mask(
        &self,
        first_query: usize,
        queries: usize,
        first: usize,
        n: usize,
        padded: usize,
        tile: usize,
        out: *mut f32,
    ) -> Option<u64> {
        let keys = |query: usize| {
            let keys = self.keys(first_query + query);
            keys.start.clamp(first, first + n) - first..keys.end.clamp(first, first + n) - first
        };
        if n == padded && (0..queries).all(|query| keys(query) == (0..n)) {
            return None;
        }
        let mut seen = 0;
        for query in 0..queries {
            let keys = keys(query);
            for key in 0..padded {
                let value = if keys.contains(&key) { 0.0 } else { f32::NEG_INFINITY };
                // SAFETY: the caller's word.
                unsafe { out.add(query * tile + key).write(value) };
            }
            if !keys.is_empty() {
                seen |= (u64::MAX >> (64 - keys.len())) << keys.start;
            }
        }
        Some(seen)
    }
}
