//! New rows into records.
//!
//! The same rows and factor sets give the same bytes on every CPU and for every shard count: each sum has one order,
//! written once below over the vectors of several instruction sets. Chains run over input channels with lanes over
//! outputs, sums over a row keep [`LANES`] partial sums, and products are rounded before they are added (Rust never
//! contracts them).

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::code::codebook::{Codebook, codebook};
use crate::code::{header, planes};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{avx2::Avx2, avx512::Avx512};
use crate::cpu::simd::portable::Portable;
use crate::cpu::simd::vectors::{PAIR, Vectors};
use crate::cpu::simd::{Isa, Simd};
use crate::error::Result;
use crate::factor::{
    Encode, HeadSets, LayerFactors, MAX_SINKS, ROTATION_KAPPA, ROTATION_SET, TierWeights, Transform, hadamard,
};
use crate::shape::{LayerShape, MAX_DIM, MAX_TIERS, Side, SideShape, Tier};
use crate::view::{Rows, Store, Tokens};

/// Partial sums of a sum over a row; every head_dim is a multiple.
const LANES: usize = PAIR;
/// Rows that share one pass over the encode matrix.
const BLOCK: usize = 4;
/// Input channels that a row alone takes at a time, and floats of a cache line.
const CHANNELS: usize = 8;
const LINE_FLOATS: usize = 16;
/// A row leaves the newest set only for one that costs less than this share of it: below a factor of two a switch
/// buys nothing and mixes sets within the tiles of attention.
const SWITCH: f32 = 0.5;
/// Latents that feedback looks ahead: every tier is a multiple.
const AHEAD: usize = 4;
/// Row scales tried, as multiples of the row's rms.
const MULTIPLES: [f32; 8] = [0.76, 0.83, 0.9, 0.97, 1.04, 1.11, 1.18, 1.26];
/// Scales tried with feedback: with the rows of a block as many as two vectors have lanes.
const SCALES: usize = LANES / BLOCK;
/// These, as multiples of the best one without: what is carried on widens the targets.
const FEEDBACK_MULTIPLES: [f32; SCALES] = [0.94, 1.0, 1.06, 1.12];
/// Added to a small integer it leaves it standing in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Beyond this a row's squares could overflow f32; its scale is far beyond f16 anyway.
const HUGE: f32 = 1e15;

/// A body for each of some constants.
macro_rules! unrolled {
    ($i:ident in [$($value:literal),*] $body:block) => {
        $({
            let $i: usize = $value;
            $body
        })*
    };
}

/// What encode has to tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeReport {
    /// Rows with NaN or infinity, written as zero rows of set 0, and rows whose scale was cut to the largest one.
    pub replaced_rows: u64,
}

/// Codes this shard's share of the tokens. They are dealt in runs; where there are fewer tokens than shards, as in
/// generation, each head and side of a token is dealt by itself.
///
/// `slots` names a slot for each token, -1 for none; `capi` has checked the range, and that no slot is named twice.
pub fn encode_shard(
    shape: &LayerShape,
    factors: &LayerFactors,
    tokens: &Tokens,
    slots: &[i64],
    store: &Store,
    shard: usize,
    n_shards: usize,
) -> Result<EncodeReport> {
    encode_shard_on(Isa::detect(), shape, factors, tokens, slots, store, shard, n_shards)
}

/// [`encode_shard`] on one of the CPU's instruction sets.
#[allow(clippy::too_many_arguments)]
fn encode_shard_on(
    isa: Isa,
    shape: &LayerShape,
    factors: &LayerFactors,
    tokens: &Tokens,
    slots: &[i64],
    store: &Store,
    shard: usize,
    n_shards: usize,
) -> Result<EncodeReport> {
    let mut report = EncodeReport::default();
    let Some((k, v)) = &tokens.kv else { return Ok(report) };
    let n = tokens.n_tokens;
    let mut scratch = Scratch::new();
    let mut code = |run: Range<usize>, unit: usize| {
        let (side, rows) = if unit < shape.n_kv_heads { (Side::K, k) } else { (Side::V, v) };
        let head = unit % shape.n_kv_heads;
        if unit == 0 {
            clear_padding(shape, &slots[run.clone()], store);
        }
        let coder = RowCoder::new(shape.side(side), &factors.side(side)[head].sets);
        let job = Job { coder: &coder, rows, head, slots, store };
        report.replaced_rows += dispatch(isa, &job, run, &mut scratch);
    };
    let units = 2 * shape.n_kv_heads;
    if n < n_shards {
        // Keys first: their work is the larger part.
        (shard..units * n).step_by(n_shards).for_each(|i| code(i % n..i % n + 1, i / n));
        let keys = shape.n_kv_heads * n;
        if (keys..2 * keys).contains(&shard) {
            bring_in(&factors.k[(shard - keys) / n].sets);
        }
    } else {
        (0..units).for_each(|unit| code(n * shard / n_shards..n * (shard + 1) / n_shards, unit));
    }
    Ok(report)
}

