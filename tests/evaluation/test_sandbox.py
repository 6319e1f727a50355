"""The interpreter that a model's tool calls reach: what they see, and what happens when they go wrong."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from numina_finetune.errors import ConfigError
from numina_finetune.evaluation.sandbox import Limits, Minimum, Outcome, Sandbox, require, run_all
from numina_finetune.evaluation.sandbox.inside import seccomp, syscalls
from numina_finetune.evaluation.sandbox.limits import truncated
from numina_finetune.evaluation.sandbox.sandbox import LAYERS, RESTARTED, _keeper
from tests.evaluation.tiers import missing as missing_here
from tests.evaluation.tiers import usable


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    usable(Minimum.ISOLATED)
    with Sandbox(Limits(wall_seconds=30)) as made:
        yield made


def outputs(sandbox: Sandbox, *rounds: str) -> list[str]:
    return [sandbox.run(code).output for code in rounds]


def test_names_imports_and_functions_live_on_to_the_next_round(sandbox: Sandbox) -> None:
    assert outputs(sandbox, "import math\ndef f(x): return x * k", "k = 3", "f(math.floor(2.5))") == ["", "", "6\n"]


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2\n"),
        ("x = 5", ""),
        ("None", ""),
        ("'text'", "'text'\n"),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("1\n2", "2\n"),
        ("for i in range(2): i", ""),
        (
            "from sympy import sqrt, symbols, Rational\nx = symbols('x')\n[sqrt(8), x**2 / 3, Rational(1, 3)]",
            "[2*sqrt(2), x**2/3, 1/3]\n",
        ),
        ("import numpy\nnumpy.sqrt(2.25)", "1.5\n"),
        ("1;", "1\n"),
        ("# nothing", ""),
        ("", ""),
        ("_", None),
    ],
)
def test_the_last_expression_is_echoed_as_its_repr(sandbox: Sandbox, code: str, output: str | None) -> None:
    execution = sandbox.run(code)
    assert execution.outcome is (Outcome.OK if output is not None else Outcome.ERROR)
    assert output is None or execution.output == output


def test_underscore_is_the_last_value(sandbox: Sandbox) -> None:
    assert outputs(sandbox, "6 * 7", "_ + 1") == ["42\n", "43\n"]


def test_what_is_printed_and_what_goes_to_stderr_come_in_their_order(sandbox: Sandbox) -> None:
    code = "import sys, warnings\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')\nwarnings.warn('d')\nprint('e')"
    a, b, c, d, *_, e = sandbox.run(code).output.splitlines()
    assert [a, b, c, e] == ["a", "b", "c", "e"] and "UserWarning: d" in d


def test_an_error_is_told_by_the_codes_own_frames_and_leaves_the_names(sandbox: Sandbox) -> None:
    first, second, third = (sandbox.run(code) for code in ("def f(x):\n    return 1 / x", "y = 1\nf(0)", "y"))
    assert second.outcome is Outcome.ERROR
    assert second.output == (
        "Traceback (most recent call last):\n"
        '  File "<cell 2>", line 2, in <module>\n    f(0)\n'
        '  File "<cell 1>", line 2, in f\n    return 1 / x\n'
        "ZeroDivisionError: division by zero\n"
    )
    assert (first.outcome, third.output) == (Outcome.OK, "1\n")


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("x = = 1", "SyntaxError: invalid syntax\n"),
        ("x = '", "SyntaxError: unterminated string literal (detected at line 1)\n"),
        ("a\0b", "SyntaxError: source code string cannot contain null bytes\n"),
        ("'\ud800'", "\n"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError: maximum recursion depth exceeded"),
        ("x = [0] * 10**12", "MemoryError\n"),
        ("import sys; sys.exit('no')", "SystemExit: no\n"),
        ("input()", "EOFError: EOF when reading a line\n"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt\n"),
    ],
)
def test_errors_of_every_kind_are_results(sandbox: Sandbox, code: str, end: str) -> None:
    execution = sandbox.run(code)
    assert execution.outcome in (Outcome.ERROR, Outcome.OK) and execution.output.endswith(end)
    assert sandbox.run("1 + 1").output == "2\n"


def test_exit_ends_the_round_and_not_the_interpreter(sandbox: Sandbox) -> None:
    assert outputs(sandbox, "import sys\nx = 1\nsys.exit()\nx = 2", "x") == ["", "1\n"]


def test_a_round_over_its_time_loses_the_interpreter_and_says_so() -> None:
    usable(Minimum.ISOLATED)
    with Sandbox(Limits(wall_seconds=1)) as sandbox:
        sandbox.run("x = 1")
        late = sandbox.run("print('so far')\nwhile True: pass")
        assert late.outcome is Outcome.TIMEOUT
        assert late.output == f"so far\nTimeoutError: it ran longer than 1 s. {RESTARTED}"
        assert "NameError" in sandbox.run("x").output


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os._exit(3)", "the interpreter ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "the interpreter was killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "the interpreter was killed by SIGSEGV"),
        ("while True: print('x' * 1000)", "it printed more than 1048576 bytes"),
    ],
)
def test_a_lost_interpreter_is_told_with_its_reason(sandbox: Sandbox, code: str, why: str) -> None:
    execution = sandbox.run(code)
    assert execution.outcome is Outcome.KILLED
    assert execution.output.endswith(f"Killed: {why}. {RESTARTED}")
    assert sandbox.run("1 + 1").output == "2\n"


def test_processor_time_is_limited_over_all_rounds() -> None:
    usable(Minimum.ISOLATED)
    with Sandbox(Limits(wall_seconds=60, cpu_seconds=1)) as sandbox:
        execution = sandbox.run("while True: pass")
    assert execution.outcome is Outcome.KILLED and "SIGKILL" in execution.output


@pytest.mark.parametrize(
    ("text", "limit", "keep_end", "kept"),
    [
        ("short", 200, False, "short"),
        ("x" * 200, 200, False, "x" * 200),
        ("x" * 201, 200, False, "x" * 200 + " ... (output truncated)"),
        ("x" * 201, None, False, "x" * 201),
        ("long " * 50 + "\nNameError: a\n", 10, True, "long long  ... (output truncated)\nNameError:"),
    ],
)
def test_results_are_cut_as_numinamaths_are(text: str, limit: int | None, keep_end: bool, kept: str) -> None:
    assert truncated(text, limit, keep_end=keep_end) == kept


def test_a_long_result_is_cut_but_its_error_stays(sandbox: Sandbox) -> None:
    assert sandbox.run("'x' * 1000").output == "'" + "x" * 199 + " ... (output truncated)"
    assert sandbox.run("print('x' * 1000)\nundefined").output.endswith("\nNameError: name 'undefined' is not defined")


def test_random_numbers_and_the_order_of_sets_are_the_same_in_every_sandbox() -> None:
    usable(Minimum.ISOLATED)
    code = "import random, numpy\nrandom.random(), numpy.random.rand(), {'a', 'b', 'c', 'd'}"
    with Sandbox() as one, Sandbox() as other:
        assert one.run(code).output == other.run(code).output


def test_files_can_be_written_in_the_private_folder_and_go_with_the_sandbox(sandbox: Sandbox) -> None:
    write = "import tempfile\nopen('a.txt', 'w').write('x' * 5)\ntempfile.NamedTemporaryFile().name[:8]"
    assert outputs(sandbox, write, "import os; os.listdir()") == ["'/sandbox'\n", "['a.txt']\n"]
    with Sandbox() as other:
        assert other.run("import os; os.listdir()").output == "[]\n"


def test_many_sandboxes_run_side_by_side_each_with_its_own_names() -> None:
    usable(Minimum.ISOLATED)
    sandboxes = [Sandbox() for _ in range(12)]
    found = run_all([(sandbox, [f"x = {number}", "x + 1"]) for number, sandbox in enumerate(sandboxes)], workers=4)
    for sandbox in sandboxes:
        sandbox.close()
    assert [[execution.output for execution in one] for one in found] == [["", f"{n + 1}\n"] for n in range(12)]


def test_sandboxes_go_on_after_the_keeper_has_died(sandbox: Sandbox) -> None:
    sandbox.run("x = 1")
    _keeper(LAYERS).close()
    lost = sandbox.run("x")
    assert lost.outcome is Outcome.KILLED and RESTARTED in lost.output
    assert sandbox.run("1 + 1").output == "2\n"


def test_a_machine_that_lets_others_have_namespaces_isolates_sandboxes_too() -> None:
    """Else a fault of the sandbox would look like a machine's lack, and every test of isolation be skipped."""
    kinds = ("--user", "--mount", "--pid", "--net", "--ipc", "--fork")
    if not shutil.which("unshare") or subprocess.run(["unshare", *kinds, "true"], check=False).returncode:
        pytest.skip("this machine gives no namespaces")
    assert not re.search("namespaces|could not be started", missing_here(Minimum.ISOLATED))


