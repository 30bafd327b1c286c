//! A VMM without KVM: speaks the control protocol on its standard input and plays the guest's agent behind its vsock listener.
//!
//! The platform starts it as it starts `torpor-vmm`, through a script that runs this test program again with
//! [`MODE`] set. It keeps to the states of `torpor_api::vmm` and writes nothing but the image's header.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use torpor_api::guest::{
    FrameType, GuestError, GuestErrorCode, GuestRequest, GuestResponse, HEADER_LEN, decode_header,
    encode_header,
};
use torpor_api::vmm::{
    Event, ExitReason, FdRole, LISTEN_FD, Message, Outcome, PersistStats, Reply, Request, RequestFrame,
    RestoreTrace, Shape, VmmError, VmmErrorCode, VmmState,
};

/// Environment variable that makes this program a VMM; its value says how it behaves.
pub const MODE: &str = "TORPOR_FAKE_VMM";

/// A program that behaves as `mode` says.
pub fn install(dir: &Path, mode: &str) -> PathBuf {
    let path = dir.join(format!("vmm-{mode}"));
    let test_program = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\n{MODE}={mode} exec {} --exact fake_vmm::a_fake_vmm_keeps_to_the_protocol --nocapture\n",
        test_program.display()
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_fake_vmm_keeps_to_the_protocol() {
    if let Ok(mode) = std::env::var(MODE) {
        // SAFETY: the platform has put the listening socket there for this process alone.
        let listener = unsafe { OwnedFd::from_raw_fd(LISTEN_FD) };
        serve(listener, &mode);
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = torpor_ipc::listen_at(&path).unwrap();
    std::thread::spawn(move || serve(listener, "well"));
    super::own_host::runtime().block_on(async {
        let (client, _events) = torpor_agent::vmm_client::VmmClient::connect(&path).unwrap();
        let shape = Shape {
            vcpus: 1,
            mem_mib: 256,
        };
        client.prepare(shape).await.unwrap();
        let status = client.status().await.unwrap();
        assert_eq!((status.state, status.shape), (VmmState::Blank, Some(shape)));
        assert!(client.freeze().await.is_err(), "nothing to freeze");
    });
}

struct Vmm {
    mode: String,
    state: VmmState,
    shape: Option<Shape>,
    disk_generation: Option<File>,
    persisted: Option<PersistStats>,
    connection: Option<Arc<OwnedFd>>,
}

fn serve(listener: OwnedFd, mode: &str) {
    let vmm = Arc::new(Mutex::new(Vmm {
        mode: mode.to_owned(),
        state: VmmState::Blank,
        shape: None,
        disk_generation: None,
        persisted: None,
        connection: None,
    }));
    while let Ok(connection) = torpor_ipc::accept(&listener) {
        let connection = Arc::new(connection);
        vmm.lock().unwrap().connection = Some(connection.clone());
        let vmm = vmm.clone();
        std::thread::spawn(move || {
            while let Ok(datagram) = torpor_ipc::receive(&*connection) {
                let frame: RequestFrame = serde_json::from_slice(&datagram.bytes).unwrap();
                let fds = frame.fds.into_iter().zip(datagram.fds).collect();
                let quit = frame.request == Request::Quit;
                let (outcome, event) = handle(&vmm, frame.request, fds);
                send(
                    &connection,
                    &Message::Reply {
                        id: frame.id,
                        outcome,
                    },
                );
                if let Some(event) = event {
                    send(&connection, &Message::Event { event });
                }
                if quit {
                    std::process::exit(0);
                }
            }
        });
    }
}

fn send(connection: &OwnedFd, message: &Message) {
    // torpord may be gone, which changes nothing here.
    let _ = torpor_ipc::send(connection, &serde_json::to_vec(message).unwrap(), &[]);
}

fn refuse(code: VmmErrorCode) -> Outcome {
    Outcome::Err(VmmError {
        code,
        message: "the fake VMM was told to refuse".to_owned(),
    })
}

fn handle(
    vmm: &Arc<Mutex<Vmm>>,
    request: Request,
    mut fds: Vec<(FdRole, OwnedFd)>,
) -> (Outcome, Option<Event>) {
    let mut take = |role: FdRole| {
        let at = fds
            .iter()
            .position(|(have, _)| *have == role)
            .expect("a descriptor is missing");
        fds.swap_remove(at).1
    };
    let done = (Outcome::Ok(Reply::Done), None);
    let mut this = vmm.lock().unwrap();
    match request {
        Request::Prepare { .. } if this.mode == "dies_at_prepare" => std::process::exit(7),
        Request::Prepare { shape } => {
            this.shape = Some(shape);
            done
        }
        Request::Boot { cmdline, .. } => {
            assert!(
                cmdline.starts_with("console=ttyS0 ") && cmdline.ends_with(" fake.extra"),
                "{cmdline}"
            );
            take(FdRole::Kernel);
            start_guest(vmm, &mut this, &mut take);
            done
        }
        Request::Restore { .. } if this.mode == "refuses_image" => (refuse(VmmErrorCode::ImageCorrupt), None),
        Request::Restore { generation, .. } => {
            assert_eq!(image_generation(&File::from(take(FdRole::Image))), generation);
            start_guest(vmm, &mut this, &mut take);
            let trace = RestoreTrace {
                running_us: 3,
                ..RestoreTrace::default()
            };
            (Outcome::Ok(Reply::Restored { trace }), None)
        }
        Request::Freeze if this.state == VmmState::Running => {
            this.state = VmmState::Frozen;
            (Outcome::Ok(Reply::Frozen { freeze_us: 5 }), None)
        }
        Request::Persist { generation } if this.state == VmmState::Frozen => {
            let event = persist(&mut this, generation, &File::from(take(FdRole::Image)));
            (done.0, event)
        }
        Request::Run if this.state != VmmState::Running && this.state != VmmState::Blank => {
            let persist_cancelled = this.state == VmmState::Persisting;
            this.state = VmmState::Running;
            let error = VmmError {
                code: VmmErrorCode::Cancelled,
                message: "ended by a run".to_owned(),
            };
            let event = persist_cancelled.then_some(Event::PersistFailed { error });
            let report = Reply::Ran {
                persist_cancelled,
                run_us: 2,
            };
            (Outcome::Ok(report), event)
        }
        Request::Doze { generation } if this.state == VmmState::Durable => {
            assert_eq!(image_generation(&File::from(take(FdRole::Image))), generation);
            this.state = VmmState::Dozing;
            done
        }
        Request::Resume if this.mode == "evicted" => (refuse(VmmErrorCode::BadRequest), None),
        Request::Resume if matches!(this.state, VmmState::Durable | VmmState::Dozing) => {
            this.state = VmmState::Running;
            let report = Reply::Ran {
                persist_cancelled: false,
                run_us: 4,
            };
            (Outcome::Ok(report), None)
        }
        Request::Status => {
            let status = Reply::Status {
                state: this.state,
                shape: this.shape,
                version: "fake".to_owned(),
                persisted: this.persisted,
                counters: torpor_api::vmm::Counters::default(),
            };
            (Outcome::Ok(status), None)
        }
        Request::FirstByte | Request::PreCopy | Request::Quit => done,
        _ => (refuse(VmmErrorCode::BadRequest), None),
    }
}

fn start_guest(vmm: &Arc<Mutex<Vmm>>, this: &mut Vmm, take: &mut impl FnMut(FdRole) -> OwnedFd) {
    for role in [
        FdRole::DiskBase,
        FdRole::DiskOverlay,
        FdRole::Tap,
        FdRole::Console,
    ] {
        take(role);
    }
    this.disk_generation = Some(take(FdRole::DiskGeneration).into());
    this.state = VmmState::Running;
    let listener = UnixListener::from(take(FdRole::VsockListener));
    let (vmm, mode) = (vmm.clone(), this.mode.clone());
    std::thread::spawn(move || {
        let refused = AtomicUsize::new(0);
        for stream in listener.incoming() {
            let not_yet = mode == "slow_guest" && refused.fetch_add(1, Ordering::Relaxed) < 3;
            if mode == "silent_guest" || not_yet {
                continue;
            }
            let vmm = vmm.clone();
            std::thread::spawn(move || agent(&vmm, stream.unwrap()));
        }
    });
}

fn persist(this: &mut Vmm, generation: u64, image: &File) -> Option<Event> {
    match this.mode.as_str() {
        "persist_hangs" => {
            this.state = VmmState::Persisting;
            None
        }
        "persist_fails" => {
            this.state = VmmState::Running;
            let error = VmmError {
                code: VmmErrorCode::DiskFull,
                message: "no room".to_owned(),
            };
            Some(Event::PersistFailed { error })
        }
        _ => {
            let mut bytes = [0; 8];
            this.disk_generation
                .as_ref()
                .unwrap()
                .read_exact_at(&mut bytes, 0)
                .unwrap();
            let stats = PersistStats {
                generation,
                disk_generation: u64::from_le_bytes(bytes),
                ..PersistStats::default()
            };
            image.write_all_at(&image_header(&stats), 0).unwrap();
            this.state = VmmState::Durable;
            this.persisted = Some(stats);
            // One that torpord never hears of, as if torpord had been killed just before.
            (this.mode != "persist_unheard").then_some(Event::PersistDone { stats })
        }
    }
}

fn image_header(stats: &PersistStats) -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[..8].copy_from_slice(b"TORPORMI");
    page[8..12].copy_from_slice(&torpor_api::vmm::IMAGE_FORMAT.to_le_bytes());
    page[12..16].copy_from_slice(&1u32.to_le_bytes());
    page[16..24].copy_from_slice(&stats.generation.to_le_bytes());
    page[24..32].copy_from_slice(&stats.disk_generation.to_le_bytes());
    page[88..92].copy_from_slice(&2u32.to_le_bytes());
    page[96..98].copy_from_slice(b"{}");
    let sum = crc32c::crc32c(&page[..4092]);
    page[4092..].copy_from_slice(&sum.to_le_bytes());
    page
}

fn image_generation(image: &File) -> u64 {
    let mut bytes = [0; 8];
    image.read_exact_at(&mut bytes, 16).unwrap();
    u64::from_le_bytes(bytes)
}

/// The agent in the guest, for one connection.
fn agent(vmm: &Mutex<Vmm>, stream: UnixStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    if reader.read_line(&mut line).is_err() || line != "CONNECT 1024\n" {
        return;
    }
    (&stream).write_all(b"OK 1073741824\n").unwrap();
    let mut header = [0; HEADER_LEN];
    if reader.read_exact(&mut header).is_err() {
        return;
    }
    let (_, len) = decode_header(header).unwrap();
    let mut json = vec![0; len];
    reader.read_exact(&mut json).unwrap();
    let answer = |kind: FrameType, payload: &[u8]| {
        (&stream)
            .write_all(&encode_header(kind, payload.len()).unwrap())
            .unwrap();
        (&stream).write_all(payload).unwrap();
    };
    let respond =
        |response: GuestResponse| answer(FrameType::Response, &serde_json::to_vec(&response).unwrap());
    match serde_json::from_slice(&json).unwrap() {
        GuestRequest::Ping => respond(GuestResponse::Pong {
            version: "fake".to_owned(),
        }),
        GuestRequest::Resync { wall_unix_ns, .. } => respond(GuestResponse::Resynced {
            step_ns: 1,
            wall_unix_ns,
        }),
        GuestRequest::Quiesce => respond(GuestResponse::Done),
        GuestRequest::Exec(spec) if spec.argv == ["no such program"] => {
            let error = GuestError {
                code: GuestErrorCode::ExecFailed,
                message: "not found".to_owned(),
            };
            answer(FrameType::Error, &serde_json::to_vec(&error).unwrap());
        }
        GuestRequest::Exec(spec) => {
            answer(FrameType::Started, &7u32.to_le_bytes());
            answer(FrameType::Stdout, spec.argv.join(" ").as_bytes());
            respond(GuestResponse::Exited {
                pid: 7,
                code: Some(3),
                timed_out: false,
            });
        }
        GuestRequest::Shutdown { .. } => {
            let connection = vmm.lock().unwrap().connection.clone().unwrap();
            let reason = ExitReason::Shutdown;
            send(
                &connection,
                &Message::Event {
                    event: Event::Exited { reason },
                },
            );
            std::process::exit(0);
        }
        other => panic!(
            "the fake guest does not know {other:?} on fd {}",
            stream.as_raw_fd()
        ),
    }
}
