//! Drives one `torpor-vmm` process over its control socket, as torpord does: for tests and for the hand.

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use torpor_api::vmm::{
    Event, FdRole, Message, Outcome, Reply, Request, RequestFrame, RestoreTrace, Shape, VmmError,
    VmmErrorCode,
};

/// Emulated hosts are slow.
const PATIENCE: Duration = Duration::from_secs(300);

/// Files of one machine in a directory.
#[derive(Debug)]
pub struct Machine {
    /// Where they are.
    pub dir: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// The base disk.
    pub base: PathBuf,
    /// What it is built as.
    pub shape: Shape,
}

impl Machine {
    /// A machine with an empty overlay.
    pub fn create(dir: &Path, kernel: &Path, base: &Path, shape: Shape) -> Self {
        let machine = Self {
            dir: dir.to_owned(),
            kernel: kernel.to_owned(),
            base: base.to_owned(),
            shape,
        };
        let overlay = machine.open("disk.qcow2");
        let size = std::fs::metadata(base).expect("base disk").len();
        torpor_vmm::devices::blk::create_overlay(size, overlay, size).expect("overlay");
        machine.open("disk.gen");
        machine
    }

    /// The same machine, to be changed.
    pub fn twin(&self) -> Self {
        Self {
            dir: self.dir.clone(),
            kernel: self.kernel.clone(),
            base: self.base.clone(),
            shape: self.shape,
        }
    }

    /// One of its files, made if it is not there.
    pub fn open(&self, name: &str) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options
            .open(self.dir.join(name))
            .unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The image that others lie over, if there is one.
    pub fn image_base(&self) -> Option<File> {
        File::open(self.dir.join("memory.base")).ok()
    }

    /// The image `name`, and the one that it lies over or is to lie over.
    pub fn image(&self, name: &str) -> Vec<(FdRole, OwnedFd)> {
        let mut fds = vec![(FdRole::Image, self.open(name).into())];
        fds.extend(self.image_base().map(|base| (FdRole::ImageBase, base.into())));
        fds
    }

    fn backends(&self) -> Vec<(FdRole, OwnedFd)> {
        let socket = self.dir.join("vsock.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).expect("vsock listener");
        let console = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join("console.log"));
        vec![
            (
                FdRole::DiskBase,
                File::open(&self.base).expect("base disk").into(),
            ),
            (FdRole::DiskOverlay, self.open("disk.qcow2").into()),
            (FdRole::DiskGeneration, self.open("disk.gen").into()),
            (FdRole::Tap, super::sys::open_tap("ttest0").expect("tap").into()),
            (FdRole::VsockListener, listener.into()),
            (FdRole::Console, console.expect("console").into()),
        ]
    }

    /// Generation of its disk.
    pub fn disk_generation(&self) -> u64 {
        let bytes = std::fs::read(self.dir.join("disk.gen")).expect("disk.gen");
        bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// What the guest wrote to its console.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.join("console.log")).unwrap_or_default()).into_owned()
    }

    /// Wait until `found` sees what it wants in the console.
    pub fn wait_console<T>(&self, what: &str, found: impl Fn(&str) -> Option<T>) -> T {
        let watch = Inotify::init(InitFlags::IN_CLOEXEC).expect("inotify");
        watch
            .add_watch(&self.dir.join("console.log"), AddWatchFlags::IN_MODIFY)
            .expect("console.log");
        let started = Instant::now();
        loop {
            let text = self.console();
            if let Some(value) = found(&text) {
                return value;
            }
            let left = PATIENCE.saturating_sub(started.elapsed());
            let readable = wait_readable(watch.as_fd(), left);
            assert!(readable, "waited in vain for {what}; console:\n{text}");
            watch.read_events().expect("inotify");
        }
    }

    /// The last number that the guest printed as `tick N`.
    pub fn last_tick(&self) -> Option<u64> {
        last_tick(&self.console())
    }

    /// Wait until the guest printed a later one.
    pub fn wait_tick_after(&self, tick: u64) -> u64 {
        self.wait_console(&format!("a tick after {tick}"), |text| {
            last_tick(text).filter(|n| *n > tick)
        })
    }
}

fn last_tick(text: &str) -> Option<u64> {
    let lines = text
        .lines()
        .rev()
        .filter(|line| line.ends_with('.') || line.ends_with(".\r"));
    lines
        .filter_map(|line| {
            line.trim_end()
                .trim_end_matches('.')
                .strip_prefix("tick ")?
                .parse()
                .ok()
        })
        .next()
}

fn wait_readable(fd: std::os::fd::BorrowedFd<'_>, timeout: Duration) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).expect("poll") > 0
}

