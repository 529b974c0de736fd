//! Which tokens does a text become, and which bytes does a token stand for?
//!
//! Built from the `tokenizer.ggml.*` keys of a GGUF file: byte-level BPE (`gpt2`) with the pre-tokenizer that the file
//! names, on the components of the `tokenizers` crate. Its added tokens are not used: markup is told from text by
//! `markup`, which knows who wrote what.
//! Some vocabularies lack tokens for bytes that their makers never saw (SmolLM2's for 0x04). The model can't be told of
//! them, so a neighbouring token stands for them too, as if they weren't there.
//! Invariant: every byte of a text belongs to exactly one token, whatever the text.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    Model, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, SplitDelimiterBehavior,
};

use super::markup::{Markup, Part};
use super::weights::gguf::{Metadata, MetadataError};
use crate::types::{TokenId, counted};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";

/// Texts of control tokens that end an answer, in the vocabularies of all families.
const END_OF_TURN: [&str; 12] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<EOT>",
    "<|eot|>",
    "<|endofprompt|>",
];

/// Why a file's tokenizer can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error("metadata key `{MODEL}` is `{0}`; supported is `gpt2` (byte-level BPE)")]
    UnknownModel(String),
    #[error("metadata key `{PRE}` is `{0}`, a way to split words that this build doesn't know; it won't guess another")]
    UnknownPre(String),
    #[error("metadata key `{key}` has {}, and `{TOKENS}` {wanted}", counted(*found, "entry", "entries"))]
    Length { key: &'static str, found: usize, wanted: usize },
    #[error("metadata key `{TOKENS}` is empty, or has more than 2^31 entries")]
    NoTokens,
    #[error("metadata key `{TOKEN_TYPE}` gives token {id} the type {found}, which is not 1 to 6")]
    Type { id: usize, found: i32 },
    #[error("metadata key `{TOKENS}`: token {id} has {bytes} bytes, and at most 65535 are allowed")]
    TokenTooLong { id: usize, bytes: usize },
    #[error("metadata key `{TOKENS}` has no token for a space, so it can't be a byte-level vocabulary")]
    NoSpace,
    #[error("metadata key `{MERGES}`: entry {index} is not two tokens with a space between, which join to a third")]
    Merge { index: usize },
    #[error("metadata key `{key}` is {id}, of a vocabulary of {}", counted(*tokens, "token", "tokens"))]
    OutOfVocabulary { key: String, id: u32, tokens: usize },
    #[error("the vocabulary can't be searched or split by: {0}")]
    Build(String),
}

/// What a token is, by `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum TokenKind {
    /// A part of text, or reserved for one: types 1 (normal), 2 (unknown), 5 (unused), 6 (byte).
    Text,
    /// Steers the model and is never shown: type 3.
    Control,
    /// The maker's own, shown as text: type 4 (user defined).
    Own,
}

/// How a family splits text into words before it merges.
struct WordRule {
    names: &'static [&'static str],
    /// Each splits what the ones before it left; both the matches and what lies between are words.
    expressions: &'static [&'static str],
    /// A word that is a token is taken whole, whatever the merges make of it.
    takes_whole_words: bool,
    /// What holds if `add_bos_token` is absent.
    adds_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The expressions are the families' own, as their `tokenizer.json` has them and llama.cpp reads them.
