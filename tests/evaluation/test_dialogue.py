"""Items as conversations: what each model reads, and what of it a run's folder remembers."""

import json
import logging
import shutil

import msgspec
import numpy as np
import pytest
import yaml
from conftest import EXPERTS, dlf
from transformers import AutoTokenizer

from dlf_ray import Family, LocalEngine, SamplingParams
from dlf_ray.evaluation.answering import answers
from dlf_ray.evaluation.dialogue import Asking
from dlf_ray.evaluation.evaluate import run
from dlf_ray.evaluation.experiment import Experiment, TaskSpec
from dlf_ray.evaluation.results import read, read_config
from dlf_ray.evaluation.tasks import Item, own_task

TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
)
SOLVING = TURNS.replace("assistant:", "solver:")
ITEM = Item(
    "x",
    "About sums.\n\nQuestion: 2+2?\nAnswer:",
    preamble="About sums.\n\n",
    examples=(("Question: 1+1?\nAnswer:", " 2"), ("Question: 0+1?\nAnswer:", " 1")),
    target=" 4",
    answers=("4",),
)


def said(role, content):
    return {"role": role, "content": content}


def test_an_item_as_text_and_as_messages():
    plain, chat = Asking(system="Be short."), Asking(chat=True, system="Be short.")
    shots = "Question: 1+1?\nAnswer: 2\n\nQuestion: 0+1?\nAnswer: 1\n\n"
    last = "Question: 2+2?\nAnswer:"
    told = "Be short.\n\nAbout sums.\n\n"
    assert plain.text(ITEM) == told + shots + last
    assert plain.text(ITEM, shots=False) == told + last
    assert Asking().text(ITEM) == ITEM.full_prompt == "About sums.\n\n" + shots + last
    assert chat.messages(ITEM) == [said("system", told), said("user", shots + last)]
    assert chat.messages(ITEM, shots=False) == [said("system", told), said("user", last)]
    turns = Asking(chat=True, multiturn=True)
    assert turns.messages(ITEM) == [
        said("system", "About sums.\n\n"),
        said("user", "Question: 1+1?\nAnswer:"),
        said("assistant", "2"),
        said("user", "Question: 0+1?\nAnswer:"),
        said("assistant", "1"),
        said("user", last),
    ]
    assert (plain.choice(" yes"), chat.choice(" yes"), chat.choice("yes")) == (" yes", "yes", "yes")


def test_examples_are_turns_unless_told_otherwise():
    common = {"family": "x", "tasks": (), "output": "y"}
    assert Experiment(**common).asking == Asking()
    chat = {**common, "apply_chat_template": True, "system_instruction": "Be short."}
    assert Experiment(**chat).asking == Asking(True, "Be short.", True)
    assert not Experiment(**chat, fewshot_as_multiturn=False).asking.multiturn
    with pytest.raises(ValueError, match="`fewshot_as_multiturn` needs `apply_chat_template`"):
        Experiment(**common, fewshot_as_multiturn=True)


# ---------------------------------------------------------------- a family


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    """The family, of which `math` was taught another template."""
    root = tmp_path_factory.mktemp("dialogue") / "family"
    shutil.copytree(folder, root)
    for name, template in (("large", TURNS), ("math", SOLVING)):
        made = AutoTokenizer.from_pretrained(root / name)
        made.chat_template = template
        made.save_pretrained(root / name)
    path = root / "family.yaml"
    experts = {name: {"model": name} for name in EXPERTS}
    family = {"large": {"model": "large"}, "base": {"model": "base"}, "experts": experts}
    path.write_text(yaml.safe_dump({**family, "engine": {"max_model_len": 256}}))
    return path


@pytest.fixture(scope="module")
def engine(file):
    with LocalEngine(Family.from_yaml(file)) as made:
        yield made


CHAT = Asking(chat=True, system="Be short.", multiturn=True)


