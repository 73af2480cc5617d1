"""The table of faults, as data: what is done to a rank, and what every rank must then say.

Nothing here imports a framework. `fault_job.py` inflicts a fault inside the ranks, `fault_launch.py` starts
and watches them, `inflict.py` judges what they recorded and writes the page.

To add a fault: a row here; if none of the ways in `fault_job.py` fits, a way there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TORCH, TAPE, FUNCTION, FIT = "torch", "tape", "function", "fit"
LOOPS = {
    TORCH: "PyTorch loop",
    TAPE: "TensorFlow tape, eager",
    FUNCTION: "TensorFlow tape in a tf.function",
    FIT: "Keras fit",
}
ALL = (TORCH, TAPE, FUNCTION, FIT)
OWN = (TORCH, TAPE, FUNCTION)  # loops that the user writes
#: The promise: seconds until every rank knows, where nothing has to time out first.
PROMISE = 5.0
#: Set for faults that only a time-out can tell, so that tests need not wait for the defaults (600 s, 30 s).
STALL, SILENCE = 4.0, 4.0
#: How long a stuck rank is stuck: long enough that the others must have noticed.
STUCK = 16.0


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: in records and on the command line.
        what: for the table.
        group: its part of the table.
        loops: in which it is inflicted.
        how: what is done: ``batch`` (the rank's batch is spoiled), ``build`` (the rank builds something
            else), ``act`` (the rank does it at its step), ``signal`` (it is done to the rank from outside).
        caught: loops in which the job goes on afterwards, so that one launch takes many repeats.
        errors: classes of which every rank must raise one (or a subclass).
        others: if not empty, the classes for ranks other than the one at fault.
        step: whether the error must name the very step (a judged step), some step, or none.
        names: whether the error must name the rank at fault.
        way: words of the way out, of which one must be in the error; none: not checked.
        seconds: until every rank must know.
        environment: of the launch.
        victim: whether the rank at fault is left to raise something; False where it is gone.
        status: the exit status of the rank at fault, if it is to be something; None: anything but 0.
        everywhere: whether it is inflicted on all ranks.
        stuck: whether the rank at fault comes back later, and must then end by itself.
        at_first: whether it shows in the first step.
        slow: whether one repeat takes long.
    """

    name: str
    what: str
    group: str
    loops: tuple[str, ...]
    how: str
    caught: tuple[str, ...] = ()
    errors: tuple[str, ...] = ("HvdlossError",)
    others: tuple[str, ...] = ()
    step: str = "some"
    names: bool = True
    way: tuple[str, ...] = ()
    seconds: float = PROMISE
    environment: Mapping[str, str] = field(default_factory=dict)
    victim: bool = True
    status: int | None = None
    everywhere: bool = False
    stuck: bool = False
    at_first: bool = False
    slow: bool = False


JUDGED = "what a step's numbers show"
AGREED = "what differs between ranks at the first step"
RAISED = "exceptions in user code"
LEFT = "ranks that leave, or are out of step"
KILLED = "ranks that are killed"
STOPPED = "ranks that are stuck"


def _judged(name: str, what: str, error: str, *way: str, **more: object) -> Fault:
    return Fault(
        name,
        what,
        JUDGED,
        ALL,
        "batch",
        ALL,
        (error,),
        step="exact",
        way=way,
        **more,  # type: ignore[arg-type]
    )


def _agreed(name: str, what: str, *way: str, loops: tuple[str, ...] = ALL) -> Fault:
    return Fault(
        name, what, AGREED, loops, "build", loops, ("AgreementError",), step="none", way=way, at_first=True
    )


_AGAIN = ("checkpoint", "same number of steps", "same steps")


def _raised(name: str, what: str, loops: tuple[str, ...] = ALL, **more: object) -> Fault:
    settings: dict[str, object] = {"others": ("RankError",), "errors": (), "way": _AGAIN, **more}
    return Fault(name, what, RAISED, loops, "act", **settings)  # type: ignore[arg-type]


def _ended(name: str, what: str, group: str, how: str, loops: tuple[str, ...] = ALL, **more: object) -> Fault:
    settings: dict[str, object] = {
        "others": ("RankError",),
        "errors": (),
        "way": _AGAIN,
        "victim": False,
        **more,
    }
    return Fault(name, what, group, loops, how, **settings)  # type: ignore[arg-type]


_STALL = {"HVDLOSS_WATCH_STALL": str(STALL)}
_SILENCE = {"HVDLOSS_WATCH_SILENCE": str(SILENCE)}
_MODEL = ("same model", "same order", "broadcast")
_SETTING = ("same arguments", "every rank")

