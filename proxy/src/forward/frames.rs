//! Where one WebSocket frame ends and the next begins (RFC 6455, 5.2), and which of them are control frames.
//!
//! It looks at headers only and changes nothing: data frames pass in whatever pieces they come, control frames are
//! put together, because they may be answered here. What is not WebSocket counts as data from there on.

/// Most bytes of a control frame's payload.
const MAX_CONTROL_BYTES: usize = 125;

pub(super) const CLOSE: u8 = 0x8;
pub(super) const PING: u8 = 0x9;
const PONG: u8 = 0xa;
const FIN: u8 = 0x80;

/// A part of the stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Bytes of data frames, their headers included.
    Data(&'a [u8]),
    /// A whole control frame.
    Control(Control),
}

/// A control frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Control {
    pub(super) opcode: u8,
    /// As it came.
    pub(super) frame: Vec<u8>,
    /// Without its mask.
    pub(super) payload: Vec<u8>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Start,
    Len {
        control: Option<Vec<u8>>,
    },
    Extended {
        control: Option<Vec<u8>>,
        len_bytes: u64,
        len_left: u8,
        mask: [u8; 4],
        mask_left: u8,
    },
    Body {
        control: Option<Vec<u8>>,
        left: u64,
        mask: [u8; 4],
    },
    /// Not WebSocket.
    Broken,
}

/// One direction of a WebSocket.
#[derive(Debug, Default)]
pub(super) struct Frames(State);

impl Frames {
    /// Whether a frame of ours may be put here.
    pub(super) fn is_between(&self) -> bool {
        matches!(self.0, State::Start)
    }

    /// The pieces of what came next, in order.
    pub(super) fn split<'a>(&mut self, input: &'a [u8]) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let mut data_from = 0;
        let mut at = 0;
        while at < input.len() {
            let was_control = self.is_control();
            at += self.advance(&input[at..]);
            let is_control = self.is_control();
            if is_control && !was_control {
                // The byte that began it was its first.
                push_data(&mut pieces, &input[data_from..at - 1]);
            }
            if let Some(control) = self.finished() {
                pieces.push(Piece::Control(control));
                data_from = at;
            } else if is_control {
                data_from = at;
            }
        }
        push_data(&mut pieces, &input[data_from.min(input.len())..]);
        pieces
    }

    fn is_control(&self) -> bool {
        match &self.0 {
            State::Len { control } | State::Extended { control, .. } | State::Body { control, .. } => {
                control.is_some()
            }
            State::Start | State::Broken => false,
        }
    }

    /// Takes some bytes, at least one, and answers how many.
    fn advance(&mut self, input: &[u8]) -> usize {
        let Some(&byte) = input.first() else { return 0 };
        let mut n_taken = 1;
        self.0 = match std::mem::take(&mut self.0) {
            State::Start => State::Len {
                control: (byte & 0x8 != 0).then(|| vec![byte]),
            },
            State::Len { control } => after_len(control, byte),
            State::Extended {
                mut control,
                mut len_bytes,
                mut len_left,
                mut mask,
                mut mask_left,
            } => {
                if let Some(frame) = &mut control {
                    frame.push(byte);
                }
                if len_left > 0 {
                    len_bytes = len_bytes << 8 | u64::from(byte);
                    len_left -= 1;
                } else {
                    mask[usize::from(4 - mask_left)] = byte;
                    mask_left -= 1;
                }
                body_or(control, len_bytes, len_left, mask, mask_left)
            }
            State::Body {
                mut control,
                left,
                mask,
            } => {
                n_taken = usize::try_from(left).map_or(input.len(), |left| left.min(input.len()));
                if let Some(frame) = &mut control {
                    frame.extend_from_slice(&input[..n_taken]);
                }
                body(control, left - n_taken as u64, mask)
            }
            State::Broken => {
                n_taken = input.len();
                State::Broken
            }
        };
        n_taken
    }

    /// The control frame that is complete now.
    fn finished(&mut self) -> Option<Control> {
        let State::Body {
            control: Some(_),
            left: 0,
            mask,
        } = self.0
        else {
            return None;
        };
        let State::Body {
            control: Some(frame), ..
        } = std::mem::take(&mut self.0)
        else {
            return None;
        };
        let masked = frame.get(1).is_some_and(|byte| byte & 0x80 != 0);
        let body_at = if masked { 6 } else { 2 };
        let payload = frame.iter().skip(body_at).zip(mask.iter().cycle());
        Some(Control {
            opcode: frame[0] & 0xf,
            payload: payload.map(|(byte, mask)| byte ^ mask).collect(),
            frame,
        })
    }
}

