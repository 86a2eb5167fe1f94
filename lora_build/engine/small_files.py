"""The small files of a run: config.json and its like, the index, and what goes along with the weights."""

from collections.abc import Callable, Mapping

from lora_build.files.identity import FileKey, FileRecord, SourceName
from lora_build.files.sources import Source, digest, read_hashed
from lora_build.files.targets import Files
from lora_build.planning.plan import MergePlan


def fetch(plan: MergePlan, sources: Mapping[SourceName, Source], *, quiet: bool) -> None:
    """Have every input on this machine before a byte is written; what is small there is held to the lock at once."""
    for role, names in plan.input_files.items():
        for name in names:
            sources[role].path(name, quiet=quiet)
            file = sources[role].files[name]
            if file.locked is not None and file.promised is not None and file.promised.is_git:
                digest(sources[role], name)


def write_small_files(
    plan: MergePlan, sources: Mapping[SourceName, Source], target: Files, progress: Callable[[int], object]
) -> tuple[list[FileRecord], dict[FileKey, FileRecord]]:
    """Write all files but the weights; return their records, and those of what they were made of."""
    files, inputs = [], {}
    for name, data in plan.texts.items():
        files.append(target.write(name, data))
        progress(len(data))
    for role, names in plan.input_files.items():
        for name in names:
            is_copied = plan.side_files.get(name) == role
            if name.endswith(".safetensors") and not is_copied:
                continue
            data, sha256 = read_hashed(sources[role], name)  # once: what is recorded is what is copied
            inputs[FileKey(role, name)] = FileRecord(path=name, size_bytes=len(data), sha256=sha256)
            if is_copied:
                files.append(target.write(name, data))
                progress(len(data))
    return files, inputs
