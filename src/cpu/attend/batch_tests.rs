//! Uneven sequences over blocks of slots, windows and tails, against the f64 oracle.

use half::{bf16, f16};

use super::tests::{FLOOR, Kind, Random, TOLERANCE, empty_args, error, random_row, sets};
use super::*;
use crate::batch::{Batch, BlockTable, Sequences, Visible};
use crate::oracle;
use crate::shape::{Gauge, Side, SideDesc};
use crate::view::{DType, Rows, RowsMut, RowsShape};
use crate::workspace::size_of_pieces;

#[derive(Debug, Clone)]
struct Case {
    d: (usize, usize),
    heads: (usize, usize),
    plans: (u32, u32),
    block_slots: usize,
    /// (queries, coded keys, rows of the tail)
    sequences: Vec<(usize, usize, usize)>,
    causal: bool,
    window: Option<usize>,
    paged: bool,
    tail_type: DType,
    softcap: f32,
    sinks: bool,
}

impl Case {
    fn base(sequences: &[(usize, usize, usize)]) -> Self {
        Self {
            d: (64, 64),
            heads: (3, 2),
            plans: (104, 4),
            block_slots: 16,
            sequences: sequences.to_vec(),
            causal: true,
            window: None,
            paged: true,
            tail_type: DType::F32,
            softcap: 0.0,
            sinks: false,
        }
    }

    fn n_kv(&self) -> usize {
        self.sequences.iter().map(|s| s.1).max().unwrap()
    }
}

struct Fixture {
    case: Case,
    layer: LayerShape,
    factors: LayerFactors,
    store: Vec<u8>,
    q: Vec<f32>,
    starts: Vec<i32>,
    lengths: Vec<i32>,
    table: Vec<i32>,
    row: usize,
    tail_starts: Vec<i32>,
    tail_lengths: Vec<i32>,
    tail_k: Vec<u8>,
    tail_v: Vec<u8>,
    tail_rows: usize,
    sinks: Option<Vec<f32>>,
}

