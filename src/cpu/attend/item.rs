//! One work item: a block of query rows of one KV head over one chunk of keys.
//!
//! Phases of a tile of keys: mask, headers, scores (levels of keys, product, softmax), outputs (levels of values,
//! product). Rows are (query, head of the group) pairs, heads fastest.
//!
//! Rows of a tile may name different sets. Folded queries and coded outputs belong to a transform, which sets share;
//! constants and sums of probabilities to a set. Nearly all tiles hold one set, and take the short way.

use half::f16;
use std::mem::MaybeUninit;

use super::engine::{Engine, Tile};
use super::fold::{self, Folded, fold, unfold};
use super::keys::{Keys, Sight};
use super::lanes::{MAX_LANES, SideLanes, TierLanes};
use super::product::{Left, Outputs, Right, Scores};
use super::row::{self, SOFTMAX_ROWS, Softmax, Weights};
use super::{LOW_STRIDE, MAX_ROWS, MAX_TILE, ROW_FLOATS};
use crate::cpu::simd::{LANES, Simd};
use crate::factor::HeadSets;
use crate::shape::MAX_SETS;
use crate::view::{Mask, MaskType};

/// What an item works on.
pub struct Item<'a> {
    pub k: &'a SideLanes,
    pub v: &'a SideLanes,
    pub k_sets: &'a HeadSets,
    pub v_sets: &'a HeadSets,
    pub records: Keys<'a>,
    pub tile: usize,
    pub keys: std::ops::Range<usize>,
    /// First byte, and bytes, of records that the thread comes to later: to be asked for while it works on these, never read.
    pub later: (*const u8, usize),
    /// Whether the thread has asked for this item's records that way.
    pub asked: bool,
    pub head: usize,
    pub mask: Option<Mask<'a>>,
    /// Who sees what without a mask.
    pub sight: Sight,
    pub stream: usize,
    pub group: usize,
    pub first_row: usize,
    pub rows: usize,
    pub scale: f32,
    pub softcap: f32,
    /// The result: `[row][out_stride]`, and (largest score, sum of probabilities) as `[row][2 * stats_stride]`.
    pub out: *mut f32,
    pub out_stride: usize,
    pub stats: *mut f32,
    pub stats_stride: usize,
}

/// Transforms of values whose outputs are kept.
const OUTPUTS: usize = 2;
/// Blocks of folded queries that are kept: so many of full size, or more of small ones.
const FULL_FOLDS: usize = 3;
const MOST_FOLDS: usize = 32;

/// What a thread keeps from one item to the next.
#[derive(Default)]
pub struct Kept {
    /// The orders of channels are in the scratch.
    ordered: bool,
    /// Stream, first row and rows of the queries whose folds are in the scratch.
    queries: (usize, usize, usize),
    /// KV head and transform of each fold; the next one to be replaced.
    folds: [Option<(usize, usize)>; MOST_FOLDS],
    next_fold: usize,
}

/// Everything that lives on the stack: about 350 KB, of which a decode step touches a few.
#[repr(C, align(64))]
pub struct Scratch {
    /// Queries, `[row][head_dim]`.
    pub q: [f32; ROW_FLOATS],
    folded: [i32; FULL_FOLDS * ROW_FLOATS / 2],
    folded_start: [[i32; MAX_ROWS]; MOST_FOLDS],
    folded_step: [[f32; MAX_ROWS]; MOST_FOLDS],
    /// Levels of the tile, of keys and then of values.
    levels: [i32; super::TILE_LANES],
    low: [u8; MAX_TILE * LOW_STRIDE],
    /// Scores, then probabilities, `[row][tile]`; weights likewise.
    scores: [f32; MAX_ROWS * MAX_TILE],
    weights: [i16; MAX_ROWS * MAX_TILE],
    weights_sum: [i32; MAX_ROWS],
    weights_step: [f32; MAX_ROWS],
    /// `[query][tile]`, in units of log2.
    mask: [f32; MAX_ROWS * MAX_TILE],
    /// Coded outputs, `[row][lane]`.
    outputs: [[f32; ROW_FLOATS]; OUTPUTS],
    /// `q . mean`, `[set][row]`, and sums of probabilities, `[row][set]`.
    constants: [[f32; MAX_ROWS]; MAX_SETS],
    sums: [f32; MAX_ROWS * MAX_SETS],
    /// Largest score so far, and what the last tile's growth leaves of earlier sums.
    largest: [f32; MAX_ROWS],
    keep: [f32; MAX_ROWS],
    /// Scale of each key and value row of the tile; the scales of one transform's rows.
    k_scale: [f32; MAX_TILE],
    v_scale: [f32; MAX_TILE],
    some_scale: [f32; MAX_TILE],
    k_set: [u8; MAX_TILE],
    v_set: [u8; MAX_TILE],
    k_order: [u16; MAX_LANES],
    v_order: [u16; MAX_LANES],
}

