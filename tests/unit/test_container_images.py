"""The images' Dockerfiles, their pinned packages and how they are read; the slow suite assembles and runs one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
import sys
import tarfile
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from configs.errors import ConfigError
from configs.settings import PROJECT_ROOT
from deployments.images import dockerfile, sbom
from deployments.images.archive import write_archive
from deployments.images.assemble import IMAGES, main
from deployments.images.dockerfile import ImageConfig, Stage
from ml.objects import ObjectStore
from tests.support.images import serving_image
from tests.support.jail import Jail
from tests.support.registry import Shelf
from tests.support.replica import Replica, photo, store_environment, wait_until
from tests.support.s3 import unique
from tests.support.stack import object_store
from tests.support.tiny_model import write_tiny_model

FOLDER = PROJECT_ROOT / "deployments" / "images"
ONLY_IN_THE_IMAGE = {"async-timeout"}  # Python before 3.11.3
_PIN = re.compile(r"^([a-z0-9-]+)(?:\[[a-z,-]+\])?==([^\s;\\]+)", re.MULTILINE)
# Linux on any processor, Python 3.11: what the Dockerfiles' base runs.
_IN_THE_IMAGE = {
    "extra": "",
    "python_version": "3.11",
    "python_full_version": "3.11.2",
    "sys_platform": "linux",
    "platform_system": "Linux",
}


def pins(file: Path) -> dict[str, str]:
    """Package versions of a requirements file."""
    return {canonicalize_name(name): version for name, version in _PIN.findall(file.read_text(encoding="utf-8"))}


def stages_of(image: str) -> dict[str, Stage]:
    """The parsed Dockerfile."""
    return dockerfile.parse((FOLDER / image / "Dockerfile").read_text(encoding="utf-8"), {})


def described(stage: Stage) -> ImageConfig:
    """What a stage's own instructions say about the image."""
    config = ImageConfig()
    for step in stage.instructions:
        if step.keyword == "ENV":
            config.environment |= dockerfile.pairs(step, {})
        elif step.keyword not in ("RUN", "COPY", "ARG", "WORKDIR"):
            dockerfile.describe(step, config, {"VERSION": "1.2.3", "REVISION": "f" * 40, "CREATED": "now"})
    return config


def files_of(stages: dict[str, Stage]) -> list[str]:
    """Every path that is copied from the context."""
    steps = [step for stage in stages.values() for step in stage.instructions if step.keyword == "COPY"]
    return [name for step in steps if not step.options for name in step.value.split()[:-1]]


# What goes in


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_the_versions_that_were_tested(image: str) -> None:
    locked = pins(PROJECT_ROOT / "requirements.lock")
    installed = pins(FOLDER / image / "requirements.txt")

    assert {name: version for name, version in installed.items() if locked.get(name) != version} == {}


def needs(name: str) -> list[str]:
    """What the metadata of a package names. One that only the image's Python needs is not installed beside the tests,
    and needs nothing itself."""
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        assert name in ONLY_IN_THE_IMAGE
        return []


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_everything_that_its_packages_need(image: str) -> None:
    installed = pins(FOLDER / image / "requirements.txt")
    needed = {
        canonicalize_name(requirement.name)
        for name in installed
        for requirement in map(Requirement, needs(name))
        if requirement.marker is None or requirement.marker.evaluate(_IN_THE_IMAGE)
    }

    assert needed - set(installed) - {"torch"} == set()  # torch comes from an index of its own


@pytest.mark.parametrize("file", ["serving/requirements.txt", "pipelines/requirements.txt", "tools.txt"])
def test_every_package_is_pinned_by_its_hashes(file: str) -> None:
    blocks = re.split(r"^(?=[a-z0-9])", (FOLDER / file).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]

    assert len(blocks) > 20
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_the_serving_image_has_all_that_a_replica_imports_and_no_training() -> None:
    graph = grimp.build_graph("configs", "ml", include_external_packages=True)
    imported = {name.partition(".")[0] for name in graph.find_upstream_modules("ml.serve")}
    foreign = imported - sys.stdlib_module_names - {"configs", "ml"}
    distributions = packages_distributions()
    installed = pins(FOLDER / "serving" / "requirements.txt")

    missing = [name for name in foreign if not {canonicalize_name(d) for d in distributions[name]} & set(installed)]

    assert missing == []
    assert not {"torch", "prefect", "pytorch-lightning", "kubernetes", "wandb"} & set(installed)


