#!/usr/bin/env python3
# ======================================================================================================================
# 1. TITLE PAGE — what this is, in one page
# ======================================================================================================================
"""Port Daddy: ports, locks, channels, agents and webhooks for everything that runs on one machine.

Coding agents, terminals and dev servers share a laptop and collide: on ports, in migrations, over tasks. This file is
the one daemon they ask instead, together with its command line and its Python client. Copy it into any repository; it
needs Python 3.9 and nothing else.

    python3 port_daddy.py claim myapp:api:main            a port that is yours, the same one every day
    python3 port_daddy.py with-lock db-migration -- make migrate
    python3 port_daddy.py serve                           the daemon in the foreground (the others start it when needed)

    from port_daddy import PortDaddy
    pd = PortDaddy(agent_id="agent-1", autostart=True)
    port = pd.claim("myapp:api:main")["port"]
    with pd.with_lock("db-migration", ttl=120_000) as held:
        migrate(fencing_token=held.token)
    pd.publish("tasks", {"action": "build"}); task = pd.poll("tasks")["message"]

Five nouns carry all of it. A request becomes an OPERATION, a function over the STORE; what it changed becomes an EVENT,
written in the same transaction; events ring the BELL; and everything that waits (a poll, a stream, a lock queue, a
webhook) is a READER WITH A CURSOR, which looks again when the bell has rung.

The rooms, each of which uses only the rooms above it:

     1. TITLE PAGE      what this is, in one page
     2. PROBLEMS        every way to fail, and its number on the wire and in the shell
     3. VOCABULARY      the kinds of value that may come in, and their limits
     4. SETTINGS        what can be configured, and from where
     5. BELL            how to wait without missing anything, and how to wake
     6. STORE           what is remembered: the schema, the transaction, functions by noun
     7. HOST            the world outside: ports, processes, connections, files
     8. DAEMON          what operations are performed on, and what time does to it
     9. OPERATIONS      everything one can ask
    10. WORKERS         the loops beside the requests
    11. HTTP            bytes to operations and back
    12. CLIENT          the same operations from the other side
    14. DESCRIPTIONS    what is derived from the table of operations
    16. COMMAND LINE    the same operations from a terminal

It promises: what was answered survives kill -9; two identities never share a port; a lock has one holder, a growing
fencing token and a fair queue; a message taken from a queue is taken once; a web page can ask for nothing.

It does not replicate, does not leave the machine, does not defend against programs of the same user, and does not run
anything that a request says.
"""
from __future__ import annotations

import builtins
import contextlib
import errno
import json
import os
import re
import socket
import stat
import struct
import sys
import threading
import time
import zlib
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
    Union,
)

if TYPE_CHECKING:
    import argparse
    import subprocess
    from types import FrameType, TracebackType

__all__ = ["PortDaddy", "PortDaddyError", "ConnectionError", "DaemonUnreachable", "LockLost", "verify_webhook", "main"]
__version__ = "1.0.0"
PROTOCOL = 1  # grows when an older copy of this file could misread a newer daemon
T = TypeVar("T")
Reply = Dict[str, Any]

# ======================================================================================================================
# 2. PROBLEMS — every way to fail, and its number on the wire and in the shell
# ======================================================================================================================

# 1. Nothing else leaves an operation: PortDaddyError is raised by the daemon, sent as JSON, raised again by the client
#    and turned into one line and an exit status by the command line.
# 2. A message says what was wrong, the limit, who is in the way and what to do next. Facts go beside it, by name.

PROBLEMS: Dict[str, Tuple[int, int, str]] = {  # code: (HTTP status, exit status, what is said when nobody says more)
    "BAD_REQUEST": (400, 2, "the request is not well-formed HTTP"),
    "BAD_JSON": (400, 2, "the body is not a JSON object"),
    "BAD_VALUE": (400, 2, "a value is not what was expected"),
    "UNKNOWN_FIELD": (400, 2, "there is no such field"),
    "TARGET_REFUSED": (400, 2, "that address is never called"),
    "HOST_NOT_ALLOWED": (403, 1, "the Host header names another machine; use localhost or 127.0.0.1"),
    "ORIGIN_NOT_ALLOWED": (403, 1, "web pages of other origins may not use this daemon"),
    "CROSS_SITE": (403, 1, "web pages of other sites may not use this daemon"),
    "NOT_OWNER": (403, 4, "somebody else holds it"),
    "NOT_FOUND": (404, 3, "there is nothing of that name"),
    "METHOD_NOT_ALLOWED": (405, 2, "this path does not know that method"),
    "TIMED_OUT": (408, 5, "the time to wait is over"),
    "LOCK_HELD": (409, 4, "somebody else holds the lock"),
    "LOCK_LOST": (409, 4, "the lock has moved on; stop, and take it again"),
    "ALREADY_RUNNING": (409, 4, "a daemon already serves this state folder"),
    "PORT_TAKEN": (409, 4, "somebody else has that port"),
    "PORT_HIJACKED": (409, 4, "a stranger listens on the port of this service"),
    "NO_PORTS": (409, 4, "no port of the range is free"),
    "TOO_LARGE": (413, 2, "the request is larger than the limit"),
    "URI_TOO_LONG": (414, 2, "the request line is longer than 8 KiB"),
    "UNSUPPORTED_MEDIA": (415, 2, "send JSON with Content-Type: application/json"),
    "LIMIT": (429, 4, "the limit of this agent is reached"),
    "HEADERS_TOO_LARGE": (431, 2, "a header is larger than 8 KiB, all are larger than 32 KiB, or more than 100"),
    "INTERNAL": (500, 1, "the daemon failed"),
    "NOT_IMPLEMENTED": (501, 1, "the daemon does not do that"),
    "BUSY": (503, 1, "too many are waiting; try again in a second"),
    "SHUTTING_DOWN": (503, 1, "the daemon is stopping; try again in a second"),
    "STORAGE_FULL": (507, 1, "the disk is full or failing; nothing was changed"),
    "UNREACHABLE": (0, 6, "no daemon answers; start one with: python3 port_daddy.py start"),
}


class PortDaddyError(Exception):
    """One of PROBLEMS, on both sides of the wire: .code, .status (HTTP), .exit_status, .body (the JSON object)."""

    def __init__(self, code: str, message: str = "", **facts: Any) -> None:
        self.code = code
        self.status, self.exit_status, sentence = PROBLEMS.get(code, PROBLEMS["INTERNAL"])
        self.facts = facts
        super().__init__(message or sentence)
        if code == "LOCK_HELD" and facts.get("waited"):
            self.exit_status = PROBLEMS["TIMED_OUT"][1]  # a wait that timed out, whatever it waited for

    @property
    def body(self) -> Reply:
        return {"success": False, "error": str(self), "code": self.code, **self.facts}


class LockLost(PortDaddyError):
    """The lease has ended or moved on: what it protected may be somebody else's by now."""


class DaemonUnreachable(PortDaddyError, builtins.ConnectionError):
    """Nobody listens, or what listens is not a Port Daddy. `.status` is 0."""

    def __init__(self, message: str = "") -> None:
        PortDaddyError.__init__(self, "UNREACHABLE", message)


ConnectionError = DaemonUnreachable


def problem_from_reply(status: int, body: Reply) -> PortDaddyError:
    """The exception that the daemon raised, from what it sent. Unknown codes keep their HTTP status."""
    facts = {key: value for key, value in body.items() if key not in ("success", "error", "code")}
    code = str(body.get("code", "INTERNAL"))
    problem = (LockLost if code == "LOCK_LOST" else PortDaddyError)(code, str(body.get("error", "")), **facts)
    problem.status = status
    return problem


# ======================================================================================================================
# 3. VOCABULARY — the kinds of value that may come in, and their limits
# ======================================================================================================================

# 1. This is the only validation: an operation that runs has been given values of the kinds it declares.
# 2. A kind is read from JSON with `parse`, from a query or a command line with `read`; both give a ValueError when the
#    value is refused, and `expected` is the sentence that says what would have been taken.

UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
MAX_METADATA, MAX_PAYLOAD, MAX_BODY = 10 * 1024, 256 * 1024, 1024 * 1024
MAX_INTEGER = 2 ** 53 - 1  # what JavaScript can count exactly
NAME = r"(?!\.{1,2}\Z)[A-Za-z0-9._:-]{1,100}"
STATUSES = ("assigned", "starting", "running", "unhealthy", "stopped", "crashed", "dead", "detached", "hijacked")
EVENT_KINDS = (
    "service.claim", "service.release", "service.healthy", "service.unhealthy", "agent.register", "agent.unregister",
    "agent.stale", "lock.acquire", "lock.release", "lock.expire", "message.publish", "daemon.start", "daemon.stop")

to_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def maybe_json(value: Any) -> Optional[str]:
    return None if value is None else to_json(value)


def printable(text: str) -> str:
    """Text that can do nothing to a terminal: C0, C1, bidirectional and zero-width controls become \\u escapes."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]",
                  lambda found: f"\\u{ord(found.group()):04x}", text)


def span(milliseconds: float) -> str:
    """A duration as people write it: 950ms, 30s, 2h30m."""
    left, parts = int(milliseconds), []
    if left < 1_000:
        return f"{left}ms"
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, UNITS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2])


def camel(name: str) -> str:
    """The wire's spelling of a Python name: expires_at, expiresAt."""
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


class Kind:
    """A kind of value: `expected` says in words what `parse` (from JSON) and `read` (from text) accept."""

    nullable = False  # JSON null is a value, and not the same as leaving the field out

    def __init__(self, expected: str) -> None:
        self.expected = expected

    def parse(self, value: Any) -> Any:
        raise NotImplementedError

    def read(self, text: str) -> Any:
        return self.parse(text)


class Text(Kind):
    def __init__(self, expected: str, pattern: str) -> None:
        super().__init__(expected)
        self.matches = re.compile(pattern, re.DOTALL).fullmatch

    def parse(self, value: Any) -> str:
        if not isinstance(value, str) or not self.matches(value):
            raise ValueError
        return value


class Password(Text):
    """Text that is never shown again, not even to say that it was refused."""


class Integer(Kind):
    def __init__(self, expected: str, low: int, high: int) -> None:
        super().__init__(f"{expected} from {low} to {high}")
        self.low, self.high = low, high

    def parse(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:  # a bool is an int, and no number
            raise ValueError
        return value

    def read(self, text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise ValueError
        return self.parse(int(text))


class Period(Integer):
    """A duration: milliseconds as an integer, or text with units such as "30s" and "2h30m"."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__("milliseconds", low, high)
        self.expected = f'a duration from {span(low)} to {span(high)}: milliseconds, or text such as "30s" or "2h30m"'

    def parse(self, value: Any) -> int:
        if isinstance(value, str):
            if not re.fullmatch(r"(?:[0-9]{1,12}(?:\.[0-9]{1,6})?(?:ms|s|m|h|d))+", value):
                raise ValueError
            value = round(sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([0-9.]+)([a-z]+)", value)))
        return super().parse(value)

    def read(self, text: str) -> int:
        return super().read(text) if text.isdigit() else self.parse(text)


class Flag(Kind):
    def parse(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def read(self, text: str) -> bool:
        if text not in ("true", "1", "false", "0"):
            raise ValueError
        return text in ("true", "1")


class Json(Kind):
    """Any JSON value of limited size; too large is TOO_LARGE and not a bad value."""

    def __init__(self, expected: str, limit: int, only: Union[Type[Any], Tuple[Type[Any], ...]] = object) -> None:
        super().__init__(expected)
        self.limit, self.only = limit, only
        self.nullable = only is object

    def parse(self, value: Any) -> Any:
        if not isinstance(value, self.only):
            raise ValueError
        size = len(to_json(value).encode())
        if size > self.limit:
            raise PortDaddyError("TOO_LARGE", f"{size} bytes of JSON are more than the limit of {self.limit}",
                                 limit=self.limit)
        return value

    def read(self, text: str) -> Any:
        return self.parse(read_json(text))


class Several(Kind):
    """A list of a kind; in a query or a command line, separated by commas."""

    def __init__(self, kind: Kind, most: int) -> None:
        super().__init__(f"a list of 1 to {most}, each {kind.expected}")
        self.kind, self.most = kind, most

    def parse(self, value: Any) -> List[Any]:
        if not isinstance(value, list) or not 1 <= len(value) <= self.most:
            raise ValueError
        return [self.kind.parse(item) for item in value]

    def read(self, text: str) -> List[Any]:
        return self.parse([self.kind.read(item) for item in text.split(",")])


class Glob(Kind):
    """A name of a kind, or a pattern over such names."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(f"{kind.expected}; or a pattern of these with * for any run of characters")
        self.kind = kind

    def parse(self, value: Any) -> str:
        return str(PATTERN.parse(value) if isinstance(value, str) and "*" in value else self.kind.parse(value))


class Ports(Kind):
    """A range of ports, [low, high] or "low-high"."""

    def parse(self, value: Any) -> Tuple[int, int]:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError
        low, high = (PORT.parse(port) for port in value)
        if low > high:
            raise ValueError
        return low, high

    def read(self, text: str) -> Tuple[int, int]:
        return self.parse([PORT.read(part) for part in text.split("-")])


class Url(Text):
    """An absolute URL in visible ASCII, without user or password."""

    def __init__(self, schemes: str) -> None:
        super().__init__(f"a URL that begins with {schemes.replace('|', ':// or ')}:// and holds no user or password",
                         rf"(?i:{schemes})://(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?"
                         r"(?:[/?](?:[!-\"$-~])*)?")

    def parse(self, value: Any) -> str:
        url = super().parse(value)
        port = re.match(r"[a-z]+://[^/?]*?:([0-9]+)(?:[/?]|\Z)", url, re.IGNORECASE)
        if len(url) > 2048 or port and not 1 <= int(port.group(1)) <= 65535:
            raise ValueError
        return url


class EventName(Text):
    def parse(self, value: Any) -> str:
        name = super().parse(value)
        if not any(matches(name, kind) for kind in EVENT_KINDS):
            raise ValueError
        return name


PORT = Integer("a port", 1, 65535)
PLAIN_NAME = Text("a name of 1 to 100 of A-Z a-z 0-9 . _ : -", NAME)
SEGMENT = r"(?!\.{1,2}(?::|\Z))[A-Za-z0-9._-]{1,64}"
IDENTITY = Text("an identity project:stack:context, one to three segments, each 1 to 64 of A-Z a-z 0-9 . _ -",
                rf"(?!health\Z){SEGMENT}(?::{SEGMENT}){{0,2}}")
LOCK_NAME = Text("a lock name of 1 to 100 of A-Z a-z 0-9 . _ : / -, no segment of which is . or ..",
                 r"(?!(?:.*/)?\.{1,2}(?:/|\Z))[A-Za-z0-9._:/-]{1,100}")
PATTERN = Text("a name or a pattern with *, of A-Z a-z 0-9 . _ : / * -, at most 200 characters",
               r"[A-Za-z0-9._:/*-]{1,200}")
EVENT = EventName("an event such as lock.acquire, or a pattern such as lock.* or *", r"[a-z.*]{1,40}")

Port = Annotated[int, PORT]
PortRange = Annotated[Tuple[int, int], Ports('a range of ports such as [3100, 9999] or "3100-9999"')]
Identity = Annotated[str, IDENTITY]
ChannelName = Annotated[str, PLAIN_NAME]
GroupName = Annotated[str, PLAIN_NAME]
AgentId = Annotated[str, PLAIN_NAME]
EndpointName = Annotated[str, PLAIN_NAME]
LockName = Annotated[str, LOCK_NAME]
Pattern = Annotated[str, PATTERN]
ServicePattern = Annotated[str, Glob(IDENTITY)]
ChannelPattern = Annotated[str, Glob(PLAIN_NAME)]
LockPattern = Annotated[str, Glob(LOCK_NAME)]
EventPattern = Annotated[str, EVENT]
EventList = Annotated[List[str], Several(EVENT, 20)]
IdentityList = Annotated[List[str], Several(IDENTITY, 100)]
Word = Annotated[str, Text("text of 1 to 100 characters", r".{1,100}")]
Line = Annotated[str, Text("text of at most 4096 characters", r".{0,4096}")]
Secret = Annotated[str, Password('a secret of 8 to 256 characters, whsec_ and base64 among them, or "auto" to have one '
                                 'made', r"auto|(?!whsec_).{8,256}|whsec_(?:[A-Za-z0-9+/]{4})+(?:[A-Za-z0-9+/]{2}==|"
                                 r"[A-Za-z0-9+/]{3}=)?")]
Status = Annotated[str, Text("one of " + ", ".join(STATUSES), "|".join(STATUSES))]
HookId = Annotated[str, Text("an id as the daemon gave it", r"[A-Za-z0-9_-]{1,64}")]
Duration = Annotated[int, Period(1, 86_400_000)]
Lifetime = Annotated[int, Period(1, 366 * 86_400_000)]
PollTime = Annotated[int, Period(0, 60_000)]
WaitTime = Annotated[int, Period(0, 300_000)]
LockWait = Annotated[int, Period(0, 3_600_000)]
Count = Annotated[int, Integer("a number", 1, 1000)]
Quota = Annotated[int, Integer("a number", 0, 100_000)]
Rows = Annotated[int, Integer("a number", 1, 100_000)]
Latency = Annotated[int, Integer("milliseconds", 0, 3_600_000)]
Cursor = Annotated[int, Integer("an id", 0, MAX_INTEGER)]
Instant = Annotated[int, Integer("milliseconds since the epoch", 0, MAX_INTEGER)]
Fence = Annotated[int, Integer("a fencing token", 1, MAX_INTEGER)]
Pid = Annotated[int, Integer("a process id", 1, 2 ** 31 - 1)]
Bool = Annotated[bool, Flag("true or false")]
Metadata = Annotated[Dict[str, Any], Json("a JSON object of at most 10 KB", MAX_METADATA, dict)]
Payload = Annotated[Any, Json("any JSON value of at most 256 KiB", MAX_PAYLOAD)]
HttpUrl = Annotated[str, Url("http|https")]
EndpointUrl = Annotated[str, Url("http|https|ws|wss")]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern with * (any run of characters, colons included) covers a name; as GLOB does in the store."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.DOTALL) is not None


def kind_of(hint: Any) -> Kind:
    """The kind inside an annotation: LockName, or Optional[LockName]."""
    for part in (hint, *getattr(hint, "__args__", ())):
        for extra in getattr(part, "__metadata__", ()):
            if isinstance(extra, Kind):
                return extra
    raise TypeError(f"no kind in {hint!r}")


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise PortDaddyError("BAD_JSON", "the JSON names a key twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:  # infinite, or not a number
        raise PortDaddyError("BAD_JSON", "the JSON holds a number that is not finite")
    return number


def _integer(text: str) -> int:
    if len(text) > 300:
        raise PortDaddyError("BAD_JSON", "the JSON holds an integer of more than 300 digits")
    return int(text)


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_int=_integer, parse_constant=_finite)


def read_json(text: str) -> Any:
    """A JSON value by RFC 8259 and our limits. Python's own modules differ on the edges, so the edges are ours: no
    duplicate key, no number that is not finite, no integer over 300 digits, no lone surrogate, at most 64 levels."""
    if text.count("[") + text.count("{") > 64:
        depth = 0
        for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)):
            depth += 1 if bracket in "[{" else -1
            if depth > 64:
                raise PortDaddyError("BAD_JSON", "the JSON is nested deeper than 64 levels")
    try:
        value = _decoder.decode(text)
    except (ValueError, RecursionError):
        raise PortDaddyError("BAD_JSON", "the text is not valid JSON") from None
    if "\\u" in text and re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            to_json(value).encode()
        except UnicodeEncodeError:
            raise PortDaddyError("BAD_JSON", "the JSON holds half of a surrogate pair") from None
    return value


# ======================================================================================================================
# 4. SETTINGS — what can be configured, and from where
# ======================================================================================================================

# A flag wins over the environment, the environment over the default. An empty variable counts as not set.

SETTINGS: Tuple[Tuple[str, str, Any, Kind, str], ...] = (  # name, environment, default, kind, what it is
    ("port", "PORT_DADDY_PORT", 9876, Integer("a port, or 0 for any free one,", 0, 65535), "where the daemon listens"),
    ("host", "PORT_DADDY_HOST", "", Text("127.0.0.1, ::1 or localhost", r"127\.0\.0\.1|::1|localhost|"),
     "the loopback address it listens on (both)"),
    ("home", "PORT_DADDY_HOME", "", Text("a folder", r"[^\0]{0,4096}"), "the folder that holds its state"),
    ("url", "PORT_DADDY_URL", "", Text("a URL such as http://127.0.0.1:9876", r"(?:https?://[!-~]{1,200})?"),
     "the daemon that commands and clients talk to"),
    ("agent", "PORT_DADDY_AGENT", "", Text("an agent id of 1 to 100 of A-Z a-z 0-9 . _ : -", rf"(?:{NAME})?"),
     "the agent id of commands and clients"),
    ("range", "PORT_DADDY_RANGE", (3100, 9999), kind_of(PortRange), "the ports it gives out by itself"),
    ("max_connections", "PORT_DADDY_MAX_CONNECTIONS", 1024, Integer("a number", 8, 100_000), "connections at once"),
    ("max_waiters", "PORT_DADDY_MAX_WAITERS", 768, Integer("a number", 1, 100_000),
     "polls, streams and lock waits at once"),
)


class Settings(NamedTuple):
    """The settings of one process; `load` reads them, and refuses what it cannot read with the name of the variable."""

    port: int
    host: str
    home: str
    url: str
    agent: str
    range: Tuple[int, int]
    max_connections: int
    max_waiters: int

    @classmethod
    def load(cls, environ: Optional[Mapping[str, str]] = None, **flags: Any) -> Settings:
        environ = os.environ if environ is None else environ
        values: Dict[str, Any] = {}
        for name, variable, default, kind, _ in SETTINGS:
            given, text = flags.get(name), environ.get(variable, "")
            try:
                if given is not None:
                    values[name] = kind.read(given) if isinstance(given, str) else given
                else:
                    values[name] = kind.read(text) if text else default
            except ValueError:
                source = f"--{name}" if given is not None else variable
                raise PortDaddyError("BAD_VALUE", f"{source} must be {kind.expected}") from None
        values["home"] = os.path.abspath(os.path.expanduser(values["home"] or default_home(environ)))
        return cls(**values)


def default_home(environ: Mapping[str, str]) -> str:
    """The state folder where the platform wants it (XDG Base Directory Specification; Apple's Library)."""
    if sys.platform == "darwin":
        return "~/Library/Application Support/port-daddy"
    return os.path.join(environ.get("XDG_STATE_HOME") or "~/.local/state", "port-daddy")


# ======================================================================================================================
# 5. BELL — how to wait without missing anything, and how to wake
# ======================================================================================================================

# 1. Who waits joins its topics first and looks then: whatever happens after the look has rung, so no wake-up is lost.
# 2. Ringing a topic wakes every waiter without a line, and of each line the first that is not awake already: one message
#    wakes one worker, one release one of those who want the lock.
# 3. A waiter that was rung and leaves with nothing passes the ring on. In a line with turns (a lock) only the first may
#    look, and whoever leaves rings the next.

class Waiter:
    """Somebody who waits: its topics, its line (None: no line), and whether it has been rung since it last looked."""

    __slots__ = ("topics", "line", "turn", "condition", "rung", "gone")

    def __init__(self, topics: Sequence[str], line: Optional[str], turn: bool, lock: threading.Lock) -> None:
        self.topics, self.line, self.turn = topics, line, turn
        self.condition = threading.Condition(lock)
        self.rung = self.gone = False

    def wake(self) -> None:
        """Called with the bell's lock held."""
        self.rung = True
        self.condition.notify()


class Bell:
    """Topics, and those who wait for them in the order in which they came."""

    def __init__(self) -> None:
        # Guards the topics and the flags of the waiters, and nothing else; held for a few instructions. Each waiter
        # sleeps on its own condition over it, notified by Waiter.wake.
        self._lock = threading.Lock()
        self._topics: Dict[str, Dict[Waiter, None]] = {}
        self.crowd = 0  # how many are inside `wait`; changed under the lock
        self.closed = False

    def join(self, topics: Sequence[str], line: Optional[str] = None, turn: bool = False) -> Waiter:
        waiter = Waiter(topics, line, turn, self._lock)
        with self._lock:
            for topic in topics:
                self._topics.setdefault(topic, {})[waiter] = None
        return waiter

    def leave(self, waiter: Waiter) -> None:
        with self._lock:
            for topic in waiter.topics:
                waiters = self._topics[topic]
                del waiters[waiter]
                if not waiters:
                    del self._topics[topic]
                elif waiter.line is not None and (waiter.turn or waiter.rung):
                    self._ring(waiters, waiter.line)

    def ring(self, *topics: str) -> None:
        with self._lock:
            for topic in topics:
                if topic in self._topics:
                    self._ring(self._topics[topic], None)

    @staticmethod
    def _ring(waiters: Iterable[Waiter], line: Optional[str]) -> None:
        """Wake all without a line and the first sleeper of each line; or, given a line, the first sleeper of that."""
        served: Set[str] = set()
        for waiter in waiters:
            if waiter.line is None:
                if line is None:
                    waiter.wake()
            elif waiter.line not in served and line in (None, waiter.line):
                if waiter.turn or not waiter.rung:
                    served.add(waiter.line)
                waiter.wake()

    def first(self, waiter: Waiter) -> bool:
        """Whether nobody of the same line stands before this waiter."""
        with self._lock:
            return next(other for other in self._topics[waiter.topics[0]] if other.line == waiter.line) is waiter

    def sleep(self, waiter: Waiter, deadline: float) -> bool:
        """Until rung (True) or until the deadline on the monotonic clock (False)."""
        with self._lock:
            while not waiter.rung and not self.closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                waiter.condition.wait(left)
            waiter.rung = False
            return True

    def hang_up(self, waiter: Waiter) -> None:
        """Wake a waiter whose asker has gone."""
        with self._lock:
            waiter.gone = True
            waiter.wake()

    def wait(self, look: Callable[[], Optional[T]], deadline: float, topics: Sequence[str], line: Optional[str] = None,
             turn: bool = False, before_sleep: Callable[[Waiter], None] = lambda waiter: None) -> Optional[T]:
        """What `look` finds, now or after a ring; None at the deadline or when the asker has gone.

        `look` is called without any lock; `before_sleep` once, when waiting turns out to be necessary."""
        waiter, asleep = self.join(topics, line, turn), False
        try:
            while not waiter.gone:
                if not turn or self.first(waiter):
                    found = look()
                    if found is not None:
                        return found
                if time.monotonic() >= deadline:
                    break
                if self.closed:
                    raise PortDaddyError("SHUTTING_DOWN")
                if not asleep:
                    asleep = True
                    with self._lock:
                        self.crowd += 1
                    before_sleep(waiter)
                self.sleep(waiter, deadline)
            return None
        finally:
            self.leave(waiter)
            if asleep:
                with self._lock:
                    self.crowd -= 1

    def waiting(self, topic: str) -> int:
        with self._lock:
            return len(self._topics.get(topic, ()))

    def topics(self, prefix: str) -> List[str]:
        """The topics with that prefix for which somebody waits now."""
        with self._lock:
            return [topic for topic in self._topics if topic.startswith(prefix)]

    def close(self) -> None:
        """Everybody who waits stops waiting, with SHUTTING_DOWN."""
        with self._lock:
            self.closed = True
            for waiters in self._topics.values():
                for waiter in waiters:
                    waiter.wake()


