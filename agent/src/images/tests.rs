//! Images on a real file system.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use torpor_api::MachineId;
use torpor_api::vmm::{IMAGE_FORMAT, LAYERED_IMAGE_FORMAT, Shape};

use super::disk::{GENERATION, OVERLAY, read_generation};
use super::header::{HEADER_LEN, IMAGE};
use super::manifest::{FORMAT, MANIFEST, Manifest};
use super::template::{Template, Templates};
use super::{Images, ImagesError, MachineFiles};
use crate::machine::hypervisor::ImageState;

mod layers;

fn template_dir(dir: &Path, name: &str, json: &str) {
    let dir = dir.join(name);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("vmlinux"), b"kernel").unwrap();
    File::create(dir.join("rootfs.ext4"))
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    fs::write(dir.join("template.json"), json).unwrap();
}

fn description(name: &str, rootfs: &str) -> String {
    format!(
        r#"{{"name":"{name}","os":"debian-12","kernel":"vmlinux","rootfs":"{rootfs}","cmdline_extra":"quiet",
            "id":"abc","sha256":{{"vmlinux":"00"}}}}"#
    )
}

fn manifest(machine: &MachineId) -> Manifest {
    Manifest {
        format: FORMAT,
        machine_id: machine.clone(),
        generation: 3,
        disk_generation: 1,
        shape: Shape {
            vcpus: 1,
            mem_mib: 256,
        },
        template: "base".to_owned(),
        template_digest: "d".to_owned(),
        written_unix_ms: 1,
        fork: false,
        host_signature: serde_json::json!({"arch": "x86_64"}),
    }
}

/// A first page as `vmm/src/image/header.rs` lays it out.
fn header(valid: bool, generation: u64, disk_generation: u64) -> Vec<u8> {
    header_over(None, valid, generation, disk_generation)
}

/// The same of an image that lies over the one whose header has this checksum.
fn header_over(base: Option<u32>, valid: bool, generation: u64, disk_generation: u64) -> Vec<u8> {
    let signature = br#"{"arch":"x86_64"}"#;
    let mut page = vec![0; HEADER_LEN];
    page[..8].copy_from_slice(b"TORPORMI");
    let version = base.map_or(IMAGE_FORMAT, |_| LAYERED_IMAGE_FORMAT);
    page[8..12].copy_from_slice(&version.to_le_bytes());
    page[92..96].copy_from_slice(&base.unwrap_or(0).to_le_bytes());
    page[12..16].copy_from_slice(&u32::from(valid).to_le_bytes());
    page[16..24].copy_from_slice(&generation.to_le_bytes());
    page[24..32].copy_from_slice(&disk_generation.to_le_bytes());
    page[88..92].copy_from_slice(&u32::try_from(signature.len()).unwrap().to_le_bytes());
    page[96..96 + signature.len()].copy_from_slice(signature);
    let sum = crc32c::crc32c(&page[..HEADER_LEN - 4]);
    page[HEADER_LEN - 4..].copy_from_slice(&sum.to_le_bytes());
    page
}

struct Fixture {
    dir: tempfile::TempDir,
    images: Images,
    id: MachineId,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        template_dir(dir.path(), "base", &description("base", "rootfs.ext4"));
        let images = Images::open(dir.path()).unwrap();
        let id = MachineId::generate();
        Self { dir, images, id }
    }

    fn files(&self) -> MachineFiles {
        self.images.machine(&self.id)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("machines").join(self.id.as_str()).join(name)
    }

    fn template(&self) -> Template {
        Templates::new(vec![self.dir.path().to_owned()])
            .find("base")
            .unwrap()
            .unwrap()
    }

    fn with_disk(self) -> Self {
        self.files().ensure_disk(&self.template(), 16).unwrap();
        self
    }

    /// A sleeping machine: image of generation 3, disk of generation 1.
    fn asleep() -> Self {
        let fixture = Self::new().with_disk();
        fs::write(fixture.path(IMAGE), header(true, 3, 1)).unwrap();
        fixture.files().write_manifest(&manifest(&fixture.id)).unwrap();
        fixture
    }
}

