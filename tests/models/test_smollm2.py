"""A real chat model, from a GGUF file: transformers' own answers, whichever way they are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from smollm2 import gguf_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllms import needs_vllm

from dlf_ray import Family, SamplingParams
from dlf_ray.config import ModelSpec
from dlf_ray.engine.local import LocalEngine
from dlf_ray.models.loading import load_model, load_tokenizer

NEW = 24
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Is the moon made of cheese? Answer yes or no.",
    "Give me three names for a cat.",
    "What does a baker do?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Say hello to my friend Ada.",
)


def chat(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [chat(tokenizer, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(smollm2, prompts):
    """What transformers' own greedy decoding answers, the end token included."""
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()

    def answer(prompt):
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
        )
        return made[0, len(prompt) :].tolist()

    answers = [answer(prompt) for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) == len(QUESTIONS)
    return answers


def test_the_file_gives_the_logits_of_transformers(smollm2, prompts):
    """And the folder that was made of it those of the file."""
    file = gguf_file()
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    ids = torch.tensor([prompts[0]])
    with torch.inference_mode():
        expected = theirs(ids).logits
        for path in (file, smollm2):
            ours = load_model(ModelSpec(model=str(path)))
            assert ours.dtype == torch.float32
            assert torch.equal(ours(ids).logits, expected)
    assert chat(load_tokenizer(ModelSpec(model=str(file))), QUESTIONS[0]) == prompts[0]


def family(model: Path, **engine):
    spec = {"model": str(model), "dtype": "float32"}
    settings = {"max_num_seqs": 8, "max_model_len": 256, **engine}
    return Family.from_dict(
        {"large": spec, "base": spec, "experts": {"same": spec}, "engine": settings}
    )


def texts(outputs):
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.token_ids for output in outputs]


def test_greedy_answers_are_those_of_generate(smollm2, prompts, expected):
    """Fused with an expert that is the base, which moves nothing; and the expert by itself."""
    sampling = SamplingParams(max_tokens=NEW)
    with LocalEngine(family(smollm2)) as engine:
        assert texts(engine.generate(prompts, sampling)) == expected
        assert texts(engine.generate(prompts, sampling, alone="same")) == expected


def test_greedy_answers_of_the_file(prompts, expected):
    with LocalEngine(family(gguf_file()), models=["large"]) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=NEW), alone="large")
        assert texts(outputs) == expected


@needs_vllm
def test_greedy_answers_under_vllm(engine_of, smollm2, prompts, expected):
    engine = engine_of(family(smollm2, backend="vllm", num_cpus=0.1), models=["large"])
    outputs = engine.generate(prompts, SamplingParams(max_tokens=NEW), alone="large")
    assert texts(outputs) == expected
