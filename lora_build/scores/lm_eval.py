"""EleutherAI's lm-evaluation-harness as a scorer: its tasks by name, its metrics as `TASK/METRIC`, its JSON kept.

It is installed apart: pip install 'lora-build[lm-eval]'. The harness' own tasks read data sets of the Hub, by its own
rules. Tasks of a folder are YAML that may name Python to import, so they are read only where commands are allowed.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError
from lora_build.files.identity import Digest
from lora_build.files.readback import read_file
from lora_build.models.architecture import FAULTS, quiet
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.scored import PlannedScore
from lora_build.scores.data import located
from lora_build.scores.interface import Metrics, ScoredBuild, failed
from lora_build.scores.models import device_of, model_of

_MOST_FILES, _MOST_ENTRIES, _MOST_BYTES = 1_000, 5_000, 256 << 20
_KEPT = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True, slots=True)
class LmEval:
    """Tasks of the harness."""

    version: int = 1
    is_remembered: bool = True

    def plan(self, score: PlannedScore) -> PlannedScore:
        """Return the score with the digest of the folder of its tasks, and the harness' version."""
        where = f"scores.{score.name}.lm_eval"
        if importlib.util.find_spec("lm_eval") is None:
            raise RecipeError(f"{where}: lm-evaluation-harness is not installed; pip install 'lora-build[lm-eval]'")
        options = {**score.options, "harness": importlib.metadata.version("lm_eval")}
        if score.options["folder"] is None:
            return replace(score, options=options)
        folder = located(score, "folder")
        files = _files(folder, f"{where}.folder")
        told = [[path.relative_to(folder).as_posix(), Digest.sha256(read_file(path))] for path in files]
        digest = Digest.sha256(canonical_json(told))
        return replace(score, options=options, data=folder, data_digest=digest, command=("lm_eval", str(folder)))

    def device(self, score: PlannedScore) -> str:
        """Return what it will run on."""
        return device_of(score)

    def measure(self, score: PlannedScore, build: ScoredBuild) -> Metrics:
        """Return the metrics of each task, and the harness' own JSON of them."""
        import lm_eval  # type: ignore[import-not-found]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
        from transformers import AutoTokenizer

        options, model = score.options, model_of(score, build)
        tasks = options["tasks"] if isinstance(options["tasks"], list) else [options["tasks"]]
        folder = None if score.data is None else str(score.data)
        try:
            with quiet(), contextlib.redirect_stdout(io.StringIO()):
                tokenizer = AutoTokenizer.from_pretrained(build.folder, local_files_only=True, trust_remote_code=False)
                found = lm_eval.simple_evaluate(
                    model=HFLM(pretrained=model.model, tokenizer=tokenizer, batch_size=int(options["batch_size"])),
                    tasks=tasks, num_fewshot=options["num_fewshot"], limit=options["limit"],
                    task_manager=TaskManager(include_path=folder), log_samples=False, bootstrap_iters=0,
                )  # fmt: skip
        except (*FAULTS, SystemExit) as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise failed(score, f"the harness cannot go on: {why[:300]}") from error
        build.tell(score.name, 1, 1)
        return Metrics(metrics=_metrics(found["results"]), details=_plain({key: found.get(key) for key in _KEPT}))


def _files(folder: Path, where: str) -> list[Path]:
    """Return the files in a folder, which may be the wrong one and hold a whole disk; no link to a folder is followed.

    Raises:
        RecipeError: there are too many, or they are too large.
    """
    found: list[Path] = []
    waiting, num_entries, num_bytes = [folder], 0, 0
    try:
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    num_entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif entry.is_file():
                        found.append(Path(entry.path))
                        num_bytes += entry.stat().st_size
                    if len(found) > _MOST_FILES or num_entries > _MOST_ENTRIES or num_bytes > _MOST_BYTES:
                        most = f"{_MOST_FILES} files, {_MOST_ENTRIES} files and folders, or {_MOST_BYTES >> 20} MiB"
                        raise RecipeError(f"{where}: {folder} has more than {most}; is it the right one?")
    except OSError as error:
        raise RecipeError(f"{where}: {error.filename or folder}: cannot be read ({error.strerror})") from error
    return sorted(found)


def _metrics(results: Any) -> dict[str, float]:
    """Return the numbers of each task: `arc_easy/acc` of `acc,none`, `gsm8k/exact_match/strict-match` of a filter."""
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if comma and is_number and not metric.endswith("_stderr"):
                found["/".join([task, metric, *([] if chosen == "none" else [chosen])])] = float(value)
    return found


def _plain(value: Any) -> Any:
    """Return what JSON has of a value, numbers that are none as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return json.loads(json.dumps(value, default=str))
