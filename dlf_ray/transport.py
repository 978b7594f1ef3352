"""How plans and logits travel: ZeroMQ sockets, and shared memory where two ends share a node.

The coordinator binds one ROUTER socket; workers and clients connect to it. Every connection is
CURVE: encrypted, and only holders of the engine's client key (which Ray hands to the engine's own
actors) are let in. Nothing on a socket is pickled: control messages are msgpack decoded against
`messages`, plans and logits are fixed headers with raw arrays.

Logits of a worker on the coordinator's node do not pass through the socket at all. They lie in a
memory file that the coordinator creates for each worker and that has no name in any file system,
so that it is gone with the last process that holds it, however that process ends. A step is a
lockstep: a worker writes only between a plan and its reply, the coordinator reads only between
that reply and the next plan, so one buffer per worker is enough.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
import zmq
from zmq.auth.thread import ThreadAuthenticator

from dlf_ray.messages import (
    Abort,
    AskTimings,
    Chunks,
    Failed,
    Hello,
    Logits,
    Plan,
    Request,
    Stop,
    Timings,
)

FromClient = Request | Abort | AskTimings | Stop
ToClient = Chunks | Timings
FromWorker = Hello | Failed
HAS_MEMORY = hasattr(os, "memfd_create")  # Linux; elsewhere everything goes over TCP
NONCE = 64  # bytes in front of the logits, a multiple of every float's size
_encode = msgspec.msgpack.Encoder().encode
_from_client = msgspec.msgpack.Decoder(FromClient)
_from_worker = msgspec.msgpack.Decoder(FromWorker)
_to_client = msgspec.msgpack.Decoder(ToClient)


@dataclass(frozen=True)
class Memory:
    """Where a worker may leave its logits, if it can open this, that is, if it is on the node."""

    path: str
    nonce: bytes
    """The first bytes there; another machine's file of the same path has others."""
    address: str
    """The coordinator's socket inside the node: a quarter faster than TCP to oneself."""


@dataclass(frozen=True)
class Connection:
    """What one end needs to reach the coordinator. Secret: it travels through Ray only."""

    address: str
    server_public: bytes
    client_public: bytes
    client_secret: bytes
    memory: Memory | None = None

    def connect(self, identity: str, address: str | None = None) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        sock.setsockopt_string(zmq.IDENTITY, identity)
        sock.curve_serverkey = self.server_public
        sock.curve_publickey = self.client_public
        sock.curve_secretkey = self.client_secret
        sock.linger = 1000  # a last message may still leave, a dead peer holds nobody up
        sock.sndhwm = sock.rcvhwm = 0  # lockstep and admission bound what is under way
        sock.connect(address or self.address)
        return sock


class Hub:
    """The coordinator's end: one socket for all workers and clients.

    It is a `Fabric` for the coordinator's steps, and a mailbox of requests between them.
    """

    def __init__(
        self, host: str, workers: Sequence[str], *, rows: int, vocab: int, step_timeout_s: float
    ) -> None:
        """Binds a free port of `host`, with room for `rows` rows of logits per worker."""
        self._workers = {f"worker:{name}".encode(): name for name in workers}
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
        self._socket.linger = 1000
        self._socket.sndhwm = self._socket.rcvhwm = 0
        if ":" in host:
            self._socket.ipv6 = True
            host = f"[{host}]"
        self._address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        # An abstract name (Linux): no file that could be left behind.
        self._inside = f"ipc://@dlf-{secrets.token_hex(8)}"
        if HAS_MEMORY:
            self._socket.bind(self._inside)
        self._step_timeout_s = step_timeout_s
        self._inbox: deque[tuple[str, FromClient]] = deque()
        self._size = NONCE + rows * vocab * torch.float32.itemsize
        self._memory: dict[str, tuple[int, mmap.mmap, Memory]] = {}
        self._shared: dict[str, bool] = {}

    def connection(self, worker: str | None = None) -> Connection:
        """For a client, or for the worker of that name."""
        keys = (self._server_public, self._client_public, self._client_secret)
        return Connection(self._address, *keys, self._memory_of(worker) if worker else None)

    def wait_for_workers(self, timeout_s: float) -> dict[str, bool]:
        """Blocks until all workers have said hello; whether each shares the memory.

        Raises `TimeoutError` that names those which have not.
        """
        deadline = time.monotonic() + timeout_s
        while missing := set(self._workers.values()) - set(self._shared):
            if not self._socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
                raise TimeoutError(f"no word from the workers of {sorted(missing)}")
            self._receive()
        return self._shared

    def send(self, plans: Mapping[str, Plan]) -> None:
        for name, plan in plans.items():
            self._socket.send_multipart([f"worker:{name}".encode(), plan.to_bytes()])

    def receive(self, plans: Mapping[str, Plan]) -> Iterator[tuple[str, Logits | str]]:
        """Yields each model's answer as it arrives; requests that arrive meanwhile are kept.

        Raises `TimeoutError` that names the models which did not answer in time.
        """
        waiting = {name: plan.step for name, plan in plans.items()}
        deadline = time.monotonic() + self._step_timeout_s
        while waiting:
            if not self._socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
                raise TimeoutError(
                    f"no logits from {sorted(waiting)} within {self._step_timeout_s:g} s"
                )
            if (answer := self._receive()) and answer[1] == waiting.get(answer[0]):
                del waiting[answer[0]]
                yield answer[0], answer[2]

    def requests(self, *, wait_s: float) -> Iterator[tuple[str, FromClient]]:
        """What clients have sent; waits for the first if there is nothing yet."""
        if not self._inbox and self._socket.poll(int(1000 * wait_s)):
            self._receive()
        while self._socket.poll(0):
            self._receive()
        while self._inbox:
            yield self._inbox.popleft()

    def publish(self, client: str, message: ToClient) -> None:
        self._socket.send_multipart([client.encode(), _encode(message)])

    def close(self) -> None:
        """Tells every worker to stop, and lets go of sockets and memory."""
        for identity in self._workers:
            self._socket.send_multipart([identity, _encode(Stop())])
        self._socket.close()
        self._auth.stop()
        del self._auth  # its destructor joins a thread, which does not suit a process that is ended
        self._context.term()
        for fd, _, _ in self._memory.values():
            os.close(fd)
        self._memory.clear()

    def _receive(self) -> tuple[str, int, Logits | str] | None:
        """Takes one message: an answer to a plan is returned, all others are noted."""
        identity, *frames = self._socket.recv_multipart(copy=False)
        sender = self._workers.get(identity.bytes)
        if sender is None:
            # A message that is none of a client's kinds can only be a bug: it is not obeyed.
            with contextlib.suppress(msgspec.MsgspecError):
                message = _from_client.decode(frames[0].buffer)
                self._inbox.append((identity.bytes.decode(), message))
            return None
        header = frames[0].buffer
        if bytes(header[:4]) == Logits.MAGIC:
            shared = self._memory[sender][1] if len(frames) == 1 else None
            data = memoryview(shared)[NONCE:] if shared else frames[1].buffer
            logits = Logits.from_bytes(header, data)
            return sender, logits.step, logits
        message_ = _from_worker.decode(header)
        if isinstance(message_, Failed):
            return sender, message_.step, message_.error
        self._shared[sender] = message_.shared
        return None

    def _memory_of(self, worker: str) -> Memory | None:
        if not HAS_MEMORY:
            return None
        if worker not in self._memory:
            fd = os.memfd_create(f"dlf-{worker}")
            os.ftruncate(fd, self._size)  # pages are taken when they are first written
            data = mmap.mmap(fd, self._size)
            nonce = secrets.token_bytes(NONCE)
            data[:NONCE] = nonce
            memory = Memory(f"/proc/{os.getpid()}/fd/{fd}", nonce, self._inside)
            self._memory[worker] = (fd, data, memory)
        return self._memory[worker][2]


