"""Completions by choice: what a manifest has a model say for each choice, to read off what it believes."""

from collections.abc import Mapping

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.manifests import example_id, load_cuts


def completions_by_choice(config: DatasetConfig) -> dict[str, Mapping[str, str]]:
    """The field `completions` of a split's Lhotse cuts (choice to whole completion), by question; most have none.

    Raises:
        ValueError: naming cut and field, if one holds something else.
    """
    found: dict[str, Mapping[str, str]] = {}
    for item in config.input_cfg:
        if "cuts_path" not in item:
            continue
        for cut in load_cuts(item["cuts_path"]):
            given = (cut.custom or {}).get("completions")
            if given is None:
                continue
            if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
                raise ValueError(
                    f"cut {cut.id}: 'completions' is {given!r}: give a text for each choice, {{choice: completion}}"
                )
            found[example_id(cut)] = given
    return found
