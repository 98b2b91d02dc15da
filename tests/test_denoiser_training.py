"""Training a denoiser: it learns, goes on to the bit where it stopped, and says what it was trained on."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_volumes import write_subjects
from typer.testing import CliRunner

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.network_weights import read_network
from quantitron.host.command import app
from quantitron.recon.networks.conditional_unet import ConditionalUNet, UNetShape
from quantitron.recon.networks.precision import autocast
from quantitron.training.augmentation import Augmentation
from quantitron.training.batch import Batch, step_generator
from quantitron.training.checkpoint import STATE, TrainingState, load_checkpoint, save_checkpoint
from quantitron.training.denoiser_training import DenoiserTraining, noise_loss, train_denoiser
from quantitron.training.loop import (
    LoopSettings,
    TrainingDiverged,
    TrainingStopped,
    draw_batches,
    safe_precision,
    train_network,
)
from quantitron.training.noise_batches import PatchPlan
from quantitron.training.output_files import check_outputs

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = [sys.executable, str(Path(__file__).with_name("run_command.py"))]
CPU = torch.device("cpu")
SMALL = DenoiserTraining(
    shape=UNetShape(channels=(8, 12), blocks=1, heads=2, embedding=16),
    loop=LoopSettings(steps=6, rate=3e-3, warm_up=2, validate_every=4, precision="float32"),
    plan=PatchPlan((1, 24, 24), 3, (4, 24, 24), 1, slab_share=0.34),
    augmentation=Augmentation(),
    levels=(0.02, 0.5, 5),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_subjects(tmp_path_factory.mktemp("volumes") / "data", 5)


def weights(path):
    return dict(read_network(path, "contrast_denoiser").network.named_parameters())


class Stripes:
    """A sampler of noisy stripes."""

    def __init__(self, broken_at=None):
        self.broken_at = broken_at

    def __call__(self, step, generator):
        x = torch.arange(16.0)
        phase = 6 * torch.rand(4, generator=generator)
        clean = (x / 2 + phase[:, None]).sin()[:, None, None, None, :].expand(4, 1, 1, 16, 16)
        noise = torch.randn(clean.shape, generator=generator)
        if step == self.broken_at:
            noise = noise * float("nan")
        level = torch.full((4,), 0.3)
        return Batch(clean + 0.3 * noise, noise, level)


def stripes_network(seed=0):
    shape = UNetShape(channels=(8, 8), blocks=1, embedding=8)
    return ConditionalUNet(shape, torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ the loop


def test_rate_warms_up_and_falls_to_the_end():
    settings = LoopSettings(steps=100, rate=1.0, warm_up=10)
    rates = [settings.rate_at(step, settings.share(step, 0)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] > 0.97
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0.01)
    timed = LoopSettings(minutes=2, steps=100)
    assert timed.share(10, 60) == 0.5
    assert timed.share(60, 60) == 0.6
    assert timed.share(10, 1000) == 1
    with pytest.raises(ScanError, match="number of steps or of minutes"):
        LoopSettings()


def test_a_small_network_learns():
    """From knowing nothing (1) to a third of it, on data that it has not seen."""
    settings = LoopSettings(steps=150, rate=1e-2, warm_up=10, average=0.9, precision="float32")
    network = stripes_network()
    test = Stripes()(0, step_generator(0, 0, "test"))
    with torch.no_grad():
        before = float(noise_loss(network, test))
    told = []
    trained = train_network(network, Stripes(), noise_loss, settings, CPU, progress=told.append)
    with torch.no_grad():
        after = float(noise_loss(trained.network, test))
    assert before == pytest.approx(1, abs=0.1)
    assert after < before / 3
    assert trained.state.step == len(told) == 150
    assert told[-1].share == 1
    assert told[-1].seconds_left == 0
    assert told[50].images_per_second > 0
    curve = [loss for _, loss, *_ in trained.state.losses]
    assert len(curve) == 6
    assert curve[-1] < curve[0] / 2


def test_weights_are_averaged_over_steps():
    settings = LoopSettings(steps=40, rate=1e-2, average=0.99, precision="float32")
    network = stripes_network()
    trained = train_network(network, Stripes(), noise_loss, settings, CPU)
    newest, average = network.exit.weight.detach(), trained.network.exit.weight
    assert trained.network is not network
    assert 0 < float((newest - average).norm()) < float(newest.norm())


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_gradients_are_those_of_float32_but_for_rounding(depth):
    """Whatever was in the memory before: oneDNN's bfloat16 gradients of two slices are not."""
    network = stripes_network()
    with torch.no_grad():
        for number, weight in enumerate(network.parameters()):
            if not bool(weight.any()):
                weight.normal_(0, 0.1, generator=step_generator(0, number))
    noise = torch.randn(1, 1, depth, 16, 16, generator=step_generator(1, 0))
    batch = Batch(0.5 * noise, noise, torch.tensor([0.3]))
    found = []
    for wanted in ("float32", "auto"):
        network.zero_grad()
        waste = [torch.full((1 << size,), float("nan")) for size in range(6, 18) for _ in range(4)]
        del waste
        with autocast(CPU, safe_precision(network.shape, depth, CPU, wanted)):
            noise_loss(network, batch).backward()
        found.append({name: w.grad for name, w in network.named_parameters() if w.grad is not None})
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0.1 * scale + 1e-6)
    assert safe_precision(network.shape, 2 * depth, torch.device("cuda"), "auto") == "auto"


