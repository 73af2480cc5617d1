"""The laws of tests/laws with TensorFlow's tape in a ``tf.function``."""

from __future__ import annotations

import laws_tape
from laws_tape import before_case, hvd

__all__ = ["before_case", "hvd"]

LAWS = ("exact", "packed")
EXCEPT = {
    "micro_batches_count_by_what_they_hold": "a tape is one pass; optimizers accumulate",
    "sequences_may_be_cut_by_micro_batches": "a tape is one pass",
    "a_skipped_step_changes_nothing": "a tape makes no update that it could leave out",
}


class driver(laws_tape.driver):
    in_a_function = True
