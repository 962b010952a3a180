//! How work is cut: kernels of a layer, grids, shared memory, workspace. The kernels' comments say what each number means.

use super::driver::{Device, Kernel, Launch, MOST_BLOCKS_Y};
use super::params::{self, JOINED_ROWS, MAX_SETS, MAX_TRANSFORMS};
use super::tables::feedback_floats;
use super::view::{Address, Workspace};
use super::Limits;
use crate::error::{Error, ErrorKind, Result};
use crate::shape::{Gauge, LayerShape, MAX_TIERS, SideShape};
use crate::workspace::{ALIGN, Arena, size_of_pieces};

const KEYS_PER_WARP: usize = 32;
const STAGES: usize = 2;
/// Two barriers for each of four stages.
const BARRIER_BYTES: usize = 64;
/// Units (a tile of four rows of a stream) that a block of the fold kernel takes at a time, at most, as many as its warps; and how
/// many units of all KV heads there are to each of these. Powers of two.
const FOLD_WARPS: usize = 8;
const FOLD_HEADS: usize = 16;
/// Bytes that a row has in each group of its unit's fragments.
const FOLDED_ROW: usize = 64;
const FOLD_THREADS: usize = 32 * FOLD_WARPS;
/// Warps of a block of the one for many rows, each with a tile of sixteen rows of a stream.
const FOLD_ROWS_WARPS: usize = 4;
const MOST_WARPS: usize = 8;
/// Warps of a block of the kernel of many queries are a multiple of this: they share the look-ups, and some devices' tensor cores want
/// them so; there, as many more look levels up.
const WARP_GROUP: usize = 4;
/// Warps of a block of the merge kernel, at most, and of the one for many rows.
const MERGE_WARPS: usize = 16;
const MERGE_MANY_WARPS: usize = 8;
/// Blocks of the tail's kernel: as many share four rows as keep the whole at this number.
const TAIL_BLOCKS: usize = 512;
const TAIL_THREADS: usize = 128;
const MOST_RUNS: usize = 16;
const RUN_BYTES: usize = 8;
/// What the kernel of many queries keeps of a row.
const SEES_BYTES: usize = 16;
/// Chunks of a row of its stages, at most.
const MOST_CHUNKS: usize = 64;
/// Bytes of the barriers of a tile's levels.
const LEVEL_BARRIERS: usize = 4 * 8;
/// Bytes that a tile's levels are a multiple of, for warp groups.
const SWIZZLED: usize = 1024;
/// Rows of one of its warps.
const PREFILL_ROWS: usize = 16;
/// What it keeps of a key of a stage: its slot.
const SLOT_BYTES: usize = 4;
/// Floats of a part's sums: a weight per set and the maximum.
const SUMS: usize = MAX_SETS + 1;
/// Waves of blocks that keys are split into, at most.
const MOST_WAVES: usize = 4;

/// Rows up to which the first two kernels of attention take them; the second takes eight at a time, and is worth it even if all keys are
/// read several times: to few rows, what a block of the kernel for many looks up is worth less than the look-ups (on an H200, 16,384
/// keys, group of four: 4 queries 26 us by the one and 81 by the other, 16 queries 72 and 92, 32 queries 130 and 86).
const ATTEND_ROWS: [usize; 2] = [4, 64];
/// The same with warp groups, by which few rows take as long as 64: 4,096 keys 30 us, 16,384 46, 131,072 201 (eight at a time 8 queries take
/// 21, 42 and 236, 16 queries 31, 73 and 472).
const ATTEND_ROWS_OF_GROUPS: [usize; 2] = [4, 40];

/// The kernels of a layer and what is fixed about their launches.
#[derive(Debug, Clone)]
pub struct LayerKernels {
    encode: Kernel,
    /// The same for few tokens: a row to a block.
    encode_few: Kernel,
    dequantize: Kernel,
    fold: Kernel,
    /// The same for many rows.
    fold_many: Kernel,
    merge: Kernel,
    /// The same for many rows.
    merge_many: Kernel,
    tail: Kernel,
    /// Decode with one and two tiles of four rows, prefill; and rows up to which the first two take them.
    attend: [Variant; 3],
    attend_rows: [usize; 2],
    encode_shared: usize,
    encode_few_shared: usize,
    /// Blocks to a row of few.
    few_blocks: usize,
    /// Tokens up to which each row has a block of its own.
    few: usize,
    k_groups: usize,
    /// Units that a block of the fold kernel takes, at most: a power of two.
    fold_units: usize,
    /// Bytes of shared memory of the one for many rows, and blocks of it that run at once.
    fold_many_shared: usize,
    fold_blocks: usize,
    /// And of merge for many rows.
    merge_blocks: usize,
    v_transforms: usize,
}

