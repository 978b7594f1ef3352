"""Families whose tokenizers agree on nearly all ids: renamed, added and removed tokens.

They are fused on what all mean alike, and the large model speaks alone elsewhere.
"""

import logging
import shutil
from typing import ClassVar

import msgspec
import pytest
import reference
import tiny
import torch
from conftest import dlf, family_of
from oracle import Oracle
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.evaluation.answering import answers
from dlf_ray.evaluation.dialogue import Asking
from dlf_ray.evaluation.tasks import own_task

WORDS = 297
OWN = {
    "large": ("<a>", "<b>", "<c>"),
    "base": ("<a>", "<b>", "<c>", "<d>"),
    "renamed": ("<x>", "<b>", "<c>"),
    "fewer": ("<a>", "<b>"),
}
"""The tokens of each model after the words."""
EXPERTS = ("renamed", "fewer")


def tokenizer(folder, added, words=WORDS):
    fast = tiny.tokenizer(folder, words)
    fast.add_tokens(list(added), special_tokens=True)
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("nearly")
    for seed, (name, added) in enumerate(OWN.items()):
        tiny.model(root / name, hidden=48 if name == "large" else 32, seed=seed)
        size = WORDS + len(added)
        tiny.model(root / name, vocab=size, seed=seed, hidden=48 if name == "large" else 32)
        tokenizer(root / name, added)
    return root


@pytest.fixture(scope="module")
def engine(folder):
    with LocalEngine(family_of(folder, EXPERTS)) as made:
        yield made


class Nearly(Oracle):
    """The method on the ids that all models share, in the large model's whole vocabulary."""

    known: ClassVar = {"base": 301, "fewer": 299}
    """How many tokens a model knows, where these are not the large one's 300."""
    apart: ClassVar = {"renamed": {297}, "fewer": {299}}
    """The ids that mean something else, or nothing, in a model."""

    def check_shared(self, prompt, output, experts):
        assert output.error is None
        shared = torch.ones(300, dtype=torch.bool)
        shared[[id for name in experts for id in self.apart.get(name, ())]] = False
        every = []
        for name in ("large", "base", *experts):
            most = self.known.get(name, 300)
            # the end of texts stands for what is unknown, as there is no token for that
            tokens = [[id if id < most else 0 for id in ids] for ids in (prompt, output.token_ids)]
            logits = self.logits(name, *tokens)[:, :300]
            every.append(torch.nn.functional.pad(logits, (0, 300 - logits.shape[-1])))
        for at, token in enumerate(output.token_ids):
            large, base, *rest = (each[at].double() for each in every)
            answer = reference.fuse(large[shared], base[shared], [each[shared] for each in rest])
            weights = [output.weights[at][name] for name in experts]
            assert weights == pytest.approx(answer.weights, abs=1e-3)
            expected = large.log_softmax(-1)
            expected[shared] = answer.logprobs + expected[shared].logsumexp(-1)
            assert expected.max() - expected[token] < 1e-3
            assert output.logprobs[at] == pytest.approx(float(expected[token]), abs=1e-3)
            assert expected.exp().sum() == pytest.approx(1)


@pytest.mark.parametrize("experts", [EXPERTS, ("renamed",), ("fewer",)], ids=" ".join)
def test_they_are_fused_on_what_they_share(engine, folder, experts):
    oracle = Nearly(folder)
    prompts = [[5, 297, 8], [298, 299, 60, 61], list(range(40, 60))]
    sampling = SamplingParams(max_tokens=12, logprobs=0, ignore_eos=True)
    for prompt, output in zip(
        prompts, engine.generate(prompts, sampling, experts=experts), strict=True
    ):
        oracle.check_shared(prompt, output, experts)


