//! Attention over context, head_dim, group and widths: time, record bytes a second, and the latter against a plain
//! copy's on the same machine. `cargo bench --bench attend -- [filter]`.
//!
//! Times are the least of many runs: other work on the machine only ever adds to them.

use decoquant::code::{header, planes};
use decoquant::cpu::attend::{Limits, attend_merge_shard, attend_shard, workspace_size};
use decoquant::factor::{FactorSet, LayerFactors, ROTATION_KAPPA};
use decoquant::shape::{Gauge, LayerShape, Side, SideDesc};
use decoquant::view::{AttendArgs, DType, Rows, RowsMut, RowsShape, Store};
use decoquant::workspace::Workspace;
use half::f16;
use std::hint::black_box;
use std::time::{Duration, Instant};

struct Case {
    name: &'static str,
    d: usize,
    heads: usize,
    group: usize,
    plans: (u32, u32),
    n_q: usize,
    n_kv: usize,
    threads: usize,
}

fn main() {
    let filter: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let wanted = |name: &str| filter.is_empty() || filter.iter().any(|f| name.contains(f.as_str()));
    let copy = copy_bandwidth();
    println!("copy {copy:.1} GB/s (read), {:?}", decoquant::cpu::simd::Isa::detect());
    println!("{:<44} {:>9} {:>9} {:>7} {:>7} {:>7}", "case", "us", "ns/row", "GB/s", "copy %", "GMAC/s");
    let base = Case { name: "", d: 64, heads: 3, group: 3, plans: (4, 4), n_q: 1, n_kv: 4096, threads: 1 };
    let mut cases = vec![
        Case { name: "smol decode 4k", ..base },
        Case { name: "smol decode 4k t2", threads: 2, ..base },
        Case { name: "smol decode 16k", n_kv: 16384, ..base },
        Case { name: "smol decode 16k t2", n_kv: 16384, threads: 2, ..base },
        Case { name: "smol prefill 128 at 4k", n_q: 128, ..base },
        Case { name: "smol prefill 128 at 4k t2", n_q: 128, threads: 2, ..base },
        Case { name: "gemma decode 4k", d: 256, heads: 1, group: 4, ..base },
        Case { name: "gemma prefill 128 at 4k", d: 256, heads: 1, group: 4, n_q: 128, ..base },
        Case { name: "llama decode 32k", d: 128, heads: 8, group: 4, n_kv: 32768, ..base },
        Case { name: "llama prefill 128 at 4k", d: 128, heads: 8, group: 4, n_q: 128, ..base },
    ];
    for plan in [2, 3, 8] {
        cases.push(Case { name: "smol decode 4k, other widths", plans: (plan, plan), ..base });
        cases.push(Case { name: "smol prefill, other widths", plans: (plan, plan), n_q: 128, ..base });
    }
    for group in [1, 2, 4, 8] {
        cases.push(Case { name: "smol decode 4k, groups", group, ..base });
    }
    for d in [80, 96, 128, 192, 256] {
        cases.push(Case { name: "decode 4k, head dims", d, heads: 2, group: 4, ..base });
    }
    for n_kv in [512, 2048, 8192, 32768, 131072] {
        cases.push(Case { name: "linear in context", d: 128, heads: 2, group: 4, n_kv, ..base });
    }
    for case in cases.iter().filter(|c| wanted(c.name)) {
        run(case, copy);
    }
}

