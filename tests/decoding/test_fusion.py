"""The fusion against its oracle, the stored vectors, and every identity of the method."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import TESTS
from reference import Answer
from reference import fuse as oracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlf_ray.decoding import fusion
from dlf_ray.decoding.fusion import Fused, aim, fuse, weigh, widened
from dlf_ray.rules import RULES, SELECTS

VECTORS = sorted((TESTS / "vectors").glob("*.json"))
FIXED = tuple(name for name, rule in RULES.items() if not rule.searches)
SEARCHES = tuple(name for name, rule in RULES.items() if rule.searches)


def examples(**strategies):
    """`given` for these tests: a fixed set of cases, however long one takes."""
    return lambda test: settings(deadline=None, max_examples=60, derandomize=True)(
        given(**strategies)(test)
    )


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def device(request):
    return request.param


class Case(NamedTuple):
    large: Tensor  # [R, V]
    base: Tensor  # [R, V]
    experts: Tensor  # [T, R, V]

    def to(self, device):
        return Case(*(x.to(device) for x in self))


def make(seed, rows, vocab, experts, spread=3.0, shift=1.0):
    """Related models, as fine-tuning leaves them. In steps of 1/64, so that adding an integer is
    exact."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape, scale):
        return (torch.randn(*shape, generator=draw) * scale * 64).round() / 64

    base = noise(rows, vocab, scale=spread)
    large = base + noise(rows, vocab, scale=spread / 2)
    each = torch.linspace(0.6, 1.4, experts)[:, None, None] if experts > 1 else 1.0
    return Case(large, base, base + noise(experts, rows, vocab, scale=shift * each))


def cases(min_experts=1, max_experts=3, rows=2):
    return st.builds(
        make,
        seed=st.integers(0, 2**32),
        rows=st.just(rows),
        vocab=st.sampled_from([3, 17, 96, 257]),
        experts=st.integers(min_experts, max_experts),
        spread=st.sampled_from([1.0, 3.0, 8.0]),
        shift=st.sampled_from([0.1, 1.0, 3.0]),
    )


selects, rules, searches = map(st.sampled_from, (tuple(SELECTS), tuple(RULES), SEARCHES))


def slack(loss, *divergences, count=1):
    """How far float32 may be off a loss: d L = 2 sqrt(count L) d + count d^2 for an error d of the
    divergences, which is relative (1e-5), and for small ones what the rounding of the shift is."""
    largest = max(divergences)
    error = 1e-5 * largest + 1e-6 * math.sqrt(largest)
    return 2 * error * math.sqrt(count * loss) + count * error**2 + 1e-15


def assert_same(one: Fused, two: Fused, count=1, tolerance=1e-4):
    """Equal answers, but for rows where two candidates are as good as float32 can tell."""
    for row in range(len(one.loss)):
        loss, other = float(one.loss[row]), float(two.loss[row])
        worse = max(loss, other)
        largest = float(torch.maximum(one.kl[row], two.kl[row]).max())
        # the target is at most that far from what was reached
        assert abs(loss - other) <= slack(worse, largest + math.sqrt(worse), count=count)
        if torch.allclose(one.weights[row].sum(), two.weights[row].sum(), atol=tolerance):
            torch.testing.assert_close(
                one.logits[row].log_softmax(-1),
                two.logits[row].log_softmax(-1),
                atol=50 * tolerance,
                rtol=tolerance,
            )


