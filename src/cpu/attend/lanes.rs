//! Where each latent channel lies once the codes of a tile are unfolded.
//!
//! Codes are unfolded by shifts and masks of whole vectors, so channels come out in an order of their own. Folded
//! queries are laid out to match, outputs are put back once at the end: the order costs nothing per token.
//!
//! A tier's *main* plane is its widest, 8, 4 or 2 bits; its bytes are numbered `0..bytes`. Every 16-bit word of it gives
//! `fields` words of one level each: word `f` holds byte `field_byte(f)` of the two, code `field_code(f)` of that byte.
//! Levels are unsigned in the words, `level + offset`, so that a byte shuffle leaves the word's upper byte zero: code 0
//! is worth 0. The surplus, `offset` times a sum, is taken off in exact arithmetic.

use crate::code::codebook;
use crate::shape::{MAX_TIERS, SideShape};

/// Most lanes of an unfolded row; tails of awkward widths round up to whole vectors.
pub const MAX_LANES: usize = 320;
/// No channel: lanes that only fill a vector up.
pub const NO_CHANNEL: u16 = u16::MAX;

/// One tier of one head.
#[derive(Debug, Clone, Copy)]
pub struct TierLanes {
    pub bits: u8,
    /// Bytes of the main plane.
    pub bytes: usize,
    /// Offset of the main plane in a record.
    pub main: usize,
    /// Offset and bytes of the plane of low bits, for widths that have one.
    pub low: usize,
    pub low_bytes: usize,
    /// Words of levels that one word of codes gives.
    pub fields: usize,
    /// First pair of channels (keys), first lane (values) of the unfolded row.
    pub first_pair: usize,
    pub first_lane: usize,
    pub lanes: usize,
    /// What is added to each level.
    pub offset: i32,
    /// Levels plus offset by nibble: one table per code of a nibble, or per value of the low bits.
    pub tables: [[u8; 16]; 4],
    pub unit: f32,
    pub first: usize,
    pub channels: usize,
}

/// All tiers of one side and head.
#[derive(Debug, Clone, Copy)]
pub struct SideLanes {
    tiers: [TierLanes; MAX_TIERS],
    n_tiers: usize,
    pub head_dim: usize,
    /// Lanes of an unfolded value row.
    pub lanes: usize,
    /// Offset of the row header in a record.
    pub header: usize,
}

impl TierLanes {
    const NONE: Self = Self {
        bits: 0,
        bytes: 0,
        main: 0,
        low: 0,
        low_bytes: 0,
        fields: 0,
        first_pair: 0,
        first_lane: 0,
        lanes: 0,
        offset: 0,
        tables: [[0; 16]; 4],
        unit: 0.0,
        first: 0,
        channels: 0,
    };

    /// Channel of field `f` of a word whose first byte is `byte`.
    fn channel(&self, byte: usize, f: usize) -> usize {
        // Fields come in rounds of four nibbles of a word; a round with `round` = 1 takes the odd codes of 2 bits.
        let (byte, code) = match self.bits {
            8 => (byte + f, 0),
            2 | 3 => (byte + f % 4 / 2, 2 * (f % 2) + f / 4),
            _ => (byte + f / 2, f % 2),
        };
        if byte < self.bytes { self.first + byte + code * self.bytes } else { usize::from(NO_CHANNEL) }
    }
}

