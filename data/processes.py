"""What a process of a pool, or one that reads images ahead, does first. Imports nothing of weight, since spawned ones import it anew."""
import multiprocessing.connection
import os
import signal
import threading


def start_worker():
    """Ctrl-C is the parent's to handle, which then ends its workers; when it is killed, they end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()


def start_reader(number):
    """The same, but SIGTERM too, which batch systems send to all processes, is the parent's: it needs the images of the step that it ends."""
    start_worker()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with(parent):
    multiprocessing.connection.wait([parent])
    os._exit(1)
