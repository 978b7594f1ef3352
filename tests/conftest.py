"""Shared by all tests: tiny families on disk, requests, and a Ray cluster that is kept clean.

Two processes divide the test files (pytest-xdist), each with a cluster of its own once it needs
one; `pytest -n 0` runs everything in one process.
"""

import contextlib
import os
import subprocess
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is a mistake
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Serve's proxies start while others load models: 5 s are too few, then they are killed and missed
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
os.environ["OMP_NUM_THREADS"] = "1"  # in what tests start, too: the cores are shared
# What they start, actors too, imports the tests' own modules.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)

import numpy as np
import pytest
import smollm2 as real
import tiny
import torch
import workers
import yaml
from oracle import Oracle
from processes import end, free_port, groups, one_at_a_time, settled
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dlf_ray import Engine, Family, SamplingParams
from dlf_ray.cli import app

EXPERTS = ("math", "facts", "prose")
LONGEST_FIRST = (
    *("serve_operation", "faults", "serve", "jobs", "health", "experts", "playground", "nodes"),
    *("ends", "chaos", "engine", "real_model", "smollm2", "autoscaling", "serve_ends", "clients"),
    *("laptop", "metrics", "evaluate", "adapters", "structure", "check", "local", "merge_papers"),
)
"""Of the test files, so that the processes end at about the same time."""
FIGURES = "figures"


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


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny model of each architecture."""
    root = tmp_path_factory.mktemp("models")
    return {arch: tiny.model(root / arch, arch, vocab=300) for arch in tiny.ARCHS}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """A folder with a real chat model: SmolLM2-135M-Instruct. Skips where its file is not here."""
    return real.save(tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def light_folder(tmp_path_factory) -> Path:
    """The same family for workers that are `Light`."""
    root = tmp_path_factory.mktemp("light")
    for name in ("large", "base", *EXPERTS):
        workers.light_model(root / name)
    return root


def pad_vocabulary(model: Path, size: int) -> None:
    """More rows of logits than tokens, as some model families have: they must never be chosen."""
    padded = AutoModelForCausalLM.from_pretrained(model)
    padded.resize_token_embeddings(size)
    with torch.no_grad():
        padded.lm_head.weight[300:] = 3.0
    padded.save_pretrained(model)


def settings_of(folder, experts=EXPERTS, num_gpus=0, **engine):
    """A family file of the tiny models, as a dict."""

    def spec(name):
        return {"model": str(folder / name), "num_cpus": 0.1, "num_gpus": num_gpus}

    settings = {"max_num_seqs": 8, "max_model_len": 256, "num_cpus": 0.1, "num_gpus": num_gpus}
    return {
        "large": spec("large"),
        "base": spec("base"),
        "experts": {name: spec(name) for name in experts},
        "engine": {**settings, **engine},
    }


def adapted(root: Path, targets=("q_proj", "v_proj", "up_proj"), **model) -> Path:
    """A large model, a base, and experts as LoRA adapters over it (NAME-adapter) and merged."""
    from peft import LoraConfig, get_peft_model

    tiny.model(root / "large", **{"layers": 3, "vocab": 300, "seed": 1, **model})
    pad_vocabulary(root / "large", 320)
    tiny.model(root / "base", seed=2, **model)
    for seed, name in enumerate(EXPERTS):
        torch.manual_seed(seed)
        how = LoraConfig(r=4, lora_alpha=4, target_modules=list(targets))
        how.init_lora_weights = False
        expert = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), how)
        expert.save_pretrained(root / f"{name}-adapter")
        expert.merge_and_unload().save_pretrained(root / name)
        tiny.tokenizer(root / name)
    return root


def family_of(folder: Path, experts=EXPERTS, fusion=None, **settings) -> Family:
    return Family.from_dict({**settings_of(folder, experts, **settings), "fusion": fusion or {}})


def family_file(folder, to, experts=EXPERTS, **settings):
    to.write_text(yaml.safe_dump(settings_of(folder, experts, **settings)))
    return str(to)


def prompts_of(count, longest=200, seed=0):
    """Token ids of `count` prompts, between 1 and `longest` long."""
    rng = np.random.default_rng(seed)
    lengths = [1, longest, *rng.integers(1, longest, size=max(0, count - 2))][:count]
    return [rng.integers(1, 300, size=length).tolist() for length in lengths]


def params_of(count, seed=1):
    """Different lengths, so that sequences leave, and others join, at different steps."""
    rng = np.random.default_rng(seed)
    return [SamplingParams(max_tokens=int(n)) for n in rng.integers(3, 16, size=count)]


def dlf(*words):
    """Runs the `dlf` command in this process."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, words)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def figure(record_property):
    """Takes a sentence with what was measured, shown after the last test."""
    return lambda text: record_property(FIGURES, text)


def pytest_terminal_summary(terminalreporter):
    reports = (each for kind in terminalreporter.stats.values() for each in kind)
    told = [
        f"{report.nodeid}: {text}"
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, text in report.user_properties
        if name == FIGURES
    ]
    if told:
        terminalreporter.section("figures")
        for line in told:
            terminalreporter.write_line(line)


@pytest.fixture(scope="module")
def oracle(folder):
    made = Oracle(folder)
    yield made
    print(f"\n{made.tokens} tokens against the oracle, {made.ties} ties")
    assert made.ties <= 0.02 * made.tokens


@pytest.fixture(scope="session")
def ray_cluster():
    import ray

    with one_at_a_time():
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def root(ray_cluster):
    """The address of Serve."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def engine_of(ray_cluster):
    """Starts engines that end with the test, if not before."""
    with contextlib.ExitStack() as started:
        yield lambda family, **options: started.enter_context(Engine(family, **options))


@pytest.fixture
def program():
    """Starts programs that end with the test, if not before."""
    with contextlib.ExitStack() as started:

        def start(*command, stderr=subprocess.PIPE, **options):
            process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=stderr, text=True, **options
            )
            started.callback(end, process)
            return process

        yield start


@pytest.fixture(scope="module", autouse=True)
def _module_leaves_nothing():
    """The first of a module's fixtures, so that it ends last."""
    yield
    if found := _leftovers(kept=()):
        pytest.fail(f"left behind, now removed: {found}")


@pytest.fixture(autouse=True)
def _test_leaves_nothing(_module_leaves_nothing):
    """Beside the engines of the module's own fixtures. Serve makes and frees room by itself."""
    ours = _our_cluster()
    kept = groups() if ours and not _served() else None
    yield
    if kept is not None and not _served() and (found := _leftovers(kept)):
        pytest.fail(f"left behind, now removed: {found}")


def _our_cluster():
    import ray

    return ray.is_initialized()


def _served():
    """Whether Serve runs on our cluster."""
    import ray

    every = ray.util.list_named_actors(all_namespaces=True)
    return any(each["name"] == "SERVE_CONTROLLER_ACTOR" for each in every)


def _leftovers(kept):
    """Frees what the tests so far have left on the cluster, beside `kept`; says what it was."""
    if not _our_cluster():
        return []
    import ray
    from ray import serve
    from ray._raylet import PlacementGroupID

    found = []
    if not settled(lambda: not _served(), timeout_s=20):
        found.append("Serve")
        serve.shutdown()
    if not settled(lambda: set(groups()) <= set(kept), timeout_s=20):
        left = set(groups()) - set(kept)
        found += sorted(left)
        for id in left:  # and with it, whatever lives in it
            group = ray.util.placement_group.PlacementGroup(PlacementGroupID.from_hex(id))
            ray.util.remove_placement_group(group)
        settled(lambda: set(groups()) <= set(kept))
    return found