def test_time_ends_a_training():
    settings = LoopSettings(minutes=1e-2, precision="float32")
    started = time.monotonic()
    trained = train_network(stripes_network(), Stripes(), noise_loss, settings, CPU)
    assert trained.state.step > 1
    assert 0.6 <= trained.state.seconds < 20
    assert time.monotonic() - started < 30


def test_a_loss_that_is_no_number_stops_and_the_checkpoint_stays(tmp_path):
    settings = LoopSettings(steps=20, precision="float32", checkpoint_minutes=0)
    folder = tmp_path / "checkpoint"
    with pytest.raises(TrainingDiverged, match=r"not finite after 7 steps.*checkpoint"):
        train_network(stripes_network(), Stripes(broken_at=7), noise_loss, settings, CPU, checkpoint=folder)
    state, tensors = load_checkpoint(folder, {})
    assert state.step == 7
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_an_interruption_saves_first_and_the_rest_gives_the_same_bits(tmp_path):
    settings = LoopSettings(steps=12, rate=1e-2, warm_up=3, precision="float32")
    whole = train_network(stripes_network(), Stripes(), noise_loss, settings, CPU)
    folder = tmp_path / "checkpoint"

    def interrupt(standing):
        if standing.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match="stopped after 5 steps; --resume"):
        train_network(
            stripes_network(), Stripes(), noise_loss, settings, CPU, checkpoint=folder, progress=interrupt
        )
    assert signal.getsignal(signal.SIGTERM) is before
    # other first weights: they must not matter
    rest = train_network(
        stripes_network(9), Stripes(), noise_loss, settings, CPU, checkpoint=folder, resume=True
    )
    assert rest.state.step == 12
    for one, other in zip(whole.network.parameters(), rest.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert rest.state.window == whole.state.window


def test_a_training_that_is_far_enough_is_only_finished(tmp_path):
    """As one that was stopped early and is to be taken as it is."""
    settings = LoopSettings(steps=6, precision="float32")
    folder = tmp_path / "checkpoint"
    first = train_network(stripes_network(), Stripes(), noise_loss, settings, CPU, checkpoint=folder)
    said = []

    def validate(network, last):
        said.append(last)
        return {"score": 1.0}

    shorter = replace(settings, steps=4)
    again = train_network(
        stripes_network(), Stripes(), noise_loss, shorter, CPU, validate, checkpoint=folder, resume=True
    )
    assert again.state.step == 6
    assert said == [True]
    for one, other in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_network_that_makes_no_numbers_of_held_out_images_is_not_delivered():
    settings = LoopSettings(steps=2, precision="float32")
    for score in (float("nan"), float("-inf")):
        with pytest.raises(TrainingDiverged, match="held out images is not finite after 2 steps"):
            train_network(
                stripes_network(), Stripes(), noise_loss, settings, CPU, lambda *_, s=score: {"score": s}
            )


def test_batches_drawn_ahead_are_the_same():
    plain, ahead = (draw_batches(Stripes(), 1, 3, threads) for threads in (0, 3))
    for one, other, _ in zip(plain, ahead, range(20), strict=False):
        assert torch.equal(one.input, other.input)
        assert torch.equal(one.target, other.target)
    ahead.close()
    with pytest.raises(ZeroDivisionError):  # what goes wrong in a thread is not lost
        next(draw_batches(lambda step, generator: 1 / 0, 0, 0, 2))


def test_threads_other_than_the_main_one_train_too():
    """Signals belong to the main thread."""
    done = []

    def work():
        settings = LoopSettings(steps=2, precision="float32")
        done.append(train_network(stripes_network(), Stripes(), noise_loss, settings, CPU).state.step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [2]


def test_checkpoints_are_whole_or_refused(tmp_path):
    folder = tmp_path / "c"
    tensors = {"network.a": torch.arange(3.0)}
    save_checkpoint(folder, TrainingState(step=1), tensors, {"seed": 0})
    save_checkpoint(folder, TrainingState(step=2), tensors, {"seed": 0})
    assert sorted(file.name for file in folder.iterdir()) == [STATE, "step-00000002.safetensors"]
    state, found = load_checkpoint(folder, {"seed": 0})
    assert state.step == 2
    assert torch.equal(found["network.a"], tensors["network.a"])
    with pytest.raises(ScanError, match="another training: seed was 0 and is 1"):
        load_checkpoint(folder, {"seed": 1})
    save_checkpoint(folder, state, tensors, {"plan": {"size": [1, 32, 32], "slices": 12, "slabs": 3}})
    with pytest.raises(ScanError, match=r"another training: plan\.slabs was 3 and is 4$"):
        load_checkpoint(folder, {"plan": {"size": [1, 32, 32], "slices": 12, "slabs": 4}})
    save_checkpoint(folder, state, tensors, {"seed": 0})
    file = folder / "step-00000002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ScanError, match="cut short or altered"):
        load_checkpoint(folder, {"seed": 0})
    file.unlink()
    with pytest.raises(ScanError, match="cannot be read"):
        load_checkpoint(folder, {"seed": 0})
    (folder / STATE).write_text("{}")
    with pytest.raises(ScanError, match="is no checkpoint"):
        load_checkpoint(folder, {})
    with pytest.raises(ScanError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "gone", {})


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_no_other_file(tmp_path, monkeypatch):
    tensors = {"network.a": torch.arange(3.0)}
    save_checkpoint(tmp_path / "old", TrainingState(step=1), tensors, {})
    (tmp_path / "old" / ".step-00000007.safetensors.part").write_bytes(b"of a process that was killed")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for folder in ("old", "new"):
            with pytest.raises(ScanError, match=f"{folder} cannot be written: No space left on device"):
                save_checkpoint(tmp_path / folder, TrainingState(step=2), tensors, {})
    assert load_checkpoint(tmp_path / "old", {})[0].step == 1
    assert {file.name for file in (tmp_path / "old").iterdir()} == {STATE, "step-00000001.safetensors"}
    assert [folder.name for folder in tmp_path.iterdir()] == ["old"]


def test_a_folder_without_a_checkpoint_is_no_training_to_go_on_from(tmp_path):
    folder, target = tmp_path / "a.checkpoint", tmp_path / "a.safetensors"
    folder.mkdir()
    unfinished = folder / ".step-00000007.safetensors.part"
    unfinished.write_bytes(b"of a process that was killed")
    check_outputs(target, folder, resume=False, overwrite=False)  # begins anew
    with pytest.raises(ScanError, match="holds no checkpoint of a training"):
        check_outputs(target, folder, resume=True, overwrite=False)
    (folder / "step-00000007.safetensors").write_bytes(b"without what belongs to it")
    with pytest.raises(ScanError, match="holds a training already: --overwrite starts anew"):
        check_outputs(target, folder, resume=False, overwrite=False)
    (tmp_path / "b.checkpoint").write_text("mine")
    with pytest.raises(ScanError, match="is no folder"):
        check_outputs(target, tmp_path / "b.checkpoint", resume=False, overwrite=True)


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (
            [{"schedule": "jiang" * 8, "snr": 10}],
            [{"schedule": "jiang" * 8, "snr": 3}],
            r"\.0\.snr was 10 and is 3",
        ),
        ([{"a": 1}, {"a": 2}], [{"a": 1}, {"a": 3}], r"\.1\.a was 2 and is 3"),
        ([{"a": 1}], [{"a": 1}, {"a": 3}], r"\.1 was None and is {'a': 3}"),
        ([0.5, 1], [0.5, 2], r" was \[0\.5, 1\] and is \[0\.5, 2\]"),
        ([*range(100, 120)], [*range(100, 119), 7], r"\.19 was 119 and is 7"),
    ],
)
def test_what_differs_from_the_checkpoint_is_told_within_lists_too(tmp_path, was, now, said):
    save_checkpoint(tmp_path, TrainingState(), {}, {"slices": {"scans": was, "seed": 0}})
    with pytest.raises(ScanError, match=rf"another training: slices\.scans{said}$"):
        load_checkpoint(tmp_path, {"slices": {"scans": now, "seed": 0}})


