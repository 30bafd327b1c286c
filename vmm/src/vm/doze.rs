//! Sleep that is kept in this process: either with the memory as it stands, or *dozing*, with the memory given back and the
//! image laid out in its place.
//!
//! A dozing machine is one whose restore was done ahead, up to the point where the vCPUs run. What it holds is the page
//! cache's, which takes it away when it has better use for it, but for the pages that the guest is known to write. Pages that are
//! in the page table are as they were when they were checked, because the page cache gives up no page without taking it out
//! of there. Others of the mapped image may have been read again from a disk since, unchecked: so a machine of which anything has
//! left the page cache is not resumed, but restored by another process.

use super::restore::{Ahead, decode, fill_lazily, pre_fault};
use super::{Backing, ImageFiles, Phase, Vm, VmError, first_error, micros};
use crate::arch;
use crate::image::{self, Expected, OpenImage, PageSource};
use crate::memory::lazy::FailureSink;
use crate::sys::process;
use crate::vcpu::Vcpu;
use std::sync::Arc;
use std::time::Instant;

impl Vm {
    /// Give a durable machine's memory back and lay out its image, as a restore would.
    ///
    /// `on_memory_failure` is called, and must not return, when a page can't be given to the guest.
    ///
    /// # Errors
    /// It is not durable as that generation, and then nothing was done; or something failed, and then the process is of no
    /// further use.
    pub fn doze(
        &mut self,
        files: ImageFiles,
        generation: u64,
        on_memory_failure: FailureSink,
    ) -> Result<(), VmError> {
        let persisted = self.persisted.filter(|stats| stats.generation == generation);
        let is_durable = matches!(self.phase, Phase::Durable) && persisted.is_some();
        self.expect(is_durable, "give back the memory of")?;
        let expected = Expected {
            generation,
            disk_generation: persisted.unwrap_or_default().disk_generation,
            n_vcpus: self.shape.vcpus,
            mem_bytes: self.ram.layout().len_bytes(),
            host: self.host.clone(),
        };
        let image = image::open(files.image, files.base, &expected)?;
        self.phase = Phase::Dozing;
        let laid_out = self.lay_out(image, on_memory_failure);
        if laid_out.is_err() {
            self.phase = Phase::Exited;
        }
        process::trim_heap();
        laid_out
    }

    fn lay_out(&mut self, image: OpenImage, on_memory_failure: FailureSink) -> Result<(), VmError> {
        let ahead = Ahead::of(&image);
        let file = Arc::new(image.file);
        // Ends the thread that serves page faults of the old memory.
        self.backing = Backing::Anonymous;
        self.ram.map_anew()?;
        let source = Arc::clone(&file) as Arc<dyn PageSource>;
        let lazy = fill_lazily(&self.ram, &self.uffd, source, on_memory_failure)?;
        lazy.prefetch(&ahead.extents, ahead.placement, !self.can_pre_fault)?;
        if self.can_pre_fault {
            pre_fault(&self.vcpus, &self.ram, lazy.ahead())?;
        }
        // Pages are kept in the page cache by those who map them.
        lazy.close_view();
        self.backing = Backing::Lazy(lazy);
        self.baseline = Some(Arc::clone(&file));
        self.restored_from = Some(file);
        Ok(())
    }

    /// Run a durable or dozing machine on from its freeze, as a restore of its image would; how long it took in
    /// microseconds. Neither the guest's clocks nor its timers see the time between.
    ///
    /// # Errors
    /// It is neither, its memory has left the page cache, or KVM refused; then it is of no further use, and its image is.
    pub fn resume(&mut self) -> Result<u64, VmError> {
        let started = Instant::now();
        match (&self.phase, &self.backing) {
            (Phase::Dozing, Backing::Lazy(lazy)) if !lazy.is_in_memory() => return Err(VmError::Evicted),
            (Phase::Durable | Phase::Dozing, _) => {}
            _ => self.expect(false, "resume")?,
        }
        let (vmstate, _) = self.frozen.clone().ok_or(VmError::NothingFrozen)?;
        let state = decode(vmstate, self.vcpus.len())?;
        arch::restore_clock(&self.vm_fd, &state.vm)?;
        for (vcpu, state) in self.vcpus.iter().zip(state.vcpus) {
            vcpu.restore(state)?;
        }
        first_error(self.vcpus.iter().map(Vcpu::done))?;
        arch::restore_vm(&self.vm_fd, &state.vm)?;
        // Interrupts that were on their way at the freeze came after the state that was set again.
        self.write_devices().resume_after_restore();
        let released = first_error(self.vcpus.iter().map(Vcpu::run));
        self.phase = Phase::Running;
        released?;
        Ok(micros(started))
    }
}