def test_the_pipelines_image_has_every_dependency_of_the_project() -> None:
    wanted = {
        canonicalize_name(Requirement(text).name)
        for text in importlib.metadata.requires("khet-guard-pipelines") or ()
        if "extra ==" not in text
    }

    assert wanted - set(pins(FOLDER / "pipelines" / "requirements.txt")) == {"torch"}


# What it is like


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_pinned_and_runs_as_nobody_special(image: str) -> None:
    stages = stages_of(image)
    config = described(stages[image])

    assert re.fullmatch(r"docker\.io/library/debian:bookworm-\d{8}-slim@sha256:[0-9a-f]{64}", stages["base"].base)
    assert config.user == "10001:10001"
    assert config.healthcheck["Test"]
    assert config.environment["PYTHONDONTWRITEBYTECODE"] == "1"
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config.labels.items()}
    assert labels["title"] == f"khet-guard/{image}"
    assert (labels["version"], labels["revision"], labels["created"]) == ("1.2.3", "f" * 40, "now")


@pytest.mark.parametrize("image", IMAGES)
def test_compilers_and_pip_stay_in_the_stages_that_build(image: str) -> None:
    stages = stages_of(image)

    assert stages[image].base == "base"
    assert not [step for step in stages[image].instructions if step.keyword == "RUN"]
    assert "pip" not in "".join(step.value for step in stages["base"].instructions)


@pytest.mark.parametrize("image", IMAGES)
def test_the_builder_sees_what_is_copied_and_nothing_private(image: str) -> None:
    rules = dockerfile.ignore_rules((FOLDER / image / "Dockerfile.dockerignore").read_text(encoding="utf-8"))
    copied = files_of(stages_of(image))

    assert copied
    assert [path for path in copied if dockerfile.ignored(path, rules) or not (PROJECT_ROOT / path).exists()] == []
    private = [".khet/settings.yaml", ".git/config", ".env", "ml/.env", "tests/conftest.py", "ml/__pycache__/net.pyc"]
    assert [path for path in private if not dockerfile.ignored(path, rules)] == []


# How a Dockerfile is read

SMALL = """
# a comment
ARG BASE=debian:bookworm-slim
FROM ${BASE} AS base
RUN one \\
 # between
 && two
FROM base AS unused
FROM base AS mounted
FROM base AS final
COPY --from=base /a /a
RUN --mount=type=bind,from=mounted,source=/a,target=/b --mount=type=cache,target=/c true
HEALTHCHECK --interval=10s --retries=3 CMD ["true"]
ENTRYPOINT ["python", "-m", "ml.serve"]
"""


def test_a_build_does_only_the_stages_that_the_target_needs() -> None:
    stages = dockerfile.parse(SMALL, {"BASE": "debian:trixie-slim"})

    assert [stage.name for stage in dockerfile.needed_by(stages, "final")] == ["base", "mounted", "final"]
    assert stages["base"].base == "debian:trixie-slim"
    assert stages["base"].instructions[0].value.split() == ["one", "&&", "two"]