/// Reads what the shard that codes keys and the one that attends come to later. In generation the weights of other layers
/// have gone through all caches since the last token, and a shard that codes only values has nothing else to do.
fn bring_in(sets: &HeadSets) {
    let newest = sets.encode();
    if let Some(matrix) = &newest.matrix {
        // The other shard begins with the first half.
        touch(&matrix[matrix.len() / 2..]);
    }
    if let Some(Transform::Dense { decode }) = sets.get(newest.set).map(|set| &*set.transform) {
        touch(decode);
    }
}

/// Reads one element of each cache line.
fn touch<T: Copy>(data: &[T]) {
    const LINE: usize = 64;
    for x in data.iter().step_by(LINE / size_of::<T>()) {
        std::hint::black_box(*x);
    }
}

/// Zeros behind the headers.
fn clear_padding(shape: &LayerShape, slots: &[i64], store: &Store) {
    let padding = shape.v.headers_offset + 2 * shape.n_kv_heads..shape.slot_bytes;
    for &slot in slots.iter().filter(|&&slot| slot >= 0) {
        // SAFETY: slots of a call differ from each other and a token's first head belongs to one shard, so this thread
        // alone writes these bytes; readers are kept off by the caller (dq_codec's contract).
        unsafe { store.part_mut(slot as usize, padding.clone()) }.fill(0);
    }
}

/// One head and side of a call.
struct Job<'a> {
    coder: &'a RowCoder<'a>,
    rows: &'a Rows<'a>,
    head: usize,
    slots: &'a [i64],
    store: &'a Store<'a>,
}

/// Runs the one body on the vectors at hand. All give the same bytes.
fn dispatch(isa: Isa, job: &Job, run: Range<usize>, scratch: &mut Scratch) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn on_avx2(s: Avx2, job: &Job, run: Range<usize>, scratch: &mut Scratch) -> u64 {
            encode_run(s, job, run, scratch)
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
        fn on_avx512(s: Avx512<'_>, job: &Job, run: Range<usize>, scratch: &mut Scratch) -> u64 {
            encode_run(s, job, run, scratch)
        }
        if let Some(s) = Avx512::new(None).filter(|_| matches!(isa, Isa::Avx512 | Isa::Amx)) {
            // SAFETY: the CPU has the features.
            return unsafe { on_avx512(s, job, run, scratch) };
        }
        if let Some(s) = Avx2::new().filter(|_| isa != Isa::Portable) {
            // SAFETY: the CPU has the features.
            return unsafe { on_avx2(s, job, run, scratch) };
        }
    }
    let _ = isa;
    encode_run(Portable, job, run, scratch)
}

#[inline(always)]
fn encode_run<S: Simd>(s: S, job: &Job, run: Range<usize>, scratch: &mut Scratch) -> u64 {
    let d = job.coder.shape.head_dim;
    let mut replaced = 0;
    let Scratch { x, y, centred, coded, feedback } = scratch;
    let mut finite = [true; BLOCK];
    for base in run.clone().step_by(BLOCK) {
        let n = BLOCK.min(run.end - base);
        for r in 0..n {
            job.rows.load(base + r, job.head, &mut x[r][..d]);
            finite[r] = tame(&mut x[r][..d]);
        }
        job.coder.newest_latents(s, &x[..n], centred, y);
        job.coder.code_block(s, x, y, &finite, n, coded, feedback);
        for r in 0..n {
            let slot = job.slots[base + r];
            if slot < 0 {
                continue;
            }
            job.write(&coded[r], slot as usize);
            replaced += u64::from(!finite[r] || coded[r].saturated);
        }
    }
    replaced
}

impl Job<'_> {
    #[inline(always)]
    fn write(&self, coded: &Coded, slot: usize) {
        let shape = self.coder.shape;
        // SAFETY: slots of a call differ from each other and a token's head and side belongs to one shard, so this thread
        // alone writes its bytes; readers are kept off by the caller (dq_codec's contract).
        let part = |part| unsafe { self.store.part_mut(slot, part) };
        for plane in &shape.planes {
            planes::pack_head(plane, &coded.codes[..shape.head_dim], part(plane.of_head(self.head)));
        }
        let at = shape.headers_offset + 2 * self.head;
        part(at..at + 2).copy_from_slice(&coded.header.to_le_bytes());
    }
}

