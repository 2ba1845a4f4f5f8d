"""A checkpoint is whole or it is not there, and what is in it is what was saved."""

import dataclasses
import json
import os
import random
import shutil
import signal
import stat
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from minisft.config import CheckpointConfig, Config
from minisft.errors import UserError
from minisft.runs import resume
from minisft.training import checkpoint, parallel
from minisft.training.checkpoint import SavedState, Saver, saved_checkpoints, step_of
from minisft.training.optimizer import AdamW


@pytest.fixture(scope="module")
def world():
    world = parallel.start()
    yield world
    parallel.stop()


def trained_optimizer(world, seed=0, steps=3):
    """An optimiser with moments that are not zero."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3, bias=False))
    optimizer = AdamW(model, mesh=world.mesh)
    for number in range(steps):
        optimizer.begin(0.1, number)
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.clip(1.0)
        optimizer.step()
    return optimizer


def state(optimizer):
    moments = [tensor for moment in ("exp_avg", "exp_avg_sq") for tensor in optimizer.moments(moment).values()]
    return [tensor.detach().clone() for tensor in (*optimizer.rows.values(), *moments)]


def save(folder, world, step=3, keep=0, optimizer=None):
    optimizer = optimizer or trained_optimizer(world)
    saver = Saver(folder, world, keep=keep)
    saver.save(step, optimizer, {"adam_steps": optimizer.steps(), "fingerprint": {"data": "a"}})
    saver.finish()
    return optimizer


def test_what_comes_back_is_what_was_saved(tmp_path, world):
    optimizer = save(tmp_path, world)
    before, draws = state(optimizer), torch.rand(3)
    other = trained_optimizer(world, seed=1, steps=7)
    save_time_state = SavedState(tmp_path / "step-000003")
    save_time_state.verify()
    save_time_state.restore(other, world)
    assert all(torch.equal(a, b) for a, b in zip(state(other), before, strict=True))
    assert other.steps() == 3
    assert torch.equal(torch.rand(3), draws)  # the generator goes on where it was


def test_rows_are_those_asked_for_however_they_are_divided(tmp_path):
    """Of shards of uneven sizes, one of them empty: every range of rows."""
    whole, sizes = torch.arange(22.0).view(11, 2), [3, 1, 0, 5, 2]
    for i, part in enumerate(torch.split(whole, sizes)):
        save_file({"w": part.contiguous()}, tmp_path / f"{i}.safetensors")
    shards = [safe_open(tmp_path / f"{i}.safetensors", framework="pt") for i in range(len(sizes))]
    for start in range(11):
        for stop in range(start + 1, 12):
            assert torch.equal(checkpoint._rows(shards, "w", start, stop), whole[start:stop])


def test_room_is_asked_for_all_shards_before_anything_is_written(tmp_path, world, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "check_room", lambda folder, needed: asked.append(needed))
    save(tmp_path, world)
    saver, optimizer = Saver(tmp_path / "three", world), trained_optimizer(world)
    monkeypatch.setattr(type(world), "shards", property(lambda self: 3))
    monkeypatch.setattr(checkpoint, "check_room", lambda folder, needed: asked.append(needed) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saver.save(1, optimizer, {})
    assert list((tmp_path / "three").iterdir()) == []
    assert asked[1] == 3 * asked[0] > 3 * 3 * 4 * (30 + 5 + 15), "fp32 weights and two moments, and the generator"


def test_training_goes_on_after_saving_while_the_disk_is_slow(tmp_path, world, monkeypatch):
    """The copy is taken at once: what training does afterwards does not reach the file."""
    original, trained_on = checkpoint.save_file, threading.Event()
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: trained_on.wait(60) and original(*args))
    optimizer = trained_optimizer(world)
    before, saver = state(optimizer), Saver(tmp_path, world)
    saver.save(3, optimizer, {"adam_steps": 3.0, "fingerprint": {}})
    with torch.no_grad():
        for rows in optimizer.rows.values():
            rows.zero_()
    trained_on.set()
    saver.finish()
    other = trained_optimizer(world, seed=1)
    SavedState(tmp_path / "step-000003").restore(other, world)
    assert all(torch.equal(a, b) for a, b in zip(state(other), before, strict=True))


def test_old_ones_go_only_after_the_new_one_is_there(tmp_path, world):
    for step in (2, 4, 10):
        save(tmp_path, world, step=step, keep=2)
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["step-000010", "step-000004"]


def test_an_old_one_that_cannot_be_deleted_stays_and_is_named(tmp_path, world):
    """Moved to another disk, with a link in its place."""
    folder = tmp_path / "run"
    save(folder, world, step=2)
    (folder / "step-000002").rename(tmp_path / "moved")
    (folder / "step-000002").symlink_to(tmp_path / "moved")
    with pytest.warns(UserWarning, match=r"step-000002: could not be deleted, so it stays \(Cannot call rmtree on"):
        save(folder, world, step=4, keep=1)
    assert [path.name for path in saved_checkpoints(folder)] == ["step-000004", "step-000002"]


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, world, monkeypatch):
    """When the power fails, only what was synced is sure to be there: sizes of files, and names in folders."""
    def content(file):
        return sorted(os.listdir(file)) if stat.S_ISDIR(os.stat(file).st_mode) else os.stat(file).st_size

    synced, lost, fsync, rename = {}, {}, os.fsync, os.rename

    def record(descriptor):
        synced[os.stat(descriptor).st_ino] = content(descriptor)
        fsync(descriptor)

    def compare(old, new):
        lost[new.name] = [path for path in (old, *old.iterdir()) if synced.get(path.stat().st_ino) != content(path)]
        rename(old, new)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", compare)
    save(tmp_path, world)
    assert lost == {"step-000003": []}
    assert synced[tmp_path.stat().st_ino] == ["step-000003"]


def test_what_is_incomplete_is_never_taken_and_that_is_said(tmp_path, world, capsys):
    folder = tmp_path / "checkpoints"
    save(folder, world)
    for other in ("step-000004.tmp", "step-000005", "step-000006"):
        shutil.copytree(folder / "step-000003", folder / other)
    (folder / "step-000005" / "manifest.json").unlink()
    os.truncate(folder / "step-000006" / "manifest.json", 100)
    assert find(tmp_path, world, {"data": "a"}).step == 3
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(f"resuming from {folder / 'step-000003'}, after step 3 (passed over ")
    for reason in ("step-000004.tmp: its save was not finished", "step-000005/manifest.json: no such file",
                   "step-000006/manifest.json: damaged, or written in part"):
        assert reason in said
    Saver(folder, world)
    assert not (folder / "step-000004.tmp").exists()
    shutil.rmtree(folder / "step-000003")
    assert find(tmp_path, world, {"data": "a"}) is None
    assert "no checkpoint to resume from, beginning at step 0 (passed over" in capsys.readouterr().out


def find(folder, world, fingerprint, *, wanted="auto", allow_change=False):
    """The state from which a run with this fingerprint resumes in `folder`."""
    prepared = SimpleNamespace(plan=SimpleNamespace(total_steps=9))
    return resume.find(SimpleNamespace(
        folder=folder, world=world, fingerprint=fingerprint, prepared=prepared,
        config=Config(checkpoint=CheckpointConfig(resume=wanted, allow_change=allow_change))))


def test_ranks_look_at_what_the_leading_one_sees(tmp_path, monkeypatch):
    """On a network's disk a host may see a new folder later than another: two ranks must not go on from two states."""
    def gather(found, mine):
        found[:] = [([tmp_path / "step-000004", tmp_path / "step-000002"], True), mine]

    monkeypatch.setattr(resume.dist, "all_gather_object", gather)
    mine = [tmp_path / "step-000002"]
    assert resume.from_main((mine, False), SimpleNamespace(ranks=2)) == ([tmp_path / "step-000004", *mine], True)


