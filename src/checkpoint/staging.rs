//! All-or-nothing output: a hidden directory beside the destination, renamed to the destination in one step.
//!
//! Beside `out`, a run locks `.out.tqcompressor-lock` and fills `.out.tqcompressor-partial`, which it renames at the
//! end. The kernel releases the lock of a killed run, so that the next run can remove what it left. At every moment the
//! destination is absent, complete, or unchanged. A long run takes the lock before its first phase.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use same_file::Handle;

use super::files::first_foreign;
use super::read::Checkpoint;
use crate::error::{Error, Result};
use crate::portable;

/// A destination that may be written to.
#[derive(Clone, Debug)]
pub struct Destination {
    /// Absolute, symbolic links resolved.
    path: PathBuf,
    overwrite: bool,
}

impl Destination {
    /// Checks, before any work, that `path` may become the compressed form of `source`: it does not exist, or is an
    /// empty directory, or `overwrite` is set and it holds a checkpoint and nothing else. Overwriting replaces
    /// the whole directory. A directory that holds the source is refused.
    ///
    /// # Errors
    /// [`Error::Destination`] with the reason; [`Error::Io`].
    pub fn check(path: &Path, source: &Checkpoint, overwrite: bool) -> Result<Self> {
        Self::check_beside(path, source.directory(), source.weight_files(), overwrite)
    }

    /// As [`check`](Self::check), for weights in files of any format in the directory `source`.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_beside<'a>(
        path: &Path,
        source: &Path,
        weight_files: impl Iterator<Item = &'a Path>,
        overwrite: bool,
    ) -> Result<Self> {
        let refuse = |problem: &str| Err(Error::Destination { path: path.to_owned(), problem: problem.into() });
        let resolved = resolve(path)?;
        let Some(parent) = resolved.parent() else { return refuse("expected a directory below the root") };
        let from = source.canonicalize().map_err(Error::io(source))?;
        if resolved == from {
            return refuse("this is the source itself: the result goes to a directory of its own");
        }
        let destination = Self { path: resolved.clone(), overwrite };
        let metadata = match fs::metadata(&resolved) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(destination),
            other => other.map_err(Error::io(path))?,
        };
        if !metadata.is_dir() {
            return refuse("exists and is not a directory");
        }
        if portable::is_mount_point(&resolved, parent).map_err(Error::io(path))? {
            return refuse("is a mount point, which cannot be replaced in one step: give a directory below it");
        }
        if is_empty(&resolved)? {
            return Ok(destination);
        }
        if !overwrite {
            return refuse("exists and is not empty (overwrite would replace it)");
        }
        if !resolved.join("config.json").exists() {
            return refuse("is not empty and holds no config.json, so it is not overwritten: remove it by hand");
        }
        for file in weight_files {
            if file.canonicalize().map_err(Error::io(file))?.starts_with(&resolved) {
                return refuse("holds the source's weights: overwriting it would delete them");
            }
        }
        destination.refuse_foreign()?;
        Ok(destination)
    }

    /// Refuses a directory that holds more than a checkpoint: replacing it would delete what this package did not write.
    fn refuse_foreign(&self) -> Result<()> {
        let Some(foreign) = first_foreign(&self.path)? else { return Ok(()) };
        let problem = format!(
            "holds '{}', which is no file of a checkpoint, so it is not overwritten: move that away, or give another \
             directory",
            foreign.display()
        );
        Err(Error::Destination { path: self.path.clone(), problem })
    }
}

/// The right to write a destination, which one run at a time has.
#[derive(Debug)]
pub struct Claim {
    destination: Destination,
    // Fields are dropped in this order.
    lock: Option<Lock>,
    _parents: Parents,
}

impl Claim {
    /// Locks the destination. Directories above it that are missing are made, and removed again if they stay empty.
    ///
    /// # Errors
    /// [`Error::Destination`] if another run is writing it; [`Error::Io`] if the directory above cannot be written to.
    pub fn take(destination: Destination) -> Result<Self> {
        let parents = Parents::make(destination.path.parent().unwrap_or(&destination.path))?;
        let lock = Lock::take(&destination.path)?;
        Ok(Self { destination, lock, _parents: parents })
    }

