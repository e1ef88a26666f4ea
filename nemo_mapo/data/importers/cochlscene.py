"""CochlScene (Jeong and Park, 2022): where was this recorded?"""

import re
from collections.abc import Iterator
from pathlib import Path

from nemo_mapo.data.importers.base import Drop, Importer, Question, Source
from nemo_mapo.data.importers.choices import DISTRACTORS, draw, randomness, shuffled

_SPLITS = {"Train": "train", "Val": "validation", "Test": "test"}


def read(source: Source) -> Iterator[Question | Drop]:
    """One question per clip; the scenes are the folders' names, `SubwayStation` read as "subway station"."""
    folders = [source.directory() / name for name in _SPLITS if (source.path / name).is_dir()]
    scenes = sorted({_words(scene) for folder in folders for scene in folder.iterdir() if scene.is_dir()})
    if len(scenes) <= 1:
        raise ValueError(f"{source.path}: expected folders {', '.join(_SPLITS)} with a folder for each scene in them")
    for folder in folders:
        for path in sorted(folder.glob("*/*.wav")):
            if not path.name.startswith("._"):
                yield _question(path, split=_SPLITS[folder.name], scenes=scenes, seed=source.seed)


def _question(path: Path, *, split: str, scenes: list[str], seed: int) -> Question:
    answer, generator = _words(path.parent), randomness(seed, path.stem)
    distractors = draw(scenes, DISTRACTORS, generator, lambda scene: scene != answer)
    return Question(
        where=str(path),
        id=f"cochlscene-{path.stem}",
        audio=path,
        question="Where was this recorded?",
        choices=shuffled(answer, distractors, generator),
        answer=answer,
        task="acoustic_scene",
        split=split,
    )


def _words(folder: Path) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder.name).lower()


IMPORTER = Importer(name="cochlscene", layout="Train, Val, Test; in each <Scene>/*.wav", read=read)
