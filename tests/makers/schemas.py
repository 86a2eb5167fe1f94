"""The JSON Schemas in docs/schemas, and values held to them."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

FOLDER = Path(__file__).parent.parent.parent / "docs/schemas"
SCHEMAS: dict[str, Any] = {
    path.name.removesuffix(".schema.json"): json.loads(path.read_text()) for path in FOLDER.glob("*.schema.json")
}
REGISTRY = Registry().with_resources((s["$id"], Resource.from_contents(s)) for s in SCHEMAS.values())


def hold(value: Any, kind: str) -> None:
    """Hold a value to its schema."""
    issues = Draft202012Validator(SCHEMAS[kind], registry=REGISTRY).iter_errors(value)
    assert [f"{issue.json_path}: {issue.message}"[:300] for issue in issues] == []
