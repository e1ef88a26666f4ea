"""Every config key with its type, default and meaning, from the schema: `python -m nemo_mapo.config.reference`."""

import json
from typing import Any

from pydantic import TypeAdapter

from nemo_mapo.config.run import RunConfig

_HEADER = """# Configuration

Every key of `examples/train_mapo.py`, from the schema that checks it. Defaults are the schema's; the shipped configs in
`conf/` set some of them otherwise (`--cfg job` prints what a run would use). Made by
`python -m nemo_mapo.config.reference > docs/configuration.md`.
"""

Schema = dict[str, Any]


def configuration_markdown() -> str:
    """One table a section."""
    schema = TypeAdapter(RunConfig).json_schema()
    sections = [_HEADER]
    _add_section(sections, "", schema, schema["$defs"])
    return "\n".join(sections)


def _add_section(sections: list[str], path: str, schema: Schema, definitions: dict[str, Schema]) -> None:
    """Append the section's table, then those of the sections inside it."""
    rows = []
    inner: list[tuple[str, Schema]] = []
    for name, field in schema["properties"].items():
        below = [definitions[reference] for reference in _references(field)]
        if entries := _entries(field):
            rows.append(f"| `{path}{name}` | entries by name | {_default(field)} | {_meaning(field)} |")
            kinds = [
                (definitions[reference]["properties"]["type"]["const"], definitions[reference]) for reference in entries
            ]
            inner += [(f"{path}{name}.{kind if kind != 'custom' else 'NAME'}.", section) for kind, section in kinds]
        elif below:
            inner += [(f"{path}{name}.", section) for section in below]
        else:
            rows.append(f"| `{path}{name}` | {_kind(field)} | {_default(field)} | {_meaning(field)} |")
    if rows:
        title = path.rstrip(".") or "top level"
        sections.append(f"## {title}\n\n{_meaning(schema)}\n")
        sections.append("| Key | Type | Default | Meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    for section_path, section in inner:
        _add_section(sections, section_path, section, definitions)


def _references(field: Schema) -> list[str]:
    """Names of the sections that a field can hold."""
    options = [field, field.get("items", {}), *field.get("anyOf", ()), *field.get("oneOf", ())]
    return [option["$ref"].rsplit("/", 1)[-1] for option in options if "$ref" in option]


def _entries(field: Schema) -> list[str]:
    """Names of the sections that the entries of a field can be, if it holds entries by name."""
    values = [*field.get("patternProperties", {}).values(), field.get("additionalProperties")]
    return [name for value in values if isinstance(value, dict) for name in _references(value)]


def _kind(field: Schema) -> str:
    if "enum" in field:
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " \\| ".join(_kind(option) for option in field["anyOf"])
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]:g}" for name, sign in bounds.items() if name in field]
    return " ".join([str(field["type"]), *limits])


def _default(field: Schema) -> str:
    if "default" in field:
        return f"`{json.dumps(field['default'])}`"
    # A free-form section starts empty; the schema does not say so.
    if _entries(field):
        return "see `conf/`"
    return "`{}`" if field.get("additionalProperties") is True else "required"


def _meaning(field: Schema) -> str:
    return " ".join(field.get("description", "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(configuration_markdown(), end="")
