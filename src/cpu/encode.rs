//! New rows into records.
//!
//! The same rows and factor sets give the same bytes on every CPU and for every shard count: each sum has one order,
//! written once below and compiled for several instruction sets. Chains run over input channels with lanes over
//! outputs, sums over a row keep [`LANES`] partial sums, and products are rounded before they are added (Rust never
//! contracts them).

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::code::codebook::{Codebook, codebook};
use crate::code::{header, planes};
use crate::cpu::simd::Isa;
use crate::error::Result;
use crate::factor::{Encode, HeadSets, LayerFactors, MAX_SINKS, ROTATION_KAPPA, ROTATION_SET, TierWeights, hadamard};
use crate::shape::{LayerShape, MAX_TIERS, Side, SideShape};
use crate::view::{Rows, Store, Tokens};

/// Partial sums of a sum over a row; every head_dim is a multiple.
const LANES: usize = 16;
/// Rows that share one pass over the encode matrix.
const BLOCK: usize = 4;
const MAX_DIM: usize = 256;
/// A row leaves the newest set only for one that costs less than this share of it: below a factor of two a switch
/// buys nothing and mixes sets within the tiles of attention.
const SWITCH: f32 = 0.5;
/// Row scales tried, as multiples of the row's rms.
const MULTIPLES: [f32; 8] = [0.76, 0.83, 0.9, 0.97, 1.04, 1.11, 1.18, 1.26];
/// Scales tried with feedback, as multiples of the best one without: what is carried on widens the targets.
const FEEDBACK_MULTIPLES: [f32; LANES / BLOCK] = [0.94, 1.0, 1.06, 1.12];
/// Beyond this a row's squares could overflow f32; its scale is far beyond f16 anyway.
const HUGE: f32 = 1e15;

/// What encode has to tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeReport {
    /// Rows with NaN or infinity, written as zero rows of set 0, and rows whose scale was cut to the largest one.
    pub replaced_rows: u64,
}

/// Codes this shard's share of the tokens. Tokens are dealt in runs, so that one shard writes a slot's whole record.
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
    let Some((k, v)) = tokens.kv else { return Ok(report) };
    let run = tokens.n_tokens * shard / n_shards..tokens.n_tokens * (shard + 1) / n_shards;
    for &slot in &slots[run.clone()] {
        if slot >= 0 {
            // SAFETY: slots of a call differ from each other and a token belongs to one shard, so this thread alone
            // writes the slot; readers are kept off by the caller (dq_codec's contract).
            let record = unsafe { store.slot_mut(slot as usize) };
            record[shape.v.headers_offset + 2 * shape.n_kv_heads..].fill(0);
        }
    }
    for (side, rows) in [(Side::K, &k), (Side::V, &v)] {
        for head in 0..shape.n_kv_heads {
            let coder = RowCoder::new(shape.side(side), &factors.side(side)[head].sets);
            let job = Job { coder: &coder, rows, head, slots, store };
            report.replaced_rows += dispatch(isa, &job, run.start, run.end);
        }
    }
    Ok(report)
}

/// One head and side of a call.
struct Job<'a> {
    coder: &'a RowCoder<'a>,
    rows: &'a Rows<'a>,
    head: usize,
    slots: &'a [i64],
    store: &'a Store<'a>,
}

/// Runs the one body compiled for the instructions at hand. All give the same bytes.
fn dispatch(isa: Isa, job: &Job, first: usize, end: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,f16c")]
        fn avx2(job: &Job, first: usize, end: usize) -> u64 {
            encode_run(job, first, end)
        }
        if isa != Isa::Portable && Isa::Avx2.available() {
            // SAFETY: the CPU has the features.
            return unsafe { avx2(job, first, end) };
        }
    }
    let _ = isa;
    encode_run(job, first, end)
}

