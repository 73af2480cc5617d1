"""``hvdloss explain``: what a trained model relies on, and who drives its loss, on all ranks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from hvdloss.cli import machine
from hvdloss.cli.errors import Exit, Interrupted
from hvdloss.cli.process import Log, interruptible
from hvdloss.cli.progress import launched, waiting
from hvdloss.errors import ConfigError, HvdlossError

KINDS = ("loss", "permutation", "shap", "lime")
_KEYS = {
    "model": "the model, or a function of NumPy rows (needed)",
    "x": "this rank's rows, (rows, features) (needed)",
    "y": "their targets (needed but for shap and lime)",
    "loss": "an Objective, the name of a loss, a metric (needed but for shap and lime)",
    "weight": "one weight per row",
    "ids": "integers or strings that identify the rows of all ranks",
    "groups": "labels of rows, or several groupings by name",
    "classes": "the classes' names",
    "feature_names": "the columns' names",
    "output": "what to do to the model's output before SHAP and LIME: softmax, say",
    "mode": 'LIME\'s: "classification" or "regression"',
}
_QUIET = "HVDLOSS_EXPLAIN_QUIET"  # set for ranks whose launcher prints what rank 0 wrote
_MARK = "hvdloss-explain: "
_FILE = "explain.json"


class _Failed(HvdlossError):
    """The command cannot go on; carries its exit status."""

    def __init__(self, text: str, status: Exit) -> None:
        super().__init__(text)
        self.status = status


# -- the command --------------------------------------------------------------------------------------


def _kinds(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    kinds = [one.strip() for one in value.split(",") if one.strip()]
    unknown = [one for one in kinds if one not in KINDS]
    if unknown or not kinds:
        raise click.BadParameter(f"{value!r}: choose from {', '.join(KINDS)}, with commas between")
    return [kind for kind in KINDS if kind in kinds]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("entry")
@click.option(
    "--what",
    callback=_kinds,
    default="loss,permutation,shap",
    show_default=True,
    help="Of loss, permutation, shap, lime.",
)
@click.option("-np", "--ranks", type=click.IntRange(1), help="Start this number of ranks with horovodrun.")
@click.option("--controller", type=click.Choice(["gloo", "mpi"]), default="gloo", show_default=True)
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, help="Hardest samples to list.")
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Shuffles of each feature."
)
@click.option(
    "--rows", type=click.IntRange(1), default=100, show_default=True, help="Rows that SHAP and LIME explain."
)
@click.option(
    "--background", type=click.IntRange(1), default=100, show_default=True, help="Rows they compare with."
)
@click.option(
    "--explainer",
    type=click.Choice(["permutation", "kernel", "sampling", "exact", "gradient", "deep"]),
    default="permutation",
    show_default=True,
    help="Of shap; the last two look into the model.",
)
@click.option("--evaluations", type=click.IntRange(1), help="Of the model, per row, by SHAP. [shap's rule]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=4096, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/explain"),
    show_default=True,
    help="Folder for the numbers (JSON), the pictures (PNG, with matplotlib) and the log.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON instead of tables.")
@click.pass_context
def explain(
    ctx: click.Context, /, entry: str, ranks: int | None, controller: str, as_json: bool, **options: Any
) -> None:
    """Explain a trained model: who drives its loss, and what it relies on.

    ENTRY is "file.py:function" or "module:function". The function takes nothing, is called once on every
    rank after hvd.init(), and returns a dict:

    \b
      model          the model, or a function of NumPy rows
      x, y           this rank's rows and targets; may be none
      loss           an Objective, the name of a loss, or a metric
      weight, ids, groups, classes, feature_names, output, mode
                     if there are any; see docs/howto/explain.md

    Runs in this process, or on the ranks that horovodrun started it on; -np starts them. Results are those
    of one process with all the rows, however they lie on ranks.

    Exit status: 0 done; 2 wrong entry or options; 3 something is not installed; 7 a rank failed.
    """
    with _guarded(ctx):
        if launched():
            numbers = _explain(entry, options)
        elif ranks is not None:
            numbers = _launch(entry, ranks, controller, options)
        else:
            with interruptible(), waiting("explaining"):
                numbers = _explain(entry, options)
        if numbers is not None and not os.environ.get(_QUIET):
            _show(numbers, as_json)


@contextmanager
def _guarded(ctx: click.Context) -> Iterator[None]:
    """Turn what goes wrong into a message and an exit status."""
    try:
        yield
    except Interrupted as stop:
        click.echo(f"Stopped by {stop}.", err=True)
        ctx.exit(stop.status)
    except HvdlossError as error:
        status = error.status if isinstance(error, _Failed) else Exit.RANKS
        if isinstance(error, ConfigError) and "pip install" in str(error):
            status = Exit.MISSING
        mark = f"{_MARK}{int(status)} " if os.environ.get(_QUIET) else ""
        click.echo(f"{mark}{error}", err=True)
        ctx.exit(int(status))


def _launch(entry: str, ranks: int, controller: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Start the ranks; return what rank 0 wrote."""
    _located(entry)
    launcher = machine.script_path("horovodrun")
    if launcher is None:
        raise _Failed(
            "horovodrun is neither beside this Python nor on PATH. Way out: hvdloss install", Exit.MISSING
        )
    out: Path = options["out"]
    out.mkdir(parents=True, exist_ok=True)
    (out / _FILE).unlink(missing_ok=True)
    command = [launcher, f"--{controller}", "-np", str(ranks), sys.executable, "-m", "hvdloss.cli", "explain"]
    for name, value in options.items():
        if value is not None:
            text = ",".join(value) if isinstance(value, list) else str(value)
            command += [f"--{name.replace('_', '-')}", text]
    env = {**os.environ, _QUIET: "1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}
    log = Log(out / "explain.log")
    try:
        with interruptible(), waiting(f"explaining on {ranks} ranks"):
            ended = log.run([*command, entry], env=env)
    finally:
        log.close()
    if ended.status != 0 or not (out / _FILE).exists():
        for line in ended.tail:
            if _MARK in line:
                status, _, text = line.partition(_MARK)[2].partition(" ")
                raise _Failed(text, Exit(int(status)))
        end = "\n".join([line for line in ended.tail if line.strip()][-8:])
        raise _Failed(f"{ranks} ranks ended with status {ended.status}.\n{end}\nLog: {log.path}", Exit.RANKS)
    numbers: dict[str, Any] = json.loads((out / _FILE).read_text())
    return numbers


# -- the entry ----------------------------------------------------------------------------------------


def _located(entry: str) -> tuple[str, str]:
    """Return where an entry is, and its function's name.

    Raises:
        click.BadParameter: it is not written as one, or there is no such file.
    """
    where, colon, name = entry.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise click.BadParameter(f'{entry!r}: write "file.py:function" or "module:function"')
    if where.endswith(".py") and not Path(where).is_file():
        raise click.BadParameter(f"{entry!r}: there is no file {where}")
    return where, name


def _loaded(entry: str) -> Callable[[], Any]:
    """Return the entry's function.

    Raises:
        click.BadParameter: there is none.
    """
    where, name = _located(entry)
    if where.endswith(".py"):
        path = Path(where).resolve()
        sys.path.insert(0, str(path.parent))  # as when the file itself is run
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or where.split(".")[0] != error.name.split(".")[0]:
                raise
            raise click.BadParameter(f"{entry!r}: there is no module {where}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise click.BadParameter(f"{entry!r}: {where} has no function {name}")
    found: Callable[[], Any] = function
    return found


def _adapter() -> Any:
    """Return the adapter of the framework that the entry uses, or of one that is installed."""
    for name in ("keras", "tensorflow", "torch"):
        if f"hvdloss.{name}" in sys.modules:
            return importlib.import_module(f"hvdloss.{name}")
    for name in ("keras", "torch", "tensorflow"):
        if name in sys.modules:
            return importlib.import_module(f"hvdloss.{name}")
    for name in ("torch", "tensorflow"):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(f"hvdloss.{name}")
    raise _Failed("neither torch nor tensorflow is installed. Way out: pip install torch", Exit.MISSING)


def _subject(hvd: Any, function: Callable[[], Any], kinds: list[str]) -> dict[str, Any]:
    """Return what the entry gives, checked on every rank."""
    from hvdloss.comm.communicator import Communicator, OneProcess
    from hvdloss.explain.exchange import RankMessage, exchange_messages

    made: dict[str, Any] = {}

    def make() -> RankMessage:
        given = function()
        if not isinstance(given, Mapping):
            raise ConfigError(f"the entry gave a {type(given).__name__}; it must return a dict")
        needed = ["model", "x", *(["y", "loss"] if {"loss", "permutation"} & set(kinds) else [])]
        for key in needed:
            if given.get(key) is None:
                raise ConfigError(f"the entry's dict lacks {key!r}: {_KEYS[key]}")
        for key in given:
            if key not in _KEYS:
                raise ConfigError(f"the entry's dict has {key!r}, which is none of {', '.join(_KEYS)}")
        made.update(given)
        return RankMessage()

    ranks: Communicator = OneProcess()
    if hvd.size() > 1:
        home = "torch" if hvd.__name__ == "hvdloss.torch" else "tensorflow"
        ranks = importlib.import_module(f"hvdloss.{home}.ops").communicator_of(hvd.global_process_set)
    exchange_messages(ranks, "hvdloss.explain.entry", "calling the entry", make)
    return made


# -- explaining ---------------------------------------------------------------------------------------


def _explain(entry: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Explain on this rank; return the numbers on rank 0, which also writes them."""
    function = _loaded(entry)
    hvd = _adapter()
    hvd.init()
    kinds: list[str] = options["what"]
    subject = _subject(hvd, function, kinds)
    common = {key: subject.get(key) for key in ("ids", "feature_names")}
    numbers: dict[str, Any] = {"ranks": hvd.size(), "entry": entry}
    tables: dict[str, Any] = {}
    drawn: dict[str, Callable[[Any, Path], None]] = {}
    model, x = subject["model"], subject["x"]
    if "loss" in kinds:
        report = _attribution(hvd, subject, options)
        numbers["loss"] = report.as_dict()
        tables |= report.tables()
        drawn["loss"] = lambda pyplot, path: _draw_loss(pyplot, path, report)
    if "permutation" in kinds:
        found = hvd.permutation_importance(
            model,
            x,
            subject["y"],
            loss=subject["loss"],
            weight=subject.get("weight"),
            n_repeats=options["repeats"],
            seed=options["seed"],
            batch_size=options["batch_size"],
            **common,
        )
        numbers["permutation"] = found.as_dict()
        title = f"Permutation importance, {found.rows} rows, {found.measure} {found.baseline:.4g}"
        tables[title] = found.table(20)
        drawn["permutation"] = lambda pyplot, path: _draw_permutation(pyplot, path, found)
    around = {
        key: options[key] for key in ("rows", "background", "seed", "batch_size") if options[key] is not None
    } | common
    if "shap" in kinds:
        output = {} if options["explainer"] in ("gradient", "deep") else {"output": subject.get("output")}
        shown = hvd.shap_values(
            model,
            x,
            explainer=options["explainer"],
            evaluations=options["evaluations"],
            **output,
            **around,
        )
        names = _names(shown.feature_names, shown.values.shape[1])
        labels = _outputs(subject, shown.values)
        numbers["shap"] = _as_numbers(shown.ids, names, shown.values, labels, base=shown.base_values.tolist())
        tables[f"SHAP, {len(shown.values)} rows"] = _effects(names, shown.values, labels)
        drawn["shap"] = lambda pyplot, path: _draw_shap(pyplot, path, shown, names, labels)
    if "lime" in kinds:
        lime = hvd.lime_weights(
            model, x, output=subject.get("output"), mode=subject.get("mode") or "classification", **around
        )
        lime_names = _names(lime.feature_names, lime.values.shape[1])
        lime_labels = _outputs(subject, lime.values)
        scores = lime.scores.tolist()
        numbers["lime"] = _as_numbers(lime.ids, lime_names, lime.values, lime_labels, scores=scores)
        title = f"LIME, {len(lime.values)} rows, mean R2 {lime.scores.mean():.2f}"
        tables[title] = _effects(lime_names, lime.values, lime_labels)
        drawn["lime"] = lambda pyplot, path: _draw_effects(
            pyplot, path, lime_names, lime.values, lime_labels, "mean |LIME weight|"
        )
    if hvd.rank() != 0:
        return None
    out: Path = options["out"]
    out.mkdir(parents=True, exist_ok=True)
    numbers["tables"] = {title: list(table) for title, table in tables.items()}
    numbers["pictures"] = _draw(drawn, out)
    (out / _FILE).write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def _attribution(hvd: Any, subject: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Return who drives the loss, of predictions made in batches."""
    classes = subject.get("classes")
    attribution = hvd.LossAttribution(
        subject["loss"], k=options["top"], classes=None if classes is None else list(classes)
    )
    predict = hvd.predict_function(subject["model"])
    groups = subject.get("groups")
    if groups is not None and not isinstance(groups, Mapping):
        groups = {"group": groups}
    size = options["batch_size"]
    for start in range(0, len(subject["x"]), size):
        part = slice(start, start + size)

        def some(key: str, part: slice = part) -> Any:
            return None if subject.get(key) is None else np.asarray(subject[key])[part]

        attribution.add(
            lambda part=part: predict(np.asarray(subject["x"])[part]),
            some("y"),
            some("weight"),
            ids=some("ids"),
            groups=None if groups is None else {name: np.asarray(g)[part] for name, g in groups.items()},
        )
    return attribution.compute()


def _names(names: Any, count: int) -> list[str]:
    return [str(name) for name in names] if names is not None else [f"x{i}" for i in range(count)]


def _outputs(subject: Mapping[str, Any], values: Any) -> list[str] | None:
    """Return names of a model's outputs, or None if it has one."""
    if values.ndim < 3 or values.shape[2] == 1:
        return None
    classes = subject.get("classes")
    fits = classes is not None and len(classes) == values.shape[2]
    return [str(one) for one in classes] if fits else [str(i) for i in range(values.shape[2])]  # type: ignore[union-attr]


def _as_numbers(
    ids: Any, names: list[str], values: Any, labels: list[str] | None, **more: Any
) -> dict[str, Any]:
    return {
        "ids": ids.tolist(),
        "features": names,
        "outputs": labels,
        "mean_absolute": _mean_absolute(values).tolist(),
        "values": values.tolist(),
        **more,
    }


def _mean_absolute(values: Any) -> Any:
    """Return the mean over rows of the absolute effect, (features, outputs)."""
    return np.abs(values).mean(axis=0).reshape(values.shape[1], -1)


def _effects(
    names: list[str], values: Any, labels: list[str] | None, most: int = 20
) -> tuple[list[str], list[list[str]]]:
    """Return mean absolute effects as a table, the largest first; of two classes, which mirror, the last."""
    means = _mean_absolute(values)
    total = means.sum(axis=1) if means.shape[1] > 2 else means[:, -1]
    order = np.argsort(-total, kind="stable")[:most]
    rows = [[names[f], f"{total[f]:.4g}"] for f in order]
    if labels is None or len(labels) == 2:
        return ["feature", f"mean effect{'' if labels is None else f' on {labels[-1]}'}"], rows
    largest = [[labels[means[f].argmax()], f"{means[f].max():.4g}"] for f in order]
    columns = ["feature", f"mean effect, sum of {len(labels)} outputs", "most on", "there"]
    return columns, [row + most_on for row, most_on in zip(rows, largest, strict=True)]


# -- showing ------------------------------------------------------------------------------------------


def _show(numbers: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({key: value for key, value in numbers.items() if key != "tables"}))
        return
    wide = sys.stdout.isatty() or os.environ.get("COLUMNS")
    console = Console() if wide else Console(width=120)
    if "loss" in numbers:
        loss = numbers["loss"]
        ranks = f" on {numbers['ranks']} ranks" if numbers["ranks"] > 1 else ""
        console.print(f"Loss {loss['loss']:.6g} of {loss['elements']} elements{ranks}", highlight=False)
    for title, (columns, rows) in numbers["tables"].items():
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(title, style="bold", markup=False, highlight=False)
        console.print(table)
    pictures = ", ".join(numbers["pictures"])
    console.print()
    console.print(
        f"Pictures: {pictures}" if pictures else "No pictures: pip install 'hvdloss[explain]'",
        markup=False,
        soft_wrap=True,
        highlight=False,
    )


def _draw(drawn: Mapping[str, Callable[[Any, Path], None]], out: Path) -> list[str]:
    """Draw what there is to draw, if matplotlib is there; return the files."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures = []
    for name, draw in drawn.items():
        path = out / f"{name}.png"
        draw(pyplot, path)
        pyplot.close("all")
        pictures.append(str(path))
    return pictures


def _draw_loss(pyplot: Any, path: Path, report: Any) -> None:
    """Draw every grouping's shares of loss and weight, and the hardest samples."""
    parts = {"rank": report.ranks, "class": report.classes, **report.groups}
    parts = {title: some[:12] for title, some in parts.items() if some}
    samples = report.hardest[:20]
    count = len(parts) + bool(samples)
    columns = min(2, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.5 * columns, 3.3 * rows), layout="constrained", squeeze=False
    )
    flat = axes.ravel()
    for axis, (title, some) in zip(flat, parts.items(), strict=False):
        at = np.arange(len(some))
        weights = [part.weight / report.weight * 100 if report.weight else 0 for part in some]
        axis.bar(at - 0.2, weights, 0.38, color="0.75", label="share of weight")
        axis.bar(at + 0.2, [part.share * 100 for part in some], 0.38, color="tab:red", label="share of loss")
        axis.set_xticks(at, [str(part.label)[:14] for part in some], rotation=30 if len(some) > 5 else 0)
        axis.set_title(f"by {title}", loc="left", fontsize=10)
        axis.set_ylabel("%")
        axis.legend(
            frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2
        )
    if samples:
        axis = flat[len(parts)]
        at = np.arange(len(samples))
        axis.barh(at, [one.share * 100 for one in samples], color="tab:red")
        labels = [f"{one.id}{'' if one.label is None else f' ({one.label})'}" for one in samples]
        axis.set_yticks(at, labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel("share of loss, %")
        axis.set_title("hardest samples", loc="left", fontsize=10)
    for axis in flat[count:]:
        axis.axis("off")
    for axis in flat[:count]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_permutation(pyplot: Any, path: Path, found: Any, most: int = 20) -> None:
    """Draw the most important features, with the deviation over repeats."""
    order = np.argsort(-found.importances_mean, kind="stable")[:most][::-1]
    figure, axis = pyplot.subplots(figsize=(7, 1.2 + 0.28 * len(order)), layout="constrained")
    axis.barh(
        [found.features[i] for i in order],
        found.importances_mean[order],
        xerr=found.importances_std[order],
        color="tab:blue",
        error_kw={"lw": 0.8},
    )
    axis.axvline(0, color="0.5", lw=0.8)
    axis.margins(y=0.02)
    axis.set_xlabel(f"how much worse {found.measure} is with the feature shuffled (now {found.baseline:.4g})")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_shap(pyplot: Any, path: Path, shown: Any, names: list[str], labels: list[str] | None) -> None:
    """Draw shap's own beeswarm of one output, or mean effects where there are more than two."""
    if labels is not None and len(labels) > 2:
        _draw_effects(pyplot, path, names, shown.values, labels, "mean |SHAP value|")
        return
    import shap

    values = shown.values if shown.values.ndim == 2 else shown.values[:, :, -1]
    one = shap.Explanation(values, data=shown.data, feature_names=names)
    shap.plots.beeswarm(one, max_display=15, show=False)
    axis = pyplot.gca()
    of = "" if labels is None else f" on {labels[-1]}"
    axis.set_xlabel(f"SHAP value: effect{of}")
    pyplot.gcf().savefig(path, dpi=120, bbox_inches="tight")


def _draw_effects(
    pyplot: Any,
    path: Path,
    names: list[str],
    values: Any,
    labels: list[str] | None,
    what: str,
    most: int = 20,
) -> None:
    """Draw mean absolute effects, stacked over outputs; of two classes, which mirror, the last."""
    means = _mean_absolute(values)
    shown = [means.shape[1] - 1] if means.shape[1] <= 2 else list(range(means.shape[1]))
    order = np.argsort(-means[:, shown].sum(axis=1), kind="stable")[:most][::-1]
    figure, axis = pyplot.subplots(figsize=(7, 1.2 + 0.28 * len(order)), layout="constrained")
    left = np.zeros(len(order))
    for number, output in enumerate(shown):
        label = None if labels is None else labels[output]
        axis.barh(
            [names[i] for i in order], means[order, output], left=left, label=label, color=f"C{number % 10}"
        )
        left += means[order, output]
    if labels is not None:
        axis.legend(frameon=False, fontsize=8, title="effect on", title_fontsize=8, loc="lower right")
    axis.margins(y=0.02)
    axis.set_xlabel(what)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
