//! Attention against the f64 oracle: random and hostile rows, every width and head_dim, masks, streams, shards, paths.

use half::f16;
use std::sync::Arc;

use super::*;
use crate::code::{header, planes};
use crate::factor::{FactorSet, HeadSets};
use crate::oracle;
use crate::shape::{Gauge, HEAD_DIMS, Side, SideDesc, SideShape};
use crate::view::{DType, Mask, Rows, RowsMut, RowsShape, Store};
use crate::workspace::size_of_pieces;

/// Error allowed, of the sum of p |v|.
pub(super) const TOLERANCE: f64 = 1e-3;
pub(super) const FLOOR: f64 = 0.25;
/// Queries are folded to integers.
const STRICT: f64 = 1e-2;

pub(super) struct Random(pub u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        xxhash_rust::xxh3::xxh3_64(&self.0.to_le_bytes())
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(super) fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Near enough to normal.
    pub(super) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

/// How a test's rows look.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    /// Set 0 only.
    Rotation,
    /// One dense set.
    Dense,
    /// Six sets over three transforms, changing from row to row.
    Mixed,
    /// Steep spectrum, means of 100.
    Steep,
    /// Zero rows, and one of 6e4.
    Extreme,
}

#[derive(Clone)]
struct Case {
    d: (usize, usize),
    plans: (u32, u32),
    heads: (usize, usize),
    kind: Kind,
    n_streams: usize,
    n_q: usize,
    n_kv: usize,
    mask: &'static str,
    softcap: f32,
    sinks: bool,
}

impl Case {
    const BASE: Self = Self {
        d: (64, 64),
        plans: (4, 4),
        heads: (3, 1),
        kind: Kind::Mixed,
        n_streams: 1,
        n_q: 1,
        n_kv: 200,
        mask: "none",
        softcap: 0.0,
        sinks: false,
    };
}

/// Everything a call needs, owned.
struct Fixture {
    case: Case,
    layer: LayerShape,
    factors: LayerFactors,
    store: Vec<u8>,
    q: Vec<f32>,
    mask: Option<Vec<u8>>,
    mask_type: MaskType,
    sinks: Option<Vec<f32>>,
    first_slot: usize,
    stream_slots: usize,
}

pub(super) fn sets(random: &mut Random, d: usize, kind: Kind, channels_of_mean: f32) -> HeadSets {
    let sets = HeadSets::rotation_only(d);
    let halves = |values: Vec<f32>| -> Box<[f16]> { values.into_iter().map(f16::from_f32).collect() };
    let mean = |random: &mut Random| halves((0..d).map(|_| channels_of_mean * random.normal()).collect());
    let dense = |random: &mut Random| {
        // A random matrix of columns of length one, falling in size for the steep spectrum.
        let fall = if kind == Kind::Steep { 100f32.powf(-1.0 / d as f32) } else { 1.0 };
        let decode = (0..d * d).map(|i| random.normal() / (d as f32).sqrt() * fall.powi((i % d) as i32)).collect();
        FactorSet::dense(mean(random), halves(decode), crate::factor::ROTATION_KAPPA)
    };
    match kind {
        Kind::Rotation | Kind::Extreme => {}
        Kind::Dense | Kind::Steep => {
            sets.push_fit(dense(random), None).unwrap();
        }
        Kind::Mixed => {
            let (a, b) = (dense(random), dense(random));
            let moved = |set: &FactorSet, by: f32| {
                let mean = halves(set.mean.iter().map(|m| m.to_f32() + by).collect());
                FactorSet { mean, hash: set.hash + 1, transform: Arc::clone(&set.transform), ..*set }
            };
            let sinks = [moved(&a, 3.0), moved(&b, -2.0)];
            sets.push_fit(a, None).unwrap();
            sets.push_fit(b, None).unwrap();
            for sink in sinks {
                sets.push_sink(sink).unwrap();
            }
            sets.push_import(FactorSet::rotation(mean(random))).unwrap();
        }
    }
    sets
}

/// Random codes in a record.
pub(super) fn random_row(random: &mut Random, shape: &SideShape, head: usize, scale: f32, id: u8, record: &mut [u8]) {
    let codes: Vec<u8> = (0..shape.head_dim)
        .map(|j| {
            let bits = shape.plan.tiers.iter().find(|t| j < t.first + t.channels).unwrap().bits;
            let code = random.next() >> (64 - bits);
            if bits == 8 { code.max(1) as u8 } else { code as u8 }
        })
        .collect();
    planes::pack(&shape.planes, head, &codes, record);
    let at = shape.headers_offset + 2 * head;
    record[at..at + 2].copy_from_slice(&header::pack(scale, id).0.to_le_bytes());
}