class _OnlyKey:
    """Lets in who holds one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def callback(self, domain: str, key: bytes) -> bool:
        return secrets.compare_digest(key, self._key)


class WorkerLink:
    """A worker's end: plans in, logits out."""

    def __init__(self, connection: Connection, name: str) -> None:
        memory = connection.memory
        self._memory = _open(memory) if memory else None
        inside = memory.address if memory and self._memory else None
        self._socket = connection.connect(f"worker:{name}", inside)
        self._socket.send(_encode(Hello(shared=self._memory is not None)))

    def plans(self) -> Iterator[Plan]:
        while True:
            data = self._socket.recv()
            if data[:4] != Plan.MAGIC:
                break  # the only other message to a worker is `Stop`
            yield Plan.from_bytes(data)
        self._socket.close()

    def reply(self, logits: Logits) -> None:
        values = logits.values
        size = values.numel() * values.element_size()
        if self._memory is not None and size <= len(self._memory) - NONCE:
            if size:
                target = torch.frombuffer(
                    self._memory, dtype=values.dtype, count=values.numel(), offset=NONCE
                )
                target.view(values.shape).copy_(values)
            self._socket.send(logits.header())
        else:
            raw = values.cpu().contiguous().view(-1).view(torch.uint8).numpy()
            self._socket.send_multipart([logits.header(), raw.data], copy=False)

    def fail(self, step: int, error: str) -> None:
        self._socket.send(_encode(Failed(step, error)))


def _open(memory: Memory) -> mmap.mmap | None:
    """The coordinator's memory file, or None where that is out of reach (another node)."""
    try:
        with open(memory.path, "r+b") as file:
            data = mmap.mmap(file.fileno(), 0)
    except OSError:
        return None
    return data if data[: len(memory.nonce)] == memory.nonce else None


class ClientLink:
    """A client's end. `send` may be called from any thread; chunks come on a thread of the link."""

    def __init__(self, connection: Connection, deliver: Callable[[ToClient], None]) -> None:
        identity = f"client:{secrets.token_hex(8)}"
        self._socket = connection.connect(identity)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # A ZeroMQ socket belongs to one thread; the others wake it through this pair.
        self._wake_in, wake_out = _pair(f"inproc://{identity}")
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._loop, args=(wake_out, deliver), name="dlf-client", daemon=True
        )
        self._thread.start()

    def send(self, message: FromClient) -> None:
        self._put(_encode(message))

    def close(self) -> None:
        self._put(None)
        self._thread.join()
        self._wake_in.close()

    def _put(self, data: bytes | None) -> None:
        self._outbox.put(data)
        with self._lock:
            self._wake_in.send(b"")

    def _loop(self, wake: zmq.Socket[bytes], deliver: Callable[[ToClient], None]) -> None:
        poller = zmq.Poller()
        poller.register(wake, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        while True:
            for sock, _ in poller.poll():
                if sock is wake:
                    wake.recv()
                    data = self._outbox.get()
                    if data is None:
                        wake.close()
                        self._socket.close()
                        return
                    self._socket.send(data)
                else:
                    deliver(_to_client.decode(self._socket.recv()))


def _pair(address: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    one.bind(address)
    other.connect(address)
    return one, other
