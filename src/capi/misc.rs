//! Names, numbers, messages and the logger: calls that never fail.

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::Arc;

use super::convert;
use super::types::*;
use super::{guard, last_error};
use crate::{cuda, log, shape};

/// Version of the library, as "0.1.0". Never fails; the text lives as long as the library.
#[unsafe(no_mangle)]
pub extern "C" fn dq_version() -> *const c_char {
    guard::value(std::ptr::null(), || concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast())
}

/// Number of the binary interface, the one in the SONAME. A program built against another number must not go on.
#[unsafe(no_mangle)]
pub extern "C" fn dq_abi_version() -> u32 {
    guard::value(0, || DQ_ABI_VERSION)
}

/// The numbers of the header are those of the manifest, from which the SONAME is made, too.
const _: () = {
    assert!(is(env!("CARGO_PKG_VERSION_MAJOR"), DQ_VERSION_MAJOR));
    assert!(is(env!("CARGO_PKG_VERSION_MINOR"), DQ_VERSION_MINOR));
    assert!(is(env!("CARGO_PKG_VERSION_PATCH"), DQ_VERSION_PATCH));
    assert!(is(env!("DECOQUANT_ABI"), DQ_ABI_VERSION));
};

/// Whether a text of digits is a number.
const fn is(text: &str, number: u32) -> bool {
    let (digits, mut value, mut i) = (text.as_bytes(), 0, 0);
    while i < digits.len() {
        value = 10 * value + (digits[i] - b'0') as u32;
        i += 1;
    }
    value == number
}

/// Name of a status, as "DQ_OK"; "DQ_ERROR_UNKNOWN" for a number that is none. Never fails.
#[unsafe(no_mangle)]
pub extern "C" fn dq_status_name(status: dq_status) -> *const c_char {
    guard::value(std::ptr::null(), || {
        let name = match status {
            DQ_OK => c"DQ_OK",
            DQ_ERROR_INVALID_ARGUMENT => c"DQ_ERROR_INVALID_ARGUMENT",
            DQ_ERROR_UNSUPPORTED => c"DQ_ERROR_UNSUPPORTED",
            DQ_ERROR_NO_BACKEND => c"DQ_ERROR_NO_BACKEND",
            DQ_ERROR_OUT_OF_MEMORY => c"DQ_ERROR_OUT_OF_MEMORY",
            DQ_ERROR_WORKSPACE => c"DQ_ERROR_WORKSPACE",
            DQ_ERROR_BAD_FILE => c"DQ_ERROR_BAD_FILE",
            DQ_ERROR_IO => c"DQ_ERROR_IO",
            DQ_ERROR_SETS_FULL => c"DQ_ERROR_SETS_FULL",
            DQ_ERROR_CUDA => c"DQ_ERROR_CUDA",
            DQ_ERROR_CAPTURE => c"DQ_ERROR_CAPTURE",
            DQ_ERROR_INTERNAL => c"DQ_ERROR_INTERNAL",
            DQ_ROWS_REPLACED => c"DQ_ROWS_REPLACED",
            _ => c"DQ_ERROR_UNKNOWN",
        };
        name.as_ptr()
    })
}

/// Short name of a code plan, as "4"; null for a number that is no plan of this library. Never fails; the text lives
/// as long as the library.
#[unsafe(no_mangle)]
pub extern "C" fn dq_plan_name(plan: u32) -> *const c_char {
    guard::value(std::ptr::null(), || shape::plan_name(plan).map_or(std::ptr::null(), CStr::as_ptr))
}

/// Backends in this build, as a set of bits `1 << DQ_BACKEND_*`. Says nothing about devices. Never fails.
#[unsafe(no_mangle)]
pub extern "C" fn dq_backends() -> u32 {
    guard::value(0, || 1 << DQ_BACKEND_CPU | u32::from(cuda::COMPILED_IN) << DQ_BACKEND_CUDA)
}

/// This thread's message: one sentence about its last call that did not return `DQ_OK`; empty before the first.
///
/// `buf`: receives the text, UTF-8, zero-terminated and cut to `capacity` bytes; null with capacity 0 to ask for the
/// length. Returns the length of the whole text without the zero, below 1024. Never fails.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_last_error(buf: *mut c_char, capacity: u64) -> u64 {
    guard::value(0, || {
        // SAFETY: the header's contract.
        let out = unsafe { convert::bytes_mut("buf", buf.cast(), capacity, capacity.min(1024) as usize) };
        last_error::copy_to(out.unwrap_or_default()) as u64
    })
}

/// Sets the receiver of the library's log lines, for the whole process; null: none, as at the start. The library tells
/// of fits, loads, imports and its own defects; it never prints.
///
/// `log` is called from threads that are inside other calls, from several at once, and may call the functions that
/// never fail. Calls under way may still use the previous receiver when this one returns: keep its `user` alive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_set_logger(log: dq_log_fn, user: *mut c_void) {
    guard::value((), || {
        log::set_sink(log.map(|call| {
            let user = User(user);
            let sink = move |level: log::Level, line: &str| {
                let line = CString::new(line.replace('\0', " ")).unwrap_or_default();
                // SAFETY: the header's contract; the line is zero-terminated.
                unsafe { call(level as u32, line.as_ptr(), user.get()) };
            };
            Arc::new(sink) as Arc<dyn Fn(log::Level, &str) + Send + Sync>
        }));
    });
}

/// The logger's own pointer: handed back, never followed.
struct User(*mut c_void);

impl User {
    fn get(&self) -> *mut c_void {
        self.0
    }
}

// SAFETY: the header says that the logger is called from any thread with it.
unsafe impl Send for User {}
// SAFETY: as above.
unsafe impl Sync for User {}
