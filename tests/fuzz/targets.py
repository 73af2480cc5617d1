"""What reads bytes that it did not write itself: one row each in `TARGETS`.

A row is a name, a function that reads bytes, the errors that it may raise, and examples of good bytes. The
function does with the bytes what the library does: anything else that it raises, a hang, or memory without
bounds, is a bug. tests/fuzz/test_fuzz.py tries each row in the suite, `make fuzz` (tests/fuzz/run.py) for
longer, guided by coverage.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hvdloss
from hvdloss.comm.agreement import (
    check_consistency,
    check_items_consistent,
    raise_on_all_ranks,
    run_on_all_ranks,
)
from hvdloss.comm.guard import assert_synchronized
from hvdloss.comm.messages import parse_json
from hvdloss.comm.plan import ParameterInfo
from hvdloss.data import Csv, Epoch, NumpyFiles, Parquet, Shuffled
from hvdloss.data.stream import SharedIterable
from hvdloss.data.uneven import Uneven
from hvdloss.errors import AgreementError, HvdlossError
from hvdloss.explain.exchange import RankMessage, exchange_messages
from hvdloss.losses.ledger import LEDGER_WIDTH, Ledger, check_step, pack, unpack
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.losses.reduction import REDUCTIONS, broadcast_weights, reduce_losses
from hvdloss.metrics import MAE, Metrics
from hvdloss.metrics.collection import encode_states
from hvdloss.report import Recorder, StepReport, TermReport
from hvdloss.report import read as read_record
from hvdloss.report.page import run_of, table_of_runs
from hvdloss.split.messages import read_header
from hvdloss.step.objective import expand_mask_axes
from hvdloss.terms.controller import Controller
from hvdloss.terms.link import LinkModel
from hvdloss.terms.policies import AdaptiveCompression, BatchShares
from hvdloss.terms.policies.log import read, record, replay, use_logged_times
from hvdloss.terms.term import CommStats, Decision
from hvdloss.train import BestCheckpoint, EarlyStopping, TransformedBatches
from hvdloss.train.checkpoint import (
    Checkpoint,
    StateDict,
    parse_manifest,
    state_from_bytes,
    state_to_bytes,
)
from hvdloss.train.decisions import merged_value
from hvdloss.watch import Fault, RankState
from hvdloss.watch.tally import Exchange, Found, Summary, Tally
from hvdloss.watch.wire import NONCE, Channel


@dataclass(frozen=True)
class Target:
    """One reader: what it is given, and what it may raise."""

    name: str
    read: Callable[[bytes], Any]
    seeds: tuple[bytes, ...]
    raises: tuple[type[Exception], ...] = (HvdlossError,)


def run(target: Target, data: bytes) -> None:
    """Have a target read; what it may raise is fine."""
    try:
        target.read(data)
    except target.raises as error:
        if not str(error):
            raise AssertionError("an error without words") from error


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


class Peer:
    """Two ranks, of which the other one says what it likes."""

    rank, size = 0, 2

    def __init__(self, says: bytes, name: str = "") -> None:
        self.says, self.name = says, name  # in exchanges whose name ends so; in others it agrees

    def all_reduce(self, array: Any, name: str) -> Any:
        return np.array(array, dtype=np.float64)

    def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        return [data, self.says if name.endswith(self.name) else data]


@functools.cache
def folder() -> Path:
    """A folder for files that are read, in memory if there is such a place."""
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="hvdloss-fuzz-", dir=shm if os.access(shm, os.W_OK) else None))


def file_of(data: bytes, name: str) -> Path:
    path = folder() / f"{os.getpid()}-{name}"
    path.write_bytes(data)
    return path


# -- ledgers and shapes -------------------------------------------------------------------------------


def ledger_table(data: bytes) -> None:
    rows = np.frombuffer(data[: len(data) // 8 * 8])
    table = (
        rows[: len(rows) // LEDGER_WIDTH * LEDGER_WIDTH].reshape(-1, LEDGER_WIDTH)
        if len(rows) >= LEDGER_WIDTH
        else rows
    )
    ledgers = unpack(table)
    if ledgers and check_step(ledgers, 1) is None:
        for reduction in REDUCTIONS:
            json.dumps(StepReport.of(1, ledgers, reduction).as_dict())


def shapes(data: bytes) -> None:
    """Two shapes of small lengths; what is said to fit must broadcast, and what is not must not."""
    cut = data[0] % 5 if data else 0
    a = tuple(byte % 4 for byte in data[1 : 1 + cut])
    b = tuple(byte % 4 for byte in data[1 + cut : 6 + cut])
    places = expand_mask_axes(a, b)
    if places is not None:
        np.broadcast_to(np.expand_dims(np.zeros(a), places), b)
    broadcast_weights(NumpyOps(), np.ones(a), np.zeros(b), rank=1)
    reduce_losses(NumpyOps(), np.zeros(b), np.ones(a), REDUCTIONS[cut % len(REDUCTIONS)])


def metric_batch(data: bytes) -> None:
    numbers = np.frombuffer(data[: len(data) // 4 * 4], np.float32)
    third = len(numbers) // 3
    with np.errstate(all="ignore"):
        metrics = Metrics({"mae": MAE()})
        metrics.update(numbers[:third], numbers[third : 2 * third], numbers[2 * third :])
        metrics.compute()


# -- what other ranks say -----------------------------------------------------------------------------

PARAMETERS = [ParameterInfo("w", (3, 4), "float32", 4), ParameterInfo("b", (3,), "float32", 4)]
OTHER = {"settings": {"reduction": "sum"}, "count": 2, "names": ["w", "b"], "parameters": [], "checksums": []}


@contextlib.contextmanager
def differing() -> Iterator[None]:
    """Ranks tell each other more only where they differ: that they do is what was read."""
    try:
        yield
    except AgreementError as error:
        if "cannot be read" in str(error):
            raise


def items_of_ranks(data: bytes) -> None:
    with differing():
        check_items_consistent(
            Peer(data, ".items"), lambda: [("w", [1])], name="n", what="tensor", remedy="Mend it."
        )


def agreement(data: bytes) -> None:
    with differing():
        check_consistency(Peer(data), PARAMETERS, lambda: [1, 2], [1, 0], {"reduction": "mean"}, name="first")


def checksums(data: bytes) -> None:
    with differing():
        assert_synchronized(Peer(data), ["w"], [1], name="checksums", when="now")


def state_of_ranks(data: bytes) -> None:
    raise_on_all_ranks(Peer(data), None, "state")


def equal_results(data: bytes) -> None:
    run_on_all_ranks(Peer(data), lambda: 3, "result", "results")


def explanation(data: bytes) -> None:
    exchange_messages(Peer(data), "told", "explaining", lambda: RankMessage({"rows": 3}, x=np.arange(3.0)))


def statistics(data: bytes) -> None:
    metrics = Metrics({"mae": MAE()}, communicator=lambda: Peer(data))  # type: ignore[arg-type]
    metrics.update([1.0, 2.0], [2.0, 4.0])
    with np.errstate(all="ignore"):
        metrics.compute()


def said_statistics() -> bytes:
    """What a rank with the same metric says."""
    said: list[bytes] = []

    class Listening(Peer):
        def all_gather_bytes(self, data: bytes, name: str) -> list[bytes]:
            said.append(data)
            return [data, data]

    metrics = Metrics({"mae": MAE()}, communicator=lambda: Listening(b""))  # type: ignore[arg-type]
    metrics.update([1.0, 2.0], [2.0, 4.0])
    metrics.compute()
    return said[0]


class _Signals:
    """An optimizer's signals to a loop over uneven batches, of an optimizer that never steps."""

    sync_status = (0, True)

    def send_status(self, more: bool, error: BaseException | None = None) -> None:
        pass