#[derive(Debug, Clone, Copy)]
struct Variant {
    kernel: Kernel,
    prefill: bool,
    /// Tiles of four rows to a warp.
    nt: usize,
    /// Warps of a block without rows of their own; those with rows, at least, and at most.
    more_warps: usize,
    least_warps: usize,
    most_warps: usize,
    /// Keys that a block takes in at a time.
    tile_keys: usize,
    heads_per_block: usize,
    key_warps: usize,
    /// Bytes of shared memory of a block.
    shared: usize,
    /// Blocks that run at once.
    blocks: usize,
}

/// Rows that share a block of the dequantize kernel, and its threads.
const DEQUANTIZE_ROWS: usize = 8;
const DEQUANTIZE_THREADS: usize = 128;
/// Rows of a block of the encode kernel, and its threads.
const ENCODE_ROWS: usize = 16;
const ENCODE_THREADS: usize = 256;
/// Blocks of single rows to a multiprocessor, at most.
const FEW_BLOCKS: usize = 4;
/// Latents to a block of those that share a large matrix.
const FEW_LATENTS: usize = 32;

/// Bytes of its shared memory, as encode.cuh's `EncodeLayout`.
fn encode_shared(d: usize) -> usize {
    let (pass_rows, n_stages) = if d <= 192 { (ENCODE_ROWS, 4) } else { (ENCODE_ROWS / 2, 3) };
    let (codes, latents) = (4 * (d + 8), 4 * (d + 4));
    let (stages, errors) = (n_stages * 16 * d * 4, pass_rows * 4 * (d + 4 * MAX_TIERS) * 4);
    ENCODE_ROWS * (codes + latents) + stages.max(errors) + if d <= 128 { 112 * d } else { 0 }
}

/// The same for a row to a block, as encode.cuh's `AloneLayout`, and blocks of a row.
fn encode_few_cut(shape: &LayerShape) -> (usize, usize) {
    let of = |side: &SideShape| {
        let (d, weights) = (side.head_dim, 4 * feedback_floats(side));
        let work = if d <= 128 { d * d * 4 + weights } else { (d * FEW_LATENTS * 4).max(weights) };
        work + MAX_SETS * 2 * d
    };
    let d = shape.k.head_dim;
    (of(&shape.k).max(of(&shape.v)), if d <= 128 { 1 } else { d / FEW_LATENTS })
}

/// Bytes of shared memory of a block of the fold kernel for many rows, as fold_rows.cuh's `fold_rows_shared_bytes`: means, matrix.
fn fold_many_shared(d: usize) -> usize {
    let chunks = if d <= 128 { d } else { 2 * 64 };
    (MAX_SETS + chunks) * (d + 8) * 2
}

/// And of the one for few, as fold.cuh's `fold_shared_bytes`.
fn fold_shared(d: usize, k_groups: usize, units: usize) -> usize {
    fold_many_shared(d) + 8 * units * (d + 8) * 2 + 4 * units * (d + 8) * 4 + FOLD_WARPS * k_groups * FOLDED_ROW
}

/// How the kernel of many queries works on a device: with mma of warps, or of warp groups.
#[derive(Debug, Clone, Copy)]
struct PrefillCut {
    /// Warps of a block that have rows, at most.
    warps: usize,
    /// With warp groups. Each block has all its warps then.
    groups: bool,
    /// Keys of a tile, and tiles whose levels have a place.
    keys: usize,
    buffers: usize,
    /// Bytes of folded queries that a warp group keeps, once or twice.
    query_slot: usize,
}

/// As prefill_levels.cuh's `PrefillTile`; `groups` says what the device can. Rows that are no whole panels have none.
fn prefill_cut(d: usize, groups: bool) -> PrefillCut {
    let groups = groups && (d == 64 || d % 128 == 0);
    let (warps, keys, buffers) = match d {
        ..=64 if !groups => (16, 64, 2),
        ..=128 => (12, 64, if groups { 3 } else { 2 }),
        _ => (8, 32, 2),
    };
    PrefillCut { warps, groups, keys, buffers, query_slot: if groups { 2 * WARP_GROUP * PREFILL_ROWS * d } else { 0 } }
}

