"""Makes an OpenRecon package of the host's image: a zip with the labelled image and a page of documentation.

usage: package.py [IMAGE [PIPELINE [FOLDER]]], by default quantitron, subspace and the current folder. The
engine is docker or podman, or what ENGINE names. The scanner's computer reads images as Docker before version
25 saved them, as podman still does (``docker save`` of later ones makes another layout).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

LABEL_NAME = "com.siemens-healthineers.magneticresonance.openrecon.metadata:1.1.0"
"""Name under which the scanner looks for the metadata, base64 of JSON."""
LABEL_FILE = Path(__file__).resolve().parent / "label.json"


def dockerfile(image: str, pipeline: str, label: dict[str, Any]) -> str:
    """The Dockerfile that adds the label and the entry point to an image."""
    encoded = base64.b64encode(json.dumps(label).encode("utf-8")).decode("ascii")
    return (
        f"FROM {image}\n"
        f"ENV QUANTITRON_PIPELINE={pipeline}\n"
        f'LABEL "{LABEL_NAME}"="{encoded}"\n'
        'ENTRYPOINT ["tini", "--", "/opt/quantitron/openrecon.sh"]\n'
        "CMD []\n"
    )


def package_name(label: dict[str, Any]) -> str:
    """How zip, tar and PDF must be called."""
    general = label["general"]
    return f"OpenRecon_{general['vendor']}_{general['name']['en']}_V{general['version']}"


def pdf(lines: list[str]) -> bytes:
    """One A4 page with these lines of Latin text."""
    escaped = [line.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)") for line in lines]
    text = "BT /F 11 Tf 50 780 Td 16 TL " + " ".join(f"({line}) Tj T*" for line in escaped) + " ET"
    stream = text.encode("latin-1", "replace")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R"
        b" /Resources << /Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    page = bytearray(b"%PDF-1.4\n")
    places = []
    for number, content in enumerate(objects, start=1):
        places.append(len(page))
        page += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = len(page)
    page += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    page += b"".join(b"%010d 00000 n \n" % place for place in places)
    page += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table)
    return bytes(page)


def description(label: dict[str, Any], pipeline: str) -> list[str]:
    """What the page of documentation says."""
    general = label["general"]
    regulatory = general["regulatory_information"]
    return [
        f"{general['name']['en']} {general['version']}, pipeline {pipeline}",
        "",
        general["information"]["en"],
        regulatory["safety_advices"],
        "",
        regulatory["special_operating_instructions"],
        regulatory["additional_relevant_information"],
    ]


def main(image: str = "quantitron", pipeline: str = "subspace", folder: str = ".") -> None:
    """Label the image, save it and zip it."""
    engine = os.environ.get("ENGINE") or shutil.which("docker") or shutil.which("podman")
    if engine is None:
        sys.exit("package.py: there is neither docker nor podman; ENGINE names another")
    label = json.loads(LABEL_FILE.read_text(encoding="utf-8"))
    name = package_name(label)
    tag = ":v".join(name.lower().rsplit("_v", 1))
    target = Path(folder, f"{name}.zip")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        recipe = Path(scratch, "Dockerfile")
        recipe.write_text(dockerfile(image, pipeline, label), encoding="utf-8")
        formats = ["--format", "docker"] if Path(engine).name == "podman" else []
        subprocess.run([engine, "build", *formats, "--tag", tag, scratch], check=True)
        image_file = Path(scratch, f"{name}.tar")
        subprocess.run([engine, "save", "--output", str(image_file), tag], check=True)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as package:
            package.write(image_file, image_file.name)
            package.writestr(f"{name}.pdf", pdf(description(label, pipeline)))


if __name__ == "__main__":
    main(*sys.argv[1:4])