def kind_of_batch(data: bytes) -> None:
    """A rank without batches learns from the other one what a batch is."""

    class Second(Peer):
        def all_gather_bytes(self, mine: bytes, name: str) -> list[bytes]:
            return [mine, self.says] if name == "hvdloss.uneven.batch" else [mine, mine]

    loop: Uneven[Any] = Uneven(
        [],
        _Signals(),
        lambda: Second(data),  # type: ignore[arg-type]
        array=lambda x: (str(x.dtype), x.shape) if isinstance(x, np.ndarray) else None,
        zero=lambda x: x[:0] if isinstance(x, np.ndarray) else None,
        make=lambda dtype, shape: np.zeros(shape, dtype),
    )
    next(iter(loop), None)


# -- files --------------------------------------------------------------------------------------------


def controlled() -> Controller:
    term = hvdloss.CommunicationCost(policies=(BatchShares(64), AdaptiveCompression()), calibrate=False)
    controller = Controller((term,))
    controller.reset(0, 2)
    return controller


@functools.cache
def good_log() -> bytes:
    """A log of two steps."""
    path = folder() / f"{os.getpid()}-good.log"
    controller = controlled()
    record(controller, path)
    table = pack(Ledger(numerator=1.0, denominator=2.0, computation=0.1), 0, 2)
    table += pack(Ledger(numerator=1.0, denominator=2.0, computation=0.3), 1, 2)
    for step in (1, 2):
        controller.on_step_end(step, table, CommStats(messages=2, bytes=100, full_bytes=100))
    data = path.read_bytes()
    path.unlink()
    return data


