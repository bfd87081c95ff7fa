"""An exported folder to the hub: what is refused before the export, the list of what is sent, and the upload."""

import glob
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from data.checks import count
from data.storage.atomic import atomic_file
from data.storage.hub import HubName, NoHub, ask, told
from train.checkpoint.changes import show
from train.checkpoint.format import file_sha256

if TYPE_CHECKING:  # it takes time to import
    from huggingface_hub import HfApi, ModelCard

T = TypeVar("T")

# Seconds that the hub may take to make a repository, or to list one.
SLOWLY = 60.0
# The folders of a pipeline: what an earlier push has left in them does not belong to this one.
FOLDERS = ("unet", "scheduler", "image_noising_scheduler", "tokenizer", "text_encoder")
# What the hub puts into a new repository.
OWN = {".gitattributes"}
# What is not of the export.
NEVER = (".git", ".cache")
TOKEN = (
    "make a token that may write at https://huggingface.co/settings/tokens, and give it to `hf auth login` or HF_TOKEN"
)


@dataclass(slots=True)
class Destination:
    """A repository that may be pushed to.

    files: that it has by now, by path, as huggingface_hub lists them.  is_new: it is not made yet.
    """

    name: HubName
    private: bool
    is_new: bool
    files: dict[str, Any] = field(default_factory=dict)


def parse_destination(push_to: str) -> HubName:
    """Raises: ValueError if it is no name of a repository on the hub, with its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(push_to)
    except HFValidationError:
        push_to = ""
    if push_to.count("/") != 1:
        raise ValueError(
            "push_to must be ORG/NAME, an organization or user on the hub and a name of letters, digits, '-', '_' "
            "and '.'"
        )
    return HubName(push_to)


def find_destination(push_to: str, private: bool) -> Destination:
    """The repository, if the token may write to it or make it; nothing is made or sent.

    Raises: ValueError in one line if there is no token, it has no such right, the hub does not answer, or the
    repository is public and private was asked for.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    name = parse_destination(push_to)
    if not get_token():
        raise ValueError(f"push_to={push_to} needs a token of the hub: {TOKEN}")
    try:
        user = _ask(name, lambda api: api.whoami())
    except NoHub:
        raise
    except ValueError:
        raise ValueError(f"push_to={push_to}: the hub does not know this token: {TOKEN}") from None
    _check_role(name, user)

    def look(api: Any) -> tuple[Any, dict[str, Any]]:
        try:
            info = api.model_info(name.repo)
        except RepositoryNotFoundError:
            return None, {}
        api.auth_check(name.repo, write=True)
        return info, {
            file.path: file for file in api.list_repo_tree(name.repo, recursive=True) if hasattr(file, "size")
        }

    info, files = _ask(name, look, SLOWLY)
    if info is None:
        _check_namespace(name, user)
        return Destination(name, private, is_new=True)
    if private and not info.private:
        raise ValueError(f"{push_to} on the hub is public: give private=false, or make it private in its settings")
    return Destination(name, bool(info.private), is_new=False, files=files)


def check_contents(destination: Destination, card: "ModelCard") -> None:
    """Raises: ValueError if the repository holds anything else than an export of the run of the card."""
    if not (there := destination.files.keys() - OWN):
        return
    name, text = destination.name, ""
    if "README.md" in there:
        text = _ask(name, lambda api: Path(api.hf_hub_download(name.repo, "README.md")).read_text("utf-8"), SLOWLY)
    if _front_matter(text).get("run") != _front_matter(str(card))["run"]:
        raise ValueError(
            f"push_to={name} holds {count(len(there), 'file')} on the hub that no export of this run has put there "
            f"(first: {min(there)}): name another repository, or empty that one"
        )


def take_up(folder: Path, card: "ModelCard", named: Callable[[str], "ModelCard"]) -> None:
    """Check that a folder which is there holds the export of a card, to push it as it is.

    named: the card under another name; if the folder has that and nobody has edited it, it is replaced.
    Raises: ValueError if the folder is of another export.
    """
    path, now = folder / "README.md", _front_matter(str(card))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    before = _front_matter(text)
    changed = [f"{key} {show(before.get(key))}, now {show(now[key])}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"out={folder.absolute()} exists and is another export than this one ({'; '.join(changed)}): choose "
            "another out=, delete it, or name the checkpoint and the arguments that it was written with"
        )
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    if heading and text == str(named(heading[1])) != str(card):
        with atomic_file(path) as aside:
            aside.write_text(str(card), encoding="utf-8")


