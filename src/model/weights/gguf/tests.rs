//! Is a good file read as written, and is every bad one refused in a sentence, without a panic?

use proptest::prelude::*;

use super::*;

/// A file under construction, little endian as the format is.
#[derive(Clone, Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn text(self, text: &str) -> Self {
        self.u64(text.len() as u64).raw(text.as_bytes())
    }

    /// A key of the metadata with its type; the value comes next.
    fn key(self, key: &str, kind: u32) -> Self {
        self.text(key).u32(kind)
    }

    /// A line of the tensor table; `shape` innermost first, as in the file.
    fn tensor(self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Self {
        let head = self.text(name).u32(shape.len() as u32);
        shape.iter().fold(head, |bytes, &length| bytes.u64(length)).u32(kind).u64(offset)
    }

    fn head(version: u32, tensors: u64, keys: u64) -> Self {
        Self::default().raw(b"GGUF").u32(version).u64(tensors).u64(keys)
    }

    /// Padding to 32 bytes, then `data` bytes of data.
    fn data(mut self, data: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(32) + data, 0);
        self.0
    }
}

const U8: u32 = 0;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STR: u32 = 8;
const ARRAY: u32 = 9;
const I64: u32 = 11;

fn metadata() -> Bytes {
    Bytes::head(3, 2, 9)
        .key("general.architecture", STR)
        .text("llama")
        .key("small", U8)
        .raw(&[7])
        .key("negative", I64)
        .u64((-5_i64) as u64)
        .key("float", F32)
        .raw(&0.5_f32.to_le_bytes())
        .key("truth", BOOL)
        .raw(&[1])
        .key("texts", ARRAY)
        .u32(STR)
        .u64(2)
        .text("one")
        .text("zwei, drei – vier")
        .key("ints", ARRAY)
        .u32(I32)
        .u64(2)
        .u32((-1_i32) as u32)
        .u32(9)
        .key("naturals", ARRAY)
        .u32(U32)
        .u64(1)
        .u32(u32::MAX)
        .key("floats", ARRAY)
        .u32(F32)
        .u64(1)
        .raw(&1.5_f32.to_le_bytes())
}

fn valid() -> Vec<u8> {
    // 4 * 3 f32 are 48 bytes; 64 * 2 Q8_0 are 2 * 2 blocks of 34.
    metadata().tensor("matrix", &[4, 3], 0, 0).tensor("quantised", &[64, 2], 8, 64).data(64 + 136)
}

#[test]
fn a_file_is_read_as_it_was_written() {
    let file = valid();
    let header = Header::read(&file).unwrap();
    let metadata = &header.metadata;
    assert_eq!(metadata.str("general.architecture"), Ok("llama"));
    assert_eq!(metadata.u32("small"), Ok(7));
    assert_eq!(metadata.f32("float"), Ok(0.5));
    assert_eq!(metadata.bool("truth"), Ok(true));
    assert_eq!(metadata.strings("texts").unwrap(), ["one", "zwei, drei – vier"]);
    assert_eq!(metadata.i32s("ints").unwrap(), [-1, 9]);
    assert_eq!(metadata.u32s("naturals").unwrap(), [u32::MAX]);
    assert_eq!(metadata.f32s("floats").unwrap(), [1.5]);
    assert_eq!(metadata.optional("absent", Metadata::u32), Ok(None));
    assert_eq!(metadata.optional("small", Metadata::u32), Ok(Some(7)));
    let [matrix, quantised] = &header.tensors[..] else { panic!("two tensors") };
    assert_eq!((&matrix.name[..], &matrix.shape[..], matrix.dtype), ("matrix", &[3, 4][..], GgmlDType::F32));
    assert_eq!(matrix.bytes, header.data_start..header.data_start + 48);
    assert_eq!((&quantised.shape[..], quantised.dtype), (&[2, 64][..], GgmlDType::Q8_0));
    assert_eq!(quantised.bytes.end, file.len());
    assert_eq!(header.data_start % 32, 0);
}

