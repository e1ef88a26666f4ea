"""What a split is drawn from: NeMo's types, groups, short forms, YAML files; refusals before data is read."""

import pytest
import yaml

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.config.input_cfg import sources_of

LHOTSE = {"type": "lhotse", "cuts_path": "cuts.jsonl"}
TARRED = {
    "type": "nemo_tarred",
    "manifest_filepath": "manifest__OP_0..1_CL_.json",
    "tarred_audio_filepaths": "audio__OP_0..1_CL_.tar",
}

ALIAS_BOMB = "- &a {type: lhotse, cuts_path: x}\n" + "".join(
    f"- &{name} {{type: group, input_cfg: [{', '.join(['*' + before] * 9)}]}}\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


def refusal(*items, **options):
    with pytest.raises(ValueError) as caught:
        DatasetConfig(input_cfg=items, **options)
    return str(caught.value)


def refusal_of(path):
    with pytest.raises(ValueError) as caught:
        DatasetConfig(input_cfg=str(path))
    return str(caught.value)


def test_sources_inside_groups_carry_the_tags_of_all_around_them_and_outer_ones_win():
    group = {
        "type": "group",
        "tags": {"task": "outer"},
        "input_cfg": [{**LHOTSE, "tags": {"task": "inner", "place": "here"}}, {"type": "group", "input_cfg": [TARRED]}],
    }
    first, second = sources_of(DatasetConfig(input_cfg=(group,)).items)
    assert (first.where, first.tags) == ("input_cfg[0].input_cfg[0]", {"task": "outer", "place": "here"})
    assert (second.where, second.type) == ("input_cfg[0].input_cfg[1].input_cfg[0]", "nemo_tarred")
    assert DatasetConfig(input_cfg=(group,)).num_sources == 2


@pytest.mark.parametrize(
    ("short", "item"),
    [
        ({"cuts_path": "a"}, {"type": "lhotse", "cuts_path": "a"}),
        ({"shar_path": "a"}, {"type": "lhotse_shar", "shar_path": "a"}),
        ({"manifest_filepath": "a"}, {"type": "nemo", "manifest_filepath": "a"}),
        (
            {"manifest_filepath": "a", "tarred_audio_filepaths": "b"},
            {"type": "nemo_tarred", "manifest_filepath": "a", "tarred_audio_filepaths": "b"},
        ),
    ],
)
def test_a_short_form_stands_for_one_item(short, item):
    assert DatasetConfig(**short).items == (item,)


def test_a_split_has_one_origin():
    assert "given: input_cfg, cuts_path" in refusal(LHOTSE, cuts_path="a")
    assert "needs manifest_filepath" in refusal(tarred_audio_filepaths="a")
    assert "given: none" in refusal()


def test_items_are_read_from_a_yaml_file_also_inside_a_group(tmp_path):
    (tmp_path / "inner.yaml").write_text(yaml.safe_dump([TARRED]))
    outer = [LHOTSE, {"type": "group", "input_cfg": str(tmp_path / "inner.yaml")}]
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump({"input_cfg": outer}))
    config = DatasetConfig(input_cfg=str(tmp_path / "outer.yaml"))
    assert [source.item for source in sources_of(config.items)] == [LHOTSE, TARRED]
    # What is recorded of the run are the items themselves: the file may change or go.
    assert config.input_cfg[1]["input_cfg"] == (TARRED,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{type: lhotse, cuts_path: '${oc.env:HOME}'}]", "write the values out"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("just a text", "holds str: give a list of items"),
        ("[", "items.yaml:1: not YAML"),
        ("[{type: !!bool maybe}]", "items.yaml: not YAML"),
        ("[{type: lhotse, cuts_path: 2024-13-45}]", "items.yaml: not YAML: month must be in 1..12"),
        ("[" * 3000, "items.yaml: nested too deeply"),
        ("- &a {type: group, input_cfg: [*a]}", "values once its aliases"),
        (ALIAS_BOMB, "values once its aliases"),
    ],
)
def test_a_file_of_items_is_data_and_nothing_else(tmp_path, text, message):
    (tmp_path / "items.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        DatasetConfig(input_cfg=str(tmp_path / "items.yaml"))


def test_files_that_name_files_do_not_grow_without_bound(tmp_path):
    (tmp_path / "0.yaml").write_text(yaml.safe_dump([LHOTSE] * 9))
    for depth in range(1, 5):
        inner = {"type": "group", "input_cfg": str(tmp_path / f"{depth - 1}.yaml")}
        (tmp_path / f"{depth}.yaml").write_text(yaml.safe_dump([inner] * 9))
    assert "more than 10,000 items" in refusal_of(tmp_path / "4.yaml")


def test_groups_do_not_nest_without_end(tmp_path):
    (tmp_path / "0.yaml").write_text(yaml.safe_dump([LHOTSE]))
    for depth in range(1, 30):
        inner = {"type": "group", "input_cfg": str(tmp_path / f"{depth - 1}.yaml")}
        (tmp_path / f"{depth}.yaml").write_text(yaml.safe_dump([inner]))
    assert "more than 20 deep" in refusal_of(tmp_path / "29.yaml")
    assert "cannot be read (File name too long)" in refusal_of("a" * 300)


def test_a_file_of_items_that_is_missing_or_holds_itself_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file at /nowhere\.yaml"):
        DatasetConfig(input_cfg="/nowhere.yaml")
    loop = tmp_path / "loop.yaml"
    loop.write_text(yaml.safe_dump([{"type": "group", "input_cfg": str(loop)}]))
    with pytest.raises(ValueError, match="contains itself"):
        DatasetConfig(input_cfg=str(loop))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"type": "parquet"}, "input_cfg[0]: type is 'parquet'; supported are lhotse, nemo, nemo_tarred"),
        ({"type": "nemo_tared"}, "did you mean nemo_tarred?"),
        ({"type": "txt_pair", "paths": "a"}, "have text and no audio"),
        ({"type": "lhotse"}, "cuts_path is None: give one path"),
        ({"type": "nemo", "manifest_path": "a"}, "unknown key 'manifest_path' of an item of type nemo; did you mean"),
        ({**LHOTSE, "cuts_path": ["a", "b"]}, "list several manifests as several items"),
        ({**LHOTSE, "extra_fields": []}, "unknown key 'extra_fields'"),
        ({**LHOTSE, "tags": ["a"]}, "tags are ['a']: give names and values"),
        ({"type": "group", "input_cfg": []}, "a group needs items"),
        ({"type": "group", "input_cfg": [{"type": "x"}]}, "input_cfg[0].input_cfg[0]: type is 'x'"),
        ({"type": "nemo_tarred", "manifest_filepath": "a"}, "tarred_audio_filepaths is None"),
        ({**TARRED, "manifest_filepath": ["a", "b"]}, "the same form"),
        ({**TARRED, "manifest_filepath": [["a", -1]], "tarred_audio_filepaths": [["b"]]}, "must be a path, [path]"),
        ({**TARRED, "tarred_audio_filepaths": "pipe:touch x"}, "is a command"),
        ({**LHOTSE, "cuts_path": "https://a/b.jsonl"}, "is a URL"),
        ({**LHOTSE, "cuts_path": "-"}, "give the path of a file"),
    ],
)
def test_an_unusable_item_is_refused_before_data_is_read(item, message):
    assert message in refusal(item)


def test_weights_are_shares_on_every_level():
    assert "weights are [1, None]" in refusal({**LHOTSE, "weight": 1}, LHOTSE)
    group = {"type": "group", "input_cfg": [{**LHOTSE, "weight": 0}, {**LHOTSE, "weight": 1}]}
    assert "input_cfg[0].input_cfg: weights are [0, 1]" in refusal(group)
