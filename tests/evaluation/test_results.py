"""Results on disk: what a kill leaves, who may write where, and what the summary says."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlf_ray.evaluation import results, statistics
from dlf_ray.evaluation.results import KEY, SCHEMA, Results, read, read_config
from dlf_ray.evaluation.statistics import Estimate, steps, summary

CONFIG = {"tasks": ["sums"], "fusion": {"rule": "grid", "step": 0.1}, "seed": 0}


def row(item, method="dynamic", task="sums", **more):
    return {"task": task, "method": method, "item": str(item), **more}


FULL = row(
    "1",
    task_version="2",
    group="easy",
    shots=5,
    shots_for="large",
    prompt_hash="ab12",
    text="ü 4.",
    pieces=["ü", " 4", "."],
    token_ids=[7, 8, 9],
    scores={"match": 1.0, "edit": 0.25},
    finish_reason="stop",
    error=None,
    expert_names=["math", "facts"],
    weights=[[0.5, 0.0], [0.0, 0.0], [0.0, 1.5]],
    experts=["math", None, "facts"],
    kl=[[0.5, 0.25], [0.0, 0.0], [1.0, 2.0]],
    logprobs=[-1.5, -2.5],
    is_greedy=[True, False],
    choice=0,
    seconds=0.5,
    tokens=3,
    commit="c0ffee",
    family_digest="fa",
    models='{"large": "big"}',
    rule="grid",
    seed=2**40,
    dlf_version="0.1.0",
)


def test_a_row_comes_back_as_it_went_in(tmp_path):
    with Results(tmp_path / "run", CONFIG) as run:
        run.add(FULL)
        run.add(row("0"))
    table = read(tmp_path / "run")
    assert table.schema.equals(SCHEMA)
    empty, full = table.to_pylist()
    # In their order: the main metric stays first.
    assert full == {**FULL, "scores": [("match", 1.0), ("edit", 0.25)]}
    assert {name for name, value in empty.items() if value not in (None, [])} == set(KEY)
    assert read_config(tmp_path / "run") == CONFIG


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"colour": "red"}, "colour.*there are"),
        ({"item": 3}, "needs the strings"),
        ({"task": ""}, "needs the strings"),
        ({"shots": "five"}, "five"),
        ({"text": "\ud83d"}, "surrogates"),
        ({"scores": {"match": float("nan")}}, "score match is nan"),
        ({"pieces": ["a", "b"]}, "'pieces': 2"),
        ({"expert_names": ["math"]}, "a weight for each"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path, wrong, says):
    with Results(tmp_path, CONFIG) as run:
        with pytest.raises(ValueError, match=says):
            run.add({**FULL, **wrong})
        run.add(FULL)
        with pytest.raises(ValueError, match="already has a row"):
            run.add(FULL)
    assert len(read(tmp_path)) == 1


def test_rows_reach_the_disk_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FLUSH_ROWS", 4)
    run = Results(tmp_path, CONFIG)
    for item in range(10):
        run.add(row(item))
    assert len(read(tmp_path)) == 8
    assert len(run.done) == 10
    run.close()
    run.close()
    assert len(read(tmp_path)) == 10
    monkeypatch.setattr(results, "FLUSH_SECONDS", 0.0)
    run.add(row(10))
    assert len(read(tmp_path)) == 11
    assert len(list(tmp_path.glob("part-*.parquet"))) == 4


def test_a_failed_write_loses_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    run = Results(tmp_path, CONFIG)
    run.add(row(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            run.flush()
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    run.close()
    assert len(read(tmp_path)) == 1


# ---------------------------------------------------------------- kills and other writers

# Started in the package's folder: importing the whole package would take seconds each time.
WRITER = """
import sys
import results
results.FLUSH_ROWS = 3
folder, lines = sys.argv[1:]
with results.Results(folder, {"seed": 0}) as run:
    print("open", flush=True)
    for item in range(40):
        for method in ("large", "dynamic"):
            if ("sums", method, str(item)) not in run.done:
                run.add({"task": "sums", "method": method, "item": str(item),
                         "text": f"{method} says {item}", "scores": {"match": item % 2}})
                if lines == "lines":
                    print(item, flush=True)
