"""The dashboard, the images, the unit and the manifest fit the server that they are for."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from gapless.cli.program import app
from gapless.outputs import Usage
from gapless.server import metrics
from gapless.server.config import ServerConfig
from gapless.server.observer import ServerObserver
from support.engine_source import FakeEngines, context_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCS = (ROOT / "docs" / "deploy.md").read_text()
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
DASHBOARD = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
UNIT = (DEPLOY / "gapless.service").read_text()
KUBERNETES = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
POD = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
USER = 10001


def samples() -> dict[str, set[str]]:
    """Labels by the name of each series that /metrics can have."""
    observer = ServerObserver()
    watch = observer.opened("a", "/v1/completions")
    watch.tokens(1)
    watch.ended("stop", Usage(1, 1))
    text = asyncio.run(metrics.render(context_of(FakeEngines(), observer))).decode()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) | {"instance"} for sample in found}


def queries() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_metric_of_the_dashboard_and_the_docs_is_there():
    there = samples()
    for text in [*queries(), DOCS]:
        for name in re.findall(r"\bgapless_[a-z0-9_]+\b", text):
            assert name in there or f"{name}_bucket" in there, f"{name} in {text[:80]!r}"


def test_every_metric_is_on_the_dashboard():
    shown = " ".join(queries())
    for name in samples():
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        assert re.search(rf"\b{family}(_bucket|_sum|_count)?\b", shown), name


def test_the_dashboards_labels_are_those_of_its_metrics():
    there = samples()
    for expression in queries():
        for name, selector in re.findall(r"\b(gapless_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=~", selector)) <= there[name], expression
        for by in re.findall(r"by \(([\w, ]+)\)", expression):
            names = re.findall(r"\bgapless_\w+", expression)
            assert all(set(re.split(", *", by)) <= there[name] for name in names), expression


def test_every_panel_takes_its_data_from_the_source_that_was_chosen():
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert all(each["datasource"] == source for each in [panel, *panel["targets"]]), panel["title"]
    for variable in set(variables) - {"datasource"}:
        assert variables[variable]["datasource"] == source
    for name in re.findall(r"\$(\w+)", " ".join(queries())):
        assert name in variables or name == "__rate_interval"


def test_panels_have_ids_of_their_own_and_lie_side_by_side():
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & mine, panel["title"]
        cells |= mine
    assert DASHBOARD["id"] is None
    assert DASHBOARD["schemaVersion"] >= 39  # Grafana 11


def test_every_option_that_is_named_is_one_of_the_servers():
    serve = get_command(app).commands["serve"]  # pyright: ignore[reportAttributeAccessIssue]
    variables = {parameter.envvar for parameter in serve.params} | {"GAPLESS_CACHE"}
    flags = {flag for parameter in serve.params for flag in [*parameter.opts, *parameter.secondary_opts]}
    for path in [*DEPLOY.iterdir(), ROOT / "docs" / "deploy.md"]:
        for name in re.findall(r"\bGAPLESS_[A-Z_]+", path.read_text()):
            assert name in variables, f"{name} in {path.name}"
    others = {"--help", "--init", "--gpus", "--stop-timeout", "--rm", "--read-only", "--tmpfs", "--cap-drop"}
    others |= {"--security-opt", "--from-literal", "--now"}
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", DOCS):
        assert flag in flags | others, flag


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and argument of each, with lines that go on put together."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


def last_stage(path: Path) -> list[tuple[str, str]]:
    every = instructions(path)
    return every[max(place for place, (name, _) in enumerate(every) if name == "FROM") :]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_in_particular_and_says_how_it_is(path: Path):
    last = dict(last_stage(path))
    assert last["USER"] == f"{USER}:{USER}"
    assert "/health" in last["HEALTHCHECK"]
    assert json.loads(last["ENTRYPOINT"]) == ["gapless"]  # as it is, so that it gets the signals
    assert json.loads(last["CMD"]) == ["serve"]
    names = [name for name, _ in last_stage(path)]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name in ("RUN", "COPY"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_made_of_pinned_parts(path: Path):
    every = instructions(path)
    arguments = dict(rest.split("=") for name, rest in every if name == "ARG")
    assert re.fullmatch(r"\d+\.\d+\.\d+-slim-\w+", arguments["PYTHON"])
    assert re.fullmatch(r"\d+\.\d+\.\d+(\+cpu)?", arguments["TORCH"])
    for name, rest in every:
        if name == "FROM":
            assert rest.startswith("python:${PYTHON}")
        assert name != "ADD"
        for command in re.findall(r"pip install[^&]*", rest):
            assert "-c deploy/constraints.txt" in command
            assert "--no-cache-dir" in command
    copied = [rest for name, rest in every if name == "COPY" and "--from" not in rest]
    assert not any(set(rest.split()[:-1]) & {".", "./", "*"} for rest in copied)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_builder_is_sent_what_the_image_copies(path: Path):
    ignored = (DEPLOY / f"{path.name}.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    sent = {line[1:] for line in ignored if line.startswith("!")}
    wanted = {
        source
        for name, rest in instructions(path)
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert sent == wanted
    assert all((ROOT / each).exists() for each in wanted)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path):
    if (hadolint := shutil.which("hadolint")) is None:
        pytest.skip("hadolint is not installed")
    ran = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_all_that_the_images_install_is_pinned_within_what_the_package_takes():
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["otel"]]]
    seen = {"torch"}  # named in the Dockerfiles
    while waiting:
        needed = waiting.pop()
        name = canonicalize_name(needed.name)
        if name not in seen:
            seen.add(name)
            assert name in pins, f"{name} is not pinned"
            assert needed.specifier.contains(pins[name], prereleases=True), f"{needed} is pinned to {pins[name]}"
            if version(name) == pins[name]:  # else what is installed here needs other things
                waiting += [each for each in map(Requirement, requires(name) or []) if applies(each, needed.extras)]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras])


def test_systemd_has_nothing_to_say(tmp_path: Path):
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "gapless.service"
    unit.write_text(UNIT.replace("/opt/gapless/bin/gapless", "/bin/true"))
    ran = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


def test_the_unit_lets_the_server_drain_and_gives_it_no_rights():
    values = dict(line.split("=", 1) for line in UNIT.splitlines() if "=" in line and not line.startswith("#"))
    assert float(values["TimeoutStopSec"]) >= ServerConfig().drain_seconds + 10
    assert values["KillMode"] == "mixed"  # SIGTERM is for the server alone: its engine must live to drain
    assert values["Restart"] == "on-failure"
    for name in ("DynamicUser", "NoNewPrivileges", "PrivateTmp", "PrivateUsers", "ProtectHome", "RestrictNamespaces"):
        assert values[name] == "yes"
    assert values["ProtectSystem"] == "strict"
    assert values["CapabilityBoundingSet"] == ""


def test_the_pods_probes_ask_what_they_are_for():
    assert {name: CONTAINER[name]["httpGet"]["path"] for name in CONTAINER if name.endswith("Probe")} == {
        "startupProbe": "/ready",
        "readinessProbe": "/ready",
        "livenessProbe": "/health",
    }
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    (port,) = CONTAINER["ports"]
    (service,) = KUBERNETES["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"] == CONTAINER["livenessProbe"]["httpGet"]["port"]


def test_the_pod_has_time_to_drain():
    environment = {each["name"]: each for each in CONTAINER["env"]}
    drain = float(environment["GAPLESS_DRAIN_SECONDS"]["value"])
    sleep = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] >= sleep + drain + 10
    assert "secretKeyRef" in environment["GAPLESS_API_KEY"]["valueFrom"]


def test_the_pod_has_no_rights_and_no_links_that_look_like_options():
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsUser"] == USER
    assert POD["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    inner = CONTAINER["securityContext"]
    assert (inner["allowPrivilegeEscalation"], inner["readOnlyRootFilesystem"]) == (False, True)
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert POD["automountServiceAccountToken"] is False
    assert POD["enableServiceLinks"] is False
    assert CONTAINER["resources"]["limits"]["memory"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    selector = KUBERNETES["Deployment"]["spec"]["selector"]["matchLabels"]
    labels = KUBERNETES["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert selector.items() <= labels.items()
    assert KUBERNETES["Service"]["spec"]["selector"].items() <= labels.items()


def test_the_docs_proxy_does_not_collect_streams():
    (site,) = re.findall(r"```nginx\n(.*?)```", DOCS, re.DOTALL)
    assert "proxy_buffering off;" in site
    assert "proxy_http_version 1.1;" in site
    assert f"client_max_body_size {ServerConfig().max_body_bytes // 2**20}m;" in site


def test_links_of_the_docs_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", DOCS):
        assert (ROOT / "docs" / target).exists(), target