def assert_answers(case: Case, fused: Fused, select="paper", bounds=None, **how):
    """Each row of `fused` is the oracle's answer, or the oracle finds it as good."""
    count = len(case.experts)
    step = how.get("step", 0.1)
    for row in range(len(case.large)):
        large, base, experts = case.large[row], case.base[row], case.experts[:, row]
        answer: Answer = oracle(large, base, experts, select=select, bounds=bounds, **how)
        weights, kl = fused.weights[row].tolist(), fused.kl[row].tolist()
        d = 0
        if how.get("rule") in FIXED:
            k = 0
        elif select == "blend":
            shares = [pull / sum(answer.pulls) for pull in answer.pulls]
            k = round((sum(weights) - (bounds or [(0, 2)])[0][0]) / step)
            assert weights == pytest.approx([sum(weights) * s for s in shares], rel=2e-3, abs=1e-6)
        else:
            spoken = [t for t in range(count) if weights[t]]
            assert len(spoken) <= 1
            limits = bounds or [(0, 2)] * count
            strongest = answer.pulls.index(max(answer.pulls))
            silent = [t for t, (low, high) in enumerate(limits) if low <= 0 <= high]
            expert = (spoken or ([strongest] if select == "strongest" else silent))[0]
            if select == "paper":
                d = expert
            elif expert != strongest:
                assert answer.pulls[expert] == pytest.approx(answer.pulls[strongest], rel=1e-4)
                continue
            k = round((weights[expert] - limits[expert][0]) / step)
        candidate = answer.table[d][k]
        aims = [*answer.kl, *kl, *answer.pulls]
        allowed = slack(max(candidate, answer.loss), *aims, count=count)
        assert float(fused.loss[row]) == pytest.approx(candidate, abs=allowed)
        assert candidate <= answer.loss + allowed
        if candidate == answer.loss:
            assert weights == pytest.approx(answer.weights, rel=2e-3, abs=1e-6)
            logprobs = fused.logits[row].cpu().double().log_softmax(-1)
            torch.testing.assert_close(logprobs, answer.logprobs, atol=2e-5, rtol=2e-5)
            assert kl == pytest.approx(answer.kl, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_vectors(path, device):
    assert len(VECTORS) == 6
    case = json.loads(path.read_text())
    large, base = (torch.tensor(case[key], device=device)[None] for key in ("large", "base"))
    experts = torch.tensor(case["experts"], device=device)[:, None]
    answer = case["answer"]
    paper = [0.0] * len(experts)
    paper[answer["expert"]] = answer["alpha"]
    for select, expected in (
        ("paper", {**answer, "weights": paper}),
        ("strongest", case["answer_strongest"]),
        ("blend", case["answer_blend"]),
    ):
        fused = fuse(large, base, experts, select=select)
        if select == "blend":
            assert fused.weights[0].tolist() == pytest.approx(expected["weights"], rel=1e-5)
        else:
            assert torch.equal(fused.weights[0].cpu(), torch.tensor(expected["weights"]))
        assert fused.loss.item() == pytest.approx(expected["loss"], rel=1e-4, abs=1e-7)
        logprobs = fused.logits[0].cpu().log_softmax(-1)
        torch.testing.assert_close(
            logprobs, torch.tensor(expected["logprobs"]), atol=1e-5, rtol=1e-6
        )


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_oracle_is_the_vectors(path):
    case = json.loads(path.read_text())
    given_ = [torch.tensor(case[k], dtype=torch.float64) for k in ("large", "base", "experts")]
    answer = oracle(*given_)
    for found, expected in zip(answer.table, case["answer"]["loss_table"], strict=True):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert answer.weights[case["answer"]["expert"]] == pytest.approx(case["answer"]["alpha"])
    for select in ("strongest", "blend"):
        expected = case[f"answer_{select}"]
        answer = oracle(*given_, select=select)
        assert answer.weights == pytest.approx(expected["weights"], abs=1e-12)
        assert answer.loss == pytest.approx(expected["loss"], rel=1e-9)


@examples(case=cases(), rule=st.sampled_from(["grid", *FIXED]), select=selects)
def test_oracle(device, case, rule, select):
    select = "paper" if rule in FIXED else select
    assert_answers(case, fuse(*case.to(device), rule=rule, select=select), rule=rule, select=select)


@examples(case=cases(max_experts=1), rule=st.sampled_from(["entropy", "consistency"]))
def test_weights_that_share_out_one(device, case, rule):
    """One expert has the weight 1, copies of it share that, and so do any experts."""
    large, base, experts = case.to(device)
    alone = fuse(large, base, experts, rule=rule)
    static = fuse(large, base, experts, rule="static")
    assert torch.equal(alone.weights, torch.ones_like(alone.weights))
    torch.testing.assert_close(alone.logits, static.logits)
    copies = fuse(large, base, experts.expand(3, -1, -1), rule=rule)
    torch.testing.assert_close(copies.weights, torch.full_like(copies.weights, 1 / 3))
    torch.testing.assert_close(copies.logits, static.logits)
    several = fuse(large, base, torch.cat([experts, 2 * experts, large[None]]), rule=rule)
    torch.testing.assert_close(several.weights.sum(-1), torch.ones_like(several.loss))


def test_who_is_sure_or_agrees_weighs_more(device):
    """Two experts agree on a token, one of them surer; the third is as sure of another one."""
    likes = [(3, 6.0), (3, 4.0), (5, 6.0)]
    experts = torch.zeros(3, 1, 96, device=device)
    for logits, (token, logit) in zip(experts, likes, strict=True):
        logits[0, token] = logit
    zero = torch.zeros(1, 96, device=device)
    sure, agreed = (
        fuse(zero, zero, experts, rule=rule).weights[0].tolist()
        for rule in ("entropy", "consistency")
    )
    assert sure[0] == pytest.approx(sure[2])
    assert sure[0] > 1.5 * sure[1]
    assert agreed[0] > agreed[2]
    assert agreed[0] > agreed[1]


@pytest.mark.parametrize("select", SELECTS)
def test_oracle_over_many_blocks(device, select):
    for shape in (3, 30_000, 3), (1, 150_000, 1):
        case = make(5, *shape)
        assert_answers(case, fuse(*case.to(device), select=select), select=select)


@examples(
    case=cases(min_experts=2, max_experts=2), select=selects, step=st.sampled_from([0.25, 0.03])
)
def test_oracle_with_bounds_and_steps(device, case, select, step):
    for bounds in [(0.0, 1.0), (0.0, 1.7)], [(0.5, 0.9), (0.0, 3.0)], [(-1.0, 2.0), (-0.6, -0.1)]:
        bounds = bounds[:1] * 2 if select == "blend" else bounds
        fused = fuse(*case.to(device), select=select, step=step, bounds=bounds)
        assert_answers(case, fused, select=select, step=step, bounds=bounds)


@examples(case=cases(), select=selects)
def test_exact_is_a_minimum(device, case, select):
    grid = fuse(*case.to(device), select=select)
    exact = fuse(*case.to(device), rule="exact", select=select)
    assert (exact.loss <= grid.loss).all()
    for row in range(len(case.large)):
        dense = oracle(
            case.large[row], case.base[row], case.experts[:, row], select=select, step=1 / 200
        )
        allowed = slack(dense.loss, *dense.kl, *dense.pulls, count=len(case.experts))
        # near weight 0 all is flat, and a miss of 1e-6 nats is as good as none
        assert exact.loss[row] <= dense.loss + allowed + 1e-12


def test_exact_solves_where_it_can():
    """With Gaussian-like shifts both divergences can be met nearly: a step of the grid cannot."""
    case = make(seed=1, rows=8, vocab=257, experts=1, shift=0.5)
    grid, exact = fuse(*case), fuse(*case, rule="exact")
    assert (exact.loss / grid.loss).median() < 0.5
    assert ((exact.weights - grid.weights).abs() < 0.1 + 1e-6).all()
    assert ((exact.weights * 10) % 1 > 1e-3).any()


def test_exact_leaves_weight_zero(device):
    """The loss is stationary there, so that a step of Newton's method alone would stay."""
    case = make(seed=7, rows=16, vocab=257, experts=1).to(device)
    grid, exact = (fuse(*case, rule=rule, step=1.0, bounds=[(0.0, 2.0)]) for rule in SEARCHES)
    stuck = grid.weights[:, 0] == 0
    assert stuck.any()
    assert (exact.loss[stuck] < grid.loss[stuck] / 10).all()


@pytest.mark.parametrize("search", SEARCHES)
def test_bounds_bind(device, search):
    case = make(seed=8, rows=16, vocab=257, experts=1).to(device)
    free = fuse(*case, rule=search).weights
    assert ((free > 1.1) | (free < 0.8)).any()
    # the upper bound is a candidate although 0.3 / 0.1 is below 3 in floating point
    assert fuse(*case, rule=search, bounds=[(0.0, 0.3)]).weights.amax().item() == pytest.approx(0.3)
    weights = fuse(*case, rule=search, bounds=[(0.8, 1.1)]).weights
    assert weights.min().item() == pytest.approx(0.8)
    assert weights.max().item() == pytest.approx(1.1)


@examples(case=cases(), search=searches, select=selects, constant=st.integers(-50, 50))
def test_expert_equal_to_base(device, case, search, select, constant):
    equal = (case.base + constant).expand_as(case.experts)
    for low in 0.0, 0.3:
        bounds = [(low, 2.0)] * len(equal)
        same = Case(case.large, case.base, equal).to(device)
        fused = fuse(*same, rule=search, select=select, bounds=bounds)
        assert fused.weights.sum(-1).tolist() == pytest.approx([low, low])
        assert not fused.kl.any()
        assert not fused.loss.any()
        torch.testing.assert_close(fused.logits.softmax(-1), same.large.softmax(-1))


@examples(case=cases(), rule=rules, select=st.sampled_from(["strongest", "blend"]))
def test_large_equal_to_base(device, case, rule, select):
    _, base, experts = case.to(device)
    if rule in FIXED:
        experts = experts[:1]
    fused = fuse(base, base, experts, rule=rule, select=select)
    assert fused.weights.sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=2e-3)
    allowed = [slack(0.0, *kl) for kl in fused.kl.tolist()]
    assert all(loss <= most for loss, most in zip(fused.loss.tolist(), allowed, strict=True))
    shift = ((experts - base) * fused.weights.T[..., None]).sum(0)
    expected = (base + shift / fused.weights.sum(-1, keepdim=True)).log_softmax(-1)
    torch.testing.assert_close(fused.logits.log_softmax(-1), expected, atol=5e-2, rtol=1e-2)
    if rule != "exact":
        torch.testing.assert_close(fused.logits.log_softmax(-1), expected, atol=1e-5, rtol=1e-5)