#[inline(always)]
fn encode_run(job: &Job, first: usize, end: usize) -> u64 {
    let d = job.coder.shape.head_dim;
    let mut replaced = 0;
    let mut x = [[0f32; MAX_DIM]; BLOCK];
    let mut y = [[0f32; MAX_DIM]; BLOCK];
    let mut finite = [true; BLOCK];
    let mut coded = [Coded::default(); BLOCK];
    let mut scratch = Feedback::new();
    for base in (first..end).step_by(BLOCK) {
        let n = BLOCK.min(end - base);
        for r in 0..n {
            job.rows.load(base + r, job.head, &mut x[r][..d]);
            finite[r] = tame(&mut x[r][..d]);
        }
        // A token alone, as in generation, is not worth a block.
        match n {
            1 => job.coder.newest_latents::<1>(&x, &mut y),
            _ => job.coder.newest_latents::<BLOCK>(&x, &mut y),
        }
        job.coder.code_block(&x, &mut y, &finite, n, &mut coded, &mut scratch);
        for r in 0..n {
            let slot = job.slots[base + r];
            if slot < 0 {
                continue;
            }
            // SAFETY: as in encode_shard: this shard owns the token and with it the slot.
            let record = unsafe { job.store.slot_mut(slot as usize) };
            job.coder.write(&coded[r], job.head, record);
            replaced += u64::from(!finite[r] || coded[r].saturated);
        }
    }
    replaced
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
    codes: [[u8; LANES]; MAX_DIM],
}

impl Feedback {
    fn new() -> Self {
        Self { errors: [[0.0; LANES]; MAX_DIM], codes: [[0; LANES]; MAX_DIM] }
    }
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

    /// Latents of the first rows of a block under the newest set: `y = encode * (x - mean)`.
    #[inline(always)]
    fn newest_latents<const ROWS: usize>(&self, x: &[[f32; MAX_DIM]; BLOCK], y: &mut [[f32; MAX_DIM]; BLOCK]) {
        let d = self.shape.head_dim;
        let mean = &self.newest_mean[..d];
        match &self.newest.matrix {
            None => {
                for r in 0..ROWS {
                    for (o, (a, m)) in y[r][..d].iter_mut().zip(x[r][..d].iter().zip(mean)) {
                        *o = a - m;
                    }
                    hadamard::rotate(&mut y[r][..d]);
                }
            }
            Some(matrix) => {
                // matrix: [channel i][latent j]
                for j in (0..d).step_by(LANES) {
                    let mut acc = [[0f32; LANES]; ROWS];
                    for i in 0..d {
                        let row: &[f32; LANES] = matrix[i * d + j..i * d + j + LANES].try_into().expect("LANES long");
                        for r in 0..ROWS {
                            let centred = x[r][i] - mean[i];
                            for l in 0..LANES {
                                acc[r][l] += centred * row[l];
                            }
                        }
                    }
                    for r in 0..ROWS {
                        y[r][j..j + LANES].copy_from_slice(&acc[r]);
                    }
                }
            }
        }
    }

    /// Picks each row's set and codes the first `n` rows of a block; `y` are the latents of the newest set.
    ///
    /// The error of a set is `sum over tiers of kappa_t |y_t - y^_t|^2`. For Gaussian latents a code of b bits leaves a
    /// known share of `|y_t|^2`; that expectation decides, so that only the winner is coded.
    #[inline(always)]
    fn code_block(
        &self,
        x: &[[f32; MAX_DIM]; BLOCK],
        y: &mut [[f32; MAX_DIM]; BLOCK],
        finite: &[bool; BLOCK],
        n: usize,
        coded: &mut [Coded; BLOCK],
        scratch: &mut Feedback,
    ) {
        let d = self.shape.head_dim;
        let mut others = [None; BLOCK];
        let mut newest = [false; BLOCK];
        for r in 0..n {
            let (other, distance) = self.cheapest_other(&x[r][..d]);
            others[r] = other;
            let cost = self.expected_error(&y[r][..d], &self.newest_kappa);
            // Also catches a cost that overflowed.
            newest[r] = finite[r] && !(distance * self.rotation_distortion < SWITCH * cost);
            if newest[r] {
                self.code(&y[r][..d], self.newest.set, &self.newest_kappa, &mut coded[r]);
            }
        }
        if newest[..n].contains(&true) {
            self.feed_back(y, coded, scratch, newest);
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
            self.code(y, other.map_or(ROTATION_SET, |s| s.id), &ROTATION_KAPPA, &mut coded[r]);
        }
    }

