//! A checkpoint of tensors that the caller holds, written as a compressed one is: completely or not at all.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::checkpoint::{COPIED, carried};
use crate::checkpoint::files::{REPORT_FILE, is_checkpoint_file};
use crate::checkpoint::staging::{Destination, StagingDirectory};
use crate::checkpoint::write::{Slot, Writer};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// A tensor in memory.
#[derive(Clone, Debug)]
pub struct Given<'a> {
    /// Its name, dtype and shape.
    pub slot: Slot,
    /// Its values, little-endian and row-major.
    pub bytes: &'a [u8],
}

/// Where the tensors are from.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The directory of their files.
    pub directory: PathBuf,
    /// Their files.
    pub files: Vec<PathBuf>,
    /// Whether all of the directory is the model's, so that every file beside the weights is copied. Otherwise only
    /// those are whose names are of a checkpoint, such as the tokenizer's.
    pub whole: bool,
}

impl Origin {
    /// Checks that `path` may become a checkpoint made from these files.
    ///
    /// # Errors
    /// As [`Destination::check`].
    pub fn destination(&self, path: &Path, overwrite: bool) -> Result<Destination> {
        Destination::check_beside(path, &self.directory, self.files.iter().map(PathBuf::as_path), overwrite)
    }
}

/// Writes `tensors` into the checked directory `destination`, with `config` as its `config.json`, the `report`, if there
/// is one, and the tokenizer's and other files from beside the origin.
///
/// # Errors
/// [`Error::Shape`] in a tensor whose bytes are not as many as its shape and dtype say; [`Error::Destination`] if it was
/// filled meanwhile; [`Error::Io`], [`Error::Cancelled`]. Then nothing is written.
pub fn write_checkpoint(
    destination: Destination,
    origin: &Origin,
    tensors: &[Given<'_>],
    config: &str,
    report: Option<Map<String, Value>>,
    max_shard_bytes: u64,
    progress: &Progress,
) -> Result<()> {
    for Given { slot, bytes } in tensors {
        if slot.bytes() != bytes.len() as u64 {
            let expected = format!("the {} bytes of shape {:?}", slot.bytes(), slot.shape);
            let got = bytes.len().to_string();
            return Err(Error::Shape { operation: "values", expected, got }.in_tensor(&slot.name));
        }
    }
    let stage = StagingDirectory::begin(destination)?;
    let slots: Vec<_> = tensors.iter().map(|given| given.slot.clone()).collect();
    let writer = Writer::create(stage.directory(), &slots, max_shard_bytes)?;
    progress.expect(tensors.len() as u64);
    for Given { slot, bytes } in tensors {
        for (i, piece) in bytes.chunks(COPIED).enumerate() {
            progress.check()?;
            writer.write(&slot.name, (i * COPIED) as u64, piece)?;
        }
        progress.advance(1);
    }
    let size = writer.bytes();
    writer.finish()?;
    let mut copied = Vec::new();
    for path in carried(&origin.directory)? {
        progress.check()?;
        let name = path.to_string_lossy();
        if origin.whole || is_checkpoint_file(&name) {
            stage.copy(&origin.directory, &path)?;
            copied.push(Value::from(name.into_owned()));
        }
    }
    stage.write("config.json", config.as_bytes())?;
    if let Some(mut report) = report {
        report.insert("bytes_after".into(), size.into());
        report.insert("carried".into(), copied.into());
        stage.write(REPORT_FILE, format!("{:#}\n", Value::Object(report)).as_bytes())?;
    }
    progress.finish();
    stage.commit()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::Dtype;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_checkpoint_is_written_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("source");
        fs::create_dir(&directory).unwrap();
        for name in ["model.pt", "vocab.json", "notes.txt", "config.json"] {
            fs::write(directory.join(name), "of the source").unwrap();
        }
        let mut origin = Origin { files: vec![directory.join("model.pt")], directory, whole: false };
        let out = root.path().join("out");
        let slot = |name: &str, shape: &[usize]| Slot { name: name.into(), dtype: Dtype::F16, shape: shape.to_vec() };
        let write = |origin: &Origin, bytes: &[u8], overwrite| {
            let tensors = [Given { slot: slot("a", &[2, 2]), bytes }, Given { slot: slot("b", &[0]), bytes: &[] }];
            let report = json!({"matrices": []}).as_object().cloned();
            let destination = origin.destination(&out, overwrite)?;
            write_checkpoint(destination, origin, &tensors, "{}", report, 1 << 20, &Progress::default())
        };
        let error = write(&origin, &[0; 7], false).unwrap_err().to_string();
        assert!(error.contains("tensor 'a'") && error.contains("8 bytes"), "{error}");
        assert!(!out.exists());

        write(&origin, &[3; 8], false).unwrap();
        let file = fs::read(out.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!((tensors.tensor("a").unwrap().data(), tensors.len()), (&[3; 8][..], 2));
        assert_eq!(fs::read(out.join("config.json")).unwrap(), b"{}");
        assert!(out.join("vocab.json").exists() && !out.join("notes.txt").exists());
        let report: Value = serde_json::from_slice(&fs::read(out.join(REPORT_FILE)).unwrap()).unwrap();
        assert_eq!((&report["carried"], &report["bytes_after"]), (&json!(["vocab.json"]), &json!(file.len())));

        origin.whole = true;
        assert!(matches!(write(&origin, &[3; 8], false), Err(Error::Destination { .. })));
        write(&origin, &[3; 8], true).unwrap();
        assert!(out.join("notes.txt").exists() && !out.join("model.pt").exists());
        // The report names what was carried: it may be overwritten again.
        write(&origin, &[3; 8], true).unwrap();
        let inside = Origin { files: vec![out.join("model.safetensors")], ..origin };
        let error = inside.destination(&out, true).unwrap_err().to_string();
        assert!(error.contains("holds the source's weights"), "{error}");
    }
}
