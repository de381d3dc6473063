"""What users bring, as tables of cases: each is refused in one sentence where it arises, and what can be used is."""

import json
import math
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ibkit.adapt import lora
from ibkit.cli import main
from ibkit.data.photos import PhotoError, PhotoWarning, load_subject_photos, photo_files
from ibkit.data.prompts import make_prompt
from ibkit.device import pick_device
from ibkit.errors import ArtifactError, ModelError, ParameterError
from ibkit.evaluate.figures import MOST_IN_STRIP, NotebookFigure, reference_strip
from ibkit.job import run as main_job
from ibkit.job.notebook import _Lines, _Warnings
from ibkit.job.ready import require_ready
from ibkit.job.stages import defaults, given, plan
from ibkit.model.loading import load_model
from ibkit.model.parts import check_parts
from ibkit.model.sample import Sampler, sample
from ibkit.params import make
from ibkit.runs import Run, identify, project_root
from ibkit.runs.manifest import local_model

# ---------------------------------------------------------------------------------------------------- models


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pipeline(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, part, changes):
    """Change a part's config; a value of None takes the name out."""
    (path,) = (p for p in (folder / part).glob("*config.json") if p.name != "tokenizer_config.json")
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in changes or value != ()}))


OTHER_MODELS = [
    ("unet", {"in_channels": 9}, "takes 9 channels and gives 4 (an inpainting model)"),
    ("unet", {"in_channels": 8}, "takes 8 channels and gives 4 (an image-editing model)"),
    ("unet", {"addition_embed_type": "text_time"}, "what only Stable Diffusion XL has"),
    ("unet", {"class_embed_type": "timestep"}, "takes a class or noise level beside the text"),
    ("unet", {"num_class_embeds": 1000}, "takes a class or noise level beside the text"),
    ("vae", {"latent_channels": 16}, "takes 4 channels and its autoencoder has 16"),
    (
        "unet",
        {"cross_attention_dim": 1024},
        "reads texts 1024 wide (cross_attention_dim) and its text encoder gives 16",
    ),
    ("text_encoder", {"model_type": "t5"}, "of the kind 't5' and not CLIP's"),
    ("text_encoder", {"model_type": "bert"}, "of the kind 'bert' and not CLIP's"),
    ("unet", {"sample_size": None}, "write it into unet/config.json, such as 64"),
    ("unet", {"sample_size": [8, 16]}, "has the sample_size [8, 16]"),
    ("scheduler", {"prediction_type": "v_prediction"}, "predicts v_prediction"),
    ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is trained by flow matching"),
    ("scheduler", {"num_train_timesteps": 10}, "has 10 noise levels"),
    ("scheduler", {"beta_end": "x"}, "cannot be read (unsupported operand"),
    ("scheduler", {"beta_schedule": "weird"}, "cannot be read (weird is not implemented"),
    ("scheduler", {"beta_start": 5.0}, "are not 1000 numbers between 0 and 1"),
    ("scheduler", {"trained_betas": [0.1, 0.2]}, "are not 1000 numbers between 0 and 1"),
    ("scheduler", {"rescale_betas_zero_snr": True}, "are not 1000 numbers between 0 and 1"),
]