/// Transforms present in a tile: a key and the sets that share it, in order of their lowest set.
struct Present {
    keys: [usize; MAX_SETS],
    sets: [u16; MAX_SETS],
    n: usize,
}

impl Present {
    #[inline(always)]
    fn new(sets: &HeadSets, mask: u16) -> Self {
        let mut out = Self { keys: [0; MAX_SETS], sets: [0; MAX_SETS], n: 0 };
        let mut rest = mask;
        while rest != 0 {
            let id = rest.trailing_zeros() as u8;
            rest &= rest - 1;
            let key = fold::key(sets, id);
            let at = out.keys[..out.n].iter().position(|&k| k == key).unwrap_or(out.n);
            if at == out.n {
                out.keys[at] = key;
                out.n += 1;
            }
            out.sets[at] |= 1 << id;
        }
        out
    }
}

/// What a tile's mask leaves.
enum Visible {
    Nothing,
    /// Every key to every query, nothing added.
    Everything,
    /// Mask values are in the scratch; the bits are keys that some query sees.
    Some(u64),
}

struct State<'a, 'b, S: Engine> {
    s: S,
    item: &'a Item<'b>,
    x: *mut Scratch,
    kept: &'a mut Kept,
    /// Bytes of `later` that have been asked for, and how many lines are each time.
    asked: usize,
    lines: usize,
    /// Transforms in `outputs`: (transform, a set that has it).
    slots: [Option<(usize, u8)>; OUTPUTS],
    next_slot: usize,
    /// Sets whose constants are known, and sets that values have named.
    k_known: u16,
    v_seen: u16,
    /// Factor of scores: to units of log2, or to shares of the cap.
    factor: f32,
}

/// # Safety
/// `item` describes readable records for all keys that its mask shows, a mask that covers its rows and keys, and room
/// for the result; `scratch.q` holds the rows' queries.
#[inline(always)]
pub unsafe fn run<S: Engine>(s: S, item: &Item<'_>, kept: &mut Kept, scratch: &mut MaybeUninit<Scratch>) {
    let x = scratch.as_mut_ptr();
    let log2 = std::f32::consts::LOG2_E;
    let factor = if item.softcap > 0.0 { item.scale / item.softcap } else { item.scale * log2 };
    // SAFETY: every piece of the scratch is written before it is read; the rest is the caller's promise.
    unsafe {
        for row in 0..item.rows {
            (&raw mut (*x).largest).cast::<f32>().add(row).write(f32::MIN);
            (&raw mut (*x).sums).cast::<[f32; MAX_SETS]>().add(row).write([0.0; MAX_SETS]);
            std::slice::from_raw_parts_mut(item.out.add(row * item.out_stride), item.v.head_dim).fill(0.0);
        }
        if !kept.ordered {
            (&raw mut (*x).k_order).write([0; MAX_LANES]);
            (&raw mut (*x).v_order).write([0; MAX_LANES]);
            s.key_order(item.k, &mut (*x).k_order);
            s.value_order(item.v, &mut (*x).v_order);
            kept.ordered = true;
        }
        let queries = (item.stream, item.first_row, item.rows);
        if kept.queries != queries {
            *kept = Kept { ordered: true, queries, ..Kept::default() };
        }
        let asks = item.keys.len().div_ceil(item.tile).max(1) * ASKS;
        let mut state = State {
            s,
            item,
            x,
            kept,
            asked: 0,
            lines: item.later.1.div_ceil(LINE).div_ceil(asks),
            slots: [None; OUTPUTS],
            next_slot: 0,
            k_known: 0,
            v_seen: 0,
            factor,
        };
        for first in item.keys.clone().step_by(item.tile) {
            state.tile(first, item.tile.min(item.keys.end - first));
        }
        state.finish();
    }
}

/// Bytes of a cache line; how often in a tile some of the records of later are asked for: spread out, so that the memory
/// brings them while the thread computes.
const LINE: usize = 64;
const ASKS: usize = 4;

impl<S: Engine> State<'_, '_, S> {
    /// Asks for some more of the records of later.
    #[inline(always)]
    fn ask(&mut self) {
        let (later, bytes) = self.item.later;
        let first = self.asked;
        self.asked = (first + self.lines * LINE).min(bytes);
        for at in (first..self.asked).step_by(LINE) {
            self.s.prefetch_far(later.wrapping_add(at));
        }
    }

