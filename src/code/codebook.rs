//! Levels of each code width, as the int8 tables that kernels look up.
//!
//! Widths 1 to 6 are Lloyd-Max quantisers of the standard normal (Max 1960, "Quantizing for minimum distortion"),
//! rounded to int8 with the outermost level at 127; 8 bits are uniform. A level is worth `table[code] * unit` for a row
//! of unit variance; a decoded latent channel is `scale * unit * table[code]`.

/// One code width.
#[derive(Debug)]
pub struct Codebook {
    pub bits: u8,
    /// Level of each code, ascending; entries beyond `1 << bits` are zero.
    pub table: [i8; 256],
    /// What one step of the int8 table is worth.
    pub unit: f32,
    /// `edges[i]` parts code `i` from code `i + 1`, in units of a row of unit variance. Empty for 8 bits.
    pub edges: Vec<f32>,
}

/// Positive halves, ascending, to four decimals.
const HALF_2: [f64; 2] = [0.4528, 1.5104];
const HALF_3: [f64; 4] = [0.2451, 0.7560, 1.3439, 2.1520];
const HALF_4: [f64; 8] = [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326];

/// Standard deviations that 127 steps of the 8-bit table span.
const SPAN_8: f64 = 4.0;

/// The codebook of a width that plans use.
pub fn codebook(bits: u8) -> &'static Codebook {
    use std::sync::LazyLock;
    static BOOKS: LazyLock<[Codebook; 4]> =
        LazyLock::new(|| [lloyd_max(2, &HALF_2), lloyd_max(3, &HALF_3), lloyd_max(4, &HALF_4), uniform_8()]);
    BOOKS.iter().find(|b| b.bits == bits).expect("plans hold no other width")
}

fn lloyd_max(bits: u8, half: &[f64]) -> Codebook {
    let unit = half[half.len() - 1] / 127.0;
    let mut table = [0i8; 256];
    for (i, &level) in half.iter().enumerate() {
        let step = (level / unit).round_ties_even() as i8;
        table[half.len() + i] = step;
        table[half.len() - 1 - i] = -step;
    }
    let levels = &table[..2 * half.len()];
    let edges = levels.windows(2).map(|w| ((w[0] as f64 + w[1] as f64) / 2.0 * unit) as f32).collect();
    Codebook { bits, table, unit: unit as f32, edges }
}

/// Code `c` stands for `c - 128`; code 0 is not written.
fn uniform_8() -> Codebook {
    let mut table = [0i8; 256];
    for (c, level) in table.iter_mut().enumerate() {
        *level = (c as i32 - 128) as i8;
    }
    Codebook { bits: 8, table, unit: (SPAN_8 / 127.0) as f32, edges: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_symmetric_ascending_and_reach_127() {
        for bits in [2, 3, 4] {
            let book = codebook(bits);
            let n = 1 << bits;
            assert_eq!(book.table[n - 1], 127);
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
        for bits in [2, 3, 4] {
            let book = codebook(bits);
            let half = 1 << (bits - 1);
            for c in half..2 * half {
                let lo = book.edges[c - 1] as f64;
                let hi = if c + 1 < 2 * half { book.edges[c] as f64 } else { 12.0 };
                let (mut mass, mut moment) = (0.0, 0.0);
                let steps = 20_000;
                for i in 0..steps {
                    let x = lo + (hi - lo) * (i as f64 + 0.5) / steps as f64;
                    mass += density(x);
                    moment += x * density(x);
                }
                let level = book.table[c] as f64 * book.unit as f64;
                assert!((moment / mass - level).abs() < 0.02, "{bits} bits, code {c}: {level} against {}", moment / mass);
            }
        }
    }
}
