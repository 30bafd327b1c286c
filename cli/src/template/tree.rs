//! The tree that a template's disk is made of, and names in it that cannot leave it.

use super::{ImportError, bad, failed};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

/// A directory that is being filled.
#[derive(Debug)]
pub(super) struct Tree {
    /// Canonical, so that what lies below can be told.
    root: PathBuf,
}

impl Tree {
    /// The tree in this directory, which is made.
    pub(super) fn make(root: &Path) -> Result<Self, ImportError> {
        fs::create_dir_all(root).map_err(failed("make directory", root))?;
        let root = fs::canonicalize(root).map_err(failed("resolve", root))?;
        Ok(Self { root })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where `name` is, its directories resolved below the root and made if they are missing. The last part is not
    /// followed. `None` for the root itself.
    pub(super) fn place(&self, name: &Path) -> Result<Option<PathBuf>, ImportError> {
        let mut parts = Vec::new();
        for part in name.components() {
            match part {
                Component::Normal(part) => parts.push(part),
                Component::CurDir | Component::RootDir => {}
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(bad(name, "a name leads out of the tree"));
                }
            }
        }
        let Some(last) = parts.pop() else { return Ok(None) };
        let mut directory = self.root.clone();
        for part in parts {
            directory = self.enter(&directory.join(part))?;
        }
        Ok(Some(directory.join(last)))
    }

    /// A directory below the root, made if nothing is there. A link is followed if it leads to one.
    fn enter(&self, path: &Path) -> Result<PathBuf, ImportError> {
        match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => Ok(path.to_owned()),
            Ok(found) if found.is_symlink() => {
                let target = fs::canonicalize(path).map_err(failed("follow the link", path))?;
                if target.starts_with(&self.root) && target.is_dir() {
                    Ok(target)
                } else {
                    Err(bad(path, "a link leads out of the tree"))
                }
            }
            Ok(_) => Err(bad(path, "is no directory, and something lies below it")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut builder = fs::DirBuilder::new();
                builder
                    .mode(0o755)
                    .create(path)
                    .map_err(failed("make directory", path))?;
                Ok(path.to_owned())
            }
            Err(error) => Err(failed("look at", path)(error)),
        }
    }

    /// Remove what is there, whatever it is.
    pub(super) fn clear(path: &Path) -> Result<(), ImportError> {
        let removed = match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
            _ => Ok(()),
        }
    }

    /// A directory of this mode.
    pub(super) fn directory(&self, name: &str, mode: u32) -> Result<(), ImportError> {
        let Some(path) = self.place(Path::new(name))? else {
            return Ok(());
        };
        let directory = self.enter(&path)?;
        let mode = fs::Permissions::from_mode(mode);
        fs::set_permissions(&directory, mode).map_err(failed("set the mode of", &directory))
    }

    /// A file with this content, whatever was there.
    pub(super) fn write(&self, name: &str, mode: u32, content: &[u8]) -> Result<(), ImportError> {
        let Some(path) = self.place(Path::new(name))? else {
            return Ok(());
        };
        Self::clear(&path)?;
        let mut options = fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(mode).open(&path);
        let mut file = file.map_err(failed("make", &path))?;
        io::Write::write_all(&mut file, content).map_err(failed("write", &path))
    }

    /// Whether something is there.
    pub(super) fn has(&self, name: &str) -> Result<bool, ImportError> {
        let place = self.place(Path::new(name))?;
        Ok(place.is_some_and(|path| fs::symlink_metadata(path).is_ok()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_and_no_link_leads_out_of_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let tree = Tree::make(&dir.path().join("tree")).unwrap();
        std::os::unix::fs::symlink(&outside, tree.root().join("absolute")).unwrap();
        std::os::unix::fs::symlink("../outside", tree.root().join("relative")).unwrap();
        std::os::unix::fs::symlink("/", tree.root().join("top")).unwrap();
        for name in [
            "../x",
            "a/../../x",
            "absolute/x",
            "relative/x",
            "top/etc/x",
            "absolute/y/z",
        ] {
            assert!(tree.place(Path::new(name)).is_err(), "{name} was accepted");
            assert!(tree.write(name, 0o644, b"x").is_err(), "{name} was written");
        }
        assert!(fs::read_dir(&outside).unwrap().next().is_none());
        // A link itself is replaced, not followed.
        tree.write("absolute", 0o644, b"x").unwrap();
        assert!(outside.is_dir());
        fs::create_dir(tree.root().join("usr")).unwrap();
        std::os::unix::fs::symlink("usr", tree.root().join("lib")).unwrap();
        tree.write("/lib/x/y", 0o644, b"y").unwrap();
        assert_eq!(fs::read(tree.root().join("usr/x/y")).unwrap(), b"y");
    }
}
