"""Checkpoints on the Hugging Face hub: ``hf://ORG/NAME[/FILE][@REVISION]`` wherever a checkpoint is named."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

SCHEME = "hf://"
FORM = "hf://ORG/NAME, hf://ORG/NAME/FILE or hf://ORG/NAME/FILE@REVISION"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

# written by checkpoint publish: the weights; for networks of nnU-Net also what nnU-Net's development version downloads,
# the same weights in nnssl's layout
WEIGHTS, ADAPTATION_PLAN, NNSSL_WEIGHTS = "model.safetensors", "adaptation_plan.json", "checkpoint_final.pth"


class Address(NamedTuple):
    """A place on the hub.

    Attributes:
        repository: ORG/NAME.
        file: path in the repository; None: its only checkpoint.
        revision: branch, tag or commit; None: the main branch.
    """

    repository: str
    file: str | None
    revision: str | None

    def __str__(self) -> str:
        file, revision = f"/{self.file}" if self.file else "", f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repository}{file}{revision}"


def parse_address(text: str) -> Address:
    """Reads ``hf://ORG/NAME[/FILE][@REVISION]``.

    Raises:
        ValueError: the text has another form.
    """
    place, at, revision = text.removeprefix(SCHEME).partition("@")
    organisation, _, rest = place.partition("/")
    name, slash, file = rest.partition("/")
    if not organisation or not name or bool(slash) != bool(file) or bool(at) != bool(revision):
        raise ValueError(f"{text} is not an address on the Hugging Face hub: write {FORM}")
    return Address(f"{organisation}/{name}", file or None, revision or None)


def local_file(path: str | Path) -> Path:
    """The path of a checkpoint on this machine; an address on the hub is downloaded to the hub's cache first.

    Without a connection, the cache's file is taken.

    Args:
        path: a path, or ``hf://ORG/NAME[/FILE][@REVISION]``.

    Raises:
        ValueError: the address has another form, or the repository holds several checkpoints.
        FileNotFoundError: there is no such repository, revision or file, or no checkpoint in the repository.
        PermissionError: the repository is gated.
        ConnectionError: the hub cannot be reached, and its cache does not hold the file.
    """
    if not str(path).startswith(SCHEME):
        return Path(path)
    address, hub = parse_address(str(path)), constants.ENDPOINT
    try:
        if address.file is None:
            address = _only_checkpoint(address)
        return Path(hf_hub_download(address.repository, str(address.file), revision=address.revision))
    except HFValidationError as error:
        raise ValueError(f"{address} is not an address on the Hugging Face hub: {error}") from error
    except GatedRepoError as error:  # a RepositoryNotFoundError, too
        raise PermissionError(
            f"{address} is gated: ask for access at {hub}/{address.repository}, then log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{hub} has no repository {address.repository}, or it is private: check the name, or log in: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{address.repository} has no revision {address.revision}: see {hub}/{address.repository}/commits/main"
        ) from error
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError, too
        raise _unreachable(address, error.__cause__ or error) from error
    except EntryNotFoundError as error:
        found = ", ".join(_checkpoints(_listed(address))) or "none"
        raise FileNotFoundError(
            f"{address.repository} has no file {address.file}; its checkpoints are: {found}"
        ) from error
    except HfHubHTTPError as error:
        raise _unreachable(address, error) from error


def _only_checkpoint(address: Address) -> Address:
    """The address of the only checkpoint in a repository."""
    try:
        names = _listed(address)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        names = _cached(address, error)
    except HFValidationError:
        raise
    except Exception as error:  # of the HTTP library, which is another one in other versions of huggingface_hub
        names = _cached(address, error)
    found = _checkpoints(names)
    if set(found) == {WEIGHTS, NNSSL_WEIGHTS} and ADAPTATION_PLAN in names:
        found = [WEIGHTS]
    if not found:
        raise FileNotFoundError(
            f"{address} holds no checkpoint ({', '.join(SUFFIXES)}); it has {', '.join(names[:10]) or 'no files'}"
        )
    if len(found) > 1:
        choices = ", ".join(str(address._replace(file=name)) for name in found)
        raise ValueError(f"{address} holds {len(found)} checkpoints: name one of them: {choices}")
    return address._replace(file=found[0])


def _listed(address: Address) -> list[str]:
    # not list_repo_files: without a connection, that tries again for half a minute
    about = HfApi().model_info(address.repository, revision=address.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return [file.rfilename for file in about.siblings or ()]


def _checkpoints(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(SUFFIXES)]


def _cached(address: Address, reason: Exception) -> list[str]:
    """Files of a repository that the cache holds, for when the hub cannot be reached."""
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        repositories = frozenset()
    wanted = address.revision or constants.DEFAULT_REVISION
    for repository in repositories:
        for revision in repository.revisions:
            if repository.repo_id == address.repository and wanted in (revision.commit_hash, *revision.refs):
                names = [file.file_path.relative_to(revision.snapshot_path).as_posix() for file in revision.files]
                warnings.warn(
                    f"{constants.ENDPOINT} cannot be reached: of {address}, the files in the cache are used",
                    stacklevel=2,
                )
                return sorted(names)
    raise _unreachable(address, reason) from reason


def _unreachable(address: Address, reason: BaseException) -> ConnectionError:
    lines = (str(reason).strip() or type(reason).__name__).splitlines()
    return ConnectionError(
        f"{address} is not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached "
        f"({lines[0]}). Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE; or download the file on another machine "
        f"(hf download {address.repository}) and give its path."
    )
