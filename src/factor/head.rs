//! One KV head and side: its sets, its statistics, when it is fitted, its sinks.

use super::sets::HeadSets;
use crate::shape::{Side, SideShape};

/// What one KV head and side has learned.
#[derive(Debug)]
pub struct HeadFactors {
    pub sets: HeadSets,
}

/// State of one head and side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadInfo {
    /// Sets in use, the rotation included.
    pub sets: usize,
    /// No further fit will come.
    pub frozen: bool,
    /// Rows that entered the statistics.
    pub rows_seen: u64,
    /// Bytes held for sets and the encode matrix.
    pub factor_bytes: usize,
    /// Bytes held for running moments.
    pub moment_bytes: usize,
}

impl HeadFactors {
    pub fn new(shape: &SideShape, _side: Side, _max_fits: usize) -> Self {
        Self { sets: HeadSets::rotation_only(shape.head_dim) }
    }
}
