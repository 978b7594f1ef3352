"""What every engine shares: tokens of prompts, the window of requests, and which models answer."""

import pytest
import tiny
from conftest import EXPERTS, family_of
from transformers import AutoTokenizer

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.engine.frontend import WINDOW, BaseEngine

MERGING = "Answer:\nyes\nno: yes:) no:) yes:\n" * 50
"""Tokens of it reach over line breaks and punctuation."""


class Tokens(BaseEngine):
    """Only tokenizes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def _send(self, request): ...
    def _abort(self, id): ...
    def close(self): ...


@pytest.fixture(scope="module", params=["words", "words, bos", "merging", "merging, bos"])
def tokens(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    words, bos = "words" in request.param, "bos" in request.param
    corpus = tiny.CORPUS + (MERGING if not words else "")
    tiny.tokenizer(root, 400, bos=bos, corpus=corpus, words=words)
    return Tokens(AutoTokenizer.from_pretrained(root))


PAIRS = [
    ("Question: what? Answer:", " yes"),
    ("Question: what? Answer: ", "yes"),
    ("Question: what? Answer:", "yes"),
    ("Question: what? Answer:", "\nyes"),
    ("Question: what? Answer:", ")"),
    ("Question: what? Answer:\n", "yes"),
    ("Question: what? Answer:\n\n", "no"),
    ("Question: what? Answer:\r\n", "no"),
    ("Question: what? Answer:\n ", "no"),
    (f"what?{tiny.EOS}", "yes"),
    (f"what?{tiny.EOS}\n", "yes"),
    ("\n", "yes"),
    ("  ", "yes"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_a_pair_is_its_text_split_at_the_boundary(tokens, pair):
    """Nothing is lost, scored on the wrong side, or empty, whatever tokens reach over."""
    prompt, continuation = pair
    one, two = tokens.tokenize_pair(prompt, continuation)
    bos = tokens.tokenizer.bos_token or ""
    assert tokens.tokenizer.decode([*one, *two]) == bos + prompt + continuation
    scored = tokens.tokenizer.decode(two)
    moved = len(prompt) - len(prompt.rstrip(" ")) if prompt.strip(" ") or bos else 0
    assert scored == prompt[len(prompt) - moved :] + continuation
    assert two


@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_a_pair_is_the_harnesss_where_the_harness_loses_nothing(tokens, pair):
    """Its context and continuation, one after the other, are the tokens of the whole text; and it
    scores no line break of the prompt."""
    api = pytest.importorskip("lm_eval.api.model")
    prompt, continuation = pair

    class Theirs(api.TemplateLM):
        eot_token_id = 0
        generate_until = loglikelihood_rolling = _loglikelihood_tokens = None

        def tok_encode(self, string, **_):
            return tokens.tokenizer.encode(string)

    one, two = Theirs()._encode_pair(prompt, continuation)
    whole = tokens.tokenizer.encode(prompt + continuation)
    ours = tokens.tokenize_pair(prompt, continuation)
    if [*one, *two] == whole and two and one and not prompt.rstrip(" ").endswith("\n"):
        assert ours == (one, two)
    else:
        assert one != ours[0] or not two or [*one, *two] != whole


def test_a_text_that_begins_with_the_bos_token_gets_no_second_one(tmp_path):
    tiny.tokenizer(tmp_path, bos=True)
    engine = Tokens(AutoTokenizer.from_pretrained(tmp_path))
    ids = engine.tokenize("The moon")
    assert ids[0] == engine.tokenizer.bos_token_id
    assert engine.tokenize(f"{tiny.BOS}The moon") == ids
    one, two = engine.tokenize_pair(f"{tiny.BOS}The moon", " is")
    assert one + two == engine.tokenize("The moon is")


# ---------------------------------------------------------------- requests on their way


class Counting(LocalEngine):
    """Counts the requests under way, and keeps what was sent."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sent, self.most, self.idle = [], 0, 0

    def _send(self, request):
        self.sent.append(request)
        super()._send(request)
        self.most = max(self.most, len(self._deliver))

    def _wait(self, mailbox):
        self.idle += len(self._deliver) < self.family.engine.max_num_seqs
        return super()._wait(mailbox)


@pytest.fixture
def counting(folder):
    with Counting(family_of(folder, EXPERTS[:1], max_num_seqs=2)) as engine:
        yield engine


WORDS = [f"item {number}:" for number in range(40)]


