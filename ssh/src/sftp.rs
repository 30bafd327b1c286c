//! The SFTP protocol, version 3, over [`Files`].
//!
//! One request at a time, answered in order. A handle is a path and what its opening allowed, nothing in the
//! guest, so a session outlives any pause: the next request finds the file by its path. A file that is renamed or
//! removed while it is open is therefore lost to its handle, unlike with a local file system.
//!
//! Packets are hostile: their length is bounded before they are read, names and numbers of handles too. A packet
//! that cannot be understood gets an answer; one that is too long ends the session.

mod convert;

use crate::backend::{DirectoryEntry, FileError, Files, OpenOrder, Place};
use bytes::Bytes;
use convert::{attributes, file, new_attributes, status_code};
use russh_sftp::protocol::{
    Attrs, Data, Extended, FileAttributes, Handle, Name, OpenFlags, Packet, Status, StatusCode, Version,
};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::OnceCell;

/// Longest packet in bytes, as in OpenSSH's server.
const MAX_PACKET_BYTES: usize = 256 << 10;
/// Most bytes of one answer to a read; clients ask for 32 KiB.
const MAX_READ_BYTES: u32 = 128 << 10;
/// Most handles of one session.
const MAX_HANDLES: usize = 256;
/// Entries of one answer to a readdir.
const ENTRIES_PER_ANSWER: usize = 64;
/// OpenSSH's rename that replaces, and its flush.
const POSIX_RENAME: &str = "posix-rename@openssh.com";
const FSYNC: &str = "fsync@openssh.com";

/// Serves one client until it leaves.
pub(crate) async fn run<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, files: Arc<dyn Files>) {
    let mut session = Session {
        files,
        home: OnceCell::new(),
        open: HashMap::new(),
        next_handle: 0,
    };
    while let Some(request) = read_packet(stream).await {
        let id = request_id(&request);
        let answer = match Packet::try_from(&mut request.clone()) {
            Ok(packet) => session.answer(packet).await,
            Err(_) => Packet::error(id, StatusCode::BadMessage),
        };
        let Ok(answer) = Bytes::try_from(answer) else {
            return;
        };
        if stream.write_all(&answer).await.is_err() || stream.flush().await.is_err() {
            return;
        }
    }
    // The client may have left already.
    let _ = stream.shutdown().await;
}

async fn read_packet<S: AsyncRead + Unpin>(stream: &mut S) -> Option<Bytes> {
    let len_bytes = usize::try_from(stream.read_u32().await.ok()?).ok()?;
    if !(1..=MAX_PACKET_BYTES).contains(&len_bytes) {
        return None;
    }
    let mut packet = vec![0; len_bytes];
    stream.read_exact(&mut packet).await.ok()?;
    Some(packet.into())
}

/// Of a packet that may not be understood otherwise.
fn request_id(packet: &[u8]) -> u32 {
    let id = packet.get(1..5).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
    id.map_or(0, u32::from_be_bytes)
}

/// What a handle stands for.
enum Open {
    File {
        path: String,
        reads: bool,
        writes: bool,
        appends: bool,
    },
    Directory {
        path: String,
        left: std::vec::IntoIter<DirectoryEntry>,
    },
}

impl Open {
    fn path(&self) -> &str {
        match self {
            Self::File { path, .. } | Self::Directory { path, .. } => path,
        }
    }
}

struct Session {
    files: Arc<dyn Files>,
    home: OnceCell<String>,
    open: HashMap<String, Open>,
    next_handle: u64,
}

