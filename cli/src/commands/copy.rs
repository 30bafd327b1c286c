//! `cp`: files and directories into a machine and out of it.
//!
//! A file goes through the file API. A directory goes as a tar stream through the guest's own `tar`, so that links, modes
//! and times come along; what a machine sends is unpacked within the target directory only.

use super::{Context, path};
use crate::args::{Cp, Format};
use crate::client::{CallError, segment};
use crate::output;
use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::Method;
use indicatif::ProgressBar;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use torpor_api::ErrorCode;
use torpor_api::guest::{FileEntry, FileType};
use torpor_api::http::{ExecRequest, FilePath, StreamEvent, StreamOpen, StreamOrder};

const CHUNK_BYTES: usize = 256 << 10;
/// First bytes of binary messages.
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// Most of what the guest's tar complains about that is shown.
const MAX_COMPLAINT: usize = 2000;

/// Copies what the user named.
pub(super) async fn cp(context: &Context, cp: &Cp) -> anyhow::Result<u8> {
    match (remote(&cp.from), remote(&cp.to)) {
        (None, Some((machine, there))) if Path::new(&cp.from).is_dir() => {
            upload_directory(context, &cp.from, machine, there).await
        }
        (None, Some((machine, there))) => upload(context, &cp.from, machine, there).await,
        (Some((machine, there)), None) => match stat(context, machine, there).await? {
            Some(entry) if entry.file_type == FileType::Directory => {
                download_directory(context, machine, there, &cp.to).await
            }
            Some(entry) => download(context, machine, there, (&cp.to, entry.size)).await,
            None => download(context, machine, there, (&cp.to, 0)).await,
        },
        _ => bail!(
            "one of the two has to be MACHINE:/PATH and the other a file here\n  what to do: See 'torpor cp --help'."
        ),
    }
}

/// `MACHINE:/PATH`; anything else is a file here.
fn remote(text: &str) -> Option<(&str, &str)> {
    text.split_once(':')
        .filter(|(machine, path)| !machine.is_empty() && !machine.contains('/') && path.starts_with('/'))
}

/// Last part of a path, whichever way it ends.
fn name_of(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or(path)
}

