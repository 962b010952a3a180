//! One model: shapes, factors, and their files.

use crate::error::{Error, ErrorKind, Result};
use crate::factor::file::{self, EXPORT_MAGIC, FACTOR_MAGIC, ReadHead};
use crate::factor::{HeadFactors, LayerFactors, Transform};
use crate::shape::{LayerShape, MAX_SETS, Side};
use crate::view::{Rows, Tokens};

/// Most fits of a head and side when the caller does not say.
pub const DEFAULT_FITS: usize = 4;
/// Four sinks, the rotation and these leave four ids for imports.
pub const MAX_FITS: usize = 7;
/// Most layers of a model.
pub const MAX_LAYERS: usize = 4096;
/// An old id of an import's map that was not in the export.
pub const NOT_EXPORTED: u8 = 255;

/// What a codec is made for.
#[derive(Debug, Clone)]
pub struct CodecDesc {
    pub layers: Vec<LayerShape>,
    /// 1 to 7; 0 is 4.
    pub max_fits: usize,
    /// Identity of the model; factor files of another are refused.
    pub fingerprint: [u8; 32],
    pub defers_fits: bool,
}

/// One layer.
#[derive(Debug)]
pub struct Layer {
    pub shape: LayerShape,
    pub factors: LayerFactors,
}

/// Shapes and factors of all layers of one model.
#[derive(Debug)]
pub struct Codec {
    pub layers: Vec<Layer>,
    pub fingerprint: [u8; 32],
    pub max_fits: usize,
    /// compress makes no fits: refit does, when its caller likes.
    pub defers_fits: bool,
}

/// State of a layer; see `dq_layer_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerInfo {
    pub k_sets: usize,
    pub v_sets: usize,
    pub frozen: bool,
    pub rows_seen: u64,
    pub factor_bytes: usize,
    pub moment_bytes: usize,
    /// `None` when no fit will come.
    pub rows_to_fit: Option<u64>,
}

impl Codec {
    pub fn new(desc: CodecDesc) -> Result<Self> {
        let max_fits = if desc.max_fits == 0 { DEFAULT_FITS } else { desc.max_fits };
        if max_fits > MAX_FITS {
            return Err(Error::invalid(format!("max_fits is {max_fits}; it must be 1 to {MAX_FITS}, or 0 for the default")));
        }
        if desc.layers.is_empty() || desc.layers.len() > MAX_LAYERS {
            return Err(Error::invalid(format!("n_layers is {}; it must be 1 to {MAX_LAYERS}", desc.layers.len())));
        }
        let layer = |shape: LayerShape| Layer { factors: LayerFactors::new(&shape, max_fits), shape };
        let layers = desc.layers.into_iter().map(layer).collect();
        Ok(Self { layers, fingerprint: desc.fingerprint, max_fits, defers_fits: desc.defers_fits })
    }

    /// Takes statistics of new tokens, and makes sinks of rows at position 0. One unit (head and side) belongs to one
    /// shard, so that the result does not depend on their number. Allocates nothing but the mean of a new sink.
    pub fn observe_shard(&self, layer: usize, tokens: &Tokens, shard: usize, n_shards: usize) {
        let layer = &self.layers[layer];
        for (side, head, factors) in layer.shard(shard, n_shards) {
            if !factors.learns() {
                continue;
            }
            if let Some((k, v)) = &tokens.kv {
                let rows = if side == Side::K { k } else { v };
                each_row(rows, tokens, head, |row, at_zero| factors.observe(row, at_zero));
            }
            if let Some(q) = tokens.q.as_ref().filter(|_| side == Side::K && factors.wants_queries()) {
                let group = layer.shape.group();
                for q_head in head * group..(head + 1) * group {
                    each_row(q, tokens, q_head, |query, at_zero| {
                        if !at_zero {
                            factors.observe_query(query);
                        }
                    });
                }
            }
        }
    }

    /// Fits what has come due among this shard's units and publishes it.
    pub fn refit_shard(&self, layer: usize, shard: usize, n_shards: usize) {
        self.layers[layer].shard(shard, n_shards).for_each(|(_, _, factors)| factors.refit());
    }

    pub fn is_fit_due(&self, layer: usize) -> bool {
        self.layers[layer].factors.units().any(|(_, _, factors)| factors.is_fit_due())
    }

    pub fn info(&self, layer: usize) -> LayerInfo {
        let factors = &self.layers[layer].factors;
        let sets = |side| factors.side(side).iter().map(|h| h.sets.count()).max().unwrap_or(0);
        let mut info = LayerInfo {
            k_sets: sets(Side::K),
            v_sets: sets(Side::V),
            frozen: true,
            rows_seen: 0,
            factor_bytes: 0,
            moment_bytes: 0,
            rows_to_fit: None,
        };
        for (_, _, head) in factors.units() {
            let head = head.info();
            info.rows_to_fit = info.rows_to_fit.into_iter().chain(head.rows_to_fit).min();
            info.frozen &= head.frozen;
            info.rows_seen = info.rows_seen.max(head.rows_seen);
            info.factor_bytes += head.factor_bytes;
            info.moment_bytes += head.moment_bytes;
        }
        info
    }

