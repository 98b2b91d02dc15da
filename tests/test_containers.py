"""The files of docker/ fit the package, each other and what they promise; no container engine is needed."""

from __future__ import annotations

import base64
import configparser
import json
import re
import runpy
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
REQUIREMENTS = DOCKER / "requirements"
VARIANTS = ("cpu", "cuda12", "cuda13")
USER = "10001"
PORT = 9002
pytestmark = pytest.mark.skipif(not DOCKER.is_dir(), reason="this is not a checkout")


def _instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile in order, comments and line ends taken out."""
    lines = [
        line
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in text.splitlines()]  # type: ignore[misc]


def _stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage, by its name."""
    stages: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in _instructions():
        if word == "FROM":
            name = rest.split(" AS ")[1]
            stages[name] = []
        if name:
            stages[name].append((word, rest))
    return stages


def _pins(name: str) -> list[tuple[Requirement, list[str]]]:
    """Requirements of a file of docker/requirements, with their hashes."""
    lines = (REQUIREMENTS / f"{name}.txt").read_text().replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if line and not line.startswith("#"):
            requirement, *hashes = line.split(" --hash=")
            found.append((Requirement(requirement.strip()), [text.strip() for text in hashes]))
    return found


def _version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_requirement_is_pinned_by_hash(path: Path) -> None:
    pins = _pins(path.stem)
    assert pins
    for requirement, hashes in pins:
        assert _version(requirement), requirement
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", text) for text in hashes), requirement


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_pins_hold_what_the_package_needs_in_the_versions_of_constraints(variant: str, python: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }

    def holds(marker: Marker | None) -> bool:
        return marker is None or marker.evaluate(environment)

    pinned = {
        canonicalize_name(requirement.name): _version(requirement)
        for requirement, _ in [*_pins("packages"), *_pins(variant)]
        if holds(requirement.marker)
    }
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = [Requirement(line) for line in setup["options"]["install_requires"].split("\n") if line.strip()]
    for requirement in needed:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is missing: run docker/requirements/lock.py"
        assert requirement.specifier.contains(version), f"{requirement.name}: run docker/requirements/lock.py"
    # docker/steps/quantitron.sh installs the checkout with what is pinned, on every Python
    assert int(pinned["setuptools"].split(".")[0]) > 70
    constraints = [
        Requirement(line.split("#")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    for constraint in constraints:
        name = canonicalize_name(constraint.name)
        if name in pinned and holds(constraint.marker) and not (name == "torch" and variant == "cuda12"):
            assert pinned[name].split("+")[0] == _version(constraint), (
                f"{name}: run docker/requirements/lock.py"
            )


def test_the_cpu_image_holds_nothing_of_cuda() -> None:
    names = [requirement.name for requirement, _ in [*_pins("packages"), *_pins("cpu")]]
    assert not [name for name in names if re.match("nvidia|cuda|triton|cufinufft", name)]
    (torch,) = [_version(requirement) for requirement, _ in _pins("cpu") if requirement.name == "torch"]
    assert torch.endswith("+cpu")


def test_a_requirement_is_in_one_file_of_a_variant_only() -> None:
    common = {str(requirement) for requirement, _ in _pins("packages")}
    for variant in VARIANTS:
        assert not common & {str(requirement) for requirement, _ in _pins(variant)}


def test_targets_and_bases() -> None:
    stages = _stages()
    assert {"host", "gadgetron"} <= stages.keys()
    froms = {name: stage[0][1].split(" AS ")[0] for name, stage in stages.items()}
    assert froms["host"] == froms["host-build"] == "${DEBIAN}"
    assert froms["gadgetron"] == froms["gadgetron-build"] == "${BASE}"
    arguments = dict(rest.split("=", 1) for word, rest in _instructions() if word == "ARG" and "=" in rest)
    assert arguments["BASE"].startswith("ghcr.io/gadgetron/gadgetron/")
    assert ":" in arguments["DEBIAN"]
    assert arguments["VARIANT"] in VARIANTS


@pytest.mark.parametrize("target", ["host", "gadgetron"])
def test_images_run_without_root_and_are_watched(target: str) -> None:
    stage = _stages()[target]
    words = [word for word, _ in stage]
    users = [rest for word, rest in stage if word == "USER"]
    assert users[-1] == f"{USER}:{USER}"
    assert not [
        rest for word, rest in stage[words.index("USER") :] if word == "RUN" and users[0] == users[-1]
    ]
    made = " ".join(rest for word, rest in stage if word == "RUN")
    assert f"--uid {USER}" in made
    assert ("VOLUME", "/data") in stage
    assert ("EXPOSE", str(PORT)) in stage
    (check,) = [rest for word, rest in stage if word == "HEALTHCHECK"]
    assert json.loads(check.split("CMD ", 1)[1])[1:2] == ["/opt/quantitron/health.py"]
    (environment,) = [rest for word, rest in stage if word == "ENV"]
    settings = dict(part.split("=", 1) for part in shlex.split(environment))
    # the root file system is read-only: whatever is written goes to the volume or to /tmp
    for name in ("HOME", "QUANTITRON_CACHE", "MPLCONFIGDIR", "NUMBA_CACHE_DIR"):
        assert settings[name].startswith(("/data", "/tmp")), name


def test_caches_are_removed_in_the_step_that_fills_them() -> None:
    steps = [rest for word, rest in _instructions() if word == "RUN"]
    scripts = [path.read_text() for path in (DOCKER / "steps").glob("*.sh")]
    for step in [*steps, *scripts]:
        if "apt-get update" in step:
            assert "rm -rf /var/lib/apt/lists/*" in step
        if "pip" in step and " install " in step and "apt-get install" not in step:
            assert "--no-cache-dir" in step
    assert not [step for step in steps if "pip install" in step], "pip belongs into docker/steps"


def test_copied_paths_exist_and_reach_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    sent = {line[1:] for line in ignored if line.startswith("!")}
    for word, rest in _instructions():
        if word == "COPY" and "--from" not in rest:
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            for source in sources:
                if source != ".":
                    assert list(ROOT.glob(source)), source
                    assert Path(source).parts[0] in sent, source
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options"]["packages"].split()
    assert {name.split(".")[1] for name in packages} <= sent
    assert {"setup.cfg", "pyproject.toml", "LICENSE", "README.md"} <= sent
    assert not sent & {"tests", "benchmarks", ".git"}


def test_pipelines_go_where_gadgetron_looks_for_them() -> None:
    stage = _stages()["gadgetron"]
    copied = [rest for word, rest in stage if word == "COPY"]
    assert "pipelines/*.xml ${GADGETRON_PREFIX}/share/gadgetron/config/" in copied
    (environment,) = [rest for word, rest in stage if word == "ENV"]
    settings = dict(part.split("=", 1) for part in shlex.split(environment))
    assert settings["GADGETRON_HOME"] == "${GADGETRON_PREFIX}"
    assert settings["PATH"].startswith("/opt/quantitron-path:")
    # Gadgetron reads a config name that is a variable's as that variable's value
    assert (ROOT / "pipelines" / settings["openrecon"]).is_file()


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        (["-m", "gadgetron", "18000", "quantitron.gadgets.chain", "run"], "ours"),
        (["-m", "gadgetron"], "ours"),
        (["--version"], "ours"),
        (["-c", "import quantitron.gadgets.chain"], "ours"),
        (["-m", "gadgetron", "18000", "my_gadgets.filter", "run"], "theirs"),
    ],
)
def test_only_our_gadgets_get_our_python(tmp_path: Path, arguments: list[str], taken: str) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name / "bin").mkdir(parents=True)
        python = tmp_path / name / "bin" / "python"
        python.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        python.chmod(0o755)
    script = (DOCKER / "gadgetron" / "python").read_text()
    assert script.count("/opt/quantitron/bin/python") == 1
    first = tmp_path / "python"
    first.write_text(script.replace("/opt/quantitron/bin/python", str(tmp_path / "ours/bin/python")))
    done = subprocess.run(
        ["sh", str(first), *arguments],
        env={"GADGETRON_HOME": str(tmp_path / "theirs")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [taken, *" ".join(arguments).split()]


def test_compose_is_closed_to_all_but_this_machine() -> None:
    from quantitron.host.connections import GRACE

    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    service = services["quantitron"]
    (port,) = service["ports"]
    assert port == "${QUANTITRON_BIND:-127.0.0.1}:9002:9002"
    assert service["read_only"] is True
    assert service["user"] == f"{USER}:{USER}"
    assert service["cap_drop"] == ["ALL"]
    assert service["volumes"] == ["data:/data"]
    assert service["tmpfs"][0].startswith("/tmp")
    assert service["mem_limit"]
    assert service["restart"] == "unless-stopped"
    assert float(service["stop_grace_period"].rstrip("s")) > GRACE
    (device,) = services["quantitron-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    _check_command(service["command"])


def test_kubernetes_runs_the_same_image_the_same_way() -> None:
    from quantitron.host.connections import GRACE

    objects = {part["kind"]: part for part in yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())}
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert str(pod["securityContext"]["runAsUser"]) == USER
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    # a rolling update would start the new pod first, which waits for the GPU and the volume of the old one
    assert objects["Deployment"]["spec"]["strategy"]["type"] == "Recreate"
    (watch,) = [rest for word, rest in _stages()["host"] if word == "HEALTHCHECK"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"] == json.loads(watch.split("CMD ", 1)[1]), probe
    assert pod["terminationGracePeriodSeconds"] > GRACE
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/tmp"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container["ports"][0]["containerPort"] == PORT
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"] == labels
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert container["image"].endswith(f":{setup['metadata']['version']}")
    _check_command(container["args"])


def _check_command(arguments: list[str]) -> None:
    """The image's arguments are options that ``quantitron serve`` has, and a pipeline that there is."""
    from typer.main import get_command

    from quantitron.host.command import app
    from quantitron.pipelines import pipeline_names

    name, *options = arguments
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    values = command.make_context(name, list(options)).params
    assert values["host"] == "0.0.0.0"
    assert values["port"] == PORT
    pipeline = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", values["default_pipeline"] or "subspace")
    assert pipeline in pipeline_names()


def test_the_start_of_the_image_and_of_openrecon() -> None:
    stage = dict(_stages()["host"])
    assert json.loads(stage["ENTRYPOINT"]) == ["tini", "--", "quantitron"]
    _check_command(json.loads(stage["CMD"]))
    (line,) = [
        line
        for line in (DOCKER / "openrecon" / "entrypoint.sh").read_text().splitlines()
        if line.startswith("exec ")
    ]
    assert shlex.split(line)[:2] == ["exec", "quantitron"]
    _check_command(shlex.split(line)[2:])


def _label() -> dict[str, Any]:
    label: dict[str, Any] = json.loads((DOCKER / "openrecon" / "label.json").read_text())
    return label


def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((DOCKER / "openrecon" / "schema-1.1.0.json").read_text())
    return schema


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}
KEYWORDS = {
    *("$schema", "$ref", "title", "description", "definitions", "type", "required", "additionalProperties"),
    *("properties", "items", "oneOf", "const", "enum", "pattern", "minLength", "maxLength", "minItems"),
    *("maxItems", "uniqueItems", "minimum", "maximum", "multipleOf"),
}


def _faults(value: Any, rule: dict[str, Any], root: dict[str, Any], at: str = "") -> list[str]:
    """What is wrong with a value, by the keywords of JSON Schema that the schema uses."""
    assert rule.keys() <= KEYWORDS
    if "$ref" in rule:
        return _faults(value, root["definitions"][rule["$ref"].rsplit("/", 1)[1]], root, at)
    kind = rule.get("type")
    is_bool = isinstance(value, bool)
    if kind and (not isinstance(value, TYPES[kind]) or (is_bool and kind in ("integer", "number"))):
        return [f"{at}: not of type {kind}"]
    wrong = []
    if "const" in rule and value != rule["const"]:
        wrong.append(f"{at}: not {rule['const']}")
    if "enum" in rule and value not in rule["enum"]:
        wrong.append(f"{at}: none of {rule['enum']}")
    if "oneOf" in rule and sum(not _faults(value, one, root, at) for one in rule["oneOf"]) != 1:
        wrong.append(f"{at}: not exactly one of the alternatives")
    if isinstance(value, str):
        if "pattern" in rule and not re.search(rule["pattern"], value):
            wrong.append(f"{at}: does not match {rule['pattern']}")
        if not rule.get("minLength", 0) <= len(value) <= rule.get("maxLength", len(value)):
            wrong.append(f"{at}: of wrong length")
    elif isinstance(value, (int, float)) and not is_bool:
        if not rule.get("minimum", value) <= value <= rule.get("maximum", value):
            wrong.append(f"{at}: out of range")
        step = rule.get("multipleOf")
        if step and abs(value / step - round(value / step)) > 1e-9:
            wrong.append(f"{at}: no multiple of {step}")
    elif isinstance(value, list):
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)):
            wrong.append(f"{at}: of wrong length")
        if rule.get("uniqueItems") and len({json.dumps(one, sort_keys=True) for one in value}) < len(value):
            wrong.append(f"{at}: holds something twice")
        for index, one in enumerate(value):
            wrong += _faults(one, rule.get("items", {}), root, f"{at}[{index}]")
    elif isinstance(value, dict):
        known = rule.get("properties", {})
        wrong += [f"{at}: lacks {name}" for name in rule.get("required", []) if name not in value]
        if rule.get("additionalProperties") is False:
            wrong += [f"{at}: knows no {name}" for name in value if name not in known]
        for name, one in value.items():
            wrong += _faults(one, known.get(name, {}), root, f"{at}.{name}")
    return wrong


