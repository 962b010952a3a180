//! Naive f64 truth.
