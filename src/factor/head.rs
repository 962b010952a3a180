//! One KV head and side: its sets, its statistics, when it is fitted, its sinks.

use half::f16;
use std::sync::{Mutex, MutexGuard};

use super::file::ReadHead;
use super::fit::{FitInput, fit, round_mean};
use super::moments::Moments;
use super::lock;
use super::sets::{FactorSet, HeadSets, ROTATION_SET};
use crate::error::{Error, Result};
use crate::shape::{Gauge, Side, SideShape, Tier};

/// Most sinks of a head and side.
pub const MAX_SINKS: usize = 4;
/// A position-0 row gets a sink of its own when its squared distance from every sink is more than this share of its
/// energy: nearer ones already take most of its error away.
const SINK_DISTANCE: f64 = 0.25;

/// Rows at which fit number `i` comes due: 16, 64, 512, 4096, then eightfold.
pub fn fit_due_at(i: usize) -> u64 {
    match i {
        0 => 16,
        1 => 64,
        _ => 512 << (3 * (i - 2)),
    }
}

/// What one KV head and side has learned. Readers use `sets` without a lock; observe and refit take turns.
#[derive(Debug)]
pub struct HeadFactors {
    pub sets: HeadSets,
    stats: Mutex<Stats>,
}

/// State of one head and side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadInfo {
    /// Sets in use, the rotation included.
    pub sets: usize,
    /// No further fit will come.
    pub frozen: bool,
    /// Rows that entered the statistics.
    pub rows_seen: u64,
    /// Bytes held for sets and the encode matrix.
    pub factor_bytes: usize,
    /// Bytes held for running moments.
    pub moment_bytes: usize,
    /// Rows until the next fit; `None` when none will come.
    pub rows_to_fit: Option<u64>,
}

/// Statistics and the plan of fits.
#[derive(Debug)]
pub(super) struct Stats {
    gauge: Gauge,
    tiers: Vec<Tier>,
    /// Position-0 rows make sinks.
    takes_sinks: bool,
    /// Mean of `|x - mean|^2` when the moments were dropped.
    spread: f64,
    pub(super) rows_seen: u64,
    /// Dropped when frozen.
    pub(super) running: Option<Running>,
}

#[derive(Debug)]
pub(super) struct Running {
    pub(super) rows: Moments,
    pub(super) queries: Option<Moments>,
    /// Fits that have come due, those skipped over included.
    due: usize,
    max_fits: usize,
}

impl HeadFactors {
    pub fn new(shape: &SideShape, side: Side, max_fits: usize) -> Self {
        let d = shape.head_dim;
        let learns = shape.gauge != Gauge::Rotation;
        let running = learns.then(|| Running {
            rows: Moments::centred(d, shape.gauge == Gauge::Attention),
            queries: (side == Side::K && shape.gauge == Gauge::Attention).then(|| Moments::about_zero(d)),
            due: 0,
            max_fits,
        });
        let stats = Stats {
            gauge: shape.gauge,
            tiers: shape.plan.tiers.clone(),
            takes_sinks: learns,
            spread: 0.0,
            rows_seen: 0,
            running,
        };
        Self { sets: HeadSets::rotation_only(d), stats: Mutex::new(stats) }
    }