# ======================================================================================================================
# 6. STORE — what is remembered: the schema, the transaction, functions by noun
# ======================================================================================================================

# 1. One connection, one lock, one writer: whatever a transaction changed is committed before anybody is answered.
# 2. Functions here know SQL and nothing else: no HTTP, no clock (`now` is an argument), no processes.
# 3. Every lease ends on the awake clock (`expires`, milliseconds; it stands still while the machine sleeps) and keeps
#    its length (`ttl`), from which it starts anew after a reboot. Columns named like instants are wall-clock time.
# 4. Message and event ids come from one counter, fencing tokens from another; neither ever repeats a number.
#
#    lock:    free ──lock_take──> held ──lock_extend──> held ──lock_free──> free      (lock_sweep: time or process is over)
#    message: kept ──message_take──> taken by the group ──message_return──> waits for the group again (its answer was lost)
#    hook:    pending ──delivery_settle──> delivered, or pending again, or dead

SCHEMA_VERSION = 1
SCHEMA = """
-- Counters and facts of this database: ids, tokens, boot (of the last start), tag (names this database in delivery ids).
CREATE TABLE META (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;

-- What happened. The activity log, the event stream and the webhooks read this table.
CREATE TABLE EVENTS (
  id INTEGER PRIMARY KEY, at INTEGER NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL, agent TEXT,
  facts TEXT NOT NULL);

-- An identity and its port. `born` is the time since boot at which the port was given: a process that is older and
-- listens there is a stranger. `birth` is the start time of a bound process; without it, `pid` is only a note.
CREATE TABLE SERVICES (
  id TEXT PRIMARY KEY, port INTEGER NOT NULL UNIQUE, pid INTEGER, birth INTEGER, claimer INTEGER, agent TEXT,
  status TEXT NOT NULL, cmd TEXT, cwd TEXT, created INTEGER NOT NULL, seen INTEGER NOT NULL, born INTEGER NOT NULL,
  expires INTEGER, ttl INTEGER, pair TEXT, endpoints TEXT NOT NULL, metadata TEXT,
  health TEXT, healthy INTEGER, latency INTEGER, error TEXT, checked INTEGER, checker TEXT);

-- The port that a released identity had: it gets it back while it is free.
CREATE TABLE FORMER_PORTS (id TEXT PRIMARY KEY, port INTEGER NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID;

-- What a channel holds now, the last id it was given, and the highest id that it no longer has.
CREATE TABLE CHANNELS (
  name TEXT PRIMARY KEY, count INTEGER NOT NULL, bytes INTEGER NOT NULL, last INTEGER NOT NULL,
  dropped INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE MESSAGES (
  id INTEGER PRIMARY KEY, channel TEXT NOT NULL, payload TEXT NOT NULL, sender TEXT, created INTEGER NOT NULL,
  expires INTEGER, ttl INTEGER);
CREATE INDEX MESSAGES_OF_CHANNEL ON MESSAGES (channel, id);
CREATE INDEX MESSAGES_THAT_EXPIRE ON MESSAGES (expires) WHERE expires IS NOT NULL;

-- How far a group of workers has read a channel, and the messages before that point which it has yet to read again.
CREATE TABLE READERS (
  channel TEXT NOT NULL, team TEXT NOT NULL, cursor INTEGER NOT NULL, polled INTEGER NOT NULL,
  PRIMARY KEY (channel, team)) WITHOUT ROWID;
CREATE TABLE RETURNED (
  channel TEXT NOT NULL, team TEXT NOT NULL, message INTEGER NOT NULL,
  PRIMARY KEY (channel, team, message)) WITHOUT ROWID;

CREATE TABLE LOCKS (
  name TEXT PRIMARY KEY, owner TEXT, token INTEGER NOT NULL, pid INTEGER, birth INTEGER, acquired INTEGER NOT NULL,
  expires INTEGER NOT NULL, ttl INTEGER NOT NULL, metadata TEXT) WITHOUT ROWID;

-- `alive` is NULL from death on; the row stays for a day, so that people can see who has died.
CREATE TABLE AGENTS (
  id TEXT PRIMARY KEY, name TEXT, type TEXT NOT NULL, pid INTEGER, birth INTEGER, registered INTEGER NOT NULL,
  heartbeat INTEGER NOT NULL, expires INTEGER NOT NULL, ttl INTEGER NOT NULL, alive INTEGER, max_services INTEGER,
  max_locks INTEGER, metadata TEXT) WITHOUT ROWID;

CREATE TABLE HOOKS (
  id TEXT PRIMARY KEY, url TEXT NOT NULL, events TEXT NOT NULL, secret TEXT, filter TEXT, active INTEGER NOT NULL,
  created INTEGER NOT NULL, triggered INTEGER, successes INTEGER NOT NULL, failures INTEGER NOT NULL, metadata TEXT)
  WITHOUT ROWID;
-- One event for one hook. `due` is on the awake clock, and NULL once the delivery is delivered or dead.
CREATE TABLE DELIVERIES (
  id INTEGER PRIMARY KEY, hook TEXT NOT NULL, event TEXT NOT NULL, body TEXT NOT NULL, status TEXT NOT NULL,
  attempts INTEGER NOT NULL, response INTEGER, duration INTEGER, due INTEGER, error TEXT, created INTEGER NOT NULL);
CREATE INDEX DELIVERIES_DUE ON DELIVERIES (hook, due) WHERE due IS NOT NULL;
CREATE INDEX DELIVERIES_OF_HOOK ON DELIVERIES (hook, id);
"""
KEEP_MESSAGES, KEEP_BYTES = 10_000, 64 * 1024 * 1024  # of a channel
KEEP_EVENTS, KEEP_EVENTS_FOR = 10_000, 7 * 86_400_000
KEEP_DELIVERIES, KEEP_DEAD_AGENTS_FOR, KEEP_FORMER_PORTS = 1_000, 86_400_000, 10_000
RESERVE = 1_000  # numbers of a counter that one write to META makes ours
BOOT_JUMP = 1_000_000  # a power cut may have lost the last second of writes, but hardly a million of them


class Now(NamedTuple):
    """One instant on three clocks: the wall's, the one that stands still during sleep, and which boot that one is of."""

    wall: int
    awake: int
    boot: str


class Counter:
    """Numbers that never repeat: taken from memory, with `reserved` in META never below what was given out."""

    def __init__(self, key: str, value: int) -> None:
        self.key, self.value, self.reserved, self.committed = key, value, value, value


class Store:
    """The database. `rows`, `row` and `run` are its only way to SQL; `transaction` its only way to change anything."""

    def __init__(self, path: str, now: Now) -> None:
        import sqlite3
        if sqlite3.sqlite_version_info < (3, 24):
            raise PortDaddyError("INTERNAL", f"SQLite {sqlite3.sqlite_version} is too old; this needs 3.24 or newer")
        self._errors = sqlite3.Error
        # Guards the connection and the counters. Held for a whole transaction, so writers follow one another.
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
            self._db.row_factory = sqlite3.Row
            for pragma in ("page_size=1024", "locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL",
                           "wal_autocheckpoint=4000", "cache_size=-8192"):
                self._db.execute(f"PRAGMA {pragma}")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise PortDaddyError("INTERNAL", f"{path} was written by a newer version of this program; use that one")
            if version == 0:
                self._create(now)
        except self._errors as error:
            raise PortDaddyError("STORAGE_FULL", f"{path} cannot be used as a database: {error}") from None
        self.tag = str(self._meta("tag"))
        self.ids, self.tokens = (Counter(key, int(self._meta(key))) for key in ("ids", "tokens"))
        if self._meta("boot") != now.boot:
            self._reboot(now)

    def _create(self, now: Now) -> None:
        self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        facts = {"ids": 0, "tokens": 0, "boot": now.boot, "tag": os.urandom(4).hex()}
        self._db.executemany("INSERT INTO META VALUES (?, ?)", facts.items())

    def _meta(self, key: str) -> Any:
        return self._db.execute("SELECT value FROM META WHERE key=?", (key,)).fetchone()[0]

    def _reboot(self, now: Now) -> None:
        """The awake clock began anew, and so does the remaining time of everything; the counters leave a gap."""
        with self.transaction(now) as tx:
            for table in ("SERVICES", "MESSAGES", "LOCKS", "AGENTS"):
                tx.run(f"UPDATE {table} SET expires = ? + ttl WHERE expires IS NOT NULL", now.awake)
            tx.run("UPDATE DELIVERIES SET due = ? WHERE due IS NOT NULL", now.awake)
            tx.run("UPDATE SERVICES SET born = 0, birth = NULL")
            tx.run("UPDATE LOCKS SET birth = 0 WHERE birth IS NOT NULL")  # no process has that start time: it is dead
            tx.run("UPDATE AGENTS SET birth = 0 WHERE birth IS NOT NULL")
            tx.run("UPDATE META SET value = ? WHERE key = 'boot'", now.boot)
            for counter in (self.ids, self.tokens):
                counter.value += BOOT_JUMP

    def transaction(self, now: Now) -> Transaction:
        return Transaction(self, now)

    def rows(self, sql: str, *values: Any) -> List[Any]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except self._errors as error:
                raise self._failed(error) from None

    def row(self, sql: str, *values: Any) -> Optional[Any]:
        found = self.rows(sql, *values)
        return found[0] if found else None

    def value(self, sql: str, *values: Any) -> Any:
        found = self.rows(sql, *values)
        return found[0][0] if found else None

    def run(self, sql: str, *values: Any) -> int:
        """Execute a change inside a transaction; the number of rows it touched."""
        try:
            return self._db.execute(sql, values).rowcount
        except self._errors as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> Exception:
        if type(error).__name__ not in ("OperationalError", "DatabaseError"):
            return error  # not the disk's fault, but ours
        return PortDaddyError("STORAGE_FULL", f"the database could not be read or written ({error}); nothing was changed")

    def begin(self) -> None:
        self._lock.acquire()
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except BaseException as error:
            self._lock.release()
            if isinstance(error, self._errors):
                raise self._failed(error) from None
            raise

    def end(self, commit: bool) -> None:
        try:
            if commit:
                self._db.execute("COMMIT")
                self.ids.committed, self.tokens.committed = self.ids.reserved, self.tokens.reserved
        except self._errors as error:
            commit = False
            raise self._failed(error) from None
        finally:
            if not commit:
                with contextlib.suppress(self._errors):  # a failed COMMIT may have rolled back by itself
                    self._db.execute("ROLLBACK")
                self.ids.reserved, self.tokens.reserved = self.ids.committed, self.tokens.committed
            self._lock.release()

    def close(self) -> None:
        """Write the counters as they are, fold the log into the file, and let go of it."""
        with self._lock, contextlib.suppress(self._errors):
            for counter in (self.ids, self.tokens):
                self._db.execute("UPDATE META SET value = ? WHERE key = ?", (counter.value, counter.key))
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with self._lock:
            self._db.close()


class Transaction:
    """One BEGIN IMMEDIATE … COMMIT; rolled back when its block raises. `topics` ring after the commit, and `due` is the
    earliest instant (awake) at which something that it wrote is over."""

    def __init__(self, store: Store, now: Now) -> None:
        self._store, self.now = store, now
        self.rows, self.row, self.value, self.run = store.rows, store.row, store.value, store.run
        self.topics: Set[str] = set()
        self.due = MAX_INTEGER

    def __enter__(self) -> Transaction:
        self._store.begin()
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self._store.end(commit=kind is None)

    def ring(self, *topics: str) -> None:
        self.topics.update(topics)

    def lasts(self, ttl: Optional[int]) -> Optional[int]:
        """When a lease of that length that begins now is over, on the awake clock."""
        if ttl is None:
            return None
        expires = self.now.awake + ttl
        self.due = min(self.due, expires)
        return expires

    def _next(self, counter: Counter) -> int:
        counter.value += 1
        if counter.value > counter.reserved:
            counter.reserved = counter.value + RESERVE
            self.run("UPDATE META SET value = ? WHERE key = ?", counter.reserved, counter.key)
        return counter.value

    def next_id(self) -> int:
        return self._next(self._store.ids)

    def next_token(self) -> int:
        return self._next(self._store.tokens)

    def emit(self, kind: str, subject: str, agent: Optional[str] = None, **facts: Any) -> None:
        """Something happened: one row in EVENTS, and one delivery for each webhook that wants it."""
        number = self.next_id()
        self.run("INSERT INTO EVENTS VALUES (?, ?, ?, ?, ?, ?)", number, self.now.wall, kind, subject, agent,
                 to_json(facts))
        self.ring("events")
        self.deliver(number, kind, subject, facts)

    def deliver(self, number: int, kind: str, subject: str, facts: Dict[str, Any]) -> None:
        """Queue an event for the webhooks that want it, in this transaction, so that none is lost or invented."""
        for hook in self.rows("SELECT id, events, filter FROM HOOKS WHERE active"):
            if any(matches(pattern, kind) for pattern in json.loads(hook["events"])) and (
                    hook["filter"] is None or matches(hook["filter"], subject)):
                delivery_append(self, hook["id"], number, kind, facts)


# --- services ---------------------------------------------------------------------------------------------------------

def service_row(db: Union[Store, Transaction], identity: str) -> Optional[Any]:
    return db.row("SELECT * FROM SERVICES WHERE id = ?", identity)


def service_insert(tx: Transaction, identity: str, port: int, born: int, **columns: Any) -> bool:
    """Give an identity its port; False when the identity or the port has been given in the meantime."""
    values = {"id": identity, "port": port, "status": "assigned", "created": tx.now.wall, "seen": tx.now.wall,
              "born": born, "endpoints": to_json({"local": f"http://localhost:{port}"}), **columns}
    names = ", ".join(values)
    return tx.run(f"INSERT INTO SERVICES ({names}) VALUES ({', '.join('?' * len(values))}) ON CONFLICT DO NOTHING",
                  *values.values()) == 1


def service_update(tx: Transaction, identity: str, **columns: Any) -> None:
    assignments = ", ".join(f"{name} = ?" for name in columns)
    tx.run(f"UPDATE SERVICES SET {assignments} WHERE id = ?", *columns.values(), identity)
    tx.ring(f"service:{identity}")


def service_delete(tx: Transaction, rows: Sequence[Any], agent: Optional[str]) -> List[int]:
    """Release services and remember their ports for their return; the ports that became free."""
    for row in rows:
        tx.run("DELETE FROM SERVICES WHERE id = ?", row["id"])
        tx.run("INSERT INTO FORMER_PORTS VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET port = excluded.port, "
               "at = excluded.at", row["id"], row["port"], tx.now.wall)
        tx.emit("service.release", row["id"], agent, serviceId=row["id"], agentId=row["agent"], released=1,
                releasedPorts=[row["port"]])
        tx.ring(f"service:{row['id']}")
    return [row["port"] for row in rows]


# --- channels ---------------------------------------------------------------------------------------------------------

def message_append(tx: Transaction, channel: str, payload: Any, sender: Optional[str], ttl: Optional[int]) -> int:
    """Add a message, drop the oldest beyond what a channel keeps, and ring for the readers."""
    number, text = tx.next_id(), to_json(payload)
    tx.run("INSERT INTO MESSAGES VALUES (?, ?, ?, ?, ?, ?, ?)", number, channel, text, sender, tx.now.wall,
           tx.lasts(ttl), ttl)
    tx.run("INSERT INTO CHANNELS VALUES (?, 1, ?, ?, 0) ON CONFLICT (name) DO UPDATE SET count = count + 1, "
           "bytes = bytes + excluded.bytes, last = excluded.last", channel, len(text), number)
    held = tx.row("SELECT count, bytes FROM CHANNELS WHERE name = ?", channel)
    while held and (held["count"] > KEEP_MESSAGES or held["bytes"] > KEEP_BYTES):
        message_drop(tx, channel, tx.rows("SELECT id, length(payload) AS size FROM MESSAGES WHERE channel = ? "
                                          "ORDER BY id LIMIT 1", channel))
        held = tx.row("SELECT count, bytes FROM CHANNELS WHERE name = ?", channel)
    tx.deliver(number, "message.publish", channel, {"channel": channel, "id": number, "sender": sender})
    tx.ring(f"channel:{channel}", "channel:*", "events")
    return number


def message_drop(tx: Transaction, channel: str, rows: Sequence[Any]) -> None:
    """Forget messages (rows of id, size) of a channel, and remember the highest id, so that a loss can be announced."""
    for row in rows:
        tx.run("DELETE FROM MESSAGES WHERE id = ?", row["id"])
        tx.run("DELETE FROM RETURNED WHERE channel = ? AND message = ?", channel, row["id"])
    tx.run("UPDATE CHANNELS SET count = count - ?, bytes = bytes - ?, dropped = max(dropped, ?) WHERE name = ?",
           len(rows), sum(row["size"] for row in rows), max((row["id"] for row in rows), default=0), channel)


def message_list(db: Union[Store, Transaction], pattern: str, after: int, limit: int, awake: int) -> List[Any]:
    """The messages of one channel, or of all that a pattern covers, after an id; oldest first."""
    if "*" in pattern:
        return db.rows("SELECT * FROM MESSAGES WHERE id > ? AND channel GLOB ? AND (expires IS NULL OR expires > ?) "
                       "ORDER BY id LIMIT ?", after, pattern, awake, limit)
    return db.rows("SELECT * FROM MESSAGES WHERE channel = ? AND id > ? AND (expires IS NULL OR expires > ?) "
                   "ORDER BY id LIMIT ?", pattern, after, awake, limit)


def message_newest(db: Store, channel: str, limit: int, awake: int) -> List[Any]:
    return db.rows("SELECT * FROM MESSAGES WHERE channel = ? AND (expires IS NULL OR expires > ?) "
                   "ORDER BY id DESC LIMIT ?", channel, awake, limit)[::-1]


def message_waiting(db: Union[Store, Transaction], channel: str, team: str, awake: int) -> Optional[Any]:
    """The message that the group reads next: one it was given back, else the first behind its cursor."""
    back = db.row("SELECT MESSAGES.* FROM RETURNED JOIN MESSAGES ON MESSAGES.id = message WHERE RETURNED.channel = ? "
                  "AND team = ? AND (expires IS NULL OR expires > ?) ORDER BY message LIMIT 1", channel, team, awake)
    if back:
        return back
    cursor = db.value("SELECT cursor FROM READERS WHERE channel = ? AND team = ?", channel, team) or 0
    found = message_list(db, channel, cursor, 1, awake)
    return found[0] if found else None


def message_take(tx: Transaction, channel: str, team: str) -> Optional[Any]:
    """Hand the next message to one of the group, and to nobody else of it."""
    message = message_waiting(tx, channel, team, tx.now.awake)
    if message and not tx.run("DELETE FROM RETURNED WHERE channel = ? AND team = ? AND message = ?",
                              channel, team, message["id"]):
        tx.run("INSERT INTO READERS VALUES (?, ?, ?, ?) ON CONFLICT (channel, team) DO UPDATE SET "
               "cursor = excluded.cursor, polled = excluded.polled", channel, team, message["id"], tx.now.wall)
    return message


def message_return(tx: Transaction, channel: str, team: str, message: int) -> None:
    """Undo a take whose answer did not reach the worker."""
    tx.run("INSERT INTO RETURNED SELECT ?, ?, id FROM MESSAGES WHERE id = ?", channel, team, message)
    tx.ring(f"channel:{channel}")


def channel_dropped(db: Store, pattern: str) -> int:
    """The highest id that the channel, or a channel of the pattern, no longer has."""
    comparison = "GLOB" if "*" in pattern else "="
    return db.value(f"SELECT max(dropped) FROM CHANNELS WHERE name {comparison} ?", pattern) or 0


# --- locks ------------------------------------------------------------------------------------------------------------

def lock_row(db: Union[Store, Transaction], name: str, awake: int) -> Optional[Any]:
    return db.row("SELECT * FROM LOCKS WHERE name = ? AND expires > ?", name, awake)


def lock_take(tx: Transaction, name: str, owner: Optional[str], ttl: int, pid: Optional[int], birth: Optional[int],
              metadata: Optional[Dict[str, Any]]) -> Optional[int]:
    """Take a free lock; its fencing token, or None when it is held."""
    lock_sweep(tx, "name = ? AND expires <= ?", name, tx.now.awake)
    if tx.value("SELECT 1 FROM LOCKS WHERE name = ?", name):
        return None
    token = tx.next_token()
    tx.run("INSERT INTO LOCKS VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", name, owner, token, pid, birth, tx.now.wall,
           tx.lasts(ttl), ttl, maybe_json(metadata))
    tx.emit("lock.acquire", name, owner, lockName=name, owner=owner, token=token, expiresAt=tx.now.wall + ttl)
    return token


def lock_extend(tx: Transaction, name: str, token: int, ttl: int) -> bool:
    return tx.run("UPDATE LOCKS SET expires = ?, ttl = ? WHERE name = ? AND token = ? AND expires > ?",
                  tx.lasts(ttl), ttl, name, token, tx.now.awake) == 1


def lock_free(tx: Transaction, row: Any, kind: str, reason: str) -> bool:
    """End one lease, for the first of those who wait; False when it has ended already."""
    if not tx.run("DELETE FROM LOCKS WHERE name = ? AND token = ?", row["name"], row["token"]):
        return False
    tx.emit(kind, row["name"], row["owner"], lockName=row["name"], owner=row["owner"], token=row["token"],
            reason=reason)
    tx.ring(f"lock:{row['name']}")
    return True


def lock_sweep(tx: Transaction, condition: str, *values: Any, reason: str = "time") -> List[str]:
    """End the leases that a condition names; the names of the locks."""
    rows = tx.rows(f"SELECT * FROM LOCKS WHERE {condition}", *values)
    return [row["name"] for row in rows if lock_free(tx, row, "lock.expire", reason)]


# --- agents -----------------------------------------------------------------------------------------------------------

def agent_alive(db: Union[Store, Transaction], agent: Optional[str], awake: int) -> Optional[Any]:
    return db.row("SELECT * FROM AGENTS WHERE id = ? AND alive AND expires > ?", agent, awake)


def agent_insert(tx: Transaction, agent: str, ttl: int, **columns: Any) -> None:
    """Register, or register again and revive: columns that are not given keep their values."""
    tx.run("INSERT INTO AGENTS (id, type, registered, heartbeat, expires, ttl, alive) VALUES (?, 'cli', ?, ?, ?, ?, 1) "
           "ON CONFLICT (id) DO UPDATE SET heartbeat = excluded.heartbeat, expires = excluded.expires, "
           "ttl = excluded.ttl, alive = 1", agent, tx.now.wall, tx.now.wall, tx.lasts(ttl), ttl)
    if columns:
        tx.run(f"UPDATE AGENTS SET {', '.join(f'{name} = ?' for name in columns)} WHERE id = ?",
               *columns.values(), agent)


def agent_die(tx: Transaction, agent: str, survives: Callable[[Any], bool]) -> None:
    """Free what a dead agent held, in this one transaction, and say in one event what that was."""
    tx.run("UPDATE AGENTS SET alive = NULL, birth = NULL WHERE id = ?", agent)
    locks = lock_sweep(tx, "owner = ?", agent, reason="agent")
    lost = [row for row in tx.rows("SELECT * FROM SERVICES WHERE agent = ?", agent) if not survives(row)]
    service_delete(tx, lost, agent)
    tx.emit("agent.stale", agent, agent, agentId=agent, locks=locks, services=[row["id"] for row in lost], messages=[])


# --- webhooks ---------------------------------------------------------------------------------------------------------

def delivery_append(tx: Transaction, hook: str, event: int, kind: str, facts: Dict[str, Any]) -> int:
    body = to_json({"id": event, "event": kind, "type": kind, "timestamp": tx.now.wall, "data": facts})
    number = tx.next_id()
    tx.run("INSERT INTO DELIVERIES VALUES (?, ?, ?, ?, 'pending', 0, NULL, NULL, ?, NULL, ?)", number, hook, kind, body,
           tx.now.awake, tx.now.wall)
    tx.ring("courier")
    return number


def delivery_due(db: Store, hook: str, awake: int) -> Optional[Any]:
    """What to send next to a hook: first attempts in the order of the events, retries as they fall due between them."""
    return db.row("SELECT DELIVERIES.*, url, secret FROM DELIVERIES JOIN HOOKS ON HOOKS.id = hook "
                  "WHERE hook = ? AND due <= ? AND active ORDER BY due, DELIVERIES.id LIMIT 1", hook, awake)


def delivery_settle(tx: Transaction, row: Any, retry: Optional[int], response: Optional[int], duration: int,
                    error: Optional[str]) -> None:
    """Note an attempt: delivered (no error), to be tried again after `retry` ms, or dead (no `retry`)."""
    status = "delivered" if error is None else "dead" if retry is None else "pending"
    due = tx.now.awake + retry if status == "pending" and retry is not None else None
    tx.run("UPDATE DELIVERIES SET status = ?, attempts = attempts + 1, response = ?, duration = ?, due = ?, error = ? "
           "WHERE id = ?", status, response, duration, due, error, row["id"])
    tx.run("UPDATE HOOKS SET triggered = ?, successes = successes + ?, failures = failures + ? WHERE id = ?",
           tx.now.wall, status == "delivered", error is not None, row["hook"])
    tx.run("DELETE FROM DELIVERIES WHERE hook = ? AND due IS NULL AND id <= (SELECT id FROM DELIVERIES WHERE hook = ? "
           "ORDER BY id DESC LIMIT 1 OFFSET ?)", row["hook"], row["hook"], KEEP_DELIVERIES)


# --- the log ----------------------------------------------------------------------------------------------------------

