//! Attention on coded rows.
//!
//! The work is cut into items, (sequence, block of query rows, chunk of keys or tail, KV head), by shapes alone; shards
//! share the items out, each item leaves a partial result in the workspace, and a second pass merges the parts of every
//! row. So the result does not depend on the number of shards.
//!
//! | module | what it does |
//! |---|---|
//! | [`cut`] | items, partial results, the workspace |
//! | [`item`] | one item on coded keys: tiles of keys, online softmax |
//! | [`keys`] | where a tile's records lie, who sees them |
//! | [`tail`] | one item on rows that are not coded |
//! | [`lanes`] | the order in which codes unfold |
//! | [`engine`] | how levels and integers lie: in pairs of 16 bits, or in fours of bytes |
//! | [`expand`], [`product`] | codes to levels, and integer products, in pairs |
//! | [`vnni`], [`fours`] | the same in fours, for AVX-512 |
//! | [`tiles`] | products in fours on AMX tiles |
//! | [`weigh`] | from products to weights in one go, for AVX-512 |
//! | [`row`] | softmax of one row |
//! | [`fold`] | queries into the coded space, outputs out of it |

mod cut;
mod engine;
mod expand;
mod fold;
mod item;
mod keys;
mod lanes;
mod product;
mod row;
mod tail;
#[cfg(target_arch = "x86_64")]
mod fours;
#[cfg(target_arch = "x86_64")]
mod tiles;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(target_arch = "x86_64")]
mod weigh;
#[cfg(test)]
mod batch_tests;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::cpu::simd::{Isa, portable::Portable};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{amx, avx2::Avx2, avx512::Avx512};
use crate::error::{Error, Result};
use crate::factor::LayerFactors;
use crate::shape::LayerShape;
use crate::view::{AttendArgs, MaskType, Tail};
use crate::workspace::{Workspace, carve};

use engine::Engine;
use cut::{Cut, Partials, Piece, lay};
pub use cut::{Limits, workspace_size};
use item::{Item, Kept, Scratch};
use keys::{Keys, Sight};
use lanes::{MAX_LANES, SideLanes};
use tail::{TailItem, TailScratch};

/// Keys of a tile, at most; wide heads take half of it, so that a tile's levels stay in L1.
const MAX_TILE: usize = 64;
/// Lanes (32 bits) of a tile's levels.
const TILE_LANES: usize = 16 * MAX_LANES;
/// Query rows of an item, at most, and floats of their queries or outputs: blocks this large make the cost of unfolding
/// codes small, and still stay in L2.
const MAX_ROWS: usize = 96;
const ROW_FLOATS: usize = 48 * 256;
/// Bytes of a row's spread low bits.
const LOW_STRIDE: usize = 128;
/// Items that a call is cut into if it is long enough, fewer where it has several blocks of rows, and the fewest keys of a
/// chunk: folding queries and unfolding outputs cost as much as some tens of keys.
const ITEMS: usize = 32;
const PROMPT_ITEMS: usize = 16;
const LEAST_CHUNK: usize = 256;
/// A call with fewer items than this has shorter chunks: a thread that only waits for another costs more.
const FEWEST_ITEMS: usize = 2;
/// Bytes of a chunk's records where few queries pass over them, as far as that leaves a call this many items.
const CHUNK_BYTES: usize = 512 << 10;
const MOST_ITEMS: usize = 512;

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
    let partials = carve(ws, |arena| lay(arena, cut.partial_rows(args), cut.d_v))?;
    let sides = (SideLanes::new(&layer.k), SideLanes::new(&layer.v));
    let mut scratch =
        Scratches { kept: Kept::default(), coded: MaybeUninit::uninit(), tail: MaybeUninit::uninit() };
    for piece in cut.pieces(args) {
        let items = piece.items(cut.heads);
        // One query block: neighbouring items are heads of the same records, which one thread then reads while they are
        // in its cache. Several: rows of a causal mask cost unevenly, and are dealt out.
        let (first, end, step) = if args.n_streams == 1 && piece.blocks == 1 {
            (shard * items / n_shards, (shard + 1) * items / n_shards, 1)
        } else {
            ((shard + n_shards - piece.first_item % n_shards) % n_shards, items, n_shards)
        };
        for index in (first..end).step_by(step) {
            // Of a run of neighbours, the heads of a chunk bring in the next one together.
            let run = if step == 1 { first..end } else { index..index + 1 };
            run_item(isa, layer, &sides, factors, args, &cut, &piece, &partials, index, run, &mut scratch)?;
        }
    }
    Ok(())
}

