//! How levels, folded queries and weights lie, and the products over them.
//!
//! By default in pairs of 16 bits ([`expand`], [`product`]). An instruction set that multiplies bytes overrides all of it.
//! Both ways sum the same integers exactly, so that the results have the same bits.

use super::fold::MAX_DIM;
use super::lanes::SideLanes;
use super::product::{self, Finish, Left, Right};
use super::row::{self, Softmax, Weights};
use super::{MAX_TILE, expand};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::avx2::Avx2;
use crate::cpu::simd::{Simd, portable::Portable};

pub trait Engine: Simd {
    /// Channels of keys as folded queries have them, `[head_dim]`.
    #[inline(always)]
    fn key_order(self, lanes: &SideLanes, order: &mut [u16]) {
        lanes.key_order(order);
    }

    /// Channel of each lane of a value row, or `NO_CHANNEL`.
    #[inline(always)]
    fn value_order(self, lanes: &SideLanes, order: &mut [u16]) {
        lanes.value_order(order);
    }

    /// Writes one row of folded queries, 16 bits a channel, in the order of keys.
    ///
    /// # Safety
    /// `out` has room for `order.len() / 2` words.
    #[inline(always)]
    unsafe fn put_query(self, levels: &[i32; MAX_DIM], order: &[u16], out: *mut i32) {
        for (p, pair) in order.as_chunks::<2>().0.iter().enumerate() {
            // Channels are below MAX_DIM; the mask lets the compiler see it.
            let at = |c: u16| levels[usize::from(c) % MAX_DIM];
            // SAFETY: the caller's promise.
            unsafe { out.add(p).write(at(pair[0]) & 0xffff | at(pair[1]) << 16) };
        }
    }

    /// See [`expand::keys`].
    ///
    /// # Safety
    /// As there; `n` is a multiple of 16.
    #[inline(always)]
    unsafe fn keys(
        self,
        lanes: &SideLanes,
        rows: &[*const u8; MAX_TILE],
        n: usize,
        tile: usize,
        out: *mut i32,
        low: *mut u8,
        ahead: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { expand::keys(self, lanes, rows, n, tile, out, low, ahead) }
    }

    /// See [`expand::values`].
    ///
    /// # Safety
    /// As there; `n` is a multiple of 16.
    #[inline(always)]
    unsafe fn values(
        self,
        lanes: &SideLanes,
        rows: &[*const u8; MAX_TILE],
        n: usize,
        out: *mut i32,
        low: *mut u8,
        ahead: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { expand::values(self, lanes, rows, n, out, low, ahead) }
    }

    /// Online softmax of the first `rows` rows of a block.
    ///
    /// # Safety
    /// Scores and masks hold `n` floats a row, a multiple of 16.
    #[inline(always)]
    unsafe fn softmax(self, block: &mut Softmax, rows: usize) {
        for r in 0..rows {
            // SAFETY: the caller's promise.
            unsafe { row::softmax(self, block, r) };
        }
    }

    /// Weights of all rows.
    ///
    /// # Safety
    /// The pieces hold what their fields say; `n` is a multiple of 16.
    #[inline(always)]
    unsafe fn weights(self, w: Weights) {
        for r in 0..w.rows {
            // SAFETY: the caller's promise.
            unsafe { row::weights(self, w, r) };
        }
    }

    /// See [`product::product`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn product(self, a: Left, b: Right, finish: impl Finish<Self>) {
        // SAFETY: the caller's promise.
        unsafe { product::product(self, a, b, finish) }
    }
}

impl Engine for Portable {}
#[cfg(target_arch = "x86_64")]
impl Engine for Avx2 {}
