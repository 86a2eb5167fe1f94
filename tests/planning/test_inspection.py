"""`lora-build inspect`: what an adapter is, how large its updates are, whether it fits a base."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_build
from lora_build.cli import main as app
from lora_build.planning.inspection import inspecting
from lora_build.planning.inspection.result import AdaptedParameter, Inspection
from makers import hub_server, small
from makers.zoo import Adapter, Base, Zoo

PREFIX = "base_model.model."
LLAMA = Base(arch="llama")


def factors_of(folder: Path) -> dict[str, Tensor]:
    return {n.removeprefix(PREFIX): t.double() for n, t in load_file(folder / "adapter_model.safetensors").items()}


def dense_norms(folder: Path, scaling: float | Callable[[str], float]) -> dict[str, float]:
    """The norm of each update, from the whole product."""
    tensors = factors_of(folder)
    found = {}
    for name in (n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")):
        B, A = tensors[f"{name}.lora_B.weight"].flatten(1), tensors[f"{name}.lora_A.weight"].flatten(1)
        found[name] = float(((scaling(name) if callable(scaling) else scaling) * (B @ A)).norm())
    return found


def norms(found: Inspection) -> dict[str, float | None]:
    return {adapted.path: adapted.norm for adapted in found.adapted}


def by_path(found: Inspection) -> dict[str, AdaptedParameter]:
    return {adapted.path: adapted for adapted in found.adapted}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = app.main(["inspect", *words])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, an adapter and nothing else, to be in."""
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what it is ---------------------------------------------------------------------------------------------


def test_an_adapter_that_peft_saved_is_described_by_its_config_and_its_tensors(zoo: Zoo) -> None:
    path = zoo.adapter(LLAMA, Adapter(rank=4, alpha=8))
    found = lora_build.inspect(path)

    assert (found.peft_type, found.variants, found.is_ok, found.fit) == ("LORA", (), True, None)
    assert found.config["base_model_name_or_path"] == str(zoo.base(LLAMA))
    assert found.dtypes == {"F32": 28}
    assert found.num_tensors == 28
    assert found.size_bytes == (path / "adapter_model.safetensors").stat().st_size
    assert len(found.adapted) == 14
    assert {(a.rank, a.alpha, a.scaling) for a in found.adapted} == {(4, 8.0, 2.0)}
    assert by_path(found)["model.layers.1.mlp.down_proj"].shape == (32, 48)


@pytest.mark.parametrize(
    ("options", "scaling"),
    [((), 2.0), ((("use_rslora", True),), 4.0), ((("use_dora", True),), 2.0), ((("lora_bias", True),), 2.0)],
)
def test_norms_are_those_of_the_whole_product(zoo: Zoo, options: tuple[Any, ...], scaling: float) -> None:
    base = Base(arch="gpt2")  # its layers have a bias
    path = zoo.adapter(base, Adapter(options=options))
    found = lora_build.inspect(path)
    expected: dict[str, Any] = dense_norms(path, scaling)
    for name, bias in factors_of(path).items():
        if name.endswith(".lora_B.bias"):
            expected[name.replace("lora_B.bias", "bias")] = scaling * float(bias.norm())

    assert norms(found) == pytest.approx(expected, rel=1e-9)
    assert found.norm == pytest.approx(math.hypot(*expected.values()), rel=1e-9)
    assert [a.norm for a in found.measured] == sorted(norms(found).values(), reverse=True)  # type: ignore[type-var]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_of_16_bits_are_measured_exactly(zoo: Zoo, dtype: str) -> None:
    path = zoo.adapter(LLAMA, Adapter(dtype=dtype))

    assert norms(lora_build.inspect(path)) == pytest.approx(dense_norms(path, 2.0), rel=1e-9)


def test_patterns_give_each_module_its_rank_alpha_and_scaling(zoo: Zoo) -> None:
    patterns = (("rank_pattern", {"q_proj": 2, "layers.1.mlp.up_proj": 8}), ("alpha_pattern", {"k_proj": 3}))
    found = lora_build.inspect(path := zoo.adapter(LLAMA, Adapter(options=patterns)))
    modules = by_path(found)

    assert modules["model.layers.0.self_attn.q_proj"].rank == 2
    assert modules["model.layers.0.self_attn.k_proj"].alpha == 3.0
    assert modules["model.layers.1.mlp.up_proj"].scaling == 1.0
    assert norms(found) == pytest.approx(dense_norms(path, lambda name: modules[name].scaling or 0.0), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "variants"),
    [
        ({"use_rslora": True, "use_dora": True}, ("rsLoRA", "DoRA")),
        ({"init_lora_weights": "pissa_niter_4"}, ("PiSSA",)),
        ({"init_lora_weights": "eva"}, ("EVA",)),
        ({"alora_invocation_tokens": [1]}, ("aLoRA",)),
        ({"init_lora_weights": True}, ()),
    ],
)
def test_variants_are_called_by_their_names(tmp_path: Path, options: dict[str, Any], variants: tuple[str, ...]) -> None:
    assert lora_build.inspect(small.make_adapter(tmp_path / "math", **options)).variants == variants


