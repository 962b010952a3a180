//! Naive f64 truth for tests: rows decoded one by one, attention as the textbook writes it.
//!
//! Nothing here is shared with the kernels but the codebooks and the rotation matrix: codes are read from the
//! documented bits of a record.

use crate::code::codebook;
use crate::factor::{HeadSets, LayerFactors, Transform, hadamard};
use crate::shape::{LayerShape, Side, SideShape};
use crate::view::AttendArgs;

/// One row, decoded: `mean + decode y`. A set that does not exist is the rotation about zero.
pub fn decode_row(side: &SideShape, sets: &HeadSets, head: usize, record: &[u8]) -> Vec<f64> {
    let d = side.head_dim;

    let mut codes = vec![0usize; d];
    for plane in &side.planes {
        let (bits, bytes) = (plane.bits as usize, plane.head_bytes);
        for (channel, code) in codes[plane.first..plane.first + plane.channels].iter_mut().enumerate() {
            let byte = record[plane.offset + head * bytes + channel % bytes] as usize;
            let field = byte >> (channel / bytes * bits) & ((1 << bits) - 1);
            *code |= field << plane.shift;
        }
    }

    let at = side.headers_offset + 2 * head;
    let header = u16::from_le_bytes([record[at], record[at + 1]]);
    // An f16 without its sign: 5 bits of exponent, 7 of mantissa.
    let (exponent, mantissa) = (i32::from(header >> 11), f64::from(header >> 4 & 127) / 128.0);
    let scale = match exponent {
        0 => mantissa * 2f64.powi(-14),
        e => (1.0 + mantissa) * 2f64.powi(e - 15),
    };

    let mut y = vec![0.0; d];
    for tier in &side.plan.tiers {
        let book = codebook(tier.bits);
        for j in tier.first..tier.first + tier.channels {
            y[j] = scale * f64::from(book.unit) * f64::from(book.table[codes[j]]);
        }
    }

    let set = sets.get((header & 15) as u8);
    let mut x = match set {
        Some(set) => set.mean.iter().map(|m| m.to_f64()).collect(),
        None => vec![0.0; d],
    };
    match set.map(|set| &*set.transform) {
        Some(Transform::Dense { decode }) => {
            for i in 0..d {
                x[i] += (0..d).map(|j| decode[i * d + j].to_f64() * y[j]).sum::<f64>();
            }
        }
        _ => {
            let rotation = hadamard::rotation_matrix(d);
            for i in 0..d {
                x[i] += (0..d).map(|j| rotation[j * d + i] * y[j]).sum::<f64>();
            }
        }
    }
    x
}

/// What attention should give, `[token][q head][d_v]`.
#[derive(Debug)]
pub struct Truth {
    pub out: Vec<f64>,
    /// The sum of `p |v|` of each output: what errors are measured against.
    pub size: Vec<f64>,
}

/// Attention in f64 over decoded rows and tails. Slots that are hidden from every query are not read.
pub fn attend(layer: &LayerShape, factors: &LayerFactors, args: &AttendArgs) -> Truth {
    let (d_k, d_v, group) = (layer.k.head_dim, layer.v.head_dim, layer.group());
    let values = args.q.n_tokens() * layer.n_q_heads * d_v;
    let mut truth = Truth { out: vec![0.0; values], size: vec![0.0; values] };
    for stream in 0..args.n_streams {
        let (first_token, n_q, n_kv, n_tail) = counts(args, stream);
        // Mask, [query][key].
        let mask: Vec<Vec<f32>> = (0..n_q).map(|query| mask_row(args, stream, query, n_q, n_kv, n_tail)).collect();
        for head in 0..layer.n_kv_heads {
            // Rows, [key]; `None` where nobody looks.
            let rows = |side: Side| -> Vec<Option<Vec<f64>>> {
                (0..n_kv + n_tail)
                    .map(|key| {
                        mask.iter().any(|row| row[key] != f32::NEG_INFINITY).then_some(())?;
                        if key >= n_kv {
                            return Some(tail_row(args, stream, key - n_kv, head, side));
                        }
                        // SAFETY: tests write no slot while they compute the truth.
                        let record = unsafe { args.store.slot(slot(args, stream, key)) };
                        Some(decode_row(layer.side(side), &factors.side(side)[head].sets, head, record))
                    })
                    .collect()
            };
            let (k, v) = (rows(Side::K), rows(Side::V));
            for query in 0..n_q {
                for q_head in head * group..(head + 1) * group {
                    let token = first_token + query;
                    let mut q = vec![0.0; d_k];
                    args.q.load(token, q_head, &mut q);
                    let at = (token * layer.n_q_heads + q_head) * d_v;
                    let sink = args.sink_logits.map(|logits| f64::from(logits[q_head]));
                    let scores: Vec<f64> = k.iter().zip(&mask[query]).map(|(k, m)| score(args, &q, k, *m)).collect();
                    row(&scores, sink, &v, &mut truth.out[at..at + d_v], &mut truth.size[at..at + d_v]);
                }
            }
        }
    }
    truth
}

