"""Sockets and shared memory: what travels arrives unchanged, and strangers stay outside."""

import contextlib
import dataclasses
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import zmq
from parts import ROWS, VOCAB, answers, hub_of, logits, plan, start

from dlf_ray import SamplingParams
from dlf_ray.engine.transport import ClientLink, Connection, WorkerLink
from dlf_ray.messages import Abort, Chunk, Chunks, Failed, Lost, Process, Ready, Request
from dlf_ray.params import FusionParams
from dlf_ray.plans import Logits, Plan

REQUEST = Request(
    id=3,
    prompt=(1, 2, 3),
    prompts={"base": (4,)},
    sampling=SamplingParams(stop=("\n",), seed=2**63),
    fusion=FusionParams(
        rule="static",
        select="paper",
        step=0.1,
        experts=("math",),
        bounds=((0.0, 2.0),),
        weights=(1.5,),
    ),
)


@pytest.fixture
def hub():
    made = hub_of(20)
    yield made
    made.close()


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "socket"])
@pytest.mark.parametrize("dtype", Logits.DTYPES)
def test_plans_and_logits_arrive_unchanged(hub, memory, dtype):
    plans = []

    def answer(link, received):
        plans.append(received)
        link.reply(logits(received.step, received.rows, dtype, seed=received.step))

    start(hub, "large", answer, memory)
    start(hub, "base", answer, memory)
    assert hub.wait_for_workers(20) == {"large": memory, "base": memory}
    for step, rows in enumerate([ROWS, 1, 0, 2]):
        sent = {"large": plan(step, rows), "base": plan(step, rows)}
        hub.send(sent)
        for _, received in hub.receive(sent):
            expected = logits(step, rows, dtype, seed=step)
            torch.testing.assert_close(received.values, expected.values, rtol=0, atol=0)
            np.testing.assert_array_equal(received.finite, expected.finite)
            assert (received.step, received.seconds) == (step, 0.25)
    np.testing.assert_array_equal(plans[0].tokens, plan(0, ROWS).tokens)


def test_more_rows_than_the_memory_holds_take_the_socket(hub):
    start(hub, "large", lambda link, p: link.reply(logits(p.step, 3 * ROWS)))
    start(hub, "base", lambda link, p: None)
    hub.wait_for_workers(20)
    hub.send({"large": plan(1)})
    ((_, received),) = hub.receive({"large": plan(1)})
    torch.testing.assert_close(received.values, logits(1, 3 * ROWS).values)


def test_another_network_of_the_same_machine_shares_no_memory(hub):
    """Containers that see each other's processes: the file is there, the inner socket is not."""
    connection = hub.connection("large")
    there = dataclasses.replace(connection.memory, network="net:[1]")
    through = dataclasses.replace(connection, memory=there)
    threading.Thread(target=lambda: WorkerLink(through, "large"), daemon=True).start()
    start(hub, "base", lambda link, p: None)
    assert hub.wait_for_workers(20) == {"large": False, "base": True}


def test_a_memory_file_of_another_machine_is_not_written_to(hub, tmp_path):
    other = tmp_path / "memory"
    other.write_bytes(bytes(10_000))
    connection = hub.connection("large")
    wrong = dataclasses.replace(connection.memory, path=str(other))
    connection = dataclasses.replace(connection, memory=wrong)
    threading.Thread(target=lambda: WorkerLink(connection, "large"), daemon=True).start()
    start(hub, "base", lambda link, p: None)
    assert hub.wait_for_workers(20) == {"large": False, "base": True}
    assert other.read_bytes() == bytes(10_000)


def test_the_memory_has_no_name_in_any_file_system(hub):
    before = set(os.listdir("/dev/shm"))
    path = hub.connection("large").memory.path
    assert set(os.listdir("/dev/shm")) == before
    assert os.readlink(path).startswith("/memfd:")


