"""Processes that work beside the script's own: pools, the first steps of their members, signals.

Imports nothing heavy, since spawned processes import it anew.
"""

import contextlib
import functools
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

# Signals that end a script. A closed terminal sends SIGHUP, which Windows does not have.
ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def handle_ends(handler):
    """Sets the handler of ENDS, but for those that are ignored: nohup ignores SIGHUP."""
    for number in ENDS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


TERMINALS = [fd for fd in (1, 2) if os.isatty(fd)]  # where this process prints


def leave_terminal(number):
    """SIGHUP tells that the terminal is closed: from here on nothing is printed, which would fail.

    number: of a signal.
    """
    if number == getattr(signal, "SIGHUP", None):
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in TERMINALS:
            os.dup2(null, fd)
        os.close(null)


def start_worker():
    """Leaves Ctrl-C to the parent, which then ends its workers. They end when it is killed, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handle_ends(signal.SIG_DFL)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def start_reader(number):
    """Leaves ENDS to the parent, too, which needs the images of the step that it ends.

    Batch systems and terminals send them to all processes. number: of the worker, from torch.
    """
    start_worker()
    handle_ends(signal.SIG_IGN)


def kill_readers():
    """Ends readers that are left when this process exits, for atexit.

    A traceback may keep them. multiprocessing sends SIGTERM to them, which they ignore, and would
    wait for them forever.
    """
    if hasattr(signal, "SIGCHLD"):  # torch would complain of killed workers; Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


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


def map_in_processes(function, shared, items, count):
    """Yields function(shared, item) of every item, in order, computed by `count` processes.

    Each process gets `shared` once, at its start. A count of 1 computes in this process. A worker
    that is killed raises BrokenProcessPool.
    """
    if count == 1:
        yield from map(functools.partial(function, shared), items)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    # Unlike multiprocessing.Pool, this pool notices a killed worker.
    with ProcessPoolExecutor(count, context, _start_task, (function, shared)) as pool:
        yield from pool.map(_run_task, items)


_task = None  # of a process of map_in_processes: what it does to an item


def _start_task(function, shared):
    global _task
    start_worker()
    _task = functools.partial(function, shared)


def _run_task(item):
    return _task(item)


@contextlib.contextmanager
def postponed_signals():
    """In its block, Ctrl-C and ENDS do not interrupt, so that the block can save and leave.

    `with postponed_signals() as stop`: stop() is 0 until a signal comes, then its exit code.
    Another signal, a second or more later, interrupts as ever.
    """
    first = []  # exit code and time; batch systems and torchrun may send a signal twice at once
    usual = {}  # the handlers outside of the block
    for number in (signal.SIGINT, *ENDS):
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):
            usual[number] = handler

    def remember(number, _):
        leave_terminal(number)
        if not first:
            first.extend((128 + number, time.monotonic()))
        elif time.monotonic() - first[1] > 1:
            signal.signal(number, usual[number])
            signal.raise_signal(number)

    try:
        for number in usual:
            signal.signal(number, remember)
        yield lambda: first[0] if first else 0
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