@pytest.mark.parametrize(("part", "changes", "says"), OTHER_MODELS, ids=[str(row[1]) for row in OTHER_MODELS])
def test_other_models_are_refused_by_name_before_a_weight_is_read(folder, part, changes, says):
    rewrite(folder, part, changes)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError) as refused:
        load_model(str(folder))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_without_a_tokenizer_is_refused_before_it_is_loaded(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelError, match="there is no folder tokenizer in .*: restore it"):
        check_parts(str(folder), folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{"], ids=["deep", "a list", "cut"])
def test_a_config_that_is_no_table_is_refused(folder, text):
    (folder / "unet" / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"unet/config.json cannot be read"):
        load_model(str(folder))


HARMLESS = [
    ("unet", {"sample_size": [8, 8]}),
    ("scheduler", {"_class_name": "EulerDiscreteScheduler"}),
    ("scheduler", {"_class_name": "DDPMScheduler"}),
    ("scheduler", {"steps_offset": ()}),
    ("tokenizer", None),
]


@pytest.mark.parametrize(("part", "changes"), HARMLESS, ids=[str(row) for row in HARMLESS])
def test_other_configs_that_mean_the_same_draw_the_same(tiny, folder, part, changes):
    if changes is None:
        path = folder / "tokenizer" / "tokenizer_config.json"
        values = json.loads(path.read_text())
        values.pop("model_max_length")
        path.write_text(json.dumps(values))
    else:
        rewrite(folder, part, changes)
    words = (["a cat"], [0], Sampler(2, 2.0, 1.0))
    assert sample(load_model(str(folder)), *words)[0].tobytes() == sample(tiny, *words)[0].tobytes()


def shard(path, variant=""):
    """A weights file as two and their index, as save_pretrained(max_shard_size=...) names them."""
    weights, place = load_file(path), {}
    path.unlink()
    for number, names in enumerate((list(weights)[::2], list(weights)[1::2]), 1):
        file = f"{path.stem}{variant}-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, path.with_name(file), metadata={"format": "pt"})
        place |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    path.with_name(f"{path.name}.index{variant}.json").write_text(json.dumps(index))


def pickled(path, variant=""):
    stem = "pytorch_model" if path.stem == "model" else path.stem
    torch.save(load_file(path), path.with_name(f"{stem}{variant}.bin"))
    path.unlink()


def variant(name):
    return lambda path: path.rename(path.with_suffix(f".{name}.safetensors"))


def beside(path):
    """Other weights of a variant beside the plain ones."""
    zeros = {name: torch.zeros_like(weight) for name, weight in load_file(path).items()}
    save_file(zeros, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})


FILES = {
    "sharded": shard, "sharded fp16": lambda path: shard(path, ".fp16"), "bin": pickled,
    "bin fp16": lambda path: pickled(path, ".fp16"), "fp16": variant("fp16"), "non_ema": variant("non_ema"),
    "plain and fp16": beside,
}  # fmt: skip


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_weights_are_read_under_every_name_that_diffusers_gives_them(tiny, folder, write):
    for path in list(folder.rglob("*.safetensors")):
        write(path)
    found, expected = load_model(str(folder)).unet.state_dict(), tiny.unet.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class Program:
    def __reduce__(self):
        return open, ("/tmp/ibkit-was-run", "w")


def lose(pattern, write=shard):
    def change(path):
        write(path)
        next(path.parent.glob(pattern)).unlink()

    return change


NO_FILES = [
    (lambda path: path.unlink(), "the unet in .* has no weights .it has config.json."),
    (lose("*.index.json"), "the unet in .* has weights in several files and no index"),
    (lose("*-00002-of-00002*"), "diffusion_pytorch_model-00002-of-00002.safetensors"),
    (lambda path: (path.with_suffix(".bin").write_bytes(pickle.dumps(Program())), path.unlink()), "Unable to load"),
    (lambda path: (path.with_suffix(".ckpt").write_bytes(b"x"), path.unlink()), "no weights .it has config.json, diff"),
]


@pytest.mark.parametrize(("change", "says"), NO_FILES, ids=[row[1][-30:] for row in NO_FILES])
def test_weights_that_cannot_be_read_are_named(folder, change, says):
    change(folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match=says) as refused:
        load_model(str(folder))
    assert "\n" not in str(refused.value) and not Path("/tmp/ibkit-was-run").exists()


def test_an_embedding_table_that_is_padded_is_read(tiny, folder):
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith("token_embedding.weight"))
    table = weights[name]
    save_file(weights | {name: torch.cat([table, table[:6]])}, path, metadata={"format": "pt"})
    rewrite(folder, "text_encoder", {"vocab_size": len(table) + 6})
    loaded = load_model(str(folder))
    assert torch.equal(loaded.encode_text(["a cat"]), tiny.encode_text(["a cat"]))


def test_an_adapter_with_weights_that_are_not_finite_is_refused(tiny, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"unet.mid_block.x.lora_A.weight": torch.tensor([[1.0, math.nan]])}, path)
    with pytest.raises(ModelError, match="has 1 weights that are not finite"):
        lora.attach_file(tiny, "adapter", path)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_no_picture_is_black_because_a_number_is_not_finite(tiny, part):
    with torch.no_grad():
        next(iter(getattr(tiny, part).parameters())).fill_(math.nan)
        if part == "vae":
            for parameter in tiny.vae.decoder.parameters():
                parameter.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite numbers"):
        sample(tiny, ["a cat"], [0], Sampler(2, 2.0, 1.0))


@pytest.mark.parametrize(("n_steps", "says"), [(667, "t = 667 of 1000.* give 500 or 900"), (501, "give 500 or 900")])
def test_numbers_of_steps_that_would_begin_far_from_noise_are_refused(n_steps, says):
    with pytest.raises(ParameterError, match=says):
        Sampler(n_steps)
    with pytest.raises(ParameterError, match=says):
        make("03_evaluate", {"n_inference_steps": n_steps})


