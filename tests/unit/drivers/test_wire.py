import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Fit, Hold, Progress, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, Seconds, SourceKind, Volume, VolumeId
from vmsnapshot_operator.drivers import registry, wire, worker
from vmsnapshot_operator.errors import AlreadyCutError, DriverError, DriverTimeoutError, DriverUnavailableError

text = st.text(max_size=30)
layers = st.builds(
    Layer,
    kind=st.sampled_from(SourceKind),
    source=text,
    format=text,
    protocol=text,
    pool=text,
    hosts=st.lists(text, max_size=3).map(tuple),
    fingerprint=text,
)
volumes = st.builds(
    Volume,
    id=text.map(VolumeId),
    label=text,
    writable=layers,
    backing=st.lists(layers, max_size=2).map(tuple),
    size_bytes=st.integers(0, 2**63),
)
requests = st.builds(
    SnapshotRequest,
    name=text,
    volumes=st.lists(volumes, max_size=3).map(tuple),
    timeout=st.floats(0, 1e6).map(Seconds),
)
cuts = st.builds(
    CutResult,
    handles=st.dictionaries(text.map(VolumeId), text.map(Handle), max_size=3),
    atomic=st.booleans(),
    hold=st.sampled_from(Hold),
    group=st.none() | text.map(Handle),
)


@given(requests, cuts)
def test_what_is_sent_is_what_arrives(request, cut):
    message = wire.parse(wire.call("wait_ready", (request, cut), 1.5, 7.0, 6.0)[4:])

    assert message["seconds"] == 1.5
    assert wire.OPERATIONS["wait_ready"].arguments.validate_python(message["arguments"]) == (request, cut)


@given(cuts)
def test_an_answer_arrives_as_it_was_given(cut):
    assert wire.result("cut", wire.parse(wire.answer("cut", cut)[4:])) == cut


@pytest.mark.parametrize(
    ("operation", "given_"),
    [
        ("capabilities", Capabilities(cut=CutKind.COPY, atomic=False, revert=True)),
        ("can_handle", Fit(ok=False, reason="No", message="because")),
        ("check_revert", (Fit(ok=True, reason="Fits"),)),
        ("clone", {VolumeId("v"): Layer(kind=SourceKind.FILE, source="/x", format="raw")}),
        ("list", ("a", "b")),
        ("delete", None),
    ],
)
def test_each_operation_has_its_type(operation, given_):
    assert wire.result(operation, wire.parse(wire.answer(operation, given_)[4:])) == given_


def test_progress_is_told_from_an_answer():
    found = Progress(done_bytes=1, total_bytes=2)
    assert wire.reported(wire.parse(wire.progress(found)[4:])) == found
    assert wire.reported(wire.parse(wire.answer("delete", None)[4:])) is None
    with pytest.raises(DriverError, match=r"of its progress something else.*total_bytes"):
        wire.reported({"progress": {"done_bytes": 1}})


def test_a_driver_that_answers_something_else_is_told_where():
    with pytest.raises(DriverError, match=r"answered cut with something else.*handles.*dictionary"):
        wire.answer("cut", {"handles": 1, "atomic": True})
    with pytest.raises(DriverError, match="handles: Field required"):
        wire.result("cut", {"result": {"atomic": True}})


@pytest.mark.parametrize("error", [DriverError("a"), DriverUnavailableError("b"), AlreadyCutError("c", retryable=True)])
def test_errors_of_a_driver_arrive_with_kind_reason_and_retryability(error):
    with pytest.raises(type(error)) as caught:
        wire.result("cut", wire.parse(wire.failure(error)[4:]))

    assert type(caught.value) is type(error)
    assert (caught.value.message, caught.value.reason, caught.value.retryable) == (
        error.message,
        error.reason,
        error.retryable,
    )


def test_only_the_host_can_say_that_a_driver_timed_out():
    with pytest.raises(DriverError) as caught:
        wire.raise_failure(wire.parse(wire.failure(DriverTimeoutError("mine"))[4:]))

    assert type(caught.value) is DriverError


@pytest.mark.parametrize("body", [b"\x80\x04pickle", b"[1, 2]", b"", b"nonsense"])
def test_only_json_objects_are_read(body):
    with pytest.raises(DriverError, match="JSON"):
        wire.parse(body)


def test_a_frame_that_would_fill_the_memory_is_refused_on_both_sides():
    with pytest.raises(DriverError, match="longer than"):
        wire.frame({"x": "y" * wire.MAX_FRAME})
    with pytest.raises(DriverError, match="announces"):
        wire.body_length(wire.LENGTH.pack(wire.MAX_FRAME + 1))


def ask(sock, data):
    sock.sendall(data)
    return wire.receive(sock)


def hello(tmp_path, spec="tests.unit.drivers.toys:Toy", **parameters):
    held = {"held": str(tmp_path)} | parameters
    return wire.frame({"driver": spec, "parameters": held, "credentials": {"password": "s3cret"}, "path": []})


def test_a_worker_serves_until_its_socket_is_closed(tmp_path):
    ours, theirs = socket.socketpair()
    later = wire.boottime() + 3600
    status = []
    thread = threading.Thread(target=lambda: status.append(worker.serve(theirs)))
    thread.start()
    with ours, theirs:
        assert ask(ours, hello(tmp_path)) == {"ready": True}
        fit = ask(ours, wire.call("can_handle", ((),), 60, later, later))
        bug = ask(
            ours, wire.call("cut", (SnapshotRequest(name="bug", volumes=(), timeout=Seconds(9)),), 60, later, later)
        )
        names = ask(ours, wire.call("list", ("",), 60, later, later))
        ours.shutdown(socket.SHUT_WR)
        thread.join(60)

    assert fit["result"]["ok"] is False
    assert (
        bug["error"]["message"] == "ZeroDivisionError: division by s3cret"
    )  # hidden by the host, which knows what to hide
    assert names == {"result": []}
    assert status == [0]


@pytest.mark.parametrize("which", ["until", "begin"])
def test_a_request_that_was_read_after_its_time_is_not_begun(tmp_path, which):
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=worker.serve, args=(theirs,))
    thread.start()
    with ours, theirs:
        ask(ours, hello(tmp_path))
        request = SnapshotRequest(name="vms-late", volumes=(), timeout=Seconds(60))
        over, later = wire.boottime() - 0.001, wire.boottime() + 60
        times = (over, later) if which == "until" else (later, over)
        late = ask(ours, wire.call("cut", (request,), 60, *times))
        held = list(tmp_path.iterdir())
        ours.shutdown(socket.SHUT_WR)
        thread.join(60)

    assert "nothing was done" in late["error"]["message"]
    assert held == []


def test_a_worker_says_why_it_cannot_start(tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(hello(tmp_path, limit="many"))
        assert worker.serve(theirs) == 1
        told = wire.receive(ours)

    assert told["error"]["kind"] == "DriverUnavailableError"
    assert told["error"]["reason"] == registry.INVALID_PARAMETERS


def test_a_worker_whose_operator_is_gone_before_the_first_word_ends():
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        assert worker.serve(theirs) == 1
