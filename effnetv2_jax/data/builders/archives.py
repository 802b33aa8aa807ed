"""Archives of archives, read by byte range: a tar of one tar per synset.

A tar file is a chain of headers, each followed by its member, so that the list of members costs
one small read for each of them, and any member is then a range of bytes of the file. No part of
an archive is unpacked to disk, and any number of workers read their own ranges of it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from etils import epath

from effnetv2_jax.data.label_space import SYNSET
from effnetv2_jax.errors import InputError

_BLOCK = tarfile.BLOCKSIZE
_GZIP_MAGIC = b"\x1f\x8b"


class Member(NamedTuple):
    """A file that is `size` bytes of `path` from `offset` on; `name` is without folders."""

    name: str
    path: str
    offset: int
    size: int


class DamagedTar(Exception):
    """A tar file that is cut short or whose next header is not one."""


class _Range:
    """A part of an open file as a file of its own, as far as `tarfile` needs one."""

    def __init__(self, file: IO[bytes], start: int, size: int):
        self._file, self._start, self._size = file, start, size
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def read(self, count: int) -> bytes:
        count = max(0, min(count, self._size - self._position))
        # The file's own place is elsewhere after its members were read.
        self._file.seek(self._start + self._position)
        content = self._file.read(count)
        self._position += len(content)
        return content


def open_file(path: str) -> IO[bytes]:
    """Opens a local file or one of a store as gs:// for reading."""
    return epath.Path(path).open("rb")


def read_bytes(file: IO[bytes], member: Member) -> bytes:
    """The content of a member of the open file.

    Raises:
      DamagedTar: the file ends before it.
    """
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) != member.size:
        raise DamagedTar(f"ends inside {member.name!r}")
    return content


def tar_members(file: IO[bytes], tar: Member) -> Iterator[Member]:
    """The files in a tar, in order, reading their headers alone.

    Args:
      file: `tar.path`, open; it may be read elsewhere between two members.
      tar: where the tar file is; nothing, which some tools write for no files, is an empty tar.

    Raises:
      DamagedTar: after the last member that is whole.
    """
    if not tar.size:
        return
    end = 0
    try:
        window = _Range(file, tar.offset, tar.size)
        with tarfile.open(fileobj=window, mode="r:") as archive:  # type: ignore[call-overload]
            for info in archive:
                end = info.offset_data
                if info.isfile():
                    end += -(-info.size // _BLOCK) * _BLOCK
                    if info.offset_data + info.size > tar.size:
                        raise DamagedTar(f"ends inside {info.name!r}")
                    name = info.name.rpartition("/")[2]
                    yield Member(name, tar.path, tar.offset + info.offset_data, info.size)
    except tarfile.TarError as error:
        raise DamagedTar(str(error)) from error
    # `tarfile` takes a damaged header for the end, which is a block of zeros or of nothing.
    window.seek(end)
    if window.read(_BLOCK).strip(b"\0"):
        raise DamagedTar(f"has a damaged header at byte {end}")


def synset_tars(manual_dir: str, archive: str) -> dict[str, Member]:
    """Finds the tar of every synset.

    Args:
      manual_dir: holds the file `archive`.tar, or the same as `archive`.tar.gz, which is how
        image-net.org names it although it may be a plain tar; or the folder `archive` of
        files as n01440764.tar.
      archive: for instance `winter21_whole`.

    Returns:
      Synset -> its tar, sorted by synset.

    Raises:
      InputError: nothing is there, or it is compressed, damaged, or without synsets.
    """
    root = epath.Path(manual_dir)
    folder = root / archive
    files = [root / f"{archive}.tar", root / f"{archive}.tar.gz"]
    path = next((p for p in files if p.exists()), None)
    if path is not None:
        members = _outer_members(str(path))
    elif folder.is_dir():
        path = folder
        members = [
            Member(p.name, str(p), 0, p.stat().length)
            for p in folder.iterdir()
            if p.suffix == ".tar"
        ]
    else:
        raise InputError(
            f"neither the file {str(files[0])!r} nor the folder {str(folder)!r} is there: put the "
            f"archive of image-net.org there, or its files n*.tar into that folder."
        )
    tars: dict[str, Member] = {}
    for member in members:
        synset, dot, suffix = member.name.partition(".")
        if not SYNSET.fullmatch(synset) or dot + suffix != ".tar":
            continue
        if synset in tars:
            raise InputError(f"{str(path)!r} holds {member.name} twice: keep one of them.")
        tars[synset] = member
    if not tars:
        raise InputError(
            f"{str(path)!r} holds no tar files of synsets as n01440764.tar: put the archive of "
            "image-net.org there unchanged."
        )
    return dict(sorted(tars.items()))


def _outer_members(path: str) -> list[Member]:
    with open_file(path) as file:
        if file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC:
            raise InputError(
                f"{path!r} is compressed, and byte ranges of a compressed file cannot be read: "
                "decompress it with `gunzip` first."
            )
        outer = Member(epath.Path(path).name, path, 0, epath.Path(path).stat().length)
        try:
            return list(tar_members(file, outer))
        except DamagedTar as error:
            raise InputError(f"{path!r} {error}: fetch it again.") from error
