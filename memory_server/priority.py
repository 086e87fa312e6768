"""Background work that gives way to searches where cores are short."""

import os
import sys
import threading

# Three shares of a core against one: a refresh on a machine full of trainers still gets ahead.
NICENESS = 5
LOWEST = 19


def give_way() -> None:
    """Lower this thread's priority, and that of threads which it starts.

    Only Linux has priorities of threads; elsewhere all stay equal.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(now + NICENESS, LOWEST))
