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

/// Attention in f64 over decoded rows. Slots that every query's mask hides are not read.
pub fn attend(layer: &LayerShape, factors: &LayerFactors, args: &AttendArgs) -> Truth {
    let (d_k, d_v, group) = (layer.k.head_dim, layer.v.head_dim, layer.group());
    let tokens = args.n_streams * args.n_q;
    let mut truth = Truth {
        out: vec![0.0; tokens * layer.n_q_heads * d_v],
        size: vec![0.0; tokens * layer.n_q_heads * d_v],
    };
    for stream in 0..args.n_streams {
        // Mask, [query][key].
        let mask: Vec<Vec<f32>> = (0..args.n_q)
            .map(|query| {
                let mut row = vec![0.0; args.n_kv];
                if let Some(mask) = &args.mask {
                    mask.load(stream, query, 0, &mut row);
                }
                row
            })
            .collect();
        for head in 0..layer.n_kv_heads {
            // Rows, [key]; `None` where nobody looks.
            let rows = |side: Side| -> Vec<Option<Vec<f64>>> {
                (0..args.n_kv)
                    .map(|key| {
                        let seen = mask.iter().any(|row| row[key] > f32::NEG_INFINITY);
                        let slot = args.first_slot + stream * args.stream_slots + key;
                        // SAFETY: tests write no slot while they compute the truth.
                        let record = seen.then(|| unsafe { args.store.slot(slot) })?;
                        Some(decode_row(layer.side(side), &factors.side(side)[head].sets, head, record))
                    })
                    .collect()
            };
            let (k, v) = (rows(Side::K), rows(Side::V));
            for query in 0..args.n_q {
                for q_head in head * group..(head + 1) * group {
                    let token = stream * args.n_q + query;
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