@pytest.mark.parametrize("values", [(2, math.nan), (2, -1.0), (0, 1.0), (2, 1.0, 2.0), (2.5, 1.0)])
def test_a_sampler_that_cannot_be_is_refused(values):
    with pytest.raises(ParameterError, match="^The sampler: setting '[a-z_]+' must be"):
        Sampler(*values)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 300, 450, 500, 1000])
def test_usual_numbers_of_steps_are_possible(n_steps):
    assert Sampler(n_steps).n_steps == n_steps


# ---------------------------------------------------------------------------------------------------- words

PROMPTS = [
    ("a photo of sks dog playing soccer", "holds the identifier 'sks'"),
    ("a photo of a dog playing soccer", "is a whole sentence, .*a photo of {subject}"),
    ("A cinematic Portrait of my dog", "is a whole sentence"),
    ("a {0} {1} in the jungle", "has braces"),
    ("{} in the jungle", "has braces"),
    ("<sks> in the jungle", "holds the identifier"),
    ("a dog in the snow", "names the dog twice"),
    ("[V] dog in the snow", "names the dog twice"),
    ("cute red Dogs in the snow", "names the dog twice"),
    ("a_photo_of_sks_dog", "holds the identifier"),
    ("a_photo_of_a_dog", "is a whole sentence"),
    ("a {} in the snow", "has braces: write {subject}"),
]


@pytest.mark.parametrize(("prompt", "says"), PROMPTS)
def test_prompts_in_other_tools_habit_are_refused_with_the_right_form(prompt, says):
    with pytest.raises(ParameterError, match=says) as refused:
        make_prompt(prompt, "dog", "sks")
    assert "{subject}" in str(refused.value)


def test_the_form_that_is_advised_works():
    made = make_prompt("a photo of {subject} playing soccer", "dog", "sks")
    assert (made.text, made.clean) == ("a photo of sks dog playing soccer", "a photo of dog playing soccer")
    assert make_prompt("taking a photo of a bird", "dog", "sks").clean == "a dog taking a photo of a bird"


@pytest.mark.parametrize(
    "prompt", ["chasing a dog", "playing with two dogs", "in a dog house", "next to a dog", "as a dog"]
)
def test_prompts_may_hold_another_of_the_class(prompt):
    assert make_prompt(prompt, "dog", "sks").text == f"a sks dog {prompt}"


@pytest.mark.parametrize("words", ["a fluffy", "fluffy dog", "fluffy {}", "sks fluffy"])
def test_descriptions_in_other_tools_habit_are_refused(words):
    with pytest.raises(ParameterError, match=f"^description '{words}'"):
        make_prompt("in the snow", "dog", "sks", words)


@pytest.mark.parametrize("noun", ["a dog", "the dog", "An owl", "my dog", " ", "photo of a dog"])
def test_a_class_noun_with_an_article_is_refused(noun):
    with pytest.raises(ParameterError, match="must be a noun without an article, such as '(dog|owl)'"):
        make_prompt("in the snow", noun)


@pytest.mark.parametrize("notebook", ["01_personalize", "14_detailed_description"])
def test_photos_need_a_class_noun(tmp_path, notebook):
    with pytest.raises(ParameterError, match="class is not named"):
        make(notebook, {"subject": str(tmp_path)})
    assert make(notebook, {"subject": str(tmp_path), "class_noun": "dog"}).class_noun == "dog"


# ---------------------------------------------------------------------------------------------------- the job


def job(*words):
    parser = main_job.ArgumentParser()
    main_job.add_settings(parser)
    return plan(defaults() | given(parser.parse_args(list(words))), main_job.OUTPUTS / "never")


LATER = [
    (["--device", "cuda:99"], "device='cuda:99' was asked for"),
    (["--reward", "pick_score"], "pick_score: the pocket weights have none"),
    (["--subject-reward", "pick_score"], "pick_score: the pocket weights have none"),
    (["-p", "03_evaluate.best_of=2", "-p", "03_evaluate.best_of_reward=pick_score"], "the pocket weights have none"),
    (["--scorer-weights", "/nowhere/weights"], "there is no weights folder /nowhere/weights"),
    (["--prompts", "fighting a bear"], "the pocket world knows no cat 'fighting a bear'"),
    (["-p", "03_evaluate.prompts=['fighting a bear']"], "the pocket world knows no cat 'fighting a bear'"),
    (["--class-noun", "unicorn"], "the pocket world has no 'unicorn'"),
    (["--identifier", "photo"], "identifier 'photo' is a common word"),
    (["--identifier", "cat"], "identifier 'cat' stands in the class noun"),
    (["--identifier", "{}"], "identifier '{}' has braces: leave them out"),
    (["--description", "very " * 30], "shorten it by"),
    (["--model", "/nowhere/model"], "is not there: give 'pocket'"),
    (["--set", "reward.weight=1"], "image_reward has no setting 'weight'; it has none."),
    (["-p", "03_evaluate.scorers=['clipt']"], "did you mean 'clip_t'?"),
    (["--set", "ddpo.sampler.n_steps=667"], "give 500 or 900"),
    (["-p", "03_evaluate.picture_cache=/dev/null/x"], "picture_cache='/dev/null/x' cannot be a folder"),
    (["--lora", "README.md"], "README.md is not a .safetensors file"),
]


