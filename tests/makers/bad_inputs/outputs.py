"""Bad outputs: places where a build may not go, and what is there already."""

from pathlib import Path

from makers.bad_inputs import RECIPE, Bad, bad, both, link, nothing, output, pipe, recipe, write

OVERWRITE = recipe(RECIPE.replace("./out}", "./out, if_exists: overwrite}"))
BUILT = ("recipe=prod", "progressbar=false")


def edit_manifest(project: Path) -> None:
    """Make the manifest of the build say what it did not."""
    file = project / "out/lora-build.manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"copy"', b'"merg"'))


ROWS: dict[str, Bad] = {
    "inside the base": bad(output("./base/out"), "output.dir", "overlaps base", "choose a directory outside it"),
    "the base": bad(output("./base"), "output.dir", "overlaps base"),
    "an adapter": bad(output("./math"), "output.dir", "overlaps adapters.math"),
    "above the inputs": bad(output(".."), "output.dir", "a folder of its own"),
    "the project": bad(output("."), "output.dir", "a folder of its own"),
    "the root of the disk": bad(output("/"), "output.dir", "a folder of its own"),
    "inside the base by a link": bad(both(link("to-base", "base"), output("./to-base/out")), "output.dir", "overlaps base"),
    "an adapter by ..": bad(output("./x/../math/y"), "output.dir", "overlaps adapters.math"),
    "a folder of somebody's": bad(write("out/precious", "x"), "output.dir", "left alone", "choose another"),
    "an edited build": bad(edit_manifest, "output.dir", "left alone", first=BUILT),
    "an edited build, overwrite": bad(both(edit_manifest, OVERWRITE), "output.dir", "left alone", first=BUILT),
    "a build, fail": bad(
        recipe(RECIPE.replace("./out}", "./out, if_exists: fail}")), "output.dir", "if_exists: fail", first=BUILT
    ),
    "a folder in the place of a file": bad(
        lambda p: ((p / "out/config.json").unlink(), (p / "out/config.json").mkdir(), (p / "out/config.json/x").touch()),
        "config.json: is not a file", code=3, words=["verify", "out"], first=BUILT,
    ),
    "a link to somebody's folder in a build": bad(
        both(write("other/precious", "x"), link("out/additional_chat_templates", "../other")),
        "additional_chat_templates", code=3, words=["verify", "out"], first=BUILT,
    ),
    "a file": bad(write("out", "x"), "output.dir", "out"),
    "a dangling link": bad(link("out", "nowhere"), "output.dir"),
    "a link to somebody's folder": bad(both(write("real/precious", "x"), link("out", "real")), "output.dir"),
    "a circle of links": bad(link("out", "out"), "output.dir"),
    "a device": bad(output("/dev/null"), "output.dir"),
    "a pipe": bad(pipe("out"), "output.dir"),
    "a place where nobody may write": bad(output("/sys/lora-build"), "/sys", code=4),
    "below a file": bad(output("./precious.txt/out"), "output.dir", "precious.txt is a file"),
    "a name of 300 bytes": bad(output("./" + "o" * 300), "ooo", "no file can be"),
    "a name with NUL": bad(output('"./o\\0ut"'), "output.dir"),
    "a name with a lone surrogate": bad(output('"./o\\ud800ut"'), "recipes/prod.yaml"),
    "an expected hash that is another": bad(
        nothing, "expected sha256:" + "0" * 64, code=3, words=["verify", "--expect", "0" * 64, "out"], first=BUILT
    ),
    "a flipped bit": bad(
        lambda p: (p / "out/model.safetensors").write_bytes(
            (p / "out/model.safetensors").read_bytes()[:-1] + b"\xff"
        ), "model.safetensors: tensor", code=3, words=["verify", "out"], first=BUILT,
    ),
}  # fmt: skip
