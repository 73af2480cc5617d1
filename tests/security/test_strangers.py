"""Strangers: processes that can reach a job's ports, and are not of it. They must not change a thing.

Real jobs, started by horovodrun. What a stranger tries is done to every port on which any process of the
job listens, as soon as it listens, again and again until the job is over. Training must end with the right
parameters, or with an error, but never with others, and never hang.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from hvdloss.cli.install import recipe

HERE = Path(__file__).resolve().parent
TOKEN = "HOROVOD_GLOO_RENDEZVOUS_TOKEN"
CANARY = "canary-9f31c0"


def patched() -> bool:
    """Return whether the installed Horovod was built with this hvdloss's patches."""
    if importlib.util.find_spec("horovod") is None or importlib.util.find_spec("torch") is None:
        return False
    try:
        from horovod import hvdloss_build
    except ImportError:
        return False
    return bool(hvdloss_build.RECIPE == recipe.RECIPE)


pytestmark = pytest.mark.skipif(
    not patched(), reason="what keeps strangers out of Horovod is NOT TESTED: it was built without patches"
)


# -- what a stranger does -----------------------------------------------------------------------------


@contextmanager
def connected(address: tuple[str, int], seconds: float = 2.0) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=seconds) as one:
        yield one


def says(data: bytes) -> Callable[[tuple[str, int]], None]:
    """Say something, and listen for a moment to what comes back."""

    def act(address: tuple[str, int]) -> None:
        with connected(address) as one:
            one.sendall(data)
            one.settimeout(0.2)
            one.recv(4096)

    return act


def floods(address: tuple[str, int]) -> None:
    """64 MB, as a message of the driver's services would be, or a request's body."""
    block = b"\xa5" * (1 << 20)
    with connected(address) as one:
        one.sendall(b"PUT /global/0 HTTP/1.0\r\nContent-Length: 67108864\r\n\r\n")
        for _ in range(64):
            one.sendall(block)


def request(method: str, path: str, body: bytes = b"", token: str | None = None) -> bytes:
    said = f"Authorization: Bearer {token}\r\n" if token else ""
    return f"{method} {path} HTTP/1.0\r\n{said}Content-Length: {len(body)}\r\n\r\n".encode() + body


GARBAGE = {
    "garbage": says(bytes(range(256)) * 8),
    "zeros": says(b"\0" * 200),
    "read": says(request("GET", "/global/0")),
    "overwrite": says(request("PUT", "/global/0", b"\0" * 200)),
    "overwrite-local": says(request("PUT", "/local_localhost/1", b"\xff" * 200)),
    "finish": says(request("DELETE", "/global/0")),
    "files": says(b"HEAD /etc/passwd HTTP/1.0\r\n\r\n"),
    "stale-token": says(request("PUT", "/global/1", b"\0" * 200, "0" * 64)),
    "wrong-gloo-token": says(b"0" * 64 + struct.pack("<QQQQ", 56, 0, 0, 24) + b"\0" * 64),
    "huge-message": says(b"\0" * 32 + struct.pack("i", 2**31 - 1)),
    "negative-message": says(b"\0" * 32 + struct.pack("i", -1)),
    "flood": floods,
}


class Strangers:
    """Threads that find a job's ports, and do what they can to them."""

    def __init__(self, root: int, policies: dict[str, Callable[[tuple[str, int]], None]]) -> None:
        self.root, self.policies = root, policies
        self.over = threading.Event()
        self.commands: set[str] = set()
        self.tokens: set[str] = set()
        self.ports: dict[str, set[tuple[str, int]]] = defaultdict(set)  # by "launcher" and "rank"
        self.reached: dict[str, int] = defaultdict(int)
        self.held: list[socket.socket] = []
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        number = 0
        while not self.over.is_set():
            for kind, address in list(self._listening()):
                self.ports[kind].add(address)
                names = list(self.policies)
                for name in (names[number % len(names)], names[(number + 5) % len(names)]):
                    with contextlib.suppress(OSError):  # refused, reset, or silent
                        self.policies[name]((self._local(address[0]), address[1]))
                    self.reached[kind] += 1
                number += 1
            time.sleep(0.01)

    @staticmethod
    def _local(host: str) -> str:
        return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host

    def _listening(self) -> Iterator[tuple[str, tuple[str, int]]]:
        try:
            processes = [psutil.Process(self.root), *psutil.Process(self.root).children(recursive=True)]
        except psutil.Error:
            return
        for one in processes:
            try:
                self.commands.add("\0".join(one.cmdline()))
                environment = one.environ()
                token = environment.get(TOKEN)
                if token:
                    self.tokens.add(token)
                kind = "rank" if "HOROVOD_RANK" in environment else "launcher"
                for connection in one.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        yield kind, (connection.laddr.ip, connection.laddr.port)
            except (psutil.Error, OSError):
                continue

    def stop(self) -> None:
        self.over.set()
        self.thread.join(30)
        for one in self.held:
            one.close()

    def hold(self, address: tuple[str, int]) -> None:
        """Connect, and say nothing."""
        if len(self.held) < 40:
            self.held.append(socket.create_connection(address, timeout=2.0))