@pytest.mark.parametrize(("words", "says"), LATER, ids=[" ".join(row[0])[:40] for row in LATER])
def test_what_a_later_stage_would_refuse_is_refused_first(words, says):
    with pytest.raises((ParameterError, ModelError)) as refused:
        require_ready(job(*words))
    assert says in str(refused.value) and "\n" not in str(refused.value)


PLANS = [
    (["--gpu", "nan"], "--gpu nan is no GPU's memory: give it in GiB"),
    (["--gpu", "-3"], "--gpu -3 is no GPU's memory"),
    (["--scorer-weights", "/nowhere"], "there is no weights folder /nowhere"),
    (["--reward", "pick_score"], "the pocket weights have none"),
]


@pytest.mark.parametrize(("words", "says"), PLANS)
def test_plan_refuses_what_run_would(words, says, capsys):
    assert main(["plan", *words]) == 2 and says in capsys.readouterr().err


def test_a_usual_job_is_ready(tmp_path):
    require_ready(job())
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    require_ready(job("--subject", str(tmp_path), "--class-noun", "dog", "--prompts", "a photo of {subject} in a boat"))


def test_the_folder_of_a_model_is_an_input_by_its_parts(folder):
    def now():
        return identify(local_model({"model": str(folder)})["model"])["sha256"]

    before = now()
    (folder / "README.md").write_text("not read")
    assert now() == before
    rewrite(folder, "unet", {"note": "another"})
    assert now() != before
    assert local_model({"model": "pocket"}) == local_model({"model": "some-org/some-model"}) == {}


def test_photos_are_an_input_by_the_pictures(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    before = identify(tmp_path)["sha256"]
    for name in ("Thumbs.db", "1.txt"):
        (tmp_path / name).write_text("beside")
    (tmp_path / "masks").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "masks" / "1.png")
    assert identify(tmp_path)["sha256"] == before
    Image.new("RGB", (64, 64)).save(tmp_path / "2.png")
    assert identify(tmp_path)["sha256"] != before


def test_the_kits_warnings_reach_the_terminal_and_others_do_not(capsys):
    stream = _Warnings(_Lines())
    stream.write("/tmp/ipykernel_12/3.py:1: PhotoWarning: one photo")
    stream.write(" only\n  photos = load()\n/x/site-packages/peft/a.py:3: UserWarning: theirs\n")
    stream.write(f"{project_root()}/ibkit/data/prompts.py:9: UserWarning: poor identifier\nINFO noise\n")
    assert capsys.readouterr().out == "      warning: one photo only\n      warning: poor identifier\n"


# ---------------------------------------------------------------------------------------------------- photos


