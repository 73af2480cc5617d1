"""What `hvdloss install` mends in Horovod for when ranks are ended: on the Horovod that is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

ENDED = """\
import io, threading
from concurrent.futures import ThreadPoolExecutor
from horovod.runner.common.util import safe_shell_exec

def one(_):
    event = threading.Event()
    timer = threading.Timer(5.0, event.set)  # when the shells run, on a busy machine too
    timer.start()
    return safe_shell_exec.execute(
        "exec /bin/sh",
        stdout=io.StringIO(), stderr=io.StringIO(), events=[event], stdin="sleep 60 < /dev/null\\n",
    )

if __name__ == "__main__":
    with ThreadPoolExecutor(8) as pool:
        print(*pool.map(one, range(24)))
"""


GIVEN_UP = """\
import sys, threading, time
from horovod.runner.elastic.discovery import FixedHosts
from horovod.runner.elastic.driver import ElasticDriver
from horovod.runner.elastic.rendezvous import create_rendezvous_handler
from horovod.runner.http.http_server import RendezvousServer

hosts = {name: int(slots) for name, slots in (text.split(":") for text in sys.argv[1:])}
server = RendezvousServer()
driver = ElasticDriver(server, FixedHosts(hosts), min_num_proc=1, max_num_proc=2, timeout=2)
server.start(create_rendezvous_handler(driver))
told = []

def worker(slot, events):  # stands still until it is told to end
    for event in events:
        threading.Thread(target=lambda e=event: (e.wait(), ended.set()), daemon=True).start()
    ended = threading.Event()
    ended.wait()
    told.append(slot.hostname)
    return 1, time.time()

driver.start(2, worker)
first = driver.get_slot_info(next(iter(hosts)), 0)
driver.record_ready(first.hostname, 0)  # returns when it is known who goes on
print("size", driver.world_size(), "finished", driver.finished())
if not driver.finished():
    for _ in range(100):
        if told:
            break
        time.sleep(0.1)
    print("ended", *told)
    driver.stop()
print("results", driver.get_results().worker_results)
"""


def needs(build, patch: str) -> None:
    if not any(patch in name for name in getattr(build, "PATCHES", ())):
        pytest.skip(f"Horovod was built without {patch}.patch; run `hvdloss install`")


@pytest.mark.parametrize("hosts", [["localhost:1", "127.0.0.1:1"], ["localhost:2"]], ids=["two hosts", "one"])
def test_who_does_not_begin_again_is_given_up(hosts, tmp_path):
    """As released, those who begin again waited for it for ever."""
    build = pytest.importorskip("horovod.hvdloss_build", reason="Horovod is not of `hvdloss install`")
    needs(build, "elastic-gives-up-missing-ranks")
    script = tmp_path / "given_up.py"
    script.write_text(GIVEN_UP)
    done = subprocess.run([sys.executable, script, *hosts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "has neither ended nor begun again in 2 seconds (--elastic-timeout)" in done.stderr
    if len(hosts) == 2:
        assert "size 1 finished False" in done.stdout
        assert "ended 127.0.0.1" in done.stdout
    else:  # nobody is left, and horovodrun must not end as if the job were done
        assert "size 2 finished True" in done.stdout
        assert "results {'localhost[1]': (1, " in done.stdout


def test_who_is_told_to_end_has_not_ended_well(tmp_path):
    """As released, one in eight shells of ranks that were ended this way had the exit status 0."""
    build = pytest.importorskip("horovod.hvdloss_build", reason="Horovod is not of `hvdloss install`")
    needs(build, "horovodrun-ended-is-no-success")
    script = tmp_path / "ended.py"
    script.write_text(ENDED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    statuses = [int(word) for word in done.stdout.split()]
    assert len(statuses) == 24
    assert 0 not in statuses, statuses
