"""Bad recipes and command lines."""

from makers.bad_inputs import RECIPE, Bad, added, bad, both, link, nothing, pipe, recipe, write


def weight(text: str) -> Bad:
    """Return a row with a weight, as YAML writes it."""
    keys = f"base: ./base\nadapters: {{math: {{source: ./math, weight: {text}}}}}\noutput: {{dir: ./out}}\n"
    return bad(recipe(keys), "adapters.math.weight: expected a", "number")


def revision(text: str) -> Bad:
    """Return a row with a revision that YAML reads as something else."""
    keys = f"base: {{source: acme/base, revision: {text}}}\nadapters: {{math: ./math}}\n"
    return bad(recipe(keys), "recipes/prod.yaml: base.revision", "put what you wrote in quotes")


def chain(length: int) -> str:
    """Return a recipe whose first source doubles with each of its adapters."""
    rows = (
        f"  a{i}: {{source: './x${{recipe.adapters.a{i + 1}.source}}${{recipe.adapters.a{i + 1}.source}}'}}\n"
        for i in range(length)
    )
    return f"base: ./base\nadapters:\n{''.join(rows)}  a{length}: {{source: ./xxxxxxxx}}\noutput: {{dir: ./out}}\n"


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)

ROWS: dict[str, Bad] = {
    "an unknown key": bad(added("safemerge: true\n"), "safemerge: unknown key", "did you mean 'safe_merge'?"),
    "80,000 unknown keys": bad(added("".join(f"key{i}: 1\n" for i in range(80_000))), "recipes/prod.yaml"),
    "no adapters": bad(recipe("base: ./base\noutput: {dir: ./out}\n"), "adapters"),
    "an empty list of adapters": bad(recipe("base: ./base\nadapters: []\noutput: {dir: ./out}\n"), "adapters"),
    "a key twice": bad(added("base: ./base\n"), "recipes/prod.yaml", "base", "line"),
    "a nested key twice": bad(
        recipe("base: ./base\nadapters: {math: {source: ./math, weight: 1, weight: 2}}\n"), "weight", "recipes/prod.yaml"
    ),
    "a Python tag": bad(added("description: !!python/object/apply:os.system ['touch pwned']\n"), "recipes/prod.yaml", "tag"),
    "aliases of aliases": bad(recipe(ALIASES + RECIPE), "recipes/prod.yaml"),
    "2 MB": bad(added("description: '" + "x" * (2 << 20) + "'\n"), "recipes/prod.yaml"),
    "100,000 lists in lists": bad(recipe("base: " + "[" * 100_000 + "\n"), "recipes/prod.yaml"),
    "50,000 mappings in mappings": bad(recipe("base: " + "{a: " * 50_000 + "\n"), "recipes/prod.yaml"),
    "interpolations that double": bad(recipe(chain(32)), "prod", "references", "write values out"),
    "interpolations that double, a short chain": bad(recipe(chain(12)), "prod", "references", "write values out"),
    "30,000 adapters": bad(
        recipe("base: ./base\noutput: {dir: ./out}\nadapters:\n" + "".join(f"  a{i}: ./math\n" for i in range(30_000))),
        "recipes/prod.yaml",
    ),
    "a revision that reads as infinity": revision("7e12345"),
    "a revision that reads as octal": revision("0012345"),
    "a revision with an underscore": revision("1_000"),
    "a revision that reads as a time": revision("12:34:56"),
    "a revision that reads as true": revision("on"),
    "a secret of the environment": bad(added("description: ${oc.env:HF_TOKEN}\n"), "description", "may be a secret"),
    "a secret within an interpolation": bad(added("description: '${recipe.${oc.env:HOME}}'\n"), "recipes/prod.yaml"),
    "a secret as the name of an adapter": bad(
        recipe("base: ./base\nadapters: {'${oc.env:HOME}': ./math}\noutput: {dir: ./out}\n"), "recipes/prod.yaml"
    ),
    "a secret on the command line": bad(
        nothing, "description", words=["recipe=prod", "description=${oc.env:HOME}"]
    ),
    "a secret in the output on the command line": bad(
        nothing, "output.dir", words=["recipe=prod", "output.dir=${oc.env:HOME}/x"]
    ),
    "Hydra's resolver": bad(added("description: '${hydra:runtime.cwd}'\n"), "recipes/prod.yaml", "description"),
    "interpolations in a circle": bad(added("description: ${recipe.name}\nname: ${recipe.description}\n"), "name", "Recursive"),
    "an interpolation of a key that is not there": bad(added("description: ${recipe.nothing}\n"), "prod", "description"),
    "an interpolation of itself": bad(added("description: ${recipe.description}\n"), "prod", "description"),
    "an interpolation of a mapping": bad(added("description: ${recipe.output}\n"), "prod", "description"),
    "an interpolation of the adapters in an adapter": bad(
        recipe("base: ./base\nadapters: {math: ./math, b: '${recipe.adapters}'}\noutput: {dir: ./out}\n"),
        "prod", "adapters.b",
    ),
    **{f"weight {text}": weight(text) for text in ("nan", ".nan", ".inf", "-.inf", "1e400", "abc", "true", "[1]")},
    "a weight of 5000 digits": bad(
        recipe(f"base: ./base\nadapters: {{math: {{source: ./math, weight: {'9' * 5000}}}}}\n"), "recipes/prod.yaml"
    ),
    "a weight that overflows the scale": bad(
        recipe("base: ./base\nadapters: {math: {source: ./math, weight: 1e308}}\noutput: {dir: ./out}\n"), "math", code=1
    ),
    **{
        f"dtype {text}": bad(added(f"dtype: {text}\n"), "dtype", "keep", "bfloat16")
        for text in ("bf15", "int8", "float64", "BF16", "1")
    },
    "two adapters of one name": bad(
        recipe("base: ./base\nadapters: [./math, ./x/math]\noutput: {dir: ./out}\n"), "adapters", "math"
    ),
    "adapter_names with a typing error": bad(added("adapter_names: [maht]\n"), "adapter_names", "maht", "math"),
    "a lone surrogate": bad(added('description: "\\ud800"\n'), "recipes/prod.yaml"),
    "not UTF-8": bad(write("recipes/prod.yaml", RECIPE.encode() + b"description: \xff\n"), "recipes/prod.yaml"),
    "UTF-16": bad(write("recipes/prod.yaml", RECIPE.encode("utf-16")), "recipes/prod.yaml"),
    "control characters": bad(added("description: \x01\x1b[31m\n"), "recipes/prod.yaml"),
    "a recipe that is a pipe": bad(pipe("recipes/prod.yaml"), "prod"),
    "a recipe that is a device": bad(link("recipes/prod.yaml", "/dev/zero"), "prod"),
    "a recipe that is a folder": bad(
        lambda p: ((p / "recipes/prod.yaml").unlink(), (p / "recipes/prod.yaml").mkdir()), "prod"
    ),
    "a recipe that is a circle of links": bad(link("recipes/prod.yaml", "prod.yaml"), "prod"),
    "an unknown recipe": bad(nothing, "no recipe 'prdo'", "did you mean 'prod'?", words=["recipe=prdo"]),
    "a recipe above the folder": bad(
        write("secret.yaml", RECIPE), "recipe", words=["recipe=../secret"]
    ),
    "an empty recipe": bad(recipe(""), "prod", "base.source: not set", "adapters: none given"),
    "a recipe that is a list": bad(recipe("[1, 2]\n"), "recipes/prod.yaml"),
    "a _target_": bad(added("description: {_target_: os.system, command: touch pwned}\n"), "recipes/prod.yaml"),
    "logging of Hydra's": bad(
        recipe("# @package _global_\n" + RECIPE + "hydra: {job_logging: {handlers: {x: {(): os.system}}}}\n"), "recipes/prod.yaml"
    ),
    "an override of a key that is not there": bad(nothing, "dtpye: unknown key", words=["recipe=prod", "recipe.dtpye=float32"]),
    "an unknown option": bad(nothing, "--forse", words=["recipe=prod", "--forse"]),
    "an option without its value": bad(nothing, "--expect: expected a value after it", words=["verify", "--expect"]),
    "a folder that is no build": bad(nothing, "has no lora-build.manifest.json", words=["verify", "base"]),
    "a path with NUL": bad(recipe(RECIPE.replace("base: ./base", 'base: "./ba\\0se"')), "base"),
    "a recipe that another file includes from outside": bad(
        both(write("secret.yaml", RECIPE), recipe("defaults: [../secret, _self_]\n" + RECIPE)), "prod", "../secret"
    ),
}  # fmt: skip
