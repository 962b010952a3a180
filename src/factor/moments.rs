//! Running moments that outliers cannot spoil.
//!
//! Rows wait in a buffer of [`BLOCK`] and enter together: outliers are found against their neighbours, sums over a block
//! are kept in registers, and the result does not depend on how the rows were cut into calls.

use crate::cpu::simd::Isa;

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
                add_products(rows, d, &mut self.second);
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
        for i in 0..d {
            for j in 0..=i {
                let uu = f64::from(self.second[i * (i + 1) / 2 + j]) / n;
                let value = uu - o[i] * m[j] - m[i] * o[j] + o[i] * o[j];
                out[i * d + j] = value;
                out[j * d + i] = value;
            }
        }
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

/// Adds the products of eight rows, `[8][d]`, to a packed triangle. Eight at a time so that a triangle element is loaded
/// and stored once per eight products; lanes run along a row of the triangle. All ways of doing it give the same bits.
fn add_products(rows: &[f32], d: usize, triangle: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    match Isa::detect() {
        // SAFETY: what `detect` names the CPU has, here and below.
        Isa::Avx512 | Isa::Amx => return unsafe { add_products_avx512(rows, d, triangle) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { add_products_avx2(rows, d, triangle) },
        Isa::Portable => {}
    }
    add_products_portable(rows, d, triangle);
}

/// Rows of a triangle are short: what a mask does to the last sixteen lanes takes longer one by one.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn add_products_avx512(rows: &[f32], d: usize, triangle: &mut [f32]) {
    use std::arch::x86_64::*;
    assert!(rows.len() == 8 * d && triangle.len() == d * (d + 1) / 2);
    let mut at = 0;
    for i in 0..d {
        let a: [__m512; 8] = std::array::from_fn(|r| _mm512_set1_ps(rows[r * d + i]));
        for j in (0..=i).step_by(16) {
            let some = (0xffff_u32 >> (15 - (i - j).min(15))) as __mmask16;
            // SAFETY: lanes up to `i < d` of a row, and of row `i` of the triangle, by the assertion.
            unsafe {
                let x = |r: usize| _mm512_mul_ps(a[r], _mm512_maskz_loadu_ps(some, rows.as_ptr().add(r * d + j)));
                let low = _mm512_add_ps(_mm512_add_ps(x(0), x(1)), _mm512_add_ps(x(2), x(3)));
                let high = _mm512_add_ps(_mm512_add_ps(x(4), x(5)), _mm512_add_ps(x(6), x(7)));
                let out = triangle.as_mut_ptr().add(at + j);
                let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(some, out), _mm512_add_ps(low, high));
                _mm512_mask_storeu_ps(out, some, sum);
            }
        }
        at += i + 1;
    }
}

/// Stores through a mask take long here: only the last lanes of a row go through one.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_products_avx2(rows: &[f32], d: usize, triangle: &mut [f32]) {
    use std::arch::x86_64::*;
    assert!(rows.len() == 8 * d && triangle.len() == d * (d + 1) / 2 && d.is_multiple_of(8));
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let mut at = 0;
    for i in 0..d {
        let a: [__m256; 8] = std::array::from_fn(|r| _mm256_set1_ps(rows[r * d + i]));
        // Lanes beyond the diagonal are within the rows, but not within this row of the triangle.
        let products = |j: usize| {
            // SAFETY: `j + 8 <= d`, a multiple of 8, by the assertion.
            let x = |r: usize| _mm256_mul_ps(a[r], unsafe { _mm256_loadu_ps(rows.as_ptr().add(r * d + j)) });
            let low = _mm256_add_ps(_mm256_add_ps(x(0), x(1)), _mm256_add_ps(x(2), x(3)));
            let high = _mm256_add_ps(_mm256_add_ps(x(4), x(5)), _mm256_add_ps(x(6), x(7)));
            _mm256_add_ps(low, high)
        };
        let whole = (i + 1) / 8 * 8;
        for j in (0..whole).step_by(8) {
            // SAFETY: row `i` of the triangle has `i + 1` elements.
            unsafe {
                let out = triangle.as_mut_ptr().add(at + j);
                _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), products(j)));
            }
        }
        if whole <= i {
            let some = _mm256_cmpgt_epi32(_mm256_set1_epi32((i + 1 - whole) as i32), lanes);
            // SAFETY: as above, with lanes of the row alone.
            unsafe {
                let out = triangle.as_mut_ptr().add(at + whole);
                _mm256_maskstore_ps(out, some, _mm256_add_ps(_mm256_maskload_ps(out, some), products(whole)));
            }
        }
        at += i + 1;
    }
}

fn add_products_portable(rows: &[f32], d: usize, triangle: &mut [f32]) {
    let rows: [&[f32]; 8] = std::array::from_fn(|r| &rows[r * d..(r + 1) * d]);
    let mut at = 0;
    for i in 0..d {
        let out = &mut triangle[at..=at + i];
        at += i + 1;
        let a: [f32; 8] = std::array::from_fn(|r| rows[r][i]);
        let x: [&[f32]; 8] = rows.map(|row| &row[..=i]);
        for j in 0..out.len() {
            let low = (a[0] * x[0][j] + a[1] * x[1][j]) + (a[2] * x[2][j] + a[3] * x[3][j]);
            let high = (a[4] * x[4][j] + a[5] * x[5][j]) + (a[6] * x[6][j] + a[7] * x[7][j]);
            out[j] += low + high;
        }
    }
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
            let (mut here, mut anywhere) = (vec![0.5; d * (d + 1) / 2], vec![0.5; d * (d + 1) / 2]);
            for _ in 0..2 {
                add_products(&x, d, &mut here);
                add_products_portable(&x, d, &mut anywhere);
            }
            assert_eq!(here, anywhere, "{d}");
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
