//! A layer's factors and statistics in device memory, and their way to and from the host.
//!
//! The host makes fits and imports, the device makes sums and sinks. So before the host reads or adds sets it pulls what
//! the device has made, and pushes the whole afterwards; between the two no work on the layer may run, which the
//! callers' order of a layer's calls and a wait for the stream see to.
//!
//! One stretch of memory per layer, K then V of each part:
//!
//! ```text
//! means f16 [head][16][d] | decode f16 [head][max_dense][d][d] | encode f32 [head][d][d] with its feedback | rotation bits
//! head sets [head] | moments of K, V and queries [head]
//! ```

use half::f16;

use super::driver::{Device, Kernel, Launch, Memory};
use super::params::{self, ENTERED_BYTES, HeadSets, JOINED_DIM, JOINED_ROWS, MAX_SETS, MAX_TRANSFORMS};
use super::view::{Address, Stream};
use crate::error::Result;
use crate::factor::{DueFit, FactorSet, HeadFactors, LayerFactors, RawMoments, Transform, hadamard};
use crate::shape::{Gauge, LayerShape, Side, SideShape};

/// Rows that wait in a unit, as `crate::factor::moments::BLOCK`.
const STAGED: usize = 16;
/// Channels of a mean on its way to the device.
const MEAN: usize = 256;
/// Latents that the encode kernel codes with feedback between two looks at earlier errors.
const BLOCK: usize = 8;

/// Floats of [`SideLayout::encode_table`] for a tier.
fn blocked_len(channels: usize) -> usize {
    channels * (channels + BLOCK) / 2
}

/// Floats of a head's feedback as the kernels read it.
pub fn feedback_floats(side: &SideShape) -> usize {
    if side.plan.feedback_len() == 0 { 0 } else { side.plan.tiers.iter().map(|t| blocked_len(t.channels)).sum() }
}

/// A fit that was made and is to come into force.
pub struct Made {
    pub due: DueFit,
    pub set: FactorSet,
    pub encode: Option<Box<[f32]>>,
}

/// Offsets of one side's parts.
#[derive(Debug, Clone)]
struct SideLayout {
    d: usize,
    max_dense: usize,
    means: usize,
    decode: usize,
    encode: usize,
    /// Floats of a head's matrix and feedback.
    encode_len: usize,
    /// Channels of the tiers.
    tiers: Vec<usize>,
    rotation: usize,
    heads: usize,
}

impl SideLayout {
    /// Of a head's encode matrix.
    fn encode_at(&self, head: usize) -> usize {
        self.encode + head * self.encode_len * 4
    }

    /// A head's encode matrix and feedback as the kernel reads them: the packed triangle of a tier becomes, of each
    /// [`BLOCK`] latents and each latent up to the last of them, [`BLOCK`] weights.
    fn encode_table(&self, encode: &[f32]) -> Vec<f32> {
        let (matrix, mut triangles) = encode.split_at(self.d * self.d);
        let mut out = matrix.to_vec();
        for &channels in self.tiers.iter().filter(|_| !triangles.is_empty()) {
            for block in (0..channels).step_by(BLOCK) {
                let at = out.len();
                out.resize(at + BLOCK * (block + BLOCK), 0.0);
                for i in 0..BLOCK {
                    for (k, weight) in triangles[..=block + i].iter().enumerate() {
                        out[at + BLOCK * k + i] = *weight;
                    }
                    triangles = &triangles[block + i + 1..];
                }
            }
        }
        out
    }
}

/// Offset and stride of a kind of units; `None`: nothing of this kind is ever learned.
#[derive(Debug, Clone, Copy)]
struct UnitsLayout {
    at: usize,
    stride: usize,
    d: usize,
    with_second: bool,
}

/// Where everything of a layer lies.
#[derive(Debug, Clone)]
pub struct TableLayout {
    n_kv: usize,
    sides: [SideLayout; 2],
    /// K, V, queries.
    units: [Option<UnitsLayout>; 3],
    /// From here on: head sets and moments, what the device itself changes (means excepted).
    mutable: usize,
    /// Where that ends: behind it lies what only the device uses, and fits on their way into force.
    end: usize,
    entered: usize,
    entered_stride: usize,
    joined: usize,
    /// Counters that are zero between launches: among what is pushed, so that they begin so.
    arrived: usize,
    fits: usize,
    fit_means: usize,
    fit_ids: usize,
    pub bytes: usize,
}

