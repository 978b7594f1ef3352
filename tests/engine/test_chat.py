"""Conversations: each model reads them by its own template, as transformers would render it."""

import shutil

import pytest
import tiny
from conftest import EXPERTS, adapted, family_of
from transformers import AutoTokenizer

from dlf_ray import Family, LocalEngine, SamplingParams
from dlf_ray.engine.chat import SENTINEL, encoded, knows, rendered, template_text, turn_ends
from dlf_ray.engine.engine import Engine
from dlf_ray.messages import Limits

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|begin|>system\nYou help.<|end|>\n' }}{% endif %}"
    "{{'<|begin|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"
)
"""As SmolLM2's."""
LLAMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""As Llama 2's."""
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
THINKING = PLAIN + "{% if enable_thinking %} <think>{% endif %}"
SOLVING = THINKING.replace("assistant:", "solver:")
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "plain": PLAIN}
TALK = [
    {"role": "user", "content": "What is 12 times 7?"},
    {"role": "assistant", "content": "84."},
    {"role": "user", "content": " Is the moon made of cheese? "},
]


@pytest.fixture(scope="module", params=[False, True], ids=["no bos", "bos"])
def tokenizer(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer(root, bos=request.param)
    made = AutoTokenizer.from_pretrained(root)
    return made


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("continued", [False, True])
def test_the_tokens_are_those_of_transformers(tokenizer, template, continued):
    """No BOS token twice, and none that the template does not write."""
    talk = [*TALK, {"role": "assistant", "content": "No, it"}] if continued else TALK
    how = {"add_generation_prompt": not continued, "continue_final_message": continued}
    ours = encoded(tokenizer, rendered(tokenizer, template, talk, **how))
    theirs = tokenizer.apply_chat_template(
        talk, chat_template=template, tokenize=True, return_dict=False, **how
    )
    assert ours == theirs
    if tokenizer.bos_token and template == LLAMA:
        assert ours.count(tokenizer.bos_token_id) == 1
        assert ours[0] == tokenizer.bos_token_id
    if template == PLAIN:
        assert tokenizer.bos_token_id not in ours


def test_the_end_of_a_turn_is_the_special_token_after_what_is_said(tokenizer):
    end = tokenizer.eos_token_id
    assert turn_ends(tokenizer, CHATML) == (end,)
    assert turn_ends(tokenizer, LLAMA) == (end,)  # after a space
    assert turn_ends(tokenizer, PLAIN) == ()  # a line break is none
    assert turn_ends(tokenizer, "{{ messages[0].content }}") == ()
    assert turn_ends(tokenizer, "{{ raise_exception('never') }}") == ()
    assert turn_ends(tokenizer, "{{ messages[1].content + end }}", {"end": tiny.EOS}) == (end,)
    assert turn_ends(tokenizer, "{{ messages[1].content + end }}", {"end": "."}) == ()
    assert SENTINEL in rendered(tokenizer, PLAIN, [{"role": "user", "content": SENTINEL}])


def test_variables_reach_the_template(tokenizer):
    assert rendered(tokenizer, THINKING, TALK).endswith("assistant:")
    assert rendered(tokenizer, THINKING, TALK, {"enable_thinking": True}).endswith(": <think>")
    for name in ("tokenize", "chat_template", "add_generation_prompt"):
        with pytest.raises(ValueError, match=f"`chat_template_kwargs`: '{name}'"):
            rendered(tokenizer, THINKING, TALK, {name: True})


def test_contents_in_parts_are_one_text(tokenizer):
    parts = [{"type": "text", "text": "Two"}, {"type": "text", "text": " words"}]
    whole = rendered(tokenizer, PLAIN, [{"role": "user", "content": parts}])
    assert whole == "user: Two words\nassistant:"
    for wrong in ([{"type": "image_url", "image_url": {"url": "x"}}], ["word"]):
        with pytest.raises(ValueError, match="`content` must be text"):
            rendered(tokenizer, PLAIN, [{"role": "user", "content": wrong}])


def test_what_a_template_refuses_is_one_sentence(tokenizer):
    with pytest.raises(ValueError, match="`messages` do not fit the chat template: no system"):
        rendered(tokenizer, LLAMA, [{"role": "system", "content": "x"}])
    with pytest.raises(ValueError, match="at least one message"):
        rendered(tokenizer, PLAIN, [])


def test_a_template_is_a_text_or_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text(PLAIN)
    assert template_text(str(tmp_path / "own.jinja")) == template_text(PLAIN) == PLAIN
    with pytest.raises(ValueError, match=r"no\.jinja' is no Jinja text and no file"):
        template_text(str(tmp_path / "no.jinja"))


def test_tokens_that_a_model_has():
    limits = Limits({"large": 9, "math": 9}, 3, {"large": 3, "math": 5}, unlike={"math": (1,)})
    assert knows(limits, "large", [0, 1, 2])
    assert not knows(limits, "large", [0, 3])
    assert not knows(limits, "math", [0, 1])
    assert knows(limits, "math", [0, 1, 4], of_its_own=True)


# ---------------------------------------------------------------- a family


def templated(folder, templates):
    """Gives models of a family chat templates of their own."""
    for name, template in templates.items():
        made = AutoTokenizer.from_pretrained(folder / name)
        made.chat_template = template
        made.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def chatty(folder, tmp_path_factory):
    """Of the family, `math` was taught another template, `facts` the same, the others none."""
    root = tmp_path_factory.mktemp("chatty") / "family"
    shutil.copytree(folder, root)
    templated(root, {"large": PLAIN, "math": SOLVING, "facts": PLAIN})
    return root


class Kept(LocalEngine):
    """Keeps what was sent."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sent = []

    def _send(self, request):
        self.sent.append(request)
        super()._send(request)


@pytest.fixture(scope="module")
def engine(chatty):
    with Kept(family_of(chatty)) as made:
        yield made


OWN = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


def test_each_model_reads_by_its_own_template(engine):
    assert set(engine.chat_templates) == {"large", "math", "facts"}
    assert engine.templates() == {**dict.fromkeys(engine.limits.lengths, PLAIN), "math": SOLVING}
    (output,) = engine.chat(TALK, SamplingParams(max_tokens=4))
    request = engine.sent[-1]
    texts = {name: engine.tokenizer.decode(request.prompt_of(name)) for name in engine.templates()}
    read = {
        name: rendered(engine.tokenizer, each, TALK) for name, each in engine.templates().items()
    }
    assert texts == read
    assert set(request.prompts) == {"math"}
    made = engine.render(TALK)
    assert (made.text, made.ids) == (read["large"], list(request.prompt))
    (same,) = engine.generate([made.prompt], SamplingParams(max_tokens=4))
    assert same.token_ids == output.token_ids
    pieces = engine.stream(made.prompt, made.ending(SamplingParams(max_tokens=4)))
    assert "".join(piece.text for piece in pieces) == output.text


def test_one_template_may_be_given_for_all_or_for_some(engine, tmp_path):
    (tmp_path / "own.jinja").write_text(OWN)
    one = engine.render(TALK, chat_template=str(tmp_path / "own.jinja"))
    assert one.prompt == one.ids
    assert one.text == "".join(f"<{each['content']}>" for each in TALK)
    some = engine.render(TALK, chat_template={"base": OWN})
    assert engine.tokenizer.decode(some.prompt["base"]) == one.text
    assert some.prompt["facts"] == some.ids != some.prompt["math"]
    refusing = {"base": "{{ raise_exception('never') }}"}
    with pytest.raises(ValueError, match=r"do not fit .*: never \(model 'base'\)"):
        engine.render(TALK, chat_template=refusing)
    with pytest.raises(ValueError, match="no model 'huge' is loaded"):
        engine.render(TALK, chat_template={"huge": OWN})


def test_several_conversations_are_answered_in_their_order(engine):
    talks = [TALK, TALK[:1], [{"role": "system", "content": "Be short."}, *TALK]]
    params = [SamplingParams(max_tokens=count) for count in (3, 4, 5)]
    outputs = engine.chat(talks, params, experts=["facts"])
    for talk, each, output in zip(talks, params, outputs, strict=True):
        assert engine.chat(talk, each, experts=["facts"])[0].token_ids == output.token_ids
    with pytest.raises(ValueError, match="3 conversations but 2 sampling parameters"):
        engine.chat(talks, params[:2])


def test_variables_are_for_every_template(engine):
    said = engine.render(TALK, chat_template_kwargs={"enable_thinking": True})
    assert engine.tokenizer.decode(said.prompt["math"]).endswith(" <think>")
    assert engine.chat(TALK, chat_template_kwargs={"enable_thinking": True})[0].token_ids


def test_a_family_without_a_template_is_told_to_give_one(folder, chatty):
    with LocalEngine(family_of(folder)) as plain:
        with pytest.raises(ValueError, match="no chat template: give one as `chat_template`"):
            plain.chat(TALK)
        assert plain.chat(TALK, chat_template=PLAIN)[0].token_ids
    with LocalEngine(family_of(chatty), models=["base", "math"]) as some:
        assert some.templates()["base"] == PLAIN  # the large model's, which is not loaded
        assert some.render(TALK).text == rendered(some.tokenizer, PLAIN, TALK)


@pytest.mark.parametrize("given", [None, SamplingParams(stop_token_ids=(5,))], ids=["", "more"])
def test_the_end_of_a_turn_ends_the_answer(tmp_path, given):
    """A token that is no end token of the models, as <|im_end|> often is not."""
    tiny.model(tmp_path / "large", seed=1, bos=True)
    ending = "{% for m in messages %}{{ m.content }}<|begin|>\n{% endfor %}"
    templated(tmp_path, {"large": ending})
    model = {"model": str(tmp_path / "large")}
    family = Family.from_dict({"large": model, "base": model, "experts": {}})
    with LocalEngine(family, models=["large"]) as engine:
        turn = engine.tokenizer.bos_token_id
        made = engine.render(TALK)
        assert made.ends == (turn,)
        assert made.ending(given or SamplingParams()).stop_token_ids == (
            *(given.stop_token_ids if given else ()),
            turn,
        )
        (output,) = engine.chat(TALK, SamplingParams(logit_bias={turn: 100}))
        assert (output.text, output.finish_reason) == ("", "stop")
        (going,) = engine.chat(TALK, SamplingParams(logit_bias={turn: 100}, ignore_eos=True))
        assert len(going.token_ids) == 16
        ended = ending.replace("<|begin|>", "<|end|>")
        assert engine.render(TALK, chat_template=ended).ends == ()  # ends every text anyway


def test_adapters_have_templates_of_their_own(tmp_path):
    pytest.importorskip("peft")
    adapted(tmp_path)
    templated(tmp_path, {"large": PLAIN, "base": LLAMA})
    (tmp_path / "math-adapter" / "chat_template.jinja").write_text(OWN)
    (tmp_path / "facts-adapter" / "tokenizer_config.json").write_text(
        '{"chat_template": "{{ 1 }}"}'
    )
    family = Family.from_dict(
        {
            "large": {"model": str(tmp_path / "large")},
            "base": {"model": str(tmp_path / "base")},
            "experts": {name: {"adapter": str(tmp_path / f"{name}-adapter")} for name in EXPERTS},
            "engine": {"max_model_len": 128},
        }
    )
    with LocalEngine(family) as engine:
        assert engine.templates() == {
            "large": PLAIN,
            "base": LLAMA,
            "math": OWN,
            "facts": "{{ 1 }}",
            "prose": LLAMA,
        }


def test_over_ray_and_with_experts_that_come_and_go(ray_cluster, chatty):
    with Engine(family_of(chatty, ["facts"])) as engine:
        assert set(engine.chat_templates) == {"large", "facts"}
        assert engine.render(TALK).prompt == engine.render(TALK).ids
        engine.add_expert("math", {"model": str(chatty / "math"), "num_cpus": 0.1})
        assert set(engine.render(TALK).prompt) == {"large", "base", "facts", "math"}
        assert engine.chat(TALK)[0].error is None
        engine.remove_expert("math")
        assert engine.render(TALK).prompt == engine.render(TALK).ids
