//! What does a GGUF file hold, and is its header to be believed?
//!
//! Reads the header of GGUF versions 2 and 3 out of the mapped bytes: typed metadata, and where each tensor lies. Nothing
//! is allocated by a number that the bytes behind it don't bear out, and a bad file is refused with one sentence that
//! names the key or the tensor.
//! Invariant: every `TensorInfo` of a `Header` lies inside the file, aligned, overlaps no other, and has whole blocks.
//! After the format's description, <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;

use candle_core::quantized::GgmlDType;

/// Most metadata keys, and most tensors, of a file. The largest published models have some thousands.
const MAX_ENTRIES: u64 = 1 << 16;
/// Longest key in bytes. The format allows more; none in use is half as long, and keys stand in sentences.
const MAX_KEY_BYTES: u64 = 256;
/// Longest tensor name in bytes: the format's own limit.
const MAX_TENSOR_NAME_BYTES: u64 = 64;
/// Longest string in bytes. Chat templates are some kilobytes.
const MAX_STRING_BYTES: u64 = 1 << 24;
/// Longest array. Vocabularies and lists of merges stay below a million.
const MAX_ARRAY_LENGTH: u64 = 1 << 24;
/// Most dimensions of a tensor: the format's own limit.
const MAX_DIMENSIONS: u32 = 4;
/// Where tensors are aligned to if `general.alignment` is silent, in bytes.
const DEFAULT_ALIGNMENT: u32 = 32;

/// Why a header was refused.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    #[error("not a GGUF file: it doesn't start with `GGUF`")]
    NotGguf,
    #[error("GGUF version {0} is not supported; convert the model to version 3")]
    Version(u32),
    #[error("the file ends inside {0}; it was cut short, or its header is damaged")]
    Truncated(Place),
    #[error("{place} says {found}, and at most {limit} is allowed")]
    OverLimit { place: Place, found: u64, limit: u64 },
    #[error("{0} is not UTF-8")]
    NotUtf8(Place),
    #[error("{0} has control characters in it")]
    ControlCharacters(Place),
    #[error("{place} has the unknown type {found}")]
    UnknownType { place: Place, found: u32 },
    #[error("{0} is an array of arrays, which no supported model needs")]
    NestedArray(Place),
    #[error("{place} holds {found}, which does not fit 32 bits")]
    TooWide { place: Place, found: i128 },
    #[error("{place} is a truth value of {found}, neither 0 nor 1")]
    NotBool { place: Place, found: u8 },
    #[error("{0} occurs twice")]
    Twice(Place),
    #[error("`general.alignment` is {0}, not a power of two between 8 and 65536")]
    Alignment(u32),
    #[error("tensor `{name}` has {found} dimensions, not 1 to 4")]
    Dimensions { name: String, found: u32 },
    #[error("tensor `{name}` has a dimension of zero")]
    EmptyDimension { name: String },
    #[error("tensor `{name}` has more elements than memory has bytes")]
    TooManyElements { name: String },
    #[error("tensor `{name}` has the type {found}, which is not supported")]
    TensorType { name: String, found: u32 },
    #[error("rows of tensor `{name}` have {row} elements, which is not a multiple of the type's block of {block}")]
    PartBlock { name: String, row: usize, block: usize },
    #[error("tensor `{name}` starts at offset {offset}, which is not aligned to {alignment} bytes")]
    Misaligned { name: String, offset: u64, alignment: u32 },
    #[error("tensor `{name}` reaches past the end of the file ({file_bytes} bytes); the download may be incomplete")]
    OutOfFile { name: String, file_bytes: usize },
    #[error("tensors `{first}` and `{second}` overlap")]
    Overlap { first: String, second: String },
    #[error(transparent)]
    Metadata(#[from] MetadataError),
}