impl TableLayout {
    pub fn new(shape: &LayerShape, max_fits: usize) -> Self {
        let n_kv = shape.n_kv_heads;
        let mut at = 0usize;
        let mut take = |bytes: usize| {
            let here = at.next_multiple_of(256);
            at = here + bytes;
            here
        };
        let mut side = |s: &SideShape| {
            let d = s.head_dim;
            let encode_len = d * d + feedback_floats(s);
            // Fits of one's own, and some that come with imported rows.
            let max_dense = if s.gauge == Gauge::Attention { (max_fits + 3).min(MAX_TRANSFORMS - 1) } else { 0 };
            SideLayout {
                d,
                max_dense,
                means: take(n_kv * MAX_SETS * d * 2),
                decode: take(n_kv * max_dense * d * d * 2),
                encode: take(if max_dense > 0 { n_kv * encode_len * 4 } else { 0 }),
                encode_len,
                tiers: s.plan.tiers.iter().map(|t| t.channels).collect(),
                rotation: take(d * d.div_ceil(32) * 4),
                heads: 0,
            }
        };
        let mut sides = [side(&shape.k), side(&shape.v)];
        let mutable = take(0);
        for side in &mut sides {
            side.heads = take(n_kv * size_of::<HeadSets>());
        }
        let mut units = |s: &SideShape, queries: bool| {
            if s.gauge == Gauge::Rotation || queries && s.gauge != Gauge::Attention {
                return None;
            }
            let (d, with_second) = (s.head_dim, s.gauge == Gauge::Attention);
            let second = if with_second { d * (d + 1) / 2 } else { 0 };
            let stride = (size_of::<params::Moments>() + 8 * d + 4 * d + 4 * STAGED * d + 4 * second).next_multiple_of(16);
            Some(UnitsLayout { at: take(n_kv * stride), stride, d, with_second })
        };
        let units = [units(&shape.k, false), units(&shape.v, false), units(&shape.k, true)];
        let arrived = take(2 * JOINED_ROWS * 4);
        let end = take(0);
        let joined = take(2 * JOINED_ROWS * JOINED_DIM * 4);
        let d = shape.k.head_dim.max(shape.v.head_dim);
        let entered_stride = ENTERED_BYTES + 4 * STAGED * d;
        let entered = take(3 * n_kv * entered_stride);
        let fits = take(2 * n_kv * size_of::<params::Fit>());
        let fit_means = take(2 * n_kv * 2 * MEAN);
        let fit_ids = take(2 * n_kv * 4);
        let bytes = take(0);
        Self { n_kv, sides, units, mutable, end, entered, entered_stride, joined, arrived, fits, fit_means, fit_ids, bytes }
    }

    fn side(&self, side: Side) -> &SideLayout {
        &self.sides[side as usize]
    }

    pub fn factors(&self, base: Address, side: Side) -> params::Factors {
        let s = self.side(side);
        params::Factors {
            heads: base + s.heads as u64,
            means: base + s.means as u64,
            decode: base + s.decode as u64,
            encode: base + s.encode as u64,
            rotation: base + s.rotation as u64,
            max_dense: s.max_dense as u32,
            reserved: 0,
        }
    }

    /// K, V or queries.
    pub fn units(&self, base: Address, kind: usize) -> params::Units {
        self.units[kind].map_or(params::Units::default(), |u| params::Units {
            data: base + u.at as u64,
            stride: u.stride as u64,
            dim: u.d as u32,
            with_second: u32::from(u.with_second),
        })
    }

    /// What the statistics kernels pass each other: address and stride.
    pub fn entered(&self, base: Address) -> (Address, u64) {
        (base + self.entered as u64, self.entered_stride as u64)
    }

    /// Where blocks of the encode kernel meet: latents and counters.
    pub fn joined(&self, base: Address) -> (Address, Address) {
        (base + self.joined as u64, base + self.arrived as u64)
    }

