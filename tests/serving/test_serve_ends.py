"""`dlf serve` from its start to its end, on the cluster of these tests."""

import os
import signal

import pytest
import requests
from conftest import family_file
from processes import BIN, PATIENCE_S, actors, free_port, groups, settled

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def serving(program):
    """Starts `dlf serve` on our cluster."""
    import ray

    def start(file, port):
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        return program(BIN / "dlf", "serve", file, "--port", port, env=environment)

    return start


def test_it_serves_until_it_is_terminated(serving, folder, tmp_path):
    file = family_file(folder, tmp_path / "tiny.yaml", ())
    port = free_port()
    process = serving(file, port)
    line = ""
    while "serving tiny" not in line:
        line = process.stdout.readline()
        assert line, process.stderr.read()
    url = f"http://127.0.0.1:{port}"
    assert f"{url}/v1" in line
    body = {"model": "tiny", "prompt": [5], "max_tokens": 2}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200
    second = serving(file, free_port())
    _, errors = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 1
    assert "serve deploy" in errors
    assert requests.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_S) == 0
    assert settled(lambda: not groups())
    assert settled(lambda: not actors()), actors()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=PATIENCE_S)


def test_a_family_that_cannot_start_says_why(serving, folder, tmp_path):
    file = family_file(folder, tmp_path / "wide.yaml", (), num_cpus=100)
    process = serving(file, free_port())
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "100" in errors
    assert "Traceback" not in errors
