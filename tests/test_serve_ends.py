"""`dlf serve` from its start to its end, on the cluster of these tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from test_ends import actors, groups, settled
from test_serve import family_file, free_port

pytestmark = pytest.mark.usefixtures("ray_cluster")


def serving(file, port):
    import ray

    return subprocess.Popen(
        [Path(sys.executable).with_name("dlf"), "serve", file, "--port", str(port)],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_serves_until_it_is_terminated(folder, tmp_path):
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
    assert requests.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
    second = serving(file, free_port())
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 1
    assert "serve deploy" in errors
    assert requests.get(f"{url}/ready", timeout=30).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert settled(lambda: not groups())
    assert settled(lambda: not actors()), actors()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=5)


def test_a_family_that_cannot_start_says_why(folder, tmp_path):
    file = family_file(folder, tmp_path / "wide.yaml", (), num_cpus=100)
    process = serving(file, free_port())
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "100" in errors
    assert "Traceback" not in errors
