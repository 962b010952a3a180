//! What every exported function runs inside: no panic reaches C, every error becomes a status and a message.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::last_error;
use super::types::*;
use crate::error::{Error, ErrorKind, Result};
use crate::log::{self, Level};

/// Runs a call that reports through its status.
pub(super) fn status(call: impl FnOnce() -> Result<dq_status>) -> dq_status {
    let error = match catch(call) {
        Ok(Ok(status)) => return status,
        Ok(Err(error)) => error,
        Err(message) => Error::new(ErrorKind::Internal, message),
    };
    last_error::set(&error.message);
    code(error.kind)
}

/// Runs a call that cannot report. `fallback` is what it returns after a panic.
pub(super) fn value<T>(fallback: T, call: impl FnOnce() -> T) -> T {
    catch(call).unwrap_or_else(|message| {
        last_error::set(&message);
        fallback
    })
}

/// The only map from errors to statuses.
fn code(kind: ErrorKind) -> dq_status {
    match kind {
        ErrorKind::InvalidArgument => DQ_ERROR_INVALID_ARGUMENT,
        ErrorKind::Unsupported => DQ_ERROR_UNSUPPORTED,
        ErrorKind::NoBackend => DQ_ERROR_NO_BACKEND,
        ErrorKind::OutOfMemory => DQ_ERROR_OUT_OF_MEMORY,
        ErrorKind::Workspace => DQ_ERROR_WORKSPACE,
        ErrorKind::BadFile => DQ_ERROR_BAD_FILE,
        ErrorKind::Io => DQ_ERROR_IO,
        ErrorKind::SetsFull => DQ_ERROR_SETS_FULL,
        ErrorKind::Cuda => DQ_ERROR_CUDA,
        ErrorKind::Capture => DQ_ERROR_CAPTURE,
        ErrorKind::Internal => DQ_ERROR_INTERNAL,
    }
}

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

fn catch<T>(call: impl FnOnce() -> T) -> std::result::Result<T, String> {
    silence_panics();
    DEPTH.set(DEPTH.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(call));
    DEPTH.set(DEPTH.get() - 1);
    result.map_err(|payload| format!("defect in libdecoquant: {}", text(&*payload)))
}

fn text(payload: &(dyn Any + Send)) -> &str {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "a panic without a message",
    }
}

/// The standard hook prints to the host's stderr. Panics inside a call go to the logger instead, with their place;
/// others, of a Rust host that links this crate, go where they went.
fn silence_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if DEPTH.get() == 0 {
                previous(info);
            } else {
                log::write(Level::Error, || info.to_string());
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn message() -> String {
        let mut out = [0; 256];
        let n = last_error::copy_to(&mut out);
        String::from_utf8_lossy(&out[..n]).into_owned()
    }

    #[test]
    fn a_panic_becomes_a_status() {
        let (zero, seven) = (std::hint::black_box(0), 7);
        assert_eq!(status(|| Ok(seven / zero)), DQ_ERROR_INTERNAL);
        assert!(message().contains("divide by zero"));
        assert_eq!(value(5, || panic!("number {seven}")), 5);
        assert!(message().contains("number 7"));
    }

    #[test]
    fn an_error_becomes_its_status_and_message() {
        assert_eq!(status(|| Err(Error::unsupported("plan is 5"))), DQ_ERROR_UNSUPPORTED);
        assert_eq!(message(), "plan is 5");
        assert_eq!(status(|| Ok(DQ_OK)), DQ_OK);
        assert_eq!(message(), "plan is 5");
    }

    /// Every function that C can call starts with the guard.
    #[test]
    fn every_export_is_guarded() {
        let mut exports = 0;
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("guard.rs") {
                    exports += check_exports(&path);
                }
            }
        }
        assert!(exports >= 29, "found only {exports} exports");
    }

    fn check_exports(path: &Path) -> usize {
        let source = fs::read_to_string(path).unwrap();
        let mut exports = 0;
        for part in source.split("no_mangle").skip(1) {
            let body = part.split_once('{').expect("a body").1.trim_start();
            let name = part.split("fn ").nth(1).and_then(|f| f.split('(').next()).unwrap_or("?");
            assert!(body.starts_with("guard::"), "{name} in {} is not guarded", path.display());
            exports += 1;
        }
        exports
    }
}
