# SPDX-License-Identifier: Apache-2.0
"""Families outside the table: recognised and used, or refused with the reason; stock classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite_ray.architectures import FAMILIES, check_separable, load_model, resolve_architecture
from offsite_ray.cli import main
from offsite_ray.config import CompressConfig, PlugInConfig, VerifyConfig
from offsite_ray.emulator import compress, open_bundle, open_full_model
from offsite_ray.errors import FamilyError
from offsite_ray.inspection import verify
from offsite_ray.plug_in import plug_in
from offsite_ray.split import SplitPlan, parse_plan
from offsite_ray.training import keeps_documents_apart
from tests.adapters import make_adapter
from tests.tiny_models import tiny_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_AutoModel: Any = AutoModelForCausalLM

TOKENS = (torch.arange(24) * 7 % 97 + 1).view(2, 12)
CUT = "adapter=0,3,5 emulator=1,4"
KEPT = (0, 1, 3, 4, 5)

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GATED: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_GEMMA3N: dict[str, Any] = {
    **_GATED,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "sliding_window": 8,
    "layer_types": [_SLIDING, _FULL] * 3,
    "num_kv_shared_layers": 0,
}

RECOGNISED: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": ("model.layers", {**_COMMON, "intermediate_size": 48}),
    "mpt": (
        "transformer.blocks",
        {"d_model": 32, "n_heads": 4, "n_layers": 6, "max_seq_len": 64, "vocab_size": 128},
    ),
    "gpt_neo": (
        "transformer.h",
        {
            "vocab_size": 128,
            "hidden_size": 32,
            "num_layers": 6,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 3]],
            "window_size": 8,
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "gpt_bigcode": ("transformer.h", {**_COMMON, "n_inner": 48}),
    "cohere2": (
        "model.layers",
        {
            **_GATED,
            "sliding_window": 8,
            "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING, _FULL, _FULL],
        },
    ),
    "lfm2": (  # of two kinds of blocks in one class
        "model.layers",
        {**_GATED, "layer_types": ["conv", _FULL, "conv", _FULL, _FULL, "conv"]},
    ),
    "olmoe": ("model.layers", {**_GATED, "num_experts": 4, "num_experts_per_tok": 2}),
}
"""Model type to the path of its blocks and a tiny configuration."""

UNLIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "diffllama": ("lambda_init", _GATED),
    "minimax": (
        "self_attn",
        {**_GATED, **_EXPERTS, "head_dim": 8, "layer_types": ["linear_attention", _FULL] * 3},
    ),
    "llama4_text": (
        "feed_forward",
        {**_GATED, **_EXPERTS, "head_dim": 8, "interleave_moe_layer_step": 2},
    ),
    "gemma3n_text": ("per_layer", _GEMMA3N),
}
"""Model type to what depends on a block's place or on their number, and a tiny configuration."""

AMBIGUOUS: dict[str, tuple[str, dict[str, Any]]] = {
    "xlm": (
        "transformer.attentions, transformer.layer_norm1",
        {"vocab_size": 128, "emb_dim": 32, "n_layers": 6, "n_heads": 4},
    ),
    "gemma3n_text": ("model.layers, model.altup", {**_GEMMA3N, "altup_num_inputs": 7}),
    "jamba": ("none", {**_GATED, "num_experts": 4, "use_mamba_kernels": False}),
}
"""Model type to the lists that it has and a tiny configuration."""


