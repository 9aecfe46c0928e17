"""deploy/: images, compose files, systemd units and proxy files, by their linters and by what they mean."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.deployment.services import node_process
from fedsigma.common.config.schema import build
from fedsigma.server.dashboard.config import DashboardConfig
from fedsigma.server.deployment.certificates import create_authority
from fedsigma.server.deployment.home import ServerHome
from tests.helpers.deploy_files import (
    DEPLOY,
    FOLDERS,
    ONLY,
    ROOT,
    UID,
    parse,
    passes,
    process_of,
    read_yaml,
    tool,
)
from tests.unit.test_diagnostics import enrol

DOCKERFILE = DEPLOY / "images" / "Dockerfile"
IMAGES_EXTRAS = ("dicom", "biomedclip", "dashboard")
COMPOSE = {name: DEPLOY / "compose" / f"{name}.yaml" for name in ("server", "site", "site.gpu")}
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
YAMLLINT = """\
extends: default
rules: {line-length: {max: 120}, document-start: disable, truthy: {check-keys: false}}
"""
GROUPS = {"server": "server", "site": "site"}
# Tenths, as found; systemd calls up to 2.0 "OK", and a unit without any of this 9.6. The proxy may bind 443.
MOST_EXPOSED = {"fedsigma-server-proxy": 16}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def compose(name: str) -> dict[str, Any]:
    return read_yaml(COMPOSE[name], FEDSIGMA_IMAGES="/srv/images")


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Dockerfile, those of the stage it builds on first."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8")).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    stage = ""
    for line in filter(str.strip, text.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, stage = rest.split(" AS ")
            found[stage] = [*found.get(base, [])]
        found[stage].append((word, rest.strip()))
    return found


# ---- images


def test_the_dockerfile_has_no_known_fault() -> None:
    passes(tool("hadolint"), DOCKERFILE)


@pytest.mark.parametrize(("stage", "group"), [("server", "server"), ("site", "site")])
def test_container_image_runs_unprivileged_and_without_internet(stage: str, group: str) -> None:
    steps = stages()[stage]
    last = dict(steps)
    assert last["USER"] == f"{UID}:{UID}" and json.loads(last["ENTRYPOINT"]) == ["fedsigma"]
    assert steps[-1][0] == "CMD" and parse(json.loads(last["CMD"]))[0] == f"{group} up"
    check = json.loads(last["HEALTHCHECK"].split(" CMD ")[1])
    assert check[0] == "fedsigma" and parse(check[1:])[0] == f"{group} status"
    told = dict(pair.split("=", 1) for word, rest in steps if word == "ENV" for pair in shlex.split(rest))
    assert told["FLWR_TELEMETRY_ENABLED"] == "0" and told["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert told["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == told["HF_HUB_OFFLINE"] == "1"
    assert FOLDERS[group] in told.values()
    # What the tools of the build leave stays in the build.
    copied = [rest for word, rest in steps if word in ("COPY", "ADD")]
    source = {"server": "build-server", "site": "build"}[stage]
    assert copied == [f"--from={source} /opt/fedsigma /opt/fedsigma"]


def test_the_servers_image_alone_can_serve_browsers() -> None:
    found = stages()
    arguments = dict(rest.split("=") for word, rest in found["build"] if word == "ARG")
    extras = {}
    for stage in ("build", "build-server"):
        asked = re.findall(r'"fedsigma\[(\S+)\] @', " ".join(rest for _, rest in found[stage]))
        extras[stage] = ",".join(asked).replace("${EXTRAS}", arguments["EXTRAS"]).split(",")
    assert extras == {"build": ["dicom", "biomedclip"], "build-server": ["dicom", "biomedclip", "dashboard"]}
    # What is on top is of the versions that are below.
    last = found["build-server"][-1][1]
    assert "pip --python" in last and "--constraint /build/constraints.txt" in last


def test_the_dockerfile_says_the_versions_that_the_project_has() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    python = re.search(r"(?m)^# Python (\S+)$", (DEPLOY / "images" / "constraints.txt").read_text())
    assert python and f"ARG BASE=python:{python[1]}-slim-bookworm\n" in text
    assert f"ARG VERSION={project()['version']}\n" in text
    assert set(re.findall(r"fedsigma-(?:site|server):([0-9.]+)", text)) == {project()["version"]}


def test_only_what_images_are_made_of_is_sent_to_the_builder() -> None:
    first, *others = (line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#")
    sent = {line[1:] for line in others if line[0] == "!"}
    copied = {name for word, rest in stages()["build"] if word == "COPY" for name in rest.split()[:-1]}
    assert first == "*" and sent == copied and all((ROOT / name).exists() for name in sent)


def test_all_requirements_are_pinned() -> None:
    lines = (DEPLOY / "images" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line[0] != "#")
    extras = project()["optional-dependencies"]
    for line in [*project()["dependencies"], *(line for name in IMAGES_EXTRAS for line in extras[name])]:
        one = Requirement(line)
        version = pinned[canonicalize_name(one.name)]
        assert one.specifier.contains(version), (
            f"{line}, and constraints.txt has {version}: make deploy-files"
        )
    # torch says by itself which CUDA belongs to it; the CPU's build has none. Tests are not in an image.
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "pytest", "ray"))]


# ---- compose


@pytest.mark.parametrize("name", COMPOSE)
def test_a_compose_file_is_one(name: str) -> None:
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE[name])
    passes(tool("yamllint"), "--strict", "-d", YAMLLINT, COMPOSE[name])


@pytest.mark.parametrize("name", ["server", "site"])
def test_every_container_is_hardened(name: str) -> None:
    for service, said in compose(name)["services"].items():
        assert said["read_only"] is True and said["cap_drop"] == ["ALL"] and said["init"] is True, service
        assert said["security_opt"] == ["no-new-privileges:true"] and said["user"] == f"{UID}:{UID}", service
        assert not {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode"} & set(said), service
        assert said["pids_limit"] and said["mem_limit"] and said["logging"]["options"]["max-size"], service
        assert [place.split(":")[0] for place in said["tmpfs"]] == ["/tmp"], service
        # A folder that is missing must be an error, not an empty folder of root's.
        binds = [mount for mount in said["volumes"] if mount["type"] != "tmpfs"]
        assert all(mount["bind"] == {"create_host_path": False} for mount in binds), service
        assert "docker.sock" not in str(said)


@pytest.mark.parametrize(("name", "group"), [("server", "server"), ("site", "site")])
def test_each_container_is_one_process_that_is_asked_for_its_own_health(name: str, group: str) -> None:
    services = compose(name)["services"]
    for service, said in services.items():
        parse(said["command"])
        if service != "tools":
            assert process_of(said["command"]) == f"{group} {service}"
            assert said["restart"] == "unless-stopped"
        if service == "auto-resume":
            assert said["healthcheck"] == {"disable": True}
        elif service != "tools":
            kind, program, *words = said["healthcheck"]["test"]
            assert (kind, program) == ("CMD", "fedsigma")
            status, options = parse(words)
            assert status == f"{group} status" and options["only"] == service
    optional = {service: said["profiles"] for service, said in services.items() if "profiles" in said}
    assert optional == {one: [one] for one in services if one in ("tools", "dashboard")}
    # Who is not started can be nobody's condition.
    assert not any(set(optional) & set(said.get("depends_on", {})) for said in services.values())


def test_only_proxy_and_dashboard_can_be_reached_and_each_by_one_port() -> None:
    reached = {"proxy": ["443:8443"], "dashboard": ["127.0.0.1:8050:8050"]}
    networks = compose("server")["networks"]
    assert networks["inner"] == {"internal": True}
    for name, said in compose("server")["services"].items():
        assert said.get("ports", []) == reached.get(name, []), name
        assert set(said["networks"]) == ({"inner", "outside"} if name in reached else {"inner"}), name
        assert "network_mode" not in said and "expose" not in said


def seen(said: dict[str, Any]) -> dict[str, str]:
    """What a container sees: its paths, each with where it comes from."""
    return {mount["target"]: mount.get("source", "") for mount in said["volumes"]}


def test_the_proxy_sees_no_secret_but_its_own_key() -> None:
    for source in seen(compose("server")["services"]["proxy"]).values():
        databases = ("state.db", "server.db", "dashboard.db")
        for kept in ("tls/ca.key", "tls/inner.key", "secrets/superexec.secret", *databases):
            assert not (Path("server") / kept).is_relative_to(source), f"{source} holds {kept}"


def test_the_dashboard_sees_no_secret_of_the_servers() -> None:
    """A path is what the deepest mount above it shows; a tmpfs shows nothing."""
    mounts = seen(compose("server")["services"]["dashboard"])
    hiding: dict[str, str] = {}
    for file in ("tls/ca.crt", "tls/ca.key", "tls/inner.key", "tls/outer.key", "secrets/superexec.secret"):
        path = Path(FOLDERS["server"], file)
        deepest = max((place for place in mounts if path.is_relative_to(place)), key=len)
        hiding[file] = mounts[deepest]
    assert hiding.pop("tls/ca.crt") == "./server/tls/ca.crt" and set(hiding.values()) == {""}
    # It writes beside its database and the log, and SQLite beside those.
    assert mounts[FOLDERS["server"]] == "./server"


def test_the_dashboard_is_published_where_it_listens() -> None:
    said = re.sub(r"\n *#", "", COMPOSE["server"].read_text(encoding="utf-8"))
    told = re.search(r"dashboard\.yaml says: listen (\S+:\d+)\.", said)
    (port,) = compose("server")["services"]["dashboard"]["ports"]
    assert told and told[1].split(":") == ["0.0.0.0", port.split(":")[-1]]
    assert port.split(":")[-2] == DashboardConfig.listen.split(":")[1]


def test_the_sites_worker_has_no_way_out_and_no_key() -> None:
    services, networks = compose("site")["services"], compose("site")["networks"]
    worker, node = services["worker"], services["node"]
    assert worker["networks"] and all(networks[name]["internal"] is True for name in worker["networks"])
    assert not {"ports", "network_mode", "extra_hosts", "dns", "links"} & set(worker)
    assert not any("ports" in said for said in services.values())
    assert "HTTPS_PROXY" not in str(worker)
    for source in seen(worker).values():
        assert not Path("site/node").is_relative_to(source) and not source.startswith("./site/node")
    writable = {m["target"] for m in worker["volumes"] if not m.get("read_only")}
    assert writable == {f"{FOLDERS['site']}/worker"} and "/data" in seen(worker)
    # And the node has the way out, and neither images nor what the worker keeps.
    assert set(node["networks"]) == {"inside", "outside"}
    assert set(seen(node).values()) == {"./site/connection.yaml", "./site/node"}
    assert services["tools"]["network_mode"] == "none" and "/data" not in seen(services["tools"])


def test_gpus_change_the_worker_and_nothing_of_its_hardening() -> None:
    services = compose("site.gpu")["services"]
    assert set(services) == {"worker"} and set(services["worker"]) == {"image", "environment", "deploy"}
    assert list(services["worker"]["deploy"]) == ["resources"]


def addresses(name: str) -> dict[str, str]:
    """What the comment of a compose file says the server's or site's own file has to say."""
    text = " ".join(re.findall(r"(?m)^#(.*)$", COMPOSE[name].read_text(encoding="utf-8").split("name:")[0]))
    return dict(re.findall(r"(\w+) ([\w.]+:\d+)", text.split(".yaml in", 1)[1]))


def test_the_addresses_lead_from_container_to_container(tmp_path: Path) -> None:
    said, services = addresses("site"), compose("site")["services"]
    host = said["node"].split(":")[0]
    assert set(services[host]["networks"]) >= set(services["worker"]["networks"]) and host == "node"
    site = enrol(tmp_path, create_authority("tests").certificate)
    file = site.path / "connection.yaml"
    kept = [line for line in file.read_text().splitlines() if line.split(":")[0] not in said]
    file.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in said.items())]) + "\n")
    command = shlex.join(node_process(SiteHome(site.path)).command)
    assert f"--host 0.0.0.0 --port {said['node'].split(':')[1]} " in command

    said, services = addresses("server"), compose("server")["services"]
    assert set(said) == {"listen", "superlink", "health", "worker_health"}
    for key, service in (("superlink", "superlink"), ("health", "superlink"), ("worker_health", "worker")):
        assert said[key].split(":")[0] == service == services[service]["hostname"]
    assert services["proxy"]["ports"][0].split(":")[1] == said["listen"].split(":")[1]


def test_commands_in_messages_exist() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    text += (DEPLOY / "helm" / "fedsigma" / "templates" / "NOTES.txt").read_text(encoding="utf-8")
    typed = re.findall(r"(?m)^ +(?:.*--rm tools|(?:.* )?fedsigma) (.+)$", text.replace("\\\n", " "))
    assert len(typed) > 12
    for words in typed:
        parse(shlex.split(words))


# ---- systemd


def unit(file: Path) -> dict[str, list[str]]:
    """The values of each key of a unit's [Service]."""
    found: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").split("[Service]")[1].split("[Install]")[0].splitlines():
        if "=" in line and line[0] != "#":
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def test_systemd_reads_the_units(tmp_path: Path) -> None:
    program = tool("systemd-analyze")
    for file in [*UNITS, *(DEPLOY / "systemd").glob("*.target")]:
        text = file.read_text(encoding="utf-8").replace("/opt/fedsigma/bin/fedsigma", "/bin/true")
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [program, "verify", "--man=no", *sorted(tmp_path.iterdir())], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.stem)
def test_systemd_finds_a_unit_hardly_exposed(file: Path) -> None:
    passes(
        tool("systemd-analyze"),
        "security",
        "--offline=true",
        f"--threshold={MOST_EXPOSED.get(file.stem, 13)}",
        file,
    )


