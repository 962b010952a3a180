//! Attention on coded rows.
//!
//! The work is cut into items, (stream, block of query rows, chunk of keys, KV head), by shapes alone; shards share the
//! items out, each item leaves a partial result in the workspace, and a second pass merges the chunks of every row. So
//! the result does not depend on the number of shards.
//!
//! | module | what it does |
//! |---|---|
//! | [`item`] | one item: tiles of keys, online softmax |
//! | [`lanes`] | the order in which codes unfold |
//! | [`expand`] | codes to 16-bit levels |
//! | [`product`] | integer products |
//! | [`row`] | softmax of one row |
//! | [`fold`] | queries into the coded space, outputs out of it |

mod expand;
mod fold;
mod item;
mod lanes;
mod product;
mod row;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;

use crate::cpu::simd::{Isa, portable::Portable};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{avx2::Avx2, avx512::Avx512};
use crate::error::{Error, Result};
use crate::factor::LayerFactors;
use crate::shape::LayerShape;
use crate::view::{AttendArgs, MaskType};
use crate::workspace::{Arena, Workspace, carve, size_of_pieces};

use item::{Item, Scratch};
use lanes::{MAX_LANES, SideLanes};

/// Keys of a tile, at most; wide heads take half of it, so that a tile's levels stay in L1.
const MAX_TILE: usize = 64;
/// Lanes (32 bits) of a tile's levels.
const TILE_LANES: usize = 16 * MAX_LANES;
/// Query rows of an item, at most, and floats of their queries or outputs: blocks this large make the cost of unfolding
/// codes small, and still stay in L2.
const MAX_ROWS: usize = 48;
const ROW_FLOATS: usize = 48 * 96;
/// Bytes of a row's spread low bits.
const LOW_STRIDE: usize = 128;
/// Items that a call is cut into if it is long enough, and the fewest keys of a chunk: folding queries and unfolding
/// outputs cost as much as some tens of keys.
const ITEMS: usize = 32;
const LEAST_CHUNK: usize = 256;

/// How a call is cut. Depends on shapes only.
#[derive(Debug, Clone, Copy)]
struct Cut {
    tile: usize,
    /// Query rows, (query, head of the group) pairs, of a stream and KV head; of a block; blocks.
    rows: usize,
    block_rows: usize,
    blocks: usize,
    chunk: usize,
    chunks: usize,
    heads: usize,
    streams: usize,
    d_v: usize,
}

/// Partial results, `[stream][KV head][row][chunk]`.
#[derive(Debug, Clone, Copy)]
struct Partials {
    /// `[d_v]` each.
    out: *mut f32,
    /// Largest score and sum of probabilities.
    stats: *mut f32,
}

fn lay(arena: &mut Arena, partial_rows: usize, d_v: usize) -> Partials {
    Partials { out: arena.take(partial_rows.saturating_mul(d_v)), stats: arena.take(partial_rows.saturating_mul(2)) }
}

/// Query rows of a block, at most, and keys of a tile.
fn block_shape(layer: &LayerShape) -> (usize, usize) {
    let lanes = SideLanes::new(&layer.v, 0).lanes;
    let widest = layer.k.head_dim.max(lanes);
    ((ROW_FLOATS / widest).min(MAX_ROWS), if widest <= 128 { MAX_TILE } else { MAX_TILE / 2 })
}

fn least_chunk(layer: &LayerShape) -> usize {
    LEAST_CHUNK.max(4 * layer.k.head_dim.max(layer.v.head_dim))
}

impl Cut {
    fn new(layer: &LayerShape, streams: usize, n_q: usize, n_kv: usize) -> Self {
        let (most_rows, tile) = block_shape(layer);
        let rows = n_q * layer.group();
        let blocks = rows.div_ceil(most_rows).max(1);
        // Blocks of even size, so that the last is not a sliver.
        let block_rows = rows.div_ceil(blocks).max(1);
        let wanted = ITEMS.div_ceil((streams * layer.n_kv_heads * blocks).max(1));
        let chunk = n_kv.div_ceil(wanted).max(least_chunk(layer)).next_multiple_of(tile);
        let chunks = n_kv.div_ceil(chunk);
        Self { tile, rows, block_rows, blocks, chunk, chunks, heads: layer.n_kv_heads, streams, d_v: layer.v.head_dim }
    }

