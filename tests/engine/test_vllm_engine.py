"""Families on Ray whose models vLLM computes: what the oracle says, and what the faults do."""

import os
import signal

import pytest
from conftest import EXPERTS, adapted, params_of, prompts_of
from oracle import Oracle
from vllms import HEAD, needs_vllm
from workers import Failing

from dlf_ray import Engine, Family, SamplingParams

pytestmark = [needs_vllm, pytest.mark.usefixtures("ray_cluster")]
LENGTH = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A family as `conftest.folder`, of heads that vLLM takes; experts are adapters too."""
    return adapted(tmp_path_factory.mktemp("family"), **HEAD)


@pytest.fixture(scope="module")
def oracle(folder):
    return Oracle(folder)


def family(folder, *, adapters=False, vllm=("large", "base", *EXPERTS), **engine):
    def spec(name):
        if adapters and name in EXPERTS:
            return {"adapter": str(folder / f"{name}-adapter")}
        backend = "vllm" if name in vllm else "transformers"
        dtype = {"dtype": "float32"}
        return {"model": str(folder / name), "num_cpus": 0.1, "backend": backend, **dtype}

    return Family.from_dict(
        {
            "large": spec("large"),
            "base": spec("base"),
            "experts": {name: spec(name) for name in EXPERTS},
            "engine": {"num_cpus": 0.1, "max_num_seqs": 8, "max_model_len": LENGTH, **engine},
        }
    )


@pytest.mark.parametrize(
    ("how", "chunk"),
    [
        ({}, 32),
        ({"vllm": ("large",)}, 512),
        ({"adapters": True}, 32),
        ({"adapters": True, "vllm": ("large",)}, 512),
    ],
    ids=["all on vLLM", "mixed", "adapters", "adapters under transformers"],
)
def test_greedy_tokens_are_the_oracles(folder, oracle, how, chunk):
    with Engine(family(folder, max_num_batched_tokens=chunk, **how)) as engine:
        assert engine._descriptions["large"].backend == "vllm"
        for experts in (("math",), EXPERTS):
            prompts = prompts_of(12)
            outputs = engine.generate(prompts, params_of(12), experts=experts)
            for prompt, output in zip(prompts, outputs, strict=True):
                oracle.check(prompt, output, experts)
        begin = prompts_of(1, longest=90)[0] * 2
        alike = [[*begin[:100], token] for token in range(1, 9)]  # a prefix in common
        outputs = engine.generate(alike, SamplingParams(max_tokens=6))
        for prompt, output in zip(alike, outputs, strict=True):
            oracle.check(prompt, output, EXPERTS)
        scored = engine.score(alike[:2], [[5, 6, 7]] * 2)
        assert [len(each.logprobs) for each in scored] == [3, 3]


@pytest.fixture(scope="module")
def expected(folder):
    with Engine(family(folder)) as engine:
        return engine.generate(prompts_of(4), SamplingParams(max_tokens=24, ignore_eos=True))


@pytest.mark.parametrize("fault", ["killed", "hangs", "out of memory", "not finite"])
def test_faults_cost_time_and_no_answer(folder, expected, fault):
    """Each once, in the base's worker, in the midst of four answers."""
    sign = folder / "base.fault"
    with Engine(family(folder, step_timeout_s=20), worker=Failing) as engine:
        sign.write_text(fault)
        sampling = SamplingParams(max_tokens=24, ignore_eos=True)
        outputs = engine.generate(prompts_of(4), sampling)
        assert not sign.exists()
        if fault == "not finite":
            assert sum(output.error is not None for output in outputs) == 1
            outputs = engine.generate(prompts_of(4), sampling)
        else:
            assert [each.model for each in engine.timings().recoveries] == ["base"]
    assert [output.token_ids for output in outputs] == [each.token_ids for each in expected]


def test_a_killed_worker_of_adapters_comes_back_with_all_of_them(folder, oracle):
    with Engine(family(folder, adapters=True), worker=Failing) as engine:
        prompts, sampling = prompts_of(3), SamplingParams(max_tokens=60, ignore_eos=True)
        streams = [engine.stream(prompt, sampling) for prompt in prompts]
        for stream in streams:
            next(stream)
        os.kill(int((folder / "base.pid").read_text()), signal.SIGKILL)
        outputs = engine.generate(prompts, SamplingParams(max_tokens=10))
        for prompt, output in zip(prompts, outputs, strict=True):
            oracle.check(prompt, output, EXPERTS)
        with pytest.raises(ValueError, match="starts and ends with its base"):
            engine.remove_expert("math")
        with pytest.raises(ValueError, match="give it as `model`"):
            engine.add_expert("more", {"adapter": str(folder / "math-adapter")})
        names = {each.model for each in engine.timings().recoveries}
        assert names == {"base", *EXPERTS}
        for stream in streams:
            stream.close()
