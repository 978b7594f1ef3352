import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlf_ray.config import Family
from dlf_ray.training import corpus, demo, train

TINY = demo.Size(hidden=16, layers=1, heads=2, feed_forward=32, steps=4, lr=1e-2)
RECIPE = demo.Recipe(large=TINY, base=TINY, rows=2, length=32, expert_steps=2, upper_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo.build(tmp_path_factory.mktemp("demo") / "family", recipe=RECIPE, progress=False)


def weights(folder, name):
    return AutoModelForCausalLM.from_pretrained(folder / name).state_dict()


@pytest.mark.parametrize("task", corpus.TASKS)
def test_items_are_deterministic_and_the_splits_share_nothing(task):
    splits = {split: corpus.items(task, split, 0) for split in corpus.SHARES}
    assert splits == {split: corpus.items(task, split, 0) for split in corpus.SHARES}
    assert splits["test"] != corpus.items(task, "test", 1)
    assert len(splits["test"]) >= 300
    prompts = [item.prompt for part in splits.values() for item in part]
    assert len(set(prompts)) == len(prompts)
    for item in splits["test"]:
        assert item.prompt == item.prompt.rstrip()
        assert item.answer.startswith(" ")


def test_no_person_and_no_word_is_in_two_splits():
    frame = {word for question in corpus.QUESTIONS.values() for word in question[:-1].split()}
    for task in corpus.TASKS:
        seen = set()
        for split in corpus.SHARES:
            questions = [item.prompt.split("?")[0] for item in corpus.items(task, split, 0)]
            words = {word for question in questions for word in question.split()[1:]} - frame
            assert words
            assert not words & seen
            seen |= words


def test_an_unknown_task_names_the_valid_ones():
    with pytest.raises(ValueError, match="people, spelling"):
        corpus.items("chess", "dev", 0)


def test_the_folder_is_a_complete_family(folder):
    family = Family.from_yaml(folder / "family.yaml")
    assert tuple(family.experts) == corpus.TASKS
    folders = [spec.model for spec in family.models.values()]
    folders += [str(folder / f"upper-{task}") for task in corpus.TASKS]
    for path in folders:
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        end = tokenizer.eos_token_id
        assert tokenizer.convert_ids_to_tokens(end) == corpus.END
        assert model.generation_config.eos_token_id == model.config.eos_token_id == end
        assert model.config.vocab_size == len(tokenizer)
        for task in corpus.TASKS:
            for split in ("dev", "test"):
                lines = (folder / f"{task}-{split}.jsonl").read_text().splitlines()
                items = [corpus.Item(**json.loads(line)) for line in lines]
                assert items == corpus.items(task, split, 0)
        item = items[0]
        # Nothing is added around a text, and an answer has the same tokens alone and in place.
        prompt, answer = tokenizer(item.prompt)["input_ids"], tokenizer(item.answer)["input_ids"]
        assert tokenizer(item.prompt + item.answer)["input_ids"] == prompt + answer
        assert tokenizer.decode(prompt + answer) == item.prompt + item.answer


def test_experts_and_upper_bounds_differ_from_what_they_were_trained_from(folder):
    for start, name in (("base", "spelling"), ("large", "upper-spelling"), ("spelling", "people")):
        one, other = weights(folder, start), weights(folder, name)
        assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_second_build_comes_from_the_cache(folder, monkeypatch):
    monkeypatch.setattr(demo, "_build", None)
    assert demo.build(folder, recipe=RECIPE, progress=False) == folder


def test_the_cache_knows_the_recipe_and_the_seed(tmp_path, monkeypatch):
    def build(folder, *rest):
        folder.mkdir()
        (folder / "family.yaml").touch()

    monkeypatch.setattr(demo, "_build", build)
    monkeypatch.setenv("DLF_CACHE", str(tmp_path / "cache"))
    folders = {
        demo.build(progress=False),
        demo.build(progress=False),
        demo.build(seed=1, progress=False),
        demo.build(recipe=RECIPE, progress=False),
    }
    assert len(folders) == 3
    assert set((tmp_path / "cache").iterdir()) == folders


def test_the_same_seed_gives_the_same_weights(folder, tmp_path):
    again = demo.build(tmp_path / "again", recipe=RECIPE, progress=False)
    for name in ("large", "base", "spelling", "upper-people"):
        expected = weights(folder, name)
        assert all(torch.equal(value, expected[key]) for key, value in weights(again, name).items())


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    real = train.train
    threads = torch.get_num_threads()
    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.build(tmp_path / "family", recipe=RECIPE, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="something else"):
        demo.build(tmp_path, recipe=RECIPE, progress=False)


def test_answer_batches_mark_the_answers():
    samples = [([1, 2, 3], [4, 0]), ([5], [6, 7, 0])]
    batch = next(train.answer_batches(samples, 2, seed=0))
    learned = [batch.tokens[row][batch.learned[row]].tolist() for row in range(2)]
    assert sorted(learned) == [[4, 0], [6, 7, 0]]


def test_every_sample_is_seen_once_a_round():
    samples = [([i], [i]) for i in range(6)]
    batches = train.answer_batches(samples, 2, seed=0)
    seen = [int(row) for _ in range(3) for row in next(batches).tokens[:, 0]]
    assert sorted(seen) == list(range(6))


@pytest.mark.parametrize("matrix_lr", [None, 0.02])
def test_training_lowers_the_loss(folder, matrix_lr):
    model = AutoModelForCausalLM.from_pretrained(folder / "large")
    stream = torch.arange(8).repeat(400)
    losses = []
    train.train(
        model,
        train.text_batches(stream, 4, 16),
        steps=40,
        lr=1e-2,
        matrix_lr=matrix_lr,
        on_step=losses.append,
    )
    assert len(losses) == 40
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert not model.training
