//! Building a VM before anybody needs it, and booting it.
//!
//! The order is that of cost: memslots before the interrupt controller, because the other order waits ~7 ms for
//! a grace period on 6.18 kernels; everything that creates a KVM object before a wake, so that the wake creates
//! none.

use super::{Backing, EventSink, Phase, Vm, VmError, VmEvent};
use crate::arch;
use crate::devices::{Backends, DeviceSet};
use crate::image::HostSignature;
use crate::layout::{GED_GSI, RamLayout};
use crate::memory::{GuestMemory, Ram};
use crate::pm1::Pm1;
use crate::sys::uffd::Uffd;
use crate::sys::{self, process};
use crate::vcpu::{self, ExitSink, Vcpu, VcpuContext};
use kvm_ioctls::{Kvm, VmFd};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};
use torpor_api::limits::VCPUS;
use torpor_api::vmm::{FdRole, Shape};
use vm_memory::Address;
use vmm_sys_util::eventfd::EventFd;

/// The descriptors of a request, by role.
#[derive(Debug, Default)]
pub struct Files {
    fds: Vec<(FdRole, OwnedFd)>,
}

impl Files {
    /// Descriptors with their roles.
    #[must_use]
    pub fn new(fds: Vec<(FdRole, OwnedFd)>) -> Self {
        Self { fds }
    }

    /// Take one out.
    ///
    /// # Errors
    /// It did not come with the request.
    pub fn take(&mut self, role: FdRole) -> Result<OwnedFd, VmError> {
        self.take_if_any(role).ok_or(VmError::MissingFd(role))
    }

    fn take_if_any(&mut self, role: FdRole) -> Option<OwnedFd> {
        let index = self.fds.iter().position(|(r, _)| *r == role)?;
        Some(self.fds.swap_remove(index).1)
    }

    /// Take out an image, and the one under it if that came, too.
    ///
    /// # Errors
    /// It did not come with the request.
    pub fn take_image(&mut self) -> Result<ImageFiles, VmError> {
        Ok(ImageFiles {
            image: File::from(self.take(FdRole::Image)?),
            base: self.take_if_any(FdRole::ImageBase).map(File::from),
        })
    }

    pub(super) fn take_backends(&mut self, console_limit: u64) -> Result<Backends, VmError> {
        let mut file = |role| self.take(role).map(File::from);
        Ok(Backends {
            disk_base: file(FdRole::DiskBase)?,
            disk_overlay: file(FdRole::DiskOverlay)?,
            disk_generation: file(FdRole::DiskGeneration)?,
            tap: file(FdRole::Tap)?,
            console: file(FdRole::Console)?,
            vsock_listener: self.take(FdRole::VsockListener)?,
            console_limit,
        })
    }
}

/// An image that is to be read or written.
#[derive(Debug)]
pub struct ImageFiles {
    /// The file.
    pub image: File,
    /// The image that it lies over, or is to lie over if it is not rewritten in place.
    pub base: Option<File>,
}

/// A VM without memory.
pub struct Prepared {
    /// Dropped first: a vCPU that waits for a page goes on only when nobody has this any more, or serves it.
    pub(super) uffd: Uffd,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) devices: Arc<RwLock<DeviceSet>>,
    pub(super) pm1: Arc<Pm1>,
    pub(super) ram: Arc<Ram>,
    pub(super) vm_fd: VmFd,
    pub(super) shape: Shape,
    pub(super) host: HostSignature,
    pub(super) generation_event: EventFd,
    pub(super) can_pre_fault: bool,
    pub(super) events: EventSink,
}

fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { operation, source }
}