/// What a shard works in.
struct Scratch {
    /// Rows of a block, and their latents.
    x: [[f32; MAX_DIM]; BLOCK],
    y: [[f32; MAX_DIM]; BLOCK],
    /// The rows about the newest set's mean.
    centred: [[f32; MAX_DIM]; BLOCK],
    coded: [Coded; BLOCK],
    feedback: Feedback,
}

impl Scratch {
    fn new() -> Self {
        Self {
            x: [[0.0; MAX_DIM]; BLOCK],
            y: [[0.0; MAX_DIM]; BLOCK],
            centred: [[0.0; MAX_DIM]; BLOCK],
            coded: [Coded::default(); BLOCK],
            feedback: Feedback { errors: [[0.0; LANES]; MAX_DIM], targets: [[0.0; LANES]; MAX_DIM] },
        }
    }
}

/// A coded row.
#[derive(Clone, Copy)]
struct Coded {
    codes: [u8; MAX_DIM],
    header: u16,
    /// The scale was cut to the largest one.
    saturated: bool,
}

impl Default for Coded {
    fn default() -> Self {
        Self { codes: [0; MAX_DIM], header: 0, saturated: false }
    }
}

/// What feedback works in, `[latent][lane]`; lanes are (row, scale) pairs.
struct Feedback {
    /// Coded minus wanted latents of one tier.
    errors: [[f32; LANES]; MAX_DIM],
    /// What was coded in place of the latents.
    targets: [[f32; LANES]; MAX_DIM],
}

/// Makes a row safe to compute with: false and zeros for NaN or infinity; a row whose squares would overflow is
/// scaled down (its scale saturates all the same).
#[inline(always)]
fn tame(x: &mut [f32]) -> bool {
    let largest = max_abs(x);
    if largest.is_nan() || largest == f32::INFINITY {
        x.fill(0.0);
        return false;
    }
    if largest > HUGE {
        let shrink = HUGE / largest;
        x.iter_mut().for_each(|v| *v *= shrink);
    }
    true
}

/// A set over the rotation whose mean is a row seen at position 0.
#[derive(Clone, Copy)]
struct Sink {
    id: u8,
    mean: [f32; MAX_DIM],
}

/// How one head's rows are coded.
struct RowCoder<'a> {
    shape: &'a SideShape,
    newest: Arc<Encode>,
    newest_mean: [f32; MAX_DIM],
    newest_kappa: TierWeights,
    sinks: [Sink; MAX_SINKS],
    n_sinks: usize,
    books: [&'static Codebook; MAX_TIERS],
    /// Share of a row's energy that the codes lose when it is spread evenly over all channels.
    rotation_distortion: f32,
}

impl<'a> RowCoder<'a> {
    fn new(shape: &'a SideShape, sets: &'a HeadSets) -> Self {
        let newest = sets.encode();
        let mut newest_mean = [0f32; MAX_DIM];
        let mut newest_kappa = ROTATION_KAPPA;
        if let Some(set) = sets.get(newest.set) {
            widen(&set.mean, &mut newest_mean);
            newest_kappa = set.kappa;
        }
        let mut sinks = [Sink { id: ROTATION_SET, mean: [0.0; MAX_DIM] }; MAX_SINKS];
        let mut n_sinks = 0;
        for id in sets.sinks().take(MAX_SINKS) {
            if let Some(set) = sets.get(id) {
                sinks[n_sinks].id = id;
                widen(&set.mean, &mut sinks[n_sinks].mean);
                n_sinks += 1;
            }
        }
        let tiers = &shape.plan.tiers;
        let books: [&Codebook; MAX_TIERS] = std::array::from_fn(|t| codebook(tiers[t.min(tiers.len() - 1)].bits));
        let rotation_distortion = tiers.iter().zip(books).map(|(t, b)| t.channels as f32 * b.distortion).sum::<f32>()
            / shape.head_dim as f32;
        Self { shape, newest, newest_mean, newest_kappa, sinks, n_sinks, books, rotation_distortion }
    }

    /// Latents of the rows of a block under the newest set: `y = encode * (x - mean)`.
    #[inline(always)]
    fn newest_latents<S: Simd>(
        &self,
        s: S,
        x: &[[f32; MAX_DIM]],
        centred: &mut [[f32; MAX_DIM]; BLOCK],
        y: &mut [[f32; MAX_DIM]; BLOCK],
    ) {
        let d = self.shape.head_dim;
        let out = if self.newest.matrix.is_some() { &mut *centred } else { &mut *y };
        for (x, out) in x.iter().zip(out) {
            for i in 0..d {
                out[i] = x[i] - self.newest_mean[i];
            }
        }
        match &self.newest.matrix {
            None => y[..x.len()].iter_mut().for_each(|y| hadamard::rotate(&mut y[..d])),
            // A token alone, as in generation, is not worth a block.
            Some(matrix) if x.len() == 1 => latents_of_row(s, &matrix[..d * d], &centred[0][..d], &mut y[0][..d]),
            Some(matrix) => latents_of_block(s, &matrix[..d * d], d, centred, y),
        }
    }

