//! Levels of each code width, as the int8 tables that kernels look up.
//!
//! Widths 1 to 5 are Lloyd-Max quantisers of the standard normal (Max 1960, "Quantizing for minimum distortion"),
//! rounded to int8 with the outermost level at 127; 6 bits come as near to one as two small tables do (below); 8 bits are
//! uniform. A level is worth `table[code] * unit` for a row of unit variance; a decoded latent channel is
//! `scale * unit * table[code]`.
//!
//! Up to 3 bits codes ascend with their levels. From 4 bits on a level is a sum of entries of two tables of sixteen, which
//! byte shuffles look up at once:
//!
//! | bits of a code | `base` by | plus `fine` by |
//! |---|---|---|
//! | 4 | all | |
//! | 5 | upper four | upper three, then the lowest |
//! | 6 | upper four | upper two, then the lowest two |
//!
//! In 4 and 5 bits the upper three name a cell of magnitudes, the outermost first, and the next is the sign (1: positive), so
//! that any two magnitudes can share a cell.

/// One code width.
#[derive(Debug)]
pub struct Codebook {
    pub bits: u8,
    /// Level of each code; entries beyond `1 << bits` are zero. Code 0 has the lowest.
    pub table: [i8; 256],
    /// Levels, ascending; place by place, their codes. `codes` beyond is zero.
    pub levels: Vec<i8>,
    pub codes: [u8; 256],
    /// What one step of the int8 table is worth.
    pub unit: f32,
    /// Mean squared error for a unit normal.
    pub distortion: f32,
    /// `edges[i]` parts `levels[i]` from the next, in units of a row of unit variance. Empty for 8 bits.
    pub edges: Vec<f32>,
    /// The smallest positive level, and for each above it the edge before it and how much it is above the one below; an edge
    /// that nothing passes fills them up to an even number. In steps of the table; empty for 8 bits.
    pub lowest: f32,
    pub steps: Vec<(f32, f32)>,
}

impl Codebook {
    /// How much longer than their codes latents must be taken so that the codes are right on average: a level is the mean
    /// of its cell, or all together are at the scale of least error, and fall short of the latents by the distortion.
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

/// 6 bits: the tables of least error that a search found, among those whose levels are symmetric.
const BASE_6: [i8; 16] = [-105, 37, -83, 15, -77, 30, -44, -3, -57, -25, -21, -61, -52, 1, -40, -11];
const FINE_6: [i8; 16] = [0, 12, 56, 68, 0, 12, 35, 47, 0, 38, 44, 82, 0, 6, 45, 51];
const UNIT_6: f64 = 0.0352;

/// Standard deviations that 127 steps of the 8-bit table span.
const SPAN_8: f64 = 4.0;

/// The codebook of a width that plans use.
pub fn codebook(bits: u8) -> &'static Codebook {
    use std::sync::LazyLock;
    static BOOKS: LazyLock<[Codebook; 7]> = LazyLock::new(|| {
        [
            lloyd_max(1, &HALF_1, 0.3634),
            lloyd_max(2, &HALF_2, 0.1175),
            lloyd_max(3, &HALF_3, 0.03454),
            lloyd_max(4, &HALF_4, 0.009_497),
            lloyd_max(5, &HALF_5, 0.002_53),
            two_tables_6(),
            uniform_8(),
        ]
    });
    BOOKS.iter().find(|b| b.bits == bits).expect("plans hold no other width")
}

fn lloyd_max(bits: u8, half: &[f64], distortion: f32) -> Codebook {
    let (n, unit) = (half.len(), half[half.len() - 1] / 127.0);
    let step = |magnitude: usize| (half[magnitude] / unit).round_ties_even() as i8;
    let mut table = [0i8; 256];
    for (code, level) in table[..2 * n].iter_mut().enumerate() {
        // Place among the levels of one sign, from zero outwards reversed for the negative ones.
        let (positive, place) = match bits {
            0..4 => (code >= n, code % n),
            _ => {
                let below = 1 << (bits - 4);
                let (cell, positive) = (code / (2 * below), code / below % 2 == 1);
                (positive, if positive { n - below - cell * below } else { cell * below } + code % below)
            }
        };
        *level = if positive { step(place) } else { -step(n - 1 - place) };
    }
    with_table(bits, table, unit, distortion)
}

fn two_tables_6() -> Codebook {
    let mut table = [0i8; 256];
    for (code, level) in table[..64].iter_mut().enumerate() {
        *level = BASE_6[code >> 2] + FINE_6[code >> 2 & 12 | code & 3];
    }
    with_table(6, table, UNIT_6, 0.000_693)
}