    #[inline(always)]
    fn expected_error(&self, y: &[f32], kappa: &TierWeights) -> f32 {
        self.over_tiers(|t, channels| kappa[t] * self.books[t].distortion * sum_of_squares(&y[channels]))
    }

    #[inline(always)]
    fn over_tiers(&self, term: impl Fn(usize, Range<usize>) -> f32) -> f32 {
        let mut sum = 0.0;
        for (t, tier) in self.shape.plan.tiers.iter().enumerate() {
            sum += term(t, tier.first..tier.first + tier.channels);
        }
        sum
    }

    /// The best of the sets that share the rotation: their cost is the distance to the mean.
    #[inline(always)]
    fn cheapest_other(&self, x: &[f32]) -> (Option<&Sink>, f32) {
        let mut best = (None, sum_of_squares(x));
        for sink in &self.sinks[..self.n_sinks] {
            let cost = distance(x, &sink.mean[..x.len()]);
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
    fn code(&self, y: &[f32], set: u8, kappa: &TierWeights, coded: &mut Coded) {
        (coded.header, coded.saturated) = if self.shape.plan.tiers[0].bits == 8 {
            code_uniform(y, self.books[0], set, &mut coded.codes)
        } else {
            self.code_levels(y, set, kappa, &mut coded.codes)
        };
    }

    #[inline(always)]
    fn write(&self, coded: &Coded, head: usize, record: &mut [u8]) {
        planes::pack(&self.shape.planes, head, &coded.codes[..self.shape.head_dim], record);
        let at = self.shape.headers_offset + 2 * head;
        record[at..at + 2].copy_from_slice(&coded.header.to_le_bytes());
    }

    /// Codes the rows of `wanted` anew, latent after latent, each against what the errors before it leave to be said (see
    /// `factor::fit`). A few scales around the one found without; the least loss wins, at the scale that makes the targets'
    /// codes as long as the targets.
    #[inline(always)]
    fn feed_back(
        &self,
        y: &[[f32; MAX_DIM]; BLOCK],
        coded: &mut [Coded; BLOCK],
        scratch: &mut Feedback,
        wanted: [bool; BLOCK],
    ) {
        const SCALES: usize = FEEDBACK_MULTIPLES.len();
        let d = self.shape.head_dim;
        let mut triangles = match &self.newest.matrix {
            Some(matrix) if matrix.len() > d * d => &matrix[d * d..],
            _ => return,
        };
        let headers: [(u16, bool); LANES] = std::array::from_fn(|l| {
            header::pack(header::scale(coded[l / SCALES].header) * FEEDBACK_MULTIPLES[l % SCALES], self.newest.set)
        });
        let scale = headers.map(|(packed, _)| header::scale(packed));
        let inverse = scale.map(|s| if s > 0.0 { 1.0 / s } else { 0.0 });
        let mut cost = [0f32; LANES];
        // Of the targets, with themselves and with what their codes stand for.
        let (mut size, mut along) = ([0f32; LANES], [0f32; LANES]);
        for (t, (tier, book)) in self.shape.plan.tiers.iter().zip(self.books).enumerate() {
            let half = 1usize << (book.bits - 1);
            let inverse = inverse.map(|i| i * book.widening());
            let (mut lost, mut tier_size, mut tier_along) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
            for j in 0..tier.channels {
                let (row, rest) = triangles.split_at(j + 1);
                triangles = rest;
                let latent: [f32; LANES] = std::array::from_fn(|l| y[l / SCALES][tier.first + j]);
                let mut target = latent;
                for (weight, error) in row[..j].iter().zip(&scratch.errors) {
                    for l in 0..LANES {
                        target[l] -= weight * error[l];
                    }
                }
                let mut level = [f32::from(book.levels[half]); LANES];
                let mut above = [0i32; LANES];
                let magnitude: [f32; LANES] = std::array::from_fn(|l| (target[l] * inverse[l]).abs());
                for m in 1..half {
                    let edge = book.edges[half - 1 + m];
                    let step = f32::from(book.levels[half + m]) - f32::from(book.levels[half + m - 1]);
                    for l in 0..LANES {
                        level[l] += if magnitude[l] > edge { step } else { 0.0 };
                        above[l] += i32::from(magnitude[l] > edge);
                    }
                }
                for l in 0..LANES {
                    let value = scale[l] * (level[l].copysign(target[l]) * book.unit);
                    let left = value - target[l];
                    scratch.errors[j][l] = value - latent[l];
                    lost[l] += row[j] * (left * left);
                    tier_size[l] += row[j] * (target[l] * target[l]);
                    tier_along[l] += row[j] * (target[l] * value);
                    let half = half as i32;
                    let place = if target[l].is_sign_negative() { half - 1 - above[l] } else { half + above[l] };
                    scratch.codes[tier.first + j][l] = book.codes[usize::from(place as u8)];
                }
            }
            for l in 0..LANES {
                cost[l] += self.newest_kappa[t] * lost[l];
                size[l] += self.newest_kappa[t] * tier_size[l];
                along[l] += self.newest_kappa[t] * tier_along[l];
            }
        }
        for (r, coded) in coded.iter_mut().enumerate().filter(|(r, _)| wanted[*r]) {
            let mut best = None;
            for l in r * SCALES..(r + 1) * SCALES {
                if !headers[l].1 && best.is_none_or(|b: usize| cost[l] < cost[b]) {
                    best = Some(l);
                }
            }
            // With all of them beyond the largest scale the row is cut already.
            if let Some(l) = best {
                let ratio = size[l] / along[l];
                // A factor file may hold weights of any sign.
                let unbiased = if ratio > 0.0 && ratio.is_finite() { scale[l] * ratio } else { scale[l] };
                coded.header = match header::pack(unbiased.min(f32::MAX), self.newest.set) {
                    (packed, false) => packed,
                    _ => headers[l].0,
                };
                coded.codes[..d].iter_mut().zip(&scratch.codes).for_each(|(code, lanes)| *code = lanes[l]);
            }
        }
    }

    /// Codes by the nearest level for a few scales around the rms. Each is then replaced by the scale that makes the coded
    /// row as long, along the row, as the row itself; the one with the least error after rounding to the header wins. The
    /// least squares would shorten every row by its share of error, which attention cannot average away as it does the
    /// rest of the error. Tiers count with their kappa.
    #[inline(always)]
    fn code_levels(&self, y: &[f32], set: u8, kappa: &TierWeights, codes: &mut [u8; MAX_DIM]) -> (u16, bool) {
        let rms = (sum_of_squares(y) / y.len() as f32).sqrt();
        let mut best: Option<(f32, f32, u16, bool)> = None;
        let mut levels = [0f32; MAX_DIM];
        if rms > 0.0 {
            let energy = self.over_tiers(|t, c| kappa[t] * sum_of_squares(&y[c]));
            for multiple in MULTIPLES {
                let reach = 1.0 / (rms * multiple);
                self.levels(y, reach, &mut levels);
                let projection = self.over_tiers(|t, c| kappa[t] * dot(&y[c.clone()], &levels[c]));
                let (packed, saturated) = header::pack((energy / projection).clamp(0.0, f32::MAX), set);
                let scale = header::scale(packed);
                let error = self.over_tiers(|t, c| kappa[t] * residual(&y[c.clone()], &levels[c], scale));
                if best.is_none_or(|b| error < b.0) {
                    best = Some((error, reach, packed, saturated));
                }
            }
        }
        let (_, reach, packed, saturated) = best.unwrap_or((0.0, 0.0, u16::from(set), false));
        for (tier, book) in self.shape.plan.tiers.iter().zip(self.books) {
            let channels = tier.first..tier.first + tier.channels;
            nearest_codes(&y[channels.clone()], reach, book, &mut codes[channels]);
        }
        (packed, saturated)
    }

    /// The level nearest to each latent, in units of a row of unit variance.
    #[inline(always)]
    fn levels(&self, y: &[f32], reach: f32, levels: &mut [f32; MAX_DIM]) {
        for (tier, book) in self.shape.plan.tiers.iter().zip(self.books) {
            let channels = tier.first..tier.first + tier.channels;
            nearest_levels(&y[channels.clone()], reach, book, &mut levels[channels]);
        }
    }
}

/// The positive half of a codebook decides: magnitudes are compared with its edges, the sign is put back. Levels of
/// the int8 table are small integers, so that these sums are exact.
#[inline(always)]
fn nearest_levels(y: &[f32], reach: f32, book: &Codebook, levels: &mut [f32]) {
    let half = 1usize << (book.bits - 1);
    let lowest = f32::from(book.levels[half]);
    for (out, y) in levels.as_chunks_mut::<LANES>().0.iter_mut().zip(y.as_chunks::<LANES>().0) {
        let mut level = [lowest; LANES];
        let magnitude: [f32; LANES] = std::array::from_fn(|l| (y[l] * reach).abs());
        for m in 1..half {
            let edge = book.edges[half - 1 + m];
            let step = f32::from(book.levels[half + m]) - f32::from(book.levels[half + m - 1]);
            for l in 0..LANES {
                level[l] += if magnitude[l] > edge { step } else { 0.0 };
            }
        }
        for l in 0..LANES {
            out[l] = level[l].copysign(y[l]) * book.unit;
        }
    }
}

/// The codes of [`nearest_levels`]. Zero, of either sign, takes the sign bit's side, as its level does.
#[inline(always)]
fn nearest_codes(y: &[f32], reach: f32, book: &Codebook, codes: &mut [u8]) {
    let half = 1i32 << (book.bits - 1);
    for (out, y) in codes.as_chunks_mut::<LANES>().0.iter_mut().zip(y.as_chunks::<LANES>().0) {
        let mut m = [0i32; LANES];
        let magnitude: [f32; LANES] = std::array::from_fn(|l| (y[l] * reach).abs());
        for edge in &book.edges[half as usize..] {
            for l in 0..LANES {
                m[l] += i32::from(magnitude[l] > *edge);
            }
        }
        for l in 0..LANES {
            let place = if y[l].is_sign_negative() { half - 1 - m[l] } else { half + m[l] };
            out[l] = book.codes[usize::from(place as u8)];
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
fn lanes_sum(x: &[f32], term: impl Fn(usize) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    for chunk in 0..x.len() / LANES {
        for (l, a) in acc.iter_mut().enumerate() {
            *a += term(chunk * LANES + l);
        }
    }
    fold_lanes(acc)
}

/// The one order in which lanes are added.
#[inline(always)]
fn fold_lanes(mut acc: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            acc[l] += acc[l + width];
        }
        width /= 2;
    }
    acc[0]
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    lanes_sum(x, |i| x[i] * x[i])
}

#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    lanes_sum(x, |i| x[i] * y[i])
}

#[inline(always)]
fn distance(x: &[f32], mean: &[f32]) -> f32 {
    assert_eq!(x.len(), mean.len());
    lanes_sum(x, |i| {
        let e = x[i] - mean[i];
        e * e
    })
}

#[inline(always)]
fn residual(y: &[f32], levels: &[f32], scale: f32) -> f32 {
    assert_eq!(y.len(), levels.len());
    lanes_sum(y, |i| {
        let e = y[i] - scale * levels[i];
        e * e
    })
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
