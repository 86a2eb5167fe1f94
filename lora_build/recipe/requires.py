"""`requires: ">=0.2"` in a recipe: the versions of lora-build that it is for, as pip would write them (PEP 440)."""

from lora_build._version import VERSION


def unmet(versions: str, version: str = VERSION) -> str | None:
    """Return why a version of lora-build, this one by default, is none of some versions, or None if it is."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet  # which few recipes need

    try:
        if SpecifierSet(versions).contains(version, prereleases=True):
            return None
    except InvalidSpecifier:
        return f"expected versions such as '>=0.2' or '>=0.2,<1', found '{versions}'"
    return (
        f"the recipe is for lora-build {versions}, and this is {version}; "
        f"install one that it is for: pip install 'lora-build{versions}'"
    )