impl Fixture {
    fn new(case: &Case, seed: u64) -> Self {
        let mut random = Random(seed);
        let random = &mut random;
        let side = |head_dim, plan| SideDesc { head_dim, plan, gauge: Gauge::Rotation };
        let (k, v) = (side(case.d.0, case.plans.0), side(case.d.1, case.plans.1));
        let layer = LayerShape::new(case.heads.0 * case.heads.1, case.heads.1, k, v).unwrap();
        let mut factors = LayerFactors::new(&layer, 1);
        for head in 0..case.heads.1 {
            factors.k[head].sets = sets(random, case.d.0, Kind::Mixed, 1.0);
            factors.v[head].sets = sets(random, case.d.1, Kind::Mixed, 1.0);
        }

        // Garbage in all slots; blocks in random order; the first blocks of even sequences are shared.
        let n = case.sequences.len();
        let row = case.n_kv().div_ceil(case.block_slots) + 1;
        let mut free: Vec<i32> = (0..(n * row) as i32 + 3).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, random.below(i + 1));
        }
        let mut store = vec![0xFF; free.len() * case.block_slots * layer.slot_bytes];
        let mut table = vec![i32::MIN; n * row];
        for (s, &(n_q, n_kv, n_tail)) in case.sequences.iter().enumerate() {
            // Positions before this one are seen by no query.
            let seen = match case.window {
                _ if n_q == 0 => n_kv,
                Some(window) => (n_kv + n_tail + 1).saturating_sub(n_q + window),
                None => 0,
            };
            let records = |key: usize, table: &mut Vec<i32>, free: &mut Vec<i32>| -> usize {
                if !case.paged {
                    return s * case.n_kv() + key;
                }
                let block = &mut table[s * row + key / case.block_slots];
                if *block == i32::MIN {
                    *block = free.pop().unwrap();
                }
                *block as usize * case.block_slots + key % case.block_slots
            };
            let shared = if s > 0 && s % 2 == 0 && case.window.is_none() {
                n_kv.min(case.sequences[0].1) / case.block_slots / 2
            } else {
                0
            };
            for block in 0..shared {
                table[s * row + block] = table[block];
            }
            for key in seen.min(n_kv)..n_kv {
                let slot = records(key, &mut table, &mut free);
                let record = &mut store[slot * layer.slot_bytes..][..layer.slot_bytes];
                for (side, factors) in [(Side::K, &factors.k), (Side::V, &factors.v)] {
                    for (head, factors) in factors.iter().enumerate() {
                        let ids: Vec<u8> = factors.sets.iter().map(|(id, _)| id).collect();
                        let id = if key / 70 % 2 == 0 { ids[random.below(ids.len())] } else { 2 };
                        let scale = 0.5 + random.uniform();
                        random_row(random, layer.side(side), head, scale, id, record);
                    }
                }
            }
        }

        let tail_rows = case.sequences.iter().map(|s| s.2).max().unwrap();
        let total: usize = case.sequences.iter().map(|s| s.2 + 1).sum();
        let heads = case.heads.1;
        let mut tail = |d: usize| -> Vec<u8> {
            let mut bytes = Vec::new();
            for _ in 0..total * heads * d {
                put(&mut bytes, case.tail_type, random.normal());
            }
            bytes
        };
        let (mut tail_k, mut tail_v) = (tail(case.d.0), tail(case.d.1));
        // A row between tails that nobody sees holds NaN.
        let (mut starts, mut lengths, mut tail_starts, mut tail_lengths) = (vec![0], vec![], vec![], vec![]);
        let mut at = 0;
        for &(n_q, n_kv, n_tail) in &case.sequences {
            starts.push(starts.last().unwrap() + n_q as i32);
            lengths.push(n_kv as i32);
            tail_starts.push(at as i32);
            tail_lengths.push(n_tail as i32);
            at += n_tail + 1;
            let size = case.tail_type.size();
            for (bytes, d) in [(&mut tail_k, case.d.0), (&mut tail_v, case.d.1)] {
                bytes[(at - 1) * heads * d * size..at * heads * d * size].fill(0xFF);
            }
        }
        let tokens = *starts.last().unwrap() as usize;
        let n_heads = layer.n_q_heads;
        Self {
            q: (0..tokens * n_heads * case.d.0).map(|_| random.normal()).collect(),
            sinks: case.sinks.then(|| (0..n_heads).map(|_| random.normal() + 2.0).collect()),
            case: case.clone(),
            layer,
            factors,
            store,
            starts,
            lengths,
            table,
            row,
            tail_starts,
            tail_lengths,
            tail_k,
            tail_v,
            tail_rows,
        }
    }

    fn with<T>(&mut self, out: &mut [u8], run: impl FnOnce(&LayerShape, &LayerFactors, &AttendArgs) -> T) -> T {
        let case = &self.case;
        let rows = |d: usize, n_heads: usize, n_tokens: usize, dtype: DType| RowsShape {
            dtype,
            n_tokens,
            n_heads,
            head_dim: d,
            token_stride: n_heads * d * dtype.size(),
            head_stride: d * dtype.size(),
        };
        let tail_tokens = self.tail_starts.last().unwrap() + self.tail_lengths.last().unwrap();
        let tail = (self.tail_rows > 0).then(|| Tail {
            k: Rows::new(&self.tail_k, rows(case.d.0, case.heads.1, tail_tokens as usize, case.tail_type)).unwrap(),
            v: Rows::new(&self.tail_v, rows(case.d.1, case.heads.1, tail_tokens as usize, case.tail_type)).unwrap(),
            n_rows: self.tail_rows,
            starts: Some(&self.tail_starts),
            lengths: Some(&self.tail_lengths),
        });
        let n_q = case.sequences.iter().map(|s| s.0).max().unwrap();
        let tokens = *self.starts.last().unwrap() as usize;
        let n_slots = self.store.len() / self.layer.slot_bytes;
        // As many queries in each need no starts.
        let even = case.sequences.iter().all(|s| s.0 == n_q);
        let sequences = Sequences::new(Batch {
            q_starts: (!even).then_some(&self.starts),
            kv_lengths: &self.lengths,
            tail_lengths: tail.and_then(|t| t.lengths),
            tail_rows: self.tail_rows,
            table: case.paged.then_some(BlockTable {
                blocks: &self.table,
                stride: self.row,
                block_slots: case.block_slots,
            }),
            visible: Visible { causal: case.causal, window: case.window },
            n_tokens: tokens,
            n_q,
            n_kv: case.n_kv(),
            n_slots,
        })
        .unwrap();
        let args = AttendArgs {
            n_streams: case.sequences.len(),
            n_q,
            n_kv: case.n_kv(),
            stream_slots: if case.paged { 0 } else { case.n_kv() },
            q: Rows::from_f32(&self.q, self.layer.n_q_heads, case.d.0),
            out: RowsMut::new(out, rows(case.d.1, self.layer.n_q_heads, tokens, DType::F32)).unwrap(),
            sink_logits: self.sinks.as_deref(),
            softcap: case.softcap,
            sequences: Some(sequences),
            tail,
            ..empty_args(&self.layer, &mut self.store, &mut [])
        };
        run(&self.layer, &self.factors, &args)
    }

    fn run(&mut self, isa: Isa, n_shards: usize) -> Vec<f32> {
        let values = *self.starts.last().unwrap() as usize * self.layer.n_q_heads * self.case.d.1;
        let mut out = vec![0xA5u8; 4 * values];
        self.with(&mut out, |layer, factors, args| {
            let size = workspace_size(layer, &Limits::of(args)).unwrap();
            let rows = Cut::new(layer, args).partial_rows(args);
            assert!(size_of_pieces(|arena| lay(arena, rows, layer.v.head_dim)) <= size);
            let mut ws = vec![0x5Au8; size + 128];
            let start = ws.as_ptr().align_offset(64);
            let guard = start + size;
            let work = Workspace::new(&mut ws[start..guard]);
            for shard in (0..n_shards).rev() {
                attend_shard_on(isa, layer, factors, args, &work, shard, n_shards).unwrap();
            }
            for shard in 0..n_shards {
                attend_merge_shard(layer, factors, args, &work, shard, n_shards).unwrap();
            }
            assert!(ws[guard..].iter().all(|b| *b == 0x5A), "outside the workspace");
        });
        out.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

fn put(bytes: &mut Vec<u8>, dtype: DType, x: f32) {
    match dtype {
        DType::F32 => bytes.extend(x.to_le_bytes()),
        DType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
        DType::Bf16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
    }
}

fn check(name: &str, case: &Case, seed: u64) {
    let mut fixture = Fixture::new(case, seed);
    let values = *fixture.starts.last().unwrap() as usize * fixture.layer.n_q_heads * case.d.1;
    let truth = fixture.with(&mut vec![0; 4 * values], oracle::attend);
    let first = fixture.run(Isa::Portable, 1);
    // Windows of a few keys leave channels whose sum of p |v| nearly vanishes: no bound without the floor.
    let e = error(&truth, &first, case.d.1, FLOOR);
    assert!(e <= TOLERANCE, "{name}: error {e:.2e}: {case:?}");
    for isa in Isa::all() {
        for n_shards in [1, 2, 7, 40] {
            let again = fixture.run(isa, n_shards);
            let same = first.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}: {isa:?} with {n_shards} shards differs");
        }
    }
}