/// Bytes of its shared memory with so many warps and slots of queries, as prefill_tiles.cuh's `PrefillShared`.
fn prefill_shared(shape: &LayerShape, cut: &PrefillCut, warps: usize, query_slots: usize) -> usize {
    let (d_k, d_v, keys) = (shape.k.head_dim, shape.v.head_dim, cut.keys);
    let planes = shape.k.planes.iter().chain(&shape.v.planes).map(|p| (p.offset, p.head_bytes));
    let parts: Vec<_> = planes.chain([(shape.k.headers_offset, 2), (shape.v.headers_offset, 2)]).collect();
    let chunks_of = |head: usize| parts.iter().map(|&(at, bytes)| ((at + head * bytes) % 16 + bytes).div_ceil(16)).sum::<usize>();
    let chunks = if shape.n_kv_heads == 1 { shape.slot_bytes / 16 } else { (0..shape.n_kv_heads).map(chunks_of).max().expect("a head") };
    // Levels of keys are bytes, those of values f16: in panels, or each row in an odd number of chunks. Two scales, two sets.
    let levels = if cut.groups { d_k + 2 * d_v } else { ((d_k / 16 | 1) + (d_v / 8 | 1)) * 16 };
    let tile = (keys * (levels + 2 * 4 + 1)).next_multiple_of(if cut.groups { SWIZZLED } else { 16 });
    let of_rows = warps * PREFILL_ROWS * (SEES_BYTES + MAX_SETS * 4) + warps / WARP_GROUP * query_slots * cut.query_slot;
    2 * keys * ((chunks | 1) * 16 + SLOT_BYTES) + cut.buffers * (tile + LEVEL_BARRIERS) + of_rows + 2 * MOST_CHUNKS
}

/// Codes of 32 channels of a tier are a group.
fn groups(side: &SideShape) -> usize {
    side.plan.tiers.iter().map(|t| t.channels.div_ceil(32)).sum()
}

/// Whether all planes start where the fast loads want them.
fn planes_aligned(shape: &LayerShape) -> bool {
    let fits = |bytes: usize, at: usize, to: usize| bytes % to != 0 || at % to == 0;
    shape.k.planes.iter().chain(&shape.v.planes).all(|p| [4, 16].iter().all(|&to| fits(p.head_bytes, p.offset, to)))
}

/// Bytes from row to row in shared memory, at most: an odd number of 16-byte chunks.
fn row_stride(shape: &LayerShape, heads: usize) -> usize {
    if heads == shape.n_kv_heads {
        return (shape.slot_bytes / 16 | 1) * 16;
    }
    let planes = shape.k.planes.iter().chain(&shape.v.planes).map(|p| (p.offset, p.head_bytes));
    let headers = [(shape.k.headers_offset, 2), (shape.v.headers_offset, 2)];
    // Groups of heads that start within a chunk can need one more than the first group.
    let chunks: usize = planes.chain(headers).map(|(at, bytes)| (at % 16 + heads * bytes).div_ceil(16) + 1).sum();
    (chunks | 1) * 16
}