    /// Whether rows of the newest set are coded with feedback; its triangles.
    fn triangles(&self) -> Option<&[f32]> {
        let square = self.shape.head_dim * self.shape.head_dim;
        self.newest.matrix.as_ref().filter(|matrix| matrix.len() > square).map(|matrix| &matrix[square..])
    }

    /// Picks each row's set and codes the first `n` rows of a block; `y` are the latents of the newest set.
    ///
    /// The error of a set is `sum over tiers of kappa_t |y_t - y^_t|^2`. For Gaussian latents a code of b bits leaves a
    /// known share of `|y_t|^2`; that expectation decides, so that only the winner is coded.
    #[inline(always)]
    fn code_block<S: Simd>(
        &self,
        s: S,
        x: &[[f32; MAX_DIM]; BLOCK],
        y: &mut [[f32; MAX_DIM]; BLOCK],
        finite: &[bool; BLOCK],
        n: usize,
        coded: &mut [Coded; BLOCK],
        feedback: &mut Feedback,
    ) {
        let d = self.shape.head_dim;
        let triangles = self.triangles();
        let mut others = [None; BLOCK];
        let mut newest = [false; BLOCK];
        for r in 0..n {
            let (other, distance) = self.cheapest_other(s, &x[r][..d]);
            others[r] = other;
            let cost = self.expected_error(s, &y[r][..d], &self.newest_kappa);
            // Also catches a cost that overflowed.
            newest[r] = finite[r] && !(distance * self.rotation_distortion < SWITCH * cost);
            if newest[r] && triangles.is_some() {
                // Its codes will come of feedback.
                let levels = self.best_levels(s, &y[r][..d], self.newest.set, &self.newest_kappa);
                (coded[r].header, coded[r].saturated) = (levels.header, levels.saturated);
            } else if newest[r] {
                self.code(s, &y[r][..d], self.newest.set, &self.newest_kappa, &mut coded[r]);
            }
        }
        if let Some(triangles) = triangles.filter(|_| newest[..n].contains(&true)) {
            match n {
                1 => self.feed_back::<S, 1>(s, triangles, y, coded, feedback, newest),
                _ => self.feed_back::<S, 2>(s, triangles, y, coded, feedback, newest),
            }
        }
        for r in 0..n {
            if newest[r] && !coded[r].saturated {
                continue;
            }
            let (other, y) = (others[r].filter(|_| finite[r]), &mut y[r][..d]);
            if finite[r] {
                Self::rotated_latents(&x[r][..d], other, y);
            } else {
                // Not the rotation's: that makes zeros of either sign.
                y.fill(0.0);
            }
            self.code(s, y, other.map_or(ROTATION_SET, |s| s.id), &ROTATION_KAPPA, &mut coded[r]);
        }
    }

    #[inline(always)]
    fn expected_error<S: Simd>(&self, s: S, y: &[f32], kappa: &TierWeights) -> f32 {
        let mut sum = 0.0;
        for (t, channels) in self.tiers() {
            sum += kappa[t] * self.books[t].distortion * sum_of_squares(s, &y[channels]);
        }
        sum
    }

    /// Number and channels of each tier. Sums over tiers are loops: a closure handed on is compiled by itself, without the
    /// instructions of [`dispatch`].
    #[inline(always)]
    fn tiers(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<'a> {
        let tiers: &'a [Tier] = &self.shape.plan.tiers;
        tiers.iter().enumerate().map(|(t, tier)| (t, tier.first..tier.first + tier.channels))
    }

    /// The best of the sets that share the rotation: their cost is the distance to the mean.
    #[inline(always)]
    fn cheapest_other<S: Simd>(&self, s: S, x: &[f32]) -> (Option<&Sink>, f32) {
        let mut best = (None, sum_of_squares(s, x));
        for sink in &self.sinks[..self.n_sinks] {
            let cost = distance(s, x, &sink.mean[..x.len()]);
            if cost < best.1 {
                best = (Some(sink), cost);
            }
        }
        best
    }

    #[inline(always)]
    fn rotated_latents(x: &[f32], sink: Option<&Sink>, y: &mut [f32]) {
        y.copy_from_slice(x);
        if let Some(sink) = sink {
            y.iter_mut().zip(&sink.mean).for_each(|(o, m)| *o -= m);
        }
        hadamard::rotate(y);
    }

