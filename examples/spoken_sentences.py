"""Write a CSV of questions about transcribed recordings: which of four sentences is spoken?

A line of the transcripts is `name: text`, for the recording name.wav anywhere below the folder, as in Asterisk's
core sounds; lines in another form, notes in [brackets] and recordings outside 0.3 to 8 s are left out and counted.
"""

import argparse
import csv
import random
import re
from pathlib import Path

import soundfile

QUESTION = "Which announcement is spoken?"
OTHERS = 3
SHORTEST, LONGEST = 0.3, 8.0
"""Seconds."""
_LINE = re.compile(r"([\w/-]+): ([^\[].*)")


def main() -> None:
    """Write one line per recording."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, help="directory with .wav files, in it or below")
    parser.add_argument("transcripts", type=Path, help="text file with `name: text` lines")
    parser.add_argument("output", type=Path, help="CSV file to write")
    parser.add_argument("--speaker", default="unknown", help="name of the speaker (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the other sentences (default: %(default)s)")
    arguments = parser.parse_args()
    lines = arguments.transcripts.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for match in filter(None, map(_LINE.fullmatch, lines)):
        path = next(iter(arguments.recordings.rglob(f"{match[1]}.wav")), None)
        if path is not None and SHORTEST <= soundfile.info(path).duration <= LONGEST:
            found.append((match[1].replace("/", "_"), path.resolve(), match[2].strip()))
    texts = sorted({text for _, _, text in found if "|" not in text})
    if len(texts) <= OTHERS:
        raise SystemExit(f"error: {arguments.transcripts}: {len(texts)} sentences have a recording; four are needed")
    draws = random.Random(arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "audio", "question", "choices", "answer", "speaker", "reasoning"))
        for name, path, text in found:
            choices = [*draws.sample([other for other in texts if other != text], OTHERS), text]
            draws.shuffle(choices)
            spoken = f"I hear the words: {text}"
            rows.writerow((name, path, QUESTION, " | ".join(choices), text, arguments.speaker, spoken))
    print(f"{arguments.output}: {len(found)} questions; {len(lines) - len(found)} lines left out")


if __name__ == "__main__":
    main()
