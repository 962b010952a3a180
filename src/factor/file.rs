//! Factor files and set exports: little endian, one length, one checksum, the same form for both.
//!
//! ```text
//! magic [8] | version u32 | layers u32 | fingerprint [32] | length u64 of the whole | layers | XXH3-64 of all before
//! layer: query heads, KV heads, then K and V: head_dim, plan, gauge; all u32 | heads, K first
//! head:  newest u8, sets u8, sinks u16, rows seen u64 | sets | encode | moments
//! set:   id u8, transform u8 (0 rotation, 1 dense), kappa f32 [4], mean f16 [d], dense: decode f16 [d][d]
//! encode: u8 (1: f32 [d][d] and the plan's feedback f32 follow) | moments: u8 count, each: rows u64, energy f64, second u8, reference f32 [d],
//!         sum f64 [d], with second: f32 [d (d + 1) / 2]
//! ```
//!
//! The first set of a head, the rotation, is not written. Exports hold one layer, and no moments.

use half::f16;

use super::head::HeadFactors;
use super::moments::Moments;
use super::sets::{FactorSet, ROTATION_KAPPA, Transform};
use super::LayerFactors;
use crate::error::{Error, Result};
use crate::shape::{Gauge, LayerShape, MAX_SETS, SideShape};

pub const FACTOR_MAGIC: [u8; 8] = *b"DQFACTOR";
pub const EXPORT_MAGIC: [u8; 8] = *b"DQSETS\0\0";
const VERSION: u32 = 1;
/// Magic to length.
const PREFIX: usize = 56;
const CHECKSUM: usize = 8;
/// Bytes read at a time, so that a wrong length cannot make us allocate what was never there.
const PIECE: usize = 1 << 20;

/// Receives bytes in order.
pub type Write<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;
/// Fills the slice with the next bytes, or fails.
pub type Read<'a> = &'a mut dyn FnMut(&mut [u8]) -> Result<()>;

/// One set as read.
pub struct ReadSet {
    pub id: u8,
    pub set: FactorSet,
    pub sink: bool,
}

/// One head as read; nothing is changed until all heads are.
pub struct ReadHead {
    pub newest: u8,
    pub rows_seen: u64,
    pub sets: Vec<ReadSet>,
    pub encode: Option<Box<[f32]>>,
}

/// Writes layers; `whole` adds moments (a factor file).
pub fn write(
    magic: [u8; 8],
    fingerprint: &[u8; 32],
    layers: &[(&LayerShape, &LayerFactors)],
    whole: bool,
    write: Write,
) -> Result<()> {
    let mut out = Vec::new();
    out.extend(magic);
    out.extend(VERSION.to_le_bytes());
    out.extend((layers.len() as u32).to_le_bytes());
    out.extend(fingerprint);
    out.extend([0; 8]);
    for (shape, factors) in layers {
        shape_numbers(shape).iter().for_each(|(_, n)| out.extend(n.to_le_bytes()));
        factors.units().for_each(|(_, _, head)| write_head(head, whole, &mut out));
    }
    let length = (out.len() + CHECKSUM) as u64;
    out[PREFIX - 8..PREFIX].copy_from_slice(&length.to_le_bytes());
    let checksum = xxhash_rust::xxh3::xxh3_64(&out);
    out.extend(checksum.to_le_bytes());
    out.chunks(PIECE).try_for_each(write)
}

