"""Experiments as Ray jobs, on a cluster of their own that was started from the command line."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time

import psutil
import pytest
import yaml
from conftest import EXPERTS
from processes import BIN, PATIENCE_S, ROOT, end, free_port, one_at_a_time, settled

from dlf_ray.evaluation.results import read
from dlf_ray.evaluation.statistics import summary

ITEMS = 40  # enough for the kill to come well before the end


@pytest.fixture(scope="module")
def cluster():
    """`ray start --head` with token authentication; yields the environment to submit from."""
    folder = tempfile.mkdtemp(prefix="dlf")  # short: sockets lie in it
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # jobs find our Python by its name
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-the-tests-only-0123456789",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "ADDRESS_OF_THE_HEAD": f"127.0.0.1:{port}",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        *(BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"),
        # The cluster of the other tests, in this machine too, has the usual port.
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def takes_jobs():  # it answers before it can
        assert head.poll() is None
        first = [BIN / "ray", "job", "submit", "--", "true"]
        return subprocess.run(first, env=environment, check=False, **quiet).returncode == 0

    with contextlib.ExitStack() as clean:
        clean.callback(shutil.rmtree, folder, ignore_errors=True)
        with one_at_a_time():
            head = subprocess.Popen(command, env=environment, **quiet)
            clean.callback(end, head)
            assert settled(takes_jobs), "the cluster did not come up"
        yield environment


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


@pytest.fixture
def submit(cluster, program):
    """Submits the job of a working directory; the program shows its log and ends as it does."""

    def start(work, *words):
        command = [BIN / "ray", "job", "submit", "--working-dir", work, "--", "python"]
        command += ["evaluate.py", "experiment.yaml", *words]
        return program(*command, env=cluster, stderr=subprocess.STDOUT)

    return start


def comparable(folder):
    return read(folder).drop_columns(["seconds"]).to_pylist()


def drivers():
    """The processes of our jobs."""
    every = psutil.process_iter(["cmdline"])
    return [each for each in every if (each.info["cmdline"] or [])[:2] == ["python", "evaluate.py"]]


def test_a_job_that_is_killed_goes_on_when_submitted_again(submit, experiment, tmp_path):
    work, results = experiment
    whole = submit(work, "--output", tmp_path / "whole")
    log, _ = whole.communicate(timeout=2 * PATIENCE_S)
    assert whole.returncode == 0, log
    assert f"items, dynamic: {ITEMS}/{ITEMS} items" in log

    first = submit(work)
    deadline = time.monotonic() + PATIENCE_S
    while not list(results.glob("part-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    found = drivers()
    assert found
    for process in found:
        process.send_signal(signal.SIGKILL)
    first.communicate(timeout=PATIENCE_S)
    assert first.returncode != 0

    second = submit(work, "--num-replicas", "2")
    log, _ = second.communicate(timeout=2 * PATIENCE_S)
    assert second.returncode == 0, log
    assert "[2/2]" in log
    rows = summary(read(results))
    assert {row.method: row.items for row in rows} == dict.fromkeys(
        ("large", "static", "dynamic"), ITEMS
    )
    assert comparable(results) == comparable(tmp_path / "whole")


def test_a_job_that_fails_says_why_and_exits_with_an_error(submit, experiment):
    work, results = experiment
    file = work / "experiment.yaml"
    file.write_text(file.read_text().replace("static", "statistic"))
    job = submit(work)
    log, _ = job.communicate(timeout=PATIENCE_S)
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
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "RAY_AUTH_MODE=token" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