fn run(case: &Case, copy: f64) {
    let side = |plan| SideDesc { head_dim: case.d, plan, gauge: Gauge::Rotation };
    let layer = LayerShape::new(case.heads * case.group, case.heads, side(case.plans.0), side(case.plans.1)).unwrap();
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u32
    };
    // Keys in a dense set, values in the rotation: the default gauges.
    let factors = LayerFactors::new(&layer, 1);
    let d = case.d;
    for head in 0..case.heads {
        let halves = |n: usize, size: f32, random: &mut dyn FnMut() -> u32| -> Box<[f16]> {
            (0..n).map(|_| f16::from_f32((random() as f32 / (1u64 << 30) as f32 - 1.0) * size)).collect()
        };
        let set = FactorSet::dense(halves(d, 1.0, &mut random), halves(d * d, 0.2, &mut random), ROTATION_KAPPA);
        factors.k[head].sets.push_fit(set, None).unwrap();
    }
    let mut store = vec![0u8; case.n_kv * layer.slot_bytes];
    let mut codes = vec![0u8; d];
    for record in store.chunks_exact_mut(layer.slot_bytes) {
        for (side, set) in [(Side::K, 1), (Side::V, 0)] {
            let shape = layer.side(side);
            for head in 0..case.heads {
                for tier in &shape.plan.tiers {
                    for code in &mut codes[tier.first..tier.first + tier.channels] {
                        *code = (random() >> (31 - tier.bits)) as u8;
                    }
                }
                planes::pack(&shape.planes, head, &codes, record);
                let at = shape.headers_offset + 2 * head;
                record[at..at + 2].copy_from_slice(&header::pack(0.7, set).0.to_le_bytes());
            }
        }
    }
    let n_heads = layer.n_q_heads;
    let q: Vec<f32> = (0..case.n_q * n_heads * d).map(|_| random() as f32 / (1u64 << 30) as f32 - 1.0).collect();
    let mut out = vec![0u8; 4 * q.len()];
    let shape = RowsShape {
        dtype: DType::F32,
        n_tokens: case.n_q,
        n_heads,
        head_dim: d,
        token_stride: 4 * n_heads * d,
        head_stride: 4 * d,
    };
    let size = workspace_size(&layer, &Limits::even(1, case.n_q, case.n_kv)).unwrap();
    let mut ws = vec![0u8; size + 64];
    let start = ws.as_ptr().align_offset(64);
    let ws = Workspace::new(&mut ws[start..]);
    let args = AttendArgs {
        n_streams: 1,
        n_q: case.n_q,
        n_kv: case.n_kv,
        first_slot: 0,
        stream_slots: 0,
        store: Store::new(&mut store, layer.slot_bytes),
        q: Rows::from_f32(&q, n_heads, d),
        out: RowsMut::new(&mut out, shape).unwrap(),
        mask: None,
        sink_logits: None,
        scale: 1.0 / (d as f32).sqrt(),
        softcap: 0.0,
        sequences: None,
        tail: None,
    };
    let n = case.threads;
    let mut best = Duration::MAX;
    let begun = Instant::now();
    let mut runs = 0;
    while runs < 3 || begun.elapsed() < Duration::from_millis(600) {
        runs += 1;
        let took = if n == 1 {
            let t = thread_time();
            attend_shard(&layer, &factors, &args, &ws, 0, 1).unwrap();
            attend_merge_shard(&layer, &factors, &args, &ws, 0, 1).unwrap();
            thread_time() - t
        } else {
            // Threads spin between phases, as an engine's pool does.
            let barrier = SpinBarrier::new(n);
            std::thread::scope(|scope| {
                let (layer, factors, args, ws, barrier) = (&layer, &factors, &args, &ws, &barrier);
                let work = move |shard| {
                    barrier.wait();
                    let t = Instant::now();
                    attend_shard(layer, factors, args, ws, shard, n).unwrap();
                    barrier.wait();
                    attend_merge_shard(layer, factors, args, ws, shard, n).unwrap();
                    barrier.wait();
                    t.elapsed()
                };
                let others: Vec<_> = (1..n).map(|shard| scope.spawn(move || work(shard))).collect();
                let mine = work(0);
                others.into_iter().map(|o| o.join().unwrap()).fold(mine, Duration::max)
            })
        };
        best = best.min(took);
        black_box(&args);
    }
    let us = best.as_secs_f64() * 1e6;
    let rows = (case.n_kv * case.heads) as f64;
    let bytes = (case.n_kv * layer.slot_bytes) as f64;
    let macs = rows * (case.group * case.n_q * 2 * d) as f64;
    let name = format!(
        "{} d{} {}x{} {}/{}",
        case.name, d, case.heads, case.group, case.plans.0, case.plans.1
    );
    let rate = bytes / us / 1e3;
    println!("{name:<44} {us:>9.1} {:>9.2} {rate:>7.2} {:>6.0}% {:>7.1}  {}", us * 1e3 / rows, 100.0 * rate / copy, macs / us / 1e3, case.n_kv);
}

struct SpinBarrier {
    n: usize,
    arrived: std::sync::atomic::AtomicUsize,
}

impl SpinBarrier {
    fn new(n: usize) -> Self {
        Self { n, arrived: 0.into() }
    }

    fn wait(&self) {
        use std::sync::atomic::Ordering;
        let turn = self.arrived.fetch_add(1, Ordering::AcqRel) / self.n;
        while self.arrived.load(Ordering::Acquire) / self.n == turn {
            std::hint::spin_loop();
        }
    }
}

/// CPU time of this thread where the system tells it: a busy machine interrupts long runs.
fn thread_time() -> Duration {
    #[cfg(target_os = "linux")]
    {
        #[repr(C)]
        struct Timespec {
            seconds: i64,
            nanoseconds: i64,
        }
        unsafe extern "C" {
            fn clock_gettime(clock: i32, out: *mut Timespec) -> i32;
        }
        const THREAD_CPU: i32 = 3;
        let mut t = Timespec { seconds: 0, nanoseconds: 0 };
        // SAFETY: `t` has the C type on 64-bit Linux.
        if unsafe { clock_gettime(THREAD_CPU, &mut t) } == 0 {
            return Duration::new(t.seconds as u64, t.nanoseconds as u32);
        }
    }
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// Bytes read a second by one thread's copy of a buffer that no cache holds.
fn copy_bandwidth() -> f64 {
    let from = vec![1u8; 256 << 20];
    let mut to = vec![0u8; 256 << 20];
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let t = Instant::now();
        to.copy_from_slice(black_box(&from));
        best = best.min(t.elapsed());
        black_box(&to);
    }
    from.len() as f64 / best.as_secs_f64() / 1e9
}