#[test]
fn an_overlay_has_the_asked_size_over_the_template_and_is_made_once() {
    let fixture = Fixture::new().with_disk();
    let info = std::process::Command::new("qemu-img")
        .args(["info", "--output=json"])
        .arg(fixture.path(OVERLAY))
        .output()
        .unwrap();
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["virtual-size"], 16 << 20);
    assert_eq!(info["cluster-size"], 64 << 10);
    assert_eq!(info["backing-filename-format"], "raw");
    assert_eq!(read_generation(&fixture.path(GENERATION)).unwrap(), 1);
    let before = fs::read(fixture.path(OVERLAY)).unwrap();
    File::options()
        .append(true)
        .open(fixture.path(OVERLAY))
        .unwrap()
        .write_all(b"guest data")
        .unwrap();
    let fixture = fixture.with_disk();
    assert_eq!(fs::read(fixture.path(OVERLAY)).unwrap().len(), before.len() + 10);
}

#[test]
fn a_disk_smaller_than_its_template_is_refused() {
    let fixture = Fixture::new();
    let template = Templates::new(vec![fixture.dir.path().to_owned()])
        .find("base")
        .unwrap()
        .unwrap();
    let refused = fixture.files().ensure_disk(&template, 7);
    assert!(
        matches!(
            refused,
            Err(ImagesError::DiskTooSmall {
                disk_mib: 7,
                template_mib: 8
            })
        ),
        "{refused:?}"
    );
    assert!(!fixture.path(OVERLAY).exists());
}

#[test]
fn an_overlay_grows_and_never_shrinks_and_keeps_what_is_in_it() {
    let fixture = Fixture::new().with_disk();
    let overlay = fixture.path(OVERLAY);
    let qemu = |program: &str, arguments: &[&str]| {
        let done = std::process::Command::new(program)
            .args(arguments)
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        String::from_utf8(done.stdout).unwrap()
    };
    let path = overlay.to_str().unwrap();
    qemu("qemu-io", &["-c", "write -P 0x5a 1M 64k", path]);
    // 513 MiB is the first size that needs a second entry in the first table.
    for (asked_mib, has_mib) in [(16, 16_u32), (2048, 2048), (32, 2048), (2049, 2049)] {
        fixture
            .files()
            .ensure_disk(&fixture.template(), asked_mib)
            .unwrap();
        let info: serde_json::Value =
            serde_json::from_str(&qemu("qemu-img", &["info", "--output=json", path])).unwrap();
        assert_eq!(info["virtual-size"], u64::from(has_mib) << 20, "{asked_mib}");
        qemu("qemu-img", &["check", path]);
    }
    qemu(
        "qemu-io",
        &["-c", "read -P 0x5a 1M 64k", "-c", "read -P 0 2047M 64k", path],
    );
}

#[test]
fn an_image_is_valid_only_while_manifest_header_and_disk_agree() {
    let fixture = Fixture::asleep();
    assert_eq!(fixture.files().inspect(), ImageState::Valid { generation: 3 });

    let mut disk = 2u64.to_le_bytes().to_vec();
    disk.extend(crc32c::crc32c(&disk).to_le_bytes());
    disk.extend([0; 4]);
    fs::write(fixture.path(GENERATION), &disk).unwrap();
    assert_eq!(fixture.files().inspect(), ImageState::Stale { generation: 3 });

    disk[3] ^= 1;
    fs::write(fixture.path(GENERATION), &disk).unwrap();
    assert!(matches!(fixture.files().inspect(), ImageState::Corrupt { .. }));
}

#[test]
fn a_cut_short_or_foreign_or_missing_image_is_corrupt() {
    let fixture = Fixture::asleep();
    for page in [
        header(false, 3, 1),
        header(true, 4, 1),
        header(true, 3, 2),
        vec![0; 4096],
        vec![0; 10],
    ] {
        fs::write(fixture.path(IMAGE), page).unwrap();
        assert!(matches!(fixture.files().inspect(), ImageState::Corrupt { .. }));
    }
    fs::remove_file(fixture.path(IMAGE)).unwrap();
    assert!(matches!(fixture.files().inspect(), ImageState::Corrupt { .. }));
    let image = File::create(fixture.path(IMAGE)).unwrap();
    image.write_all_at(&header(true, 3, 1), 0).unwrap();
    assert_eq!(fixture.files().inspect(), ImageState::Valid { generation: 3 });
    image.write_all_at(b"x", 20).unwrap();
    assert!(matches!(fixture.files().inspect(), ImageState::Corrupt { .. }));
}