def test_models_may_have_fewer_logits_than_tokens(folder, tmp_path, caplog):
    """Some checkpoints leave out rows for tokens that the tokenizer has added since."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "renamed")
    model.resize_token_embeddings(290)
    model.save_pretrained(tmp_path / "renamed")
    tokenizer(tmp_path / "renamed", OWN["large"])  # the same tokens as the large model
    oracle = Nearly(tmp_path)
    oracle.known = {**oracle.known, "renamed": 290}
    oracle.apart = {"renamed": range(290, 300)}
    with LocalEngine(family_of(tmp_path, ("renamed",))) as engine:
        (output,) = engine.generate([5, 294, 6], SamplingParams(max_tokens=9, logprobs=0))
    oracle.check_shared([5, 294, 6], output, ("renamed",))
    assert any("has logits for the first 290 of 300 ids" in each for each in caplog.messages)


def test_the_large_model_speaks_alone_elsewhere(engine):
    """Lifted by a bias, its own token comes with the probability that it gives it."""
    how = {"max_tokens": 1, "logit_bias": {299: 100.0}, "logprobs": 0}
    (fused,) = engine.generate([7, 8, 9], SamplingParams(**how))
    (alone,) = engine.generate([7, 8, 9], SamplingParams(**how), experts=[])
    assert fused.token_ids == alone.token_ids == [299]
    assert fused.text == alone.text
    assert fused.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_model_alone_never_says_what_it_does_not_know(engine):
    sampling = SamplingParams(max_tokens=200, temperature=100.0, seed=0, ignore_eos=True)
    (output,) = engine.generate([5, 6], sampling, alone="fewer")
    assert max(output.token_ids) < 299


def test_the_differences_are_told_at_start(folder, caplog, tmp_path):
    with caplog.at_level(logging.WARNING), LocalEngine(family_of(folder, EXPERTS)):
        pass
    told = "\n".join(caplog.messages)
    assert "1 of 301 ids differ: id 300 is nothing in large" in told
    assert "'<a>' in large" in told
    assert "'<x>' in renamed" in told
    assert "nothing in fewer" in told
    file = tmp_path / "family.yaml"
    file.write_bytes(msgspec.yaml.encode(family_of(folder, EXPERTS)))
    checked = dlf("check", file)
    assert checked.exit_code == 0, checked.output
    assert "the large model speaks alone" in " ".join(checked.output.split())


def test_too_many_differences_are_refused(folder, tmp_path):
    tiny.model(tmp_path / "other", vocab=300, seed=5)
    tokenizer(tmp_path / "other", ("<p>", "<q>", "<r>", "<s>"), words=296)
    family = family_of(folder, ("fewer",))
    experts = {"fewer": family_of(tmp_path, ("other",)).experts["other"]}
    with pytest.raises(ValueError, match=r"do not share a vocabulary: 4 of 300 ids differ: id 296"):
        LocalEngine(msgspec.structs.replace(family, experts=experts))


def test_another_way_to_split_text_is_refused(folder, tmp_path):
    """The same tokens under the same ids, from other rules: digits one by one."""
    tiny.model(tmp_path / "digits", vocab=300, seed=5)
    fast = tokenizer(tmp_path / "digits", OWN["large"])
    before = fast.backend_tokenizer.pre_tokenizer
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(True), before]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=fast.backend_tokenizer, eos_token=tiny.EOS
    ).save_pretrained(tmp_path / "digits")
    family = family_of(folder, ("fewer",))
    experts = {"fewer": family_of(tmp_path, ("digits",)).experts["digits"]}
    with pytest.raises(ValueError, match="split the same text in different ways"):
        LocalEngine(msgspec.structs.replace(family, experts=experts))


def test_a_model_reads_a_conversation_in_tokens_of_its_own(folder, tmp_path):
    """What its template is made of may be beyond the large model's vocabulary, or named anew."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name, mark in {"large": "<a>", "base": "<d>", "renamed": "<x>"}.items():
        (tmp_path / name / "chat_template.jinja").write_text(
            "{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}"
        )
    talk = [{"role": "user", "content": "noon"}]
    with LocalEngine(family_of(tmp_path, EXPERTS)) as engine:
        prompt = engine.render(talk).prompt
        assert {name: ids[0] for name, ids in prompt.items()} == {
            "large": 297,
            "base": 300,
            "renamed": 297,  # <x> in its own vocabulary
            "fewer": 297,
        }
        assert len({tuple(ids[1:]) for ids in prompt.values()}) == 1
        (output,) = engine.chat(talk, SamplingParams(max_tokens=4))
        assert output.error is None
        with pytest.raises(ValueError, match="outside the vocabulary of 300"):
            engine.generate({**prompt, "large": prompt["base"]})
        with pytest.raises(ValueError, match="'fewer' does not have all tokens of its chat"):
            engine.render(talk, chat_template="<c>{{ messages[0].content }}")


def test_items_are_not_put_as_conversations_in_other_tokens(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "large" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    items = tmp_path / "items.csv"
    items.write_text("question,answer\nnoon,four\n")
    task = own_task(items, "{question}")
    with LocalEngine(family_of(tmp_path, EXPERTS)) as engine:
        asked = answers(engine, task, task.load(None).items, {}, asking=Asking(chat=True))
        with pytest.raises(ValueError, match="'base' has tokens of its own"):
            next(asked)
        assert next(answers(engine, task, task.load(None).items, {})).output.error is None