    /// The path of the destination, absolute and without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.destination.path
    }

    /// `.NAME.tqcompressor-WHAT` beside the destination.
    #[must_use]
    pub fn sibling(&self, what: &str) -> PathBuf {
        sibling(&self.destination.path, what)
    }
}

/// The hidden directory of a live run. Dropped without [`commit`](Self::commit), it leaves no trace.
#[derive(Debug)]
pub struct StagingDirectory {
    // Released after `drop` has removed the directory.
    claim: Arc<Claim>,
    directory: PathBuf,
}

impl StagingDirectory {
    /// Locks the destination, and then as [`within`](Self::within).
    ///
    /// # Errors
    /// Those of [`Claim::take`] and of [`within`](Self::within).
    pub fn begin(destination: Destination) -> Result<Self> {
        Self::within(Arc::new(Claim::take(destination)?))
    }

    /// Removes what killed runs left, and makes the hidden directory.
    ///
    /// # Errors
    /// [`Error::Destination`] if a killed run had moved a destination aside that must not be overwritten; [`Error::Io`]
    /// if the directory above cannot be written to.
    pub fn within(claim: Arc<Claim>) -> Result<Self> {
        let directory = claim.sibling("partial");
        if claim.lock.is_some() {
            recover(&claim.destination)?;
            remove(&directory).map_err(Error::io(&directory))?;
        }
        fs::create_dir(&directory).map_err(Error::io(&directory))?;
        // Dropping the staging directory removes it, so it is constructed only now: whatever was there before is
        // another run's.
        Ok(Self { claim, directory })
    }

    /// The hidden directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes a small file and makes it durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, name: &str, contents: &[u8]) -> Result<()> {
        let path = self.directory.join(name);
        // Flushed as it was opened: Windows flushes no file that is open for reading alone.
        File::create(&path)
            .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()))
            .map_err(Error::io(path))
    }

    /// Copies the file `name` of a directory, or of a folder in it, and makes the copy durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn copy(&self, from: &Path, name: &Path) -> Result<()> {
        let path = self.directory.join(name);
        let folder = path.parent().unwrap_or(&self.directory);
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        copy(&from.join(name), &path)?;
        if folder == self.directory { Ok(()) } else { sync_directory(folder) }
    }

    /// Makes the hidden directory the destination, in one step where the file system can.
    ///
    /// # Errors
    /// [`Error::Destination`] if the destination was filled meanwhile; [`Error::Io`].
    pub fn commit(self) -> Result<()> {
        let to = self.claim.destination.path.clone();
        sync_directory(&self.directory)?;
        if to.exists() && !is_empty(&to)? {
            if !self.claim.destination.overwrite {
                return Err(Error::Destination { path: to, problem: "was filled while this run went on".into() });
            }
            // Again: the run may have taken hours.
            self.claim.destination.refuse_foreign()?;
            exchange(&self.directory, &to).map_err(Error::io(&to))?;
            // The hidden directory now holds the old destination, which is removed on drop.
        } else {
            portable::rename_folder(&self.directory, &to).map_err(Error::io(&to))?;
        }
        sync_directory(to.parent().unwrap_or(&to))
    }
}

impl Drop for StagingDirectory {
    fn drop(&mut self) {
        // An error cannot be reported here; the next run removes the directory.
        let _ = remove(&self.directory);
    }
}

/// An advisory lock on a destination, held by the open file, named by the path.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: Handle,
}

impl Lock {
    /// Takes the lock, or `None` where the file system knows no locks.
    fn take(destination: &Path) -> Result<Option<Self>> {
        let path = sibling(destination, "lock");
        loop {
            // Not truncated: Windows changes no file that another process has locked. If the lock cannot be created, its
            // parent is not writable: name that.
            let opened = File::options().write(true).create(true).truncate(false).open(&path);
            let file = opened.map_err(Error::io(path.parent().unwrap_or(&path)))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let problem = "another run of tqcompressor is writing it".into();
                    return Err(Error::Destination { path: destination.to_owned(), problem });
                }
                Err(TryLockError::Error(error)) if portable::has_no_such_call(&error) => {
                    let _ = fs::remove_file(&path);
                    return Ok(None);
                }
                Err(TryLockError::Error(error)) => return Err(Error::io(&path)(error)),
            }
            // Between opening and locking, the run that held the lock may have removed the file. Then this lock is on a
            // deleted file, and another run may hold the lock on a new file of the same name.
            let file = Handle::from_file(file).map_err(Error::io(&path))?;
            if portable::is_named(&file, &path) {
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while still locked, so no other run can be holding it.
        let _ = fs::remove_file(&self.path);
    }
}