    /// Asks for a side's records of the next tile, if nobody did before.
    #[inline(always)]
    fn ask_next(&self, side: &SideLanes, rows: &[*const u8]) {
        let (s, item) = (self.s, self.item);
        if item.asked {
            return;
        }
        // Blocks that follow each other in a table most often do in memory, too.
        let ahead = item.tile * item.records.stride;
        for row in rows {
            side.tiers().iter().for_each(|tier| s.prefetch(row.wrapping_add(ahead + tier.main)));
            s.prefetch(row.wrapping_add(ahead + side.header));
        }
    }

    #[inline(always)]
    unsafe fn tile(&mut self, first: usize, n: usize) {
        let (s, item, x) = (self.s, self.item, self.x);
        // Products take keys by sixteen.
        let padded = n.next_multiple_of(2 * LANES);
        // SAFETY: keys `first..first + n` are within the item's; padding repeats keys that are read anyway.
        unsafe {
            // Mask.
            self.ask();
            let visible = self.mask(first, n, padded);
            let seen = match visible {
                Visible::Nothing => {
                    // The chunk that comes later may be seen all the same.
                    for _ in 1..ASKS {
                        self.ask();
                    }
                    return;
                }
                Visible::Everything => u64::MAX >> (64 - n),
                Visible::Some(bits) => bits,
            };
            let mask = match visible {
                Visible::Everything => None,
                _ => Some((&raw const (*x).mask).cast::<f32>()),
            };

            // Headers. A key that nobody sees is not read: a visible one takes its place, with weight 0.
            let mut rows = [std::ptr::null::<u8>(); MAX_TILE];
            item.records.rows(first, n, &mut rows);
            let (k_header, v_header) = (item.k.header, item.v.header);
            let (mut k_bits, mut v_bits) = ([0u32; MAX_TILE], [0u32; MAX_TILE]);
            if seen == u64::MAX >> (64 - n) {
                let first = rows[0];
                rows[n..padded].fill(first);
            } else {
                let stand_in = rows[seen.trailing_zeros() as usize];
                for (key, row) in rows[..padded].iter_mut().enumerate() {
                    *row = if seen >> key & 1 == 1 { *row } else { stand_in };
                }
            }
            for key in 0..padded {
                let row = rows[key];
                k_bits[key] = u32::from(row.add(k_header).cast::<u16>().read_unaligned());
                v_bits[key] = u32::from(row.add(v_header).cast::<u16>().read_unaligned());
            }
            let k_sets = scales(s, &k_bits, padded, &mut (*x).k_scale, &mut (*x).k_set);
            let v_sets = scales(s, &v_bits, padded, &mut (*x).v_scale, &mut (*x).v_set);
            self.v_seen |= v_sets;

            // Scores.
            self.ask();
            self.ask_next(item.k, &rows[..padded]);
            let levels = (&raw mut (*x).levels).cast::<i32>();
            let low = (&raw mut (*x).low).cast::<u8>();
            let few = item.rows <= S::FEW_ROWS;
            let mut weighed = None;
            if few && k_sets.is_power_of_two() {
                let (queries, finish) = self.of_set(k_sets);
                s.products_of_keys(item.k, &rows, padded, queries, finish);
            } else {
                s.keys(item.k, &rows, padded, item.tile, levels, low);
                weighed = self.weigh(k_sets, v_sets, mask, padded);
                if weighed.is_none() {
                    self.scores(k_sets, padded);
                }
            }
            self.ask();
            // No closure: it would be compiled by itself, without the instructions that all of this is inlined for.
            let grown = match weighed {
                Some(grown) => grown,
                None => self.softmax(mask, v_sets, padded),
            };

            // Outputs.
            self.ask();
            self.ask_next(item.v, &rows[..padded]);
            if few && v_sets.is_power_of_two() {
                self.few_outputs(v_sets, &rows, padded, grown);
            } else {
                s.values(item.v, &rows, padded, levels, low);
                self.outputs(v_sets, padded, grown, weighed.is_some());
            }
        }
    }