#[test]
fn block_sizes() {
    for block_slots in [1, 3, 16, 64, 100, 256] {
        let case = Case { block_slots, ..Case::base(&[(1, 333, 0), (2, 1, 0), (5, 64, 0), (1, 130, 0)]) };
        check(&format!("blocks of {block_slots}"), &case, 1);
    }
}

#[test]
fn windows_and_chunked_prefill() {
    for window in [None, Some(1), Some(17), Some(64), Some(200), Some(100_000)] {
        for paged in [true, false] {
            let case = Case { window, paged, ..Case::base(&[(40, 300, 0), (1, 700, 0), (130, 130, 0), (3, 90, 0)]) };
            check(&format!("window {window:?}, paged {paged}"), &case, 2);
        }
    }
}

#[test]
fn empty_sequences_and_queries_before_the_first_key() {
    let case = Case::base(&[(0, 50, 0), (3, 0, 0), (0, 0, 0), (9, 4, 0), (1, 33, 0)]);
    check("some empty", &case, 3);
    let mut fixture = Fixture::new(&case, 3);
    let out = fixture.run(Isa::detect(), 3);
    let token = fixture.layer.n_q_heads * case.d.1;
    // Three queries without keys, five before the first of four keys.
    assert!(out[..8 * token].iter().all(|x| *x == 0.0));
    assert!(out[8 * token..].chunks(token).all(|row| row.iter().any(|x| *x != 0.0)));
}