def launch(folder: Path, *options: str, late: float = 2.0, **variables: str) -> subprocess.Popen[bytes]:
    beside = Path(sys.executable).parent / "horovodrun"
    command = [str(beside), *options, sys.executable, str(HERE / "stranger_job.py"), str(folder), str(late)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MY_API_KEY": CANARY, **variables}
    for name in ("HOROVOD_RANK", "HOROVOD_SIZE"):
        environment.pop(name, None)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=(folder / "output.txt").open("wb"),
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=HERE,
        start_new_session=True,
    )


def disturbed(folder, policies, *options, seconds=150.0, **variables):
    """Run a job among strangers; return its status, its output, and the strangers."""
    job = launch(folder, *options, **variables)
    strangers = Strangers(job.pid, policies)
    if policies == {"hold": None}:
        strangers.policies = {"hold": strangers.hold}
    try:
        status = job.wait(seconds)
    except subprocess.TimeoutExpired:
        for one in psutil.Process(job.pid).children(recursive=True):
            one.kill()
        job.kill()
        pytest.fail(f"the job hung: {(folder / 'output.txt').read_text(errors='replace')[-3000:]}")
    finally:
        strangers.stop()
    return status, (folder / "output.txt").read_text(errors="replace"), strangers


@pytest.fixture(scope="module")
def right():
    from tests.security import stranger_job

    return stranger_job.train(0, 1, False)


def check_right(folder, right):
    for rank in range(2):
        assert json.loads((folder / f"rank-{rank}.json").read_text()) == pytest.approx(right, rel=1e-12)


def check_secrets(strangers, output):
    assert strangers.commands
    for text in (*strangers.commands, output):
        assert CANARY not in text
        for token in strangers.tokens:
            assert token not in text


def test_strangers_at_every_port_change_nothing(tmp_path, right):
    """Garbage, requests without the token or with another job's, 64 MB: at all ports, all the time."""
    status, output, strangers = disturbed(tmp_path, GARBAGE, "--gloo", "--verbose", "-np", "2")
    assert status == 0, output[-3000:]
    check_right(tmp_path, right)
    # They were really there: at the rendezvous server, and at ranks while these waited for each other.
    assert strangers.reached["launcher"] > 10
    assert strangers.reached["rank"] > 0, output[-3000:]
    # Only where ranks find each other, here on this machine alone.
    assert {ip for ports in strangers.ports.values() for ip, _ in ports} == {"127.0.0.1"}
    assert len(strangers.tokens) == 1
    assert re.fullmatch("[0-9a-f]{64}", next(iter(strangers.tokens)))
    check_secrets(strangers, output)


@pytest.mark.more
def test_strangers_that_say_nothing_end_in_the_right_result_or_an_error(tmp_path, right):
    """Half-open connections to all ports, 40 at most. A rank's port may be taken up by one: then Gloo's
    timeout ends the job."""
    status, output, strangers = disturbed(
        tmp_path, {"hold": None}, "--gloo", "-np", "2", HOROVOD_GLOO_TIMEOUT_SECONDS="10"
    )
    assert strangers.held
    if status == 0:
        check_right(tmp_path, right)
    else:
        assert "imeout" in output or "timed out" in output, output[-3000:]
        assert not list(tmp_path.glob("rank-*.json"))


@pytest.mark.more
def test_strangers_at_a_job_over_mpi_change_nothing(tmp_path, right):
    if importlib.util.find_spec("horovod") is None or not _has_mpi():
        pytest.skip("no mpirun here, so strangers at MPI's ports are NOT TESTED")
    status, output, strangers = disturbed(tmp_path, GARBAGE, "--mpi", "-np", "2", late=0.0)
    check_secrets(strangers, output)
    if status == 0:
        check_right(tmp_path, right)
    else:  # what strangers can do to Open MPI's ports is end the job
        assert not list(tmp_path.glob("rank-*.json")) or output


