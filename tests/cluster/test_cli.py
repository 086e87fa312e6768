"""The command itself: its map, its help, its refusals, and what an error looks like."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from cluster.cli import main
from cluster.cli.command import Command
from cluster.cli.registry import COMMANDS
from memory_server.errors import StoreDamaged
from trainer.corpus.errors import CorpusError
from trainer.errors import TrainingError

Capture = pytest.CaptureFixture[str]
NAMES = [command.name for command in COMMANDS]


@pytest.fixture
def quickstart_does(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    """Put a stand-in for the quickstart where the command looks for it."""

    def put(work: Callable[..., int]) -> None:
        module = ModuleType("cluster.quickstart")
        module.quickstart = work  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cluster.quickstart", module)

    return put


def failing(error: BaseException) -> Callable[..., int]:
    def work(**_: object) -> int:
        raise error

    return work


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--traceback", "--help"]])
def test_the_map_names_every_command_in_order(words: list[str], capsys: Capture) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"\n  {name} ") for name in NAMES]
    assert places == sorted(places)


@pytest.mark.parametrize("name", NAMES)
def test_every_commands_help_shows_an_example_of_itself(name: str, capsys: Capture) -> None:
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    usage, _, example = shown.partition("\nexample:\n")
    assert usage.startswith(f"usage: pluglm {name}")
    assert example.startswith(f"  pluglm {name}")


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_every_example_is_a_command_line_that_parses(command: Command) -> None:
    for line in command.example.strip().splitlines():
        words = shlex.split(line)
        assert words[: 1 + len(command.name.split())] == ["pluglm", *command.name.split()]
        command.parser().parse_intermixed_args(words[1 + len(command.name.split()) :])


def test_a_groups_help_is_a_map_of_the_group(capsys: Capture) -> None:
    assert main(["memory", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "memory info" in shown
    assert "memory search" in shown
    assert "pretrain" not in shown


def test_the_version_is_told(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pluglm ")


def test_help_loads_nothing_heavy() -> None:
    """So that it answers at once."""
    code = (
        "import sys; from cluster.cli import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'numpy', 'pyarrow'};"
        "heavy &= set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "pluglm quickstart" in ran.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["corpsu"], "did you mean `pluglm corpus`?"),
        (["zzz"], "give one of quickstart, corpus, doctor, calibrate, plan, pretrain, "),
        (["corpus"], "give one of build, info"),
        (["memory", "serch"], "memory serch: no such command; give one of info, search"),
        (["corpus", "build"], "required: --out"),
        (["corpus", "build", "--out", "x"], "required: SOURCE"),
        (["corpus", "build", "a.txt", "--out", "x", "--workers", "0"], "'0' is not a whole number"),
        (["corpus", "build", "a.txt", "--out", "x", "--heldout", "1"], "unrecognized arguments"),
        (["corpus", "build", "/no/such.txt", "--out", "x"], "there is no file or directory"),
        (["corpus", "info", "/no/corpus"], "there is no corpus at /no/corpus"),
        (["pretrain"], "required: CONFIG.toml"),
        (["pretrain", "/no/such.toml"], "/no/such.toml: no such file"),
        (["memory", "info", "/no/store"], "there is no /no/store"),
        (["memory", "search", "/no/store", "x"], "there is no /no/store"),
        (["memory", "search", "x", "y", "-k", "many"], "'many' is not a whole number"),
        (["evaluate"], "give a RUN_DIR, or both --model and --corpus"),
        (["evaluate", "--model", "x"], "both --model and --corpus"),
        (["evaluate", "/no/run"], "/no/run is no run directory"),
        (["evaluate", "--model", "x", "--corpus", "/no"], "there is no corpus at /no"),
        (["report", "/no/run"], "/no/run is no run directory"),
        (["quickstart", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], said: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pluglm: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CorpusError("no text\nat all"), 2, "no text at all"),
        (StoreDamaged("a.arrow was altered"), 1, "a.arrow was altered"),
        (TrainingError("the loss is nan"), 1, "the loss is nan"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.txt"), 2, "x.txt: no such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "no space left on device"),
        (ZeroDivisionError("by zero"), 1, "unexpected ZeroDivisionError: by zero"),
        (KeyError(), 1, "unexpected KeyError ("),
    ],
)
def test_whatever_goes_wrong_is_one_line(
    quickstart_does: Callable[[Callable[..., int]], None],
    capsys: Capture,
    error: Exception,
    code: int,
    line: str,
) -> None:
    quickstart_does(failing(error))
    assert main(["quickstart"]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"pluglm: error: {line}")
    assert err.count("\n") == 1
    assert ("--traceback" in err) == line.startswith("unexpected")


def test_a_librarys_value_error_is_not_taken_for_the_users_mistake(
    quickstart_does: Callable[[Callable[..., int]], None], capsys: Capture
) -> None:
    def work(**_: object) -> int:
        import json

        json.loads("{")
        return 0

    quickstart_does(work)
    assert main(["quickstart"]) == 1
    assert "unexpected JSONDecodeError" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--traceback", "quickstart"], ["quickstart", "--traceback"]])
def test_the_traceback_is_shown_when_asked_for(
    quickstart_does: Callable[[Callable[..., int]], None], capsys: Capture, words: list[str]
) -> None:
    quickstart_does(failing(ZeroDivisionError("by zero")))
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("pluglm: error: ")


def test_ctrl_c_is_130(
    quickstart_does: Callable[[Callable[..., int]], None], capsys: Capture
) -> None:
    quickstart_does(failing(KeyboardInterrupt()))
    assert main(["quickstart"]) == 130
    err = capsys.readouterr().err
    assert err.startswith("pluglm: error: interrupted; ")
    assert err.count("\n") == 1


def test_sigterm_unwinds_and_is_143(
    quickstart_does: Callable[[Callable[..., int]], None], capsys: Capture
) -> None:
    unwound = []

    def work(**_: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            unwound.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    quickstart_does(work)
    assert main(["quickstart"]) == 143
    assert unwound == [True]
    assert "ended by SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_pipe_ends_quietly() -> None:
    """As in `pluglm memory search ... --json | head -1`."""
    code = "import sys; from cluster.cli import main; sys.exit(main(['--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    root = Path(__file__).parents[2]
    with os.fdopen(writer, "wb") as stdout:
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=root, stdout=stdout, stderr=subprocess.PIPE
        )
    assert ran.returncode == 141
    assert ran.stderr == b""


def test_quickstart_hands_on_its_arguments(
    quickstart_does: Callable[[Callable[..., int]], None],
) -> None:
    seen: list[dict[str, object]] = []

    def work(**given: object) -> int:
        seen.append(given)
        return 7

    quickstart_does(work)
    assert main(["quickstart", "--seed", "3", "--set", "a.b=1", "--set", "c.d=2"]) == 7
    assert main(["quickstart", "--synthetic"]) == 7
    assert seen[0] == {
        "directory": Path("runs/quickstart"),
        "synthetic": False,
        "seed": 3,
        "overrides": ["a.b=1", "c.d=2"],
    }
    assert seen[1]["synthetic"] is True
    assert seen[1]["directory"] == Path("runs/synthetic")