def test_a_window_of_requests_is_under_way_and_no_slot_waits(counting):
    together = counting.generate(WORDS, SamplingParams(max_tokens=3))
    assert counting.most == WINDOW * 2
    assert counting.idle <= 3, "only the last one leaves a slot empty"
    single = [counting.generate(word, SamplingParams(max_tokens=3))[0] for word in WORDS[:6]]
    assert [o.token_ids for o in together[:6]] == [o.token_ids for o in single]
    assert [len(o.token_ids) > 0 for o in together] == [True] * len(WORDS)
    counting.most = 0
    counting.score(WORDS, [" yes"] * len(WORDS))
    assert counting.most == WINDOW * 2


def test_prompts_of_an_iterator_are_taken_as_there_is_room(counting):
    taken = []

    def prompts():
        for word in WORDS:
            taken.append(word)
            yield word

    found = counting.generate_as_completed(prompts(), SamplingParams(max_tokens=2))
    first, _ = next(found)
    assert first < WINDOW * 2
    assert len(taken) == WINDOW * 2
    rest = dict(found)
    assert {first, *rest} == set(range(len(WORDS)))
    pairs = ((word, " yes") for word in WORDS)
    assert len(dict(counting.score_as_completed(pairs))) == len(WORDS)


def test_all_of_a_list_is_checked_before_anything_is_sent(counting):
    wrong = [*WORDS, [1] * 1000]
    for ask in (
        lambda: counting.generate(wrong),
        lambda: counting.generate_as_completed(wrong),
        lambda: counting.score(wrong, [[1]] * len(wrong)),
        lambda: counting.score_as_completed([(each, [1]) for each in wrong]),
    ):
        with pytest.raises(ValueError, match=f"prompt {len(WORDS)}: .*max_model_len"):
            ask()
    assert counting.sent == []


def test_who_leaves_early_leaves_nothing_running(counting):
    found = counting.generate_as_completed(iter(WORDS), SamplingParams(max_tokens=8))
    next(found)
    found.close()
    assert counting._deliver == {}
    assert not counting.coordinator.sequences


def test_a_prompt_of_all_models_is_sent_once(counting):
    same = {"large": "The moon", "base": "The moon", "math": "The moon"}
    other = {**same, "math": "A train"}
    plain, mapped, own = counting.generate(["The moon", same, other], SamplingParams(max_tokens=2))
    requests = counting.sent
    assert [dict(each.prompts) for each in requests] == [
        {},
        {},
        {"math": tuple(counting.tokenize("A train"))},
    ]
    assert requests[0].prompt == requests[1].prompt == requests[2].prompt
    assert plain.token_ids == mapped.token_ids
    assert own.error is None
    counting.score([same], [" is"])
    assert counting.sent[-1].prompts == {}
    with pytest.raises(ValueError, match="'huge'"):
        counting.generate({"large": "The moon", "huge": "The moon"})


def test_prompts_that_end_otherwise_lose_nothing_before_a_common_continuation(counting):
    """The space at the end of one would go to its own continuation, of which none is used."""
    texts = {"large": "The moon is", "base": "A train: ", "math": "Two and "}
    for continuation in ("yes", " yes"):
        counting.score([texts], [continuation])
        request = counting.sent[-1]
        assert counting.tokenizer.decode(request.continuation) == continuation
        for name, text in texts.items():
            assert counting.tokenizer.decode(request.prompt_of(name)) == text


# ---------------------------------------------------------------- some of the models


def test_only_the_models_that_are_named_are_loaded(folder):
    """They answer as they do in the whole family; what needs another one is refused by name."""
    family = family_of(folder)
    with LocalEngine(family) as whole:
        (fused,) = whole.generate("The moon", experts=["math"])
        (alone,) = whole.generate("The moon", alone="math")
    with LocalEngine(family, models=["math"]) as engine:
        assert list(engine.limits.lengths) == ["math"]
        assert engine.generate("The moon", alone="math")[0].token_ids == alone.token_ids
        for options, name in (
            ({"experts": []}, "large"),
            ({}, "large"),
            ({"alone": "base"}, "base"),
        ):
            with pytest.raises(ValueError, match=f"no model '{name}' is loaded"):
                engine.generate("The moon", **options)
        with pytest.raises(ValueError, match="facts"):
            engine.generate({"math": "a", "facts": "b"}, alone="math")
    with LocalEngine(family, models=["math", "large", "base"]) as engine:
        assert list(engine.limits.lengths) == ["large", "base", "math"]
        assert engine.limits.experts == ("math",)
        assert engine.generate("The moon", experts=["math"])[0].token_ids == fused.token_ids
        with pytest.raises(ValueError, match="facts"):
            engine.generate("The moon")
    for wrong in ([], ["huge"]):
        with pytest.raises(ValueError, match="the family has"):
            LocalEngine(family, models=wrong)
