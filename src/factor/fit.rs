//! Moments to factors.
