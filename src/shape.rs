//! Validated descriptions: code plans, the shape of a layer, and where everything lies inside a record.
//!
//! A record is one slot of one layer:
//!
//! ```text
//! K planes | V planes | K headers u16 [n_kv_heads] | V headers u16 [n_kv_heads] | zeros to a multiple of 16 bytes
//! ```
//!
//! A side's latent channels are split into tiers, a tier's codes into planes of 8, 4, 2 or 1 bits, widest (and most
//! significant) first. The planes of a side follow each other, each as `[n_kv_heads][channels * bits / 8]` bytes.

use std::ffi::CStr;
use std::ops::Range;

use crate::error::{Error, Result};

/// Head dimensions that have kernels.
pub const HEAD_DIMS: [usize; 6] = [64, 80, 96, 128, 192, 256];
/// The largest of them.
pub const MAX_DIM: usize = HEAD_DIMS[HEAD_DIMS.len() - 1];
/// Alignment of records and of slot strides, in bytes.
pub const SLOT_ALIGN: usize = 16;
/// A row names its factor set in four bits.
pub const MAX_SETS: usize = 16;
/// Most KV heads of a layer.
pub const MAX_KV_HEADS: usize = 1024;
/// Most tiers of a plan.
pub const MAX_TIERS: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    K,
    V,
}

/// How the two factors share the product's freedom, X = (T_L G)(G^-1 T_S).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gauge {
    /// The plain Hadamard rotation; nothing is learned.
    Rotation,
    /// The rotation about the rows' mean; no matrices.
    Centred,
    /// The gauge that minimises the error of the attention scores.
    Attention,
}

/// Code plans as data: a number that C callers name, and tiers as (sixteenths of head_dim, bits).
struct PlanSpec {
    id: u32,
    name: &'static CStr,
    tiers: &'static [(usize, u8)],
}

const PLANS: &[PlanSpec] = &[
    PlanSpec { id: 2, name: c"2", tiers: &[(16, 2)] },
    PlanSpec { id: 3, name: c"3", tiers: &[(16, 3)] },
    PlanSpec { id: 4, name: c"4", tiers: &[(16, 4)] },
    PlanSpec { id: 8, name: c"8", tiers: &[(16, 8)] },
    // Keys have a steep spectrum: the widest latent channels deserve more bits. 3t and 4t spend a quarter of a bit above
    // their name on it. Values gain nothing.
    PlanSpec { id: 102, name: c"2t", tiers: &[(4, 4), (12, 2)] },
    PlanSpec { id: 103, name: c"3t", tiers: &[(4, 5), (8, 3), (4, 2)] },
    PlanSpec { id: 104, name: c"4t", tiers: &[(4, 6), (8, 4), (4, 3)] },
];

/// The name of a plan number, if it is one.
pub fn plan_name(id: u32) -> Option<&'static CStr> {
    PLANS.iter().find(|p| p.id == id).map(|p| p.name)
}

/// A run of latent channels that share a code width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tier {
    pub first: usize,
    pub channels: usize,
    pub bits: u8,
}

/// How the latent channels of a row are coded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub id: u32,
    pub tiers: Vec<Tier>,
}

impl Plan {
    pub fn new(id: u32, head_dim: usize) -> Result<Self> {
        let spec = PLANS.iter().find(|p| p.id == id).ok_or_else(|| {
            let known: Vec<String> = PLANS.iter().map(|p| p.id.to_string()).collect();
            Error::unsupported(format!("plan is {id}; known plans are {}", known.join(", ")))
        })?;
        let mut tiers = Vec::with_capacity(spec.tiers.len());
        let (mut first, mut share) = (0, 0);
        for &(sixteenths, bits) in spec.tiers {
            share += sixteenths;
            // Tiers end on multiples of 16 channels: the first rounded down, the others to the nearest.
            let exact = head_dim * share / 16;
            let end = if first == 0 && share < 16 { exact } else { exact + 8 } / 16 * 16;
            if end > first {
                tiers.push(Tier { first, channels: end - first, bits });
            }
            first = end;
        }
        debug_assert_eq!(first, head_dim);
        Ok(Self { id, tiers })
    }

    /// Numbers of the feedback of a fit's encode matrix: a packed lower triangle per tier. Plans of one width have none.
    pub fn feedback_len(&self) -> usize {
        if self.tiers.len() < 2 { 0 } else { self.tiers.iter().map(|t| t.channels * (t.channels + 1) / 2).sum() }
    }

    /// Code bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.tiers.iter().map(|t| t.channels * t.bits as usize / 8).sum()
    }
}

