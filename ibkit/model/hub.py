"""Models on the Hugging Face hub: which of a repository's files the kit reads, found in the hub's cache or downloaded.

The cache is the one that diffusers and transformers fill, and it is asked first, without the network: a model that is
there loads at once, and is the one that was downloaded, not what its branch holds by now.
"""

import contextlib
import importlib.util
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from ibkit.errors import ModelError

HUB_NAMES = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
TIMEOUT_S = 5.0
# Each line is one file under the names that it may have; the first that is there is taken.
NEEDED = (
    ("unet/config.json",),
    ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"),
    ("vae/config.json",),
    ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"),
    ("text_encoder/config.json",),
    ("text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors"),
    ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    ("tokenizer/merges.txt", "tokenizer/tokenizer.json"),
    ("tokenizer/tokenizer_config.json",),
    ("scheduler/scheduler_config.json",),
)
WELCOME = ("tokenizer/special_tokens_map.json",)  # older tokenizers have it


def is_name(model: str) -> bool:
    """Whether a model's name can be one on the hub: `some-org/some-model`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return "/" in model


def choose(is_there: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The files to read, by whether a name is there; and the first name of each that is not there under any."""
    found = [next(filter(is_there, names), "") for names in NEEDED]
    return [name for name in found if name], [names[0] for names, name in zip(NEEDED, found, strict=True) if not name]


def in_cache(repository: str, revision: str = "") -> tuple[Path, list[str]]:
    """The folder in the hub's cache that has a repository's files, and which are missing (then it may not exist)."""
    from huggingface_hub import constants, try_to_load_from_cache

    def path_of(name: str) -> str | None:
        path = try_to_load_from_cache(repository, name, constants.HF_HUB_CACHE, revision or None)
        return path if isinstance(path, str) else None

    files, missing = choose(lambda name: path_of(name) is not None)
    place = path_of(files[0]) if files else None
    return Path(place).parents[1] if place else Path(constants.HF_HUB_CACHE), missing


def obtain(repository: str, revision: str = "") -> Path:
    """The folder with a repository's files, downloaded where the cache lacks some.

    The revision is a branch, tag or commit; empty, the main branch. A ModelError where they are not in the cache, and
    the hub cannot be asked, does not have them, or is cut off.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    folder, missing = in_cache(repository, revision)
    if not missing:
        return folder
    there, by_hand = require_reachable(repository, revision, missing[0])
    try:
        info = HfApi().model_info(repository, revision=revision or None, timeout=TIMEOUT_S)
        names = {file.rfilename for file in info.siblings or []}
        files, missing = choose(names.__contains__)
        if not missing:
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*files, *WELCOME]))
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"the hub does not give the files {there} ({first}): check its name, {by_hand}.") from error
    raise ModelError(
        f"on the hub there is no {missing[0]} {there}: it is not in diffusers format with safetensors weights; name "
        f"another one, {by_hand}."
    )


def require_reachable(repository: str, revision: str, lacking: str) -> tuple[str, str]:
    """Refuse to download where that cannot be; returns words for a later refusal: of which model, and what else to do.

    Args:
        lacking: a file that the cache has not.

    Raises:
        ModelError: the hub is switched off, its address or a proxy's is none, or it does not answer.
    """
    from huggingface_hub import constants

    there = f"of the model {repository}{f' at revision {revision}' if revision else ''}"
    by_hand = "or give the path of a diffusers folder or .safetensors file that is on this machine"
    lacking = f"the hub's cache has no {lacking} {there}"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{lacking}, and HF_HUB_OFFLINE is set: unset it and go online once, {by_hand}.")
    if wrong := misset(constants.ENDPOINT):
        raise ModelError(f"{lacking}, and {wrong}.")
    if not answers(constants.ENDPOINT):
        raise ModelError(f"{lacking}, and {constants.ENDPOINT} does not answer: go online once, {by_hand}.")
    return there, by_hand


def misset(endpoint: str) -> str:
    """What is wrong with the address of the hub or of a proxy, and what to do, in words; empty where nothing is."""
    if problem := _no_address(endpoint, ("http", "https")):
        return f"HF_ENDPOINT={endpoint!r} {problem}: write it as https://host, or unset it"
    proxies = urllib.request.getproxies()
    named = [(kind, proxies[kind]) for kind in (urllib.parse.urlsplit(endpoint).scheme, "all") if kind in proxies]
    for kind, proxy in named:
        variable = f"the proxy of {kind.upper()}_PROXY, {proxy!r},"
        if problem := _no_address(proxy, ("http", "https", "socks5", "socks5h")):
            return f"{variable} {problem}: write it as http://host:port, or unset it"
        if proxy.startswith("socks5") and importlib.util.find_spec("socksio") is None:
            return f"{variable} needs the package socksio: pip install socksio, or name an http proxy"
    return ""


def _no_address(url: str, schemes: tuple[str, ...]) -> str:
    """Why a text is no address of a server; empty where it is one."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in schemes and parts.hostname and (parts.port is None or parts.port):
            return ""
    except ValueError:  # of a port that is no number, of brackets
        pass
    return f"is no address that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}"


def answers(url: str) -> bool:
    """Whether a server answers a request within `TIMEOUT_S`; the hub's client would try for half a minute."""
    import httpx  # as the hub's client does, so through the same proxies

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError, OSError, ValueError):
            httpx.head(url, timeout=TIMEOUT_S)  # whatever the status, it is an answer
            answered.set()

    # In a thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return answered.is_set()
