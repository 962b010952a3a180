//! `dq_tokens`: what each call takes of it.

use super::memory::{Region, check_apart, elements};
use super::rows::{Dims, Name, input_rows, name};
use super::slots::{slots, store};
use super::structs::read_struct;
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::shape::LayerShape;
use crate::view::{Rows, Store, Tokens};

/// What a call does with the tokens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Statistics: q, k and v; the records are not looked at.
    Observe,
    /// Records: k, v, slots and store; q is not looked at.
    Encode,
    /// Both.
    Both,
}

/// Checked tokens; `target` is where records go, for the purposes that write them.
pub struct Given<'a> {
    pub tokens: Tokens<'a>,
    pub target: Option<(&'a [i64], Store<'a>)>,
}

/// `None` when there are no tokens.
///
/// # Safety
/// The pointers that the struct holds, when they are not null, are valid for what counts and strides span during `'a`.
pub unsafe fn tokens<'a>(
    pointer: *const dq_tokens,
    shape: &LayerShape,
    purpose: Purpose,
) -> Result<Option<Given<'a>>> {
    // SAFETY: the caller's word.
    let given = unsafe { read_struct("tokens", pointer) }?;
    if given.n_tokens == 0 {
        return Ok(None);
    }
    if !given.replaced_rows.is_null() {
        return Err(Error::invalid("tokens->replaced_rows is not null; on the CPU the status tells of replaced rows"));
    }
    let mut reads = Vec5::new();
    // SAFETY: the caller's word, for each of these.
    let tokens = Tokens {
        n_tokens: given.n_tokens as usize,
        q: if purpose == Purpose::Encode { None } else { unsafe { queries(&given, shape, &mut reads) }? },
        kv: unsafe { keys_and_values(&given, shape, purpose, &mut reads) }?,
        positions: unsafe { positions(&given, &mut reads) }?,
    };
    if tokens.q.is_none() && tokens.kv.is_none() {
        return Err(Error::invalid("tokens->q.data and tokens->k.data are both null; one must be given"));
    }
    let mut target = None;
    if purpose != Purpose::Observe {
        // SAFETY: the caller's word.
        let (store, written) = unsafe { store("tokens->store", &given.store, shape) }?;
        // SAFETY: the caller's word.
        let (slots, region) =
            unsafe { slots("tokens->slots", given.slots, tokens.n_tokens, store.n_slots()) }?;
        reads.push(region);
        check_apart(&[written], reads.as_slice())?;
        target = Some((slots, store));
    }
    Ok(Some(Given { tokens, target }))
}

/// # Safety
/// See [`tokens`].
unsafe fn queries<'a>(given: &dq_tokens, shape: &LayerShape, reads: &mut Vec5) -> Result<Option<Rows<'a>>> {
    if given.q.data.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's word.
    unsafe { rows(name!("tokens->q"), &given.q, given, shape.n_q_heads, shape.k.head_dim, reads) }.map(Some)
}

/// # Safety
/// See [`tokens`].
unsafe fn keys_and_values<'a>(
    given: &dq_tokens,
    shape: &LayerShape,
    purpose: Purpose,
    reads: &mut Vec5,
) -> Result<Option<(Rows<'a>, Rows<'a>)>> {
    if purpose == Purpose::Observe && given.k.data.is_null() {
        if given.v.data.is_null() {
            return Ok(None);
        }
        return Err(Error::invalid("tokens->k.data is null and tokens->v.data is not; both or none must be given"));
    }
    // SAFETY: the caller's word.
    let k = unsafe { rows(name!("tokens->k"), &given.k, given, shape.n_kv_heads, shape.k.head_dim, reads) }?;
    // SAFETY: the caller's word.
    let v = unsafe { rows(name!("tokens->v"), &given.v, given, shape.n_kv_heads, shape.v.head_dim, reads) }?;
    Ok(Some((k, v)))
}

/// # Safety
/// See [`tokens`].
unsafe fn rows<'a>(
    name: Name,
    tensor: &dq_tensor,
    given: &dq_tokens,
    n_heads: usize,
    head_dim: usize,
    reads: &mut Vec5,
) -> Result<Rows<'a>> {
    let dims = Dims { n_tokens: given.n_tokens as usize, n_heads, head_dim };
    // SAFETY: the caller's word.
    let (rows, region) = unsafe { input_rows(name, tensor, dims) }?;
    reads.push(region);
    Ok(rows)
}

/// # Safety
/// See [`tokens`].
unsafe fn positions<'a>(given: &dq_tokens, reads: &mut Vec5) -> Result<Option<&'a [i32]>> {
    const NAME: &str = "tokens->positions";
    if given.positions.is_null() {
        return Ok(None);
    }
    let count = given.n_tokens as usize;
    reads.push(Region::elements(NAME, given.positions, count)?);
    // SAFETY: the caller's word.
    let positions = unsafe { elements(NAME, given.positions, count) }?;
    if let Some(i) = positions.iter().position(|&p| p < 0) {
        return Err(Error::invalid(format!("{NAME}[{i}] is {}; it must not be negative", positions[i])));
    }
    Ok(Some(positions))
}

/// The stretches that a call reads, without an allocation: q, k, v, positions, slots.
struct Vec5 {
    len: usize,
    regions: [Region; 5],
}

impl Vec5 {
    fn new() -> Self {
        Self { len: 0, regions: [Region { name: "", start: 0, len: 0 }; 5] }
    }

    fn push(&mut self, region: Region) {
        self.regions[self.len] = region;
        self.len += 1;
    }

    fn as_slice(&self) -> &[Region] {
        &self.regions[..self.len]
    }
}
