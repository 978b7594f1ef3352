"""What benchmarks make of an output: the answer that they read in it, and its scores."""

import math
from dataclasses import replace
from decimal import Decimal

import pytest
from tasking import FIXTURES, judged, said

from dlf_ray.evaluation.tasks import (
    TASKS,
    Item,
    cnn_dailymail,
    common,
    gsm8k,
    numbers,
    triviaqa,
    truthfulqa,
)

# GSM8K


@pytest.mark.parametrize(
    ("text", "answer", "flexible", "strict", "proxy", "number"),
    [
        (" 5+5=10\n#### 10", "10", 1, 1, 1, 1),
        (" It is 10.", "10", 1, 0, 1, 1),
        (" It is $1,200.", "1,200", 1, 0, 1, 1),
        (" #### 1200", "1,200", 1, 1, 1, 1),
        (" #### 10 and then 11", "10", 0, 1, 0, 0),
        (" 10.00", "10", 0, 0, 0, 1),
        # Quirks: signs, and points within numbers, do not count for Liu et al.
        (" #### -7", "-7", 1, 1, 1, 1),
        (" 7", "-7", 0, 0, 1, 0),
        (" 1.5", "15", 0, 0, 1, 0),
        # They cut where a model goes on by itself.
        (" 10\nComment: 3 of 4", "10", 0, 0, 1, 0),
        # Signs alone are a number for the harness.
        (" 10 ...", "10", 0, 0, 1, 1),
        (" none", "10", 0, 0, 0, 0),
        ("", "10", 0, 0, 0, 0),
        # It reads numbers as ASCII writes them.
        (" It is −7.", "-7", 0, 0, 1, 1),
        (" 1\u202f200 €", "1,200", 0, 0, 0, 1),
        (" $1{,}200$", "1,200", 0, 0, 0, 1),
    ],
)
def test_gsm8k_scores(text, answer, flexible, strict, proxy, number):
    assert gsm8k.score(Item("x", "p", answers=(answer,)), said(text)) == {
        "exact_match_flexible": flexible,
        "exact_match_strict": strict,
        "exact_match_proxy": proxy,
        "number_match": number,
    }


@pytest.mark.parametrize(
    ("text", "flexible", "strict", "proxy"),
    [
        ("I pay $2, not 3,500.", "3,500.", gsm8k.INVALID, "3500"),
        ("half is .5", ".5", gsm8k.INVALID, ".5"),
        ("#### -1,5.\n#### 2", "2", "-1,5.", "2"),
        ("it is -4", "-4", gsm8k.INVALID, "4"),
        ("nine", gsm8k.INVALID, gsm8k.INVALID, "nine"),
    ],
)
def test_gsm8k_extraction(text, flexible, strict, proxy):
    assert (gsm8k.flexible(text), gsm8k.strict(text), gsm8k.proxy(text)) == (
        flexible,
        strict,
        proxy,
    )


# TruthfulQA


def test_truthfulqa_scores():
    item = Item("x", "p", choices=(" a", " b", " c"), correct=(0, 1))
    scores = truthfulqa.score(item, judged(math.log(0.2), math.log(0.1), math.log(0.1)))
    assert scores == pytest.approx({"mc1": 1, "mc2": 0.75})
    # The other true answers do not stand in for the best one, and do not stand against it.
    assert truthfulqa.score(item, judged(-5.0, -1.0, -4.0))["mc1"] == 0
    assert truthfulqa.score(item, judged(-5.0, -1.0, -6.0))["mc1"] == 1
    # A model without an opinion is not right, and probabilities too small for floats are fine.
    assert truthfulqa.score(item, judged(-5.0, -5.0, -5.0)) == pytest.approx(
        {"mc1": 0, "mc2": 2 / 3}
    )
    assert truthfulqa.score(item, judged(-5000.0, -5001.0, -5000.0))["mc2"] == pytest.approx(
        0.5777, abs=1e-4
    )
    with pytest.raises(ValueError, match="3 choices, but 2 were judged"):
        truthfulqa.score(item, judged(-1.0, -2.0))


