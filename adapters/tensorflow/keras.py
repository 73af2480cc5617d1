"""``import hvdloss.tensorflow.keras as hvd`` stands in for ``import horovod.tensorflow.keras as hvd``.

The same as :mod:`hvdloss.keras`.
"""

from __future__ import annotations

from hvdloss.keras import *  # noqa: F403
from hvdloss.keras import __all__, callbacks  # noqa: F401