impl LayerKernels {
    /// Looks the kernels up. The device's context is current.
    pub fn new(device: &Device, shape: &LayerShape) -> Result<Self> {
        let (d, k, v) = (shape.k.head_dim, shape.k.plan.id, shape.v.plan.id);
        let absent = |what: &str| {
            Error::unsupported(format!(
                "this library has no CUDA {what} for head_dim_k {d}, head_dim_v {}, k_plan {k} and v_plan {v}",
                shape.v.head_dim
            ))
        };
        if shape.v.head_dim != d {
            return Err(absent("kernel"));
        }
        let find = |name: String| device.kernel(&name)?.ok_or_else(|| absent("kernel"));
        let suffix = if planes_aligned(shape) { "" } else { "u" };
        let attend = |name: String| match device.kernel(&format!("{name}{suffix}"))? {
            Some(kernel) => Ok(kernel),
            None => Err(absent(&format!("attention on {} KV heads", shape.n_kv_heads))),
        };
        let n1 = Self::decode(device, shape, attend(format!("dq_attend_{d}_{k}_{v}_n1"))?, 1)?;
        let n2 = Self::decode(device, shape, attend(format!("dq_attend_{d}_{k}_{v}_n2"))?, 2)?;
        let prefill = Self::prefill(device, shape, attend(format!("dq_prefill_{d}_{k}_{v}"))?)?;
        let (encode_few_shared, few_blocks) = encode_few_cut(shape);
        let encode_few = find(format!("dq_encode_few_{d}_{k}_{v}"))?;
        let fits = encode_few_shared <= device.dynamic_shared(encode_few)?;
        let (fold, fold_many) = (find(format!("dq_fold_{d}_{k}_{v}"))?, find(format!("dq_fold_many_{d}_{k}_{v}"))?);
        let k_groups = groups(&shape.k);
        let fold_room = device.dynamic_shared(fold)?;
        let Some(fold_units) = (0..=FOLD_WARPS.ilog2()).rev().map(|i| 1 << i).find(|&n| fold_shared(d, k_groups, n) <= fold_room) else {
            return Err(absent("fold that fits this device"));
        };
        let merge_many = find(format!("dq_merge_many_{d}_{k}_{v}"))?;
        let at_once = |kernel, threads, shared| Ok(device.sms * device.blocks_per_sm(kernel, threads, shared)?);
        let merge_many_threads = 32 * MERGE_MANY_WARPS;
        Ok(Self {
            encode: find(format!("dq_encode_{d}_{k}_{v}"))?,
            dequantize: find(format!("dq_dequantize_{d}_{k}_{v}"))?,
            fold,
            fold_many,
            merge: find(format!("dq_merge_{d}_{k}_{v}"))?,
            merge_many,
            tail: find("dq_tail".into())?,
            attend: [n1, n2, prefill],
            attend_rows: if prefill.more_warps > 0 { ATTEND_ROWS_OF_GROUPS } else { ATTEND_ROWS },
            encode_few,
            encode_shared: encode_shared(d),
            encode_few_shared,
            few_blocks,
            few: match (fits, few_blocks) {
                (false, _) => 0,
                (true, 1) => FEW_BLOCKS * device.sms / (2 * shape.n_kv_heads),
                (true, _) => JOINED_ROWS / shape.n_kv_heads,
            },
            k_groups,
            fold_units,
            fold_many_shared: fold_many_shared(d),
            fold_blocks: at_once(fold_many, 32 * FOLD_ROWS_WARPS, fold_many_shared(d))?,
            merge_blocks: at_once(merge_many, merge_many_threads, merge_shared(shape.v.head_dim, merge_many_threads))?,
            v_transforms: if shape.v.gauge == Gauge::Attention { MAX_TRANSFORMS } else { 1 },
        })
    }

    /// A block takes as many heads of a slot as its warps and the device's shared memory allow, two blocks to a
    /// multiprocessor where that is possible.
    fn decode(device: &Device, shape: &LayerShape, kernel: Kernel, nt: usize) -> Result<Variant> {
        let cut = |warps: usize| {
            let heads = (1..=warps).rev().find(|h| shape.n_kv_heads % h == 0).expect("one divides all");
            let key_warps = warps / heads;
            let stages = STAGES * KEYS_PER_WARP * key_warps * row_stride(shape, heads);
            // Where the stages were, warps that share a head are joined, as attend.cuh's `KeyWarps`.
            let joined = if key_warps > 1 { heads * key_warps * 4 * nt * (shape.v.head_dim + SUMS) * 4 } else { 0 };
            let shared = stages.max(joined)
                + BARRIER_BYTES
                + MOST_RUNS * RUN_BYTES
                + heads * key_warps * MAX_SETS * 4 * nt * 4;
            (heads, key_warps, shared)
        };
        let fits = |limit: usize| (0..4).map(|i| cut(MOST_WARPS >> i)).find(|c| c.2 <= limit);
        // 1 KiB of each block is the system's.
        let half = (device.sm_shared / 2).saturating_sub(1024);
        let best = fits(half).filter(|c| c.0 * c.1 == MOST_WARPS).or_else(|| fits(device.block_shared));
        let Some((heads_per_block, key_warps, shared)) = best else {
            return Err(Error::unsupported(format!(
                "attention on records of {} bytes needs more than the {} bytes of shared memory of this device",
                shape.slot_bytes, device.block_shared
            )));
        };
        let blocks = device.sms * device.blocks_per_sm(kernel, 32 * heads_per_block * key_warps, shared)?;
        let tile_keys = KEYS_PER_WARP * key_warps;
        Ok(Variant { kernel, prefill: false, nt, more_warps: 0, least_warps: 1, most_warps: MOST_WARPS, tile_keys, heads_per_block, key_warps, shared, blocks })
    }

