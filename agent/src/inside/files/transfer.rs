//! Contents of files on their way, taken up again after a pause.
//!
//! A transfer is use of its machine. If the machine is paused all the same, the transfer wakes it and goes on where it stood: a
//! download at the next byte, an upload at the size that the file has in the guest, for which the end of what was sent
//! is kept. That needs the same guest: after a boot in between, what it had not written to its disk is lost, and the
//! transfer fails. So does an upload whose file has a size that it can't have, and one into the middle or at the end of a
//! file, whose size tells nothing.

use super::{About, Inside, WriteOptions, failed};
use crate::guest_client::GuestClient;
use crate::guest_client::files::{FileRead, FileWrite};
use crate::machine::error::MachineError;
use crate::machine::fleet::Presence;
use crate::machine::gate::AtWork;
use bytes::Bytes;
use futures_util::Stream;
use std::collections::VecDeque;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// More than can be on its way between an upload and the guest's file, which is a few buffers of 256 KiB.
const KEPT_BYTES: usize = 4 << 20;
const PIECE_BYTES: usize = KEPT_BYTES / 4;
/// A connection breaks a little before it is told that its execution is over.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// Differs from boot to boot, and survives a pause.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A transfer within one execution.
struct Leg<T> {
    presence: Presence,
    transfer: T,
    _at_work: AtWork,
}

impl<T> Leg<T> {
    fn new(presence: Presence, transfer: T) -> Self {
        Self {
            _at_work: presence.at_work(),
            presence,
            transfer,
        }
    }
}

/// Whether something failed because the execution is over.
async fn is_over(over: &CancellationToken) -> bool {
    tokio::time::timeout(END_PATIENCE, over.cancelled()).await.is_ok()
}

async fn boot_id(guest: &GuestClient) -> Option<Bytes> {
    let read = guest.read_file(BOOT_ID.to_owned(), 0, None, None).await;
    read.ok()?.next_chunk().await.ok()?
}

/// The same guest as before, woken; `cut` if it is another one.
async fn same_guest(
    inside: &Inside,
    operation: &str,
    boot: Option<&Bytes>,
    cut: MachineError,
) -> Result<Presence, MachineError> {
    let presence = inside.presence(operation).await?;
    if boot.is_none() || boot_id(&presence.guest).await.as_ref() != boot {
        return Err(cut);
    }
    Ok(presence)
}

/// A file on its way out.
pub struct Download {
    inside: Inside,
    path: String,
    user: Option<String>,
    offset: u64,
    left: Option<u64>,
    leg: Leg<FileRead>,
    boot: Option<Bytes>,
    first: Option<Bytes>,
    is_over: bool,
}