"""


def start(folder, lines="lines"):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), lines],
        cwd=Path(results.__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_at_any_moment_and_continued_the_run_is_the_undisturbed_one(tmp_path):
    undisturbed = start(tmp_path / "whole")
    rng, kills = random.Random(0), 0
    while True:
        writer = start(tmp_path / "killed")
        for _ in range(rng.randrange(24)):  # lines of progress before the kill
            if not writer.stdout.readline():
                break
        time.sleep(rng.random() * 0.004)
        writer.send_signal(signal.SIGKILL)
        writer.stdout.close()
        if writer.wait() == 0 or kills == 12:
            break
        kills += 1
        for path in (tmp_path / "killed").glob("part-*.parquet"):
            pq.read_table(path)  # whatever has the name of a result is whole
    last = start(tmp_path / "killed")
    last.communicate()
    undisturbed.communicate()
    assert kills >= 4
    assert last.returncode == undisturbed.returncode == 0
    parts = (tmp_path / "killed").glob("part-*.parquet")
    assert sum(len(pq.read_table(path)) for path in parts) == 80  # none missing, none double
    killed, whole = read(tmp_path / "killed"), read(tmp_path / "whole")
    assert killed.equals(whole)
    keys = list(zip(*(killed[name].to_pylist() for name in KEY), strict=True))
    assert keys == sorted(set(keys))


def test_writers_that_race_leave_one_row_each(tmp_path):
    writers = [start(tmp_path / "run", "silent") for _ in range(3)]
    assert [writer.communicate() and writer.returncode for writer in writers] == [0, 0, 0]
    table = read(tmp_path / "run")
    assert len(table) == 80
    assert table["text"].to_pylist()[0] == "dynamic says 0"


def test_of_two_rows_the_first_on_disk_counts(tmp_path):
    one, two = Results(tmp_path, CONFIG), Results(tmp_path, CONFIG)
    one.add(row(1, text="late"))
    one.add(row(3))
    two.add(row(1, text="early"))
    two.add(row(2))
    two.close()
    one.close()
    table = read(tmp_path)
    assert table["item"].to_pylist() == ["1", "2", "3"]
    assert table["text"].to_pylist() == ["early", None, None]
    assert len(Results(tmp_path, CONFIG).done) == 3


# ---------------------------------------------------------------- folders that are refused


def test_another_config_is_refused_with_the_difference(tmp_path):
    Results(tmp_path, CONFIG).close()
    other = {"tasks": ["sums", "articles"], "fusion": {"rule": "exact", "step": 0.1}, "limit": 5}
    with pytest.raises(ValueError, match="other settings") as caught:
        Results(tmp_path, other)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        'fusion.rule: "grid" there, "exact" now',
        'tasks: ["sums"] there, ["sums", "articles"] now',
    ]
    Results(tmp_path, {**CONFIG, "tasks": ("sums",)}).close()  # a tuple is a list in JSON
    assert read_config(tmp_path) == CONFIG


def test_settings_grow_and_never_change(tmp_path):
    """What one run has set holds for all that follow, whatever these do not say."""
    first = {"methods": {"large": {}, "static": {"weights": [1.0]}}}
    second = {"methods": {"dynamic": {"step": 0.1}}, "models": {"base": "tiny"}}
    Results(tmp_path, first).close()
    Results(tmp_path, second).close()
    assert read_config(tmp_path) == {
        "methods": {**first["methods"], **second["methods"]},
        "models": {"base": "tiny"},
    }
    for wrong in (
        {"methods": {"static": {"weights": [0.5]}}},
        {"methods": {"dynamic": {"step": 0.2}}},
        {"models": {"base": {"model": "tiny"}}},
        {"methods": ["large"]},
    ):
        with pytest.raises(ValueError, match="other settings"):
            Results(tmp_path, wrong)
    assert len(list(tmp_path.iterdir())) == 2, "what was refused has left nothing"


def test_of_two_runs_that_begin_together_and_differ_one_is_refused(tmp_path, monkeypatch):
    claimed = results._create

    def late(hidden, path):
        with monkeypatch.context() as patch:
            patch.setattr(results, "_create", claimed)
            Results(tmp_path, {"seed": 1}).close()
        claimed(hidden, path)

    monkeypatch.setattr(results, "_create", late)
    with pytest.raises(ValueError, match="seed: 1 there, 0 now"):
        Results(tmp_path, {"seed": 0})
    assert read_config(tmp_path) == {"seed": 1}


def test_a_config_must_be_json(tmp_path):
    with pytest.raises(ValueError, match="must be JSON"):
        Results(tmp_path, {"folder": tmp_path})


def test_a_folder_without_hard_links_serves_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with Results(tmp_path, CONFIG) as run:
        run.add(row(1))
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        Results(tmp_path, {**CONFIG, "seed": 1})


def test_a_folder_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write results to .*file"):
        Results(tmp_path / "file", CONFIG)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"cannot write results.*Permission denied"):
        Results(tmp_path / "run", CONFIG)


def test_what_cannot_be_read_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        read(tmp_path / "nowhere")
    run = Results(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="holds no results"):
        read(tmp_path)
    run.add(row(1))
    run.close()
    (tmp_path / ".part-0.parquet.1234.tmp").write_bytes(b"PAR1 cut off")
    assert len(read(tmp_path)) == 1
    broken = tmp_path / "part-broken.parquet"
    broken.write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match=r"part-broken\.parquet cannot be read"):
        read(tmp_path)
    pq.write_table(pa.table({"task": ["sums"]}), broken)
    with pytest.raises(ValueError, match="another version"):
        read(tmp_path)
    broken.unlink()
    (settings,) = tmp_path.glob("run-*.json")
    settings.write_text("{")
    with pytest.raises(ValueError, match="cannot read the settings"):
        read_config(tmp_path)
    settings.unlink()
    with pytest.raises(ValueError, match=r"no run-\*\.json"):
        Results(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"no run-\*\.json"):
        read_config(tmp_path)


# ---------------------------------------------------------------- the summary


def table_of(*rows):
    return pa.Table.from_pylist([dict(each) for each in rows], SCHEMA)


def test_the_summary_is_what_a_pencil_says():
    fused = {"expert_names": ["math", "facts"]}
    five = {"shots": 5, "shots_for": "large"}
    dynamic, large, bound = summary(
        table_of(
            row(1, "large", scores={"match": 0}, seconds=1.0, tokens=4, **five),
            row(2, "large", scores={"match": 1}, seconds=1.0, tokens=8, **five),
            row(1, scores={"match": 1}, weights=[[0.5, 0.0], [1.0, 0.0]], **fused),
            row(2, scores={"match": 0}, weights=[[0.0, 1.5]], **fused, shots=0),
            row(3, error="too long", **fused),
            row(4, scores={"match": 1}, **fused),
            row(5, "upper-bound", scores={"match": 1}),
        )
    )
    assert [each.method for each in (dynamic, large, bound)] == ["dynamic", "large", "upper-bound"]
    assert (large.items, large.errors, large.shots) == (2, 0, "5 (large)")
    assert (large.seconds, large.tokens, large.tokens_per_second) == (2.0, 12, 6.0)
    assert large.items_per_second == 1.0
    assert large.weights == {}
    assert large.gap_closed == {"match": 0.5}
    assert (dynamic.items, dynamic.errors, dynamic.scores["match"].items) == (4, 1, 3)
    assert dynamic.shots == "0"
    assert dynamic.scores["match"].mean == pytest.approx(2 / 3)
    assert dynamic.weights == pytest.approx({"math": 0.5, "facts": 0.5})
    assert dynamic.tokens_per_second is dynamic.items_per_second is None
    assert bound.gap_closed == {"match": 1.0}


def test_a_bound_of_nothing_closes_no_gap():
    rows = summary(
        table_of(row(1, scores={"match": 1}), row(1, "upper-bound", scores={"match": 0}))
    )
    assert [each.gap_closed for each in rows] == [{}, {}]


def test_the_interval_is_wilsons_for_right_and_wrong_and_a_bootstrap_for_the_rest():
    half = [row(i, scores={"match": i % 2, "edit": i % 2}) for i in range(10)]
    # One method's values of `edit` are all 0 or 1, but the metric's are not.
    (edits, _) = summary(table_of(*half, row(1, "large", scores={"edit": 0.5})))
    match, edit = edits.scores["match"], edits.scores["edit"]
    assert match.interval == "Wilson"
    assert (match.low, match.high) == pytest.approx((0.237, 0.763), abs=6e-4)
    assert edit.interval == "bootstrap"
    assert edit.low < 0.3 < edit.mean == 0.5 < 0.7 < edit.high


def test_the_bootstrap_covers_what_the_normal_interval_does_and_never_changes():
    values = np.random.default_rng(1).gamma(2.0, size=400)
    one = statistics.bootstrap([values])
    assert one == statistics.bootstrap([values])
    half = 1.96 * values.std() / 20
    assert (one.mean - one.low, one.high - one.mean) == pytest.approx((half, half), rel=0.15)
    assert statistics.bootstrap([np.array([0.5])]) == Estimate(0.5, 0.5, 0.5, 1, "bootstrap")
    # Two groups of one kind are as good as twice the items.
    both = statistics.bootstrap([values, np.random.default_rng(2).gamma(2.0, size=400)])
    assert both.high - both.low == pytest.approx((one.high - one.low) / 2**0.5, rel=0.15)


def test_groups_have_their_own_means_and_weigh_the_same_in_the_macro_average():
    ones = [row(f"a{i}", group="a", scores={"match": 1}) for i in range(8)]
    zeros = [row(f"b{i}", group="b", scores={"match": 0}) for i in range(2)]
    (only,) = summary(table_of(*ones, *zeros))
    assert only.scores["match"].mean == 0.8
    assert only.macro["match"].mean == 0.5
    assert {name: each["match"].mean for name, each in only.groups.items()} == {"a": 1.0, "b": 0.0}
    assert only.groups["a"]["match"].interval == "Wilson"


def test_steps_know_expert_weight_and_position():
    table = table_of(
        row(1, expert_names=["math", "facts"], weights=[[1.0, 2.0], [3.0, 4.0]]),
        row(2),
        row(3, expert_names=["facts"], weights=[[5.0], [6.0], [7.0]]),
        row(4, expert_names=["math"], weights=[]),
    )
    for each in (table, pa.concat_tables([table.slice(0, 1), table.slice(1)])):
        found = steps(each)
        assert {name: (s.weight.tolist(), s.position.tolist()) for name, s in found.items()} == {
            "math": ([1.0, 3.0], [0, 1]),
            "facts": ([2.0, 4.0, 5.0, 6.0, 7.0], [0, 1, 0, 1, 2]),
        }
    later = steps(table.slice(2))
    assert later["facts"].position.tolist() == [0, 1, 2]
    assert steps(table.slice(0, 0)) == {}