def test_the_openrecon_label_is_valid() -> None:
    label, schema = _label(), _schema()
    assert _faults(label, schema, schema) == []
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert label["general"]["version"] == setup["metadata"]["version"]
    assert label["reconstruction"]["content_qualification_type"] == "RESEARCH"
    assert label["reconstruction"]["port"] == PORT
    assert label["reconstruction"]["emitter"] == "raw"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("reconstruction.port", "9002"),
        ("reconstruction.emitter", "kspace"),
        ("reconstruction.min_count_required_cpu_cores", 0),
        ("reconstruction.can_use_gpu", 0),
        ("reconstruction.unknown", 1),
        ("reconstruction.content_qualification_type", "CLINICAL"),
        ("general.version", "0.1"),
        ("general.name", {"de": "quantitron"}),
        ("parameters", [{"type": "boolean", "id": "with_underscore", "label": {"en": "x"}, "default": True}]),
        (
            "parameters",
            [{"type": "boolean", "id": f"p{n}", "label": {"en": "x"}, "default": True} for n in range(15)],
        ),
        (
            "parameters",
            [
                {
                    "type": "double",
                    "id": "a",
                    "label": {"en": "x"},
                    "minimum": 0.05,
                    "maximum": 1.0,
                    "default": 0.5,
                }
            ],
        ),
    ],
)
def test_the_schema_refuses_wrong_labels(path: str, value: Any) -> None:
    label, schema = _label(), _schema()
    *folders, last = path.split(".")
    place = label
    for name in folders:
        place = place[name]
    place[last] = value
    assert _faults(label, schema, schema)


