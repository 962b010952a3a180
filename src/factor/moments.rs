//! Running moments that outliers cannot spoil.
//!
//! Rows wait in a buffer of [`BLOCK`] and enter together: outliers are found against their neighbours, sums over a block
//! are kept in registers, and the result does not depend on how the rows were cut into calls.

#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{avx2::Avx2, avx512::Avx512};
use crate::cpu::simd::{Isa, portable::Portable, wide::Wide};

/// Rows that enter together.
pub const BLOCK: usize = 16;
/// A larger value cannot be written as f16 and is no row to learn from.
const LARGEST: f32 = 65_504.0;
/// A row stays out when its energy is this many times its block's median ...
const OVER_MEDIAN: f64 = 100.0;
/// ... and this many times the mean of the rows so far.
const OVER_MEAN: f64 = 64.0;

/// Sums over rows of one head, about a reference row.
#[derive(Debug, Clone)]
pub struct Moments {
    dim: usize,
    /// `[dim]`; empty until the first block has chosen it. Uncentred f32 sums would be 7% wrong at offsets of 150.
    reference: Box<[f32]>,
    has_reference: bool,
    /// `[BLOCK][dim]`, rows that wait.
    staged: Box<[f32]>,
    n_staged: usize,
    rows: u64,
    /// `[dim]`, sum of `x - reference`.
    sum: Box<[f64]>,
    /// Sum of `|x - reference|^2`.
    energy: f64,
    /// Packed lower triangle of the sum of `(x - reference)(x - reference)^T`, row `i` at `i (i + 1) / 2`; empty when
    /// only means are wanted.
    second: Box<[f32]>,
    /// Rises while rows are refused in a row, so that a first block of equal rows does not shut out all others.
    slack: f64,
}

/// The parts of [`Moments`].
pub struct RawMoments<'a> {
    pub rows: &'a mut u64,
    pub energy: &'a mut f64,
    pub slack: &'a mut f64,
    pub n_staged: &'a mut usize,
    pub has_reference: &'a mut bool,
    pub sum: &'a mut [f64],
    pub reference: &'a mut [f32],
    pub staged: &'a mut [f32],
    pub second: &'a mut [f32],
}

impl Moments {
    /// About a reference that the first block chooses.
    pub fn centred(dim: usize, with_second: bool) -> Self {
        let second = if with_second { dim * (dim + 1) / 2 } else { 0 };
        Self {
            dim,
            reference: vec![0.0; dim].into(),
            has_reference: false,
            staged: vec![0.0; BLOCK * dim].into(),
            n_staged: 0,
            rows: 0,
            sum: vec![0.0; dim].into(),
            energy: 0.0,
            second: vec![0.0; second].into(),
            slack: 0.0,
        }
    }

    /// About zero, as queries are taken.
    pub fn about_zero(dim: usize) -> Self {
        Self { has_reference: true, ..Self::centred(dim, true) }
    }

    /// Takes one row, `[dim]`; one with NaN, infinity or a value beyond f16 is left out.
    pub fn push(&mut self, row: &[f32]) {
        // Written so that NaN fails it, and without a way out in the middle, which vectors could not take.
        if !row.iter().fold(true, |fine, x| fine & (x.abs() <= LARGEST)) {
            return;
        }
        self.staged[self.n_staged * self.dim..][..self.dim].copy_from_slice(row);
        self.n_staged += 1;
        if self.n_staged == BLOCK {
            self.flush();
        }
    }

    /// Rows in the sums.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Rows in the sums and waiting.
    pub fn rows_pushed(&self) -> u64 {
        self.rows + self.n_staged as u64
    }

    /// Mean of `|x - mean|^2`, zero before the first block.
    pub fn spread(&self) -> f64 {
        if self.rows == 0 {
            return 0.0;
        }
        let n = self.rows as f64;
        let mean = self.sum.iter().map(|s| (s / n) * (s / n)).sum::<f64>();
        (self.energy / n - mean).max(0.0)
    }

    pub fn bytes(&self) -> usize {
        Self::bytes_of(self.dim, !self.second.is_empty())
    }

    /// Bytes that moments of this shape hold.
    pub fn bytes_of(dim: usize, with_second: bool) -> usize {
        let second = if with_second { dim * (dim + 1) / 2 } else { 0 };
        4 * dim + 4 * BLOCK * dim + 8 * dim + 4 * second
    }

    /// Lets the waiting rows in, outliers excepted.
    pub fn flush(&mut self) {
        let n = std::mem::take(&mut self.n_staged);
        if n == 0 {
            return;
        }
        let d = self.dim;
        if !self.has_reference {
            channel_medians(&self.staged[..n * d], d, &mut self.reference);
            self.has_reference = true;
        }
        for row in self.staged[..n * d].chunks_exact_mut(d) {
            for (x, r) in row.iter_mut().zip(&self.reference) {
                *x -= r;
            }
        }
        let kept = self.keep(&energies(&self.staged, d)[..n]);
        self.accumulate(kept);
    }

