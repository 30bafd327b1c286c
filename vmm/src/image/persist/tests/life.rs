//! Any life of a machine against a model of its memory.

use super::*;
use crate::memory::prefetch::Placement;
use proptest::prelude::*;

/// An image that a guest can be restored from.
struct Durable {
    generation: u64,
    model: Vec<u64>,
    file: Arc<File>,
    base: Option<Arc<File>>,
}

impl Durable {
    /// What was just written.
    fn of(guest: &Guest, generation: u64, model: &[u64], file: &Arc<File>, base: &Option<Arc<File>>) -> Self {
        let has_base = guest.baseline.as_ref().unwrap().base().is_some();
        Self {
            generation,
            model: model.to_vec(),
            file: Arc::clone(file),
            base: base.clone().filter(|_| has_base),
        }
    }

    fn restore(&self) -> Guest {
        Guest::restore_over(&self.file, self.base.as_deref(), self.generation)
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64),
    Read(u64),
    Discard(u64),
    Persist,
    CancelPersist,
    PreCopy,
    /// Somebody else has the image from here on.
    Share,
    /// With pages put in place before it runs.
    Restore(Extent, Placement),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u64..96, 0u64..4).prop_map(|(page, value)| Step::Write(page, value)),
        3 => (0u64..96).prop_map(Step::Read),
        2 => (0u64..96).prop_map(Step::Discard),
        2 => Just(Step::Persist),
        1 => Just(Step::CancelPersist),
        1 => Just(Step::PreCopy),
        2 => Just(Step::Share),
        3 => restore_step(),
    ]
}

fn restore_step() -> impl Strategy<Value = Step> {
    let placement = prop_oneof![
        Just(Placement::Copied),
        Just(Placement::Mapped),
        Just(Placement::Unwatched)
    ];
    (0u64..96, 1u64..60, any::<bool>(), placement).prop_map(|(first, n_pages, written, placement)| {
        let extent = Extent::new(first..first + n_pages).unwrap();
        Step::Restore(extent.with_written(written), placement)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_image_equals_a_model_of_memory_after_any_life(steps in prop::collection::vec(step(), 1..60)) {
        let mut file = Arc::new(image_file());
        let mut base: Option<Arc<File>> = None;
        let mut guest = Guest::boot();
        let mut model = vec![0u64; 96];
        let mut durable: Option<Durable> = None;
        let mut generation = 0;
        for step in steps {
            match step {
                Step::Write(page, value) => {
                    guest.write(page, value);
                    model[usize::try_from(page).unwrap()] = value;
                }
                Step::Read(page) => {
                    guest.page(page);
                }
                Step::Discard(page) => {
                    guest.discard(page);
                    model[usize::try_from(page).unwrap()] = 0;
                }
                Step::Persist => {
                    generation += 1;
                    guest.persist(&file, generation);
                    durable = Some(Durable::of(&guest, generation, &model, &file, &base));
                }
                Step::CancelPersist => {
                    generation += 1;
                    let mut job = guest.job(&file, generation, Box::new(|| Ok(None)), false);
                    let cancel = Arc::clone(&job.cancel);
                    job.flush_disk = Some(Box::new(move || {
                        cancel.store(true, std::sync::atomic::Ordering::Release);
                        Ok(None)
                    }));
                    prop_assert!(matches!(job.run(), Err(PersistError::Cancelled)));
                    durable = None;
                }
                Step::PreCopy => {
                    guest.pre_copy(&file);
                    durable = None;
                }
                Step::Share => {
                    if let Some(durable) = &durable {
                        guest.share();
                        base = Arc::clone(durable.base.as_ref().unwrap_or(&durable.file)).into();
                        file = Arc::new(image_file());
                    }
                }
                Step::Restore(extent, placement) => {
                    if let Some(durable) = &durable {
                        guest = durable.restore();
                        let backing = guest.backing.as_ref().unwrap();
                        backing.prefetch(&[extent], placement, true).unwrap();
                        model = durable.model.clone();
                    }
                }
            }
        }
        generation += 1;
        guest.persist(&file, generation);
        let woken = Durable::of(&guest, generation, &model, &file, &base).restore();
        for (value, page) in model.iter().zip(0u64..) {
            let bytes = woken.page(page);
            prop_assert_eq!(u64::from_le_bytes(*bytes.first_chunk().unwrap()), *value, "page {}", page);
            prop_assert!(bytes == guest.page(page), "page {} differs", page);
        }
    }
}
