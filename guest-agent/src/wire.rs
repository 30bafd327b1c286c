//! Frames over a blocking stream, and the last frame of a connection.
//!
//! Every stream has time-outs set by its owner; nothing here waits by itself.

use std::io::{self, Read, Write};
use torpor_api::guest::{
    FrameError, FrameType, GuestError, GuestErrorCode, GuestResponse, HEADER_LEN, MAX_PAYLOAD, decode_header,
    encode_header,
};

/// Most bytes of an error's message: operands can be paths of a megabyte.
const MAX_MESSAGE: usize = 4096;

/// Why a frame did not come.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer sent something that is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The connection broke.
    #[error("cannot read a frame")]
    Read(#[source] io::Error),
    /// The connection broke.
    #[error("cannot send a frame")]
    Write(#[source] io::Error),
}

/// Read a frame's type and length.
pub fn read_header(stream: &mut impl Read) -> Result<(FrameType, usize), WireError> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).map_err(WireError::Read)?;
    Ok(decode_header(header)?)
}

/// A whole frame as bytes.
pub fn frame(kind: FrameType, payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend_from_slice(&encode_header(kind, payload.len())?);
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// The last frame of an operation, as bytes.
pub fn outcome(result: Result<GuestResponse, GuestError>) -> Vec<u8> {
    let encoded = result.and_then(|response| {
        let json = serde_json::to_vec(&response).map_err(|e| error(GuestErrorCode::Os, e.to_string()))?;
        frame(FrameType::Response, &json).map_err(|_| {
            let message = format!(
                "the answer of {} bytes is over the limit of {MAX_PAYLOAD}",
                json.len()
            );
            error(GuestErrorCode::Os, message)
        })
    });
    encoded.unwrap_or_else(|error| {
        let json = serde_json::to_vec(&error).unwrap_or_default();
        frame(FrameType::Error, &json).unwrap_or_default()
    })
}

/// Send the last frame of an operation. A peer that is gone doesn't want it.
pub fn finish(stream: &mut impl Write, result: Result<GuestResponse, GuestError>) {
    let _ = stream.write_all(&outcome(result));
}

/// An error of bounded length.
pub fn error(code: GuestErrorCode, mut message: String) -> GuestError {
    if message.len() > MAX_MESSAGE {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE));
        message.push('…');
    }
    GuestError { code, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_about_a_huge_operand_still_fits_a_frame() {
        let bytes = outcome(Err(error(GuestErrorCode::Os, "\u{1}é".repeat(MAX_PAYLOAD))));
        let (kind, len) = read_header(&mut bytes.as_slice()).unwrap();
        assert_eq!(kind, FrameType::Error);
        assert_eq!(len, bytes.len() - HEADER_LEN);
    }

    #[test]
    fn a_response_over_the_limit_becomes_an_error() {
        let response = GuestResponse::Pong {
            version: "v".repeat(MAX_PAYLOAD),
        };
        let bytes = outcome(Ok(response));
        assert_eq!(read_header(&mut bytes.as_slice()).unwrap().0, FrameType::Error);
    }
}
