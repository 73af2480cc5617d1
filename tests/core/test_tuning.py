"""Choices: the argument wins over the environment, which wins over the rule; nonsense is named."""

from __future__ import annotations

import json
import math

import pytest

from hvdloss.comm import single
from hvdloss.comm.plan import BUCKET_BYTES, FIRST_BUCKET_BYTES, UNBUCKETED_BYTES
from hvdloss.comm.tuning import VARIABLES, Choice, choose, cycle_time, launched, remove_invalid_settings
from hvdloss.errors import ConfigError


def test_the_rule_decides_where_nobody_else_does() -> None:
    tuning = choose(environ={})
    assert (tuning.bucket_bytes, tuning.first_bytes) == (BUCKET_BYTES, FIRST_BUCKET_BYTES)
    assert (tuning.unbucketed_bytes, tuning.overlap.value) == (UNBUCKETED_BYTES, 1)
    assert {choice["by"] for choice in tuning.as_dict().values()} == {"rule"}


def test_an_argument_wins_over_the_environment_and_that_over_the_rule() -> None:
    environ = {"HVDLOSS_BUCKET_CAP_MB": "3.5", "HVDLOSS_OVERLAP": "0", "HVDLOSS_FIRST_BUCKET_MB": "2"}
    tuning = choose(environ=environ)
    assert tuning.bucket_cap_mb == Choice(3.5, "HVDLOSS_BUCKET_CAP_MB")
    assert tuning.overlap == Choice(0.0, "HVDLOSS_OVERLAP")
    assert tuning.first_bytes == 2 * 2**20
    assert tuning.unbucketed_mb.by == "rule"
    tuning = choose(bucket_cap_mb=8, overlap=True, environ=environ)
    assert tuning.bucket_cap_mb == Choice(8.0, "argument")
    assert tuning.overlap == Choice(1.0, "argument")


def test_the_first_bucket_is_never_larger_than_the_others_by_rule() -> None:
    assert choose(bucket_cap_mb=0.25, environ={}).first_bucket_mb.value == 0.25


def test_no_gradient_alone() -> None:
    tuning = choose(environ={"HVDLOSS_UNBUCKETED_MB": "inf"})
    assert tuning.unbucketed_bytes is None
    assert math.isinf(tuning.unbucketed_mb.value)
    assert json.loads(json.dumps(tuning.as_dict(), allow_nan=False))["unbucketed_mb"]["value"] is None


@pytest.mark.parametrize("variable", sorted(VARIABLES))
@pytest.mark.parametrize("text", ["-1", "nan", "many", "2,5"])
def test_nonsense_in_the_environment_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}='{text}'"):
        choose(environ={variable: text})


@pytest.mark.parametrize("value", [0, -2, float("nan"), float("inf"), "x"])
def test_nonsense_as_an_argument_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match="bucket_cap_mb="):
        choose(bucket_cap_mb=value, environ={})  # type: ignore[arg-type]


def test_empty_variables_are_none() -> None:
    assert choose(environ=dict.fromkeys(VARIABLES, " ")) == choose(environ={})


def test_what_horovod_run_sets_by_accident_is_forgotten() -> None:
    environ = {"HOROVOD_CYCLE_TIME": "(None,)", "HOROVOD_CACHE_CAPACITY": "512", "OTHER": "(None,)"}
    remove_invalid_settings(environ)
    assert environ == {"HOROVOD_CACHE_CAPACITY": "512", "OTHER": "(None,)"}
    assert cycle_time({"HOROVOD_CYCLE_TIME": "soon"}).value == 0  # as Horovod reads it


def test_what_the_launch_decided_is_told() -> None:
    assert launched(single, {}) == {
        "controller": {"value": "none", "by": "launch"},
        "cycle_time_ms": {"value": 1.0, "by": "rule"},
    }
    told = launched(single, {"HOROVOD_CYCLE_TIME": "2.5"})["cycle_time_ms"]
    assert told == {"value": 2.5, "by": "HOROVOD_CYCLE_TIME"}