impl Fixture {
    fn new(case: &Case) -> Self {
        let mut random = Random(case.n_kv as u64 * 7 + case.n_q as u64);
        let random = &mut random;
        let side = |head_dim, plan| SideDesc { head_dim, plan, gauge: Gauge::Rotation };
        let (k, v) = (side(case.d.0, case.plans.0), side(case.d.1, case.plans.1));
        let layer = LayerShape::new(case.heads.0 * case.heads.1, case.heads.1, k, v).unwrap();
        let mut factors = LayerFactors::new(&layer, 1);
        let offset = if case.kind == Kind::Steep { 100.0 } else { 1.0 };
        for head in 0..case.heads.1 {
            factors.k[head].sets = sets(random, case.d.0, case.kind, offset);
            factors.v[head].sets = sets(random, case.d.1, case.kind, offset);
        }

        // Garbage everywhere, then records in the slots of the streams.
        let (first_slot, stream_slots) = (3, case.n_kv + 2);
        let slots = first_slot + case.n_streams * stream_slots + 1;
        let mut store = vec![0xEE; slots * layer.slot_bytes];
        for slot in 0..slots {
            let record = &mut store[slot * layer.slot_bytes..(slot + 1) * layer.slot_bytes];
            for side in [Side::K, Side::V] {
                let shape = layer.side(side);
                for head in 0..case.heads.1 {
                    let sets = &factors.side(side)[head].sets;
                    let ids: Vec<u8> = sets.iter().map(|(id, _)| id).collect();
                    let id = match case.kind {
                        Kind::Dense | Kind::Steep => 1,
                        // Runs of one set, so that plain tiles come up as well.
                        Kind::Mixed if slot / 70 % 2 == 0 => ids[random.below(ids.len())],
                        Kind::Mixed => 2,
                        _ => 0,
                    };
                    let mut scale = 0.5 + random.uniform();
                    if case.kind == Kind::Extreme {
                        scale = [scale, 0.0, 6e4][if slot == first_slot + 5 { 2 } else { slot % 2 }];
                    }
                    random_row(random, shape, head, scale, id, record);
                }
            }
        }

        let q = (0..case.n_streams * case.n_q * layer.n_q_heads * case.d.0).map(|_| random.normal()).collect();
        let sinks = case.sinks.then(|| (0..layer.n_q_heads).map(|_| random.normal() + 3.0).collect());
        let mut out = Self {
            case: case.clone(),
            layer,
            factors,
            store,
            q,
            mask: None,
            mask_type: if case.n_q % 2 == 1 { MaskType::F32 } else { MaskType::F16 },
            sinks,
            first_slot,
            stream_slots,
        };
        out.make_mask(random);
        out
    }

    /// The mask, and garbage in the slots that it hides from all.
    fn make_mask(&mut self, random: &mut Random) {
        let Case { n_streams, n_q, n_kv, mask: kind, .. } = self.case;
        if kind == "none" {
            return;
        }
        let hidden = f32::NEG_INFINITY;
        let mut bytes = Vec::new();
        let holes: Vec<bool> = (0..n_kv).map(|_| random.below(3) == 0).collect();
        for stream in 0..n_streams {
            let mut seen = vec![false; n_kv];
            for query in 0..n_q {
                for (key, seen) in seen.iter_mut().enumerate() {
                    let last = n_kv - n_q + query;
                    let value = match kind {
                        "causal" => if key <= last { 0.0 } else { hidden },
                        "window" => if key <= last && key + 40 > last { 0.0 } else { hidden },
                        "holes" => if holes[key] || key > last { hidden } else { 0.0 },
                        "random" => if random.below(4) == 0 { hidden } else { random.normal() },
                        "blind" => if query % 2 == 0 || key > 150 { hidden } else { 0.0 },
                        _ => 0.0,
                    };
                    *seen |= value > hidden;
                    match self.mask_type {
                        MaskType::F32 => bytes.extend(value.to_le_bytes()),
                        MaskType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                    }
                }
            }
            for (key, seen) in seen.iter().enumerate() {
                if !seen {
                    let at = (self.first_slot + stream * self.stream_slots + key) * self.layer.slot_bytes;
                    let fill = [0xFF, 0x7E, random.next() as u8][key % 3];
                    self.store[at..at + self.layer.slot_bytes].fill(fill);
                }
            }
        }
        self.mask = Some(bytes);
    }

