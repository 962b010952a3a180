//! Structs that carry their size: read from callers that are older or newer than this library.

use std::mem::MaybeUninit;

use super::memory::Region;
use crate::capi::types::*;
use crate::error::{Error, Result};

/// More than any struct will ever have; a larger `struct_size` is uninitialised memory.
const LARGEST: usize = 4096;

/// # Safety
/// `#[repr(C)]`, begins with `struct_size: u32`, and all zero bytes are a valid value.
pub unsafe trait Sized32: Copy {
    const NAME: &'static str;
}

macro_rules! sized {
    ($($t:ident),*) => {
        $(
            // SAFETY: see types.rs; integers, floats and raw pointers are valid when zero.
            unsafe impl Sized32 for $t {
                const NAME: &'static str = stringify!($t);
            }
        )*
    };
}

sized!(dq_context_desc, dq_layer_desc, dq_codec_desc, dq_layout, dq_layer_info, dq_tokens, dq_attend_args, dq_limits);

/// Copies what the caller's version of the struct has; fields that it lacks are zero.
///
/// # Safety
/// `pointer`, when it is not null, is valid for reads of the `struct_size` bytes that it begins with.
pub unsafe fn read_struct<T: Sized32>(name: &'static str, pointer: *const T) -> Result<T> {
    // SAFETY: the caller's word.
    let size = unsafe { struct_size(name, pointer) }?;
    // SAFETY: the first `size` bytes are readable.
    let given = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), size) };
    if let Some(at) = given.iter().skip(size_of::<T>()).position(|b| *b != 0) {
        return Err(Error::invalid(format!(
            "{name}->struct_size is {size}, {} has {} bytes in this library, and byte {} is {}; what is beyond must be zero",
            T::NAME,
            size_of::<T>(),
            size_of::<T>() + at,
            given[size_of::<T>() + at],
        )));
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: both sides hold that many bytes; `T` is valid when zero and any bytes are valid for its fields.
    Ok(unsafe {
        std::ptr::copy_nonoverlapping(given.as_ptr(), value.as_mut_ptr().cast(), size.min(size_of::<T>()));
        value.assume_init()
    })
}

/// Hands a result out in as many bytes as the caller's version has; what this library does not know becomes zero.
///
/// # Safety
/// `pointer` is valid for reads and writes of the `struct_size` bytes that it begins with.
pub unsafe fn fill_struct<T: Sized32>(name: &'static str, pointer: *mut T, value: &T) -> Result<()> {
    // SAFETY: the caller's word.
    let size = unsafe { struct_size(name, pointer) }?;
    let known = size.min(size_of::<T>());
    // SAFETY: `size` bytes are writable. The caller's struct_size, the first field, stays as it is.
    unsafe {
        let out = pointer.cast::<u8>();
        std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>().add(4), out.add(4), known - 4);
        std::ptr::write_bytes(out.add(known), 0, size - known);
    }
    Ok(())
}

/// # Safety
/// `pointer`, when it is not null, is valid for reads of four bytes.
unsafe fn struct_size<T: Sized32>(name: &'static str, pointer: *const T) -> Result<usize> {
    Region::elements(name, pointer, 1)?;
    // SAFETY: not null and aligned.
    let size = unsafe { pointer.cast::<u32>().read() } as usize;
    // A size that no compiler gives could end inside a pointer.
    if !(4..=LARGEST).contains(&size) || size % align_of::<T>() != 0 {
        return Err(Error::invalid(format!(
            "{name}->struct_size is {size}; it must be sizeof({}), {} here",
            T::NAME,
            size_of::<T>()
        )));
    }
    Ok(size)
}

/// The array of layers of a model. The first one's `struct_size` is the stride.
///
/// # Safety
/// `desc.layers`, when it is not null, is valid for reads of `desc.n_layers` structs of that stride.
pub unsafe fn layers(desc: &dq_codec_desc, max: u32) -> Result<Vec<dq_layer_desc>> {
    const NAME: &str = "desc->layers";
    if desc.n_layers == 0 || desc.n_layers > max {
        return Err(Error::invalid(format!("desc->n_layers is {}; it must be 1 to {max}", desc.n_layers)));
    }
    // SAFETY: the caller's word, for the first layer.
    let stride = unsafe { struct_size(NAME, desc.layers) }?;
    let at = |i: u32| desc.layers.cast::<u8>().wrapping_add(i as usize * stride).cast::<dq_layer_desc>();
    (0..desc.n_layers)
        .map(|i| {
            // SAFETY: the caller's word, for all layers at the first one's stride.
            let layer = unsafe { at(i).cast::<u32>().read() } as usize;
            if layer != stride {
                return Err(Error::invalid(format!(
                    "desc->layers[{i}].struct_size is {layer}; it must be that of layers[0], {stride}"
                )));
            }
            // SAFETY: as above.
            unsafe { read_struct(NAME, at(i)) }.map_err(|e| Error::new(e.kind, format!("layer {i}: {e}")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    struct Newer {
        known: dq_context_desc,
        more: [u32; 2],
    }

    fn newer() -> Newer {
        let known = dq_context_desc { struct_size: size_of::<Newer>() as u32, backend: 1, device: 2, reserved: 3 };
        Newer { known, more: [0; 2] }
    }

    fn read(from: &Newer) -> Result<dq_context_desc> {
        // SAFETY: every size in these tests is within `Newer`.
        unsafe { read_struct("desc", (&raw const *from).cast()) }
    }

    #[test]
    fn a_newer_struct_needs_a_zero_tail() {
        let mut s = newer();
        assert_eq!(read(&s).unwrap().reserved, 3);
        s.more[1] = 0x0700;
        let message = read(&s).unwrap_err().message;
        assert!(message.contains("struct_size is 24") && message.contains("byte 21 is 7"), "{message}");
    }

    #[test]
    fn an_older_struct_ends_in_zeros() {
        let mut s = newer();
        s.known.struct_size = 8;
        let read = read(&s).unwrap();
        assert_eq!((read.backend, read.device, read.reserved), (1, 0, 0));
    }

    #[test]
    fn sizes_that_no_struct_has_are_refused() {
        for size in [0, 3, 7, 4100, u32::MAX] {
            let mut s = newer();
            s.known.struct_size = size;
            let message = read(&s).err().unwrap().message;
            assert!(message.contains(&format!("struct_size is {size}")), "{message}");
        }
    }

    #[test]
    fn results_fill_what_the_caller_has() {
        let mut s = newer();
        s.more = [9; 2];
        let value = dq_context_desc { struct_size: 0, backend: 5, device: 6, reserved: 7 };
        // SAFETY: struct_size is that of `Newer`.
        unsafe { fill_struct("out", (&raw mut s).cast(), &value) }.unwrap();
        assert_eq!((s.known.struct_size, s.known.reserved, s.more), (24, 7, [0; 2]));
        s = newer();
        s.known.struct_size = 12;
        // SAFETY: as above.
        unsafe { fill_struct("out", (&raw mut s).cast(), &value) }.unwrap();
        assert_eq!((s.known.device, s.known.reserved), (6, 3));
    }
}
