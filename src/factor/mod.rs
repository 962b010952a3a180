//! Factor sets: what is learned of a head's rows, how it is fitted, and how it is found again.
//!
//! A coded row stands for `x = mean + decode * y` with `y[j] = scale * unit * table[code[j]]`. The decode matrix is the
//! small factor T_S of DecoQuant (arXiv 2405.12591, section 3); the coded `y` is a row of the large factor T_L.
//!
//! | module | what it holds |
//! |---|---|
//! | [`sets`] | immutable factor sets and the ids they are found by |
//! | [`head`] | one KV head and side: its sets, its statistics, when it is fitted, its sinks |
//! | [`moments`] | running moments that outliers cannot spoil |
//! | [`fit`] | moments to factors |
//! | [`hadamard`] | the rotation of set 0 and the spread of a fit |
//! | [`file`] | factor files and set exports |

pub mod file;
pub mod fit;
pub mod hadamard;
pub mod head;
pub mod moments;
pub mod sets;

pub use head::{DueFit, HeadFactors, HeadInfo, MAX_SINKS};
pub use moments::{Moments, RawMoments};
pub use sets::{Encode, FactorSet, HeadSets, ROTATION_KAPPA, ROTATION_SET, TierWeights, Transform};

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::shape::{LayerShape, Side};

/// All factors of one layer: one [`HeadFactors`] per KV head and side.
#[derive(Debug)]
pub struct LayerFactors {
    pub k: Vec<HeadFactors>,
    pub v: Vec<HeadFactors>,
}

impl LayerFactors {
    /// Factors before any row: the rotation alone. Allocates the running moments.
    pub fn new(shape: &LayerShape, max_fits: usize) -> Self {
        let side = |side| {
            let side_shape = shape.side(side);
            (0..shape.n_kv_heads).map(|_| HeadFactors::new(side_shape, side, max_fits)).collect()
        };
        Self { k: side(Side::K), v: side(Side::V) }
    }

    pub fn side(&self, side: Side) -> &[HeadFactors] {
        match side {
            Side::K => &self.k,
            Side::V => &self.v,
        }
    }

    /// Both sides' heads, keys first: the order of work units and of files.
    pub fn units(&self) -> impl Iterator<Item = (Side, usize, &HeadFactors)> {
        let k = self.k.iter().enumerate().map(|(head, f)| (Side::K, head, f));
        k.chain(self.v.iter().enumerate().map(|(head, f)| (Side::V, head, f)))
    }
}

/// Nothing here leaves what it locks half done, so that a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A lock that must be waited for is taken inside std, where ThreadSanitizer does not look; this way it sees it.
    #[cfg(dq_tsan)]
    loop {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(std::sync::TryLockError::Poisoned(e)) => return PoisonError::into_inner(e),
            Err(std::sync::TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    #[cfg(not(dq_tsan))]
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