#[test]
fn an_image_that_was_given_up_does_not_come_back() {
    let fixture = Fixture::asleep();
    fixture.files().discard_image().unwrap();
    fixture.files().discard_image().unwrap();
    assert_eq!(fixture.files().inspect(), ImageState::None);
    assert!(
        fixture.path(IMAGE).exists(),
        "the next persist rewrites it in place"
    );
}

#[test]
fn a_manifest_with_an_unknown_field_or_format_is_refused() {
    let fixture = Fixture::asleep();
    let path = fixture.path(MANIFEST);
    let good = fs::read_to_string(&path).unwrap();
    assert_eq!(fixture.files().manifest().unwrap(), Some(manifest(&fixture.id)));
    for bad in [
        good.replacen('{', r#"{"extra":1,"#, 1),
        good.replace("\"format\": 1", "\"format\": 2"),
        String::new(),
    ] {
        fs::write(&path, bad).unwrap();
        assert!(fixture.files().manifest().is_err());
        assert!(matches!(fixture.files().inspect(), ImageState::Corrupt { .. }));
    }
    fs::write(
        &path,
        good.replace(fixture.id.as_str(), MachineId::generate().as_str()),
    )
    .unwrap();
    assert!(
        matches!(fixture.files().inspect(), ImageState::Corrupt { .. }),
        "another machine's manifest"
    );
}

#[test]
fn a_deleted_machine_is_gone_and_an_interrupted_delete_is_finished_at_the_next_start() {
    let fixture = Fixture::asleep();
    fixture.images.delete(&fixture.id).unwrap();
    fixture.images.delete(&fixture.id).unwrap();
    assert!(!fixture.path("").exists());

    let left = fixture
        .dir
        .path()
        .join("machines/.trash")
        .join(fixture.id.as_str());
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join(IMAGE), b"x").unwrap();
    Images::open(fixture.dir.path()).unwrap();
    assert!(!left.exists());
}

#[test]
fn the_console_tail_is_the_end_of_the_log_and_empty_without_one() {
    let fixture = Fixture::asleep();
    assert_eq!(fixture.files().console_tail(10).unwrap(), b"");
    fs::write(fixture.path("console.log"), b"0123456789abcdef").unwrap();
    assert_eq!(fixture.files().console_tail(4).unwrap(), b"cdef");
    assert_eq!(fixture.files().console_tail(400).unwrap().len(), 16);
    assert!(fixture.images.free_bytes().unwrap() > 0);
}

#[test]
fn templates_are_found_by_name_and_the_first_directory_wins() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    template_dir(
        first.path(),
        "base",
        &description("base", "rootfs.ext4").replace("debian-12", "mine"),
    );
    template_dir(second.path(), "base", &description("base", "rootfs.ext4"));
    template_dir(second.path(), "other", &description("other", "rootfs.ext4"));
    let templates = Templates::new(vec![first.path().to_owned(), second.path().to_owned()]);
    let names: Vec<_> = templates
        .all()
        .into_iter()
        .map(|t| (t.name, t.description, t.disk_mib))
        .collect();
    let expected = [("base", "mine", 8), ("other", "debian-12", 8)];
    assert_eq!(
        names,
        expected.map(|(name, text, mib)| (name.to_owned(), text.to_owned(), mib))
    );
    assert_eq!(templates.find("none").unwrap(), None);
    let base = templates.find("base").unwrap().unwrap();
    assert_eq!(base.cmdline_extra, "quiet");
    let before = base.info.digest;
    let longer = File::options().write(true).open(&base.rootfs).unwrap();
    longer.set_len(9 << 20).unwrap();
    assert_ne!(templates.find("base").unwrap().unwrap().info.digest, before);
}

