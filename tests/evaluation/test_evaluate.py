"""Methods side by side: what methods stand for, what is scored, and what survives a kill."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
import yaml
from conftest import EXPERTS, family_of

from dlf_ray import EngineError, LocalEngine, SamplingParams
from dlf_ray.evaluation import provenance
from dlf_ray.evaluation.answering import answers
from dlf_ray.evaluation.evaluate import run
from dlf_ray.evaluation.experiment import Experiment, TaskSpec, method_options
from dlf_ray.evaluation.results import UPPER_BOUND, read
from dlf_ray.evaluation.statistics import summary
from dlf_ray.evaluation.tasks import own_task

METHODS = (
    *("large", "base", "expert:math", "static:0.5", "entropy@math+facts", "consistency"),
    *("dynamic", "dynamic:blend@math+prose"),
)


@pytest.fixture(scope="module")
def engine(folder):
    with LocalEngine(family_of(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def family_file(folder):
    path = folder / "evaluated.yaml"
    family = {name: {"model": name} for name in ("large", "base")}
    family["experts"] = {name: {"model": name} for name in EXPERTS}
    # One sequence at a time: then runs that were cut differently agree to the last bit, and a token
    # whose logit ties with another's to five digits cannot fall either way.
    engine = {"max_model_len": 256, "max_num_seqs": 1}
    path.write_text(yaml.safe_dump({**family, "engine": engine}, sort_keys=False))
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_methods_stand_for_what_they_say(folder):
    family = family_of(folder)
    assert method_options("large", family) == {"experts": []}
    assert method_options("base", family) == {"alone": "base"}
    assert method_options("expert:facts", family) == {"alone": "facts"}
    weights = dict.fromkeys(EXPERTS, 0.5)
    experts = list(EXPERTS)
    static = {"rule": "static", "experts": experts, "weights": weights}
    assert method_options("static:0.5", family) == static
    assert method_options("dynamic@math", family) == {"rule": "grid", "experts": ["math"]}
    assert method_options("entropy@math", family) == {"rule": "entropy", "experts": ["math"]}
    blend = {"rule": "grid", "select": "blend", "experts": ["math", "prose"]}
    assert method_options("dynamic:blend@math+prose", family) == blend


@pytest.mark.parametrize(
    "method",
    ["huge", "expert:", "expert:chess", "dynamic:x", "static:x", "", "large@math", "dynamic@chess"],
)
def test_an_unknown_method_lists_the_known_ones(folder, method):
    with pytest.raises(ValueError, match=r"facts|not a number"):
        method_options(method, family_of(folder))


def test_generated_answers_are_scored_strictly(engine, tmp_path):
    """Items whose answers are what the model says, and the same with a letter too many."""
    words = [f"question {i}:" for i in range(12)]
    outputs = engine.generate(words, SamplingParams(max_tokens=8))
    rows = [{"prompt": w, "answer": o.text or "x"} for w, o in zip(words, outputs, strict=True)]
    expected = sum(o.finish_reason == "stop" and bool(o.text.strip()) for o in outputs)
    for extra, right in (("", expected), ("?", 0)):
        path = tmp_path / "own.jsonl"
        task = own_task(write(path, [{**r, "answer": r["answer"] + extra} for r in rows]))
        items = task.load(path).items
        found = list(answers(engine, task, items, {}, max_tokens=8))
        assert sum(answer.scores["exact_match"] for answer in found) == right
        assert {a.item.id: a.output.text for a in found} == {
            item.id: output.text for item, output in zip(items, outputs, strict=True)
        }


def test_choices_are_judged_by_their_fused_likelihood(engine, tmp_path):
    rows = [
        {"prompt": f"Question {i}. Answer:", "choices": ["yes", "no", "perhaps so"], "answer": "no"}
        for i in range(5)
    ]
    path = tmp_path / "own.jsonl"
    task = own_task(write(path, rows), metric="multiple_choice")
    items = task.load(path).items
    for answer in answers(engine, task, items, {"select": "blend"}):
        prompts = [answer.item.prompt] * 3
        outputs = engine.score(prompts, answer.item.choices, select="blend")
        expected = [sum(output.logprobs) for output in outputs]
        found = [choice.logprob for choice in answer.response.choices]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert answer.scores["acc"] == float(np.argmax(expected) == 1)


def test_examples_may_be_for_the_large_model_only(engine, tmp_path):
    path = tmp_path / "own.jsonl"
    task = own_task(write(path, [{"prompt": "Question: 2? Answer:", "answer": "x"}]))
    (item,) = task.load(path).items
    item = dataclasses.replace(item, examples=(("Question: 1? Answer:", " one"),))
    own = {"large": item.full_prompt, **dict.fromkeys(("base", *EXPERTS), item.prompt)}
    for shots_for, prompt in (("large", own), ("all", item.full_prompt)):
        (answer,) = answers(engine, task, [item], {}, max_tokens=6, shots_for=shots_for)
        (expected,) = engine.generate(prompt, SamplingParams(max_tokens=6))
        assert answer.output.token_ids == expected.token_ids


def test_prompts_longer_than_the_context_are_cut_or_left_out(engine, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": "word " * 400 + "end:", "answer": "x"}, {"prompt": "short:", "answer": "x"}]
    task = own_task(write(path, rows))
    items = task.load(path).items
    cut = {a.item.id: a for a in answers(engine, task, items, {}, max_tokens=6)}
    ids = engine.tokenizer.encode(items[0].prompt)[-(256 - 6) :]
    (expected,) = engine.generate([ids], SamplingParams(max_tokens=6))
    assert cut[items[0].id].output.token_ids == expected.token_ids
    assert [cut[item.id].cut for item in items] == [True, False]
    left = {
        a.item.id: a for a in answers(engine, task, items, {}, max_tokens=6, on_overflow="skip")
    }
    assert "skipped" in left[items[0].id].output.error
    assert left[items[1].id].scores


def experiment(family_file, tmp_path, **changes):
    path = tmp_path / "items.jsonl"
    rows = [{"id": i, "prompt": f"Question {i}:", "answer": "yes"} for i in range(10)]
    values = {
        "family": str(family_file),
        "tasks": (TaskSpec(data=write(path, rows), max_tokens=6),),
        "methods": METHODS,
        "output": str(tmp_path / "results"),
    }
    return Experiment(**{**values, **changes})


def comparable(folder):
    """All columns but clocks, as rows."""
    return read(folder).drop_columns(["seconds"]).to_pylist()


def test_a_run_leaves_a_row_for_every_item_and_method(family_file, tmp_path):
    lines = []
    made = experiment(family_file, tmp_path, upper_bound="base")
    run(made, LocalEngine, log=lines.append)
    rows = summary(read(made.output))
    assert {row.method: row.items for row in rows} == dict.fromkeys((*METHODS, "upper-bound"), 10)
    by_method = {row["method"]: row for row in comparable(made.output)}
    assert by_method["dynamic"]["expert_names"] == list(EXPERTS)
    assert by_method["upper-bound"]["text"] == by_method["base"]["text"]
    assert len(lines) == len(METHODS) + 1  # quick ones are logged once, at their end
    # A second run has nothing to do: not even an engine is started.
    run(made, None, log=lines.append)


def test_malformed_lines_and_cut_prompts_are_counted(family_file, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": "word " * 400, "answer": "x"}, {"prompt": "fine", "answer": "x"}, {"a": 1}]
    made = experiment(
        family_file,
        tmp_path,
        tasks=(TaskSpec(data=write(path, rows), max_tokens=4),),
        methods=("large",),
    )
    lines = []
    malformed = run(made, LocalEngine, log=lines.append)
    assert any("own.jsonl:3" in line and "left out" in line for line in lines)
    assert any("1 prompts longer than the context were cut" in line for line in lines)
    assert malformed == {"own": 1}


def test_shards_make_the_whole(family_file, tmp_path):
    whole = experiment(family_file, tmp_path)
    run(whole, LocalEngine, log=lambda _: None)
    parts = experiment(family_file, tmp_path, output=str(tmp_path / "parts"))
    for number in range(3):
        run(parts, LocalEngine, log=lambda _: None, shard=(number, 3))
    key = ("item", "method", "token_ids", "scores")
    pick = lambda rows: [[row[k] for k in key] for row in rows]  # noqa: E731
    assert pick(comparable(parts.output)) == pick(comparable(whole.output))


# ---------------------------------------------------------------- a folder that is gone on with


class Starting(LocalEngine):
    """Notes which models each engine loads."""

    loaded = ()

    def __init__(self, family, *, models):
        Starting.loaded = (*Starting.loaded, sorted(models))
        super().__init__(family, models=models)


@pytest.fixture
def loaded():
    Starting.loaded = ()
    return lambda: Starting.loaded


def rewritten(file, to, change):
    """A family file beside another folder, with something changed."""
    family = yaml.safe_load(file.read_text())
    change(family)
    to.write_text(yaml.safe_dump(family, sort_keys=False))
    return to


def quiet(made, start=LocalEngine):
    return run(made, start, log=lambda _: None)


def methods_of(folder):
    return {row.method: row.items for row in summary(read(folder))}


@pytest.mark.parametrize(
    "change",
    [
        lambda family: family["engine"].update(max_num_seqs=2, num_cpus=0.5),
        lambda family: family["engine"].update(step_timeout_s=5, placement_strategy="SPREAD"),
        lambda family: family["large"].update(num_cpus=2, memory=2**20),
        lambda family: family["experts"].update(new={"model": "base"}),
        lambda family: family["experts"]["facts"].update(bounds=[0.0, 1.0]),
        lambda family: family.update(fusion={"select": "blend"}),
    ],
    ids=["slots", "timeouts", "resources", "one expert more", "another's bounds", "one expert"],
)
def test_what_changes_no_row_does_not_matter(family_file, tmp_path, change):
    made = experiment(family_file, tmp_path, methods=("large", "dynamic@math"))
    quiet(made)
    before = read(made.output)
    file = rewritten(family_file, family_file.with_name("changed.yaml"), change)
    quiet(msgspec.structs.replace(made, family=str(file)), None)  # not even an engine is started
    assert read(made.output).equals(before)


def test_a_family_may_move_with_its_models(family_file, folder, tmp_path):
    made = experiment(family_file, tmp_path, methods=("large",))
    quiet(made)
    there = tmp_path / "elsewhere"
    there.mkdir()
    for name in ("large", "base", *EXPERTS):
        (there / name).symlink_to(folder / name)
    file = rewritten(family_file, there / "moved.yaml", lambda _: None)
    quiet(msgspec.structs.replace(made, family=str(file)), None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f["large"].update(model="base"), r'models\.large\.model: "large" there, "base"'),
        (lambda f: f["experts"]["math"].update(model="facts"), r"models\.math\.model"),
        (lambda f: f["base"].update(dtype="bfloat16"), r"models\.base\.dtype"),
        (lambda f: f["engine"].update(max_model_len=128), "max_model_len: 256 there, 128 now"),
        (lambda f: f.update(fusion={"step": 0.5}), r"methods\.dynamic@math\.step: 0\.1 there"),
        (lambda f: f.update(fusion={"rule": "exact"}), r"methods\.dynamic@math\.rule"),
        (lambda f: f["experts"]["math"].update(bounds=[0, 1]), r"methods\.dynamic@math\.bounds"),
    ],
    ids=["large", "expert", "dtype", "length", "step", "rule", "bounds"],
)
def test_what_changes_rows_is_refused_by_its_name(family_file, tmp_path, change, words):
    made = experiment(family_file, tmp_path, methods=("large", "dynamic@math"))
    quiet(made)
    file = rewritten(family_file, family_file.with_name("changed.yaml"), change)
    with pytest.raises(ValueError, match=f"(?s)other settings.*{words}"):
        quiet(msgspec.structs.replace(made, family=str(file)), None)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_template": "{prompt}!"},
        {"metric": "rouge"},
        {"max_tokens": 7},
        {"stop": ("\n",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_task_of_the_same_name_is_refused(family_file, tmp_path, change):
    made = experiment(family_file, tmp_path, methods=("large",))
    quiet(made)
    (spec,) = made.tasks
    tasks = (msgspec.structs.replace(spec, **change),)
    with pytest.raises(ValueError, match=rf"tasks\.items\.{next(iter(change))}: .* there"):
        quiet(msgspec.structs.replace(made, tasks=tasks), None)


@pytest.mark.parametrize("change", [{"prompt": "Other:"}, {"answer": "no"}], ids=str)
def test_an_item_that_has_changed_is_refused(family_file, tmp_path, change):
    made = experiment(family_file, tmp_path, methods=("large",))
    quiet(made)
    data = made.tasks[0].data
    with open(data) as file:
        rows = [json.loads(line) for line in file]
    write(tmp_path / "items.jsonl", [{**rows[0], **change}, *rows[1:]])
    with pytest.raises(ValueError, match="item '0' of task 'items' has another prompt"):
        quiet(made, None)


def test_a_run_grows_in_its_folder(family_file, tmp_path, loaded):
    """By items, a method, a task, and an upper bound; what is no longer named stays."""
    (spec,) = experiment(family_file, tmp_path).tasks
    few = msgspec.structs.replace(spec, limit=4)
    made = experiment(family_file, tmp_path, methods=("large",), tasks=(few,))
    quiet(made, Starting)
    first = comparable(made.output)
    assert [row["item"] for row in first] == ["0", "1", "2", "3"]

    quiet(msgspec.structs.replace(made, tasks=(spec,)), Starting)  # all items
    assert methods_of(made.output) == {"large": 10}
    quiet(msgspec.structs.replace(made, tasks=(spec,), methods=("expert:math",)), Starting)
    assert methods_of(made.output) == {"large": 10, "expert:math": 10}
    more = TaskSpec(data=write(tmp_path / "more.jsonl", [{"prompt": "a", "answer": "b"}]))
    quiet(msgspec.structs.replace(made, tasks=(spec, more)), Starting)
    quiet(msgspec.structs.replace(made, tasks=(spec,), upper_bound="base"), Starting)
    assert methods_of(made.output) == {"large": 1, "expert:math": 10, UPPER_BOUND: 10}
    assert loaded() == (["large"], ["large"], ["math"], ["large"], ["large"])
    kept = [r for r in comparable(made.output) if (r["task"], r["method"]) == ("items", "large")]
    assert kept[:4] == first
    quiet(made, None)  # with fewer items than there are, nothing is left to do
    assert methods_of(made.output)["expert:math"] == 10


def test_an_engine_has_the_models_that_are_needed_together(family_file, tmp_path, loaded):
    made = experiment(family_file, tmp_path, methods=("expert:math", "base"), upper_bound="large")
    quiet(made, Starting)
    quiet(msgspec.structs.replace(made, methods=("dynamic@facts", "large")), Starting)
    assert loaded() == (["base", "math"], ["large"], ["base", "facts", "large"])
    whole = experiment(family_file, tmp_path, output=str(tmp_path / "whole"))
    methods = ("expert:math", "base", "dynamic@facts", "large")
    quiet(msgspec.structs.replace(whole, methods=methods, upper_bound="large"))
    pick = ("method", "item", "token_ids", "models", "weights")
    rows = [[[r[k] for k in pick] for r in comparable(f)] for f in (made.output, whole.output)]
    assert rows[0] == rows[1]
    models = {row["method"]: set(json.loads(row["models"])) for row in comparable(made.output)}
    assert models["dynamic@facts"] == {"large", "base", "facts"}
    assert models[UPPER_BOUND] == {UPPER_BOUND}


# ---------------------------------------------------------------- where the code comes from


def git(folder, *words):
    who = ("-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository of this project's name."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").write_text('[project]\nname = "dlf_ray"\n')
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "x")
    return root


@pytest.fixture
def installed(monkeypatch):
    """What pip has noted about the package."""

    def note(text):
        class Distribution:
            version = "0"

            def read_text(self, name):
                return text if name == "direct_url.json" else None

        monkeypatch.setattr(provenance, "distribution", lambda _: Distribution())

    note(None)
    return note


def test_the_commit_is_that_of_the_checkout(checkout, installed):
    assert provenance._commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_another_repository_around_is_not_taken_for_it(checkout, installed):
    """Neither an environment in somebody's project, nor a copy of this one in it."""
    inside = checkout / ".venv" / "site-packages"
    inside.mkdir(parents=True)
    assert provenance._commit(inside) is None
    (inside / "pyproject.toml").write_text('[project]\nname = "dlf_ray"\n')
    assert provenance._commit(inside) is None
    (checkout / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert provenance._commit(checkout) is None
    (checkout / "pyproject.toml").write_text("[tool.ruff]\n")
    assert provenance._commit(checkout) is None


def test_without_git_there_is_no_commit(checkout, installed, monkeypatch, family_file, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._commit(checkout) is None
    made = experiment(family_file, tmp_path, methods=("large",))
    quiet(made)
    assert {row["commit"] for row in comparable(made.output)} == {None}


def test_what_pip_took_from_a_repository_has_its_commit(tmp_path, installed):
    vcs = {"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}
    installed(json.dumps(vcs))
    assert provenance._commit(tmp_path) == "c0ffee"
    installed(json.dumps({"url": "file:///x", "dir_info": {"editable": True}}))
    assert provenance._commit(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("huge",)}, "huge.*dynamic"),
        ({"methods": ()}, "at least one"),
        ({"tasks": (TaskSpec(task="chess"),)}, "chess.*gsm8k"),
        ({"tasks": (TaskSpec(),)}, "benchmark"),
        ({"tasks": (TaskSpec(task="gsm8k", metric="rouge"),)}, "own data"),
        ({"tasks": (TaskSpec(task="gsm8k", stop=("x",)),)}, "own data"),
        ({"tasks": (TaskSpec(data="x.jsonl", stop=("",)),)}, "empty string"),
        ({"tasks": (TaskSpec(data="x.jsonl", metric="multiple_choice", stop=("x",)),)}, "stop"),
        ({"tasks": (TaskSpec(task="gsm8k", data="/nowhere/at/all"),)}, "/nowhere/at/all"),
    ],
    ids=str,
)
def test_mistakes_show_before_an_engine_starts(family_file, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        run(experiment(family_file, tmp_path, **changes), None)


def test_experiment_files(tmp_path):
    file = tmp_path / "experiment.yaml"
    good = {"family": "x.yaml", "tasks": [{"task": "gsm8k"}], "output": "~/there"}
    file.write_text(yaml.safe_dump(good))
    assert Experiment.from_yaml(file).output == os.path.expanduser("~/there")
    file.write_text(yaml.safe_dump({**good, "method": ["large"]}))
    with pytest.raises(ValueError, match=r"experiment\.yaml.*`method`.*methods"):
        Experiment.from_yaml(file)
    file.write_text(yaml.safe_dump({**good, "tasks": [{"tsk": "gsm8k"}]}))
    with pytest.raises(ValueError, match=r"`tsk`.*task"):
        Experiment.from_yaml(file)


SCRIPT = """
import sys
from dlf_ray import LocalEngine
from dlf_ray.evaluation import results
from dlf_ray.evaluation.experiment import Experiment
from dlf_ray.evaluation.evaluate import run
results.FLUSH_ROWS = 3
run(Experiment.from_yaml(sys.argv[1]), LocalEngine, log=lambda line: print(line, flush=True))
"""


def test_a_killed_run_goes_on_to_the_same_results(family_file, tmp_path):
    """SIGKILL at several moments, each time a little later; then to the end."""
    whole = experiment(family_file, tmp_path, output=str(tmp_path / "whole"))
    run(whole, LocalEngine, log=lambda _: None)
    file = tmp_path / "experiment.yaml"
    output = tmp_path / "killed"
    raw = {
        "family": str(family_file),
        "tasks": [{"data": str(tmp_path / "items.jsonl"), "max_tokens": 6}],
        "methods": list(METHODS),
        "output": str(output),
    }
    file.write_text(yaml.safe_dump(raw))
    counts = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(file)])
        before = len(list(output.glob("part-*")))
        deadline = time.monotonic() + 60
        while len(list(output.glob("part-*"))) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        counts.append(len(read(output)))
    assert counts == sorted(set(counts)), "every run adds to what was there"
    assert counts[-1] < 10 * len(METHODS), "the last kill came before the end"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(file)], timeout=60, check=False)
    assert done.returncode == 0
    assert comparable(output) == comparable(whole.output)