def test_where_all_are_damaged_a_person_has_to_look(tmp_path, world):
    for step in (2, 4):
        save(tmp_path / "checkpoints", world, step=step)
        flip(tmp_path / f"checkpoints/step-00000{step}/rank-0.safetensors", -1)
    with pytest.raises(UserError, match=r"(?s)no checkpoint of this run is intact.*step-000004.*step-000002"):
        find(tmp_path, world, {"data": "a"})


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["manifest.json", "rank-0.safetensors"])
def test_a_flipped_bit_or_a_lost_byte_anywhere_is_an_error_that_names_the_file(tmp_path, world, name):
    save(tmp_path, world)
    folder = tmp_path / "step-000003"
    good = (folder / name).read_bytes()
    for position in random.Random(0).sample(range(len(good)), 60):
        flip(folder / name, position)
        with pytest.raises(UserError, match=name):
            SavedState(folder).verify()
        (folder / name).write_bytes(good[:position])
        with pytest.raises(UserError, match=name):
            SavedState(folder).verify()
        (folder / name).write_bytes(good)
    SavedState(folder).verify()


def test_auto_falls_back_and_says_so_and_a_named_one_fails(tmp_path, world, capsys):
    for step in (2, 4, 6):
        save(tmp_path / "checkpoints", world, step=step)
    flip(tmp_path / "checkpoints" / "step-000006" / "rank-0.safetensors", -1)
    (tmp_path / "checkpoints" / "step-000004" / "rank-0.safetensors").unlink()
    assert find(tmp_path, world, {"data": "a"}).step == 2
    said = capsys.readouterr().out
    assert "passed over" in said
    assert "step-000006/rank-0.safetensors: damaged" in said
    assert "step-000004/rank-0.safetensors: missing" in said
    assert "resuming from" in said
    with pytest.raises(UserError, match=r"step-000006/rank-0\.safetensors: damaged"):
        find(tmp_path, world, {"data": "a"}, wanted=str(tmp_path / "checkpoints" / "step-000006"))
    with pytest.raises(UserError, match=r'holds checkpoints, and checkpoint\.resume is "never"'):
        find(tmp_path, world, {"data": "a"}, wanted="never")
    for wanted in ("auto", "never"):
        assert find(tmp_path / "empty", world, {"data": "a"}, wanted=wanted) is None


