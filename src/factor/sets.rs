//! Immutable factor sets and the ids they are found by.

use half::f16;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use xxhash_rust::xxh3::Xxh3;

use super::lock;
use crate::shape::{MAX_SETS, MAX_TIERS};

/// Set 0: the plain rotation about zero.
pub const ROTATION_SET: u8 = 0;

/// One weight for each tier of a plan.
pub type TierWeights = [f32; MAX_TIERS];
/// The rotation spreads errors evenly.
pub const ROTATION_KAPPA: TierWeights = [1.0; MAX_TIERS];

/// The linear part of a factor set.
#[derive(Debug)]
pub enum Transform {
    /// `decode` is the transposed Hadamard rotation of [`super::hadamard`]: `y = H signs x`.
    Rotation,
    /// Row-major `[channel][latent]`, `head_dim * head_dim`.
    Dense { decode: Box<[f16]> },
}

/// One immutable factor set.
#[derive(Debug, Clone)]
pub struct FactorSet {
    /// `[head_dim]`, finite.
    pub mean: Box<[f16]>,
    pub transform: Arc<Transform>,
    /// What a unit of squared error in each tier of the coded space costs in the scores, relative to the rotation; 1
    /// beyond the plan's tiers.
    pub kappa: TierWeights,
    /// Hash of mean, transform and kappa: equal content, equal hash.
    pub hash: u128,
}

impl FactorSet {
    /// The rotation about `mean`.
    pub fn rotation(mean: Box<[f16]>) -> Self {
        Self::new(mean, Transform::Rotation, ROTATION_KAPPA)
    }

    /// A fitted set; `decode` is row-major `[channel][latent]`.
    pub fn dense(mean: Box<[f16]>, decode: Box<[f16]>, kappa: TierWeights) -> Self {
        assert_eq!(decode.len(), mean.len() * mean.len());
        Self::new(mean, Transform::Dense { decode }, kappa)
    }

    fn new(mean: Box<[f16]>, transform: Transform, kappa: TierWeights) -> Self {
        let hash = content_hash(&mean, &transform, kappa);
        Self { mean, transform: Arc::new(transform), kappa, hash }
    }

    /// Bytes held for mean and matrix.
    pub fn bytes(&self) -> usize {
        let matrix = match &*self.transform {
            Transform::Rotation => 0,
            Transform::Dense { decode } => size_of_val(&**decode),
        };
        size_of_val(&*self.mean) + matrix
    }
}

