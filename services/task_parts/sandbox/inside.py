"""What runs inside a sandbox: `python -c THIS LIMITS LIFELINE ROLE FDS...`; the standard library alone.

    program CODE             the code as a program, with its input and output
    answer CODE READ WRITE   the code as a module, whose functions the other side calls
    ask TESTS READ WRITE     the tests, with the names of the other side; prints 1 or 0 for each

Between the last two travel lines of JSON with plain values: None, bool, int, float, complex, str, bytes, list, tuple,
set, frozenset, dict, range, and what derives from them as such. Any other object stays where it is, and the tests get a
handle: it can be called, iterated, indexed, and its attributes read and set, but it compares as itself, and has no
arithmetic: an object that says it equals everything is of no use. Lists, dicts and sets given as arguments are
filled anew after the call, so that functions that work in place are seen to. Functions of the tests can be called back.
"""

import builtins
import importlib
import json
import os
import resource
import select
import sys
import types
from collections.abc import Callable
from typing import Any

MESSAGE_BYTES = 16 << 20
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_HANDLE_METHODS = (
    "__len__",
    "__getitem__",
    "__setitem__",
    "__delitem__",
    "__iter__",
    "__next__",
    "__enter__",
    "__exit__",
)


class Peer:
    """One side. open: whether the other may look into our objects, or only call the functions it was given."""

    def __init__(self, reader: int, writer: int, *, open_: bool) -> None:
        self._reader, self._writer = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
        self._open, self._objects = open_, []  # type: tuple[bool, list[Any]]

    # ---- values

    def encode(self, value: Any) -> Any:
        if value is None or value is True or value is False:
            return value
        if isinstance(value, Handle) and object.__getattribute__(value, "_peer") is self:
            return ["yours", object.__getattribute__(value, "_number")]
        if isinstance(value, int):
            return int(value) if -(1 << 62) < value < 1 << 62 else ["int", hex(value)]
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, complex):
            return ["complex", [value.real, value.imag]]
        if isinstance(value, bytes | bytearray):
            return ["bytes", bytes(value).hex()]
        if isinstance(value, range):
            return ["range", [value.start, value.stop, value.step]]
        if isinstance(value, dict):
            return ["dict", [[self.encode(key), self.encode(each)] for key, each in dict.items(value)]]
        for name, kind in _SEQUENCES.items():
            if isinstance(value, kind):
                return [name, [self.encode(each) for each in kind.__iter__(value)]]
        self._objects.append(value)
        return ["mine", len(self._objects) - 1]

    def decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        name, content = value
        if name in _SEQUENCES:
            return _SEQUENCES[name](self.decode(each) for each in content)
        if name == "dict":
            return {self.decode(key): self.decode(each) for key, each in content}
        if name == "mine":
            return Handle(self, content)
        if name == "yours":
            return self._objects[content]
        plain: dict[str, Callable[[Any], Any]] = {
            "int": lambda text: int(text, 16), "complex": lambda parts: complex(*parts),
            "bytes": bytes.fromhex, "range": lambda parts: range(*parts),
        }  # fmt: skip
        return plain[name](content)

    # ---- messages

    def send(self, message: Any) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
        self._writer.flush()

    def receive(self) -> Any:
        line = self._reader.readline(MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError("the other side has ended, or says too much")
        return json.loads(line)

    def request(self, action: str, target: int, *given: Any, **named: Any) -> Any:
        """Have the other side do something; meanwhile it may call what was given to it."""
        self.send([action, target, self.encode(given), self.encode(named)])
        while True:
            message = self.receive()
            if message[0] == "value":
                for own, anew in zip(given, self.decode(message[2]), strict=True):
                    _fill(own, anew)
                return self.decode(message[1])
            if message[0] == "error":
                raise _exception(message[1], message[2])
            self.serve(message)

    def serve(self, message: Any) -> None:
        try:
            action, target, given, named = message
            subject, arguments, options = self._objects[target], self.decode(given), self.decode(named)
            if action == "call":
                result = subject(*arguments, **options)
            elif not self._open:
                raise PermissionError(action)
            elif action == "set":
                setattr(subject, *arguments)
                result = None
            else:
                result = getattr(subject, arguments[0])
            reply = ["value", self.encode(result), self.encode(arguments)]
        except BaseException as error:
            reply = ["error", type(error).__name__, f"{error}"[:1000]]
        self.send(reply)


class Handle:
    """An object of the other side."""

    _peer: Peer
    _number: int

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._peer.request("call", self._number, *given, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.request("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.request("set", self._number, name, value)


def _handled(name: str) -> Callable[..., Any]:
    def method(self: Handle, *given: Any) -> Any:
        try:
            own = self._peer.request("get", self._number, name)
        except AttributeError:
            raise TypeError(f"the object has no {name}") from None
        return own(*given)

    return method


for _name in _HANDLE_METHODS:
    setattr(Handle, _name, _handled(_name))


def _fill(own: Any, anew: Any) -> None:
    if type(own) is list and type(anew) is list:
        own[:] = anew
    elif isinstance(own, dict | set) and type(anew) is type(own):
        own.clear()
        own.update(anew)


def _exception(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind(text)
    return RuntimeError(f"{name}: {text}")


# ---- roles


def program(code: str) -> None:
    exec(compile(code, "response.py", "exec"), {"__name__": "__main__", "__builtins__": builtins})


def answer(code: str, reader: str, writer: str) -> None:
    peer = Peer(int(reader), int(writer), open_=True)
    os.dup2(0, 1)  # nobody reads what it prints
    module = types.ModuleType("response")
    sys.modules["response"] = module
    exec(compile(code, "response.py", "exec"), module.__dict__)
    names = {}
    for name, value in list(module.__dict__.items()):
        if isinstance(value, types.ModuleType):
            names[name] = ["module", value.__name__]
        elif not name.startswith("__"):
            names[name] = peer.encode(value)
    peer.send(names)
    while True:
        peer.serve(peer.receive())


def ask(questions: str, reader: str, writer: str) -> None:
    verdict = os.dup(1)
    os.dup2(0, 1)  # where the tests print
    peer = Peer(int(reader), int(writer), open_=False)
    work = json.loads(questions)
    names: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    for name, value in peer.receive().items():
        # What the tests measure by must not come from what they measure.
        if isinstance(value, list) and value[0] == "module":
            _import(name, value[1], names)
        elif not hasattr(builtins, name):
            names.setdefault(name, peer.decode(value))
    exec(compile(work["setup"], "setup.py", "exec"), names)
    for number, test in enumerate(work["tests"]):
        try:
            exec(compile(test, f"test-{number}.py", "exec"), names)
        except BaseException:
            os.write(verdict, b"0")
        else:
            os.write(verdict, b"1")


def _import(name: str, module: str, names: dict[str, Any]) -> None:
    """Tests may count on what the code imports: our own module of that name, where it is one that everybody has."""
    if module in sys.stdlib_module_names and not hasattr(builtins, name):
        names.setdefault(name, importlib.import_module(module))


def main() -> None:
    _, limits, lifeline, role, fd, *rest = sys.argv
    parent = select.poll()
    parent.register(int(lifeline))
    if parent.poll(0):
        return  # whoever has started this is dead
    os.close(int(lifeline))
    sys.path[:] = [each for each in sys.path if each]
    for name, value in json.loads(limits).items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    with open(int(fd), "rb") as file:
        text = file.read().decode()
    if role == "program":
        program(text)
    elif role == "answer":
        answer(text, *rest)
    else:
        ask(text, *rest)


if __name__ == "__main__":
    main()
