"""`dlf chat`, driven through a pipe, and `dlf generate --chat`."""

import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import yaml
from conftest import EXPERTS, dlf
from typer.testing import CliRunner

from dlf_ray import Family, LocalEngine, SamplingParams
from dlf_ray.cli import app

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def file(folder):
    path = folder / "chat.yaml"
    experts = {name: {"model": name} for name in EXPERTS}
    family = {"large": {"model": "large"}, "base": {"model": "base"}, "experts": experts}
    settings = {**family, "engine": {"max_model_len": 128}}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def template(folder):
    path = folder / "chat.jinja"
    path.write_text(TEMPLATE)
    return str(path)


@pytest.fixture(scope="module")
def engine(file):
    with LocalEngine(Family.from_yaml(file)) as made:
        yield made


def talked(file, template, *lines, options=()):
    """What `dlf chat` prints where these lines are typed."""
    words = ("chat", file, "--local", "--chat-template", template, "--max-tokens", 6, *options)
    runner = CliRunner(env={"COLUMNS": "200"})
    shown = runner.invoke(app, list(map(str, words)), input="".join(f"{each}\n" for each in lines))
    assert shown.exit_code == 0, shown.output
    return shown.output


def visible(text):
    """Without what a terminal would ring or go back at."""
    return re.sub("[\x00-\x08\x0b-\x1f]", "", text.expandtabs())


def answered(engine, *said, system=None, **options):
    """The text that follows a conversation: what the user said, and the answers to it."""
    messages = [{"role": "system", "content": system}] if system else []
    for text in said:
        messages.append({"role": "user", "content": text})
        sampling = SamplingParams(max_tokens=6)
        (output,) = engine.chat(messages, sampling, chat_template=TEMPLATE, **options)
        messages.append({"role": "assistant", "content": output.text})
    return messages[-1]["content"]


def seen(*args, **options):
    """As a terminal shows it."""
    return visible(answered(*args, **options))


def test_generate_answers_each_prompt_as_what_a_user_says(file, template, engine):
    words = ("--chat", "--chat-template", template, "--max-tokens", 6, "--local")
    two = ("--prompt", "Hello.", "--prompt", "And :smile:?")
    shown = dlf("generate", file, *two, *words, "--system", "Be short.")
    assert shown.exit_code == 0, shown.output
    for text in ("Hello.", "And :smile:?"):
        assert f"{text}\n{seen(engine, text, system='Be short.')}\n" in visible(shown.output)
    refused = dlf("generate", file, "--prompt", "x", "--system", "y", "--local")
    assert refused.exit_code == 1
    assert "add --chat" in refused.output


def test_what_was_said_is_remembered_until_it_is_forgotten(file, template, engine):
    shown = talked(file, template, "Hello.", "", "And you?", "/reset", "And you?", "/quit", "Never")
    expected = [
        seen(engine, "Hello."),
        seen(engine, "Hello.", "And you?"),
        "the conversation is forgotten",
        seen(engine, "And you?"),
    ]
    assert visible(shown) == "".join(f"{text}\n" for text in expected)


def test_commands_change_how_it_is_answered(file, template, engine):
    shown = talked(
        file, template, "/experts math,prose", "/rule static", "/system Be short.", "Hi."
    )
    expected = seen(engine, "Hi.", system="Be short.", experts=["math", "prose"], rule="static")
    assert visible(shown).startswith(
        f"experts: math, prose\nrule: static\nsystem: Be short.\n{expected}\n"
    )
    shown = talked(file, template, "/experts none", "Hi.", "/experts all", "/experts", "/system")
    assert visible(shown).startswith(f"experts: none\n{seen(engine, 'Hi.', experts=[])}\n")
    assert visible(shown).endswith(f"experts: {', '.join(EXPERTS)}\n" * 2 + "system: nothing\n\n")
    alone = talked(
        file, template, "/experts", "/rule", "/experts math", options=["--alone", "base"]
    )
    assert alone == "experts: base\nrule: grid\nexperts: math\n\n"


def test_help_names_every_command_and_mistakes_end_nothing(file, template, engine):
    shown = talked(file, template, "/help", "/experts chess", "/rule chess", "/dance", "Hello.")
    for name in ("/experts", "/rule", "/system", "/reset", "/help", "/quit"):
        assert name in shown
    assert "no expert 'chess'" in shown
    assert "there is no rule 'chess'; there are grid, exact" in shown
    assert "there is no /dance; there are /experts" in shown
    assert visible(shown).endswith(f"{seen(engine, 'Hello.')}\n\n")


def test_a_conversation_that_is_too_long_loses_its_last_turn_only(file, template, engine):
    shown = talked(file, template, "Hello.", "word " * 200, "And you?")
    assert shown.count("error:") == 1
    assert "leaves no room to answer in its 128" in shown
    assert visible(shown).endswith(f"{seen(engine, 'Hello.', 'And you?')}\n\n")


def test_who_carried_an_answer_is_said_on_demand(file, template):
    shown = talked(file, template, "Hello.", options=["--show-weights"])
    assert "large model alone" in shown


def test_mistakes_show_before_models_are_loaded(file):
    for words, message in (
        (("--experts", "chess"), "chess"),
        (("--top-p", "2"), "top_p"),
        ((), "no chat template: give one as `chat_template`"),
        (("--chat-template", "/nowhere.jinja"), "no Jinja text and no file"),
    ):
        shown = dlf("chat", file, "--local", *words)
        assert shown.exit_code == 1
        assert message in shown.output
        assert "Traceback" not in shown.output


def test_ctrl_c_ends_the_answer_and_not_the_program(file, template):
    words = ("chat", str(file), "--local", "--chat-template", template, "--max-tokens", "60")
    code = "from dlf_ray.cli import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
    )
    watch = threading.Timer(120, process.kill)
    watch.start()
    try:
        process.stdin.write(b"/rule\nHello.\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"rule: grid\n"
        assert process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(b"/experts none\n/reset\n")
    finally:
        watch.cancel()
    text = rest.decode()
    assert "(stopped)\nexperts: none\nthe conversation is forgotten\n" in text
    assert process.returncode == 0
