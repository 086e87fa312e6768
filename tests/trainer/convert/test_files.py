"""Files of strangers are read without running anything in them; output is whole or not there."""

from __future__ import annotations

import io
import pickle
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
    assert "so it was not opened" in told
    assert "\n" not in told
    assert not (tmp_path / "sprung").exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ConversionError, match=r"ckpt\.pt"):
        load_tensors(tmp_path / "ckpt.pt")
    assert not (tmp_path / "sprung").exists()


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
