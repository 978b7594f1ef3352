"""The benchmarks on made-up items with the hub's fields.

`test_harness_*` hold them against lm-evaluation-harness itself where it is installed.
"""

import itertools
import random
from pathlib import Path

import pytest
import tiny
from tasking import FIXTURES, judged, said

from dlf_ray.engine.chat import rendered
from dlf_ray.evaluation.dialogue import Asking
from dlf_ray.evaluation.tasks import TASKS, data


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


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.mark.parametrize("system", [None, "Be short.", "Be short.\n"], ids=repr)
@pytest.mark.parametrize("name", HARNESS)
def test_harness_conversations(hub, tmp_path, name, system):
    theirs, tokenizer = harness_task(name, HARNESS[name]), tiny.tokenizer(tmp_path)
    docs, task = list(theirs.eval_docs), TASKS[name]

    def template(messages, add_generation_prompt):
        return tokenizer.apply_chat_template(
            messages,
            chat_template=TURNS,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    for shots, turns in itertools.product((0, 1), (False, True)):
        if shots and name in ("truthfulqa", "cnn_dailymail"):
            continue
        asking, items = Asking(True, system, turns), task.load(shots=shots).items
        how = {"apply_chat_template": True, "chat_template": template}
        for doc, item in zip(docs, items, strict=True):
            plain = theirs.fewshot_context(doc, shots, system_instruction=system)
            context = theirs.fewshot_context(
                doc, shots, system_instruction=system, fewshot_as_multiturn=turns, **how
            )
            ours = (
                Asking(system=system).text(item),
                rendered(tokenizer, TURNS, asking.messages(item)),
            )
            both = (plain, context)
            assert ours == tuple(t.replace("school biology", "school botany") for t in both)
            if task.kind == "likelihood":
                requests = theirs.construct_requests(doc, context, **how)
                assert [*map(asking.choice, item.choices)] == [r.args[1] for r in requests]


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