fn after_len(mut control: Option<Vec<u8>>, byte: u8) -> State {
    if let Some(frame) = &mut control {
        frame.push(byte);
    }
    let (len, mask_left) = (byte & 0x7f, if byte & 0x80 == 0 { 0 } else { 4 });
    let len_left = match len {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    if control.is_some() && usize::from(len) > MAX_CONTROL_BYTES {
        return State::Broken;
    }
    let len_bytes = if len_left == 0 { u64::from(len) } else { 0 };
    body_or(control, len_bytes, len_left, [0; 4], mask_left)
}

fn body_or(control: Option<Vec<u8>>, len_bytes: u64, len_left: u8, mask: [u8; 4], mask_left: u8) -> State {
    if len_left == 0 && mask_left == 0 {
        return body(control, len_bytes, mask);
    }
    State::Extended {
        control,
        len_bytes,
        len_left,
        mask,
        mask_left,
    }
}

fn body(control: Option<Vec<u8>>, left: u64, mask: [u8; 4]) -> State {
    // A control frame stays until it is taken.
    if left == 0 && control.is_none() {
        return State::Start;
    }
    State::Body { control, left, mask }
}

fn push_data<'a>(pieces: &mut Vec<Piece<'a>>, data: &'a [u8]) {
    if !data.is_empty() {
        pieces.push(Piece::Data(data));
    }
}

/// A server's answer to a ping.
pub(super) fn pong(payload: &[u8]) -> Vec<u8> {
    server_control(PONG, payload)
}

/// A server's close.
pub(super) fn close(payload: &[u8]) -> Vec<u8> {
    server_control(CLOSE, payload)
}

fn server_control(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(MAX_CONTROL_BYTES)];
    let mut frame = vec![FIN | opcode, u8::try_from(payload.len()).unwrap_or(0)];
    frame.extend_from_slice(payload);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [1, 2, 3, 4];
        let mut frame = vec![FIN | opcode];
        match payload.len() {
            len @ 0..=125 => frame.push(0x80 | u8::try_from(len).unwrap()),
            len @ 126..=65_535 => {
                frame.push(0x80 | 126);
                frame.extend_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
            }
            len => {
                frame.push(0x80 | 127);
                frame.extend_from_slice(&(len as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(&mask);
        frame.extend(
            payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, mask)| byte ^ mask),
        );
        frame
    }

    type Found = (Vec<u8>, Vec<(u8, Vec<u8>)>, bool);

    fn all(stream: &[u8], step: usize) -> Found {
        let (mut frames, mut data, mut control) = (Frames::default(), Vec::new(), Vec::new());
        for input in stream.chunks(step) {
            for piece in frames.split(input) {
                match piece {
                    Piece::Data(bytes) => data.extend_from_slice(bytes),
                    Piece::Control(one) => control.push((one.opcode, one.payload)),
                }
            }
        }
        (data, control, frames.is_between())
    }

    #[test]
    fn control_frames_are_found_between_data_however_the_stream_is_cut() {
        let parts = [
            masked(1, b"hello"),
            masked(PING, b"a"),
            masked(2, &[7; 300]),
            masked(PING, b""),
            masked(PONG, b"pp"),
            masked(1, b""),
            masked(2, &[9; 70_000]),
            masked(CLOSE, &[3, 232]),
        ];
        let stream = parts.concat();
        let data = [&parts[0][..], &parts[2], &parts[5], &parts[6]].concat();
        for step in [1, 2, 3, 7, 64, 1000, stream.len()] {
            let (found, control, between) = all(&stream, step);
            assert!(found == data, "cut into {step}");
            let expected = [
                (PING, b"a".to_vec()),
                (PING, Vec::new()),
                (PONG, b"pp".to_vec()),
                (CLOSE, vec![3, 232]),
            ];
            assert_eq!(control, expected, "cut into {step}");
            assert!(between);
        }
    }

    #[test]
    fn inside_a_frame_is_no_place_for_another() {
        let mut frames = Frames::default();
        frames.split(&masked(1, b"hello")[..4]);
        assert!(!frames.is_between());
        frames.split(&masked(1, b"hello")[4..]);
        assert!(frames.is_between());
    }

    #[test]
    fn what_is_not_websocket_passes_as_data() {
        let mut stream = vec![FIN | PING, 0x80 | 126];
        stream.extend_from_slice(b"and on it goes");
        let (data, control, between) = all(&stream, 3);
        assert!(control.is_empty() && !between);
        assert!(stream.ends_with(&data) && data.len() >= 14, "{data:?}");
    }

    #[test]
    fn an_answer_is_a_frame_of_its_own() {
        let (_, control, between) = all(&pong(b"xy"), 1);
        assert_eq!((control, between), (vec![(PONG, b"xy".to_vec())], true));
    }
}