    fn prefill(device: &Device, shape: &LayerShape, kernel: Kernel) -> Result<Variant> {
        let cut = prefill_cut(shape.k.head_dim, device.group_mma()?);
        let shared = |warps, slots| (warps, prefill_shared(shape, &cut, warps, slots));
        // Warp groups keep queries of two linear parts where there is room. Each warp has sums of its own: without groups some shapes have
        // room for fewer of them on devices with 99 KB.
        let cuts = if cut.groups {
            vec![shared(cut.warps, 2), shared(cut.warps, 1)]
        } else {
            [cut.warps, MOST_WARPS, WARP_GROUP].map(|warps| shared(warps, 0)).to_vec()
        };
        let Some(&(most_warps, shared)) = cuts.iter().find(|c| c.1 <= device.block_shared) else {
            return Err(Error::unsupported(format!(
                "attention of many queries needs {} bytes of shared memory; this device has {}",
                cuts[cuts.len() - 1].1, device.block_shared
            )));
        };
        let more_warps = if cut.groups { WARP_GROUP } else { 0 };
        let blocks = device.sms * device.blocks_per_sm(kernel, 32 * (most_warps + more_warps), shared)?;
        let least_warps = if cut.groups { most_warps } else { WARP_GROUP };
        let nt = PREFILL_ROWS / 4;
        Ok(Variant { kernel, prefill: true, nt, more_warps, least_warps, most_warps, tile_keys: cut.keys, heads_per_block: 1, key_warps: 1, shared, blocks })
    }

    /// Whether rows of so many tokens have a block each.
    pub fn encodes_alone(&self, tokens: usize) -> bool {
        tokens <= self.few
    }

    /// Encode of so many tokens.
    pub fn encode(&self, shape: &LayerShape, tokens: usize) -> Launch {
        let (kernel, blocks, shared) = if self.encodes_alone(tokens) {
            (self.encode_few, tokens * self.few_blocks, self.encode_few_shared)
        } else {
            (self.encode, tokens.div_ceil(ENCODE_ROWS), self.encode_shared)
        };
        Launch { kernel, grid: (blocks, shape.n_kv_heads, 2), threads: ENCODE_THREADS, shared }
    }

    pub fn dequantize(&self, shape: &LayerShape, slots: usize) -> Launch {
        let grid = (slots.div_ceil(DEQUANTIZE_ROWS), shape.n_kv_heads, 2);
        Launch { kernel: self.dequantize, grid, threads: DEQUANTIZE_THREADS, shared: 0 }
    }

    /// Which kernel takes so many rows (queries times query heads of a KV head): its number in `attend`.
    fn taken_by(&self, rows: usize) -> usize {
        self.attend_rows.iter().filter(|&&most| rows > most).count()
    }

    fn variant(&self, rows: usize) -> &Variant {
        &self.attend[self.taken_by(rows)]
    }
}

/// Launches of one attention.
#[derive(Debug, Clone, Copy)]
pub struct AttendPlan {
    pub fold: Launch,
    pub tail: Option<Launch>,
    pub attend: Launch,
    pub merge: Launch,
}

impl Variant {
    fn row_tiles(&self, rows: usize) -> usize {
        rows.div_ceil(4 * self.nt)
    }

    /// Warps of a block that have rows.
    fn warps(&self, rows: usize) -> usize {
        if self.prefill { self.row_tiles(rows).next_multiple_of(WARP_GROUP).clamp(self.least_warps, self.most_warps) } else { self.heads_per_block * self.key_warps }
    }

    /// Blocks for one split of the keys.
    fn others(&self, shape: &LayerShape, streams: usize, rows: usize) -> usize {
        let of_rows = if self.prefill { self.row_tiles(rows).div_ceil(self.warps(rows)) } else { self.row_tiles(rows) };
        shape.n_kv_heads / self.heads_per_block * of_rows * streams
    }