/// `.NAME.tqcompressor-WHAT` beside `NAME`.
fn sibling(path: &Path, what: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".tqcompressor-{what}"));
    path.with_file_name(name)
}

/// An absolute path without symbolic links, of which the last components need not exist.
fn resolve(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).map_err(Error::io(path))?;
    let (mut existing, mut rest) = (absolute.as_path(), Vec::new());
    loop {
        match existing.canonicalize() {
            Ok(mut resolved) => {
                resolved.extend(rest.iter().rev());
                return Ok(resolved);
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(path)(error)),
        }
        let refuse = |problem: String| Err(Error::Destination { path: path.to_owned(), problem });
        if existing.is_symlink() {
            let link = existing.display();
            return refuse(format!(
                "{link} is a symbolic link to a place that does not exist: remove it or make its target"
            ));
        }
        let (Some(name), Some(parent)) = (existing.file_name(), existing.parent()) else {
            return refuse(format!(
                "there is no {}: make the directory before '..', or leave both out",
                existing.display()
            ));
        };
        rest.push(name.to_owned());
        existing = parent;
    }
}

fn is_empty(directory: &Path) -> Result<bool> {
    Ok(fs::read_dir(directory).map_err(Error::io(directory))?.next().is_none())
}

/// Parent directories that were created, outermost first. Dropping removes those that are empty: a result keeps its own.
#[derive(Debug)]
struct Parents(Vec<PathBuf>);

impl Parents {
    /// Makes `directory` and those above it that are missing.
    fn make(directory: &Path) -> Result<Self> {
        let missing: Vec<_> = directory.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
        let mut made = Self(Vec::new());
        for path in missing.into_iter().rev() {
            fs::create_dir(&path).map_err(Error::io(&path))?;
            made.0.push(path);
        }
        Ok(made)
    }
}

impl Drop for Parents {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = fs::remove_dir(path);
        }
    }
}

pub(crate) fn remove(directory: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Restores or removes the directory that a run killed in [`exchange_in_steps`] had moved aside.
fn recover(destination: &Destination) -> Result<()> {
    let aside = sibling(&destination.path, "replaced");
    if !aside.exists() || destination.path.exists() {
        return remove(&aside).map_err(Error::io(&aside));
    }
    fs::rename(&aside, &destination.path).map_err(Error::io(&aside))?;
    if destination.overwrite {
        return Ok(());
    }
    let problem = "exists and is not empty (a killed run had moved it aside, it is back now)".into();
    Err(Error::Destination { path: destination.path.clone(), problem })
}

/// Copies a file with its permissions, and makes the copy durable.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(Error::io(from))?;
    // Not `fs::copy`: a copy that may not be written could not be opened again to be flushed on Windows.
    let copied = File::create(to).and_then(|mut file| {
        std::io::copy(&mut source, &mut file)?;
        file.set_permissions(source.metadata()?.permissions())?;
        file.sync_all()
    });
    copied.map_err(Error::io(to))
}

/// Makes the entries of a directory durable.
fn sync_directory(directory: &Path) -> Result<()> {
    portable::sync_folder(directory).map_err(Error::io(directory))
}

/// Swaps two directories: in one step where the system can, else in three, undone if the second fails.
fn exchange(new: &Path, old: &Path) -> std::io::Result<()> {
    if portable::exchange(new, old)? { Ok(()) } else { exchange_in_steps(new, old) }
}

fn exchange_in_steps(new: &Path, old: &Path) -> std::io::Result<()> {
    let aside = sibling(old, "replaced");
    fs::rename(old, &aside)?;
    if let Err(error) = fs::rename(new, old) {
        fs::rename(&aside, old)?;
        return Err(error);
    }
    fs::rename(&aside, new)
}

#[cfg(test)]
mod tests;
