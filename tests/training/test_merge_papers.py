"""What the papers of merging report, on a tiny base and three experts that are trained here.

A score is the share (%) of an answer's tokens that a model puts first, given those before.
"""

import merges
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlf_ray.training import demo, train
from dlf_ray.training.corpus import END, TASKS, items

BASE = demo.Size(64, 4, 2, 128, steps=150, lr=4e-3)
RECIPE = demo.Recipe(large=BASE, base=BASE, expert_steps=60, expert_lr=1e-3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The demo's base and experts, but with layers enough to tell depths apart."""
    root = tmp_path_factory.mktemp("trained")
    trainer = demo._Trainer(root, 0, RECIPE, progress=False)
    base = trainer.pretrain("base", BASE)
    for task in TASKS:
        trainer.finetune(task, base, task, RECIPE.expert_steps, RECIPE.expert_lr)
    return root


@pytest.fixture(scope="module")
def score(root):
    """The scores of a model, one for each task."""
    tokenizer = AutoTokenizer.from_pretrained(root / "base")

    def batch(task, split):
        asked = items(task, split, 0)[:100]
        samples = [
            (tokenizer(item.prompt)["input_ids"], tokenizer(item.answer + END)["input_ids"])
            for item in asked
        ]
        return next(train.answer_batches(samples, len(samples), 0))

    batches = {(task, split): batch(task, split) for task in TASKS for split in ("dev", "test")}

    @torch.no_grad()
    def of(folder, split="test"):
        model, found = AutoModelForCausalLM.from_pretrained(folder), {}
        for task in TASKS:
            tokens, learned = batches[task, split]
            first = model(input_ids=tokens).logits[:, :-1].argmax(-1)
            found[task] = 100 * (first == tokens[:, 1:])[learned[:, 1:]].double().mean().item()
        return found

    return of


@pytest.fixture
def merged(root, tmp_path):
    """Merges experts over the base."""

    def make(method, experts, weight=1.0, **parameters):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        models = [merges.source(root / task, weight=weight) for task in experts]
        return merges.merged(
            output, method, models, base_model=root / "base", parameters=parameters
        )

    return make


def mean(values):
    return sum(values) / len(values)


def test_nine_of_ten_numbers_can_go_if_the_others_are_scaled_up(root, score, merged, figure):
    """DARE, arXiv 2311.03099: with lambda at the density, what is kept is as large as it was."""

    def own(folder_of):
        return mean([score(folder_of(task))[task] for task in TASKS])

    whole, base = own(lambda task: root / task), own(lambda task: root / "base")
    scaled = own(lambda task: merged("dare_linear", [task], density=0.1))
    bare = own(lambda task: merged("dare_linear", [task], density=0.1, **{"lambda": 0.1}))
    figure(
        f"experts {whole:.1f} on their own tasks, with 90% of their shifts dropped {scaled:.1f}, "
        f"not scaled up {bare:.1f}, the base {base:.1f}"
    )
    assert whole - scaled < 5 < 10 < whole - bare


def test_deep_layers_may_move_more_than_shallow_ones(score, merged, figure):
    """LiNeS, arXiv 2410.17146: both with the scales that are best on other items, as there."""

    def best(candidates):
        folders = [merged("task_arithmetic", TASKS, **each) for each in candidates]
        chosen = max(folders, key=lambda folder: mean(score(folder, "dev").values()))
        return candidates[folders.index(chosen)], mean(score(chosen).values())

    plain, task_arithmetic = best(
        [{"lambda": scale} for scale in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)]
    )
    grid = [(alpha, beta) for alpha in (0.0, 0.1, 0.2) for beta in (0.2, 0.3, 0.5)]
    scaled, with_lines = best([{"lines": {"alpha": a, "beta": b}} for a, b in grid])
    figure(
        f"three experts in one, average of their tasks: task arithmetic {task_arithmetic:.1f} "
        f"({plain}), with LiNeS {with_lines:.1f} ({scaled})"
    )
    assert with_lines > task_arithmetic
