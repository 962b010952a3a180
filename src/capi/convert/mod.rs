//! Raw pointers from C become checked windows here and nowhere else: null, alignment, extent, overlap.
//!
//! What cannot be checked is the caller's word: that a pointer which is not null leads to memory of the size that its
//! strides and counts describe, and that nobody else writes it during the call.

mod attend;
mod batch;
mod device;
mod handle;
mod memory;
mod out;
mod rows;
mod slots;
mod stream;
mod structs;
mod tokens;

pub(super) use attend::attend_args;
pub(super) use device::{device_attend, device_dequantize, device_tokens};
pub(super) use handle::{CodecHandle, Context, destroy, give, handle};
pub(super) use memory::{bytes, bytes_mut, check_out, workspace};
pub(super) use out::{dequantize, records};
pub(super) use stream::{check_phase, check_stream, reader, writer};
pub(super) use structs::{fill_struct, layers, read_struct};
pub(super) use tokens::{Given, Purpose, tokens};
