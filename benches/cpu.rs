//! The CPU's calls: time, record bytes a second, and the latter as a share of a plain copy's on this machine.
//!
//!     cargo bench --bench cpu                          a few cases of each call
//!     cargo bench --bench cpu -- 'decode/d128'         those whose name has it
//!     DECOQUANT_BENCH=all cargo bench --bench cpu      every context, head_dim, group and width
//!
//! One thread, the default gauges: keys in a fitted set, values in the rotation. Names say
//! `call/d HEAD_DIM/KV HEADS x GROUP/PLAN OF K-PLAN OF V/KEYS`.

use criterion::{BenchmarkId, Criterion, Throughput};
use decoquant::code::{header, planes};
use decoquant::cpu::attend::{Limits, attend, workspace_size};
use decoquant::cpu::{dequantize::dequantize, encode::encode_shard};
use decoquant::factor::fit::{FitInput, fit, round_mean};
use decoquant::factor::{FactorSet, LayerFactors, Moments, ROTATION_KAPPA};
use decoquant::shape::{Gauge, LayerShape, Side, SideDesc};
use decoquant::view::{AttendArgs, DType, Rows, RowsMut, RowsShape, Store, Tokens};
use decoquant::workspace::Workspace;
use half::f16;
use std::hint::black_box;
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy)]
struct Case {
    d: usize,
    heads: usize,
    group: usize,
    plans: (u32, u32),
    n_kv: usize,
}

/// Keys at 6, 4 and 3 bits in tiers, values at 4: what dq4 is in llama.cpp.
const DQ4: (u32, u32) = (104, 4);
const SMALL: Case = Case { d: 64, heads: 3, group: 3, plans: DQ4, n_kv: 4096 };
const LLAMA: Case = Case { d: 128, heads: 8, group: 4, plans: DQ4, n_kv: 4096 };
const GEMMA: Case = Case { d: 256, heads: 1, group: 4, plans: DQ4, n_kv: 4096 };

fn main() {
    let all = std::env::var("DECOQUANT_BENCH").is_ok_and(|v| v == "all");
    let mut c = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(500))
        .without_plots()
        .configure_from_args();
    let copy = copy_bandwidth();
    println!("copy {copy:.1} GB/s, {:?}", decoquant::cpu::simd::Isa::detect());

    let mut decode = vec![
        SMALL,
        Case { n_kv: 16_384, ..SMALL },
        Case { plans: (103, 3), ..SMALL },
        GEMMA,
        Case { n_kv: 512, ..LLAMA },
        LLAMA,
        Case { n_kv: 32_768, ..LLAMA },
        Case { n_kv: 131_072, heads: 2, ..LLAMA },
    ];
    let mut prefill = vec![SMALL, GEMMA, LLAMA];
    let mut rest = vec![SMALL, GEMMA, LLAMA];
    if all {
        decode = every_case(&[512, 2048, 8192, 32_768, 131_072]);
        prefill = every_case(&[512, 4096]);
        rest = every_case(&[4096]).into_iter().filter(|case| case.group == 4).collect();
    }
    for case in &decode {
        run_attend(&mut c, "decode", case, 1, copy);
    }
    for case in &prefill {
        run_attend(&mut c, "prefill of 128", case, 128, copy);
    }
    for case in &rest {
        run_encode(&mut c, case, copy);
        run_dequantize(&mut c, case, copy);
    }
    for case in [SMALL, Case { n_kv: 512, ..GEMMA }, Case { n_kv: 512, ..LLAMA }] {
        run_token(&mut c, &case);
    }
    for d in [64, 128, 256] {
        run_fit(&mut c, d);
    }
    c.final_summary();
}

fn every_case(contexts: &[usize]) -> Vec<Case> {
    let mut out = Vec::new();
    for &n_kv in contexts {
        for d in [64, 128, 256] {
            for group in [1, 2, 4, 8] {
                for plans in [(2, 2), (3, 3), DQ4, (8, 8)] {
                    out.push(Case { d, heads: 2, group, plans, n_kv });
                }
            }
        }
    }
    out
}

/// A layer with factors and records of random codes.
struct Fixture {
    layer: LayerShape,
    factors: LayerFactors,
    store: Vec<u8>,
    random: Random,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// -1 to 1.
    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    fn halves(&mut self, n: usize, size: f32) -> Box<[f16]> {
        (0..n).map(|_| f16::from_f32(self.float() * size)).collect()
    }
}