@examples(
    case=cases(),
    rule=rules,
    select=selects,
    constants=st.lists(st.integers(-100, 100), min_size=5, max_size=5),
)
def test_constants_change_nothing(device, case, rule, select, constants):
    one = fuse(*case.to(device), rule=rule, select=select)
    experts = torch.stack([x + c for x, c in zip(case.experts, constants[2:], strict=False)])
    moved = Case(case.large + constants[0], case.base + constants[1], experts)
    two = fuse(*moved.to(device), rule=rule, select=select)
    assert torch.equal(one.weights, two.weights)
    torch.testing.assert_close(
        one.logits.log_softmax(-1), two.logits.log_softmax(-1), atol=1e-4, rtol=1e-5
    )


@examples(case=cases(max_experts=1), search=searches, select=selects, copies=st.integers(2, 4))
def test_copies_of_one_expert(device, case, search, select, copies):
    one = fuse(*case.to(device), rule=search, select=select)
    several = Case(case.large, case.base, case.experts.expand(copies, -1, -1)).to(device)
    two = fuse(*several, rule=search, select=select)
    scale = copies if select == "paper" else 1
    two = two._replace(loss=two.loss / scale)
    assert_same(one, two, tolerance=2e-3 if search == "exact" else 1e-5)
    if select == "blend":
        assert torch.allclose(two.weights, two.weights[:, :1])


