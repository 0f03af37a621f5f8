import os
from pathlib import Path

import pytest
import torch

from limbeck.errors import UserError
from limbeck.training.checkpoint import Checkpoints, read_state, write_atomically, write_state


def failing(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(*((os, "fsync") if broken == "fsync" else (Path, "replace")), failing)
    with pytest.raises(UserError, match=r"file cannot be written: no space left on device; free"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_on_the_way_but_not_below_a_file(tmp_path):
    write_atomically(tmp_path / "a" / "b", b"x")
    assert (tmp_path / "a" / "b").read_bytes() == b"x"
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path / "a" / "b" / "c", b"x")


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = {
        "tensors": [torch.arange(5), torch.rand(2, 3, dtype=torch.float64)],
        "plain": {"text": "é", "number": 0.1, "none": None, "flag": True},
    }
    write_state(tmp_path / "s", state)
    found = read_state(tmp_path / "s")
    assert found["plain"] == state["plain"]
    for one, other in zip(found["tensors"], state["tensors"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_any_changed_byte_and_any_cut_is_noticed(tmp_path):
    path = tmp_path / "s"
    write_state(path, {"w": torch.zeros(3)})
    whole = path.read_bytes()
    for place in (0, 7, 8, 39, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="is damaged: its checksum"):
            read_state(path)
    for length in (0, 8, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            read_state(path)
    with pytest.raises(UserError, match="nothing cannot be read: no such file"):
        read_state(tmp_path / "nothing")


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_in_a_state_is_executed_even_with_a_right_checksum(tmp_path):
    write_state(tmp_path / "s", {"w": Canary(tmp_path / "canary")})
    with pytest.raises(UserError, match=r"s is refused: it holds more than tensors and plain"):
        read_state(tmp_path / "s")
    assert not (tmp_path / "canary").exists()


def test_the_last_two_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.newest() is None
    for number in range(12):
        checkpoints.write({"n": number})
        assert checkpoints.newest() == {"n": number}
    assert [p.name for p in checkpoints.paths()] == ["000010.ckpt", "000011.ckpt"]
    (tmp_path / "c" / "other.ckpt").write_text("not one of ours")
    checkpoints.clear()
    assert checkpoints.newest() is None
    assert (tmp_path / "c" / "other.ckpt").exists()


def test_the_order_of_checkpoints_is_that_of_their_numbers(tmp_path):
    for number in (999999, 1000000):
        write_state(tmp_path / f"{number:06d}.ckpt", {"n": number})
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() == {"n": 1000000}
    assert checkpoints.write({"n": 1}).name == "1000001.ckpt"


def test_a_half_written_checkpoint_is_skipped_and_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write({"n": 1})
    cut = checkpoints.write({"n": 2})
    cut.write_bytes(cut.read_bytes()[:-1])
    assert checkpoints.newest() == {"n": 1}
    assert checkpoints.skipped == [f"{cut} is damaged: its checksum does not match its content"]


def test_a_full_disk_costs_no_checkpoint_that_was_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        checkpoints.write({"n": number})
    before = checkpoints.paths()
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="no space"):
        checkpoints.write({"n": 3})
    assert checkpoints.paths() == before
    assert checkpoints.newest() == {"n": 2}


def test_a_checkpoint_of_something_else_is_skipped_and_named(tmp_path):
    ours, theirs = (Checkpoints(tmp_path / n, key=n.encode) for n in ("ours", "theirs"))
    ours.write({"n": 1})
    foreign = theirs.write({"n": 2}).rename(tmp_path / "ours" / "000009.ckpt")
    assert ours.newest() == {"n": 1}
    assert ours.skipped == [
        f"{foreign} was written under another recipe than recipe.yaml, or in another place"
    ]


@pytest.mark.parametrize("place", ["folder", "pipe", "code", "loop"])
def test_what_is_no_checkpoint_is_skipped_and_not_waited_for(tmp_path, place):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write({"n": 1})
    newest = tmp_path / "000009.ckpt"
    if place == "folder":
        newest.mkdir()
    elif place == "pipe":
        os.mkfifo(newest)
    elif place == "loop":
        newest.symlink_to(newest)
    else:
        write_state(newest, {"n": Canary(tmp_path / "canary")})
    assert checkpoints.newest() == {"n": 1}
    assert not (tmp_path / "canary").exists()
    checkpoints.clear()
    assert checkpoints.newest() is None
