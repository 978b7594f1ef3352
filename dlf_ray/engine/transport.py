"""Who talks to whom: workers and clients of one coordinator, over ZeroMQ sockets.

The coordinator binds one ROUTER socket; workers and clients connect to it. Every connection is
CURVE: encrypted, and only holders of the engine's client key (which Ray hands to the engine's own
actors) are let in. Nothing on a socket is pickled: control messages are msgpack decoded against
`messages`, plans and logits are fixed headers with raw arrays.

Here are keys, members, requests and chunks, and that a plan gets to its worker; what carries the
logits back is in `paths`.

A worker is lost when its connection is gone (a process that ends closes it, one that vanishes with
its node is noticed by ZeroMQ's heartbeats), when it says hello a second time, or when it does not
answer in time. Whatever may be left of its process is killed then, so that it cannot come back half
way: the next that is heard of it is the hello of a new process.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from dlf_ray.engine.paths import Inbox, Memory, Outbox
from dlf_ray.messages import (
    Abort,
    AddModel,
    AskTimings,
    Chunk,
    Chunks,
    Failed,
    GiveUp,
    Hello,
    LossReason,
    Lost,
    Ping,
    Process,
    Ready,
    RemoveModel,
    Request,
    Stop,
    Timings,
)
from dlf_ray.plans import Logits, Plan

PROBE_S = 0.2  # how often a worker that computes is asked whether it is there
HEARTBEAT_S, SILENCE_S = 3, 10  # the life signs of a worker, and for how long they may stay away
log = logging.getLogger("dlf_ray")


@dataclass(frozen=True)
class Connection:
    """What one end needs to reach the coordinator. Secret: it travels through Ray only."""

    address: str
    server_public: bytes
    client_public: bytes
    client_secret: bytes = field(repr=False)
    memory: Memory | None = None

    def connect(self, identity: str, address: str | None = None) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        sock.setsockopt_string(zmq.IDENTITY, identity)
        sock.curve_serverkey = self.server_public
        sock.curve_publickey = self.client_public
        sock.curve_secretkey = self.client_secret
        sock.linger = 1000  # a last message may still leave, a dead peer holds nobody up
        sock.sndhwm = sock.rcvhwm = 0  # lockstep and admission bound what is under way
        if identity.startswith("worker:"):
            # The coordinator drops the connection without them. Clients may sleep as they like, and
            # a worker has nobody else to turn to: it waits for ever.
            sock.heartbeat_ivl = 1000 * HEARTBEAT_S
            sock.heartbeat_ttl = 1000 * SILENCE_S
            sock.heartbeat_timeout = 2**31 - 1
        sock.connect(address or self.address)
        return sock


class Done(msgspec.Struct, frozen=True, tag=True):
    """Coordinator to client: the family has changed as asked."""

    name: str
    change: Literal["added", "joined", "left"]
    """An expert: there is room for its worker; its worker has come; no request needs it."""
    connection: Connection | None = None
    """What the worker of a new expert needs to connect."""


class _Numbered(msgspec.Struct):
    """All that has to be known of a message to answer it."""

    id: int


FromClient = Request | Abort | AskTimings | AddModel | RemoveModel | GiveUp | Stop
ToClient = Chunks | Timings | Done
FromWorker = Hello | Failed
ToWorker = Ping | Stop
_encode = msgspec.msgpack.Encoder().encode
_from_client = msgspec.msgpack.Decoder(FromClient)
_from_worker = msgspec.msgpack.Decoder(FromWorker)
_to_client = msgspec.msgpack.Decoder(ToClient)
_to_worker = msgspec.msgpack.Decoder(ToWorker)


class Hub:
    """The coordinator's end: one socket for all workers and clients.

    It is a `Fabric` for the coordinator's steps, and a mailbox of requests between them.
    """

    def __init__(
        self,
        host: str,
        workers: Sequence[str],
        *,
        rows: int,
        vocab: int,
        step_timeout_s: float,
        kill: Callable[[Process], None],
    ) -> None:
        """Binds a free port of `host`, with room for `rows` rows of logits per worker. `kill` is
        called for the process of a lost worker, which may have ended long ago."""
        self._kill = kill
        self._workers = {_identity(name): name for name in workers}
        self._client_public, self._client_secret = zmq.curve_keypair()
        self._server_public, server_secret = zmq.curve_keypair()
        self._context = zmq.Context()
        self._auth = ThreadAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback("*", _OnlyKey(self._client_public))
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey = self._server_public
        self._socket.curve_secretkey = server_secret
        self._socket.router_handover = True  # a restarted worker takes over its identity
        self._socket.router_mandatory = True  # an error instead of silence where nobody listens
        self._socket.linger = 1000
        self._socket.sndhwm = self._socket.rcvhwm = 0
        if ":" in host:
            self._socket.ipv6 = True
            host = f"[{host}]"
        self._address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        self._logits = Inbox(rows, vocab)
        if self._logits.inside:
            self._socket.bind(self._logits.inside)
        self._step_timeout_s = step_timeout_s
        self._inbox: deque[tuple[str, FromClient]] = deque()
        self._hellos: dict[str, Hello] = {}
        self._lost: set[str] = set()
        """Those that have said hello, but must say it again."""
        self._changes: deque[tuple[str, Lost | Ready]] = deque()

    def connection(self, worker: str | None = None) -> Connection:
        """For a client, or for the worker of that name."""
        keys = (self._server_public, self._client_public, self._client_secret)
        return Connection(self._address, *keys, self._logits.offer(worker) if worker else None)

    def wait_for_workers(self, timeout_s: float) -> dict[str, bool]:
        """Blocks until all workers have said hello; whether each shares the memory.

        Raises `TimeoutError` that names those which have not.
        """
        deadline = time.monotonic() + timeout_s
        while missing := set(self._workers.values()) - set(self._hellos):
            if not self._socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
                raise TimeoutError(f"no word from the workers of {sorted(missing)}")
            self._receive()
        self._changes.clear()
        return {name: hello.shared for name, hello in self._hellos.items()}

    def add(self, worker: str) -> Connection:
        """Makes room for one more worker; what it needs to connect."""
        self._workers[_identity(worker)] = worker
        return self.connection(worker)

    def remove(self, worker: str) -> None:
        """Tells a worker to stop, and forgets it."""
        self._send(_identity(worker), _encode(Stop()))
        del self._workers[_identity(worker)]
        self._hellos.pop(worker, None)
        self._lost.discard(worker)
        self._logits.forget(worker)

    def send(self, plans: Mapping[str, Plan]) -> None:
        for name, plan in plans.items():
            if not self._send(_identity(name), plan.to_bytes()):
                self._lose(name, "died")

    def receive(
        self, plans: Mapping[str, Plan]
    ) -> Iterator[tuple[str, Logits | Failed | Lost | Ready]]:
        """Yields each model's answer as it arrives, or that it is lost; requests that arrive
        meanwhile are kept. A model that does not answer in time is lost."""
        waiting = {name: plan.step for name, plan in plans.items()}
        now = time.monotonic()
        deadline, probe = now + self._step_timeout_s, now + PROBE_S
        while True:
            for name, change in self.changes():
                waiting.pop(name, None)
                yield name, change
            if not waiting:
                return
            if self._socket.poll(max(0, int(1000 * (min(deadline, probe) - time.monotonic())))):
                answer = self._receive()
                if answer and answer[1].step == waiting.get(answer[0]):
                    del waiting[answer[0]]
                    yield answer
            now = time.monotonic()
            if now >= deadline:
                for name in waiting:
                    self._lose(name, "hung")
            elif now >= probe:
                probe = now + PROBE_S
                for name in waiting:
                    if not self._send(_identity(name), _encode(Ping())):
                        self._lose(name, "died")

    def changes(self) -> Iterator[tuple[str, Lost | Ready]]:
        """What has become known of the workers since the last call."""
        while self._changes:
            yield self._changes.popleft()

    def requests(self, *, wait_s: float) -> Iterator[tuple[str, FromClient]]:
        """What clients have sent; waits for the first if there is nothing yet."""
        if not self._inbox and self._socket.poll(int(1000 * wait_s)):
            self._receive()
        while self._socket.poll(0):
            self._receive()
        while self._inbox:
            yield self._inbox.popleft()

    def publish(self, client: str, message: ToClient) -> None:
        """To a client that has gone, nothing is sent."""
        self._send(client.encode(), _encode(message))

    def close(self) -> None:
        """Tells every worker to stop, and lets go of sockets and memory."""
        for identity in self._workers:
            self._send(identity, _encode(Stop()))
        self._socket.close()
        self._auth.stop()
        del self._auth  # its destructor joins a thread, which does not suit a process that is ended
        self._context.term()
        self._logits.close()

    def _send(self, identity: bytes, data: bytes) -> bool:
        """False where nobody of that name is connected."""
        try:
            self._socket.send_multipart([identity, data])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def _lose(self, worker: str, reason: LossReason) -> None:
        self._lost.add(worker)
        self._changes.append((worker, Lost(reason)))
        self._kill(self._hellos[worker].process)

    def _receive(self) -> tuple[str, Logits | Failed] | None:
        """Takes one message: an answer to a plan is returned, all others are noted."""
        identity, *frames = self._socket.recv_multipart(copy=False)
        sender = self._workers.get(identity.bytes)
        if sender is None:
            client, data = identity.bytes.decode(errors="replace"), frames[0].bytes
            try:
                self._inbox.append((client, _from_client.decode(data)))
            except msgspec.MsgspecError as error:
                self._refuse(client, data, error)
            return None
        try:
            message = self._read(sender, frames)
        except (ValueError, LookupError) as error:  # msgspec's errors are of the former
            log.error("a message of the worker of %r cannot be read: %s", sender, error)
            # Its next ones would be no better: another process takes its place.
            if sender in self._hellos and sender not in self._lost:
                self._lose(sender, "died")
            return None
        if not isinstance(message, Hello):
            return sender, message
        if sender in self._hellos and sender not in self._lost:
            self._changes.append((sender, Lost("died")))
        self._hellos[sender] = message
        self._lost.discard(sender)
        self._changes.append((sender, Ready()))
        return None

    def _read(self, sender: str, frames: Sequence[zmq.Frame]) -> Logits | Failed | Hello:
        """Raises `ValueError` or `LookupError` where a worker's message is none."""
        header = frames[0].buffer
        if bytes(header[:4]) != Logits.MAGIC:
            message: Hello | Failed = _from_worker.decode(header)
            return message
        return self._logits.take(sender, [frame.buffer for frame in frames])

    def _refuse(self, client: str, data: bytes, error: Exception) -> None:
        """Does not obey what is none of a client's messages, which can only be a bug; whoever waits
        for an answer to it gets one."""
        log.error("a message of %s cannot be read: %s", client, error)
        with contextlib.suppress(msgspec.MsgspecError):
            id = msgspec.msgpack.decode(data, type=_Numbered).id
            why = f"the coordinator cannot read the request: {error}"
            self.publish(client, Chunks((Chunk(id=id, finish_reason="error", error=why),)))


