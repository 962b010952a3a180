use super::*;
use crate::factor::fit::tests::{Normal, rows};
use crate::oracle;
use crate::shape::{Gauge, HEAD_DIMS, SideDesc};
use proptest::prelude::*;

const KV: usize = 2;

fn shape(d: usize, k_plan: u32, v_plan: u32) -> LayerShape {
    let side = |plan, gauge| SideDesc { head_dim: d, plan, gauge };
    LayerShape::new(2 * KV, KV, side(k_plan, Gauge::Attention), side(v_plan, Gauge::Centred)).unwrap()
}

/// `[n][KV][d]`: the two heads differ.
fn two_heads(n: usize, d: usize, offset: f64, seed: u64) -> Vec<f32> {
    let (a, b) = (rows(n, d, offset, seed), rows(n, d, -offset, seed + 1));
    let heads = a.chunks_exact(d).zip(b.chunks_exact(d));
    heads.flat_map(|(a, b)| a.iter().chain(b).copied().collect::<Vec<_>>()).collect()
}

struct Case {
    shape: LayerShape,
    factors: LayerFactors,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    /// Factors fitted on the very rows, as in a prefill.
    fn fitted(shape: LayerShape, k: Vec<f32>, v: Vec<f32>) -> Self {
        let factors = LayerFactors::new(&shape, 4);
        let d = shape.k.head_dim;
        for head in 0..KV {
            for (side, rows) in [(Side::K, &k), (Side::V, &v)] {
                let unit = &factors.side(side)[head];
                for row in rows.chunks_exact(KV * d) {
                    unit.observe(&row[head * d..(head + 1) * d], false);
                }
                if unit.is_fit_due() {
                    unit.refit();
                }
            }
        }
        Self { shape, factors, k, v }
    }

    fn encode(&self, isa: Isa, shards: usize, slots: &[i64], store: &mut [u8]) -> u64 {
        let (d, n) = (self.shape.k.head_dim, slots.len());
        let kv = Some((Rows::from_f32(&self.k, KV, d), Rows::from_f32(&self.v, KV, d)));
        let tokens = Tokens { n_tokens: n, q: None, kv, positions: None };
        let store = Store::new(store, self.shape.slot_bytes);
        (0..shards)
            .map(|i| encode_shard_on(isa, &self.shape, &self.factors, &tokens, slots, &store, i, shards).unwrap().replaced_rows)
            .sum()
    }

    fn store(&self, slots: usize) -> Vec<u8> {
        vec![0xCD; slots * self.shape.slot_bytes]
    }

    /// Squared error and squared size of one side's rows, by the oracle.
    fn loss(&self, side: Side, store: &[u8]) -> (f64, f64) {
        let d = self.shape.k.head_dim;
        let rows = if side == Side::K { &self.k } else { &self.v };
        let (mut lost, mut size) = (0.0, 0.0);
        for (record, row) in store.chunks_exact(self.shape.slot_bytes).zip(rows.chunks_exact(KV * d)) {
            for head in 0..KV {
                let back = oracle::decode_row(self.shape.side(side), &self.factors.side(side)[head].sets, head, record);
                for (x, y) in row[head * d..(head + 1) * d].iter().zip(back) {
                    lost += (f64::from(*x) - y).powi(2);
                    size += f64::from(*x).powi(2);
                }
            }
        }
        (lost, size)
    }
}

fn identity_slots(n: usize) -> Vec<i64> {
    (0..n as i64).collect()
}

/// What is left of white rows is the distortion D of the code, D / (1 - D) at the length that makes it unbiased: the tables,
/// the header and the order of channels agree.
#[test]
fn white_rows_lose_what_the_codebook_says() {
    for d in HEAD_DIMS {
        for (plan, distortion) in [(2, 0.1175), (3, 0.0345), (4, 0.0095), (8, 1.2e-4)] {
            let share = distortion / (1.0 - distortion);
            let mut noise = Normal::new(d as u64);
            let mut white = || (0..200 * KV * d).map(|_| noise.next() as f32).collect::<Vec<_>>();
            let case = Case { shape: shape(d, plan, plan), factors: LayerFactors::new(&shape(d, plan, plan), 4), k: white(), v: white() };
            let mut store = case.store(200);
            assert_eq!(case.encode(Isa::detect(), 1, &identity_slots(200), &mut store), 0);
            for side in [Side::K, Side::V] {
                let (lost, size) = case.loss(side, &store);
                assert!(lost / size < share * 1.05 && lost / size > share * 0.25, "{plan} bits, {d}: {}", lost / size);
            }
        }
    }
}

