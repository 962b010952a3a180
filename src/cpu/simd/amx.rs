//! AMX: products of tiles of bytes. The compiler has no intrinsics for it yet, so the instructions stand here as assembly,
//! each in a function of its own.
//!
//! Linux grants tiles to a process that asks (`arch_prctl`), for good and with all its threads. From then on signal frames
//! may carry 8 KiB of tiles, and the kernel refuses alternate signal stacks that are too small for them; where a thread
//! has one already, it refuses the tiles. Without the grant, or on other systems, there is no AMX path.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::cell::Cell;
use std::sync::OnceLock;

/// Most rows of a tile, bytes of a row, and tiles.
pub const ROWS: usize = 16;
pub const ROW_BYTES: usize = 64;
const TILES: usize = 8;

/// Proof that the CPU has AMX-TILE and AMX-INT8 and that this process may use them.
#[derive(Debug, Clone, Copy)]
pub struct Amx(());

impl Amx {
    /// Asks the system for tiles the first time.
    pub fn new() -> Option<Self> {
        (granted_once() || cfg!(test)).then_some(Self(()))
    }
}

/// Asks the first time.
fn granted_once() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| supported() && granted())
}

/// Hands an instruction to [`emulated`] and returns, in tests on a CPU without it.
macro_rules! emulate {
    ($call:expr) => {
        #[cfg(test)]
        if !granted_once() {
            return $call;
        }
    };
}

/// Whether the CPU has the instructions and tiles of the usual size.
fn supported() -> bool {
    if __cpuid(0).eax < 0x1d {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    // bytes per tile in the upper half; then bytes per row, tiles, and rows
    let palette = __cpuid_count(0x1d, 1);
    let size = |x: u32| (x as usize & 0xffff, x as usize >> 16);
    features >> 24 & 3 == 3
        && size(palette.eax).1 == ROWS * ROW_BYTES
        && size(palette.ebx) == (ROW_BYTES, TILES)
        && size(palette.ecx).0 == ROWS
}

#[cfg(target_os = "linux")]
fn granted() -> bool {
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: the call touches no memory; the kernel overwrites rcx and r11. It fails where it or the feature is unknown.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn granted() -> bool {
    false
}

/// The tiles of the calling thread, for as long as this lives: they are given back, cleared, when it is dropped.
///
/// Tiles 0 to 3 hold sums, `[rows][16]` of i32; 4 and 5 left factors, `[rows][depth]` of i8; 6 and 7 right factors,
/// `[depth / 4][16][4]` of u8.
#[derive(Debug)]
pub struct Tiles {
    _has: Amx,
    /// Rows and depth that they are configured for: none yet if 0.
    shape: Cell<(usize, usize)>,
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    pub fn new(has: Amx) -> Self {
        Self { _has: has, shape: Cell::new((0, 0)) }
    }

    /// Shapes all tiles, which clears them; nothing if they have that shape. It takes as long as ten products.
    #[inline(always)]
    pub fn shape(&self, rows: usize, depth: usize) {
        if self.shape.get() != (rows, depth) {
            self.configure(rows, depth);
        }
    }

    #[cold]
    fn configure(&self, rows: usize, depth: usize) {
        assert!((1..=ROWS).contains(&rows) && (4..=ROW_BYTES).contains(&depth) && depth % 4 == 0);
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..TILES {
            let (bytes, rows) = match tile {
                0..4 => (ROW_BYTES, rows),
                4..6 => (depth, rows),
                _ => (ROW_BYTES, depth / 4),
            };
            config.row_bytes[tile] = bytes as u16;
            config.rows[tile] = rows as u8;
        }
        self.shape.set((rows, depth));
        emulate!(emulated::configure(&config));
        // SAFETY: `Amx` is the proof of the instructions; the sizes are within the palette's.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(readonly, nostack, preserves_flags)) };
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if self.shape.get() != (0, 0) {
            emulate!(());
            // SAFETY: as above.
            unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
        }
    }
}

/// Clears tile `N`.
///
/// # Safety
/// For this and all below: tiles are shaped.
#[inline(always)]
pub unsafe fn zero<const N: u8>() {
    emulate!(emulated::zero(N));
    // SAFETY: the caller's promise.
    unsafe { asm!("tilezero tmm{}", const N, options(nomem, nostack, preserves_flags)) }
}

/// Loads tile `N`: a row every `stride` bytes from `p` on.
///
/// # Safety
/// The rows are readable.
#[inline(always)]
pub unsafe fn load<const N: u8>(p: *const u8, stride: usize) {
    // SAFETY: the caller's promise.
    emulate!(unsafe { emulated::load(N, p, stride) });
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tileloadd tmm{}, [{} + {}]", const N, in(reg) p, in(reg) stride, options(readonly, nostack, preserves_flags));
    }
}

/// Stores tile `N` likewise.
///
/// # Safety
/// The rows are writable.
#[inline(always)]
pub unsafe fn store<const N: u8>(p: *mut i32, stride: usize) {
    // SAFETY: the caller's promise.
    emulate!(unsafe { emulated::store(N, p, stride) });
    // SAFETY: the caller's promise.
    unsafe { asm!("tilestored [{} + {}], tmm{}", in(reg) p, in(reg) stride, const N, options(nostack, preserves_flags)) }
}

/// Adds the product of left factor `A`, signed bytes, and right factor `B`, unsigned ones, to tile `SUM`.
///
/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn multiply<const SUM: u8, const A: u8, const B: u8>() {
    emulate!(emulated::multiply(SUM, A, B));
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tdpbsud tmm{}, tmm{}, tmm{}", const SUM, const A, const B, options(nomem, nostack, preserves_flags));
    }
}

