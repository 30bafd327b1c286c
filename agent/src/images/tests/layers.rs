//! Images that lie over others.

use super::*;
use crate::images::memory::OpenImage;
use crate::images::snapshots::Wanted;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use torpor_api::SnapshotId;
use torpor_api::vmm::FdRole;

/// Inode of the image, and of the one that it lies over or is to lie over.
pub(super) fn opened(image: &OpenImage) -> (u64, Option<u64>) {
    let inode = |role| {
        let mut fds = image.fds().filter(|(of, _)| *of == role);
        let (_, fd) = fds.next()?;
        let file = File::from(fd.as_fd().try_clone_to_owned().unwrap());
        Some(file.metadata().unwrap().ino())
    };
    (inode(FdRole::Image).unwrap(), inode(FdRole::ImageBase))
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

fn name_of(header: &[u8]) -> u32 {
    u32::from_le_bytes(header[HEADER_LEN - 4..].try_into().unwrap())
}

/// A machine made from a snapshot that stays; a persist of it is played by writing a header.
struct Layered {
    fixture: Fixture,
    snapshot: SnapshotId,
    machine: MachineFiles,
    id: MachineId,
}

impl Layered {
    fn new() -> Self {
        let fixture = Fixture::new().with_disk();
        let (snapshot, id) = (SnapshotId::generate(), MachineId::generate());
        fs::write(fixture.path(IMAGE), header(true, 3, 1)).unwrap();
        fixture.files().write_manifest(&manifest(&fixture.id)).unwrap();
        fixture
            .images
            .stage_snapshot(&fixture.files(), 3, &snapshot)
            .unwrap();
        fixture.images.commit_snapshot(&snapshot).unwrap();
        let machine = fixture.clone_to(&snapshot, &id);
        Self {
            fixture,
            snapshot,
            machine,
            id,
        }
    }

    /// Persist as the VMM does it: over the base that it is given, to the file that it is given.
    fn persist(&self, generation: u64) {
        let image = self.machine.open_image_for_persist().unwrap();
        let (_, base) = opened(&image);
        let in_place = inode(&self.machine.image_path()) == opened(&image).0;
        let over = match base {
            Some(base) => Some(self.header_with(base)),
            None if in_place => {
                crate::images::header::read(&self.machine.image_path())
                    .unwrap()
                    .base
            }
            None => None,
        };
        let (_, fd) = image.fds().next().unwrap();
        let file = File::from(fd.as_fd().try_clone_to_owned().unwrap());
        file.write_all_at(&header_over(over, true, generation, 1), 0)
            .unwrap();
        self.machine.promote_image(generation).unwrap();
        let manifest = Manifest {
            generation,
            ..manifest(&self.id)
        };
        self.machine.write_manifest(&manifest).unwrap();
        assert_eq!(self.machine.inspect(), ImageState::Valid { generation });
    }

    /// Name of the image of this inode.
    fn header_with(&self, wanted: u64) -> u32 {
        let names = [IMAGE, "memory.base"].map(|name| self.machine.path(name));
        let path = names.iter().find(|path| path.exists() && inode(path) == wanted);
        name_of(&fs::read(path.unwrap()).unwrap())
    }

    fn base(&self) -> Option<u64> {
        let path = self.machine.path("memory.base");
        path.exists().then(|| inode(&path))
    }
}

impl Fixture {
    fn clone_to(&self, snapshot: &SnapshotId, id: &MachineId) -> MachineFiles {
        let machine = self.images.machine(id);
        let wanted = Wanted {
            shape: manifest(id).shape,
            template_digest: "d",
        };
        self.images.clone_snapshot(snapshot, &machine, wanted).unwrap();
        machine
    }
}

#[test]
fn the_first_image_of_a_machine_lies_over_the_snapshots_and_is_rewritten_in_place() {
    let layered = Layered::new();
    let snapshots = inode(&layered.machine.image_path());
    layered.persist(4);
    let own = inode(&layered.machine.image_path());
    assert_ne!(own, snapshots);
    assert_eq!(layered.base(), Some(snapshots));
    layered.machine.drop_spent_images();
    assert_eq!(
        opened(&layered.machine.open_image().unwrap()),
        (own, Some(snapshots))
    );
    layered.persist(5);
    assert_eq!(inode(&layered.machine.image_path()), own);
    assert_eq!(layered.base(), Some(snapshots));
}

#[test]
fn a_snapshot_of_an_image_over_another_has_both_and_its_machines_go_on_over_the_same() {
    let layered = Layered::new();
    layered.persist(4);
    let images = &layered.fixture.images;
    let second = SnapshotId::generate();
    images.stage_snapshot(&layered.machine, 4, &second).unwrap();
    images.commit_snapshot(&second).unwrap();
    let id = MachineId::generate();
    let forked = Layered {
        machine: layered.fixture.clone_to(&second, &id),
        fixture: Fixture::new(),
        snapshot: second.clone(),
        id,
    };
    let shared = inode(&layered.machine.image_path());
    assert_eq!(
        opened(&forked.machine.open_image().unwrap()),
        (shared, layered.base())
    );
    forked.persist(5);
    assert_ne!(inode(&forked.machine.image_path()), shared);
    assert_eq!(forked.base(), layered.base(), "no line of images gets longer");
    // The machine that was snapshotted has somebody else's image now, too.
    layered.persist(5);
    assert_ne!(inode(&layered.machine.image_path()), shared);
    for machine in [&layered.machine, &forked.machine] {
        machine.drop_spent_images();
        assert_eq!(machine.inspect(), ImageState::Valid { generation: 5 });
    }
}

#[test]
fn a_base_that_nobody_else_has_any_more_is_given_up_at_the_next_pause() {
    let layered = Layered::new();
    layered.persist(4);
    layered.machine.drop_spent_images();
    layered.fixture.images.delete_snapshot(&layered.snapshot).unwrap();
    layered.persist(5);
    assert!(
        layered.base().is_some(),
        "the machine that was snapshotted has it"
    );
    layered.fixture.images.delete(&layered.fixture.id).unwrap();
    let before = inode(&layered.machine.image_path());
    layered.persist(6);
    assert_ne!(inode(&layered.machine.image_path()), before);
    assert!(layered.base().is_some(), "the VMM still reads from it");
    layered.machine.drop_spent_images();
    assert_eq!(layered.base(), None);
    let after = inode(&layered.machine.image_path());
    assert_eq!(opened(&layered.machine.open_image().unwrap()), (after, None));
    layered.persist(7);
    assert_eq!(inode(&layered.machine.image_path()), after);
}

#[test]
fn an_image_without_its_base_or_over_another_is_corrupt() {
    let layered = Layered::new();
    layered.persist(4);
    let base = layered.machine.path("memory.base");
    let image = layered.machine.image_path();
    fs::remove_file(&base).unwrap();
    assert!(matches!(layered.machine.inspect(), ImageState::Corrupt { .. }));
    assert!(layered.machine.open_image().is_err());
    fs::write(&base, header(true, 3, 2)).unwrap();
    assert!(matches!(layered.machine.inspect(), ImageState::Corrupt { .. }));
    fs::remove_file(&base).unwrap();
    fs::hard_link(layered.fixture.path(IMAGE), &base).unwrap();
    assert_eq!(
        layered.machine.inspect(),
        ImageState::Valid { generation: 4 },
        "{}",
        image.display()
    );
}

#[test]
fn what_a_crash_left_of_a_base_takes_no_image_away() {
    let layered = Layered::new();
    // The link is made before the new image takes its place, and there it ended.
    fs::hard_link(layered.machine.image_path(), layered.machine.path("memory.base")).unwrap();
    assert_eq!(layered.machine.inspect(), ImageState::Valid { generation: 3 });
    let (image, base) = opened(&layered.machine.open_image().unwrap());
    assert_eq!(base, None, "an image without a base is restored without");
    layered.persist(4);
    assert_eq!(layered.base(), Some(image));
    layered.machine.drop_spent_images();
    assert_eq!(layered.machine.inspect(), ImageState::Valid { generation: 4 });
}