/// A VMM process and the connection to it.
pub struct Vmm {
    child: Child,
    socket: OwnedFd,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Vmm {
    /// Start `program` with a control socket, connect, and let it build a VM.
    pub fn start(program: &Path, machine: &Machine) -> Self {
        let mut vmm = Self::spawn(program, &machine.dir);
        let prepared = vmm.call(Request::Prepare { shape: machine.shape }, Vec::new());
        assert_eq!(prepared, Ok(Reply::Done));
        vmm
    }

    /// Start `program` with a control socket and connect.
    pub fn spawn(program: &Path, dir: &Path) -> Self {
        let path = dir.join(format!("control-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = torpor_ipc::listen_at(&path).expect("listen");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(dir.join("vmm.log"))
            .expect("vmm.log");
        let child = Command::new(program)
            .args(
                std::env::var("TORPOR_VMM_ARGS")
                    .unwrap_or_default()
                    .split_whitespace(),
            )
            .stdin(Stdio::from(listener))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .spawn()
            .expect("start the VMM");
        let flags = SockFlag::SOCK_CLOEXEC;
        let kind = SockType::SeqPacket;
        let socket = nix::sys::socket::socket(AddressFamily::Unix, kind, flags, None).expect("socket");
        let address = nix::sys::socket::UnixAddr::new(&path).expect("address");
        nix::sys::socket::connect(socket.as_raw_fd(), &address).expect("connect");
        Self {
            child,
            socket,
            events: VecDeque::new(),
            next_id: 1,
        }
    }

    /// Ask, and wait for the answer.
    pub fn call(&mut self, request: Request, fds: Vec<(FdRole, OwnedFd)>) -> Result<Reply, VmmError> {
        let id = self.next_id;
        self.next_id += 1;
        let (roles, fds): (Vec<_>, Vec<_>) = fds.into_iter().unzip();
        let frame = RequestFrame {
            id,
            fds: roles,
            request,
        };
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        torpor_ipc::send(&self.socket, &serde_json::to_vec(&frame).expect("encode"), &raw).expect("send");
        loop {
            match self.receive() {
                None => {
                    return Err(VmmError {
                        code: VmmErrorCode::Io,
                        message: "the VMM is gone".to_owned(),
                    });
                }
                Some(Message::Event { event }) => self.events.push_back(event),
                Some(Message::Reply {
                    id: answered,
                    outcome,
                }) => {
                    assert_eq!(answered, id);
                    return match outcome {
                        Outcome::Ok(reply) => Ok(reply),
                        Outcome::Err(error) => Err(error),
                    };
                }
            }
        }
    }

    /// The next message; none if the process ended.
    fn receive(&self) -> Option<Message> {
        assert!(
            wait_readable(self.socket.as_fd(), PATIENCE),
            "the VMM does not answer"
        );
        match torpor_ipc::receive(&self.socket) {
            Err(torpor_ipc::IpcError::Closed) => None,
            datagram => Some(serde_json::from_slice(&datagram.expect("receive").bytes).expect("a message")),
        }
    }

    /// Wait for an event.
    pub fn event(&mut self) -> Event {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        match self.receive() {
            Some(Message::Event { event }) => event,
            other => panic!("no event but {other:?}"),
        }
    }

    /// Boot the machine.
    pub fn boot(&mut self, machine: &Machine, cmdline: &str) {
        let mut fds = machine.backends();
        fds.push((
            FdRole::Kernel,
            File::open(&machine.kernel).expect("kernel").into(),
        ));
        let request = Request::Boot {
            cmdline: cmdline.to_owned(),
            console_limit: 64 << 20,
        };
        assert_eq!(self.call(request, fds), Ok(Reply::Done));
    }

    /// Restore it from the image `name`.
    pub fn restore(
        &mut self,
        machine: &Machine,
        name: &str,
        generation: u64,
        fork: bool,
    ) -> Result<RestoreTrace, VmmError> {
        self.restore_over(machine, name, generation, machine.disk_generation(), fork)
    }

    /// Restore it over a disk of which the manifest says that it has generation `disk_generation`.
    pub fn restore_over(
        &mut self,
        machine: &Machine,
        name: &str,
        generation: u64,
        disk_generation: u64,
        fork: bool,
    ) -> Result<RestoreTrace, VmmError> {
        let mut fds = machine.backends();
        fds.extend(machine.image(name));
        let request = Request::Restore {
            console_limit: 64 << 20,
            generation,
            disk_generation,
            fork,
        };
        match self.call(request, fds)? {
            Reply::Restored { trace } => Ok(trace),
            reply => panic!("{reply:?}"),
        }
    }

    /// Stop it.
    pub fn freeze(&mut self) -> u64 {
        match self.call(Request::Freeze, Vec::new()) {
            Ok(Reply::Frozen { freeze_us }) => freeze_us,
            other => panic!("{other:?}"),
        }
    }

    /// Begin to write it to the image `name`.
    pub fn begin_persist(&mut self, machine: &Machine, name: &str, generation: u64) {
        let begun = self.call(Request::Persist { generation }, machine.image(name));
        assert_eq!(begun, Ok(Reply::Done));
    }

    /// Write it, and wait until it is durable.
    pub fn persist(
        &mut self,
        machine: &Machine,
        name: &str,
        generation: u64,
    ) -> torpor_api::vmm::PersistStats {
        self.begin_persist(machine, name, generation);
        match self.event() {
            Event::PersistDone { stats } => stats,
            other => panic!("{other:?}"),
        }
    }

    /// Have it give its memory back and lay out the image `name`.
    pub fn doze(&mut self, machine: &Machine, name: &str, generation: u64) -> Result<(), VmmError> {
        let reply = self.call(Request::Doze { generation }, machine.image(name))?;
        assert_eq!(reply, Reply::Done);
        Ok(())
    }

    /// Memory of the process that no file has, in KiB.
    pub fn anonymous_kib(&self) -> u64 {
        let rollup =
            std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id())).expect("smaps");
        let line = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.and_then(|number| number.parse().ok()).expect("Anonymous")
    }

    /// The process's limits, as the kernel tells them.
    pub fn limits(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/limits", self.child.id())).expect("limits")
    }

    /// Run it on; whether that ended a persist, and the microseconds.
    pub fn run(&mut self) -> (bool, u64) {
        match self.call(Request::Run, Vec::new()) {
            Ok(Reply::Ran {
                persist_cancelled,
                run_us,
            }) => (persist_cancelled, run_us),
            other => panic!("{other:?}"),
        }
    }

    /// End the process without asking it.
    pub fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Wait for its end; the exit code.
    pub fn wait(mut self) -> Option<i32> {
        self.child.wait().expect("wait").code()
    }
}
