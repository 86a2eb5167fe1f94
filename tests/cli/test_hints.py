"""Every hint leads somewhere: what a message tells people to type is typed, and works.

HABITS are lines that people bring along from other tools. HINTS are all messages of the package that name a command or
an option, as they stand in its source: a new one is missed here until it has a line that gets it, and one that does
what it says.
"""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_build
from lora_build.cli import main as app
from lora_build.cli.verbs import split_verb
from lora_build.proof.manifest import read_manifest
from makers import small

PACKAGE = Path(lora_build.__file__).parent
HABITS = {
    "prod": "lora-build recipe=prod",
    "prod dtype=float16": "lora-build recipe=prod dtype=float16",
    "recipes/prod.yaml": "lora-build recipe=prod",
    "./recipes/prod.yaml": "lora-build recipe=prod",
    "plan recipes/prod.yaml": "lora-build plan recipe=prod",
    "recipe prod": "lora-build recipe=prod",
    "plan recipe prod dtype float16": "lora-build plan recipe=prod dtype=float16",
    "elsewhere/other.yaml": "LORA_BUILD_RECIPES=elsewhere lora-build recipe=other",
    "pln prod": "lora-build plan recipe=prod",
    "recipe=prod plan": "lora-build plan recipe=prod",
    "run prod": "lora-build recipe=prod",
    "plan help": "lora-build plan --help",
    "version": "lora-build --version",
    "make recipe=prod": "lora-build recipe=prod",
    "preview prod": "lora-build plan recipe=prod",
    "ls": "lora-build list",
    "recipes": "lora-build list",
    "info ./math": "lora-build inspect ./math",
    "./math": "lora-build inspect ./math",
    "builds/prod": "lora-build verify builds/prod",
    "recipe=prod --dry-run": "lora-build plan recipe=prod",
    "plan prod -n": "lora-build plan recipe=prod",
    "recipe=prod --force": "lora-build recipe=prod output.if_exists=overwrite --replace",
    "recipe=prod -f --json": "lora-build recipe=prod output.if_exists=overwrite --replace --json",
    "recipe=prod --output new": "lora-build recipe=prod output.dir=new",
    "recipe=prod -o=new": "lora-build recipe=prod output.dir=new",
    "-r prod": "lora-build recipe=prod",
    "--recipe prod --dtype float16": "lora-build recipe=prod dtype=float16",
    "--config=prod --adapters.math.weight=0.5": "lora-build recipe=prod adapters.math.weight=0.5",
    "recipe=prod --adapter ./math": "lora-build recipe=prod adapters.adapter=./math",
    "recipe=prod --base ./base": "lora-build recipe=prod base=./base",
    "recipe=prod --safe-merge true": "lora-build recipe=prod safe_merge=true",
    "recipe=prod --set dtype=float16": "lora-build recipe=prod dtype=float16",
    "recipe=prod --sweep dtype=keep,float32": "lora-build recipe=prod dtype=keep,float32 -m",
    "recipe=prod -v": "lora-build plan recipe=prod",
    "verify builds/prod -v": "lora-build verify builds/prod",
    "recipe=prod --silent": "lora-build recipe=prod --quiet",
    "verify builds/prod --sha256 {hash}": "lora-build verify builds/prod --expect={hash}",
    "inspect ./math --base-model ./base": "lora-build inspect ./math --base=./base",
    "list --format json": "lora-build list --json",
    "--list": "lora-build list",
    "--plan prod": "lora-build plan recipe=prod",
    "prd": "lora-build recipe=prod",
    "prod two": "lora-build recipe=prod,two",
    "show prod": "lora-build plan recipe=prod",
    "plan recipe = prod dtype: float16": "lora-build plan recipe=prod dtype=float16",
    "plan prod dtype = float16": "lora-build plan recipe=prod dtype=float16",
    "plan prod dtype= float16": "lora-build plan recipe=prod dtype=float16",
    "plan -m prod dtype=keep, float16": "lora-build plan recipe=prod dtype=keep,float16 -m",
    "--config recipes/prod.yaml": "lora-build recipe=prod",
    "init ./named --output recipes/of-output.yaml": "lora-build init ./named --name=of-output",
    "init ./math --model ./base --name of-model": "lora-build init ./math --base=./base --name of-model",
    "init --config elsewhere/mergekit.yaml --name of-file": "lora-build init --from=elsewhere/mergekit.yaml --name of-file",
    "merge --adapter ./math --base ./base --out-dir one-off": "lora-build merge ./base ./math --output=one-off",
    "plan prod --timings": "lora-build recipe=prod --timings",
    "plan prod --no-progress": "lora-build plan recipe=prod",
}
# how a message stands in the source: what gets it, and what does as it says
HINTS: dict[str, tuple[str, str]] = {
    "unknown option '{}'; try: {}": ("prod --dry-run", "plan recipe=prod"),
    "'{}' {}; try: {}": ("prod", "recipe=prod"),
    "'{}' is no command and no recipe; lora-build --help lists the commands, lora-build list the recipes": (
        "upload builds/prod", "list"),
    "'{}' is no recipe and no KEY=VALUE; lora-build list names the recipes": ("plan ../gone.yaml", "list"),
    "{}: expected lists, found {}; write '{}=[{}]', or several lists with -m": (
        "plan prod adapter_names=math,more", "plan prod adapter_names=[math]"),
    "~{}: is not there to be taken out; lora-build recipe=NAME --cfg job shows what is": (
        "plan prod ~adapters.mth", "recipe=prod --cfg job"),
    "; lora-build {} --help says which there are": ("verify builds/prod --xyz", "verify --help"),
    "{}; lora-build {} --help says more": ("verify builds/prod --expect", "verify --help"),
    "inspect takes an adapter, found '{}'; try: {}": ("inspect recipe=prod", "plan recipe=prod"),
    "; lora-build inspect ADAPTER [--base BASE], each a folder or org/name[@revision]": (
        "inspect ./math ./base", "inspect ./math --base ./base"),
    "verify takes builds, folders or repositories of the Hub: lora-build verify [--expect HASH] [--strict] [--rebuild] "
    "[--forward [--prompts FILE] [--seed N]] [--wrapper] [--root DIR] [--base PATH] [--adapter NAME=PATH] DIR [DIR ...]": (
        "verify", "verify --expect {hash} --strict --rebuild builds/prod"),
    "{} goes with --rebuild, --forward or --wrapper; {}": (
        "verify builds/prod --root .", "verify builds/prod --root . --rebuild"),
    "--base PATH": ("verify builds/lost --rebuild", "verify builds/lost --rebuild --base found/away --adapter math=found/far"),
    "--adapter {}=PATH": (
        "verify builds/lost --rebuild", "verify builds/lost --rebuild --base found/away --adapter math=found/far"),
    ", or --root DIR where {} begins": ("verify builds/lost --rebuild", "verify builds/lost --rebuild --root found"),
    "--adapter: {}{}": (
        "verify builds/prod --rebuild --adapter mth=./math", "verify builds/prod --rebuild --adapter math=./math"),
    "--adapter: '{}' is there {} times": (
        "verify builds/prod --rebuild --adapter math=a --adapter math=b", "verify builds/prod --rebuild --adapter math=./math"),
    "--root: {} is not a folder (looked at {})": (
        "verify builds/prod --rebuild --root nowhere", "verify builds/prod --rebuild --root ."),
    "{} goes with --forward; {}": ("verify builds/prod --seed 3", "verify --help"),
    "--expect is the hash of one build, found {} folders; {}": ("verify builds/prod builds/prod --expect {hash}", "verify builds/prod --expect {hash}"),
    "--expect: expected a manifest_hash, sha256: and {} hex digits, the first {} of them at least, found {}; the build printed it": (
        "verify builds/prod --expect abc", "recipe=prod"),
    "; that it is yours, --expect HASH proves": ("verify builds/prod", "verify builds/prod --expect {hash}"),
    "list takes nothing more, found '{}'; try: lora-build list": ("list prod", "list"),
    "out of memory; lora-build plan says how much a build takes": ("", "plan prod"),
    "out of memory, or beyond what this process may have ({}); ulimit -a shows its limits, lora-build plan how much a "
    "build takes": ("", "plan prod"),
    " and {} more, which --json lists": ("", "plan prod --json"),
    "--check changes nothing, so it does not go with --upgrade": ("lock prod --check --upgrade", "lock prod --upgrade"),
    "--upgrade: no source '{}'{}; a recipe is written recipe=NAME": ("lock --upgrade prod", "lock recipe=prod"),
    "{}: no recipe is called so; `lora-build list` names those that there are": ("lock glob(x*)", "list"),
    "--timings is of one build; a sweep, --cfg and --info have none": ("-m recipe=prod --timings", "recipe=prod --timings"),
    "--tensors lists those of one plan; a sweep has them in --json, --cfg and --info have none": (
        "plan -m recipe=prod --tensors", "plan -m recipe=prod --tensors --json"),
    "lora-build explain DIR [TENSOR], or lora-build explain recipe=NAME [KEY=VALUE ...] [TENSOR]": (
        "explain", "explain builds/prod"),
    "lora-build score DIR [scores.NAME.SCORER=...], or lora-build score recipe=NAME [KEY=VALUE ...]": (
        "score", "score --help"),
    "scores.{}.{}: would run {}; a recipe runs nothing by itself: to allow it add --allow-commands (allow_commands=True, {}=1)": (
        "plan prod scores.s.command=\"'sh {dir}'\"", "plan prod scores.s.command=\"'sh {dir}'\" --allow-commands"),
    "--junit: {} cannot be written: its folder is not there, or it is one": (
        "score builds/prod --junit no/x.xml", "score --help"),
    "--since asks git, and there is no git on this machine; install it": ("", "plan --help"),
    "--since: {} is in no git repository that can be read": ("plan --since HEAD", "plan --help"),
    "--since: expected a commit, a branch or a tag, found '{}'": ("", "plan --help"),
    "--since: the repository has no commit '{}'; git log shows which there are": ("", "plan --help"),
    "'{}' is the name of a recipe, which is written so: lora-build explain recipe={}": ("explain two", "explain recipe=two"),
    "--since says which recipes make something else, and does not go with {}": (
        "plan --since HEAD --tensors", "plan --help"),
    "--markdown goes with --since": ("plan prod --markdown", "plan --help"),
    "--exit-code is of a plan; --cfg and --info have none": ("plan recipe=prod --exit-code --cfg job", "plan recipe=prod --cfg job"),
    "{}: zip() has all values of its axis, and nothing beside it: write {}=zip(A,B,C)": (
        "plan -m prod dtype=keep,zip(float32) safe_merge=zip(true)", "plan -m prod dtype=zip(keep,float32) safe_merge=zip(true,true)"),
    "{}: zip() has no values; write {}=zip(A,B,C)": (
        "plan -m prod dtype=zip() safe_merge=zip(true)", "plan -m prod dtype=zip(keep,float32) safe_merge=zip(true,true)"),
    "{}: {}: a zip() is in no other one; write {}=zip(A,B,C)": (
        "plan -m prod dtype=zip(zip(keep))", "plan -m prod dtype=zip(keep,float32) safe_merge=zip(true,true)"),
    "which files of recipes/adapter/? write adapter={}(NAME,NAME)": ("plan -m prod +adapter=subsets()", "plan -m prod dtype=keep"),
    "--history lists, and goes with --to alone: lora-build promote --history": ("promote prod --history", "promote --history"),
    "a rollback goes to what the name was of before, and takes neither a build nor --best": (
        "promote prod --to live --rollback", "promote --help"),
    "promote takes a name for the build: lora-build promote DIR --to NAME": ("promote builds/lost", "promote builds/lost --to live"),
    "promote takes a build: lora-build promote DIR --to NAME, or SWEEP --best --to NAME": (
        "promote --to live", "promote builds/lost --to live"),
    "{}: gates: {}.{} {}: nobody knows whether the build passes it; lora-build score {} tells": ("", "score --help"),
    "{}: is a link of somebody's, to {}; it is left alone: choose another name for --to": ("", "promote --help"),
    "{}: is there, and no alias; it is left alone: choose another name for --to": (
        "promote builds/lost --to taken", "promote --help"),
    "--to: {} is where recipe {} builds; choose another name": ("promote builds/lost --to two", "promote --help"),
    "--to: expected a name of letters, digits, _, - and ., found '{}'": ("promote builds/lost --to sweeps", "promote --help"),
    "-m runs a sweep; it does not go with --cfg or --info": ("-m recipe=prod --cfg job", "recipe=prod --cfg job"),
    "{} goes with --cfg": ("recipe=prod --resolve", "recipe=prod --cfg job --resolve"),
    "--json goes with --cfg job, of which it prints the recipe": ("recipe=prod --info --json", "recipe=prod --cfg job --json"),
    "{}: is of a sweep, of which each point is built; try: {}": (
        "plan recipe=prod hydra.sweeper.max_batch_size=1", "plan recipe=prod hydra.sweeper.max_batch_size=1 -m"),
    "which recipe? write recipe=NAME": ("dtype=float16", "recipe=prod"),
    "{}: cannot be taken out; which one? write {}=NAME": ("recipe=prod ~recipe", "recipe=prod"),
    "{}: is there {} times, {}; for one after the other write {}={}": ("recipe=prod recipe=two", "recipe=prod,two"),
    "{}: is called {} now, and always has a value: write {}=VALUE": ("recipe=prod ~tied", "recipe=prod tied_embeddings=peft"),
    "{}: always has a value, and cannot be taken out: write {}=VALUE": ("recipe=prod ~dtype", "recipe=prod dtype=float16"),
    "{}: is called {} now; write {}={}": ("recipe=prod tied=peft", "recipe=prod tied_embeddings=peft"),
    "'{}' has several values: -m builds each of them, and a list is written KEY=[a,b]": (
        "", "-m recipe=prod dtype=keep,float32"),  # from Python
    "; lora-build --help lists them": ("help xyz", "--help"),
    'for TAB in bash and zsh: eval "$(lora-build -sc install=bash)", with zsh for zsh; in fish: lora-build -sc install=fish | source': (
        "-sc", "-sc install=bash"),
    "{} takes builds: lora-build {} DIR|NAME [DIR|NAME ...]": ("pin", "pin builds/prod"),
    "; with --yes they are removed": ("gc ./elsewhere --builds", "gc ./elsewhere --builds --yes"),
    "no recipe '{}'; lora-build list names those that there are": ("check nope", "list"),
    "there is no folder of recipes here; lora-build list says where they are looked for": ("", "list"),
    "there are no such builds; lora-build builds lists all": ("builds --recipe nope", "builds"),
    "--hash: expected 4 to 64 hexadecimal digits of a manifest_hash, found '{}'": ("builds --hash x", "builds --hash {hash}"),
    "{} not read since put there: lora-build verify {} does": ("", "verify builds/prod"),  # of what is large
    "{} is {} on the Hub, which is not asked: lora-build plan recipe={} does": ("", "plan recipe=prod"),
    "it has inputs on the Hub, which is not asked: lora-build plan recipe={} does": ("", "plan recipe=prod"),
    "{} may be another one: lora-build plan recipe={} tells": ("", "plan recipe=prod"),
    "{}: is a file; of another tool, try: lora-build init --from {}": (
        "init elsewhere/mergekit.yaml", "init --from elsewhere/mergekit.yaml"),
    "merge takes a base and adapters, found '{}'; try: {}": ("merge recipe=prod", "recipe=prod"),
    "there is no folder recipes/ in {} or above; lora-build init ADAPTER makes one": (
        "", "init ./math --base ./base --name first"),
    "none of your own: lora-build init ADAPTER writes one": ("", "init ./math --base ./base --name first"),
    "init takes an adapter, or --from FILE; lora-build init --help says more": ("init", "init --help"),
    "a file names its base and its adapters itself; give either them or --from FILE": (
        "init ./math --from elsewhere/mergekit.yaml", "init --from elsewhere/mergekit.yaml --name taken"),
    "{}: its {} names no base; --base BASE says which one it is": (
        "init ./math", "init ./math --base ./base --name by-base"),
    "{}: its {} names the base '{}', which is no folder here; --base BASE says where it is": (
        "init ./moved", "init ./moved --base ./base --name moved"),
    "the adapters name several bases ({}); --base BASE says which one it is": (
        "init ./named ./other", "init ./named ./other --base ./base --name several"),
    "its name says that it is quantised; --base BASE names the model that it was made of": (
        "", "init ./math --base ./base --name whole"),  # of a base on the Hub
    "{}: is there already; --replace replaces it, --name NAME writes another one": (
        "init ./math --base ./base --name two", "init ./math --base ./base --name third"),
    "--name: {}, found '{}'": ("init ./math --base ./base --name ../x", "init ./math --base ./base --name x"),
    "-o DIR: is not there; it says where the checkpoint goes": ("merge ./base ./math", "merge ./base ./math -o merged"),
    "merge takes a base and at least one adapter, found {}; lora-build merge --help says more": ("merge -o x", "merge --help"),
    "output.dir: {} holds another build ({}): {}; to replace it add --replace (replace=True), to keep both set name or "
    "output.dir": ("recipe=two output.dir=builds/taken", "recipe=two output.dir=builds/taken --replace"),
    "output.dir: {}: {} changed since it was built, which a new build would lose; move it away, or add --replace "
    "(replace=True)": ("recipe=two output.dir=builds/edited", "recipe=two output.dir=builds/edited --replace"),
    "--markdown and --json are two forms of one answer; take one": (
        "diff builds/prod builds/prod --json --markdown", "diff builds/prod builds/prod --markdown"),
    "--csv and --json are two forms of one answer; take one": (
        "report builds/prod --csv --json", "report builds/prod --csv"),
    "{}: {}, and is left alone; name another file: --output FILE": (
        "report builds/prod --output recipes/prod.yaml", "report builds/prod --output page.html"),
    "lora-build diff [--weights] A B, or lora-build diff recipe=NAME [KEY=VALUE ...] [B]": (
        "diff builds/prod", "diff --weights builds/prod builds/prod"),
    "; to read every byte: lora-build verify {}": ("diff builds/prod builds/prod", "verify builds/prod"),
    "'{}' is the name of a recipe, which is written so: lora-build diff recipe={}": (
        "diff prod builds/prod", "diff recipe=prod"),
    # of what takes more than the small builds of this test
    "and {} more; --json has them": ("", "diff builds/prod builds/prod --json"),
    "and {} of {} more; --json has them": ("", "diff builds/prod builds/prod --json"),
    "the bytes are not on this machine; --weights (weights=True) fetches them": (
        "", "diff builds/prod builds/prod --weights"),
    "{}/{}: its bytes have {}, its manifest says {}; which tensors differ says: lora-build verify {}": (
        "", "verify builds/prod"),
}  # fmt: skip
# what looks like a hint and is none: names, formats, and what no command line gets
OTHERS = {
    '<meta name="generator" content="lora-build report">',
    '; write ">= {}"', "A folder with tasks of your own, which may run code: `--allow-commands` has to allow it.",
    "--junit: {}: {}", "--junit is of builds; --cfg and --info have none",
    "lora-build {}", "lora-build {} [OPTION ...] {}", "lora-build plan recipe={}", "lora-build watch", "lora-build request",
    "complete -r lora-build; unset -f _lora_build", "compdef -d lora-build; unfunction _lora_build",
    "complete -e -c lora-build; functions -e __lora_build",
    "build a recipe; lora-build recipe=NAME is the same",
    "{} holds files that lora-build did not write ({}), and that a loader may read; move them away",
    "output.dir: {} holds files that lora-build did not write ({}), and the build has files of these names; move them away",
    "the recipe is for lora-build {}, and this is {}; install one that it is for: pip install 'lora-build{}'",
    "this machine's arithmetic fails the self-test of exact-1 for {} (found {}, expected {}): its handling of denormal "
    "numbers is not IEEE 754, or lora_build/_native was compiled wrongly; install lora-build again, with another compiler",
    "holds what lora-build did not write", "holds {}, which lora-build did not write",
    "{}: holds {}, which lora-build did not write; it is left alone",
    "{}: is left of it; what is in there lora-build did not write, or may not remove",
    "lists a file of lora-build itself", "--adapter {}",
    "mkdir -p recipes && mv {} recipes/ && ",
    "it was built by lora-build {}, and this is {}: CHANGELOG.md says where bytes changed", "{} is no field that lora-build {} knows", "# Written by lora-build init{}.",
    # of locks: tests/planning/test_lock_file.py and test_locked_hub.py do what they say
    "lora-build lock", "lora-build lock recipe={}", "lora-build lock {}", "--locked: not all of the sources are those that were locked:",
    "--locked: the recipe is of no file, so no lock is of it", "--locked: {} does not have recipe '{}'; to add it: {}",
    "--locked: {} is not there; to write it: {}", "; `git checkout {}` brings the last one back, or remove it and run: lora-build lock",
    "its host has changed what this commit holds; if you trust that: {} --upgrade {}",
    "recipe '{}' is no file; expected a recipe that `lora-build list` names",
    "there are no recipes to lock; `lora-build list` says where they are looked for",
    "{}: holds the marks of a merge that git could not do; take one side, `git checkout --ours {}`, and then: lora-build lock",
    "{}: is {}; expected a file that `lora-build lock` wrote: remove it",
}  # fmt: skip
_LOOKS_LIKE_ONE = re.compile(r"lora-build [a-z{-]|(?<![\w-])-{1,2}[a-z][\w-]*|\btry: |\bwrite \S*=")
_DECLARES = ("add_argument", "add_argument_group", "Parser", "parser", "compile", "affects")


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of a module as they stand there, `{}` for what is put in; no docstrings, no help of options."""
    match tree:
        case ast.Expr(value=ast.Constant()):
            return
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in _DECLARES:
            return
        case ast.JoinedStr(values=values):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in values)
            values = [part.value for part in values if isinstance(part, ast.FormattedValue)]
            for part in values:
                yield from texts(part)
            return
        case ast.Constant(value=str(text)):
            yield text
    for node in ast.iter_child_nodes(tree):
        yield from texts(node)


def test_no_hint_escapes_the_table() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if "_native" not in path.parts]
    found = {
        text
        for path in files
        for text in texts(ast.parse(path.read_text()))
        if " " in text and "\n" not in text and _LOOKS_LIKE_ONE.search(text)
    }
    assert found - OTHERS == HINTS.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hints")
    small.make_base(made / "base")
    for name, config in {
        "math": {}, "moved": {"base_model_name_or_path": "./gone"}, "named": {"base_model_name_or_path": "base"},
        "other": {"base_model_name_or_path": "math"},
    }.items():  # fmt: skip
        small.make_adapter(made / name, **config)
    for place, text in {
        "recipes/prod.yaml": "base: ./base\nadapters: {math: ./math}\n",
        "recipes/two.yaml": "base: ./base\nadapters: {math: {source: ./math, weight: 0.5}}\n",
        "elsewhere/other.yaml": "base: ./base\nadapters: {math: ./math}\n",
        "elsewhere/mergekit.yaml": "merge_method: passthrough\nmodels: [{model: base+math}]\n",
    }.items():
        (made / place).parent.mkdir(exist_ok=True)
        (made / place).write_text(text)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(made)
        for recipe, place in (("prod", "prod"), ("prod", "taken"), ("two", "edited")):
            lora_build.build(lora_build.load_recipe(recipe, [f"output.dir=builds/{place}"]))
        lora_build.merge("./base", "./math", output="elsewhere/of-no-recipe")
        small.make_base(made / "lost/away")
        small.make_adapter(made / "lost/far")
        lost = {"root": str(made / "lost"), "base": "./away", "adapters": {"math": "./far"}}
        (made / "builds").mkdir(exist_ok=True)
        lora_build.build(lost | {"output": {"dir": str(made / "builds/lost")}})
    (made / "lost").rename(made / "found")
    (made / "builds/edited/config.json").write_text("{}")
    return made


@pytest.fixture
def manifest_hash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hash of the build that is there; the working directory is its project's."""
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(folder)
    return read_manifest(folder / "builds/prod").manifest_hash


