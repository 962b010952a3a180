//! The message of the last call of this thread that did not return `DQ_OK`.

use std::cell::RefCell;

/// The header promises: below 1024 with its zero.
const CAPACITY: usize = 1023;

struct Message {
    len: usize,
    text: [u8; CAPACITY],
}

thread_local! {
    // A plain buffer: no destructor that could run after the host has closed the library, no allocation on the way
    // out of a call that ran out of memory.
    static MESSAGE: RefCell<Message> = const { RefCell::new(Message { len: 0, text: [0; CAPACITY] }) };
}

/// Keeps `text`, cut at a character when it is too long.
pub(super) fn set(text: &str) {
    let len = boundary(text, CAPACITY);
    MESSAGE.with_borrow_mut(|m| {
        m.text[..len].copy_from_slice(&text.as_bytes()[..len]);
        m.len = len;
    });
}

/// Copies the message into `out`, zero-terminated and cut to fit. Returns its whole length without the zero.
pub(super) fn copy_to(out: &mut [u8]) -> usize {
    MESSAGE.with_borrow(|m| {
        if let Some(room) = out.len().checked_sub(1) {
            let text = std::str::from_utf8(&m.text[..m.len]).unwrap_or_default();
            let n = boundary(text, room);
            out[..n].copy_from_slice(&m.text[..n]);
            out[n] = 0;
        }
        m.len
    })
}

/// The longest prefix within `limit` bytes that ends between characters.
fn boundary(text: &str, limit: usize) -> usize {
    let mut len = text.len().min(limit);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_cut_at_a_character_and_terminated() {
        set("größe");
        let mut out = [0xAA; 5];
        assert_eq!(copy_to(&mut out), 7);
        assert_eq!(&out[..5], b"gr\xC3\xB6\0");
        assert_eq!(copy_to(&mut []), 7);
        set(&"ä".repeat(CAPACITY));
        assert_eq!(copy_to(&mut [0; 2 * CAPACITY]), CAPACITY - 1);
    }
}
