"""The `dlf` command as its users run it."""

import itertools
import json
import re

import pytest
import yaml
from conftest import EXPERTS, dlf, family_of

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.bench import Costs, Result, bench_family
from dlf_ray.evaluation.results import read, read_config


@pytest.fixture(scope="module")
def file(folder):
    path = folder / "family.yaml"
    experts = {name: {"model": name} for name in EXPERTS}
    engine = {"max_model_len": 256}
    family = {"large": {"model": "large"}, "base": {"model": "base"}, "experts": experts}
    path.write_text(yaml.safe_dump({**family, "engine": engine}))
    return path


@pytest.fixture
def served(monkeypatch):
    """What `dlf serve` would serve."""
    found = []
    monkeypatch.setattr(
        "dlf_ray.serving.app.run_server", lambda settings, *_, **__: found.append(settings)
    )
    return found


def test_a_family_is_served_under_the_names_that_are_given(file, served):
    for words, names in (
        ([], ["family"]),
        (["--model-name", "gpt"], ["gpt"]),
        (["--model-name", "gpt", "--model-name", "org/llama"], ["gpt", "org/llama"]),
    ):
        shown = dlf("serve", file, *words)
        assert shown.exit_code == 0, shown.output
        assert list(served.pop().families) == names


def test_pages_of_other_origins_are_named_one_by_one(file, served):
    origins = ["https://chat.example.com", "http://localhost:3000"]
    shown = dlf("serve", file, *(word for each in origins for word in ("--allowed-origins", each)))
    assert shown.exit_code == 0, shown.output
    assert served.pop().cors_allow_origins == origins
    shown = dlf("serve", file, "--allowed-origins", '["*"]')
    assert shown.exit_code == 1
    assert "is no origin" in shown.output


@pytest.mark.parametrize("command", [[], ["generate"], ["evaluate"], ["demo"], ["bench"]], ids=str)
def test_help_explains(command):
    shown = dlf(*command, "--help")
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def test_generate_streams_what_the_engine_generates(file, folder):
    with LocalEngine(family_of(folder)) as engine:
        (expected,) = engine.generate("hello there", SamplingParams(max_tokens=12))
    shown = dlf("generate", file, "--prompt", "hello there", "--max-tokens", 12, "--local")
    assert shown.exit_code == 0, shown.output
    assert shown.output.replace("\n", "") == ("hello there" + expected.text).replace("\n", "")


def test_weights_are_shown_on_demand(file):
    words = ("--prompt", "x", "--max-tokens", 5, "--local", "--show-weights")
    shown = dlf("generate", file, *words, "--experts", "math,facts")
    assert shown.exit_code == 0, shown.output
    assert "prose 0 tokens, mean weight 0.00" in shown.output
    assert "math" in shown.output


def test_a_trace_is_written_on_demand(file, tmp_path):
    words = ("--prompt", "x", "--max-tokens", 3, "--local", "--trace", tmp_path / "trace.json")
    shown = dlf("generate", file, *words)
    assert shown.exit_code == 0, shown.output
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"large", "base", "coordinator"} < {e["args"]["name"] for e in events if "args" in e}


