//! Calls that differ between operating systems, each with its equivalent elsewhere.
//!
//! What is certain once a result has its name:
//!
//! | | Linux | macOS | Windows |
//! |---|---|---|---|
//! | a full disk is found before the work | yes, by `fallocate` | yes, by `F_PREALLOCATE` | yes, by NTFS's allocation |
//! | a killed run leaves no half result | yes | yes | yes |
//! | after a power failure the contents are whole | yes, by `fsync` | yes, by `F_FULLFSYNC` | yes, by `FlushFileBuffers` |
//! | after a power failure the name is there | yes, by `fsync` of the folder | yes, as on Linux | when NTFS has written its journal, seconds later |
//! | overwriting takes one step | yes, by `RENAME_EXCHANGE` | yes, by `RENAME_SWAP` | no: two, and the next run undoes the first of a killed run |
//! | the lock of a killed run is released | yes, by `flock` | yes, by `flock` | yes, by `LockFileEx` |
//!
//! A file system without one of these calls, such as some of the network, has the equivalent: a length without reserved
//! space, two steps, no lock. Other Unix systems are as Linux where they have its calls. On Windows, a folder of which
//! another process has a file open, such as a checkpoint that is in use, cannot be overwritten: that is an error, and
//! the folder is left as it was.

use std::fs::{self, File};
use std::io::{Error, ErrorKind, Result};
use std::path::Path;

/// Asks for huge pages for the whole small pages of `values`, where the system has them.
///
/// Linux needs the request; other systems decide by themselves.
pub fn prefer_huge_pages<T>(values: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        use rustix::mm::{Advice, madvise};
        // The system's own, which is larger than 4 KiB on some AArch64 machines.
        let page = rustix::param::page_size();
        let bytes = size_of_val(values);
        let start = values.as_mut_ptr().cast::<u8>();
        let skip = start.align_offset(page);
        if skip < bytes {
            // If the advice is refused, the work is slower, not wrong.
            // SAFETY: the range lies inside the slice, and the advice changes no contents.
            let _ = unsafe { madvise(start.add(skip).cast(), (bytes - skip) / page * page, Advice::LinuxHugepage) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = values;
}

/// Lets the system take back the memory of a part of a mapped file; the part is read from the file again when needed.
///
/// Windows takes back such memory by itself, when it runs short.
pub fn release(map: &memmap2::Mmap, begin: usize, length: usize) {
    // SAFETY: the map is shared and read-only, so dropped pages are read back from the file unchanged.
    // On an error the memory is freed later.
    #[cfg(unix)]
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, begin, length) };
    #[cfg(not(unix))]
    let _ = (map, begin, length);
}

/// Makes a new file `length` bytes long, and its space certain where the file system can promise it.
///
/// # Errors
/// The system's, [`ErrorKind::StorageFull`] among them.
pub fn reserve(file: &File, length: u64) -> Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd", target_vendor = "apple"))]
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, length) {
        Err(error) if has_no_such_call(&error.into()) => {}
        other => return other.map_err(Into::into),
    }
    // On Windows, the space of a file that is not sparse is allocated.
    file.set_len(length)
}

/// Writes all of `bytes` at a place of a file, whatever its cursor. Threads may write other places meanwhile.
///
/// # Errors
/// The system's.
pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_all_at(file, bytes, offset);
    #[cfg(windows)]
    {
        let (mut rest, mut offset) = (bytes, offset);
        while !rest.is_empty() {
            match std::os::windows::fs::FileExt::seek_write(file, rest, offset) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => (rest, offset) = (&rest[count..], offset + count as u64),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether a file system that answers a call with this error does not have the call, or does not have it here.
#[must_use]
pub fn has_no_such_call(error: &Error) -> bool {
    #[cfg(unix)]
    let numbers = {
        use rustix::io::Errno;
        [Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOTSUP, Errno::NOLCK, Errno::INVAL].map(Errno::raw_os_error)
    };
    // ERROR_INVALID_FUNCTION and ERROR_NOT_SUPPORTED.
    #[cfg(not(unix))]
    let numbers = [1, 50];
    error.kind() == ErrorKind::Unsupported || error.raw_os_error().is_some_and(|number| numbers.contains(&number))
}

/// Whether `path` names the file that is open as `file`.
#[must_use]
pub fn is_named(file: &same_file::Handle, path: &Path) -> bool {
    same_file::Handle::from_path(path).is_ok_and(|named| named == *file)
}

/// Whether another file system than that of `parent` begins at the folder `path`, which has no links in it.
///
/// On Windows, the path without links to such a folder leads to the root of that file system, which has no parent.
///
/// # Errors
/// The system's.
pub fn is_mount_point(path: &Path, parent: &Path) -> Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        Ok(fs::metadata(path)?.dev() != fs::metadata(parent)?.dev())
    }
    #[cfg(not(unix))]
    {
        let _ = (path, parent);
        Ok(false)
    }
}

