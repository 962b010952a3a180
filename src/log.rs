//! Log lines for the host. Nothing is printed: without a logger the lines are not even formatted.

use std::sync::{Arc, PoisonError, RwLock};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Error = 1,
    Warning = 2,
    Information = 3,
}

type Sink = Arc<dyn Fn(Level, &str) + Send + Sync>;

static SINK: RwLock<Option<Sink>> = RwLock::new(None);

/// Replaces the receiver of log lines. Calls under way may still use the previous one.
pub fn set_sink(sink: Option<Sink>) {
    *SINK.write().unwrap_or_else(PoisonError::into_inner) = sink;
}

/// Not for the paths of append and attend: a line is a heap string.
pub fn write(level: Level, line: impl FnOnce() -> String) {
    // Cloned out of the lock, so that a receiver may replace the receiver.
    let sink = SINK.read().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(sink) = sink {
        sink(level, &line());
    }
}

pub fn information(line: impl FnOnce() -> String) {
    write(Level::Information, line);
}