# ------------------------------------------------------------------ the denoiser


@pytest.mark.parametrize("ending", [".safetensors", ".md", ".loss.csv", ".loss.png"])
def test_files_that_are_there_are_not_replaced(data, tmp_path, ending):
    """A card's name may well be that of somebody's notes."""
    there = (tmp_path / "notes").with_suffix(ending)
    there.write_text("mine")
    with pytest.raises(ScanError, match=f"notes{ending} is there already; --overwrite replaces it"):
        train_denoiser(data, tmp_path / "notes.safetensors", SMALL, "cpu")
    assert [file.name for file in tmp_path.iterdir()] == [there.name]
    assert there.read_text() == "mine"


def test_the_table_of_the_data_is_never_replaced(tmp_path):
    table = tmp_path / "net.loss.csv"
    table.write_text("file,modality\n")
    with pytest.raises(ScanError, match=r"net\.loss\.csv is read and cannot be the output as well"):
        train_denoiser(table, tmp_path / "net.safetensors", SMALL, "cpu", overwrite=True)


def test_a_checkpoint_that_is_not_there_is_missed_before_anything_is_read(tmp_path):
    with pytest.raises(ScanError, match="gone holds no checkpoint"):
        train_denoiser(tmp_path, tmp_path / "a.safetensors", SMALL, "cpu", resume=tmp_path / "gone")


