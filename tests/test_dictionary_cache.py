"""Dictionaries on disk: found again, never wrong, and no reason for a scan to fail."""

import errno
import hashlib
import io
import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quantitron.gadgets import dictionary_cache as module
from quantitron.gadgets.dictionary_cache import cache_folder, cached_dictionary
from quantitron.recon.data import FingerprintDictionary, Protocol
from quantitron.recon.signal.fingerprint_dictionary import fingerprint_dictionary

POINTS = 40
PROTOCOL = Protocol(
    "fisp_mrf",
    (0.002,),
    (0.012,),
    tuple(0.1 + abs(math.sin(0.1 * pulse)) for pulse in range(POINTS)),
    inversion_time=(0.02,),
)
SMALL = {"t1_points": 12, "t2_points": 13}


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, logger="quantitron")


def _cached(folder, protocol=PROTOCOL, **settings):
    return cached_dictionary(protocol, folder=folder, **{**SMALL, **settings})


def _only_file(folder):
    (file,) = folder.iterdir()
    assert file.suffix == ".npz"
    return file


def _assert_same(one, other):
    for entry in fields(FingerprintDictionary):
        assert torch.equal(getattr(one, entry.name), getattr(other, entry.name)), entry.name


def _never(*arguments, **settings):
    raise AssertionError("simulated, although the dictionary is kept")


def test_the_second_time_comes_from_the_disk_and_is_the_same(tmp_path, caplog, monkeypatch):
    folder = tmp_path / "deep" / "cache"
    first = _cached(folder)
    _assert_same(first, fingerprint_dictionary(PROTOCOL, **SMALL))
    atoms = int(first.plausible.sum())
    assert f"dictionary of {atoms} atoms x {POINTS} points" in caplog.text
    assert "simulated in" in caplog.text
    assert str(tmp_path) not in caplog.text
    caplog.clear()
    monkeypatch.setattr(module.fingerprint_dictionary, "fingerprint_dictionary", _never)
    _assert_same(_cached(folder), first)
    assert "taken from the cache" in caplog.text
    assert "simulated" not in caplog.text
    assert len(_only_file(folder).stem) == 64


def test_complex_dictionaries_are_kept_too(tmp_path, monkeypatch):
    protocol = replace(PROTOCOL, rf_phase=tuple(0.1 * pulse**2 for pulse in range(POINTS)))
    first = _cached(tmp_path, protocol)
    assert first.axes.is_complex()
    monkeypatch.setattr(module.fingerprint_dictionary, "fingerprint_dictionary", _never)
    _assert_same(_cached(tmp_path, protocol), first)


def test_all_that_a_dictionary_depends_on_is_in_its_name(tmp_path, monkeypatch):
    nudged = (PROTOCOL.flip_angle[0] * (1 + 1e-15), *PROTOCOL.flip_angle[1:])
    protocols = [
        PROTOCOL,
        replace(PROTOCOL, flip_angle=nudged),
        replace(PROTOCOL, repetition_time=(0.013,)),
        replace(PROTOCOL, echo_time=(0.003,)),
        replace(PROTOCOL, inversion_time=(0.03,)),
        replace(PROTOCOL, inversion_time=()),
        replace(PROTOCOL, inversion_efficiency=0.9),
        replace(PROTOCOL, rf_phase=tuple(math.pi * (pulse % 2) for pulse in range(POINTS))),
    ]
    assert nudged[0] != PROTOCOL.flip_angle[0]
    for protocol in protocols:
        _cached(tmp_path, protocol)
    grids = [
        {"t1_range": (0.02, 6.0)},
        {"t2_range": (0.005, 3.0)},
        {"t1_points": 14},
        {"t2_points": 14},
        {"b1": (0.9, 1.0)},
    ]
    for settings in grids:
        _cached(tmp_path, **settings)
    assert len(list(tmp_path.iterdir())) == len(protocols) + len(grids)
    # Another simulator gives other files; what a fingerprint does not depend on, and 1 for unknown, do not.
    _cached(tmp_path, replace(PROTOCOL, field_strength=3.0, inversion_efficiency=1.0))
    assert len(list(tmp_path.iterdir())) == len(protocols) + len(grids)
    other = tmp_path / "fisp_mrf.py"
    other.write_bytes(Path(module.fisp_mrf.__file__).read_bytes() + b"\n# changed")
    before = module._key(PROTOCOL, [])
    monkeypatch.setattr(module.fisp_mrf, "__file__", str(other))
    assert module._key(PROTOCOL, []) != before


