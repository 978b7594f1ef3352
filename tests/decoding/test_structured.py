"""Answers of a given shape: every one has it, whatever the models would rather say."""

import json
import re

import jsonschema
import pytest
import tiny
import torch
from conftest import family_of

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.decoding.structured import Grammars, shaped
from dlf_ray.params import StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
COUNTING = 'start: item ("," item)*\nitem: /[a-c]{2}/\n'
GBNF = 'root ::= "yes" | "no" ws "thanks"\nws ::= " "+\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def engine(folder):
    with LocalEngine(family_of(folder, max_num_seqs=32)) as made:
        yield made


def answers(engine, wanted, count, **how):
    sampling = [
        SamplingParams(
            max_tokens=200,
            temperature=1.0,
            seed=seed,
            structured_outputs=StructuredOutputs(**wanted),
            **how,
        )
        for seed in range(count)
    ]
    return engine.generate([[5 + seed % 200, 9] for seed in range(count)], sampling)


def test_200_answers_of_a_schema_are_200_valid_ones(engine):
    outputs = answers(engine, {"json": SCHEMA}, 200)
    assert {output.finish_reason for output in outputs} == {"stop"}
    for output in outputs:
        jsonschema.validate(json.loads(output.text), SCHEMA)
    assert len({output.text for output in outputs}) > 150


@pytest.mark.parametrize(
    ("wanted", "right"),
    [
        ({"json": '{"type": "array", "items": {"const": 1}, "minItems": 2}'}, json.loads),
        ({"regex": "[A-Z]{3}-[0-9]{2,4}"}, re.compile("[A-Z]{3}-[0-9]{2,4}").fullmatch),
        (
            {"choice": ("yes", "no", 'per"haps', "naïve é")},
            {"yes", "no", 'per"haps', "naïve é"}.__contains__,
        ),
        ({"grammar": COUNTING}, re.compile(r"[a-c]{2}(,[a-c]{2})*").fullmatch),
        ({"grammar": GBNF}, re.compile(r"yes|no +thanks").fullmatch),
    ],
    ids=["json", "regex", "choice", "lark", "gbnf"],
)
def test_every_kind_is_held_to(engine, wanted, right):
    for output in answers(engine, wanted, 20):
        assert output.finish_reason == "stop"
        assert right(output.text), output.text


def test_any_object(engine):
    ended = [o for o in answers(engine, {"json_object": True}, 20) if o.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(output.text), dict) for output in ended)


@pytest.mark.parametrize(
    "how",
    [
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.3},
        {"repetition_penalty": 2.0},
        {"logit_bias": {0: 100.0, 60: -100.0}},
        {"min_tokens": 8},
        {"stop": ("9",)},
    ],
    ids=str,
)
def test_beside_everything_else_that_changes_logits(engine, how):
    for output in answers(engine, {"regex": r"[0-8]{4}[a-z]{4}"}, 8, **how):
        assert re.fullmatch(r"[0-8]{4}[a-z]{4}", output.text)
        assert output.finish_reason == "stop"


def test_logprobs_are_of_the_distribution_before(engine):
    """As with temperature and penalties."""
    wanted = StructuredOutputs(choice=("b",))
    sampling = SamplingParams(max_tokens=4, structured_outputs=wanted, logprobs=0)
    (output,) = engine.generate([5, 6], sampling)
    (score,) = engine.score([5, 6], [output.token_ids[:1]])
    assert output.logprobs[0] == pytest.approx(score.logprobs[0], abs=1e-4)


def test_others_in_the_batch_answer_as_if_alone(engine):
    plain = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    shape = SamplingParams(max_tokens=50, structured_outputs=StructuredOutputs(json=SCHEMA))
    (alone,) = engine.generate([5, 6], plain)
    together = engine.generate([[7], [5, 6], [8]], [shape, plain, shape])
    assert together[1].token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"json": "{"}, "cannot be read"),
        ({"json": {"type": "objekt"}}, "objekt"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"$ref": "http://example.org/x.json"}}, "example.org"),
        ({"regex": "(a"}, "cannot be followed"),
        ({"regex": r"(?=a)b"}, "look-around"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": 'root ::= "a'}, "cannot be"),
        ({"json": {"not": {}}}, "cannot be followed"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused_at_once(engine, wanted, words):
    sampling = SamplingParams(structured_outputs=StructuredOutputs(**wanted))
    with pytest.raises(ValueError, match="structured_outputs") as caught:
        engine.generate([5, 6], sampling)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "wanted",
    [{}, {"json": {}, "regex": "a"}, {"choice": ()}, {"json_object": False}],
    ids=str,
)
def test_exactly_one_shape(wanted):
    with pytest.raises(ValueError, match="exactly one of json, json_object, regex"):
        StructuredOutputs(**wanted)


def test_the_end_is_part_of_the_shape():
    with pytest.raises(ValueError, match="`ignore_eos`"):
        SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputs(regex="a"))


def test_a_shape_bars_what_leads_out_of_it(tokenizer):
    shape = Grammars(tokenizer, [0]).shape(StructuredOutputs(regex="ab?"))
    logits = torch.zeros(2, 320)  # padded beyond the vocabulary
    shape.prepare()
    got = shaped(logits, [None, shape])
    assert torch.isfinite(got[0]).all()
    first = got[1].isfinite().nonzero()[:, 0].tolist()
    assert {tokenizer.decode([token]) for token in first} <= {"a", "ab"}
    assert not logits.isinf().any()
    shape.push(tokenizer.convert_tokens_to_ids("a"))
    assert not shape.complete
    shape.prepare()
    after = shaped(logits, [None, shape])[1].isfinite().nonzero()[:, 0].tolist()
    assert set(after) == {0, tokenizer.convert_tokens_to_ids("b")}
    shape.push(tokenizer.convert_tokens_to_ids("b"))
    assert shape.complete


def test_a_tokenizer_that_cannot_be_followed_is_told_of_when_asked():
    grammars = Grammars(object(), [0])
    with pytest.raises(ValueError, match="do not know this tokenizer: it is not of the tokenizers"):
        grammars.shape(StructuredOutputs(regex="a"))


def test_a_grammar_is_read_once(tokenizer, monkeypatch):
    made = []
    grammars = Grammars(tokenizer, [0])
    start = grammars._start
    monkeypatch.setattr(Grammars, "_start", lambda self, text: made.append(text) or start(text))
    grammars = Grammars(tokenizer, [0])
    shapes = [grammars.shape(StructuredOutputs(regex="[ab]c")) for _ in range(3)]
    assert len(made) == 1
    shapes[0].push(tokenizer.convert_tokens_to_ids("a"))
    shapes[1].prepare()  # it has not moved
    allowed = shaped(torch.zeros(1, 300), [shapes[1]])[0].isfinite().nonzero()[:, 0].tolist()
    assert {tokenizer.decode([token])[0] for token in allowed} == {"a", "b"}


def test_blank_lines_end(tokenizer):
    """A line break and what indents the next line, but no other line break after it."""
    shape = Grammars(tokenizer, [0]).shape(StructuredOutputs(json=SCHEMA))
    ids = {text: tokenizer.encode(text)[0] for text in ("{", "\n", " ", '"')}
    for text in ("{", "\n", " ", " "):
        shape.push(ids[text])
    shape.prepare()
    allowed = shaped(torch.zeros(1, 300), [shape])[0].isfinite()
    assert allowed[ids[" "]]
    assert allowed[ids['"']]
    assert not allowed[ids["\n"]]