impl Fixture {
    fn new(case: &Case) -> Self {
        let side = |plan| SideDesc { head_dim: case.d, plan, gauge: Gauge::Rotation };
        let layer = LayerShape::new(case.heads * case.group, case.heads, side(case.plans.0), side(case.plans.1)).unwrap();
        let factors = LayerFactors::new(&layer, 1);
        let (mut random, d) = (Random(1), case.d);
        for head in &factors.k {
            let set = FactorSet::dense(random.halves(d, 1.0), random.halves(d * d, 0.2), ROTATION_KAPPA);
            let mut encode = random.floats(d * d);
            for tier in layer.k.plan.tiers.iter().filter(|_| layer.k.plan.feedback_len() > 0) {
                for j in 0..tier.channels {
                    encode.extend((0..j).map(|_| 0.05 * random.float()));
                    encode.push(1.0);
                }
            }
            head.sets.push_fit(set, Some(encode.into())).unwrap();
        }
        let mut store = vec![0u8; case.n_kv * layer.slot_bytes];
        let mut codes = vec![0u8; d];
        for record in store.chunks_exact_mut(layer.slot_bytes) {
            for (side, set) in [(Side::K, 1), (Side::V, 0)] {
                let shape = layer.side(side);
                for head in 0..case.heads {
                    for tier in &shape.plan.tiers {
                        for code in &mut codes[tier.first..tier.first + tier.channels] {
                            *code = (random.next() >> (31 - tier.bits)) as u8;
                        }
                    }
                    planes::pack(&shape.planes, head, &codes, record);
                    let at = shape.headers_offset + 2 * head;
                    record[at..at + 2].copy_from_slice(&header::pack(0.7, set).0.to_le_bytes());
                }
            }
        }
        Self { layer, factors, store, random }
    }
}

fn f32_rows(n_tokens: usize, n_heads: usize, head_dim: usize) -> RowsShape {
    let head_stride = 4 * head_dim;
    RowsShape { dtype: DType::F32, n_tokens, n_heads, head_dim, token_stride: n_heads * head_stride, head_stride }
}

/// Measures `work`, which goes over `bytes` bytes of records.
fn measure(c: &mut Criterion, call: &str, case: &Case, bytes: usize, copy: f64, mut work: impl FnMut()) {
    let Case { d, heads, group, plans, n_kv } = case;
    let mut best = f64::INFINITY;
    let mut group_of = c.benchmark_group(call);
    group_of.throughput(Throughput::Bytes(bytes as u64));
    let id = BenchmarkId::from_parameter(format!("d{d}/{heads}x{group}/{}-{}/{n_kv}", plans.0, plans.1));
    group_of.bench_function(id, |b| {
        b.iter_custom(|n| {
            let start = Instant::now();
            (0..n).for_each(|_| work());
            let took = start.elapsed();
            best = best.min(took.as_secs_f64() / n as f64);
            took
        });
    });
    group_of.finish();
    if best.is_finite() {
        let rate = bytes as f64 / best / 1e9;
        let rows = (n_kv * heads) as f64;
        println!(
            "  best {:.1} us, {:.2} ns a row and KV head, {:.0}% of a plain copy",
            best * 1e6,
            best * 1e9 / rows,
            100.0 * rate / copy
        );
    }
}

/// Queries of one stream over all keys of the case; `q` and `out` are `[n_q][n_q_heads][d]`, f32.
fn attend_args<'a>(
    case: &Case,
    layer: &LayerShape,
    n_q: usize,
    store: Store<'a>,
    q: &'a [f32],
    out: &'a mut [u8],
) -> AttendArgs<'a> {
    AttendArgs {
        n_streams: 1,
        n_q,
        n_kv: case.n_kv,
        first_slot: 0,
        stream_slots: 0,
        store,
        q: Rows::from_f32(q, layer.n_q_heads, case.d),
        out: RowsMut::new(out, f32_rows(n_q, layer.n_q_heads, case.d)).unwrap(),
        mask: None,
        sink_logits: None,
        scale: 1.0 / (case.d as f32).sqrt(),
        softcap: 0.0,
        sequences: None,
        tail: None,
    }
}

fn run_attend(c: &mut Criterion, call: &str, case: &Case, n_q: usize, copy: f64) {
    let Fixture { layer, factors, mut store, mut random } = Fixture::new(case);
    let q = random.floats(n_q * layer.n_q_heads * case.d);
    let mut out = vec![0u8; 4 * q.len()];
    let mut ws = vec![0u8; workspace_size(&layer, &Limits::even(1, n_q, case.n_kv)).unwrap() + 64];
    let start = ws.as_ptr().align_offset(64);
    let ws = Workspace::new(&mut ws[start..]);
    let bytes = store.len();
    let args = attend_args(case, &layer, n_q, Store::new(&mut store, layer.slot_bytes), &q, &mut out);
    measure(c, call, case, bytes, copy, || attend(&layer, &factors, black_box(&args), &ws).unwrap());
}

fn run_encode(c: &mut Criterion, case: &Case, copy: f64) {
    let n = case.n_kv.min(512);
    let Fixture { layer, factors, mut store, mut random } = Fixture::new(&Case { n_kv: n, ..*case });
    let (k, v) = (random.floats(n * case.heads * case.d), random.floats(n * case.heads * case.d));
    let rows = |x| Rows::from_f32(x, case.heads, case.d);
    let tokens = Tokens { n_tokens: n, q: None, kv: Some((rows(&k), rows(&v))), positions: None };
    let slots: Vec<i64> = (0..n as i64).collect();
    let bytes = store.len();
    let store = Store::new(&mut store, layer.slot_bytes);
    measure(c, "encode", &Case { n_kv: n, ..*case }, bytes, copy, || {
        encode_shard(&layer, &factors, black_box(&tokens), &slots, &store, 0, 1).unwrap();
    });
}