/// Widths of the planes of a code, most significant first.
pub fn plane_widths(bits: u8) -> &'static [u8] {
    match bits {
        1 => &[1],
        2 => &[2],
        3 => &[2, 1],
        4 => &[4],
        5 => &[4, 1],
        6 => &[4, 2],
        8 => &[8],
        _ => unreachable!("plans hold no other width"),
    }
}

/// One bit plane of one tier. Byte `j` of a head's plane holds, at bit `k * bits`, channel `first + j + k * head_bytes`:
/// a shift and a mask of a run of bytes give a run of channels in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plane {
    /// Offset of head 0 from the start of the record.
    pub offset: usize,
    /// Bytes of one head, and the distance from one head to the next.
    pub head_bytes: usize,
    /// Bits of each code in this plane: 8, 4, 2 or 1.
    pub bits: u8,
    /// Where these bits stand in the code.
    pub shift: u8,
    /// First latent channel.
    pub first: usize,
    /// Latent channels, those of the tier.
    pub channels: usize,
}

impl Plane {
    /// A head's bytes in a record.
    pub fn of_head(&self, head: usize) -> Range<usize> {
        let at = self.offset + head * self.head_bytes;
        at..at + self.head_bytes
    }
}

/// Keys or values of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideShape {
    pub head_dim: usize,
    pub plan: Plan,
    pub gauge: Gauge,
    pub planes: Vec<Plane>,
    /// Offset of head 0's u16 header from the start of the record.
    pub headers_offset: usize,
}

/// A layer: heads, widths and the record's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerShape {
    pub n_q_heads: usize,
    pub n_kv_heads: usize,
    pub k: SideShape,
    pub v: SideShape,
    pub k_codes_offset: usize,
    pub v_codes_offset: usize,
    pub slot_bytes: usize,
}

/// What a caller asks of one side.
#[derive(Debug, Clone, Copy)]
pub struct SideDesc {
    pub head_dim: usize,
    pub plan: u32,
    pub gauge: Gauge,
}

impl LayerShape {
    pub fn new(n_q_heads: usize, n_kv_heads: usize, k: SideDesc, v: SideDesc) -> Result<Self> {
        if n_kv_heads == 0 || n_kv_heads > MAX_KV_HEADS {
            return Err(Error::invalid(format!("n_kv_heads is {n_kv_heads}; it must be 1 to {MAX_KV_HEADS}")));
        }
        if n_q_heads == 0 || n_q_heads % n_kv_heads != 0 {
            return Err(Error::invalid(format!(
                "n_q_heads is {n_q_heads}; it must be a positive multiple of n_kv_heads, {n_kv_heads}"
            )));
        }
        let mut offset = 0;
        let mut side = |desc: SideDesc, name: &str| -> Result<(SideShape, usize)> {
            if !HEAD_DIMS.contains(&desc.head_dim) {
                return Err(Error::unsupported(format!(
                    "head_dim_{name} is {}; there are kernels for 64, 80, 96, 128, 192 and 256",
                    desc.head_dim
                )));
            }
            let plan = Plan::new(desc.plan, desc.head_dim).map_err(|e| Error::new(e.kind, format!("{name}_{e}")))?;
            let start = offset;
            let planes = lay_planes(&plan, n_kv_heads, &mut offset);
            Ok((SideShape { head_dim: desc.head_dim, plan, gauge: desc.gauge, planes, headers_offset: 0 }, start))
        };
        let (mut k, k_codes_offset) = side(k, "k")?;
        let (mut v, v_codes_offset) = side(v, "v")?;
        // Every plane is a multiple of 2 bytes per head, so that headers are aligned to u16.
        k.headers_offset = offset;
        v.headers_offset = offset + 2 * n_kv_heads;
        let slot_bytes = (offset + 4 * n_kv_heads).next_multiple_of(SLOT_ALIGN);
        Ok(Self { n_q_heads, n_kv_heads, k, v, k_codes_offset, v_codes_offset, slot_bytes })
    }

    pub fn side(&self, side: Side) -> &SideShape {
        match side {
            Side::K => &self.k,
            Side::V => &self.v,
        }
    }

    /// Query heads that share one KV head.
    pub fn group(&self) -> usize {
        self.n_q_heads / self.n_kv_heads
    }

    /// Values (keys and values together) of one slot.
    pub fn values_per_slot(&self) -> usize {
        self.n_kv_heads * (self.k.head_dim + self.v.head_dim)
    }
}

