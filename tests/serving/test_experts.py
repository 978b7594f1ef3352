"""Experts that join and leave a family while it is served, by the `dlf expert` command."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests
from asking import PROMPT, completed, post, refused
from conftest import dlf, family_file
from processes import free_port

from dlf_ray import Family, LocalEngine, SamplingParams
from dlf_ray.serving.experts import Change, Follower, Report, changes, overall, want

LAW = {"model": "./law"}


class Engine:
    """What a follower needs of one; its folder may not be there yet."""

    def __init__(self, experts=()):
        self.family = self
        self.experts = dict.fromkeys(experts)
        self.folder = False

    def add_expert(self, name, expert):
        assert name not in self.experts
        if not self.folder:
            raise ValueError("no such folder")
        self.experts[name] = expert

    def remove_expert(self, name):
        del self.experts[name]


def listed(noted, *followers):
    return {name: e["state"] for name, e in overall(noted, [f.report for f in followers])}


def test_what_has_failed_is_tried_again_where_it_is_asked_for_again():
    engine = Engine()
    follower = Follower(engine, "family", "one")
    noted = [Change("law", LAW)]
    follower.follow(noted)
    assert listed(noted, follower) == {"law": "failed: no such folder"}
    engine.folder = True
    follower.follow([])
    assert listed(noted, follower) == {"law": "failed: no such folder"}
    noted.append(noted[0])
    assert listed(noted, follower) == {"law": "changing"}  # the old failure is over
    follower.follow(noted[1:])
    assert listed(noted, follower) == {"law": "ready"}


def test_what_has_failed_can_be_taken_out():
    follower = Follower(Engine(), "family", "one")
    noted = [Change("law", LAW), Change("law", None)]
    follower.follow(noted[:1])
    follower.follow(noted[1:])
    assert listed(noted, follower) == {}


def test_the_worst_state_of_all_replicas_is_told():
    well, ill, late = (Follower(Engine(["math"]), "family", name) for name in "abc")
    well._engine.folder = True
    noted = [Change("law", LAW)]
    well.follow(noted)
    assert listed(noted, well, late) == {"math": "ready", "law": "changing"}
    ill.follow(noted)
    assert listed(noted, well, ill, late)["law"] == "failed: no such folder"
    found = dict(overall(noted, [each.report for each in (well, ill, late)]))
    assert found["law"]["replicas"] == {
        "a": "ready",
        "b": "failed: no such folder",
        "c": "changing",
    }
    # What failed in one of them is replaced in all by what is asked for next.
    ill._engine.folder = True
    noted.append(Change("law", {"model": "./other"}))
    for each in (well, ill):
        each.follow(noted[1:])
        assert each._engine.experts["law"] == {"model": "./other"}
    late.follow(noted)
    noted.append(Change("law", None))
    well.follow(noted[2:])
    assert listed(noted, well, ill)["law"] == "changing"
    ill.follow(noted[2:])
    assert listed(noted, well, ill) == {"math": "ready"}


def test_a_replica_that_starts_later_does_the_last_change_only():
    engine = Engine(["math"])
    engine.folder = True
    follower = Follower(engine, "family", "late")
    noted = [Change("law", LAW), Change("math", None), Change("law", None), Change("art", LAW)]
    follower.follow(noted)
    assert engine.experts == {"art": LAW}
    assert follower.report == Report("late", 4, {"art": "ready"})


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (502, b"<html>Bad\n Gateway</html>", "answered with status 502: <html>Bad Gateway</html>"),
        (200, b"<html>Log in</html>", "answered with status 200: <html>Log in"),
        (404, b"[1]", "answered with status 404: [1]"),
        (403, b'{"error": {"message": "experts are fixed"}}', "error: experts are fixed"),
        (None, b"", "broke off"),
    ],
    ids=str,
)
def test_an_answer_that_is_none_of_ours_is_shown_as_it_is(status, body, words):
    """A proxy stands in front, say."""

    class Front(BaseHTTPRequestHandler):
        def do_GET(self):
            if status:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Front) as front:
        thread = threading.Thread(target=front.serve_forever)
        thread.start()
        code, shown = expert("list", "--url", f"http://127.0.0.1:{front.server_port}")
        front.shutdown()
        thread.join()
    assert code == 1
    assert words in " ".join(shown.split())
    assert "line 1 column" not in shown


@pytest.mark.usefixtures("ray_cluster")
def test_of_two_who_want_something_at_once_none_is_lost():
    names = [f"expert-{k}" for k in range(20)]
    threads = [threading.Thread(target=want, args=("crowd", name, LAW)) for name in names]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    noted = changes("crowd")
    assert sorted(each.name for each in noted) == sorted(names)
    want("crowd", "law", None)
    assert changes("crowd", after=20) == [Change("law", None)]
    assert changes("crow") == []


@pytest.fixture(scope="module")
def root(ray_cluster, folder, tmp_path_factory):
    """A served family of one expert that may change, and the same family where it may not."""
    from ray import serve

    from dlf_ray.serving.app import Settings, build_app

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
    listed = requests.get(f"{root}/v1/experts", timeout=60).json()["data"]
    (lost,) = [each for each in listed if each["id"] == "lost"]
    assert lost["state"].startswith("failed: ")
    assert set(lost["replicas"].values()) == {lost["state"]}
    code, shown = expert("remove", "lost", "--url", root)
    assert (code, shown.splitlines()[-1]) == (0, "lost: gone")
    assert expert("list", "--url", root) == (0, "math: ready\n")
    assert expert("remove", "math", "--url", root)[0] == 0
    assert expert("remove", "math", "--url", root)[0] == 1
    assert "nothing is served" in expert("list", "--url", "http://127.0.0.1:9")[1]


def test_an_expert_that_came_too_early_joins_when_asked_for_again(root, folder, tmp_path):
    words = ("add", "early", f"model={tmp_path / 'early'}", "num_cpus=0.1", "--url", root)
    code, shown = expert(*words)
    assert code == 1
    assert "early" in shown
    shutil.copytree(folder / "facts", tmp_path / "early")
    code, shown = expert(*words)
    assert (code, shown.splitlines()[-1]) == (0, "early: ready")
    assert expert("remove", "early", "--url", root)[0] == 0


def test_a_family_is_fixed_unless_told_otherwise(root, folder, tmp_path):
    from ray import serve

    from dlf_ray.serving.app import Settings, build_app

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