/// One layer's share of a generated token, as a model meets it: since the last token the weights and caches of all layers
/// have gone through the near caches. What passes between two calls is not timed.
fn run_token(c: &mut Criterion, case: &Case) {
    const LAYERS: usize = 18;
    const WEIGHTS: usize = 12 << 20;
    let weights = vec![1u64; WEIGHTS / 8];
    let mut layers: Vec<Fixture> = (0..LAYERS).map(|_| Fixture::new(case)).collect();
    let Fixture { layer, random, .. } = &mut layers[0];
    let layer = layer.clone();
    let q = random.floats(layer.n_q_heads * case.d);
    let (k, v) = (random.floats(case.heads * case.d), random.floats(case.heads * case.d));
    let mut out = vec![0u8; 4 * q.len()];
    let mut ws = vec![0u8; workspace_size(&layer, &Limits::even(1, 1, case.n_kv)).unwrap() + 64];
    let start = ws.as_ptr().align_offset(64);
    let ws = Workspace::new(&mut ws[start..]);
    let rows = |x| Rows::from_f32(x, case.heads, case.d);
    let Case { d, heads, group, plans, n_kv } = case;
    for encodes in [true, false] {
        let call = if encodes { "token encode" } else { "token attend" };
        let id = format!("{call}/d{d}/{heads}x{group}/{}-{}/{n_kv}", plans.0, plans.1);
        c.bench_function(&id, |b| {
            b.iter_custom(|n| {
                let mut took = Duration::ZERO;
                for i in 0..n as usize {
                    black_box(weights.iter().fold(0, |a, x| a ^ x));
                    let Fixture { factors, store, .. } = &mut layers[i % LAYERS];
                    let store = Store::new(store, layer.slot_bytes);
                    let start = Instant::now();
                    if encodes {
                        let tokens = Tokens { n_tokens: 1, q: None, kv: Some((rows(&k), rows(&v))), positions: None };
                        encode_shard(&layer, factors, &tokens, &[0], &store, 0, 1).unwrap();
                    } else {
                        let args = attend_args(case, &layer, 1, store, &q, &mut out);
                        attend(&layer, factors, &args, &ws).unwrap();
                    }
                    took += start.elapsed();
                }
                took
            });
        });
    }
}

fn run_dequantize(c: &mut Criterion, case: &Case, copy: f64) {
    let Fixture { layer, factors, mut store, .. } = Fixture::new(case);
    let slots: Vec<i64> = (0..case.n_kv as i64).collect();
    let shape = f32_rows(case.n_kv, case.heads, case.d);
    let (mut k, mut v) = (vec![0u8; case.n_kv * shape.token_stride], vec![0u8; case.n_kv * shape.token_stride]);
    let bytes = store.len();
    let store = Store::new(&mut store, layer.slot_bytes);
    measure(c, "dequantize", case, bytes, copy, || {
        let rows = |out| Some(RowsMut::new(out, shape).unwrap());
        dequantize(&layer, &factors, black_box(&store), &slots, rows(&mut k), rows(&mut v)).unwrap();
    });
}

/// From the moments of 512 rows and queries to the factors of one head.
fn run_fit(c: &mut Criterion, d: usize) {
    let mut random = Random(1);
    let mut moments = |mut m: Moments| {
        (0..512).for_each(|_| m.push(&random.floats(d)));
        m.flush();
        m
    };
    let (rows, queries) = (moments(Moments::centred(d, true)), moments(Moments::about_zero(d)));
    let mean = round_mean(rows.mean());
    let exact: Vec<f64> = mean.iter().map(|x| x.to_f64()).collect();
    let (covariance, query) = (rows.second_about(&exact), queries.second_about(&vec![0.0; d]));
    let side = SideDesc { head_dim: d, plan: 104, gauge: Gauge::Attention };
    let layer = LayerShape::new(1, 1, side, side).unwrap();
    c.bench_function(&format!("fit/d{d}"), |b| {
        b.iter(|| {
            fit(black_box(&FitInput {
                rows: rows.rows(),
                mean: &mean,
                covariance: &covariance,
                query: Some(&query),
                tiers: &layer.k.plan.tiers,
            }))
        });
    });
}

/// Gigabytes a second that one thread's copy of a buffer reads, no cache holding it.
fn copy_bandwidth() -> f64 {
    let from = vec![1u8; 128 << 20];
    let mut to = vec![0u8; 128 << 20];
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let t = Instant::now();
        to.copy_from_slice(black_box(&from));
        best = best.min(t.elapsed());
        black_box(&to);
    }
    from.len() as f64 / best.as_secs_f64() / 1e9
}