/// Errors that pull all rows towards their mean would not average out in attention. Latent by latent, tier by tier: coded
/// rows are as long as the rows themselves.
#[test]
fn coded_rows_are_unbiased() {
    for d in [64, 80, 256] {
        let n = 600;
        for (k_plan, v_plan) in [(2, 2), (3, 3), (4, 4), (102, 2), (103, 3), (104, 4)] {
            let case = Case::fitted(shape(d, k_plan, v_plan), two_heads(n, d, 20.0, 1), two_heads(n, d, 1.0, 2));
            let mut store = case.store(n);
            case.encode(Isa::detect(), 1, &identity_slots(n), &mut store);
            for (side, rows) in [(Side::K, &case.k), (Side::V, &case.v)] {
                let sets = &case.factors.side(side)[0].sets;
                let encode = sets.encode();
                let mean = &sets.get(encode.set).unwrap().mean;
                let latents = |x: &dyn Fn(usize) -> f64| -> Vec<f64> {
                    let centred: Vec<f64> = (0..d).map(|i| x(i) - mean[i].to_f64()).collect();
                    match &encode.matrix {
                        Some(m) => (0..d).map(|j| (0..d).map(|i| centred[i] * f64::from(m[i * d + j])).sum()).collect(),
                        None => centred,
                    }
                };
                let (mut along, mut size) = ([0.0; MAX_TIERS], [0.0; MAX_TIERS]);
                for (record, row) in store.chunks_exact(case.shape.slot_bytes).zip(rows.chunks_exact(KV * d)) {
                    let back = oracle::decode_row(case.shape.side(side), sets, 0, record);
                    let (y, coded) = (latents(&|i| f64::from(row[i])), latents(&|i| back[i]));
                    for (t, tier) in case.shape.side(side).plan.tiers.iter().enumerate() {
                        for j in tier.first..tier.first + tier.channels {
                            along[t] += coded[j] * y[j];
                            size[t] += y[j] * y[j];
                        }
                    }
                }
                // Tiers share a scale, so that only together, as the scores weigh them, they are as long as they were.
                let kappa = sets.get(encode.set).unwrap().kappa;
                let weighted = |of: [f64; MAX_TIERS]| of.iter().zip(kappa).map(|(x, k)| x * f64::from(k)).sum::<f64>();
                let length = weighted(along) / weighted(size);
                assert!((length - 1.0).abs() < 0.002, "head_dim {d}, {side:?}, plans {k_plan} and {v_plan}: {length}");
            }
        }
    }
}

#[test]
fn the_same_bytes_on_every_path_and_for_every_shard_count() {
    for d in HEAD_DIMS {
        for plan in [2, 3, 4, 8, 102, 103, 104] {
            let n = 75;
            let case = Case::fitted(shape(d, plan, 3), two_heads(n, d, 20.0, 1), two_heads(n, d, 1.0, 5));
            let slots: Vec<i64> = (0..n as i64).map(|t| if t % 9 == 4 { -1 } else { (t * 33) % 76 }).collect();
            let mut first = case.store(76);
            case.encode(Isa::Portable, 1, &slots, &mut first);
            for (isa, shards) in Isa::all().flat_map(|isa| [1, 2, 3, 64, 200].map(|n| (isa, n))) {
                let mut store = case.store(76);
                case.encode(isa, shards, &slots, &mut store);
                assert!(store == first, "{isa:?}, {shards} shards, plan {plan}, head_dim {d}");
            }
        }
    }
}

#[test]
fn slots_that_are_not_named_stay() {
    let case = Case::fitted(shape(64, 4, 4), two_heads(3, 64, 1.0, 1), two_heads(3, 64, 1.0, 2));
    let mut store = case.store(5);
    case.encode(Isa::detect(), 1, &[4, -1, 1], &mut store);
    let bytes = case.shape.slot_bytes;
    for slot in [0, 2, 3] {
        assert!(store[slot * bytes..(slot + 1) * bytes].iter().all(|b| *b == 0xCD));
    }
    // 2 heads: 128 + 8 header bytes, then 8 bytes of padding.
    assert_eq!(store[4 * bytes + 136..5 * bytes], [0; 8]);
}

#[test]
fn rows_with_nan_or_infinity_become_zero_rows_and_spoil_nothing() {
    let d = 64;
    let clean = Case::fitted(shape(d, 104, 4), two_heads(40, d, 20.0, 1), two_heads(40, d, 1.0, 2));
    let mut expected = clean.store(40);
    clean.encode(Isa::detect(), 1, &identity_slots(40), &mut expected);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut case = Case { k: clean.k.clone(), v: clean.v.clone(), factors: LayerFactors::new(&clean.shape, 4), shape: clean.shape.clone() };
        case.factors = Case::fitted(clean.shape.clone(), clean.k.clone(), clean.v.clone()).factors;
        case.k[7 * KV * d + 3] = bad;
        let mut store = case.store(40);
        assert_eq!(case.encode(Isa::detect(), 1, &identity_slots(40), &mut store), 1);
        let bytes = case.shape.slot_bytes;
        for slot in 0..40 {
            let (a, b) = (&store[slot * bytes..][..bytes], &expected[slot * bytes..][..bytes]);
            assert_eq!(a == b, slot != 7, "slot {slot}");
        }
        let row = oracle::decode_row(&case.shape.k, &case.factors.k[0].sets, 0, &store[7 * bytes..][..bytes]);
        assert!(row.iter().all(|x| *x == 0.0));
        let header = u16::from_le_bytes(store[7 * bytes + case.shape.k.headers_offset..][..2].try_into().unwrap());
        assert_eq!(header, 0);
    }
}