/// First token, queries, coded keys and rows of the tail of one stream or sequence.
fn counts(args: &AttendArgs, stream: usize) -> (usize, usize, usize, usize) {
    let n_tail = args.tail.map_or(0, |t| t.lengths.map_or(t.n_rows, |lengths| lengths[stream] as usize));
    let Some(sequences) = args.sequences else {
        return (stream * args.n_q, args.n_q, args.n_kv, n_tail);
    };
    let batch = sequences.batch();
    let (first, end) = match batch.q_starts {
        Some(starts) => (starts[stream] as usize, starts[stream + 1] as usize),
        None => (stream * args.n_q, (stream + 1) * args.n_q),
    };
    (first, end - first, batch.kv_lengths[stream] as usize, n_tail)
}

fn mask_row(args: &AttendArgs, stream: usize, query: usize, n_q: usize, n_kv: usize, n_tail: usize) -> Vec<f32> {
    let n_keys = n_kv + n_tail;
    let mut row = vec![0.0; n_keys];
    if let Some(mask) = &args.mask {
        mask.load(stream, query, 0, &mut row);
    }
    if let Some(visible) = args.sequences.map(|s| s.batch().visible).filter(|v| v.causal) {
        // The last query is at the last key.
        let position = n_keys as i64 - n_q as i64 + query as i64;
        for (key, value) in row.iter_mut().enumerate() {
            let ago = position - key as i64;
            if ago < 0 || visible.window.is_some_and(|window| ago >= window as i64) {
                *value = f32::NEG_INFINITY;
            }
        }
    }
    row
}

fn slot(args: &AttendArgs, stream: usize, key: usize) -> usize {
    match args.sequences.and_then(|s| s.batch().table) {
        Some(t) => t.blocks[stream * t.stride + key / t.block_slots] as usize * t.block_slots + key % t.block_slots,
        None => args.first_slot + stream * args.stream_slots + key,
    }
}

fn tail_row(args: &AttendArgs, stream: usize, row: usize, head: usize, side: Side) -> Vec<f64> {
    let tail = args.tail.as_ref().expect("a row of the tail");
    let rows = if side == Side::K { &tail.k } else { &tail.v };
    let mut out = vec![0.0; rows.shape().head_dim];
    rows.load(tail.starts.map_or(stream * tail.n_rows, |starts| starts[stream] as usize) + row, head, &mut out);
    out.into_iter().map(f64::from).collect()
}

fn score(args: &AttendArgs, q: &[f32], k: &Option<Vec<f64>>, mask: f32) -> f64 {
    let Some(k) = k else { return f64::NEG_INFINITY };
    let mut s = f64::from(args.scale) * q.iter().zip(k).map(|(q, k)| f64::from(*q) * k).sum::<f64>();
    if args.softcap > 0.0 {
        let cap = f64::from(args.softcap);
        s = cap * (s / cap).tanh();
    }
    s + f64::from(mask)
}

/// Softmax over `scores` and the sink's logit, which has no value.
fn row(scores: &[f64], sink: Option<f64>, v: &[Option<Vec<f64>>], out: &mut [f64], size: &mut [f64]) {
    if scores.iter().all(|s| *s == f64::NEG_INFINITY) {
        return;
    }
    let largest = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().copied().chain(sink).map(|s| (s - largest).exp()).sum();
    for (s, v) in scores.iter().zip(v) {
        let p = (s - largest).exp() / total;
        if let Some(v) = v {
            for ((out, size), v) in out.iter_mut().zip(&mut *size).zip(v) {
                *out += p * v;
                *size += p * v.abs();
            }
        }
    }
}