def control_log(data: bytes) -> None:
    path = file_of(data, "control.log")
    lines = list(read(path))
    if lines:
        json.dumps(lines)


def good_record() -> bytes:
    """A record with a line of every kind that is written for steps."""
    path = folder() / f"{os.getpid()}-good.jsonl"
    ledgers = [Ledger(2.0, 2.0, 2.0, 3.0, 1.0), Ledger(1.0, 1.0, 1.0, 1.0, 1.0, nonfinite_losses=1.0)]
    term = TermReport("nats", 0.1, [0.1, 0.2], 0.3, 0.03, {"counts": [[1.0, 2.0], [3.0, 4.0]]})
    with Recorder(path, settings={"lr": 0.1}, classes=["a", "b"]) as recorder:
        recorder.begin({"ranks": 2, "terms": {"skew": {"unit": "nats"}}, "environment": {"hosts": 1}})
        for step in (1, 2):
            choices = {"bucket": {"value": 1, "by": "rule"}, "comm_plan": {"messages": 1}}
            recorder.step(StepReport.of(step, ledgers, "mean", choices, {"skew": term}, nonfinite="skip"))
        recorder.decision(Decision(2, "period", 1, [2], "why"))
        recorder.epoch(metrics={"loss": 0.5, "recall": [0.5, 1.0], "confusion": [[1, 0], [1, 2]]})
        recorder.hardest({"a": 1.0, "b": 2.0})
        recorder.ranks(3)
    data = path.read_bytes()
    path.unlink()
    return data


def run_record(data: bytes) -> None:
    """What a page, a terminal and a script are told of a record; drawing is matplotlib's."""
    found = read_record(file_of(data, "run.jsonl"))
    with np.errstate(all="ignore"):
        _ = found.seconds
        json.dumps(run_of(found), default=lambda one: one.__dict__ if hasattr(one, "__dict__") else str(one))
        table_of_runs([found])


def log_decided_again(data: bytes) -> None:
    with np.errstate(all="ignore"):
        replay(controlled(), file_of(data, "control.log"))


def log_followed(data: bytes) -> None:
    controller = controlled()
    use_logged_times(controller, file_of(data, "control.log"))
    table = pack(Ledger(denominator=1.0), 0, 2) + pack(Ledger(denominator=1.0), 1, 2)
    with np.errstate(all="ignore"):
        controller.prepare(Peer(b""))
        controller.on_step_end(1, table, CommStats())


def source(data: bytes, make: Callable[[Path], Any], name: str) -> None:
    opened = make(file_of(data, name)).open()
    for number in range(min(len(opened.parts), 3)):
        if opened.rows[number] < 100_000:
            opened.read(number)
    opened.empty()
    opened.fingerprint()