def test_truthfulqa_is_the_same_from_either_file():
    for name in ("truthfulqa", "truthfulqa_letters"):
        one = TASKS[name].load(FIXTURES / "truthfulqa/mc_task.json").items
        other = TASKS[name].load(FIXTURES / "truthfulqa/TruthfulQA.csv").items
        assert [replace(item, id="") for item in one] == [replace(item, id="") for item in other]


def test_letters_have_the_best_answer_among_at_most_three_false_ones():
    long, short = TASKS["truthfulqa_letters"].load(FIXTURES).items
    head, *options, _, last = long.prompt.split("\n")
    assert head == "What happens to a stone that you water daily?"
    assert last == "The answer is:"
    assert [option[:3] for option in options] == ["A. ", "B. ", "C. ", "D. "]
    (right,) = (option for option in options if option[0] in long.answers)
    assert right[3:] == "It gets wet."
    assert len(short.prompt.split("\n")) == 5


def test_letters_are_shuffled():
    places = [
        truthfulqa.hashed(f"order {n}", ["best", "b", "c", "d"]).index("best") for n in range(1000)
    ]
    assert all(200 < places.count(place) < 300 for place in range(4))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B", "B"),
        ("\n\nB.", "B"),
        (" (C) It is", "C"),
        (" **D**", "D"),
        ("```\nA", "A"),
        (" E", ""),
        (" b", ""),
        (" None", ""),
        ("", ""),
        (" All of them", "A"),  # as Liu et al. read it
    ],
)
def test_letter_of_an_output(text, letter):
    item = Item("x", "p", answers=("B",))
    assert truthfulqa.letter(item, said(text)) == letter
    scores = truthfulqa.score_letters(item, said(text))
    assert scores == {"acc": letter == "B", "valid": letter != ""}


# TriviaQA


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Vell", "vell"),
        ("St. Vell's", "st vell s"),
        ("an_apple-pie", "apple pie"),
        ("‘Ombra’ `city´", "ombra city"),
        ("Theatre of a Thousand", "theatre of thousand"),
        ("", ""),
    ],
)
def test_triviaqa_normalisation(answer, normal):
    assert triviaqa.normalised(answer) == normal


@pytest.mark.parametrize(
    ("text", "official", "harness", "proxy"),
    [
        (" the river vell", 1, 0, 0),
        (" River Vell", 1, 1, 1),
        (" Vell.", 1, 1, 0),
        (" Vell, which is long", 0, 1, 0),
        (" St. Vell", 1, 0, 1),
        (" river vell\nQuestion: and?", 1, 1, 1),
        ("\nRiver Vell", 0, 0, 0),
        (" Ombra", 0, 0, 0),
    ],
)
def test_triviaqa_scores(text, official, harness, proxy):
    item = Item("x", "p", answers=("Vell", "River Vell", "St. Vell"))
    assert triviaqa.score(item, said(text)) == {
        "exact_match": official,
        "exact_match_harness": harness,
        "exact_match_proxy": proxy,
    }


# ROUGE, numbers, likelihood


def test_rouge_of_known_texts():
    item = Item("x", "p", answers=("the cat sat on the mat",))
    scores = common.rouge(item, said(" the cat is on the mat"))
    assert scores == pytest.approx({"rouge2": 0.6, "rouge1": 5 / 6, "rougeL": 5 / 6})
    # White space is nothing, and stems count, not words.
    assert common.rouge(item, said("The cats\nsat on the mats."))["rouge2"] == pytest.approx(1)
    assert common.rouge(item, said(""))["rouge1"] == 0
    two = replace(item, answers=("a dog", *item.answers))
    assert common.rouge(two, said(" a dog"))["rouge2"] == pytest.approx(1)