def test_each_unit_is_one_process_of_a_user_without_rights() -> None:
    started = {}
    for group in FOLDERS:
        target = DEPLOY / "systemd" / f"fedsigma-{GROUPS[group]}.target"
        wanted = re.findall(
            rf"fedsigma-{GROUPS[group]}-([\w-]+)\.service", target.read_text(encoding="utf-8")
        )
        assert sorted(wanted) == sorted(ONLY[group])
    for file in UNITS:
        said = unit(file)
        (command,) = said["ExecStart"]
        program, *words = command.split()
        assert program == "/opt/fedsigma/bin/fedsigma"
        _, group, process = file.stem.split("-", 2)
        assert process_of(words) == f"{'server' if group == 'server' else 'site'} {process}"
        started[f"{group} {process}"] = said
        assert said["NoNewPrivileges"] == ["yes"] and said["ProtectSystem"] == ["strict"]
        rights = ["CAP_NET_BIND_SERVICE"] if process == "proxy" else [""]
        assert said["CapabilityBoundingSet"] == said["AmbientCapabilities"] == rights
        assert ("MemoryDenyWriteExecute" in said) == (process != "worker")
    node, worker = started["site node"], started["site worker"]
    assert "root" not in {said["User"][0] for said in started.values()} and node["User"] != worker["User"]
    for name in ("site worker", "server superlink", "server worker", "server auto-resume"):
        assert started[name]["IPAddressDeny"] == ["any"] and started[name]["IPAddressAllow"] == ["localhost"]
    # The one process that may be left out: it is where its file is, and nothing waits for it.
    text = (DEPLOY / "systemd" / "fedsigma-server-dashboard.service").read_text(encoding="utf-8")
    assert f"\nConditionPathExists={FOLDERS['server']}/dashboard.yaml\n" in text
    assert not [file.name for file in UNITS if "dashboard.service" in file.read_text(encoding="utf-8")]
    hidden = {word.lstrip("-") for word in started["server dashboard"]["InaccessiblePaths"][0].split()}
    assert hidden == {
        f"{FOLDERS['server']}/{name}" for name in ("tls/ca.key", "tls/inner.key", "secrets", "state.db")
    }
    assert f"-{FOLDERS['server']}/dashboard.db" in started["server proxy"]["InaccessiblePaths"][0].split()
    assert worker["ReadWritePaths"] == [f"{FOLDERS['site']}/worker"]
    assert worker["InaccessiblePaths"] == [f"-{FOLDERS['site']}/node"]
    assert node["ReadWritePaths"] == [f"{FOLDERS['site']}/node"]
    assert f"-{FOLDERS['site']}/worker" in node["InaccessiblePaths"][0].split()