class Dying(LocalEngine):
    """Dies after so many answers, for each engine of a run."""

    lives = ()

    def _wait(self, mailbox):
        chunk = super()._wait(mailbox)
        if chunk.finish_reason:
            self.lives[0] -= 1
            if self.lives[0] < 0:
                self.lives.pop(0)
                raise EngineError("the coordinator died")
        return chunk


def test_another_engine_goes_on_where_one_has_died(family_file, tmp_path):
    whole = experiment(family_file, tmp_path, methods=("large", "dynamic"))
    run(whole, LocalEngine, log=lambda _: None)
    Dying.lives, lines = [3, 0, 0, 5, 1000], []
    made = msgspec.structs.replace(whole, output=str(tmp_path / "died"))
    run(made, Dying, log=lines.append)
    pick = ("item", "method", "token_ids", "scores")
    rows = [
        sorted([str([row[key] for key in pick]) for row in comparable(each.output)])
        for each in (made, whole)
    ]
    assert rows[0] == rows[1]
    assert sum("the coordinator died; going on" in line for line in lines) == 4
    Dying.lives = [2, 0, 0, 0, 1000]
    with pytest.raises(EngineError, match="the coordinator died"):
        run(msgspec.structs.replace(whole, output=str(tmp_path / "no")), Dying, log=lines.append)
