"""What dies or speaks nonsense ends what depends on it, and nothing else; nobody waits for ever.

Without Ray: an engine whose coordinator is a hub that the test holds.
"""

import asyncio
import queue
import threading
from types import SimpleNamespace

import msgspec
import pytest
import ray
import zmq
from parts import VOCAB, answers, hub_of, logits, plan, start

import dlf_ray.engine.engine
from dlf_ray import Engine, EngineError, Family, SamplingParams
from dlf_ray.engine.transport import ClientLink, Done
from dlf_ray.messages import (
    Abort,
    AskTimings,
    Chunk,
    Chunks,
    GiveUp,
    Limits,
    Lost,
    Process,
    RemoveModel,
    Request,
    Timings,
)
from dlf_ray.plans import Logits

M = {"model": "some/model"}
FAMILY = Family.from_dict({"large": M, "base": M, "experts": {"math": M, "facts": M}})
ENDLESS = SamplingParams(max_tokens=100)


@pytest.fixture
def hub():
    made = hub_of(20)
    yield made
    made.close()


@pytest.fixture
def engine(hub, monkeypatch):
    def begin(engine):
        engine.limits = Limits(dict.fromkeys(engine.family.models, 200), VOCAB)
        engine._descriptions = dict.fromkeys(engine.family.models)
        engine._link = ClientLink(hub.connection(), engine._receive, engine._link_died)

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(Engine, "_start", begin)
    with Engine(FAMILY) as made:
        yield made


def heard(hub, kind):
    """The next message of that kind, with its client; others are passed over."""
    for _ in range(100):
        for client, message in hub.requests(wait_s=0.2):
            if isinstance(message, kind):
                return client, message
    raise AssertionError(f"no {kind}")


def in_background(call):
    """Calls; the box gets what it gives or raises."""
    box = queue.SimpleQueue()

    def run():
        try:
            box.put(call())
        except Exception as error:
            box.put(error)

    threading.Thread(target=run, daemon=True).start()
    return box


def whole(hub, client, request, token=5):
    chunk = Chunk(id=request.id, text="x", token_ids=(token,), finish_reason="length")
    chunk = msgspec.structs.replace(chunk, weights=((0.0, 0.0),), kl=((0.0, 0.0),))
    hub.publish(client, Chunks((chunk,)))


def test_a_closed_event_loop_ends_its_own_request_only(hub, engine):
    loop = asyncio.new_event_loop()
    stream = engine.astream([5], ENDLESS)
    task = loop.create_task(anext(stream))
    loop.run_until_complete(asyncio.sleep(0))
    client, lost = heard(hub, Request)
    first = Chunk(id=lost.id, token_ids=(5,), weights=((0.0, 0.0),), kl=((0.0, 0.0),))
    hub.publish(client, Chunks((first,)))
    loop.run_until_complete(task)
    loop.close()
    box = in_background(lambda: engine.generate([6], ENDLESS))
    client, other = heard(hub, Request)
    hub.publish(client, Chunks((first,)))  # for nobody
    assert heard(hub, Abort) == (client, Abort(lost.id))
    whole(hub, client, other)
    assert box.get(timeout=20)[0].finish_reason == "length"
    engine.check_health()


def test_what_a_receiver_raises_reaches_no_other_of_the_same_message(hub, engine):
    def refuse(chunk):
        raise ZeroDivisionError

    (odd,) = engine._requests([[5]], ENDLESS, {})
    with engine._open([odd], refuse):
        client, _ = heard(hub, Request)
        box = in_background(lambda: engine.generate([6], ENDLESS))
        _, request = heard(hub, Request)
        chunks = [Chunk(id=i, finish_reason="error", error="!") for i in (odd.id, request.id)]
        hub.publish(client, Chunks(tuple(chunks)))
        assert box.get(timeout=20)[0].error == "!"


def test_the_death_of_the_link_is_told_to_everybody(hub, engine):
    waiting = [
        in_background(call)
        for call in (lambda: engine.generate([5], ENDLESS), engine.timings, engine.timings)
    ]
    client, _ = heard(hub, Request)
    change = in_background(lambda: engine._finished("math", "left"))
    hub._send(client.encode(), b"\xc1")  # can only be a bug
    for box in (*waiting, change):
        error = box.get(timeout=20)
        assert isinstance(error, EngineError)
        assert "the link to the coordinator died" in str(error)
    for call in (lambda: engine.generate([5]), engine.timings, engine.check_health):
        with pytest.raises(EngineError, match="the link to the coordinator died"):
            call()
    for _ in range(5000):  # nor does it hang who still speaks to it
        engine._link.send(Abort(1))


def test_the_end_of_an_engine_is_told_to_those_who_wait(hub, engine):
    boxes = [in_background(lambda: engine.generate([5], ENDLESS)), in_background(engine.timings)]
    heard(hub, Request)
    engine.close()
    for box in boxes:
        assert "the engine is closed" in str(box.get(timeout=20))


def test_the_death_of_ray_is_told_as_well(hub, engine, monkeypatch):
    def wait(*_, **__):
        raise ray.exceptions.RaySystemError("no Ray any more")

    box = in_background(lambda: engine.generate([5], ENDLESS))
    heard(hub, Request)
    monkeypatch.setattr(ray, "wait", wait)
    engine._watch()
    assert "lost its actors: System error: no Ray any more" in str(box.get(timeout=20))
    with pytest.raises(EngineError, match="no Ray any more"):
        engine.check_health()


