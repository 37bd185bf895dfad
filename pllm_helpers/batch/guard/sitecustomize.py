"""Refuses network use by the Python process that finds this folder on its path, and logs attempts.

Python imports ``sitecustomize`` at start, so ``pllm run --no-network`` reaches kernels and the
processes they start by putting this folder on ``PYTHONPATH``. It works by an audit hook: that sees
every use of Python's sockets, however a library got hold of them. Programs that are not Python,
and libraries with a network stack of their own, are not seen.

Standard library only: it runs before anything else, in every child process.
"""

import json
import os
import sys

LOG = "PLLM_NETWORK_LOG"
EVENTS = ("connect", "sendto", "sendmsg", "getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo")


class NetworkRefused(OSError):
    """A connection or name look-up that leads off this machine."""


def host_of(event, args):
    """The host that ``event`` would reach; empty where it stays on this machine by its nature."""
    if event in ("connect", "sendto", "sendmsg"):
        address = args[1]
        # Unix sockets (text, bytes), connected sockets (None) and netlink (numbers) have no host
        return address[0] if isinstance(address, tuple) and address and isinstance(address[0], str) else ""
    target = args[0]
    if event == "getnameinfo" and isinstance(target, tuple):
        target = target[0]
    if isinstance(target, bytes):
        target = target.decode("ascii", "replace")
    return target or ""


def is_local(host):
    """True for loopback: 127.0.0.0/8, ::1, localhost, and the wildcard that means this machine."""
    host = host.lower().rstrip(".").partition("%")[0]
    if host in ("", "localhost", "::1", "::", "0.0.0.0") or host.endswith(".localhost"):
        return True
    host = host.removeprefix("::ffff:")
    parts = host.split(".")
    return len(parts) == 4 and all(p.isdigit() for p in parts) and parts[0] == "127"


def refuse(event, args):
    """Audit hook: raise, after logging, where a socket would leave this machine."""
    if not event.startswith("socket."):
        return
    event = event[7:]
    if event not in EVENTS:
        return
    host = host_of(event, args)
    if is_local(host):
        return
    # the innermost caller outside the standard library is the one to look at
    frame, where = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        where = where or f"{name}:{frame.f_lineno}"
        if os.sep + "lib" + os.sep + "python" not in name and not name.startswith("<frozen"):
            where = f"{name}:{frame.f_lineno}"
            break
        frame = frame.f_back
    path = os.environ.get(LOG)
    if path:
        line = json.dumps({"event": event, "host": host, "where": where, "pid": os.getpid()})
        with open(path, "a", encoding="utf-8") as log:
            log.write(line + "\n")
    raise NetworkRefused(101, f"network use refused: {event} to {host}")


def _next_sitecustomize():
    """Run the sitecustomize that this one hides, as Python would have."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    rest = [p for p in sys.path if os.path.abspath(p or ".") != here]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


if __name__ == "sitecustomize":
    sys.addaudithook(refuse)
    _next_sitecustomize()
