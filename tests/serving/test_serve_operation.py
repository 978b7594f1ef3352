"""The endpoint in operation, each time an application of its own on Serve.

Keys, limits, clients that go away, failures and the log of one that is slow; deploying again, and
replicas that come and go with the load.
"""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
from asking import SOON_S, TIMEOUT_S, events, post, refused
from conftest import family_file
from processes import PATIENCE_S
from workers import BREAKS_AT, Breaking, Late

from dlf_ray.models.worker import ModelWorker

# An application that is slow, with keys, and room for two sequences

KEY = "a key of several words"
ENDLESS = {"prompt": [5], "max_tokens": 250, "ignore_eos": True, "temperature": 0}


class Strict:
    """That application, and how it is asked."""

    timeout_s = 8

    def __init__(self, url):
        self.url = url
        self.headers = {"Authorization": f"Bearer {KEY}"}

    def post(self, unread=False, **body):
        return requests.post(
            f"{self.url}/v1/completions",
            json={"model": "slow", **body},
            headers=self.headers,
            timeout=TIMEOUT_S,
            stream=unread,
        )

    def free(self):
        """Whether there is room for two, within a time in which no endless request ends."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if self.post(prompt=[[5], [6]], max_tokens=1).status_code == 200:
                return True
        return False


@pytest.fixture(scope="module")
def strict(root, folder, tmp_path_factory):
    from ray import serve

    from dlf_ray.serving.app import Settings, application

    file = tmp_path_factory.mktemp("strict") / "slow.yaml"
    settings = Settings.model_validate(
        {
            "families": {"slow": {"family": family_file(folder, file, (), max_num_seqs=2)}},
            "max_queued": 0,
            "request_timeout_s": Strict.timeout_s,
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLF_API_KEYS", f"another, {KEY}")
        app = application(settings, worker=Breaking)
    serve.run(app, name="strict", route_prefix="/strict")
    yield Strict(f"{root}/strict")
    serve.delete("strict")


def test_keys(strict):
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": b"Bearer \xff"}]
    for headers in wrong:
        for path in ("/v1/completions", "/v1/models", "/openapi.json"):
            answer = requests.get(strict.url + path, headers=headers, timeout=SOON_S)
            refused(answer, 401, "API key")
    for path in ("/health", "/ready", "/"):
        assert requests.get(strict.url + path, timeout=SOON_S).status_code == 200
    listed = requests.get(f"{strict.url}/v1/models", headers=strict.headers, timeout=SOON_S)
    assert listed.status_code == 200
    assert strict.post(prompt=[5], max_tokens=1).status_code == 200


def test_the_page_is_there(strict):
    page = requests.get(f"{strict.url}/", timeout=SOON_S)
    assert page.headers["Content-Type"].startswith("text/html")
    assert "<html" in page.text


def ask(strict, body, id="asked"):
    """A connection over which a request was sent."""
    url = strict.url.removeprefix("http://")
    address, path = url.split("/", 1)
    host, port = address.split(":")
    data = json.dumps({"model": "slow", **body}).encode()
    connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
    connection.sendall(
        f"POST /{path}/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nX-Request-Id: {id}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection


def fill(strict, stream, id="fills"):
    """A connection whose request holds all slots."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        connection = ask(strict, {**ENDLESS, "prompt": [[5], [6]], "stream": stream}, id)
        time.sleep(0.5)
        answer = strict.post(prompt=[5], max_tokens=1)
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) > 0
            assert refused(answer, 429, "waiting")["code"] == "rate_limit_exceeded"
            return connection
        connection.close()  # it came later than the other
    raise AssertionError("never full")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_clients_that_go_away_free_their_slots(strict, stream):
    for _ in range(3):
        fill(strict, stream).close()
        assert strict.free()


def test_what_takes_too_long_ends(strict):
    refused(strict.post(**ENDLESS), 504, "8 s")
    assert strict.free()
    *_, last = events(strict.post(**ENDLESS, stream=True))
    assert "8 s" in last["error"]["message"]
    assert strict.free()