def test_a_failed_step_says_why_and_the_next_one_works(hub):
    def answer(link, p):
        if p.step == 1:
            link.fail(Failed(1, "out of memory"))
        else:
            link.reply(logits(p.step))

    start(hub, "large", answer)
    start(hub, "base", answer)
    hub.wait_for_workers(20)
    for step in (1, 2):
        hub.send({"large": plan(step)})
        ((name, received),) = hub.receive({"large": plan(step)})
        assert name == "large"
        assert received == Failed(1, "out of memory") if step == 1 else received.step == 2


def test_an_answer_to_an_earlier_step_is_not_taken_for_this_one(hub):
    def answer(link, p):
        link.reply(logits(p.step - 1))
        link.reply(logits(p.step))

    start(hub, "large", answer)
    start(hub, "base", answer)
    hub.wait_for_workers(20)
    hub.send({"large": plan(5)})
    assert [each.step for _, each in hub.receive({"large": plan(5)})] == [5]


def test_a_worker_that_does_not_start_is_named(hub):
    start(hub, "large", lambda link, p: None)
    with pytest.raises(TimeoutError, match="'base'"):
        hub.wait_for_workers(0.3)


def test_a_worker_that_is_silent_for_too_long_is_lost_and_killed():
    killed = []
    hub = hub_of(0.4, killed.append)
    start(hub, "large", lambda link, p: link.reply(logits(p.step)))
    hung = Process("node", 77, 1.5)
    start(hub, "base", lambda link, p: None, process=hung)
    hub.wait_for_workers(20)
    plans = {"large": plan(1), "base": plan(1)}
    hub.send(plans)
    (first, answer), (second, change) = hub.receive(plans)
    assert (first, answer.step, second, change) == ("large", 1, "base", Lost("hung"))
    assert killed == [hung]
    hub.close()


def test_a_connection_that_ends_is_noticed_while_the_others_still_compute(hub):
    link = WorkerLink(hub.connection("base"), "base")
    done = threading.Event()
    start(hub, "large", lambda link, p: (done.wait(20), link.reply(logits(p.step))))
    hub.wait_for_workers(20)
    plans = {"large": plan(1), "base": plan(1)}
    hub.send(plans)
    threading.Timer(0.3, link._socket.close).start()
    received = hub.receive(plans)
    assert next(received) == ("base", Lost("died"))
    done.set()
    assert [name for name, _ in received] == ["large"]
    # Nor is it an error to send to nobody, and who comes back says so.
    assert answers(hub, {"base": plan(2)}) == [("base", Lost)]
    start(hub, "base", lambda link, p: link.reply(logits(p.step)))
    while not list(hub.requests(wait_s=0.1)) and not (changes := list(hub.changes())):
        pass
    assert changes == [("base", Ready())]
    assert answers(hub, {"base": plan(3)}) == [("base", Logits)]


def test_a_second_hello_means_that_the_first_worker_is_gone(hub):
    """It was restarted between two steps, or while a plan for the one before was on its way."""
    start(hub, "large", lambda link, p: None)
    start(hub, "base", lambda link, p: link.reply(logits(p.step)))
    hub.wait_for_workers(20)
    start(hub, "large", lambda link, p: link.reply(logits(p.step)))
    while not (changes := list(hub.changes())):
        list(hub.requests(wait_s=0.1))
    assert changes == [("large", Lost("died")), ("large", Ready())]
    hub.send({"large": plan(1)})
    started = [True]

    def again(link, p):
        """Says hello anew in the middle of a step."""
        if started.pop():
            started.append(False)
            start(hub, "base", again)
        else:
            link.reply(logits(p.step))
            started.append(False)

    assert [type(answer) for _, answer in hub.receive({"large": plan(1)})] == [Logits]
    start(hub, "base", again)
    while len(changes) < 4:
        list(hub.requests(wait_s=0.1))
        changes += hub.changes()
    assert answers(hub, {"base": plan(2)}) == [("base", Lost), ("base", Ready)]
    assert answers(hub, {"base": plan(3)}) == [("base", Logits)]


