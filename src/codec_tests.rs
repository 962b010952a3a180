//! Tests of the codec and of its files.

use super::*;
use crate::factor::fit::tests::{queries, rows};
use crate::shape::{Gauge, SideDesc};
use proptest::prelude::*;

const D: usize = 64;
const KV: usize = 3;

fn desc_of(n_layers: usize, k_plan: u32, d_v: usize) -> CodecDesc {
    let k = SideDesc { head_dim: D, plan: k_plan, gauge: Gauge::Attention };
    let v = SideDesc { head_dim: d_v, plan: 4, gauge: Gauge::Centred };
    let layers = vec![LayerShape::new(2 * KV, KV, k, v).unwrap(); n_layers];
    CodecDesc { layers, max_fits: 0, fingerprint: [7; 32], defers_fits: false }
}

fn desc() -> CodecDesc {
    desc_of(1, 4, D)
}

/// Feeds `t` tokens, the first at position 0, and fits.
fn feed(codec: &Codec, layer: usize, t: usize, seed: u64, n_shards: usize) {
    let k = rows(t, KV * D, 20.0, seed);
    let v = rows(t, KV * D, 5.0, seed + 1);
    let q = queries(t, 2 * KV * D, seed + 2);
    let positions: Vec<i32> = (0..t as i32).collect();
    let tokens = Tokens {
        n_tokens: t,
        q: Some(Rows::from_f32(&q, 2 * KV, D)),
        kv: Some((Rows::from_f32(&k, KV, D), Rows::from_f32(&v, KV, D))),
        positions: Some(&positions),
    };
    for shard in 0..n_shards {
        codec.observe_shard(layer, &tokens, shard, n_shards);
    }
    for shard in 0..n_shards {
        codec.refit_shard(layer, shard, n_shards);
    }
}

fn fed(t: usize) -> Codec {
    let codec = Codec::new(desc()).unwrap();
    feed(&codec, 0, t, 1, 1);
    codec
}

fn bytes_of(codec: &Codec) -> Vec<u8> {
    let mut out = Vec::new();
    codec.save(&mut |b| { out.extend(b); Ok(()) }).unwrap();
    out
}

fn exported(codec: &Codec) -> Vec<u8> {
    let mut out = Vec::new();
    codec.export_sets(0, &mut |b| { out.extend(b); Ok(()) }).unwrap();
    out
}

/// Reads from a slice; past its end is a bad file.
fn reader(mut bytes: &[u8]) -> impl FnMut(&mut [u8]) -> Result<()> {
    move |out| {
        let (head, tail) = bytes.split_at_checked(out.len()).ok_or_else(|| Error::bad_file("no more bytes"))?;
        out.copy_from_slice(head);
        bytes = tail;
        Ok(())
    }
}

fn load(bytes: &[u8], desc: CodecDesc) -> Result<Codec> {
    Codec::load(desc, &mut reader(bytes))
}

fn hashes(codec: &Codec) -> Vec<(u8, u8, u128)> {
    let units = codec.layers[0].factors.units();
    units.flat_map(|(_, _, h)| h.sets.iter().map(|(id, s)| (h.sets.newest(), id, s.hash)).collect::<Vec<_>>()).collect()
}