def test_saved_modules_and_trained_biases_are_told_apart(zoo: Zoo) -> None:
    options = (("modules_to_save", ["ln_f"]), ("bias", "all"))
    found = lora_build.inspect(zoo.adapter(Base(arch="gpt2"), Adapter(targets=("c_fc",), options=options)))
    kinds = {whole.parameter: whole.kind for whole in found.whole}

    assert kinds.pop("transformer.ln_f.weight") == "modules_to_save"
    assert kinds.pop("transformer.ln_f.bias") == "modules_to_save"
    assert kinds["transformer.h.0.mlp.c_fc.bias"] == "bias"
    assert set(kinds.values()) == {"bias"}


def test_a_base_s_own_tensor_that_was_saved_along_is_called_frozen(zoo: Zoo) -> None:
    found = lora_build.inspect(zoo.adapter(LLAMA, Adapter(targets=("embed_tokens", "q_proj"))))

    assert [(w.parameter, w.kind, w.shape) for w in found.whole] == [("model.embed_tokens.weight", "frozen", (128, 32))]
    assert by_path(found)["model.embed_tokens"].shape == (128, 32)


def test_an_embedding_is_measured(zoo: Zoo) -> None:
    path = zoo.adapter(LLAMA, Adapter(targets=("embed_tokens", "q_proj")))
    A, B = (factors_of(path)[f"model.embed_tokens.lora_embedding_{letter}"] for letter in "AB")

    assert norms(lora_build.inspect(path))["model.embed_tokens"] == pytest.approx(float((2 * B @ A).norm()), rel=1e-9)


def test_a_kernel_and_an_attention_s_out_proj_are_measured(tmp_path: Path) -> None:
    shapes = {"conv": ((2, 6, 3, 3), (8, 2, 1, 1)), "attn.base_layer.out_proj": ((2, 6), (6, 2))}
    folder = small.make_adapter(tmp_path / "math", target_modules=["conv", "attn"])
    save_file(
        {
            f"{PREFIX}{module}.lora_{letter}.weight": small.values(i, *shape, dtype=torch.float32)
            for module, pair in shapes.items()
            for i, (letter, shape) in enumerate(zip("AB", pair, strict=True))
        },
        folder / "adapter_model.safetensors",
    )
    expected = dense_norms(folder, 2.0)
    found = lora_build.inspect(folder)

    assert by_path(found)["conv"].shape == (8, 6, 3, 3)
    # peft applies the update of an attention's out_proj twice
    assert norms(found) == pytest.approx(
        {"conv": expected["conv"], "attn.out_proj": 2 * expected["attn.base_layer.out_proj"]}, rel=1e-9
    )


def test_trained_tokens_are_counted(zoo: Zoo) -> None:
    path = zoo.adapter(LLAMA, Adapter(options=(("trainable_token_indices", [1, 5, 9]),)))
    (tokens,) = lora_build.inspect(path).tokens

    assert (tokens.module, tokens.num_tokens, tokens.indices) == ("model.embed_tokens", 3, (1, 5, 9))


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_a_stack_of_experts_is_measured_expert_by_expert_and_summed(tmp_path: Path, arch: str) -> None:
    zoo = Zoo(tmp_path)
    adapter = Adapter(experts=True, options=(("rank_pattern", {"mlp.experts.down_proj": 2}),))
    path = zoo.adapter(Base(arch=arch), adapter)
    found = lora_build.inspect(path, zoo.base(Base(arch=arch)))
    stacks = [a for a in found.adapted if ".experts." in a.path]

    assert {a.parameter for a in stacks} == {"gate_up_proj", "down_proj"}
    assert found.is_ok, found.problems
    for adapted in stacks:
        assert adapted.shape is not None
        A, B = (load_file(path / "adapter_model.safetensors")[key].double() for key in adapted.tensors)
        num_experts = adapted.shape[0]
        assert (A.shape[0], B.shape[1]) == (num_experts * (adapted.rank or 0),) * 2
        whole = torch.einsum(
            "oke,eki->eoi", B.reshape(B.shape[0], -1, num_experts), A.reshape(num_experts, -1, A.shape[1])
        )
        assert whole.shape == adapted.shape
        assert adapted.norm == pytest.approx(float((whole * (adapted.scaling or 0.0)).norm()), rel=1e-9)