def _has_mpi() -> bool:
    import shutil

    return shutil.which("mpirun") is not None


@pytest.mark.more
def test_strangers_at_an_elastic_job_run_nothing_in_it(tmp_path, right):
    """As released, whoever could reach the launcher's port had it unpickle what he sent, and so ran code."""
    proof = tmp_path / "unpickled"
    payload = b"cposix\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR."
    import base64
    import pickle

    pickle.loads(payload.replace(str(proof).encode(), str(proof).encode() + b"-here"))  # it is one that works
    assert Path(f"{proof}-here").exists()
    policies = {
        "unpickle": says(request("PUT", "/worker_addresses/localhost:0", base64.b64encode(payload))),
        "take-part": says(request("GET", "/rank_and_size/localhost:0")),
        **GARBAGE,
    }
    script = tmp_path / "hosts.sh"
    script.write_text("#!/bin/sh\necho localhost:2\n")
    script.chmod(0o700)
    status, output, strangers = disturbed(
        tmp_path,
        policies,
        *("--gloo", "-np", "2", "--min-np", "2", "--max-np", "2", "--network-interfaces", "lo"),
        *("--host-discovery-script", str(script)),
    )
    assert not proof.exists()
    assert status == 0, output[-3000:]
    check_right(tmp_path, right)
    check_secrets(strangers, output)
    assert {ip for ports in strangers.ports.values() for ip, _ in ports} == {"127.0.0.1"}


# -- the servers by themselves ------------------------------------------------------------------------


@pytest.fixture
def rendezvous():
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer(token="ab" * 32, address="127.0.0.1")
    port = server.start()
    server.init([])
    yield port
    server.stop()


def ask(port, method, path, body=None, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_the_rendezvous_server_obeys_only_who_says_the_token(rendezvous):
    token = "ab" * 32
    assert ask(rendezvous, "PUT", "/s/k", b"ours", token)[0] == 200
    for other in (None, "cd" * 32, "ab" * 31, "ab" * 33, "\xe9"):
        assert ask(rendezvous, "GET", "/s/k", token=other)[0] == 403
        assert ask(rendezvous, "PUT", "/s/k", b"theirs", other)[0] == 403
        assert ask(rendezvous, "DELETE", "/s/k", token=other)[0] == 403
    assert ask(rendezvous, "HEAD", "/stranger_job.py", token=token)[0] == 501  # it serves no files
    assert ask(rendezvous, "GET", "/s/k", token=token) == (200, b"ours")


def test_silent_connections_do_not_hold_up_the_rendezvous_server(rendezvous, monkeypatch):
    from horovod.runner.http import http_server

    # That it answers at all is then not because it has given up on the silent ones.
    monkeypatch.setattr(http_server.KVStoreHandler, "timeout", 86400.0)
    held = [socket.create_connection(("127.0.0.1", rendezvous)) for _ in range(50)]
    assert ask(rendezvous, "PUT", "/s/k", b"x", "ab" * 32)[0] == 200
    for one in held:
        one.close()


def test_services_read_no_more_than_they_must():
    """The driver, task and notification services check a digest; before it, they read a stranger's bytes."""
    from horovod.runner.common.util import network

    class Service(network.BasicService):
        pass

    service = Service("test", b"k" * 32, ["lo"])
    try:
        assert service._server.socket.getsockname()[0] == "127.0.0.1"
        address = ("127.0.0.1", service.get_port())
        memory = psutil.Process().memory_info().rss
        for length in (-1, 2**31 - 1, 2**30):
            with connected(address) as one:
                one.sendall(b"\0" * 32 + struct.pack("i", length))
                one.settimeout(5)
                assert one.recv(10) == b""  # it hung up, and did not wait for what was announced
        assert psutil.Process().memory_info().rss - memory < 64 * 2**20
        # A message that is not signed is not unpickled; one that is gets its answer.
        with connected(address) as one:
            one.sendall(b"\0" * 32 + struct.pack("i", 4) + b"x.x.")
            one.settimeout(5)
            assert one.recv(10) == b""
        client = network.BasicClient("test", service.addresses(), b"k" * 32, 0)
        assert client.addresses()
        with pytest.raises(network.NoValidAddressesFound):
            network.BasicClient("test", service.addresses(), b"x" * 32, 0, attempts=1)
    finally:
        service.shutdown()
