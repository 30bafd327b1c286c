//! Bytes of processes as JSON that clients of every kind read.

use serde_json::Value;

/// Turns chunks of UTF-8, cut anywhere, into texts; what is no UTF-8 is replaced.
#[derive(Debug, Default)]
pub(in crate::api) struct Decoder {
    /// The beginning of a character whose end has not come.
    rest: Vec<u8>,
}

impl Decoder {
    pub(in crate::api) fn push(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let begun = unfinished_len(&self.rest);
        let whole = self.rest.len() - begun;
        let text = String::from_utf8_lossy(self.rest.get(..whole).unwrap_or_default()).into_owned();
        self.rest.drain(..whole);
        text
    }

    /// What is left when nothing follows.
    pub(in crate::api) fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.rest)).into_owned()
    }
}

/// Length of a character at the end that may still be completed.
fn unfinished_len(bytes: &[u8]) -> usize {
    let longest = bytes.len().min(3);
    let begins = |len: &usize| {
        let tail = bytes.get(bytes.len() - len..).unwrap_or_default();
        matches!(std::str::from_utf8(tail), Err(error) if error.error_len().is_none() && error.valid_up_to() == 0)
    };
    (1..=longest).find(begins).unwrap_or(0)
}

/// JSON in ASCII: line-wise clients take some other characters for the end of a line.
pub(in crate::api) fn ascii_json(value: &Value) -> String {
    let mut text = String::new();
    for character in value.to_string().chars() {
        if character.is_ascii() {
            text.push(character);
            continue;
        }
        let mut units = [0; 2];
        for unit in character.encode_utf16(&mut units) {
            text.push_str(&format!("\\u{unit:04x}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn nothing_in_a_line_ends_a_line() {
        let hostile = "a\u{2028}b\u{2029}c\u{85}d\u{b}e\u{c}f\u{1c}g\u{1d}h\u{1e}i\nj\rk é 🦀";
        let line = ascii_json(&json!({ "content": hostile }));
        assert!(line.bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{line}");
        let read: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["content"], hostile);
    }

    #[test]
    fn what_is_no_text_does_not_hold_up_what_is() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(b"\xff\xfea"), "\u{fffd}\u{fffd}a");
        assert_eq!(decoder.push(&[0xf0, 0x9f]), "");
        assert_eq!(decoder.finish(), "\u{fffd}");
    }

    proptest! {
        #[test]
        fn text_comes_whole_however_it_is_cut(text in "\\PC{0,40}", cuts in prop::collection::vec(0..200_usize, 0..8)) {
            let (mut decoder, mut out, mut rest) = (Decoder::default(), String::new(), text.as_bytes());
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                out.push_str(&decoder.push(head));
                rest = tail;
            }
            out.push_str(&decoder.push(rest));
            out.push_str(&decoder.finish());
            prop_assert_eq!(out, text);
        }
    }
}
