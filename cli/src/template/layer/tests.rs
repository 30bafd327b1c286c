use super::*;
use std::io::Write as _;

enum Item<'a> {
    File(&'a str, &'a str),
    Directory(&'a str),
    Symlink(&'a str, &'a str),
    Link(&'a str, &'a str),
}

fn tarball(items: &[Item<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for item in items {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        // Owners can be set by root only.
        header.set_uid(nix_uid());
        header.set_gid(nix_uid());
        let (name, content, kind, target) = match item {
            Item::File(name, content) => (name, *content, EntryType::Regular, None),
            Item::Directory(name) => (name, "", EntryType::Directory, None),
            Item::Symlink(name, target) => (name, "", EntryType::Symlink, Some(target)),
            Item::Link(name, target) => (name, "", EntryType::Link, Some(target)),
        };
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        if let Some(target) = target {
            header.set_link_name_literal(target).unwrap();
        }
        // What a tool would not write, somebody else might.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn nix_uid() -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").unwrap().uid().into()
}

struct Host {
    dir: tempfile::TempDir,
    tree: Tree,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::make(&dir.path().join("tree")).unwrap();
        Self { dir, tree }
    }

    fn apply_bytes(&self, bytes: &[u8], size_mib: u32) -> Result<(), ImportError> {
        let path = self.dir.path().join("layer.tar");
        fs::write(&path, bytes).unwrap();
        apply(
            &self.tree,
            &path,
            Whiteouts::Obeyed,
            &mut Room::new(size_mib),
            |_| {},
        )
    }

    fn apply(&self, items: &[Item<'_>]) -> Result<(), ImportError> {
        self.apply_bytes(&tarball(items), 1)
    }

    fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.tree.root().join(directory)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[test]
fn layers_add_replace_and_take_away() {
    let host = Host::new();
    host.apply(&[
        Item::Directory("a"),
        Item::File("a/1", "one"),
        Item::File("a/2", "two"),
        Item::Directory("b"),
        Item::File("b/old", "old"),
        Item::File("file", "f"),
        Item::Link("hard", "file"),
        Item::Symlink("soft", "a/1"),
    ])
    .unwrap();
    assert_eq!(fs::read_to_string(host.tree.root().join("soft")).unwrap(), "one");
    host.apply(&[
        Item::File("a/.wh.1", ""),
        Item::File("b/new", "new"),
        Item::File("b/.wh..wh..opq", ""),
        Item::Directory("file"),
        Item::File("soft", "a file now"),
    ])
    .unwrap();
    assert_eq!(
        (host.names("a"), host.names("b")),
        (vec!["2".into()], vec!["new".into()])
    );
    assert!(host.tree.root().join("file").is_dir());
    assert_eq!(
        fs::read_to_string(host.tree.root().join("hard")).unwrap(),
        "f",
        "the other link stays"
    );
    assert_eq!(
        fs::read_to_string(host.tree.root().join("soft")).unwrap(),
        "a file now"
    );
}

#[test]
fn nothing_is_written_outside_the_tree() {
    let host = Host::new();
    let outside = host.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "v").unwrap();
    let to = outside.to_str().unwrap();
    for items in [
        vec![Item::File("../outside/x", "x")],
        vec![Item::Symlink("l", to), Item::File("l/x", "x")],
        vec![Item::Symlink("m", "../outside"), Item::File("m/.wh.victim", "")],
        vec![Item::Symlink("n", "../outside"), Item::Link("stolen", "n/victim")],
        vec![Item::Link("stolen", "../outside/victim")],
        vec![Item::Symlink("o", to), Item::File("o/.wh..wh..opq", "")],
    ] {
        assert!(host.apply(&items).is_err());
    }
    assert_eq!(fs::read_to_string(outside.join("victim")).unwrap(), "v");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert!(!host.tree.root().join("stolen").exists());
}

#[test]
fn a_source_larger_than_the_disk_is_refused() {
    let host = Host::new();
    let large = "x".repeat((1 << 20) + 1);
    let error = host.apply(&[Item::File("large", &large)]).unwrap_err();
    assert!(matches!(error, ImportError::TooLarge { size_mib: 1 }));
}

#[test]
fn compression_is_told_by_content() {
    let plain = tarball(&[Item::File("x", "content")]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
    for bytes in [plain, gzip.finish().unwrap(), zstd] {
        let host = Host::new();
        host.apply_bytes(&bytes, 1).unwrap();
        assert_eq!(fs::read_to_string(host.tree.root().join("x")).unwrap(), "content");
    }
    assert!(Host::new().apply_bytes(b"BZh91AY", 1).is_err());
}
