"""Render chat templates: the script of the child process that `template_process.py` starts.

It imports jinja2 and the standard library alone, so that it starts in about 0.1 seconds. Templates
see what they see in transformers: the same options, filters and functions.

Both directions carry JSON messages after their length. The first message has the settings, and each
later one a list of conversations. Its answer is a list with `{"text": ...}`, `{"error": ...}` or
`{"limit": NAME}` for each; it ends early if the texts together come near a limit.
"""

from __future__ import annotations

import datetime
import json
import math
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

try:
    import resource
except ImportError:  # Windows: the parent's deadline is the only limit
    resource = None

HEAD = struct.Struct(">Q")  # the length of a message
JSON = json.JSONEncoder(ensure_ascii=False, default=str)
OUTPUT, MEMORY = "template_output_bytes", "template_memory_bytes"
OLDEST_JINJA = (3, 1, 6)  # there are ways out of the sandbox of older versions
REASONING = ("reasoning_content", "thinking", "reasoning")


class OutputError(Exception):
    """The rendered text is longer than the limit."""


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the input
    source, target = sys.stdin.buffer, sys.stdout.buffer
    settings = receive(source)
    sys.path += [entry for entry in settings["path"] if entry not in sys.path]
    try:
        environment = make_environment()
    except ImportError as error:
        send(target, {"error": str(error)})
        return
    _set_limit("RLIMIT_CORE", 0)
    _set_limit("RLIMIT_AS", settings["memory"])
    send(target, {"ready": True})
    template = _Template(environment, settings)
    while True:
        try:
            requests = receive(source)
        except MemoryError:
            send(target, [{"limit": MEMORY}])
            return
        if requests is None:
            return
        # Let the system end this process if the parent does not: it may have ended itself.
        _set_limit("RLIMIT_CPU", math.ceil(time.process_time() + settings["seconds"]) + 1)
        answers = list(template.answers(requests))
        send(target, answers)
        if answers and answers[-1].get("limit") == MEMORY:
            return  # the heap is fragmented now; the parent starts another process


class _Template:
    """A template, compiled when it first renders: compiling it is untrusted work too."""

    def __init__(self, environment: Any, settings: dict[str, Any]):
        self._environment, self._text = environment, settings["template"]
        self._tokens = settings["tokens"]
        self._most, self._seconds = settings["output"], settings["seconds"]
        self._compiled = None

    def answers(self, requests: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
        """Render conversations until one exceeds a limit, or all together are about to."""
        room, until = self._most, time.monotonic() + self._seconds / 2
        for request in requests:
            answer = self._answer(request)
            yield answer
            room -= len(answer.get("text", ""))
            if room < 0 or time.monotonic() > until or "limit" in answer:
                return

    def _answer(self, request: dict[str, Any]) -> dict[str, str]:
        try:
            if self._compiled is None:
                self._compiled = self._environment.from_string(self._text)
            return {"text": _render(self._compiled, self._tokens | request, self._most)}
        except OutputError:
            return {"limit": OUTPUT}
        except MemoryError:
            return {"limit": MEMORY}
        except Exception as error:  # a template can raise any exception
            return {"error": (str(error) or type(error).__name__)[:1000]}


def receive(stream: BinaryIO) -> Any:
    """Read a message; None at the end of the stream."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    return decode(stream.read(*HEAD.unpack(head)))


def send(stream: BinaryIO, message: Any) -> None:
    """Write a message."""
    stream.write(encode(message))
    stream.flush()


def encode(message: Any) -> bytes:
    """Encode a message as its length and its JSON, lone surrogates included."""
    return framed(JSON.encode(message))


def framed(text: str) -> bytes:
    """Encode the JSON of a message after its length."""
    body = text.encode("utf-8", "surrogatepass")
    return HEAD.pack(len(body)) + body


def decode(body: bytes) -> Any:
    """Decode the JSON of a message."""
    return json.loads(body.decode("utf-8", "surrogatepass"))


def make_environment() -> Any:
    """Create the sandbox that chat templates are written for.

    Raises:
      ImportError: jinja2 is missing or too old.
    """
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdecimal())
    if version < OLDEST_JINJA:
        raise ImportError(f"jinja2 {jinja2.__version__} is installed; 3.1.6 or newer is needed")

    class Generation(jinja2.ext.Extension):
        """Accept the block that marks a response, and render its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """A namespace without attributes that begin with an underscore."""

        def __init__(*given: Any, **named: Any):
            self, *rest = given
            attributes = dict(*rest, **named)
            for name in attributes:
                _check_public(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_public(name)
            super().__setitem__(name, value)

    class Dict:
        """The two uses of `dict` in templates; the class itself would offer more."""

        def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
            return dict(*given, **named)

        def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
            return dict.fromkeys(keys, value)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(message)

    def _check_public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {
        "dict": Dict(),
        "namespace": Namespace,
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _render(template: Any, names: dict[str, Any], most: int) -> str:
    messages = [_as_templates_expect(message) for message in names["messages"]]
    pieces: list[str] = []
    room = most
    for piece in template.generate(names | {"messages": messages}):
        room -= len(piece)
        if room < 0:
            raise OutputError
        pieces.append(piece)
    text = "".join(pieces)
    if 4 * len(text) > most and len(text.encode("utf-8", "surrogatepass")) > most:
        raise OutputError
    return text


def _as_templates_expect(message: dict[str, Any]) -> dict[str, Any]:
    """Leave out null fields, and give reasoning the names that templates read."""
    present = {name: value for name, value in message.items() if value is not None}
    reasoning = next((present[name] for name in REASONING if name in present), None)
    if reasoning is None:
        return present
    return {"thinking": reasoning, **present, "reasoning_content": reasoning}


def _set_limit(name: str, most: int) -> None:
    if resource is None:
        return
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    try:
        resource.setrlimit(kind, (most, hard))
    except (OSError, ValueError):
        pass  # macOS has no limit on the address space; the deadline remains


if __name__ == "__main__":
    main()
