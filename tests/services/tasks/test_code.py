"""The code task: right, wrong, malformed, hanging and hostile responses. What decides is out of their reach."""

import json
import os
import random
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sapo_learner.errors import ConfigError
from services.task_parts import sandbox as module
from services.task_parts.sandbox import Limits, Sandbox
from services.tasks import Prompt, Response, TaskSettings, build
from services.tasks.code import Code, program
from tests.services.tasks import users
from tests.services.tasks.programs import BEYOND_LIMITS, DAEMON, FORGERIES, HANGING
from tests.services.tasks.users import User

ADD = {"prompt": "Write add(a, b).", "tests": ["assert add(1, 2) == 3", "assert add(40, 2) == 42"]}
SUM = {
    "prompt": "Print the sum.",
    "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "40 2\n", "output": "42\n"}],
}
RIGHT = "def add(a, b):\n    return a + b\n"
MEMORY = 300 + random.Random(os.getpid()).randrange(100)  # by which processes of this test are known from others


@pytest.fixture(scope="module", autouse=True)
def this_user() -> Iterator[User]:
    with users.user() as found:
        yield found


@pytest.fixture(scope="module", params=users.WHO)
def user(request: pytest.FixtureRequest) -> Iterator[User]:
    with users.user(request.param) as found:
        yield found


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Code]:
    def made(*problems: dict[str, Any], **options: Any) -> Code:
        path = tmp_path / "problems.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in problems or (ADD,)))
        settings = {"name": "code", "path": path, "memory_mib": MEMORY, "seconds": 3, **options}
        found = build(TaskSettings.model_validate(settings))
        assert isinstance(found, Code)
        return found

    return made


def worth(task: Code, text: str, user: User | None = None) -> dict[str, float]:
    """user: whose sandbox the program runs in."""
    if user:
        task.__dict__["_sandbox"] = user.sandbox(task._sandbox._limits)
    (prompt,) = (*task.prompts("train"), *task.prompts("held_out"))
    return dict(task.score(Prompt.model_validate_json(prompt.model_dump_json()), Response(text, "stop")))


def left_over() -> list[psutil.Process]:
    """Processes of a sandbox of this test, wherever they hang in the tree."""
    mark = f'"RLIMIT_AS": {MEMORY << 20}'
    return [each for each in psutil.process_iter(["cmdline"]) if mark in " ".join(each.info["cmdline"] or [])]


def ended() -> bool:
    deadline = time.monotonic() + 5
    while left_over() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not left_over()


def seen(user: User, code: str, **limits: int) -> str:
    """What a program prints within three seconds."""
    outcome = user.sandbox(Limits(**{"memory_mib": MEMORY, **limits})).run(code, "", 3, 10_000)
    return outcome.output.decode().strip()


# ---- right and wrong


@pytest.mark.parametrize("sandbox", ["bubblewrap", "none"])
@pytest.mark.parametrize(
    ("problem", "text", "correct", "passed"),
    [
        (ADD, RIGHT, 1, 1),
        (ADD, f"Like this:\n```python\n{RIGHT}```\nDone.", 1, 1),
        (ADD, f"```python\nadd = None\n```\nno:\n```python\n{RIGHT}```", 1, 1),
        (ADD, "def add(a, b):\n    return 3\n", 0, 0.5),
        (ADD, "def sub(a, b):\n    return 3\n", 0, 0),
        (SUM, "print(sum(map(int, input().split())))", 1, 1),
        (SUM, "print(3, '  ')\nprint()", 0, 0.5),
        (SUM, "print(sum(map(int, input().split())))\nraise SystemExit(1)", 0, 0),
    ],
)
def test_the_share_of_tests_that_pass(
    task: Callable[..., Code], problem: dict[str, Any], text: str, correct: float, passed: float, sandbox: str
) -> None:
    assert worth(task(problem, partial=True, sandbox=sandbox), text) == {"correct": correct, "passed": passed}
    assert worth(task(problem, sandbox=sandbox), text) == {"correct": correct}


