//! The header of every vsock packet.

/// Length of a header in bytes.
pub(crate) const HEADER_BYTES: usize = 44;

/// The host's context ID.
pub(crate) const HOST_CID: u64 = 2;
/// Stream sockets.
pub(crate) const TYPE_STREAM: u16 = 1;

/// Connect.
pub(crate) const OP_REQUEST: u16 = 1;
/// Accepted.
pub(crate) const OP_RESPONSE: u16 = 2;
/// No such connection, or no more.
pub(crate) const OP_RST: u16 = 3;
/// No more in a direction.
pub(crate) const OP_SHUTDOWN: u16 = 4;
/// Data.
pub(crate) const OP_RW: u16 = 5;
/// Only the credit fields.
pub(crate) const OP_CREDIT_UPDATE: u16 = 6;
/// Asks for the credit fields.
pub(crate) const OP_CREDIT_REQUEST: u16 = 7;

/// The sender of the SHUTDOWN receives no more.
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of the SHUTDOWN sends no more.
pub(crate) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(crate) const SHUTDOWN_BOTH: u32 = 3;

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Header {
    pub(crate) src_cid: u64,
    pub(crate) dst_cid: u64,
    pub(crate) src_port: u32,
    pub(crate) dst_port: u32,
    pub(crate) len_bytes: u32,
    pub(crate) socket_type: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
}

impl Header {
    /// From the ring.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len_bytes: u32::from_le_bytes(take(&mut rest)),
            socket_type: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// To the ring.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = &mut bytes[..];
        put(&mut rest, &self.src_cid.to_le_bytes());
        put(&mut rest, &self.dst_cid.to_le_bytes());
        put(&mut rest, &self.src_port.to_le_bytes());
        put(&mut rest, &self.dst_port.to_le_bytes());
        put(&mut rest, &self.len_bytes.to_le_bytes());
        put(&mut rest, &self.socket_type.to_le_bytes());
        put(&mut rest, &self.op.to_le_bytes());
        put(&mut rest, &self.flags.to_le_bytes());
        put(&mut rest, &self.buf_alloc.to_le_bytes());
        put(&mut rest, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    if let Some((front, back)) = rest.split_at_checked(N) {
        bytes.copy_from_slice(front);
        *rest = back;
    }
    bytes
}

fn put(rest: &mut &mut [u8], field: &[u8]) {
    let (front, back) = std::mem::take(rest).split_at_mut(field.len());
    front.copy_from_slice(field);
    *rest = back;
}