/// Sets the length right after the prefix and the checksum at the end, so that what is inside is looked at.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len() - 8;
    let length = bytes.len() as u64;
    bytes[48..56].copy_from_slice(&length.to_le_bytes());
    let checksum = xxhash_rust::xxh3::xxh3_64(&bytes[..body]);
    bytes[body..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

#[test]
fn shards_do_not_change_the_factors() {
    let one = fed(600);
    for n in [2, 5, 16] {
        let many = Codec::new(desc()).unwrap();
        feed(&many, 0, 600, 1, n);
        assert_eq!(hashes(&one), hashes(&many));
    }
}

#[test]
fn observed_layers_report_themselves() {
    let codec = fed(600);
    let info = codec.info(0);
    // The rotation, the sink and one fit for the thresholds crossed at once.
    assert_eq!((info.k_sets, info.v_sets, info.frozen, info.rows_seen), (3, 3, false, 599));
    assert!(info.factor_bytes > 0 && info.moment_bytes > 0);
    assert_eq!(info.rows_to_fit, Some(4096 - 599));
    assert!(info.factor_bytes <= codec.max_factor_bytes(0));
    assert!(codec.has_set(0, Side::K, 2, 2) && !codec.has_set(0, Side::K, 2, 3) && !codec.has_set(0, Side::V, 3, 0));
}

#[test]
fn smollm2_fits_its_budget() {
    let codec = Codec::new(desc()).unwrap();
    assert!(codec.max_factor_bytes(0) < 180_000, "{}", codec.max_factor_bytes(0));
    for (t, seed) in [(16, 1), (64, 3), (512, 5), (4000, 7)] {
        feed(&codec, 0, t, seed, 1);
    }
    let info = codec.info(0);
    assert!(info.frozen && info.moment_bytes == 0 && info.rows_to_fit.is_none());
    assert!(info.factor_bytes < 180_000, "{}", info.factor_bytes);
}

#[test]
fn a_loaded_codec_is_the_saved_one_and_frozen() {
    let codec = fed(600);
    let loaded = load(&bytes_of(&codec), desc()).unwrap();
    assert_eq!(hashes(&codec), hashes(&loaded));
    let matrix = |c: &Codec| c.layers[0].factors.k[1].sets.encode().matrix.clone();
    assert_eq!(matrix(&codec), matrix(&loaded));
    let sinks = |c: &Codec| c.layers[0].factors.v[0].sets.sinks().collect::<Vec<_>>();
    assert_eq!(sinks(&codec), sinks(&loaded));
    assert!(loaded.info(0).frozen && loaded.info(0).rows_seen > 0);
    feed(&loaded, 0, 5000, 9, 1);
    assert_eq!(hashes(&codec), hashes(&loaded));
    assert_eq!(hashes(&load(&bytes_of(&loaded), desc()).unwrap()), hashes(&codec));
}

#[test]
fn an_untouched_codec_can_be_saved() {
    let loaded = load(&bytes_of(&Codec::new(desc()).unwrap()), desc()).unwrap();
    assert_eq!(loaded.info(0).k_sets, 1);
}

#[test]
fn cut_files_are_refused() {
    let bytes = bytes_of(&fed(100));
    let mut at: Vec<usize> = (0..200).chain((0..200).map(|i| i * bytes.len() / 200)).collect();
    at.extend([bytes.len() - 1, bytes.len() - 8, bytes.len() - 9]);
    for n in at {
        let e = load(&bytes[..n], desc()).unwrap_err();
        assert!(e.kind == ErrorKind::BadFile && e.message.contains("cut short"), "{n}: {e}");
        // The same with a length and a checksum that fit.
        if n > 64 {
            assert_eq!(load(&sealed(bytes[..n].to_vec()), desc()).unwrap_err().kind, ErrorKind::BadFile);
        }
    }
}

#[test]
fn other_models_and_versions_are_refused_by_name() {
    let bytes = bytes_of(&fed(20));
    let refusal = |bytes: &[u8], desc| {
        let e = load(bytes, desc).unwrap_err();
        assert_eq!(e.kind, ErrorKind::BadFile);
        e.message
    };
    assert!(refusal(&bytes, CodecDesc { fingerprint: [8; 32], ..desc() }).contains("another model"));
    assert!(refusal(&bytes, desc_of(2, 4, D)).contains("1 layers, not 2"));
    assert!(refusal(&bytes, desc_of(1, 3, D)).contains("layer 0 of the file has k_plan 4, this model has 3"));
    assert!(refusal(&bytes, desc_of(1, 4, 128)).contains("head_dim_v 64, this model has 128"));
    let mut version = bytes.clone();
    version[8] = 9;
    assert!(refusal(&version, desc()).contains("version 9"));
    assert!(refusal(&exported(&fed(20)), desc()).contains("DQFACTOR"));
}

#[test]
fn nan_in_factors_is_refused() {
    let bytes = bytes_of(&fed(100));
    let mut refused = 0;
    for at in (100..bytes.len() - 8).step_by(499) {
        let mut bad = bytes.clone();
        bad[at..at + 2].copy_from_slice(&[0xFF, 0xFF]);
        // Whatever this hit, nothing panics and nothing that is not finite comes through.
        match load(&sealed(bad), desc()) {
            Err(e) => {
                assert_eq!(e.kind, ErrorKind::BadFile);
                refused += 1;
            }
            Ok(codec) => {
                for (_, _, h) in codec.layers[0].factors.units() {
                    assert!(h.sets.iter().all(|(_, s)| s.mean.iter().all(|x| x.is_finite())));
                }
            }
        }
    }
    assert!(refused > 10);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn flipped_bits_are_refused(place in 0.0f64..1.0, bit in 0u8..8) {
        use std::sync::LazyLock;
        static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| bytes_of(&fed(100)));
        let mut bytes = FILE.clone();
        // Half of the flips in the first bytes, where the lengths are.
        let at = if place < 0.5 { (place * 2.0 * 400.0) as usize } else { (place * bytes.len() as f64) as usize };
        bytes[at] ^= 1 << bit;
        prop_assert_eq!(load(&bytes, desc()).unwrap_err().kind, ErrorKind::BadFile);
        // With the checksum made right the content decides; it must not panic.
        let _ = load(&sealed(bytes), desc());
    }
}