def test_the_units_users_own_what_they_need_and_no_more(tmp_path: Path) -> None:
    """By systemd's own programs, in a root of the test's own."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files to other users")
    programs = [tool("systemd-sysusers"), tool("systemd-tmpfiles")]
    site = enrol(tmp_path / "made", create_authority("tests").certificate)
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    place = root / FOLDERS["site"].lstrip("/")
    place.parent.mkdir(parents=True)
    site.path.rename(place)
    for program, name in zip(programs, ("sysusers", "tmpfiles"), strict=True):
        create = ["--create"] if name == "tmpfiles" else []
        passes(program, f"--root={root}", *create, DEPLOY / "systemd" / f"{name}.conf")
    users = dict(line.split(":")[0:3:2] for line in (root / "etc" / "passwd").read_text().splitlines())
    owners = {
        name: (place / name).stat().st_uid
        for name in ("node/node.key", "worker/identity.pem", "site.yaml", "connection.yaml")
    }
    node, worker = int(users["fedsigma-node"]), int(users["fedsigma-worker"])
    assert list(owners.values()) == [node, worker, 0, 0] and node != worker
    group = re.search(r"(?m)^fedsigma:\w*:(\d+):(.*)$", (root / "etc" / "group").read_text())
    assert group and set(group[2].split(",")) == {"fedsigma-node", "fedsigma-worker"}
    for name, mode in ((".", 0o750), ("site.yaml", 0o640), ("node", 0o700), ("worker", 0o700)):
        assert (place / name).stat().st_mode & 0o777 == mode, name
    assert place.stat().st_gid == (place / "site.yaml").stat().st_gid == int(group[1])


def test_gpus_open_no_more_than_nvidias_devices() -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.read(DEPLOY / "systemd" / "gpu.conf")
    assert set(parser["Service"]) == {"privatedevices", "devicepolicy", "deviceallow"}
    assert set(unit(DEPLOY / "systemd" / "gpu.conf")["DeviceAllow"]) == {
        f"char-nvidia{kind} rw" for kind in ("", "-frontend", "-uvm")
    }


# ---- proxies


def written() -> Any:
    """The module that writes the examples."""
    spec = importlib.util.spec_from_file_location("examples", DEPLOY / "proxy" / "examples.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_an_example_of_a_proxys_file_is_what_the_code_writes(name: str, tmp_path: Path) -> None:
    examples = written()
    text = (DEPLOY / "proxy" / name).read_text(encoding="utf-8")
    assert text == examples.examples()[name], "make deploy-files"
    # With the folder of a real server, since both programs look at the certificates.
    server = ServerHome.create(tmp_path / "server", examples.EXAMPLE, own=None).path
    file = tmp_path / name
    file.write_text(text.replace(examples.FOLDER, str(server)), encoding="utf-8")
    if name == "Caddyfile":
        passes(tool("caddy"), "validate", "--config", file, "--adapter", "caddyfile")
    else:
        (server / "proxy" / "run").mkdir()
        passes(tool("nginx"), "-t", "-c", file, "-e", tmp_path / "error.log")


def test_the_proxy_that_the_docs_put_before_a_dashboard_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    shown, behind = re.findall(r"(?s)```yaml\n(listen:.*?)```", text)
    (server,) = re.findall(r"(?s)```nginx\n(.*?)```", text)
    config = build(DashboardConfig, yaml.safe_load(behind), where="docs")
    assert build(DashboardConfig, yaml.safe_load(shown), where="docs").access.secure
    assert f"proxy_pass http://{config.listen};" in server
    assert f"server_name {urlsplit(config.access.origins[0]).hostname};" in server
    create_authority("tests").write(tmp_path / "fl-dashboard.crt", tmp_path / "fl-dashboard.key")
    file = tmp_path / "nginx.conf"
    whole = f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {server} }}"
    file.write_text(whole.replace("/etc/ssl", str(tmp_path)), encoding="utf-8")
    passes(tool("nginx"), "-t", "-c", file, "-e", tmp_path / "error.log")


def test_the_script_that_writes_constraints_runs() -> None:
    text = passes(sys.executable, DEPLOY / "images" / "constraints.py")
    assert re.search(r"(?m)^flwr==", text) and not re.search(r"(?m)^(nvidia|pytest|fedsigma)", text)
