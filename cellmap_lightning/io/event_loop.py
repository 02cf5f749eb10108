"""The end of zarr-python's event loop: reads and writes that are still running at exit are cancelled.

An error or Ctrl-C ends the call that waits for them, and not the tasks themselves: other chunks of the same box, and
objects that are about to be requested again. zarr-python closes its loop at exit without ending them, and asyncio
would print "Task was destroyed but it is pending!" for each.
"""

import asyncio
import atexit
import functools
import logging

from zarr.core import sync

log = logging.getLogger(__name__)

#: Seconds in which cancelled tasks end; they await nothing while they end, unless a store of user code does.
TIMEOUT = 5.0


@functools.cache
def cancel_at_exit() -> None:
    """Cancel the tasks of zarr-python's event loop when the interpreter exits; further calls have no effect."""
    # Handlers run in the reverse order: before that of zarr-python, which is registered by its import.
    atexit.register(_cancel_all)


def _cancel_all() -> None:
    loop = sync.loop[0]
    if loop is None or not loop.is_running():
        return
    try:
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result(TIMEOUT)
    except TimeoutError:
        log.debug("tasks of zarr-python did not end within %g s after their cancellation", TIMEOUT)


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
