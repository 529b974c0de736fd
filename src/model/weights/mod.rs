//! How do weights get from a file into memory?
//!
//! Tensors are taken from the mapped file by name, checked for their shape and packed for the kernels straight from the
//! file's blocks; what no packed form keeps is dequantised by candle a row at a time. No second copy is ever held. Whoever loads a model says at the end that it took all
//! there was: a tensor that nobody asked for means a variant that this engine would run wrongly.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod gguf;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, ggml_file};
use candle_core::{Device, Tensor};

use crate::kernels::huge_pages::HugePages;
use crate::kernels::isa::Isa;
use crate::kernels::linear::{Encoding, FillRow, Linear, Source};
use crate::kernels::mapped::MappedFile;
use crate::kernels::threads::Threads;
use gguf::{Header, HeaderError, Metadata, TensorInfo};

/// Why a model's file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("can't open the model file {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Header { path: PathBuf, source: HeaderError },
}

/// Why a tensor could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    #[error("tensor `{name}` is missing")]
    Missing { name: String },
    #[error("tensor `{name}` has the shape {found:?}, where {wanted:?} is needed")]
    Shape { name: String, wanted: Vec<usize>, found: Vec<usize> },
    #[error("tensor `{name}` is not one that this kind of model has; the file is of a variant that is not supported")]
    Unknown { name: String },
    #[error("tensor `{name}` has a scale that is no number; the file is damaged")]
    Scales { name: String },
    #[error("tensor `{name}`: {source}")]
    Dequantise { name: String, source: candle_core::Error },
}

/// An open model file.
pub struct WeightFile {
    file: MappedFile,
    header: Header,
    by_name: HashMap<String, usize>,
    taken: RefCell<HashSet<usize>>,
}

impl WeightFile {
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let file = MappedFile::open(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        let header =
            Header::read(file.bytes()).map_err(|source| OpenError::Header { path: path.to_owned(), source })?;
        let by_name = header.tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index)).collect();
        Ok(Self { file, header, by_name, taken: RefCell::default() })
    }

    pub fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes()
    }

    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Bytes of a tensor in the file; 0 if there is none.
    pub fn tensor_bytes(&self, name: &str) -> u64 {
        self.find(name).map_or(0, |(_, tensor)| tensor.bytes.len() as u64)
    }

    /// Shape of a tensor, outermost dimension first.
    pub fn shape(&self, name: &str) -> Result<&[usize], TensorError> {
        match self.find(name) {
            Some((_, tensor)) => Ok(&tensor.shape),
            None => Err(TensorError::Missing { name: name.to_owned() }),
        }
    }

    /// A vector of `length` values, in f32.
    pub fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, TensorError> {
        let tensor = self.take(name, &[length])?;
        let mut values = vec![0.0; length];
        read_rows(self.bytes(), tensor, 0, &mut values)?;
        Ok(values)
    }

    /// Matrices of one width, one below the other, packed as one layer: `(name, rows)` each.
    pub fn linear(
        &self,
        isa: Isa,
        (threads, memory): (&mut Threads, &mut HugePages),
        parts: &[(&str, usize)],
        inputs: usize,
    ) -> Result<Linear, TensorError> {
        let mut layer = Linear::new(isa, inputs);
        for &(name, rows) in parts {
            let tensor = self.take(name, &[rows, inputs])?;
            let file = self.bytes();
            let bytes = file.get(tensor.bytes.clone()).unwrap_or(&[]);
            let dequantise = |row: usize, values: &mut [f32]| read_rows(file, tensor, row, values);
            layer.push((threads, memory), rows, source(tensor.dtype, bytes, &dequantise))?;
            if !layer.is_finite() {
                return Err(TensorError::Scales { name: name.to_owned() });
            }
        }
        Ok(layer)
    }

    /// Errors if the file has a tensor that was not taken.
    pub fn refuse_leftovers(&self) -> Result<(), TensorError> {
        let taken = self.taken.borrow();
        match self.header.tensors.iter().enumerate().find(|(index, _)| !taken.contains(index)) {
            Some((_, tensor)) => Err(TensorError::Unknown { name: tensor.name.clone() }),
            None => Ok(()),
        }
    }

    fn find(&self, name: &str) -> Option<(usize, &TensorInfo)> {
        let index = *self.by_name.get(name)?;
        Some((index, self.header.tensors.get(index)?))
    }

    fn take(&self, name: &str, wanted: &[usize]) -> Result<&TensorInfo, TensorError> {
        let (index, tensor) = self.find(name).ok_or_else(|| TensorError::Missing { name: name.to_owned() })?;
        if tensor.shape != wanted {
            let (name, wanted, found) = (name.to_owned(), wanted.to_vec(), tensor.shape.clone());
            return Err(TensorError::Shape { name, wanted, found });
        }
        self.taken.borrow_mut().insert(index);
        Ok(tensor)
    }
}