    pub(super) fn stats(&self) -> MutexGuard<'_, Stats> {
        lock(&self.stats)
    }

    /// Whether [`Self::observe`] would do anything with rows.
    pub fn learns(&self) -> bool {
        let stats = self.stats();
        stats.takes_sinks || stats.running.is_some()
    }

    /// Takes one row, `[head_dim]`. A row at position 0 is a sink and stays out of the statistics.
    pub fn observe(&self, row: &[f32], at_zero: bool) {
        let mut stats = self.stats();
        if at_zero {
            if stats.takes_sinks {
                self.observe_sink(row, &stats);
            }
        } else if let Some(running) = &mut stats.running {
            running.rows.push(row);
        }
    }

    /// Takes one query of this head's group, `[head_dim]`, not at position 0.
    pub fn observe_query(&self, query: &[f32]) {
        if let Some(Running { queries: Some(queries), .. }) = &mut self.stats().running {
            queries.push(query);
        }
    }

    /// Whether queries are wanted.
    pub fn wants_queries(&self) -> bool {
        matches!(&self.stats().running, Some(Running { queries: Some(_), .. }))
    }

    fn observe_sink(&self, row: &[f32], stats: &Stats) {
        let energy: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        if !energy.is_finite() || self.sets.sinks().count() >= MAX_SINKS {
            return;
        }
        // An ordinary row that happens to be first is worth as much care as its neighbours; a huge one is not worth more
        // than they are, so the smaller of the two energies counts.
        let spread = stats.running.as_ref().map_or(stats.spread, |r| r.rows.spread());
        let scale = if spread > 0.0 { spread.min(energy) } else { energy };
        let near = |id: u8| {
            let mean = &self.sets.get(id).expect("sinks are sets").mean;
            let distance: f64 = row.iter().zip(mean).map(|(&x, m)| (f64::from(x) - m.to_f64()).powi(2)).sum();
            // The rounding of a mean to f16 is never a reason for a new sink.
            distance <= SINK_DISTANCE * scale || distance <= 1e-5 * energy
        };
        let mean = round_mean(row.iter().map(|&x| f64::from(x)));
        if self.sets.sinks().any(near) || mean.iter().all(|&x| x == f16::ZERO) {
            return;
        }
        // No free id: the row takes another set.
        let _ = self.sets.push_sink(FactorSet::rotation(mean));
    }

    /// Rows at which the next fit comes due; `None` when none will.
    pub fn next_fit_at(&self) -> Option<u64> {
        self.stats().running.as_ref().map(|r| fit_due_at(r.due))
    }

    /// Whether rows at position 0 make sinks.
    pub fn takes_sinks(&self) -> bool {
        self.stats().takes_sinks
    }

    /// Mean of `|x - mean|^2` of a head whose moments were dropped.
    pub fn frozen_spread(&self) -> f64 {
        self.stats().spread
    }

    /// Looks into the running moments of the rows, or of the queries, while they are kept.
    pub fn with_moments<T>(&self, queries: bool, look: impl FnOnce(&mut Moments) -> T) -> Option<T> {
        let mut stats = self.stats();
        let running = stats.running.as_mut()?;
        let moments = if queries { running.queries.as_mut()? } else { &mut running.rows };
        Some(look(moments))
    }

    /// Takes up a sink that a device has made under this id.
    pub fn take_sink(&self, id: u8, mean: Box<[f16]>) {
        match self.sets.get(id) {
            Some(_) => self.sets.add_sinks(1 << id),
            None => {
                self.sets.restore(id, FactorSet::rotation(mean), true);
            }
        }
    }

    /// Whether a fit has come due.
    pub fn is_fit_due(&self) -> bool {
        let stats = self.stats();
        stats.running.as_ref().is_some_and(|r| r.rows.rows_pushed() >= fit_due_at(r.due))
    }

    /// Fits and publishes if a fit has come due.
    pub fn refit(&self) {
        let Some(due) = self.take_due() else { return };
        let (set, matrix) = due.fit();
        let full = self.sets.push_fit(set, matrix).is_none();
        if full || due.last {
            self.freeze();
        }
    }

    /// What a fit that has come due is made from; the statistics go on meanwhile. Several that came due at once make one.
    pub fn take_due(&self) -> Option<DueFit> {
        let mut stats = self.stats();
        let Stats { gauge, tiers, running, .. } = &mut *stats;
        let running = running.as_mut()?;
        if running.rows.rows_pushed() < fit_due_at(running.due) {
            return None;
        }
        running.rows.flush();
        let rows = running.rows.rows();
        if rows < fit_due_at(running.due) {
            return None; // outliers were among the rows that waited
        }
        while running.due < running.max_fits && rows >= fit_due_at(running.due) {
            running.due += 1;
        }
        if let Some(queries) = &mut running.queries {
            queries.flush();
        }
        let last = running.due >= running.max_fits;
        Some(DueFit::new(running, *gauge, tiers, last))
    }

    /// Puts a fit into force under the id that a device gave it; `None`: it had none left, and refitting stops.
    pub fn publish(&self, id: Option<u8>, set: FactorSet, matrix: Option<Box<[f32]>>, last: bool) {
        if let Some(id) = id {
            self.sets.restore(id, set, false);
            self.sets.set_newest(id, matrix);
        }
        if last || id.is_none() {
            self.freeze();
        }
    }

    fn freeze(&self) {
        self.freeze_stats(&mut self.stats());
    }

    /// Puts an imported fit and its sinks (a bit per id) into force where nothing has been fitted yet: a state restored
    /// into a fresh context goes on as well as it did before. Fits that would know fewer rows than it did are skipped.
    pub(crate) fn adopt(&self, id: u8, encode: Option<Box<[f32]>>, sinks: u16, rows: u64) {
        let mut stats = self.stats();
        let stats = &mut *stats;
        let Some(running) = stats.running.as_mut().filter(|r| r.due == 0 && id != ROTATION_SET) else { return };
        self.sets.add_sinks(sinks);
        while running.due < running.max_fits && rows >= fit_due_at(running.due) {
            running.due += 1;
        }
        self.sets.set_newest(id, encode);
        if running.due >= running.max_fits {
            self.freeze_stats(stats);
        }
    }

    fn freeze_stats(&self, stats: &mut Stats) {
        if let Some(running) = stats.running.take() {
            stats.rows_seen = running.rows.rows();
            stats.spread = running.rows.spread();
        }
    }

    /// Takes a head of a factor file. No fits and no sinks come after.
    pub(crate) fn restore(&self, head: ReadHead) -> Result<()> {
        for read in head.sets {
            if !self.sets.restore(read.id, read.set, read.sink) {
                return Err(Error::bad_file(format!("the set id {} is taken", read.id)));
            }
        }
        self.sets.set_newest(head.newest, head.encode);
        let mut stats = self.stats();
        stats.running = None;
        stats.takes_sinks = false;
        stats.rows_seen = head.rows_seen;
        Ok(())
    }

    pub fn info(&self) -> HeadInfo {
        let stats = self.stats();
        let moment_bytes = |r: &Running| r.rows.bytes() + r.queries.as_ref().map_or(0, Moments::bytes);
        HeadInfo {
            sets: self.sets.count(),
            frozen: stats.running.is_none(),
            rows_seen: stats.running.as_ref().map_or(stats.rows_seen, |r| r.rows.rows_pushed()),
            factor_bytes: self.sets.bytes(),
            moment_bytes: stats.running.as_ref().map_or(0, moment_bytes),
            rows_to_fit: stats.running.as_ref().map(|r| fit_due_at(r.due).saturating_sub(r.rows.rows_pushed())),
        }
    }

    /// Most bytes that a head and side holds for sets, those imported from elsewhere not counted: all fits, the sinks, the
    /// rotation's mean and the fixed parts. Moments come on top until the last fit.
    pub fn max_bytes(shape: &SideShape, max_fits: usize) -> usize {
        let d = shape.head_dim;
        let fixed = size_of::<Self>() + 2 * d + shape.plan.tiers.len() * size_of::<Tier>();
        let (fit, encode) = match shape.gauge {
            Gauge::Rotation => return fixed,
            Gauge::Centred => (2 * d, 0),
            Gauge::Attention => (2 * d + 2 * d * d, 4 * (d * d + shape.plan.feedback_len())),
        };
        fixed + MAX_SINKS * 2 * d + max_fits * fit + encode
    }
}

