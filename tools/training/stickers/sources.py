"""Where the drawings come from: two emoji sets under permissive licences, fetched for training only and never shipped."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORK = Path(__file__).parents[3] / ".runtime" / "training" / "stickers"  # sources, pictures and checkpoints; not kept in git


@dataclass(frozen=True)
class Source:
    """An npm package of SVG drawings, pinned by version and by the hash of its archive."""

    package: str
    version: str
    sha256: str
    licence: str

    @property
    def archive(self) -> Path:
        return WORK / "sources" / f"{self.package.strip('@').replace('/', '-')}-{self.version}.tgz"


SOURCES = (
    Source(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    Source(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
)


def fetch(source: Source) -> dict[str, Any]:
    """The icons of a package, in iconify's JSON; downloaded through npm the first time.

    Raises:
        RuntimeError: when npm is missing or fails, or when the archive is not the one that this world was made with.
    """
    if not source.archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("training the stickers needs npm (it comes with Node.js) to fetch the emoji drawings")
        source.archive.parent.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"{source.package}@{source.version}", "--silent"]
        done = subprocess.run(command, cwd=source.archive.parent, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm could not fetch {source.package} {source.version}: {done.stderr.strip()}")
    data = source.archive.read_bytes()
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise RuntimeError(f"{source.archive} is not the archive this world was made with; delete it and try again")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        icons = archive.extractfile("package/icons.json")
        assert icons is not None
        return json.load(icons)
