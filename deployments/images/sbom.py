"""Complete a CycloneDX bill of materials of a Python environment with the operating system's packages, and check it.

    python sbom.py NAME VERSION PYTHON.json DPKG_STATUS OUT.json

Runs while an image is built, with the packages of tools.txt and nothing of this project.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

_FIELD = re.compile(r"^([A-Za-z-]+): *(.*)$", re.MULTILINE)


def complete(document: dict[str, Any], name: str, version: str, dpkg_status: str) -> dict[str, Any]:
    """`document` with the image as its subject and every installed Debian package as a component."""
    subject = {"type": "container", "bom-ref": "image", "name": name, "version": version}
    components = [*document.get("components", []), *_debian(dpkg_status)]
    depends = [entry for entry in document.get("dependencies", []) if entry["ref"] != "image"]
    contains = {"ref": "image", "dependsOn": sorted(component["bom-ref"] for component in components)}
    return document | {
        "metadata": document.get("metadata", {}) | {"component": subject},
        "components": components,
        "dependencies": [contains, *depends],
    }


def _debian(dpkg_status: str) -> Iterator[dict[str, Any]]:
    """Package URLs as https://github.com/package-url/purl-spec has them for `deb`."""
    for paragraph in dpkg_status.strip().split("\n\n"):
        fields = dict(_FIELD.findall(paragraph))
        if fields.get("Status") != "install ok installed":
            continue
        package, version = fields["Package"], fields["Version"]
        purl = f"pkg:deb/debian/{quote(package)}@{quote(version)}?arch={fields['Architecture']}&distro=debian-12"
        yield {"type": "library", "bom-ref": purl, "name": package, "version": version, "purl": purl}


def check(text: str) -> str | None:
    """What is wrong with the document by CycloneDX's own schema; None: nothing."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.from_version(json.loads(text)["specVersion"])).validate_str(text)
    return None if error is None else str(error)


def main(name: str, version: str, python: str, dpkg: str, out: str) -> int:
    """Write OUT.json; 1 when it would not be valid."""
    document = json.loads(Path(python).read_text(encoding="utf-8"))
    whole = complete(document, name, version, Path(dpkg).read_text(encoding="utf-8"))
    text = json.dumps(whole, indent=1, sort_keys=True) + "\n"
    if wrong := check(text):
        print(f"{out}: not a valid CycloneDX document: {wrong}", file=sys.stderr)
        return 1
    Path(out).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
