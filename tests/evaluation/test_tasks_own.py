"""Tasks of one's own files: formats, columns, choices and metrics."""

import csv
import json

import pytest
from tasking import judged, rows_as_files, said

from dlf_ray.evaluation.tasks import METRICS, Choice, Item, Response, data, own, own_task

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


@pytest.mark.parametrize(
    ("metric", "row", "reason"),
    [
        ("exact_match", {"prompt": "?", "answer": {"a": 1}}, "must hold text or numbers"),
        ("exact_match", {"prompt": "?", "answer": ["a", None]}, "must hold text or numbers"),
        ("exact_match", {"prompt": ["?"], "answer": "a"}, "column 'prompt' must be text"),
        ("exact_match", {"prompt": "\ud83d", "answer": "a"}, "column 'prompt' is not UTF-8 text"),
        ("exact_match", {"prompt": "?", "answer": ["\udc00"]}, "column 'answer' is not UTF-8 text"),
        ("multiple_choice", {"prompt": "?", "choices": ["a", ""], "answer": "a"}, "empty choice"),
        ("multiple_choice", {"prompt": "?", "choices": ["a", {}], "answer": "a"}, "must hold text"),
        ("multiple_choice", {"prompt": "?", "choices": "abc", "answer": "a"}, "not a JSON list"),
    ],
    ids=str,
)
def test_one_wrong_record_is_one_failure_with_its_line(tmp_path, metric, row, reason):
    fine = {"prompt": "?", "choices": ["a", "b"], "answer": "a"}
    task = own_task(rows_as_files(tmp_path / "x.jsonl", [fine, row, fine]), metric=metric)
    loaded = task.load()
    assert [item.id for item in loaded.items] == ["x-0", "x-2"]
    ((where, why),) = loaded.skipped
    assert where == "x.jsonl:2"
    assert reason in why


def test_a_template_that_gives_nothing_is_a_failure_of_its_line(tmp_path):
    rows = [{"q": "a", "answer": "b"}, {"q": " ", "answer": "b"}]
    loaded = own_task(rows_as_files(tmp_path / "x.jsonl", rows), "{q}").load()
    assert loaded.skipped == [("x.jsonl:2", "the prompt is empty")]


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