    /// Codes latents, each by itself.
    #[inline(always)]
    fn code<S: Simd>(&self, s: S, y: &[f32], set: u8, kappa: &TierWeights, coded: &mut Coded) {
        (coded.header, coded.saturated) = if self.shape.plan.tiers[0].bits == 8 {
            code_uniform(y, self.books[0], set, &mut coded.codes)
        } else {
            let levels = self.best_levels(s, y, set, kappa);
            for (t, channels) in self.tiers() {
                nearest_codes(s, &y[channels.clone()], levels.reach, self.books[t], &mut coded.codes[channels]);
            }
            (levels.header, levels.saturated)
        };
    }

    /// Codes the rows of `wanted` anew, latent after latent, each against what the errors before it leave to be said (see
    /// `factor::fit`). A few scales around the one found without; the least loss wins, at the scale that makes the targets'
    /// codes as long as the targets. Lanes are (row, scale) pairs of a whole block in two vectors, or of the first row alone,
    /// twice, in one.
    #[inline(always)]
    fn feed_back<S: Simd, const N: usize>(
        &self,
        s: S,
        mut triangles: &[f32],
        y: &[[f32; MAX_DIM]; BLOCK],
        coded: &mut [Coded; BLOCK],
        feedback: &mut Feedback,
        wanted: [bool; BLOCK],
    ) {
        let s = Vectors::<S, N>(s);
        let d = self.shape.head_dim;
        let row_of = |lane: usize| if N == 1 { 0 } else { lane / SCALES };
        let headers: [(u16, bool); LANES] = std::array::from_fn(|l| {
            header::pack(header::scale(coded[row_of(l)].header) * FEEDBACK_MULTIPLES[l % SCALES], self.newest.set)
        });
        let scale = headers.map(|(packed, _)| header::scale(packed));
        let inverse = scale.map(|s| if s > 0.0 { 1.0 / s } else { 0.0 });
        let scales = s.load(&scale);
        let mut cost = s.splat(0.0);
        // Of the targets, with themselves and with what their codes stand for.
        let (mut size, mut along) = (s.splat(0.0), s.splat(0.0));
        for (t, (tier, book)) in self.shape.plan.tiers.iter().zip(self.books).enumerate() {
            let reach = s.load(&widened(&inverse, book));
            let (mut lost, mut tier_size, mut tier_along) = (s.splat(0.0), s.splat(0.0), s.splat(0.0));
            let (triangle, rest) = triangles.split_at(tier.channels * (tier.channels + 1) / 2);
            triangles = rest;
            for first in (0..tier.channels).step_by(AHEAD) {
                // Errors before this run of latents, taken off all of them side by side; those within it follow one by one.
                // A latent's order stays the same.
                let mut rows: [&[f32]; AHEAD] = [&[]; AHEAD];
                let mut latents = [s.splat(0.0); AHEAD];
                for a in 0..AHEAD {
                    let j = first + a;
                    rows[a] = &triangle[j * (j + 1) / 2..][..j + 1];
                    if N == 1 {
                        latents[a] = s.splat(y[0][tier.first + j]);
                    } else {
                        latents[a] = s.load(&std::array::from_fn::<f32, LANES, _>(|l| y[row_of(l)][tier.first + j]));
                    }
                }
                let mut targets = latents;
                for (j, error) in feedback.errors[..first].iter().enumerate() {
                    let error = s.load(error);
                    for a in 0..AHEAD {
                        // SAFETY: `j < first`, and each of these rows is longer than that.
                        let weight = unsafe { *rows[a].get_unchecked(j) };
                        targets[a] = s.sub(targets[a], s.mul(s.splat(weight), error));
                    }
                }
                let mut errors = [s.splat(0.0); AHEAD];
                const { assert!(AHEAD == 4) };
                // Written out: the next latent waits for this one's error, which must not go through memory.
                unrolled!(a in [0, 1, 2, 3] {
                    let j = first + a;
                    let mut target = targets[a];
                    for before in 0..a {
                        target = s.sub(target, s.mul(s.splat(rows[a][first + before]), errors[before]));
                    }
                    let level = nearest(s, target, reach, book);
                    let value = s.mul(scales, s.mul(level, s.splat(book.unit)));
                    let left = s.sub(value, target);
                    let weight = s.splat(rows[a][j]);
                    errors[a] = s.sub(value, latents[a]);
                    s.store(errors[a], &mut feedback.errors[j]);
                    s.store(target, &mut feedback.targets[tier.first + j]);
                    lost = s.add(lost, s.mul(weight, s.mul(left, left)));
                    tier_size = s.add(tier_size, s.mul(weight, s.mul(target, target)));
                    tier_along = s.add(tier_along, s.mul(weight, s.mul(target, value)));
                });
            }
            let kappa = s.splat(self.newest_kappa[t]);
            cost = s.add(cost, s.mul(kappa, lost));
            size = s.add(size, s.mul(kappa, tier_size));
            along = s.add(along, s.mul(kappa, tier_along));
        }
        let mut sums = [[0f32; LANES]; 3];
        for (x, out) in [cost, size, along].into_iter().zip(&mut sums) {
            s.store(x, out);
        }
        let [cost, size, along] = sums;
        for (r, coded) in coded.iter_mut().enumerate().filter(|(r, _)| wanted[*r]) {
            // The first is less than a scale that the header could hold.
            let mut l = r * SCALES;
            for other in l + 1..(r + 1) * SCALES {
                if !headers[other].1 && cost[other] < cost[l] {
                    l = other;
                }
            }
            let ratio = size[l] / along[l];
            // A factor file may hold weights of any sign.
            let unbiased = if ratio > 0.0 && ratio.is_finite() { scale[l] * ratio } else { scale[l] };
            coded.header = match header::pack(unbiased.min(f32::MAX), self.newest.set) {
                (packed, false) => packed,
                _ => headers[l].0,
            };
            let mut targets = [0f32; MAX_DIM];
            targets[..d].iter_mut().zip(&feedback.targets).for_each(|(target, lanes)| *target = lanes[l]);
            for (t, channels) in self.tiers() {
                let reach = widened(&inverse, self.books[t])[l];
                nearest_codes(s.0, &targets[channels.clone()], reach, self.books[t], &mut coded.codes[channels]);
            }
        }
    }

