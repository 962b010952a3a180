//! Factor files and set exports.
