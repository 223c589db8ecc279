"""The tests of Port Daddy, in the order of its rooms.

    python -m pytest test_port_daddy.py                    everything
    python -m pytest test_port_daddy.py -k pattern_4       one story, in its three forms
    PORT_DADDY_SEED=1234 python -m pytest -k random        the same dice as a run that failed

House rules. Nothing here is mocked: sockets are sockets and processes are processes. There are two ways to have a
daemon, `server` (in this process, quick) and `spawned` (a real `python port_daddy.py serve`, which can be killed); a
test that also asks for `clock` gets a `server` whose leases live on that clock, so that nobody sleeps through a lease.
No port is fixed, no state is shared, no test needs another one to have run. We wait with `eventually`, for a fact and
with a generous deadline; the only pauses are `settle`, 50 ms given to a thread on its way to sleep, and leaving one of
those out can only make a test weaker, never red. What is tested is what was promised: bytes, names, statuses.
"""

import array
import ast
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import heapq
import hmac
import http.client
import http.server
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from pathlib import Path
from typing import Any, Dict, NamedTuple

import pytest

MODULE = Path(__file__).resolve().parent / "port_daddy.py"
sys.path.insert(0, str(MODULE.parent))

import port_daddy  # noqa: E402  (the file beside us, not one that happens to be installed)
from port_daddy import PortDaddy, PortDaddyError  # noqa: E402

LINUX = sys.platform.startswith("linux")
# Most commands below are started as a module, which is compiled once for all of them: a script would be each time.
PROGRAM = [sys.executable, "-m", "port_daddy"]
COMPILED = tempfile.TemporaryDirectory(prefix="port-daddy-compiled-")

# =====================================================================================================================
# 1. TITLE PAGE — the instruments that every test below plays on
# =====================================================================================================================

# ---- waiting --------------------------------------------------------------------------------------------------------


def eventually(look, timeout=10.0):
    """Look every 10 ms until something true is seen, and give it back; a deadline far beyond any honest delay."""
    deadline = time.monotonic() + timeout
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline, f"still not true after {timeout} s: {inspect.getsource(look).strip()}"
        time.sleep(0.01)


def settle():
    """Give a request that was just sent the time to be parked. If it was not, the test has only become easier."""
    time.sleep(0.05)


def in_background(function, *args, **options):
    """Call it in a thread that cannot keep the process alive; `.result(timeout)` gives what it gave."""
    future: Any = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function(*args, **options))
        except BaseException as problem:  # handed over to whoever asks for the result
            future.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    return future


def read_line(stream, timeout=20.0):
    """One line of a child's output, or a failure instead of a hang. Byte by byte: a buffer would hide from `select`
    what it has already swallowed."""
    deadline, line = time.monotonic() + timeout, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"the child said no more than {line!r} in {timeout} s"
        byte = os.read(stream.fileno(), 1)
        if not byte:
            break
        line += byte
    return line.decode()


# ---- the wire -------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    headers: Dict[str, str]
    body: Any

    def __getitem__(self, field):  # answer["token"] reads better than answer.body["token"]
        return self.body[field]


def as_answer(response):
    headers = {name.lower(): value for name, value in response.getheaders()}
    streams = headers.get("content-type", "").startswith("text/event-stream")  # which never ends
    content = b"" if streams else response.read()
    is_json = "json" in headers.get("content-type", "") and content
    return Answer(response.status, headers, json.loads(content) if is_json else content)


class Wire:
    """Plain HTTP, one connection a request: what any program that is not our client would do."""

    def __init__(self, port):
        self.port = port

    def __call__(self, method, path, body=None, headers=(), timeout=20):
        content = None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **dict(headers)} if content is not None else dict(headers)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, content, sent)
            return as_answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path, **options):
        return self("GET", path, **options)

    def post(self, path, body=None, **options):
        return self("POST", path, {} if body is None else body, **options)

    def put(self, path, body=None, **options):
        return self("PUT", path, {} if body is None else body, **options)

    def delete(self, path, body=None, **options):
        return self("DELETE", path, body, **options)


def request_bytes(method="GET", path="/health", body=b"", version="1.1", **headers):
    """A well-formed request; a header given as None is left out."""
    named = {"Host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body and "Content-Length" not in named:
        named["Content-Length"] = str(len(body))
    lines = [f"{method} {path} HTTP/{version}"]
    lines += [f"{name}: {value}" for name, value in named.items() if value is not None]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Line:
    """One connection, bytes in and bytes out, for whatever `http.client` is too polite to send."""

    def __init__(self, port, family="127.0.0.1"):
        self.socket = socket.create_connection((family, port), timeout=10)
        self.file = self.socket.makefile("rb")

    def send(self, data):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused and closed while we still talk
            self.socket.sendall(data)
        return self

    def reply(self):
        """The next reply on this connection."""
        head = self.file.readline()
        assert head.startswith(b"HTTP/1.1 "), head
        headers = {}
        for line in iter(self.file.readline, b"\r\n"):
            assert line.endswith(b"\r\n"), line
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        content = self.file.read(int(headers["content-length"]))
        return Answer(int(head.split()[1]), headers, json.loads(content) if content else None)

    def rest(self):
        """Everything until the other side closes; a connection that stays open fails by its timeout."""
        with contextlib.suppress(ConnectionResetError):  # closing with unread bytes is a reset, and still a close
            return self.file.read()
        return b""

    def closes(self):
        return self.rest() == b""

    def close(self):
        # The file shares the descriptor: without shutdown the other side would not learn of it.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.file.close()
        self.socket.close()


class StreamEvent(NamedTuple):
    kind: str
    id: Any
    data: Any


class Stream:
    """A reader of Server-Sent Events that knows nothing but their grammar."""

    def __init__(self, port, path, headers=(), timeout=15):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        self.connection.request("GET", path, headers={"Accept": "text/event-stream", **dict(headers)})
        self.response = self.connection.getresponse()
        assert self.response.status == 200, self.response.read()
        assert self.response.getheader("Content-Type").startswith("text/event-stream")

    def next(self):
        kind, ident, data = "message", None, []
        while True:
            line = self.response.readline()
            assert line, "the stream ended"
            line = line.rstrip(b"\r\n").decode()
            if not line and data:
                return StreamEvent(kind, ident, json.loads("\n".join(data)))
            if not line:
                kind, ident = "message", None
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                kind = value
            elif name == "id":
                ident = int(value)
            elif name == "data":
                data.append(value)

    def messages(self, count):
        """The next so many messages, whatever else the stream says in between."""
        found = []
        while len(found) < count:
            event = self.next()
            if event.kind not in ("connected", "gap", "reset"):
                found.append(event)
        return found

    def close(self):
        self.response.close()
        self.connection.close()


# ---- time -----------------------------------------------------------------------------------------------------------


class FakeClock:
    """A clock that moves when told. It starts where the real one stands, so that signatures and ages look natural."""

    def __init__(self):
        self.wall, self.awake, self.boot, _ = port_daddy.Clock().now()
        self.asleep, self.daemon = 0, None

    def now(self):
        return port_daddy.Now(self.wall, self.awake, self.boot)

    def slept(self):
        return self.asleep

    def advance(self, ms):
        """Time passes as usual: the daemon has looked at the clock all the while."""
        with self.daemon.store.guard if self.daemon else contextlib.nullcontext():
            if self.daemon:
                self.daemon.now()
                self.daemon.leases.expect(ms)
            return self.stall(ms)

    def stall(self, ms):
        """Time passes, and the daemon does not run meanwhile."""
        self.wall += ms
        self.awake += ms
        if not self.daemon:
            return None
        self.daemon.bell.ring("courier")  # who sleeps on the real clock until something is due
        return self.daemon.tick(self.daemon.now())

    def sleep(self, ms):
        """The machine sleeps."""
        self.wall += ms
        self.asleep += ms


# ---- processes ------------------------------------------------------------------------------------------------------


def environment(**more):
    """Our own environment without what would point a child at somebody's daily daemon."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("PORT_DADDY", "XDG_STATE", "PYTHONDONTWRITE"))}
    return {**kept, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(MODULE.parent),
            "PYTHONPYCACHEPREFIX": COMPILED.name, **{name: str(value) for name, value in more.items()}}


def end(process):
    """Kill a child with everything in its process group, and close what connects us."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    for stream in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.close()


class Spawned:
    """A real daemon in a process of its own, with its own folder: the one that can be killed."""

    def __init__(self, home, **more):
        self.home = Path(home)
        self.more = more
        self.errors = self.home.parent / f"{self.home.name}.stderr"
        self.process = self.port = self.url = None

    def environment(self, **more):
        return environment(**{"PORT_DADDY_HOME": self.home, "PORT_DADDY_PORT": self.port or 0, **self.more, **more})

    def start(self):
        """Start it, on the same port when it had one, so that those who knew it find it again."""
        with open(self.errors, "a") as errors:
            self.process = subprocess.Popen(
                [*PROGRAM, "serve"], env=self.environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        line = read_line(self.process.stdout)
        found = re.fullmatch(r"port-daddy (\S+) listening on (http://127\.0\.0\.1:(\d+))\n", line)
        assert found, (line, self.errors.read_text())
        self.url, self.port = found[2], int(found[3])
        return self

    def kill(self):
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()

    def terminate(self):
        self.process.terminate()
        return self.process.wait(10)

    @property
    def wire(self):
        return Wire(self.port)


class CommandLine:
    """`python port_daddy.py …` as a real process, with the environment of one daemon or folder."""

    def __init__(self, **more):
        self.environment = environment(**more)
        self.started = []

    def __call__(self, *args, input=None, timeout=40, **more):
        return subprocess.run(
            [*PROGRAM, *map(str, args)], input=input, timeout=timeout, text=True,
            capture_output=True, stdin=None if input is not None else subprocess.DEVNULL,
            env={**self.environment, **more})

    def json(self, *args, **options):
        """What a command that succeeds says with --json."""
        done = self(*args, "--json", **options)
        assert done.returncode == 0, done
        return json.loads(done.stdout)

    def start(self, *args, **options):
        process = subprocess.Popen(
            [*PROGRAM, *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True, env=self.environment, **options)
        self.started.append(process)
        return process


# ---- receivers of webhooks ------------------------------------------------------------------------------------------


class Delivery(NamedTuple):
    headers: Dict[str, str]
    body: bytes
    answered: Any

    @property
    def event(self):
        return json.loads(self.body)


class Receiver:
    """A web server of somebody else. Its behaviour is a list: the statuses it answers with, one after the other, or
    "hang"; when the list is used up it answers 200."""

    def __init__(self):
        self.behaviour, self.got, self.guard, self.closing = [], [], threading.Lock(), threading.Event()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with receiver.guard:
                    step = receiver.behaviour.pop(0) if receiver.behaviour else 200
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    receiver.got.append(Delivery(headers, body, step))
                if step == "hang":
                    receiver.closing.wait(30)
                    step = 200
                self.send_response(step)
                if step in (301, 302, 307):
                    self.send_header("Location", receiver.url + "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(OSError):  # a daemon that was killed in the middle is no news here
                    super().handle()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def types(self):
        return [delivery.event["type"] for delivery in list(self.got)]

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def expected_signatures(headers, body, secret):
    """Both families, written from their descriptions and not with the code under test."""
    key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode()
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    return ("sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest(),
            "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode())


# ---- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def make_server(tmp_path):
    """Servers in this process, as many as a test likes; `make_server.stop(one)` to end one before the test ends."""
    made = []

    def make(clock=None, home=None, **environ):
        settings = port_daddy.Settings.load({
            "PORT_DADDY_HOME": str(home or tmp_path / f"home-{len(made)}"), "PORT_DADDY_PORT": "0", **environ})
        server = port_daddy.Server(settings, clock=clock or port_daddy.Clock())
        server.start()
        made.append(server)
        if clock:
            clock.daemon = server.daemon
        return server

    def stop(server):
        made.remove(server)
        server.stop()

    make.stop = stop
    yield make
    for server in reversed(made):
        server.stop()


@pytest.fixture
def server(make_server, request):
    """One daemon in this process, living by the fake `clock` when the test asks for that too."""
    return make_server(clock=request.getfixturevalue("clock") if "clock" in request.fixturenames else None)


@pytest.fixture
def wire(server):
    return Wire(server.port)


@pytest.fixture
def pd(server):
    return PortDaddy(url=server.url)


@pytest.fixture
def raw(server):
    """Bytes in, and every byte that comes back until the daemon closes the connection."""
    def exchange(data):
        line = Line(server.port)
        try:
            return line.send(data).rest()
        finally:
            line.close()
    return exchange


@pytest.fixture
def spawn(tmp_path):
    """Real daemons, as many as a test likes, not yet started."""
    made = []

    def make(**more):
        made.append(Spawned(tmp_path / f"spawned-{len(made)}", **more))
        return made[-1]

    yield make
    for daemon in made:
        if daemon.process:
            end(daemon.process)


@pytest.fixture
def spawned(spawn):
    return spawn().start()


@pytest.fixture
def cli(server):
    """The command line, pointed at `server`."""
    command = CommandLine(PORT_DADDY_URL=server.url, PORT_DADDY_HOME=server.daemon.settings.home)
    yield command
    for process in command.started:
        end(process)


@pytest.fixture
def fresh(tmp_path):
    """The command line on a machine where no daemon runs; whatever it starts is ended with the test."""
    home = tmp_path / "fresh"
    command = CommandLine(PORT_DADDY_HOME=home, PORT_DADDY_PORT=0)
    command.home = home
    yield command
    for process in command.started:
        end(process)
    with contextlib.suppress(OSError, ValueError, KeyError):
        pid = json.loads((home / "daemon.json").read_text())["pid"]
        if pid != os.getpid():  # one test writes that file itself
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def second_receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def children():
    """Start programs that do not outlive the test."""
    started = []

    def start(*command, **options):
        process = subprocess.Popen(
            [str(part) for part in command], text=True, start_new_session=True,
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **options})
        started.append(process)
        return process

    yield start
    for process in started:
        end(process)


@pytest.fixture
def curl(server, tmp_path):
    """Run shell lines written for localhost:9876 against the daemon of this test; gives the replies, one a command."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")

    def run(lines, timeout=40):
        lines = lines.replace("localhost:9876", f"localhost:{server.port}").replace("curl ", "curl -sS ")
        done = subprocess.run(["sh", "-e", "-c", lines], capture_output=True, text=True, timeout=timeout, cwd=tmp_path,
                              env=environment(no_proxy="*"))
        assert done.returncode == 0, done
        decoder, replies, text = json.JSONDecoder(), [], done.stdout.strip()
        while text:
            reply, length = decoder.raw_decode(text)
            replies.append(reply)
            text = text[length:].lstrip()
        return replies

    return run


@pytest.fixture
def dice():
    """Seeded chance; the seed is printed, and pytest shows it with the failure."""
    seed = int(os.environ.get("PORT_DADDY_SEED") or int.from_bytes(os.urandom(4), "big"))
    print(f"again with: PORT_DADDY_SEED={seed}")
    return random.Random(seed)


# ---- small facts that many tests want -------------------------------------------------------------------------------

ALIVE = "import sys; print('alive', flush=True); sys.stdin.readline()"

LISTENER = """
import socket, sys
print("alive", flush=True)
family, host, port = sys.stdin.readline().split()
listener = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((host, int(port)))
listener.listen()
print("listening", flush=True)
sys.stdin.readline()
"""


def started_listener(children):
    """A process that is already alive and listens once it is told where."""
    process = children(sys.executable, "-c", LISTENER)
    assert read_line(process.stdout) == "alive\n"
    return process


def listen(process, port, host="127.0.0.1"):
    process.stdin.write(f"{6 if ':' in host else 4} {host} {port}\n")
    process.stdin.flush()
    assert read_line(process.stdout) == "listening\n"
    return process


def free_port_block(count):
    """The first of so many neighbouring ports on which nothing is bound right now."""
    for first in random.Random(os.getpid() ^ time.monotonic_ns()).sample(range(20000, 30000, count), 200):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                        probe = held.enter_context(socket.socket(family))
                        if family == socket.AF_INET6:
                            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                        probe.bind((host, port))
            except OSError:
                continue
            return first
    raise AssertionError(f"no {count} neighbouring ports are free on this machine")


def facts(entry):
    """What an entry of the activity log knows."""
    return {**(entry.get("metadata") or {}), **(entry["details"] if isinstance(entry["details"], dict) else {})}


def log(pd, kind):
    """The entries of one type, oldest first."""
    return pd.get_activity(type=kind)["entries"][::-1]


def fingerprint(wire):
    """What must be equal before and after a request that was refused: the log, the messages, and all that is listed."""
    newest = wire.get("/activity?limit=1")["entries"]
    return (newest and newest[0]["id"], wire.get("/channels")["channels"],
            [(lock["name"], lock["owner"], lock["token"], lock["metadata"]) for lock in wire.get("/locks")["locks"]],
            [(s["id"], s["port"], s["status"], s["metadata"]) for s in wire.get("/services")["services"]],
            [(a["id"], a["lastHeartbeat"], a["metadata"]) for a in wire.get("/agents")["agents"]],
            [(h["id"], h["url"], h["events"], h["active"]) for h in wire.get("/webhooks")["webhooks"]])


class Cutter:
    """A wire between a client and its daemon that swallows one reply: of the next request that begins like `cut`, the
    daemon gets all, and the client nothing but the end of its connection."""

    def __init__(self, port):
        self.daemon, self.cut, self.cuts = port, None, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        with client, socket.create_connection(("127.0.0.1", self.daemon)) as daemon, contextlib.suppress(OSError):
            replies = daemon.makefile("rb")
            while True:
                request = client.recv(65536)
                if not request:
                    return
                daemon.sendall(request)
                head = b"".join(iter(replies.readline, b"\r\n")) + b"\r\n"
                reply = head + replies.read(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
                if self.cut and request.startswith(self.cut):
                    self.cut, self.cuts = None, self.cuts + 1
                    return
                client.sendall(reply)

    def close(self):
        self.listener.close()


@pytest.fixture
def cutter(server):
    cutter = Cutter(server.port)
    yield cutter
    cutter.close()


@pytest.fixture
def typed(server, monkeypatch, capfd):
    """The command line in this process, which is quick, for commands that start nothing: status, stdout, stderr."""
    monkeypatch.setenv("PORT_DADDY_URL", server.url)
    monkeypatch.setenv("PORT_DADDY_HOME", server.daemon.settings.home)
    monkeypatch.delenv("PORT_DADDY_AGENT", raising=False)

    def run(*words):
        capfd.readouterr()
        status = port_daddy.main([str(word) for word in words])
        said = capfd.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def busy_receiver():
    """A receiver that asks to be left alone: it gives its `answers`, (status, Retry-After), and 200 after those."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, said = there.answers.pop(0) if there.answers else (200, "0")
            self.send_response(status)
            self.send_header("Retry-After", said)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    there = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.daemon_threads, there.answers, there.url = True, [], f"http://127.0.0.1:{there.server_port}/"
    threading.Thread(target=there.serve_forever, args=(0.02,), daemon=True).start()
    yield there
    there.shutdown()
    there.server_close()


# =====================================================================================================================
# STORIES — the patterns people hold in their hands: with curl, with the client, on the command line
# =====================================================================================================================

# ---- pattern 1: leader election -------------------------------------------------------------------------------------


def test_pattern_1_leader_election_with_curl(curl):
    won, lost = curl("""
        curl -X POST localhost:9876/locks/leader-election -H 'Content-Type: application/json' \
          -d '{"owner":"agent-1","ttl":60000}'
        curl -X POST localhost:9876/locks/leader-election -H 'Content-Type: application/json' \
          -d '{"owner":"agent-2","ttl":60000}'
    """)
    assert won["success"] and won["owner"] == "agent-1" and won["token"] > 0
    assert not lost["success"] and lost["code"] == "LOCK_HELD" and lost["holder"] == "agent-1"
    published, polled = curl("""
        curl -X POST localhost:9876/msg/tasks -H 'Content-Type: application/json' \
          -d '{"payload":{"action":"build","target":"frontend"}}'
        curl "localhost:9876/msg/tasks/poll?timeout=30000"
    """)
    assert polled["message"]["payload"] == {"action": "build", "target": "frontend"}
    assert polled["message"]["id"] == published["id"]


def test_pattern_1_leader_election_in_python(server):
    def campaign(name):
        pd = PortDaddy(url=server.url, agent_id=name)
        try:
            pd.lock("leader-election", owner=pd.agent_id, ttl=60000)
            pd.publish("tasks", {"action": "build", "target": "frontend"})
            return "leader"
        except PortDaddyError as problem:
            assert problem.status == 409
            return pd.poll("tasks")["message"]["payload"]

    campaigns = [in_background(campaign, f"agent-{n}") for n in (1, 2)]
    ended = [campaign.result(20) for campaign in campaigns]
    assert sorted(ended, key=str) == sorted(["leader", {"action": "build", "target": "frontend"}], key=str)


def test_pattern_1_leader_election_on_the_command_line(cli):
    assert cli("lock", "leader-election", "--owner", "agent-1", "--ttl", "60s").returncode == 0
    lost = cli("lock", "leader-election", "--owner", "agent-2", "--ttl", "60s")
    assert lost.returncode == 4 and "agent-1" in lost.stderr
    assert cli("pub", "tasks", '{"action": "build", "target": "frontend"}').returncode == 0
    assert cli.json("poll", "tasks")["message"]["payload"] == {"action": "build", "target": "frontend"}


# ---- pattern 2: work distribution -----------------------------------------------------------------------------------


def test_pattern_2_work_distribution_with_curl(curl):
    first, second = curl("""
# Coordinator publishes tasks
curl -X POST localhost:9876/msg/tasks \\
  -H 'Content-Type: application/json' \\
  -d '{"payload":{"type":"test","suite":"unit","files":["a.test.js","b.test.js"]}}'

curl -X POST localhost:9876/msg/tasks \\
  -H 'Content-Type: application/json' \\
  -d '{"payload":{"type":"test","suite":"integration","files":["api.test.js"]}}'
    """)
    assert first["success"] and second["id"] > first["id"]
    worker = 'curl "localhost:9876/msg/tasks/poll?timeout=30000"\n'
    one, two = curl(worker + worker)
    assert one["message"]["payload"] == {"type": "test", "suite": "unit", "files": ["a.test.js", "b.test.js"]}
    assert two["message"]["payload"] == {"type": "test", "suite": "integration", "files": ["api.test.js"]}
    assert curl('curl "localhost:9876/msg/tasks/poll?timeout=50"')[0]["message"] is None


def test_pattern_2_work_distribution_in_python(server, pd):
    def worker():
        mine, own = [], PortDaddy(url=server.url)
        while True:
            message = own.poll("tasks", timeout=10_000)["message"]
            if message["payload"] == "done":
                return mine
            mine.append(message["payload"])

    workers = [in_background(worker) for _ in range(3)]
    for number in range(12):
        pd.publish("tasks", {"suite": number})
    for _ in workers:
        pd.publish("tasks", "done")
    shares = [worker.result(30) for worker in workers]
    assert sorted(task["suite"] for share in shares for task in share) == list(range(12))


def test_pattern_2_work_distribution_on_the_command_line(cli):
    workers = [cli.start("poll", "tasks", "--timeout", "30s", "--json") for _ in range(2)]
    for suite in ("unit", "integration"):
        assert cli("pub", "tasks", json.dumps({"suite": suite})).returncode == 0
    got = [json.loads(worker.communicate(timeout=30)[0])["message"]["payload"]["suite"] for worker in workers]
    assert sorted(got) == ["integration", "unit"]


# ---- pattern 3: pipeline --------------------------------------------------------------------------------------------


def test_pattern_3_pipeline_with_curl(curl, server, children):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    tester, deployer = (children("curl", "-sN", f"localhost:{server.port}/msg/pipeline/subscribe") for _ in range(2))

    def heard(agent, stage):
        while True:
            line = read_line(agent.stdout)
            if line.startswith("data:") and f'"{stage}"' in line:
                return json.loads(line[5:])["payload"]

    def connected(agent):
        while "connected" not in read_line(agent.stdout):
            pass

    connected(tester)
    connected(deployer)
    stage = ("curl -X POST localhost:9876/msg/pipeline -H 'Content-Type: application/json' "
             """-d '{"payload":{"stage":"%s","status":"complete"}}'\n""")
    curl(stage % "build")
    assert heard(tester, "build") == {"stage": "build", "status": "complete"}
    curl(stage % "test")
    assert heard(deployer, "test") == {"stage": "test", "status": "complete"}
    held, _, freed = curl(
        """curl -X POST localhost:9876/locks/deploy-prod -d '{"owner":"deploy"}'\n"""
        + stage % "deploy" + "curl -X DELETE 'localhost:9876/locks/deploy-prod?owner=deploy'\n")
    assert held["owner"] == "deploy" and freed["released"] is True


def test_pattern_3_pipeline_in_python(server, pd):
    def stage(name, waits_for, lock=None):
        own = PortDaddy(url=server.url, agent_id=name)
        for message in own.subscribe("pipeline", after=0):
            if message["payload"]["stage"] == waits_for:
                break
        if lock:
            own.lock(lock)
        own.publish("pipeline", {"stage": name, "status": "complete"})
        if lock:
            assert own.unlock(lock)["released"] is True

    stages = [in_background(stage, "deploy", "test", lock="deploy-prod"), in_background(stage, "test", "build")]
    pd.publish("pipeline", {"stage": "build", "status": "complete"})
    for done in stages:
        done.result(20)
    said = [message["payload"]["stage"] for message in pd.get_messages("pipeline")["messages"]]
    assert said == ["build", "test", "deploy"]
    assert pd.check_lock("deploy-prod")["held"] is False


def test_pattern_3_pipeline_on_the_command_line(cli):
    tester = cli.start("sub", "pipeline", "--after", "0", "--json")
    assert cli("pub", "pipeline", '{"stage": "build", "status": "complete"}').returncode == 0
    assert json.loads(read_line(tester.stdout))["payload"]["stage"] == "build"
    assert cli("lock", "deploy-prod", "--owner", "deploy").returncode == 0
    assert cli("pub", "pipeline", '{"stage": "deploy", "status": "complete"}').returncode == 0
    assert cli("unlock", "deploy-prod", "--owner", "deploy").returncode == 0
    assert json.loads(read_line(tester.stdout))["payload"]["stage"] == "deploy"


# ---- pattern 4: a shared resource -----------------------------------------------------------------------------------


def test_pattern_4_shared_resource_with_curl(curl):
    held, refused, freed, taken = curl("""
        curl -X POST localhost:9876/locks/db-migration -d '{"owner":"agent-1","ttl":120000}'
        curl -X POST localhost:9876/locks/db-migration -d '{"owner":"agent-2"}'
        curl -X DELETE localhost:9876/locks/db-migration -d '{"owner":"agent-1"}'
        curl -X POST localhost:9876/locks/db-migration -d '{"owner":"agent-2","wait":5000}'
    """)
    assert held["expiresAt"] - held["acquiredAt"] == 120000
    assert (refused["code"], refused["holder"]) == ("LOCK_HELD", "agent-1")
    assert refused["expiresAt"] == held["expiresAt"]
    assert freed["released"] is True and taken["token"] > held["token"]


def test_pattern_4_shared_resource_in_python(server, pd):
    migrating, finish, order = threading.Event(), threading.Event(), []

    def migration():
        order.append("migration")
        migrating.set()
        assert finish.wait(20)
        order.append("migrated")
        return "done"

    agent_1 = PortDaddy(url=server.url, agent_id="agent-1")
    first = in_background(agent_1.with_lock, "db-migration", migration, ttl=120_000)
    assert migrating.wait(20)
    with pytest.raises(PortDaddyError) as refused:
        pd.lock("db-migration", owner="agent-2")
    assert refused.value.status == 409 and refused.value.code == "LOCK_HELD"

    def second():
        with PortDaddy(url=server.url, agent_id="agent-2").with_lock("db-migration") as held:
            order.append("second")
            return held.token

    other = in_background(second)
    eventually(lambda: pd.check_lock("db-migration")["waiting"] == 1)
    finish.set()
    assert first.result(20) == "done" and other.result(20) > 0
    assert order == ["migration", "migrated", "second"]
    assert pd.check_lock("db-migration")["held"] is False


def test_pattern_4_shared_resource_on_the_command_line(cli, pd, tmp_path):
    program = f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; echo $0"
    first = cli.start("with-lock", "db-migration", "--ttl", "2m", "--", "sh", "-c", program, "one")
    eventually(lambda: pd.check_lock("db-migration")["held"])
    assert cli("lock", "db-migration", "--owner", "agent-2").returncode == 4
    second = cli.start("with-lock", "db-migration", "--", "sh", "-c", program, "two")
    eventually(lambda: pd.check_lock("db-migration")["waiting"] == 1)
    (tmp_path / "go").touch()
    assert first.communicate(timeout=30)[0] == "one\n" and second.communicate(timeout=30)[0] == "two\n"
    assert first.returncode == second.returncode == 0


# ---- pattern 5: service discovery -----------------------------------------------------------------------------------


def test_pattern_5_service_discovery_with_curl(curl):
    claimed, = curl("""curl -X POST localhost:9876/claim -H 'Content-Type: application/json' \
        -d '{"id":"myapp:api:main"}'""")
    address = f"http://localhost:{claimed['port']}"
    set_, found = curl(f"""
        curl -X PUT localhost:9876/services/myapp:api:main/endpoints/local -d '{{"url":"{address}"}}'
        curl localhost:9876/services/myapp%3Aapi%3Amain
    """)
    assert set_["success"] and found["endpoints"]["local"] == address
    assert found["service"]["endpoints"] == found["endpoints"] and found["port"] == claimed["port"]


def test_pattern_5_service_discovery_in_python(server, pd):
    port = pd.claim("myapp:api:main")["port"]
    pd.set_endpoint("myapp:api:main", "local", f"http://localhost:{port}")
    frontend = PortDaddy(url=server.url, agent_id="frontend")
    assert frontend.get_service("myapp:api:main")["endpoints"]["local"] == f"http://localhost:{port}"


def test_pattern_5_service_discovery_on_the_command_line(cli):
    port = cli("claim", "myapp:api:main", "-q").stdout.strip()
    assert port.isdigit()
    address = f"http://localhost:{port}"
    assert cli("endpoint", "set", "myapp:api:main", "local", address).returncode == 0
    assert cli("url", "myapp:api:main").stdout.strip() == address
    listed = cli.json("find", "myapp:*")
    assert [(service["id"], service["port"]) for service in listed["services"]] == [("myapp:api:main", int(port))]


# ---- pattern 6: health-aware orchestration --------------------------------------------------------------------------


def is_healthy_worker(agent):
    return agent["type"] == "worker" and time.time() * 1000 - agent["lastHeartbeat"] < 60000


def test_pattern_6_health_with_curl(curl):
    registered, = curl("""curl -X POST localhost:9876/agents -H 'Content-Type: application/json' \
        -d '{"name":"Worker-1","type":"worker"}'""")
    beat, listed = curl(f"""
        curl -X POST localhost:9876/agents/{registered['agentId']}/heartbeat
        curl "localhost:9876/agents?active=true"
    """)
    assert registered["registered"] is True and beat["success"]
    assert [agent["name"] for agent in listed["agents"] if is_healthy_worker(agent)] == ["Worker-1"]


def test_pattern_6_health_in_python(server, pd):
    worker = PortDaddy(url=server.url)
    worker.register(name="Worker-1", type="worker")
    heartbeats = worker.start_heartbeat(30000)
    try:
        agents = pd.list_agents(active_only=True)["agents"]
        assert [agent["name"] for agent in agents if is_healthy_worker(agent)] == ["Worker-1"]
    finally:
        heartbeats.stop()


def test_pattern_6_health_on_the_command_line(cli):
    agent = cli.json("agent", "register", "--name", "Worker-1", "--type", "worker")["agentId"]
    assert cli("agent", "heartbeat", agent).returncode == 0
    agents = cli.json("agents", "--active")["agents"]
    assert [each["name"] for each in agents if is_healthy_worker(each)] == ["Worker-1"]
    assert cli("agent", "unregister", agent).returncode == 0
    assert cli.json("agents", "--active")["count"] == 0


# ---- pattern 8: webhooks --------------------------------------------------------------------------------------------


def heard_claim_and_release(receiver, secret="my-hmac-secret"):
    eventually(lambda: len(receiver.got) == 2)
    assert receiver.types() == ["service.claim", "service.release"]
    for delivery in receiver.got:
        ours, standard = expected_signatures(delivery.headers, delivery.body, secret)
        assert delivery.headers["x-portdaddy-signature"] == ours
        assert standard in delivery.headers["webhook-signature"].split()


def test_pattern_8_webhooks_with_curl(curl, receiver):
    added, claimed, released = curl("""
# Register webhook for service events
curl -X POST localhost:9876/webhooks \\
  -H 'Content-Type: application/json' \\
  -d '{
    "url": "http://localhost:8080/port-daddy-events",
    "events": ["service.claim", "service.release"],
    "secret": "my-hmac-secret"
  }'
curl -X POST localhost:9876/claim -H 'Content-Type: application/json' -d '{"id":"myapp:api:main"}'
curl -X DELETE 'localhost:9876/release?id=myapp:api:main'
    """.replace("localhost:8080", f"localhost:{receiver.port}"))
    assert added["success"] and "my-hmac-secret" not in json.dumps(added) and released["released"] == 1
    heard_claim_and_release(receiver)
    assert receiver.got[0].event["data"]["port"] == claimed["port"]


def test_pattern_8_webhooks_in_python(pd, receiver):
    pd.add_webhook(f"http://localhost:{receiver.port}/port-daddy-events",
                   events=["service.claim", "service.release"], secret="my-hmac-secret")
    pd.claim("myapp:api:main")
    pd.release("myapp:api:main")
    heard_claim_and_release(receiver)


def test_pattern_8_webhooks_on_the_command_line(cli, receiver):
    address = f"http://localhost:{receiver.port}/port-daddy-events"
    assert cli("webhook", "add", address, "--events", "service.claim,service.release",
               "--secret", "my-hmac-secret").returncode == 0
    assert cli("claim", "myapp:api:main").returncode == 0
    assert cli("release", "myapp:api:main").returncode == 0
    heard_claim_and_release(receiver)
    listed = cli("webhook", "list")
    assert address in listed.stdout and "my-hmac-secret" not in listed.stdout


# ---- with real programs: one database, two migrations ---------------------------------------------------------------

MIGRATION = r"""
import os, sqlite3, subprocess, sys, time

def sql(text):
    "One statement in the shared database, of whichever kind it is; the first column of the first row."
    if os.environ["DATABASE"].endswith(".sqlite"):
        with sqlite3.connect(os.environ["DATABASE"], isolation_level=None) as database:
            row = database.execute(text).fetchone()
            return str(row[0]) if row else ""
    psql = ["psql", "-h", os.environ["DATABASE"], "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-Atqc", text]
    return subprocess.run(psql, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

catalogue = "sqlite_master WHERE name" if os.environ["DATABASE"].endswith(".sqlite") else "pg_tables WHERE tablename"
if sql("SELECT count(*) FROM %s = 'invoices'" % catalogue) != "0":
    print("already migrated")
    sys.exit()
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.02)
sql("CREATE TABLE invoices (id integer PRIMARY KEY)")  # a second time it would fail
sql("INSERT INTO invoices VALUES (1)")
print("migrated")
"""


@pytest.fixture
def database():
    """A PostgreSQL of our own, on a Unix socket in a folder of its own; SQLite where the machine has none."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    folder = Path(tempfile.mkdtemp(prefix="pd-"))  # not tmp_path: its user must be able to walk there
    if not binaries or not shutil.which("psql"):
        yield folder / "shared.sqlite"
        shutil.rmtree(folder)
        return
    as_user: Dict[str, Any] = {"env": environment(HOME=folder), "cwd": folder}
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        as_user.update(user="postgres", group="postgres", extra_groups=[])
    subprocess.run([binaries[-1], "-D", "data", "-U", "postgres", "-A", "trust", "--no-sync"], check=True,
                   stdout=subprocess.DEVNULL, timeout=60, **as_user)
    cluster = subprocess.Popen(
        [binaries[-1].parent / "postgres", "-D", "data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **as_user)
    try:
        eventually(lambda: subprocess.run(
            ["psql", "-h", folder, "-U", "postgres", "-c", "SELECT 1"], capture_output=True).returncode == 0, 30)
        yield folder
    finally:
        cluster.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown; it takes its own children along
        cluster.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def test_two_migrations_of_one_real_database_run_once(cli, pd, database, tmp_path):
    (tmp_path / "migrate.py").write_text(MIGRATION)
    cli.environment.update(DATABASE=str(database), GO=str(tmp_path / "go"))
    command = ("with-lock", "db-migration", "--", sys.executable, str(tmp_path / "migrate.py"))
    first = cli.start(*command)
    eventually(lambda: pd.check_lock("db-migration")["held"])
    second = cli.start(*command)
    eventually(lambda: pd.check_lock("db-migration")["waiting"] == 1)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=40) for process in (first, second)]
    assert [out for out, _ in said] == ["migrated\n", "already migrated\n"], said
    assert first.returncode == second.returncode == 0
    assert len(log(pd, "lock.acquire")) == len(log(pd, "lock.release")) == 2


# ---- with real programs: two servers that never heard of us ---------------------------------------------------------

NODE_SERVER = """require("http").createServer((q, r) => r.end("node")).listen(+process.argv[1], "127.0.0.1")"""


@pytest.mark.parametrize("language", ["python", "node"])
def test_a_real_server_started_with_a_claimed_port_is_adopted_and_found(spawned, children, language, tmp_path):
    node = shutil.which("node")
    if language == "node" and not node:
        pytest.skip("node is not installed")
    serve = {"python": f'"{sys.executable}" -m http.server $PORT --bind 127.0.0.1 >/dev/null 2>&1',
             "node": f"\"{node}\" -e '{NODE_SERVER}' $PORT"}[language]
    name = f"shop:{language}:main"
    children("sh", "-c", f'PORT=$("{sys.executable}" "{MODULE}" claim {name} -q)\n{serve} &\necho $!\nwait',
             env=spawned.environment(), cwd=tmp_path)
    pd = PortDaddy(url=spawned.url)
    waited = pd.wait_for_service(name, timeout=30_000)
    assert waited["healthy"] is True
    service = pd.get_service(name)
    assert service["status"] == "running" and service["pid"]
    listening = {port["port"]: port["pid"] for port in pd.list_system_ports()["ports"]}
    assert listening[service["port"]] == service["pid"]
    assert pd.service_health(name)["healthy"] is True
    # A third process, which knows nothing but the name, finds it and speaks to it.
    visitor = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" "{MODULE}" url {name}'], env=spawned.environment(), capture_output=True,
        text=True, timeout=30)
    address = urllib.parse.urlsplit(visitor.stdout.strip())
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=10)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    connection.close()


def test_a_stranger_on_an_assigned_port_is_named_and_moved_away_from(pd, cli, children):
    stranger = started_listener(children)  # alive before the claim: what it does with the port later is not ours
    birth = port_daddy.process_birth(stranger.pid)
    eventually(lambda: port_daddy.since_boot() > birth + 100)
    port = pd.claim("shop:api:main")["port"]
    listen(stranger, port)
    assert port_daddy.port_holder(port)[0] == stranger.pid
    with pytest.raises(PortDaddyError) as refused:
        pd.claim("shop:api:main")
    assert refused.value.code == "PORT_HIJACKED" and refused.value.status == 409
    assert str(stranger.pid) in str(refused.value) and refused.value.body["pid"] == stranger.pid
    assert cli("claim", "shop:api:main").returncode == 4
    eventually(lambda: pd.get_service("shop:api:main")["status"] == "hijacked")
    moved = cli.json("claim", "shop:api:main", "--move")
    assert moved["port"] != port and pd.get_service("shop:api:main")["port"] == moved["port"]
    assert stranger.poll() is None  # named, not killed


def test_a_service_that_was_not_well_is_asked_again_at_once(pd, children):
    port = pd.claim("shop:api:main")["port"]
    assert pd.service_health("shop:api:main")["healthy"] is False
    listen(started_listener(children), port)
    assert pd.service_health("shop:api:main")["healthy"] is True


# ---- with real programs: a receiver that shares no line with us -----------------------------------------------------

FLASK_RECEIVER = r"""
import base64, hashlib, hmac, json, sys
from flask import Flask, request
from werkzeug.serving import make_server

app = Flask(__name__)
SECRET = "whsec_" + base64.b64encode(b"a key of twenty-four b..").decode()

@app.post("/hook")
def hook():
    body, h = request.get_data(), request.headers
    ours = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    text = h["webhook-id"].encode() + b"." + h["webhook-timestamp"].encode() + b"." + body
    standard = base64.b64encode(hmac.new(base64.b64decode(SECRET[6:]), text, hashlib.sha256).digest()).decode()
    print(json.dumps({
        "event": request.get_json()["type"], "named": h["X-PortDaddy-Event"],
        "same id": h["X-PortDaddy-Delivery"] == h["webhook-id"],
        "ours": hmac.compare_digest(ours, h["X-PortDaddy-Signature"]),
        "standard": any(hmac.compare_digest("v1," + standard, each) for each in h["webhook-signature"].split()),
    }), flush=True)
    return "", 204

server = make_server("127.0.0.1", 0, app)
print(server.server_port, SECRET, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="session")
def flask_python(tmp_path_factory):
    """A Python with Flask, in a virtual environment that is thrown away."""
    venv = tmp_path_factory.mktemp("flask") / "venv"
    python = venv / "bin" / "python"
    for command in ([sys.executable, "-m", "venv", venv],
                    [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "1", "flask"]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=180)
        if done.returncode:
            pytest.skip(f"no Flask to be had here: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return python


def test_a_receiver_written_with_flask_verifies_both_signatures(pd, children, flask_python):
    receiver = children(flask_python, "-c", FLASK_RECEIVER)
    port, secret = read_line(receiver.stdout, 60).split()
    pd.add_webhook(f"http://127.0.0.1:{port}/hook", events=["service.claim", "lock.acquire"], secret=secret)
    pd.claim("myapp:api:main")
    pd.lock("deploy", owner="agent-1")
    for event in ("service.claim", "lock.acquire"):
        assert json.loads(read_line(receiver.stdout)) == {
            "event": event, "named": event, "same id": True, "ours": True, "standard": True}


# =====================================================================================================================
# 2. PROBLEMS — every way to fail, once, for the wire, the client and the shell
# =====================================================================================================================

PROMISED_PROBLEMS = {
    "BAD_REQUEST": (400, 2), "BAD_JSON": (400, 2), "BAD_VALUE": (400, 2), "UNKNOWN_FIELD": (400, 2),
    "TARGET_REFUSED": (400, 2), "HOST_NOT_ALLOWED": (403, 1), "ORIGIN_NOT_ALLOWED": (403, 1), "CROSS_SITE": (403, 1),
    "NOT_OWNER": (403, 4), "NOT_FOUND": (404, 3), "METHOD_NOT_ALLOWED": (405, 2), "TIMED_OUT": (408, 5),
    "LOCK_HELD": (409, 4), "LOCK_LOST": (409, 4), "PORT_TAKEN": (409, 4), "PORT_HIJACKED": (409, 4),
    "LIMIT_MISMATCH": (409, 4), "STALE_RECEIPT": (409, 4), "NO_PORTS": (409, 4), "TOO_LARGE": (413, 2),
    "UNSUPPORTED_MEDIA": (415, 2), "KEY_REUSED": (422, 2), "LIMIT": (429, 4), "INTERNAL": (500, 1),
    "NOT_IMPLEMENTED": (501, 1), "BUSY": (503, 1), "SHUTTING_DOWN": (503, 1), "STORAGE_FULL": (507, 1),
    "CHANNEL_FULL": (507, 1),
}


def test_every_promised_problem_has_its_status_and_its_exit_status():
    assert {code: port_daddy.PROBLEMS.get(code, ())[:2] for code in PROMISED_PROBLEMS} == PROMISED_PROBLEMS


@pytest.mark.parametrize("code", sorted(port_daddy.PROBLEMS))
def test_every_problem_is_a_known_kind_of_failure_with_a_sentence(code):
    status, exit_status, sentence = port_daddy.PROBLEMS[code]
    assert re.fullmatch(r"[A-Z]+(_[A-Z]+)*", code)
    assert 400 <= status < 600 or status == 0
    assert 1 <= exit_status <= 6 and sentence.strip()


def test_a_refusal_says_what_in_a_sentence_and_in_a_code(wire):
    refused = wire.get("/services/nobody:here")
    assert refused.status == 404
    assert refused["success"] is False and refused["code"] == "NOT_FOUND" and "nobody:here" in refused["error"]


def test_the_same_problem_is_an_exception_in_python_and_an_exit_status_in_the_shell(pd, cli):
    with pytest.raises(PortDaddyError) as problem:
        pd.get_service("nobody:here")
    assert (problem.value.status, problem.value.code, problem.value.exit_status) == (404, "NOT_FOUND", 3)
    assert problem.value.body["error"] in str(problem.value)
    done = cli("url", "nobody:here")
    assert done.returncode == 3 and done.stdout == "" and "nobody:here" in done.stderr


# =====================================================================================================================
# 3. VOCABULARY — the kinds of value and their limits
# =====================================================================================================================


@pytest.mark.parametrize("name", ["a", "A.b_c:d-e", "9", "x" * 100, "...", "a..b"])
def test_a_name_may_be(wire, name):
    assert wire.post(f"/msg/{name}", {"payload": 1}).status == 200
    assert wire.post(f"/locks/{name}", {"owner": name}).status == 200
    assert wire.post("/agents", {"id": name}).status == 200


@pytest.mark.parametrize("name", ["", ".", "..", "a b", "a/b", "x" * 101, "é", "a\0", "a\n", "a*", "ａ", "a%"])
def test_a_name_may_not_be(wire, name):
    quoted = urllib.parse.quote(name, safe="")
    before = fingerprint(wire)
    assert wire.post(f"/msg/{quoted}", {"payload": 1}).status in (400, 404, 405)
    assert wire.post("/agents", {"id": name}).status == 400
    assert wire.post("/locks/good", {"owner": name}).status == 400
    assert fingerprint(wire) == before


def test_a_lock_name_takes_the_whole_tail_of_its_path(wire):
    token = wire.post("/locks/db/primary/schema", {"owner": "a"})["token"]
    assert wire.get("/locks/db/primary/schema")["token"] == token
    assert wire.get("/locks/db%2Fprimary%2Fschema")["token"] == token
    assert wire.delete("/locks/db/primary/schema?owner=a")["released"] is True


@pytest.mark.parametrize("identity", ["a", "a:b", "a:b:c", "my.app:api-2:feature_x", "x" * 64, "healthy", "a:health"])
def test_an_identity_may_be(wire, identity):
    assert wire.post("/claim", {"id": identity})["id"] == identity
    assert wire.get(f"/services/{urllib.parse.quote(identity, safe='')}")["id"] == identity


@pytest.mark.parametrize("identity", [
    "", "a:", ":a", "a::b", "a:b:c:d", "x" * 65, "a b", "a/b", ".", "..", "a:..", "health", "é", "a\0", 5, True, ["a"],
    {}])
def test_an_identity_may_not_be(wire, identity):
    before = fingerprint(wire)
    refused = wire.post("/claim", {"id": identity})
    assert refused.status == 400 and refused["code"] == "BAD_VALUE" and "id" in refused["error"]
    assert fingerprint(wire) == before


@pytest.mark.parametrize("given, ms", [
    (1500, 1500), ("1500ms", 1500), ("30s", 30_000), ("2m", 120_000), ("2h30m", 9_000_000), ("1d", 86_400_000),
    ("1h", 3_600_000)])
def test_a_duration_is_milliseconds_or_a_number_with_units(wire, given, ms):
    held = wire.post("/locks/a", {"owner": "a", "ttl": given})
    assert held.status == 200, held
    assert held["expiresAt"] - held["acquiredAt"] == ms


@pytest.mark.parametrize("given", [
    -1, "", "s", "1 parsec", "-5s", "1.2.3s", True, [], {}, 1e300, "9" * 40 + "d", "s30", "٣s"])
def test_a_duration_may_not_be(wire, given):
    refused = wire.post("/locks/a", {"owner": "a", "ttl": given})
    assert refused.status == 400 and refused["code"] == "BAD_VALUE" and "ttl" in refused["error"]


def test_a_lock_lives_for_a_day_at_most(wire):
    assert wire.post("/locks/a", {"owner": "a", "ttl": 86_400_000}).status == 200
    refused = wire.post("/locks/b", {"owner": "a", "ttl": 86_400_001})
    assert refused.status == 400 and "ttl" in refused["error"]


@pytest.mark.parametrize("payload", [
    0, "", False, None, [], {}, 1.5, "é\u2028\U0001f600", {"a": [1, {"b": None}]}, -(2 ** 70)])
def test_any_json_value_is_a_payload(wire, payload):
    assert wire.post("/msg/any", {"payload": payload}).status == 200
    got = wire.get("/msg/any/poll?timeout=1000")["message"]["payload"]
    assert got == payload and type(got) is type(payload)


def test_only_an_absent_payload_is_an_error(wire):
    refused = wire.post("/msg/any", {"sender": "a"})
    assert refused.status == 400 and "payload" in refused["error"]


def test_a_payload_has_256_kib_and_metadata_10_kb(wire):
    assert wire.post("/msg/big", {"payload": "x" * (256 * 1024 - 2)}).status == 200  # two quotes
    refused = wire.post("/msg/big", {"payload": "x" * (256 * 1024)})
    assert (refused.status, refused["code"]) == (413, "TOO_LARGE")
    assert wire.post("/claim", {"id": "a", "metadata": {"note": "x" * 9_000}}).status == 200
    refused = wire.post("/claim", {"id": "b", "metadata": {"note": "x" * 11_000}})
    assert refused.status in (400, 413) and "metadata" in refused["error"]


# =====================================================================================================================
# 4. SETTINGS — what can be set, by flag over environment over default
# =====================================================================================================================


def test_the_defaults_are_the_documented_ones(tmp_path):
    settings = port_daddy.Settings.load({"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")})
    assert settings.port == 9876 and tuple(settings.range) == (3100, 9999)
    if LINUX:
        assert Path(settings.home) == tmp_path / "state" / "port-daddy"


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_default(tmp_path):
    environ = {"PORT_DADDY_HOME": str(tmp_path / "a"), "PORT_DADDY_PORT": "1234", "PORT_DADDY_RANGE": "4000-4100"}
    settings = port_daddy.Settings.load(environ)
    assert (settings.port, tuple(settings.range), Path(settings.home)) == (1234, (4000, 4100), tmp_path / "a")
    settings = port_daddy.Settings.load(environ, port=0, home=str(tmp_path / "b"))
    assert (settings.port, Path(settings.home)) == (0, tmp_path / "b")


@pytest.mark.parametrize("variable, value", [
    ("PORT_DADDY_PORT", "http"), ("PORT_DADDY_PORT", "70000"), ("PORT_DADDY_PORT", "-1"), ("PORT_DADDY_RANGE", "9-3"),
    ("PORT_DADDY_RANGE", "all"), ("PORT_DADDY_RANGE", "1-70000")])
def test_a_bad_setting_is_refused_by_its_name(tmp_path, variable, value):
    with pytest.raises(PortDaddyError) as refused:
        port_daddy.Settings.load({"PORT_DADDY_HOME": str(tmp_path), variable: value})
    assert variable in str(refused.value) and refused.value.exit_status == 2


def test_the_folder_and_its_files_are_private(server):
    home = Path(server.daemon.settings.home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for path in home.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_daemon_json_tells_who_runs_here(server):
    told = json.loads((Path(server.daemon.settings.home) / "daemon.json").read_text())
    assert told["url"] == server.url and told["pid"] == os.getpid()
    assert told["version"] == port_daddy.__version__ and told["instance"]


# =====================================================================================================================
# 5. BELL — how to wait and how to wake
# =====================================================================================================================


def test_a_look_that_sees_something_does_not_wait():
    assert port_daddy.Bell().wait(lambda: "seen", time.monotonic() + 60, ["a"]) == "seen"


def test_a_wait_that_sees_nothing_ends_at_its_deadline():
    began = time.monotonic()
    assert port_daddy.Bell().wait(lambda: None, began + 0.05, ["a"]) is None
    assert time.monotonic() - began >= 0.045


def test_only_those_who_wait_stand_before_somebody_who_will_not():
    bell = port_daddy.Bell()
    line = {"topics": ["lock:a"], "line": "", "turn": True}
    looking = bell.join(**line)  # has come first, and has not looked yet
    assert bell.wait(lambda: "a seat", time.monotonic(), **line) == "a seat"
    bell.leave(looking)
    waiting = in_background(bell.wait, lambda: None, time.monotonic() + 20, **line)
    eventually(lambda: bell.crowd)
    assert bell.wait(lambda: "a seat", time.monotonic(), **line) is None
    bell.close()
    assert waiting.exception(10).code == "SHUTTING_DOWN"


def test_a_ring_lets_the_waiters_of_its_topic_look_again_and_nobody_else():
    bell, seen, looks = port_daddy.Bell(), [], {"a": 0, "b": 0}

    def look(topic):
        def see():
            looks[topic] += 1
            return seen[0] if seen else None
        return see

    waits = {topic: in_background(bell.wait, look(topic), time.monotonic() + 20, [topic]) for topic in "ab"}
    eventually(lambda: looks["a"] and looks["b"])
    settle()
    at_rest = looks["b"]
    seen.append("news")
    bell.ring("a")
    assert waits["a"].result(10) == "news"
    settle()
    assert looks["b"] == at_rest
    bell.ring("b")
    assert waits["b"].result(10) == "news"


def test_one_can_wait_for_several_topics():
    bell, seen = port_daddy.Bell(), []
    wait = in_background(bell.wait, lambda: seen[0] if seen else None, time.monotonic() + 20, ["a", "b"])
    settle()
    seen.append("news")
    bell.ring("b")
    assert wait.result(10) == "news"


def test_no_ring_is_lost_between_the_look_and_the_sleep():
    # The news arrives and the bell rings while the waiter is still inside its look: it must not go to sleep on that.
    bell, seen = port_daddy.Bell(), []

    def look():
        if seen:
            return seen[0]
        ringer = threading.Thread(target=lambda: (seen.append("news"), bell.ring("a")), daemon=True)
        ringer.start()
        ringer.join(5)
        assert not ringer.is_alive(), "a look holds the bell's lock"
        return None

    assert bell.wait(look, time.monotonic() + 10, ["a"]) == "news"


def test_many_rings_and_many_waiters_lose_nothing():
    bell, counter, guard = port_daddy.Bell(), itertools.count(), threading.Lock()
    box = []

    def look():
        with guard:
            return box.pop() if box else None

    waits = [in_background(bell.wait, look, time.monotonic() + 20, ["a"]) for _ in range(40)]
    for _ in waits:
        with guard:
            box.append(f"n{next(counter)}")
        bell.ring("a")
    assert len({wait.result(25) for wait in waits}) == 40


def test_a_ring_wakes_one_of_a_line_and_everybody_without_one():
    bell = port_daddy.Bell()
    waiters = [*(bell.join(["a"], line="workers") for _ in range(3)), bell.join(["a"]), bell.join(["b"])]
    for woken in ([True, False, False, True, False], [True, True, False, True, False]):
        bell.ring("a")
        assert [waiter.rung for waiter in waiters] == woken


def test_a_ring_that_comes_while_one_of_the_line_looks_is_not_lost_when_he_leaves_with_something():
    bell, things, looking, go = port_daddy.Bell(), [], threading.Event(), threading.Event()

    def wait(slow):
        looks = []

        def look():
            looks.append(1)
            if slow and len(looks) == 2:
                looking.set()
                assert go.wait(10)
            return things.pop(0) if things else None

        return bell.wait(look, time.monotonic() + 5, ["tasks"], line="team"), time.monotonic()

    waiting = []
    for slow in (True, False):
        waiting.append(in_background(wait, slow))
        eventually(lambda: bell.crowd == len(waiting))
        settle()
    things.append("one")
    bell.ring("tasks")
    assert looking.wait(10)
    things.append("two")
    bell.ring("tasks")  # meant for the second, since the first is awake
    go.set()
    (first, at), (second, later_on) = (each.result(10) for each in waiting)
    assert (first, second) == ("one", "two") and later_on - at < 2.5


# =====================================================================================================================
# 6. STORE — one transaction, one log, nothing half-done
# =====================================================================================================================


def test_a_transaction_that_fails_leaves_nothing_and_rings_nobody(server, pd):
    with pytest.raises(ZeroDivisionError):
        with server.daemon.write() as tx:
            tx.emit("lock.acquire", "never", lockName="never", owner="a", token=1, expiresAt=0)
            raise ZeroDivisionError
    assert log(pd, "lock.acquire") == []
    with server.daemon.write() as tx:
        tx.emit("lock.acquire", "once", lockName="once", owner="a", token=1, expiresAt=0)
    assert [entry["targetId"] for entry in log(pd, "lock.acquire")] == ["once"]


def test_ids_grow_over_all_channels_and_are_never_used_again(make_server, tmp_path):
    server = make_server(home=tmp_path / "kept")
    wire = Wire(server.port)
    ids = [wire.post(f"/msg/{channel}", {"payload": 1})["id"] for channel in "abab"]
    assert ids == sorted(set(ids))
    wire.delete("/msg/a")
    wire.delete("/msg/b")
    ids.append(wire.post("/msg/a", {"payload": 1})["id"])
    make_server.stop(server)
    ids.append(Wire(make_server(home=tmp_path / "kept").port).post("/msg/a", {"payload": 1})["id"])
    assert ids == sorted(set(ids))


def test_everything_is_there_after_a_restart(make_server, tmp_path, receiver):
    server = make_server(home=tmp_path / "kept")
    pd = PortDaddy(url=server.url)
    port = pd.claim("myapp:api", metadata={"k": "v"})["port"]
    pd.set_endpoint("myapp:api", "prod", "https://example.org")
    token = pd.lock("deploy", owner="agent-1", metadata={"why": "release"})["token"]
    message = pd.publish("tasks", {"n": 1})["id"]
    pd.register(name="Worker", id="agent-9")
    hook = pd.add_webhook(receiver.url, events=["lock.expire"], secret="a-good-secret")["id"]
    pd.poll("tasks", group="gone")
    make_server.stop(server)
    pd = PortDaddy(url=make_server(home=tmp_path / "kept").url)
    service = pd.get_service("myapp:api")
    assert (service["port"], service["metadata"]) == (port, {"k": "v"})
    assert service["endpoints"]["prod"] == "https://example.org"
    assert (pd.check_lock("deploy")["token"], pd.check_lock("deploy")["metadata"]) == (token, {"why": "release"})
    assert [each["id"] for each in pd.get_messages("tasks")["messages"]] == [message]
    assert pd.get_agent("agent-9")["agent"]["name"] == "Worker"
    assert pd.get_webhook(hook)["hasSecret"] is True
    assert pd.poll("tasks", group="gone", timeout=50)["message"] is None  # consumed before, consumed now


def test_the_database_is_whole_after_a_kill(spawned):
    for number in range(20):
        assert spawned.wire.post("/msg/tasks", {"payload": number}).status == 200
    spawned.kill()
    databases = [path for path in spawned.home.iterdir() if path.read_bytes()[:15] == b"SQLite format 3"]
    assert databases
    for path in databases:
        with contextlib.closing(sqlite3.connect(path)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_oldest_messages_go_when_a_channel_is_full_and_the_reader_is_told(server, wire):
    # 64 MiB a channel: 300 messages of 240 KiB are more than that, and quicker than ten thousand and one small ones.
    load, line = json.dumps({"payload": "x" * 240 * 1024}).encode(), Line(server.port)
    head = f"POST /msg/big HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(load)}\r\n\r\n".encode()
    ids = [line.send(head + load).reply()["id"] for _ in range(300)]
    line.close()
    channel, = wire.get("/channels")["channels"]
    assert channel["count"] < 300 and channel["lastId"] == ids[-1]
    oldest = wire.get(f"/msg/big?after={ids[0]}&limit=1")["messages"][0]["id"]
    assert oldest > ids[20]
    stream = Stream(server.port, f"/msg/big/subscribe?after={ids[0]}")
    event = next(event for event in iter(stream.next, None) if event.kind != "connected")
    assert event.kind == "gap" and ids[0] <= event.data["from"] <= event.data["to"] == ids[ids.index(oldest) - 1]
    stream.close()


# =====================================================================================================================
# 7. HOST — the world outside: who listens, who lives
# =====================================================================================================================


def test_a_listening_process_is_listed_with_its_pid_and_command(pd, children):
    listener = started_listener(children)
    port = free_port_block(1)
    listen(listener, port)
    found, = [each for each in pd.list_system_ports()["ports"] if each["port"] == port]
    assert found["pid"] == listener.pid and "python" in found["command"].lower()


def test_the_listed_port_knows_the_service_it_belongs_to(pd, children):
    listener = started_listener(children)
    port = pd.claim("myapp:api", pid=listener.pid)["port"]
    listen(listener, port)
    found, = [each for each in pd.list_system_ports()["ports"] if each["port"] == port]
    assert "myapp:api" in json.dumps(found)
    assert port not in [each["port"] for each in pd.list_system_ports(unmanaged_only=True)["ports"]]


# =====================================================================================================================
# 8. DAEMON — everything that time does, in one function
# =====================================================================================================================


def test_a_tick_says_how_long_it_may_sleep_and_sleeps_less_when_something_is_due(server, clock, pd):
    at_rest = server.daemon.tick(clock.now())
    pd.lock("soon", owner="a", ttl=40)
    assert server.daemon.tick(clock.now()) <= at_rest


def test_a_lease_ends_when_its_time_is_over_and_not_before(clock, pd):
    pd.lock("build", owner="a", ttl=1000)
    clock.advance(999)
    assert pd.check_lock("build")["held"] is True
    clock.advance(2)
    assert pd.check_lock("build")["held"] is False
    expired, = log(pd, "lock.expire")
    assert expired["targetId"] == "build" and facts(expired)["owner"] == "a"


def test_a_wall_clock_that_jumps_changes_no_lease(clock, pd):
    pd.lock("build", owner="a", ttl=60_000)
    for years in (1, -2):
        clock.wall += years * 365 * 86_400_000
        clock.daemon.tick(clock.now())
        assert pd.check_lock("build")["held"] is True
    clock.advance(60_001)
    assert pd.check_lock("build")["held"] is False


def test_a_lease_goes_on_over_a_restart_and_down_time_counts(make_server, clock, tmp_path):
    server = make_server(clock=clock, home=tmp_path / "kept")
    PortDaddy(url=server.url).lock("short", owner="a", ttl=60_000)
    PortDaddy(url=server.url).lock("long", owner="a", ttl=600_000)
    make_server.stop(server)
    clock.daemon = None
    clock.advance(61_000)
    pd = PortDaddy(url=make_server(clock=clock, home=tmp_path / "kept").url)
    clock.advance(10_000)  # whatever is granted to those who were there before a restart is over by now
    assert pd.check_lock("short")["held"] is False and pd.check_lock("long")["held"] is True


def restarted(make_server, clock, server, down=0):
    """The same daemon on the same folder, after it was down for so long."""
    make_server.stop(server)
    clock.daemon = None
    clock.advance(down)
    return make_server(clock=clock, home=server.daemon.settings.home)


def hold_everything(wire, ttl):
    """One lease of each kind, all of the same length; their receipts and tokens."""
    wire.post("/agents", {"id": "holder", "ttl": ttl})
    wire.post("/msg/tasks", {"payload": "task"})
    receipt = wire.get(f"/msg/tasks/poll?lease={ttl}&timeout=0")["receipt"]
    return receipt, wire.post("/locks/deploy", {"owner": "somebody", "ttl": ttl})["token"]


def what_is_held(wire):
    """Which of these leases still run, looked at without touching them."""
    leased = sum(group["leased"] for group in wire.get("/msg/tasks/groups")["groups"])
    return {name for name, held in (("agent", wire.get("/agents/holder")["agent"]["isActive"]), ("task", leased),
                                    ("lock", wire.get("/locks/deploy")["held"])) if held}


ALL_HELD = {"agent", "task", "lock"}


@pytest.mark.parametrize("down", [0, 1_000, 3_000, 3_600_000])
def test_after_a_restart_nothing_that_was_held_expires_for_five_seconds(make_server, clock, down):
    server = make_server(clock=clock)
    receipt, token = hold_everything(Wire(server.port), 2_000)
    wire = Wire(restarted(make_server, clock, server, down).port)
    for _ in range(4):
        clock.advance(1_249)
        assert what_is_held(wire) == ALL_HELD
    clock.advance(2_100)  # what was left at most
    assert what_is_held(wire) == set()
    assert wire.put("/locks/deploy", {"token": token})["code"] == "LOCK_LOST"
    assert wire.post("/msg/tasks/ack", {"receipt": receipt})["code"] == "STALE_RECEIPT"


def test_who_was_there_before_a_restart_can_go_on_in_its_grace(make_server, clock):
    server = make_server(clock=clock)
    receipt, token = hold_everything(Wire(server.port), 2_000)
    wire = Wire(restarted(make_server, clock, server, 1_000).port)
    clock.advance(4_000)
    assert wire.post("/agents/holder/heartbeat").status == 200
    assert wire.put("/locks/deploy", {"token": token, "ttl": 2_000}).status == 200
    assert wire.post("/msg/tasks/touch", {"receipt": receipt, "lease": 2_000}).status == 200
    clock.advance(2_990)  # beyond the grace, and short of what they were promised just now
    assert what_is_held(wire) == ALL_HELD
    assert wire.post("/msg/tasks/ack", {"receipt": receipt})["acked"] is True
    assert wire.delete(f"/locks/deploy?token={token}")["released"] is True


def test_restarts_in_a_row_give_each_a_grace(make_server, clock):
    server = make_server(clock=clock)
    hold_everything(Wire(server.port), 2_000)
    for _ in range(3):
        server = restarted(make_server, clock, server, 500)
        clock.advance(4_990)
        assert what_is_held(Wire(server.port)) == ALL_HELD
    clock.advance(2_100)
    assert what_is_held(Wire(server.port)) == set()


def test_time_without_a_daemon_counts(make_server, clock):
    server = make_server(clock=clock)
    hold_everything(Wire(server.port), 60_000)
    server = restarted(make_server, clock, server, 59_000)
    clock.advance(5_900)
    assert what_is_held(Wire(server.port)) == ALL_HELD
    clock.advance(200)
    assert what_is_held(Wire(server.port)) == set()


@pytest.mark.parametrize("stall, grace", [(2_000, 5_000), (5_000, 5_000), (60_000, 60_000), (3_600_000, 300_000)])
@pytest.mark.parametrize("how", ["stall", "sleep"])
def test_after_a_stall_or_a_sleep_there_is_a_grace_as_long_but_not_for_ever(server, clock, wire, how, stall, grace):
    receipt, token = hold_everything(wire, 1_000)
    getattr(clock, how)(stall)
    if how == "sleep":
        grace = 5_000  # the clock of leases stood still: as long as it takes to say so
        clock.daemon.tick(clock.daemon.now())
    for _ in range(3):
        clock.advance(grace // 3 - 1)
        assert what_is_held(wire) == ALL_HELD
    clock.advance(1_100)
    assert what_is_held(wire) == set()


def test_a_lease_that_was_given_out_of_rest_has_its_grace_too(server, clock, wire):
    clock.daemon.tick(clock.daemon.now())  # nothing is held: the daemon means to look again in a minute
    wire.post("/locks/deploy", {"owner": "a", "ttl": 70_000})
    clock.stall(59_000)
    clock.advance(58_900)
    assert wire.get("/locks/deploy")["held"] is True


def test_what_is_claimed_for_a_time_has_the_grace_too(make_server, clock):
    server = make_server(clock=clock)
    Wire(server.port).post("/claim", {"id": "a", "expires": 2_000})
    wire = Wire(restarted(make_server, clock, server).port)
    clock.advance(4_990)
    assert wire.get("/services")["count"] == 1


def test_a_short_pause_is_no_stall(clock, wire):
    wire.post("/locks/deploy", {"owner": "a", "ttl": 400})
    clock.stall(390)
    clock.advance(11)
    assert wire.get("/locks/deploy")["held"] is False


@pytest.mark.parametrize("why", ["restart", "stall"])
def test_a_grace_does_not_keep_the_lock_of_a_dead_process(make_server, clock, children, why):
    server = make_server(clock=clock)
    owner = children(sys.executable, "-c", ALIVE)
    read_line(owner.stdout)
    Wire(server.port).post("/locks/deploy", {"owner": "a", "ttl": 600_000, "pid": owner.pid})
    Wire(server.port).post("/agents", {"id": "bound", "pid": owner.pid, "ttl": 600_000})
    Wire(server.port).post("/locks/too", {"owner": "bound", "ttl": 600_000})
    if why == "restart":
        server = restarted(make_server, clock, server)
    else:
        clock.stall(60_000)
    end(owner)
    clock.advance(1_000)
    wire = Wire(server.port)
    assert (wire.get("/locks/deploy")["held"], wire.get("/locks/too")["held"]) == (False, False)
    assert wire.get("/agents/bound")["agent"]["isActive"] is False


def test_a_process_that_died_while_nobody_looked_is_noticed_at_once(make_server, clock, children):
    server = make_server(clock=clock)
    owner = children(sys.executable, "-c", ALIVE)
    read_line(owner.stdout)
    Wire(server.port).post("/locks/deploy", {"owner": "a", "ttl": 600_000, "pid": owner.pid})
    make_server.stop(server)
    clock.daemon = None
    end(owner)
    wire = Wire(make_server(clock=clock, home=server.daemon.settings.home).port)
    eventually(lambda: wire.get("/locks/deploy")["held"] is False, 5)


@pytest.mark.parametrize("why", ["restart", "stall"])
def test_what_is_granted_in_a_grace_lasts_at_least_as_long_as_it_says(make_server, clock, why):
    server = make_server(clock=clock)
    hold_everything(Wire(server.port), 1_000)
    if why == "restart":
        server = restarted(make_server, clock, server)
    else:
        clock.stall(2_000)
    wire = Wire(server.port)
    clock.advance(2_000)  # three seconds are left of the grace
    granted = wire.post("/locks/new", {"owner": "b", "ttl": 4_000})
    assert clock.wall + 4_000 <= granted["expiresAt"] == wire.get("/locks/new")["expiresAt"]
    refused = wire.post("/locks/new", {"owner": "c"})
    assert refused["expiresAt"] == granted["expiresAt"] == clock.wall + refused["retryAfter"]
    wire.post("/msg/jobs", {"payload": 1})
    leased = wire.get("/msg/jobs/poll?lease=4000&timeout=0")
    assert leased["leaseExpiresAt"] == granted["expiresAt"]
    clock.advance(granted["expiresAt"] - clock.wall - 1)
    assert wire.get("/locks/new")["held"] is True
    assert give(wire, "touch", leased, "jobs", lease=1)["leaseExpiresAt"] == clock.wall + 1
    clock.advance(251)
    assert wire.get("/locks/new")["held"] is False
    assert wire.get("/msg/jobs/poll?lease=1&timeout=0")["attempt"] == 2


def test_what_a_lease_says_of_its_end_stays_true_over_a_restart(make_server, clock):
    server = make_server(clock=clock)
    _, token = hold_everything(Wire(server.port), 10_000)
    wire = Wire(restarted(make_server, clock, server, 1_000).port)
    told = wire.get("/locks/deploy")["expiresAt"]
    clock.advance(told - clock.wall - 1)
    assert wire.get("/locks/deploy")["held"] is True
    clock.advance(251)
    assert wire.get("/locks/deploy")["held"] is False


def test_after_a_grace_leases_end_as_they_always_do(make_server, clock):
    server = make_server(clock=clock)
    hold_everything(Wire(server.port), 60_000)
    wire = Wire(restarted(make_server, clock, server).port)
    clock.advance(5_001)
    wire.post("/locks/new", {"owner": "b", "ttl": 1_000})
    clock.advance(999)
    assert wire.get("/locks/new")["held"] is True
    clock.advance(2)
    assert wire.get("/locks/new")["held"] is False and what_is_held(wire) == ALL_HELD


def test_waiters_are_served_in_a_grace_and_when_it_is_over(make_server, clock):
    server = make_server(clock=clock)
    hold_everything(Wire(server.port), 1_000)
    server = restarted(make_server, clock, server)
    wire = Wire(server.port)
    wire.post("/locks/free", {"owner": "a"})
    released = in_background(wire.post, "/locks/free", {"owner": "b", "wait": 20_000})
    expired = in_background(wire.post, "/locks/deploy", {"owner": "b", "wait": 20_000})
    eventually(lambda: wire.get("/locks/deploy")["waiting"] and wire.get("/locks/free")["waiting"])
    wire.delete("/locks/free?owner=a")
    assert released.result(10)["owner"] == "b"
    clock.advance(4_999)
    settle()
    assert not expired.done()
    clock.advance(1_002)
    assert expired.result(10)["owner"] == "b"


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no way to stop a process")
def test_a_daemon_that_was_really_stopped_gives_everybody_the_time_to_say_so(spawned):
    wire = spawned.wire
    token = wire.post("/locks/deploy", {"owner": "a", "ttl": 600})["token"]
    spawned.process.send_signal(signal.SIGSTOP)
    until = time.monotonic() + 2
    eventually(lambda: time.monotonic() > until)
    spawned.process.send_signal(signal.SIGCONT)
    until = time.monotonic() + 0.8  # more than was left of it
    eventually(lambda: time.monotonic() > until)
    assert wire.put("/locks/deploy", {"token": token}).status == 200


def test_after_a_reboot_what_was_left_of_everything_begins_anew(make_server, clock):
    server = make_server(clock=clock)
    wire = Wire(server.port)
    wire.post("/locks/closed", {"owner": "a", "ttl": 500, "lockDelay": 20_000})
    clock.advance(500)
    wire.post("/msg/jobs", {"payload": 1})
    give(wire, "nack", take(wire, "jobs"), "jobs", delay=20_000)
    _, token = hold_everything(wire, 30_000)
    clock.advance(15_000)
    make_server.stop(server)
    clock.daemon, clock.boot, clock.awake, clock.wall = None, "another boot", 9_000, clock.wall + 3_600_000
    wire = Wire(make_server(clock=clock, home=server.daemon.settings.home).port)
    assert 30_000 <= wire.get("/locks/deploy")["expiresAt"] - clock.wall <= 35_250
    clock.advance(19_900)
    assert wire.post("/locks/closed", {"owner": "b"})["code"] == "LOCK_HELD" and take(wire, "jobs")["message"] is None
    clock.advance(9_900)
    assert what_is_held(wire) == ALL_HELD
    clock.advance(5_500)
    assert what_is_held(wire) == set()
    assert take(wire, "jobs")["attempt"] == 2
    assert wire.post("/locks/closed", {"owner": "b"})["token"] > token


def test_a_wall_clock_that_jumps_a_year_forgets_nothing_and_ends_nothing(clock, wire, pd, receiver):
    year = 365 * 86_400_000
    wire.post("/msg/idle", {"payload": 1})
    receipt, token = hold_everything(wire, 600_000)
    wire.get("/msg/never-written/poll?timeout=0&group=early")
    wire.post("/claim", {"id": "a:b", "expires": 600_000})
    wire.delete("/release?id=a:b")
    wire.post("/msg/idle", {"payload": "once"}, headers={"Idempotency-Key": "k"})
    hook = wire.post("/webhooks", {"url": receiver.url, "events": ["service.claim"]})["id"]
    wire.post("/claim", {"id": "a:c", "expires": 600_000})
    eventually(lambda: wire.get(f"/webhooks/{hook}")["successCount"] == 1)

    def seen():
        agents = [(agent["id"], agent["isActive"]) for agent in wire.get("/agents")["agents"]]
        return (what_is_held(wire), agents, [entry["id"] for entry in wire.get("/activity?limit=1000")["entries"]],
                [message["id"] for message in wire.get("/msg/idle")["messages"]],
                [delivery["id"] for delivery in wire.get(f"/webhooks/{hook}/deliveries")["deliveries"]],
                [service["id"] for service in wire.get("/services")["services"]],
                [group["group"] for group in wire.get("/msg/never-written/groups")["groups"]])

    before = seen()
    for jump in (year, -2 * year):
        clock.wall += jump
        clock.advance(61_000)  # the prune comes once a minute
        assert seen() == before
    assert wire.post("/msg/tasks/touch", {"receipt": receipt}).status == 200
    assert wire.put("/locks/deploy", {"token": token}).status == 200
    again = wire.post("/msg/idle", {"payload": "once"}, headers={"Idempotency-Key": "k"})
    assert again["id"] == before[3][-1] and len(seen()[3]) == 2


# =====================================================================================================================
# 9. OPERATIONS — what can be asked: claims, channels, locks, agents, webhooks, the log
# =====================================================================================================================

# ---- claims ---------------------------------------------------------------------------------------------------------


def test_a_claim_says_all_that_is_promised(wire):
    claimed = wire.post("/claim", {"id": "myapp:api:main"})
    assert claimed["success"] is True and claimed["id"] == "myapp:api:main" and claimed["existing"] is False
    assert 3100 <= claimed["port"] <= 9999 and claimed["status"] == "assigned"
    assert claimed["endpoints"] == {"local": f"http://localhost:{claimed['port']}"}
    again = wire.post("/claim", {"id": "myapp:api:main"})
    assert (again["port"], again["existing"]) == (claimed["port"], True)


def test_a_service_shows_its_fields_at_the_top_and_again_under_service(wire):
    wire.post("/claim", {"id": "a:b", "cmd": "npm start; rm -rf /", "cwd": "/tmp", "metadata": {"k": 1}, "agent": "me"})
    shown = wire.get("/services/a:b")
    service = shown["service"]
    assert set(service) >= {"id", "port", "pid", "agentId", "status", "cmd", "cwd", "createdAt", "lastSeen",
                            "expiresAt", "health", "pairedWith", "endpoints", "urls", "metadata"}
    assert {field: shown[field] for field in service} == service
    assert (service["cmd"], service["cwd"], service["agentId"]) == ("npm start; rm -rf /", "/tmp", "me")
    assert service["urls"] == service["endpoints"]


def test_the_first_port_is_a_property_of_the_name(make_server):
    one, two = (PortDaddy(url=make_server().url) for _ in range(2))
    names = [f"project-{n}:api" for n in range(5)]
    assert {name: one.claim(name)["port"] for name in names} == {name: two.claim(name)["port"] for name in names[::-1]}
    assert len({one.claim(name)["port"] for name in names}) == 5


def test_a_name_gets_its_old_port_back(make_server, tmp_path):
    server = make_server(home=tmp_path / "kept")
    pd = PortDaddy(url=server.url)
    block = free_port_block(8)
    port = pd.claim("first", port=block + 3)["port"]
    assert port == block + 3
    pd.release("first")
    pd.claim("second", range=[block, block + 7])
    pd.release("second")
    assert pd.claim("first")["port"] == port
    pd.release("first")
    make_server.stop(server)
    pd = PortDaddy(url=make_server(home=tmp_path / "kept").url)
    assert pd.claim("first")["port"] == port


@pytest.mark.parametrize("family, host, listens", [
    (socket.AF_INET, "127.0.0.1", True), (socket.AF_INET, "0.0.0.0", True), (socket.AF_INET6, "::1", True),
    (socket.AF_INET6, "::", True), (socket.AF_INET, "127.0.0.1", False), (socket.AF_INET6, "::1", False)])
def test_a_port_on_which_somebody_sits_is_not_given(pd, family, host, listens):
    first = free_port_block(3)
    with socket.socket(family) as sitting:
        if family == socket.AF_INET6:
            sitting.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sitting.bind((host, first + 1))
        if listens:
            sitting.listen()
        given = {pd.claim(name, range=[first, first + 2])["port"] for name in "ab"}
        assert given == {first, first + 2}
        with pytest.raises(PortDaddyError) as full:
            pd.claim("c", range=[first, first + 2])
        assert (full.value.code, full.value.status) == ("NO_PORTS", 409)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_preferred_port_that_is_taken_gives_another_one_and_names_the_holder(pd, children, host):
    port = free_port_block(1)
    holder = listen(started_listener(children), port, host)
    claimed = pd.claim("myapp:api", port=port)
    assert claimed["port"] != port and claimed["preferred"] is False
    assert str(holder.pid) in claimed["warning"] and str(port) in claimed["warning"]
    with pytest.raises(PortDaddyError) as refused:
        pd.claim("myapp:web", port=port, exact=True)
    assert (refused.value.code, refused.value.status) == ("PORT_TAKEN", 409) and str(holder.pid) in str(refused.value)


def test_a_preferred_port_of_another_service_names_that_service(pd):
    port = pd.claim("myapp:api")["port"]
    claimed = pd.claim("myapp:web", port=port)
    assert claimed["port"] != port and claimed["preferred"] is False and "myapp:api" in claimed["warning"]
    with pytest.raises(PortDaddyError) as refused:
        pd.claim("myapp:admin", port=port, exact=True)
    assert refused.value.code == "PORT_TAKEN" and "myapp:api" in str(refused.value)


def test_a_preferred_port_that_is_free_is_given_wherever_it_lies(pd):
    port = free_port_block(1)
    claimed = pd.claim("myapp:api", port=port)
    assert claimed["port"] == port and claimed["preferred"] is True and "warning" not in claimed


def test_a_known_name_moves_to_another_free_port_and_says_so(pd):
    block = free_port_block(2)
    pd.claim("myapp:api", port=block)
    moved = pd.claim("myapp:api", port=block + 1)
    assert moved["port"] == block + 1
    told = moved["message"] + moved.get("warning", "")
    assert str(block) in told and str(block + 1) in told
    assert pd.get_service("myapp:api")["endpoints"]["local"] == f"http://localhost:{block + 1}"


def test_a_port_that_no_browser_opens_is_never_chosen(pd):
    with pytest.raises(PortDaddyError) as refused:
        pd.claim("a", range=[6665, 6669])
    assert refused.value.code == "NO_PORTS"


def test_a_port_that_well_known_servers_want_is_never_chosen(pd):
    for port in (8000, 8080, 3306, 5000, 5432, 5672, 6379, 7000, 9000, 9090, 9092, 9200):
        with pytest.raises(PortDaddyError) as refused:
            pd.claim("a", range=[port, port])
        assert refused.value.code == "NO_PORTS", port


def test_our_own_port_is_never_given(server, pd):
    with pytest.raises(PortDaddyError) as refused:
        pd.claim("a", port=server.port, exact=True)
    assert refused.value.code == "PORT_TAKEN"


def test_a_range_of_the_settings_is_kept_to(make_server):
    first = free_port_block(2)
    pd = PortDaddy(url=make_server(PORT_DADDY_RANGE=f"{first}-{first + 1}").url)
    assert {pd.claim(name)["port"] for name in "ab"} == {first, first + 1}
    with pytest.raises(PortDaddyError) as full:
        pd.claim("c")
    assert full.value.code == "NO_PORTS" and str(first) in str(full.value)


def test_a_release_says_what_it_released(wire):
    ports = [wire.post("/claim", {"id": f"myapp:{name}:main"})["port"] for name in ("api", "web")]
    kept = wire.post("/claim", {"id": "other:api:main"})["port"]
    released = wire.delete("/release?id=myapp:*")
    assert released["released"] == 2 and sorted(released["releasedPorts"]) == sorted(ports)
    assert [service["port"] for service in wire.get("/services")["services"]] == [kept]
    nothing = wire.post("/release", {"id": "myapp:*"})
    assert (nothing.status, nothing["released"]) == (200, 0)


def test_all_at_once_is_released_only_with_force(wire):
    wire.post("/claim", {"id": "a"})
    refused = wire.delete("/release", {"id": "*"})
    assert refused.status == 400 and "force" in refused["error"]
    assert wire.get("/services")["count"] == 1
    assert wire.delete("/release", {"id": "*", "force": True})["released"] == 1


def test_a_service_can_be_released_by_its_own_address(wire):
    port = wire.post("/claim", {"id": "a:b"})["port"]
    assert wire.delete("/services/a:b")["releasedPorts"] == [port]
    assert wire.get("/services/a:b").status == 404


@pytest.mark.parametrize("pattern, found", [
    ("*", "abcd"), ("shop:*", "ac"), ("*:api:*", "ab"), ("shop:api:*", "a"), ("shop:web", "c"), ("sh*b", "c"),
    ("none*", "")])
def test_a_star_is_any_run_of_characters(wire, pattern, found):
    names = {"a": "shop:api:main", "b": "shopping:api:main", "c": "shop:web", "d": "blog"}
    for name in names.values():
        wire.post("/claim", {"id": name})
    listed = wire.get(f"/services?pattern={urllib.parse.quote(pattern)}")
    assert sorted(service["id"] for service in listed["services"]) == sorted(names[each] for each in found)
    assert listed["count"] == len(found)


def test_a_service_can_be_found_by_status_and_by_port(wire):
    port = wire.post("/claim", {"id": "a"})["port"]
    wire.post("/claim", {"id": "b"})
    assert [s["id"] for s in wire.get(f"/services?port={port}")["services"]] == ["a"]
    wire.put("/services/b", {"status": "stopped"})
    assert [s["id"] for s in wire.get("/services?status=stopped")["services"]] == ["b"]


def test_a_claim_whose_time_is_over_can_be_released(clock, pd):
    pd.claim("short", expires=1000)
    pd.claim("long")
    assert pd.get_service("short")["expiresAt"] == clock.wall + 1000
    clock.advance(2000)
    pd.release(expired=True)
    assert [service["id"] for service in pd.list_services()["services"]] == ["long"]


def test_a_claim_again_changes_only_what_is_given(pd):
    pd.claim("a", cmd="npm start", metadata={"k": 1})
    pd.claim("a", cwd="/srv")
    service = pd.get_service("a")
    assert (service["cmd"], service["cwd"], service["metadata"]) == ("npm start", "/srv", {"k": 1})


def test_cleanup_frees_the_services_of_the_dead(pd, children):
    owner = children(sys.executable, "-c", ALIVE)
    read_line(owner.stdout)
    pd.claim("mortal", pid=owner.pid)
    pd.claim("immortal")
    assert pd.cleanup()["count"] == 0
    end(owner)
    pd.cleanup()
    assert [service["id"] for service in pd.list_services()["services"]] == ["immortal"]


def test_a_service_with_a_pid_nobody_can_see_is_recorded_with_a_warning(pd):
    claimed = pd.claim("a", pid=2 ** 22 + 7)  # beyond the largest pid that Linux gives
    assert "warning" in claimed and pd.get_service("a")["port"] == claimed["port"]


def test_a_listener_that_comes_after_the_claim_is_adopted(pd, children):
    port = pd.claim("myapp:api")["port"]
    listener = listen(started_listener(children), port)
    service = eventually(lambda: (lambda s: s["status"] == "running" and s)(pd.get_service("myapp:api")), 15)
    assert service["pid"] == listener.pid
    again = pd.claim("myapp:api")
    assert again["port"] == port and again["existing"] is True


def test_endpoints_are_set_and_removed(wire):
    assert wire.put("/services/a/endpoints/prod", {"url": "https://a.example"}).status == 404
    wire.post("/claim", {"id": "a"})
    for url in ("http://a", "https://a/b?c", "ws://a:1", "wss://a"):
        assert wire.put("/services/a/endpoints/prod", {"url": url}).status == 200
        assert wire.get("/services/a")["endpoints"]["prod"] == url
    assert wire.delete("/services/a/endpoints/prod")["removed"]
    assert "prod" not in wire.get("/services/a")["endpoints"]


def test_to_wait_for_a_service_is_to_wait_until_it_runs(pd, children):
    waiting = in_background(pd.wait_for_service, "later:api", timeout=30_000)  # not even known yet
    settle()
    port = pd.claim("later:api")["port"]
    listen(started_listener(children), port)
    waited = waiting.result(30)
    assert waited["healthy"] is True and [service["id"] for service in waited["services"]] == ["later:api"]


def test_a_wait_that_ends_in_vain_says_for_whom(pd, wire):
    pd.claim("here")
    refused = wire.post("/wait", {"services": ["here", "nowhere"], "timeout": 50})
    assert (refused.status, refused["code"]) == (408, "TIMED_OUT")
    assert "nowhere" in json.dumps(refused["waitingFor"])


def test_a_health_url_decides_over_a_mere_listener(pd, children):
    script = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.path.exists(sys.argv[2]) else 500)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
    with tempfile.TemporaryDirectory() as folder:
        port = pd.claim("myapp:api")["port"]
        pd.update_service("myapp:api", health=f"http://127.0.0.1:{port}/health")
        children(sys.executable, "-c", script, str(port), f"{folder}/healthy")
        eventually(lambda: pd.get_service("myapp:api")["status"] in ("running", "unhealthy"), 20)
        with pytest.raises(PortDaddyError) as problem:
            pd.wait_for_service("myapp:api", timeout=50)
        assert problem.value.code == "TIMED_OUT"
        Path(folder, "healthy").touch()
        assert pd.wait_for_service("myapp:api", timeout=30_000)["healthy"] is True


def test_a_service_that_its_supervisor_saw_crash_is_not_well_any_more(wire):
    wire.post("/agents", {"id": "supervisor"})
    wire.post("/claim", {"id": "app:api"})
    wire.put("/services/app:api", {"status": "running", "checkedBy": "supervisor", "latency": 3})
    assert wire.get("/services/health/app:api")["healthy"] is True
    wire.put("/services/app:api", {"status": "crashed", "checkedBy": "supervisor"})
    assert wire.get("/services/health/app:api")["healthy"] is False
    assert [entry["type"] for entry in wire.get("/activity?type=service.unhealthy")["entries"]] == ["service.unhealthy"]


def test_what_was_released_is_not_looked_after_any_more(server, wire):
    port = wire.post("/claim", {"id": "app:api"})["port"]
    with socket.create_server(("127.0.0.1", port)):
        server.daemon.observe()
        assert list(server.daemon.adopted) == ["app:api"]
        wire.delete("/release?id=app:api")
        server.daemon.observe()
    assert server.daemon.adopted == {}


def test_who_takes_over_a_service_has_one_more(wire):
    wire.post("/agents", {"id": "a", "maxServices": 1})
    for id, agent in (("app:one", "b"), ("app:two", "a")):
        assert wire.post("/claim", {"id": id, "agent": agent}).status == 200
    assert wire.post("/claim", {"id": "app:one", "agent": "a"})["code"] == "LIMIT"
    assert wire.post("/claim", {"id": "app:two", "agent": "a"}).status == 200


def test_a_range_may_be_text_in_json_too(wire):
    assert 20_000 <= wire.post("/claim", {"id": "a", "range": "20000-20100"})["port"] <= 20_100


# ---- channels: workers ----------------------------------------------------------------------------------------------


def test_bare_pollers_share_the_messages_each_exactly_once(server, pd):
    got, guard = [], threading.Lock()

    def worker():
        wire = Wire(server.port)
        while True:
            message = wire.get("/msg/tasks/poll?timeout=10000")["message"]
            with guard:
                got.append(message["payload"])
            if message["payload"] == "stop":
                return

    workers = [in_background(worker) for _ in range(5)]
    for number in range(60):
        pd.publish("tasks", number)
    for _ in workers:
        pd.publish("tasks", "stop")
    for each in workers:
        each.result(30)
    assert sorted(n for n in got if n != "stop") == list(range(60)) and got.count("stop") == 5


def test_a_message_wakes_one_of_the_waiting_workers(server, pd):
    polls = [in_background(Wire(server.port).get, "/msg/tasks/poll?timeout=1500") for _ in range(4)]
    settle()
    pd.publish("tasks", "only one")
    messages = [poll.result(20)["message"] for poll in polls]
    assert sorted(message is None for message in messages) == [False, True, True, True]


def test_every_group_gets_every_message_once_from_the_oldest_kept_one(pd):
    for number in range(6):
        pd.publish("tasks", number)
    for group in ("build", "audit"):
        got = [pd.poll("tasks", group=group, timeout=1000)["message"]["payload"] for _ in range(6)]
        assert got == list(range(6))
        assert pd.poll("tasks", group=group, timeout=20)["message"] is None
    assert pd.poll("tasks", timeout=1000)["message"]["payload"] == 0  # the group without a name is one more


@pytest.mark.parametrize("how", ["closed", "half-closed", "reset"])
def test_a_poller_that_hung_up_takes_no_message(server, pd, how):
    line = Line(server.port)
    line.send(b"GET /msg/tasks/poll?timeout=20000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    settle()
    if how == "half-closed":
        line.socket.shutdown(socket.SHUT_WR)
    elif how == "reset":
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        line.file.close()
        line.socket.close()
    else:
        line.close()
    sent = pd.publish("tasks", "precious")["id"]
    assert pd.poll("tasks", timeout=10_000)["message"]["id"] == sent
    if how == "half-closed":
        assert b"precious" not in line.rest()
        line.close()


def test_pollers_that_hang_up_at_the_very_moment_of_the_publish_lose_nothing(server, wire):
    pollers = [Line(server.port).send(request_bytes(path=f"/msg/tasks-{n}/poll?timeout=20000")) for n in range(40)]
    settle()
    publisher = Line(server.port)
    for number, poller in enumerate(pollers):
        sent = request_bytes("POST", f"/msg/tasks-{number}", b'{"payload":%d}' % number)
        poller.close()
        publisher.send(sent).reply()
    publisher.close()
    got = [wire.get(f"/msg/tasks-{number}/poll?timeout=2000")["message"] for number in range(40)]
    assert [message and message["payload"] for message in got] == list(range(40))


def test_a_poll_in_vain_says_so_with_null(wire):
    answer = wire.get("/msg/empty/poll?timeout=20")
    assert answer.status == 200 and answer["message"] is None


def test_a_cursor_consumes_nothing(pd):
    ids = [pd.publish("news", number)["id"] for number in range(3)]
    for _ in range(2):
        after, got = 0, []
        for _ in range(3):
            answer = pd.poll("news", after=after, timeout=1000)
            got.append(answer["message"]["id"])
            after = answer["lastId"]
        assert got == ids
    assert pd.poll("news", timeout=1000)["message"]["id"] == ids[0]


def test_a_cursor_waits_for_what_is_not_there_yet(server, pd):
    last = pd.publish("news", "old")["id"]
    poll = in_background(PortDaddy(url=server.url).poll, "news", after=last, timeout=20_000)
    settle()
    sent = pd.publish("news", "new")["id"]
    answer = poll.result(20)
    assert (answer["message"]["id"], answer["lastId"]) == (sent, sent)


def test_a_cursor_and_a_group_together_are_refused(wire):
    refused = wire.get("/msg/news/poll?after=0&group=a")
    assert refused.status == 400 and "after" in refused["error"] and "group" in refused["error"]


def test_a_cursor_poll_knows_patterns(pd):
    sent = pd.publish("build:linux", "done")["id"]
    pd.publish("test:linux", "done")
    answer = pd.poll("build:*", after=0, timeout=1000)
    assert (answer["message"]["id"], answer["message"]["channel"]) == (sent, "build:linux")


def test_a_pattern_cannot_be_worked_on_only_followed(wire):
    refused = wire.get("/msg/build:*/poll?timeout=20")
    assert refused.status == 400 and refused["code"] == "BAD_VALUE"


def test_messages_are_listed_oldest_first_and_without_a_cursor_the_newest(wire):
    ids = [wire.post("/msg/news", {"payload": n, "sender": "me"})["id"] for n in range(6)]
    assert [m["id"] for m in wire.get("/msg/news?limit=2")["messages"]] == ids[-2:]
    listed = wire.get(f"/msg/news?after={ids[1]}&limit=3")
    assert [m["id"] for m in listed["messages"]] == ids[2:5] and listed["lastId"] == ids[4] and listed["count"] == 3
    message = listed["messages"][0]
    assert set(message) >= {"id", "channel", "payload", "sender", "createdAt"} and message["sender"] == "me"


def test_channels_are_listed_with_their_counts(wire):
    last = [wire.post("/msg/a", {"payload": n})["id"] for n in range(3)][-1]
    wire.post("/msg/b", {"payload": 0})
    for path in ("/channels", "/msg"):
        channel = {each["channel"]: each for each in wire.get(path)["channels"]}
        assert set(channel) == {"a", "b"} and (channel["a"]["count"], channel["a"]["lastId"]) == (3, last)
        assert set(channel["a"]) >= {"channel", "count", "lastId", "lastMessage", "subscribers"}


def test_a_cleared_channel_is_empty(wire):
    for number in range(3):
        wire.post("/msg/a", {"payload": number})
    assert wire.delete("/msg/a")["deleted"] == 3
    assert wire.get("/msg/a")["messages"] == [] and wire.get("/msg/a/poll?timeout=20")["message"] is None


def test_a_message_whose_time_is_over_is_not_delivered(clock, pd):
    pd.publish("news", "short", expires=1000)
    pd.publish("news", "long")
    clock.advance(1001)
    assert [m["payload"] for m in pd.get_messages("news")["messages"]] == ["long"]
    assert pd.poll("news", timeout=1000)["message"]["payload"] == "long"


# ---- channels: streams ----------------------------------------------------------------------------------------------


def test_a_stream_starts_now_and_numbers_its_events(server, pd):
    pd.publish("news", "old")
    stream = Stream(server.port, "/msg/news/subscribe")
    assert stream.next().kind == "connected"
    ids = [pd.publish("news", number)["id"] for number in range(3)]
    events = stream.messages(3)
    assert [event.id for event in events] == ids == [event.data["id"] for event in events]
    assert [event.data["payload"] for event in events] == [0, 1, 2]
    stream.close()


@pytest.mark.parametrize("how", ["after", "Last-Event-ID"])
def test_a_stream_resumes_exactly(server, pd, how):
    ids = [pd.publish("news", number)["id"] for number in range(5)]
    if how == "after":
        stream = Stream(server.port, f"/msg/news/subscribe?after={ids[1]}")
    else:
        stream = Stream(server.port, "/msg/news/subscribe", {"Last-Event-ID": str(ids[1])})
    events = [stream.next() for _ in range(4)]
    assert events[0].kind == "connected" and [event.id for event in events[1:]] == ids[2:]
    stream.close()


def test_a_reader_that_comes_back_to_the_same_address_goes_on_where_it_was(server, pd):
    ids = [pd.publish("news", number)["id"] for number in range(5)]
    for path in ("/msg/news/subscribe?", "/events?type=message.*&"):
        stream = Stream(server.port, f"{path}after={ids[0]}", {"Last-Event-ID": str(ids[3])})
        assert [event.id for event in stream.messages(1)] == ids[4:]
        stream.close()


def test_a_message_that_comes_while_others_are_read_comes_next(server, pd, monkeypatch):
    rows = server.daemon.store.rows

    def slowly(sql, *values):
        found = rows(sql, *values)
        if "FROM MESSAGES WHERE channel" in sql and "news" in values:
            monkeypatch.undo()
            pd.publish("news", "meanwhile")
        return found

    monkeypatch.setattr(server.daemon.store, "rows", slowly)
    last = pd.get_messages("news")["lastId"]
    assert pd.poll("news", after=last, timeout=0)["message"]["payload"] == "meanwhile"


def test_a_line_that_is_printed_while_others_are_read_comes_next(server, pd, monkeypatch):
    line_list = port_daddy.line_list

    def slowly(*args):
        found = line_list(*args)
        monkeypatch.undo()
        pd.add_logs("a", [{"text": "meanwhile"}])
        return found

    pd.claim("a")
    monkeypatch.setattr(port_daddy, "line_list", slowly)
    stream = Stream(server.port, "/services/a/logs?follow=true")
    assert stream.messages(1)[0].data["text"] == "meanwhile"
    stream.close()


@pytest.mark.parametrize(("kind", "lost"), [("lock.*", "events"), ("message.*", "messages")])
def test_a_slow_reader_of_the_log_is_told_what_it_has_missed(clock, server, pd, monkeypatch, kind, lost):
    monkeypatch.setattr(port_daddy, "KEEP_EVENTS", 2)
    monkeypatch.setattr(port_daddy, "KEEP_MESSAGES", 2)
    stream = port_daddy.events(server.daemon, port_daddy.Asker(), type=kind)
    assert b"connected" in next(stream)
    for number in range(5):
        pd.publish("news", number) if lost == "messages" else pd.lock(f"lock-{number}")
    with server.daemon.write() as tx:
        port_daddy.prune(tx, 0)
    told = next(stream).decode()
    assert told.count("event: gap") == 1 and told.index("event: gap") < told.index(f"event: {kind[:-1]}")
    pd.publish("news", "more") if lost == "messages" else pd.lock("more")
    assert "event: gap" not in next(stream).decode()
    stream.close()


def test_a_reader_is_told_of_what_it_can_no_longer_get(server, pd):
    ids = [pd.publish("news", number)["id"] for number in range(3)]
    pd.clear_channel("news")
    kept = pd.publish("news", "kept")["id"]
    stream = Stream(server.port, f"/msg/news/subscribe?after={ids[0]}")
    events = [event for event in (stream.next() for _ in range(3)) if event.kind != "connected"]
    assert events[0].kind == "gap" and ids[0] <= events[0].data["from"] <= events[0].data["to"] == ids[-1]
    assert events[1].id == kept
    stream.close()
    # Whoever has seen all that was dropped has no gap.
    stream = Stream(server.port, f"/msg/news/subscribe?after={ids[-1]}")
    assert [stream.next().kind, stream.next().id] == ["connected", kept]
    stream.close()


def test_a_reader_that_comes_from_another_database_is_told_to_start_anew(server, pd):
    pd.publish("news", 1)
    stream = Stream(server.port, "/msg/news/subscribe?after=1000000000")
    kinds = [stream.next().kind for _ in range(2)]
    assert set(kinds) == {"connected", "reset"}
    pd.publish("news", 2)
    assert [event.data["payload"] for event in stream.messages(2)] == [1, 2]  # all that this database has
    stream.close()


def test_a_pattern_subscribes_to_many_channels(server, pd):
    stream = Stream(server.port, "/msg/build:*/subscribe")
    assert stream.next().kind == "connected"
    ids = [pd.publish(channel, 1)["id"] for channel in ("build:a", "test:a", "build:b:c", "build")]
    assert [event.id for event in stream.messages(2)] == [ids[0], ids[2]]
    stream.close()


def test_subscribers_are_counted_while_they_listen(server, pd):
    stream = Stream(server.port, "/msg/news/subscribe")
    stream.next()
    pd.publish("news", 1)
    assert pd.list_channels()["channels"][0]["subscribers"] == 1
    stream.close()
    eventually(lambda: pd.list_channels()["channels"][0]["subscribers"] == 0)


def test_the_log_is_a_stream_too(server, pd):
    stream = Stream(server.port, "/events?type=lock.acquire&after=0")
    pd.claim("a")
    pd.lock("deploy", owner="me")
    event = stream.messages(1)[0]
    assert event.kind in ("lock.acquire", "message") and "deploy" in json.dumps(event.data)
    stream.close()


# ---- locks ----------------------------------------------------------------------------------------------------------


def test_a_lock_says_all_that_is_promised(wire):
    held = wire.post("/locks/deploy", {"owner": "a", "ttl": 60_000, "metadata": {"why": "x"}})
    assert set(held.body) >= {"success", "name", "owner", "token", "acquiredAt", "expiresAt", "waited", "message"}
    shown = wire.get("/locks/deploy")
    assert shown["held"] is True and shown["waiting"] == 0 and shown["metadata"] == {"why": "x"}
    same = ("owner", "token", "acquiredAt", "expiresAt")
    assert [shown[field] for field in same] == [held[field] for field in same]
    refused = wire.post("/locks/deploy", {"owner": "b"})
    assert (refused.status, refused["code"], refused["holder"]) == (409, "LOCK_HELD", "a")
    assert set(refused.body) >= {"heldSince", "expiresAt", "waiting", "retryAfter"}
    assert wire.get("/locks/never")["held"] is False


def test_the_same_owner_is_refused_like_anybody_else(wire):
    wire.post("/locks/deploy", {"owner": "a"})
    again = wire.post("/locks/deploy", {"owner": "a"})
    assert (again.status, again["code"]) == (409, "LOCK_HELD")


def test_waiters_are_served_first_come_first_served(server, pd):
    token = pd.lock("deploy", owner="holder")["token"]
    order, waits = [], []

    def wait(name):
        own = PortDaddy(url=server.url, agent_id=name)
        held = own.lock("deploy", owner=name, wait=60_000)
        order.append((name, held["token"]))
        own.unlock("deploy", owner=name)

    for number in range(5):
        waits.append(in_background(wait, f"waiter-{number}"))
        eventually(lambda number=number: pd.check_lock("deploy")["waiting"] == number + 1)
    pd.unlock("deploy", token=token)
    for each in waits:
        each.result(30)
    assert [name for name, _ in order] == [f"waiter-{n}" for n in range(5)]
    tokens = [token] + [token for _, token in order]
    assert tokens == sorted(set(tokens))


def parked_waiter(server, name, owner):
    """A connection on which a lock is waited for, once it is seen to stand in line."""
    line = Line(server.port)
    line.send(request_bytes("POST", f"/locks/{name}", json.dumps({"owner": owner, "wait": 60_000}).encode()))
    eventually(lambda: Wire(server.port).get(f"/locks/{name}")["waiting"])
    return line


def test_a_newcomer_does_not_overtake_those_who_wait(server, wire):
    # The release and the newcomer's request come in one piece, so that he asks before the woken one can have moved.
    newcomer = request_bytes("POST", "/locks/deploy", b'{"owner":"newcomer"}')
    for _ in range(30):
        wire.post("/locks/deploy", {"owner": "holder"})
        waiter, both = parked_waiter(server, "deploy", "waiter"), Line(server.port)
        both.send(request_bytes("DELETE", "/locks/deploy?owner=holder") + newcomer)
        assert both.reply()["released"] is True
        assert both.reply()["code"] == "LOCK_HELD"
        assert waiter.reply()["owner"] == "waiter"
        wire.delete("/locks/deploy?owner=waiter")
        waiter.close()
        both.close()


@pytest.mark.parametrize("how", ["closed", "half-closed"])
def test_a_waiter_that_hung_up_is_never_granted(server, pd, how):
    pd.lock("deploy", owner="holder")
    line = parked_waiter(server, "deploy", "gone")
    patient = in_background(PortDaddy(url=server.url).lock, "deploy", owner="patient", wait=20_000)
    eventually(lambda: pd.check_lock("deploy")["waiting"] == 2)
    line.socket.shutdown(socket.SHUT_WR) if how == "half-closed" else line.close()
    pd.unlock("deploy", owner="holder")
    assert patient.result(20)["owner"] == "patient"
    assert "gone" not in [facts(entry)["owner"] for entry in log(pd, "lock.acquire")]
    line.close()


@pytest.mark.skipif(not hasattr(socket, "MSG_MORE"), reason="only Linux sends a request and its end in one piece")
def test_who_hangs_up_in_the_same_breath_gets_neither_lock_nor_message(server, wire, pd):
    wire.post("/msg/tasks", {"payload": "precious"})
    for request in (request_bytes("POST", "/locks/deploy", b'{"owner":"gone"}'), request_bytes(path="/msg/tasks/poll")):
        line = Line(server.port)
        line.socket.send(request, socket.MSG_MORE)
        line.socket.shutdown(socket.SHUT_WR)
        assert b"200 OK" not in line.rest()
        line.close()
    assert wire.get("/locks/deploy")["held"] is False and log(pd, "lock.acquire") == []
    assert wire.get("/msg/tasks/poll?timeout=1000")["message"]["payload"] == "precious"


def test_a_waiter_that_hangs_up_at_the_very_moment_of_the_release_is_not_granted_either(server, pd, wire):
    for number in range(40):
        name = f"deploy-{number}"
        wire.post(f"/locks/{name}", {"owner": "holder"})
        waiter, other = parked_waiter(server, name, "gone"), Line(server.port)
        waiter.close()
        other.send(request_bytes("DELETE", f"/locks/{name}?owner=holder")).reply()
        other.close()
    assert {facts(entry)["owner"] for entry in log(pd, "lock.acquire")} == {"holder"}
    eventually(lambda: wire.get("/locks")["count"] == 0)


def test_a_waiter_that_hung_up_is_noticed_while_the_lock_is_held(server, pd):
    pd.lock("deploy", owner="holder")
    parked_waiter(server, "deploy", "gone").close()
    eventually(lambda: pd.check_lock("deploy")["waiting"] == 0)


def test_a_wait_in_vain_ends_with_lock_held(wire, cli):
    wire.post("/locks/deploy", {"owner": "a"})
    refused = wire.post("/locks/deploy", {"owner": "b", "wait": 30})
    assert (refused.status, refused["code"]) == (409, "LOCK_HELD")
    assert cli("lock", "deploy", "--owner", "b", "--wait", "30ms").returncode == 5
    assert wire.get("/locks/deploy")["waiting"] == 0


def test_the_wrong_owner_and_an_old_token_change_nothing(wire):
    old = wire.post("/locks/deploy", {"owner": "a"})["token"]
    wire.delete("/locks/deploy", {"token": old})
    held = wire.post("/locks/deploy", {"owner": "b"})
    before = wire.get("/locks/deploy").body
    for body, status, code in (
            ({"owner": "a"}, 403, "NOT_OWNER"), ({"token": old}, 409, "LOCK_LOST"), (None, 403, "NOT_OWNER")):
        refused = wire.delete("/locks/deploy", body)
        assert (refused.status, refused["code"]) == (status, code), body
    for body in ({"owner": "a"}, {"token": old}):
        refused = wire.put("/locks/deploy", {**body, "ttl": 1000})
        assert refused.status in (403, 409) and refused["code"] in ("LOCK_LOST", "NOT_OWNER")
    assert wire.delete("/locks/deploy", {"owner": "a"})["holder"] == "b"
    assert wire.get("/locks/deploy").body == before
    assert wire.get(f"/locks/deploy?token={old}")["valid"] is False
    assert wire.get(f"/locks/deploy?token={held['token']}")["valid"] is True


def test_a_release_of_nothing_is_no_error(wire):
    released = wire.delete("/locks/never?owner=a")
    assert (released.status, released["released"]) == (200, False)


def test_a_lock_without_an_owner_may_be_released_by_anybody(wire):
    wire.post("/locks/free-for-all")
    assert wire.delete("/locks/free-for-all")["released"] is True


def test_the_header_says_who_is_asking_when_the_body_does_not(wire):
    me = {"X-Agent-Id": "agent-7"}
    assert wire.post("/locks/a", headers=me)["owner"] == "agent-7"
    assert wire.post("/locks/b", {"owner": "other"}, headers=me)["owner"] == "other"
    assert wire.post("/locks/c", headers={"X-Pid": "4242"})["owner"] == "pid-4242"
    assert wire.delete("/locks/a", headers={"X-Agent-Id": "agent-8"}).status == 403
    assert wire.delete("/locks/a", headers=me)["released"] is True
    assert wire.post("/msg/a", {"payload": 1}, headers=me).status == 200
    assert wire.get("/msg/a")["messages"][0]["sender"] == "agent-7"


def test_force_breaks_a_lock_and_the_log_says_so(wire, pd):
    wire.post("/locks/deploy", {"owner": "a"})
    assert wire.delete("/locks/deploy?owner=b&force=true")["released"] is True
    assert facts(log(pd, "lock.release")[0])["owner"] == "a"


def test_an_extension_counts_from_now(clock, pd):
    held = pd.lock("deploy", owner="a", ttl=1000)
    clock.advance(900)
    extended = pd.extend_lock("deploy", token=held["token"], ttl=1000)
    assert extended["expiresAt"] == clock.wall + 1000
    clock.advance(900)
    assert pd.check_lock("deploy")["held"] is True and pd.check_lock("deploy")["token"] == held["token"]
    clock.advance(101)
    with pytest.raises(PortDaddyError) as lost:
        pd.extend_lock("deploy", owner="a", ttl=1000)
    assert lost.value.code == "LOCK_LOST"


def test_an_expiry_serves_the_next_in_the_queue(server, clock, pd):
    first = pd.lock("deploy", owner="a", ttl=5000)["token"]
    waiter = in_background(PortDaddy(url=server.url).lock, "deploy", owner="b", wait=30_000)
    eventually(lambda: pd.check_lock("deploy")["waiting"] == 1)
    clock.advance(5001)
    assert waiter.result(20)["token"] > first


def test_the_death_of_the_bound_process_frees_its_lock(pd, children):
    owner = children(sys.executable, "-c", ALIVE)
    read_line(owner.stdout)
    pd.lock("deploy", owner="a", pid=owner.pid)
    assert pd.check_lock("deploy")["pid"] == owner.pid
    end(owner)
    eventually(lambda: not pd.check_lock("deploy")["held"], 5)


def test_a_process_that_is_named_but_not_bound_does_not_matter(wire, children):
    owner = children(sys.executable, "-c", ALIVE)
    read_line(owner.stdout)
    wire.post("/locks/deploy", headers={"X-Pid": str(owner.pid)})
    end(owner)
    settle()
    assert wire.get("/locks/deploy")["held"] is True


def test_locks_are_listed_by_owner_and_by_pattern(wire):
    for name, owner in (("db/a", "x"), ("db/b", "y"), ("web", "x")):
        wire.post(f"/locks/{name}", {"owner": owner})
    assert {lock["name"] for lock in wire.get("/locks?owner=x")["locks"]} == {"db/a", "web"}
    assert {lock["name"] for lock in wire.get("/locks?pattern=db/*")["locks"]} == {"db/a", "db/b"}
    assert wire.get("/locks")["count"] == 3


def test_a_lock_that_was_refused_has_nothing_to_give_back(server, wire):
    wire.post("/agents", {"id": "a", "maxLocks": 0})
    asker = port_daddy.Asker(agent="a")
    with pytest.raises(PortDaddyError, match="at most 0"):
        port_daddy.lock(server.daemon, asker, "deploy")
    assert asker.undo is None


# ---- agents ---------------------------------------------------------------------------------------------------------


def test_an_agent_says_all_that_is_promised(wire):
    agent = wire.post("/agents", {"name": "Worker-1", "type": "worker", "metadata": {"k": 1}})["agentId"]
    shown = wire.get(f"/agents/{agent}")["agent"]
    assert set(shown) >= {"id", "name", "type", "pid", "registeredAt", "lastHeartbeat", "isActive",
                          "timeSinceHeartbeat", "ttl", "services", "locks", "metadata"}
    assert (shown["id"], shown["name"], shown["type"], shown["ttl"]) == (agent, "Worker-1", "worker", 120_000)
    assert shown["isActive"] is True and shown["metadata"] == {"k": 1}
    assert wire.get("/agents/nobody").status == 404


def test_to_register_again_changes_only_what_is_given(clock, pd):
    pd.register(id="a", name="One", type="worker", ttl=60_000)
    clock.advance(1000)
    pd.register(id="a", name="Two")
    agent = pd.get_agent("a")["agent"]
    assert (agent["name"], agent["type"], agent["ttl"]) == ("Two", "worker", 60_000)
    assert agent["lastHeartbeat"] == clock.wall


def test_heartbeats_keep_an_agent_alive(server, clock, wire):
    wire.post("/agents", {"id": "a", "ttl": 10_000})
    for _ in range(5):
        clock.advance(9_000)
        assert wire.post("/agents/a/heartbeat")["lastHeartbeat"] == clock.wall
    assert wire.get("/agents?active=true")["count"] == 1


def test_a_death_is_one_event_that_lists_what_was_freed(server, clock, pd, wire):
    wire.post("/agents", {"id": "mortal", "ttl": 10_000})
    wire.post("/agents", {"id": "other", "ttl": 100_000})
    wire.post("/claim", {"id": "myapp:api", "agent": "mortal"})
    wire.post("/claim", {"id": "myapp:web", "agent": "other"})
    wire.post("/locks/deploy", {"owner": "mortal", "ttl": 600_000})
    wire.post("/locks/kept", {"owner": "other", "ttl": 600_000})
    waiter = in_background(Wire(server.port).post, "/locks/deploy", {"owner": "heir", "wait": 20_000}, timeout=30)
    eventually(lambda: pd.check_lock("deploy")["waiting"] == 1)
    clock.advance(10_001)
    stale, = log(pd, "agent.stale")
    told = facts(stale)
    assert stale["targetId"] == "mortal" or told["agentId"] == "mortal"
    assert "deploy" in json.dumps(told["locks"]) and "myapp:api" in json.dumps(told["services"])
    assert "kept" not in json.dumps(told) and "myapp:web" not in json.dumps(told)
    assert waiter.result(20)["owner"] == "heir"
    assert [service["id"] for service in pd.list_services()["services"]] == ["myapp:web"]
    assert pd.get_agent("mortal")["agent"]["isActive"] is False
    assert [agent["id"] for agent in pd.list_agents(active_only=True)["agents"]] == ["other"]
    assert [agent["id"] for agent in pd.list_agents()["agents"]] != ["other"]  # still listed, as inactive


def test_a_dead_agent_that_beats_again_is_alive_again(clock, wire):
    wire.post("/agents", {"id": "a", "ttl": 1000})
    clock.advance(1001)
    assert wire.get("/agents/a")["agent"]["isActive"] is False
    assert wire.post("/agents/a/heartbeat").status == 200
    assert wire.get("/agents/a")["agent"]["isActive"] is True
    assert wire.post("/agents/unheard-of/heartbeat").status == 200
    assert wire.get("/agents/unheard-of")["agent"]["isActive"] is True


def test_an_agent_dies_with_the_process_it_is_bound_to(pd, children):
    process = children(sys.executable, "-c", ALIVE)
    read_line(process.stdout)
    pd.register(id="bound", pid=process.pid)
    pd.lock("deploy", owner="bound")
    end(process)
    eventually(lambda: pd.get_agent("bound")["agent"]["isActive"] is False, 5)
    assert pd.check_lock("deploy")["held"] is False


def test_an_agent_that_leaves_is_gone(pd):
    pd.register(id="a", name="A")
    assert PortDaddy(url=pd.url, agent_id="a").unregister()["unregistered"]
    with pytest.raises(PortDaddyError) as gone:
        pd.get_agent("a")
    assert gone.value.code == "NOT_FOUND"


def test_an_agent_has_no_more_than_it_may_have(wire):
    wire.post("/agents", {"id": "a", "maxServices": 1, "maxLocks": 1})
    assert wire.post("/claim", {"id": "one", "agent": "a"}).status == 200
    assert wire.post("/claim", {"id": "one", "agent": "a"}).status == 200  # the same one is not one more
    refused = wire.post("/claim", {"id": "two", "agent": "a"})
    assert (refused.status, refused["code"], refused["current"], refused["max"]) == (429, "LIMIT", 1, 1)
    assert wire.post("/locks/one", {"owner": "a"}).status == 200
    assert wire.post("/locks/two", {"owner": "a"})["code"] == "LIMIT"


# ---- webhooks -------------------------------------------------------------------------------------------------------


def test_a_webhook_is_kept_without_its_secret_ever_being_shown(wire, receiver, server):
    secret = "a-secret-nobody-may-see"
    added = wire.post("/webhooks", {"url": receiver.url, "events": ["service.claim"], "secret": secret})
    hook = added["id"]
    assert (added["url"], added["events"]) == (receiver.url, ["service.claim"])
    wire.post("/claim", {"id": "a"})
    eventually(lambda: receiver.got)
    shown = [added, wire.get("/webhooks"), wire.get(f"/webhooks/{hook}"), wire.get(f"/webhooks/{hook}/deliveries"),
             wire.put(f"/webhooks/{hook}", {"events": ["service.release"]}), wire.get("/activity"),
             wire.get("/config"), wire.post(f"/webhooks/{hook}/test"), wire.delete(f"/webhooks/{hook}")]
    assert all(answer.status == 200 for answer in shown)
    assert not any(secret in json.dumps(answer.body) for answer in shown)
    assert wire.get(f"/webhooks/{hook}").status == 404


def test_a_secret_that_is_refused_is_not_repeated(wire, receiver):
    for secret in ("short", 123456789, ["hush-hush"], "whsec_hush-hush!"):
        refused = wire.post("/webhooks", {"url": receiver.url, "secret": secret})
        assert refused.status == 400 and "secret" in refused["error"]
        assert not any(told in json.dumps(refused.body) for told in ("short", "123456789", "hush-hush"))


def test_a_secret_can_be_minted_and_is_told_once(wire, receiver):
    added = wire.post("/webhooks", {"url": receiver.url, "events": ["service.claim"], "secret": "auto"})
    secret = added["secret"]
    assert secret.startswith("whsec_")
    wire.post("/claim", {"id": "a"})
    delivery = eventually(lambda: receiver.got)[0]
    assert expected_signatures(delivery.headers, delivery.body, secret)[1] in delivery.headers["webhook-signature"]
    assert secret not in json.dumps(wire.get("/webhooks").body)


def test_a_delivery_carries_both_families_of_headers(pd, receiver):
    pd.add_webhook(receiver.url, events=["service.claim"], secret="a-good-secret")
    pd.claim("myapp:api")
    delivery = eventually(lambda: receiver.got)[0]
    headers, event = delivery.headers, delivery.event
    assert set(event) == {"id", "event", "type", "timestamp", "data"}
    assert event["type"] == headers["x-portdaddy-event"] == "service.claim"
    assert headers["x-portdaddy-delivery"] == headers["webhook-id"]
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert headers["content-type"].startswith("application/json")
    assert delivery.body == json.dumps(event, separators=(",", ":"), ensure_ascii=b"\\u" in delivery.body).encode()
    data = event["data"]
    assert (data["serviceId"], data["existing"]) == ("myapp:api", False) and isinstance(data["port"], int)
    ours, standard = expected_signatures(headers, delivery.body, "a-good-secret")
    assert headers["x-portdaddy-signature"] == ours and headers["webhook-signature"] == standard


def test_first_attempts_keep_the_order_of_the_events(pd, receiver):
    pd.add_webhook(receiver.url, events=["lock.acquire", "lock.release"])
    for _ in range(6):
        pd.unlock("deploy", token=pd.lock("deploy", owner="a")["token"])
    eventually(lambda: len(receiver.got) == 12)
    assert receiver.types() == ["lock.acquire", "lock.release"] * 6
    tokens = [delivery.event["data"]["token"] for delivery in receiver.got]
    assert tokens == sorted(tokens)


@pytest.mark.parametrize("failure", [500, 302, 404])
def test_a_failed_delivery_is_tried_again_with_the_same_id(pd, receiver, failure):
    receiver.behaviour = [failure]
    hook = pd.add_webhook(receiver.url, events=["service.claim"])["id"]
    pd.claim("a")
    eventually(lambda: len(receiver.got) >= 2, 15)
    assert len({delivery.headers["webhook-id"] for delivery in receiver.got}) == 1
    assert len({delivery.body for delivery in receiver.got}) == 1
    listed = eventually(lambda: [d for d in pd.list_deliveries(hook)["deliveries"] if d["status"] == "delivered"])[0]
    assert set(listed) >= {"id", "event", "status", "attempts", "responseStatus", "durationMs", "nextAttemptAt",
                           "error", "createdAt"}
    assert (listed["id"], listed["attempts"]) == (receiver.got[0].headers["webhook-id"], 2)


def test_a_retry_does_not_hold_up_what_comes_after(pd, receiver):
    receiver.behaviour = [500]
    pd.add_webhook(receiver.url, events=["service.claim"])
    pd.claim("first")
    eventually(lambda: receiver.got)
    pd.claim("second")
    eventually(lambda: len(receiver.got) == 3, 15)
    assert [delivery.event["data"]["serviceId"] for delivery in receiver.got] == ["first", "second", "first"]


def test_one_hanging_receiver_delays_nobody_else(pd, receiver, second_receiver):
    receiver.behaviour = ["hang"] * 10
    for url in (receiver.url, second_receiver.url):
        pd.add_webhook(url, events=["service.claim"])
    for number in range(5):
        pd.claim(f"s{number}")
    # An attempt may take ten seconds, and nobody else waits for it.
    eventually(lambda: len(second_receiver.got) == 5, 8)
    assert len(receiver.got) == 1


def test_a_webhook_hears_only_what_it_asked_for(pd, receiver):
    hook = pd.add_webhook(receiver.url, events=["service.claim"], filter_pattern="shop:*")["id"]
    pd.claim("blog:api")
    pd.lock("shop:lock", owner="a")
    pd.claim("shop:api")
    pd.update_webhook(hook, active=False)
    pd.claim("shop:never")
    pd.update_webhook(hook, active=True)
    pd.claim("shop:web")
    eventually(lambda: len(receiver.got) == 2)
    assert [delivery.event["data"]["serviceId"] for delivery in receiver.got] == ["shop:api", "shop:web"]
    eventually(lambda: pd.get_webhook(hook)["successCount"] == 2)  # its answer is noted after it has come
    assert pd.get_webhook(hook)["failureCount"] == 0


def test_a_published_message_is_an_event_for_webhooks(pd, receiver):
    pd.add_webhook(receiver.url, events=["message.publish"])
    sent = pd.publish("news", "hello", sender="me")["id"]
    assert eventually(lambda: receiver.got)[0].event["data"] == {"channel": "news", "id": sent, "sender": "me"}


def test_a_webhook_can_be_tried(pd, receiver):
    hook = pd.add_webhook(receiver.url, events=["service.release"], secret="a-good-secret")["id"]
    pd.test_webhook(hook)
    delivery = eventually(lambda: receiver.got)[0]
    ours, _ = expected_signatures(delivery.headers, delivery.body, "a-good-secret")
    assert delivery.headers["x-portdaddy-signature"] == ours


def test_the_events_are_listed(pd):
    assert set(re.findall(r"[a-z]+\.[a-z]+", json.dumps(pd.webhook_events()["events"]))) >= {
        "service.claim", "service.release", "service.healthy", "service.unhealthy", "agent.register",
        "agent.unregister", "agent.stale", "lock.acquire", "lock.release", "lock.expire", "message.publish",
        "daemon.start", "daemon.stop"}


@pytest.mark.parametrize("target", [
    "http://127.0.0.1:{own}/x", "http://localhost:{own}/x", "http://[::1]:{own}/x", "http://169.254.169.254/latest",
    "http://[::ffff:169.254.169.254]/", "http://[fe80::1]/", "http://224.0.0.1/", "http://[ff02::1]/",
    "http://0.0.0.0:81/", "http://[::]:81/", "http://2852039166/", "http://[64:ff9b::a9fe:a9fe]/"])
def test_a_webhook_target_may_not_be(server, wire, target):
    refused = wire.post("/webhooks", {"url": target.format(own=server.port), "events": ["*"]})
    assert (refused.status, refused["code"]) == (400, "TARGET_REFUSED")
    assert wire.get("/webhooks")["count"] == 0


def test_a_webhook_may_point_at_loopback(wire, receiver):
    for host in ("127.0.0.1", "localhost"):
        assert wire.post("/webhooks", {"url": f"http://{host}:{receiver.port}/x", "events": ["*"]}).status == 200


def test_deliveries_survive_a_kill(spawned, receiver):
    receiver.behaviour = [500] * 1000
    pd = PortDaddy(url=spawned.url)
    hook = pd.add_webhook(receiver.url, events=["service.claim"])["id"]
    for number in range(5):
        pd.claim(f"s{number}")
    listed = {delivery["id"] for delivery in pd.list_deliveries(hook)["deliveries"]}
    assert len(listed) == 5
    spawned.kill()
    receiver.behaviour = []
    spawned.start()
    good = eventually(lambda: (lambda ids: ids >= listed and ids)(
        {d.headers["webhook-id"] for d in list(receiver.got) if d.answered == 200}), 20)
    assert good == listed
    assert {d["id"] for d in PortDaddy(url=spawned.url).list_deliveries(hook)["deliveries"]} == listed


def signed_headers(body, secret, at):
    """Headers as a sender of the second family would make them at that time, in seconds."""
    headers = {"webhook-id": "dlv_1", "webhook-timestamp": str(int(at)), "X-PortDaddy-Timestamp": str(int(at * 1000)),
               "X-PortDaddy-Delivery": "dlv_1", "X-PortDaddy-Event": "service.claim"}
    ours, standard = expected_signatures(headers, body, secret)
    return {**headers, "X-PortDaddy-Signature": ours, "webhook-signature": standard}


@pytest.mark.parametrize("secret", ["a-good-secret", "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()])
def test_verify_webhook_knows_the_good_from_the_bad(secret):
    verify, body = port_daddy.verify_webhook, b'{"id":1}'
    good = signed_headers(body, secret, time.time())
    assert verify(good, body, secret) is True
    assert verify({name.upper(): value for name, value in good.items()}, body, secret) is True
    assert verify(good, body + b" ", secret) is False
    assert verify(good, body, "whsec_" + base64.b64encode(b"another key of 24 bytes.").decode()) is False
    assert verify({}, body, secret) is False
    assert verify({**good, "webhook-id": "dlv_2"}, body, secret) is False
    assert verify({**good, "webhook-signature": "v1,AAAA " + good["webhook-signature"]}, body, secret) is True
    for odd in ("", "v1,", "v1,é", "v2," + good["webhook-signature"][3:], "garbage"):
        assert verify({**good, "webhook-signature": odd, "X-PortDaddy-Signature": odd}, body, secret) is False


def test_verify_webhook_refuses_what_is_old_or_from_the_future():
    body = b"{}"
    for seconds in (-600, 600):
        headers = signed_headers(body, "a-good-secret", time.time() + seconds)
        assert port_daddy.verify_webhook(headers, body, "a-good-secret") is False
        assert port_daddy.verify_webhook(headers, body, "a-good-secret", tolerance=3_600_000) is True


def test_verify_webhook_accepts_what_the_daemon_sends(pd, receiver):
    pd.add_webhook(receiver.url, events=["service.claim"], secret="a-good-secret")
    pd.claim("a")
    delivery = eventually(lambda: receiver.got)[0]
    assert port_daddy.verify_webhook(delivery.headers, delivery.body, "a-good-secret") is True
    assert port_daddy.verify_webhook(delivery.headers, delivery.body, "secret") is False


def test_what_is_sent_through_a_webhook_that_is_off_is_said_to_wait(wire, receiver):
    hook = wire.post("/webhooks", {"url": receiver.url})["id"]
    sent = wire.post(f"/webhooks/{hook}/test")
    assert "warning" not in sent
    eventually(lambda: wire.get(f"/webhooks/{hook}")["successCount"] == 1)
    wire.put(f"/webhooks/{hook}", {"active": False})
    for path in ("test", f"deliveries/{sent['delivery']}/replay"):
        assert "switched off" in wire.post(f"/webhooks/{hook}/{path}")["warning"]


# ---- the log and the rest -------------------------------------------------------------------------------------------


def test_the_log_is_newest_first_and_can_be_filtered(pd):
    pd.claim("a", agent="me")
    pd.lock("deploy", owner="me")
    pd.publish("news", 1)
    entries = pd.get_activity()["entries"]
    assert [entry["id"] for entry in entries] == sorted((entry["id"] for entry in entries), reverse=True)
    types = [entry["type"] for entry in entries]
    assert types[:2] == ["lock.acquire", "service.claim"] and "message.publish" not in types
    assert set(entries[0]) >= {"id", "timestamp", "type", "agentId", "targetId", "details", "metadata"}
    assert [entry["targetId"] for entry in pd.get_activity(agent="me", limit=1)["entries"]] == ["deploy"]
    assert [entry["type"] for entry in pd.get_activity(target="a")["entries"]] == ["service.claim"]
    assert [entry["type"] for entry in pd.get_activity(after=entries[1]["id"])["entries"]] == ["lock.acquire"]
    assert pd.get_activity(since=int(time.time() * 1000) + 60_000)["entries"] == []


def test_a_claim_that_changes_nothing_is_no_event(pd):
    for _ in range(3):
        pd.claim("a")
    assert len(log(pd, "service.claim")) == 1


def test_the_daemon_tells_about_itself(pd, server):
    health = pd.health()
    assert health["pid"] == os.getpid() and health["active_ports"] == 0 and health["version"] == port_daddy.__version__
    assert "success" not in health and health["uptime_seconds"] >= 0
    version = pd.version()
    assert version["service"] == "port-daddy" and version["version"] == port_daddy.__version__
    assert set(version) >= {"protocol", "instance", "sha256", "startedAt", "pid", "uptime", "python"}
    assert version["sha256"] == hashlib.sha256(MODULE.read_bytes()).hexdigest() and "codeHash" not in version
    assert pd.ping() and isinstance(pd.metrics(), dict) and pd.config()


# ---- channels: work for a time --------------------------------------------------------------------------------------


def take(wire, channel="tasks", lease=30_000, timeout=0, agent=None, **more):
    """Poll for work with a lease, without waiting unless told."""
    query = urllib.parse.urlencode({"lease": lease, "timeout": timeout, **more})
    return wire.get(f"/msg/{channel}/poll?{query}", headers={"X-Agent-Id": agent} if agent else {})


def give(wire, how, taken, channel="tasks", **fields):
    """ack, nack or touch what was taken."""
    return wire.post(f"/msg/{channel}/{how}", {"receipt": taken["receipt"], **fields})


def groups(wire, channel="tasks"):
    return {each["group"]: (each["backlog"], each["leased"], each["dead"])
            for each in wire.get(f"/msg/{channel}/groups")["groups"]}


def test_a_lease_says_all_that_is_promised(clock, wire):
    sent = wire.post("/msg/tasks", {"payload": {"n": 1}})["id"]
    taken = take(wire)
    assert set(taken.body) >= {"success", "message", "lastId", "receipt", "attempt", "leaseExpiresAt"}
    assert (taken["message"]["id"], taken["lastId"], taken["attempt"]) == (sent, sent, 1)
    assert taken["message"]["payload"] == {"n": 1} and isinstance(taken["receipt"], str)
    assert taken["leaseExpiresAt"] == clock.wall + 30_000
    nothing = take(wire)
    assert nothing["message"] is None and "receipt" not in nothing.body and nothing["lastId"] == sent
    assert wire.get("/msg/tasks/poll?timeout=0").body.keys() == nothing.body.keys()
    done = give(wire, "ack", taken)
    assert (done.status, done["acked"], done["id"]) == (200, True, sent)


def test_a_leased_message_is_nobody_elses_in_the_group_and_everybody_elses_in_others(wire):
    wire.post("/msg/tasks", {"payload": 1})
    first = take(wire)
    assert take(wire)["message"] is None and wire.get("/msg/tasks/poll?timeout=0")["message"] is None
    assert take(wire, group="audit")["attempt"] == 1
    assert wire.get("/msg/tasks/poll?after=0&timeout=0")["message"]["id"] == first["message"]["id"]
    assert groups(wire) == {"default": (0, 1, 0), "audit": (0, 1, 0)}


def test_a_receipt_is_good_once_in_its_group_and_its_channel(wire):
    wire.post("/msg/tasks", {"payload": 1})
    wire.post("/msg/other", {"payload": 1})
    taken = take(wire)
    take(wire, group="audit")
    for refused in (give(wire, "ack", taken, group="audit"), give(wire, "nack", taken, group="unknown"),
                    give(wire, "touch", taken, "other"), wire.post("/msg/tasks/ack", {"receipt": "1-1"})):
        assert (refused.status, refused["code"]) == (409, "STALE_RECEIPT")
    assert groups(wire) == {"default": (0, 1, 0), "audit": (0, 1, 0)}
    assert give(wire, "ack", taken, group="default")["acked"] is True
    for how in ("ack", "nack", "touch"):
        assert give(wire, how, taken)["code"] == "STALE_RECEIPT"
    assert take(wire)["message"] is None


def test_what_is_given_back_is_given_again_before_what_is_newer(wire):
    ids = [wire.post("/msg/tasks", {"payload": number})["id"] for number in range(4)]
    taken = [take(wire) for _ in range(3)]
    for each in (taken[2], taken[0]):
        back = give(wire, "nack", each)
        assert (back["id"], back["dead"], back["attempt"]) == (each["message"]["id"], False, 1)
    assert groups(wire) == {"default": (3, 1, 0)}
    again = [take(wire) for _ in range(3)]
    assert [each["message"]["id"] for each in again] == [ids[0], ids[2], ids[3]]
    assert [each["attempt"] for each in again] == [2, 2, 1]
    assert len({each["receipt"] for each in taken + again}) == 6


def test_a_delay_keeps_what_was_given_back_until_it_is_over(clock, wire):
    old = wire.post("/msg/tasks", {"payload": "old"})["id"]
    give(wire, "nack", take(wire), delay=10_000)
    new = wire.post("/msg/tasks", {"payload": "new"})["id"]
    assert groups(wire)["default"] == (2, 0, 0)
    assert take(wire)["message"]["id"] == new
    clock.advance(9_999)
    assert take(wire)["message"] is None
    clock.advance(1)
    assert (lambda again: (again["message"]["id"], again["attempt"]))(take(wire)) == (old, 2)


def test_a_late_answer_is_stale_even_if_nobody_has_swept_yet(clock, wire):
    wire.post("/msg/tasks", {"payload": 1})
    for attempt in (1, 2):
        taken = take(wire, lease=500)
        assert taken["attempt"] == attempt
        clock.wall, clock.awake = clock.wall + 499, clock.awake + 499
        assert give(wire, "touch", taken, lease=500).status == 200
        clock.wall, clock.awake = clock.wall + 500, clock.awake + 500
        for how in ("ack", "nack", "touch"):
            assert give(wire, how, taken)["code"] == "STALE_RECEIPT"
    assert take(wire)["attempt"] == 3


def test_a_touch_begins_the_lease_anew(clock, wire):
    wire.post("/msg/tasks", {"payload": 1})
    taken = take(wire, lease=10_000)
    clock.advance(9_000)
    touched = give(wire, "touch", taken)
    assert (touched["leaseExpiresAt"], touched["id"]) == (clock.wall + 10_000, taken["message"]["id"])
    clock.advance(9_000)
    assert give(wire, "touch", taken, lease=60_000)["leaseExpiresAt"] == clock.wall + 60_000
    clock.advance(59_999)
    assert take(wire)["message"] is None
    assert give(wire, "touch", taken)["leaseExpiresAt"] == clock.wall + 60_000  # as it was last asked for
    clock.advance(60_001)
    assert take(wire)["attempt"] == 2


@pytest.mark.parametrize("how", ["nack", "expiry", "death"])
def test_after_its_last_attempt_a_message_is_a_dead_letter(clock, wire, pd, how):
    sent = wire.post("/msg/tasks", {"payload": {"bad": True}, "sender": "me"})["id"]
    for attempt in (1, 2, 3):
        wire.post("/agents", {"id": "worker", "ttl": 60_000})
        taken = take(wire, agent="worker", maxAttempts=3, group="team", lease=30_000 if how == "expiry" else 600_000)
        assert taken["attempt"] == attempt and groups(wire) == {"team": (0, 1, 0)}
        if how == "nack":
            back = give(wire, "nack", taken, group="team", error="it is bad")
            assert (back["dead"], back["attempt"]) == (attempt == 3, attempt)
        else:
            clock.advance(30_001 if how == "expiry" else 60_001)
    assert groups(wire) == {"team": (0, 0, 1)} and take(wire, group="team")["message"] is None
    dead, = wire.get("/msg/tasks/dead?group=team")["messages"]
    assert set(dead) >= {"id", "channel", "payload", "sender", "createdAt", "group", "attempts", "error", "diedAt"}
    assert (dead["id"], dead["payload"], dead["sender"], dead["group"]) == (sent, {"bad": True}, "me", "team")
    assert dead["attempts"] == 3 and dead["diedAt"] == clock.wall
    assert dead["error"] == "it is bad" if how == "nack" else dead["error"]
    died, = log(pd, "message.dead")
    assert died["targetId"] == "tasks" and facts(died) == {
        "channel": "tasks", "group": "team", "id": sent, "error": dead["error"]}
    assert wire.get("/msg/tasks/dead?group=other")["count"] == 0


def test_five_attempts_are_made_unless_it_is_said_otherwise(wire):
    wire.post("/msg/tasks", {"payload": 1})
    assert [give(wire, "nack", take(wire))["dead"] for _ in range(5)] == [False] * 4 + [True]
    wire.post("/msg/tasks", {"payload": 2})
    assert give(wire, "nack", take(wire, maxAttempts=1))["dead"] is True


def test_dead_letters_can_be_worked_on_again_one_or_all(wire):
    ids = [wire.post("/msg/tasks", {"payload": number})["id"] for number in range(3)]
    for group in ("a", "b"):
        for _ in ids:
            give(wire, "nack", take(wire, group=group, maxAttempts=1), group=group, error="no")
    assert wire.get("/msg/tasks/dead")["count"] == 6
    assert wire.post("/msg/tasks/redrive", {"group": "a", "id": ids[1]})["redriven"] == 1
    assert wire.post("/msg/tasks/redrive", {"group": "a", "id": ids[1]})["redriven"] == 0
    again = take(wire, group="a", maxAttempts=2)
    assert (again["message"]["id"], again["attempt"]) == (ids[1], 1)
    assert give(wire, "nack", again, group="a")["dead"] is False
    assert wire.post("/msg/tasks/redrive")["redriven"] == 5
    assert [take(wire, group="b")["message"]["id"] for _ in ids] == ids
    assert groups(wire) == {"a": (3, 0, 0), "b": (0, 3, 0)} and wire.get("/msg/tasks/dead")["count"] == 0
    assert wire.post("/msg/nothing-here/redrive")["redriven"] == 0


def set_free(how, wire, clock, taken):
    """Make available again what was taken by the agent `worker` for ten seconds."""
    for each in taken:
        if how == "nack":
            give(wire, "nack", each)
        elif how in ("delay", "redrive"):
            give(wire, "nack", each, delay=5_000)
    if how == "redrive":
        assert wire.post("/msg/tasks/redrive")["redriven"] == len(taken)
    elif how != "nack":
        clock.advance({"delay": 5_000, "expiry": 10_000, "death": 7_000}[how])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", ["nack", "delay", "expiry", "death", "redrive"])
def test_waiting_workers_get_at_once_what_becomes_free_again(server, clock, wire, how, count):
    wire.post("/agents", {"id": "worker", "ttl": 7_000})
    for number in range(count):
        wire.post("/msg/tasks", {"payload": number})
    taken = [take(wire, lease=10_000, agent="worker", maxAttempts=1 if how == "redrive" else 5) for _ in range(count)]
    waiting = [in_background(take, Wire(server.port), timeout=20_000) for _ in range(count)]
    settle()
    set_free(how, wire, clock, taken)
    got = [each.result(5)["message"] for each in waiting]
    assert sorted(message["payload"] for message in got) == list(range(count))


def test_a_dead_worker_hands_back_what_it_had_and_what_it_says_later_is_stale(clock, wire, pd):
    ids = [wire.post("/msg/tasks", {"payload": number})["id"] for number in range(3)]
    for agent in ("mortal", "other"):
        wire.post("/agents", {"id": agent, "ttl": 10_000 if agent == "mortal" else 100_000})
    taken = [take(wire, agent=agent) for agent in ("mortal", "mortal", "other")]
    wire.post("/locks/deploy", {"owner": "mortal", "ttl": 600_000})
    wire.post("/claim", {"id": "myapp:api", "agent": "mortal"})
    clock.advance(10_001)
    stale, = log(pd, "agent.stale")
    assert facts(stale) == {"agentId": "mortal", "locks": ["deploy"], "services": ["myapp:api"], "messages": ids[:2]}
    assert groups(wire) == {"default": (2, 1, 0)}
    for how in ("ack", "nack", "touch"):
        assert give(wire, how, taken[0])["code"] == "STALE_RECEIPT"
    assert give(wire, "ack", taken[2])["acked"] is True
    wire.post("/agents/mortal/heartbeat")
    again = take(wire, agent="mortal")
    assert (again["message"]["id"], again["attempt"]) == (ids[0], 2)
    assert give(wire, "ack", taken[0])["code"] == "STALE_RECEIPT" and give(wire, "ack", again)["acked"] is True


def test_a_worker_that_is_no_registered_agent_has_its_lease_and_nothing_else(clock, wire):
    wire.post("/msg/tasks", {"payload": 1})
    take(wire, agent="passer-by", lease=600_000)
    clock.advance(599_999)
    assert take(wire)["message"] is None
    clock.advance(2)
    assert take(wire)["attempt"] == 2


@pytest.mark.skipif(not hasattr(socket, "MSG_MORE"), reason="only Linux sends a request and its end in one piece")
@pytest.mark.parametrize("lease", ["", "&lease=30000"])
def test_a_worker_that_has_gone_uses_up_no_attempt(server, wire, lease):
    parked = Line(server.port).send(request_bytes(path=f"/msg/tasks/poll?timeout=20000{lease}"))
    settle()
    parked.socket.shutdown(socket.SHUT_WR)
    wire.post("/msg/tasks", {"payload": 1})
    line = Line(server.port)
    line.socket.send(request_bytes(path=f"/msg/tasks/poll?timeout=20000{lease}"), socket.MSG_MORE)
    line.socket.shutdown(socket.SHUT_WR)
    assert b"200 OK" not in line.rest() and b"200 OK" not in parked.rest()
    assert take(wire, timeout=5_000)["attempt"] == 1
    line.close()
    parked.close()


@contextlib.contextmanager
def unread(server, path, count):
    """So many requests at once by somebody who reads no reply, and resets the connection at the end; gives a look
    that tells how many messages of `tasks` have been taken, once the daemon is stuck in sending the last of them."""
    def taken():
        return count - groups(Wire(server.port)).get("default", (count,))[0]

    def is_stuck():
        before = taken()
        settle()
        settle()
        return 1 < before < count and before == taken() and before

    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(request_bytes(path=path) * count)
        yield is_stuck
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize("lease", ["", "&lease=600000"])
def test_an_answer_that_could_not_be_sent_is_taken_back_and_is_no_attempt(server, wire, lease):
    count, payload = 24, "x" * 260_000  # together more than fits between two sockets of which one is not read
    ids = [wire.post("/msg/tasks", {"payload": payload})["id"] for _ in range(count)]
    with unread(server, f"/msg/tasks/poll?timeout=0{lease}", count) as is_stuck:
        stuck = eventually(is_stuck)
    eventually(lambda: groups(wire)["default"] == (count - stuck + 1, stuck - 1 if lease else 0, 0))
    again = take(wire)
    assert (again["message"]["id"], again["attempt"]) == (ids[stuck - 1], 1)
    assert take(wire)["message"]["id"] == ids[stuck]


def test_what_is_put_back_does_not_make_a_forgotten_group_skip_anything(server, wire):
    count, payload = 24, "x" * 260_000
    ids = [wire.post("/msg/tasks", {"payload": payload})["id"] for _ in range(count)]
    with unread(server, "/msg/tasks/poll?timeout=0", count) as is_stuck:
        eventually(is_stuck)
        wire.delete("/msg/tasks/groups/default")
    settle()
    assert [(take(wire)["message"] or {}).get("id") for _ in ids] == ids


def test_bare_and_leasing_workers_share_one_group(wire):
    ids = [wire.post("/msg/tasks", {"payload": number})["id"] for number in range(3)]

    def bare():
        return (wire.get("/msg/tasks/poll?timeout=0")["message"] or {}).get("id")

    taken = take(wire)
    assert bare() == ids[1]
    give(wire, "nack", taken)
    assert bare() == ids[0]  # for good, since a bare poll is its own acknowledgement
    assert give(wire, "ack", taken)["code"] == "STALE_RECEIPT"
    assert take(wire)["message"]["id"] == ids[2] and bare() is None
    assert groups(wire) == {"default": (0, 1, 0)}


@pytest.mark.parametrize("query, field", [
    ("after=0&lease=1000", "after"), ("after=0&lease=1000&group=a", "after"), ("maxAttempts=3", "maxAttempts"),
    ("after=0&maxAttempts=3", "maxAttempts"), ("lease=0", "lease"), ("lease=86400001", "lease"),
    ("lease=1000&maxAttempts=0", "maxAttempts")])
def test_a_poll_that_contradicts_itself_is_refused_by_the_field(wire, query, field):
    wire.post("/msg/tasks", {"payload": 1})
    refused = wire.get(f"/msg/tasks/poll?timeout=0&{query}")
    assert (refused.status, refused["code"], refused["field"]) == (400, "BAD_VALUE", field)
    assert groups(wire) == {}


def test_a_pattern_cannot_be_leased(wire):
    assert take(wire, "build:*").status == 400


@pytest.mark.parametrize("end_of_it", ["cleared", "expired"])
@pytest.mark.parametrize("answer", ["ack", "nack", "expiry"])
def test_what_goes_away_during_its_lease_may_be_answered_but_never_comes_again(clock, wire, end_of_it, answer):
    wire.post("/msg/tasks", {"payload": 1, "expires": 10_000})
    taken = take(wire, lease=60_000)
    if end_of_it == "cleared":
        wire.delete("/msg/tasks")
    clock.advance(10_001)
    assert wire.get("/msg/tasks")["messages"] == [] and take(wire)["message"] is None
    if answer == "expiry":
        clock.advance(60_001)
        assert give(wire, "ack", taken)["code"] == "STALE_RECEIPT"
    else:
        assert give(wire, "touch", taken, lease=60_000).status == 200
        told = give(wire, answer, taken)
        assert told.status == 200 and (answer == "ack" or told["dead"] is False)
    assert take(wire)["message"] is None and groups(wire) == {"default": (0, 0, 0)}


def test_what_waits_to_be_given_again_and_dead_letters_go_with_their_message(clock, wire):
    for number in range(2):
        wire.post("/msg/tasks", {"payload": number, "expires": 60_000})
    give(wire, "nack", take(wire, maxAttempts=1))
    give(wire, "nack", take(wire), delay=1_000)
    assert groups(wire) == {"default": (1, 0, 1)}
    clock.advance(60_001)
    assert take(wire)["message"] is None and groups(wire) == {"default": (0, 0, 0)}
    assert wire.get("/msg/tasks/dead")["count"] == 0 and wire.post("/msg/tasks/redrive")["redriven"] == 0


def test_groups_tell_what_they_have_before_them(clock, wire):
    for number in range(5):
        wire.post("/msg/tasks", {"payload": number})
    assert wire.get("/msg/tasks/groups")["groups"] == []
    dead, delayed, leased = (take(wire, group="team", maxAttempts=1 if turn == 0 else 5) for turn in range(3))
    give(wire, "nack", dead, group="team")
    give(wire, "nack", delayed, group="team", delay=60_000)
    team, = wire.get("/msg/tasks/groups")["groups"]
    assert team == {"group": "team", "backlog": 3, "leased": 1, "dead": 1, "lastPollAt": clock.wall}
    clock.advance(10_000)
    assert wire.get("/msg/tasks/groups")["groups"][0]["lastPollAt"] == clock.wall - 10_000
    give(wire, "ack", leased, group="team")
    take(wire, group="team")
    assert wire.get("/msg/tasks/groups")["groups"][0]["lastPollAt"] == clock.wall


def test_a_group_that_is_forgotten_begins_anew(wire):
    ids = [wire.post("/msg/tasks", {"payload": number})["id"] for number in range(3)]
    give(wire, "nack", take(wire, group="team", maxAttempts=1), group="team")
    leased = take(wire, group="team")
    take(wire, group="other")
    assert wire.delete("/msg/tasks/groups/team")["removed"] is True
    assert wire.delete("/msg/tasks/groups/team")["removed"] is False
    assert groups(wire) == {"other": (2, 1, 0)} and wire.get("/msg/tasks/dead")["count"] == 0
    assert give(wire, "ack", leased, group="team")["code"] == "STALE_RECEIPT"
    assert [take(wire, group="team")["message"]["id"] for _ in ids] == ids


def test_leases_attempts_and_dead_letters_survive_a_kill(spawned):
    wire = spawned.wire
    ids = [wire.post("/msg/tasks", {"payload": number})["id"] for number in range(3)]
    give(wire, "nack", take(wire, maxAttempts=1), error="poison")
    give(wire, "nack", take(wire))
    again, leased = take(wire), take(wire)
    spawned.kill()
    spawned.start()
    assert groups(wire) == {"default": (0, 2, 1)} and take(wire)["message"] is None
    assert give(wire, "ack", leased)["id"] == ids[2] and give(wire, "nack", again)["attempt"] == 2
    assert take(wire)["attempt"] == 3
    assert [(dead["id"], dead["error"]) for dead in wire.get("/msg/tasks/dead")["messages"]] == [(ids[0], "poison")]


def test_a_full_channel_drops_nothing_that_workers_have_yet_to_do(wire, monkeypatch):
    monkeypatch.setattr(port_daddy, "KEEP_MESSAGES", 6)  # 10,000 is the promise, and takes too long
    assert take(wire)["message"] is None
    ids = [wire.post("/msg/tasks", {"payload": number})["id"] for number in range(6)]
    refused = wire.post("/msg/tasks", {"payload": "too many"})
    assert (refused.status, refused["code"], refused["group"]) == (507, "CHANNEL_FULL", "default")
    leased = take(wire)
    assert wire.post("/msg/tasks", {"payload": "still"})["code"] == "CHANNEL_FULL"  # leased is not done
    give(wire, "ack", leased)
    sent = wire.post("/msg/tasks", {"payload": "now"})["id"]  # one may go
    assert [message["id"] for message in wire.get("/msg/tasks")["messages"]] == [*ids[1:], sent]
    give(wire, "nack", take(wire, maxAttempts=1))
    assert wire.post("/msg/tasks", {"payload": "dead letters are kept"})["code"] == "CHANNEL_FULL"
    assert wire.post("/msg/others", {"payload": 1}).status == 200
    wire.delete("/msg/tasks/groups/default")
    assert wire.post("/msg/tasks", {"payload": "free again"}).status == 200


def test_a_full_channel_names_the_group_that_it_waits_for(wire, monkeypatch):
    monkeypatch.setattr(port_daddy, "KEEP_MESSAGES", 3)
    for group in ("a-done", "b-dead"):
        take(wire, group=group)
    for number in range(3):
        wire.post("/msg/tasks", {"payload": number})
    for _ in range(3):
        give(wire, "nack", take(wire, group="b-dead", maxAttempts=1), group="b-dead")
        wire.get("/msg/tasks/poll?timeout=0&group=a-done")
    assert wire.post("/msg/tasks", {"payload": 3})["group"] == "b-dead"


def test_a_bare_group_is_waited_for_too_and_a_channel_without_workers_is_a_ring(wire, monkeypatch):
    monkeypatch.setattr(port_daddy, "KEEP_MESSAGES", 3)
    ids = [wire.post("/msg/tasks", {"payload": number})["id"] for number in range(4)]
    assert wire.get("/msg/tasks/poll?timeout=0&group=bare")["message"]["id"] == ids[1]
    ids.append(wire.post("/msg/tasks", {"payload": 4})["id"])
    refused = wire.post("/msg/tasks", {"payload": 5})
    assert (refused["code"], refused["group"]) == ("CHANNEL_FULL", "bare")
    assert [message["id"] for message in wire.get("/msg/tasks")["messages"]] == ids[2:]


def test_a_group_that_nobody_polls_for_a_day_holds_nothing_back(clock, wire, monkeypatch):
    monkeypatch.setattr(port_daddy, "KEEP_MESSAGES", 3)
    take(wire, group="gone")
    for number in range(3):
        wire.post("/msg/tasks", {"payload": number})
    assert wire.post("/msg/tasks", {"payload": 3})["code"] == "CHANNEL_FULL"
    for _ in range(25):
        clock.advance(3_600_000)
    assert wire.post("/msg/tasks", {"payload": 4}).status == 200


def test_many_hands_make_every_task_done_once(server, wire, dice):
    for number in range(40):
        wire.post("/msg/tasks", {"payload": number})
    done, guard, clumsy = [], threading.Lock(), [dice.random() < 0.3 for _ in range(400)]

    def worker():
        own = Wire(server.port)
        while True:
            taken = take(own, timeout=1_000, maxAttempts=100)
            if taken["message"] is None:
                return
            if clumsy.pop():
                give(own, "nack", taken)
                continue
            assert give(own, "ack", taken)["acked"] is True
            with guard:
                done.append(taken["message"]["payload"])
                if len(done) == 40:
                    for _ in range(4):
                        own.post("/msg/tasks", {"payload": None})
            if taken["message"]["payload"] is None:
                return

    for each in [in_background(worker) for _ in range(4)]:
        each.result(30)
    assert sorted(number for number in done if number is not None) == list(range(40))


def test_a_semaphore_has_as_many_holders_as_it_says(wire):
    held = [wire.post("/locks/gpu", {"owner": owner, "limit": 3}) for owner in ("a", "b", "a")]
    tokens = [each["token"] for each in held]
    assert tokens == sorted(set(tokens))
    refused = wire.post("/locks/gpu", {"owner": "d", "limit": 3})
    assert (refused.status, refused["code"], refused["holder"]) == (409, "LOCK_HELD", "a")
    shown = wire.get("/locks/gpu")
    assert (shown["held"], shown["limit"], shown["owner"], shown["token"]) == (True, 3, "a", tokens[0])
    assert [(each["owner"], each["token"]) for each in shown["holders"]] == list(zip("aba", tokens))
    assert set(shown["holders"][0]) >= {"owner", "token", "pid", "acquiredAt", "expiresAt"}
    assert [lock["name"] for lock in wire.get("/locks")["locks"]] == ["gpu"]
    assert all(wire.get(f"/locks/gpu?token={token}")["valid"] for token in tokens)
    assert wire.delete(f"/locks/gpu?token={tokens[1]}")["released"] is True
    assert wire.get(f"/locks/gpu?token={tokens[1]}")["valid"] is False
    taken = wire.post("/locks/gpu", {"owner": "d", "limit": 3})
    assert taken["token"] > tokens[2]
    assert [each["token"] for each in wire.get("/locks/gpu")["holders"]] == [tokens[0], tokens[2], taken["token"]]


def test_an_ordinary_lock_is_one_of_one(wire):
    wire.post("/locks/deploy", {"owner": "a"})
    shown = wire.get("/locks/deploy")
    assert (shown["limit"], len(shown["holders"]), shown["holders"][0]["owner"]) == (1, 1, "a")
    free = wire.get("/locks/never")
    assert free["holders"] == [] and free["owner"] is None and free["token"] is None


def test_the_first_holder_fixes_the_limit_until_the_lock_is_free(wire):
    tokens = [wire.post("/locks/gpu", {"owner": "a", "limit": 2})["token"] for _ in range(2)]
    for fields in ({"limit": 3}, {"limit": 1}, {}, {"limit": 3, "wait": 20_000}):
        refused = wire.post("/locks/gpu", {"owner": "b", **fields})
        assert (refused.status, refused["code"], refused["limit"]) == (409, "LIMIT_MISMATCH", 2), fields
    wire.delete(f"/locks/gpu?token={tokens[0]}")
    assert wire.post("/locks/gpu", {"owner": "b", "limit": 3})["code"] == "LIMIT_MISMATCH"
    wire.delete(f"/locks/gpu?token={tokens[1]}")
    assert wire.post("/locks/gpu", {"owner": "b", "limit": 3}).status == 200
    assert wire.get("/locks/gpu")["limit"] == 3


def test_another_limit_is_refused_at_once_although_others_wait(server, wire):
    wire.post("/locks/gpu", {"owner": "a", "limit": 2})
    wire.post("/locks/gpu", {"owner": "a", "limit": 2})
    waiter = in_background(Wire(server.port).post, "/locks/gpu", {"owner": "b", "limit": 2, "wait": 20_000})
    eventually(lambda: wire.get("/locks/gpu")["waiting"] == 1)
    assert wire.post("/locks/gpu", {"owner": "c", "limit": 3})["code"] == "LIMIT_MISMATCH"
    wire.delete("/locks/gpu?force=true")
    assert waiter.result(10)["owner"] == "b"


def test_a_semaphore_is_extended_and_released_by_token_only(clock, wire):
    first, second = (wire.post("/locks/gpu", {"owner": "a", "limit": 2, "ttl": 10_000})["token"] for _ in range(2))
    before = wire.get("/locks/gpu").body
    for refused in (wire.put("/locks/gpu", {"owner": "a"}), wire.delete("/locks/gpu?owner=a"),
                    wire.delete("/locks/gpu")):
        assert (refused.status, refused["code"], refused["field"]) == (400, "BAD_VALUE", "token")
    assert wire.get("/locks/gpu").body == before
    assert wire.put("/locks/gpu", {"token": second, "ttl": 60_000})["expiresAt"] == clock.wall + 60_000
    clock.advance(10_001)
    assert [each["token"] for each in wire.get("/locks/gpu")["holders"]] == [second]
    assert wire.put("/locks/gpu", {"token": first})["code"] == "LOCK_LOST"


def test_a_semaphore_serves_its_waiters_first_come_first_served(server, wire):
    tokens = [wire.post("/locks/gpu", {"owner": "a", "limit": 2})["token"] for _ in range(2)]
    waiting = []
    for number in range(4):
        waiting.append(in_background(
            Wire(server.port).post, "/locks/gpu", {"owner": f"w{number}", "limit": 2, "wait": 20_000}))
        eventually(lambda number=number: wire.get("/locks/gpu")["waiting"] == number + 1)
    for number in range(4):
        wire.delete(f"/locks/gpu?token={tokens[number]}")
        tokens.append(waiting[number].result(10)["token"])
        settle()
        assert [each.done() for each in waiting] == [True] * (number + 1) + [False] * (3 - number)
    assert tokens == sorted(set(tokens))


def test_force_frees_every_seat_and_all_of_them_are_taken_again_at_once(server, wire, pd):
    tokens = [wire.post("/locks/gpu", {"owner": owner, "limit": 3})["token"] for owner in "abc"]
    waiting = [in_background(Wire(server.port).post, "/locks/gpu", {"owner": "w", "limit": 3, "wait": 20_000})
               for _ in range(3)]
    eventually(lambda: wire.get("/locks/gpu")["waiting"] == 3)
    assert wire.delete("/locks/gpu?force=true")["released"] is True
    assert min(each.result(10)["token"] for each in waiting) > max(tokens)
    assert [facts(entry)["token"] for entry in log(pd, "lock.release")] == tokens
    assert [each["owner"] for each in wire.get("/locks/gpu")["holders"]] == ["w"] * 3


def lose(how, wire, clock, children):
    """Take the lock `deploy`, with a delay of ten seconds, and lose it in one of the ways there are."""
    owner = children(sys.executable, "-c", ALIVE)
    read_line(owner.stdout)
    wire.post("/agents", {"id": "mortal", "ttl": 60_000})
    wire.post("/locks/deploy", {
        "owner": "mortal" if how == "agent" else "a", "ttl": 30_000 if how == "expiry" else 600_000,
        "lockDelay": 10_000, **({"pid": owner.pid} if how == "process" else {})})
    if how in ("release", "force"):
        wire.delete("/locks/deploy?owner=a" if how == "release" else "/locks/deploy?force=true")
    elif how == "process":
        end(owner)
        clock.daemon.tick(clock.daemon.now())
    else:
        clock.advance({"expiry": 30_000, "agent": 60_000}[how])


@pytest.mark.parametrize("how", ["expiry", "process", "agent"])
def test_a_lock_with_a_delay_stays_closed_after_its_holder_was_lost(server, clock, wire, children, how):
    lose(how, wire, clock, children)
    refused = wire.post("/locks/deploy", {"owner": "b"})
    assert (refused.status, refused["code"], refused["holder"]) == (409, "LOCK_HELD", None)
    assert (refused["heldSince"], refused["retryAfter"]) == (None, 10_000)
    assert wire.get("/locks/deploy")["held"] is False
    waiter = in_background(Wire(server.port).post, "/locks/deploy", {"owner": "b", "wait": 20_000})
    eventually(lambda: wire.get("/locks/deploy")["waiting"] == 1)
    clock.advance(9_999)
    settle()
    assert not waiter.done() and wire.post("/locks/deploy", {"owner": "c"})["retryAfter"] == 1
    clock.advance(1)
    assert waiter.result(5)["owner"] == "b"


@pytest.mark.parametrize("how", ["release", "force"])
def test_a_lock_with_a_delay_is_open_at_once_after_a_release(clock, wire, children, how):
    lose(how, wire, clock, children)
    assert wire.post("/locks/deploy", {"owner": "b"}).status == 200


def test_a_delay_goes_on_over_a_restart(make_server, clock, children):
    server = make_server(clock=clock)
    lose("expiry", Wire(server.port), clock, children)
    clock.advance(4_000)
    wire = Wire(restarted(make_server, clock, server, 1_000).port)
    assert wire.post("/locks/deploy", {"owner": "b"})["code"] == "LOCK_HELD"
    clock.advance(10_001)
    assert wire.post("/locks/deploy", {"owner": "b"}).status == 200


def test_the_longest_delay_of_those_who_were_lost_counts(clock, wire):
    for owner, ttl, delay in (("a", 1_000, 60_000), ("b", 2_000, 1_000)):
        wire.post("/locks/gpu", {"owner": owner, "limit": 2, "ttl": ttl, "lockDelay": delay})
    for ms in (1_000, 1_000, 58_999):
        clock.advance(ms)
    assert wire.post("/locks/gpu", {"owner": "c", "limit": 2})["code"] == "LOCK_HELD"
    clock.advance(1)
    assert wire.post("/locks/gpu", {"owner": "c", "limit": 2}).status == 200


HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from port_daddy import PortDaddy, PortDaddyError
pd = PortDaddy(url=sys.argv[2])
held = pd.lock("disk", owner="old", ttl=400)
print("write", held["token"], flush=True)
sys.stdin.readline()
print("write", held["token"], flush=True)
try:
    pd.extend_lock("disk", token=held["token"])
except PortDaddyError as problem:
    print(problem.code, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no way to stop a process")
def test_a_resource_that_remembers_the_highest_token_is_safe_from_a_holder_that_overslept(server, wire, children):
    highest, written = 0, []

    def resource(token):
        nonlocal highest
        if token < highest:
            return "refused"
        highest = token
        written.append(token)
        return "taken"

    def writes():
        word, token = read_line(holder.stdout).split()
        assert word == "write"
        return int(token)

    holder = children(sys.executable, "-c", HOLDER, str(MODULE.parent), server.url)
    old = writes()
    assert resource(old) == "taken"
    holder.send_signal(signal.SIGSTOP)
    new = wire.post("/locks/disk", {"owner": "new", "wait": 10_000})["token"]
    assert resource(new) == "taken"
    holder.send_signal(signal.SIGCONT)
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert writes() == old and resource(old) == "refused"  # it does not know yet, and does no harm
    assert read_line(holder.stdout) == "LOCK_LOST\n" and written == [old, new]


# ---- asking twice: Idempotency-Key ----------------------------------------------------------------------------------


def keyed(key, agent=None):
    return {"Idempotency-Key": key, **({"X-Agent-Id": agent} if agent else {})}


def body_bytes(answer):
    return answer.partition(b"\r\n\r\n")[2]


KEYED_REQUESTS = {
    "publish": ("/msg/news", {"payload": {"n": 1}}), "lock": ("/locks/a/b", {"owner": "me", "metadata": {}}),
    "webhook": ("/webhooks", {"url": "http://127.0.0.1:1/x", "secret": "auto"}), "ack": ("/msg/tasks/ack", {}),
    "nack": ("/msg/tasks/nack", {"error": "no"}), "touch": ("/msg/tasks/touch", {"lease": 9_000}),
    "redrive": ("/msg/poison/redrive", {})}


@pytest.mark.parametrize("what", KEYED_REQUESTS)
def test_who_asks_twice_under_one_key_gets_the_same_answer_and_it_is_done_once(wire, raw, what):
    path, fields = KEYED_REQUESTS[what]
    for channel in ("tasks", "poison"):
        wire.post(f"/msg/{channel}", {"payload": 1})
    give(wire, "nack", take(wire, "poison", maxAttempts=1), "poison")
    if path.startswith("/msg/tasks"):
        fields = {**fields, "receipt": take(wire)["receipt"]}

    def ask(body, key="key-1"):
        return raw(request_bytes("POST", path, json.dumps(body).encode(), Idempotency_Key=key, Connection="close"))

    def changed():
        newest = wire.get("/activity?type=*&limit=1000")["entries"]
        return (len(newest), wire.get("/metrics")["lastId"], wire.get("/metrics")["lastToken"], groups(wire),
                groups(wire, "poison"), wire.get("/webhooks")["count"])

    first = ask(fields)
    assert first.startswith(b"HTTP/1.1 200 ")
    after = changed()
    assert body_bytes(ask(fields)) == body_bytes(ask(dict(reversed(fields.items())))) == body_bytes(first)
    other = ask({**fields, **({"metadata": {"k": 1}} if what in ("lock", "webhook") else
                              {"payload": 2} if what == "publish" else {"group": "other"})})
    assert other.startswith(b"HTTP/1.1 422 ") and json.loads(body_bytes(other))["code"] == "KEY_REUSED"
    assert changed() == after
    if what not in ("publish", "webhook", "touch", "redrive"):  # with another key it is another request
        assert b" 409 " in ask(fields, "key-2")[:20]


def test_a_key_is_of_one_path_and_one_agent(wire):
    ids = [wire.post(path, {"payload": 1}, headers=keyed("k", agent))["id"]
           for path in ("/msg/a", "/msg/b") for agent in (None, "x", "y")]
    assert len(set(ids)) == 6
    assert wire.post("/msg/a", {"payload": 1}, headers=keyed("k", "x"))["id"] == ids[1]
    assert wire.post("/msg/a", {"payload": 1}, headers=keyed("K", "x"))["id"] not in ids
    assert wire.post("/locks/deploy", {}, headers=keyed("k", "x"))["owner"] == "x"
    assert wire.post("/locks/deploy", {}, headers=keyed("k", "y"))["code"] == "LOCK_HELD"


@pytest.mark.parametrize("key", ["a b", "é", "x" * 256, "tab\there", "\x7f"])
def test_a_key_that_is_none_is_refused_and_nothing_is_done(wire, raw, key):
    answer = raw(b"POST /msg/news HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 13\r\n"
                 b"Idempotency-Key: " + key.encode() + b'\r\n\r\n{"payload":1}')
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert wire.get("/msg/news")["count"] == 0
    assert wire.post("/msg/news", {"payload": 1}, headers=keyed("!~" + "x" * 253)).status == 200


def test_what_was_refused_is_tried_again_under_the_same_key(wire):
    wire.post("/locks/deploy", {"owner": "a"})
    mine = {"owner": "b", "wait": 20}
    for _ in range(2):
        assert wire.post("/locks/deploy", mine, headers=keyed("k"))["code"] == "LOCK_HELD"
    assert wire.post("/locks/deploy", {"owner": "b"}, headers=keyed("k"))["code"] == "LOCK_HELD"  # nothing is kept
    wire.delete("/locks/deploy?owner=a")
    token = wire.post("/locks/deploy", mine, headers=keyed("k"))["token"]
    wire.delete(f"/locks/deploy?token={token}")
    assert wire.post("/locks/deploy", mine, headers=keyed("k"))["token"] == token  # what was, not what is
    assert wire.get("/locks/deploy")["held"] is False
    assert wire.post("/msg/news", {"payload": 1, "zorn": 1}, headers=keyed("k")).status == 400
    assert wire.post("/msg/news", {"payload": 1}, headers=keyed("k")).status == 200


def test_a_second_request_waits_with_the_first_and_gets_its_answer(server, wire, pd):
    wire.post("/locks/deploy", {"owner": "a"})
    asked = [in_background(Wire(server.port).post, "/locks/deploy", {"owner": "b", "wait": 20_000},
                           headers=keyed("k")) for _ in range(3)]
    eventually(lambda: wire.get("/metrics")["waiters"] == 3)
    assert wire.get("/locks/deploy")["waiting"] == 1  # one place in the line
    reused = wire.post("/locks/deploy", {"owner": "b", "wait": 10_000}, headers=keyed("k"))
    assert (reused.status, reused["code"]) == (422, "KEY_REUSED")
    wire.delete("/locks/deploy?owner=a")
    assert len({json.dumps(each.result(10).body) for each in asked}) == 1
    assert len(log(pd, "lock.acquire")) == 2


def test_who_lost_the_connection_while_it_waited_may_ask_again_under_its_key(server, wire):
    wire.post("/locks/deploy", {"owner": "a"})
    body = json.dumps({"owner": "b", "wait": 20_000}).encode()
    cut = Line(server.port).send(request_bytes("POST", "/locks/deploy", body, Idempotency_Key="k"))
    eventually(lambda: wire.get("/locks/deploy")["waiting"] == 1)
    again = in_background(Wire(server.port).post, "/locks/deploy", json.loads(body), headers=keyed("k"))
    cut.close()
    settle()
    wire.delete("/locks/deploy?owner=a")
    assert again.result(10)["owner"] == "b" and wire.get("/locks/deploy")["token"] == again.result()["token"]


@pytest.mark.parametrize("key", [None, "k"])
def test_a_grant_whose_answer_was_not_sent_is_taken_back_unless_it_can_be_asked_for_again(server, wire, key):
    lock = next(one for one in port_daddy.OPERATIONS if one.name == "lock")
    asker = port_daddy.Asker(agent="a", key=key)
    port_daddy.perform(server.daemon, asker, lock, "/locks/deploy", lock.bind({}, {"name": "deploy"}))
    if asker.undo:  # what a connection does that could not send the answer
        asker.undo()
    assert wire.get("/locks/deploy")["held"] is (key is not None)


def test_when_the_first_is_refused_the_second_asks_for_itself(server, wire):
    wire.post("/locks/deploy", {"owner": "a"})
    fields = {"owner": "b", "wait": 400}
    first = in_background(Wire(server.port).post, "/locks/deploy", fields, headers=keyed("k"))
    eventually(lambda: wire.get("/locks/deploy")["waiting"] == 1)
    second = in_background(Wire(server.port).post, "/locks/deploy", fields, headers=keyed("k"))
    assert first.result(10)["code"] == "LOCK_HELD"
    wire.delete("/locks/deploy?owner=a")
    assert second.result(10).status == 200 and wire.get("/locks/deploy")["token"] == second.result()["token"]


def test_a_key_is_remembered_over_a_kill(spawned):
    wire = spawned.wire
    wire.post("/msg/tasks", {"payload": 1})
    taken = take(wire)
    asked = [("/msg/news", {"payload": 1}), ("/locks/deploy", {"owner": "me"}),
             ("/msg/tasks/nack", {"receipt": taken["receipt"]}), ("/webhooks", {"url": "http://127.0.0.1:1/"})]
    answers = [wire.post(path, fields, headers=keyed("k")).body for path, fields in asked]
    assert all(answer["success"] for answer in answers)
    spawned.kill()
    spawned.start()
    assert [wire.post(path, fields, headers=keyed("k")).body for path, fields in asked] == answers
    assert wire.get("/msg/news")["count"] == wire.get("/webhooks")["count"] == 1
    assert wire.post("/msg/news", {"payload": 2}, headers=keyed("k"))["code"] == "KEY_REUSED"


def test_a_key_is_kept_for_a_day(clock, wire):
    sent = wire.post("/msg/news", {"payload": 1}, headers=keyed("k"))["id"]
    for _ in range(23):
        clock.advance(3_600_000)
    assert wire.post("/msg/news", {"payload": 1}, headers=keyed("k"))["id"] == sent
    for _ in range(2):
        clock.advance(3_600_000)
    assert wire.post("/msg/news", {"payload": 2}, headers=keyed("k"))["id"] > sent


def test_a_key_means_nothing_where_it_is_not_promised(wire):
    wire.post("/locks/deploy", {"owner": "a"}, headers=keyed("k"))
    ends = [wire.put("/locks/deploy", {"owner": "a", "ttl": ttl}, headers=keyed("k"))["expiresAt"]
            for ttl in (1_000, 9_000)]
    assert ends[0] < ends[1]
    for number in range(2):
        assert wire.get(f"/msg/news/poll?timeout={number}", headers=keyed("k")).status == 200
        assert wire.post("/claim", {"id": f"s{number}"}, headers=keyed("k"))["id"] == f"s{number}"


def test_who_comes_back_from_the_dead_starts_with_nothing_and_is_announced(clock, wire, pd):
    wire.post("/agents", {"id": "a", "name": "Anna", "ttl": 10_000})
    token = wire.post("/locks/deploy", {"owner": "a", "ttl": 600_000})["token"]
    clock.advance(10_001)
    assert wire.put("/locks/deploy", {"token": token})["code"] == "LOCK_LOST"
    assert wire.post("/agents/a/heartbeat").status == 200
    agent = wire.get("/agents/a")["agent"]
    assert (agent["isActive"], agent["name"], agent["locks"], agent["services"]) == (True, "Anna", [], [])
    assert [entry["type"] for entry in pd.get_activity(type="agent.*")["entries"]] == [
        "agent.register", "agent.stale", "agent.register"]
    clock.advance(10_001)
    assert len(log(pd, "agent.stale")) == 2 and facts(log(pd, "agent.stale")[1])["locks"] == []


def test_every_seat_counts_for_the_locks_an_agent_may_have(clock, wire):
    wire.post("/agents", {"id": "a", "maxLocks": 2, "ttl": 600_000})
    tokens = [wire.post("/locks/gpu", {"owner": "a", "limit": 3, "ttl": 500})["token"] for _ in range(2)]
    refused = wire.post("/locks/gpu", {"owner": "a", "limit": 3})
    assert (refused.status, refused["code"], refused["current"], refused["max"]) == (429, "LIMIT", 2, 2)
    assert wire.post("/locks/other", {"owner": "a", "wait": 20_000})["code"] == "LIMIT"  # waiting would not help
    wire.delete(f"/locks/gpu?token={tokens[0]}")
    assert wire.post("/locks/other", {"owner": "a"}).status == 200
    clock.advance(501)
    assert wire.post("/locks/third", {"owner": "a"}).status == 200
    assert wire.post("/agents", {"id": "a", "maxLocks": 3}).status == 200
    assert wire.post("/locks/fourth", {"owner": "a"}).status == 200


def test_a_death_is_seen_as_a_whole_or_not_at_all(server, clock, wire):
    wire.post("/msg/tasks", {"payload": 1})
    wire.post("/agents", {"id": "mortal", "ttl": 10_000})
    take(wire, agent="mortal", lease=600_000)
    for number in range(20):
        wire.post(f"/locks/l{number}", {"owner": "mortal", "ttl": 600_000})
    seen, over = [], threading.Event()

    def look():
        own = Wire(server.port)
        while not over.is_set() or not seen:
            seen.append(own.get("/locks")["count"])
        return set(seen)

    looking = in_background(look)
    eventually(lambda: seen)
    clock.advance(10_001)
    over.set()
    assert looking.result(10) <= {20, 0}
    assert wire.get("/agents/mortal")["agent"]["locks"] == [] and groups(wire) == {"default": (1, 0, 0)}


def later(clock, wire, hook, ms):
    """Time passes for the webhook; the courier sleeps on the real clock, and a change of a hook is what wakes it."""
    clock.advance(ms)
    wire.put(f"/webhooks/{hook}")


def attempts(wire, hook):
    return [delivery["attempts"] for delivery in wire.get(f"/webhooks/{hook}/deliveries?limit=1000")["deliveries"]]


def test_a_receiver_that_is_gone_is_not_asked_again_until_somebody_says_so(wire, receiver, second_receiver):
    hook = wire.post("/webhooks", {"url": receiver.url, "events": ["service.claim", "webhook.disabled"]})["id"]
    wire.post("/webhooks", {"url": second_receiver.url, "events": ["webhook.*"]})
    receiver.behaviour = [410]
    wire.post("/claim", {"id": "a"})
    event = eventually(lambda: second_receiver.got)[0].event
    assert event["type"] == "webhook.disabled" and event["data"]["reason"]
    assert set(event["data"]) == {"webhookId", "url", "reason"}
    assert (event["data"]["webhookId"], event["data"]["url"]) == (hook, receiver.url)
    assert wire.get(f"/webhooks/{hook}")["active"] is False and wire.get("/webhooks?active=false")["count"] == 1
    wire.post("/claim", {"id": "never-told"})
    dead, = wire.get(f"/webhooks/{hook}/deliveries")["deliveries"]
    assert (dead["status"], dead["responseStatus"], dead["attempts"]) == ("dead", 410, 1)
    assert wire.put(f"/webhooks/{hook}", {"active": True})["active"] is True
    wire.post("/claim", {"id": "b"})
    eventually(lambda: len(receiver.got) == 2)
    assert [delivery.event["data"].get("serviceId") for delivery in receiver.got] == ["a", "b"]


def test_what_was_pending_goes_on_when_a_hook_is_enabled_again(wire, clock, receiver):
    hook = wire.post("/webhooks", {"url": receiver.url, "events": ["service.claim"]})["id"]
    receiver.behaviour = [500, 500, 410]
    for number in range(3):
        wire.post("/claim", {"id": f"s{number}"})
    eventually(lambda: wire.get(f"/webhooks/{hook}")["active"] is False)
    later(clock, wire, hook, 3_600_000)
    settle()
    assert len(receiver.got) == 3
    wire.put(f"/webhooks/{hook}", {"active": True})
    eventually(lambda: wire.get(f"/webhooks/{hook}")["successCount"] == 2)
    assert sorted(delivery.event["data"]["serviceId"] for delivery in receiver.got[3:]) == ["s0", "s1"]


def let_die(wire, clock, hook, count):
    """So many claims, and time until each of their deliveries has had all its attempts."""
    known = len(attempts(wire, hook))
    for number in range(count):
        wire.post("/claim", {"id": f"s{known + number}"})
    for attempt in range(1, 9):
        eventually(lambda attempt=attempt: all(made >= attempt for made in attempts(wire, hook)[:count]), 20)
        later(clock, wire, hook, 400_000)


def test_a_hook_whose_deliveries_die_one_after_the_other_is_disabled(server, clock, wire, receiver):
    hook = wire.post("/webhooks", {"url": f"http://127.0.0.1:{unused_port()}/", "events": ["service.claim"]})["id"]
    wire.post("/webhooks", {"url": receiver.url, "events": ["webhook.disabled"]})
    let_die(wire, clock, hook, 19)
    assert wire.get(f"/webhooks/{hook}")["active"] is True and set(attempts(wire, hook)) == {8}
    let_die(wire, clock, hook, 1)
    event = eventually(lambda: receiver.got)[0].event
    assert event["data"]["webhookId"] == hook and "20" in event["data"]["reason"]
    assert wire.get(f"/webhooks/{hook}")["active"] is False
    assert {each["status"] for each in wire.get(f"/webhooks/{hook}/deliveries")["deliveries"]} == {"dead"}


@pytest.mark.parametrize("status, said, shortest, longest", [
    (503, "120", 120_000, 120_000), (429, "7", 7_000, 7_000), (500, "120", 800, 1_200), (503, "0", 800, 1_200),
    (503, "soon", 800, 1_200), (503, "-5", 800, 1_200), (429, "9" * 400, 800, 86_400_000)])
def test_a_receiver_may_say_when_to_come_again(clock, wire, busy_receiver, status, said, shortest, longest):
    busy_receiver.answers = [(status, said)]
    hook = wire.post("/webhooks", {"url": busy_receiver.url, "events": ["service.claim"]})["id"]
    wire.post("/claim", {"id": "a"})

    def delivery():
        return wire.get(f"/webhooks/{hook}/deliveries")["deliveries"][0]

    first = eventually(lambda: delivery()["attempts"] and delivery())
    pause = first["nextAttemptAt"] - clock.wall
    assert first["responseStatus"] == status and shortest <= pause <= longest
    later(clock, wire, hook, pause - 1)
    settle()
    assert delivery()["attempts"] == 1
    later(clock, wire, hook, 1)
    eventually(lambda: delivery()["status"] == "delivered")


def test_a_replay_is_the_same_delivery_signed_anew(clock, wire, receiver):
    secret = "a-good-secret"
    hook = wire.post("/webhooks", {"url": receiver.url, "events": ["service.claim"], "secret": secret})["id"]
    other = wire.post("/webhooks", {"url": receiver.url, "events": ["lock.acquire"]})["id"]
    wire.post("/claim", {"id": "a"})
    delivery = eventually(lambda: receiver.got)[0].headers["webhook-id"]
    eventually(lambda: wire.get(f"/webhooks/{hook}")["successCount"] == 1)
    clock.advance(100_000)
    replayed = wire.post(f"/webhooks/{hook}/deliveries/{delivery}/replay")
    assert (replayed["id"], replayed["delivery"], replayed["status"]) == (hook, delivery, "pending")
    first, second = eventually(lambda: len(receiver.got) == 2 and receiver.got)
    assert second.body == first.body and second.headers["webhook-id"] == delivery
    assert int(second.headers["webhook-timestamp"]) == int(first.headers["webhook-timestamp"]) + 100
    assert port_daddy.verify_webhook(second.headers, second.body, secret) is True
    for unknown in (f"/webhooks/{other}/deliveries/{delivery}", f"/webhooks/{hook}/deliveries/dlv_0_{delivery[-1]}",
                    f"/webhooks/{hook}/deliveries/nonsense", f"/webhooks/hook_0/deliveries/{delivery}"):
        assert wire.post(f"{unknown}/replay").status == 404
    assert len(wire.get(f"/webhooks/{hook}/deliveries")["deliveries"]) == 1


def test_the_dead_can_be_replayed_with_all_their_attempts(clock, wire, receiver):
    hook = wire.post("/webhooks", {"url": receiver.url, "events": ["service.claim"]})["id"]
    receiver.behaviour = [500] * 9
    let_die(wire, clock, hook, 1)
    dead, = wire.get(f"/webhooks/{hook}/deliveries")["deliveries"]
    assert (dead["status"], dead["attempts"], dead["nextAttemptAt"]) == ("dead", 8, None)
    wire.post(f"/webhooks/{hook}/deliveries/{dead['id']}/replay")
    eventually(lambda: len(receiver.got) == 9)
    eventually(lambda: attempts(wire, hook) == [1])
    later(clock, wire, hook, 1_300)
    eventually(lambda: wire.get(f"/webhooks/{hook}/deliveries")["deliveries"][0]["status"] == "delivered")
    assert {each.headers["webhook-id"] for each in receiver.got} == {dead["id"]}


def test_there_are_a_hundred_webhooks_and_not_one_more(wire):
    for number in range(100):
        added = wire.post("/webhooks", {"url": f"http://127.0.0.1:1/{number}", "events": ["daemon.stop"]})
        assert added.status == 200
    refused = wire.post("/webhooks", {"url": "http://127.0.0.1:1/", "events": ["daemon.stop"]})
    assert (refused.status, refused["code"], refused["current"], refused["max"]) == (429, "LIMIT", 100, 100)
    wire.delete(f"/webhooks/{added['id']}")
    assert wire.post("/webhooks", {"url": "http://127.0.0.1:1/", "events": ["daemon.stop"]}).status == 200


def test_a_dead_letter_is_told_to_a_webhook(wire, receiver):
    assert {"message.dead", "webhook.disabled"} <= set(wire.get("/webhooks/events")["events"])
    wire.post("/webhooks", {"url": receiver.url, "events": ["message.dead"], "filterPattern": "tasks"})
    for channel in ("others", "tasks"):
        sent = wire.post(f"/msg/{channel}", {"payload": 1})["id"]
        give(wire, "nack", take(wire, channel, maxAttempts=1), channel, error="it is bad")
    told = eventually(lambda: receiver.got)[0].event
    assert told["data"] == {"channel": "tasks", "group": "default", "id": sent, "error": "it is bad"}


# ---- bad input, made from the table of operations -------------------------------------------------------------------

FLAG = ["maybe", 2, [], {}]
NUMBER = ["abc", -1, 1.5, True, [], {}, "1e3", "٣"]
NAME = ["", "a b", "x" * 101, "..", "é", "a\0b", [], {}, True]
TEXT = [5, [], {}, True]
OBJECT = ["text", 5, [], True, {"k": "x" * 11_000}]
SPAN = [-1, "", "soon", "60 parsecs", True, [], {}, 10 ** 30]
ADDRESS = ["", "nonsense", "ftp://host/", "http://", "javascript:alert(1)", 5, [], {}, "http://a b/"]

# For each field by its name on the wire: values that no operation may accept. What a query can carry is tried as text.
BAD_VALUES = {
    **dict.fromkeys(["exact", "move", "force", "expired", "active", "rangeOnly", "unmanagedOnly", "follow"], FLAG),
    **dict.fromkeys(["agent", "owner", "sender", "checkedBy", "group", "agentId", "channel"], NAME),
    **dict.fromkeys(["limit", "after", "token", "tail"], [*NUMBER, 10 ** 30]),
    **dict.fromkeys(["maxServices", "maxLocks"], NUMBER),
    **dict.fromkeys(["since", "until"], NUMBER[:3]),
    **dict.fromkeys(["cmd", "cwd", "filterPattern"], TEXT),
    **dict.fromkeys(["name", "type"], [*TEXT, "x" * 2000]),
    **dict.fromkeys(["expires", "ttl"], SPAN),
    **dict.fromkeys(["url", "health"], ADDRESS),
    "id": ["", "a b", "a/b", "x" * 200, "..", "é", 5, [], {}, True],
    "pattern": ["", "a b", "é", 5, [], {}],
    "pair": ["", "a b", 5, [], {}],
    "services": [[], ["a b"], [5], {}, 5],
    "port": [*NUMBER, 0, 65536, 10 ** 30],
    "range": ["abc", [1], [9, 3], [0, 70_000], {}, [1, 2, 3], ["a", "b"], True],
    "pid": [*NUMBER, 0, 10 ** 30],
    "wait": [*SPAN, 3_600_001],
    **dict.fromkeys(["lease", "delay", "lockDelay"], [*SPAN, 86_400_001]),
    "maxAttempts": [*NUMBER, 0, 1001],
    "receipt": ["", "5", "a-b", "1-2-3", 5, [], {}],
    "delivery": ["a b", "..", "x" * 200],
    "timeout": [*SPAN, 300_001],
    "latency": ["abc", -1, True, [], {}],
    "status": ["flying", "", 5, [], {}],
    "error": TEXT,
    "env": ["a b", "..", "x" * 200],
    "events": [["no.such.event"], [5], {}, 5, [[]], "no.such.event"],
    "secret": ["", 5, [], {}],
    "metadata": OBJECT,
    "target": [[], {}],
    "lines": [5, {}, "text", [5], [{"text": 5}]],
}
# The path parameters have names of their own; these are the values with which a request is otherwise good.
GOOD_PATH = {"hook": "1", "webhook": "1"}
GOOD_BODY = {"id": "good:api", "payload": 1, "url": "https://example.org/", "services": ["good"], "owner": "good",
             "lines": [{"stream": "stdout", "text": "good"}], "receipt": "1-1"}


def wire_name(name):
    head, *tail = name.rstrip("_").split("_")
    return head + "".join(part.capitalize() for part in tail)


def operation_cases():
    """Every field of every operation with every bad value of its name."""
    for operation in port_daddy.OPERATIONS:
        method, path = operation.routes[0]
        in_path = re.findall(r"{(\w+)", path)
        for name in operation.fields:
            for value in BAD_VALUES.get(wire_name(name), []):
                if name in in_path and (not isinstance(value, str) or value == ""):
                    continue
                if (operation.name, name, value) == ("redrive", "id", 5):
                    continue  # the one id that is a number
                if method == "GET" and (value in (5, True) or not isinstance(value, (str, int, float))):
                    continue  # a query holds texts, and "5" and "true" are texts like others
                yield operation, name, value


def request_with(operation, changed):
    """An otherwise good request for this operation, with these fields changed."""
    method, path = operation.routes[0]
    required = [name for name, field in operation.fields.items() if field.required]
    values = {name: GOOD_BODY.get(wire_name(name), "good") for name in required}
    values.update({name: GOOD_PATH.get(name, "good") for name in re.findall(r"{(\w+)", path)})
    values.update(changed)
    for name in re.findall(r"{(\w+)", path):
        text = urllib.parse.quote(str(values.pop(name)), safe="")
        path = re.sub(rf"{{{name}[^}}]*}}", text, path)  # percent-encoded: nothing in it means anything to `re`
    sent = {wire_name(name): value for name, value in values.items()}
    if method == "GET":
        return method, path + ("?" + urllib.parse.urlencode(sent) if sent else ""), None
    return method, path, sent


def test_every_field_of_every_operation_has_bad_values_to_be_tried():
    fields = {wire_name(name) for operation in port_daddy.OPERATIONS for name in operation.fields}
    assert fields - set(BAD_VALUES) <= {"payload"}


def test_no_bad_value_of_any_field_is_accepted_or_changes_anything(wire):
    wire.post("/claim", {"id": "good"})
    wire.post("/agents", {"id": "good"})
    wire.post("/locks/good", {"owner": "good"})
    before, wrong = fingerprint(wire), []
    for operation, name, value in operation_cases():
        if name in ("id", "pattern") and operation.name in ("release", "list_services", "list_locks") and value == "":
            continue
        method, path, body = request_with(operation, {name: value})
        answer = wire(method, path, body)
        told = f"{method} {path[:120]} {str(body)[:120]} -> {answer.status} {str(answer.body)[:200]}"
        if answer.status not in (400, 413):
            wrong.append(told)
        elif wire_name(name) not in answer["error"]:
            wrong.append("unnamed: " + told)
    after = fingerprint(wire)
    assert not wrong, "\n".join([f"{len(wrong)} wrong:", *wrong])
    assert after == before


@pytest.mark.parametrize("operation", port_daddy.OPERATIONS, ids=lambda operation: operation.name)
def test_an_unknown_field_is_refused_by_its_name(wire, operation):
    before = fingerprint(wire)
    method, path, body = request_with(operation, {})
    if method == "GET":
        path += ("&" if "?" in path else "?") + "zorn=1"
    else:
        body = {**body, "zorn": 1}
    refused = wire(method, path, body)
    assert (refused.status, refused["code"]) == (400, "UNKNOWN_FIELD")
    assert "zorn" in refused["error"] and port_daddy.__version__ in refused["error"]
    assert fingerprint(wire) == before


@pytest.mark.parametrize("path, body, meant", [
    ("/claim", {"id": "a", "prot": 3333}, "port"), ("/locks/a", {"ownr": "a"}, "owner"),
    ("/agents", {"nmae": "x"}, "name"),
    ("/locks/a", {"meta_data": {}}, "metadata")])
def test_a_misspelt_field_is_answered_with_the_one_that_was_meant(wire, path, body, meant):
    refused = wire.post(path, body)
    assert refused["code"] == "UNKNOWN_FIELD" and f"{meant}" in refused["error"]


def test_a_query_field_given_twice_is_refused(wire):
    assert wire.get("/services?pattern=a&pattern=b").status == 400


def test_a_required_field_that_is_missing_is_named(wire):
    for operation in port_daddy.OPERATIONS:
        method, path, body = request_with(operation, {})
        for name, field in operation.fields.items():
            if field.required and "{" + name not in operation.routes[0][1] and body:
                without = {key: value for key, value in body.items() if key != wire_name(name)}
                refused = wire(method, path, without)
                assert refused.status == 400 and wire_name(name) in refused["error"], (operation.name, name, refused)


# =====================================================================================================================
# 10. WORKERS — the loops beside the requests
# =====================================================================================================================


def test_nobody_has_to_ask_for_a_lease_to_end(server, pd, receiver):
    pd.add_webhook(receiver.url, events=["lock.expire"])
    pd.lock("deploy", owner="a", ttl=30)
    assert eventually(lambda: receiver.got)[0].event["data"]["lockName"] == "deploy"


def test_a_server_ends_all_that_it_started(make_server):
    before = threading.active_count()
    server = make_server()
    pd = PortDaddy(url=server.url)
    pd.add_webhook("http://127.0.0.1:9/", events=["*"])  # the discard port: nobody answers
    pd.claim("a")
    poll = in_background(Wire(server.port).get, "/msg/tasks/poll?timeout=30000")
    stream = Stream(server.port, "/msg/tasks/subscribe")
    settle()
    began = time.monotonic()
    make_server.stop(server)
    assert time.monotonic() - began < 6
    assert poll.result(10).status == 503
    stream.close()
    eventually(lambda: threading.active_count() <= before, 8)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_a_start_and_a_stop_are_events(make_server, tmp_path):
    server = make_server(home=tmp_path / "kept")
    make_server.stop(server)
    pd = PortDaddy(url=make_server(home=tmp_path / "kept").url)
    assert len(log(pd, "daemon.start")) == 2 and len(log(pd, "daemon.stop")) == 1
    assert facts(log(pd, "daemon.start")[0])["version"] == port_daddy.__version__


# =====================================================================================================================
# 11. HTTP — bytes and their refusal
# =====================================================================================================================

CANARY = b"POST /msg/canary HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n" + b'{"payload":1}'


def test_one_connection_serves_many_requests(server):
    line = Line(server.port)
    for number in range(20):
        assert line.send(request_bytes("POST", "/msg/a", b'{"payload":%d}' % number)).reply().status == 200
    assert line.send(request_bytes(path="/msg/a")).reply()["count"] == 20
    line.close()


def test_pipelined_requests_are_answered_in_order(server):
    line = Line(server.port)
    line.send(b"".join(request_bytes("POST", f"/msg/c{n}", b'{"payload":1}') for n in range(10)))
    assert [line.reply()["channel"] for _ in range(10)] == [f"c{n}" for n in range(10)]
    line.close()


def test_a_request_may_arrive_byte_by_byte(server):
    line = Line(server.port)
    for byte in request_bytes("POST", "/msg/a", b'{"payload":"drip"}'):
        line.send(bytes([byte]))
    assert line.reply().status == 200
    line.close()


def test_a_daemon_listens_on_both_loopbacks(server):
    for family in ("127.0.0.1", "::1"):
        line = Line(server.port, family)
        assert line.send(request_bytes()).reply().status == 200
        line.close()


def test_http_1_0_and_connection_close_end_the_connection(raw):
    assert b" 200 " in raw(b"GET /health HTTP/1.0\r\n\r\n").split(b"\r\n")[0]
    assert b" 200 " in raw(request_bytes(Connection="close")).split(b"\r\n")[0]


def test_every_reply_names_its_server(server, raw):
    for data in (request_bytes(Connection="close"), request_bytes(path="/nowhere", Connection="close"),
                 b"nonsense\r\n\r\n", request_bytes(Host="evil.example"), request_bytes("BREW", Connection="close")):
        reply = raw(data)
        found = re.search(rb"\r\nServer: port-daddy/(\S+) protocol/\d+ instance/\S+\r\n", reply)
        assert found and found[1].decode() == port_daddy.__version__, reply


HEAD = b"POST /msg/a HTTP/1.1\r\nHost: localhost\r\n"
BODY = b'\r\n\r\n{"payload":1}'
BAD_FRAMES = {
    "lines that end in a bare LF": (400, b"GET /health HTTP/1.1\nHost: localhost\n\n"),
    "one line that ends in a bare LF": (400, HEAD + b"X: y\nContent-Length: 13" + BODY),
    "a bare CR in a header": (400, HEAD + b"X: a\rY: b\r\nContent-Length: 13" + BODY),
    "a NUL in a header": (400, HEAD + b"X: a\0b\r\nContent-Length: 13" + BODY),
    "a control in a header": (400, HEAD + b"X: a\x01b\r\nContent-Length: 13" + BODY),
    "a folded header": (400, HEAD + b"X: a\r\n b\r\nContent-Length: 13" + BODY),
    "a line without a colon": (400, HEAD + b"nonsense\r\nContent-Length: 13" + BODY),
    "space before the colon": (400, HEAD + b"Content-Length : 13" + BODY),
    "space inside a name": (400, HEAD + b"Content Length: 13" + BODY),
    "a header without a name": (400, HEAD + b": x\r\nContent-Length: 13" + BODY),
    "two hosts": (400, HEAD + b"Host: localhost\r\nContent-Length: 13" + BODY),
    "no host": (400, b"POST /msg/a HTTP/1.1\r\nContent-Length: 13" + BODY),
    "two lengths": (400, HEAD + b"Content-Length: 13\r\nContent-Length: 14" + BODY),
    "the same length twice": (400, HEAD + b"Content-Length: 13\r\nContent-Length: 13" + BODY),
    "a list of lengths": (400, HEAD + b"Content-Length: 13, 13" + BODY),
    "a length with a sign": (400, HEAD + b"Content-Length: +13" + BODY),
    "a negative length": (400, HEAD + b"Content-Length: -1" + BODY),
    "a length in hexadecimal": (400, HEAD + b"Content-Length: 0xd" + BODY),
    "a length with an underscore": (400, HEAD + b"Content-Length: 1_3" + BODY),
    "an empty length": (400, HEAD + b"Content-Length:" + BODY),
    "a length in other digits": (400, HEAD + "Content-Length: ١٣".encode() + BODY),
    "a length and chunks": (400, HEAD + b"Content-Length: 13\r\nTransfer-Encoding: chunked" + BODY),
    "a length and chunks that fit": (400, HEAD + b"Content-Length: 23\r\nTransfer-Encoding: chunked\r\n\r\n"
                                     b'd\r\n{"payload":1}\r\n0\r\n\r\n'),
    "another coding": (501, HEAD + b"Transfer-Encoding: gzip" + BODY),
    "chunks of something": (501, HEAD + b"Transfer-Encoding: gzip, chunked" + BODY),
    "a coding that is almost chunked": (501, HEAD + b"Transfer-Encoding: xchunked" + BODY),
    "two spaces in the request line": (400, b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "a tab in the request line": (400, b"GET\t/health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "a request line of two words": (400, b"GET /health\r\nHost: localhost\r\n\r\n"),
    "another protocol": (400, b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n"),
    "a long version": (400, b"GET /health HTTP/1.10\r\nHost: localhost\r\n\r\n"),
    "a fragment": (400, b"GET /health#x HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "a target beyond ASCII": (400, "GET /msg/é HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()),
    "a NUL in the target": (400, b"GET /msg/\0 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "a greeting in TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
}


@pytest.mark.parametrize("title", BAD_FRAMES)
def test_a_frame_that_is_not_strict_is_refused_and_what_follows_is_not_run(server, wire, title):
    status, data = BAD_FRAMES[title]
    line = Line(server.port)
    reply = line.send(data + CANARY).reply()
    assert reply.status == status and reply["success"] is False and reply["code"]
    assert reply.headers["connection"] == "close" and line.closes()
    line.close()
    assert wire.get("/channels")["count"] == 0


def test_a_chunked_body_is_read_or_refused_but_never_misread(server, wire):
    line = Line(server.port)
    reply = line.send(HEAD + b'Transfer-Encoding: chunked\r\n\r\nd\r\n{"payload":1}\r\n0\r\n\r\n' + CANARY).reply()
    assert reply.status in (200, 501)
    if reply.status == 501:
        assert line.closes() and wire.get("/channels")["count"] == 0
    else:
        assert wire.get("/msg/a")["messages"][0]["payload"] == 1
    line.close()


@pytest.mark.parametrize("status, data", [
    (414, request_bytes(path="/" + "a" * 9000)), (431, request_bytes(X="y" * 9000)),
    (431, request_bytes(**{f"X_{n}": "y" for n in range(101)})),
    (431, request_bytes(**{f"X_{n}": "y" * 3000 for n in range(12)})),
    (413, request_bytes("POST", "/msg/a", Content_Length=1024 * 1024 + 1)),
    (413, request_bytes("POST", "/msg/a", Content_Length="9" * 30)),
], ids=["target", "header line", "many headers", "large headers", "large body", "absurd body"])
def test_whatever_is_too_large_is_refused_before_it_is_read(server, status, data):
    line = Line(server.port)
    assert line.send(data).reply().status == status
    assert line.closes()
    line.close()


def test_a_body_of_one_mib_is_read(server):
    line = Line(server.port)
    body = b'{"payload":1}'.ljust(1024 * 1024)
    assert line.send(request_bytes("POST", "/msg/a", body)).reply().status == 200
    line.close()


def test_a_reply_before_the_body_was_read_closes_the_connection(server, wire):
    line = Line(server.port)
    head = request_bytes("POST", "/msg/a", Host="evil.example", Content_Length=len(CANARY))
    assert line.send(head + CANARY).reply().status == 403
    assert line.closes()
    line.close()
    assert wire.get("/channels")["count"] == 0


def test_expect_100_continue_is_answered(server):
    line = Line(server.port)
    line.send(request_bytes("POST", "/msg/a", Content_Length=13, Expect="100-continue"))
    assert line.file.readline() == b"HTTP/1.1 100 Continue\r\n" and line.file.readline() == b"\r\n"
    assert line.send(b'{"payload":1}').reply().status == 200
    line.close()


def test_a_known_path_with_the_wrong_method_says_which_are_right(wire):
    refused = wire.put("/claim")
    assert (refused.status, refused["code"]) == (405, "METHOD_NOT_ALLOWED") and refused.headers["allow"] == "POST"
    allowed = {word.strip() for word in wire("PATCH", "/locks/a").headers["allow"].split(",")}
    assert allowed >= {"GET", "POST", "PUT", "DELETE"}


def test_an_unknown_path_is_404_and_an_unknown_method_501(wire, server):
    for path in ("/nowhere", "/claim/", "/msg/a/b/c", "/CLAIM", "//claim", "/msg/%2e%2e"):
        answer = wire.post(path)
        assert answer.status in (400, 404) and answer["success"] is False, path
    line = Line(server.port)
    for method in ("BREW", "get"):
        reply = line.send(request_bytes(method)).reply()
        assert (reply.status, reply["code"]) == (501, "NOT_IMPLEMENTED")
        if reply.headers.get("connection") == "close":
            line.close()
            line = Line(server.port)
    line.close()


def test_a_path_is_split_first_and_decoded_then(wire):
    wire.post("/claim", {"id": "myapp:api"})
    assert wire.get("/services/myapp%3Aapi").status == 200
    assert wire.get("/services%2Fmyapp:api").status == 404
    assert wire.get("/services/my%zzapp").status == 400


def test_a_head_request_has_no_body(server):
    line = Line(server.port)
    line.send(request_bytes("HEAD") + request_bytes())
    head = line.file.readline()
    assert head.split()[1] in (b"200", b"405", b"501")
    for _header in iter(line.file.readline, b"\r\n"):
        pass
    assert line.file.readline().startswith(b"HTTP/1.1 ") or head.split()[1] == b"501"
    line.close()


BAD_JSON = {
    "nothing": b"", "not JSON": b"payload=1", "cut off": b'{"payload":', "a trailing comma": b'{"payload":1,}',
    "something after it": b'{"payload":1} x', "a name twice": b'{"payload":1,"payload":2}',
    "a name twice, deeper": b'{"payload":{"a":1,"a":2}}', "NaN": b'{"payload":NaN}',
    "Infinity": b'{"payload":-Infinity}',
    "a number that is infinite": b'{"payload":1e999}', "a byte order mark": b'\xef\xbb\xbf{"payload":1}',
    "half a surrogate": b'{"payload":"\\ud800"}', "half a surrogate in a name": b'{"payload":{"\\udc00":1}}',
    "bytes that are not UTF-8": b'{"payload":"\xff"}', "a surrogate in UTF-8": b'{"payload":"\xed\xa0\x80"}',
    "depth of 65": b'{"payload":' + b"[" * 65 + b"]" * 65 + b"}", "depth without end": b'{"payload":' + b"[" * 100_000,
    "an integer of 301 digits": b'{"payload":' + b"9" * 301 + b"}", "a control in a string": b'{"payload":"a\nb"}',
    "single quotes": b"{'payload':1}", "a comment": b'{"payload":1/**/}', "a leading zero": b'{"payload":01}',
}


@pytest.mark.parametrize("title", BAD_JSON)
def test_json_is_strict(server, wire, title):
    line = Line(server.port)
    reply = line.send(request_bytes("POST", "/msg/a", BAD_JSON[title], Content_Length=len(BAD_JSON[title]))).reply()
    # An empty body is an empty object to some; then what is missing is the payload.
    assert reply.status == 400 and (reply["code"] == "BAD_JSON" or title == "nothing"), reply
    line.close()
    assert wire.get("/channels")["count"] == 0


def test_json_that_is_just_inside_the_limits_is_taken(server):
    line = Line(server.port)
    for body in (b'{"payload":' + b"[" * 60 + b"]" * 60 + b"}", b'{"payload":' + b"9" * 300 + b"}",
                 b' {"payload":"\\ud83d\\ude00"}\r\n', b'{"payload":-0.0}'):
        assert line.send(request_bytes("POST", "/msg/a", body)).reply().status == 200, body[:40]
    line.close()


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null", b"true"])
def test_a_body_is_an_object(raw, body):
    assert raw(request_bytes("POST", "/msg/a", body, Connection="close")).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("kind, status", [
    ("application/json", 200), ("application/json; charset=utf-8", 200), ("application/vnd.x+json", 200), (None, 200),
    ("application/x-www-form-urlencoded", 200), ("text/plain", 415), ("multipart/form-data; boundary=x", 415)])
def test_a_body_comes_under_a_type_that_no_foreign_form_can_send(server, kind, status):
    line = Line(server.port)
    reply = line.send(request_bytes("POST", "/msg/a", b'{"payload":1}', Content_Type=kind)).reply()
    assert reply.status == status
    assert status == 200 or reply["code"] == "UNSUPPORTED_MEDIA"
    line.close()


def test_a_page_stands_beside_the_operations_or_leaves_the_request_to_one(server, wire, monkeypatch):
    monkeypatch.setitem(port_daddy.PAGES, "/page", lambda daemon, accept: port_daddy.Page("text/plain", b"hello", "x 'y'"))
    monkeypatch.setitem(port_daddy.PAGES, "/health", lambda daemon, accept: port_daddy.Page("text/plain", b"well")
                        if accept == "text/plain" else None)
    shown = wire.get("/page")
    assert (shown.status, shown.body, shown.headers["content-type"]) == (200, b"hello", "text/plain")
    assert shown.headers["content-security-policy"] == "x 'y'"
    refused = wire.post("/page")
    assert (refused.status, refused.headers["allow"]) == (405, "GET")
    assert wire.get("/health")["status"] == "ok" and wire.get("/health", headers={"Accept": "text/plain"}).body == b"well"


def test_who_finds_every_connection_taken_is_told_so_by_this_daemon(make_server):
    server = make_server(PORT_DADDY_MAX_CONNECTIONS="8")
    lines = [Line(server.port).send(request_bytes(path="/msg/a/poll")) for _ in range(8)]
    eventually(lambda: server.daemon.bell.crowd == 8)
    line = Line(server.port)
    refused = line.reply()
    assert (refused.status, refused["code"]) == (503, "BUSY") and refused.headers["retry-after"] == "1"
    assert server.daemon.instance in refused.headers["server"] and line.rest() == b""
    for each in (line, *lines):
        each.close()


def test_the_watcher_sleeps_only_while_there_is_nobody_to_watch(server, monkeypatch):
    rings, watcher = [], port_daddy.Watcher(server.daemon)
    monkeypatch.setattr(server.daemon.bell, "ring", lambda *topics: rings.extend(topics))
    assert watcher.work() == port_daddy.TICK_AT_MOST
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(door.getsockname()) as line:
        watcher.add(line, server.daemon.bell.join(["a"]))
        assert rings == ["watcher"] and watcher.work() == 250
        watcher.watched.clear()
        assert watcher.work() == port_daddy.TICK_AT_MOST


# ---- the gate -------------------------------------------------------------------------------------------------------

ROUTES = [("GET", "/health"), ("GET", "/services"), ("POST", "/claim"), ("PUT", "/locks/a"),
          ("DELETE", "/release?id=a"), ("DELETE", "/msg/a"), ("OPTIONS", "/claim"), ("GET", "/msg/a/subscribe"),
          ("GET", "/nowhere"), ("BREW", "/claim")]
HOSTILE = [
    ("HOST_NOT_ALLOWED", {"Host": "evil.example"}), ("HOST_NOT_ALLOWED", {"Host": "localhost.evil.example"}),
    ("HOST_NOT_ALLOWED", {"Host": "0.0.0.0"}), ("HOST_NOT_ALLOWED", {"Host": "localhost."}),
    ("HOST_NOT_ALLOWED", {"Host": "127.1"}), ("HOST_NOT_ALLOWED", {"Host": "[::ffff:127.0.0.1]"}),
    ("HOST_NOT_ALLOWED", {"Host": "localhost6:9876"}), ("HOST_NOT_ALLOWED", {"Host": "localhost@evil.example"}),
    ("HOST_NOT_ALLOWED", {"Host": ""}),
    ("ORIGIN_NOT_ALLOWED", {"Origin": "https://evil.example"}), ("ORIGIN_NOT_ALLOWED", {"Origin": "null"}),
    ("ORIGIN_NOT_ALLOWED", {"Origin": "http://localhost:1"}), ("ORIGIN_NOT_ALLOWED", {"Origin": ""}),
    ("CROSS_SITE", {"Sec-Fetch-Site": "cross-site"}), ("CROSS_SITE", {"Sec-Fetch-Site": "same-site"}),
    ("CROSS_SITE", {"Sec-Fetch-Site": "nonsense"}),
]


@pytest.mark.parametrize("method, path", ROUTES)
def test_a_web_page_gets_nothing_whatever_it_asks(server, wire, method, path):
    wire.post("/claim", {"id": "a"})
    wire.post("/msg/a", {"payload": 1})
    wire.post("/locks/a", {"owner": "a"})
    before = fingerprint(wire)
    for code, headers in HOSTILE:
        named = {name.replace("-", "_"): value for name, value in headers.items()}
        line = Line(server.port)
        body = b'{"id":"b","owner":"a"}' if method in ("POST", "PUT") else b""
        reply = line.send(request_bytes(method, path, body, **named)).reply()
        # An OPTIONS is a question that only foreign pages ask, so it may be refused for that alone.
        assert reply.status == 403 and (reply["code"] == code or method == "OPTIONS"), (headers, reply)
        assert not any(name.startswith("access-control") for name in reply.headers)
        assert line.closes(), headers
        line.close()
    assert fingerprint(wire) == before


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "localhost:1", "127.0.0.1:9876", "[::1]", "[::1]:80"])
def test_a_loopback_name_passes_with_any_port(server, host):
    line = Line(server.port)
    assert line.send(request_bytes(Host=host)).reply().status == 200
    same = request_bytes(Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")
    assert line.send(same).reply().status == 200
    assert line.send(request_bytes(Host=host, Sec_Fetch_Site="none")).reply().status == 200
    line.close()


def test_options_is_refused_to_everybody_who_is_not_allowed_by_name(server, wire):
    assert wire("OPTIONS", "/claim", headers={"Origin": "http://app.example"}).status == 403
    assert wire("OPTIONS", "/claim").status == 403


GATE_TOKEN = "a-token-of-the-tests"


def gate_says(request, token, allowed):
    """The model: what the gate has to answer to a request, given as its words; None: it may come in."""
    method, path, host, origin, site, top, said = request
    name = re.sub(r":\d+$", "", host).lower()
    if name not in ("localhost", "127.0.0.1", "[::1]", "pd.internal"):
        return 403
    if origin not in (None, f"http://{host}", allowed):
        return 403
    if origin != allowed and site in ("cross-site", "same-site") and (method, path, top) != ("GET", "/", True):
        return 403
    if method == "OPTIONS":
        return 204 if origin == allowed else 403
    return 401 if token and said != f"Bearer {token}" and (method, path) != ("GET", "/") else None


@pytest.mark.parametrize("token", ["", GATE_TOKEN])
def test_the_gate_is_the_model_of_it_for_every_method_on_every_route(make_server, token):
    allowed = "https://app.example"
    server = make_server(PORT_DADDY_ALLOWED_ORIGINS=allowed, PORT_DADDY_ALLOWED_HOSTS="pd.internal",
                         PORT_DADDY_TOKEN=token)
    began, tried, wrong = time.monotonic(), 0, []
    said = [f"Bearer {token}"] if token else [None]
    plain = ("localhost:9876", None, None, False, said[0])
    words = [(host, None, None, False, said[0]) for host in (
        "localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80", "pd.internal", "0.0.0.0", "localhost.", "localhost6", "127.1",
        "[::ffff:127.0.0.1]", "evil.example", "localhost.evil.example", "")]
    words += [("localhost:9876", origin, site, top, said[0]) for origin in (
        None, "null", "https://evil.example", "http://localhost:1", "http://localhost:9876", allowed)
        for site in (None, "none", "same-origin", "same-site", "cross-site") for top in (False, True)]
    words += [(*plain[:4], auth) for auth in (None, "Bearer wrong-token", f"Basic {token}", "Bearer ")] if token else []
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW"):
        for path in ("/", "/health", "/locks/a", "/msg/a/subscribe", "/release", "/nowhere"):
            for host, origin, site, top, auth in words:
                line = Line(server.port)
                navigation = {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"} if top else {}
                line.send(request_bytes(method, path, Host=host, Origin=origin, Sec_Fetch_Site=site, Authorization=auth,
                                        Connection="close", **navigation))
                status = int(line.file.readline().split()[1])
                headers = {head.partition(b":")[0].lower() for head in iter(line.file.readline, b"\r\n")}
                line.close()
                expected = gate_says((method, path, host, origin, site, top, auth), token, allowed)
                right = status == expected if expected else status not in (204, 401, 403)
                shared = b"access-control-allow-origin" in headers
                if not right or shared != (origin == allowed and expected in (None, 204)):
                    wrong.append((method, path, host, origin, site, top, auth, status, expected, shared))
                tried += 1
    assert not wrong, f"{len(wrong)} of {tried}: {wrong[:5]}"
    record("gate", began, requests=tried, disagreements=0)


def test_a_page_of_an_allowed_origin_may_read_what_it_asks_and_no_other(make_server):
    server = make_server(PORT_DADDY_ALLOWED_ORIGINS="https://app.example,http://localhost:5173")
    wire, mine = Wire(server.port), {"Origin": "http://localhost:5173", "Sec-Fetch-Site": "same-site"}
    preflight = wire("OPTIONS", "/locks/a", headers={**mine, "Access-Control-Request-Method": "PUT"})
    assert (preflight.status, preflight.body) == (204, b"") and "content-length" not in preflight.headers
    assert preflight.headers["access-control-allow-origin"] == "http://localhost:5173"
    assert "PUT" in preflight.headers["access-control-allow-methods"] and preflight.headers["vary"] == "Origin"
    for answer in (wire.get("/health", headers=mine), wire.get("/services/nobody", headers=mine)):
        assert answer.headers["access-control-allow-origin"] == "http://localhost:5173"
    stream = Stream(server.port, "/events", mine)
    assert stream.response.getheader("Access-Control-Allow-Origin") == "http://localhost:5173"
    stream.close()
    assert wire.get("/health", headers={"Origin": "https://app.example.evil.example"}).status == 403
    our_own = wire.get("/health", headers={"Host": "localhost", "Origin": "http://localhost"})
    assert our_own.status == 200 and "access-control-allow-origin" not in our_own.headers


def test_with_a_token_nobody_gets_anything_without_it(make_server, tmp_path):
    server = make_server(PORT_DADDY_TOKEN=GATE_TOKEN)
    wire = Wire(server.port)
    refused = wire.get("/services")
    assert (refused.status, refused["code"]) == (401, "UNAUTHORIZED") and refused.headers["www-authenticate"] == "Bearer"
    assert wire.post("/msg/a", {"payload": 1}, headers={"Authorization": "Bearer " + GATE_TOKEN[:-1]}).status == 401
    command = CommandLine(PORT_DADDY_HOME=server.daemon.settings.home, PORT_DADDY_URL=server.url)
    denied = command("claim", "a")
    assert denied.returncode == 1 and "PORT_DADDY_TOKEN" in denied.stderr
    assert command("claim", "a", "-q", PORT_DADDY_TOKEN=GATE_TOKEN).returncode == 0
    secrets = [*Path(server.daemon.settings.home).glob("daemon*")], wire.get("/config", headers={
        "Authorization": f"Bearer {GATE_TOKEN}"})
    assert GATE_TOKEN not in "".join(path.read_text() for path in secrets[0]) + json.dumps(secrets[1].body)


def test_beyond_loopback_it_listens_only_with_a_token(fresh):
    refused = fresh("serve", "--host", "0.0.0.0")
    assert refused.returncode == 2 and "token" in refused.stderr and refused.stdout == ""
    serving = fresh.start("serve", "--host", "0.0.0.0", "--token", GATE_TOKEN)
    url = re.search(r"http://127\.0\.0\.1:(\d+)", read_line(serving.stdout))
    assert url and Wire(int(url[1])).get("/health").status == 401
    shown = fresh("status", PORT_DADDY_TOKEN=GATE_TOKEN)
    assert shown.returncode == 0, shown


def test_a_daemon_beyond_loopback_says_where_it_is_and_answers_to_no_name_of_everywhere(make_server):
    for host, url in (("::1", "http://[::1]:"), ("0.0.0.0", "http://127.0.0.1:")):
        server = make_server(PORT_DADDY_HOST=host, PORT_DADDY_TOKEN=GATE_TOKEN)
        assert server.url.startswith(url) and server.daemon.url == server.url
    assert Wire(server.port).get("/health", headers={"Host": f"0.0.0.0:{server.port}"})["code"] == "HOST_NOT_ALLOWED"


def test_a_client_says_its_token_only_to_the_daemon_of_its_folder(fresh, receiver):
    fresh.home.mkdir(mode=0o700)
    (fresh.home / "daemon.json").write_text(json.dumps({"url": receiver.url, "pid": 1, "instance": "x"}))
    fresh("status", PORT_DADDY_TOKEN=GATE_TOKEN)
    assert not any(GATE_TOKEN in str(delivery) for delivery in receiver.got)


NOBODY = 65534
SECOND_USER = pytest.mark.skipif(os.geteuid() != 0 or not LINUX, reason="only root has a second user to be, and only "
                                 "Linux says whose a connection is")


@SECOND_USER
@pytest.mark.parametrize("ending", ["reads the answer", "reads it on the device", "closes at once", "resets at once",
                                    "closes behind much data"])
def test_another_user_of_the_machine_gets_nothing(server, wire, ending, monkeypatch):
    over, check = threading.Event(), port_daddy.Gate.check_peer

    def check_late(gate, connection):  # as late as can be: the other side has ended by then
        assert over.wait(30)
        check(gate, connection)

    if not ending.startswith("reads"):
        monkeypatch.setattr(port_daddy.Gate, "check_peer", check_late)
    code = """
import socket, struct, sys
port, ending = int(sys.argv[1]), sys.argv[2]
for method in ("POST /claim", "GET /health", "DELETE /msg/a", "OPTIONS /claim", "BREW /claim"):
    line = socket.socket()
    if ending == "reads it on the device":
        line.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\\0")
    line.connect(("127.0.0.1", port))
    body = b'{"id":"a"}' if method.startswith("POST") else b""
    line.sendall(f"{method} HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n".encode() + body)
    if ending == "closes behind much data":
        line.setblocking(False)
        try:
            while line.send(b"x" * 65536):
                pass
        except OSError:  # the buffers are full, or we were refused meanwhile
            pass
    if ending == "resets at once":
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if ending.startswith("reads"):
        print(line.recv(65536).decode("latin-1").replace("\\r\\n", " "))
    line.close()
"""
    done = subprocess.run(["python3", "-c", code, str(server.port), ending], user=NOBODY, group=NOBODY, timeout=30,
                          capture_output=True, text=True, cwd="/", env={"PATH": os.environ["PATH"]}, check=True)
    over.set()
    eventually(lambda: not server.connections)
    if ending.startswith("reads"):
        lines = done.stdout.splitlines()
        assert len(lines) == 5 and all(" 403 " in line and "PEER_NOT_ALLOWED" in line for line in lines), done.stdout
    assert wire.get("/services")["count"] == 0 and wire.get("/activity")["count"] == 1  # daemon.start


@SECOND_USER
def test_a_client_is_not_served_by_another_user_who_took_the_port(spawned):
    """A daemon that was killed leaves its card; whoever binds its port knows its instance, which is no secret."""
    spawned.wire.get("/health")
    card = json.loads((spawned.home / "daemon.json").read_text())
    spawned.kill()
    code = f"""
import http.server
class Impostor(http.server.BaseHTTPRequestHandler):
    protocol_version, server_version, sys_version = "HTTP/1.1", "port-daddy/1.0.0 protocol/1", "instance/{card['instance']}"
    def do_GET(self):
        print(self.command, self.headers.get("Authorization"), flush=True)
        self.send_response(200); self.send_header("Content-Length", "16"); self.end_headers()
        self.wfile.write(b'{{"success": true}}'[:16].ljust(16))
    do_POST = do_GET
    log_message = lambda *_: None
server = http.server.ThreadingHTTPServer(("127.0.0.1", {spawned.port}), Impostor)
print("ready", flush=True); server.serve_forever()
"""
    impostor = subprocess.Popen(["python3", "-c", code], user=NOBODY, group=NOBODY, stdout=subprocess.PIPE, text=True,
                                cwd="/", env={"PATH": os.environ["PATH"]}, start_new_session=True)
    try:
        assert read_line(impostor.stdout) == "ready\n"
        command = CommandLine(PORT_DADDY_HOME=spawned.home, PORT_DADDY_URL=spawned.url, PORT_DADDY_TOKEN=GATE_TOKEN)
        refused = command("lock", "deploy", "--owner", "me")
        assert refused.returncode == 6 and "another user" in refused.stderr, refused
        assert read_line(impostor.stdout) == "GET None\n"
    finally:
        end(impostor)


def test_a_pattern_of_many_stars_holds_nobody_up(server, wire):
    wire.post("/locks/" + "a" * 100, {"owner": "x"})
    wire.post("/claim", {"id": "a" * 64})
    wire.post("/msg/" + "a" * 100, {"payload": 1})
    pattern = "*a" * 30 + "*b"
    for path in (f"/locks?pattern={pattern}", f"/services?pattern={pattern}", f"/activity?target={pattern}",
                 f"/msg/{pattern}/poll?after=0&timeout=0"):
        assert wire.get(path, timeout=10).status == 200


@SECOND_USER
def test_the_peer_check_can_be_switched_off(make_server):
    server = make_server(PORT_DADDY_PEER_CHECK="0")
    done = subprocess.run(["curl", "-s", f"{server.url}/health"], user=NOBODY, group=NOBODY, capture_output=True, cwd="/",
                          timeout=30, check=True, env={"PATH": os.environ["PATH"], "no_proxy": "*"})
    assert json.loads(done.stdout)["status"] == "ok"


@SECOND_USER
def test_a_second_user_gets_a_daemon_of_his_own_beside_the_first(tmp_path):
    """On the usual port, in a network of their own, so that nobody's daily daemon is in the way."""
    if not all(map(shutil.which, ("unshare", "ip", "setpriv", "/usr/bin/python3"))):
        pytest.skip("unshare, ip, setpriv or a Python for everybody is not installed")
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        module = shutil.copy(MODULE, top)
        os.makedirs(f"{top}/second")
        os.chown(f"{top}/second", NOBODY, NOBODY)
        story = f"""
ip link set lo up
first() {{ HOME={top}/first /usr/bin/python3 {module} "$@"; }}
nobody() {{ setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "$@"; }}
second() {{ HOME={top}/second nobody /usr/bin/python3 {module} "$@"; }}
cd /; first start -q; second claim his -q; second status -q; second find -q; first claim hers -q; first find -q
second stop; first stop
"""
        done = subprocess.run(["unshare", "-n", "sh", "-c", story], capture_output=True, text=True, timeout=60, cwd="/",
                              env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"})
    if "unshare failed" in done.stderr:
        pytest.skip("a network of our own is not to be had")
    first, port, second, his, _, hers, *_ = done.stdout.split("\n")
    assert first == "http://127.0.0.1:9876" and re.fullmatch(r"http://127\.0\.0\.1:\d+", second) and first != second, done
    assert port.isdigit() and (his, hers) == ("his", "hers"), done


CHUNKS = {
    "one": (b'd\r\n{"payload":1}\r\n0\r\n\r\n', 200),
    "three": (b'6\r\n{"payl\r\n06\r\noad":1\r\n1\r\n}\r\n0\r\n\r\n', 200),
    "leading zeros": (b'00d\r\n{"payload":1}\r\n00\r\n\r\n', 200),
    "upper case": (b'D\r\n{"payload":1}\r\n0\r\n\r\n', 200),
    "an extension": (b'd;a=b\r\n{"payload":1}\r\n0\r\n\r\n', 400),
    "a trailer": (b'd\r\n{"payload":1}\r\n0\r\nX: y\r\n\r\n', 400),
    "a size with a sign": (b'+d\r\n{"payload":1}\r\n0\r\n\r\n', 400),
    "a size with 0x": (b'0xd\r\n{"payload":1}\r\n0\r\n\r\n', 400),
    "a blank before the size": (b' d\r\n{"payload":1}\r\n0\r\n\r\n', 400),
    "no size": (b'\r\n{"payload":1}\r\n0\r\n\r\n', 400),
    "a bare LF": (b'd\n{"payload":1}\r\n0\r\n\r\n', 400), "too short a size": (b'c\r\n{"payload":1}\r\n0\r\n\r\n', 400),
    "too long a size": (b'f\r\n{"payload":1}\r\n0\r\n\r\n', 400), "an endless size": (b"0" * 100, 400),
    "a size beyond all": (b"ffffffff\r\n", 413), "a size beyond the limit": (b"100001\r\n", 413),
    "a sum beyond the limit": ((b"10000\r\n" + b" " * 65536 + b"\r\n") * 17, 413),
}


@pytest.mark.parametrize("title", CHUNKS)
def test_a_chunked_body_is_read_to_its_end_or_refused(server, wire, title):
    body, status = CHUNKS[title]
    line = Line(server.port)
    line.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + CANARY)
    assert line.reply().status == status
    if status == 200:
        assert line.reply()["channel"] == "canary" and wire.get("/msg/a")["messages"][0]["payload"] == 1
    else:
        assert line.closes() and wire.get("/channels")["count"] == 0
    line.close()


def test_a_chunked_body_may_arrive_byte_by_byte_and_after_a_100(server):
    line = Line(server.port)
    line.send(HEAD + b"Transfer-Encoding: Chunked\r\nExpect: 100-continue\r\n\r\n")
    assert line.file.readline() == b"HTTP/1.1 100 Continue\r\n" and line.file.readline() == b"\r\n"
    for byte in b'6\r\n{"payl\r\n7\r\noad":1}\r\n0\r\n\r\n':
        line.send(bytes([byte]))
    assert line.reply().status == 200
    line.close()


def test_the_time_for_a_head_and_for_a_body_is_for_the_whole_of_it(server, wire, monkeypatch):
    """Who sends a byte now and then has no more time than who sends nothing."""
    monkeypatch.setattr(port_daddy, "HEAD_TIMEOUT", 0.4)
    monkeypatch.setattr(port_daddy, "BODY_TIMEOUT", 0.4)
    for opening in (b"GET /health HTTP/1.1\r\nX: ", HEAD + b"Content-Length: 5000\r\n\r\n",
                    HEAD + b"Transfer-Encoding: chunked\r\n\r\n1000\r\n"):
        line, began = Line(server.port).send(opening), time.monotonic()
        while not select.select([line.socket], [], [], 0.02)[0]:
            line.send(b"a")
            assert time.monotonic() - began < 15, opening
        assert line.reply().status == 400 and line.closes() and time.monotonic() - began >= 0.4
        line.close()
    assert wire.get("/channels")["count"] == 0


def test_a_connection_that_says_nothing_is_closed(server, monkeypatch):
    monkeypatch.setattr(port_daddy, "IDLE_TIMEOUT", 0.2)
    silent, kept = Line(server.port), Line(server.port)
    assert kept.send(request_bytes()).reply().status == 200
    assert silent.closes() and kept.closes()
    silent.close()
    kept.close()


def test_a_stream_that_nobody_reads_is_dropped(server, pd, monkeypatch):
    monkeypatch.setattr(port_daddy, "SEND_TIMEOUT", 0.3)
    line = Line(server.port)
    line.send(request_bytes(path="/msg/much/subscribe"))
    assert line.file.readline().startswith(b"HTTP/1.1 200")
    for _ in range(60):
        pd.publish("much", "x" * 250_000)
    eventually(lambda: pd.list_channels()["channels"][0]["subscribers"] == 0)
    line.close()


def test_what_is_stored_is_ours_alone(spawned):
    spawned.wire.post("/claim", {"id": "a"})
    CommandLine(PORT_DADDY_HOME=spawned.home, PORT_DADDY_URL=spawned.url)("status")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in spawned.home.iterdir()}
    assert len(modes) > 2 and set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize("address", [
    "169.254.169.254", "[fd00:ec2::254]", "[fe80::1]", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::a9fe:a9fe]", "[fd20:ce::254]", "100.100.100.200", "[2002:a9fe:a9fe::1]",
    "224.0.0.1", "[ff02::1]", "0.0.0.0", "[::]", "255.255.255.255",
    "0x7f.1:{port}", "2130706433:{port}", "127.0.0.1:{port}", "[::1]:{port}", "[::ffff:127.0.0.1]:{port}",
    "localhost:{port}"])
def test_some_addresses_are_never_called(server, wire, address):
    url = f"http://{address.format(port=server.port)}/"
    refused = wire.post("/webhooks", {"url": url}), wire.post("/claim", {"id": "a", "health": url})
    assert [(answer.status, answer["code"]) for answer in refused] == [(400, "TARGET_REFUSED")] * 2, refused
    assert wire.get("/services")["count"] == wire.get("/webhooks")["count"] == 0


def test_a_name_is_looked_up_once_and_where_it_led_is_called(server, receiver, monkeypatch):
    """What resolves to a good address first and to a bad one later (DNS rebinding) reaches the good one, or nobody."""
    answers, real = [("127.0.0.1", receiver.port), ("169.254.169.254", 80)], socket.getaddrinfo

    def look_up(host, port, *args, **options):
        if host != b"rebind.example":
            return real(host, port, *args, **options)
        address = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    pd = PortDaddy(server.url)
    hook = pd.add_webhook("http://rebind.example/", events=["lock.*"])["id"]
    pd.lock("a", owner="me")
    eventually(lambda: len(receiver.got) == 1)
    pd.lock("b", owner="me")
    eventually(lambda: "never called" in (pd.list_deliveries(hook)["deliveries"][0]["error"] or ""))
    assert len(receiver.got) == 1


def test_private_networks_can_be_left_alone(make_server):
    wire = Wire(make_server(PORT_DADDY_WEBHOOK_PRIVATE="0").port)
    for address in ("10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "[fc00::1]", "[::ffff:10.0.0.1]"):
        assert wire.post("/webhooks", {"url": f"http://{address}/"})["code"] == "TARGET_REFUSED", address
    assert wire.post("/webhooks", {"url": "http://127.0.0.1:9/"}).status == 200


HOSTILE_TEXT = "a\x1b]0;title\x07\x1b[2Jb\x9bc\u202ed\u200be\u061c\U000e0041\rf"


def test_what_others_wrote_can_do_nothing_to_a_terminal(cli, pd):
    pd.register("worker", name=HOSTILE_TEXT)
    pd.claim("app", cmd=HOSTILE_TEXT)
    pd.publish("tasks", HOSTILE_TEXT)
    pd.add_logs("app", [{"text": HOSTILE_TEXT}])
    for words in (["agents"], ["find", "app", "--json"], ["poll", "tasks", "-q"], ["poll", "tasks", "--group", "g"],
                  ["logs", "app"], ["agent", "show", "worker"], ["activity"], ["unlock", HOSTILE_TEXT]):
        done = cli(*words)
        harmful = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u202e\U000e0041]"
        assert not re.search(harmful, done.stdout + done.stderr), (words, done)


# =====================================================================================================================
# 12. CLIENT — the same operations from the other side
# =====================================================================================================================


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nobody_listening_is_a_connection_error():
    with pytest.raises(port_daddy.ConnectionError) as problem:
        PortDaddy(url=f"http://127.0.0.1:{unused_port()}", timeout=500).health()
    assert isinstance(problem.value, ConnectionError) and isinstance(problem.value, PortDaddyError)
    assert port_daddy.ConnectionError is port_daddy.DaemonUnreachable
    assert problem.value.status == 0 and problem.value.exit_status == 6


def test_ping_never_raises(pd):
    assert pd.ping() is True
    assert PortDaddy(url=f"http://127.0.0.1:{unused_port()}", timeout=500).ping() is False


def test_an_error_carries_status_code_and_body(pd):
    pd.lock("deploy", owner="a")
    with pytest.raises(PortDaddyError) as problem:
        pd.lock("deploy", owner="b")
    assert (problem.value.status, problem.value.code, problem.value.exit_status) == (409, "LOCK_HELD", 4)
    assert problem.value.body["holder"] == "a" and problem.value.body["success"] is False


def test_the_environment_names_the_daemon_and_the_agent(server, monkeypatch):
    monkeypatch.setenv("PORT_DADDY_URL", server.url)
    monkeypatch.setenv("PORT_DADDY_AGENT", "agent-env")
    pd = PortDaddy()
    assert pd.health()["pid"] == os.getpid() and pd.agent_id == "agent-env"
    assert pd.lock("deploy")["owner"] == "agent-env"


def test_a_client_without_a_name_locks_as_its_process(pd):
    assert pd.lock("deploy")["owner"] == f"pid-{os.getpid()}"
    assert pd.check_lock("deploy")["pid"] is None  # named, not bound
    assert pd.unlock("deploy")["released"] is True


def test_one_client_serves_sixteen_threads(pd):
    def work(number):
        for turn in range(15):
            assert pd.claim(f"t{number}:{turn}")["id"] == f"t{number}:{turn}"
            assert pd.publish(f"c{number}", turn)["channel"] == f"c{number}"
        return [message["payload"] for message in pd.get_messages(f"c{number}")["messages"]]

    workers = [in_background(work, number) for number in range(16)]
    assert [worker.result(60) for worker in workers] == [list(range(15))] * 16
    services = pd.list_services()["services"]
    assert len(services) == len({service["port"] for service in services}) == 240


def test_a_wait_longer_than_the_timeout_of_the_client_is_waited_for(server, pd):
    pd.lock("deploy", owner="a")
    impatient = PortDaddy(url=server.url, timeout=50)
    with pytest.raises(PortDaddyError) as problem:
        impatient.lock("deploy", owner="b", wait=300)
    assert problem.value.code == "LOCK_HELD"
    assert impatient.poll("empty", timeout=300)["message"] is None


def test_a_connection_that_went_stale_over_a_restart_is_not_used(spawned):
    pd = PortDaddy(url=spawned.url)
    pd.claim("a")
    for _ in range(2):
        spawned.kill()
        spawned.start()
        # What was sent once is not sent again: so it must go over a fresh connection.
        assert pd.publish("tasks", 1)["success"] is True


def test_with_lock_frees_the_lock_even_when_the_work_fails(pd):
    with pytest.raises(ZeroDivisionError):
        with pd.with_lock("deploy") as held:
            assert pd.check_lock("deploy")["token"] == held.token
            raise ZeroDivisionError
    assert pd.check_lock("deploy")["held"] is False
    assert pd.with_lock("deploy", lambda: 42) == 42


def test_with_lock_can_refuse_to_wait(pd):
    pd.lock("deploy", owner="a")
    with pytest.raises(PortDaddyError) as refused:
        with pd.with_lock("deploy", wait=0):
            raise AssertionError("this lock is held by somebody else")
    assert refused.value.code == "LOCK_HELD"


def test_with_lock_renews_what_it_holds(pd):
    with pd.with_lock("deploy", ttl=400) as held:
        first = pd.check_lock("deploy")["expiresAt"]
        eventually(lambda: pd.check_lock("deploy")["expiresAt"] > first + 400)  # by now the first lease is over
        assert pd.check_lock("deploy")["token"] == held.token


def test_with_lock_says_when_the_lock_was_lost(pd, server):
    with pytest.raises(port_daddy.LockLost) as lost:
        with pd.with_lock("deploy", ttl=60_000):
            PortDaddy(url=server.url, agent_id="admin").unlock("deploy", force=True)
            pd.lock("deploy", owner="thief")
    assert isinstance(lost.value, PortDaddyError)
    assert pd.check_lock("deploy")["owner"] == "thief"  # and what the other one holds was left alone


def test_a_subscription_goes_on_over_a_restart_without_loss(spawned):
    pd = PortDaddy(url=spawned.url)
    messages = iter(pd.subscribe("news", after=0))
    pd.publish("news", 1)
    assert next(messages)["payload"] == 1
    pd.publish("news", 2)
    spawned.kill()
    spawned.start()
    PortDaddy(url=spawned.url).publish("news", 3)
    assert [in_background(next, messages).result(20)["payload"] for _ in range(2)] == [2, 3]


def test_register_without_a_name_adopts_the_one_that_was_made(pd):
    made = pd.register(name="Worker")["agentId"]
    assert pd.agent_id == made
    assert pd.lock("deploy")["owner"] == made
    assert pd.heartbeat()["success"] is True


def test_heartbeats_go_on_until_they_are_stopped(server, clock):
    pd = PortDaddy(url=server.url)
    pd.register(name="Worker", ttl=60_000)
    beats = pd.start_heartbeat(20)
    clock.advance(50)
    eventually(lambda: pd.get_agent(pd.agent_id)["agent"]["lastHeartbeat"] == clock.wall)
    beats.stop()
    settle()
    last = pd.get_agent(pd.agent_id)["agent"]["lastHeartbeat"]
    clock.advance(50)
    settle()
    assert pd.get_agent(pd.agent_id)["agent"]["lastHeartbeat"] == last


def test_an_url_that_is_none_is_refused():
    for url in ("nonsense", "ftp://localhost:1", "http://", "http://localhost:99999"):
        with pytest.raises((PortDaddyError, ValueError)):
            PortDaddy(url=url).health()


def test_tasks_that_end_well_are_done(server, pd):
    for number in range(3):
        pd.publish("tasks", {"n": number})
    done = []
    for task in pd.work("tasks", group="team", idle=30):
        with task:
            done.append((task.payload["n"], task.message["payload"]["n"], task.id, task.attempt, task.lost))
            assert pd.list_groups("tasks")["groups"][0]["leased"] == 1 and task.receipt
    assert [(n, m, attempt, lost) for n, m, _, attempt, lost in done] == [(n, n, 1, False) for n in range(3)]
    assert groups(Wire(server.port)) == {"team": (0, 0, 0)}


def test_a_task_that_fails_is_given_back_and_the_worker_goes_on(pd, capsys):
    pd.publish("tasks", "poison")
    pd.publish("tasks", "good")
    met = []
    for task in pd.work("tasks", max_attempts=2, idle="30ms"):
        with task:
            met.append((task.payload, task.attempt))
            if task.payload == "poison":
                raise ValueError("no good")
    assert met == [("poison", 1), ("poison", 2), ("good", 1)]
    dead, = pd.list_dead("tasks")["messages"]
    assert (dead["payload"], dead["attempts"], dead["error"]) == ("poison", 2, "ValueError: no good")
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("ValueError: no good") == 2 and "Traceback" not in said.err
    assert pd.redrive("tasks", id=dead["id"])["redriven"] == 1


def test_a_task_that_fails_may_rest_before_it_is_tried_again(clock, pd):
    pd.publish("tasks", 1)
    for task in pd.work("tasks", delay="10s", idle=20):
        with task:
            raise ValueError
    clock.advance(9_000)
    assert [task.id for task in pd.work("tasks", idle=20)] == []
    clock.advance(1_000)
    assert next(pd.work("tasks", idle=1_000)).attempt == 2


@pytest.mark.parametrize("problem", [KeyboardInterrupt, SystemExit])
def test_who_is_interrupted_gives_the_task_back_and_stops(pd, problem):
    pd.publish("tasks", 1)
    with pytest.raises(problem):
        for task in pd.work("tasks", idle=200):
            with task:
                raise problem
    again = pd.poll("tasks", lease="30s", timeout=0)
    assert again["attempt"] == 2


def test_a_long_task_keeps_its_lease(pd, wire):
    pd.publish("tasks", 1)
    for task in pd.work("tasks", lease=300, idle=20):
        with task:
            until = time.monotonic() + 0.8
            eventually(lambda until=until: time.monotonic() > until)
            assert task.lost is False and pd.poll("tasks", lease=300, timeout=0)["message"] is None
    assert groups(wire) == {"default": (0, 0, 0)}


def test_a_task_that_was_lost_says_so_and_the_worker_goes_on(pd, capsys):
    pd.publish("tasks", "lost")
    done = []
    for task in pd.work("tasks", lease=150, idle=20):
        with task:
            if task.attempt == 1 and task.payload == "lost":
                pd.nack("tasks", task.receipt, delay="1h")
                eventually(lambda task=task: task.lost)
                pd.publish("tasks", "next")
            done.append(task.payload)
    assert done == ["lost", "next"] and "Traceback" not in capsys.readouterr().err
    assert pd.list_groups("tasks")["groups"][0]["backlog"] == 1  # what another one did with it was left alone


def test_a_worker_survives_a_restart_of_the_daemon(spawned):
    pd, done = PortDaddy(url=spawned.url), []

    def work():
        for task in pd.work("tasks", lease="10s"):
            with task:
                done.append((task.payload, task.attempt))
                if task.payload == "during":  # so that it is acknowledged to the next daemon
                    spawned.kill()
                    spawned.start()
                if task.payload == "stop":
                    return

    working = in_background(work)
    pd.publish("tasks", "before")
    eventually(lambda: done)
    settle()
    spawned.kill()  # while it waits
    spawned.start()
    other = PortDaddy(url=spawned.url)
    for payload in ("during", "stop"):
        other.publish("tasks", payload)
    working.result(30)
    assert done == [("before", 1), ("during", 1), ("stop", 1)]
    eventually(lambda: other.list_groups("tasks")["groups"][0]["leased"] == 0)


def test_a_worker_without_a_daemon_says_so_at_once():
    with pytest.raises(port_daddy.ConnectionError):
        next(PortDaddy(url=f"http://127.0.0.1:{unused_port()}", timeout=500).work("tasks"))


def test_idle_counts_from_the_last_task(pd):
    for number in range(3):
        pd.publish("tasks", number)
    began, done = time.monotonic(), 0
    for task in pd.work("tasks", idle=150):
        with task:
            until = time.monotonic() + 0.1
            eventually(lambda until=until: time.monotonic() > until)
            done += 1
    assert done == 3 and time.monotonic() - began >= 0.45


def test_queues_from_the_client(pd):
    pd.publish("tasks", 1)
    taken = pd.poll("tasks", group="team", lease="30s", max_attempts=2, timeout=0)
    assert pd.touch("tasks", taken["receipt"], group="team", lease="1m")["id"] == taken["message"]["id"]
    assert pd.nack("tasks", taken["receipt"], group="team", error="no")["dead"] is False
    with pytest.raises(PortDaddyError) as stale:
        pd.ack("tasks", taken["receipt"], group="team")
    assert (stale.value.status, stale.value.code, stale.value.exit_status) == (409, "STALE_RECEIPT", 4)
    taken = pd.poll("tasks", group="team", lease=30_000, max_attempts=2, timeout=0)
    assert pd.nack("tasks", taken["receipt"], group="team")["dead"] is True
    assert pd.list_dead("tasks", group="team")["count"] == 1
    assert pd.redrive("tasks", group="team", id=taken["message"]["id"])["redriven"] == 1
    taken = pd.poll("tasks", group="team", lease=30_000, timeout=0)
    assert pd.ack("tasks", taken["receipt"], group="team")["acked"] is True
    assert pd.list_groups("tasks")["groups"][0]["backlog"] == 0
    assert pd.remove_group("tasks", "team")["removed"] is True


def test_with_lock_tells_as_soon_as_its_lease_is_gone(pd, server):
    told = threading.Event()
    with pytest.raises(port_daddy.LockLost):
        with pd.with_lock("deploy", ttl=150, on_loss=told.set) as held:
            PortDaddy(url=server.url).unlock("deploy", force=True)
            assert told.wait(5) and held.lost is True
    assert pd.lock("deploy", owner="next")["token"] > held.token


CUT = {
    "publish": (b"POST /msg/news ", lambda pd: pd.publish("news", 1), lambda wire: wire.get("/msg/news")["count"]),
    "lock": (b"POST /locks/", lambda pd: pd.lock("deploy"),
             lambda wire: wire.get("/activity?type=lock.acquire")["count"]),
    "add_webhook": (b"POST /webhooks", lambda pd: pd.add_webhook("http://127.0.0.1:1/"),
                    lambda wire: wire.get("/webhooks")["count"]),
    "ack": (b"POST /msg/tasks/ack", lambda pd: pd.ack("tasks", pd.poll("tasks", lease=30_000)["receipt"]),
            lambda wire: groups(wire) == {"default": (0, 0, 0)}),
    "nack": (b"POST /msg/tasks/nack", lambda pd: pd.nack("tasks", pd.poll("tasks", lease=30_000)["receipt"]),
             lambda wire: groups(wire) == {"default": (1, 0, 0)}),
    "extend_lock": (b"PUT /locks/", lambda pd: pd.extend_lock("deploy", token=pd.lock("deploy")["token"]),
                    lambda wire: wire.get("/locks")["count"]),
    "claim": (b"POST /claim", lambda pd: pd.claim("a"), lambda wire: wire.get("/services")["count"]),
}


@pytest.mark.parametrize("what", CUT)
def test_a_request_whose_answer_was_lost_on_the_way_is_done_once(cutter, wire, what):
    start, ask, count = CUT[what]
    wire.post("/msg/tasks", {"payload": 1})
    pd = PortDaddy(url=cutter.url)
    assert pd.ping()
    cutter.cut = start
    assert ask(pd)["success"] is True
    assert cutter.cuts == 1 and count(wire) == 1
    if what == "lock":
        assert pd.check_lock("deploy")["held"] is True and pd.unlock("deploy")["released"] is True


def test_a_grant_that_was_waited_for_and_lost_on_the_way_is_still_ours(cutter, wire, pd):
    pd.lock("deploy", owner="a")
    remote = PortDaddy(url=cutter.url)
    assert remote.ping()
    cutter.cut = b"POST /locks/"
    waiting = in_background(remote.lock, "deploy", owner="b", wait=20_000)
    eventually(lambda: wire.get("/locks/deploy")["waiting"] == 1)
    pd.unlock("deploy", owner="a")
    assert waiting.result(10)["token"] == wire.get("/locks/deploy")["token"] and cutter.cuts == 1
    assert [facts(entry)["owner"] for entry in log(pd, "lock.acquire")] == ["a", "b"]


def test_what_is_not_safe_to_ask_twice_is_not_asked_twice(cutter, wire, pd):
    for number in range(2):
        pd.publish("tasks", number)
    remote = PortDaddy(url=cutter.url)
    assert remote.ping()
    for start, ask in ((b"GET /msg/tasks/poll", lambda: remote.poll("tasks", timeout=0)),
                       (b"POST /agents ", lambda: remote.register(name="Worker"))):
        cutter.cut = start
        with pytest.raises(port_daddy.ConnectionError):
            ask()
    assert pd.list_agents()["count"] == 1 and groups(wire)["default"] in ((1, 0, 0), (2, 0, 0))


# =====================================================================================================================
# 13. PROJECTS — a stack of real processes: up in order, watched, and gone without a trace
# =====================================================================================================================

# ---- instruments ----------------------------------------------------------------------------------------------------

# One program for every service. It notes in one file what happens to it and when (the clock is the machine's, so that
# the notes of several services can be compared), waits at a gate until the test makes a file, and tells what it sees.
SERVICE = r'''
import json, os, select, signal, socket, struct, sys, time

name = os.environ["PORT_DADDY_ID"].split(":")[1]
home = os.path.dirname(os.path.abspath(__file__))
words = dict(word.split("=", 1) for word in sys.argv[1:])
descriptors = []
for number in range(3, 256):
    try:
        os.fstat(number)
        descriptors.append(number)
    except OSError:
        pass

def note(what):
    with open(f"{home}/notes", "a") as notes:
        notes.write(f"{time.monotonic():.6f} {os.getpid()} {name} {what}\n")

def gate(file):
    while not os.path.exists(f"{home}/{file}"):
        time.sleep(0.01)

def told(*_):
    note("told")
    time.sleep(float(words.get("lingers", 0)))
    note("ended")
    os._exit(0)

signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in words else told)
note("started")
if "crashes" in words and not os.path.exists(f"{home}/{name}.crashed"):
    open(f"{home}/{name}.crashed", "w").close()
    sys.exit(int(words["crashes"]))
if "gate" in words:
    gate(words["gate"])
if "exit" in words:
    note("ended")
    sys.exit(int(words["exit"]))
listener = socket.create_server(("127.0.0.1", int(words.get("port") or os.environ["PORT"])))
if "daemon" in words:  # the parent goes, and what it left behind listens
    if os.fork():
        os._exit(0)
    if words["daemon"] == "session":
        os.setsid()
    note("daemon")
note("listens")
print(f"{name} is ready", flush=True)
speaks, kept = words.get("speaks", "http"), []
while True:
    connection, _ = listener.accept()
    connection.settimeout(2)
    if speaks == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if speaks == "silence":
        kept.append(connection)
    if speaks == "junk":
        connection.sendall(b"\x0a5.7.0 ready for queries\0")
    if speaks == "http":
        try:
            path = connection.recv(65536).split(b" ")[1].decode()
        except (OSError, IndexError):  # a probe that only connects
            connection.close()
            continue
        status, body = words.get("status", "200"), b"{}"
        if os.path.exists(f"{home}/{name}.status"):
            status = open(f"{home}/{name}.status").read() or status
        if path == "/facts":
            status, body = "200", json.dumps({
                "name": name, "pid": os.getpid(), "env": dict(os.environ), "words": words, "folder": os.getcwd(),
                "descriptors": descriptors, "stdin": bool(select.select([0], [], [], 0)[0])}).encode()
        head = f"HTTP/1.1 {status} As Told\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
    if speaks != "silence":
        connection.close()
'''


def serves(*words):
    """The command line of a service."""
    return " ".join([f'"{sys.executable}" -S "$SERVICE"', *words])


class Note(NamedTuple):
    at: float
    pid: int
    name: str
    what: str


def process_table():
    """pid, parent, group, state and command of everything that runs."""
    said = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,pgid=,stat=,command="], capture_output=True, text=True,
                          check=True, errors="replace").stdout
    rows = [line.split(None, 4) for line in said.splitlines()]
    return [(int(row[0]), int(row[1]), int(row[2]), row[3], row[4] if len(row) > 4 else "") for row in rows]


def living(pids=(), groups=(), command=None):
    """The processes with these pids, in these groups or with this in their command line; who is dead and only waits to
    be reaped by his parent is none of them."""
    return [row for row in process_table() if not row[3].startswith("Z") and (
        row[0] in pids or row[2] in groups or command is not None and str(command) in row[4])]


def can_bind(port):
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        with socket.socket(family) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return False
    return True


@contextlib.contextmanager
def stranger_on(port=0):
    """Somebody who listens (on a free port, or on this one) and has been alive for longer than what the test starts:
    this process. Gives the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
        yield listener.getsockname()[1]


class Foreground:
    """A command that goes on in a terminal, and everything that it has said so far."""

    def __init__(self, process):
        self.process, self.pid, self.out, self.err = process, process.pid, [], []
        self.readers = [in_background(self.read, process.stdout, self.out),
                        in_background(self.read, process.stderr, self.err)]

    @staticmethod
    def read(stream, heard):
        for line in stream:
            if len(heard) < 5_000 or "flood" not in line:  # a flood is heard, and not kept
                heard.append(line.rstrip("\n"))

    def says(self, pattern, timeout=20):
        """The first line on either stream in which the pattern is found."""
        def look():
            over = all(reader.done() for reader in self.readers)
            found = [line for line in [*self.out, *self.err] if re.search(pattern, line)]
            assert found or not over, f"it has ended without a word of {pattern!r}: {self}"
            return found
        return eventually(look, timeout)[0]

    def signal(self, number=signal.SIGINT):
        self.process.send_signal(number)
        return self

    def status(self, timeout=30):
        """How it ends; what it said is complete then."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended after {timeout} s: {self}") from None
        for reader in self.readers:
            reader.result(timeout)
        return status

    def __repr__(self):
        return "\n".join([f"status {self.process.poll()}", "--- stdout", *self.out[-60:], "--- stderr", *self.err[-60:]])


class Stack:
    """A folder with a project file, and a terminal in it."""

    def __init__(self, folder, environ, port):
        self.folder, self.wire, self.started = Path(folder), Wire(port), []
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "service.py").write_text(SERVICE)
        self.environ = {**environ, "SERVICE": str(self.folder / "service.py")}

    def write(self, services, **top):
        """The project file; fields that are not worth a word get values that keep a test short."""
        quick = {name: {"stopTimeout": "5s", **service} for name, service in services.items()}
        self.file.write_text(json.dumps({"project": "myapp", "services": quick, **top}))
        return self

    @property
    def file(self):
        return self.folder / ".portdaddyrc"

    def start(self, *args, **environ):
        process = subprocess.Popen(
            [*PROGRAM, *map(str, args)], cwd=self.folder, env={**self.environ, **environ},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True)
        self.started.append(Foreground(process))
        return self.started[-1]

    def dev(self, *args, **environ):
        return self.start("dev", *args, **environ)

    def pd(self, *args, timeout=40, **options):
        """Another command, in another terminal in the same folder, to its end."""
        return subprocess.run([*PROGRAM, *map(str, args)], cwd=self.folder, env=self.environ,
                              capture_output=True, text=True, timeout=timeout,
                              **{"stdin": subprocess.DEVNULL, **({} if "input" not in options else {"stdin": None}),
                                 **options})

    def open(self, gate):
        (self.folder / gate).touch()

    def up(self, *names, timeout=20_000):
        """Wait until these services are well, and give their descriptions."""
        answer = self.wire.post("/wait", {"services": [f"myapp:{name}:main" for name in names], "timeout": timeout},
                                timeout=60)
        assert answer.status == 200, (answer.body, self.started)
        return answer["services"]

    def service(self, name, context="main"):
        return self.wire.get(f"/services/myapp:{name}:{context}").body

    def facts(self, name):
        """What a service that is up sees around itself."""
        return Wire(self.service(name)["port"]).get("/facts").body

    def notes(self, name=None, what=None):
        text = (self.folder / "notes").read_text() if (self.folder / "notes").exists() else ""
        found = [Note(float(at), int(pid), who, event) for at, pid, who, event in map(str.split, text.splitlines())]
        return [note for note in found if name in (None, note.name) and what in (None, note.what)]

    def at(self, name, what):
        """When it first happened."""
        assert self.notes(name, what), (name, what, self.notes(), self.started)
        return self.notes(name, what)[0].at

    def nothing_is_left(self):
        """No process of any service lives, no service is claimed, no lock held."""
        assert living(pids={note.pid for note in self.notes()}) == []
        assert self.wire.get("/services").body["services"] == [] and self.wire.get("/locks").body["locks"] == []
        return True

    def clean(self):
        for foreground in self.started:
            end(foreground.process)
        for row in living(command=self.folder / "service.py"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(row[0], signal.SIGKILL)


@pytest.fixture
def stack(cli, server, tmp_path):
    one = Stack(tmp_path / "myapp", cli.environment, server.port)
    yield one
    one.clean()


@pytest.fixture
def tough_stack(spawned, tmp_path):
    """A stack whose daemon is a process that can be killed."""
    one = Stack(tmp_path / "myapp", spawned.environment(PORT_DADDY_URL=spawned.url), spawned.port)
    yield one
    one.clean()


# ---- the pattern as it stands, with real programs -------------------------------------------------------------------

# It speaks to the database itself, by PostgreSQL's own protocol, so that no driver has to be installed.
API = r'''
import http.server, os, socket, struct

class Database:
    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.file = self.socket.makefile("rb")
        words = b"user\0postgres\0database\0postgres\0\0"
        self.socket.sendall(struct.pack(">II", len(words) + 8, 3 << 16) + words)
        self.answers()

    def answers(self):
        rows = []
        while True:
            kind, length = struct.unpack(">cI", self.file.read(5))
            body = self.file.read(length - 4)
            if kind == b"E":
                raise RuntimeError(body)
            if kind == b"D":  # one column of text
                rows.append(body[6:].decode())
            if kind == b"Z":
                return rows

    def ask(self, sql):
        self.socket.sendall(b"Q" + struct.pack(">I", len(sql) + 5) + sql.encode() + b"\0")
        return self.answers()

database = Database(int(os.environ["DB_PORT"]))
database.ask("CREATE TABLE IF NOT EXISTS greetings (words text)")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        rows = database.ask("SELECT words FROM greetings")
        body = b"ok" if self.path == "/health" else ", ".join(rows).encode()
        self.send_response(200 if self.path in ("/health", "/api/greeting") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

print("database is open", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
'''

VITE = """
export default {
  cacheDir: "cache",
  server: { proxy: { "/api": process.env.API_URL } },
  plugins: [{
    name: "greeting",
    transformIndexHtml: async page => page.replace(
      "<!-- greeting -->", await (await fetch(process.env.API_URL + "/api/greeting")).text()),
  }],
}
"""


@pytest.fixture(scope="session")
def vite():
    """The node_modules with a development server in it; installed once, for as long as the tests run."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    with tempfile.TemporaryDirectory(prefix="port-daddy-vite-") as folder:
        try:
            done = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", folder, "vite@7"],
                                  capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip("npm did not install vite within two minutes")
        if done.returncode:
            pytest.skip(f"npm cannot install vite: {done.stderr.strip()[-200:]}")
        yield Path(folder) / "node_modules"


class Postgres(NamedTuple):
    programs: Path
    data: Path
    command: str  # the server in the foreground


@pytest.fixture
def postgres():
    """A PostgreSQL that is not started yet, with a fresh data folder of its own."""
    places = [Path(shutil.which("initdb") or "/nowhere").parent, *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    programs = [place for place in places if (place / "initdb").exists() and (place / "psql").exists()]
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    become = ""
    folder = Path(tempfile.mkdtemp(prefix="port-daddy-postgres-"))  # its owner cannot enter pytest's folders
    try:
        if os.geteuid() == 0:  # as whom it refuses to run
            if not shutil.which("setpriv"):
                pytest.skip("PostgreSQL does not run as root, and there is no setpriv to become somebody else")
            try:
                shutil.chown(folder, "postgres", "postgres")
            except LookupError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
            become = "setpriv --reuid=postgres --regid=postgres --clear-groups "
        initdb = f"{become}{programs[-1]}/initdb -D {folder}/data -U postgres -A trust --locale=C -E UTF8 --no-sync"
        done = subprocess.run(["sh", "-c", initdb], capture_output=True, text=True, cwd="/", timeout=100)
        assert done.returncode == 0, done
        yield Postgres(programs[-1], folder / "data", (
            f"exec {become}{programs[-1]}/postgres -D {folder}/data -p 5432 -k {folder} "
            "-c listen_addresses=localhost -c fsync=off"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_pattern_7_as_it_stands_with_postgresql_a_program_and_vite(stack, postgres, vite):
    taken = [port for port in (5432, 3100, 3101) if not can_bind(port)]
    if taken:
        pytest.skip(f"the document's port {taken[0]} is taken on this machine")
    (stack.folder / "api.py").write_text(API)
    (stack.folder / "vite.config.mjs").write_text(VITE)
    (stack.folder / "index.html").write_text("<!doctype html><title>myapp</title><p><!-- greeting --></p>")
    (stack.folder / "package.json").write_text('{"name": "myapp", "private": true, "scripts": {"dev": "vite"}}')
    (stack.folder / "node_modules").symlink_to(vite)
    stack.file.write_text(json.dumps({"project": "myapp", "services": {
        "db": {"port": 5432, "cmd": postgres.command, "healthPath": "/health"},
        "api": {"port": 3100, "cmd": f'"{sys.executable}" api.py', "needs": ["db"]},
        "frontend": {"port": 3101, "cmd": "npm run dev -- --port ${PORT}", "needs": ["api"]}}}))
    dev = stack.dev()
    services = stack.up("db", "api", "frontend", timeout=60_000)
    assert [service["port"] for service in services] == [5432, 3100, 3101]
    # PostgreSQL closes when it is asked for HTTP: that is as well as it gets, and said.
    assert "/health" in dev.says("HTTP") and "db" in dev.says("HTTP")
    assert dev.says("database is open").startswith("api")  # it fails at once without a database: the order was kept
    assert Wire(3100).get("/health").body == b"ok"
    greeting = f"good morning number {time.monotonic_ns()}"
    told = subprocess.run([postgres.programs / "psql", "-h", "localhost", "-p", "5432", "-U", "postgres", "-c",
                           f"INSERT INTO greetings VALUES ('{greeting}')"], capture_output=True, text=True, timeout=30)
    assert told.returncode == 0, told
    connection = http.client.HTTPConnection("localhost", 3101, timeout=20)  # it may listen on one family only
    for path in ("/", "/api/greeting"):
        connection.request("GET", path, headers={"Accept": "text/html"})
        assert greeting in connection.getresponse().read().decode(), path
    connection.close()
    groups = {service["pid"] for service in services}
    helpers = {row[0] for row in process_table() if row[1] == dev.pid}
    assert len(living(groups=groups)) > 6  # PostgreSQL's workers, npm's shell and node among them
    assert dev.signal().status() == 130
    assert living(groups=groups) == [] and living(pids=helpers | {dev.pid}) == []
    assert [can_bind(port) for port in (5432, 3100, 3101)] == [True] * 3
    assert stack.nothing_is_left()
    assert not (postgres.data / "postmaster.pid").exists()  # it had the time to end as it wants to


# ---- order ----------------------------------------------------------------------------------------------------------


def test_services_start_in_the_order_of_their_needs_and_stop_in_the_reverse(stack):
    stack.write({
        "web": {"cmd": serves("lingers=0.1"), "needs": ["api"]},
        "api": {"cmd": serves("lingers=0.1"), "needs": ["db"], "healthPath": "/health"},
        "db": {"cmd": serves("gate=open-db", "lingers=0.1")},
        "other": {"cmd": serves()}})
    dev = stack.dev()
    stack.up("other")  # which nobody has to wait for
    eventually(lambda: stack.notes("db", "started"))
    settle()
    assert {note.name for note in stack.notes()} == {"db", "other"}
    stack.open("open-db")
    stack.up("db", "api", "web")
    assert stack.at("db", "listens") < stack.at("api", "started") < stack.at("api", "listens") < stack.at("web", "started")
    assert dev.signal().status() == 130
    for first, then in (("web", "api"), ("api", "db")):
        assert stack.at(first, "ended") < stack.at(then, "told")
    assert stack.nothing_is_left()


def test_a_need_may_be_content_with_a_start_or_want_an_end(stack):
    stack.write({
        "db": {"cmd": serves("gate=open-db")},
        "eager": {"cmd": serves(), "needs": {"db": "started"}},
        "migrate": {"cmd": serves("gate=migrated", "exit=0"), "noPort": True, "needs": ["db"]},
        "api": {"cmd": serves(), "needs": {"db": "healthy", "migrate": "completed"}}})
    dev = stack.dev()
    stack.up("eager")
    assert not stack.notes("db", "listens") and not stack.notes("migrate")
    stack.open("open-db")
    eventually(lambda: stack.notes("migrate", "started"))
    settle()
    assert not stack.notes("api")
    stack.open("migrated")
    stack.up("api")  # and the end of the migration has ended nothing else
    assert stack.at("migrate", "ended") < stack.at("api", "started")
    assert dev.signal().status() == 130 and stack.nothing_is_left()


def test_a_migration_that_fails_fails_the_start(stack):
    stack.write({
        "db": {"cmd": serves()},
        "migrate": {"cmd": f"echo no such column; {serves('exit=3')}", "noPort": True, "needs": ["db"]},
        "api": {"cmd": serves(), "needs": {"migrate": "completed"}}})
    dev = stack.dev()
    assert dev.status() == 3
    assert [line for line in dev.err if "migrate" in line and "3" in line]
    assert [line for line in dev.err if "no such column" in line]
    assert stack.notes("db", "told") and not stack.notes("api") and stack.nothing_is_left()


# ---- health ---------------------------------------------------------------------------------------------------------


def test_a_path_is_healthy_from_200_to_399_and_nothing_else_is(stack):
    told = {"fine": 200, "empty": 204, "moved": 302, "missing": 404, "broken": 500, "busy": 503}
    stack.write({name: {"cmd": serves(f"status={status}"), "healthPath": "/health"} for name, status in told.items()})
    stack.dev()
    stack.up("fine", "empty", "moved")
    eventually(lambda: len([note for note in stack.notes() if note.what == "listens"]) == 6)
    for name in ("missing", "broken", "busy"):
        assert stack.service(name)["status"] == "starting"
        (stack.folder / f"{name}.status").write_text("200")
    stack.up("missing", "broken", "busy")


def test_a_command_a_line_a_connection_or_nothing_can_be_the_rule(stack):
    stack.write({
        "asked": {"cmd": serves(), "healthPath": 'cmd: test -e answer && test -n "$PORT"'},
        "heard": {"cmd": f"{serves('gate=speak')}", "healthPath": "log: heard is r[a-z]+y"},
        "met": {"cmd": serves("gate=listen"), "healthPath": "tcp"},
        "trusted": {"cmd": serves("gate=never"), "healthPath": False},
        "worker": {"cmd": serves("gate=never"), "noPort": True},
        "last": {"cmd": serves(), "needs": ["asked", "heard", "met", "trusted", "worker"]}})
    dev = stack.dev()
    stack.up("trusted")
    for name, gate in (("asked", "answer"), ("heard", "speak"), ("met", "listen")):
        eventually(lambda name=name: stack.service(name)["status"] == "starting")
        assert not stack.notes("last")
        stack.open(gate)
        stack.up(name)
    stack.up("last")
    assert dev.signal().status() == 130 and stack.nothing_is_left()


def test_a_path_on_what_does_not_speak_http_is_connected_to_and_that_is_said(stack):
    stack.write({name: {"cmd": serves(f"speaks={name}"), "healthPath": "/health"}
                 for name in ("junk", "close", "reset", "silence")})
    dev = stack.dev()
    stack.up("junk")
    eventually(lambda: all(stack.notes(name, "listens") for name in ("close", "reset", "silence")))
    stack.up("close", "reset", timeout=10_000)
    waited = min(time.monotonic() - stack.at(name, "listens") for name in ("close", "reset"))
    assert waited >= 3  # a container's proxy accepts before its server does
    warned = {name: [line for line in dev.err if name in line and "HTTP" in line] for name in ("junk", "close", "reset")}
    assert all(warned.values()), dev
    assert stack.service("silence")["status"] == "starting"  # it may yet answer


def test_a_start_that_takes_too_long_fails_with_its_last_error_and_its_last_lines(stack):
    chatter = "; ".join(f"echo line {number} of it" for number in range(1, 31))
    stack.write({
        "db": {"cmd": serves()}, "api": {"cmd": serves(), "needs": ["db"]},
        "web": {"cmd": f"{chatter}; {serves('gate=never')}", "needs": ["api"], "healthTimeout": "800ms"}})
    dev = stack.dev()
    assert dev.status() not in (0, 130)
    told = "\n".join(dev.err)
    assert "web" in told and re.search("800ms|0.8", told) and re.search("(?i)refused", told), dev
    assert [number for number in range(1, 31) if f"line {number} of it" in told] == list(range(11, 31))
    assert stack.at("api", "told") < stack.at("db", "told") and stack.nothing_is_left()


def test_a_service_that_falls_ill_and_recovers_is_an_event_each_time(stack, pd):
    stack.write({"db": {"cmd": serves(), "healthPath": "/health"}, "api": {"cmd": serves(), "needs": ["db"]}})
    stack.dev()
    stack.up("db", "api")
    (stack.folder / "db.status").write_text("503")
    sick = eventually(lambda: log(pd, "service.unhealthy"), 15)
    assert sick[-1]["targetId"] == "myapp:db:main" and "503" in facts(sick[-1])["error"]
    assert stack.service("db")["status"] == "unhealthy"
    before = len(log(pd, "service.healthy"))
    (stack.folder / "db.status").write_text("200")
    eventually(lambda: len(log(pd, "service.healthy")) > before, 15)
    assert log(pd, "service.healthy")[-1]["targetId"] == "myapp:db:main" and stack.service("db")["status"] == "running"
    assert len(stack.notes("api", "started")) == len(stack.notes("db", "started")) == 1


# ---- ends and restarts ----------------------------------------------------------------------------------------------


def test_a_service_that_ends_ends_the_others_in_reverse_order_and_gives_dev_its_status(stack):
    stack.write({
        "db": {"cmd": serves()}, "api": {"cmd": serves(), "needs": ["db"]},
        "worker": {"cmd": f"echo out of ideas; {serves('gate=fail', 'exit=7')}", "noPort": True, "needs": ["db"]}})
    dev = stack.dev()
    stack.up("api")
    stack.open("fail")
    assert dev.status() == 7
    assert [line for line in dev.err if "worker" in line and "7" in line]
    assert [line for line in dev.err if "out of ideas" in line]
    assert stack.at("api", "told") < stack.at("db", "told") and stack.nothing_is_left()


def test_with_keep_going_the_others_go_on_and_the_dead_are_buried(stack):
    stack.write({
        "api": {"cmd": serves()}, "worker": {"cmd": serves("gate=fail", "exit=7"), "noPort": True},
        "report": {"cmd": serves(), "noPort": True, "needs": {"worker": "completed"}}})
    dev = stack.dev("--keep-going")
    stack.up("api")
    stack.open("fail")
    dev.says("worker.*7")
    eventually(lambda: not [row for row in process_table() if row[1] == dev.pid and row[3].startswith("Z")])
    assert stack.service("api")["status"] == "running" and dev.process.poll() is None
    assert not stack.notes("report")
    dev.signal().status()
    assert stack.notes("api", "told") and stack.nothing_is_left()


def test_a_service_that_crashes_is_started_again_after_1_s_and_2_s_and_then_given_up(stack):
    stack.write({
        "crash": {"cmd": serves("exit=9"), "noPort": True, "restart": "on-failure", "maxRestarts": 2},
        "loop": {"cmd": serves("exit=0"), "noPort": True, "restart": "always"},
        "api": {"cmd": serves("crashes=3"), "restart": "on-failure"}, "web": {"cmd": serves(), "needs": ["api"]}})
    dev = stack.dev()
    # What is well after a restart releases those who wait for it.
    stack.up("api", "web")
    assert len(stack.notes("api", "started")) == 2 and len(stack.notes("web", "started")) == 1
    assert dev.status() == 9
    starts = [note.at for note in stack.notes("crash", "started")]
    assert len(starts) == 3
    assert 1 <= starts[1] - starts[0] < 2 <= starts[2] - starts[1] < 4
    assert len(stack.notes("loop", "started")) >= 2
    assert stack.at("web", "told") < stack.at("api", "told") and stack.nothing_is_left()


def test_a_service_that_is_killed_comes_back_and_those_who_need_it_are_left_in_peace(stack):
    stack.write({"api": {"cmd": serves(), "restart": "always"}, "web": {"cmd": serves(), "needs": ["api"]}})
    dev = stack.dev()
    stack.up("api", "web")
    os.kill(stack.facts("api")["pid"], signal.SIGKILL)
    eventually(lambda: len(stack.notes("api", "listens")) == 2, 15)
    assert len(stack.notes("web", "started")) == 1 and not stack.notes("web", "told")
    assert dev.signal().status() == 130 and stack.nothing_is_left()


def test_a_service_that_ends_well_is_not_restarted_on_failure(stack):
    stack.write({"api": {"cmd": serves("exit=0"), "noPort": True, "restart": "on-failure"}})
    assert stack.dev().status() == 0
    assert len(stack.notes("api", "started")) == 1


def test_a_service_that_became_a_daemon_is_detached_and_not_dead(stack):
    stack.write({
        "tame": {"cmd": serves("daemon=group")}, "wild": {"cmd": serves("daemon=session")},
        "web": {"cmd": serves(), "needs": ["tame", "wild"]}})
    dev = stack.dev()
    stack.up("tame", "wild", "web")
    eventually(lambda: {stack.service(name)["status"] for name in ("tame", "wild")} == {"detached"})
    assert dev.process.poll() is None
    wild = stack.notes("wild", "daemon")[0].pid
    assert dev.signal().status() == 130
    assert not living(pids={stack.notes("tame", "daemon")[0].pid})  # it was still in its group
    # One that left for a session of its own cannot be reached, and that is said by name instead of passed over.
    assert living(pids={wild})
    assert [line for line in dev.err if "wild" in line and str(wild) in line], dev


# ---- what is started, and under which name --------------------------------------------------------------------------


def test_one_service_comes_with_what_it_needs_and_nothing_else(stack):
    stack.write({
        "db": {"cmd": serves()}, "api": {"cmd": serves(), "needs": ["db"]}, "web": {"cmd": serves(), "needs": ["api"]},
        "docs": {"cmd": serves()}, "mail": {"cmd": serves()}})
    dev = stack.dev("--service", "api", "--service", "mail")
    stack.up("api", "mail")
    assert {note.name for note in stack.notes()} == {"db", "api", "mail"}
    assert dev.signal().status() == 130
    wrong = stack.pd("dev", "--service", "nonsense")
    assert wrong.returncode in (2, 3) and "nonsense" in wrong.stderr and "mail" in wrong.stderr
    assert stack.nothing_is_left()


def test_without_health_checks_healthy_means_started(stack):
    stack.write({"db": {"cmd": serves("status=500"), "healthPath": "/health"}, "api": {"cmd": serves(), "needs": ["db"]}})
    stack.dev("--no-health")
    stack.up("db", "api")


def git(folder, *words):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    done = subprocess.run(["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *words], cwd=folder,
                          capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done
    return done.stdout.strip()


def test_the_context_is_main_or_the_branch_of_a_worktree_or_what_one_says(stack, tmp_path):
    git(stack.folder, "init", "-q", "-b", "trunk")
    stack.write({"a": {"cmd": "echo I am $PORT_DADDY_ID", "noPort": True}})
    git(stack.folder, "add", ".")
    git(stack.folder, "commit", "-q", "-m", "start")
    git(stack.folder, "worktree", "add", "-q", "-b", "feature/login", tmp_path / "tree")
    git(stack.folder, "worktree", "add", "-q", "--detach", tmp_path / "detached")
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / ".portdaddyrc").write_text(json.dumps({**json.loads(stack.file.read_text()), "context": "staging"}))
    commit = git(stack.folder, "rev-parse", "--short", "HEAD")
    cases = [
        (stack.folder, [], {}, "myapp:a:main"), (stack.folder, ["--branch"], {}, "myapp:a:trunk"),
        (stack.folder, ["--context", "mine"], {}, "myapp:a:mine"), (stack.folder, ["--context", ""], {}, "myapp:a"),
        (tmp_path / "tree", [], {}, "myapp:a:feature-login"), (tmp_path / "detached", [], {}, f"myapp:a:{commit}"),
        (tmp_path / "tree", [], {"PORT_DADDY_CONTEXT": "said"}, "myapp:a:said"),
        (tmp_path / "tree", ["--context", "flag"], {"PORT_DADDY_CONTEXT": "lost"}, "myapp:a:flag"),
        (staged, [], {}, "myapp:a:staging")]
    runs = []
    for folder, args, environ, _ in cases:
        stack.folder, home = folder, stack.folder
        runs.append(stack.dev(*args, **environ))
        stack.folder = home
    for run, (_, _, _, identity) in zip(runs, cases):
        assert run.status() == 0 and any(line.endswith(f"I am {identity}") for line in run.out), (identity, run)
    # An empty variable says, like an empty flag, that there is none.
    empty = stack.dev(PORT_DADDY_CONTEXT="")
    assert empty.status() == 0 and any(line.endswith("I am myapp:a") for line in empty.out), empty
    branch = stack.dev("--branch", PORT_DADDY_CONTEXT="lost")
    assert branch.status() == 0 and any(line.endswith("I am myapp:a:trunk") for line in branch.out), branch


def test_two_worktrees_run_side_by_side_and_each_finds_its_own(stack, tmp_path):
    git(stack.folder, "init", "-q", "-b", "main")
    local = f'"{sys.executable}" -S service.py'  # each from its own checkout
    stack.write({
        "api": {"port": free_port_block(1), "cmd": f"{local} port=${{PORT}}"},
        "web": {"cmd": f"{local} port=${{PORT}} api=${{api.URL}}", "needs": ["api"], "env": {"BACKEND": "${api.URL}/v1"}}})
    git(stack.folder, "add", ".")
    git(stack.folder, "commit", "-q", "-m", "start")
    git(stack.folder, "worktree", "add", "-q", "-b", "feature/login", tmp_path / "tree")
    other = Stack(tmp_path / "tree", stack.environ, stack.wire.port)
    try:
        devs = [stack.dev(), other.dev()]
        identities = [f"myapp:{name}:{context}" for context in ("main", "feature-login") for name in ("api", "web")]
        answer = stack.wire.post("/wait", {"services": identities, "timeout": 20_000})
        assert answer.status == 200, devs
        ports = {service["id"]: service["port"] for service in answer["services"]}
        assert len(set(ports.values())) == 4
        for folder, context in ((stack.folder, "main"), (other.folder, "feature-login")):
            web = Wire(ports[f"myapp:web:{context}"]).get("/facts").body
            assert Path(web["folder"]).samefile(folder)
            assert web["words"]["api"] == web["env"]["API_URL"] == f"http://localhost:{ports[f'myapp:api:{context}']}"
            assert web["env"]["BACKEND"] == web["env"]["API_URL"] + "/v1"
            api = Wire(int(web["env"]["API_PORT"])).get("/facts").body
            assert api["name"] == "api" and Path(api["folder"]).samefile(folder)
        # One is ended, from its own folder; the other does not notice.
        assert other.pd("down").returncode == 0 and devs[1].status() == 0
        assert Wire(ports["myapp:web:main"]).get("/facts").status == 200
        assert devs[0].signal().status() == 130 and stack.nothing_is_left()
    finally:
        other.clean()


def test_a_service_sees_its_port_its_siblings_and_what_its_file_says(stack):
    (stack.folder / "back").mkdir()
    (stack.folder / "settings.env").write_text(
        "# settings\nPLAIN=one two\nexport QUOTED=\"a # b\"\nSINGLE='it is'\nEMPTY=\nOVER=file\n\nTRAILING=x # comment\n")
    first = free_port_block(40)
    stack.write(portRange=[first + 10, first + 39], services={
        "api-v2": {"dev": serves("port=${PORT}"), "preferredPort": first, "health": "/health", "dir": "back",
                   "stack": "anything", "_scanned": True, "metadata": {"by": "hand"}},
        "web": {"cmd": serves("api=${api-v2.PORT}", "url=${api-v2.URL}", "mine=$PORT"), "depends_on": ["api-v2"],
                "env_file": "settings.env", "env": {"OVER": "env", "NUMBER": 3, "AT": "${api-v2.URL}:${PORT}"}},
        "away": {"remote": "https://example.com/api"}})
    dev = stack.dev()
    api, web = stack.up("api-v2", "web")
    assert api["port"] == first and first + 10 <= web["port"] < first + 40
    seen, its = stack.facts("web"), stack.facts("api-v2")["env"]
    env = seen["env"]
    assert Path(stack.facts("api-v2")["folder"]).samefile(stack.folder / "back")
    assert (its["PORT"], its["PORT_DADDY_ID"], its["PYTHONUNBUFFERED"]) == (str(first), "myapp:api-v2:main", "1")
    assert its["WEB_PORT"] == str(web["port"]) and its["WEB_URL"] == f"http://localhost:{web['port']}"
    assert env["API_V2_PORT"] == str(first) and env["API_V2_URL"] == f"http://localhost:{first}"
    assert env["AWAY_URL"] == "https://example.com/api"
    assert PortDaddy(url=env["PORT_DADDY_URL"]).version()["service"] == "port-daddy"
    assert seen["words"] == {"api": str(first), "url": f"http://localhost:{first}", "mine": str(web["port"])}
    assert env["AT"] == f"http://localhost:{first}:{web['port']}" and (env["OVER"], env["NUMBER"]) == ("env", "3")
    assert [env[name] for name in ("PLAIN", "QUOTED", "SINGLE", "EMPTY", "TRAILING")] == [
        "one two", "a # b", "it is", "", "x"]
    # What is ours stays ours: no descriptor comes along, and nothing is waiting on stdin, not even its end.
    assert seen["descriptors"] == [] and seen["stdin"] is False
    assert dev.signal().status() == 130 and stack.nothing_is_left()


# ---- files that are refused -----------------------------------------------------------------------------------------

API_ALONE = {"cmd": "exit 0"}
WRONG = {
    "a field that is nearly one": ({"api": {**API_ALONE, "healthpath": "/"}}, ["services.api", "healthpath", "healthPath"]),
    "a need that is nobody": ({"api": {**API_ALONE, "needs": ["bd"]}}, ["api", "bd"]),
    "a need that is no name": ({"api": {**API_ALONE, "needs": [["db"]]}}, ["services.api.needs"]),
    "a need for oneself": ({"api": {**API_ALONE, "needs": ["api"]}}, ["api → api"]),
    "a cycle": ({"a": {**API_ALONE, "needs": ["b"]}, "b": {**API_ALONE, "needs": ["a"]}}, ["a → b → a"]),
    "a longer cycle behind a door": ({"door": {**API_ALONE, "needs": ["a"]}, "a": {**API_ALONE, "needs": ["b"]},
                                      "b": {**API_ALONE, "needs": ["c"]}, "c": {**API_ALONE, "needs": {"a": "started"}}},
                                     ["a → b → c → a"]),
    "a condition that is none": ({"a": API_ALONE, "b": {**API_ALONE, "needs": {"a": "ready"}}}, ["healthy", "completed"]),
    "a service without a command": ({"api": {"port": 3100}}, ["api", "cmd"]),
    "a port that is none": ({"api": {**API_ALONE, "port": 70000}}, ["services.api.port", "65535"]),
    "a policy that is none": ({"api": {**API_ALONE, "restart": "sometimes"}}, ["restart", "on-failure"]),
    "a duration without sense": ({"api": {**API_ALONE, "stopTimeout": "soon"}}, ["stopTimeout"]),
    "a pattern that is none": ({"api": {**API_ALONE, "healthPath": "log: ready ["}}, ["healthPath", "ready ["]),
    "a name that is none": ({"a b": API_ALONE}, ["a b"]),
    "no services": ({}, ["services"]),
    "a sibling that is nobody": ({"api": {"cmd": "echo ${db.PORT}; touch started"}}, ["db.PORT"]),
    "a file of settings that is not there": ({"api": {**API_ALONE, "env_file": "none.env"}}, ["none.env"]),
}


def test_a_file_that_is_wrong_starts_nothing_and_is_told_where(stack, tmp_path):
    """Side by side, because each takes a process."""
    def attempt(name):
        one = Stack(tmp_path / name.replace(" ", "-"), stack.environ, stack.wire.port)
        one.write({service: {**body, "cmd": f"touch started; {body['cmd']}"} if "cmd" in body else body
                   for service, body in WRONG[name][0].items()})
        return one.pd("dev"), (one.folder / "started").exists()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = dict(zip(WRONG, pool.map(attempt, WRONG)))
    for name, (done, started) in results.items():
        expected = (1, 2, 3) if name.startswith(("a sibling", "a file")) else (2,)
        assert done.returncode in expected and not started and "Traceback" not in done.stderr, (name, done)
        assert all(word in done.stderr for word in WRONG[name][1]), (name, done.stderr)
    assert stack.nothing_is_left()


@pytest.mark.parametrize("text, words", [
    ("{'project': 'myapp'}", ["JSON", "line 1"]), ('{"a": 1, "a": 2}', ["twice"]), ('{"services": []}', ["services"]),
    ("[]", ["services"]), ("", ["JSON"]),
], ids=["quotes", "a key twice", "a list of services", "a list", "empty"])
def test_a_file_that_is_not_what_it_should_be_is_refused(stack, text, words):
    stack.file.write_text(text)
    done = stack.pd("dev")
    assert done.returncode == 2 and all(word in done.stderr for word in [*words, str(stack.file)]), done


def test_a_folder_without_a_project_is_told_so_and_a_folder_within_one_is_not(stack):
    assert stack.pd("dev").returncode == 3
    (stack.folder / "deep" / "down").mkdir(parents=True)
    stack.write({"a": {"cmd": "echo here: $(pwd)", "noPort": True}})
    home, stack.folder = stack.folder, stack.folder / "deep" / "down"
    dev = stack.dev()
    stack.folder = home
    assert dev.status() == 0 and any(line.endswith(f"here: {home.resolve()}") for line in dev.out), dev


def test_a_file_that_everybody_may_write_is_refused_even_with_trust(stack):
    stack.write({"a": {"cmd": "touch started", "noPort": True}})
    stack.file.chmod(0o666)
    for trust in ([], ["--trust"]):
        done = stack.pd("dev", *trust)
        assert (done.returncode == 2 or trust) and "Traceback" not in done.stderr, done
        if not trust:
            assert str(stack.file) in done.stderr and not (stack.folder / "started").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file that belongs to somebody else")
def test_the_commands_of_somebody_else_are_shown_and_run_only_when_trusted(stack):
    stack.write({"a": {"cmd": "touch started", "noPort": True}})
    os.chown(stack.file, 12345, 12345)
    done = stack.pd("dev", input="y\n")  # a pipe cannot consent
    assert done.returncode == 2 and "touch started" in done.stderr and "--trust" in done.stderr
    assert not (stack.folder / "started").exists()
    assert stack.pd("dev", "--trust").returncode == 0 and (stack.folder / "started").exists()
    # In a folder that is theirs as well, root looks after a user's own project.
    (stack.folder / "started").unlink()
    os.chown(stack.folder, 12345, 12345)
    assert stack.pd("dev").returncode == 0 and (stack.folder / "started").exists()


# ---- from the claim to the bind -------------------------------------------------------------------------------------


def test_a_wanted_port_that_is_taken_is_an_error_at_once_when_the_command_does_not_use_port(stack):
    with stranger_on() as port:
        stack.write({"api": {"cmd": serves()}, "db": {"port": port, "cmd": serves(f"port={port}"), "needs": ["api"]}})
        done = stack.pd("dev")
    assert done.returncode == 4 and str(port) in done.stderr and f"pid {os.getpid()}" in done.stderr, done
    assert "db" in done.stderr and "${PORT}" in done.stderr
    assert stack.notes() == []
    # What it had claimed for the others goes with it, which is noticed by its pid.
    eventually(lambda: not stack.wire.get("/services").body["services"], 5)


def test_a_wanted_port_that_is_taken_does_not_matter_when_the_command_uses_port(stack):
    with stranger_on() as port, stranger_on() as second:
        stack.write({"db": {"port": port, "cmd": serves("port=${PORT}")},
                     "mail": {"port": second, "cmd": serves(), "env": {"LISTEN": "127.0.0.1:${PORT}"}},
                     "api": {"cmd": serves(), "needs": ["db", "mail"]}})
        dev = stack.dev()
        db, mail, _ = stack.up("db", "mail", "api")
        assert not {port, second} & {db["port"], mail["port"]}
        assert (stack.facts("db")["name"], stack.facts("mail")["name"]) == ("db", "mail")
        env = stack.facts("api")["env"]
        assert (env["DB_PORT"], env["MAIL_PORT"]) == (str(db["port"]), str(mail["port"]))
        assert any(str(port) in line or str(db["port"]) in line for line in dev.err)  # where it is instead is said
        assert dev.signal().status() == 130 and stack.nothing_is_left()


@pytest.mark.parametrize("wanted", [False, True])
def test_a_port_that_is_taken_after_the_claim_and_before_the_start_is_seen(stack, wanted):
    port = free_port_block(1)
    stack.write({"db": {"cmd": serves("gate=open-db")},
                 "api": {"cmd": serves(f"port={port}") if wanted else serves(), "needs": ["db"],
                         **({"port": port} if wanted else {})},
                 "web": {"cmd": serves(), "needs": ["api"]}})
    dev = stack.dev()
    eventually(lambda: stack.notes("db", "started"))
    claimed = stack.service("api")["port"]
    with stranger_on(claimed):
        stack.open("open-db")
        if wanted:
            assert dev.status() not in (0, 130)
            assert f"pid {os.getpid()}" in "\n".join(dev.err) and not stack.notes("api"), dev
            assert stack.nothing_is_left()
        else:
            api, web = stack.up("api", "web")
            assert api["port"] != claimed and stack.facts("api")["name"] == "api"
            assert stack.facts("web")["env"]["API_PORT"] == str(api["port"])


def test_a_port_that_is_taken_in_the_last_moment_is_tried_once_more_elsewhere(stack):
    stack.write({"api": {"cmd": serves("gate=bind", "port=${PORT}")}, "web": {"cmd": serves(), "needs": ["api"]}})
    dev = stack.dev()
    eventually(lambda: stack.notes("api", "started"))
    claimed = stack.service("api")["port"]
    with stranger_on(claimed):
        stack.open("bind")  # its own bind fails now, with EADDRINUSE
        api, _ = stack.up("api", "web")
        assert api["port"] != claimed and stack.facts("api")["name"] == "api"
        assert len(stack.notes("api", "started")) == 2
        assert stack.facts("web")["env"]["API_PORT"] == str(api["port"])
        assert dev.signal().status() == 130


def test_it_is_tried_once_more_and_not_for_ever(stack):
    stack.write({"api": {"cmd": f"echo bind: Address already in use ${{PORT}}; {serves('exit=1')}"}})
    assert stack.dev().status() == 1
    assert len(stack.notes("api", "started")) == 2


def test_a_stranger_is_never_taken_for_ours(stack):
    stack.write({"api": {"cmd": serves("gate=never"), "healthTimeout": "1500ms"},
                 "web": {"cmd": serves(), "needs": ["api"]}})
    dev = stack.dev()
    eventually(lambda: stack.notes("api", "started"))
    with stranger_on(stack.service("api")["port"]):
        assert dev.status() not in (0, 130)
    assert f"pid {os.getpid()}" in "\n".join(dev.err) and not stack.notes("web"), dev
    assert stack.nothing_is_left()


# ---- supervision ----------------------------------------------------------------------------------------------------

STUBBORN = 'trap "" TERM; for each in 1 2 3; do "$SLEEPER" 1000 & done; wait'
OBEDIENT = 'for each in 1 2 3; do "$SLEEPER" 1000 & done; wait'


@pytest.fixture
def families(stack):
    """Four services, each a shell with three children; a program that only they run tells who of them lives."""
    sleeper = stack.folder / "sleeper"
    shutil.copy(shutil.which("sleep"), sleeper)
    stack.environ["SLEEPER"] = str(sleeper)
    stack.write({f"s{number}": {"cmd": STUBBORN if number % 2 else OBEDIENT, "noPort": True, "stopTimeout": "1s"}
                 for number in range(4)})
    stack.family = lambda: living(command=sleeper)
    yield stack
    for row in stack.family():
        with contextlib.suppress(ProcessLookupError):
            os.kill(row[0], signal.SIGKILL)


def test_a_group_that_ignores_the_signal_is_killed_after_its_time_with_its_children(families):
    dev = families.dev()
    eventually(lambda: len(families.family()) == 12)
    groups = {row[2] for row in families.family()}
    began = time.monotonic()
    assert dev.signal().status() == 130
    assert 1 <= time.monotonic() - began < 4
    assert living(groups=groups) == [] and families.nothing_is_left()


def test_a_second_ctrl_c_kills_at_once(families):
    families.write({"s1": {"cmd": STUBBORN, "noPort": True, "stopTimeout": "10m"}})
    dev = families.dev()
    eventually(lambda: len(families.family()) == 3)
    groups = {row[2] for row in families.family()}
    dev.signal()
    settle()
    assert dev.process.poll() is None and len(living(groups=groups)) == 4
    began = time.monotonic()
    assert dev.signal().status() == 130
    assert time.monotonic() - began < 3
    assert living(groups=groups) == []


def test_ctrl_c_during_the_start_stops_what_has_started_and_starts_no_more(stack):
    stack.write({"db": {"cmd": serves()}, "slow": {"cmd": serves("gate=never"), "needs": ["db"]},
                 "web": {"cmd": serves(), "needs": ["slow"]}})
    dev = stack.dev()
    eventually(lambda: stack.notes("slow", "started"))
    assert dev.signal().status() == 130
    assert stack.at("slow", "told") < stack.at("db", "told") and not stack.notes("web") and stack.nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_terminal_that_is_closed_leaves_nothing_behind_either(stack, number):
    stack.write({"db": {"cmd": serves()}, "api": {"cmd": serves(), "needs": ["db"]}})
    dev = stack.dev()
    stack.up("api")
    assert dev.signal(number).status() != 0
    assert stack.at("api", "told") < stack.at("db", "told") and stack.nothing_is_left()


def test_a_reader_that_has_enough_ends_it(stack):
    stack.write({"api": {"cmd": f"{serves()} & while echo tick; do sleep 0.02; done"}})
    process = subprocess.Popen(f'"{sys.executable}" "{MODULE}" dev 2>/dev/null | head -n 1', shell=True, text=True,
                               cwd=stack.folder, env=stack.environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               start_new_session=True)
    try:
        assert "tick" in process.communicate(timeout=30)[0]
        eventually(lambda: not stack.wire.get("/locks").body["locks"], 15)
        assert stack.nothing_is_left()
    finally:
        end(process)


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.long)])
def test_nothing_survives_a_supervisor_that_was_killed(families, dice, rounds):
    """4 services with 3 grandchildren each, half of them deaf to TERM: all are gone within the 1 s of their stopTimeout
    and 2 s more. The first two kills come when all is up, the others at any moment of the start."""
    first = time.monotonic()
    for turn in range(rounds):
        dev, whole = families.dev(), turn < 2
        if whole:
            eventually(lambda: len(families.family()) == 12)
        else:
            threading.Event().wait(dice.uniform(0.1, 0.8))
        helpers = {row[0] for row in process_table() if row[1] == dev.pid}
        groups = {row[2] for row in families.family()}
        dev.process.kill()
        dev.process.wait(10)
        began = time.monotonic()
        eventually(lambda h=helpers, g=groups: not living(pids=h, groups=g) and not families.family(), 20)
        assert time.monotonic() - began <= 1 + 2, (turn, "they outlived their time")
        for reader in dev.readers:
            reader.result(10)
        end(dev.process)
    eventually(lambda: not families.wire.get("/locks").body["locks"])
    record("supervisors", first, rounds=rounds, survivors=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_a_check_that_hangs_does_not_survive_either(families, number):
    families.write({"api": {"cmd": serves(), "healthPath": 'cmd: "$SLEEPER" 1000', "stopTimeout": "1s"}})
    dev = families.dev()
    eventually(lambda: families.family())
    dev.signal(number).process.wait(20)
    eventually(lambda: not families.family(), 3)


def test_after_a_kill_the_ports_are_free_and_the_next_start_is_like_the_first(stack):
    stack.write({"db": {"cmd": serves()}, "api": {"cmd": serves(), "needs": ["db"]}})
    dev = stack.dev()
    ports = [service["port"] for service in stack.up("db", "api")]
    dev.process.kill()
    eventually(lambda: not living(pids={note.pid for note in stack.notes()}), 12)
    again = stack.dev()
    eventually(lambda: stack.notes("api", "listens")[1:])
    assert [service["port"] for service in stack.up("db", "api")] == ports
    assert again.signal().status() == 130 and stack.nothing_is_left()


def test_a_second_dev_of_the_same_project_is_sent_to_the_first(stack):
    stack.write({"api": {"cmd": serves()}})
    dev = stack.dev()
    stack.up("api")
    second = stack.pd("dev")
    assert second.returncode == 4 and f"pid {dev.pid}" in second.stderr, second
    assert "pd logs" in second.stderr and "pd down" in second.stderr
    assert len(stack.notes("api", "started")) == 1
    assert dev.signal().status() == 130 and stack.nothing_is_left()


# ---- output ---------------------------------------------------------------------------------------------------------


def test_in_a_pipe_every_line_is_whole_plain_and_behind_the_name_of_its_service(stack):
    program = ('import os; os.write(1, b"x" * 200_000 + b"\\nnext\\n"); os.write(2, b"bad \\xff byte\\n");'
               'os.write(1, b"\\x1b[31mred\\x1b[0m \\x1b[2J\\x1b]0;owned\\x07\\n"); os.write(1, b"no newline")')
    (stack.folder / "talk.py").write_text(program)
    stack.write({
        "talk": {"cmd": f'"{sys.executable}" talk.py; sleep 0.3', "noPort": True},
        "a": {"cmd": "echo hello; sleep 30", "noPort": True}})
    dev = stack.dev()
    assert dev.status() == 0
    assert all(re.match(r"(talk|a   ) │ ", line) for line in dev.out), dev
    said = [line.partition(" │ ")[2] for line in dev.out if line.startswith("talk")]
    long = [line for line in said if line.startswith("x")]
    assert "".join(long) == "x" * 200_000 and max(map(len, long)) <= 64 * 1024
    rest = [line for line in said if not line.startswith("x")]
    assert "bad \ufffd byte" in rest and [line for line in rest if line != "bad \ufffd byte"] == [
        "next", "red ", "no newline"]
    assert not set("".join(dev.out + dev.err)) & set("\x1b\x07\r")
    assert "a    │ hello" in dev.out


def test_a_flood_from_one_service_does_not_drown_another(stack):
    stack.write({
        "flood": {"cmd": "exec yes flood flood flood flood flood flood", "noPort": True},
        "calm": {"cmd": f'exec "{sys.executable}" -S calm.py', "noPort": True}})
    (stack.folder / "calm.py").write_text(
        "import time\nfor number in range(1, 21):\n    print('calm', number, flush=True)\n    time.sleep(0.02)\n"
        "time.sleep(60)")
    dev = stack.dev()
    dev.says(r"calm +│ calm 1$")
    began = time.monotonic()
    dev.says(r"calm +│ calm 20$")
    assert time.monotonic() - began < 5  # it was printed in 0.4 s
    assert [line for line in dev.out if line.startswith("calm")] == [f"calm  │ calm {number}" for number in range(1, 21)]
    lines = eventually(lambda: stack.wire.get("/services/myapp:calm:main/logs").body.get("lines", [])[19:] and
                       stack.wire.get("/services/myapp:calm:main/logs").body["lines"], 5)
    assert [line["text"] for line in lines] == [f"calm {number}" for number in range(1, 21)]
    began = time.monotonic()
    assert stack.pd("down").returncode == dev.status() == 0
    assert time.monotonic() - began < 8  # neither is a request from another terminal


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_on_a_terminal_the_start_is_a_block_that_changes_in_place_and_the_terminal_is_whole_afterwards(stack):
    first = free_port_block(2)
    stack.write({"db": {"cmd": serves("gate=open-db", "port=${PORT}"), "port": first},
                 "api": {"cmd": serves("port=${PORT}"), "port": first + 1, "needs": ["db"]}})
    place = Path(tempfile.mkdtemp(prefix="pd-"))  # the name of a socket must be short

    def tmux(*words):
        done = subprocess.run(["tmux", "-S", str(place / "s"), "-f", "/dev/null", *map(str, words)], text=True,
                              env={**stack.environ, "PS1": "$ ", "ENV": ""}, capture_output=True, timeout=20)
        assert done.returncode == 0, done
        return done.stdout

    def rows(port):
        """The lines of the screen on which a service stands with its address; asked for over and over."""
        return [line for line in tmux("capture-pane", "-p", "-t", "t").splitlines() if f"localhost:{port}" in line]

    try:
        tmux("new-session", "-d", "-s", "t", "-x", 110, "-y", 30, "-c", stack.folder, "sh")
        tmux("send-keys", "-t", "t", f'"{sys.executable}" "{MODULE}" dev', "Enter")
        eventually(lambda: rows(first) and rows(first + 1), 20)
        assert re.match(r"api\b.*\bdb\b", rows(first + 1)[0])  # what it waits for
        seen = set()

        def has_changed():
            seen.update(rows(first))
            assert len(rows(first)) <= 1 and len(rows(first + 1)) <= 1  # a screen may be caught between two writes
            return len(seen) > 2

        eventually(has_changed)  # by the time that it has taken so far
        stack.open("open-db")
        stack.up("db", "api")
        eventually(lambda: len(rows(first)) == len(rows(first + 1)) == 1 and not re.search(r"\bdb\b", rows(first + 1)[0]))
        assert re.match(r"db\b.*\d\.\ds", rows(first)[0])
        tmux("send-keys", "-t", "t", "C-c")
        tmux("send-keys", "-t", "t", "echo status=$? && stty -a", "Enter")
        shown = eventually(lambda: (lambda screen: screen if "icanon" in screen else "")(
            tmux("capture-pane", "-p", "-t", "t")), 20)
        assert "status=130" in shown and re.search(r"[^-]\becho\b", shown) and re.search(r"[^-]icanon\b", shown)
        assert tmux("display-message", "-p", "-t", "t", "#{cursor_flag}").strip() == "1"
        eventually(stack.nothing_is_left)
    finally:
        with contextlib.suppress(AssertionError):
            tmux("kill-server")
        shutil.rmtree(place, ignore_errors=True)


# ---- from other terminals -------------------------------------------------------------------------------------------


def test_other_terminals_see_what_runs_follow_it_restart_it_and_end_it(stack, pd):
    stack.write({"db": {"cmd": serves()}, "api": {"cmd": serves(), "needs": ["db"], "healthPath": "/health"},
                 "web": {"cmd": serves(), "needs": ["api"]}})
    assert stack.pd("down").returncode == stack.pd("restart", "api").returncode == 3  # nothing runs yet
    dev = stack.dev()
    assert stack.pd("wait", "myapp:web:main", "--timeout", "20s").returncode == 0
    shown = {service["id"]: service for service in json.loads(stack.pd("ps", "--json").stdout)["services"]}
    pids = {name: stack.facts(name)["pid"] for name in ("db", "api", "web")}
    # The pid is that of the group, whose first process may be the shell that a command line needs.
    assert {name: (shown[f"myapp:{name}:main"]["status"], shown[f"myapp:{name}:main"]["pid"]) for name in pids} == {
        name: ("running", os.getpgid(pid)) for name, pid in pids.items()}
    assert shown["myapp:api:main"]["lastSeen"] and stack.wire.get("/services/health/myapp:api:main")["healthy"] is True
    assert re.search(r"myapp:api:main.*running", stack.pd("ps").stdout)
    assert stack.pd("logs", "api").stdout.splitlines() == ["api is ready"]
    assert stack.pd("logs", "myapp:db:main").stdout.splitlines() == ["db is ready"]
    assert {"db is ready", "api is ready", "web is ready"} == {
        line.partition(" │ ")[2] for line in stack.pd("logs").stdout.splitlines()}
    follower = stack.start("logs", "api", "-f")
    follower.says("api is ready")
    done = stack.pd("restart", "api")
    assert done.returncode == 0, done
    assert stack.facts("api")["pid"] != pids["api"] and len(stack.notes("api", "told")) == 1
    assert stack.facts("db")["pid"] == pids["db"] and stack.facts("web")["pid"] == pids["web"]
    eventually(lambda: follower.out == ["api is ready"] * 2)
    assert follower.signal().status() == 130
    wrong = stack.pd("restart", "nonsense")
    assert wrong.returncode == 3 and "nonsense" in wrong.stderr and "api" in wrong.stderr
    assert stack.pd("down").returncode == 0
    assert stack.nothing_is_left()  # when it says so, it is so
    assert dev.status() == 0
    assert stack.at("web", "told") < stack.notes("api", "told")[1].at < stack.at("db", "told")
    assert stack.pd("logs", "api").stdout.splitlines() == ["api is ready"] * 2  # they can be read afterwards


def test_a_request_that_comes_as_soon_as_dev_is_seen_is_not_lost(stack):
    stack.write({f"s{number}": {"cmd": "exec sleep 1000"} for number in range(30)})  # so many claims take a moment
    dev = stack.dev()
    eventually(lambda: stack.wire.get("/locks/dev:myapp:main")["held"])  # by which `down` knows that it runs
    stack.wire.post("/msg/dev:myapp:main", {"payload": {"do": "down"}})
    assert dev.status(8) == 0 and stack.nothing_is_left()


def test_two_who_ask_for_the_same_restart_are_both_answered(stack):
    stack.write({"api": {"cmd": serves("lingers=0.3"), "healthTimeout": "3s"}})
    stack.dev()
    stack.up("api")
    asked = [in_background(stack.pd, "restart", "api") for _ in range(2)]
    assert [one.result(30).returncode for one in asked] == [0, 0]
    assert stack.service("api")["status"] == "running" and len(living(pids={n.pid for n in stack.notes()})) == 1


def test_a_restart_of_what_ends_by_itself_is_answered_when_it_has_ended(stack):
    stack.write({"migrate": {"cmd": "echo migrated"}, "api": {"cmd": serves(), "needs": {"migrate": "completed"}}})
    stack.dev()
    stack.up("api")
    done = stack.pd("restart", "migrate")
    assert done.returncode == 0 and "ended with 0" in done.stdout + done.stderr, done


def test_a_restarted_service_waits_for_what_it_needs(stack):
    stack.write({"db": {"cmd": serves("gate=open")}, "web": {"cmd": serves(), "needs": ["db"]}})
    stack.open("open")
    stack.dev()
    stack.up("web")
    (stack.folder / "open").unlink()
    asked = [in_background(stack.pd, "restart", "db")]
    eventually(lambda: len(stack.notes("db", "started")) == 2)
    asked.append(in_background(stack.pd, "restart", "web"))
    eventually(lambda: stack.notes("web", "ended"))
    settle()
    assert len(stack.notes("web", "started")) == 1
    stack.open("open")
    assert [one.result(30).returncode for one in asked] == [0, 0]
    assert stack.notes("db", "listens")[1].at < stack.notes("web", "started")[1].at


def test_the_last_lines_of_what_failed_are_its_last(stack):
    stack.write({"api": {"cmd": "seq 1 9000; echo boom; exit 3", "noPort": True}})
    dev = stack.dev()
    assert dev.status() == 3
    assert [line.strip() for line in dev.err if line.strip() in ("8999", "9000", "boom")] == ["8999", "9000", "boom"]


def test_logs_that_nobody_reads_any_more_end_and_those_of_nobody_are_refused(stack):
    stack.write({"api": {"cmd": serves()}})
    stack.dev()
    stack.up("api")
    command = f'"{sys.executable}" "{MODULE}" logs -f api'
    reading = in_background(subprocess.run, ["sh", "-c", f"{command} | head -n 1"], cwd=stack.folder, env=stack.environ,
                            timeout=30, capture_output=True, text=True)
    eventually(lambda: reading.done() or not stack.wire.post(
        "/services/myapp:api:main/logs", {"lines": [{"text": "more"}]}))
    assert (reading.result().stdout, reading.result().stderr) == ("api is ready\n", "")
    wrong = stack.pd("logs", "-f", "a b")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr and wrong.stderr.count("\n") == 1, wrong


def test_names_may_be_as_long_as_an_identity_may_be(stack):
    stack.write({"s" * 64: {"cmd": "echo up and away", "noPort": True}}, project="p" * 64, context="c" * 64)
    dev = stack.dev()
    assert dev.status() == 0 and any("up and away" in line for line in dev.out), dev
    done = stack.pd("run", ":".join(["p" * 64, "s" * 64, "c" * 64]), "--", "echo", "up")
    assert (done.returncode, done.stdout) == (0, "up\n"), done


def test_nobody_can_make_dev_do_more_than_stop_and_restart_what_its_file_declares(stack):
    stack.write({"api": {"cmd": serves()}, "away": {"remote": "https://example.com"}})
    dev = stack.dev()
    stack.up("api")
    for payload in ("down", None, 7, [], {}, {"do": "run", "cmd": "touch pwned"}, {"do": "restart", "service": "away"},
                    {"do": "restart", "service": "touch pwned"}, {"do": "restart", "service": {"cmd": "touch pwned"}},
                    {"do": ["down"]}, {"do": "start", "service": "api", "cmd": "touch pwned"}, {"service": "api"}):
        assert stack.wire.post("/msg/dev:myapp:main", {"payload": payload}).status == 200
    assert stack.pd("restart", "api").returncode == 0  # it has read all of that, and is well
    assert len(stack.notes("api", "started")) == 2 and not list(stack.folder.glob("pwned*"))
    assert dev.signal().status() == 130 and "Traceback" not in "\n".join(dev.err)


@pytest.mark.parametrize("how", ["restarted", "killed"])
def test_dev_goes_on_while_its_daemon_is_away_and_is_known_to_the_next(tough_stack, spawned, how):
    stack = tough_stack
    stack.write({"api": {"cmd": f'{serves()} & while true; do test -e "$SERVICE.say" && cat "$SERVICE.say" && '
                                'rm "$SERVICE.say"; sleep 0.02; done'}})
    dev = stack.dev()
    stack.up("api")
    pid = stack.facts("api")["pid"]
    spawned.kill() if how == "killed" else spawned.terminate()
    Path(stack.environ["SERVICE"] + ".say").write_text("said to nobody\n")
    dev.says("said to nobody")
    assert dev.process.poll() is None
    spawned.start()
    eventually(lambda: "said to nobody" in stack.pd("logs", "api").stdout)  # it was kept
    assert stack.service("api")["status"] == "running" and stack.facts("api")["pid"] == pid
    assert len(stack.notes("api", "started")) == 1
    done = stack.pd("down")
    assert done.returncode == 0, (done, dev)
    assert dev.status() == 0 and stack.nothing_is_left()


def test_dev_can_be_ended_while_no_daemon_runs(tough_stack, spawned):
    tough_stack.write({"api": {"cmd": f"{serves()} & while sleep 0.05; do echo more; done"}})
    dev = tough_stack.dev()
    tough_stack.up("api")
    spawned.kill()
    seen = len(dev.out)
    eventually(lambda: len(dev.out) > seen + 2)  # lines that nobody can be told
    began = time.monotonic()
    assert dev.signal().status() == 130
    assert time.monotonic() - began < 8 and "Traceback" not in "\n".join(dev.err)
    assert living(pids={note.pid for note in tough_stack.notes()}) == []


def test_run_claims_a_port_for_one_command_gives_its_status_and_releases(stack):
    done = stack.pd("run", "myapp:api", "--", "sh", "-c", 'echo "$PORT $PORT_DADDY_ID"; echo oops >&2; exit 7')
    assert done.returncode == 7 and re.fullmatch(r"\d+ myapp:api\n", done.stdout) and "oops" in done.stderr, done
    assert stack.nothing_is_left()
    run = stack.start("run", "myapp:api:main", "--", sys.executable, "-S", stack.folder / "service.py")
    assert run.says("api is ready") == "api is ready"  # as the command said it
    api = stack.up("api")[0]
    assert (api["status"], api["pid"]) == ("running", stack.facts("api")["pid"])
    eventually(lambda: stack.pd("logs", "myapp:api:main").stdout == "api is ready\n")
    assert run.signal(signal.SIGTERM).status() != 0
    assert stack.notes("api", "told") and stack.nothing_is_left()
    missing = stack.pd("run", "myapp:api", "--", "no-such-program-anywhere")
    assert missing.returncode == 127 and stack.nothing_is_left()
    assert stack.pd("run", "myapp:api").returncode == 2


def test_run_does_not_take_over_what_dev_runs(stack):
    stack.write({"api": {"cmd": serves()}})
    dev = stack.dev()
    before = stack.up("api")[0]
    done = stack.pd("run", "myapp:api:main", "--", "echo", "ran")
    assert done.returncode == 4 and done.stdout == "" and str(dev.pid) in done.stderr, done
    after = stack.service("api")
    assert {name: after[name] for name in ("port", "pid", "status")} == {
        name: before[name] for name in ("port", "pid", "status")}


def test_a_wait_for_what_run_started_ends_when_it_can_be_reached(stack):
    stack.start("run", "myapp:api:main", "--", sys.executable, "-S", stack.folder / "service.py", "gate=listen")
    eventually(lambda: stack.notes("api", "started"))
    waiting = in_background(stack.up, "api")
    settle()
    assert not waiting.done()
    stack.open("listen")
    waiting.result(20)
    assert stack.facts("api")["name"] == "api"


def test_run_hands_on_stdin(stack):
    done = stack.pd("run", "myapp:api", "--", "cat", input="through\n", timeout=10)
    assert (done.returncode, done.stdout) == (0, "through\n")


# ---- lines on the wire ----------------------------------------------------------------------------------------------


def test_lines_are_kept_in_order_and_read_by_number(wire):
    wire.post("/claim", {"id": "myapp:api"})
    path = "/services/myapp:api/logs"
    assert wire.get(path)["lines"] == []
    sent = [{"text": f"line {number}", "stream": "stderr" if number % 2 else "stdout", "at": 1_000 + number}
            for number in range(10)]
    assert wire.post(path, {"lines": sent}).status == 200
    lines = wire.get(path)["lines"]
    assert [{name: line[name] for name in ("text", "stream", "at")} for line in lines] == sent
    numbers = [line["id"] for line in lines]
    assert numbers == sorted(set(numbers))
    assert [line["text"] for line in wire.get(f"{path}?tail=3")["lines"]] == ["line 7", "line 8", "line 9"]
    assert [line["text"] for line in wire.get(f"{path}?after={numbers[7]}")["lines"]] == ["line 8", "line 9"]
    wire.post(path, {"lines": [{"text": "of now"}]})
    last = wire.get(f"{path}?tail=1")["lines"][0]
    assert last["stream"] == "stdout" and abs(last["at"] - time.time() * 1000) < 10_000


def test_the_last_thousand_lines_of_a_service_are_kept_and_outlive_its_release(wire):
    path = "/services/myapp:api/logs"
    wire.post("/claim", {"id": "myapp:api"})
    wire.post("/services/myapp:other/logs", {"lines": [{"text": "its own"}]})
    for first in (0, 700):
        assert wire.post(path, {"lines": [{"text": str(first + number)} for number in range(700)]}).status == 200
    wire.delete("/release?id=myapp:api")
    assert [line["text"] for line in wire.get(f"{path}?tail=1000")["lines"]] == [str(number) for number in range(400, 1400)]
    assert [line["text"] for line in wire.get("/services/myapp:other/logs")["lines"]] == ["its own"]
    assert wire.get(f"{path}?tail=1001").status == 400
    assert wire.get("/services/no:such/logs").status == 404


def test_lines_can_be_followed_and_the_following_resumed(server, wire):
    path = "/services/myapp:api/logs"
    wire.post(path, {"lines": [{"text": "old"}, {"text": "older than now"}]})
    stream = Stream(server.port, f"{path}?follow=true&tail=1")
    wire.post(path, {"lines": [{"text": "new"}, {"text": "", "stream": "stderr"}]})
    got = stream.messages(3)
    assert [event.data["text"] for event in got] == ["older than now", "new", ""]
    assert [event.id for event in got] == [event.data["id"] for event in got]
    stream.close()
    wire.post("/services/myapp:other/logs", {"lines": [{"text": "not ours"}]})
    wire.post(path, {"lines": [{"text": "missed"}]})
    again = Stream(server.port, f"{path}?follow=true", headers={"Last-Event-ID": str(got[1].id)})
    assert [event.data["text"] for event in again.messages(2)] == ["", "missed"]
    again.close()


@pytest.mark.parametrize("lines", [
    None, [], "text", [7], [{}], [{"text": 7}], [{"text": "a", "stream": "stdlog"}], [{"text": "a", "at": "now"}],
    [{"text": "x" * (64 * 1024 + 1)}], [{"text": "a"}] * 1001, [{"text": "a", "colour": "red"}],
], ids=lambda value: repr(value)[:24])
def test_lines_that_are_none_are_refused_and_nothing_is_kept(wire, lines):
    before = fingerprint(wire)
    answer = wire.post("/services/myapp:api/logs", {"lines": lines})
    assert answer.status == 400 and answer["success"] is False and answer["code"].startswith(("BAD", "UNKNOWN"))
    assert fingerprint(wire) == before and wire.get("/services/myapp:api/logs").status == 404


# ---- claims in a crowd ----------------------------------------------------------------------------------------------


class Crowd:
    """Threads that claim, check and release, and strangers that bind and listen in the same few hundred ports."""

    def __init__(self, port, span, dice, goal):
        self.port, self.span, self.goal = port, span, goal
        self.guard, self.given, self.live, self.wrong = threading.Lock(), 0, {}, []
        self.held = {}  # what strangers hold: port -> since when
        self.seeds = [dice.getrandbits(64) for _ in range(40)]
        self.over = threading.Event()

    def stranger(self, number):
        """Holds eight ports, one of them new every few milliseconds, half of them listening."""
        dice, mine = random.Random(self.seeds[32 + number]), []
        while not self.over.wait(0.005):
            host = dice.choice(["127.0.0.1", "0.0.0.0", "::1"])
            port, one = dice.randrange(*self.span), socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            try:
                one.bind((host, port))
                if dice.random() < 0.5:
                    one.listen()
            except OSError:
                one.close()
                continue
            with self.guard:
                self.held[port, number] = time.monotonic()
            mine.append((one, port))
            if len(mine) > 8:
                self.leave(number, *mine.pop(0))
        for one, port in mine:
            self.leave(number, one, port)

    def leave(self, number, one, port):
        with self.guard:
            self.held.pop((port, number), None)
        one.close()

    def claimer(self, number):
        dice, mine, connection = random.Random(self.seeds[number]), [], http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=60)

        def ask(method, path, body):
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            return as_answer(connection.getresponse())

        while not self.over.is_set():
            if len(mine) > 6 or mine and dice.random() < 0.4:
                name, port = mine.pop(dice.randrange(len(mine)))
                with self.guard:
                    del self.live[port]
                ask("POST", "/release", {"id": name})
                continue
            name, asked = f"crowd:t{number}:s{dice.randrange(12)}", time.monotonic()
            if name in dict(mine):
                continue
            answer = ask("POST", "/claim", {"id": name, "range": list(self.span)[:1] + [self.span[1] - 1]})
            if answer.status != 200:
                self.wrong.append(("refused", answer.body))
                return
            port = answer["port"]
            free = can_bind(port)
            with self.guard:
                self.given += 1
                if port in self.live:
                    self.wrong.append(("given twice", port, name, self.live[port]))
                self.live[port] = name
                # A stranger that came after the question may have been faster than our look; one from before may not.
                since = min([at for (held, _), at in self.held.items() if held == port], default=None)
                if not free and since is not None and since < asked:
                    self.wrong.append(("taken by a stranger", port, name, asked - since))
                if self.given >= self.goal or self.wrong:
                    self.over.set()
            mine.append((name, port))
        connection.close()


@pytest.mark.parametrize("goal", [3_000, pytest.param(200_000, marks=pytest.mark.long)])
def test_32_claimers_among_strangers_never_get_a_port_twice_or_one_that_is_taken(spawned, dice, goal):
    first = dice.randrange(20_000, 29_000)
    crowd = Crowd(spawned.port, (first, first + 600), dice, goal)
    began = time.monotonic()
    threads = [in_background(crowd.stranger, number) for number in range(8)]
    threads += [in_background(crowd.claimer, number) for number in range(32)]
    assert crowd.over.wait(3_600 if goal > 3_000 else 60) or crowd.wrong, f"only {crowd.given} claims so far"
    for thread in threads:
        thread.result(60)
    print(f"{crowd.given} claims in {time.monotonic() - began:.1f} s")
    assert crowd.wrong == []
    record("claims", began, claims=crowd.given, threads=32, duplicates=0)


# =====================================================================================================================
# 14. DESCRIPTIONS — what a coding agent is told, and what comes of its calls
# =====================================================================================================================

MODERN = {"_meta": {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}}


class McpClient:
    """`python port_daddy.py mcp` as a real process: a line in, a line out."""

    def __init__(self, environ):
        self.process = subprocess.Popen([*PROGRAM, "mcp"], env=environ, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.ids = itertools.count(1)

    def say(self, line):
        self.process.stdin.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
        self.process.stdin.flush()

    def hear(self):
        return json.loads(read_line(self.process.stdout))

    def send(self, method, **params):
        self.say({"jsonrpc": "2.0", "id": (number := next(self.ids)), "method": method, "params": params})
        return number

    def ask(self, method, **params):
        number, answer = self.send(method, **params), self.hear()
        assert answer["jsonrpc"] == "2.0" and answer["id"] == number, answer
        return answer

    def call(self, tool, **arguments):
        return self.ask("tools/call", name=tool, arguments=arguments)["result"]

    def end(self):
        """Close its stdin; what it still says, what it logged, and how it ended."""
        said, logged = self.process.communicate(timeout=20)
        return said, logged, self.process.returncode


@pytest.fixture
def mcp():
    started = []

    def start(environ):
        started.append(McpClient(environ))
        return started[-1]

    yield start
    for client in started:
        end(client.process)


@pytest.fixture
def agent(mcp, cli):
    return mcp(cli.environment)


@pytest.fixture
def listening():
    """Programs that listen on a port until the test ends."""
    started = []

    def start(port):
        code = f"import socket; s = socket.create_server(('127.0.0.1', {port})); print('up', flush=True); input()"
        started.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        start_new_session=True))
        read_line(started[-1].stdout)

    yield start
    for process in started:
        end(process)


def fits(schema, value):
    """The part of JSON Schema that our own schemas use."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert any(type(value) is kinds[name] for name in named), (schema, value)
    for name in schema.get("required", ()):
        fits(schema["properties"][name], value[name])


def test_mcp_shakes_hands_in_any_version_it_knows(agent):
    for asked in ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "1999-01-01", "2026-07-28"):
        begun = agent.ask("initialize", protocolVersion=asked, capabilities={}, clientInfo={"name": "t"})["result"]
        assert begun["protocolVersion"] == (asked if "2024" <= asked < "2026" else "2025-11-25")
        assert begun["serverInfo"]["name"] == "port-daddy" and begun["instructions"]
        assert begun["capabilities"] == {"tools": {}}
        agent.say({"jsonrpc": "2.0", "method": "notifications/initialized"})
        assert agent.ask("ping")["result"] == {}
        assert set(agent.ask("tools/list")["result"]) == {"tools"}
    assert agent.end() == ("", "", 0)


def test_mcp_needs_no_handshake_in_the_new_era(agent):
    found = agent.ask("server/discover", **MODERN)["result"]
    assert found["resultType"] == "complete" and "2026-07-28" in found["supportedVersions"]
    assert {"capabilities", "instructions", "ttlMs", "cacheScope"} <= set(found)
    listed = agent.ask("tools/list", **MODERN)["result"]
    assert listed["resultType"] == "complete" and listed["ttlMs"] > 0 and listed["cacheScope"] == "public"
    called = agent.ask("tools/call", name="list_locks", arguments={}, **MODERN)["result"]
    assert called["resultType"] == "complete" and called["structuredContent"]["locks"] == []
    for version in ("2199-01-01", "2025-11-25", 7):
        error = agent.ask("tools/list", _meta={"io.modelcontextprotocol/protocolVersion": version})["error"]
        assert error["code"] == -32022 and error["data"]["requested"] == version
        assert "2026-07-28" in error["data"]["supported"]
    for method in ("initialize", "ping"):
        assert agent.ask(method, **MODERN)["error"]["code"] == -32601
    assert agent.ask("server/discover")["error"]["code"] == -32601


def test_mcp_describes_at_most_twelve_tools_always_alike(agent):
    tools = agent.ask("tools/list")["result"]["tools"]
    assert tools == agent.ask("tools/list")["result"]["tools"] and 1 <= len(tools) <= 12
    for tool in tools:
        hints = tool["annotations"]
        assert tool["title"] and tool["description"] and hints["openWorldHint"] is False
        assert {type(hints[name]) for name in ("readOnlyHint", "destructiveHint", "idempotentHint")} == {bool}
        assert not (hints["readOnlyHint"] and hints["destructiveHint"])
        takes = tool["inputSchema"]
        assert takes["type"] == tool["outputSchema"]["type"] == "object"
        assert set(takes["required"]) <= set(takes["properties"])
        assert hints["readOnlyHint"] or "agent" in takes["required"], tool["name"]
        assert all(field["description"] for field in takes["properties"].values()) and "pid" not in takes["properties"]
        assert all("items" in field for field in takes["properties"].values() if field.get("type") == "array")


def test_every_tool_of_mcp_gives_what_its_schema_says_and_the_same_as_text(agent, pd, listening):
    tools = agent.ask("tools/list")["result"]["tools"]
    schemas = {tool["name"]: tool["outputSchema"] for tool in tools}
    acting = {tool["name"] for tool in tools if "agent" in tool["inputSchema"]["required"]}
    pd.publish("tasks", {"n": 1})
    calls = [
        ("claim", {"id": "shop:web", "range": [4000, 4999]}), ("list_services", {"pattern": "shop:*"}),
        ("wait_for_services", {"services": ["shop:web"]}), ("lock", {"name": "db", "ttl": "30s"}),
        ("extend_lock", {"name": "db", "ttl": 60_000}), ("list_locks", {"owner": "a"}), ("unlock", {"name": "db"}),
        ("publish", {"channel": "news", "payload": None}), ("poll", {"channel": "tasks", "timeout": 0, "lease": "30s"}),
        ("ack", {"channel": "tasks"}), ("poll", {"channel": "void", "timeout": 0}), ("get_activity", {"agent": "a"}),
        ("release", {"id": "shop:*"})]
    seen = {}
    for tool, given in calls:
        if tool == "ack":
            given["receipt"] = seen["poll"]["receipt"]
        if tool == "wait_for_services":  # a process that is younger than the claim, and so no stranger
            listening(seen["claim"]["port"])
        result = agent.call(tool, **given, **({"agent": "a"} if tool in acting and "agent" not in given else {}))
        assert result["isError"] is False, result
        seen[tool] = result["structuredContent"]
        fits(schemas[tool], seen[tool])
        assert json.loads(result["content"][0]["text"]) == seen[tool]
    assert set(seen) == set(schemas)
    assert pd.get_messages("news")["messages"][0]["sender"] == "a"


def test_a_refusal_of_mcp_is_a_result_that_names_the_holder_and_what_to_do(agent, pd):
    pd.lock("db", owner="other")
    refused = agent.call("lock", agent="me", name="db")
    said = refused["content"][0]["text"]
    assert refused["isError"] and "held by other" in said and "give it longer" in said
    assert json.loads(refused["content"][1]["text"])["code"] == "LOCK_HELD"
    for tool, given, words in (
            ("lock", {"name": "db"}, "agent must be a name"), ("lock", {"agent": "a b", "name": "db"}, "agent must be"),
            ("lock", {"agent": "me"}, "name is missing"), ("lock", {"agent": "me", "name": "x", "tll": 3}, "mean ttl"),
            ("claim", {"agent": "me", "id": "a b"}, "id must be"), ("list_locks", {"pattern": 3}, "pattern must be")):
        wrong = agent.call(tool, **given)
        assert wrong["isError"] and words in wrong["content"][0]["text"], wrong


NO_REQUESTS = [  # a line, and the code and the id of its refusal
    ("{half", -32700, None), ("\xff\udc80", -32700, None), ('{"a": 1, "a": 2}', -32700, None), ("3", -32600, None),
    ("[]", -32600, None), ('[{"jsonrpc": "2.0", "id": 1, "method": "ping"}]', -32600, None),
    ('{"jsonrpc": "1.0", "id": 1, "method": "ping"}', -32600, None), ('{"jsonrpc": "2.0", "id": 1}', -32600, 1),
    ('{"jsonrpc": "2.0", "id": null, "method": "ping"}', -32600, None),
    ('{"jsonrpc": "2.0", "id": [1], "method": "tools/call"}', -32600, None),
    ('{"jsonrpc": "2.0", "id": "x", "method": "resources/list"}', -32601, "x"),
    ('{"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": []}', -32602, 1),
    ('{"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": 3}}', -32602, 1),
    ('{"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {}}', -32602, 1),
    ('{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "rm"}}', -32602, 1),
    ('{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": ["lock"]}}', -32602, 1),
    ('{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "lock", "arguments": "x"}}', -32602, 1)]


def test_mcp_refuses_what_is_no_request_and_goes_on(agent):
    for line, code, id in NO_REQUESTS:
        agent.process.stdin.buffer.write(line.encode("latin-1", "surrogateescape") + b"\n\n")
        agent.process.stdin.flush()
        answer = agent.hear()
        assert (answer["error"]["code"], answer["id"]) == (code, id), line
        assert agent.ask("ping")["result"] == {}


def test_mcp_answers_no_notification_and_no_answer(agent):
    for message in ({"method": "notifications/initialized"}, {"method": "no/such"}, {"method": "tools/call"},
                    {"method": "notifications/cancelled", "params": {"requestId": [1]}},
                    {"method": "notifications/cancelled", "params": []}, {"id": 9, "result": {}},
                    {"id": 9, "error": {"code": 1, "message": ""}}):
        agent.say({"jsonrpc": "2.0", **message})
    assert agent.ask("ping")["result"] == {}
    assert agent.end() == ("", "", 0)


def test_mcp_takes_a_batch_in_the_one_version_that_has_them(agent):
    agent.ask("initialize", protocolVersion="2025-03-26")
    call = {"name": "lock", "arguments": {"agent": "a", "name": "db"}}
    agent.say([{"jsonrpc": "2.0", "id": "p", "method": "ping"}, {"jsonrpc": "2.0", "method": "notifications/initialized"},
               {"jsonrpc": "2.0", "id": "l", "method": "tools/call", "params": call}, 3])
    answers = agent.hear()
    assert [answer["id"] for answer in answers] == ["p", "l", None]
    assert answers[1]["result"]["structuredContent"]["owner"] == "a" and answers[2]["error"]["code"] == -32600
    agent.say([{"jsonrpc": "2.0", "method": "notifications/initialized"}])
    assert agent.ask("ping")["result"] == {}


def test_a_call_of_mcp_that_waits_holds_up_nothing_and_can_be_cancelled(agent, pd):
    pd.lock("db", owner="other")
    waiting = agent.send("tools/call", name="lock", arguments={"agent": "a", "name": "db", "wait": "1h"})
    cancelled = agent.send("tools/call", name="lock", arguments={"agent": "b", "name": "db", "wait": "40s"})
    eventually(lambda: pd.check_lock("db")["waiting"] == 2)
    assert agent.ask("ping")["result"] == {}
    assert agent.call("lock", agent="a", name="else")["isError"] is False
    agent.say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": cancelled}})
    eventually(lambda: pd.check_lock("db")["waiting"] == 1, 5)
    pd.unlock("db", owner="other")
    answer = agent.hear()
    assert answer["id"] == waiting and answer["result"]["structuredContent"]["owner"] == "a"
    assert agent.ask("ping")["result"] == {}  # and nothing is said of the cancelled one


def test_a_wait_of_mcp_ends_before_its_client_gives_up(make_server, cli, pd, mcp, server, monkeypatch):
    asked = []
    wait = server.daemon.wait
    monkeypatch.setattr(server.daemon, "wait", lambda asker, look, timeout, *rest, **more: (
        asked.append(timeout), wait(asker, look, 0, *rest, **more))[1])
    agent = mcp(cli.environment)
    pd.lock("db", owner="other")
    asked.clear()
    assert agent.call("lock", agent="a", name="db", wait="1h")["isError"]
    assert agent.call("wait_for_services", services=["no:such"])["isError"]
    assert agent.call("poll", agent="a", channel="void", timeout=60_000)["structuredContent"]["message"] is None
    assert asked == [50_000, 50_000, 50_000]


def test_what_an_agent_took_over_mcp_outlives_the_process_and_waits_do_not(agent, pd):
    pd.lock("busy", owner="other")
    assert agent.call("lock", agent="a", name="db")["isError"] is False
    assert pd.check_lock("db")["pid"] is None
    agent.send("tools/call", name="lock", arguments={"agent": "a", "name": "busy", "wait": "50s"})
    eventually(lambda: pd.check_lock("busy")["waiting"] == 1)
    agent.send("tools/call", name="publish", arguments={"agent": "a", "channel": "last", "payload": 1})
    said, logged, status = agent.end()
    assert status == 0 and logged == "" and len(said.splitlines()) == 1 and '"channel":"last"' in said
    eventually(lambda: pd.check_lock("busy")["waiting"] == 0, 5)
    assert pd.check_lock("db")["owner"] == "a"


def test_mcp_starts_the_daemon_and_finds_it_again_after_a_restart(mcp, fresh):
    agent = mcp(fresh.environment)
    assert agent.ask("tools/list")["result"]["tools"] and not (fresh.home / "daemon.json").exists()
    token = agent.call("lock", agent="a", name="db")["structuredContent"]["token"]
    assert fresh("stop").returncode == 0
    assert agent.call("extend_lock", agent="a", name="db", token=token)["structuredContent"]["token"] == token
    assert agent.end() == ("", "", 0)


def test_mcp_says_what_to_do_when_no_daemon_can_be_had(mcp, cli, tmp_path):
    lost = mcp({**cli.environment, "PORT_DADDY_URL": "http://127.0.0.1:1"}).call("list_locks")
    assert lost["isError"] and "unset PORT_DADDY_URL" in lost["content"][0]["text"]
    (tmp_path / "file").write_text("")
    nowhere = mcp(environment(PORT_DADDY_HOME=tmp_path / "file" / "home", PORT_DADDY_PORT=0)).call("list_locks")
    assert nowhere["isError"] and "state folder" in nowhere["content"][0]["text"]


@pytest.mark.parametrize("program", ["claude", "cursor", "codex", "vscode"])
def test_mcp_prints_the_configuration_of_a_program(cli, mcp, program, pd):
    told = cli("mcp", "--print-config", program, PORT_DADDY_TOKEN="hush-hush")
    assert told.returncode == 0 and "goes into" in told.stderr and "hush" not in told.stdout
    if program == "codex":
        tomllib = pytest.importorskip("tomllib")
        entry = tomllib.loads(told.stdout)["mcp_servers"]["port-daddy"]
    else:
        entry = json.loads(told.stdout)["servers" if program == "vscode" else "mcpServers"]["port-daddy"]
    asked = '{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "list_locks"}}\n'
    pd.lock("seen", owner="me")
    done = subprocess.run([entry["command"], *entry["args"]], env=environment(**entry["env"]), input=asked, text=True,
                          capture_output=True, timeout=20)
    assert done.returncode == 0 and "seen" in done.stdout and "hush" not in str(entry)


SDK_SESSION = """
import asyncio, sys
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

async def main(mode):
    server = StdioServerParameters(command=sys.argv[1], args=[sys.argv[2], "mcp"], env={"PORT_DADDY_URL": sys.argv[3],
                                   "PORT_DADDY_HOME": sys.argv[4]})
    async with Client(stdio_client(server), mode=mode) as client:
        tools = (await client.list_tools()).tools
        taken = await client.call_tool("lock", {"agent": mode, "name": "sdk/" + mode})
        again = await client.call_tool("lock", {"agent": "other", "name": "sdk/" + mode})
        assert not taken.is_error and taken.structured_content["owner"] == mode
        assert again.is_error and "held by " + mode in again.content[0].text
        empty = await client.call_tool("poll", {"agent": mode, "channel": "void", "timeout": 0})
        assert empty.structured_content["message"] is None
        print(client.protocol_version, len(tools))

for mode in ("legacy", "auto"):
    asyncio.run(main(mode))
"""


@pytest.mark.peers
def test_the_official_sdk_of_mcp_speaks_with_us_in_both_eras(server):
    python = os.environ.get("MCP_SDK_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import mcp.client.client"], capture_output=True).returncode:
        pytest.skip("no mcp >= 2 here: pip install mcp, or name a Python that has it in MCP_SDK_PYTHON")
    done = subprocess.run([python, "-c", SDK_SESSION, sys.executable, str(MODULE), server.url, server.daemon.settings.home],
                          env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "2025-11-25 12\n2026-07-28 12\n"), done


# =====================================================================================================================
# 14. DESCRIPTIONS - what is derived from the table of operations
# =====================================================================================================================


def test_the_openapi_document_describes_every_route_once(wire):
    told = wire.get("/openapi.json").body
    assert told["openapi"] == "3.1.0" and "success" not in told
    known = {(method, path.replace("...", "")): one for one in port_daddy.OPERATIONS for method, path in one.routes}
    described = {(method.upper(), path): one for path, found in told["paths"].items() for method, one in found.items()}
    assert known.keys() == described.keys()
    assert len({one["operationId"] for one in described.values()}) == len(known)
    for (method, path), one in described.items():
        fields = known[method, path].fields
        body = one.get("requestBody", {"content": {"application/json": {"schema": {"properties": {}}}}})
        in_body = body["content"]["application/json"]["schema"]["properties"]
        named = [each["name"] for each in one["parameters"]] + list(in_body)
        assert sorted(named) == sorted(fields), (method, path)
        in_path = {each["name"] for each in one["parameters"] if each["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path)) and one["summary"] == known[method, path].summary
        assert not (in_body and method in ("GET", "DELETE"))
    streams = {path for (_, path), one in described.items() if "text/event-stream" in one["responses"]["200"]["content"]}
    assert "/events" in streams and "/locks" not in streams


@pytest.mark.skipif(not shutil.which("node"), reason="no node: nothing here reads ECMA 262")
def test_the_patterns_mean_the_same_in_javascript():
    texts = ["", ".", "..", "a", "health", "a:b:c", "a:b:c:d", "a:..", "a/b", "a//b", "a b", "*", "a*", "../x", "a\n",
             "x\ny", "auto", "whsec_a", "whsec_QUJD", "secret-of-mine", "HTTP://Host:80/a?b", "https://u:p@h",
             "http://h/\"", "wss://[::1]/", "running", "1-2", "z" * 65, "z" * 101, "\U0001f600" * 100,
             "30s", "1.5h", "é"]
    kinds = {id(found): found for one in port_daddy.OPERATIONS for field in one.fields.values()
             for found in [field.kind] if isinstance(found, port_daddy.Text) and "pattern" in found.schema()}.values()
    patterns = [kind.schema()["pattern"] for kind in kinds]
    code = ("const [p, t] = JSON.parse(require('fs').readFileSync(0));"
            "console.log(JSON.stringify(p.map(one => t.map(text => new RegExp(one, 'u').test(text)))))")
    done = subprocess.run(["node", "-e", code], input=json.dumps([patterns, texts]), capture_output=True, text=True,
                          timeout=40)
    assert done.returncode == 0, done.stderr
    for kind, found in zip(kinds, json.loads(done.stdout)):
        assert found == [bool(re.fullmatch(kind.pattern, text, re.DOTALL)) for text in texts], kind.pattern
    assert len(patterns) > 10


def page_text(port, path, accept="*/*"):
    """The media type and the text of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Accept": accept})
        reply = connection.getresponse()
        return reply.getheader("Content-Type"), reply.read().decode()


def test_agents_find_every_request_in_llms_txt(server):
    media, text = page_text(server.port, "/llms.txt")
    assert media == "text/plain; charset=utf-8"
    assert all(f"- {method} {path}: " in text for one in port_daddy.OPERATIONS for method, path in one.routes)


def test_prometheus_reads_the_metrics(server, wire, pd):
    pd.claim("a")
    media, text = page_text(server.port, "/metrics", "text/plain;version=0.0.4")
    assert media == "text/plain; version=0.0.4; charset=utf-8" and "\nport_daddy_services 1\n" in text
    assert re.fullmatch(r"(?:# HELP (\w+) [^\n]+\n# TYPE \1 gauge\n\1 [0-9.]+\n)+", text)
    assert wire.get("/metrics").body["services"] == 1
    if shutil.which("promtool"):
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=40)
        assert done.returncode == 0, done


def test_what_the_skill_shows_works(cli):
    text = cli("skill").stdout
    name, description = re.match(r"---\nname: (\S+)\ndescription: ((?:.+\n)+?)---\n", text).groups()
    assert re.fullmatch(r"[a-z0-9-]{1,64}", name) and len(description) <= 1024 and text.count("\n") < 500
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    script = f"set -e\npd() {{ '{sys.executable}' '{MODULE}' \"$@\"; }}\n" + "".join(blocks)
    done = subprocess.run(["sh", "-c", script], env=cli.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "migrating" in done.stdout and '"action"' in done.stdout, done


@pytest.mark.parametrize("typed_so_far, expected", [
    (["with-"], {"with-lock"}), (["agent", "un"], {"unregister"}), (["claim", "--mo"], {"--move"}),
    (["release", "myapp:a"], {"myapp:api"}), (["pub", ""], {"tasks"}), (["unlock", "de"], {"deploy"}),
    (["agent", "show", ""], {"agent-1"})], ids=" ".join)
def test_completion_knows_commands_flags_and_live_names(typed, pd, typed_so_far, expected):
    pd.claim("myapp:api")
    pd.publish("tasks", 1)
    pd.lock("deploy", owner="a")
    pd.register("agent-1")
    assert set(typed("complete", "--", *typed_so_far)[1].split()) == expected


def test_completion_is_silent_without_a_daemon_and_starts_none(fresh):
    done = fresh("complete", "--", "release", "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (fresh.home / "daemon.json").exists()


COMPLETES = {  # what a shell is told to show for `pd release myapp:a`
    "bash": 'COMP_LINE="pd release myapp:a"; COMP_POINT=${#COMP_LINE}; _port_daddy; echo "${COMPREPLY[@]}"',
    "zsh": 'compadd() { print -l -- $found; }; words=(pd release myapp:a); CURRENT=3; _port_daddy',
    "fish": 'complete -C "pd release myapp:a"'}


@pytest.mark.parametrize("shell, shown", [("bash", "api"), ("zsh", "myapp:api"), ("fish", "myapp:api")])
def test_a_shell_completes_the_name_of_a_live_service(cli, pd, shell, shown):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    pd.claim("myapp:api")
    script = "compdef() { :; }\n" if shell == "zsh" else ""
    done = subprocess.run([shell, "-c", script + cli("completion", shell).stdout + COMPLETES[shell]],
                          env=cli.environment, capture_output=True, text=True, timeout=40)
    assert done.stdout.split() == [shown], done


def test_the_file_is_vendored_and_another_version_is_not_overwritten(cli, tmp_path):
    assert cli.json("vendor", tmp_path)["sha256"] == hashlib.sha256(MODULE.read_bytes()).hexdigest()
    copy = tmp_path / "port_daddy.py"
    assert copy.read_bytes() == MODULE.read_bytes() and os.access(copy, os.X_OK)
    copy.write_text("mine")
    assert cli("vendor", tmp_path).returncode == 4 and copy.read_text() == "mine"
    assert cli("vendor", tmp_path, "--force").returncode == 0 and copy.read_bytes() == MODULE.read_bytes()


def test_an_operation_is_one_function_and_appears_on_every_face(tmp_path):
    added = ('@operation("POST /echo/{word}", command="echo")\n'
             'def echo(daemon: Daemon, asker: Asker, word: Word, loud: Bool = False) -> Reply:\n'
             '    """Say it again."""\n    return ok(word=word.upper() if loud else word)\n\n\n')
    place = SOURCE.index("# " + "=" * 118 + "\n# 10. WORKERS")
    (tmp_path / "port_daddy.py").write_text(SOURCE[:place] + added + SOURCE[place:], encoding="utf-8")
    home = environment(PORT_DADDY_HOME=tmp_path / "home", PORT_DADDY_PORT=0)

    def run(*words):
        return subprocess.run([sys.executable, str(tmp_path / "port_daddy.py"), *words], env=home, capture_output=True,
                              text=True, timeout=40).stdout
    try:
        assert json.loads(run("echo", "hello", "--loud", "--json")) == {"success": True, "word": "HELLO"}
        wire = Wire(int(json.loads((tmp_path / "home" / "daemon.json").read_text())["url"].rpartition(":")[2]))
        assert wire.post("/echo/again").body["word"] == "again"
        assert wire.get("/openapi.json").body["paths"]["/echo/{word}"]["post"]["summary"] == "Say it again."
        assert run("complete", "--", "ech").split() == ["echo"]
        assert run("complete", "--", "echo", "--l").split() == ["--loud"]
    finally:
        run("stop")


# =====================================================================================================================
# 15. TOOLS — what a folder tells about itself
# =====================================================================================================================

# What lies in a folder, and the services that one would write for it by hand.
FOLDERS = {
    "a web page by vite, an interface by fastapi, and two databases in compose": (
        {"compose.yaml": "services:\n  postgres:\n    image: postgres:16\n    ports:\n      - \"5432:5432\"\n"
                         "  cache:\n    image: redis\n    ports: [\"127.0.0.1:6380:6379\"]\nvolumes:\n  data:\n",
         "api/requirements.txt": "fastapi==0.110\n", "api/main.py": "from fastapi import FastAPI\napp = FastAPI()\n",
         "web/package.json": '{"scripts": {"dev": "vite"}, "devDependencies": {"vite": "5"}}'},
        {"postgres": {"cmd": "docker compose up postgres", "port": 5432},
         "cache": {"cmd": "docker compose up cache", "port": 6380},
         "api": {"cmd": "uvicorn main:app --reload --port ${PORT}", "cwd": "api", "needs": ["postgres", "cache"]},
         "web": {"cmd": "npm run dev -- --port ${PORT}", "cwd": "web", "needs": ["api"]}}),
    "a program by express that reads PORT": (
        {"package.json": '{"scripts": {"start": "node ."}, "dependencies": {"express": "4"}}', "yarn.lock": ""},
        {"api": {"cmd": "yarn run start", "env": {"PORT": "${PORT}"}}}),
    "next in a workspace of pnpm": (
        {"package.json": '{"private": true}', "pnpm-workspace.yaml": "packages:\n  - 'sites/*'\n", "pnpm-lock.yaml": "",
         "sites/shop/package.json": '{"scripts": {"dev": "next dev"}, "dependencies": {"next": "14"}}'},
        {"shop": {"cmd": "pnpm run dev -p ${PORT}", "cwd": "sites/shop"}}),
    "a procfile": (
        {"Procfile": "web: gunicorn app:app -b :$PORT\nworker: python worker.py\n"},
        {"web": {"cmd": "gunicorn app:app -b :$PORT"}, "worker": {"cmd": "python worker.py", "noPort": True}}),
    "django": ({"requirements.txt": "Django>=5\n", "manage.py": ""},
               {"web": {"cmd": "python manage.py runserver ${PORT}"}}),
    "flask in a package": ({"requirements.txt": "flask\n", "shop/app.py": "from flask import Flask\nsite = Flask('x')\n"},
                           {"api": {"cmd": "flask --app shop.app run --port ${PORT}"}}),
    "a server in go": ({"go.mod": "module x\n", "main.go": "func main() { http.ListenAndServe(addr, nil) }\n"},
                       {"api": {"cmd": "go run .", "env": {"PORT": "${PORT}"}}}),
    "a server in rust": ({"Cargo.toml": '[dependencies]\naxum = "0.7"\n'},
                         {"api": {"cmd": "cargo run", "env": {"PORT": "${PORT}"}}}),
}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("case", FOLDERS)
def test_scan_writes_what_one_would_write_by_hand(tmp_path, case):
    files, services = FOLDERS[case]
    fill(tmp_path / "shop", files)
    found = port_daddy.scan(str(tmp_path / "shop"))
    assert found == {"project": "shop", "services": services} and list(found["services"]) == list(services)


def test_what_scan_writes_is_a_file_that_dev_reads_and_nothing_is_overwritten(tmp_path, spawned):
    def scan(*words):
        return subprocess.run([sys.executable, MODULE, "scan", *words], cwd=tmp_path, env=spawned.environment(),
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)

    empty = scan()
    assert (empty.returncode, empty.stdout) == (3, "") and "recognised" in empty.stderr
    fill(tmp_path, {"Procfile": "web: python3 -m http.server $PORT\n"})
    dry = scan("--dry-run")
    assert dry.returncode == 0 and not (tmp_path / ".portdaddyrc").exists()
    assert scan().returncode == 0 and json.loads((tmp_path / ".portdaddyrc").read_text()) == json.loads(dry.stdout)
    project = port_daddy.load_project(str(tmp_path / ".portdaddyrc"), None)
    assert project.services["web"].mentions_port and project.services["web"].rule == "tcp"
    (tmp_path / ".portdaddyrc").write_text("mine")
    again = scan()
    assert again.returncode == 4 and "--force" in again.stderr and (tmp_path / ".portdaddyrc").read_text() == "mine"
    assert scan("--force").returncode == 0 and (tmp_path / ".portdaddyrc").read_text() != "mine"


# ---- bench ----------------------------------------------------------------------------------------------------------


def those_of(folder):
    """The processes whose environment names a folder: all that a bench has started there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


BENCH_ROWS = """GET /health, 1 connection|GET /health, 16 connections|a new connection|GET /services/{id}|POST /claim
publish|lock, unlock|waiting poll|waiting poll returns: p99|stream has it|stream has it: p99|streams has it|others waiting
unlock until the next|-m port_daddy claim|port_daddy.py claim|-m port_daddy serve|the same, with|claim of a known identity,
claim of a new|messages kept|poll of a worker|lock, unlock: each,|GET /services with|0 channels|heartbeat,
1 connections""".replace("\n", "|").split("|")


def test_bench_has_a_figure_for_everything_that_is_promised_and_leaves_nothing_running(tmp_path):
    done = subprocess.run([sys.executable, MODULE, "bench", "--quick", "--json"], env=environment(TMPDIR=tmp_path),
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert [part for part in BENCH_ROWS if not any(part in name for name in rows)] == []
    assert len(rows) == len(report["rows"]) == len(BENCH_ROWS) + 2 * LINUX  # memory
    assert all(row["figure"] > 0 and row.get("p99", 1) >= row.get("p50", 0) >= 0 for row in rows.values()), rows
    limited = [row for row in rows.values() if row["unit"] == "of the limit"]
    assert len(limited) == 7 and all(row["rate"] > 0 and row["beside"] > 0 for row in limited)
    assert report["machine"]["cores"] == os.cpu_count() and report["quick"]
    (tmp_path / "run.json").write_text(done.stdout)
    shown = subprocess.run([sys.executable, MODULE, "bench", "--markdown", tmp_path / "run.json"], capture_output=True,
                           text=True, timeout=20, check=True).stdout
    assert all(f"| {name} | {row['figure']:.2f} {row['unit']} |" in shown for name, row in rows.items())
    assert report["machine"]["python"] in shown
    assert (those_of(tmp_path) if LINUX else []) == [] and sorted(os.listdir(tmp_path)) == ["run.json"]


@pytest.mark.skipif(not LINUX, reason="it takes /proc to see whose child a process is")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_bench_that_is_killed_leaves_nothing_running(tmp_path, children, number):
    process = children(sys.executable, MODULE, "bench", env=environment(TMPDIR=tmp_path))
    assert "full bar" in read_line(process.stdout) and "poll returns" in read_line(process.stdout)
    assert len(those_of(tmp_path)) >= 4  # itself, its guardian, a daemon and the limit server
    process.send_signal(number)
    process.wait(10)
    eventually(lambda: not those_of(tmp_path), 20)


def checks(told):
    return {one["check"]: one for one in told["checks"]}


def test_doctor_finds_a_well_daemon_well_and_starts_none(fresh, tmp_path):
    before = fresh.json("doctor")
    assert before["success"] and checks(before)["daemon"]["state"] == "warn"
    assert {"python", "state", "daemon", "port", "proxies", "loopback", "clock"} == set(checks(before))
    assert not fresh.home.exists() and fresh("status").returncode == 6
    fresh("start")
    after = checks(fresh.json("doctor"))
    assert after["daemon"]["state"] == after["version"]["state"] == after["state"]["state"] == "ok", after
    lines = fresh("doctor")
    assert lines.returncode == 0 and all(re.match(r"(ok  |warn)  \w+ +\S", line) for line in lines.stdout.splitlines())


def test_doctor_names_whoever_is_in_the_way_and_ends_with_1(fresh, receiver, tmp_path):
    told = fresh("doctor", PORT_DADDY_PORT=str(receiver.port))
    assert told.returncode == 1
    assert re.search(rf"(?m)^fail  port +port {receiver.port} is taken by .*pid {os.getpid()}\); stop that", told.stdout)
    wrong = fresh("doctor", PORT_DADDY_URL=receiver.url)
    assert wrong.returncode == 1 and "not a Port Daddy" in wrong.stdout
    assert fresh("doctor", PORT_DADDY_URL="http://127.0.0.1:1").returncode == 1
    (tmp_path / "file").write_text("")
    blocked = fresh("doctor", PORT_DADDY_HOME=tmp_path / "file" / "home")
    assert blocked.returncode == 1 and "set PORT_DADDY_HOME" in blocked.stdout and "Traceback" not in blocked.stderr


def test_doctor_warns_of_what_will_surprise(fresh, tmp_path):
    fresh.home.mkdir(mode=0o755)
    fresh.home.chmod(0o755)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "port_daddy.py").write_text('__version__ = "0.0.1"\n')
    more = {"PATH": f"{tmp_path / 'old'}:{os.environ['PATH']}", "http_proxy": "http://proxy:3128", "no_proxy": ""}
    told = fresh("doctor", "--json", **more)
    found = checks(json.loads(told.stdout))
    assert told.returncode == 0 and stat.S_IMODE(fresh.home.stat().st_mode) == 0o755
    assert [found[name]["state"] for name in ("state", "copies", "proxies")] == ["warn"] * 3
    assert "0.0.1" in found["copies"]["message"] and "no_proxy" in found["proxies"]["cure"]
    spared = fresh.json("doctor", http_proxy="http://proxy:3128", no_proxy="localhost,127.0.0.1")
    assert checks(spared)["proxies"]["state"] == "ok"


def test_doctor_tells_another_copy_of_the_file(fresh, tmp_path):
    (tmp_path / "port_daddy.py").write_text(SOURCE + "# another\n")
    fresh("start")
    told = subprocess.run([sys.executable, str(tmp_path / "port_daddy.py"), "doctor", "--json"], env=fresh.environment,
                          capture_output=True, text=True, timeout=20)
    assert checks(json.loads(told.stdout))["version"]["state"] == "warn"


AWKWARD = ["/opt/a b/py%th$n", "/home/it's \"q\"/back\\slash/$x/port_daddy.py", "serve"]


@pytest.mark.skipif(not LINUX, reason="systemd is Linux's")
def test_the_unit_starts_this_file_with_the_settings_of_now_and_no_secret(cli, tmp_path):
    config = tmp_path / "config"
    more = {"XDG_CONFIG_HOME": config, "PORT_DADDY_RANGE": "4000-5000", "PORT_DADDY_TOKEN": "hush-hush", "PATH": tmp_path}
    path = config / "systemd" / "user" / "port-daddy.service"
    shown = cli("daemon", "install", **more)
    assert shown.returncode == 0 and not config.exists() and str(path) in shown.stderr
    assert f'ExecStart="{sys.executable}" "{MODULE}" "serve"\n' in shown.stdout
    assert 'Environment="PORT_DADDY_RANGE=4000-5000"\n' in shown.stdout and "hush" not in shown.stdout
    done = cli("daemon", "install", "--yes", **{**more, "PATH": tmp_path / "nothing"})
    assert done.returncode == 1 and path.read_text() == shown.stdout and "run it yourself: systemctl --user" in done.stderr
    (tmp_path / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n')
    (tmp_path / "systemctl").chmod(0o755)
    done = cli("daemon", "install", "--yes", **more)
    assert done.returncode == 0 and "yourself" not in done.stderr
    assert cli("daemon", "uninstall", **more).returncode == 0 and path.exists()
    assert cli("daemon", "uninstall", "--yes", **more).returncode == 0 and not path.exists()
    assert cli("daemon", "uninstall", "--yes", **more).returncode == 0
    assert (tmp_path / "asked").read_text().splitlines() == [
        "--user daemon-reload", "--user enable --now port-daddy.service", "--user disable --now port-daddy.service"]


def test_systemd_reads_the_unit_as_it_was_meant(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    folder = tmp_path / "it's a \"%n\" $x"
    folder.mkdir()
    (tmp_path / "a b%n").mkdir()
    program = tmp_path / "a b%n" / "python$3"  # systemd wants no quotes in the name of the program itself
    program.symlink_to(sys.executable)
    unit = tmp_path / "port-daddy-test.service"
    words = [str(program), str(folder / "x.py"), "serve"]
    unit.write_text(port_daddy.systemd_unit(words, {"PORT_DADDY_HOME": str(folder)}))
    done = subprocess.run(["systemd-analyze", "--user", "verify", "--man=no", str(unit)], capture_output=True, text=True,
                          env=environment(XDG_RUNTIME_DIR=tmp_path), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_words_of_a_unit_are_quoted():
    unit = port_daddy.systemd_unit(AWKWARD, {"PORT_DADDY_HOME": "/a$b %h\n"})
    assert ('ExecStart="/opt/a b/py%%th$n" "/home/it\'s \\"q\\"/back\\\\slash/$$x/port_daddy.py" "serve"\n'
            'Environment="PORT_DADDY_HOME=/a$b %%h\\x0a"\n') in unit


def test_the_plist_says_the_same_to_launchd():
    import plistlib
    path, text, on, off = port_daddy.system_service("darwin", {"PORT_DADDY_PORT": "9", "PORT_DADDY_TOKEN": "hush"}, AWKWARD)
    told = plistlib.loads(text.encode())
    assert told["ProgramArguments"] == AWKWARD and told["EnvironmentVariables"] == {"PORT_DADDY_PORT": "9"}
    assert told["RunAtLoad"] and told["KeepAlive"] == {"SuccessfulExit": False}
    assert path.endswith("/Library/LaunchAgents/port-daddy.plist") and path in on and told["Label"] in off


# =====================================================================================================================
# 16. COMMAND LINE — what people and scripts type
# =====================================================================================================================


def test_quiet_commands_print_the_bare_value(cli, pd):
    port = cli("claim", "myapp:api", "-q")
    assert port.stdout == f"{pd.get_service('myapp:api')['port']}\n" and port.stderr == ""
    assert cli("lock", "deploy", "--owner", "a", "-q").stdout.strip() == str(pd.check_lock("deploy")["token"])


def test_every_listing_speaks_json(cli, pd):
    pd.claim("a")
    for command, field in ((["find"], "services"), (["ps"], "services"), (["services"], "services"),
                           (["locks"], "locks"), (["agents"], "agents"), (["channels"], "channels"),
                           (["webhook", "list"], "webhooks"), (["activity"], "entries"), (["ports"], "ports")):
        told = cli.json(*command)
        assert told["count"] == len(told[field]), command


def test_what_is_wrong_is_named_as_it_is_typed(cli):
    lock = ["lock", "a", "--lock-delay"]
    for words, name in (([*lock, "5"], "lock-delay"), ([*lock, "x"], "lock-delay"),
                        (["webhook", "add", "http://localhost:1/", "--filter-pattern", " "], "filter-pattern")):
        done = cli(*words)
        assert done.returncode == 2 and f"{name} " in done.stderr and '"30s"' not in done.stderr, done


def test_a_command_that_is_none_is_named_as_far_as_it_is_one(cli):
    for words, said in ((["daemon", "frob"], "no command 'daemon frob'; did you mean daemon "),
                        (["daemon", "stap"], "did you mean daemon stop"), (["frob"], "no command 'frob'"),
                        (["clam", "x"], "no command 'clam'; did you mean claim?")):
        done = cli(*words)
        assert done.returncode == 2 and said in done.stderr, done


def test_a_closed_stream_changes_no_status(cli):
    for words, status in (("poll x --timeout 5ms 2>&-", 5), ("find >&-", 0), ("with-lock y --wait 1s -- true 2>&-", 0)):
        done = subprocess.run(["sh", "-c", f'"{sys.executable}" "{MODULE}" {words}'], env=cli.environment, timeout=40,
                              capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr, (words, done)


def test_the_words_of_a_wrapped_command_are_not_ours(cli):
    done = cli("with-lock", "y", "--", "no-such-command", "--json")
    assert done.returncode != 0 and done.stdout == "" and "no-such-command" in done.stderr, done


@pytest.mark.parametrize("status, command", [
    (0, ["find"]), (0, ["release", "nothing:*"]), (2, ["claim", "a b"]), (2, ["nonsense"]), (2, ["claim"]),
    (2, ["lock", "a", "--zorn"]),
    (3, ["url", "no:such"]), (3, ["agent", "show", "nobody"]), (4, ["lock", "held", "--owner", "b"]),
    (4, ["unlock", "held", "--owner", "b"]), (5, ["lock", "held", "--owner", "b", "--wait", "20ms"]),
    (5, ["wait", "no:such", "--timeout", "20ms"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else str(value))
def test_the_exit_status_tells_what_happened(cli, pd, status, command):
    pd.lock("held", owner="a")
    done = cli(*command)
    assert done.returncode == status, done
    assert status == 0 or (done.stderr.strip() and "Traceback" not in done.stderr)
    assert status == 0 or done.stdout == ""


def test_a_poll_in_vain_ends_with_5(cli):
    assert cli("poll", "empty", "--timeout", "20ms").returncode == 5


@pytest.mark.parametrize("given", ["60", "1.5", "0x10"])
def test_a_duration_without_a_unit_is_refused_with_both_readings(cli, pd, given):
    done = cli("lock", "deploy", "--owner", "a", "--ttl", given)
    assert done.returncode == 2 and pd.check_lock("deploy")["held"] is False
    if given == "60":
        assert "60s" in done.stderr and "60ms" in done.stderr


@pytest.mark.parametrize("typed, payload", [
    ('{"a": 1}', {"a": 1}), ("hello world", "hello world"), ("42", 42), ('"42"', "42"), ("null", None), ("NaN", "NaN"),
    ("{half", "{half"), ("", "")])
def test_a_payload_is_json_where_it_parses_and_else_a_string(cli, pd, typed, payload):
    assert cli("pub", "news", typed).returncode == 0
    assert pd.get_messages("news")["messages"][0]["payload"] == payload


def test_a_payload_can_come_from_stdin(cli, pd):
    assert cli("pub", "news", "-", input='{"big": "one"}').returncode == 0
    assert pd.get_messages("news")["messages"][0]["payload"] == {"big": "one"}


def test_a_closed_pipe_is_silent(cli, pd, tmp_path):
    for number in range(400):
        pd.publish(f"channel-with-a-rather-long-name-so-that-the-pipe-is-filled-{number}", "x" * 300)
    done = subprocess.run(
        ["sh", "-c", f'{{ "{sys.executable}" "{MODULE}" channels --json; echo "status $?" >&2; }} | head -c 1'],
        env=cli.environment, capture_output=True, text=True, timeout=40)
    assert re.fullmatch(r"status (0|1|141)\n", done.stderr), done


def test_with_lock_gives_the_status_of_its_command(cli, pd):
    assert cli("with-lock", "deploy", "--", "sh", "-c", "exit 7").returncode == 7
    assert pd.check_lock("deploy")["held"] is False
    assert cli("with-lock", "deploy", "--", "no-such-program-anywhere").returncode in (1, 2, 3, 126, 127)
    assert pd.check_lock("deploy")["held"] is False


def test_with_lock_hands_on_stdin_stdout_and_arguments(cli):
    done = cli("with-lock", "deploy", "--", "sh", "-c", 'cat; echo "$1" >&2', "sh", "a b", input="through\n")
    assert (done.stdout, done.returncode) == ("through\n", 0) and "a b" in done.stderr


def test_a_lock_of_with_lock_dies_with_it(cli, pd):
    process = cli.start("with-lock", "deploy", "--", "sleep", "60")
    eventually(lambda: pd.check_lock("deploy")["held"])
    assert pd.check_lock("deploy")["pid"] == process.pid
    end(process)
    eventually(lambda: not pd.check_lock("deploy")["held"], 5)


def test_a_lock_taken_by_a_short_command_outlives_it(cli, pd):
    assert cli("lock", "deploy").returncode == 0
    settle()
    assert pd.check_lock("deploy")["held"] is True
    assert cli("unlock", "deploy").returncode == 0


def test_ctrl_c_gives_130_and_no_traceback(cli, pd):
    pd.lock("deploy", owner="a")
    waiter = cli.start("lock", "deploy", "--owner", "b", "--wait", "60s")
    watcher = cli.start("sub", "news", "--after", "0")
    pd.publish("news", "hello")
    # Each is seen to be at work first: Python itself has no manners for a Ctrl-C that comes while it starts.
    read_line(watcher.stdout)
    eventually(lambda: pd.check_lock("deploy")["waiting"] == 1)
    for each in (watcher, waiter):
        each.send_signal(signal.SIGINT)
        _, said = each.communicate(timeout=20)
        assert each.returncode == 130 and "Traceback" not in said
    eventually(lambda: pd.check_lock("deploy")["waiting"] == 0)


def test_a_command_starts_the_daemon_it_needs_and_the_next_one_finds_it(fresh):
    assert fresh("status").returncode == 6
    assert not (fresh.home / "daemon.json").exists()
    assert fresh("claim", "myapp:api", "-q").stdout.strip().isdigit()
    told = json.loads((fresh.home / "daemon.json").read_text())
    assert fresh.json("find")["count"] == 1
    assert fresh("status").returncode == 0
    assert PortDaddy(url=told["url"]).health()["pid"] == told["pid"]
    assert fresh("stop").returncode == 0
    assert fresh("status").returncode == 6


def test_start_is_content_with_a_daemon_that_runs(fresh):
    assert fresh("start").returncode == 0
    pid = json.loads((fresh.home / "daemon.json").read_text())["pid"]
    again = fresh("start")
    assert again.returncode == 0 and str(pid) in again.stdout + again.stderr
    assert json.loads((fresh.home / "daemon.json").read_text())["pid"] == pid


def test_a_named_url_on_which_nobody_listens_ends_with_6(fresh):
    done = fresh("find", PORT_DADDY_URL=f"http://127.0.0.1:{unused_port()}")
    assert done.returncode == 6 and done.stdout == "" and "Traceback" not in done.stderr


def test_main_is_a_function_that_returns_the_status(server, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PORT_DADDY_URL", server.url)
    monkeypatch.setenv("PORT_DADDY_HOME", str(tmp_path / "elsewhere"))
    assert port_daddy.main(["claim", "a", "-q"]) == 0
    assert capsys.readouterr().out.strip().isdigit()
    assert port_daddy.main(["url", "no:such"]) == 3


def test_the_version_is_told(cli):
    assert port_daddy.__version__ in cli("version").stdout
    assert port_daddy.__version__ in cli("--version").stdout


def test_help_names_the_commands(cli):
    done = cli("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("claim", "lock", "pub", "serve", "with-lock"))
    assert "--ttl" in cli("lock", "--help").stdout


def test_what_others_wrote_cannot_steer_the_terminal(cli, pd):
    pd.claim("a", cmd="\x1b]0;owned\x07\u202e\x9b2J")
    pd.publish("news", "\x1b[2J\u202e")
    for command in (["find"], ["channels"], ["activity"]):
        shown = cli(*command).stdout
        assert not set(shown) & set("\x1b\x07\x9b\u202e"), command


@pytest.mark.parametrize("payload, given", [
    ({"a": [1, "é"]}, '{"a":[1,"é"]}'), ("plain\ntext", "plain\ntext"), (None, "null"), ("", "")])
def test_work_gives_the_payload_on_stdin_and_what_it_is_in_the_environment(cli, pd, wire, payload, given):
    sent = pd.publish("tasks", payload)["id"]
    script = 'cat; echo "|$PORT_DADDY_MESSAGE_ID $PORT_DADDY_CHANNEL $PORT_DADDY_ATTEMPT"'
    done = cli("work", "tasks", "--once", "--", "sh", "-c", script)
    assert done.returncode == 0, done
    stdin, facts_of_it = done.stdout.split("|")
    assert facts_of_it == f"{sent} tasks 1\n"
    assert stdin == given or json.loads(stdin) == payload and payload is not None
    assert groups(wire) == {"default": (0, 0, 0)}


def test_the_status_of_the_command_decides(cli, pd, wire):
    pd.publish("tasks", 1)
    words = ("work", "tasks", "--group", "team", "--max-attempts", "2", "--once", "--")
    assert cli(*words, "sh", "-c", "exit 7").returncode == 7
    assert groups(wire) == {"team": (1, 0, 0)}
    done = cli(*words, "sh", "-c", 'test "$PORT_DADDY_ATTEMPT" = 2 && kill -9 $$')
    assert done.returncode == 137 and "Traceback" not in done.stderr
    assert groups(wire) == {"team": (0, 0, 1)}
    assert pd.list_dead("tasks")["messages"][0]["error"] == "exit status 137"
    assert cli("redrive", "tasks", "-q").stdout == "1\n"
    assert cli(*words, "true").returncode == 0 and groups(wire) == {"team": (0, 0, 0)}


def test_work_ends_when_there_is_nothing_to_do_if_it_was_told_to(cli, pd, wire):
    for number in range(3):
        pd.publish("tasks", number)
    done = cli("work", "tasks", "--idle", "50ms", "--max-attempts", "1", "--", "sh", "-c", 'grep -v 1; echo done')
    assert done.returncode == 0 and done.stdout == "0\ndone\ndone\n2\ndone\n"
    assert cli("work", "tasks", "--once", "--idle", "20ms", "--", "true").returncode == 5
    assert groups(wire) == {"default": (0, 0, 0)}


@pytest.mark.parametrize("words, status", [
    (["work", "tasks", "--once"], 2), (["work", "--", "true"], 2), (["work", "a b", "--", "true"], 2),
    (["work", "tasks", "--lease", "30", "--", "true"], 2), (["work", "build:*", "--", "true"], 2),
    (["work", "tasks", "--max-attempts", "0", "--", "true"], 2),
    (["work", "tasks", "--once", "--", "no-such-program-anywhere"], 127)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value))
def test_work_that_cannot_be_done_says_why_and_takes_nothing(typed, pd, wire, words, status):
    pd.publish("tasks", 1)
    told = typed(*words)
    assert told[:2] == (status, "") and told[2] and "Traceback" not in told[2]
    assert groups(wire).get("default", (1, 0, 0)) == (1, 0, 0)


def started_worker(cli, *options):
    """`pd work` at work: the process, and the pid of its command."""
    process = cli.start("work", "tasks", *options, "--", "sh", "-c", "echo $$; exec sleep 60")
    return process, int(read_line(process.stdout))


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with contextlib.suppress(OSError):  # a zombie that nobody reaps in this container has gone, too
        with open(f"/proc/{pid}/stat") as stat_file:
            return stat_file.read().rpartition(")")[2].split()[0] == "Z"
    return False


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_stops_a_worker_stops_its_command_and_gives_the_task_back(cli, pd, wire, number, status):
    pd.publish("tasks", 1)
    process, command = started_worker(cli, "--delay", "0s")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does it
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == status and "Traceback" not in said
    assert gone(command) and groups(wire) == {"default": (1, 0, 0)}
    assert take(wire)["attempt"] == 2


def test_an_idle_worker_ends_with_130_too(cli, pd, wire):
    process = cli.start("work", "tasks", "--", "cat")
    pd.publish("tasks", "first\n")
    assert read_line(process.stdout) == "first\n"
    eventually(lambda: groups(wire) == {"default": (0, 0, 0)} and wire.get("/metrics")["waiters"])
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in said


@pytest.mark.skipif(not LINUX, reason="only Linux tells a child that its parent was killed")
def test_the_command_of_a_worker_that_was_killed_ends_and_its_task_is_anothers(cli, pd, wire):
    pd.publish("tasks", 1)
    process, command = started_worker(cli, "--lease", "400ms")
    process.kill()
    eventually(lambda: gone(command))
    assert take(wire, timeout=10_000)["attempt"] == 2


def test_a_worker_whose_task_is_lost_stops_the_command_and_goes_on(cli, pd):
    pd.publish("tasks", 1)
    process, command = started_worker(cli, "--lease", "200ms")
    pd.remove_group("tasks", "default")
    pd.clear_channel("tasks")
    eventually(lambda: gone(command))
    pd.publish("tasks", 2)
    assert int(read_line(process.stdout)) != command


def test_watch_runs_a_command_for_each_message_and_goes_on_after_failures(cli, pd):
    ids = [pd.publish(channel, payload)["id"] for channel, payload in (("build:a", {"n": 1}), ("build:b", "text"))]
    command = 'cat; echo " $PORT_DADDY_MESSAGE_ID $PORT_DADDY_CHANNEL"; exit 3'
    process = cli.start("watch", "build:*", "--exec", command, "--after", "0")
    assert read_line(process.stdout) == f'{{"n":1}} {ids[0]} build:a\n'
    assert read_line(process.stdout) == f"text {ids[1]} build:b\n"
    sent = pd.publish("build:c", 0)["id"]
    assert read_line(process.stdout) == f"0 {sent} build:c\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in said


def test_groups_and_dead_letters_are_shown_and_redriven(typed, pd, wire):
    ids = [pd.publish("tasks", number)["id"] for number in range(2)]
    for _ in ids:
        give(wire, "nack", take(wire, maxAttempts=1), error="\x1b[31mred")
    shown = json.loads(typed("groups", "tasks", "--json")[1])["groups"]
    assert [(each["group"], each["dead"]) for each in shown] == [("default", 2)]
    status, dead, _ = typed("dead", "tasks")
    assert status == 0 and str(ids[1]) in dead and "red" in dead and "\x1b" not in dead
    assert json.loads(typed("redrive", "tasks", "--id", ids[0], "--json")[1])["redriven"] == 1
    assert json.loads(typed("dead", "tasks", "--json")[1])["count"] == 1
    assert typed("groups", "rm", "tasks", "default")[0] == 0 and groups(wire) == {}


def test_a_lease_is_taken_touched_given_back_and_acknowledged_from_the_shell(typed, pd, wire):
    pd.publish("tasks", 1)
    poll = ("poll", "tasks", "--lease", "30s", "--timeout", "20ms", "--json")
    first = json.loads(typed(*poll)[1])
    assert typed("touch", "tasks", first["receipt"], "--lease", "1m")[0] == 0
    assert typed("nack", "tasks", first["receipt"], "--error", "no compiler")[0] == 0
    assert typed("ack", "tasks", first["receipt"])[0] == 4  # it is stale by now
    second = json.loads(typed(*poll)[1])
    assert second["attempt"] == 2 and typed("ack", "tasks", second["receipt"])[0] == 0
    assert groups(wire) == {"default": (0, 0, 0)} and typed(*poll)[0] == 5


def test_a_delivery_is_replayed_from_the_shell(typed, pd, receiver):
    hook = pd.add_webhook(receiver.url, events=["service.claim"])["id"]
    pd.claim("a")
    delivery = eventually(lambda: receiver.got)[0].headers["webhook-id"]
    assert typed("webhook", "replay", hook, delivery)[0] == 0
    eventually(lambda: len(receiver.got) == 2)
    assert typed("webhook", "replay", hook, "dlv_0_1")[0] == 3


def test_limits_and_delays_of_locks_are_typed_with_their_names(typed, clock, pd):
    for _ in range(2):
        assert typed("lock", "gpu", "--owner", "a", "--limit", 2, "--lock-delay", "5s", "--ttl", "10s")[0] == 0
    assert pd.check_lock("gpu")["limit"] == 2
    assert typed("lock", "gpu", "--owner", "a", "--limit", 2)[0] == 4
    status, _, said = typed("lock", "gpu", "--owner", "a")
    assert status == 4 and "limit 2" in said
    assert typed("unlock", "gpu", "--owner", "a")[0] == 2
    clock.advance(10_000)
    assert pd.check_lock("gpu")["held"] is False and typed("lock", "gpu", "--owner", "a", "--wait", "20ms")[0] == 5
    clock.advance(5_000)
    assert typed("lock", "gpu", "--owner", "a")[0] == 0 and typed("unlock", "gpu", "--force")[0] == 0


# =====================================================================================================================
# 17. DASHBOARD — the page, in a real browser
# =====================================================================================================================

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """A headless browser at the other end of two pipes (DevTools protocol: JSON objects with NUL between them)."""

    def __init__(self, profile):
        ours, theirs = os.pipe(), os.pipe()  # to the browser, which reads 3, and from it, which writes 4
        self.reader, self.writer, self.waiting, self.tabs, self.numbers = theirs[0], ours[1], {}, {}, itertools.count(1)
        code = ("import fcntl, os, sys; ends = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]]; "
                "os.dup2(ends[0], 3); os.dup2(ends[1], 4); os.execv(sys.argv[3], sys.argv[3:])")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(ours[0]), str(theirs[1]), CHROMIUM, "--headless", "--no-sandbox",
             "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", "--disable-dev-shm-usage", "--remote-debugging-pipe",
             f"--user-data-dir={profile}"], pass_fds=(ours[0], theirs[1]), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment(HOME=profile))
        os.close(ours[0])
        os.close(theirs[1])
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        with os.fdopen(self.reader, "rb") as file:
            rest = b""
            while chunk := file.read1(65536):
                *whole, rest = (rest + chunk).split(b"\0")
                for said in map(json.loads, whole):
                    if "id" in said:
                        self.waiting.pop(said["id"]).set_result(said)
                    elif said.get("sessionId") in self.tabs:
                        self.tabs[said["sessionId"]].hear(said["method"], said["params"])

    def call(self, method, session=None, **params):
        number, answer = next(self.numbers), concurrent.futures.Future()
        self.waiting[number] = answer
        said = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self.writer, json.dumps(said).encode() + b"\0")
        said = answer.result(30)
        assert "error" not in said, (method, said["error"])
        return said["result"]

    def close(self):
        end(self.process)
        os.close(self.writer)


class Tab:
    """One page, and everything that went wrong on it: what its console said, what its policy forbade, whom it asked."""

    def __init__(self, browser, url, width=1440, height=900, scheme="light"):
        self.browser, self.trouble, self.asked = browser, [], []
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        browser.tabs[self.session] = self
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")
        self.look(width, height, scheme)
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def hear(self, method, params):
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Audits.issueAdded"):
            self.trouble.append(params)

    def look(self, width, height=900, scheme="light"):
        """As on a screen of this size, in this scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def run(self, script):
        """The value of a JavaScript expression."""
        said = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, (script, said)
        return said["result"].get("value")

    def text(self, selector="body"):
        """What people see of an element."""
        one = f"document.querySelector({json.dumps(selector)})"
        return self.run(f"{one}?.checkVisibility() ? {one}.innerText : ''")

    def shows(self, selector, *words):
        eventually(lambda: all(word in self.text(selector) for word in words))

    def press(self, key):
        code, text = {"Tab": (9, None), "Enter": (13, "\r"), "Escape": (27, None)}.get(key) or (ord(key.upper()), key)
        common = {"key": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def tab_to(self, label):
        """Press Tab until the focus is on what has this name."""
        for _ in range(60):
            names = self.run("(one => [one.ariaLabel, one.textContent, one.id, one.name])(document.activeElement)")
            if any((name or "").startswith(label) for name in names):
                return
            self.press("Tab")
        raise AssertionError(f"the Tab key does not lead to {label}")

    def picture(self, path):
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=False)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    browser = Chromium(str(tmp_path_factory.mktemp("chromium")))
    yield browser
    browser.close()


@pytest.fixture
def visit(browser):
    """Pages that are open until the test ends; nothing may have gone wrong on them, and nobody else may have been asked."""
    tabs = []

    def open_tab(port, **options):
        tabs.append((Tab(browser, f"http://localhost:{port}/", **options), port))
        return tabs[-1][0]

    yield open_tab
    for tab, port in tabs:
        tab.close()
        assert tab.trouble == []
        assert {url.split("/")[2] for url in tab.asked if not url.startswith("data:")} == {f"localhost:{port}"}


MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture
def busy(server, wire, receiver):
    """A daemon with something of everything, and markup wherever people may write what they like."""
    wire.post("/agents", {"id": "builder-1", "name": MARKUP, "type": "claude", "ttl": "10m"})
    port = wire.post("/claim", {"id": "myapp:api:main", "agent": "builder-1", "pid": os.getpid()})["port"]
    wire.post("/claim", {"id": "myapp:web:main"})
    wire.put("/services/myapp:web:main", {"status": "unhealthy", "error": f"no answer {MARKUP}", "checkedBy": "builder-1"})
    wire.post("/services/myapp:api:main/logs", {"lines": [{"text": f"\x1b[31mbroken\x1b[0m {MARKUP}", "stream": "stderr"}]})
    wire.post("/locks/deploy/production", {"owner": "builder-1", "ttl": "10s"})
    wire.post("/msg/tasks", {"payload": {"build": MARKUP}, "sender": "builder-1"})
    task = wire.get("/msg/tasks/poll?group=builders&lease=30s&maxAttempts=1")
    wire.post("/msg/tasks/nack", {"group": "builders", "receipt": task["receipt"], "error": f"no compiler {MARKUP}"})
    hook = wire.post("/webhooks", {"url": receiver.url + "/hook", "events": ["lock.*"]})["id"]
    wire.post(f"/webhooks/{hook}/test")
    eventually(lambda: wire.get(f"/webhooks/{hook}/deliveries")["deliveries"][0]["status"] == "delivered")
    return port


def test_the_page_is_the_same_bytes_everywhere_and_only_its_own_script_may_run(make_server):
    pages = [Wire(make_server().port).get("/", headers={"Accept": "text/html,*/*;q=0.8"}) for _ in range(2)]
    assert pages[0].body == pages[1].body and pages[0].status == 200
    assert pages[0].headers["content-type"] == "text/html; charset=utf-8"
    text = pages[0].body.decode()
    said = {tag: re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", text, re.DOTALL) for tag in ("script", "style")}
    hashes = {tag: ["'sha256-" + base64.b64encode(hashlib.sha256(found.encode()).digest()).decode() + "'" for found in each]
              for tag, each in said.items()}
    policy = dict(rule.split(" ", 1) for rule in pages[0].headers["content-security-policy"].split("; "))
    assert policy == {"default-src": "'none'", "script-src": hashes["script"][0], "style-src": hashes["style"][0],
                      "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
                      "frame-ancestors": "'none'"}
    assert [len(each) for each in said.values()] == [1, 1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|srcdoc|DOMParser|"
                         r"createContextualFragment|setHTML|javascript:|\s(?:on\w+|style)=", text)
    assert set(re.findall(r"https?://[\w.:]+", text)) == {"http://www.w3.org", "http://localhost:8080"}  # neither is asked


def test_whoever_is_no_browser_gets_a_text_and_its_lines_work(server, wire, curl):
    page = wire.get("/", headers={"Accept": "*/*"})
    assert page.headers["content-type"] == "text/plain; charset=utf-8"
    lines = re.findall(r"curl .*", page.body.decode())
    replies = curl("\n".join(lines).replace("127.0.0.1", "localhost"))
    assert [reply["success"] for reply in replies] == [True] * 5
    assert replies[-1]["message"]["payload"] == "build"


def test_the_page_shows_what_there_is_and_follows_what_happens(server, wire, busy, visit):
    tab = visit(server.port)
    tab.shows("#state", "live")
    tab.shows("#services", "myapp:api:main", "builder-1", str(busy), str(os.getpid()), "local")
    tab.shows("#services", "myapp:web:main", "unhealthy", "no answer")
    tab.shows("#locks", "deploy/production", "builder-1", "token 1", "s left")
    tab.shows("#queues", "tasks", "builders")
    tab.shows("#dead", "no compiler", "builders")
    tab.shows("#agents", "builder-1", "alive", "deploy/production")
    tab.shows("#webhooks", "/hook", "active", "lock.*")
    tab.shows("#events", "service.claim", "message.dead")
    bar = "Number(document.querySelector('#locks .bar').style.getPropertyValue('--left'))"
    was = eventually(lambda: tab.run(bar))
    eventually(lambda: 0 < tab.run(bar) < was)
    tab.run("clearInterval(slow); window.loaded = 'once'")
    wire.post("/claim", {"id": "later:on"})
    wire.delete("/locks/deploy/production", {"force": True})
    wire.post("/msg/news", {"payload": "extra"})
    tab.shows("#services", "later:on")
    tab.shows("#locks", "No lock is held", "pd with-lock")
    tab.shows("#channels", "news")
    tab.shows("#events", "later:on", "lock.release", "message.publish")
    assert tab.run("window.loaded") == "once"
    tab.run("$('filter').value = 'web'; Object.values(LISTS).forEach(one => show(one))")
    assert "myapp:web:main" in tab.text("#services") and "later:on" not in tab.text("#services")


def test_what_people_wrote_is_never_markup(server, busy, visit):
    tab = visit(server.port)
    for list_, words in (("#services", "no answer "), ("#dead", "no compiler "), ("#dead", '{"build":"'), ("#agents", "")):
        tab.shows(list_, words + MARKUP)
    for button, words in (("Log myapp:api:main", "broken "), ("Messages of tasks", '{"build":"')):
        tab.run(f"document.querySelector('[aria-label=\"{button}\"]').click()")
        tab.shows("#view", words + MARKUP)
        tab.press("Escape")
    assert tab.run("document.querySelectorAll('img, main script, dialog script').length") == 0


def test_every_action_asks_first_and_is_done_by_keyboard(server, wire, busy, visit, receiver):
    tab = visit(server.port)
    tab.shows("#webhooks", "/hook")
    sent = len(receiver.got)

    def act(button, consequence, sure=True):
        tab.tab_to(button)
        tab.press("Enter")
        tab.shows("#ask", consequence)
        if sure:
            tab.tab_to("yes")
        tab.press("Enter")  # the first focus is on Cancel
        eventually(lambda: not tab.run("document.querySelector('#ask').open"))

    tab.press("/")
    for letter in "main":
        tab.press(letter)
    assert tab.run("[document.activeElement.id, document.activeElement.value]") == ["filter", "main"]
    act("Release myapp:api:main", f"Its port {busy}", sure=False)
    assert wire.get("/services")["count"] == 2
    act("Release myapp:api:main", f"Its port {busy}")
    assert [one["id"] for one in wire.get("/services")["services"]] == ["myapp:web:main"]
    tab.shows("#said", "released 1 service")
    tab.run("$('filter').value = ''; Object.values(LISTS).forEach(one => show(one))")
    act("Force unlock deploy/production", "builder-1 is not asked")
    assert wire.get("/locks")["count"] == 0
    act("Redrive", "The group builders gets it again")
    assert wire.get("/msg/tasks/groups")["groups"][0]["dead"] == 0
    tab.tab_to("Deliveries to")
    tab.press("Enter")
    tab.shows("#view", "webhook.test", "delivered")
    act("Replay webhook.test", "once more")
    eventually(lambda: receiver.types()[sent:].count("webhook.test") == 1)
    tab.press("Escape")
    tab.tab_to("Messages of tasks")
    tab.press("Enter")
    tab.shows("#view", "Publish JSON")
    tab.tab_to("payload")
    tab.run("document.querySelector('[name=payload]').value = '{\"n\": 1}'")
    tab.press("Tab")
    tab.press("Enter")
    eventually(lambda: wire.get("/msg/tasks")["messages"][-1]["payload"] == {"n": 1})


def test_a_lock_that_has_moved_on_is_not_taken_from_its_next_holder(server, wire, visit):
    first = wire.post("/locks/deploy", {"owner": "first"})
    tab = visit(server.port)
    tab.shows("#locks", "first")
    tab.run("document.querySelector('[aria-label=\"Force unlock deploy\"]').click()")
    wire.delete("/locks/deploy", {"token": first["token"]})
    wire.post("/locks/deploy", {"owner": "second"})
    tab.run("document.querySelector('#yes').click()")
    tab.shows("#refused", "is no longer one of lock deploy")
    assert wire.get("/locks/deploy")["owner"] == "second"
    tab.trouble = [one for one in tab.trouble if "409" not in str(one)]  # which the browser notes on its console


def test_nothing_is_wider_than_a_phone_and_both_schemes_are_looked_after(server, wire, busy, visit):
    wire.post("/claim", {"id": ":".join(["a-name-without-any-end-" * 2] * 3)[:140]})
    wire.post("/msg/tasks", {"payload": "x" * 5000})
    tab = visit(server.port)
    tab.shows("#webhooks", "/hook")
    backs = set()
    for width in (380, 1440):
        for scheme in ("light", "dark"):
            tab.look(width, 800, scheme)
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), (width, scheme)
            backs.add(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert len(backs) == 2
    tab.look(380, 800)
    tab.run("document.querySelector('[aria-label=\"Messages of tasks\"]').click()")
    tab.shows("#view", "xxx")
    assert tab.run("[document.documentElement, $('view')].every(one => one.scrollWidth <= innerWidth)")


def test_a_thousand_services_stay_usable(server, wire, visit):
    with server.daemon.write() as tx:
        for number in range(1000):
            port_daddy.insert(tx, "SERVICES", id=f"crowd:service-{number:04}", port=10_000 + number, created=1, seen=1,
                              endpoints="{}", born=1, status="assigned")
    tab = visit(server.port)
    tab.shows("#services h2", "1000")
    tab.run("document.querySelector('#services tbody').firstChild.mark = 'kept'")
    wire.post("/claim", {"id": "another"})
    tab.shows("#services h2", "1001")
    assert tab.run("document.querySelector('#services tbody').children[1].mark") == "kept"
    took = tab.run("(began => { $('filter').value = 'service-0777'; Object.values(LISTS).forEach(one => show(one)); "
                   "return performance.now() - began; })(performance.now())")
    assert tab.run("LISTS.services.body.children.length") == 1 and took < 1_000


def test_the_page_outlives_its_daemon_and_goes_on_where_it_was(spawn, visit):
    daemon = spawn().start()
    tab = visit(daemon.port)
    tab.shows("#state", "live")
    tab.shows("#events", "daemon.start")
    daemon.kill()
    tab.shows("#state", "trying again")
    daemon.start()
    daemon.wire.post("/claim", {"id": "after:that"})
    tab.shows("#state", "live")
    tab.shows("#services", "after:that")
    eventually(lambda: tab.text("#events tbody").count("daemon.start") == 2)  # that of before, and the one it missed
    tab.trouble = [one for one in tab.trouble if "ERR_" not in str(one)]  # refused connections


def test_the_page_asks_for_the_token_and_sends_it(make_server, visit):
    tab = visit(make_server(PORT_DADDY_TOKEN="open-sesame").port)
    for word, said in (("wrong", "wants its token"), ("open-sesame", "That is not the token")):
        tab.shows("#locked", said)
        for letter in word:
            tab.press(letter)
        tab.press("Enter")
    tab.shows("#state", "live")
    assert not tab.run("document.querySelector('#locked').open")
    assert tab.run("sessionStorage.getItem('token')") == "open-sesame"
    tab.trouble = [one for one in tab.trouble if "401" not in str(one)]


# =====================================================================================================================
# PROPERTIES — the same promises under dice
# =====================================================================================================================


def test_random_locks_behave_like_a_dictionary(clock, wire, dice):
    """Take, extend, release and let time pass, five hundred times, beside a model of ten lines."""
    held, highest, seen = {}, 0, {}
    for step in range(500):
        name, owner = dice.choice("xyz"), dice.choice("abc")
        for each in [each for each, (_, _, until) in held.items() if until <= clock.awake]:
            del held[each]
        token = dice.choice([None, *seen.get(name, [])])
        what = dice.choice(["take", "take", "extend", "release", "pass", "look"])
        if what == "take":
            ttl = dice.choice([100, 1000, 5000])
            answer = wire.post(f"/locks/{name}", {"owner": owner, "ttl": ttl})
            assert answer.status == (409 if name in held else 200), (step, answer)
            if answer.status == 200:
                assert answer["token"] > highest
                highest = answer["token"]
                held[name] = (owner, highest, clock.awake + ttl)
                seen.setdefault(name, []).append(highest)
        elif what == "extend":
            who = {"owner": owner} if token is None else {"token": token}
            mine = name in held and (held[name][0] == owner if token is None else held[name][1] == token)
            answer = wire.put(f"/locks/{name}", {**who, "ttl": 2000})
            assert (answer.status == 200) == mine, (step, answer)
            if mine:
                held[name] = (*held[name][:2], clock.awake + 2000)
        elif what == "release":
            who = {"owner": owner} if token is None else {"token": token}
            mine = name in held and (held[name][0] == owner if token is None else held[name][1] == token)
            answer = wire.delete(f"/locks/{name}", who)
            assert (answer.status == 200 and answer["released"]) == mine, (step, answer)
            if mine:
                del held[name]
        elif what == "pass":
            clock.advance(dice.choice([1, 99, 100, 500, 5000]))
        else:
            shown = wire.get(f"/locks/{name}")
            assert shown["held"] == (name in held) and (name not in held or shown["token"] == held[name][1]), step


def test_random_claims_of_many_threads_never_share_a_port(server, dice, children):
    block = free_port_block(40)
    foreign = [block + dice.randrange(40) for _ in range(4)]
    with contextlib.ExitStack() as sitting:
        for port in set(foreign):
            sitter = sitting.enter_context(socket.socket())
            sitter.bind(("127.0.0.1", port))

        def work(number, seed):
            pd, own = PortDaddy(url=server.url), random.Random(seed)
            for _ in range(15):
                name = f"svc-{own.randrange(30)}"
                if own.random() < 0.25:
                    pd.release(name)
                wanted = {"port": block + own.randrange(40)} if own.random() < 0.3 else {}
                with contextlib.suppress(PortDaddyError):
                    assert pd.claim(name, range=[block, block + 39], **wanted)["port"] not in foreign

        for each in [in_background(work, number, dice.random()) for number in range(8)]:
            each.result(60)
        services = Wire(server.port).get("/services")["services"]
        ports = [service["port"] for service in services]
        assert len(ports) == len(set(ports)) and not set(ports) & set(foreign)


def test_random_patterns_match_as_promised(pd, dice):
    def segment():
        return "".join(dice.choice("ab.-") for _ in range(dice.randint(1, 3)))

    names = sorted({":".join(segment() for _ in range(dice.randint(1, 3))) for _ in range(40)})
    names = [name for name in names if not any(part in (".", "..") for part in name.split(":"))]
    for name in names:
        pd.claim(name)
    for _ in range(60):
        pattern = "".join(dice.choice(["a", "b", ".", "-", ":", "*", "*"]) for _ in range(dice.randint(1, 5)))
        try:
            found = [service["id"] for service in pd.list_services(pattern=pattern)["services"]]
        except PortDaddyError as refused:  # what can be no identity, star or not, may be refused
            assert refused.code == "BAD_VALUE"
            continue
        rule = re.compile("".join(".*" if each == "*" else re.escape(each) for each in pattern))
        assert sorted(found) == [name for name in names if rule.fullmatch(name)], pattern


def test_random_readers_that_come_and_go_see_every_message_once(server, pd, dice):
    published, done = {"a": [], "b": []}, threading.Event()

    def publish(seed):
        own, writer = random.Random(seed), PortDaddy(url=server.url)
        for number in range(150):
            channel = own.choice("ab")
            published[channel].append(writer.publish(channel, number)["id"])
        writer.publish("a", "end")
        writer.publish("b", "end")
        done.set()

    def read(channel, seed):
        own, got, last = random.Random(seed), [], 0
        while True:
            stream = Stream(server.port, f"/msg/{channel}/subscribe?after={last}")
            for _ in range(own.randint(1, 20)):
                event = stream.messages(1)[0]
                if event.data["payload"] == "end":
                    stream.close()
                    return got
                got.append(event.id)
                last = event.id
            stream.close()

    readers = [(channel, in_background(read, channel, dice.random())) for channel in "aabb"]
    publish(dice.random())
    for channel, reader in readers:
        assert reader.result(60) == published[channel]


def test_random_damage_to_a_request_never_runs_the_next_one(server, wire, dice):
    """Bytes changed, dropped and doubled in a request that asks to be the last one; behind it lies another."""
    good = request_bytes("POST", "/msg/a", b'{"payload":[1,"two",null]}', Connection="close")
    edge = good.index(b"Connection")  # whether it is the last one is not for the dice to say
    for _ in range(250):
        damaged = bytearray(good)
        for _ in range(dice.randint(1, 3)):
            place = dice.choice([*range(edge), *range(edge + 19, len(good))])
            what = dice.choice(["change", "drop", "double"])
            if what == "change":
                damaged[place:place + 1] = bytes([dice.choice([0, 9, 10, 13, 32, 58, 127, 255, dice.randrange(256)])])
            elif what == "double" or b"\n" not in damaged[place:place + 1]:
                damaged[place:place + 1] = damaged[place:place + 1] * (2 if what == "double" else 0)
            if b"Connection: close" not in damaged:
                damaged = bytearray(good)
        line = Line(server.port)
        line.send(bytes(damaged) + CANARY)
        with contextlib.suppress(OSError):
            line.socket.shutdown(socket.SHUT_WR)
        replies = line.rest()
        line.close()
        assert not replies or re.match(rb"HTTP/1\.1 (200|4\d\d|501) ", replies), (bytes(damaged), replies)
        assert len(re.findall(rb"^HTTP/1\.1 ", replies, re.MULTILINE)) <= 1, (bytes(damaged), replies)
    assert "canary" not in [channel["channel"] for channel in wire.get("/channels")["channels"]]
    assert wire.get("/health").status == 200


def test_random_json_in_random_operations_is_never_our_fault(wire, dice):
    scraps = [None, True, 0, -1, 2 ** 63, 1e308, "", "a", "a:b", "*", "\0", "\u202e", "x" * 300, [], [1, 2], {},
              {"a": 1}, "1h"]
    for _ in range(400):
        operation = dice.choice(port_daddy.OPERATIONS)
        if operation.name in ("poll", "wait_for_service", "wait_for_services", "lock"):
            changed = {name: dice.choice(scraps) for name in operation.fields if dice.random() < 0.5}
            changed.update({name: 1 for name in ("timeout", "wait") if name in operation.fields})
        else:
            changed = {name: dice.choice(scraps) for name in operation.fields if dice.random() < 0.5}
        method, path, body = request_with(operation, changed)
        answer = wire(method, path, body)
        assert answer.status < 500, (method, path, body, answer)


# =====================================================================================================================
# FAULTS — SIGTERM, two daemons, strangers
# =====================================================================================================================


def test_sigterm_answers_those_who_wait_and_ends_with_0(spawned):
    wire = spawned.wire
    wire.post("/locks/deploy", {"owner": "a"})
    waits = [in_background(wire.get, "/msg/tasks/poll?timeout=60000"),
             in_background(wire.post, "/locks/deploy", {"owner": "b", "wait": 60_000}),
             in_background(wire.get, "/wait/no:such?timeout=60000")]
    stream = Stream(spawned.port, "/msg/tasks/subscribe")
    assert stream.next().kind == "connected"
    eventually(lambda: wire.get("/locks/deploy")["waiting"] == 1)
    began = time.monotonic()
    assert spawned.terminate() == 0
    assert time.monotonic() - began < 6
    for wait in waits:
        answer = wait.result(10)
        assert (answer.status, answer["code"]) == (503, "SHUTTING_DOWN")
    stream.close()
    assert spawned.process.stdout.read() == ""  # one line on stdout, and it was read at the start
    spawned.start()
    assert spawned.wire.get("/locks/deploy")["owner"] == "a"
    stopped = spawned.wire.get("/activity?type=daemon.stop")["entries"]
    assert len(stopped) == 1


def test_a_second_daemon_in_the_same_folder_is_refused_by_name(spawned):
    done = subprocess.run([*PROGRAM, "serve"], env=spawned.environment(PORT_DADDY_PORT=0),
                          capture_output=True, text=True, timeout=30)
    assert done.returncode == 4 and done.stdout == ""
    assert str(spawned.process.pid) in done.stderr and spawned.url in done.stderr
    assert spawned.wire.get("/health").status == 200


def test_a_port_that_a_stranger_has_is_named(tmp_path):
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        done = subprocess.run(
            [*PROGRAM, "serve"], capture_output=True, text=True, timeout=30,
            env=environment(PORT_DADDY_HOME=tmp_path / "home", PORT_DADDY_PORT=port))
    assert done.returncode not in (0, 2) and str(port) in done.stderr and "Traceback" not in done.stderr
    assert str(os.getpid()) in done.stderr


def test_a_killed_daemon_leaves_nothing_that_stops_the_next(spawned):
    stale = json.loads((spawned.home / "daemon.json").read_text())
    spawned.kill()
    assert (spawned.home / "daemon.json").exists()
    spawned.start()
    told = json.loads((spawned.home / "daemon.json").read_text())
    assert told["pid"] == spawned.process.pid != stale["pid"] and told["instance"] != stale["instance"]


def test_commands_do_not_speak_to_a_stranger_on_the_daemon_s_port(fresh, receiver):
    # Something else answers HTTP where the daemon was last seen: it is not mistaken for ours.
    fresh.home.mkdir(mode=0o700)
    (fresh.home / "daemon.json").write_text(json.dumps(
        {"url": receiver.url, "pid": os.getpid(), "instance": "x", "version": "0", "startedAt": 0}))
    done = fresh("claim", "a", "-q")
    assert receiver.got == []
    assert done.returncode in (0, 1, 6) and "Traceback" not in done.stderr


# =====================================================================================================================
# PROOFS — crowds under a hand that kills and stops, and pure functions that judge what they wrote down
# =====================================================================================================================

# A proof has three parts. Players ask the daemon and note what they asked, what they were told, and when (the monotonic
# clock is one for the whole machine). A nemesis kills and stops daemon and players, so many times while so much is done:
# it goes by progress and never by time. A judge then reads the notes alone and gives every broken promise as a sentence.
# The short sizes belong to the suite, `-m long` runs the long ones; PORT_DADDY_REPORT names a file for the figures.


def record(name, began, **figures):
    """Put the figures of a proof into the report, beside those of others that may be written at the same time."""
    path = os.environ.get("PORT_DADDY_REPORT")
    if path:
        with open(path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            report = json.loads(file.read() or "{}")
            report[name] = {**figures, "seconds": round(time.monotonic() - began, 1), "date": time.strftime("%Y-%m-%d"),
                            "python": platform.python_version()}
            file.truncate(0)
            file.write(json.dumps(report, indent=2, sort_keys=True) + "\n")


def acquit(charges, history, tmp_path):
    """Fail with the first of the broken promises, and with the name of the file that tells the whole story."""
    charges = list(charges)
    path = tmp_path / "history.jsonl"
    if charges:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in history))
        pytest.fail("\n".join([f"{len(charges)} broken promises; the whole history: {path}", *charges[:10]]))


# ---- players --------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """A request and its answer, as its player saw them. `token` is a lock's fencing token or a task's attempt; `outcome`
    is "ok", or the code of the refusal, or None when no answer came: then nobody knows whether it was done."""

    called: float
    returned: Any
    what: str
    name: str
    token: Any
    outcome: Any
    ttl: int = 0  # ms
    pid: Any = None  # of the process to which a lock is bound

    def __str__(self):
        returned = "?" if self.returned is None else f"{self.returned:.6f}"
        return f"{self.what} {self.name} #{self.token} ({self.called:.6f} to {returned}: {self.outcome})"


class Talk:
    """A client in a few lines, with a file for its notes. It goes to other processes as text, and so do the roles: they
    use the standard library and nothing of this file."""

    def __init__(self, port, path=os.devnull):
        self.port, self.socket, self.file = port, None, None
        self.notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def ask(self, method, path, body=None, key=None, meanwhile=None):
        """The status and the reply; 0 when there was no answer. `meanwhile` is called while the daemon works."""
        content = b"" if body is None else json.dumps(body).encode()
        head = (f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\n" + (f"Idempotency-Key: {key}\r\n" if key else "") + "\r\n")
        if not self.connect():
            return 0, {}
        try:
            self.socket.sendall(head.encode() + content)
            if meanwhile:
                meanwhile()
            status, length = int(self.file.readline().split()[1]), 0
            for line in iter(self.file.readline, b"\r\n"):
                name, value = line.split(b":", 1)
                length = int(value) if name.lower() == b"content-length" else length
            return status, json.loads(self.file.read(length))
        except (OSError, IndexError, ValueError):  # cut off somewhere
            self.close()
            return 0, {}

    def connect(self):
        """Whether there is somebody to talk to."""
        if self.file is not None and select.select([self.socket], [], [], 0)[0]:
            self.close()  # nothing was asked, so that it can only be the end
        try:
            if self.file is None:
                self.socket = socket.create_connection(("127.0.0.1", self.port), 20)
                self.file = self.socket.makefile("rb")
        except OSError:
            time.sleep(0.01)
        return self.file is not None

    def close(self):
        if self.file is not None:
            self.file.close()
            self.socket.close()
        self.file = None

    def note(self, *facts):
        os.write(self.notes, json.dumps(facts).encode() + b"\n")  # one write: a kill leaves whole lines

    def do(self, what, name, token, ttl, method, path, body):
        """Ask about something that was taken, once there is somebody to ask, and note it; what gives it back is noted
        before, too, since from then on it may be gone."""
        while not self.connect():
            pass
        called = time.monotonic()
        if what != "extend":
            self.note(called, None, what, name, token, None)
        status, reply = self.ask(method, path, body)
        self.note(called, time.monotonic(), what, name, token, "ok" if status == 200 else reply.get("code"), ttl)
        return status


def program(role):
    """A role as a program: four threads that play it, without pytest, so that it starts in no time."""
    return "\n".join([
        "import collections, json, os, random, select, socket, sys, threading, time",
        inspect.getsource(Talk), inspect.getsource(role),
        "port, path, seed, part = json.loads(sys.argv[1])",
        "for number in range(4):",
        "    talk, dice = Talk(port, path), random.Random(seed + number)",
        f"    threading.Thread(target={role.__name__}, args=(talk, dice), kwargs=part).start()"])


class Nemesis:
    """Players in processes that can be killed, the daemon that they play against, and the hand that kills and stops."""

    DEEDS = ("kill the daemon", "stop the daemon", "kill a player", "stop a player")

    def __init__(self, daemon, folder, dice, role, players=4, **part):
        self.daemon, self.folder, self.dice, self.role, self.part = daemon, folder, dice, role, part
        self.players, self.files, self.history, self.answered = [], [], [], 0
        self.done = dict.fromkeys(self.DEEDS, 0)
        for _ in range(players):
            self.send_player()

    def send_player(self):
        path = self.folder / f"player-{len(self.files)}.jsonl"
        told = json.dumps([self.daemon.port, str(path), self.dice.random(), self.part])
        path.touch()
        self.files.append(open(path, "rb"))  # noqa: SIM115  (closed with the proof)
        with open(self.folder / "players.stderr", "a") as errors:
            self.players.append(subprocess.Popen(
                [sys.executable, "-c", program(self.role), told], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=errors, start_new_session=True))

    def read(self):
        """Take in what the players have noted; how many of their operations are answered by now."""
        for file in self.files:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            file.seek(whole - len(data), os.SEEK_CUR)
            news = [Op(*json.loads(line)) for line in data[:whole].splitlines()]
            self.history += news
            self.answered += sum(op.outcome is not None for op in news)
        return self.answered

    def strike(self, deed):
        self.done[deed] += 1
        victim = self.dice.choice(self.players)
        if deed == "kill the daemon":
            self.history.append(Op(time.monotonic(), None, "restart", "", None, None))
            self.daemon.kill()
            self.daemon.start()
        elif deed == "stop the daemon":
            self.stop(self.daemon.process, 1.5)
        elif deed == "stop a player":
            self.stop(victim, 1.0)
        else:
            now = time.monotonic()
            self.history.append(Op(now, now, "kill", "", None, "ok", 0, victim.pid))
            victim.kill()
            victim.wait(10)
            self.players.remove(victim)
            self.send_player()

    def stop(self, process, most):
        process.send_signal(signal.SIGSTOP)
        threading.Timer(self.dice.uniform(0.02, most), process.send_signal, [signal.SIGCONT]).start()

    def torment(self, goal, deeds):
        """So many deeds, spread evenly over the way to so many answered operations."""
        plan = [self.DEEDS[number % len(self.DEEDS)] for number in range(deeds)]
        self.dice.shuffle(plan)
        for step, deed in enumerate(plan, 1):
            eventually(lambda step=step: self.read() >= goal * step / (deeds + 1), 120)
            self.strike(deed)
        eventually(lambda: self.read() >= goal, 120)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for player in self.players:
            end(player)
        self.read()
        for file in self.files:
            file.close()
        assert (self.folder / "players.stderr").read_text() == ""


# ---- judges of what is held: locks, and the leases of tasks ---------------------------------------------------------

ROUNDING = 0.001  # seconds: the daemon counts whole milliseconds
GRACE = 5  # seconds after a restart in which nothing ends that was held before it
GIVES_BACK = ("release", "ack", "nack")


class Hold(NamedTuple):
    start: float
    end: float
    take: Op


def leases(history):
    """By name and token: until when the lease runs for certain (counted from the asking), and when its player first asked
    to give it back."""
    until, back, known = {}, {}, {}
    for op in history:
        key = op.name, op.token
        if op.what in GIVES_BACK:
            back[key] = min(back.get(key, math.inf), op.called)
        elif op.what in ("take", "extend") and op.outcome == "ok":
            until[key] = max(until.get(key, 0), op.called + op.ttl / 1000 - ROUNDING)
            known[key] = min(known.get(key, math.inf), op.returned)
    restarts = sorted(op.called for op in history if op.what == "restart")
    for key, since in known.items():
        for restart in restarts[bisect.bisect(restarts, since):]:
            if until[key] > restart:
                until[key] = max(until[key], restart + GRACE - ROUNDING)
    return until, back


def certain_holds(history):
    """For each answered take the time in which it was certainly in force: from when the player knew of it until its lease
    could be over, it asked to give it back, or its process was killed."""
    until, back = leases(history)
    killed = {op.pid: op.called for op in history if op.what == "kill"}
    for op in history:
        if op.what == "take" and op.outcome == "ok":
            key = op.name, op.token
            yield Hold(op.returned, min(until[key], back.get(key, math.inf), killed.get(op.pid, math.inf)), op)


def denied(history, refusal):
    """Nobody is told that a lease is lost while it runs for certain."""
    until, back = leases(history)
    for op in history:
        key = op.name, op.token
        if op.what in refusal and op.what != "take" and op.outcome == refusal[op.what] and (
                op.returned < until.get(key, 0) and op.called <= back.get(key, math.inf)):
            yield f"a lease was lost before its time: {op}, which runs until {until[key]:.6f} at least"


def crowded(history, limits):
    """Never more at once than there are seats (1 where `limits` does not say)."""
    live = {}
    for hold in sorted((hold for hold in certain_holds(history) if hold.start < hold.end), key=lambda hold: hold.start):
        seats = live.setdefault(hold.take.name, [])
        while seats and seats[0][0] <= hold.start:
            heapq.heappop(seats)
        if len(seats) >= limits.get(hold.take.name, 1):
            others = "; ".join(f"{take}, until {until:.6f} at least" for until, take in seats)
            yield f"too many hold at {hold.start:.6f}: {hold.take}, beside {others}"
        heapq.heappush(seats, (hold.end, hold.take))


def disordered(takes):
    """A take that was answered before another was asked has the smaller token, and no token comes twice."""
    latest = last = None
    for op in sorted(takes, key=lambda op: (op.token, op.called)):
        if last and op.token == last.token:
            yield f"a token came twice: {last}; {op}"
        if latest and op.returned < latest.called:
            yield f"a later take has the smaller token: {op}; {latest}"
        if not latest or op.called > latest.called:
            latest = op
        last = op


def by_name(history):
    found = collections.defaultdict(list)
    for op in history:
        found[op.name].append(op)
    return found


def obeyed(ops, seats):
    """What comes with an old token is refused: the token was given back before, or, where there is one seat, somebody
    was given a newer one before."""
    given_back, newer, soonest = {}, [], math.inf
    takes = sorted((op for op in ops if op.what == "take" and op.outcome == "ok"), key=lambda op: op.token, reverse=True)
    for op in takes:  # newest first: when was a newer one known to be given?
        newer.append((soonest, op.token))
        soonest = min(soonest, op.returned)
    overtaken = {token: since for since, token in newer} if seats == 1 else {}
    for op in ops:
        if op.what in GIVES_BACK and op.outcome == "ok":
            given_back.setdefault(op.token, op)
            if op.returned < given_back[op.token].returned:
                given_back[op.token] = op
    for op in ops:
        if op.what not in ("take", "kill") and op.outcome == "ok":
            first = given_back.get(op.token)
            if first and first.returned < op.called:
                yield f"an old token was obeyed: {op}, after {first}"
            if overtaken.get(op.token, math.inf) < op.called:
                yield f"an old token was obeyed: {op}; somebody else held {op.name} since {overtaken[op.token]:.6f}"


def odd(history, refusal):
    """Every answer is a success, the one refusal that fits the question, or a daemon that could not be reached."""
    for op in history:
        if op.outcome not in ("ok", None, refusal.get(op.what)):
            yield f"an answer that nobody promised: {op}"


# ---- 1. locks -------------------------------------------------------------------------------------------------------

LOCKS = {"north": 1, "south": 1, "east": 1, "west": 1, "up": 1, "pool": 3}


def locker(talk, dice, locks):
    """Takes locks for short, or for long and bound to its process; holds, extends, releases or forgets them; and comes
    back with old tokens."""
    old = collections.deque(maxlen=8)

    def use(what, name, token, ttl):
        method, body = ("PUT", {"token": token, "ttl": ttl}) if what == "extend" else ("DELETE", {"token": token})
        talk.do(what, name, token, ttl, method, f"/locks/{name}", body)

    while True:
        name, limit = dice.choice(sorted(locks.items()))
        ttl, pid = dice.choice([(dice.randint(50, 300), None), (60_000, os.getpid())])
        called = time.monotonic()
        status, reply = talk.ask("POST", f"/locks/{name}", {
            "owner": str(os.getpid()), "ttl": ttl, "limit": limit, "wait": dice.choice([0, 0, 0, 20, 200]),
            **({"pid": pid} if pid else {})})
        outcome = "ok" if status == 200 else reply.get("code")
        talk.note(called, time.monotonic(), "take", name, reply.get("token"), outcome, ttl, pid)
        if status == 200:
            lease = name, reply["token"], ttl
            if dice.random() < 0.5:
                time.sleep(dice.random() * 0.02)
            if dice.random() < 0.2:
                use("extend", *lease)
            if pid or dice.random() < 0.96:
                use("release", *lease)
            old.append(lease)
        if old and dice.random() < 0.2:
            use(dice.choice(["extend", "release"]), *dice.choice(old))


def lock_charges(history, limits):
    takes = [op for op in history if op.what == "take" and op.outcome == "ok"]
    refusal = {"take": "LOCK_HELD", "extend": "LOCK_LOST", "release": "LOCK_LOST"}
    yield from odd(history, refusal)
    yield from denied(history, refusal)
    yield from disordered(takes)  # one counter for all names
    yield from crowded(history, limits)
    for name, ops in by_name(history).items():
        yield from obeyed(ops, limits.get(name, 1))


@pytest.mark.parametrize("goal, deeds", [(5_000, 8), pytest.param(200_000, 200, marks=pytest.mark.long)])
def test_a_lock_has_one_holder_and_tokens_grow_whatever_is_killed_or_stopped(spawned, dice, tmp_path, goal, deeds):
    began = time.monotonic()
    with Nemesis(spawned, tmp_path, dice, locker, locks=LOCKS) as nemesis:
        nemesis.torment(goal, deeds)
    history = nemesis.history
    judged = time.monotonic()
    acquit(lock_charges(history, LOCKS), history, tmp_path)
    judged = time.monotonic() - judged
    grants = sum(op.what == "take" and op.outcome == "ok" for op in history)
    assert grants > goal / 20, f"only {grants} grants in {nemesis.answered} operations"
    eventually(lambda: spawned.wire.get("/locks")["count"] == 0)  # those who held something are dead, or forgot it
    print(f"{nemesis.answered} operations, {grants} grants, judged in {judged:.2f} s; {nemesis.done}")
    record("locks", began, operations=nemesis.answered, grants=grants, violations=0, **nemesis.done)


def test_the_judge_of_locks_knows_a_crime_when_it_sees_one():
    def take(called, returned, token, ttl=1_000, **more):
        return Op(called, returned, "take", more.pop("name", "a"), token, "ok", ttl, **more)

    innocent = [take(0, 1, 1, 2_000), Op(1.5, None, "release", "a", 1, None), take(1.6, 1.7, 2), take(3, 4, 3, pid=7),
                Op(4.1, 4.1, "kill", "", None, "ok", 0, 7), take(4.2, 4.3, 4, name="b")]
    assert list(lock_charges(innocent, {})) == []
    for crime, words in [
            ([take(0, 1, 1, 2_000), take(1.5, 1.6, 2)], "too many hold"),
            ([take(0, 1, 2), take(1.5, 1.6, 1, name="b")], "a later take has the smaller token"),
            ([take(0, 1, 1), take(1.5, 1.6, 1, name="b")], "a token came twice"),
            ([take(0, 1, 1), take(2, 3, 2), Op(4, 5, "extend", "a", 1, "ok", 9)], "an old token was obeyed"),
            ([take(0, 1, 1), Op(2, 3, "release", "a", 1, "ok"), Op(4, 5, "release", "a", 1, "ok")], "an old token was"),
            ([take(0, 1, 1, 2_000), Op(1.5, None, "restart", "", None, None), take(3, 3.5, 2)], "too many hold"),
            ([take(0, 1, 1, 9_000), Op(2, 3, "extend", "a", 1, "LOCK_LOST")], "a lease was lost before its time"),
            ([Op(0, 1, "take", "a", None, "INTERNAL")], "an answer that nobody promised")]:
        assert [charge for charge in lock_charges(crime, {}) if charge.startswith(words)], words
    assert len(list(lock_charges([take(0, 1, number, 9_000) for number in range(1, 5)], {"a": 3}))) == 1


# ---- 2. queues ------------------------------------------------------------------------------------------------------

GROUPS, MOST = ["red", "blue"], 8


def worker(talk, dice, groups, most):
    """Takes tasks for a lease and acknowledges them: most of them at once, some after a touch, some late, some twice.
    Some are refused, some forgotten, and those that are poison fail always, also when that is denied afterwards."""
    late = collections.deque()

    def answer(what, task, **more):
        (group, _), receipt, lease, attempt, name = task
        body = {"group": group, "receipt": receipt, **more}
        return talk.do(what, name, attempt, lease, "POST", f"/msg/tasks/{'touch' if what == 'extend' else what}", body)

    while True:
        group, lease = dice.choice(groups), dice.choice([400, 1_500])
        called = time.monotonic()
        status, reply = talk.ask("GET", f"/msg/tasks/poll?group={group}&lease={lease}&maxAttempts={most}&timeout=300")
        if status not in (0, 200):
            talk.note(called, time.monotonic(), "take", group, None, reply.get("code"))
        message, chance = reply.get("message"), dice.random()
        if status == 200 and message:
            name = f"{group}/{message['id']}"
            task = (group, name), reply["receipt"], lease, reply["attempt"], name
            talk.note(called, time.monotonic(), "take", name, reply["attempt"], "ok", lease)
            if chance < 0.1:
                time.sleep(chance / 5)
            if message["payload"]["poison"]:
                if answer("nack", task, error="poison") == 200 and chance < 0.5:
                    answer("ack", task)  # which is void
            elif chance < 0.01:
                answer("nack", task, error="tired", delay=dice.choice([0, 20]))
            elif chance < 0.015:
                late.append(task)
            elif chance > 0.004:
                for what in ["extend", "ack"] if chance < 0.04 else ["ack", "ack"] if chance > 0.98 else ["ack"]:
                    answer(what, task)
        if len(late) > 3:
            answer("ack", late.popleft())


def publish_tasks(talk, goal):
    """So many answered tasks, every hundredth of them poison: id -> poison."""
    published = {}
    while len(published) < goal:
        poison = len(published) % 100 == 50
        status, reply = talk.ask("POST", "/msg/tasks", {"payload": {"poison": poison}})
        assert status in (0, 200) or reply["code"] == "CHANNEL_FULL", reply
        if status == 200:
            published[reply["id"]] = poison
        elif status:  # the workers have more than enough to do
            time.sleep(0.05)
    return published


def drained(talk):
    status, reply = talk.ask("GET", "/msg/tasks/groups")
    return status == 200 and all(group["backlog"] == group["leased"] == 0 for group in reply["groups"])


def queue_charges(history, published, dead):
    """`published`: id -> poison. `dead`: name -> its dead letter."""
    refusal = dict.fromkeys([*GIVES_BACK, "extend"], "STALE_RECEIPT")
    yield from odd(history, refusal)
    yield from denied(history, refusal)
    yield from crowded(history, {})
    names = by_name(history)
    for ops in names.values():
        takes = [op for op in ops if op.what == "take" and op.outcome == "ok"]
        yield from disordered(takes)
        yield from obeyed(ops, 1)
        acks = sorted((op for op in ops if op.what == "ack" and op.outcome == "ok"), key=lambda op: op.returned)
        if len(acks) > 1:
            yield f"acknowledged twice: {acks[0]}; {acks[1]}"
        for take in takes:
            if acks and acks[0].returned < take.called:
                yield f"given again after it was acknowledged: {take}, after {acks[0]}"
            if take.token > MOST:
                yield f"given too often: {take}"
    for ident, poison in published.items():
        for name in (f"{group}/{ident}" for group in GROUPS):
            acked = [op for op in names.get(name, ()) if op.what == "ack" and op.outcome in ("ok", None)]
            if poison and name not in dead:
                yield f"poison that did not die: {name}"
            elif not poison and name not in dead and not acked:
                yield f"lost, neither acknowledged nor dead: {name}, {len(names.get(name, ()))} operations"
    for name, letter in dead.items():
        last = [op.outcome for op in names.get(name, ()) if op.what == "nack" and op.token == MOST]
        if not letter["payload"]["poison"]:
            yield f"a good task died: {letter}"
        if letter["attempts"] != MOST or not letter["error"] or "ok" in last and letter["error"] != "poison":
            yield f"a dead letter that tells it wrong: {letter}"


@pytest.mark.parametrize("goal, deeds", [(1_000, 8), pytest.param(50_000, 120, marks=pytest.mark.long)])
def test_every_task_is_done_once_and_only_poison_dies_whoever_is_killed(spawned, dice, tmp_path, goal, deeds):
    began, talk = time.monotonic(), Talk(spawned.port)
    for group in GROUPS:  # from now on nothing is dropped that they have not done with
        assert talk.ask("GET", f"/msg/tasks/poll?group={group}&lease=1000&timeout=0")[0] == 200
    with Nemesis(spawned, tmp_path, dice, worker, groups=GROUPS, most=MOST) as nemesis:
        publisher = in_background(publish_tasks, Talk(spawned.port), goal)
        nemesis.torment(goal * len(GROUPS) * 2, deeds)  # each wants a take and an ack at least
        published = publisher.result(120)
        eventually(lambda: drained(talk), 60)
    dead = {}
    for group in GROUPS:
        letters = talk.ask("GET", f"/msg/tasks/dead?group={group}")[1]["messages"]
        dead.update({f"{group}/{letter['id']}": letter for letter in letters})
    history = nemesis.history
    acquit(queue_charges(history, published, dead), history, tmp_path)
    again = sum(op.what == "take" and op.outcome == "ok" and op.token > 1 for op in history)
    print(f"{len(published)} tasks for {len(GROUPS)} groups, {len(dead)} dead, {again} given again; {nemesis.done}")
    record("queue", began, tasks=len(published), groups=len(GROUPS), dead=len(dead), again=again,
           violations=0, **nemesis.done)


# ---- 3. streams -----------------------------------------------------------------------------------------------------


class Reader:
    """Follows a channel as a stream, is cut off when the dice say so, stays away for a while at times, and resumes behind
    the last id that it has seen. `seen` holds pairs: the id and the number of a message, or ~from and to of a gap."""

    def __init__(self, port, dice, published):
        self.port, self.dice, self.published = port, dice, published
        self.seen, self.last, self.cuts, self.over = array.array("q"), 0, 0, False
        self.thread = in_background(self.run)

    def run(self):
        while not self.over:
            try:
                with contextlib.closing(socket.create_connection(("127.0.0.1", self.port), 20)) as line:
                    line.sendall(request_bytes(path="/msg/news/subscribe", Last_Event_ID=str(self.last)))
                    self.follow(line, self.dice.randint(1, 800))
                    self.cuts += 1
            except OSError:  # killed, or not there yet
                time.sleep(0.01)
            away = len(self.published) + self.dice.choice([0, 0, 0, 100, 500])
            while len(self.published) < away and None not in self.published:
                time.sleep(0.01)

    def follow(self, line, count):
        """Read so many events, and leave whatever has come beyond them."""
        rest = b""
        while count > 0 and not self.over:
            data = line.recv(65536)
            if not data:
                return
            *blocks, rest = (rest + data).split(b"\n\n")
            for block in blocks[:count]:
                self.take(dict(field.split(b": ", 1) for field in block.split(b"\n") if b": " in field))
            count -= len(blocks)

    def take(self, event):
        kind = event.get(b"event", b"message")
        if kind == b"gap":
            gap = json.loads(event[b"data"])
            self.seen.extend((~gap["from"], gap["to"]))
        elif b"id" in event:
            payload = json.loads(event[b"data"])["payload"]
            self.over, self.last = payload == "end", int(event[b"id"])
            if not self.over:
                self.seen.extend((self.last, payload))
        else:
            assert kind == b"connected" or event.keys() == {b""}, event  # a comment


def stream_charges(seen, published, mortal):
    """What one reader saw, of what was published (id -> number), some of which (`mortal`) could go before it was seen. A
    gap goes up to the highest id that was dropped; between its ends there may be messages that are still there."""
    ids, at, last, told = sorted(published), 0, 0, 0

    def skipped(up_to):
        nonlocal at
        while at < len(ids) and ids[at] < up_to:
            at += 1
            if ids[at - 1] > told:
                yield f"message {ids[at - 1]} was lost without a word, between {last} and {up_to}"
            elif ids[at - 1] not in mortal:
                yield f"message {ids[at - 1]} was announced as lost, but nothing had taken it away"

    for first, second in zip(seen[::2], seen[1::2]):
        if first < 0:
            if ~first != last:
                yield f"a gap from {~first} to {second}, told to a reader that stood at {last}"
            if second in published and second not in mortal:
                yield f"a gap from {last} to {second}, which nothing had taken away"
            told = max(told, second)
            continue
        if first <= last:
            yield f"message {first} came after {last}"
        yield from skipped(first)
        if at < len(ids) and ids[at] == first:
            if published[first] != second:
                yield f"message {first} is {second}, but {published[first]} was published"
            at += 1
        last = first
    yield from skipped(math.inf)


def publish_news(talk, numbers, published, readers, mortal):
    """Publish each number until it is answered; every tenth lives for a moment only, and once all that is there is
    cleared away. None in `published` is the end."""
    for number in numbers:
        if number == len(numbers) // 4:
            talk.ask("DELETE", "/msg/news")
            mortal.update(published)
        while sorted(reader.last for reader in readers)[len(readers) // 2] < next(reversed(published), 0) - 4_000:
            time.sleep(0.01)  # so that a long proof is not one about readers that lag behind what is kept
        short = number % 10 == 3
        status = 0
        while status != 200:
            status, reply = talk.ask("POST", "/msg/news", {"payload": number, **({"expires": 5} if short else {})})
        published[reply["id"]] = number
        if short:
            mortal.add(reply["id"])
    while talk.ask("POST", "/msg/news", {"payload": "end"})[0] != 200:
        pass
    published[None] = None


@pytest.mark.parametrize("goal, kills", [(5_000, 3), pytest.param(300_000, 40, marks=pytest.mark.long)])
def test_what_a_reader_received_and_what_it_was_told_to_have_lost_is_all_that_was_published(
        spawned, dice, tmp_path, goal, kills):
    began, published, mortal = time.monotonic(), {}, set()
    readers = [Reader(spawned.port, random.Random(dice.random()), published) for _ in range(16)]
    publisher = in_background(publish_news, Talk(spawned.port), range(goal), published, readers, mortal)
    for kill in range(kills):
        moment = goal * (kill + dice.random()) / kills
        eventually(lambda moment=moment: len(published) >= moment, 300)
        spawned.kill()
        spawned.start()
    publisher.result(600)
    for reader in readers:
        reader.thread.result(120)
    del published[None]
    if goal > 10_000:  # what a channel keeps
        mortal.update(sorted(published)[:-10_000])
    charges = [f"reader {number}: {charge}" for number, reader in enumerate(readers)
               for charge in stream_charges(reader.seen, published, mortal)]
    acquit(charges, [sorted(published.items()), *(list(reader.seen) for reader in readers)], tmp_path)
    gaps = sum(first < 0 for reader in readers for first in reader.seen[::2])
    received = sum(len(reader.seen) // 2 for reader in readers) - gaps
    print(f"{len(published)} messages, {received} received, {gaps} gaps, {sum(reader.cuts for reader in readers)} cuts")
    assert gaps, "nobody was told of a loss: the proof has become weaker than it was"
    record("streams", began, messages=len(published), readers=16, received=received, gaps=gaps,
           cuts=sum(reader.cuts for reader in readers), kills=kills, violations=0)


def test_the_judge_of_streams_knows_a_crime_when_it_sees_one():
    published = {3: 30, 5: 50, 7: 70, 9: 90}
    assert list(stream_charges([3, 30, ~3, 5, 7, 70, 8, 1, 9, 90], published, {5})) == []
    for seen, words in [
            ([3, 30, 7, 70, 9, 90], "message 5 was lost without a word"), ([3, 30, 5, 50, 7, 70], "message 9 was lost"),
            ([3, 30, 5, 50, 5, 50, 7, 70, 9, 90], "message 5 came after 5"),
            ([3, 30, ~3, 5, 7, 70, ~7, 9], "a gap from 7 to 9, which nothing"),
            ([3, 30, 5, 51, 7, 70, 9, 90], "message 5 is 51"), ([~1, 5, 7, 70, 9, 90], "a gap from 1")]:
        assert next(stream_charges(seen, published, {5, 3})).startswith(words), words


# ---- 4. kills under mixed load --------------------------------------------------------------------------------------


class Hand:
    """Writes of everything, one request after the other, and knows what must be there once each is answered. The one whose
    answer a kill has swallowed is asked again under its Idempotency-Key, which must end as if nothing had happened."""

    def __init__(self, port, number):
        self.talk, self.number, self.turns, self.writes = Talk(port), number, 0, 0
        self.messages, self.services, self.locks, self.hooks, self.grants = {}, {}, {}, {}, set()
        self.tasks, self.acked = set(), set()  # not done yet; done
        self.plan = self.play()
        self.request = next(self.plan)

    def play(self):
        """Yields requests and is sent their replies."""
        for turn in itertools.count():
            name, past = f"{self.number}-{turn}", f"{self.number}-{turn - 2}"
            self.turns = turn
            self.messages[(yield "POST", "/msg/load", {"payload": name})["id"]] = name
            self.services[f"load:{name}"] = (yield "POST", "/claim", {"id": f"load:{name}"})["port"]
            token = self.locks[name] = (yield "POST", f"/locks/{name}", {"owner": name, "ttl": 86_400_000})["token"]
            self.grants.add(token)
            url = f"http://127.0.0.1:9/{name}"
            hook = (yield "POST", "/webhooks", {"url": url, "events": ["daemon.stop"]})["id"]
            self.hooks[hook] = url
            self.tasks.add((yield "POST", "/msg/tasks", {"payload": name})["id"])
            given = yield "GET", "/msg/tasks/poll?group=load&lease=3600000&timeout=0", None
            if given["message"]:
                task = given["message"]["id"]
                assert task not in self.acked, f"task {task} was given again, after it was acknowledged"
                yield "POST", "/msg/tasks/ack", {"group": "load", "receipt": given["receipt"]}
                self.acked.add(task)
            if len(self.hooks) > 2:
                yield "DELETE", f"/webhooks/{next(iter(self.hooks))}", None
                del self.hooks[next(iter(self.hooks))]
            if turn > 1:
                yield "DELETE", f"/services/load:{past}", None
                del self.services[f"load:{past}"]
            if turn > 1 and turn % 100:  # some locks stay to the end
                yield "DELETE", f"/locks/{past}", {"token": self.locks[past]}
                del self.locks[past]

    def ask(self, meanwhile=None):
        """Ask what is to be asked; whether it was answered."""
        method, path, body = self.request
        key = f"{self.number}-{self.writes}" if method == "POST" else None
        again = method == "DELETE"  # which has no key: done already is as good
        status, reply = self.talk.ask(method, path, body, key, meanwhile)
        if not status:
            return False
        assert status == 200 or again and status in (404, 409), (self.request, status, reply)
        self.writes += 1
        self.request = self.plan.send(reply)
        return True

    def run(self, enough, kill):
        """Write until the daemon is killed; it is `kill` that does it, while it works on the last of so many writes."""
        last = self.writes + enough
        while self.ask(kill if self.writes == last else None):
            pass


def everything(talk, after):
    """What is there, in the words of the hands; of messages and grants those after the ids that were seen before."""
    def get(path):
        status, reply = talk.ask("GET", path)
        assert status == 200, (path, status, reply)
        return reply

    messages, events = {}, []
    while True:
        page = get(f"/msg/load?after={max(messages, default=after['messages'])}&limit=1000")["messages"]
        messages.update({message["id"]: message["payload"] for message in page})
        if len(page) < 1000:
            break
    while True:
        page = get(f"/activity?type=lock.acquire&after={after['events']}&limit=1000")["entries"]
        events += page
        after["events"] = max((entry["id"] for entry in page), default=after["events"])
        if len(page) < 1000:
            break
    after["messages"] = max(messages, default=after["messages"])
    groups = get("/msg/tasks/groups")["groups"]
    return {"messages": messages, "services": {each["id"]: each["port"] for each in get("/services")["services"]},
            "locks": {lock["name"]: lock["token"] for lock in get("/locks")["locks"]},
            "hooks": {hook["id"]: hook["url"] for hook in get("/webhooks")["webhooks"]},
            "grants": sorted(facts(entry)["token"] for entry in events),
            "open tasks": sum(group["backlog"] + group["leased"] for group in groups)}


def expected(hands):
    """The same from memory; what is looked at only once is forgotten."""
    found = {name: {key: value for hand in hands for key, value in getattr(hand, name).items()}
             for name in ("messages", "services", "locks", "hooks")}
    found["grants"] = sorted(token for hand in hands for token in hand.grants)
    found["open tasks"] = sum(len(hand.tasks) - len(hand.acked) for hand in hands)
    for hand in hands:
        hand.messages.clear()
        hand.grants.clear()
    return found


def differences(there, wanted):
    for name, value in wanted.items():
        if there[name] != value and isinstance(value, dict):
            lost = {key: value[key] for key in value if there[name].get(key) != value[key]}
            extra = {key: there[name][key] for key in there[name] if value.get(key) != there[name][key]}
            yield f"{name}: lost or changed {lost}, there without a reason {extra}"
        elif there[name] != value:
            yield f"{name}: {there[name]} instead of {value}"


def check_integrity(home, folder):
    """Of a copy, such as a kill leaves it: the file and what was not yet folded into it."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for file in home.glob("port_daddy.db*"):
        if not file.name.endswith("-shm"):
            shutil.copy(file, copy)
    with contextlib.closing(sqlite3.connect(copy / "port_daddy.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("cycles", [40, pytest.param(2_000, marks=pytest.mark.long)])
def test_kills_under_mixed_load_lose_no_answered_write(spawned, dice, tmp_path, cycles):
    began, after, highest = time.monotonic(), {"messages": 0, "events": 0}, 0
    hands, talk = [Hand(spawned.port, number) for number in range(8)], Talk(spawned.port)
    talk.ask("GET", "/msg/tasks/poll?group=load&timeout=0")  # a group that has never polled is none
    for cycle in range(cycles):
        enough, moment = dice.randint(1, 25), dice.uniform(0, 0.003)

        def kill(moment=moment):
            time.sleep(moment)
            spawned.process.kill()

        for thread in [in_background(hand.run, enough, kill) for hand in hands]:
            thread.result(60)
        spawned.kill()  # that is, wait for its end
        talk.close()
        if cycle % 10 == 9:
            check_integrity(spawned.home, tmp_path)
        spawned.start()
        for hand in hands:
            if hand.request[0] != "GET":  # whose answer did not come
                assert eventually(hand.ask)
        wanted, there = expected(hands), everything(talk, after)
        charges = [f"after kill {cycle + 1}: {charge}" for charge in differences(there, wanted)]
        if wanted["grants"] and wanted["grants"][0] <= highest:
            charges.append(f"after kill {cycle + 1}: token {wanted['grants'][0]} was given after {highest}")
        highest = max([highest, *wanted["grants"]])
        acquit(charges, [wanted, there], tmp_path)
    writes = sum(hand.writes for hand in hands)
    print(f"{cycles} kills, {writes} answered writes in {sum(hand.turns for hand in hands)} turns")
    record("kills", began, cycles=cycles, writes=writes, lost=0)


# ---- 5. starters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.long)])
def test_twenty_commands_at_once_start_one_daemon_and_all_succeed(fresh, rounds):
    began = time.monotonic()
    for turn in range(1, rounds + 1):
        commands = [fresh.start("claim", f"s{number}", "--json") for number in range(20)]
        said = [command.communicate(timeout=120) for command in commands]
        fresh.started.clear()
        assert [command.returncode for command in commands] == [0] * 20, said
        ports = {json.loads(out)["port"] for out, _ in said}
        assert len(ports) == 20
        told = json.loads((fresh.home / "daemon.json").read_text())
        pd = PortDaddy(url=told["url"])
        assert {service["port"] for service in pd.list_services()["services"]} == ports
        assert len(pd.get_activity(type="daemon.start", limit=1_000)["entries"]) == turn
        os.kill(told["pid"], signal.SIGKILL if turn % 2 else signal.SIGTERM)  # what a kill leaves behind must not matter
        eventually(lambda pd=pd: not pd.ping())
    record("starters", began, rounds=rounds, commands=20, failures=0)


# ---- 6. webhooks ----------------------------------------------------------------------------------------------------


class Moody:
    """A receiver that now and then fails, hangs for a moment, answers in drips or closes without a word. `got` holds the
    id of the delivery, the id of the message, and whether it was taken."""

    MOODS = {"takes": 88, "hangs": 4, "drips": 4, "fails": 2, "closes": 2}

    def __init__(self, dice):
        self.got = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                mood = dice.choices(*zip(*receiver.MOODS.items()))[0]
                status = {"fails": b"500 Unwell", "closes": b""}.get(mood, b"200 Well")
                answer = b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" if status else b""
                size = 4 if mood == "drips" else 100
                for place in range(0, len(answer), size):
                    time.sleep({"hangs": 0.05, "drips": 0.002}.get(mood, 0))
                    self.wfile.write(answer[place:place + size])
                receiver.got.append((self.headers["webhook-id"], event["data"]["id"], mood not in ("fails", "closes")))
                self.close_connection = True

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(OSError):  # a daemon that was killed in the middle is no news here
                    super().handle()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def taken(self):
        return {message for _, message, taken in list(self.got) if taken}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def delivery_charges(got, published):
    """Every published event was taken at least once, and an event has one delivery id over all its attempts."""
    names, events = {}, {}
    for delivery, message, _ in got:
        if names.setdefault(message, delivery) != delivery:
            yield f"message {message} came as delivery {names[message]} and as {delivery}"
        if events.setdefault(delivery, message) != message:
            yield f"delivery {delivery} was message {events[delivery]} and message {message}"
    taken = {message for _, message, taken in got if taken}
    for message in sorted(published - taken):
        yield f"message {message} was never delivered; {sum(message == each for _, each, _ in got)} attempts failed"


@pytest.mark.parametrize("goal, kills, hooks", [(200, 3, 4), pytest.param(20_000, 50, 10, marks=pytest.mark.long)])
def test_every_event_is_delivered_whatever_the_receiver_does_and_whenever_the_daemon_is_killed(
        spawned, dice, tmp_path, goal, kills, hooks):
    began, receiver, talk, published = time.monotonic(), Moody(random.Random(dice.random())), Talk(spawned.port), set()
    for number in range(hooks):
        status, _ = talk.ask("POST", "/webhooks", {"url": receiver.url, "events": ["message.publish"],
                                                   "filterPattern": f"hook-{number}"})
        assert status == 200

    def publish():
        while len(published) < goal:
            status, reply = talk.ask("POST", f"/msg/hook-{len(published) % hooks}", {"payload": len(published)})
            if status == 200:
                published.add(reply["id"])

    publisher = in_background(publish)
    for kill in range(1, kills + 1):  # the first half of them while there is still something to be published
        with contextlib.suppress(AssertionError):  # what is lost holds things up, and the judge says it better
            eventually(lambda kill=kill: len(published) + len(receiver.got) >= 2 * goal * kill / (kills + 1), 60)
        spawned.kill()
        spawned.start()
    publisher.result(120)
    with contextlib.suppress(AssertionError):
        eventually(lambda: published <= receiver.taken(), 60)
    receiver.close()
    acquit(delivery_charges(receiver.got, published), receiver.got, tmp_path)
    failed = sum(not taken for _, _, taken in receiver.got)
    print(f"{goal} events to {hooks} webhooks, {len(receiver.got)} attempts, {failed} of them in vain")
    record("webhooks", began, events=goal, hooks=hooks, kills=kills, attempts=len(receiver.got),
           failed=failed, lost=0)


# =====================================================================================================================
# SIEGE — what is malformed, random, slow or too much, and what it must not do
# =====================================================================================================================

# Three besiegers and a judge each: bytes (mutated requests with a request hidden in the body, beside a second reader of
# the framing that was written from the RFC and shares no line with the first), fields (random values for every
# operation: an answer, and never a 5xx), and numbers (idle, waiting and slow connections while descriptors are few).


class Refused(Exception):
    pass


def read_strictly(data):
    """The second reader: the requests at the beginning of these bytes, as (method, target, body); then either they are
    used up (None), or more must come ("more"), or the rest is malformed ("refuse") or not to be judged ("unclear")."""
    found = []
    while data:
        try:
            request, data = read_one(data)
        except Refused:
            return found, "refuse"
        if request is None:
            return found, "more"
        found.append(request)
        if request[3]:
            return found, "close"
    return found, None


def read_one(data):
    head, blank, rest = data.partition(b"\r\n\r\n")
    if len(head) > 8_000:
        raise Refused
    for index, byte in enumerate(head):
        before, after = head[index - 1:index], head[index + 1:index + 2]
        if byte == 0 or byte == 10 and before != b"\r" or byte == 13 and after not in (b"\n", b""):
            raise Refused
    if not blank:
        return None, data
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ")
    letters = set(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    if len(words) != 3 or words[2] not in (b"HTTP/1.0", b"HTTP/1.1") or not words[0] or set(words[0]) - letters:
        raise Refused
    if not words[1] or any(byte < 33 or byte > 126 or byte == 35 for byte in words[1]):
        raise Refused
    headers = collections.defaultdict(list)
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or set(name) - letters or any(byte < 32 and byte != 9 or byte == 127 for byte in value):
            raise Refused
        headers[name.lower().decode()].append(value.strip(b" \t").decode("latin-1"))
    if any(len(headers[name]) > 1 for name in port_daddy.SINGLE):
        raise Refused
    name, colon, number = (headers["host"] or ["localhost" if words[2] == b"HTTP/1.0" else ""])[0].lower().partition(":")
    if name != "localhost" or colon and not (number.isascii() and number.isdigit() and len(number) < 6):
        raise Refused
    if words[0] == b"OPTIONS" or headers["origin"] or headers["sec-fetch-site"]:
        raise Refused  # by the gate
    coding, length = headers["transfer-encoding"], headers["content-length"]
    if coding and (length or words[2] == b"HTTP/1.0" or coding[0].lower() != "chunked"):
        raise Refused
    if length and (not length[0] or set(length[0]) - set("0123456789") or int(length[0]) > 1024 * 1024):
        raise Refused
    body, rest = read_chunks(rest) if coding else (rest[:int((length or ["0"])[0])], rest[int((length or ["0"])[0]):])
    if body is None or length and len(body) < int(length[0]):
        return None, data
    options = [word.strip().lower() for value in headers["connection"] for word in value.split(",")]
    return (words[0].decode(), words[1].decode(), body, "close" in options or words[2] == b"HTTP/1.0"), rest


def read_chunks(rest):
    body, size = b"", None
    while size != 0:
        line, end, after = rest.partition(b"\r\n")
        if not end:
            if len(rest) >= 10:
                raise Refused
            return None, rest  # whatever it is, it is too short to be judged
        if not line or len(line) > 8 or set(line) - set(b"0123456789abcdefABCDEF"):
            raise Refused
        size = int(line, 16)
        if len(body) + size > 1024 * 1024:
            raise Refused
        if len(after) < size + 2:
            return None, rest
        if after[size:size + 2] != b"\r\n":
            raise Refused
        body, rest = body + after[:size], after[size + 2:]
    return body, rest


HIDDEN = b"POST /msg/canary HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n{\"payload\":1}"
SPLICES = [b"\r", b"\n", b"\0", b" ", b"\t", b":", b";", b",", b"\r\n", b"\r\n ", b"\r\n\r\n", b"\x0b",
           b"\x85", b"\xa0", b"0", b"-", b"+", b"%", b"#", b"Content-Length: 0\r\n", b"Content-Length: 13\r\n",
           b"Content-Length:\t4\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding : chunked\r\n",
           b"Transfer-Encoding: identity\r\n",
           b"Transfer-Encoding:\x0bchunked\r\n", b"transfer-encoding: chunked, chunked\r\n", b"Content-Length: 1_3\r\n",
           b"Host: localhost\r\n", b"Host: evil.example\r\n", b"Expect: 200-ok\r\n", b"Connection: close\r\n",
           b"Upgrade: h2c\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"ffffffff\r\n", HIDDEN]


def malformed(dice):
    """A request with another one hidden in its body, and one to five mishaps."""
    form = dice.randrange(3)
    body = dice.choice([HIDDEN, b'{"payload":1}' + HIDDEN, b"0\r\n\r\n" + HIDDEN])
    framing = b"Content-Length: %d" % len(body) if form else b"Transfer-Encoding: chunked"
    body = body if form else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    data = bytearray(dice.choice([b"POST /msg/a", b"PUT /locks/a", b"DELETE /msg/a", b"GET /health"])
                     + b" HTTP/1.1\r\nHost: localhost\r\n" + framing + b"\r\nX-Note: some words\r\n\r\n" + body)
    head = data.index(b"\r\n\r\n") + 8
    for _ in range(dice.randrange(1, 6)):
        place, deed = dice.randrange(head if dice.random() < 0.9 else len(data)), dice.randrange(6)
        if deed == 0:
            data[place:place] = dice.choice(SPLICES)
        elif deed == 1:
            del data[place:place + dice.randrange(1, 5)]
        elif deed == 2:
            data[place:place + 1] = bytes([dice.randrange(256)])
        elif deed == 3:  # at the beginning of a line, where headers are
            data[data.rfind(b"\n", 0, place) + 1:0] = b""
            start = data.rfind(b"\n", 0, place) + 1
            data[start:start] = dice.choice(SPLICES)
        elif deed == 4:
            start, end = sorted((place, dice.randrange(head)))
            data[place:place] = data[start:min(end, start + 60)]
        else:
            data[place:place + 1] = data[place:place + 1].swapcase()
        head = max(8, min(head, len(data) - 1))
    return bytes(data)


def besiege(port, seed, count):
    """Send so many malformed requests; a complaint for each that was answered otherwise than the second reader says, and
    how many requests hidden or not for the canary were honest ones."""
    dice, complaints, honest = random.Random(seed), [], 0
    for _ in range(count):
        data = malformed(dice)
        requests, end = read_strictly(data)
        line = socket.create_connection(("127.0.0.1", port), timeout=8)  # a head may take ten seconds; an answer may not
        answers, said, closed = [], b"", False
        with contextlib.suppress(OSError):
            line.sendall(data)
        with contextlib.suppress(ConnectionResetError, socket.timeout):
            while len(answers) < len(requests) or end == "refuse":
                piece = line.recv(65536)
                if not piece:
                    closed = True
                    break
                said += piece
                answers = re.findall(rb"(?:\A|(?<=[}\n ]))HTTP/1\.1 ([2-5]\d\d) ", said)
        line.close()
        honest += sum(method == "POST" and target == "/msg/canary" and body == b'{"payload":1}'
                      for method, target, body, _ in requests)
        refused = answers and answers[-1][:1] in b"45" and closed
        if len(answers) != len(requests) + (end == "refuse") or end == "refuse" and not refused or b"500" in answers:
            complaints.append(f"{data!r}: read as {requests} and {end}, answered {answers}")
    return complaints, honest


@pytest.mark.parametrize("count", [5_000, pytest.param(500_000, marks=pytest.mark.long)])
def test_bytes_that_are_malformed_hide_nothing(spawned, dice, count):
    began, hands = time.monotonic(), 2
    with concurrent.futures.ThreadPoolExecutor(hands) as pool:
        results = list(pool.map(lambda seed: besiege(spawned.port, seed, count // hands),
                                [dice.random() for _ in range(hands)]))
    complaints = [words for found, _ in results for words in found]
    assert not complaints, f"{len(complaints)} of {count}; the first: {complaints[0]}"
    metrics = spawned.wire.get("/metrics")
    seen = [entry["count"] for entry in spawned.wire.get("/channels")["channels"] if entry["channel"] == "canary"]
    assert sum(seen) <= 10_000 and metrics["threads"] < 50
    last = spawned.wire.get("/activity?type=message.publish&target=canary&limit=1000")["count"]
    honest = sum(number for _, number in results)
    assert honest >= last if count > 10_000 else last == honest, (honest, last)
    record("malformed", began, requests=count, hidden=0)


# ---- fields ---------------------------------------------------------------------------------------------------------

ODD_TEXTS = ["", " ", "a", "a:b:c", "*", "a*", "..", ".", "a/b", "a//b", "0", "-1", "1e3", "null", "true", "30s", "1d",
             "9" * 400, "a" * 101, "a" * 5000, "é", "\u202e", "\0", "a\nb", "\U0001f600", "health", "%s", "${PORT}",
             "'; DROP TABLE LOCKS; --", "http://127.0.0.1:9/", "http://[::1]", "javascript:x", "whsec_AAAA",
             "service.claim", "lock.*", "1-2"]
ODD_VALUES = [None, True, False, 0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**299, 0.5, -0.0, 1e308, [], {}, [[]], [1, "a"],
              {"a": 1}, {"": {"": None}}, [{"text": "x"}], ["a", "b"], [3100, 3101], "x" * 20_000]


def random_request(dice):
    """An operation with fields that fit, nearly fit, or do not fit at all."""
    one = dice.choice([each for each in port_daddy.OPERATIONS if each.name not in ("subscribe", "events")])
    fields = {}
    for name, field in one.fields.items():
        if name in ("timeout", "wait"):
            fields[name] = dice.choice([0, "0ms", 1, -1, "x", None, 10**9])
        elif name != "follow" and (field.required or dice.random() < 0.4):
            fields[name] = dice.choice(ODD_VALUES if dice.random() < 0.4 else ODD_TEXTS)
    if one.name == "poll" or one.name.startswith("wait"):
        fields["timeout"] = 0
    if dice.random() < 0.05:
        fields[dice.choice(["idd", "Id", "__class__", "", "é"])] = 1
    method, path = dice.choice(one.routes)
    for wire_name in re.findall(r"{(\w+)", path):
        value = fields.pop(wire_name, "x")
        text = urllib.parse.quote(value if isinstance(value, str) else json.dumps(value), safe=dice.choice(["", ":/*"]))
        path = re.sub(rf"{{{wire_name}(\.\.\.)?}}", lambda _, text=text: text or "-", path)
    body = b""
    if method in ("POST", "PUT"):
        body = json.dumps(fields, allow_nan=False).encode() if dice.random() < 0.95 else dice.choice(
            [b"", b"[]", b"null", b'{"a":', b'{"payload":NaN}', b"\xff", b'{"payload":"\\ud800"}'])
    elif fields:
        path += "?" + urllib.parse.urlencode({name: value if isinstance(value, str) else json.dumps(value)
                                              for name, value in fields.items()}, errors="replace")
    agents = dice.choice([{}, {"X-Agent-Id": "tester"}, {"X-Pid": "1"}, {"X-Pid": "x"},
                          {"Idempotency-Key": dice.choice("abc")}])
    return method, path[:7000], body, agents


@pytest.mark.parametrize("count", [3_000, pytest.param(200_000, marks=pytest.mark.long)])
def test_fields_of_any_kind_get_an_answer_and_never_a_failure(spawned, dice, count):
    began, line, statuses = time.monotonic(), Line(spawned.port), collections.Counter()
    for _ in range(count):
        method, path, body, headers = random_request(dice)
        reply = line.send(request_bytes(method, path, body, **headers)).reply()
        statuses[reply.status] += 1
        assert reply.status < 500 or reply.status == 501, (method, path, body, headers, reply)
        assert isinstance(reply.body, dict), (method, path, body, reply)
        if reply.status != 200:
            assert reply["code"] in port_daddy.PROBLEMS and reply["success"] is False and "Traceback" not in reply["error"]
        if reply.headers.get("connection") == "close":
            line.close()
            line = Line(spawned.port)
    line.close()
    assert statuses[200] > count / 20 and spawned.process.poll() is None
    assert "Traceback" not in spawned.errors.read_text()
    record("fields", began, requests=count, answered=statuses[200], failures=0)


# ---- numbers --------------------------------------------------------------------------------------------------------


def resident(pid):
    """What a process has: bytes of memory, descriptors, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


@pytest.mark.skipif(not LINUX, reason="what a process has is read from /proc")
@pytest.mark.parametrize("seconds", [4, pytest.param(300, marks=pytest.mark.long)])
def test_a_daemon_under_siege_answers_those_who_only_ask(spawn, seconds):
    """200 idle connections, 500 that wait and 200 that send a byte now and then, with few descriptors left."""
    began, daemon, held = time.monotonic(), spawn().start(), []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (940, 940))
    try:
        for number in range(900):
            line = Line(daemon.port)
            held.append(line)
            if number < 500:
                line.send(request_bytes(path=f"/msg/siege-{number}/poll?timeout=60000"))
            elif number < 700:
                line.send(b"POST /msg/slow HTTP/1.1\r\nHost: loc")
        eventually(lambda: Wire(daemon.port).get("/metrics")["waiters"] == 500)
        asking, times = Line(daemon.port), []
        end_of_siege = time.monotonic() + seconds
        while time.monotonic() < end_of_siege:
            for line in held[500:700]:
                line.send(b"a")
            for _ in range(50):
                asked = time.monotonic()
                assert asking.send(request_bytes()).reply()["status"] == "ok"
                times.append(time.monotonic() - asked)
            with contextlib.suppress(OSError, AssertionError):  # more than there are descriptors: some are turned away
                held.append(Line(daemon.port))
                held.append(Line(daemon.port))
        times.sort()
        p99 = times[len(times) * 99 // 100] * 1000
        print(f"GET /health: p50 {times[len(times) // 2] * 1000:.1f} ms, p99 {p99:.1f} ms, at most {times[-1] * 1000:.0f}")
        assert p99 < (100 if seconds > 60 else 1_000)  # short, it is only to notice who starves
    finally:
        for line in held:
            line.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    eventually(lambda: resident(daemon.process.pid)[2] < 30, 20)  # those who left are noticed, and their threads end
    assert Wire(daemon.port).get("/metrics")["waiters"] == 0
    record("siege", began, waiting=500, slow=200, idle=200, p99=round(p99, 1))


@pytest.mark.skipif(not LINUX, reason="what a process has is read from /proc")
@pytest.mark.parametrize("seconds", [12, pytest.param(1_200, marks=pytest.mark.long)])
def test_a_daemon_that_works_for_long_grows_by_nothing(spawned, seconds):
    """A mixed load that keeps the same things; what it has in the last tenth beside what it had after the first."""
    began, rounds, samples = time.monotonic(), 0, []
    pd = PortDaddy(url=spawned.url, agent_id="soak")
    for number in range(9_800):  # a full channel, so that what is kept has reached its size
        pd.publish("soak", {"n": number})
    while time.monotonic() - began < seconds or rounds < 300:
        rounds += 1
        name = f"soak:{rounds % 50}"
        pd.claim(name)
        token = pd.lock(name, ttl=60_000)["token"]
        pd.publish("soak", {"n": rounds})
        reply = pd.poll("soak", timeout=0, lease=5_000)
        pd.ack("soak", reply["receipt"])
        pd.unlock(name, token=token)
        pd.heartbeat("soak")
        if rounds % 10 == 0:
            stream = Stream(spawned.port, "/msg/soak/subscribe")
            stream.close()
            Line(spawned.port).send(b"GET /heal").close()
            pd.release(name)
        if rounds % 100 == 0:
            samples.append(resident(spawned.process.pid))
    tenth = max(1, len(samples) // 10)
    early, late = ([sorted(column)[tenth // 2] for column in zip(*part)]
                   for part in (samples[tenth:2 * tenth + 1], samples[-tenth:]))
    grown = [after - before for before, after in zip(early, late)]
    print(f"{rounds} rounds: memory {grown[0] / 2**20:+.1f} MiB, descriptors {grown[1]:+d}, threads {grown[2]:+d}")
    assert grown[0] <= 8 * 2**20 and abs(grown[1]) <= 5 and abs(grown[2]) <= 2, (early, late)
    record("soak", began, rounds=rounds, memory=round(grown[0] / 2**20, 1), descriptors=grown[1], threads=grown[2])


# =====================================================================================================================
# FAULT POINTS — one story, told again with a fault at every statement and at every answer
# =====================================================================================================================

# A story is a function of `ask`: what it asks changes every table of the database. It is told once without a fault,
# and what the database holds after each chapter is the truth. Then it is told again, each time in a process of its
# own, with one fault at the n-th step of one kind:
#
#     exit     the process ends, before or after an SQL statement, or in the middle of an answer
#     error    the statement, or the sending of the answer, fails
#     delay    it takes long, and somebody else asks meanwhile
#
# After the fault the database is as it was after the last answered chapter, or after the next one: nothing else is
# allowed. Then the story goes on from there and has to end as it always does, save for the numbers that were skipped.


OPERATION = {one.name: one for one in port_daddy.OPERATIONS}


def operate(daemon, operation, agent=None, key=None, **fields):
    """Ask a daemon in this process, without HTTP; fields by their names on the wire."""
    one = OPERATION[operation]
    path = request_with(one, fields)[1] if key else ""
    return port_daddy.perform(daemon, port_daddy.Asker(agent, key=key), one, path, one.bind(fields, {}))


def life_story(ask):
    """Something of everything that is remembered."""
    hook = ask("add_webhook", url="http://127.0.0.1:9/", events=["*"])["id"]
    ask("claim", id="app:api:main", metadata={"a": 1}, expires=3_600_000)
    ask("claim", id="app:web:main", agent="worker")
    ask("set_endpoint", id="app:api:main", env="prod", url="https://example.org")
    ask("add_logs", id="app:api:main", lines=[{"stream": "stdout", "text": text} for text in ("one", "two")])
    ask("register", id="worker", ttl=60_000, name="Worker")
    token = ask("lock", name="deploy", owner="boss", ttl=600_000)["token"]
    ask("lock", name="shy", owner="worker", ttl=600_000, lockDelay=20_000)
    ask("lock", name="crane", owner="left", limit=2, ttl=30_000)
    ask("lock", name="crane", owner="right", limit=2, ttl=600_000)
    ask("extend_lock", name="deploy", token=token, ttl=700_000)
    for number in range(4):
        ask("publish", channel="tasks", payload={"n": number})
    ask("publish", channel="tasks", payload="brief", expires=10_000)
    ask("poll", channel="tasks", timeout=0, group="bare")
    first = ask("poll", channel="tasks", timeout=0, lease=30_000)["receipt"]
    second = ask("poll", channel="tasks", timeout=0, lease=30_000, maxAttempts=1)["receipt"]
    ask("poll", channel="tasks", timeout=0, lease=300_000, agent="worker")
    ask("touch", channel="tasks", receipt=first, lease=50_000)
    ask("ack", channel="tasks", receipt=first)
    ask("nack", channel="tasks", receipt=second, error="poison")
    ask("redrive", channel="tasks")
    third = ask("poll", channel="tasks", timeout=0, lease=30_000)["receipt"]
    ask("nack", channel="tasks", receipt=third, delay=5_000)
    ask("pass", ms=31_000)  # a seat of the crane, a delay and a message are over
    ask("heartbeat", id="worker")
    ask("test_webhook", id=hook)
    ask("pass", ms=61_000)  # and now the agent, its lock, its task and its service
    ask("unlock", name="deploy", token=token)
    ask("release", id="app:api:main")
    ask("remove_group", channel="tasks", group="bare")
    ask("clear_channel", channel="tasks")
    ask("unregister", id="worker")
    ask("remove_webhook", id=hook)


def opening_story(ask):
    """Nothing is asked: what may fail is the opening of the database, new or of an earlier version."""


class CountedConnection(sqlite3.Connection):
    """A connection to the database; `step` is told of every statement, before and after."""

    count, step = 0, staticmethod(lambda when, number: None)

    def execute(self, *args):
        CountedConnection.count = number = self.count + 1
        self.step("before", number)
        found = super().execute(*args)
        self.step("after", number)
        return found


class CountedSocket:
    """The daemon's end of a connection; `step` is told of every answer, before it is sent and in the middle of it."""

    count, step = 0, staticmethod(lambda when, number: None)

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def sendall(self, data):
        CountedSocket.count = number = self.count + 1
        self.step("before", number)
        self.real.sendall(data[:len(data) // 2])
        self.step("after", number)
        self.real.sendall(data[len(data) // 2:])


class Fault(NamedTuple):
    story: str
    http: bool  # at an answer, else at a statement
    kind: str
    when: str
    number: int


class Telling:
    """One telling of a story. What is answered is noted in a file; a chapter that is noted is only read again."""

    def __init__(self, home, story, http=False):
        self.home, self.path, self.story, self.http = home, home.parent / "notes", story, http
        self.notes = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.clock, self.chapter = FakeClock(), 0
        self.clock.wall = self.clock.awake = 1_800_000_000_000 + sum(note.get("passed", 0) for note in self.notes)
        self.clock.boot = "a boot"
        self.settings = port_daddy.Settings.load({"PORT_DADDY_HOME": str(home), "PORT_DADDY_PORT": "0"})
        self.daemon = self.server = None
        while not self.daemon:
            try:
                self.open()
            except PortDaddyError as problem:
                self.failed(problem)

    def open(self):
        if self.http:
            self.server = port_daddy.Server(self.settings, self.clock)
            self.server.start()
        self.daemon = self.clock.daemon = self.server.daemon if self.http else port_daddy.Daemon(
            self.settings, self.clock)

    def tell(self):
        self.story(self.ask)
        return self

    def ask(self, operation, agent=None, **fields):
        self.chapter, self.asked = self.chapter + 1, operation
        self.until = self.clock.awake + fields.get("ms", 0)
        while self.chapter > len(self.notes):
            try:
                reply = self.perform(operation, agent, fields)
            except (PortDaddyError, OSError, http.client.HTTPException) as problem:
                if getattr(problem, "code", "STORAGE_FULL") == "STORAGE_FULL":
                    self.failed(problem)
                    continue
                reply = {"code": problem.code}  # it was done before, and the answer lost
            self.notes.append({"asked": operation, **reply})
            with open(self.path, "a") as file:
                file.write(json.dumps(self.notes[-1]) + "\n")
            self.told()
        return self.notes[self.chapter - 1]

    def perform(self, operation, agent, fields):
        if operation == "pass":
            self.clock.advance(self.until - self.clock.awake)
            return {"passed": fields["ms"]}
        if not self.http:
            return operate(self.daemon, operation, agent, f"chapter-{self.chapter}", **fields)
        method, path, body = request_with(OPERATION[operation], fields)
        headers = {"Idempotency-Key": f"chapter-{self.chapter}", **({"X-Agent-Id": agent} if agent else {})}
        reply = Wire(self.server.port)(method, path, body, headers).body
        return reply if reply["success"] else {"code": reply["code"]}

    def told(self):
        """Called after each chapter."""

    def failed(self, problem):
        raise AssertionError(f"chapter {self.chapter} failed without a fault") from problem

    def state(self):
        """What the database holds, as text: without the notes of polls and attempts, and what each start says; every
        number that was given out stands as which of them it is, so that skipped ones make no difference."""
        with self.daemon.store.guard:
            def rows(sql):
                return sqlite3.Connection.execute(self.daemon.store._db, sql).fetchall()  # not counted

            tables = rows("SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'META' ORDER BY 1")
            lines = [f"{table} {tuple(row)}" for table, in tables
                     for row in rows(SEEN.get(table) or f"SELECT * FROM {table} ORDER BY 1, 2")]
        given = {}
        return [re.sub(A_NUMBER, lambda one: given.setdefault(one[0], f"<{len(given)}>"), line)
                for line in lines if "daemon.st" not in line and "elsewhere" not in line]


A_NUMBER = r"hook_\w{12}|dlv_\w+|\b[12]\d{6}\b"  # of messages, events, receipts (1…) and locks (2…)
SEEN = {
    "ANSWERS": "SELECT json_remove(reply, '$.waited') FROM ANSWERS ORDER BY id",
    "LINES": "SELECT DISTINCT service, stream, text, at FROM LINES ORDER BY id",
    "READERS": "SELECT channel, team, cursor FROM READERS WHERE cursor",
    "HOOKS": "SELECT id, url, events, active, created FROM HOOKS",
    "DELIVERIES": "SELECT id, hook, event, body FROM DELIVERIES ORDER BY id",
}


class FaultyTelling(Telling):
    """A telling that meets a fault, in a process of its own."""

    def __init__(self, fault, states, home):
        self.fault, self.states, self.failures, self.others = fault, states, [], []
        (CountedSocket if fault.http else CountedConnection).step = staticmethod(self.step)
        super().__init__(home, STORIES[fault.story], fault.http)

    def step(self, when, number):
        if (when, number) != (self.fault.when, self.fault.number):
            return
        if self.fault.kind == "exit":
            os._exit(0)
        if self.fault.kind == "error":
            raise ConnectionResetError() if self.http else sqlite3.OperationalError("disk I/O error")
        if self.daemon:
            self.others.append(in_background(operate, self.daemon, "publish", channel="elsewhere", payload=1))
        time.sleep(0.005)

    def failed(self, problem):
        assert self.fault.kind == "error" and not self.failures, problem
        self.failures.append(problem)
        if not self.daemon:
            os._exit(0)  # a start that failed is over, and is told in a sentence
        if not self.http:
            assert problem.code == "STORAGE_FULL", problem
            assert operate(self.daemon, "health")["status"] == "degraded"
            expect_state(self.state(), self.states[self.chapter - 1:self.chapter + (self.asked == "pass")])

    def tell(self):
        super().tell()
        for other in self.others:
            assert other.result(10)["success"]
        self.daemon.tick(self.daemon.now())
        assert operate(self.daemon, "health")["status"] == "ok"
        expect_state(self.state(), self.states[-1:])


def expect_state(state, allowed):
    """Fail with what is too much and what is missing, compared with the nearest of the states that are allowed."""
    differences = [sorted(set(state) ^ set(each)) for each in allowed]
    assert not min(differences, key=len), [(line in state, line) for line in min(differences, key=len)[:9]]


def in_a_fork(work):
    """Call it in a child that ends in the middle of whatever else it does; whether it came to no harm."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


class Walker:
    """Tells the stories without a fault and then with each; in a process without threads, so that it can fork. The
    world outside (who listens) stands still, and counters are reserved in threes, so that they are often."""

    def __init__(self, folder):
        self.folder, self.rounds = Path(folder), itertools.count()
        port_daddy.port_free, port_daddy.listeners, port_daddy.since_boot = lambda port, reuse=False: True, dict, int
        port_daddy.GRACE, port_daddy.RESERVE = 0, 3
        sqlite3.connect = functools.partial(sqlite3.connect, factory=CountedConnection)
        admit = port_daddy.Connection.__init__
        port_daddy.Connection.__init__ = lambda one, server, real: admit(one, server, CountedSocket(real))
        self.peace: Dict[Any, Any] = {}

    def home(self, story):
        """A new folder as it is when the story begins."""
        home = self.folder / str(next(self.rounds)) / "home"
        home.mkdir(parents=True, mode=0o700)
        if story == "life":
            Telling(home, opening_story).daemon.store.close()
            with contextlib.closing(sqlite3.connect(home / "port_daddy.db")) as database, database:
                database.execute("UPDATE META SET value = 1000000 WHERE key = 'ids'")
                database.execute("UPDATE META SET value = 2000000 WHERE key = 'tokens'")
        elif story == "migration":
            write_version_1(home)
        return home

    def listen(self, story, http):
        """Tell a story in peace: the states after each chapter, what was asked, how many steps there are to fail."""
        home = self.home(story)

        def work():
            CountedConnection.count = CountedSocket.count = 0
            telling = Telling(home, STORIES[story], http)
            states = [telling.state()]
            telling.told = lambda: states.append(telling.state())
            asked = [note["asked"] for note in telling.tell().notes]
            steps = CountedSocket.count if http else CountedConnection.count
            (home / "peace").write_text(json.dumps([states, asked, steps]))

        assert in_a_fork(work)
        return json.loads((home / "peace").read_text())

    def faults(self):
        """Every point, with every kind of fault that there can be."""
        for story, at_answers in (("life", False), ("birth", False), ("migration", False), ("life", True)):
            self.peace[story, at_answers] = _, _, steps = self.listen(story, at_answers)
            for number in range(1, steps + 1):
                for kind, when in (("exit", "before"), ("exit", "after"), ("error", "before"), ("delay", "before")):
                    yield Fault(story, at_answers, kind, when, number)

    def strike(self, fault):
        """Tell a story with a fault; judge what it leaves, and whether the story can go on from there."""
        home, (states, asked, _) = self.home(fault.story), self.peace[fault.story, fault.http]

        def work():
            CountedConnection.count = CountedSocket.count = 0
            FaultyTelling(fault, states, home).tell()

        assert in_a_fork(work)
        after = Telling(home, STORIES[fault.story])
        try:
            answered, state = len(after.notes), after.state()
            expect_state(state, states[answered:answered + 2])
            if state != states[answered] and asked[answered] == "poll":
                return  # given, and nobody knows to whom: the rest would be another story
            expect_state(after.tell().state(), states[-1:])
            assert after.daemon.store.value("PRAGMA integrity_check") == "ok"
            for numbers in ([note["id"] for note in after.notes if note["asked"] == "publish"],
                            [note["token"] for note in after.notes if note["asked"] == "lock"]):
                assert numbers == sorted(set(numbers))
        finally:
            after.daemon.store.close()


STORIES = {"life": life_story, "birth": opening_story, "migration": opening_story}


def walk(folder, count, seed):
    """In a process of its own: so many fault points, drawn by lot, or all (0)."""
    walker = Walker(folder)
    faults = list(walker.faults())
    for fault in random.Random(seed).sample(faults, count) if count else faults:
        try:
            walker.strike(fault)
        except BaseException:
            print(fault, file=sys.stderr)
            raise
        shutil.rmtree(walker.folder / str(next(walker.rounds) - 1))
    print(json.dumps({"points": count or len(faults), "of": len(faults)}))


@pytest.mark.parametrize("count", [50, pytest.param(0, marks=pytest.mark.long)])
def test_a_fault_at_any_statement_or_answer_leaves_all_or_nothing(count, tmp_path, dice):
    began = time.monotonic()
    code = f"import {__name__} as us; us.walk({str(tmp_path)!r}, {count}, {dice.random()})"
    done = subprocess.run([sys.executable, "-c", code], env=environment(PYTHONPATH=Path(__file__).parent), text=True,
                          capture_output=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    record("faults", began, **json.loads(done.stdout))


# ---- the database of version 1 --------------------------------------------------------------------------------------

VERSION_1 = """
CREATE TABLE META (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE EVENTS (
  id INTEGER PRIMARY KEY, at INTEGER NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL, agent TEXT,
  facts TEXT NOT NULL);
CREATE TABLE SERVICES (
  id TEXT PRIMARY KEY, port INTEGER NOT NULL UNIQUE, pid INTEGER, birth INTEGER, claimer INTEGER, agent TEXT,
  status TEXT NOT NULL, cmd TEXT, cwd TEXT, created INTEGER NOT NULL, seen INTEGER NOT NULL, born INTEGER NOT NULL,
  expires INTEGER, ttl INTEGER, pair TEXT, endpoints TEXT NOT NULL, metadata TEXT,
  health TEXT, healthy INTEGER, latency INTEGER, error TEXT, checked INTEGER, checker TEXT);
CREATE TABLE FORMER_PORTS (id TEXT PRIMARY KEY, port INTEGER NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE LINES (
  id INTEGER PRIMARY KEY, service TEXT NOT NULL, stream TEXT NOT NULL, text TEXT NOT NULL, at INTEGER NOT NULL);
CREATE INDEX LINES_OF_SERVICE ON LINES (service, id);
CREATE TABLE CHANNELS (
  name TEXT PRIMARY KEY, count INTEGER NOT NULL, bytes INTEGER NOT NULL, last INTEGER NOT NULL,
  dropped INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE MESSAGES (
  id INTEGER PRIMARY KEY, channel TEXT NOT NULL, payload TEXT NOT NULL, sender TEXT, created INTEGER NOT NULL,
  expires INTEGER, ttl INTEGER);
CREATE INDEX MESSAGES_OF_CHANNEL ON MESSAGES (channel, id);
CREATE INDEX MESSAGES_THAT_EXPIRE ON MESSAGES (expires) WHERE expires IS NOT NULL;
CREATE TABLE READERS (
  channel TEXT NOT NULL, team TEXT NOT NULL, cursor INTEGER NOT NULL, polled INTEGER NOT NULL,
  PRIMARY KEY (channel, team)) WITHOUT ROWID;
CREATE TABLE RETURNED (
  channel TEXT NOT NULL, team TEXT NOT NULL, message INTEGER NOT NULL,
  PRIMARY KEY (channel, team, message)) WITHOUT ROWID;
CREATE TABLE LOCKS (
  name TEXT PRIMARY KEY, owner TEXT, token INTEGER NOT NULL, pid INTEGER, birth INTEGER, acquired INTEGER NOT NULL,
  expires INTEGER NOT NULL, ttl INTEGER NOT NULL, metadata TEXT) WITHOUT ROWID;
CREATE TABLE AGENTS (
  id TEXT PRIMARY KEY, name TEXT, type TEXT NOT NULL, pid INTEGER, birth INTEGER, registered INTEGER NOT NULL,
  heartbeat INTEGER NOT NULL, expires INTEGER NOT NULL, ttl INTEGER NOT NULL, alive INTEGER, max_services INTEGER,
  max_locks INTEGER, metadata TEXT) WITHOUT ROWID;
CREATE TABLE HOOKS (
  id TEXT PRIMARY KEY, url TEXT NOT NULL, events TEXT NOT NULL, secret TEXT, filter TEXT, active INTEGER NOT NULL,
  created INTEGER NOT NULL, triggered INTEGER, successes INTEGER NOT NULL, failures INTEGER NOT NULL, metadata TEXT)
  WITHOUT ROWID;
CREATE TABLE DELIVERIES (
  id INTEGER PRIMARY KEY, hook TEXT NOT NULL, event TEXT NOT NULL, body TEXT NOT NULL, status TEXT NOT NULL,
  attempts INTEGER NOT NULL, response INTEGER, duration INTEGER, due INTEGER, error TEXT, created INTEGER NOT NULL);
CREATE INDEX DELIVERIES_DUE ON DELIVERIES (hook, due) WHERE due IS NOT NULL;
CREATE INDEX DELIVERIES_OF_HOOK ON DELIVERIES (hook, id);
"""


def write_version_1(home, now=port_daddy.Now(1_800_000_000_000, 1_800_000_000_000, "a boot")):  # noqa: B008
    """A database as version 1 left it, with something in every table; its last id is 2000, its last token 50."""
    rows = {
        "META": [("ids", 2_000), ("tokens", 50), ("forgotten", 3), ("boot", now.boot), ("tag", "c0ffee00")],
        "EVENTS": [(number, now.wall, "lock.acquire", "deploy", "boss", '{"token":41}') for number in (4, 5)],
        "SERVICES": [("app:api:main", 3456, None, None, None, "worker", "assigned", "npm start", "/srv", now.wall,
                      now.wall, 0, now.awake + 900_000, 900_000, None, '{"local":"http://localhost:3456"}', '{"a":1}',
                      *[None] * 6)],
        "FORMER_PORTS": [("app:gone:main", 3999, now.wall)],
        "LINES": [(6, "app:api:main", "stdout", "hello", now.wall)],
        "CHANNELS": [("tasks", 4, 4, 13, 9)],
        "MESSAGES": [(number, "tasks", str(number % 10), None, now.wall, None, None) for number in (10, 11, 12)]
        + [(13, "tasks", "3", "boss", now.wall, now.awake + 50_000, 50_000)],
        "READERS": [("tasks", "default", 12, now.wall), ("tasks", "other", 13, now.wall)],
        "RETURNED": [("tasks", "default", 10), ("tasks", "default", 12)],
        "LOCKS": [("deploy", "boss", 41, None, None, now.wall, now.awake + 600_000, 600_000, '{"why":"release"}')],
        "AGENTS": [("worker", "Worker", "cli", None, None, now.wall, now.wall, now.awake + 60_000, 60_000, 1, None, 9,
                    None),
                   ("ghost", None, "cli", None, None, now.wall, now.wall, now.awake - 1, 60_000, *[None] * 4)],
        "HOOKS": [("hook_c0ffeec0ffee", "http://127.0.0.1:9/", '["lock.*"]', "a-good-secret", None, 0, now.wall, None,
                   1, 2, None)],
        "DELIVERIES": [(14, "hook_c0ffeec0ffee", "lock.acquire", '{"id":5}', "pending", 1, None, None, now.awake,
                        "no", now.wall)],
    }
    home.mkdir(mode=0o700, exist_ok=True)
    with contextlib.closing(sqlite3.connect(home / "port_daddy.db")) as database, database:
        database.executescript("PRAGMA page_size=1024; PRAGMA journal_mode=WAL;" + VERSION_1)
        for table, values in rows.items():
            for row in values:
                database.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(row))})", row)
        database.execute("PRAGMA user_version=1")


def test_a_database_of_version_1_is_there_after_its_migration(make_server, clock, tmp_path):
    write_version_1(tmp_path / "old", clock.now())
    server = make_server(clock=clock, home=tmp_path / "old")
    pd = PortDaddy(url=server.url)
    clock.advance(5_001)  # the grace of a restart
    lock = pd.check_lock("deploy", token=41)
    assert (lock["owner"], lock["valid"], lock["limit"], lock["metadata"]) == ("boss", True, 1, {"why": "release"})
    assert lock["expiresAt"] == clock.wall + 600_000 - 1  # it stood still during the grace
    service = pd.get_service("app:api:main")
    assert (service["port"], service["agentId"], service["metadata"]) == (3456, "worker", {"a": 1})
    assert [line["text"] for line in pd.get_logs("app:api:main")["lines"]] == ["hello"]
    assert pd.get_messages("tasks", after=5)["gap"]["to"] == 9
    assert [(one["id"], one["payload"]) for one in pd.get_messages("tasks")["messages"]] == [
        (10, 0), (11, 1), (12, 2), (13, 3)]
    groups = [(one["group"], one["backlog"], one["leased"], one["dead"]) for one in pd.list_groups("tasks")["groups"]]
    assert groups == [("default", 3, 0, 0), ("other", 0, 0, 0)]
    worked = [pd.poll("tasks", timeout=0, lease=1_000) for _ in range(4)]
    assert [one["message"] and one["message"]["id"] for one in worked] == [10, 12, 13, None]
    assert [one["attempt"] for one in worked[:3]] == [1, 1, 1]
    assert {one["id"]: one["isActive"] for one in pd.list_agents()["agents"]} == {"worker": True, "ghost": False}
    assert pd.get_agent("worker")["agent"]["maxLocks"] == 9
    hook = pd.get_webhook("hook_c0ffeec0ffee")
    assert (hook["active"], hook["hasSecret"], hook["successCount"], hook["failureCount"]) == (False, True, 1, 2)
    delivery, = pd.list_deliveries("hook_c0ffeec0ffee")["deliveries"]
    assert (delivery["id"], delivery["status"], delivery["attempts"]) == ("dlv_c0ffee00_14", "pending", 1)
    assert {4, 5} <= {entry["id"] for entry in pd.get_activity(type="lock.acquire")["entries"]}
    assert pd.claim("app:gone:main")["port"] == 3999
    assert pd.publish("tasks", "new")["id"] > 2_000 and pd.lock("other")["token"] > 50
    clock.advance(600_000)
    assert pd.check_lock("deploy")["held"] is False


@pytest.mark.parametrize("rounds", [10, pytest.param(500, marks=pytest.mark.long)])
def test_kills_in_start_up_and_migration_lose_nothing(rounds, spawn, dice):
    began, daemon, migrated, up = time.monotonic(), spawn(PORT_DADDY_RANGE="3100-9999"), 0, 0
    now, lock, span = port_daddy.Clock().now(), daemon.home / "daemon.lock", 0.2
    write_version_1(daemon.home, now)
    for _ in range(rounds):
        with contextlib.suppress(FileNotFoundError):
            lock.unlink()
        process = subprocess.Popen([*PROGRAM, "serve"], env=daemon.environment(),
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 20
        while not lock.exists():  # which it takes just before it opens the database
            assert time.monotonic() < deadline
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(dice.random() * span)
        process.kill()
        said = process.communicate()[0].decode()
        assert re.fullmatch(r"(port-daddy \S+ listening on \S+\n)?", said)
        up += said != ""
        span *= 0.8 if said else 1.1  # so that some are killed late, and most in the middle of it
        for path in daemon.home.iterdir():
            assert "corrupt" not in path.name
        database = sqlite3.connect(daemon.home / "port_daddy.db")
        with contextlib.closing(database):
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            version = database.execute("PRAGMA user_version").fetchone()[0]
            assert database.execute("SELECT token FROM LOCKS").fetchall() == [(41,)]
            returned = "SELECT message FROM RETURNED" if version == 1 else "SELECT message FROM TASKS"
            assert database.execute(returned).fetchall() == [(10,), (12,)]
            assert database.execute("SELECT count(*) FROM EVENTS WHERE kind = 'lock.acquire'").fetchone() == (2,)
        if version == 2:
            migrated += 1
            if migrated % 2:  # half of the starts find a folder that one of them has migrated
                for path in daemon.home.glob("port_daddy.db*"):
                    path.unlink()
                write_version_1(daemon.home, now)
    wire = daemon.start().wire
    assert wire.get("/locks/deploy?token=41")["valid"] is True
    assert wire.get("/msg/tasks/poll?timeout=0")["message"]["id"] == 10
    assert wire.post("/msg/tasks", {"payload": 1})["id"] > 2_000
    assert rounds < 100 or rounds / 10 < migrated < rounds and up < rounds / 2, (migrated, up)  # few may all be too early
    record("starts", began, kills=rounds, migrated=migrated, lost=0)


# =====================================================================================================================
# STORAGE — no room, damage, folders that are not ours
# =====================================================================================================================


def serve_in(home, **more):
    """A start that is expected to fail: its status, and what it said."""
    done = subprocess.run([*PROGRAM, "serve"], capture_output=True, text=True, timeout=20,
                          env=environment(PORT_DADDY_HOME=home, PORT_DADDY_PORT=0, **more))
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.skipif(not LINUX, reason="only Linux can change the limits of another process")
def test_a_full_disk_is_said_harms_nothing_and_is_over_when_there_is_room(spawned):
    wire, written = spawned.wire, []
    log_file = spawned.home / "port_daddy.db-wal"
    wire.post("/msg/tasks", {"payload": "taken"})
    most = log_file.stat().st_size + 50_000
    resource.prlimit(spawned.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    for number in itertools.count():
        answer = wire.post("/msg/load", {"payload": f"{number}" * 1_000})
        if answer.status != 200:
            break
        written.append(answer["id"])
    assert (answer.status, answer["code"]) == (507, "STORAGE_FULL") and written
    for attempt in range(5):  # every kind of write, more than once
        assert wire.post("/msg/load", {"payload": "x" * 100_000}).status == 507
        assert wire.post("/claim", {"id": f"never:{attempt}"}).status == 507
        assert wire.post(f"/locks/never-{attempt}", {"owner": "a"}).status == 507
        assert wire.get("/msg/tasks/poll?timeout=0").status == 507
        assert wire.get("/health")["status"] == "degraded"
    assert [message["id"] for message in wire.get("/msg/load?after=0&limit=1000")["messages"]] == written
    assert wire.get("/services")["count"] == wire.get("/locks")["count"] == 0
    assert "lock.acquire" not in [entry["type"] for entry in wire.get("/activity")["entries"]]
    resource.prlimit(spawned.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    eventually(lambda: wire.get("/health")["status"] == "ok", 5)  # by itself
    assert wire.get("/msg/tasks/poll?timeout=0")["message"]["payload"] == "taken"
    written.append(wire.post("/msg/load", {"payload": "room"})["id"])
    spawned.kill()
    wire = spawned.start().wire
    assert [message["id"] for message in wire.get("/msg/load?after=0&limit=1000")["messages"]] == written
    assert wire.get("/health")["status"] == "ok" and wire.get("/msg/tasks/poll?timeout=0")["message"] is None


def zeroed_table(path):
    """A database in which the first page of the messages is zeros, and everything else as it was."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        page, = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'MESSAGES'").fetchone()
        size, = database.execute("PRAGMA page_size").fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * size:page * size] = bytes(size)
    return bytes(content)


@pytest.mark.parametrize(("damage", "salvaged"), [
    (zeroed_table, 40),
    (lambda path: path.read_bytes()[:len(path.read_bytes()) // 2 // 1024 * 1024], None),
    (lambda path: path.read_bytes()[:20_000] + bytes(8_192) + path.read_bytes()[28_192:], None),
    (lambda path: random.Random(1).randbytes(path.stat().st_size), 0),
    (lambda path: b"These are my notes.\n" * 500, 0),
    (lambda path: path.read_bytes()[:100], 0),
], ids=["a page", "the second half", "the middle", "everything", "a text", "all but the head"])
def test_a_damaged_database_is_moved_aside_and_what_can_be_read_is_kept(damage, salvaged, spawned):
    wire, path = spawned.wire, spawned.home / "port_daddy.db"
    ports = {f"app:s{number}": wire.post("/claim", {"id": f"app:s{number}"})["port"] for number in range(40)}
    token = wire.post("/locks/a", {"owner": "a"})["token"]
    last = [wire.post("/msg/tasks", {"payload": "x" * 500})["id"] for _ in range(60)][-1]
    spawned.terminate()
    damaged = damage(path)
    path.write_bytes(damaged)
    wire = spawned.start().wire
    aside, = [each for each in spawned.home.iterdir() if each.name.startswith("port_daddy.db.corrupt-")]
    assert aside.read_bytes() == damaged and aside.stat().st_mode & 0o077 == 0
    assert "DAMAGED" in spawned.errors.read_text() and aside.name in spawned.errors.read_text()
    kept = {service["id"]: service["port"] for service in wire.get("/services")["services"]}
    assert kept.items() <= ports.items() and (salvaged is None or len(kept) == salvaged)
    assert wire.post("/msg/tasks", {"payload": 1})["id"] > last
    assert wire.post("/locks/a", {"owner": "b"})["token"] > token
    assert wire.get("/health")["status"] == "ok"
    assert not [each.name for each in spawned.home.iterdir() if "salvage" in each.name]


def test_a_database_of_a_newer_version_is_left_alone(tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(home / "port_daddy.db")) as database:
        database.executescript("CREATE TABLE FUTURE (x); INSERT INTO FUTURE VALUES (1); PRAGMA user_version=99")
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in home.iterdir()}
    status, said = serve_in(home)
    assert status == 1 and said.count("\n") == 1 and "newer" in said
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in home.iterdir()}
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) <= {"daemon.lock"}


@pytest.mark.skipif(not LINUX, reason="/sys is a folder of Linux in which nobody makes another")
def test_a_folder_that_cannot_be_made_is_said_in_one_line():
    status, said = serve_in("/sys/port-daddy")
    assert status == 1 and said.count("\n") == 1 and "/sys/port-daddy" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of somebody else")
def test_a_folder_of_another_user_is_refused_in_one_line(tmp_path):
    home = tmp_path / "theirs"
    home.mkdir(mode=0o700)
    os.chown(home, 65534, 65534)
    status, said = serve_in(home)
    assert status == 1 and said.count("\n") == 1 and "another user" in said
    assert list(home.iterdir()) == []


def test_a_daemon_whose_folder_is_deleted_ends_and_leaves_the_next_one_alone(spawn):
    first = spawn().start()
    shutil.rmtree(first.home)
    second = spawn()
    second.home = first.home  # where the first one still believes to be at home
    second.start()
    assert first.process.wait(5) == 1
    assert "deleted or replaced" in first.errors.read_text()
    assert json.loads((second.home / "daemon.json").read_text())["pid"] == second.process.pid
    assert second.wire.post("/msg/tasks", {"payload": 1}).status == 200


@pytest.mark.parametrize(("name", "most", "payload"), [("KEEP_MESSAGES", 10, "x"), ("KEEP_BYTES", 1_020, "x" * 100)])
def test_a_channel_is_full_when_a_leasing_group_has_not_done_with_it(name, most, payload, monkeypatch, wire):
    monkeypatch.setattr(port_daddy, name, most)
    for _ in range(15):  # the oldest go, while nobody works on them
        assert wire.post("/msg/tasks", {"payload": payload}).status == 200
    task = wire.get("/msg/tasks/poll?timeout=0&group=builders&lease=60000")
    kept = [message["id"] for message in wire.get("/msg/tasks")["messages"]]
    refused = wire.post("/msg/tasks", {"payload": payload})
    assert (refused.status, refused["code"], refused["group"]) == (507, "CHANNEL_FULL", "builders")
    assert [message["id"] for message in wire.get("/msg/tasks")["messages"]] == kept  # nothing half-done
    assert wire.get("/health")["status"] == "ok" and wire.post("/msg/other", {"payload": 1}).status == 200
    assert wire.post("/msg/tasks/ack", {"group": "builders", "receipt": task["receipt"]}).status == 200
    assert wire.post("/msg/tasks", {"payload": payload}).status == 200
    assert wire.post("/msg/tasks", {"payload": payload})["code"] == "CHANNEL_FULL"
    assert wire.delete("/msg/tasks/groups/builders")["removed"] is True
    assert wire.post("/msg/tasks", {"payload": payload}).status == 200


def test_a_group_that_nobody_polled_for_a_day_holds_nothing_back(monkeypatch, clock, wire):
    monkeypatch.setattr(port_daddy, "KEEP_MESSAGES", 3)
    wire.get("/msg/tasks/poll?timeout=0&group=gone&lease=1000")
    for _ in range(3):
        wire.post("/msg/tasks", {"payload": 1})
    assert wire.post("/msg/tasks", {"payload": 1})["code"] == "CHANNEL_FULL"
    clock.advance(86_400_001)
    assert wire.post("/msg/tasks", {"payload": 1}).status == 200


def test_a_full_database_forgets_activity_first_then_messages_that_nobody_wants_then_refuses(
        monkeypatch, make_server, clock):
    monkeypatch.setattr(port_daddy, "MAX_DATABASE", 1024 * 1024)
    monkeypatch.setattr(port_daddy, "KEEP_EVENTS", 1_000)
    server = make_server(clock=clock)
    wire, refused = Wire(server.port), 0
    wire.get("/msg/wanted/poll?timeout=0&group=g&lease=1000")
    wanted = [wire.post("/msg/wanted", {"payload": "x" * 1_000})["id"] for _ in range(200)]
    wire.post("/msg/idle", {"payload": "the oldest"})
    with server.daemon.write() as tx:
        for number in range(900):
            tx.emit("lock.acquire", "a", None, lockName="a", owner="x" * 200, token=number, expiresAt=0)

    def fill(channel):
        """Publish until there is no room, give the daemon a minute, and tell what is left."""
        nonlocal refused
        answer = wire.post(f"/msg/{channel}", {"payload": "x" * 4_000})
        while answer.status == 200:
            answer = wire.post(f"/msg/{channel}", {"payload": "x" * 4_000})
        assert answer["code"] == "STORAGE_FULL"
        refused += 1
        clock.advance(60_001)
        channels = {each["channel"]: each["count"] for each in wire.get("/channels")["channels"]}
        return wire.get("/metrics")["events"], channels

    counts, before = [], 901
    while not counts or counts[-1][0] >= 100:  # a tenth of KEEP_EVENTS: activity goes, by halves, nothing else
        counts.append(fill("load"))
        assert counts[-1][0] < before and (counts[-1][1]["idle"] == 1 or counts[-1][0] < 100), counts
        before = counts[-1][0]
    assert fill("load")[1]["idle"] == 0  # and then the oldest messages
    for _ in range(40):
        left = fill("wanted")[1]
        if left["load"] == 0 and wire.post("/msg/wanted", {"payload": "x" * 4_000}).status == 507:
            break
    kept = [message["id"] for message in wire.get("/msg/wanted?after=0&limit=1000")["messages"]]
    assert kept[:200] == wanted
    wire.delete("/msg/wanted")
    clock.advance(60_001)
    assert wire.get("/health")["status"] == "ok" and wire.post("/msg/load", {"payload": "x" * 4_000}).status == 200


# =====================================================================================================================
# MODEL — random operations beside a dictionary, with jumps of the clock, restarts and reboots
# =====================================================================================================================

CHANNELS, TEAMS, LOCK_NAMES, AGENTS = ("tasks", "mail"), ("red", "blue"), ("x", "y"), ("ann", "bob")
KINDS = (["publish"] * 6 + ["take"] * 3 + ["lease"] * 7 + ["ack"] * 3 + ["nack"] * 3 + ["touch", "redrive", "clear"]
         + ["lock"] * 8 + ["extend"] * 2 + ["unlock"] * 3 + ["register", "beat", "again"] + ["pass"] * 6
         + ["stall", "jump", "restart", "reboot"])


def random_steps(dice, count):
    """What to do, without looking at what comes of it: so any step can be left out."""
    for _ in range(count):
        kind = dice.choice(KINDS)
        yield {"do": kind, "channel": "mail" if kind == "clear" else dice.choice(CHANNELS),
               "group": dice.choice(TEAMS), "name": dice.choice(LOCK_NAMES), "agent": dice.choice(AGENTS),
               "which": dice.randrange(4), "ttl": dice.choice([500, 3_000, 20_000, 90_000]),
               "delay": dice.choice([0, 0, 2_000]), "limit": dice.choice([1, 1, 2]), "most": dice.choice([1, 2, 5]),
               "expires": dice.choice([None, 10_000]), "ms": dice.choice([1, 100, 499, 500, 3_000, 30_000])}


class Machine:
    """A daemon and the model of it. Each method does one step to both, and compares what they say."""

    def __init__(self, home):
        self.clock, self.daemon = FakeClock(), None
        self.settings = port_daddy.Settings.load({"PORT_DADDY_HOME": str(home), "PORT_DADDY_PORT": "0"})
        home.mkdir(parents=True, mode=0o700)
        self.now, self.pause, self.highest, self.numbers = 0, 0, {"id": 0, "token": 0}, itertools.count()
        self.held: Dict[Any, Any] = {name: {} for name in LOCK_NAMES}  # token -> owner, until, ttl, limit, delay
        self.closed: Dict[Any, Any] = {}  # lock -> until, ttl
        self.alive: Dict[Any, Any] = {}  # agent -> until, ttl
        self.messages: Dict[Any, Any] = {name: {} for name in CHANNELS}  # id -> until, ttl
        self.groups: Dict[Any, Any] = {}  # channel, group -> cursor and tasks: id -> state, receipt, …
        self.receipts, self.tokens, self.keyed = [], [], []
        self.start()

    def start(self):
        self.daemon = self.clock.daemon = port_daddy.Daemon(self.settings, self.clock)

    def ask(self, operation, agent=None, key=None, **fields):
        try:
            return operate(self.daemon, operation, agent, key, **fields)
        except PortDaddyError as problem:
            return {"code": problem.code}

    def grown(self, kind, number):
        assert number > self.highest[kind]
        self.highest[kind] = number
        return number

    def step(self, step):
        getattr(self, "do_" + step["do"])(**step)

    # time

    def sweep(self):
        over = {"until": self.now}
        for name, holders in self.held.items():
            for token in [token for token, one in holders.items() if one["until"] <= over["until"]]:
                self.expire(name, token)
        self.closed = {name: one for name, one in self.closed.items() if one["until"] > self.now}
        for agent in [agent for agent, one in self.alive.items() if one["until"] <= self.now]:
            del self.alive[agent]
            for name, holders in self.held.items():
                for token in [token for token, one in holders.items() if one["owner"] == agent]:
                    self.expire(name, token)
            self.fail(lambda task, agent=agent: task["agent"] == agent and task["state"] == "leased")
        for channel in CHANNELS:
            self.drop(channel, [id for id, one in self.messages[channel].items() if one["until"] <= self.now])
        self.fail(lambda task: task["state"] == "leased" and task["until"] <= self.now)

    def expire(self, name, token):
        lost = self.held[name].pop(token)
        if lost["delay"]:
            self.closed[name] = {"until": self.now + lost["delay"], "ttl": lost["delay"]}

    def fail(self, condition, delay=0):
        """Tasks whose lease came to nothing wait again, or are dead."""
        for (channel, _), group in self.groups.items():
            for id, task in [(id, task) for id, task in group["tasks"].items() if condition(task)]:
                if id not in self.messages[channel]:
                    del group["tasks"][id]
                task.update(state="dead" if task["attempts"] >= task["most"] else "waiting", agent=None, receipt=None,
                            until=self.now + delay, ttl=delay)

    def drop(self, channel, ids):
        for id in ids:
            del self.messages[channel][id]
            for team in TEAMS:
                tasks = self.groups.get((channel, team), {"tasks": {}})["tasks"]
                if id in tasks and tasks[id]["state"] != "leased":
                    del tasks[id]

    def later(self, ms):
        self.now, self.pause = self.now + max(0, ms - self.pause), max(0, self.pause - ms)

    def leased(self):
        """Everything that has a lease: what a restart gives a grace, and what a reboot begins anew."""
        tasks = [task for group in self.groups.values() for task in group["tasks"].values()]
        return [*[one for holders in self.held.values() for one in holders.values()], *self.alive.values(),
                *[task for task in tasks if task["state"] == "leased" or task["state"] == "waiting" and task["ttl"]
                  and task["until"] > self.now]]

    def do_pass(self, ms, **_):
        self.clock.advance(ms)
        self.later(ms)
        self.sweep()

    def do_stall(self, ms, **_):
        self.daemon.leases.expect(0)
        self.clock.stall(ms + 1_001)
        self.pause = max(5_000, ms + 1_001)  # it stood still, and goes on doing so for a while
        self.sweep()

    def do_jump(self, which, **_):
        self.clock.wall += (which * 2 - 3) * 365 * 86_400_000

    def do_restart(self, ms, **_):
        self.daemon.store.close(clean=bool(ms % 2))
        self.clock.wall, self.clock.awake = self.clock.wall + ms, self.clock.awake + ms
        graceful = self.leased()
        self.later(ms)  # the time without a daemon counts, but what it has ended begins with the grace
        for one in graceful:
            one["until"] = max(one["until"], self.now + 1)
        self.pause = 5_000 if graceful else self.pause
        self.start()
        self.daemon.tick(self.daemon.now())
        self.sweep()

    def do_reboot(self, ms, **_):
        self.daemon.store.close()
        self.clock.boot, self.clock.awake = f"boot {next(self.numbers)}", ms + 10_000
        graceful = self.leased()
        messages = [one for kept in self.messages.values() for one in kept.values()]
        for one in [*graceful, *self.closed.values(), *messages]:
            one["until"] = self.now + one["ttl"]
        self.pause = 5_000 if graceful else 0
        self.start()
        self.daemon.tick(self.daemon.now())

    # channels

    def do_publish(self, channel, which, expires, **_):
        fields = {"channel": channel, "payload": which, **({"expires": expires} if expires else {})}
        key = f"key-{next(self.numbers)}"
        reply = self.ask("publish", key=key, **fields)
        ttl = expires or float("inf")
        self.messages[channel][self.grown("id", reply["id"])] = {"until": self.now + ttl, "ttl": ttl}
        self.keyed = [*self.keyed, ("publish", key, fields, reply)][-4:]

    def do_again(self, which, **_):
        for operation, key, fields, reply in self.keyed[which:which + 1]:
            assert self.ask(operation, key=key, **fields) == reply
            assert self.ask(operation, key=key, **{**fields, "channel": fields["channel"], "payload": "other"}) == {
                "code": "KEY_REUSED"}

    def next_task(self, channel, team):
        group = self.groups.setdefault((channel, team), {"cursor": 0, "tasks": {}})
        back = [id for id, task in group["tasks"].items() if task["state"] == "waiting" and task["until"] <= self.now]
        new = [id for id in self.messages[channel] if id > group["cursor"]]
        id = min(back, default=None) if back else min(new, default=None)
        if id is not None:
            group["cursor"] = max(group["cursor"], id)
        return group["tasks"], id

    def do_take(self, channel, group, **_):
        tasks, id = self.next_task(channel, group)
        reply = self.ask("poll", channel=channel, group=group, timeout=0)
        assert (reply["message"] and reply["message"]["id"]) == id
        tasks.pop(id, None)

    def do_lease(self, channel, group, ttl, most, agent, which, **_):
        tasks, id = self.next_task(channel, group)
        agent = agent if which else None
        reply = self.ask("poll", agent, channel=channel, group=group, timeout=0, lease=ttl, maxAttempts=most)
        assert (reply["message"] and reply["message"]["id"]) == id
        if id is not None:
            attempts = tasks[id]["attempts"] + 1 if id in tasks else 1
            assert reply["attempt"] == attempts
            assert reply["leaseExpiresAt"] == self.clock.wall + self.pause + ttl
            tasks[id] = {"state": "leased", "receipt": reply["receipt"], "attempts": attempts, "most": most,
                         "until": self.now + ttl, "ttl": ttl, "agent": agent}
            self.receipts = [*self.receipts, (channel, group, id, reply["receipt"])][-4:]

    def do_ack(self, do, which, delay, ttl, **_):
        for channel, team, id, receipt in self.receipts[which:which + 1]:
            tasks = self.groups[channel, team]["tasks"]
            runs = id in tasks and tasks[id]["receipt"] == receipt
            more = {"nack": {"delay": delay}, "touch": {"lease": ttl}}.get(do, {})
            reply = self.ask(do, channel=channel, group=team, receipt=receipt, **more)
            assert reply.get("code") == (None if runs else "STALE_RECEIPT")
            if runs and do == "ack":
                del tasks[id]
            elif runs and do == "touch":
                tasks[id].update(until=self.now + ttl, ttl=ttl)
            elif runs:
                task = tasks[id]
                self.fail(lambda one, task=task: one is task, delay)
                assert reply["dead"] == (task["state"] == "dead" and id in tasks)

    do_nack = do_touch = do_ack

    def do_redrive(self, channel, group, **_):
        tasks = self.groups.get((channel, group), {"tasks": {}})["tasks"]
        dead = [task for task in tasks.values() if task["state"] == "dead"]
        for task in dead:
            task.update(state="waiting", attempts=0, until=0, ttl=0)
        assert self.ask("redrive", channel=channel, group=group)["redriven"] == len(dead)

    def do_clear(self, channel, **_):
        assert self.ask("clear_channel", channel=channel)["deleted"] == len(self.messages[channel])
        self.drop(channel, list(self.messages[channel]))

    # locks and agents

    def do_lock(self, name, agent, ttl, limit, delay, **_):
        holders = self.held[name]
        reply = self.ask("lock", name=name, owner=agent, ttl=ttl, limit=limit, lockDelay=delay)
        if any(one["limit"] != limit for one in holders.values()):
            expected = "LIMIT_MISMATCH"
        else:
            expected = "LOCK_HELD" if name in self.closed or len(holders) >= limit else None
        assert reply.get("code") == expected
        if expected is None:
            holders[self.grown("token", reply["token"])] = {
                "owner": agent, "until": self.now + ttl, "ttl": ttl, "limit": limit, "delay": delay}
            self.tokens = [*self.tokens, (name, reply["token"])][-4:]

    def do_extend(self, do, which, ttl, **_):
        for name, token in self.tokens[which:which + 1]:
            current = token in self.held[name]
            operation, more = ("extend_lock", {"ttl": ttl}) if do == "extend" else ("unlock", {})
            reply = self.ask(operation, name=name, token=token, **more)
            assert reply.get("code") == (None if current else "LOCK_LOST")
            if current and do == "extend":
                self.held[name][token].update(until=self.now + ttl, ttl=ttl)
            elif current:
                del self.held[name][token]

    do_unlock = do_extend

    def do_register(self, agent, ttl, **_):
        self.ask("register", id=agent, ttl=ttl)
        self.alive[agent] = {"until": self.now + ttl, "ttl": ttl}

    def do_beat(self, agent, **_):
        if agent in self.alive:
            self.ask("heartbeat", id=agent)
            self.alive[agent]["until"] = self.now + self.alive[agent]["ttl"]

    def compare(self):
        """Everything that can be seen."""
        for name, holders in self.held.items():
            assert [one["token"] for one in self.ask("check_lock", name=name)["holders"]] == sorted(holders)
        alive = [one["id"] for one in self.ask("list_agents", active=True)["agents"]]
        assert sorted(alive) == sorted(self.alive)
        for channel, kept in self.messages.items():
            groups = {one["group"]: (one["backlog"], one["leased"], one["dead"])
                      for one in self.ask("list_groups", channel=channel)["groups"]}
            for team in TEAMS:
                if (channel, team) in self.groups:
                    group = self.groups[channel, team]
                    states = [task["state"] for task in group["tasks"].values()]
                    new = sum(id > group["cursor"] for id in kept)
                    expected = new + states.count("waiting"), states.count("leased"), states.count("dead")
                    assert groups[team] == expected, (channel, team)
            shown = self.ask("get_messages", channel=channel, limit=1000)["messages"]
            assert [message["id"] for message in shown] == sorted(kept)[-1000:]


def first_failure(home, steps):
    """Do the steps; the number of the one that went wrong and what was wrong with it, or None."""
    machine, number = Machine(home), 0
    try:
        for number, step in enumerate(steps):
            machine.step(step)
            if number % 25 == 24 or step["do"] in ("pass", "stall", "restart", "reboot"):
                machine.compare()
        machine.compare()
    except Exception:
        return number, traceback.format_exc(limit=-2)
    finally:
        machine.daemon.store.close()
        shutil.rmtree(home)
    return None


def shrunk(home, steps, seconds=60):
    """Fewer steps that still fail: leave out halves, quarters, …, single ones."""
    deadline, size = time.monotonic() + seconds, len(steps) // 2
    while size and time.monotonic() < deadline:
        for start in range(len(steps) - size, -1, -size):
            fewer = steps[:start] + steps[start + size:]
            failure = first_failure(home, fewer) if time.monotonic() < deadline else None
            if failure:
                steps = fewer[:failure[0] + 1]
        size //= 2
    return steps


@pytest.mark.parametrize("count", [5_000, pytest.param(300_000, marks=pytest.mark.long)])
def test_random_operations_agree_with_a_model_whatever_time_does(count, tmp_path, dice):
    began = time.monotonic()
    for start in range(0, count, 2_500):  # no lifetime is so long that a failure could not be shrunk
        steps = list(random_steps(dice, min(2_500, count - start)))
        failure = first_failure(tmp_path / "home", steps)
        if failure:
            few = shrunk(tmp_path / "home", steps[:failure[0] + 1])
            said = (first_failure(tmp_path / "home", few) or failure)[1]
            pytest.fail("\n".join([f"{len(few)} steps are enough:", *map(str, few), said]))
    record("model", began, steps=count, disagreements=0)


# =====================================================================================================================
# SEEDED DEFECTS — the tests are tested: each of these must be noticed by the tests named for it
# =====================================================================================================================

DEFECTS = [
    # name, what stands in the module exactly once, what is to stand there instead, who must notice
    ("none at all", "", "", "a_model or damaged"),
    ("what failed is committed", 'self._db.execute("ROLLBACK")', 'self._db.execute("COMMIT")', "leaves_nothing"),
    ("leases on the wall clock", "self.read(now.awake), now.boot", "self.read(now.wall), now.boot", "a_model"),
    ("counters not reserved", "meta_update(self, **{counter.key: counter.reserved})",
     "meta_update(self, **{counter.key: counter.value - 1})", "any_statement or kills_under"),
    ("everybody is rung", "waiter.line not in served and line", "line", "wakes_one_of_a_line"),
    ("nobody is rung for a lock", "tx.ring(f\"lock:{row['name']}\")\n    return", "return", "served_first_come"),
    ("grant to the gone", "if not self.connected():\n            raise AskerGone", "pass", "hung_up"),
    ("ack without a look at the receipt", "AND receipt = ? AND due > ?", "AND ? != '' AND due > ?", "a_model"),
    ("leases of tasks never end", "message_sweep(tx)\n        task_sweep(tx)", "message_sweep(tx)", "a_model"),
    ("an attempt too many", 'row["attempts"] >= row["most"]', 'row["attempts"] > row["most"]', "a_model"),
    ("no grace after a restart", "self.stop(value, now + GRACE)", "self.stop(value, now)", "a_model"),
    ("no grace after a stall", "stall > STALL or", "", "a_model"),
    ("lockDelay after a release", 'kind == "lock.expire" and row["delay"]', 'row["delay"]', "a_model"),
    ("any token is good", 'if token in (None, row["token"])', "if True", "a_model"),
    ("an answer is not kept", "answer_keep(tx, *self.request, reply)", "pass", "a_model"),
    ("an answer outside of the transaction", "answer_keep(tx, *self.request, reply)",
     'tx.run("COMMIT"), tx.run("BEGIN IMMEDIATE"), answer_keep(tx, *self.request, reply)', "any_statement"),
    ("a delivery outside of the transaction", 'self.ring("events")\n        self.deliver',
     'self.run("COMMIT"), self.run("BEGIN IMMEDIATE")\n        self.deliver', "any_statement"),
    ("a loss that is not announced", "dropped = max(dropped, ?)", "dropped = max(dropped, 0 * ?)", "is_told"),
    ("death keeps its tasks", "for task in tasks:", "for task in tasks[:0]:", "a_model"),
    ("a damaged file is deleted", 'shutil.copy(f"{path}.{suffix}', 'os.replace(f"{path}.{suffix}', "damaged"),
    ("a newer database is opened", "if version > SCHEMA_VERSION:", "if version < 0:", "newer_version"),
    ("the next one's card is removed", '.get("instance") == self.daemon.instance:', '.get("instance"):',
     "folder_is_deleted"),
    ("the gate is open to DELETE", "granted, headers = self.gate.check(",
     'granted, headers = "" if request.method == "DELETE" else self.gate.check(', "gate_is_the_model"),
    ("a refusal keeps the connection", "self.close_after, self.bodiless, self.granted = True,",
     "self.close_after, self.bodiless, self.granted = False,", "before_the_body"),
    ("a host by its beginning", 'if not found or found.group(1).lower() not in self.names',
     'if not host.lower().startswith(tuple(self.names))', "gate_is_the_model"),
    ("an origin by its beginning", "origin != f\"http://{headers.get('host')}\"", 'not origin.startswith("http://local")',
     "gate_is_the_model"),
    ("a link to any page", "if not (request.front and link):", "if not link:", "gate_is_the_model"),
    ("a token by its beginning", 'hmac.compare_digest(token.strip(" \\t").encode("latin-1"), self.token)',
     'self.token.startswith(token.strip().encode("latin-1"))', "without_it"),
    ("HEAD without a token", 'self.token and request.method != "OPTIONS"',
     'self.token and request.method not in ("OPTIONS", "HEAD")', "gate_is_the_model"),
    ("everybody may read", 'return "" if not allowed else', 'return "" if not origin else', "allowed_origin"),
    ("a closed socket says nothing", "return user if inode else GONE", "return user if inode else None", "gets_nothing"),
    ("a device hides its user", "LOOPBACK, 2 ** 32 - 1", "0, 2 ** 32 - 1", "gets_nothing"),
    ("whoever serves is ours", "peer_user(self.socket) not in (None, GONE, 0, os.geteuid()):", "False:", "served_by"),
    ("every user is ours", "if user not in (None, 0, os.geteuid()):", "if user == -1:", "another_user"),
    ("two lengths", 'SINGLE = ("host", "content-length", ', 'SINGLE = ("host", ', "frame_that or malformed"),
    ("a blank before the colon", 'TOKEN + rb":[', 'TOKEN + rb" ?:[', "frame_that or malformed"),
    ("a length and chunks", "and (length is not None or version", "and (version", "frame_that or malformed"),
    ("chunks without an end", 'if raw[after - 2:after] != b"\\r\\n":', "if False:", "chunked_body or malformed"),
    ("a body without a limit", "if len(body) + size > MAX_BODY or after > 2 * MAX_BODY:", "if len(body) > 2 ** 40:",
     "chunked_body"),
    ("time for each byte", "if not self.receive(deadline):\n                raise PortDaddyError(\"BAD_REQUEST\"",
     "if not self.receive(time.monotonic() + HEAD_TIMEOUT):\n                raise PortDaddyError(\"BAD_REQUEST\"",
     "whole_of_it"),
    ("C1 on the terminal", "\\x7f-\\x9f\\xad", "\\x7f\\xad", "to_a_terminal"),
    ("mapped addresses", "ip = ip.ipv4_mapped or ip.sixtofour or", "ip = ip.sixtofour or", "never_called"),
    ("looked up twice", 'self.daemon.check_target(row["url"])', 'resolve(*split_url(row["url"])[1:3])', "looked_up_once"),
    ("a key twice", "if len(found) != len(pairs):", "if False:", "json_is_strict"),
    ("files for everybody", "os.O_CREAT | os.O_CLOEXEC, 0o600))", "os.O_CREAT | os.O_CLOEXEC, 0o644))", "ours_alone"),
    ("a stranger's file", "if owners <= {us, 0} or us == 0 and len(owners) == 1:", "if True:", "only_when_trusted"),
    ("migration forgets the returned", "0, 5, 0 FROM RETURNED;", "0, 5, 0 FROM RETURNED WHERE 0;", "of_version_1"),
]


@pytest.mark.long
@pytest.mark.parametrize(("old", "new", "tests"), [pytest.param(*rest, id=name) for name, *rest in DEFECTS])
def test_a_seeded_defect_is_noticed(old, new, tests, tmp_path):
    began = time.monotonic()
    for path in (MODULE, Path(__file__), MODULE.parent / "pyproject.toml"):
        (tmp_path / path.name).write_text(path.read_text())
    module = tmp_path / MODULE.name
    assert not old or module.read_text().count(old) == 1
    module.write_text(module.read_text().replace(old, new) if old else module.read_text())
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests],
                          cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == (1 if old else 0), done.stdout[-2_000:]
    record("defects", began, defects=len(DEFECTS) - 1, unnoticed=0)


# =====================================================================================================================
# PEERS — one client beside programs that do the like, each over its own words and a connection that is kept
# =====================================================================================================================

# Figures, never thresholds: `pytest -m peers -s` shows them, PORT_DADDY_REPORT keeps them. The servers, ours and theirs,
# take turns on one CPU, and the client has another. Each of them writes what it is told to a log, without waiting for
# the disk: Redis each second, beanstalkd each 50 ms; etcd alone waits for it, which is what it is for.


@contextlib.contextmanager
def on_cpu(place):
    """This thread, and whatever it starts meanwhile, on the first (0) or the last (-1) CPU that we may use."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[place]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture
def peer(children, tmp_path):
    """Start a program on a free port with a folder of its own, and connect to it; skip where there is none."""
    lines = []

    def start(program, words):
        path = shutil.which(program)
        if not path:
            pytest.skip(f"{program} is not installed")
        first, folder = free_port_block(2), tmp_path / program
        folder.mkdir()
        with on_cpu(0):
            process = children(path, *words.format(port=first, second=first + 1, folder=folder).split(),
                               stdout=subprocess.DEVNULL)

        def connect():
            assert process.poll() is None, f"{program} has ended"
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", first), timeout=20)

        lines.append(eventually(connect))
        return functools.partial(tell, lines[-1])

    yield start
    for line in lines:
        line.close()


def tell(line, request, expected):
    """Send bytes and receive the reply, which is one packet with all of those we talk to here."""
    line.sendall(request)
    reply = line.recv(65536)
    assert reply.startswith(expected), (request, reply)
    return reply


@pytest.fixture
def ours(spawn):
    with on_cpu(0):
        daemon = spawn().start()
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield lambda *requests: [tell(line, request, b"HTTP/1.1 200") for request in requests][-1]


def beside(name, program, mine, theirs, rounds=7, seconds=0.3):
    """Both cycles in turn, after a round that does not count; the medians of their rates, shown and recorded."""
    began, rates = time.monotonic(), ([], [])
    with on_cpu(-1):
        for turn in range(rounds + 1):
            for cycle, into in zip((mine, theirs), rates):
                count, start = 0, time.perf_counter()
                while time.perf_counter() - start < seconds:
                    cycle()
                    count += 1
                if turn:
                    into.append(count / (time.perf_counter() - start))
    mine, theirs = (sorted(found)[rounds // 2] for found in rates)
    print(f"\n{name}: {mine:,.0f}/s, {program} {theirs:,.0f}/s, {mine / theirs:.2f} of it")
    record(f"beside {program}: {name}", began, ours=round(mine), theirs=round(theirs))


def resp(*words):
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


LOCK = port_daddy.lock_cycle("peer")
PUBLISH = port_daddy.request_bytes("POST", "/msg/peer", payload={"action": "build"})
POLL = port_daddy.request_bytes("GET", "/msg/peer/poll?timeout=0&lease=30000")
REDIS = "--port {port} --bind 127.0.0.1 --dir {folder} --appendonly yes --appendfsync everysec --save"
ETCD = ("--data-dir {folder}/data --listen-client-urls http://127.0.0.1:{port} "
        "--advertise-client-urls http://127.0.0.1:{port} --listen-peer-urls http://127.0.0.1:{second} "
        "--initial-advertise-peer-urls http://127.0.0.1:{second} --initial-cluster default=http://127.0.0.1:{second}")


@pytest.mark.peers
def test_lock_and_unlock_beside_redis(ours, peer):
    redis = peer("redis-server", REDIS)
    take, free = resp(b"SET", b"peer", b"me", b"NX", b"PX", b"30000"), resp(b"DEL", b"peer")
    beside("lock, unlock", "Redis", lambda: ours(*LOCK), lambda: (redis(take, b"+OK"), redis(free, b":1")))


@pytest.mark.peers
def test_publish_beside_redis(ours, peer):
    redis = peer("redis-server", REDIS)
    add = resp(b"XADD", b"peer", b"MAXLEN", b"~", b"10000", b"*", b"payload", b'{"action":"build"}')
    beside("publish", "Redis", lambda: ours(PUBLISH), lambda: redis(add, b"$"))


@pytest.mark.peers
def test_a_task_from_publish_to_ack_beside_beanstalkd(ours, peer):
    beanstalkd = peer("beanstalkd", "-l 127.0.0.1 -p {port} -b {folder}")

    def mine():
        receipt = re.search(rb'"receipt":"([^"]+)"', ours(PUBLISH, POLL))[1]
        ours(port_daddy.request_bytes("POST", "/msg/peer/ack", receipt=receipt.decode()))

    def theirs():
        beanstalkd(b'put 0 0 30 18\r\n{"action":"build"}\r\n', b"INSERTED")
        number = beanstalkd(b"reserve\r\n", b"RESERVED").split()[1]
        beanstalkd(b"delete %s\r\n" % number, b"DELETED")

    beside("publish, leased poll, ack", "beanstalkd", mine, theirs)


@pytest.mark.peers
def test_lock_and_unlock_beside_etcd(ours, peer):
    etcd, key = peer("etcd", ETCD), base64.b64encode(b"peer").decode()

    def post(path, **fields):
        return etcd(request_bytes("POST", path, json.dumps(fields).encode()), b"HTTP/1.1 200")

    def theirs():
        post("/v3/kv/put", key=key, value=key)
        post("/v3/kv/deleterange", key=key)

    eventually(lambda: b" 200 " in etcd(request_bytes("POST", "/v3/kv/range", b'{"key":"AA=="}'), b"HTTP/1.1")[:15])
    beside("lock, unlock", "etcd", lambda: ours(*LOCK), theirs)


# =====================================================================================================================
# META — the shape of the house
# =====================================================================================================================

SOURCE = MODULE.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# =+\n# (\d+)\. ([A-Z][A-Z ]+[A-Z])\b(.*)\n# =+$", re.MULTILINE)


@functools.lru_cache
def rooms():
    """Number, title and first line of every room."""
    return [(int(found[1]), found[2], SOURCE.count("\n", 0, found.start()) + 1) for found in BANNER.finditer(SOURCE)]


def room_of(line):
    """The place of a line's room in the file; what stands above the first banner belongs to the title page."""
    return max((place for place, (_, _, first) in enumerate(rooms()) if first <= line), default=-1)


def test_the_rooms_stand_in_their_order():
    numbers = [number for number, _, _ in rooms()]
    titles = [title for _, title, _ in rooms()]
    assert numbers == sorted(set(numbers))
    expected = ["PROBLEMS", "VOCABULARY", "SETTINGS", "BELL", "STORE", "HOST", "DAEMON", "OPERATIONS", "WORKERS",
                "HTTP", "CLIENT", "COMMAND LINE"]
    assert [title for title in titles if title in expected] == expected
    page = ast.get_docstring(TREE) or ""
    assert all(title in page for title in expected), "the title page lists the rooms"


def test_a_room_uses_only_rooms_above_it():
    home = {}
    for node in TREE.body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)) else [
            each.id for target in getattr(node, "targets", [getattr(node, "target", None)]) if target is not None
            for each in ast.walk(target) if isinstance(each, ast.Name)]
        for name in names:
            home.setdefault(name, (room_of(node.lineno), node.lineno))
    upward = []

    def walk(table, room, where):
        for symbol in table.get_symbols():
            name = symbol.get_name()
            if symbol.is_global() and symbol.is_referenced() and name in home and home[name][0] > room:
                upward.append(f"{where} uses {name} (line {home[name][1]})")
        for child in table.get_children():
            walk(child, room, where)

    for child in symtable.symtable(SOURCE, str(MODULE), "exec").get_children():
        walk(child, room_of(child.get_lineno()), f"{child.get_name()} (line {child.get_lineno()})")
    assert not upward, "\n".join(upward)


def test_functions_and_classes_are_small():
    large = []
    for node in ast.walk(TREE):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > (300 if isinstance(node, ast.ClassDef) else 60):
                large.append(f"{node.name}: {lines} lines")
    assert not large, large
    assert SOURCE.count("\n") <= 9500


def test_nothing_is_left_to_do_and_nothing_is_global():
    assert not re.findall(r"\b(TODO|FIXME|XXX|HACK)\b", SOURCE)
    assert not [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)]


def test_only_the_standard_library_is_imported():
    imported = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    if not hasattr(sys, "stdlib_module_names"):
        pytest.skip("this Python does not know the names of its library")
    assert imported <= set(sys.stdlib_module_names) | {"port_daddy"}


def test_the_short_commands_do_not_pay_for_the_server():
    code = "import sys, port_daddy; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=MODULE.parent, capture_output=True, text=True, check=True)
    assert not {"http.server", "sqlite3", "subprocess", "ssl", "email"} & set(done.stdout.split())


def test_everything_that_is_exported_exists():
    assert {"PortDaddy", "PortDaddyError", "verify_webhook"} <= set(port_daddy.__all__)
    assert all(hasattr(port_daddy, name) for name in port_daddy.__all__)


def test_every_operation_has_a_summary_and_routes_of_its_own():
    seen = {}
    for operation in port_daddy.OPERATIONS:
        assert operation.summary and operation.summary[0].isupper() and operation.routes
        for method, path in operation.routes:
            shape = (method, re.sub(r"{[^}]*}", "{}", path))
            assert seen.setdefault(shape, operation.name) == operation.name, shape
    assert len({operation.name for operation in port_daddy.OPERATIONS}) == len(port_daddy.OPERATIONS)


def test_an_operation_declares_the_failures_that_it_raises_itself():
    everybody_s = {"BAD_VALUE", "INTERNAL"}
    for node in TREE.body:
        one = next((each for each in port_daddy.OPERATIONS if each.name == getattr(node, "name", "")), None)
        raised = {call.args[0].value for call in ast.walk(node) if isinstance(call, ast.Call) and call.args
                  and getattr(call.func, "id", "") in ("PortDaddyError", "LockLost")
                  and isinstance(call.args[0], ast.Constant)} if one else set()
        assert not one or raised - everybody_s <= set(one.errors) <= set(port_daddy.PROBLEMS), (node.name, raised)


PROMISED_METHODS = re.findall(r"\w+", """
    claim release get_service list_services update_service set_endpoint remove_endpoint service_health list_health
    wait_for_service wait_for_services list_system_ports cleanup publish get_messages poll subscribe list_channels
    clear_channel lock unlock extend_lock check_lock list_locks with_lock register heartbeat start_heartbeat unregister
    get_agent list_agents add_webhook list_webhooks get_webhook update_webhook remove_webhook webhook_events
    test_webhook list_deliveries replay_delivery get_activity events health version metrics config ping
    ack nack touch list_groups remove_group list_dead redrive work get_logs add_logs
""")


def test_the_client_has_every_promised_method():
    assert [name for name in PROMISED_METHODS if not callable(getattr(PortDaddy, name, None))] == []


# What the client says otherwise than the wire, and what it can do beyond it: each one is meant.
RENAMED = {"list_agents": {"active"}, "get_logs": {"follow"}}
EXTRA = {"subscribe": {"on_loss"}, "events": {"on_loss"}}


@pytest.mark.parametrize("operation", port_daddy.OPERATIONS, ids=lambda operation: operation.name)
def test_the_client_s_method_takes_what_the_operation_takes(operation):
    takes = set(inspect.signature(getattr(PortDaddy, operation.name)).parameters)
    fields = {re.sub("[A-Z]", lambda found: "_" + found[0].lower(), name) for name in operation.fields}
    in_path = set(re.findall(r"{(\w+)", operation.routes[0][1]))
    missing, invented = fields - takes, takes - fields
    # Who is asking may come from the client itself, and what stands in the path may have a better name in Python.
    assert missing <= {"agent", "owner", "sender", "checked_by"} | in_path | RENAMED.get(operation.name, set()), missing
    assert len(invented - {"self"} - EXTRA.get(operation.name, set())) <= len(missing), invented


PROOFS = {  # what each proof of the long size tried, in the words of the README
    "kills": "{cycles:,} kills (-9) under mixed load, {writes:,} answered writes: {lost} lost",
    "starts": "{kills:,} kills during start and migration, {migrated:,} of them after it: {lost} rows lost",
    "faults": "{points:,} fault points (exit, error, delay at every SQL statement and every answer): each all or nothing",
    "locks": "{operations:,} lock operations, {grants:,} grants, the daemon and its clients killed and stopped 200 times: "
             "{violations} violations",
    "queue": "{tasks:,} tasks for {groups} groups of workers, one in a hundred poison, {again:,} given again after kills "
             "and stops: {violations} lost, doubly held or wrongly dead",
    "streams": "{messages:,} messages to {readers} subscribers, {cuts:,} cuts, {kills} kills: what was received and the "
               "gaps that were announced are all that was published, {violations} exceptions",
    "webhooks": "{events:,} events to a receiver that fails, hangs, drips and closes, {kills} kills: {lost} lost",
    "model": "{steps:,} random operations beside a model, with stalls, restarts, reboots and clock jumps: {disagreements} "
             "disagreements",
    "starters": "{rounds} times {commands} commands that start the daemon at once: {failures} failures, one daemon each",
    "gate": "{requests:,} combinations of method, route, host, origin, site and token at the gate, beside a model of ten "
            "lines: {disagreements} disagreements",
    "malformed": "{requests:,} malformed requests with another one hidden in their bodies, beside a second reader of the "
                 "framing: {hidden} of those were run",
    "fields": "{requests:,} requests with random fields for every operation, {answered:,} of them fulfilled: {failures} "
              "failures of the daemon (5xx)",
    "siege": "{idle} idle, {waiting} waiting and {slow} dripping connections, with few descriptors left: `/health` within "
             "{p99} ms (p99)",
    "soak": "{rounds:,} rounds of mixed work: memory {memory:+} MiB, descriptors {descriptors:+}, threads {threads:+}",
    "claims": "{claims:,} claims by {threads} threads among foreign binders: {duplicates} ports given twice",
    "supervisors": "{rounds} times `dev` was killed with 4 services of 3 children each: {survivors} survivors",
    "defects": "{defects} seeded defects: {unnoticed} unnoticed by the tests named for them",
}


def proofs_table():
    """What the last long proofs found, as .ci/proofs.json tells: `PORT_DADDY_REPORT=.ci/proofs.json pytest -m long`."""
    report = json.loads((MODULE.parent / ".ci" / "proofs.json").read_text())
    rows = [f"| {words.format(**report[name])} | {report[name]['seconds']:.0f} s{' each' * (name == 'defects')} | "
            f"{report[name]['date']}, Python "
            f"{report[name]['python']} |" for name, words in PROOFS.items() if name in report]
    return "\n".join(["| what was tried, and what came of it | took | when |", "|---|---|---|", *rows])


def test_the_readme_tells_the_proofs_as_they_were_reported():
    readme_blocks()
    assert proofs_table() in (MODULE.parent / "README.md").read_text()


def test_the_readme_tells_the_figures_as_they_were_measured():
    readme_blocks()
    report = MODULE.parent / ".ci" / "bench.json"
    if not report.exists():
        pytest.skip("no run is kept: python3 port_daddy.py bench --json > .ci/bench.json")
    assert port_daddy.bench_table(json.loads(report.read_text())) in (MODULE.parent / "README.md").read_text()
    assert peers_table() in (MODULE.parent / "README.md").read_text()


def peers_table():
    """What `PORT_DADDY_REPORT=.ci/proofs.json pytest -m peers` found."""
    report = json.loads((MODULE.parent / ".ci" / "proofs.json").read_text())
    rows = [f"| {name.partition(': ')[2]} | {found['ours']:,} | {name[7:].partition(':')[0]} {found['theirs']:,} | "
            f"{found['ours'] / found['theirs']:.2f} |"
            for name, found in sorted(report.items()) if name.startswith("beside ")]
    return "\n".join(["| one client, cycles a second | Port Daddy | beside | ratio |", "|---|---|---|---|", *rows])


def readme_blocks():
    readme = MODULE.parent / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md beside the module")
    block = re.compile(r"^(<!-- (?:not run|tests) -->\n+)?```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return block.findall(readme.read_text())


def test_every_block_of_the_readme_runs(spawned, tmp_path):
    """In order, in one folder, with `python3`, `pd` and `port-daddy` meaning this Python and this file."""
    blocks = readme_blocks()
    shims = tmp_path / "bin"
    shims.mkdir()
    for name, command in (("python3", f'"{sys.executable}"'), ("python", f'"{sys.executable}"'),
                          ("pd", f'"{sys.executable}" "{MODULE}"'), ("port-daddy", f'"{sys.executable}" "{MODULE}"')):
        (shims / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (shims / name).chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(MODULE, folder)
    env = spawned.environment(PATH=f"{shims}:{os.environ['PATH']}", PYTHONPATH=MODULE.parent, no_proxy="*")
    for language, command in (("sh", ["sh", "-e", "-c"]), ("python", [sys.executable, "-c"])):
        # The blocks of a language are one session, as a reader would type them: later ones use names of earlier ones.
        text = "\n".join(text for skipped, spoken, text in blocks if spoken == language and not skipped)
        text = re.sub(r"(localhost|127\.0\.0\.1):9876", rf"\1:{spawned.port}", text)
        process = subprocess.Popen([*command, text], env=env, cwd=folder, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0, f"{text}\n--- said:\n{said}"
        finally:
            end(process)


def test_the_readme_s_table_is_the_table_of_operations():
    readme_blocks()
    assert port_daddy.readme_table().strip() in (MODULE.parent / "README.md").read_text()