def test_whoever_scores_what_is_right_is_right(task: Callable[..., Code], user: User) -> None:
    assert worth(task(ADD, partial=True), RIGHT, user) == {"correct": 1, "passed": 1}
    assert worth(task(ADD, partial=True), "def add(a, b): return 3", user) == {"correct": 0, "passed": 0.5}
    assert worth(task(SUM), "print(sum(map(int, input().split())))", user) == {"correct": 1}
    assert (seen(user, "import os\nprint(os.getuid())") == str(users.NUMBER)) == bool(user.identity)


@pytest.mark.parametrize(
    "text", ["", "  \n", "no code at all", "```python\n```", "```python\ndef add(:\n```", "add = 3", "\0"]
)
def test_what_is_no_program_is_wrong(task: Callable[..., Code], text: str) -> None:
    assert worth(task(ADD), text) == {"correct": 0}
    assert worth(task(SUM), text) == {"correct": 0}


def test_the_last_fenced_block_of_python_is_the_program() -> None:
    assert program("```python\n1\n```\n```py\n2\n```\n```json\n3\n```") == "2\n"
    assert program("```python\n1\n") == "```python\n1\n"
    assert program("1") == "1"


def test_values_of_every_plain_kind_travel_between_code_and_tests() -> None:
    values = (
        "None", "True", "1 << 70", "-3", "1.5", "float('inf')", "2j", "'ä\\ud800'", "b'x'", "[1, (2,)]", "{3}",
        "frozenset({4})",
        "{(1, 2): {5: []}}", "range(3)", "''", "()",
    )  # fmt: skip
    tests = [f"assert same({each}) == {each} and type(same({each})) is type({each})" for each in values]
    assert checked("def same(x): return x", *tests) == [True] * len(values)


def indented(code: str) -> str:
    return textwrap.indent(code.strip(), "    ")


def checked(code: str, *tests: str) -> list[bool]:
    return Sandbox("bubblewrap", Limits(memory_mib=MEMORY)).check(code, "import operator", tests, 3)


def test_classes_generators_callbacks_exceptions_and_changes_in_place_are_tested_too() -> None:
    code = (
        "import math\nfrom dataclasses import dataclass\nfrom collections import Counter, namedtuple\n"
        "@dataclass\nclass Stack:\n    items: list\n    def push(self, x): self.items.append(x); return self\n"
        "    def __len__(self): return len(self.items)\n"
        "def count(n):\n    yield from range(n)\n"
        "def each(f, xs): return [f(x) for x in xs]\n"
        "def sort(xs): xs.sort()\n"
        "def letters(s): return Counter(s)\n"
        "def down(n): return 0 if n == 0 else down(n - 1)\n"
        "print('x' * 1_000_000)\n"
    )
    tests = [
        "s = Stack([1])\ns.push(2).push(3)\nassert len(s) == 3 and s.items == [1, 2, 3]",
        "assert list(count(3)) == [0, 1, 2] and sum(x for x in count(4)) == 6",
        "assert each(lambda x: x + 1, [1, 2]) == [2, 3] and each(operator.neg, [1]) == [-1]",
        "xs = [3, 1, 2]\nsort(xs)\nassert xs == [1, 2, 3]",
        "assert letters('aab') == {'a': 2, 'b': 1}",
        "try:\n    each(None, [1])\nexcept TypeError:\n    pass\nelse:\n    assert False",
        "assert math.floor(2.5) == 2",
        "def check(candidate):\n    assert candidate([], []) == []\ncheck(each)",
        "assert down(500) == 0",
        "assert each(down, [1]) == [1]",
    ]
    assert checked(code, *tests) == [True] * (len(tests) - 1) + [False]


# ---- hanging


@pytest.mark.parametrize("name", HANGING)
def test_what_does_not_end_is_wrong_within_its_limit_and_leaves_no_process(
    task: Callable[..., Code], name: str, user: User
) -> None:
    started, code = time.monotonic(), HANGING[name]
    assert worth(task(ADD, seconds=1), f"{RIGHT}\n{code}", user) == {"correct": 0}
    assert worth(task(SUM, seconds=1), code, user) == {"correct": 0}
    assert worth(task(ADD, seconds=1), f"def add(a, b):\n{indented(code)}", user) == {"correct": 0}
    assert time.monotonic() - started < 40  # no sleep of a minute was waited for
    assert ended()


