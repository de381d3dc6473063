"""DreamBench as published: prompts are counted and filled in, folders are checked, the photos stay where they are."""

import json
import shutil

import pytest
from PIL import Image

from ibkit.cli import main
from ibkit.data import dreambench
from ibkit.data.dreambench import differences, read
from ibkit.data.prompts import make_prompt
from ibkit.errors import PhotoError
from ibkit.runs import hash_file
from tests.test_photos import DREAMBENCH


def prompts_file(n_subjects=30, n_object=25, n_live=25):
    names = [f"thing{i},toy" for i in range(n_subjects - 2)] + ["cat,cat", "dog2,dog"]
    line = "'a {{0}} {{1}} in place {}'.format(unique_token, class_token),"
    kinds = [[line.format(i) for i in range(n)] for n in (n_object, n_live)]
    return "\n".join(
        ["Classes", "", "subject_name,class", *names, "", "Prompts", "", "Object Prompts", "", "prompt_list = ["]
        + [*kinds[0], "]", "", "Live Subject Prompts", "", "prompt_list = [", *kinds[1], "]"]
    )


@pytest.fixture
def folder(tmp_path):
    """A small folder of the published layout."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(prompts_file())
    for name in ("cat", "thing3"):
        (tmp_path / "dataset" / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8), (90 * i, 0, 0)).save(tmp_path / "dataset" / name / f"{i:02d}.jpg")
    return tmp_path


def test_a_part_of_it_can_be_read(folder):
    for place in (folder, folder / "dataset"):
        bench = read(place)
        assert [(s.name, s.live, len(s.photos)) for s in bench.subjects] == [("thing3", False, 2), ("cat", True, 2)]
        assert len(bench.object_prompts) == len(bench.live_prompts) == 25
    assert make_prompt(bench.live_prompts[3], "cat", "sks").text == "a sks cat in place 3"


def test_what_is_missing_or_altered_is_named(folder, monkeypatch, tmp_path, capsys):
    hashes, dataset = tmp_path / "hashes.json", folder / "dataset"
    right = hash_file(dataset / "cat" / "00.jpg")
    published = {"cat/00.jpg": right, "cat/01.jpg": right, "thing3/00.jpg": hash_file(dataset / "thing3" / "00.jpg")}
    hashes.write_text(json.dumps(published | {"thing3/05.jpg": "0", "thing3/06.jpg": "0", "dog2/00.jpg": "0"}))
    monkeypatch.setattr(dreambench, "HASHES", hashes)
    assert differences(folder, read(folder)) == [
        "2 subjects instead of 30", "1 live subjects instead of 9", "4 photos instead of 158",
        "thing3 has 2 photos instead of 3", "thing3/05.jpg is missing", "thing3/06.jpg is missing",
        f"{dataset / 'thing3' / '01.jpg'} is not in the published set",
        f"{dataset / 'cat' / '01.jpg'} is not the published file",
    ]  # fmt: skip
    assert main(["data", "dreambench", str(folder)]) == 1
    assert "differs: 2 subjects instead of 30" in capsys.readouterr().out


def test_a_whole_folder_is_complete_when_every_hash_is_right(folder, monkeypatch, tmp_path, capsys):
    photos = sorted((folder / "dataset").glob("*/*.jpg"))
    hashes = tmp_path / "hashes.json"
    hashes.write_text(json.dumps({f"{photo.parent.name}/{photo.name}": hash_file(photo) for photo in photos}))
    whole = read(folder)
    for name, value in {"HASHES": hashes, "N_SUBJECTS": 2, "N_LIVE": 1, "N_PHOTOS": 4}.items():
        monkeypatch.setattr(dreambench, name, value)
    monkeypatch.setattr(dreambench, "read", lambda where: whole)
    assert main(["data", "dreambench", str(folder)]) == 0
    assert "all 4 photos checked by their hash" in capsys.readouterr().out


def test_every_published_photo_has_its_hash():
    names = list(json.loads(dreambench.HASHES.read_text()))
    assert len(names) == 158 and len({name.split("/")[0] for name in names}) == 30


@pytest.mark.parametrize("counts", [(29, 25, 25), (30, 24, 25), (30, 25, 0)])
def test_a_damaged_list_is_refused(folder, counts):
    (folder / "dataset" / "prompts_and_classes.txt").write_text(prompts_file(*counts))
    with pytest.raises(PhotoError, match="lists {} subjects, {} prompts for objects and {} for live".format(*counts)):
        read(folder)


def test_another_folder_is_refused_and_says_where_to_get_it(tmp_path, capsys):
    assert main(["data", "dreambench", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "has no prompts_and_classes.txt" in told and "git clone https://" in told
    assert main(["data", "dreambench"]) == 0
    assert "git clone" in capsys.readouterr().out


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="the real photos in ../shared are not here")
def test_the_real_files(tmp_path):
    bench = read(DREAMBENCH)
    assert {s.name for s in bench.subjects if s.live} == {"cat", "dog", "dog6"}
    assert bench.live_prompts[10] == "a {subject} wearing a red hat"
    assert bench.object_prompts[-1] == "a cube shaped {subject}"
    assert not [line for line in differences(DREAMBENCH, bench) if "published file" in line]
    shutil.copytree(DREAMBENCH, tmp_path / "copy")
    photo = next((tmp_path / "copy" / "cat").glob("*.jpg"))
    photo.write_bytes(photo.read_bytes() + b"\0")
    assert f"{photo} is not the published file" in differences(tmp_path / "copy", read(tmp_path / "copy"))