def _identity(worker: str) -> bytes:
    return f"worker:{worker}".encode()


class _OnlyKey:
    """Lets in who holds one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def callback(self, domain: str, key: bytes) -> bool:
        return secrets.compare_digest(key, self._key)


class WorkerLink:
    """A worker's end: plans in, logits out."""

    def __init__(self, connection: Connection, name: str, process: Process | None = None) -> None:
        self._logits = Outbox(connection.memory)
        self._socket = connection.connect(f"worker:{name}", self._logits.inside)
        self._socket.send(_encode(Hello(self._logits.shared, process or Process())))

    def plans(self) -> Iterator[Plan]:
        while True:
            data = self._socket.recv()
            if data[:4] == Plan.MAGIC:
                yield Plan.from_bytes(data)
            elif isinstance(_to_worker.decode(data), Stop):
                break
        self._socket.close()

    def reply(self, logits: Logits) -> None:
        self._socket.send_multipart(self._logits.frames(logits), copy=False)

    def fail(self, failed: Failed) -> None:
        self._socket.send(_encode(failed))


class ClientLink:
    """A client's end. `send` may be called from any thread; chunks come on a thread of the link."""

    def __init__(
        self,
        connection: Connection,
        deliver: Callable[[ToClient], None],
        died: Callable[[Exception], None],
    ) -> None:
        """`died` is called, once, where an exception has ended the thread: nothing more comes."""
        identity = f"client:{secrets.token_hex(8)}"
        self._socket = connection.connect(identity)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # A ZeroMQ socket belongs to one thread; the others wake it through this pair.
        self._wake_in, self._wake_out = _pair(f"inproc://{identity}")
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._run, args=(deliver, died), name="dlf-client", daemon=True
        )
        self._thread.start()

    def send(self, message: FromClient) -> None:
        self._put(_encode(message))

    def close(self) -> None:
        self._put(None)
        self._thread.join()
        # Not by the thread: to send to a pair whose other end has gone would wait for ever.
        for sock in (self._socket, self._wake_out, self._wake_in):
            sock.close()

    def _put(self, data: bytes | None) -> None:
        self._outbox.put(data)
        with self._lock:
            self._wake_in.send(b"")

    def _run(self, deliver: Callable[[ToClient], None], died: Callable[[Exception], None]) -> None:
        try:
            self._loop(deliver)
        except Exception as error:
            log.exception("the link to the coordinator has died")
            died(error)

    def _loop(self, deliver: Callable[[ToClient], None]) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_out, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        while True:
            for sock, _ in poller.poll():
                if sock is self._wake_out:
                    self._wake_out.recv()
                    # Perhaps more than one message: an interrupt may have cost one its wake.
                    while not self._outbox.empty():
                        data = self._outbox.get()
                        if data is None:
                            return
                        self._socket.send(data)
                else:
                    deliver(_to_client.decode(self._socket.recv()))


def _pair(address: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    one.sndhwm = other.rcvhwm = 0  # who wakes never waits, least of all the thread that is woken
    one.bind(address)
    other.connect(address)
    return one, other
