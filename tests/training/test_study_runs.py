"""Training for the study of entropy schedules: weights for one order, and the baselines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.torch.direct import masked_plan
from percov2.evaluation.study.coders import DirectCoder, token_map
from percov2.evaluation.study.comparison import measure
from percov2.evaluation.study.schedules import STUDY_SCHEDULES
from percov2.training.loop import LoopConfig, load_averaged
from percov2.training.stage2 import (
    EntropyConfig,
    EntropyStage,
    TokenMaps,
    integer_bits,
    train_entropy,
)
from percov2.training.study import runs
from percov2.training.study.direct_stage import masked_model
from percov2.training.study.runs import OneOrder, SharedRun, fine_tuned, shared_run
from tools.command_line import failure, run
from tools.executors import same
from tools.random_model import with_entropy

SIZES = {"dim": 16, "heads": 2, "head_dim": 8, "layers": 2, "hidden": 32}
CONFIG = EntropyConfig(model=SIZES, shapes=((5, 6), (4, 4)), tokens_per_step=256)
LOOP = LoopConfig(steps=30, learning_rate=4e-3, warmup=3, ema=0.9, log_every=10)
ORDER = STUDY_SCHEDULES["var_every_side"].stages


def ramp(height: int, width: int, seed: int) -> np.ndarray:
    """Tokens of the codebook 64 in which neighbours say nearly everything."""
    first, step = np.random.default_rng(seed).integers(1, 9, 2)
    y, x = np.mgrid[:height, :width]
    return ((first + step * (y + x)) % 64).astype(np.int32)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    sizes = [(6, 7), (5, 6), (4, 4)]
    maps = {f"tokens_{i}": ramp(*sizes[i % 3], seed=i) for i in range(40)}
    np.savez(path, codebook_size=np.int32(64), held_out=np.arange(40) % 8 == 7, **maps)
    return path


@pytest.fixture(scope="module")
def shared(token_file, tmp_path_factory) -> SharedRun:
    folder = tmp_path_factory.mktemp("shared")
    train_entropy(CONFIG, LOOP, token_file, folder, schedules=())
    return shared_run(folder, IntTransformer.load(folder / "entropy").fingerprint())


def test_a_shared_run_is_known_by_what_it_made(shared, tmp_path):
    shapes = tuple(map(tuple, shared.config.shapes))  # JSON has lists
    assert (replace(shared.config, shapes=shapes), shared.loop) == (CONFIG, LOOP)
    with pytest.raises(ValueError, match="not 00000000: give the run of the rate"):
        shared_run(shared.folder, bytes(32))
    with pytest.raises(ValueError, match=r"no report\.json; finish"):
        shared_run(tmp_path, bytes(32))


def test_every_draw_is_of_the_one_order(token_file):
    config = EntropyConfig(real_orders=1.0, default_orders=1.0, tokens_per_step=256)
    batch = OneOrder(token_file, ORDER).draw(np.random.default_rng(0), (6, 7), config)
    assert len(batch.stages) > 4
    assert all(np.array_equal(stages, ORDER(6, 7)) for stages in batch.stages)


def test_fine_tuning_starts_from_the_shared_weights(shared, token_file, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_FINE_RATE", 0.0)
    still = fine_tuned(shared, token_file, ORDER, 2, tmp_path)
    before = IntTransformer.load(shared.folder / "entropy")
    for name in ("embedding.token", "embedding.query", "embedding.start"):
        assert same(still.tensors[name], before.tensors[name])


def test_fine_tuning_saves_bits_and_is_done_once(shared, token_file, tmp_path):
    tuned = fine_tuned(shared, token_file, ORDER, 40, tmp_path)
    maps = TokenMaps(token_file).held_out
    stage = EntropyStage(CONFIG, OneOrder(token_file, ORDER))
    load_averaged(tmp_path, stage)
    assert (tmp_path / "held_out.csv").read_text().startswith("step,bits\n40,")

    def bits(model: IntTransformer) -> float:
        coder = TokenCoder(model)
        every = [coder.intervals(torch.from_numpy(g)[None], ORDER(*g.shape))[1] for g in maps]
        freqs = np.concatenate([freqs.reshape(-1) for freqs in every])
        return float((coder.prob_bits - np.log2(freqs)).mean())

    before = bits(IntTransformer.load(shared.folder / "entropy"))
    assert bits(tuned) < before - 0.05
    # The rounded form of the run is what was exported.
    assert stage.held_out_bits("", quantized=True) == pytest.approx(bits(tuned), rel=0.01)
    written = (tmp_path / "log.csv").read_text()
    again = fine_tuned(shared, token_file, ORDER, 40, tmp_path)
    assert again.fingerprint() == tuned.fingerprint()
    assert (tmp_path / "log.csv").read_text() == written


def test_a_run_is_not_taken_for_another_or_a_finished_one(
    shared, token_file, tmp_path, monkeypatch
):
    first = fine_tuned(shared, token_file, ORDER, 2, tmp_path / "run")
    others = {
        "steps": (shared, token_file, ORDER, 3),
        "weights": (replace(shared, fingerprint="00"), token_file, ORDER, 2),
        "order": (shared, token_file, STUDY_SCHEDULES["var"].stages, 2),
        "settings": (replace(shared, loop=replace(LOOP, seed=1)), token_file, ORDER, 2),
    }
    with np.load(token_file) as stored:
        maps = dict(stored)
    maps["tokens_0"] = maps["tokens_0"] ^ 1
    np.savez(tmp_path / "others.npz", **maps)
    others["data"] = (shared, tmp_path / "others.npz", ORDER, 2)
    for arguments in others.values():
        with pytest.raises(ValueError, match="a run of other data, weights or settings; remove"):
            fine_tuned(*arguments, tmp_path / "run")
    with pytest.raises(ValueError, match="a run of other data"):
        masked_model(shared, token_file, tmp_path / "run")
    again = fine_tuned(shared, token_file, ORDER, 2, tmp_path / "run")
    assert again.fingerprint() == first.fingerprint()
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ValueError, match="a run of other data"):
        fine_tuned(shared, token_file, ORDER, 2, tmp_path / "run")
    monkeypatch.setattr(runs, "trained_model", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="interrupted before step 7; start it again"):
        fine_tuned(shared, token_file, ORDER, 7, tmp_path / "other")


def test_the_masked_model_is_of_equal_size_and_learns(shared, token_file, tmp_path):
    longer = replace(shared, loop=replace(LOOP, steps=150))
    model = masked_model(longer, token_file, tmp_path)
    other = IntTransformer.load(shared.folder / "entropy")
    assert model.config == other.config and model.executor_name == "torch"
    maps = [token_map(grid) for grid in TokenMaps(token_file).held_out]
    order = STUDY_SCHEDULES["quincunx"].stages
    coder = DirectCoder(model, lambda *shape: masked_plan(order(*shape)), 64)
    record = measure(coder, maps, "masked", progress=False)
    assert record["bits_per_token"] < 5.8
    assert min(record["stage_bits"][2:]) < record["stage_bits"][0]
    assert (tmp_path / "log.csv").read_text().count("\n") == 1 + 15
    assert masked_model(longer, token_file, tmp_path).fingerprint() == model.fingerprint()


@pytest.fixture(scope="module")
def model_folder(shared, random_model, tmp_path_factory) -> Path:
    return with_entropy(random_model, shared.folder, tmp_path_factory.mktemp("model") / "trained")


def test_the_command_trains_what_it_compares(
    token_file, model_folder, shared, tmp_path, capsys, monkeypatch
):
    few = {name: STUDY_SCHEDULES[name] for name in ("var", "var_every_side", "raster")}
    monkeypatch.setattr("percov2.evaluation.study.comparison.STUDY_SCHEDULES", few)
    command = ("eval", "entropy", "--data", token_file, "--model", model_folder, "--rate", "fine")
    command += ("--out", tmp_path / "out", "--finetune", 3)
    assert "training needs --entropy-run" in failure(capsys, *command)
    command += ("--entropy-run", shared.folder)
    assert "unknown baselines ['mim']" in failure(capsys, *command, "--baselines", "masked,mim")
    assert run(*command, "--baselines", "masked") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = [(row["name"], row["weights"]) for row in report["methods"]]
    weights = ("shared", "fine-tuned", "re-reading")
    expected_rows = [("uniform", "none"), *((name, kind) for kind in weights for name in few)]
    assert rows == expected_rows[:-1]  # nobody codes a raster by re-reading
    coder = TokenCoder(IntTransformer.load(tmp_path / "out" / "runs" / "var" / "entropy"))
    expected = integer_bits(coder, TokenMaps(token_file).held_out, "var")
    assert report["methods"][4]["bits_per_token"] == pytest.approx(expected)
    ending = f"--entropy-run {shared.folder.name} --baselines masked --finetune 3"
    assert report["command"].endswith(ending)
