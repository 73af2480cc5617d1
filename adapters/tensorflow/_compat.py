"""What programs written for Horovod with Keras 2 need of Keras 3."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["let_variables_be_called"]


class _CallableList(list[Any]):
    """A list that may be called for itself."""

    def __call__(self) -> list[Any]:
        return self


def let_variables_be_called() -> None:
    """Let ``optimizer.variables()`` be written as in Keras 2 and Horovod's examples; a list in Keras 3."""
    optimizers = (keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer)
    for owner in {next(c for c in o.__mro__ if "variables" in vars(c)) for o in optimizers}:
        plain = vars(owner)["variables"]
        if isinstance(plain, property) and not hasattr(plain.fget, "_hvdloss"):

            def variables(self: Any, get: Any = plain.fget) -> _CallableList:
                return _CallableList(get(self))

            variables._hvdloss = True  # type: ignore[attr-defined]
            variables.__doc__ = plain.__doc__
            owner.variables = property(variables)