def test_too_little_protection_is_refused_and_what_is_missing_named() -> None:
    usable(Minimum.ISOLATED)
    for layers, minimum, missing in [
        (frozenset({"namespaces"}), Minimum.ISOLATED, "lacks seccomp"),
        (frozenset({"namespaces"}), Minimum.FILTERED, "lacks seccomp.*, landlock"),
    ]:
        with pytest.raises(ConfigError, match=f"(?s){missing}.*--sandbox-minimum {minimum}"):
            Sandbox(Limits(minimum=minimum), layers=layers)
    require(Minimum.NONE, frozenset({"namespaces"}))


@pytest.mark.parametrize("limit", ["wall_seconds", "memory", "output_chars"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} is 0"):
        Limits(**{limit: 0})


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_numbers_of_system_calls_are_the_kernels(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not here to compare with")
    text = Path(header).read_text()
    theirs = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    for name, other in re.findall(r"#define __NR_(\w+) __NR3264_(\w+)", text):
        if other in theirs:
            theirs.setdefault(name, theirs[other])
    for table in syscalls.numbers(machine):
        assert {name: theirs[name] for name in table} == table


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_of_the_filter_ends_in_a_verdict(machine: str) -> None:
    """As the kernel demands; the filter of the other architecture is never loaded here."""
    code = list(struct.iter_unpack("HBBI", seccomp.program(2, namespaces=True, machine=machine)))
    returns, jumps = 0x06, {0x15, 0x35, 0x45}
    for place, (kind, if_true, if_false, _) in enumerate(code):
        if kind in jumps:
            assert place + 1 + max(if_true, if_false) < len(code)
    assert code[-1][0] == returns and len(code) < 4096
