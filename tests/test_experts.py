"""Experts that join and leave a family while it is served, by the `dlf expert` command."""

import threading

import pytest
import requests
from test_cli import dlf
from test_serve import PROMPT, completed, family_file, free_port, post, refused

from dlf_ray import Family, LocalEngine, SamplingParams


@pytest.fixture(scope="module")
def root(ray_cluster, folder, tmp_path_factory):
    """A served family of one expert that may change, and the same family where it may not."""
    from ray import serve

    from dlf_ray.serve import Settings, build_app

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    file = family_file(folder, tmp_path_factory.mktemp("experts") / "f.yaml", experts=("math",))
    settings = {"families": {"dlf": file}, "allow_expert_updates": True}
    serve.run(build_app(Settings.model_validate(settings)), name="elastic", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def expert(*words):
    shown = dlf("expert", *words)
    return shown.exit_code, shown.output


def test_experts_join_and_leave_while_requests_go_on(root, folder, tmp_path):
    both = Family.from_yaml(family_file(folder, tmp_path / "both.yaml", experts=("math", "facts")))
    sampling = SamplingParams(max_tokens=8)
    with LocalEngine(both) as engine:
        (one,) = engine.generate(PROMPT, sampling, experts=["math"])
        (two,) = engine.generate(PROMPT, sampling)
    stop, texts = threading.Event(), []

    def keep_asking():
        while not stop.is_set():
            body = {"max_tokens": 8, "temperature": 0, "fusion": {"experts": ["math"]}}
            texts.append(completed(root, prompt=PROMPT, **body)[0]["text"])

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        assert expert("list", "--url", root) == (0, "math: ready\n")
        spec = (f"model={folder / 'facts'}", "num_cpus=0.1")
        code, shown = expert("add", "facts", *spec, "--url", root)
        assert (code, shown.splitlines()[-1]) == (0, "facts: ready")
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        assert completed(root, **body)[0]["text"] == two.text
        code, shown = expert("add", "facts", *spec, "--url", root)
        assert code == 1
        assert "already" in shown
        code, shown = expert("remove", "facts", "--url", root)
        assert (code, shown.splitlines()[-1]) == (0, "facts: gone")
        assert completed(root, **body)[0]["text"] == one.text
        error = post(root, **body, fusion={"experts": ["facts"]})
        refused(error, 400, "no expert 'facts'")
    finally:
        stop.set()
        asking.join(60)
    assert len(texts) > 3
    assert set(texts) == {one.text}


def test_experts_that_cannot_join_say_why(root, folder):
    code, shown = expert("add", "lost", f"model={folder / 'nowhere'}", "--url", root)
    assert code == 1
    assert "nowhere" in shown
    code, shown = expert("add", "lost", "modle=x", "--url", root)
    assert code == 1
    assert "valid keys there" in shown
    code, shown = expert("add", "lost", "model=x", "trust_remote_code=true", "--url", root)
    assert code == 1
    assert "in the family file only" in shown
    assert expert("remove", "math", "--url", root)[0] == 0
    assert expert("remove", "math", "--url", root)[0] == 1
    assert "nothing is served" in expert("list", "--url", "http://127.0.0.1:9")[1]


def test_a_family_is_fixed_unless_told_otherwise(root, folder, tmp_path):
    from ray import serve

    from dlf_ray.serve import Settings, build_app

    file = family_file(folder, tmp_path / "fixed.yaml", experts=())
    settings = Settings.model_validate({"families": {"dlf": file}})
    serve.run(build_app(settings), name="fixed", route_prefix="/fixed")
    body = {"name": "math", "expert": {"model": str(folder / "math")}}
    for answer in (
        requests.post(f"{root}/fixed/v1/experts", json=body, timeout=60),
        requests.delete(f"{root}/fixed/v1/experts/math", timeout=60),
    ):
        refused(answer, 403, "allow_expert_updates")
    serve.delete("fixed")