def picture(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(path, format="PNG")


def pointer(folder):
    (folder / "1.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")


def loop(folder):
    (folder / "1.jpg").symlink_to(folder / "1.jpg")


FOLDERS = [
    (lambda folder: (folder / "1.cr2").write_bytes(b"x"), "no photo that can be read .1.cr2 cannot"),
    (lambda folder: (folder / "1.jxl").write_bytes(b"x"), "no photo that can be read"),
    (lambda folder: (folder / "1.jpg").symlink_to("nowhere.jpg"), "1.jpg is a link to nothing"),
    (loop, "1.jpg is a link to nothing"),
    (pointer, "is a git-lfs pointer"),
    (lambda folder: picture(folder / "10_sks dog" / "1.png"), "its folder '10_sks dog' does: give"),
]


@pytest.mark.parametrize(("fill", "says"), FOLDERS)
def test_folders_without_a_photo_say_what_they_have(tmp_path, fill, says):
    fill(tmp_path)
    with pytest.raises(PhotoError, match=says):
        load_subject_photos(tmp_path, 64)


def test_pictures_that_are_left_out_are_said(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "2.dng").write_bytes(b"x")
    with pytest.warns(PhotoWarning, match=r"2.dng in .* is left out"):
        assert [path.name for path in photo_files(tmp_path)] == ["1.png"]


# ---------------------------------------------------------------------------------------------------- figures, outputs


@pytest.mark.parametrize("text", ["$5 or $6", "a\\frac{1 $x", "$_{"])
def test_a_dollar_is_a_dollar_in_a_figure(text):
    figure, _ = reference_strip([Image.new("RGB", (16, 16))], [text], title=text)
    figure._repr_png_()
    numbers = NotebookFigure()
    axes = numbers.subplots()
    axes.bar([text, "b"], [10, 1000])
    axes.set(yscale="log", title=text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers._repr_png_()
    assert axes.title.get_parse_math() is False and not axes.get_xticklabels()[0].get_parse_math()
    assert axes.yaxis.get_major_ticks()[0].label1.get_parse_math() is True  # 10^2


def test_a_thousand_photos_are_shown_by_a_sample():
    photos = [Image.new("RGB", (16, 16))] * 1000
    figure, table = reference_strip(photos, title="many")
    assert len(table) == MOST_IN_STRIP and len(figure.axes) == MOST_IN_STRIP


@pytest.mark.parametrize("command", ["tables", "report", "claims", "export"])
def test_a_name_that_is_too_long_for_a_file(command, capsys):
    words = [command, "x" * 300, *(["out"] if command == "export" else [])]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 200 and "File name too long" in said and "another path" in said


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--class-noun", "dog", "--subject"], ["plan", "--lora"], ["tables", "outputs/reference", "--out"],
        ["report", "outputs/reference", "--out"], ["stage", "01_personalize", "--out"], ["grid"],
        ["data", "dreambench"], ["plan", "--model"], ["plan", "--protocol"], ["plan", "--scorer-weights"], ["claims"],
        ["tables"],
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("place", ["loop/x", "~nobody-has-this-name/x"])
def test_places_that_lead_nowhere(words, place, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main([*words, str(tmp_path / place) if place.startswith("loop") else place]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said


def test_a_folder_with_a_file_that_is_no_picture_is_refused_before_the_first_stage(tmp_path):
    picture(tmp_path / "1.png")
    pointer(tmp_path)
    with pytest.raises(PhotoError, match="is a git-lfs pointer"):
        require_ready(job("--subject", str(tmp_path), "--class-noun", "dog"))


@pytest.mark.parametrize(
    ("shell", "status", "says"),
    [
        ("{} methods ddpo", 0, ""),
        ("{} methods ddpo >&-", 0, ""),
        ("{} methods ddpo > /dev/full", 2, "error: the output cannot be written (No space left on device)"),
    ],
)
def test_outputs_that_cannot_take_the_text(shell, status, says):
    command = shell.format(f"PYTHONIOENCODING=ascii {sys.executable} -m ibkit")
    done = subprocess.run(["bash", "-c", command], cwd=project_root(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (status, bool(says)) and says in done.stderr


# ---------------------------------------------------------------------------------------------- surroundings, Python


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "abc"}, "RANK is abc"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc' and not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' and not a number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "x"}, "on several machines .LOCAL_WORLD_SIZE is x."),
    ],
)
def test_half_a_launcher_is_refused(monkeypatch, place, says):
    for name in main_job.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ParameterError, match=says):
        main_job._launched()


@pytest.mark.parametrize(
    ("prompts", "seeds", "says"),
    [
        ([], [], "no prompts"),
        ("a cat", [0], r"give a list of texts, such as \['a cat'\]"),
        (["a"], [0, 1], "1 prompts and 2"),
        ([1], [0], "the prompt 1 is no text"),
        (["a"], 0, "seeds is 0: give a list"),
        (["a"], [0.5], r"seeds is \[0.5\]: give a list of whole numbers"),
    ],
)
def test_sample_says_what_is_wrong(tiny, prompts, seeds, says):
    with pytest.raises(ParameterError, match=says):
        sample(tiny, prompts, seeds, Sampler(2, 2.0, 1.0))


@pytest.mark.parametrize("name", [None, 0, torch.device("cpu")])
def test_a_device_is_a_text(name):
    with pytest.raises(ParameterError, match="is no text"):
        pick_device(name)


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}])
def test_a_parameter_that_json_lacks_is_refused(tmp_path, value):
    with pytest.raises(ArtifactError, match="parameters"):
        Run.open(tmp_path / "run", "x", {"value": value})
    assert not (tmp_path / "run").exists()