fn with_table(bits: u8, table: [i8; 256], unit: f64, distortion: f32) -> Codebook {
    let mut ascending: Vec<u8> = (0..1 << bits).collect();
    ascending.sort_by_key(|&code| table[usize::from(code)]);
    let levels: Vec<i8> = ascending.iter().map(|&code| table[usize::from(code)]).collect();
    let edges: Vec<f32> = levels.windows(2).map(|w| ((f64::from(w[0]) + f64::from(w[1])) / 2.0 * unit) as f32).collect();
    let half = levels.len() / 2;
    let above = levels[half..].windows(2).map(|w| f32::from(w[1]) - f32::from(w[0]));
    let steps = edges[half..].iter().copied().zip(above).chain([(f32::INFINITY, 0.0)]).collect();
    let lowest = f32::from(levels[half]);
    let mut codes = [0; 256];
    codes[..ascending.len()].copy_from_slice(&ascending);
    Codebook { bits, table, levels, codes, unit: unit as f32, distortion, edges, lowest, steps }
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
        levels: table.to_vec(),
        codes: std::array::from_fn(|place| place as u8),
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
    fn levels_are_symmetric_distinct_and_reach_the_top() {
        for bits in 1..=6 {
            let book = codebook(bits);
            let (n, levels) = (1 << bits, &book.levels);
            assert_eq!(levels[n - 1], if bits == 6 { 105 } else { 127 });
            assert_eq!(book.table[0], levels[0]);
            for place in 0..n {
                assert_eq!(levels[place], -levels[n - 1 - place]);
                assert!(place == 0 || levels[place] > levels[place - 1]);
            }
            assert_eq!(book.edges.len(), n - 1);
            assert_eq!(book.edges[n / 2 - 1], 0.0);
        }
        assert_eq!((codebook(8).table[1], codebook(8).table[255]), (-127, 127));
    }

    /// What look-ups rely on: of the bits below the upper four and as many of those as fit beside them, a level is the sum
    /// of what both say.
    #[test]
    fn wide_levels_are_sums_of_two_tables() {
        for bits in 4..=6 {
            let (book, low) = (codebook(bits), bits - 4);
            let below = (1usize << low) - 1;
            for code in 0..1usize << bits {
                let level = |code: usize| i32::from(book.table[code]);
                let (base, row) = (code & !below, code >> (2 * low) << (2 * low));
                assert_eq!(level(code) - level(base), level(row | code & below) - level(row), "{bits} bits, code {code}");
            }
        }
    }

    /// What follows `name = ` in C++, the result of a division included.
    fn number(text: &str, name: &str) -> f64 {
        let (_, rest) = text.split_once(&format!("{name} = ")).unwrap_or_else(|| panic!("no {name} in {text}"));
        let value = &rest[..rest.find([',', ';']).expect("statements end")];
        let operand = |text: &str| match text.strip_prefix("0x") {
            Some(digits) => f64::from(u32::from_str_radix(digits.trim_end_matches('u'), 16).expect("a word")),
            None => text.trim_end_matches('f').parse().expect("a number"),
        };
        value.split(" / ").map(operand).reduce(|a, b| a / b).expect("a number")
    }

    /// The sixteen entries that a function in C++ picks from.
    fn entries(text: &str, function: &str) -> Vec<i32> {
        let (_, body) = text.split_once(&format!(" {function}(int ")).unwrap_or_else(|| panic!("no {function} in {text}"));
        let (_, list) = body.split_once("levels[16] = {").expect("a table");
        list[..list.find('}').expect("an end")].split(", ").map(|n| n.parse().expect("a number")).collect()
    }

    #[test]
    fn kernels_have_the_same_tables() {
        let kernels = include_str!("../../kernels/plan.cuh");
        for bits in [2, 3, 4, 5, 6, 8] {
            let book = codebook(bits);
            let (_, rest) = kernels.split_once(&format!("struct Book<{bits}> {{\n")).expect("a book for each width");
            let text = &rest[..rest.find("\n};").expect("structs end")];
            assert_eq!(number(text, "exact_unit") as f32, book.unit, "unit of {bits} bits");
            if bits == 8 {
                assert!(text.contains("level(int code) { return code - 128; }"));
                continue;
            }
            assert_eq!(number(text, "distortion") as f32, book.distortion, "distortion of {bits} bits");
            if bits < 4 {
                let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|byte| book.table[4 * i + byte] as u8));
                assert_eq!(number(text, "table_0"), f64::from(word(0)), "lower codes of {bits} bits");
                assert_eq!(number(text, "table_1"), f64::from(word(1)), "upper codes of {bits} bits");
                continue;
            }
            let (low, level) = (bits - 4, |code: usize| i32::from(book.table[code]));
            let mask = (1usize << low) - 1;
            let base: Vec<_> = (0..16).map(|n| level(n << low)).collect();
            assert_eq!(entries(text, "base"), base, "base of {bits} bits");
            if low > 0 {
                let row = |i: usize| (i & !mask) << low;
                let fine: Vec<_> = (0..16).map(|i| level(row(i) | i & mask) - level(row(i))).collect();
                assert_eq!(entries(text, "fine"), fine, "fine of {bits} bits");
            }
        }
    }

    /// Each level is the mean of the normal within its cell, to the rounding of the table, and for 6 bits to what its
    /// tables allow.
    #[test]
    fn levels_are_cell_means_of_the_normal() {
        let density = |x: f64| (-x * x / 2.0).exp();
        for bits in 1..=6 {
            let book = codebook(bits);
            let half = 1 << (bits - 1);
            let mut lost = 0.0;
            for (place, &level) in book.levels.iter().enumerate().skip(half) {
                let lo = book.edges[place - 1] as f64;
                let hi = if place + 1 < 2 * half { book.edges[place] as f64 } else { 12.0 };
                let dx = (hi - lo) / 20_000.0 * (2.0 / std::f64::consts::PI).sqrt();
                let (mut mass, mut moment, mut second) = (0.0, 0.0, 0.0);
                for i in 0..20_000 {
                    let x = lo + (hi - lo) * (i as f64 + 0.5) / 20_000.0;
                    mass += density(x);
                    moment += x * density(x);
                    second += x * x * density(x);
                }
                let level = f64::from(level) * f64::from(book.unit);
                lost += dx * (mass * level * level - 2.0 * level * moment + second);
                let off = (moment / mass - level).abs();
                assert!(off < if bits == 6 { 0.1 } else { 0.02 }, "{bits} bits: {level} against {}", moment / mass);
            }
            let share = lost / book.distortion as f64;
            assert!((0.98..1.03).contains(&share), "{bits} bits lose {lost}");
        }
    }
}