/// XXH3 (128 bits) of: mean, f16 little endian; one byte, 0 for the rotation or 1 for a matrix; the matrix, f16 little
/// endian; kappa, f32 little endian. Format: records in state files are matched to sets by it.
fn content_hash(mean: &[f16], transform: &Transform, kappa: TierWeights) -> u128 {
    let mut hash = Xxh3::new();
    let mut halves = |values: &[f16], tag: &[u8]| {
        for chunk in values.chunks(256) {
            let mut bytes = [0u8; 512];
            for (b, x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(chunk) {
                *b = x.to_le_bytes();
            }
            hash.update(&bytes[..2 * chunk.len()]);
        }
        hash.update(tag);
    };
    match transform {
        Transform::Rotation => halves(mean, &[0]),
        Transform::Dense { decode } => {
            halves(mean, &[1]);
            halves(decode, &[]);
        }
    }
    kappa.iter().for_each(|k| hash.update(&k.to_le_bytes()));
    hash.digest128()
}

/// The newest fit's way into the coded space, `y = encode * (x - mean)`; other fits are only ever decoded.
#[derive(Debug)]
pub struct Encode {
    /// The set that these rows belong to.
    pub set: u8,
    /// `[channel][latent]`, so that a row is coded by one chain over channels with lanes over latents, then the feedback
    /// of [`super::fit::Fitted`]; `None`: rotation.
    pub matrix: Option<Box<[f32]>>,
}

/// The sets of one KV head and side. Sets are only ever added, an id is never reused; [`HeadSets::get`] takes no lock,
/// so that attention may run while a fit is published.
///
/// A row to be coded has these candidates: the newest fit, the rotation, the sinks.
#[derive(Debug)]
pub struct HeadSets {
    sets: [OnceLock<FactorSet>; MAX_SETS],
    /// Bit `id` is set when the set is a sink, i.e. a candidate for every row.
    sinks: AtomicU16,
    encode: Mutex<Arc<Encode>>,
    newest: AtomicU8,
}

impl HeadSets {
    /// Set 0 alone.
    pub fn rotation_only(head_dim: usize) -> Self {
        let sets: [OnceLock<FactorSet>; MAX_SETS] = Default::default();
        let zero = vec![f16::ZERO; head_dim].into_boxed_slice();
        sets[0].set(FactorSet::rotation(zero)).expect("just made");
        Self {
            sets,
            sinks: AtomicU16::new(0),
            encode: Mutex::new(Arc::new(Encode { set: ROTATION_SET, matrix: None })),
            newest: AtomicU8::new(ROTATION_SET),
        }
    }

    /// The set of this id, if there is one (`id` may be any number).
    pub fn get(&self, id: u8) -> Option<&FactorSet> {
        self.sets.get(usize::from(id))?.get()
    }

    /// Sets in use, the rotation included, with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (u8, &FactorSet)> {
        (0..MAX_SETS as u8).filter_map(|id| Some((id, self.get(id)?)))
    }

    /// Number of sets in use.
    pub fn count(&self) -> usize {
        self.iter().count()
    }

    /// Channels of a row.
    pub fn head_dim(&self) -> usize {
        self.get(ROTATION_SET).expect("always there").mean.len()
    }

    /// The set that rows take unless another serves them far better.
    pub fn newest(&self) -> u8 {
        self.newest.load(Ordering::Acquire)
    }

    /// How rows get into the set [`Encode::set`], which is the newest one. Take it once per call: set and matrix belong
    /// together, while `newest` may move on between two looks.
    pub fn encode(&self) -> Arc<Encode> {
        lock(&self.encode).clone()
    }

    /// Ids of the sinks, ascending.
    pub fn sinks(&self) -> impl Iterator<Item = u8> + use<> {
        let mask = self.sinks.load(Ordering::Acquire);
        (0..MAX_SETS as u8).filter(move |id| mask >> id & 1 == 1)
    }

    /// The id of a set with this content.
    pub fn find(&self, hash: u128) -> Option<u8> {
        self.iter().find(|(_, set)| set.hash == hash).map(|(id, _)| id)
    }

    /// Adds a fit and makes it the newest. `matrix` is its encode matrix, `[channel][latent]`, `None` for a rotation.
    /// Returns its id; `None` when no id is free (nothing changes).
    pub fn push_fit(&self, set: FactorSet, matrix: Option<Box<[f32]>>) -> Option<u8> {
        let id = self.add(set, 1..MAX_SETS as u8)?;
        self.set_newest(id, matrix);
        Some(id)
    }

    /// Adds a sink. Returns its id; `None` when no id is free.
    pub fn push_sink(&self, set: FactorSet) -> Option<u8> {
        let id = self.add(set, 1..MAX_SETS as u8)?;
        self.add_sinks(1 << id);
        Some(id)
    }

    /// Makes sinks of sets that are there, a bit per id.
    pub(super) fn add_sinks(&self, mask: u16) {
        self.sinks.fetch_or(mask, Ordering::AcqRel);
    }

    /// Adds a set of another codec, from the top end so that fits and sinks keep low ids.
    pub fn push_import(&self, set: FactorSet) -> Option<u8> {
        self.add(set, (1..MAX_SETS as u8).rev())
    }

    /// Ids that an import may still take.
    pub fn free(&self) -> usize {
        MAX_SETS - self.count()
    }

    /// Puts a set under a given id, for sets read from a file.
    pub(super) fn restore(&self, id: u8, set: FactorSet, sink: bool) -> bool {
        let done = self.sets[usize::from(id)].set(set).is_ok();
        if done && sink {
            self.add_sinks(1 << id);
        }
        done
    }

    /// Makes a set that is there the newest.
    pub(super) fn set_newest(&self, id: u8, matrix: Option<Box<[f32]>>) {
        *lock(&self.encode) = Arc::new(Encode { set: id, matrix });
        self.newest.store(id, Ordering::Release);
    }

    /// The same content keeps its id; otherwise the first free one of `ids`.
    fn add(&self, set: FactorSet, ids: impl Iterator<Item = u8>) -> Option<u8> {
        if let Some(id) = self.find(set.hash) {
            return Some(id);
        }
        let mut set = set;
        for id in ids {
            match self.sets[usize::from(id)].set(set) {
                Ok(()) => return Some(id),
                Err(back) => set = back,
            }
        }
        None
    }

    /// Bytes held for means, decode matrices and the encode matrix of the newest fit.
    pub fn bytes(&self) -> usize {
        let encode = self.encode().matrix.as_ref().map_or(0, |m| size_of_val(&**m));
        self.iter().map(|(_, set)| set.bytes()).sum::<usize>() + encode
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halves(values: impl IntoIterator<Item = f32>) -> Box<[f16]> {
        values.into_iter().map(f16::from_f32).collect()
    }

    fn about(value: f32) -> FactorSet {
        FactorSet::rotation(halves(vec![value; 64]))
    }

    #[test]
    fn ids_grow_from_below_and_imports_from_above() {
        let sets = HeadSets::rotation_only(64);
        assert_eq!((sets.newest(), sets.count(), sets.encode().set), (0, 1, 0));
        assert_eq!(sets.push_sink(about(1.0)), Some(1));
        assert_eq!(sets.push_import(about(2.0)), Some(15));
        assert_eq!(sets.push_fit(about(3.0), None), Some(2));
        assert_eq!((sets.newest(), sets.encode().set), (2, 2));
        assert_eq!(sets.sinks().collect::<Vec<_>>(), [1]);
        assert_eq!(sets.iter().map(|(id, _)| id).collect::<Vec<_>>(), [0, 1, 2, 15]);
        assert!(sets.get(3).is_none() && sets.get(16).is_none() && sets.get(255).is_none());
    }

    #[test]
    fn equal_content_keeps_its_id() {
        let sets = HeadSets::rotation_only(64);
        assert_eq!(sets.push_import(about(2.0)), Some(15));
        assert_eq!(sets.push_sink(about(2.0)), Some(15));
        assert_eq!(sets.sinks().collect::<Vec<_>>(), [15]);
        assert_eq!(sets.push_import(about(0.0)), Some(ROTATION_SET));
    }

    #[test]
    fn full_is_refused_and_changes_nothing() {
        let sets = HeadSets::rotation_only(64);
        for i in 1..16 {
            assert_eq!(sets.push_fit(about(i as f32), None), Some(i));
        }
        assert_eq!(sets.push_fit(about(99.0), None), None);
        assert_eq!(sets.push_import(about(99.0)), None);
        assert_eq!((sets.newest(), sets.encode().set, sets.free()), (15, 15, 0));
    }

    #[test]
    fn the_hash_sees_every_part() {
        let mean = || halves((0..64).map(|i| i as f32));
        let matrix = |x: f32| halves((0..4096).map(|i| if i == 4095 { x } else { 1.0 }));
        let base = FactorSet::dense(mean(), matrix(1.0), [0.5; MAX_TIERS]);
        assert_eq!(base.hash, FactorSet::dense(mean(), matrix(1.0), [0.5; MAX_TIERS]).hash);
        for other in [
            FactorSet::dense(mean(), matrix(2.0), [0.5; MAX_TIERS]),
            FactorSet::dense(mean(), matrix(1.0), [0.25; MAX_TIERS]),
            FactorSet::dense(halves(vec![0.0; 64]), matrix(1.0), [0.5; MAX_TIERS]),
            FactorSet::rotation(mean()),
        ] {
            assert_ne!(base.hash, other.hash);
        }
    }

    /// Format: state files name sets by this number.
    #[test]
    fn the_hash_is_pinned() {
        assert_eq!(about(1.5).hash, PINNED);
    }
    const PINNED: u128 = 265712763472669973648021485205306902867;
}