    /// Codes by the nearest level for a few scales around the rms. Each is then replaced by the scale that makes the coded
    /// row as long, along the row, as the row itself; the one with the least error after rounding to the header wins. The
    /// least squares would shorten every row by its share of error, which attention cannot average away as it does the
    /// rest of the error. Tiers count with their kappa.
    #[inline(always)]
    fn best_levels<S: Simd>(&self, s: S, y: &[f32], set: u8, kappa: &TierWeights) -> Levels {
        let rms = (sum_of_squares(s, y) / y.len() as f32).sqrt();
        let mut best = (f32::INFINITY, Levels { reach: 0.0, header: u16::from(set), saturated: false });
        let mut levels = [0f32; MAX_DIM];
        if rms > 0.0 {
            let mut energy = 0.0;
            for (t, channels) in self.tiers() {
                energy += kappa[t] * sum_of_squares(s, &y[channels]);
            }
            for (i, multiple) in MULTIPLES.iter().enumerate() {
                let reach = 1.0 / (rms * multiple);
                let mut projection = 0.0;
                for (t, channels) in self.tiers() {
                    let along = nearest_levels(s, &y[channels.clone()], reach, self.books[t], &mut levels[channels]);
                    projection += kappa[t] * along;
                }
                let (header, saturated) = header::pack((energy / projection).clamp(0.0, f32::MAX), set);
                let scale = header::scale(header);
                let mut error = 0.0;
                for (t, channels) in self.tiers() {
                    error += kappa[t] * residual(s, &y[channels.clone()], &levels[channels], scale);
                }
                if i == 0 || error < best.0 {
                    best = (error, Levels { reach, header, saturated });
                }
            }
        }
        best.1
    }
}

/// How a row is coded latent by latent.
struct Levels {
    /// Latents times this are compared with a book's edges.
    reach: f32,
    header: u16,
    /// The scale was cut to the largest one.
    saturated: bool,
}

/// Latents of one row, `matrix` being `[channel][latent]`. It does not come out of a near cache in generation, where other
/// layers' weights go through between two rows, so it is read once, front to back, and the next channels are asked for early.
#[inline(always)]
fn latents_of_row<S: Simd>(s: S, matrix: &[f32], centred: &[f32], y: &mut [f32]) {
    let d = y.len();
    assert!(matrix.len() == d * d && centred.len() == d && d % CHANNELS == 0 && d % S::WIDTH == 0);
    y.fill(0.0);
    for (rows, centred) in matrix.chunks_exact(CHANNELS * d).zip(centred.as_chunks::<CHANNELS>().0) {
        let mut next = rows.as_ptr_range().end;
        for j in (0..d).step_by(S::WIDTH) {
            // In all as many lines as these rows have.
            for line in 0..CHANNELS * S::WIDTH / LINE_FLOATS {
                s.prefetch(next.wrapping_add(line * LINE_FLOATS).cast());
            }
            next = next.wrapping_add(CHANNELS * S::WIDTH);
            // SAFETY: `j + WIDTH <= d`, and there are `CHANNELS` rows of `d`.
            unsafe {
                let out = y.as_mut_ptr().add(j);
                let mut sum = s.load_wide(out);
                for (i, x) in centred.iter().enumerate() {
                    let row = s.load_wide(rows.as_ptr().add(i * d + j));
                    sum = s.add_wide(sum, s.mul_wide(s.splat_wide(*x), row));
                }
                s.store_wide(out, sum);
            }
        }
    }
}

