"""Horovod's elastic jobs: what a function that is run again with other ranks needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hvdloss import watch
from hvdloss.world import numbers_again, release, renew

__all__ = ["runner"]


class _Synced:
    """A state whose ``sync`` tells ranks that are gone as the function that is run does."""

    def __init__(self, state: Any, translated: Callable[[], AbstractContextManager[None]]) -> None:
        self.state, self._translated = state, translated

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def sync(self) -> None:
        """Share rank 0's state; see Horovod's."""
        with self._translated():
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
    """Return the decorator that runs a function again, from the last commit, when ranks come or go.

    It is Horovod's ``elastic.run``, and sees to it besides that

    - what was made for other ranks (plans, traced functions, measurements) is forgotten;
    - what the function itself makes has the same names on the wire on ranks that stay, where it is made
      again, and on ranks that have just come;
    - whoever follows the run (a recorder) lets go of its file before another rank may write it, and is told
      which ranks were lost;
    - a process that was silent for so long that the others took it for lost ends when it comes back, as a
      rank of its host would have ended it: another one may be in its place by then;
    - whatever this rank fails with when others are gone (the watch ends what it waits in, and Horovod's own
      code then fails in its own ways) makes it begin again, and not end;
    - where ranks were only added or taken away, by agreement of all, what was done until then counts, and
      all ranks go on from rank 0's state, with what is left of the data shared out anew. (Horovod leaves
      states alone where ranks were taken away, and data positions would stay those of the others.)

    Args:
        run_fn: ``horovod.common.elastic.run_fn``.
        changed: ``HostsUpdatedInterrupt``.
        failed: ``HorovodInternalError``.
        shutdown, init: of the framework's Horovod module.
        lost: whether an error of the framework means that ranks are gone.
    """

    because: BaseException | None = None  # what it begins again after

    @contextmanager
    def translated() -> Iterator[None]:
        """Raise, where ranks are gone, what `run_fn` begins again after."""
        nonlocal because
        because = None
        try:
            yield
        except changed:
            raise
        except Exception as error:
            known = failed(str(error)) if lost(error) and not isinstance(error, failed) else error
            # Horovod's own error too: ranks that still wait must know it before this one ends its watch.
            found = watch.explained(known)
            if (gone := watch.given_up()) is not None:
                raise gone from error
            if isinstance(found, failed):
                because = found
            if found is error or not isinstance(found, failed):
                raise
            raise found from error

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        def again_with_others() -> None:
            nonlocal because
            release()
            shutdown()
            init()
            renew(because=because)
            because = None  # whose traceback holds what the function did

        @functools.wraps(function)
        def wrapper(state: Any, *args: Any, **kwargs: Any) -> Any:
            with numbers_again() as numbers_begin_again:

                @functools.wraps(function)
                def once(_: Any, *args: Any, **kwargs: Any) -> Any:
                    numbers_begin_again()
                    try:
                        with translated():
                            return function(state, *args, **kwargs)
                    except changed as interrupt:
                        state.save()  # all ranks are at the same place, and still here
                        raise changed(False) from interrupt

                return run_fn(once, again_with_others)(_Synced(state, translated), *args, **kwargs)

        return wrapper

    return run
