"""The methods of merging, against PEFT's own and against what their papers say of them."""

import pytest
import torch
from peft.utils import merge_utils

from dlf_ray.training import merging
from dlf_ray.training.merging import METHODS, agreed, chance, drop, trim, weighted_sum

WEIGHTS = (0.7, 0.2, 1.3)
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(params=range(5))
def shifts(request):
    generator = torch.Generator().manual_seed(request.param)
    return list(torch.randn(3, 17, 23, generator=generator))


def by(name, shifts, weights, density, chances=None, normalize=None):
    """What a row of the table makes of shifts."""
    method = METHODS[name]
    chances = chances or [chance(0, str(i), "x") for i in range(len(shifts))]
    if method.thin:
        shifts = [method.thin(each, density, c) for each, c in zip(shifts, chances, strict=True)]
    normalize = method.normalize if normalize is None else normalize
    return method.combine(shifts, weights, normalize)


def test_task_arithmetic_is_pefts(shifts):
    expected = merge_utils.task_arithmetic(shifts, torch.tensor(WEIGHTS))
    torch.testing.assert_close(by("task_arithmetic", shifts, WEIGHTS, 1.0), expected, **CLOSE)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7])
def test_trimming_is_pefts(shifts, density):
    expected = merge_utils.magnitude_prune(shifts, torch.tensor(WEIGHTS), density)
    thin = [trim(each, density, chance(0, "", "")) for each in shifts]
    torch.testing.assert_close(weighted_sum(thin, WEIGHTS, False), expected, **CLOSE)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_ties_is_pefts_where_weights_are_equal(shifts, density):
    """PEFT scales the mean of what agrees by the weight; here, as in mergekit, `lambda` does."""
    expected = merge_utils.ties(shifts, torch.full((3,), 0.6), density)
    torch.testing.assert_close(0.6 * by("ties", shifts, (2.0,) * 3, density), expected, **CLOSE)


@pytest.fixture
def same_chance(monkeypatch):
    """Lets PEFT draw what we draw, one shift after the other."""
    chances = iter([chance(0, str(i), "x") for i in range(3)])
    draw = torch.bernoulli
    ours = type(
        "torch", (), {**vars(torch), "bernoulli": lambda p: draw(p, generator=next(chances))}
    )
    monkeypatch.setattr(merge_utils, "torch", ours)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_linear_is_pefts(shifts, density, same_chance):
    expected = merge_utils.dare_linear(shifts, torch.tensor(WEIGHTS), density)
    found = by("dare_linear", shifts, WEIGHTS, density)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_ties_is_pefts_where_weights_are_equal(shifts, density, same_chance):
    expected = merge_utils.dare_ties(shifts, torch.ones(3), density)
    found = by("dare_ties", shifts, (1.0,) * 3, density, normalize=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_weights_decide_an_election_and_the_mean():
    """By hand: at the first place 3 x 1 outvotes 2, at the second nothing has the elected sign."""
    shifts = [torch.tensor([1.0, 0.0, 4.0]), torch.tensor([-2.0, 0.0, 1.0])]
    torch.testing.assert_close(agreed(shifts, (3, 1), False), torch.tensor([3.0, 0.0, 13.0]))
    torch.testing.assert_close(agreed(shifts, (3, 1), True), torch.tensor([1.0, 0.0, 13 / 4]))
    torch.testing.assert_close(agreed(shifts, (1, 1), True), torch.tensor([-2.0, 0.0, 2.5]))
    # A negative weight turns a shift round before it votes.
    torch.testing.assert_close(agreed(shifts, (1, -1), False), torch.tensor([3.0, 0.0, 4.0]))


def test_an_election_without_a_winner_goes_to_the_positive():
    """Parts that are opposite to the last digit cancel out, however a machine may add products."""
    shifts = [torch.tensor([-0.00795884057879448]), torch.tensor([0.006821863353252411])]
    assert shifts[0] * 0.6 == -(shifts[1] * 0.7)
    torch.testing.assert_close(agreed(shifts, (0.6, 0.7), True), shifts[1])


def test_linear_is_the_weighted_average():
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    found = by("linear", values, (1.0, 3.0), 1.0)
    torch.testing.assert_close(found, torch.tensor([2.5, 5.0]))
    found = by("linear", values, (1.0, 3.0), 1.0, normalize=False)
    torch.testing.assert_close(found, torch.tensor([10.0, 20.0]))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dropping_keeps_the_share_and_the_expected_shift(density):
    ones = torch.ones(400, 500)
    dropped = drop(ones, density, chance(0, "model", "name"))
    kept = (dropped != 0).double().mean().item()
    assert kept == pytest.approx(density, abs=0.01)
    assert dropped.double().mean().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / density]))


def test_trimming_keeps_what_is_largest_and_at_least_one():
    shift = torch.tensor([[0.1, -3.0], [2.0, -0.5]])
    trimmed = trim(shift, 0.5, chance(0, "", ""))
    torch.testing.assert_close(trimmed, torch.tensor([[0.0, -3.0], [2.0, 0.0]]))
    torch.testing.assert_close(
        trim(shift, 0.01, chance(0, "", "")).count_nonzero(), torch.tensor(1)
    )
    assert trim(torch.ones(100), 0.3, chance(0, "", "")).sum() == 30  # no more where many are equal


def test_chance_hangs_on_seed_model_and_name_alone():
    def drawn(*key):
        return torch.rand(5, generator=chance(*key)).tolist()

    keys = [(0, "a", "x"), (1, "a", "x"), (0, "b", "x"), (0, "a", "y")]
    first = [drawn(*key) for key in keys]
    assert first == [drawn(*key) for key in reversed(keys)][::-1]
    assert len({tuple(each) for each in first}) == len(keys)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11),
        ("h.3.mlp.c_fc.weight", 3),
        ("gpt_neox.layers.0.attention.dense.bias", 0),
        ("model.layers.2.mlp.experts.7.up_proj.weight", 2),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_layers_are_known_by_name(name, layer):
    assert merging.layer_of(name) == layer


def test_lines_go_from_alpha_to_alpha_and_beta():
    def scale(name, layers=5):
        return merging.depth_scale(name, layers, 0.2, 0.6)

    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(5)]
    assert [scale(name) for name in names] == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8])
    assert scale("lm_head.weight") == scale("model.embed_tokens.weight") == pytest.approx(0.2)
    assert scale(names[0], layers=1) == pytest.approx(0.2)


def test_every_method_names_its_paper():
    for name, row in METHODS.items():
        assert "arXiv" in row.paper, name
        assert row.about, name