    /// Mask values of the tile in units of log2, and what they leave.
    #[inline(always)]
    unsafe fn mask(&mut self, first: usize, n: usize, padded: usize) -> Visible {
        let (s, item, x) = (self.s, self.item, self.x);
        let log2 = s.splat(std::f32::consts::LOG2_E);
        // SAFETY: the mask covers the item's queries and keys, by the caller; the scratch has MAX_TILE floats a query.
        unsafe {
            let out = (&raw mut (*x).mask).cast::<f32>();
            let queries = (item.first_row + item.rows).div_ceil(item.group) - item.first_row / item.group;
            let Some(mask) = &item.mask else {
                let first_query = item.first_row / item.group;
                return match item.sight.mask(first_query, queries, first, n, padded, item.tile, out) {
                    None => Visible::Everything,
                    Some(0) => Visible::Nothing,
                    Some(bits) => Visible::Some(bits),
                };
            };
            let token = item.first_row / item.group;
            if n == padded && mask.is_zero(item.stream, token..token + queries, first..first + n) {
                return Visible::Everything;
            }
            let mut best = [f32::NEG_INFINITY; MAX_TILE];
            let mut any_bits = s.splat_i(0);
            for query in 0..queries {
                let row = out.add(query * item.tile);
                let token = item.first_row / item.group + query;
                let mut tail = [f32::NEG_INFINITY; MAX_TILE];
                let at = item.stream * mask.stream_stride + token * mask.query_stride;
                let whole = n == padded;
                if !whole {
                    mask.load(item.stream, token, first, &mut tail[..n]);
                }
                for key in (0..padded).step_by(LANES) {
                    let v = match mask.dtype {
                        _ if !whole => s.load(tail.as_ptr().add(key)),
                        MaskType::F32 => s.load(mask.bytes.as_ptr().add(at + 4 * (first + key)).cast()),
                        MaskType::F16 => s.load_f16(mask.bytes.as_ptr().add(at + 2 * (first + key)).cast()),
                    };
                    any_bits = s.or(any_bits, s.bits(v));
                    let b = best.as_mut_ptr().add(key);
                    s.store(b, s.max(v, s.load(b)));
                    s.store(row.add(key), s.mul(v, log2));
                }
            }
            let mut lanes = [0; LANES];
            s.store_i(lanes.as_mut_ptr(), any_bits);
            if lanes == [0; LANES] {
                return Visible::Everything;
            }
            let mut bits = 0;
            for (key, best) in best[..n].iter().enumerate() {
                bits |= u64::from(*best > f32::NEG_INFINITY) << key;
            }
            if bits == 0 { Visible::Nothing } else { Visible::Some(bits) }
        }
    }

    /// From levels of keys to weights in one go, where the tile and the instruction set allow it. Whether any row's largest
    /// score grew.
    #[inline(always)]
    unsafe fn weigh(&mut self, k_sets: u16, v_sets: u16, mask: Option<*const f32>, n: usize) -> Option<bool> {
        let (s, item, x) = (self.s, self.item, self.x);
        if !S::WEIGHS || !k_sets.is_power_of_two() || !v_sets.is_power_of_two() || item.softcap > 0.0 {
            return None;
        }
        // SAFETY: as in `scores`.
        unsafe {
            let (queries, Scores { scale, start, step, constant, .. }) = self.of_set(k_sets);
            let mut sum = [0.0f32; MAX_ROWS];
            let tile = Tile {
                queries,
                keys: Right { data: (&raw const (*x).levels).cast(), stride: item.tile, lanes: n },
                start,
                step,
                constant,
                k_scale: scale,
                v_scale: (&raw const (*x).v_scale).cast(),
                mask,
                stride: item.tile,
                first_row: item.first_row,
                group: item.group,
                largest: (&raw mut (*x).largest).cast(),
                keep: (&raw mut (*x).keep).cast(),
                sum: sum.as_mut_ptr(),
                weights: (&raw mut (*x).weights).cast(),
                weights_sum: (&raw mut (*x).weights_sum).cast(),
                worth: (&raw mut (*x).weights_step).cast(),
            };
            s.weigh(&tile);
            let mut grown = false;
            for (row, sum) in sum[..item.rows].iter().enumerate() {
                let sums = (&raw mut (*x).sums[row * MAX_SETS]).cast::<f32>();
                let keep = (*x).keep[row];
                if keep != 1.0 {
                    grown = true;
                    self.keep_sums(row, keep);
                }
                *sums.add(v_sets.trailing_zeros() as usize) += sum;
            }
            Some(grown)
        }
    }

    /// Queries folded for a set, and what makes scores of their products with its keys.
    #[inline(always)]
    unsafe fn of_set(&mut self, set: u16) -> (Left, Scores) {
        let (item, x, id) = (self.item, self.x, set.trailing_zeros());
        // SAFETY: as in `scores`.
        unsafe {
            self.learn_constants(set);
            let slot = self.folded(fold::key(item.k_sets, id as u8), set);
            let finish = Scores {
                out: (&raw mut (*x).scores).cast(),
                stride: item.tile,
                scale: (&raw const (*x).k_scale).cast(),
                start: (&raw const (*x).folded_start[slot]).cast(),
                step: (&raw const (*x).folded_step[slot]).cast(),
                constant: (&raw const (*x).constants[id as usize]).cast(),
            };
            (self.queries(slot), finish)
        }
    }

