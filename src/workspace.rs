//! Scratch memory that callers bring. One routine both counts and carves: the size query runs it without memory, the
//! call runs it on the caller's bytes, so the two cannot disagree.

use std::marker::PhantomData;

use crate::error::{Error, ErrorKind, Result};

/// Alignment of every piece, in bytes: a cache line.
pub const ALIGN: usize = 64;

/// The caller's scratch bytes. Shards of one call share it, each writing pieces of its own.
#[derive(Debug, Clone, Copy)]
pub struct Workspace<'a> {
    data: *mut u8,
    bytes: usize,
    _memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: pieces are reached through raw pointers only, and whoever writes one keeps other shards away from it.
unsafe impl Send for Workspace<'_> {}
// SAFETY: as above.
unsafe impl Sync for Workspace<'_> {}

impl<'a> Workspace<'a> {
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { data: bytes.as_mut_ptr(), bytes: bytes.len(), _memory: PhantomData }
    }

    /// # Safety
    /// `data` is valid for reads and writes of `bytes` bytes during `'a` (null is fine for 0 bytes), and nobody touches
    /// them but the shards of one call at a time.
    pub unsafe fn from_raw(data: *mut u8, bytes: usize) -> Self {
        Self { data, bytes, _memory: PhantomData }
    }
}

/// Lays pieces one behind the other.
#[derive(Debug)]
pub struct Arena {
    /// Null while counting.
    base: *mut u8,
    used: usize,
}

impl Arena {
    /// Counts only: pieces have null pointers and must not be used.
    pub fn count() -> Self {
        Self { base: std::ptr::null_mut(), used: 0 }
    }

    /// Lays pieces from an address that nobody follows on the host: memory of a device.
    pub fn at(address: usize) -> Self {
        Self { base: std::ptr::without_provenance_mut(address), used: 0 }
    }

    /// Room for `n` elements, aligned to [`ALIGN`].
    pub fn take<T: Copy>(&mut self, n: usize) -> *mut T {
        let at = self.used.next_multiple_of(ALIGN);
        self.used = at.saturating_add(n.saturating_mul(size_of::<T>()));
        self.base.wrapping_add(at).cast()
    }

    /// Bytes of all pieces so far.
    pub fn used(&self) -> usize {
        self.used
    }
}

/// Carves `lay`'s pieces out of the workspace, or says how many bytes are missing. Nothing is written.
pub fn carve<T>(ws: &Workspace<'_>, lay: impl Fn(&mut Arena) -> T) -> Result<T> {
    let mut arena = Arena::count();
    lay(&mut arena);
    let need = arena.used();
    if need > 0 && (ws.data.is_null() || ws.data.addr() % ALIGN != 0) {
        return Err(Error::new(ErrorKind::Workspace, format!("workspace must be aligned to {ALIGN} bytes and not null")));
    }
    if need > ws.bytes {
        return Err(Error::new(
            ErrorKind::Workspace,
            format!("workspace has {} bytes; this call needs {need}", ws.bytes),
        ));
    }
    let mut arena = Arena { base: ws.data, used: 0 };
    Ok(lay(&mut arena))
}

/// Bytes that `lay` would carve.
pub fn size_of_pieces<T>(lay: impl Fn(&mut Arena) -> T) -> usize {
    let mut arena = Arena::count();
    lay(&mut arena);
    arena.used()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lay(arena: &mut Arena) -> (*mut f32, *mut u8) {
        (arena.take(3), arena.take(5))
    }

    #[test]
    fn counting_and_carving_agree() {
        let size = size_of_pieces(lay);
        assert_eq!(size, 64 + 5);
        let mut bytes = vec![0u8; size + ALIGN];
        let skip = bytes.as_ptr().align_offset(ALIGN);
        let (a, b) = carve(&Workspace::new(&mut bytes[skip..skip + size]), lay).unwrap();
        assert_eq!((a.addr() % ALIGN, b.addr() - a.addr()), (0, 64));
        let e = carve(&Workspace::new(&mut bytes[skip..skip + size - 1]), lay).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Workspace);
        assert!(e.message.contains("68") && e.message.contains("69"));
        assert!(carve(&Workspace::new(&mut bytes[skip + 1..]), lay).is_err());
    }
}
