"""SIGTERM is noticed, told to all ranks, and ends all of them or those that were told to leave."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from hvdloss import ConfigError, UsageError
from hvdloss.train.preemption import Preemption


class PreemptionChannel:
    preemption_requested = staticmethod(lambda: False)
    preempted_ranks = ()


def test_a_signal_is_told_in_the_next_step_and_twice_is_once(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    channel, ended = PreemptionChannel(), []
    with Preemption(channel, shutdown=lambda: ended.append(True)) as leaving:
        assert not leaving()
        assert not channel.preemption_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert channel.preemption_requested()
        assert not leaving()  # no other rank knows yet
        channel.preempted_ranks = (0, 2)
        assert leaving()
        assert leaving.ranks == (0, 2)
        with pytest.raises(SystemExit) as left:
            leaving.leave()
        assert left.value.code == 143
    assert ended == [True]
    assert signal.getsignal(signal.SIGTERM) is before
    assert not channel.preemption_requested()


def test_in_an_elastic_job_only_those_leave_that_were_told_to(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    channel = PreemptionChannel()
    channel.preempted_ranks = (1,)
    with Preemption(channel, status=0) as leaving:
        assert leaving()
        leaving.leave()  # this rank was not
        with pytest.raises(SystemExit):
            leaving.leave(everyone=True)


def test_without_steps_ranks_ask_each_other():
    with Preemption(None, signals=(signal.SIGUSR1,)) as leaving:
        assert not leaving()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert leaving()


def test_what_cannot_be_used():
    for status in (-1, 256, True, "1"):
        with pytest.raises(ConfigError, match="status="):
            Preemption(None, status=status)
    with pytest.raises(ConfigError, match="cannot be handled"):
        Preemption(None, signals=(signal.SIGTERM, signal.SIGKILL))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    found = []

    def elsewhere() -> None:
        try:
            Preemption(None)
        except UsageError as error:
            found.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(found[0])