    /// Adds the values of a tile of one set to the coded outputs of few rows.
    #[inline(always)]
    unsafe fn few_outputs(&mut self, set: u16, rows: &[*const u8; MAX_TILE], n: usize, grown: bool) {
        let (s, item, x) = (self.s, self.item, self.x);
        // SAFETY: as in `outputs`.
        unsafe {
            let key = fold::key(item.v_sets, set.trailing_zeros() as u8);
            if grown {
                self.rescale(Some(key));
            }
            let slot = self.slot(key, set);
            self.weights(set, n, true);
            let weights = Left { data: (&raw const (*x).weights).cast(), stride: item.tile / 2, rows: item.rows, depth: n / 2 };
            for tier in item.v.tiers() {
                s.products_of_values(tier, rows, n, weights, self.outputs_of(slot, tier));
            }
        }
    }

    /// Where the coded outputs of a tier go.
    #[inline(always)]
    unsafe fn outputs_of(&self, slot: usize, tier: &TierLanes) -> Outputs {
        let x = self.x;
        // SAFETY: a slot of the scratch has all lanes.
        unsafe {
            Outputs {
                out: (&raw mut (*x).outputs[slot]).cast::<f32>().add(tier.first_lane),
                stride: self.item.v.lanes,
                weights: (&raw const (*x).weights_sum).cast(),
                offset: tier.offset,
                step: (&raw const (*x).weights_step).cast(),
                keep: (&raw const (*x).keep).cast(),
            }
        }
    }

    /// Queries folded into a slot.
    #[inline(always)]
    fn queries(&self, slot: usize) -> Left {
        let (item, half) = (self.item, self.item.k.head_dim / 2);
        // SAFETY: `folded` gave the slot out: it lies within the field.
        let data = unsafe { (&raw const (*self.x).folded).cast::<i32>().add(slot * item.rows * half) };
        Left { data, stride: half, rows: item.rows, depth: half }
    }

    /// Scales a row's sums of probabilities by what a growth leaves of them.
    #[inline(always)]
    unsafe fn keep_sums(&self, row: usize, keep: f32) {
        let s = self.s;
        // SAFETY: a row of the scratch.
        unsafe {
            let sums = (&raw mut (*self.x).sums[row * MAX_SETS]).cast::<f32>();
            for set in (0..MAX_SETS).step_by(LANES) {
                s.store(sums.add(set), s.mul(s.load(sums.add(set)), s.splat(keep)));
            }
        }
    }

    /// Scores of all rows and keys.
    #[inline(always)]
    unsafe fn scores(&mut self, k_sets: u16, n: usize) {
        let (s, item, x) = (self.s, self.item, self.x);
        // SAFETY: scratch pieces have MAX_ROWS rows of MAX_TILE.
        unsafe {
            let right = Right { data: (&raw const (*x).levels).cast(), stride: item.tile, lanes: n };
            if k_sets.is_power_of_two() {
                let (queries, finish) = self.of_set(k_sets);
                return s.product(queries, right, finish);
            }
            self.learn_constants(k_sets);
            let out = (&raw mut (*x).scores).cast::<f32>();
            out.write_bytes(0, item.rows * item.tile);
            let present = Present::new(item.k_sets, k_sets);
            for t in 0..present.n {
                let slot = self.folded(present.keys[t], present.sets[t]);
                let scale = if present.n == 1 {
                    (&raw const (*x).k_scale).cast::<f32>()
                } else {
                    self.scales_of(present.sets[t], n, false)
                };
                let start = (&raw const (*x).folded_start[slot]).cast::<i32>();
                let step = (&raw const (*x).folded_step[slot]).cast::<f32>();
                s.product(self.queries(slot), right, MoreScores { out, stride: item.tile, scale, start, step });
            }
            for row in 0..item.rows {
                for key in 0..n {
                    *out.add(row * item.tile + key) += (*x).constants[usize::from((*x).k_set[key]) % MAX_SETS][row];
                }
            }
        }
    }

    /// Online softmax: probabilities in place of the scores, sums per set. Whether any row's largest score grew.
    #[inline(always)]
    unsafe fn softmax(&mut self, mask: Option<*const f32>, v_sets: u16, n: usize) -> bool {
        let (s, item, x) = (self.s, self.item, self.x);
        let mut grown = false;
        // SAFETY: as in `scores`.
        unsafe {
            let scores = (&raw mut (*x).scores).cast::<f32>();
            let mut first = 0;
            while first < item.rows {
                let rows = SOFTMAX_ROWS.min(item.rows - first);
                let mut block = Softmax {
                    scores: scores.add(first * item.tile),
                    stride: item.tile,
                    n,
                    mask: [None; SOFTMAX_ROWS],
                    before: [0.0; SOFTMAX_ROWS],
                    largest: [0.0; SOFTMAX_ROWS],
                    keep: [1.0; SOFTMAX_ROWS],
                    sum: [0.0; SOFTMAX_ROWS],
                };
                for r in 0..rows {
                    let row = first + r;
                    if item.softcap > 0.0 {
                        row::soft_cap(s, scores.add(row * item.tile), n, item.softcap * std::f32::consts::LOG2_E);
                    }
                    let query = (item.first_row + row) / item.group - item.first_row / item.group;
                    block.mask[r] = mask.map(|m| m.add(query * item.tile));
                    block.before[r] = (*x).largest[row];
                }
                s.softmax(&mut block, rows);
                for r in 0..rows {
                    let row = first + r;
                    (*x).keep[row] = block.keep[r];
                    if block.largest[r] > block.before[r] {
                        grown = true;
                        self.keep_sums(row, block.keep[r]);
                        (*x).largest[row] = block.largest[r];
                    }
                }
                if v_sets.is_power_of_two() {
                    for r in 0..rows {
                        (*x).sums[(first + r) * MAX_SETS + v_sets.trailing_zeros() as usize] += block.sum[r];
                    }
                } else {
                    self.sums_by_set(first, rows, n);
                }
                first += rows;
            }
        }
        grown
    }

