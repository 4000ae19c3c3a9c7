"""A compressed checkpoint in EleutherAI's lm-eval, without network."""

from helpers.processes import run_script


def test_lm_eval_scores_a_compressed_checkpoint(tmp_path):
    from helpers.models import CONFIG, tiny_model
    from helpers.tokenizer import save_tokenizer
    from tqcompressor.compression.model import compress

    model = tiny_model()
    compress(model, CONFIG)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    run_script(
        """
import sys, torch, tqcompressor
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

lm = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=2)
assert type(lm.model.lm_head).__name__ == "KroneckerHead"
pairs = [("the cat", " sat"), ("a much longer context", "!"), ("one", " two three")]
requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
for (context, continuation), (score, greedy) in zip(pairs, lm.loglikelihood(requests, disable_tqdm=True)):
    prefix, whole = (lm.tokenizer(text, return_tensors="pt").input_ids for text in (context, context + continuation))
    with torch.no_grad():
        chances = lm.model(whole).logits.log_softmax(-1)[0, prefix.shape[1] - 1 : -1]
    targets = whole[0, prefix.shape[1] :]
    expected = chances.gather(1, targets[:, None]).sum().item()
    assert abs(score - expected) < 1e-3 * abs(expected), (score, expected)
    assert greedy == torch.equal(chances.argmax(-1), targets)

((score,),) = [lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("the cat sat",), 0)])]
assert score < 0
""",
        tmp_path,
        warm="transformers",
    )