@pytest.mark.parametrize("damage", ["cut", "emptied", "one byte", "head", "tail", "text"])
def test_damaged_files_are_found_out_and_replaced(tmp_path, caplog, damage):
    first = _cached(tmp_path)
    file = _only_file(tmp_path)
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(
        {
            "cut": whole[:middle],
            "emptied": b"",
            "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "head": bytes([whole[0] ^ 255]) + whole[1:],
            "tail": whole[:-1] + bytes([whole[-1] ^ 255]),
            "text": b"not a dictionary at all, but longer than a digest would be",
        }[damage]
    )
    caplog.clear()
    _assert_same(_cached(tmp_path), first)
    assert "is damaged, it is simulated anew" in caplog.text
    assert _only_file(tmp_path).read_bytes() == whole
    caplog.clear()
    _cached(tmp_path)
    assert "damaged" not in caplog.text


def _put_down(file, arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    payload = buffer.getvalue()
    file.write_bytes(payload + hashlib.sha256(payload).digest())


def test_files_of_other_sizes_or_kinds_are_found_out(tmp_path, caplog):
    first = _cached(tmp_path)
    file = _only_file(tmp_path)
    with np.load(io.BytesIO(file.read_bytes()[:-32])) as archive:
        right = dict(archive)
    wrong = [
        {**right, "t1": right["t1"][:-1]},
        {**right, "coefficients": right["coefficients"][..., :-1]},
        {**right, "axes": right["axes"][:-1]},
        {**right, "axes": right["axes"].astype(np.float64)},
        {**right, "coefficients": right["coefficients"].astype(np.complex64)},
        {**right, "variance": right["variance"][:, None]},
        {**right, "t2": right["t2"] * np.nan},
    ]
    for arrays in wrong:
        _put_down(file, arrays)
        caplog.clear()
        _assert_same(_cached(tmp_path), first)
        assert "is of another size or kind" in caplog.text
    _put_down(file, {name: array for name, array in right.items() if name != "b1"})
    caplog.clear()
    _assert_same(_cached(tmp_path), first)
    assert "cannot be read" in caplog.text
    payload = b"no archive"
    file.write_bytes(payload + hashlib.sha256(payload).digest())
    caplog.clear()
    _assert_same(_cached(tmp_path), first)
    assert "cannot be read" in caplog.text


def test_objects_are_never_unpickled(tmp_path, caplog):
    first = _cached(tmp_path)
    file = _only_file(tmp_path)
    arrays = {entry.name: np.array([{}], dtype=object) for entry in fields(FingerprintDictionary)}
    _put_down(file, arrays)
    _assert_same(_cached(tmp_path), first)
    assert "cannot be read" in caplog.text


def test_a_folder_that_cannot_be_made_is_no_failure(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    found = _cached(tmp_path / "file" / "cache")
    _assert_same(found, fingerprint_dictionary(PROTOCOL, **SMALL))
    assert "the dictionary cannot be kept" in caplog.text


def test_a_full_disk_is_no_failure_and_leaves_nothing_behind(tmp_path, caplog, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    _cached(tmp_path)
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_what_is_kept_where_nothing_can_be_written_is_read(tmp_path, caplog, monkeypatch, number):
    """A folder of a site, mounted read-only or another user's: its dictionaries serve every scan."""
    first = _cached(tmp_path)

    def refused(*arguments, **named):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.os, "utime", refused)
    monkeypatch.setattr(module.fingerprint_dictionary, "fingerprint_dictionary", _never)
    caplog.clear()
    _assert_same(_cached(tmp_path), first)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_files_of_killed_writers_are_removed_and_those_of_others_left(tmp_path):
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    _cached(tmp_path)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".npz", ".part"]
    assert new.exists()


def _kept(folder, number, age, size=1000):
    """A file like a dictionary's, last used ``age`` seconds ago."""
    file = folder / f"{number:064x}.npz"
    file.write_bytes(bytes(size))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_the_cache_keeps_what_was_used_last(tmp_path, caplog, monkeypatch):
    """Beyond the limit the others go, but nothing that is in use or not a dictionary of ours."""
    first = _cached(tmp_path)
    whole = _only_file(tmp_path).stat().st_size
    _cached(tmp_path.with_name("elsewhere"), b1=(1.1,))
    second = _only_file(tmp_path.with_name("elsewhere")).stat().st_size
    monkeypatch.setenv("QUANTITRON_CACHE_SIZE", repr((whole + second + 2500) / 1e9))
    os.utime(_only_file(tmp_path), (time.time() - 7200,) * 2)
    _assert_same(_cached(tmp_path), first)  # used again: now the newest
    old, older, recent = (_kept(tmp_path, n, age) for n, age in ((1, 300), (2, 400), (3, 100)))
    others = [tmp_path / "scan.npz", tmp_path / "notes.txt"]
    for other in others:
        other.write_bytes(bytes(10 * whole))
        os.utime(other, (1e9, 1e9))
    with older.open("rb") as opened:
        _cached(tmp_path, b1=(1.1,))
        assert not older.exists()
        assert len(opened.read()) == 1000  # whoever was reading goes on
    assert all(other.exists() for other in (old, recent, *others))
    assert "was removed" in caplog.text
    monkeypatch.setattr(module.fingerprint_dictionary, "fingerprint_dictionary", _never)
    _assert_same(_cached(tmp_path), first)


def test_what_was_used_just_now_stays_whatever_the_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTITRON_CACHE_SIZE", "0")
    new, old = _kept(tmp_path, 1, 10), _kept(tmp_path, 2, 1000)
    _cached(tmp_path)
    assert new.exists()
    assert not old.exists()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("given", ["plenty", "-1", "nan"])
def test_a_size_that_is_none_is_said(monkeypatch, caplog, given):
    monkeypatch.setenv("QUANTITRON_CACHE_SIZE", given)
    assert module.cache_size() == 4e9
    assert f"QUANTITRON_CACHE_SIZE is '{given}', no number of GB" in caplog.text
    monkeypatch.setenv("QUANTITRON_CACHE_SIZE", "0.5")
    assert module.cache_size() == 5e8


def test_a_file_that_cannot_be_read_is_no_failure(tmp_path, caplog):
    _cached(tmp_path)
    file = _only_file(tmp_path)
    file.unlink()
    file.mkdir()  # reading it and renaming onto it both fail
    found = _cached(tmp_path)
    _assert_same(found, fingerprint_dictionary(PROTOCOL, **SMALL))
    assert "cannot be read" in caplog.text
    assert "cannot be kept" in caplog.text
    assert list(tmp_path.iterdir()) == [file]


def test_processes_that_write_the_same_file_do_not_harm_it(tmp_path):
    script = f"""
import sys
from pathlib import Path
from quantitron.gadgets.dictionary_cache import cached_dictionary
from quantitron.recon.data import Protocol
protocol = Protocol("fisp_mrf", (0.002,), (0.012,), {PROTOCOL.flip_angle!r}, inversion_time=(0.02,))
folder = Path(sys.argv[1])
sys.stdin.readline()
for _ in range(15):
    found = cached_dictionary(protocol, t1_points=12, t2_points=13, folder=folder)
    assert found.coefficients.abs().sum() > 0
    for file in folder.glob("*.npz"):
        file.unlink(missing_ok=True)
cached_dictionary(protocol, t1_points=12, t2_points=13, folder=folder)
"""
    # Each keeps deleting what it has read, so that both simulate, write and read all the time.
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in running:
        _, complaints = process.communicate(timeout=120)
        assert process.returncode == 0, complaints
        assert "damaged" not in complaints
    assert [file.suffix for file in tmp_path.iterdir()] in ([".npz"], [])
    _assert_same(_cached(tmp_path), fingerprint_dictionary(PROTOCOL, **SMALL))


def test_folder_of_the_environment_or_of_the_user(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("QUANTITRON_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    cached_dictionary(PROTOCOL, **SMALL)
    assert _only_file(tmp_path / "here")
    monkeypatch.setenv("QUANTITRON_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "quantitron"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "quantitron"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
    cached_dictionary(PROTOCOL, **SMALL)
    assert "dictionaries are not kept" in caplog.text


def test_bad_grids_and_protocols_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least 2 points of T1"):
        _cached(tmp_path, t1_points=1)
    with pytest.raises(ValueError, match="40 flip angles but 2 repetition times"):
        _cached(tmp_path, replace(PROTOCOL, repetition_time=(0.01, 0.02)))
    assert not list(tmp_path.iterdir())