/// Why a request fails.
enum Failure {
    File(FileError),
    Status(StatusCode, &'static str),
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

const BAD_HANDLE: Failure = Failure::Status(StatusCode::Failure, "no such handle");

impl Session {
    async fn answer(&mut self, packet: Packet) -> Packet {
        let id = packet.get_request_id();
        match self.serve(id, packet).await {
            Ok(answer) => answer,
            Err(Failure::File(error)) => Packet::status(id, status_code(&error), &error.to_string(), "en"),
            Err(Failure::Status(code, message)) => Packet::status(id, code, message, "en"),
        }
    }

    async fn serve(&mut self, id: u32, packet: Packet) -> Result<Packet, Failure> {
        let ok = Packet::Status(Status {
            id,
            status_code: StatusCode::Ok,
            error_message: "Ok".to_owned(),
            language_tag: "en".to_owned(),
        });
        match packet {
            Packet::Init(_) => return Ok(version()),
            Packet::Open(open) => return self.open(id, &open.filename, open.pflags, &open.attrs).await,
            Packet::OpenDir(open) => return self.open_dir(id, &open.path).await,
            Packet::Read(read) => return self.read(id, &read.handle, read.offset, read.len).await,
            Packet::ReadDir(read) => return self.read_dir(id, &read.handle),
            Packet::Stat(stat) => return self.stat(id, &stat.path, true).await,
            Packet::Lstat(stat) => return self.stat(id, &stat.path, false).await,
            Packet::Fstat(stat) => {
                let path = self.opened(&stat.handle)?.path().to_owned();
                return self.stat(id, &path, true).await;
            }
            Packet::RealPath(real) => {
                let path = self.files.resolve(&self.path(&real.path).await?).await?;
                return Ok(named(id, path));
            }
            Packet::ReadLink(link) => {
                let target = self.files.read_link(&self.path(&link.path).await?).await?;
                return Ok(named(id, target));
            }
            Packet::Close(close) => self.open.remove(&close.handle).map(drop).ok_or(BAD_HANDLE)?,
            Packet::Write(write) => self.write(&write.handle, write.offset, write.data.into()).await?,
            Packet::SetStat(set) => {
                let path = self.path(&set.path).await?;
                self.files
                    .set_attributes(&path, new_attributes(&set.attrs))
                    .await?;
            }
            Packet::FSetStat(set) => {
                let path = self.opened(&set.handle)?.path().to_owned();
                self.files
                    .set_attributes(&path, new_attributes(&set.attrs))
                    .await?;
            }
            Packet::MkDir(make) => {
                let mode = make.attrs.permissions.map(|mode| mode & 0o7777);
                self.files.make_dir(&self.path(&make.path).await?, mode).await?;
            }
            Packet::RmDir(remove) => self.files.remove_dir(&self.path(&remove.path).await?).await?,
            Packet::Remove(remove) => {
                self.files
                    .remove_file(&self.path(&remove.filename).await?)
                    .await?
            }
            Packet::Rename(rename) => self.rename(&rename.oldpath, &rename.newpath, false).await?,
            Packet::Symlink(link) => {
                // OpenSSH has always sent the two the other way round than the draft, and everybody followed.
                let (target, path) = (&link.linkpath, &link.targetpath);
                self.files.symlink(target, &self.path(path).await?).await?;
            }
            Packet::Extended(extended) => self.extended(extended).await?,
            _ => return Err(Failure::Status(StatusCode::OpUnsupported, "not a request")),
        }
        Ok(ok)
    }

    /// An absolute path; a relative one begins at home.
    async fn path(&self, path: &str) -> Result<String, FileError> {
        if path.contains('\0') {
            return Err(FileError::Failed("a path holds no NUL".to_owned()));
        }
        if path.starts_with('/') {
            return Ok(path.to_owned());
        }
        let home = self.home.get_or_try_init(|| self.files.home()).await?;
        let home = home.trim_end_matches('/');
        Ok(if path.is_empty() || path == "." {
            format!("{home}/.")
        } else {
            format!("{home}/{path}")
        })
    }

    fn opened(&self, handle: &str) -> Result<&Open, Failure> {
        self.open.get(handle).ok_or(BAD_HANDLE)
    }

    fn hand_out(&mut self, id: u32, open: Open) -> Result<Packet, Failure> {
        if self.open.len() >= MAX_HANDLES {
            return Err(Failure::Status(StatusCode::Failure, "too many open handles"));
        }
        self.next_handle += 1;
        let handle = self.next_handle.to_string();
        self.open.insert(handle.clone(), open);
        Ok(Packet::Handle(Handle { id, handle }))
    }

    async fn open(
        &mut self,
        id: u32,
        path: &str,
        flags: OpenFlags,
        attrs: &FileAttributes,
    ) -> Result<Packet, Failure> {
        let path = self.path(path).await?;
        let order = OpenOrder {
            read: flags.contains(OpenFlags::READ),
            write: flags.intersects(OpenFlags::WRITE | OpenFlags::APPEND),
            create: flags.contains(OpenFlags::CREATE),
            truncate: flags.contains(OpenFlags::TRUNCATE),
            exclusive: flags.contains(OpenFlags::EXCLUDE),
            mode: attrs.permissions.map(|mode| mode & 0o7777),
        };
        self.files.open(&path, order).await?;
        let open = Open::File {
            path,
            reads: order.read,
            writes: order.write,
            appends: flags.contains(OpenFlags::APPEND),
        };
        self.hand_out(id, open)
    }

    async fn open_dir(&mut self, id: u32, path: &str) -> Result<Packet, Failure> {
        let path = self.path(path).await?;
        let left = self.files.list(&path).await?.into_iter();
        self.hand_out(id, Open::Directory { path, left })
    }

    fn read_dir(&mut self, id: u32, handle: &str) -> Result<Packet, Failure> {
        let Some(Open::Directory { left, .. }) = self.open.get_mut(handle) else {
            return Err(BAD_HANDLE);
        };
        let files: Vec<_> = left.take(ENTRIES_PER_ANSWER).map(|entry| file(&entry)).collect();
        if files.is_empty() {
            return Err(Failure::Status(StatusCode::Eof, "end of directory"));
        }
        Ok(Packet::Name(Name { id, files }))
    }

    async fn read(&mut self, id: u32, handle: &str, offset: u64, len: u32) -> Result<Packet, Failure> {
        let Open::File {
            path, reads: true, ..
        } = self.opened(handle)?
        else {
            return Err(BAD_HANDLE);
        };
        let data = self.files.read(path, offset, len.min(MAX_READ_BYTES)).await?;
        if data.is_empty() && len > 0 {
            return Err(Failure::Status(StatusCode::Eof, "end of file"));
        }
        Ok(Packet::Data(Data {
            id,
            data: data.into(),
        }))
    }

    async fn write(&mut self, handle: &str, offset: u64, bytes: Bytes) -> Result<(), Failure> {
        let Open::File {
            path,
            writes: true,
            appends,
            ..
        } = self.opened(handle)?
        else {
            return Err(BAD_HANDLE);
        };
        let place = if *appends { Place::End } else { Place::At(offset) };
        Ok(self.files.write(path, place, bytes).await?)
    }

    async fn stat(&mut self, id: u32, path: &str, follow: bool) -> Result<Packet, Failure> {
        let path = self.path(path).await?;
        let found = self.files.stat(&path, follow).await?;
        Ok(Packet::Attrs(Attrs {
            id,
            attrs: attributes(&found),
        }))
    }

    async fn rename(&mut self, from: &str, to: &str, replace: bool) -> Result<(), Failure> {
        let (from, to) = (self.path(from).await?, self.path(to).await?);
        Ok(self.files.rename(&from, &to, replace).await?)
    }

    async fn extended(&mut self, extended: Extended) -> Result<(), Failure> {
        let bad = || Failure::Status(StatusCode::BadMessage, "the request's data is malformed");
        match extended.request.as_str() {
            POSIX_RENAME => {
                let (from, rest) = string(&extended.data).ok_or_else(bad)?;
                let (to, _) = string(rest).ok_or_else(bad)?;
                self.rename(from, to, true).await
            }
            // Every write was answered by the guest's kernel; that it survives a power cut is the disk's promise.
            FSYNC => {
                let (handle, _) = string(&extended.data).ok_or_else(bad)?;
                self.opened(handle).map(drop)
            }
            _ => Err(Failure::Status(StatusCode::OpUnsupported, "unknown extension")),
        }
    }
}

/// The length-prefixed text at the beginning, and what follows it.
fn string(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
    let (text, rest) = (rest.get(..len)?, rest.get(len..)?);
    Some((std::str::from_utf8(text).ok()?, rest))
}

fn version() -> Packet {
    let mut version = Version::new();
    for extension in [POSIX_RENAME, FSYNC] {
        version.extensions.insert(extension.to_owned(), "1".to_owned());
    }
    version.into()
}

fn named(id: u32, text: String) -> Packet {
    Packet::Name(Name {
        id,
        files: vec![russh_sftp::protocol::File::dummy(text)],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_in_extensions_are_cut_at_their_length_and_never_beyond_the_packet() {
        assert_eq!(string(b"\0\0\0\x02abc"), Some(("ab", &b"c"[..])));
        for bad in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\x04abc",
            b"\xff\xff\xff\xffabc",
            b"\0\0\0\x01\xff",
        ] {
            assert_eq!(string(bad), None, "{bad:?}");
        }
    }
}
