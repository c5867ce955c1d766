"""What a process of a pool does first. Imports nothing of weight, since spawned ones import it anew."""
import multiprocessing.connection
import os
import signal
import threading


def start_worker():
    """Ctrl-C and SIGTERM are the parent's to handle, which then ends its workers; when the parent is killed, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()


def _end_with(parent):
    multiprocessing.connection.wait([parent])
    os._exit(1)
