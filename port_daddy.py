#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
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
    13. PROJECTS        .portdaddyrc to ordered, health-checked, supervised processes
    14. DESCRIPTIONS    what is derived from the table of operations
    15. TOOLS           looking at a folder, and what else helps from outside
    16. COMMAND LINE    the same operations from a terminal
    17. DASHBOARD       what a browser shows of all this

It promises: what was answered survives kill -9; two identities never share a port; a lock has one holder, a growing
fencing token and a fair queue; a message is worked on once or, when it is leased, until somebody has acknowledged it; a
web page can ask for nothing.

It does not replicate, does not leave the machine, does not defend against programs of the same user, and does not run
anything that a request says.
"""
from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import json
import os
import re
import select
import socket
import stat
import struct
import sys
import threading
import time
import zlib
from typing import (
    TYPE_CHECKING, Annotated, Any, Callable, Deque, Generator, Iterable, Iterator, Mapping, Match, NamedTuple, NoReturn,
    Optional, Sequence, TypeVar, Union,
)

if TYPE_CHECKING:
    import argparse
    import queue
    import subprocess
    from types import FrameType

__all__ = ["PortDaddy", "PortDaddyError", "ConnectionError", "DaemonUnreachable", "LockLost", "verify_webhook", "main"]
__version__ = "1.0.0"
PROGRAM = os.path.basename(sys.argv[0])  # as people started it, for the sentences that tell them what to do
PROGRAM = PROGRAM if PROGRAM in ("pd", "port-daddy") else "python3 port_daddy.py"
PROTOCOL = 1  # grows when an older copy of this file could misread a newer daemon
T = TypeVar("T")
Reply = dict[str, Any]
Facts = Mapping[str, Any]
Span = Union[int, str]  # a duration: milliseconds, or text such as "30s"

# ======================================================================================================================
# 2. PROBLEMS — every way to fail, and its number on the wire and in the shell
# ======================================================================================================================

# 1. Nothing else leaves an operation: PortDaddyError is raised by the daemon, sent as JSON, raised again by the client
#    and turned into one line and an exit status by the command line.
# 2. A message says what was wrong, the limit, who is in the way and what to do next. Facts go beside it, by name.

PROBLEMS: dict[str, tuple[int, int, str]] = {  # code: (HTTP status, exit status, what is said when nobody says more)
    "BAD_REQUEST": (400, 2, "the request is not well-formed HTTP"),
    "BAD_JSON": (400, 2, "the body is not a JSON object"),
    "BAD_VALUE": (400, 2, "a value is not what was expected"),
    "UNKNOWN_FIELD": (400, 2, "there is no such field"),
    "TARGET_REFUSED": (400, 2, "that address is never called"),
    "UNAUTHORIZED": (401, 1, "this daemon wants its token: set PORT_DADDY_TOKEN, or send Authorization: Bearer <token>"),
    "PEER_NOT_ALLOWED": (403, 1, "this daemon serves another user of this machine; start one of your own"),
    "HOST_NOT_ALLOWED": (403, 1, "the Host header names another machine; use localhost, or set PORT_DADDY_ALLOWED_HOSTS"),
    "ORIGIN_NOT_ALLOWED": (403, 1, "web pages of that origin may not use this daemon (PORT_DADDY_ALLOWED_ORIGINS)"),
    "CROSS_SITE": (403, 1, "web pages of other sites may not use this daemon (PORT_DADDY_ALLOWED_ORIGINS)"),
    "NOT_OWNER": (403, 4, "somebody else holds it"),
    "NOT_FOUND": (404, 3, "there is nothing of that name"),
    "METHOD_NOT_ALLOWED": (405, 2, "this path does not know that method"),
    "TIMED_OUT": (408, 5, "the time to wait is over"),
    "LOCK_HELD": (409, 4, "somebody else holds the lock"),
    "LOCK_LOST": (409, 4, "the lock has moved on; stop, and take it again"),
    "ALREADY_RUNNING": (409, 4, "a daemon already serves this state folder"),
    "EXISTS": (409, 4, "that is there already"),
    "CANNOT_LISTEN": (503, 1, "the port of the daemon cannot be bound"),
    "LIMIT_MISMATCH": (409, 4, "the lock is held with another limit"),
    "STALE_RECEIPT": (409, 4, "the lease of this message has moved on"),
    "PORT_TAKEN": (409, 4, "somebody else has that port"),
    "PORT_HIJACKED": (409, 4, "a stranger listens on the port of this service"),
    "NO_PORTS": (409, 4, "no port of the range is free"),
    "TOO_LARGE": (413, 2, "the request is larger than the limit"),
    "URI_TOO_LONG": (414, 2, "the request line is longer than 8 KiB"),
    "UNSUPPORTED_MEDIA": (415, 2, "send JSON with Content-Type: application/json"),
    "KEY_REUSED": (422, 2, "this Idempotency-Key came with other fields before; a new request wants a new key"),
    "LIMIT": (429, 4, "the limit of this agent is reached"),
    "HEADERS_TOO_LARGE": (431, 2, "a header is larger than 8 KiB, all are larger than 32 KiB, or more than 100"),
    "INTERNAL": (500, 1, "the daemon failed"),
    "NOT_IMPLEMENTED": (501, 1, "the daemon does not do that"),
    "BUSY": (503, 1, "too many are waiting; try again in a second"),
    "SHUTTING_DOWN": (503, 1, "the daemon is stopping; try again in a second"),
    "CORRUPT": (500, 1, "the database is damaged"),
    "CHANNEL_FULL": (507, 1, "the channel is full of messages that its workers have not done with"),
    "STORAGE_FULL": (507, 1, "the disk is full or failing; nothing was changed"),
    "UNREACHABLE": (0, 6, "no daemon answers"),
}


class PortDaddyError(Exception):
    """One of PROBLEMS, on both sides of the wire: .code, .status (HTTP), .exit_status, .body (the JSON object)."""

    def __init__(self, code: str, message: str = "", /, **facts: Any) -> None:
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

    def __init__(self, message: str = "", **facts: Any) -> None:
        PortDaddyError.__init__(self, "UNREACHABLE", message, **facts)


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
KEEP_LINES = 1_000  # of what a service printed
MAX_INTEGER = 2 ** 53 - 1  # what JavaScript can count exactly
NAME = r"(?!\.{1,2}\Z)[A-Za-z0-9._:-]{1,100}"
SPAN_TEXT = r"(?:[0-9]{1,12}(?:\.[0-9]{1,6})?(?:ms|s|m|h|d))+"
STATUSES = ("assigned", "starting", "running", "unhealthy", "stopped", "crashed", "dead", "detached", "hijacked")
EVENT_KINDS = (
    "service.claim", "service.release", "service.healthy", "service.unhealthy", "agent.register", "agent.unregister",
    "agent.stale", "lock.acquire", "lock.release", "lock.expire", "message.publish", "message.dead", "daemon.start",
    "daemon.stop", "webhook.disabled")

to_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def plain(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else to_json(value)


def maybe_json(value: Any) -> Optional[str]:
    return None if value is None else to_json(value)


def printable(text: str) -> str:
    """Text that can do nothing to a terminal: C0, C1, bidirectional and invisible controls become \\u escapes, as JSON has
    them."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
                  "\U000e0000-\U000e007f]",
                  lambda found: re.sub("(....)", r"\\u\1", found.group().encode("utf-16-be").hex()), text)


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


def nearest(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """What somebody may have meant."""
    import difflib
    return difflib.get_close_matches(word, list(known), most)


def expect(holds: object) -> None:
    """What a kind asks of a value; whoever gave it is told what would have been taken."""
    if not holds:
        raise ValueError


def ecma(pattern: str) -> str:
    """A whole-text pattern of ours as JSON Schema wants it (ECMA 262 with the u flag), where there is no \\Z, no inline
    flag, no DOTALL, and no escape that is not needed."""
    def each(found: re.Match[str]) -> str:
        text = found.group()
        if text.startswith("(?i:"):
            return "(?:" + re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", text[4:])
        return {r"\Z": "$", ".": r"[\s\S]"}.get(text) or text.replace('\\"', '"')

    body = re.sub(r"\(\?i:[^()]*\)|\[(?:\\.|[^\]\\])*\]|\\.|\.", each, pattern)
    return f"^(?:{body})$"


class Kind:
    """A kind of value: `expected` says in words what `parse` (from JSON) and `read` (from text) accept."""

    nullable = False  # JSON null is a value, and not the same as leaving the field out
    hidden = False  # it is never shown again, not even to say that it was refused

    def __init__(self, expected: str) -> None:
        self.expected = expected

    def parse(self, value: Any) -> Any:
        raise NotImplementedError

    def read(self, text: str) -> Any:
        return self.parse(text)

    def schema(self) -> dict[str, Any]:
        """Its JSON Schema (2020-12), which may take more than `parse` and never less."""
        return {}


class Text(Kind):
    """Text that matches a pattern, and for which `also` holds."""

    def __init__(self, expected: str, pattern: str, also: Callable[[str], object] = lambda text: True,
                 hidden: bool = False) -> None:
        super().__init__(expected)
        self.pattern, self.also, self.hidden = pattern, also, hidden

    @functools.cached_property
    def match(self) -> Callable[[str], object]:
        """Compiled when it is needed: a short command needs one of thirty."""
        return re.compile(self.pattern, re.DOTALL).fullmatch

    def parse(self, value: Any) -> Any:
        expect(isinstance(value, str) and self.match(value) and self.also(value))
        return value

    def schema(self) -> dict[str, Any]:
        words = re.fullmatch(r"[a-z|]+", self.pattern)
        return {"type": "string", **({"enum": self.pattern.split("|")} if words else {"pattern": ecma(self.pattern)})}


class Integer(Kind):
    def __init__(self, expected: str, low: int, high: int) -> None:
        super().__init__(f"{expected} from {low} to {high}")
        self.low, self.high = low, high

    def parse(self, value: Any) -> Any:
        expect(type(value) is int and self.low <= value <= self.high)  # a bool is an int, and no number
        return value

    def read(self, text: str) -> Any:
        expect(re.fullmatch(r"-?[0-9]{1,18}", text))
        return self.parse(int(text))

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


class Period(Integer):
    """A duration: milliseconds as an integer, or text with units such as "30s" and "2h30m"."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__("milliseconds", low, high)
        self.expected = f'a duration from {span(low)} to {span(high)}: milliseconds, or text such as "30s" or "2h30m"'

    def parse(self, value: Any) -> Any:
        if isinstance(value, str):
            expect(re.fullmatch(SPAN_TEXT, value))
            value = round(sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([0-9.]+)([a-z]+)", value)))
        return super().parse(value)

    def read(self, text: str) -> Any:
        return super().read(text) if text.isdigit() else self.parse(text)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [super().schema(), {"type": "string", "pattern": ecma(SPAN_TEXT)}]}


class Flag(Kind):
    def parse(self, value: Any) -> Any:
        expect(isinstance(value, bool))
        return value

    def read(self, text: str) -> bool:
        expect(text in ("true", "1", "false", "0"))
        return text in ("true", "1")

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


class Json(Kind):
    """Any JSON value of limited size; too large is TOO_LARGE and not a bad value."""

    def __init__(self, expected: str, limit: int, only: Union[type[Any], tuple[type[Any], ...]] = object) -> None:
        super().__init__(expected)
        self.limit, self.only = limit, only
        self.nullable = only is object

    def parse(self, value: Any) -> Any:
        expect(isinstance(value, self.only))
        size = len(to_json(value).encode())
        if size > self.limit:
            raise PortDaddyError("TOO_LARGE", f"{size} bytes of JSON are more than the limit of {self.limit}",
                                 limit=self.limit)
        return value

    def read(self, text: str) -> Any:
        return self.parse(read_json(text))

    def schema(self) -> dict[str, Any]:
        return {"type": "object"} if self.only is dict else {}


class Several(Kind):
    """A list of a kind; in a query or a command line, separated by commas."""

    def __init__(self, kind: Kind, most: int) -> None:
        super().__init__(f"a list of 1 to {most}, each {kind.expected}")
        self.kind, self.most = kind, most

    def parse(self, value: Any) -> list[Any]:
        expect(isinstance(value, list) and 1 <= len(value) <= self.most)
        return [self.kind.parse(item) for item in value]

    def read(self, text: str) -> list[Any]:
        return self.parse([self.kind.read(item) for item in text.split(",")])

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.kind.schema(), "minItems": 1, "maxItems": self.most}


class Ports(Kind):
    """A range of ports, [low, high] or "low-high"."""

    def parse(self, value: Any) -> tuple[int, int]:
        if isinstance(value, str):
            return self.read(value)
        expect(isinstance(value, list) and len(value) == 2)
        low, high = (PORT.parse(port) for port in value)
        expect(low <= high)
        return low, high

    def read(self, text: str) -> tuple[int, int]:
        return self.parse([PORT.read(part) for part in text.split("-")])

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": PORT.schema(), "minItems": 2, "maxItems": 2}


class Lines(Kind):
    """What a service printed: objects with `text`, and perhaps `stream` and `at`."""

    def parse(self, value: Any) -> list[tuple[str, str, Optional[int]]]:
        expect(isinstance(value, list) and 1 <= len(value) <= KEEP_LINES)
        found = []
        for line in value:
            expect(isinstance(line, dict) and isinstance(line.get("text"), str) and len(line["text"]) <= 64 * 1024)
            expect(line.get("stream", "stdout") in ("stdout", "stderr") and not set(line) - {"text", "stream", "at"})
            at = None if line.get("at") is None else INSTANT.parse(line["at"])
            found.append((line.get("stream", "stdout"), line["text"], at))
        return found

    def schema(self) -> dict[str, Any]:
        line = {"stream": {"enum": ["stdout", "stderr"]}, "text": {"type": "string", "maxLength": 64 * 1024},
                "at": {"anyOf": [INSTANT.schema(), {"type": "null"}]}}
        return {"type": "array", "minItems": 1, "maxItems": KEEP_LINES, "items": {
            "type": "object", "properties": line, "required": ["text"], "additionalProperties": False}}


def glob_of(kind: Text) -> Text:
    """A name of a kind, or a pattern over such names."""
    return Text(f"{kind.expected}; or a pattern of these with * for any run of characters",
                rf"(?:{kind.pattern})|(?=.*\*)(?:{PATTERN.pattern})")


def url_of(schemes: str) -> Text:
    """An absolute URL in visible ASCII, without user or password."""
    def port_fits(url: str) -> bool:
        port = re.match(r"[a-z]+://[^/?]*?:([0-9]+)(?:[/?]|\Z)", url, re.IGNORECASE)
        return not port or 1 <= int(port.group(1)) <= 65535

    return Text(f"a URL that begins with {schemes.replace('|', ':// or ')}:// and holds no user or password",
                rf"(?=.{{1,2048}}\Z)(?i:{schemes})://(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?"
                r"(?:[/?](?:[!-\"$-~])*)?", port_fits)


PORT = Integer("a port", 1, 65535)
INSTANT = Integer("milliseconds since the epoch", 0, MAX_INTEGER)
PLAIN_NAME = Text("a name of 1 to 100 of A-Z a-z 0-9 . _ : -", NAME)
SEGMENT = r"(?!\.{1,2}(?::|\Z))[A-Za-z0-9._-]{1,64}"
IDENTITY = Text("an identity project:stack:context, one to three segments, each 1 to 64 of A-Z a-z 0-9 . _ -",
                rf"(?!health\Z){SEGMENT}(?::{SEGMENT}){{0,2}}")
LOCK_NAME = Text("a lock name of 1 to 100 of A-Z a-z 0-9 . _ : / -, no segment of which is empty, . or ..",
                 r"(?=.{1,100}\Z)(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._:-]+(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._:-]+)*")
PATTERN = Text("a name or a pattern with *, of A-Z a-z 0-9 . _ : / * -, at most 200 characters",
               r"[A-Za-z0-9._:/*-]{1,200}")
EVENT = Text("an event such as lock.acquire, or a pattern such as lock.* or *", r"[a-z.*]{1,40}",
             lambda name: any(matches(name, kind) for kind in EVENT_KINDS))

Port = Annotated[int, PORT]
PortRange = Annotated[tuple[int, int], Ports('a range of ports such as [3100, 9999] or "3100-9999"')]
Identity = Annotated[str, IDENTITY]
ChannelName = Annotated[str, PLAIN_NAME]
GroupName = Annotated[str, PLAIN_NAME]
AgentId = Annotated[str, PLAIN_NAME]
EndpointName = Annotated[str, PLAIN_NAME]
LockName = Annotated[str, LOCK_NAME]
Pattern = Annotated[str, PATTERN]
ServicePattern = Annotated[str, glob_of(IDENTITY)]
ChannelPattern = Annotated[str, glob_of(PLAIN_NAME)]
LockPattern = Annotated[str, glob_of(LOCK_NAME)]
EventPattern = Annotated[str, EVENT]
EventList = Annotated[list[str], Several(EVENT, 20)]
IdentityList = Annotated[list[str], Several(IDENTITY, 100)]
Word = Annotated[str, Text("text of 1 to 100 characters", r".{1,100}")]
Line = Annotated[str, Text("text of at most 4096 characters", r".{0,4096}")]
Secret = Annotated[str, Text('a secret of 8 to 256 characters, whsec_ and base64 among them, or "auto" to have one made',
                             r"auto|(?!whsec_).{8,256}|whsec_(?:[A-Za-z0-9+/]{4})+(?:[A-Za-z0-9+/]{2}==|"
                             r"[A-Za-z0-9+/]{3}=)?", hidden=True)]
Status = Annotated[str, Text("one of " + ", ".join(STATUSES), "|".join(STATUSES))]
HookId = Annotated[str, Text("an id as the daemon gave it", r"[A-Za-z0-9_-]{1,64}")]
Receipt = Annotated[str, Text("a receipt as the poll gave it", r"[0-9]{1,16}-[0-9]{1,16}")]
RequestKey = Annotated[str, Text("a key of 1 to 255 visible ASCII characters", r"[!-~]{1,255}")]
Duration = Annotated[int, Period(1, 86_400_000)]
Delay = Annotated[int, Period(0, 86_400_000)]
Lifetime = Annotated[int, Period(1, 366 * 86_400_000)]
PollTime = Annotated[int, Period(0, 60_000)]
WaitTime = Annotated[int, Period(0, 300_000)]
LockWait = Annotated[int, Period(0, 3_600_000)]
Count = Annotated[int, Integer("a number", 1, 1000)]
Quota = Annotated[int, Integer("a number", 0, 100_000)]
Rows = Annotated[int, Integer("a number", 1, 100_000)]
Latency = Annotated[int, Integer("milliseconds", 0, 3_600_000)]
Cursor = Annotated[int, Integer("an id", 0, MAX_INTEGER)]
Instant = Annotated[int, INSTANT]
Tail = Annotated[int, Integer("a number", 0, 1000)]
LogLines = Annotated[list[tuple[str, str, Optional[int]]], Lines(
    'a list of 1 to 1000 lines such as {"stream": "stdout", "text": "…"}, each of at most 64 KiB')]
Fence = Annotated[int, Integer("a fencing token", 1, MAX_INTEGER)]
Pid = Annotated[int, Integer("a process id", 1, 2 ** 31 - 1)]
Bool = Annotated[bool, Flag("true or false")]
Metadata = Annotated[dict[str, Any], Json("a JSON object of at most 10 KB", MAX_METADATA, dict)]
Payload = Annotated[Any, Json("any JSON value of at most 256 KiB", MAX_PAYLOAD)]
HttpUrl = Annotated[str, url_of("http|https")]
EndpointUrl = Annotated[str, url_of("http|https|ws|wss")]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern with * (any run of characters, colons included) covers a name; as GLOB does in the store."""
    first, *rest = pattern.split("*")
    if not rest or not name.startswith(first):
        return name == pattern
    position = len(first)
    for piece in rest[:-1]:  # the leftmost place is as good as any: no backtracking, whatever the pattern
        position = name.find(piece, position) + len(piece)
        if position < len(piece):
            return False
    return name.endswith(rest[-1]) and len(name) - len(rest[-1]) >= position


def kind_of(hint: Any) -> Kind:
    """The kind inside an annotation: LockName, or Optional[LockName]."""
    for part in (hint, *getattr(hint, "__args__", ())):
        for extra in getattr(part, "__metadata__", ()):
            if isinstance(extra, Kind):
                return extra
    raise TypeError(f"no kind in {hint!r}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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
        for token in re.findall(r'(?s)"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[\[\]{}]', text):  # a string without an end is one, too
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
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

SETTINGS: tuple[tuple[str, str, Any, Kind, str], ...] = (  # name, environment, default, kind, what it is
    ("port", "PORT_DADDY_PORT", 9876, Integer("a port, or 0 for any free one,", 0, 65535), "where the daemon listens"),
    ("host", "PORT_DADDY_HOST", "", Text("localhost, or an address such as ::1", r"localhost|[0-9A-Fa-f:.]*"),
     "the address it listens on, beyond loopback only with a token"),
    ("token", "PORT_DADDY_TOKEN", "", Text("8 to 256 visible ASCII characters", r"(?:[!-~]{8,256})?", hidden=True),
     "what every request must then bring as Authorization: Bearer"),
    ("allowed_hosts", "PORT_DADDY_ALLOWED_HOSTS", "", Text(
        "host names without ports, separated by commas", r"(?:(?:^|,)(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]+\]))*"),
     "names by which it may be called, besides localhost"),
    ("allowed_origins", "PORT_DADDY_ALLOWED_ORIGINS", "", Text(
        "origins such as https://app.example, separated by commas", r"(?:(?:^|,)https?://[A-Za-z0-9._:\[\]-]{1,260})*"),
     "web pages that may use it"),
    ("webhook_private", "PORT_DADDY_WEBHOOK_PRIVATE", True, kind_of(Bool), "whether private networks may be called"),
    ("peer_check", "PORT_DADDY_PEER_CHECK", True, kind_of(Bool), "whether other users of this machine are refused (Linux)"),
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
    token: str
    allowed_hosts: str
    allowed_origins: str
    webhook_private: bool
    peer_check: bool
    home: str
    url: str
    agent: str
    range: tuple[int, int]
    max_connections: int
    max_waiters: int

    @classmethod
    def load(cls, environ: Optional[Mapping[str, str]] = None, **flags: Any) -> Settings:
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for name, variable, default, kind, _ in SETTINGS:
            source, given = f"--{name}", flags.get(name)
            if given is None:
                source, given = variable, environ.get(variable) or default
            try:
                values[name] = kind.read(given) if isinstance(given, str) else given
            except ValueError:
                raise PortDaddyError("BAD_VALUE", f"{source} must be {kind.expected}") from None
        home = os.path.expanduser(values["home"] or default_home(environ))
        if home.startswith("~"):
            raise PortDaddyError("BAD_VALUE", "there is no home folder; set PORT_DADDY_HOME to a folder for the state")
        values["home"] = os.path.abspath(home)
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
# 3. Whoever leaves a line with nothing, or rung again since it last looked, rings the next of it: that ring was for
#    somebody. In a line with turns (a lock) only the first may look, and whoever leaves rings the next.
#
#    Two messages, three workers A B C of one line: the first ring wakes A, the second B, since A is awake already. A
#    finds the first message and leaves; B finds the second. Had A hung up meanwhile, its leaving would have woken C.

class Waiter:
    """Somebody who waits: its topics, its line (None: no line), whether it has been rung since it last looked, and whether
    it has looked in vain (`asleep`)."""

    __slots__ = ("topics", "line", "turn", "condition", "rung", "gone", "asleep")

    def __init__(self, topics: Sequence[str], line: Optional[str], turn: bool, lock: threading.Lock) -> None:
        self.topics, self.line, self.turn = topics, line, turn
        self.condition = threading.Condition(lock)
        self.rung = self.gone = self.asleep = False

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
        self._topics: dict[str, dict[Waiter, None]] = {}
        self.crowd = 0  # how many are inside `wait`; changed under the lock
        self.closed = False

    def join(self, topics: Sequence[str], line: Optional[str] = None, turn: bool = False) -> Waiter:
        waiter = Waiter(topics, line, turn, self._lock)
        with self._lock:
            for topic in topics:
                self._topics.setdefault(topic, {})[waiter] = None
        return waiter

    def leave(self, waiter: Waiter, empty: bool = True) -> None:
        """Stop waiting, with nothing (`empty`) or with what was waited for."""
        with self._lock:
            for topic in waiter.topics:
                waiters = self._topics[topic]
                del waiters[waiter]
                if not waiters:
                    del self._topics[topic]
                elif waiter.line is not None and (waiter.turn or empty or waiter.rung):
                    self._ring(waiters, waiter.line)

    def ring(self, *topics: str) -> None:
        with self._lock:
            for topic in topics:
                if topic in self._topics:
                    self._ring(self._topics[topic], None)

    @staticmethod
    def _ring(waiters: Iterable[Waiter], line: Optional[str]) -> None:
        """Wake all without a line and the first sleeper of each line; or, given a line, the first sleeper of that."""
        served: set[str] = set()
        for waiter in waiters:
            if waiter.line is None:
                if line is None:
                    waiter.wake()
            elif waiter.line not in served and line in (None, waiter.line) and (waiter.turn or not waiter.rung):
                served.add(waiter.line)
                waiter.wake()

    def first(self, waiter: Waiter, patient: bool) -> bool:
        """Whether nobody of the same line stands before this waiter; in the way of who will not wait, only those who do."""
        with self._lock:
            return next(other for other in self._topics[waiter.topics[0]]
                        if other is waiter or other.line == waiter.line and (patient or other.asleep)) is waiter

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
        waiter, found = self.join(topics, line, turn), None
        try:
            while not waiter.gone:
                patient = time.monotonic() < deadline
                if not turn or self.first(waiter, patient):
                    found = look()
                    if found is not None:
                        return found
                if not patient:
                    break
                if self.closed:
                    raise PortDaddyError("SHUTTING_DOWN")
                if not waiter.asleep:
                    with self._lock:
                        waiter.asleep = True
                        self.crowd += 1
                    before_sleep(waiter)
                self.sleep(waiter, deadline)
            return None
        finally:
            self.leave(waiter, found is None)
            if waiter.asleep:
                with self._lock:
                    self.crowd -= 1

    def waiting(self, topic: str) -> int:
        with self._lock:
            return len(self._topics.get(topic, ()))

    def topics(self, prefix: str) -> list[str]:
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
#    lock:     free ──lock_take──> held ──extend_lock──> held ──lock_free──> free, or closed a while ──lock_open──> free
#    task:     new ──message_take──> leased ──task_touch──> leased ──task_done──> done      (a message, as a group sees it)
#                         ^            └──task_fail──> waiting ──message_take──> leased          (nack, time, death)
#                   task_redrive               └─> dead, after its last attempt ──task_redrive──> waiting
#    delivery: pending ──delivery_settle──> delivered, or pending again, or dead ──delivery_replay──> pending

SCHEMA_VERSION = 2
SCHEMA = """
-- Counters and facts of this database: ids, tokens, forgotten (the highest event id that was pruned), boot (of the last
-- start), tag (names this database in the ids of deliveries), stopped and resumed (the clock of leases), days (the last id
-- of each of the last days, as JSON), today (how much of the current one is over).
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

-- The last lines that a service printed, as its supervisor sent them in.
CREATE TABLE LINES (
  id INTEGER PRIMARY KEY, service TEXT NOT NULL, stream TEXT NOT NULL, text TEXT NOT NULL, at INTEGER NOT NULL);
CREATE INDEX LINES_OF_SERVICE ON LINES (service, id);

-- What a channel holds now, the last id it was given, and the highest id that it no longer has.
CREATE TABLE CHANNELS (
  name TEXT PRIMARY KEY, count INTEGER NOT NULL, bytes INTEGER NOT NULL, last INTEGER NOT NULL,
  dropped INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE MESSAGES (
  id INTEGER PRIMARY KEY, channel TEXT NOT NULL, payload TEXT NOT NULL, sender TEXT, created INTEGER NOT NULL,
  expires INTEGER, ttl INTEGER);
CREATE INDEX MESSAGES_OF_CHANNEL ON MESSAGES (channel, id);
CREATE INDEX MESSAGES_THAT_EXPIRE ON MESSAGES (expires) WHERE expires IS NOT NULL;

-- How far a group of workers has read a channel, and when it last polled: on the wall clock for people, and (`heard`) on
-- the clock of leases. What it has not done with is not dropped for want of room, while it polls.
CREATE TABLE READERS (
  channel TEXT NOT NULL, team TEXT NOT NULL, cursor INTEGER NOT NULL, polled INTEGER NOT NULL, heard INTEGER NOT NULL,
  PRIMARY KEY (channel, team)) WITHOUT ROWID;
-- What a group was given, up to its cursor, and has not done with: leased (`receipt` names that delivery, which is over at
-- `due`), waiting to be given again (from `due` on; 0: now), or dead (`due` is NULL).
CREATE TABLE TASKS (
  channel TEXT NOT NULL, team TEXT NOT NULL, message INTEGER NOT NULL, receipt TEXT, attempts INTEGER NOT NULL,
  most INTEGER NOT NULL, due INTEGER, ttl INTEGER, agent TEXT, error TEXT, died INTEGER,
  PRIMARY KEY (channel, team, message)) WITHOUT ROWID;
CREATE INDEX TASKS_OF_MESSAGE ON TASKS (message);
CREATE INDEX TASKS_WAITING ON TASKS (channel, team, message) WHERE receipt IS NULL AND due IS NOT NULL;
CREATE INDEX TASKS_DUE ON TASKS (due) WHERE due > 0;

-- A lock has `seats` holders at most, all with the same number of them; `delay` keeps it closed after an expiry or a death.
CREATE TABLE LOCKS (
  name TEXT NOT NULL, seat INTEGER NOT NULL, owner TEXT, token INTEGER NOT NULL, seats INTEGER NOT NULL,
  delay INTEGER NOT NULL, pid INTEGER, birth INTEGER, acquired INTEGER NOT NULL, expires INTEGER NOT NULL,
  ttl INTEGER NOT NULL, metadata TEXT, PRIMARY KEY (name, seat)) WITHOUT ROWID;
CREATE TABLE CLOSED (name TEXT PRIMARY KEY, expires INTEGER NOT NULL, ttl INTEGER NOT NULL) WITHOUT ROWID;

-- The answers to requests with an Idempotency-Key: `scope` is a digest of the key, the path and the agent.
CREATE TABLE ANSWERS (
  id INTEGER PRIMARY KEY, scope BLOB NOT NULL UNIQUE, body BLOB NOT NULL, reply TEXT NOT NULL, expires INTEGER NOT NULL,
  ttl INTEGER NOT NULL);

-- `alive` is NULL from death on; the row stays for a day, so that people can see who has died.
CREATE TABLE AGENTS (
  id TEXT PRIMARY KEY, name TEXT, type TEXT NOT NULL, pid INTEGER, birth INTEGER, registered INTEGER NOT NULL,
  heartbeat INTEGER NOT NULL, expires INTEGER NOT NULL, ttl INTEGER NOT NULL, alive INTEGER, max_services INTEGER,
  max_locks INTEGER, metadata TEXT) WITHOUT ROWID;

-- `streak`: how many deliveries have died since the last one that was taken.
CREATE TABLE HOOKS (
  id TEXT PRIMARY KEY, url TEXT NOT NULL, events TEXT NOT NULL, secret TEXT, filter TEXT, active INTEGER NOT NULL,
  created INTEGER NOT NULL, triggered INTEGER, successes INTEGER NOT NULL, failures INTEGER NOT NULL, metadata TEXT,
  streak INTEGER NOT NULL) WITHOUT ROWID;
-- One event for one hook. `due` is on the awake clock, and NULL once the delivery is delivered or dead.
CREATE TABLE DELIVERIES (
  id INTEGER PRIMARY KEY, hook TEXT NOT NULL, event TEXT NOT NULL, body TEXT NOT NULL, status TEXT NOT NULL,
  attempts INTEGER NOT NULL, response INTEGER, duration INTEGER, due INTEGER, error TEXT, created INTEGER NOT NULL);
CREATE INDEX DELIVERIES_DUE ON DELIVERIES (hook, due) WHERE due IS NOT NULL;
CREATE INDEX DELIVERIES_OF_HOOK ON DELIVERIES (hook, id);
"""
# What leads from an older version to SCHEMA: SQL before its missing tables are made, and after.
MIGRATIONS = {1: ("""
ALTER TABLE LOCKS RENAME TO OLD_LOCKS;
ALTER TABLE READERS RENAME TO OLD_READERS;
ALTER TABLE HOOKS ADD COLUMN streak INTEGER NOT NULL DEFAULT 0""", """
INSERT INTO LOCKS SELECT name, 0, owner, token, 1, 0, pid, birth, acquired, expires, ttl, metadata FROM OLD_LOCKS;
INSERT INTO READERS SELECT *, (SELECT max(value) FROM META WHERE key = 'stopped') FROM OLD_READERS;
INSERT INTO TASKS (channel, team, message, attempts, most, due) SELECT channel, team, message, 0, 5, 0 FROM RETURNED;
DROP TABLE OLD_LOCKS;
DROP TABLE OLD_READERS;
DROP TABLE RETURNED""")}
MAX_DATABASE = 1024 * 1024 * 1024  # bytes
KEEP_MESSAGES, KEEP_BYTES = 10_000, 64 * 1024 * 1024  # of a channel
KEEP_EVENTS, KEEP_DAYS, DAY = 10_000, 7, 86_400_000
KEEP_ANSWERS, KEEP_ANSWERS_FOR = 50_000, DAY
DEADLY_STREAK = 20  # deliveries of a webhook that died in a row
KEEP_DELIVERIES, KEEP_DEAD_AGENTS_FOR, KEEP_FORMER_PORTS, KEEP_READERS = 1_000, DAY, 10_000, 10_000
SIZE = "id, length(CAST(payload AS BLOB)) AS size"  # what message_drop wants to know, in bytes
# What may be dropped: a message that no group (of those heard since ?1) has yet to read or to be done with.
UNWANTED = ("NOT EXISTS (SELECT 1 FROM READERS WHERE READERS.channel = MESSAGES.channel AND heard > ?1 AND (cursor < "
            "MESSAGES.id OR EXISTS (SELECT 1 FROM TASKS WHERE TASKS.message = MESSAGES.id AND TASKS.team = READERS.team)))")
RESERVE = 1_000  # numbers of a counter that one write to META makes ours
BOOT_JUMP = 1_000_000  # a power cut may have lost the last second of writes, but hardly a million of them


class Now(NamedTuple):
    """One instant on three clocks: the wall's, the one that leases live on and which stands still during sleep, and which
    boot that one is of; and for how many ms more the second is held."""

    wall: int
    awake: int
    boot: str
    pause: int = 0


class Counter:
    """Numbers that never repeat: taken from memory, with `reserved` in META never below what was given out."""

    def __init__(self, key: str, value: int) -> None:
        self.key, self.value, self.reserved = key, value, value


class Store:
    """The database. `rows`, `row`, `value` and `run` are its only way to SQL, `transaction` its only way to a change."""

    def __init__(self, path: str, now: Now) -> None:
        import sqlite3
        if sqlite3.sqlite_version_info < (3, 24):
            raise PortDaddyError("INTERNAL", f"SQLite {sqlite3.sqlite_version} is too old; this needs 3.24 or newer")
        self._errors, self._faults_of_ours = sqlite3.Error, (sqlite3.ProgrammingError, sqlite3.InterfaceError,
                                                              sqlite3.IntegrityError)
        # Guards the connection, the counters and the clock of leases. Held for a whole transaction, so writers follow one
        # another.
        self.guard = threading.RLock()
        self.trouble: Optional[str] = None  # why the last transaction could not be written
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
        self._db.row_factory = sqlite3.Row
        try:
            self._open(path, now)
            self.tag = str(self.meta("tag"))
            self.ids, self.tokens = (Counter(key, int(self.meta(key))) for key in ("ids", "tokens"))
            if self.meta("boot") != now.boot:
                self._reboot(now)
            self.clock = int(self.meta("stopped")), int(self.meta("resumed"))  # that of leases, as it was left
        except self._errors as error:
            self.close(clean=False)
            if re.search("malformed|not a database", str(error)):
                raise PortDaddyError("CORRUPT", f"{path} is damaged ({error})") from None
            raise PortDaddyError("STORAGE_FULL", f"{path} cannot be used as a database: {error}") from None
        except PortDaddyError:
            self.close(clean=False)
            raise

    def _open(self, path: str, now: Now) -> None:
        execute = self._db.execute
        version = execute("PRAGMA user_version").fetchone()[0]  # before anything that would change the file
        if version > SCHEMA_VERSION:
            raise PortDaddyError("INTERNAL", f"{path} was written by a newer version of this program; use that one")
        for pragma in ("page_size=1024", "locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL",
                       "wal_autocheckpoint=4000", "cache_size=-8192"):
            execute(f"PRAGMA {pragma}")
        execute(f"PRAGMA max_page_count={MAX_DATABASE // execute('PRAGMA page_size').fetchone()[0]}")
        found = execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._errors(f"malformed: {found}")
        if version < SCHEMA_VERSION:
            self._migrate(version, now)

    def _migrate(self, version: int, now: Now) -> None:
        """From any older version, or from nothing (0), to SCHEMA, in one transaction."""
        before, after = MIGRATIONS.get(version, ("", ""))
        schema = re.sub("CREATE (TABLE|INDEX)", r"CREATE \1 IF NOT EXISTS", SCHEMA)
        facts = {"ids": 0, "tokens": 0, "forgotten": 0, "boot": now.boot, "tag": os.urandom(4).hex(), "days": "[]",
                 "stopped": now.awake, "resumed": now.awake, "today": 0}
        self._db.execute("BEGIN IMMEDIATE")
        for statement in f"{before};\n{schema}".split(";\n"):
            self._db.execute(statement)
        self._db.executemany("INSERT OR IGNORE INTO META VALUES (?, ?)", facts.items())
        for statement in after.split(";\n"):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        self._db.execute("COMMIT")

    def meta(self, key: str) -> Any:
        found = self._db.execute("SELECT value FROM META WHERE key=?", (key,)).fetchone()
        if found is None:
            raise self._errors(f"malformed: there is no {key}")
        return found[0]

    def _reboot(self, now: Now) -> None:
        """The awake clock began anew, and so does the remaining time of everything; the counters leave a gap."""
        with self.transaction(lambda: now) as tx:
            for table in ("SERVICES", "MESSAGES", "LOCKS", "CLOSED", "AGENTS", "ANSWERS"):
                tx.run(f"UPDATE {table} SET expires = ? + ttl WHERE expires IS NOT NULL", now.awake)
            tx.run("UPDATE TASKS SET due = ? + ttl WHERE due > 0", now.awake)
            tx.run("UPDATE READERS SET heard = ?", now.awake)
            tx.run("UPDATE DELIVERIES SET due = ? WHERE due IS NOT NULL", now.awake)
            tx.run("UPDATE SERVICES SET born = 0, birth = NULL")
            tx.run("UPDATE LOCKS SET birth = 0 WHERE birth IS NOT NULL")  # no process has that start time: it is dead
            tx.run("UPDATE AGENTS SET birth = 0 WHERE birth IS NOT NULL")
            meta_update(tx, boot=now.boot, stopped=now.awake, resumed=now.awake)
            self.jump(tx, BOOT_JUMP)

    def jump(self, tx: Transaction, gap: int) -> None:
        """Leave a gap in both counters, for numbers that were given out and may not have reached the disk."""
        for counter in (self.ids, self.tokens):
            counter.value = counter.reserved = counter.reserved + gap
            meta_update(tx, **{counter.key: counter.value})

    def salvage(self, path: str, now: Now) -> int:
        """Take over what can be read of a damaged database: the services, and counters above all that it gave out. ->
        how many services"""
        import sqlite3
        other, kept, counters = sqlite3.connect(path), 0, {}
        other.row_factory = sqlite3.Row
        for key in ("ids", "tokens"):
            with contextlib.suppress(self._errors, TypeError, ValueError):
                counters[key] = int(other.execute("SELECT value FROM META WHERE key=?", (key,)).fetchone()[0])
        with self.transaction(lambda: now) as tx:
            with contextlib.suppress(self._errors, PortDaddyError):
                for row in other.execute("SELECT * FROM SERVICES"):  # as far as it goes
                    with contextlib.suppress(self._errors):
                        insert(tx, "SERVICES", **{**dict(row), "born": 0, "birth": None, "expires": tx.lasts(row["ttl"])})
                        kept += 1
            for counter in (self.ids, self.tokens):  # what cannot be read is below the milliseconds of the wall clock
                counter.reserved = max(counter.reserved, counters.get(counter.key, now.wall))
            self.jump(tx, BOOT_JUMP)
        other.close()
        return kept

    def transaction(self, clock: Callable[[], Now], after: Callable[[Transaction], None] = lambda tx: None) -> Transaction:
        return Transaction(self, clock, after)

    def rows(self, sql: str, *values: Any) -> list[Any]:
        with self.guard:
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

    def roll_back(self) -> None:
        with contextlib.suppress(self._errors):  # a failed COMMIT may have rolled back by itself
            self._db.execute("ROLLBACK")

    def _failed(self, error: Exception) -> Exception:
        if isinstance(error, self._faults_of_ours):
            return error
        self.trouble = str(error)
        return PortDaddyError("STORAGE_FULL", f"the database could not be read or written ({error}); nothing was changed")

    def close(self, clean: bool = True) -> None:
        """Write the counters as they are, fold the log into the file, and let go of it."""
        with self.guard:
            if clean:
                with contextlib.suppress(PortDaddyError, self._errors):
                    meta_update(self, ids=self.ids.value, tokens=self.tokens.value)
                    self.run("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()


class Transaction:
    """One BEGIN IMMEDIATE … COMMIT, rolled back when its block raises, and what may be done in it. `clock` is read with the
    store's lock held, so that the order of instants is that of the commits; `after` is called when it is committed and the
    lock let go. `topics` ring then, and `due` is the earliest instant (awake) at which something that it wrote is over."""

    def __init__(self, store: Store, clock: Callable[[], Now], after: Callable[[Transaction], None]) -> None:
        self._store, self._clock, self._after = store, clock, after
        self.rows, self.row, self.value, self.run = store.rows, store.row, store.value, store.run
        self.topics: list[str] = []  # as often as there is something for one more of a line
        self.due = MAX_INTEGER

    def __enter__(self) -> Transaction:
        store = self._store
        store.guard.acquire()
        try:
            self.now = self._clock()  # before it begins: a stall that the clock notes is not rolled back
            self._reserved = store.ids.reserved, store.tokens.reserved
            self.run("BEGIN IMMEDIATE")
        except BaseException:
            store.guard.release()
            raise
        return self

    def __exit__(self, kind: object, error: Optional[BaseException], trace: object) -> None:
        store, committed = self._store, False
        try:
            if error is None:
                self.run("COMMIT")
                store.trouble, committed = None, True
        finally:
            if not committed:
                store.roll_back()
                store.ids.reserved, store.tokens.reserved = self._reserved
            store.guard.release()
        if committed:
            self._after(self)

    def ring(self, *topics: str) -> None:
        self.topics += topics

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
            meta_update(self, **{counter.key: counter.reserved})
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

    def deliver(self, number: int, kind: str, subject: str, facts: dict[str, Any]) -> None:
        """Queue an event for the webhooks that want it, in this transaction, so that none is lost or invented."""
        for hook in self.rows("SELECT id, events, filter FROM HOOKS WHERE active"):
            if any(matches(pattern, kind) for pattern in json.loads(hook["events"])) and (
                    hook["filter"] is None or matches(hook["filter"], subject)):
                delivery_append(self, hook["id"], number, kind, facts)


Sql = Union[Store, Transaction]


def meta_update(db: Sql, **facts: Any) -> None:
    for key, value in facts.items():
        db.run("UPDATE META SET value = ? WHERE key = ?", value, key)


def insert(tx: Transaction, table: str, **columns: Any) -> None:
    tx.run(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", *columns.values())


def update(tx: Transaction, table: str, key: str, **columns: Any) -> None:
    """Change columns of the row with that id, if there are any to change."""
    if columns:
        tx.run(f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in columns)} WHERE id = ?", *columns.values(), key)


# --- services ---------------------------------------------------------------------------------------------------------

def service_row(db: Sql, identity: str) -> Optional[Any]:
    return db.row("SELECT * FROM SERVICES WHERE id = ?", identity)


def service_update(tx: Transaction, identity: str, **columns: Any) -> None:
    update(tx, "SERVICES", identity, **columns)
    tx.ring(f"service:{identity}")


def service_delete(tx: Transaction, rows: Sequence[Any], agent: Optional[str]) -> list[int]:
    """Release services and remember their ports for their return; the ports that became free."""
    for row in rows:
        tx.run("DELETE FROM SERVICES WHERE id = ?", row["id"])
        tx.run("INSERT INTO FORMER_PORTS VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET port = excluded.port, "
               "at = excluded.at", row["id"], row["port"], tx.now.wall)
        tx.emit("service.release", row["id"], agent, serviceId=row["id"], agentId=row["agent"], released=1,
                releasedPorts=[row["port"]])
        tx.ring(f"service:{row['id']}")
    return [row["port"] for row in rows]


def line_append(tx: Transaction, identity: str, lines: Sequence[tuple[str, str, Optional[int]]]) -> None:
    """Add what a service printed, forget all but the last lines, and ring for those who follow."""
    for stream, text, at in lines:
        tx.run("INSERT INTO LINES VALUES (?, ?, ?, ?, ?)", tx.next_id(), identity, stream, text, at or tx.now.wall)
    tx.run("DELETE FROM LINES WHERE service = ? AND id <= (SELECT id FROM LINES WHERE service = ? ORDER BY id DESC "
           "LIMIT 1 OFFSET ?)", identity, identity, KEEP_LINES)
    tx.ring(f"lines:{identity}")


def line_list(db: Store, identity: str, after: int, last: int) -> list[Any]:
    """The last so many lines after an id, oldest first."""
    return db.rows("SELECT id, stream, text, at FROM LINES WHERE service = ? AND id > ? ORDER BY id DESC LIMIT ?",
                   identity, after, last)[::-1]


# --- channels ---------------------------------------------------------------------------------------------------------

def message_append(tx: Transaction, channel: str, payload: Any, sender: Optional[str], ttl: Optional[int]) -> int:
    """Add a message, drop the oldest beyond what a channel keeps, and ring for the readers."""
    number, text = tx.next_id(), to_json(payload)
    tx.run("INSERT INTO MESSAGES VALUES (?, ?, ?, ?, ?, ?, ?)", number, channel, text, sender, tx.now.wall,
           tx.lasts(ttl), ttl)
    size = len(text.encode())
    while not tx.run("UPDATE CHANNELS SET count = count + 1, bytes = bytes + ?1, last = ?2 WHERE name = ?3 AND count < ?4 "
                     "AND bytes + ?1 <= ?5", size, number, channel, KEEP_MESSAGES, KEEP_BYTES):
        if tx.run("INSERT OR IGNORE INTO CHANNELS VALUES (?, 1, ?, ?, 0)", channel, size, number):
            break
        rows = tx.rows(f"SELECT {SIZE} FROM MESSAGES WHERE channel = ?2 AND id < ?3 AND {UNWANTED} ORDER BY id LIMIT "
                       "(SELECT 1 + count / 1000 FROM CHANNELS WHERE name = ?2)",  # of many a few: room for the next
                       tx.now.awake - DAY, channel, number)
        if not rows:
            slowest = tx.value(
                "SELECT team FROM READERS WHERE channel = ?1 AND heard > ?2 AND (cursor < (SELECT min(id) FROM MESSAGES "
                "WHERE channel = ?1) OR EXISTS (SELECT 1 FROM TASKS WHERE TASKS.channel = ?1 AND TASKS.team = "
                "READERS.team)) ORDER BY cursor", channel, tx.now.awake - DAY)
            raise PortDaddyError("CHANNEL_FULL", f"channel {channel} holds {KEEP_MESSAGES} messages or {KEEP_BYTES} bytes, "
                                 f"and the group {slowest} has not done with them; let it work, or forget it and its dead "
                                 f"letters (pd groups rm {channel} {slowest})", channel=channel, group=slowest)
        message_drop(tx, channel, rows)
    tx.deliver(number, "message.publish", channel, {"channel": channel, "id": number, "sender": sender})
    tx.ring(f"channel:{channel}", "channel:*")
    return number


def message_drop(tx: Transaction, channel: str, rows: Sequence[Any]) -> None:
    """Forget messages (rows of id, size) of a channel, and remember the highest id, so that a loss can be announced. A
    lease that runs can still be acknowledged."""
    for row in rows:
        tx.run("DELETE FROM MESSAGES WHERE id = ?", row["id"])
        tx.run("DELETE FROM TASKS WHERE message = ? AND receipt IS NULL", row["id"])
    tx.run("UPDATE CHANNELS SET count = count - ?, bytes = bytes - ?, dropped = max(dropped, ?) WHERE name = ?",
           len(rows), sum(row["size"] for row in rows), max((row["id"] for row in rows), default=0), channel)


def message_list(db: Sql, pattern: str, after: int, limit: int) -> list[Any]:
    """The messages of one channel, or of all that a pattern covers, after an id; oldest first."""
    if "*" in pattern:
        return db.rows("SELECT * FROM MESSAGES WHERE id > ? AND channel GLOB ? ORDER BY id LIMIT ?", after, pattern, limit)
    return db.rows("SELECT * FROM MESSAGES WHERE channel = ? AND id > ? ORDER BY id LIMIT ?", pattern, after, limit)


def message_sweep(tx: Transaction) -> None:
    """Drop what is over. Readers call for it before they look: what they skipped unseen could not be announced."""
    for channel in {row["channel"] for row in tx.rows("SELECT channel FROM MESSAGES WHERE expires <= ?", tx.now.awake)}:
        message_drop(tx, channel, tx.rows(f"SELECT {SIZE} FROM MESSAGES WHERE channel = ? AND expires <= ?",
                                          channel, tx.now.awake))


# A group of workers takes each message once. What it has not seen lies behind its cursor; what it was given and has not
# done with is a row in TASKS.

def reader_note(tx: Transaction, channel: str, team: str, cursor: int = 0) -> None:
    """Note that a group polls, and how far it has read."""
    tx.run("INSERT INTO READERS VALUES (?, ?, ?, ?, ?) ON CONFLICT (channel, team) DO UPDATE SET cursor = max(cursor, "
           "excluded.cursor), polled = excluded.polled, heard = excluded.heard", channel, team, cursor, tx.now.wall,
           tx.now.awake)


def message_waiting(db: Sql, channel: str, team: str, awake: int) -> Optional[Any]:
    """The message that the group reads next: one that it was given before, else the first behind its cursor."""
    back = db.row("SELECT MESSAGES.*, attempts, 0 AS new FROM TASKS JOIN MESSAGES ON MESSAGES.id = message WHERE "
                  "TASKS.channel = ? AND team = ? AND receipt IS NULL AND due <= ? ORDER BY message LIMIT 1", channel, team,
                  awake)
    return back or db.row("SELECT *, 0 AS attempts, 1 AS new FROM MESSAGES WHERE channel = ?1 AND id > ifnull((SELECT "
                          "cursor FROM READERS WHERE channel = ?1 AND team = ?2), 0) ORDER BY id LIMIT 1", channel, team)


def message_take(tx: Transaction, channel: str, team: str, lease: Optional[int], most: int,
                 agent: Optional[str]) -> Optional[tuple[Any, Optional[str]]]:
    """Hand the next message to one of the group and to nobody else of it: for good, or for a lease that a receipt names."""
    message = message_waiting(tx, channel, team, tx.now.awake)
    if not message:
        return None
    number = message["id"]
    reader_note(tx, channel, team, number if message["new"] else 0)
    if lease is None:
        tx.run("DELETE FROM TASKS WHERE channel = ? AND team = ? AND message = ?", channel, team, number)
        return message, None
    receipt = f"{number}-{tx.next_id()}"
    tx.run("INSERT OR REPLACE INTO TASKS VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)", channel, team, number, receipt,
           message["attempts"] + 1, most, tx.lasts(lease), lease, agent)
    return message, receipt


def message_return(tx: Transaction, channel: str, team: str, message: int, receipt: Optional[str]) -> None:
    """Undo a take whose answer did not reach the worker; not for a group that was forgotten, which begins anew."""
    if receipt is None:
        tx.run("INSERT INTO TASKS (channel, team, message, attempts, most, due) SELECT MESSAGES.channel, team, id, 0, 0, 0 "
               "FROM MESSAGES JOIN READERS USING (channel) WHERE channel = ? AND team = ? AND id = ? AND id <= cursor",
               channel, team, message)
    else:
        tx.run("UPDATE TASKS SET receipt = NULL, due = 0, agent = NULL, attempts = attempts - 1 WHERE receipt = ? AND "
               "channel = ? AND team = ? AND message = ?", receipt, channel, team, message)
    tx.ring(f"channel:{channel}")


def task_row(db: Sql, channel: str, team: str, receipt: str, awake: int) -> Optional[Any]:
    """The delivery that a receipt names, while its lease runs."""
    return db.row("SELECT * FROM TASKS WHERE channel = ? AND team = ? AND message = ? AND receipt = ? AND due > ?",
                  channel, team, int(receipt.partition("-")[0]), receipt, awake)


def task_update(tx: Transaction, row: Any, **columns: Any) -> None:
    tx.run(f"UPDATE TASKS SET {', '.join(f'{name} = ?' for name in columns)} WHERE channel = ? AND team = ? AND "
           "message = ?", *columns.values(), row["channel"], row["team"], row["message"])


def task_done(tx: Transaction, row: Any) -> None:
    tx.run("DELETE FROM TASKS WHERE channel = ? AND team = ? AND message = ?", row["channel"], row["team"], row["message"])


def task_fail(tx: Transaction, row: Any, error: Optional[str], delay: int = 0) -> bool:
    """A lease that ended without success: the group gets the message again, after the delay; or, after its last attempt,
    it is dead (True)."""
    if not tx.value("SELECT 1 FROM MESSAGES WHERE id = ?", row["message"]):  # expired or cleared meanwhile
        task_done(tx, row)
        return False
    if row["attempts"] >= row["most"]:
        task_update(tx, row, receipt=None, due=None, agent=None, error=error, died=tx.now.wall)
        tx.emit("message.dead", row["channel"], row["agent"], channel=row["channel"], group=row["team"], id=row["message"],
                error=error)
        return True
    task_update(tx, row, receipt=None, due=tx.lasts(delay) if delay else 0, ttl=delay, agent=None, error=error)
    tx.ring(f"channel:{row['channel']}")
    return False


def task_redrive(tx: Transaction, channel: str, team: Optional[str], message: Optional[int]) -> int:
    """Let dead messages wait for their group again, with all their attempts before them; how many those were."""
    count = tx.run("UPDATE TASKS SET due = 0, attempts = 0, died = NULL WHERE channel = ?1 AND died IS NOT NULL AND (?2 IS "
                   "NULL OR team = ?2) AND (?3 IS NULL OR message = ?3)", channel, team, message)
    tx.ring(*[f"channel:{channel}"] * count)
    return count


def task_sweep(tx: Transaction) -> None:
    """End the leases and the delays whose time is over."""
    for row in tx.rows("SELECT * FROM TASKS WHERE due > 0 AND due <= ?", tx.now.awake):
        if row["receipt"]:
            task_fail(tx, row, row["error"] or "its lease ended without an answer of the worker")
        else:
            task_update(tx, row, due=0)
            tx.ring(f"channel:{row['channel']}")


def channel_dropped(db: Store, pattern: str) -> int:
    """The highest id that the channel, or a channel of the pattern, no longer has."""
    comparison = "GLOB" if "*" in pattern else "="
    return db.value(f"SELECT max(dropped) FROM CHANNELS WHERE name {comparison} ?", pattern) or 0


# --- locks ------------------------------------------------------------------------------------------------------------

def lock_rows(db: Sql, name: str, awake: int) -> list[Any]:
    """Those who hold a lock, in the order in which they got it."""
    return db.rows("SELECT * FROM LOCKS WHERE name = ? AND expires > ? ORDER BY token", name, awake)


def lock_agree(name: str, held: Sequence[Any], seats: int) -> None:
    """The first holder says how many there may be, until the lock is free."""
    if held and held[0]["seats"] != seats:
        limit = held[0]["seats"]
        raise PortDaddyError("LIMIT_MISMATCH", f"lock {name} is held with limit {limit}, which stays until it is free; ask "
                             f"with limit {limit}, or wait until then", limit=limit)


def lock_take(tx: Transaction, name: str, owner: Optional[str], ttl: int, pid: Optional[int], birth: Optional[int],
              seats: int, delay: int, metadata: Optional[dict[str, Any]]) -> Optional[int]:
    """Take a free seat of a lock; its fencing token, or None when there is none, or the lock is closed for its delay."""
    held = []
    for row in tx.rows("SELECT * FROM LOCKS WHERE name = ?", name):
        if row["expires"] > tx.now.awake:
            held.append(row)
        else:
            lock_free(tx, row, "lock.expire", "time")
    if tx.value("SELECT 1 FROM CLOSED WHERE name = ? AND expires > ?", name, tx.now.awake):
        return None
    lock_agree(name, held, seats)
    seat = next((number for number in range(seats) if number not in [row["seat"] for row in held]), None)
    if seat is None:
        return None
    token = tx.next_token()
    tx.run("INSERT INTO LOCKS VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", name, seat, owner, token, seats, delay, pid,
           birth, tx.now.wall, tx.lasts(ttl), ttl, maybe_json(metadata))
    tx.emit("lock.acquire", name, owner, lockName=name, owner=owner, token=token,
            expiresAt=tx.now.wall + tx.now.pause + ttl)
    return token


def lock_free(tx: Transaction, row: Any, kind: str, reason: str) -> bool:
    """End one lease, for the first of those who wait; False when it has ended already."""
    if not tx.run("DELETE FROM LOCKS WHERE name = ? AND token = ?", row["name"], row["token"]):
        return False
    tx.emit(kind, row["name"], row["owner"], lockName=row["name"], owner=row["owner"], token=row["token"],
            reason=reason)
    if kind == "lock.expire" and row["delay"]:  # whoever lost it without knowing has this long to notice
        tx.run("INSERT INTO CLOSED VALUES (?1, ?2, ?3) ON CONFLICT (name) DO UPDATE SET expires = ?2, ttl = ?3 WHERE "
               "expires < ?2", row["name"], tx.lasts(row["delay"]), row["delay"])
    tx.ring(f"lock:{row['name']}")
    return True


def lock_sweep(tx: Transaction, condition: str, *values: Any, reason: str = "time") -> list[str]:
    """End the leases that a condition names; the names of the locks."""
    rows = tx.rows(f"SELECT * FROM LOCKS WHERE {condition}", *values)
    return [row["name"] for row in rows if lock_free(tx, row, "lock.expire", reason)]


def lock_open(tx: Transaction) -> None:
    """Let in those who wait for a lock whose delay is over."""
    for row in tx.rows("SELECT name FROM CLOSED WHERE expires <= ?", tx.now.awake):
        tx.run("DELETE FROM CLOSED WHERE name = ?", row["name"])
        tx.ring(f"lock:{row['name']}")


# --- agents -----------------------------------------------------------------------------------------------------------

def agent_alive(db: Sql, agent: Optional[str], awake: int) -> Optional[Any]:
    return db.row("SELECT * FROM AGENTS WHERE id = ? AND alive AND expires > ?", agent, awake)


def agent_insert(tx: Transaction, agent: str, ttl: int, **columns: Any) -> None:
    """Register, or register again and revive: columns that are not given keep their values."""
    tx.run("INSERT INTO AGENTS (id, type, registered, heartbeat, expires, ttl, alive) VALUES (?, 'cli', ?, ?, ?, ?, 1) "
           "ON CONFLICT (id) DO UPDATE SET heartbeat = excluded.heartbeat, expires = excluded.expires, "
           "ttl = excluded.ttl, alive = 1", agent, tx.now.wall, tx.now.wall, tx.lasts(ttl), ttl)
    update(tx, "AGENTS", agent, **columns)


def agent_die(tx: Transaction, agent: str, survives: Callable[[Any], bool]) -> None:
    """Free what a dead agent held, in this one transaction, and say in one event what that was."""
    tx.run("UPDATE AGENTS SET alive = NULL, birth = NULL WHERE id = ?", agent)
    locks = lock_sweep(tx, "owner = ?", agent, reason="agent")
    tasks = tx.rows("SELECT * FROM TASKS WHERE agent = ? AND receipt IS NOT NULL", agent)
    for task in tasks:
        task_fail(tx, task, f"its worker, the agent {agent}, died")
    lost = [row for row in tx.rows("SELECT * FROM SERVICES WHERE agent = ?", agent) if not survives(row)]
    service_delete(tx, lost, agent)
    tx.emit("agent.stale", agent, agent, agentId=agent, locks=locks, services=[row["id"] for row in lost],
            messages=[task["message"] for task in tasks])


# --- webhooks ---------------------------------------------------------------------------------------------------------

def delivery_append(tx: Transaction, hook: str, event: int, kind: str, facts: dict[str, Any]) -> int:
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
    """Note an attempt: delivered (no error), to be tried again after `retry` ms, or dead (no `retry`). A receiver that
    says that it is gone (410), or lets one delivery after the other die, is not asked any more."""
    status = "delivered" if error is None else "dead" if retry is None else "pending"
    due = tx.now.awake + retry if status == "pending" and retry is not None else None
    hook = row["hook"]
    tx.run("UPDATE DELIVERIES SET status = ?, attempts = attempts + 1, response = ?, duration = ?, due = ?, error = ? "
           "WHERE id = ?", status, response, duration, due, error, row["id"])
    tx.run("UPDATE HOOKS SET triggered = ?, successes = successes + ?, failures = failures + ?, streak = CASE ? WHEN "
           "'dead' THEN streak + 1 WHEN 'delivered' THEN 0 ELSE streak END WHERE id = ?",
           tx.now.wall, status == "delivered", error is not None, status, hook)
    if status == "dead" and tx.run("UPDATE HOOKS SET active = 0 WHERE id = ? AND active AND (streak >= ? OR ? = 410)",
                                   hook, DEADLY_STREAK, response):
        tx.emit("webhook.disabled", hook, None, webhookId=hook, url=row["url"], reason=(
            "the receiver is gone (HTTP 410)" if response == 410 else
            f"{DEADLY_STREAK} deliveries in a row died; the last: {error}"))
    tx.run("DELETE FROM DELIVERIES WHERE hook = ? AND due IS NULL AND id <= (SELECT id FROM DELIVERIES WHERE hook = ? "
           "ORDER BY id DESC LIMIT 1 OFFSET ?)", hook, hook, KEEP_DELIVERIES)


def delivery_replay(tx: Transaction, hook: str, number: int) -> bool:
    """Send a delivery again under the same id, as often as a new one; False when it is not kept any more."""
    tx.ring("courier")
    return tx.run("UPDATE DELIVERIES SET status = 'pending', attempts = 0, due = ?, error = NULL WHERE id = ? AND hook = ?",
                  tx.now.awake, number, hook) == 1


# --- leases -----------------------------------------------------------------------------------------------------------

def lease_spare(tx: Transaction) -> bool:
    """Let nothing be over that could have been renewed had we been there; whether there is any lease."""
    now, leases = tx.now.awake, 0
    for table, column in (("LOCKS", "expires"), ("AGENTS", "expires"), ("SERVICES", "expires"), ("TASKS", "due")):
        where = {"AGENTS": "alive AND expires", "TASKS": "due > 0 AND due"}.get(table, column)
        tx.run(f"UPDATE {table} SET {column} = ? WHERE {where} <= ?", now + 1, now)
        leases += tx.value(f"SELECT count(*) FROM {table} WHERE {where} > ?", now)
    return leases > 0


# --- answers ----------------------------------------------------------------------------------------------------------

def answer_row(db: Sql, scope: bytes, awake: int) -> Optional[Any]:
    """The answer that was given under an Idempotency-Key."""
    return db.row("SELECT body, reply FROM ANSWERS WHERE scope = ? AND expires > ?", scope, awake)


def answer_keep(tx: Transaction, scope: bytes, body: bytes, reply: dict[str, Any]) -> None:
    """Keep an answer in the transaction of what it tells, so that neither is there without the other."""
    tx.run("INSERT OR REPLACE INTO ANSWERS VALUES (NULL, ?, ?, ?, ?, ?)", scope, body, to_json(reply),
           tx.now.awake + KEEP_ANSWERS_FOR, KEEP_ANSWERS_FOR)


# --- the log ----------------------------------------------------------------------------------------------------------

def asks_for_messages(kind: Optional[str]) -> bool:
    """A published message is its own event: it is among the events only when asked for by its type."""
    return kind is not None and kind.strip("*") != "" and matches(kind, "message.publish")


def event_list(db: Store, kind: Optional[str], agent: Optional[str] = None, subject: Optional[str] = None, after: int = 0,
               since: int = 0, until: int = MAX_INTEGER, limit: int = 100, newest: bool = False) -> list[Any]:
    """Events that match, oldest or newest first."""
    sources = "SELECT id, at, kind, subject, agent, facts FROM EVENTS"
    if asks_for_messages(kind):
        sources += (" UNION ALL SELECT id, created, 'message.publish', channel, sender, json_object('channel', channel,"
                    " 'id', id, 'sender', sender) FROM MESSAGES")
    return db.rows(f"SELECT * FROM ({sources}) WHERE id > ? AND at BETWEEN ? AND ? AND kind GLOB ? "
                   f"AND (? IS NULL OR agent = ?) AND (? IS NULL OR subject GLOB ?) ORDER BY id "
                   f"{'DESC' if newest else 'ASC'} LIMIT ?",
                   after, since, until, kind or "*", agent, agent, subject, subject, limit)


def prune(tx: Transaction, elapsed: int) -> None:
    """Forget what is kept for a time or up to a number only. Age is counted in days of running (`elapsed` ms since the last
    time): a wall clock that is set forward makes nothing old."""
    days: list[int] = json.loads(tx.value("SELECT value FROM META WHERE key = 'days'"))
    today = tx.value("SELECT value FROM META WHERE key = 'today'") + elapsed
    if today >= DAY:
        days, today = [*days, tx.next_id()][-KEEP_DAYS - 1:], 0
        meta_update(tx, days=to_json(days))
    meta_update(tx, today=today)
    event_drop(tx, max(days[0] if len(days) > KEEP_DAYS else 0, tx.value(
        "SELECT id FROM EVENTS ORDER BY id DESC LIMIT 1 OFFSET ?", KEEP_EVENTS) or 0))
    pages, free, size = (tx.value(f"PRAGMA {name}") for name in ("page_count", "freelist_count", "page_size"))
    if (pages - free) * size > 0.9 * MAX_DATABASE:
        make_room(tx)
    tx.run("DELETE FROM AGENTS WHERE alive IS NULL AND expires < ?", tx.now.awake - KEEP_DEAD_AGENTS_FOR)
    tx.run("DELETE FROM LINES WHERE id <= ? AND service NOT IN (SELECT id FROM SERVICES)", days[-2] if days[1:] else 0)
    tx.run("DELETE FROM FORMER_PORTS WHERE at <= (SELECT at FROM FORMER_PORTS ORDER BY at DESC LIMIT 1 OFFSET ?)",
           KEEP_FORMER_PORTS)
    tx.run("DELETE FROM ANSWERS WHERE expires <= ? OR id <= (SELECT id FROM ANSWERS ORDER BY id DESC LIMIT 1 OFFSET ?)",
           tx.now.awake, KEEP_ANSWERS)
    tx.run("DELETE FROM READERS WHERE channel NOT IN (SELECT name FROM CHANNELS) AND polled <= (SELECT polled FROM READERS "
           "ORDER BY polled DESC LIMIT 1 OFFSET ?)", KEEP_READERS)


def event_drop(tx: Transaction, last: int) -> None:
    """Forget the events up to an id, and remember that, so that a loss can be announced."""
    if tx.run("DELETE FROM EVENTS WHERE id <= ?", last):
        meta_update(tx, forgotten=last)


def make_room(tx: Transaction) -> None:
    """The database is nearly as large as it may become: the older half of the activity goes and, once that is little, the
    oldest messages that nobody has yet to work on."""
    count = tx.value("SELECT count(*) FROM EVENTS")
    event_drop(tx, tx.value("SELECT id FROM EVENTS ORDER BY id LIMIT 1 OFFSET ?", count // 2) or 0)
    if count < KEEP_EVENTS // 10:
        rows = tx.rows(f"SELECT channel, {SIZE} FROM MESSAGES WHERE {UNWANTED} ORDER BY id LIMIT 1000", tx.now.awake - DAY)
        for channel in {row["channel"] for row in rows}:
            message_drop(tx, channel, [row for row in rows if row["channel"] == channel])


# ======================================================================================================================
# 7. HOST — the world outside: ports, processes, connections, files
# ======================================================================================================================

# 1. The only room that opens connections, forks or kills. It has no policy: it says what is so, or does what it is told.
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
    say(time.strftime("%Y-%m-%d %H:%M:%S ") + text.replace("\n", "\\n"))


def say(text: str) -> None:
    """Talk to whoever started us, on stderr, harmless to a terminal."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr, flush=True)


def on_terminal(stream: Any) -> bool:
    """Whether a standard stream, which is None when it was closed, is a terminal."""
    return bool(stream) and stream.isatty()


def in_color() -> bool:
    """Whether stdout may be coloured (https://no-color.org)."""
    return on_terminal(sys.stdout) and not os.environ.get("NO_COLOR")


def terminal_width() -> int:
    """How much of a line is seen; a file takes everything, and a terminal may not know its size."""
    return (os.get_terminal_size().columns or 80) if on_terminal(sys.stdout) else 10 ** 9


def out(text: str) -> None:
    """Data, on stdout."""
    print(printable(text), flush=True)


def boot_id() -> str:
    """A text that is the same until the machine is started again."""
    text = read_text("/proc/sys/kernel/random/boot_id") if LINUX else command_output("sysctl", "-n", "kern.bootsessionuuid")
    return text.strip() or "unknown"


def unknowable(error: OSError) -> PortDaddyError:
    """The machine would not say, for want of descriptors or memory: nobody may conclude anything from that."""
    return PortDaddyError("BUSY", f"the system could not be asked ({error.strerror}); try again in a second")


def raise_if_short(error: OSError) -> None:
    """Not having been able to ask is no answer."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        raise unknowable(error) from None


@contextlib.contextmanager
def blamed(code: str, words: str) -> Iterator[None]:
    """What goes wrong out there leaves as a problem: our words, and what the system says."""
    try:
        yield
    except OSError as error:
        raise PortDaddyError(code, f"{words}: {error.strerror}") from None


def read_text(path: str) -> str:
    """What a file holds; empty when it cannot be read."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def read_object(path: str) -> dict[str, Any]:
    """The JSON object that a file holds; an empty one when there is none."""
    try:
        found = json.loads(read_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def command_output(*words: str) -> str:
    """What a command prints within five seconds; empty when it fails or does not exist."""
    import subprocess
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=5, check=False, env={**os.environ, "LC_ALL": "C"}).stdout.decode("utf-8", "replace")
    return ""


# --- processes --------------------------------------------------------------------------------------------------------

def since_boot() -> int:
    """Milliseconds on the clock on which processes are born: since the machine was started, sleep included; elsewhere
    than on Linux, where `ps` tells no other, the wall's."""
    return (time.clock_gettime_ns(time.CLOCK_BOOTTIME) if LINUX else time.time_ns()) // 1_000_000


def stat_fields(text: str) -> list[str]:
    """The state and what follows it in /proc/<pid>/stat; the name in brackets before them may hold anything."""
    return text[text.rfind(")") + 2:].split()


def all_pids() -> list[int]:
    with blamed("BUSY", "the processes of this machine cannot be listed"):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def process_birth(pid: int) -> Optional[int]:
    """When a process was started, on the clock of `since_boot`; None when there is none, or only its zombie."""
    if LINUX:
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                text = file.read()
        except (FileNotFoundError, ProcessLookupError):
            return None
        except OSError as error:
            raise unknowable(error) from None
        fields = stat_fields(text)
        return None if len(fields) < 20 or fields[0] in "ZX" else int(fields[19]) * 1000 // os.sysconf("SC_CLK_TCK")
    state, _, started = command_output("ps", "-o", "state=,lstart=", "-p", str(pid)).strip().partition(" ")
    if not started or state.startswith("Z"):
        return None
    return int(time.mktime(time.strptime(started.strip()))) * 1000


def process_lives(pid: int, birth: Optional[int]) -> bool:
    """Whether this very process is alive: the same pid with another start time is another process."""
    try:
        born = process_birth(pid)
    except PortDaddyError:
        return True  # not known to be dead
    return born is not None and (birth is None or abs(born - birth) <= (0 if LINUX else 2_000))


def process_command(pid: int) -> str:
    """The command line of a process, as far as we may see it."""
    text = read_text(f"/proc/{pid}/cmdline") if LINUX else command_output("ps", "-o", "command=", "-p", str(pid))
    return " ".join(text.replace("\0", " ").split())[:120]


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


def process_run(arguments: Sequence[str], environ: Mapping[str, str], given: Optional[str]) -> subprocess.Popen[bytes]:
    """Start a command in the foreground, on our own terminal, with our stdin or with what is `given`. On Linux it is told
    to end when we are killed: the main thread starts it, which lives as long as we do (PR_SET_PDEATHSIG follows the
    thread)."""
    import ctypes
    import signal
    import subprocess
    import tempfile
    end_with_us = functools.partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM) if LINUX else None
    try:
        with tempfile.TemporaryFile() if given is not None else contextlib.nullcontext() as stdin:
            if stdin and given is not None:  # a file, since nobody waits at a pipe that is not read
                stdin.write(given.encode("utf-8", "replace"))
                stdin.seek(0)
            return subprocess.Popen(list(arguments), env=dict(environ), preexec_fn=end_with_us, stdin=stdin)
    except OSError as error:
        problem = PortDaddyError("BAD_VALUE", f"{arguments[0]!r} cannot be run: {error.strerror}")
        problem.exit_status = 127 if error.errno == errno.ENOENT else 126  # as a shell says it
        raise problem from None


def own_command(*words: str) -> tuple[list[str], dict[str, str]]:
    """How to start this file again, and what to add to the environment: as a module where its name allows that. What is
    imported is compiled once; a script at every start, which takes 200 ms, and 20 MB that never come back."""
    from importlib.machinery import SourceFileLoader
    folder, name = os.path.split(os.path.abspath(__file__))
    if not name.endswith(".py") or not name[:-3].isidentifier():
        return [sys.executable, os.path.abspath(__file__), *words], {}
    SourceFileLoader(name[:-3], os.path.abspath(__file__)).get_code(name[:-3])  # so that it is we who compile, if need be
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-m", name[:-3], *words], {"PYTHONPATH": path}


BARRIER = 'read -r _ || exit 125; exec /bin/sh -c "$1"'


def child_start(command: str, environ: Mapping[str, str], folder: str) -> subprocess.Popen[bytes]:
    """A shell command in a session of its own, which waits for `child_go` before it begins.

    Its stdin stays a pipe that nobody writes to, and ends when we do: many servers take that for their end."""
    import subprocess
    with blamed("BAD_VALUE", f"it cannot be started in {folder}"):
        return subprocess.Popen(["/bin/sh", "-c", BARRIER, "sh", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=dict(environ), cwd=folder, start_new_session=True, bufsize=0)


def child_go(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.write(b"\n")


def child_feed(process: subprocess.Popen[bytes]) -> None:
    """Hand our own stdin on to a child, to its end."""
    if process.stdin:
        with contextlib.suppress(OSError), process.stdin as pipe:
            for piece in iter(lambda: read_some(0), b""):
                pipe.write(piece)


def shell_status(command: str, environ: Mapping[str, str], folder: str, timeout: float,
                 began: Callable[[int], Any], ended: Callable[[int], Any]) -> tuple[int, str]:
    """Run a shell command to its end or its deadline: its status, and the last line it printed. `began` and `ended` are
    told its process group."""
    import signal
    import subprocess
    with blamed("INTERNAL", f"it cannot be started in {folder}"):
        process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, env=dict(environ), cwd=folder, start_new_session=True)
    try:
        began(process.pid)
        said = process.communicate(timeout=timeout)[0].decode("utf-8", "replace").strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"not finished after {timeout:g} s"]
    finally:
        group_signal(process.pid, signal.SIGKILL)
        process.communicate()
        ended(process.pid)
    return process.returncode, said[-1] if said else ""


def read_some(descriptor: int) -> bytes:
    """What there is to read now, up to 64 KiB; nothing at the end."""
    with contextlib.suppress(OSError):
        return os.read(descriptor, 65536)
    return b""


def write_text(descriptor: int, text: str) -> bool:
    """Write all of a text; False when nobody reads any more."""
    data = text.encode("utf-8", "replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data):]
        return True
    return False


def group_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return os.getpgid(pid)
    return 0


def group_signal(group: int, number: int) -> None:
    with contextlib.suppress(OSError):  # it is empty
        os.killpg(group, number)


def group_members(group: int) -> list[int]:
    """The processes of a group that are alive; zombies, whom somebody else has yet to reap, are not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return []
    except OSError:
        pass  # alive, and not ours
    if LINUX:
        stats = ((pid, stat_fields(read_text(f"/proc/{pid}/stat"))) for pid in all_pids())
        return [pid for pid, its in stats if len(its) > 2 and its[2] == str(group) and its[0] not in "ZX"]
    lines = (line.split() for line in command_output("ps", "-A", "-o", "pid=,pgid=,state=").splitlines())
    return [int(pid) for pid, its, state in lines if its == str(group) and not state.startswith("Z")]


class Guardian:
    """A process in a session of its own that stops process groups when we have died without doing it ourselves.

    It learns of our death by the end of a pipe, which no way to die can prevent. (PR_SET_PDEATHSIG would follow the
    thread that forked.)"""

    def __init__(self) -> None:
        import subprocess
        self._lock = threading.Lock()  # guards the conversation: the main loop and the probers have it
        words, environ = own_command("guard")
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        start_new_session=True, cwd="/", env={**os.environ, **environ})

    def _say(self, words: str) -> None:
        with contextlib.suppress(OSError, ValueError), self._lock:  # ValueError: it has been closed
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(f"{words}\n".encode())
            self.process.stdin.flush()
            if self.process.stdout.readline() == b"ok\n":
                return
        raise PortDaddyError("INTERNAL", "the guardian process has died; start again")

    def add(self, group: int, number: int, timeout: float) -> None:
        """Returns once the guardian knows the group."""
        self._say(f"{group} {number} {timeout}")

    def remove(self, group: int) -> None:
        with contextlib.suppress(PortDaddyError):
            self._say(f"{group}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()
            self.process.wait()


def guard() -> None:
    """What the guardian does: take note of groups until the pipe ends, and stop those that are left."""
    import signal
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: dict[int, tuple[int, float]] = {}
    for line in sys.stdin:
        group, *rest = line.split()
        if rest:
            groups[int(group)] = int(rest[0]), float(rest[1])
        else:
            groups.pop(int(group), None)
        write_text(1, "ok\n")
    for one, (first, _) in groups.items():
        group_signal(one, first)
    began = time.monotonic()
    while groups and time.monotonic() - began < max(timeout for _, timeout in groups.values()) + 10:
        for one, (_, timeout) in list(groups.items()):
            if not group_members(one):
                del groups[one]
            elif time.monotonic() - began > timeout:
                group_signal(one, signal.SIGKILL)
        time.sleep(0.05)


def process_signal(pid: int, number: int) -> bool:
    """Send a signal; False when there is no such process, or it is not ours."""
    with contextlib.suppress(OSError):
        os.kill(pid, number)
        return True
    return False


# --- ports ------------------------------------------------------------------------------------------------------------

class Listener(NamedTuple):
    """A socket that listens: `key` tells it from the next one on the same port."""

    port: int
    key: int
    pid: Optional[int]


def listeners() -> dict[int, list[Listener]]:
    """Every TCP port of this machine on which something listens, on any address."""
    found: dict[int, list[Listener]] = {}
    for listener in _listeners_linux() if LINUX else _listeners_lsof():
        found.setdefault(listener.port, []).append(listener)
    return found


def _listeners_linux() -> Iterator[Listener]:
    try:
        query = struct.pack("=BBBB48xII", socket.AF_INET, 0, 0, 0, 1 << 10, 0)  # struct inet_diag_req: in state LISTEN
        for found in sock_diag(18, 0x301, query):  # TCPDIAG_GETSOCK as a dump, which answers for IPv6 too
            yield Listener(struct.unpack_from(">H", found, 4)[0], struct.unpack_from("=I", found, 68)[0], None)
    except OSError as error:
        raise_if_short(error)
        for path in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in read_text(path).splitlines()[1:]:
                words = line.split()
                if words[3] == "0A":
                    yield Listener(int(words[1].rpartition(":")[2], 16), int(words[9]), None)


def sock_diag(kind: int, flags: int, query: bytes) -> Iterator[bytes]:
    """Ask the kernel for TCP sockets, for one or for a dump of many: a struct inet_diag_msg each. (sock_diag(7): 40 µs
    where reading /proc/net/tcp takes 8 ms.)"""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4) as netlink:  # NETLINK_SOCK_DIAG
        netlink.send(struct.pack("=IHHII", 16 + len(query), kind, flags, 1, 0) + query)
        while True:
            data, offset = netlink.recv(65536, socket.MSG_DONTWAIT), 0  # the kernel has answered before `send` returned
            while offset < len(data):
                length, what = struct.unpack_from("=IH", data, offset)
                if what == 2:  # NLMSG_ERROR
                    raise OSError(-struct.unpack_from("=i", data, offset + 16)[0], "sock_diag")
                if what == 3:  # NLMSG_DONE
                    return
                yield data[offset + 16:offset + length]
                offset += (length + 3) & ~3
            if flags == 0x001:  # no dump
                return


def _listeners_lsof() -> Iterator[Listener]:
    pid = 0
    for line in command_output("lsof", "-nP", "-iTCP", "-sTCP:LISTEN", "-Fpn").splitlines():
        if line.startswith("p"):
            pid = int(line[1:])
        elif line.startswith("n") and line.rpartition(":")[2].isdigit():
            yield Listener(int(line.rpartition(":")[2]), pid, pid)


def listener_pids(wanted: Iterable[Listener]) -> dict[int, int]:
    """Which process holds each listener, by the listener's key, as far as we may see: ours, or all for root."""
    known = {listener.key: listener.pid for listener in wanted}
    found = {key: pid for key, pid in known.items() if pid is not None}
    if not LINUX or len(found) == len(known):
        return found
    targets = {f"socket:[{key}]": key for key in known}
    for pid in sorted(all_pids()):
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):  # closed since
                    key = targets.get(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
                    if key is not None:
                        found.setdefault(key, pid)
        except OSError as error:  # it has ended, or belongs to somebody else
            raise_if_short(error)
        if len(found) == len(known):
            break
    return found


def port_holder(port: int) -> tuple[Optional[int], str]:
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
            raise_if_short(error)
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # a machine without IPv6
                return False
    return True


def ephemeral_ports() -> tuple[int, int]:
    """The range from which the kernel takes the near end of outgoing connections."""
    words = read_text("/proc/sys/net/ipv4/ip_local_port_range").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else (49152, 65535)


# --- connections ------------------------------------------------------------------------------------------------------

def dial(addresses: Sequence[tuple[Any, ...]], timeout: float) -> socket.socket:
    """Connect to the first of some addresses that answers, within one deadline for all of them."""
    deadline, last, facts = time.monotonic() + timeout, "there is no address to connect to", {}
    for family, _, _, _, address in addresses:
        try:
            with contextlib.ExitStack() as undo:
                connection = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                connection.connect(address)
                if connection.getsockname()[:2] == address[:2]:  # a free port of the ephemeral range has met itself
                    raise OSError(errno.ECONNREFUSED, "Connection refused")
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                undo.pop_all()
                return connection
        except socket.timeout:
            last = "no answer in time"
        except ConnectionResetError:  # accepted, and thrown out before we looked
            last, facts = "it closed without an answer", {"spoke": False}
        except OSError as error:
            last = error.strerror or str(error)
    raise DaemonUnreachable(last, **facts)


def split_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and target of an absolute URL."""
    found = re.fullmatch(r"(?i:(https?|wss?))://(\[[^\]/?#]*\]|[^:/?#\[\]@]+)(?::([0-9]{1,5}))?([/?][^#]*)?", url)
    if not found:
        raise PortDaddyError("BAD_VALUE", "a URL must look like http://127.0.0.1:9876")
    scheme, host, port, target = found.group(1).lower(), found.group(2).strip("[]"), found.group(3), found.group(4)
    target = target or "/"
    return scheme, host, int(port or (443 if scheme.endswith("s") else 80)), target if target[0] == "/" else f"/{target}"


def resolve(host: str, port: int) -> list[tuple[Any, ...]]:
    """The addresses of a host, for `dial`."""
    try:
        name = host.encode() if host.isascii() else host  # a text would first be made IDNA, which takes 3 ms to load
        return list(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        raise DaemonUnreachable(f"the name {host} has no address ({error})") from None


def is_address(host: str) -> bool:
    """Whether a host is an address and not a name, in any way of writing it that a resolver takes."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            socket.inet_aton(host) if family == socket.AF_INET else socket.inet_pton(family, host.partition("%")[0])
            return True
    return False


CLOUD_METADATA = ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")  # of clouds


def check_target(url: str, own_port: int, private: bool = True, by_name: bool = True) -> list[tuple[Any, ...]]:
    """The addresses behind a URL that somebody gave us to call, or TARGET_REFUSED when one of them must not be.

    Loopback and public addresses are called, those of private networks if `private`; our own port, link-local, the
    clouds' metadata, multicast, broadcast and unspecified addresses are not. Without `by_name`, a name is left to be
    looked up when it is used."""
    import ipaddress
    _, host, port, _ = split_url(url)
    if not by_name and not is_address(host) and host != "localhost":
        return []
    try:
        addresses = resolve(host, port)
    except DaemonUnreachable as problem:
        raise PortDaddyError("TARGET_REFUSED", str(problem), host=host) from None
    for *_, address in addresses:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            nat64 = any(ip in ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48"))
            ip = ip.ipv4_mapped or ip.sixtofour or (ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if nat64 else ip)
        if ip.is_link_local or ip.is_multicast or ip.is_unspecified or str(ip) in ("255.255.255.255", *CLOUD_METADATA):
            raise PortDaddyError("TARGET_REFUSED", f"{host} leads to {ip}, a link-local, metadata, multicast or "
                                 "unspecified address, which is never called", host=host)
        if not private and not ip.is_global and not ip.is_loopback:
            raise PortDaddyError("TARGET_REFUSED", f"{host} leads to {ip} in a private network, which is not called here "
                                 "(PORT_DADDY_WEBHOOK_PRIVATE)", host=host)
        if ip.is_loopback and port == own_port:
            raise PortDaddyError("TARGET_REFUSED", f"{host}:{port} is this daemon itself; give the receiver's own port",
                                 host=host)
    return addresses


GONE = -1  # as a user: the process has closed its end
LOOPBACK = 1  # the number of the device lo, in every network namespace


def peer_user(connection: socket.socket) -> Optional[int]:
    """The user whose process is at the other end of a connection inside this machine; GONE when nobody is any more; None
    when the kernel does not know such a socket: on another system, and for another machine."""
    if not LINUX:
        return None
    (theirs, their_port), (ours, our_port) = connection.getpeername()[:2], connection.getsockname()[:2]
    ends = struct.pack(">HH", their_port, our_port) + b"".join(
        socket.inet_pton(connection.family, address).ljust(16, b"\0") for address in (theirs, ours))
    try:  # as of the device lo, or who has bound his socket to that would not be found
        query = struct.pack("=BBBBI36sIII", connection.family, socket.IPPROTO_TCP, 0, 0, 2 ** 32 - 1, ends,
                            LOOPBACK, 2 ** 32 - 1, 2 ** 32 - 1)  # struct inet_diag_req_v2
        for found in sock_diag(20, 0x001, query):  # SOCK_DIAG_BY_FAMILY
            user, inode = struct.unpack_from("=II", found, 64)
            if found[4:40] == ends:  # and not a listener on the port, which is found when there is no connection
                return user if inode else GONE  # what is left of a socket that was closed is root's, to older kernels
    except OSError as error:
        raise_if_short(error)
    return None


def is_readable(connection: socket.socket) -> bool:
    """Whether there is something to read, the end of the connection included."""
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(0))


def has_peer(connection: socket.socket) -> bool:
    """Whether the other side is still there; one that has closed only its sending half counts as gone.

    Asked of the kernel without taking a byte, and without touching the socket's timeout, which may be another thread's."""
    hang_up = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere a readable connection without a byte has ended
    poller = select.poll()
    try:
        poller.register(connection, select.POLLIN | hang_up)
        found = poller.poll(0)
        events = found[0][1] if found else 0
        if events & (hang_up | select.POLLHUP | select.POLLERR | select.POLLNVAL):
            return False
        return not events or bool(hang_up) or connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except (OSError, ValueError):
        return False


class Answer(NamedTuple):
    """The head of an HTTP reply, of which nothing else is kept."""

    status: int
    retry_after: Optional[int]  # seconds


def http_call(method: str, url: str, addresses: Sequence[tuple[Any, ...]], headers: Mapping[str, str], body: bytes,
              timeout: float) -> Answer:
    """One request to addresses that were checked before, within one deadline: no redirect, no proxy, no reuse."""
    deadline, reply = time.monotonic() + timeout, b""
    scheme, host, port, target = split_url(url)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(dial(addresses, timeout))
        try:
            if scheme == "https":
                import ssl
                connection = stack.enter_context(
                    ssl.create_default_context().wrap_socket(connection, server_hostname=host))
            authority = f"[{host}]" if ":" in host else host
            lines = [f"{method} {target} HTTP/1.1", f"Host: {authority}:{port}", "Connection: close",
                     f"User-Agent: port-daddy/{__version__}", *(f"{name}: {value}" for name, value in headers.items())]
            if body:
                lines.append(f"Content-Length: {len(body)}")
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
            while b"\r\n\r\n" not in reply and len(reply) < 65536:
                if time.monotonic() > deadline:
                    raise socket.timeout
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                chunk = connection.recv(65536)
                if not chunk:
                    break
                reply = re.sub(rb"\A(?:HTTP/1\.[01] 1[0-9]{2}[ \r](?s:.*?)\r\n\r\n)+", b"", reply + chunk)  # interim
        except socket.timeout:
            raise PortDaddyError("TIMED_OUT", f"no answer within {timeout:g} s") from None
        except (OSError, ValueError):
            pass  # what there is of a reply tells
    head = re.match(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r]", reply)
    if not head:
        raise PortDaddyError("BAD_REQUEST", "what answered is not HTTP" if reply else "it closed without an answer",
                             spoke=bool(reply))
    wait = re.search(rb"(?i)\r\nretry-after:[ \t]*([0-9]{1,6})[ \t]*\r\n", reply)
    return Answer(int(head.group(1)), int(wait.group(1)) if wait else None)


# --- files ------------------------------------------------------------------------------------------------------------

def raise_limits() -> None:
    """As many descriptors as the system allows us: the usual soft limit is what our own connections may take."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if LINUX else 10_240  # macOS says "infinity" and means this
    if soft != resource.RLIM_INFINITY and (soft < most or most == resource.RLIM_INFINITY):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_home(path: str) -> None:
    """Make the state folder ours alone, or refuse it when it belongs to somebody else."""
    with blamed("INTERNAL", f"the state folder {path} cannot be used"):
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.stat(path)
        if found.st_uid != os.geteuid():
            raise PortDaddyError("INTERNAL", f"{path} belongs to another user; set PORT_DADDY_HOME to a folder of yours")
        if found.st_mode & 0o022 and os.listdir(path):
            raise PortDaddyError("INTERNAL", f"others may write into {path}, and may have put something there: empty it, "
                                 "or set PORT_DADDY_HOME to a folder of yours")
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.chmod(path, stat.S_IMODE(found.st_mode) & 0o700)


def make_private(path: str) -> None:
    """Make an empty file of ours alone, unless there is one; the files that SQLite puts beside it are like it."""
    with blamed("INTERNAL", f"{path} cannot be used"):
        os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o600))


def lock_home(path: str) -> Optional[int]:
    """Be the one daemon of a state folder: a descriptor to keep open until the end, None when another one is.

    The kernel's lock ends with the process, however it ends. It is taken before the database is touched."""
    import fcntl
    with blamed("INTERNAL", f"the state folder {path} cannot be written"):
        descriptor = os.open(os.path.join(path, "daemon.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
    return descriptor


def write_file(path: str, text: str, mode: int = 0o600) -> None:
    """Replace a file in one step, so that nobody ever reads half of it."""
    with blamed("STORAGE_FULL", f"{path} could not be written"):
        with open(f"{path}.new", "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(text)
        os.replace(f"{path}.new", path)


def move_aside(path: str, suffix: str) -> str:
    """Give a damaged database and its log another name, and make a copy that may be read; the name of the copy."""
    import shutil
    with blamed("INTERNAL", f"{path} could not be moved aside"):
        for end in ("-wal", ""):
            if os.path.exists(path + end):
                os.replace(path + end, f"{path}.{suffix}{end}")
                shutil.copy(f"{path}.{suffix}{end}", f"{path}.salvage{end}")
    return f"{path}.salvage"


def same_file(path: str, descriptor: int) -> bool:
    """Whether the file that we have open is still the one of that name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def remove_file(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def file_owner(path: str) -> tuple[int, int]:
    """The mode and the owner of a file or a folder."""
    with blamed("NOT_FOUND", f"{path} cannot be read"):
        found = os.stat(path)
        return found.st_mode, found.st_uid


def file_owners(path: str) -> tuple[bool, set[int]]:
    """Whether everybody may write a file, or replace it; and who owns it: the file, the link that it may be, its folder."""
    with blamed("NOT_FOUND", f"{path} cannot be read"):
        found, folder = os.stat(path), os.stat(os.path.dirname(path) or ".")
        replaceable = folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX
        return bool(found.st_mode & stat.S_IWOTH or replaceable), {found.st_uid, os.lstat(path).st_uid, folder.st_uid}


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
#
# 4. Leases live on `now().awake`. It stands still while the machine sleeps and, after a time in which we did not run (a
#    stop, a stall, a restart), for a while longer, so that those who were there before can say that they still are.

BIRTH_TICK = 10 if LINUX else 1_000  # ms: the start of a process is known in steps of this, rounded down
TICK_AT_MOST, PRUNE_EVERY = 60_000, 60_000
LOOK_EVERY, STALL, GRACE, GRACE_AT_MOST = 500, 500, 5_000, 300_000
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

    def slept(self) -> int:
        """Milliseconds that the machine has slept since it was started."""
        with_sleep = time.CLOCK_BOOTTIME if LINUX else time.CLOCK_MONOTONIC  # Apple's monotonic clock goes on in sleep
        return (time.clock_gettime_ns(with_sleep) - time.monotonic_ns()) // 1_000_000


class LeaseClock:
    """The awake clock as leases see it. It stood at `stopped` until `resumed` (on the awake clock), and has gone on from
    there. Guarded by the store's lock."""

    def __init__(self, clock: Clock, store: Store) -> None:
        self.clock, self.store = clock, store
        now, self.slept = clock.now().awake, clock.slept()
        self.seen = self.expected = now  # when it was last read, and when it will be at the latest
        self.stopped, self.resumed = store.clock
        value = self.read(now)  # the time without a daemon has counted, but what it has ended begins with the grace
        with store.transaction(lambda: Now(0, value, "")) as tx:
            if lease_spare(tx):
                self.stop(value, now + GRACE)

    def read(self, now: int) -> int:
        return self.stopped + max(0, now - self.resumed)

    def stop(self, value: int, until: int) -> None:
        self.stopped, self.resumed = value, until
        with contextlib.suppress(PortDaddyError):  # kept for a next start of this boot
            meta_update(self.store, stopped=value, resumed=until)

    def now(self) -> Now:
        with self.store.guard:
            now, slept = self.clock.now(), self.clock.slept()
            last = max(self.seen, self.expected)
            stall = now.awake - last
            self.seen = now.awake
            if stall > STALL or slept - self.slept > STALL:
                self.slept, value = slept, self.read(min(last, now.awake))
                self.stop(value, now.awake + min(max(GRACE, stall), GRACE_AT_MOST))
            return Now(now.wall, self.read(now.awake), now.boot, max(0, self.resumed - now.awake))

    def expect(self, pause: int) -> None:
        """It will be read again within so many milliseconds, or something has held us up."""
        with self.store.guard:
            self.expected = self.seen + pause


class AskerGone(Exception):
    """Whoever asked has hung up: nothing may be given, and there is nobody to answer."""


class Asker:
    """Who asks, as far as the request says; HTTP knows a subclass that has a connection."""

    def __init__(self, agent: Optional[str] = None, pid: Optional[int] = None, after: Optional[int] = None,
                 key: Optional[str] = None) -> None:
        self.agent, self.pid = agent, pid
        self.after = after  # Last-Event-ID: the last event that a stream's reader has seen
        self.key = key  # Idempotency-Key, of a request that may come again and is to be performed once
        self.request: Optional[tuple[bytes, bytes]] = None  # digests of such a request: which one it is, and its fields
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

    def answer(self, tx: Transaction, reply: Reply) -> Reply:
        """The last thing of a transaction whose answer must not come from doing it twice."""
        if self.request:
            answer_keep(tx, *self.request, reply)
            self.undo = None  # who asks again gets the same answer
        self.stay()
        return reply

    def watch(self, waiter: Waiter) -> None:
        """Called before the asker is made to wait, so that a hang-up can wake the waiter."""


def open_store(path: str, now: Now) -> Store:
    """The database; a damaged one is moved aside, loudly, and what can be read of it taken over."""
    make_private(path)
    try:
        return Store(path, now)
    except PortDaddyError as problem:
        if problem.code != "CORRUPT":
            raise
        log(f"DAMAGED: {problem}")
    suffix = time.strftime("corrupt-%Y%m%d-%H%M%S")
    copy = move_aside(path, suffix)
    make_private(path)
    store = Store(path, now)
    kept = store.salvage(copy, now)
    for end in ("", "-wal", "-shm"):
        remove_file(copy + end)
    log(f"DAMAGED: it is now {path}.{suffix}; {kept} services were taken over, and nothing else")
    return store


class Daemon:
    """Settings, store, bell and clock, and the few facts that live in memory only."""

    def __init__(self, settings: Settings, clock: Optional[Clock] = None) -> None:
        self.settings, self.clock, self.bell = settings, clock or Clock(), Bell()
        self.store = open_store(os.path.join(settings.home, "port_daddy.db"), self.clock.now())
        self.leases = LeaseClock(self.clock, self.store)
        self.now = self.leases.now
        self.port, self.url = settings.port, ""  # the real ones, once a server has bound them
        self.instance, self.started = os.urandom(6).hex(), self.clock.now()
        # Awake: when the next tick is due. A lease that ends earlier rings the keeper; while a tick runs, or when there is
        # nothing to look after, it is beyond everything, so that whatever ends rings.
        self.planned = 0
        self.pruned = self.started.awake  # when `prune` last ran, on the clock of the machine
        self.performing: dict[bytes, bytes] = {}  # requests with an Idempotency-Key that are being performed
        # The listener (its key) that each service was last seen with; empty after a start, when all are looked at anew.
        self.adopted: dict[str, int] = {}
        self.sha256 = file_hash(os.path.abspath(__file__))
        self._listening: tuple[float, dict[int, list[Listener]]] = (0.0, {})

    def write(self) -> Transaction:
        return self.store.transaction(self.now, self._ring)

    def _ring(self, tx: Transaction) -> None:
        self.bell.ring(*tx.topics)
        if tx.due < self.planned:
            self.leases.expect(LOOK_EVERY)
            self.bell.ring("keeper")

    def wait(self, asker: Asker, look: Callable[[], Optional[T]], timeout: int, topics: Sequence[str],
             line: Optional[str] = None, turn: bool = False, rings: str = "") -> Optional[T]:
        """What `look` finds within `timeout` ms; None when time is over or the asker has hung up. `rings` is a topic to
        ring once somebody really waits."""
        def before_sleep(waiter: Waiter) -> None:
            self.check_crowd()
            asker.watch(waiter)
            if rings:
                self.bell.ring(rings)
        return self.bell.wait(look, time.monotonic() + timeout / 1000, topics, line, turn, before_sleep)

    def check_crowd(self) -> None:
        if self.bell.crowd > self.settings.max_waiters:
            raise PortDaddyError("BUSY", f"{self.settings.max_waiters} requests are waiting already, which is the limit "
                                 "(PORT_DADDY_MAX_WAITERS); try again in a second")

    # --- ports and what listens on them -------------------------------------------------------------------------------

    def listening(self) -> dict[int, list[Listener]]:
        """Who listens where: now on Linux, where asking costs 40 µs; not older than a second where it takes lsof."""
        taken, found = self._listening
        if LINUX or time.monotonic() - taken > 1:
            found = listeners()
            self._listening = time.monotonic(), found
        return found

    def stranger(self, row: Any, there: Sequence[Listener]) -> tuple[Optional[int], Optional[int]]:
        """The pid of a stranger on the port of a service, and the pid of its own listener, as far as they can be seen.

        A stranger is a visible process that is older than the claim and did not make it."""
        own = None
        for pid in listener_pids(there).values():
            birth = process_birth(pid)
            if birth is not None and birth < row["born"] - BIRTH_TICK and pid not in (row["claimer"], row["pid"]):
                return pid, None
            own = pid
        return None, own

    def observe(self) -> None:
        """Compare the table with who really listens: adopt, miss, or notice a stranger."""
        listening = self.listening()
        # Thousands may be at rest: nothing listens there, none did, and there is no process that could have died.
        rows = self.store.rows("SELECT * FROM SERVICES WHERE pid IS NOT NULL OR status NOT IN ('assigned', 'starting', "
                               f"'stopped', 'crashed', 'dead') OR port IN ({', '.join(map(str, listening))})")
        for id in set(self.adopted) - {row["id"] for row in rows}:
            row = service_row(self.store, id)
            rows += [row] if row else []
            if not row:  # released
                self.adopted.pop(id, None)
        for row in rows:
            there = listening.get(row["port"], [])
            key = there[0].key if there else None
            fits = row["status"] in (("running", "unhealthy", "hijacked", "detached") if there else
                                     ("assigned", "starting", "stopped", "crashed", "dead"))
            died = not there and self.owns_pid(row) and not process_lives(row["pid"], row["birth"])
            fits = fits and not (died and row["status"] in ("assigned", "stopped"))
            if fits and self.adopted.get(row["id"]) == key or self.supervised(row):
                continue
            stranger, pid = self.stranger(row, there)
            news: dict[str, Any] = {"status": "dead" if died else "stopped" if row["status"] != "assigned" else "assigned"}
            if stranger:
                news = {"status": "hijacked", "error": f"pid {stranger} listens on the port and is older than the claim"}
            elif there:
                news = {"status": "running", "error": None, **({"pid": pid} if pid and row["birth"] is None else {})}
            with self.write() as tx:
                now = service_row(tx, row["id"])
                if not now or any(now[name] != row[name] for name in ("port", "status", "born", "pid")):
                    continue  # it has changed while we looked; so look again next time
                if key:
                    self.adopted[row["id"]] = key
                else:
                    self.adopted.pop(row["id"], None)
                if not there and row["healthy"]:
                    news["healthy"] = None
                    tx.emit("service.unhealthy", row["id"], row["agent"], serviceId=row["id"], port=row["port"],
                            error="nothing listens on its port any more")
                service_update(tx, row["id"], **news)

    @staticmethod
    def owns_pid(row: Any) -> bool:
        """Whether the pid of a service is that of its process: bound, or adopted; not a note about another container."""
        return row["pid"] is not None and (row["birth"] is not None or row["status"] != "assigned")

    def supervised(self, row: Any) -> bool:
        """Whether an agent that is alive has said that it checks this service itself."""
        return row["checker"] is not None and agent_alive(self.store, row["checker"], self.now().awake) is not None

    def check_target(self, url: str, by_name: bool = True) -> list[tuple[Any, ...]]:
        return check_target(url, self.port, self.settings.webhook_private, by_name)

    def check_health(self, row: Any) -> None:
        """Ask a service whether it is well: its health URL, else whether its port answers."""
        began, error = time.monotonic(), None
        try:
            if row["health"]:
                addresses = self.check_target(row["health"])
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
            status = row["status"]
            if status in ("running", "unhealthy") and (healthy or row["health"]):
                status = "running" if healthy else "unhealthy"
            service_update(tx, identity, healthy=healthy, latency=latency, error=error, checked=tx.now.wall,
                           checker=checker, status=status)
            if healthy != bool(row["healthy"]):
                tx.emit("service.healthy" if healthy else "service.unhealthy", identity, row["agent"], serviceId=identity,
                        port=row["port"], error=error)

    # --- time ---------------------------------------------------------------------------------------------------------

    def sweep_messages(self) -> None:
        """What every reader of messages does first."""
        if self.store.value("SELECT 1 FROM MESSAGES WHERE expires <= ?1 UNION ALL SELECT 1 FROM TASKS WHERE due > 0 AND "
                            "due <= ?1 LIMIT 1", self.now().awake):
            with self.write() as tx:
                message_sweep(tx)
                task_sweep(tx)

    def tick(self, now: Now) -> int:
        """Do what time has made due; how many milliseconds nothing more will be, if nothing is written meanwhile."""
        self.planned = MAX_INTEGER  # whatever is written from here on may be due before the next tick: let it ring
        self.leases.expect(2 * LOOK_EVERY)  # also when this fails
        bound = self.store.rows("SELECT pid, birth FROM LOCKS WHERE birth IS NOT NULL UNION "
                                "SELECT pid, birth FROM AGENTS WHERE birth IS NOT NULL")
        dead = [(row["pid"], row["birth"]) for row in bound if not process_lives(row["pid"], row["birth"])]
        if dead or self._due() <= now.awake:
            listening = self.listening()
            with self.write() as tx:
                self._expire(tx, dead, listening)
        machine = self.clock.now().awake
        if self.store.trouble or not 0 <= machine - self.pruned < PRUNE_EVERY:  # when in trouble, see if it is over
            with self.write() as tx:
                prune(tx, max(0, machine - self.pruned))
            self.pruned = machine
        due = self._due()
        often = bound or due < MAX_INTEGER or self.store.trouble  # while there are leases, we look whether we are held up
        pause = max(0, min(due - now.awake + now.pause, LOOK_EVERY if often else TICK_AT_MOST))
        self.planned = now.awake + pause if often else MAX_INTEGER
        self.leases.expect(pause)
        return pause

    def _due(self) -> int:
        """The earliest end of anything, on the clock of leases."""
        return int(self.store.value("SELECT min(coalesce(x, ?)) FROM (SELECT min(expires) AS x FROM LOCKS UNION ALL SELECT "
                                    "min(expires) FROM CLOSED UNION ALL SELECT min(expires) FROM AGENTS WHERE alive UNION "
                                    "ALL SELECT min(expires) FROM SERVICES UNION ALL SELECT min(expires) FROM MESSAGES "
                                    "WHERE expires IS NOT NULL UNION ALL SELECT min(due) FROM TASKS WHERE due > 0)",
                                    MAX_INTEGER))

    def _expire(self, tx: Transaction, dead: Sequence[tuple[int, int]], listening: Mapping[int, Any]) -> None:
        def survives(service: Any) -> bool:
            if service["birth"] is not None:
                return process_lives(service["pid"], service["birth"])
            return service["port"] in listening

        awake = tx.now.awake
        lock_sweep(tx, "expires <= ?", awake)
        lock_open(tx)
        ended = [row["id"] for row in tx.rows("SELECT id FROM AGENTS WHERE alive AND expires <= ?", awake)]
        for process in dead:
            lock_sweep(tx, "pid = ? AND birth = ?", *process, reason="process")
            ended += [row["id"] for row in tx.rows("SELECT id FROM AGENTS WHERE alive AND pid = ? AND birth = ?", *process)]
        for agent in dict.fromkeys(ended):
            agent_die(tx, agent, survives)
        service_delete(tx, tx.rows("SELECT * FROM SERVICES WHERE expires <= ?", awake), None)
        message_sweep(tx)
        task_sweep(tx)


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
            if len(shown) > 60 or self.kind.hidden:
                shown = f"{type(value).__name__} of {len(shown)} characters"
            raise PortDaddyError("BAD_VALUE", f"{self.wire} must be {self.kind.expected}; it was {shown}",
                                 field=self.wire, expected=self.kind.expected) from None
        except PortDaddyError as problem:  # too large, or not JSON
            raise PortDaddyError(problem.code, f"{self.wire}: {problem}", field=self.wire) from None

    def schema(self) -> Reply:
        """What JSON Schema can say of it, and the rest in words."""
        return {**self.kind.schema(), "description": self.kind.expected}


class Operation:
    """One thing that can be asked, and the words that every face uses for it."""

    def __init__(self, function: Callable[..., Any], routes: Sequence[str], command: str, aliases: str, shows: str,
                 quiet: str, example: str, errors: str) -> None:
        self.function, self.name, self.shows, self.quiet = function, function.__name__, shows, quiet
        self.errors = errors.split()
        self.example = example or f"pd {command.partition(' [')[0]}"
        self.routes = [tuple(route.split(" ")) for route in routes]
        self.command, self.aliases = command.partition(" [")[0], aliases.split()
        self.positional = re.findall(r"\[(\w+)\]", command)
        self.summary = (function.__doc__ or "").split("\n")[0]

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """By wire name; worked out when first needed, since a short command needs one operation of fifty."""
        from typing import get_type_hints
        function, hints = self.function, get_type_hints(self.function, include_extras=True)
        names = function.__code__.co_varnames[2:function.__code__.co_argcount]
        defaults = dict(zip(reversed(names), reversed(function.__defaults__ or ())))
        return {camel(name): Field(name, camel(name), kind_of(hints[name]), name not in defaults, defaults.get(name))
                for name in names}

    def bind(self, given: Mapping[str, Any], read: Mapping[str, str]) -> dict[str, Any]:
        """The arguments from JSON values and from texts: every one checked, nothing unknown, nothing missing."""
        fields, values = self.fields, {}
        for source, texts in ((given, False), (read, True)):
            for wire, value in source.items():
                field = fields.get(wire)
                if field is None:
                    raise self._unknown(wire)
                if value is not None or field.kind.nullable:
                    if field.name in values:
                        raise PortDaddyError("BAD_VALUE", f"{wire} was given twice, in the path or query and in the body",
                                             field=wire)
                    values[field.name] = field.check(value, texts)
        for field in fields.values():
            if field.required and field.name not in values:
                raise PortDaddyError("BAD_VALUE", f"{field.wire} is missing: {field.kind.expected}", field=field.wire,
                                     expected=field.kind.expected)
        return values

    def _unknown(self, wire: str) -> PortDaddyError:
        near = nearest(wire, self.fields)
        hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(self.fields) or 'none'}"
        return PortDaddyError("UNKNOWN_FIELD", f"{self.name} has no field {wire[:60]!r}; {hint} "
                              f"(this daemon is version {__version__})", field=wire[:60], version=__version__)


KEYED = ("/msg", "/locks", "/webhooks")  # where a POST honours an Idempotency-Key


def perform(daemon: Daemon, asker: Asker, one: Operation, path: str, fields: dict[str, Any]) -> Any:
    """Run an operation; under an Idempotency-Key once, whoever asks again with the same key, path and agent gets the answer
    of the first. What failed has changed nothing, and is tried again.

    (https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header)"""
    if asker.key is None:
        return one.function(daemon, asker, **fields)
    import hashlib
    scope, body = (hashlib.blake2b(text.encode(), digest_size=16).digest()
                   for text in (f"{asker.key} {path} {asker.agent}", json.dumps(fields, sort_keys=True)))
    while daemon.performing.setdefault(scope, body) is not body:  # one step: the first is the first
        if daemon.performing.get(scope, body) != body:
            raise PortDaddyError("KEY_REUSED")
        daemon.wait(asker, lambda: scope not in daemon.performing or None, 3_600_000, [f"key:{scope.hex()}"])
        asker.stay()
    try:
        row = answer_row(daemon.store, scope, daemon.now().awake)
        if row and row["body"] != body:
            raise PortDaddyError("KEY_REUSED")
        asker.request = scope, body
        return from_json(row["reply"]) if row else one.function(daemon, asker, **fields)
    finally:
        del daemon.performing[scope]
        daemon.bell.ring(f"key:{scope.hex()}")


OPERATIONS: list[Operation] = []
F = TypeVar("F", bound=Callable[..., Any])


def operation(*routes: str, command: str = "", aliases: str = "", shows: str = "", quiet: str = "", example: str = "",
              errors: str = "") -> Callable[[F], F]:
    """Declare an operation. `shows` names what a terminal shows of a listing, `quiet` the one value that -q prints,
    `errors` the codes that are its own: every one may answer that a field, or the request as a whole, is not right."""
    def declare(function: F) -> F:
        OPERATIONS.append(Operation(function, routes, command, aliases, shows, quiet, example, errors))
        return function
    return declare


Stream = Generator[bytes, None, None]  # a reply without an end: the parts of an event stream (WHATWG HTML, 9.2)


def ok(*warnings: Optional[str], **facts: Any) -> Reply:
    reply = {"success": True, **facts}
    if any(warnings):
        reply["warning"] = "; ".join(filter(None, warnings))
    return reply


def listing(name: str, rows: list[Any]) -> Reply:
    return {"success": True, name: rows, "count": len(rows)}


_stored = json.JSONDecoder()


def from_json(text: Optional[str]) -> Any:
    """A JSON column: written by us, so that what `loads` does around the decoding is not needed."""
    return None if text is None else _stored.raw_decode(text)[0]


def wall(now: Now, expires: Optional[int]) -> Optional[int]:
    """When a lease that ends on the clock of leases will end on the wall's, if nobody sleeps or sets the clock."""
    return None if expires is None else now.wall + now.pause + expires - now.awake


def bind_pid(pid: Optional[int]) -> tuple[dict[str, Any], Optional[str]]:
    """The columns that bind something to a process, and a warning when the process cannot be seen."""
    if pid is None:
        return {}, None
    birth = process_birth(pid)
    return {"pid": pid, "birth": birth}, None if birth is not None else (
        f"pid {pid} cannot be seen from here (another container, or it has ended): it is noted, and nothing ends with it")


def present(**columns: Any) -> dict[str, Any]:
    """The columns that were given."""
    return {name: value for name, value in columns.items() if value is not None}


def quota(tx: Transaction, agent: Optional[str], column: str, table: str, owner: str) -> None:
    """Refuse when a registered agent has as many as it allowed itself."""
    row = agent_alive(tx, agent, tx.now.awake)
    if row and row[column] is not None:
        most, current = row[column], tx.value(f"SELECT count(*) FROM {table} WHERE {owner} = ? AND ifnull(expires > ?, 1)",
                                              agent, tx.now.awake)
        if current >= most:
            raise PortDaddyError("LIMIT", f"agent {agent} has {current} {table.lower()}, and registered with at most "
                                 f"{most}; release one, or register again with a higher limit", current=current, max=most)


def need(db: Sql, table: str, id: str, words: str) -> Any:
    """The row of that id, or NOT_FOUND."""
    row = db.row(f"SELECT * FROM {table} WHERE id = ?", id)
    if not row:
        raise PortDaddyError("NOT_FOUND", words.format(id), id=id)
    return row


# --- services ---------------------------------------------------------------------------------------------------------

def service_views(daemon: Daemon, condition: str, *values: Any) -> list[Reply]:
    """The services that fit, as they are shown. SQL gives the names, since there may be a thousand rows."""
    now, rows = daemon.now(), daemon.store.rows(
        "SELECT id, port, pid, agent AS agentId, status, cmd, cwd, created AS createdAt, seen AS lastSeen, expires AS "
        "expiresAt, health, pair AS pairedWith, endpoints, metadata FROM SERVICES WHERE " + condition, *values)
    names, views = rows[0].keys() if rows else [], []
    for row in rows:
        view = dict(zip(names, row))
        view["endpoints"] = view["urls"] = from_json(view["endpoints"])
        view["expiresAt"], view["metadata"] = wall(now, view["expiresAt"]), from_json(view["metadata"])
        views.append(view)
    return views


def health_view(row: Any) -> Reply:
    healthy = None if row["healthy"] is None else bool(row["healthy"])
    return {"id": row["id"], "healthy": healthy, "status": row["status"], "latency": row["latency"],
            "checkedAt": row["checked"], "error": row["error"]}


def need_service(db: Sql, identity: str) -> Any:
    return need(db, "SERVICES", identity, "there is no service {}; claim it first, or see `pd find`")


def candidate_ports(daemon: Daemon, tx: Transaction, identity: str, limits: Optional[tuple[int, int]]) -> Iterator[int]:
    """The ports to try by ourselves: from a hash of the identity upwards, round the range once."""
    low, high = limits or daemon.settings.range
    size = high - low + 1
    avoid = WELL_KNOWN_PORTS | BLOCKED_PORTS | set(daemon.listening()) | {daemon.port}
    first, last = (0, 0) if limits else ephemeral_ports()
    start = zlib.crc32(identity.encode()) % size
    for step in range(size):
        port = low + (start + step) % size
        if step % 32 == 0 or port == low:  # a window at a time, for there may be thousands
            taken = {row["port"] for row in tx.rows("SELECT port FROM SERVICES WHERE port BETWEEN ?1 AND ?1 + 31", port)}
        if port not in avoid and port not in taken and not first <= port <= last:
            yield port


def who_has(daemon: Daemon, tx: Transaction, identity: str, port: int, reuse: bool) -> Optional[str]:
    """Words for whoever is in the way of a port; None when a program could bind it now."""
    if port == daemon.port:
        return "this daemon itself"
    other = tx.value("SELECT id FROM SERVICES WHERE port = ? AND id <> ?", port, identity)
    if other:
        return f"the service {other}"
    if port_free(port, reuse):
        return None
    if port < 1024 and os.geteuid() != 0 and port not in daemon.listening():
        return "the system, which lets only root bind ports below 1024,"
    return port_holder(port)[1]


def choose_port(daemon: Daemon, tx: Transaction, identity: str, wanted: Optional[int], exact: bool,
                limits: Optional[tuple[int, int]]) -> tuple[int, Optional[str]]:
    """A port that could be bound just now, and what stands in the way of the one that was wanted.

    Probed inside the transaction: an assigned port is never probed, since that could make its owner fail, and no other
    claim can assign this one meanwhile."""
    former, warning = tx.value("SELECT port FROM FORMER_PORTS WHERE id = ?", identity), None
    fits = former and (limits is None or limits[0] <= former <= limits[1])
    first = wanted or (former if fits else None)
    if first:
        holder = who_has(daemon, tx, identity, first, reuse=first == former)
        if holder is None:
            return first, None
        warning = f"{'port' if wanted else 'its usual port'} {first} is taken by {holder}"
        if wanted and exact:
            raise PortDaddyError("PORT_TAKEN", f"{warning}; stop that, or take any other (without exact)", port=wanted,
                                 holder=holder)
    for port in candidate_ports(daemon, tx, identity, limits):
        if port_free(port):
            return port, warning
    low, high = limits or daemon.settings.range
    raise PortDaddyError("NO_PORTS", f"no port from {low} to {high} is free; release some, or widen the range "
                         "(PORT_DADDY_RANGE)", range=[low, high])


@operation("POST /claim", command="claim", quiet="port", example="PORT=$(pd claim myapp:api:main -q)",
           errors="PORT_TAKEN PORT_HIJACKED NO_PORTS LIMIT TARGET_REFUSED")
def claim(daemon: Daemon, asker: Asker, id: Identity, port: Optional[Port] = None, exact: Bool = False,
          range: Optional[PortRange] = None, agent: Optional[AgentId] = None, pid: Optional[Pid] = None,
          cmd: Optional[Line] = None, cwd: Optional[Line] = None, expires: Optional[Lifetime] = None,
          pair: Optional[Identity] = None, health: Optional[HttpUrl] = None, move: Bool = False,
          metadata: Optional[Metadata] = None) -> Reply:
    """Claim a port by name: the same identity gets the same port, and nobody else gets it."""
    if health:
        daemon.check_target(health, by_name=False)
    bound, unseen = bind_pid(pid)
    given = {**bound, **present(agent=asker.who(agent), cmd=cmd, cwd=cwd, pair=pair, health=health,
                                metadata=maybe_json(metadata))}
    there = refuse_stranger(daemon, id, move)
    with daemon.write() as tx:
        known, warning, columns = service_row(tx, id), None, {**given}
        if not known or given.get("agent", known["agent"]) != known["agent"]:
            quota(tx, given.get("agent"), "max_services", "SERVICES", "agent")
        if expires:
            columns.update(ttl=expires, expires=tx.lasts(expires))
        in_the_way = "its own server, which listens there" if known and there else None
        if known and not there and port not in (None, known["port"]):
            in_the_way = who_has(daemon, tx, id, port or 0, reuse=False)
        if known and not move and (in_the_way or port in (None, known["port"])):
            chosen = known["port"]
            if port not in (None, chosen):
                warning = f"{id} keeps port {chosen}, because of {in_the_way}" + ("" if there else f" on port {port}")
                if exact:
                    raise PortDaddyError("PORT_TAKEN", f"{warning}; stop that, or do not insist (exact)", port=port)
        else:
            chosen, warning = choose_port(daemon, tx, id, port, exact, range)
            tx.run("DELETE FROM FORMER_PORTS WHERE id = ?", id)
            place = {"port": chosen, "born": since_boot(), "claimer": asker.pid, "status": "assigned"}
            local = {"local": f"http://localhost:{chosen}"}
            if known:
                warning = f"{id} moved from port {known['port']} to {chosen}" + (f"; {warning}" if warning else "")
                columns.update(place, endpoints=to_json({**from_json(known["endpoints"]), **local}))
            else:
                insert(tx, "SERVICES", id=id, created=tx.now.wall, seen=tx.now.wall, endpoints=to_json(local), **place,
                       **columns)
        changed = {name: value for name, value in columns.items() if known and known[name] != value}
        if known and (known["claimer"] is None or not process_lives(known["claimer"], None)):
            changed = {**changed, **present(claimer=asker.pid)}  # the one who claimed first stays, while it lives
        if changed:
            service_update(tx, id, **{**changed, "seen": tx.now.wall})
        if not known or set(changed) - {"pid", "birth", "ttl", "expires", "claimer"}:
            tx.emit("service.claim", id, given.get("agent"), serviceId=id, port=chosen, agentId=given.get("agent"),
                    existing=known is not None)
        if not known or chosen != known["port"]:
            daemon.adopted.pop(id, None)
            tx.ring("checker", f"service:{id}")
        row = known if known and not changed else need_service(tx, id)
    kept = known is not None and chosen == known["port"]
    return ok(warning, unseen, id=id, port=chosen, status=row["status"], existing=known is not None,
              preferred=port in (None, chosen), endpoints=from_json(row["endpoints"]),
              message=f"{id} {'still has' if kept else 'has'} port {chosen}")


def refuse_stranger(daemon: Daemon, identity: str, move: bool) -> bool:
    """Whether the server of a known service listens on its port; PORT_HIJACKED when somebody else does.

    Asked before the transaction, since finding the process behind a socket can take milliseconds."""
    port = daemon.store.value("SELECT port FROM SERVICES WHERE id = ?", identity)
    there = daemon.listening().get(port, []) if port else []
    known = service_row(daemon.store, identity) if there else None
    if known is None or known["status"] == "running" and daemon.adopted.get(identity) == there[0].key:
        return known is not None
    stranger, _ = daemon.stranger(known, there)
    if stranger and not move:
        daemon.observe()
        raise PortDaddyError("PORT_HIJACKED", f"port {known['port']} of {identity} is used by "
                             f"{process_command(stranger)} (pid {stranger}), which ran before the claim; stop it, or let "
                             "the service move (move)",
                             port=known["port"], pid=stranger, command=process_command(stranger))
    return True


@operation("DELETE /release", "POST /release", command="release [id]", quiet="released", example="pd release 'myapp:*'")
def release(daemon: Daemon, asker: Asker, id: Optional[ServicePattern] = None, force: Bool = False,
            expired: Bool = False) -> Reply:
    """Release a service, those that a pattern covers, or those whose time is over; they keep a claim to their ports."""
    if (id is None) != expired:
        raise PortDaddyError("BAD_VALUE", "give either id (an identity, or a pattern such as myapp:*) or expired",
                             field="id")
    if id is not None and not id.strip("*:") and not force:
        raise PortDaddyError("BAD_VALUE", f"{id} would release every service; add force if that is meant",
                             field="force")
    with daemon.write() as tx:
        which, value = ("expires <= ?", tx.now.awake) if expired else ("id GLOB ? ORDER BY id", id)
        rows = tx.rows(f"SELECT * FROM SERVICES WHERE {which}", value)
        ports = service_delete(tx, rows, asker.who(None))
    return ok(released=len(ports), releasedPorts=ports,
              message=f"released {len(ports)} service{'s' * (len(ports) != 1)}" if ports else
              f"there is no service {id or 'whose time is over'}; nothing was released")


@operation("DELETE /services/{id}")
def remove_service(daemon: Daemon, asker: Asker, id: Identity) -> Reply:
    """Release one service."""
    return release(daemon, asker, id)


@operation("GET /services", command="find [pattern]", aliases="ps services",
           shows="services: id port status pid agentId endpoints.local", quiet="id", example="pd find 'myapp:*'")
def list_services(daemon: Daemon, asker: Asker, pattern: ServicePattern = "*", status: Optional[Status] = None,
                  port: Optional[Port] = None, expired: Optional[Bool] = None, limit: Optional[Rows] = None) -> Reply:
    """List the services that a pattern covers."""
    return listing("services", service_views(
        daemon, "id GLOB ? AND (? IS NULL OR status = ?) AND (? IS NULL OR port = ?) AND (? IS NULL OR (expires IS NOT "
        "NULL AND expires <= ?) = ?) ORDER BY id LIMIT ?",
        pattern, status, status, port, port, expired, daemon.now().awake, expired, limit or -1))


@operation("GET /services/health", shows="services: id healthy status latency checkedAt error", quiet="id")
def list_health(daemon: Daemon, asker: Asker) -> Reply:
    """List what is known of the health of every service."""
    return listing("services", [health_view(row) for row in daemon.store.rows("SELECT * FROM SERVICES ORDER BY id")])


@operation("GET /services/health/{id}", errors="NOT_FOUND")
def service_health(daemon: Daemon, asker: Asker, id: Identity) -> Reply:
    """Whether a service is well: by a check that it passed in the last five seconds, else by a new one."""
    row = need_service(daemon.store, id)
    fresh = row["healthy"] and 0 <= daemon.now().wall - (row["checked"] or 0) < HEALTH_EVERY
    if not fresh and not daemon.supervised(row):
        daemon.observe()
        daemon.check_health(row)
        row = need_service(daemon.store, id)
    return ok(**health_view(row))


@operation("GET /services/{id}", errors="NOT_FOUND")
def get_service(daemon: Daemon, asker: Asker, id: Identity) -> Reply:
    """Everything about one service."""
    service = next(iter(service_views(daemon, "id = ?", id)), None) or need_service(daemon.store, id)
    return ok(**service, service=service)


@operation("PUT /services/{id}", errors="NOT_FOUND TARGET_REFUSED")
def update_service(daemon: Daemon, asker: Asker, id: Identity, status: Optional[Status] = None,
                   pid: Optional[Pid] = None, health: Optional[HttpUrl] = None, latency: Optional[Latency] = None,
                   error: Optional[Line] = None, checked_by: Optional[AgentId] = None,
                   metadata: Optional[Metadata] = None) -> Reply:
    """Report on a service: what state it is in and, by whoever checks it, how well it is."""
    if health:
        daemon.check_target(health, by_name=False)
    bound, warning = bind_pid(pid)
    with daemon.write() as tx:
        need_service(tx, id)
        service_update(tx, id, seen=tx.now.wall, **bound, **present(
            status=status, health=health, metadata=maybe_json(metadata), checker=checked_by, error=error))
        tx.ring("checker")
    checked, down = checked_by or latency is not None or error is not None, status in ("stopped", "crashed", "dead")
    if down or checked and status in (None, "running", "detached", "unhealthy"):
        daemon.report_health(id, not down and error is None and status != "unhealthy", latency, error, checked_by)
    return ok(warning, **get_service(daemon, asker, id))


@operation("PUT /services/{id}/endpoints/{env}", command="endpoint set", quiet="url",
           example="pd endpoint set myapp:api:main staging https://api.example.com", errors="NOT_FOUND TOO_LARGE")
def set_endpoint(daemon: Daemon, asker: Asker, id: Identity, env: EndpointName, url: EndpointUrl) -> Reply:
    """Say at which URL a service is found in an environment, such as local or staging."""
    with daemon.write() as tx:
        endpoints = {**from_json(need_service(tx, id)["endpoints"]), env: url}
        if len(to_json(endpoints)) > MAX_METADATA:
            raise PortDaddyError("TOO_LARGE", "the endpoints of one service may take at most 10 KB", limit=MAX_METADATA)
        service_update(tx, id, endpoints=to_json(endpoints))
    return ok(id=id, url=url, endpoints=endpoints, message=f"{id} is at {url} in {env}")


@operation("DELETE /services/{id}/endpoints/{env}", command="endpoint rm", quiet="removed",
           example="pd endpoint rm myapp:api:main staging", errors="NOT_FOUND")
def remove_endpoint(daemon: Daemon, asker: Asker, id: Identity, env: EndpointName) -> Reply:
    """Forget the URL of a service in an environment."""
    with daemon.write() as tx:
        endpoints = from_json(need_service(tx, id)["endpoints"])
        removed = endpoints.pop(env, None) is not None
        service_update(tx, id, endpoints=to_json(endpoints))
    return ok(id=id, removed=removed, message=f"{id} had {'one' if removed else 'no'} endpoint {env}")


def missing_services(daemon: Daemon, identities: Sequence[str]) -> list[str]:
    """Which of them are not running, or have a check that they have not passed."""
    marks = ",".join("?" * len(identities))
    well = {row["id"] for row in daemon.store.rows(
        f"SELECT id FROM SERVICES WHERE id IN ({marks}) AND status IN ('running', 'detached') AND "
        "(health IS NULL OR healthy)", *identities)}
    return [identity for identity in identities if identity not in well]


@operation("POST /wait", command="wait", quiet="healthy", example="pd wait myapp:db:main myapp:api:main --timeout 30s",
           errors="TIMED_OUT")
def wait_for_services(daemon: Daemon, asker: Asker, services: IdentityList, timeout: WaitTime = 60_000) -> Reply:
    """Wait until services run and, where they have a health check, have passed it."""
    topics = [f"service:{identity}" for identity in dict.fromkeys(services)]
    if not daemon.wait(asker, lambda: not missing_services(daemon, services) or None, timeout, topics, rings="checker"):
        waiting = missing_services(daemon, services)
        rows = {identity: service_row(daemon.store, identity) for identity in waiting}
        states = [f"{identity} ({row['status'] if row else 'never claimed'})" for identity, row in rows.items()]
        raise PortDaddyError("TIMED_OUT", f"not up after {span(timeout)}: {', '.join(states)}", waitingFor=waiting)
    found = [view for identity in services for view in service_views(daemon, "id = ?", identity)]
    return ok(services=found, healthy=True, message=f"{', '.join(services)}: up")


@operation("GET /wait/{id}", errors="TIMED_OUT")
def wait_for_service(daemon: Daemon, asker: Asker, id: Identity, timeout: WaitTime = 60_000) -> Reply:
    """Wait until one service runs and, where it has a health check, has passed it."""
    return wait_for_services(daemon, asker, [id], timeout)


@operation("POST /services/{id}/logs")
def add_logs(daemon: Daemon, asker: Asker, id: Identity, lines: LogLines) -> Reply:
    """Send in what a service printed; its last 1,000 lines are kept."""
    with daemon.write() as tx:
        line_append(tx, id, lines)
    return ok(added=len(lines))


@operation("GET /services/{id}/logs", errors="NOT_FOUND")
def get_logs(daemon: Daemon, asker: Asker, id: Identity, tail: Tail = 100, after: Cursor = 0,
             follow: Bool = False) -> Union[Reply, Stream]:
    """Read the last lines that a service printed or, with follow, go on as Server-Sent Events."""
    start, newest = max(after, asker.after or 0), daemon.store.ids.value  # before the rows: what comes meanwhile is new
    rows = line_list(daemon.store, id, start, tail) if tail else []
    if not follow:
        if not rows and not daemon.store.value("SELECT 1 FROM LINES WHERE service = ?", id):
            need_service(daemon.store, id)
        return listing("lines", [dict(row) for row in rows])
    cursor = rows[-1]["id"] if rows else start or newest

    def read() -> list[bytes]:
        nonlocal cursor
        found = line_list(daemon.store, id, cursor, KEEP_LINES)
        cursor = found[-1]["id"] if found else cursor
        return [sse("message", dict(row), row["id"]) for row in found]

    opening = b"".join([sse("connected", {"lastId": cursor}), *(sse("message", dict(row), row["id"]) for row in rows)])
    return follow_topics(daemon, asker, [f"lines:{id}"], opening, read)


@operation("GET /ports/system", command="ports", shows="ports: port pid service command", quiet="port",
           example="pd ports --unmanaged-only")
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
    freed = [row["id"] for row in rows]
    return ok(freed=freed, count=len(freed), message=f"freed {', '.join(freed) or 'nothing'}")


# --- channels ---------------------------------------------------------------------------------------------------------

def message_view(row: Any) -> Reply:
    return {"id": row["id"], "channel": row["channel"], "payload": from_json(row["payload"]), "sender": row["sender"],
            "createdAt": row["created"]}


def loss(daemon: Daemon, pattern: str, after: int) -> Reply:
    """What a reader that stopped at an id must be told: that messages after it are gone, or that it read elsewhere."""
    if after > daemon.store.ids.value:
        return {"reset": True}
    dropped = channel_dropped(daemon.store, pattern)
    return {"gap": {"from": after, "to": dropped}} if dropped > after else {}


@operation("POST /msg/{channel}", command="pub", quiet="id", example="pd pub tasks '{\"action\": \"build\"}'",
           errors="CHANNEL_FULL KEY_REUSED")
def publish(daemon: Daemon, asker: Asker, channel: ChannelName, payload: Payload, sender: Optional[AgentId] = None,
            expires: Optional[Lifetime] = None) -> Reply:
    """Publish a message: to one worker of each group, to everybody who follows, and to the log of the channel."""
    with daemon.write() as tx:
        number = message_append(tx, channel, payload, asker.who(sender), expires)
        return asker.answer(tx, ok(id=number, channel=channel, message=f"published as {number} in {channel}"))


@operation("GET /msg/{channel}", shows="messages: id createdAt sender payload", quiet="payload")
def get_messages(daemon: Daemon, asker: Asker, channel: ChannelName, limit: Count = 50,
                 after: Optional[Cursor] = None) -> Reply:
    """Read messages without consuming them: those after an id, or the newest; oldest first."""
    daemon.sweep_messages()
    if after is None:
        # Before the rows: what is published meanwhile comes after it.
        last = daemon.store.value("SELECT last FROM CHANNELS WHERE name = ?", channel) or 0
        rows = daemon.store.rows("SELECT * FROM MESSAGES WHERE channel = ? ORDER BY id DESC LIMIT ?", channel, limit)[::-1]
    else:
        last = after if after <= daemon.store.ids.value else 0
        rows = message_list(daemon.store, channel, last, limit)
    lost = {} if after is None else loss(daemon, channel, after)  # after the rows: what went meanwhile is announced
    last = rows[-1]["id"] if rows else last
    return {**listing("messages", [message_view(row) for row in rows]), "lastId": last, **lost}


@operation("GET /msg/{channel}/poll", command="poll", quiet="message.payload", example="pd poll tasks --timeout 30s")
def poll(daemon: Daemon, asker: Asker, channel: ChannelPattern, timeout: PollTime = 30_000, after: Optional[Cursor] = None,
         group: Optional[GroupName] = None, lease: Optional[Duration] = None,
         max_attempts: Optional[Count] = None) -> Reply:
    """Wait for the next message: as one worker of a group, or, with after, as a reader with a cursor of its own."""
    if after is not None and (group is not None or lease is not None):
        raise PortDaddyError("BAD_VALUE", "after reads every message with a cursor of your own; group and lease share them "
                             "among workers: give one or the other", field="after")
    if max_attempts is not None and lease is None:
        raise PortDaddyError("BAD_VALUE", "maxAttempts counts leases: give a lease, such as 30s, too", field="maxAttempts")
    if after is not None:
        return poll_after(daemon, asker, channel, timeout, after)
    if "*" in channel:
        raise PortDaddyError("BAD_VALUE", "a worker polls one channel by name; a pattern can be followed (pd sub), or "
                             "polled with after", field="channel")
    team = group or "default"
    seen = note_poll(daemon, channel, team)

    def take() -> Optional[tuple[Any, Optional[str], Now]]:
        daemon.sweep_messages()
        if not message_waiting(daemon.store, channel, team, daemon.now().awake):
            return None
        with daemon.write() as tx:
            found = message_take(tx, channel, team, lease, max_attempts or 5, asker.agent)
            asker.stay()
        return (*found, tx.now) if found else None

    taken = daemon.wait(asker, take, timeout, [f"channel:{channel}"], line=team)
    if not taken:
        if timeout:
            seen = note_poll(daemon, channel, team)
        return ok(message=None, lastId=seen)
    message, receipt, now = taken

    def put_back() -> None:
        with daemon.write() as tx:
            message_return(tx, channel, team, message["id"], receipt)

    asker.undo = put_back
    leased = {"receipt": receipt, "attempt": message["attempts"] + 1, "leaseExpiresAt": wall(now, now.awake + (lease or 0))}
    return ok(message=message_view(message), lastId=message["id"], **(leased if receipt else {}))


def note_poll(daemon: Daemon, channel: str, team: str) -> int:
    """Make a group known when it first polls, and tell when it last did, to the second; how far it has read."""
    row = daemon.store.row("SELECT * FROM READERS WHERE channel = ? AND team = ?", channel, team)
    if not row or daemon.now().awake - row["heard"] > 1_000:
        with daemon.write() as tx:
            reader_note(tx, channel, team)
    return row["cursor"] if row else 0


def poll_after(daemon: Daemon, asker: Asker, pattern: str, timeout: int, after: int) -> Reply:
    lost = loss(daemon, pattern, after)
    start = 0 if "reset" in lost else after

    def next_after() -> Optional[Any]:
        daemon.sweep_messages()
        return next(iter(message_list(daemon.store, pattern, start, 1)), None)

    topic = "channel:*" if "*" in pattern else f"channel:{pattern}"
    message = daemon.wait(asker, next_after, 0 if lost else timeout, [topic])  # who has lost something is told at once
    lost = lost or loss(daemon, pattern, after)
    gap = lost.get("gap", {}).get("to", 0)
    return ok(message=message and message_view(message), lastId=message["id"] if message else max(start, gap), **lost)


def sse(event: str, data: Any, number: Optional[int] = None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    name = f"event: {event}\n" if event != "message" else ""
    return f"{head}{name}data: {to_json(data)}\n\n".encode()


def follow_topics(daemon: Daemon, asker: Asker, topics: Sequence[str], opening: bytes,
                  read: Callable[[], list[bytes]]) -> Stream:
    """The life of a stream: the opening, what there is to read after each ring, a comment when nothing happens."""
    reader = daemon.bell.join([f"reader:{topic}" for topic in topics])  # to be counted, while it sends too
    try:
        yield b"retry: 1000\n" + opening
        while True:
            parts = daemon.wait(asker, lambda: read() or None, 15_000, topics)
            if parts is None and not asker.connected():
                return
            yield b"".join(parts) if parts else b": nothing new\n\n"
    finally:
        daemon.bell.leave(reader)


def begin_stream(daemon: Daemon, asker: Asker, after: Optional[int], **facts: Any) -> tuple[int, bytes]:
    """Where a reader begins, behind the last event that it has seen, else behind `after`, else now; and its opening."""
    current, start = daemon.store.ids.value, asker.after if asker.after is not None else after
    cursor, opening = current if start is None else start, sse("connected", {**facts, "lastId": current})
    if cursor > current:
        return 0, opening + sse("reset", {"from": cursor, "to": current})
    return cursor, opening


def follow_log(daemon: Daemon, asker: Asker, topics: Sequence[str], cursor: int, opening: bytes,
               rows: Callable[[int], list[Any]], dropped: Callable[[], int], show: Callable[[Any], bytes],
               sieved: bool = False) -> Stream:
    """A stream of the rows behind a cursor, and of the gaps where some were dropped before they were read. In a log that is
    `sieved`, what was not asked for has been read as well: when it goes, nothing is lost."""
    told = 0  # the highest dropped id that this reader has been told of

    def read() -> list[bytes]:
        nonlocal cursor, told
        current, found, parts = daemon.store.ids.value, rows(cursor), []
        lost = dropped()  # after the rows, so that no loss stays untold
        if lost > max(cursor, told):
            parts.append(sse("gap", {"from": cursor, "to": lost}))
            told = lost
        for row in found:
            cursor = row["id"]
            parts.append(show(row))
            if sum(map(len, parts)) > MAX_BODY:
                break  # the rest with the next look
        if sieved and not found:
            cursor = max(cursor, current)
        return parts

    return follow_topics(daemon, asker, topics, opening, read)


@operation("GET /msg/{channel}/subscribe")
def subscribe(daemon: Daemon, asker: Asker, channel: ChannelPattern, after: Optional[Cursor] = None) -> Stream:
    """Follow a channel, or all that a pattern covers, as Server-Sent Events; Last-Event-ID resumes exactly."""
    def rows(cursor: int) -> list[Any]:
        daemon.sweep_messages()
        return message_list(daemon.store, channel, cursor, 100)

    cursor, opening = begin_stream(daemon, asker, after, channel=channel)
    topic = "channel:*" if "*" in channel else f"channel:{channel}"
    return follow_log(daemon, asker, [topic], cursor, opening, rows, lambda: channel_dropped(daemon.store, channel),
                      lambda row: sse("message", message_view(row), row["id"]))


def need_task(tx: Transaction, channel: str, team: str, receipt: str) -> Any:
    row = task_row(tx, channel, team, receipt, tx.now.awake)
    if not row:
        raise PortDaddyError("STALE_RECEIPT", f"receipt {receipt} is not that of a running lease of the group {team}: it "
                             "was answered, or its time is over and another worker may have the message; stop its work",
                             channel=channel, group=team, receipt=receipt)
    return row


@operation("POST /msg/{channel}/ack", command="ack", quiet="id", example="pd ack tasks 42-57",
           errors="STALE_RECEIPT KEY_REUSED")
def ack(daemon: Daemon, asker: Asker, channel: ChannelName, receipt: Receipt, group: GroupName = "default") -> Reply:
    """Say that a leased message is done: the group will not get it again."""
    with daemon.write() as tx:
        row = need_task(tx, channel, group, receipt)
        task_done(tx, row)
        return asker.answer(tx, ok(id=row["message"], acked=True, message=f"{row['message']} is done"))


@operation("POST /msg/{channel}/nack", command="nack", quiet="dead",
           example="pd nack tasks 42-57 --error 'no compiler' --delay 10s", errors="STALE_RECEIPT KEY_REUSED")
def nack(daemon: Daemon, asker: Asker, channel: ChannelName, receipt: Receipt, group: GroupName = "default",
         delay: Delay = 0, error: Optional[Line] = None) -> Reply:
    """Give a leased message back: the group gets it again after the delay or, after its last attempt, it is dead."""
    with daemon.write() as tx:
        row = need_task(tx, channel, group, receipt)
        dead = task_fail(tx, row, error, delay)
        return asker.answer(tx, ok(id=row["message"], dead=dead, attempt=row["attempts"], message=(
            f"{row['message']} is {'dead' if dead else 'given back'} after attempt {row['attempts']} of {row['most']}")))


@operation("POST /msg/{channel}/touch", command="touch", quiet="leaseExpiresAt", example="pd touch tasks 42-57",
           errors="STALE_RECEIPT KEY_REUSED")
def touch(daemon: Daemon, asker: Asker, channel: ChannelName, receipt: Receipt, group: GroupName = "default",
          lease: Optional[Duration] = None) -> Reply:
    """Go on working on a leased message: its lease begins anew."""
    with daemon.write() as tx:
        row = need_task(tx, channel, group, receipt)
        ttl = lease or row["ttl"]
        task_update(tx, row, due=tx.lasts(ttl), ttl=ttl)
        return asker.answer(tx, ok(id=row["message"], leaseExpiresAt=wall(tx.now, tx.now.awake + ttl),
                                   message=f"{row['message']} is leased for {span(ttl)} more"))


@operation("GET /msg/{channel}/groups", command="groups", shows="groups: group backlog leased dead lastPollAt",
           quiet="group", example="pd groups tasks")
def list_groups(daemon: Daemon, asker: Asker, channel: ChannelName) -> Reply:
    """List the groups that work on a channel, and what each has before it."""
    rows = daemon.store.rows(
        "SELECT team, polled, (SELECT count(*) FROM MESSAGES WHERE channel = ?1 AND id > cursor) AS new, "
        "count(CASE WHEN receipt IS NULL AND due IS NOT NULL THEN 1 END) AS waiting, count(receipt) AS leased, "
        "count(died) AS dead FROM READERS LEFT JOIN TASKS USING (channel, team) WHERE READERS.channel = ?1 "
        "GROUP BY team ORDER BY team", channel)
    return listing("groups", [{"group": row["team"], "backlog": row["new"] + row["waiting"], "leased": row["leased"],
                               "dead": row["dead"], "lastPollAt": row["polled"]} for row in rows])


@operation("DELETE /msg/{channel}/groups/{group}", command="groups rm", quiet="removed",
           example="pd groups rm tasks builders")
def remove_group(daemon: Daemon, asker: Asker, channel: ChannelName, group: GroupName) -> Reply:
    """Forget a group, with its leases and its dead letters; when it polls again, it begins at the oldest message."""
    with daemon.write() as tx:
        removed = tx.run("DELETE FROM READERS WHERE channel = ? AND team = ?", channel, group) == 1
        tx.run("DELETE FROM TASKS WHERE channel = ? AND team = ?", channel, group)
    return ok(channel=channel, group=group, removed=removed,
              message=f"the group {group} is {'forgotten' if removed else 'not known'} in {channel}")


@operation("GET /msg/{channel}/dead", command="dead", shows="messages: id group attempts error diedAt payload", quiet="id",
           example="pd dead tasks")
def list_dead(daemon: Daemon, asker: Asker, channel: ChannelName, group: Optional[GroupName] = None) -> Reply:
    """List the dead letters: messages that a group has given up, and why."""
    rows = daemon.store.rows("SELECT MESSAGES.*, team, attempts, error, died FROM TASKS JOIN MESSAGES ON id = message "
                             "WHERE TASKS.channel = ? AND died IS NOT NULL AND team = ifnull(?, team) ORDER BY id, team",
                             channel, group)
    return listing("messages", [{**message_view(row), "group": row["team"], "attempts": row["attempts"],
                                 "error": row["error"], "diedAt": row["died"]} for row in rows])


@operation("POST /msg/{channel}/redrive", command="redrive", quiet="redriven", example="pd redrive tasks --id 42",
           errors="KEY_REUSED")
def redrive(daemon: Daemon, asker: Asker, channel: ChannelName, group: Optional[GroupName] = None,
            id: Optional[Cursor] = None) -> Reply:
    """Let dead letters be worked on again, all or one, with all their attempts before them."""
    with daemon.write() as tx:
        count = task_redrive(tx, channel, group, id)
        return asker.answer(tx, ok(redriven=count, message=f"{count or 'no'} dead letter{'s' * (count != 1)} of {channel} "
                                   f"wait{'s' * (count == 1)} again"))


@operation("DELETE /msg/{channel}", command="clear", quiet="deleted", example="pd clear tasks")
def clear_channel(daemon: Daemon, asker: Asker, channel: ChannelName) -> Reply:
    """Delete the messages of a channel; its readers are told that there was a gap."""
    with daemon.write() as tx:
        rows = tx.rows(f"SELECT {SIZE} FROM MESSAGES WHERE channel = ?", channel)
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
         "subscribers": daemon.bell.waiting(f"reader:channel:{row['name']}")} for row in rows])


# --- locks ------------------------------------------------------------------------------------------------------------

def lock_view(daemon: Daemon, name: str, rows: Sequence[Any], now: Now) -> Reply:
    """A lock: its first holder at the top, all of them under `holders`."""
    holders = [{"owner": row["owner"], "token": row["token"], "pid": row["pid"], "acquiredAt": row["acquired"],
                "expiresAt": wall(now, row["expires"])} for row in rows]
    first = holders[0] if holders else dict.fromkeys(("owner", "token", "pid", "acquiredAt", "expiresAt"))
    return {"name": name, "held": bool(rows), **first, "waiting": daemon.bell.waiting(f"lock:{name}"),
            "limit": rows[0]["seats"] if rows else None, "metadata": from_json(rows[0]["metadata"]) if rows else None,
            "holders": holders}


def lock_held(daemon: Daemon, name: str, waited: int) -> PortDaddyError:
    """The refusal of a lock: who holds it, since when and how long, who waits, and when to ask again."""
    now = daemon.now()
    rows, store = lock_rows(daemon.store, name, now.awake), daemon.store
    closed = store.value("SELECT expires FROM CLOSED WHERE name = ? AND expires > ?", name, now.awake)
    waiting, said = daemon.bell.waiting(f"lock:{name}"), f" after {span(waited)} of waiting" if waited else ""
    until = closed or min((row["expires"] for row in rows), default=now.awake + 100)
    left = until - now.awake + now.pause
    who = ", ".join(row["owner"] or "somebody without a name" for row in rows[:3]) + (" and others" if rows[3:] else "")
    state = (f"closed for {span(left)} more, since its last holder did not release it" if closed else
             f"held by {who} for {span(left)} more" if rows else "free this instant, for the first of those who wait")
    first = rows[0] if rows else {"owner": None, "acquired": None}
    return PortDaddyError(
        "LOCK_HELD", f"lock {name} is {state}{said}; give it longer (wait), or ask the holder",
        holder=first["owner"], heldSince=first["acquired"], expiresAt=wall(now, until) if rows else None,
        waiting=waiting, retryAfter=left, waited=waited)


@operation("POST /locks/{name...}", command="lock", quiet="token",
           example="TOKEN=$(pd lock db-migration --owner me --ttl 2m -q)",
           errors="LOCK_HELD LIMIT_MISMATCH LIMIT KEY_REUSED")
def lock(daemon: Daemon, asker: Asker, name: LockName, owner: Optional[AgentId] = None, ttl: Duration = 300_000,
         wait: LockWait = 0, pid: Optional[Pid] = None, limit: Count = 1, lock_delay: Delay = 0,
         metadata: Optional[Metadata] = None) -> Reply:
    """Take a lock, or wait for it in line: one holder (or limit), a lease that ends, a fencing token that only grows."""
    owner, began = asker.who(owner), time.monotonic()
    bound, warning = bind_pid(pid)

    def take() -> Optional[Reply]:
        with daemon.write() as tx:
            quota(tx, owner, "max_locks", "LOCKS", "owner")
            token = lock_take(tx, name, owner, ttl, pid, bound.get("birth"), limit, lock_delay, metadata)
            if not token:
                return None
            if bound:
                tx.ring("keeper")
            asker.undo = lambda: give_back(token)
            return asker.answer(tx, ok(
                warning, name=name, owner=owner, token=token, acquiredAt=tx.now.wall,
                expiresAt=wall(tx.now, tx.now.awake + ttl), waited=round((time.monotonic() - began) * 1000),
                message=f"{owner or 'somebody'} holds {name} for {span(ttl)}"))

    def give_back(token: int) -> None:
        with daemon.write() as tx:
            row = tx.row("SELECT * FROM LOCKS WHERE name = ? AND token = ?", name, token)
            if row:
                lock_free(tx, row, "lock.release", "the holder had gone before it was told")

    grant = daemon.wait(asker, take, wait, [f"lock:{name}"], line="", turn=True)
    if grant is None:
        lock_agree(name, lock_rows(daemon.store, name, daemon.now().awake), limit)
        raise lock_held(daemon, name, round((time.monotonic() - began) * 1000) if wait else 0)
    return grant


def own_lock(tx: Transaction, asker: Asker, name: str, owner: Optional[str], token: Optional[int]) -> Optional[Any]:
    """The lease, if the asker may extend or release it: by its current token, else as its owner. None: the lock is free."""
    rows = lock_rows(tx, name, tx.now.awake)
    row = next((row for row in rows if token in (None, row["token"])), None)
    if token is not None:
        if row:
            return row
        raise LockLost("LOCK_LOST", f"token {token} is no longer one of lock {name}: its lease ended"
                       f"{' and ' + (rows[0]['owner'] or 'somebody else') + ' holds it' if rows else ''}; stop, and take "
                       "it again",
                       holder=rows[0]["owner"] if rows else None)
    if row and row["seats"] > 1:
        raise PortDaddyError("BAD_VALUE", f"lock {name} has room for {row['seats']} holders: say by its token which one is "
                             "meant", field="token")
    if row and row["owner"] not in (None, asker.who(owner)):
        raise PortDaddyError("NOT_OWNER", f"lock {name} is held by {row['owner']}; say that you are that owner (owner), or "
                             "give its token; unlock can also be forced", holder=row["owner"])
    return row


@operation("PUT /locks/{name...}", command="extend", quiet="expiresAt",
           example="pd extend db-migration --token $TOKEN --ttl 2m", errors="LOCK_LOST NOT_OWNER")
def extend_lock(daemon: Daemon, asker: Asker, name: LockName, owner: Optional[AgentId] = None,
                token: Optional[Fence] = None, ttl: Duration = 300_000) -> Reply:
    """Give the holder more time from now on, or fail with LOCK_LOST when the lock has moved on."""
    with daemon.write() as tx:
        row = own_lock(tx, asker, name, owner, token)
        if not row:
            raise LockLost("LOCK_LOST", f"nobody holds lock {name}; if you did, its lease has ended: stop, and take it "
                           "again", holder=None)
        tx.run("UPDATE LOCKS SET expires = ?, ttl = ? WHERE name = ? AND token = ?", tx.lasts(ttl), ttl, name, row["token"])
    return ok(name=name, owner=row["owner"], token=row["token"], expiresAt=wall(tx.now, tx.now.awake + ttl),
              message=f"{name} is held for {span(ttl)} more")


@operation("DELETE /locks/{name...}", command="unlock", quiet="released",
           example="pd unlock db-migration --token $TOKEN", errors="LOCK_LOST NOT_OWNER")
def unlock(daemon: Daemon, asker: Asker, name: LockName, owner: Optional[AgentId] = None,
           token: Optional[Fence] = None, force: Bool = False) -> Reply:
    """Release a lock to the first of those who wait for it; by force, whoever holds it."""
    with daemon.write() as tx:
        rows = lock_rows(tx, name, tx.now.awake) if force else filter(None, [own_lock(tx, asker, name, owner, token)])
        released = [lock_free(tx, row, "lock.release", "forced" if force else "released") for row in rows]
    return ok(name=name, released=bool(released), message=f"released {name}" if released else f"nobody held {name}")


@operation("GET /locks/{name...}", command="check", quiet="valid|held", example="pd check db-migration")
def check_lock(daemon: Daemon, asker: Asker, name: LockName, token: Optional[Fence] = None) -> Reply:
    """Who holds a lock, and, given a token, whether that is still a current one."""
    now = daemon.now()
    reply = ok(**lock_view(daemon, name, lock_rows(daemon.store, name, now.awake), now))
    if token is not None:
        reply["valid"] = token in [holder["token"] for holder in reply["holders"]]
    return reply


@operation("GET /locks", command="locks [pattern]", shows="locks: name owner token expiresAt waiting limit pid",
           quiet="name")
def list_locks(daemon: Daemon, asker: Asker, owner: Optional[AgentId] = None, pattern: LockPattern = "*") -> Reply:
    """List the locks that are held."""
    now = daemon.now()
    held: dict[str, list[Any]] = {}
    for row in daemon.store.rows("SELECT * FROM LOCKS WHERE expires > ? AND name GLOB ? AND (? IS NULL OR owner = ?) "
                                 "ORDER BY name, token", now.awake, pattern, owner, owner):
        held.setdefault(row["name"], []).append(row)
    return listing("locks", [lock_view(daemon, name, rows, now) for name, rows in held.items()])


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


@operation("POST /agents", command="agent register [id]", quiet="agentId",
           example="pd agent register builder-1 --ttl 10m")
def register(daemon: Daemon, asker: Asker, id: Optional[AgentId] = None, name: Optional[Word] = None,
             type: Optional[Word] = None, pid: Optional[Pid] = None, ttl: Optional[Duration] = None,
             metadata: Optional[Metadata] = None, max_services: Optional[Quota] = None,
             max_locks: Optional[Quota] = None) -> Reply:
    """Register an agent, or again with what has changed; it lives for its ttl after each heartbeat (2 minutes)."""
    agent = id or asker.agent or f"agent-{os.urandom(4).hex()}"
    bound, warning = bind_pid(pid)
    columns = {**bound, **present(name=name, type=type, metadata=maybe_json(metadata), max_services=max_services,
                                  max_locks=max_locks)}
    with daemon.write() as tx:
        before = tx.row("SELECT * FROM AGENTS WHERE id = ?", agent)
        lifetime = ttl or (before["ttl"] if before else 120_000)
        agent_insert(tx, agent, lifetime, **columns)
        row = tx.row("SELECT * FROM AGENTS WHERE id = ?", agent)
        if row and not (before and before["alive"]):
            tx.emit("agent.register", agent, agent, agentId=agent, name=row["name"], type=row["type"])
        if bound:
            tx.ring("keeper")
    return ok(warning, agentId=agent, registered=True, ttl=lifetime, message=(
        f"{agent} is registered and lives for {span(lifetime)} after each heartbeat"
        f"{f', and as long as process {pid}' if bound and not warning else ''}"))


@operation("POST /agents/{id}/heartbeat", command="agent heartbeat", quiet="lastHeartbeat",
           example="pd agent heartbeat builder-1")
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


@operation("DELETE /agents/{id}", command="agent unregister", quiet="unregistered",
           example="pd agent unregister builder-1")
def unregister(daemon: Daemon, asker: Asker, id: AgentId) -> Reply:
    """Forget an agent that ends well; what it holds stays held until it is released or its time is over."""
    with daemon.write() as tx:
        gone = tx.run("DELETE FROM AGENTS WHERE id = ?", id) == 1
        if gone:
            tx.emit("agent.unregister", id, id, agentId=id)
    return ok(agentId=id, unregistered=gone, message=f"{id} is {'unregistered' if gone else 'not registered'}")


@operation("GET /agents/{id}", command="agent show", quiet="agent.isActive", example="pd agent show builder-1",
           errors="NOT_FOUND")
def get_agent(daemon: Daemon, asker: Asker, id: AgentId) -> Reply:
    """One agent, with the services and locks it holds."""
    row = need(daemon.store, "AGENTS", id, "there is no agent {}; register it, or see `pd agents`")
    return ok(agent=agent_view(daemon, row, daemon.now()))


@operation("GET /agents", command="agents", shows="agents: id name type pid isActive lastHeartbeat services locks",
           quiet="id", example="pd agents --active")
def list_agents(daemon: Daemon, asker: Asker, active: Bool = False) -> Reply:
    """List the agents, the dead of the last day included."""
    now = daemon.now()
    rows = daemon.store.rows("SELECT * FROM AGENTS ORDER BY registered, id")
    agents = [agent_view(daemon, row, now) for row in rows]
    return listing("agents", [agent for agent in agents if agent["isActive"] or not active])


# --- webhooks ---------------------------------------------------------------------------------------------------------

MAX_HOOKS = 100  # each may want a thread


def hook_view(row: Any) -> Reply:
    return {"id": row["id"], "url": row["url"], "events": from_json(row["events"]), "filterPattern": row["filter"],
            "hasSecret": row["secret"] is not None, "active": bool(row["active"]), "createdAt": row["created"],
            "lastTriggered": row["triggered"], "successCount": row["successes"], "failureCount": row["failures"],
            "metadata": from_json(row["metadata"])}


def need_hook(db: Sql, hook: str) -> Any:
    return need(db, "HOOKS", hook, "there is no webhook {}; see `pd webhook list`")


def mint(secret: Optional[str]) -> Reply:
    """The secret that is shown once, in the reply, when we were asked to make one."""
    import base64
    return {"secret": "whsec_" + base64.b64encode(os.urandom(24)).decode()} if secret == "auto" else {}


@operation("POST /webhooks", command="webhook add", quiet="id",
           example="pd webhook add http://localhost:8080/hook --events service.claim,lock.* --secret auto",
           errors="TARGET_REFUSED LIMIT KEY_REUSED")
def add_webhook(daemon: Daemon, asker: Asker, url: HttpUrl, events: Optional[EventList] = None,
                secret: Optional[Secret] = None, filter_pattern: Optional[Pattern] = None,
                metadata: Optional[Metadata] = None) -> Reply:
    """Have events sent to a URL, signed with the secret and retried until they are taken."""
    daemon.check_target(url, by_name=False)
    minted = mint(secret)
    hook = "hook_" + os.urandom(6).hex()
    words = f"; its secret, which is shown only now: {minted['secret']}" if minted else ""
    with daemon.write() as tx:
        count = tx.value("SELECT count(*) FROM HOOKS")
        if count >= MAX_HOOKS:
            raise PortDaddyError("LIMIT", f"there are {count} webhooks, which is the limit; remove one", current=count,
                                 max=MAX_HOOKS)
        tx.run("INSERT INTO HOOKS VALUES (?, ?, ?, ?, ?, 1, ?, NULL, 0, 0, ?, 0)", hook, url, to_json(events or ["*"]),
               minted.get("secret", secret), filter_pattern, tx.now.wall, maybe_json(metadata))
        return asker.answer(tx, ok(id=hook, url=url, events=events or ["*"], **minted,
                                   message=f"{hook}: {', '.join(events or ['*'])} go to {url}{words}"))


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


@operation("GET /webhooks/{id}", errors="NOT_FOUND")
def get_webhook(daemon: Daemon, asker: Asker, id: HookId) -> Reply:
    """One webhook, without its secret."""
    webhook = hook_view(need_hook(daemon.store, id))
    return ok(**webhook, webhook=webhook)


@operation("PUT /webhooks/{id}", errors="NOT_FOUND TARGET_REFUSED")
def update_webhook(daemon: Daemon, asker: Asker, id: HookId, url: Optional[HttpUrl] = None,
                   events: Optional[EventList] = None, secret: Optional[Secret] = None,
                   filter_pattern: Optional[Pattern] = None, active: Optional[Bool] = None,
                   metadata: Optional[Metadata] = None) -> Reply:
    """Change a webhook, or switch it off and on again."""
    if url:
        daemon.check_target(url, by_name=False)
    minted = mint(secret)
    columns = present(url=url, events=maybe_json(events), secret=minted.get("secret", secret), filter=filter_pattern,
                      active=active, metadata=maybe_json(metadata), streak=0 if active else None)
    with daemon.write() as tx:
        need_hook(tx, id)
        update(tx, "HOOKS", id, **columns)
        tx.ring("courier")
    return {**get_webhook(daemon, asker, id), **minted}


@operation("DELETE /webhooks/{id}", command="webhook rm", quiet="removed", example="pd webhook rm hook_1f2e3d",
           errors="NOT_FOUND")
def remove_webhook(daemon: Daemon, asker: Asker, id: HookId) -> Reply:
    """Remove a webhook and what was still to be sent to it."""
    with daemon.write() as tx:
        need_hook(tx, id)
        tx.run("DELETE FROM HOOKS WHERE id = ?", id)
        tx.run("DELETE FROM DELIVERIES WHERE hook = ?", id)
    return ok(id=id, removed=True, message=f"removed {id}")


@operation("POST /webhooks/{id}/test", command="webhook test", quiet="delivery", example="pd webhook test hook_1f2e3d",
           errors="NOT_FOUND")
def test_webhook(daemon: Daemon, asker: Asker, id: HookId) -> Reply:
    """Send a webhook.test event to one webhook; its delivery tells how that went."""
    with daemon.write() as tx:
        warning = switched_off(need_hook(tx, id))
        number = delivery_append(tx, id, tx.next_id(), "webhook.test", {"webhookId": id})
        return asker.answer(tx, ok(warning, id=id, delivery=delivery_id(daemon, number),
                                   message=f"a test is on its way to {id}"))


def switched_off(hook: Any) -> Optional[str]:
    return None if hook["active"] else f"{hook['id']} is switched off: it waits until you switch it on again (active)"


def delivery_id(daemon: Daemon, number: int) -> str:
    """The public id of a delivery: unique among all databases, since receivers may serve more than one."""
    return f"dlv_{daemon.store.tag}_{number}"


@operation("GET /webhooks/{id}/deliveries", command="webhook deliveries", quiet="id",
           shows="deliveries: id event status attempts responseStatus durationMs nextAttemptAt error",
           example="pd webhook deliveries hook_1f2e3d", errors="NOT_FOUND")
def list_deliveries(daemon: Daemon, asker: Asker, id: HookId, limit: Count = 50) -> Reply:
    """List what was sent to a webhook and what is still to be sent, newest first."""
    now = daemon.now()
    need_hook(daemon.store, id)
    rows = daemon.store.rows("SELECT * FROM DELIVERIES WHERE hook = ? ORDER BY id DESC LIMIT ?", id, limit)
    return listing("deliveries", [
        {"id": delivery_id(daemon, row["id"]), "event": row["event"], "status": row["status"],
         "attempts": row["attempts"], "responseStatus": row["response"], "durationMs": row["duration"],
         "nextAttemptAt": wall(now, row["due"]), "error": row["error"], "createdAt": row["created"]} for row in rows])


@operation("POST /webhooks/{id}/deliveries/{delivery}/replay", command="webhook replay", quiet="delivery",
           example="pd webhook replay hook_1f2e3d dlv_9c0a_42", errors="NOT_FOUND")
def replay_delivery(daemon: Daemon, asker: Asker, id: HookId, delivery: HookId) -> Reply:
    """Send a delivery once more under its own id, with all its retries before it."""
    tag, _, number = delivery.rpartition("_")
    with daemon.write() as tx:
        warning = switched_off(need_hook(tx, id))
        known = tag == f"dlv_{daemon.store.tag}" and number.isdigit() and delivery_replay(tx, id, int(number[:18]))
        if not known:
            raise PortDaddyError("NOT_FOUND", f"webhook {id} keeps no delivery {delivery}; see: pd webhook deliveries {id}",
                                 id=delivery)
        return asker.answer(tx, ok(warning, id=id, delivery=delivery, status="pending",
                                   message=f"{delivery} is on its way again"))


# --- the log and the daemon itself ------------------------------------------------------------------------------------

def event_view(row: Any) -> Reply:
    facts = from_json(row["facts"])
    words = ", ".join(f"{name} {plain(value)}" for name, value in facts.items()
                      if value not in (None, [], row["subject"]) and not name.endswith("At"))  # instants are for programs
    return {"id": row["id"], "timestamp": row["at"], "type": row["kind"], "agentId": row["agent"],
            "targetId": row["subject"], "details": words, "metadata": facts}


@operation("GET /activity", command="activity", shows="entries: id timestamp type agentId targetId details", quiet="id",
           example="pd activity --type 'lock.*'")
def get_activity(daemon: Daemon, asker: Asker, limit: Count = 100, type: Optional[EventPattern] = None,
                 agent: Optional[AgentId] = None, target: Optional[Pattern] = None, since: Instant = 0,
                 until: Instant = MAX_INTEGER, after: Cursor = 0) -> Reply:
    """What has happened, newest first."""
    rows = event_list(daemon.store, type, agent, target, after, since, until, limit, newest=True)
    return listing("entries", [event_view(row) for row in rows])


@operation("GET /events")
def events(daemon: Daemon, asker: Asker, type: Optional[EventPattern] = None, after: Optional[Cursor] = None) -> Stream:
    """Follow what happens as Server-Sent Events; Last-Event-ID resumes exactly."""
    store, messages = daemon.store, asks_for_messages(type)

    def dropped() -> int:
        return max(int(store.value("SELECT value FROM META WHERE key = 'forgotten'")),
                   channel_dropped(store, "*") if messages else 0)

    return follow_log(daemon, asker, ["events", "channel:*"] if messages else ["events"],
                      *begin_stream(daemon, asker, after), lambda cursor: event_list(store, type, after=cursor), dropped,
                      lambda row: sse(row["kind"], event_view(row), row["id"]), sieved=True)


def uptime(daemon: Daemon) -> int:
    return daemon.clock.now().awake - daemon.started.awake


@operation("GET /health")
def health(daemon: Daemon, asker: Asker) -> Reply:
    """Whether the daemon is well."""
    trouble = daemon.store.trouble
    return {"status": "degraded" if trouble else "ok", "version": __version__, "uptime_seconds": uptime(daemon) // 1000,
            "active_ports": daemon.store.value("SELECT count(*) FROM SERVICES"), "pid": os.getpid(),
            **present(error=trouble)}


@operation("GET /version")
def version(daemon: Daemon, asker: Asker) -> Reply:
    """Which daemon this is: its version, protocol, instance and file."""
    return {"service": "port-daddy", "version": __version__, "protocol": PROTOCOL, "instance": daemon.instance,
            "sha256": daemon.sha256, "startedAt": daemon.started.wall, "pid": os.getpid(),
            "uptime": uptime(daemon), "python": sys.version.split()[0]}


@operation("GET /metrics")
def metrics(daemon: Daemon, asker: Asker) -> Reply:
    """Numbers about the daemon: what it holds, and who waits."""
    store = daemon.store
    counts = {camel(table.lower()): store.value(f"SELECT count(*) FROM {table}")
              for table in ("SERVICES", "CHANNELS", "MESSAGES", "LOCKS", "AGENTS", "EVENTS", "DELIVERIES")}
    return {**counts, "webhooks": store.value("SELECT count(*) FROM HOOKS"), "waiters": daemon.bell.crowd,
            "lastId": store.ids.value, "lastToken": store.tokens.value, "uptime": uptime(daemon),
            "threads": threading.active_count()}


@operation("GET /config")
def config(daemon: Daemon, asker: Asker) -> Reply:
    """The settings of this daemon."""
    settings = daemon.settings
    return ok(port=daemon.port, home=settings.home, range=list(settings.range), url=daemon.url,
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
    number, trace = os.urandom(4).hex(), repr(sys.exc_info()[1])
    with contextlib.suppress(OSError):  # out of descriptors, not even the lines of the traceback can be read
        import traceback
        trace = traceback.format_exc()
    log(f"{where} failed [{number}]: {trace}")
    return number


def attempt(where: str, work: Callable[[], T]) -> Optional[T]:
    """Work that may fail without ending the thread it runs on: the failure is logged, and None returned."""
    try:
        return work()
    except Exception:
        failure_id(where)
        return None


class Worker(threading.Thread):
    """The wrapper: `work` is called again and again, joined to its topic, and returns how many ms it may sleep."""

    def __init__(self, daemon: Daemon, topic: str, work: Callable[[], int]) -> None:
        super().__init__(name=topic, daemon=True)
        self.bell, self.topic, self.work = daemon.bell, topic, work

    def run(self) -> None:
        while not self.bell.closed:
            waiter = self.bell.join([self.topic])
            pause = attempt(self.topic, self.work)
            self.bell.sleep(waiter, time.monotonic() + (1_000 if pause is None else pause) / 1000)
            self.bell.leave(waiter)


class Errands:
    """Work that may take long, a thread each, and never two of the same name at once."""

    def __init__(self) -> None:
        self.running: set[str] = set()  # adding and discarding are atomic

    def start(self, name: str, work: Callable[[], Any], done: Callable[[], Any] = lambda: None) -> None:
        def errand() -> None:
            if attempt(name, lambda: (work(),)) is None:
                time.sleep(0.05)  # it failed, and may fail again at once
            self.running.discard(name)
            done()

        if name not in self.running:
            self.running.add(name)
            try:
                threading.Thread(target=errand, name=name, daemon=True).start()
            except RuntimeError:  # no thread to be had: the next round tries again
                self.running.discard(name)


class Checker:
    """Who listens and who is well: every second while there are services, four times as often while somebody waits."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.due: dict[str, float] = {}  # when each service is to be checked again, on the monotonic clock
        self.errands = Errands()

    def work(self) -> int:
        daemon, now = self.daemon, time.monotonic()
        awaited = {topic.partition(":")[2] for topic in daemon.bell.topics("service:")}
        some = daemon.store.value("SELECT 1 FROM SERVICES LIMIT 1")
        if some:
            daemon.observe()
        rows = daemon.store.rows("SELECT * FROM SERVICES WHERE health IS NOT NULL")
        for id in awaited - {row["id"] for row in rows}:
            rows += filter(None, [service_row(daemon.store, id)])
        for row in rows:
            due = now >= self.due.get(row["id"], 0) or row["id"] in awaited and not row["healthy"]
            if due and not daemon.supervised(row):
                self.due[row["id"]] = now + HEALTH_EVERY / 1000
                self.errands.start(row["id"], lambda row=row: daemon.check_health(row))  # type: ignore[misc]
        self.due = {row["id"]: self.due[row["id"]] for row in rows if row["id"] in self.due}
        return 250 if awaited else 1_000 if some else TICK_AT_MOST


class Courier:
    """Sends deliveries: one thread per webhook that has work, so that a slow receiver delays nobody else."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.errands = daemon, Errands()

    def work(self) -> int:
        store, (_, awake, _, held) = self.daemon.store, self.daemon.now()
        rows = store.rows("SELECT hook, min(due) AS due FROM DELIVERIES JOIN HOOKS ON HOOKS.id = hook "
                          "WHERE due IS NOT NULL AND active GROUP BY hook")
        for row in rows:
            if row["due"] <= awake:
                self.errands.start(row["hook"], lambda hook=row["hook"]: self.serve(hook),  # type: ignore[misc]
                                   lambda: self.daemon.bell.ring("courier"))  # more may have fallen due meanwhile
        waits: list[int] = [max(row["due"] - awake + held, 1) for row in rows if row["hook"] not in self.errands.running]
        return min(waits, default=TICK_AT_MOST)

    def serve(self, hook: str) -> None:
        """Send what is due to one webhook, one after the other, until nothing is."""
        while not self.daemon.bell.closed:
            row = delivery_due(self.daemon.store, hook, self.daemon.now().awake)
            if not row:
                break
            self.send(row)

    def send(self, row: Any) -> None:
        began, response, error, retry_after = time.monotonic(), None, None, None
        body = row["body"].encode()
        try:
            addresses = self.daemon.check_target(row["url"])
            answer = http_call("POST", row["url"], addresses, self.headers(row, body), body, ATTEMPT_TIMEOUT)
            response = answer.status
            if not 200 <= response < 300:
                error = f"HTTP {response}"
                retry_after = answer.retry_after if response in (429, 503) else None
        except PortDaddyError as problem:
            error = str(problem)
        retry = None if response == 410 else self.retry(row["attempts"], retry_after)
        with self.daemon.write() as tx:
            delivery_settle(tx, row, retry, response,
                            round((time.monotonic() - began) * 1000), error)

    @staticmethod
    def retry(attempts: int, retry_after: Optional[int]) -> Optional[int]:
        """Milliseconds until the next attempt, spread by a fifth so that receivers are not hit in step; None: give up."""
        if attempts >= len(RETRY_AFTER):
            return None
        spread = 0.8 + 0.4 * int.from_bytes(os.urandom(2), "big") / 65535
        return round(1000 * max(RETRY_AFTER[attempts] * spread, min(retry_after or 0, 3600)))

    def headers(self, row: Any, body: bytes) -> dict[str, str]:
        """Both families: our own, and Standard Webhooks 1.0 (https://www.standardwebhooks.com)."""
        number, now = delivery_id(self.daemon, row["id"]), self.daemon.now().wall
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


class Watcher:
    """Sees the hang-ups of those who wait, and wakes their waiters: a look at all of them four times a second."""

    def __init__(self, daemon: Daemon) -> None:
        self.bell = daemon.bell
        self.watched: dict[socket.socket, Waiter] = {}  # storing and popping are atomic
        self.idle = False  # said before it is seen that there is nobody: who is added from then on rings

    def add(self, connection: socket.socket, waiter: Waiter) -> None:
        self.watched[connection] = waiter
        if self.idle:
            self.bell.ring("watcher")

    def work(self) -> int:
        self.idle = False
        for connection, waiter in list(self.watched.items()):
            if not has_peer(connection):
                self.bell.hang_up(waiter)
        self.idle = not self.watched
        return TICK_AT_MOST if self.idle and not self.watched else 250


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
BROKEN_LINE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\0")
HEADER = re.compile(r"([^:\r\n]+):([^\r\n]*)\r\n")
SINGLE = ("host", "content-length", "transfer-encoding", "content-type", "origin", "sec-fetch-site", "sec-fetch-mode",
          "sec-fetch-dest", "x-agent-id", "x-pid", "last-event-id", "expect", "authorization",
          "idempotency-key")  # headers that may not be sent twice


class Request(NamedTuple):
    """A request whose head has been read and whose framing is right; `length` bytes of body follow, or chunks (None)."""

    method: str
    target: str
    version: int  # of HTTP/1.x
    headers: dict[str, str]
    length: Optional[int]

    last: bool = False  # the connection ends with its answer
    granted: str = ""  # headers for a page of an allowed origin
    said: tuple[Any, ...] = ()  # agent, pid, last event and key, as SAID has them

    @property
    def front(self) -> bool:
        """Whether it asks for the front page, which is the same for everybody."""
        return self.target == "/" and self.method == "GET"


def parse_head(head: bytes) -> Request:
    """A request's head, from its first byte to the blank line; BAD_REQUEST when any byte is out of place."""
    line = REQUEST_LINE.match(head)
    if not line:
        raise PortDaddyError("BAD_REQUEST", "the request line must be: METHOD, one space, a target in visible ASCII "
                             "without #, one space, HTTP/1.0 or HTTP/1.1")
    if not HEADER_BLOCK.fullmatch(head, line.end()):
        raise PortDaddyError("BAD_REQUEST", "a header line must be: name, colon, value, CR LF; no folding, no control "
                             "characters, no blank before the colon")
    headers: dict[str, str] = {}
    found = HEADER.findall(head.decode("latin-1"), line.end())
    for name, value in found:
        name, value = name.lower(), value.strip(" \t")
        if name in headers and name in SINGLE:
            raise PortDaddyError("BAD_REQUEST", f"the header {name} was sent twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if len(found) > MAX_HEADERS or len(head) > MAX_LINE and any(len(name) + len(value) > MAX_LINE for name, value in found):
        raise PortDaddyError("HEADERS_TOO_LARGE")
    method, target, version = line.groups()
    options = headers.get("connection", "").lower().split(",")
    return Request(method.decode("ascii"), target.decode("ascii"), int(version), headers, body_length(headers, version),
                   version == b"0" or "close" in [option.strip() for option in options])


def body_length(headers: Mapping[str, str], version: bytes) -> Optional[int]:
    """How many bytes of body follow, by the one header that may say it (RFC 9112, 6); None: they come in chunks."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None and (length is not None or version == b"0"):
        raise PortDaddyError("BAD_REQUEST", "a request has either Content-Length or, in HTTP/1.1, Transfer-Encoding")
    if coding is not None and coding.lower() != "chunked":
        raise PortDaddyError("NOT_IMPLEMENTED", "no Transfer-Encoding but chunked is known; or send a Content-Length")
    if coding is not None or length is None:
        return None if coding else 0
    if not (length.isascii() and length.isdigit()):
        raise PortDaddyError("BAD_REQUEST", "Content-Length must be digits only")
    return int(length) if len(length) < 18 else MAX_BODY + 1


class Gate:
    """Whoever may come in: programs of this user, and the dashboard's own page; no other user, no page of another site.

    `check` stands before everything else, for every method; what it refuses is answered, and the connection closed."""

    def __init__(self, settings: Settings) -> None:
        bound = f"[{settings.host}]" if ":" in settings.host else settings.host
        names = {name.lower() for name in ("localhost", "127.0.0.1", "[::1]", bound, *settings.allowed_hosts.split(","))}
        self.names = frozenset(names - {"", "0.0.0.0", "[::]"})
        self.origins = frozenset(settings.allowed_origins.split(",")) - {""}
        self.token, self.peer_check = settings.token.encode(), settings.peer_check

    def check(self, request: Request) -> str:
        """Refuse, or give the headers with which a page of an allowed origin may read the answer."""
        headers, origin = request.headers, request.headers.get("origin")
        self.check_host(request)
        allowed = origin in self.origins
        if origin is not None and not allowed and origin != f"http://{headers.get('host')}":
            raise PortDaddyError("ORIGIN_NOT_ALLOWED")
        if not allowed and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
            if not (request.front and link):
                raise PortDaddyError("CROSS_SITE")
        if request.method == "OPTIONS" and not allowed:  # only a browser asks, on behalf of a page that we do not know
            raise PortDaddyError("ORIGIN_NOT_ALLOWED")
        if self.token and request.method != "OPTIONS" and not request.front:
            self.check_token(headers.get("authorization", ""))
        if request.length is not None and request.length > MAX_BODY:
            raise too_large()
        return "" if not allowed else (f"Access-Control-Allow-Origin: {origin}\r\nVary: Origin\r\n"
                                       "Access-Control-Expose-Headers: Server, Retry-After\r\n")

    def check_host(self, request: Request) -> None:
        """A name of this machine, with any port; a page whose own name was rebound to 127.0.0.1 sends that name."""
        host = request.headers.get("host")
        if host is None:
            if request.version == 1:
                raise PortDaddyError("BAD_REQUEST", "the Host header is missing")
        elif host not in self.names:
            found = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::[0-9]{1,5})?", host)
            if not found or found.group(1).lower() not in self.names:
                raise PortDaddyError("HOST_NOT_ALLOWED")

    def check_peer(self, connection: socket.socket) -> None:
        """Once for each connection, before anything is read from it: nobody else can take up our time."""
        user = peer_user(connection) if self.peer_check else None
        if user == GONE or user is None and not has_peer(connection):
            raise AskerGone  # who has closed its end has no name any more, and wants no answer
        if user not in (None, 0, os.geteuid()):
            raise PortDaddyError("PEER_NOT_ALLOWED")

    def check_token(self, said: str) -> None:
        import hmac
        scheme, _, token = said.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip(" \t").encode("latin-1"), self.token):
            raise PortDaddyError("UNAUTHORIZED")


PREFLIGHT = ("Access-Control-Allow-Methods: GET, POST, PUT, DELETE\r\nAccess-Control-Allow-Headers: Authorization, "
             "Content-Type, Idempotency-Key, Last-Event-ID, X-Agent-Id, X-Pid\r\nAccess-Control-Max-Age: 600\r\n"
             "Access-Control-Allow-Private-Network: true\r\n")  # the answer to the OPTIONS of an allowed origin


def too_large() -> PortDaddyError:
    return PortDaddyError("TOO_LARGE", f"the body is larger than the limit of {MAX_BODY} bytes", limit=MAX_BODY)


class Page(NamedTuple):
    """A reply that is no JSON object: its media type, its bytes, and what its scripts may do (a hash CSP)."""

    media: str
    body: bytes
    policy: str = ""


PageMaker = Callable[[Daemon, str], Optional[Page]]
PAGES: dict[str, PageMaker] = {}


def page(path: str) -> Callable[[PageMaker], PageMaker]:
    """Declare what GET shows at a path beside the operations, given the daemon and the request's Accept header; None
    leaves the request to the operation of that path."""
    def declare(make: PageMaker) -> PageMaker:
        PAGES[path] = make
        return make
    return declare


class Router:
    """From method and path to an operation: a tree of path segments, literal ones before parameters."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self.root: dict[str, Any] = {}
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
        # What a request without a body asks for is known by its first line, and many come again and again.
        self.find = functools.lru_cache(256)(self._find)
        self.plan = functools.lru_cache(256)(lambda method, path, query: self.bind(method, path, query, {}))

    def bind(self, method: str, path: str, query: str, given: Reply) -> tuple[Operation, dict[str, Any]]:
        """The operation that is asked for and its fields: from the path, from the query (GET, DELETE) and the body."""
        one, texts = self.find(method, path)
        if query and method not in ("GET", "DELETE"):
            raise PortDaddyError("UNKNOWN_FIELD", f"{method} takes its fields from the JSON body, not from the query")
        asked = parse_query(query)
        for name in asked.keys() & texts.keys():
            raise PortDaddyError("BAD_VALUE", f"{name} was given twice, in the path and in the query", field=name)
        return one, one.bind(given, {**texts, **asked})

    def _find(self, method: str, path: str) -> tuple[Operation, dict[str, str]]:
        """The operation and its path parameters; the path is split first and decoded then (RFC 3986, 2.4)."""
        segments = [unquote(segment) for segment in path.split("/")[1:]]
        values: list[str] = []
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
                node = {}
                break
        methods = node.get("") or ({"GET": None} if path in PAGES else None)
        if not methods:
            raise PortDaddyError("NOT_FOUND", "there is no such path; GET /llms.txt and GET /openapi.json list them")
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


def parse_query(query: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in query.split("&"):
        if pair:
            name, _, value = pair.partition("=")
            name = unquote(name, plus=True)
            if name in values:
                raise PortDaddyError("BAD_VALUE", f"{name[:60]} was given twice in the query", field=name[:60])
            values[name] = unquote(value, plus=True)
    return values


def parse_body(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
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


SAID = [(name.lower(), Field(name, name, kind_of(kind), False, None)) for name, kind in (
    ("X-Agent-Id", AgentId), ("X-Pid", Pid), ("Last-Event-ID", Cursor), ("Idempotency-Key", RequestKey))]


class HttpAsker(Asker):
    """An asker at the other end of a connection."""

    def __init__(self, connection: Connection, request: Request) -> None:
        self.connection = connection
        super().__init__(*request.said)

    def connected(self) -> bool:
        return has_peer(self.connection.socket)

    def watch(self, waiter: Waiter) -> None:
        self.connection.server.watcher.add(self.connection.socket, waiter)


class Connection:
    """One connection, served by one thread: read a request, pass the gate, run the operation, answer, again."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self.server, self.socket = server, connection
        self.buffer = b""
        self.idle_since: Optional[float] = time.monotonic()  # None while a request is read or served
        self.close_after = False
        self.bodiless = False  # the answer to HEAD has no body (RFC 9110, 9.3.2)
        self.streaming = False
        self.known = False  # the gate has seen who is at the other end
        self.granted = ""  # headers for a page of an allowed origin
        self.patience = 0.0  # seconds that a recv may take

    def wait_at_most(self, option: int, seconds: float) -> None:
        """Have the kernel end a recv or a send after so long: one system call each, where settimeout makes it three."""
        self.socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))

    def serve(self) -> None:
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.wait_at_most(socket.SO_SNDTIMEO, SEND_TIMEOUT)  # for each piece: slow readers are readers
            while not self.close_after and self.serve_one():
                self.idle_since = time.monotonic()
        except (OSError, AskerGone):
            pass  # the other side has gone, or we closed the connection: there is nobody to tell
        except Exception:
            number = failure_id("a request")
            if not self.streaming:
                self.close_after = True
                with contextlib.suppress(OSError):
                    self.send(500, PortDaddyError("INTERNAL", f"the daemon failed; its log says more under [{number}]",
                                                  id=number).body, "", None)
        finally:
            self.end()

    def end(self) -> None:
        self.server.watcher.watched.pop(self.socket, None)
        self.server.connections.discard(self)
        self.socket.close()

    def serve_one(self) -> bool:
        """One request and its answer; False when there was none, or when it has been a stream."""
        self.close_after, self.bodiless, self.granted = True, False, ""  # until the whole request has been read
        asker: Optional[HttpAsker] = None
        try:
            if not self.known:
                self.server.gate.check_peer(self.socket)
                self.known = True
            head = self.read_head()
            if head is None:
                return False
            self.bodiless = head.startswith(b"HEAD ")
            request = self.server.let_in(head)
            self.granted = request.granted
            body = self.read_body(request)
            self.close_after = request.last or self.server.stopping
            asker = HttpAsker(self, request)
            status, extra = 200, ""
            if request.method == "OPTIONS":  # of an allowed origin, or the gate would not have let it in
                self.bodiless, status = True, 204
            reply = {} if status == 204 else self.run(request, body, asker)
            if not isinstance(reply, (dict, Page)):
                self.server.daemon.check_crowd()
        except PortDaddyError as problem:
            status, reply, extra = problem.status, problem.body, "Retry-After: 1\r\n" if problem.status == 503 else ""
            if problem.code == "STORAGE_FULL":
                self.server.daemon.bell.ring("keeper")  # who looks when there is room again
            if problem.code == "METHOD_NOT_ALLOWED":
                extra = f"Allow: {', '.join(problem.facts['allow'])}\r\n"
            if problem.code == "UNAUTHORIZED":
                extra = "WWW-Authenticate: Bearer\r\n"
        whole = isinstance(reply, (dict, Page))
        return self.send(status, reply, extra, asker) if whole else self.send_stream(reply)  # type: ignore[arg-type]

    def read_head(self) -> Optional[bytes]:
        """The bytes up to the blank line; None when the connection ended, or was idle too long, before a first byte."""
        if not self.buffer and not self.receive(time.monotonic() + IDLE_TIMEOUT):
            return None
        self.idle_since, deadline, seen = None, time.monotonic() + HEAD_TIMEOUT, 0
        while True:
            end = self.buffer.find(b"\r\n\r\n", max(0, seen - 3)) + 4
            if 4 <= end <= MAX_HEAD:
                head, self.buffer = self.buffer[:end], self.buffer[end:]
                if end > MAX_LINE and head.find(b"\r\n") > MAX_LINE:
                    raise PortDaddyError("URI_TOO_LONG")
                return head
            line = self.buffer.find(b"\r\n")
            if (len(self.buffer) if line < 0 else line) > MAX_LINE:
                raise PortDaddyError("URI_TOO_LONG")
            if len(self.buffer) > MAX_HEAD:
                raise PortDaddyError("HEADERS_TOO_LARGE")
            if BROKEN_LINE.search(self.buffer, max(0, seen - 1)):  # no blank line would ever come
                raise PortDaddyError("BAD_REQUEST", "lines must end with CR LF, and hold neither of them nor NUL")
            seen = len(self.buffer)
            if not self.receive(deadline):
                raise PortDaddyError("BAD_REQUEST", "the request ended, or took too long, before its blank line")

    def receive(self, deadline: float) -> bool:
        """More bytes into the buffer; False at the end of the connection or at the deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if not left <= self.patience < left + 0.1:
            self.patience = left + 0.05
            self.wait_at_most(socket.SO_RCVTIMEO, self.patience)
        try:
            chunk = self.socket.recv(65536)
        except BlockingIOError:
            return False
        self.buffer += chunk
        return bool(chunk)

    def read_body(self, request: Request) -> bytes:
        length = request.length
        if length == 0:
            return b""
        deadline = time.monotonic() + BODY_TIMEOUT
        if (length is None or length > len(self.buffer)) and request.version == 1 and (
                request.headers.get("expect", "").lower() == "100-continue"):
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length is None:
            return self.read_chunks(deadline)
        parts, missing = [self.buffer], length - len(self.buffer)
        while missing > 0:
            parts.append(self.receive_more(deadline))
            missing -= len(parts[-1])
        whole = b"".join(parts)
        self.buffer = whole[length:]
        return whole[:length]

    def receive_more(self, deadline: float) -> bytes:
        """More bytes of a body."""
        self.buffer = b""
        if not self.receive(deadline):
            raise PortDaddyError("BAD_REQUEST", "the body ended, or took too long, before it was whole")
        return self.buffer

    def read_chunks(self, deadline: float) -> bytes:
        """A body in chunks (RFC 9112, 7.1), without extensions and trailers, of which we know none."""
        raw, begin, size, body = bytearray(self.buffer), 0, -1, bytearray()
        while size:
            end = raw.find(b"\r\n", begin, begin + 10)
            if end >= 0 and re.fullmatch(rb"[0-9A-Fa-f]+", raw[begin:end]):
                size = int(raw[begin:end], 16)
                after = end + 2 + size + 2
                if len(body) + size > MAX_BODY or after > 2 * MAX_BODY:
                    raise too_large()
                while len(raw) < after:
                    raw += self.receive_more(deadline)
                if raw[after - 2:after] != b"\r\n":
                    raise PortDaddyError("BAD_REQUEST", "a chunk must end where its size says, and nothing follow the last")
                body += raw[end + 2:after - 2]
                begin = after
            elif end >= 0 or len(raw) - begin >= 10:
                raise PortDaddyError("BAD_REQUEST", "a chunk must begin with its size in hexadecimal and CR LF")
            else:
                raw += self.receive_more(deadline)
        self.buffer = bytes(raw[begin:])
        return bytes(body)

    def run(self, request: Request, body: bytes, asker: HttpAsker) -> Union[Reply, Page, Stream]:
        """Find the operation, bind its fields, and ask the daemon."""
        method = request.method
        if method not in METHODS:
            raise PortDaddyError("NOT_IMPLEMENTED", "this method is not known; use GET, POST, PUT or DELETE")
        if self.server.stopping:
            raise PortDaddyError("SHUTTING_DOWN")
        path, _, query = request.target.partition("?")
        if not path.startswith("/"):
            raise PortDaddyError("BAD_REQUEST", "the target must be a path that begins with /")
        if method == "GET" and path in PAGES:
            shown = PAGES[path](self.server.daemon, request.headers.get("accept", ""))
            if shown:
                return shown
        if body and method == "GET":
            raise PortDaddyError("BAD_REQUEST", "GET takes its fields from the query, not from a body")
        router = self.server.router
        one, fields = router.bind(method, path, query, parse_body(request.headers, body)) if body else (
            router.plan(method, path, query))
        if method != "POST" or not path.startswith(KEYED):
            asker.key = None
        return perform(self.server.daemon, asker, one, path, fields)  # type: ignore[no-any-return]

    def send(self, status: int, reply: Any, extra: str, asker: Optional[Asker]) -> bool:
        self.server.watcher.watched.pop(self.socket, None)
        try:
            shown = reply if isinstance(reply, Page) else Page("application/json", to_json(reply).encode())
            media, body, policy = shown
            if self.close_after:
                extra += "Connection: close\r\n"
            if policy:
                extra += f"Content-Security-Policy: {policy}\r\n"
            about = PREFLIGHT if status == 204 else f"Content-Type: {media}\r\nContent-Length: {len(body)}\r\n"
            head = self.server.head(status, f"{about}{self.granted}{extra}").encode()
            self.socket.sendall(head if self.bodiless else head + body)
        except BaseException:
            if asker and asker.undo:
                with contextlib.suppress(PortDaddyError):
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
        self.close_after = self.streaming = True
        self.socket.sendall(self.server.head(
            200, f"Content-Type: text/event-stream\r\n{self.granted}Connection: close\r\n").encode())
        with contextlib.closing(stream), contextlib.suppress(PortDaddyError):  # we are stopping; the reader comes back
            for part in stream:
                for start in range(0, len(part), 65536):
                    self.socket.sendall(part[start:start + 65536])
        return False


class Server:
    """A daemon with its doors open. `start` takes the folder, the port and the threads in this order, each with the way
    to give it back; `stop` goes that way backwards."""

    def __init__(self, settings: Settings, clock: Optional[Clock] = None) -> None:
        self.settings, self.clock = settings, clock
        self.stopping, self.reason = False, "stop"
        self.connections: set[Connection] = set()
        self.router, self.gate = Router(OPERATIONS), Gate(settings)
        # Clients that keep their connection mostly send the same head again, and what it says depends on nothing else.
        self.let_in = functools.lru_cache(64)(self._let_in)
        self.undo = contextlib.ExitStack()

    def head(self, status: int, headers: str) -> str:
        """The head of an answer, from its status to the blank line; each header ends with CR LF."""
        return f"HTTP/1.1 {status} {REASONS[status]}\r\n{self.signature}{headers}\r\n"

    def _let_in(self, head: bytes) -> Request:
        """What a head asks for, if the gate lets it in."""
        request = parse_head(head)
        granted, headers = self.gate.check(request), request.headers
        said = tuple(field.check(headers[name], read=True) if headers.get(name) else None for name, field in SAID)
        return request._replace(granted=granted, said=said)

    def start(self) -> None:
        home = self.settings.home
        if beyond_loopback(self.settings.host) and not self.settings.token:
            raise PortDaddyError("BAD_VALUE", f"{self.settings.host} can be reached from other machines: set a token, too "
                                 "(PORT_DADDY_TOKEN), or leave it at loopback")
        open_home(home)
        with self.undo as undo:
            home_lock = lock_home(home)
            if home_lock is None:
                other = read_daemon_file(home) or {"url": "an unknown address", "pid": "unknown"}
                raise PortDaddyError("ALREADY_RUNNING", f"a daemon already serves {home}: pid {other['pid']} at "
                                     f"{other['url']}; use it, or stop it first", **other)
            self.home_lock = home_lock
            undo.callback(os.close, home_lock)
            doors = open_doors(self)
            for door in doors:
                undo.callback(door.close)
            host, self.port = doors[0].server_address[:2]
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
            self.daemon = daemon = Daemon(self.settings, self.clock)
            undo.callback(daemon.store.close)
            daemon.port, daemon.url = self.port, self.url
            self.signature = (f"Server: port-daddy/{__version__} protocol/{PROTOCOL} instance/{daemon.instance}\r\n"
                              "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
                              "Cross-Origin-Resource-Policy: same-origin\r\n")
            full = to_json(PortDaddyError("BUSY", "all connections are taken; try again in a second").body)
            self.full = (self.head(503, "Retry-After: 1\r\nConnection: close\r\nContent-Type: application/json\r\n"
                                   f"Content-Length: {len(full)}\r\n") + full).encode()
            with daemon.write() as tx:
                tx.emit("daemon.start", "daemon", version=__version__, port=self.port, pid=os.getpid())
            undo.callback(self.say_stop)
            self.watcher = Watcher(daemon)
            threads: list[threading.Thread] = [
                Worker(daemon, "keeper", lambda: daemon.tick(daemon.now())),
                Worker(daemon, "checker", Checker(daemon).work), Worker(daemon, "courier", Courier(daemon).work),
                Worker(daemon, "watcher", self.watcher.work),
                *(threading.Thread(target=door.serve_forever, name="acceptor", daemon=True) for door in doors)]
            undo.callback(self.finish, doors, threads)
            for thread in threads:
                thread.start()
            undo.callback(self.remove_card)
            write_file(os.path.join(home, "daemon.json"), to_json({
                "url": self.url, "pid": os.getpid(), "startedAt": daemon.started.wall, "instance": daemon.instance,
                "version": __version__}))
            self.undo = undo.pop_all()

    def stop(self, reason: str = "stop") -> None:
        """No new work; waiters are answered, running requests finish within 5 s, the database is folded."""
        self.reason = reason
        self.undo.close()

    def finish(self, doors: Sequence[Any], threads: Sequence[threading.Thread]) -> None:
        """Shut the doors, and wait for those who are inside."""
        self.stopping = True
        for door in doors:
            door.close()
        self.daemon.bell.close()
        deadline = time.monotonic() + STOP_TIMEOUT
        while self.connections and time.monotonic() < deadline:
            for connection in list(self.connections):
                if connection.idle_since is not None:
                    with contextlib.suppress(OSError):
                        connection.socket.shutdown(socket.SHUT_RD)  # its thread reads the end and leaves
            time.sleep(0.005)
        for thread in threads:
            thread.join(1)

    def owns_home(self) -> bool:
        """Whether the state folder is still ours: one that was deleted may have another daemon by now."""
        return same_file(os.path.join(self.settings.home, "daemon.lock"), self.home_lock) and os.path.exists(
            os.path.join(self.settings.home, "port_daddy.db"))

    def remove_card(self) -> None:
        if (read_daemon_file(self.settings.home) or {}).get("instance") == self.daemon.instance:
            remove_file(os.path.join(self.settings.home, "daemon.json"))

    def say_stop(self) -> None:
        with contextlib.suppress(PortDaddyError), self.daemon.write() as tx:
            tx.emit("daemon.stop", "daemon", signal=self.reason, version=__version__, uptime=uptime(self.daemon))

    def admit(self, connection: socket.socket) -> Optional[Connection]:
        """A connection that may come in. When all are taken, the longest idle one goes; None when there is none."""
        if len(self.connections) >= self.settings.max_connections:
            idle = [(one.idle_since, one) for one in list(self.connections) if one.idle_since is not None]
            if not idle:
                return None
            _, victim = min(idle, key=lambda pair: pair[0])
            victim.idle_since = None  # nobody's victim a second time
            with contextlib.suppress(OSError):
                victim.socket.shutdown(socket.SHUT_RDWR)
        admitted = Connection(self, connection)
        self.connections.add(admitted)
        return admitted


def open_door(server: Server, family: int, address: str, port: int) -> Any:
    from http.server import ThreadingHTTPServer

    class Door(ThreadingHTTPServer):
        """The standard library's threading server, with our own connections, and a stop that does not wait."""

        address_family, request_queue_size, block_on_close, closed = family, 1024, False, False

        def server_bind(self) -> None:
            if family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((address, port))  # without HTTPServer's look-up of our own name, which can take seconds
            self.server_address = self.socket.getsockname()

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while not self.closed:
                try:
                    connection, client = self.socket.accept()
                    admitted = None if self.closed else server.admit(connection)
                    if admitted:
                        try:
                            self.process_request(admitted, client)  # type: ignore[arg-type]
                        except RuntimeError:
                            admitted.end()
                            raise
                    else:
                        with contextlib.suppress(OSError):
                            connection.send(b"" if self.closed else server.full)
                        connection.close()
                except (OSError, RuntimeError):  # out of descriptors or threads, or closed: neither stop nor spin
                    if not self.closed:
                        time.sleep(0.02)

        def finish_request(self, request: Any, client_address: Any) -> None:
            request.serve()

        def shutdown_request(self, request: Any) -> None:
            pass  # it has ended itself

        def close(self) -> None:
            """Wake the acceptor, which blocks in accept, and let go of the port."""
            if not self.closed:
                self.closed = True
                with contextlib.suppress(DaemonUnreachable):
                    dial([(family, 0, 0, "", self.server_address)], 1).close()
                self.server_close()

    return Door((address, port), None)  # type: ignore[arg-type]


def beyond_loopback(host: str) -> bool:
    """Whether other machines may reach what listens on that address."""
    import ipaddress
    try:
        return host not in ("", "localhost") and not ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise PortDaddyError("BAD_VALUE", f"{host} is not an address; set PORT_DADDY_HOST to one of this machine") from None


def open_doors(server: Server) -> list[Any]:
    """A listening server on each loopback family, on one port: the one wanted, or any that is free on both; or on the one
    address that is set."""
    wanted, host = server.settings.port, server.settings.host
    families = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
                for address in (("127.0.0.1", "::1") if host in ("", "localhost") else (host,))]
    for _ in range(20):
        opened: list[Any] = []
        for family, address in families:
            port = opened[0].server_address[1] if opened else wanted
            try:
                opened.append(open_door(server, family, address, port))
            except OSError as error:
                if len(families) > 1 and family == socket.AF_INET6 and error.errno in (
                        errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    continue  # a machine without IPv6
                for door in opened:
                    door.server_close()
                if error.errno != errno.EADDRINUSE:
                    raise PortDaddyError("CANNOT_LISTEN", f"port {port} of {address} cannot be bound ({error.strerror}); "
                                         "set PORT_DADDY_HOST or PORT_DADDY_PORT") from None
                break
        else:
            return opened
        if wanted:
            raise PortDaddyError("CANNOT_LISTEN", f"port {wanted} is taken by {port_holder(wanted)[1]}; stop that, or set "
                                 "PORT_DADDY_PORT (0: any free port)", port=wanted)
    raise PortDaddyError("CANNOT_LISTEN", "no port is free on both 127.0.0.1 and ::1")


def read_daemon_file(home: str) -> Optional[Reply]:
    """What the last daemon of a state folder wrote about itself; None when there is nothing, or nonsense."""
    found = read_object(os.path.join(home, "daemon.json"))
    return found if isinstance(found.get("url"), str) else None


# ======================================================================================================================
# 12. CLIENT — the same operations from the other side
# ======================================================================================================================

# 1. A method per operation, by the operation's name, with its fields as keywords; replies are the wire's dicts.
# 2. A request is sent again only where that is safe: when nothing was sent yet, when the daemon said 503 with
#    Retry-After, or, after bytes were sent, when asking twice does the same as asking once.

IDLE_AT_MOST = 10.0  # seconds: the daemon closes at 15


class Link:
    """One kept-alive connection to the daemon: a request, a reply, or a stream."""

    def __init__(self, url: str, timeout: float, instance: Optional[str] = None, peer_check: bool = True) -> None:
        scheme, host, port, _ = split_url(url)
        if scheme != "http":
            raise PortDaddyError("BAD_VALUE", f"the daemon speaks http, not {scheme}; check PORT_DADDY_URL")
        try:
            self.socket = dial(resolve(host, port), timeout)
        except DaemonUnreachable as problem:
            cure = f"start one with: {PROGRAM} start" if url != os.environ.get("PORT_DADDY_URL") else (
                "start it there, or unset PORT_DADDY_URL")
            raise DaemonUnreachable(f"no daemon answers at {url} ({problem}); {cure}") from None
        self.host = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.url, self.buffer, self.used, self.pid, self.timeout = url, b"", time.monotonic(), os.getpid(), timeout
        try:  # nothing of ours is sent before it is certain that a Port Daddy listens, and not whoever took its port
            self.send("GET", "/", {}, b"")  # which wants no token
            status, headers = self.read_head(timeout)
            said = self.read_bytes(headers, timeout)
            if status == 403 and b"PEER_NOT_ALLOWED" not in said:
                raise problem_from_reply(status, json.loads(said))
            # The instance is no secret. Who serves us must be us or root; that is known once he has accepted.
            if status == 403 or peer_check and peer_user(self.socket) not in (None, GONE, 0, os.geteuid()):
                raise DaemonUnreachable(f"the Port Daddy at {url} is another user's", foreign=True)
            if instance and not headers["server"].endswith(f"instance/{instance}"):
                raise DaemonUnreachable(f"what answers at {url} is another folder's Port Daddy; ours has died there")
        except BaseException:
            self.close()
            raise

    def fresh(self) -> bool:
        """Whether it may be used again: not idle for long, not a fork's, and nothing to read, which would be its end."""
        return time.monotonic() - self.used < IDLE_AT_MOST and self.pid == os.getpid() and not is_readable(self.socket)

    def close(self) -> None:
        self.socket.close()

    def send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        with self.failing():
            self.socket.settimeout(self.timeout)
            self.socket.sendall("\r\n".join([*lines, "", ""]).encode("utf-8") + body)

    def read_head(self, timeout: float) -> tuple[int, dict[str, str]]:
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

    def read_body(self, headers: Mapping[str, str], timeout: float) -> Any:
        """The JSON value that follows a head."""
        return json.loads(self.read_bytes(headers, timeout))

    def read_bytes(self, headers: Mapping[str, str], timeout: float) -> bytes:
        deadline, length = time.monotonic() + timeout, int(headers.get("content-length", "0"))
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
            raise DaemonUnreachable(f"the daemon at {self.url} closed the connection, as it does when it is stopped; ask "
                                    "again")
        self.buffer += chunk

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        try:
            yield
        except socket.timeout:
            raise PortDaddyError("TIMED_OUT", f"the daemon at {self.url} did not answer in time") from None
        except OSError as error:
            raise DaemonUnreachable(f"the connection to the daemon at {self.url} broke ({error})") from None


class Closing:
    """Something that the end of a with block closes."""

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()  # type: ignore[attr-defined]


SPAN = Period(0, 2 ** 40)
AGAIN = ("claim", "heartbeat", "wait_for_services")  # POSTs that do the same when they are asked twice
WITH_KEY = ("publish", "lock", "ack", "nack", "touch", "redrive", "add_webhook")  # those that do so by an Idempotency-Key


def milliseconds(value: Union[int, str]) -> int:
    """A duration in either way of writing it."""
    return int(Field("duration", "a duration", SPAN, True, None).check(str(value), read=True))


def quote(text: str) -> str:
    """Percent-encoding of whatever a path segment or a query value may not hold."""
    return "".join(character if re.match(r"[A-Za-z0-9._~:/*-]", character) else
                   "".join(f"%{byte:02X}" for byte in character.encode("utf-8")) for character in text)


class Caller(Closing):
    """How a client asks: connections kept alive, who is asking, what may be asked again."""

    def __init__(self, url: Optional[str] = None, agent_id: Optional[str] = None, pid: Optional[int] = None,
                 timeout: int = 5_000, autostart: bool = False) -> None:
        self.settings = Settings.load()
        self.url, self.agent_id = url or self.settings.url or None, agent_id or self.settings.agent or None
        self.pid = os.getpid() if pid is None else pid
        self.timeout, self.autostart = timeout, autostart
        self.server = ""  # what the daemon last said of itself: port-daddy/<version> protocol/<n> instance/<id>
        self._idle: list[Link] = []  # appending and popping are atomic

    def close(self) -> None:
        """Close the connections that are kept alive; the client goes on working."""
        while self._idle:
            self._idle.pop().close()

    def connect(self, start: bool = True) -> Link:
        """A connection that is kept alive, or a new one; with `start`, to a daemon that is started if need be."""
        while self._idle:
            link = self._idle.pop()
            if link.fresh():
                return link
            link.close()
        try:
            url, instance = (self.url, None) if self.url else find_url(self.settings)
            return Link(url, self.timeout / 1000, instance, self.settings.peer_check)
        except DaemonUnreachable:
            if not self.autostart or self.url or not start:
                raise
        url = start_daemon(self.settings)
        if on_terminal(sys.stderr):
            say(f"pd: started the daemon at {url}")
        return Link(url, self.timeout / 1000)

    def headers(self) -> dict[str, str]:
        token = self.settings.token
        return present(**{"X-Pid": str(self.pid) if self.pid else None, "X-Agent-Id": self.agent_id or None,
                          "Authorization": f"Bearer {token}" if token else None})

    def ask(self, name: str, given: Mapping[str, Any]) -> Reply:
        """Perform an operation: its fields by their Python names, None for what is left out (but in `payload`)."""
        method, path = next(one for one in OPERATIONS if one.name == name).routes[0]
        fields = {camel(field): value for field, value in given.items()
                  if field != "self" and (value is not None or field == "payload")}
        for wire in re.findall(r"\{(\w+)", path):
            text = quote(str(fields.pop(wire)))
            path = path.replace(f"{{{wire}...}}", text).replace(f"{{{wire}}}", text.replace("/", "%2F"))
        wait = milliseconds(fields.get("timeout", fields.get("wait", 0)))
        body = to_json(fields).encode("utf-8", "surrogatepass") if method in ("POST", "PUT") else b""
        if fields and not body:
            path += "?" + "&".join(f"{wire}={quote(plain(value))}" for wire, value in fields.items())
        headers = {**self.headers(), "Idempotency-Key": os.urandom(12).hex()} if name in WITH_KEY else self.headers()
        again = name in AGAIN + WITH_KEY or method in ("GET", "PUT") and (name != "poll" or "after" in fields) or (
            name == "register" and bool(self.agent_id or fields.get("id")))
        return self._exchange(method, path, headers, body, (self.timeout + wait) / 1000, again)

    def _exchange(self, method: str, path: str, headers: Mapping[str, str], body: bytes, timeout: float,
                  again: bool) -> Reply:
        """Send a request and read its reply; a few times, where that is safe (`again`: after it was sent)."""
        # A daemon that was there may be starting again.
        for pause in (0.05, 0.2, 0.8, None) if self.server else (0.05, 0.05, None):
            link: Optional[Link] = None
            try:
                link = self.connect()
                link.send(method, path, headers, body)
                status, replied = link.read_head(timeout)
                reply = link.read_body(replied, timeout)
            except BaseException as problem:
                if link:
                    link.close()  # the daemon must not wait for us, nor we read a late answer as that of another request
                alone = self.autostart and not link
                if not isinstance(problem, DaemonUnreachable) or pause is None or link and not again or alone:
                    raise
                time.sleep(pause)
                continue
            self.server = replied["server"]
            if replied.get("connection", "").lower() == "close":
                link.close()
            else:
                self._idle.append(link)
            if status < 400:
                return reply  # type: ignore[no-any-return]
            if status != 503 or pause is None or "retry-after" not in replied:
                raise problem_from_reply(status, reply)
            time.sleep(min(int(replied["retry-after"]), 5))
        raise AssertionError("the last round returns or raises")


class PortDaddy(Caller):
    """A client of the daemon. Thread-safe; one instance serves a whole program.

    `url` is where the daemon is (else PORT_DADDY_URL, else what the daemon wrote into the state folder, else port
    9876); `agent_id` who you are (else PORT_DADDY_AGENT); `pid` the process that asks (ours; 0: say none); `timeout`
    how long an answer may take, in milliseconds, besides what an operation may wait; `autostart` starts a daemon when
    none runs. Every method raises PortDaddyError, and DaemonUnreachable when there is no daemon. Durations are
    milliseconds, or text such as "30s"."""

    # --- services -----------------------------------------------------------------------------------------------------

    def claim(self, id: str, *, port: Optional[int] = None, exact: bool = False, range: Optional[Sequence[int]] = None,
              agent: Optional[str] = None, pid: Optional[int] = None, cmd: Optional[str] = None,
              cwd: Optional[str] = None, expires: Optional[Span] = None, pair: Optional[str] = None,
              health: Optional[str] = None, move: bool = False, metadata: Optional[Facts] = None) -> Reply:
        """Claim a port by name. -> {id, port, status, existing, preferred, endpoints, message[, warning]}"""
        return self.ask("claim", locals())

    def release(self, id: Optional[str] = None, *, force: bool = False, expired: bool = False) -> Reply:
        """Release a service, or all that a pattern covers. -> {released, releasedPorts, message}"""
        return self.ask("release", locals())

    def remove_service(self, id: str) -> Reply:
        """Release one service. -> as release"""
        return self.ask("remove_service", locals())

    def list_services(self, pattern: Optional[str] = None, *, status: Optional[str] = None, port: Optional[int] = None,
                      expired: Optional[bool] = None, limit: Optional[int] = None) -> Reply:
        """-> {services: [service], count}"""
        return self.ask("list_services", locals())

    def get_service(self, id: str) -> Reply:
        """-> the service's fields, and again under `service`; NOT_FOUND"""
        return self.ask("get_service", locals())

    def update_service(self, id: str, *, status: Optional[str] = None, pid: Optional[int] = None,
                       health: Optional[str] = None, latency: Optional[int] = None, error: Optional[str] = None,
                       checked_by: Optional[str] = None, metadata: Optional[Facts] = None) -> Reply:
        """Report on a service. -> as get_service"""
        return self.ask("update_service", locals())

    def set_endpoint(self, id: str, env: str, url: str) -> Reply:
        """-> {id, endpoints, message}; NOT_FOUND when the service is unknown"""
        return self.ask("set_endpoint", locals())

    def remove_endpoint(self, id: str, env: str) -> Reply:
        """-> {removed}"""
        return self.ask("remove_endpoint", locals())

    def list_health(self) -> Reply:
        """-> {services: [{id, healthy, status, latency, checkedAt, error}], count}"""
        return self.ask("list_health", {})

    def service_health(self, id: str) -> Reply:
        """-> {id, healthy, status, latency, checkedAt, error}"""
        return self.ask("service_health", locals())

    def wait_for_service(self, id: str, *, timeout: Span = 60_000) -> Reply:
        """Wait until a service is up. -> {services, healthy}; TIMED_OUT with waitingFor"""
        return self.ask("wait_for_service", locals())

    def wait_for_services(self, services: Sequence[str], *, timeout: Span = 60_000) -> Reply:
        """Wait until all of them are up. -> {services, healthy}; TIMED_OUT with waitingFor"""
        return self.ask("wait_for_services", locals())

    def get_logs(self, id: str, *, tail: Optional[int] = None, after: Optional[int] = None) -> Reply:
        """-> {lines: [{id, stream, text, at}], count}, oldest first"""
        return self.ask("get_logs", locals())

    def follow_logs(self, id: str, *, tail: int = 100) -> Subscription:
        """An iterator of the lines that a service prints, beginning with the last ones."""
        return Subscription(self, f"/services/{quote(id)}/logs?follow=true&tail={tail}", None)

    def add_logs(self, id: str, lines: Sequence[Facts]) -> Reply:
        """Send in what a service printed: {text, stream, at} each. -> {added}"""
        return self.ask("add_logs", locals())

    def list_system_ports(self, *, range_only: bool = False, unmanaged_only: bool = False) -> Reply:
        """-> {ports: [{port, pid, command, service}], count}"""
        return self.ask("list_system_ports", locals())

    def cleanup(self) -> Reply:
        """Release services whose process is dead or whose time is over. -> {freed: [id], count}"""
        return self.ask("cleanup", {})

    # --- channels -----------------------------------------------------------------------------------------------------

    def publish(self, channel: str, payload: Any, *, sender: Optional[str] = None, expires: Optional[Span] = None) -> Reply:
        """-> {id, channel, message}"""
        return self.ask("publish", locals())

    def get_messages(self, channel: str, *, limit: Optional[int] = None, after: Optional[int] = None) -> Reply:
        """-> {messages: [{id, channel, payload, sender, createdAt}], count, lastId}"""
        return self.ask("get_messages", locals())

    def poll(self, channel: str, *, timeout: Span = 30_000, after: Optional[int] = None, group: Optional[str] = None,
             lease: Optional[Span] = None, max_attempts: Optional[int] = None) -> Reply:
        """Wait for the next message. -> {message: object or None, lastId[, receipt, attempt, leaseExpiresAt]}"""
        return self.ask("poll", locals())

    def ack(self, channel: str, receipt: str, *, group: Optional[str] = None) -> Reply:
        """A leased message is done. -> {id, acked}; STALE_RECEIPT"""
        return self.ask("ack", locals())

    def nack(self, channel: str, receipt: str, *, group: Optional[str] = None, delay: Optional[Span] = None,
             error: Optional[str] = None) -> Reply:
        """Give a leased message back. -> {id, dead, attempt}; STALE_RECEIPT"""
        return self.ask("nack", locals())

    def touch(self, channel: str, receipt: str, *, group: Optional[str] = None, lease: Optional[Span] = None) -> Reply:
        """Begin a lease anew. -> {id, leaseExpiresAt}; STALE_RECEIPT"""
        return self.ask("touch", locals())

    def work(self, channel: str, *, group: str = "default", lease: Span = 30_000, max_attempts: int = 5, delay: Span = 0,
             idle: Optional[Span] = None) -> Work:
        """Work on a channel: `for task in pd.work("tasks"): with task: build(task.payload)`. A task is acknowledged when
        its block ends well and given back, after `delay`, when it fails; its lease goes on meanwhile. The loop ends when
        nothing came for as long as `idle`; without it, never."""
        return Work(self, channel, group, lease, max_attempts, delay, idle)

    def list_groups(self, channel: str) -> Reply:
        """-> {groups: [{group, backlog, leased, dead, lastPollAt}], count}"""
        return self.ask("list_groups", locals())

    def remove_group(self, channel: str, group: str) -> Reply:
        """-> {removed}"""
        return self.ask("remove_group", locals())

    def list_dead(self, channel: str, *, group: Optional[str] = None) -> Reply:
        """-> {messages: [message and group, attempts, error, diedAt], count}"""
        return self.ask("list_dead", locals())

    def redrive(self, channel: str, *, group: Optional[str] = None, id: Optional[int] = None) -> Reply:
        """Let dead letters be worked on again. -> {redriven}"""
        return self.ask("redrive", locals())

    def subscribe(self, channel: str, *, after: Optional[int] = None,
                  on_loss: Optional[Callable[[Reply], None]] = None) -> Subscription:
        """Follow a channel or a pattern: an iterator of messages that reconnects and resumes by itself. `on_loss` is
        told of messages that are gone ({event: "gap", from, to}) and of another database ({event: "reset"})."""
        return Subscription(self, f"/msg/{quote(channel)}/subscribe", after, on_loss)

    def list_channels(self) -> Reply:
        """-> {channels: [{channel, count, lastId, lastMessage, subscribers}], count}"""
        return self.ask("list_channels", {})

    def clear_channel(self, channel: str) -> Reply:
        """-> {deleted}"""
        return self.ask("clear_channel", locals())

    # --- locks --------------------------------------------------------------------------------------------------------

    def lock(self, name: str, *, owner: Optional[str] = None, ttl: Span = 300_000, wait: Span = 0,
             pid: Optional[int] = None, limit: int = 1, lock_delay: Span = 0, metadata: Optional[Facts] = None) -> Reply:
        """Take a lock, or wait in line for it. -> {name, owner, token, acquiredAt, expiresAt, waited}; LOCK_HELD,
        LIMIT_MISMATCH"""
        return self.ask("lock", locals())

    def extend_lock(self, name: str, *, owner: Optional[str] = None, token: Optional[int] = None,
                    ttl: Span = 300_000) -> Reply:
        """-> {expiresAt}; LOCK_LOST, NOT_OWNER"""
        return self.ask("extend_lock", locals())

    def unlock(self, name: str, *, owner: Optional[str] = None, token: Optional[int] = None, force: bool = False) -> Reply:
        """-> {released: bool}; LOCK_LOST, NOT_OWNER"""
        return self.ask("unlock", locals())

    def check_lock(self, name: str, *, token: Optional[int] = None) -> Reply:
        """-> {held, owner, token, pid, acquiredAt, expiresAt, waiting, metadata, holders[, valid]}"""
        return self.ask("check_lock", locals())

    def list_locks(self, *, owner: Optional[str] = None, pattern: Optional[str] = None) -> Reply:
        """-> {locks, count}"""
        return self.ask("list_locks", locals())

    def with_lock(self, name: str, function: Optional[Callable[[], T]] = None, *, owner: Optional[str] = None,
                  ttl: Span = 300_000, wait: Span = 60_000, pid: Optional[int] = None, limit: int = 1,
                  lock_delay: Span = 0, on_loss: Optional[Callable[[], None]] = None) -> Any:
        """`with pd.with_lock(name) as held:` holds a lock and renews it; LOCK_HELD when it was not free within `wait`,
        LockLost at the end of the block when the lease was lost. With a function: call it under the lock, and return
        what it returns."""
        held = HeldLock(self, name, milliseconds(ttl), on_loss, owner=owner, wait=wait, pid=pid, limit=limit,
                        lock_delay=lock_delay)
        if function is None:
            return held
        with held:
            return function()

    # --- agents -------------------------------------------------------------------------------------------------------

    def register(self, id: Optional[str] = None, *, name: Optional[str] = None, type: Optional[str] = None,
                 pid: Optional[int] = None, ttl: Optional[Span] = None, metadata: Optional[Facts] = None,
                 max_services: Optional[int] = None, max_locks: Optional[int] = None) -> Reply:
        """Register this agent; without an id of its own it adopts the one that the daemon makes. -> {agentId, …}"""
        reply = self.ask("register", locals())
        if self.agent_id is None:
            self.agent_id = str(reply["agentId"])
        return reply

    def heartbeat(self, id: Optional[str] = None) -> Reply:
        """-> {lastHeartbeat}"""
        return self.ask("heartbeat", {"id": self._agent(id)})

    def start_heartbeat(self, interval: Span = 30_000) -> Heartbeat:
        """Send heartbeats from a thread, every `interval` milliseconds, until `.stop()`."""
        return Heartbeat(self, self._agent(None), max(10, milliseconds(interval)))

    def unregister(self, id: Optional[str] = None) -> Reply:
        """-> {unregistered}"""
        return self.ask("unregister", {"id": self._agent(id)})

    def get_agent(self, id: str) -> Reply:
        """-> {agent}"""
        return self.ask("get_agent", locals())

    def list_agents(self, *, active_only: bool = False) -> Reply:
        """-> {agents, count}"""
        return self.ask("list_agents", {"active": active_only})

    def _agent(self, id: Optional[str]) -> str:
        agent = id or self.agent_id
        if not agent:
            raise PortDaddyError("BAD_VALUE", "this client has no agent id: register first, or give one")
        return agent

    # --- webhooks -----------------------------------------------------------------------------------------------------

    def add_webhook(self, url: str, *, events: Optional[Sequence[str]] = None, secret: Optional[str] = None,
                    filter_pattern: Optional[str] = None, metadata: Optional[Facts] = None) -> Reply:
        """-> {id, url, events[, secret]}; receivers check with verify_webhook"""
        return self.ask("add_webhook", locals())

    def list_webhooks(self, *, active: Optional[bool] = None) -> Reply:
        """-> {webhooks, count}"""
        return self.ask("list_webhooks", locals())

    def get_webhook(self, id: str) -> Reply:
        """-> the webhook's fields, and again under `webhook`"""
        return self.ask("get_webhook", locals())

    def update_webhook(self, id: str, *, url: Optional[str] = None, events: Optional[Sequence[str]] = None,
                       secret: Optional[str] = None, filter_pattern: Optional[str] = None,
                       active: Optional[bool] = None, metadata: Optional[Facts] = None) -> Reply:
        """-> as get_webhook"""
        return self.ask("update_webhook", locals())

    def remove_webhook(self, id: str) -> Reply:
        """-> {removed}"""
        return self.ask("remove_webhook", locals())

    def webhook_events(self) -> Reply:
        """-> {events: [name], count}"""
        return self.ask("webhook_events", {})

    def test_webhook(self, id: str) -> Reply:
        """-> {delivery}"""
        return self.ask("test_webhook", locals())

    def list_deliveries(self, id: str, *, limit: Optional[int] = None) -> Reply:
        """-> {deliveries: [{id, event, status, attempts, responseStatus, durationMs, nextAttemptAt, error, …}], count}"""
        return self.ask("list_deliveries", locals())

    def replay_delivery(self, id: str, delivery: str) -> Reply:
        """Send a delivery once more. -> {delivery, status}"""
        return self.ask("replay_delivery", locals())

    # --- the log and the daemon ---------------------------------------------------------------------------------------

    def get_activity(self, *, limit: Optional[int] = None, type: Optional[str] = None, agent: Optional[str] = None,
                     target: Optional[str] = None, since: Optional[int] = None, until: Optional[int] = None,
                     after: Optional[int] = None) -> Reply:
        """-> {entries: [{id, timestamp, type, agentId, targetId, details, metadata}], count}, newest first"""
        return self.ask("get_activity", locals())

    def events(self, *, type: Optional[str] = None, after: Optional[int] = None,
               on_loss: Optional[Callable[[Reply], None]] = None) -> Subscription:
        """Follow what happens: an iterator of the entries of the activity log that reconnects and resumes by itself."""
        return Subscription(self, f"/events?type={quote(type)}" if type else "/events", after, on_loss)

    def health(self) -> Reply:
        """-> {status, version, uptime_seconds, active_ports, pid}"""
        return self.ask("health", {})

    def version(self) -> Reply:
        """-> {service, version, protocol, instance, sha256, startedAt, pid, uptime, python}"""
        return self.ask("version", {})

    def metrics(self) -> Reply:
        """-> counts of what the daemon holds"""
        return self.ask("metrics", {})

    def config(self) -> Reply:
        """-> {port, home, range, url, …}"""
        return self.ask("config", {})

    def ping(self) -> bool:
        """Whether a daemon answers."""
        with contextlib.suppress(PortDaddyError):
            return bool(self.health()["status"])
        return False


def is_away(problem: PortDaddyError) -> bool:
    """Whether the daemon may only be starting again."""
    return isinstance(problem, DaemonUnreachable) or problem.status == 503


class Renewal:
    """A thread that renews a lease after each third of it, until it is stopped or the lease is lost."""

    def __init__(self, name: str, ttl: int, renew: Callable[[], Any], on_loss: Callable[[], Any]) -> None:
        self.ttl, self.renew, self.on_loss = ttl, renew, on_loss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        good_until = time.monotonic() + self.ttl / 1000
        while not self._over.wait(max(0.01, self.ttl / 3000)):
            began = time.monotonic()
            try:
                self.renew()
                good_until = began + self.ttl / 1000
            except PortDaddyError as problem:  # the daemon may be starting again; the lease tells how long there is hope
                if problem.code in ("LOCK_LOST", "STALE_RECEIPT") or time.monotonic() >= good_until:
                    self.on_loss()
                    return

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


class HeldLock:
    """A lock for the time of a with block, renewed meanwhile."""

    def __init__(self, pd: PortDaddy, name: str, ttl: int, on_loss: Optional[Callable[[], None]], **words: Any) -> None:
        self.pd, self.name, self.ttl, self.words, self.on_loss = pd, name, ttl, words, on_loss
        self.token, self.lost = 0, False

    def __enter__(self) -> HeldLock:
        self.lost = False
        self.token = self.pd.lock(self.name, ttl=self.ttl, **self.words)["token"]
        self._renewal = Renewal(f"renew {self.name}", self.ttl, lambda: self.pd.extend_lock(
            self.name, token=self.token, ttl=self.ttl), self._on_loss)
        return self

    def _on_loss(self) -> None:
        self.lost = True
        if self.on_loss:
            self.on_loss()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._renewal.stop()
        try:
            if not self.lost:
                self.pd.unlock(self.name, token=self.token)
        except LockLost:
            self.lost = True
        except PortDaddyError:
            if error is None:  # else what happened inside the block matters more
                raise
        if self.lost and error is None:
            raise LockLost("LOCK_LOST", f"lock {self.name} was lost before its block ended: somebody else may have held "
                           "it meanwhile", token=self.token)


class Task:
    """A leased message for the time of a with block: acknowledged when the block ends well; given back with the error,
    which is said on stderr and goes no further, when it fails. `lost`: the lease is over, another worker may have it."""

    def __init__(self, work: Work, reply: Reply) -> None:
        self.work, self.message, self.receipt, self.attempt = work, reply["message"], reply["receipt"], reply["attempt"]
        self.id, self.payload = self.message["id"], self.message["payload"]
        self.on_loss: Callable[[], Any] = lambda: None
        self.error, self.lost = "", False

    def __enter__(self) -> Task:
        work = self.work
        self._renewal = Renewal(f"task {self.id}", work.lease, lambda: work.pd.touch(
            work.channel, self.receipt, group=work.group, lease=work.lease), self._on_loss)
        return self

    def _on_loss(self) -> None:
        self.lost = True
        self.on_loss()

    def fail(self, error: str) -> None:
        """Have it given back at the end of the block, although that ends well."""
        self.error = error

    def __exit__(self, kind: Optional[type], error: Optional[BaseException], trace: object) -> bool:
        self._renewal.stop()
        said = f"{type(error).__name__}: {error}" if error else self.error
        deadline = time.monotonic() + self.work.lease / 1000
        while True:
            try:
                self._answer(said)
            except PortDaddyError as problem:
                if is_away(problem) and time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                say(f"{self.work.channel} {self.id}: {problem}")  # the group gets it again
            return isinstance(error, Exception)

    def _answer(self, said: str) -> None:
        work = self.work
        if said:
            reply = work.pd.nack(work.channel, self.receipt, group=work.group, delay=work.delay, error=said[:1000])
            say(f"{work.channel} {self.id} failed ({said}), and is {'dead' if reply['dead'] else 'given back'}")
        else:
            work.pd.ack(work.channel, self.receipt, group=work.group)


class Work:
    """An iterator of tasks: the messages of a channel that its group is given, leased one by one."""

    def __init__(self, pd: PortDaddy, channel: str, group: str, lease: Span, max_attempts: int, delay: Span,
                 idle: Optional[Span]) -> None:
        self.pd, self.channel, self.group, self.max_attempts = pd, channel, group, max_attempts
        self.lease, self.delay = milliseconds(lease), milliseconds(delay)
        self.idle = None if idle is None else milliseconds(idle)
        self.heard: Optional[float] = None  # when the daemon last answered

    def __iter__(self) -> Work:
        return self

    def __next__(self) -> Task:
        began = time.monotonic()
        while True:
            left = 60_000 if self.idle is None else self.idle - round((time.monotonic() - began) * 1000)
            try:
                reply = self.pd.poll(self.channel, group=self.group, lease=self.lease, max_attempts=self.max_attempts,
                                     timeout=max(0, min(left, 30_000)))
                self.heard = time.monotonic()
                if reply["message"]:
                    return Task(self, reply)
                if self.idle is not None and self.heard - began >= self.idle / 1000:
                    raise StopIteration
            except PortDaddyError as problem:  # a daemon that is away for a moment is waited for
                if not is_away(problem) or self.heard is None or time.monotonic() - self.heard > 90:
                    raise
                time.sleep(0.1)


class Heartbeat(Closing):
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

    close = stop


class Subscription(Closing):
    """An endless iterator over an event stream. It is connected when it is made, so nothing published after that is
    missed; a broken connection is made again, from the last id on, for up to 30 s at a time."""

    def __init__(self, pd: PortDaddy, path: str, after: Optional[int],
                 on_loss: Optional[Callable[[Reply], None]] = None) -> None:
        self.pd, self.path, self.last, self.on_loss = pd, path, after, on_loss
        self._link: Optional[Link] = None
        self.closed = False
        self._connect()

    def _connect(self) -> None:
        deadline, first = time.monotonic() + 30, self.last is None
        while not self.closed:
            try:
                self._link = link = self.pd.connect(start=first)  # who follows does not bring back what was stopped
                first = False
                headers = dict(self.pd.headers(), Accept="text/event-stream")
                if self.last is not None:
                    headers["Last-Event-ID"] = str(self.last)
                link.send("GET", self.path, headers, b"")
                status, replied = link.read_head(self.pd.timeout / 1000)
                if status != 200:
                    raise problem_from_reply(status, link.read_body(replied, self.pd.timeout / 1000))
                event, _, data = self._event()
                if event == "connected" and self.last is None:
                    self.last = data["lastId"]  # resume from here even when no message has come yet
                return
            except PortDaddyError as problem:
                self._drop()
                if self.last is None or not is_away(problem) or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link:
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_RDWR)  # a thread may be reading from it
            link.close()

    def _event(self) -> tuple[str, Optional[int], Any]:
        """The next event of the connection: its name, its id and its data."""
        link = self._link
        if link is None or self.closed:
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
        while not self.closed:
            try:
                event, number, data = self._event()
            except PortDaddyError:
                self._drop()
                self._connect()
                continue
            if number is not None:
                self.last = number
                return data  # type: ignore[no-any-return]
            if event == "reset":
                self.last = 0
            if event in ("gap", "reset") and self.on_loss:
                self.on_loss({"event": event, **data})
        raise StopIteration

    def close(self) -> None:
        self.closed = True
        self._drop()


def is_port_daddy(url: str) -> bool:
    """Whether a Port Daddy listens there, ours or another user's."""
    try:
        Link(url, 1.0).close()
    except PortDaddyError as problem:
        return "foreign" in problem.facts
    return True


def find_url(settings: Settings) -> tuple[str, Optional[str]]:
    """Where the daemon of these settings is: what was said, else what it wrote down, with its instance, else the usual
    port."""
    if settings.url:
        return settings.url, None
    found = read_daemon_file(settings.home)
    if found:
        return str(found["url"]), str(found.get("instance"))
    usual = os.path.abspath(os.path.expanduser(default_home(os.environ)))
    if settings.port == 0 or settings.port == 9876 and settings.home != usual:  # 9876 would be another folder's
        raise DaemonUnreachable(f"no daemon serves {settings.home}; start one with: {PROGRAM} start")
    return f"http://127.0.0.1:{settings.port}", None


def start_daemon(settings: Settings, timeout: float = 15.0) -> str:
    """Start a daemon in the background unless one runs; its URL once it answers.

    Any number of commands may do this at once: each connects or tries to start, the lock of the state folder lets one
    daemon live, and the others end with ALREADY_RUNNING while their commands connect to it."""
    words, more = own_command("serve")
    environ = {**os.environ, **more, "PORT_DADDY_HOME": settings.home, "PORT_DADDY_RANGE": "{}-{}".format(*settings.range),
               "PORT_DADDY_HOST": settings.host, "PORT_DADDY_TOKEN": settings.token,
               # 9876 is not said: then the daemon may take another port when that is another user's
               "PORT_DADDY_PORT": "" if settings.port == 9876 else str(settings.port)}
    open_home(settings.home)
    log_path = os.path.join(settings.home, "daemon.log")
    deadline, child = time.monotonic() + timeout, None
    while time.monotonic() < deadline:
        found = read_daemon_file(settings.home)
        if found:
            with contextlib.suppress(PortDaddyError):
                Link(str(found["url"]), 1.0, str(found.get("instance"))).close()
                return str(found["url"])
        status = child.poll() if child else PROBLEMS["ALREADY_RUNNING"][1]
        if status == PROBLEMS["ALREADY_RUNNING"][1]:  # somebody else's daemon starts, or ends
            child = process_start(words, environ, log_path)
        elif status is not None:
            said = read_text(log_path).strip().splitlines()[-1:]
            last = said[0].replace("pd: ", "", 1) if said else "it said nothing"
            raise DaemonUnreachable(f"the daemon did not start: {last} ({log_path})")
        time.sleep(0.02)
    raise DaemonUnreachable(f"the daemon did not answer within {timeout:g} s; see {log_path}")


# ======================================================================================================================
# 13. PROJECTS — .portdaddyrc to ordered, health-checked, supervised processes
# ======================================================================================================================

# 1. Threads report (a line, an exit, a probe, a request from another terminal); one loop decides.
# 2. A child has a session and a process group of its own, and runs nothing before the guardian knows that group: when
#    we are killed, the guardian stops the groups.
# 3. Nothing is stopped while something runs that needs it. A group has stopped when it has been seen empty.
# 4. Only what the file declares can be started, stopped or restarted, whoever asks.
#
#    waiting ──needs hold──> starting ──probe──> healthy ⇄ unhealthy ──exit──> restarting ──> starting
#                                │                                  └──exit──> completed, detached or failed
#                                └──deadline, exit──> failed (everything stops, unless --keep-going)

RC_NAMES = (".portdaddyrc", ".portdaddyrc.json", "portdaddy.config.json")
RC_ALIASES = {"dev": "cmd", "preferredPort": "port", "health": "healthPath", "depends_on": "needs", "dir": "cwd"}
REFERENCE = re.compile(r"\$\{(?:([A-Za-z0-9._-]+)\.(?=(?:PORT|URL)\}))?(PORT|(?<=\.)URL)\}")  # ${PORT}, ${api.URL}
CONDITIONS = ("healthy", "started", "completed")
PROBE_STARTING, PROBE_RUNNING, SILENT_FOR, CALM_AFTER = 0.25, 5.0, 3.0, 60.0  # seconds
TAIL, LINE_LIMIT, IN_USE = 20, 64 * 1024, r"EADDRINUSE|[Aa]ddress (?:is )?already in use"


class Mapped(Kind):
    """A JSON object of texts and numbers, such as environment variables; the values as text."""

    def parse(self, value: Any) -> dict[str, str]:
        expect(isinstance(value, dict) and all(isinstance(item, (str, int, float)) for item in value.values()))
        return {name: item if isinstance(item, str) else to_json(item) for name, item in value.items()}


class Needs(Kind):
    """["db"], or {"db": "healthy", "migrate": "completed"}."""

    def parse(self, value: Any) -> dict[str, str]:
        expect(not isinstance(value, list) or all(isinstance(name, str) for name in value))
        needs = dict.fromkeys(value, "healthy") if isinstance(value, list) else value
        expect(isinstance(needs, dict) and all(condition in CONDITIONS for condition in needs.values()))
        return needs


class HealthRule(Text):
    def parse(self, value: Any) -> str:
        rule = "none" if value is False else super().parse(value)
        if rule.startswith("log:"):
            try:
                re.compile(rule[4:].strip())
            except re.error:
                raise ValueError from None
        return rule


COMMAND = Text("a command line", r".{1,8192}")
RC_FIELDS: dict[str, tuple[Kind, Any]] = {  # of one service: kind, default
    "cmd": (COMMAND, None), "port": (PORT, None),
    "healthPath": (HealthRule('a path such as /health, "tcp", "cmd: …", "log: regex", or false',
                              r"/.*|tcp|(?:cmd|log):.+"), None),
    "healthTimeout": (Period(1, 86_400_000), 30_000),
    "needs": (Needs('a list of services, or an object of service to "healthy", "started" or "completed"'), {}),
    "env": (Mapped("an object of texts and numbers"), {}),
    "env_file": (Text("a file", r"[^\0]{1,4096}"), None), "cwd": (Text("a folder", r"[^\0]{1,4096}"), "."),
    "noPort": (Flag("true or false"), False), "remote": (kind_of(HttpUrl), None),
    "restart": (Text("no, on-failure or always", "no|on-failure|always"), "no"),
    "maxRestarts": (Integer("a number", 0, 1_000_000), 5), "stopTimeout": (Period(0, 3_600_000), 10_000),
    "stopSignal": (Text("a signal such as TERM or INT", "(?:SIG)?(?:TERM|INT|QUIT|HUP|KILL|USR1|USR2)"), "TERM"),
    "metadata": (Json("a JSON object", MAX_METADATA, dict), None), "stack": (Json("anything", MAX_METADATA), None),
}


class Service(NamedTuple):
    """One service of a project file, checked, with everything it left out filled in."""

    name: str
    identity: str
    cmd: Optional[str]
    port: Optional[int]
    rule: str  # none, tcp, a path, "cmd: …" or "log: …"
    health_timeout: float
    needs: dict[str, str]
    env: dict[str, str]
    cwd: str
    remote: Optional[str]
    has_port: bool
    restart: str
    max_restarts: int
    stop_timeout: float
    stop_signal: int

    @property
    def mentions_port(self) -> bool:
        """Whether the command will listen where it is told: then any free port will do."""
        return any(re.search(r"\$\{?PORT\b", text) for text in (self.cmd or "", *self.env.values()))


class Project(NamedTuple):
    """A project file: its services in an order in which every need comes before those who need it."""

    folder: str
    name: str
    context: str
    services: dict[str, Service]
    port_range: Optional[tuple[int, int]]
    kind: str = "dev"  # or run, which has no file

    @property
    def handle(self) -> str:
        """The name of its lock, its agent and its channel: one dev at a time for a project and context."""
        name = f"{self.kind}:{self.name}:{self.context}".rstrip(":")
        return name if len(name) <= 100 else f"{name[:91]}:{zlib.crc32(name.encode()):08x}"


def slug(text: str) -> str:
    """A text as a segment of an identity."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:64] or "project"


def find_project_file(folder: str) -> str:
    """The project file of a folder, or of the nearest folder above it that has one."""
    while True:
        for name in RC_NAMES:
            if os.path.isfile(os.path.join(folder, name)):
                return os.path.join(folder, name)
        above = os.path.dirname(folder)
        if above == folder:
            raise PortDaddyError("NOT_FOUND", "there is no .portdaddyrc here or above; write one, or let `pd scan` do it")
        folder = above


def git_context(folder: str, always: bool) -> Optional[str]:
    """The branch as a slug: of a linked worktree, or `always`; of a detached HEAD, its short hash."""
    places = command_output("git", "-C", folder, "rev-parse", "--path-format=absolute", "--git-dir", "--git-common-dir")
    own, _, common = places.strip().partition("\n")
    if not own or own == common and not always:
        return None
    branch = command_output("git", "-C", folder, "symbolic-ref", "--short", "-q", "HEAD").strip()
    return slug(branch or command_output("git", "-C", folder, "rev-parse", "--short", "HEAD").strip())


def load_project(path: str, context: Optional[str], branch: bool = False) -> Project:
    """Read and check a project file; every mistake names the file, the service and the field."""
    def checked(where: str, kind: Kind, value: Any) -> Any:
        return Field(where, f"{path}: {where}", kind, True, None).check(value, read=False)

    text, folder = read_text(path), os.path.dirname(path)
    try:
        json.loads(text)  # which says where the mistake is
        top = read_json(text)
    except (ValueError, PortDaddyError) as error:
        raise PortDaddyError("BAD_JSON", f"{path} is not JSON: {error}") from None
    if not isinstance(top, dict) or not isinstance(top.get("services"), dict) or not top["services"]:
        raise PortDaddyError("BAD_VALUE", f'{path} must be a JSON object with "services": {{"api": {{"cmd": …}}}}')
    for field in top:
        if field not in ("project", "context", "portRange", "services", "$schema") and not field.startswith("_"):
            raise PortDaddyError("UNKNOWN_FIELD", f"{path} has no field {field!r} at the top; it knows project, context, "
                                 "portRange and services")
    name = checked("project", IDENTITY, top.get("project", slug(os.path.basename(folder))))
    if context is None:
        context = top.get("context") if not branch else None
    if context is None:
        context = git_context(folder, branch) or "main"
    tail = [checked("context", IDENTITY, context)] if context else []
    services = {}
    for service, raw in top["services"].items():
        if not isinstance(raw, dict):
            raise PortDaddyError("BAD_VALUE", f"{path}: services.{service} must be an object")
        identity = checked(f"services.{service}", IDENTITY, ":".join([name, service, *tail]))
        services[service] = load_service(path, service, identity, raw, checked)
    for one in services.values():
        for other, what in (pair for text in (one.cmd or "", *one.env.values()) for pair in REFERENCE.findall(text)):
            there = services.get(other, one if not other else None)
            if there is None or not there.has_port and (what == "PORT" or not there.remote):
                raise PortDaddyError("BAD_VALUE", f"{path}: services.{one.name} mentions ${{{other + '.' if other else ''}"
                                     f"{what}}}, but there is no such service, or it has no port")
    port_range = checked("portRange", kind_of(PortRange), top["portRange"]) if "portRange" in top else None
    return Project(folder, name, context, in_order(services), port_range)


def load_service(path: str, name: str, identity: str, raw: dict[str, Any],
                 checked: Callable[[str, Kind, Any], Any]) -> Service:
    values = {field: default for field, (_, default) in RC_FIELDS.items()}
    for written, value in raw.items():
        field = RC_ALIASES.get(written, written)
        if field not in RC_FIELDS and not field.startswith("_"):
            near = nearest(field, [*RC_FIELDS, *RC_ALIASES])
            raise PortDaddyError("UNKNOWN_FIELD", f"{path}: services.{name} has no field {written!r}; "
                                 f"{f'did you mean {near[0]}?' if near else 'it knows ' + ', '.join(RC_FIELDS)}")
        if field in RC_FIELDS and value is not None:
            values[field] = checked(f"services.{name}.{written}", RC_FIELDS[field][0], value)
    if not values["cmd"] and not values["remote"]:
        raise PortDaddyError("BAD_VALUE", f"{path}: services.{name} needs a cmd, or remote: the URL where it runs")
    folder = os.path.dirname(path)
    file_env = read_env_file(os.path.join(folder, values["env_file"])) if values["env_file"] else {}
    import signal
    has_port = not values["noPort"] and not values["remote"]
    if values["noPort"] and re.match(r"/|tcp", values["healthPath"] or ""):
        raise PortDaddyError("BAD_VALUE", f"{path}: services.{name} has noPort, so there is nothing for its healthPath")
    return Service(
        name, identity, values["cmd"], values["port"], values["healthPath"] or ("tcp" if has_port else "none"),
        values["healthTimeout"] / 1000, values["needs"], {**file_env, **values["env"]},
        os.path.join(folder, values["cwd"]), values["remote"], has_port, values["restart"], values["maxRestarts"],
        values["stopTimeout"] / 1000, getattr(signal, "SIG" + values["stopSignal"].replace("SIG", "")))


def read_env_file(path: str) -> dict[str, str]:
    """NAME=value lines, with comments, quotes and `export`, as in a .env file."""
    if not os.path.isfile(path):
        raise PortDaddyError("NOT_FOUND", f"there is no env_file {path}")
    values = {}
    for line in read_text(path).splitlines():
        found = re.fullmatch(r"""\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(?:'([^']*)'|"([^"]*)"|([^#]*?))\s*(?:#.*)?""", line)
        if found:
            values[found.group(1)] = next(group for group in found.groups()[1:] if group is not None)
    return values


def in_order(services: dict[str, Service]) -> dict[str, Service]:
    """The services so that needs come first; unknown needs and cycles are refused with the path that shows them."""
    ordered: dict[str, Service] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise PortDaddyError("BAD_VALUE", "these services need each other: " + " → ".join(
                [*trail[trail.index(name):], name]))
        if name not in services:
            raise PortDaddyError("BAD_VALUE", f"{trail[-1]} needs {name}, which is not among the services "
                                 f"({', '.join(services)})")
        for need in services[name].needs if name not in ordered else ():
            visit(need, (*trail, name))
        ordered[name] = services[name]

    for name in services:
        visit(name, ())
    return ordered


def only(project: Project, names: Sequence[str]) -> Project:
    """The project with some of its services and what they need."""
    wanted: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in project.services:
            raise PortDaddyError("NOT_FOUND", f"there is no service {name}; there are {', '.join(project.services)}")
        wanted.add(name)
        left += [need for need in project.services[name].needs if need not in wanted]
    return project._replace(services={name: one for name, one in project.services.items() if name in wanted})


def check_trust(path: str) -> None:
    """Refuse a file that anybody may write; ask, on a terminal, before the commands of somebody else are run."""
    open_to_all, owners = file_owners(path)
    if open_to_all:
        raise PortDaddyError("BAD_VALUE", f"{path} can be written by everybody, and holds commands: chmod o-w it and its "
                             "folder first")
    us = os.geteuid()
    if owners <= {us, 0} or us == 0 and len(owners) == 1:
        return
    say(f"pd: {path}, or its folder, belongs to another user (uid {max(owners - {us})}); its commands are:\n"
        f"{read_text(path)}\nrun them? [y/N]")
    if not on_terminal(sys.stdin) or sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise PortDaddyError("BAD_VALUE", f"{path} belongs to another user; --trust runs its commands all the same")


# --- children ---------------------------------------------------------------------------------------------------------

class Child:
    """A service while `dev` runs it."""

    def __init__(self, service: Service, port: Optional[int]) -> None:
        import collections
        self.service, self.port = service, port
        self.state = "waiting"
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.starts = 0  # how often: a report about an earlier one is void
        self.began = self.ended = self.due = 0.0  # monotonic; `due` is when something must happen: a deadline, a restart
        self.restarts, self.retried = 0, False
        self.status: Optional[int] = None
        self.error: Optional[str] = None
        self.tail: Deque[str] = collections.deque(maxlen=TAIL)
        self.matched = False  # a line has matched the rule log:

    @property
    def url(self) -> Optional[str]:
        return self.service.remote or (f"http://localhost:{self.port}" if self.port else None)

    def holds(self, condition: str) -> bool:
        """Whether a need for this service is fulfilled."""
        if condition == "completed":
            return self.state == "completed"
        if condition == "started" and self.starts:
            return True
        return self.state in ("healthy", "detached", "completed")


class Prober:
    """Asks one started child whether it is well, often while it starts, seldom later, until it has ended."""

    def __init__(self, child: Child, environ: Mapping[str, str], report: Callable[..., None],
                 check: Callable[[str, Mapping[str, str], str], tuple[int, str]]) -> None:
        self.child, self.starts, self.environ, self.report, self.check = child, child.starts, environ, report, check
        self.connect_only = False  # what listens does not speak HTTP: from now on it is only connected to
        self.silent_since: Optional[float] = None

    def loop(self) -> None:
        child, began = self.child, since_boot()
        over = ("completed", "detached", "failed", "stopped", "restarting")
        while child.starts == self.starts and child.state not in over:
            asked, warning, error = time.monotonic(), None, None
            try:
                self.refuse_stranger(began)
                warning = self.probe()
            except PortDaddyError as problem:
                error = str(problem)
            self.report("probe", child, self.starts, error, round((time.monotonic() - asked) * 1000), warning)
            time.sleep(PROBE_STARTING if error else PROBE_RUNNING)

    def refuse_stranger(self, began: int) -> None:
        """A visible listener that is older than the start of the service is not the service."""
        those = listeners().get(self.child.port or 0, ()) if LINUX else ()
        for pid in listener_pids(those).values():
            birth = process_birth(pid)
            ours = self.child.process and group_of(pid) == self.child.process.pid
            if birth is not None and birth < began - 1_000 and not ours:
                raise PortDaddyError("PORT_HIJACKED", f"port {self.child.port} is used by {process_command(pid)} (pid "
                                     f"{pid})")

    def probe(self) -> Optional[str]:
        """Nothing when it is well, or a warning; raises the reason when it is not."""
        child, rule = self.child, self.child.service.rule
        if rule == "none" or rule.startswith("log:") and child.matched:
            return None
        if rule.startswith("log:"):
            raise PortDaddyError("TIMED_OUT", f"no line has matched {rule[4:].strip()}")
        if rule.startswith("cmd:"):
            status, said = self.check(rule[4:], self.environ, child.service.cwd)
            if status:
                raise PortDaddyError("INTERNAL", f"the check exited with {status}{': ' + said if said else ''}")
            return None
        addresses = resolve("localhost", child.port or 0)
        if rule == "tcp" or self.connect_only:
            try:
                dial(addresses, HEALTH_TIMEOUT).close()
            except DaemonUnreachable as problem:
                if not self.connect_only or problem.facts.get("spoke") is None:
                    raise
            return None
        return self.probe_http(rule, addresses)

    def probe_http(self, rule: str, addresses: Sequence[tuple[Any, ...]]) -> Optional[str]:
        """A path is asked for by HTTP. What listens there may not speak it, like a database: it counts as well at once
        when it answers something else, and after 3 s when it only closes (a container's proxy accepts early)."""
        try:
            answer = http_call("GET", f"http://localhost:{self.child.port}{rule}", addresses, {}, b"", HEALTH_TIMEOUT)
        except PortDaddyError as problem:
            spoke = problem.facts.get("spoke")
            if spoke is None:
                self.silent_since = None
                raise
            self.silent_since = self.silent_since or time.monotonic()
            if not spoke and time.monotonic() - self.silent_since < SILENT_FOR:
                raise
            self.connect_only = True
            return (f"port {self.child.port} does not speak HTTP, so that it takes connections counts instead of {rule}; "
                    'write "healthPath": "tcp" to say so')
        if not 200 <= answer.status < 400:
            raise PortDaddyError("INTERNAL", f"{rule} answered HTTP {answer.status}")
        return None


class Output(threading.Thread):
    """Reads what all children print, a piece of each at a time, and hands it on line by line."""

    def __init__(self, on_line: Callable[[Child, str, str], None]) -> None:
        import selectors
        super().__init__(name="output", daemon=True)
        self.on_line, self.selector = on_line, selectors.DefaultSelector()
        self.rests: dict[int, bytes] = {}
        self.wakeup, self._wakeup = socket.socketpair()
        self.selector.register(self._wakeup, selectors.EVENT_READ)
        self.added: list[tuple[Any, Child, str]] = []

    def add(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        self.added += [(process.stdout, child, "stdout"), (process.stderr, child, "stderr")]
        self.wakeup.send(b"+")

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.data is None:
                    self._wakeup.recv(64)
                    while self.added:
                        pipe, child, stream = self.added.pop()
                        self.selector.register(pipe, 1, (child, stream))
                else:
                    self.read(key.fileobj, key.fd, *key.data)

    def read(self, pipe: Any, descriptor: int, child: Child, stream: str) -> None:
        piece = read_some(descriptor)
        rest = self.rests.pop(descriptor, b"") + piece
        *lines, rest = rest.split(b"\n")
        if not piece or len(rest) > LINE_LIMIT:
            lines, rest = [*lines, *([rest] if rest else [])], b""
        for line in lines:
            for start in range(0, len(line) or 1, LINE_LIMIT):
                self.on_line(child, stream, line[start:start + LINE_LIMIT].rstrip(b"\r").decode("utf-8", "replace"))
        if rest:
            self.rests[descriptor] = rest
        if not piece:
            self.selector.unregister(pipe)
            pipe.close()


class Reporter(threading.Thread):
    """Tells the daemon what happens, in order, without making anybody wait; lines wait for a daemon that is away."""

    def __init__(self, pd: PortDaddy) -> None:
        import collections
        import queue
        super().__init__(name="reporter", daemon=True)
        self.pd, self.over, self.empty = pd, threading.Event(), queue.Empty
        self.calls: queue.Queue[Callable[[], Any]] = queue.Queue()
        self._lines: dict[str, Deque[Reply]] = collections.defaultdict(lambda: collections.deque(maxlen=KEEP_LINES))

    def line(self, identity: str, stream: str, text: str) -> None:
        self._lines[identity].append({"stream": stream, "text": text, "at": time.time_ns() // 1_000_000})

    def tell(self, call: Callable[[], Any]) -> None:
        self.calls.put(call)

    def finish(self) -> None:
        self.over.set()
        self.join(10)

    def run(self) -> None:
        while not (self.over.is_set() and self.calls.empty() and not any(self._lines.values())):
            try:
                with contextlib.suppress(self.empty):
                    self.calls.get(timeout=0.2)()
                self.flush()
            except PortDaddyError as problem:
                if self.over.is_set() and is_away(problem):
                    return  # a daemon that is away is not waited for at the end

    def flush(self) -> None:
        for identity, waiting in list(self._lines.items()):
            batch: list[Reply] = []  # one each time, so that nobody's flood keeps the others waiting
            size = 0
            while waiting and size < MAX_BODY // 16 and len(batch) < KEEP_LINES:  # JSON may make six bytes of one
                batch.append(waiting.popleft())
                size += len(batch[-1]["text"]) + 64
            try:
                if batch:
                    self.pd.add_logs(identity, batch)
            except DaemonUnreachable:
                waiting.extendleft(reversed(batch))
                raise


# --- what people see --------------------------------------------------------------------------------------------------

SGR = re.compile(r"(\x1b\[[0-9;]*m)")
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-ln-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")


def log_text(text: str, color: bool) -> str:
    """A line of a child that can do nothing to a terminal but colour itself: no cursor, no title, no links."""
    text = CONTROL_SEQUENCE.sub("", text.rpartition("\r")[2])
    parts = [(part if color else "") if SGR.fullmatch(part) else printable(part) for part in SGR.split(text)]
    return "".join(parts) + ("\x1b[0m" if color and len(parts) > 1 else "")


class Screen:
    """Lines of the services behind their names and, while they start, a block below that is redrawn in place; in a
    pipe, a line on stderr for each change. `plain` (of `run`) shows only what the command prints."""

    COLORS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)

    def __init__(self, children: Mapping[str, Child], plain: bool) -> None:
        # Guards the terminal: the output thread and the main loop both write. Nothing else is held with it.
        self._lock = threading.Lock()
        self.children, self.plain = children, plain
        self.live = on_terminal(sys.stdout) and not plain
        self.color = in_color()
        self.width = max(map(len, children))
        self.paint = {name: self.COLORS[number % len(self.COLORS)] for number, name in enumerate(children)}
        self.block = 0  # how many lines of the block stand on the screen now
        self.starting = True
        self.broken = False  # nobody reads what we write

    def write(self, text: str, talk: bool = False) -> None:
        """Put text above the block, and the block below it again."""
        with self._lock:
            erase = f"\x1b[{self.block}A\x1b[J" if self.block else ""
            block = self.rows() if self.live and self.starting else []
            self.block = len(block)
            whole = erase + text + "".join(f"{row}\n" for row in block)
            self.broken |= not write_text(2 if talk and not self.live else 1, whole)

    def line(self, child: Child, stream: str, text: str) -> None:
        name = child.service.name
        shown = log_text(text, self.color)
        if self.plain:
            self.write(f"{shown}\n", talk=stream == "stderr")
        else:
            self.write(f"{self.painted(name)} │ {shown}\n")

    def painted(self, name: str) -> str:
        padded = name.ljust(self.width)
        return f"\x1b[{self.paint[name]}m{padded}\x1b[0m" if self.color else padded

    def changed(self, child: Child) -> None:
        if self.live and self.starting:
            self.write("")
        elif not self.plain:
            self.write(f"{self.row(child)}\n", talk=True)

    def note(self, text: str) -> None:
        self.write(f"{printable(text)}\n", talk=True)

    def settle(self) -> None:
        """Leave the block where it is: what comes now comes below it."""
        self.write("")
        self.starting, self.block = False, 0

    def rows(self) -> list[str]:
        room = terminal_width()
        return [row if len(row) <= room + 9 * self.color else row[:room - 1 + 9 * self.color] + "…"
                for row in map(self.row, self.children.values())]

    def row(self, child: Child) -> str:
        """Name, state, URL, how long it took, what it waits for."""
        state, needs = child.state, [name for name, condition in child.service.needs.items()
                                     if not self.children[name].holds(condition)]
        state = "ended" if state == "failed" and child.status == 0 else state
        words = {"waiting": f"waits for {', '.join(needs)}", "starting": f"starting, {span_of(child)}",
                 "healthy": f"healthy after {span_of(child)}"}.get(state, state)
        if child.error and state in ("starting", "unhealthy", "failed", "ended", "restarting"):
            words += f": {printable(child.error)}"
        return f"{self.painted(child.service.name)} │ {(child.url or '-').ljust(22)} {words}"


def span_of(child: Child) -> str:
    return f"{(child.ended or time.monotonic()) - child.began:.1f}s"


# --- the supervisor ---------------------------------------------------------------------------------------------------

def expand(children: Mapping[str, Child], child: Child, text: str) -> str:
    """${PORT}, ${api.PORT} and ${api.URL}; everything else in braces is left to the shell."""
    def value(found: Match[str]) -> str:
        name, what = found.groups()
        other = child if name is None else children.get(name)
        if other is None:
            raise PortDaddyError("BAD_VALUE", f"{child.service.name}: {found.group()} has no value: {name} is not among "
                                 "the services that are started")
        return str(other.port if what == "PORT" else other.url)
    return REFERENCE.sub(value, text)


def environment(children: Mapping[str, Child], child: Child, daemon_url: str) -> dict[str, str]:
    """The environment of a child: ours, where its siblings are, its own port, and what its file says."""
    values = {**os.environ, "PYTHONUNBUFFERED": "1", "PORT_DADDY_URL": daemon_url,
              "PORT_DADDY_ID": child.service.identity}
    for name, other in children.items():
        word = re.sub(r"[^A-Z0-9]", "_", name.upper())
        if other.port:
            values[f"{word}_PORT"] = str(other.port)
        if other.url:
            values[f"{word}_URL"] = other.url
    if child.port is not None:
        values["PORT"] = str(child.port)
    return {**values, **{name: expand(children, child, text) for name, text in child.service.env.items()}}


def refuse_other(pd: PortDaddy, identity: str) -> None:
    """A service that another supervisor runs now is not taken over."""
    for service in pd.list_services(identity)["services"]:
        others = [agent for agent in pd.list_agents(active_only=True)["agents"]
                  if agent["id"] == service["agentId"] != pd.agent_id and agent["type"] == "dev"]
        if others and service["status"] in ("starting", "running", "unhealthy"):
            raise PortDaddyError("ALREADY_RUNNING", f"{identity} is run by {others[0]['id']} (pid {others[0]['pid']}) "
                                 "already", pid=others[0]["pid"])


def claim_port(pd: PortDaddy, project: Project, child: Child, note: Callable[[str], None], move: bool = False) -> None:
    """Get the port of a service that has one. A port that is wanted, and that the command is not told, must be free."""
    service = child.service
    refuse_other(pd, service.identity)
    fixed = service.port is not None and not service.mentions_port
    try:
        reply = pd.claim(service.identity, port=None if move else service.port, exact=fixed, move=move,
                         range=project.port_range, cmd=service.cmd, cwd=service.cwd)
    except PortDaddyError as problem:
        if problem.code not in ("PORT_TAKEN", "PORT_HIJACKED"):
            raise
        if fixed or move:
            raise PortDaddyError(problem.code, f"{service.name}: {problem}. Or write ${{PORT}} into its cmd or env: then "
                                 "any free port will do", **problem.facts) from None
        claim_port(pd, project, child, note, move=True)
        return
    if reply.get("warning") or child.port not in (None, reply["port"]):
        note(f"pd: {service.name} gets port {reply['port']}: {reply.get('warning', 'its own was taken')}")
    child.port = reply["port"]


def await_exit(process: subprocess.Popen[bytes], report: Callable[[int], None]) -> None:
    """Tell of its end once what it printed has been read; a grandchild may hold the pipes for longer."""
    status, deadline = process.wait(), time.monotonic() + 1
    while time.monotonic() < deadline and not all(pipe is None or pipe.closed for pipe in (process.stdout, process.stderr)):
        time.sleep(0.01)
    report(128 - status if status < 0 else status)


class Supervisor:
    """Brings the children of a project up in order, keeps them up, and takes them down in the reverse order."""

    def __init__(self, project: Project, pd: PortDaddy, cursor: int, keep_going: bool, health: bool, plain: bool) -> None:
        import queue
        self.project, self.pd, self.keep_going, self.plain = project, pd, keep_going, plain
        services = project.services.values()
        self.children = {one.name: Child(one if health else one._replace(rule="none"), None) for one in services}
        self.events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.empty = queue.Empty
        self.screen, self.reporter = Screen(self.children, plain), Reporter(pd)
        self.output = Output(self.on_line)
        self.ending, self.exit_status, self.interrupts = False, 0, 0
        self.asked: dict[str, list[int]] = {}  # who is to be told when a service is up again: message ids
        self.cursor, self.daemon_url = cursor, ""

    def run(self) -> int:
        """Until everything has ended, or something has that may not; the exit status of the whole."""
        import signal
        self.daemon_url = str(self.pd.config()["url"])
        try:
            for child in [child for child in self.children.values() if child.service.has_port]:
                claim_port(self.pd, self.project, child, self.screen.note)
        except PortDaddyError:
            for child in self.children.values():
                if child.port:
                    self.pd.release(child.service.identity)
            raise
        self.guardian = Guardian()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.on_interrupt)
        self.reporter.start()
        self.output.start()
        if not self.plain:
            threading.Thread(target=self.listen, name="control", daemon=True).start()
        try:
            self.loop()
        finally:
            self.stop(list(self.children.values()))
            self.guardian.close()
            self.reporter.finish()
        return self.exit_status

    def loop(self) -> None:
        while not self.ending:
            self.start_ready()
            states = [child.state for child in self.children.values()]
            if all(state in ("completed", "failed") for state in states):
                return
            if self.screen.starting and not {"waiting", "starting", "restarting"} & set(states):
                self.screen.settle()
            try:
                kind, *facts = self.events.get(timeout=0.1 if self.screen.starting else 0.5)
                getattr(self, f"on_{kind}")(*facts)
            except self.empty:
                if self.screen.live and self.screen.starting:
                    self.screen.write("")  # the clock of what starts
            self.look_at_time()
            if self.screen.broken:
                self.ending, self.exit_status = True, 1

    # --- starting -----------------------------------------------------------------------------------------------------

    def start_ready(self) -> None:
        for child in self.children.values():
            needs = child.service.needs.items()
            if child.state == "waiting" and all(self.children[name].holds(condition) for name, condition in needs):
                self.start(child)
            elif child.state == "waiting" and any(self.children[name].state == "failed" for name, _ in needs):
                self.fail(child, "what it needs has failed", 1)

    def start(self, child: Child) -> None:
        service, now = child.service, time.monotonic()
        child.starts += 1
        child.state, child.began, child.ended, child.due = "starting", now, 0.0, now + service.health_timeout
        child.matched, child.error, child.status = False, None, None
        if service.remote:
            return self.on_probe(child, child.starts, None, 0, None)
        try:
            if child.port is not None and not port_free(child.port, reuse=True):
                self.make_way(child)
            environ = environment(self.children, child, self.daemon_url)
            process = child_start(expand(self.children, child, service.cmd or ""), environ, service.cwd)
        except PortDaddyError as problem:
            return self.fail(child, str(problem), 1)
        child.process = process
        self.guardian.add(process.pid, service.stop_signal, service.stop_timeout)
        child_go(process)
        self.output.add(child, process)
        prober = Prober(child, environ, lambda *facts: self.events.put(facts), self.check)
        starts = child.starts
        ended = functools.partial(await_exit, process, lambda status: self.events.put(("exit", child, starts, status)))
        threads: list[Callable[[], None]] = [prober.loop, ended]
        for target in threads + [functools.partial(child_feed, process)] * self.plain:
            threading.Thread(target=target, name=service.name, daemon=True).start()
        self.report(child, "starting")
        self.screen.changed(child)
        return None

    def check(self, command: str, environ: Mapping[str, str], folder: str) -> tuple[int, str]:
        """A health check that is a command. The guardian knows its group, so it ends with us, however we end."""
        return shell_status(command, environ, folder, 5.0, lambda group: self.guardian.add(group, 9, 0.0),
                            self.guardian.remove)

    def make_way(self, child: Child) -> None:
        """Somebody has taken the port since it was claimed: another one will do, or nothing will."""
        if child.service.port is not None and not child.service.mentions_port:
            raise PortDaddyError("PORT_TAKEN", f"port {child.port} is used by {port_holder(child.port or 0)[1]}; stop "
                                 "that, or write ${PORT} into the cmd: then any free port will do")
        claim_port(self.pd, self.project, child, self.screen.note, move=True)

    # --- what happens -------------------------------------------------------------------------------------------------

    def on_interrupt(self, number: int, frame: Optional[FrameType]) -> None:
        self.interrupts += 1
        self.events.put(("signal", number))

    def on_signal(self, number: int) -> None:
        self.ending, self.exit_status = True, 128 + number
        self.screen.note("pd: stopping; once more stops at once")

    def on_line(self, child: Child, stream: str, text: str) -> None:
        """Called by the output thread."""
        child.tail.append(text)
        self.reporter.line(child.service.identity, stream, text)
        rule = child.service.rule
        if rule.startswith("log:") and not child.matched and re.search(rule[4:].strip(), text):
            child.matched = True
        self.screen.line(child, stream, text)

    def on_probe(self, child: Child, starts: int, error: Optional[str], latency: int, warning: Optional[str]) -> None:
        if starts != child.starts or child.state not in ("starting", "healthy", "unhealthy"):
            return
        before, child.error = child.state, error
        if warning:
            self.screen.note(f"pd: {child.service.name}: {warning}")
        if error is None:
            child.state, child.ended = "healthy", child.ended or time.monotonic()
            self.report(child, "running", latency=latency)
            self.answer(self.asked.pop(child.service.name, []), True, f"{child.service.name} is up again")
        elif before != "starting":
            child.state = "unhealthy"
            self.report(child, "unhealthy", latency=latency, error=error)
        if child.state != before:
            self.screen.changed(child)

    def on_exit(self, child: Child, starts: int, status: int) -> None:
        if starts != child.starts or child.state in ("stopped", "failed"):
            return
        child.status, calm = status, time.monotonic() - child.began > CALM_AFTER
        if child.process and not group_members(child.process.pid):  # an empty group's number may become another's
            self.guardian.remove(child.process.pid)
            child.process = None
        service, child.restarts = child.service, 0 if calm else child.restarts
        needed = any(one.service.needs.get(service.name) == "completed" for one in self.children.values())
        if status == 0 and needed:
            self.settle(child, "completed", "stopped")
        elif status == 0 and child.port is not None and child.port in listeners():
            self.settle(child, "detached", "detached")
        elif status and child.state == "starting" and not child.retried and re.search(IN_USE, "\n".join(child.tail)):
            child.retried = True
            self.stop_groups([child])
            child.state = "waiting"
        elif service.restart == "always" or service.restart == "on-failure" and status:
            self.restart_later(child, status)
        else:
            self.fail(child, f"exited with {status}", status)

    def settle(self, child: Child, state: str, status: str) -> None:
        child.state, child.ended = state, time.monotonic()
        self.report(child, status)
        self.answer(self.asked.pop(child.service.name, []), True, f"{child.service.name} has ended with 0")
        self.screen.changed(child)

    def restart_later(self, child: Child, status: int) -> None:
        """1 s, 2 s, 4 s … 30 s; a service that ran for a minute begins anew."""
        if child.restarts >= child.service.max_restarts:
            return self.fail(child, f"exited with {status} after {child.restarts} restarts", status)
        child.error = f"exited with {status}"
        child.due = time.monotonic() + min(30.0, 2.0 ** child.restarts)
        child.restarts += 1
        child.state = "restarting"
        self.report(child, "crashed", error=child.error)
        self.screen.changed(child)
        return None

    def look_at_time(self) -> None:
        now = time.monotonic()
        for child in self.children.values():
            if child.state == "starting" and now > child.due:
                self.fail(child, f"not healthy after {span(child.service.health_timeout * 1000)}: {child.error}", 1)
            elif child.state == "restarting" and now > child.due:
                self.stop_groups([child])
                self.start(child)

    def fail(self, child: Child, reason: str, status: int) -> None:
        """The end of one, and of all unless the others are to go on."""
        child.state, child.error, child.ended = "failed", reason, child.ended or time.monotonic()
        self.report(child, "crashed" if status else "stopped", error=reason)
        self.answer(self.asked.pop(child.service.name, []), False, f"{child.service.name}: {reason}")
        self.exit_status = status or self.exit_status
        self.ending = not self.keep_going
        if not self.plain:
            self.screen.changed(child)
            last = "".join(f"\n  {log_text(line, False)}" for line in list(child.tail)) if status else ""
            words = (f"failed: {reason}" if status else "ended with 0. A service that is meant to end is needed as "
                     '"completed"; --keep-going lets the others go on')
            self.screen.note(f"pd: {child.service.name} {words}" + (f"; its last lines:{last}" if last else ""))
        elif child.status is None:  # it could not even be started
            self.screen.note(f"pd: {reason}")

    def report(self, child: Child, status: str, latency: Optional[int] = None, error: Optional[str] = None) -> None:
        if child.service.has_port:
            self.reporter.tell(functools.partial(
                self.pd.update_service, child.service.identity, status=status, latency=latency, error=error,
                pid=child.process.pid if child.process else None, checked_by=self.pd.agent_id))

    # --- requests from other terminals --------------------------------------------------------------------------------

    def listen(self) -> None:
        """Read the channel of this project, on a thread of its own."""
        cursor = self.cursor
        while not self.ending:
            try:
                reply = self.pd.poll(self.project.handle, after=cursor, timeout=20_000)
            except PortDaddyError:
                time.sleep(0.5)
                continue
            cursor = reply["lastId"]
            if reply["message"] and isinstance(reply["message"]["payload"], dict):
                self.events.put(("request", reply["message"]["id"], reply["message"]["payload"]))

    def on_request(self, number: int, payload: Reply) -> None:
        child = self.children.get(str(payload.get("service")))
        if payload.get("do") == "down":
            self.answer([number], True, "stopping")
            self.screen.note("pd: stopping, as `pd down` asked")
            self.ending = True
        elif payload.get("do") == "restart" and child and not child.service.remote:
            self.asked.setdefault(child.service.name, []).append(number)
            child.restarts, child.retried = 0, False
            self.stop_groups([child])
            child.state = "waiting"
        elif "do" in payload:
            self.answer([number], False, f"there is no service {payload.get('service')} to {payload['do']}; there are "
                        f"{', '.join(self.children)}")

    def answer(self, numbers: Sequence[int], done: bool, words: str) -> None:
        for number in numbers:
            said = {"answers": number, "done": done, "said": words}
            self.reporter.tell(functools.partial(self.pd.publish, self.project.handle, said, expires=60_000))

    # --- stopping -----------------------------------------------------------------------------------------------------

    def stop(self, children: list[Child]) -> None:
        """Level by level: nothing is stopped while something runs that needs it."""
        self.screen.block, self.screen.starting, self.ending = 0, False, True
        while children:
            needed = {need for child in children for need in child.service.needs}
            level = [child for child in children if child.service.name not in needed]
            self.stop_groups(level)
            for child in level:
                if child.service.has_port and child.state != "detached":
                    self.reporter.tell(functools.partial(self.pd.release, child.service.identity))
            children = [child for child in children if child not in level]
        if not self.plain:
            self.screen.note("pd: all stopped")

    def stop_groups(self, children: Sequence[Child]) -> None:
        """Signal the groups, kill those that do not end in time, and see that they are empty."""
        import signal
        left = {child: child.process.pid for child in children if child.process}
        for child, group in left.items():
            child.starts += 1  # whatever is reported from now on is of the past
            if child.state not in ("failed", "completed", "detached"):
                child.state = "stopped"
            group_signal(group, child.service.stop_signal)
        began, killed = time.monotonic(), set()
        while left:
            for child, group in list(left.items()):
                waited = time.monotonic() - began - child.service.stop_timeout
                if not group_members(group) or waited > 5:
                    self.guardian.remove(group)
                    child.process = None
                    del left[child]
                elif group not in killed and (waited > 0 or self.interrupts > 1):
                    killed.add(group)
                    group_signal(group, signal.SIGKILL)
                    if waited > 0:
                        self.screen.note(f"pd: {child.service.name} has not ended within "
                                         f"{span(child.service.stop_timeout * 1000)} and is killed")
            time.sleep(0.02 if left else 0)
        for child in children:
            if child.starts and child.port in listeners():
                self.screen.note(f"pd: {child.service.name} has left its process group and is out of reach: "
                                 f"{port_holder(child.port or 0)[1]} goes on listening on port {child.port}")


def supervise(project: Project, pd: PortDaddy, keep_going: bool = False, health: bool = True,
              plain: bool = False) -> int:
    """Be the one supervisor of a project, as an agent that the daemon knows, until it ends."""
    pd.agent_id, pd.timeout = project.handle, 10_000
    cursor = pd.get_messages(project.handle, limit=1)["lastId"]  # who sees the lock may ask at once, and is heard
    held = pd.with_lock(project.handle, ttl=60_000, wait=1_500, pid=os.getpid())
    try:
        held.__enter__()
    except PortDaddyError as problem:
        if problem.code != "LOCK_HELD":
            raise
        pid = pd.check_lock(project.handle)["pid"]
        which = f" ({project.context})" if project.context else ""
        end = f"`kill {pid}`" if project.kind == "run" else "`pd down`"
        raise PortDaddyError("ALREADY_RUNNING", f"{project.name}{which} is run by pid {pid} already; see what it does with "
                             f"`pd logs -f`, end it with {end}, or give this one another name or --context",
                             pid=pid) from None
    try:
        pd.register(project.handle, type="dev", pid=os.getpid())
        with pd.start_heartbeat(30_000):
            pd.autostart = False  # who stops the daemon meanwhile means it
            status = Supervisor(project, pd, cursor, keep_going, health, plain).run()
        with contextlib.suppress(PortDaddyError):
            pd.unregister()
    finally:
        with contextlib.suppress(PortDaddyError):
            held.__exit__(None, None, None)
    return status


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


# --- MCP --------------------------------------------------------------------------------------------------------------

# The tools of the Model Context Protocol are a few rows of the table. Whoever acts says who it is, in `agent`: what an
# agent holds is bound to that name and a lease, not to the process of this face, which agents end and start as they like.

MCP_VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28")  # the last one without a handshake
MCP_VERSION = "io.modelcontextprotocol/protocolVersion"  # where a request says it since then
MCP_CODES = {"BAD_JSON": -32700, "BAD_REQUEST": -32600, "METHOD_NOT_ALLOWED": -32601, "BAD_VALUE": -32602,
             "INTERNAL": -32603, "NOT_IMPLEMENTED": -32022}
MCP_PATIENCE = 50_000  # clients give up a call after a minute
MCP_CACHE = {"ttlMs": 3_600_000, "cacheScope": "public"}
MCP_ABOUT = (
    "Port Daddy keeps agents on one machine from colliding. Give your agent id, always the same, as `agent`. Claim a port "
    "before you start a server; take a lock before you touch what others touch, extend it while you work, and unlock it "
    "after. A refusal names who is in the way: wait, do something else, or ask them by publishing to the channel "
    "agent:<their id>, and read your own with poll. A wait ends after 50 seconds; call again to go on.")
MCP_AGENT = Field("agent", "agent", PLAIN_NAME, True, None)
MCP_TOOLS: tuple[tuple[str, str, str, str], ...] = (  # operation, title, hints, what it gives (?: or null)
    ("claim", "Claim a port", "idempotent", "id:string port:integer existing:boolean message:string"),
    ("release", "Release a port", "destructive idempotent", "released:integer releasedPorts:array message:string"),
    ("list_services", "List services and their ports", "read idempotent", "services:array count:integer"),
    ("wait_for_services", "Wait until services are up", "read idempotent", "services:array healthy:boolean"),
    ("lock", "Take a lock", "", "name:string owner:string token:integer expiresAt:integer waited:integer"),
    ("extend_lock", "Keep a lock for longer", "idempotent", "name:string token:integer expiresAt:integer"),
    ("unlock", "Release a lock", "destructive idempotent", "name:string released:boolean message:string"),
    ("list_locks", "List locks and their holders", "read idempotent", "locks:array count:integer"),
    ("publish", "Publish a message", "", "id:integer channel:string message:string"),
    ("poll", "Wait for a message", "", "message:object? lastId:integer"),
    ("ack", "Acknowledge a leased message", "idempotent", "success:boolean"),
    ("get_activity", "See what happened", "read idempotent", "entries:array count:integer"))


def mcp_inputs(one: Operation, hints: str) -> Reply:
    """The arguments of a tool: `agent`, where it acts, in the place of whatever the operation calls it."""
    hidden = ("pid",) if "read" in hints else ("pid", "agent", "owner", "sender")
    fields = [field for field in one.fields.values() if field.wire not in hidden]
    fields += [] if "read" in hints else [MCP_AGENT]
    properties = {field.wire: field.schema() for field in fields}
    for wire in {"wait", "timeout"} & set(properties):
        properties[wire]["description"] += "; at most 50s here"
    if "agent" in properties and "read" not in hints:
        properties["agent"]["description"] = f"who you are, always the same: {PLAIN_NAME.expected}"
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": [field.wire for field in fields if field.required]}


def mcp_outputs(returns: str) -> Reply:
    gives = dict(word.split(":") for word in returns.split())
    return {"type": "object", "required": list(gives), "properties": {
        wire: {"type": [name[:-1], "null"] if name.endswith("?") else name} for wire, name in gives.items()}}


def mcp_tool(name: str) -> tuple[Operation, str]:
    """The operation behind a tool, and its hints; BAD_VALUE when it is no tool."""
    for tool, _, hints, _ in MCP_TOOLS:
        if tool == name:
            return next(one for one in OPERATIONS if one.name == name), hints
    raise PortDaddyError("BAD_VALUE", f"there is no tool {plain(name)[:60]!r}; tools/list names them")


def mcp_tools() -> list[Reply]:
    """The list of tools, always in the same order."""
    found = []
    for name, title, hints, returns in MCP_TOOLS:
        one, _ = mcp_tool(name)
        notes = {"title": title, "readOnlyHint": "read" in hints, "destructiveHint": "destructive" in hints,
                 "idempotentHint": "idempotent" in hints, "openWorldHint": False}
        found.append({"name": name, "title": title, "description": one.summary, "inputSchema": mcp_inputs(one, hints),
                      "outputSchema": mcp_outputs(returns), "annotations": notes})
    return found


def mcp_reply(reply: Reply) -> Reply:
    return {"content": [{"type": "text", "text": to_json(reply)}], "structuredContent": reply, "isError": False}


def mcp_refusal(problem: PortDaddyError) -> Reply:
    """A refusal that a model can act on: the sentence, and the facts. It is not what the outputSchema describes, and some
    clients check that whatever `isError` says: so it is text only."""
    return {"content": [{"type": "text", "text": text} for text in (str(problem), to_json(problem.body))], "isError": True}


def mcp_config(program: str, words: Sequence[str], environ: Mapping[str, str]) -> tuple[str, str]:
    """How a program is told of this face: the file to put it into, and the text."""
    entry: Reply = {"command": words[0], "args": list(words[1:]), **({"env": dict(environ)} if environ else {})}
    if program == "codex":  # a JSON string without \\/ is a TOML string
        env = "".join(f"\n{name} = {to_json(value)}" for name, value in environ.items())
        text = f"[mcp_servers.port-daddy]\ncommand = {to_json(words[0])}\nargs = {to_json(list(words[1:]))}"
        return "~/.codex/config.toml", text + (f"\n\n[mcp_servers.port-daddy.env]{env}" if env else "")
    if program == "vscode":
        return ".vscode/mcp.json", json.dumps({"servers": {"port-daddy": {"type": "stdio", **entry}}}, indent=2)
    path = ".mcp.json" if program == "claude" else ".cursor/mcp.json"
    return path, json.dumps({"mcpServers": {"port-daddy": entry}}, indent=2)


# --- OpenAPI, and what else machines read -----------------------------------------------------------------------------

def describe(one: Operation, method: str, path: str) -> Reply:
    """One route of an operation, as an Operation Object of OpenAPI."""
    in_path, in_query, in_body = [], [], {}
    for wire, field in one.fields.items():
        schema = field.schema()
        if re.search(rf"\{{{wire}[.}}]", path):
            in_path.append({"name": wire, "in": "path", "required": True, "schema": schema})
        elif method in ("GET", "DELETE"):
            in_query.append({"name": wire, "in": "query", "required": field.required, "schema": schema})
        else:
            in_body[wire] = schema if field.default is None else {**schema, "default": field.default}
    streams = one.function.__annotations__["return"] == "Stream"
    shape = {"text/event-stream": {"schema": {"type": "string"}}} if streams else {
        "application/json": {"schema": {"type": "object"}}}
    first = (method, path) == one.routes[0]
    told: Reply = {
        "operationId": one.name if first else "_".join((one.name, method.lower(), *re.findall(r"\w+", path))),
        "summary": one.summary, "parameters": in_path + in_query,
        "responses": {"200": {"description": "done", "content": shape}, **failures(one),
                      "default": {"$ref": "#/components/responses/Problem"}}}
    if in_body:
        needed = [wire for wire in in_body if one.fields[wire].required]
        body = {"type": "object", "properties": in_body, "additionalProperties": False,
                **({"required": needed} if needed else {})}
        told["requestBody"] = {"required": bool(needed), "content": {"application/json": {"schema": body}}}
    return told


def failures(one: Operation) -> Reply:
    """The failures that are an operation's own, by their HTTP status."""
    found: dict[str, list[str]] = {}
    for code in one.errors:
        found.setdefault(str(PROBLEMS[code][0]), []).append(f"{code}: {PROBLEMS[code][2]}")
    return {status: {"description": "; ".join(words), "content": {"application/json": {"schema": {
        "$ref": "#/components/schemas/Problem"}}}} for status, words in sorted(found.items())}


def openapi(port: int) -> Reply:
    """The operations as an OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.1.html)."""
    paths: dict[str, Reply] = {}
    for one in OPERATIONS:
        for method, path in one.routes:
            paths.setdefault(path.replace("...}", "}"), {})[method.lower()] = describe(one, method, path)
    problem = {"type": "object", "required": ["success", "code", "error"], "properties": {
        "success": {"const": False}, "error": {"type": "string"},
        "code": {"enum": [code for code, (status, _, _) in PROBLEMS.items() if status]}}}
    return {"openapi": "3.1.0", "info": {"title": "Port Daddy", "version": __version__},
            "servers": [{"url": f"http://127.0.0.1:{port}"}], "paths": paths,
            "components": {"schemas": {"Problem": problem}, "responses": {"Problem": {
                "description": "It failed, and changed nothing; `code` says how, `error` what to do.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}}}}


@page("/openapi.json")
def openapi_page(daemon: Daemon, accept: str) -> Page:
    return Page("application/json", to_json(openapi(daemon.port)).encode())


@page("/llms.txt")
def llms_page(daemon: Daemon, accept: str) -> Page:
    """What an agent has to know to use the daemon with curl alone."""
    url = daemon.url
    lines = [f"# Port Daddy {__version__}", "",
             "> The one daemon that coding agents, terminals and dev servers here ask for ports, locks, tasks.", "",
             "GET and DELETE take fields from the query, POST and PUT from a JSON body. A failure has `code` and `error`.",
             f"Durations are milliseconds or text such as 30s. The fields of every request: {url}/openapi.json", "",
             f"- a port: curl -d '{{\"id\": \"myapp:api\"}}' {url}/claim",
             f"- a lock: curl -d '{{\"owner\": \"agent-1\", \"wait\": \"60s\"}}' {url}/locks/migration",
             f"- done:   curl -X DELETE '{url}/locks/migration?owner=agent-1'",
             f"- a task: curl -d '{{\"payload\": 1}}' {url}/msg/tasks",
             f"- next:   curl '{url}/msg/tasks/poll?timeout=30s'",
             "", "## Requests", ""]
    lines += [f"- {method} {path}: {one.summary}" for one in OPERATIONS for method, path in one.routes]
    return Page("text/plain; charset=utf-8", ("\n".join(lines) + "\n").encode())


@page("/metrics")
def metrics_page(daemon: Daemon, accept: str) -> Optional[Page]:
    """The numbers of `metrics` for Prometheus (its text format 0.0.4), when it is what asks."""
    if "text/plain" not in accept and "openmetrics" not in accept:
        return None
    lines = []
    for wire, value in metrics(daemon, Asker()).items():
        name = re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", wire)
        if wire == "uptime":
            name, value = "uptime_seconds", value / 1000
        lines += [f"# HELP port_daddy_{name} {name.replace('_', ' ').capitalize()} of this daemon.",
                  f"# TYPE port_daddy_{name} gauge", f"port_daddy_{name} {value}"]
    return Page("text/plain; version=0.0.4; charset=utf-8", ("\n".join(lines) + "\n").encode())


SKILL = """---
name: port-daddy
description: Share one machine with other agents. Use before starting a dev server (a port that nobody else has), before a
  migration, deploy, release or any edit that must not run twice at once (a lock), to hand out or take tasks (a queue), or
  to see which agents, ports and services there are. Triggers - port in use, EADDRINUSE, lock, mutex, queue, coordinate.
---

# Port Daddy

`pd` is `python3 port_daddy.py`. It starts its daemon when needed. Add `--json` for the whole reply, `-q` for the one value.
Status: 0 done, 1 failed, 2 usage, 3 not found, 4 somebody else has it, 5 timed out, 6 no daemon. Never kill what you did
not start: at 4, the message says who is in the way.

## A port that is yours, the same one every day

```sh
pd claim myapp:api -q
pd url myapp:api
pd find 'myapp:*'
pd release myapp:api
```

## One at a time

```sh
pd with-lock db-migration --wait 60s -- echo migrating
pd check db-migration
```

## Tasks: published once, worked on by one, given again when it fails

```sh
pd pub tasks '{"action": "build"}'
pd work tasks --idle 1ms -- cat
```

## Be seen by the others

```sh
pd agent register agent-1
pd agents
pd activity --limit 5
pd agent unregister agent-1
```

Everything else: `pd help`, and `pd COMMAND --help`.
"""

COMPLETION = {"bash": r"""_port_daddy() {
    local line="${COMP_LINE:0:COMP_POINT}" words word one colon=""
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    word="${words[${#words[@]}-1]}"
    [[ $COMP_WORDBREAKS == *:* ]] && colon="${word%"${word##*:}"}"  # bash takes what follows a colon for a word
    COMPREPLY=()
    while IFS= read -r one; do
        COMPREPLY+=("${one#"$colon"}")
    done < <(PROGRAM complete -- "${words[@]:1}" 2>/dev/null)
}
complete -o default -F _port_daddy pd port-daddy port_daddy.py
""", "zsh": r"""#compdef pd port-daddy port_daddy.py
_port_daddy() {
    local -a found
    found=(${(f)"$(PROGRAM complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    compadd -a found
}
compdef _port_daddy pd port-daddy port_daddy.py
""", "fish": r"""function __port_daddy
    set -l words (commandline -opc) (commandline -ct)
    PROGRAM complete -- $words[2..-1] 2>/dev/null
end
complete -c pd -c port-daddy -c port_daddy.py -a '(__port_daddy)'
"""}

LIVE = (("release url wait logs", "list_services", "services", "id"),  # whose names a command may be given
        ("pub poll sub work watch ack nack touch groups dead redrive clear", "list_channels", "channels", "channel"),
        ("lock unlock extend check with-lock", "list_locks", "locks", "name"), ("agent", "list_agents", "agents", "id"),
        ("webhook", "list_webhooks", "webhooks", "id"))


# ======================================================================================================================
# 15. TOOLS — looking at a folder, and what else helps from outside
# ======================================================================================================================

# What gives a framework away, how its command is told the port, and the tier it belongs to: what is in `web` needs what
# is in `api`, and that needs what is in `data`. The first that is found counts.
NODE_FRAMEWORKS: tuple[tuple[str, str, str], ...] = (  # dependency in package.json, arguments, tier
    ("next", "-p ${PORT}", "web"), ("nuxt", "--port ${PORT}", "web"), ("astro", "--port ${PORT}", "web"),
    ("gatsby", "-p ${PORT}", "web"), ("@angular/cli", "--port ${PORT}", "web"), ("@remix-run/dev", "--port ${PORT}", "web"),
    ("@vue/cli-service", "--port ${PORT}", "web"), ("parcel", "-p ${PORT}", "web"), ("vite", "--port ${PORT}", "web"),
    ("webpack-dev-server", "--port ${PORT}", "web"), ("react-scripts", "", "web"), ("@nestjs/core", "", "api"),
    ("express", "", "api"), ("fastify", "", "api"), ("koa", "", "api"), ("hono", "", "api"), ("@hapi/hapi", "", "api"))
PYTHON_FRAMEWORKS: tuple[tuple[str, str, str, str], ...] = (  # requirement, what its module holds, command, tier
    ("django", "", "python manage.py runserver ${PORT}", "web"),
    ("fastapi", r"^(\w+) *(?::.*)?= *FastAPI\(", "uvicorn {module}:{app} --reload --port ${PORT}", "api"),
    ("starlette", r"^(\w+) *(?::.*)?= *Starlette\(", "uvicorn {module}:{app} --reload --port ${PORT}", "api"),
    ("flask", r"^(\w+) *(?::.*)?= *Flask\(", "flask --app {module} run --port ${PORT}", "api"),
    ("streamlit", r"^(import streamlit)", "streamlit run {module}.py --server.port ${PORT}", "web"))
FILE_FRAMEWORKS: tuple[tuple[str, str, str, str], ...] = (  # file, what one of its kind holds, command, tier
    ("bin/rails", "", "bin/rails server -p ${PORT}", "web"), ("go.mod", r"\.go:.*(ListenAndServe|gin\.|echo\.|fiber\.)",
                                                              "go run .", "api"),
    ("Cargo.toml", r"Cargo.toml:(axum|actix-web|rocket|warp|hyper|poem|tide) *=", "cargo run", "api"))
DATA_IMAGES = r"postgres|mysql|mariadb|mongo|redis|valkey|memcached|elasticsearch|rabbitmq|nats|kafka|minio|clickhouse"
PACKAGE_MANAGERS = (("pnpm-lock.yaml", "pnpm run {}"), ("yarn.lock", "yarn run {}"), ("bun.lockb", "bun run {}"),
                    ("bun.lock", "bun run {}"), ("", "npm run {}"))


class Found(NamedTuple):
    """A service that a folder seems to hold."""

    name: str
    tier: str
    cmd: str
    folder: str = "."
    port: Optional[int] = None


def scan(top: str) -> dict[str, Any]:
    """The project file that one would write for a folder, from what lies in it; no program is run and nothing written."""
    found: list[Found] = [*scan_compose(top), *scan_procfile(top)]
    for folder in workspace_folders(top):
        name = slug(os.path.basename(folder if folder != "." else top)).lower()
        place = os.path.join(top, folder)
        seen = scan_node(place, top) or scan_python(place) or scan_files(place)
        if seen and not (folder == "." and any(other.tier != "data" for other in found)):
            found.append(Found(name if folder != "." else seen[0], *seen, folder))
    services: dict[str, Any] = {}
    for one in sorted(found, key=lambda one: ("data", "api", "web", "worker").index(one.tier)):
        name = one.name
        while name in services:
            name += f"-{one.tier}"
        below = {"web": ("api", "data"), "api": ("data",), "worker": ("data",)}.get(one.tier, ())
        tiers = [[other.name for other in found if other.tier == tier] for tier in below]
        needs = next((tier for tier in tiers if tier), [])
        told = "${PORT}" in one.cmd or "$PORT" in one.cmd or one.port or one.tier == "worker"
        entry = {"cmd": one.cmd, "cwd": one.folder if one.folder != "." else None, "port": one.port,
                 "env": None if told else {"PORT": "${PORT}"}, "noPort": True if one.tier == "worker" else None,
                 "needs": needs}
        services[name] = {field: value for field, value in entry.items() if value}
    return {"project": slug(os.path.basename(os.path.abspath(top))), "services": services}


def workspace_folders(top: str) -> list[str]:
    """The folder itself, the workspaces that it declares, and what lies below it or in apps, packages and services."""
    import glob
    package = read_object(os.path.join(top, "package.json"))
    globs = package.get("workspaces") or re.findall(r"(?m)^ *- *['\"]?([^'\"\n]+)",
                                                    read_text(f"{top}/pnpm-workspace.yaml"))
    globs = globs.get("packages", []) if isinstance(globs, dict) else globs
    paths = {path for pattern in [*globs, "*", "apps/*", "packages/*", "services/*"]
             for path in glob.glob(os.path.join(top, str(pattern).strip("!"))) if os.path.isdir(path)}
    left_out = r"\.|(node_modules|venv|dist|build|target|tests?)$"
    return [".", *sorted(os.path.relpath(path, top) for path in paths if not re.match(left_out, os.path.basename(path)))]


def scan_node(folder: str, top: str) -> Optional[tuple[str, str]]:
    """Tier and command of a package.json: its dev script, with the port where its framework wants it."""
    package = read_object(os.path.join(folder, "package.json"))
    scripts = package.get("scripts") or {}
    script = next((name for name in ("dev", "start:dev", "develop", "start", "serve") if name in scripts), None)
    depends = {**(package.get("dependencies") or {}), **(package.get("devDependencies") or {})}
    known = next((one for one in NODE_FRAMEWORKS if one[0] in depends), None)
    if script is None or known is None:
        return None
    template = next(words for lock, words in PACKAGE_MANAGERS if not lock or any(
        os.path.exists(os.path.join(place, lock)) for place in (folder, top)))
    separator = " -- " if template.startswith("npm") else " "
    return known[2], template.format(script) + (separator + known[1] if known[1] else "")


def scan_python(folder: str) -> Optional[tuple[str, str]]:
    """Tier and command of a Python web program: what it requires, and the module that holds the application."""
    import glob
    files = ("requirements.txt", "pyproject.toml", "Pipfile")
    wanted = "\n".join(read_text(os.path.join(folder, name)) for name in files).lower()
    for requirement, sign, template, tier in PYTHON_FRAMEWORKS:
        if not re.search(rf"(?m)(^|[\"'\s]){requirement}\b", wanted):
            continue
        if not sign and os.path.exists(os.path.join(folder, "manage.py")):
            return tier, template
        places = ("*.py", "app/*.py", "src/*.py", "*/main.py", "*/app.py") if sign else ()
        for path in sorted(path for place in places for path in glob.glob(os.path.join(folder, place))):
            app = re.search(f"(?m){sign}", read_text(path))
            if app:
                module = os.path.relpath(path, folder)[:-3].replace("/", ".")
                return tier, template.replace("{module}", module).replace("{app}", app.group(1))
    return None


def scan_files(folder: str) -> Optional[tuple[str, str]]:
    import glob
    for name, sign, template, tier in FILE_FRAMEWORKS:
        if not os.path.exists(os.path.join(folder, name)):
            continue
        paths = [os.path.join(folder, name), *glob.glob(os.path.join(folder, "*.go"))]
        lines = (f"{os.path.basename(path)}:{line}" for path in paths for line in read_text(path).splitlines())
        if not sign or any(re.search(sign, line) for line in lines):
            return tier, template
    return None


def scan_procfile(folder: str) -> Iterator[Found]:
    """foreman's file: the process `web` gets the port, the others none."""
    for name, cmd in re.findall(r"(?m)^([A-Za-z0-9_-]+):[ \t]*(.+)$", read_text(os.path.join(folder, "Procfile"))):
        yield Found(slug(name), "web" if name == "web" or "$PORT" in cmd else "worker", cmd.strip())


def scan_compose(folder: str) -> Iterator[Found]:
    """Compose's services that publish a port. Read by indentation: enough of YAML for what people write there."""
    text = "".join(read_text(os.path.join(folder, name)) for name in (
        "compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml"))
    body = re.search(r"(?m)^services:[ \t]*\n((?:[ \t]+.*\n|[ \t]*#.*\n|[ \t]*\n)*)", text + "\n")
    blocks = re.findall(r"(?m)^(  |    )([A-Za-z0-9._-]+):[ \t]*\n((?:\1[ \t]+.*\n|[ \t]*\n)*)",
                        body.group(1) if body else "")
    for _, name, block in blocks:
        ports = re.search(r"(?m)^[ \t]+ports:[ \t]*(\[.*\]|(?:\n[ \t]+-.*)+)", block)
        published = re.search(r"(?:[\[\-, \"'.:0-9]|^)([0-9]{2,5}):[0-9]{2,5}", ports.group(1)) if ports else None
        if published:
            image = re.search(r"(?m)^[ \t]+image:[ \t]*(\S+)", block)
            tier = "data" if image and re.search(DATA_IMAGES, image.group(1)) else "api"
            yield Found(slug(name), tier, f"docker compose up {name}", ".", int(published.group(1)))


# --- bench ------------------------------------------------------------------------------------------------------------

# The limit is a server of the same standard library that reads a request and sends fixed bytes. It and the daemon answer
# in turn, on one CPU, to one client on another: spread over two, the same server gave 6,000 or 28,000 by chance.

FIXED_REPLY = (b"HTTP/1.1 200 OK\r\nServer: limit\r\nContent-Type: application/json\r\nContent-Length: 84\r\n\r\n"
               b'{"padding":"%s"}' % (b"." * 70))


def limit_server() -> None:
    """The least that a threaded server in Python can do, for whoever wants to know what the rest costs."""
    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionResetError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(65536):
                connection.sendall(FIXED_REPLY)

    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    door.listen(1024)
    out(f"limit listening on http://127.0.0.1:{door.getsockname()[1]}")
    while True:
        threading.Thread(target=answer, args=(door.accept()[0],), daemon=True).start()


class Row(NamedTuple):
    """A figure and what belongs to it. `beside` is the same of what it is compared with: another rate, or another p50."""

    name: str
    figure: float
    unit: str  # "of the limit" (at least the goal), or "ms", "MB", "times" (at most)
    goal: Optional[float]
    rate: Optional[float] = None  # operations per second
    p50: Optional[float] = None  # ms
    p99: Optional[float] = None
    beside: Optional[float] = None

    @property
    def met(self) -> Optional[bool]:
        return None if self.goal is None else self.figure >= self.goal if self.unit == "of the limit" else (
            self.figure <= self.goal)

    def __str__(self) -> str:
        whole = 1.0 if self.unit == "of the limit" else self.goal or self.figure
        filled = min(20, round(20 * self.figure / whole))
        shown = f"{self.figure:.2f}" if self.unit in ("of the limit", "times", "ms") else f"{self.figure:.0f}"
        rate = f"{self.rate:,.0f}/s" if self.rate else ""
        times = f"p50 {self.p50:.2f}  p99 {self.p99:.2f} ms" if self.p50 is not None and self.p99 is not None else ""
        return f"{self.name:<62} {'█' * filled}{'·' * (20 - filled)} {shown:>6} {self.unit:<12} {rate:>9}  {times}".rstrip()


def at(times: Sequence[float], share: float) -> float:
    """The time, in ms, within which that share of all lay."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))] * 1000


def request_bytes(method: str, target: str, **fields: Any) -> bytes:
    body = to_json(fields).encode() if fields else b""
    head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    return f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode() + body


def lock_cycle(name: str) -> list[bytes]:
    return [request_bytes("POST", f"/locks/{name}", owner="bench"), request_bytes("DELETE", f"/locks/{name}?owner=bench")]


def drive(lines: Sequence[socket.socket], cycles: Sequence[Sequence[bytes]], seconds: float = 0) -> list[float]:
    """Keep one request under way on each connection, round and round, until all cycles are over and so is the time; how
    long each took. The whole of it is one loop of recv and send, so that the client costs little, and always the same."""
    clock, took, size, position = time.perf_counter, [], len(cycles[0]), 0
    end, sent = clock() + seconds, [0.0] * len(lines)
    for place, line in enumerate(lines):
        sent[place] = clock()
        line.sendall(cycles[place][0])
    while True:
        position = (position + 1) % size
        last = position == 0 and clock() >= end
        for place, line in enumerate(lines):
            reply = line.recv(65536)
            now = clock()
            took.append(now - sent[place])
            if not reply.startswith(b"HTTP/1.1 200"):
                raise PortDaddyError("INTERNAL", f"the server answered {reply[:300].decode('latin-1')!r}")
            if not last:
                sent[place] = now
                line.sendall(cycles[place][position])
        if last:
            return took


def drive_anew(port: int, request: bytes, seconds: float) -> list[float]:
    """A new connection for each request."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        with dial([(socket.AF_INET, 0, 0, "", ("127.0.0.1", port))], 10) as line:
            drive([line], [[request]])
        took.append(time.perf_counter() - began)
    return took


def fetch_body(line: socket.socket, method: str, target: str, **fields: Any) -> bytes:
    """One request, and the whole body of its reply."""
    line.sendall(request_bytes(method, target, **fields))
    head, _, body = line.recv(65536).partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length:")[2].split()[0])
    parts = [body]
    while sum(map(len, parts)) < size:
        parts.append(line.recv(1 << 20))
    return b"".join(parts)


def fetch(line: socket.socket, method: str, target: str, **fields: Any) -> Reply:
    return json.loads(fetch_body(line, method, target, **fields))  # type: ignore[no-any-return]


class Bench:
    """One run: its children, its connections, and the rows so far. However we end, the guardian ends the children."""

    def __init__(self, quick: bool, show: Callable[[Row], None]) -> None:
        import tempfile
        self.rounds, self.seconds, self.scale = (1, 0.02, 100) if quick else (5, 0.4, 1)
        self.rows: list[Row] = []
        self.show, self.undo = show, contextlib.ExitStack()
        self.folder = self.undo.enter_context(tempfile.TemporaryDirectory(prefix="port-daddy-bench-"))
        self.guardian = Guardian()
        self.undo.callback(self.guardian.close)
        self.cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.started = 0

    def pin(self, place: int) -> None:
        """Go to one CPU (0 is the servers', -1 the client's), with whatever we start from now on."""
        if len(self.cpus) > 1:
            os.sched_setaffinity(0, {self.cpus[place]})

    def spawn(self, home: str, *words: str) -> tuple[subprocess.Popen[bytes], str]:
        """Start this Python with some words and a state folder of its own; the process, and where its output goes."""
        self.started += 1
        folder, said = os.path.dirname(os.path.abspath(__file__)), os.path.join(self.folder, f"{self.started}.log")
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PORT_DADDY", "PYTHON"))}
        environ.update(PORT_DADDY_HOME=os.path.join(self.folder, home), PORT_DADDY_PORT="0", PYTHONPATH=folder,
                       PYTHONPYCACHEPREFIX=os.path.join(self.folder, "cache"))
        return process_start([sys.executable, *words], environ, said), said

    @contextlib.contextmanager
    def server(self, home: str, *words: str) -> Iterator[tuple[int, int]]:
        """A server on the servers' CPU, once it answers: its pid and its port."""
        self.pin(0)
        process, said = self.spawn(home, *words)
        self.guardian.add(process.pid, 15, STOP_TIMEOUT + 1)
        self.pin(-1)
        try:
            while not (found := re.search(r"listening on http://127\.0\.0\.1:([0-9]+)\n", read_text(said))):
                if process.poll() is not None:
                    raise PortDaddyError("INTERNAL", f"a server did not start: {read_text(said).strip()[-300:]}")
                time.sleep(0.001)
            drive([self.line(int(found[1]))], [[request_bytes("GET", "/health")]])
            yield process.pid, int(found[1])
        finally:
            group_signal(process.pid, 15)
            process.wait(STOP_TIMEOUT + 10)
            self.guardian.remove(process.pid)

    def start(self, home: str, *words: str) -> tuple[int, int]:
        return self.undo.enter_context(self.server(home, *words or own_command("serve")[0][1:]))

    def line(self, port: int) -> socket.socket:
        line = self.undo.enter_context(dial([(socket.AF_INET, 0, 0, "", ("127.0.0.1", port))], 10))
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 30, 0))
        line.settimeout(None)
        return line

    def row(self, name: str, figure: float, unit: str, goal: Optional[float], took: Sequence[float] = (),
            **more: Optional[float]) -> None:
        times = {"p50": at(took, 0.5), "p99": at(took, 0.99)} if took else {}
        self.rows.append(Row(name, figure, unit, goal, **times, **more))
        self.show(self.rows[-1])

    # --- what is measured ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.timed_command(*own_command("version")[0][1:])()  # so that no daemon that is measured has to compile
        self.pid, self.port = self.start("daemon")
        self.limit = self.start("limit", os.path.abspath(__file__), "limit")[1]
        self.crowds()
        self.beside_the_limit("GET /health, 1 connection", 0.60, [[request_bytes("GET", "/health")]])
        self.beside_the_limit("GET /health, 16 connections", 0.60, [[request_bytes("GET", "/health")]] * 16)
        claims = [request_bytes("POST", "/claim", id="bench:api")]
        drive([self.line(self.port)], [claims])
        self.beside_the_limit("GET /services/{id}", 0.45, [[request_bytes("GET", "/services/bench:api")]])
        self.beside_the_limit("POST /claim of a known identity", 0.35, [claims])
        self.beside_the_limit("publish", 0.30, [[request_bytes("POST", "/msg/bench", payload={"n": 1})]])
        self.beside_the_limit("lock, unlock: each", 0.30, [lock_cycle("bench")])
        self.beside_the_limit("GET /health, a new connection for each", 0.55, None)
        self.starts()
        self.growth()

    def beside_the_limit(self, name: str, goal: float, cycles: Optional[Sequence[Sequence[bytes]]]) -> None:
        """The same requests to the daemon and to the limit server, in turn."""
        ports = self.port, self.limit
        all_took: list[list[float]] = [[], []]
        rates: list[list[float]] = [[], []]
        lines = [[self.line(port) for _ in cycles or ()] for port in ports]
        for place in (0, 1) * self.rounds:
            began = time.perf_counter()
            took = drive(lines[place], cycles, self.seconds) if cycles else (
                drive_anew(ports[place], request_bytes("GET", "/health"), self.seconds))
            rates[place].append(len(took) / (time.perf_counter() - began))
            all_took[place].extend(took)
        ours, limit = (sorted(found)[self.rounds // 2] for found in rates)
        ratio = sorted(our / their for our, their in zip(*rates))[self.rounds // 2]
        self.row(name, ratio, "of the limit", goal, all_took[0], rate=ours, beside=limit)

    def crowds(self) -> None:
        """Who waits: how soon it is woken, alone and among others, and the memory that it takes."""
        many, pid = 500 // self.scale, self.pid
        control, idle = self.line(self.port), memory(pid)
        waiter = self.line(self.port)
        self.quick_and_steady("publish until a waiting poll returns", self.wakes(waiter))
        stream = self.line(self.port)
        self.follow([stream])
        self.quick_and_steady("publish until a stream has it",
                              [self.heard([stream], control) for _ in range(200 // self.scale)])
        followers = [self.line(self.port) for _ in range(200 // self.scale)]
        self.follow(followers)
        took = [self.heard(followers, control) for _ in range(20)]
        self.row(f"publish until the last of {len(followers)} streams has it", at(took, 0.5), "ms", 100, took)
        self.in_line(control, 50 // min(self.scale, 10))
        for number in range(many):
            self.line(self.port).sendall(request_bytes("GET", f"/msg/other{number}/poll?timeout=60000"))
        while fetch(control, "GET", "/metrics")["waiters"] < many:
            time.sleep(0.005)
        crowded = memory(pid)
        took = self.wakes(waiter)
        self.row(f"publish until a waiting poll returns, {many} others waiting", at(took, 0.5), "ms", 1, took)
        if idle and crowded:
            self.row("memory, idle", idle, "MB", 35)
            self.row(f"memory, {many} polls waiting", crowded, "MB", 70)

    def quick_and_steady(self, name: str, took: Sequence[float]) -> None:
        self.row(name, at(took, 0.5), "ms", 1, took)
        self.row(f"{name}: p99", at(took, 0.99), "ms", 10)

    def wakes(self, waiter: socket.socket) -> list[float]:
        """Seconds from a publish until a poll that waits returns, some times."""
        publisher, took = self.line(self.port), []
        cursor = fetch(publisher, "POST", "/msg/wake", payload=1)["id"]
        for _ in range(200 // self.scale):
            waiter.sendall(request_bytes("GET", f"/msg/wake/poll?timeout=30000&after={cursor}"))
            time.sleep(0.002)  # until it waits; if it does not yet, it has been woken none the less
            began = time.perf_counter()
            publisher.sendall(request_bytes("POST", "/msg/wake", payload=1))
            waiter.recv(65536)
            took.append(time.perf_counter() - began)
            publisher.recv(65536)
            cursor = fetch(publisher, "GET", "/msg/wake?limit=1")["lastId"]
        return took

    def follow(self, streams: Sequence[socket.socket]) -> None:
        for stream in streams:
            stream.sendall(request_bytes("GET", "/msg/stream/subscribe"))
        for stream in streams:
            while b"event: connected" not in stream.recv(65536):
                pass

    def heard(self, streams: Sequence[socket.socket], publisher: socket.socket) -> float:
        """Seconds from a publish until the last of some streams has it."""
        began = time.perf_counter()
        publisher.sendall(request_bytes("POST", "/msg/stream", payload=1))
        for stream in streams:
            while b"data: " not in stream.recv(65536):
                pass
        took = time.perf_counter() - began
        publisher.recv(65536)
        return took

    def in_line(self, control: socket.socket, many: int) -> None:
        """Unlock, until the next of those who wait for the lock has it."""
        lines = [self.line(self.port) for _ in range(many + 1)]
        for place, line in enumerate(lines):
            line.sendall(request_bytes("POST", "/locks/line", owner=f"w{place}", wait=60_000))
            while fetch(control, "GET", "/locks/line").get("waiting", -1) < place:
                time.sleep(0.001)
        lines[0].recv(65536)
        took = []
        for place, line in enumerate(lines[1:]):
            began = time.perf_counter()
            control.sendall(request_bytes("DELETE", f"/locks/line?owner=w{place}"))
            line.recv(65536)
            took.append(time.perf_counter() - began)
            control.recv(65536)
        self.row(f"unlock until the next of {many} waiters has it", at(took, 0.5), "ms", 2, took)

    def starts(self) -> None:
        """Commands and daemons, beside a Python that only imports the largest of what they need."""
        module = os.path.splitext(os.path.basename(__file__))[0]
        plain = self.timed_command("-c", "import json, socket")
        for name, goal, words in ((f"python -m {module} claim x -q", 1.5, ("-m", module)),
                                  (f"python {module}.py claim x -q", None, (os.path.abspath(__file__),))):
            command = self.timed_command(*words, "claim", "x", "-q")
            self.beside(f"{name}, beside import json, socket", goal, command, plain)
        bare = self.timed_command("-c", "import http.server, sqlite3")
        self.fill()
        self.beside(f"python -m {module} serve, beside import http.server, sqlite3", 3, self.timed_server("start"), bare)
        much = f"with {self.most:,} services, {6 * self.most:,} messages"
        self.beside(f"the same, {much}", 3, self.timed_server("full"), bare)

    def beside(self, name: str, goal: Optional[float], ours: Callable[[], float], theirs: Callable[[], float]) -> None:
        pairs = [(ours(), theirs()) for _ in range(2 * self.rounds + 1)][1:]  # the first one compiles
        took, base = ([pair[place] for pair in pairs] for place in (0, 1))
        self.row(name, at(took, 0.5) / at(base, 0.5), "times", goal, took, beside=at(base, 0.5))

    def timed_command(self, *words: str) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            process, said = self.spawn("daemon", *words)
            if process.wait() != 0:
                raise PortDaddyError("INTERNAL", f"{words} failed: {read_text(said)[-300:]}")
            return time.perf_counter() - began
        return run

    def timed_server(self, home: str) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            with self.server(home, "-m", os.path.splitext(os.path.basename(__file__))[0], "serve"):
                return time.perf_counter() - began
        return run

    def fill(self) -> None:
        """A store that has been used: services in the range, a channel that is full, locks that are held."""
        self.most = 5_000 // self.scale
        with self.server("full", os.path.abspath(__file__), "serve") as (_, port):
            line = self.line(port)
            for first, last in ((0, self.most // 5), (self.most // 5, self.most)):
                drive([line], [[request_bytes("POST", "/claim", id=f"full:{number}", port=3100 + 7919 * number % 6900)
                                for number in range(first, last)]])  # all over the range, as hashes would do it
                if first == 0:
                    took = [self.timed_fetch(line, "/services") for _ in range(20)]
                    self.row(f"GET /services with {last:,} services", at(took, 0.5), "ms", 12, took)
            for channel in ("publish", "poll"):
                drive([line], [[request_bytes("POST", f"/msg/{channel}", payload={"n": 1})] * (2 * self.most)])
            self.hold(line, "POST /locks/held{}", self.most, ttl=86_400_000)
            self.hold(line, "POST /agents/agent{}/heartbeat", self.most // 5)
            self.hold(line, "POST /msg/channel{}", 2 * self.most, payload=1)

    @staticmethod
    def hold(line: socket.socket, route: str, count: int, **fields: Any) -> None:
        """The same request for so many names."""
        drive([line], [[request_bytes(*route.format(number).split(" "), **fields) for number in range(count)]])

    def timed_fetch(self, line: socket.socket, target: str) -> float:
        began = time.perf_counter()
        fetch_body(line, "GET", target)
        return time.perf_counter() - began

    def growth(self) -> None:
        """The same operations in a daemon that holds little and in one that holds much, in turn."""
        small, full = (self.line(self.start(home)[1]) for home in ("small", "full"))
        drive([small], [[request_bytes("POST", "/claim", id=f"small:{number}") for number in range(10)]])
        self.hold(small, "POST /locks/held{}", 10, ttl=86_400_000)
        self.hold(small, "POST /agents/agent{}/heartbeat", 10)
        self.hold(small, "POST /msg/channel{}", 10, payload=1)
        publish = request_bytes("POST", "/msg/publish", payload={"n": 1})
        refill = [request_bytes("DELETE", "/msg/publish"), *[publish] * 100]
        drive([small], [[request_bytes("POST", "/msg/poll", payload={"n": 1})] * 100])
        claims = [request_bytes("POST", "/claim", id="known")] * 100
        kinds: tuple[tuple[str, int, int, Callable[[int], list[bytes]]], ...] = (
            ("claim of a known identity, {} services", 10, self.most, lambda number: claims),
            ("claim of a new identity, {} services", 10, self.most, lambda number: [
                request_bytes("POST", "/claim", id=f"new:{number}:{place}") for place in range(40)]),
            ("publish, {} messages kept", 100, 2 * self.most, lambda number: [publish] * 100),
            ("poll of a worker, {} messages kept", 100, 2 * self.most, lambda number: [
                request_bytes("GET", f"/msg/poll/poll?timeout=0&group=g{number}")] * 100),
            ("lock, unlock: each, {} locks held", 10, self.most, lambda number: lock_cycle("bench") * 50),
            ("publish, {} channels", 10, 2 * self.most, lambda number: [
                request_bytes("POST", f"/msg/channel{place % 10}", payload=1) for place in range(100)]),
            ("heartbeat, {} agents", 10, self.most // 5, lambda number: [
                request_bytes("POST", f"/agents/agent{place % 10}/heartbeat") for place in range(100)]))
        for name, few, many, requests in kinds:
            took: list[list[float]] = [[], []]
            for number in range(self.rounds):
                drive([small], [refill])
                for place, line in enumerate((small, full)):
                    took[place].extend(drive([line], [requests(number)]))
                    drive([line], [[request_bytes("DELETE", "/release", id="new:*")]])
            self.grown(name.format(f"{few:,} -> {many:,}"), *took)
        health, others = request_bytes("GET", "/health"), 1_000 // self.scale
        alone = drive([small], [[health] * 500])
        drive([self.line(small.getpeername()[1]) for _ in range(others)], [[health]] * others)  # each has its thread now
        self.grown(f"GET /health, 1 -> {others + 1:,} connections", alone, drive([small], [[health] * 500]))

    def grown(self, name: str, few: Sequence[float], many: Sequence[float]) -> None:
        self.row(name, at(many, 0.5) / at(few, 0.5), "times", 1.5, many, beside=at(few, 0.5))


def memory(pid: int) -> Optional[float]:
    """The resident memory of a process in MB, where it can be known."""
    found = re.search(r"VmRSS:\s+([0-9]+) kB", read_text(f"/proc/{pid}/status"))
    return int(found[1]) / 1024 if found else None


def bench(quick: bool, show: Callable[[Row], None]) -> Reply:
    """Measure everything, telling each row as it comes. -> {machine, rows}"""
    import platform
    raise_limits()
    one = Bench(quick, show)
    with one.undo:
        one.run()
    model = re.search(r"model name\s*: (.*)", read_text("/proc/cpuinfo"))
    return {"machine": {"cpu": model[1] if model else platform.processor() or platform.machine(), "cores": os.cpu_count(),
                        "pinned": len(one.cpus) > 1, "system": platform.system(), "python": platform.python_version(),
                        "date": time.strftime("%Y-%m-%d")},
            "quick": quick,
            "rows": [{name: round(value, 3) if isinstance(value, float) else value for name, value in
                      present(**row._asdict(), met=row.met).items()} for row in one.rows]}


def bench_table(report: Reply) -> str:
    """A run as Markdown, for the README."""
    lines = ["| what | figure | goal | per second | p50, ms | p99, ms |", "|---|---|---|---|---|---|"]
    for found in report["rows"]:
        one = Row(**{name: found.get(name) for name in Row._fields})
        least = one.unit == "of the limit"
        goal = f"{'≥' if least else '≤'} {one.goal:g}" if one.goal else ""
        cells = [f"{one.figure:.2f} {one.unit}", goal, f"{one.rate:,.0f}" if one.rate else "",
                 *(f"{value:.2f}" if value is not None else "" for value in (one.p50, one.p99))]
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    machine = report["machine"]
    return "\n".join(lines) + (f"\n\nMeasured on {machine['date']}: {machine['cpu']}, {machine['cores']} cores, "
                              f"{machine['system']}, Python {machine['python']}.\n")


# --- what is wrong here -----------------------------------------------------------------------------------------------

class Finding(NamedTuple):
    """What `doctor` found: state is ok, warn or fail, and `cure` says what to do about it."""

    check: str
    state: str
    message: str
    cure: str = ""


def diagnose(settings: Settings) -> list[Finding]:
    """Everything that is known to keep people from their daemon. Looks, starts nothing and changes nothing."""
    found = [check_python(), check_home(settings.home), *check_daemon(settings), check_port(settings)]
    return [*found, *check_copies(os.environ.get("PATH", "")), check_proxies(os.environ), check_loopback(), check_time()]


def check_python() -> Finding:
    said = f"Python {sys.version.split()[0]}, {sys.executable}"
    try:
        import sqlite3
    except ImportError:
        return Finding("python", "fail", f"{said}, has no sqlite3", "use a Python that was built with SQLite")
    if sqlite3.sqlite_version_info < (3, 24):
        return Finding("python", "fail", f"{said}: its SQLite {sqlite3.sqlite_version} is older than 3.24",
                       "use a newer Python")
    return Finding("python", "ok", f"{said}, SQLite {sqlite3.sqlite_version}")


def check_home(home: str) -> Finding:
    try:
        mode, owner = file_owner(home)
    except PortDaddyError as problem:
        above = home
        while not os.path.exists(above):
            above = os.path.dirname(above)
        if above != home and os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK):
            return Finding("state", "ok", f"{home} will be made when a daemon starts")
        return Finding("state", "fail", str(problem), "set PORT_DADDY_HOME to a folder of yours")
    free = os.statvfs(home).f_bavail * os.statvfs(home).f_frsize // 2 ** 20
    if not stat.S_ISDIR(mode) or owner != os.geteuid() or not os.access(home, os.W_OK | os.X_OK):
        return Finding("state", "fail", f"{home} is no folder that we own and may write",
                       "set PORT_DADDY_HOME to a folder of yours")
    if free < 100:
        return Finding("state", "fail" if free < 2 else "warn", f"the disk of {home} has only {free} MiB left", "make room")
    if mode & 0o077:
        return Finding("state", "warn", f"{home} is open to other users (mode {stat.S_IMODE(mode):o})", f"chmod 700 {home}")
    return Finding("state", "ok", f"{home} is ours alone, {free} MiB free")


def check_daemon(settings: Settings) -> Iterator[Finding]:
    url = ""
    try:
        url, instance = find_url(settings)
        with PortDaddy(url, pid=0) as pd:
            facts, well = pd.version(), pd.health()
    except PortDaddyError as problem:
        silent = problem.code == "UNREACHABLE" and not settings.url and not (url and listeners().get(split_url(url)[2]))
        yield Finding("daemon", "warn" if silent else "fail", "no daemon runs" if silent else str(problem),
                      "any command starts it, or: pd start" if silent else
                      "unset PORT_DADDY_URL, or start the daemon there" if settings.url else
                      f"see {settings.home}/daemon.log, then: pd daemon restart")
        return
    said = f"version {facts['version']} (protocol {facts['protocol']}) at {url}, pid {facts['pid']}"
    if well["status"] != "ok":
        yield Finding("daemon", "fail", f"{said} is {well['status']}: {well.get('error')}", "make room on its disk")
    elif instance not in (None, facts["instance"]):
        yield Finding("daemon", "fail", f"{said} serves another folder than {settings.home}", "pd start")
    else:
        yield Finding("daemon", "ok", said)
    if facts["protocol"] != PROTOCOL:
        older = "this file" if facts["protocol"] > PROTOCOL else "the daemon"
        yield Finding("version", "fail", f"this file speaks protocol {PROTOCOL}; {older} is older",
                      "update this file" if older == "this file" else "pd daemon restart")
    elif facts["sha256"] != file_hash(os.path.abspath(__file__)):
        yield Finding("version", "warn", f"the daemon runs another copy of this file ({__version__} here)",
                      "pd daemon restart, to run this one")
    else:
        yield Finding("version", "ok", f"{__version__}, as the daemon")


def check_port(settings: Settings) -> Finding:
    port = settings.port
    if not port or not listeners().get(port):
        return Finding("port", "ok", f"port {port} is free" if port else "any free port will do")
    ours = read_daemon_file(settings.home)
    if is_port_daddy(f"http://127.0.0.1:{port}"):
        mine = ours and split_url(str(ours["url"]))[2] == port
        return Finding("port", "ok", f"port {port} is the daemon's" if mine else
                       f"port {port} belongs to another Port Daddy; ours takes a free one")
    return Finding("port", "fail", f"port {port} is taken by {port_holder(port)[1]}",
                   "stop that, or set PORT_DADDY_PORT to another port")


def check_copies(path: str) -> Iterator[Finding]:
    """Other copies of this file that a shell would find, by the version that stands in them."""
    own = os.path.realpath(__file__)
    places = [os.path.join(folder, name) for folder in path.split(os.pathsep) for name in
              ("pd", "port-daddy", "port_daddy.py") if folder]
    for place in sorted({os.path.realpath(place) for place in places if os.path.isfile(place)} - {own}):
        found = re.search(r'^__version__ = "([^"]{1,40})"$', read_text(place)[:65536], re.MULTILINE)
        if found and found.group(1) != __version__:
            yield Finding("copies", "warn", f"{place} is version {found.group(1)}, this file {__version__}",
                          "replace the older one")


def check_proxies(environ: Mapping[str, str]) -> Finding:
    proxy = next((name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if environ.get(name)), None)
    spared = re.split(r"[,\s]+", environ.get("no_proxy") or environ.get("NO_PROXY") or "")
    if proxy and "*" not in spared and not {"localhost", "127.0.0.1"} <= set(spared):
        return Finding("proxies", "warn", f"{proxy} is set: curl would ask that proxy for localhost, too",
                       "export no_proxy=localhost,127.0.0.1,::1")
    return Finding("proxies", "ok", "none in the way of localhost")


def check_loopback() -> Finding:
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        bound = False
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            bound = True
        if not bound:
            six = family == socket.AF_INET6
            return Finding("loopback", "warn" if six else "fail", f"{address} cannot be bound",
                           "write 127.0.0.1 where localhost fails" if six else "bring the loopback interface up")
    return Finding("loopback", "ok", "127.0.0.1 and ::1")


def check_time() -> Finding:
    if time.time() < os.stat(os.path.abspath(__file__)).st_mtime - 86_400:
        return Finding("clock", "warn", "the clock stands before the day on which this file was written",
                       "set it; leases do not mind, what people read does")
    return Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %z"))


# --- a daemon that the system starts ----------------------------------------------------------------------------------

def kept_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings of now that a daemon started by somebody else must be told; never a secret."""
    return {name: value for name, value in sorted(environ.items()) if value and "TOKEN" not in name and (
        name.startswith("PORT_DADDY_") or name == "XDG_STATE_HOME")}


def systemd_word(text: str, command: bool = False) -> str:
    """A word as systemd.syntax(7) reads it; `command`: an argument of ExecStart, where $ is special, too."""
    text = re.sub(r'["\\]', lambda found: "\\" + found.group(), text).replace("%", "%%")
    text = text.replace("$", "$$") if command else text
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found.group()):02x}", text) + '"'


def systemd_unit(program: Sequence[str], environ: Mapping[str, str]) -> str:
    """A unit of the user's systemd. Status 4 is another daemon that serves the folder: nothing to try again."""
    words = [systemd_word(program[0]), *(systemd_word(word, command=True) for word in program[1:])]
    settings = [f"Environment={systemd_word(f'{name}={value}')}" for name, value in environ.items()]
    return "\n".join(["[Unit]", "Description=Port Daddy", "", "[Service]", f"ExecStart={' '.join(words)}", *settings,
                      "Restart=on-failure", "RestartPreventExitStatus=2 4", "", "[Install]", "WantedBy=default.target", ""])


def launchd_plist(program: Sequence[str], environ: Mapping[str, str]) -> str:
    import plistlib
    return plistlib.dumps({"Label": "port-daddy", "ProgramArguments": list(program), "EnvironmentVariables": dict(environ),
                           "RunAtLoad": True, "KeepAlive": {"SuccessfulExit": False}}).decode()


def system_service(platform: str, environ: Mapping[str, str], program: Sequence[str]) -> tuple[str, str, str, str]:
    """Where the file of the system's own supervisor goes, its text, and the commands that switch it on and off."""
    if platform == "darwin":
        path = os.path.expanduser("~/Library/LaunchAgents/port-daddy.plist")
        return (path, launchd_plist(program, kept_environment(environ)), f"launchctl bootstrap gui/{os.getuid()} '{path}'",
                f"launchctl bootout gui/{os.getuid()}/port-daddy")
    folder = os.path.expanduser(environ.get("XDG_CONFIG_HOME") or "~/.config")
    return (os.path.join(folder, "systemd", "user", "port-daddy.service"), systemd_unit(program, kept_environment(environ)),
            "systemctl --user daemon-reload && systemctl --user enable --now port-daddy.service",
            "systemctl --user disable --now port-daddy.service")


# ======================================================================================================================
# 16. COMMAND LINE — the same operations from a terminal
# ======================================================================================================================

# 1. Data goes to stdout, talk to stderr. --json gives the reply as it came, -q the one value that a script wants.
# 2. A command that needs the daemon starts it. Short commands do not say their pid: what they take outlives them.
# 3. Commands that wrap another (with-lock) give its status, and hold what they hold as long as they live.

Run = Callable[["argparse.Namespace"], Optional[int]]  # its exit status; None: 0
Argument = Callable[["argparse.ArgumentParser"], Any]  # adds one or more


class Command(NamedTuple):
    """A sub-command: its words, what it does, an example, its arguments, and the function that runs it."""

    words: str
    summary: str
    example: str
    arguments: Sequence[Argument]
    run: Run


LOCAL_COMMANDS: dict[str, Command] = {}


def command(words: str, example: str, *arguments: Argument) -> Callable[[F], F]:
    """Declare a command that is more than one operation."""
    def declare(run: F) -> F:
        LOCAL_COMMANDS[words] = Command(words, (run.__doc__ or "").split("\n")[0], example, arguments, run)
        return run
    return declare


def argument(*flags: str, **words: Any) -> Argument:
    return lambda parser: parser.add_argument(*flags, **words)


def commands() -> dict[str, Command]:
    """All of them by name, aliases included."""
    found = dict(LOCAL_COMMANDS)
    for one in OPERATIONS:
        for words in filter(None, (one.command, *one.aliases)):
            found[words] = Command(words, one.summary, one.example, [functools.partial(operation_arguments, one)],
                                   functools.partial(run_operation, one))
    for alias, words in (("up", "dev"), ("start", "daemon start"), ("stop", "daemon stop"), ("status", "daemon status")):
        found[alias] = found[words]
    return found


# --- arguments --------------------------------------------------------------------------------------------------------

FIELD_WORDS = {  # what a field is for, where its kind does not say
    "exact": "insist on --port", "move": "take another port although this one is used by a stranger",
    "force": "although it is somebody else's, or everything", "expired": "those whose time is over",
    "range_only": "only ports of PORT_DADDY_RANGE", "unmanaged_only": "only ports that no service has",
    "active": "only those that are alive", "port": "the port that it would like", "range": "choose from these ports",
    "agent": "who claims (default: PORT_DADDY_AGENT)", "owner": "who holds it (default: PORT_DADDY_AGENT)",
    "sender": "who publishes (default: PORT_DADDY_AGENT)", "pid": "end with this process", "cmd": "the command, as a note",
    "cwd": "its folder, as a note", "pair": "the service that this one belongs to, as a note",
    "health": "the URL that tells whether it is well", "metadata": "a JSON object of your own",
    "expires": "how long to keep it", "ttl": "how long the lease lasts", "wait": "how long to wait in line (default: not)",
    "timeout": "how long to wait", "group": "the group of workers to share with", "id": "only this message",
    "lease": "take it for this long only, until it is acknowledged", "max_attempts": "then it is dead (default 5)",
    "touch.lease": "from now on (default: as before)", "delay": "how long it rests", "nack.error": "what went wrong",
    "lock.limit": "how many may hold it at once (default 1)", "lock_delay": "stay closed for so long after an expiry",
    "after": "read after this id, as a reader of its own", "token": "the fencing token of the lease",
    "secret": "what deliveries are signed with; auto: make one",
    "events": "which, separated by commas (default: all)", "filter_pattern": "only what happens to these",
    "payload": "JSON, or else a text; - reads it from stdin", "limit": "how many at most",
    "name": "a name for people", "type": "what kind of agent", "max_services": "how many services it may claim",
    "max_locks": "how many locks it may hold", "status": "only those in this state", "target": "what it happened to",
    "since": "not before", "until": "not after"}


def operation_arguments(one: Operation, parser: argparse.ArgumentParser) -> None:
    """Required fields are positional, the others flags; the kinds check on this side what they would on the other."""
    for field in one.fields.values():
        flag = "--" + field.name.replace("_", "-")
        words = FIELD_WORDS.get(f"{one.name}.{field.name}") or FIELD_WORDS.get(field.name, field.kind.expected)
        words = words.replace("%", "%%")
        if field.required or field.name in one.positional:
            words = FIELD_WORDS[field.name] if field.name == "payload" else field.kind.expected
            parser.add_argument(field.name, help=words, nargs="+" if isinstance(field.kind, Several) and field.required
                                else None if field.required else "?")
        elif isinstance(field.kind, Flag):
            parser.add_argument(flag, action="store_true", default=None, help=words)
        else:
            default = f" (default {span(field.default)})" if isinstance(field.kind, Period) and field.default else ""
            unit = "DURATION" if isinstance(field.kind, Period) else field.name.upper()
            parser.add_argument(flag, metavar=unit, help=words + default)


def field_value(field: Field, text: Any) -> Any:
    """A field from the command line, where a duration names its unit and a payload need not be JSON."""
    if isinstance(text, bool):
        return text
    if isinstance(text, list):
        text = ",".join(text)
    field = field._replace(wire=field.name.replace("_", "-"))  # as it is typed here
    if field.name == "payload":
        text = (sys.stdin.read() if sys.stdin else "") if text == "-" else text
        with contextlib.suppress(PortDaddyError):
            return read_json(text)
        return text
    if isinstance(field.kind, Period) and text.isdigit():
        raise PortDaddyError("BAD_VALUE", f"{field.wire} {text}: write {text}s for seconds or {text}ms for milliseconds",
                             field=field.wire)
    try:
        return field.check(text, read=True)
    except PortDaddyError as problem:
        if isinstance(field.kind, Period):  # here a bare number is not taken for milliseconds
            words = str(problem).replace('milliseconds, or text such as "30s" or "2h30m"', "such as 30s or 2h30m")
            raise PortDaddyError("BAD_VALUE", words, field=field.wire) from None
        raise


def new_client(options: argparse.Namespace, pid: int = 0) -> PortDaddy:
    client = PortDaddy(pid=pid, autostart=True)
    client.settings = Settings.load(home=options.home or None)
    return client


def run_operation(one: Operation, options: argparse.Namespace) -> int:
    """Ask for an operation and show its reply."""
    fields = {field.name: field_value(field, getattr(options, field.name)) for field in one.fields.values()
              if getattr(options, field.name, None) is not None}
    for name in sorted({"timeout", "wait"} & set(one.fields)):
        fields.setdefault(name, one.fields[name].default)
    longest = milliseconds(fields.get("timeout", fields.get("wait", 0)))
    if longest and on_terminal(sys.stderr):
        say(f"waiting for up to {span(longest)} …")
    client = new_client(options)
    reply = client.ask(one.name, fields)
    warn_of_versions(client.server)
    timed_out = one.command == "poll" and reply["message"] is None
    if not (timed_out and options.quiet):
        show(reply, options, one.shows, one.quiet)
    return PROBLEMS["TIMED_OUT"][1] if timed_out else 0


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
    elif reply.get("message"):
        leased = {name: reply[name] for name in ("receipt", "attempt", "leaseExpiresAt") if name in reply}
        out(json.dumps({**reply["message"], **leased}, ensure_ascii=False))
    elif "message" in reply:
        say("no message came in time")
    else:
        facts = reply.get("agent", reply)
        if facts.get("held") is False and "valid" not in facts:
            return out(f"nobody holds {facts['name']}")
        width = max(len(heading(key)) for key in facts)
        for key, value in facts.items():
            if key not in ("success", "service", "webhook", "urls", "holders"):
                out(f"{heading(key).ljust(width)}  {cell(key, value)}")
    if reply.get("warning"):
        say(f"pd: {reply['warning']}")
    return None


def dig(value: Any, path: str) -> Any:
    """What stands at a path such as message.payload, or at the first of "valid|held" that there is."""
    for name in path.split("."):
        name = next((one for one in name.split("|") if isinstance(value, dict) and one in value), name)
        value = value.get(name) if isinstance(value, dict) else None
    return value


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
    table = [[heading(column.rpartition(".")[2]).upper() for column in columns]]
    table += [[printable(cell(column, dig(row, column))) for column in columns] for row in rows]
    widths = [max(len(line[position]) for line in table) for position in range(len(columns))]
    room = terminal_width()
    while sum(widths) + 2 * len(widths) > room + 2 and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1  # the longest column gives way first
    color = in_color()
    for line in table:
        words = [(word if len(word) <= width else word[:width - 1] + "…").ljust(width) for word, width in zip(line, widths)]
        text = "  ".join(words).rstrip()
        for state, code in STATE_COLORS.items() if color else ():
            text = re.sub(rf"(?<=  ){state}(?=  |$)", f"\x1b[{code}m{state}\x1b[0m", text)
        write_text(1, f"{text}\n")


STATE_COLORS = {"running": 32, "delivered": 32, "unhealthy": 31, "hijacked": 31, "crashed": 31, "dead": 31, "stopped": 33}


def heading(name: str) -> str:
    """A wire name for people: expiresAt, expires at."""
    return re.sub(r"(?<!^)([A-Z])", lambda found: " " + found.group(1).lower(), name)


# --- commands that are more than one operation ------------------------------------------------------------------------

SERVER_ARGUMENTS = [argument(f"--{name}", help=f"{sentence} ({variable}{f', default {default}' if default else ''})")
                    for name, variable, default, _, sentence in SETTINGS if name in ("port", "host", "token")]


@command("serve", "pd serve --port 0", *SERVER_ARGUMENTS)
def serve(options: argparse.Namespace) -> int:
    """Run the daemon in the foreground."""
    import signal
    settings = Settings.load(port=options.port, host=options.host, token=options.token, home=options.home)
    stop, reasons = threading.Event(), []

    def on_signal(number: int, frame: Optional[FrameType]) -> None:
        reasons.append(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    raise_limits()
    server = Server(settings)
    try:
        server.start()
    except PortDaddyError as problem:
        chosen = options.port or os.environ.get("PORT_DADDY_PORT")
        if problem.code != "CANNOT_LISTEN" or chosen or not is_port_daddy(f"http://127.0.0.1:{settings.port}"):
            raise
        say(f"pd: port {settings.port} belongs to another Port Daddy; this one takes a free port")
        server = Server(settings._replace(port=0))
        server.start()
    with contextlib.suppress(OSError):
        print(f"port-daddy {__version__} listening on {server.url}", flush=True)
    while not stop.wait(1):
        if not server.owns_home():
            log(f"the state folder {settings.home} was deleted or replaced; stopping: another daemon may serve it now")
            server.stop("deleted")
            return 1
    server.stop(signal.Signals(reasons[0]).name)
    return 130 if reasons[0] == signal.SIGINT else 0


@command("daemon start", "pd start", *SERVER_ARGUMENTS)
def daemon_start(options: argparse.Namespace) -> None:
    """Start the daemon in the background, unless it runs."""
    settings = Settings.load(port=options.port, host=options.host, token=options.token, home=options.home)
    running = daemon_facts(settings)
    if running is None:
        start_daemon(settings)
    facts = running or daemon_facts(settings) or {}
    words = "runs already" if running else "started"
    show({**facts, "message": f"port-daddy {facts.get('version')} {words}: {facts.get('url')} (pid {facts.get('pid')})"},
         options, "", "url")
    if options.token:
        say("pd: commands and clients need the token, too: set PORT_DADDY_TOKEN")


def daemon_facts(settings: Settings, own: bool = True) -> Optional[Reply]:
    """What the running daemon says of itself, None when none answers: the `own` of the state folder, or the one that
    commands talk to."""
    found = read_daemon_file(settings.home)
    try:
        url = str(found["url"]) if own and found else find_url(settings)[0]
        client = PortDaddy(url, pid=0)
        client.settings = settings
        facts = {**client.version(), "url": url}
    except DaemonUnreachable:
        if settings.url:  # somebody said where it is: then it matters what is wrong there
            raise
        return None
    return facts if not own or found and found.get("instance") == facts["instance"] else None


@command("daemon stop", "pd stop")
def daemon_stop(options: argparse.Namespace) -> None:
    """Stop the daemon; whoever waits is told, and what was granted stays granted."""
    import signal
    facts = daemon_facts(Settings.load(home=options.home))
    if facts is None:
        say("pd: no daemon runs")
        return
    pid, birth = int(facts["pid"]), process_birth(int(facts["pid"]))
    if birth is None or not process_signal(pid, signal.SIGTERM):
        raise PortDaddyError("NOT_FOUND", f"the daemon (pid {pid}) is not ours to stop: another user's, or in another "
                             "container")
    deadline = time.monotonic() + 10
    while process_lives(pid, birth):
        if time.monotonic() > deadline:
            raise PortDaddyError("TIMED_OUT", f"the daemon (pid {pid}) has not ended within 10 s; end it with kill -9")
        time.sleep(0.02)
    if options.command == "daemon restart" and (options.json or options.quiet):
        return
    show({"stopped": True, "pid": pid, "message": f"stopped the daemon (pid {pid})"}, options, "", "pid")


@command("daemon restart", "pd daemon restart", *SERVER_ARGUMENTS)
def daemon_restart(options: argparse.Namespace) -> None:
    """Stop the daemon and start the one in this file."""
    daemon_stop(options)
    daemon_start(options)


@command("daemon status", "pd status")
def daemon_status(options: argparse.Namespace) -> None:
    """Whether the daemon runs, where, and what it holds."""
    settings = Settings.load(home=options.home)
    facts = daemon_facts(settings, own=False)
    if facts is None:
        raise DaemonUnreachable(f"no daemon runs; any command starts it, or run: {PROGRAM} start")
    held = PortDaddy(str(facts["url"]), pid=0).metrics()
    counts = ", ".join(f"{held[name]} {name[:-1] if held[name] == 1 else name}" for name in (
        "services", "locks", "agents", "channels", "webhooks"))
    show({**facts, "metrics": held, "message": (
        f"port-daddy {facts['version']} at {facts['url']} (pid {facts['pid']}), up {span(facts['uptime'])}\n"
        f"holds {counts}; {held['waiters']} waiting\nstate in {settings.home}")}, options, "", "url")


@command("version", "pd version")
def show_version(options: argparse.Namespace) -> None:
    """The version and the hash of this file."""
    digest = file_hash(os.path.abspath(__file__))
    show({"version": __version__, "protocol": PROTOCOL, "sha256": digest, "python": sys.version.split()[0],
          "message": f"port-daddy {__version__} (protocol {PROTOCOL}, sha256 {digest[:12]}…)"}, options, "", "version")


@command("url", "curl $(pd url myapp:api:main)/health", argument("id", help="the identity of a service"),
         argument("--env", default="local", help="which of its endpoints (default local)"))
def show_url(options: argparse.Namespace) -> None:
    """The URL of a service in an environment."""
    endpoints = new_client(options).get_service(options.id)["endpoints"]
    if options.env not in endpoints:
        raise PortDaddyError("NOT_FOUND", f"{options.id} has no endpoint {options.env}; it has "
                             f"{', '.join(endpoints) or 'none'}. Set it with: pd endpoint set")
    show({"url": endpoints[options.env], "message": endpoints[options.env]}, options, "", "url")


@command("env", 'eval "$(pd env \'myapp:*\')"',
         argument("pattern", nargs="?", default="*", help="which services (default all)"),
         argument("--format", choices=("export", "dotenv", "json"), default="export", help="default: export"))
def show_env(options: argparse.Namespace) -> None:
    """Ports and URLs of services as environment variables."""
    values: dict[str, str] = {}
    for service in new_client(options).list_services(options.pattern)["services"]:
        name = re.sub(r"[^A-Z0-9]+|^(?=[0-9])", "_", service["id"].upper())
        if f"{name}_PORT" in values:
            say(f"pd: {service['id']} has the same variables as another service, and is left out")
            continue
        values.update(present(**{f"{name}_PORT": str(service["port"]), f"{name}_URL": service["endpoints"].get("local")}))
    if options.json or options.format == "json":
        out(json.dumps(values, indent=2))
        return
    for name, value in values.items():
        quoted = value if re.fullmatch(r"[A-Za-z0-9_:/.\[\]-]*", value) else "'" + value.replace("'", "'\\''") + "'"
        out(f"{'export ' if options.format == 'export' else ''}{name}={quoted}")


def say_loss(what: Reply) -> None:
    say(f"pd: messages up to {what['to']} are gone" if what["event"] == "gap" else
        "pd: that id is of another database; beginning with what there is")


@command("sub", "pd sub 'build:*'", argument("channel", help="a channel, or a pattern such as build:*"),
         argument("--after", type=int, help="begin after this message id (default: now)"))
def follow_channel(options: argparse.Namespace) -> None:
    """Follow a channel: one JSON message a line, until interrupted."""
    with new_client(options).subscribe(options.channel, after=options.after, on_loss=say_loss) as messages:
        if on_terminal(sys.stderr):
            say(f"following {options.channel}; Ctrl-C ends")
        for message in messages:
            out(plain(message["payload"]) if options.quiet else to_json(message))


@command("with-lock", "pd with-lock db-migration --wait 5m -- npm run migrate", argument("name", help="the lock"),
         argument("--owner", help="who holds it (default: PORT_DADDY_AGENT, else this process)"),
         argument("--ttl", default="60s", help="length of the lease, renewed meanwhile (default 60s)"),
         argument("--wait", default="60s", help="how long to wait for it (default 60s)"),
         argument("--limit", default="1", help="how many may hold it at once (default 1)"))
def with_lock(options: argparse.Namespace) -> int:
    """Run a command while holding a lock, and give its status."""
    words = need_words(options)
    fields = next(one for one in OPERATIONS if one.name == "lock").fields
    ttl, wait, limit = (field_value(fields[name], getattr(options, name)) for name in ("ttl", "wait", "limit"))
    client = new_client(options, pid=os.getpid())
    runner = Runner()

    def on_loss() -> None:
        say(f"pd: lock {options.name} was lost; stopping the command")
        runner.stop()

    if wait and on_terminal(sys.stderr):
        holder = client.check_lock(options.name)
        if holder["held"]:
            say(f"pd: waiting up to {span(wait)} for {options.name}, held by {holder['owner'] or 'somebody'}")
    with client.with_lock(options.name, owner=options.owner, ttl=ttl, wait=wait, limit=limit, pid=os.getpid(),
                          on_loss=on_loss) as held:
        return runner.run(words, {"PORT_DADDY_LOCK": options.name, "PORT_DADDY_LOCK_TOKEN": str(held.token)})


def need_words(options: argparse.Namespace) -> list[str]:
    if not options.words:
        raise PortDaddyError("BAD_VALUE", f"say what to run after --, as in: {LOCAL_COMMANDS[options.command].example}")
    return list(options.words)


class Runner:
    """A command in the foreground: our signals are its signals, its status is ours."""

    def __init__(self) -> None:
        self.child: Optional[subprocess.Popen[bytes]] = None
        self.told = 0  # the last signal that we were sent

    def run(self, words: Sequence[str], environ: Mapping[str, str], given: Optional[str] = None) -> int:
        import signal
        before = {number: signal.signal(number, self.pass_on)
                  for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        try:
            self.child = process_run(words, {**os.environ, **environ}, given)
            if self.told:  # before there was a child
                self.pass_on(self.told, None)
            status = self.child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return 128 - status if status < 0 else status

    def pass_on(self, number: int, frame: Optional[FrameType]) -> None:
        import signal
        self.told = number
        if self.child and number != signal.SIGINT:  # which the terminal has told the child itself
            process_signal(self.child.pid, number)

    def stop(self) -> None:
        import signal
        if self.child:
            process_signal(self.child.pid, signal.SIGTERM)


def message_environment(message: Reply, **more: Any) -> dict[str, str]:
    facts = {"MESSAGE_ID": message["id"], "CHANNEL": message["channel"], "SENDER": message["sender"] or "", **more}
    return {f"PORT_DADDY_{name}": str(value) for name, value in facts.items()}


@command("work", "pd work tasks --group builders -- ./build.sh", argument("channel", help="the channel to work on"),
         argument("--group", help="the group of workers to share with (default: default)"),
         argument("--lease", default="30s", help="how long a task is ours, renewed meanwhile (default 30s)"),
         argument("--max-attempts", default="5", metavar="N", help="then a task that failed is dead (default 5)"),
         argument("--delay", default="0s", help="how long a task that failed rests (default: not)"),
         argument("--once", action="store_true", help="one task, and give the status of its command"),
         argument("--idle", help="end when nothing came for that long (default: never)"))
def work_on(options: argparse.Namespace) -> int:
    """Run a command for each task of a channel, its payload on stdin; a status other than 0 gives the task back."""
    words = need_words(options)
    kinds = {"group": GroupName, "lease": Duration, "max_attempts": Count, "delay": Delay, "idle": Delay}
    given = {name: field_value(Field(name, name, kind_of(kind), False, None), getattr(options, name))
             for name, kind in kinds.items() if getattr(options, name) is not None}
    for task in new_client(options, pid=os.getpid()).work(options.channel, **given):
        runner, broken, status = Runner(), None, 0
        task.on_loss = runner.stop
        with task:
            try:
                status = runner.run(words, message_environment(task.message, ATTEMPT=task.attempt), plain(task.payload))
            except PortDaddyError as problem:  # there is no such command: no fault of the task
                broken = problem
            if runner.told:
                raise SystemExit(128 + runner.told)
            if broken or status:
                task.fail(str(broken) if broken else f"exit status {status}")
        if broken:
            raise broken
        if options.once:
            return status
    return PROBLEMS["TIMED_OUT"][1] if options.once else 0


@command("watch", "pd watch 'build:*' --exec 'notify-send build'",
         argument("channel", help="a channel, or a pattern such as build:*"),
         argument("--exec", required=True, metavar="COMMAND", help="a shell command, which gets the payload on stdin"),
         argument("--after", type=int, help="begin after this message id (default: now)"))
def watch(options: argparse.Namespace) -> int:
    """Run a shell command for each message of a channel, its payload on stdin, until interrupted."""
    with new_client(options, pid=os.getpid()).subscribe(options.channel, after=options.after, on_loss=say_loss) as messages:
        for message in messages:
            runner = Runner()
            status = runner.run(["/bin/sh", "-c", options.exec], message_environment(message), plain(message["payload"]))
            if runner.told:
                return 128 + runner.told
            if status:
                say(f"pd: the command for message {message['id']} of {message['channel']} ended with {status}")
    return 0


# --- projects ---------------------------------------------------------------------------------------------------------

CONTEXT = (
    argument("--context", help="the last segment of the identities (PORT_DADDY_CONTEXT; default: main, or the branch of a "
             "linked worktree; '' for none)"),
    argument("--branch", action="store_true", help="the branch as the context, in the main checkout too"))


def this_project(options: argparse.Namespace) -> tuple[str, Project]:
    path = find_project_file(os.getcwd())
    context = options.context
    if context is None and not options.branch:
        context = os.environ.get("PORT_DADDY_CONTEXT")
    return path, load_project(path, context, options.branch)


@command("dev", "pd dev --service api",
         argument("--service", action="append", metavar="NAME", help="only this one and what it needs (repeat for more)"),
         *CONTEXT, argument("--no-health", action="store_true", help="do not check: healthy means started"),
         argument("--keep-going", action="store_true", help="when a service fails, let the others go on"),
         argument("--trust", action="store_true", help="run the commands of a file that belongs to somebody else"))
def dev(options: argparse.Namespace) -> int:
    """Start the services of .portdaddyrc in the order of their needs, and keep them until Ctrl-C."""
    path, project = this_project(options)
    if not options.trust:
        check_trust(path)
    if options.service:
        project = only(project, options.service)
    return supervise(project, new_client(options, pid=os.getpid()), options.keep_going, not options.no_health)


def ask_dev(project: Project, options: argparse.Namespace, what: Reply, timeout: float) -> tuple[PortDaddy, str]:
    """Ask the running `dev` of a project for something, and wait for its answer."""
    client = new_client(options)
    if not client.check_lock(project.handle)["held"]:
        raise PortDaddyError("NOT_FOUND", f"no dev runs {project.name} ({project.context or 'no context'}); start it with "
                             "`pd dev`")
    cursor = number = client.publish(project.handle, what, expires=60_000)["id"]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        reply = client.poll(project.handle, after=cursor, timeout=5_000)
        cursor, payload = reply["lastId"], (reply["message"] or {}).get("payload")
        if isinstance(payload, dict) and payload.get("answers") == number:
            if not payload.get("done"):
                raise PortDaddyError("INTERNAL", str(payload.get("said")))
            return client, str(payload.get("said"))
    raise PortDaddyError("TIMED_OUT", f"the dev of {project.name} has not answered within {timeout:g} s")


@command("down", "pd down", *CONTEXT)
def down(options: argparse.Namespace) -> int:
    """Stop the running `dev` of this folder, and all its services."""
    _, project = this_project(options)
    slowest = sum(service.stop_timeout + 5 for service in project.services.values())
    client, said = ask_dev(project, options, {"do": "down"}, 30)
    deadline = time.monotonic() + slowest + 10
    while client.check_lock(project.handle)["held"]:
        if time.monotonic() > deadline:
            raise PortDaddyError("TIMED_OUT", f"{project.name} is still {said}")
        time.sleep(0.05)
    show({"stopped": True, "project": project.name, "message": f"{project.name} has stopped"}, options, "", "project")
    return 0


@command("restart", "pd restart api", argument("name", help="a service of .portdaddyrc"), *CONTEXT)
def restart(options: argparse.Namespace) -> int:
    """Restart a service of the running `dev` of this folder, and wait until it is up again."""
    _, project = this_project(options)
    service = only(project, [options.name]).services[options.name]
    timeout = service.health_timeout + service.stop_timeout + 10
    _, said = ask_dev(project, options, {"do": "restart", "service": options.name}, timeout)
    show({"restarted": options.name, "message": said}, options, "", "restarted")
    return 0


@command("logs", "pd logs api -f", argument("name", nargs="*", help="services by name or identity (default: all of this "
                                           "folder's project)"),
         argument("-f", "--follow", action="store_true", help="go on as they print"),
         argument("--tail", type=int, default=100, metavar="N", help="how many lines of each (default 100)"), *CONTEXT)
def logs(options: argparse.Namespace) -> int:
    """What services have printed."""
    known: dict[str, str] = {}
    with contextlib.suppress(PortDaddyError) if options.name else contextlib.nullcontext():
        known = {name: service.identity for name, service in this_project(options)[1].services.items()}
    chosen = {name: known.get(name, name) for name in options.name or known}
    width, client = max(map(len, chosen)), new_client(options)
    color = in_color()

    def show_line(name: str, line: Reply) -> bool:
        prefix = f"{name.ljust(width)} │ " if len(chosen) > 1 else ""
        text = to_json({**line, "service": chosen[name]}) if options.json else prefix + log_text(line["text"], color)
        return write_text(1, f"{text}\n")

    def follow(name: str) -> None:
        try:
            for line in client.follow_logs(chosen[name], tail=max(0, min(options.tail, KEEP_LINES))):
                if not show_line(name, line):
                    break
        except PortDaddyError as problem:
            say(f"pd: {problem}")
        over.set()

    if options.follow:  # until one of them ends: nobody reads us any more, or the daemon has gone
        over = threading.Event()
        for name in chosen:
            threading.Thread(target=follow, args=(name,), daemon=True).start()
        over.wait()
        return 1
    found = []
    for name, identity in chosen.items():
        with contextlib.suppress(PortDaddyError) if not options.name else contextlib.nullcontext():
            lines = client.get_logs(identity, tail=options.tail)["lines"]
            found += [(line["at"], line["id"], name, line) for line in lines]
    for _, _, name, line in sorted(found, key=lambda entry: entry[:2]):
        show_line(name, line)
    return 0


@command("scan", "pd scan --dry-run", argument("folder", nargs="?", default=".", help="where to look (default: here)"),
         argument("--dry-run", action="store_true", help="show the file, and write nothing"),
         argument("--force", action="store_true", help="replace a .portdaddyrc that is there"))
def scan_project(options: argparse.Namespace) -> int:
    """Look at a folder, and write the .portdaddyrc that one would write by hand."""
    found, path = scan(options.folder), os.path.join(options.folder, RC_NAMES[0])
    if not found["services"]:
        raise PortDaddyError("NOT_FOUND", "nothing was recognised here: no package.json with a known framework, no Python "
                             "web program, no go.mod, Cargo.toml, Procfile or compose.yaml; write .portdaddyrc by hand")
    text = json.dumps(found, indent=2)
    if options.dry_run or options.json:
        write_text(1, f"{text}\n")
        return 0
    if os.path.exists(path) and not options.force:
        raise PortDaddyError("EXISTS", f"{path} is there already; see what would be written with --dry-run, or "
                             "replace it with --force")
    write_file(path, f"{text}\n", 0o644)
    say(f"wrote {path} with {', '.join(found['services'])}; look at it, then run: pd dev")
    return 0


@command("run", "pd run myapp:api -- npm run dev", argument("id", help="the identity under which it runs"),
         argument("--port", type=int, help="the port that it would like"),
         argument("--health", metavar="RULE", help='a path such as /health, "tcp", "cmd: …" or "log: regex"'))
def run_one(options: argparse.Namespace) -> int:
    """Claim a port, run one command with it as PORT, and release it when the command ends."""
    import shlex
    words = need_words(options)
    rule = RC_FIELDS["healthPath"][0]
    health = Field("health", "health", rule, True, None).check(options.health, read=False) if options.health else "tcp"
    identity = Field("id", "id", IDENTITY, True, None).check(options.id, read=True)
    raw = {"cmd": "exec " + " ".join(map(shlex.quote, words))}
    service = load_service("", identity, identity, raw, lambda _, kind, value: value)
    service = service._replace(port=options.port, rule=health, cwd=os.getcwd(), env={"PORT": "${PORT}"},
                               health_timeout=1e9)  # it may be something that never listens
    project = Project(os.getcwd(), identity, "", {identity: service}, None, "run")
    return supervise(project, new_client(options, pid=os.getpid()), plain=True)


@command("skill", "pd skill > .claude/skills/port-daddy/SKILL.md")
def show_skill(options: argparse.Namespace) -> None:
    """What a coding agent has to know, as an agent skill."""
    program = PROGRAM if PROGRAM in ("pd", "port-daddy") else f"python3 {os.path.abspath(__file__)}"
    write_text(1, SKILL.replace("`python3 port_daddy.py`", f"`{program}`"))


@command("vendor", "pd vendor tools", argument("folder", help="where to"),
         argument("--force", action="store_true", help="replace another version"))
def vendor(options: argparse.Namespace) -> None:
    """Copy this file into a folder, such as one of a repository."""
    here, there = os.path.abspath(__file__), os.path.join(options.folder, "port_daddy.py")
    digest, known = file_hash(here), file_hash(there) if os.path.exists(there) else ""
    if known not in ("", digest) and not options.force:
        raise PortDaddyError("EXISTS", f"{there} is there and differs; replace it with --force")
    with blamed("INTERNAL", f"{options.folder} cannot be made"):
        os.makedirs(options.folder, exist_ok=True)
    with open(here, encoding="utf-8", newline="") as file:
        text = file.read()
    if known != digest:
        write_file(there, text, 0o755)
    show({"path": there, "version": __version__, "sha256": digest}, options, "", "path")


@command("completion", 'eval "$(pd completion bash)"', argument("shell", choices=sorted(COMPLETION), help="which shell"))
def show_completion(options: argparse.Namespace) -> None:
    """A script that completes commands, flags and live names in a shell."""
    import shlex
    program = " ".join(map(shlex.quote, (sys.executable, os.path.abspath(__file__))))
    write_text(1, COMPLETION[options.shell].replace("PROGRAM", program))


@command("complete", "pd complete -- claim --", argument("typed", nargs="*", help="the words so far"))
def complete(options: argparse.Namespace) -> None:
    """What the scripts of `completion` ask at every press of the key."""
    *before, last = options.typed or [""]
    for word in sorted(candidates(before, last.startswith("-"))):
        if word.startswith(last):
            out(word)


def candidates(before: list[str], flags: bool) -> set[str]:
    """What may stand after these words; the daemon is asked for names when one runs, and never started."""
    import argparse
    known = {words: one for words, one in commands().items() if words not in ("guard", "complete", "limit")}
    if not before:
        return {words.split()[0] for words in known}
    found = {words.split()[1] for words in known if words.split()[0] == before[0] and " " in words and len(before) == 1}
    chosen = known.get(" ".join(before[:2])) or known.get(before[0])
    if flags and chosen:
        parser = argparse.ArgumentParser()
        for add in (*chosen.arguments, argument("--json"), argument("--quiet"), argument("--home")):
            add(parser)
        return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    for heads, name, rows, column in LIVE:
        if chosen and before[0] in heads.split():
            with contextlib.suppress(PortDaddyError):
                found |= {row[column] for row in PortDaddy(pid=0, timeout=500).ask(name, {})[rows]}
    return found


@command("guard", "pd guard")
def guard_groups(options: argparse.Namespace) -> int:
    """What `dev` starts beside itself: it stops the services when `dev` is killed."""
    guard()
    return 0


@command("limit", "pd limit")
def limit(options: argparse.Namespace) -> None:
    """What `bench` compares the daemon with."""
    limit_server()


@command("bench", "pd bench --quick", argument("--quick", action="store_true", help="a few seconds, and rough figures"),
         argument("--goals", action="store_true", help="show what each figure should be"),
         argument("--markdown", metavar="FILE", help="show a run that --json has written, as Markdown; measure nothing"))
def show_bench(options: argparse.Namespace) -> None:
    """Measure a daemon of this file beside the least that a server in Python can do."""
    def show_row(row: Row) -> None:
        goal = f"   goal {row.goal:g}: {'met' if row.met else 'missed'}" if options.goals and row.goal else ""
        out(f"{row}{goal}")

    if options.markdown:
        written = read_object(options.markdown)
        if "rows" not in written:
            raise PortDaddyError("BAD_VALUE", f"{options.markdown} is no report; write one with: pd bench --json > FILE")
        write_text(1, bench_table(written))
        return
    if not options.json:
        out("a full bar is the limit server, or the most that we want")
    report = bench(options.quick, (lambda row: None) if options.json else show_row)
    if options.json:
        out(json.dumps(report, indent=2, ensure_ascii=False))


# --- from outside -----------------------------------------------------------------------------------------------------

@command("doctor", "pd doctor")
def doctor(options: argparse.Namespace) -> int:
    """Look for what keeps people from their daemon, and say what to do about it."""
    found = diagnose(Settings.load(home=options.home))
    well = all(one.state != "fail" for one in found)
    if options.json:
        out(json.dumps({"success": well, "checks": [one._asdict() for one in found]}, indent=2, ensure_ascii=False))
    elif not options.quiet:
        for one in found:
            out(f"{one.state.ljust(4)}  {one.check.ljust(8)}  {one.message}" + (f"; {one.cure}" if one.cure else ""))
    return 0 if well else 1


AGREE = argument("--yes", action="store_true", help="do it; without this, only show what would be done")


def run_shell(line: str) -> int:
    """Run a command of the system for people; when it fails or is missing, they are told to run it themselves."""
    status = process_run(["/bin/sh", "-c", line], os.environ, None).wait()
    if status:
        say(f"pd: that failed (no systemd or launchd of yours may be running here); run it yourself: {line}")
    return min(status, 1)


def this_service(options: argparse.Namespace) -> tuple[str, str, str, str]:
    home = {"PORT_DADDY_HOME": os.path.abspath(options.home)} if options.home else {}
    program = [os.path.abspath(sys.executable), os.path.abspath(__file__), "serve"]
    return system_service(sys.platform, {**os.environ, **home}, program)


@command("daemon install", "pd daemon install --yes", AGREE)
def daemon_install(options: argparse.Namespace) -> int:
    """Have systemd or launchd start the daemon when you log in; shows the file, and writes it with --yes."""
    path, text, switch_on, _ = this_service(options)
    write_text(1, text)
    if os.environ.get("PORT_DADDY_TOKEN"):
        say("pd: the token is not in it: others could read it there. Add it in a file of yours (EnvironmentFile=)")
    if not options.yes:
        say(f"pd: this would go to {path} (with --yes), and then: {switch_on}")
        return 0
    with blamed("INTERNAL", f"{os.path.dirname(path)} cannot be made"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    write_file(path, text, 0o644)
    say(f"pd: wrote {path}; now: {switch_on}")
    return run_shell(switch_on)


@command("daemon uninstall", "pd daemon uninstall --yes", AGREE)
def daemon_uninstall(options: argparse.Namespace) -> None:
    """Take back what install did, with --yes; the state stays."""
    path, _, _, switch_off = this_service(options)
    if not os.path.exists(path):
        return say(f"pd: there is no {path}")
    if not options.yes:
        return say(f"pd: this would run {switch_off}, and remove {path} (with --yes)")
    run_shell(switch_off)
    remove_file(path)
    return say(f"pd: removed {path}")


# --- MCP --------------------------------------------------------------------------------------------------------------

class Call(PortDaddy):
    """A call of a tool: a client of its own, so that the call can be cut off alone, wherever it is."""

    waits = cancelled = False
    link: Optional[Link] = None

    def connect(self, start: bool = True) -> Link:
        self.link = super().connect(start)
        if self.cancelled:
            self.link.close()
            raise PortDaddyError("TIMED_OUT", "the call was cancelled")
        return self.link

    def cancel(self) -> None:
        self.cancelled = True  # first: either we see the link, or connect sees that we were here
        if self.link:
            with contextlib.suppress(OSError):
                self.link.socket.shutdown(socket.SHUT_RDWR)


class Mcp:
    """One client on stdin and stdout, a JSON-RPC 2.0 message a line. The reader answers what is quick itself; a call has a
    thread of its own, so that one that waits holds up nothing.

    (https://modelcontextprotocol.io/specification)"""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.version = settings, ""
        self.calls: dict[Any, Call] = {}  # those that are not answered yet, by the id of their request
        self.writing = threading.Lock()  # guards stdout: a line is written in one piece

    def loop(self, lines: Iterable[bytes]) -> int:
        for line in lines:
            if line.strip():
                self.receive(line)
        deadline = time.monotonic() + 1
        while self.calls and time.monotonic() < deadline + 20:  # what was asked for is answered, but nobody waits for us
            for call in list(self.calls.values()) if time.monotonic() > deadline else ():
                if call.waits:
                    call.cancel()
            time.sleep(0.02)
        return 0

    def send(self, answer: Any) -> None:
        with self.writing:
            write_text(1, f"{to_json(answer)}\n")

    def receive(self, line: bytes) -> None:
        try:
            message = read_json(line.decode("utf-8"))
        except (UnicodeDecodeError, PortDaddyError):
            return self.send(rpc_failure(None, PortDaddyError("BAD_JSON", "that line is not valid JSON")))
        batch = message if self.version == "2025-03-26" and isinstance(message, list) and message else None
        called = [each["id"] for each in batch or [message] if is_request(each) and each["method"] == "tools/call"]
        for id in called:
            self.calls[id] = Call(pid=0, autostart=True)
            self.calls[id].settings = self.settings
        if not called:
            return self.work(message, batch, called)
        return threading.Thread(target=self.work, args=(message, batch, called), daemon=True).start()

    def work(self, message: Any, batch: Optional[list[Any]], called: Sequence[Any]) -> None:
        """Answer a message, or all of a batch in one; what fails of itself is answered, too, and then seen on stderr."""
        answer: Any = rpc_failure(called[0] if called else None, PortDaddyError("INTERNAL", "this face failed; see stderr"))
        try:
            answer = list(filter(None, map(self.answer, batch))) if batch else self.answer(message)
        finally:
            if answer:
                self.send(answer)
            for id in called:
                self.calls.pop(id, None)

    def answer(self, message: Any) -> Optional[Reply]:
        """The answer to one message; None to a notification, an answer, or a call that was cancelled."""
        if not is_request(message):
            return self.take_note(message)
        id, method, params = message["id"], message["method"], message.get("params", {})
        try:
            if not isinstance(params, dict) or not isinstance(params.get("_meta", {}), dict):
                raise PortDaddyError("BAD_VALUE", "params and its _meta must be objects")
            result = self.result(id, method, params)
        except PortDaddyError as problem:
            return rpc_failure(id, problem)
        return None if id in self.calls and self.calls[id].cancelled else {"jsonrpc": "2.0", "id": id, "result": result}

    def take_note(self, message: Any) -> Optional[Reply]:
        known = isinstance(message, dict) and message.get("jsonrpc") == "2.0"
        if known and "id" not in message and isinstance(message.get("method"), str):
            params = message.get("params")
            id = params.get("requestId") if isinstance(params, dict) else None
            if message["method"] == "notifications/cancelled" and is_id(id) and id in self.calls:
                self.calls[id].cancel()
        elif not known or not {"result", "error"} & set(message):
            id = message.get("id") if known else None
            problem = PortDaddyError("BAD_REQUEST", "that is no request of JSON-RPC 2.0")
            return rpc_failure(id if is_id(id) else None, problem)
        return None

    def result(self, id: Any, method: str, params: Reply) -> Reply:
        """What a request gives, in the era that it is of: with the version in its _meta, or after a handshake."""
        modern = MCP_VERSION in params.get("_meta", {})
        about = {"capabilities": {"tools": {}}, "instructions": MCP_ABOUT}
        name = {"name": "port-daddy", "title": "Port Daddy", "version": __version__}
        if modern and params["_meta"][MCP_VERSION] != MCP_VERSIONS[-1]:
            raise PortDaddyError("NOT_IMPLEMENTED", "that protocol version is not supported in a request; versions before "
                                 f"{MCP_VERSIONS[-1]} begin with initialize", supported=list(MCP_VERSIONS),
                                 requested=params["_meta"][MCP_VERSION])
        if method == "tools/call":
            reply = self.call(self.calls[id], params)
        elif method == "tools/list":
            reply = {"tools": mcp_tools(), **(MCP_CACHE if modern else {})}
        elif method == "server/discover" and modern:
            reply = {"supportedVersions": list(MCP_VERSIONS), **about, **MCP_CACHE,
                     "_meta": {"io.modelcontextprotocol/serverInfo": name}}
        elif method == "initialize" and not modern:
            if not isinstance(params.get("protocolVersion"), str):
                raise PortDaddyError("BAD_VALUE", "protocolVersion is missing: a version such as " + MCP_VERSIONS[-2])
            asked = params["protocolVersion"]
            self.version = asked if asked in MCP_VERSIONS[:-1] else MCP_VERSIONS[-2]
            reply = {"protocolVersion": self.version, "serverInfo": name, **about}
        elif method == "ping" and not modern:
            reply = {}
        else:
            raise PortDaddyError("METHOD_NOT_ALLOWED", f"there is no method {method[:60]!r}")
        return {"resultType": "complete", **reply} if modern else reply

    def call(self, call: Call, params: Reply) -> Reply:
        """What a tool gives; refusals, bad arguments among them, are for the model to read, and so results."""
        (one, hints), given = mcp_tool(params.get("name", "")), params.get("arguments") or {}
        if not isinstance(given, dict):
            raise PortDaddyError("BAD_VALUE", "arguments must be an object")
        try:
            if len(self.calls) > 64:
                raise PortDaddyError("BUSY", "64 calls are under way; wait for one of them to end")
            if "read" not in hints:
                given = {"agent": None, **given}
                call.agent_id = MCP_AGENT.check(given.pop("agent"), read=False)
            values = one.bind(given, {})
            for name in {"wait", "timeout"} & set(one.fields):
                values[name] = min(values.get(name, one.fields[name].default), MCP_PATIENCE)
                call.waits = values[name] > 0
            with call:
                return mcp_reply(call.ask(one.name, values))
        except PortDaddyError as problem:
            return mcp_refusal(problem)


def is_id(id: Any) -> bool:
    return type(id) in (str, int)


def is_request(message: Any) -> bool:
    return (isinstance(message, dict) and message.get("jsonrpc") == "2.0" and is_id(message.get("id"))
            and isinstance(message.get("method"), str))


def rpc_failure(id: Any, problem: PortDaddyError) -> Reply:
    code = MCP_CODES.get(problem.code, MCP_CODES["INTERNAL"])
    return {"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": str(problem),
                                                  **({"data": problem.facts} if problem.facts else {})}}


@command("mcp", "pd mcp --print-config claude", argument(
    "--print-config", choices=["claude", "cursor", "codex", "vscode"], help="what to tell that program, and nothing else"))
def serve_mcp(options: argparse.Namespace) -> int:
    """Be a server of the Model Context Protocol on stdin and stdout, for a coding agent."""
    if options.print_config:
        words = [sys.executable, os.path.abspath(__file__), "mcp", *(["--home", options.home] if options.home else [])]
        path, text = mcp_config(options.print_config, words, kept_environment(os.environ))
        write_text(1, f"{text}\n")
        say(f"pd: this goes into {path}")
        return 0
    return Mcp(Settings.load(home=options.home)).loop(sys.stdin.buffer if sys.stdin else ())


# --- the top ----------------------------------------------------------------------------------------------------------

FAMILIES = (("projects", "dev down restart logs run scan"),
            ("services", "claim release find url env wait endpoint ports cleanup"),
            ("channels", "pub sub poll ack nack touch work watch channels groups dead redrive clear"),
            ("locks", "with-lock lock unlock extend check locks"),
            ("agents", "agent agents"), ("webhooks", "webhook"),
            ("coding agents", "mcp skill"),
            ("the daemon", "start stop status serve daemon doctor activity version bench"),
            ("this file", "vendor completion"))


def overview(known: Mapping[str, Command], only: str = "") -> str:
    """All commands in their families, or those of one family such as `agent`; a line each."""
    lines = [] if only else [f"Port Daddy {__version__}: ports, locks, channels and agents for everything on this machine.",
                             "", "usage: pd COMMAND … [--json | -q]      pd COMMAND --help: its arguments and an example"]
    for family, heads in FAMILIES:
        found = [one for head in heads.split() for words, one in sorted(known.items()) if words.split()[0] == head]
        shown = {one.words: one for one in found if not only or one.words.split()[0] == only}
        lines += ["", f"{family}:"] if shown else []
        lines += [f"  {words.ljust(18)}  {one.summary}" for words, one in shown.items()]
    return "\n".join(lines).lstrip("\n")


def parse(argv: Sequence[str], known: Mapping[str, Command]) -> tuple[Command, argparse.Namespace]:
    """The command that the words name, and its arguments; whatever follows -- is left alone in `words`."""
    import argparse
    cut = argv.index("--") if "--" in argv else len(argv)
    words, rest = list(argv[:cut]), list(argv[cut + 1:])
    while words and words[0] in ("--json", "-q", "--quiet") or len(words) > 2 and words[0] == "--home":
        count = 2 if words[0] == "--home" else 1
        words = words[count:] + words[:count]
    count = 2 if " ".join(words[:2]) in known else 1
    name = " ".join(words[:count])
    if name not in known:
        name = " ".join(words[:2]) if any(one.startswith(f"{name} ") for one in known) else name
        near = nearest(" ".join(words[:2]), known, 3) or nearest(name, known, 3)
        raise PortDaddyError("BAD_VALUE", f"there is no command {name!r}; "
                             f"{'did you mean ' + ', '.join(near) + '?' if near else 'pd help lists them'}")

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = [match for one in unknown for match in nearest(one, flags)]
            hint = f"did you mean {near[0]}?" if near else f"for example: {chosen.example}"
            raise PortDaddyError("BAD_VALUE", f"{name}: {message}; {hint} (pd {name} --help)")

    chosen = known[name]
    wraps = name in ("with-lock", "run", "work")
    shape = functools.partial(argparse.HelpFormatter, width=min(terminal_width(), 100) - 2)  # not to be asked at each flag
    parser = Parser(prog=f"pd {name}", description=chosen.summary, epilog=f"example: {chosen.example}", allow_abbrev=False,
                    formatter_class=shape)
    for add in chosen.arguments:
        add(parser)
    parser.add_argument("--json", action="store_true", help="the reply as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the value that a script wants")
    parser.add_argument("--home", metavar="DIR", help="the state folder (PORT_DADDY_HOME)")
    if wraps:
        parser.usage = parser.format_usage().strip().replace("usage: ", "", 1) + " -- COMMAND …"
    options = parser.parse_args(words[count:] + (["--", *rest] if rest and not wraps else []))
    options.words, options.command = rest if wraps else [], name
    return chosen, options


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line. -> 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 timed out, 6 no daemon, 130 Ctrl-C"""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a message must not be lost to an old locale
    try:
        try:
            return run_command(argv)
        except PortDaddyError as problem:
            say(f"pd: {problem}")
            if "--json" in (argv[:argv.index("--")] if "--" in argv else argv):
                out(json.dumps(problem.body, indent=2, ensure_ascii=False))
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


def run_command(argv: list[str]) -> int:
    if os.name != "posix":
        raise PortDaddyError("NOT_IMPLEMENTED", "Port Daddy needs Linux or macOS; on Windows, run it in WSL")
    known = commands()
    argv = [*argv[1:], "--help"] if argv[:1] == ["help"] and len(argv) > 1 else argv
    families = {words.split()[0] for words in known if " " in words} - set(known)
    if not argv or argv[0] in ("help", "-h", "--help") or argv[0] in families and argv[1:] in ([], ["--help"], ["-h"]):
        out(overview(known, argv[0] if argv and argv[0] in families else ""))
        return 0
    chosen, options = parse(["version"] if argv == ["--version"] else argv, known)
    return chosen.run(options) or 0


# ======================================================================================================================
# 17. DASHBOARD — what a browser shows of all this
# ======================================================================================================================

# 1. The page is constant bytes: nothing is filled in here, and everything that it shows it asks for over HTTP.
# 2. What comes from the daemon becomes text nodes and checked attributes, never markup; its policy lets only its own
#    script and style run, lets it ask this daemon only, and lets nobody frame it.
# 3. It follows one stream, and lets go of it while nobody looks; what an event names is fetched again, at most a third of
#    the time.

DASHBOARD = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Port Daddy</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='none'
  stroke='%230b7285' stroke-width='1.6'%3E%3Ccircle cx='8' cy='3' r='1.8'/%3E%3Cpath d='M8 5v9M5 7h6M2 9c0 7 12 7 12 0'/%3E
  %3C/svg%3E">
<style>
:root { color-scheme: light dark; --back: #f3f5f7; --panel: #fff; --soft: #edf1f4; --line: #d8dfe5; --ink: #18222b;
  --mute: #55626e; --accent: #0b6374; --ok: #17693a; --warn: #855400; --bad: #b0241c; }
@media (prefers-color-scheme: dark) { :root { --back: #0e1418; --panel: #151d23; --soft: #1e2830; --line: #2a353e;
  --ink: #dde5ea; --mute: #94a3ae; --accent: #67c1d0; --ok: #6ecb8d; --warn: #e0b25b; --bad: #ff938a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 13.5px/1.45 system-ui, sans-serif; }
h1, h2, p { margin: 0; font-size: inherit; }
b, small, code, span { unicode-bidi: isolate; }  /* a name that turns the direction turns its own only */
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
.ok { color: var(--ok); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.mute, small, th, nav a, #about { color: var(--mute); } a { color: var(--accent); text-underline-offset: 2px; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
header { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; align-items: center; gap: .4rem 1.1rem;
  padding: .6rem 1rem; background: var(--panel); border-bottom: 1px solid var(--line); }
h1 { font-size: 1.1rem; } #filter { flex: 0 1 16rem; margin-left: auto; }
nav { display: flex; flex-wrap: wrap; flex-basis: 100%; gap: .1rem 1.1rem; }
nav a:not(:hover, .bad) { text-decoration: none; } nav a:not(.bad) b { color: var(--ink); }
nav b, h2 small { margin-left: .4em; font-variant-numeric: tabular-nums; }
#state, .pill { font-weight: 600; white-space: nowrap; }
#state::before, .pill::before { content: ""; display: inline-block; width: .55em; height: .55em; margin-right: .4em;
  border-radius: 50%; background: currentColor; vertical-align: .06em; }
#trouble { padding: .5rem 1rem; background: var(--bad); color: var(--panel); font-weight: 600; }
main { padding: .9rem 1rem 2rem; }
main, main > div { display: grid; gap: .9rem; align-content: start; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 1100px) { main { grid-template-columns: minmax(0, 11fr) minmax(0, 9fr); } }
.old main { opacity: .55; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 7px; scroll-margin-top: 5.5rem; }
.top { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .7rem; padding: .5rem .8rem; }
h2 { margin-right: auto; font-size: 1rem; overflow-wrap: anywhere; outline: none; } h2 small { font-weight: 400; }
.box { max-height: 27rem; overflow: auto; border-top: 1px solid var(--line); }
.none { padding: .6rem .8rem .7rem; border-top: 1px solid var(--line); color: var(--mute); }
.none code { color: var(--ink); }
table { width: 100%; border-collapse: collapse; }
th, td { min-width: 5.5em; padding: .34rem .45rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: var(--panel); font-weight: 500; font-size: .86em; }
th, .number, .short, .act { min-width: 0; white-space: nowrap; font-variant-numeric: tabular-nums; }
.number, .short, .act { width: 1%; } .number, .act { text-align: right; } tbody td { border-top: 1px solid var(--soft); }
td.act { padding-block: .2rem; } .lines tbody td { padding-block: .06rem; border: 0; }
:is(th, td):first-child { padding-left: .8rem; } :is(th, td):last-child { padding-right: .8rem; }
td:first-child:not([class]) { min-width: 10em; } td small { display: block; }
.tag { display: inline-block; margin-right: .6em; }
.bar { display: block; min-width: 6rem; height: 5px; margin-top: .25rem; border-radius: 3px; background: var(--line); }
.bar::before { content: ""; display: block; height: 100%; border-radius: 3px; background: var(--accent);
  transform: scaleX(var(--left, 0)); transform-origin: left; transition: transform 1s linear; }
.bar.low::before { background: var(--bad); }
@media (prefers-reduced-motion: reduce) { .bar::before { transition: none; } }
button, input, textarea { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--mute);
  border-radius: 5px; padding: .3rem .55rem; }
button { padding: .14rem .55rem; margin-left: .3rem; background: var(--soft); border-color: var(--line); cursor: pointer; }
button:hover { border-color: var(--mute); } button.go { background: var(--accent); color: var(--panel); font-weight: 600; }
dialog { width: min(34rem, 100vw - 1.5rem); max-height: calc(100dvh - 2rem); padding: 0; color: inherit;
  background: var(--panel); border: 1px solid var(--line); border-radius: 9px; box-shadow: 0 12px 40px #0006; }
dialog::backdrop { background: #000a; } #view { width: min(64rem, 100vw - 1.5rem); } #view section { border: 0; }
#view .box { max-height: calc(100dvh - 17rem); } .text { display: grid; gap: .7rem; padding: 1rem 1.1rem; }
.text :is(input, textarea) { width: 100%; } .text div { text-align: right; } .text button { padding: .35rem .9rem; }
#said { inset: auto 1rem 1rem auto; max-width: calc(100vw - 2rem); padding: .5rem .9rem; border: 0; border-radius: 6px;
  background: var(--ink); color: var(--panel); overflow-wrap: anywhere; }
p:empty, [hidden] { display: none; }
@media (max-width: 700px) {  /* a row becomes a card that says beside each value what it is */
  header { position: static; } #filter { flex: 1 1 100%; } main { padding: .6rem .6rem 2rem; } .box { max-height: 75vh; }
  thead { display: block; position: absolute; width: 1px; height: 1px; overflow: hidden; }
  table, tbody, tbody tr { display: block; }
  tbody tr { padding: .45rem .8rem; content-visibility: auto; contain-intrinsic-size: auto 10rem; }
  tr + tr { border-top: 1px solid var(--line); }
  tbody td:nth-child(n) { display: grid; grid-template-columns: 6.8rem minmax(0, 1fr); width: auto; padding: .1rem 0;
    border: 0; text-align: left; white-space: normal; }
  td::before { content: attr(data-name); color: var(--mute); } td > * { grid-column: 2; justify-self: start; }
  td .bar { justify-self: stretch; } tbody td.act:nth-child(n) { display: flex; padding-top: .35rem; }
  td.act::before, tbody td:empty:nth-child(n) { display: none; } td button { margin: 0 .4rem 0 0; padding: .4rem .9rem; }
}
</style>
<header>
<h1>Port Daddy</h1>
<p id="state" class="mute" role="status">connecting</p>
<p id="about"></p>
<input id="filter" type="search" placeholder="Filter (press /)" aria-label="Filter everything on this page">
<nav aria-label="Lists"></nav>
</header>
<p id="trouble" role="alert" hidden></p>
<noscript><p class="text">This page needs JavaScript. What it shows can be asked with curl as well.</p></noscript>
<main><div></div><div></div></main>
<dialog id="view"></dialog>
<dialog id="ask" aria-labelledby="question" aria-describedby="outcome"><div class="text">
<h2 id="question"></h2><p id="outcome"></p><p id="refused" class="bad" role="alert"></p>
<div><button id="no" autofocus>Cancel</button><button id="yes" class="go"></button></div></div></dialog>
<dialog id="locked" aria-labelledby="wanted"><form class="text">
<h2 id="wanted">This daemon wants its token</h2>
<p>It was started with a token, and answers to nobody without. This tab keeps it until it is closed.</p>
<label>Token <input id="token" type="password" autocomplete="off" pattern="[!-~]+" required></label>
<p id="wrong" class="bad" role="alert"></p><div><button class="go">Open</button></div></form></dialog>
<output id="said" popover="manual"></output>
<script>
"use strict";
const $ = id => document.getElementById(id), enc = encodeURIComponent;
const pause = ms => new Promise(done => setTimeout(done, ms));
const MOST = 1000;  // rows shown of one list

// ---- asking

let token = "", unlocked = null, unlock = null;
try { token = sessionStorage.getItem("token") || ""; } catch { /* storage is off: it is asked for each time */ }

const headers = more => ({"X-Agent-Id": "dashboard", ...(token && {Authorization: "Bearer " + token}), ...more});
const get = url => ask("GET", url);

async function ask(method, url, body) {
  const used = token, more = body && {"Content-Type": "application/json"};
  const reply = await fetch(url, {method, headers: headers(more), body: body && JSON.stringify(body)}).catch(() => {
    throw new Error("no daemon answers; start it with: pd start");
  });
  return answer(reply, used, await reply.json());
}

function answer(reply, used, said) {
  if (reply.status === 401 && used === token && !$("locked").open) {  // else it is being typed, or was meanwhile
    unlocked = new Promise(done => { unlock = done; });
    $("wrong").textContent = used && "That is not the token.";
    state("warn", "waiting for the token");
    $("locked").showModal();
  }
  if (!reply.ok) throw new Error(said.error);
  return said;
}

$("locked").addEventListener("submit", event => {
  event.preventDefault();
  token = $("token").value;
  $("token").value = "";
  try { sessionStorage.setItem("token", token); } catch { /* as above */ }
  $("locked").close();
});
$("locked").addEventListener("close", () => unlock());

const services = async () => {
  const [listed, checks] = await Promise.all([get("/services"), get("/services/health")]);
  const known = new Map(checks.services.map(one => [one.id, one]));
  return listed.services.map(one => ({...known.get(one.id), ...one}));
};
let letters = new Map();  // the dead of each channel, which may be large, and what its groups were like just then
const channels = async () => {
  const {channels} = await get("/channels"), latest = [...channels].sort((one, other) => other.lastId - one.lastId);
  const kept = new Map(), found = await Promise.all(latest.slice(0, 200).map(async ({channel}) => {  // a request each
    const {groups} = await get(`/msg/${enc(channel)}/groups`), now = JSON.stringify(groups), old = letters.get(channel);
    kept.set(channel, old?.now === now ? old : {
      now, dead: groups.some(one => one.dead) ? (await get(`/msg/${enc(channel)}/dead`)).messages : []});
    return groups.map(one => ({channel, ...one}));
  }));
  letters = kept;
  show(LISTS.queues, found.flat());
  show(LISTS.dead, latest.flatMap(({channel}) => letters.get(channel)?.dead || []));
  return channels;
};
const webhooks = async () => Promise.all((await get("/webhooks")).webhooks.map(async one => {
  const {deliveries} = await get(`/webhooks/${enc(one.id)}/deliveries`);  // the last 50
  const count = status => deliveries.filter(sent => sent.status === status && sent.attempts).length;
  return {...one, retrying: count("pending"), dead: count("dead")};
}));

// ---- showing: a cell is a list of texts and of [tag, attributes, ...children], made into nodes that parse no markup

const shown = one => one || one === 0;

function node(spec) {
  if (!Array.isArray(spec)) return document.createTextNode(spec);
  const [tag, {act, ...attributes}, ...children] = spec, made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (shown(value) || value === "") made.setAttribute(name, value);
  made.append(...children.filter(shown).map(one => one instanceof Node ? one : node(one)));
  return Object.assign(made, {act});
}

function fill(cell, specs) {
  const shape = JSON.stringify(specs);
  if (cell.shape === shape) return;  // what has not changed keeps the focus, and does not flicker
  cell.shape = shape;
  cell.replaceChildren(...specs.filter(shown).map(node));
}

function span(ms) {
  let left = Math.max(0, Math.round(ms / 1000)), parts = [];
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]]) {
    if (left >= size) parts.push(Math.floor(left / size) + unit);
    left %= size;
  }
  return parts.slice(0, 2).join("") || "0s";
}

const clip = (text, most = 300) => text.length > most ? text.slice(0, most) + " …" : text;
const code = value => ["code", {}, clip(typeof value === "string" ? value : JSON.stringify(value), 2000)];
const strong = text => ["b", {}, text];
const small = text => text ? ["small", {}, text] : null;
const pill = (kind, text) => ["span", {class: "pill " + kind}, text];
const full = at => new Date(at).toLocaleString();
const since = at => at && ["span", {"data-since": at, title: full(at)}];
const until = at => at && ["span", {"data-until": at, title: full(at)}];
const clock = at => ["span", {title: full(at)}, new Date(at).toTimeString().slice(0, 8)];
const bar = (from, to) => ["span", {class: "bar", "data-from": from, "data-to": to, "aria-hidden": "true"}];
const button = (text, of, ...act) => ["button", {act, "aria-label": `${text} ${of}`}, text];
const link = ([name, url]) => /^https?:/i.test(url)
  ? ["a", {class: "tag", href: url, title: url, target: "_blank", rel: "noreferrer"}, name]
  : ["span", {class: "tag", title: url}, name];
const KINDS = {running: "ok", detached: "ok", delivered: "ok", starting: "warn", pending: "warn", assigned: "mute",
  stopped: "mute"};

function wellness({status, healthy, error, latency}) {
  const told = healthy === false ? error || "unhealthy" : healthy && "healthy";
  return [pill(healthy === false ? "bad" : KINDS[status] || "bad", status),
    small(told && clip(told) + (latency == null ? "" : `, ${Math.round(latency)} ms`))];
}

function tick(root = document) {
  const now = Date.now(), each = (data, work) => root.querySelectorAll(`[data-${data}]`).forEach(work);
  const put = (one, text) => { if (one.textContent !== text) one.textContent = text; };
  each("since", one => put(one, span(now - one.dataset.since) + " ago"));
  each("until", one => put(one, span(one.dataset.until - now) + " left"));
  each("to", one => {
    const {from, to} = one.dataset, part = Math.max(0, Math.min(1, (to - now) / Math.max(1, to - from)));
    one.style.setProperty("--left", part.toFixed(4));
    one.classList.toggle("low", part < 0.15);
  });
}

// ---- the lists: what each shows, how a row is known again, where it comes from, and what to type while it is empty.
// A column whose name ends with # holds numbers, one with @ stays on one line, and the one without a name the buttons.

const LISTS = {
  services: {
    title: "Services", empty: ["Nobody has claimed a port:", "pd claim myapp:api:main"], key: one => one.id, load: services,
    columns: {
      Service: one => [strong(one.id), small(one.agentId)], "Port#": one => [one.port], State: wellness,
      "Pid#": one => [one.pid], "Claimed@": one => [since(one.createdAt)],
      Links: one => Object.entries(one.endpoints).map(link),
      "": one => [button("Log", one.id, "log", one.id), button("Release", one.id, "release", one.id, one.port)],
    },
  },
  locks: {
    title: "Locks", empty: ["No lock is held:", "pd with-lock db-migration -- make migrate"],
    key: one => one.name + " " + one.token,
    load: async () => (await get("/locks")).locks.flatMap(one => one.holders.map(holder => ({...one, ...holder}))),
    columns: {
      Lock: one => [strong(one.name), small(one.limit > 1 && `${one.limit} may hold it`)],
      Holder: one => [one.owner || "somebody", small(`token ${one.token}` + (one.pid ? `, pid ${one.pid}` : ""))],
      "Time left": one => [until(one.expiresAt), bar(one.acquiredAt, one.expiresAt)], "Waiting#": one => [one.waiting],
      "": one => [button("Force unlock", one.name, "unlock", one.name, one.token, one.owner || "its holder", one.waiting)],
    },
  },
  queues: {
    title: "Queues", empty: ["No group works on a channel:", "pd work tasks -- ./build.sh"],
    key: one => one.channel + " " + one.group,
    columns: {
      Channel: one => [strong(one.channel)], Group: one => [one.group], "Backlog#": one => [one.backlog],
      "Leased#": one => [one.leased], "Dead#": one => [one.dead ? pill("bad", one.dead) : 0],
      "Last poll@": one => [since(one.lastPollAt)],
      "": one => [one.dead > 0 && button("Redrive", `all of ${one.channel} ${one.group}`, "redrive", one.channel,
        one.group, one.dead)],
    },
  },
  dead: {
    title: "Dead letters", empty: ["No message has used up its attempts."],
    key: one => [one.channel, one.group, one.id].join(" "),
    columns: {
      Message: one => [strong(one.id), small(one.channel + " " + one.group)], "Tries#": one => [one.attempts],
      "Died@": one => [since(one.diedAt)], Error: one => [clip(one.error || "")], Payload: one => [code(one.payload)],
      "": one => [button("Redrive", one.id, "redrive", one.channel, one.group, 1, one.id)],
    },
  },
  channels: {
    title: "Channels", empty: ["Nothing was published:", `pd pub tasks '{"action": "build"}'`], key: one => one.channel,
    load: channels,
    columns: {
      Channel: one => [strong(one.channel)], "Kept#": one => [one.count], "Subscribers#": one => [one.subscribers],
      "Last message@": one => [since(one.lastMessage)],
      "": one => [button("Messages", `of ${one.channel}`, "channel", one.channel)],
    },
  },
  agents: {
    title: "Agents", empty: ["No agent has registered:", "pd agent register builder-1"], key: one => one.id,
    load: async () => (await get("/agents")).agents,
    columns: {
      Agent: one => [strong(one.id), small([one.name, one.type].filter(Boolean).join(", "))],
      "State@": one => [one.isActive ? pill("ok", "alive") : pill("mute", "gone")],
      "Last seen@": one => [since(one.lastHeartbeat)], "Pid#": one => [one.pid],
      Holds: one => [clip([...one.services, ...one.locks].join(", "))],
    },
  },
  webhooks: {
    title: "Webhooks", empty: ["Nobody is told of events:", "pd webhook add http://localhost:8080/ --events 'lock.*'"],
    key: one => one.id, load: webhooks,
    columns: {
      Webhook: one => [one.url, small([one.events.join(" "), one.filterPattern].filter(Boolean).join(" on "))],
      State: one => [one.active ? pill("ok", "active") : pill("bad", "disabled"), small(one.dead && one.dead + " lost")],
      "Delivered#": one => [one.successCount], "Failed#": one => [one.failureCount], "Retrying#": one => [one.retrying],
      "Last@": one => [since(one.lastTriggered)],
      "": one => [button("Deliveries", `to ${one.url}`, "hook", one.id, one.url)],
    },
  },
  events: {
    title: "Events", empty: ["Nothing has happened."], key: one => one.id, fresh: [], paused: false,
    load: async () => LISTS.events[LISTS.events.paused ? "rows" : "fresh"],
    columns: {
      "Time@": one => [clock(one.timestamp)], "Event@": one => [strong(one.type)],
      Subject: one => [one.targetId, small(one.agentId)], Details: one => [clip(one.details)],
    },
  },
};

function build(one) {
  const named = name => ({"data-name": name.replace(/[#@]$/, ""),
    class: name.endsWith("#") ? "number" : name.endsWith("@") ? "short" : name ? null : "act"});
  const heads = Object.keys(one.columns).map(named);
  one.count = node(["small", {}]);
  one.heading = node(["h2", {tabindex: -1}, one.title, one.count]);
  one.top = node(["div", {class: "top"}, one.heading]);
  one.body = node(["tbody", {}]);
  const titles = heads.map(head => [head["data-name"] ? "th" : "td", {class: head.class, scope: "col"}, head["data-name"]]);
  one.box = node(["div", {class: one.follows ? "box lines" : "box", tabindex: 0, role: "region", "aria-label": one.title},
    ["table", {}, ["thead", {}, ["tr", {}, ...titles]], one.body]]);
  one.none = node(["p", {class: "none", hidden: ""}]);
  one.line = () => node(["tr", {}, ...heads.map(head => ["td", head])]);
  one.section = node(["section", {}, one.top, one.box, one.none]);
  return Object.assign(one, {rows: [], lines: new Map(), rest: 0}).section;
}

function show(one, rows = one.rows) {
  const typed = one.tab ? `${$("filter").value} ${one.only?.value || ""}`.toLowerCase().match(/\S+/g) || [] : [];
  const fits = row => (text => typed.every(word => text.includes(word)))(JSON.stringify(row).toLowerCase());
  const fitting = typed.length ? rows.filter(fits) : rows, chosen = fitting.slice(0, MOST);
  const keys = new Set(chosen.map(one.key));
  const atEnd = one.box.scrollHeight - one.box.scrollTop - one.box.clientHeight < 40;
  one.rows = rows;
  for (const [key, gone] of one.lines) if (!keys.has(key)) {
    if (gone.contains(document.activeElement)) (gone.nextSibling?.querySelector("button") || one.heading).focus();
    gone.remove();
    one.lines.delete(key);
  }
  chosen.forEach((row, place) => {
    const made = one.lines.get(one.key(row)) || one.line(), there = one.body.children[place];
    one.lines.set(one.key(row), made);
    Object.values(one.columns).forEach((draw, index) => fill(made.cells[index], draw(row)));
    if (there !== made) one.body.insertBefore(made, there || null);
  });
  one.count.textContent = (fitting.length < rows.length ? `${fitting.length} of ` : "") + rows.length +
    (fitting.length > MOST ? `, the first ${MOST} shown: filter to see others` : "");
  if (one.tab) fill(one.tab, [one.title, strong(rows.length)]);
  if (one === LISTS.dead) one.tab.className = rows.length ? "bad" : "";
  one.box.hidden = !chosen.length;
  one.none.hidden = !one.box.hidden;
  if (one.follows && atEnd) one.box.scrollTop = one.box.scrollHeight;
  fill(one.none, rows.length ? ["Nothing here fits the filter."] : [one.empty[0], " ", one.empty[1] && code(one.empty[1])]);
  tick(one.section);
}

// Fetch a list again as soon as it has rested; who asks meanwhile gets one more round in all, not one each.
async function soon(one) {
  one.due = true;
  if (one.busy) return;
  for (one.busy = true; one.due;) {
    await pause(one.rest);
    one.due = false;
    const began = performance.now();
    try { show(one, await one.load()); } catch (problem) { one.failed?.(problem); }
    one.rest = 100 + 2 * (performance.now() - began);
  }
  one.busy = false;
}

// ---- what can be done, after a question that says what comes of it

let question = null, viewed = null;

function sure(title, outcome, verb, method, url, body) {
  $("question").textContent = title;
  $("outcome").textContent = outcome;
  $("yes").textContent = verb;
  $("refused").textContent = "";
  question = [method, url, body];
  $("ask").showModal();
}

$("no").addEventListener("click", () => $("ask").close());
$("yes").addEventListener("click", async () => {
  $("yes").disabled = true;
  try { tell((await ask(...question)).message); $("ask").close(); }
  catch (problem) { $("refused").textContent = problem.message; }
  $("yes").disabled = false;
  all();
  if (viewed) soon(viewed);
});

function tell(text) {
  $("said").hidePopover();  // and above whatever dialog is open by now
  $("said").textContent = text;
  $("said").showPopover();
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => $("said").hidePopover(), 6000);
}

async function view(one, ...more) {
  $("view").replaceChildren(build(viewed = one), ...more);
  $("view").setAttribute("aria-label", one.title);
  one.top.append(node(["button", {act: ["close"], autofocus: ""}, "Close"]));
  one.failed = problem => { one.none.hidden = false; fill(one.none, [problem.message]); };
  $("view").showModal();
  for (; viewed === one && $("view").open; await pause(1500)) if (!document.hidden) soon(one);
}

function publisher(channel, done) {
  const refused = node(["p", {class: "bad", role: "alert"}]), field = node(["textarea", {name: "payload", rows: 2}]);
  const form = node(["form", {class: "text"}, ["label", {}, "Publish JSON, or any text", field], refused,
    ["div", {}, ["button", {class: "go"}, "Publish"]]]);
  form.addEventListener("submit", async event => {
    event.preventDefault();
    let payload = field.value, failed = "";
    try { payload = JSON.parse(payload); } catch { /* then it is a text */ }
    try { tell((await ask("POST", `/msg/${enc(channel)}`, {payload})).message); }
    catch (problem) { failed = problem.message; }
    refused.textContent = failed;
    if (!failed) field.value = "";
    done();
  });
  return form;
}

const ACTIONS = {
  close: () => $("view").close(),
  release: (id, port) => sure(`Release ${id}?`, `Its port ${port} may be given to others. What listens there goes on ` +
    "running; a new claim of this name gets the port back while it is free.",
    "Release", "DELETE", `/services/${enc(id)}`),
  unlock: (name, held, owner, waiting) => sure(`Take the lock ${name} from ${owner}?`, `${owner} is not asked, and may ` +
    `be in the middle of its work. ${waiting ? `The first of ${waiting} who wait gets the lock.` : "Nobody waits for it."}`,
    "Force unlock", "DELETE", `/locks/${enc(name)}`, {token: held}),  // by its token: who has got it since keeps it
  redrive: (channel, group, count, id) => sure(`Redrive ${id ? `message ${id}` : `all ${count} dead`} of ${channel}?`,
    `The group ${group} gets ${count > 1 ? "them" : "it"} again, with all attempts anew. What was not mended fails again.`,
    "Redrive", "POST", `/msg/${enc(channel)}/redrive`, {group, ...(id && {id})}),
  replay: (hook, id, event) => sure(`Send ${event} once more?`, `The receiver gets ${id} again. If it does not look at ` +
    "ids, it does its work twice.", "Replay", "POST", `/webhooks/${enc(hook)}/deliveries/${enc(id)}/replay`, {}),
  log: id => view({
    title: `Log of ${id}`, empty: ["Nothing that it printed was sent in. This does:", `pd run ${id} -- npm start`],
    key: one => one.id, follows: true, load: async () => (await get(`/services/${enc(id)}/logs?tail=300`)).lines,
    columns: {
      "Time@": one => [clock(one.at)],  // and the line without the colours of a terminal
      Line: one => [["code", {class: one.stream === "stderr" && "warn"},
        clip(one.text, 2000).replace(/\x1b\[[\d;]*[a-z]/gi, "")]],
    },
  }),
  channel: channel => {
    const list = {
      title: `Messages of ${channel}`, empty: ["None is kept."], key: one => one.id, follows: true,
      load: async () => (await get(`/msg/${enc(channel)}`)).messages,  // the last 50
      columns: {"Message#": one => [one.id], "Sent@": one => [since(one.createdAt)],
        "Sender@": one => [one.sender], Payload: one => [code(one.payload)]},
    };
    view(list, publisher(channel, () => soon(list)));
  },
  hook: (id, url) => view({
    title: `Deliveries to ${url}`, empty: ["Nothing was sent yet:", `pd webhook test ${id}`], key: one => one.id,
    load: async () => (await get(`/webhooks/${enc(id)}/deliveries`)).deliveries,
    columns: {
      Event: one => [strong(one.event), small(one.id)], "State@": one => [pill(KINDS[one.status] || "bad", one.status)],
      "Tries#": one => [one.attempts], "Answer#": one => [one.responseStatus],
      "Next try@": one => [one.status === "pending" && until(one.nextAttemptAt)],
      Error: one => [clip(one.error || "")], "Created@": one => [since(one.createdAt)],
      "": one => one.status === "pending" ? [] : [button("Replay", one.event, "replay", id, one.id, one.event)],
    },
  }),
};

document.addEventListener("click", event => {
  const [name, ...facts] = event.target.closest("button")?.act || [];
  if (name) ACTIONS[name](...facts);
});
document.addEventListener("keydown", event => {
  if (event.key !== "/" || event.target.matches("input, textarea") || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  $("filter").focus();
});

// ---- following: one stream of all that happens, while somebody looks, from where the last one ended

const TOUCHED = {service: ["services", "agents"], lock: ["locks", "agents"], agent: ["agents", "services", "locks"],
  message: ["channels"], webhook: ["webhooks"]};
let cursor = 0, heard = 0, stream = new AbortController();

function state(kind, text) {
  $("state").className = kind;
  document.body.classList.toggle("old", kind !== "ok");
  if ($("state").textContent !== text) $("state").textContent = text;
}

function all() {
  Object.values(LISTS).filter(one => one.load && one !== LISTS.events).forEach(soon);  // events come by the stream
  get("/health").then(({status, version, pid, uptime_seconds, error}) => {
    $("about").textContent = `${version}, pid ${pid}, up ${span(1000 * uptime_seconds)}`;
    $("trouble").hidden = status === "ok";
    $("trouble").textContent = `The daemon is ${status}: ${error}`;
  }).catch(() => {});
}

function hear(part) {
  if (stream.signal.aborted) return;  // what came in one piece with the reason for a restart comes again
  const {id, event, data} = Object.fromEntries(part.split("\n").map(line => line.split(/: (.*)/s, 2)));
  if (event === "gap" || event === "reset") return restart();  // what is still known of it is in the log
  if (event === "connected" && !cursor) begin(JSON.parse(data).lastId).catch(restart);
  if (!id) return;
  cursor = id;
  remember([JSON.parse(data), ...LISTS.events.fresh]);
  ["events", ...TOUCHED[event.split(".")[0]] || []].forEach(name => soon(LISTS[name]));
  if (LISTS.webhooks.rows.length) soon(LISTS.webhooks);
}

function restart() {
  cursor = 0;
  stream.abort();
}

// The stream begins now, and the log is read then: nothing falls between. Older messages are left to their channels.
async function begin(last) {
  cursor = last;
  LISTS.events.fresh = [];
  const {entries} = await get("/activity?limit=200");
  remember([...LISTS.events.fresh, ...entries]);
  soon(LISTS.events);
}

function remember(entries) {
  LISTS.events.fresh = [...new Map(entries.map(one => [one.id, one])).values()].slice(0, 500);
}

async function listen() {
  stream.abort();
  stream = new AbortController();
  const used = token, more = cursor ? {"Last-Event-ID": cursor} : {};
  const reply = await fetch("/events?type=*.*", {headers: headers(more), signal: stream.signal});
  if (!reply.ok) answer(reply, used, await reply.json());
  state("ok", "live");
  all();
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", got; heard = Date.now(), got = await reader.read(), !got.done;) {
    const parts = (rest + got.value).split("\n\n");
    rest = parts.pop();
    parts.forEach(hear);
  }
}

async function follow() {
  for (;; await pause(1000)) {
    if (document.hidden) await new Promise(seen => document.addEventListener("visibilitychange", seen, {once: true}));
    try {
      await listen();
      state("bad", "the daemon has gone; trying again");
    } catch (problem) {
      const said = problem instanceof TypeError ? "no daemon answers" : problem.message;  // a TypeError: no reply
      if (!unlocked && problem.name !== "AbortError") state("bad", said + "; trying again");
    }
    await unlocked;
    unlocked = null;
  }
}

document.addEventListener("visibilitychange", () => { if (document.hidden) restart(); });
setInterval(tick, 1000);
const slow = setInterval(() => {
  if (document.hidden || $("state").className !== "ok") return;
  if (Date.now() - heard > 20000) stream.abort();  // even an idle stream says something every 15 s
  all();
}, 5000);

// ---- the beginning

Object.entries(LISTS).forEach(([name, one], place) => {
  one.tab = node(["a", {href: "#" + name}]);
  document.querySelector("nav").append(one.tab);
  document.querySelectorAll("main > div")[place < 4 ? 0 : 1].append(build(one));
  one.section.id = name;
});
const events = LISTS.events, pauser = node(["button", {}, "Pause"]);
events.only = node(["input", {type: "search", name: "only", placeholder: "Filter events", "aria-label": "Filter events"}]);
events.top.append(events.only, pauser);
events.only.addEventListener("input", () => show(events));
$("filter").addEventListener("input", () => Object.values(LISTS).forEach(one => show(one)));
pauser.addEventListener("click", () => {
  events.paused = !events.paused;
  pauser.textContent = events.paused ? "Go on" : "Pause";
  soon(events);
});
follow();
</script>
</html>
"""

WELCOME = """Port Daddy {version}: ports, locks, channels, agents and webhooks for everything that runs on this machine.
In a browser this address is a dashboard. For agents: {url}/llms.txt; for programs: {url}/openapi.json

A port of your own      curl -X POST {url}/claim -d '{{"id": "myapp:api:main"}}'
Take a lock             curl -X POST {url}/locks/db-migration -d '{{"owner": "me", "ttl": "2m"}}'
Give it back            curl -X DELETE {url}/locks/db-migration -d '{{"owner": "me"}}'
Publish a message       curl -X POST {url}/msg/tasks -d '{{"payload": "build"}}'
Wait for the next one   curl '{url}/msg/tasks/poll?timeout=30s'
"""


@functools.cache
def dashboard() -> Page:
    """The page, and the policy under which nothing runs that is not in it."""
    import base64
    import hashlib

    def source(tag: str) -> str:
        text = DASHBOARD.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return Page("text/html; charset=utf-8", DASHBOARD.encode(), (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"))


@page("/")
def front_page(daemon: Daemon, accept: str) -> Page:
    """The dashboard for a browser; for whoever else asks, what this is and what to type."""
    if "text/html" in accept:
        return dashboard()
    return Page("text/plain; charset=utf-8", WELCOME.format(version=__version__, url=daemon.url).encode())


if __name__ == "__main__":
    sys.exit(main())
