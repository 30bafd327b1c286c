//! Control protocol between torpord and one `torpor-vmm` process.
//!
//! One `SOCK_SEQPACKET` unix socket per VMM. A datagram is one JSON message; file descriptors travel
//! beside it by `SCM_RIGHTS`, in the order of the message's `fds` list. torpord creates the listening
//! socket and hands it to the VMM as fd [`LISTEN_FD`], so that a connect can't come too early. The VMM
//! serves one connection at a time; a new connection replaces the old one, which is how a restarted
//! torpord takes a running machine over. Losing the connection never changes what the guest does.
//!
//! ```text
//! Blank --Boot|Restore--> Running --Freeze--> Frozen --Persist--> Persisting --> Durable --Quit--> gone
//!                            ^                   |                     |             |
//!                            +------- Run -------+---------------------+-------------+
//!                            +------ Resume ----------------- Dozing <----- Doze ----+
//! ```
//! A failed persist runs the guest again by itself, before it is reported.

use serde::{Deserialize, Serialize};

/// The listening control socket's file descriptor in the VMM: its standard input, because any other would take code of torpord's
/// between fork and exec, and with it a true fork, after which torpord takes a page fault for every page that it writes.
pub const LISTEN_FD: i32 = 0;
/// Largest message in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Most file descriptors in one message.
pub const MAX_FDS: usize = 16;
/// Version of a hibernation image that has all its pages itself: header, layout of guest memory, checksums of pages, encoding of the
/// state. The VMM writes it, torpord only looks.
pub const IMAGE_FORMAT: u32 = 4;
/// Version of one that lies over another, which whoever knows only [`IMAGE_FORMAT`] can't read.
pub const LAYERED_IMAGE_FORMAT: u32 = 5;
/// The guest's address; the same in every machine, so that images and forks need no renumbering.
pub const GUEST_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(172, 31, 0, 2);
/// The tap's address, which is the guest's gateway.
pub const GATEWAY_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(172, 31, 0, 1);
/// Prefix length of the guest's network.
pub const GUEST_PREFIX_LEN: u8 = 30;
/// The guest's MAC address.
pub const GUEST_MAC: [u8; 6] = [0x06, 0x00, 0xac, 0x1f, 0x00, 0x02];
/// The tap's MAC address, for the permanent neighbour entries.
pub const GATEWAY_MAC: [u8; 6] = [0x06, 0x00, 0xac, 0x1f, 0x00, 0x01];
/// The guest's vsock context ID.
pub const GUEST_CID: u64 = 3;

/// What must be known to build a VM before anybody needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub mem_mib: u32,
}

/// What a passed file descriptor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FdRole {
    /// Uncompressed kernel ELF, read-only.
    Kernel,
    /// The template's raw root disk, read-only.
    DiskBase,
    /// The machine's qcow2 overlay, read-write.
    DiskOverlay,
    /// 16-byte file with the disk's generation, read-write.
    DiskGeneration,
    /// Tap device, non-blocking, `IFF_NO_PI | IFF_VNET_HDR`.
    Tap,
    /// Listening stream socket for host-to-guest vsock connections (`CONNECT <port>\n`).
    VsockListener,
    /// Append-only log of the serial console.
    Console,
    /// Hibernation image: read-only in a restore and a doze, read-write in a persist.
    Image,
    /// The image that the hibernation image lies over, or in a persist to a new file is to lie over, read-only.
    ImageBase,
    /// Where a full dump of guest memory goes.
    Dump,
}

/// What torpord asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum Request {
    /// Build the VM, memslots, interrupt controller, vCPUs and devices; no memory yet.
    Prepare {
        /// What to build.
        shape: Shape,
    },
    /// Boot from kernel and disk. Needs every fd role but `Image`, `ImageBase` and `Dump`.
    Boot {
        /// Kernel command line.
        cmdline: String,
        /// Largest size of the console log in bytes; output past it is dropped.
        console_limit: u64,
    },
    /// Take state and memory from an image and run. Needs `Image`, `ImageBase` if it lies over another one, and every role of a
    /// boot but `Kernel`.
    Restore {
        /// Largest size of the console log in bytes.
        console_limit: u64,
        /// The image's generation that the manifest names; another one is refused.
        generation: u64,
        /// The disk's generation that the manifest names; a newer disk is refused.
        disk_generation: u64,
        /// The machine becomes another one: new VMGenID.
        fork: bool,
    },
    /// Stop the vCPUs and hold the devices still. Does no I/O.
    Freeze,
    /// Write the frozen machine to the image (`Image`), then report [`Event::PersistDone`]. With `ImageBase`, an image that is
    /// not rewritten in place gets only what that one has otherwise.
    Persist {
        /// Generation that the new image gets.
        generation: u64,
    },
    /// Write what the running guest has changed to the image (`Image`, `ImageBase`) ahead of a persist, which then has less to
    /// write. The image is not valid until that persist.
    PreCopy,
    /// Run a frozen, persisting or durable machine again; ends a persist under way.
    Run,
    /// Give a durable machine's memory back and lay the image out under it as a restore would, up to the point where the vCPUs
    /// run: a later `Resume` is what is left of a restore. Needs `Image`, and `ImageBase` if it lies over another one.
    Doze {
        /// The generation that the machine stands at; at another one it is refused.
        generation: u64,
    },
    /// Run a durable or dozing machine whose pause was completed, as a restore would: the guest's clocks go on where they stood
    /// at the freeze. Refused if the memory of a dozing one has left the page cache meanwhile.
    Resume,
    /// The first response byte left: the working set is complete.
    FirstByte,
    /// Write all of guest memory, frozen, to `Dump`, byte for byte.
    Dump,
    /// What is going on.
    Status,
    /// End the process at once; the guest is not asked.
    Quit,
}