def test_the_health_check_asks_what_the_server_answers() -> None:
    from quantitron.gadgets.wire import Wire
    from quantitron.host.server import Server

    health = [sys.executable, str(DOCKER / "health.py"), "quantitron"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    closed = subprocess.run([*health, str(free)], check=False, timeout=60)
    assert closed.returncode == 1
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                Server()(Wire(connection))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        healthy = subprocess.run([*health, str(listener.getsockname()[1])], check=False, timeout=60)
        thread.join(30.0)
    assert healthy.returncode == 0


def test_the_commands_of_the_readme_fit_the_files() -> None:
    section = (ROOT / "README.md").read_text().split("## In a container\n")[1].split("\n## ")[0]
    build, up, replay = [shlex.split(line) for line in section.splitlines() if line.startswith("    ")]
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert build[:2] == ["docker", "build"]
    assert (ROOT / build[build.index("-f") + 1]).samefile(DOCKER / "Dockerfile")
    assert build[build.index("--target") + 1] in _stages()
    assert services["quantitron"]["image"].endswith(f":-{build[build.index('-t') + 1]}}}")
    assert build[-1] == "."
    assert up[:2] == ["docker", "compose"]
    assert (ROOT / up[up.index("-f") + 1]).samefile(DOCKER / "compose.yaml")
    assert replay[0] == "quantitron"
    assert replay[replay.index("--gadgetron") + 1] == f"127.0.0.1:{PORT}"


def test_the_script_of_make_image_builds_what_the_others_start() -> None:
    script = (DOCKER / "image.sh").read_text()
    (tag,) = re.findall(r"^ +tag=(\w+)$", script, re.M)
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert services["quantitron"]["image"].endswith(f":-{tag}}}")
    # of both variants with CUDA: the tag of cuda12 and of cuda13 ends in -cuda
    assert "tag=$tag-${variant%1[23]}" in script
    assert services["quantitron-gpu"]["image"].endswith(f":-{tag}-cuda}}")
    deployment = next(yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text()))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"].split(":")[0] == f"{tag}-cuda"
    assert re.search(r"^image:\n\tsh docker/image\.sh$", (ROOT / "Makefile").read_text(), re.M)
    assert f'exec "$name" id -u)" = {USER}' in (DOCKER / "smoke.sh").read_text()