impl Prepared {
    /// Build everything but memory and backends.
    ///
    /// # Errors
    /// The shape is not one that a machine can have, or the host lacks something.
    pub fn build(shape: Shape, events: EventSink) -> Result<Self, VmError> {
        if !VCPUS.contains(&shape.vcpus) {
            return Err(VmError::BadVcpuCount(shape.vcpus));
        }
        let failed = |source| VmError::Process {
            operation: "install the kick signal's handler",
            source,
        };
        process::install_kick_handler().map_err(failed)?;
        let host = Kvm::new().map_err(kvm("open /dev/kvm"))?;
        let vm_fd = create_vm(&host)?;
        let ram = Arc::new(Ram::reserve(RamLayout::new(shape.mem_mib)?)?);
        for mapping in ram.slot_mappings() {
            sys::kvm::set_memslot(&vm_fd, mapping).map_err(kvm("register a memslot"))?;
        }
        arch::create_interrupt_controller(&vm_fd)?;
        let profile = arch::prepare_cpuid(&host, shape.vcpus)?;
        let fds = (0..shape.vcpus)
            .map(|id| vcpu::create(&vm_fd, id, &profile))
            .collect::<Result<Vec<_>, _>>()?;
        let devices = Arc::new(RwLock::new(DeviceSet::prepare(&vm_fd)?));
        let generation_event = EventFd::new(libc::EFD_CLOEXEC).map_err(VmError::EventFd)?;
        vm_fd
            .register_irqfd(&generation_event, GED_GSI)
            .map_err(kvm("register the event device's interrupt"))?;
        let pm1 = Arc::new(Pm1::default());
        let context = VcpuContext {
            pm1: Arc::clone(&pm1),
            msr_indices: Arc::new(arch::msr_indices(&host)?),
            devices: Arc::clone(&devices),
            exits: exit_sink(&events),
        };
        let start = |(fd, id)| Vcpu::start(fd, id, context.clone());
        let vcpus = fds.into_iter().zip(0..).map(start).collect::<Result<_, _>>()?;
        Ok(Self {
            can_pre_fault: vm_fd.check_extension_raw(sys::kvm::CAP_PRE_FAULT_MEMORY) > 0,
            vcpus,
            devices,
            pm1,
            ram,
            shape,
            host: arch::signature(&profile),
            uffd: Uffd::open().map_err(no_uffd)?,
            generation_event,
            events,
            vm_fd,
        })
    }

    /// What it was built as.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Map memory, boot the kernel and run.
    ///
    /// # Errors
    /// A file is not what it should be; the process is of no further use.
    pub fn boot(self, mut files: Files, cmdline: &str, console_limit: u64) -> Result<Vm, VmError> {
        let mut kernel = File::from(files.take(FdRole::Kernel)?);
        let backends = files.take_backends(console_limit)?;
        self.ram.map()?;
        let memory = self.ram.guest_memory()?;
        let infos = self.attach(&memory, backends)?;
        let layout = self.ram.layout();
        let registers = arch::boot(&memory, layout, &mut kernel, cmdline, self.shape.vcpus, &infos)?;
        self.new_generation_id(&memory)?;
        if let Some(first) = self.vcpus.first() {
            first.boot(registers)?;
            first.done()?;
        }
        for vcpu in &self.vcpus {
            vcpu.run()?;
        }
        Ok(self.into_vm(Backing::Anonymous))
    }

    pub(super) fn attach(
        &self,
        memory: &GuestMemory,
        backends: Backends,
    ) -> Result<Vec<crate::devices::MmioDeviceInfo>, VmError> {
        let ram = Arc::clone(&self.ram);
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        devices.attach(
            memory,
            backends,
            Arc::new(move |gpa, len| ram.discard(gpa.raw_value(), len)),
        )?;
        Ok(devices.mmio_devices())
    }

    pub(super) fn new_generation_id(&self, memory: &GuestMemory) -> Result<(), VmError> {
        let failed = |source| VmError::Process {
            operation: "get random bytes",
            source,
        };
        let id = process::random_bytes().map_err(failed)?;
        Ok(arch::write_generation_id(memory, id)?)
    }

    pub(super) fn into_vm(self, backing: Backing) -> Vm {
        Vm {
            vcpus: self.vcpus,
            devices: self.devices,
            backing,
            pm1: self.pm1,
            ram: self.ram,
            vm_fd: self.vm_fd,
            uffd: self.uffd,
            can_pre_fault: self.can_pre_fault,
            shape: self.shape,
            host: self.host,
            events: self.events,
            phase: Phase::Running,
            frozen: None,
            baseline: None,
            restored_from: None,
            working_set: Vec::new(),
            writing: Arc::default(),
            pre_copy_cancel: Arc::default(),
            pre_copied_bytes: Arc::default(),
            n_jobs: 0,
            persisted: None,
        }
    }
}

pub(super) fn no_uffd(source: std::io::Error) -> crate::memory::MemoryError {
    crate::memory::MemoryError::Uffd {
        operation: "begin",
        source,
    }
}

fn exit_sink(events: &EventSink) -> ExitSink {
    let events = Arc::clone(events);
    Arc::new(move |reason| events(VmEvent::GuestEnded(reason)))
}

/// On a busy host the kernel answers EINTR when a signal comes while it starts a VM's worker.
fn create_vm(host: &Kvm) -> Result<VmFd, VmError> {
    loop {
        match host.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(kvm("create a VM")),
        }
    }
}
