//! What files hold that are not what their names say: text in another encoding, pointers of Git LFS.

/// The beginning of the text file that stands in a Git repository for a file of Git LFS.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// What is wrong with a file that is only a Git LFS pointer.
pub(super) fn lfs_pointer(bytes: &[u8]) -> Option<&'static str> {
    bytes.starts_with(LFS_POINTER).then_some("a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
}

/// What a file that should hold UTF-8 text holds in its place, with the way out; `None` if nothing of the kind is seen.
#[must_use]
pub fn foreign_text(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0xEF, 0xBB, 0xBF, ..] => Some("begins with a byte order mark (BOM): save it as UTF-8 without one"),
        // A mark, or the zero byte of a first character that is ASCII.
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] | [1..=u8::MAX, 0, ..] | [0, 1..=u8::MAX, ..] => {
            Some("UTF-16 text: save it as UTF-8")
        }
        _ => lfs_pointer(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_in_another_encoding_is_named() {
        let utf16 = |text: &str, order: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(order).collect::<Vec<u8>>();
        for text in ["{\"a\": 1}", "\u{feff}{}", "[]"] {
            for order in [u16::to_le_bytes, u16::to_be_bytes] {
                assert!(foreign_text(&utf16(text, order)).unwrap().starts_with("UTF-16"));
            }
        }
        assert!(foreign_text("\u{feff}{}".as_bytes()).unwrap().contains("byte order mark"));
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
        assert!(foreign_text(pointer).unwrap().contains("git lfs pull"));
        for text in ["", "{", "{\"a\": 1}", "version", "\u{e9}"] {
            assert_eq!(foreign_text(text.as_bytes()), None);
        }
    }
}
