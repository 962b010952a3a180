//! Batches of sequences of uneven length: where their queries and keys lie, and which keys a query sees.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::view::AttendArgs;

/// Which keys a query sees. Keys are counted over the coded ones and the tail behind them; the last query of a sequence
/// is at its last key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    pub causal: bool,
    /// Keys that a query sees at most, its own included; only with `causal`.
    pub window: Option<usize>,
}

impl Visible {
    pub const ALL: Self = Self { causal: false, window: None };

    /// Keys that query `query` of `n_q` sees among `n_keys`.
    pub fn keys(self, query: usize, n_q: usize, n_keys: usize) -> Range<usize> {
        if !self.causal {
            return 0..n_keys;
        }
        // A sequence with more queries than keys has queries before its first key: they see nothing.
        let end = (n_keys + query + 1).saturating_sub(n_q);
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// Blocks of slots: key `j` of sequence `s` is in slot `blocks[s * stride + j / block_slots] * block_slots +
/// j % block_slots`.
#[derive(Debug, Clone, Copy)]
pub struct BlockTable<'a> {
    pub blocks: &'a [i32],
    pub stride: usize,
    pub block_slots: usize,
}

/// What a batch is made of, before anything is checked. Names in messages are those of `dq_attend_args`.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// `[n_streams + 1]`: where each sequence's queries begin, and where the last one's end; `None`: `n_q` each.
    pub q_starts: Option<&'a [i32]>,
    /// Coded keys of each sequence.
    pub kv_lengths: &'a [i32],
    /// Rows of each sequence's tail; `None`: `tail_rows` each.
    pub tail_lengths: Option<&'a [i32]>,
    pub tail_rows: usize,
    /// `None`: keys lie in a stretch of slots for each sequence.
    pub table: Option<BlockTable<'a>>,
    pub visible: Visible,
    /// Upper bounds: queries of all sequences, queries and coded keys of one, slots of the store.
    pub n_tokens: usize,
    pub n_q: usize,
    pub n_kv: usize,
    pub n_slots: usize,
}

/// A batch whose numbers are within their limits.
#[derive(Debug, Clone, Copy)]
pub struct Sequences<'a>(Batch<'a>);

fn fail<T>(message: String) -> Result<T> {
    Err(Error::invalid(message))
}

/// `values[i]` is between 0 and `limit`.
fn check_lengths(name: &str, values: &[i32], limit_name: &str, limit: usize) -> Result<()> {
    match values.iter().position(|&n| n < 0 || n as usize > limit) {
        Some(i) => fail(format!("args->{name}[{i}] is {}; it must be 0 to {limit_name}, {limit}", values[i])),
        None => Ok(()),
    }
}

impl<'a> Sequences<'a> {
    pub fn new(batch: Batch<'a>) -> Result<Self> {
        let n = batch.kv_lengths.len();
        if batch.q_starts.is_some_and(|s| s.len() != n + 1) || batch.tail_lengths.is_some_and(|t| t.len() != n) {
            return fail(format!("args->sequences: arrays of {n} sequences differ in length"));
        }
        if let Some(starts) = batch.q_starts {
            Self::check_starts(starts, &batch)?;
        }
        check_lengths("sequences.kv_lengths", batch.kv_lengths, "n_kv", batch.n_kv)?;
        if let Some(lengths) = batch.tail_lengths {
            check_lengths("tail.lengths", lengths, "tail.n_rows", batch.tail_rows)?;
        }
        let sequences = Self(batch);
        if let Some(table) = batch.table {
            sequences.check_table(&table)?;
        }
        Ok(sequences)
    }

    fn check_starts(starts: &[i32], batch: &Batch) -> Result<()> {
        let n = starts.len() - 1;
        if starts[0] != 0 {
            return fail(format!("args->sequences.q_starts[0] is {}; it must be 0", starts[0]));
        }
        for (i, pair) in starts.windows(2).enumerate() {
            let queries = i64::from(pair[1]) - i64::from(pair[0]);
            if queries < 0 || queries > batch.n_q as i64 {
                return fail(format!(
                    "args->sequences.q_starts[{}] is {} after {}; it must not fall, nor rise by more than n_q, {}",
                    i + 1,
                    pair[1],
                    pair[0],
                    batch.n_q
                ));
            }
        }
        if starts[n] as usize > batch.n_tokens {
            return fail(format!(
                "args->sequences.q_starts[{n}] is {}; it must be at most n_tokens, {}",
                starts[n], batch.n_tokens
            ));
        }
        Ok(())
    }

