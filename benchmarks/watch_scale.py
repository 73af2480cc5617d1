"""What the watch costs a host and a rank, for up to 10,000 ranks: real agents, simulated hosts around them.

    python -m hvdloss.benchmarks.watch_scale                 # 64, 1,024, 4,096 and 10,000 ranks, 8 to a host

The agents of rank 0's host, of a host in the middle of the tree and of a leaf are real processes, each with
8 real ranks (processes with a member and no framework). All the other hosts that talk to those agents are
played by this process, over real connections: it says for them what their agents would. Two situations are
measured, each for some seconds: all ranks run, and all but one wait in one exchange. Then a rank of the leaf
is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdloss.benchmarks.common import write_json
from hvdloss.watch.agent import FAN_OUT, Plan
from hvdloss.watch.link import Link, dial
from hvdloss.watch.service import HostAgent
from hvdloss.watch.tally import Exchange, Found, Summary, Tally
from hvdloss.watch.verdict import Limits

KEY = bytes(range(32))
PER_HOST = 8
RANK = """
import sys, threading, time
from hvdloss.watch.activity import Activity, blocking
from hvdloss.watch.member import Member

activity = Activity()
member = Member(int(sys.argv[1]), sys.argv[2], bytes(range(32)), activity, lambda: None)
go = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), go.set()), daemon=True).start()

@blocking
def block():
    while member.fault is None:
        time.sleep(1.0)
    print(time.monotonic(), flush=True)

print("up", flush=True)
go.wait()
with activity.waiting("x"):
    block()
