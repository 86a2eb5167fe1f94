"""Writes mergekit.json: what mergekit makes of two full models, for tests that hold combinations to it.

mergekit pins versions of torch and transformers that the tests do not have, so it is no test dependency. To write the
values anew, with mergekit 0.1.5 in an environment of its own:

    python tests/judges/mergekit_values.py PYTHON_WITH_MERGEKIT

The models are those of `makers/small.py`: a base in float32 and two builds of one adapter each, by lora-build.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

MODULES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
MERGES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "ties": {"merge_method": "ties", "density": 0.4},
    "ties of weights": {"merge_method": "ties", "density": 0.4, "weights": [0.7, 1.3], "normalize": False},
    "slerp": {"merge_method": "slerp", "t": 0.3},
}


def config(folder: Path, merge: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a merge of the models in a folder."""
    first, second = (str(folder / name) for name in ("math-model", "code-model"))
    if merge["merge_method"] == "slerp":
        parameters = {"t": merge["t"]}
        models = [{"model": first}, {"model": second}]
        return {
            "merge_method": "slerp",
            "base_model": first,
            "models": models,
            "parameters": parameters,
            "dtype": "float32",
        }
    models = [
        {"model": path, "parameters": {"weight": weight, "density": merge.get("density", 1.0)}}
        for path, weight in zip((first, second), merge.get("weights", [1.0, 1.0]), strict=True)
    ]
    shared = {"parameters": {"normalize": merge["normalize"]}} if "normalize" in merge else {}
    method = merge["merge_method"]
    return {"merge_method": method, "base_model": str(folder / "base"), "models": models, "dtype": "float32", **shared}


def main(python: str) -> None:
    """Make the models, merge them with mergekit, and record its tensors."""
    import torch
    from safetensors.torch import load_file

    import lora_build
    from makers import small

    with tempfile.TemporaryDirectory() as text:
        folder, found = Path(text), {}
        small.make_base(folder / "base", dtype=torch.float32)
        for name, seed in (("math", 50), ("code", 90)):
            small.make_adapter(folder / name, seed=seed)
            lora_build.build(small.recipe(folder, name, output={"dir": str(folder / f"{name}-model")}))
        for model in ("base", "math-model", "code-model"):  # mergekit knows what else a Llama has to have
            (folder / model / "config.json").write_text(json.dumps({"architectures": ["Plain"], "model_type": "llama"}))
        for name, merge in MERGES.items():
            (folder / "merge.yaml").write_text(json.dumps(config(folder, merge)))
            out = folder / name.replace(" ", "-")
            command = [
                python,
                "-m",
                "mergekit.scripts.run_yaml",
                str(folder / "merge.yaml"),
                str(out),
                "--no-copy-tokenizer",
            ]
            subprocess.run(command, check=True)
            tensors = load_file(next(out.glob("*.safetensors")))
            found[name] = {"merge": merge, "tensors": {n: tensors[n].double().tolist() for n in MODULES}}
    (HERE / "mergekit.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
