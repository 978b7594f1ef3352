"""Over Ray: what is broken is replaced, hopeless starts end, and who hangs is not called well."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import family_of
from test_ends import refused, settled

import dlf_ray.engine
from dlf_ray import Engine, EngineError, SamplingParams
from dlf_ray.worker import ModelWorker

pytestmark = pytest.mark.usefixtures("ray_cluster")

LONG = SamplingParams(max_tokens=30, ignore_eos=True)
PROMPT = [5, 6, 7]


class Breaks(ModelWorker):
    """Fails as a GPU does, where a file beside the model says so, until its process has ended."""

    lost = False

    def load(self):
        Path(f"{self.spec.model}.pid").write_text(str(os.getpid()))
        if Path(f"{self.spec.model}.gone").exists():
            raise ValueError("the folder has been taken away")
        return super().load()

    def compute(self, plan):
        time.sleep(0.01)
        sign = Path(f"{self.spec.model}.break")
        if sign.exists() and plan.starts.max() > 10:  # in the middle of an answer
            sign.unlink()
            self.lost = True
        if self.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().compute(plan)


def beside(engine, name, ending):
    return Path(f"{engine.family.models[name].model}.{ending}")


def coordinator():
    """The newest is ours."""
    found = [
        each
        for each in psutil.process_iter(["cmdline", "create_time"])
        if "ray::CoordinatorActor" in " ".join(each.info["cmdline"] or ())
    ]
    return max(found, key=lambda each: each.info["create_time"])


class Killed(ModelWorker):
    """As by Ray, or by the system, where the machine has not enough memory for the model."""

    def load(self):
        if "math" in self.spec.model:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load()


def test_a_model_that_is_killed_whenever_it_loads_is_named(folder):
    family = family_of(folder, experts=("math",))
    words = r"(?s)model 'math' \(.*math\) was killed 3 times while it loaded, most likely"
    refused(family, words, error=EngineError, worker=Killed, timeout_s=100)


class Stalls(ModelWorker):
    """As a download that never ends."""

    def load(self):
        if "math" in self.spec.model:
            time.sleep(600)
        return super().load()


def test_a_model_that_loads_for_ever_is_named(folder, caplog, monkeypatch):
    monkeypatch.setattr(dlf_ray.engine, "LOAD_WORD_S", 1.0)
    family = family_of(folder, experts=("math",), start_timeout_s=5)
    words = r"model 'math' \(.*math\) did not start within 5 s; raise `engine.start_timeout_s`"
    refused(family, words, error=EngineError, worker=Stalls, timeout_s=60)
    assert re.search(r"starting, \d of 5 s: .*model 'math'", caplog.text)


@pytest.fixture(scope="module")
def engine(ray_cluster, folder):
    family = family_of(folder, experts=("math", "facts"), step_timeout_s=10)
    with Engine(family, worker=Breaks) as made:
        yield made


@pytest.fixture(scope="module")
def expected(engine):
    return engine.generate(PROMPT, LONG)[0].token_ids


def test_an_error_that_sticks_costs_a_restart_and_no_answer(engine, expected):
    before = beside(engine, "math", "pid").read_text()
    known = len(engine.timings().recoveries)
    beside(engine, "math", "break").touch()
    (output,) = engine.generate(PROMPT, LONG)
    assert output.error is None
    assert output.token_ids == expected
    assert beside(engine, "math", "pid").read_text() != before
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
    gone, sign = beside(engine, "facts", "gone"), beside(engine, "facts", "break")
    gone.touch()
    sign.touch()
    asking.start()
    assert settled(lambda: not sign.exists())
    removal.start()
    removal.join(60)
    asking.join(60)
    gone.unlink()
    assert not removal.is_alive()
    assert "taken away" in outputs[0].error
    (output,) = engine.generate(PROMPT, LONG)
    assert output.token_ids == whole.token_ids
    assert engine.failure is None


def test_a_coordinator_that_hangs_is_not_well(folder, monkeypatch):
    monkeypatch.setattr(dlf_ray.engine, "MARGIN_S", 1.0)
    with Engine(family_of(folder, experts=(), step_timeout_s=1)) as engine:
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