def test_other_methods_are_described_and_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ia3"
    path.mkdir()
    save_file(
        {f"{PREFIX}{m}.ia3_l": small.values(1, 8, 1, dtype=torch.float32) for m in small.MODULES},
        path / "adapter_model.safetensors",
    )
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (path / "adapter_config.json").write_text(json.dumps(config))
    found = lora_build.inspect(path, small.make_base(tmp_path / "base"))

    assert [a.module for a in found.adapted] == small.MODULES
    assert norms(found) == dict.fromkeys(small.MODULES)
    assert found.norm is None
    assert found.fit is not None
    assert [touched.operation for touched in found.fit.touched] == ["merge", "merge"]
    assert "norm      not computed for IA3" in run(capsys, str(path))[1]


def test_what_an_adapter_shares_among_its_modules_is_no_parameter_that_it_changes(zoo: Zoo) -> None:
    found = lora_build.inspect(zoo.adapter(LLAMA, Adapter(method="Vera", targets=("q_proj",))), zoo.base(LLAMA))

    assert len(found.shared) == 2
    assert found.fit is not None
    assert [touched.adapted for touched in found.fit.touched] == [(f"{a.module}.weight",) for a in found.adapted]


# --- what is wrong with it ----------------------------------------------------------------------------------


def test_updates_that_are_zero_are_named_as_untrained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.edit(folder / "math", layers__1__self_attn__q_proj__lora_B__weight=torch.zeros(8, 2))
    found = lora_build.inspect("math")

    assert found.untrained == (small.MODULES[1],)
    assert found.is_ok
    assert f"untrained 1 of 2 updates, zero: {small.MODULES[1]}" in run(capsys, "math")[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_is_named_with_its_first_place(
    folder: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    B = small.values(3, 8, 2, dtype=torch.float32)
    B[5, 1] = B[6, 0] = value
    small.edit(folder / "math", layers__1__self_attn__q_proj__lora_B__weight=B)
    found = lora_build.inspect("math")
    code, out, _ = run(capsys, "math", "--json")

    (problem,) = found.problems
    key = f"{PREFIX}{small.MODULES[1]}.lora_B.weight"
    assert f"'{key}' is not finite: {value} at [5, 1], 2 of 16 elements in all" in problem
    assert [a.norm is None for a in found.adapted] == [False, True]
    assert found.norm is None
    assert code == 2
    assert json.loads(out, parse_constant=pytest.fail)["ok"] is False


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"alora_invocation_tokens": [1]}, "math/adapter_config.json: alora_invocation_tokens: aLoRA acts only after"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type PROMPT_TUNING cannot be merged: it adds virtual tokens"),
        ({"r": 0}, "r: expected a whole number from 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj': expected a whole number from 1"),
        ({"rank_pattern": {"q_proj": 1}}, "adapter_config.json says rank 1 for it"),
        ({"r": 3}, "adapter_config.json says rank 3 for it"),
    ],
)
def test_what_cannot_be_merged_is_said_without_a_base(
    folder: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], said: str
) -> None:
    path = small.make_adapter(folder / "odd" / "math", **config)
    code, out, err = run(capsys, str(path))

    assert (code, err) == (2, "")
    assert "problem   adapters.math" in out
    assert said in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_magic": torch.zeros(2)}, "does not start with 'base_model.model.'"),
        ({"base_model__model__x__lora_magic__weight": torch.zeros(2)}, "nothing here consumes tensor"),
        ({"layers__0__self_attn__q_proj__lora_B__weight": None}, "has lora_A.weight but no lora_B.weight"),
        ({"layers__0__self_attn__q_proj__lora_B__weight": torch.zeros(8, 2, dtype=torch.int8)}, "is I8; merging needs"),
    ],
)
def test_tensors_that_nothing_can_use_are_problems(folder: Path, change: dict[str, Tensor | None], said: str) -> None:
    small.edit(folder / "math", **change)
    found = lora_build.inspect("math")

    assert len(found.problems) == 1
    assert said in found.problems[0]


# --- whether it fits a base ---------------------------------------------------------------------------------