    /// Splits of the keys: the least number of waves whose last one is nearly full, no split without a tile.
    fn splits(&self, shape: &LayerShape, streams: usize, rows: usize, keys: usize) -> usize {
        let (others, tiles) = (self.others(shape, streams, rows).max(1), keys.div_ceil(self.tile_keys).max(1));
        if others >= self.blocks && self.prefill {
            return 1;
        }
        let mut best = (0, 1);
        for waves in 1..=MOST_WAVES {
            let splits = (waves * self.blocks / others).clamp(1, tiles);
            let share = tiles.div_ceil(splits);
            let splits = tiles.div_ceil(share);
            // Work done per time of the longest: tiles of all over waves times the longest share.
            let used = (splits * others).div_ceil(self.blocks) * share * self.blocks;
            let score = 1000 * tiles * others / used.max(1);
            // Where there is work for few blocks only, all scores are low, and one wave is as many as there can be.
            if waves == 1 || score > best.0 + 30 {
                best = (score, splits);
            }
        }
        best.1
    }
}

/// Pieces of the workspace.
#[derive(Debug, Clone, Copy)]
struct Pieces {
    folded: *mut u8,
    folded_scales: *mut f32,
    constants: *mut f32,
    partial: *mut f32,
    partial_sums: *mut f32,
}

/// What the pieces are counted by.
#[derive(Debug, Clone, Copy)]
struct Counts {
    /// (stream, KV head, tile of four rows)
    tiles: usize,
    /// (row, part)
    partials: usize,
}

fn lay(arena: &mut Arena, kernels: &LayerKernels, d_v: usize, c: Counts) -> Pieces {
    Pieces {
        folded: arena.take(c.tiles.saturating_mul(MAX_TRANSFORMS * kernels.k_groups * 4 * FOLDED_ROW)),
        folded_scales: arena.take(c.tiles.saturating_mul(MAX_TRANSFORMS * 4)),
        constants: arena.take(c.tiles.saturating_mul(MAX_SETS * 4)),
        partial: arena.take(c.partials.saturating_mul(d_v)),
        partial_sums: arena.take(c.partials.saturating_mul(SUMS)),
    }
}

/// Blocks to a KV head that share the tiles of sixteen rows of all its linear parts, of which the device knows the number: as many as run
/// at once, but no more than there is work for, and at least one to each part.
fn fold_sharers(tiles: usize, at_once: usize, kv_heads: usize) -> usize {
    (at_once / kv_heads).min(tiles.div_ceil(FOLD_ROWS_WARPS) * MAX_TRANSFORMS).max(MAX_TRANSFORMS)
}

/// Parts of each row's result over a tail; `tiles` counts (stream, KV head, four rows).
fn tail_parts(tiles: usize, tail: usize) -> usize {
    tail.div_ceil(KEYS_PER_WARP).min((TAIL_BLOCKS / tiles.max(1)).max(1))
}

/// Warps enough to load the parts of a row at once, as merge.cuh's `MERGE_AT_ONCE`, and where a matrix unfolds the output
/// several for that.
fn merge_threads(d: usize, parts: usize, v_transforms: usize) -> usize {
    let at_once = if d <= 128 { 8 } else { 4 };
    let least = if v_transforms == 1 { 1 } else { 4 };
    32 * parts.div_ceil(at_once).clamp(least, MERGE_WARPS)
}

/// Blocks to a (stream, KV head) of the merge kernel for many rows, each row a warp's, where they keep all warps that run at once
/// busy. Not with more parts than a warp loads in two turns: the other kernel loads more at a time.
fn merge_sharers(parts: usize, heads: usize, rows: usize, at_once: usize) -> Option<usize> {
    let serves = parts <= 4 && heads * rows >= MERGE_MANY_WARPS * at_once;
    serves.then(|| (at_once / heads).clamp(1, rows.div_ceil(MERGE_MANY_WARPS)))
}

/// Bytes of its shared memory, as merge.cuh's `merge_shared_bytes`.
fn merge_shared(d: usize, threads: usize) -> usize {
    threads / 32 * d * 4
}

