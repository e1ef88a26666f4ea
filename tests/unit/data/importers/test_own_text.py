"""From a CSV of questions to what the next commands read: manifests and a tokenizer."""

import csv
import shlex

import pytest

from nemo_mapo.data.importers.base import Source
from nemo_mapo.data.importers.next_steps import next_commands
from nemo_mapo.data.splits import tokenizer_path
from nemo_mapo.data.tokenizer import SpecialTokens, load_tokenizer
from nemo_mapo.embedded.tokenizer import build_tokenizer
from tests.unit.data.importers.corpora import clip, cuts_of

COLUMNS = ("audio", "question", "choices", "answer", "speaker", "split", "reasoning")


def write_csv(path, *rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return Source(path=path)


@pytest.fixture
def source(tmp_path):
    for number in range(3):
        clip(tmp_path / f"{number}.wav")
    return write_csv(
        tmp_path / "questions.csv",
        ("0.wav", "Which word, if any?", "Haus | Maus|Klaus", "Maus", "ann", "train", "I hear a Maus, squeaking."),
        ("1.wav", "Which?", '["one, two", "three"]', "one, two", "bob", "validation", ""),
        ("2.wav", "Which?", "A. left\nB. right", "B", "cat", "test", ""),
    )


def test_a_csv_of_questions_is_read(source, run):
    _, output = run("multiple_choice", source)
    found = [next(iter(cuts_of(output, split).values())).custom for split in ("train", "validation", "test")]
    assert [custom["choices"] for custom in found] == [
        ["Haus", "Maus", "Klaus"],
        ["one, two", "three"],
        ["left", "right"],
    ]
    assert [custom["answer"] for custom in found] == ["Maus", "one, two", "right"]
    assert found[0]["reasoning"] == "I hear a Maus, squeaking." and "reasoning" not in found[1]


def test_a_wrong_cell_is_refused_by_line_and_column(source, run):
    text = source.path.read_text(encoding="utf-8").replace("Haus | Maus|Klaus", "Haus")
    source.path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"questions.csv:2: field 'choices' is 'Haus'.*one \| two"):
        run("multiple_choice", source)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("audio;question;choices;answer\n0.wav;Which?;a|b;a\n", "columns are separated by semicolons: save it with"),
        ("audio\tquestion\tchoices\tanswer\n0.wav\tWhich?\ta|b\ta\n", "columns are separated by tabs: save it with"),
        ("audio,question,choices,answer\n0.wav,Which, now?,a|b,a\n", r"questions.csv:2: more cells .* double quotes"),
        (
            "file,text,label\n0.wav,Which?,a\n",
            r"questions.csv:2: field 'question' is missing \(there are file, text, la",
        ),
        ("Audio,Question\n0.wav,Which?\n", r"field 'question' is missing \(there are Audio, Question\)"),
    ],
)
def test_a_table_of_another_form_is_refused_in_words_that_help(source, run, text, said):
    source.path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        run("multiple_choice", source)


def test_a_table_of_a_spreadsheet_is_read_under_a_path_with_blanks(source, run, tmp_path):
    """With a byte order mark, and names that are not ASCII."""
    folder = tmp_path / "größe mit leer"
    folder.mkdir()
    clip(folder / "über 1.wav")
    table = folder / "fragen.csv"
    table.write_text(
        "audio,question,choices,answer,split\nüber 1.wav,Was?,hoch|tief,tief,train\n", encoding="utf-8-sig"
    )
    _, output = run("multiple_choice", Source(path=table))
    (cut,) = cuts_of(output, "train").values()
    assert cut.custom["answer"] == "tief" and cut.recording.sources[0].source.endswith("über 1.wav")


def test_a_tokenizer_is_trained_on_the_text_of_the_training_split(source, run):
    _, output = run("multiple_choice", source, tokenizer="train", vocabulary=1000)
    tokenizer = load_tokenizer(tokenizer_path(output))
    SpecialTokens.from_tokenizer(tokenizer)
    assert len(tokenizer.encode(" Maus")) == 1 and len(tokenizer.encode(" right")) > 1
    for text in ("<think> Maus</think> Maus", "<reasoning>Maus</reasoning><answer>Klaus</answer>", "Übel 東"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("<think></answer>")) == 2


def test_the_decoders_tokenizer_is_taken_along(source, run, tmp_path):
    build_tokenizer().save_pretrained(str(tmp_path / "model"))
    _, output = run("multiple_choice", source, tokenizer=str(tmp_path / "model"))
    assert load_tokenizer(tokenizer_path(output)).get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("choice", "vocabulary", "said"),
    [("train", 100, "--vocabulary 100"), ("nowhere", 4096, "no tokenizer_config.json")],
)
def test_a_tokenizer_that_cannot_be_is_refused_and_nothing_is_written(source, run, tmp_path, choice, vocabulary, said):
    with pytest.raises(ValueError, match=said):
        run("multiple_choice", source, tokenizer=choice, vocabulary=vocabulary)
    assert not (tmp_path / "prepared").exists()


def test_the_next_commands_name_what_the_corpus_needs(tmp_path):
    output = tmp_path / "my data"
    look, teach, train = next_commands(output, ("train", "validation"), sample_rate=8000, tokenizer="train")
    assert shlex.split(look)[:3] == ["python", "examples/inspect_data.py", str(output)]
    for command in (teach, train):
        words = shlex.split(command)
        assert words[2:4] == ["data=prepared", f"data.prepared_dir={output}"]
        assert "data.test_ds=null" in words and "data.validation_ds.sample_rate=8000" in words
    assert "model.from_scratch=true" in teach and "~warm_start" in train


def test_a_corpus_that_cannot_be_trained_on_says_so(tmp_path):
    (said,) = next_commands(tmp_path, ("train",), sample_rate=16000, tokenizer="train")
    assert said.startswith("# no question is in validation")


def test_the_next_commands_name_the_model_whose_tokenizer_was_taken(tmp_path):
    (tmp_path / "parts" / "checkpoint").mkdir(parents=True)
    splits, tokenizer = ("train", "validation", "test"), str(tmp_path / "parts" / "tokenizer")
    _, teach, _ = next_commands(tmp_path, splits, sample_rate=16000, tokenizer=tokenizer)
    assert f"pretrained_checkpoint.restore_from_path={tmp_path}/parts/checkpoint" in shlex.split(teach)
    _, teach, _ = next_commands(tmp_path, splits, sample_rate=16000, tokenizer=None)
    assert "data.tokenizer=MODEL/tokenizer" in teach and "from_scratch" not in teach