@pytest.mark.parametrize("shots_for", ["large", "all"])
def test_answers_are_those_of_the_conversation(engine, tmp_path, shots_for):
    """Every model reads it by its own template, with the examples or without."""
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "?", "answer": "4"}\n')
    task = own_task(path)
    (answer,) = answers(engine, task, [ITEM], {}, max_tokens=5, shots_for=shots_for, asking=CHAT)
    whole, zero = CHAT.messages(ITEM), CHAT.messages(ITEM, shots=False)
    prompt = engine.render(whole).prompt
    if shots_for == "large":
        prompt = {**engine.render(zero).prompt, "large": prompt["large"]}
    (expected,) = engine.generate(prompt, SamplingParams(max_tokens=5))
    assert answer.output.token_ids == expected.token_ids
    assert answer.output.weights == expected.weights


def test_choices_are_judged_without_their_space(engine, tmp_path):
    path = tmp_path / "own.jsonl"
    row = {"prompt": "Is it?", "choices": ["yes", "no, it is not"], "answer": "yes"}
    path.write_text(json.dumps(row) + "\n")
    task = own_task(path, metric="multiple_choice")
    for options in ({"experts": []}, {"alone": "math"}):
        (answer,) = answers(engine, task, task.load(path).items, options, asking=CHAT)
        text = engine.render(CHAT.messages(answer.item)).text
        if "alone" in options:
            text = text.replace("assistant:\n", "solver:\n")
        for choice, judged in zip(row["choices"], answer.response.choices, strict=True):
            (output,) = engine.score([text], [choice], **options)
            np.testing.assert_allclose(judged.logprob, sum(output.logprobs), atol=1e-4)


def test_templates_may_end_in_another_way(engine, tmp_path, monkeypatch):
    """What one ends in belongs to its prompt, not to the continuation of all."""
    ends = {"large": TURNS + "It is", "math": TURNS + "I say: "}
    monkeypatch.setattr(engine, "chat_templates", ends)
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "Is it?", "choices": ["so", "not"], "answer": "so"}\n')
    task = own_task(path, metric="multiple_choice")
    (answer,) = answers(engine, task, task.load(path).items, {"experts": ["math"]}, asking=CHAT)
    tokens = engine.tokenizer.encode
    for choice, judged in zip(("so", "not"), answer.response.choices, strict=True):
        prompt, rest = engine.render(CHAT.messages(answer.item)).prompt, tokens(choice)
        (output,) = engine.score([prompt], [rest], experts=["math"])
        np.testing.assert_allclose(judged.logprob, sum(output.logprobs), atol=1e-4)


@pytest.mark.parametrize("asking", [Asking(), CHAT], ids=["plain", "chat"])
def test_an_item_without_tokens_ends_nothing_but_itself(engine, asking, tmp_path, monkeypatch):
    (tmp_path / "own.jsonl").write_text("")
    written, judged = (
        own_task(tmp_path / "own.jsonl", metric=m) for m in ("rouge", "multiple_choice")
    )
    monkeypatch.setattr(engine, "chat_templates", {"large": "{{ messages[-1].content }}"})
    items = [Item("empty", "", answers=("x",)), Item("fine", "Is it?", answers=("x",))]
    asking = Asking(asking.chat)
    found = {a.item.id: a for a in answers(engine, written, items, {}, max_tokens=2, asking=asking)}
    assert "no tokens" in found["empty"].output.error
    assert found["fine"].scores
    choices = ("", " b")
    items = [
        Item(name, "Is it?", choices=choices[n:] * 2, correct=(0,)) for n, name in enumerate("ab")
    ]
    found = {a.item.id: a for a in answers(engine, judged, items, {}, asking=asking)}
    assert "no tokens" in found["a"].output.error
    assert found["b"].scores


def test_a_template_without_a_system_goes_on_without_it(engine, tmp_path, caplog, monkeypatch):
    """As the harness does; it is said once."""
    monkeypatch.setattr(engine, "chat_templates", {"large": STRICT})
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "4"}\n{"prompt": "b", "answer": "4"}\n')
    task = own_task(path)
    items = task.load(path).items
    with caplog.at_level(logging.WARNING):
        found = list(answers(engine, task, items, {}, max_tokens=3, asking=CHAT))
    for each in found:
        (expected,) = engine.chat([said("user", each.item.prompt)], SamplingParams(max_tokens=3))
        assert each.output.token_ids == expected.token_ids
    assert sum("without the system's message" in line for line in caplog.messages) == 1


