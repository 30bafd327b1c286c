//! Removing a directory tree of any depth with a bounded stack and a bounded number of descriptors.
//!
//! std's `remove_dir_all` takes a stack frame and a descriptor per level, and whoever nests directories
//! deeply enough would end PID 1. Here a directory that lies deeper than [`MAX_DEPTH`] is first moved
//! up into the tree's root, and so is removed from there. Links are never followed: everything is
//! opened relative to its parent with `O_NOFOLLOW`.

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

const MAX_DEPTH: usize = 32;

/// A directory that is being emptied.
struct Level {
    directory: Dir,
    name: CString,
    subdirectories: Vec<CString>,
}

/// Remove a directory and everything in it. What can't be removed ends it with that error.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let mut moved = 0u64;
    let mut levels = vec![enter(AT_FDCWD, path, CString::default())?];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.subdirectories.pop() {
            if levels.len() < MAX_DEPTH {
                let parent = levels.last().map(|level| &level.directory);
                let Some(parent) = parent else { break };
                let child = enter(parent.as_fd(), name.as_c_str(), name.clone())?;
                levels.push(child);
            } else {
                move_up(&mut levels, &name, &mut moved)?;
            }
        } else if let Some(emptied) = levels.pop()
            && let Some(parent) = levels.last()
        {
            unlinkat(
                parent.directory.as_fd(),
                emptied.name.as_c_str(),
                UnlinkatFlags::RemoveDir,
            )?;
        }
    }
    unlinkat(AT_FDCWD, path, UnlinkatFlags::RemoveDir)?;
    Ok(())
}

/// Open a directory, remove all that is not a directory, and note the directories.
fn enter<P: ?Sized + nix::NixPath>(parent: impl AsFd, path: &P, name: CString) -> nix::Result<Level> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut directory = Dir::openat(parent, path, flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in directory.iter() {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            names.push(entry.file_name().to_owned());
        }
    }
    let mut subdirectories = Vec::new();
    for name in names {
        if !unlink(&directory, &name)? {
            subdirectories.push(name);
        }
    }
    Ok(Level {
        directory,
        name,
        subdirectories,
    })
}

/// `false`: it is a directory.
fn unlink(parent: &Dir, name: &CStr) -> nix::Result<bool> {
    match unlinkat(parent.as_fd(), name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(true),
        // Linux says EISDIR, other systems' servers behind a network file system EPERM.
        Err(Errno::EISDIR) => Ok(false),
        Err(Errno::EPERM) => match unlinkat(parent.as_fd(), name, UnlinkatFlags::RemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(false),
            Err(Errno::ENOTDIR) => Err(Errno::EPERM),
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// Move a directory that is too deep into the root of the tree, to be removed from there.
fn move_up(levels: &mut [Level], name: &CStr, moved: &mut u64) -> io::Result<()> {
    let [root, .., deepest] = levels else {
        return Err(Errno::EINVAL.into());
    };
    loop {
        *moved += 1;
        let new_name = CString::new(format!(".torpor-remove-{moved}"))?;
        match renameat(&deepest.directory, name, &root.directory, new_name.as_c_str()) {
            Ok(()) => {
                root.subdirectories.push(new_name);
                return Ok(());
            }
            Err(Errno::EEXIST | Errno::ENOTEMPTY) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_tree_deeper_than_any_stack_is_removed_and_links_out_of_it_are_not_followed() {
        let scratch = tempfile::tempdir().unwrap();
        let kept = scratch.path().join("kept");
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "x").unwrap();
        let tree = scratch.path().join("tree");
        fs::create_dir(&tree).unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("link")).unwrap();
        nest(&tree, 1500);
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(kept.join("file").exists());
    }

    /// Deeper than PATH_MAX, so one level at a time.
    fn nest(root: &Path, depth: usize) {
        use nix::sys::stat::mkdirat;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut at = Dir::open(root, flags, Mode::empty()).unwrap();
        for _ in 0..depth {
            mkdirat(&at, "d", Mode::S_IRWXU).unwrap();
            at = Dir::openat(&at, "d", flags, Mode::empty()).unwrap();
        }
    }

    #[test]
    fn a_wide_tree_is_removed() {
        let scratch = tempfile::tempdir().unwrap();
        for i in 0..50 {
            let directory = scratch.path().join(format!("tree/{i}/a/b"));
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("file"), "x").unwrap();
        }
        remove_tree(&scratch.path().join("tree")).unwrap();
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    }
}
