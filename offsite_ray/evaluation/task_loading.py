# SPDX-License-Identifier: Apache-2.0
"""Which lm-eval tasks are run, and on which documents: stock ones by name, own ones from YAML.

Tasks are built once and run on every setting, so that all settings answer the same documents with
the same examples in their prompts.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import ConfigError, DataError, StorageError, did_you_mean, first_line
from offsite_ray.evaluation.task_data import FEWSHOT, parse_task_data, task_rows
from offsite_ray.uris import is_uri, refuse_uri

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_LOCAL_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""Values of ``dataset_path`` that read the files of ``data_files``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTasks:
    """Tasks with their documents, ready to be run on one model after the other."""

    loaded: Any
    """lm-eval's own ``TaskDict``."""
    limit: int | None
    """Documents of each task; None is all."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every single task, those of groups and tags spelled out."""
        return tuple(self.loaded["tasks"])


def load_tasks(
    names: Sequence[str],
    *,
    task_data: Sequence[str] = (),
    task_path: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> LoadedTasks:
    """Build tasks and read their documents.

    Args:
        names: Tasks, groups or tags: of ``task_path`` first, then of lm-eval.
        task_data: ``TASK=FILE`` entries, see :mod:`offsite_ray.evaluation.task_data`.
        task_path: Directories or YAML files with own tasks; files of documents that they name are
            relative to the YAML's folder.
        limit: Documents of each task.
        num_fewshot: Examples in each prompt; a task that says 0 keeps its 0.

    Raises:
        ConfigError: A task is unknown, or an entry names a task that is not run.
        DataError: Documents cannot be read, or do not fit the task.
    """
    from lm_eval.tasks import TaskManager

    files = parse_task_data(task_data)
    for path in task_path:
        refuse_uri("--task-path", path)
    configs = _own_configs(task_path)
    wanted = [name for requested in names for name in _members(requested, configs)]
    configs |= {name: config for name in wanted if (config := _stock_config(name, configs))}
    # Reading the YAML of every stock task takes seconds, so only where a name needs it.
    manager = TaskManager(include_defaults=not all(name in configs for name in wanted))
    specs = [_spec(name, configs, files, manager) for name in dict.fromkeys(wanted)]
    for task in set(files) - {spec["task"] for spec in specs if isinstance(spec, dict)}:
        raise ConfigError(
            f"--task-data names task {task!r}, which is not run"
            f"{did_you_mean(task, wanted)} (run: {', '.join(wanted)})"
        )
    with quiet():
        loaded = manager.load([built for spec in specs for built in _built(manager, spec)])
    for task in loaded["tasks"].values():
        _set_fewshot(task, num_fewshot)
    return LoadedTasks(loaded=loaded, limit=limit)


def _own_configs(task_path: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the configurations of own tasks and groups by name, with absolute data files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    configs: dict[str, dict[str, Any]] = {}
    for file in _yaml_files(task_path):
        try:
            config = load_yaml(file)
        except Exception as error:
            raise DataError(f"{file} is no task: {first_line(error)}") from error
        name = config.get("group", config.get("task"))
        if isinstance(name, str):
            configs[name] = _with_absolute_files(config, file)
    if task_path and not configs:
        raise ConfigError(f"no task in {', '.join(task_path)}; a task's YAML has the key 'task'")
    return configs


def _yaml_files(task_path: Sequence[str]) -> Iterator[Path]:
    for entry in task_path:
        path = Path(entry).expanduser().absolute()
        if not path.exists():
            raise StorageError(f"--task-path {entry}: there is no such file or directory")
        yield from sorted(path.rglob("*.yaml")) if path.is_dir() else [path]


def _with_absolute_files(config: dict[str, Any], file: Path) -> dict[str, Any]:
    options = config.get("dataset_kwargs")
    if config.get("dataset_path") not in _LOCAL_BUILDERS or not isinstance(options, dict):
        return config
    return {
        **config,
        "dataset_kwargs": {
            key: _absolute(value, file) if key in ("data_files", "data_dir") else value
            for key, value in options.items()
        },
    }


def _absolute(value: Any, file: Path) -> Any:
    """Return ``value`` with each path in it relative to the folder of ``file``."""
    if isinstance(value, dict):
        return {key: _absolute(item, file) for key, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item, file) for item in value]
    if not isinstance(value, str) or is_uri(value):
        return value
    path = file.parent / value
    if not any(file.parent.glob(value) if not Path(value).is_absolute() else [path]):
        raise DataError(f"{file} names {value!r}, and there is no {path}")
    return str(path)


def _members(name: str, configs: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return ``name``, or the tasks of it if it is a group of ``--task-path``."""
    members = configs.get(name, {}).get("task")
    if not isinstance(members, list):
        return [name]
    return [leaf for member in members for leaf in _members(_member_name(member), configs)]


def _member_name(member: Any) -> str:
    if not isinstance(member, str):
        raise ConfigError(f"a group of --task-path may only name its tasks, found {member!r}")
    return member


def _spec(
    name: str,
    configs: Mapping[str, dict[str, Any]],
    files: Mapping[str, dict[str, Path]],
    manager: Any,
) -> str | dict[str, Any]:
    """Return what lm-eval builds a task from: a name, or a configuration."""
    if name not in configs and name not in manager.all_tasks:
        known = [*configs, *manager.all_tasks]
        raise ConfigError(
            f"unknown task {name!r}{did_you_mean(name, known)} ('lm-eval ls tasks' lists lm-eval's;"
            " --task-path DIR adds your own)"
        )
    if name not in files:
        return configs.get(name, name)
    return _with_local_documents(name, configs.get(name) or _indexed_config(name, manager), files)


def _stock_config(name: str, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of lm-eval's task of that name, if its YAML has that name too."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    if name in own or not name.replace("_", "").replace("-", "").isalnum():
        return None
    found = list(Path(lm_eval.tasks.__file__).parent.rglob(f"{name}.yaml"))
    if len(found) != 1:
        return None
    config: dict[str, Any] = load_yaml(found[0])
    return config if config.get("task") == name else None


def _indexed_config(name: str, manager: Any) -> dict[str, Any]:
    """Return the configuration of a task from lm-eval's index of every YAML."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[name]
    if name not in manager.all_subtasks or entry.yaml_path is None:
        raise ConfigError(
            f"--task-data cannot give documents to {name!r}, a group of tasks; name its tasks"
        )
    config: dict[str, Any] = load_yaml(entry.yaml_path)
    return config


def _with_local_documents(
    name: str, config: Mapping[str, Any], files: Mapping[str, Mapping[str, Path]]
) -> dict[str, Any]:
    """Return the configuration of a task that reads its documents from the local files."""
    from datasets import Dataset

    if "class" in config:
        raise ConfigError(f"--task-data cannot give documents to {name!r}, a task in Python")
    columns = [] if config.get("process_docs") else _columns(config)
    splits = {}
    for role, path in files[name].items():
        try:
            splits[role] = Dataset.from_list(list(task_rows(name, path, columns)))
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: rows of different form: {first_line(error)}") from error
    if "test" not in splits:
        raise ConfigError(f"--task-data {name}:{FEWSHOT}=FILE needs {name}=FILE as well")
    examples = dict(config.get("fewshot_config") or {})
    split = None if "samples" in examples else (FEWSHOT if FEWSHOT in splits else "test")
    examples.pop("split", None)
    return {
        **config,
        "custom_dataset": lambda **_: splits,
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": split,
        "fewshot_config": examples or None,
    }


def _columns(config: Mapping[str, Any]) -> list[str]:
    """Return the columns that a task's templates read, as far as they are plain text."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    found: dict[str, None] = {}
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        template = config.get(key)
        if not isinstance(template, str):
            continue
        if template.isidentifier():
            found[template] = None
            continue
        try:
            parsed = Environment(autoescape=False).parse(template)
        except TemplateSyntaxError:
            continue
        found.update(dict.fromkeys(sorted(meta.find_undeclared_variables(parsed))))
    return list(found)


def _built(manager: Any, spec: str | dict[str, Any]) -> list[Any]:
    """Return lm-eval's task or group, or the tasks of a tag."""
    name = spec if isinstance(spec, str) else spec["task"]
    try:
        loaded = manager.load(spec)
    except Exception as error:
        raise DataError(
            f"task {name!r} cannot be built: {first_line(error)}; documents that are not on this "
            f"machine can be given as --task-data {name}=FILE"
        ) from error
    groups = loaded.get("groups") or {}
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    own = task.get_config("num_fewshot")
    if own is None or (own != 0 and num_fewshot is not None):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval and datasets from writing bars and notices that are none of the user's business.

    What is changed for that is as before afterwards.
    """
    import datasets
    import lm_eval.api.task as task_module

    had_bars = datasets.is_progress_bar_enabled()
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, task_module.tqdm
    logger.setLevel(logging.ERROR)
    # The loop over documents has a bar that no argument turns off.
    task_module.tqdm = partial(bar, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()
        task_module.tqdm = bar
        logger.setLevel(level)