# ---------------------------------------------------------------- a run


def experiment(file, tmp_path, **changes):
    path = tmp_path / "items.jsonl"
    rows = [{"id": i, "prompt": f"Question {i}:", "answer": "yes"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "family": str(file),
        "tasks": (TaskSpec(data=str(path), max_tokens=4),),
        "methods": ("large", "expert:math"),
        "output": str(tmp_path / "results"),
    }
    return Experiment(**{**values, **changes})


def quiet(made, start=LocalEngine):
    return run(made, start, log=lambda _: None)


def test_a_run_remembers_how_it_asked(file, tmp_path, engine):
    made = experiment(file, tmp_path, apply_chat_template=True, system_instruction="Be short.")
    quiet(made)
    rows = read(made.output).to_pylist()
    assert {row["task_version"] for row in rows} == {"3, chat"}
    for row in rows:
        talk = [said("system", "Be short."), said("user", f"Question {row['item']}:")]
        options = {"experts": []} if row["method"] == "large" else {"alone": "math"}
        (expected,) = engine.chat(talk, SamplingParams(max_tokens=4), **options)
        assert row["token_ids"] == expected.token_ids
    known = read_config(made.output)["tasks"]["items"]
    assert known["apply_chat_template"] is True
    assert known["system_instruction"] == "Be short."
    quiet(made, None)  # nothing is left to do
    for change, words in (
        ({"system_instruction": None}, "system_instruction"),
        ({"system_instruction": "Be long."}, "system_instruction"),
        ({"apply_chat_template": False}, "apply_chat_template"),
    ):
        with pytest.raises(ValueError, match=f"(?s)other settings.*{words}"):
            quiet(msgspec.structs.replace(made, **change), None)


def test_an_instruction_comes_first_without_a_chat_too(file, tmp_path, engine):
    made = experiment(file, tmp_path, system_instruction="Be short. ", methods=("large",))
    quiet(made)
    prompts = [f"Be short. Question {i}:" for i in range(3)]
    expected = engine.generate(prompts, SamplingParams(max_tokens=4), experts=[])
    rows = read(made.output).to_pylist()
    assert [row["token_ids"] for row in rows] == [each.token_ids for each in expected]


def test_the_command_puts_items_as_conversations(file, folder, tmp_path):
    made = experiment(file, tmp_path, apply_chat_template=True)
    quiet(made)
    words = ("--data", made.tasks[0].data, "--methods", "large,expert:math", "--max-tokens", 4)
    output = ("--output", tmp_path / "by command", "--local")
    shown = dlf("evaluate", file, *words, *output, "--apply-chat-template")
    assert shown.exit_code == 0, shown.output
    drop = ["seconds"]
    assert read(tmp_path / "by command").drop_columns(drop) == read(made.output).drop_columns(drop)
    raw = msgspec.to_builtins(made) | {"output": str(tmp_path / "by file")}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(raw))
    shown = dlf("evaluate", tmp_path / "experiment.yaml", "--local")
    assert shown.exit_code == 0, shown.output
    assert read(tmp_path / "by file").drop_columns(drop) == read(made.output).drop_columns(drop)
    for more, message in (
        (["--fewshot-as-multiturn"], "needs `apply_chat_template`"),
        (["--apply-chat-template"], "no chat template"),
    ):
        plain = tmp_path / "plain.yaml"
        family = {name: {"model": str(folder / name)} for name in ("large", "base")}
        plain.write_text(yaml.safe_dump({**family, "experts": {}}))
        shown = dlf("evaluate", plain, *words[:3], "large", "--local", *more)
        assert shown.exit_code == 1
        assert message in " ".join(shown.output.split())
