"""How the output's tensors are cut into files."""

import pytest

from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import BASE
from lora_build.planning.operations import Copy
from lora_build.planning.shards import lay_out


def tensor(name: str, size_bytes: int) -> Copy:
    info = TensorInfo(source=BASE, file="a", name=name, dtype="U8", shape=(size_bytes,), start=0, end=size_bytes)
    return Copy(name=name, dtype="U8", source=info)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((40, 60, 1, 100, 150, 10), ["01", "2", "3", "4", "5"]),  # 150 alone is more than a file may have
        ((40, 60), ["01"]),
        ((150, 1), ["0", "1"]),
    ],
)
def test_a_file_is_begun_where_the_next_tensor_would_make_it_too_large(
    sizes: tuple[int, ...], expected: list[str]
) -> None:
    shards = lay_out([tensor(str(i), n) for i, n in enumerate(sizes)], limit_bytes=100, homes={}, files=())

    assert ["".join(op.name for op in shard.operations) for shard in shards] == expected
    num = len(expected)
    names = [f"model-{i:05d}-of-{num:05d}.safetensors" for i in range(1, num + 1)] if num > 1 else ["model.safetensors"]
    assert [shard.file for shard in shards] == names