def test_what_goes_on_behind_a_finished_program_ends_with_it(task: Callable[..., Code], user: User) -> None:
    text = f"{DAEMON}print(sum(map(int, input().split())))"
    assert worth(task(SUM), text, user) == {"correct": 1}
    assert ended()


def test_kill_9_of_the_process_that_scores_ends_the_sandbox(user: User) -> None:
    script = (
        "from services.task_parts.sandbox import Limits, Sandbox\n"
        f"print('go', flush=True)\nsandbox = Sandbox('bubblewrap', Limits(memory_mib={MEMORY}))\n"
        "sandbox.run('import time; time.sleep(60)', '', 60, 9)"
    )
    with user.process(script, stdout=subprocess.PIPE) as scoring:
        assert scoring.stdout is not None
        scoring.stdout.readline()
        while not left_over():
            time.sleep(0.01)
        scoring.kill()
    assert ended()


@pytest.mark.parametrize("alive", [True, False])
def test_nothing_runs_for_one_who_died_while_the_sandbox_was_set_up(alive: bool) -> None:
    """The moment that the test above finds only by chance: bwrap has not yet tied its first process to itself."""
    reader, writer = os.pipe()
    with module._file("print('ran')") as code:
        if not alive:
            os.close(writer)
        command = [sys.executable, "-c", module._INSIDE, "{}", str(reader), "program", str(code.fileno())]
        found = subprocess.run(command, pass_fds=[reader, code.fileno()], capture_output=True, check=True)
    os.close(reader)
    if alive:
        os.close(writer)
    assert found.stdout == (b"ran\n" if alive else b"")


def test_kill_9_of_the_process_that_scores_ends_what_runs_without_a_sandbox_and_what_that_started(
    tmp_path: Path,
) -> None:
    started = tmp_path / "started"
    code = (
        "import os, pathlib, subprocess, time\nother = subprocess.Popen(['sleep', '1000'])\n"
        f"pathlib.Path({str(started)!r}).write_text(f'{{os.getpid()}} {{other.pid}}.')\n"
        "time.sleep(60)"
    )
    script = (
        "from services.task_parts.sandbox import Limits, Sandbox\n"
        f"Sandbox('none', Limits(memory_mib={MEMORY})).run({code!r}, '', 60, 9)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as scoring:
        while not (started.exists() and started.read_text().endswith(".")):
            time.sleep(0.01)
        processes = [psutil.Process(int(pid)) for pid in started.read_text().rstrip(".").split()]
        scoring.kill()
    left = psutil.wait_procs(processes, timeout=10)[1]
    for each in left:
        each.kill()
    assert len(processes) == 2
    assert not left


# ---- hostile


def test_nothing_of_the_machine_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: User) -> None:
    monkeypatch.setenv("SAPO_TOKEN", "geheim")
    (tmp_path / "run.yaml").write_text("run: {}")
    files = [str(tmp_path / "run.yaml"), "/etc/passwd", str(Path.cwd() / "README.md"), str(Path(__file__))]
    assert seen(user, f"import os\nprint([path for path in {files} if os.path.exists(path)])") == "[]"
    # Of a home that holds Python, the way there is seen, and nothing beside it.
    outside = "import os\nprint(sorted(set(os.listdir('/')) - {'usr', 'lib', 'lib64', 'proc', 'dev', 'work'}))"
    prefix = Path(sys.base_prefix)
    assert seen(user, outside) in ("[]", f"['{prefix.parts[1]}']")
    others = "import os\nprint(len([each for each in os.listdir('/proc') if each.isdigit()]) <= 3, os.getuid() > 0)"
    assert seen(user, others) == "True True"
    environment = "import os\nprint(sorted(os.environ), b'geheim' in open('/proc/self/environ', 'rb').read())"
    assert seen(user, environment) == "['LC_CTYPE', 'PWD', 'PYTHONHASHSEED'] False"


def test_no_network_not_even_this_machines(user: User) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = (
            f"import socket\ntry:\n    socket.create_connection(('127.0.0.1', {port}), 1)\n"
            "except OSError as error:\n    print(type(error).__name__)"
        )
        assert seen(user, code) == "ConnectionRefusedError"
        assert seen(user, code.replace("127.0.0.1", "1.1.1.1")) == "OSError"
    assert seen(user, "import socket\nprint([name for _, name in socket.if_nameindex()])") == "['lo']"


