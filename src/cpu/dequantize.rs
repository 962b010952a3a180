//! Rows back to floats.