    /// Dense sets that the side's tables hold beyond those that are there.
    pub fn dense_left(&self, factors: &LayerFactors) -> usize {
        let left = |side: Side| {
            let dense = |h: &HeadFactors| h.sets.iter().filter(|(_, s)| is_dense(&s.transform)).count();
            let used = factors.side(side).iter().map(dense).max().unwrap_or(0);
            self.side(side).max_dense.saturating_sub(used)
        };
        left(Side::K).min(if self.sides[1].max_dense == 0 { usize::MAX } else { left(Side::V) })
    }

    /// All of it, from what the host knows.
    fn image(&self, factors: &LayerFactors) -> Vec<u8> {
        let mut bytes = vec![0u8; self.end];
        for (side, head, unit) in factors.units() {
            self.write_sets(&mut bytes, side, head, unit);
            self.write_moments(&mut bytes, side as usize, head, unit, false);
            if side == Side::K {
                self.write_moments(&mut bytes, 2, head, unit, true);
            }
        }
        for s in &self.sides {
            write_rotation(&mut bytes[s.rotation..], s.d);
        }
        bytes
    }

    fn write_sets(&self, bytes: &mut [u8], side: Side, head: usize, unit: &HeadFactors) {
        let s = self.side(side);
        let d = s.d;
        let encode = unit.sets.encode();
        let mut table = HeadSets { newest: encode.set, ..HeadSets::default() };
        let (places, _) = places(unit, s.max_dense);
        for (id, set) in unit.sets.iter() {
            let index = usize::from(id);
            table.present |= 1 << id;
            put_halves(&mut bytes[s.means + (head * MAX_SETS + index) * d * 2..], &set.mean);
            if let Transform::Dense { decode } = &*set.transform {
                if let Some(place) = places[index] {
                    put_halves(&mut bytes[s.decode + (head * s.max_dense + place) * d * d * 2..], decode);
                    table.transform[index] = 1 + place as u8;
                }
            }
            if id == encode.set {
                table.kappa = set.kappa;
            }
        }
        unit.sets.sinks().for_each(|id| table.sinks |= 1 << id);
        if let Some(matrix) = encode.matrix.as_deref().filter(|_| s.max_dense > 0) {
            table.encode_dense = 1;
            put_floats(&mut bytes[s.encode_at(head)..], &s.encode_table(matrix));
        }
        put_struct(&mut bytes[s.heads + head * size_of::<HeadSets>()..], &table);
    }

    fn write_moments(&self, bytes: &mut [u8], kind: usize, head: usize, unit: &HeadFactors, queries: bool) {
        let Some(u) = &self.units[kind] else { return };
        let at = &mut bytes[u.at + head * u.stride..][..u.stride];
        let mut head = params::Moments {
            takes_sinks: u32::from(!queries && unit.takes_sinks()),
            due: unit.next_fit_at().unwrap_or(u64::MAX),
            spread: unit.frozen_spread(),
            ..params::Moments::default()
        };
        unit.with_moments(queries, |m| {
            let m = m.raw();
            head.rows = *m.rows;
            head.energy = *m.energy;
            head.slack = *m.slack;
            head.n_staged = *m.n_staged as u32;
            head.has_reference = u32::from(*m.has_reference);
            head.learns = 1;
            let mut rest = &mut at[size_of::<params::Moments>()..];
            for x in m.sum.iter() {
                rest[..8].copy_from_slice(&x.to_le_bytes());
                rest = &mut rest[8..];
            }
            for part in [&*m.reference, &*m.staged, &*m.second] {
                put_floats(rest, part);
                rest = &mut rest[4 * part.len()..];
            }
        });
        put_struct(at, &head);
    }

    /// Takes up what the device has made: sinks and sums.
    fn read(&self, bytes: &[u8], factors: &LayerFactors) {
        for (side, head, unit) in factors.units() {
            let s = self.side(side);
            let table: HeadSets = get_struct(&bytes[s.heads + head * size_of::<HeadSets>()..]);
            let known: u16 = unit.sets.sinks().fold(0, |m, id| m | 1 << id);
            for id in (0..MAX_SETS as u8).filter(|id| (table.sinks & !known) >> id & 1 == 1) {
                let at = s.means + (head * MAX_SETS + usize::from(id)) * s.d * 2;
                let mean = bytes[at..at + 2 * s.d].as_chunks::<2>().0;
                unit.take_sink(id, mean.iter().map(|b| f16::from_le_bytes(*b)).collect());
            }
            self.read_moments(bytes, side as usize, head, unit, false);
            if side == Side::K {
                self.read_moments(bytes, 2, head, unit, true);
            }
        }
    }