#[test]
fn one_huge_row_takes_the_rotation_and_keeps_its_size() {
    let d = 128;
    let mut case = Case::fitted(shape(d, 4, 4), two_heads(64, d, 20.0, 1), two_heads(64, d, 1.0, 2));
    case.k.truncate(KV * d);
    case.v.truncate(KV * d);
    case.k.fill(6e4);
    case.v.fill(0.0);
    let mut store = case.store(1);
    assert_eq!(case.encode(Isa::detect(), 1, &[0], &mut store), 0);
    let (lost, size) = case.loss(Side::K, &store);
    assert!(lost / size < 0.02, "{}", lost / size);
    assert_eq!(case.loss(Side::V, &store).0, 0.0);
    case.k.fill(1e30);
    assert_eq!(case.encode(Isa::detect(), 1, &[0], &mut store), KV as u64);
    let header = u16::from_le_bytes(store[case.shape.k.headers_offset..][..2].try_into().unwrap());
    assert_eq!(header::scale(header), 65_280.0);
}

#[test]
fn a_sink_row_takes_its_sink_and_codes_to_itself() {
    let d = 64;
    let case = Case::fitted(shape(d, 104, 4), two_heads(64, d, 20.0, 1), two_heads(64, d, 1.0, 2));
    let sink: Vec<f32> = (0..d).map(|i| if i % 7 == 0 { 300.0 } else { -5.0 }).collect();
    for head in 0..KV {
        case.factors.k[head].sets.push_sink(crate::factor::FactorSet::rotation(sink.iter().map(|x| f16::from_f32(*x)).collect()));
    }
    let case = Case { k: [sink.clone(), sink.clone()].concat(), v: vec![0.5; KV * d], ..case };
    let mut store = case.store(1);
    case.encode(Isa::detect(), 1, &[0], &mut store);
    assert_eq!(case.loss(Side::K, &store).0, 0.0);
}

/// Keys with a steep spectrum: what the scores lose falls with the fit, and again with tiers at the same size.
#[test]
fn fits_and_tiers_lower_the_error_of_the_scores() {
    for d in [64, 128, 256] {
        let n = 512;
        let error = |plan: u32, gauge: Gauge| -> f64 {
            let side = |plan, gauge| SideDesc { head_dim: d, plan, gauge };
            let shape = LayerShape::new(2 * KV, KV, side(plan, gauge), side(4, Gauge::Centred)).unwrap();
            let case = Case::fitted(shape, two_heads(n, d, 20.0, 1), two_heads(n, d, 1.0, 2));
            let mut store = case.store(n);
            case.encode(Isa::detect(), 1, &identity_slots(n), &mut store);
            // White queries: the score error is the row error.
            case.loss(Side::K, &store).0
        };
        let (plain, fitted, tiers) = (error(4, Gauge::Rotation), error(4, Gauge::Attention), error(104, Gauge::Attention));
        assert!(fitted < plain / 2.0, "head_dim {d}: {fitted} against {plain}");
        assert!(tiers < fitted * 0.9, "head_dim {d}: {tiers} against {fitted}");
    }
}

proptest! {
    /// Any bit patterns: nothing panics, every byte of the record is written, and what comes back is finite.
    #[test]
    fn any_row_is_coded(bits in prop::collection::vec(any::<u32>(), KV * 64), plan in prop::sample::select(vec![2u32, 3, 4, 8, 102, 103, 104])) {
        let row: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b)).collect();
        let mut case = Case::fitted(shape(64, plan, 4), two_heads(64, 64, 20.0, 1), two_heads(64, 64, 1.0, 2));
        case.k = row.clone();
        case.v = row;
        let (mut a, mut b) = (vec![0; case.shape.slot_bytes], vec![0xFF; case.shape.slot_bytes]);
        case.encode(Isa::detect(), 1, &[0], &mut a);
        case.encode(Isa::Portable, 1, &[0], &mut b);
        prop_assert_eq!(&a, &b);
        let back = oracle::decode_row(&case.shape.k, &case.factors.k[1].sets, 1, &a);
        prop_assert!(back.iter().all(|x| x.is_finite()));
    }
}