/// Bytes of workspace for any attention within the limits.
pub fn workspace_size(shape: &LayerShape, kernels: &LayerKernels, limits: Limits) -> Result<usize> {
    let rows = limits.queries.saturating_mul(shape.group());
    let heads = limits.streams.saturating_mul(shape.n_kv_heads);
    if heads.saturating_mul(rows) >= usize::MAX >> 24 {
        return Err(Error::invalid(format!(
            "{} streams of {} queries are more than any workspace holds",
            limits.streams, limits.queries
        )));
    }
    let mut counts = Counts { tiles: 0, partials: 0 };
    // Fewer rows may go to the kernels ahead of the one that takes them all.
    let of_kernels = kernels.attend.iter().zip(kernels.attend_rows.into_iter().chain([usize::MAX]));
    for (v, most_rows) in of_kernels.take(kernels.taken_by(rows) + 1) {
        let rows = rows.min(most_rows);
        counts.tiles = counts.tiles.max(heads * v.row_tiles(rows) * v.nt);
        // As in `splits`: blocks are at most the waves' or one to each of the others; so many rows has a block.
        let of_blocks = (MOST_WAVES * v.blocks).saturating_mul(v.heads_per_block * 4 * v.nt * if v.prefill { v.most_warps } else { 1 });
        let splits = limits.kv.div_ceil(v.tile_keys).max(1);
        let parts = (heads * rows).saturating_mul(splits).min((heads * rows).max(of_blocks));
        counts.partials = counts.partials.max(parts.saturating_mul(kernels.v_transforms));
    }
    // As in `tail_parts`: either one to a row or four rows to each of the blocks.
    let of_tail = (heads * rows).saturating_mul(limits.tail.div_ceil(KEYS_PER_WARP)).min((heads * rows).max(4 * TAIL_BLOCKS));
    counts.partials = counts.partials.saturating_add(of_tail);
    Ok(size_of_pieces(|arena| lay(arena, kernels, shape.v.head_dim, counts)))
}