def save(family: str, config: dict[str, Any], directory: Path) -> Path:
    """Save a stock model whose every parameter is random."""
    assert family not in FAMILIES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _AutoModel.from_config(AutoConfig.for_model(family, **config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    return directory


def stock(directory: Path) -> PreTrainedModel:
    model, info = _AutoModel.from_pretrained(str(directory), output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(TOKENS, use_cache=False).logits
    return logits


def cut(model: Path, out: Path, plan: str = CUT, blocks: str | None = None) -> list[str]:
    said: list[str] = []
    compress(CompressConfig(model=str(model), plan=plan, out=str(out), blocks=blocks), said.append)
    return said


def put_blocks(model: PreTrainedModel, path: str, blocks: list[nn.Module]) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(blocks))


@pytest.mark.parametrize("family", RECOGNISED)
def test_one_list_of_equal_blocks_is_recognised_and_used(family: str, tmp_path: Path) -> None:
    blocks, config = RECOGNISED[family]
    model = save(family, config, tmp_path / "full")
    full = stock(model)
    cut(model, tmp_path / "whole", plan="2-2-2")
    assert torch.equal(logits_of(stock(tmp_path / "whole")), logits_of(full))

    (notice,) = cut(model, tmp_path / "bundle")
    assert family in notice
    assert f"by structure as {blocks!r}" in notice
    emulator = stock(tmp_path / "bundle")
    found = logits_of(emulator)
    own = list(full.get_submodule(blocks).children())
    put_blocks(emulator, blocks, [own[index] for index in KEPT])
    assert torch.equal(found, logits_of(emulator))
    assert not torch.equal(found, logits_of(full))

    for method in ("full", "lora", "bottleneck"):
        adapter, out = tmp_path / f"adapter-{method}", tmp_path / f"plugged-{method}"
        make_adapter(tmp_path / "bundle", adapter, method=method)
        verify(VerifyConfig(path=str(adapter), model=str(model)))
        plug_in(PlugInConfig(model=str(model), adapter=str(adapter), out=str(out)))
        assert torch.equal(logits_of(load_model(out)), logits_of(full))


def test_documents_are_kept_apart_only_if_blocks_of_every_kind_do(tmp_path: Path) -> None:
    for types in ([_FULL, "conv"] * 3, [_FULL] * 6):
        config = {**RECOGNISED["lfm2"][1], "layer_types": types}
        full = open_full_model(save("lfm2", config, tmp_path / types[1]))
        apart = keeps_documents_apart(full.config, full.arch, full.weights)
        assert apart is ("conv" not in types)


@pytest.mark.parametrize("family", UNLIKE)
def test_blocks_that_change_with_their_place_are_refused(family: str, tmp_path: Path) -> None:
    word, config = UNLIKE[family]
    model = save(family, config, tmp_path / "full")
    with pytest.raises(FamilyError, match=rf"{family}.*{word}"):
        cut(model, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    cut(model, tmp_path / "whole", plan="2-2-2")
    assert torch.equal(logits_of(stock(tmp_path / "whole")), logits_of(stock(model)))


@pytest.mark.parametrize("family", AMBIGUOUS)
def test_what_is_ambiguous_is_refused(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists, config = AMBIGUOUS[family]
    model = save(family, config, tmp_path / "full")
    capsys.readouterr()
    words = ["compress", "--model", str(model), "--plan", CUT, "--out", str(tmp_path / "bundle")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in (family, lists, "architectures/families.py", "gpt2, opt, bloom", "--blocks PATH"):
        assert part in said
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_family_that_cannot_be_checked_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 8}
    model = save("biogpt", config, tmp_path / "full")
    capsys.readouterr()
    words = ["compress", "--model", str(model), "--plan", CUT, "--out", str(tmp_path / "bundle")]
    assert main(words) == 2
    assert "cannot be checked on 12 tokens: index out of range" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_blocks_chooses_among_several_lists(tmp_path: Path) -> None:
    config = AMBIGUOUS["gemma3n_text"][1]
    model = save("gemma3n_text", config, tmp_path / "full")
    (notice,) = cut(model, tmp_path / "bundle", plan="2-2-2", blocks="model.layers")
    assert "by path as 'model.layers'" in notice
    assert open_bundle(tmp_path / "bundle").arch.recognised == "path"
    assert torch.equal(logits_of(stock(tmp_path / "bundle")), logits_of(stock(model)))
    for method in ("full", "bottleneck"):
        adapter, out = tmp_path / f"adapter-{method}", tmp_path / f"plugged-{method}"
        make_adapter(tmp_path / "bundle", adapter, method=method, noise=0.05)
        plug_in(PlugInConfig(model=str(model), adapter=str(adapter), out=str(out)))
        assert not torch.equal(logits_of(load_model(out)), logits_of(stock(model)))


def test_every_verb_can_use_a_model_whose_blocks_had_to_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save("gemma3n_text", AMBIGUOUS["gemma3n_text"][1], tmp_path / "full")
    tiny_tokenizer().save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 40)
    bundle, adapter, tuned = (str(tmp_path / name) for name in ("bundle", "adapter", "tuned"))
    cut(model, Path(bundle), plan="2-2-2", blocks="model.layers")
    train = ["--data", str(text), "--max-steps", "1", "--batch-size", "1", "--seq-len", "16"]
    baseline = ["finetune", "--model", str(model), *train, "--out", tuned]
    evaluate = ["evaluate", "--model", str(model), "--text", str(text), "--seq-len", "16"]
    inspect = ["inspect", str(model)]
    for words in (baseline, evaluate, inspect):
        assert main(words) == 2
        assert "--blocks PATH" in capsys.readouterr().err
    named = ["--blocks", "model.layers"]
    assert main([*baseline, *named]) == 0
    assert main([*evaluate, *named]) == 0
    assert main([*inspect, *named]) == 0
    assert main(["finetune", "--bundle", bundle, *train, "--out", adapter]) == 0
    artefacts = ["--bundle", bundle, "--adapter", adapter, "--bound", adapter]
    assert main([*evaluate, *artefacts, "--finetuned", tuned]) == 0


def test_blocks_works_on_the_command_line_and_names_what_it_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks, config = RECOGNISED["mpt"]
    model = save("mpt", config, tmp_path / "full")
    words = ["compress", "--model", str(model), "--plan", CUT, "--out", str(tmp_path / "bundle")]
    capsys.readouterr()
    assert main([*words, "--blocks", "transformer.block"]) == 2
    assert f"did you mean {blocks!r}" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
    assert main([*words, "--blocks", blocks]) == 0
    assert "by path" in capsys.readouterr().err
    assert open_bundle(tmp_path / "bundle").plan.kept == KEPT


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("2-1-2", r"block 4 .* keys and values of block 2, .*emulator block and adapter block"),
        ("adapter=0,5 emulator=2,3,4", r"block 5 .* of block 3, .*emulator block and adapter"),
        ("adapter=0,1 emulator=2,3", r"block 4 .* of block 2, .*emulator block and dropped block"),
    ],
)
def test_shared_keys_and_values_are_not_separated(plan: str, reason: str, tmp_path: Path) -> None:
    model = save("gemma3n_text", {**_GEMMA3N, "num_kv_shared_layers": 2}, tmp_path / "full")
    with pytest.raises(FamilyError, match=reason):
        cut(model, tmp_path / "bundle", plan=plan)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_who_shares_is_what_transformers_says() -> None:
    for layer_types in ([_SLIDING, _FULL] * 3, [_FULL, _SLIDING, _SLIDING, _FULL, _FULL, _SLIDING]):
        config = AutoConfig.for_model(
            "gemma3n_text", **{**_GEMMA3N, "layer_types": layer_types, "num_kv_shared_layers": 2}
        )
        arch = resolve_architecture(config)
        producers = {i for i, mode in enumerate(config.kv_sharing_modes) if mode == "store"}
        refused = set()
        for block in range(4):
            kept = tuple(index for index in range(6) if index != block)
            plan = SplitPlan(num_blocks=6, adapter=kept, emulator=())
            try:
                check_separable(config, arch, plan)
            except FamilyError as error:
                if "keys and values" in str(error):
                    refused.add(block)
        assert refused == producers


def test_a_whole_plan_separates_nothing() -> None:
    config = AutoConfig.for_model("gemma3n_text", **{**_GEMMA3N, "num_kv_shared_layers": 2})
    whole = parse_plan("2-2-2", 6, lambda middle, _: list(middle))
    check_separable(config, resolve_architecture(config), whole)