def make(destination: Destination) -> None:
    """Make the repository, which proves the right to. Raises: ValueError."""
    if destination.is_new:
        name = destination.name
        _ask(name, lambda api: api.create_repo(name.repo, private=destination.private, exist_ok=True), SLOWLY)


def push(destination: Destination, folder: Path, message: str, dry_run: bool) -> None:
    """Send what the repository does not have yet, in a commit, and print the list of the files with their sizes.

    Raises: ValueError if the upload does not end; the same call goes on with it.
    """
    from huggingface_hub import HfApi, constants

    name = destination.name
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {file: path for file, path in files.items() if file.split("/")[0] not in NEVER}
    there = {file for file, path in files.items() if _is_same(path, destination.files.get(file))}
    gone = sorted(f for f in destination.files if f.split("/")[0] in FOLDERS and "/" in f and f not in files)
    sizes = {file: path.stat().st_size for file, path in files.items()}
    for file, size in sizes.items():
        print(f"{size:>15,} bytes  {file}{'  (is there)' if file in there else ''}")
    for file in gone:
        print(f"{'removed':>21}  {file}  (of an earlier push)")
    to_send = sizes.keys() - there
    total = f"{count(len(sizes), 'file')}, {sum(sizes.values()):,} bytes; {len(to_send)} to send, " \
            f"{sum(sizes[file] for file in to_send):,} bytes"  # fmt: skip
    whose = f"{name} ({'private' if destination.private else 'public'}{', new' if destination.is_new else ''})"
    if dry_run:
        print(f"{whose}: {total}. Nothing is sent: the same command without dry_run=true sends it from {folder}")
        return
    print(f"{whose}: {total}", flush=True)
    if not to_send and not gone:
        return
    try:
        done = HfApi().upload_folder(
            repo_id=name.repo, folder_path=folder, commit_message=message,
            ignore_patterns=[f"{part}/*" for part in NEVER], delete_patterns=[*map(glob.escape, gone)] or None,
        )  # fmt: skip
    except Exception as error:  # its client has errors of its own for each way that a network can fail
        cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
        said = str(told(cause, name))
        raise ValueError(f"the upload to {name} did not end ({said}): the same command goes on with it") from None
    print(f"sent: {constants.ENDPOINT}/{name.repo}/tree/{done.oid}")


def _ask(name: HubName, question: Callable[["HfApi"], T], seconds: float | None = None) -> T:
    """As data.storage.hub.ask; NoHub tells what to do."""
    try:
        return ask(name, question, seconds)
    except NoHub as error:
        raise NoHub(f"push_to={name}: {error}: try again later, or export without push_to=") from None


def _front_matter(card: str) -> dict[str, object]:
    """The licence of a card, and what it says of the training; as much of it as there is."""
    from huggingface_hub import ModelCard

    try:
        front = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):  # anything may stand in the card of another
        return {}
    training = front.get("training")
    return {"license": front.get("license"), **(training if isinstance(training, dict) else {})}


def _check_role(name: HubName, user: dict) -> None:
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(f"push_to={name}: the token of {user.get('name')} may only read: {TOKEN}")


def _check_namespace(name: HubName, user: dict) -> None:
    """Raises: ValueError if the user may make no repository of this owner."""
    roles = {org.get("name"): org.get("roleInOrg") for org in user.get("orgs", [])} | {user.get("name"): "admin"}
    owner = name.repo.partition("/")[0]
    able = [owner for owner, role in roles.items() if role != "read"]
    if owner not in able:
        raise ValueError(
            f"push_to={name}: {user.get('name')}, whose token this is, may make no repository of {owner} on the hub, "
            f"only of {', '.join(sorted(map(str, able)))}"
        )


def _is_same(path: Path, there: Any) -> bool:
    """Whether the hub has a file with these contents.  there: as huggingface_hub lists it, None if it has no such."""
    if there is None or there.size != path.stat().st_size:
        return False
    if there.lfs:
        return there.lfs.sha256 == file_sha256(path)
    # As git names a file.
    return there.blob_id == hashlib.sha1(b"blob %d\0" % there.size + path.read_bytes()).hexdigest()
