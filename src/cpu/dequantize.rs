//! Rows back to floats: `x = mean + decode y`.

use crate::code::{codebook, header, planes};
use crate::cpu::simd::{Isa, LANES, Simd, portable::Portable};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::avx2::Avx2;
use crate::error::{Error, Result};
use crate::factor::{HeadSets, LayerFactors, Transform, hadamard};
use crate::shape::{LayerShape, MAX_DIM, Side, SideShape};
use crate::view::{RowsMut, Store};

/// Decodes the records of `slots` into row `i` of the outputs for `slots[i]`. Slot -1, and a row that names a set which
/// does not exist, give zeros. No other thread may write these slots or outputs meanwhile.
pub fn dequantize(
    layer: &LayerShape,
    factors: &LayerFactors,
    store: &Store<'_>,
    slots: &[i64],
    k_out: Option<RowsMut<'_>>,
    v_out: Option<RowsMut<'_>>,
) -> Result<()> {
    if let Some(slot) = slots.iter().find(|&&slot| slot < -1 || slot >= store.n_slots() as i64) {
        return Err(Error::invalid(format!("slot is {slot}; the store has {}", store.n_slots())));
    }
    for (side, out) in [(Side::K, k_out), (Side::V, v_out)] {
        let (shape, factors, Some(out)) = (layer.side(side), factors.side(side), out) else { continue };
        let o = out.shape();
        if (o.n_tokens, o.n_heads, o.head_dim) != (slots.len(), layer.n_kv_heads, shape.head_dim) {
            return Err(Error::invalid(format!(
                "output is [{}][{}][{}]; this call needs [{}][{}][{}]",
                o.n_tokens,
                o.n_heads,
                o.head_dim,
                slots.len(),
                layer.n_kv_heads,
                shape.head_dim
            )));
        }
        let mut x = [0.0f32; MAX_DIM];
        let x = &mut x[..shape.head_dim];
        for (i, &slot) in slots.iter().enumerate() {
            for (head, factors) in factors.iter().enumerate() {
                if slot < 0 {
                    x.fill(0.0);
                } else {
                    // SAFETY: the slot is in range; the caller keeps writers away.
                    let record = unsafe { store.slot(slot as usize) };
                    row(shape, &factors.sets, head, record, x);
                }
                // SAFETY: the caller keeps other writers away.
                unsafe { out.store(i, head, x) };
            }
        }
    }
    Ok(())
}

fn row(side: &SideShape, sets: &HeadSets, head: usize, record: &[u8], x: &mut [f32]) {
    let d = side.head_dim;
    let at = side.headers_offset + 2 * head;
    let bits = u16::from_le_bytes([record[at], record[at + 1]]);
    let Some(set) = sets.get(header::set(bits)) else {
        x.fill(0.0);
        return;
    };
    let mut codes = [0u8; MAX_DIM];
    planes::unpack(&side.planes, head, record, &mut codes[..d]);
    let scale = header::scale(bits);
    let mut y = [0.0f32; MAX_DIM];
    for tier in &side.plan.tiers {
        let book = codebook(tier.bits);
        let step = scale * book.unit;
        for j in tier.first..tier.first + tier.channels {
            y[j] = step * f32::from(book.table[usize::from(codes[j])]);
        }
    }
    match &*set.transform {
        Transform::Rotation => {
            hadamard::unrotate(&mut y[..d]);
            x.copy_from_slice(&y[..d]);
        }
        Transform::Dense { decode } => dense(decode, &y, x),
    }
    for (x, mean) in x.iter_mut().zip(&set.mean) {
        *x += mean.to_f32();
    }
}

fn dense(decode: &[half::f16], y: &[f32; MAX_DIM], x: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn on_avx2(s: Avx2, decode: &[half::f16], y: &[f32; MAX_DIM], x: &mut [f32]) {
            product(s, decode, y, x);
        }
        if Isa::detect() != Isa::Portable {
            if let Some(s) = Avx2::new() {
                // SAFETY: `s` is the proof.
                return unsafe { on_avx2(s, decode, y, x) };
            }
        }
    }
    product(Portable, decode, y, x);
}

/// `x[i] = sum over j of decode[i][j] y[j]`.
#[inline(always)]
fn product<S: Simd>(s: S, decode: &[half::f16], y: &[f32; MAX_DIM], x: &mut [f32]) {
    let d = x.len();
    assert!(decode.len() == d * d && d <= MAX_DIM && d % LANES == 0);
    for (i, x) in x.iter_mut().enumerate() {
        let mut sum = s.splat(0.0);
        for j in (0..d).step_by(LANES) {
            // SAFETY: `i < d`, `j + 8 <= d`; the matrix is d * d and y longer than d by the assertion.
            unsafe {
                let m = s.load_f16(decode.as_ptr().add(i * d + j).cast());
                sum = s.add(sum, s.mul(m, s.load(y.as_ptr().add(j))));
            }
        }
        let mut l = [0.0; LANES];
        // SAFETY: eight floats.
        unsafe { s.store(l.as_mut_ptr(), sum) };
        *x = ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
    }
}