    /// Moves the rows that are no outliers to the front of the buffer; returns how many there are.
    fn keep(&mut self, energies: &[f64]) -> usize {
        let d = self.dim;
        // In a short block the median may itself be an outlier.
        let of_block = if energies.len() >= BLOCK / 2 { OVER_MEDIAN * median(energies) } else { 0.0 };
        let mut kept = 0;
        for (i, &energy) in energies.iter().enumerate() {
            let mean = if self.rows == 0 { 0.0 } else { self.energy / self.rows as f64 };
            if energy <= of_block.max(OVER_MEAN * mean.max(self.slack)) {
                self.staged.copy_within(i * d..(i + 1) * d, kept * d);
                kept += 1;
                self.rows += 1;
                self.energy += energy;
                self.slack /= 4.0;
            } else {
                let floor = 1e-6 * (self.reference.iter().map(|&r| f64::from(r) * f64::from(r)).sum::<f64>() + 1e-30);
                self.slack = (2.0 * self.slack.max(mean).max(floor)).min(energy);
            }
        }
        kept
    }

    /// Adds the first `n` rows of the buffer to the sums.
    fn accumulate(&mut self, n: usize) {
        let d = self.dim;
        let rows = &mut self.staged[..n.next_multiple_of(8) * d];
        rows[n * d..].fill(0.0);
        for row in rows[..n * d].chunks_exact(d) {
            for (s, &x) in self.sum.iter_mut().zip(row) {
                *s += f64::from(x);
            }
        }
        if !self.second.is_empty() {
            for rows in rows.chunks_exact(8 * d) {
                add_products(Isa::detect(), rows, d, &mut self.second);
            }
        }
    }

    /// `[dim]`, mean of the rows in the sums.
    pub fn mean(&self) -> Vec<f64> {
        let n = self.rows.max(1) as f64;
        self.reference.iter().zip(&self.sum).map(|(&r, s)| f64::from(r) + s / n).collect()
    }

    /// Second moment about `origin`, `[dim][dim]` row-major, symmetric.
    pub fn second_about(&self, origin: &[f64]) -> Vec<f64> {
        let (d, n) = (self.dim, self.rows.max(1) as f64);
        // With u = x - reference and o = origin - reference: E (u - o)(u - o)^T = E u u^T - o m^T - m o^T + o o^T.
        let m: Vec<f64> = self.sum.iter().map(|s| s / n).collect();
        let o: Vec<f64> = origin.iter().zip(&self.reference).map(|(o, &r)| o - f64::from(r)).collect();
        let mut out = vec![0.0; d * d];
        let mut triangle = &self.second[..];
        for (i, row) in out.chunks_exact_mut(d).enumerate() {
            let (uu, rest) = triangle.split_at(i + 1);
            triangle = rest;
            for (((x, &uu), m_j), o_j) in row.iter_mut().zip(uu).zip(&m).zip(&o) {
                *x = f64::from(uu) / n - o[i] * m_j - m[i] * o_j + o[i] * o_j;
            }
        }
        mirror(&mut out, d);
        out
    }

    /// Everything, for a device that goes on with these sums: the order in which `kernels/params.h` has them.
    pub fn raw(&mut self) -> RawMoments<'_> {
        RawMoments {
            rows: &mut self.rows,
            energy: &mut self.energy,
            slack: &mut self.slack,
            n_staged: &mut self.n_staged,
            has_reference: &mut self.has_reference,
            sum: &mut self.sum,
            reference: &mut self.reference,
            staged: &mut self.staged,
            second: &mut self.second,
        }
    }

    /// Everything that is summed, for factor files: rows, energy, reference, sum, second.
    pub fn parts(&self) -> (u64, f64, &[f32], &[f64], &[f32]) {
        (self.rows, self.energy, &self.reference, &self.sum, &self.second)
    }
}

/// Copies the lower triangle of `[d][d]`, a multiple of 8, to the upper one: by blocks that both sides read in whole lines.
fn mirror(m: &mut [f64], d: usize) {
    const SIDE: usize = 8;
    for first_row in (0..d).step_by(SIDE) {
        for first in (0..=first_row).step_by(SIDE) {
            for j in first..first + SIDE {
                for i in first_row.max(j + 1)..first_row + SIDE {
                    m[j * d + i] = m[i * d + j];
                }
            }
        }
    }
}

