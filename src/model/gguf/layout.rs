//! From bytes to the map of a file: where each metadata value and each tensor lies, everything
//! checked. Holds ranges only, so the bytes may be mapped, owned or a fuzzer's.

use std::collections::BTreeMap;
use std::ops::Range;

use super::cursor::Cursor;
use super::dtype::DType;
use super::error::{GgufError, shown};
use super::value::{self, ValueType};

/// Metadata entries and tensors in one file. The largest models have some 2,000 tensors and
/// 100 keys.
const ENTRIES_MAX: u64 = 65_536;
/// The format's own limit on a key.
const KEY_BYTES_MAX: u64 = 65_535;
/// The format allows 64; some writers were more generous.
const TENSOR_NAME_BYTES_MAX: u64 = 256;
/// Dimensions of a tensor.
pub(super) const DIMS_MAX: usize = 4;
/// Where tensor data begins, and each tensor in it, unless the file says otherwise.
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;

/// Where a metadata value lies.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) value_type: ValueType,
    pub(super) bytes: Range<usize>,
}

/// Where a tensor lies, and what it is.
#[derive(Clone, Debug)]
pub(super) struct TensorEntry {
    pub(super) dtype: DType,
    pub(super) dims: [usize; DIMS_MAX],
    pub(super) dim_count: usize,
    pub(super) bytes: Range<usize>,
}

/// The map of a file.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) version: u32,
    pub(super) metadata: BTreeMap<String, Entry>,
    pub(super) tensors: BTreeMap<String, TensorEntry>,
}

impl Layout {
    pub(super) fn parse(bytes: &[u8]) -> Result<Layout, GgufError> {
        let mut cursor = Cursor::new(bytes);
        let version = read_version(bytes, &mut cursor)?;
        let tensor_count = cursor.u64(|| "the tensor count".into())?;
        let metadata_count = cursor.u64(|| "the metadata count".into())?;
        for (what, count) in
            [("the tensor count", tensor_count), ("the metadata count", metadata_count)]
        {
            if count > ENTRIES_MAX {
                let what = what.into();
                return Err(GgufError::TooLarge { what, found: count, max: ENTRIES_MAX });
            }
        }
        let metadata = read_metadata(&mut cursor, metadata_count)?;
        let alignment = alignment(bytes, &metadata)?;
        let claims = read_tensor_claims(&mut cursor, tensor_count)?;
        let data_start = (cursor.position() as u64).next_multiple_of(alignment);
        let tensors = place_tensors(claims, data_start, alignment, bytes.len())?;
        Ok(Layout { version, metadata, tensors })
    }
}

fn read_version(bytes: &[u8], cursor: &mut Cursor<'_>) -> Result<u32, GgufError> {
    if !bytes.starts_with(b"GGUF") {
        return Err(GgufError::NotGguf { found: bytes.iter().take(4).copied().collect() });
    }
    cursor.take(4, || "the magic number".into())?;
    let version = cursor.u32(|| "the version".into())?;
    match version {
        2 | 3 => Ok(version),
        // The version is a small number: when only its highest byte is set, the writer was
        // big-endian.
        swapped if swapped.swap_bytes() < 1 << 16 && swapped != 0 => {
            Err(GgufError::UnsupportedVersion {
                found: format!("big-endian GGUF (version {})", swapped.swap_bytes()),
            })
        }
        other => Err(GgufError::UnsupportedVersion { found: format!("GGUF version {other}") }),
    }
}

fn read_metadata(
    cursor: &mut Cursor<'_>,
    count: u64,
) -> Result<BTreeMap<String, Entry>, GgufError> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let what = || format!("the name of metadata entry {index}");
        let key = utf8(cursor.string(what, KEY_BYTES_MAX)?, what)?;
        let name = shown(key);
        let number = cursor.u32(|| format!("the type of metadata {name}"))?;
        let value_type = ValueType::from_number(number, &name)?;
        let start = cursor.position();
        value::skip(cursor, value_type, &name)?;
        let entry = Entry { value_type, bytes: start..cursor.position() };
        if metadata.insert(key.to_owned(), entry).is_some() {
            return Err(GgufError::malformed(format!("metadata {name}"), "occurs twice"));
        }
    }
    Ok(metadata)
}

fn utf8(bytes: &[u8], what: impl FnOnce() -> String) -> Result<&str, GgufError> {
    std::str::from_utf8(bytes).map_err(|_| GgufError::malformed(what(), "must be valid UTF-8"))
}

fn alignment(bytes: &[u8], metadata: &BTreeMap<String, Entry>) -> Result<u64, GgufError> {
    let Some(entry) = metadata.get("general.alignment") else {
        return Ok(ALIGNMENT_DEFAULT);
    };
    let allowed = || format!("a power of two from 1 to {ALIGNMENT_MAX}");
    let value = value::decode(entry.value_type, &bytes[entry.bytes.clone()]);
    let number = value.and_then(|value| value.as_unsigned());
    number.filter(|n| n.is_power_of_two() && *n <= ALIGNMENT_MAX).ok_or_else(|| {
        let found = value.map_or_else(String::new, |value| value.describe());
        GgufError::out_of_range("general.alignment", found, allowed())
    })
}

