//! Factor sets: what is learned of a head's rows, how it is fitted, and how it is found again.
//!
//! A coded row stands for `x = mean + decode * y` with `y[j] = scale * unit * table[code[j]]`. The decode matrix is the
//! small factor T_S of DecoQuant (arXiv 2405.12591, section 3); the coded `y` is a row of the large factor T_L.

pub mod hadamard;

use half::f16;
use std::sync::{Arc, OnceLock, RwLock};
use std::sync::atomic::{AtomicU8, Ordering};

use crate::shape::MAX_SETS;

/// Set 0: the plain rotation about zero.
pub const ROTATION_SET: u8 = 0;

/// The linear part of a factor set. Several sets may share one.
#[derive(Debug)]
pub enum Transform {
    /// `decode` is the transposed Hadamard rotation of [`hadamard`]: `y = H signs x`.
    Rotation,
    /// Row-major `[channel][latent]`, `head_dim * head_dim`.
    Dense { decode: Box<[f16]> },
}

/// One immutable factor set.
#[derive(Debug, Clone)]
pub struct FactorSet {
    /// `[head_dim]`, values of f16.
    pub mean: Box<[f16]>,
    pub transform: Arc<Transform>,
    /// What a unit of squared error in the coded space costs in the scores, relative to the rotation.
    pub kappa: f32,
    /// Hash of mean, transform and kappa: equal content, equal hash.
    pub hash: u128,
}

/// The newest fit's way into the coded space, `y = encode * (x - mean)`; older fits are only ever decoded.
#[derive(Debug)]
pub struct Encode {
    /// The set that these rows belong to.
    pub set: u8,
    /// `[channel][latent]`, so that a row is coded by one chain over channels with lanes over latents; `None`: rotation.
    pub matrix: Option<Box<[f32]>>,
}

/// The sets of one KV head and side. Sets are only ever added; readers need no lock.
#[derive(Debug)]
pub struct HeadSets {
    sets: [OnceLock<FactorSet>; MAX_SETS],
    /// Sets that are sinks, as a bit mask over ids.
    encode: RwLock<Arc<Encode>>,
    newest: AtomicU8,
}

impl HeadSets {
    pub fn get(&self, id: u8) -> Option<&FactorSet> {
        self.sets[id as usize].get()
    }

    /// The set that rows take unless another serves them far better.
    pub fn newest(&self) -> u8 {
        self.newest.load(Ordering::Acquire)
    }

    pub fn encode(&self) -> Arc<Encode> {
        self.encode.read().expect("no panic while held").clone()
    }
}
