//! A TCP connection made here on behalf of a client of the host, which so reaches what listens on the guest's
//! loopback only.
//!
//! Two threads, one per direction, each with one buffer: a side that does not read stalls the other, which is all
//! the back-pressure there is. Either side's end of file is passed on; a side that breaks takes the other with it.

use crate::errors::os;
use crate::wire;
use crate::{log, threads};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use torpor_api::guest::FrameType;

/// How long whatever listens may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const BUFFER_BYTES: usize = 64 << 10;

/// Connect, say so, and carry bytes until both sides are done.
pub fn serve(mut socket: UnixStream, address: IpAddr, port: u16) {
    let target = SocketAddr::new(address, port);
    let begun = TcpStream::connect_timeout(&target, CONNECT_TIMEOUT)
        .and_then(|stream| begin(&socket, &stream).map(|halves| (stream, halves)));
    let (stream, (socket_out, stream_in)) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            let error = os(&format!("cannot connect to {target}"), &error);
            return wire::finish(&mut socket, Err(error));
        }
    };
    // The client learns of a thread that could not start by the connection closing.
    if let Err(error) = threads::start("forward", move || carry_out(stream_in, socket_out)) {
        log::line(log::Level::Error, format_args!("cannot start a thread: {error}"));
        return;
    }
    if carry_in(&mut socket, &stream).is_err() {
        // Already gone is as good as closed.
        let _ = stream.shutdown(Shutdown::Both);
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// A connection may be idle for as long as it likes.
fn begin(socket: &UnixStream, stream: &TcpStream) -> io::Result<(UnixStream, TcpStream)> {
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    stream.set_nodelay(true)?;
    Ok((socket.try_clone()?, stream.try_clone()?))
}

/// From the guest to the client; begins by saying that the connection is made.
fn carry_out(mut stream: TcpStream, mut socket: UnixStream) {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut send = |kind, bytes: &[u8]| {
        let frame = wire::frame(kind, bytes).map_err(io::Error::other)?;
        socket.write_all(&frame)
    };
    let carried = (|| {
        send(FrameType::Data, &[])?;
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return send(FrameType::DataEof, &[]),
                Ok(n) => send(FrameType::Data, buffer.get(..n).unwrap_or_default())?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    })();
    if carried.is_err() {
        let _ = stream.shutdown(Shutdown::Both);
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// From the client to the guest, up to the client's end of file.
fn carry_in(socket: &mut UnixStream, mut stream: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let (kind, mut left) = wire::read_header(socket).map_err(io::Error::other)?;
        match kind {
            FrameType::Data => {}
            FrameType::DataEof if left == 0 => return stream.shutdown(Shutdown::Write),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        while left > 0 {
            let part = buffer.get_mut(..left.min(BUFFER_BYTES)).unwrap_or_default();
            socket.read_exact(part)?;
            stream.write_all(part)?;
            left -= part.len();
        }
    }
}
