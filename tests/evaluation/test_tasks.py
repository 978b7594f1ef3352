"""The benchmarks: prompts, extraction and scores, on made-up items in the published formats.

`test_harness_*` hold them against lm-evaluation-harness itself where it is installed, and
`test_published_*` read the published files where `DLF_EVAL_DATA` names a folder of them.
"""

import csv
import itertools
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import ROOT, TESTS

from dlf_ray.evaluation.tasks import (
    METRICS,
    TASKS,
    Choice,
    Item,
    Response,
    cnn_dailymail,
    common,
    data,
    get_task,
    gsm8k,
    own,
    own_task,
    triviaqa,
    truthfulqa,
)

FIXTURES = TESTS / "fixtures" / "tasks"


def said(text, finish_reason="stop"):
    return Response(text=text, finish_reason=finish_reason)


def judged(*logprobs):
    return Response(choices=tuple(Choice(logprob) for logprob in logprobs))


def rows_as_files(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Every task


COUNTS = {
    "gsm8k": (2, 4),
    "truthfulqa": (2, 1),
    "truthfulqa_letters": (2, 1),
    "triviaqa": (1, 1),
    "cnn_dailymail": (1, 1),
    "mmlu": (3, 1),
    "arc_easy": (2, 1),
    "arc_challenge": (2, 1),
    "svamp": (2, 1),
    "commonsenseqa": (1, 0),
}
"""Items and malformed records of the fixtures."""


def test_all_tasks_have_fixtures():
    assert set(COUNTS) == set(TASKS)
    assert all(get_task(name).name == name for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_and_leaves_out_what_is_malformed(name):
    task = TASKS[name]
    loaded = task.load(FIXTURES)
    assert (len(loaded.items), len(loaded.skipped)) == COUNTS[name]
    assert len({item.id for item in loaded.items}) == len(loaded.items)
    for item in loaded.items:
        assert item.prompt == item.prompt.rstrip()
        assert item.prompt.startswith(item.preamble)
        assert item.full_prompt == item.prompt
        assert item.target.startswith(" ")
        assert bool(item.choices) == (task.kind == "likelihood") != bool(item.answers)
        assert all(choice.startswith(" ") for choice in item.choices)
    assert task.load(FIXTURES) == loaded
    assert (task.max_tokens > 0) == (task.kind == "generate")


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_scores_one_and_a_wrong_one_does_not(name):
    task = TASKS[name]
    for item in task.load(FIXTURES).items:
        if task.kind == "likelihood":
            right = judged(*(0.0 if n in item.correct else -99.0 for n in range(len(item.choices))))
            wrong = judged(*(-99.0 if n in item.correct else 0.0 for n in range(len(item.choices))))
        else:
            right, wrong = said(item.target), said(" So it is, 987654.")
        assert task.score(item, right) == pytest.approx(dict.fromkeys(task.metrics, 1.0))
        assert task.score(item, wrong)[task.metrics[0]] == pytest.approx(0.0)
        assert list(task.score(item, wrong)) == list(task.metrics)
        assert task.extract(item, right)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'gsm9k'; there are gsm8k, truthfulqa"):
        get_task("gsm9k")
    with pytest.raises(ValueError, match="'bleu'; there are exact_match, number_match"):
        own_task("x.jsonl", metric="bleu")


# Loading


def test_malformed_records_are_reported_with_line_and_reason():
    skipped = dict(TASKS["gsm8k"].load(FIXTURES).skipped)
    assert list(skipped) == ["test.jsonl:2", "test.jsonl:4", "test.jsonl:5", "test.jsonl:6"]
    assert skipped["test.jsonl:2"].startswith("not JSON")
    assert "####" in skipped["test.jsonl:4"]
    assert skipped["test.jsonl:5"] == "column 'question' is not in ['answer']"
    assert skipped["test.jsonl:6"] == "not an object with named fields"
    # The line where a record begins, when records span lines.
    assert TASKS["mmlu"].load(FIXTURES).skipped[0][0] == "made_up_botany_test.csv:4"
    ((where, why),) = TASKS["truthfulqa"].load(FIXTURES / "truthfulqa/TruthfulQA.csv").skipped
    assert (where, why) == ("TruthfulQA.csv:4", "3 columns instead of 7")


def test_ids_come_from_the_data_or_its_rows():
    assert [i.id for i in TASKS["gsm8k"].load(FIXTURES).items] == ["test-0", "test-2"]
    assert [i.id for i in TASKS["arc_easy"].load(FIXTURES).items] == ["e1", "e2"]


@pytest.mark.parametrize("where", ["", "gsm8k", "gsm8k/test.jsonl"])
def test_a_path_is_a_file_its_folder_or_the_folder_of_all(where):
    loaded = TASKS["gsm8k"].load(FIXTURES / where, shots=1)
    assert len(loaded.items) == 2
    assert loaded.items[1].shots.startswith("Question: A crate holds")


def test_nothing_to_read_is_one_error_that_says_what_to_pass(tmp_path):
    gsm = TASKS["gsm8k"]
    with pytest.raises(ValueError, match=r"no local file .* hub .*folder with test.jsonl"):
        gsm.load("/nowhere/gsm8k")
    with pytest.raises(ValueError, match=r"should hold test\.jsonl"):
        gsm.load(tmp_path)
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no items"):
        gsm.load(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"q": "?", "a": "!"}\n')
    with pytest.raises(ValueError, match=r"none of the 1 .*'question' is not in \['q', 'a'\]"):
        gsm.load(tmp_path)
    (tmp_path / "test.txt").write_text("x")
    with pytest.raises(ValueError, match=r"can read \.jsonl, \.json, \.csv, \.parquet"):
        gsm.load(tmp_path / "test.txt")


def test_without_a_hub_the_error_says_what_to_pass(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach it\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for task in TASKS.values():
        with pytest.raises(ValueError, match=r"from the Hugging Face hub .*; pass a folder") as e:
            task.load()
        assert str(e.value).startswith(task.source.hub)
        assert "\n" not in str(e.value)


def test_files_that_are_none_of_their_kind_are_refused(tmp_path):
    for name, content, message in (
        ("a.json", b"{", "is not JSON"),
        ("b.json", b"{}", "must hold a list"),
        ("c.csv", b"question,answer\n\xff\xfe,2\n", "is not UTF-8"),
        ("d.parquet", b"PAR", "is not a Parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(data.read(tmp_path / name))


def test_a_bad_byte_or_a_strange_line_separator_spoils_no_other_line(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": "\xff"}\n{"a": "\xe2\x80\xa8"}\n')
    rows = list(data.read(file))
    assert [bool(row.wrong) for row in rows] == [False, True, False]
    assert [row.values for row in rows] == [{"a": 1}, {}, {"a": "\u2028"}]


def test_an_id_that_comes_twice_is_left_out(tmp_path):
    item = {"id": 7, "prompt": "Say so:", "answer": "so"}
    loaded = own_task(rows_as_files(tmp_path / "x.jsonl", [item, item])).load()
    assert len(loaded.items) == 1
    assert loaded.skipped == [("x.jsonl:2", "the id '7' has been used before")]


def test_limit_takes_from_every_group_in_turn():
    assert [i.id for i in TASKS["gsm8k"].load(FIXTURES, limit=1).items] == ["test-0"]
    two = TASKS["mmlu"].load(FIXTURES, limit=2).items
    assert [i.group for i in two] == ["made_up_botany", "made_up_law"]
    groups = "aaabbc"
    items = [Item(str(n), "p", group=group) for n, group in enumerate(groups)]
    picked = ["".join(i.group for i in common.spread(items, n)) for n in (1, 3, 5, 9, None)]
    assert picked == ["a", "abc", "aabbc", "aaabbc", "aaabbc"]
    with pytest.raises(ValueError, match="limit >= 1"):
        TASKS["mmlu"].load(FIXTURES, limit=0)


# Examples in the prompt


def test_shots_are_the_first_training_examples_but_never_the_item_itself():
    first, second = TASKS["gsm8k"].load(FIXTURES, shots=1).items
    assert first.shots == (
        "Question: A barn of 1,500 bales loses 300. How many stay?\n"
        "Answer: 1500-300=<<1500-300=1200>>1,200 bales stay.\n#### 1,200\n\n"
    )
    assert second.shots == (
        "Question: A crate holds 6 jars. How many jars do 2 crates hold?\n"
        "Answer: Two crates hold 6*2=<<6*2=12>>12 jars.\n#### 12\n\n"
    )
    assert second.prompt == "Question: A pen costs $3. What do 500 pens cost?\nAnswer:"
    assert second.full_prompt == second.shots + second.prompt


def test_shots_of_mmlu_are_of_the_subject_and_come_after_the_preamble():
    item = TASKS["mmlu"].load(FIXTURES, shots=1).items[0]
    preamble = (
        "The following are multiple choice questions (with answers) about made up botany.\n\n"
    )
    shot = "What is green?\nA. Moss\nB. Snow\nC. Coal\nD. Milk\nAnswer: A\n\n"
    body = "Which of these\nhas leaves?\nA. A kettle\nB. A fern\nC. A stone\nD. A bridge\nAnswer:"
    assert item.prompt == preamble + body
    assert item.shots == shot
    assert item.full_prompt == preamble + shot + body
    assert item.choices == (" A", " B", " C", " D")
    assert item.correct == (1,)


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="3 shots asked for, but there are 2 examples"):
        TASKS["gsm8k"].load(FIXTURES, shots=3)
    with pytest.raises(ValueError, match="there are 1 examples of made_up_law"):
        TASKS["mmlu"].load(FIXTURES, shots=2)
    with pytest.raises(ValueError, match="truthfulqa has no train split"):
        TASKS["truthfulqa"].load(FIXTURES, shots=1)
    with pytest.raises(ValueError, match="shots must be >= 0"):
        TASKS["gsm8k"].load(FIXTURES, shots=-1)


def test_the_train_split_is_there_to_train_on():
    items = TASKS["gsm8k"].load(FIXTURES, split="train").items
    assert [item.answers for item in items] == [("12",), ("1,200",), ("-2",)]
    assert items[2].target == " 3-5=<<3-5=-2>>-2\n#### -2"


# Prompts


PROMPTS = {
    "triviaqa": "Question: Which invented river crosses the city of Ombra??\nAnswer:",
    "cnn_dailymail": (
        "Summarize the following article:\n\nThe mayor of Ombra opened a bridge on Monday. It is "
        'blue, "very blue".\nPeople came.\n\nSummary:'
    ),
    "arc_easy": "Question: Which of these melts?\nAnswer:",
    "arc_challenge": "Question: Which of these melts?\nAnswer:",
    "svamp": "Question: Ada had 9 quills. She lost 2. How many quills has she now?\nAnswer:",
    "commonsenseqa": (
        "Question: What do you cross a river on?\nA. a kettle\nB. a bridge\nC. a fern\nD. a quill\n"
        "E. a stone\nAnswer:"
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_word_for_word(name):
    assert TASKS[name].load(FIXTURES).items[0].prompt == PROMPTS[name]


def test_truthfulqa_puts_each_choice_after_the_authors_examples():
    item = TASKS["truthfulqa"].load(FIXTURES).items[0]
    assert item.prompt.startswith(
        "Q: What is human life expectancy in the United States?\nA: Human"
    )
    assert item.prompt.endswith("Spain.\n\nQ: What happens to a stone that you water daily?\nA:")
    assert item.choices[:3] == (" It gets wet.", " Nothing but that it is wet.", " It grows.")
    assert item.correct == (0, 1)


# GSM8K


@pytest.mark.parametrize(
    ("text", "answer", "flexible", "strict", "proxy"),
    [
        (" 5+5=10\n#### 10", "10", 1, 1, 1),
        (" It is 10.", "10", 1, 0, 1),
        (" It is $1,200.", "1,200", 1, 0, 1),
        (" #### 1200", "1,200", 1, 1, 1),
        (" #### 10 and then 11", "10", 0, 1, 0),
        (" 10.00", "10", 0, 0, 0),
        # Quirks: signs, and points within numbers, do not count for Liu et al.
        (" #### -7", "-7", 1, 1, 1),
        (" 7", "-7", 0, 0, 1),
        (" 1.5", "15", 0, 0, 1),
        # They cut where a model goes on by itself.
        (" 10\nComment: 3 of 4", "10", 0, 0, 1),
        # Signs alone are a number for the harness.
        (" 10 ...", "10", 0, 0, 1),
        (" none", "10", 0, 0, 0),
        ("", "10", 0, 0, 0),
    ],
)
def test_gsm8k_scores(text, answer, flexible, strict, proxy):
    assert gsm8k.score(Item("x", "p", answers=(answer,)), said(text)) == {
        "exact_match_flexible": flexible,
        "exact_match_strict": strict,
        "exact_match_proxy": proxy,
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
    ],
)
def test_last_number(text, number):
    assert common.last_number(text) == number


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


# Own data


ROWS = [
    {"id": "one", "question": "2+2", "answer": "4"},
    {"id": "two", "question": "{x}", "answer": ["five", "5"]},
]


def own_file(folder, ending):
    file = folder / f"mine{ending}"
    if ending == ".jsonl":
        return rows_as_files(file, ROWS)
    if ending == ".json":
        file.write_text(json.dumps(ROWS))
    elif ending == ".csv":
        with file.open("w", newline="") as lines:
            table = csv.DictWriter(lines, ["id", "question", "answer"])
            table.writeheader()
            table.writerows({**row, "answer": row["answer"][0]} for row in ROWS)
    else:
        from pyarrow import Table, parquet

        listed = [{**row, "answer": list(row["answer"])} for row in ROWS]
        parquet.write_table(Table.from_pylist(listed), file)
    return file


@pytest.mark.parametrize("ending", data.READERS)
def test_own_data_in_every_format(tmp_path, ending):
    file = own_file(tmp_path, ending)
    task = own_task(file, "Q: {question}\nA:", max_tokens=8, stop=("\n",))
    items = task.load().items
    assert [item.id for item in items] == ["one", "two"]
    assert [item.prompt for item in items] == ["Q: 2+2\nA:", "Q: {x}\nA:"]
    assert items[0].answers == ("4",)
    assert (task.name, task.max_tokens, task.stop) == ("mine", 8, ("\n",))
    assert task.load(file) == task.load()


def test_own_prompts_without_a_template_are_taken_as_they_are(tmp_path):
    file = rows_as_files(tmp_path / "x.jsonl", [{"prompt": " Two {braces} ", "answer": "x"}])
    (item,) = own_task(file).load().items
    assert (item.id, item.prompt) == ("x-0", " Two {braces} ")


def test_own_columns_that_are_missing_are_named_with_those_there_are(tmp_path):
    file = own_file(tmp_path, ".csv")
    there = r"is not in \['id', 'question', 'answer'\]"
    with pytest.raises(ValueError, match=f"column 'prompt' {there}"):
        own_task(file).load()
    with pytest.raises(ValueError, match=f"column 'text' {there}"):
        own_task(file, "{text}").load()
    with pytest.raises(ValueError, match=f"column 'gold' {there}"):
        own_task(file, "{question}", answer="gold").load()


def test_own_templates_and_paths_are_checked_at_once(tmp_path):
    with pytest.raises(ValueError, match="names no column"):
        own_task("x.csv", "Question:")
    with pytest.raises(ValueError, match=r"write \{\{ for \{"):
        own_task("x.csv", "Question: {")
    with pytest.raises(ValueError, match="is a folder; pass one file of it"):
        own_task(tmp_path)
    with pytest.raises(ValueError, match=r"no local file .*; pass a file"):
        own_task(tmp_path / "gone.csv").load()
    with pytest.raises(ValueError, match="no train split"):
        own_task(own_file(tmp_path, ".csv"), "{question}").load(shots=1)


@pytest.mark.parametrize(
    ("text", "reason", "strict", "trimmed", "normalised"),
    [
        (" four", "stop", 1, 1, 1),
        (" four", "length", 0, 1, 1),
        (" four. And", "stop", 0, 1, 0),
        (" four\nfive", "stop", 0, 1, 0),
        (" Four", "stop", 0, 0, 1),
        (" the  FOUR!", "stop", 0, 0, 1),
        (" four and", "stop", 0, 0, 0),
        ("", "stop", 0, 0, 0),
        (" 1.5 l.\n", "stop", 1, 1, 1),
        (" 1.5 l.\nmore", "stop", 0, 1, 0),
        (" 1.7", "stop", 0, 0, 0),
        ("an", "stop", 0, 0, 0),
        ("The", "stop", 1, 1, 1),
    ],
)
def test_exact_match_strict_trimmed_and_normalised(text, reason, strict, trimmed, normalised):
    item = Item("x", "p", answers=("four", "1.5 l.", "The"))
    expected = (strict, trimmed, normalised)
    assert tuple(own.exact_match(item, said(text, reason)).values()) == expected
    assert own.METRICS["exact_match"].names == tuple(own.exact_match(item, said(text, reason)))


@pytest.mark.parametrize(
    ("prompt", "choice"),
    [
        ("Is it?", " yes"),
        ("Is it? ", "yes"),
        ("Is it?\n", "yes"),
        ("<|im_start|>assistant\n", "yes"),
        ("user: Is it?<|im_end|>", "yes"),
        ("Is it?<｜Assistant｜>", "yes"),
        ("Is it? [/INST]", " yes"),
        ("1 <|> 2", " yes"),
    ],
)
def test_a_choice_follows_a_line_break_or_a_turn_marker_without_a_space(tmp_path, prompt, choice):
    row = {"prompt": prompt, "choices": ["no", "yes"], "answer": "yes"}
    file = rows_as_files(tmp_path / "x.jsonl", [row])
    (item,) = own_task(file, metric="multiple_choice").load().items
    assert item.prompt == prompt
    assert item.choices[1] == choice


@pytest.mark.parametrize("answer", ["yes", "B", 1, "1"])
def test_own_choices(tmp_path, answer):
    row = {"prompt": "Is it?", "choices": ["no", "yes"], "answer": answer}
    task = own_task(rows_as_files(tmp_path / "x.jsonl", [row]), metric="multiple_choice")
    (item,) = task.load().items
    assert (item.choices, item.correct, item.target) == ((" no", " yes"), (1,), " yes")
    assert task.score(item, judged(-2.0, -1.0)) == {"acc": 1, "acc_norm": 1}
    assert task.max_tokens == 0


def test_own_choices_in_csv_are_json(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text(
        '\ufeffprompt,options,answer\nIs it?,"[""no"", ""yes""]",yes\nIs it?,no or yes,no\n',
        "utf-8",
    )
    loaded = own_task(file, metric="multiple_choice", choices="options").load()
    assert loaded.items[0].choices == (" no", " yes")
    assert loaded.skipped == [("x.csv:3", "column 'options' is not a JSON list: 'no or yes'")]


def test_own_answers_that_do_not_fit_are_malformed(tmp_path):
    rows = [
        {"prompt": "?", "choices": ["a", "b"], "answer": "C"},
        {"prompt": "?", "choices": ["a"], "answer": "a"},
        {"prompt": "?", "choices": ["a", "b"], "answer": "a"},
    ]
    task = own_task(rows_as_files(tmp_path / "x.jsonl", rows), metric="multiple_choice")
    assert [where for where, _ in task.load().skipped] == ["x.jsonl:1", "x.jsonl:2"]
    rows = [{"prompt": "?", "answer": answer} for answer in ("12", "twelve", "", None, [])]
    task = own_task(rows_as_files(tmp_path / "y.jsonl", rows), metric="number_match")
    assert len(task.load().skipped) == 4


def test_own_metrics_score_in_their_order():
    item = Item("x", "p", answers=("12",), choices=(" a", " b"), correct=(0,))
    response = Response(" 12", "stop", (Choice(-1.0), Choice(-2.0)))
    for metric in METRICS.values():
        scores = metric.score(item, response)
        assert list(scores) == list(metric.names)
        assert metric.extract(item, response)


def test_own_data_on_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*where, split):
        asked.append((*where, split))
        return [{"question": "2+2", "answer": "4"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = own_task("someone/sums", "{question}=", config="easy", split="dev")
    (item,) = task.load().items
    assert (item.id, item.prompt, task.name) == ("dev-0", "2+2=", "someone/sums")
    assert asked == [("someone/sums", "easy", "dev")]


# The hub's fields, and the harness on the same items


def hub_rows(name, split="test"):
    """Made-up items with the fields that the default data set has on the hub."""
    test = split == "test"
    if name == "gsm8k":
        rows = [row.values for row in data.read(FIXTURES / f"gsm8k/{split}.jsonl")]
        return [rows[2]] if test else rows[1:]
    if name == "truthfulqa":
        return [
            {
                "question": f"Do {what} sleep?",
                "mc1_targets": {"choices": ["No.", "At night.", "Always."], "labels": [1, 0, 0]},
                "mc2_targets": {
                    "choices": ["No.", "They do not.", "At night.", "Always."],
                    "labels": [1, 1, 0, 0],
                },
            }
            for what in ("kettles", "stones")
        ]
    if name == "triviaqa":
        return [
            {
                "question": f"Which river crosses Ombra{'' if test else ' first'}?",
                "question_id": f"{split}_1",
                "answer": {"value": "The Vell", "aliases": ["The Vell", "River Vell", "St. Vell"]},
            }
        ]
    if name == "cnn_dailymail":
        return [{"article": f"A {split}.\nIt came.", "highlights": "It came .\nA lot", "id": split}]
    if name == "mmlu":
        return [
            {
                "question": f" Which is a {split}? ",
                "subject": "high_school_botany",
                "choices": ["Oak", "Vell", "Ada", "Ombra"],
                "answer": 2,
            }
        ]
    labels = "ABCDE" if name == "commonsenseqa" else "1234"
    return [
        {
            "id": split,
            "question": f"Which of these is a {split}? ",
            "choices": {
                "text": [f"{'long ' * n}{n}" for n in range(len(labels))],
                "label": list(labels),
            },
            "answerKey": labels[1],
        }
    ]


@pytest.fixture
def hub(monkeypatch):
    """The hub, with made-up items; returns what is asked of it."""
    datasets = pytest.importorskip("datasets")
    asked = []
    names = {task.source.hub: name for name, task in TASKS.items() if "letters" not in name}

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        training = split == "train" or (name == "cais/mmlu" and split == "dev")
        return hub_rows(names[name], "train" if training else "test")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", [name for name in TASKS if name != "svamp"])
def test_hub_fields_become_items(hub, name):
    task = TASKS[name]
    loaded = task.load(shots="truthfulqa" not in name)
    assert loaded.items
    assert not loaded.skipped
    assert hub[0] == (task.source.hub, task.source.config, task.source.splits["test"])


def test_hub_fields_of_svamp(monkeypatch):
    datasets = pytest.importorskip("datasets")
    row = {"ID": "chal-1", "Body": "Ada had 9.", "Question": "And now?", "Answer": "1234567.0"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [row])
    (item,) = TASKS["svamp"].load().items
    assert (item.prompt, item.answers) == ("Question: Ada had 9. And now?\nAnswer:", ("1234567",))


def test_other_fields_on_the_hub_are_named(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"q": "?"}])
    with pytest.raises(ValueError, match=r"other fields than expected, \['q'\]"):
        TASKS["mmlu"].load()


def harness_task(name, yaml):
    """lm-evaluation-harness's own task, on the made-up items."""
    loader = pytest.importorskip(
        "lm_eval.tasks._yaml_loader", reason="lm_eval 0.4.13 is not installed"
    )
    import lm_eval
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    config = loader.load_yaml(Path(lm_eval.__file__).parent / "tasks" / yaml)
    training = {config.get("training_split"), config.get("fewshot_split")}
    splits = {value for key, value in config.items() if key.endswith("_split") and value}
    for key in ("tag", "include", "task_alias"):
        config.pop(key, None)
    config["fewshot_config"] = {"sampler": "first_n"}
    config["custom_dataset"] = lambda **_: DatasetDict(
        {
            split: Dataset.from_list(hub_rows(name, "train" if split in training else "test"))
            for split in splits
        }
    )
    return ConfigurableTask(config=config)


HARNESS = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "triviaqa": "triviaqa/default.yaml",
    "cnn_dailymail": "cnn_dailymail/cnn_dailymail.yaml",
    "mmlu": "mmlu/default/mmlu_high_school_biology.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "commonsenseqa": "commonsense_qa/default.yaml",
    "truthfulqa": "truthfulqa/truthfulqa_mc2.yaml",
}


@pytest.mark.parametrize("name", HARNESS)
def test_harness_prompts_and_choices(hub, name):
    theirs = harness_task(name, HARNESS[name])
    docs, task = list(theirs.eval_docs), TASKS[name]
    for shots in (0,) if name in ("truthfulqa", "cnn_dailymail") else (0, 1):
        items = task.load(shots=shots).items
        assert len(items) == len(docs)
        for doc, item in zip(docs, items, strict=True):
            context = theirs.fewshot_context(doc, shots)
            assert item.full_prompt == context.replace("high school biology", "high school botany")
            if task.kind == "likelihood":
                requests = theirs.construct_requests(doc, context)
                assert item.choices == tuple(request.args[1] for request in requests)
    if task.kind == "generate":
        # TriviaQA's other stop strings are cut at by its score.
        until = set(theirs.config.generation_kwargs["until"]) - {".", ","}
        assert set(task.stop) == until


@pytest.mark.parametrize(
    "name", ["mmlu", "arc_easy", "arc_challenge", "commonsenseqa", "truthfulqa"]
)
def test_harness_likelihood_scores(hub, name):
    yamls = {"acc": HARNESS[name]}
    if name == "truthfulqa":
        yamls = {metric: f"truthfulqa/truthfulqa_{metric}.yaml" for metric in ("mc1", "mc2")}
    item, draw = TASKS[name].load().items[0], random.Random(0)
    for metric, yaml in yamls.items():
        theirs = harness_task(name, yaml)
        doc = next(iter(theirs.eval_docs))
        for _ in range(50):
            logprobs = [-20 * draw.random() for _ in item.choices]
            ours = TASKS[name].score(item, judged(*logprobs))
            kept = [p for n, p in enumerate(logprobs) if metric != "mc1" or n != 1]
            found = theirs.process_results(doc, [(p, False) for p in kept])
            if name == "truthfulqa":
                assert ours[metric] == pytest.approx(found["acc"])
            else:
                assert ours == {each: found[each] for each in TASKS[name].metrics}


PIECES = [
    "The Vell",
    "river vell",
    "St. Vell",
    "1,500",
    "$1500.",
    "#### ",
    "-",
    "2",
    "7.5",
    " ",
    "\n",
    ",",
    ".",
]


@pytest.mark.parametrize("name", ["gsm8k", "triviaqa", "cnn_dailymail"])
def test_harness_generation_scores(hub, name):
    theirs = harness_task(name, HARNESS[name])
    doc, item = next(iter(theirs.eval_docs)), TASKS[name].load().items[0]
    outputs = ["".join(each) for n in (1, 2, 3) for each in itertools.product(PIECES, repeat=n)]
    for text in random.Random(0).sample(outputs, 1000):
        ours = TASKS[name].score(item, said(text))
        if name == "cnn_dailymail":
            found = theirs.process_results(doc, [text])
            assert ours == pytest.approx({metric: found[metric] for metric in ours})
            continue
        cut = text
        for mark in theirs.config.generation_kwargs["until"]:
            cut = cut.split(mark)[0]
        (request,) = [theirs.construct_requests(doc, "")]
        request.resps = [cut]
        theirs._instances = [request]
        theirs.apply_filters()
        right = {
            key: theirs.process_results(doc, [value])["exact_match"]
            for key, value in request.filtered_resps.items()
        }
        if name == "triviaqa":
            assert ours["exact_match_harness"] == right["remove_whitespace"], text
        else:
            assert ours["exact_match_strict"] == right["strict-match"], text
            assert ours["exact_match_flexible"] == right["flexible-extract"], text


# The published files


PUBLISHED = {
    ("gsm8k", "test"): 658,
    ("gsm8k", "train"): 7473,
    ("truthfulqa", "test"): 419,
    ("truthfulqa_letters", "test"): 419,
    ("triviaqa", "test"): 155,
    ("cnn_dailymail", "test"): 469,
    ("cnn_dailymail", "train"): 100,
    ("mmlu", "test"): 6984,
    ("mmlu", "train"): 285,
    ("arc_easy", "test"): 1213,
    ("arc_easy", "train"): 570,
    ("arc_challenge", "test"): 593,
    ("arc_challenge", "train"): 299,
    ("svamp", "test"): 488,
    ("commonsenseqa", "test"): 607,
    ("commonsenseqa", "train"): 200,
}


@pytest.fixture(scope="module")
def published():
    where = os.environ.get("DLF_EVAL_DATA")
    if not where:
        pytest.skip("DLF_EVAL_DATA names no folder of published evaluation data")
    return Path(where)


@pytest.mark.parametrize(("name", "split"), PUBLISHED)
def test_published_files_load_in_full(published, name, split):
    loaded = TASKS[name].load(published, split=split)
    assert loaded.skipped == []
    assert len(loaded.items) == PUBLISHED[name, split]


def test_published_truthfulqa_csv(published):
    loaded = TASKS["truthfulqa"].load(published / "truthfulqa" / "TruthfulQA.csv")
    assert (len(loaded.items), loaded.skipped) == (419, [])


def test_published_letters_are_spread(published):
    items = TASKS["truthfulqa_letters"].load(published).items
    four = [item.answers[0] for item in items if "\nD. " in item.prompt]
    assert len(four) > 300
    assert all(0.18 < four.count(letter) / len(four) < 0.32 for letter in "ABCD")


@pytest.mark.parametrize(
    ("name", "split"), [key for key in PUBLISHED if TASKS[key[0]].kind == "generate"]
)
def test_published_answers_score_one(published, name, split):
    task = TASKS[name]
    for item in task.load(published, split=split, limit=None if "cnn" not in name else 20).items:
        scores = task.score(item, said(item.target))
        if name == "triviaqa":  # the harness cuts aliases such as "St. Vell" itself
            scores["exact_match_harness"] = 1.0
        assert scores == pytest.approx(dict.fromkeys(task.metrics, 1.0)), item.id


def test_published_mmlu_has_its_subjects(published):
    items = TASKS["mmlu"].load(published, shots=5).items
    assert len({item.group for item in items}) == 57
    assert all(item.shots.count("\nAnswer: ") == 5 for item in items)
    few = TASKS["mmlu"].load(published, limit=57).items
    assert len({item.group for item in few}) == 57


def test_published_svamp_equations_agree_with_the_answers(published):
    for row in data.read(published / "svamp" / "SVAMP.json"):
        (answer,) = TASKS["svamp"].build(row).answers
        value = eval(row["Equation"], {"__builtins__": {}})
        assert value == pytest.approx(float(answer)), row["ID"]


# The house


def test_tasks_need_neither_torch_nor_datasets_to_be_imported():
    code = (
        "import sys, types; p = types.ModuleType('dlf_ray'); p.__path__ = [sys.argv[1]]; "
        "sys.modules['dlf_ray'] = p; import dlf_ray.evaluation.tasks; "
        "print(*({'torch', 'datasets', 'pyarrow', 'nltk'} & set(sys.modules)))"
    )
    package = str(ROOT / "dlf_ray")
    done = subprocess.run(
        [sys.executable, "-c", code, package], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