/// A request with its number and the roles of its file descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestFrame {
    /// Echoed in the reply.
    pub id: u64,
    /// Roles of the descriptors that travel with it, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fds: Vec<FdRole>,
    /// What is asked.
    #[serde(flatten)]
    pub request: Request,
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Message {
    /// Answer to the request of this number.
    Reply {
        /// The request's number.
        id: u64,
        /// What came of it.
        outcome: Outcome,
    },
    /// Something happened by itself.
    Event {
        /// What happened.
        event: Event,
    },
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done.
    Ok(Reply),
    /// Not done.
    Err(VmmError),
}

/// Body of a successful reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Reply {
    /// Done, nothing to say.
    Done,
    /// A restore: where its time went.
    Restored {
        /// Stages and counts.
        trace: RestoreTrace,
    },
    /// A freeze.
    Frozen {
        /// From the request to the last vCPU stopped and the devices still, in microseconds.
        freeze_us: u64,
    },
    /// A run from frozen.
    Ran {
        /// A persist was under way and was ended.
        persist_cancelled: bool,
        /// From the request to the vCPUs released, in microseconds.
        run_us: u64,
    },
    /// State of the VMM.
    Status {
        /// Where it stands.
        state: VmmState,
        /// What it was built as, once prepared.
        shape: Option<Shape>,
        /// Version of the VMM.
        version: String,
        /// The last persist, if one completed in this process.
        persisted: Option<PersistStats>,
        /// Counters of this execution.
        counters: Counters,
    },
}

/// Where a VMM stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmState {
    /// Started, nothing built or no memory yet.
    Blank,
    /// vCPUs run.
    Running,
    /// vCPUs stopped, memory intact.
    Frozen,
    /// Frozen, and being written.
    Persisting,
    /// Frozen, and on disk.
    Durable,
    /// On disk, and its memory laid out from there.
    Dozing,
    /// The guest ended; the process is about to.
    Exited,
}

/// Stages of a restore in microseconds since the request was read, and counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RestoreTrace {
    /// Header and state read and checked.
    pub state_loaded_us: u64,
    /// Files, clock and vCPU state handed over; from here on the working set is put in place.
    #[serde(default)]
    pub attached_us: u64,
    /// Its pages read and checked: before they are mapped, or after all else if nobody watches what is touched.
    #[serde(default)]
    pub checked_us: u64,
    /// Its pages mapped.
    #[serde(default)]
    pub mapped_us: u64,
    /// Its pages brought into the page table.
    #[serde(default)]
    pub populated_us: u64,
    /// Memory mapped, working set in place, in the second-level page table, too.
    pub memory_ready_us: u64,
    /// vCPU and device state set, vCPUs released.
    pub running_us: u64,
    /// Pages put in place before the vCPUs ran.
    pub prefetched_pages: u64,
}

/// What a persist wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PersistStats {
    /// The image's generation.
    pub generation: u64,
    /// The disk's generation at the freeze.
    pub disk_generation: u64,
    /// 4 KiB pages present in RAM at the freeze.
    pub present_pages: u64,
    /// Pages written because they changed and are not zero.
    pub written_pages: u64,
    /// Pages that are all zero.
    pub zero_pages: u64,
    /// Bytes written to the image, with state and checksums.
    pub written_bytes: u64,
    /// Bytes written to it ahead, while the guest still ran.
    #[serde(default)]
    pub pre_copied_bytes: u64,
    /// From the persist request to the image durable, in microseconds.
    pub durable_us: u64,
}

/// Counters of one execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// userfaultfd faults served.
    pub uffd_faults: u64,
    /// userfaultfd faults served up to the first response byte.
    pub uffd_faults_first_byte: u64,
    /// Pages of the mapped image that were not in the page table when the guest wanted them, up to the first
    /// response byte. After a restore that did not watch what is touched: those that it wrote.
    pub mapped_faults_first_byte: u64,
    /// Pages copied or mapped, for faults and ahead of them.
    pub pages_filled: u64,
    /// Bytes to the guest over the network.
    pub net_rx_bytes: u64,
    /// Bytes from the guest over the network.
    pub net_tx_bytes: u64,
    /// Bytes the guest read from its disk.
    pub disk_read_bytes: u64,
    /// Bytes the guest wrote to its disk.
    pub disk_written_bytes: u64,
}

/// What happened by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// The image is durable; the guest is still frozen and can still run at once.
    PersistDone {
        /// What it wrote.
        stats: PersistStats,
    },
    /// The image could not be written; the guest runs again.
    PersistFailed {
        /// Why.
        error: VmmError,
    },
    /// The guest ended; the process ends after this message.
    Exited {
        /// How.
        reason: ExitReason,
    },
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum ExitReason {
    /// ACPI power-off.
    Shutdown,
    /// Reset: reboot, or a triple fault.
    Reboot,
    /// A page could not be read or failed its checksum.
    Memory {
        /// Which page, and why.
        message: String,
    },
    /// A defect of the VMM or of the host.
    Failed {
        /// What failed.
        message: String,
    },
}

/// Codes of VMM errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmErrorCode {
    /// Not in this state, or a descriptor is missing.
    BadRequest,
    /// No room for the image.
    DiskFull,
    /// Checksum, length or magic is wrong, or generations disagree.
    ImageCorrupt,
    /// Another CPU, kernel or VMM version made the image.
    ImageIncompatible,
    /// Reading or writing failed.
    Io,
    /// KVM refused.
    Kvm,
    /// A persist was ended by a run.
    Cancelled,
}

/// An error of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct VmmError {
    /// Code.
    pub code: VmmErrorCode,
    /// Operation, operands and causes.
    pub message: String,
}
