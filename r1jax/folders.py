"""A folder of files to read, on this machine or behind any URL that fsspec opens: gs://, s3://, hf://, memory://."""

import dataclasses
import os
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem


@dataclasses.dataclass(frozen=True)
class Folder:
    """Where the files of a released model lie; `str` is the path or URL."""

    files: Any  # a file system of fsspec
    root: str
    name: str

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return self.files.isdir(self.root)

    def has(self, file: str) -> bool:
        """Whether it holds this file."""
        return self.files.isfile(f"{self.root}/{file}")

    def names(self) -> list[str]:
        """The names of its files, sorted."""
        entries = self.files.ls(self.root, detail=True)
        # Not only what is of type "file": a download of the hub is a folder of links.
        return sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] != "directory")

    def path(self, file: str) -> str:
        """Path or URL of a file, for messages."""
        return f"{self.name}/{file}"

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return self.files.size(f"{self.root}/{file}")

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a file from `start` up to `stop`, or all."""
        return self.files.cat_file(f"{self.root}/{file}", start=start, end=stop)

    def text(self, file: str) -> str:
        """A file as UTF-8; ValueError where it is none."""
        return self.read(file).decode("utf-8")

    def read_into(self, file: str, start: int, out: np.ndarray) -> None:
        """Fills `out` (bytes) from `start` on; ValueError where the file ends before."""
        if isinstance(self.files, LocalFileSystem):
            # Straight into the buffer that is used again and again: fresh memory costs as much as the reading.
            with open(f"{self.root}/{file}", "rb", buffering=0) as stream:
                stream.seek(start)
                view, done = memoryview(out), 0
                while done < len(view) and (n := stream.readinto(view[done:])):
                    done += n
        else:
            found = self.read(file, start, start + len(out))
            done = len(found)
            out[:done] = np.frombuffer(found, np.uint8)
        if done < len(out):
            raise ValueError(
                f"{self.path(file)} ends {len(out) - done} bytes too early: it has changed while it was read"
            )


def folder_at(path: str | os.PathLike[str] | Folder) -> Folder:
    """The folder of a local path or URL; nothing is opened yet.

    Raises:
        ValueError: a URL of a kind that needs a package that is not installed (gs:// needs gcsfs).
    """
    if isinstance(path, Folder):
        return path
    name = os.fspath(path).rstrip("/") or "/"
    try:
        files, root = fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"config.model.path: {name} cannot be opened: {error}") from error
    return Folder(files, root.rstrip("/"), name)