/// Cuts one attention: fills in the cut and the workspace of `p` and says what is to be launched.
pub fn plan_attend(
    shape: &LayerShape,
    kernels: &LayerKernels,
    p: &mut params::Attend,
    workspace: Workspace,
) -> Result<AttendPlan> {
    let (streams, keys) = (p.n_streams as usize, p.n_kv as usize);
    let rows = p.n_q as usize * shape.group();
    let v = kernels.variant(rows);
    let (row_tiles, splits) = (v.row_tiles(rows), v.splits(shape, streams, rows, keys));
    let n_tiles = row_tiles * v.nt;
    let heads = streams * shape.n_kv_heads;
    let of_four = rows.div_ceil(4);
    let tail_parts = tail_parts(heads * of_four, p.tail.n_rows as usize);
    let parts = splits * kernels.v_transforms + tail_parts;
    let counts = Counts { tiles: heads * n_tiles, partials: heads * rows * parts };

    // The size query bounds this; here is what this very call takes.
    let need = size_of_pieces(|arena| lay(arena, kernels, shape.v.head_dim, counts));
    if workspace.data == 0 || workspace.data % ALIGN as u64 != 0 {
        return Err(Error::new(ErrorKind::Workspace, format!("workspace must be aligned to {ALIGN} bytes and not null")));
    }
    if need as u64 > workspace.bytes {
        return Err(Error::new(
            ErrorKind::Workspace,
            format!("workspace has {} bytes; this call needs {need}", workspace.bytes),
        ));
    }
    let mut arena = Arena::at(workspace.data as usize);
    let pieces = lay(&mut arena, kernels, shape.v.head_dim, counts);

    p.heads_per_block = v.heads_per_block as u32;
    p.key_warps = v.key_warps as u32;
    p.n_splits = splits as u32;
    p.row_tiles = row_tiles as u32;
    p.v_transforms = kernels.v_transforms as u32;
    p.folded = pieces.folded.addr() as Address;
    p.folded_scales = pieces.folded_scales.addr() as Address;
    p.constants = pieces.constants.addr() as Address;
    p.partial = pieces.partial.addr() as Address;
    p.partial_sums = pieces.partial_sums.addr() as Address;
    p.tail.parts = tail_parts as u32;
    let units = (heads * n_tiles / FOLD_HEADS).next_power_of_two().clamp(1, kernels.fold_units);
    p.fold_tiles = n_tiles as u32;
    p.fold_units = units as u32;

    let fold = if v.prefill {
        let sharers = fold_sharers(streams * row_tiles, kernels.fold_blocks, shape.n_kv_heads);
        Launch { kernel: kernels.fold_many, grid: (shape.n_kv_heads, sharers, 1), threads: 32 * FOLD_ROWS_WARPS, shared: kernels.fold_many_shared }
    } else {
        // Runs of units, over two dimensions of the grid: one alone ends at 65,535.
        let runs = (streams * n_tiles).div_ceil(units);
        let run_rows = runs.div_ceil(MOST_BLOCKS_Y);
        Launch {
            kernel: kernels.fold,
            grid: (shape.n_kv_heads * MAX_TRANSFORMS, runs.div_ceil(run_rows), run_rows),
            threads: FOLD_THREADS,
            shared: fold_shared(shape.k.head_dim, kernels.k_groups, units),
        }
    };

    let y = if v.prefill {
        shape.n_kv_heads * row_tiles.div_ceil(v.warps(rows))
    } else {
        shape.n_kv_heads / v.heads_per_block * row_tiles
    };
    let most_parts = splits.max(tail_parts);
    let sharers = if v.prefill && kernels.v_transforms == 1 {
        merge_sharers(most_parts, heads, rows, kernels.merge_blocks)
    } else {
        None
    };
    let (merge, merge_grid, merge_threads) = match sharers {
        Some(sharers) => (kernels.merge_many, (sharers, shape.n_kv_heads, streams), 32 * MERGE_MANY_WARPS),
        None => (kernels.merge, (heads * rows, 1, 1), merge_threads(shape.v.head_dim, most_parts, kernels.v_transforms)),
    };
    Ok(AttendPlan {
        fold,
        tail: (tail_parts > 0).then_some(Launch {
            kernel: kernels.tail,
            grid: (of_four * tail_parts, shape.n_kv_heads, streams),
            threads: TAIL_THREADS,
            shared: 0,
        }),
        attend: Launch {
            kernel: v.kernel,
            grid: (splits, y, streams * kernels.v_transforms),
            threads: 32 * (v.warps(rows) + v.more_warps),
            shared: v.shared,
        },
        merge: Launch {
            kernel: merge,
            grid: merge_grid,
            threads: merge_threads,
            shared: merge_shared(shape.v.head_dim, merge_threads),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fold_of_many_rows_has_a_block_for_each_linear_part() {
        // 512 queries of 32 heads over 8, 3 blocks to each of 132 multiprocessors: one wave.
        assert_eq!(fold_sharers(128, 396, 8), 49);
        // No more blocks than have a full turn each if all linear parts are named.
        assert_eq!(fold_sharers(5, 396, 8), 2 * MAX_TRANSFORMS);
        // The kernel divides by the number of parts: it may not get fewer blocks than there are parts.
        for kv_heads in [1, 8, 64, 1000] {
            for tiles in [1, 7, 100_000] {
                let sharers = fold_sharers(tiles, 396, kv_heads);
                assert!(sharers >= MAX_TRANSFORMS && (sharers == MAX_TRANSFORMS || sharers * kv_heads <= 396));
            }
        }
    }

    #[test]
    fn warp_groups_take_whole_panels() {
        for d in [80, 96, 192] {
            let (with, without) = (prefill_cut(d, true), prefill_cut(d, false));
            assert!(!with.groups && with.warps == without.warps && with.buffers == without.buffers && with.query_slot == 0);
        }
        assert!([64, 128, 256].iter().all(|&d| prefill_cut(d, true).groups && !prefill_cut(d, false).groups));
        // High and low bytes of 64 queries.
        assert_eq!((prefill_cut(128, true).warps, prefill_cut(128, true).query_slot), (12, 16384));
    }

    #[test]
    fn merge_of_many_rows_is_one_wave() {
        // 512 queries of 32 heads over 8.
        assert_eq!(merge_sharers(1, 8, 2048, 528), Some(66));
        assert_eq!(merge_sharers(5, 8, 2048, 528), None);
        assert_eq!(merge_sharers(1, 8, 256, 528), None);
        // Many streams: a block to each head, however many there are; and none without a row.
        assert_eq!(merge_sharers(1, 2000, 16, 528), Some(1));
        assert_eq!(merge_sharers(1, 2, 24, 4), Some(2));
    }
}