def exit_code(line: str) -> int:
    """Return what a command line exits with, a build's as its plan does; each is run once."""
    words = shlex.split(line)
    environment = words.pop(0) if words[0] != "lora-build" else ""
    assert words.pop(0) == "lora-build"
    name, rest = split_verb(words)
    is_build = name is None and not {"--help", "--version", "--timings", "--cfg", "-sc"} & {*words}
    return _exit_code(environment, "plan" if is_build else name, tuple(sorted(rest) if is_build else rest))


@functools.cache
def _exit_code(environment: str, name: str | None, words: tuple[str, ...]) -> int:
    with pytest.MonkeyPatch.context() as patched:
        if environment:
            patched.setenv(*environment.split("=", 1))
        return app.main([*([name] if name else []), *words])


@pytest.mark.parametrize("typed", HABITS)
def test_a_habit_is_answered_with_the_command_that_does_it(
    manifest_hash: str, capsys: pytest.CaptureFixture[str], typed: str
) -> None:
    meant = HABITS[typed].replace("{hash}", manifest_hash)
    assert app.main(shlex.split(typed.replace("{hash}", manifest_hash))) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"; try: {meant}")
    assert exit_code(meant) == 0


def test_a_recipe_beside_recipes_is_moved_there_where_its_paths_begin_at_its_folder(
    manifest_hash: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my own.yaml").write_text("base: ./base\nadapters: [./math]\n")
    assert app.main(["plan", "my own.yaml"]) == 2
    said = "try: mkdir -p recipes && mv 'my own.yaml' recipes/ && lora-build plan 'recipe=my own'"
    assert said in capsys.readouterr().err
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    Path("recipes").mkdir()
    Path("my own.yaml").rename("recipes/my own.yaml")
    assert app.main(["plan", "recipe=my own"]) == 0


@pytest.mark.parametrize("hint", [hint for hint, (typed, _) in HINTS.items() if typed is not None])
def test_a_hint_is_said_and_what_it_says_works(
    manifest_hash: str, capsys: pytest.CaptureFixture[str], hint: str
) -> None:
    typed, meant = (line.replace("{hash}", manifest_hash) for line in HINTS[hint])
    if typed:
        app.main(shlex.split(typed))
        said = " ".join("".join(capsys.readouterr()).split())
        assert re.search(re.escape(" ".join(hint.split())).replace(r"\{\}", ".*"), said), said
        if proposal := re.search(r"(?:try|each): lora-build ([^;]*)", said):
            assert proposal[1] == meant
    assert exit_code(f"lora-build {meant}") == 0


def test_every_command_that_help_shows_works(manifest_hash: str, capsys: pytest.CaptureFixture[str]) -> None:
    app.main(["--help"])
    shown = re.findall(r"^  (lora-build .*?)  ", capsys.readouterr().out, re.MULTILINE)
    assert len(shown) >= 5
    assert {line: exit_code(line) for line in shown} == dict.fromkeys(shown, 0)
