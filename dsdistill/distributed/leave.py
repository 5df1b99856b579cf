"""The end of a process that was a rank."""

import atexit
import contextlib
import errno
import os
import sys
import threading

from dsdistill import disk


def leave(code: int = 0) -> None:
    """End this process with an exit code, without the teardown of the interpreter.

    Call it once the process group is left and everything is written. A thread of torch's own that waits for the
    interpreter while it goes, such as gloo's with a last tensor to let go of, aborts the process under CPython 3.13
    and before: its work is done, and its exit code says that it failed (pytorch issues 38228, 190489).
    """
    threading._shutdown()  # as the interpreter does, and multiprocessing in processes that it ends in this way
    atexit._run_exitfuncs()  # W&B's and the like
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError as error:  # a full disk, or nobody reads it any more
            code = code or 1
            if stream is sys.stdout and error.errno != errno.EPIPE:
                with contextlib.suppress(OSError):
                    print(f"dsdistill: output cannot be written: {disk.reason(error)}", file=sys.stderr)
    os._exit(code)