"""


class Hosts:
    """The hosts below one agent, as it sees them.

    Args:
        plan: of that agent.
        address: where it listens.
        hosts: which of them are played.
    """

    def __init__(self, plan: Plan, address: Any, hosts: Sequence[int], silence: float) -> None:
        self.plan, self.waiting, self.messages = plan, False, 0
        self.fault_at = 0.0
        self.links = {}
        self._ranks = {host: plan.under(host) for host in hosts}
        for host in hosts:
            link = Link(dial([tuple(address)], 30.0, silence), plan.key, listener=False)
            link.send({"host": host})
            self.links[host] = link

    def ranks(self, host: int) -> list[int]:
        """Return the ranks a played host speaks for; of the last one of all, the very last does not wait."""
        return self._ranks[host]

    def say(self) -> None:
        """Say, for each host, that its ranks wait."""
        self.waiting = True
        for host, link in self.links.items():
            ranks = [rank for rank in self.ranks(host) if rank != self.plan.size - 1]
            summary = Summary(waiting=len(ranks))
            summary.put(Exchange("x", count=1), len(ranks), 0.5)
            link.send({"summary": summary.as_message()})
            self.messages += 1

    def read(self, link: Link, host: int) -> None:
        """Answer what the agent asks."""
        for message in link.read() or []:
            self.messages += 1
            if "fault" in message:
                self.fault_at = self.fault_at or time.monotonic()
            if "ask" not in message:
                continue
            exchanges = [Exchange.from_message(one) for one in message["exchanges"]]
            ranks = self.ranks(host)
            slow = [rank for rank in ranks if rank == self.plan.size - 1]
            if message["kind"] == "count":
                tally = Tally.zero(len(exchanges))
                for i in range(len(exchanges)):
                    tally.inside[i], tally.free[i] = len(ranks) - len(slow), len(slow)
                answer: Any = tally
            else:
                answer = Found(tuple(slow) if message["kind"] == "away" else ())
            link.send({"reply": message["ask"], "with": answer.as_message()})
            self.messages += 1


def measure(size: int, seconds: float) -> dict[str, Any]:
    """Return what it costs with so many ranks."""
    count = max(1, size // PER_HOST)
    hosts = [tuple(range(PER_HOST * host, PER_HOST * (host + 1))) for host in range(count)]
    limits = Limits(warn=60.0, silence=30.0)
    real = [host for host in (0, 1, FAN_OUT + 1) if host < count]  # the first, one below it, one below that
    names = {host: f"hvdloss-bench-{secrets.token_hex(8)}" for host in real}
    agents = {
        host: HostAgent(KEY, hosts, host, limits, names[host], ("127.0.0.1",) if count > 1 else ())
        for host in real
    }
    table: list[Any] = [[] for _ in hosts]
    for host, agent in agents.items():
        table[host] = agent.begin()
    for agent in agents.values():
        agent.connect(table)
    ranks: dict[int, subprocess.Popen[str]] = {}
    for host in real:
        for rank in hosts[host]:
            ranks[rank] = subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), names[host]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
    for one in ranks.values():
        assert one.stdout is not None
        one.stdout.readline()
    played = []
    for host in real:
        plan = Plan(KEY, tuple(hosts), host, limits, (), "")
        below = range(FAN_OUT * host + 1, min(FAN_OUT * host + FAN_OUT + 1, count))
        mine = [one for one in below if one not in real]
        if mine:
            played.append(Hosts(plan, table[host][0], mine, limits.silence))
    selector = selectors.DefaultSelector()
    for group in played:
        for host, link in group.links.items():
            selector.register(link, selectors.EVENT_READ, (group, host))

    def serve(until: float, done: Any = lambda: False) -> None:
        while (now := time.monotonic()) < until and not done():
            for key, _ in selector.select(min(0.2, max(0.0, until - now))):
                group, host = key.data
                group.read(key.fileobj, host)

    def used(pids: dict[str, list[int]]) -> dict[str, float]:
        return {what: max(_processor(pid) for pid in ones) for what, ones in pids.items()}

    pids = {f"agent of host {host}": [agent.pid] for host, agent in agents.items()}
    pids["a rank"] = [ranks[rank].pid for rank in hosts[0][1:]]
    result: dict[str, Any] = {"ranks": size, "hosts": count}
    for situation in ("running", "all but one waiting"):
        if situation != "running":
            for rank, one in ranks.items():
                if rank != size - 1 or size == PER_HOST:
                    assert one.stdin is not None
                    one.stdin.write("go\n")
                    one.stdin.flush()
            for group in played:
                group.say()
        serve(time.monotonic() + 3.0)
        before, began = used(pids), time.monotonic()
        messages, data = _traffic(played)
        serve(began + seconds)
        took = time.monotonic() - began
        result[situation] = {what: (now - before[what]) / took for what, now in used(pids).items()}
        links = sum(len(group.links) for group in played) or 1
        result[situation]["messages a second and host"] = (_traffic(played)[0] - messages) / took / links
        result[situation]["bytes a second and host"] = (_traffic(played)[1] - data) / took / links
    victim = ranks[hosts[real[-1]][1]]
    began = time.monotonic()
    victim.kill()
    serve(began + 60.0, lambda: all(group.fault_at for group in played))
    known = [group.fault_at for group in played]
    if not played:  # ranks here look once a second whether something is wrong
        others = [ranks[rank] for rank in hosts[0] if ranks[rank] is not victim]
        known = [float(one.stdout.readline()) for one in others if one.stdout is not None]
    result["seconds until a killed one is known"] = max(known) - began
    for one in ranks.values():
        one.kill()
        one.wait()
    for agent in agents.values():
        agent.end()
    return result


def _traffic(played: Sequence[Hosts]) -> tuple[int, int]:
    """Return the messages and bytes of all connections until now."""
    links = [link for group in played for link in group.links.values()]
    return sum(group.messages for group in played), sum(link.bytes for link in links)


def _processor(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Measure what the watch costs, for many ranks.")
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[64, 1024, 4096, 10_000], help="(%(default)s)")
    add("--seconds", type=float, default=20.0, help="of each situation (%(default)s)")
    add("--json", type=Path, help="where the numbers go")
    args = parser.parse_args()
    rows = [measure(size, args.seconds) for size in args.ranks]
    for row in rows:
        print(json.dumps(row, indent=1))
    if args.json:
        write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