def test_an_adapter_that_fits_names_the_tensors_it_touches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lora_build.inspect("math", "base")
    code, out, err = run(capsys, "./math", "--base", "./base")

    assert found.fit is not None
    assert [(t.name, t.operation, t.adapted) for t in found.fit.touched] == [
        (f"{m}.weight", "merge", (f"{m}.weight",)) for m in small.MODULES
    ]
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == [
        "fits      ./base, 3 tensors: 2 merged, 1 as they are",
        "note      whether the base is complete is not checked: config.json does not say how wide the model is",
    ]
    assert sorted(p.name for p in folder.iterdir()) == ["base", "math"]


def test_names_that_differ_on_disk_are_shown_once_for_all_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], zoo: Zoo
) -> None:
    zoo = Zoo(tmp_path)
    base, adapter = Base(arch="mixtral"), Adapter(experts=True)
    experts = run(capsys, str(zoo.adapter(base, adapter)), "--base", str(zoo.base(base)))[1]
    gpt2 = Base(arch="gpt2", bare=True)
    prefix = run(capsys, str(zoo.adapter(Base(arch="gpt2"), Adapter())), "--base", str(zoo.base(gpt2)))[1]

    assert "model.layers.*.mlp.experts.gate_up_proj  -> model.layers.*." in experts
    assert "renamed   transformer.*  -> *  x 8" in prefix


