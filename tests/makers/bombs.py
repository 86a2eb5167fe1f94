"""Small inputs that could cost much, each tried in a process of its own; run by `test_refusals.py`, not imported.

    python tests/makers/bombs.py FOLDER      # prints {"name": ..., "seconds": ..., "mb": ..., "code": ..., "said": ...}

Nothing here imports torch, whose memory would be counted.
"""

import json
import os
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

BOMBS: dict[str, Callable[[Path], object]] = {}
MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
BASE = {"architectures": ["UnheardForCausalLM"], "model_type": "unheard", "tie_word_embeddings": False}
PREFIX = "base_model.model."


def file(header: bytes | dict[str, object], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors(shapes: dict[str, list[int]]) -> bytes:
    header: dict[str, object] = {}
    at = 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return file(header, bytes(at))


def factors(modules: list[str]) -> dict[str, list[int]]:
    return {f"{PREFIX}{m}.lora_{x}.weight": s for m in modules for x, s in (("A", [2, 6]), ("B", [8, 2]))}


def project(folder: Path) -> Path:
    for name in ("base", "math", "recipes"):
        (folder / name).mkdir(parents=True)
    (folder / "base/model.safetensors").write_bytes(
        tensors({f"{m}.weight": [8, 6] for m in MODULES} | {"norm.weight": [6]})
    )
    (folder / "base/config.json").write_text(json.dumps(BASE))
    (folder / "math/adapter_model.safetensors").write_bytes(tensors(factors(MODULES)))
    (folder / "math/adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\noutput: {dir: ./out}\n")
    return folder


def bomb(make: Callable[[Path], object]) -> None:
    BOMBS[make.__name__] = make


def config(folder: Path, **changes: object) -> None:
    (folder / "math/adapter_config.json").write_text(json.dumps(ADAPTER | changes))


def weights(folder: Path, data: bytes) -> None:
    (folder / "math/adapter_model.safetensors").write_bytes(data)


def recipe(folder: Path, text: str) -> None:
    (folder / "recipes/prod.yaml").write_text(text)


@bomb
def nested_repetition(f: Path) -> None:
    config(f, rank_pattern={"(?!x)([a-z.0-9_]+)+!": 2})


@bomb
def a_long_pattern(f: Path) -> None:
    config(f, alpha_pattern={"(" * 100_000: 2})


@bomb
def patterns_for_every_module(f: Path) -> None:
    weights(f, tensors(factors([f"model.layers.{i}.x.q_proj" for i in range(3000)])))
    config(f, rank_pattern={f"nev{i}r.*": 2 for i in range(3000)})


@bomb
def a_rank_of_a_thousand_million(f: Path) -> None:
    config(f, r=10**9)


@bomb
def a_rank_of_thousands_of_digits(f: Path) -> None:
    config(f, r=int("9" * 4000))


@bomb
def ten_million_layers(f: Path) -> None:
    config(f, layer_replication=[[0, 10**7]])


@bomb
def many_ranges_of_layers(f: Path) -> None:
    config(f, layer_replication=[[0, 1000]] * 100_000)


@bomb
def a_model_of_ten_million_layers(f: Path) -> None:
    (f / "base/config.json").write_text(json.dumps(BASE | {"num_hidden_layers": 10**7}))
    config(f, layer_replication=[[0, 10**7]])


@bomb
def tokens_without_end(f: Path) -> None:
    config(f, trainable_token_indices=list(range(600_000)), r=0)


@bomb
def a_deep_config(f: Path) -> None:
    (f / "math/adapter_config.json").write_text('{"a":' * 100_000)


@bomb
def a_config_of_many_values(f: Path) -> None:
    (f / "base/config.json").write_text('{"a": [' + "{}," * 3_000_000 + "0]}")


@bomb
def a_config_with_one_rare_character(f: Path) -> None:
    (f / "base/config.json").write_text('{"a": "' + "x" * 9_000_000 + '\U0001f600"}', encoding="utf-8")


@bomb
def a_large_index(f: Path) -> None:
    (f / "base/model.safetensors").unlink()
    with (f / "base/model.safetensors.index.json").open("w") as index:
        index.writelines(['{"weight_map": {', *['"a":"b",' * 1000] * 4_000, '"c":"d"}}'])


@bomb
def an_index_of_other_names(f: Path) -> None:
    names = {f"model.layers.{i}.weight": "model.safetensors" for i in range(100_000)}
    (f / "base/model.safetensors").rename(f / "base/model-1.safetensors")
    text = json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")})
    (f / "base/model.safetensors.index.json").write_text(text)


@bomb
def a_header_of_99_mb(f: Path) -> None:
    with (f / "math/adapter_model.safetensors").open("wb") as file:
        file.writelines([struct.pack("<Q", 99_000_008), b'{"a":[', *[b"[]," * 1000] * 33_000, b"0]"])


@bomb
def a_header_of_many_values(f: Path) -> None:
    weights(f, file(b'{"a":[' + b"[]," * 5_000_000 + b"0]}"))


@bomb
def a_header_as_full_as_may_be(f: Path) -> None:
    weights(f, file(b"{" + b",".join(b'"%x":[]' % i for i in range(250_000)) + b"}"))


@bomb
def a_deep_header(f: Path) -> None:
    weights(f, file(b'{"a":' + b"[" * 600 + b"]" * 600 + b"}"))


@bomb
def a_name_twice_among_many(f: Path) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    weights(f, file(("{" + ",".join(f'"t{i}":{entry}' for i in (*range(40_000), 39_999)) + "}").encode()))


@bomb
def a_name_of_a_million(f: Path) -> None:
    weights(f, tensors({"n" * 1_000_000: [1]}))


@bomb
def thousands_of_modules_of_another_base(f: Path) -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.q_proj" for i in range(40) for j in range(100)]
    (f / "base/model.safetensors").write_bytes(
        tensors({f"language.{n}.weight".replace("q_", "up_"): [8, 6] for n in names})
    )
    weights(f, tensors(factors(names)))


@bomb
def thousands_of_tensors_that_nobody_knows(f: Path) -> None:
    weights(f, tensors({f"{PREFIX}model.layers.{i}.q_proj.lora_X.weight": [1] for i in range(10_000)}))


@bomb
def thousands_of_new_parameters(f: Path) -> None:
    weights(f, tensors(factors(MODULES) | {f"{PREFIX}model.layers.{i}.up.weight": [1] for i in range(5_000)}))


@bomb
def doubling_references(f: Path) -> None:
    lines = (
        f"  a{i}: {{source: './x${{recipe.adapters.a{i + 1}.source}}${{recipe.adapters.a{i + 1}.source}}'}}\n"
        for i in range(32)
    )
    recipe(f, "base: ./base\nadapters:\n" + "".join(lines) + "  a32: {source: ./xxxxxxxx}\noutput: {dir: ./out}\n")


@bomb
def references_without_end(f: Path) -> None:
    recipe(f, "base: ./base\nadapters: {math: ./math}\ndescription: '" + "${recipe.name}" * 50_000 + "'\n")


@bomb
def references_to_everything(f: Path) -> None:
    lines = (f"  a{i}: '${{recipe.adapters}}'\n" for i in range(200))
    recipe(f, "base: ./base\nadapters:\n" + "".join(lines))


@bomb
def a_reference_with_deep_brackets(f: Path) -> None:
    recipe(
        f,
        "base: ./base\nadapters: {math: ./math}\ndescription: '" + "${recipe." * 20_000 + "name" + "}" * 20_000 + "'\n",
    )


@bomb
def thousands_of_unknown_keys(f: Path) -> None:
    recipe(f, "base: ./base\nadapters: {math: ./math}\n" + "".join(f"key{i}: 1\n" for i in range(80_000)))


@bomb
def thousands_of_adapters(f: Path) -> None:
    recipe(f, "base: ./base\nadapters:\n" + "".join(f"  a{i}: ./math\n" for i in range(30_000)))


@bomb
def a_name_as_long_as_a_file_may_be(f: Path) -> None:
    recipe(f, "base: ./base\nadapters: {math: ./math}\nname: " + "a" * 900_000 + "/\n")


@bomb
def a_number_of_many_digits(f: Path) -> None:
    recipe(f, "base: ./base\nadapters: {math: {source: ./math, weight: 0x" + "f" * 100_000 + "}}\n")


@bomb
def brackets_without_end(f: Path) -> None:
    recipe(f, "base: " + "[" * 500_000 + "\n")


def light(folder: Path, make: Callable[[Path], object]) -> dict[str, object]:
    """Return what came of one bomb, in this process, which is given up afterwards."""
    import lora_build
    from lora_build.errors import LoraBuildError

    make(project(folder))
    os.chdir(folder)
    started, said = time.process_time(), ""
    try:
        lora_build.plan(lora_build.load_recipe("prod"))
        code = 0
    except LoraBuildError as error:
        code, said = error.exit_code, str(error)
        longest = max(map(len, error.issues))
        said = said if longest <= 3000 else f"an issue of {longest} characters"
    except BaseException:  # noqa: BLE001  this is what is looked for
        code, said = -1, traceback.format_exc()[-500:]
    spent = time.process_time() - started
    spent += sum(os.times()[2:4])  # of processes that it started
    return {"code": code, "said": said, "seconds": round(spent, 2)}


def main(root: Path) -> None:
    """Light every bomb."""
    from lora_build.pipeline import prepare  # noqa: F401  what all of them import, once
    from lora_build.recipe.compose import load_recipe

    load_recipe("demo")
    chosen = sys.argv[2:] or list(BOMBS)
    for name in chosen:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reader)
            os.write(writer, json.dumps(light(root / name, BOMBS[name])).encode()[:60_000])
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read()
        _, _, used = os.wait4(child, 0)
        print(json.dumps({"name": name, "mb": used.ru_maxrss >> 10, **json.loads(told or "{}")}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
