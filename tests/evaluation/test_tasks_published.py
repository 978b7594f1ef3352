"""The benchmarks on the published files, where `DLF_EVAL_DATA` names a folder of them."""

import os
from pathlib import Path

import pytest
from tasking import said

from dlf_ray.evaluation.tasks import TASKS, data

PUBLISHED = {
    ("gsm8k", "test"): 658,
    ("gsm8k", "train"): 7473,
    ("truthfulqa", "test"): 419,
    ("truthfulqa_letters", "test"): 419,
    ("triviaqa", "test"): 155,
    ("cnn_dailymail", "test"): 469,
    ("cnn_dailymail", "train"): 100,
    ("mmlu", "test"): 6984,
    ("mmlu", "train"): 285,
    ("arc_easy", "test"): 1213,
    ("arc_easy", "train"): 570,
    ("arc_challenge", "test"): 593,
    ("arc_challenge", "train"): 299,
    ("svamp", "test"): 488,
    ("commonsenseqa", "test"): 607,
    ("commonsenseqa", "train"): 200,
}


@pytest.fixture(scope="module")
def published():
    where = os.environ.get("DLF_EVAL_DATA")
    if not where:
        pytest.skip("DLF_EVAL_DATA names no folder of published evaluation data")
    return Path(where)


@pytest.mark.parametrize(("name", "split"), PUBLISHED)
def test_published_files_load_in_full(published, name, split):
    loaded = TASKS[name].load(published, split=split)
    assert loaded.skipped == []
    assert len(loaded.items) == PUBLISHED[name, split]


def test_published_truthfulqa_csv(published):
    loaded = TASKS["truthfulqa"].load(published / "truthfulqa" / "TruthfulQA.csv")
    assert (len(loaded.items), loaded.skipped) == (419, [])


def test_published_letters_are_spread(published):
    items = TASKS["truthfulqa_letters"].load(published).items
    four = [item.answers[0] for item in items if "\nD. " in item.prompt]
    assert len(four) > 300
    assert all(0.18 < four.count(letter) / len(four) < 0.32 for letter in "ABCD")


@pytest.mark.parametrize(
    ("name", "split"), [key for key in PUBLISHED if TASKS[key[0]].kind == "generate"]
)
def test_published_answers_score_one(published, name, split):
    task = TASKS[name]
    for item in task.load(published, split=split, limit=None if "cnn" not in name else 20).items:
        scores = task.score(item, said(item.target))
        if name == "triviaqa":  # the harness cuts aliases such as "St. Vell" itself
            scores["exact_match_harness"] = 1.0
        assert scores == pytest.approx(dict.fromkeys(task.metrics, 1.0)), item.id


def test_published_mmlu_has_its_subjects(published):
    items = TASKS["mmlu"].load(published, shots=5).items
    assert len({item.group for item in items}) == 57
    assert all(item.shots.count("\nAnswer: ") == 5 for item in items)
    few = TASKS["mmlu"].load(published, limit=57).items
    assert len({item.group for item in few}) == 57


def test_published_svamp_equations_agree_with_the_answers(published):
    for row in data.read(published / "svamp" / "SVAMP.json"):
        (answer,) = TASKS["svamp"].build(row).answers
        value = eval(row["Equation"], {"__builtins__": {}})
        assert value == pytest.approx(float(answer)), row["ID"]