    fn with<T>(&mut self, out: &mut [u8], dtype: DType, run: impl FnOnce(&LayerShape, &LayerFactors, &AttendArgs) -> T) -> T {
        let Case { n_streams, n_q, n_kv, d, .. } = self.case;
        let n_heads = self.layer.n_q_heads;
        let size = if self.mask_type == MaskType::F32 { 4 } else { 2 };
        let row = d.1 * dtype.size();
        let shape = RowsShape {
            dtype,
            n_tokens: n_streams * n_q,
            n_heads,
            head_dim: d.1,
            token_stride: n_heads * row,
            head_stride: row,
        };
        let args = AttendArgs {
            n_streams,
            n_q,
            n_kv,
            first_slot: self.first_slot,
            stream_slots: self.stream_slots,
            store: Store::new(&mut self.store, self.layer.slot_bytes),
            q: Rows::from_f32(&self.q, n_heads, d.0),
            out: RowsMut::new(out, shape).unwrap(),
            mask: self.mask.as_ref().map(|bytes| Mask {
                bytes,
                dtype: self.mask_type,
                query_stride: n_kv * size,
                stream_stride: n_q * n_kv * size,
            }),
            sink_logits: self.sinks.as_deref(),
            scale: 1.0 / (d.0 as f32).sqrt(),
            softcap: self.case.softcap,
            sequences: None,
            tail: None,
        };
        run(&self.layer, &self.factors, &args)
    }

    /// Runs all shards, then the merge, between guard bands.
    fn run(&mut self, isa: Isa, n_shards: usize) -> Vec<f32> {
        let Case { n_streams, n_q, n_kv, d, .. } = self.case;
        let values = n_streams * n_q * self.layer.n_q_heads * d.1;
        let size = workspace_size(&self.layer, &Limits::even(n_streams, n_q, n_kv)).unwrap();
        const GUARD: usize = 256;
        let mut out = vec![0xA5u8; GUARD + 4 * values + GUARD];
        let mut ws = vec![0x5Au8; GUARD + size + 64 + GUARD];
        let start = GUARD + ws[GUARD..].as_ptr().align_offset(64);
        self.with(&mut out[GUARD..GUARD + 4 * values], DType::F32, |layer, factors, args| {
            let ws = Workspace::new(&mut ws[start..start + size]);
            for shard in (0..n_shards).rev() {
                attend_shard_on(isa, layer, factors, args, &ws, shard, n_shards).unwrap();
            }
            for shard in 0..n_shards {
                attend_merge_shard(layer, factors, args, &ws, shard, n_shards).unwrap();
            }
        });
        assert!(out[..GUARD].iter().chain(&out[GUARD + 4 * values..]).all(|b| *b == 0xA5), "outside out");
        assert!(ws[..start].iter().chain(&ws[start + size..]).all(|b| *b == 0x5A), "outside the workspace");
        out[GUARD..GUARD + 4 * values].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    fn truth(&mut self) -> oracle::Truth {
        let values = self.case.n_streams * self.case.n_q * self.layer.n_q_heads * self.case.d.1;
        self.with(&mut vec![0; 4 * values], DType::F32, oracle::attend)
    }
}

/// Largest error as a share of the sum of p |v|, of which `floor` times the row's mean is the least that counts.
///
/// The transform spreads a row's rounding over all channels. Where one key takes nearly all of the softmax and its value
/// happens to vanish in a channel, that channel's own sum says little about the arithmetic: [`TOLERANCE`] holds with a
/// floor of a quarter, [`STRICT`] without any.
pub(super) fn error(truth: &oracle::Truth, got: &[f32], d_v: usize, floor: f64) -> f64 {
    let mut worst = 0.0f64;
    for (i, ((want, size), got)) in truth.out.iter().zip(&truth.size).zip(got).enumerate() {
        let row = &truth.size[i / d_v * d_v..][..d_v];
        let size = size.max(row.iter().sum::<f64>() / d_v as f64 * floor);
        let e = (want - f64::from(*got)).abs();
        worst = worst.max(if size > 0.0 { e / size } else if e > 0.0 { f64::INFINITY } else { 0.0 });
        if !e.is_finite() {
            return f64::INFINITY;
        }
    }
    worst
}

fn check_case(name: &str, case: &Case) {
    let mut fixture = Fixture::new(case);
    let truth = fixture.truth();
    let first = fixture.run(Isa::Portable, 1);
    let (e, strict) = (error(&truth, &first, case.d.1, FLOOR), error(&truth, &first, case.d.1, 0.0));
    println!("{name}: {e:.2e}, strictly {strict:.2e}");
    assert!(e <= TOLERANCE && strict <= STRICT, "{name}: error {e:.2e}, strictly {strict:.2e}");
    for isa in Isa::all() {
        for n_shards in [1, 2, 3, 7] {
            let again = fixture.run(isa, n_shards);
            let same = first.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}: {isa:?} with {n_shards} shards differs, error {:.2e}", error(&truth, &again, case.d.1, FLOOR));
        }
    }
}

