"""Errors of one line, and files that are either whole or absent.

Library code raises `Fault`, whose message says what is wrong, where, and what to do. Only a script
prints its own name and exits: `run_script` does that for the stages and the tools.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Fault(Exception):
    """A mistake of the user or a fault of the machine, explained in one line."""


def one_line(error):
    """Return an exception as its type and the first line of its message."""
    message = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {message.splitlines()[0]}"


def is_out_of_memory(error):
    """Return whether torch raised this for lack of memory; on a CPU that has no class."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def run_script(main, kept="", out_of_memory=""):
    """Call main(), and end the process with one line if a fault stops it.

    kept: what a person may rely on after a full disk or Ctrl-C.
    out_of_memory: what to do if the memory does not suffice.
    """
    # a terminal may lack characters of a text; a file, as with nohup, gets each line at once
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)

    name = Path(sys.argv[0]).name
    # every message ends with what a person may rely on
    kept = f"; {kept}" if kept else ""
    try:
        main()
    except Fault as e:
        message = str(e).replace("\n", " ")  # a path may have line ends
        sys.exit(f"{name}: {message}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted{kept}")
    except OSError as e:
        file = f": {e.filename}" if e.filename else ""
        sys.exit(f"{name}: {e.strerror or e}{file}{kept}")
    except (RuntimeError, MemoryError) as e:
        if not (isinstance(e, MemoryError) or is_out_of_memory(e)):
            raise
        advice = f"; {out_of_memory}" if out_of_memory else ""
        sys.exit(f"{name}: out of memory{advice}{kept}")


# --------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def replace_file(path):
    """Yield a binary file that appears under its name only when it is complete.

    It is written under another name, synchronised to the disk, and then renamed.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path, value):
    """Write a JSON file, complete or not at all."""
    with replace_file(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    """Return the content of a JSON file. Raise Fault if it is damaged, OSError if it is missing."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise Fault(f"{path} is damaged: {one_line(e)}; remove it, or restore a copy") from e


def sha256_of(path):
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------
# One process at a time


@contextlib.contextmanager
def lock(path, what, patience=5.0):
    """Hold the file `path` locked during a block. Raise Fault if another process holds it.

    what: names the thing that is used by one process at a time, for the message.
    patience: seconds to wait for the other one, which may just have been killed.

    The system releases the lock of a process that ends, however it ends. The file stays: if it were
    removed, two processes could each lock a file of this name.
    """
    with open(path, "a+") as f:
        deadline = time.monotonic() + patience
        while not try_to_lock(f):
            if time.monotonic() > deadline:
                f.seek(0)
                holder = f.read().strip() or "an unknown process"
                raise Fault(f"{what} is in use by {holder}; wait for it, or stop it")
            time.sleep(0.05)
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        yield


def try_to_lock(f):
    """Return whether this process holds the lock on an open file now, or nobody can."""
    try:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        reason = "this system has no flock"
    except BlockingIOError:
        return False
    except OSError as e:  # some network file systems
        reason = one_line(e)
    print(f"warning: {f.name} cannot be locked ({reason}); start one process at a time here")
    return True