/// Waits until the names in a folder are on the disk, where the system has a call for that.
///
/// # Errors
/// The system's.
pub fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    match File::open(folder).and_then(|file| file.sync_all()) {
        // Some network file systems cannot.
        Err(error) if has_no_such_call(&error) => {}
        other => other?,
    }
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

/// Renames a folder to a name that is free or that of an empty folder.
///
/// # Errors
/// The system's; the empty folder is then still there.
pub fn rename_folder(from: &Path, to: &Path) -> Result<()> {
    if cfg!(not(windows)) {
        return fs::rename(from, to);
    }
    rename_in_steps(from, to)
}

/// As [`rename_folder`], for Windows, where not every file system renames a folder over an empty one.
fn rename_in_steps(from: &Path, to: &Path) -> Result<()> {
    let emptied = match fs::remove_dir(to) {
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        other => other.map(|()| true)?,
    };
    fs::rename(from, to).inspect_err(|_| {
        if emptied {
            // The error to report is the first.
            let _ = fs::create_dir(to);
        }
    })
}

/// Swaps two folders in one step, and says whether the system could.
///
/// # Errors
/// The system's, other than that it cannot.
pub fn exchange(new: &Path, old: &Path) -> Result<bool> {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE).map_err(Error::from) {
            Err(error) if has_no_such_call(&error) => {}
            other => return other.map(|()| true),
        }
    }
    let _ = (new, old);
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_reserved_and_written_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = File::create(&path).unwrap();
        reserve(&file, 8).unwrap();
        write_all_at(&file, b"gh", 6).unwrap();
        write_all_at(&file, b"abcd", 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abcd\0\0gh");
        // More than any disk has. Where space cannot be reserved, such a length may be beyond the file system, too.
        assert!(reserve(&file, 1 << 62).is_err());
    }

    #[test]
    fn huge_pages_change_no_values() {
        for length in [0, 1, 4095, 1 << 20] {
            let mut values: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let before = values.clone();
            prefer_huge_pages(&mut values);
            assert_eq!(values, before);
        }
    }

    #[test]
    fn what_was_released_is_read_again() {
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(&path, [7; 10_000]).unwrap();
        // SAFETY: nothing else has the file.
        let map = unsafe { memmap2::Mmap::map(path.as_file()) }.unwrap();
        assert_eq!(map[..], [7; 10_000]);
        release(&map, 0, map.len());
        assert_eq!(map[..], [7; 10_000]);
    }

    #[test]
    fn a_file_is_named_until_another_has_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("file"), folder.path().join("other"));
        let file = same_file::Handle::from_file(File::create(&path).unwrap()).unwrap();
        assert!(is_named(&file, &path) && !is_named(&file, &other));
        fs::rename(&path, &other).unwrap();
        File::create(&path).unwrap();
        assert!(!is_named(&file, &path) && is_named(&file, &other));
    }

    #[test]
    fn a_folder_takes_the_name_of_an_empty_one_and_of_no_other() {
        type Rename = fn(&Path, &Path) -> Result<()>;
        for rename in [rename_folder as Rename, rename_in_steps as Rename] {
            let root = tempfile::tempdir().unwrap();
            let [new, empty, full] = ["new", "empty", "full"].map(|name| root.path().join(name));
            for folder in [&new, &empty, &full] {
                fs::create_dir(folder).unwrap();
            }
            fs::write(full.join("theirs"), b"").unwrap();
            fs::write(new.join("ours"), b"").unwrap();
            assert!(rename(&new, &full).is_err());
            assert!(full.join("theirs").exists() && new.join("ours").exists());
            rename(&new, &empty).unwrap();
            assert!(empty.join("ours").exists() && !new.exists());
            rename(&empty, &new).unwrap();
            assert!(new.join("ours").exists() && !empty.exists());
            // What cannot be renamed leaves the empty folder.
            fs::create_dir(&empty).unwrap();
            assert!(rename(&root.path().join("missing"), &empty).is_err());
            assert!(empty.exists());
        }
    }

    #[test]
    fn missing_calls_are_told_from_failures() {
        assert!(!has_no_such_call(&ErrorKind::PermissionDenied.into()));
        #[cfg(unix)]
        for (errno, missing) in [
            (rustix::io::Errno::OPNOTSUPP, true),
            (rustix::io::Errno::NOLCK, true),
            (rustix::io::Errno::NOSPC, false),
            (rustix::io::Errno::ACCESS, false),
        ] {
            assert_eq!(has_no_such_call(&errno.into()), missing, "{errno}");
        }
        sync_folder(tempfile::tempdir().unwrap().path()).unwrap();
    }
}