#[test]
fn a_value_of_another_type_is_refused_by_its_key() {
    let header = Header::read(&valid()).unwrap();
    let metadata = &header.metadata;
    for (error, wanted) in [
        (metadata.u32("absent").unwrap_err(), "metadata key `absent` is missing"),
        (metadata.u32("float").unwrap_err(), "`float` is a floating-point number, where an unsigned integer is needed"),
        (metadata.u32("negative").unwrap_err(), "`negative` is an integer, where an unsigned integer of 32 bits"),
        (metadata.str("small").unwrap_err(), "`small` is an integer, where a string is needed"),
        (metadata.strings("ints").unwrap_err(), "`ints` is an array of integers, where an array of strings"),
        (metadata.optional("truth", Metadata::f32).unwrap_err(), "`truth` is a truth value, where a floating-point"),
    ] {
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn each_fault_is_named_by_its_place() {
    let one_key = |key: Bytes| Bytes::head(3, 0, 1).0.into_iter().chain(key.0).collect::<Vec<_>>();
    let key = Bytes::default;
    let one_tensor = |tensor: Bytes| Bytes::head(3, 1, 0).raw(&tensor.0).data(64);
    let table = |a: (&str, u64), b: (&str, u64)| {
        Bytes::head(3, 2, 0).tensor(a.0, &[8], 0, a.1).tensor(b.0, &[8], 0, b.1).data(64)
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"GGML".to_vec(), "not a GGUF file"),
        (vec![], "not a GGUF file"),
        (Bytes::head(1, 0, 0).0, "GGUF version 1 is not supported"),
        (Bytes::head(3 << 24, 0, 0).0, "is not supported"),
        (Bytes::head(3, u64::MAX, 0).0, "the count of tensors says 18446744073709551615, and at most 65536"),
        (Bytes::head(3, 0, 1 << 40).0, "the count of metadata keys says 1099511627776"),
        (Bytes::head(3, 0, 1).0, "the file ends inside the name of metadata key 0"),
        (one_key(key().u64(1 << 62)), "the name of metadata key 0 says 4611686018427387904, and at most 256"),
        (one_key(key().u64(2).raw(&[0xff, 0xfe])), "the name of metadata key 0 is not UTF-8"),
        (one_key(key().text("a\nb")), "the name of metadata key 0 has control characters"),
        (one_key(key().key("k", 13)), "metadata key `k` has the unknown type 13"),
        (one_key(key().key("k", U32)), "the file ends inside metadata key `k`"),
        (one_key(key().key("k", STR).u64(1 << 50)), "metadata key `k` says 1125899906842624"),
        (one_key(key().key("k", STR).u64(1 << 24)), "the file ends inside metadata key `k`"),
        (one_key(key().key("k", STR).u64(1).raw(&[0x80])), "metadata key `k` is not UTF-8"),
        (one_key(key().key("k", BOOL).raw(&[2])), "metadata key `k` is a truth value of 2"),
        (one_key(key().key("k", ARRAY).u32(ARRAY).u64(1)), "metadata key `k` is an array of arrays"),
        (one_key(key().key("k", ARRAY).u32(U8).u64(1 << 32)), "metadata key `k` says 4294967296"),
        (one_key(key().key("k", ARRAY).u32(STR).u64(1 << 24)), "the file ends inside metadata key `k`"),
        (one_key(key().key("k", ARRAY).u32(99).u64(1)), "metadata key `k` has the unknown type 99"),
        (one_key(key().key("k", ARRAY).u32(I64).u64(1).u64(1 << 40)), "`k` holds 1099511627776, which does not fit"),
        (Bytes::head(3, 0, 2).key("k", U8).raw(&[1]).key("k", U8).raw(&[1]).0, "metadata key `k` occurs twice"),
        (one_key(key().key("general.alignment", U32).u32(48)), "`general.alignment` is 48, not a power of two"),
        (one_key(key().key("general.alignment", U32).u32(0)), "`general.alignment` is 0, not a power of two"),
        (one_key(key().key("general.alignment", STR).text("x")), "`general.alignment` is a string"),
        (one_tensor(key().u64(65)), "the name of tensor 0 says 65, and at most 64"),
        (one_tensor(key().tensor("t", &[], 0, 0)), "tensor `t` has 0 dimensions"),
        (one_tensor(key().tensor("t", &[1; 5], 0, 0)), "tensor `t` has 5 dimensions"),
        (one_tensor(key().tensor("t", &[8, 0], 0, 0)), "tensor `t` has a dimension of zero"),
        (one_tensor(key().tensor("t", &[1 << 32, 1 << 32], 0, 0)), "tensor `t` has more elements than memory"),
        (one_tensor(key().tensor("t", &[8], 4, 0)), "tensor `t` has the type 4, which is not supported"),
        (
            one_tensor(key().tensor("t", &[40], 8, 0)),
            "tensor `t` have 40 elements, which is not a multiple of the type's block of 32",
        ),
        (one_tensor(key().tensor("t", &[8], 0, 16)), "tensor `t` starts at offset 16, which is not aligned to 32"),
        (one_tensor(key().tensor("t", &[8], 0, 64)), "tensor `t` reaches past the end of the file"),
        (one_tensor(key().tensor("t", &[8], 0, 0_u64.wrapping_sub(32))), "tensor `t` reaches past the end of the file"),
        (one_tensor(key().tensor("t", &[1 << 40], 0, 0)), "tensor `t` reaches past the end of the file"),
        (table(("a", 0), ("a", 32)), "tensor `a` occurs twice"),
        (table(("a", 0), ("b", 0)), "tensors `a` and `b` overlap"),
    ];
    for (file, wanted) in cases {
        let error = Header::read(&file).expect_err(wanted).to_string();
        assert!(error.contains(wanted), "{error:?} doesn't say {wanted:?}");
    }
    let overlap = Bytes::head(3, 2, 0).tensor("late", &[8], 0, 32).tensor("early", &[9], 0, 0).data(64);
    assert!(Header::read(&overlap).unwrap_err().to_string().contains("tensors `late` and `early` overlap"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn a_damaged_file_is_refused_or_read_within_its_bounds_and_never_panics(
        cut in prop::option::of(0..valid().len()),
        damage in prop::collection::vec((0..valid().len(), damage()), 0..4),
    ) {
        let mut file = valid();
        for (at, damage) in damage {
            damage.apply(&mut file, at);
        }
        file.truncate(cut.unwrap_or(file.len()));
        match Header::read(&file) {
            Ok(header) => {
                for tensor in &header.tensors {
                    prop_assert!(header.data_start <= tensor.bytes.start && tensor.bytes.end <= file.len());
                    let elements: usize = tensor.shape.iter().product();
                    prop_assert_eq!(elements / tensor.dtype.block_size() * tensor.dtype.type_size(), tensor.bytes.len());
                }
            }
            Err(error) => {
                let sentence = error.to_string();
                prop_assert!(!sentence.is_empty() && sentence.len() < 400 && !sentence.contains('\n'), "{}", sentence);
            }
        }
    }
}

/// A way to spoil some bytes: lengths that are off by one, gigantic, or a bit away.
#[derive(Clone, Debug)]
enum Damage {
    Byte(u8),
    Bit(u8),
    U64(u64),
    Insert(u8),
    Remove(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        any::<u8>().prop_map(Damage::Byte),
        (0..8_u8).prop_map(Damage::Bit),
        prop_oneof![Just(u64::MAX), Just(1 << 63), Just(1 << 24), Just((1 << 24) + 1), Just(0), any::<u64>()]
            .prop_map(Damage::U64),
        any::<u8>().prop_map(Damage::Insert),
        (1..40_usize).prop_map(Damage::Remove),
    ]
}

impl Damage {
    fn apply(self, file: &mut Vec<u8>, at: usize) {
        let at = at.min(file.len());
        let rest = file.len() - at;
        match self {
            Damage::Byte(byte) if rest > 0 => file[at] = byte,
            Damage::Bit(bit) if rest > 0 => file[at] ^= 1 << bit,
            Damage::U64(value) if rest >= 8 => file[at..at + 8].copy_from_slice(&value.to_le_bytes()),
            Damage::Insert(byte) => file.insert(at, byte),
            Damage::Remove(count) => drop(file.drain(at..at + count.min(rest))),
            Damage::Byte(_) | Damage::Bit(_) | Damage::U64(_) => {}
        }
    }
}