/// What is at a path in the machine, if anything.
async fn stat(context: &Context, machine: &str, there: &str) -> anyhow::Result<Option<FileEntry>> {
    let route = format!("{}/files/stat", path(machine));
    let body = FilePath {
        path: there.to_owned(),
        user: None,
    };
    match context.client.call_with(Method::POST, &route, &body).await {
        Ok(answer) => Ok(Some(context.client.read(&answer)?)),
        Err(CallError::Api(error)) if error.code == ErrorCode::FileNotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn upload(context: &Context, from: &str, machine: &str, to: &str) -> anyhow::Result<u8> {
    let file = File::open(from).with_context(|| format!("cannot open {from}"))?;
    // A directory is named by its slash, as with cp.
    let to = if to.ends_with('/') {
        format!("{to}{}", name_of(from))
    } else {
        to.to_owned()
    };
    let len = file.metadata().map_or(0, |metadata| metadata.len());
    let bar = output::bar(name_of(from), len);
    let route = format!("{}/files?path={}", path(machine), segment(&to));
    let mut reader = bar.wrap_read(file);
    let answer = context
        .client
        .upload(&route, move || {
            let mut chunk = vec![0; CHUNK_BYTES];
            let len = reader.read(&mut chunk)?;
            chunk.truncate(len);
            Ok((len > 0).then(|| chunk.into()))
        })
        .await;
    bar.finish_and_clear();
    let answer = answer?;
    if let Format::Json = context.format {
        output::print_json(&answer)?;
    }
    Ok(0)
}

async fn download(
    context: &Context,
    machine: &str,
    from: &str,
    (to, len): (&str, u64),
) -> anyhow::Result<u8> {
    let route = format!("{}/files?path={}", path(machine), segment(from));
    let mut contents = context.client.open(Method::GET, &route).await?;
    let to = if Path::new(to).is_dir() {
        format!("{to}/{}", name_of(from))
    } else {
        to.to_owned()
    };
    let bar = output::bar(name_of(from), len);
    let mut file = File::create(&to).with_context(|| format!("cannot make {to}"))?;
    while let Some(bytes) = contents.next().await? {
        file.write_all(&bytes)
            .with_context(|| format!("cannot write {to}"))?;
        bar.inc(bytes.len() as u64);
    }
    bar.finish_and_clear();
    Ok(0)
}

/// As `cp -r`: into a directory that is there, or becoming the one that is named.
async fn upload_directory(context: &Context, from: &str, machine: &str, to: &str) -> anyhow::Result<u8> {
    let there = stat(context, machine, to.trim_end_matches('/')).await?;
    let is_directory = there.is_some_and(|entry| entry.file_type == FileType::Directory);
    let target = if is_directory || to.ends_with('/') {
        let whole = Path::new(from)
            .canonicalize()
            .with_context(|| format!("cannot open {from}"))?;
        let name = whole
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("directory");
        format!("{}/{name}", to.trim_end_matches('/'))
    } else {
        to.to_owned()
    };
    let route = format!("{}/files/mkdir", path(machine));
    let body = FilePath {
        path: target.clone(),
        user: None,
    };
    context.client.call_with(Method::POST, &route, &body).await?;
    let bar = output::bar(name_of(from), bytes_below(Path::new(from)));
    let (pieces, outgoing) = mpsc::channel(4);
    let (source, counted) = (from.to_owned(), bar.clone());
    let packed = tokio::task::spawn_blocking(move || pack(&source, Pieces(pieces), &counted));
    // Nothing here knows the owners there.
    let tar = ["tar", "-x", "-o", "-f", "-", "-C", &target];
    let carried = carry(context, machine, &tar, Some(outgoing), None).await;
    bar.finish_and_clear();
    // A tar that ends early is why nobody took the rest.
    carried?;
    packed.await?.with_context(|| format!("cannot read {from}"))?;
    Ok(0)
}

async fn download_directory(context: &Context, machine: &str, from: &str, to: &str) -> anyhow::Result<u8> {
    let target = if Path::new(to).is_dir() {
        Path::new(to).join(name_of(from))
    } else {
        Path::new(to).to_owned()
    };
    std::fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
    let bar = output::spinner(&format!("copying {}", name_of(from)));
    let (incoming, arrived) = mpsc::channel(4);
    let place = target.clone();
    let unpacked = tokio::task::spawn_blocking(move || {
        let mut archive = tar::Archive::new(Arriving {
            pieces: arrived,
            rest: Bytes::new(),
        });
        archive.unpack(&place)?;
        // What follows the archive's end is padding, and the other side waits until it is taken.
        io::copy(&mut archive.into_inner(), &mut io::sink()).map(drop)
    });
    let tar = ["tar", "-c", "-f", "-", "-C", from, "."];
    let carried = carry(context, machine, &tar, None, Some(incoming)).await;
    bar.finish_and_clear();
    let unpacked = unpacked.await?;
    unpacked.with_context(|| format!("cannot unpack into {}", target.display()))?;
    carried?;
    Ok(0)
}

/// Run the guest's tar between two channels.
async fn carry(
    context: &Context,
    machine: &str,
    argv: &[&str],
    mut input: Option<mpsc::Receiver<Bytes>>,
    output: Option<mpsc::Sender<Bytes>>,
) -> anyhow::Result<()> {
    let route = format!("{}/exec/stream", path(machine));
    let (mut outgoing, mut incoming) = context.client.socket(&route).await?;
    let open = StreamOpen::Start {
        command: ExecRequest {
            argv: argv.iter().map(|&word| word.to_owned()).collect(),
            cwd: Some("/".to_owned()),
            ..ExecRequest::default()
        },
        tty: None,
        stdin: input.is_some(),
    };
    let text = |json: String| Message::Text(json.into());
    outgoing.send(text(serde_json::to_string(&open)?)).await;
    let mut complaint = Vec::new();
    loop {
        let piece = async {
            match input.as_mut() {
                Some(pieces) => pieces.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            piece = piece => match piece {
                Some(piece) => drop(outgoing.send(Message::Binary(piece)).await),
                None => {
                    input = None;
                    outgoing.send(text(serde_json::to_string(&StreamOrder::StdinEnd)?)).await;
                }
            },
            message = incoming.next() => match message? {
                None => bail!("torpord closed the connection before everything was copied"),
                Some(Message::Binary(bytes)) if bytes.first() == Some(&STDOUT) => {
                    // Whoever unpacks no more says why itself.
                    if let Some(output) = &output && output.send(bytes.slice(1..)).await.is_err() {
                        return Ok(());
                    }
                }
                Some(Message::Binary(bytes)) if bytes.first() == Some(&STDERR) => {
                    complaint.extend(bytes.iter().skip(1).take(MAX_COMPLAINT.saturating_sub(complaint.len())));
                }
                Some(message) => match serde_json::from_str(&message.into_text().unwrap_or_default())? {
                    StreamEvent::Exit { exit_code: 0, .. } => return Ok(()),
                    StreamEvent::Exit { exit_code, .. } => {
                        let said = String::from_utf8_lossy(&complaint);
                        bail!("tar in the machine ended with {exit_code}: {}", said.trim());
                    }
                    StreamEvent::Error { error } => return Err(CallError::Api(error).into()),
                    StreamEvent::Lost { .. } => bail!("part of the output is lost"),
                    StreamEvent::Started { .. } | StreamEvent::Stdout { .. } | StreamEvent::Stderr { .. } => {}
                },
            },
        }
    }
}

fn pack(from: &str, pieces: Pieces, bar: &ProgressBar) -> io::Result<()> {
    let mut archive = tar::Builder::new(bar.wrap_write(io::BufWriter::with_capacity(CHUNK_BYTES, pieces)));
    archive.follow_symlinks(false);
    archive.append_dir_all(".", from)?;
    archive.into_inner()?.flush()
}

/// Bytes of all files below a directory, for the bar; what can't be read counts nothing here and fails later.
fn bytes_below(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |metadata| metadata.len()),
        Ok(_) | Err(_) => 0,
    });
    bytes.sum()
}