/// Which part of a header a sentence is about.
#[derive(Clone, Debug)]
pub enum Place {
    Start,
    MetadataCount,
    TensorCount,
    /// The name of the n-th key, from 0.
    KeyName(u64),
    /// A value of the metadata.
    Value(String),
    /// The name of the n-th tensor, from 0.
    TensorName(u64),
    /// The entry of a tensor in the table.
    Tensor(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Start => f.write_str("the file's first bytes"),
            Place::MetadataCount => f.write_str("the count of metadata keys"),
            Place::TensorCount => f.write_str("the count of tensors"),
            Place::KeyName(index) => write!(f, "the name of metadata key {index}"),
            Place::Value(key) => write!(f, "metadata key `{key}`"),
            Place::TensorName(index) => write!(f, "the name of tensor {index}"),
            Place::Tensor(name) => write!(f, "the entry of tensor `{name}`"),
        }
    }
}

/// Why a value could not be had from the metadata.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    #[error("metadata key `{key}` is missing")]
    Missing { key: String },
    #[error("metadata key `{key}` is {found}, where {wanted} is needed")]
    WrongType { key: String, wanted: &'static str, found: &'static str },
}

/// A value of the metadata. Integers of all widths are `Int`; arrays of integers that fit are `I32s` or `U32s`.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Str(String),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
    Strs(Vec<String>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Value::Int(_) => "an integer",
            Value::Float(_) => "a floating-point number",
            Value::Bool(_) => "a truth value",
            Value::Str(_) => "a string",
            Value::U32s(_) => "an array of unsigned integers",
            Value::I32s(_) => "an array of integers",
            Value::F32s(_) => "an array of floating-point numbers",
            Value::Bools(_) => "an array of truth values",
            Value::Strs(_) => "an array of strings",
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Str(text.to_owned())
    }
}

impl From<u32> for Value {
    fn from(int: u32) -> Self {
        Value::Int(i128::from(int))
    }
}

impl From<f32> for Value {
    fn from(float: f32) -> Self {
        Value::Float(f64::from(float))
    }
}

/// What the file says of its model: keys such as `llama.block_count`, with typed values.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    values: HashMap<String, Value>,
}

impl FromIterator<(String, Value)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(pairs: I) -> Self {
        Self { values: pairs.into_iter().collect() }
    }
}

impl Metadata {
    pub fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    pub fn get(&self, key: &str) -> Result<&Value, MetadataError> {
        self.values.get(key).ok_or_else(|| MetadataError::Missing { key: key.to_owned() })
    }

    /// A key that may be absent: `metadata.optional("tokenizer.chat_template", Metadata::str)?`.
    pub fn optional<'a, T>(
        &'a self,
        key: &str,
        read: impl FnOnce(&'a Self, &str) -> Result<T, MetadataError>,
    ) -> Result<Option<T>, MetadataError> {
        if self.contains(key) { read(self, key).map(Some) } else { Ok(None) }
    }

    pub fn str(&self, key: &str) -> Result<&str, MetadataError> {
        match self.get(key)? {
            Value::Str(text) => Ok(text),
            other => Err(wrong_type(key, "a string", other)),
        }
    }

    /// An integer of any width, if its value fits.
    pub fn u32(&self, key: &str) -> Result<u32, MetadataError> {
        match self.get(key)? {
            value @ Value::Int(int) => {
                u32::try_from(*int).map_err(|_| wrong_type(key, "an unsigned integer of 32 bits", value))
            }
            other => Err(wrong_type(key, "an unsigned integer", other)),
        }
    }

    pub fn f32(&self, key: &str) -> Result<f32, MetadataError> {
        match self.get(key)? {
            Value::Float(float) => Ok(*float as f32),
            other => Err(wrong_type(key, "a floating-point number", other)),
        }
    }

    pub fn bool(&self, key: &str) -> Result<bool, MetadataError> {
        match self.get(key)? {
            Value::Bool(truth) => Ok(*truth),
            other => Err(wrong_type(key, "a truth value", other)),
        }
    }

    pub fn strings(&self, key: &str) -> Result<&[String], MetadataError> {
        match self.get(key)? {
            Value::Strs(texts) => Ok(texts),
            other => Err(wrong_type(key, "an array of strings", other)),
        }
    }

