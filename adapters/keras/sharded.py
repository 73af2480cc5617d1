"""Models whose last layer is split over ranks by class, for Keras (see :mod:`hvdloss.losses.shards`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

import keras
from hvdloss.comm.collectives import resolve_group
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.keras.losses import class_numbers
from hvdloss.losses.shards import ClassShards, Margin
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.collectives import all_gather, copy_to_ranks
from hvdloss.tensorflow.sharded import ShardedCrossEntropy as _CrossEntropy
from hvdloss.tensorflow.sharded import sample_columns

__all__ = ["ShardedCrossEntropy", "ShardedDense", "full_weights", "load_full_weights"]

_CHUNK = 2**20  # entries of a kernel that travel to a checkpoint at a time


class ShardedCrossEntropy(keras.losses.Loss):
    """:func:`hvdloss.tensorflow.sharded_cross_entropy` as a loss of Keras, for an ``Objective``.

    ``hvd.Objective(hvd.ShardedCrossEntropy(head.shards, process_set=groups.model))``: ignored elements are
    then absent from the mean.

    Args:
        shards, process_set, label_smoothing, margin, scale, ignore_index: see
            :func:`hvdloss.tensorflow.sharded_cross_entropy`. `process_set` are the ranks that share the
            model; the objective's are those that share the data.
        name: of the loss in Keras.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self,
        shards: ClassShards,
        *,
        process_set: Any = None,
        label_smoothing: float = 0.0,
        margin: Margin | None = None,
        scale: float = 1.0,
        ignore_index: int = -100,
        name: str = "sharded_cross_entropy",
    ) -> None:
        super().__init__(name=name, reduction=None)
        self._exact = _CrossEntropy(
            shards,
            process_set=process_set,
            label_smoothing=label_smoothing,
            margin=margin,
            scale=scale,
            ignore_index=ignore_index,
        )

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """Return per-element losses of class numbers, (...) or (..., 1), and this rank's logits."""
        return self._exact(y_pred, class_numbers(y_true, y_pred))

    def absent(self, y_true: Any) -> tf.Tensor:
        """Return which elements are to be ignored."""
        return self._exact.absent(y_true)