    /// Blocks that some query sees lie in the store. Others are never looked at: an engine may have taken them back.
    fn check_table(&self, table: &BlockTable<'a>) -> Result<()> {
        if table.block_slots == 0 {
            return fail("args->sequences.block_slots is 0; it must be at least 1".into());
        }
        let whole = self.0.n_slots / table.block_slots;
        for s in 0..self.len() {
            let used = (self.0.kv_lengths[s] as usize).div_ceil(table.block_slots);
            let keys = self.visible_keys(s);
            let row = s.saturating_mul(table.stride);
            if table.stride != 0 && table.stride < used || row.saturating_add(used) > table.blocks.len() {
                return fail(format!(
                    "args->sequences.table_stride is {} entries; sequence {s} has {used} blocks: it must be 0 or at least that",
                    table.stride
                ));
            }
            if keys.is_empty() {
                continue;
            }
            let first = keys.start / table.block_slots;
            let blocks = &table.blocks[row + first..row + keys.end.div_ceil(table.block_slots)];
            if let Some(i) = blocks.iter().position(|&b| b < 0 || b as usize >= whole) {
                return fail(format!(
                    "args->sequences.block_table[{s}][{}] is {}; it must be 0 to {}: {} slots are {whole} blocks of {}",
                    first + i,
                    blocks[i],
                    whole as i64 - 1,
                    self.0.n_slots,
                    table.block_slots
                ));
            }
        }
        Ok(())
    }

    /// Coded keys that some query of a sequence sees.
    fn visible_keys(&self, s: usize) -> Range<usize> {
        let n_kv = self.0.kv_lengths[s] as usize;
        let n_q = self.queries(s).len();
        if n_q == 0 {
            return 0..0;
        }
        let n_keys = n_kv + self.tail_length(s);
        let (first, last) = (self.0.visible.keys(0, n_q, n_keys), self.0.visible.keys(n_q - 1, n_q, n_keys));
        first.start.min(n_kv)..last.end.min(n_kv)
    }

    /// Tokens of a sequence's queries.
    pub fn queries(&self, s: usize) -> Range<usize> {
        match self.0.q_starts {
            Some(starts) => starts[s] as usize..starts[s + 1] as usize,
            None => s * self.0.n_q..(s + 1) * self.0.n_q,
        }
    }

    /// Rows of a sequence's tail.
    pub fn tail_length(&self, s: usize) -> usize {
        self.0.tail_lengths.map_or(self.0.tail_rows, |lengths| lengths[s] as usize)
    }

    pub fn len(&self) -> usize {
        self.0.kv_lengths.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn batch(&self) -> &Batch<'a> {
        &self.0
    }
}

/// One sequence of a call, or one stream.
#[derive(Debug, Clone, Copy)]
pub struct Sequence {
    pub index: usize,
    pub first_token: usize,
    pub n_q: usize,
    /// Coded keys.
    pub n_kv: usize,
    /// Rows of the tail, and where they begin in its tensors.
    pub n_tail: usize,
    pub first_tail: usize,
}

impl AttendArgs<'_> {
    /// Queries of all sequences.
    pub fn n_tokens(&self) -> usize {
        match &self.sequences {
            None => self.n_streams * self.n_q,
            Some(sequences) => sequences.queries(self.n_streams - 1).end,
        }
    }

    pub fn sequence(&self, index: usize) -> Sequence {
        let (n_tail, first_tail) = self.tail.as_ref().map_or((0, 0), |tail| {
            let start = tail.starts.map_or(index * tail.n_rows, |starts| starts[index] as usize);
            (tail.lengths.map_or(tail.n_rows, |lengths| lengths[index] as usize), start)
        });
        let (queries, n_kv) = match &self.sequences {
            None => (index * self.n_q..(index + 1) * self.n_q, self.n_kv),
            Some(sequences) => (sequences.queries(index), sequences.0.kv_lengths[index] as usize),
        };
        Sequence { index, first_token: queries.start, n_q: queries.len(), n_kv, n_tail, first_tail }
    }

    pub fn visible(&self) -> Visible {
        self.sequences.as_ref().map_or(Visible::ALL, |sequences| sequences.0.visible)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_query_is_at_the_last_key() {
        let causal = Visible { causal: true, window: None };
        assert_eq!(causal.keys(2, 3, 10), 0..10);
        assert_eq!(causal.keys(0, 3, 10), 0..8);
        assert_eq!(causal.keys(0, 3, 2), 0..0);
        assert_eq!(causal.keys(1, 3, 2), 0..1);
        let window = Visible { causal: true, window: Some(4) };
        assert_eq!(window.keys(2, 3, 10), 6..10);
        assert_eq!(window.keys(0, 3, 5), 0..3);
        assert_eq!(Visible::ALL.keys(0, 3, 10), 0..10);
    }
}
