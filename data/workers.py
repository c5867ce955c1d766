"""The first steps of a process of a pool, or of one that reads images ahead.

Imports nothing heavy, since spawned processes import it anew.
"""

import contextlib
import multiprocessing.connection
import os
import signal
import sys
import threading
import time


def start_worker():
    """Leaves Ctrl-C to the parent, which then ends its workers. They end when it is killed, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def start_reader(number):
    """Leaves SIGTERM to the parent, too, which needs the images of the step that it ends.

    Batch systems send SIGTERM to all processes. number: of the worker, from torch.
    """
    start_worker()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def forget_script():
    """Processes that this one spawns do not import its script, which they do not need.

    multiprocessing imports it in each of them where the main module tells its file. With
    evaluate.py comes torch: 4.3 s and 316 MB for each process, not 1.0 s and 64 MB.
    """
    script = sys.modules["__main__"]
    script.__spec__ = None  # of a script that runs as a module
    vars(script).pop("__file__", None)


def _end_with(parent):
    multiprocessing.connection.wait([parent])
    os._exit(1)


@contextlib.contextmanager
def postponed_signals():
    """In its block Ctrl-C and SIGTERM do not interrupt: `stop()` of `with postponed_signals() as stop` is 0 until one comes, then its exit code,
    so that the block can save and leave. Another one, a second or more later, interrupts as ever."""
    first = []  # exit code and time; batch systems and torchrun may send a signal twice at once
    usual = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }

    def note(number, _):
        if not first:
            first.extend((128 + number, time.monotonic()))
        elif time.monotonic() - first[1] > 1:
            signal.signal(number, usual[number])
            signal.raise_signal(number)

    try:
        for number in usual:
            signal.signal(number, note)
        yield lambda: first[0] if first else 0
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