/// A fit to be made, apart from the statistics that it is made from.
#[derive(Debug)]
pub struct DueFit {
    tiers: Vec<Tier>,
    rows: u64,
    mean: Box<[f16]>,
    /// Second moments of the rows about the mean, and of the queries; `None`: no matrices are learned.
    second: Option<(Vec<f64>, Option<Vec<f64>>)>,
    /// No further fit will come.
    pub last: bool,
    /// Rows at which the next one comes due.
    pub next_at: u64,
    /// Mean of `|x - mean|^2`.
    pub spread: f64,
}

impl DueFit {
    fn new(running: &Running, gauge: Gauge, tiers: &[Tier], last: bool) -> Self {
        let mean = round_mean(running.rows.mean());
        let second = (gauge == Gauge::Attention).then(|| {
            let exact: Vec<f64> = mean.iter().map(|x| x.to_f64()).collect();
            let about_zero = vec![0.0; exact.len()];
            (running.rows.second_about(&exact), running.queries.as_ref().map(|q| q.second_about(&about_zero)))
        });
        Self {
            tiers: tiers.to_vec(),
            rows: running.rows.rows(),
            mean,
            second,
            last,
            next_at: fit_due_at(running.due),
            spread: running.rows.spread(),
        }
    }

    /// A set and its encode matrix. Falls back to the rotation about the mean.
    pub fn fit(&self) -> (FactorSet, Option<Box<[f32]>>) {
        let mean = self.mean.clone();
        let Some((covariance, query)) = &self.second else {
            return (FactorSet::rotation(mean), None);
        };
        let input = FitInput { rows: self.rows, mean: &mean, covariance, query: query.as_deref(), tiers: &self.tiers };
        match fit(&input) {
            Some(f) => (FactorSet::dense(mean, f.decode, f.kappa), Some(f.encode)),
            None => (FactorSet::rotation(mean), None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::fit::tests::{queries, rows};
    use crate::factor::sets::Transform;
    use crate::shape::{LayerShape, SideDesc};

    fn head(d: usize, gauge: Gauge, max_fits: usize) -> HeadFactors {
        let desc = SideDesc { head_dim: d, plan: 4, gauge };
        HeadFactors::new(&LayerShape::new(1, 1, desc, desc).unwrap().k, Side::K, max_fits)
    }

    fn feed(head: &HeadFactors, x: &[f32], d: usize) {
        x.chunks_exact(d).for_each(|row| head.observe(row, false));
    }

    #[test]
    fn fits_come_at_16_64_512_and_4096() {
        let d = 64;
        let h = head(d, Gauge::Attention, 4);
        let x = rows(4200, d, 20.0, 1);
        let mut fits = Vec::new();
        for (t, row) in x.chunks_exact(d).enumerate() {
            h.observe(row, false);
            assert_eq!(h.is_fit_due(), [16, 64, 512, 4096].contains(&(t + 1)), "row {t}");
            if h.is_fit_due() {
                h.refit();
                fits.push((t + 1, h.sets.newest()));
            }
        }
        assert_eq!(fits, [(16, 1), (64, 2), (512, 3), (4096, 4)]);
        assert!(h.info().frozen && h.info().moment_bytes == 0 && h.info().rows_seen == 4096);
        assert_eq!(h.sets.encode().set, 4);
        assert!(h.sets.encode().matrix.is_some());
    }

    #[test]
    fn thresholds_crossed_at_once_make_one_fit() {
        let d = 64;
        let h = head(d, Gauge::Attention, 4);
        feed(&h, &rows(511, d, 20.0, 1), d);
        h.refit();
        assert_eq!((h.sets.count(), h.info().frozen), (2, false));
        assert!(!h.is_fit_due());
        feed(&h, &rows(1, d, 20.0, 2), d);
        assert!(h.is_fit_due());
        feed(&h, &rows(9000, d, 20.0, 3), d);
        h.refit();
        assert_eq!((h.sets.count(), h.info().frozen), (3, true));
    }

    #[test]
    fn gauges_learn_what_they_say() {
        let d = 80;
        let (rotation, centred) = (head(d, Gauge::Rotation, 4), head(d, Gauge::Centred, 4));
        for h in [&rotation, &centred] {
            h.observe(&vec![50.0; d], true);
            feed(h, &rows(100, d, 20.0, 1), d);
            h.refit();
        }
        assert_eq!((rotation.sets.count(), rotation.learns()), (1, false));
        assert_eq!(centred.sets.count(), 3);
        let set = centred.sets.get(centred.sets.newest()).unwrap();
        assert!(matches!(*set.transform, Transform::Rotation) && (set.mean[7].to_f32() - 20.0).abs() < 8.0);
        assert!(centred.sets.encode().matrix.is_none() && centred.sets.encode().set == centred.sets.newest());
    }

    #[test]
    fn sinks_are_few_and_far_apart() {
        let d = 64;
        let h = head(d, Gauge::Attention, 4);
        let sink = |i: usize| (0..d).map(|c| if c == i { 300.0 } else { 0.1 }).collect::<Vec<f32>>();
        h.observe(&vec![0.0; d], true);
        h.observe(&vec![1e-42; d], true);
        h.observe(&vec![f32::NAN; d], true);
        assert_eq!(h.sets.sinks().count(), 0);
        for _ in 0..3 {
            (0..2).for_each(|i| h.observe(&sink(i), true));
        }
        assert_eq!(h.sets.sinks().collect::<Vec<_>>(), [1, 2]);
        (0..9).for_each(|i| h.observe(&sink(i), true));
        assert_eq!(h.sets.sinks().count(), MAX_SINKS);
        h.observe(&vec![f32::MAX; d], true);
        assert_eq!(h.info().rows_seen, 0);
    }

    /// One row of 6e4 anywhere, sinks, NaN: the factors are the ones without it.
    #[test]
    fn wild_rows_do_not_touch_the_fit() {
        let d = 64;
        let (x, q) = (rows(200, d, 20.0, 1), queries(200, d, 2));
        let fitted = |wild_at: Option<usize>| {
            let h = head(d, Gauge::Attention, 4);
            for (t, (row, query)) in x.chunks_exact(d).zip(q.chunks_exact(d)).enumerate() {
                if wild_at == Some(t) {
                    for wild in [6e4, f32::NAN, f32::NEG_INFINITY] {
                        h.observe(&vec![wild; d], false);
                        h.observe_query(&vec![wild; d]);
                    }
                    h.observe(&vec![300.0; d], true);
                }
                h.observe(row, false);
                h.observe_query(query);
            }
            h.refit();
            h.sets.encode()
        };
        let clean = fitted(None);
        let clean = clean.matrix.as_ref().unwrap();
        for at in [0, 5, 15, 16, 40, 199] {
            let got = fitted(Some(at));
            let got = got.matrix.as_ref().unwrap();
            // Signs of eigenvectors are fixed, so close moments give close matrices up to weak, nearly equal channels.
            let gram = |m: &[f32]| m[..d].iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            assert!((gram(got) / gram(clean) - 1.0).abs() < 1e-3, "{at}");
        }
    }

    #[test]
    fn bytes_stay_under_the_bound() {
        for gauge in [Gauge::Rotation, Gauge::Centred, Gauge::Attention] {
            for max_fits in [1, 4] {
                let d = 64;
                let desc = SideDesc { head_dim: d, plan: 4, gauge };
                let shape = LayerShape::new(1, 1, desc, desc).unwrap();
                let h = head(d, gauge, max_fits);
                let bound = HeadFactors::max_bytes(&shape.k, max_fits);
                (0..9).for_each(|i| h.observe(&(0..d).map(|c| if c == i { 300.0 } else { 0.1 }).collect::<Vec<f32>>(), true));
                for row in rows(5000, d, 0.0, 1).chunks_exact(d) {
                    h.observe(row, false);
                    h.refit();
                    let info = h.info();
                    assert!(info.factor_bytes <= bound && (!info.frozen || info.moment_bytes == 0));
                }
            }
        }
    }

    #[test]
    fn any_rows_are_survived() {
        for d in [64, 80, 256] {
            for values in [[0.0, 0.0], [6e4, -6e4], [1e-42, 0.0], [f32::NAN, 1.0], [f32::MAX, f32::MIN], [1.0, 1.0]] {
                let h = head(d, Gauge::Attention, 4);
                for t in 0..80 {
                    let row: Vec<f32> = (0..d).map(|i| values[(i * t) % 2]).collect();
                    h.observe(&row, t == 0);
                    h.observe_query(&row);
                    h.refit();
                }
                for (_, set) in h.sets.iter() {
                    assert!(set.mean.iter().all(|x| x.is_finite()) && set.kappa.iter().all(|k| k.is_finite()));
                }
            }
        }
    }
}