/// The form in which a type's accuracy and bytes are kept best.
fn source<'a>(dtype: GgmlDType, bytes: &'a [u8], dequantise: &'a FillRow<'a, TensorError>) -> Source<'a, TensorError> {
    match dtype {
        GgmlDType::F32 => Source::F32(bytes),
        GgmlDType::F16 => Source::F16(bytes),
        GgmlDType::BF16 => Source::BF16(bytes),
        GgmlDType::Q4_0 => Source::Blocks(Encoding::Q4_0, bytes),
        GgmlDType::Q4_1 => Source::Blocks(Encoding::Q4_1, bytes),
        GgmlDType::Q5_0 => Source::Blocks(Encoding::Q5_0, bytes),
        GgmlDType::Q5_1 => Source::Blocks(Encoding::Q5_1, bytes),
        GgmlDType::Q8_0 => Source::Blocks(Encoding::Q8_0, bytes),
        GgmlDType::Q4K => Source::Blocks(Encoding::Q4K, bytes),
        GgmlDType::Q5K => Source::Blocks(Encoding::Q5K, bytes),
        // Their scales are for 16 columns. Of weights of 6 bits and fewer, 8 bits with a scale for 32 lose next to nothing.
        GgmlDType::Q2K | GgmlDType::Q3K | GgmlDType::Q6K | GgmlDType::Q8_1 | GgmlDType::Q8K => {
            Source::Quantise(dequantise)
        }
    }
}

/// Writes rows `first_row..` of a tensor into `values`.
fn read_rows(file: &[u8], tensor: &TensorInfo, first_row: usize, values: &mut [f32]) -> Result<(), TensorError> {
    let columns = tensor.shape.last().copied().unwrap_or(1);
    let row_bytes = columns / tensor.dtype.block_size() * tensor.dtype.type_size();
    let start = tensor.bytes.start + first_row * row_bytes;
    let end = start + values.len() / columns * row_bytes;
    dequantise(tensor.dtype, file.get(start..end).unwrap_or(&[]), values)
        .map_err(|source| TensorError::Dequantise { name: tensor.name.clone(), source })
}

/// Dequantises whole blocks. `bytes` lies in a mapped file at a multiple of the type's alignment.
fn dequantise(dtype: GgmlDType, bytes: &[u8], values: &mut [f32]) -> candle_core::Result<()> {
    if bytes.len() != values.len() / dtype.block_size() * dtype.type_size() {
        candle_core::bail!("{} values of type {dtype:?} are not in {} bytes", values.len(), bytes.len());
    }
    let tensor: Tensor =
        ggml_file::qtensor_from_ggml(dtype, bytes, vec![values.len()], &Device::Cpu)?.dequantize(&Device::Cpu)?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (candle_core::Storage::Cpu(storage), Some((start, end))) => {
            let dequantised = storage.as_slice::<f32>()?.get(start..end).unwrap_or(&[]);
            if dequantised.len() != values.len() {
                candle_core::bail!("{} values came out, not {}", dequantised.len(), values.len());
            }
            values.copy_from_slice(dequantised);
            Ok(())
        }
        _ => candle_core::bail!("dequantised values are not contiguous on the CPU"),
    }
}
