//! Opaque handles: boxes with a mark, so that a pointer to something else is refused instead of followed.

use std::sync::Arc;

use super::memory::Region;
use crate::capi::types::{dq_codec, dq_context};
use crate::codec::Codec;
use crate::cuda;
use crate::error::{Error, Result};

/// What a `dq_context` opened.
#[derive(Debug)]
pub enum Context {
    Cpu,
    Cuda(Arc<cuda::Device>),
}

/// A type behind an opaque C type.
pub trait Handle: Sized {
    type C;
    const NAME: &'static str;
    const MARK: u64;
}

impl Handle for Arc<Context> {
    type C = dq_context;
    const NAME: &'static str = "context";
    const MARK: u64 = u64::from_le_bytes(*b"dqcontxt");
}

impl Handle for CodecHandle {
    type C = dq_codec;
    const NAME: &'static str = "codec";
    const MARK: u64 = u64::from_le_bytes(*b"dq_codec");
}

#[repr(C)]
struct Marked<T> {
    mark: u64,
    value: T,
}

/// Boxes a new handle.
pub fn give<T: Handle>(value: T) -> *mut T::C {
    Box::into_raw(Box::new(Marked { mark: T::MARK, value })).cast()
}

/// # Safety
/// `pointer`, when it is not null, came from [`give`] for a handle of any type and was not destroyed, for all of `'a`.
pub unsafe fn handle<'a, T: Handle>(pointer: *const T::C) -> Result<&'a T> {
    Region::new(T::NAME, pointer, size_of::<Marked<T>>(), align_of::<Marked<T>>())?;
    let marked = pointer.cast::<Marked<T>>();
    // SAFETY: every handle begins with its mark.
    let mark = unsafe { (&raw const (*marked).mark).read() };
    if mark != T::MARK {
        return Err(Error::invalid(format!("{} is not a dq_{0}: it was destroyed or is another handle", T::NAME)));
    }
    // SAFETY: the mark says that this is a live `Marked<T>`.
    Ok(unsafe { &(*marked).value })
}

/// Null, and what is no live handle of this type, is left alone.
///
/// # Safety
/// As for [`handle`]; no other call uses the handle now or later.
pub unsafe fn destroy<T: Handle>(pointer: *mut T::C) {
    // SAFETY: the caller's word.
    if unsafe { handle::<T>(pointer) }.is_err() {
        return;
    }
    let marked = pointer.cast::<Marked<T>>();
    // SAFETY: a live box from `give`. The mark goes first: a second destroy most likely finds it gone.
    unsafe {
        (&raw mut (*marked).mark).write_volatile(0);
        drop(Box::from_raw(marked));
    }
}

/// What a `dq_codec` stands for.
pub struct CodecHandle {
    /// Its memory on the device of a CUDA context.
    pub device: Option<cuda::DeviceCodec>,
    pub codec: Codec,
    pub context: Arc<Context>,
}

impl CodecHandle {
    /// Puts a codec on the context's device, if it has one.
    pub fn new(codec: Codec, context: &Arc<Context>) -> Result<Self> {
        let device = match &**context {
            Context::Cpu => None,
            Context::Cuda(device) => Some(cuda::DeviceCodec::new(device, &codec)?),
        };
        Ok(Self { device, codec, context: context.clone() })
    }

    /// Brings to the host what a device has learned of these layers.
    pub fn pull(&self, layers: std::ops::Range<usize>) -> Result<()> {
        self.device.as_ref().map_or(Ok(()), |device| device.pull(&self.codec, layers))
    }
}
