"""Caches of blocks are planned: none runs out, whatever is asked, shared, remembered or lost."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from conftest import EXPERTS, family_of, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import FUSION, LARGE_ALONE, sequence
from transformers import AutoModelForCausalLM

from dlf_ray import Family, LocalEngine, SamplingParams
from dlf_ray.decoding.scheduler import Scheduler
from dlf_ray.engine.limits import pools_of
from dlf_ray.engine.sharing import joined
from dlf_ray.messages import Description, Pool
from dlf_ray.models.blocks import Blocks, OutOfBlocks
from dlf_ray.models.worker import ModelWorker

BLOCK = 16


class Held:
    """What a worker under vLLM holds of each slot: positions, and blocks for them."""

    def __init__(self, slots, block, blocks):
        self.blocks = Blocks(slots, [block], blocks + 1)
        self.computed = np.zeros(slots, dtype=int)
        self.least = blocks

    def follow(self, plan):
        slots, ends = plan.slots.tolist(), plan.starts + plan.lengths
        sources = plan.sources if len(plan.sources) else np.full(len(slots), -1)
        sources = np.where(sources < 0, plan.slots, sources)
        assert (plan.starts <= self.computed[sources]).all(), "what it begins with is not held"
        self.blocks.begin(sources.tolist(), slots, plan.starts.tolist())
        for slot in set(plan.drops.tolist()) - set(slots):
            self.blocks.drop(slot)
            self.computed[slot] = 0
        for slot, start, end in zip(slots, plan.starts.tolist(), ends.tolist(), strict=True):
            self.blocks.extend(slot, start, end)
        self.blocks.check_integrity()
        self.least = min(self.least, self.blocks.free)
        self.blocks.settle()
        self.computed[slots] = ends


class Paged(ModelWorker):
    """A model that has room for so many blocks, as one under vLLM."""

    blocks = 40
    block = BLOCK

    def load(self):
        description = super().load()
        self.slots = self.engine.max_num_seqs * (1 + len(self.adapters))
        self.held, self.failures = Held(self.slots, self.block, self.blocks), 0
        return dataclasses.replace(
            description, free_bytes=None, block=self.block, blocks=self.blocks
        )

    def compute(self, plan):
        try:
            self.held.follow(plan)
        except OutOfBlocks as error:
            self.failures += 1
            self.held = Held(self.slots, self.block, self.blocks)
            raise torch.OutOfMemoryError("no block is free") from error
        return super().compute(plan)


class Mixed(Paged):
    """Some of the family have blocks, of other numbers and sizes; the rest say nothing of it."""

    def load(self):
        if "large" in self.spec.model or "prose" in self.spec.model:
            self.blocks, self.block = (5, 64) if "large" in self.spec.model else (33, 8)
        description = super().load()
        if "math" not in self.spec.model:
            return description
        self.held.follow = lambda plan: None
        return dataclasses.replace(description, block=0, blocks=0)


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    """Two adapters over the base."""
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("math", "facts")):
        torch.manual_seed(seed)
        how = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"])
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), how)
        for part, weight in model.named_parameters():
            if "lora_" in part:
                torch.nn.init.normal_(weight, std=0.2)
        model.save_pretrained(root / name)
    return root


def family_with_adapters(folder, adapted, **engine):
    given = settings_of(folder, experts=("prose",), **engine)
    own = {name: {"adapter": str(adapted / name)} for name in ("math", "facts")}
    return Family.from_dict({**given, "experts": {**own, **given["experts"]}})


def load_of(count, seed):
    """Prompts that share some of their beginnings, how long each may go on, and with whom."""
    rng = random.Random(seed)
    texts = [[rng.randrange(1, 300) for _ in range(230)] for _ in range(3)]
    asked = []
    for _ in range(count):
        size, new = rng.choice([1, 5, 17, 40, 90, 200]), rng.choice([1, 3, 8, 25])
        keep = rng.choice([0, size // 2, size - 1])
        rest = [rng.randrange(1, 300) for _ in range(size - keep)]
        prompt = [*rng.choice(texts)[:keep], *rest]
        names = rng.sample(EXPERTS, rng.randrange(1, 4))
        asked.append((prompt, SamplingParams(max_tokens=new), [n for n in EXPERTS if n in names]))
    return asked


def answers(engine, asked, quit=()):
    """All at once; those in `quit` are aborted after two chunks."""
    streams = [engine.stream(prompt, sampling, experts=names) for prompt, sampling, names in asked]
    chunks = [[] for _ in asked]
    left = dict(enumerate(streams))
    while left:
        for at, stream in list(left.items()):
            if (piece := next(stream, None)) is not None:
                chunks[at].append(piece)
            if piece is None or (at in quit and len(chunks[at]) == 2):
                stream.close()
                del left[at]
    engine.coordinator.scheduler.slots.check_integrity()
    return ["".join(piece.text for piece in each) for each in chunks]


@pytest.mark.parametrize("kind", ["own", "mixed", "adapters"])
@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "not sharing"])
def test_blocks_never_run_out(folder, request, kind, sharing):
    engine = {"max_num_seqs": 8, "enable_prefix_caching": sharing, "max_num_batched_tokens": 96}
    if kind == "adapters":
        family = family_with_adapters(folder, request.getfixturevalue("adapted"), **engine)
    else:
        family = family_of(folder, **engine)
    worker = {"own": Paged, "mixed": Mixed, "adapters": type("", (Paged,), {"blocks": 70})}[kind]
    with LocalEngine(family) as plain, LocalEngine(family, worker=worker) as small:
        fabric = small.coordinator.fabric
        workers = getattr(fabric, "_fabric", fabric)._workers
        for seed in range(3):
            asked = load_of(24, seed)
            quit = set(range(0, 24, 5))
            expected = answers(plain, asked, quit)
            assert answers(small, asked, quit) == expected
            assert {name: each.failures for name, each in workers.items()} == dict.fromkeys(
                workers, 0
            )
        assert min(each.held.least for each in workers.values()) < 20, "it was never tight"


@pytest.mark.parametrize("adapters", [False, True])
def test_a_pool_too_small_for_one_sequence_says_what_would_fit(folder, request, adapters):
    class Tiny(Paged):
        blocks = 26

    def family(length):
        if adapters:
            return family_with_adapters(
                folder, request.getfixturevalue("adapted"), max_model_len=length
            )
        return family_of(folder, max_model_len=length)

    fits = 26 // 3 * BLOCK if adapters else 26 * BLOCK
    with pytest.raises(ValueError, match=rf" of {fits} tokens.*max_model_len: {fits}\}}"):
        LocalEngine(family(fits + 80), worker=Tiny)
    with pytest.raises(ValueError, match=rf"max_model_len: {fits}\}}"):
        LocalEngine(family(fits + 1), worker=Tiny)
    with LocalEngine(family(fits), worker=Tiny) as engine:
        prompts = [[5 + n] * (fits - 4) for n in range(3)]
        outputs = engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
        assert [(each.error, len(each.token_ids)) for each in outputs] == [(None, 4)] * 3
        fabric = engine.coordinator.fabric
        for worker in getattr(fabric, "_fabric", fabric)._workers.values():
            assert not worker.failures


def test_models_of_a_worker_that_are_not_loaded_take_nothing_of_its_pool(folder, adapted):
    family = family_with_adapters(folder, adapted, max_model_len=160)
    each = Description(300, "", (), 512, 1, "cpu", "float32", block=16, blocks=20)
    lengths = dict.fromkeys(("base", "math"), 160)
    pools = pools_of(family, dict.fromkeys(lengths, each), lengths)
    assert pools == dict.fromkeys(lengths, Pool("base", 320, 16))


SHARED = ("base", "math")


class World:
    """Workers as the coordinator's scheduler drives them; the base's has the expert too."""

    def __init__(self, slots, blocks, block):
        self.slots, self.size = slots, (block, blocks)
        self.held = {"large": self.fresh("large"), "base": self.fresh("base")}

    def fresh(self, worker):
        count = len(SHARED) if worker == "base" else 1
        return Held(self.slots * count, self.size[0], self.size[1] * count)

    def pools(self):
        block, blocks = self.size
        shared = Pool("base", blocks * block * len(SHARED), block)
        return {"large": Pool("large", blocks * block, block), **dict.fromkeys(SHARED, shared)}

    def follow(self, plans):
        if "large" in plans:
            self.held["large"].follow(plans["large"])
        own = {at: plans[name] for at, name in enumerate(SHARED) if name in plans}
        if own:
            self.held["base"].follow(joined(own, len(SHARED), [(1, 1)]))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    slots=st.integers(2, 6),
    block=st.sampled_from([4, 16, 40, 128]),
    spare=st.integers(0, 7),
    budget=st.sampled_from([3, 8, 20, 60, 150]),
    loses=st.booleans(),
)
def test_no_plan_asks_for_more_blocks_than_there_are(seed, slots, block, spare, budget, loses):
    """Sequences begin alike or not, end early, fail, or are computed again after a loss."""
    rng = random.Random(seed)
    asked = [
        (
            rng.randrange(3),
            rng.choice([1, 16, 17, 20, 33, 40, 64, 90, 150, rng.randrange(1, 150)]),
            rng.randrange(1, rng.choice([5, 60])),
            rng.random() < 0.5,
            rng.randrange(30),
        )
        for _ in range(rng.randrange(4, 30))
    ]
    longest = max(size + new for _, size, new, _, _ in asked)
    world = World(slots, -(-longest // block) + spare, block)
    scheduler = Scheduler(max_num_seqs=slots, max_num_batched_tokens=budget, pools=world.pools())
    ends, waiting = {}, []
    for id, (text, size, new, with_base, end) in enumerate(asked):
        prompt = range(1000 * text, 1000 * text + size)
        made = sequence(id, prompt, new, fusion=FUSION if with_base else LARGE_ALONE)
        ends[made] = min(end, new)
        waiting.append(made)
    steps = 0
    while waiting or scheduler.has_work or scheduler.stalled:
        steps += 1
        assert steps < 5000
        while waiting and rng.random() < 0.7:
            scheduler.add(waiting.pop(0))
        for model in list(scheduler.away):
            scheduler.recover(model)
        if not scheduler.has_work:
            continue
        step = scheduler.plan()
        scheduler.slots.check_integrity()
        world.follow(step.plans)
        lost = rng.choice(["large", "base"]) if loses and rng.random() < 0.02 else None
        for each, count in step.ready.items():
            models = set(SHARED) if lost == "base" else {lost}
            if models & set(each.computed):
                scheduler.retract(each, count)
                continue
            each.generated.append(rng.randrange(7))
            if len(each.generated) >= ends[each] or rng.random() < 0.02:
                scheduler.remove(each, failed=rng.random() < 0.2)
        if lost:
            world.held[lost] = world.fresh(lost)
            for model in SHARED if lost == "base" else ("large",):
                scheduler.lose(model)
        scheduler.slots.check_integrity()
    assert not scheduler.running
