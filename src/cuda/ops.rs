//! The calls on a device. Nothing here allocates or waits in append and attend, so that a graph can hold them; what
//! varies from replay to replay (lengths, slots, factors) is read on the device.
//!
//! Statistics are summed on the device. Fits are made on the host, at the few calls of a model's life at which one is due:
//! the layer's sums come down and the factors go up, both in the order of the stream, which does not stand still
//! meanwhile. Only the calling thread waits; so `refit` may run on a thread of its own.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{Device, Kernel, Launch, Memory, SharedWords};
use super::launch::{self, LayerKernels};
use super::params::{self, DeviceRows, OBSERVE_ROWS};
use super::tables::{Made, TableLayout};
use super::view::{Address, Attend, Dequantize, Rows, Stream, Tokens, Workspace};
use super::Limits;
use crate::codec::{Codec, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::factor::DueFit;
use crate::shape::{LayerShape, Side};
use crate::view::MaskType;

const OBSERVE_THREADS: usize = 256;

/// A codec's memory on a device.
#[derive(Debug)]
pub struct DeviceCodec {
    layers: Vec<DeviceLayer>,
    memory: Memory,
    rows_seen: SharedWords,
    observe: Kernel,
    products: Kernel,
    publish: Kernel,
    device: Arc<Device>,
}

#[derive(Debug)]
struct DeviceLayer {
    kernels: LayerKernels,
    tables: TableLayout,
    /// Offset in the codec's memory; first word in `rows_seen`.
    at: usize,
    words: usize,
    /// Whoever brings a layer's sums down or its sets up; taken before `state`.
    fitting: Mutex<()>,
    state: Mutex<State>,
}

/// What the host knows of a layer's statistics without looking.
#[derive(Debug)]
struct State {
    /// No head and side has seen more rows than this, replays of graphs not counted.
    most_rows: u64,
    /// When the next fit comes due in any head; `None` when none will.
    next_fit: Option<u64>,
    takes_sinks: bool,
}

impl State {
    fn of(layer: &Layer, most_rows: u64) -> Self {
        let units = || layer.factors.units().map(|(_, _, f)| f);
        Self {
            most_rows,
            next_fit: units().filter_map(|f| f.next_fit_at()).min(),
            takes_sinks: units().any(|f| f.takes_sinks()),
        }
    }
}

const NO_STREAM: Stream = Stream(std::ptr::null_mut());

impl DeviceCodec {
    pub fn new(device: &Arc<Device>, codec: &Codec) -> Result<Self> {
        let _current = device.enter(NO_STREAM)?;
        let mut layers: Vec<DeviceLayer> = Vec::with_capacity(codec.layers.len());
        let (mut bytes, mut words) = (0usize, 0usize);
        for (index, layer) in codec.layers.iter().enumerate() {
            // Layers of one shape share the look-up.
            let same = codec.layers[..index].iter().position(|l| l.shape == layer.shape);
            let kernels = match same {
                Some(i) => layers[i].kernels.clone(),
                None => LayerKernels::new(device, &layer.shape)
                    .map_err(|e| Error::new(e.kind, format!("layer {index}: {e}")))?,
            };
            let tables = TableLayout::new(&layer.shape, codec.max_fits);
            let size = tables.bytes.next_multiple_of(256);
            let state = Mutex::new(State::of(layer, 0));
            layers.push(DeviceLayer { kernels, tables, at: bytes, words, fitting: Mutex::new(()), state });
            bytes += size;
            words += 2 * layer.shape.n_kv_heads;
        }
        let kernel = |name: &str| {
            let found = device.kernel(name)?;
            found.ok_or_else(|| Error::new(ErrorKind::Internal, format!("the kernels lack {name}")))
        };
        let made = Self {
            layers,
            memory: Memory::new(device, bytes)?,
            rows_seen: SharedWords::new(device, words)?,
            observe: kernel("dq_observe")?,
            products: kernel("dq_products")?,
            publish: kernel("dq_publish")?,
            device: device.clone(),
        };
        for (layer, on_device) in codec.layers.iter().zip(&made.layers) {
            on_device.tables.push(device, &made.memory, on_device.at, &layer.factors, NO_STREAM)?;
        }
        device.wait_all()?;
        Ok(made)
    }

    pub fn workspace_size(&self, codec: &Codec, layer: usize, limits: Limits) -> Result<usize> {
        launch::workspace_size(&codec.layers[layer].shape, &self.layers[layer].kernels, limits)
    }

    /// Statistics, a fit where one is due unless fits are deferred, records.
    pub fn compress(&self, codec: &Codec, layer: usize, tokens: &Tokens, stream: Stream) -> Result<()> {
        let _current = self.device.enter(stream)?;
        let sinks;
        let due = {
            let mut state = self.state(layer);
            let due = !codec.defers_fits && self.is_due(layer, &state, u64::from(tokens.n_tokens));
            if due && self.device.is_capturing(stream)? {
                return Err(Error::new(
                    ErrorKind::Capture,
                    format!("layer {layer}: a fit is due, which a graph cannot hold; compress outside of the capture first"),
                ));
            }
            // Of one token alone encode itself makes sinks: a launch less to each token that a chat decodes.
            sinks = state.next_fit.is_none() && tokens.n_tokens == 1 && self.layers[layer].kernels.encodes_alone(1);
            if !sinks {
                self.observe(codec, layer, &mut state, tokens, stream)?;
            }
            due
        };
        if due {
            self.fit(codec, layer, stream)?;
        }
        self.encode(codec, layer, tokens, sinks, stream)
    }

    /// Records with the sets in force, then statistics when q is given.
    pub fn append(&self, codec: &Codec, layer: usize, tokens: &Tokens, stream: Stream) -> Result<()> {
        let _current = self.device.enter(stream)?;
        self.encode(codec, layer, tokens, false, stream)?;
        if tokens.q.is_some() {
            self.observe(codec, layer, &mut self.state(layer), tokens, stream)?;
        }
        Ok(())
    }

    /// Fits where one is due, as far as the host can see without waiting.
    pub fn refit(&self, codec: &Codec, layers: Range<usize>, stream: Stream) -> Result<()> {
        let _current = self.device.enter(stream)?;
        for layer in layers {
            if !self.is_due(layer, &self.state(layer), 0) {
                continue;
            }
            if self.device.is_capturing(stream)? {
                return Err(Error::new(ErrorKind::Capture, format!("layer {layer}: a fit is due, which a graph cannot hold")));
            }
            self.fit(codec, layer, stream)?;
        }
        Ok(())
    }

    pub fn attend(&self, codec: &Codec, layer: usize, a: &Attend, workspace: Workspace, stream: Stream) -> Result<()> {
        let (shape, on_device) = (&codec.layers[layer].shape, &self.layers[layer]);
        let mut p = params::Attend {
            store: (&a.store).into(),
            k: self.factors(layer, Side::K),
            v: self.factors(layer, Side::V),
            q: (&a.q).into(),
            out: (&a.out).into(),
            sink_logits: a.sink_logits,
            block_table: a.block_table,
            q_starts: a.q_starts,
            lengths: a.kv_lengths,
            first_slot: a.first_slot,
            stream_slots: a.stream_slots,
            table_stride: a.table_stride,
            block_shift: a.block_shift,
            n_kv_heads: shape.n_kv_heads as u32,
            group: shape.group() as u32,
            n_streams: a.n_streams,
            n_q: a.n_q,
            n_kv: a.n_kv,
            window: a.window,
            causal: u32::from(a.causal),
            scale: a.scale,
            softcap: a.softcap,
            ..params::Attend::default()
        };
        if let Some(tail) = &a.tail {
            p.tail = params::Tail {
                k: (&tail.k).into(),
                v: (&tail.v).into(),
                starts: tail.starts,
                lengths: tail.lengths,
                n_rows: tail.n_rows,
                head_dim: shape.k.head_dim as u32,
                ..params::Tail::default()
            };
        }
        if let Some(mask) = &a.mask {
            p.mask = mask.data;
            p.mask_query_stride = mask.query_stride;
            p.mask_stream_stride = mask.stream_stride;
            p.mask_type = match mask.dtype {
                MaskType::F32 => 1,
                MaskType::F16 => 2,
            };
        }
        let plan = launch::plan_attend(shape, &on_device.kernels, &mut p, workspace)?;
        let device = &self.device;
        let _current = device.enter(stream)?;
        // SAFETY: `capi` checked what can be checked of the caller's pointers; tables and workspace are as large as the
        // kernels were told.
        unsafe {
            device.launch_early(&plan.fold, stream, &p)?;
            if let Some(tail) = &plan.tail {
                device.launch_early(tail, stream, &p)?;
            }
            device.launch_early(&plan.attend, stream, &p)?;
            device.launch_early(&plan.merge, stream, &p)
        }
    }

    pub fn dequantize(&self, codec: &Codec, layer: usize, d: &Dequantize, stream: Stream) -> Result<()> {
        let shape = &codec.layers[layer].shape;
        let rows = |rows: &Option<Rows>| rows.as_ref().map_or(DeviceRows::default(), DeviceRows::from);
        let p = params::Dequantize {
            store: (&d.store).into(),
            k: self.factors(layer, Side::K),
            v: self.factors(layer, Side::V),
            k_out: rows(&d.k),
            v_out: rows(&d.v),
            slots: d.slots,
            n: d.n_slots,
            n_kv_heads: shape.n_kv_heads as u32,
        };
        let _current = self.device.enter(stream)?;
        let launch = self.layers[layer].kernels.dequantize(shape, d.n_slots as usize);
        // SAFETY: as in attend.
        unsafe { self.device.launch(&launch, stream, &p) }
    }

    /// Rows in a layer's statistics: the most over its heads, as far as the device has told.
    pub fn rows_seen(&self, layer: usize) -> u64 {
        let first = self.layers[layer].words;
        let end = self.layers.get(layer + 1).map_or(usize::MAX, |l| l.words);
        (first..end).map_while(|i| self.rows_seen.try_get(i)).max().map_or(0, u64::from)
    }

    /// Rows until the next fit comes due in any head, at least; `None` when none will.
    pub fn rows_to_fit(&self, layer: usize) -> Option<u64> {
        self.rows_left(layer, &self.state(layer))
    }

    /// Brings what the device has made to the host, before it hands sets out or takes some in. Waits for the device.
    pub fn pull(&self, codec: &Codec, layers: Range<usize>) -> Result<()> {
        let _current = self.device.enter(NO_STREAM)?;
        self.device.wait_all()?;
        for layer in layers {
            let l = &self.layers[layer];
            let _fitting = l.fitting();
            l.tables.pull(&self.device, &self.memory, l.at, &codec.layers[layer].factors, NO_STREAM)?;
        }
        Ok(())
    }

    /// Brings a layer's sets to the device. Waits for it.
    pub fn push(&self, codec: &Codec, layer: usize) -> Result<()> {
        let _current = self.device.enter(NO_STREAM)?;
        let l = &self.layers[layer];
        let _fitting = l.fitting();
        l.tables.push(&self.device, &self.memory, l.at, &codec.layers[layer].factors, NO_STREAM)?;
        let mut state = self.state(layer);
        *state = State::of(&codec.layers[layer], state.most_rows);
        self.device.wait_all()
    }

    /// Dense sets of others that a layer's tables still take.
    pub fn dense_sets_left(&self, codec: &Codec, layer: usize) -> usize {
        self.layers[layer].tables.dense_left(&codec.layers[layer].factors)
    }

    fn state(&self, layer: usize) -> MutexGuard<'_, State> {
        self.layers[layer].state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn base(&self, layer: usize) -> Address {
        self.memory.data + self.layers[layer].at as u64
    }

    fn factors(&self, layer: usize, side: Side) -> params::Factors {
        self.layers[layer].tables.factors(self.base(layer), side)
    }

    fn rows_left(&self, layer: usize, state: &State) -> Option<u64> {
        // What the host counted, or what the device has told since: replays of graphs are told only by the device.
        let seen = state.most_rows.max(self.rows_seen(layer));
        state.next_fit.map(|at| at.saturating_sub(seen))
    }

    /// Whether a fit is due once `more` rows are there.
    fn is_due(&self, layer: usize, state: &State, more: u64) -> bool {
        self.rows_left(layer, state).is_some_and(|rows| more >= rows)
    }

    fn observe(&self, codec: &Codec, layer: usize, state: &mut State, tokens: &Tokens, stream: Stream) -> Result<()> {
        if state.next_fit.is_none() && !(state.takes_sinks && tokens.positions != 0) {
            return Ok(());
        }
        let shape = &codec.layers[layer].shape;
        let learns = state.next_fit.is_some();
        // Queries are a group of rows to a token.
        let per_token = if tokens.q.is_some() && learns { shape.group() } else { 1 };
        for first in (0..tokens.n_tokens as usize * per_token).step_by(OBSERVE_ROWS) {
            let p = params::Observe {
                k_rows: (&tokens.k).into(),
                v_rows: (&tokens.v).into(),
                q_rows: tokens.q.as_ref().map_or(DeviceRows::default(), DeviceRows::from),
                positions: tokens.positions,
                n: tokens.n_tokens,
                first: first as u32,
                ..self.statistics(codec, layer)
            };
            self.launch_observe(shape, &p, learns, stream)?;
        }
        state.most_rows += u64::from(tokens.n_tokens);
        Ok(())
    }

    /// The statistics of a layer, without rows.
    fn statistics(&self, codec: &Codec, layer: usize) -> params::Observe {
        let (shape, l, base) = (&codec.layers[layer].shape, &self.layers[layer], self.base(layer));
        let (k, v) = (self.factors(layer, Side::K), self.factors(layer, Side::V));
        let (entered, entered_stride) = l.tables.entered(base);
        params::Observe {
            k: l.tables.units(base, 0),
            v: l.tables.units(base, 1),
            q: l.tables.units(base, 2),
            k_heads: k.heads,
            v_heads: v.heads,
            k_means: k.means,
            v_means: v.means,
            rows_seen: self.rows_seen.data + 4 * l.words as u64,
            entered,
            entered_stride,
            n_kv_heads: shape.n_kv_heads as u32,
            group: shape.group() as u32,
            ..params::Observe::default()
        }
    }

    /// Without anything left to learn only K and V at position 0 matter.
    fn launch_observe(&self, shape: &LayerShape, p: &params::Observe, learns: bool, stream: Stream) -> Result<()> {
        let device = &self.device;
        let tiles = shape.k.head_dim.max(shape.v.head_dim).div_ceil(32);
        let (heads, tiles) = (shape.n_kv_heads, tiles * (tiles + 1) / 2);
        let observe = |kinds| Launch { kernel: self.observe, grid: (heads, kinds, 1), threads: OBSERVE_THREADS, shared: 0 };
        let products = Launch { kernel: self.products, grid: (tiles, heads, 3), threads: OBSERVE_THREADS, shared: 0 };
        // SAFETY: as in attend.
        unsafe {
            if !learns {
                return device.launch_early(&observe(2), stream, p);
            }
            if p.flush == 0 {
                device.launch_early(&observe(3), stream, p)?;
            } else {
                device.launch_early(&observe(2), stream, p)?;
                device.launch_early(&observe(1), stream, &params::Observe { flush: 2, ..*p })?;
            }
            device.launch_early(&products, stream, p)
        }
    }

    fn encode(&self, codec: &Codec, layer: usize, tokens: &Tokens, sinks: bool, stream: Stream) -> Result<()> {
        let (shape, l, base) = (&codec.layers[layer].shape, &self.layers[layer], self.base(layer));
        let sinks = if sinks {
            params::Sinks { positions: tokens.positions, k: l.tables.units(base, 0), v: l.tables.units(base, 1) }
        } else {
            params::Sinks::default()
        };
        let (joined, arrived) = l.tables.joined(base);
        let p = params::Encode {
            store: (&tokens.store).into(),
            k: self.factors(layer, Side::K),
            v: self.factors(layer, Side::V),
            k_rows: (&tokens.k).into(),
            v_rows: (&tokens.v).into(),
            slots: tokens.slots,
            status: tokens.replaced_rows,
            sinks,
            joined,
            arrived,
            n: tokens.n_tokens,
            n_kv_heads: shape.n_kv_heads as u32,
        };
        let launch = l.kernels.encode(shape, tokens.n_tokens as usize);
        // SAFETY: as in attend.
        unsafe { self.device.launch_early(&launch, stream, &p) }
    }

    /// Sums down, fits where they are due, factors up.
    fn fit(&self, codec: &Codec, layer: usize, stream: Stream) -> Result<()> {
        let (l, Layer { shape, factors }) = (&self.layers[layer], &codec.layers[layer]);
        let _fitting = l.fitting();
        let p = params::Observe { flush: 1, ..self.statistics(codec, layer) };
        {
            // Another thread's launches must not come between those of one observation, which hand each other a list of rows.
            let _state = self.state(layer);
            self.launch_observe(shape, &p, true, stream)?;
        }
        l.tables.pull(&self.device, &self.memory, l.at, factors, stream)?;
        let due: Vec<_> = factors.units().map(|(_, _, unit)| unit.take_due()).collect();
        let rows = self.rows_seen(layer);
        if due.iter().any(Option::is_some) {
            crate::log::information(|| format!("layer {layer}: a fit is due after {rows} rows"));
            let made = |due: DueFit| {
                let (set, encode) = due.fit();
                Made { due, set, encode }
            };
            let made: Vec<_> = due.into_iter().map(|due| due.map(made)).collect();
            let ids = l.tables.publish(&self.device, self.publish, &self.memory, l.at, factors, &made, stream)?;
            for (((_, _, unit), made), id) in factors.units().zip(made).zip(ids) {
                if let Some(Made { due, set, encode }) = made {
                    unit.publish((id != 0).then_some(id), set, encode, due.last);
                }
            }
        }
        let mut state = self.state(layer);
        *state = State::of(&codec.layers[layer], rows);
        Ok(())
    }
}

impl DeviceLayer {
    fn fitting(&self) -> MutexGuard<'_, ()> {
        self.fitting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