def test_a_failure_on_the_way_ends_the_stream_cleanly(strict):
    body = {**ENDLESS, "prompt": [5] * (BREAKS_AT - 4)}
    answer = strict.post(**body, stream=True)
    assert answer.status_code == 200
    *chunks, last = events(answer)
    assert len(chunks) >= 3
    assert last["error"]["type"] == "server_error"
    for told in (answer.text, strict.post(**body).text):
        assert "secret" not in told
        assert "Traceback" not in told
    refused(strict.post(**body), 500)
    assert strict.free()


def log_folder():
    import ray

    return Path(ray._private.worker._global_node.get_logs_dir_path())


def logged(id, count=1):
    """The lines that the log has of requests whose ids hold `id`, once there are so many."""
    logs = log_folder()

    def lines():
        for path in logs.glob("worker-*.out"):
            yield from (line for line in path.read_text().splitlines() if id in line)

    deadline = time.monotonic() + PATIENCE_S
    while len(found := list(lines())) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [json.loads(line) for line in found], logs


def test_clients_that_leave_a_stream_are_logged_as_that(strict):
    body = {**ENDLESS, "stream": True}
    for k in range(12):
        headers = {**strict.headers, "X-Request-Id": f"leaves-{k}."}
        url = f"{strict.url}/v1/completions"
        with requests.post(
            url, json={"model": "slow", **body}, headers=headers, stream=True, timeout=TIMEOUT_S
        ) as answer:
            assert answer.status_code == 200
            next(answer.iter_lines())
            time.sleep(0.03 * k)
    lines, logs = logged("leaves-", 12)
    assert [line["status"] for line in lines] == [499] * 12
    errors = "".join(path.read_text() for path in (logs / "serve").glob("replica_strict_*.log"))
    assert "request leaves-" not in errors
    assert strict.free()


def test_clients_that_leave_before_an_answer_are_logged_as_that(strict):
    """While a whole answer is made, or the prompt of a stream is computed; no trace tells of it."""

    def traces():
        files = [*log_folder().glob("worker-*.err"), *(log_folder() / "serve").glob("*.log")]
        return sum(path.read_text(errors="replace").count("Traceback") for path in files)

    before = traces()
    for k in range(3):
        fill(strict, stream=False, id=f"gone-whole-{k}.").close()
        assert strict.free()
    for k in range(8):
        body = {**ENDLESS, "prompt": [5] * 100, "max_tokens": 50, "stream": True}
        connection = ask(strict, body, f"gone-early-{k}.")
        time.sleep(0.02 * k)
        connection.close()
        assert strict.free()
    lines, _ = logged("gone-", 6)  # some are gone before the proxy has handed them on
    left = {line["id"] for line in lines if line["status"] == 499}
    assert left >= {f"gone-whole-{k}." for k in range(3)}
    assert {line["status"] for line in lines} <= {499, 429}  # a request of `fill` may be refused
    assert traces() == before


def rows_of(folder):
    return [tuple(map(int, line.split())) for line in (folder / "large.rows").open()]


def test_a_score_computes_the_rows_of_the_continuation(strict, folder):
    """And what several continuations have before them once."""
    prompt = [5 + k % 200 for k in range(200)]
    asked = {"model": "slow", "prompt": prompt}

    def cost(**body):
        before = len(rows_of(folder))
        answer = requests.post(
            f"{strict.url}/v1/score",
            json={**asked, **body},
            headers=strict.headers,
            timeout=TIMEOUT_S,
        )
        assert answer.status_code == 200, answer.text
        rows, tokens = zip(*rows_of(folder)[before:], strict=True)
        return sum(rows), sum(tokens)

    assert cost(continuation=[7]) == (1, 200)
    rows, tokens = cost(prompt=prompt[::-1], continuation=[[8], [9, 10]])
    assert rows == 3
    assert tokens < 220


def test_every_request_is_a_line_in_the_log(strict):
    id = "my-request.1"
    headers = {**strict.headers, "X-Request-Id": id}
    body = {**ENDLESS, "prompt": [5, 6], "max_tokens": 3, "user": "me"}
    url = f"{strict.url}/v1/completions"
    answer = requests.post(url, json=body, headers=headers, timeout=TIMEOUT_S)
    assert answer.headers["X-Request-Id"] == id
    assert answer.json()["id"] == f"cmpl-{id}"
    (line,), logs = logged(id)
    expected = {
        "id": id,
        "method": "POST",
        "path": "/strict/v1/completions",
        "status": 200,
        "model": "slow",
        "user": "me",
        "prompt_tokens": 2,
        "completion_tokens": 3,
    }
    assert expected.items() <= line.items()
    assert 0 < line["first_s"] <= line["seconds"] < TIMEOUT_S
    assert KEY not in "".join(path.read_text() for path in logs.glob("worker-*.out"))