    fn items(&self) -> usize {
        if self.rows == 0 { 0 } else { self.streams * self.blocks * self.chunks * self.heads }
    }

    fn partial_rows(&self) -> usize {
        self.streams * self.heads * self.rows * self.chunks
    }
}

/// Bytes of workspace for any [`attend`] of at most so many streams, queries of each and keys of each.
pub fn workspace_size(layer: &LayerShape, max_streams: usize, max_queries: usize, max_kv: usize) -> Result<usize> {
    let rows = max_streams.checked_mul(max_queries).and_then(|x| x.checked_mul(layer.n_q_heads));
    let Some(rows) = rows.filter(|rows| *rows < usize::MAX >> 16) else {
        return Err(Error::invalid(format!(
            "{max_streams} streams of {max_queries} queries of {} heads are more than any workspace holds",
            layer.n_q_heads
        )));
    };
    // A call of R rows in B blocks, streams and heads together, has ceil(ITEMS / B) chunks at most, and R is at most B
    // times a block's rows: R * chunks < R + ITEMS * block rows. Nor are chunks shorter than the least.
    let by_items = rows + ITEMS * block_shape(layer).0;
    let by_keys = rows.saturating_mul(max_kv.div_ceil(least_chunk(layer)).max(1));
    Ok(size_of_pieces(|arena| lay(arena, by_items.min(by_keys), layer.v.head_dim)))
}

/// All of a call in the calling thread.
pub fn attend(layer: &LayerShape, factors: &LayerFactors, args: &AttendArgs<'_>, ws: &Workspace<'_>) -> Result<()> {
    attend_shard(layer, factors, args, ws, 0, 1)?;
    attend_merge_shard(layer, factors, args, ws, 0, 1)
}

/// Shard `shard` of `n_shards` of the work. All shards must be done before the merge.
pub fn attend_shard(
    layer: &LayerShape,
    factors: &LayerFactors,
    args: &AttendArgs<'_>,
    ws: &Workspace<'_>,
    shard: usize,
    n_shards: usize,
) -> Result<()> {
    attend_shard_on(Isa::detect(), layer, factors, args, ws, shard, n_shards)
}

/// [`attend_shard`] with a given instruction set, which the CPU must have.
pub fn attend_shard_on(
    isa: Isa,
    layer: &LayerShape,
    factors: &LayerFactors,
    args: &AttendArgs<'_>,
    ws: &Workspace<'_>,
    shard: usize,
    n_shards: usize,
) -> Result<()> {
    let cut = check(layer, factors, args, shard, n_shards)?;
    let partials = carve(ws, |arena| lay(arena, cut.partial_rows(), cut.d_v))?;
    // One query block: neighbouring items are heads of the same records, which one thread then reads while they are
    // in its cache. Several: rows of a causal mask cost unevenly, and are dealt out.
    let (first, end, step) = if cut.blocks * cut.streams == 1 {
        (shard * cut.items() / n_shards, (shard + 1) * cut.items() / n_shards, 1)
    } else {
        (shard, cut.items(), n_shards)
    };
    let mut scratch = MaybeUninit::uninit();
    for index in (first..end).step_by(step) {
        run_item(isa, layer, factors, args, &cut, &partials, index, &mut scratch)?;
    }
    Ok(())
}

/// Combines the chunks of every row and writes `out`. Call it for all shards after all of [`attend_shard`].
pub fn attend_merge_shard(
    layer: &LayerShape,
    factors: &LayerFactors,
    args: &AttendArgs<'_>,
    ws: &Workspace<'_>,
    shard: usize,
    n_shards: usize,
) -> Result<()> {
    let cut = check(layer, factors, args, shard, n_shards)?;
    let partials = carve(ws, |arena| lay(arena, cut.partial_rows(), cut.d_v))?;
    let total = args.n_streams * args.n_q * layer.n_q_heads;
    for index in shard * total / n_shards..(shard + 1) * total / n_shards {
        merge_row(layer, args, &cut, &partials, index / layer.n_q_heads, index % layer.n_q_heads);
    }
    Ok(())
}

