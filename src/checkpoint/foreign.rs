//! What files hold that are not what their names say: text in another encoding, pointers of Git LFS.

/// The beginning of the text file that stands in a Git repository for a file of Git LFS.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";
const UTF_16: &str = "UTF-16 text: save it as UTF-8";

/// What is wrong with a file that is only a Git LFS pointer.
pub(super) fn lfs_pointer(bytes: &[u8]) -> Option<&'static str> {
    bytes.starts_with(LFS_POINTER).then_some("a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
}

/// Bytes at the beginning of a file that show its encoding.
pub const HEAD: usize = 4096;

/// What the beginning of a file that should hold UTF-8 text shows in its place, with the way out; `None` if nothing of
/// the kind is seen.
#[must_use]
pub fn foreign_text(head: &[u8]) -> Option<&'static str> {
    let head = &head[..head.len().min(HEAD)];
    // Without a mark, every second byte of mostly western text is zero.
    let zeros = |first: usize| head.iter().skip(first).step_by(2).filter(|&&byte| byte == 0).count();
    let (most, least) = (zeros(0).max(zeros(1)), zeros(0).min(zeros(1)));
    match head {
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => Some(UTF_16),
        _ if 4 * most > head.len() && 64 * least <= head.len() => Some(UTF_16),
        _ => lfs_pointer(head),
    }
}

/// As [`foreign_text`], for JSON: that has no byte order mark either.
#[must_use]
pub fn foreign_json(head: &[u8]) -> Option<&'static str> {
    let marked = head.starts_with(&[0xEF, 0xBB, 0xBF]);
    if marked { Some("begins with a byte order mark (BOM): save it as UTF-8 without one") } else { foreign_text(head) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_in_another_encoding_is_named() {
        let utf16 = |text: &str, order: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(order).collect::<Vec<u8>>();
        for text in ["{\"a\": 1}", "\u{feff}{}", "[]", "\u{e9}t\u{e9}: \u{20ac} 5"] {
            for order in [u16::to_le_bytes, u16::to_be_bytes] {
                assert_eq!(foreign_text(&utf16(text, order)), Some(UTF_16));
                assert_eq!(foreign_json(&utf16(text, order)), Some(UTF_16));
            }
        }
        let marked = "\u{feff}{}".as_bytes();
        assert!(foreign_json(marked).unwrap().contains("byte order mark"));
        assert_eq!(foreign_text(marked), None);
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
        assert!(foreign_text(pointer).unwrap().contains("git lfs pull"));
        for text in ["", "{", "{\"a\": 1}", "version", "\u{e9}", "one \0 in a text"] {
            assert_eq!((foreign_text(text.as_bytes()), foreign_json(text.as_bytes())), (None, None));
        }
        // What comes later does not show the encoding.
        let long = [&[b' '; HEAD][..], &[0; 2 * HEAD]].concat();
        assert_eq!(foreign_text(&long), None);
    }
}
