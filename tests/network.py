"""A Ray cluster of nodes that reach each other over the network only, on one machine.

Each node lives in Linux namespaces of its own: a network address, process ids, and a folder for
Ray. So an actor cannot open the memory of another node, as on machines apart; only the disk with
the models is common. The namespaces have no names and end with their processes, and those with
ours, so that nothing is left behind. Needs root, iproute2 and util-linux.

    python tests/network.py 3 dlf bench --forward-ms 20

runs a command on the first of three such nodes.
"""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from processes import BIN, PATIENCE_S, one_at_a_time

PORT = 6379  # in a network of its own, nobody else has it
APART = [
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
]
"""Runs what follows in namespaces of its own; all its processes end with this one."""
INIT = """
until ip route | grep -q default; do sleep 0.1; done
mount -t tmpfs none "$RAY_TMPDIR" && exec "$@"
"""
"""What a node begins with: its network, and an empty folder of its own in place of ours."""
COUNT_NODES = """
import ray, sys, time
ray.init(logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.1)
"""


def refusal():
    """Why no such nodes can be made here, or None."""
    attempt = (
        "mount -t tmpfs none /mnt && ip link add dlf0 type veth && ip link add dlf1 type bridge"
    )
    try:
        done = subprocess.run(
            [*APART, "sh", "-c", attempt], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else None


@dataclass
class Network:
    """What runs; node 0 is the head."""

    addresses: list[str]
    nodes: list[subprocess.Popen]
    environment: dict[str, str]

    def command(self, *words, node=0):
        """The command line that runs `words` on a node."""
        (first,) = psutil.Process(self.nodes[node].pid).children()
        enter = ["nsenter", "--target", str(first.pid), "--net", "--pid", "--mount", "--"]
        return [*enter, *map(str, words)]

    def received(self, node):
        """Bytes that have come in over a node's network interface so far."""
        counters = Path(f"/proc/{self.nodes[node].pid}/net/dev").read_text()
        return int(re.search(r"eth0: *(\d+)", counters)[1])


@contextlib.contextmanager
def network(count, num_cpus=1):
    """Yields a `Network` of `count` nodes of `num_cpus` CPUs each, which have joined."""
    addresses = [f"10.77.0.{i + 1}" for i in range(count)]
    with contextlib.ExitStack() as clean, tempfile.TemporaryDirectory(prefix="dlf") as folder:
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_TMPDIR": folder,
        }
        environment.pop("RAY_ADDRESS", None)

        def apart(*command):
            process = subprocess.Popen(
                [*APART, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            clean.callback(_end, process)
            while not psutil.Process(process.pid).children():  # until then it is not apart
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            return process

        with one_at_a_time():
            # The bridge is apart too: no firewall, no route, no clash with other networks.
            switch = apart("sleep", "infinity").pid
            _ip(switch, "link add bridge type bridge")
            _ip(switch, "link set bridge up")
            nodes = []
            for i, address in enumerate(addresses):
                head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
                ray = [BIN / "ray", "start", "--block", f"--node-ip-address={address}"]
                ray += [f"--num-cpus={num_cpus}", f"--object-store-memory={100 * 2**20}"]
                ray += ["--disable-usage-stats"]
                ray += [f"--address={addresses[0]}:{PORT}"] if nodes else head
                nodes.append(apart("sh", "-c", INIT, "sh", *ray))
                node = nodes[-1].pid
                _ip(switch, f"link add port{i} type veth peer name eth0 netns {node}")
                _ip(switch, f"link set port{i} master bridge up")
                _ip(node, f"address add {address}/24 dev eth0")
                _ip(node, "link set lo up")
                _ip(node, "link set eth0 up")
                _ip(node, "route add default dev eth0")  # by which Ray finds its address
            made = Network(
                addresses, nodes, {**environment, "RAY_ADDRESS": f"{addresses[0]}:{PORT}"}
            )
            _wait(made)
        yield made


def _ip(process, words):
    """Configures the network in which a process lives."""
    enter = ["nsenter", "--target", str(process), "--net"]
    subprocess.run([*enter, "ip", *words.split()], check=True)


def _wait(made):
    """Until all nodes have joined."""
    deadline = time.monotonic() + PATIENCE_S
    error = "no Ray yet"
    while time.monotonic() < deadline:
        for node in made.nodes:
            assert node.poll() is None, f"a node did not start: {node.communicate()[0]}"
        counted = subprocess.run(
            made.command(sys.executable, "-c", COUNT_NODES, len(made.nodes)),
            env=made.environment,
            timeout=PATIENCE_S,
            capture_output=True,
            text=True,
            check=False,
        )
        if counted.returncode == 0:
            return
        error = counted.stderr
        time.sleep(0.5)
    raise TimeoutError(f"the nodes did not come together: {error}")


def _end(process):
    process.kill()  # and with it all processes of its namespaces
    process.wait(PATIENCE_S)


def main():
    count, *command = sys.argv[1:]
    with network(int(count)) as made:
        return subprocess.run(made.command(*command), env=made.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
