"""Over Ray: what is broken is replaced, hopeless starts end, and who hangs is not called well."""

import re
import signal
import threading

import psutil
import pytest
from conftest import family_of
from processes import PATIENCE_S, below, refused, settled
from workers import Breaks, Killed, Light, Stalls, beside

import dlf_ray.engine.engine
from dlf_ray import Engine, EngineError, SamplingParams

pytestmark = pytest.mark.usefixtures("ray_cluster")

LONG = SamplingParams(max_tokens=30, ignore_eos=True)
PROMPT = [5, 6, 7]


def file_of(engine, name, what):
    return beside(engine.family.models[name], what)


def coordinator():
    """The newest is ours."""
    return max(below("ray::CoordinatorActor"), key=psutil.Process.create_time)


def test_a_model_that_is_killed_whenever_it_loads_is_named(light_folder):
    family = family_of(light_folder, experts=("math",))
    words = r"(?s)model 'math' \(.*math\) was killed 3 times while it loaded, most likely"
    refused(family, words, error=EngineError, worker=Killed)


def test_a_model_that_loads_for_ever_is_named(light_folder, caplog, monkeypatch):
    monkeypatch.setattr(dlf_ray.engine.engine, "LOAD_WORD_S", 1.0)
    family = family_of(light_folder, experts=("math",), start_timeout_s=15)
    words = r"model 'math' \(.*math\) did not start within 15 s; raise `engine.start_timeout_s`"
    refused(family, words, error=EngineError, worker=Stalls)
    assert re.search(r"starting, \d+ of 15 s: .*model 'math'", caplog.text)


@pytest.fixture(scope="module")
def engine(ray_cluster, light_folder):
    family = family_of(light_folder, experts=("math", "facts"), step_timeout_s=10)
    with Engine(family, worker=Breaks) as made:
        yield made


@pytest.fixture(scope="module")
def expected(engine):
    return engine.generate(PROMPT, LONG)[0].token_ids


def test_an_error_that_sticks_costs_a_restart_and_no_answer(engine, expected):
    before = file_of(engine, "math", "pid").read_text()
    known = len(engine.timings().recoveries)
    file_of(engine, "math", "break").touch()
    (output,) = engine.generate(PROMPT, LONG)
    assert output.error is None
    assert output.token_ids == expected
    assert file_of(engine, "math", "pid").read_text() != before
    (recovery,) = engine.timings().recoveries[known:]
    assert (recovery.model, recovery.reason) == ("math", "died")
    engine.check_health()


def test_an_expert_that_cannot_come_back_can_still_be_removed(engine, expected):
    """It is lost with a request that only it can answer; the others are as before."""
    (whole,) = engine.generate(PROMPT, LONG, experts=["math"])
    outputs = []

    def ask():
        outputs.extend(engine.generate(PROMPT, LONG, alone="facts"))

    asking = threading.Thread(target=ask)
    removal = threading.Thread(target=engine.remove_expert, args=("facts",))
    gone, sign = file_of(engine, "facts", "gone"), file_of(engine, "facts", "break")
    gone.touch()
    sign.touch()
    asking.start()
    assert settled(lambda: not sign.exists())
    removal.start()
    removal.join(PATIENCE_S)
    asking.join(PATIENCE_S)
    gone.unlink()
    assert not removal.is_alive()
    assert "taken away" in outputs[0].error
    (output,) = engine.generate(PROMPT, LONG)
    assert output.token_ids == whole.token_ids
    assert engine.failure is None


def test_a_coordinator_that_hangs_is_not_well(light_folder, monkeypatch):
    monkeypatch.setattr(dlf_ray.engine.engine, "MARGIN_S", 1.0)
    family = family_of(light_folder, experts=(), step_timeout_s=1)
    with Engine(family, worker=Light) as engine:
        engine.check_health()
        assert settled(lambda: engine._ping[1].done())
        process = coordinator()
        process.send_signal(signal.SIGSTOP)
        engine.check_health()  # asks

        def ill():
            try:
                engine.check_health()
            except EngineError as error:
                return "the coordinator hangs" in str(error)

        assert settled(ill)
        with pytest.raises(EngineError, match="the coordinator hangs"):
            engine.timings()
        process.send_signal(signal.SIGCONT)
        assert settled(lambda: not ill())
