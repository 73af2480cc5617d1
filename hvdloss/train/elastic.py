"""Horovod's elastic jobs: what a function needs that is rerun after the ranks have changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hvdloss import watch
from hvdloss.comm.world import before_reset, replay_names, reset

__all__ = ["runner"]


class _Synced:
    """A state whose ``sync`` reports lost ranks as the function does that is run."""

    def __init__(self, state: Any, unwrap_errors: Callable[[], AbstractContextManager[None]]) -> None:
        self.state, self._unwrap_errors = state, unwrap_errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def sync(self) -> None:
        """Share rank 0's state; see Horovod's."""
        with self._unwrap_errors():
            self.state.sync()


def runner(
    *,
    run_fn: Callable[..., Any],
    changed: type[Exception],
    failed: type[Exception],
    shutdown: Callable[[], Any],
    init: Callable[[], Any],
    lost: Callable[[Exception], bool] = lambda error: False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the decorator that reruns a function from the last commit when the ranks change.

    It is Horovod's ``elastic.run``, and in addition

    - resets state tied to the old ranks (buckets, traced functions, measurements);
    - gives what the function creates the same message names on ranks that stay, where it is created again,
      and on ranks that have just joined;
    - has listeners (a recorder) release their files before another rank may write them, and notifies them
      which ranks were lost;
    - ends a process that was silent for so long that the others took it for lost, once it comes back:
      another one may have replaced it;
    - restarts, rather than ends, whatever this rank fails with when others are gone (the watch ends what it
      waits in, and Horovod's own code then fails in its own ways);
    - where ranks were only added or removed, by agreement of all, keeps what was done until then: all ranks
      continue from rank 0's state, and the remaining data is sharded again. (Horovod leaves states alone
      where ranks were removed, and data positions would stay those of the others.)

    Args:
        run_fn: ``horovod.common.elastic.run_fn``.
        changed: ``HostsUpdatedInterrupt``.
        failed: ``HorovodInternalError``.
        shutdown, init: of the framework's Horovod module.
        lost: whether an error of the framework means that ranks are gone.
    """

    cause: BaseException | None = None  # of the restart

    @contextmanager
    def unwrap_errors() -> Iterator[None]:
        """Raise, where ranks are gone, the error that makes `run_fn` restart."""
        nonlocal cause
        cause = None
        try:
            yield
        except changed:
            raise
        except Exception as error:
            known = failed(str(error)) if lost(error) and not isinstance(error, failed) else error
            # Horovod's own error too: ranks that still wait must know it before this one ends its watch.
            found = watch.root_cause(known)
            if (gone := watch.excluded_error()) is not None:
                raise gone from error
            if isinstance(found, failed):
                cause = found
            if found is error or not isinstance(found, failed):
                raise
            raise found from error

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        def restart() -> None:
            nonlocal cause
            before_reset()
            shutdown()
            init()
            reset(because=cause)
            cause = None  # whose traceback holds what the function did

        @functools.wraps(function)
        def wrapper(state: Any, *args: Any, **kwargs: Any) -> Any:
            with replay_names() as rewind_names:

                @functools.wraps(function)
                def once(_: Any, *args: Any, **kwargs: Any) -> Any:
                    rewind_names()
                    try:
                        with unwrap_errors():
                            return function(state, *args, **kwargs)
                    except changed as interrupt:
                        state.save()  # all ranks are at the same place, and still here
                        raise changed(False) from interrupt

                return run_fn(once, restart)(_Synced(state, unwrap_errors), *args, **kwargs)

        return wrapper

    return run