@pytest.mark.parametrize(
    "place", ["/work", "/dev/shm", "/tmp", "/", "/dev", "/usr", "/proc", os.path.realpath(sys.base_prefix)]
)
def test_no_more_is_written_than_the_disk_that_it_has(place: str, user: User) -> None:
    code = (
        "import os\nwritten = 0\ntry:\n    for n in range(1000):\n"
        f"        with open('{place}/' + str(n), 'wb') as file:\n"
        "            written += file.write(bytes(1 << 20))\nexcept OSError as error:\n    pass\nprint(written >> 20)"
    )
    assert int(seen(user, code, disk_mib=8)) <= 8
    assert int(seen(user, code, disk_mib=8)) == 0 or place == "/work"


@pytest.mark.parametrize("name", BEYOND_LIMITS)
def test_limits_are_errors_of_the_program(name: str, user: User) -> None:
    told = (
        f"import os\ntry:\n{indented(BEYOND_LIMITS[name])}\n"
        "except (OSError, MemoryError):\n    print('refused', flush=True)\n    os._exit(0)\nprint('done')"
    )
    assert seen(user, told, disk_mib=8) == "refused"


@pytest.mark.parametrize("forgery", FORGERIES)
def test_success_cannot_be_forged(task: Callable[..., Code], forgery: str, user: User) -> None:
    assert worth(task(ADD, partial=True), FORGERIES[forgery], user) == {"correct": 0, "passed": 0}
    assert worth(task(SUM, partial=True), FORGERIES[forgery], user) == {"correct": 0, "passed": 0}
    assert ended()


def test_what_the_tests_measure_by_is_their_own() -> None:
    code = (
        "import math\nmath.sqrt = lambda x: 0\ndef f(x): return 0\ndef sorted(x): return 0\ndef abs(x): return 0\n"
        "def len(x): return 0\nclass AssertionError(Exception): pass\nimport os as operator\n"
    )
    tests = [
        "assert f([1]) == sorted([1])",
        "assert f(3) == abs(3)",
        "assert f('x') == len('x')",
        "assert f(4) == math.sqrt(4)",
    ]
    assert checked(code, *tests, "assert f(1) == operator.neg(0)") == [False] * 4 + [True]


# ---- where it cannot run, and what is wrong with a file


def test_without_bubblewrap_the_task_does_not_start(task: Callable[..., Code], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"bubblewrap is not installed .*sandbox: none"):
        task(ADD).ready()
    task(ADD, sandbox="none").ready()


def test_where_bubblewrap_fails_the_task_does_not_start(
    task: Callable[..., Code], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "bwrap"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    tool.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(module, "_unprivileged", dict)  # nobody may not look into tmp_path
    monkeypatch.setenv("PATH", f"{tool.parent}")
    with pytest.raises(ConfigError, match=r"No permissions to create new namespace .*sandbox: none"):
        task(ADD).ready()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"), ("[]", "valid dictionary"), ('{"prompt": "x"}', "tests: field required"),
        ('{"prompt": "x", "tests": []}', "tests"),
        ('{"prompt": "x", "tests": ["a", {"input": "", "output": ""}]}', "tests"),
        ('{"prompt": "", "tests": ["a"]}', "prompt"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_problem_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(f"{json.dumps(ADD)}\n\n{line}\n")
    with pytest.raises(ConfigError, match=rf"problems\.jsonl:3: .*{reason}"):
        Code(path=path).prompts("train")
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no problem in the file"):
        Code(path=path).prompts("train")
    with pytest.raises(ConfigError, match="not readable"):
        Code(path=tmp_path / "none").prompts("train")


def test_held_out_are_a_fraction_or_a_file_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({**ADD, "prompt": f"{n}"}) + "\n" for n in range(200)))
    whole = Code(path=path)
    train, held_out = ({each.content for each in whole.prompts(split)} for split in ("train", "held_out"))
    assert len(train) + len(held_out) == len(train | held_out) == 200
    assert 5 < len(held_out) < 40
    assert len(Code(path=path, held_out_path=path).prompts("held_out")) == 200
