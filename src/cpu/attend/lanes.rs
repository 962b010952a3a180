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
use crate::shape::{MAX_TIERS, SideShape, Tier, plane_widths};

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
    /// Levels plus offset by nibble. 2 bits: by a nibble's first code, by its second; 5 and 6 bits: the two parts of a level
    /// of `code::codebook`, `fine` without offset.
    pub tables: [[u8; 16]; 2],
    /// Levels plus offset by code, over and over: upper bits of an index do not matter. Not for 8 bits.
    pub levels: [u8; 64],
    /// For each byte of the main plane, the byte of the plane of low bits that holds those of its first code, and how
    /// many codes of that byte come before.
    pub low_byte: [u8; 64],
    pub low_part: [u8; 64],
    pub unit: f32,
    pub first: usize,
    pub channels: usize,
}

/// Lanes of a tier: 16 bytes of its main plane fill whole vectors.
fn tier_lanes(tier: &Tier) -> usize {
    let bits = usize::from(plane_widths(tier.bits)[0]);
    (tier.channels * bits / 8).div_ceil(16) * 16 * (8 / bits)
}

/// Lanes of an unfolded row.
pub fn row_lanes(side: &SideShape) -> usize {
    side.plan.tiers.iter().map(tier_lanes).sum()
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
        tables: [[0; 16]; 2],
        levels: [0; 64],
        low_byte: [0; 64],
        low_part: [0; 64],
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
    /// Those of head 0.
    pub fn new(side: &SideShape) -> Self {
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
                    5 if t == 0 => level(2 * n),
                    6 if t == 0 => level(4 * n),
                    5 => level(2 * (n & 14) | n & 1) - level(2 * (n & 14)),
                    6 => level(4 * (n & 12) | n & 3) - level(4 * (n & 12)),
                    _ => level(n),
                })
            });
            let fields = 16 / usize::from(main.bits);
            let lanes = tier_lanes(tier);
            let (mut low_byte, mut low_part) = ([0; 64], [0; 64]);
            if let Some(low) = low {
                for j in 0..main.head_bytes {
                    low_byte[j] = (j % low.head_bytes) as u8;
                    low_part[j] = (j / low.head_bytes) as u8;
                }
            }
            *out = TierLanes {
                bits: tier.bits,
                bytes: main.head_bytes,
                main: main.offset,
                low: low.map_or(0, |p| p.offset),
                low_bytes: low.map_or(0, |p| p.head_bytes),
                fields,
                first_pair,
                first_lane,
                lanes,
                offset,
                tables,
                levels: std::array::from_fn(|i| level(i & ((1 << tier.bits.min(6)) - 1))),
                low_byte,
                low_part,
                unit: book.unit,
                first: tier.first,
                channels: tier.channels,
            };
            n_tiers += 1;
            first_pair += tier.channels / 2;
            first_lane += lanes;
        }
        Self { tiers, n_tiers, head_dim: side.head_dim, lanes: first_lane, header: side.headers_offset }
    }

    /// The same of another head.
    pub fn of_head(&self, head: usize) -> Self {
        let mut out = *self;
        for tier in &mut out.tiers[..self.n_tiers] {
            tier.main += head * tier.bytes;
            tier.low += head * tier.low_bytes;
        }
        out.header += 2 * head;
        out
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

    /// Keys in fours of channels, `[head_dim / 4][4]`: field `f` of bytes `4 g ..`. The channels of a four follow each
    /// other, since tiers of sixteens of channels have whole fours of bytes.
    pub fn key_quads(&self, order: &mut [u16]) {
        for tier in self.tiers() {
            let codes = tier.fields / 2;
            for byte in 0..tier.bytes {
                for f in 0..codes {
                    let quad = tier.first_pair / 2 + byte / 4 * codes + f;
                    order[4 * quad + byte % 4] = (tier.first + byte + f * tier.bytes) as u16;
                }
            }
        }
    }

    /// Values by bytes: channel of each lane, or [`NO_CHANNEL`]. Bytes `16 c ..` give one vector of 16 lanes per field.
    pub fn value_bytes(&self, order: &mut [u16]) {
        for tier in self.tiers() {
            let codes = tier.fields / 2;
            for at in 0..tier.lanes {
                let (byte, f) = (at / (16 * codes) * 16 + at % 16, at / 16 % codes);
                let channel = tier.first + byte + f * tier.bytes;
                order[tier.first_lane + at] = if byte < tier.bytes { channel as u16 } else { NO_CHANNEL };
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
                let lanes = SideLanes::new(&shape.k).of_head(1);
                assert!(lanes.lanes <= MAX_LANES && lanes.lanes == row_lanes(&shape.k));
                let mut quads = vec![NO_CHANNEL; d];
                lanes.key_quads(&mut quads);
                let follow = |four: &[u16; 4]| four.is_sorted_by(|a, b| a + 1 == *b);
                assert!(quads.as_chunks().0.iter().all(follow), "{d} {plan}");
                let orders: [(usize, fn(&SideLanes, &mut [u16])); 4] = [
                    (d, SideLanes::key_order),
                    (d, SideLanes::key_quads),
                    (lanes.lanes, SideLanes::value_order),
                    (lanes.lanes, SideLanes::value_bytes),
                ];
                for (n, write) in orders {
                    let mut order = vec![NO_CHANNEL; n];
                    write(&lanes, &mut order);
                    order.retain(|&c| c != NO_CHANNEL);
                    order.sort();
                    assert!(order.iter().enumerate().all(|(i, &c)| c as usize == i) && order.len() == d, "{d} {plan}");
                }
            }
        }
    }
}
