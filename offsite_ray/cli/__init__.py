# SPDX-License-Identifier: Apache-2.0
"""The command line ``offsite-ray``: one verb per step; stdout has the result and nothing else."""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import traceback
import warnings
from typing import TYPE_CHECKING

from offsite_ray import __version__
from offsite_ray.cli.arguments import help_text, parse, wants_help
from offsite_ray.cli.output import ensure_streams, printable, show, stdout_reserved, write
from offsite_ray.cli.recording import running
from offsite_ray.cli.verbs import VERBS
from offsite_ray.errors import ConfigError, OffsiteError, unknown_name
from offsite_ray.uris import scrubbed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offsite_ray.cli.verb import Verb

__all__ = ["main"]

TRACEBACK = "OFFSITE_RAY_TRACEBACK"
"""Environment variable: show tracebacks and the warnings of libraries."""

_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin at a barrier are many times slower where another process has the core.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Set before libraries are imported, where the user has not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        argv: The words behind the program's name; by default those of the process, whose stdout
            then takes nothing more after the result.
    """
    ensure_streams()
    try:
        return _dispatch(sys.argv[1:] if argv is None else list(argv), own=argv is None)
    except OffsiteError as error:
        _complain(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except Exception as error:
        hint = "" if _wants_traceback() else f" (set {TRACEBACK}=1 for the traceback)"
        _complain(f"error: {type(error).__name__}: {textwrap.shorten(str(error), 500)}{hint}")
        return 1


def _dispatch(words: list[str], *, own: bool) -> int:
    first, rest = (words[0], words[1:]) if words else ("--help", [])
    if first in ("-h", "--help"):
        write(sys.stdout, _help())
    elif first == "--version":
        write(sys.stdout, f"offsite-ray {__version__}")
    elif first.startswith("-"):
        flag = first.partition("=")[0]
        raise ConfigError(
            f"flag {flag!r} stands before the verb; write 'offsite-ray VERB {flag}', with one of "
            f"{', '.join(VERBS)}"
        )
    elif first not in VERBS:
        raise ConfigError(unknown_name("verb", first, VERBS))
    elif wants_help(rest):
        write(sys.stdout, help_text(VERBS[first]).rstrip("\n"))
    else:
        _run(VERBS[first], rest, own=own)
    return 0


def _run(verb: Verb, words: list[str], *, own: bool) -> None:
    request = parse(verb, words, VERBS)
    _prepare_libraries()
    with stdout_reserved(for_good=own) as stdout, warnings.catch_warnings():
        if not _wants_traceback():
            warnings.simplefilter("ignore")
        with running(verb, request) as made:
            outcome = verb.run(request.config)
            made(outcome.plain)
            show(outcome, stdout, as_json=request.json)
            if outcome.then is not None:
                outcome.then()


def _prepare_libraries() -> None:
    """Tell libraries, before they are imported, how to run and to keep their news to themselves."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # transformers imports DeepSpeed, which sets its own level and warns where there is no GPU
    logging.getLogger("DeepSpeed").addFilter(_is_worth_saying)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or _wants_traceback()


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb.name:<{width}}  {verb.summary}" for verb in VERBS.values())
    return f"""usage: offsite-ray VERB [flags] [KEY=VALUE ...]

Offsite-tuning on Ray: adapt a model to data when neither may leave its house.

verbs, in the order of the loop:
{verbs}

with every verb:
  --config FILE  YAML file with values, by field name
  --json         print the result as one JSON object
  --run NAME     keep a record in a directory of that name below --runs DIR
  -h, --help     print the verb's flags

offsite-ray --version prints the version. Exit status: 0 done, 2 your mistake, 130 stopped
by Ctrl-C, 1 anything else."""


def _wants_traceback() -> bool:
    return os.environ.get(TRACEBACK, "") not in ("", "0")


def _complain(message: str) -> None:
    """Print one line on stderr, below the traceback where that is wanted."""
    if _wants_traceback():
        traceback.print_exc()
    line = scrubbed(printable(" ".join(message.split())))
    print(f"offsite-ray: {line}", file=sys.stderr, flush=True)