    /// Adds the probabilities of a few rows to the sums of their sets, runs of keys of one set at a time. Every addition
    /// waits for the row's last one: beside it go those of the other rows.
    #[inline(always)]
    unsafe fn sums_by_set(&mut self, first: usize, rows: usize, n: usize) {
        // SAFETY: the scratch is exclusive; sets of `n` keys and the rows' probabilities were written.
        let x = unsafe { &mut *self.x };
        // Those beyond the last repeat it.
        let rows: [usize; SOFTMAX_ROWS] = std::array::from_fn(|r| first + r.min(rows - 1));
        let mut key = 0;
        while key < n {
            let set = usize::from(x.v_set[key]) % MAX_SETS;
            let mut sums = rows.map(|row| x.sums[row * MAX_SETS + set]);
            while key < n && usize::from(x.v_set[key]) == set {
                for (sum, row) in sums.iter_mut().zip(rows) {
                    *sum += x.scores[row * self.item.tile + key];
                }
                key += 1;
            }
            for (sum, row) in sums.into_iter().zip(rows) {
                x.sums[row * MAX_SETS + set] = sum;
            }
        }
    }

    /// Adds the tile's values to the coded outputs. `weighed`: `weigh` has written the weights.
    #[inline(always)]
    unsafe fn outputs(&mut self, v_sets: u16, n: usize, grown: bool, weighed: bool) {
        let (s, item, x) = (self.s, self.item, self.x);
        let present = Present::new(item.v_sets, v_sets);
        // SAFETY: as in `scores`; ROW_FLOATS covers the item's rows and lanes.
        unsafe {
            // With one transform, the product scales its outputs in passing; what else there is, is scaled here.
            let alone = present.n == 1;
            if grown {
                self.rescale(if alone { Some(present.keys[0]) } else { None });
            }
            if !alone {
                (&raw mut (*x).keep).write([1.0; MAX_ROWS]);
            }
            for t in 0..present.n {
                let slot = self.slot(present.keys[t], present.sets[t]);
                if !weighed {
                    self.weights(present.sets[t], n, alone);
                }
                for tier in item.v.tiers() {
                    let stride = if weighed { MAX_TILE / 2 } else { item.tile / 2 };
                    let left = Left { data: (&raw const (*x).weights).cast(), stride, rows: item.rows, depth: n / 2 };
                    let right = Right {
                        data: (&raw const (*x).levels).cast::<i32>().add(tier.first_lane),
                        stride: item.v.lanes,
                        lanes: tier.lanes,
                    };
                    let out = self.outputs_of(slot, tier);
                    if weighed {
                        s.weighed_outputs(left, right, out);
                    } else {
                        s.product(left, right, out);
                    }
                }
            }
        }
    }

    /// Weights of the tile's rows that belong to `sets`, of all if they are `alone`.
    #[inline(always)]
    unsafe fn weights(&mut self, sets: u16, n: usize, alone: bool) {
        let (s, item, x) = (self.s, self.item, self.x);
        // SAFETY: as in `outputs`.
        unsafe {
            let scale =
                if alone { (&raw const (*x).v_scale).cast::<f32>() } else { self.scales_of(sets, n, true) };
            let p = (&raw const (*x).scores).cast::<f32>();
            let w = (&raw mut (*x).weights).cast::<i16>();
            let (sum, step) = ((&raw mut (*x).weights_sum).cast(), (&raw mut (*x).weights_step).cast());
            s.weights(Weights { p, scale, stride: item.tile, n, rows: item.rows, out: w, sum, step });
        }
    }

