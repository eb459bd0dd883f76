# SPDX-License-Identifier: Apache-2.0
"""Every mistake a user can make: one clear line, exit status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offsite_ray.cli import main
from offsite_ray.cli.arguments import parse
from offsite_ray.cli.verbs import VERBS
from offsite_ray.data import write_blocks
from offsite_ray.finetuning import finetune
from offsite_ray.training import run_here
from tests.adapters import make_adapter
from tests.conftest import ROOT
from tests.damage import edit_json
from tests.disks import small_disk
from tests.loops import Stopped, stop_after
from tests.tiny_models import save_tiny, tiny_tokenizer

if TYPE_CHECKING:
    from tests.loops import Loop

TRAIN = "--max-steps 2 --batch-size 2 --seq-len 16"
FINETUNE = f"finetune --bundle {{bundle}} --out {{out}} {TRAIN} --data"
DISTILL = f"distill --model {{model}} --out {{out}} --num-workers 0 {TRAIN}"
EVALUATE = "evaluate --model {model}"
MEASURE = f"{EVALUATE} --text {{text}} --seq-len 16"
TASK = f"{EVALUATE} --tasks arc_easy --task-limit 2"

MISSING = [
    ("compress --model {missing} --plan 1-2-1 --out {out}", "missing is no directory"),
    ("compress --model {text} --plan 1-2-1 --out {out}", "text.txt is no directory"),
    ("compress --model {folder} --plan 1-2-1 --out {out}", "no config.json"),
    ("compress --model {unweighted} --plan 1-2-1 --out {out}", "model.safetensors"),
    ("unpack --bundle {missing} --out {out}", "missing is no directory"),
    ("prepare --tokenizer {missing} --text {text} --out {out}", "missing is no directory"),
    ("prepare --tokenizer {folder} --text {text} --out {out}", "no usable tokenizer"),
    ("prepare --tokenizer {bundle} --text {missing} --out {out}", "missing does not exist"),
    (f"{DISTILL} --bundle {{missing}} --data {{text}}", "missing"),
    ("finetune --bundle {missing} --out {out} --data {text}", "missing"),
    ("finetune --model {missing} --out {out} --data {text}", "missing is no directory"),
    (f"{FINETUNE} {{missing}}", "missing does not exist"),
    ("plug-in --model {model} --adapter {missing} --out {out}", "missing"),
    ("plug-in --model {missing} --adapter {adapter} --out {out}", "missing is no directory"),
    ("evaluate --model {missing} --text {text}", "missing is no directory"),
    (f"{MEASURE} --bundle {{missing}}", "missing"),
    (f"{MEASURE} --bundle {{bundle}} --adapter {{missing}}", "missing"),
    (f"{MEASURE} --finetuned {{missing}}", "missing"),
    (f"{EVALUATE} --text {{missing}}", "missing does not exist"),
    ("inspect {missing}", "missing"),
    ("verify {missing}", "missing"),
    ("verify {bundle} --model {missing}", "missing is no directory"),
    ("demo --foundation {missing} --out {out}", "--foundation DIR"),
    ("inspect {model} --config {missing}", "cannot read --config"),
    ("inspect {model} --config {folder}", "cannot read --config"),
]

WRONG_KIND = [
    ("compress --model {adapter} --plan 1-2-1 --out {out}", "no config.json"),
    ("finetune --bundle {model} --out {out} --data {text}", "offsite.json"),
    ("finetune --bundle {adapter} --out {out} --data {text}", "adapter_bundle"),
    (f"{DISTILL} --bundle {{adapter}} --data {{text}}", "adapter_bundle"),
    (f"{DISTILL} --bundle {{hollow}} --data {{text}}", "no emulator block"),
    ("plug-in --model {model} --adapter {bundle} --out {out}", "emulator_bundle"),
    ("plug-in --model {model} --adapter {model} --out {out}", "offsite.json"),
    ("plug-in --model {bundle} --adapter {adapter} --out {out}", "blocks"),
    (f"{MEASURE} --bundle {{adapter}}", "adapter_bundle"),
    (f"{MEASURE} --bundle {{bundle}} --adapter {{bundle}}", "emulator_bundle"),
    (f"{MEASURE} --bound {{adapter}}", "no bound"),
    (f"{MEASURE} --finetuned {{adapter}}", "no config.json"),
    (f"{MEASURE} --bundle {{keep_all}} --adapter {{adapter}}", "not trained against"),
    ("verify {model}", "offsite.json"),
    ("inspect {folder}", "no config.json"),
    ("plug-in --model {llama} --adapter {adapter} --out {out}", "is a llama"),
    ("plug-in --model {stranger} --adapter {adapter} --out {out}", "is not the model that"),
    ("verify {bundle} --model {stranger}", "is not the model that"),
    ("distill --model {llama} --bundle {bundle} --data {text} --out {out}", "is a llama"),
    ("compress --model {bottleneck} --plan 1-2-1 --out {out}", "has bottleneck adapters"),
    ("finetune --model {bottleneck} --data {text} --out {out}", "has bottleneck adapters"),
    ("unpack --bundle {adapter} --out {out}", "'adapter_bundle'"),
    ("unpack --bundle {bundle} --out {out}", "is packed: stock transformers loads it"),
    (f"{MEASURE} --finetuned {{packed}}", "'offsite-ray unpack'"),
    ("compress --model {packed} --plan 1-1-1 --out {out}", "'offsite-ray unpack'"),
]

DAMAGED = [
    ("compress --model {truncated} --plan 1-2-1 --out {out}", "model.safetensors"),
    ("finetune --model {truncated} --out {out} --data {text}", "model.safetensors"),
    ("finetune --bundle {truncated_bundle} --out {out} --data {text}", "model.safetensors"),
    (f"{DISTILL} --bundle {{truncated_bundle}} --data {{text}}", "model.safetensors"),
    ("plug-in --model {truncated} --adapter {adapter} --out {out}", "model.safetensors"),
    ("plug-in --model {model} --adapter {truncated_adapter} --out {out}", "adapter.safetensors"),
    ("evaluate --model {truncated} --text {text}", "model.safetensors"),
    (f"{MEASURE} --finetuned {{truncated}}", "model.safetensors"),
    ("inspect {truncated}", "model.safetensors"),
    ("verify {truncated_bundle}", "model.safetensors"),
    ("verify {altered_data}", "part-00000.parquet is missing or was altered"),
    ("verify {foreign_data} --model {bundle}", "was prepared with another tokenizer"),
    ("compress --model {unknown_family} --plan 1-2-1 --out {out}", "did you mean 'gpt2'?"),
]

TEXTS = [
    (f"{FINETUNE} {{short}}", "fewer than a block of 16"),
    (f"{DISTILL} --bundle {{bundle}} --data {{short}}", "fewer than a block of 16"),
    ("prepare --tokenizer {bundle} --text {short} --out {out}", "fewer than a block of 512"),
    ("prepare --tokenizer {bundle} --text {text} --block-size 1 --out {out}", "at least 2"),
    (f"{FINETUNE} {{one_block}}", "held out"),
    (f"{FINETUNE} {{empty}}", "nothing to predict"),
    (f"{EVALUATE} --text {{empty}}", "none of them has 2 tokens"),
    (f"{FINETUNE} {{folder}}", "holds no file of .txt"),
    (f"{FINETUNE} {{latin}}", "cannot be read as .txt"),
    (f"{FINETUNE} {{broken_rows}}", "line 2 is no JSON"),
    (f"{FINETUNE} {{nameless_rows}}", 'line 1 is none of {"text"}'),
    (f"{FINETUNE} {{broken_parquet}}", "cannot be read as .parquet"),
    (f"{FINETUNE} {{chat}}", "no chat template"),
    (f"{EVALUATE} --text {{chat}}", "no perplexity of their own"),
    (f"{FINETUNE} {{table}}", "none of .txt"),
    (f"{FINETUNE} no/such-dataset", "no dataset either"),
    (f"{FINETUNE} {'long' * 70}.txt", "does not exist"),
    (f"{FINETUNE} {{foreign_data}}", "another tokenizer"),
    (f"{DISTILL} --bundle {{bundle}} --data {{foreign_data}}", "another tokenizer"),
    (f"{MEASURE} --finetuned {{foreign}}", "another tokenizer"),
    (f"{FINETUNE} {{data}} {{text}}", "give it alone"),
    (f"{FINETUNE} {{altered_data}}", "was altered"),
    (f"{FINETUNE} {{wide_data}}", "not seq_len=16"),
    ("finetune --bundle {bundle} --data {long_data} --out {out}", "64 positions"),
    ("finetune --bundle {bundle} --data {text} --seq-len 65 --out {out}", "64 positions"),
    (f"{EVALUATE} --text {{text}} --seq-len 65", "64 positions"),
]

VALUES = [
    ("compress --model {model} --plan 1-2-1 --out {out} --frobnicate", "unknown flag"),
    ("compress --model {model} --plan 1-2-1 --out {out} selct=uniform", "mean 'select'?"),
    ("compress --model {model} --config {yaml} --out {out}", "unknown key 'pln'; did you mean"),
    ("compress --model {model} --plan 3-2-2 --out {out}", "needs 7 blocks, the full model has 6"),
    ("compress --model {model} --plan 0-2-0 --out {out}", "adapter"),
    ("compress --model {model} --plan adapter=0,6 --out {out}", "plan 'adapter=0,6'"),
    ("compress --model {model} --plan 'adapter=0,6 emulator=2' --out {out}", "6"),
    ("compress --model {model} --plan 1-2-1 --out {out} --select best", "selection method 'best'"),
    ("compress --model {model} --plan 1-2-1 --out {out} --compress zip", "method 'zip'"),
    ("compress --model {model} --plan 1-2-1 --out {out} --compress prune:2", "0 <= RATIO < 1"),
    (
        "compress --model {model} --plan 1-2-1 --out {out} --compress low_rank_aware:0.5",
        "give some with --calibration FILE",
    ),
    (f"{FINETUNE} {{text}} --method lorra", "mean 'lora'?"),
    (f"{FINETUNE} {{text}} --learning-rate fast", "must be a finite number"),
    (f"{FINETUNE} {{text}} --batch-size 0", "batch_size=0 must be at least 1"),
    (f"{FINETUNE} {{text}} --zero-stage 2", "zero_stage=2 needs Ray Train workers"),
    (f"{MEASURE} --task-path {{folder}}", "need the --tasks"),
    (f"{FINETUNE} {{text}} --checkpoint-every 0", "checkpoint_every=0 must be at least 1"),
    (f"{FINETUNE} {{text}} --weight-decay=-1", "weight_decay=-1.0 must be 0 or a positive"),
    (f"{FINETUNE} {{text}} --seed=-1", "seed=-1 must be at least 0"),
    (f"{FINETUNE} {{text}} --method lora --lora-alpha 0", "lora_alpha=0.0 must be a positive"),
    (f"{DISTILL} --bundle {{bundle}} --data {{text}} --lm-weight=-1", "lm_weight=-1.0 must be 0"),
    (f"{FINETUNE} {{text}} --dtype fp8", "must be one of fp32, bf16"),
    (f"{FINETUNE} {{text}} --blocks transformer.h", "goes with --model"),
    (f"{FINETUNE} {{text}} --model {{model}}", "give either --bundle"),
    (
        f"{DISTILL} --bundle {{bundle}} --data {{text}} --mse-weight 1",
        "unknown flag '--mse-weight'",
    ),
    (f"{MEASURE} --adapter {{adapter}}", "--adapter needs the --bundle"),
    (f"{EVALUATE}", "nothing to measure"),
    (f"{MEASURE} --batch-size 0", "batch_size=0 must be at least 1"),
    (
        f"{TASK} --task-limit 0 --task-data arc_easy={{questions}}",
        "task_limit=0 must be at least 1",
    ),
    (f"{TASK} --num-fewshot=-1 --task-data arc_easy={{questions}}", "num_fewshot=-1 must be"),
    (f"{EVALUATE} --tasks arc_esy", "did you mean 'arc_easy'?"),
    (f"{TASK} --task-data {{questions}}", "not of the form TASK=FILE"),
    (f"{TASK} --task-data arc_easy={{missing}}", "there is no file"),
    (f"{TASK} --task-data piqa={{questions}}", "names task 'piqa', which is not run"),
    (f"{TASK} --task-data arc_easy={{rows}}", "row 1 has no"),
    (f"{TASK} --task-data arc_easy={{broken_rows}}", "line 2 is not JSON"),
    (f"{TASK} --task-data arc_easy={{out_of_range}}", "answer=4 must be an index"),
    (f"{TASK}", "--task-data arc_easy=FILE"),
    (f"{TASK} --task-path {{missing}}", "no such file or directory"),
    (f"{TASK} --task-path {{folder}}", "no task in"),
    (f"{TASK} --task-path {{broken_yaml}}", "is no task"),
]

TAKEN = [
    ("compress --model {model} --plan 1-2-1 --out {taken}", "is not empty"),
    ("compress --model {model} --plan 1-2-1 --out {file}", "is in the way"),
    ("compress --model {model} --plan 1-2-1 --out {file}/out", "is no directory"),
    ("unpack --bundle {packed} --out {taken}", "is not empty"),
    ("prepare --tokenizer {bundle} --text {text} --out {taken}", "is not empty"),
    ("distill --model {model} --bundle {bundle} --data {text} --out {taken}", "not empty"),
    ("finetune --bundle {bundle} --data {text} --out {taken}", "is not empty"),
    ("finetune --bundle {bundle} --data {text} --out {file}/out", "is no directory"),
    ("plug-in --model {model} --adapter {adapter} --out {taken}", "is not empty"),
    (f"{MEASURE} --out {{taken}}", "is a directory"),
    (f"{MEASURE} --out {{file}}/out", "is no directory"),
    (f"{MEASURE} --report {{file}}", "is no directory"),
    ("demo --out {taken}", "is not empty"),
]


@dataclass(frozen=True)
class Inputs:
    """Everything that the command lines above name, good and bad."""

    root: Path

    def fill(self, line: str, out: Path) -> list[str]:
        """Return the words of a command line, with the paths of what it names."""
        names = {path.name.partition(".")[0]: str(path) for path in self.root.iterdir()}
        line = line.format(**names, missing=self.root / "missing", out=out / "new" / "artefact")
        return shlex.split(line)


@pytest.fixture(scope="module")
def inputs(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    for source in (loop.model, loop.bundle, loop.keep_all):
        shutil.copytree(source, root / source.name.replace("-", "_"))
    make_adapter(loop.bundle, root / "adapter", noise=0.1)
    _write_models(root)
    _write_texts(root, loop)
    _write_prepared(root)
    for name in ("file", "taken/file"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("there")
    return Inputs(root)


def _write_models(root: Path) -> None:
    (root / "folder").mkdir()
    save_tiny("llama", root / "llama")
    save_tiny("gpt2", root / "stranger", seed=1)
    for name, source in (("truncated", "model"), ("unweighted", "model"), ("foreign", "model")):
        shutil.copytree(root / source, root / name)
    for name, source in (("truncated_bundle", "bundle"), ("truncated_adapter", "adapter")):
        shutil.copytree(root / source, root / name)
    for name in ("truncated", "truncated_bundle", "truncated_adapter"):
        (file,) = (root / name).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-1000])
    (root / "unweighted/model.safetensors").unlink()
    tiny_tokenizer(64).save_pretrained(root / "foreign")
    shutil.copytree(root / "model", root / "unknown_family")
    edit_json(root / "unknown_family/config.json", lambda values: values.update(model_type="gtp2"))
    main(shlex.split(f"compress --model {root}/model --plan 1-0-1 --out {root}/hollow"))
    words = f"compress --model {root}/model --plan 1-2-1 --compress quantize:8 --out {root}/packed"
    main(shlex.split(words))
    with tempfile.TemporaryDirectory() as folder:
        make_adapter(root / "bundle", Path(folder) / "adapter", method="bottleneck")
        words = f"plug-in --model {root}/model --adapter {folder}/adapter --out {root}/bottleneck"
        main(shlex.split(words))


def _write_texts(root: Path, loop: Loop) -> None:
    question = {"question": "Q", "choices": ["a", "b"], "answer": 1}
    texts = {
        "text.txt": loop.text.read_text(),
        "short.txt": "hello",
        "one_block.txt": "a" * 15,
        "empty.txt": "",
        "rows.jsonl": loop.rows.read_text(),
        "broken_rows.jsonl": json.dumps({**question, "text": "a"}) + '\n{"text": "a\n',
        "nameless_rows.jsonl": '{"body": "a"}\n',
        "chat.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n',
        "table.csv": "text\na\n",
        "broken_parquet.parquet": "PAR1 but no more",
        "questions.jsonl": json.dumps(question) + "\n",
        "out_of_range.jsonl": json.dumps({**question, "answer": 4}) + "\n",
        "yaml.yaml": "pln: 1-2-1\n",
        "broken_yaml.yaml": "task: [",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))


def _write_prepared(root: Path) -> None:
    text = [str(root / "text.txt")]
    write_blocks(text, root / "bundle", 16, root / "data")
    write_blocks(text, root / "bundle", 32, root / "wide_data")
    write_blocks(text, root / "bundle", 128, root / "long_data")
    write_blocks(text, root / "foreign", 16, root / "foreign_data")
    shutil.copytree(root / "data", root / "altered_data")
    pq.write_table(pa.table({"input_ids": [[1] * 16]}), root / "altered_data/part-00000.parquet")


def tree(*roots: Path) -> list[str]:
    return sorted(str(path) for root in roots for path in root.rglob("*"))


@pytest.mark.parametrize(
    ("line", "said"), [*MISSING, *WRONG_KIND, *DAMAGED, *TEXTS, *VALUES, *TAKEN]
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    before = tree(inputs.root, tmp_path)
    status = main(inputs.fill(line, tmp_path))
    out, err = capfd.readouterr()
    assert (status, out) == (2, ""), err
    assert err.startswith("offsite-ray: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert tree(inputs.root, tmp_path) == before


FULL_DISKS = [
    ("compress --model {model} --plan 1-2-1 --out {out}", 16384),
    ("prepare --tokenizer {bundle} --text {text} --block-size 2 --out {out}", 1024),
    ("plug-in --model {model} --adapter {adapter} --out {out}", 16384),
    (f"{FINETUNE} {{text}} --checkpoint-every 9", 8192),
    (f"{FINETUNE} {{data}} --checkpoint-every 9", 16384),
    (f"{FINETUNE} {{data}} --checkpoint-every 1", 16384),
    (f"{FINETUNE} {{data}} --checkpoint-every 1", 65536),
    (f"{DISTILL} --bundle {{bundle}} --data {{data}} --checkpoint-every 9", 16384),
    ("finetune --model {model} --data {data} --out {out} --max-steps 1", 16384),
    (f"{EVALUATE} --seq-len 16 --out {{out}} --text {'{one_block} ' * 99}", 4096),
    (f"{MEASURE} --report {{out}}", 4096),
]


@pytest.mark.parametrize(("line", "size"), FULL_DISKS)
def test_a_full_disk_is_said_and_leaves_nothing(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str, size: int
) -> None:
    with small_disk(tmp_path, size):
        status = main(inputs.fill(line, tmp_path))
        left = tree(tmp_path)
    out, err = capfd.readouterr()
    assert (status, out) == (2, ""), err
    *_, last = err.splitlines()
    assert last.startswith("offsite-ray: error: ")
    assert "No space left on device" in last or "File too large" in last
    assert "Traceback" not in err
    assert left == []


def test_a_run_is_resumed_only_as_it_was(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = inputs.fill(f"{FINETUNE} {{text}} --checkpoint-every 1", tmp_path)
    with pytest.raises(Stopped):
        finetune(parse(VERBS["finetune"], words[1:], VERBS).config, run_here, stop_after(2))
    before = tree(tmp_path)
    assert any("checkpoint-" in name for name in before)
    for changed, said in (
        ("", "--resume"),
        ("--resume --weight-decay 1", "weight_decay was 0.0 and is 1.0"),
        ("--resume --method lora", "method was 'full' and is 'lora'"),
        ("--resume --seq-len 8", "seq_len was 16 and is 8"),
    ):
        assert main([*words, *changed.split()]) == 2
        _, err = capfd.readouterr()
        assert said in err
        assert err.count("\n") == 1
        assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("finetune --bundle nowhere --data nothing.txt --out out", "nowhere"),
        (f"{DISTILL} --bundle {{truncated_bundle}} --data {{text}}", "model.safetensors"),
        (f"{FINETUNE} {{short}}", "fewer than a block of 16"),
    ],
)
def test_a_process_of_its_own_ends_as_well(
    inputs: Inputs, tmp_path: Path, line: str, said: str
) -> None:
    command = [sys.executable, "-m", "offsite_ray", *inputs.fill(line, tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("offsite-ray: error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert tree(tmp_path) == []