def test_the_headline_of_summaries_is_the_papers():
    assert cnn_dailymail.CNN_DAILYMAIL.metrics[0] == "rouge2"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 18.", "18"),
        ("so $1,234.50 in all", "1234.50"),
        ("5-3", "3"),
        ("it falls to -3 degrees", "-3"),
        ("-$20", "-20"),
        ("half is .5", ".5"),
        ("7, 8, and 9,", "9"),
        ("none", ""),
        # signs
        ("minus: −12", "-12"),
        ("it is –12", "-12"),
        ("it is ‑12", "-12"),
        ("pages 10–12", "12"),
        ("+5", "5"),
        ("(2+3)-4", "4"),
        ("x=-4", "-4"),
        ("COVID-19", "19"),
        ("－１２．５", "-12.5"),
        # what stands around
        ("€ 20", "20"),
        ("-€20", "-20"),
        ("$-20", "-20"),
        ("20€", "20"),
        ("20 %", "20"),
        ("**18**", "18"),
        (r"\boxed{\$1{,}234.50}", "1234.50"),
        (r"1\,234", "1234"),
        # thousands
        ("1,234,567.5", "1234567.5"),
        ("12,34,567", "1234567"),
        ("1\u2009234\u2009567", "1234567"),
        ("1\u202f234,5", "1234.5"),
        ("1\u00a0234", "1234"),
        ("1'234.50", "1234.50"),
        ("1’234’567", "1234567"),
        ("1_000_000", "1000000"),
        ("1.234.567", "1234567"),
        ("in 2019 300 people", "300"),
        ("１，２３４", "1234"),
        # decimal commas
        ("0,5", "0.5"),
        ("0,125", "0.125"),
        ("3,14", "3.14"),
        ("1.234,56", "1234.56"),
        ("1,234", "1234"),
        ("1.234", "1.234"),
        ("1,2,3", "3"),
        # fractions and powers of ten
        ("3/4 of it", "3/4"),
        ("1 1/2", "1 1/2"),
        ("1½", "1 1/2"),
        ("-¾", "-3/4"),
        (r"\frac{3}{4}", "3/4"),
        (r"2\dfrac{1}{2}", "2 1/2"),
        ("on 3/4/2025", "2025"),
        ("1/0", "0"),
        ("1.5e3", "1.5e3"),
        ("2e-05", "2e-05"),
        ("3 eggs", "3"),
        ("3rd", "3"),
        ("١٢", "١٢"),
    ],
)
def test_last_number(text, number):
    assert numbers.last_number(text) == number


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("-7.50", "-7.5"),
        (".5", "0.5"),
        ("3/4", "0.75"),
        ("-1 1/2", "-1.5"),
        ("1.5e3", "1500"),
        ("١٢", "12"),
        ("9" * 5000, "9" * 5000),
    ],
    ids=lambda text: text[:8],
)
def test_values_of_numbers(number, value):
    assert numbers.value_of(number) == Decimal(value)
    assert numbers.last_number(number) == number


def test_numbers_are_compared_by_value():
    item = Item("x", "p", answers=("18",))
    assert common.number_match(item, said("3 then 18.00")) == {"number_match": 1}
    assert common.number_match(item, said("18 then 3")) == {"number_match": 0}
    assert common.number_match(item, said("")) == {"number_match": 0}


def test_svamp_corrects_the_one_wrong_answer():
    items = TASKS["svamp"].load(FIXTURES).items
    assert [item.answers for item in items] == [("7",), ("5",)]


def test_accuracy_by_likelihood_and_per_character():
    item = Item("x", "p", choices=(" ice", " a very long rope"), correct=(1,))
    assert common.accuracy(item, judged(-3.0, -6.0)) == {"acc": 0, "acc_norm": 1}
    assert common.accuracy(item, judged(-6.0, -3.0)) == {"acc": 1, "acc_norm": 1}
    assert common.likeliest(item, judged(-6.0, -3.0)) == "a very long rope"
    # The space that begins a choice is not part of its length.
    item = Item("x", "p", choices=(" a", " bb"), correct=(1,))
    assert common.accuracy(item, judged(-1.0, -1.8)) == {"acc": 0, "acc_norm": 1}