fn check(
    layer: &LayerShape,
    factors: &LayerFactors,
    args: &AttendArgs<'_>,
    shard: usize,
    n_shards: usize,
) -> Result<Cut> {
    let fail = |message: String| Err(Error::invalid(message));
    if shard >= n_shards {
        return fail(format!("shard is {shard} of {n_shards}"));
    }
    if factors.k.len() != layer.n_kv_heads || factors.v.len() != layer.n_kv_heads {
        return fail(format!("factors are for {} heads, the layer has {}", factors.k.len(), layer.n_kv_heads));
    }
    let tokens = args.n_streams.checked_mul(args.n_q);
    let (q, out) = (args.q.shape(), args.out.shape());
    if tokens != Some(q.n_tokens) || q.n_heads != layer.n_q_heads || q.head_dim != layer.k.head_dim {
        return fail(format!(
            "q is [{}][{}][{}]; this call needs [{} * {}][{}][{}]",
            q.n_tokens, q.n_heads, q.head_dim, args.n_streams, args.n_q, layer.n_q_heads, layer.k.head_dim
        ));
    }
    if tokens != Some(out.n_tokens) || out.n_heads != layer.n_q_heads || out.head_dim != layer.v.head_dim {
        return fail(format!(
            "out is [{}][{}][{}]; this call needs [{} * {}][{}][{}]",
            out.n_tokens, out.n_heads, out.head_dim, args.n_streams, args.n_q, layer.n_q_heads, layer.v.head_dim
        ));
    }
    let last_stream = args.n_streams.saturating_sub(1);
    let end = last_stream
        .checked_mul(args.stream_slots)
        .and_then(|x| x.checked_add(args.first_slot))
        .and_then(|x| x.checked_add(args.n_kv));
    let n_slots = args.store.n_slots();
    if args.n_streams > 0 && args.n_kv > 0 && end.is_none_or(|end| end > n_slots) {
        return fail(format!(
            "keys reach slot {} + {last_stream} * {} + {}; the store has {n_slots}",
            args.first_slot, args.stream_slots, args.n_kv
        ));
    }
    if let (Some(mask), Some(1..)) = (&args.mask, tokens) {
        let size = if mask.dtype == MaskType::F32 { 4 } else { 2 };
        let end = last_stream
            .checked_mul(mask.stream_stride)
            .and_then(|x| x.checked_add((args.n_q - 1).checked_mul(mask.query_stride)?))
            .and_then(|x| x.checked_add(args.n_kv.checked_mul(size)?));
        if end.is_none_or(|end| end > mask.bytes.len()) {
            return fail(format!("mask reaches beyond its {} bytes", mask.bytes.len()));
        }
    }
    if args.sink_logits.is_some_and(|s| s.len() != layer.n_q_heads) {
        return fail(format!("sink_logits must be one per query head, {}", layer.n_q_heads));
    }
    Ok(Cut::new(layer, args.n_streams, args.n_q, args.n_kv))
}

