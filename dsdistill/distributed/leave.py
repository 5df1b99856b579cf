"""End a process that was a rank."""

import atexit
import contextlib
import errno
import os
import sys
import threading

from dsdistill import disk


def leave(code: int = 0) -> None:
    """End this process with an exit code, without the teardown of the interpreter.

    Call it after the process group is left and everything is written. Under CPython 3.13 and earlier, a thread of torch
    that waits for the interpreter during teardown aborts the process (for example gloo's thread, to free a last
    tensor). The exit code then reports a failure, although the work is done (pytorch issues 38228, 190489).
    """
    threading._shutdown()  # the interpreter does this too, and so does multiprocessing before it calls os._exit
    atexit._run_exitfuncs()  # for W&B and the like
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError as error:  # a full disk, or a closed pipe
            code = code or 1
            if stream is sys.stdout and error.errno != errno.EPIPE:
                with contextlib.suppress(OSError):
                    print(f"dsdistill: output cannot be written: {disk.reason(error)}", file=sys.stderr)
    os._exit(code)
