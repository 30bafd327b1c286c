//! From a machine's files to a live execution: boot and restore.
//!
//! What a start takes is held by values whose drop gives it back, so a start that fails or is dropped at any
//! await leaves no process, slot or directory. The record in the run directory is in place before the guest
//! can run. A restore waits for nothing one after the other that can be waited for together: VMM, slot and files
//! first, then the VMM's reply and the guest's acknowledgement.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use torpor_api::vmm::{ExitReason, FdRole, Request, Shape};
use torpor_api::{ErrorCode, ExecutionId};

use super::blank::{BlankVmm, Starting};
use super::claim::Claim;
use super::live::{Holdings, VmmExecution};
use super::record::MachineRecord;
use super::{Platform, blocking, images_error, wake};
use crate::images::MachineFiles;
use crate::images::manifest::Manifest;
use crate::images::memory::OpenImage;
use crate::images::template::Template;
use crate::machine::hypervisor::{Execution, HypervisorError, MachineSpec, WakeStages, WokenFrom};
use crate::net::{NetError, RefillHold, SlotLease};

/// Every kernel command line begins with this.
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 root=/dev/vda rw init=/usr/local/bin/torpor-guest quiet \
                       nowatchdog mitigations=off pci=off";

/// Descriptors of a machine's files that every start passes on.
struct OpenFiles {
    base: OwnedFd,
    overlay: OwnedFd,
    disk_generation: OwnedFd,
    console: OwnedFd,
}

impl OpenFiles {
    fn open(files: &MachineFiles, template: &Template, code: ErrorCode) -> Result<Self, HypervisorError> {
        let failed = |operation: &str| images_error(code, operation.to_owned());
        files.drop_spent_images();
        Ok(Self {
            base: template
                .open_rootfs()
                .map_err(|error| HypervisorError::new(code, "cannot open the template").because(error))?,
            overlay: files.open_overlay().map_err(failed("cannot open the disk"))?,
            disk_generation: files
                .open_disk_generation()
                .map_err(failed("cannot open the disk's generation"))?,
            console: files
                .open_console()
                .map_err(failed("cannot open the console log"))?,
        })
    }
}

/// VMM and slot of a start, not yet the machine's.
struct Taken {
    claim: Claim,
    blank: BlankVmm,
    slot: Arc<SlotLease>,
    refills: Refills,
}

/// Keeps the pools from filling up beside a start.
struct Refills {
    _blanks: Starting,
    _slots: RefillHold,
}

/// An execution that is not yet known to work; dropping it ends it.
struct Unconfirmed(Option<Arc<VmmExecution>>);

impl Drop for Unconfirmed {
    fn drop(&mut self) {
        if let Some(execution) = self.0.take() {
            tokio::spawn(async move { execution.quit().await });
        }
    }
}

impl Platform {
    pub(super) async fn boot_machine(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
    ) -> Result<Arc<dyn Execution>, HypervisorError> {
        let deadline = tokio::time::Instant::now() + self.config.boot_timeout;
        let template = self.template_of(machine, ErrorCode::BootFailed).await?;
        let taken = self.take(machine).await?;
        let files = self.images.machine(&machine.id);
        let cmdline = format!("{CMDLINE} {}", template.cmdline_extra)
            .trim_end()
            .to_owned();
        let disk_mib = machine.disk_mib;
        let opened = blocking(ErrorCode::BootFailed, move || {
            open_for_boot(&files, &template, disk_mib)
        });
        let (open, kernel) = opened.await?;
        let (live, tap, vsock) = self.name(taken, machine, execution, ErrorCode::BootFailed)?;
        let fds = [
            (FdRole::Kernel, &kernel),
            (FdRole::DiskBase, &open.base),
            (FdRole::DiskOverlay, &open.overlay),
            (FdRole::DiskGeneration, &open.disk_generation),
            (FdRole::Tap, &tap),
            (FdRole::VsockListener, &vsock),
            (FdRole::Console, &open.console),
        ];
        let booted = live
            .get()
            .client()
            .boot(cmdline, self.config.console_limit_bytes, &fds);
        booted.await.map_err(|error| {
            let message = format!("VMM cannot boot {}", machine.id);
            HypervisorError::new(ErrorCode::BootFailed, message).because(error)
        })?;
        // The VMM has its own; ours would keep the tap and the listener alive after it.
        drop((open, kernel, tap, vsock));
        await_guest(live.get(), deadline).await?;
        Ok(live.confirm(()))
    }