FROZEN = """
import pickle, sys, dlf_ray.engine.transport as transport
transport.HEARTBEAT_S, transport.SILENCE_S = 1, 3
link = transport.WorkerLink(pickle.load(sys.stdin.buffer), "large")
for plan in link.plans():
    raise SystemExit("a plan")
"""


def test_a_node_that_vanishes_without_a_word_is_noticed(hub):
    """Nobody closes its connections: here the process is stopped, and its sockets stay open."""
    process = subprocess.Popen([sys.executable, "-c", FROZEN], stdin=subprocess.PIPE)
    process.stdin.write(pickle.dumps(dataclasses.replace(hub.connection("large"), memory=None)))
    process.stdin.close()
    start(hub, "base", lambda link, p: None)
    hub.wait_for_workers(60)
    time.sleep(2.5)  # for its first life sign
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert answers(hub, {"large": plan(1)}) == [("large", Lost)]
    assert time.monotonic() - began < 15  # and not the timeout of a step
    process.kill()
    process.wait()


def test_workers_come_and_go(hub):
    start(hub, "large", lambda link, p: link.reply(logits(p.step)))
    start(hub, "base", lambda link, p: link.reply(logits(p.step)))
    hub.wait_for_workers(20)
    connection = hub.add("math")
    thread = start(hub, "math", lambda link, p: link.reply(logits(p.step)))
    while not (changes := list(hub.changes())):
        list(hub.requests(wait_s=0.1))
    assert changes == [("math", Ready())]
    assert answers(hub, {"math": plan(1)}) == [("math", Logits)]
    hub.remove("math")
    thread.join(20)
    assert not thread.is_alive()
    assert not os.path.exists(connection.memory.path)
    assert answers(hub, {"large": plan(2)}) == [("large", Logits)]


def test_requests_reach_the_coordinator_and_chunks_come_back(hub):
    news = queue.SimpleQueue()
    link = ClientLink(hub.connection(), news.put, pytest.fail)
    link.send(REQUEST)
    link.send(Abort(9))
    received = []
    while len(received) < 2:
        received += hub.requests(wait_s=20)
    client = received[0][0]
    assert received == [(client, REQUEST), (client, Abort(9))]
    chunks = Chunks((Chunk(id=3, text="é", token_ids=(5,), weights=((1.5,),), kl=((0.1, 0.2),)),))
    hub.publish(client, chunks)
    assert news.get(timeout=20) == chunks
    link.close()


def test_requests_that_arrive_during_a_step_are_kept(hub):
    link = ClientLink(hub.connection(), lambda _: None, pytest.fail)

    def answer(worker, p):
        link.send(REQUEST)
        while not asked.is_set():
            asked.wait(0.2)
        worker.reply(logits(p.step))

    asked = threading.Event()
    threading.Timer(0.5, asked.set).start()
    start(hub, "large", answer)
    start(hub, "base", answer)
    hub.wait_for_workers(20)
    hub.send({"large": plan(1)})
    assert len(list(hub.receive({"large": plan(1)}))) == 1
    assert [message for _, message in hub.requests(wait_s=0)] == [REQUEST]
    link.close()


def test_a_message_that_is_none_of_ours_is_not_obeyed(hub):
    sock = hub.connection().connect("client:odd")
    for bad in (b"", b"\xc1garbage", b"\x80\x04pickle", b"\x81\xa4type\xa7Request"):
        sock.send(bad)
    assert not list(hub.requests(wait_s=0.5))
    link = ClientLink(hub.connection(), lambda _: None, pytest.fail)
    link.send(Abort(1))
    assert [message for _, message in hub.requests(wait_s=20)] == [Abort(1)]
    link.close()
    sock.close()