    /// Scales of the tile's rows that belong to `sets`, 0 for the others.
    #[inline(always)]
    unsafe fn scales_of(&mut self, sets: u16, n: usize, values: bool) -> *const f32 {
        // SAFETY: the scratch is exclusive; headers of `n` rows were written.
        let x = unsafe { &mut *self.x };
        let (scale, set) = if values { (&x.v_scale, &x.v_set) } else { (&x.k_scale, &x.k_set) };
        for key in 0..n {
            x.some_scale[key] = if sets >> set[key] & 1 == 1 { scale[key] } else { 0.0 };
        }
        x.some_scale.as_ptr()
    }

    /// Slot of the queries folded for a transform.
    #[inline(always)]
    unsafe fn folded(&mut self, key: usize, sets: u16) -> usize {
        let (item, x) = (self.item, self.x);
        let Kept { folds, next_fold, .. } = &mut *self.kept;
        let words = item.rows * item.k.head_dim / 2;
        let n = (FULL_FOLDS * ROW_FLOATS / 2 / words).min(MOST_FOLDS);
        if let Some(slot) = folds[..n].iter().position(|&k| k == Some((item.head, key))) {
            return slot;
        }
        let slot = *next_fold;
        *next_fold = (slot + 1) % n;
        folds[slot] = Some((item.head, key));
        // SAFETY: the queries were loaded by the caller; the folds have room for `n` slots of the item's rows.
        unsafe {
            let out = Folded {
                words: (&raw mut (*x).folded).cast::<i32>().add(slot * words),
                start: (&raw mut (*x).folded_start[slot]).cast(),
                step: (&raw mut (*x).folded_step[slot]).cast(),
            };
            let matrix = fold::matrix(item.k_sets.get(sets.trailing_zeros() as u8));
            let q = (&raw const (*x).q).cast::<f32>();
            fold(self.s, item.k, matrix, q, item.rows, &(*x).k_order, self.factor, out);
        }
        slot
    }

    /// `q . mean` of sets met for the first time.
    #[inline(always)]
    unsafe fn learn_constants(&mut self, sets: u16) {
        let (s, item, x) = (self.s, self.item, self.x);
        let mut new = sets & !self.k_known;
        self.k_known |= sets;
        while new != 0 {
            let id = new.trailing_zeros() as usize;
            new &= new - 1;
            let mean: Option<&[f16]> = item.k_sets.get(id as u8).map(|set| &*set.mean);
            for row in 0..item.rows {
                let mut sum = s.splat(0.0);
                if let Some(mean) = mean {
                    assert_eq!(mean.len(), item.k.head_dim);
                    for i in (0..mean.len()).step_by(LANES) {
                        // SAFETY: head_dim is a multiple of 8; the queries were loaded by the caller.
                        unsafe {
                            let q = s.load((&raw const (*x).q).cast::<f32>().add(row * item.k.head_dim + i));
                            sum = s.add(sum, s.mul(q, s.load_f16(mean.as_ptr().add(i).cast())));
                        }
                    }
                }
                // SAFETY: within the scratch.
                unsafe { (*x).constants[id][row] = s.sum_lanes(sum) * self.factor };
            }
        }
    }

    /// Scales all outputs, but those of `except`, by what the last growth leaves of them.
    #[inline(always)]
    unsafe fn rescale(&mut self, except: Option<usize>) {
        let (item, x) = (self.item, self.x);
        // SAFETY: rows within the scratch and within the result.
        unsafe {
            for r in 0..item.rows {
                let keep = (*x).keep[r];
                for (slot, key) in self.slots.iter().enumerate() {
                    if key.is_some_and(|(key, _)| Some(key) != except) {
                        let out = (&raw mut (*x).outputs[slot]).cast::<f32>().add(r * item.v.lanes);
                        std::slice::from_raw_parts_mut(out, item.v.lanes).iter_mut().for_each(|o| *o *= keep);
                    }
                }
                if self.next_slot > OUTPUTS {
                    let out = item.out.add(r * item.out_stride);
                    std::slice::from_raw_parts_mut(out, item.v.head_dim).iter_mut().for_each(|o| *o *= keep);
                }
            }
        }
    }

    /// Slot of a transform's outputs. With none free, the one used longest ago is unfolded and taken over.
    #[inline(always)]
    unsafe fn slot(&mut self, key: usize, sets: u16) -> usize {
        if let Some(slot) = self.slots.iter().position(|k| k.is_some_and(|(k, _)| k == key)) {
            return slot;
        }
        let slot = self.next_slot % OUTPUTS;
        self.next_slot += 1;
        // SAFETY: as in `outputs`.
        unsafe {
            self.flush(slot);
            let floats = self.item.rows * self.item.v.lanes;
            std::slice::from_raw_parts_mut((&raw mut (*self.x).outputs[slot]).cast::<f32>(), floats).fill(0.0);
        }
        self.slots[slot] = Some((key, sets.trailing_zeros() as u8));
        slot
    }

