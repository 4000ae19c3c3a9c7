//! The tokenizer of a checkpoint.

use std::fs;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::tokenizer::{DecodeStreamError, step_decode_stream};

use crate::checkpoint::files::read_object_if_any;
use crate::checkpoint::foreign::foreign_json;
use crate::error::{Error, Result};

/// The file of a complete fast tokenizer.
const WHOLE_FILE: &str = "tokenizer.json";

/// The files of a byte-level byte pair encoding in old checkpoints.
const PARTS: [&str; 2] = ["vocab.json", "merges.txt"];

/// The files that name special tokens; the first one that has a name decides.
const NAMES: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

/// What to do without a tokenizer that can be read.
const WAY_OUT: &str = "Save the one that transformers loads: AutoTokenizer.from_pretrained(...).save_pretrained(...), or give \
                       tokens in place of text (generate_tokens, logits)";

/// The token that begins and ends texts of a GPT-2 tokenizer, unless a file names another.
const END_OF_TEXT: &str = "<|endoftext|>";

/// Text to tokens and back, as transformers does it with the same files.
pub struct Tokenizer {
    path: PathBuf,
    tokenizer: tokenizers::Tokenizer,
    begin: Option<u32>,
    end: Option<u32>,
}

impl Tokenizer {
    /// Reads the tokenizer of the checkpoint in `directory`: `tokenizer.json`, or else `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is none or it is invalid; [`Error::Io`].
    pub fn load(directory: &Path) -> Result<Self> {
        let problem = |path: PathBuf| move |problem: String| Error::Checkpoint { path, problem };
        let mut named = Vec::new();
        for file in NAMES {
            named.extend(read_object_if_any(&directory.join(file))?);
        }
        let given = |key: &str| named.iter().find_map(|names| names.get(key)).filter(|value| !value.is_null());

        let path = directory.join(WHOLE_FILE);
        let mut tokenizer = match read(&path)? {
            Some(bytes) => {
                let not_a_tokenizer =
                    |words: String| problem(path.clone())(format!("not a tokenizer: {words}. {WAY_OUT}"));
                // The library panics at JSON that is broken in some places.
                serde_json::from_slice::<Value>(&bytes).map_err(|error| not_a_tokenizer(error.to_string()))?;
                guarded(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(not_a_tokenizer)?
            }
            None => {
                let space = given("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
                byte_pairs(directory, space)?
            }
        };
        let failed = |error: tokenizers::Error| problem(directory.to_owned())(format!("tokenizer: {error}"));
        // Never truncate or pad a caller's text, whatever settings were saved.
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);

        let class = given("tokenizer_class").and_then(Value::as_str).unwrap_or("GPT2Tokenizer");
        let default = class.starts_with("GPT2Tokenizer").then_some(END_OF_TEXT);
        let mut special = |key: &str| {
            let token = match named.iter().any(|names| names.contains_key(key)) {
                // A token may be an object with properties.
                true => given(key).map(|value| value.get("content").unwrap_or(value)).and_then(Value::as_str),
                false => default,
            };
            let Some((token, id)) = token.and_then(|token| Some((token, tokenizer.token_to_id(token)?))) else {
                return Ok(None);
            };
            if !tokenizer.get_added_tokens_decoder().contains_key(&id) {
                tokenizer.add_special_tokens([AddedToken::from(token, true)]).map_err(failed)?;
            }
            Ok(Some(id))
        };
        let (begin, end) = (special("bos_token")?, special("eos_token")?);
        for key in ["unk_token", "pad_token"] {
            special(key)?;
        }
        Ok(Self { path: directory.to_owned(), tokenizer, begin, end })
    }

    /// The tokens of a text, without added special tokens.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the tokenizer has no tokens for it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.tokenizer.encode_fast(text, false)).map_err(|words| self.problem(&words))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, optionally without special tokens. Bytes that are not UTF-8, such as part of a character,
    /// become U+FFFD; a token that only pads a model's vocabulary has no text.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the decoder fails.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String> {
        guarded(|| self.tokenizer.decode(tokens, skip_special_tokens)).map_err(|words| self.problem(&words))
    }

    /// The number of tokens, special ones included.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The token that texts begin with, `bos_token`.
    #[must_use]
    pub fn begin_token(&self) -> Option<u32> {
        self.begin
    }

    /// The token that texts end with, `eos_token`.
    #[must_use]
    pub fn end_token(&self) -> Option<u32> {
        self.end
    }

    fn problem(&self, words: &str) -> Error {
        Error::Checkpoint { path: self.path.clone(), problem: format!("tokenizer: {words}") }
    }
}

/// The result of the tokenizers library, which panics at some files that contradict themselves; errors in words.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    // What the library was changing when it panicked is not used again.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(words.unwrap_or("the tokenizers library failed").to_owned())
        }
    }
}

