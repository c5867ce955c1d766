"""The first steps of a process of a pool, or of one that reads images ahead.

Imports nothing heavy, since spawned processes import it anew.
"""

import multiprocessing.connection
import os
import signal
import threading


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


def _end_with(parent):
    multiprocessing.connection.wait([parent])
    os._exit(1)