/// `|x|^2` of all rows of a buffer, each summed in the order of its channels: four at a time, since every sum waits for
/// itself.
fn energies(staged: &[f32], d: usize) -> [f64; BLOCK] {
    let mut out = [0.0; BLOCK];
    for (rows, out) in staged.chunks_exact(4 * d).zip(out.as_chunks_mut::<4>().0) {
        let rows: [&[f32]; 4] = std::array::from_fn(|r| &rows[r * d..(r + 1) * d]);
        for i in 0..d {
            for r in 0..4 {
                out[r] += f64::from(rows[r][i]) * f64::from(rows[r][i]);
            }
        }
    }
    out
}

/// Adds the products of eight rows, `[8][d]`, to a packed triangle, on one of the CPU's instruction sets: all give the
/// same bits.
fn add_products(isa: Isa, rows: &[f32], d: usize, triangle: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn on_avx2(s: Avx2, rows: &[f32], d: usize, triangle: &mut [f32]) {
            add_products_on(s, rows, d, triangle);
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
        fn on_avx512(s: Avx512<'_>, rows: &[f32], d: usize, triangle: &mut [f32]) {
            add_products_on(s, rows, d, triangle);
        }
        if let Some(s) = Avx512::new(None).filter(|_| matches!(isa, Isa::Avx512 | Isa::Amx)) {
            // SAFETY: the CPU has the features.
            return unsafe { on_avx512(s, rows, d, triangle) };
        }
        if let Some(s) = Avx2::new().filter(|_| isa != Isa::Portable) {
            // SAFETY: the CPU has the features.
            return unsafe { on_avx2(s, rows, d, triangle) };
        }
    }
    let _ = isa;
    add_products_on(Portable, rows, d, triangle);
}

/// Eight rows at a time so that an element of the triangle is loaded and stored once per eight products; lanes run along
/// a row of the triangle.
#[inline(always)]
fn add_products_on<S: Wide>(s: S, rows: &[f32], d: usize, triangle: &mut [f32]) {
    assert!(rows.len() == 8 * d && triangle.len() == d * (d + 1) / 2 && d.is_multiple_of(S::WIDTH));
    let (rows, mut out) = (rows.as_ptr(), triangle.as_mut_ptr());
    for i in 0..d {
        // SAFETY: `i < d`, and whole vectors of a row are read only below `d`, a multiple of their width. Row `i` of the
        // triangle has `i + 1` elements, and no others are written.
        unsafe {
            let mut a = [s.splat_wide(0.0); 8];
            for (r, a) in a.iter_mut().enumerate() {
                *a = s.splat_wide(rows.add(r * d + i).read());
            }
            let whole = (i + 1) / S::WIDTH * S::WIDTH;
            for j in (0..whole).step_by(S::WIDTH) {
                let sum = s.add_wide(s.load_wide(out.add(j)), products(s, &a, rows.add(j), d));
                s.store_wide(out.add(j), sum);
            }
            // Stores through a mask may take long: only the last lanes go through one.
            let rest = i + 1 - whole;
            if rest > 0 {
                let sum = s.add_wide(s.load_first(out.add(whole), rest), products(s, &a, rows.add(whole), d));
                s.store_first(out.add(whole), rest, sum);
            }
            out = out.add(i + 1);
        }
    }
}

/// The sum over eight rows of `a` times a vector of the row.
///
/// # Safety
/// A vector is readable at `rows` and at each of the next seven rows of `d` floats.
#[inline(always)]
unsafe fn products<S: Wide>(s: S, a: &[S::W; 8], rows: *const f32, d: usize) -> S::W {
    let mut x = *a;
    for (r, x) in x.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *x = s.mul_wide(*x, unsafe { s.load_wide(rows.add(r * d)) });
    }
    let low = s.add_wide(s.add_wide(x[0], x[1]), s.add_wide(x[2], x[3]));
    let high = s.add_wide(s.add_wide(x[4], x[5]), s.add_wide(x[6], x[7]));
    s.add_wide(low, high)
}

/// The median of each channel, robust against a few wild rows. `rows`: `[n][d]`, at most [`BLOCK`] rows.
fn channel_medians(rows: &[f32], d: usize, out: &mut [f32]) {
    let n = rows.len() / d;
    for (i, out) in out.iter_mut().enumerate() {
        let mut column = [0.0f32; BLOCK];
        for (c, row) in column.iter_mut().zip(rows.chunks_exact(d)) {
            *c = row[i];
        }
        column[..n].sort_unstable_by(f32::total_cmp);
        *out = column[n / 2];
    }
}