impl Download {
    /// The next bytes, or `None` at the end.
    ///
    /// # Errors
    /// The guest's, the wake's, or `guest_unreachable`.
    pub async fn next(&mut self) -> Result<Option<Bytes>, MachineError> {
        if let Some(first) = self.first.take() {
            self.boot = boot_id(&self.leg.presence.guest).await;
            return Ok(Some(self.count(first)));
        }
        while !self.is_over {
            match next_chunk(&mut self.leg).await {
                Ok(chunk) => {
                    self.is_over = chunk.is_none();
                    return Ok(chunk.map(|bytes| self.count(bytes)));
                }
                Err(error) if is_over(&self.leg.presence.over()).await => self.go_on(error).await?,
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn count(&mut self, bytes: Bytes) -> Bytes {
        let len = bytes.len() as u64;
        self.offset += len;
        self.left = self.left.map(|left| left.saturating_sub(len));
        bytes
    }

    async fn go_on(&mut self, cut: MachineError) -> Result<(), MachineError> {
        let presence = same_guest(&self.inside, "download", self.boot.as_ref(), cut).await?;
        let window = (self.offset, self.left);
        self.leg = begin_read(presence, &self.path, window, self.user.clone()).await?;
        Ok(())
    }

    /// The rest as a stream.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, MachineError>> + Send {
        futures_util::stream::try_unfold(self, |mut download| async move {
            Ok(download.next().await?.map(|bytes| (bytes, download)))
        })
    }
}

async fn next_chunk(leg: &mut Leg<FileRead>) -> Result<Option<Bytes>, MachineError> {
    let read = &mut leg.transfer;
    let chunk = async { read.next_chunk().await.map_err(failed(About::File)) };
    leg.presence.during(chunk).await
}

async fn begin_read(
    presence: Presence,
    path: &str,
    (offset, len): (u64, Option<u64>),
    user: Option<String>,
) -> Result<Leg<FileRead>, MachineError> {
    let begun = async {
        let read = presence.guest.read_file(path.to_owned(), offset, len, user).await;
        read.map_err(failed(About::File))
    };
    let read = presence.during(begun).await?;
    Ok(Leg::new(presence, read))
}

/// A file on its way in.
pub struct Upload {
    inside: Inside,
    path: String,
    options: WriteOptions,
    /// None once it was finished.
    leg: Option<Leg<FileWrite>>,
    over: CancellationToken,
    boot: Option<Bytes>,
    n_sent: u64,
    /// The end of what was sent.
    kept: VecDeque<u8>,
}

impl Upload {
    /// More bytes.
    ///
    /// # Errors
    /// The guest's, the wake's, or `guest_unreachable`.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), MachineError> {
        // What comes in one piece is through before anything happens.
        if self.n_sent > 0 && self.boot.is_none() && self.is_whole_file() {
            self.boot = match &self.leg {
                Some(leg) => boot_id(&leg.presence.guest).await,
                None => None,
            };
        }
        for piece in bytes.chunks(PIECE_BYTES) {
            let surplus = (self.kept.len() + piece.len()).saturating_sub(KEPT_BYTES);
            self.kept.drain(..surplus);
            self.kept.extend(piece);
            self.n_sent += piece.len() as u64;
            if let Err(error) = self.send(piece).await {
                self.take_up(error).await?;
            }
        }
        Ok(())
    }

    /// No more bytes: the number of bytes that the guest wrote.
    ///
    /// # Errors
    /// The guest's, the wake's, or `guest_unreachable`.
    pub async fn finish(mut self) -> Result<u64, MachineError> {
        loop {
            let Some(Leg {
                presence, transfer, ..
            }) = self.leg.take()
            else {
                return Ok(self.n_sent);
            };
            let done = async { transfer.finish().await.map_err(failed(About::File)) };
            match presence.during(done).await {
                Ok(_) => return Ok(self.n_sent),
                Err(error) => {
                    // Whoever waits for the machine to sleep need not wait for this.
                    drop(presence);
                    self.take_up(error).await?;
                }
            }
        }
    }

    fn is_whole_file(&self) -> bool {
        !self.options.append && self.options.offset.is_none()
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), MachineError> {
        let Some(leg) = &mut self.leg else { return Ok(()) };
        let write = &mut leg.transfer;
        let sent = async { write.write(bytes).await.map_err(failed(About::File)) };
        leg.presence.during(sent).await
    }

    /// After `error`: what the guest has not written of what was sent is on its way again.
    async fn take_up(&mut self, mut error: MachineError) -> Result<(), MachineError> {
        while is_over(&self.over).await {
            self.leg = None;
            let rest = self.begin_again(error).await?;
            match self.send(&rest).await {
                Ok(()) => return Ok(()),
                Err(again) => error = again,
            }
        }
        Err(error)
    }

    /// Open the file where it ends; what of it is still to be sent.
    async fn begin_again(&mut self, cut: MachineError) -> Result<Vec<u8>, MachineError> {
        let presence = same_guest(&self.inside, "upload", self.boot.as_ref(), cut.clone()).await?;
        let user = self.options.user.clone();
        let looked = async {
            let entry = presence.guest.stat(self.path.clone(), true, user).await;
            entry.map_err(failed(About::File))
        };
        let size = presence.during(looked).await?.size;
        let missing = self
            .n_sent
            .checked_sub(size)
            .and_then(|n| usize::try_from(n).ok());
        let Some(known) = missing.and_then(|missing| self.kept.len().checked_sub(missing)) else {
            return Err(cut);
        };
        let options = WriteOptions {
            offset: Some(size),
            user: self.options.user.clone(),
            ..WriteOptions::default()
        };
        let leg = begin_write(presence, &self.path, options).await?;
        self.over = leg.presence.over();
        self.leg = Some(leg);
        Ok(self.kept.range(known..).copied().collect())
    }
}

async fn begin_write(
    presence: Presence,
    path: &str,
    options: WriteOptions,
) -> Result<Leg<FileWrite>, MachineError> {
    let begun = async {
        let write = presence.guest.write_file(path.to_owned(), options).await;
        write.map_err(failed(About::File))
    };
    let write = presence.during(begun).await?;
    Ok(Leg::new(presence, write))
}

impl Inside {
    /// Read a file from an offset on, at most `len` bytes if given.
    ///
    /// # Errors
    /// The wake's, the guest's (before the first byte), or `guest_unreachable`.
    pub async fn download(
        &self,
        path: &str,
        (offset, len): (u64, Option<u64>),
        user: Option<String>,
    ) -> Result<Download, MachineError> {
        let presence = self.presence("download").await?;
        let mut leg = begin_read(presence, path, (offset, len), user.clone()).await?;
        let first = next_chunk(&mut leg).await?;
        Ok(Download {
            inside: self.clone(),
            path: path.to_owned(),
            user,
            offset,
            left: len,
            leg,
            boot: None,
            is_over: first.is_none(),
            first,
        })
    }

    /// Write a file; what was there is replaced unless the options say otherwise. Parents are made.
    ///
    /// # Errors
    /// The wake's, or `guest_unreachable`; the guest's come with the bytes.
    pub async fn upload(&self, path: &str, options: WriteOptions) -> Result<Upload, MachineError> {
        let presence = self.presence("upload").await?;
        let leg = begin_write(presence, path, options.clone()).await?;
        Ok(Upload {
            inside: self.clone(),
            path: path.to_owned(),
            options,
            over: leg.presence.over(),
            leg: Some(leg),
            boot: None,
            n_sent: 0,
            kept: VecDeque::new(),
        })
    }
}