@pytest.mark.parametrize("variant", ["cuda12", "cuda13"])
def test_tiny_cuda_nn_is_compiled_for_the_cuda_of_pytorch(variant: str) -> None:
    step = (DOCKER / "steps" / "tinycudann.sh").read_text()
    assert re.search(r"^commit=[0-9a-f]{40}$", step, re.M)
    number = variant.removeprefix("cuda")
    runtimes = [
        _version(requirement)
        for requirement, _ in _pins(variant)
        if requirement.name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")
        and (variant == "cuda12" or requirement.name == "nvidia-cuda-runtime")
    ]
    assert [version.split(".")[0] for version in runtimes] == [number]
    series = runtimes[0].rsplit(".", 1)[0]  # such as 12.8: the compiler's too
    compilers = [_version(requirement) for requirement, _ in _pins(f"toolkit-{variant}")]
    if variant == "cuda12":
        compilers += re.findall(r"cuda_nvcc-linux-x86_64-([\d.]+)-archive", step)
        assert re.search(r"[0-9a-f]{64}  \$here/nvcc\.tar\.xz\" \| sha256sum -c", step)
    assert len(compilers) > 1
    assert {version.rsplit(".", 1)[0] for version in compilers} == {series}


def test_scripts_can_be_parsed() -> None:
    scripts = [*DOCKER.glob("*.sh"), *DOCKER.glob("*/*.sh"), DOCKER / "gadgetron" / "python"]
    assert len(scripts) > 5
    for script in scripts:
        shell = script.read_text().splitlines()[0].rsplit("/", 1)[1]
        assert shell in ("sh", "bash")
        done = subprocess.run(["sh", "-n", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_openrecon_package_carries_the_label() -> None:
    module = runpy.run_path(str(DOCKER / "openrecon" / "package.py"))
    label = _label()
    recipe = module["dockerfile"]("quantitron", "lorein", label)
    (encoded,) = re.findall(
        r'^LABEL "com\.siemens-healthineers\.[\w.-]+:1\.1\.0"="([\w+/=]+)"$', recipe, re.M
    )
    assert json.loads(base64.b64decode(encoded)) == label
    assert module["package_name"](label) == "OpenRecon_quantitron_quantitron_V" + label["general"]["version"]
    (start,) = re.findall(r"^ENTRYPOINT (.*)$", recipe, re.M)
    (copied,) = [rest for word, rest in _stages()["host"] if word == "COPY" and "openrecon" in rest]
    assert json.loads(start)[-1] == copied.split()[-1]
    page = module["pdf"](["quantitron (research)"])
    place = int(page.rsplit(b"startxref\n", 1)[1].split()[0])
    assert page[place:].startswith(b"xref\n0 5\n")
    for number, entry in enumerate(page[place:].splitlines()[3:7], start=1):
        assert page[int(entry.split()[0]) :].startswith(b"%d 0 obj" % number)
    assert rb"(quantitron \(research\)) Tj" in page
