"""Experiments as Ray jobs, on a cluster of their own that was started from the command line."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import EXPERTS

from dlf_ray.results import read, summary

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ITEMS = 100  # enough for the kill to come well before the end


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """`ray start --head` with token authentication; yields the environment to submit from."""
    folder = tempfile.mkdtemp(prefix="dlf")  # short: sockets lie in it
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-the-tests-only-0123456789",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "ADDRESS_OF_THE_HEAD": f"127.0.0.1:{port}",
    }
    environment.pop("RAY_ADDRESS", None)
    head = subprocess.Popen(
        [
            *(BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"),
            # The cluster of the other tests, in this machine too, has the usual port.
            f"--dashboard-agent-listen-port={free_port()}",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 90
    while subprocess.run(  # it answers before it can take jobs
        [BIN / "ray", "job", "submit", "--", "true"],
        env=environment,
        capture_output=True,
        check=False,
    ).returncode:
        assert time.monotonic() < deadline, "the cluster did not come up"
        assert head.poll() is None
        time.sleep(1)
    yield environment
    for process in (*psutil.Process(head.pid).children(recursive=True), head):
        process.kill()
    head.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def experiment(folder, tmp_path):
    """A working directory with the job and an experiment, and where its results go."""
    family = {name: {"model": name, "num_cpus": 0.1} for name in ("large", "base")}
    family["experts"] = {name: {"model": name, "num_cpus": 0.1} for name in EXPERTS[:1]}
    engine = {"num_cpus": 0.1, "max_model_len": 256, "max_num_seqs": 1}
    file = folder / "jobs.yaml"
    file.write_text(yaml.safe_dump({**family, "engine": engine}, sort_keys=False))
    items = tmp_path / "items.csv"
    lines = [f"how much is {i},yes\n" for i in range(ITEMS)]
    items.write_text("question,answer\n" + "".join(lines))
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(ROOT / "jobs" / "evaluate.py", work)
    task = {"data": str(items), "prompt_template": "Q: {question}\nA:", "max_tokens": 6}
    raw = {
        "family": str(file),
        "tasks": [task],
        "methods": ["large", "static", "dynamic"],
        "output": str(tmp_path / "results"),
    }
    (work / "experiment.yaml").write_text(yaml.safe_dump(raw))
    return work, tmp_path / "results"


def submit(environment, work, *words):
    command = [BIN / "ray", "job", "submit", "--working-dir", work, "--", "python", "evaluate.py"]
    return subprocess.Popen(
        [*command, "experiment.yaml", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def comparable(folder):
    return read(folder).drop_columns(["seconds"]).to_pylist()


def test_a_job_that_is_killed_goes_on_when_submitted_again(cluster, experiment, tmp_path):
    work, results = experiment
    whole = submit(cluster, work, "--output", str(tmp_path / "whole"))
    log, _ = whole.communicate(timeout=180)
    assert whole.returncode == 0, log
    assert f"items, dynamic: {ITEMS}/{ITEMS} items" in log

    first = submit(cluster, work)
    deadline = time.monotonic() + 120
    while not list(results.glob("part-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    drivers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"][:2] == ["python", "evaluate.py"]
    ]
    assert drivers
    for process in drivers:
        process.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode != 0

    second = submit(cluster, work, "--num-replicas", "2")
    log, _ = second.communicate(timeout=180)
    assert second.returncode == 0, log
    assert "[2/2]" in log
    rows = summary(read(results))
    assert {row.method: row.items for row in rows} == dict.fromkeys(
        ("large", "static", "dynamic"), ITEMS
    )
    assert comparable(results) == comparable(tmp_path / "whole")


def test_a_job_that_fails_says_why_and_exits_with_an_error(cluster, experiment):
    work, results = experiment
    file = work / "experiment.yaml"
    file.write_text(file.read_text().replace("static", "statistic"))
    job = submit(cluster, work)
    log, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "unknown method 'statistic'" in log
    assert not results.exists()


def test_who_has_no_token_is_told_what_to_set(cluster, experiment, folder):
    """Ray's own message only says that it cannot connect."""
    environment = {
        **cluster,
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": cluster["ADDRESS_OF_THE_HEAD"],
    }
    done = subprocess.run(
        [BIN / "dlf", "generate", folder / "jobs.yaml", "--prompt", "x"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "RAY_AUTH_MODE=token" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
