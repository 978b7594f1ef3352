"""Experts that are adapters over the base: one worker, one copy of weights, the same answers."""

import shutil

import msgspec
import pytest
from conftest import EXPERTS, adapted, params_of, prompts_of
from oracle import Oracle

from dlf_ray import Engine, Family, LocalEngine, SamplingParams
from dlf_ray.config import ExpertSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def oracle(folder):
    return Oracle(folder)


def family(folder, **engine):
    experts = {name: {"adapter": str(folder / f"{name}-adapter")} for name in EXPERTS[:2]}
    own = {"prose": {"model": str(folder / "prose"), "num_cpus": 0.1}}
    large, base = ({"model": str(folder / name), "num_cpus": 0.1} for name in ("large", "base"))
    settings = {"num_cpus": 0.1, "max_num_seqs": 8, "max_model_len": 256, **engine}
    return Family.from_dict(
        {"large": large, "base": base, "experts": {**experts, **own}, "engine": settings}
    )


def agree(engine, oracle):
    for experts in (("math",), EXPERTS):
        prompts = prompts_of(9)
        outputs = engine.generate(prompts, params_of(9), experts=experts)
        for prompt, output in zip(prompts, outputs, strict=True):
            oracle.check(prompt, output, experts)
    alike = [[*range(40), token] for token in range(41, 47)]
    for prompt, output in zip(alike, engine.generate(alike), strict=True):
        oracle.check(prompt, output, EXPERTS)


@pytest.mark.parametrize("budget", [24, 4096], ids=["chunked", "whole"])
def test_greedy_tokens_are_the_oracles(folder, oracle, budget):
    with LocalEngine(family(folder, max_num_batched_tokens=budget)) as engine:
        agree(engine, oracle)
        alone = engine.generate([[5, 6]], SamplingParams(max_tokens=4), alone="facts")
        assert len(alone[0].token_ids) == 4


def test_over_ray_too_in_an_actor_less(ray_cluster, folder, oracle):
    with Engine(family(folder)) as engine:
        assert set(engine._actors) == {"coordinator", "large", "base", "prose"}
        agree(engine, oracle)
        with pytest.raises(ValueError, match="starts and ends with its base"):
            engine.remove_expert("math")
        with pytest.raises(ValueError, match="give it as `model`"):
            engine.add_expert("more", {"adapter": str(folder / "math-adapter")})
        merged = {"model": str(folder / "base"), "adapter": str(folder / "math-adapter")}
        engine.add_expert("more", {**merged, "num_cpus": 0.1})
        (output,) = engine.generate(
            [[5, 6]], SamplingParams(max_tokens=4), experts=["math", "more"]
        )
        assert len(output.token_ids) == 4
        engine.remove_expert("prose")
        assert engine.generate([[5, 6]])[0].error is None


def test_an_adapter_with_a_base_of_its_own(folder, oracle, tmp_path):
    """The base that it names is not there any more: where it is stands beside it."""
    moved = shutil.copytree(folder / "base", tmp_path / "moved")
    adapter = shutil.copytree(folder / "facts-adapter", tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "base"), str(tmp_path / "gone")))
    whole = family(folder)
    own = ExpertSpec(model=str(moved), adapter=str(adapter), num_cpus=0.1)
    experts = {**whole.experts, "facts": own}
    with LocalEngine(msgspec.structs.replace(whole, experts=experts)) as engine:
        workers = engine.coordinator.fabric._fabric._workers
        assert set(workers) == {"large", "base", "facts", "prose"}
        agree(engine, oracle)


def test_some_of_them_are_loaded_with_their_base(folder, oracle):
    with LocalEngine(family(folder), models=["large", "base", "facts"]) as engine:
        prompts = prompts_of(3)
        for prompt, output in zip(
            prompts, engine.generate(prompts, experts=["facts"]), strict=True
        ):
            oracle.check(prompt, output, ("facts",))
        with pytest.raises(ValueError, match="no model 'math' is loaded"):
            engine.generate([[5]], experts=["math"])