class ShardedDense(keras.layers.Layer):
    """A ``keras.layers.Dense`` whose units are classes, each rank holding some of them.

    With the same (seeded) initializers the initial weights are those of ``keras.layers.Dense(classes)``,
    for any number of ranks; where they are not seeded, ``keras.utils.set_random_seed`` on all ranks does it.
    (While the layer is built the whole kernel exists for a moment.)

    Args:
        classes: of all ranks together.
        use_bias: whether there is a bias.
        process_set: the ranks that share the classes; None for all.
        sizes: how many classes each of them holds; None for even parts.
        normalize: outputs are cosines, of the input and of the columns of the kernel, for margins; without
            a bias.
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer: as of ``Dense``. A
            regularizer sees this rank's part.
        options: of every layer.

    Attributes:
        kernel: (inputs, C_k), this rank's columns.
        bias: (C_k,), or None.
        shards: which rank holds which classes.

    Raises:
        ConfigError: an argument that cannot be used.
        UsageError: this rank is not in the process set.
    """

    def __init__(
        self,
        classes: int,
        *,
        use_bias: bool = True,
        process_set: Any = None,
        sizes: Sequence[int] | None = None,
        normalize: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        _, self.rank, size = resolve_group(hvd, process_set, "ShardedDense")
        self.process_set = process_set
        self.shards = ClassShards(classes, size, sizes)
        self.use_bias, self.normalize = use_bias, normalize
        if normalize and use_bias:
            raise ConfigError(
                "ShardedDense(normalize=True) gives cosines, which have no bias; pass use_bias=False"
            )
        # In the order in which Dense makes them: each draws a seed of its own.
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make this rank's part of the weights."""
        width, own = int(input_shape[-1] or 0), self.shards.size(self.rank)
        self.kernel = self.add_weight(
            name="kernel",
            shape=(width, own),
            initializer=self._own(self.kernel_initializer),
            regularizer=self.kernel_regularizer,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(own,),
                initializer=self._own(self.bias_initializer),
                regularizer=self.bias_regularizer,
            )
        self.built = True

    def _own(self, initializer: Callable[..., Any]) -> Callable[..., Any]:
        """Return an initializer of this rank's columns of what `initializer` makes."""
        mine = self.shards.range(self.rank)

        def initial(shape: Sequence[int], dtype: Any = None) -> Any:
            return initializer((*shape[:-1], self.shards.classes), dtype=dtype)[..., mine.start : mine.stop]

        return initial

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return the shape of all this rank's logits."""
        return (*input_shape[:-1], self.shards.size(self.rank))

    def call(self, inputs: Any, columns: Any = None) -> tf.Tensor:
        """Return this rank's columns of the logits.

        Args:
            inputs: (..., width), the same on all ranks of the process set.
            columns: which of this rank's columns; None for all. See :meth:`sample`.

        Collectives: none; one all-reduce of the gradient of `inputs` in the backward pass.
        """
        x = copy_to_ranks(inputs, name="hvdloss.sharded_dense", process_set=self.process_set)
        kernel, bias = tf.convert_to_tensor(self.kernel), self.bias
        if columns is not None:
            kernel = tf.gather(kernel, columns, axis=1)
            bias = None if bias is None else tf.gather(tf.convert_to_tensor(bias), columns)
        if self.normalize:
            x, kernel = _unit(x, -1), _unit(kernel, 0)
        out = tf.linalg.matmul(x, kernel) if len(x.shape) == 2 else tf.tensordot(x, kernel, 1)
        return out if bias is None else out + tf.cast(bias, out.dtype)

    def sample(self, target: Any, rate: float, seed: Any = None) -> tf.Tensor:
        """Return which of this rank's columns take part in a step; see ``hvdloss.tensorflow.sample_columns``.

        Call it eagerly (in the data pipeline, say).

        Raises:
            ConfigError: `rate` is out of range.

        Collectives: none.
        """
        return sample_columns(target, self.shards, self.rank, rate, seed)

    def get_config(self) -> dict[str, Any]:
        """Return what :meth:`from_config` takes; the process set is this process's, and is left out."""
        return {
            **super().get_config(),
            "classes": self.shards.classes,
            "use_bias": self.use_bias,
            "sizes": list(self.shards.sizes),
            "normalize": self.normalize,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
        }


def _unit(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Return vectors of length 1; zeros stay."""
    return tf.math.l2_normalize(x, axis, epsilon=1e-24)


# -- checkpoints --------------------------------------------------------------------------------------


def _owners(model: Any) -> dict[int, ShardedDense]:
    """Return the sharded layer of each of its weights, by identity."""
    layers = [model, *getattr(model, "_flatten_layers", lambda: [])()]
    heads = [layer for layer in layers if isinstance(layer, ShardedDense)]
    return {id(weight): head for head in heads for weight in head.weights}


def full_weights(model: Any, *, everywhere: bool = False) -> list[npt.NDArray[Any]] | None:
    """Return the weights of the same model with ordinary ``keras.layers.Dense`` heads.

    In the order of ``model.get_weights()``: ``ordinary.set_weights(...)`` takes them.

    Args:
        model: a model or layer with any number of :class:`ShardedDense`, the same on all ranks that share
            them.
        everywhere: whether all ranks get them, or the first of those that share a head only; others then
            get None, and never hold a whole kernel.

    Collectives: all-gathers of at most 8 MiB (float64) at a time, for each sharded weight. Call it eagerly.
    """
    owners = _owners(model)
    out: list[npt.NDArray[Any]] = []
    complete = True
    for weight in model.weights:
        own = keras.ops.convert_to_numpy(weight)
        head = owners.get(id(weight))
        if head is None:
            out.append(own)
            continue
        whole = _whole(head, own, everywhere or head.rank == 0)
        if whole is None:
            complete = False
        else:
            out.append(whole)
    return out if complete else None


def _whole(head: ShardedDense, own: npt.NDArray[Any], keep: bool) -> npt.NDArray[Any] | None:
    """Gather a weight's columns a few at a time; return them all, or None unless they are to be kept."""
    shards = head.shards
    out = np.empty((*own.shape[:-1], shards.classes), own.dtype) if keep else None
    step = max(1, _CHUNK // max(1, own[..., 0].size * shards.ranks))
    for first in range(0, max(shards.sizes), step):
        sizes = [max(0, min(first + step, size) - first) for size in shards.sizes]
        columns = np.ascontiguousarray(np.moveaxis(own[..., first : first + sizes[head.rank]], -1, 0))
        got = all_gather(
            columns, name="hvdloss.full_weights", process_set=head.process_set, sizes=sizes
        ).numpy()
        if out is None:
            continue
        at = 0
        for rank, size in enumerate(sizes):
            place = shards.offset(rank) + first
            out[..., place : place + size] = np.moveaxis(got[at : at + size], 0, -1)
            at += size
    return out


def load_full_weights(model: Any, weights: Sequence[npt.NDArray[Any]]) -> None:
    """Set weights from those of the same model with ordinary heads; every rank takes its columns.

    Args:
        model: built, with any number of :class:`ShardedDense`.
        weights: as ``ordinary.get_weights()`` returned them, or :func:`full_weights`.

    Raises:
        ShapeError: weights of other shapes, or another number of them; nothing was changed.

    Collectives: none.
    """
    owners = _owners(model)
    if len(weights) != len(model.weights):
        raise ShapeError(f"{len(weights)} weights were given, but the model has {len(model.weights)}")
    parts = []
    for variable, given in zip(model.weights, weights, strict=True):
        head, wanted, part = owners.get(id(variable)), tuple(variable.shape), np.asarray(given)
        if head is not None:
            wanted, mine = (*wanted[:-1], head.shards.classes), head.shards.range(head.rank)
        if part.shape != wanted:
            raise ShapeError(
                f"{variable.path}: the weight given has shape {part.shape}, the whole one {wanted}; make the "
                f"layer with the checkpoint's classes"
            )
        parts.append(part if head is None else part[..., mine.start : mine.stop])
    model.set_weights(parts)