/// Item `index` of `[stream][block][chunk][KV head]`.
#[allow(clippy::too_many_arguments)]
fn run_item(
    isa: Isa,
    layer: &LayerShape,
    factors: &LayerFactors,
    args: &AttendArgs<'_>,
    cut: &Cut,
    partials: &Partials,
    index: usize,
    scratch: &mut MaybeUninit<Scratch>,
) -> Result<()> {
    let head = index % cut.heads;
    let chunk = index / cut.heads % cut.chunks;
    let block = index / cut.heads / cut.chunks % cut.blocks;
    let stream = index / cut.heads / cut.chunks / cut.blocks;
    let (k, v) = (SideLanes::new(&layer.k, head), SideLanes::new(&layer.v, head));
    let first_row = block * cut.block_rows;
    let rows = cut.block_rows.min(cut.rows.saturating_sub(first_row));
    let group = layer.group();
    let d_k = layer.k.head_dim;

    // Queries, [row][d_k].
    for r in 0..rows {
        let row = first_row + r;
        // SAFETY: rows are at most MAX_ROWS and `rows * d_k` at most ROW_FLOATS, by `block_shape`.
        let q = unsafe {
            let q = (&raw mut (*scratch.as_mut_ptr()).q).cast::<f32>().add(r * d_k);
            q.write_bytes(0, d_k);
            std::slice::from_raw_parts_mut(q, d_k)
        };
        args.q.load(stream * args.n_q + row / group, head * group + row % group, q);
    }

    // [stream][KV head][row][chunk]
    let at = ((stream * cut.heads + head) * cut.rows + first_row) * cut.chunks + chunk;
    let (records, record_stride) = args.store.raw();
    let item = Item {
        k: &k,
        v: &v,
        k_sets: &factors.k[head].sets,
        v_sets: &factors.v[head].sets,
        records: records.wrapping_add((args.first_slot + stream * args.stream_slots) * record_stride),
        record_stride,
        tile: cut.tile,
        keys: chunk * cut.chunk..args.n_kv.min((chunk + 1) * cut.chunk),
        mask: args.mask,
        stream,
        group,
        first_row,
        rows,
        scale: args.scale,
        softcap: args.softcap,
        out: partials.out.wrapping_add(at * cut.d_v),
        out_stride: cut.chunks * cut.d_v,
        stats: partials.stats.wrapping_add(2 * at),
        stats_stride: cut.chunks,
    };
    // SAFETY: `check` compared slots, mask, queries and result with the shapes that `cut` was made of; `carve` gave room
    // for all partial rows, and this item's are its own.
    unsafe {
        match isa {
            Isa::Portable => item::run(Portable, &item, scratch),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => run_avx2(Avx2::new().ok_or_else(missing)?, &item, scratch),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => run_avx512(Avx512::new().ok_or_else(missing)?, &item, scratch),
            #[cfg(not(target_arch = "x86_64"))]
            _ => return Err(missing()),
        }
    }
    Ok(())
}

#[cold]
fn missing() -> Error {
    Error::unsupported("this CPU lacks the instruction set asked for")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2(s: Avx2, item: &Item<'_>, scratch: &mut MaybeUninit<Scratch>) {
    // SAFETY: the caller's promise.
    unsafe { item::run(s, item, scratch) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn run_avx512(s: Avx512, item: &Item<'_>, scratch: &mut MaybeUninit<Scratch>) {
    // SAFETY: the caller's promise.
    unsafe { item::run(s, item, scratch) }
}

/// One row of the result: chunks in order, the sink's logit, the division.
fn merge_row(
    layer: &LayerShape,
    args: &AttendArgs<'_>,
    cut: &Cut,
    partials: &Partials,
    token: usize,
    q_head: usize,
) {
    let group = layer.group();
    let (stream, query) = (token / args.n_q, token % args.n_q);
    let row = query * group + q_head % group;
    let at = ((stream * cut.heads + q_head / group) * cut.rows + row) * cut.chunks;
    // SAFETY: a row's chunks lie within the partials, which all shards of `attend_shard` have written.
    let stats = |chunk: usize| unsafe {
        let p = partials.stats.add(2 * (at + chunk));
        (p.read(), p.add(1).read())
    };
    let sink = args.sink_logits.map(|logits| logits[q_head] * std::f32::consts::LOG2_E);
    let mut largest = sink.unwrap_or(f32::MIN);
    for chunk in 0..cut.chunks {
        largest = largest.max(stats(chunk).0);
    }
    let mut out = [0.0f32; 256];
    let out = &mut out[..cut.d_v];
    let mut seen = 0.0;
    for chunk in 0..cut.chunks {
        let (max, sum) = stats(chunk);
        if sum == 0.0 {
            continue;
        }
        let share = (max - largest).exp2();
        seen += sum * share;
        // SAFETY: as above.
        let partial = unsafe { std::slice::from_raw_parts(partials.out.add((at + chunk) * cut.d_v), cut.d_v) };
        for (o, p) in out.iter_mut().zip(partial) {
            *o += p * share;
        }
    }
    let total = seen + sink.map_or(0.0, |sink| (sink - largest).exp2());
    let inverse = if seen > 0.0 { 1.0 / total } else { 0.0 };
    out.iter_mut().for_each(|o| *o *= inverse);
    // SAFETY: rows are split over the shards of the merge.
    unsafe { args.out.store(token, q_head, out) };
}