def event_list(db: Store, kind: Optional[str], agent: Optional[str] = None, subject: Optional[str] = None,
               after: int = 0, since: int = 0, until: int = MAX_INTEGER, limit: int = 100, newest: bool = False,
               ) -> List[Any]:
    """Events that match. A published message is its own event: it is among them only when asked for by its type."""
    sources = "SELECT id, at, kind, subject, agent, facts FROM EVENTS"
    if kind is not None and kind.strip("*") and matches(kind, "message.publish"):
        sources += (" UNION ALL SELECT id, created, 'message.publish', channel, sender, json_object('channel', channel,"
                    " 'id', id, 'sender', sender) FROM MESSAGES")
    return db.rows(f"SELECT * FROM ({sources}) WHERE id > ? AND at BETWEEN ? AND ? AND kind GLOB ? "
                   f"AND (? IS NULL OR agent = ?) AND (? IS NULL OR subject GLOB ?) ORDER BY id "
                   f"{'DESC' if newest else 'ASC'} LIMIT ?",
                   after, since, until, kind or "*", agent, agent, subject, subject, limit)


def prune(tx: Transaction) -> None:
    """Forget what is kept for a time or up to a number only: events, the dead, the ports of old identities."""
    tx.run("DELETE FROM EVENTS WHERE at < ? OR id <= (SELECT id FROM EVENTS ORDER BY id DESC LIMIT 1 OFFSET ?)",
           tx.now.wall - KEEP_EVENTS_FOR, KEEP_EVENTS)
    tx.run("DELETE FROM AGENTS WHERE alive IS NULL AND expires < ?", tx.now.awake - KEEP_DEAD_AGENTS_FOR)
    tx.run("DELETE FROM FORMER_PORTS WHERE at <= (SELECT at FROM FORMER_PORTS ORDER BY at DESC LIMIT 1 OFFSET ?)",
           KEEP_FORMER_PORTS)


# ======================================================================================================================
# 7. HOST — the world outside: ports, processes, connections, files
# ======================================================================================================================

# 1. The only room that connects out, forks or kills. It has no policy: it says what is so, or does what it is told.
# 2. What goes wrong out there leaves as a problem or as a plain answer, never as an OSError.

WELL_KNOWN_PORTS = frozenset((  # servers that people install want these; never given out unless asked for by number
    3306, 3389, 4222, 4369, 5000, 5353, 5432, 5601, 5672, 5900, 5984, 6379, 6443, 7000, 7474, 7687, 8000, 8080, 8086,
    8123, 8200, 8443, 8500, 8888, 9000, 9042, 9090, 9092, 9200, 9300, 9411, 9876))
BLOCKED_PORTS = frozenset((  # no browser opens these (WHATWG Fetch, "bad port")
    1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109, 110,
    111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530, 531, 532,
    540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061,
    6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080))
LINUX = sys.platform.startswith("linux")


def log(text: str) -> None:
    """One line on stderr, with the time, harmless to a terminal."""
    with contextlib.suppress(OSError, ValueError):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), printable(text).replace("\n", "\\n"), file=sys.stderr, flush=True)


def boot_id() -> str:
    """A text that is the same until the machine is started again."""
    if LINUX:
        return read_text("/proc/sys/kernel/random/boot_id").strip() or "unknown"
    return command_output("sysctl", "-n", "kern.bootsessionuuid").strip() or "unknown"


def read_text(path: str) -> str:
    """What a file holds; empty when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def command_output(*words: str) -> str:
    """What a command prints within five seconds; empty when it fails or does not exist."""
    import subprocess
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=5, check=False).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return ""


# --- processes --------------------------------------------------------------------------------------------------------

def since_boot() -> int:
    """Milliseconds since the machine was started, sleep included: the clock on which processes are born."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000 if LINUX else time.monotonic_ns() // 1_000_000


def process_birth(pid: int) -> Optional[int]:
    """When a process was started, in milliseconds since boot; None when there is none, or only its zombie."""
    if LINUX:
        text = read_text(f"/proc/{pid}/stat")
        fields = text[text.rfind(")") + 2:].split()  # the name in brackets may hold anything
        if len(fields) < 20 or fields[0] in "ZX":
            return None
        return int(fields[19]) * 1000 // os.sysconf("SC_CLK_TCK")
    state, _, started = command_output("ps", "-o", "state=,lstart=", "-p", str(pid)).strip().partition(" ")
    if not started or state.startswith("Z"):
        return None
    # A wall-clock second is all that ps tells; as an identity of the process it serves as well.
    return int((time.mktime(time.strptime(started.strip())) - time.time()) + since_boot() / 1000) * 1000


def process_lives(pid: int, birth: Optional[int]) -> bool:
    """Whether this very process is alive: the same pid with another start time is another process."""
    born = process_birth(pid)
    return born is not None and (birth is None or abs(born - birth) <= (0 if LINUX else 2_000))


def process_command(pid: int) -> str:
    """The command line of a process, as far as we may see it."""
    if LINUX:
        return read_text(f"/proc/{pid}/cmdline").replace("\0", " ").strip()[:200]
    return command_output("ps", "-o", "command=", "-p", str(pid)).strip()[:200]


