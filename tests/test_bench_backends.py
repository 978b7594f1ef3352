"""`dlf bench` of backends and adapters, with models as small as they may be."""

import re

import pytest
from conftest import dlf
from vllms import needs_vllm

from dlf_ray import EngineError, bench_backends
from dlf_ray.bench_backends import Saving, Speed

TINY = ("--shape", "tiny", "--rounds", 1)
SPEED = ("--sequences", "1,3", "--tokens", 4, *TINY)
SETTINGS = [("large alone", 1), ("large alone", 3), ("fused family", 1), ("fused family", 3)]


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setattr(bench_backends, "python_of_vllm", lambda given: given)


def rows(shown, first):
    """Of a table: what stands in `first`, and the cells after it."""
    assert shown.exit_code == 0, shown.output
    found = [re.fullmatch(rf"\s+({first})\s+(.*?)\s*", line) for line in shown.output.splitlines()]
    return [(match[1], match[2].split()) for match in found if match]


def test_tokens_per_second_of_a_backend(ray_cluster, without_vllm):
    shown = dlf("bench", "--backend", "transformers", *SPEED)
    found = rows(shown, "large alone|fused family")
    assert [(what, int(cells[0])) for what, cells in found] == SETTINGS
    for _, cells in found:
        assert len(cells) == 2  # no vLLM, no ratio to it
        assert float(cells[1]) > 0
    assert re.search(r"\d+ cores, .*torch .*transformers .*dtype float32", shown.output)


@needs_vllm
def test_tokens_per_second_beside_vllms_own(ray_cluster):
    shown = dlf("bench", "--backend", "transformers,vllm", *SPEED)
    found = rows(shown, "large alone|fused family")
    assert [(what, int(cells[0])) for what, cells in found] == SETTINGS
    for what, cells in found:
        assert len(cells) == (6 if what == "large alone" else 5)
        assert all(float(cell) > 0 for cell in cells)


def test_memory_and_steps_of_adapters():
    pytest.importorskip("peft")
    check_savings("transformers")


@needs_vllm
def test_memory_and_steps_of_adapters_under_vllm():
    check_savings("vllm")


def check_savings(backend):
    shown = dlf("bench", "--backend", backend, "--adapters", "1", *TINY)
    ((_, cells),) = rows(shown, backend)
    adapters, *numbers, measured, of, models = cells
    assert (adapters, measured, of, models) == ("1", "2", "of", "2")
    assert len(numbers) == 6
    assert all(float(number) > 0 for number in numbers)


def test_more_separate_models_than_are_started_are_extrapolated(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(bench_backends, "SEPARATE_AT_MOST", 1)
    monkeypatch.setattr(bench_backends.os, "cpu_count", lambda: 1)
    (found,) = bench_backends.bench_adapters([3], ["transformers"], shape="tiny", rounds=1)
    assert found.measured == 1
    assert found.extrapolated
    assert found.separate_bytes % 4 == 0
    assert found.separate_bytes > 2 * found.shared_bytes


def test_what_was_measured_is_shown_also_where_it_fails_then(monkeypatch):
    def failing(*_, **__):
        yield Speed("large alone", 8, {"vllm": 30.0}, 40.0)
        raise EngineError("the large model has ended")

    monkeypatch.setattr(bench_backends, "bench_backends", failing)
    shown = dlf("bench", "--backend", "vllm")
    assert shown.exit_code == 1
    assert "error: the large model has ended" in shown.output
    line = next(line for line in shown.output.splitlines() if " large alone " in line)
    assert line.split() == ["large", "alone", "8", "30.0", "40.0", "0.75"]


def test_ratios_are_to_vllm_alone():
    assert Speed("large alone", 8, {"vllm": 30.0}, 40.0).ratio("vllm") == 0.75
    assert Speed("large alone", 8, {"vllm": 30.0}, None).ratio("vllm") is None
    assert not Saving("vllm", 1, 1, 1.0, 1, 1.0, measured=2).extrapolated


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "vllm"], "vLLM is not installed in this environment"),
        (["--backend", "transformers,vllm", "--adapters", "1"], "--vllm-python"),
        (["--backend", "vllm", "--vllm-python", "/nowhere/python"], "is no Python to run"),
        (["--backend", "auto"], "--backend takes some of transformers, vllm"),
        (["--backend", "transformers", "--shape", "huge"], "no shape 'huge'"),
        (["--backend", "transformers", "--sequences", "0"], "numbers of 1 or more"),
        (["--adapters", "0"], "numbers of 1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(without_vllm, words, message):
    shown = dlf("bench", *words)
    assert shown.exit_code == 1
    assert message in shown.output.replace("\n", " ")
    assert "Traceback" not in shown.output