/// What the header says about a tensor, before it is known whether the data is there.
struct Claim {
    name: String,
    dtype: DType,
    dims: [usize; DIMS_MAX],
    dim_count: usize,
    /// From the start of the data section.
    offset: u64,
    bytes: u64,
}

fn read_tensor_claims(cursor: &mut Cursor<'_>, count: u64) -> Result<Vec<Claim>, GgufError> {
    let mut claims = Vec::new();
    for index in 0..count {
        let what = || format!("the name of tensor {index}");
        let name = utf8(cursor.string(what, TENSOR_NAME_BYTES_MAX)?, what)?;
        claims.push(read_tensor_claim(cursor, name)?);
    }
    Ok(claims)
}

fn read_tensor_claim(cursor: &mut Cursor<'_>, name: &str) -> Result<Claim, GgufError> {
    let tensor = format!("tensor {}", shown(name));
    let dim_count = cursor.u32(|| format!("the dimension count of {tensor}"))?;
    if dim_count == 0 || dim_count as usize > DIMS_MAX {
        let what = format!("the dimension count of {tensor}");
        return Err(GgufError::out_of_range(what, dim_count, "from 1 to 4"));
    }
    let dim_count = dim_count as usize;
    let mut dims = [1usize; DIMS_MAX];
    let mut values = 1usize;
    for dim in &mut dims[..dim_count] {
        let claimed = cursor.u64(|| format!("a dimension of {tensor}"))?;
        let size = usize::try_from(claimed).ok().filter(|&size| size > 0);
        let product = size.and_then(|size| values.checked_mul(size));
        let (Some(size), Some(product)) = (size, product) else {
            let what = format!("a dimension of {tensor}");
            let allowed = "at least 1, and the product of all below 2^64";
            return Err(GgufError::out_of_range(what, claimed, allowed));
        };
        (*dim, values) = (size, product);
    }
    let number = cursor.u32(|| format!("the type of {tensor}"))?;
    let Some(dtype) = DType::from_number(number) else {
        return Err(GgufError::unsupported(
            format!("type number {number} of {tensor}"),
            DType::SUPPORTED,
        ));
    };
    let offset = cursor.u64(|| format!("the offset of {tensor}"))?;
    let bytes = dtype
        .row_bytes(dims[0])
        .and_then(|row| row.checked_mul(values / dims[0]))
        .ok_or_else(|| {
            GgufError::out_of_range(
                format!("the first dimension of {tensor}, which is {dtype},"),
                dims[0],
                format!("a multiple of {}", dtype.block_values()),
            )
        })?;
    Ok(Claim { name: name.to_owned(), dtype, dims, dim_count, offset, bytes: bytes as u64 })
}

/// Checks that every claimed tensor lies inside the file, aligned, and on bytes of its own.
fn place_tensors(
    mut claims: Vec<Claim>,
    data_start: u64,
    alignment: u64,
    file_bytes: usize,
) -> Result<BTreeMap<String, TensorEntry>, GgufError> {
    claims.sort_by_key(|claim| claim.offset);
    let mut tensors = BTreeMap::new();
    let mut end_before = data_start as usize;
    let mut name_before = String::new();
    for claim in claims {
        let tensor = format!("tensor {}", shown(&claim.name));
        if !claim.offset.is_multiple_of(alignment) {
            let what = format!("the offset of {tensor}");
            let allowed = format!("a multiple of the alignment, {alignment}");
            return Err(GgufError::out_of_range(what, claim.offset, allowed));
        }
        let start = data_start.checked_add(claim.offset);
        let end = start.and_then(|start| start.checked_add(claim.bytes));
        let range = match (start, end) {
            (Some(start), Some(end)) if end <= file_bytes as u64 => start as usize..end as usize,
            _ => {
                let offset =
                    start.map_or(file_bytes, |start| start.min(file_bytes as u64) as usize);
                return Err(GgufError::Truncated {
                    what: format!("the data of {tensor}"),
                    offset,
                    needed: claim.bytes,
                    available: file_bytes - offset,
                });
            }
        };
        if range.start < end_before {
            let problem = format!("overlaps tensor {}", shown(&name_before));
            return Err(GgufError::malformed(tensor, problem));
        }
        end_before = range.end;
        name_before.clone_from(&claim.name);
        let Claim { name, dtype, dims, dim_count, .. } = claim;
        let entry = TensorEntry { dtype, dims, dim_count, bytes: range };
        if tensors.insert(name, entry).is_some() {
            return Err(GgufError::malformed(tensor, "occurs twice"));
        }
    }
    Ok(tensors)
}
