//! The model card, `README.md`, of a compressed checkpoint. It holds no times and no dates, so that the same input
//! gives the same card.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Map, Value};

use super::report::{CalibrationRecord, Report};

/// Writes the card of a checkpoint compressed from `source` by `config`.
#[must_use]
pub fn model_card(source: &Path, config: &Map<String, Value>, report: &Report) -> String {
    let name = source_name(source);
    let architecture =
        config.get("architectures").and_then(|all| all.get(0)).and_then(Value::as_str).unwrap_or_default();
    let class = auto_class(architecture);
    let license = license(source).map_or(String::new(), |license| format!("license: {license}\n"));
    let base = hub_id(source).map_or(String::new(), |id| format!("base_model: {id}\n"));
    let pipeline = if class == "AutoModelForCausalLM" { "pipeline_tag: text-generation\n" } else { "" };
    let Report { parameters_before: before, parameters_after: after, effort, seed, tqcompressor: version, .. } = report;
    let dtype = report.dtype.map_or(String::new(), |dtype| format!(", stored as {dtype}"));

    let mut card = format!(
        "---\nlibrary_name: transformers\n{license}{base}{pipeline}tags:\n- {model_type}\n- tqcompressor\n- kronecker\n---\n\n\
         # {name}, compressed\n\n\
         A checkpoint of type `{model_type}` of which {count} matrices were replaced by sums of Kronecker products, with permuted rows and \
         columns where that loses less, or by low-rank ones: {before} parameters became {after} ({share:.1} %). Made from `{name}` by \
         tqcompressor {version}, effort `{effort}`, seed {seed}{dtype}.\n\n\
         ## Loading\n\n\
         ```sh\npip install \"tqcompressor[hf]\"\n```\n\n\
         ```python\nimport tqcompressor  # teaches transformers this format\n\
         from transformers import {class}\n\n\
         model = {class}.from_pretrained(\"path/to/this/directory\")\n```\n\n\
         Without `import tqcompressor`, transformers refuses to load it.\n\n{note}\
         ## What was done\n\n\
         A matrix `W` (in × out) with a *block* became `W[p][:, q] ≈ Σ A_k ⊗ B_k`, every `B_k` of the block's shape. Lost \
         energy is `‖W − Ŵ‖² / ‖W‖²`{norm}.{texts} Everything else is unchanged.\n\n\
         | matrix | shape | became | parameters | lost energy |\n\
         |---|---|---|---|---|\n",
        model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("unknown"),
        count = report.matrices.len(),
        note = report.note.map_or(String::new(), |note| format!("> {note}\n\n")),
        norm = if report.calibrated { ", in the norm of the calibration" } else { "" },
        texts = report.calibration.as_ref().map_or(String::new(), read_texts),
        before = grouped(*before),
        after = grouped(*after),
        share = 100.0 * *after as f64 / (*before).max(1) as f64,
    );
    for matrix in &report.matrices {
        let (m, n) = matrix.shape;
        let lost = matrix.lost_energy.map_or(String::new(), |lost| format!("{lost:.4}"));
        let (before, after) = (grouped(matrix.parameters_before), grouped(matrix.parameters_after));
        // Writing to a string cannot fail.
        let _ = writeln!(card, "| `{}` | {m} × {n} | {} | {before} → {after} | {lost} |", matrix.name, matrix.spec);
    }
    card
}

/// What a calibration was measured on, as a sentence.
fn read_texts(calibration: &CalibrationRecord) -> String {
    let texts: Vec<_> =
        calibration.texts.iter().map(|(name, tokens)| format!("{} of `{name}`", grouped(*tokens as usize))).collect();
    let texts = if texts.is_empty() { String::new() } else { format!(": {}", texts.join(", ")) };
    let gradients = if calibration.sensitivity { " and gradients" } else { "" };
    format!(" Inputs{gradients} were measured on {} tokens{texts}.", grouped(calibration.tokens as usize))
}

/// The class that loads a model of this architecture.
fn auto_class(architecture: &str) -> &str {
    const CLASSES: [(&str, &str); 11] = [
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
        ("ForPreTraining", "AutoModelForPreTraining"),
        ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForTokenClassification", "AutoModelForTokenClassification"),
        ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("ForMultipleChoice", "AutoModelForMultipleChoice"),
        ("ForImageClassification", "AutoModelForImageClassification"),
        // No automatic class loads it.
        ("DoubleHeadsModel", ""),
    ];
    match CLASSES.iter().find(|(ending, _)| architecture.ends_with(ending)) {
        Some((_, "")) => architecture,
        Some((_, class)) => class,
        None => "AutoModel",
    }
}

/// The source's name in a report and a card: its hub id if it is in the hub's cache, otherwise that of its folder. A
/// path would tell the readers of a published model of its maker's machine.
#[must_use]
pub fn source_name(source: &Path) -> String {
    let absolute = std::path::absolute(source).unwrap_or_else(|_| source.to_owned());
    hub_id(&absolute).unwrap_or_else(|| {
        absolute.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
    })
}

/// The hub id of a model in huggingface_hub's cache: `models--ORG--NAME/snapshots/REVISION`.
fn hub_id(source: &Path) -> Option<String> {
    let snapshots = source.parent()?;
    let id = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
    (snapshots.file_name()? == "snapshots").then(|| id.replace("--", "/"))
}

/// The licence declared in the source's card.
fn license(source: &Path) -> Option<String> {
    let card = std::fs::read_to_string(source.join("README.md")).ok()?;
    let front = card.strip_prefix("---\n")?.split("\n---").next()?;
    let license = front.lines().find_map(|line| line.strip_prefix("license:"))?.trim();
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-._+".contains(letter);
    (!license.is_empty() && license.chars().all(plain)).then(|| license.to_owned())
}

/// 1234567 → "1,234,567".
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let grouped: Vec<_> = [0, 12, 999, 1000, 81_336_388].map(grouped).into();
        assert_eq!(grouped, ["0", "12", "999", "1,000", "81,336,388"]);
    }

    #[test]
    fn a_hub_cache_path_gives_the_hubs_name() {
        let path = Path::new("/cache/hub/models--openai-community--gpt2/snapshots/607a30d");
        assert_eq!(hub_id(path).unwrap(), "openai-community/gpt2");
        assert_eq!(hub_id(Path::new("/models--a--b/other/c")), None);
        assert_eq!(hub_id(Path::new("gpt2")), None);
    }

    #[test]
    fn every_architecture_has_the_class_that_loads_it() {
        for (architecture, class) in [
            ("GPT2LMHeadModel", "AutoModelForCausalLM"),
            ("LlamaForCausalLM", "AutoModelForCausalLM"),
            ("BertForMaskedLM", "AutoModelForMaskedLM"),
            ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
            ("GPT2DoubleHeadsModel", "GPT2DoubleHeadsModel"),
            ("BertModel", "AutoModel"),
            ("", "AutoModel"),
        ] {
            assert_eq!(auto_class(architecture), class);
        }
    }

    #[test]
    fn the_licence_is_taken_from_the_front_matter_only() {
        let directory = tempfile::tempdir().unwrap();
        let card = directory.path().join("README.md");
        for (text, expected) in [
            ("---\nlanguage: en\nlicense: mit\n---\ntext", Some("mit")),
            ("---\nlanguage: en\n---\nlicense: mit\n", None),
            ("license: mit\n", None),
            ("---\nlicense: [a, b]\n---\n", None),
        ] {
            std::fs::write(&card, text).unwrap();
            assert_eq!(license(directory.path()).as_deref(), expected);
        }
    }
}
