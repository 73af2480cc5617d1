"""What `hvdloss check` makes of numbers: verdicts and causes, from steps of simulated ranks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from hvdloss.check.evidence import Call, Evidence, read
from hvdloss.check.text import CAUSES, NOTES, as_dict, report, sentence, way_out
from hvdloss.check.verdict import Cause, Verdict, judge, overall

RANDOM = np.random.default_rng(0)
EVEN, UNEVEN = [[4], [4]], [[4], [2]]


def step(
    counts: list[list[int]],
    *,
    factor=lambda n: 1.0 / n,
    reduction: str = "mean",
    penalty: float = 0.0,
    weight: float = 1.0,
    times: float = 1.0,
    right: bool = False,
    present: int | None = None,
) -> Evidence:
    """Return a step in which rank k has micro-batches of `counts[k]` elements, reduced by an average.

    Args:
        factor: what a micro-batch's sum is multiplied with, by its number of elements.
        penalty: what a penalty adds.
        weight: of the elements of rank 0.
        times: what the average is multiplied with.
        right: whether the gradient is made that of all elements in its place.
        present: how many elements of each micro-batch count, if not all.
    """
    sums, averaged, passes, total, weights = [], [], [], np.zeros(6), 0.0
    added = penalty * np.arange(6.0)
    for rank, of_rank in enumerate(counts):
        sums.append(np.zeros(6))
        averaged.append(np.zeros(6))
        passes.append([])
        for n in of_rank:
            w = n * (weight if rank == 0 else 1.0)
            gradient = w * (RANDOM.normal(size=6) + 1)
            f = factor(w)
            sums[-1] += gradient
            averaged[-1] += f * gradient + added
            total, weights = total + gradient, weights + w
            denominators = {"weights": w} if reduction == "mean" else {"weights": w, "elements": float(n)}
            call = Call(
                "cross_entropy", reduction, f, w * 2.0 + rank, denominators, n if present is None else 9
            )
            passes[-1].append([replace(call, present=n)])
    observed = times * sum(averaged) / len(counts)
    if right:
        observed = total / weights + added
    many = sum(map(len, counts)) / len(counts)
    return Evidence(
        ["first.weight", "second.weight"],
        [2, 4],
        "float64",
        [observed] * len(counts),
        averaged,
        [added * len(of_rank) for of_rank in counts],
        {0: sums},
        passes,
        norms=[[1.0, 2.0]] * len(counts),
        rows=[[f"{rank}-{i}" for i in range(3)] for rank in range(len(counts))],
        random=[""] * len(counts),
        reduced_by="DDP" if many else "",
    )


def halved(n: float) -> float:
    return 0.5 / n


def kinds(seen: Evidence) -> list[str]:
    return [cause.kind for cause in judge(seen).causes]


@pytest.mark.parametrize(
    "seen",
    [
        step(EVEN),
        step(EVEN, penalty=0.1),
        step(UNEVEN, right=True),
        step(UNEVEN, right=True, penalty=0.1),
        step([[4], []], right=True),
        step([[4, 2], [1, 5]], right=True),  # as this library has it: nobody divides
        step([[4, 4], [4, 4]], factor=halved),  # as people write it
        step(UNEVEN, reduction="sum", factor=lambda n: 1 / 3),  # a global number of elements, by hand
        step(EVEN, reduction="none"),
    ],
    ids=["even", "penalty", "uneven", "both", "empty", "undivided", "divided", "global", "none"],
)
def test_what_is_one_processs_is_exact(seen):
    found = judge(seen)
    assert found.verdict is Verdict.EXACT, found
    assert found.error < 1e-12
    assert found.causes == found.problems == []
    assert report([found], [seen], "train.py").splitlines()[2].startswith("EXACT: ")


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        (step(UNEVEN), ["mean_of_means"]),
        (step(EVEN, weight=5.0), ["mean_of_means"]),
        (step(UNEVEN, reduction="none"), ["mean_of_means"]),
        (step(UNEVEN, penalty=0.1), ["mean_of_means"]),
        (step([[4, 2], [2, 4]], factor=halved), ["mean_of_means"]),
        (step([[4, 4], [4, 4]]), ["passes_added_up"]),
        (step([[4, 2], [3, 3]]), ["mean_of_means", "passes_added_up"]),
        (step([[4, 4], [4, 4]], factor=halved, times=0.5), ["divided_by_ranks"]),
        (step([[4] * 3] * 2, factor=lambda n: 1 / 3 / n, times=1 / 3), ["divided_by_passes"]),
        (step(EVEN, times=2.0), ["added_up"]),
        (step(EVEN, times=0.5), ["divided_by_ranks"]),
        (step(EVEN, reduction="sum", factor=lambda n: 1.0), ["sum_averaged"]),
    ],
)
def test_a_cause_is_told_from_the_numbers(seen, cause):
    found = judge(seen)
    assert found.verdict is Verdict.OFF
    assert [one.kind for one in found.causes] == cause
    assert found.parameter == "first.weight"
    assert found.error > 0.01
    assert found.parameter_error > 0.01


def test_a_mean_of_means_says_what_is_uneven():
    assert judge(step(UNEVEN)).causes[0].facts == {"because": ["uneven batches"]}
    assert judge(step(EVEN, weight=5.0)).causes[0].facts == {"because": ["class or sample weights"]}
    assert judge(step(UNEVEN, present=3)).causes[0].facts == {"because": ["masked or ignored elements"]}
    found = judge(step(UNEVEN))
    assert found.weights == [4, 2]
    assert found.loss == pytest.approx((8 + 5) / 6)
    assert found.averaged_loss == pytest.approx((8 / 4 + 5 / 2) / 2)


def test_a_penalty_that_counts_twice_is_told():
    seen = step(EVEN, penalty=0.1)
    twice = replace(seen, observed=[one + 0.1 * np.arange(6.0) for one in seen.observed])
    (cause,) = judge(twice).causes
    assert cause.kind == "penalty"
    assert cause.facts["times"] == pytest.approx(2)


def test_what_no_cause_explains_is_off_all_the_same_and_a_mere_length_is_not_known():
    seen = step(EVEN)
    assert kinds(replace(seen, observed=[seen.observed[0] + np.eye(6)[5]] * 2)) == ["unknown"]
    found = judge(step(EVEN, times=0.37))
    assert found.verdict is Verdict.UNKNOWN
    assert [cause.kind for cause in found.causes] == ["scaled"]


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({"norms": [[1.0, 2.0], [1.0, 2.1]]}, "parameters"),
        ({"rows": [["a", "b"], ["b", "a"]]}, "same_data"),
        ({"batch_norms": ["1"]}, "batch_norm"),
        (
            {"rows": [["a", "b"], ["b", "c"]], "sampler": {"samples": 3, "ranks": 2, "total": 4}},
            "repeated",
        ),
    ],
)
def test_what_is_certain_makes_a_right_average_off(more, cause):
    seen = replace(step(EVEN), **more)
    found = judge(seen)
    assert found.verdict is Verdict.OFF
    assert [one.kind for one in found.causes] == [cause]


def test_gradients_that_differ_or_are_not_finite_are_off():
    seen = step(EVEN)
    assert kinds(replace(seen, observed=seen.averaged)) == ["not_reduced"]
    assert kinds(replace(seen, observed=[seen.observed[0] * np.nan] * 2)) == ["nonfinite"]


def test_what_is_not_known_is_never_exact():
    right = step(EVEN)
    unseen = replace(right, passes=[[[]], [[]]], sums={})
    calls = [
        [replace(one, factor=f) for one in calls]
        for f, (calls,) in zip((0.3, 0.2), right.passes, strict=True)
    ]
    odd = [
        [[replace(one, denominators={"weights": 7.0 + one.factor}) for one in of_rank]] for of_rank in calls
    ]
    for seen in (
        replace(right, problems=["something"]),
        unseen,
        replace(right, passes=odd),
        replace(right, penalty=[np.zeros(6), np.ones(6)]),
    ):
        found = judge(seen)
        assert found.verdict is Verdict.UNKNOWN, found
        assert found.problems
        assert "COULD NOT TELL" in report([found], [seen], "train.py")
    assert overall([]) is Verdict.UNKNOWN
    assert overall([judge(right), judge(unseen)]) is Verdict.UNKNOWN
    assert overall([judge(step(UNEVEN)), judge(unseen)]) is Verdict.OFF
    assert "COULD NOT TELL" in report([], [], "train.py")


def test_notes_keep_nothing_from_being_exact():
    seen = replace(
        step(EVEN),
        random=["a", "a"],
        rows=[["a", "b"], ["b", "c"]],
        sampler={"samples": 4, "ranks": 2, "total": 4},
    )
    found = judge(seen)
    assert found.verdict is Verdict.EXACT
    assert [note.kind for note in found.notes] == ["equal_rows", "same_dropout"]
    longer = replace(seen, rows=[[], []], sampler={"samples": 5, "ranks": 2, "total": 6}, random=["a", "b"])
    assert [note.kind for note in judge(longer).notes] == ["sampler_repeats", "dropout"]


def test_every_cause_has_words_and_a_way_out():
    facts = {
        "because": [],
        "passes": 2,
        "ranks": 2,
        "factor": 0.5,
        "times": 2.0,
        "name": "a",
        "rank": 1,
        "count": 3,
    }
    for kind in CAUSES:
        assert sentence(Cause(kind, {**facts, "layers": ["a", "b"]}))
        for by in ("DDP", "FSDP", "Horovod", "hvdloss", ""):
            page, _ = way_out(kind, replace(step(EVEN), reduced_by=by))
            assert page.startswith("docs/")
    for kind in NOTES:
        assert sentence(Cause(kind, {**facts, "samples": 4}))


def test_the_report_names_the_page_and_the_lines():
    seen = [step(EVEN), step(UNEVEN)]
    text = report([judge(one) for one in seen], seen, "train.py")
    assert "NOT EXACT: step 2 is not that of one process" in text
    assert "Next: docs/howto/from-ddp.md, in short:" in text
    assert 'objective = hvd.Objective("cross_entropy", ahead=True)' in text
    found = json.loads(json.dumps(as_dict([judge(one) for one in seen], seen)))
    assert (found["verdict"], found["ranks"]) == ("not exact", 2)
    assert [one["verdict"] for one in found["steps"]] == ["exact", "not exact"]
    assert found["steps"][1]["causes"][0]["kind"] == "mean_of_means"


def test_steps_are_read_as_far_as_all_ranks_have_them(tmp_path):
    line = {
        "optimizer": "SGD", "reduced_by": "", "names": ["a"], "sizes": [2], "dtype": "float32",
        "problems": [], "norms": [1.0], "rows": [], "batch_norms": [], "random": "", "sampler": None,
        "passes": [[{"name": "mse_loss", "reduction": "mean", "factor": 1.0, "numerator": 1.0,
                     "denominators": {"weights": 1.0}}]],
    }  # fmt: skip
    for rank, count in ((0, 3), (1, 2)):
        lines = [json.dumps(line if i else {**line, "passes": []}) + "\n" for i in range(count)]
        (tmp_path / f"{rank}.jsonl").write_text("".join(lines))
        for i in range(count):
            arrays = {name: np.ones(2) for name in ("observed", "averaged", "penalty", "sum0")}
            np.savez(tmp_path / f"{rank}-{i}.npz", **arrays)
    (seen,) = read(tmp_path, 2)  # the first has no loss, the third is not of both
    assert seen.ranks == 2
    assert seen.passes[1][0][0].name == "mse_loss"
    assert read(tmp_path / "none", 2) == []
