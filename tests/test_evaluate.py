"""Scores, intervals, methods and data files of an evaluation."""

import json

import pytest
from conftest import EXPERTS, family_of

from dlf_ray import LocalEngine, Output, SamplingParams
from dlf_ray.evaluate import Item, Score, evaluate, exact_match, method_options, read_items


def test_exact_match_is_strict():
    item = Item("question:", " the sum is 4.")
    assert exact_match(Output(text=" the sum is 4.\n", finish_reason="stop"), item)
    assert not exact_match(Output(text="the sum is 4. so", finish_reason="stop"), item)
    assert not exact_match(Output(text="The sum is 4.", finish_reason="stop"), item)
    # Right so far, but it did not end by itself.
    assert not exact_match(Output(text="the sum is 4.", finish_reason="length"), item)


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    [(0, 10, 0.0, 27.8), (10, 10, 72.2, 100.0), (5, 10, 23.7, 76.3), (150, 300, 44.4, 55.6)],
)
def test_the_interval_is_wilsons(right, items, low, high):
    """Against values of R's `prop.test(right, items, correct=FALSE)`."""
    assert Score(right, items).interval == pytest.approx((low, high), abs=0.06)


def test_methods_stand_for_what_they_say(folder):
    family = family_of(folder)
    assert method_options("large", family) == {"experts": []}
    assert method_options("base", family) == {"alone": "base"}
    assert method_options("expert:facts", family) == {"alone": "facts"}
    weights = dict.fromkeys(EXPERTS, 0.5)
    experts = list(EXPERTS)
    static = {"rule": "static", "experts": experts, "weights": weights}
    assert method_options("static:0.5", family) == static
    assert method_options("dynamic", family, ["math"]) == {"rule": "grid", "experts": ["math"]}
    blend = {"rule": "grid", "select": "blend", "experts": experts}
    assert method_options("dynamic:blend", family) == blend


@pytest.mark.parametrize("method", ["huge", "expert:", "expert:chess", "dynamic:x", "static:x", ""])
def test_an_unknown_method_lists_the_known_ones(folder, method):
    with pytest.raises(ValueError, match=r"expert:NAME.*facts|not a number"):
        method_options(method, family_of(folder))


def test_scores_are_those_of_the_outputs(folder):
    """Items whose answers are what the model says, and one that it does not say."""
    with LocalEngine(family_of(folder)) as engine:
        sampling = SamplingParams(max_tokens=8)
        words = [f"question {i}:" for i in range(12)]
        outputs = engine.generate(words, sampling)
        items = [Item(w, o.text) for w, o in zip(words, outputs, strict=True)]
        expected = sum(output.finish_reason == "stop" for output in outputs)
        score = evaluate(engine, items, {}, max_tokens=8)
        assert (score.right, score.items) == (expected, 12)
        assert score.tokens == sum(len(output.token_ids) for output in outputs)
        wrong = [Item(item.prompt, item.answer + "?") for item in items]
        assert evaluate(engine, wrong, {}, max_tokens=8).right == 0


def test_data_files(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "answer": "b", "more": 1}\n\n{"prompt": "c", "answer": "d"}\n')
    assert read_items(file) == [Item("a", "b"), Item("c", "d")]
    assert read_items(file, 1) == [Item("a", "b")]
    for line in ("{", json.dumps({"prompt": "a"}), json.dumps({"prompt": "a", "answer": 4}), "[]"):
        file.write_text('{"prompt": "a", "answer": "b"}\n' + line)
        with pytest.raises(ValueError, match="line 2"):
            read_items(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="no items"):
        read_items(file)