/// The instructions in plain code, so that what is written with tiles is tested on every CPU.
#[cfg(test)]
mod emulated {
    use super::{Config, ROW_BYTES, ROWS, TILES};
    use std::cell::RefCell;

    #[derive(Clone, Copy)]
    struct Tile {
        rows: usize,
        row_bytes: usize,
        bytes: [[u8; ROW_BYTES]; ROWS],
    }

    const NONE: Tile = Tile { rows: 0, row_bytes: 0, bytes: [[0; ROW_BYTES]; ROWS] };

    thread_local! {
        static FILE: RefCell<[Tile; TILES]> = const { RefCell::new([NONE; TILES]) };
    }

    fn with<T>(n: u8, work: impl FnOnce(&mut Tile) -> T) -> T {
        FILE.with_borrow_mut(|file| work(&mut file[usize::from(n)]))
    }

    pub fn configure(config: &Config) {
        let tile = |n: usize| Tile { rows: config.rows[n].into(), row_bytes: config.row_bytes[n].into(), ..NONE };
        FILE.set(std::array::from_fn(tile));
    }

    pub fn zero(n: u8) {
        with(n, |tile| tile.bytes = NONE.bytes);
    }

    pub unsafe fn load(n: u8, p: *const u8, stride: usize) {
        with(n, |tile| {
            for (row, bytes) in tile.bytes[..tile.rows].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { p.add(row * stride).copy_to(bytes.as_mut_ptr(), tile.row_bytes) };
            }
        });
    }

    pub unsafe fn store(n: u8, p: *mut i32, stride: usize) {
        with(n, |tile| {
            for (row, bytes) in tile.bytes[..tile.rows].iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { p.cast::<u8>().add(row * stride).copy_from(bytes.as_ptr(), tile.row_bytes) };
            }
        });
    }

    pub fn multiply(sum: u8, a: u8, b: u8) {
        let [a, b] = [a, b].map(|n| with(n, |tile| *tile));
        with(sum, |sum| {
            // What the CPU refuses.
            assert_eq!((a.rows, a.row_bytes, b.row_bytes), (sum.rows, 4 * b.rows, sum.row_bytes));
            for (row, bytes) in sum.bytes[..sum.rows].iter_mut().enumerate() {
                for (lane, out) in bytes[..sum.row_bytes].as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let product = |k: usize| i32::from(a.bytes[row][k] as i8) * i32::from(b.bytes[k / 4][4 * lane + k % 4]);
                    *out = (0..a.row_bytes).fold(i32::from_le_bytes(*out), |x, k| x.wrapping_add(product(k))).to_le_bytes();
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_multiply_and_are_given_back() {
        let amx = Amx::new().unwrap();
        // Whether any tile of this thread is shaped.
        let real = granted_once();
        if !real {
            println!("skipped: this CPU has no AMX, whether tiles are given back cannot be seen");
        }
        let shaped = || {
            let mut config = [0u64; 8];
            // SAFETY: `amx` is the proof of the instruction; it writes 64 bytes.
            unsafe { asm!("sttilecfg [{}]", in(reg) &raw mut config, options(nostack, preserves_flags)) };
            config != [0; 8]
        };
        assert!(!real || !shaped());
        let (rows, depth) = (3, 8);
        let left: Vec<i8> = (0..rows * depth).map(|i| (i * 37 % 251) as u8 as i8).collect();
        let right: Vec<u8> = (0..depth * ROWS).map(|i| (i * 91 % 256) as u8).collect();
        let mut out = vec![0i32; rows * ROWS];
        {
            let tiles = Tiles::new(amx);
            tiles.shape(rows, depth);
            assert!(!real || shaped());
            // SAFETY: tiles are shaped for these factors.
            unsafe {
                zero::<0>();
                load::<4>(left.as_ptr().cast(), depth);
                load::<6>(right.as_ptr(), ROW_BYTES);
                multiply::<0, 4, 6>();
                multiply::<0, 4, 6>();
                store::<0>(out.as_mut_ptr(), ROW_BYTES);
            }
        }
        assert!(!real || !shaped());
        for (at, sum) in out.into_iter().enumerate() {
            let (row, lane) = (at / ROWS, at % ROWS);
            let product = |k: usize| i32::from(left[row * depth + k]) * i32::from(right[(k / 4 * ROWS + lane) * 4 + k % 4]);
            assert_eq!(sum, 2 * (0..depth).map(product).sum::<i32>());
        }
    }
}