def test_stop_and_resume_give_the_same_file(data, tmp_path):
    """The whole of it, slabs and validations included, to the last bit."""
    train_denoiser(data, tmp_path / "whole.safetensors", SMALL, "cpu")

    def interrupt(standing):
        if standing.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    target = tmp_path / "parts.safetensors"
    with pytest.raises(TrainingStopped):
        train_denoiser(data, target, SMALL, "cpu", progress=interrupt)
    assert not target.exists()
    checkpoint = tmp_path / "parts.checkpoint"
    with pytest.raises(ScanError, match="--resume goes on"):
        train_denoiser(data, target, SMALL, "cpu")
    with pytest.raises(ScanError, match="another training: levels"):
        train_denoiser(data, target, replace(SMALL, levels=(0.01, 0.5, 5)), "cpu", resume=checkpoint)
    train_denoiser(data, target, SMALL, "cpu", resume=checkpoint)
    one, other = weights(tmp_path / "whole.safetensors"), weights(target)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    cards = [
        read_network(tmp_path / f"{name}.safetensors", "contrast_denoiser").description.card
        for name in ("whole", "parts")
    ]
    assert cards[0]["validation"] == cards[1]["validation"]


KILLED = """
import os, signal, sys
from pathlib import Path
import test_denoiser_training as here
from quantitron.training import output_files
output_files.card_text = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
here.train_denoiser(Path(sys.argv[1]), Path(sys.argv[2]), here.SMALL, "cpu")
"""


