"""What a process of a pool, or one that reads images ahead, does first. Imports nothing of weight, since spawned ones import it anew."""
import multiprocessing.connection
import os
import signal
import threading


def start_worker(number=0):
    """Ctrl-C and SIGTERM are the parent's to handle, which then ends its workers; when it is killed, they end too."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()


def _end_with(parent):
    multiprocessing.connection.wait([parent])
    os._exit(1)
