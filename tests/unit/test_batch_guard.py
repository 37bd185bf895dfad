"""The network refusal that --no-network puts into kernels, in Python processes of its own."""

import json
import os
import subprocess
import sys

import pytest

ATTEMPTS = {
    "address": "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)",
    "name": "import urllib.request; urllib.request.urlopen('http://example.org/')",
    "look-up": "import socket; socket.gethostbyname('example.org')",
    "udp": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "ipv6": "import socket; socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))",
    "mapped": "import socket; socket.socket(socket.AF_INET6).connect(('::ffff:192.0.2.1', 80))",
    "non-blocking": "import socket; socket.socket().connect_ex(('192.0.2.1', 80))",
    "asyncio": "import asyncio; asyncio.run(asyncio.open_connection('192.0.2.1', 80))",
    "beneath": "import _socket; _socket.socket().connect(('192.0.2.1', 80))",
    "child": "import subprocess, sys; subprocess.run([sys.executable, '-c', \"import socket; "
    "socket.create_connection(('192.0.2.1', 80), timeout=2)\"], check=True)",
}
LOCAL = """
import asyncio, os, socket, tempfile, threading
for family, host in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET, 'localhost')):
    server = socket.socket(family)
    server.bind((host, 0)); server.listen()
    socket.create_connection((host, server.getsockname()[1])).close()
path = os.path.join(tempfile.mkdtemp(), 's')
server = socket.socket(socket.AF_UNIX); server.bind(path); server.listen()
socket.socket(socket.AF_UNIX).connect(path)
a, b = socket.socketpair(); a.send(b'x'); a.sendmsg([b'y'])
socket.getaddrinfo(None, 80)
socket.getnameinfo(('127.0.0.1', 80), 0)
print('done')
"""


@pytest.fixture
def python(tmp_path, root):
    def run(code, *more_paths):
        log = tmp_path / "network.log"
        paths = [str(root / "pllm_helpers/batch/guard"), *map(str, more_paths)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PLLM_NETWORK_LOG": str(log)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return done, [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize("kind", ATTEMPTS)
def test_attempts_are_refused_and_logged(python, kind):
    done, log = python(ATTEMPTS[kind])
    assert done.returncode == 1 and "network use refused" in done.stderr
    assert len(log) >= 1
    assert log[0]["host"] in ("192.0.2.1", "example.org", "2001:db8::1", "::ffff:192.0.2.1")
    assert log[0]["event"] and log[0]["where"] and log[0]["pid"]


def test_a_caught_attempt_is_still_logged(python):
    done, log = python(
        "import socket\ntry: socket.create_connection(('192.0.2.1', 9))\nexcept OSError: print('caught')"
    )
    assert done.stdout == "caught\n" and [row["host"] for row in log] == ["192.0.2.1"]


def test_this_machine_is_open(python):
    done, log = python(LOCAL)
    assert done.stdout == "done\n", done.stderr
    assert log == []


def test_the_sitecustomize_that_it_hides_still_runs(python, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import builtins; builtins.mine = 'ran'", encoding="utf-8")
    done, _ = python("print(mine)", tmp_path / "site")
    assert done.stdout == "ran\n", done.stderr