/// Takes what is written, piece by piece, with as many waiting as the channel holds.
struct Pieces(mpsc::Sender<Bytes>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Bytes::copy_from_slice(bytes));
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what arrives.
struct Arriving {
    pieces: mpsc::Receiver<Bytes>,
    rest: Bytes,
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.rest = piece,
                None => return Ok(0),
            }
        }
        let taken = self.rest.split_to(self.rest.len().min(buffer.len()));
        buffer.iter_mut().zip(&taken).for_each(|(to, from)| *to = *from);
        Ok(taken.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_machine_and_an_absolute_path_are_remote() {
        assert_eq!(remote("web:/tmp/x"), Some(("web", "/tmp/x")));
        for here in ["web", "web:x", ":/x", "./a:/b", "/a:/b", "C:x"] {
            assert_eq!(remote(here), None, "{here}");
        }
    }

    #[test]
    fn what_is_packed_in_pieces_is_unpacked_as_it_was() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(from.path().join("sub")).unwrap();
        std::fs::write(from.path().join("sub/large"), vec![7; 3 * CHUNK_BYTES + 1]).unwrap();
        std::os::unix::fs::symlink("sub/large", from.path().join("link")).unwrap();
        assert_eq!(bytes_below(from.path()), (3 * CHUNK_BYTES + 1) as u64);
        let (pieces, arrived) = mpsc::channel(4);
        let source = from.path().to_str().unwrap().to_owned();
        let packing = std::thread::spawn(move || pack(&source, Pieces(pieces), &ProgressBar::hidden()));
        let arriving = Arriving {
            pieces: arrived,
            rest: Bytes::new(),
        };
        tar::Archive::new(arriving).unpack(to.path()).unwrap();
        let _ = packing.join().unwrap();
        let copied = std::fs::read(to.path().join("link")).unwrap();
        assert_eq!(copied.len(), 3 * CHUNK_BYTES + 1);
        assert!(to.path().join("link").is_symlink());
    }
}