def numpy_file(data: bytes) -> None:
    source(data, lambda path: NumpyFiles({"x": path}), "x.npy")


def numpy_bytes(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def parquet_bytes() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"x": [1.0, 2.0], "n": [1, None], "s": ["a", "b"]}), out)
    return out.getvalue()


def archive_bytes() -> bytes:
    out = io.BytesIO()
    np.savez(out, np.arange(4.0), np.eye(2))
    return out.getvalue()


def manifest() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Checkpoint(folder, {"stopping": StateDict(EarlyStopping(patience=2))}).save(3)
        return (Path(folder) / "00000001.json").read_bytes()


KEY, NONCES = bytes(32), bytes(2 * NONCE)


def watch_wire(data: bytes) -> None:
    """What a stranger says to the watch, or another rank."""
    Channel(KEY, NONCES, hub=True).feed(data)


def watch_of_hosts(data: bytes) -> None:
    """What one host's agent says to another's."""
    told = None
    with contextlib.suppress(ValueError):  # which a channel refuses
        told = parse_json(data)
    if isinstance(told, dict):
        for key, read in WATCH_OF_HOSTS.items():
            if key in told:
                read(told[key])


WATCH_OF_HOSTS: dict[str, Callable[[Any], Any]] = {
    "exchange": Exchange.from_message,
    "found": Found.from_message,
    "summary": Summary.from_message,
    "tally": lambda told: Tally.from_message(told, 1),
}


def watch_message(data: bytes) -> None:
    """The same from one who knows the job's key."""
    mac = hmac.digest(hmac.digest(KEY, NONCES, "sha256"), b"m" + struct.pack("!Q", 0) + data, "sha256")
    for message in Channel(KEY, NONCES, hub=True).feed(struct.pack("!I", len(data)) + mac + data):
        if "state" in message:
            RankState(1).update(message["state"])
        if "fault" in message:
            Fault.from_message(message["fault"]).error()


def checkpoint(data: bytes) -> None:
    """A list of arrays, as the TensorFlow adapter keeps it."""

    def parse(file: Any) -> list[Any]:
        with np.load(file, allow_pickle=False) as held:
            return [held[name] for name in held.files]

    BestCheckpoint(file_of(data, "best.npz")).parsed(parse)


def wheel_record(data: bytes) -> None:
    from hvdloss.cli.install.cache import Cache

    cache = Cache(folder() / f"{os.getpid()}-cache")
    cache.create()
    (cache.wheels / "key").mkdir(exist_ok=True)
    (cache.wheels / "key" / "build.json").write_bytes(data)
    found, why = cache.find("key")
    assert found is None
    assert why


def measured_links(data: bytes) -> None:
    from hvdloss.cli.simulate import _fits

    _fits([file_of(data, "link.json")])


# -- positions and states -----------------------------------------------------------------------------


def of_json(use: Callable[[Any], Any]) -> Callable[[bytes], None]:
    """A reader of values that were JSON: what is no JSON never gets to it."""

    def read_value(data: bytes) -> None:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return
        use(value)

    return read_value


SHARDS = Shuffled(12, seed=3)


def use_epoch(state: Any) -> None:
    epoch = Epoch.from_state_dict(SHARDS, state, 2)
    assert sum(map(len, epoch.remaining)) <= 12


def use_transformed(state: Any) -> None:
    TransformedBatches([], lambda batch, *_: batch).load_state_dict(state)


def use_monitor(state: Any) -> None:
    stopping = EarlyStopping(patience=2)
    stopping.load_state_dict(state)
    stopping.step(1.0)
    _ = stopping.stopped


def use_link(state: Any) -> None:
    with np.errstate(all="ignore"):
        LinkModel.from_state_dict(state).fit()


LINK = {"ranks": 2, "window": 8, "samples": [[0.1, 1e6, 1.0], [0.2, 2e6, 1.0], [0.01, 10.0, 1.0]]}

