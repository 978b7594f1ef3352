"""A real chat model: answers through the endpoint are those of transformers' own `generate`,
likelihoods those of lm-evaluation-harness's own backend, and shapes are kept to."""

import json
import os

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlf_ray import Family, LocalEngine, SamplingParams
from dlf_ray.evaluation.tasks import get_task
from dlf_ray.params import StructuredOutputs

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Add 17 and 25.",
    "Name three colours.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Grüße! Antworte auf Deutsch: Wie heißt du?",
    "Reply with one emoji.",
)
SCENES = {
    "A man is sitting on a roof. He": (
        " is using wrap to wrap a pair of skis.",
        " is ripping level tiles off.",
        " is holding a rubik's cube.",
        " starts pulling up roofing on a roof.",
    ),
    "A lady walks to a barbell. She bends down and grabs the pole. The lady": (
        " swings and lands in her arms.",
        " pulls the barbell forward.",
        " stands and lifts the weight over her head.",
    ),
    "Two women are shown in a canoe while a man pulls it through the water. The child": (
        " is then shown paddling down a river in a boat.",
        " sits in the canoe while the man paddles.",
    ),
}
"""A context and its endings, as in HellaSwag."""
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "coastal": {"type": "boolean"},
    },
    "required": ["city", "population", "coastal"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def file(smollm2, tmp_path_factory):
    """A family whose expert has learned nothing: fusion leaves the large model's answers."""
    model = {"model": str(smollm2), "num_cpus": 0.1}
    family = {
        "large": model,
        "base": model,
        "experts": {"same": model},
        "engine": {"max_num_seqs": 8, "max_model_len": 512, "num_cpus": 0.1},
    }
    path = tmp_path_factory.mktemp("smollm2") / "family.yaml"
    path.write_text(yaml.safe_dump(family))
    return path


@pytest.fixture(scope="module")
def expected(smollm2):
    """What transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            (ids,) = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        answer = ids[prompt["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(answer, skip_special_tokens=True))
    return answers


@pytest.fixture(scope="module")
def client(root, file):
    openai = pytest.importorskip("openai")
    from ray import serve

    from dlf_ray.serving.app import Settings, build_app

    families = {"fused": {"family": str(file)}}
    settings = Settings.model_validate({"families": families})
    serve.run(build_app(settings), name="smollm2", route_prefix="/")
    with openai.OpenAI(base_url=f"{root}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.slow
def test_chat_answers_are_transformers_own(client, expected):
    for number, (question, answer) in enumerate(zip(QUESTIONS, expected, strict=True)):
        messages = [{"role": "user", "content": question}]
        how = {"model": "fused", "messages": messages, "temperature": 0, "max_tokens": 24}
        if number % 2:
            with client.chat.completions.create(**how, stream=True) as stream:
                said = "".join(each.choices[0].delta.content or "" for each in stream)
        else:
            said = client.chat.completions.create(**how).choices[0].message.content
        assert said == answer


@pytest.fixture(scope="module")
def pairs():
    found = [(context, ending) for context, endings in SCENES.items() for ending in endings]
    if "DLF_EVAL_DATA" in os.environ:
        items = get_task("arc_easy").load(os.environ["DLF_EVAL_DATA"], limit=8).items
        found += [(item.full_prompt, choice) for item in items for choice in item.choices]
    return found


@pytest.fixture(scope="module")
def engine(file):
    with LocalEngine(Family.from_yaml(file), models=["large"]) as made:
        yield made


def test_likelihoods_are_the_harnesss(smollm2, engine, pairs):
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(smollm2), device="cpu", batch_size=4, dtype="float32")
    asked = [instance("loglikelihood", {}, pair, n, ("x", n, 1)) for n, pair in enumerate(pairs)]
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    outputs = engine.score(*zip(*pairs, strict=True), experts=[])
    sums = [sum(output.logprobs) for output in outputs]
    np.testing.assert_allclose(sums, [each[0] for each in expected], atol=1e-3)
    assert [all(output.greedy) for output in outputs] == [each[1] for each in expected]


def test_answers_of_a_schema(engine):
    wanted = StructuredOutputs(json=SCHEMA)
    prompt = "<|im_start|>user\nDescribe a city as JSON.<|im_end|>\n<|im_start|>assistant\n"
    sampling = [
        SamplingParams(max_tokens=100, temperature=1.0, seed=seed, structured_outputs=wanted)
        for seed in range(12)
    ]
    for output in engine.generate([prompt] * 12, sampling, experts=[]):
        jsonschema.validate(json.loads(output.text), SCHEMA)
        assert output.finish_reason == "stop"