    fn read_moments(&self, bytes: &[u8], kind: usize, head: usize, unit: &HeadFactors, queries: bool) {
        let Some(u) = &self.units[kind] else { return };
        let at = &bytes[u.at + head * u.stride..][..u.stride];
        let head: params::Moments = get_struct(at);
        unit.with_moments(queries, |m| {
            let RawMoments { rows, energy, slack, n_staged, has_reference, sum, reference, staged, second } = m.raw();
            *rows = head.rows;
            *energy = head.energy;
            *slack = head.slack;
            *n_staged = head.n_staged as usize;
            *has_reference = head.has_reference != 0;
            let mut rest = &at[size_of::<params::Moments>()..];
            for (x, b) in sum.iter_mut().zip(rest.as_chunks::<8>().0) {
                *x = f64::from_le_bytes(*b);
            }
            rest = &rest[8 * sum.len()..];
            for part in [reference, staged, second] {
                for (x, b) in part.iter_mut().zip(rest.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*b);
                }
                rest = &rest[4 * part.len()..];
            }
        });
    }

    /// Everything to the device: matrices and means, then the sets that name them.
    pub fn push(&self, device: &Device, memory: &Memory, at: usize, factors: &LayerFactors, stream: Stream) -> Result<()> {
        let bytes = self.image(factors);
        let base = memory.data + at as u64;
        // SAFETY: the layer's stretch of the codec's memory.
        unsafe {
            device.upload(base, &bytes[..self.mutable], stream)?;
            device.upload(base + self.mutable as u64, &bytes[self.mutable..], stream)?;
        }
        device.wait(stream)
    }

    /// Puts fits into force, one per unit of the layer or none: matrices to their places, which nobody reads yet, but for
    /// the encode matrices, which the order of the stream keeps from those who do; then the sets that name them. Gives the
    /// ids that the device has chosen, 0 where none was free.
    pub fn publish(
        &self,
        device: &Device,
        kernel: Kernel,
        memory: &Memory,
        at: usize,
        factors: &LayerFactors,
        made: &[Option<Made>],
        stream: Stream,
    ) -> Result<Vec<u8>> {
        let base = memory.data + at as u64;
        let mut fits = vec![0u8; self.fit_means - self.fits];
        let mut means = vec![0u8; self.fit_ids - self.fit_means];
        // Copies are on their way until the wait below.
        let mut copies: Vec<(usize, Vec<u8>)> = Vec::new();
        for (index, ((side, head, unit), made)) in factors.units().zip(made).enumerate() {
            let Some(Made { due, set, encode }) = made else { continue };
            let (s, d) = (self.side(side), set.mean.len());
            let mut fit = params::Fit {
                wanted: 1,
                id: unit.sets.find(set.hash).unwrap_or(0),
                last: u8::from(due.last),
                kappa: set.kappa,
                spread: due.spread,
                due: due.next_at,
                ..params::Fit::default()
            };
            if let Transform::Dense { decode } = &*set.transform {
                let (taken, place) = places(unit, s.max_dense);
                if taken.contains(&Some(place)) || place >= s.max_dense {
                    // Imports have taken it.
                    fit.id = params::NO_PLACE;
                } else {
                    fit.transform = 1 + place as u8;
                    copies.push((s.decode + (head * s.max_dense + place) * d * d * 2, halves(decode)));
                }
            }
            if let Some(matrix) = encode.as_ref().filter(|_| fit.id != params::NO_PLACE) {
                fit.encode_dense = 1;
                copies.push((s.encode_at(head), s.encode_table(matrix).iter().flat_map(|x| x.to_le_bytes()).collect()));
            }
            put_struct(&mut fits[index * size_of::<params::Fit>()..], &fit);
            put_halves(&mut means[index * 2 * MEAN..], &set.mean);
        }
        copies.push((self.fits, fits));
        copies.push((self.fit_means, means));
        for (at, bytes) in &copies {
            // SAFETY: the layer's stretch of the codec's memory.
            unsafe { device.upload(base + *at as u64, bytes, stream) }?;
        }
        let (k, v) = (self.factors(base, Side::K), self.factors(base, Side::V));
        let p = params::Publish {
            k: self.units(base, 0),
            v: self.units(base, 1),
            q: self.units(base, 2),
            k_heads: k.heads,
            v_heads: v.heads,
            k_means: k.means,
            v_means: v.means,
            fits: base + self.fits as u64,
            means: base + self.fit_means as u64,
            ids: base + self.fit_ids as u64,
            n_kv_heads: self.n_kv as u32,
            reserved: 0,
        };
        let mut ids = vec![0u8; 4 * made.len()];
        // SAFETY: as above; the kernel stays within the layer's tables.
        unsafe {
            device.launch(&Launch { kernel, grid: (self.n_kv, 2, 1), threads: 256, shared: 0 }, stream, &p)?;
            device.download(p.ids, &mut ids, stream)?;
        }
        Ok(ids.as_chunks::<4>().0.iter().map(|id| id[0]).collect())
    }

    /// What the device has made to the host.
    pub fn pull(&self, device: &Device, memory: &Memory, at: usize, factors: &LayerFactors, stream: Stream) -> Result<()> {
        let mut bytes = vec![0u8; self.end];
        let base = memory.data + at as u64;
        // Matrices are the host's own.
        for s in &self.sides {
            let means = s.means..s.means + self.n_kv * MAX_SETS * s.d * 2;
            // SAFETY: as above.
            unsafe { device.download(base + s.means as u64, &mut bytes[means], stream) }?;
        }
        // SAFETY: as above.
        unsafe { device.download(base + self.mutable as u64, &mut bytes[self.mutable..], stream) }?;
        self.read(&bytes, factors);
        Ok(())
    }
}

