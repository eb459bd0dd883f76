# SPDX-License-Identifier: Apache-2.0
"""The five settings: each model against the trained one, and the gaps between them."""

from __future__ import annotations

import json
import math
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from blake3 import blake3

from offsite_ray.architectures import load_model
from offsite_ray.config import CompressConfig, EvaluateConfig, FinetuneConfig, PlugInConfig
from offsite_ray.data import split_blocks, write_blocks
from offsite_ray.emulator import compress
from offsite_ray.errors import PlugInError
from offsite_ray.evaluation import evaluate
from offsite_ray.evaluation.gaps import compare
from offsite_ray.evaluation.perplexity import encode, perplexity
from offsite_ray.evaluation.settings import models, open_artefacts
from offsite_ray.finetuning import finetune
from offsite_ray.plug_in import plug_in
from offsite_ray.results import SETTINGS, Perplexity, SettingResult
from offsite_ray.training import LanguageModelLoss, run_here
from offsite_ray.training.batches import collate, num_targets
from tests.adapters import METHODS, make_adapter
from tests.loops import Loop, ignore
from tests.questions import own_task
from tests.tiny_models import save_tiny, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from offsite_ray.results import EvaluationResult
    from offsite_ray.training import TrainingOutcome

pytestmark = pytest.mark.usefixtures("dataset_cache")


