"""The wheel, built from the committed state and used where no checkout is: seconds and size.

`pip wheel . --no-deps --no-build-isolation` in a clone, `pip install --no-deps` into a fresh
virtual environment, and there `pluglm --help` and `pluglm pretrain CONFIG --check` with the
configurations of the wheel. The packages that PlugLM needs are not installed again: the environment
that runs this lends them through a .pth file, which does not lend its editable install of the
checkout. (A virtual environment made with --system-site-packages inside another one sees the
packages of the Python below both, so that alone would not do.)
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from harness import REPOSITORY, argument_parser, begin, finish, note, seconds, table


def _run(command: Sequence[str | Path], *, cwd: Path) -> str:
    """What a command prints, run as by someone who has no checkout on the path.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{' '.join(map(str, command))}: ended with {done.returncode}\n{last}")
    return done.stdout


def build(home: Path) -> Path:
    """Build the wheel from a clone in `home`; returns its path."""
    checkout, wheels = home / "checkout", home / "wheels"
    _run(["git", "clone", "--quiet", "--no-local", REPOSITORY, checkout], cwd=home)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "."]
    _run([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", wheels], cwd=checkout)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def install(wheel: Path, place: Path) -> Path:
    """Install the wheel into a fresh environment at `place`; returns its `pluglm`."""
    venv.create(place, system_site_packages=True, with_pip=True)
    # Lent only afterwards: pip would otherwise take the lender's pluglm for this one.
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    pip = [programs / "python", "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    _run([*pip, wheel], cwd=place)
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    where = [programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(_run(where, cwd=place).strip())
    (site / "lent.pth").write_text("\n".join(sorted(lent)) + "\n", encoding="utf-8")
    return programs / "pluglm"


_PRESETS = ("one-gpu", "pluglm-base", "pluglm-base-1b", "quickstart", "synthetic")
_IMPORTED = """
import cluster, memory_server, model, trainer
for package in (cluster, memory_server, model, trainer):
    print(package.__file__)
"""


def use(pluglm: Path, away: Path) -> Mapping[str, float]:
    """Seconds of each command, run in the empty directory `away`.

    Raises:
        RuntimeError: a command failed, or ran what is not the wheel's.
    """
    place = pluglm.parents[1]
    lines = _run([pluglm.with_name("python"), "-c", _IMPORTED], cwd=away).splitlines()
    packages = [Path(line).parent for line in lines]
    strange = [str(package) for package in packages if place not in package.parents]
    if strange:
        raise RuntimeError(f"imported from elsewhere than {place}: {', '.join(strange)}")
    untyped = [package.name for package in packages if not (package / "py.typed").is_file()]
    configs = packages[0] / "configs"
    absent = {path.name for path in (REPOSITORY / "configs").glob("*.toml")} - {
        path.name for path in configs.glob("*.toml")
    }
    if untyped or absent:
        raise RuntimeError(
            f"the wheel lacks py.typed of {untyped}, configurations {sorted(absent)}"
        )

    took = {"pluglm --help": seconds(lambda: _run([pluglm, "--help"], cwd=away))}
    for name in _PRESETS:
        command = [pluglm, "pretrain", configs / f"{name}.toml", "--check"]
        took[f"pluglm pretrain {name}.toml --check"] = seconds(partial(_run, command, cwd=away))
    return took


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    facts = begin()
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        away = home / "away"
        away.mkdir()
        note("building the wheel ...")
        began = time.perf_counter()
        wheel = build(home)
        took["clone, pip wheel"] = time.perf_counter() - began
        size = wheel.stat().st_size
        note("installing it ...")
        began = time.perf_counter()
        pluglm = install(wheel, home / "fresh")
        took["fresh environment, pip install"] = time.perf_counter() - began
        took.update(use(pluglm, away))
    print(table(["step", "seconds"], [[name, f"{value:.1f}"] for name, value in took.items()]))
    print(f"\n{wheel.name}: {size / 1024:,.0f} KiB")
    finish(args.json, facts, args, {"wheel": wheel.name, "bytes": size, "seconds": took})


if __name__ == "__main__":
    main()