/// The upper median of at most [`BLOCK`] numbers.
fn median(values: &[f64]) -> f64 {
    let mut sorted = [0.0; BLOCK];
    sorted[..values.len()].copy_from_slice(values);
    sorted[..values.len()].sort_unstable_by(f64::total_cmp);
    sorted[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::fit::tests::{Normal, rows};

    fn moments_of(x: &[f32], d: usize) -> Moments {
        let mut m = Moments::centred(d, true);
        x.chunks_exact(d).for_each(|row| m.push(row));
        m.flush();
        m
    }

    /// f64, two passes.
    fn truth(x: &[f32], d: usize) -> (Vec<f64>, Vec<f64>) {
        let t = (x.len() / d) as f64;
        let mut mean = vec![0.0; d];
        for row in x.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(m, &x)| *m += f64::from(x) / t);
        }
        let mut cov = vec![0.0; d * d];
        for row in x.chunks_exact(d) {
            for i in 0..d {
                for j in 0..d {
                    cov[i * d + j] += (f64::from(row[i]) - mean[i]) * (f64::from(row[j]) - mean[j]) / t;
                }
            }
        }
        (mean, cov)
    }

    fn distance(a: &[f64], b: &[f64]) -> f64 {
        let norm = b.iter().map(|x| x * x).sum::<f64>().sqrt();
        a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt() / norm
    }

    #[test]
    fn sums_are_right_at_large_offsets() {
        for d in [64, 80, 256] {
            let x = rows(1000, d, 150.0, 3);
            let m = moments_of(&x, d);
            let (mean, cov) = truth(&x, d);
            assert_eq!(m.rows(), 1000);
            assert!(distance(&m.mean(), &mean) < 1e-7);
            assert!(distance(&m.second_about(&m.mean()), &cov) < 1e-5);
            let trace: f64 = (0..d).map(|i| cov[i * (d + 1)]).sum();
            assert!((m.spread() / trace - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn products_have_the_same_bits_on_all_cpus() {
        for d in [64, 80, 96, 128, 192, 256] {
            let x = rows(8, d, 3.0, 6);
            let sums = |isa| {
                let mut triangle = vec![0.5; d * (d + 1) / 2];
                (0..2).for_each(|_| add_products(isa, &x, d, &mut triangle));
                triangle
            };
            let portable = sums(Isa::Portable);
            for isa in Isa::all() {
                assert!(sums(isa) == portable, "{isa:?}, {d}");
            }
        }
    }

    #[test]
    fn wild_rows_change_nothing() {
        let d = 64;
        let x = rows(300, d, 20.0, 4);
        let clean = moments_of(&x, d);
        for at in [0, 7, 15, 16, 100, 299] {
            let mut m = Moments::centred(d, true);
            for (t, row) in x.chunks_exact(d).enumerate() {
                if t == at {
                    for wild in [6e4, f32::NAN, f32::INFINITY, 1e30, f32::MAX] {
                        m.push(&vec![wild; d]);
                    }
                }
                m.push(row);
            }
            m.flush();
            assert_eq!(m.rows(), 300, "{at}");
            assert!(distance(&m.second_about(&m.mean()), &clean.second_about(&clean.mean())) < 1e-5);
        }
    }

    #[test]
    fn equal_rows_at_first_do_not_shut_out_the_others() {
        let d = 64;
        let mut m = Moments::centred(d, true);
        (0..64).for_each(|_| m.push(&vec![3.0; d]));
        rows(512, d, 0.0, 5).chunks_exact(d).for_each(|row| m.push(row));
        m.flush();
        assert!(m.rows() >= 64 + 512 - 40, "{}", m.rows());
    }

    #[test]
    fn zeros_and_subnormals_are_rows() {
        let d = 64;
        let mut m = Moments::centred(d, true);
        (0..20).for_each(|i| m.push(&vec![if i % 2 == 0 { 0.0 } else { 1e-42 }; d]));
        m.flush();
        assert!(m.rows() > 0 && m.mean().iter().all(|x| x.is_finite()));
    }

    /// `cargo test --release -- --ignored --nocapture speed`
    #[test]
    #[ignore = "prints a speed"]
    fn speed() {
        for d in [64, 128, 256] {
            let mut normal = Normal::new(1);
            let x: Vec<f32> = (0..512 * d).map(|_| normal.next() as f32).collect();
            let mut m = Moments::centred(d, true);
            let start = std::time::Instant::now();
            let repeats = 20;
            (0..repeats).for_each(|_| x.chunks_exact(d).for_each(|row| m.push(row)));
            let seconds = start.elapsed().as_secs_f64() / f64::from(repeats);
            let flops = 512.0 * (d * (d + 1)) as f64;
            println!("d {d}: {:.3} ms per 512 rows, {:.1} GFLOP/s", seconds * 1e3, flops / seconds / 1e9);
        }
    }
}
