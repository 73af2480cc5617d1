"""Findings in words, with what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hvdloss.check.evidence import Evidence
from hvdloss.check.verdict import Cause, Finding, Verdict, overall

__all__ = ["CAUSES", "NOTES", "as_dict", "report", "sentence", "way_out"]

#: Why a gradient is not the right one; what is in braces are facts of the cause.
CAUSES = {
    "mean_of_means": "mean of means: each mean is divided by its own weight, and these differ{because}",
    "passes_added_up": "micro-batches are added up: the gradient is {passes:g} times that of their mean",
    "divided_by_passes": "micro-batches are divided by {passes:g} once more than they should be",
    "added_up": "ranks are added up: {ranks} of them make the gradient {ranks} times as large",
    "divided_by_ranks": "the gradient is divided by the {ranks} ranks once more than it should be",
    "sum_averaged": "a sum over samples is averaged over ranks: the gradient is 1/{ranks} of one process's",
    "scaled": "the gradient has the right direction, and {factor:.4g} times the right length",
    "penalty": "a penalty counts {times:.4g} times instead of once",
    "nonfinite": "the gradient is NaN or infinite: a loss that is, or a mean over no element at all",
    "parameters": "ranks have different parameters before the step, {name} first",
    "not_reduced": "ranks step with different gradients: not reduced, or changed before they were",
    "same_data": "ranks 0 and {rank} have the same samples",
    "repeated": "DistributedSampler repeats samples: {count} of this step are on several ranks",
    "batch_norm": "{layers} normalises by each rank's own samples",
    "unknown": "none that is known: a hook, a compression or the script changes gradients",
}
#: What is worth knowing, and keeps no step from being exact.
NOTES = {
    "equal_rows": "{count} samples of a step are equal to one on another rank.",
    "sampler_repeats": (
        "DistributedSampler repeats {count} of {samples} samples at the end of every epoch: they count twice."
    ),
    "sampler_leaves_out": "DistributedSampler leaves {count} of {samples} samples out of every epoch.",
    "dropout": "Dropout was compared as it was drawn: one process would draw other numbers.",
    "same_dropout": (
        "Dropout draws the same numbers on every rank, as their seed is the same: add the rank to the seed."
    ),
}
_PAGES = {
    "hvdloss": "docs/reference/torch.md",
    "Horovod": "docs/howto/from-horovod.md",
    "DDP": "docs/howto/from-ddp.md",
    "FSDP": "docs/howto/from-fsdp.md",
}
_WRAPPED = [
    'objective = hvd.Objective("{loss}")',
    "optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), objective)",
]
_AHEAD = ['objective = hvd.Objective("{loss}", ahead=True)', "loss = objective(prediction, target)"]
_LOADER = "loader = hvd.ShardedLoader(dataset, Shuffled(len(dataset)), batch_size)  # of hvdloss.data"
_LOSS_NAMES = {"mse_loss": "mse", "l1_loss": "mae", "nll_loss": "nll", "cross_entropy": "cross_entropy"}


def sentence(cause: Cause) -> str:
    """Return a cause, or a note, in words.

    >>> sentence(Cause("added_up", {"ranks": 2}))
    'ranks are added up: 2 of them make the gradient 2 times as large'
    """
    facts: dict[str, Any] = dict(cause.facts)
    if "because" in facts:
        facts["because"] = f" ({', '.join(facts['because'])})" if facts["because"] else ""
    if "layers" in facts:
        names = facts["layers"]
        facts["layers"] = names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
    return {**CAUSES, **NOTES}[cause.kind].format(**facts)


def way_out(kind: str, seen: Evidence) -> tuple[str, list[str]]:
    """Return the page to read about a cause, and the lines to write."""
    page = _PAGES.get(seen.reduced_by, "docs/howto/index.md")
    names = [call.name for of_rank in seen.passes for one in of_rank for call in one]
    named = _LOSS_NAMES.get(names[0]) if names else None
    ahead = seen.reduced_by in ("DDP", "FSDP")
    lines = [line.format(loss=named) for line in (_AHEAD if ahead else _WRAPPED)]
    if named is None:  # the library's own name of it, or a function
        lines = [line.replace('"None"', names[0] if names else "loss_function") for line in lines]
    if kind == "passes_added_up":
        return page, lines if not ahead else ["(loss / micro_batches).backward()"]
    return {
        "parameters": (page, ["hvd.broadcast_parameters(model.state_dict(), root_rank=0)"]),
        "not_reduced": (page, lines),
        "same_data": ("docs/howto/data.md", [_LOADER]),
        "repeated": ("docs/howto/data.md", [_LOADER]),
        "batch_norm": (
            "docs/reference/torch.md",
            [
                "model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # before it is wrapped"
                if ahead
                else "hvd.SyncBatchNorm(...)  # in place of each BatchNorm"
            ],
        ),
        "unknown": ("docs/explanation/averaging.md", []),
        "scaled": ("docs/explanation/averaging.md", []),
        "nonfinite": (page, lines),
    }.get(kind, (page, lines))


def as_dict(findings: Sequence[Finding], seen: Sequence[Evidence]) -> dict[str, Any]:
    """Return all of it for programs."""
    steps = []
    for finding, of_step in zip(findings, seen, strict=True):
        known = asdict(finding) | {"verdict": finding.verdict.value, "reduced_by": of_step.reduced_by}
        for part in ("causes", "notes"):
            known[part] = [
                {"kind": cause.kind, "text": sentence(cause), **cause.facts}
                for cause in getattr(finding, part)
            ]
        steps.append(known)
    return {
        "verdict": overall(findings).value,
        "ranks": seen[0].ranks if seen else 0,
        "steps": steps,
    }


def _worst(findings: Sequence[Finding]) -> int:
    """Return the place of the step to show."""
    verdict = overall(findings)
    among = [i for i, finding in enumerate(findings) if finding.verdict is verdict]
    return max(among, key=lambda i: findings[i].error or 0.0)


def _percent(x: float) -> str:
    """Return a relative distance.

    >>> _percent(0.0432), _percent(3e-9)
    ('4.3 %', '3e-07 %')
    """
    return f"{100 * x:.2g} %" if 1e-4 < x < 1 else f"{100 * x:.0f} %" if x >= 1 else f"{100 * x:.0e} %"


def _counted(count: int, what: str) -> str:
    """Return a number of things.

    >>> _counted(1, "rank"), _counted(2, "rank")
    ('1 rank', '2 ranks')
    """
    return f"{count} {what}" + "s" * (count != 1)


def _rows(finding: Finding, seen: Evidence) -> list[tuple[str, str]]:
    rows = []
    if finding.error is not None:
        limit = f"{_percent(finding.tolerance)} is rounding in {seen.dtype}"
        rows.append(("gradient", f"off by {_percent(finding.error)} ({limit})"))
    if finding.parameter is not None and finding.parameter_error is not None:
        rows.append(("first parameter", f"{finding.parameter}, off by {_percent(finding.parameter_error)}"))
    if finding.loss is not None and finding.averaged_loss is not None:
        distance = abs(finding.averaged_loss - finding.loss) / (abs(finding.loss) or 1.0)
        text = f"{finding.loss:.6g} of all samples; ranks' own average to {finding.averaged_loss:.6g}"
        rows.append(("loss", text + (f", {_percent(distance)} off" if distance > 1e-6 else "")))
    if finding.weights:
        rows.append(("weights by rank", ", ".join(f"{w:g}" for w in finding.weights)))
    rows += [("cause", sentence(cause)) for cause in finding.causes]
    rows += [("not known", problem) for problem in finding.problems]
    return rows


def report(findings: Sequence[Finding], seen: Sequence[Evidence], script: str) -> str:
    """Return what to print.

    Args:
        findings: of each step.
        seen: what each of them was found from.
        script: its name.
    """
    verdict = overall(findings)
    if not findings:
        return f"{verdict.value.upper()}: no step of a PyTorch optimizer, on all ranks, was seen in {script}."
    place = _worst(findings)
    finding, of_step = findings[place], seen[place]
    who = f", reduced by {of_step.reduced_by}" if of_step.reduced_by else ""
    size, count = _counted(of_step.ranks, "rank"), _counted(len(findings), "step")
    head = {
        Verdict.EXACT: "loss and gradient are those of one process that sees all samples.",
        Verdict.OFF: f"step {place + 1} is not that of one process that sees all samples.",
        Verdict.UNKNOWN: "whether the gradient is that of one process cannot be told.",
    }[verdict]
    lines = [f"{script}: {size}, {count}{who}", "", f"{verdict.value.upper()}: {head}", ""]
    lines += [f"  {name:<16} {text}" for name, text in _rows(finding, of_step)]
    notes = dict.fromkeys(sentence(note) for one in findings for note in one.notes)
    lines += [f"  {'note':<16} {text}" for text in notes]
    if finding.causes:
        page, write = way_out(finding.causes[0].kind, of_step)
        lines += ["", f"Next: {page}" + (", in short:" if write else "")]
        lines += [f"    {line}" for line in write]
    elif verdict is Verdict.UNKNOWN:
        lines += ["", "Next: docs/howto/check.md says what can be compared, and how."]
    return "\n".join(lines)