/// Latents of the rows of a block, `matrix` being `[channel][latent]`.
#[inline(always)]
fn latents_of_block<S: Simd>(
    s: S,
    matrix: &[f32],
    d: usize,
    centred: &[[f32; MAX_DIM]; BLOCK],
    y: &mut [[f32; MAX_DIM]; BLOCK],
) {
    assert!(matrix.len() == d * d && d <= MAX_DIM && d.is_multiple_of(S::WIDTH));
    let mut j = 0;
    // SAFETY: `j` and as many vectors stay within `d`, by the conditions; the matrix is d * d by the assertion.
    unsafe {
        while j + 2 * S::WIDTH <= d {
            some_latents::<S, 2>(s, matrix, d, centred, y, j);
            j += 2 * S::WIDTH;
        }
        while j < d {
            some_latents::<S, 1>(s, matrix, d, centred, y, j);
            j += S::WIDTH;
        }
    }
}

/// `N` vectors of latents from `j` on.
///
/// # Safety
/// They are among the `d` of `matrix`, `[d][d]`, with `d` at most MAX_DIM.
#[inline(always)]
unsafe fn some_latents<S: Simd, const N: usize>(
    s: S,
    matrix: &[f32],
    d: usize,
    centred: &[[f32; MAX_DIM]; BLOCK],
    y: &mut [[f32; MAX_DIM]; BLOCK],
    j: usize,
) {
    let mut sums = [[s.splat_wide(0.0); N]; BLOCK];
    for i in 0..d {
        for n in 0..N {
            // SAFETY: the caller's promise.
            let row = unsafe { s.load_wide(matrix.as_ptr().add(i * d + j + n * S::WIDTH)) };
            for r in 0..BLOCK {
                // SAFETY: `i < d`, at most MAX_DIM.
                let x = s.splat_wide(unsafe { *centred[r].get_unchecked(i) });
                sums[r][n] = s.add_wide(sums[r][n], s.mul_wide(x, row));
            }
        }
    }
    for r in 0..BLOCK {
        for n in 0..N {
            // SAFETY: the caller's promise.
            unsafe { s.store_wide(y[r].as_mut_ptr().add(j + n * S::WIDTH), sums[r][n]) };
        }
    }
}

/// The level nearest to each latent, in units of a row of unit variance; returns their product with the latents.
#[inline(always)]
fn nearest_levels<S: Simd>(s: S, y: &[f32], reach: f32, book: &Codebook, levels: &mut [f32]) -> f32 {
    let (pairs, fours) = (Vectors::<S, 2>(s), Vectors::<S, 4>(s));
    let mut along = pairs.splat(0.0);
    // The more vectors, the fewer times each edge is looked up.
    let (y, rest) = y.as_chunks::<{ 2 * LANES }>();
    let (levels, levels_of_rest) = levels.as_chunks_mut::<{ 2 * LANES }>();
    for (out, y) in levels.iter_mut().zip(y) {
        let y = fours.load(y);
        let level = fours.mul(nearest(fours, y, fours.splat(reach), book), fours.splat(book.unit));
        fours.store(level, out);
        let [a, b, c, d] = fours.mul(y, level);
        along = pairs.add(pairs.add(along, [a, b]), [c, d]);
    }
    for (out, y) in levels_of_rest.as_chunks_mut::<LANES>().0.iter_mut().zip(rest.as_chunks::<LANES>().0) {
        let y = pairs.load(y);
        let level = pairs.mul(nearest(pairs, y, pairs.splat(reach), book), pairs.splat(book.unit));
        pairs.store(level, out);
        along = pairs.add(along, pairs.mul(y, level));
    }
    pairs.sum(along)
}

/// The table's entry nearest to each `x * reach`. The positive half of a codebook decides: magnitudes are compared with its
/// edges, the sign is put back. Entries are small integers, so that these sums are exact in any order.
#[inline(always)]
fn nearest<S: Simd, const N: usize>(s: Vectors<S, N>, x: [S::F; N], reach: [S::F; N], book: &Codebook) -> [S::F; N] {
    let magnitude = s.magnitude(s.mul(x, reach));
    // Few vectors take several sums, so that one addition need not wait for the other.
    let chains = if N < 4 { 4 } else { 1 };
    let mut sums = [s.splat(0.0); 4];
    sums[0] = s.splat(book.lowest);
    let (steps, rest) = book.steps.as_chunks::<4>();
    for steps in steps {
        for (i, (edge, step)) in steps.iter().enumerate() {
            sums[i % chains] = s.add_above(sums[i % chains], magnitude, *edge, *step);
        }
    }
    for (edge, step) in rest {
        sums[0] = s.add_above(sums[0], magnitude, *edge, *step);
    }
    let sum = if chains == 1 { sums[0] } else { s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])) };
    s.signed(sum, x)
}