@pytest.fixture(scope="module")
def artefacts(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything that an evaluation takes."""
    root = tmp_path_factory.mktemp("artefacts")
    for method in METHODS:
        make_adapter(loop.bundle, root / method, method=method, noise=0.05)
    make_adapter(loop.keep_all, root / "bound", noise=0.02)
    save_tiny("gpt2", root / "finetuned", seed=3)
    own_task(root)
    for name in (*METHODS, "bound"):
        adapter, out = str(root / name), str(root / f"plugged-{name}")
        plug_in(PlugInConfig(model=str(loop.model), adapter=adapter, out=out))
    return root


def evaluated(loop: Loop, **given: Any) -> EvaluationResult:
    config = EvaluateConfig(
        model=str(loop.model), text=(str(loop.text),), seq_len=32, batch_size=16, **given
    )
    return evaluate(config)


def test_five_settings_the_bound_and_the_gaps_in_one_run(
    loop: Loop, artefacts: Path, tmp_path: Path
) -> None:
    result = evaluated(
        loop,
        finetuned=str(artefacts / "finetuned"),
        bundle=str(loop.bundle),
        adapter=str(artefacts / "full"),
        bound=str(artefacts / "bound"),
        tasks=("sums",),
        task_path=(str(artefacts / "sums.yaml"),),
        out=str(tmp_path / "result.json"),
    )
    directories = {
        "full_zero_shot": loop.model,
        "emulator_zero_shot": loop.bundle,
        "full_fine_tuned": artefacts / "finetuned",
        "plug_in": artefacts / "plugged-full",
        "bound": artefacts / "plugged-bound",
    }
    documents = encode(tiny_tokenizer(), [loop.text.read_text()])
    nats, accuracy = {}, {}
    for name in SETTINGS:
        setting = result.settings[name]
        assert setting is not None
        assert setting.perplexity is not None
        nats[name], accuracy[name] = setting.perplexity.nats_per_token, setting.tasks["sums"]["acc"]
        if name in directories:
            model = load_model(directories[name])
            assert setting.perplexity == perplexity(model, documents, seq_len=32, batch_size=16)
    assert len(set(nats.values())) == len(SETTINGS)
    assert result.gap_metric == "nats_per_token"
    assert result.gaps.utility == pytest.approx(nats["plug_in"] - nats["full_fine_tuned"])
    assert result.gaps.privacy == pytest.approx(nats["emulator_fine_tuned"] - nats["plug_in"])
    task_gaps = result.task_gaps["sums"]
    assert task_gaps.utility == pytest.approx(accuracy["full_fine_tuned"] - accuracy["plug_in"])
    assert task_gaps.privacy == pytest.approx(accuracy["plug_in"] - accuracy["emulator_fine_tuned"])
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert written["settings"]["plug_in"]["perplexity"] == pytest.approx(math.exp(nats["plug_in"]))


def setting(nats: float, accuracy: float) -> SettingResult:
    text = Perplexity(nats_per_token=nats, nats_per_byte=nats, num_tokens=1, num_bytes=1)
    return SettingResult(perplexity=text if nats else None, tasks={"t": {"acc": accuracy}})


@pytest.mark.parametrize(
    ("nats", "accuracies", "metric", "gaps", "share"),
    [
        ((4, 2, 2.5, 3), (0.1, 0.5, 0.4, 0.2), "nats_per_token", (0.5, 0.5), 0.75),
        ((4, 3, 2.5, 2), (0.1, 0.5, 0.4, 0.2), "nats_per_token", (-0.5, -0.5), 1.5),
        ((4, 5, 3, 3), (0.1, 0.5, 0.4, 0.2), "nats_per_token", (-2, 0), None),
        ((0, 0, 0, 0), (0.1, 0.5, 0.4, 0.2), "task_score", (0.1, 0.2), 0.75),
    ],
    ids=["all holds", "negative gaps", "fine-tuning that loses", "tasks alone"],
)
def test_gaps_are_counted_in_nats_or_else_in_scores(
    nats: tuple[float, ...],
    accuracies: tuple[float, ...],
    metric: str,
    gaps: tuple[float, float],
    share: float | None,
) -> None:
    names = ("full_zero_shot", "full_fine_tuned", "plug_in", "emulator_fine_tuned")
    given = dict(zip(names, map(setting, nats, accuracies), strict=True))
    result = compare(given, recipe={}, seconds=0)
    assert result.gap_metric == metric
    assert (result.gaps.utility, result.gaps.privacy) == pytest.approx(gaps)
    assert result.fine_tuned_share == (None if share is None else pytest.approx(share))
    assert result.bound_share is None


def test_what_was_not_given_is_not_measured(loop: Loop) -> None:
    plain = evaluated(loop, bundle=str(loop.bundle)).to_json()
    measured = [name for name, setting in plain["settings"].items() if setting is not None]
    assert measured == ["full_zero_shot", "emulator_zero_shot"]
    assert plain["gaps"] == {"utility": None, "privacy": None}
    assert plain["bound_share"] is None


def digest(model: PreTrainedModel) -> str:
    """Return a digest over the names and the bytes of a model's weights."""
    hasher = blake3()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def evaluated_models(loop: Loop, adapter: Path) -> Iterator[tuple[str, PreTrainedModel]]:
    config = EvaluateConfig(
        model=str(loop.model), bundle=str(loop.bundle), adapter=str(adapter), text=("unused.txt",)
    )
    return models(open_artefacts(config), torch.float32)


def test_one_model_is_in_memory_at_a_time(
    loop: Loop, artefacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []

    def load(*args: Any, **options: Any) -> PreTrainedModel:
        assert [model for model in loaded if model() is not None] == []
        model = load_model(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("offsite_ray.evaluation.settings.load_model", load)
    evaluated(loop, bundle=str(loop.bundle), adapter=str(artefacts / "lora"))
    assert len(loaded) == 2


@pytest.mark.parametrize("method", METHODS)
def test_the_plug_in_in_memory_is_the_plugged_in_directory(
    loop: Loop, artefacts: Path, method: str
) -> None:
    tokens = torch.arange(40)[None]
    on_disk = load_model(artefacts / f"plugged-{method}")
    seen = []
    with torch.no_grad():
        for name, model in evaluated_models(loop, artefacts / method):
            seen.append(name)
            reference = {"plug_in": on_disk, "full_zero_shot": load_model(loop.model)}.get(name)
            if reference is not None:
                assert digest(model) == digest(reference)
                assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert seen == ["plug_in", "full_zero_shot", "emulator_fine_tuned", "emulator_zero_shot"]


@pytest.mark.parametrize("method", METHODS)
def test_the_emulator_that_is_evaluated_is_the_one_that_was_trained(
    loop: Loop, tmp_path: Path, method: str
) -> None:
    write_blocks([str(loop.rows)], loop.bundle, 32, tmp_path / "data")
    config = FinetuneConfig(
        bundle=str(loop.bundle),
        data=(str(tmp_path / "data"),),
        out=str(tmp_path / "adapter"),
        max_steps=3,
        batch_size=4,
        learning_rate=1e-2,
        method=method,
    )
    outcomes: list[TrainingOutcome] = []

    def fit(*args: Any) -> TrainingOutcome:
        outcomes.append(run_here(*args))
        return outcomes[-1]

    result = finetune(config, fit, ignore)
    for name, model in evaluated_models(loop, tmp_path / "adapter"):
        if name != "emulator_fine_tuned":
            continue
        _, held_out = split_blocks(tmp_path / "data", config.eval_fraction, config.seed)
        rows = [held_out[index] for index in range(len(held_out))]
        with torch.no_grad():
            total = LanguageModelLoss(model, use_positions=True)(**collate(rows, model.device))
        assert float(total["lm"]) / num_targets(rows) == pytest.approx(result.last_loss, rel=1e-5)
        if method in ("full", "bitfit"):
            trained = {
                name.removeprefix("language_model."): tensor
                for name, tensor in outcomes[0].state.items()
            }
            expected = load_model(loop.bundle)
            assert expected.load_state_dict(trained, strict=False).unexpected_keys == []
            assert digest(model) == digest(expected)
            assert digest(model) != digest(load_model(loop.bundle))


def test_a_bound_of_other_blocks_is_refused(loop: Loop, artefacts: Path, tmp_path: Path) -> None:
    every, bound = str(tmp_path / "every"), str(tmp_path / "bound")
    compress(CompressConfig(model=str(loop.model), plan="2-2-2", out=every))
    make_adapter(tmp_path / "every", tmp_path / "bound")
    given = {"bundle": str(loop.bundle), "adapter": str(artefacts / "full"), "bound": bound}
    with pytest.raises(PlugInError, match=r"blocks \[0, 1, 4, 5\].*blocks \[0, 5\]"):
        evaluated(loop, **given)