    pub(super) async fn restore_machine(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
        generation: u64,
        first_port: Option<u16>,
    ) -> Result<(Arc<dyn Execution>, WakeStages), HypervisorError> {
        let resumed = self.resume_sleeper(machine, execution, generation, first_port);
        if let Some(resumed) = resumed.await {
            return Ok(resumed);
        }
        let begun = Instant::now();
        let files = self.images.machine(&machine.id);
        let prepare = async {
            let template = self.template_of(machine, ErrorCode::ImageIncompatible).await?;
            let spec = machine.clone();
            blocking(ErrorCode::ResumeFailed, move || {
                open_for_restore(&files, &template, &spec, generation)
            })
            .await
        };
        let (taken, (open, image, manifest)) = tokio::try_join!(self.take(machine), prepare)?;
        let (live, tap, vsock) = self.name(taken, machine, execution, ErrorCode::ResumeFailed)?;
        if let Some(port) = first_port {
            live.get().connect_early(port);
        }
        let vmm_ready_us = micros(begun);

        let request = Request::Restore {
            console_limit: self.config.console_limit_bytes,
            generation: manifest.generation,
            disk_generation: manifest.disk_generation,
            fork: manifest.fork,
        };
        let files = [
            (FdRole::DiskBase, &open.base),
            (FdRole::DiskOverlay, &open.overlay),
            (FdRole::DiskGeneration, &open.disk_generation),
            (FdRole::Tap, &tap),
            (FdRole::VsockListener, &vsock),
            (FdRole::Console, &open.console),
        ];
        let fds: Vec<_> = image.fds().chain(files).collect();
        let restored = async {
            let trace = live.get().client().restore(request, &fds).await?;
            Ok((trace, micros(begun)))
        };
        let outcome = wake::finish(restored, &live.get().guest()).await;
        let ((vmm, restored_us), resync) = outcome.map_err(|error| wake::error(machine, error))?;
        let stages = WakeStages {
            vmm_ready_us,
            restored_us,
            resynced_us: micros(begun),
            from: WokenFrom::Image,
            vmm,
        };
        Ok((live.confirm((resync, open, image)), stages))
    }

    /// The machine's template, which must be what it was when the machine was made.
    async fn template_of(
        &self,
        machine: &MachineSpec,
        changed: ErrorCode,
    ) -> Result<Template, HypervisorError> {
        let (templates, name) = (self.templates.clone(), machine.template.clone());
        let found = blocking(ErrorCode::Internal, move || {
            templates.find(&name).map_err(|error| {
                HypervisorError::new(
                    ErrorCode::TemplateNotFound,
                    format!("template {name} is unusable"),
                )
                .because(error)
            })
        });
        let missing = || {
            let message = format!("there is no template {:?}", machine.template);
            HypervisorError::new(ErrorCode::TemplateNotFound, message)
        };
        let template = found.await?.ok_or_else(missing)?;
        if template.info.digest == machine.template_digest {
            return Ok(template);
        }
        let message = format!(
            "template {} has digest {}, machine {} was made from {}",
            machine.template, template.info.digest, machine.id, machine.template_digest
        );
        Err(HypervisorError::new(changed, message))
    }

    async fn take(&self, machine: &MachineSpec) -> Result<Taken, HypervisorError> {
        self.sleepers.end(&machine.id).await;
        let claim = self.claims.take(&machine.id).await;
        let held = self.slots.hold_refill();
        let slot = async {
            // Clients may wait at its other end.
            if let Some(parked) = self.parking.take(&machine.id) {
                return Ok(parked);
            }
            let acquired = match self.slots.acquire().await {
                Err(NetError::Exhausted { .. })
                    if self.sleepers.end_oldest().await || self.parking.release_oldest() =>
                {
                    self.slots.acquire().await
                }
                acquired => acquired,
            };
            acquired.map(Arc::new).map_err(|error| {
                let code = match error {
                    NetError::Exhausted { .. } => ErrorCode::CapacityExceeded,
                    _ => ErrorCode::Internal,
                };
                HypervisorError::new(code, "no network slot").because(error)
            })
        };
        let ((blank, starting), slot) = tokio::try_join!(self.blanks.take(shape_of(machine)), slot)?;
        Ok(Taken {
            claim,
            blank,
            slot,
            refills: Refills {
                _blanks: starting,
                _slots: held,
            },
        })
    }

    /// Make VMM and slot the machine's: from here on a restarted torpord finds it.
    fn name(
        &self,
        taken: Taken,
        machine: &MachineSpec,
        execution: &ExecutionId,
        code: ErrorCode,
    ) -> Result<(Live, OwnedFd, OwnedFd), HypervisorError> {
        let Taken {
            claim,
            mut blank,
            slot,
            refills,
        } = taken;
        let record = MachineRecord {
            machine_id: machine.id.clone(),
            execution_id: execution.clone(),
            shape: shape_of(machine),
            template: machine.template.clone(),
            template_digest: machine.template_digest.clone(),
            slot: slot.number(),
        };
        let claimed = blank.claim(record.clone());
        claimed.map_err(|error| HypervisorError::new(code, "cannot record the execution").because(error))?;
        let lost = || HypervisorError::new(code, "VMM or slot was taken apart before its time");
        let tap = slot.tap_for_vmm().ok_or_else(lost)?;
        let parts = blank.into_parts().ok_or_else(lost)?;
        slot.keep();
        let files = self.images.machine(&machine.id);
        let execution = VmmExecution::start(Holdings {
            record,
            dir: parts.dir,
            process: parts.process,
            client: parts.client,
            events: parts.events,
            files,
            slot: Some(slot),
            parking: Arc::clone(&self.parking),
            sleepers: Arc::clone(&self.sleepers),
            claim,
        });
        let live = Live {
            unconfirmed: Unconfirmed(Some(execution.clone())),
            execution,
            refills,
        };
        Ok((live, tap, parts.vsock_listener))
    }
}