def process_start(arguments: Sequence[str], environ: Mapping[str, str], log_path: str) -> subprocess.Popen[bytes]:
    """Start a process that outlives us: a session of its own, nothing inherited, what it says in a file."""
    import subprocess
    try:
        with open(log_path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as output:
            if output.tell() > 1_000_000:
                output.truncate(0)
            return subprocess.Popen(list(arguments), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                    start_new_session=True, env=dict(environ), cwd="/")
    except OSError as error:
        raise PortDaddyError("INTERNAL", f"the daemon could not be started: {error}") from None


def process_run(arguments: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in the foreground, on our own terminal."""
    import subprocess
    try:
        return subprocess.Popen(list(arguments), env=dict(environ))
    except OSError as error:
        problem = PortDaddyError("BAD_VALUE", f"{arguments[0]!r} cannot be run: {error.strerror}")
        problem.exit_status = 127 if error.errno == errno.ENOENT else 126  # as a shell says it
        raise problem from None


def process_signal(pid: int, number: int) -> bool:
    """Send a signal; False when there is no such process, or it is not ours."""
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True


# --- ports ------------------------------------------------------------------------------------------------------------

class Listener(NamedTuple):
    """A socket that listens: `key` tells it from the next one on the same port."""

    port: int
    key: int
    pid: Optional[int]


def listeners() -> Dict[int, List[Listener]]:
    """Every TCP port of this machine on which something listens, on any address."""
    found: Dict[int, List[Listener]] = {}
    for listener in _listeners_linux() if LINUX else _listeners_lsof():
        found.setdefault(listener.port, []).append(listener)
    return found


def _listeners_linux() -> Iterator[Listener]:
    """Ask the kernel for the sockets in state LISTEN (sock_diag(7)): 40 µs where reading /proc/net/tcp takes 8 ms."""
    tcp_listen, dump = 1 << 10, 0x301
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4) as netlink:  # NETLINK_SOCK_DIAG
            netlink.settimeout(2)
            for family in (socket.AF_INET, socket.AF_INET6):
                query = struct.pack("=BBBBI48x", family, socket.IPPROTO_TCP, 0, 0, tcp_listen)
                netlink.send(struct.pack("=IHHII", 16 + len(query), 20, dump, 1, 0) + query)
                for kind, body in _netlink_messages(netlink):
                    if kind == 20:  # SOCK_DIAG_BY_FAMILY: struct inet_diag_msg
                        yield Listener(struct.unpack_from(">H", body, 4)[0], struct.unpack_from("=I", body, 68)[0], None)
    except OSError:
        for path in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in read_text(path).splitlines()[1:]:
                words = line.split()
                if words[3] == "0A":
                    yield Listener(int(words[1].rpartition(":")[2], 16), int(words[9]), None)


def _netlink_messages(netlink: socket.socket) -> Iterator[Tuple[int, bytes]]:
    while True:
        data, offset = netlink.recv(65536), 0
        while offset < len(data):
            length, kind = struct.unpack_from("=IH", data, offset)
            if kind == 2:  # NLMSG_ERROR
                raise OSError(errno.EOPNOTSUPP, "no sock_diag")
            if kind == 3:  # NLMSG_DONE
                return
            yield kind, data[offset + 16:offset + length]
            offset += (length + 3) & ~3


def _listeners_lsof() -> Iterator[Listener]:
    pid = 0
    for line in command_output("lsof", "-nP", "-iTCP", "-sTCP:LISTEN", "-Fpn").splitlines():
        if line.startswith("p"):
            pid = int(line[1:])
        elif line.startswith("n") and line.rpartition(":")[2].isdigit():
            yield Listener(int(line.rpartition(":")[2]), pid, pid)


def listener_pids(wanted: Iterable[Listener]) -> Dict[int, int]:
    """Which process holds each listener, by the listener's key, as far as we may see: ours, or all for root."""
    known = {listener.key: listener.pid for listener in wanted}
    found = {key: pid for key, pid in known.items() if pid is not None}
    if not LINUX or len(found) == len(known):
        return found
    targets = {f"socket:[{key}]": key for key in known}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            for descriptor in os.scandir(f"/proc/{pid}/fd"):
                key = targets.get(os.readlink(descriptor.path))
                if key is not None and (key not in found or process_birth(found[key]) is None):
                    found[key] = pid
        except OSError:
            continue  # it has ended, or belongs to somebody else
        if len(found) == len(known):
            break
    return found


def port_holder(port: int) -> Tuple[Optional[int], str]:
    """Who listens on a port: its pid (None when it may not be seen) and words for people."""
    those = listeners().get(port, [])
    for pid in listener_pids(those).values():
        return pid, f"{process_command(pid) or 'a process'} (pid {pid})"
    return None, "a process that we may not see" if those else "a socket that is bound to it"


def port_free(port: int, reuse: bool = False) -> bool:
    """Whether a program could bind the port now, on all addresses and on loopback, IPv4 and IPv6.

    Bound without listening, so that nobody can connect meanwhile. `reuse` forgives connections that linger from the
    port's last owner (TIME_WAIT)."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET, "127.0.0.1"),
                            (socket.AF_INET6, "::"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if reuse:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # a machine without IPv6
                return False
    return True


def ephemeral_ports() -> Tuple[int, int]:
    """The range from which the kernel takes the near end of outgoing connections."""
    words = read_text("/proc/sys/net/ipv4/ip_local_port_range").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else (49152, 65535)


# --- connections ------------------------------------------------------------------------------------------------------

def dial(addresses: Sequence[Tuple[Any, ...]], timeout: float) -> socket.socket:
    """Connect to the first of some addresses that answers, within one deadline for all of them."""
    deadline, last = time.monotonic() + timeout, "there is no address to connect to"
    for family, _, _, _, address in addresses:
        try:
            connection = socket.socket(family, socket.SOCK_STREAM)
            try:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                connection.connect(address)
                if connection.getsockname() == connection.getpeername():  # a free port of the ephemeral range met itself
                    raise OSError(errno.ECONNREFUSED, "Connection refused")
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
            except BaseException:
                connection.close()
                raise
        except socket.timeout:
            last = "no answer in time"
        except OSError as error:
            last = error.strerror or str(error)
    raise DaemonUnreachable(last)


def split_url(url: str) -> Tuple[str, str, int, str]:
    """Scheme, host, port and target of an absolute URL."""
    found = re.fullmatch(r"(?i:(https?|wss?))://(\[[^\]/?#]*\]|[^:/?#\[\]@]+)(?::([0-9]{1,5}))?([/?][^#]*)?", url)
    if not found:
        raise PortDaddyError("BAD_VALUE", "a URL must look like http://127.0.0.1:9876")
    scheme, host, port, target = found.group(1).lower(), found.group(2).strip("[]"), found.group(3), found.group(4)
    target = target or "/"
    return scheme, host, int(port or (443 if scheme.endswith("s") else 80)), target if target[0] == "/" else f"/{target}"


def resolve(host: str, port: int) -> List[Tuple[Any, ...]]:
    """The addresses of a host, for `dial`."""
    try:
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        raise DaemonUnreachable(f"the name {host} has no address ({error})") from None


def check_target(url: str, own_port: int, by_name: bool = True) -> List[Tuple[Any, ...]]:
    """The addresses behind a URL that somebody gave us to call, or TARGET_REFUSED when one of them must not be.

    Loopback, private and public addresses are called; our own port, link-local (which holds the clouds' metadata),
    multicast and unspecified addresses are not. Without `by_name`, a name is left to be looked up when it is used."""
    import ipaddress
    _, host, port, _ = split_url(url)
    if not by_name and not re.fullmatch(r"[0-9a-fA-Fx.]+|.*:.*|localhost\.?", host):
        return []
    addresses = resolve(host, port)
    for *_, address in addresses:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
            ip = ip.ipv4_mapped or (ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if nat64 else ip)
        if ip.is_link_local or ip.is_multicast or ip.is_unspecified or str(ip) in ("255.255.255.255", "fd00:ec2::254"):
            raise PortDaddyError("TARGET_REFUSED", f"{host} leads to {ip}, a link-local, metadata, multicast or "
                                 "unspecified address, which is never called", host=host)
        if ip.is_loopback and port == own_port:
            raise PortDaddyError("TARGET_REFUSED", f"{host}:{port} is this daemon itself; give the receiver's own port",
                                 host=host)
    return addresses


class Answer(NamedTuple):
    """The head of an HTTP reply, of which nothing else is kept."""

    status: int
    retry_after: Optional[int]  # seconds


def http_call(method: str, url: str, addresses: Sequence[Tuple[Any, ...]], headers: Mapping[str, str], body: bytes,
              timeout: float) -> Answer:
    """One request to addresses that were checked before, within one deadline: no redirect, no proxy, no reuse."""
    deadline = time.monotonic() + timeout
    scheme, host, port, target = split_url(url)
    try:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(dial(addresses, timeout))
            if scheme == "https":
                import ssl
                connection = stack.enter_context(
                    ssl.create_default_context().wrap_socket(connection, server_hostname=host))
            authority = f"[{host}]" if ":" in host else host
            lines = [f"{method} {target} HTTP/1.1", f"Host: {authority}:{port}", "Connection: close",
                     f"User-Agent: port-daddy/{__version__}", *(f"{name}: {value}" for name, value in headers.items())]
            if body:
                lines.append(f"Content-Length: {len(body)}")
            connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
            reply = b""
            while b"\r\n\r\n" not in reply and len(reply) < 65536:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                chunk = connection.recv(65536)
                if not chunk or time.monotonic() > deadline:
                    break
                reply += chunk
    except socket.timeout:
        raise PortDaddyError("TIMED_OUT", f"no answer within {timeout:g} s") from None
    except (OSError, ValueError) as error:
        raise DaemonUnreachable(str(error) or type(error).__name__) from None
    head = re.match(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r]", reply)
    if not head:
        raise PortDaddyError("BAD_REQUEST", "what answered is not HTTP" if reply else "it closed without an answer")
    wait = re.search(rb"(?i)\r\nretry-after:[ \t]*([0-9]{1,6})[ \t]*\r\n", reply)
    return Answer(int(head.group(1)), int(wait.group(1)) if wait else None)


# --- files ------------------------------------------------------------------------------------------------------------

def open_home(path: str) -> None:
    """Make the state folder ours alone, or refuse it when it belongs to somebody else."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.stat(path)
        if found.st_uid != os.geteuid():
            raise PortDaddyError("INTERNAL", f"{path} belongs to another user; set PORT_DADDY_HOME to a folder of yours")
        if stat.S_IMODE(found.st_mode) != 0o700:
            os.chmod(path, 0o700)
        os.umask(0o077)
    except OSError as error:
        raise PortDaddyError("INTERNAL", f"the state folder {path} cannot be used: {error.strerror}") from None


def lock_home(path: str) -> Optional[int]:
    """Be the one daemon of a state folder: a descriptor to keep open until the end, None when another one is.

    The kernel's lock ends with the process, however it ends. It is taken before the database is touched."""
    import fcntl
    try:
        descriptor = os.open(os.path.join(path, "daemon.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
    except OSError as error:
        raise PortDaddyError("INTERNAL", f"the state folder {path} cannot be written: {error.strerror}") from None
    return descriptor


def write_file(path: str, text: str) -> None:
    """Replace a file (0600) in one step, so that nobody ever reads half of it."""
    try:
        with open(f"{path}.new", "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)
        os.replace(f"{path}.new", path)
    except OSError as error:
        raise PortDaddyError("STORAGE_FULL", f"{path} could not be written: {error.strerror}") from None


def remove_file(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def file_hash(path: str) -> str:
    import hashlib
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# ======================================================================================================================
# 8. DAEMON — what operations are performed on, and what time does to it
# ======================================================================================================================

# 1. It starts no thread and opens no door: whoever holds one may call its methods, tests included.
# 2. `write` is the only way to change anything: commit first, ring then. The store's lock and the bell's are never held
#    together.
# 3. `tick` is everything that time does, in one place, and says how long one may sleep until the next of it.
#
#    service: assigned ──observe: something listens──> running ──observe: it is gone──> stopped, or dead with its process
#                 └──observe: a stranger listens──> hijacked         └──report_health──> unhealthy ──> running
#    agent:   alive ──tick: ttl is over or process dead──> dead ──register, heartbeat──> alive

BIRTH_SLACK = 20  # ms: the kernel counts the start of a process in ticks of 10 ms
TICK_AT_MOST, TICK_FOR_PROCESSES, PRUNE_EVERY = 60_000, 500, 60_000
HEALTH_EVERY, HEALTH_TIMEOUT = 5_000, 2.0


class Clock:
    """The machine's clocks. Tests give the daemon another object with the same `now`."""

    def __init__(self) -> None:
        self.boot, self.offset = boot_id(), 0

    def now(self) -> Now:
        awake = time.monotonic_ns() // 1_000_000
        offset = time.time_ns() // 1_000_000 - awake
        if abs(offset - self.offset) > 2:  # two readings are never of one instant; what ends then should not flicker
            self.offset = offset
        return Now(awake + self.offset, awake, self.boot)


class AskerGone(Exception):
    """Whoever asked has hung up: nothing may be given, and there is nobody to answer."""


class Asker:
    """Who asks, as far as the request says; HTTP knows a subclass that has a connection."""

    def __init__(self, agent: Optional[str] = None, pid: Optional[int] = None, after: Optional[int] = None) -> None:
        self.agent, self.pid = agent, pid
        self.after = after  # Last-Event-ID: the last event that a stream's reader has seen
        self.undo: Optional[Callable[[], None]] = None  # what to do when the answer does not reach the asker

    def who(self, name: Optional[str]) -> Optional[str]:
        """The one rule for owners, senders and agents: a field, else the agent, else the process, else nobody."""
        return name or self.agent or (f"pid-{self.pid}" if self.pid else None)

    def connected(self) -> bool:
        return True

    def stay(self) -> None:
        """Called as the last thing of a transaction that gives something."""
        if not self.connected():
            raise AskerGone

    def watch(self, bell: Bell, waiter: Waiter) -> None:
        """Called before the asker is made to wait, so that a hang-up can wake the waiter."""


class Daemon:
    """Settings, store, bell and clock, and the few facts that live in memory only."""

    def __init__(self, settings: Settings, clock: Optional[Clock] = None) -> None:
        self.settings, self.clock, self.bell = settings, clock or Clock(), Bell()
        self.store = Store(os.path.join(settings.home, "port_daddy.db"), self.clock.now())
        self.port = settings.port  # the real one, once a server has bound it
        self.instance, self.started = os.urandom(6).hex(), self.clock.now()
        self.planned = 0  # awake: when the next tick is due; a lease that ends earlier rings the keeper
        self.pruned = 0
        self.adopted: Dict[str, int] = {}  # the listener (its key) that each service was seen with
        self._listening: Tuple[float, Dict[int, List[Listener]]] = (0.0, {})

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        with self.store.transaction(self.clock.now()) as tx:
            yield tx
        self.bell.ring(*tx.topics)
        if tx.due < self.planned:
            self.bell.ring("keeper")

    def wait(self, asker: Asker, look: Callable[[], Optional[T]], timeout: int, topics: Sequence[str],
             line: Optional[str] = None, turn: bool = False) -> Optional[T]:
        """What `look` finds within `timeout` ms; None when time is over or the asker has hung up."""
        def before_sleep(waiter: Waiter) -> None:
            if self.bell.crowd > self.settings.max_waiters:
                raise PortDaddyError("BUSY", f"{self.settings.max_waiters} requests are waiting already, which is the "
                                     "limit (PORT_DADDY_MAX_WAITERS); try again in a second")
            asker.watch(self.bell, waiter)
        return self.bell.wait(look, time.monotonic() + timeout / 1000, topics, line, turn, before_sleep)

    # --- ports and what listens on them -------------------------------------------------------------------------------

    def listening(self) -> Dict[int, List[Listener]]:
        """Who listens where: now on Linux, where asking costs 40 µs; not older than a second where it takes lsof."""
        taken, found = self._listening
        if LINUX or time.monotonic() - taken > 1:
            found = listeners()
            self._listening = time.monotonic(), found
        return found

    def stranger(self, row: Any, there: Sequence[Listener]) -> Tuple[Optional[int], Optional[int]]:
        """The pid of a stranger on the port of a service, and the pid of its own listener, as far as they can be seen.

        A stranger is a visible process that is older than the claim and did not make it."""
        own = None
        for pid in listener_pids(there).values():
            birth = process_birth(pid)
            if pid in (row["claimer"], row["pid"] if row["birth"] is not None else None):
                own = pid
            elif birth is not None and birth < row["born"] - BIRTH_SLACK:
                return pid, None
            else:
                own = pid
        return None, own

    def observe(self) -> None:
        """Compare the table with who really listens: adopt, miss, or notice a stranger."""
        listening = self.listening()
        for row in self.store.rows("SELECT id, port, pid, birth, claimer, born, status, checker FROM SERVICES"):
            there = listening.get(row["port"], [])
            key = there[0].key if there else None
            calm = row["status"] in (("running", "unhealthy", "hijacked", "detached") if there else
                                     ("assigned", "starting", "stopped", "crashed", "dead"))
            bound_and_dead = row["status"] == "assigned" and row["birth"] is not None and not process_lives(
                row["pid"], row["birth"])
            if calm and self.adopted.get(row["id"]) == key and not bound_and_dead or self.supervised(row):
                continue
            stranger, pid = self.stranger(row, there)
            news: Dict[str, Any]
            if stranger:
                news = {"status": "hijacked", "error": f"pid {stranger} listens on the port and is older than the claim"}
            elif there:
                news = {"status": "running", "pid": pid or row["pid"], "error": None}
            elif bound_and_dead or row["pid"] and not process_lives(row["pid"], row["birth"]):
                news = {"status": "dead", "healthy": None}
            else:
                news = {"status": "stopped" if row["status"] != "assigned" else "assigned", "healthy": None}
            if key is None:
                self.adopted.pop(row["id"], None)
            else:
                self.adopted[row["id"]] = key
            with self.write() as tx:
                service_update(tx, row["id"], **news)

    def supervised(self, row: Any) -> bool:
        """Whether an agent that is alive has said that it checks this service itself."""
        return row["checker"] is not None and agent_alive(
            self.store, row["checker"], self.clock.now().awake) is not None

    def check_health(self, row: Any) -> None:
        """Ask a service whether it is well: its health URL, else whether its port answers."""
        began, error = time.monotonic(), None
        try:
            if row["health"]:
                addresses = check_target(row["health"], self.port)
                answer = http_call("GET", row["health"], addresses, {}, b"", HEALTH_TIMEOUT)
                if not 200 <= answer.status < 400:
                    error = f"HTTP {answer.status}"
            else:
                dial(resolve("localhost", row["port"]), HEALTH_TIMEOUT).close()
        except PortDaddyError as problem:
            error = str(problem)
        self.report_health(row["id"], error is None, round((time.monotonic() - began) * 1000), error)

    def report_health(self, identity: str, healthy: bool, latency: Optional[int], error: Optional[str],
                      checker: Optional[str] = None) -> None:
        """Note the result of a check; a change for better or worse is an event."""
        with self.write() as tx:
            row = service_row(tx, identity)
            if not row:
                return
            news: Dict[str, Any] = {"healthy": healthy, "latency": latency, "error": error, "checked": tx.now.wall,
                                    "checker": checker}
            if healthy and row["status"] == "unhealthy":
                news["status"] = "running"
            elif not healthy and row["status"] == "running" and row["health"]:
                news["status"] = "unhealthy"
            service_update(tx, identity, **news)
            if healthy and not row["healthy"]:
                tx.emit("service.healthy", identity, row["agent"], serviceId=identity, port=row["port"], error=None)
            elif row["healthy"] and not healthy:
                tx.emit("service.unhealthy", identity, row["agent"], serviceId=identity, port=row["port"], error=error)

    # --- time ---------------------------------------------------------------------------------------------------------

    def tick(self, now: Now) -> int:
        """Do what time has made due; how many milliseconds nothing more will be, if nothing is written meanwhile."""
        self.planned = MAX_INTEGER  # whatever is written from here on may be due before the next tick: let it ring
        bound = self.store.rows("SELECT pid, birth FROM LOCKS WHERE birth IS NOT NULL UNION "
                                "SELECT pid, birth FROM AGENTS WHERE birth IS NOT NULL")
        dead = [row["pid"] for row in bound if not process_lives(row["pid"], row["birth"])]
        if dead or self._due() <= now.awake or now.wall - self.pruned >= PRUNE_EVERY or now.wall < self.pruned:
            self.pruned = now.wall
            listening = self.listening()
            with self.write() as tx:
                self._expire(tx, ",".join(map(str, dead)), listening)
        pause = min(self._due() - now.awake, TICK_FOR_PROCESSES if bound else TICK_AT_MOST)
        self.planned = now.awake + pause
        return max(pause, 0)

    def _due(self) -> int:
        """The earliest end of anything, on the awake clock."""
        return int(self.store.value(
            "SELECT min(coalesce((SELECT min(expires) FROM LOCKS), ?1), coalesce((SELECT min(expires) FROM AGENTS WHERE "
            "alive), ?1), coalesce((SELECT min(expires) FROM SERVICES), ?1), coalesce((SELECT min(expires) FROM MESSAGES "
            "WHERE expires IS NOT NULL), ?1))", MAX_INTEGER))

    def _expire(self, tx: Transaction, dead: str, listening: Mapping[int, Any]) -> None:
        awake = tx.now.awake
        lock_sweep(tx, "expires <= ?", awake)
        lock_sweep(tx, f"birth IS NOT NULL AND pid IN ({dead})", reason="process")
        for row in tx.rows(f"SELECT id FROM AGENTS WHERE alive AND (expires <= ? OR birth IS NOT NULL AND pid IN ({dead}))",
                           awake):
            agent_die(tx, row["id"], lambda service: process_lives(service["pid"], service["birth"])
                      if service["birth"] is not None else service["port"] in listening)
        service_delete(tx, tx.rows("SELECT * FROM SERVICES WHERE expires <= ?", awake), None)
        for channel in {row["channel"] for row in tx.rows("SELECT channel FROM MESSAGES WHERE expires <= ?", awake)}:
            message_drop(tx, channel, tx.rows("SELECT id, length(payload) AS size FROM MESSAGES WHERE channel = ? "
                                              "AND expires <= ?", channel, awake))
        prune(tx)

    def close(self) -> None:
        self.store.close()


# ======================================================================================================================
# 9. OPERATIONS — everything one can ask
# ======================================================================================================================

# 1. A decorated function of the daemon, the asker and the fields. The decorator gives its method and path; annotations
#    are the kinds; a default makes a field optional; the first line of the docstring is its summary on every face.
# 2. Fields come from the path, from the query of a GET, from query or body of a DELETE, else from the JSON body.
# 3. `command` is its name on the command line; there, required fields and those in [brackets] are positional.

class Field(NamedTuple):
    """One input of an operation: its Python name, its name on the wire, its kind, and whether it must be there."""

    name: str
    wire: str
    kind: Kind
    required: bool
    default: Any

    def check(self, value: Any, read: bool) -> Any:
        try:
            return self.kind.read(value) if read else self.kind.parse(value)
        except ValueError:
            shown = to_json(value)
            if len(shown) > 60 or isinstance(self.kind, Password):
                shown = f"{type(value).__name__} of {len(shown)} characters"
            raise PortDaddyError("BAD_VALUE", f"{self.wire} must be {self.kind.expected}; it was {shown}",
                                 field=self.wire, expected=self.kind.expected) from None
        except PortDaddyError as problem:  # too large, or not JSON
            raise PortDaddyError(problem.code, f"{self.wire}: {problem}", field=self.wire) from None


class Operation:
    """One thing that can be asked, and the words that every face uses for it."""

    def __init__(self, function: Callable[..., Any], routes: Sequence[str], command: str, aliases: str, shows: str,
                 quiet: str) -> None:
        self.function, self.name, self.shows, self.quiet = function, function.__name__, shows, quiet
        self.routes = [tuple(route.split(" ")) for route in routes]
        self.command, self.aliases = command.partition(" [")[0], aliases.split()
        self.positional = re.findall(r"\[(\w+)\]", command)
        self.summary = (function.__doc__ or "").split("\n")[0]
        self._fields: Optional[Dict[str, Field]] = None

    @property
    def fields(self) -> Dict[str, Field]:
        """By wire name; worked out when first needed, since a short command needs one operation of fifty."""
        if self._fields is None:
            from typing import get_type_hints
            function, hints = self.function, get_type_hints(self.function, include_extras=True)
            names = function.__code__.co_varnames[2:function.__code__.co_argcount]
            defaults = dict(zip(reversed(names), reversed(function.__defaults__ or ())))
            self._fields = {camel(name): Field(name, camel(name), kind_of(hints[name]), name not in defaults,
                                               defaults.get(name)) for name in names}
        return self._fields

    def bind(self, given: Mapping[str, Any], read: Mapping[str, str]) -> Dict[str, Any]:
        """The arguments from JSON values and from texts: every one checked, nothing unknown, nothing missing."""
        fields, values = self.fields, {}
        for source, texts in ((given, False), (read, True)):
            for wire, value in source.items():
                field = fields.get(wire)
                if field is None:
                    raise self._unknown(wire)
                if value is not None or field.kind.nullable:
                    if field.name in values:
                        raise PortDaddyError("BAD_VALUE", f"{wire} was given twice, in the query and in the body",
                                             field=wire)
                    values[field.name] = field.check(value, texts)
        for field in fields.values():
            if field.required and field.name not in values:
                raise PortDaddyError("BAD_VALUE", f"{field.wire} is missing: {field.kind.expected}", field=field.wire,
                                     expected=field.kind.expected)
        return values

    def _unknown(self, wire: str) -> PortDaddyError:
        import difflib
        near = difflib.get_close_matches(wire, self.fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(self.fields) or 'none'}"
        return PortDaddyError("UNKNOWN_FIELD", f"{self.name} has no field {wire[:60]!r}; {hint} "
                              f"(this daemon is version {__version__})", field=wire[:60], version=__version__)


OPERATIONS: List[Operation] = []
F = TypeVar("F", bound=Callable[..., Any])


def operation(*routes: str, command: str = "", aliases: str = "", shows: str = "", quiet: str = "") -> Callable[[F], F]:
    """Declare an operation. `shows` names what a terminal shows of a listing, `quiet` the one value that -q prints."""
    def declare(function: F) -> F:
        OPERATIONS.append(Operation(function, routes, command, aliases, shows, quiet))
        return function
    return declare


class Stream:
    """A reply without an end: the parts of an event stream (Server-Sent Events, WHATWG HTML)."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self.parts = parts


def ok(**facts: Any) -> Reply:
    return {"success": True, **facts}


def listing(name: str, rows: List[Any]) -> Reply:
    return {"success": True, name: rows, "count": len(rows)}


def from_json(text: Optional[str]) -> Any:
    return None if text is None else json.loads(text)


def wall(now: Now, expires: Optional[int]) -> Optional[int]:
    """When a lease that ends on the awake clock will end on the wall's, if nobody sleeps or sets the clock."""
    return None if expires is None else now.wall + expires - now.awake


def bind_pid(pid: Optional[int]) -> Tuple[Optional[int], Optional[str]]:
    """The start time of a process that something is to be bound to, and a warning when it cannot be seen."""
    birth = None if pid is None else process_birth(pid)
    unseen = pid is not None and birth is None
    return birth, (f"pid {pid} cannot be seen from here (another container, or it has ended): it is noted, and nothing "
                   "ends with it") if unseen else None


def with_warnings(reply: Reply, *warnings: Optional[str]) -> Reply:
    said = "; ".join(filter(None, warnings))
    return {**reply, "warning": said} if said else reply


def quota(tx: Transaction, agent: Optional[str], column: str, table: str, owner: str) -> None:
    """Refuse when a registered agent has as many as it allowed itself."""
    row = agent_alive(tx, agent, tx.now.awake)
    most = row[column] if row else None
    current = tx.value(f"SELECT count(*) FROM {table} WHERE {owner} = ?", agent) if most is not None else 0
    if most is not None and current >= most:
        raise PortDaddyError("LIMIT", f"agent {agent} has {current} {table.lower()}, and registered with at most {most}; "
                             "release one, or register again with a higher limit", current=current, max=most)


# --- services ---------------------------------------------------------------------------------------------------------

def service_view(row: Any, now: Now) -> Reply:
    endpoints = json.loads(row["endpoints"])
    return {"id": row["id"], "port": row["port"], "pid": row["pid"], "agentId": row["agent"], "status": row["status"],
            "cmd": row["cmd"], "cwd": row["cwd"], "createdAt": row["created"], "lastSeen": row["seen"],
            "expiresAt": wall(now, row["expires"]), "health": row["health"], "pairedWith": row["pair"],
            "endpoints": endpoints, "urls": endpoints, "metadata": from_json(row["metadata"])}


def health_view(row: Any) -> Reply:
    healthy = None if row["healthy"] is None else bool(row["healthy"])
    return {"id": row["id"], "healthy": healthy, "status": row["status"], "latency": row["latency"],
            "checkedAt": row["checked"], "error": row["error"]}


def need_service(db: Union[Store, Transaction], identity: str) -> Any:
    row = service_row(db, identity)
    if not row:
        raise PortDaddyError("NOT_FOUND", f"there is no service {identity}; claim it first, or list what there is with "
                             "GET /services", id=identity)
    return row


def candidate_ports(daemon: Daemon, identity: str, span_of_ports: Tuple[int, int]) -> Iterator[int]:
    """The ports to try by ourselves: from a hash of the identity upwards, round the range once."""
    low, high = span_of_ports
    size = high - low + 1
    taken = {row["port"] for row in daemon.store.rows("SELECT port FROM SERVICES")}
    first_ephemeral, last_ephemeral = ephemeral_ports()
    avoid = WELL_KNOWN_PORTS | BLOCKED_PORTS | taken | set(daemon.listening()) | {daemon.port}
    start = zlib.crc32(identity.encode()) % size
    for step in range(size):
        port = low + (start + step) % size
        if port not in avoid and not first_ephemeral <= port <= last_ephemeral:
            yield port


class Choice(NamedTuple):
    """A port for a claim, whether it is the one that was asked for, and what stood in the way if not."""

    port: int
    preferred: bool
    warning: Optional[str]


def who_has(daemon: Daemon, tx: Transaction, port: int) -> Optional[str]:
    """Words for whoever is in the way of a port; None when a program could bind it now."""
    if port == daemon.port:
        return "this daemon itself"
    other = tx.value("SELECT id FROM SERVICES WHERE port = ?", port)
    if other:
        return f"the service {other}"
    if port_free(port):
        return None
    if port < 1024 and os.geteuid() != 0 and port not in daemon.listening():
        return "the system, which lets only root bind ports below 1024,"
    return port_holder(port)[1]


def choose_port(daemon: Daemon, tx: Transaction, identity: str, wanted: Optional[int], exact: bool,
                candidates: Iterator[int], span_of_ports: Tuple[int, int]) -> Choice:
    """A port that could be bound just now, probed inside the transaction: an assigned port is never probed, since that
    could make its owner fail, and no other claim can assign this one meanwhile."""
    warning = None
    if wanted is not None:
        holder = who_has(daemon, tx, wanted)
        if holder is None:
            return Choice(wanted, True, None)
        warning = f"port {wanted} is taken by {holder}"
        if exact:
            raise PortDaddyError("PORT_TAKEN", f"{warning}; stop that, or claim without exact", port=wanted,
                                 holder=holder)
    former = tx.value("SELECT port FROM FORMER_PORTS WHERE id = ?", identity) if wanted is None else None
    taken = former is None or former == daemon.port or tx.value("SELECT 1 FROM SERVICES WHERE port = ?", former)
    limited = span_of_ports != daemon.settings.range and not (former and span_of_ports[0] <= former <= span_of_ports[1])
    if former and not taken and not limited and port_free(former, reuse=True):
        return Choice(former, True, None)
    for port in candidates:
        if port_free(port):
            return Choice(port, wanted is None, warning)
    raise PortDaddyError("NO_PORTS", f"no port from {span_of_ports[0]} to {span_of_ports[1]} is free; release some, or "
                         "widen the range (PORT_DADDY_RANGE)", range=list(span_of_ports))


@operation("POST /claim", command="claim", quiet="port")
def claim(daemon: Daemon, asker: Asker, id: Identity, port: Optional[Port] = None, exact: Bool = False,
          range: Optional[PortRange] = None, agent: Optional[AgentId] = None, pid: Optional[Pid] = None,
          cmd: Optional[Line] = None, cwd: Optional[Line] = None, expires: Optional[Lifetime] = None,
          pair: Optional[Identity] = None, health: Optional[HttpUrl] = None, move: Bool = False,
          metadata: Optional[Metadata] = None) -> Reply:
    """Claim a port by name: the same identity gets the same port, and nobody else gets it."""
    if health:
        check_target(health, daemon.port, by_name=False)
    birth, warning = bind_pid(pid)
    given: Dict[str, Any] = {
        "agent": asker.who(agent), "pid": pid, "cmd": cmd, "cwd": cwd, "pair": pair, "health": health, "ttl": expires,
        "metadata": maybe_json(metadata)}
    given = {name: value for name, value in given.items() if value is not None}
    if pid is not None:
        given["birth"] = birth
    known = service_row(daemon.store, id)
    there = daemon.listening().get(known["port"], []) if known else []
    adopted = known and there and known["status"] == "running" and daemon.adopted.get(id) == there[0].key
    stranger = daemon.stranger(known, there)[0] if known and there and not adopted else None
    if known and stranger and not move:
        daemon.observe()
        raise PortDaddyError("PORT_HIJACKED", f"port {known['port']} of {id} is used by {process_command(stranger)} (pid "
                             f"{stranger}), which ran before the claim; stop it, or claim with move",
                             port=known["port"], pid=stranger, command=process_command(stranger))
    elsewhere = known is not None and (move or not there and port is not None and port != known["port"])
    if known and not elsewhere:
        return with_warnings(reclaim(daemon, asker, id, given, port, exact), warning)
    span_of_ports = range or daemon.settings.range
    candidates = candidate_ports(daemon, id, span_of_ports)
    with daemon.write() as tx:
        known = service_row(tx, id)
        if known and not elsewhere:  # somebody claimed it while we looked
            choice = Choice(known["port"], port in (None, known["port"]), None)
        else:
            if not known:
                quota(tx, given.get("agent"), "max_services", "SERVICES", "agent")
            choice = choose_port(daemon, tx, id, port, exact, candidates, span_of_ports)
        columns = {**given, "expires": tx.lasts(expires)} if expires else given
        if not known:
            service_insert(tx, id, choice.port, since_boot(), claimer=asker.pid, **columns)
        elif elsewhere:
            endpoints = {**json.loads(known["endpoints"]), "local": f"http://localhost:{choice.port}"}
            service_update(tx, id, port=choice.port, status="assigned", born=since_boot(), claimer=asker.pid,
                           endpoints=to_json(endpoints), **columns)
        tx.run("DELETE FROM FORMER_PORTS WHERE id = ?", id)
        if not known or elsewhere:
            tx.emit("service.claim", id, given.get("agent"), serviceId=id, port=choice.port, agentId=given.get("agent"),
                    existing=known is not None)
        tx.ring("checker", f"service:{id}")
        row = service_row(tx, id)
    daemon.adopted.pop(id, None)
    moved = f"{id} moved from port {known['port']} to {choice.port}" if known and elsewhere else None
    return with_warnings(claim_reply(row, known is not None, choice.preferred), moved, choice.warning, warning)


def claim_reply(row: Any, existing: bool, preferred: bool) -> Reply:
    words = "still has" if existing else "has"
    return ok(id=row["id"], port=row["port"], status=row["status"], existing=existing, preferred=preferred,
              endpoints=json.loads(row["endpoints"]), message=f"{row['id']} {words} port {row['port']}")


def reclaim(daemon: Daemon, asker: Asker, identity: str, given: Dict[str, Any], port: Optional[int],
            exact: bool) -> Reply:
    """Claim again what is there: its port stays, and only what was given changes."""
    warning = None
    row = need_service(daemon.store, identity)
    if port not in (None, row["port"]):
        warning = f"{identity} keeps port {row['port']}, where its server listens; stop that to move it to {port}"
        if exact:
            raise PortDaddyError("PORT_TAKEN", warning, port=row["port"])
    news = {name: value for name, value in given.items() if row[name] != value or name == "ttl"}
    if news or asker.pid not in (None, row["claimer"]):
        with daemon.write() as tx:
            if "ttl" in news:
                news["expires"] = tx.lasts(news["ttl"])
            service_update(tx, identity, seen=tx.now.wall, claimer=asker.pid or row["claimer"], **news)
            if set(news) - {"pid", "birth", "ttl", "expires"}:
                tx.emit("service.claim", identity, given.get("agent"), serviceId=identity, port=row["port"],
                        agentId=given.get("agent"), existing=True)
            row = need_service(tx, identity)
    return with_warnings(claim_reply(row, True, port in (None, row["port"])), warning)


@operation("DELETE /release", "POST /release", command="release [id]", quiet="released")
def release(daemon: Daemon, asker: Asker, id: Optional[ServicePattern] = None, force: Bool = False,
            expired: Bool = False) -> Reply:
    """Release a service, those that a pattern covers, or those whose time is over; they keep a claim to their ports."""
    if (id is None) != expired:
        raise PortDaddyError("BAD_VALUE", "give either id (an identity, or a pattern such as myapp:*) or expired: true",
                             field="id")
    if id is not None and not id.strip("*:") and not force:
        raise PortDaddyError("BAD_VALUE", f"{id} would release every service; add force: true if that is meant",
                             field="force")
    with daemon.write() as tx:
        if expired:
            rows = tx.rows("SELECT * FROM SERVICES WHERE expires <= ?", tx.now.awake)
        else:
            rows = tx.rows("SELECT * FROM SERVICES WHERE id GLOB ? ORDER BY id", id)
        ports = service_delete(tx, rows, asker.who(None))
    return ok(released=len(ports), releasedPorts=ports,
              message=f"released {len(ports)} service{'s' * (len(ports) != 1)}" if ports else
              f"there is no service {id or 'whose time is over'}; nothing was released")


@operation("DELETE /services/{id}")
def remove_service(daemon: Daemon, asker: Asker, id: Identity) -> Reply:
    """Release one service."""
    return release(daemon, asker, id)


@operation("GET /services", command="find [pattern]", aliases="ps services",
           shows="services: id port status pid agentId endpoints.local", quiet="id")
def list_services(daemon: Daemon, asker: Asker, pattern: ServicePattern = "*", status: Optional[Status] = None,
                  port: Optional[Port] = None, expired: Optional[Bool] = None, limit: Optional[Rows] = None) -> Reply:
    """List the services that a pattern covers."""
    now = daemon.clock.now()
    rows = daemon.store.rows(
        "SELECT * FROM SERVICES WHERE id GLOB ? AND (? IS NULL OR status = ?) AND (? IS NULL OR port = ?) AND "
        "(? IS NULL OR (expires IS NOT NULL AND expires <= ?) = ?) ORDER BY id LIMIT ?",
        pattern, status, status, port, port, expired, now.awake, expired, limit or -1)
    return listing("services", [service_view(row, now) for row in rows])


@operation("GET /services/health", shows="services: id healthy status latency checkedAt error", quiet="id")
def list_health(daemon: Daemon, asker: Asker) -> Reply:
    """List what is known of the health of every service."""
    return listing("services", [health_view(row) for row in daemon.store.rows("SELECT * FROM SERVICES ORDER BY id")])


@operation("GET /services/health/{id}")
def service_health(daemon: Daemon, asker: Asker, id: Identity) -> Reply:
    """Whether a service is well: the last check, or a new one when that is older than five seconds."""
    row = need_service(daemon.store, id)
    if not daemon.supervised(row) and daemon.clock.now().wall - (row["checked"] or 0) >= HEALTH_EVERY:
        daemon.observe()
        daemon.check_health(row)
        row = need_service(daemon.store, id)
    return ok(**health_view(row))


@operation("GET /services/{id}")
def get_service(daemon: Daemon, asker: Asker, id: Identity) -> Reply:
    """Everything about one service."""
    service = service_view(need_service(daemon.store, id), daemon.clock.now())
    return ok(**service, service=service)


@operation("PUT /services/{id}")
def update_service(daemon: Daemon, asker: Asker, id: Identity, status: Optional[Status] = None,
                   pid: Optional[Pid] = None, health: Optional[HttpUrl] = None, latency: Optional[Latency] = None,
                   error: Optional[Line] = None, checked_by: Optional[AgentId] = None,
                   metadata: Optional[Metadata] = None) -> Reply:
    """Report on a service: what state it is in and, by whoever checks it, how well it is."""
    if health:
        check_target(health, daemon.port, by_name=False)
    birth, warning = bind_pid(pid)
    columns = {"status": status, "pid": pid, "birth": birth, "health": health,
               "metadata": maybe_json(metadata)}
    with daemon.write() as tx:
        need_service(tx, id)
        service_update(tx, id, seen=tx.now.wall, **{
            name: value for name, value in columns.items() if value is not None})
        tx.ring("checker")
    checked = checked_by or latency is not None or error is not None
    if checked and status in (None, "running", "detached", "unhealthy"):
        daemon.report_health(id, error is None and status != "unhealthy", latency, error, checked_by)
    return with_warnings(get_service(daemon, asker, id), warning)


@operation("PUT /services/{id}/endpoints/{env}", command="endpoint set")
def set_endpoint(daemon: Daemon, asker: Asker, id: Identity, env: EndpointName, url: EndpointUrl) -> Reply:
    """Say at which URL a service is found in an environment, such as local or staging."""
    with daemon.write() as tx:
        endpoints = {**json.loads(need_service(tx, id)["endpoints"]), env: url}
        if len(to_json(endpoints)) > MAX_METADATA:
            raise PortDaddyError("TOO_LARGE", "the endpoints of one service may take at most 10 KB", limit=MAX_METADATA)
        service_update(tx, id, endpoints=to_json(endpoints))
    return ok(id=id, endpoints=endpoints, message=f"{id} is at {url} in {env}")


@operation("DELETE /services/{id}/endpoints/{env}", command="endpoint rm", quiet="removed")
def remove_endpoint(daemon: Daemon, asker: Asker, id: Identity, env: EndpointName) -> Reply:
    """Forget the URL of a service in an environment."""
    with daemon.write() as tx:
        endpoints = json.loads(need_service(tx, id)["endpoints"])
        removed = endpoints.pop(env, None) is not None
        service_update(tx, id, endpoints=to_json(endpoints))
    return ok(id=id, removed=removed, message=f"{id} had {'one' if removed else 'no'} endpoint {env}")


def missing_services(daemon: Daemon, identities: Sequence[str]) -> List[str]:
    """Which of them are not running, or have a check that they have not passed."""
    marks = ",".join("?" * len(identities))
    well = {row["id"] for row in daemon.store.rows(
        f"SELECT id FROM SERVICES WHERE id IN ({marks}) AND status IN ('running', 'detached') AND "
        "(health IS NULL OR healthy)", *identities)}
    return [identity for identity in identities if identity not in well]


@operation("POST /wait", command="wait")
def wait_for_services(daemon: Daemon, asker: Asker, services: IdentityList, timeout: WaitTime = 60_000) -> Reply:
    """Wait until services run and, where they have a health check, have passed it."""
    def all_well() -> Optional[bool]:
        return True if not missing_services(daemon, services) else None

    topics = [f"service:{identity}" for identity in dict.fromkeys(services)]
    daemon.bell.ring("checker")
    if not daemon.wait(asker, all_well, timeout, topics):
        waiting = missing_services(daemon, services)
        raise PortDaddyError("TIMED_OUT", f"not up after {span(timeout)}: {', '.join(waiting)}", waitingFor=waiting)
    now = daemon.clock.now()
    found = [service_row(daemon.store, identity) for identity in services]
    return ok(services=[service_view(row, now) for row in found if row], healthy=True,
              message=f"{', '.join(services)}: up")


@operation("GET /wait/{id}")
def wait_for_service(daemon: Daemon, asker: Asker, id: Identity, timeout: WaitTime = 60_000) -> Reply:
    """Wait until one service runs and, where it has a health check, has passed it."""
    return wait_for_services(daemon, asker, [id], timeout)


@operation("GET /ports/system", command="ports", shows="ports: port pid service command", quiet="port")
def list_system_ports(daemon: Daemon, asker: Asker, range_only: Bool = False, unmanaged_only: Bool = False) -> Reply:
    """List the ports of this machine on which something listens, and whose they are."""
    low, high = daemon.settings.range
    owners = {row["port"]: row["id"] for row in daemon.store.rows("SELECT id, port FROM SERVICES")}
    owners[daemon.port] = "port-daddy"
    chosen = {port: those for port, those in daemon.listening().items()
              if (low <= port <= high or not range_only) and not (unmanaged_only and port in owners)}
    pids = listener_pids(listener for those in chosen.values() for listener in those)
    rows = []
    for port, those in sorted(chosen.items()):
        pid = next((pids[listener.key] for listener in those if listener.key in pids), None)
        rows.append({"port": port, "pid": pid, "command": process_command(pid) if pid else None,
                     "service": owners.get(port)})
    return listing("ports", rows)


@operation("POST /ports/cleanup", command="cleanup", quiet="count")
def cleanup(daemon: Daemon, asker: Asker) -> Reply:
    """Release the services whose process is dead or whose time is over."""
    daemon.observe()
    with daemon.write() as tx:
        rows = tx.rows("SELECT * FROM SERVICES WHERE status = 'dead' OR expires <= ?", tx.now.awake)
        service_delete(tx, rows, asker.who(None))
    return ok(freed=[row["id"] for row in rows], count=len(rows), message=f"freed {len(rows)}")


# --- channels ---------------------------------------------------------------------------------------------------------

def message_view(row: Any) -> Reply:
    return {"id": row["id"], "channel": row["channel"], "payload": json.loads(row["payload"]), "sender": row["sender"],
            "createdAt": row["created"]}


def loss(daemon: Daemon, pattern: str, after: int) -> Reply:
    """What a reader that stopped at an id must be told: that messages after it are gone, or that it read elsewhere."""
    if after > daemon.store.ids.value:
        return {"reset": True}
    dropped = channel_dropped(daemon.store, pattern)
    return {"gap": {"from": after, "to": dropped}} if dropped > after else {}


@operation("POST /msg/{channel}", command="pub", quiet="id")
def publish(daemon: Daemon, asker: Asker, channel: ChannelName, payload: Payload, sender: Optional[AgentId] = None,
            expires: Optional[Lifetime] = None) -> Reply:
    """Publish a message: to one worker of each group, to everybody who follows, and to the log of the channel."""
    with daemon.write() as tx:
        number = message_append(tx, channel, payload, asker.who(sender), expires)
    return ok(id=number, channel=channel, message=f"published as {number} in {channel}")


@operation("GET /msg/{channel}", shows="messages: id createdAt sender payload", quiet="payload")
def get_messages(daemon: Daemon, asker: Asker, channel: ChannelName, limit: Count = 50,
                 after: Optional[Cursor] = None) -> Reply:
    """Read messages without consuming them: those after an id, or the newest; oldest first."""
    awake = daemon.clock.now().awake
    lost = loss(daemon, channel, after) if after is not None else {}
    if after is None:
        rows = message_newest(daemon.store, channel, limit, awake)
    else:
        rows = message_list(daemon.store, channel, 0 if "reset" in lost else after, limit, awake)
    last = rows[-1]["id"] if rows else 0 if "reset" in lost else after
    if last is None:
        last = daemon.store.value("SELECT last FROM CHANNELS WHERE name = ?", channel) or 0
    return {**listing("messages", [message_view(row) for row in rows]), "lastId": last, **lost}


@operation("GET /msg/{channel}/poll", command="poll", quiet="message.payload")
def poll(daemon: Daemon, asker: Asker, channel: ChannelPattern, timeout: PollTime = 30_000, after: Optional[Cursor] = None,
         group: Optional[GroupName] = None) -> Reply:
    """Wait for the next message: as one worker of a group, or, with after, as a reader with a cursor of its own."""
    if after is not None and group is not None:
        raise PortDaddyError("BAD_VALUE", "after and group are two ways to read: give after to see every message, or "
                             "group to share them among workers", field="after")
    if after is not None:
        return poll_after(daemon, asker, channel, timeout, after)
    if "*" in channel:
        raise PortDaddyError("BAD_VALUE", "a worker polls one channel by name; patterns work with after and in subscribe",
                             field="channel")
    team = group or "default"

    def take() -> Optional[Any]:
        if not message_waiting(daemon.store, channel, team, daemon.clock.now().awake):
            return None
        with daemon.write() as tx:
            message = message_take(tx, channel, team)
            asker.stay()
        return message

    def put_back(number: int) -> None:
        with daemon.write() as tx:
            message_return(tx, channel, team, number)

    message = daemon.wait(asker, take, timeout, [f"channel:{channel}"], line=team)
    if message:
        asker.undo = lambda: put_back(message["id"])
        return ok(message=message_view(message), lastId=message["id"])
    cursor = daemon.store.value("SELECT cursor FROM READERS WHERE channel = ? AND team = ?", channel, team)
    return ok(message=None, lastId=cursor or 0)


def poll_after(daemon: Daemon, asker: Asker, pattern: str, timeout: int, after: int) -> Reply:
    lost = loss(daemon, pattern, after)
    start = 0 if "reset" in lost else after

    def next_after() -> Optional[Any]:
        found = message_list(daemon.store, pattern, start, 1, daemon.clock.now().awake)
        return found[0] if found else None

    topic = "channel:*" if "*" in pattern else f"channel:{pattern}"
    message = daemon.wait(asker, next_after, 0 if lost else timeout, [topic])
    gap = lost.get("gap", {}).get("to", 0)
    return ok(message=message and message_view(message), lastId=message["id"] if message else max(start, gap), **lost)


def sse(event: str, data: Any, number: Optional[int] = None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    name = f"event: {event}\n" if event != "message" else ""
    return f"{head}{name}data: {to_json(data)}\n\n".encode()


def follow(daemon: Daemon, asker: Asker, topic: str, opening: bytes, read: Callable[[], List[bytes]]) -> Iterator[bytes]:
    """The life of a stream: the opening, what there is to read after each ring, a comment when nothing happens."""
    yield b"retry: 1000\n" + opening
    while True:
        parts = daemon.wait(asker, lambda: read() or None, 15_000, [topic])
        if parts is None and not asker.connected():
            return
        yield b"".join(parts) if parts else b": nothing new\n\n"


@operation("GET /msg/{channel}/subscribe")
def subscribe(daemon: Daemon, asker: Asker, channel: ChannelPattern, after: Optional[Cursor] = None) -> Stream:
    """Follow a channel, or all that a pattern covers, as Server-Sent Events; Last-Event-ID resumes exactly."""
    current = daemon.store.ids.value
    start = after if after is not None else asker.after
    cursor = current if start is None else start
    told = 0  # the highest dropped id that this reader has been told of
    opening = sse("connected", {"channel": channel, "lastId": current})
    if cursor > current:
        opening += sse("reset", {"from": cursor, "to": current})
        cursor = 0

    def read() -> List[bytes]:
        nonlocal cursor, told
        dropped, parts = channel_dropped(daemon.store, channel), []
        if dropped > max(cursor, told):
            parts.append(sse("gap", {"from": cursor, "to": dropped}))
            told = dropped
        for row in message_list(daemon.store, channel, cursor, 100, daemon.clock.now().awake):
            cursor = row["id"]
            parts.append(sse("message", message_view(row), cursor))
        return parts

    topic = "channel:*" if "*" in channel else f"channel:{channel}"
    return Stream(follow(daemon, asker, topic, opening, read))


@operation("DELETE /msg/{channel}", command="clear", quiet="deleted")
def clear_channel(daemon: Daemon, asker: Asker, channel: ChannelName) -> Reply:
    """Delete the messages of a channel; its readers are told that there was a gap."""
    with daemon.write() as tx:
        rows = tx.rows("SELECT id, length(payload) AS size FROM MESSAGES WHERE channel = ?", channel)
        message_drop(tx, channel, rows)
    return ok(deleted=len(rows), message=f"deleted {len(rows)} of {channel}")


@operation("GET /channels", "GET /msg", command="channels", shows="channels: channel count lastId subscribers lastMessage",
           quiet="channel")
def list_channels(daemon: Daemon, asker: Asker) -> Reply:
    """List the channels that hold or have held messages."""
    rows = daemon.store.rows("SELECT name, CHANNELS.count AS count, last, created FROM CHANNELS LEFT JOIN MESSAGES ON "
                             "MESSAGES.id = last ORDER BY name")
    return listing("channels", [
        {"channel": row["name"], "count": row["count"], "lastId": row["last"], "lastMessage": row["created"],
         "subscribers": daemon.bell.waiting(f"channel:{row['name']}")} for row in rows])


# --- locks ------------------------------------------------------------------------------------------------------------

def lock_view(daemon: Daemon, row: Any, now: Now) -> Reply:
    holder = {"owner": row["owner"], "token": row["token"], "pid": row["pid"], "acquiredAt": row["acquired"],
              "expiresAt": wall(now, row["expires"])}
    return {"name": row["name"], "held": True, **holder, "waiting": daemon.bell.waiting(f"lock:{row['name']}"),
            "metadata": from_json(row["metadata"]), "holders": [holder]}


def lock_held(daemon: Daemon, name: str, waited: int) -> PortDaddyError:
    """The refusal of a lock: who holds it, since when and how long, who waits, and when to ask again."""
    now = daemon.clock.now()
    row = lock_row(daemon.store, name, now.awake)
    waiting, said = daemon.bell.waiting(f"lock:{name}"), f" after {span(waited)} of waiting" if waited else ""
    if not row:  # it became free this instant, for the first of those who wait
        return PortDaddyError("LOCK_HELD", f"lock {name} is being handed to the first of those who wait{said}; "
                              "wait as well (wait: 60000)", holder=None, heldSince=None, expiresAt=None,
                              waiting=waiting, retryAfter=100, waited=waited)
    left = max(0, row["expires"] - now.awake)
    return PortDaddyError(
        "LOCK_HELD", f"lock {name} is held by {row['owner'] or 'somebody without a name'} for {span(left)} more{said}; "
        f"wait for it (wait: 60000), or ask the holder", holder=row["owner"], heldSince=row["acquired"],
        expiresAt=wall(now, row["expires"]), waiting=waiting, retryAfter=left, waited=waited)


@operation("POST /locks/{name...}", command="lock", quiet="token")
def lock(daemon: Daemon, asker: Asker, name: LockName, owner: Optional[AgentId] = None, ttl: Duration = 300_000,
         wait: LockWait = 0, pid: Optional[Pid] = None, metadata: Optional[Metadata] = None) -> Reply:
    """Take a lock, or wait for it in line: one holder, a lease that ends, a fencing token that only grows."""
    owner, began = asker.who(owner), time.monotonic()
    birth, warning = bind_pid(pid)

    def take() -> Optional[Tuple[int, Now]]:
        with daemon.write() as tx:
            quota(tx, owner, "max_locks", "LOCKS", "owner")
            token = lock_take(tx, name, owner, ttl, pid, birth, metadata)
            if birth is not None:
                tx.ring("keeper")
            asker.stay()
            return (token, tx.now) if token else None

    def give_back() -> None:
        with daemon.write() as tx:
            row = tx.row("SELECT * FROM LOCKS WHERE name = ? AND token = ?", name, grant[0] if grant else 0)
            if row:
                lock_free(tx, row, "lock.release", "the holder had gone before it was told")

    grant = daemon.wait(asker, take, wait, [f"lock:{name}"], line="", turn=True)
    waited = round((time.monotonic() - began) * 1000)
    if grant is None:
        raise lock_held(daemon, name, waited if wait else 0)
    asker.undo = give_back
    token, now = grant
    return with_warnings(ok(name=name, owner=owner, token=token, acquiredAt=now.wall, expiresAt=now.wall + ttl,
                            waited=waited, message=f"{owner or 'somebody'} holds {name} for {span(ttl)}"), warning)


def own_lock(tx: Transaction, asker: Asker, name: str, owner: Optional[str], token: Optional[int]) -> Optional[Any]:
    """The lock, if the asker may extend or release it: by its current token, else as its owner. None: it is free."""
    row = lock_row(tx, name, tx.now.awake)
    if token is not None and (not row or row["token"] != token):
        raise LockLost("LOCK_LOST", f"token {token} is no longer the one of lock {name}: the lease ended"
                       f"{' and the lock is held by ' + str(row['owner']) if row else ''}; stop, and take it again",
                       holder=row and row["owner"])
    if row and token is None and row["owner"] not in (None, asker.who(owner)):
        raise PortDaddyError("NOT_OWNER", f"lock {name} is held by {row['owner']}, not by "
                             f"{asker.who(owner) or 'somebody without a name'}; give its owner or token, or force",
                             holder=row["owner"])
    return row


@operation("PUT /locks/{name...}", command="extend", quiet="expiresAt")
def extend_lock(daemon: Daemon, asker: Asker, name: LockName, owner: Optional[AgentId] = None,
                token: Optional[Fence] = None, ttl: Duration = 300_000) -> Reply:
    """Give the holder more time from now on, or fail with LOCK_LOST when the lock has moved on."""
    with daemon.write() as tx:
        row = own_lock(tx, asker, name, owner, token)
        if not row or not lock_extend(tx, name, row["token"], ttl):
            raise LockLost("LOCK_LOST", f"nobody holds lock {name} any more; stop, and take it again", holder=None)
        expires = tx.now.wall + ttl
    return ok(name=name, owner=row["owner"], token=row["token"], expiresAt=expires,
              message=f"{name} is held for {span(ttl)} more")


@operation("DELETE /locks/{name...}", command="unlock", quiet="released")
def unlock(daemon: Daemon, asker: Asker, name: LockName, owner: Optional[AgentId] = None,
           token: Optional[Fence] = None, force: Bool = False) -> Reply:
    """Release a lock to the first of those who wait for it."""
    with daemon.write() as tx:
        row = lock_row(tx, name, tx.now.awake) if force else own_lock(tx, asker, name, owner, token)
        released = row is not None and lock_free(tx, row, "lock.release", "forced" if force else "released")
    return ok(name=name, released=released, message=f"released {name}" if released else f"nobody held {name}")


@operation("GET /locks/{name...}", command="check", quiet="held")
def check_lock(daemon: Daemon, asker: Asker, name: LockName, token: Optional[Fence] = None) -> Reply:
    """Who holds a lock, and, given a token, whether that is still a current one."""
    now = daemon.clock.now()
    row = lock_row(daemon.store, name, now.awake)
    free = {"name": name, "held": False, "owner": None, "token": None, "pid": None, "acquiredAt": None,
            "expiresAt": None, "waiting": daemon.bell.waiting(f"lock:{name}"), "metadata": None, "holders": []}
    reply = ok(**(lock_view(daemon, row, now) if row else free))
    if token is not None:
        reply["valid"] = reply["token"] == token
    return reply


@operation("GET /locks", command="locks [pattern]", shows="locks: name owner token expiresAt waiting pid", quiet="name")
def list_locks(daemon: Daemon, asker: Asker, owner: Optional[AgentId] = None, pattern: LockPattern = "*") -> Reply:
    """List the locks that are held."""
    now = daemon.clock.now()
    rows = daemon.store.rows("SELECT * FROM LOCKS WHERE expires > ? AND name GLOB ? AND (? IS NULL OR owner = ?) "
                             "ORDER BY name", now.awake, pattern, owner, owner)
    return listing("locks", [lock_view(daemon, row, now) for row in rows])


# --- agents -----------------------------------------------------------------------------------------------------------

def agent_view(daemon: Daemon, row: Any, now: Now) -> Reply:
    store, active = daemon.store, bool(row["alive"]) and row["expires"] > now.awake
    return {"id": row["id"], "name": row["name"], "type": row["type"], "pid": row["pid"],
            "registeredAt": row["registered"], "lastHeartbeat": row["heartbeat"], "isActive": active,
            "timeSinceHeartbeat": max(0, now.awake - (row["expires"] - row["ttl"])), "ttl": row["ttl"],
            "maxServices": row["max_services"], "maxLocks": row["max_locks"],
            "services": [found["id"] for found in store.rows("SELECT id FROM SERVICES WHERE agent = ?", row["id"])],
            "locks": [found["name"] for found in store.rows("SELECT name FROM LOCKS WHERE owner = ?", row["id"])],
            "metadata": from_json(row["metadata"])}


@operation("POST /agents", command="agent register [id]", quiet="agentId")
def register(daemon: Daemon, asker: Asker, id: Optional[AgentId] = None, name: Optional[Word] = None,
             type: Optional[Word] = None, pid: Optional[Pid] = None, ttl: Optional[Duration] = None,
             metadata: Optional[Metadata] = None, max_services: Optional[Quota] = None,
             max_locks: Optional[Quota] = None) -> Reply:
    """Register an agent, or again with what has changed; it lives for its ttl after each heartbeat (2 minutes)."""
    agent = id or asker.agent or f"agent-{os.urandom(4).hex()}"
    birth, warning = bind_pid(pid)
    columns = {"name": name, "type": type, "pid": pid, "metadata": maybe_json(metadata),
               "max_services": max_services, "max_locks": max_locks}
    columns = {column: value for column, value in columns.items() if value is not None}
    if pid is not None:
        columns["birth"] = birth
    with daemon.write() as tx:
        before = tx.row("SELECT * FROM AGENTS WHERE id = ?", agent)
        lifetime = ttl or (before["ttl"] if before else 120_000)
        agent_insert(tx, agent, lifetime, **columns)
        row = tx.row("SELECT * FROM AGENTS WHERE id = ?", agent)
        if row and not (before and before["alive"]):
            tx.emit("agent.register", agent, agent, agentId=agent, name=row["name"], type=row["type"])
        if birth is not None:
            tx.ring("keeper")
    return with_warnings(ok(agentId=agent, registered=True, ttl=lifetime, message=(
        f"{agent} is registered and lives for {span(lifetime)} after each heartbeat"
        f"{f', and as long as process {pid}' if birth is not None else ''}")), warning)


@operation("POST /agents/{id}/heartbeat", command="agent heartbeat", quiet="lastHeartbeat")
def heartbeat(daemon: Daemon, asker: Asker, id: AgentId) -> Reply:
    """Say that an agent is alive; one that is unknown or dead is registered."""
    with daemon.write() as tx:
        row = tx.row("SELECT ttl FROM AGENTS WHERE id = ? AND alive", id)
        if row:
            tx.run("UPDATE AGENTS SET heartbeat = ?, expires = ? WHERE id = ?", tx.now.wall, tx.lasts(row["ttl"]), id)
        beat = tx.now.wall
    if not row:
        register(daemon, asker, id)
    return ok(agentId=id, lastHeartbeat=beat, message=f"{id} is alive")


@operation("DELETE /agents/{id}", command="agent unregister", quiet="unregistered")
def unregister(daemon: Daemon, asker: Asker, id: AgentId) -> Reply:
    """Forget an agent that ends well; what it holds stays held until it is released or its time is over."""
    with daemon.write() as tx:
        gone = tx.run("DELETE FROM AGENTS WHERE id = ?", id) == 1
        if gone:
            tx.emit("agent.unregister", id, id, agentId=id)
    return ok(agentId=id, unregistered=gone, message=f"{id} is {'unregistered' if gone else 'not registered'}")


@operation("GET /agents/{id}", command="agent show")
def get_agent(daemon: Daemon, asker: Asker, id: AgentId) -> Reply:
    """One agent, with the services and locks it holds."""
    row = daemon.store.row("SELECT * FROM AGENTS WHERE id = ?", id)
    if not row:
        raise PortDaddyError("NOT_FOUND", f"there is no agent {id}; register it, or list them with GET /agents", id=id)
    return ok(agent=agent_view(daemon, row, daemon.clock.now()))


@operation("GET /agents", command="agents", shows="agents: id name type pid isActive lastHeartbeat services locks",
           quiet="id")
def list_agents(daemon: Daemon, asker: Asker, active: Bool = False) -> Reply:
    """List the agents, the dead of the last day included."""
    now = daemon.clock.now()
    rows = daemon.store.rows("SELECT * FROM AGENTS ORDER BY registered, id")
    agents = [agent_view(daemon, row, now) for row in rows]
    return listing("agents", [agent for agent in agents if agent["isActive"] or not active])


# --- webhooks ---------------------------------------------------------------------------------------------------------

def hook_view(row: Any) -> Reply:
    return {"id": row["id"], "url": row["url"], "events": json.loads(row["events"]), "filterPattern": row["filter"],
            "hasSecret": row["secret"] is not None, "active": bool(row["active"]), "createdAt": row["created"],
            "lastTriggered": row["triggered"], "successCount": row["successes"], "failureCount": row["failures"],
            "metadata": from_json(row["metadata"])}


def need_hook(db: Union[Store, Transaction], hook: str) -> Any:
    row = db.row("SELECT * FROM HOOKS WHERE id = ?", hook)
    if not row:
        raise PortDaddyError("NOT_FOUND", f"there is no webhook {hook}; list them with GET /webhooks", id=hook)
    return row


def mint_secret() -> str:
    import base64
    return "whsec_" + base64.b64encode(os.urandom(24)).decode()


@operation("POST /webhooks", command="webhook add", quiet="id")
def add_webhook(daemon: Daemon, asker: Asker, url: HttpUrl, events: Optional[EventList] = None,
                secret: Optional[Secret] = None, filter_pattern: Optional[Pattern] = None,
                metadata: Optional[Metadata] = None) -> Reply:
    """Have events sent to a URL, signed with the secret and retried until they are taken."""
    check_target(url, daemon.port, by_name=False)
    minted = {"secret": mint_secret()} if secret == "auto" else {}
    hook = "hook_" + os.urandom(6).hex()
    with daemon.write() as tx:
        tx.run("INSERT INTO HOOKS VALUES (?, ?, ?, ?, ?, 1, ?, NULL, 0, 0, ?)", hook, url, to_json(events or ["*"]),
               minted.get("secret", secret), filter_pattern, tx.now.wall, maybe_json(metadata))
    return ok(id=hook, url=url, events=events or ["*"], **minted, message=f"{hook} will be sent what happens")


@operation("GET /webhooks", command="webhook list", shows="webhooks: id url events active successCount failureCount",
           quiet="id")
def list_webhooks(daemon: Daemon, asker: Asker, active: Optional[Bool] = None) -> Reply:
    """List the webhooks."""
    rows = daemon.store.rows("SELECT * FROM HOOKS WHERE ? IS NULL OR active = ? ORDER BY created, id", active, active)
    return listing("webhooks", [hook_view(row) for row in rows])


@operation("GET /webhooks/events")
def webhook_events(daemon: Daemon, asker: Asker) -> Reply:
    """List the events that a webhook can ask for."""
    return listing("events", list(EVENT_KINDS))


@operation("GET /webhooks/{id}")
def get_webhook(daemon: Daemon, asker: Asker, id: HookId) -> Reply:
    """One webhook, without its secret."""
    webhook = hook_view(need_hook(daemon.store, id))
    return ok(**webhook, webhook=webhook)


@operation("PUT /webhooks/{id}")
def update_webhook(daemon: Daemon, asker: Asker, id: HookId, url: Optional[HttpUrl] = None,
                   events: Optional[EventList] = None, secret: Optional[Secret] = None,
                   filter_pattern: Optional[Pattern] = None, active: Optional[Bool] = None,
                   metadata: Optional[Metadata] = None) -> Reply:
    """Change a webhook, or switch it off and on again."""
    if url:
        check_target(url, daemon.port, by_name=False)
    minted = {"secret": mint_secret()} if secret == "auto" else {}
    columns = {"url": url, "events": maybe_json(events), "secret": minted.get("secret", secret),
               "filter": filter_pattern, "active": active, "metadata": maybe_json(metadata)}
    with daemon.write() as tx:
        need_hook(tx, id)
        for column, value in columns.items():
            if value is not None:
                tx.run(f"UPDATE HOOKS SET {column} = ? WHERE id = ?", value, id)
        tx.ring("courier")
    return {**get_webhook(daemon, asker, id), **minted}


@operation("DELETE /webhooks/{id}", command="webhook rm", quiet="removed")
def remove_webhook(daemon: Daemon, asker: Asker, id: HookId) -> Reply:
    """Remove a webhook and what was still to be sent to it."""
    with daemon.write() as tx:
        need_hook(tx, id)
        tx.run("DELETE FROM HOOKS WHERE id = ?", id)
        tx.run("DELETE FROM DELIVERIES WHERE hook = ?", id)
    return ok(id=id, removed=True, message=f"removed {id}")


@operation("POST /webhooks/{id}/test", command="webhook test", quiet="delivery")
def test_webhook(daemon: Daemon, asker: Asker, id: HookId) -> Reply:
    """Send a webhook.test event to one webhook; its delivery tells how that went."""
    with daemon.write() as tx:
        need_hook(tx, id)
        number = delivery_append(tx, id, tx.next_id(), "webhook.test", {"webhookId": id})
    return ok(id=id, delivery=delivery_id(daemon, number), message=f"a test is on its way to {id}")


def delivery_id(daemon: Daemon, number: int) -> str:
    """The public id of a delivery: unique among all databases, since receivers may serve more than one."""
    return f"dlv_{daemon.store.tag}_{number}"


@operation("GET /webhooks/{id}/deliveries", command="webhook deliveries", quiet="id",
           shows="deliveries: id event status attempts responseStatus durationMs nextAttemptAt error")
def list_deliveries(daemon: Daemon, asker: Asker, id: HookId, limit: Count = 50) -> Reply:
    """List what was sent to a webhook and what is still to be sent, newest first."""
    now = daemon.clock.now()
    need_hook(daemon.store, id)
    rows = daemon.store.rows("SELECT * FROM DELIVERIES WHERE hook = ? ORDER BY id DESC LIMIT ?", id, limit)
    return listing("deliveries", [
        {"id": delivery_id(daemon, row["id"]), "event": row["event"], "status": row["status"],
         "attempts": row["attempts"], "responseStatus": row["response"], "durationMs": row["duration"],
         "nextAttemptAt": wall(now, row["due"]), "error": row["error"], "createdAt": row["created"]} for row in rows])


# --- the log and the daemon itself ------------------------------------------------------------------------------------

def event_view(row: Any) -> Reply:
    facts = json.loads(row["facts"])
    words = ", ".join(f"{name} {value if isinstance(value, str) else to_json(value)}" for name, value in facts.items()
                      if value not in (None, [], row["subject"]))
    return {"id": row["id"], "timestamp": row["at"], "type": row["kind"], "agentId": row["agent"],
            "targetId": row["subject"], "details": words, "metadata": facts}


@operation("GET /activity", command="activity", shows="entries: id timestamp type agentId targetId details", quiet="id")
def get_activity(daemon: Daemon, asker: Asker, limit: Count = 100, type: Optional[EventPattern] = None,
                 agent: Optional[AgentId] = None, target: Optional[Pattern] = None, since: Instant = 0,
                 until: Instant = MAX_INTEGER, after: Cursor = 0) -> Reply:
    """What has happened, newest first."""
    rows = event_list(daemon.store, type, agent, target, after, since, until, limit, newest=True)
    return listing("entries", [event_view(row) for row in rows])


@operation("GET /events")
def events(daemon: Daemon, asker: Asker, type: Optional[EventPattern] = None, after: Optional[Cursor] = None) -> Stream:
    """Follow what happens as Server-Sent Events; Last-Event-ID resumes exactly."""
    current = daemon.store.ids.value
    start = after if after is not None else asker.after
    cursor = current if start is None else start
    opening = sse("connected", {"lastId": current})
    oldest = daemon.store.value("SELECT min(id) FROM EVENTS") or 0
    if cursor > current:
        opening += sse("reset", {"from": cursor, "to": current})
        cursor = 0
    elif start is not None and start + 1 < oldest and daemon.store.value("SELECT count(*) FROM EVENTS") >= KEEP_EVENTS:
        opening += sse("gap", {"from": start, "to": oldest - 1})

    def read() -> List[bytes]:
        nonlocal cursor
        parts = []
        for row in event_list(daemon.store, type, after=cursor):
            cursor = row["id"]
            parts.append(sse(row["kind"], event_view(row), cursor))
        return parts

    return Stream(follow(daemon, asker, "events", opening, read))


@operation("GET /health")
def health(daemon: Daemon, asker: Asker) -> Reply:
    """Whether the daemon is well."""
    now = daemon.clock.now()
    return {"status": "ok", "version": __version__, "uptime_seconds": (now.awake - daemon.started.awake) // 1000,
            "active_ports": daemon.store.value("SELECT count(*) FROM SERVICES"), "pid": os.getpid()}


@operation("GET /version")
def version(daemon: Daemon, asker: Asker) -> Reply:
    """Which daemon this is: its version, protocol, instance and file."""
    return {"service": "port-daddy", "version": __version__, "protocol": PROTOCOL, "instance": daemon.instance,
            "sha256": file_hash(__file__), "startedAt": daemon.started.wall, "pid": os.getpid(),
            "uptime": daemon.clock.now().awake - daemon.started.awake, "python": sys.version.split()[0]}


@operation("GET /metrics")
def metrics(daemon: Daemon, asker: Asker) -> Reply:
    """Numbers about the daemon: what it holds, who waits, how large it is."""
    store, now = daemon.store, daemon.clock.now()
    counts = {camel(table.lower()): store.value(f"SELECT count(*) FROM {table}")
              for table in ("SERVICES", "CHANNELS", "MESSAGES", "LOCKS", "AGENTS", "EVENTS", "DELIVERIES")}
    return {**counts, "webhooks": store.value("SELECT count(*) FROM HOOKS"), "waiters": daemon.bell.crowd,
            "lastId": store.ids.value, "lastToken": store.tokens.value, "uptime": now.awake - daemon.started.awake,
            "threads": threading.active_count()}


@operation("GET /config")
def config(daemon: Daemon, asker: Asker) -> Reply:
    """The settings of this daemon."""
    settings = daemon.settings
    return ok(port=daemon.port, home=settings.home, range=list(settings.range), url=f"http://127.0.0.1:{daemon.port}",
              maxConnections=settings.max_connections, maxWaiters=settings.max_waiters)


# ======================================================================================================================
# 10. WORKERS — the loops beside the requests
# ======================================================================================================================

# 1. Each worker is a thread that looks, works and sleeps on the bell until it is rung or something is due.
# 2. A worker never dies of an error: the wrapper logs it with an id, waits a second and goes on.

RETRY_AFTER = (1, 2, 4, 8, 16, 60, 300)  # seconds after the first, second … failed attempt; then the delivery is dead
ATTEMPT_TIMEOUT = 10.0


def failure_id(where: str) -> str:
    """Log the exception being handled, under an id that may be shown to whoever met it."""
    import traceback
    number = os.urandom(4).hex()
    log(f"{where} failed [{number}]: {traceback.format_exc()}")
    return number


class Worker(threading.Thread):
    """The wrapper: `work` is called again and again, joined to its topic, and returns how many ms it may sleep."""

    def __init__(self, daemon: Daemon, topic: str, work: Callable[[], int]) -> None:
        super().__init__(name=topic, daemon=True)
        self.bell, self.topic, self.work = daemon.bell, topic, work

    def run(self) -> None:
        while not self.bell.closed:
            waiter = self.bell.join([self.topic])
            try:
                pause = self.work()
            except Exception:
                failure_id(self.topic)
                pause = 1_000
            self.bell.sleep(waiter, time.monotonic() + pause / 1000)
            self.bell.leave(waiter)


class Checker:
    """Who listens and who is well: every second while there are services, four times as often while somebody waits."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.due: Dict[str, float] = {}  # when each service is to be checked again, on the monotonic clock
        self.running: Set[str] = set()

    def work(self) -> int:
        daemon, now = self.daemon, time.monotonic()
        awaited = {topic.partition(":")[2] for topic in daemon.bell.topics("service:")}
        rows = daemon.store.rows("SELECT * FROM SERVICES")
        if rows:
            daemon.observe()
        for row in rows:
            wanted = row["health"] is not None or row["id"] in awaited
            due = now >= self.due.get(row["id"], 0) or row["id"] in awaited and not row["healthy"]
            if wanted and due and row["id"] not in self.running and not daemon.supervised(row):
                self.due[row["id"]] = now + HEALTH_EVERY / 1000
                self.running.add(row["id"])
                threading.Thread(target=self.check, args=(row,), name="check", daemon=True).start()
        self.due = {row["id"]: self.due[row["id"]] for row in rows if row["id"] in self.due}
        return 250 if awaited else 1_000 if rows else TICK_AT_MOST

    def check(self, row: Any) -> None:
        try:
            self.daemon.check_health(row)
        finally:
            self.running.discard(row["id"])


class Courier:
    """Sends deliveries: one thread per webhook that has work, so that a slow receiver delays nobody else."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.busy: Set[str] = set()

    def work(self) -> int:
        store, awake = self.daemon.store, self.daemon.clock.now().awake
        rows = store.rows("SELECT hook, min(due) AS due FROM DELIVERIES JOIN HOOKS ON HOOKS.id = hook "
                          "WHERE due IS NOT NULL AND active GROUP BY hook")
        for row in rows:
            if row["due"] <= awake and row["hook"] not in self.busy:
                self.busy.add(row["hook"])
                threading.Thread(target=self.serve, args=(row["hook"],), name="courier", daemon=True).start()
        waits: List[int] = [max(row["due"] - awake, 1) for row in rows if row["hook"] not in self.busy]
        return min(waits, default=TICK_AT_MOST)

    def serve(self, hook: str) -> None:
        """Send what is due to one webhook, one after the other, until nothing is."""
        daemon = self.daemon
        try:
            while not daemon.bell.closed:
                row = delivery_due(daemon.store, hook, daemon.clock.now().awake)
                if not row:
                    break
                self.attempt(row)
        finally:
            self.busy.discard(hook)
            daemon.bell.ring("courier")  # something may have fallen due since the last look

    def attempt(self, row: Any) -> None:
        began, response, error, retry_after = time.monotonic(), None, None, None
        body = row["body"].encode()
        try:
            addresses = check_target(row["url"], self.daemon.port)
            answer = http_call("POST", row["url"], addresses, self.headers(row, body), body, ATTEMPT_TIMEOUT)
            response = answer.status
            if not 200 <= response < 300:
                error = f"HTTP {response}"
                retry_after = answer.retry_after if response in (429, 503) else None
        except PortDaddyError as problem:
            error = str(problem)
        with self.daemon.write() as tx:
            delivery_settle(tx, row, self.retry(row["attempts"], retry_after), response,
                            round((time.monotonic() - began) * 1000), error)

    @staticmethod
    def retry(attempts: int, retry_after: Optional[int]) -> Optional[int]:
        """Milliseconds until the next attempt, spread by a fifth so that receivers are not hit in step; None: give up."""
        if attempts >= len(RETRY_AFTER):
            return None
        spread = 0.8 + 0.4 * int.from_bytes(os.urandom(2), "big") / 65535
        return round(1000 * max(RETRY_AFTER[attempts] * spread, min(retry_after or 0, 3600)))

    def headers(self, row: Any, body: bytes) -> Dict[str, str]:
        """Both families: our own, and Standard Webhooks 1.0 (https://www.standardwebhooks.com)."""
        number, now = delivery_id(self.daemon, row["id"]), self.daemon.clock.now().wall
        headers = {"Content-Type": "application/json", "X-PortDaddy-Event": row["event"],
                   "X-PortDaddy-Delivery": number, "X-PortDaddy-Timestamp": str(now),
                   "webhook-id": number, "webhook-timestamp": str(now // 1000)}
        if row["secret"] is not None:
            headers["X-PortDaddy-Signature"] = "sha256=" + hmac_sha256(row["secret"].encode(), body).hex()
            headers["webhook-signature"] = standard_signature(row["secret"], number, str(now // 1000), body)
        return headers


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    import hashlib
    import hmac
    return hmac.new(key, message, hashlib.sha256).digest()


def standard_signature(secret: str, number: str, timestamp: str, body: bytes) -> str:
    import base64
    key = secret.encode()
    if secret.startswith("whsec_"):
        with contextlib.suppress(ValueError):
            key = base64.b64decode(secret[6:], validate=True)
    return "v1," + base64.b64encode(hmac_sha256(key, f"{number}.{timestamp}.".encode() + body)).decode()


def verify_webhook(headers: Mapping[str, str], body: bytes, secret: str, tolerance: int = 300_000) -> bool:
    """For receivers: whether a webhook comes from a daemon that knows the secret, and was sent just now.

    `headers` are the request's, in any case; `body` the exact bytes; `tolerance` how many milliseconds old, or early,
    the attempt may be. Only the Standard Webhooks signature is looked at: the other one says nothing about time."""
    import hmac
    found = {name.lower(): value for name, value in headers.items()}
    number, timestamp = found.get("webhook-id", ""), found.get("webhook-timestamp", "")
    if not re.fullmatch(r"[0-9]{1,12}", timestamp) or abs(time.time() * 1000 - int(timestamp) * 1000) > tolerance:
        return False
    expected = standard_signature(secret, number, timestamp, body).encode()
    return any(hmac.compare_digest(expected, given.encode("utf-8", "replace"))
               for given in found.get("webhook-signature", "").split(" "))


class Watcher(threading.Thread):
    """Sees the hang-ups of those who wait, with one selector, and wakes their waiters."""

    def __init__(self) -> None:
        import selectors
        super().__init__(name="watcher", daemon=True)
        self.selector = selectors.DefaultSelector()
        self.ready = selectors.EVENT_READ
        self.wakeup, self._wakeup = socket.socketpair()
        self.selector.register(self._wakeup, self.ready)
        self.closed = False

    def add(self, connection: socket.socket, bell: Bell, waiter: Waiter) -> None:
        with contextlib.suppress(KeyError, ValueError, OSError):
            self.selector.unregister(connection)  # a stream that waits again
        with contextlib.suppress(KeyError, ValueError, OSError):  # closed meanwhile: the send will tell
            self.selector.register(connection, self.ready, (bell, waiter))

    def remove(self, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError, OSError):
            self.selector.unregister(connection)

    def run(self) -> None:
        while not self.closed:
            for key, _ in self.selector.select():
                if key.data is None:
                    return
                connection, (bell, waiter) = key.fileobj, key.data
                self.remove(connection)  # type: ignore[arg-type]
                if not has_peer(connection):  # type: ignore[arg-type]
                    bell.hang_up(waiter)

    def close(self) -> None:
        self.closed = True
        self.wakeup.close()
        self.join(1)
        self.selector.close()
        self._wakeup.close()


def has_peer(connection: socket.socket) -> bool:
    """Whether the other side is still there; one that has closed only its sending half counts as gone.

    Asked of the kernel without reading, and without touching the socket's timeout, which may be another thread's."""
    import fcntl
    import select
    import termios
    hang_up = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere a readable connection without a byte has ended
    poller = select.poll()
    try:
        poller.register(connection, select.POLLIN | hang_up)
        found = poller.poll(0)
        events = found[0][1] if found else 0
        if events & (hang_up | select.POLLHUP | select.POLLERR | select.POLLNVAL):
            return False
        return not events or fcntl.ioctl(connection, termios.FIONREAD, b"\0\0\0\0") != b"\0\0\0\0"
    except (OSError, ValueError):
        return False


# ======================================================================================================================
# 11. HTTP — bytes to operations and back
# ======================================================================================================================

# 1. Framing is strict (RFC 9112 without its leniencies): what two readers could read in two ways is refused.
# 2. The gate comes before routing, for every method. An answer that comes before the whole body was read closes the
#    connection, or the body would be run as the next request.
# 3. A reply is one write. Every reply says which daemon it comes from.
# 4. Deadlines are for the whole of a head or a body, not per byte.

IDLE_TIMEOUT, HEAD_TIMEOUT, BODY_TIMEOUT, SEND_TIMEOUT, STOP_TIMEOUT = 15.0, 10.0, 30.0, 10.0, 5.0
MAX_LINE, MAX_HEAD, MAX_HEADERS = 8 * 1024, 32 * 1024, 100
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
REASONS = {200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
           405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 413: "Content Too Large",
           414: "URI Too Long", 415: "Unsupported Media Type", 422: "Unprocessable Content", 429: "Too Many Requests",
           431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
           503: "Service Unavailable", 507: "Insufficient Storage"}
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!\"$-~]+) HTTP/1\.([01])\r\n")  # a target without # or blanks
HEADER_BLOCK = re.compile(rb"(?:" + TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
HEADER = re.compile(rb"([^:\r\n]+):[ \t]*([^\r\n]*?)[ \t]*\r\n")
SINGLE = ("host", "content-length", "transfer-encoding", "content-type", "origin", "sec-fetch-site", "x-agent-id", "x-pid",
          "last-event-id", "expect", "authorization")  # headers that may not be sent twice
LOCAL_NAMES: FrozenSet[str] = frozenset(("localhost", "127.0.0.1", "[::1]"))


class Request(NamedTuple):
    """A request whose head has been read and whose framing is right; `length` bytes of body follow."""

    method: str
    target: str
    version: int  # of HTTP/1.x
    headers: Dict[str, str]
    length: int


def parse_head(head: bytes) -> Request:
    """A request's head, from its first byte to the blank line; BAD_REQUEST when any byte is out of place."""
    line = REQUEST_LINE.match(head)
    if not line:
        raise PortDaddyError("BAD_REQUEST", "the request line must be: METHOD, one space, a target in visible ASCII "
                             "without #, one space, HTTP/1.0 or HTTP/1.1")
    if not HEADER_BLOCK.fullmatch(head, line.end()):
        raise PortDaddyError("BAD_REQUEST", "a header line must be: name, colon, value, CR LF; no folding, no control "
                             "characters, no blank before the colon")
    headers: Dict[str, str] = {}
    found = HEADER.findall(head, line.end())
    for raw_name, raw_value in found:
        name, value = raw_name.decode("ascii").lower(), raw_value.decode("latin-1")
        if name in headers:
            if name in SINGLE:
                raise PortDaddyError("BAD_REQUEST", f"the header {name} was sent twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    if len(found) > MAX_HEADERS or any(len(name) + len(value) > MAX_LINE for name, value in found):
        raise PortDaddyError("HEADERS_TOO_LARGE")
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise PortDaddyError("BAD_REQUEST", "a request has either Content-Length or Transfer-Encoding, not both")
        raise PortDaddyError("NOT_IMPLEMENTED", "Transfer-Encoding is not supported; send a Content-Length")
    length = headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]+", length):
        raise PortDaddyError("BAD_REQUEST", "Content-Length must be digits only")
    method, target, version = line.groups()
    size = int(length) if len(length) < 18 else MAX_BODY + 1
    return Request(method.decode("ascii"), target.decode("ascii"), int(version), headers, size)


def gate(request: Request) -> None:
    """Whoever may come in: programs of this machine, and the dashboard's own page; no page of another site."""
    headers = request.headers
    host = headers.get("host")
    if host is None:
        if request.version == 1:
            raise PortDaddyError("BAD_REQUEST", "the Host header is missing")
    elif not re.fullmatch(r"(?:\[[^\]]*\]|[^:\[\]]*)(?::[0-9]{1,5})?", host) or (
            re.sub(r":[0-9]+\Z", "", host).lower() not in LOCAL_NAMES):
        raise PortDaddyError("HOST_NOT_ALLOWED")
    if "origin" in headers and headers["origin"] != f"http://{host}":
        raise PortDaddyError("ORIGIN_NOT_ALLOWED")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise PortDaddyError("CROSS_SITE")
    if request.method == "OPTIONS":  # only a browser asks, on behalf of a page that we do not know
        raise PortDaddyError("ORIGIN_NOT_ALLOWED")
    if request.length > MAX_BODY:
        raise PortDaddyError("TOO_LARGE", f"the body is larger than the limit of {MAX_BODY} bytes", limit=MAX_BODY)


class Router:
    """From method and path to an operation: a tree of path segments, literal ones before parameters."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self.root: Dict[str, Any] = {}
        for one in operations:
            for method, path in one.routes:
                node = self.root
                names = []
                for segment in path.strip("/").split("/"):
                    if segment.startswith("{"):
                        names.append(segment.strip("{.}"))
                        segment = "{...}" if segment.endswith("...}") else "{}"
                    node = node.setdefault(segment, {})
                node.setdefault("", {})[method] = (one, names)

    def find(self, method: str, path: str) -> Tuple[Operation, Dict[str, str]]:
        """The operation and its path parameters; the path is split first and decoded then (RFC 3986, 2.4)."""
        segments = [unquote(segment) if "%" in segment else segment for segment in path.split("/")[1:]]
        values: List[str] = []
        node = self.root
        for position, segment in enumerate(segments):
            if segment and segment in node:
                node = node[segment]
            elif segment and "{}" in node:
                node = node["{}"]
                values.append(segment)
            elif segment and "{...}" in node:
                node = node["{...}"]
                values.append("/".join(segments[position:]))
                break
            else:
                raise PortDaddyError("NOT_FOUND", "there is no such path; the README lists them all")
        methods = node.get("")
        if not methods:
            raise PortDaddyError("NOT_FOUND", "there is no such path; the README lists them all")
        if method not in methods:
            raise PortDaddyError("METHOD_NOT_ALLOWED", f"this path knows {', '.join(sorted(methods))}",
                                 allow=sorted(methods))
        one, names = methods[method]
        return one, dict(zip(names, values))


def unquote(text: str, plus: bool = False) -> str:
    """Percent-decoding (RFC 3986) that refuses what is not UTF-8; in a form (`plus`), + is a blank."""
    if "%" not in text and not (plus and "+" in text):
        return text
    raw = (text.replace("+", " ") if plus else text).encode("ascii")
    if re.search(rb"%(?![0-9A-Fa-f]{2})", raw):
        raise PortDaddyError("BAD_REQUEST", "a % in the target must be followed by two hexadecimal digits")
    try:
        return re.sub(rb"%([0-9A-Fa-f]{2})", lambda found: bytes([int(found.group(1), 16)]), raw).decode("utf-8")
    except UnicodeDecodeError:
        raise PortDaddyError("BAD_REQUEST", "the target does not decode to UTF-8") from None


def parse_query(query: str) -> Dict[str, str]:
    values: Dict[str, str] = {}
    for pair in query.split("&"):
        if pair:
            name, _, value = pair.partition("=")
            name = unquote(name, plus=True)
            if name in values:
                raise PortDaddyError("BAD_VALUE", f"{name[:60]} was given twice in the query", field=name[:60])
            values[name] = unquote(value, plus=True)
    return values


def parse_body(headers: Mapping[str, str], body: bytes) -> Dict[str, Any]:
    """The JSON object of a body; none is an empty one."""
    if not body:
        return {}
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    plain_curl = media == "application/x-www-form-urlencoded" and body.lstrip()[:1] == b"{"
    if media not in ("", "application/json") and not re.fullmatch(r"application/[\w.-]+\+json", media) and not plain_curl:
        raise PortDaddyError("UNSUPPORTED_MEDIA")
    try:
        value = read_json(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise PortDaddyError("BAD_JSON", "the body is not UTF-8") from None
    if not isinstance(value, dict):
        raise PortDaddyError("BAD_JSON", 'the body must be a JSON object, such as {"ttl": "30s"}')
    return value


class HttpAsker(Asker):
    """An asker at the other end of a connection."""

    def __init__(self, connection: Connection, headers: Mapping[str, str]) -> None:
        self.connection = connection
        agent, pid, after = (headers.get(name) for name in ("x-agent-id", "x-pid", "last-event-id"))
        for name, value, kind in (("X-Agent-Id", agent, AgentId), ("X-Pid", pid, Pid), ("Last-Event-ID", after, Cursor)):
            if value:
                Field(name, name, kind_of(kind), False, None).check(value, read=True)
        super().__init__(agent or None, int(pid) if pid else None, int(after) if after else None)

    def connected(self) -> bool:
        return has_peer(self.connection.socket)

    def watch(self, bell: Bell, waiter: Waiter) -> None:
        self.connection.watched = True
        self.connection.server.watcher.add(self.connection.socket, bell, waiter)


class Connection:
    """One connection, served by one thread: read a request, pass the gate, run the operation, answer, again."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self.server, self.socket = server, connection
        self.buffer = b""
        self.idle_since: Optional[float] = time.monotonic()  # None while a request is read or served
        self.watched = False
        self.close_after = False
        self.bodiless = False  # the answer to HEAD has no body (RFC 9110, 9.3.2)

    def serve(self) -> None:
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self.close_after and self.serve_one():
                self.idle_since = time.monotonic()
        except (OSError, ValueError, AskerGone):
            pass  # the other side has gone, or we closed the connection: there is nobody to tell
        finally:
            self.server.watcher.remove(self.socket)

    def serve_one(self) -> bool:
        """One request and its answer; False when there was none."""
        self.close_after, self.bodiless = True, False  # until the whole request has been read
        asker: Optional[HttpAsker] = None
        try:
            head = self.read_head()
            if head is None:
                return False
            request = parse_head(head)
            self.bodiless = request.method == "HEAD"
            gate(request)
            body = self.read_body(request)
            keep = request.headers.get("connection", "").lower()
            self.close_after = keep == "close" or request.version == 0 or self.server.stopping
            asker = HttpAsker(self, request.headers)
            reply = self.run(request, body, asker)
            if isinstance(reply, Stream):
                return self.send_stream(reply)
            status, extra = 200, ""
        except PortDaddyError as problem:
            status, extra, reply = problem.status, self.extra_headers(problem), problem.body
        except (AskerGone, OSError):
            raise
        except Exception:
            number = failure_id("a request")
            status, extra, reply = 500, "", PortDaddyError(
                "INTERNAL", f"the daemon failed; its log says more under [{number}]", id=number).body
        return self.send(status, reply, extra, asker)

    @staticmethod
    def extra_headers(problem: PortDaddyError) -> str:
        if problem.code == "METHOD_NOT_ALLOWED":
            return f"Allow: {', '.join(problem.facts['allow'])}\r\n"
        return "Retry-After: 1\r\n" if problem.status == 503 else ""

    def read_head(self) -> Optional[bytes]:
        """The bytes up to the blank line; None when the connection ended, or was idle too long, before a first byte."""
        deadline = time.monotonic() + (HEAD_TIMEOUT if self.buffer else IDLE_TIMEOUT)
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end >= 0 and end + 4 <= MAX_HEAD:
                head, self.buffer = self.buffer[:end + 4], self.buffer[end + 4:]
                if head.find(b"\r\n") > MAX_LINE:
                    raise PortDaddyError("URI_TOO_LONG")
                self.idle_since = None
                return head
            line = self.buffer.find(b"\r\n")
            if (len(self.buffer) if line < 0 else line) > MAX_LINE:
                raise PortDaddyError("URI_TOO_LONG")
            if len(self.buffer) > MAX_HEAD:
                raise PortDaddyError("HEADERS_TOO_LARGE")
            if re.search(rb"(?<!\r)\n|\r(?!\n|\Z)|\0", self.buffer):  # no blank line would ever come
                raise PortDaddyError("BAD_REQUEST", "lines must end with CR LF, and hold neither of them nor NUL")
            began = bool(self.buffer)
            if not self.receive(deadline):
                if began:
                    raise PortDaddyError("BAD_REQUEST", "the request ended, or took too long, before its blank line")
                return None
            if not began:
                self.idle_since = None
                deadline = time.monotonic() + HEAD_TIMEOUT

    def receive(self, deadline: float) -> bool:
        """More bytes into the buffer; False at the end of the connection or at the deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        self.socket.settimeout(left)
        try:
            chunk = self.socket.recv(65536)
        except socket.timeout:
            return False
        self.buffer += chunk
        return bool(chunk)

    def read_body(self, request: Request) -> bytes:
        if request.length > len(self.buffer) and request.headers.get("expect", "").lower() == "100-continue":
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        deadline = time.monotonic() + BODY_TIMEOUT
        while len(self.buffer) < request.length:
            if not self.receive(deadline):
                raise PortDaddyError("BAD_REQUEST", "the body ended, or took too long, before its Content-Length")
        body, self.buffer = self.buffer[:request.length], self.buffer[request.length:]
        return body

    def run(self, request: Request, body: bytes, asker: HttpAsker) -> Union[Reply, Stream]:
        """Find the operation, bind its fields, and ask the daemon."""
        method = request.method
        if method not in METHODS:
            raise PortDaddyError("NOT_IMPLEMENTED", "this method is not known; use GET, POST, PUT or DELETE")
        if self.server.stopping:
            raise PortDaddyError("SHUTTING_DOWN")
        path, _, query = request.target.partition("?")
        if not path.startswith("/"):
            raise PortDaddyError("BAD_REQUEST", "the target must be a path that begins with /")
        one, texts = self.server.router.find(method, path)
        fields: Dict[str, Any] = {}
        if method in ("GET", "DELETE"):
            for name, text in parse_query(query).items():
                if name in texts:
                    raise PortDaddyError("BAD_VALUE", f"{name} was given twice, in the path and in the query", field=name)
                texts[name] = text
        elif query:
            raise PortDaddyError("UNKNOWN_FIELD", f"{method} takes its fields from the JSON body, not from the query")
        if body and method == "GET":
            raise PortDaddyError("BAD_REQUEST", "GET takes its fields from the query, not from a body")
        if body:
            fields = parse_body(request.headers, body)
        return one.function(self.server.daemon, asker, **one.bind(fields, texts))  # type: ignore[no-any-return]

    def send(self, status: int, reply: Any, extra: str, asker: Optional[Asker]) -> bool:
        if self.watched:
            self.watched = False
            self.server.watcher.remove(self.socket)
        body = to_json(reply).encode()
        if self.close_after:
            extra += "Connection: close\r\n"
        head = (f"HTTP/1.1 {status} {REASONS[status]}\r\n{self.server.signature}Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n{extra}\r\n")
        try:
            self.socket.settimeout(SEND_TIMEOUT)
            self.socket.sendall(head.encode() + (b"" if self.bodiless else body))
        except OSError:
            if asker and asker.undo:
                asker.undo()
            raise
        if self.close_after:
            self.linger()
        return True

    def linger(self) -> None:
        """Read what is still on its way before closing: a reset would take the answer from the other side's hands."""
        self.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 1.0
        self.buffer = b""
        while self.receive(deadline) and time.monotonic() < deadline:
            self.buffer = b""

    def send_stream(self, stream: Stream) -> bool:
        """An event stream ends with its connection, ours or theirs; a reader that takes nothing for 10 s is dropped."""
        self.close_after = True
        self.socket.settimeout(SEND_TIMEOUT)
        self.socket.sendall(f"HTTP/1.1 200 OK\r\n{self.server.signature}Content-Type: text/event-stream\r\n"
                            f"Connection: close\r\n\r\n".encode())
        try:
            for part in stream.parts:
                self.socket.settimeout(SEND_TIMEOUT)
                self.socket.sendall(part)
        except PortDaddyError:
            pass  # we are stopping; the reader comes back and resumes
        return False


class Server:
    """A daemon with its doors open. `start` takes the folder, the port and the threads in this order; `stop` gives them
    back in the reverse one."""

    def __init__(self, settings: Settings, clock: Optional[Clock] = None) -> None:
        self.settings, self.clock = settings, clock
        self.stopping = False
        self.connections: Set[Connection] = set()
        self.router = Router(OPERATIONS)

    def start(self) -> None:
        open_home(self.settings.home)
        self.home_lock = lock_home(self.settings.home)
        if self.home_lock is None:
            other = read_daemon_file(self.settings.home) or {"url": "an unknown address", "pid": "unknown"}
            raise PortDaddyError("ALREADY_RUNNING", f"a daemon already serves {self.settings.home}: pid {other['pid']} at "
                                 f"{other['url']}", **other)
        try:
            self.listeners = open_listeners(self)
            self.port = self.listeners[0].server_address[1]
            self.url = f"http://127.0.0.1:{self.port}"
            self.daemon = Daemon(self.settings, self.clock)
        except BaseException:
            self.close_doors()
            os.close(self.home_lock)
            raise
        daemon = self.daemon
        daemon.port = self.port
        self.signature = (f"Server: port-daddy/{__version__} protocol/{PROTOCOL} instance/{daemon.instance}\r\n"
                          "Cache-Control: no-store\r\n")
        self.watcher = Watcher()
        self.workers = [Worker(daemon, "keeper", lambda: daemon.tick(daemon.clock.now())),
                        Worker(daemon, "checker", Checker(daemon).work), Worker(daemon, "courier", Courier(daemon).work)]
        with daemon.write() as tx:
            tx.emit("daemon.start", "daemon", version=__version__, port=self.port, pid=os.getpid())
        self.acceptors = [threading.Thread(target=listener.serve_forever, name="acceptor", daemon=True)
                          for listener in self.listeners]
        for thread in (self.watcher, *self.workers, *self.acceptors):
            thread.start()
        write_file(os.path.join(self.settings.home, "daemon.json"), to_json({
            "url": self.url, "pid": os.getpid(), "startedAt": daemon.started.wall, "instance": daemon.instance,
            "version": __version__}))

    def stop(self, reason: str = "stop") -> None:
        """No new work; waiters are answered, running requests finish within 5 s, the database is folded."""
        self.stopping = True
        daemon = self.daemon
        self.close_doors()
        daemon.bell.close()
        deadline = time.monotonic() + STOP_TIMEOUT
        for connection in list(self.connections):
            if connection.idle_since is not None:
                with contextlib.suppress(OSError):
                    connection.socket.shutdown(socket.SHUT_RD)  # its thread reads the end and leaves
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.005)
        for thread in (*self.acceptors, *self.workers):
            thread.join(1)
        self.watcher.close()
        with daemon.write() as tx:
            tx.emit("daemon.stop", "daemon", signal=reason, version=__version__,
                    uptime=tx.now.awake - daemon.started.awake)
        remove_file(os.path.join(self.settings.home, "daemon.json"))
        daemon.close()
        if self.home_lock is not None:
            os.close(self.home_lock)

    def close_doors(self) -> None:
        for listener in getattr(self, "listeners", ()):
            listener.close()

    def handle(self, connection: socket.socket) -> None:
        """Serve one connection in its own thread, to its end."""
        served = Connection(self, connection)
        self.connections.add(served)
        try:
            served.serve()
        finally:
            self.connections.discard(served)
            connection.close()

    def make_room(self) -> bool:
        """Whether one more connection may come in: when all are taken, the longest idle one goes."""
        if len(self.connections) < self.settings.max_connections:
            return True
        idle = [one for one in list(self.connections) if one.idle_since is not None]
        if idle:
            with contextlib.suppress(OSError):
                min(idle, key=lambda one: one.idle_since or 0).socket.shutdown(socket.SHUT_RDWR)
        return bool(idle)


def open_listeners(server: Server) -> List[Any]:
    """A listener on each loopback family, on one port: the one wanted, or any that is free on both."""
    wanted = server.settings.port
    families = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    for _ in range(20):
        opened: List[Any] = []
        for family, address in families:
            port = opened[0].server_address[1] if opened else wanted
            try:
                opened.append(make_listener(server, family, address, port))
            except OSError as error:
                if family == socket.AF_INET6 and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    continue  # a machine without IPv6
                for listener in opened:
                    listener.close()
                if error.errno != errno.EADDRINUSE:
                    raise PortDaddyError("PORT_TAKEN", f"port {port} cannot be bound: {error.strerror}") from None
                break
        else:
            return opened
        if wanted:
            raise PortDaddyError("PORT_TAKEN", f"port {wanted} is taken by {port_holder(wanted)[1]}; stop that, or set "
                                 "PORT_DADDY_PORT (0: any free port)", port=wanted)
    raise PortDaddyError("PORT_TAKEN", "no port is free on both 127.0.0.1 and ::1")


def make_listener(server: Server, family: int, address: str, port: int) -> Any:
    from http.server import ThreadingHTTPServer

    class Listener(ThreadingHTTPServer):
        """The standard library's threading server, with our own connections, and a stop that does not wait."""

        address_family = family
        request_queue_size = 1024
        block_on_close = False

        def server_bind(self) -> None:
            if family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((address, port))  # without HTTPServer's look-up of our own name, which can take seconds
            self.server_address = self.socket.getsockname()

        def finish_request(self, request: Any, client_address: Any) -> None:
            server.handle(request)

        def shutdown_request(self, request: Any) -> None:
            request.close()

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while not self.closed:
                try:
                    request, client = self.socket.accept()
                    if self.closed or not server.make_room():
                        request.close()
                    else:
                        self.process_request(request, client)
                except (OSError, RuntimeError):  # out of descriptors or threads, or closed: neither stop nor spin
                    if not self.closed:
                        time.sleep(0.02)

        closed = False

        def close(self) -> None:
            """Wake the acceptor, which blocks in accept, and let go of the port."""
            self.closed = True
            with contextlib.suppress(DaemonUnreachable):
                dial([(family, 0, 0, "", self.server_address)], 1).close()
            self.server_close()

    return Listener((address, port), None)  # type: ignore[arg-type]


def read_daemon_file(home: str) -> Optional[Reply]:
    """What the last daemon of a state folder wrote about itself; None when there is nothing, or nonsense."""
    try:
        found = json.loads(read_text(os.path.join(home, "daemon.json")))
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("url"), str) else None


# ======================================================================================================================
# 12. CLIENT — the same operations from the other side
# ======================================================================================================================

# 1. A method per operation, by the operation's name, with its fields as keywords; replies are the wire's dicts.
# 2. A request is sent again only where that is safe: when nothing was sent yet, when the daemon said 503 with
#    Retry-After, or, after bytes were sent, when asking twice does the same as asking once.

IDLE_AT_MOST = 10.0  # seconds: the daemon closes at 15


class Link:
    """One kept-alive connection to the daemon: a request, a reply, or a stream."""

    def __init__(self, url: str, timeout: float) -> None:
        scheme, host, port, _ = split_url(url)
        if scheme != "http":
            raise PortDaddyError("BAD_VALUE", f"the daemon speaks http, not {scheme}; check PORT_DADDY_URL")
        try:
            self.socket = dial(resolve(host, port), timeout)
        except DaemonUnreachable as problem:
            raise DaemonUnreachable(f"no daemon answers at {url} ({problem}); start one with: python3 port_daddy.py start"
                                    ) from None
        self.host = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.url, self.buffer, self.used = url, b"", time.monotonic()
        # Nothing of ours is sent before it is certain that a Port Daddy listens, and not whoever took its port.
        self.send("GET", "/health", {}, b"")
        headers = self.read_head(timeout)[1]
        self.read_body(int(headers.get("content-length", "0")), timeout)

    def fresh(self) -> bool:
        """Whether it may be used again: not idle for long, and nothing to read, which would be its end."""
        import select
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        return time.monotonic() - self.used < IDLE_AT_MOST and not poller.poll(0)

    def close(self) -> None:
        self.socket.close()

    def send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        with self.failing():
            self.socket.sendall("\r\n".join([*lines, "", ""]).encode("utf-8") + body)

    def read_head(self, timeout: float) -> Tuple[int, Dict[str, str]]:
        """Status and headers of a reply, once it is certain that a Port Daddy sent it."""
        deadline = time.monotonic() + timeout
        while b"\r\n\r\n" not in self.buffer and len(self.buffer) < 65536:
            self.read_more(deadline)
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if not headers.get("server", "").startswith("port-daddy/"):
            raise DaemonUnreachable(f"what answers at {self.url} is not a Port Daddy; set PORT_DADDY_URL or "
                                    "PORT_DADDY_PORT to where the daemon is")
        return int(first.split(" ")[1]), headers

    def read_body(self, length: int, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while len(self.buffer) < length:
            self.read_more(deadline)
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        self.used = time.monotonic()
        return body

    def read_more(self, deadline: float) -> None:
        with self.failing():
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = self.socket.recv(65536)
        if not chunk:
            raise DaemonUnreachable(f"the daemon at {self.url} closed the connection")
        self.buffer += chunk

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        try:
            yield
        except socket.timeout:
            raise PortDaddyError("TIMED_OUT", f"the daemon at {self.url} did not answer in time") from None
        except OSError as error:
            raise DaemonUnreachable(f"the connection to the daemon at {self.url} broke ({error})") from None


def quote(text: str) -> str:
    """Percent-encoding of whatever a path segment or a query value may not hold."""
    return "".join(character if re.match(r"[A-Za-z0-9._~:/*-]", character) else
                   "".join(f"%{byte:02X}" for byte in character.encode("utf-8")) for character in text)


def wire_value(value: Any) -> str:
    """A field as it stands in a query."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else to_json(value)


class Caller:
    """How a client asks: connections kept alive, who is asking, what may be asked again."""

    def __init__(self, url: Optional[str] = None, agent_id: Optional[str] = None, pid: Optional[int] = None,
                 timeout: int = 5_000, autostart: bool = False) -> None:
        self.settings = Settings.load()
        self.url, self.agent_id = url or self.settings.url or None, agent_id or self.settings.agent or None
        self.pid = os.getpid() if pid is None else pid
        self.timeout, self.autostart = timeout, autostart
        self.server = ""  # what the daemon last said of itself: port-daddy/<version> protocol/<n> instance/<id>
        self._idle: List[Link] = []  # a list's append and pop are atomic

    def close(self) -> None:
        """Close the connections that are kept alive; the client goes on working."""
        while self._idle:
            self._idle.pop().close()

    def _link(self) -> Link:
        while self._idle:
            link = self._idle.pop()
            if link.fresh():
                return link
            link.close()
        url = self.url or find_url(self.settings)
        if self.autostart and not self.url:
            try:
                return Link(url, self.timeout / 1000)
            except DaemonUnreachable:
                url = start_daemon(self.settings)
        return Link(url, self.timeout / 1000)

    def _headers(self) -> Dict[str, str]:
        headers = {"X-Pid": str(self.pid)} if self.pid else {}
        if self.agent_id:
            headers["X-Agent-Id"] = self.agent_id
        return headers

    def call(self, method: str, path: str, fields: Mapping[str, Any], wait: Any = 0, again: bool = False) -> Reply:
        """One request: fields by wire name (None is left out), `wait` how long the operation may wait by itself, and
        `again` whether it may be repeated when the connection broke after it was sent."""
        given = {name: value for name, value in fields.items() if value is not None or name == "payload"}
        body = to_json(given).encode("utf-8", "surrogatepass") if method in ("POST", "PUT") else b""
        if given and not body:
            path += "?" + "&".join(f"{name}={quote(wire_value(value))}" for name, value in given.items())
        timeout = (self.timeout + (Period(0, 2 ** 40).read(str(wait)) if wait else 0)) / 1000
        for last in (False, False, True):
            sent = False
            try:
                link = self._link()
                sent = True
                link.send(method, path, self._headers(), body)
                status, headers = link.read_head(timeout)
                reply = json.loads(link.read_body(int(headers.get("content-length", "0")), timeout))
            except DaemonUnreachable:
                if last or sent and not again:
                    raise
                time.sleep(0.05)
                continue
            self.server = headers["server"]
            if headers.get("connection", "").lower() == "close":
                link.close()
            else:
                self._idle.append(link)
            if status == 503 and "retry-after" in headers and not last:
                time.sleep(min(int(headers["retry-after"]), 5))
                continue
            if status >= 400:
                raise problem_from_reply(status, reply)
            return reply  # type: ignore[no-any-return]
        raise AssertionError("the last round returns or raises")

    def _get(self, path: str, wait: Any = 0, again: bool = True, **fields: Any) -> Reply:
        return self.call("GET", path, {camel(name): value for name, value in fields.items()}, wait, again)

    def _post(self, path: str, wait: Any = 0, again: bool = False, **fields: Any) -> Reply:
        return self.call("POST", path, {camel(name): value for name, value in fields.items()}, wait, again)

    def _put(self, path: str, **fields: Any) -> Reply:
        return self.call("PUT", path, {camel(name): value for name, value in fields.items()}, again=True)

    def _delete(self, path: str, **fields: Any) -> Reply:
        return self.call("DELETE", path, {camel(name): value for name, value in fields.items()})


class PortDaddy(Caller):
    """A client of the daemon. Thread-safe; one instance serves a whole program.

    `url` is where the daemon is (else PORT_DADDY_URL, else what the daemon wrote into the state folder, else port
    9876); `agent_id` who you are (else PORT_DADDY_AGENT); `pid` the process that asks (ours; 0: say none); `timeout`
    how long an answer may take, in milliseconds, besides what an operation may wait; `autostart` starts a daemon when
    none runs. Every method raises PortDaddyError, and DaemonUnreachable when there is no daemon. Durations are
    milliseconds, or text such as "30s"."""

    def __enter__(self) -> PortDaddy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- services -----------------------------------------------------------------------------------------------------

    def claim(self, id: str, *, port: Optional[int] = None, exact: bool = False,
              range: Optional[Sequence[int]] = None, agent: Optional[str] = None, pid: Optional[int] = None,
              cmd: Optional[str] = None, cwd: Optional[str] = None, expires: Optional[Union[int, str]] = None,
              pair: Optional[str] = None, health: Optional[str] = None, move: bool = False,
              metadata: Optional[Mapping[str, Any]] = None) -> Reply:
        """Claim a port by name. -> {id, port, status, existing, preferred, endpoints, message[, warning]}"""
        return self._post("/claim", again=True, id=id, port=port, exact=exact, range=range and list(range), agent=agent,
                          pid=pid, cmd=cmd, cwd=cwd, expires=expires, pair=pair, health=health, move=move,
                          metadata=metadata)

    def release(self, id: Optional[str] = None, *, force: bool = False, expired: bool = False) -> Reply:
        """Release a service, or all that a pattern covers. -> {released, releasedPorts, message}"""
        return self._post("/release", id=id, force=force, expired=expired)

    def remove_service(self, id: str) -> Reply:
        """Release one service. -> as release"""
        return self._delete(f"/services/{quote(id)}")

    def list_services(self, pattern: Optional[str] = None, *, status: Optional[str] = None, port: Optional[int] = None,
                      expired: Optional[bool] = None, limit: Optional[int] = None) -> Reply:
        """-> {services: [service], count}"""
        return self._get("/services", pattern=pattern, status=status, port=port, expired=expired, limit=limit)

    def get_service(self, id: str) -> Reply:
        """-> the service's fields, and again under `service`; NOT_FOUND"""
        return self._get(f"/services/{quote(id)}")

    def update_service(self, id: str, *, status: Optional[str] = None, pid: Optional[int] = None,
                       health: Optional[str] = None, latency: Optional[int] = None, error: Optional[str] = None,
                       checked_by: Optional[str] = None, metadata: Optional[Mapping[str, Any]] = None) -> Reply:
        """Report on a service. -> as get_service"""
        return self._put(f"/services/{quote(id)}", status=status, pid=pid, health=health, latency=latency, error=error,
                         checked_by=checked_by, metadata=metadata)

    def set_endpoint(self, id: str, env: str, url: str) -> Reply:
        """-> {id, endpoints, message}; NOT_FOUND when the service is unknown"""
        return self._put(f"/services/{quote(id)}/endpoints/{quote(env)}", url=url)

    def remove_endpoint(self, id: str, env: str) -> Reply:
        """-> {removed}"""
        return self._delete(f"/services/{quote(id)}/endpoints/{quote(env)}")

    def list_health(self) -> Reply:
        """-> {services: [{id, healthy, status, latency, checkedAt, error}], count}"""
        return self._get("/services/health")

    def service_health(self, id: str) -> Reply:
        """-> {id, healthy, status, latency, checkedAt, error}"""
        return self._get(f"/services/health/{quote(id)}")

    def wait_for_service(self, id: str, *, timeout: Union[int, str] = 60_000) -> Reply:
        """Wait until a service is up. -> {services, healthy}; TIMED_OUT with waitingFor"""
        return self._get(f"/wait/{quote(id)}", wait=timeout, timeout=timeout)

    def wait_for_services(self, services: Sequence[str], *, timeout: Union[int, str] = 60_000) -> Reply:
        """Wait until all of them are up. -> {services, healthy}; TIMED_OUT with waitingFor"""
        return self._post("/wait", wait=timeout, again=True, services=list(services), timeout=timeout)

    def list_system_ports(self, *, range_only: bool = False, unmanaged_only: bool = False) -> Reply:
        """-> {ports: [{port, pid, command, service}], count}"""
        return self._get("/ports/system", range_only=range_only, unmanaged_only=unmanaged_only)

    def cleanup(self) -> Reply:
        """Release services whose process is dead or whose time is over. -> {freed: [id], count}"""
        return self._post("/ports/cleanup")

    # --- channels -----------------------------------------------------------------------------------------------------

    def publish(self, channel: str, payload: Any, *, sender: Optional[str] = None,
                expires: Optional[Union[int, str]] = None) -> Reply:
        """-> {id, channel, message}"""
        return self._post(f"/msg/{quote(channel)}", payload=payload, sender=sender, expires=expires)

    def get_messages(self, channel: str, *, limit: Optional[int] = None, after: Optional[int] = None) -> Reply:
        """-> {messages: [{id, channel, payload, sender, createdAt}], count, lastId}"""
        return self._get(f"/msg/{quote(channel)}", limit=limit, after=after)

    def poll(self, channel: str, *, timeout: Union[int, str] = 30_000, after: Optional[int] = None,
             group: Optional[str] = None) -> Reply:
        """Wait for the next message. -> {message: object or None, lastId}"""
        return self._get(f"/msg/{quote(channel)}/poll", wait=timeout, again=after is not None, timeout=timeout,
                         after=after, group=group)

    def subscribe(self, channel: str, *, after: Optional[int] = None,
                  on_loss: Optional[Callable[[Reply], None]] = None) -> Subscription:
        """Follow a channel or a pattern: an iterator of messages that reconnects and resumes by itself. `on_loss` is
        told of messages that are gone ({event: "gap", from, to}) and of another database ({event: "reset"})."""
        return Subscription(self, f"/msg/{quote(channel)}/subscribe", after, on_loss)

    def list_channels(self) -> Reply:
        """-> {channels: [{channel, count, lastId, lastMessage, subscribers}], count}"""
        return self._get("/channels")

    def clear_channel(self, channel: str) -> Reply:
        """-> {deleted}"""
        return self._delete(f"/msg/{quote(channel)}")

    # --- locks --------------------------------------------------------------------------------------------------------

    def lock(self, name: str, *, owner: Optional[str] = None, ttl: Union[int, str] = 300_000, wait: Union[int, str] = 0,
             pid: Optional[int] = None, metadata: Optional[Mapping[str, Any]] = None) -> Reply:
        """Take a lock, or wait in line for it. -> {name, owner, token, acquiredAt, expiresAt, waited}; LOCK_HELD"""
        return self.call("POST", f"/locks/{quote(name)}", {"owner": owner, "ttl": ttl, "wait": wait, "pid": pid,
                                                           "metadata": metadata}, wait)

    def extend_lock(self, name: str, *, owner: Optional[str] = None, token: Optional[int] = None,
                    ttl: Union[int, str] = 300_000) -> Reply:
        """-> {expiresAt}; LOCK_LOST, NOT_OWNER"""
        return self._put(f"/locks/{quote(name)}", owner=owner, token=token, ttl=ttl)

    def unlock(self, name: str, *, owner: Optional[str] = None, token: Optional[int] = None,
               force: bool = False) -> Reply:
        """-> {released: bool}; LOCK_LOST, NOT_OWNER"""
        return self._delete(f"/locks/{quote(name)}", owner=owner, token=token, force=force)

    def check_lock(self, name: str, *, token: Optional[int] = None) -> Reply:
        """-> {held, owner, token, pid, acquiredAt, expiresAt, waiting, metadata, holders[, valid]}"""
        return self._get(f"/locks/{quote(name)}", token=token)

    def list_locks(self, *, owner: Optional[str] = None, pattern: Optional[str] = None) -> Reply:
        """-> {locks, count}"""
        return self._get("/locks", owner=owner, pattern=pattern)

    def with_lock(self, name: str, function: Optional[Callable[[], T]] = None, *, owner: Optional[str] = None,
                  ttl: Union[int, str] = 300_000, wait: Union[int, str] = 60_000, pid: Optional[int] = None,
                  on_loss: Optional[Callable[[], None]] = None) -> Any:
        """`with pd.with_lock(name) as held:` holds a lock and renews it; LOCK_HELD when it was not free within `wait`,
        LockLost at the end of the block when the lease was lost. With a function: call it under the lock, and return
        what it returns."""
        held = HeldLock(self, name, owner, ttl, wait, pid, on_loss)
        if function is None:
            return held
        with held:
            return function()

    # --- agents -------------------------------------------------------------------------------------------------------

    def register(self, id: Optional[str] = None, *, name: Optional[str] = None, type: Optional[str] = None,
                 pid: Optional[int] = None, ttl: Optional[Union[int, str]] = None,
                 metadata: Optional[Mapping[str, Any]] = None, max_services: Optional[int] = None,
                 max_locks: Optional[int] = None) -> Reply:
        """Register this agent; without an id of its own it adopts the one that the daemon makes. -> {agentId, …}"""
        reply = self._post("/agents", again=bool(id or self.agent_id), id=id, name=name, type=type, pid=pid, ttl=ttl,
                           metadata=metadata, max_services=max_services, max_locks=max_locks)
        if self.agent_id is None:
            self.agent_id = str(reply["agentId"])
        return reply

    def heartbeat(self, id: Optional[str] = None) -> Reply:
        """-> {lastHeartbeat}"""
        return self._post(f"/agents/{quote(self._agent(id))}/heartbeat", again=True)

    def start_heartbeat(self, interval: Union[int, str] = 30_000) -> Heartbeat:
        """Send heartbeats from a thread, every `interval` milliseconds, until `.stop()`."""
        return Heartbeat(self, self._agent(None), Period(10, 86_400_000).read(str(interval)))

    def unregister(self, id: Optional[str] = None) -> Reply:
        """-> {unregistered}"""
        return self._delete(f"/agents/{quote(self._agent(id))}")

    def get_agent(self, id: str) -> Reply:
        """-> {agent}"""
        return self._get(f"/agents/{quote(id)}")

    def list_agents(self, *, active_only: bool = False) -> Reply:
        """-> {agents, count}"""
        return self._get("/agents", active=active_only)

    def _agent(self, id: Optional[str]) -> str:
        agent = id or self.agent_id
        if not agent:
            raise PortDaddyError("BAD_VALUE", "this client has no agent id: register first, or give one")
        return agent

    # --- webhooks -----------------------------------------------------------------------------------------------------

    def add_webhook(self, url: str, *, events: Optional[Sequence[str]] = None, secret: Optional[str] = None,
                    filter_pattern: Optional[str] = None, metadata: Optional[Mapping[str, Any]] = None) -> Reply:
        """-> {id, url, events[, secret]}; receivers check with verify_webhook"""
        return self._post("/webhooks", url=url, events=events and list(events), secret=secret,
                          filter_pattern=filter_pattern, metadata=metadata)

    def list_webhooks(self, *, active: Optional[bool] = None) -> Reply:
        """-> {webhooks, count}"""
        return self._get("/webhooks", active=active)

    def get_webhook(self, id: str) -> Reply:
        """-> the webhook's fields, and again under `webhook`"""
        return self._get(f"/webhooks/{quote(id)}")

    def update_webhook(self, id: str, *, url: Optional[str] = None, events: Optional[Sequence[str]] = None,
                       secret: Optional[str] = None, filter_pattern: Optional[str] = None,
                       active: Optional[bool] = None, metadata: Optional[Mapping[str, Any]] = None) -> Reply:
        """-> as get_webhook"""
        return self._put(f"/webhooks/{quote(id)}", url=url, events=events and list(events), secret=secret,
                         filter_pattern=filter_pattern, active=active, metadata=metadata)

    def remove_webhook(self, id: str) -> Reply:
        """-> {removed}"""
        return self._delete(f"/webhooks/{quote(id)}")

    def webhook_events(self) -> Reply:
        """-> {events: [name], count}"""
        return self._get("/webhooks/events")

    def test_webhook(self, id: str) -> Reply:
        """-> {delivery}"""
        return self._post(f"/webhooks/{quote(id)}/test")

    def list_deliveries(self, id: str, *, limit: Optional[int] = None) -> Reply:
        """-> {deliveries: [{id, event, status, attempts, responseStatus, durationMs, nextAttemptAt, error, …}], count}"""
        return self._get(f"/webhooks/{quote(id)}/deliveries", limit=limit)

    # --- the log and the daemon ---------------------------------------------------------------------------------------

    def get_activity(self, *, limit: Optional[int] = None, type: Optional[str] = None, agent: Optional[str] = None,
                     target: Optional[str] = None, since: Optional[int] = None, until: Optional[int] = None,
                     after: Optional[int] = None) -> Reply:
        """-> {entries: [{id, timestamp, type, agentId, targetId, details, metadata}], count}, newest first"""
        return self._get("/activity", limit=limit, type=type, agent=agent, target=target, since=since, until=until,
                         after=after)

    def events(self, *, type: Optional[str] = None, after: Optional[int] = None,
               on_loss: Optional[Callable[[Reply], None]] = None) -> Subscription:
        """Follow what happens: an iterator of the entries of the activity log that reconnects and resumes by itself."""
        return Subscription(self, f"/events?type={quote(type)}" if type else "/events", after, on_loss)

    def health(self) -> Reply:
        """-> {status, version, uptime_seconds, active_ports, pid}"""
        return self._get("/health")

    def version(self) -> Reply:
        """-> {service, version, protocol, instance, sha256, startedAt, pid, uptime, python}"""
        return self._get("/version")

    def metrics(self) -> Reply:
        """-> counts of what the daemon holds"""
        return self._get("/metrics")

    def config(self) -> Reply:
        """-> {port, home, range, url, …}"""
        return self._get("/config")

    def ping(self) -> bool:
        """Whether a daemon answers."""
        try:
            return self.health()["status"] in ("ok", "degraded")
        except (DaemonUnreachable, PortDaddyError):
            return False


class HeldLock:
    """A lock for the time of a with block, renewed by a thread after each third of its lease."""

    def __init__(self, pd: PortDaddy, name: str, owner: Optional[str], ttl: Union[int, str], wait: Union[int, str],
                 pid: Optional[int], on_loss: Optional[Callable[[], None]]) -> None:
        self.pd, self.name, self.owner, self.wait, self.pid, self.on_loss = pd, name, owner, wait, pid, on_loss
        self.ttl: int = Period(1, 86_400_000).read(str(ttl))
        self.token = 0
        self.lost = False
        self._over = threading.Event()

    def __enter__(self) -> HeldLock:
        self.token = self.pd.lock(self.name, owner=self.owner, ttl=self.ttl, wait=self.wait, pid=self.pid)["token"]
        self._thread = threading.Thread(target=self._renew, name=f"renew {self.name}", daemon=True)
        self._thread.start()
        return self

    def _renew(self) -> None:
        good_until = time.monotonic() + self.ttl / 1000
        while not self._over.wait(max(0.01, self.ttl / 3000)):
            began = time.monotonic()
            try:
                self.pd.extend_lock(self.name, token=self.token, ttl=self.ttl)
                good_until = began + self.ttl / 1000
            except LockLost:
                good_until = 0
            except PortDaddyError:
                pass  # the daemon may be starting again; the lease tells how long there is hope
            if time.monotonic() >= good_until:
                self.lost = True
                if self.on_loss:
                    self.on_loss()
                return

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self._over.set()
        self._thread.join()
        try:
            if not self.lost:
                self.pd.unlock(self.name, token=self.token)
        except LockLost:
            self.lost = True
        if self.lost and error is None:
            raise LockLost("LOCK_LOST", f"lock {self.name} was lost before its block ended: somebody else may have held "
                           "it meanwhile", token=self.token)


class Heartbeat:
    """Heartbeats from a thread, until stop() or the end of a with block; a daemon that is away is tried again."""

    def __init__(self, pd: PortDaddy, agent: str, interval: int) -> None:
        self.pd, self.agent, self.interval = pd, agent, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat {agent}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(PortDaddyError):
                self.pd.heartbeat(self.agent)
            if self._over.wait(self.interval / 1000):
                return

    def stop(self) -> None:
        self._over.set()
        self._thread.join(self.pd.timeout / 1000)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class Subscription:
    """An endless iterator over an event stream. It is connected when it is made, so nothing published after that is
    missed; a broken connection is made again, from the last id on, for up to 30 s at a time."""

    def __init__(self, pd: PortDaddy, path: str, after: Optional[int],
                 on_loss: Optional[Callable[[Reply], None]] = None) -> None:
        self.pd, self.path, self.last, self.on_loss = pd, path, after, on_loss
        self._link: Optional[Link] = None
        self._connect()

    def _connect(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                link = self.pd._link()
                headers = dict(self.pd._headers(), Accept="text/event-stream")
                if self.last is not None:
                    headers["Last-Event-ID"] = str(self.last)
                link.send("GET", self.path, headers, b"")
                status, replied = link.read_head(self.pd.timeout / 1000)
                if status != 200:
                    body = json.loads(link.read_body(int(replied.get("content-length", "0")), self.pd.timeout / 1000))
                    raise problem_from_reply(status, body)
                self._link = link
                event, _, data = self._event()
                if event == "connected" and self.last is None:
                    self.last = data["lastId"]  # resume from here even when no message has come yet
                return
            except PortDaddyError as problem:
                again = isinstance(problem, DaemonUnreachable) or problem.status == 503
                if self.last is None or not again or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _event(self) -> Tuple[str, Optional[int], Any]:
        """The next event of the connection: its name, its id and its data."""
        link = self._link
        if link is None:
            raise DaemonUnreachable("this subscription is closed")
        while True:
            while b"\n\n" not in link.buffer:
                link.read_more(time.monotonic() + 45)  # the daemon sends a comment every 15 s
            block, _, link.buffer = link.buffer.partition(b"\n\n")
            fields = dict(line.split(": ", 1) for line in block.decode("utf-8").split("\n") if not line.startswith(":"))
            if "data" in fields:
                number = int(fields["id"]) if "id" in fields else None
                return fields.get("event", "message"), number, json.loads(fields["data"])

    def __iter__(self) -> Subscription:
        return self

    def __next__(self) -> Reply:
        while True:
            if self._link is None:
                raise StopIteration
            try:
                event, number, data = self._event()
            except PortDaddyError:
                if self._link is None:  # closed by another thread
                    raise StopIteration from None
                self._link.close()
                self._connect()
                continue
            if number is not None:
                self.last = number
                return data  # type: ignore[no-any-return]
            if event == "reset":
                self.last = 0
            if event in ("gap", "reset") and self.on_loss:
                self.on_loss({"event": event, **data})

    def close(self) -> None:
        link, self._link = self._link, None
        if link:
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_RDWR)
            link.close()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def find_url(settings: Settings) -> str:
    """Where the daemon of these settings is: what was said, else what it wrote down, else the usual port."""
    found = read_daemon_file(settings.home)
    return settings.url or (str(found["url"]) if found else f"http://127.0.0.1:{settings.port}")


def start_daemon(settings: Settings, timeout: float = 15.0) -> str:
    """Start a daemon in the background unless one runs; its URL once it answers.

    Any number of commands may do this at once: each connects or tries to start, the lock of the state folder lets one
    daemon live, and the others end with ALREADY_RUNNING while their commands connect to it."""
    environ = {**os.environ, "PORT_DADDY_HOME": settings.home, "PORT_DADDY_RANGE": "{}-{}".format(*settings.range)}
    if settings.port != 9876:  # else the daemon may take another port when 9876 is another user's
        environ["PORT_DADDY_PORT"] = str(settings.port)
    open_home(settings.home)
    log_path = os.path.join(settings.home, "daemon.log")
    deadline, child = time.monotonic() + timeout, None
    while time.monotonic() < deadline:
        found = read_daemon_file(settings.home)
        if found and PortDaddy(str(found["url"]), pid=0, timeout=1_000).ping():
            return str(found["url"])
        if child is None or child.poll() == PROBLEMS["ALREADY_RUNNING"][1]:
            child = process_start([sys.executable, os.path.abspath(__file__), "serve"], environ, log_path)
        elif child.poll() is not None:
            said = read_text(log_path).strip().splitlines()[-1:]
            raise DaemonUnreachable(f"the daemon did not start: {said[0] if said else 'it said nothing'} ({log_path})")
        time.sleep(0.02)
    raise DaemonUnreachable(f"the daemon did not answer within {timeout:g} s; see {log_path}")


# ======================================================================================================================
# 14. DESCRIPTIONS — what is derived from the table of operations
# ======================================================================================================================

def readme_table() -> str:
    """The operations as a Markdown table: request, fields, what it does, command."""
    lines = ["| request | fields | what it does | command |", "|---|---|---|---|"]
    for one in OPERATIONS:
        path = one.routes[0][1]
        fields = " ".join(f"`{field.wire}`{'' if field.required else '?'}" for field in one.fields.values()
                          if f"{{{field.wire}" not in path)
        routes = ", ".join(f"`{' '.join(route)}`" for route in one.routes)
        lines.append(f"| {routes} | {fields} | {one.summary} | {f'`{one.command}`' if one.command else ''} |")
    return "\n".join(lines) + "\n"


# ======================================================================================================================
# 16. COMMAND LINE — the same operations from a terminal
# ======================================================================================================================

# 1. Data goes to stdout, talk to stderr. --json gives the reply as it came, -q the one value that a script wants.
# 2. A command that needs the daemon starts it. Short commands do not say their pid: what they take outlives them.
# 3. Commands that wrap another (with-lock) give its status, and hold what they hold as long as they live.

Run = Callable[["argparse.Namespace"], int]


class Command(NamedTuple):
    """A sub-command: its words, what it does, an example, its arguments, and the function that runs it."""

    words: str
    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Run


LOCAL_COMMANDS: Dict[str, Command] = {}
EXAMPLES = {
    "claim": "PORT=$(pd claim myapp:api:main -q)", "release": "pd release 'myapp:*'", "find": "pd find 'myapp:*'",
    "endpoint set": "pd endpoint set myapp:api:main staging https://api.example.com",
    "endpoint rm": "pd endpoint rm myapp:api:main staging", "wait": "pd wait myapp:db:main myapp:api:main --timeout 30s",
    "ports": "pd ports --unmanaged-only", "cleanup": "pd cleanup", "pub": "pd pub tasks '{\"action\": \"build\"}'",
    "poll": "pd poll tasks --timeout 30s", "channels": "pd channels", "clear": "pd clear tasks",
    "lock": "TOKEN=$(pd lock db-migration --owner me --ttl 2m -q)", "unlock": "pd unlock db-migration --token $TOKEN",
    "extend": "pd extend db-migration --token $TOKEN --ttl 2m", "check": "pd check db-migration", "locks": "pd locks",
    "agent register": "pd agent register builder-1 --ttl 10m", "agent heartbeat": "pd agent heartbeat builder-1",
    "agent unregister": "pd agent unregister builder-1", "agent show": "pd agent show builder-1",
    "agents": "pd agents --active", "activity": "pd activity --type 'lock.*'",
    "webhook add": "pd webhook add http://localhost:8080/hook --events service.claim,lock.* --secret auto",
    "webhook list": "pd webhook list", "webhook rm": "pd webhook rm hook_1f2e3d", "webhook test": "pd webhook test "
    "hook_1f2e3d", "webhook deliveries": "pd webhook deliveries hook_1f2e3d",
}


def command(words: str, example: str = "", arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
            ) -> Callable[[Run], Run]:
    """Declare a command that is more than one operation."""
    def declare(run: Run) -> Run:
        LOCAL_COMMANDS[words] = Command(words, (run.__doc__ or "").split("\n")[0], example or f"pd {words}",
                                        arguments, run)
        return run
    return declare


def commands() -> Dict[str, Command]:
    """All of them by name, aliases included."""
    found = dict(LOCAL_COMMANDS)
    for one in OPERATIONS:
        for words in filter(None, (one.command, *one.aliases)):
            found[words] = Command(words, one.summary, EXAMPLES.get(one.command, f"pd {words}"),
                                   lambda parser, one=one: operation_arguments(parser, one),  # type: ignore[misc]
                                   lambda options, one=one: run_operation(one, options))  # type: ignore[misc]
    for alias, words in (("start", "daemon start"), ("stop", "daemon stop"), ("status", "daemon status")):
        found[alias] = found[words]
    return found


def say(text: str) -> None:
    """Talk, to stderr."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr, flush=True)


def out(text: str) -> None:
    """Data, to stdout."""
    print(printable(text), flush=True)


# --- arguments --------------------------------------------------------------------------------------------------------

def operation_arguments(parser: argparse.ArgumentParser, one: Operation) -> None:
    """Required fields are positional, the others flags; the kinds check on this side what they would on the other."""
    for field in one.fields.values():
        flag = "--" + field.name.replace("_", "-")
        if field.required or field.name in one.positional:
            several = isinstance(field.kind, Several)
            parser.add_argument(field.name, help=field.kind.expected,
                                nargs="+" if several else None if field.required else "?")
        elif isinstance(field.kind, Flag):
            parser.add_argument(flag, action="store_true", default=None, help="")
        else:
            default = f" (default {span(field.default)})" if isinstance(field.kind, Period) and field.default else ""
            parser.add_argument(flag, metavar=field.name.upper(), help=field.kind.expected + default)


def field_value(field: Field, text: Any) -> Any:
    """A field from the command line, where a duration names its unit and a payload need not be JSON."""
    if isinstance(text, bool):
        return text
    if isinstance(text, list):
        text = ",".join(text)
    if field.wire == "payload":
        text = sys.stdin.read() if text == "-" else text
        with contextlib.suppress(PortDaddyError):
            return read_json(text)
        return text
    if isinstance(field.kind, Period) and text.isdigit():
        raise PortDaddyError("BAD_VALUE", f"{field.wire} {text}: write {text}s for seconds or {text}ms for milliseconds",
                             field=field.wire)
    return field.check(text, read=True)


def new_client(options: Optional[argparse.Namespace] = None, pid: int = 0) -> PortDaddy:
    client = PortDaddy(pid=pid, autostart=True)
    home = getattr(options, "home", None)
    if home:
        client.settings = Settings.load(home=home)
    return client


def run_operation(one: Operation, options: argparse.Namespace) -> int:
    """Ask for an operation and show its reply."""
    fields = {field.wire: field_value(field, getattr(options, field.name)) for field in one.fields.values()
              if getattr(options, field.name, None) is not None}
    method, path = one.routes[0]
    for wire in re.findall(r"\{(\w+)", path):
        path = re.sub(rf"\{{{wire}(\.\.\.)?\}}", lambda _, wire=wire: quote(fields.pop(wire)), path)  # type: ignore[misc]
    waits = max([field.default if value is None else field.check(value, read=False)
                 for field, value in ((field, fields.get(field.wire)) for field in one.fields.values())
                 if field.name in ("timeout", "wait")] or [0])
    if waits and sys.stderr.isatty():
        say(f"waiting for up to {span(waits)} …")
    client = new_client(options)
    reply = client.call(method, path, fields, waits)
    warn_of_versions(client.server)
    show(reply, options, one.shows, one.quiet)
    return PROBLEMS["TIMED_OUT"][1] if one.command == "poll" and reply["message"] is None else 0


def warn_of_versions(server: str) -> None:
    """When this copy of the file and the daemon's do not speak the same protocol, say which is older and what to do."""
    found = re.match(r"port-daddy/(\S+) protocol/([0-9]+)", server)
    if found and int(found.group(2)) != PROTOCOL:
        older = "this copy" if int(found.group(2)) > PROTOCOL else "the daemon"
        say(f"pd: the daemon is version {found.group(1)}, this file {__version__}; {older} is older: update it"
            f"{', then run: pd daemon restart' if older == 'the daemon' else ''}")


# --- what people see --------------------------------------------------------------------------------------------------

def show(reply: Reply, options: argparse.Namespace, shows: str, quiet: str) -> None:
    """A reply as JSON, as the one value that was asked for, as a table, or as its sentence."""
    name, _, columns = shows.partition(": ")
    if options.json:
        out(json.dumps(reply, indent=2, ensure_ascii=False))
    elif options.quiet and name:
        for row in reply[name]:
            out(plain(dig(row, quiet)))
    elif options.quiet:
        out(plain(dig(reply, quiet) if quiet else reply))
    elif name:
        show_table(reply[name], columns.split(), name)
    elif isinstance(reply.get("message"), str):
        out(reply["message"])
    elif "message" in reply:
        out(json.dumps(reply["message"], ensure_ascii=False) if reply["message"] else "no message came in time")
    else:
        facts = reply.get("agent", reply)
        width = max(len(key) for key in facts)
        for key, value in facts.items():
            if key not in ("success", "service", "webhook", "urls", "holders"):
                out(f"{key.ljust(width)}  {cell(key, value)}")
    if reply.get("warning"):
        say(f"pd: {reply['warning']}")


def dig(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def plain(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def cell(name: str, value: Any) -> str:
    """A value as people read it: instants relative to now, lists with commas, nothing as a dash."""
    if value is None or value == [] or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and (name.endswith("At") or name in ("timestamp", "lastSeen", "lastHeartbeat",
                                                                   "lastMessage", "lastTriggered")):
        distance = value - time.time() * 1000
        return f"in {span(distance)}" if distance > 0 else f"{span(-distance)} ago"
    if isinstance(value, int) and name in ("ttl", "uptime", "timeSinceHeartbeat"):
        return span(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return plain(value).replace("\n", "\\n")


def show_table(rows: Sequence[Reply], columns: Sequence[str], name: str) -> None:
    """A table that fits the terminal; in a pipe, nothing is cut."""
    if not rows:
        say(f"no {name}")
        return
    table = [[re.sub(r"(?<!^)([A-Z])", r" \1", column.rpartition(".")[2]).upper() for column in columns]]
    table += [[printable(cell(column, dig(row, column))) for column in columns] for row in rows]
    widths = [max(len(line[position]) for line in table) for position in range(len(columns))]
    room = os.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in table:
        text = "  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip()
        text = text[:room - 1] + "…" if 0 < room < len(text) else text
        out(text)


# --- commands that are more than one operation ------------------------------------------------------------------------

def server_arguments(parser: argparse.ArgumentParser) -> None:
    for name, variable, default, _, sentence in SETTINGS:
        if name in ("port", "host"):
            parser.add_argument(f"--{name}", help=f"{sentence} ({variable}, default {default or 'loopback'})")


@command("serve", "pd serve --port 0", server_arguments)
def serve(options: argparse.Namespace) -> int:
    """Run the daemon in the foreground."""
    import signal
    settings = Settings.load(port=options.port, host=options.host, home=options.home)
    stop, reasons = threading.Event(), []

    def on_signal(number: int, frame: Optional[FrameType]) -> None:
        reasons.append(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    server = Server(settings)
    try:
        server.start()
    except PortDaddyError as problem:
        chosen = options.port or os.environ.get("PORT_DADDY_PORT")
        if problem.code != "PORT_TAKEN" or chosen or not PortDaddy(f"http://127.0.0.1:{settings.port}").ping():
            raise
        say(f"pd: port {settings.port} belongs to another Port Daddy; this one takes a free port")
        server = Server(settings._replace(port=0))
        server.start()
    with contextlib.suppress(OSError):
        print(f"port-daddy {__version__} listening on {server.url}", flush=True)
    stop.wait()
    server.stop(signal.Signals(reasons[0]).name)
    return 130 if reasons[0] == signal.SIGINT else 0


@command("daemon start", "pd start", server_arguments)
def daemon_start(options: argparse.Namespace) -> int:
    """Start the daemon in the background, unless it runs."""
    settings = Settings.load(port=options.port, host=options.host, home=options.home)
    running = daemon_facts(settings)
    if running is None:
        start_daemon(settings)
    facts = running or daemon_facts(settings) or {}
    words = "runs already" if running else "started"
    show({**facts, "message": f"port-daddy {facts.get('version')} {words}: {facts.get('url')} (pid {facts.get('pid')})"},
         options, "", "url")
    return 0


def daemon_facts(settings: Settings) -> Optional[Reply]:
    """What the running daemon says of itself; None when none answers."""
    client = PortDaddy(find_url(settings), pid=0)
    try:
        return {**client.version(), "url": client.url}
    except DaemonUnreachable:
        return None


@command("daemon stop", "pd stop")
def daemon_stop(options: argparse.Namespace) -> int:
    """Stop the daemon; whoever waits is told, and what was granted stays granted."""
    import signal
    facts = daemon_facts(Settings.load(home=options.home))
    if facts is None:
        say("pd: no daemon runs")
        return 0
    pid, birth = int(facts["pid"]), process_birth(int(facts["pid"]))
    process_signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while process_lives(pid, birth):
        if time.monotonic() > deadline:
            raise PortDaddyError("TIMED_OUT", f"the daemon (pid {pid}) has not ended within 10 s; end it with kill -9")
        time.sleep(0.02)
    show({"stopped": True, "pid": pid, "message": f"stopped the daemon (pid {pid})"}, options, "", "pid")
    return 0


@command("daemon restart", "pd daemon restart", server_arguments)
def daemon_restart(options: argparse.Namespace) -> int:
    """Stop the daemon and start the one in this file."""
    daemon_stop(options)
    return daemon_start(options)


@command("daemon status", "pd status")
def daemon_status(options: argparse.Namespace) -> int:
    """Whether the daemon runs, where, and what it holds."""
    settings = Settings.load(home=options.home)
    facts = daemon_facts(settings)
    if facts is None:
        raise DaemonUnreachable("no daemon runs; any command starts it, or run: python3 port_daddy.py start")
    held = PortDaddy(str(facts["url"]), pid=0).metrics()
    counts = ", ".join(f"{held[name]} {name}" for name in ("services", "locks", "agents", "channels", "webhooks"))
    show({**facts, "metrics": held, "message": (
        f"port-daddy {facts['version']} at {facts['url']} (pid {facts['pid']}), up {span(facts['uptime'])}\n"
        f"holds {counts}; {held['waiters']} wait\nstate in {settings.home}")}, options, "", "url")
    return 0


@command("version", "pd version")
def show_version(options: argparse.Namespace) -> int:
    """The version and the hash of this file."""
    digest = file_hash(os.path.abspath(__file__))
    show({"version": __version__, "protocol": PROTOCOL, "sha256": digest, "python": sys.version.split()[0],
          "message": f"port-daddy {__version__} (protocol {PROTOCOL}, sha256 {digest[:12]}…)"}, options, "", "version")
    return 0


def url_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the identity of a service")
    parser.add_argument("--env", default="local", help="which of its endpoints (default local)")


@command("url", "curl $(pd url myapp:api:main)/health", url_arguments)
def show_url(options: argparse.Namespace) -> int:
    """The URL of a service in an environment."""
    service = new_client(options).get_service(options.id)
    if options.env not in service["endpoints"]:
        raise PortDaddyError("NOT_FOUND", f"{options.id} has no endpoint {options.env}; it has "
                             f"{', '.join(service['endpoints']) or 'none'}. Set it with: pd endpoint set")
    show({"url": service["endpoints"][options.env], "message": service["endpoints"][options.env]}, options, "", "url")
    return 0


def env_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="which services (default all)")
    parser.add_argument("--format", choices=("export", "dotenv", "json"), default="export", help="default: export")


@command("env", 'eval "$(pd env \'myapp:*\')"', env_arguments)
def show_env(options: argparse.Namespace) -> int:
    """Ports and URLs of services as environment variables."""
    values: Dict[str, str] = {}
    for service in new_client(options).list_services(options.pattern)["services"]:
        name = re.sub(r"[^A-Z0-9]+", "_", service["id"].upper())
        name = f"_{name}" if name[0].isdigit() else name
        values[f"{name}_PORT"] = str(service["port"])
        if "local" in service["endpoints"]:
            values[f"{name}_URL"] = service["endpoints"]["local"]
    if options.json or options.format == "json":
        out(json.dumps(values, indent=2))
    for name, value in values.items() if not options.json and options.format != "json" else ():
        quoted = value if re.fullmatch(r"[A-Za-z0-9_:/.\[\]-]*", value) else "'" + value.replace("'", "'\\''") + "'"
        out(f"{'export ' if options.format == 'export' else ''}{name}={quoted}")
    return 0


def sub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("channel", help="a channel, or a pattern such as build:*")
    parser.add_argument("--after", type=int, help="begin after this message id (default: now)")


@command("sub", "pd sub 'build:*'", sub_arguments)
def follow_channel(options: argparse.Namespace) -> int:
    """Follow a channel: one JSON message a line, until interrupted."""
    client = new_client(options)

    def on_loss(what: Reply) -> None:
        say(f"pd: {what['event']}: messages between {what.get('from')} and {what.get('to')} are gone")

    with client.subscribe(options.channel, after=options.after, on_loss=on_loss) as messages:
        if sys.stderr.isatty():
            say(f"following {options.channel}; Ctrl-C ends")
        for message in messages:
            out(plain(message["payload"]) if options.quiet else to_json(message))
    return 0


def with_lock_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="the lock")
    parser.add_argument("--owner", help="who holds it (default: this process)")
    parser.add_argument("--ttl", default="60s", help="length of the lease, renewed meanwhile (default 60s)")
    parser.add_argument("--wait", default="60s", help="how long to wait for it (default 60s)")


@command("with-lock", "pd with-lock db-migration --wait 5m -- npm run migrate", with_lock_arguments)
def with_lock(options: argparse.Namespace) -> int:
    """Run a command while holding a lock, and give its status."""
    words = need_words(options)
    fields = next(one for one in OPERATIONS if one.name == "lock").fields
    ttl, wait = (field_value(fields[name], getattr(options, name)) for name in ("ttl", "wait"))
    client = new_client(options, pid=os.getpid())
    runner = Runner()

    def on_loss() -> None:
        say(f"pd: lock {options.name} was lost; stopping the command")
        runner.stop()

    held = client.with_lock(options.name, owner=options.owner, ttl=ttl, wait=0, pid=os.getpid(), on_loss=on_loss)
    try:
        held.__enter__()
    except PortDaddyError as problem:
        if problem.code != "LOCK_HELD" or not wait:
            raise
        say(f"pd: waiting up to {span(wait)} for {options.name}, held by {problem.facts.get('holder')}")
        held.wait = wait
        held.__enter__()
    with contextlib.ExitStack() as stack:
        stack.push(held.__exit__)
        return runner.run(words, {"PORT_DADDY_LOCK": options.name, "PORT_DADDY_TOKEN_OF_LOCK": str(held.token)})


def need_words(options: argparse.Namespace) -> List[str]:
    if not options.words:
        raise PortDaddyError("BAD_VALUE", "say what to run after --, as in: pd with-lock db-migration -- make migrate")
    return list(options.words)


class Runner:
    """A command in the foreground: our signals are its signals, its status is ours."""

    def __init__(self) -> None:
        self.child: Optional[subprocess.Popen[bytes]] = None

    def run(self, words: Sequence[str], environ: Mapping[str, str]) -> int:
        import signal
        before = {number: signal.signal(number, self.pass_on) for number in (signal.SIGTERM, signal.SIGHUP)}
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)  # the terminal tells the child itself
        try:
            self.child = process_run(words, {**os.environ, **environ})
            status = self.child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return 128 - status if status < 0 else status

    def pass_on(self, number: int, frame: Optional[FrameType]) -> None:
        if self.child:
            process_signal(self.child.pid, number)

    def stop(self) -> None:
        import signal
        self.pass_on(signal.SIGTERM, None)


# --- the top ----------------------------------------------------------------------------------------------------------

def overview(known: Mapping[str, Command]) -> str:
    """All commands, a line each."""
    width = max(map(len, known))
    lines = [f"  {words.ljust(width)}  {one.summary}" for words, one in sorted(known.items())]
    return (f"Port Daddy {__version__}: ports, locks, channels and agents for everything on this machine.\n\n"
            f"usage: pd COMMAND [--json | -q] …      pd COMMAND --help shows its arguments and an example\n\n"
            + "\n".join(lines))


def parse(argv: Sequence[str], known: Mapping[str, Command]) -> Tuple[Command, argparse.Namespace]:
    """The command that the words name, and its arguments; whatever follows -- is left alone in `words`."""
    import argparse
    cut = argv.index("--") if "--" in argv else len(argv)
    words, rest = list(argv[:cut]), list(argv[cut + 1:])
    count = 2 if " ".join(words[:2]) in known else 1
    name = " ".join(words[:count])
    if name not in known:
        import difflib
        family = [one for one in known if one.startswith(f"{name} ")]
        near = family or difflib.get_close_matches(name, known, 3)
        raise PortDaddyError("BAD_VALUE", f"there is no command {name!r}; "
                             f"{'did you mean ' + ', '.join(near) + '?' if near else 'pd help lists them'}")
    chosen = known[name]
    parser = argparse.ArgumentParser(prog=f"pd {name}", description=chosen.summary, allow_abbrev=False,
                                     epilog=f"example: {chosen.example}")
    chosen.arguments(parser)
    parser.add_argument("--json", action="store_true", help="the reply as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the value that a script wants")
    parser.add_argument("--home", metavar="DIR", help="the state folder (PORT_DADDY_HOME)")
    wraps = name == "with-lock"
    options = parser.parse_args(words[count:] + (["--", *rest] if rest and not wraps else []))
    options.words = rest if wraps else []
    return chosen, options


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line. -> 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 timed out, 6 no daemon, 130 Ctrl-C"""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if os.name != "posix":
            raise PortDaddyError("NOT_IMPLEMENTED", "Port Daddy needs Linux or macOS; on Windows, run it in WSL")
        known = commands()
        if not argv or argv[0] in ("help", "-h", "--help"):
            out(overview(known))
            return 0
        chosen, options = parse(["version"] if list(argv) == ["--version"] else argv, known)
        return chosen.run(options)
    except PortDaddyError as problem:
        if "--json" in argv:
            print(json.dumps(problem.body, indent=2, ensure_ascii=False))
        say(f"pd: {problem}")
        return problem.exit_status
    except SystemExit as end:  # argparse has said what it had to say
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has enough, like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        say(f"pd: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