#[test]
fn every_width_and_head_dim() {
    for (i, d_k) in HEAD_DIMS.into_iter().enumerate() {
        const PLANS: [u32; 7] = [2, 3, 4, 8, 102, 103, 104];
        for (j, plan) in PLANS.into_iter().enumerate() {
            let (d_v, v_plan) = (HEAD_DIMS[(i + j) % 6], PLANS[(2 * i + j) % 7]);
            for kind in [Kind::Rotation, Kind::Dense, Kind::Mixed] {
                let case = Case { d: (d_k, d_v), plans: (plan, v_plan), kind, n_kv: 150, n_q: 2, ..Case::BASE };
                check_case(&format!("d {d_k}, {d_v}, plans {plan}, {v_plan}"), &case);
            }
        }
    }
}

/// Blocks of many rows, which have code of their own: counts that sixteen does not divide, tiles of keys of every length.
#[test]
fn many_rows() {
    for (i, d_k) in HEAD_DIMS.into_iter().enumerate() {
        for (j, plan) in [2, 3, 4, 8, 102, 103, 104].into_iter().enumerate() {
            let case = Case {
                d: (d_k, HEAD_DIMS[(i + 2 * j) % 6]),
                plans: (plan, [4, 2, 8, 3, 103, 4, 104][(i + j) % 7]),
                heads: ([1, 2, 3, 5, 8][(i + j) % 5], 1),
                kind: [Kind::Dense, Kind::Rotation, Kind::Mixed, Kind::Steep][(i + j) % 4],
                n_q: [8, 9, 17, 33, 50, 23, 16][j],
                n_kv: [64, 100, 120, 150, 180, 300, 56][(i + j) % 7],
                mask: ["none", "causal", "holes", "random"][j % 4],
                softcap: if (i + j) % 6 == 5 { 20.0 } else { 0.0 },
                ..Case::BASE
            };
            check_case(&format!("{} queries, d {:?}, plans {:?}, {} keys", case.n_q, case.d, case.plans, case.n_kv), &case);
        }
    }
}

#[test]
fn hostile_rows() {
    for kind in [Kind::Steep, Kind::Extreme] {
        for plan in [2, 3, 4, 8, 103, 104] {
            for n_kv in [1, 5, 64, 130] {
                let case = Case { plans: (plan, plan), kind, n_kv, ..Case::BASE };
                check_case(&format!("hostile, plan {plan}, {n_kv} keys"), &case);
            }
        }
    }
}

#[test]
fn groups_and_heads() {
    for group in [1, 3, 4, 5, 7, 8, 50] {
        for n_kv_heads in [1, 2] {
            check_case(&format!("group {group}"), &Case { heads: (group, n_kv_heads), n_q: 3, ..Case::BASE });
        }
    }
}

#[test]
fn masks() {
    for mask in ["causal", "window", "holes", "random", "blind", "zeros"] {
        for n_q in [1, 2, 17, 40] {
            let case = Case { mask, n_q, n_kv: 333, heads: (2, 2), ..Case::BASE };
            check_case(&format!("mask {mask}, {n_q} queries"), &case);
        }
    }
}

#[test]
fn key_counts_and_chunks() {
    for n_kv in [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 600, 1500] {
        check_case(&format!("{n_kv} keys"), &Case { n_kv, sinks: true, mask: "causal", ..Case::BASE });
    }
}

#[test]
fn softcap_and_sinks() {
    for softcap in [0.0, 2.0, 30.0] {
        for sinks in [false, true] {
            let case = Case { softcap, sinks, n_q: 5, mask: "blind", kind: Kind::Dense, ..Case::BASE };
            check_case(&format!("cap {softcap}, sinks {sinks}"), &case);
        }
    }
}

#[test]
fn streams() {
    for (n_streams, n_q, mask) in [(2, 1, "none"), (3, 4, "causal"), (4, 2, "random")] {
        check_case(&format!("{n_streams} streams"), &Case { n_streams, n_q, mask, n_kv: 300, ..Case::BASE });
    }
}

#[test]
fn a_query_that_sees_nothing_yields_zeros() {
    let mut fixture = Fixture::new(&Case { mask: "blind", n_q: 3, sinks: true, ..Case::BASE });
    let out = fixture.run(Isa::detect(), 2);
    let row = 3 * 64;
    assert!(out[..row].iter().all(|x| *x == 0.0) && out[row..2 * row].iter().any(|x| *x != 0.0));
}