def stranger(hub, kind):
    """Someone who knows the address, and perhaps the server's public key, but not the client's."""
    known = hub.connection()
    if kind == "plain":
        sock = zmq.Context.instance().socket(zmq.DEALER)
        sock.setsockopt_string(zmq.IDENTITY, "worker:large")
        sock.linger = 0
        sock.connect(known.address)
        return sock
    public, secret = zmq.curve_keypair()
    server = zmq.curve_keypair()[0] if kind == "wrong server" else known.server_public
    inside = hub.connection("large").memory.address if kind == "own key, same node" else None
    sock = Connection(known.address, server, public, secret).connect("worker:large", inside)
    sock.linger = 0
    return sock


@pytest.mark.parametrize("kind", ["plain", "own key", "own key, same node", "wrong server"])
def test_a_stranger_can_neither_inject_nor_read(hub, kind):
    sock = stranger(hub, kind)
    sock.sndtimeo = 200  # once it is shut out it has nobody to send to
    with contextlib.suppress(zmq.Again):
        sock.send(WorkerHello)
    with pytest.raises(TimeoutError, match="'large'"):
        hub.wait_for_workers(1)
    start(hub, "large", lambda link, p: link.reply(logits(p.step)))
    start(hub, "base", lambda link, p: link.reply(logits(p.step)))
    hub.wait_for_workers(20)  # the stranger's claim to the name changes nothing
    with contextlib.suppress(zmq.Again):
        sock.send_multipart([logits(1, seed=9).header(), bytes(4 * VOCAB)])
    hub.send({"large": plan(1)})
    ((_, received),) = hub.receive({"large": plan(1)})
    torch.testing.assert_close(received.values, logits(1).values)
    assert not sock.poll(200)
    sock.close()


WorkerHello = b"\x82\xa4type\xa5Hello\xa6shared\xc2"


def test_the_strangers_hello_would_have_been_understood(hub):
    """So that the test above fails for the key and not for a typo in the bytes."""
    sock = hub.connection("large").connect("worker:large")
    sock.send(WorkerHello)
    start(hub, "base", lambda link, p: None)
    assert hub.wait_for_workers(20) == {"large": False, "base": True}
    sock.close()


def relay(address):
    """A man in the middle: a port that leads to `address`, and the bytes that went through."""
    host, port = address.removeprefix("tcp://").split(":")
    seen = bytearray()
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source, target):
        while data := source.recv(65536):
            seen.extend(data)
            target.sendall(data)
        target.close()

    def accept():
        near, _ = server.accept()
        far = socket.create_connection((host, int(port)))
        threading.Thread(target=pump, args=(near, far), daemon=True).start()
        threading.Thread(target=pump, args=(far, near), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"tcp://127.0.0.1:{server.getsockname()[1]}", seen


def test_nothing_on_the_wire_is_readable(hub):
    """A relay between the two ends sees neither the tokens of a plan nor the logits."""
    connection = hub.connection("large")
    address, seen = relay(connection.address)
    through = dataclasses.replace(connection, address=address, memory=None)
    secret = b"the secret of the house!"  # four bytes a token
    tokens = np.frombuffer(secret, dtype="<i4")
    got = queue.SimpleQueue()

    def loop():
        link = WorkerLink(through, "large")
        for each in link.plans():
            got.put(each)
            link.reply(logits(each.step))

    threading.Thread(target=loop, daemon=True).start()
    start(hub, "base", lambda link, p: None)
    hub.wait_for_workers(20)
    one = np.ones(1, dtype=np.int32)
    plans = {"large": Plan(1, 0 * one, 0 * one, len(tokens) * one, one, tokens)}
    hub.send(plans)
    ((_, received),) = hub.receive(plans)
    assert got.get(timeout=20).tokens.tobytes() == secret
    assert len(seen) > 4 * VOCAB
    assert secret not in seen
    assert received.values.numpy().tobytes()[:32] not in seen
