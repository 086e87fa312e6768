"""Files of strangers are read without running anything in them; output is whole or not there."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.convert.errors import ConversionError
from trainer.convert.files import load_tensors, map_array, save_tensors, written_beside


class Trap:
    """Pickled, it makes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def array_file(path: Path, value: Any) -> None:
    with path.open("wb") as handle:
        np.save(handle, np.array([value], dtype=object), allow_pickle=True)


def test_a_trap_works_where_nobody_cares(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    pickle.load(io.BytesIO(pickle.dumps(Trap(tmp_path / "sprung"))))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_a_checkpoint_with_code_is_refused_and_not_run(
    tmp_path: Path, name: str, new_format: bool
) -> None:
    state = {"weight": torch.ones(2), "trap": Trap(tmp_path / "sprung")}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ConversionError) as caught:
        load_tensors(tmp_path / name)
    told = str(caught.value)
    assert str(tmp_path / name) in told
    assert "Nothing of it was run" in told
    assert "\n" not in told
    assert not (tmp_path / "sprung").exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ConversionError, match=r"ckpt\.pt"):
        load_tensors(tmp_path / "ckpt.pt")
    assert not (tmp_path / "sprung").exists()


class Call:
    """Pickled, it asks for a function."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.function, self.given = function, given

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.given


class Custom:
    """An object that a file may hold, of a class that the reader need not have."""


def refused(path: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        load_tensors(path)
    told = str(caught.value)
    assert str(path) in told
    for advice in ("weights_only", "Re-running", "add_safe_globals", "\n", "\x1b"):
        assert advice not in told
    return told


CODE: dict[str, tuple[Any, str]] = {
    "os.system": (Call(os.system, "touch sprung"), f"{os.name}.system"),
    "subprocess.Popen": (Call(subprocess.Popen, ["touch", "sprung"]), "subprocess.Popen"),
    "builtins.eval": (Call(eval, "open('sprung', 'w')"), "builtins.eval"),
    "a custom class": (Custom(), f"{__name__}.Custom"),
    "a whole model": (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("kind", ["zip", "old", "pickle 0", "pickle 2", "pickle 4"])
@pytest.mark.parametrize("which", CODE)
def test_code_is_named_never_run_and_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    evil, name = CODE[which]
    path = tmp_path / "evil.pt"
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps({"trap": evil}, protocol=int(kind[-1])))
    else:
        state = {"weight": torch.ones(2), "trap": evil}
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    told = refused(path)
    assert "holds code" in told
    assert name in told
    assert "Nothing of it was run" in told
    assert "safetensors" in told
    assert "torch.save(model.state_dict(), ...)" in told
    assert "damaged" not in told
    assert not (tmp_path / "sprung").exists()


def test_code_before_damage_is_still_named(tmp_path: Path) -> None:
    whole = pickle.dumps(CODE["os.system"][0], protocol=2)
    (tmp_path / "evil.pt").write_bytes(whole[:-1] + b"\xff")
    assert "holds code" in refused(tmp_path / "evil.pt")


def test_a_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(b"\x80\x02cos\n\x1b[2Jsystem\n.")
    assert "os.?[2Jsystem" in refused(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        b"\x80\x02garbage",
        b"config\nfoo\n",
        b"hello world\n",
        b"\x80\x02Mx",
        b"\x00" * 100,
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_garbage_is_no_checkpoint_and_holds_no_code(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ckpt.pt").write_bytes(content)
    told = refused(tmp_path / "ckpt.pt")
    assert "is not a checkpoint" in told
    assert "code" not in told


def test_an_empty_file_and_one_that_is_cut_off_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.touch()
    assert "is empty" in refused(path)
    for new_format in (True, False):
        torch.save({"w": torch.ones(999)}, path, _use_new_zipfile_serialization=new_format)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        told = refused(path)
        assert "is damaged" in told
        assert "code" not in told


def test_plain_tensors_by_another_protocol_are_not_called_code(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "ckpt.pt", pickle_protocol=4)
    told = refused(tmp_path / "ckpt.pt")
    assert "default protocol" in told
    assert "code" not in told


def test_an_array_of_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    array_file(tmp_path / "objects.npy", Trap(tmp_path / "sprung"))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for name in ("objects.npy", "pickle.npy"):
        with pytest.raises(ConversionError, match=rf"{name} holds Python objects"):
            map_array(tmp_path / name)
    np.savez(tmp_path / "many.npz", a=np.ones(2))
    with pytest.raises(ConversionError, match="several arrays"):
        map_array(tmp_path / "many.npz")
    assert not (tmp_path / "sprung").exists()


def test_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 2), dtype=np.float16))
    assert isinstance(map_array(tmp_path / "a.npy"), np.memmap)


def test_tensors_that_share_memory_are_saved_each(tmp_path: Path) -> None:
    one = torch.randn(4, 3)
    save_tensors(tmp_path / "a.safetensors", {"one": one, "same": one, "part": one[1:, :2]})
    back = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(back["same"], one)
    assert torch.equal(back["part"], one[1:, :2])


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with written_beside(tmp_path / "deep" / "out") as directory:
            (directory / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list((tmp_path / "deep").iterdir())
