//! The header of a safetensors file: eight bytes of length, then JSON, then the tensors' bytes back to back.
//!
//! The `safetensors` crate validates headers too, but its errors do not name the tensor. Here they do, and no hostile
//! header causes a panic or an allocation larger than the file.

use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::Value;

use super::foreign::lfs_pointer;

/// The longest header, as in the `safetensors` crate.
const LONGEST: usize = 100_000_000;

/// Where a tensor lies in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the beginning of the file.
    pub range: Range<usize>,
}

/// Reads the header of a whole file. Tensors come in the order of their bytes.
///
/// # Errors
/// A message that names the tensor.
pub fn parse(file: &[u8]) -> Result<Vec<Entry>, String> {
    if let Some(words) = lfs_pointer(file) {
        return Err(words.into());
    }
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("truncated: {} bytes are no safetensors file", file.len()));
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > LONGEST {
        return Err(format!("not a safetensors file: its header would be {length} bytes long"));
    }
    let Some((json, data)) = rest.split_at_checked(length) else {
        return Err(format!("truncated: the header is {length} bytes long, the file {} bytes", file.len()));
    };
    let header: serde_json::Map<String, Value> =
        serde_json::from_slice(json).map_err(|error| format!("the header is not a JSON object: {error}"))?;

    let mut entries = Vec::with_capacity(header.len());
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let TensorInfo { dtype, shape, data_offsets: (begin, end) } =
            serde_json::from_value(value).map_err(|error| format!("tensor '{name}': {error}"))?;
        let promised = byte_length(dtype, &shape)
            .ok_or_else(|| format!("tensor '{name}': {dtype:?} of shape {shape:?} has no length in bytes"))?;
        if end.checked_sub(begin) != Some(promised) {
            return Err(format!(
                "tensor '{name}': the header lies: {dtype:?} of shape {shape:?} is {promised} bytes long, its offsets are \
                 {begin} to {end}"
            ));
        }
        if end > data.len() {
            return Err(format!(
                "truncated: tensor '{name}' ends at byte {end} of the data, which is {} bytes long",
                data.len()
            ));
        }
        let start = 8 + length;
        entries.push(Entry { name, dtype, shape, range: start + begin..start + end });
    }
    entries.sort_by_key(|entry| (entry.range.start, entry.range.end));

    let mut end = 8 + length;
    for entry in &entries {
        if entry.range.start != end {
            let wrong =
                if entry.range.start < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(format!("tensor '{}': the header lies: it {wrong}", entry.name));
        }
        end = entry.range.end;
    }
    if end != file.len() {
        return Err(format!("the header accounts for {end} bytes, the file is {} bytes long", file.len()));
    }
    Ok(entries)
}

/// `shape`'s elements in bytes, unless that overflows or is not whole.
fn byte_length(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let bits = shape.iter().try_fold(dtype.bitsize(), |bits, &extent| bits.checked_mul(extent))?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(json.as_bytes());
        file.resize(file.len() + data, 7);
        file
    }

    const TWO: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]},
        "a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#;

    #[test]
    fn tensors_come_in_the_order_of_their_bytes() {
        let file = file(TWO, 28);
        let entries = parse(&file).unwrap();
        let names: Vec<_> = entries.iter().map(|entry| (entry.name.as_str(), entry.shape.as_slice())).collect();
        assert_eq!(names, [("a", &[2][..]), ("b", &[2, 3])]);
        assert_eq!(entries[1].range, file.len() - 24..file.len());
        // The crate that defines the format agrees.
        assert_eq!(safetensors::SafeTensors::deserialize(&file).unwrap().len(), 2);
    }

    #[test]
    fn lies_are_named() {
        for (json, data, words) in [
            (TWO, 27, "truncated: tensor 'b' ends at byte 28"),
            (TWO, 29, "the header accounts for"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4, "tensor 'a': the header lies"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8, "tensor 'a': the header lies"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8, "leaves a gap"),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
                "tensor 'b': the header lies: it overlaps",
            ),
            (r#"{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,4]}}"#, 4, "has no length"),
            (r#"{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}"#, 0, "has no length"),
            (r#"{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}"#, 4, "tensor 'a': unknown variant"),
            (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, "tensor 'a': invalid value"),
            (r#"["a"]"#, 0, "not a JSON object"),
            ("", 0, "not a JSON object"),
        ] {
            let problem = parse(&file(json, data)).unwrap_err();
            assert!(problem.contains(words), "{problem}");
        }
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
        assert!(parse(pointer).unwrap_err().contains("git lfs pull"));
        assert!(parse(&[1, 2, 3]).unwrap_err().contains("truncated"));
        assert!(parse(&u64::MAX.to_le_bytes()).unwrap_err().contains("not a safetensors file"));
        assert!(parse(&1000u64.to_le_bytes()).unwrap_err().contains("truncated"));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0u64..300) {
            let _ = parse(&bytes);
            let mut file = length.to_le_bytes().to_vec();
            file.extend(bytes);
            let _ = parse(&file);
        }

        #[test]
        fn a_mutated_file_never_panics_and_what_it_yields_lies_in_the_file(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut file = file(TWO, 28);
            for (index, byte) in changes {
                let length = file.len();
                file[index.index(length)] = byte;
            }
            for file in [&file[..], &file[..cut.index(file.len())]] {
                for entry in parse(file).unwrap_or_default() {
                    prop_assert!(file.get(entry.range).is_some());
                }
            }
        }
    }
}