#: To add a reader, add a row.
TARGETS = (
    Target("ledger", ledger_table, (pack(Ledger(1.0, 2.0, 3.0, 4.0), 1, 2).tobytes(),)),
    Target("shapes", shapes, (b"\x02\x02\x03\x02\x03\x01",)),
    Target("metric-batch", metric_batch, (np.array([1, 2, 3, 4, 1, 1], np.float32).tobytes(),)),
    Target("agreement", agreement, (text(OTHER),)),
    Target("items-of-ranks", items_of_ranks, (b'[["w", [2]]]',)),
    Target("checksums", checksums, (b"[1, 123]",)),
    Target(
        "stage-header", lambda data: read_header(data, 1), (b'[["float32", [2, 3], 1], ["bool", [], 0]]',)
    ),
    Target("state-of-ranks", state_of_ranks, (b'["", "", null]', b'["DataError", "gone", null]')),
    Target("equal-results", equal_results, (b'["", "", 3]',)),
    Target("value", lambda data: merged_value(Peer(data), 1.0, 2.0), (b'["1.5", "2.0", null]',)),
    Target(
        "explanation", explanation, (b"+" + RankMessage({"rows": 2}, x=np.arange(2.0)).pack(), b'-["X","y"]')
    ),
    Target("statistics", statistics, (said_statistics(), encode_states({}, None, []))),
    Target(
        "kind-of-batch",
        kind_of_batch,
        (b'{"tuple": [{"array": ["float32", [4, 3]]}, {"value": 1}]}', b"null"),
    ),
    Target("control-log", control_log, (good_log(),)),
    Target("record", run_record, (good_record(),)),
    Target("log-decided-again", log_decided_again, (good_log(),)),
    Target("log-followed", log_followed, (good_log(),)),
    Target("csv", lambda data: source(data, Csv, "x.csv"), (b"a,b\n1,2.5\n3,x\n", b'"a",b\r\n1,\r\n')),
    Target(
        "npy", lambda data: source(data, lambda p: NumpyFiles({"x": p}), "x.npy"), (numpy_bytes(np.eye(3)),)
    ),
    Target("parquet", lambda data: source(data, Parquet, "x.parquet"), (parquet_bytes(),)),
    Target("checkpoint", checkpoint, (archive_bytes(),)),
    Target("wheel-record", wheel_record, (b'{"wheel": "x.whl", "sha256": "00", "facts": {}}',)),
    Target("measured-links", measured_links, (text(LINK), text({"results": [LINK]}))),
    Target("link-model", of_json(use_link), (text(LINK),)),
    Target("epoch", of_json(use_epoch), (text(Epoch(SHARDS, 3).state_dict()),)),
    Target("items", of_json(SharedIterable.from_state_dict), (text(SharedIterable([[2, 2]]).state_dict()),)),
    Target(
        "transformed", of_json(use_transformed), (b'{"version": 1, "epoch": 1, "step": 2, "loader": null}',)
    ),
    Target("watch-wire", watch_wire, (Channel(KEY, NONCES, hub=False).frame({"bye": 1}),)),
    Target(
        "watch-of-hosts",
        watch_of_hosts,
        (
            text(
                {
                    "exchange": Exchange("x", 3, (0, 2, 4)).as_message(),
                    "found": Found((1, 2), [RankState(1)]).as_message(),
                    "summary": Summary(waiting=1, exchanges={"x": (Exchange("x"), 1, 2.0)}).as_message(),
                    "tally": Tally.zero(1).as_message(),
                }
            ),
        ),
    ),
    Target(
        "watch-message",
        watch_message,
        (
            text({"state": RankState(1).as_message()}),
            text({"fault": Fault("lost", (1,), "gone").as_message()}),
        ),
    ),
    Target("manifest", lambda data: parse_manifest(data, 1), (manifest(),)),
    Target("state-in-bytes", state_from_bytes, (state_to_bytes({"a": [1, 2.5], "w": np.arange(3.0)}),)),
    Target("monitor", of_json(use_monitor), (text(EarlyStopping(patience=2).state_dict()),)),
)