def test_evaluate_prints_a_row_per_method(file, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": w, "answer": w}) + "\n" for w in "abc"))
    methods = "large,base,expert:math,static,dynamic:blend"
    words = ("--methods", methods, "--local", "--max-tokens", 4)
    shown = dlf("evaluate", file, "--data", data, *words)
    assert shown.exit_code == 0, shown.output
    for method in methods.split(","):
        assert f"{method} " in shown.output


def data_of(path, *prompts):
    path.write_text("".join(json.dumps({"prompt": p, "answer": p}) + "\n" for p in prompts))
    return path


def test_several_data_are_several_tasks(file, tmp_path):
    """Ended by stop strings, in one table, and gone on with: what is there is shown with it."""
    one, two = data_of(tmp_path / "one.jsonl", *"abc"), data_of(tmp_path / "two.jsonl", *"de")
    words = ("--local", "--max-tokens", 4, "--output", tmp_path / "run", "--stop", "e")
    more = (*words, "--stop", "\\n", "--methods", "large")
    shown = dlf("evaluate", file, "--data", one, "--data", two, *more)
    assert shown.exit_code == 0, shown.output
    for title in ("one", "two", "3 items", "2 items", "items/s", "tokens/s", "average"):
        assert title in shown.output
    rows = read(tmp_path / "run").to_pylist()
    assert {row["task"] for row in rows} == {"one", "two"}
    assert not any({"e", "\n"} & set(row["text"]) for row in rows)
    stop = read_config(tmp_path / "run")["tasks"]["one"]["stop"]
    assert stop == ["e", "\n"]
    more = (*words, "--stop", "\\n", "--methods", "base", "--upper-bound", file.with_name("large"))
    again = dlf("evaluate", file, "--data", one, *more)
    assert again.exit_code == 0, again.output
    lines = {line.split()[0]: line for line in again.output.splitlines() if line.strip()}
    assert {"large", "base", "upper-bound"} <= set(lines)
    assert re.search(r"base +\d+\.\d \(\d+-\d+\) +- ", lines["base"]), "no row of task two"
    pages = dlf("report", tmp_path / "run")
    assert pages.exit_code == 0, pages.output
    report = (tmp_path / "run" / "report.md").read_text()
    for name in ("one", "two", "large", "base", "upper-bound", "items/s"):
        assert name in report


def test_methods_with_fewer_items_say_so(file, tmp_path):
    data = data_of(tmp_path / "one.jsonl", *"abc")
    words = ("evaluate", file, "--data", data, "--local", "--max-tokens", 2)
    output = ("--output", tmp_path / "run")
    dlf(*words, *output, "--methods", "large", "--limit", 1)
    shown = dlf(*words, *output, "--methods", "base")
    assert shown.exit_code == 0, shown.output
    assert "3 items" in shown.output
    assert re.search(r"large .*\), 1 items", shown.output)


def test_an_experiment_file_is_run_as_the_job_runs_it(file, tmp_path):
    data = data_of(tmp_path / "data.jsonl", *"ab")
    experiment = tmp_path / "experiment.yaml"
    raw = {"family": str(file), "tasks": [{"data": str(data), "max_tokens": 3}]}
    output = str(tmp_path / "own")
    experiment.write_text(yaml.safe_dump({**raw, "methods": ["large"], "output": output}))
    shown = dlf("evaluate", experiment, "--local")
    assert shown.exit_code == 0, shown.output
    assert "2 items" in shown.output
    shown = dlf("evaluate", experiment, "--local", "--output", tmp_path / "other")
    assert shown.exit_code == 0, shown.output
    drop = ["seconds"]
    assert read(tmp_path / "other").drop_columns(drop).equals(read(output).drop_columns(drop))
    refused = dlf("evaluate", experiment, "--local", "--methods", "base", "--shots", 0)
    assert refused.exit_code == 1
    message = " ".join(refused.output.split())
    assert "--methods, --shots" in message
    assert "only --output and --local" in message


def test_a_template_may_hold_line_breaks(file, folder, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("question,answer\nhow much?,x\n")
    words = ("--prompt-template", "Q: {question}\\nA:", "--methods", "large", "--max-tokens", 4)
    shown = dlf("evaluate", file, "--data", data, *words, "--output", tmp_path / "run", "--local")
    assert shown.exit_code == 0, shown.output
    with LocalEngine(family_of(folder)) as engine:
        prompt = "Q: how much?\nA:"
        (expected,) = engine.generate(prompt, SamplingParams(max_tokens=4), experts=[])
    (row,) = read(tmp_path / "run").to_pylist()
    assert row["token_ids"] == expected.token_ids


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "nowhere.yaml", "--prompt", "x"], "no such file: nowhere.yaml"),
        (["generate", "FILE", "--prompt", "", "--local"], "prompt is empty"),
        (["generate", "FILE", "--prompt", "x", "--experts", "chess", "--local"], "chess"),
        (["generate", "FILE", "--prompt", "x", "--top-p", "2", "--local"], "top_p"),
        (["evaluate", "FILE", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["evaluate", "FILE", "--task", "chess"], "gsm8k"),
        (["evaluate", "FILE", "--data", "FILE"], "yaml"),
        (["evaluate", "FILE", "--task", "mmlu", "--data", "a", "--data", "b"], "--data"),
        (["evaluate", "FILE", "--data", "a.jsonl", "--stop", ""], "empty string"),
        (["evaluate", "nowhere.yaml", "--task", "mmlu"], "no such file: nowhere.yaml"),
    ],
    ids=str,
)
def test_mistakes_end_with_one_line_and_no_trace(file, words, message):
    shown = dlf(*(file if word == "FILE" else word for word in words))
    assert shown.exit_code == 1
    assert message in shown.output
    assert "Traceback" not in shown.output


def test_bench_measures_engine_and_exchange(ray_cluster):
    sizes = ("--vocab", 100, "--steps", 5, "--rounds", 1, "--items", 0, "--forward-ms", 30)
    shown = dlf("bench", "--experts", 1, "--rows", "1,2", *sizes)
    assert shown.exit_code == 0, shown.output
    cells = [line.replace("0 of 3", "0").split() for line in shown.output.splitlines()]
    rows = [row for row in cells if len(row) == 11 and row[0] == "1"]
    assert len(rows) == 2
    for row in rows:
        _, remote, _, exchange, step, forward, fusion, rest, rate, *_ = map(float, row)
        assert remote == 0
        assert exchange > 0
        assert fusion > 0
        assert rest > 0
        assert forward >= 30
        assert step == pytest.approx(forward + fusion + rest, abs=0.03)
        assert rate == pytest.approx(1000 / step, rel=0.01)
    assert "ms x models" not in shown.output  # two settings do not tell three costs apart


def test_costs_are_found_again():
    """Messages and bytes of a grid of settings, priced, give the prices back."""
    results = []
    for experts, rows in itertools.product((1, 4, 16), (1, 8)):
        models, megabytes = experts + 2, (experts + 2) * rows * 1000 * 4 / 1e6
        rest, fusion = 0.5 + 0.1 * models + 0.9 * megabytes, 0.7 * experts * rows
        results.append(Result(experts, rows, 1000, 0, 1.0, 20 + rest + fusion, fusion, 20.0))
    found = Costs.fit(results)
    assert (found.step, found.message, found.megabyte, found.row) == pytest.approx(
        (0.5, 0.1, 0.9, 0.7)
    )
    far = found.predict(64, 8, 1000)
    assert far.megabytes == pytest.approx(66 * 8 * 1000 * 4 / 1e6)
    assert far.rest == pytest.approx(0.5 + 0.1 * 66 + 0.9 * far.megabytes)
    assert far.fusion == pytest.approx(0.7 * 64 * 8)
    assert far.wire(100) == pytest.approx(1000 * far.megabytes * 1e6 * 8 / 100e9)
    assert Costs.fit([r for r in results if r.rows == 1]) is None


def test_bench_serves_items_with_and_without_sharing(file):
    asked = [f"how much is {i}?" for i in range(10)]
    example = "Question: what is one and one? Answer: it is two.\n"
    found = bench_family(str(file), asked, example, shots=3, max_tokens=4, rounds=1)
    assert found.shots == 3
    rates = (found.one_at_a_time, found.together, found.recomputed, found.shared)
    assert all(rate > 0 for rate in rates)
