"""The benchmarks: loading, examples and prompts, on made-up items in the published formats."""

import json
import subprocess
import sys

import pytest
from processes import ROOT
from tasking import FIXTURES, judged, rows_as_files, said

from dlf_ray.evaluation.tasks import TASKS, Item, common, data, get_task, own_task

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


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "a", "answer"', "not JSON"),
        (b'{"question": "\xff", "answer": "#### 1"}', "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"question": 5, "answer": "#### 1"}', "column 'question' must be text"),
        (b'{"question": "a", "answer": "one"}', "does not end in"),
        (b'{"answer": "#### 1"}', "is not in"),
        (b"5", "not an object"),
    ],
    ids=lambda value: value[:30] if isinstance(value, bytes) else "",
)
def test_one_broken_line_of_json_is_one_failure(tmp_path, line, reason):
    fine = b'{"question": "a%d", "answer": "#### 1"}'
    (tmp_path / "test.jsonl").write_bytes(b"\n".join([fine % 1, line, fine % 2, b""]))
    loaded = TASKS["gsm8k"].load(tmp_path)
    assert [item.id for item in loaded.items] == ["test-0", "test-2"]
    ((where, why),) = loaded.skipped
    assert where == "test.jsonl:2"
    assert reason in why


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"only one", "1 columns instead of 2"),
        (b"one,two,three", "3 columns instead of 2"),
        (b"caf\xe9,x", "column 'prompt' is not UTF-8 text"),
        (b'never,"closed', "not CSV"),
        (b'closed,"too" early', "not CSV"),
    ],
    ids=str,
)
@pytest.mark.parametrize("after", [b"c,y\n", b'"c","y"\n', b'c,"two\nlines"\n'], ids=str)
def test_one_broken_line_of_csv_is_one_failure(tmp_path, line, reason, after):
    """A quote that is never closed would else take the rest of the file for an answer."""
    file = tmp_path / "x.csv"
    file.write_bytes(b"\xef\xbb\xbfprompt,answer\na,y\n" + line + b"\n" + after + b"\nd,y\n")
    loaded = own_task(file).load()
    assert [item.prompt for item in loaded.items] == ["a", "c", "d"]
    ((where, why),) = loaded.skipped
    assert where == "x.csv:3"
    assert reason in why


def test_numbers_that_are_none_are_malformed(tmp_path):
    rows = [
        {"ID": str(n), "Body": "Ada had 9.", "Question": f"And {n}?", "Answer": answer}
        for n, answer in enumerate((7.0, 1e999, float("nan"), 10**400, "x"))
    ]
    (tmp_path / "SVAMP.json").write_text(json.dumps(rows))
    loaded = TASKS["svamp"].load(tmp_path)
    assert [item.answers for item in loaded.items] == [("7",)]
    assert len(loaded.skipped) == 4


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
        ("c.json", b'["\xff\xfe"]', "is not UTF-8"),
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