    pub fn i32s(&self, key: &str) -> Result<&[i32], MetadataError> {
        match self.get(key)? {
            Value::I32s(ints) => Ok(ints),
            other => Err(wrong_type(key, "an array of signed integers", other)),
        }
    }

    pub fn u32s(&self, key: &str) -> Result<&[u32], MetadataError> {
        match self.get(key)? {
            Value::U32s(ints) => Ok(ints),
            other => Err(wrong_type(key, "an array of unsigned integers", other)),
        }
    }

    pub fn f32s(&self, key: &str) -> Result<&[f32], MetadataError> {
        match self.get(key)? {
            Value::F32s(floats) => Ok(floats),
            other => Err(wrong_type(key, "an array of floating-point numbers", other)),
        }
    }
}

fn wrong_type(key: &str, wanted: &'static str, found: &Value) -> MetadataError {
    MetadataError::WrongType { key: key.to_owned(), wanted, found: found.kind() }
}

/// Where a tensor lies in the file, and in which form.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    pub name: String,
    /// Outermost dimension first: `[rows, columns]` for a matrix that maps `columns` inputs to `rows` outputs.
    pub shape: Vec<usize>,
    pub dtype: GgmlDType,
    /// Its bytes, from the start of the file.
    pub bytes: Range<usize>,
}

/// All that a GGUF file says before its data.
#[derive(Clone, Debug)]
pub struct Header {
    pub metadata: Metadata,
    /// In the order of the file's table.
    pub tensors: Vec<TensorInfo>,
    /// First byte of the data: what is before it is header.
    pub data_start: usize,
}

impl Header {
    /// Reads and checks the header of a file whose bytes are all of `file`.
    pub fn read(file: &[u8]) -> Result<Self, HeaderError> {
        let mut reader = Reader { file, at: 0 };
        if reader.take(4) != Some(b"GGUF") {
            return Err(HeaderError::NotGguf);
        }
        let version = reader.u32().ok_or(HeaderError::Truncated(Place::Start))?;
        if !(2..=3).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        let tensor_count = reader.count(Place::TensorCount, MAX_ENTRIES)?;
        let key_count = reader.count(Place::MetadataCount, MAX_ENTRIES)?;
        let mut values = HashMap::new();
        for index in 0..key_count {
            let key = reader.name(|| Place::KeyName(index), MAX_KEY_BYTES)?;
            let value = reader.value(&key)?;
            if values.contains_key(&key) {
                return Err(HeaderError::Twice(Place::Value(key)));
            }
            values.insert(key, value);
        }
        let metadata = Metadata { values };
        let alignment = metadata.optional("general.alignment", Metadata::u32)?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || !(8..=1 << 16).contains(&alignment) {
            return Err(HeaderError::Alignment(alignment));
        }
        let mut entries = Vec::new();
        for index in 0..tensor_count {
            entries.push(reader.tensor_entry(index)?);
        }
        let data_start = reader.at.next_multiple_of(alignment as usize);
        let tensors = entries
            .into_iter()
            .map(|entry| entry.place(data_start, alignment, file.len()))
            .collect::<Result<Vec<_>, _>>()?;
        refuse_twins_and_overlap(&tensors)?;
        Ok(Self { metadata, tensors, data_start })
    }
}

/// No two tensors have one name, or share a byte.
fn refuse_twins_and_overlap(tensors: &[TensorInfo]) -> Result<(), HeaderError> {
    let mut names = HashMap::new();
    let mut by_start = BTreeMap::new();
    for tensor in tensors {
        if names.insert(tensor.name.as_str(), ()).is_some() {
            return Err(HeaderError::Twice(Place::Tensor(tensor.name.clone())));
        }
        let twin = by_start.insert(tensor.bytes.start, tensor);
        let before = by_start.range(..tensor.bytes.start).next_back().map(|(_, tensor)| *tensor);
        let after = by_start.range(tensor.bytes.start + 1..).next().map(|(_, tensor)| *tensor);
        let overlapping = twin
            .or(before.filter(|before| before.bytes.end > tensor.bytes.start))
            .or(after.filter(|after| after.bytes.start < tensor.bytes.end));
        if let Some(other) = overlapping {
            return Err(HeaderError::Overlap { first: other.name.clone(), second: tensor.name.clone() });
        }
    }
    Ok(())
}

