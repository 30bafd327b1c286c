//! Begins to write a machine's image: where to, over what, and on which thread.

use super::build::ImageFiles;
use super::{Phase, Vm, VmError, VmEvent, chain};
use crate::image::persist::{Contents, Persist, PersistError};
use crate::image::{Base, ImageFile, ImageLayout};
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use torpor_api::vmm::PersistStats;

impl Vm {
    /// Start writing the frozen machine to an image.
    ///
    /// # Errors
    /// Not frozen, or the file can't be used.
    pub fn persist(&mut self, target: ImageFiles, generation: u64) -> Result<(), VmError> {
        self.expect(matches!(self.phase, Phase::Frozen), "persist")?;
        let (vmstate, disk_generation) = self.frozen.clone().ok_or(VmError::NothingFrozen)?;
        self.record_working_set(false);
        let contents = Contents {
            generation,
            disk_generation,
            vmstate,
            working_set: self.working_set.clone(),
            ..self.no_contents()
        };
        let flush_disk = self.read_devices().disk_flush();
        let persist = Persist {
            flush_disk: Some(Box::new(flush_disk)),
            ..self.writer(target, contents)?
        };
        let (cancel, baseline) = (Arc::clone(&persist.cancel), Arc::clone(&persist.baseline));
        self.pre_copy_cancel.store(true, Ordering::Release);
        let pre_copied = Arc::clone(&self.pre_copied_bytes);
        let job = self.write_image("persist", move |job| {
            let result = persist.run().map(|stats| PersistStats {
                pre_copied_bytes: pre_copied.swap(0, Ordering::AcqRel),
                ..stats
            });
            VmEvent::PersistEnded { job, result }
        })?;
        self.phase = Phase::Persisting {
            job,
            cancel,
            baseline,
        };
        Ok(())
    }

    /// Start writing what the guest has changed so far, while it runs on, so that the next persist has less to write.
    ///
    /// # Errors
    /// Not running, or the file can't be used.
    pub fn pre_copy(&mut self, target: ImageFiles) -> Result<(), VmError> {
        self.expect(matches!(self.phase, Phase::Running), "copy ahead")?;
        let persist = self.writer(target, self.no_contents())?;
        self.pre_copy_cancel.store(true, Ordering::Release);
        self.pre_copy_cancel = Arc::clone(&persist.cancel);
        let pre_copied = Arc::clone(&self.pre_copied_bytes);
        self.write_image("pre-copy", move |job| {
            let baseline = Arc::clone(&persist.baseline);
            let result = persist.pre_copy().map(|n_bytes| {
                pre_copied.fetch_add(n_bytes, Ordering::AcqRel);
                baseline
            });
            VmEvent::PreCopyEnded { job, result }
        })?;
        Ok(())
    }

    /// A copy ahead ended: the next persist goes on from it, unless one has begun since without it.
    pub fn pre_copy_ended(&mut self, job: u64, result: Result<Arc<ImageFile>, PersistError>) {
        match result {
            Ok(baseline) if self.n_jobs == job => self.baseline = Some(baseline),
            Ok(_) | Err(PersistError::Cancelled) => {}
            Err(error) => tracing::warn!(error = chain(&error), "changed pages not copied ahead"),
        }
    }

    /// What goes into an image of which nothing is valid yet.
    fn no_contents(&self) -> Contents {
        Contents {
            generation: 0,
            disk_generation: 0,
            n_vcpus: self.shape.vcpus,
            vmstate: Vec::new(),
            working_set: Vec::new(),
            host: self.host.clone(),
        }
    }

    fn writer(&self, target: ImageFiles, contents: Contents) -> Result<Persist, VmError> {
        let ImageFiles { image, base } = target;
        let in_place = self.in_place(&image)?;
        let fresh = in_place.is_none();
        let baseline = match in_place {
            Some(baseline) => baseline,
            None => {
                let layout = ImageLayout::new(self.ram.layout().len_bytes());
                let file = image.try_clone().map_err(VmError::ImageFile)?;
                let base = base.map_or(Ok(None), |base| self.base_at_hand(&base))?;
                Arc::new(ImageFile::empty(file, layout, base).map_err(VmError::ImageFile)?)
            }
        };
        Ok(Persist {
            ram: Arc::clone(&self.ram),
            target: image,
            source: self.restored_from.clone().filter(|_| fresh),
            fresh,
            contents,
            cancel: Arc::default(),
            flush_disk: None,
            baseline,
        })
    }

    /// What the guest's pages are known to differ from, if that is the file that a new image is to lie over: a new image
    /// without a base is only larger.
    fn base_at_hand(&self, wanted: &File) -> Result<Option<Base>, VmError> {
        for image in self.restored_from.iter().chain(&self.baseline) {
            let root = image.base().unwrap_or(image);
            if root.is_same_file(wanted).map_err(VmError::ImageFile)? {
                return Ok(Base::new(Arc::clone(root)).unwrap_or_else(|error| {
                    tracing::warn!(error = chain(&error), "new image without a base");
                    None
                }));
            }
        }
        Ok(None)
    }

    /// Run a job that writes an image on a thread of its own, after those before; its number.
    fn write_image(
        &mut self,
        name: &str,
        work: impl FnOnce(u64) -> VmEvent + Send + 'static,
    ) -> Result<u64, VmError> {
        self.n_jobs += 1;
        let job = self.n_jobs;
        let events = Arc::clone(&self.events);
        let writing = Arc::clone(&self.writing);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // A cancelled one may still be on its way out. One that comes late sees its cancellation first.
                let turn = writing.lock().unwrap_or_else(PoisonError::into_inner);
                let event = work(job);
                drop(turn);
                events(event);
            })
            .map_err(VmError::Thread)?;
        Ok(job)
    }

    /// What the target holds, if that is known: the baseline, or what this machine was restored from, which a copy ahead to
    /// another file may have replaced as the baseline.
    fn in_place(&self, target: &File) -> Result<Option<Arc<ImageFile>>, VmError> {
        for image in self.baseline.iter().chain(&self.restored_from) {
            if image.is_same_file(target).map_err(VmError::ImageFile)? {
                return Ok(Some(Arc::clone(image)));
            }
        }
        Ok(None)
    }
}
