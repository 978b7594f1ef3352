"""Likelihoods of the large model alone, against lm-evaluation-harness on the same checkpoint."""

import os
import shutil

import numpy as np
import pytest
from conftest import family_of
from transformers import AutoModelForCausalLM

from dlf_ray import LocalEngine
from dlf_ray.tasks import get_task

lm_eval = pytest.importorskip("lm_eval")


def both(folder, pairs):
    """(sum of log-probabilities, greedy) of each pair, theirs and ours."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder / "large"), device="cpu", batch_size=4, max_length=256)
    requests = [
        Instance("loglikelihood", {}, pair, number, ("task", number, 1))
        for number, pair in enumerate(pairs)
    ]
    with LocalEngine(family_of(folder)) as engine:
        prompts, rests = zip(*pairs, strict=True)
        outputs = engine.score(prompts, rests, experts=[])
        # Rows that pad the vocabulary are no tokens: the harness counts them, the family does not.
        assert engine.limits.vocab == 300
    ours = [(sum(output.logprobs), all(output.greedy)) for output in outputs]
    return theirs.loglikelihood(requests, disable_tqdm=True), ours


def test_likelihoods_are_the_harnesss(tiny_pairs, unpadded):
    theirs, ours = both(unpadded, tiny_pairs)
    np.testing.assert_allclose([o[0] for o in ours], [t[0] for t in theirs], atol=1e-3)
    assert [o[1] for o in ours] == [t[1] for t in theirs]


@pytest.fixture(scope="module")
def unpadded(folder, tmp_path_factory):
    """The family with a large model of as many logits as tokens."""
    root = tmp_path_factory.mktemp("unpadded") / "family"
    shutil.copytree(folder, root)
    model = AutoModelForCausalLM.from_pretrained(root / "large")
    model.resize_token_embeddings(300)
    model.save_pretrained(root / "large")
    return root


@pytest.fixture(params=["invented", "mmlu", "arc_easy"])
def tiny_pairs(request):
    if request.param == "invented":
        prompts = ["Question: what is 12 times 7? Answer:", "The moon is made of", "A train "]
        return [
            (prompt, rest) for prompt in prompts for rest in (" 84", " rock.", "leaves at noon")
        ]
    if "DLF_EVAL_DATA" not in os.environ:
        pytest.skip("DLF_EVAL_DATA names no folder of published evaluation data")
    items = get_task(request.param).load(os.environ["DLF_EVAL_DATA"], limit=60).items
    pairs = [(item.full_prompt, choice) for item in items for choice in item.choices]
    return [pair for pair in pairs if len("".join(pair)) < 300][:60]