/// Factors of latents to units of a book, by which targets are longer than latents.
#[inline(always)]
fn widened(inverse: &[f32; LANES], book: &Codebook) -> [f32; LANES] {
    let mut out = [0f32; LANES];
    for l in 0..LANES {
        out[l] = inverse[l] * book.widening();
    }
    out
}

/// The codes of [`nearest_levels`]. Zero, of either sign, takes the sign bit's side, as its level does.
#[inline(always)]
fn nearest_codes<S: Simd>(s: S, y: &[f32], reach: f32, book: &Codebook, codes: &mut [u8]) {
    let s = Vectors::<S, 2>(s);
    let half = (1u32 << (book.bits - 1)) as f32;
    let (reach, middle, round) = (s.splat(reach), s.splat(half - 0.5), s.splat(ROUND));
    for (out, y) in codes.as_chunks_mut::<LANES>().0.iter_mut().zip(y.as_chunks::<LANES>().0) {
        let y = s.load(y);
        let magnitude = s.magnitude(s.mul(y, reach));
        // Places lie about the middle: half a step, and one for each edge below.
        let mut steps = s.splat(0.5);
        for (edge, _) in &book.steps {
            steps = s.add_above(steps, magnitude, *edge, 1.0);
        }
        let mut place = [0f32; LANES];
        s.store(s.add(s.add(middle, s.signed(steps, y)), round), &mut place);
        for l in 0..LANES {
            out[l] = book.codes[usize::from(place[l].to_bits() as u8)];
        }
    }
}

/// Uniform codes: the scale is the first of the header's that reaches the largest latent, the codes are chosen
/// against that very scale.
#[inline(always)]
fn code_uniform(y: &[f32], book: &Codebook, set: u8, codes: &mut [u8; MAX_DIM]) -> (u16, bool) {
    let scale = max_abs(y) / (127.0 * book.unit);
    let (mut packed, saturated) = header::pack(scale.min(f32::MAX), set);
    if header::scale(packed) < scale {
        packed = header::next_up(packed);
    }
    let step = header::scale(packed) * book.unit;
    let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
    for (code, y) in codes.iter_mut().zip(y) {
        *code = ((y * inverse).round_ties_even().clamp(-127.0, 127.0) + 128.0) as u8;
    }
    (packed, saturated)
}

#[inline(always)]
fn sum_of_squares<S: Simd>(s: S, x: &[f32]) -> f32 {
    dot(s, x, x)
}

#[inline(always)]
fn dot<S: Simd>(s: S, x: &[f32], y: &[f32]) -> f32 {
    let s = Vectors::<S, 2>(s);
    assert_eq!(x.len(), y.len());
    let mut sum = s.splat(0.0);
    for (x, y) in x.as_chunks::<LANES>().0.iter().zip(y.as_chunks::<LANES>().0) {
        sum = s.add(sum, s.mul(s.load(x), s.load(y)));
    }
    s.sum(sum)
}

#[inline(always)]
fn distance<S: Simd>(s: S, x: &[f32], mean: &[f32]) -> f32 {
    residual(s, x, mean, 1.0)
}

/// `|y - scale * levels|^2`.
#[inline(always)]
fn residual<S: Simd>(s: S, y: &[f32], levels: &[f32], scale: f32) -> f32 {
    let s = Vectors::<S, 2>(s);
    assert_eq!(y.len(), levels.len());
    let (mut sum, scale) = (s.splat(0.0), s.splat(scale));
    for (y, level) in y.as_chunks::<LANES>().0.iter().zip(levels.as_chunks::<LANES>().0) {
        let e = s.sub(s.load(y), s.mul(scale, s.load(level)));
        sum = s.add(sum, s.mul(e, e));
    }
    s.sum(sum)
}

/// NaN when any element is.
#[inline(always)]
fn max_abs(x: &[f32]) -> f32 {
    let mut acc = [0f32; LANES];
    let mut nan = false;
    for chunk in x.as_chunks::<LANES>().0 {
        for (a, v) in acc.iter_mut().zip(chunk) {
            *a = if v.abs() > *a { v.abs() } else { *a };
            nan |= v.is_nan();
        }
    }
    if nan { f32::NAN } else { acc.iter().fold(0.0, |a, b| if *b > a { *b } else { a }) }
}

fn widen(mean: &[f16], out: &mut [f32; MAX_DIM]) {
    mean.convert_to_f32_slice(&mut out[..mean.len()]);
}

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
