"""DreamBench (Ruiz et al. 2023): 30 subjects, 25 prompts for objects and 25 for live subjects, 4 images per prompt.

The photos are not part of the kit. `ibkit data dreambench` prints how to get them, and checks a folder of them. The
folder is read as published: `dataset/<subject>/NN.jpg` beside `prompts_and_classes.txt`.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ibkit.data.photos import photo_files
from ibkit.data.prompts import SLOT
from ibkit.errors import PhotoError
from ibkit.runs import hash_file

SOURCE = "https://github.com/google/dreambooth"
PROMPTS_FILE = "prompts_and_classes.txt"
N_SUBJECTS, N_PHOTOS, N_LIVE, N_PROMPTS, IMAGES_PER_PROMPT = 30, 158, 9, 25, 4
LIVE_CLASSES = ("cat", "dog")
HASHES = Path(__file__).parent / "dreambench.sha256.json"  # of the published photos; "cat/00.jpg" -> SHA-256
TEMPLATE = re.compile(r"""^\s*'(?P<text>[^']*\{0\} \{1\}[^']*)'\.format\(unique_token, class_token\),?\s*$""")


@dataclass(frozen=True)
class BenchSubject:
    """One subject: its name, its class noun, whether it is alive, and its photos, in the order of their names."""

    name: str
    class_noun: str
    live: bool
    photos: tuple[Path, ...]


@dataclass(frozen=True)
class DreamBench:
    """The subjects that are there, and the prompts as templates (see `ibkit.data.prompts.make_prompt`)."""

    subjects: tuple[BenchSubject, ...]
    object_prompts: tuple[str, ...]
    live_prompts: tuple[str, ...]


def read(folder: str | Path) -> DreamBench:
    """Read a DreamBench folder, or a part of one: subjects without a folder are left out. A PhotoError where there is
    no such folder, or its prompts file is missing or does not list 30 classes and twice 25 prompts.

    Args:
        folder: the published repository, or its `dataset/`.
    """
    root = Path(folder).expanduser()
    root = root / "dataset" if (root / "dataset").is_dir() else root
    path = root / PROMPTS_FILE
    if not path.is_file():
        raise PhotoError(f"{root} has no {PROMPTS_FILE}: it is not DreamBench; get it with: git clone {SOURCE}")
    head, _, tail = path.read_text(encoding="utf-8").partition("Prompts")
    rows = [line.strip().split(",", 1) for line in head.splitlines() if "," in line]
    classes = {name: noun for name, noun in rows if name != "subject_name"}
    kinds = [
        tuple(match["text"].replace("{0} {1}", SLOT) for line in part.splitlines() if (match := TEMPLATE.match(line)))
        for part in tail.partition("Live Subject Prompts")[::2]
    ]
    if len(classes) != N_SUBJECTS or [len(kind) for kind in kinds] != [N_PROMPTS, N_PROMPTS]:
        raise PhotoError(
            f"{path} lists {len(classes)} subjects, {len(kinds[0])} prompts for objects and {len(kinds[1])} for live "
            f"subjects, not {N_SUBJECTS}, {N_PROMPTS} and {N_PROMPTS}: it is damaged or another version; get it again."
        )
    subjects = [
        BenchSubject(name, noun, noun in LIVE_CLASSES, tuple(photo_files(root / name)))
        for name, noun in classes.items()
        if (root / name).is_dir()
    ]
    return DreamBench(tuple(subjects), *kinds)


def differences(folder: str | Path, bench: DreamBench) -> list[str]:
    """What a folder lacks, has too much of, or has altered, in words; empty if it is the published one."""
    counts = {
        "subjects": (len(bench.subjects), N_SUBJECTS),
        "live subjects": (sum(subject.live for subject in bench.subjects), N_LIVE),
        "photos": (sum(len(subject.photos) for subject in bench.subjects), N_PHOTOS),
    }
    found = [f"{there} {what} instead of {wanted}" for what, (there, wanted) in counts.items() if there != wanted]
    published = json.loads(HASHES.read_text())
    for subject in bench.subjects:
        photos = {f"{subject.name}/{photo.name}": photo for photo in subject.photos}
        names = {name for name in published if name.startswith(f"{subject.name}/")}
        if len(photos) != len(names):
            found.append(f"{subject.name} has {len(photos)} photos instead of {len(names)}")
        found += [f"{name} is missing" for name in sorted(names - photos.keys())]
        found += [f"{photo} is not in the published set" for name, photo in photos.items() if name not in names]
        altered = [name for name in photos if name in names and hash_file(photos[name]) != published[name]]
        found += [f"{photos[name]} is not the published file" for name in altered]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ibkit data`."""
    parser.add_argument("protocol", choices=("dreambench",), help="which published set of subjects and prompts")
    parser.add_argument("folder", nargs="?", help="a folder that has it, to be checked")


def main(arguments: argparse.Namespace) -> int:
    """Print how to get DreamBench, or check a folder; returns 1 if the folder is not the published one."""
    if arguments.folder is None:
        print(
            f"DreamBench is published at {SOURCE} (photos: see its references_and_licenses.txt):\n"
            f"    git clone --depth 1 {SOURCE}\n"
            "    ibkit data dreambench dreambooth/dataset"
        )
        return 0
    bench = read(arguments.folder)
    for subject in bench.subjects:
        kind = "live" if subject.live else "object"
        print(f"{subject.name:<22}{subject.class_noun:<18}{kind:<8}{len(subject.photos):>3} photos")
    found = differences(arguments.folder, bench)
    for line in found:
        print(f"differs: {line}")
    if not found:
        print(
            f"complete: {N_SUBJECTS} subjects, {N_PROMPTS} + {N_PROMPTS} prompts; "
            f"all {N_PHOTOS} photos checked by their hash"
        )
    return 1 if found else 0