/// The place of each set's matrix among a head's, and that of the next fit. A set keeps its place, since attention may read
/// meanwhile: fits take ids and places from below, imports from above.
fn places(unit: &HeadFactors, max_dense: usize) -> ([Option<usize>; MAX_SETS], usize) {
    let imports_from = (1..MAX_SETS as u8).rev().take_while(|id| unit.sets.get(*id).is_some()).last().unwrap_or(16);
    let dense_from = |id: u8| unit.sets.iter().filter(|(i, s)| *i >= id && is_dense(&s.transform)).count();
    let (mut places, mut next) = ([None; MAX_SETS], 0);
    for (id, _) in unit.sets.iter().filter(|(_, s)| is_dense(&s.transform)) {
        let place = if id >= imports_from {
            max_dense.checked_sub(dense_from(id))
        } else {
            next += 1;
            Some(next - 1)
        };
        places[usize::from(id)] = place.filter(|p| *p < max_dense);
    }
    (places, next)
}

fn is_dense(transform: &Transform) -> bool {
    matches!(transform, Transform::Dense { .. })
}

/// Bit `c` of row `latent` set: the entry is negative.
fn write_rotation(bytes: &mut [u8], d: usize) {
    let words = d.div_ceil(32);
    let matrix = hadamard::rotation_matrix(d);
    for latent in 0..d {
        for c in (0..d).filter(|c| matrix[latent * d + c] < 0.0) {
            bytes[4 * (latent * words + c / 32) + c % 32 / 8] |= 1 << (c % 8);
        }
    }
}

fn put_halves(bytes: &mut [u8], values: &[f16]) {
    for (b, x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *b = x.to_le_bytes();
    }
}

fn halves(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn put_floats(bytes: &mut [u8], values: &[f32]) {
    for (b, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *b = x.to_le_bytes();
    }
}

fn put_struct<T: Copy>(bytes: &mut [u8], value: &T) {
    assert!(bytes.len() >= size_of::<T>());
    // SAFETY: room was checked; the structs of `params` are plain numbers without padding between them.
    unsafe { std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>(), bytes.as_mut_ptr(), size_of::<T>()) }
}

fn get_struct<T: Copy>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>());
    // SAFETY: as above; any bits are valid numbers.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}