#[test]
fn a_template_can_name_no_file_outside_its_directory_and_no_name_leaves_the_search_path() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("templates")).unwrap();
    template_dir(dir.path(), "secret", &description("secret", "rootfs.ext4"));
    let templates = Templates::new(vec![dir.path().join("templates")]);
    for name in ["../secret", "/etc", "", ".", "a/../../secret", "SECRET", "x\0y"] {
        assert_eq!(templates.find(name).unwrap(), None, "{name:?}");
    }
    let templates = Templates::new(vec![dir.path().to_owned()]);
    for rootfs in ["../secret/rootfs.ext4", "/dev/null", ".hidden", ""] {
        template_dir(dir.path(), "evil", &description("evil", rootfs));
        assert!(templates.find("evil").is_err(), "{rootfs:?}");
    }
    template_dir(dir.path(), "evil", &description("other", "rootfs.ext4"));
    assert!(
        templates.find("evil").is_err(),
        "a name that is not the directory's"
    );
    template_dir(
        dir.path(),
        "evil",
        &description("evil", "rootfs.ext4").replace(r#""id":"abc","#, ""),
    );
    assert!(
        templates.find("evil").is_err(),
        "nothing binds it to its root disk"
    );
}

#[test]
fn an_image_with_two_owners_is_never_rewritten_while_a_vmm_may_read_from_it() {
    use std::os::unix::fs::MetadataExt as _;
    let fixture = Fixture::new().with_disk();
    let other = fixture.images.machine(&MachineId::generate());
    other.create_dir().unwrap();
    let image = fixture.path("memory.img");
    std::fs::write(&image, header(true, 3, 1)).unwrap();
    fixture.files().write_manifest(&manifest(&fixture.id)).unwrap();
    let shared = std::fs::metadata(&image).unwrap().ino();
    std::fs::hard_link(&image, other.image_path()).unwrap();
    let target_of = |files: &MachineFiles| layers::opened(&files.open_image_for_persist().unwrap()).0;
    // Both are shared: each gets a file of its own.
    assert_ne!(target_of(&fixture.files()), shared);
    std::fs::write(fixture.path("memory.next"), header(true, 4, 1)).unwrap();
    fixture.files().promote_image(5).unwrap();
    assert_eq!(
        std::fs::metadata(&image).unwrap().ino(),
        shared,
        "of another generation"
    );
    fixture.files().promote_image(4).unwrap();
    assert_ne!(std::fs::metadata(&image).unwrap().ino(), shared);
    // The VMM that was restored from it may live on, so the other machine must not take it for its own.
    assert_ne!(target_of(&other), shared);
    fixture.files().drop_spent_images();
    assert_eq!(target_of(&other), shared, "it is the only owner now");
}

#[test]
fn a_snapshot_is_whole_or_not_there_and_its_machine_begins_as_a_fork() {
    use super::snapshots::{SnapshotError, Wanted};
    let fixture = Fixture::new().with_disk();
    let (images, id) = (&fixture.images, torpor_api::SnapshotId::generate());
    std::fs::write(fixture.path("memory.img"), header(true, 3, 1)).unwrap();
    fixture.files().write_manifest(&manifest(&fixture.id)).unwrap();
    assert!(matches!(
        images.stage_snapshot(&fixture.files(), 2, &id),
        Err(SnapshotError::Unusable { .. })
    ));
    images.stage_snapshot(&fixture.files(), 3, &id).unwrap();
    assert!(images.committed_snapshots().unwrap().is_empty());
    // A torpord that starts finds nothing of one that was never committed.
    let images = Images::open(fixture.dir.path()).unwrap();
    assert!(images.commit_snapshot(&id).is_err());
    images.stage_snapshot(&fixture.files(), 3, &id).unwrap();
    assert!(images.commit_snapshot(&id).unwrap() > 0);
    assert_eq!(images.committed_snapshots().unwrap(), std::slice::from_ref(&id));
    let machine = images.machine(&MachineId::generate());
    let shape = manifest(&fixture.id).shape;
    let wanted = |template_digest| Wanted {
        shape,
        template_digest,
    };
    assert!(matches!(
        images.clone_snapshot(&id, &machine, wanted("other")),
        Err(SnapshotError::Incompatible { .. })
    ));
    assert_eq!(images.clone_snapshot(&id, &machine, wanted("d")).unwrap(), 3);
    images.delete_snapshot(&id).unwrap();
    images.delete_snapshot(&id).unwrap();
    assert!(images.committed_snapshots().unwrap().is_empty());
    assert_eq!(machine.inspect(), ImageState::Valid { generation: 3 });
    assert!(machine.manifest().unwrap().unwrap().fork);
    assert!(matches!(
        images.clone_snapshot(&id, &images.machine(&MachineId::generate()), wanted("d")),
        Err(SnapshotError::Missing { .. })
    ));
}
