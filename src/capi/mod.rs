//! The C boundary and nothing else. The contract of every call is its comment, which is also that of
//! `include/decoquant.h`; every export runs inside [`guard`]; every raw pointer is checked in [`convert`].
#![allow(clippy::missing_safety_doc)] // The header's contract is the safety section.

mod attend;
mod codec;
mod context;
mod convert;
mod dequantize;
mod guard;
mod last_error;
#[cfg(test)]
mod layout_tests;
mod misc;
mod sets;
mod tokens;
pub mod types;

pub use attend::*;
pub use codec::*;
pub use context::*;
pub use dequantize::*;
pub use misc::*;
pub use sets::*;
pub use tokens::*;

use crate::codec::Layer;
use crate::error::{Error, Result};
use crate::shape::LayerShape;

use convert::CodecHandle;

/// The layer that C names.
fn layer(handle: &CodecHandle, layer: u32) -> Result<&Layer> {
    let layers = &handle.codec.layers;
    layers
        .get(layer as usize)
        .ok_or_else(|| Error::invalid(format!("layer is {layer}; the codec has {} layers", layers.len())))
}

fn layer_shape(handle: &CodecHandle, layer: u32) -> Result<&LayerShape> {
    Ok(&self::layer(handle, layer)?.shape)
}

fn check_shards(shard: u32, n_shards: u32) -> Result<()> {
    if n_shards == 0 {
        return Err(Error::invalid("n_shards is 0; it must be at least 1"));
    }
    if shard >= n_shards {
        return Err(Error::invalid(format!("shard is {shard}; it must be below n_shards, {n_shards}")));
    }
    Ok(())
}