#[test]
fn imports_keep_known_sets_and_put_others_on_top() {
    let (here, there) = (fed(100), Codec::new(desc()).unwrap());
    feed(&there, 0, 100, 50, 1);
    let mut map = vec![0; 2 * KV * MAX_SETS];
    here.import_sets(0, &mut reader(&exported(&here)), &mut map, usize::MAX).unwrap();
    assert_eq!(map[..4], [0, 1, 2, 255]);
    let newest = here.layers[0].factors.k[0].sets.newest();
    here.import_sets(0, &mut reader(&exported(&there)), &mut map, usize::MAX).unwrap();
    assert_eq!(map[..4], [0, 15, 14, 255]);
    let (a, b) = (&here.layers[0].factors.k[0].sets, &there.layers[0].factors.k[0].sets);
    assert_eq!(a.get(14).unwrap().hash, b.get(2).unwrap().hash);
    assert_eq!((a.newest(), a.sinks().count()), (newest, 1));
    here.import_sets(0, &mut reader(&exported(&there)), &mut map, usize::MAX).unwrap();
    assert_eq!((map[1], map[2], a.count()), (15, 14, 5));
}

#[test]
fn a_full_head_refuses_an_import_and_nothing_changes() {
    let here = fed(100);
    let mut map = vec![9; 2 * KV * MAX_SETS];
    for seed in 0..20 {
        let there = Codec::new(desc()).unwrap();
        feed(&there, 0, 40, 100 + 10 * seed, 1);
        let before = hashes(&here);
        map.fill(9);
        if let Err(e) = here.import_sets(0, &mut reader(&exported(&there)), &mut map, usize::MAX) {
            assert_eq!(e.kind, ErrorKind::SetsFull);
            assert_eq!(before, hashes(&here));
            assert!(map.iter().all(|&x| x == 9));
            return;
        }
    }
    panic!("sixteen ids took twenty imports");
}

#[test]
fn bad_descriptions_are_refused() {
    assert!(Codec::new(CodecDesc { max_fits: 8, ..desc() }).unwrap_err().message.contains("max_fits is 8"));
    assert!(Codec::new(CodecDesc { layers: Vec::new(), ..desc() }).unwrap_err().message.contains("n_layers is 0"));
}

#[test]
fn queries_of_a_sharing_layer_join() {
    let codec = Codec::new(desc()).unwrap();
    let q = queries(40, 2 * KV * D, 3);
    let tokens = Tokens { n_tokens: 40, q: Some(Rows::from_f32(&q, 2 * KV, D)), kv: None, positions: None };
    codec.observe_shard(0, &tokens, 0, 1);
    assert!(!codec.is_fit_due(0));
    feed(&codec, 0, 100, 1, 1);
    let other = fed(100);
    assert_ne!(hashes(&codec), hashes(&other));
}