def test_a_training_killed_beside_its_weights_is_finished_by_resume(data, tmp_path):
    target, checkpoint = tmp_path / "net.safetensors", tmp_path / "net.checkpoint"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    killed = subprocess.run([sys.executable, "-c", KILLED, data, target], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    first = target.read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(first)  # of somebody else
    with pytest.raises(ScanError, match=r"other\.safetensors is there already"):
        train_denoiser(data, other, SMALL, "cpu", resume=checkpoint)
    card = train_denoiser(data, target, SMALL, "cpu", resume=checkpoint)
    assert card["steps"] == SMALL.loop.steps
    assert target.with_suffix(".md").exists()
    assert target.with_suffix(".loss.csv").exists()
    with pytest.raises(ScanError, match=r"net\.safetensors is there already"):  # whole now
        train_denoiser(data, target, SMALL, "cpu", resume=checkpoint)


def test_what_comes_out_says_what_went_in(data, tmp_path):
    output = tmp_path / "model.safetensors"
    training = replace(SMALL, note="Made up for a test.", shape=replace(SMALL.shape, attention=(1,)))
    card = train_denoiser(data, output, training, "cpu")
    description = read_network(output, "contrast_denoiser").description
    assert description.modalities == ("T1w", "T2w", "PDw")
    assert description.shape == replace(training.shape, modalities=3)
    assert description.noise_levels == training.noise_levels
    assert description.noise_levels[0] == 0.02
    assert description.noise_levels[-1] == pytest.approx(0.5)
    assert description.patch == (4, 24, 24)
    assert description.least == (1, 24, 24)
    assert json.loads(json.dumps(card)) == json.loads(json.dumps(description.card))
    assert card["data"]["volumes"] == {"T1w": 5, "T2w": 5, "PDw": 5}
    assert (card["data"]["learned_from"], card["data"]["held_out"]) == (12, 3)
    assert len(card["data"]["sha256"]) == 64
    assert card["steps"] == 6
    assert set(card["versions"]) == {"quantitron", "torch"}
    for kind in ("slices", "slabs"):
        assert set(card["validation"][kind]) == {"T1w", "T2w", "PDw"}
        for rows in card["validation"][kind].values():
            assert len(rows) == 5
            noisy = [before for before, _ in rows.values()]
            assert noisy == sorted(noisy, reverse=True)
            assert noisy[-1] == pytest.approx(6.02, abs=0.3)  # noise of 0.5
    page = (tmp_path / "model.md").read_text()
    for said in (
        "Made up for a test.",
        "5 T1w, 5 T2w, 5 PDw",
        card["data"]["sha256"],
        "torch",
        "| 0.5 |",
        "levels (0.02, 0.5, 5)",
    ):
        assert said in page
    for text in (page, json.dumps(card), (tmp_path / "model.checkpoint" / STATE).read_text()):
        assert "sub-0" not in text
        assert str(data) not in text
    rows = list(csv.DictReader((tmp_path / "model.loss.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["validation_gain_db"]] == ["4", "6"]


def test_a_tiny_denoiser_gains_over_noise(data, tmp_path):
    training = replace(
        SMALL,
        loop=LoopSettings(steps=150, rate=5e-3, warm_up=10, average=0.95, validate_every=75),
        augmentation=Augmentation(turned=0, bias=0.1),
    )
    card = train_denoiser(data, tmp_path / "model.safetensors", training, "cpu")
    for kind in ("slices", "slabs"):
        for name, rows in card["validation"][kind].items():
            before, after = rows["0.5"]
            assert after > before + 5, (kind, name)  # 5.8 to 9.1, by the processor's arithmetic
            before, after = rows["0.1"]
            assert after > before + 1, (kind, name)
    assert card["loss"] < 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"plan": PatchPlan((1, 25, 24), 3, slab_share=0)},
            "slices of 25 x 24 voxels: each must be a multip",
        ),
        ({"plan": PatchPlan((1, 24, 24), 3, (64, 24, 24), 1)}, "no T1w volume has the 64 slices"),
        ({"levels": (0.5, 0.1, 5)}, "must ascend"),
        ({"held_out": 0.9}, "not within"),
    ],
)
def test_plans_that_cannot_be_are_refused(data, tmp_path, change, said):
    with pytest.raises(ScanError, match=said):
        train_denoiser(data, tmp_path / "m.safetensors", replace(SMALL, **change), "cpu")
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_checked_before_anything_is_read(tmp_path):
    for name, said in {
        "model.pt": "must end in .safetensors",
        "gone/model.safetensors": "no folder",
        "there.safetensors": "is there already",
    }.items():
        (tmp_path / "there.safetensors").touch()
        with pytest.raises(ScanError, match=said):
            train_denoiser(tmp_path / "no data", tmp_path / name, SMALL, "cpu")