fn shape_numbers(shape: &LayerShape) -> [(&'static str, u32); 8] {
    let gauge = |g| match g {
        Gauge::Rotation => 1,
        Gauge::Centred => 2,
        Gauge::Attention => 3,
    };
    [
        ("n_q_heads", shape.n_q_heads as u32),
        ("n_kv_heads", shape.n_kv_heads as u32),
        ("head_dim_k", shape.k.head_dim as u32),
        ("k_plan", shape.k.plan.id),
        ("k_gauge", gauge(shape.k.gauge)),
        ("head_dim_v", shape.v.head_dim as u32),
        ("v_plan", shape.v.plan.id),
        ("v_gauge", gauge(shape.v.gauge)),
    ]
}

fn write_head(head: &HeadFactors, whole: bool, out: &mut Vec<u8>) {
    // Held throughout, so that sets and moments are of one moment.
    let stats = head.stats();
    let encode = head.sets.encode();
    let sets: Vec<_> = head.sets.iter().skip(1).collect();
    let sinks = head.sets.sinks().fold(0u16, |mask, id| mask | 1 << id);
    out.extend([encode.set, sets.len() as u8]);
    out.extend(sinks.to_le_bytes());
    let rows_seen = stats.running.as_ref().map_or(stats.rows_seen, |r| r.rows.rows());
    out.extend(rows_seen.to_le_bytes());
    for (id, set) in sets {
        let dense = matches!(*set.transform, Transform::Dense { .. });
        out.extend([id, u8::from(dense)]);
        set.kappa.iter().for_each(|k| out.extend(k.to_le_bytes()));
        set.mean.iter().for_each(|x| out.extend(x.to_le_bytes()));
        if let Transform::Dense { decode } = &*set.transform {
            decode.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
    }
    out.push(u8::from(encode.matrix.is_some()));
    encode.matrix.iter().flat_map(|m| m.iter()).for_each(|x| out.extend(x.to_le_bytes()));
    let running = stats.running.as_ref().filter(|_| whole);
    let moments: Vec<&Moments> = running.map_or(Vec::new(), |r| [&r.rows].into_iter().chain(&r.queries).collect());
    out.push(moments.len() as u8);
    for m in moments {
        let (rows, energy, reference, sum, second) = m.parts();
        out.extend(rows.to_le_bytes());
        out.extend(energy.to_le_bytes());
        out.push(u8::from(!second.is_empty()));
        reference.iter().for_each(|x| out.extend(x.to_le_bytes()));
        sum.iter().for_each(|x| out.extend(x.to_le_bytes()));
        second.iter().for_each(|x| out.extend(x.to_le_bytes()));
    }
}

/// Reads and checks everything; `shapes` are the layers that must be in it.
///
/// A dense newest set comes with its encode matrix: rows could not be coded without.
pub fn read(magic: [u8; 8], fingerprint: &[u8; 32], shapes: &[&LayerShape], read: Read) -> Result<Vec<Vec<ReadHead>>> {
    let bytes = read_whole(magic, fingerprint, shapes.len(), read)?;
    let mut cursor = Cursor { bytes: &bytes[PREFIX..bytes.len() - CHECKSUM] };
    let mut layers = Vec::with_capacity(shapes.len());
    for (index, shape) in shapes.iter().enumerate() {
        for (name, ours) in shape_numbers(shape) {
            let theirs = cursor.u32()?;
            if theirs != ours {
                return Err(Error::bad_file(format!("layer {index} of the file has {name} {theirs}, this model has {ours}")));
            }
        }
        let mut heads = Vec::with_capacity(2 * shape.n_kv_heads);
        for side in [&shape.k, &shape.v] {
            for _ in 0..shape.n_kv_heads {
                heads.push(read_head(&mut cursor, side)?);
            }
        }
        layers.push(heads);
    }
    if !cursor.bytes.is_empty() {
        return Err(Error::bad_file(format!("the file has {} bytes after its last layer", cursor.bytes.len())));
    }
    Ok(layers)
}

/// The whole file, its prefix and checksum found right.
fn read_whole(magic: [u8; 8], fingerprint: &[u8; 32], n_layers: usize, read: Read) -> Result<Vec<u8>> {
    let mut bytes = vec![0; PREFIX];
    let cut = |e: Error, at: usize, of: u64| {
        Error::new(e.kind, format!("the file is cut short: it ends within bytes {at} to {of} ({e})"))
    };
    read(&mut bytes).map_err(|e| cut(e, 0, PREFIX as u64))?;
    if bytes[..8] != magic {
        let name = String::from_utf8_lossy(&magic).trim_end_matches('\0').to_owned();
        return Err(Error::bad_file(format!("the file does not begin with {name}")));
    }
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    if u32_at(8) != VERSION {
        return Err(Error::bad_file(format!("the file has version {}, this library reads {VERSION}", u32_at(8))));
    }
    if bytes[16..48] != *fingerprint {
        return Err(Error::bad_file("the file belongs to another model: its fingerprint differs"));
    }
    if u32_at(12) as usize != n_layers {
        return Err(Error::bad_file(format!("the file has {} layers, not {n_layers}", u32_at(12))));
    }
    let length = u64::from_le_bytes(bytes[48..56].try_into().expect("eight bytes"));
    if length < (PREFIX + CHECKSUM) as u64 || length > isize::MAX as u64 {
        return Err(Error::bad_file(format!("the file says that it has {length} bytes")));
    }
    while (bytes.len() as u64) < length {
        let at = bytes.len();
        let piece = (length - at as u64).min(PIECE as u64) as usize;
        bytes.try_reserve(piece).map_err(|_| Error::new(crate::error::ErrorKind::OutOfMemory, "no memory for the file"))?;
        bytes.resize(at + piece, 0);
        read(&mut bytes[at..]).map_err(|e| cut(e, at, length))?;
    }
    let (body, checksum) = bytes.split_at(bytes.len() - CHECKSUM);
    if xxhash_rust::xxh3::xxh3_64(body).to_le_bytes() != checksum {
        return Err(Error::bad_file("the file is damaged: its checksum differs"));
    }
    Ok(bytes)
}

fn read_head(cursor: &mut Cursor, shape: &SideShape) -> Result<ReadHead> {
    let d = shape.head_dim;
    let (newest, n_sets) = (cursor.u8()?, cursor.u8()?);
    let (sinks, rows_seen) = (cursor.u16()?, cursor.u64()?);
    let mut sets: Vec<ReadSet> = Vec::with_capacity(MAX_SETS);
    for _ in 0..n_sets {
        let id = cursor.u8()?;
        // Ascending ids are distinct ones, and at most 15.
        if id == 0 || usize::from(id) >= MAX_SETS || sets.last().is_some_and(|s| s.id >= id) {
            return Err(Error::bad_file(format!("a set has the id {id} out of order")));
        }
        let set = read_set(cursor, d)?;
        sets.push(ReadSet { id, set, sink: sinks >> id & 1 == 1 });
    }
    let newest_set = sets.iter().find(|s| s.id == newest);
    if newest != 0 && newest_set.is_none() {
        return Err(Error::bad_file(format!("the newest set is {newest}, which the file lacks")));
    }
    let encode = match cursor.u8()? {
        0 => None,
        1 => Some(cursor.f32s(d * d + shape.plan.feedback_len())?),
        n => return Err(Error::bad_file(format!("{n} encode matrices for one head"))),
    };
    let dense = newest_set.is_some_and(|s| matches!(*s.set.transform, Transform::Dense { .. }));
    if encode.is_some() != dense {
        return Err(Error::bad_file("a head's encode matrix is missing or has no set"));
    }
    for _ in 0..cursor.u8()? {
        skip_moments(cursor, d)?;
    }
    Ok(ReadHead { newest, rows_seen, sets, encode })
}

fn read_set(cursor: &mut Cursor, d: usize) -> Result<FactorSet> {
    let dense = cursor.u8()?;
    let mut kappa = ROTATION_KAPPA;
    for k in &mut kappa {
        *k = f32::from_le_bytes(cursor.array()?);
    }
    if !kappa.iter().all(|k| k.is_finite() && *k > 0.0) {
        return Err(Error::bad_file(format!("a set has kappa {kappa:?}")));
    }
    let mean = cursor.f16s(d)?;
    match dense {
        0 if kappa == ROTATION_KAPPA => Ok(FactorSet::rotation(mean)),
        1 => Ok(FactorSet::dense(mean, cursor.f16s(d * d)?, kappa)),
        n => Err(Error::bad_file(format!("a set has transform {n} with kappa {kappa:?}"))),
    }
}

/// Loaded factors are frozen: the moments are there for tools, and checked for length only.
fn skip_moments(cursor: &mut Cursor, d: usize) -> Result<()> {
    cursor.take(16)?;
    let second = if cursor.u8()? == 0 { 0 } else { d * (d + 1) / 2 };
    cursor.take(12 * d + 4 * second).map(|_| ())
}

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, tail) =
            self.bytes.split_at_checked(n).ok_or_else(|| Error::bad_file("the file is cut short within a layer"))?;
        self.bytes = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("taken"))
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn f16s(&mut self, n: usize) -> Result<Box<[f16]>> {
        let values: Box<[f16]> = self.take(2 * n)?.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
        finite(values.iter().all(|x| x.is_finite()), values)
    }

    fn f32s(&mut self, n: usize) -> Result<Box<[f32]>> {
        let values: Box<[f32]> = self.take(4 * n)?.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        finite(values.iter().all(|x| x.is_finite()), values)
    }
}

fn finite<T>(all: bool, values: T) -> Result<T> {
    if all { Ok(values) } else { Err(Error::bad_file("the file has NaN or infinity in its factors")) }
}
