//! How a call is cut into items, (sequence, block of query rows, part of its keys, KV head), by shapes alone.
//!
//! A sequence's coded keys are cut into chunks of about one length for the whole call, so that a long sequence among
//! short ones is shared out, too. Its tail is one more part.

use super::{CHUNK_BYTES, FEWEST_ITEMS, ITEMS, LEAST_CHUNK, MAX_ROWS, MAX_TILE, MOST_ITEMS, PROMPT_ITEMS, ROW_FLOATS};
use crate::batch::Sequence;
use crate::cpu::attend::lanes::row_lanes;
use crate::error::{Error, Result};
use crate::shape::LayerShape;
use crate::view::AttendArgs;
use crate::workspace::{Arena, size_of_pieces};

/// Upper bounds of the calls that a workspace is to serve.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub streams: usize,
    /// Queries of a stream.
    pub queries: usize,
    /// Queries of all streams.
    pub total_queries: usize,
    /// Coded keys of a stream.
    pub kv: usize,
    /// Rows of a stream's tail.
    pub tail: usize,
}

impl Limits {
    /// Streams that are all of one length.
    pub fn even(streams: usize, queries: usize, kv: usize) -> Self {
        Self { streams, queries, total_queries: streams.saturating_mul(queries), kv, tail: 0 }
    }

    pub fn of(args: &AttendArgs<'_>) -> Self {
        Self {
            total_queries: args.n_tokens(),
            tail: args.tail.map_or(0, |tail| tail.n_rows),
            ..Self::even(args.n_streams, args.n_q, args.n_kv)
        }
    }
}

/// What all sequences of a call have in common.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    pub tile: usize,
    /// Query rows, (query, head of the group) pairs, of a block at most.
    most_rows: usize,
    /// About as many keys as a chunk has.
    chunk: usize,
    pub heads: usize,
    group: usize,
    pub d_v: usize,
}

/// One sequence of a call.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    pub sequence: Sequence,
    /// Query rows of the sequence and a KV head; of a block; blocks.
    pub rows: usize,
    pub block_rows: usize,
    pub blocks: usize,
    /// Coded keys of a chunk; chunks, and the tail if there is one.
    pub chunk: usize,
    pub parts: usize,
    /// Items and partial rows of the sequences before this one.
    pub first_item: usize,
    pub first_partial: usize,
}

impl Piece {
    pub fn items(&self, heads: usize) -> usize {
        if self.rows == 0 { 0 } else { self.blocks * self.parts * heads }
    }

    fn partial_rows(&self, heads: usize) -> usize {
        heads * self.rows * self.parts
    }
}

/// Partial results, `[sequence][KV head][row][part]`.
#[derive(Debug, Clone, Copy)]
pub struct Partials {
    /// `[d_v]` each.
    pub out: *mut f32,
    /// Largest score and sum of probabilities.
    pub stats: *mut f32,
}

pub fn lay(arena: &mut Arena, partial_rows: usize, d_v: usize) -> Partials {
    Partials { out: arena.take(partial_rows.saturating_mul(d_v)), stats: arena.take(partial_rows.saturating_mul(2)) }
}

/// Query rows of a block, at most, and keys of a tile.
fn block_shape(layer: &LayerShape) -> (usize, usize) {
    let widest = layer.k.head_dim.max(row_lanes(&layer.v));
    // By sixteen, as tiles have them.
    ((ROW_FLOATS / widest / 16 * 16).min(MAX_ROWS), if widest <= 128 { MAX_TILE } else { MAX_TILE / 2 })
}

impl Cut {
    pub fn new(layer: &LayerShape, args: &AttendArgs<'_>) -> Self {
        let (most_rows, tile) = block_shape(layer);
        let (heads, group) = (layer.n_kv_heads, layer.group());
        let mut cut = Self { tile, most_rows, chunk: usize::MAX, heads, group, d_v: layer.v.head_dim };
        let work: usize = cut.pieces(args).map(|piece| piece.blocks * piece.sequence.n_kv).sum();
        let is_prompt = cut.pieces(args).any(|piece| piece.blocks > 1);
        let mut chunk = (work * heads).div_ceil(if is_prompt { PROMPT_ITEMS } else { ITEMS });
        let mut least = LEAST_CHUNK;
        // Heads of a chunk follow each other: its records are then still in L2. Prompts compute too long for that to
        // matter.
        if !is_prompt {
            chunk = chunk.min(CHUNK_BYTES / layer.slot_bytes).max((work * heads).div_ceil(MOST_ITEMS));
            least = least.min((work * heads).div_ceil(FEWEST_ITEMS)).max(cut.tile);
        }
        cut.chunk = chunk.max(least);
        cut
    }

    fn piece(&self, sequence: Sequence, first_item: usize, first_partial: usize) -> Piece {
        let rows = sequence.n_q * self.group;
        let blocks = rows.div_ceil(self.most_rows);
        // Blocks and chunks of even size, so that the last is not a sliver.
        let block_rows = rows.div_ceil(blocks.max(1)).max(1);
        let n_kv = sequence.n_kv;
        let chunk = n_kv.div_ceil(n_kv.div_ceil(self.chunk).max(1)).next_multiple_of(self.tile).max(1);
        let parts = n_kv.div_ceil(chunk) + usize::from(sequence.n_tail > 0);
        Piece { sequence, rows, block_rows, blocks, chunk, parts, first_item, first_partial }
    }

    pub fn pieces<'a>(&'a self, args: &'a AttendArgs<'_>) -> impl Iterator<Item = Piece> + 'a {
        let (mut items, mut partials) = (0, 0);
        (0..args.n_streams).map(move |index| {
            let piece = self.piece(args.sequence(index), items, partials);
            items += piece.items(self.heads);
            partials += piece.partial_rows(self.heads);
            piece
        })
    }

    /// Partial rows of the whole call.
    pub fn partial_rows(&self, args: &AttendArgs<'_>) -> usize {
        self.pieces(args).map(|piece| piece.partial_rows(self.heads)).sum()
    }
}

/// Bytes of workspace for any call within `limits`.
pub fn workspace_size(layer: &LayerShape, limits: &Limits) -> Result<usize> {
    let rows = limits.total_queries.checked_mul(layer.n_q_heads);
    let Some(rows) = rows.filter(|rows| *rows < usize::MAX >> 16) else {
        return Err(Error::invalid(format!(
            "{} queries (of {} streams, {} each at most) of {} heads are more than any workspace holds",
            limits.total_queries, limits.streams, limits.queries, layer.n_q_heads
        )));
    };
    // Sequence s has B_s blocks of n_s keys in ceil(n_s / chunk) chunks, and a chunk of the call is at least the sum of
    // B_s n_s over the heads' MOST_ITEMS. So rows in chunks are at most rows + MOST_ITEMS * a block's rows. Nor are
    // chunks shorter than the least where that leaves them few. The tail adds a part to every row.
    let by_items = rows + MOST_ITEMS * block_shape(layer).0;
    let by_keys = rows.saturating_mul(limits.kv.div_ceil(LEAST_CHUNK).max(FEWEST_ITEMS));
    let tail = if limits.tail > 0 { rows } else { 0 };
    Ok(size_of_pieces(|arena| lay(arena, by_items.min(by_keys) + tail, layer.v.head_dim)))
}
