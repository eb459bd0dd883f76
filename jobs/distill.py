# SPDX-License-Identifier: Apache-2.0
r"""From a full model to a distilled emulator on a Ray cluster, as a job, by one recipe.

ray job submit --address http://HEAD:8265 --working-dir . -- \
    python jobs/distill.py --root /mnt/storage --config jobs/recipes/opt-1.3b.yaml

Runs offsite-ray compress, prepare and distill with the recipe, but for what is there already; so
the same command goes on with a run that was stopped. A recipe that has nothing below prepare and
distill makes an emulator that is not distilled. VERB.KEY=VALUE sets something else for one
verb, e.g. distill.num_workers=4. Paths in a recipe are below --root, which every node must see.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.cli import main as offsite_ray
from offsite_ray.cli.arguments import parse
from offsite_ray.cli.settings import sections_of
from offsite_ray.cli.verbs import VERBS
from offsite_ray.data import is_prepared
from offsite_ray.errors import ConfigError, OffsiteError
from offsite_ray.results import to_plain
from offsite_ray.storage import is_published
from offsite_ray.uris import scrubbed, shown

if TYPE_CHECKING:
    from offsite_ray.config import (
        CompressConfig,
        DistillConfig,
        EstimateConfig,
        PrepareConfig,
    )

STEPS = ("compress", "prepare", "distill")


def main(argv: list[str]) -> int:
    """Run the steps whose result is not there; return the exit status of the first that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help="recipe")
    parser.add_argument("--root", default=".", help="folder that the recipe's paths are below")
    parser.add_argument("--dry-run", action="store_true", help="print plan, estimate and resources")
    parser.add_argument("--run", help="keep records under NAME-compress and so on", metavar="NAME")
    parser.add_argument("--runs", help="directory of records, below --root", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="VERB.KEY=VALUE")
    args = parser.parse_args(argv)
    try:
        args.config = str(Path(args.config).resolve())
        words = words_of_steps(args.config, args.overrides)
        os.chdir(args.root)
        configs = [parse(VERBS[step], words[step], VERBS).config for step in words]
        if args.dry_run and len(configs) < len(STEPS):
            raise ConfigError(f"--dry-run says what distilling takes, and {args.config} does none")
        if args.dry_run:
            return say(args.config, *configs)
        done = is_there(list(words)[-1], configs[-1].out)
        for step, config in zip(words, configs, strict=True):
            if done or is_there(step, config.out):
                print(f"{step}: {shown(config.out)} is there already, skipped", file=sys.stderr)
            elif status := offsite_ray([step, *words[step], *record_of(step, args)]):
                return status
    except (OffsiteError, OSError) as error:
        print(f"offsite-ray: error: {scrubbed(str(error))}", file=sys.stderr)
        return getattr(error, "exit_status", 2)
    return 0


def record_of(step: str, args: argparse.Namespace) -> list[str]:
    """Return the flags of a step by which a record of it is kept."""
    name = [] if args.run is None else ["--run", f"{args.run}-{step}"]
    return name + ([] if args.runs is None else ["--runs", args.runs])


def is_there(step: str, out: str) -> bool:
    """Return whether a step's result is there, whole."""
    return is_prepared(out) if step == "prepare" else is_published(out)


def say(
    recipe: str, compress: CompressConfig, prepare: PrepareConfig, distill: DistillConfig
) -> int:
    """Print what distill would take, as JSON, also where its bundle is yet to be made."""
    from offsite_ray.estimate import dry_run

    words = ["--config", recipe, f"model={distill.model}", f"plan={compress.plan}"]
    asked: EstimateConfig = parse(VERBS["estimate"], words, VERBS).config
    given = replace(
        asked,
        plan=compress.plan,
        select=compress.select,
        blocks=compress.blocks,
        seq_len=prepare.block_size,
    )
    print(json.dumps(to_plain(dry_run(distill, given)), indent=2))
    return 0


def words_of_steps(recipe: str, overrides: list[str]) -> dict[str, list[str]]:
    """Return the words behind each verb that has a section, or all; in the order of the steps.

    Raises:
        ConfigError: A word is of no verb here.
        StorageError: The recipe cannot be read.
    """
    for word in overrides:
        if word.partition(".")[0] not in STEPS:
            raise ConfigError(f"{word!r} begins with none of {', '.join(f'{s}.' for s in STEPS)}")
    of = {step: [w for w in overrides if w.startswith(f"{step}.")] for step in STEPS}
    sections = sections_of(recipe, STEPS)
    return {
        step: ["--config", recipe, *of[step]]
        for step in STEPS
        if not sections or step in sections or of[step]
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