/// The text of tokens that come one after another.
///
/// The returned pieces add up to a prefix of the text of all tokens. A piece ends with a whole character: bytes of an
/// incomplete one are held back.
pub struct DecodeStream {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    // The state of `step_decode_stream`: recent tokens, the text of those that were returned, and their number.
    recent: Vec<u32>,
    prefix: String,
    prefix_index: usize,
    /// Tokens since text was last returned, which are decoded again until they end a character.
    held: usize,
    /// Tokens that are not decoded yet.
    waiting: Vec<u32>,
}

impl DecodeStream {
    /// Held tokens that are decoded again with every new one; a character has fewer. Beyond this, they are decoded when
    /// their number has doubled, so that the cost stays linear where no character ever ends.
    const ALWAYS: usize = 8;

    /// A stream before its first token.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        Self {
            tokenizer,
            skip_special_tokens,
            recent: Vec::new(),
            prefix: String::new(),
            prefix_index: 0,
            held: 0,
            waiting: Vec::new(),
        }
    }

    /// The text that `tokens` add.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the decoder fails.
    ///
    /// # Cost
    /// Linear in the number of tokens pushed, all calls together.
    pub fn push(&mut self, tokens: &[u32]) -> Result<String> {
        let mut text = String::new();
        for &token in tokens {
            self.waiting.push(token);
            if self.waiting.len() + Self::ALWAYS >= self.held
                && let Some(fresh) = self.step()?
            {
                text.push_str(&fresh);
                self.held = 0;
            }
        }
        Ok(text)
    }

    fn step(&mut self) -> Result<Option<String>> {
        let tokens = std::mem::take(&mut self.waiting);
        self.held += tokens.len();
        let step = guarded(|| {
            let step = step_decode_stream(
                &*self.tokenizer.tokenizer,
                tokens,
                self.skip_special_tokens,
                &mut self.recent,
                &mut self.prefix,
                &mut self.prefix_index,
            );
            match step {
                // A decoder that edits earlier text, such as WordPiece's clean-up, contradicts what was returned: return no more.
                Err(error) if error.is::<DecodeStreamError>() => Ok(None),
                other => other,
            }
        });
        step.map_err(|words| self.tokenizer.problem(&words))
    }
}

/// The contents of a JSON file or of a list of merges; none if there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => match foreign_json(&bytes) {
            Some(words) => Err(Error::Checkpoint { path: path.to_owned(), problem: words.into() }),
            None => Ok(Some(bytes)),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path)(error)),
    }
}