#[test]
fn nan_and_infinity_reach_their_query_and_no_other() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for in_mask in [false, true] {
            let mut fixture = Fixture::new(&Case { n_q: 3, mask: "causal", n_kv: 300, ..Case::BASE });
            let row = 3 * 64;
            let isa = Isa::detect();
            let clean = fixture.run(isa, 1);
            if !in_mask {
                fixture.q[row + 5] = bad;
            } else if bad.is_nan() {
                // [query][key] in f32.
                fixture.mask.as_mut().unwrap()[4 * (300 + 20)..][..4].copy_from_slice(&bad.to_le_bytes());
            } else {
                continue;
            }
            for isa in Isa::all() {
                let out = fixture.run(isa, 2);
                // The value 5 belongs to the query's first head.
                assert!(out[row..row + 64].iter().all(|x| x.is_nan()), "{bad} {in_mask}");
                assert!(out[..row].iter().chain(&out[2 * row..]).eq(clean[..row].iter().chain(&clean[2 * row..])));
            }
        }
    }
}

#[test]
fn garbage_in_visible_rows_does_no_harm() {
    let mut fixture = Fixture::new(&Case { n_q: 4, ..Case::BASE });
    let mut random = Random(1);
    fixture.store.iter_mut().for_each(|b| *b = random.next() as u8);
    for isa in Isa::all() {
        let _ = fixture.run(isa, 2);
    }
}

#[test]
fn a_short_workspace_is_refused_and_nothing_written() {
    let mut fixture = Fixture::new(&Case { n_kv: 1000, ..Case::BASE });
    let mut out = vec![0xA5; 4 * 3 * 64];
    let rows = fixture.with(&mut out, DType::F32, |layer, _, args| Cut::new(layer, args).partial_rows(args));
    let size = size_of_pieces(|arena| lay(arena, rows, 64));
    let mut ws = vec![0x5Au8; size + 64];
    fixture.with(&mut out, DType::F32, |layer, factors, args| {
        let start = ws.as_ptr().align_offset(64);
        let short = Workspace::new(&mut ws[start..start + size - 1]);
        assert!(attend(layer, factors, args, &short).is_err());
        assert!(attend(layer, factors, args, &Workspace::new(&mut ws[start..start + size])).is_ok());
    });
}

#[test]
fn the_size_query_bounds_every_cut() {
    let side = SideDesc { head_dim: 128, plan: 3, gauge: Gauge::Rotation };
    for (n_q_heads, n_kv_heads) in [(8, 8), (9, 3), (32, 1), (71, 1)] {
        let layer = LayerShape::new(n_q_heads, n_kv_heads, side, side).unwrap();
        let size = workspace_size(&layer, &Limits::even(4, 100, 5000)).unwrap();
        let (mut store, mut out) = (vec![0; layer.slot_bytes], vec![]);
        for n_streams in 1..=4 {
            for n_q in 1..=100 {
                for n_kv in [0, 1, 100, 511, 512, 513, 1025, 3000, 4999, 5000] {
                    let args = AttendArgs {
                        n_streams,
                        n_q,
                        n_kv,
                        ..empty_args(&layer, &mut store, &mut out)
                    };
                    let rows = Cut::new(&layer, &args).partial_rows(&args);
                    let need = size_of_pieces(|arena| lay(arena, rows, 128));
                    assert!(need <= size, "{n_streams} streams, {n_q} queries, {n_kv} keys: {need} of {size}");
                }
            }
        }
    }
}

/// A call of no queries, for what depends on counts alone.
pub(super) fn empty_args<'a>(layer: &LayerShape, store: &'a mut [u8], out: &'a mut [u8]) -> AttendArgs<'a> {
    let shape = RowsShape {
        dtype: DType::F32,
        n_tokens: 0,
        n_heads: layer.n_q_heads,
        head_dim: layer.v.head_dim,
        token_stride: 0,
        head_stride: 0,
    };
    AttendArgs {
        n_streams: 1,
        n_q: 0,
        n_kv: 0,
        first_slot: 0,
        stream_slots: 0,
        store: Store::new(store, layer.slot_bytes),
        q: Rows::from_f32(&[], layer.n_q_heads, layer.k.head_dim),
        out: RowsMut::new(out, shape).unwrap(),
        mask: None,
        sink_logits: None,
        scale: 1.0 / (layer.k.head_dim as f32).sqrt(),
        softcap: 0.0,
        sequences: None,
        tail: None,
    }
}