/// A line of the tensor table, shape checked, not yet placed in the file.
struct TensorEntry {
    name: String,
    shape: Vec<usize>,
    dtype: GgmlDType,
    size_bytes: usize,
    offset: u64,
}

impl TensorEntry {
    fn place(self, data_start: usize, alignment: u32, file_bytes: usize) -> Result<TensorInfo, HeaderError> {
        let Self { name, shape, dtype, size_bytes, offset } = self;
        if !offset.is_multiple_of(u64::from(alignment)) {
            return Err(HeaderError::Misaligned { name, offset, alignment });
        }
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| data_start.checked_add(offset))
            .and_then(|start| Some(start..start.checked_add(size_bytes)?))
            .filter(|bytes| bytes.end <= file_bytes);
        match bytes {
            Some(bytes) => Ok(TensorInfo { name, shape, dtype, bytes }),
            None => Err(HeaderError::OutOfFile { name, file_bytes }),
        }
    }
}

/// The types whose tensors can be loaded: those that candle can dequantise.
fn tensor_type(id: u32) -> Option<GgmlDType> {
    Some(match id {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// A cursor over the file. Its reads are `None` at the end, and never panic.
struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(bytes)?;
        let taken = self.file.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length or a count, refused over `limit`.
    fn count(&mut self, place: Place, limit: u64) -> Result<u64, HeaderError> {
        match self.u64() {
            None => Err(HeaderError::Truncated(place)),
            Some(found) if found > limit => Err(HeaderError::OverLimit { place, found, limit }),
            Some(found) => Ok(found),
        }
    }

    /// The bytes are there before they are copied, so a lying length allocates nothing.
    fn string(&mut self, place: impl Fn() -> Place, limit: u64) -> Result<String, HeaderError> {
        let length = self.count(place(), limit)?;
        let bytes = usize::try_from(length)
            .ok()
            .and_then(|length| self.take(length))
            .ok_or_else(|| HeaderError::Truncated(place()))?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| HeaderError::NotUtf8(place()))
    }

    /// A string that may stand in a sentence, and in a log.
    fn name(&mut self, place: impl Fn() -> Place, limit: u64) -> Result<String, HeaderError> {
        let name = self.string(&place, limit)?;
        if name.contains(char::is_control) { Err(HeaderError::ControlCharacters(place())) } else { Ok(name) }
    }

    fn value(&mut self, key: &str) -> Result<Value, HeaderError> {
        let place = || Place::Value(key.to_owned());
        let truncated = || HeaderError::Truncated(place());
        let kind = self.u32().ok_or_else(truncated)?;
        Ok(match kind {
            8 => Value::Str(self.string(place, MAX_STRING_BYTES)?),
            9 => self.array_value(key)?,
            7 => Value::Bool(self.truth(place)?),
            6 => Value::Float(f64::from(self.array().map(f32::from_le_bytes).ok_or_else(truncated)?)),
            12 => Value::Float(self.array().map(f64::from_le_bytes).ok_or_else(truncated)?),
            _ => Value::Int(self.int(kind, place)?),
        })
    }

    fn truth(&mut self, place: impl Fn() -> Place) -> Result<bool, HeaderError> {
        match self.array::<1>() {
            None => Err(HeaderError::Truncated(place())),
            Some([0]) => Ok(false),
            Some([1]) => Ok(true),
            Some([found]) => Err(HeaderError::NotBool { place: place(), found }),
        }
    }

    fn int(&mut self, kind: u32, place: impl Fn() -> Place) -> Result<i128, HeaderError> {
        let int = match kind {
            0 => self.array().map(u8::from_le_bytes).map(i128::from),
            1 => self.array().map(i8::from_le_bytes).map(i128::from),
            2 => self.array().map(u16::from_le_bytes).map(i128::from),
            3 => self.array().map(i16::from_le_bytes).map(i128::from),
            4 => self.array().map(u32::from_le_bytes).map(i128::from),
            5 => self.array().map(i32::from_le_bytes).map(i128::from),
            10 => self.array().map(u64::from_le_bytes).map(i128::from),
            11 => self.array().map(i64::from_le_bytes).map(i128::from),
            found => return Err(HeaderError::UnknownType { place: place(), found }),
        };
        int.ok_or_else(|| HeaderError::Truncated(place()))
    }

    /// Elements are read one by one into a vector that grows as they prove to be there.
    fn array_value(&mut self, key: &str) -> Result<Value, HeaderError> {
        let place = || Place::Value(key.to_owned());
        let truncated = || HeaderError::Truncated(place());
        let kind = self.u32().ok_or_else(truncated)?;
        let length = self.count(place(), MAX_ARRAY_LENGTH)?;
        match kind {
            8 => (0..length).map(|_| self.string(place, MAX_STRING_BYTES)).collect::<Result<_, _>>().map(Value::Strs),
            9 => Err(HeaderError::NestedArray(place())),
            7 => (0..length).map(|_| self.truth(place)).collect::<Result<_, _>>().map(Value::Bools),
            6 => (0..length)
                .map(|_| self.array().map(f32::from_le_bytes).ok_or_else(truncated))
                .collect::<Result<_, _>>()
                .map(Value::F32s),
            12 => (0..length)
                .map(|_| self.array().map(|bytes| f64::from_le_bytes(bytes) as f32).ok_or_else(truncated))
                .collect::<Result<_, _>>()
                .map(Value::F32s),
            0 | 2 | 4 | 10 => (0..length)
                .map(|_| {
                    let found = self.int(kind, place)?;
                    u32::try_from(found).map_err(|_| HeaderError::TooWide { place: place(), found })
                })
                .collect::<Result<_, _>>()
                .map(Value::U32s),
            _ => (0..length)
                .map(|_| {
                    let found = self.int(kind, place)?;
                    i32::try_from(found).map_err(|_| HeaderError::TooWide { place: place(), found })
                })
                .collect::<Result<_, _>>()
                .map(Value::I32s),
        }
    }

    fn tensor_entry(&mut self, index: u64) -> Result<TensorEntry, HeaderError> {
        let name = self.name(|| Place::TensorName(index), MAX_TENSOR_NAME_BYTES)?;
        let truncated = || HeaderError::Truncated(Place::Tensor(name.clone()));
        let dimensions = self.u32().ok_or_else(truncated)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(HeaderError::Dimensions { name, found: dimensions });
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            match usize::try_from(self.u64().ok_or_else(truncated)?) {
                Ok(0) => return Err(HeaderError::EmptyDimension { name }),
                Ok(length) => shape.push(length),
                Err(_) => return Err(HeaderError::TooManyElements { name }),
            }
        }
        let found = self.u32().ok_or_else(truncated)?;
        let offset = self.u64().ok_or_else(truncated)?;
        let Some(dtype) = tensor_type(found) else {
            return Err(HeaderError::TensorType { name, found });
        };
        // The file lists the innermost dimension, a row's length, first.
        let (row, block) = (shape.first().copied().unwrap_or(0), dtype.block_size());
        if !row.is_multiple_of(block) {
            return Err(HeaderError::PartBlock { name, row, block });
        }
        let size_bytes = shape
            .iter()
            .try_fold(1_usize, |product, &length| product.checked_mul(length))
            .and_then(|elements| (elements / block).checked_mul(dtype.type_size()));
        let Some(size_bytes) = size_bytes else {
            return Err(HeaderError::TooManyElements { name });
        };
        shape.reverse();
        Ok(TensorEntry { name, shape, dtype, size_bytes, offset })
    }
}

#[cfg(test)]
mod tests;