def test_a_base_of_another_shape_is_refused_with_the_issues_that_plan_has(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small.make_base(folder / "other")
    small.edit(folder / "other", layers__0__self_attn__q_proj__weight=torch.zeros(8, 5))
    with pytest.raises(lora_build.PlanError) as refused:
        lora_build.build({"base": "./other", "adapters": {"math": "./math"}, "output": {"dir": "./out"}})
    code, out, err = run(capsys, "math", "--base=other")
    data = json.loads(run(capsys, "math", "--base=other", "--json")[1])

    assert code == 2
    assert out.splitlines()[-1] == "fits      not into ./other: 1 issue"
    assert err == f"error: {refused.value}\n"
    assert data["fit"]["issues"] == list(refused.value.issues)


def test_a_problem_that_is_an_issue_too_is_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.edit(folder / "math", layers__0__self_attn__q_proj__lora_B__weight=None)
    _, out, err = run(capsys, "math", "--base", "base")

    assert "problem" not in out
    assert err.count("has lora_A.weight but no lora_B.weight") == 1


# --- the command line ---------------------------------------------------------------------------------------


def test_a_usual_adapter_takes_no_more_than_25_lines(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    path = zoo.adapter(LLAMA, Adapter(options=(("modules_to_save", ["lm_head"]), ("use_dora", True))))
    code, out, err = run(capsys, str(path), "--base", str(zoo.base(LLAMA)))
    lines = out.splitlines()

    assert (code, err) == (0, "")
    assert len(lines) <= 25
    assert "\x1b" not in out
    assert lines[1].startswith("type      DoRA (LORA), saved by peft ")
    assert "modules   14: rank 4, alpha 8, scaling 2" in lines
    assert "saved     1 tensor (16.4 kB), in place of the base's: lm_head.weight [128, 32]" in lines


def test_json_holds_everything_by_module(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "math", "--base", "base", "--json")
    data = json.loads(out, parse_constant=pytest.fail)

    assert code == 0
    assert set(data) == {
        "adapted", "config", "digest", "dtypes", "fit", "norm", "num_tensors", "ok", "peft_type", "problems", "schema", "shared",
        "size_bytes", "source", "tokens", "training_only", "untrained", "variants", "whole",
    }  # fmt: skip
    assert set(data["fit"]) == {"base", "config_changes", "issues", "notes", "num_tensors", "touched"}
    assert data["adapted"][0] == {
        "module": small.MODULES[0],
        "parameter": "weight",
        "tensors": [f"{PREFIX}{small.MODULES[0]}.lora_{letter}.weight" for letter in "AB"],
        "shape": [8, 6],
        "rank": 2,
        "alpha": 4.0,
        "scaling": 2.0,
        "norm": pytest.approx(dense_norms(folder / "math", 2.0)[small.MODULES[0]], rel=1e-9),
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "inspect takes one adapter, found none; lora-build inspect ADAPTER [--base BASE]"),
        (("math", "base"), "inspect takes one adapter, found 'math' and 'base'"),
        (("math", "--base"), "--base: expected a value after it, found nothing"),
        (("math", "--base=base", "--base", "base"), "--base: is there twice, as 'base' and 'base'"),
        (("math", "--base="), "--base: expected a value after it, found nothing"),
        (("math", "--bse", "base"), "unknown option '--bse'; did you mean '--base'?"),
        (("recipe=demo",), "; try: lora-build plan recipe=demo"),
        (("mth",), "adapter: there is no folder 'mth' here, and a Hub repository is org/name; did you mean 'math'?"),
        (("./mth",), "adapters.mth: ./mth does not exist"),
        (("./mth",), "; did you mean 'math'?"),
        (("a/b/mth",), "adapter: there is no folder 'a/b/mth' here, and a Hub repository is org/name"),
        (("math", "--base", "a/b/c"), "base: there is no folder 'a/b/c' here, and a Hub repository is org/name"),
        (("runs/checkpoint-50",), "nor is there a folder runs/checkpoint-50 here; did you mean 'checkpoint-500'?"),
        (("base",), "has no adapter_config.json, so it is no PEFT adapter; found config.json, model.safetensors"),
        (("base",), "it looks like a whole model, such as a base or a merged one"),
        (("math", "--base", "math"), "it is an adapter, not the model it was trained on"),
        (("math/adapter_model.safetensors",), "is a file; expected the folder that holds it: math"),
        (("run/adapter_model.bin",), "pickled weights are never opened: convert them to safetensors"),
        (("run",), "adapters.run: has no adapter_model.safetensors"),
        (("runs",), "an adapter lies in checkpoint-500"),
        (("https://huggingface.co/acme/math",), "write acme/math, and set HF_ENDPOINT for another Hub"),
        (("git@huggingface.co:acme/math",), "write acme/math, and set HF_ENDPOINT for another Hub"),
        (
            ("https://me:it's@hub/math?token=a",),
            "found 'https://***@hub/math?***'; write math, and set HF_ENDPOINT",
        ),
        (("acme/math",), "acme/math is not in the cache and HF_HUB_OFFLINE is set"),
    ],
)
def test_a_usual_mistake_gets_one_line_that_helps(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    (folder / "run").mkdir()
    (folder / "run/adapter_config.json").write_text(json.dumps(small.ADAPTER_CONFIG))
    (folder / "run/adapter_model.bin").write_bytes(b"PK")
    small.make_adapter(folder / "runs/checkpoint-500")
    code, out, err = run(capsys, *words)

    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_help_and_tab_know_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--base BASE" in run(capsys, "--help")[1]
    monkeypatch.setenv("COMP_LINE", "lora-build ins")
    app.main(["-sc", "query=bash"])
    assert capsys.readouterr().out.split() == ["inspect"]


def test_a_folder_of_the_name_is_meant_before_a_repository(folder: Path) -> None:
    small.make_adapter(folder / "acme" / "math")

    assert lora_build.inspect("acme/math").source == "./acme/math"
    assert lora_build.inspect(Path("math")).source == "./math"


def test_describing_without_weights_needs_no_torch() -> None:
    code = "import sys, lora_build.planning.inspection.inspecting; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- on the Hub ---------------------------------------------------------------------------------------------


def test_a_repository_is_read_at_the_revision_that_is_named(tmp_path: Path) -> None:
    base, math_ = small.make_base(tmp_path / "base", shards=True), small.make_adapter(tmp_path / "math")
    with hub_server.serve({"acme/base": base, "acme/math": math_}) as hub:
        settings = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                    "HF_HOME": str(tmp_path / "hf")}  # fmt: skip
        commit = hub.commit("acme/math")

        def inspect(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "lora_build", "inspect", *words]
            (tmp_path / "elsewhere").mkdir(exist_ok=True)
            return subprocess.run(command, env=settings, cwd=tmp_path / "elsewhere", capture_output=True, text=True)

        done = inspect(f"acme/math@{commit}", "--base", "acme/base", "--json")
        wrong = inspect("acme/base")
        lost = inspect("acme/math@v9")
        shards = [r for r in hub.requests if "model-0000" in r[1] and r[0] == "GET"]

    data = json.loads(done.stdout)
    local = inspecting.inspect(math_, base)
    assert (done.returncode, done.stderr) == (0, "")
    assert data["source"] == f"hf://acme/math@{commit}"
    assert (data["norm"], data["digest"]) == (local.norm, local.digest)
    assert all(wanted and wanted.startswith("bytes=") for _, _, wanted in shards)
    assert (wrong.returncode, lost.returncode) == (2, 2)
    assert "it looks like a whole model" in wrong.stderr
    assert "acme/math has no revision 'v9'" in lost.stderr
