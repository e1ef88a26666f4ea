"""Write a CSV of questions about recordings named DIGIT_SPEAKER_NUMBER.wav, as in the Free Spoken Digit Dataset."""

import argparse
import csv
import re
from pathlib import Path

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit is spoken?"
_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[a-z]+)_\d+\.wav")


def main() -> None:
    """Write one line per recording."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recordings", type=Path, help="directory with the .wav files")
    parser.add_argument("output", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    found = [
        (path, match) for path in sorted(arguments.recordings.glob("*.wav")) if (match := _NAME.fullmatch(path.name))
    ]
    if not found:
        raise SystemExit(f"error: {arguments.recordings}: no file named like 7_theo_12.wav")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "audio", "question", "choices", "answer", "speaker", "reasoning"))
        for path, match in found:
            answer = DIGITS[int(match["digit"])]
            reasoning = f"I hear one word, and it sounds like {answer}. So the answer is {answer}."
            shown = " | ".join(DIGITS)
            rows.writerow((path.stem, path.resolve(), QUESTION, shown, answer, match["speaker"], reasoning))
    print(f"{arguments.output}: {len(found)} questions, {len({match['speaker'] for _, match in found})} speakers")


if __name__ == "__main__":
    main()