def test_the_description_is_spelled_as_engines_spell_it() -> None:
    config = described(dockerfile.parse(SMALL, {})["final"])

    assert config.to_oci() == {
        "WorkingDir": "/",
        "Healthcheck": {"Test": ["CMD", "true"], "Interval": 10 * 10**9, "Retries": 3},
        "Entrypoint": ["python", "-m", "ml.serve"],
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("FROM debian:bookworm-slim\n", "line 1: FROM wants"),
        ("FROM a AS b\nADD https://example.org /\n", "line 2: ADD is not understood"),
        ("FROM a AS b\n\nONBUILD RUN x\n", "line 3: ONBUILD is not understood"),
        ("RUN x\n", "line 1: RUN is not understood"),
        ("FROM a AS b\nRUN --mount=type=secret,id=x true\n", "line 2: RUN --mount=type=secret"),
        ("FROM a AS b\nRUN --network=none true\n", "line 2: RUN --network=none"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        dockerfile.needed_by(dockerfile.parse(text, {}), "b")


def test_a_shell_between_the_signals_and_the_replica_is_refused() -> None:
    stage = dockerfile.parse("FROM a AS b\nENTRYPOINT python -m ml.serve\n", {})["b"]

    with pytest.raises(ConfigError, match="exec form"):
        described(stage)


@pytest.mark.parametrize(
    ("path", "rules", "expected"),
    [
        ("a/b.py", ("*",), True),
        ("a/b.py", ("*", "!a"), False),
        ("a/c/b.pyc", ("*", "!a", "**/*.pyc"), True),
        ("b.pyc", ("**/*.pyc",), True),
        ("a/b/c", ("a/*/c",), True),
        ("a/b/d/c", ("a/*/c",), False),
        ("ab", ("a?",), True),
    ],
)
def test_dockerignore(path: str, rules: tuple[str, ...], expected: bool) -> None:
    assert dockerfile.ignored(path, rules) is expected


# What comes out


def test_the_bill_of_materials_lists_python_and_debian_packages() -> None:
    python = {
        "specVersion": "1.6",
        "components": [{"type": "library", "bom-ref": "numpy==2", "name": "numpy"}],
        "dependencies": [{"ref": "numpy==2"}],
    }
    dpkg = (
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9+deb12u1\n"
        "Description: C\n continued\n"
        "\nPackage: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )

    whole = sbom.complete(python, "khet-guard/serving", "1.2.3", dpkg)

    assert whole["metadata"]["component"] == {
        "type": "container",
        "bom-ref": "image",
        "name": "khet-guard/serving",
        "version": "1.2.3",
    }
    purl = "pkg:deb/debian/libc6@2.36-9%2Bdeb12u1?arch=amd64&distro=debian-12"
    assert [component["bom-ref"] for component in whole["components"]] == ["numpy==2", purl]
    assert whole["dependencies"][0] == {"ref": "image", "dependsOn": ["numpy==2", purl]}


def test_an_archive_is_what_engines_load(tmp_path: Path) -> None:
    (tmp_path / "root" / "bin").mkdir(parents=True)
    (tmp_path / "root" / "bin" / "program").write_text("#!/bin/sh\n", encoding="utf-8")
    written = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for out in written:
        identity = write_archive(tmp_path / "root", "khet-guard/x:1.0", {"User": "10001"}, "2026-01-01T00:00:00Z", out)

    with tarfile.open(written[0]) as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    [manifest] = json.loads(content["manifest.json"])
    config = json.loads(content[manifest["Config"]])
    layer = content[manifest["Layers"][0]]
    assert manifest["RepoTags"] == ["docker.io/khet-guard/x:1.0"]
    assert identity == f"sha256:{hashlib.sha256(content[manifest['Config']]).hexdigest()}"
    assert config["config"] == {"User": "10001"}
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    with tarfile.open(fileobj=io.BytesIO(layer)) as inside:
        assert inside.getmember("./bin/program").isfile()


def test_an_archive_needs_a_version(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no version"):
        write_archive(tmp_path, "localhost:5000/x", {}, "2026-01-01T00:00:00Z", tmp_path / "x.tar")


def test_a_used_folder_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine").write_text("", encoding="utf-8")

    assert main(["serving", str(tmp_path)]) == ConfigError.exit_code
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert "Nothing was built" in caplog.text


# The real thing

PREDICT = """
import json, urllib.request
photo = open("/mnt/photo.jpg", "rb").read()
request = urllib.request.Request("http://127.0.0.1:8080/predict", photo, {"content-type": "image/jpeg"})
print(urllib.request.urlopen(request, timeout=10).read().decode())
"""


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImageConfig]:
    """The serving image's root filesystem, assembled from its Dockerfile, and what the image says about itself."""
    return serving_image(tmp_path_factory.mktemp("images"))


@pytest.mark.slow
def test_the_serving_image_answers_predictions_from_a_root_that_nobody_can_write_to(
    serving: tuple[Path, ImageConfig], tmp_path: Path
) -> None:
    root, config = serving
    write_tiny_model(tmp_path / "mnt" / "model")
    (tmp_path / "mnt" / "photo.jpg").write_bytes(photo())
    tmp_path.chmod(0o755)
    jail = Jail(root, config, ["/tmp", "/var/cache/khet"], {tmp_path / "mnt": "/mnt"})
    command = [*config.entrypoint, *config.command, "--model", "/mnt/model"]

    with jail.running(command, tmp_path / "log") as replica:
        healthy = [str(word) for word in config.healthcheck["Test"][1:]]  # type: ignore[index]
        wait_until(lambda: replica.outer.poll() is not None or not replica.run(healthy).returncode, 60, "healthy")
        answer = replica.run(["python", "-c", PREDICT])
        refused = replica.run(["sh", "-c", "id -u; touch /opt/khet-guard/ml/x"])
        assert replica.terminate() == 0, replica.text()

    assert json.loads(answer.stdout)["model_version"] == "local", answer.stderr + replica.text()
    assert refused.stdout == "10001\n"
    assert refused.returncode != 0
    assert "Read-only file system" in refused.stderr


@pytest.mark.slow
def test_the_serving_image_fetches_verifies_and_logs(serving: tuple[Path, ImageConfig], tmp_path: Path) -> None:
    root, config = serving
    tmp_path.chmod(0o755)
    with object_store(tmp_path / "s3") as stored:
        area = stored.model_copy(update={"models_bucket": unique("models"), "data_bucket": unique("data")})
        store = ObjectStore(area)
        store.ensure_bucket(area.data_bucket)
        shelf = Shelf.make(store, area.models_bucket, tmp_path)
        write_tiny_model(shelf.folder)
        version = shelf.publish("release").version
        (tmp_path / "mnt").mkdir()
        (tmp_path / "mnt" / "key.pub").write_bytes(shelf.trusted[0].read_bytes())
        environment = store_environment(area) | {
            "MODEL_VERSION": str(version),
            "KHET_REGISTRY__TRUSTED_KEYS": '["/mnt/key.pub"]',
            "KHET_SERVING__LOG_FLUSH_S": "0.2",
        }
        jail = Jail(root, config, ["/tmp", "/var/cache/khet"], {tmp_path / "mnt": "/mnt"}, True, environment)

        with jail.running([*config.entrypoint, "--port", "0"], tmp_path / "log") as running:
            replica = Replica(running.outer, running.log)
            replica.wait_ready()
            answer = replica.predict(photo())
            keys = wait_until(lambda: list(store.list(area.data_bucket, "inference/")), 20, "the prediction log")
            replica.client.close()

    assert answer.json()["model_version"] == str(version)
    assert len(keys) == 1


@pytest.mark.slow
def test_the_serving_image_holds_what_its_bill_of_materials_says(serving: tuple[Path, ImageConfig]) -> None:
    root, config = serving
    bill = json.loads((root / "usr/share/sbom/khet-guard-serving.cdx.json").read_text(encoding="utf-8"))
    listed = {component["name"]: component["version"] for component in bill["components"]}
    pinned = pins(FOLDER / "serving" / "requirements.txt")

    assert {name: listed.get(name) for name in ("onnxruntime", "numpy")} == {
        name: pinned[name] for name in ("onnxruntime", "numpy")
    }
    assert {"python3.11-minimal", "libc6", "ca-certificates"} <= set(listed)
    assert not {"torch", "prefect", "pip", "gcc-12", "python3-pip"} & set(listed)
    assert config.labels["org.opencontainers.image.title"] == bill["metadata"]["component"]["name"]


@pytest.mark.slow
def test_only_the_cache_belongs_to_the_user_of_the_serving_image(serving: tuple[Path, ImageConfig]) -> None:
    root, _ = serving
    theirs = [path for path in root.rglob("*") if path.lstat().st_uid == 10001]
    open_to_all = [path for path in (root / "opt").rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]

    assert theirs == [root / "var/cache/khet"]
    assert open_to_all == []
