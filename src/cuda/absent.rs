//! What a build without the feature `cuda` has in place of the backend: the same types, which cannot exist.

use std::sync::Arc;

use super::view::{Attend, Dequantize, Stream, Tokens, Workspace};
use super::{Limits, no_kernels};
use crate::codec::Codec;
use crate::error::Result;

pub const COMPILED_IN: bool = false;

/// A device that cannot exist, so that no call after [`open`] needs to ask.
#[derive(Debug)]
pub enum Device {}

pub fn open(device: u32) -> Result<Arc<Device>> {
    Err(no_kernels(device))
}

/// A codec's memory on such a device.
#[derive(Debug)]
pub enum DeviceCodec {}

impl DeviceCodec {
    pub fn new(device: &Arc<Device>, _codec: &Codec) -> Result<Self> {
        match **device {}
    }
    pub fn workspace_size(&self, _codec: &Codec, _layer: usize, _limits: Limits) -> Result<usize> {
        match *self {}
    }
    pub fn compress(&self, _codec: &Codec, _layer: usize, _tokens: &Tokens, _stream: Stream) -> Result<()> {
        match *self {}
    }
    pub fn append(&self, _codec: &Codec, _layer: usize, _tokens: &Tokens, _stream: Stream) -> Result<()> {
        match *self {}
    }
    pub fn refit(&self, _codec: &Codec, _layers: std::ops::Range<usize>, _stream: Stream) -> Result<()> {
        match *self {}
    }
    pub fn attend(&self, _codec: &Codec, _layer: usize, _args: &Attend, _ws: Workspace, _stream: Stream) -> Result<()> {
        match *self {}
    }
    pub fn dequantize(&self, _codec: &Codec, _layer: usize, _args: &Dequantize, _stream: Stream) -> Result<()> {
        match *self {}
    }
    pub fn rows_seen(&self, _layer: usize) -> u64 {
        match *self {}
    }
    pub fn rows_to_fit(&self, _layer: usize) -> Option<u64> {
        match *self {}
    }
    pub fn pull(&self, _codec: &Codec, _layers: std::ops::Range<usize>) -> Result<()> {
        match *self {}
    }
    pub fn push(&self, _codec: &Codec, _layer: usize) -> Result<()> {
        match *self {}
    }
    pub fn dense_sets_left(&self, _codec: &Codec, _layer: usize) -> usize {
        match *self {}
    }
}