@pytest.mark.slow
def test_a_replica_whose_coordinator_died_is_replaced(strict):
    """Streams that it cuts end with an error, new requests are served by the next one."""
    cut = strict.post(unread=True, **ENDLESS, stream=True)  # its first token is there
    mine = psutil.Process().children(recursive=True)
    named = [p for p in mine if "ray::CoordinatorActor" in " ".join(p.cmdline())]
    max(named, key=psutil.Process.create_time).kill()  # the last to start is this application's
    *_, last = events(cut)
    assert "try again later" in last["error"]["message"]
    refused(strict.post(**ENDLESS), 503, "try again later")
    deadline = time.monotonic() + 200
    while (answer := strict.post(prompt=[5], max_tokens=1)).status_code != 200:
        assert answer.status_code in (503, 504)  # it failed, or none is there to be asked
        refused(answer, answer.status_code, "try again later")
        assert time.monotonic() < deadline
        time.sleep(1)


# Applications that change


@pytest.mark.slow
def test_deploying_again_answers_every_request(root, folder, tmp_path):
    """Requests wait while the models load, longer than Serve gives an ingress by itself."""
    from ray import serve

    from dlf_ray.serving.app import Settings, application

    file = family_file(folder, tmp_path / "again.yaml", ())

    def deploy(worker=ModelWorker, **changed):
        settings = Settings.model_validate({"families": {"again": file}, **changed})
        serve.run(application(settings, worker=worker), name="again", route_prefix="/again")

    deploy()
    done, answers = threading.Event(), []

    def asking():
        while not done.is_set():
            body = {"model": "again", "prompt": [5], "max_tokens": 2, "ignore_eos": True}
            answer = requests.post(f"{root}/again/v1/completions", json=body, timeout=150)
            answers.append((answer.status_code, answer.text))

    with ThreadPoolExecutor(48) as pool:
        try:
            asked = [pool.submit(asking) for _ in range(48)]
            time.sleep(2)
            deploy(Late, max_queued=255)
            time.sleep(2)
        finally:
            done.set()
        for each in asked:
            each.result()
    serve.delete("again")
    assert len(answers) > 2 * 48
    assert not [each for each in answers if each[0] != 200]


@pytest.mark.slow
def test_families_come_and_go_with_the_load(root, folder, tmp_path):
    """Two replicas when many ask, one when few do; no request fails meanwhile."""
    from ray import serve

    from dlf_ray.serving.app import Settings, build_app

    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
    }
    file = family_file(folder, tmp_path / "small.yaml", ())
    settings = Settings.model_validate(
        {"families": {"small": {"family": file}}, "autoscaling_config": scaling}
    )
    serve.run(build_app(settings), name="scaled", route_prefix="/scaled")

    def running():
        found = serve.status().applications["scaled"].deployments
        (family,) = [found[name] for name in found if name.startswith("family")]
        return family.replica_states.get("RUNNING", 0)

    enough, failures, served = threading.Event(), [], []

    def asking(number):
        while not enough.is_set() or (number == 0 and not done.is_set()):
            body = {"model": "small", "prompt": [5], "max_tokens": 50, "ignore_eos": True}
            answer = post(f"{root}/scaled", **body)
            (served if answer.status_code == 200 else failures).append(answer.text)

    def until(count):
        deadline = time.monotonic() + PATIENCE_S
        while running() != count:
            assert time.monotonic() < deadline
            assert not failures
            time.sleep(0.2)

    done = threading.Event()
    with ThreadPoolExecutor(12) as pool:
        try:
            for number in range(12):
                pool.submit(asking, number)
            until(2)
            enough.set()
            until(1)
        finally:
            enough.set()
            done.set()
    serve.delete("scaled")
    assert served
    assert not failures