    /// Adds a slot's outputs, unfolded, to the result.
    #[inline(always)]
    unsafe fn flush(&mut self, slot: usize) {
        let (item, x) = (self.item, self.x);
        if let Some((_, set)) = self.slots[slot].take() {
            let matrix = fold::matrix(item.v_sets.get(set));
            // SAFETY: a slot holds the item's rows; the result has room for them.
            unsafe {
                let acc = (&raw const (*x).outputs[slot]).cast::<f32>();
                unfold(self.s, item.v, matrix, acc, item.rows, &(*x).v_order, item.out, item.out_stride);
            }
        }
    }

    /// Outputs out of the coded space, the means, and the statistics for the merge.
    #[inline(always)]
    unsafe fn finish(&mut self) {
        let (s, item, x) = (self.s, self.item, self.x);
        for slot in 0..OUTPUTS {
            // SAFETY: as for `flush`.
            unsafe { self.flush(slot) };
        }
        for r in 0..item.rows {
            // SAFETY: rows within the scratch and within the result.
            unsafe {
                let sums = (&raw const (*x).sums).cast::<[f32; MAX_SETS]>().add(r).read();
                let out = item.out.add(r * item.out_stride);
                let mut total = 0.0;
                for (id, &sum) in sums.iter().enumerate() {
                    total += sum;
                    let set = if self.v_seen >> id & 1 == 1 { item.v_sets.get(id as u8) } else { None };
                    if let Some(set) = set {
                        assert_eq!(set.mean.len(), item.v.head_dim);
                        for i in (0..set.mean.len()).step_by(LANES) {
                            let mean = s.load_f16(set.mean.as_ptr().add(i).cast());
                            s.store(out.add(i), s.add(s.load(out.add(i)), s.mul(mean, s.splat(sum))));
                        }
                    }
                }
                item.stats.add(2 * r * item.stats_stride).write((*x).largest[r]);
                item.stats.add(2 * r * item.stats_stride + 1).write(total);
            }
        }
    }
}

/// Scores of one transform of several: those of other transforms' keys stay, their scale being 0.
#[derive(Clone, Copy)]
struct MoreScores {
    out: *mut f32,
    stride: usize,
    scale: *const f32,
    start: *const i32,
    step: *const f32,
}

impl<S: Simd> super::product::Finish<S> for MoreScores {
    #[inline(always)]
    fn start(self, row: usize) -> i32 {
        // SAFETY: one entry per row.
        unsafe { self.start.add(row).read() }
    }
    #[inline(always)]
    unsafe fn put(self, s: S, row: usize, lane: usize, sums: S::I) {
        // SAFETY: one entry per row, per key, and per both.
        unsafe {
            let x = s.mul(s.mul(s.to_float(sums), s.splat(self.step.add(row).read())), s.load(self.scale.add(lane)));
            let at = self.out.add(row * self.stride + lane);
            s.store(at, s.add(s.load(at), x));
        }
    }
}

/// Scales of row headers; returns their sets as bits. Ids by row are written only where they differ.
///
/// The f16 scale stands in bits 4.. of a header; put where f32 keeps exponent and mantissa it is short by the difference
/// of the exponents' biases, 112, and no bit pattern gives NaN or infinity.
#[inline(always)]
unsafe fn scales<S: Simd>(
    s: S,
    bits: &[u32; MAX_TILE],
    n: usize,
    scale: &mut [f32; MAX_TILE],
    set: &mut [u8; MAX_TILE],
) -> u16 {
    let (keep, rebias) = (s.splat_i(0xfff0), s.splat(f32::from_bits((127 + 112) << 23)));
    let (mut any, mut all) = (s.splat_i(0), s.splat_i(-1));
    for key in (0..n).step_by(LANES) {
        // SAFETY: `n` is a multiple of 8, at most MAX_TILE.
        unsafe {
            let header = s.load_i(bits.as_ptr().add(key).cast());
            (any, all) = (s.or(any, header), s.and(all, header));
            s.store(scale.as_mut_ptr().add(key), s.mul(s.from_bits(s.shl32::<12>(s.and(header, keep))), rebias));
        }
    }
    let (mut any_lanes, mut all_lanes) = ([0; LANES], [0; LANES]);
    // SAFETY: eight lanes.
    unsafe {
        s.store_i(any_lanes.as_mut_ptr(), any);
        s.store_i(all_lanes.as_mut_ptr(), all);
    }
    let any = any_lanes.iter().fold(0, |a, b| a | b) & 15;
    if any == all_lanes.iter().fold(15, |a, b| a & b) {
        return 1 << any;
    }
    let mut sets = 0;
    for (set, bits) in set[..n].iter_mut().zip(bits) {
        *set = (bits & 15) as u8;
        sets |= 1 << *set;
    }
    sets
}