    /// Most bytes of a layer's factor sets. Sets that are imported come on top, and moments until the last fit.
    pub fn max_factor_bytes(&self, layer: usize) -> usize {
        let shape = &self.layers[layer].shape;
        let side = |side| HeadFactors::max_bytes(shape.side(side), self.max_fits);
        shape.n_kv_heads * (side(Side::K) + side(Side::V))
    }

    /// Writes a factor file.
    pub fn save(&self, write: file::Write) -> Result<()> {
        let layers: Vec<_> = self.layers.iter().map(|l| (&l.shape, &l.factors)).collect();
        file::write(FACTOR_MAGIC, &self.fingerprint, &layers, true, write)
    }

    /// A codec with the factors of a file. It is frozen: what it sees changes nothing, so that the same rows always get
    /// the same codes.
    pub fn load(desc: CodecDesc, read: file::Read) -> Result<Self> {
        let codec = Self::new(desc)?;
        let shapes: Vec<_> = codec.layers.iter().map(|l| &l.shape).collect();
        let read = file::read(FACTOR_MAGIC, &codec.fingerprint, &shapes, read)?;
        for (layer, heads) in codec.layers.iter().zip(read) {
            for ((_, _, factors), head) in layer.factors.units().zip(heads) {
                factors.restore(head)?;
            }
        }
        Ok(codec)
    }

    /// Writes a layer's sets, for records that leave this codec.
    pub fn export_sets(&self, layer: usize, write: file::Write) -> Result<()> {
        let layer = &self.layers[layer];
        file::write(EXPORT_MAGIC, &self.fingerprint, &[(&layer.shape, &layer.factors)], false, write)
    }

    /// Takes the sets of an export into a layer. They are to be decoded; for new rows the newest of them and its sinks are
    /// candidates in heads that learn and have not been fitted yet, until a fit of their own from more rows. `map` is
    /// `[2][n_kv_heads][16]`: the id here of each id there, [`NOT_EXPORTED`] where there is none. A set that is already
    /// here keeps its id. When a head has no free id left, or would hold more than `dense_room` further fits, nothing
    /// changes.
    pub fn import_sets(&self, layer: usize, read: file::Read, map: &mut [u8], dense_room: usize) -> Result<()> {
        let layer = &self.layers[layer];
        let wanted = 2 * layer.shape.n_kv_heads * MAX_SETS;
        if map.len() != wanted {
            return Err(Error::invalid(format!("the map has {} bytes; it must have {wanted}", map.len())));
        }
        let heads = file::read(EXPORT_MAGIC, &self.fingerprint, &[&layer.shape], read)?.remove(0);
        for ((side, index, factors), head) in layer.factors.units().zip(&heads) {
            let is_new = |s: &&file::ReadSet| factors.sets.find(s.set.hash).is_none();
            let dense = head.sets.iter().filter(is_new).filter(|s| matches!(*s.set.transform, Transform::Dense { .. })).count();
            if dense > dense_room {
                return Err(Error::new(
                    ErrorKind::SetsFull,
                    format!("{side:?} head {index} needs room for {dense} fits on the device and has {dense_room}"),
                ));
            }
            let new = head.sets.iter().filter(is_new).count();
            if new > factors.sets.free() {
                return Err(Error::new(
                    ErrorKind::SetsFull,
                    format!("{side:?} head {index} needs {new} set ids and has {} free", factors.sets.free()),
                ));
            }
        }
        for (((_, _, factors), head), map) in layer.factors.units().zip(heads).zip(map.as_chunks_mut::<MAX_SETS>().0) {
            *map = import_head(factors, head)?;
        }
        Ok(())
    }

    /// Whether a row of this head may name this set.
    pub fn has_set(&self, layer: usize, side: Side, head: usize, set: u8) -> bool {
        let heads = self.layers.get(layer).map(|l| l.factors.side(side));
        heads.and_then(|h| h.get(head)).is_some_and(|h| h.sets.get(set).is_some())
    }
}

impl Layer {
    /// A shard's units, dealt round-robin, keys first: their work is the larger part.
    fn shard(&self, shard: usize, n_shards: usize) -> impl Iterator<Item = (Side, usize, &HeadFactors)> {
        self.factors.units().skip(shard).step_by(n_shards.max(1))
    }
}

/// Rows of one head with whether each is at position 0.
fn each_row(rows: &Rows, tokens: &Tokens, head: usize, mut take: impl FnMut(&[f32], bool)) {
    let mut row = [0.0; 256];
    let row = &mut row[..rows.shape().head_dim];
    for token in 0..tokens.n_tokens {
        rows.load(token, head, row);
        take(row, tokens.positions.is_some_and(|p| p[token] == 0));
    }
}

fn import_head(factors: &HeadFactors, head: ReadHead) -> Result<[u8; MAX_SETS]> {
    let mut map = [NOT_EXPORTED; MAX_SETS];
    map[0] = 0;
    let mut sinks = 0u16;
    for read in head.sets {
        // Room was counted before; only a call that the caller should have ordered can have taken it since.
        let id = factors.sets.push_import(read.set);
        let id = id.ok_or_else(|| Error::new(ErrorKind::SetsFull, "ids were taken during the import"))?;
        map[usize::from(read.id)] = id;
        sinks |= u16::from(read.sink) << id;
    }
    factors.adopt(map[usize::from(head.newest)], head.encode, sinks, head.rows_seen);
    Ok(map)
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
