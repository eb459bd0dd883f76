# SPDX-License-Identifier: Apache-2.0
"""The five settings and the bound, measured in one run.

At most one model is in memory at a time; the plug-in, the tuned emulator and the bound are
assembled in it, so that no plugged-in directory is needed.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from offsite_ray.adapter import AdapterBundle, open_adapter
from offsite_ray.architectures import DTYPES, load_model, load_tokenizer
from offsite_ray.data import read_documents, tokenizer_digest
from offsite_ray.emulator import (
    EmulatorBundle,
    FullModel,
    blocks_path,
    check_fits,
    open_bundle,
    open_full_model,
)
from offsite_ray.errors import DataError, PlugInError
from offsite_ray.evaluation.gaps import compare
from offsite_ray.evaluation.perplexity import EncodedDocument, context_length, encode, perplexity
from offsite_ray.evaluation.task_loading import LoadedTasks, load_tasks
from offsite_ray.evaluation.tasks import run_tasks
from offsite_ray.finetuning.host import Host, host_of_bundle, host_of_full_model
from offsite_ray.plug_in import applied
from offsite_ray.results import SETTINGS, EvaluationResult, SettingResult, to_plain
from offsite_ray.storage import check_replaceable, check_replaceable_files, replaced
from offsite_ray.training.devices import give_back
from offsite_ray.uris import without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.config import EvaluateConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefacts:
    """Everything that is evaluated, opened and checked against the full model."""

    full: FullModel
    bundle: EmulatorBundle | None
    adapter: AdapterBundle | None
    bound: AdapterBundle | None
    finetuned: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Yardstick:
    """What every setting is measured with."""

    tokenizer: PreTrainedTokenizerBase
    documents: list[EncodedDocument]
    tasks: LoadedTasks | None
    seq_len: int
    batch_size: int

    def measure(self, model: PreTrainedModel) -> SettingResult:
        """Return what a model scores."""
        return SettingResult(
            perplexity=perplexity(
                model, self.documents, seq_len=self.seq_len, batch_size=self.batch_size
            )
            if self.documents
            else None,
            tasks=run_tasks(
                model,
                self.tokenizer,
                self.tasks,
                batch_size=self.batch_size,
                max_length=self.seq_len,
            )
            if self.tasks is not None
            else {},
        )


def evaluate(
    config: EvaluateConfig,
    progress: Callable[[str], None] | None = None,
    settings: Collection[str] = SETTINGS,
) -> EvaluationResult:
    """Measure every setting whose artefact is given.

    Args:
        config: Artefacts, texts and tasks.
        progress: Told in one line what was measured.
        settings: Settings to measure; others are left out, whatever is given.

    Raises:
        OffsiteError: An artefact does not belong to the full model, a text cannot be read, or the
            result cannot be written.
    """
    start = time.perf_counter()
    _check_outputs(config)
    artefacts = open_artefacts(config)
    yardstick = open_yardstick(config, artefacts.full.path, artefacts.full.config)
    measured: dict[str, SettingResult] = {}
    for name, model in models(artefacts, DTYPES[config.dtype]):
        if name in settings:
            give_back()  # what assembling it, and the setting before, have left
            measured[name] = yardstick.measure(model)
            if progress is not None:
                progress(_line(name, measured[name]))
        del model  # or it would stay beside the next one while that is loaded
    result = compare(
        measured,
        recipe={**without_secrets(to_plain(config)), "seq_len": yardstick.seq_len},
        seconds=time.perf_counter() - start,
    )
    if config.out is not None:
        with replaced(config.out) as tmp:
            tmp.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    return result


def _check_outputs(config: EvaluateConfig) -> None:
    """Refuse what cannot be written to, before anything is measured."""
    if config.out is not None:
        check_replaceable(config.out)
    if config.report is not None:
        check_replaceable_files(config.report)


def open_artefacts(config: EvaluateConfig) -> Artefacts:
    """Open and check what is to be evaluated, before anything is measured.

    Raises:
        BundleError: A bundle is damaged, or belongs to another model or another bundle.
        DataError: A model has another tokenizer than the full model.
    """
    bundle = open_bundle(config.bundle) if config.bundle is not None else None
    adapter = open_adapter(config.adapter) if config.adapter is not None else None
    bound = open_adapter(config.bound) if config.bound is not None else None
    bundles = [opened for opened in (bundle, adapter, bound) if opened is not None]
    blocks = config.blocks or next((blocks_path(opened.manifest) for opened in bundles), None)
    full = open_full_model(config.model, blocks)
    for opened in bundles:
        check_fits(opened.path, opened.manifest, full)
    if bundle and adapter and adapter.manifest.trained_against != bundle.manifest.id:
        raise PlugInError(
            f"{adapter.path} was not trained against {bundle.path}, but against the bundle "
            f"{str(adapter.manifest.trained_against)[:12]}...; give that one as --bundle"
        )
    if bound is not None and not _is_bound(bound):
        raise PlugInError(
            f"{bound.path} was trained against a bundle that keeps {bound.plan.short}, not every "
            "block as it is, so it is no bound; give it as --adapter"
        )
    if adapter and bound and adapter.plan.adapter != bound.plan.adapter:
        raise PlugInError(
            f"{bound.path} trains the blocks {list(bound.plan.adapter)}, {adapter.path} the blocks "
            f"{list(adapter.plan.adapter)}, so the one bounds nothing of the other; train the "
            "bound against a bundle with the same adapter blocks"
        )
    finetuned = open_full_model(config.finetuned, blocks).path if config.finetuned else None
    for directory in (bundle.path if bundle else None, finetuned):
        if directory is not None and tokenizer_digest(directory) != tokenizer_digest(full.path):
            raise DataError(
                f"{directory} has another tokenizer than {full.path}, so their losses do not "
                "compare; evaluate models of one tokenizer"
            )
    return Artefacts(full=full, bundle=bundle, adapter=adapter, bound=bound, finetuned=finetuned)


def _is_bound(adapter: AdapterBundle) -> bool:
    """Return whether an adapter was trained inside the full model: every block, each as it is."""
    recipe = adapter.manifest.recipe
    replaced = {"copies_of", "harmonizers"} & set(recipe.get("selection", {}))
    changed = recipe.get("compression", {}).get("method", "none") != "none"
    distilled = recipe.get("distillation") is not None
    return adapter.plan.keeps_every_block and not (replaced or changed or distilled)


def open_yardstick(
    config: EvaluateConfig, model: Path, model_config: PretrainedConfig
) -> Yardstick:
    """Read and check what settings are measured with; no weight is read.

    Args:
        config: Texts and tasks.
        model: Directory of the full model.
        model_config: Its configuration.

    Raises:
        OffsiteError: A text or a task cannot be read, or the model has fewer positions.
    """
    seq_len = context_length(model_config, config.seq_len)
    tokenizer = load_tokenizer(model)
    tasks = None
    if config.tasks:
        tasks = load_tasks(
            config.tasks,
            task_data=config.task_data,
            task_path=config.task_path,
            limit=config.task_limit,
            num_fewshot=config.num_fewshot,
        )
    return Yardstick(
        tokenizer=tokenizer,
        documents=encode(tokenizer, _texts(config)) if config.text else [],
        tasks=tasks,
        seq_len=seq_len,
        batch_size=config.batch_size,
    )


def _texts(config: EvaluateConfig) -> list[str]:
    texts = []
    for document in read_documents(config.text):
        if "messages" in document:
            raise DataError(
                "conversations have no perplexity of their own; give --text files of plain text"
            )
        completed = document.get("completion")
        texts.append(document["text"] if completed is None else document["prompt"] + completed)
    return texts


def models(artefacts: Artefacts, dtype: torch.dtype) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the name of each setting with its model, which is good until the next is asked for."""
    full, bundle = artefacts.full, artefacts.bundle
    in_full: dict[str, AdapterBundle | None] = {}
    in_full |= {"plug_in": artefacts.adapter} if artefacts.adapter else {}
    in_full |= {"bound": artefacts.bound} if artefacts.bound else {}
    in_full |= {"full_zero_shot": None}
    yield from _variants(full.path, dtype, in_full, lambda a: host_of_full_model(full, a.plan))
    if bundle is not None:
        in_emulator: dict[str, AdapterBundle | None] = {}
        in_emulator |= {"emulator_fine_tuned": artefacts.adapter} if artefacts.adapter else {}
        in_emulator |= {"emulator_zero_shot": None}
        yield from _variants(bundle.path, dtype, in_emulator, lambda _: host_of_bundle(bundle))
    if artefacts.finetuned is not None:
        yield "full_fine_tuned", _loaded(artefacts.finetuned, dtype)


def _variants(
    path: Path,
    dtype: torch.dtype,
    adapters: Mapping[str, AdapterBundle | None],
    host: Callable[[AdapterBundle], Host],
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield one model with each of some adapters in it (None: as it is, which goes last).

    Weights are read from their file when they are first used. So those that an adapter replaces
    come into memory when the adapter has left it.
    """
    model = _loaded(path, dtype)
    for name, adapter in adapters.items():
        with nullcontext() if adapter is None else applied(model, host(adapter), adapter):
            yield name, model


def _loaded(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return load_model(path, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")


def _line(name: str, result: SettingResult) -> str:
    parts: list[str] = []
    if result.perplexity is not None:
        parts.append(f"perplexity {result.perplexity.perplexity:.4g}")
    for task, metrics in result.tasks.items():
        known = [f"{metric} {value:.4g}" for metric, value in metrics.items() if metric == "acc"]
        parts.append(f"{task} {', '.join(known)}".strip())
    position = f"{SETTINGS.index(name) + 1}/{len(SETTINGS)}"
    return f"[{position}] {name.replace('_', ' ')}: {', '.join(parts)}"