/// GPT-2's tokenizer from its two files.
fn byte_pairs(directory: &Path, prefix_space: bool) -> Result<tokenizers::Tokenizer> {
    let problem = |problem: String| Error::Checkpoint { path: directory.to_owned(), problem };
    if let Some(missing) = PARTS.iter().find(|file| !directory.join(file).is_file()) {
        return Err(problem(format!("no tokenizer: there is neither '{WHOLE_FILE}' nor '{missing}'. {WAY_OUT}")));
    }
    for file in PARTS {
        read(&directory.join(file))?;
    }
    let [Some(vocabulary), Some(merges)] = PARTS.map(|file| directory.join(file).to_str().map(str::to_owned)) else {
        return Err(problem("the tokenizer's files have a name that is not UTF-8".into()));
    };
    let model = guarded(|| BPE::from_file(&vocabulary, &merges).build());
    let model = model.map_err(|error| problem(format!("'{}' and '{}': {error}", PARTS[0], PARTS[1])))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(prefix_space, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tiny() -> Tokenizer {
        Tokenizer::load(Path::new("tests/data/tiny-gpt2")).unwrap()
    }

    /// The two files of an old checkpoint, made from `tokenizer.json`.
    fn write_parts(directory: &Path) {
        let whole: Value = serde_json::from_slice(&fs::read("tests/data/tiny-gpt2/tokenizer.json").unwrap()).unwrap();
        fs::write(directory.join("vocab.json"), whole["model"]["vocab"].to_string()).unwrap();
        let merge = |merge: &Value| match merge {
            Value::String(pair) => pair.clone(),
            pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        };
        let merges: Vec<_> = whole["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
        fs::write(directory.join("merges.txt"), format!("#version: 0.2\n{}\n", merges.join("\n"))).unwrap();
    }

    #[test]
    fn the_two_files_of_old_checkpoints_give_the_same_tokens() {
        let directory = tempfile::tempdir().unwrap();
        write_parts(directory.path());
        let (parts, whole) = (Tokenizer::load(directory.path()).unwrap(), tiny());
        let text = fs::read_to_string("tests/data/tiny-gpt2/heldout.txt").unwrap() + "<|endoftext|>\u{1F600}  end";
        assert_eq!(parts.encode(&text).unwrap(), whole.encode(&text).unwrap());
        assert_eq!((parts.begin_token(), parts.end_token()), (Some(0), Some(0)));
        assert_eq!(parts.vocabulary(), whole.vocabulary());
    }

    #[test]
    fn special_tokens_are_named_as_strings_or_objects_in_either_file() {
        let directory = tempfile::tempdir().unwrap();
        write_parts(directory.path());
        let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        let tokens = || {
            let tokenizer = Tokenizer::load(directory.path()).unwrap();
            (tokenizer.begin_token(), tokenizer.end_token())
        };
        write(NAMES[1], r#"{"bos_token": "!", "eos_token": {"content": "\"", "lstrip": false}}"#);
        assert_eq!(tokens(), (Some(1), Some(2)));
        write(NAMES[0], r#"{"bos_token": "none such", "eos_token": null}"#);
        assert_eq!(tokens(), (None, None));
        write(NAMES[0], r#"{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "$"}"#);
        assert_eq!(tokens(), (Some(1), Some(4)));
        fs::remove_file(directory.path().join(NAMES[1])).unwrap();
        assert_eq!(tokens(), (None, Some(4)));
    }

    #[test]
    fn special_tokens_can_be_skipped() {
        let tokenizer = tiny();
        let tokens = tokenizer.encode("One<|endoftext|> two").unwrap();
        assert!(tokens.contains(&0));
        assert_eq!(tokenizer.decode(&tokens, false).unwrap(), "One<|endoftext|> two");
        assert_eq!(tokenizer.decode(&tokens, true).unwrap(), "One two");
        assert_eq!(tokenizer.decode(&[1, 8192], true).unwrap(), "!");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let message = || Tokenizer::load(directory.path()).map(|_| ()).unwrap_err().to_string();
        assert!(message().contains("neither 'tokenizer.json' nor 'vocab.json'"), "{}", message());
        fs::write(directory.path().join("vocab.json"), r#"{"a": 0}"#).unwrap();
        assert!(message().contains("'merges.txt'"), "{}", message());
        fs::write(directory.path().join("merges.txt"), "a b\n").unwrap();
        assert!(message().contains("'vocab.json' and 'merges.txt'"), "{}", message());
        fs::write(directory.path().join(WHOLE_FILE), "{}").unwrap();
        assert!(message().contains("tokenizer.json: not a tokenizer"), "{}", message());
        fs::write(directory.path().join(NAMES[0]), "[]").unwrap();
        assert!(message().contains("tokenizer_config.json: expected a JSON object"), "{}", message());
    }

    fn stream(tokenizer: &Arc<Tokenizer>) -> DecodeStream {
        DecodeStream::new(Arc::clone(tokenizer), true)
    }

    /// Tokens that are decoded when each of `tokens` is pushed by itself.
    fn decoded(tokens: &[u32]) -> usize {
        let mut stream = stream(&Arc::new(tiny()));
        let mut total = 0;
        for &token in tokens {
            stream.push(&[token]).unwrap();
            if stream.waiting.is_empty() {
                total += stream.recent.len();
            }
        }
        total
    }

    #[test]
    fn streams_cost_no_more_for_a_token_when_there_are_more() {
        let tokenizer = tiny();
        let text = fs::read_to_string("tests/data/tiny-gpt2/heldout.txt").unwrap();
        let prose = tokenizer.encode(&text[..20_000]).unwrap();
        // Bytes that end no character, special tokens, and tokens without text.
        let beginning = tokenizer.encode("\u{1F600}").unwrap()[0];
        for tokens in [prose, vec![beginning; 4000], vec![0; 4000], vec![8192; 4000]] {
            let (half, whole) = (decoded(&tokens[..tokens.len() / 2]), decoded(&tokens));
            assert!(whole <= 3 * half && whole <= 8 * tokens.len(), "{half} of half, {whole} of all");
        }
    }

    #[test]
    fn streams_hold_back_what_ends_no_character() {
        let tokenizer = Arc::new(tiny());
        let mut stream = stream(&tokenizer);
        let tokens = tokenizer.encode("a\u{1F600}b<|endoftext|>c").unwrap();
        let pieces: Vec<_> = tokens.iter().map(|&token| stream.push(&[token]).unwrap()).collect();
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        assert_eq!(pieces.concat(), "a\u{1F600}bc");
        assert_eq!(stream.push(&[]).unwrap(), "");
    }

    proptest! {
        #[test]
        fn streams_give_the_text_that_decoding_at_once_gives(
            tokens in prop::collection::vec(prop_oneof![0u32..300, 0u32..8193], 0..60),
            cuts in prop::collection::vec(1usize..9, 60),
        ) {
            let tokenizer = Arc::new(tiny());
            let (mut stream, mut found, mut rest) = (stream(&tokenizer), String::new(), &tokens[..]);
            for cut in cuts {
                let (part, after) = rest.split_at(cut.min(rest.len()));
                found += &stream.push(part).unwrap();
                rest = after;
                // What was returned is never taken back.
                let whole = tokenizer.decode(&tokens, true).unwrap();
                prop_assert!(whole.starts_with(&found), "{found:?} of {whole:?}");
            }
            let end = tokenizer.encode("end.").unwrap();
            for &token in end.iter().cycle().take(100 * end.len()) {
                found += &stream.push(&[token]).unwrap();
            }
            let all: Vec<_> = tokens.into_iter().chain(end.repeat(100)).collect();
            prop_assert_eq!(found, tokenizer.decode(&all, true).unwrap());
        }

        #[test]
        fn any_text_comes_back(text: String) {
            let tokenizer = tiny();
            let tokens = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text);
        }
    }
}