#[test]
fn every_key_visible() {
    check("all", &Case { causal: false, ..Case::base(&[(4, 100, 3), (1, 20, 0), (2, 0, 5)]) }, 4);
}

#[test]
fn tails() {
    for tail_type in [DType::F32, DType::F16, DType::Bf16] {
        for sequences in [
            vec![(1, 200, 7), (1, 0, 1), (1, 64, 0)],
            vec![(33, 300, 33), (64, 0, 64), (1, 10, 130)],
            vec![(5, 20, 2), (3, 0, 200)],
        ] {
            for (window, softcap, sinks) in [(None, 0.0, false), (Some(40), 15.0, true)] {
                let case = Case { tail_type, window, softcap, sinks, ..Case::base(&sequences) };
                check("tail", &case, 5);
            }
        }
    }
}

#[test]
fn a_long_sequence_among_short_ones() {
    let mut sequences = vec![(1, 40, 0); 20];
    sequences.push((1, 5000, 3));
    check("long", &Case { heads: (4, 1), ..Case::base(&sequences) }, 6);
}

#[test]
fn random_batches() {
    let mut random = Random(7);
    for round in 0..60 {
        let n = 1 + random.below(6);
        let sequences: Vec<_> = (0..n)
            .map(|_| {
                let n_q = [1, 1, random.below(50), random.below(5)][random.below(4)];
                (n_q, random.below(400), [0, random.below(9), random.below(90)][random.below(3)])
            })
            .collect();
        let dims = [64, 80, 96, 128, 192, 256];
        let case = Case {
            d: (dims[random.below(6)], dims[random.below(6)]),
            heads: (1 + random.below(5), 1 + random.below(3)),
            plans: ([2, 3, 4, 8, 102, 103, 104][random.below(7)], [2, 3, 4, 8][random.below(4)]),
            block_slots: 1 + random.below(40),
            causal: random.below(4) > 0,
            window: None,
            tail_type: [DType::F32, DType::F16, DType::Bf16][random.below(3)],
            softcap: [0.0, 20.0][random.below(2)],
            sinks: random.below(2) == 0,
            ..Case::base(&sequences)
        };
        let window = (case.causal && random.below(2) == 0).then(|| 1 + random.below(120));
        check(&format!("round {round}"), &Case { window, ..case }, 100 + round);
    }
}

#[test]
fn the_size_query_bounds_uneven_batches() {
    let mut random = Random(8);
    for (n_q_heads, n_kv_heads, d) in [(8, 8, 128), (9, 3, 64), (71, 1, 256)] {
        let side = SideDesc { head_dim: d, plan: 4, gauge: Gauge::Rotation };
        let layer = LayerShape::new(n_q_heads, n_kv_heads, side, side).unwrap();
        for _ in 0..500 {
            let n = 1 + random.below(40);
            let (mut starts, mut lengths, mut tails) = (vec![0], vec![], vec![]);
            for _ in 0..n {
                let n_q = if random.below(3) == 0 { random.below(300) } else { 1 };
                starts.push(starts.last().unwrap() + n_q as i32);
                lengths.push((random.below(100_000) >> random.below(12)) as i32);
                tails.push(random.below(3) as i32);
            }
            let n_tokens = *starts.last().unwrap() as usize;
            let (mut store, mut out) = (vec![0; layer.slot_bytes], vec![]);
            let rows = Rows::from_f32(&[], n_kv_heads, d);
            let sequences = Sequences::new(Batch {
                q_starts: Some(&starts),
                kv_lengths: &lengths,
                tail_lengths: Some(&tails),
                tail_rows: 2,
                table: None,
                visible: Visible { causal: true, window: None },
                n_tokens,
                n_q: 300,
                n_kv: 100_000,
                n_slots: 0,
            });
            let args = AttendArgs {
                n_streams: n,
                n_q: 300,
                n_kv: 100_000,
                sequences: Some(sequences.unwrap()),
                tail: Some(Tail { k: rows, v: rows, n_rows: 2, starts: None, lengths: Some(&tails) }),
                ..empty_args(&layer, &mut store, &mut out)
            };
            let size = workspace_size(&layer, &Limits::of(&args)).unwrap();
            let rows = Cut::new(&layer, &args).partial_rows(&args);
            let need = size_of_pieces(|arena| lay(arena, rows, d));
            assert!(need <= size, "{starts:?} {lengths:?}: {need} of {size}");
        }
    }
}