fn lay_planes(plan: &Plan, n_kv_heads: usize, offset: &mut usize) -> Vec<Plane> {
    let mut planes = Vec::new();
    for tier in &plan.tiers {
        let mut shift = tier.bits;
        for &bits in plane_widths(tier.bits) {
            shift -= bits;
            let head_bytes = tier.channels * bits as usize / 8;
            planes.push(Plane {
                offset: *offset,
                head_bytes,
                bits,
                shift,
                first: tier.first,
                channels: tier.channels,
            });
            *offset += n_kv_heads * head_bytes;
        }
    }
    planes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(n_kv: usize, d_k: usize, d_v: usize, k: u32, v: u32) -> LayerShape {
        let desc = |head_dim, plan| SideDesc { head_dim, plan, gauge: Gauge::Rotation };
        LayerShape::new(n_kv * 3, n_kv, desc(d_k, k), desc(d_v, v)).unwrap()
    }

    #[test]
    fn sections_are_the_documented_ones() {
        let s = layer(3, 64, 64, 4, 4);
        assert_eq!((s.k_codes_offset, s.v_codes_offset, s.k.headers_offset, s.v.headers_offset), (0, 96, 192, 198));
        assert_eq!(s.slot_bytes, 208);
        let s = layer(8, 128, 128, 4, 4);
        assert_eq!(s.slot_bytes, 1056);
    }

    #[test]
    fn three_bits_are_a_two_bit_and_a_one_bit_plane() {
        let s = layer(2, 80, 64, 3, 8);
        let p = &s.k.planes;
        assert_eq!((p[0].bits, p[0].shift, p[0].offset, p[0].head_bytes), (2, 1, 0, 20));
        assert_eq!((p[1].bits, p[1].shift, p[1].offset, p[1].head_bytes), (1, 0, 40, 10));
        assert_eq!(s.v.planes[0].offset, 60);
    }

    #[test]
    fn tiers_are_sixteens_and_cost_a_quarter_more_than_their_name() {
        for d in HEAD_DIMS {
            for (id, eighths) in [(102, 20), (103, 26), (104, 34)] {
                let plan = Plan::new(id, d).unwrap();
                assert!(plan.tiers.iter().all(|t| t.channels % 16 == 0));
                assert!(plan.row_bytes() * 64 <= eighths * d, "plan {id} at {d} takes {} bytes", plan.row_bytes());
            }
        }
        let tiers = |d| Plan::new(104, d).unwrap().tiers.iter().map(|t| (t.channels, t.bits)).collect::<Vec<_>>();
        assert_eq!(tiers(64), [(16, 6), (32, 4), (16, 3)]);
        assert_eq!(tiers(80), [(16, 6), (48, 4), (16, 3)]);
        assert_eq!(tiers(96), [(16, 6), (64, 4), (16, 3)]);
    }

    #[test]
    fn kernels_have_the_same_tiers() {
        let kernels = include_str!("../kernels/plan.cuh");
        for plan in PLANS.iter().filter(|p| p.tiers.len() > 1) {
            let pairs: Vec<_> = plan.tiers.iter().map(|(sixteenths, bits)| format!("{sixteenths}, {bits}")).collect();
            let line = format!("DQ_TIERED_PLAN({}, {}, {});", plan.id, pairs.len(), pairs.join(", "));
            assert!(kernels.contains(&line), "plan.cuh lacks {line}");
        }
    }

    #[test]
    fn planes_never_overlap_and_fill_the_sections() {
        for n_kv in [1, 3, 8] {
            for d in HEAD_DIMS {
                for plan in PLANS {
                    let s = layer(n_kv, d, 64, plan.id, 3);
                    let mut end = 0;
                    for p in s.k.planes.iter().chain(&s.v.planes) {
                        assert_eq!(p.offset, end);
                        end += n_kv * p.head_bytes;
                    }
                    assert_eq!(end, s.k.headers_offset);
                    assert_eq!(s.k.headers_offset % 2, 0);
                    assert!(s.slot_bytes >= end + 4 * n_kv && s.slot_bytes % SLOT_ALIGN == 0);
                }
            }
        }
    }

    #[test]
    fn refusals_name_the_value_and_the_limit() {
        let side = SideDesc { head_dim: 64, plan: 4, gauge: Gauge::Rotation };
        let e = LayerShape::new(3, 2, side, side).unwrap_err();
        assert!(e.message.contains("n_q_heads is 3") && e.message.contains('2'));
        let e = LayerShape::new(2, 2, SideDesc { head_dim: 72, ..side }, side).unwrap_err();
        assert!(e.message.contains("head_dim_k is 72"));
        let e = LayerShape::new(2, 2, side, SideDesc { plan: 5, ..side }).unwrap_err();
        assert!(e.message.contains("v_plan is 5"));
    }
}