FAULTS = (
    _judged("nan-loss", "a loss that is NaN", "NonFiniteLossError", "weight 0", "learning rate"),
    _judged("infinite-loss", "a loss that is infinite", "NonFiniteLossError", "weight 0", "learning rate"),
    _judged("nan-gradient", "a NaN gradient of a finite loss", "HvdlossError", "weight 0", "learning rate"),
    _judged(
        "infinite-gradient",
        "an infinite gradient of a finite loss",
        "HvdlossError",
        "weight 0",
        "learning rate",
    ),
    _judged("negative-weight", "a weight below zero", "WeightError", "at least 0"),
    _judged("nan-weight", "a weight that is NaN", "WeightError", "finite"),
    _judged("infinite-weight", "an infinite weight", "WeightError", "finite"),
    _judged(
        "no-weight",
        "all weights of all ranks zero",
        "NoWeightError",
        "Skip the step",
        "weights",
        everywhere=True,
        names=False,
    ),
    _agreed("values-differ", "parameters of other values", *_MODEL),
    _agreed("names-differ", "parameters of other names", *_MODEL, loops=ALL),
    _agreed("shapes-differ", "a parameter of another shape", *_MODEL),
    _agreed("dtypes-differ", "parameters of another dtype", *_MODEL),
    _agreed("order-differs", "parameters in another order", *_MODEL),
    _agreed("count-differs", "one layer more", *_MODEL),
    _agreed("reduction-differs", "another reduction", *_SETTING),
    _agreed("loss-differs", "another loss", *_SETTING),
    _agreed("terms-differ", "other terms", *_SETTING),
    _agreed("compression-differs", "another compression", *_SETTING),
    _agreed("passes-differ", "another backward_passes_per_step", *_SETTING, loops=(TORCH, FIT)),
    # A rank's own error, and the same news for the others.
    _raised("weight-shape", "a weight whose shape does not broadcast", caught=(FIT,), way=("shape", *_AGAIN)),
    _raised("raise-between", "an exception between backward and step", (TORCH, TAPE)),
    _raised(
        "raise-caught",
        "an exception between loss and backward that the rank catches, to go on with the next batch",
        (TORCH, TAPE),
        victim=False,
        status=0,
    ),
    _raised("raise-loader", "an exception in the data loader", ALL, caught=(FIT,)),
    Fault(
        "raise-uneven",
        "an exception in the data of hvd.uneven(...)",
        RAISED,
        (TORCH, TAPE),
        "act",
        (TORCH, TAPE),
        ("RankError",),
        way=_AGAIN,
    ),
    _raised("raise-callback", "an exception in a callback at the end of an epoch", (FIT,)),
    _raised("raise-validation", "an exception in the validation data", (FIT,)),
    _raised("raise-early", "an exception right after hvd.init()", ALL, step="none", at_first=True),
    _raised("raise-unstepped", "an exception before a rank's first step", ALL, step="none", at_first=True),
    _ended("end-early", "the script ends before the others'", LEFT, "act", OWN, status=0),
    _ended("sys-exit", "sys.exit(0)", LEFT, "act", ALL, status=0),
    _ended("os-exit", "os._exit(0)", LEFT, "act", ALL, status=0),
    Fault(
        "fewer-steps",
        "fewer steps than the others, then a number of all ranks (`merged_value`)",
        LEFT,
        OWN,
        "act",
        errors=("HvdlossError",),
    ),
    Fault(
        "fewer-steps-plain",
        "the same, with Horovod's own all-reduce",
        LEFT,
        (TORCH, TAPE),
        "act",
        errors=("HvdlossError",),
    ),
    _ended("sigkill", "SIGKILL in the middle of a step", KILLED, "act", ALL),
    _ended("oom", "the kernel's kill for want of memory (SIGKILL at any moment)", KILLED, "signal", ALL),
    _ended("sigterm", "SIGTERM at any moment", KILLED, "signal", ALL),
    _ended("sigsegv", "a crash in native code (SIGSEGV)", KILLED, "act", ALL),
    _ended(
        "sigstop",
        "SIGSTOP, and SIGCONT when the others have ended",
        STOPPED,
        "signal",
        (TORCH, TAPE, FIT),
        seconds=SILENCE + PROMISE,
        environment=_SILENCE,
        stuck=True,
        slow=True,
    ),
    _ended(
        "sleep",
        "user code that sleeps",
        STOPPED,
        "act",
        (TORCH, TAPE, FIT),
        seconds=STALL + PROMISE,
        environment=_STALL,
        stuck=True,
        slow=True,
    ),
    _ended(
        "busy",
        "user code in an endless loop",
        STOPPED,
        "act",
        (TORCH, TAPE, FIT),
        seconds=STALL + PROMISE,
        environment=_STALL,
        stuck=True,
        slow=True,
    ),
    _ended(
        "native",
        "native code that never gives the interpreter's lock back",
        STOPPED,
        "act",
        (TORCH, TAPE, FIT),
        seconds=STALL + PROMISE,
        environment=_STALL,
        stuck=True,
        slow=True,
    ),
)

BY_NAME = {fault.name: fault for fault in FAULTS}
assert len(BY_NAME) == len(FAULTS)
