"""Likelihoods of the large model alone, against lm-evaluation-harness on the same checkpoint: its
own backend, and its client of our endpoint."""

import asyncio
import json
import os
import re
import shutil

import numpy as np
import pytest
import tiny
from conftest import family_of
from processes import ROOT
from transformers import AutoModelForCausalLM

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.evaluation.tasks import get_task
from dlf_ray.serving.openai import CompletionRequest
from dlf_ray.serving.replica import Model, Replica

lm_eval = pytest.importorskip("lm_eval")


def asked(pairs):
    from lm_eval.api.instance import Instance

    return [
        Instance("loglikelihood", {}, pair, number, ("task", number, 1))
        for number, pair in enumerate(pairs)
    ]


def both(folder, pairs):
    """(sum of log-probabilities, greedy) of each pair, theirs and ours."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder / "large"), device="cpu", batch_size=4, max_length=256)
    with LocalEngine(family_of(folder), models=["large"]) as engine:
        prompts, rests = zip(*pairs, strict=True)
        outputs = engine.score(prompts, rests, experts=[])
        # Rows that pad the vocabulary are no tokens: the harness counts them, the family does not.
        assert engine.limits.vocab == 300
    ours = [(sum(output.logprobs), all(output.greedy)) for output in outputs]
    return theirs.loglikelihood(asked(pairs), disable_tqdm=True), ours


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


# ---------------------------------------------------------------- tokenizers with a BOS token

PAIRS = [
    ("Question: what is 12 times 7? Answer:", " 84"),
    ("The moon is made of", " rock."),
    ("A train ", "leaves at noon"),
    ("A train ", "leaves at four"),
    (f"{tiny.BOS}Two and three", " is five"),
    ("", "The moon"),
]


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A family of which only the large model is there; its texts begin with a BOS token."""
    root = tmp_path_factory.mktemp("bos")
    tiny.model(root / "large", hidden=48, layers=3, bos=True, seed=1)
    return root


def test_likelihoods_after_a_bos_token_are_the_harnesss(with_bos):
    theirs, ours = both(with_bos, PAIRS)
    np.testing.assert_allclose([o[0] for o in ours], [t[0] for t in theirs], atol=1e-3)
    assert [o[1] for o in ours] == [t[1] for t in theirs]


class Endpoint(LocalEngine):
    """What a replica needs of an engine, in this process."""

    async def agenerate(self, prompt, sampling=None, **fusion):
        return self.generate([prompt], sampling, **fusion)[0]


@pytest.fixture
def client(with_bos, monkeypatch):
    """The harness's client with the README's arguments; what it posts, the endpoint answers."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    engine = Endpoint(family_of(with_bos), models=["large"])
    replica = Replica(engine, {"large": Model(family="large.yaml", fusion={"experts": []})}, 64)

    class Answer:
        ok = True

        def __init__(self, body):
            request = CompletionRequest.model_validate(body)
            self.body = asyncio.run(first(replica.answer("large", request, "id")))

        def json(self):
            return json.loads(self.body)

        def raise_for_status(self): ...

    async def first(items):
        answer, *_ = [item async for item in items]
        return answer

    posted = []

    def post(url, json, **_):
        posted.append(json)
        return Answer(json)

    monkeypatch.setattr("lm_eval.models.api_models.requests.post", post)
    readme = (ROOT / "README.md").read_text()
    (more,) = re.findall(r"`(tokenizer_backend=huggingface\S+)`", readme)
    more = re.sub(r"tokenizer=[^,]+", f"tokenizer={with_bos / 'large'}", more)
    arguments = f"model=large,base_url=http://127.0.0.1/v1/completions,max_length=256,{more}"
    return LocalCompletionsAPI.create_from_arg_string(arguments), engine, posted


def test_the_harness_scores_over_the_endpoint_what_it_scores_itself(with_bos, client):
    """All but a text that spells its BOS token out: to such a one, its client adds a second."""
    theirs, _, _ = client
    pairs = [pair for pair in PAIRS if not pair[0].startswith(tiny.BOS)]
    found = theirs.loglikelihood(asked(pairs), disable_tqdm=True)
    alone, ours = both(with_bos, pairs)
    np.testing.assert_allclose([f[0] for f in found], [a[0] for a in alone], atol=1e-3)
    np.testing.assert_allclose([f[0] for f in found], [o[0] for o in ours], atol=1e-3)
    assert [f[1] for f in found] == [a[1] for a in alone] == [o[1] for o in ours]


def test_the_harness_generates_over_the_endpoint_what_we_generate(client):
    from lm_eval.api.instance import Instance

    theirs, engine, posted = client
    prompts = ["The moon is made of", "Question: what is 12 times 7? Answer:"]
    how = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0}
    requests = [
        Instance("generate_until", {}, (prompt, dict(how)), number, ("task", number, 1))
        for number, prompt in enumerate(prompts)
    ]
    found = theirs.generate_until(requests, disable_tqdm=True)
    sent = {tuple(each["prompt"][0]) for each in posted}
    assert sent == {tuple(engine.tokenize(prompt)) for prompt in prompts}
    assert all(ids[0] == engine.tokenizer.bos_token_id for ids in sent)
    sampling = SamplingParams(max_tokens=8, stop=("\n",))
    assert found == [o.text for o in engine.generate(prompts, sampling, experts=[])]