impl SideLanes {
    pub fn new(side: &SideShape, head: usize) -> Self {
        let mut tiers = [TierLanes::NONE; MAX_TIERS];
        let mut planes = side.planes.iter();
        let (mut n_tiers, mut first_pair, mut first_lane) = (0, 0, 0);
        for (out, tier) in tiers.iter_mut().zip(&side.plan.tiers) {
            let Some(main) = planes.next() else { break };
            let low = if main.shift > 0 { planes.next() } else { None };
            let book = codebook(tier.bits);
            let offset = -i32::from(book.table[0]);
            let level = |code: usize| (i32::from(book.table[code]) + offset) as u8;
            let tables = std::array::from_fn(|t| {
                std::array::from_fn(|n| match tier.bits {
                    2 => level(n >> (2 * t) & 3),
                    3 => level(n & 7),
                    // The low bits choose the table.
                    5 => level(2 * n + t % 2),
                    6 => level(4 * n + t),
                    _ => level(n),
                })
            });
            // One vector of values takes 8 words, 16 bytes, of codes.
            let fields = 16 / usize::from(main.bits);
            let lanes = main.head_bytes.div_ceil(16) * 8 * fields;
            *out = TierLanes {
                bits: tier.bits,
                bytes: main.head_bytes,
                main: main.offset + head * main.head_bytes,
                low: low.map_or(0, |p| p.offset + head * p.head_bytes),
                low_bytes: low.map_or(0, |p| p.head_bytes),
                fields,
                first_pair,
                first_lane,
                lanes,
                offset,
                tables,
                unit: book.unit,
                first: tier.first,
                channels: tier.channels,
            };
            n_tiers += 1;
            first_pair += tier.channels / 2;
            first_lane += lanes;
        }
        let header = side.headers_offset + 2 * head;
        Self { tiers, n_tiers, head_dim: side.head_dim, lanes: first_lane, header }
    }

    pub fn tiers(&self) -> &[TierLanes] {
        &self.tiers[..self.n_tiers]
    }

    /// Keys: channels of the low and high half of each pair, `[head_dim / 2][2]`.
    ///
    /// A 32-bit group of codes, bytes `4 g ..`, gives `fields` pairs: low halves from its first word, high halves from
    /// its second.
    pub fn key_order(&self, order: &mut [u16]) {
        for tier in self.tiers() {
            for g in 0..tier.bytes / 4 {
                for f in 0..tier.fields {
                    let pair = tier.first_pair + g * tier.fields + f;
                    order[2 * pair] = tier.channel(4 * g, f) as u16;
                    order[2 * pair + 1] = tier.channel(4 * g + 2, f) as u16;
                }
            }
        }
    }

    /// Values: channel of each lane, or [`NO_CHANNEL`].
    ///
    /// Eight words of codes, bytes `16 c ..`, give `fields` vectors of eight lanes; two such chunks that come together
    /// exchange the second half of the first for the first half of the second.
    pub fn value_order(&self, order: &mut [u16]) {
        for tier in self.tiers() {
            for c in 0..tier.bytes.div_ceil(16) {
                for f in 0..tier.fields {
                    for w in 0..8 {
                        let lane = tier.first_lane + (c * tier.fields + f) * 8 + w;
                        let paired = (c | 1) * 16 + 16 <= tier.bytes;
                        let word = if paired { 8 * (c & !1) + 4 * (c & 1) + w + (w & 4) } else { 8 * c + w };
                        order[lane] = tier.channel(2 * word, f) as u16;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{Gauge, HEAD_DIMS, LayerShape, SideDesc};

    #[test]
    fn every_channel_has_one_place() {
        for d in HEAD_DIMS {
            for plan in [2, 3, 4, 8, 103, 104] {
                let desc = SideDesc { head_dim: d, plan, gauge: Gauge::Rotation };
                let shape = LayerShape::new(2, 2, desc, desc).unwrap();
                let lanes = SideLanes::new(&shape.k, 1);
                let mut order = vec![NO_CHANNEL; d];
                lanes.key_order(&mut order);
                order.sort();
                assert!(order.iter().enumerate().all(|(i, &c)| c as usize == i), "{d} {plan}");
                assert!(lanes.lanes <= MAX_LANES);
                let mut order = vec![0; lanes.lanes];
                lanes.value_order(&mut order);
                order.retain(|&c| c != NO_CHANNEL);
                order.sort();
                assert!(order.iter().enumerate().all(|(i, &c)| c as usize == i), "{d} {plan}");
            }
        }
    }
}
