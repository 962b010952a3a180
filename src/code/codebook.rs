//! Levels of each code width, as the int8 tables that kernels look up.
//!
//! Widths 1 to 6 are Lloyd-Max quantisers of the standard normal (Max 1960, "Quantizing for minimum distortion"),
//! rounded to int8 with the outermost level at 127 (6 bits: at 108, where rounding costs least); 8 bits are uniform. A level is worth `table[code] * unit` for a row
//! of unit variance; a decoded latent channel is `scale * unit * table[code]`.

/// One code width.
#[derive(Debug)]
pub struct Codebook {
    pub bits: u8,
    /// Level of each code, ascending; entries beyond `1 << bits` are zero.
    pub table: [i8; 256],
    /// What one step of the int8 table is worth.
    pub unit: f32,
    /// Mean squared error for a unit normal.
    pub distortion: f32,
    /// `edges[i]` parts code `i` from code `i + 1`, in units of a row of unit variance. Empty for 8 bits.
    pub edges: Vec<f32>,
    /// The smallest positive level, and for each above it the edge before it and how much it is above the one below; an edge
    /// that nothing passes fills them up to an even number. In steps of the table; empty for 8 bits.
    pub lowest: f32,
    pub steps: Vec<(f32, f32)>,
}

impl Codebook {
    /// How much longer than their codes latents must be taken so that the codes are right on average: a Lloyd-Max level
    /// is the mean of its cell, and the levels together fall short of the latents by the distortion.
    pub fn widening(&self) -> f32 {
        1.0 + self.distortion
    }
}

/// Positive halves, ascending, to four decimals.
const HALF_1: [f64; 1] = [0.7979];
const HALF_2: [f64; 2] = [0.4528, 1.5104];
const HALF_3: [f64; 4] = [0.2451, 0.7560, 1.3439, 2.1519];
const HALF_4: [f64; 8] = [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326];
const HALF_5: [f64; 16] = [
    0.0659, 0.1981, 0.3314, 0.4667, 0.6049, 0.7471, 0.8946, 1.0488,
    1.2118, 1.3863, 1.5762, 1.7872, 2.0287, 2.3177, 2.6911, 3.2607,
];
const HALF_6: [f64; 32] = [
    0.0334, 0.1003, 0.1673, 0.2346, 0.3022, 0.3703, 0.4389, 0.5083,
    0.5785, 0.6497, 0.7219, 0.7955, 0.8705, 0.9472, 1.0257, 1.1065,
    1.1897, 1.2758, 1.3651, 1.4583, 1.5558, 1.6586, 1.7675, 1.8840,
    2.0096, 2.1468, 2.2990, 2.4713, 2.6723, 2.9174, 3.2404, 3.7441,
];

/// Standard deviations that 127 steps of the 8-bit table span.
const SPAN_8: f64 = 4.0;

/// The codebook of a width that plans use.
pub fn codebook(bits: u8) -> &'static Codebook {
    use std::sync::LazyLock;
    static BOOKS: LazyLock<[Codebook; 7]> = LazyLock::new(|| {
        [
            lloyd_max(1, &HALF_1, 127.0, 0.3634),
            lloyd_max(2, &HALF_2, 127.0, 0.1175),
            lloyd_max(3, &HALF_3, 127.0, 0.03454),
            lloyd_max(4, &HALF_4, 127.0, 0.009_497),
            lloyd_max(5, &HALF_5, 127.0, 0.002_53),
            lloyd_max(6, &HALF_6, 108.0, 0.000_66),
            uniform_8(),
        ]
    });
    BOOKS.iter().find(|b| b.bits == bits).expect("plans hold no other width")
}

fn lloyd_max(bits: u8, half: &[f64], top: f64, distortion: f32) -> Codebook {
    let unit = half[half.len() - 1] / top;
    let mut table = [0i8; 256];
    for (i, &level) in half.iter().enumerate() {
        let step = (level / unit).round_ties_even() as i8;
        table[half.len() + i] = step;
        table[half.len() - 1 - i] = -step;
    }
    let levels = &table[..2 * half.len()];
    let edges: Vec<f32> = levels.windows(2).map(|w| ((w[0] as f64 + w[1] as f64) / 2.0 * unit) as f32).collect();
    let positive = &levels[half.len()..];
    let above = positive.windows(2).map(|w| f32::from(w[1]) - f32::from(w[0]));
    let steps = edges[half.len()..].iter().copied().zip(above).chain([(f32::INFINITY, 0.0)]).collect();
    Codebook { bits, table, unit: unit as f32, distortion, edges, lowest: f32::from(positive[0]), steps }
}

/// Code `c` stands for `c - 128`; code 0 is not written.
fn uniform_8() -> Codebook {
    let mut table = [0i8; 256];
    for (c, level) in table.iter_mut().enumerate() {
        *level = (c as i32 - 128) as i8;
    }
    let unit = SPAN_8 / 127.0;
    Codebook {
        bits: 8,
        table,
        unit: unit as f32,
        distortion: (unit * unit / 12.0) as f32,
        edges: Vec::new(),
        lowest: 0.0,
        steps: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_symmetric_ascending_and_reach_the_top() {
        for bits in 1..=6 {
            let book = codebook(bits);
            let n = 1 << bits;
            assert_eq!(book.table[n - 1], if bits == 6 { 108 } else { 127 });
            for c in 0..n {
                assert_eq!(book.table[c], -book.table[n - 1 - c]);
                assert!(c == 0 || book.table[c] > book.table[c - 1]);
            }
            assert_eq!(book.edges.len(), n - 1);
            assert_eq!(book.edges[n / 2 - 1], 0.0);
        }
        assert_eq!((codebook(8).table[1], codebook(8).table[255]), (-127, 127));
    }

    /// Each level is the mean of the normal within its cell, to the rounding of the table.
    #[test]
    fn levels_are_cell_means_of_the_normal() {
        let density = |x: f64| (-x * x / 2.0).exp();
        for bits in 1..=6 {
            let book = codebook(bits);
            let half = 1 << (bits - 1);
            let mut lost = 0.0;
            for c in half..2 * half {
                let lo = book.edges[c - 1] as f64;
                let hi = if c + 1 < 2 * half { book.edges[c] as f64 } else { 12.0 };
                let dx = (hi - lo) / 20_000.0 * (2.0 / std::f64::consts::PI).sqrt();
                let (mut mass, mut moment, mut second) = (0.0, 0.0, 0.0);
                for i in 0..20_000 {
                    let x = lo + (hi - lo) * (i as f64 + 0.5) / 20_000.0;
                    mass += density(x);
                    moment += x * density(x);
                    second += x * x * density(x);
                }
                let level = book.table[c] as f64 * book.unit as f64;
                lost += dx * (mass * level * level - 2.0 * level * moment + second);
                assert!((moment / mass - level).abs() < 0.02, "{bits} bits, code {c}: {level} against {}", moment / mass);
            }
            let share = lost / book.distortion as f64;
            assert!((0.98..1.03).contains(&share), "{bits} bits lose {lost}");
        }
    }
}