const WORD_RULES: [WordRule; 7] = [
    WordRule { names: &["smollm"], expressions: &[r"\p{N}", GPT2], takes_whole_words: false, adds_bos: false },
    WordRule {
        names: &["llama-bpe", "llama3", "llama-v3"],
        expressions: &[
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        takes_whole_words: true,
        adds_bos: true,
    },
    WordRule {
        names: &["qwen2", "deepseek-r1-qwen"],
        expressions: &[
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        takes_whole_words: false,
        adds_bos: false,
    },
    WordRule {
        names: &["qwen35"],
        expressions: &[
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        takes_whole_words: false,
        adds_bos: false,
    },
    WordRule {
        names: &["tekken"],
        expressions: &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        takes_whole_words: true,
        adds_bos: true,
    },
    WordRule { names: &["gpt-2"], expressions: &[GPT2], takes_whole_words: false, adds_bos: false },
    WordRule {
        names: &["default"],
        expressions: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        takes_whole_words: false,
        adds_bos: false,
    },
];

/// A file's tokenizer.
pub struct Tokenizer {
    bytes: TokenBytes,
    /// `[vocabulary]`
    kinds: Vec<TokenKind>,
    markup: Markup,
    words: Sequence,
    bpe: BPE,
    alphabet: Alphabet,
    /// Stands for bytes that the vocabulary lacks, where they have no neighbour.
    space: TokenId,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    adds_bos: bool,
    stop_tokens: Vec<TokenId>,
}

impl Tokenizer {
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TokenizerError> {
        match metadata.str(MODEL)? {
            "gpt2" => {}
            other => return Err(TokenizerError::UnknownModel(other.to_owned())),
        }
        let name = metadata.str(PRE)?;
        let rule = WORD_RULES
            .iter()
            .find(|rule| rule.names.contains(&name))
            .ok_or_else(|| TokenizerError::UnknownPre(name.to_owned()))?;
        let texts = metadata.strings(TOKENS)?;
        if texts.is_empty() || i32::try_from(texts.len()).is_err() {
            return Err(TokenizerError::NoTokens);
        }
        let kinds = kinds(metadata, texts)?;
        let vocab: Vocab = ids()
            .zip(texts)
            .zip(&kinds)
            .filter(|(_, kind)| **kind != TokenKind::Control)
            .map(|((id, text), _)| (text.clone(), id.0))
            .collect();
        let alphabet = Alphabet::new(&vocab);
        let bytes = TokenBytes::new(texts, &kinds, &alphabet)?;
        let space = alphabet.known(b' ').and_then(|c| vocab.get(c.encode_utf8(&mut [0; 4])));
        let space = TokenId(*space.ok_or(TokenizerError::NoSpace)?);
        let bpe = BPE::builder()
            .vocab_and_merges(vocab.clone(), merges(metadata, &vocab)?)
            .ignore_merges(rule.takes_whole_words)
            .build()
            .map_err(build)?;
        let of_kind = |wanted| {
            let tokens = ids().zip(texts).zip(&kinds).filter(move |(_, kind)| **kind == wanted);
            tokens.map(|((id, text), _)| (id, text.as_str()))
        };
        let markup = Markup::new(of_kind(TokenKind::Control), of_kind(TokenKind::Own)).map_err(build)?;
        let special = |key: &str| special_token(metadata, key, texts.len());
        let mut stop_tokens: Vec<TokenId> = ["eos", "eot", "eom"]
            .iter()
            .map(|name| special(&format!("tokenizer.ggml.{name}_token_id")))
            .filter_map(Result::transpose)
            .collect::<Result<_, _>>()?;
        stop_tokens
            .extend(of_kind(TokenKind::Control).filter(|(_, text)| END_OF_TURN.contains(text)).map(|(id, _)| id));
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        Ok(Self {
            bytes,
            markup,
            words: rule.words()?,
            bpe,
            alphabet,
            space,
            bos: special("tokenizer.ggml.bos_token_id")?,
            eos: special("tokenizer.ggml.eos_token_id")?,
            adds_bos: metadata.optional(ADD_BOS, Metadata::bool)?.unwrap_or(rule.adds_bos),
            stop_tokens,
            kinds,
        })
    }

    /// Tokens of `text[from..]`, each with the number of bytes of the text that it stands for; they sum to its length.
    /// At the text's start a BOS that the model wants and the text lacks comes first, for 0 bytes. `walls`: see `markup`.
    pub fn tokenize(&self, text: &str, walls: &[usize], from: usize) -> Vec<(TokenId, u16)> {
        let parts = self.markup.parts(text, walls, from);
        let has_bos = matches!((parts.first(), self.bos), (Some(Part::Markup { id, .. }), Some(bos)) if *id == bos);
        let bos = self.bos.filter(|_| self.adds_bos && from == 0 && !has_bos);
        self.tokens_of(parts, bos.map(|bos| (bos, 0)).into_iter().collect())
    }

    /// As `tokenize`, of a text that follows another: no BOS.
    pub fn tokenize_on(&self, text: &str, walls: &[usize], from: usize) -> Vec<(TokenId, u16)> {
        self.tokens_of(self.markup.parts(text, walls, from), Vec::new())
    }

    fn tokens_of(&self, parts: Vec<Part<'_>>, mut tokens: Vec<(TokenId, u16)>) -> Vec<(TokenId, u16)> {
        for part in parts {
            match part {
                Part::Markup { id, .. } => tokens.push((id, self.length(id))),
                Part::Text(text) => self.tokenize_text(text, &mut tokens),
            }
        }
        tokens
    }

    /// Bytes that the token stands for; of a control token its name. Empty if there is no such token.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.bytes.get(id)
    }

    /// Whether this token stands for these bytes of a text: they are its own, but for those that the vocabulary lacks.
    pub fn stands_for(&self, id: TokenId, text: &[u8]) -> bool {
        let own = self.token_bytes(id);
        if own == text {
            return true;
        }
        let known: Vec<u8> = text.iter().copied().filter(|byte| self.alphabet.known(*byte).is_some()).collect();
        known.len() < text.len() && (known == own || (known.is_empty() && id == self.space))
    }

    pub fn is_control(&self, id: TokenId) -> bool {
        self.kinds.get(id.0 as usize) == Some(&TokenKind::Control)
    }

    /// Bytes of the longest token, at least 1.
    pub fn longest_token_bytes(&self) -> usize {
        self.bytes.longest().max(1)
    }

    /// Tokens in the vocabulary.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    pub fn eos(&self) -> Option<TokenId> {
        self.eos
    }

    /// Whether a control token has this text.
    pub fn has_control(&self, text: &str) -> bool {
        let parts = self.markup.parts(text, &[], 0);
        matches!(parts.as_slice(), [Part::Markup { id, .. }] if self.is_control(*id))
    }

    /// Ascending: the file's own `eos`, `eot` and `eom`, and control tokens that end an answer by their name.
    pub fn stop_tokens(&self) -> &[TokenId] {
        &self.stop_tokens
    }

    pub fn markup(&self) -> &Markup {
        &self.markup
    }

    /// At most 65535: longer tokens were refused.
    fn length(&self, id: TokenId) -> u16 {
        u16::try_from(self.token_bytes(id).len()).unwrap_or(u16::MAX)
    }

    fn tokenize_text(&self, text: &str, tokens: &mut Vec<(TokenId, u16)>) {
        let first = tokens.len();
        // Bytes that the vocabulary lacks, before the text's first token.
        let mut leading = 0;
        if self.merge_words(text, first, &mut leading, tokens).is_err() {
            // Neither splitting nor merging fails without an unknown token; were it so, the text is still accounted for.
            tracing::error!(text_bytes = text.len(), "text could not be tokenised");
            tokens.truncate(first);
            leading = text.len();
        }
        match tokens
            .get_mut(first)
            .and_then(|(_, bytes)| Some((u16::try_from(leading).ok()?.checked_add(*bytes)?, bytes)))
        {
            Some((sum, bytes)) => *bytes = sum,
            None => {
                let most = usize::from(u16::MAX);
                let stand_ins = std::iter::repeat_n(most, leading / most).chain([leading % most]);
                let stand_ins = stand_ins.filter_map(|bytes| u16::try_from(bytes).ok()).filter(|bytes| *bytes > 0);
                tokens.splice(first..first, stand_ins.map(|bytes| (self.space, bytes)));
            }
        }
    }

    fn merge_words(
        &self,
        text: &str,
        first: usize,
        leading: &mut usize,
        tokens: &mut Vec<(TokenId, u16)>,
    ) -> tokenizers::Result<()> {
        let mut words = PreTokenizedString::from(text);
        self.words.pre_tokenize(&mut words)?;
        let mut spelled = String::new();
        for (word, _, _) in words.get_splits(OffsetReferential::Original, OffsetType::None) {
            for byte in word.bytes() {
                match self.alphabet.known(byte) {
                    Some(character) => spelled.push(character),
                    None => {
                        self.merge(&mut spelled, tokens)?;
                        match tokens.get_mut(first..).and_then(<[_]>::last_mut) {
                            None => *leading += 1,
                            Some((_, bytes)) if *bytes < u16::MAX => *bytes += 1,
                            Some(_) => tokens.push((self.space, 1)),
                        }
                    }
                }
            }
            self.merge(&mut spelled, tokens)?;
        }
        Ok(())
    }

    /// Takes a word, or what stands between bytes that the vocabulary lacks, as spelled in GPT-2's alphabet.
    fn merge(&self, spelled: &mut String, tokens: &mut Vec<(TokenId, u16)>) -> tokenizers::Result<()> {
        if !spelled.is_empty() {
            let merged = self.bpe.tokenize(spelled)?;
            tokens.extend(merged.iter().map(|token| (TokenId(token.id), self.length(TokenId(token.id)))));
            spelled.clear();
        }
        Ok(())
    }
}

impl WordRule {
    fn words(&self) -> Result<Sequence, TokenizerError> {
        let mut steps = Vec::new();
        for expression in self.expressions {
            let pattern = SplitPattern::Regex((*expression).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(build)?;
            steps.push(PreTokenizerWrapper::Split(split));
        }
        Ok(Sequence::new(steps))
    }
}

fn build(error: impl ToString) -> TokenizerError {
    TokenizerError::Build(error.to_string())
}

/// Ids from 0, in order. A vocabulary is shorter than 2^31, so this never ends early.
fn ids() -> impl Iterator<Item = TokenId> {
    (0..=u32::MAX).map(TokenId)
}

fn kinds(metadata: &Metadata, texts: &[String]) -> Result<Vec<TokenKind>, TokenizerError> {
    let Some(types) = metadata.optional(TOKEN_TYPE, Metadata::i32s)? else {
        return Ok(vec![TokenKind::Text; texts.len()]);
    };
    if types.len() != texts.len() {
        return Err(TokenizerError::Length { key: TOKEN_TYPE, found: types.len(), wanted: texts.len() });
    }
    let kinds = types.iter().zip(texts).enumerate().map(|(id, (&found, text))| match found {
        3 => Ok(TokenKind::Control),
        // Converters are known to call these ordinary text; a token of this form is never part of one.
        1..=6 if text.starts_with("<|") && END_OF_TURN.contains(&text.as_str()) => Ok(TokenKind::Control),
        4 => Ok(TokenKind::Own),
        1 | 2 | 5 | 6 => Ok(TokenKind::Text),
        _ => Err(TokenizerError::Type { id, found }),
    });
    kinds.collect()
}

fn merges(metadata: &Metadata, vocab: &Vocab) -> Result<Vec<(String, String)>, TokenizerError> {
    let merges = metadata.strings(MERGES)?.iter().enumerate().map(|(index, merge)| {
        let (left, right) = merge.split_once(' ').ok_or(TokenizerError::Merge { index })?;
        let are_tokens = [left, right, &[left, right].concat()].iter().all(|text| vocab.contains_key(*text));
        if are_tokens { Ok((left.to_owned(), right.to_owned())) } else { Err(TokenizerError::Merge { index }) }
    });
    merges.collect()
}

fn special_token(metadata: &Metadata, key: &str, tokens: usize) -> Result<Option<TokenId>, TokenizerError> {
    match metadata.optional(key, Metadata::u32)? {
        Some(id) if id as usize >= tokens => Err(TokenizerError::OutOfVocabulary { key: key.to_owned(), id, tokens }),
        id => Ok(id.map(TokenId)),
    }
}

/// GPT-2's characters for bytes, from byte 0: printable ones are themselves, the others follow from U+0100.
pub(super) fn byte_alphabet() -> impl Iterator<Item = char> {
    let mut others = '\u{100}'..;
    (0..=u8::MAX).map(move |byte| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => others.next().unwrap_or_default(),
    })
}

/// GPT-2's alphabet: a printable character for each byte, so that vocabularies and merges are text.
struct Alphabet {
    bytes: HashMap<char, u8>,
    /// `[256]`: each byte's character, if the vocabulary has a token for it.
    known: Vec<Option<char>>,
}

impl Alphabet {
    fn new(vocab: &Vocab) -> Self {
        let known = |c: char| vocab.contains_key(c.encode_utf8(&mut [0; 4])).then_some(c);
        Self { bytes: byte_alphabet().zip(0..=u8::MAX).collect(), known: byte_alphabet().map(known).collect() }
    }

    /// The bytes that a token's text stands for; `None` if it isn't in this alphabet.
    fn decode(&self, text: &str) -> Option<Vec<u8>> {
        text.chars().map(|c| self.bytes.get(&c).copied()).collect()
    }

    /// The byte's character; `None` if the vocabulary lacks it.
    fn known(&self, byte: u8) -> Option<char> {
        self.known.get(usize::from(byte)).copied().flatten()
    }
}

/// What each token stands for, one after the other in one buffer.
struct TokenBytes {
    buffer: Vec<u8>,
    /// `[vocabulary + 1]`: where each begins.
    starts: Vec<usize>,
}

impl TokenBytes {
    fn new(texts: &[String], kinds: &[TokenKind], alphabet: &Alphabet) -> Result<Self, TokenizerError> {
        let mut bytes = Self { buffer: Vec::new(), starts: vec![0] };
        for (id, (text, kind)) in texts.iter().zip(kinds).enumerate() {
            let decoded = if *kind == TokenKind::Text { alphabet.decode(text) } else { None };
            let token = decoded.unwrap_or_else(|| text.clone().into_bytes());
            if token.len() > usize::from(u16::MAX) {
                return Err(TokenizerError::TokenTooLong { id, bytes: token.len() });
            }
            bytes.buffer.extend(token);
            bytes.starts.push(bytes.buffer.len());
        }
        Ok(bytes)
    }

    fn longest(&self) -> usize {
        self.starts.iter().zip(self.starts.iter().skip(1)).map(|(start, end)| end - start).max().unwrap_or(0)
    }

    fn get(&self, id: TokenId) -> &[u8] {
        let id = id.0 as usize;
        let range = self.starts.get(id).zip(self.starts.get(id + 1));
        range.and_then(|(&start, &end)| self.buffer.get(start..end)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use serde::Deserialize;

    use super::super::weights::WeightFile;
    use super::super::weights::gguf::Value as GgufValue;
    use super::*;

    /// A text, and the ids that llama.cpp gives it: as typed, and where markup in it counts.
    #[derive(Deserialize)]
    struct Golden {
        text: String,
        plain: Vec<u32>,
        markup: Vec<u32>,
    }

    /// A family's vocabulary, cut to what the golden texts touch.
    #[derive(Deserialize)]
    struct CutVocabulary {
        pre: String,
        ids: Vec<u32>,
        tokens: Vec<String>,
        types: Vec<i32>,
        merges: Vec<String>,
    }

    fn golden(name: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokens").join(name);
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    fn goldens(name: &str) -> Vec<Golden> {
        let goldens: Vec<Golden> = golden(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(goldens.len() >= 300);
        goldens
    }

    fn metadata(pre: &str, tokens: Vec<String>, types: Vec<i32>, merges: Vec<String>) -> Metadata {
        let pairs = [
            (MODEL, GgufValue::Str("gpt2".to_owned())),
            (PRE, GgufValue::Str(pre.to_owned())),
            (TOKENS, GgufValue::Strs(tokens)),
            (TOKEN_TYPE, GgufValue::I32s(types)),
            (MERGES, GgufValue::Strs(merges)),
            (ADD_BOS, GgufValue::Bool(false)),
        ];
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// A token a byte, and `more`.
    fn byte_tokens(more: &[&str]) -> Vec<String> {
        byte_alphabet().map(String::from).chain(more.iter().map(|text| text.to_string())).collect()
    }

    fn tokenizer(pre: &str, more: &[&str], types: &[i32], merges: &[&str]) -> Result<Tokenizer, TokenizerError> {
        let types = [vec![1; 256], types.to_vec()].concat();
        let merges = merges.iter().map(|merge| merge.to_string()).collect();
        Tokenizer::from_metadata(&metadata(pre, byte_tokens(more), types, merges))
    }

    fn differences(tokenizer: &Tokenizer, goldens: &[Golden], id: impl Fn(TokenId) -> u32) -> Vec<String> {
        let ids = |text: &str, walls: &[usize]| -> Vec<u32> {
            tokenizer.tokenize(text, walls, 0).iter().map(|(token, _)| id(*token)).collect()
        };
        let mut found = Vec::new();
        for Golden { text, plain, markup } in goldens {
            let everywhere: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            for (walls, expected) in [(everywhere.as_slice(), plain), (&[], markup)] {
                let ours = ids(text, walls);
                if ours != *expected {
                    found.push(format!("{text:?}:\n  ours   {ours:?}\n  golden {expected:?}"));
                }
            }
        }
        found
    }

    fn agrees_with_llama_cpp(name: &str) {
        agrees_with_llama_cpp_where(name, |_| true);
    }

    fn agrees_with_llama_cpp_where(name: &str, counts: impl Fn(&str) -> bool) {
        let CutVocabulary { pre, ids, tokens, types, merges } =
            serde_json::from_str(&golden(&format!("{name}.vocab.json"))).unwrap();
        let tokenizer = Tokenizer::from_metadata(&metadata(&pre, tokens, types, merges)).unwrap();
        let mut goldens = goldens(&format!("{name}.jsonl"));
        goldens.retain(|golden| counts(&golden.text));
        let found = differences(&tokenizer, &goldens, |token| ids[token.0 as usize]);
        assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
    }

    #[test]
    fn the_real_models_tokens_are_those_of_llama_cpp() {
        let path = std::env::var("REKINDLE_TEST_MODEL").unwrap_or("models/SmolLM2-135M-Instruct.Q4_1.gguf".to_owned());
        let file = WeightFile::open(path.as_ref())
            .unwrap_or_else(|error| panic!("the tests need a model: {error}; get it with `rekindle pull`"));
        let tokenizer = Tokenizer::from_metadata(file.metadata()).unwrap();
        let found = differences(&tokenizer, &goldens("smollm2.jsonl"), |token| token.0);
        assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
    }

    #[test]
    fn tokens_of_gpt_2_are_those_of_llama_cpp() {
        agrees_with_llama_cpp("gpt-2");
    }

    #[test]
    fn tokens_of_llama_3_are_those_of_llama_cpp() {
        agrees_with_llama_cpp("llama-bpe");
    }

    #[test]
    fn tokens_of_qwen_2_are_those_of_llama_cpp() {
        agrees_with_llama_cpp("qwen2");
    }

    #[test]
    fn tokens_of_qwen_3_5_are_those_of_llama_cpp() {
        agrees_with_llama_cpp("qwen35");
    }

    #[test]
    fn tokens_of_the_default_words_are_those_of_llama_cpp() {
        agrees_with_llama_cpp("default");
    }

    #[test]
    fn tokens_of_tekkens_words_are_those_of_llama_cpp() {
        // Tekken's own expression has combining marks in words, as ours; that of llama.cpp does not.
        agrees_with_llama_cpp_where("tekken", |text| !text.contains(['\u{301}', '\u{30a}', '\u{303}', 'ि']));
    }

    #[test]
    fn malformed_metadata_is_refused_with_the_key_that_is_wrong() {
        let refused = |metadata: Metadata| Tokenizer::from_metadata(&metadata).err().unwrap().to_string();
        let with = |changed: &[(&str, GgufValue)]| {
            let mut pairs = vec![
                (MODEL, GgufValue::Str("gpt2".to_owned())),
                (PRE, GgufValue::Str("gpt-2".to_owned())),
                (TOKENS, GgufValue::Strs(byte_tokens(&["ab"]))),
                (TOKEN_TYPE, GgufValue::I32s(vec![1; 257])),
                (MERGES, GgufValue::Strs(vec!["a b".to_owned()])),
            ];
            pairs.extend(changed.iter().cloned());
            refused(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
        };
        let strs = |texts: &[&str]| GgufValue::Strs(texts.iter().map(|text| text.to_string()).collect());
        let cases: [(&str, GgufValue, &str); 15] = [
            (MODEL, GgufValue::Str("llama".to_owned()), "`tokenizer.ggml.model` is `llama`"),
            (PRE, GgufValue::Str("chameleon".to_owned()), "`tokenizer.ggml.pre` is `chameleon`"),
            (TOKENS, strs(&[]), "`tokenizer.ggml.tokens` is empty"),
            (TOKENS, GgufValue::Int(7), "`tokenizer.ggml.tokens` is an integer"),
            (TOKENS, strs(&["a"]), "`tokenizer.ggml.token_type` has 257 entries"),
            (TOKEN_TYPE, GgufValue::I32s(vec![1; 256]), "has 256 entries"),
            (TOKEN_TYPE, GgufValue::I32s(vec![-1; 257]), "token 0 the type -1"),
            (TOKEN_TYPE, GgufValue::I32s(vec![7; 257]), "token 0 the type 7"),
            (TOKEN_TYPE, GgufValue::I32s(vec![3; 257]), "no token for a space"),
            (MERGES, strs(&["ab"]), "`tokenizer.ggml.merges`: entry 0"),
            (MERGES, strs(&["a b", "a c"]), "`tokenizer.ggml.merges`: entry 1"),
            (MERGES, strs(&["a  b"]), "`tokenizer.ggml.merges`: entry 0"),
            (MERGES, strs(&[" "]), "`tokenizer.ggml.merges`: entry 0"),
            ("tokenizer.ggml.eos_token_id", GgufValue::Int(257), "`tokenizer.ggml.eos_token_id` is 257"),
            ("tokenizer.ggml.bos_token_id", GgufValue::Int(-1), "`tokenizer.ggml.bos_token_id`"),
        ];
        for (key, value, sentence) in cases {
            let found = with(&[(key, value.clone())]);
            assert!(found.contains(sentence), "{key} {value:?}: {found}");
        }
    }

    #[test]
    fn a_token_longer_than_a_log_can_count_is_refused() {
        let long = "x".repeat(65_536);
        assert!(matches!(tokenizer("gpt-2", &[&long], &[1], &[]), Err(TokenizerError::TokenTooLong { id: 256, .. })));
        assert!(tokenizer("gpt-2", &[&long[1..]], &[1], &[]).is_ok());
    }

    #[test]
    fn a_control_token_is_never_made_by_merging() {
        let refused = tokenizer("gpt-2", &["ab"], &[3], &["a b"]);
        assert!(matches!(refused, Err(TokenizerError::Merge { index: 0 })));
        let spelled = tokenizer("llama-bpe", &["ab"], &[3], &[]).unwrap();
        assert_eq!(spelled.tokenize("ab", &[0, 1], 0), [(TokenId(97), 1), (TokenId(98), 1)]);
    }

    #[test]
    fn an_end_of_turn_that_the_file_calls_text_is_control() {
        let tokenizer = tokenizer("gpt-2", &["<|im_end|>"], &[1], &[]).unwrap();
        assert!(tokenizer.is_control(TokenId(256)));
        assert_eq!(tokenizer.stop_tokens(), [TokenId(256)]);
    }

    #[test]
    fn ids_past_the_vocabulary_are_nothing() {
        let tokenizer = tokenizer("gpt-2", &[], &[], &[]).unwrap();
        assert!(tokenizer.token_bytes(TokenId(u32::MAX)).is_empty() && !tokenizer.is_control(TokenId(256)));
    }

    #[test]
    fn a_very_long_word_is_no_trouble() {
        let tokenizer = tokenizer("llama-bpe", &["aa", "aaaa"], &[1, 1], &["a a", "aa aa"]).unwrap();
        for c in ["a", "_", " ", "\n", "1", "é", "\u{301}", "😀"] {
            let text = c.repeat(200_000 / c.len());
            let bytes: usize = tokenizer.tokenize(&text, &[], 0).iter().map(|(_, bytes)| usize::from(*bytes)).sum();
            assert_eq!(bytes, text.len());
        }
    }

    proptest! {
        #[test]
        fn every_byte_of_a_text_belongs_to_one_token(text in any::<String>(), pre in prop::sample::select(
            WORD_RULES.iter().flat_map(|rule| rule.names).collect::<Vec<_>>())) {
            let tokenizer = tokenizer(pre, &["<s>", "Ġt", "\n\n"], &[3, 1, 4], &["Ġ t"]).unwrap();
            let tokens = tokenizer.tokenize(&text, &[], 0);
            let spelled: Vec<u8> = tokens.iter().flat_map(|(id, _)| tokenizer.token_bytes(*id)).copied().collect();
            prop_assert_eq!(String::from_utf8(spelled).unwrap(), text);
            prop_assert!(tokens.iter().all(|(id, bytes)| tokenizer.token_bytes(*id).len() == usize::from(*bytes)));
        }
    }
}
