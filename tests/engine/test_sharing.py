"""Workers of several models: what is joined on the way out comes apart again on the way back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlf_ray.engine.sharing import SharedWorkers, joined
from dlf_ray.messages import Failed, Lost, Ready
from dlf_ray.plans import ALL, Logits, Plan

VOCAB = 3
MODELS = ("base", "math", "facts")
"""Of one worker; `large` has its own."""
LIMITS = st.integers(0, 40) | st.just(ALL)


def ints(values):
    return np.array(values, dtype=np.int32)


@st.composite
def plans(draw, step=1, models=False):
    slots = draw(st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=6))
    count = len(slots)

    def each(of):
        return ints(draw(st.lists(of, min_size=count, max_size=count)))

    lengths = each(st.integers(1, 5))
    wants = ints([draw(st.integers(0, most)) for most in lengths.tolist()])
    tokens = ints([draw(st.integers(0, 299)) for _ in range(lengths.sum())])
    return Plan(
        step,
        ints(slots),
        each(st.integers(0, 50)),
        lengths,
        wants,
        tokens,
        sources=each(st.integers(-1, 12)) if draw(st.booleans()) else ints([]),
        keep=draw(LIMITS),
        keep_length=draw(LIMITS),
        drops=ints(draw(st.lists(st.integers(0, 12), unique=True, max_size=4))),
        models=each(st.integers(0, 4)) if models else ints([]),
    )


def of_models(names=("large", *MODELS)):
    """A step: for some of the models a plan each, in any order."""
    some = st.lists(st.sampled_from(names), unique=True, min_size=1)
    return some.flatmap(lambda found: st.fixed_dictionaries(dict.fromkeys(found, plans())))


def column(plan, name):
    values = getattr(plan, name)
    if name == "sources" and not len(values):
        return [-1] * len(plan.slots)
    return values.tolist()


@settings(deadline=None)
@given(plan=plans(models=True) | plans(), step=st.integers(0, 2**60))
def test_a_plan_is_the_same_after_its_bytes(plan, step):
    object.__setattr__(plan, "step", step)
    data = plan.to_bytes()
    back = Plan.from_bytes(memoryview(data))
    for name in ("slots", "starts", "lengths", "wants", "tokens", "sources", "drops", "models"):
        assert getattr(back, name).dtype == np.int32
        assert getattr(back, name).tolist() == getattr(plan, name).tolist(), name
    assert (back.step, back.keep, back.keep_length) == (step, plan.keep, plan.keep_length)
    for cut in (data[:-4], data + bytes(4), data[:10], b"nope" + data[4:]):
        with pytest.raises(ValueError, match="plan"):
            Plan.from_bytes(cut)


@settings(deadline=None)
@given(own=st.dictionaries(st.integers(0, 3), plans(), min_size=1), kept=st.data())
def test_every_slot_keeps_its_model_and_its_place(own, kept):
    count = 4
    limits = kept.draw(st.lists(st.tuples(LIMITS, LIMITS), min_size=1, max_size=count))
    whole = Plan.from_bytes(joined(own, count, limits).to_bytes())
    begin = first = 0
    drops = []
    for place, plan in own.items():
        rows = slice(begin, begin + len(plan.slots))
        assert (whole.slots[rows] % count == place).all()
        assert (whole.slots[rows] // count).tolist() == plan.slots.tolist()
        assert whole.models[rows].tolist() == [place] * len(plan.slots)
        for name in ("starts", "lengths", "wants"):
            assert column(whole, name)[rows] == column(plan, name)
        expected = [-1 if n < 0 else n * count + place for n in column(plan, "sources")]
        assert column(whole, "sources")[rows] == expected
        size = len(plan.tokens)
        assert whole.tokens[first : first + size].tolist() == plan.tokens.tolist()
        drops += [slot * count + place for slot in plan.drops.tolist()]
        begin, first = rows.stop, first + size
    assert (begin, first) == (len(whole.slots), len(whole.tokens))
    assert whole.drops.tolist() == drops
    assert whole.rows == sum(plan.rows for plan in own.values())
    assert len(set(whole.slots.tolist())) == len(whole.slots)
    assert len(whole.sources) in (0, len(whole.slots))
    # What any of them keeps is within what the whole keeps; the smallest such.
    keep, length = (max(each) for each in zip(*limits, strict=True))
    assert whole.keep == min(ALL, keep * count)
    assert whole.keep_length == length


class Workers:
    """A fabric: each row of logits names its worker's slot and its place in that; on order, a
    worker answers otherwise."""

    def __init__(self):
        self.sent = []
        self.answers = {}
        self.news = []

    def send(self, plans):
        self.sent.append(plans)

    def receive(self, plans):
        assert plans is self.sent[-1]
        for name, plan in reversed(plans.items()):
            yield name, self.answers.get(name) or self.logits(plan)
        yield from self.answers.get("besides", ())

    def changes(self):
        return iter(self.news)

    @staticmethod
    def logits(plan):
        rows = [
            [slot, at, at % 2]
            for slot, wants in zip(plan.slots.tolist(), plan.wants.tolist(), strict=True)
            for at in range(wants)
        ]
        values = torch.tensor(rows, dtype=torch.float32).view(-1, VOCAB)
        return Logits(plan.step, values, values[:, 2].numpy() == 0, 0.5, 7.0)


def shared():
    workers = Workers()
    return workers, SharedWorkers(workers, {"base": MODELS, "large": ("large",)})


@settings(deadline=None)
@given(steps=st.lists(of_models(("large", "other", *MODELS)), min_size=1, max_size=4))
def test_every_model_gets_its_own_rows(steps):
    workers, fabric = shared()
    kept = {}
    for own in steps:
        kept |= {name: (plan.keep, plan.keep_length) for name, plan in own.items()}
        fabric.send(own)
        sent = workers.sent[-1]
        assert set(sent) == {name if name not in MODELS else "base" for name in own}
        for alone in {"large", "other"} & set(own):
            assert sent[alone] is own[alone]
        if "base" in sent:  # what those keep that compute nothing now, too
            limits = [kept[name] for name in MODELS if name in kept]
            assert sent["base"].keep == min(ALL, 3 * max(keep for keep, _ in limits))
            assert sent["base"].keep_length == max(length for _, length in limits)
        found = list(fabric.receive(own))
        assert sorted(name for name, _ in found) == sorted(own)
        for name, answer in found:
            expected = workers.logits(own[name])
            slots = expected.values[:, 0]
            if name in MODELS:
                slots = slots * 3 + MODELS.index(name)
            assert answer.values[:, 0].tolist() == slots.tolist()
            assert torch.equal(answer.values[:, 1:], expected.values[:, 1:])
            assert answer.finite.tolist() == expected.finite.tolist()
            assert (answer.step, answer.seconds, answer.began) == (1, 0.5, 7.0)


@settings(deadline=None)
@given(own=of_models(("large", *MODELS)))
def test_an_error_is_that_of_the_models_in_the_plan(own):
    workers, fabric = shared()
    failed = Failed(1, "oh")
    workers.answers = {"base": failed, "large": failed}
    fabric.send(own)
    assert sorted(fabric.receive(own), key=str) == sorted(((n, failed) for n in own), key=str)


@settings(deadline=None)
@given(own=of_models(("large", *MODELS)))
def test_without_memory_all_of_a_worker_have_lost_what_they_computed(own):
    workers, fabric = shared()
    failed = Failed(1, "no memory", out_of_memory=True)
    workers.answers = {"base": failed, "large": failed}
    fabric.send(own)
    told = [name for name, answer in fabric.receive(own) if answer is failed]
    every = {"large"} & set(own) | (set(MODELS) if set(MODELS) & set(own) else set())
    assert sorted(told) == sorted(every)


@settings(deadline=None)
@given(own=of_models(("large", *MODELS)))
@pytest.mark.parametrize("change", [Lost("died"), Ready()])
def test_a_worker_comes_and_goes_with_all_its_models(own, change):
    workers, fabric = shared()
    workers.news = [("base", change), ("other", change)]
    expected = [(name, change) for name in (*MODELS, "other")]
    assert list(fabric.changes()) == expected
    workers.answers = {"base": change, "large": change, "besides": [("other", change)]}
    fabric.send(own)
    every = {"large"} & set(own) | (set(MODELS) if set(MODELS) & set(own) else set()) | {"other"}
    assert sorted(name for name, answer in fabric.receive(own) if answer is change) == sorted(every)