# ------------------------------------------------------------------ the command


def command(*arguments):
    return subprocess.run(
        [*RUN, "train-denoiser", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_command_trains_and_tells(data, tmp_path):
    output = tmp_path / "m.safetensors"
    arguments = (
        "--data",
        data,
        "-o",
        output,
        "--steps",
        3,
        "--channels",
        "8,8",
        "--blocks",
        1,
        "--slices",
        2,
    )
    arguments += ("--attention", "none", "--slice-size", "16,16", "--slab-share", 0, "--levels", "0.1,0.4,3")
    arguments += ("--validate-every", 2, "--threads", 1, "--device", "cpu")
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] == 3
    assert "validation after 2 steps" in done.stderr
    assert "images/s" in done.stderr
    assert "sub-0" not in done.stderr + done.stdout
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {"m.safetensors", "m.md", "m.loss.csv", "m.loss.png", "m.checkpoint"}
    assert (tmp_path / "m.loss.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, ["train-denoiser", *map(str, arguments)])
    assert again.stdout == ""
    assert str(again.exception).endswith("is there already; --overwrite replaces it")


def test_the_command_says_what_is_wrong(tmp_path):
    target = str(tmp_path / "m.safetensors")

    def called(*arguments):
        return CliRunner().invoke(app, ["train-denoiser", "--data", str(tmp_path), *arguments])

    assert called().exit_code == 2
    for wrong in (("--levels", "0.1"), ("--slab-size", "8,8"), ("--slab-share", "2"), ("--steps", "0")):
        assert called("-o", target, *wrong).exit_code == 2
    for wrong, said in {
        ("--attention", "7"): "attention on level 7",
        ("--intensity", "2,1"): "intensity must ascend",
        ("--device", "abacus"): "'abacus' is none of",
        ("--slab-share", "0"): "holds no NIfTI files",
    }.items():
        done = called("-o", target, *wrong)
        assert isinstance(done.exception, ScanError)
        assert said in str(done.exception)