/// An execution between its record and its first answer.
struct Live {
    execution: Arc<VmmExecution>,
    unconfirmed: Unconfirmed,
    refills: Refills,
}

impl Live {
    fn get(&self) -> &VmmExecution {
        &self.execution
    }

    /// The pools fill up after the first answer, because what fills them competes with it, and what is of no more use ends then.
    fn confirm(mut self, spent: impl Send + 'static) -> Arc<dyn Execution> {
        self.unconfirmed.0 = None;
        wake::drop_after_answer((self.refills, spent));
        self.execution
    }
}

pub(super) fn shape_of(machine: &MachineSpec) -> Shape {
    Shape {
        vcpus: machine.vcpus,
        mem_mib: machine.mem_mib,
    }
}

pub(super) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn open_for_boot(
    files: &MachineFiles,
    template: &Template,
    disk_mib: u32,
) -> Result<(OpenFiles, OwnedFd), HypervisorError> {
    let failed = |operation: &str| images_error(ErrorCode::BootFailed, operation.to_owned());
    files
        .discard_image()
        .map_err(failed("cannot give up the old memory"))?;
    files
        .ensure_disk(template, disk_mib)
        .map_err(failed("cannot make the disk"))?;
    let open = OpenFiles::open(files, template, ErrorCode::BootFailed)?;
    let kernel = template.open_kernel().map_err(|error| {
        HypervisorError::new(ErrorCode::BootFailed, "cannot open the template's kernel").because(error)
    })?;
    Ok((open, kernel))
}

fn open_for_restore(
    files: &MachineFiles,
    template: &Template,
    machine: &MachineSpec,
    generation: u64,
) -> Result<(OpenFiles, OpenImage, Manifest), HypervisorError> {
    let corrupt = |message: String| HypervisorError::new(ErrorCode::ImageCorrupt, message);
    let manifest = files
        .manifest()
        .map_err(|error| corrupt("the manifest is unreadable".to_owned()).because(error))?
        .ok_or_else(|| corrupt(format!("{} has no hibernation image", machine.id)))?;
    if (&manifest.machine_id, manifest.generation) != (&machine.id, generation) {
        return Err(corrupt(format!(
            "manifest names generation {} of {}, not {generation} of {}",
            manifest.generation, manifest.machine_id, machine.id
        )));
    }
    let made_as = (manifest.shape, manifest.template_digest.as_str());
    if made_as != (shape_of(machine), machine.template_digest.as_str()) {
        let message = format!("the image of {} is of another shape or template", machine.id);
        return Err(HypervisorError::new(ErrorCode::ImageIncompatible, message));
    }
    let image = files.open_image();
    let image = image.map_err(images_error(
        ErrorCode::ImageCorrupt,
        "cannot open the memory image",
    ))?;
    let open = OpenFiles::open(files, template, ErrorCode::ResumeFailed)?;
    Ok((open, image, manifest))
}

/// Wait until the booting guest's agent answers, or the guest ends.
async fn await_guest(live: &VmmExecution, deadline: tokio::time::Instant) -> Result<(), HypervisorError> {
    let mut exited = live.exited();
    let ended = async {
        match exited.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone(),
            Err(_) => None,
        }
    };
    let guest = live.guest();
    tokio::select! {
        reason = ended => {
            let how = reason.as_ref().map_or("VMM is gone".to_owned(), describe_exit);
            Err(HypervisorError::new(ErrorCode::BootFailed, format!("guest ended while it booted: {how}")))
        }
        ready = guest.wait_ready(deadline) => match ready {
            Ok(_) => Ok(()),
            Err(error) => {
                let message = "guest agent did not answer within the boot timeout";
                Err(HypervisorError::new(ErrorCode::BootFailed, message).because(error))
            }
        },
    }
}

pub(super) fn describe_exit(reason: &ExitReason) -> String {
    match reason {
        ExitReason::Shutdown => "it powered off".to_owned(),
        ExitReason::Reboot => "it rebooted".to_owned(),
        ExitReason::Memory { message } | ExitReason::Failed { message } => message.clone(),
    }
}