/// Combines the parts of every row and writes `out`. Call it for all shards after all of [`attend_shard`].
pub fn attend_merge_shard(
    layer: &LayerShape,
    factors: &LayerFactors,
    args: &AttendArgs<'_>,
    ws: &Workspace<'_>,
    shard: usize,
    n_shards: usize,
) -> Result<()> {
    let cut = check(layer, factors, args, shard, n_shards)?;
    let partials = carve(ws, |arena| lay(arena, cut.partial_rows(args), cut.d_v))?;
    let total = args.n_tokens() * layer.n_q_heads;
    let (first, end) = (shard * total / n_shards, (shard + 1) * total / n_shards);
    for piece in cut.pieces(args) {
        // This shard's rows of the sequence.
        let before = piece.sequence.first_token * layer.n_q_heads;
        let rows = piece.sequence.n_q * layer.n_q_heads;
        for index in first.clamp(before, before + rows) - before..end.clamp(before, before + rows) - before {
            merge_row(layer, args, &cut, &piece, &partials, index / layer.n_q_heads, index % layer.n_q_heads);
        }
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
    if shard >= n_shards {
        return fail(format!("shard is {shard} of {n_shards}"));
    }
    if factors.k.len() != layer.n_kv_heads || factors.v.len() != layer.n_kv_heads {
        return fail(format!("factors are for {} heads, the layer has {}", factors.k.len(), layer.n_kv_heads));
    }
    check_queries(layer, args)?;
    if let Some(tail) = &args.tail {
        check_tail(layer, args, tail)?;
    }
    check_keys(args)?;
    if args.sink_logits.is_some_and(|s| s.len() != layer.n_q_heads) {
        return fail(format!("sink_logits must be one per query head, {}", layer.n_q_heads));
    }
    Ok(Cut::new(layer, args))
}

fn fail<T>(message: String) -> Result<T> {
    Err(Error::invalid(message))
}

fn check_queries(layer: &LayerShape, args: &AttendArgs<'_>) -> Result<()> {
    let tokens = match &args.sequences {
        Some(s) if s.len() == args.n_streams && s.batch().n_q <= args.n_q => Some(args.n_tokens()),
        Some(s) => return fail(format!("sequences are {}; this call has {} streams", s.len(), args.n_streams)),
        None => args.n_streams.checked_mul(args.n_q),
    };
    let fits = |rows: usize| tokens.is_some_and(|t| if args.sequences.is_some() { t <= rows } else { t == rows });
    let (q, out) = (args.q.shape(), args.out.shape());
    if !fits(q.n_tokens) || q.n_heads != layer.n_q_heads || q.head_dim != layer.k.head_dim {
        return fail(format!(
            "q is [{}][{}][{}]; this call needs [{} * {}][{}][{}]",
            q.n_tokens, q.n_heads, q.head_dim, args.n_streams, args.n_q, layer.n_q_heads, layer.k.head_dim
        ));
    }
    if !fits(out.n_tokens) || out.n_heads != layer.n_q_heads || out.head_dim != layer.v.head_dim {
        return fail(format!(
            "out is [{}][{}][{}]; this call needs [{} * {}][{}][{}]",
            out.n_tokens, out.n_heads, out.head_dim, args.n_streams, args.n_q, layer.n_q_heads, layer.v.head_dim
        ));
    }
    Ok(())
}

/// Every key is in the store, and the mask covers all keys.
fn check_keys(args: &AttendArgs<'_>) -> Result<()> {
    let n_slots = args.store.n_slots();
    if let Some(sequences) = &args.sequences {
        let batch = sequences.batch();
        if args.mask.is_some() {
            return fail("a mask does not go with sequences".into());
        }
        if batch.n_kv > args.n_kv || batch.table.is_some() && batch.n_slots > n_slots {
            return fail(format!("sequences were checked for {} keys and {} slots", batch.n_kv, batch.n_slots));
        }
        // What a window shows depends on the tail.
        if (0..args.n_streams).any(|i| sequences.tail_length(i) != args.sequence(i).n_tail) {
            return fail("sequences were checked with other tails".into());
        }
    }
    let last_stream = args.n_streams.saturating_sub(1);
    let end = last_stream
        .checked_mul(args.stream_slots)
        .and_then(|x| x.checked_add(args.first_slot))
        .and_then(|x| x.checked_add(args.n_kv));
    if args.n_streams > 0 && args.n_kv > 0 && !by_table(args) && end.is_none_or(|end| end > n_slots) {
        return fail(format!(
            "keys reach slot {} + {last_stream} * {} + {}; the store has {n_slots}",
            args.first_slot, args.stream_slots, args.n_kv
        ));
    }
    if let (Some(mask), 1..) = (&args.mask, args.n_tokens()) {
        let size = if mask.dtype == MaskType::F32 { 4 } else { 2 };
        let columns = args.n_kv.checked_add(args.tail.map_or(0, |tail| tail.n_rows));
        let end = last_stream
            .checked_mul(mask.stream_stride)
            .and_then(|x| x.checked_add((args.n_q - 1).checked_mul(mask.query_stride)?))
            .and_then(|x| x.checked_add(columns?.checked_mul(size)?));
        if end.is_none_or(|end| end > mask.bytes.len()) {
            return fail(format!("mask reaches beyond its {} bytes", mask.bytes.len()));
        }
    }
    Ok(())
}

fn check_tail(layer: &LayerShape, args: &AttendArgs<'_>, tail: &Tail<'_>) -> Result<()> {
    for (name, rows, head_dim) in [("k", &tail.k, layer.k.head_dim), ("v", &tail.v, layer.v.head_dim)] {
        let shape = rows.shape();
        if shape.n_heads != layer.n_kv_heads || shape.head_dim != head_dim {
            return fail(format!(
                "tail.{name} is [..][{}][{}]; this layer needs [..][{}][{head_dim}]",
                shape.n_heads, shape.head_dim, layer.n_kv_heads
            ));
        }
    }
    for numbers in [tail.starts, tail.lengths].into_iter().flatten() {
        if numbers.len() != args.n_streams || numbers.iter().any(|&n| n < 0) {
            return fail(format!("tail starts and lengths must be {} numbers from 0 up", args.n_streams));
        }
    }
    let rows = tail.k.n_tokens().min(tail.v.n_tokens());
    for index in 0..args.n_streams {
        let s = args.sequence(index);
        if s.n_tail > tail.n_rows || s.n_tail > 0 && s.first_tail.checked_add(s.n_tail).is_none_or(|end| end > rows) {
            return fail(format!("tail of sequence {index} is rows {} + {} of {rows}", s.first_tail, s.n_tail));
        }
    }
    Ok(())
}

/// What items of either kind work in.
struct Scratches {
    kept: Kept,
    coded: MaybeUninit<Scratch>,
    tail: MaybeUninit<TailScratch>,
}

// docs/linking.md tells engines how much stack attend takes: nearly all of it is this.
const _: () = assert!(size_of::<Scratches>() < 420 << 10);

/// Whether records lie in blocks, anywhere.
fn by_table(args: &AttendArgs<'_>) -> bool {
    args.sequences.is_some_and(|s| s.batch().table.is_some())
}

/// First byte, and bytes, of this item's share of the next chunk's records, if that chunk is in the same `run` of items of a
/// call with one block.
fn later(args: &AttendArgs<'_>, cut: &Cut, piece: &Piece, index: usize, run: &Range<usize>) -> (*const u8, usize) {
    let part = index / cut.heads;
    let (first, end) = ((part + 1) * piece.chunk, ((part + 2) * piece.chunk).min(piece.sequence.n_kv));
    if (part + 1) * cut.heads >= run.end || first >= end || by_table(args) {
        return (std::ptr::null(), 0);
    }
    // Heads of this chunk that are in the run.
    let first_item = run.start.max(part * cut.heads);
    let (share, shares) = (index - first_item, (part + 1) * cut.heads - first_item);
    let (records, stride) = args.store.raw();
    let slot = args.first_slot + piece.sequence.index * args.stream_slots + first;
    let bytes = (end - first) * stride;
    (records.wrapping_add(slot * stride + bytes * share / shares), bytes.div_ceil(shares))
}

/// Whether this item's records were asked for: by the items of the chunk before, if these are in the `run`, so that they
/// had them as [`later`], and have keys. A window may hide that chunk; what nobody asked for, an item asks for itself.
fn asked(args: &AttendArgs<'_>, cut: &Cut, piece: &Piece, sight: &Sight, index: usize, run: &Range<usize>) -> bool {
    let part = index / cut.heads;
    // A run of several chunks has one block of queries, whose first sees the earliest keys.
    !by_table(args) && part > run.start / cut.heads && sight.keys(0).start < part * piece.chunk
}

/// Item `index` of a sequence's `[block][part][KV head]`, one of a `run` of neighbours that the thread works on.
#[allow(clippy::too_many_arguments)]
fn run_item(
    isa: Isa,
    layer: &LayerShape,
    sides: &(SideLanes, SideLanes),
    factors: &LayerFactors,
    args: &AttendArgs<'_>,
    cut: &Cut,
    piece: &Piece,
    partials: &Partials,
    index: usize,
    run: Range<usize>,
    scratch: &mut Scratches,
) -> Result<()> {
    let sequence = &piece.sequence;
    let head = index % cut.heads;
    let part = index / cut.heads % piece.parts;
    let block = index / cut.heads / piece.parts;
    let (k, v) = (sides.0.of_head(head), sides.1.of_head(head));
    let first_row = block * piece.block_rows;
    let rows = piece.block_rows.min(piece.rows.saturating_sub(first_row));
    let group = layer.group();
    let d_k = layer.k.head_dim;

    // Queries, [row][d_k].
    for r in 0..rows {
        let row = first_row + r;
        // SAFETY: rows are at most MAX_ROWS and `rows * d_k` at most ROW_FLOATS, by `block_shape`.
        let q = unsafe {
            let q = (&raw mut (*scratch.coded.as_mut_ptr()).q).cast::<f32>().add(r * d_k);
            q.write_bytes(0, d_k);
            std::slice::from_raw_parts_mut(q, d_k)
        };
        args.q.load(sequence.first_token + row / group, head * group + row % group, q);
    }

    // [sequence][KV head][row][part]
    let at = piece.first_partial + (head * piece.rows + first_row) * piece.parts + part;
    let (records, stride) = args.store.raw();
    let sight = Sight { visible: args.visible(), n_q: sequence.n_q, n_keys: sequence.n_kv + sequence.n_tail };
    // Keys of this part that some query of the block sees.
    let begin = part * piece.chunk;
    let first_key = sight.keys(first_row / group).start.max(begin);
    let end_key = sight.keys((first_row + rows).div_ceil(group).max(1) - 1).end.min(begin + piece.chunk);
    let item = Item {
        k: &k,
        v: &v,
        k_sets: &factors.k[head].sets,
        v_sets: &factors.v[head].sets,
        records: match args.sequences.and_then(|s| s.batch().table) {
            Some(table) => Keys::paged(records, stride, &table, sequence.index),
            None => {
                let slot = args.first_slot + sequence.index * args.stream_slots;
                Keys { records: records.wrapping_add(slot * stride), stride, blocks: None }
            }
        },
        tile: cut.tile,
        keys: first_key..end_key.min(sequence.n_kv),
        later: later(args, cut, piece, index, &run),
        asked: asked(args, cut, piece, &sight, index, &run),
        head,
        mask: args.mask,
        sight,
        stream: sequence.index,
        group,
        first_row,
        rows,
        scale: args.scale,
        softcap: args.softcap,
        out: partials.out.wrapping_add(at * cut.d_v),
        out_stride: piece.parts * cut.d_v,
        stats: partials.stats.wrapping_add(2 * at),
        stats_stride: piece.parts,
    };
    let kind = match &args.tail {
        Some(tail) if begin >= sequence.n_kv => Kind::Tail(TailItem { tail, sequence, head, item: &item }),
        _ => Kind::Coded(&item),
    };
    // SAFETY: `check` compared slots, mask, queries, tail and result with the shapes that `cut` was made of; `carve` gave
    // room for all partial rows, and this item's are its own.
    unsafe {
        match isa {
            Isa::Portable => run_kind(Portable, &kind, scratch),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => run_avx2(Avx2::new().ok_or_else(missing)?, &kind, scratch),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => run_avx512(Avx512::new(None).ok_or_else(missing)?, &kind, scratch),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => {
                let tiles = amx::Tiles::new(amx::Amx::new().ok_or_else(missing)?);
                run_avx512(Avx512::new(Some(&tiles)).ok_or_else(missing)?, &kind, scratch);
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => return Err(missing()),
        }
    }
    Ok(())
}

/// The two kinds of items.
enum Kind<'a> {
    Coded(&'a Item<'a>),
    Tail(TailItem<'a>),
}

/// # Safety
/// As for [`item::run`] and [`tail::run`].
#[inline(always)]
unsafe fn run_kind<S: Engine>(s: S, kind: &Kind<'_>, scratch: &mut Scratches) {
    // SAFETY: the caller's promise.
    unsafe {
        match kind {
            Kind::Coded(item) => item::run(s, item, &mut scratch.kept, &mut scratch.coded),
            Kind::Tail(item) => {
                let q = (&raw const (*scratch.coded.as_ptr()).q).cast();
                tail::run(s, item, q, &mut scratch.tail);
            }
        }
    }
}

#[cold]
fn missing() -> Error {
    Error::unsupported("this CPU lacks the instruction set asked for")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2(s: Avx2, kind: &Kind<'_>, scratch: &mut Scratches) {
    // SAFETY: the caller's promise.
    unsafe { run_kind(s, kind, scratch) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn run_avx512(s: Avx512<'_>, kind: &Kind<'_>, scratch: &mut Scratches) {
    // SAFETY: the caller's promise.
    unsafe { run_kind(s, kind, scratch) }
}

/// One row of the result: parts in order, the sink's logit, the division.
fn merge_row(
    layer: &LayerShape,
    args: &AttendArgs<'_>,
    cut: &Cut,
    piece: &Piece,
    partials: &Partials,
    query: usize,
    q_head: usize,
) {
    let group = layer.group();
    let row = query * group + q_head % group;
    let at = piece.first_partial + (q_head / group * piece.rows + row) * piece.parts;
    // SAFETY: a row's parts lie within the partials, which all shards of `attend_shard` have written.
    let stats = |part: usize| unsafe {
        let p = partials.stats.add(2 * (at + part));
        (p.read(), p.add(1).read())
    };
    let sink = args.sink_logits.map(|logits| logits[q_head] * std::f32::consts::LOG2_E);
    let mut largest = sink.unwrap_or(f32::MIN);
    for part in 0..piece.parts {
        largest = largest.max(stats(part).0);
    }
    let mut out = [0.0f32; 256];
    let out = &mut out[..cut.d_v];
    let mut seen = 0.0;
    for part in 0..piece.parts {
        let (max, sum) = stats(part);
        if sum == 0.0 {
            continue;
        }
        let share = (max - largest).exp2();
        seen += sum * share;
        // SAFETY: as above.
        let partial = unsafe { std::slice::from_raw_parts(partials.out.add((at + part) * cut.d_v), cut.d_v) };
        for (o, p) in out.iter_mut().zip(partial) {
            *o += p * share;
        }
    }
    let total = seen + sink.map_or(0.0, |sink| (sink - largest).exp2());
    // NaN is not zero: it came from the query or its mask, and goes out.
    let inverse = if seen == 0.0 { 0.0 } else { 1.0 / total };
    out.iter_mut().for_each(|o| *o *= inverse);
    // SAFETY: rows are split over the shards of the merge.
    unsafe { args.out.store(piece.sequence.first_token + query, q_head, out) };
}