@examples(case=cases(), rule=rules, select=selects, seed=st.integers(0, 99))
def test_permuted_vocabulary(device, case, rule, select, seed):
    order = torch.randperm(case.large.shape[-1], generator=torch.Generator().manual_seed(seed))
    one = fuse(*case.to(device), rule=rule, select=select)
    two = fuse(*(x[..., order].to(device) for x in case), rule=rule, select=select)
    one = one._replace(logits=one.logits[:, order.to(device)])
    assert_same(one, two, len(case.experts), tolerance=2e-3 if rule == "exact" else 1e-5)


@examples(case=cases(min_experts=2), rule=rules, select=selects)
def test_permuted_experts(device, case, rule, select):
    one = fuse(*case.to(device), rule=rule, select=select)
    flipped = Case(case.large, case.base, case.experts.flip(0)).to(device)
    two = fuse(*flipped, rule=rule, select=select)
    two = two._replace(weights=two.weights.flip(-1))
    assert_same(one, two, len(case.experts), tolerance=2e-3 if rule == "exact" else 1e-5)
    if select == "strongest" and rule == "grid":
        speaks = one.weights.argmax(-1) == two.weights.argmax(-1)
        assert (speaks | (one.weights.sum(-1) == 0)).all()


@examples(case=cases(rows=4), rule=rules, select=selects)
def test_rows_of_a_batch_are_rows_alone(device, case, rule, select):
    case.experts[0, 1] += 200 * case.experts[0, 1]  # one row in need of the slow path
    case = case.to(device)
    batch = fuse(*case, rule=rule, select=select)
    rows = [
        fuse(*(x[..., row : row + 1, :] for x in case), rule=rule, select=select)
        for row in range(4)
    ]
    alone = Fused(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    assert_same(batch, alone, len(case.experts), tolerance=2e-3 if rule == "exact" else 1e-5)


@examples(case=cases(min_experts=3), rule=rules, select=selects, low=st.sampled_from([0.0, 0.2]))
def test_only_some_experts(device, case, rule, select, low):
    case = case.to(device)
    bounds, weights = [(low, 1.0)] * 3, [0.5, 0.7, 0.9] if rule == "static" else None
    bounds[0] = bounds[0] if select == "blend" else (low, 0.4)
    every = fuse(*case, rule=rule, select=select, bounds=bounds, weights=weights, only=[2, 0])
    two = fuse(
        case.large,
        case.base,
        [case.experts[2], case.experts[0]],
        rule=rule,
        select=select,
        bounds=[bounds[2], bounds[0]],
        weights=weights and [0.9, 0.5],
    )
    assert torch.equal(every.weights[:, [2, 0]], two.weights)
    assert not every.weights[:, 1].any()
    assert torch.equal(every.logits, two.logits)
    none = fuse(*case, rule=rule, select=select, only=[])
    assert none.weights.shape == (2, 3)
    assert torch.equal(none.logits, case.large)
    assert not any(x.any() for x in none[1:])


def test_no_expert_at_all(device):
    case = make(seed=0, rows=2, vocab=17, experts=1).to(device)
    fused = fuse(case.large, case.base, [])
    assert torch.equal(fused.logits, case.large)
    assert fused.weights.shape == (2, 0)
    assert fused.kl.shape == (2, 2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("select", SELECTS)
def test_no_row_at_all(rule, select):
    fused = fuse(
        torch.zeros(0, 9), torch.zeros(0, 9), torch.zeros(2, 0, 9), rule=rule, select=select
    )
    assert [tuple(x.shape) for x in fused] == [(0, 9), (0, 2), (0,), (0, 2)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("spread", [1e2, 1e3, 1e4])
def test_extreme_logits_stay_finite(device, rule, select, spread):
    for shift in 1.0, spread:
        case = make(seed=3, rows=4, vocab=257, experts=2, spread=spread, shift=shift).to(device)
        fused = fuse(*case, rule=rule, select=select)
        assert all(x.isfinite().all() for x in fused)
        assert (fused.kl >= -1e-6 * spread).all()


def grids(count):
    """Bounds and a step such as the engine admits: up to 100 in size, 256 candidates in all."""

    def build(low, width, step):
        step = max(step, width / (256 // count - 1))
        return min(low, 100.0), min(low + width, 100.0), step

    return st.builds(
        build,
        low=st.sampled_from([-100.0, -1.0, -0.35, -0.1, 0.0, 0.25, 1.3, 99.0]),
        width=st.sampled_from([0.005, 0.7, 1.0, 2.0, 200.0]),
        step=st.sampled_from([0.01, 0.03, 0.1, 2.0]),
    )


@examples(case=cases(max_experts=2), select=selects, data=st.data())
def test_oracle_at_the_edges_of_what_is_admitted(device, case, select, data):
    low, high, step = data.draw(grids(len(case.experts)))
    bounds = [(low, high)] * len(case.experts)
    fused = fuse(*case.to(device), select=select, step=step, bounds=bounds)
    assert all(x.isfinite().all() for x in fused)
    assert_answers(case, fused, select=select, step=step, bounds=bounds)
    exact = fuse(*case.to(device), rule="exact", select=select, step=step, bounds=bounds)
    assert all(x.isfinite().all() for x in exact)
    assert (exact.loss <= fused.loss).all()
    assert (exact.weights.sum(-1) <= high + 1e-4).all()
    assert (exact.weights.sum(-1) >= min(low, 0.0) - 1e-4).all()


@examples(case=cases(), weights=st.lists(st.floats(-100, 100), min_size=3, max_size=3))
def test_static_weights_of_any_size(device, case, weights):
    weights = weights[: len(case.experts)]
    fused = fuse(*case.to(device), rule="static", weights=weights)
    assert all(x.isfinite().all() for x in fused)
    for row in range(len(case.large)):
        large, base, experts = case.large[row], case.base[row], case.experts[:, row]
        answer = oracle(large, base, experts, rule="static", weights=weights)
        # float32 holds the sum of the shifts to that
        digits = 2e-7 * sum(abs(w) for w in weights) * float((experts - base).abs().amax())
        logprobs = fused.logits[row].cpu().double().log_softmax(-1)
        torch.testing.assert_close(logprobs, answer.logprobs, atol=2e-5 + digits, rtol=2e-5)
        assert fused.kl[row].tolist() == pytest.approx(answer.kl, rel=2e-5 + digits, abs=1e-6)


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize(("bound", "step"), [(2.0, 0.1), (100.0, 1.0)])
@pytest.mark.parametrize("spread", [30.0, 100.0, 1e3, 1e4])
def test_oracle_where_exponentials_overflow(device, select, bound, step, spread):
    for rows, low in (6, 0.0), (1, -bound):
        case = make(seed=9, rows=rows, vocab=257, experts=2, spread=3.0, shift=spread)
        assert (case.experts - case.base).amax() > 60
        how = {"select": select, "step": step, "bounds": [(low, bound)] * 2}
        fused = fuse(*case.to(device), **how)
        assert all(x.isfinite().all() for x in fused)
        if select == "blend":  # its shares are float32, and what they are off by is multiplied
            continue
        assert_answers(case, fused, **how)


def request(experts):
    """What requests may differ in that are fused in one pass: step, bounds and weights."""
    return st.tuples(
        st.sampled_from([0.1, 0.25, 0.03, 1.0]),
        st.lists(
            st.sampled_from([(0.0, 2.0), (0.0, 0.7), (0.5, 0.5), (0.3, 1.6), (-1.0, 1.0)]),
            min_size=experts,
            max_size=experts,
        ),
        st.lists(st.sampled_from([0.0, 0.5, 1.0, -2.0]), min_size=experts, max_size=experts),
    )


@examples(case=cases(rows=4), rule=rules, select=selects, data=st.data())
def test_rows_with_their_own_parameters_are_rows_alone(device, case, rule, select, data):
    case.experts[0, 1] += 200 * case.experts[0, 1]  # one row in need of the slow path
    case = case.to(device)
    count = len(case.experts)
    step, bounds, weights = zip(*(data.draw(request(count)) for _ in range(4)), strict=True)
    if select == "blend":
        bounds = [each[:1] * count for each in bounds]
    aims = aim(
        case.base, case.experts, rule=rule, select=select, weights=torch.tensor(weights).to(device)
    )
    batch = weigh(
        case.large,
        aims,
        rule=rule,
        step=torch.tensor(step, dtype=torch.float64),
        bounds=torch.tensor(bounds, dtype=torch.float64),
    )
    for row in range(4):
        alone = fuse(
            *(x[..., row : row + 1, :] for x in case),
            rule=rule,
            select=select,
            step=step[row],
            bounds=bounds[row],
            weights=weights[row],
        )
        there = Fused(*(x[row : row + 1] for x in batch))
        assert_same(there, alone, count, tolerance=2e-3 if rule == "exact" else 1e-6)
        if rule != "exact" and select != "blend":  # whose weights show the last digits of sums
            assert torch.equal(there.weights, alone.weights)


def test_a_row_pays_for_its_own_candidates_only(device, monkeypatch):
    case = make(seed=2, rows=3, vocab=96, experts=2).to(device)
    computed = []

    def counted(logits, probs, shifts, alpha, **how):
        computed.append(alpha.numel())
        return cumulants(logits, probs, shifts, alpha, **how)

    cumulants = fusion._cumulants
    aims = aim(case.base, case.experts, rule="grid", select="paper")
    monkeypatch.setattr(fusion, "_cumulants", counted)
    bounds = torch.tensor([[(0.0, 2.0)] * 2] * 3, dtype=torch.float64)
    weigh(case.large, aims, step=torch.tensor([0.1, 0.1, 0.02], dtype=torch.float64), bounds=bounds)
    assert sum(computed) == 2 * (21 + 21 + 101)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("shift", [0.3, 30.0])
def test_many_candidates_take_no_more_memory(shift):
    case = make(seed=3, rows=2, vocab=50_000, experts=1, shift=shift)
    largest = {}
    for step in 0.1, 2 / 255:
        with Largest() as noted:
            fuse(*case, step=step)
        largest[step] = noted.bytes
    assert largest[2 / 255] < 2 * largest[0.1]
    assert largest[2 / 255] <= 8 * 2**20


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unrelated(dtype, seed, experts=1, vocab=257):
    """Logits that use all digits of their type."""
    draw = torch.Generator().manual_seed(seed)
    shape = 2 + experts, 2, vocab
    large, base, *rest = (4 * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)
    return large, base, torch.stack(rest)


@examples(
    dtype=st.sampled_from(DTYPES),
    rule=searches,
    select=selects,
    seed=st.integers(0, 99),
    low=st.sampled_from([-0.4, 0.0, 0.3]),
)
def test_expert_equal_to_base_in_any_type(device, dtype, rule, select, seed, low):
    large, base, _ = unrelated(dtype, seed)
    large, base = large.to(device), base.to(device)
    fused = fuse(large, base, [base] * 2, rule=rule, select=select, bounds=[(low, 2.0)] * 2)
    smallest = torch.tensor(low, device=device).expand(2)
    torch.testing.assert_close(fused.weights.sum(-1), smallest, rtol=1e-6, atol=0)
    assert torch.equal(fused.logits, large.float())
    assert not fused.kl.any()
    assert not fused.loss.any()
    static = fuse(large, base, [base] * 2, rule="static", weights=[0.7, -3.0])
    assert torch.equal(static.logits, large.float())
    assert not static.kl.any()


@examples(dtype=st.sampled_from(DTYPES), select=selects, seed=st.integers(0, 99))
def test_large_equal_to_base_in_any_type(device, dtype, select, seed):
    _, base, experts = (x.to(device) for x in unrelated(dtype, seed))
    for rule in RULES:
        fused = fuse(base, base, experts, rule=rule, select=select)
        atol = 1e-4 if rule == "exact" else 0
        torch.testing.assert_close(fused.weights, torch.ones_like(fused.weights), rtol=0, atol=atol)
        for reached, target in zip(fused.logits, experts[0].float(), strict=True):
            torch.testing.assert_close(
                reached.log_softmax(-1), target.log_softmax(-1), atol=20 * atol + 1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("select", SELECTS)
def test_a_shift_below_the_digits_of_float32(device, select):
    """float64 logits that differ only where float32 would round the difference away."""
    large, base, _ = (x.to(device) for x in unrelated(torch.float64, 1))
    large[:, 5], base[:, 5] = 5.1, 4.3
    expert = base.clone()
    expert[:, 5] += 3e-6
    fused = fuse(large, base, [expert], rule="static", select=select)
    answer = oracle(large[0], base[0], expert[None, 0], rule="static")
    assert fused.kl[0].tolist() == pytest.approx(answer.kl, rel=0.25, abs=0)


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_small_divergences_keep_their_digits(device, offset):
    """1e-9 nats are below the resolution of a probability in float32."""
    case = make(seed=4, rows=4, vocab=257, experts=1)
    draw = torch.Generator().manual_seed(0)
    large, base = case.large.clone(), case.base / 64
    shift = 1e-4 * torch.randn(1, 4, 257, generator=draw)
    # all but one token move together, and that one has no part in the large model's distribution
    base[:, 0], large[:, 0] = 8.0, -60.0
    shift[..., 1:] += offset
    experts = base + shift
    fused = fuse(*Case(large, base, experts).to(device), rule="static")
    for row in range(4):
        answer = oracle(large[row], base[row], experts[:, row], rule="static")
        assert 1e-10 < answer.kl[0] < 1e-7
        assert fused.kl[row].tolist() == pytest.approx(answer.kl, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_other_float_types(device, dtype, rule):
    low = Case(*(x.to(dtype) for x in make(seed=2, rows=3, vocab=257, experts=2))).to(device)
    kept = [x.clone() for x in low]
    one = fuse(*low, rule=rule)
    two = fuse(*(x.float() for x in low), rule=rule)
    for found, expected in zip(one, two, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(low, kept, strict=True))


def test_static_weights_are_the_sum_of_shifts(device):
    large, base, experts = make(seed=6, rows=2, vocab=96, experts=2).to(device)
    for weights in None, [0.4, -1.5]:
        fused = fuse(large, base, experts, rule="static", weights=weights)
        w = torch.tensor(weights or [1.0, 1.0], device=device)
        expected = large + ((experts - base) * w[:, None, None]).sum(0)
        assert torch.equal(fused.weights, w.expand(2, -1))
        torch.testing.assert_close(fused.logits.log_softmax(-1), expected.log_softmax(-1))
    # bounds are for searches: those of a family that differ must not stop its static rule
    fuse(large, base, experts, rule="static", select="blend", bounds=[(0.0, 1.0), (0.0, 2.0)])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rule": "golden"}, "use grid, exact, static"),
        ({"select": "best"}, "use paper, strongest, blend"),
        ({"weights": [1.0], "rule": "static"}, "one for each of 2"),
        ({"bounds": [(0.0, 2.0)]}, "one for each of 2"),
        ({"bounds": [(0.0, 2.0), (1.0, 0.5)]}, "low <= high"),
        ({"bounds": [(0.0, 2.0), (0.0, math.nan)]}, "low <= high"),
        ({"bounds": [(0.0, 2.0), (-1e308, 1e308)]}, "inf candidates: give a larger `step`"),
        ({"bounds": [(0.0, 2.0), (0.0, 1e300)]}, "1e\\+301 candidates: give a larger `step`"),
        ({"bounds": [(0.0, 2.0), (0.0, 1.0)], "select": "blend"}, "one weight for all"),
        ({"step": 0.0}, "above 0"),
        ({"only": [0, 2]}, "different indices below 2"),
        ({"only": [-1]}, "different indices below 2"),
        ({"only": [1, 1]}, "different indices below 2"),
    ],
)
def test_bad_arguments(how, message):
    case = make(seed=0, rows=2, vocab=9, experts=2)
    with pytest.raises(ValueError, match=message):
        fuse(*case, **how)


def test_bad_shapes():
    large, base, experts = make(seed=0, rows=2, vocab=9, experts=2)
    with pytest.raises(ValueError, match=r"\[rows, vocabulary\]"):
        fuse(large, base, experts[..., :8])
    with pytest.raises(ValueError, match=r"\[rows, vocabulary\]"):
        fuse(large[0], base[0], experts[:, 0])
    with pytest.raises(ValueError, match=r"small models' \[2, 9\]"):
        fuse(large[:, :8], base, experts)
    with pytest.raises(ValueError, match=r"small models' \[2, 9\]"):
        fuse(large[:1], base, experts)
    with pytest.raises(ValueError, match="use one in both"):
        weigh(large, aim(base, experts, rule="grid", select="paper"), rule="static")
    with pytest.raises(ValueError, match="use one in both"):
        weigh(large, aim(base, experts, rule="static", select="paper"))
    with pytest.raises(ValueError, match="use grid, exact, static"):
        weigh(large, aim(base, experts, rule="grid", select="paper"), rule="golden")
    with pytest.raises(ValueError, match="one for each of 2"):
        weigh(large, aim(base, experts, rule="grid", select="paper"), bounds=[(0.0, 2.0)])
    aims = aim(base, experts, rule="grid", select="blend")
    with pytest.raises(ValueError, match="for each of 2 rows and 2 experts"):
        weigh(large, aims, bounds=torch.tensor([[(0.0, 2.0)] * 2] * 3))
    with pytest.raises(ValueError, match="one for each of 2 rows"):
        weigh(large, aims, step=torch.tensor([0.1, 0.1, 0.1]))
    with pytest.raises(ValueError, match="above 0"):
        weigh(large, aims, step=torch.tensor([0.1, 0.0]))
    with pytest.raises(ValueError, match="one weight for all"):
        weigh(large, aims, bounds=torch.tensor([[(0.0, 2.0)] * 2, [(0.0, 1.0), (0.0, 2.0)]]))
    with pytest.raises(ValueError, match="2 rows and 2 experts"):
        aim(base, experts, rule="static", select="paper", weights=torch.ones(3, 2))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 999), vocab=st.integers(6, 60), count=st.integers(1, 3))
def test_what_is_not_shared_is_the_large_models_alone(seed, vocab, count):
    """The identities hold on the shared part, and its share of the probability stays."""
    draw = torch.Generator().manual_seed(seed)
    large, base, *experts = 3 * torch.randn(2 + count, 4, vocab, generator=draw)
    some = torch.randperm(vocab, generator=draw)[: int(0.8 * vocab)].sort().values
    other = torch.ones(vocab, dtype=torch.bool)
    other[some] = False

    def fused(large, base, experts):
        own = fuse(large[:, some], base[:, some], [each[:, some] for each in experts])
        return own, widened(own, large, some)

    own, whole = fused(large, base, experts)
    before, after = large.double().softmax(-1), whole.logits.double().softmax(-1)
    torch.testing.assert_close(after[:, other], before[:, other], atol=1e-6, rtol=1e-5)
    inside = own.logits.double().softmax(-1) * before[:, some].sum(-1, keepdim=True)
    torch.testing.assert_close(after[:, some], inside, atol=1e-6, rtol=1e-5)
    kl = (after * (after.log() - before.log())).sum(-1)
    torch.testing.assert_close(whole.kl[:, 0].double(), kl, atol=1e-5, rtol=1e-4)

    # constants change nothing, whoever's they are
    moved = fused(large + 5, base - 7, [each + 3 for each in experts])[1]
    torch.testing.assert_close(
        moved.logits.softmax(-1), whole.logits.softmax(-1), atol=1e-5, rtol=1e-4
    )
    # an expert equal to its base leaves the large model, exactly
    assert fused(large, base, [base] * count)[1].logits.equal(large)
    # a large model equal to the base becomes the expert
    one, same = fused(base, base, experts[:1])
    assert (one.weights == 1).all()
    follows = experts[0][:, some].double().softmax(-1)
    mass = base.double().softmax(-1)[:, some].sum(-1, keepdim=True)
    torch.testing.assert_close(
        same.logits.double().softmax(-1)[:, some], follows * mass, atol=1e-6, rtol=1e-5
    )