def test_other_settings_are_refused_with_the_differences(tmp_path, world):
    save(tmp_path / "checkpoints", world)
    with pytest.raises(UserError, match="data: was 'a', is 'b'"):
        find(tmp_path, world, {"data": "b"})
    assert find(tmp_path, world, {"data": "b"}, allow_change=True).step == 3
    assert find(tmp_path, world, {"data": "a", "held-out x": "c"}).step == 3  # a set may come


def test_a_disk_without_room_is_named_and_older_checkpoints_stay(tmp_path, world, monkeypatch):
    save(tmp_path, world)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match=r"a checkpoint needs [\d,]+ bytes and 100 are free"):
        save(tmp_path, world, step=6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_while_saving(tmp_path, world, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null"):
        pytest.skip("no small file system can be mounted here")
    try:
        save(disk, world)
        (disk / "ballast").write_bytes(bytes(64 * 1024 - 16 * 1024))
        monkeypatch.setattr(checkpoint, "check_room", lambda folder, needed: None)
        big = AdamW(torch.nn.Linear(100, 100), mesh=world.mesh)
        with pytest.raises(OSError, match=r"step-000006\.tmp: the checkpoint could not be written .* bytes"):
            save(disk, world, step=6, optimizer=big)
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "step-000003"]
        SavedState(disk / "step-000003").verify()
    finally:
        os.system(f"umount {disk}")


def test_the_leader_does_not_wait_for_a_rank_that_could_not_write(tmp_path, world):
    two = dataclasses.replace(world, ranks=2)
    saver = Saver(tmp_path, two)
    saver.save(3, trained_optimizer(world), {"adam_steps": 3.0, "fingerprint": {}})
    while not (tmp_path / "step-000003.tmp" / "rank-0.json").exists():
        time.sleep(0.01)
    assert saver.error is None
    os.rename(tmp_path / "step-000003.tmp", tmp_path / "step-000003-failed.tmp")  # as rank 1 where its disk is full
    with pytest.raises(OSError, match="another rank could not write its part"):
        saver.finish()
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_moment_of_a_save_the_newest_is_whole(tmp_path, world):
    """SIGKILL at 24 random moments: what is listed is intact, and nothing that was there is lost."""
    rng, landed, optimizer = random.Random(0), set(), trained_optimizer(world)
    for attempt in range(24):
        folder = tmp_path / str(attempt)
        save(folder, world, step=1)
        child = os.fork()
        if child == 0:
            dist.barrier = lambda: None  # the threads of the process group were left behind by the fork
            saver = Saver(folder, world, keep=1)
            for step in range(2, 500):
                saver.save(step, optimizer, {"adam_steps": 3.0, "fingerprint": {}})
            os._exit(0)
        reached, deadline = rng.randrange(1, 8), time.monotonic() + 60
        while step_of(saved_checkpoints(folder)[0]) < reached and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.03 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = saved_checkpoints(folder)
        assert found
        SavedState(found[0]).verify()
        landed.add(SavedState(found[0]).step)
    assert len(landed) > 2  # the moments were different ones


def test_nothing_that_could_run_code_is_in_a_checkpoint(tmp_path, world):
    save(tmp_path, world)
    folder = tmp_path / "step-000003"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "rank-0.safetensors"]
    assert json.loads((folder / "manifest.json").read_text())["manifest"]["step"] == 3


def test_the_buffer_that_a_gpu_writes_into_is_released_before_it_is_freed(monkeypatch, tmp_path):
    """Freed while registered, its addresses would lead later copies to pages that are gone. CUDA is a stand-in."""
    calls = []
    runtime = SimpleNamespace(cudaHostRegister=lambda *given: calls.append(("register", given[0])) or 0,
                              cudaHostUnregister=lambda *given: calls.append(("unregister", given[0])) or 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    saver = Saver(tmp_path, SimpleNamespace(device=torch.device("cuda"), is_main=False))
    for step in range(2):
        state = {"a": torch.full((3, 5), 1.5 + step), "b": torch.arange(7).bfloat16()}
        copies = saver._on_host(state)
        assert all(torch.equal(copies[key], value) for key, value in state.items())
    address = copies["a"].data_ptr()
    del copies
    assert calls == [("register", address)]
    del saver
    assert calls == [("register", address), ("unregister", address)]