def test_a_late_answer_is_not_taken_for_that_of_the_next_question(hub, engine, monkeypatch):
    monkeypatch.setattr(Engine, "_patience_s", 0.2)
    with pytest.raises(EngineError, match="has not answered"):
        engine.timings()
    monkeypatch.setattr(Engine, "_patience_s", 20.0)
    box = in_background(engine.timings)
    client, late = heard(hub, AskTimings)
    _, asked = heard(hub, AskTimings)
    hub.publish(client, Timings(1, {}, id=late.id))
    hub.publish(client, Timings(2, {}, id=asked.id))
    assert box.get(timeout=20).steps == 2


def test_a_silent_coordinator_is_ill_after_the_longest_step_and_not_before(
    hub, engine, monkeypatch
):
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(dlf_ray.engine.engine, "time", clock)
    longest = engine.family.engine.step_timeout_s
    engine.check_health()
    client, asked = heard(hub, AskTimings)
    now[0] += longest
    engine.check_health()
    now[0] += dlf_ray.engine.engine.MARGIN_S + 1
    with pytest.raises(EngineError, match="the coordinator hangs: it has not answered for 331 s"):
        engine.check_health()
    assert not [m for _, m in hub.requests(wait_s=0.2)]  # one question at a time
    hub.publish(client, Timings(1, {}, id=asked.id))
    for _ in range(100):
        if engine._ping[1].done():
            break
        threading.Event().wait(0.05)
    engine.check_health()  # it was slow, and is well


def test_what_is_done_of_an_earlier_change_is_not_taken_for_this_one(hub, engine):
    """An expert's loop had failed just as the coordinator said that it had joined."""
    engine._done.put(Done("math", "joined"))
    engine._done.put(Done("facts", "left"))
    box = in_background(lambda: engine.remove_expert("math"))
    client, message = heard(hub, RemoveModel)
    assert message.name == "math"
    with pytest.raises(queue.Empty):
        box.get(timeout=1)
    hub.publish(client, Done("math", "left"))
    assert box.get(timeout=20) is None
    assert list(engine.family.experts) == ["facts"]


def test_an_expert_that_dies_for_good_while_it_is_removed_is_given_up(hub, engine, monkeypatch):
    """Else the requests that it has to answer first would be held for ever."""
    loop = object()
    error = ray.exceptions.RayTaskError("serve", "no such folder", ValueError("no such folder"))

    def get(_):
        raise error

    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(ray, "get", get)
    engine._loops["math"] = loop
    box = in_background(lambda: engine.remove_expert("math"))
    client, _ = heard(hub, RemoveModel)
    _, gone = heard(hub, GiveUp)
    assert gone.name == "math"
    assert "no such folder" in gone.error
    hub.publish(client, Done("math", "left"))
    assert box.get(timeout=20) is None


def test_a_request_that_cannot_be_read_is_answered(hub, caplog):
    """A client of another version, say: it would wait for ever."""
    news = queue.SimpleQueue()
    sock = hub.connection().connect("client:odd")
    sock.send(msgspec.msgpack.encode({"type": "Request", "id": 7, "prompt": "no tokens"}))
    assert not list(hub.requests(wait_s=20))
    assert "client:odd cannot be read" in caplog.text
    link = ClientLink(hub.connection(), news.put, pytest.fail)
    (chunk,) = msgspec.msgpack.decode(sock.recv(), type=Chunks).chunks
    assert (chunk.id, chunk.finish_reason) == (7, "error")
    assert "cannot read the request" in chunk.error
    link.send(Abort(1))
    assert heard(hub, Abort)[1] == Abort(1)
    sock.close()
    link.close()


def test_an_interrupt_between_a_message_and_its_wake_keeps_the_link_from_nothing(hub):
    """Else the end of a program that was interrupted there would wait for ever."""

    class Interrupted:
        def send(self, _):
            raise KeyboardInterrupt

    link = ClientLink(hub.connection(), pytest.fail, pytest.fail)
    wake, link._wake_in = link._wake_in, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        link.send(Abort(1))
    link._wake_in = wake
    link.send(Abort(2))
    assert [heard(hub, Abort)[1].id for _ in range(2)] == [1, 2]
    closing = threading.Thread(target=link.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


def test_an_identity_that_is_no_text_ends_nobody(hub):
    sock = zmq.Context.instance().socket(zmq.DEALER)
    known = hub.connection()
    sock.setsockopt(zmq.IDENTITY, b"\xff\xfe")
    sock.curve_serverkey = known.server_public
    sock.curve_publickey, sock.curve_secretkey = known.client_public, known.client_secret
    sock.connect(known.address)
    sock.send(msgspec.msgpack.encode(Abort(3)))
    assert heard(hub, Abort)[1] == Abort(3)
    sock.close()


@pytest.mark.parametrize("junk", [[b"\xc1"], [b"dlfL"], [b"dlfLx", b""], [b""]])
def test_a_worker_that_speaks_nonsense_is_replaced_and_the_others_go_on(junk):
    killed = []
    hub = hub_of(20, killed.append)
    broken = Process("node", 7, 1.0)
    start(hub, "large", lambda link, p: link.reply(logits(p.step)))
    start(hub, "base", lambda link, p: link._socket.send_multipart(junk), process=broken)
    hub.wait_for_workers(20)
    plans = {"large": plan(1), "base": plan(1)}
    assert sorted(answers(hub, plans)) == [("base", Lost), ("large", Logits)]
    assert killed == [broken]
    hub.close()


def test_the_secret_of_a_connection_is_not_printed(hub):
    known = hub.connection("large")
    for shown in (repr(known), repr(Done("math", "added", known))):
        assert known.address in shown
        assert repr(known.client_secret) not in shown
