"""Shared by all tests: a tiny family on disk, and one Ray cluster for the session."""

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is a mistake
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import tiny
from oracle import Oracle
from transformers import AutoModelForCausalLM

from dlf_ray import Family

EXPERTS = ("math", "facts", "prose")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A large model with a padded vocabulary, a base, and experts a little away from the base."""
    root = tmp_path_factory.mktemp("family")
    tiny.model(root / "large", hidden=48, layers=3, vocab=300, seed=1)
    pad_vocabulary(root / "large", 320)
    tiny.model(root / "base", seed=2)
    for seed, name in enumerate(EXPERTS):
        expert = AutoModelForCausalLM.from_pretrained(root / "base")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in expert.parameters():
                weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
        tiny.tokenizer(root / name)
        expert.save_pretrained(root / name)
    return root


def pad_vocabulary(model: Path, size: int) -> None:
    """More rows of logits than tokens, as some model families have: they must never be chosen."""
    padded = AutoModelForCausalLM.from_pretrained(model)
    padded.resize_token_embeddings(size)
    with torch.no_grad():
        padded.lm_head.weight[300:] = 3.0
    padded.save_pretrained(model)


def family_of(folder: Path, experts=EXPERTS, fusion=None, num_gpus=0, **engine) -> Family:
    def spec(name):
        return {"model": str(folder / name), "num_cpus": 0.1, "num_gpus": num_gpus}

    return Family.from_dict(
        {
            "large": spec("large"),
            "base": spec("base"),
            "experts": {name: spec(name) for name in experts},
            "fusion": fusion or {},
            "engine": {
                "max_num_seqs": 8,
                "max_model_len": 256,
                "num_cpus": 0.1,
                "num_gpus": num_gpus,
                **engine,
            },
        }
    )


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def oracle(folder):
    made = Oracle(folder)
    yield made
    print(f"\n{made.tokens} tokens against the oracle, {made.ties} ties")
    assert made.ties <= 0.02 * made.tokens


@pytest.fixture(scope="session")
def ray_cluster():
    import ray

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # actors import the tests' own workers
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
